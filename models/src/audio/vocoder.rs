//! The vocoder: log-mel spectrogram to stereo waveform, with bandwidth extension where the model has it.
//!
//! # Easy to get wrong
//! - With bandwidth extension everything is computed in f32, whatever the dtype of the pipeline: bf16 there costs 40 to
//!   90 % in spectral metrics. The reference rounds the finished waveform to the pipeline's dtype; we do not.
//! - The spectrogram of the extension is causal: all its padding stands in front.
//! - Its Fourier and mel bases are the stored ones, real parts first, then imaginary parts.
//! - The prefix `vocoder.` of the keys is stripped once: the core of LTX-2.3 is `vocoder.vocoder.`.

use ltxc_ir::ops::{Conv, ConvTranspose, PadMode, Unary};
use ltxc_ir::{Builder, DType, Module, Rate, TensorType};

use super::decoder::{decode_mel, latent_type};
use super::generator::{Generator, STEREO, Sequence};
use super::layers::Spectrogram;
use super::{AudioVaeConfig, ExtensionConfig, VocoderConfig, check_frames};
use crate::{Functions, ModelError, Weights};

/// Smallest mel magnitude before the logarithm.
const LEAST_MAGNITUDE: f64 = 1e-5; // ltx_core/model/audio_vae, MelSTFT

/// Builds the entry `vocode`: `mel` f32 `[1, frames, m, 2]` → `waveform` f32 `[1, n, 2]` in −1..=1.
///
/// - `mel`: natural logarithm of the mel magnitudes; `m` is what the stored weights take.
/// - `n` is [`VocoderConfig::output_samples`], at [`VocoderConfig::output_rate_hz`].
/// - `weights`: the whole checkpoint (keys `vocoder.…`); `dtype`: of the activations of a vocoder without extension.
///
/// # Errors
/// Missing or misshapen weights, a length of 0 or one that is too large.
///
/// Source: spec/audio-vae-vocoder §4, §5.
pub fn vocode(
    config: &VocoderConfig,
    weights: &Weights<'_>,
    frames: usize,
    dtype: DType,
) -> Result<Module, ModelError> {
    check_frames("vocoder", "mel frames", frames)?;
    let b = Builder::new("vocode");
    let m = mel_bins(config, weights)?;
    let mel = b.param("mel", TensorType::f32([1, frames, m, STEREO]), Rate::Step);
    let functions = Functions::default();
    let mel = Spectrogram { value: mel, t: frames, m, c: STEREO };
    let waveform = waveform(&b, &functions, config, weights, mel, dtype);
    b.result("waveform", waveform.value);
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// Builds the entry `decode_audio`: `latent` f32 `[1, latents, z · bins]` → `waveform` f32 `[1, n, 2]`.
///
/// [`super::decode`] and [`vocode`] in one; between them the spectrogram has the dtype of the activations.
///
/// # Errors
/// Those of both, and a spectrogram of the VAE that the vocoder does not take.
pub fn decode_audio(
    vae: &AudioVaeConfig,
    vocoder: &VocoderConfig,
    weights: &Weights<'_>,
    latents: usize,
    dtype: DType,
) -> Result<Module, ModelError> {
    check_frames("audio_vae", "latents", latents)?;
    let b = Builder::new("decode_audio");
    // Without the tensor that tells, the vocoder takes what it is given, and the tensor is reported with all others.
    let taken = (stored_mel_bins(vocoder, weights).unwrap_or(vae.mel_bins), STEREO);
    let made = (vae.mel_bins, vae.out_channels);
    if taken != made {
        let problem = format!("takes {taken:?} mel bins and channels, the audio VAE makes {made:?}");
        return Err(ModelError::config("vocoder", problem));
    }
    let latent = b.param("latent", latent_type(vae, latents), Rate::Step);
    let functions = Functions::default();
    let mel = decode_mel(&b, &functions, vae, weights, latent, dtype);
    let waveform = waveform(&b, &functions, vocoder, weights, mel, dtype);
    b.result("waveform", waveform.value);
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// Mel bins per channel that the vocoder takes.
fn mel_bins(config: &VocoderConfig, weights: &Weights<'_>) -> Result<usize, ModelError> {
    stored_mel_bins(config, weights).ok_or_else(|| {
        let prefix = core_prefix(config);
        let problem = format!("weight `{prefix}.conv_pre.weight` is missing or is not [channels, 2 · mel bins, 7]");
        ModelError::config("vocoder", problem)
    })
}

fn stored_mel_bins(config: &VocoderConfig, weights: &Weights<'_>) -> Option<usize> {
    Generator::new(&config.core, weights, core_prefix(config)).mel_bins()
}

fn core_prefix(config: &VocoderConfig) -> &'static str {
    if config.extension.is_some() { "vocoder.vocoder" } else { "vocoder" }
}

/// The waveform of a spectrogram, in f32.
fn waveform(
    b: &Builder,
    functions: &Functions,
    config: &VocoderConfig,
    weights: &Weights<'_>,
    mel: Spectrogram,
    dtype: DType,
) -> Sequence {
    let dtype = if config.extension.is_some() { DType::F32 } else { dtype };
    let mel = Spectrogram { value: b.cast(mel.value, dtype), ..mel };
    let core = Generator::new(&config.core, weights, core_prefix(config)).waveform(b, functions, mel);
    let core = Sequence { value: b.cast(core.value, DType::F32), ..core };
    b.name("vocoder.core_waveform", core.value);
    match &config.extension {
        None => core,
        Some(extension) => extend(b, functions, extension, weights, core),
    }
}

/// Adds the missing frequencies: `clamp(generator(log_mel(w)) + resample(w))` at `ratio` times the rate, in f32.
///
/// `core` is in −1..=1 already, whichever final activation it has.
fn extend(
    b: &Builder,
    functions: &Functions,
    config: &ExtensionConfig,
    weights: &Weights<'_>,
    core: Sequence,
) -> Sequence {
    let behind = core.t.next_multiple_of(config.hop_length) - core.t;
    let padded = b.pad(core.value, &[0, 0, 0], &[0, behind, 0], PadMode::Zeros);
    let padded = Sequence { value: padded, t: core.t + behind, ..core };
    let mel = log_mel(b, config, weights, padded);
    let generator = Generator::new(&config.generator, weights, "vocoder.bwe_generator");
    let residual = generator.waveform(b, functions, mel);
    b.name("vocoder.bwe_generator.waveform", residual.value);
    let skip = b.name("vocoder.resampler", resample(b, config.ratio, padded).value);
    let sum = b.clamp(b.add(residual.value, skip), -1.0, 1.0);
    let t = core.t.saturating_mul(config.ratio);
    Sequence { value: b.slice_axis(sum, 1, 0, t), t, c: core.c }
}

/// Log-mel spectrogram `[1, t / hop, m, 2]` of a waveform `[1, t, 2]`, `t` a multiple of the hop.
fn log_mel(b: &Builder, config: &ExtensionConfig, weights: &Weights<'_>, wave: Sequence) -> Spectrogram {
    let weights = weights.below("vocoder.mel_stft.");
    let (n_fft, hop) = (config.n_fft, config.hop_length);
    let bins = n_fft / 2 + 1;
    let frames = wave.t / hop;
    // The channels become a batch: the same bases for each.
    let rows = b.reshape(b.transpose(wave.value, &[0, 2, 1]), &[STEREO, wave.t, 1]);
    let basis = weights.get(b, "stft_fn.forward_basis", &[2 * bins, 1, n_fft]);
    let op = Conv { stride: vec![hop], dilation: vec![1], pad: vec![(n_fft - hop, 0)], groups: 1 };
    let spectrum = b.conv(op, rows, b.transpose(basis, &[2, 1, 0]));
    let real = b.slice_axis(spectrum, 2, 0, bins);
    let imaginary = b.slice_axis(spectrum, 2, bins, 2 * bins);
    let magnitude = b.unary(Unary::Sqrt, b.add(b.mul(real, real), b.mul(imaginary, imaginary)));
    let mel_basis = weights.get(b, "mel_basis", &[config.mel_bins, bins]);
    let mel = b.max(b.matmul_transposed(magnitude, mel_basis), b.scalar(LEAST_MAGNITUDE));
    let mel = b.reshape(b.unary(Unary::Log, mel), &[1, STEREO, frames, config.mel_bins]);
    let value = b.name("vocoder.mel_stft", b.transpose(mel, &[0, 2, 3, 1]));
    Spectrogram { value, t: frames, m: config.mel_bins, c: STEREO }
}

/// The waveform at `ratio` times its rate: interpolation by a windowed sinc, edges repeated.
fn resample(b: &Builder, ratio: usize, wave: Sequence) -> Sequence {
    let filter = resampler_filter(ratio);
    let taps = filter.len();
    let taps_value = b.name("vocoder.resampler.filter", b.constant(&[taps, 1, 1], &filter));
    let w = b.broadcast(taps_value, &[taps, 1, wave.c]);
    let padded = b.pad(wave.value, &[0, RESAMPLER_WIDTH, 0], &[0, RESAMPLER_WIDTH, 0], PadMode::Edge);
    let cut = (2 * RESAMPLER_WIDTH * ratio, taps - ratio);
    let op = ConvTranspose { stride: vec![ratio], dilation: vec![1], pad: vec![cut], groups: wave.c };
    let value = b.mul_scalar(b.conv_transpose(op, padded, w), ratio as f64);
    Sequence { value, t: wave.t.saturating_mul(ratio), ..wave }
}

const ROLLOFF: f64 = 0.99; // ltx_core/model/audio_vae, UpSample1d with window_type "hann"
const ZERO_CROSSINGS: f64 = 6.0; // as above, lowpass_filter_width
const RESAMPLER_WIDTH: usize = 7; // ⌈ZERO_CROSSINGS / ROLLOFF⌉

/// Taps of the low-pass filter that interpolates between samples, `2 · 7 · ratio + 1` of them.
///
/// `sinc(τ) · cos²(π · clamp(τ, −6, 6) / 12) · 0.99 / ratio` with `τ = (k / ratio − 7) · 0.99`; not normalised.
fn resampler_filter(ratio: usize) -> Vec<f32> {
    let tap = |k: usize| {
        let tau = (k as f64 / ratio as f64 - RESAMPLER_WIDTH as f64) * ROLLOFF;
        let phase = std::f64::consts::PI * tau;
        let sinc = if tau == 0.0 { 1.0 } else { phase.sin() / phase };
        let edge = tau.clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS) / ZERO_CROSSINGS;
        let window = (std::f64::consts::FRAC_PI_2 * edge).cos().powi(2);
        (sinc * window * ROLLOFF / ratio as f64) as f32
    };
    (0..2 * RESAMPLER_WIDTH * ratio + 1).map(tap).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resampler_taps_are_those_of_the_spec() {
        let taps = resampler_filter(3);
        let expected = [0.33, 0.27194273, 0.13534595, 0.00311387, -0.05947996];
        assert_eq!(taps.len(), 43);
        for (i, e) in expected.into_iter().enumerate() {
            assert!((taps[21 + i] - e).abs() < 1e-7 && (taps[21 - i] - e).abs() < 1e-7, "tap {i}: {}", taps[21 + i]);
        }
        assert!((taps.iter().sum::<f32>() - 1.000466).abs() < 1e-6);
    }
}
