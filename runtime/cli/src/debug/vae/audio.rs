//! A latent or a spectrogram through audio decoder and vocoder: loudness second by second, and whether it depends on the
//! length of the clip, as it does in ports that normalise over the whole clip.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_models::audio::{self, AudioVaeConfig, VocoderConfig};
use ltxc_runtime::noise_files::Stored;
use ltxc_runtime::random::NormalStream;
use ltxc_runtime::stats::Stats;
use serde_json::{Value, json};

use super::reference::{ReferenceArgs, facts};
use super::{Model, channels_last, chosen};
use crate::debug::modules::{Kept, Side};
use crate::debug::parity::channels_first;

/// Factor between the loudness of a clip and of one twice as long that nothing explains.
const MOST_FACTOR: f64 = 1.25;

/// `ltxc debug vae audio`.
#[derive(Debug, Args)]
pub struct AudioArgs {
    /// Latent: zero, random, or a file (.safetensors, .npy, .npz, .pt) of shape (1, c, t, bins), or (1, t, c·bins).
    #[arg(long, default_value = "random", conflicts_with = "mel")]
    pub latent: String,
    /// Spectrogram for the vocoder instead of a latent: a file with natural logarithms, (1, 2, t, bins).
    #[arg(long, value_name = "FILE")]
    pub mel: Option<PathBuf>,
    /// Tensor of the file, if it has several.
    #[arg(long, value_name = "NAME")]
    pub tensor: Option<String>,
    /// Seconds of a latent that is not read from a file.
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub reference: ReferenceArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// The audio side of a model.
struct Sound<'a> {
    model: &'a Model<'a>,
    vae: AudioVaeConfig,
    vocoder: VocoderConfig,
}

impl Sound<'_> {
    /// The spectrogram `[1, t, bins, 2]` of tokens `[1, l, c·bins]`.
    fn mel(&self, tokens: &Tensor) -> Result<Kept> {
        let module = audio::decode(&self.vae, &self.model.weights(), tokens.ty.shape[1], DType::F32)?;
        let ran =
            self.model
                .bench()?
                .run_keeping("audio_vae", &module, "decode", std::slice::from_ref(tokens), &|_| false)?;
        Ok(ran.result("mel")?.clone())
    }

    /// The waveform `[1, n, 2]` of a spectrogram.
    fn waveform(&self, mel: &Tensor) -> Result<Kept> {
        let module = audio::vocode(&self.vocoder, &self.model.weights(), mel.ty.shape[1], DType::F32)?;
        let ran =
            self.model.bench()?.run_keeping("vocoder", &module, "vocode", std::slice::from_ref(mel), &|_| false)?;
        Ok(ran.result("waveform")?.clone())
    }
}

pub(super) fn audio(args: &AudioArgs, model: &Model<'_>, json_output: bool) -> Result<bool> {
    let vae = AudioVaeConfig::from_json(model.checkpoint.section("audio_vae")?)?;
    let vocoder = VocoderConfig::from_json(model.checkpoint.section("vocoder")?)?;
    let sound = Sound { model, vae, vocoder };
    let latent = if args.mel.is_none() { Some(latent(args, &sound.vae)?) } else { None };
    let mel = match (&args.mel, &latent) {
        (Some(path), _) => spectrogram(chosen(path, args.tensor.as_deref(), 4)?)?,
        (None, Some(latent)) => tensor(&sound.mel(latent)?),
        (None, None) => bail!("there is neither a latent nor a spectrogram"),
    };
    let waveform = sound.waveform(&mel)?;
    let rate = sound.vocoder.output_rate_hz;
    let m = Stats::of(&mel.ty.shape, &mel.to_f32());
    let seconds: Vec<(f64, f64)> = waveform.values.chunks(2 * rate.max(1)).map(loudness).collect();
    let (rms, peak) = loudness(&waveform.values);
    let mut flags = Vec::new();
    if m.is_bad() || !rms.is_finite() {
        flags.push("the sound is not finite".to_string());
    } else if rms == 0.0 {
        flags.push("the sound is silence".into());
    }
    // The same twice over must be as loud.
    let twice = latent.as_ref().map(|latent| -> Result<f64> {
        let values = latent.to_f32();
        let &[_, l, c] = &latent.ty.shape[..] else { bail!("a latent has three axes") };
        let longer = Tensor::f32(&[1, 2 * l, c], &[&values[..], &values].concat());
        Ok(loudness(&sound.waveform(&tensor(&sound.mel(&longer)?))?.values).0)
    });
    let twice = twice.transpose()?;
    let factor = twice.map(|twice| twice / rms.max(1e-30));
    if let Some(factor) = factor.filter(|f| rms > 0.0 && !(1.0 / MOST_FACTOR..=MOST_FACTOR).contains(f)) {
        flags.push(format!("the same sound twice over is {factor:.2} times as loud: loudness depends on length"));
    }
    // Recordings have spectrograms as (1, 2, t, bins), waveforms as (1, 2, n).
    let native_mel = channels_first(&mel.to_f32(), 2);
    let native_wave = channels_first(&waveform.values, 2);
    let wants_mel = args.reference.compare_tensor.as_deref().is_some_and(|name| name.contains("mel"));
    let verdict = match wants_mel {
        true => args.reference.check(&["dec.mel"], &native_mel)?,
        false => args.reference.check(&["waveform", "decode_audio.waveform"], &native_wave)?,
    };
    let ok = flags.is_empty() && verdict.as_ref().is_none_or(|v| v.ok);
    if json_output {
        let rows: Vec<Value> = seconds.iter().map(|(rms, peak)| json!({"rms": rms, "peak": peak})).collect();
        println!(
            "{}",
            json!({"mel_shape": mel.ty.shape, "mel_mean": m.mean, "mel_std": m.std, "mel_min": m.min, "mel_max": m.max,
                "rate_hz": rate, "samples": waveform.values.len() / 2, "rms": rms, "peak": peak, "seconds": rows,
                "twice_as_long": factor, "compared": facts(verdict.as_ref()), "flags": flags, "ok": ok})
        );
        return Ok(ok);
    }
    println!("mel {} mean {:.4} std {:.4} [{:.3}, {:.3}]", m.shape_text(), m.mean, m.std, m.min, m.max);
    println!("{} samples at {rate} Hz, RMS {rms:.5}, peak {peak:.5}", waveform.values.len() / 2);
    for (i, (rms, peak)) in seconds.iter().enumerate() {
        println!("second {i:<4} RMS {rms:.5} peak {peak:.5}");
    }
    if let Some(factor) = factor {
        println!("the same twice over: {factor:.3} times as loud");
    }
    if let Some(verdict) = verdict {
        println!("{}", verdict.text());
    }
    flags.iter().for_each(|flag| println!("RED FLAG: {flag}"));
    Ok(ok)
}

fn tensor(kept: &Kept) -> Tensor {
    Tensor::f32(&kept.ty.shape, &kept.values)
}

/// RMS and peak of samples.
fn loudness(samples: &[f32]) -> (f64, f64) {
    let square = samples.iter().map(|s| f64::from(*s).powi(2)).sum::<f64>() / samples.len().max(1) as f64;
    (square.sqrt(), samples.iter().map(|s| f64::from(s.abs())).fold(0.0, f64::max))
}

/// Tokens `[1, l, c·bins]`.
fn latent(args: &AudioArgs, vae: &AudioVaeConfig) -> Result<Tensor> {
    let width = vae.token_channels();
    let path = match args.latent.as_str() {
        kind @ ("zero" | "random") => {
            if !(0.0..=600.0).contains(&args.seconds) {
                bail!("`--seconds {}` is out of range, expected 0 to 600", args.seconds);
            }
            let (num, den) = vae.latent_rate_hz();
            let l = ((args.seconds * num as f64 / den as f64).round_ties_even() as usize).max(1);
            let values =
                if kind == "zero" { vec![0.0; l * width] } else { NormalStream::new(0, "latent").draw(l * width) };
            return Ok(Tensor::f32(&[1, l, width], &values));
        }
        path => path,
    };
    let axes = |axes: usize| chosen(path.as_ref(), args.tensor.as_deref(), axes);
    let tensor = axes(4).or_else(|_| axes(3))?;
    match tensor.shape[..] {
        [1, l, c] if c == width => Ok(Tensor::f32(&[1, l, width], &tensor.values)),
        [1, z, l, bins] if z * bins == width => {
            let at = |i: usize, c: usize, m: usize| tensor.values[(c * l + i) * bins + m];
            let places = (0..l).flat_map(|i| (0..z).flat_map(move |c| (0..bins).map(move |m| (i, c, m))));
            Ok(Tensor::f32(&[1, l, width], &places.map(|(i, c, m)| at(i, c, m)).collect::<Vec<_>>()))
        }
        _ => bail!(
            "`{}` of `{path}` is {:?}, expected (1, {}, t, {}) or (1, t, {width})",
            tensor.name,
            tensor.shape,
            vae.z_channels,
            vae.latent_bins()
        ),
    }
}

/// A spectrogram `(1, 2, t, bins)` as `[1, t, bins, 2]`.
fn spectrogram(stored: Stored) -> Result<Tensor> {
    let &[1, 2, t, bins] = &stored.shape[..] else {
        bail!("`{}` is {:?}, expected (1, 2, t, bins)", stored.name, stored.shape)
    };
    Ok(Tensor::f32(&[1, t, bins, 2], &channels_last(&stored.values, 2)))
}
