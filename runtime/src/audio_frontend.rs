//! The mel front end: a recorded waveform becomes the log-mel spectrogram that the audio encoder takes.
//!
//! Runs on the host, once per input file. Everything is computed in f64 and rounded to f32 at the end of each stage.
//! Reading audio files is not done here.
//!
//! # Easy to get wrong
//! - The spectrogram is centred with reflected edges, also for models whose config calls the front end causal.
//! - Magnitudes, not powers; the natural logarithm of at least 1e-5.
//! - Mel filters are Slaney's: linear below 1 kHz, and of equal area.
//! - The resampler cuts its result to `⌈n · length / o⌉` samples for reduced rates `o → n`.
//!
//! Source: spec/audio-vae-vocoder §2.

use std::f64::consts::PI;
use std::sync::Arc;

use rustfft::num_complex::Complex;
use rustfft::{Fft, FftPlanner};

/// What a model's front end looks like; comes from the checkpoint's config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MelSettings {
    /// Sampling rate of the spectrogram in Hz; the filters reach half of it.
    pub rate_hz: usize,
    /// Length of the Fourier transform and of its Hann window, in samples; even.
    pub n_fft: usize,
    /// Samples from one frame to the next.
    pub hop_length: usize,
    /// Mel bins per channel.
    pub mel_bins: usize,
}

/// Audio that cannot be turned into a spectrogram.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)] // the messages are the documentation
pub enum FrontendError {
    #[error("audio has {found} samples at {rate_hz} Hz, at least {least} are needed; use a longer recording")]
    TooShort { found: usize, least: usize, rate_hz: usize },
    #[error("audio has no channels")]
    NoChannels,
    #[error("audio channels have {first} and {other} samples, expected equal lengths")]
    Lengths { first: usize, other: usize },
    #[error("audio sample {position} is not a finite number")]
    NotFinite { position: usize },
    #[error("sampling rate {rate_hz} Hz is out of range {LEAST_RATE_HZ}..={MOST_RATE_HZ}")]
    Rate { rate_hz: usize },
    #[error("mel settings {settings:?} are not usable: {problem}")]
    Settings { settings: MelSettings, problem: &'static str },
}

/// Range of sampling rates: wide enough for every recording, narrow enough to bound what a file header can ask for.
const LEAST_RATE_HZ: usize = 1_000;
const MOST_RATE_HZ: usize = 1 << 20;

/// Longest transform.
const MOST_POINTS: usize = 1 << 16;

/// Largest number of mel bins.
const MOST_BINS: usize = 1 << 10;

/// Smallest mel magnitude before the logarithm.
const LEAST_MAGNITUDE: f64 = 1e-5; // ltx_core/model/audio_vae, AudioProcessor

/// Computes log-mel spectrograms of one kind.
pub struct MelFrontend {
    settings: MelSettings,
    window: Vec<f64>,
    /// `[n_fft / 2 + 1, mel_bins]`.
    filters: Vec<f64>,
    fft: Arc<dyn Fft<f64>>,
}

impl MelFrontend {
    /// Prepares window, filters and transform.
    ///
    /// # Errors
    /// [`FrontendError::Settings`] if a number is out of range, or the transform has an odd length.
    pub fn new(settings: MelSettings) -> Result<MelFrontend, FrontendError> {
        let MelSettings { rate_hz, n_fft, hop_length, mel_bins } = settings;
        let fail = |problem| Err(FrontendError::Settings { settings, problem });
        if !(LEAST_RATE_HZ..=MOST_RATE_HZ).contains(&rate_hz) {
            return fail("the rate is out of range");
        }
        if !(2..=MOST_POINTS).contains(&n_fft) || n_fft % 2 != 0 {
            return fail("the transform must have an even length of at most 65536");
        }
        if !(1..=n_fft).contains(&hop_length) || !(1..=MOST_BINS).contains(&mel_bins) {
            return fail("the hop must be in 1..=n_fft, the mel bins in 1..=1024");
        }
        let window = (0..n_fft).map(|i| 0.5 - 0.5 * (2.0 * PI * i as f64 / n_fft as f64).cos()).collect();
        let filters = mel_filters(settings);
        Ok(MelFrontend { settings, window, filters, fft: FftPlanner::new().plan_fft_forward(n_fft) })
    }

    /// The mel filters, `[n_fft / 2 + 1, mel_bins]`.
    pub fn filters(&self) -> Vec<f32> {
        self.filters.iter().map(|&v| v as f32).collect()
    }

    /// Frames of a waveform of `samples` at the spectrogram's rate.
    pub fn frames(&self, samples: usize) -> usize {
        1 + samples / self.settings.hop_length
    }

    /// The stereo log-mel spectrogram of a recording at any sampling rate.
    ///
    /// - `channels`: one waveform per channel, in −1..=1. Mono is used twice; of more than two channels the first two
    ///   are used, which are front left and right in every common order.
    /// - Result: `[t, mel_bins, 2]`, row-major, natural logarithm, with its number of frames `t`.
    ///
    /// # Errors
    /// No channels, channels of different lengths, a rate out of range, or less than half a transform of samples.
    pub fn stereo_log_mel(&self, channels: &[Vec<f32>], rate_hz: usize) -> Result<(usize, Vec<f32>), FrontendError> {
        let (left, right) = match channels {
            [] => return Err(FrontendError::NoChannels),
            [mono] => (mono, mono),
            [left, right, ..] => (left, right),
        };
        if left.len() != right.len() {
            return Err(FrontendError::Lengths { first: left.len(), other: right.len() });
        }
        let of_channel = |x: &[f32]| self.log_mel(&resample(x, rate_hz, self.settings.rate_hz)?);
        let left_mel = of_channel(left)?;
        let right_mel = if channels.len() == 1 { left_mel.clone() } else { of_channel(right)? };
        let interleaved = left_mel.iter().zip(&right_mel).flat_map(|(&l, &r)| [l, r]).collect();
        Ok((left_mel.len() / self.settings.mel_bins, interleaved))
    }

    /// The log-mel spectrogram `[t, mel_bins]` of one channel at the spectrogram's rate.
    ///
    /// # Errors
    /// [`FrontendError::TooShort`] if the edges cannot be reflected (the waveform must be longer than half a transform),
    /// [`FrontendError::NotFinite`] for a sample that is infinite or NaN.
    pub fn log_mel(&self, waveform: &[f32]) -> Result<Vec<f32>, FrontendError> {
        let MelSettings { rate_hz, n_fft, hop_length, mel_bins } = self.settings;
        let half = n_fft / 2;
        if waveform.len() <= half {
            return Err(FrontendError::TooShort { found: waveform.len(), least: half + 1, rate_hz });
        }
        if let Some(position) = waveform.iter().position(|x| !x.is_finite()) {
            return Err(FrontendError::NotFinite { position });
        }
        let last = waveform.len() - 1;
        let reflected = |i: usize| {
            // Position `i` of the waveform with `half` reflected samples at both ends.
            let k = i.abs_diff(half);
            waveform[if i >= half && k > last { 2 * last - k } else { k }] as f64
        };
        let frames = self.frames(waveform.len());
        let mut out = Vec::with_capacity(frames.saturating_mul(mel_bins));
        let mut spectrum = vec![Complex::default(); n_fft];
        let mut scratch = vec![Complex::default(); self.fft.get_inplace_scratch_len()];
        let mut mel = vec![0f64; mel_bins];
        for frame in 0..frames {
            for (i, (z, w)) in spectrum.iter_mut().zip(&self.window).enumerate() {
                *z = Complex::new(reflected(frame * hop_length + i) * w, 0.0);
            }
            self.fft.process_with_scratch(&mut spectrum, &mut scratch);
            mel.fill(0.0);
            for (z, row) in spectrum[..=half].iter().zip(self.filters.chunks_exact(mel_bins)) {
                let magnitude = z.norm();
                mel.iter_mut().zip(row).for_each(|(m, f)| *m += magnitude * f);
            }
            out.extend(mel.iter().map(|m| m.max(LEAST_MAGNITUDE).ln() as f32));
        }
        Ok(out)
    }
}

/// Triangular filters with edges uniform in mel from 0 Hz to half the rate, of equal area: `[n_fft / 2 + 1, mel_bins]`.
///
/// With edges `l < c < r` in Hz: `max(0, min((f − l) / (c − l), (r − f) / (r − c))) · 2 / (r − l)`.
fn mel_filters(settings: MelSettings) -> Vec<f64> {
    let MelSettings { rate_hz, n_fft, mel_bins, .. } = settings;
    let nyquist = rate_hz as f64 / 2.0;
    let top = mel_of_hz(nyquist);
    let edges: Vec<f64> = (0..mel_bins + 2).map(|i| hz_of_mel(top * i as f64 / (mel_bins + 1) as f64)).collect();
    let mut filters = vec![0f64; (n_fft / 2 + 1) * mel_bins];
    for (bin, row) in filters.chunks_exact_mut(mel_bins).enumerate() {
        let f = nyquist * bin as f64 / (n_fft / 2) as f64;
        for (value, edge) in row.iter_mut().zip(edges.windows(3)) {
            let (l, c, r) = (edge[0], edge[1], edge[2]);
            let triangle = ((f - l) / (c - l)).min((r - f) / (r - c)).max(0.0);
            *value = triangle * 2.0 / (r - l);
        }
    }
    filters
}

const HZ_PER_MEL: f64 = 200.0 / 3.0; // Slaney's Auditory Toolbox: linear up to …
const BREAK_HZ: f64 = 1000.0; // … here
const BREAK_MEL: f64 = 15.0; // = BREAK_HZ / HZ_PER_MEL
const MELS_PER_LOG: f64 = 27.0; // 27 mels are a factor of 6.4 in frequency above the break

fn mel_of_hz(hz: f64) -> f64 {
    if hz < BREAK_HZ { hz / HZ_PER_MEL } else { BREAK_MEL + MELS_PER_LOG * (hz / BREAK_HZ).ln() / 6.4f64.ln() }
}

fn hz_of_mel(mel: f64) -> f64 {
    if mel < BREAK_MEL { mel * HZ_PER_MEL } else { BREAK_HZ * ((mel - BREAK_MEL) * 6.4f64.ln() / MELS_PER_LOG).exp() }
}

const ROLLOFF: f64 = 0.99; // torchaudio.functional.resample, default
const ZERO_CROSSINGS: f64 = 6.0; // as above, lowpass_filter_width

/// A waveform at another sampling rate: windowed sinc interpolation, zeros outside.
///
/// Rates in Hz. For reduced rates `o → n`, `b = 0.99 · min(o, n)`: sample `i · n + p` of the result is the sum over `j`
/// of `x[i · o + j] · sinc(τ) · cos²(π τ / 12) · b / o` with `τ = (j / o − p / n) · b` in −6..=6. The result has
/// `⌈n · length / o⌉` samples; equal rates copy.
///
/// # Errors
/// [`FrontendError::Rate`] if a rate is out of range 1000..=2^20.
pub fn resample(waveform: &[f32], from_hz: usize, to_hz: usize) -> Result<Vec<f32>, FrontendError> {
    for rate_hz in [from_hz, to_hz] {
        if !(LEAST_RATE_HZ..=MOST_RATE_HZ).contains(&rate_hz) {
            return Err(FrontendError::Rate { rate_hz });
        }
    }
    let divisor = greatest_common_divisor(from_hz, to_hz);
    let (o, n) = (from_hz / divisor, to_hz / divisor);
    if o == n {
        return Ok(waveform.to_vec());
    }
    let band = ROLLOFF * o.min(n) as f64;
    let phases: Vec<(isize, Vec<f64>)> = (0..n).map(|p| phase_taps(o, n, p, band)).collect();
    let length = (waveform.len() as u128 * n as u128).div_ceil(o as u128) as usize;
    let sample = |k: usize| {
        let (first, taps) = &phases[k % n];
        let start = (k / n * o) as isize + first;
        let inside = |(i, &tap): (usize, &f64)| {
            let x = usize::try_from(start + i as isize).ok().and_then(|at| waveform.get(at));
            x.map_or(0.0, |&x| x as f64 * tap)
        };
        taps.iter().enumerate().map(inside).sum::<f64>() as f32
    };
    Ok((0..length).map(sample).collect())
}

/// Position of the first tap of phase `p`, and the taps. Only the taps inside the window are listed; they are rounded
/// to f32 as in the reference.
fn phase_taps(o: usize, n: usize, p: usize, band: f64) -> (isize, Vec<f64>) {
    let centre = p as f64 * o as f64 / n as f64;
    let reach = ZERO_CROSSINGS * o as f64 / band;
    let (first, last) = ((centre - reach).ceil() as isize, (centre + reach).floor() as isize);
    let tap = |j: isize| {
        let tau = ((j as f64 / o as f64 - p as f64 / n as f64) * band).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS);
        let window = (PI * tau / (2.0 * ZERO_CROSSINGS)).cos().powi(2);
        let sinc = if tau == 0.0 { 1.0 } else { (PI * tau).sin() / (PI * tau) };
        (sinc * window * band / o as f64) as f32 as f64
    };
    (first, (first..=last).map(tap).collect())
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: MelSettings = MelSettings { rate_hz: 16_000, n_fft: 1024, hop_length: 160, mel_bins: 64 };

    fn sine(hz: f64, rate_hz: usize, samples: usize) -> Vec<f32> {
        (0..samples).map(|i| (2.0 * PI * hz * i as f64 / rate_hz as f64).sin() as f32).collect()
    }

    #[test]
    fn resampling_keeps_a_low_sine_and_has_the_length_of_the_spec() {
        for (from, to, samples) in
            [(48_000, 16_000, 4801), (44_100, 16_000, 4410), (16_000, 48_000, 1600), (24_000, 16_000, 7)]
        {
            let y = resample(&sine(440.0, from, samples), from, to).unwrap();
            assert_eq!(y.len(), (samples * to).div_ceil(from));
            let expected = sine(440.0, to, y.len());
            // Away from the ends the filter's ripple is all that is left: below 1e-3 of full scale at rolloff 0.99.
            let inner = y.len() / 4..y.len() * 3 / 4;
            if inner.len() > 100 {
                assert!(inner.clone().all(|i| (y[i] - expected[i]).abs() < 2e-3), "{from} → {to}");
            }
        }
    }

    #[test]
    fn equal_rates_copy_and_bad_rates_are_refused() {
        let x = sine(100.0, 16_000, 33);
        assert_eq!(resample(&x, 16_000, 16_000).unwrap(), x);
        assert_eq!(resample(&x, 0, 16_000), Err(FrontendError::Rate { rate_hz: 0 }));
        assert!(resample(&x, usize::MAX, 16_000).is_err());
        assert!(resample(&[], 44_100, 16_000).unwrap().is_empty());
    }

    #[test]
    fn a_sine_peaks_in_its_mel_bin() {
        let frontend = MelFrontend::new(SETTINGS).unwrap();
        let mel = frontend.log_mel(&sine(1000.0, 16_000, 4001)).unwrap();
        assert_eq!(mel.len(), 26 * 64);
        let row = &mel[12 * 64..13 * 64];
        let peak = (0..64).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        // 1 kHz is mel 15 of 45.245…; edges lie 45.245 / 65 apart, and bin j has its centre at edge j + 1.
        assert_eq!(peak, (15.0f64 / mel_of_hz(8000.0) * 65.0).round() as usize - 1);
    }

    #[test]
    fn silence_is_the_logarithm_of_the_smallest_magnitude() {
        let frontend = MelFrontend::new(SETTINGS).unwrap();
        let (frames, mel) = frontend.stereo_log_mel(&[vec![0.0; 513]], 16_000).unwrap();
        assert_eq!((frames, mel.len()), (4, 4 * 64 * 2));
        assert!(mel.iter().all(|&v| v == 1e-5f64.ln() as f32));
    }

    #[test]
    fn channels_are_mapped_to_stereo() {
        let frontend = MelFrontend::new(SETTINGS).unwrap();
        let (a, c) = (sine(300.0, 16_000, 700), sine(2000.0, 16_000, 700));
        let mono = frontend.stereo_log_mel(std::slice::from_ref(&a), 16_000).unwrap().1;
        assert!(mono.chunks_exact(2).all(|p| p[0] == p[1]));
        let stereo = frontend.stereo_log_mel(&[a.clone(), c.clone()], 16_000).unwrap().1;
        assert!(stereo.chunks_exact(2).zip(mono.chunks_exact(2)).all(|(s, m)| s[0] == m[0]));
        assert_eq!(frontend.stereo_log_mel(&[a.clone(), c.clone(), a.clone()], 16_000).unwrap().1, stereo);
        assert_eq!(frontend.stereo_log_mel(&[], 16_000), Err(FrontendError::NoChannels));
        let uneven = frontend.stereo_log_mel(&[a, c[1..].to_vec()], 16_000);
        assert_eq!(uneven, Err(FrontendError::Lengths { first: 700, other: 699 }));
    }

    #[test]
    fn what_cannot_be_computed_is_refused() {
        let frontend = MelFrontend::new(SETTINGS).unwrap();
        let expected = FrontendError::TooShort { found: 512, least: 513, rate_hz: 16_000 };
        assert_eq!(frontend.log_mel(&[0.0; 512]), Err(expected));
        assert_eq!(frontend.log_mel(&[f32::NAN; 600]), Err(FrontendError::NotFinite { position: 0 }));
        for settings in [
            MelSettings { n_fft: 0, ..SETTINGS },
            MelSettings { n_fft: 1023, ..SETTINGS },
            MelSettings { hop_length: 0, ..SETTINGS },
            MelSettings { mel_bins: 4096, ..SETTINGS },
            MelSettings { rate_hz: usize::MAX, ..SETTINGS },
        ] {
            assert!(MelFrontend::new(settings).is_err());
        }
    }
}
