//! Configuration of the audio VAE: the object `audio_vae` of a checkpoint's config.
//!
//! # Easy to get wrong
//! - The loader's fallbacks are not the released values: a missing `attn_resolutions` means 8, 16 and 32, a missing
//!   `mid_block_add_attention` means attention.
//! - `preprocessing.mel.mel_fmin`, `mel_fmax` and `preprocessing.stft.win_length` are not read by the reference: the
//!   filters span 0 Hz to half the sampling rate, and the window is as long as the transform.
//! - `preprocessing.stft.causal` does not change the spectrogram; it only shifts the time stamps of positions.
//! - `downsample_time` is ignored: time is always halved together with frequency.

use serde_json::Value;

use crate::ModelError;
use crate::fields::{Fields, MOST};

/// Largest number of residual blocks per level, which bounds the graph; the released models have 2.
const MOST_BLOCKS: usize = 64;

/// What the checkpoint says about the audio VAE and its mel front end.
///
/// Source: spec/audio-vae-vocoder §1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AudioVaeConfig {
    /// Width of the outermost level.
    pub channels: usize,
    /// Width of each level as a multiple of [`AudioVaeConfig::channels`], outermost first.
    pub channel_multipliers: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub res_blocks: usize,
    /// Channels of the spectrogram that is encoded.
    pub in_channels: usize,
    /// Channels of the spectrogram that is decoded.
    pub out_channels: usize,
    /// Channels of the latent.
    pub z_channels: usize,
    /// Whether the encoder emits log-variances behind the means.
    pub has_log_variance: bool,
    /// Whether attention stands between the two middle blocks.
    pub has_mid_attention: bool,
    /// Whether attention follows every residual block of a level, outermost first.
    pub level_attention: Vec<bool>,
    /// Mel bins of the spectrogram.
    pub mel_bins: usize,
    /// Sampling rate of the spectrogram in Hz.
    pub sampling_rate_hz: usize,
    /// Length of the Fourier transform and of its window, in samples.
    pub n_fft: usize,
    /// Samples from one mel frame to the next.
    pub hop_length: usize,
    /// Whether positions are those of a causal front end.
    pub is_causal: bool,
}

impl AudioVaeConfig {
    /// Reads the object `audio_vae` of a checkpoint's config.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that is malformed, contradictory or unsupported.
    pub fn from_json(audio_vae: &Value) -> Result<AudioVaeConfig, ModelError> {
        let root = Fields::new("audio_vae", audio_vae);
        let params = root.below("model").below("params");
        let dd = params.below("ddconfig");
        let preprocessing = root.below("preprocessing");
        let (stft, mel) = (preprocessing.below("stft"), preprocessing.below("mel"));

        dd.only("causality_axis", "height");
        dd.only("norm_type", "pixel");
        dd.only("resamp_with_conv", true);
        let has_attention = dd.choice("attn_type", true, &[("vanilla", true), ("none", false)]);

        let channel_multipliers = dd.sizes("ch_mult", &[1, 2, 4]);
        if channel_multipliers.is_empty() {
            dd.problem_at("ch_mult", "is empty");
        }
        let resolution = dd.size("resolution", 256);
        let attention_at = dd.sizes("attn_resolutions", &[8, 16, 32]);
        let at_level = |level: usize| has_attention && attention_at.contains(&(resolution >> level));
        let level_attention = (0..channel_multipliers.len()).map(at_level).collect();

        let mel_bins = dd
            .find_size("mel_bins", MOST)
            .or(mel.find_size("n_mel_channels", MOST))
            .or(root.below("variables").find_size("mel_bins", MOST))
            .unwrap_or(64);

        let config = AudioVaeConfig {
            channels: dd.size("ch", 128),
            channel_multipliers,
            res_blocks: dd.size_within("num_res_blocks", 2, MOST_BLOCKS),
            in_channels: dd.size("in_channels", 2),
            out_channels: dd.size("out_ch", 2),
            z_channels: dd.size("z_channels", 8),
            has_log_variance: dd.bool("double_z", true),
            has_mid_attention: has_attention && dd.bool("mid_block_add_attention", true),
            level_attention,
            mel_bins,
            sampling_rate_hz: params.size("sampling_rate", 16_000),
            n_fft: stft.size("filter_length", 1024),
            hop_length: stft.size("hop_length", 160),
            is_causal: stft.bool("causal", true),
        };
        if !config.mel_bins.is_multiple_of(config.time_factor()) {
            let factor = config.time_factor();
            dd.problem_at(
                "mel_bins",
                format!("is `{mel_bins}`, which {} levels cannot divide by {factor}", config.levels()),
            );
        }
        root.finish(config)
    }

    /// Number of levels.
    pub fn levels(&self) -> usize {
        self.channel_multipliers.len()
    }

    /// Width of a level; 0 is the outermost.
    pub fn level_channels(&self, level: usize) -> usize {
        self.channels * self.channel_multipliers.get(level).copied().unwrap_or(1)
    }

    /// Width of the innermost level and of the middle blocks.
    pub fn mid_channels(&self) -> usize {
        self.level_channels(self.levels().saturating_sub(1))
    }

    /// Mel frames per latent, also mel bins per latent bin: 4 in every published model.
    pub fn time_factor(&self) -> usize {
        1 << self.levels().saturating_sub(1)
    }

    /// Frequency bins of the latent.
    pub fn latent_bins(&self) -> usize {
        self.mel_bins / self.time_factor()
    }

    /// Features of a latent token: `channel · bins + bin`.
    pub fn token_channels(&self) -> usize {
        self.z_channels * self.latent_bins()
    }

    /// Latents per second, as (numerator, denominator) in Hz: 25 in every published model.
    pub fn latent_rate_hz(&self) -> (usize, usize) {
        (self.sampling_rate_hz, self.hop_length * self.time_factor())
    }

    /// Latents that `mel_frames` (at least 1) are encoded to.
    pub fn latent_frames(&self, mel_frames: usize) -> usize {
        (1..self.levels()).fold(mel_frames, |t, _| t.saturating_sub(1) / 2 + 1)
    }

    /// Mel frames that `latents` (at least 1) are decoded to; saturates.
    pub fn mel_frames(&self, latents: usize) -> usize {
        latents.saturating_sub(1).saturating_mul(self.time_factor()).saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn missing_keys_mean_the_fallbacks_of_the_loader() {
        let config = AudioVaeConfig::from_json(&json!({})).unwrap();
        assert_eq!((config.channels, config.z_channels, config.mel_bins), (128, 8, 64));
        assert_eq!((config.mid_channels(), config.latent_bins(), config.token_channels()), (512, 16, 128));
        assert!(config.has_mid_attention);
        assert_eq!(config.level_attention, [false, false, false]);
        assert_eq!(config.latent_rate_hz(), (16_000, 640));
    }

    #[test]
    fn frames_and_latents_are_those_of_the_spec() {
        let config = AudioVaeConfig::from_json(&json!({})).unwrap();
        assert_eq!((config.mel_frames(126), config.mel_frames(1)), (501, 1));
        assert_eq!((config.latent_frames(501), config.latent_frames(37), config.latent_frames(1)), (126, 10, 1));
    }

    #[test]
    fn mel_bins_come_from_the_first_place_that_names_them() {
        let config =
            AudioVaeConfig::from_json(&json!({ "preprocessing": { "mel": { "n_mel_channels": 32 } } })).unwrap();
        assert_eq!(config.mel_bins, 32);
        let config = AudioVaeConfig::from_json(&json!({ "variables": { "mel_bins": 16 } })).unwrap();
        assert_eq!(config.mel_bins, 16);
    }

    #[test]
    fn every_problem_is_named() {
        let dd = json!({
            "causality_axis": "width", "norm_type": "group", "ch": -1, "ch_mult": [1, 0], "mel_bins": 63,
            "double_z": 1, "attn_type": "linear", "z_channels": 1e300,
            "num_res_blocks": 1000,
        });
        let error = AudioVaeConfig::from_json(&json!({ "model": { "params": { "ddconfig": dd } } })).unwrap_err();
        let text = error.to_string();
        for key in [
            "causality_axis",
            "norm_type",
            "ch`",
            "ch_mult",
            "mel_bins",
            "double_z",
            "attn_type",
            "z_channels",
            "num_res_blocks",
        ] {
            assert!(text.contains(key), "{key} is not in {text}");
        }
        assert!(AudioVaeConfig::from_json(&Value::Null).is_err());
        assert!(AudioVaeConfig::from_json(&json!({ "model": [] })).is_err());
        assert!(
            AudioVaeConfig::from_json(&json!({ "model": { "params": { "ddconfig": { "ch_mult": [] } } } })).is_err()
        );
    }
}
