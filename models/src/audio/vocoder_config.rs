//! Configuration of the vocoder: the object `vocoder` of a checkpoint's config.
//!
//! A flat object is the HiFi-GAN of LTX-2. One with `bwe` is the generator of LTX-2.3 and 2.5, which is followed by a
//! second generator that extends the bandwidth.
//!
//! # Easy to get wrong
//! - `win_size` and `apply_final_activation` of `bwe` are not read: the window is `n_fft` long, and the second generator
//!   never has a final activation.
//! - The core of the nested form clamps its output unless `use_tanh_at_final` is set (a missing key means that it is).
//! - The output rate belongs to the checkpoint: 24 kHz for LTX-2, 48 kHz for later models.

use serde_json::Value;

use crate::ModelError;
use crate::fields::{Fields, MOST};

/// What the checkpoint says about the vocoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocoderConfig {
    /// The generator that turns a log-mel spectrogram into a waveform.
    pub core: GeneratorConfig,
    /// The bandwidth extension behind it, if there is one.
    pub extension: Option<ExtensionConfig>,
    /// Sampling rate of the result in Hz.
    pub output_rate_hz: usize,
}

/// A convolutional generator: transposed convolutions, each followed by the mean of residual blocks.
///
/// Source: spec/audio-vae-vocoder §4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratorConfig {
    /// Which activations and residual blocks it is made of.
    pub kind: GeneratorKind,
    /// Width before the first stage; every stage halves it.
    pub channels: usize,
    /// Factor in time of every stage.
    pub rates: Vec<usize>,
    /// Kernel size of the transposed convolution of every stage, at least its rate.
    pub rate_kernels: Vec<usize>,
    /// Kernel size of each of the residual blocks of a stage; odd.
    pub block_kernels: Vec<usize>,
    /// Dilations of each of the residual blocks of a stage.
    pub block_dilations: Vec<Vec<usize>>,
    /// Whether the last convolution has a bias.
    pub has_final_bias: bool,
    /// What is applied last.
    pub final_activation: FinalActivation,
}

/// Family of a [`GeneratorConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GeneratorKind {
    /// HiFi-GAN: leaky ReLU, residual blocks of type `1`.
    HifiGan,
    /// BigVGAN: anti-aliased SnakeBeta, residual blocks of type `AMP1`.
    BigVgan,
}

/// Last operation of a generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalActivation {
    /// Hyperbolic tangent.
    Tanh,
    /// Limits to −1..=1.
    Clamp,
    /// Nothing.
    None,
}

/// The bandwidth extension: a second generator on the log-mel of the first one's waveform, added to the resampled
/// waveform.
///
/// Source: spec/audio-vae-vocoder §5.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtensionConfig {
    /// The second generator.
    pub generator: GeneratorConfig,
    /// Factor between the two sampling rates.
    pub ratio: usize,
    /// Samples of the input per mel frame.
    pub hop_length: usize,
    /// Length of the Fourier transform, at least the hop.
    pub n_fft: usize,
    /// Mel bins.
    pub mel_bins: usize,
}

impl VocoderConfig {
    /// Reads the object `vocoder` of a checkpoint's config.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that is malformed, contradictory or unsupported.
    pub fn from_json(vocoder: &Value) -> Result<VocoderConfig, ModelError> {
        let root = Fields::new("vocoder", vocoder);
        if !root.has("bwe") {
            let core = GeneratorConfig::read(&root, GeneratorKind::HifiGan);
            let output_rate_hz = root.size("output_sampling_rate", 24_000);
            return root.finish(VocoderConfig { core, extension: None, output_rate_hz });
        }
        let core = GeneratorConfig::read(&root.required_below("vocoder"), GeneratorKind::BigVgan);
        let bwe = root.below("bwe");
        let (extension, output_rate_hz) = ExtensionConfig::read(&bwe);
        root.finish(VocoderConfig { core, extension: Some(extension), output_rate_hz })
    }

    /// Samples of the result for `mel_frames` of the input; saturates.
    pub fn output_samples(&self, mel_frames: usize) -> usize {
        let ratio = self.extension.as_ref().map_or(1, |e| e.ratio);
        self.core.output_samples(mel_frames).saturating_mul(ratio)
    }
}

impl GeneratorConfig {
    fn read(fields: &Fields, kind: GeneratorKind) -> GeneratorConfig {
        fields.only("stereo", true);
        match kind {
            GeneratorKind::HifiGan => fields.only("resblock", "1"),
            GeneratorKind::BigVgan => {
                // The loader's own default is `1`, which these generators are not.
                fields.exactly("resblock", &"AMP1".into());
                fields.exactly("activation", &"snakebeta".into());
            }
        }
        let tanh = fields.bool("use_tanh_at_final", true);
        let config = GeneratorConfig {
            kind,
            channels: fields.size("upsample_initial_channel", 1024),
            rates: fields.sizes("upsample_rates", &[6, 5, 2, 2, 2]),
            rate_kernels: fields.sizes("upsample_kernel_sizes", &[16, 15, 8, 4, 4]),
            block_kernels: fields.sizes("resblock_kernel_sizes", &[3, 7, 11]),
            block_dilations: fields.size_lists("resblock_dilation_sizes", &[&[1, 3, 5], &[1, 3, 5], &[1, 3, 5]]),
            has_final_bias: fields.bool("use_bias_at_final", true),
            final_activation: if tanh { FinalActivation::Tanh } else { FinalActivation::Clamp },
        };
        config.validate(fields);
        config
    }

    fn validate(&self, fields: &Fields) {
        if self.rates.is_empty() || self.rates.len() != self.rate_kernels.len() {
            let (rates, kernels) = (self.rates.len(), self.rate_kernels.len());
            fields.problem_at("upsample_rates", format!("has {rates} stages, `upsample_kernel_sizes` has {kernels}"));
        }
        if self.rates.iter().zip(&self.rate_kernels).any(|(r, k)| k < r) {
            fields.problem_at("upsample_kernel_sizes", "has a kernel that is smaller than its rate");
        }
        if self.total_rate().is_none() {
            fields.problem_at("upsample_rates", "multiply to more than 2^20");
        }
        if self.channels >> self.rates.len() == 0 {
            let (channels, stages) = (self.channels, self.rates.len());
            let text = format!("is {channels}, which cannot be halved {stages} times");
            fields.problem_at("upsample_initial_channel", text);
        }
        if self.block_kernels.is_empty() || self.block_kernels.len() != self.block_dilations.len() {
            let (kernels, dilations) = (self.block_kernels.len(), self.block_dilations.len());
            let text = format!("has {kernels} blocks, `resblock_dilation_sizes` has {dilations}");
            fields.problem_at("resblock_kernel_sizes", text);
        }
        if self.block_kernels.iter().any(|k| k % 2 == 0) {
            fields.problem_at("resblock_kernel_sizes", "has an even kernel, which would change the length");
        }
    }

    /// Product of the rates, `None` if it is out of range.
    fn total_rate(&self) -> Option<usize> {
        let product = self.rates.iter().try_fold(1usize, |n, &r| n.checked_mul(r));
        product.filter(|&n| n <= MOST)
    }

    /// Samples made of `frames` spectrogram frames; saturates.
    ///
    /// A stage whose kernel and rate differ by an odd number adds one sample.
    pub fn output_samples(&self, frames: usize) -> usize {
        let stage = |n: usize, (&r, &k): (&usize, &usize)| n.saturating_mul(r).saturating_add(k.saturating_sub(r) % 2);
        self.rates.iter().zip(&self.rate_kernels).fold(frames, stage)
    }

    /// Width behind stage `stage`.
    pub fn stage_channels(&self, stage: usize) -> usize {
        self.channels >> (stage + 1)
    }
}

/// Largest factor between the two sampling rates; the released models have 3. Bounds the filter between them.
const MOST_RATIO: usize = 64;

impl ExtensionConfig {
    /// The extension and its output rate in Hz.
    fn read(fields: &Fields) -> (ExtensionConfig, usize) {
        let mut generator = GeneratorConfig::read(fields, GeneratorKind::BigVgan);
        generator.final_activation = FinalActivation::None;
        let input_rate_hz = fields.required_size("input_sampling_rate", MOST);
        let output_rate_hz = fields.required_size("output_sampling_rate", MOST);
        let ratio = output_rate_hz / input_rate_hz;
        if !output_rate_hz.is_multiple_of(input_rate_hz) {
            let text = format!("is {output_rate_hz}, not a multiple of `input_sampling_rate` {input_rate_hz}");
            fields.problem_at("output_sampling_rate", text);
        }
        if ratio > MOST_RATIO {
            let text = format!("is {ratio} times the input rate, at most {MOST_RATIO} is supported");
            fields.problem_at("output_sampling_rate", text);
        }
        let hop_length = fields.required_size("hop_length", MOST);
        let n_fft = fields.required_size("n_fft", MOST);
        if n_fft < hop_length {
            fields.problem_at("n_fft", format!("is {n_fft}, less than the hop of {hop_length}"));
        }
        // Both halves of the sum must have the same length for every input.
        let is_even = |(r, k): (&usize, &usize)| k.saturating_sub(*r) % 2 == 0;
        if generator.total_rate() != Some(hop_length * ratio)
            || !generator.rates.iter().zip(&generator.rate_kernels).all(is_even)
        {
            let text = format!("must make {} samples of a frame ({ratio} × hop of {hop_length})", hop_length * ratio);
            fields.problem_at("upsample_rates", text);
        }
        let mel_bins = fields.required_size("num_mels", MOST);
        (ExtensionConfig { generator, ratio, hop_length, n_fft, mel_bins }, output_rate_hz)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn amp(rates: &[usize], kernels: &[usize], channels: usize) -> Value {
        json!({
            "resblock": "AMP1", "activation": "snakebeta", "stereo": true, "use_tanh_at_final": false,
            "use_bias_at_final": false, "upsample_rates": rates, "upsample_kernel_sizes": kernels,
            "upsample_initial_channel": channels, "input_sampling_rate": 16000, "output_sampling_rate": 48000,
            "hop_length": 80, "n_fft": 512, "num_mels": 64,
        })
    }

    #[test]
    fn an_empty_object_is_the_vocoder_of_ltx_2() {
        let config = VocoderConfig::from_json(&json!({})).unwrap();
        assert_eq!(config.core.kind, GeneratorKind::HifiGan);
        assert_eq!((config.output_rate_hz, config.output_samples(501)), (24_000, 120_240));
        assert_eq!(config.core.final_activation, FinalActivation::Tanh);
        assert_eq!(config.core.stage_channels(4), 32);
    }

    #[test]
    fn a_nested_object_has_a_bandwidth_extension() {
        let core = amp(&[5, 2, 2, 2, 2, 2], &[11, 4, 4, 4, 4, 4], 1536);
        let bwe = amp(&[6, 5, 2, 2, 2], &[12, 11, 4, 4, 4], 512);
        let config = VocoderConfig::from_json(&json!({ "vocoder": core, "bwe": bwe })).unwrap();
        let extension = config.extension.as_ref().unwrap();
        assert_eq!((config.output_rate_hz, config.output_samples(501)), (48_000, 240_480));
        assert_eq!((extension.ratio, extension.hop_length, extension.n_fft), (3, 80, 512));
        assert_eq!(config.core.final_activation, FinalActivation::Clamp);
        assert_eq!(extension.generator.final_activation, FinalActivation::None);
    }

    #[track_caller]
    fn check_refused(config: Value, keys: &[&str]) {
        let text = VocoderConfig::from_json(&config).unwrap_err().to_string();
        for key in keys {
            assert!(text.contains(key), "{key} is not in {text}");
        }
    }

    #[test]
    fn every_problem_is_named() {
        check_refused(json!({ "stereo": false, "resblock": "2" }), &["stereo", "resblock"]);
        check_refused(
            json!({ "upsample_rates": [2, 2], "upsample_initial_channel": 2 }),
            &["rates", "initial_channel"],
        );
        check_refused(json!({ "upsample_rates": [] }), &["upsample_rates"]);
        check_refused(json!({ "resblock_kernel_sizes": [3, 4, 5] }), &["resblock_kernel_sizes"]);
        check_refused(
            json!({ "bwe": {} }),
            &["`vocoder` is missing", "`bwe.activation`", "n_fft", "hop_length", "num_mels"],
        );
        let good = amp(&[5, 4, 4, 2], &[11, 8, 8, 4], 32);
        check_refused(json!({ "vocoder": good, "bwe": good }), &["must make 240 samples of a frame"]);
        check_refused(json!([]), &["not an object"]);
        let most = json!({ "upsample_rates": [1048576, 1048576, 1048576, 1048576, 1048576] });
        check_refused(most, &["multiply to more", "smaller than its rate"]);
    }
}
