//! The audio encoder: log-mel spectrogram to normalised latent tokens.
//!
//! # Easy to get wrong
//! - Only the first `z` channels of `conv_out` are used: the means. The log-variances behind them are dropped.
//! - A token's features are `channel · bins + bin`, and the statistics are indexed by these features.

use ltxc_ir::{Builder, DType, Module, Rate, TensorType, ValueId};

use super::layers::{Layers, Spectrogram};
use super::{AudioVaeConfig, check_frames};
use crate::{Functions, ModelError, Weights};

/// Builds the entry `encode`: `mel` f32 `[1, frames, mel_bins, 2]` → `latent` f32 `[1, l, z · bins]`.
///
/// - `mel`: natural logarithm of the mel magnitudes; `latent`: normalised tokens, 25 per second.
/// - `weights`: the whole checkpoint (keys `audio_vae.…`); `dtype`: of the activations.
///
/// # Errors
/// Missing or misshapen weights, a length of 0 or one that is too large.
///
/// Source: spec/audio-vae-vocoder §3.2, §3.3.
pub fn encode(
    config: &AudioVaeConfig,
    weights: &Weights<'_>,
    frames: usize,
    dtype: DType,
) -> Result<Module, ModelError> {
    check_frames("audio_vae", "mel frames", frames)?;
    let b = Builder::new("encode");
    let ty = TensorType::f32([1, frames, config.mel_bins, config.in_channels]);
    let mel = b.param("mel", ty, Rate::Step);
    let x = Spectrogram { value: b.cast(mel, dtype), t: frames, m: config.mel_bins, c: config.in_channels };
    let functions = Functions::default();
    let layers = Layers { b: &b, functions: &functions, weights: weights.below("audio_vae.encoder.") };
    let latent = b.scope("audio_vae.encoder", || encoder(config, &layers, x));
    let tokens = patchify(&b, latent);
    let (mean, std) = statistics(&b, weights, config);
    let normalised = b.name("audio_vae.latent", b.div(b.sub(tokens, mean), std));
    b.result("latent", b.cast(normalised, DType::F32));
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// The means of the latent, not normalised.
fn encoder(config: &AudioVaeConfig, layers: &Layers, mel: Spectrogram) -> Spectrogram {
    let mut x = layers.causal_conv("conv_in", mel, config.channels, 3);
    for level in 0..config.levels() {
        for block in 0..config.res_blocks {
            x = layers.residual_block(&format!("down.{level}.block.{block}"), x, config.level_channels(level));
            if config.level_attention[level] {
                x = layers.attention_block(&format!("down.{level}.attn.{block}"), x);
            }
        }
        if level + 1 < config.levels() {
            x = layers.downsample(&format!("down.{level}.downsample"), x);
        }
    }
    let x = layers.norm_silu(layers.mid(x, config.has_mid_attention));
    let channels = if config.has_log_variance { 2 * config.z_channels } else { config.z_channels };
    let y = layers.causal_conv("conv_out", x, channels, 3);
    Spectrogram { value: layers.b.slice_axis(y.value, 3, 0, config.z_channels), c: config.z_channels, ..y }
}

/// `[1, l, m, c] → [1, l, c · m]`.
fn patchify(b: &Builder, x: Spectrogram) -> ValueId {
    b.reshape(b.transpose(x.value, &[0, 1, 3, 2]), &[1, x.t, x.c * x.m])
}

/// Mean and standard deviation of every feature of a token.
pub(super) fn statistics(b: &Builder, weights: &Weights<'_>, config: &AudioVaeConfig) -> (ValueId, ValueId) {
    let statistics = weights.below("audio_vae.per_channel_statistics.");
    let features = [config.token_channels()];
    (statistics.get(b, "mean-of-means", &features), statistics.get(b, "std-of-means", &features))
}
