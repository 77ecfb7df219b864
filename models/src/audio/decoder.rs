//! The audio decoder: normalised latent tokens to a log-mel spectrogram.
//!
//! # Easy to get wrong
//! - Levels run from the innermost to 0, but their keys keep the level number (`up.2` comes first).
//! - A level has one residual block more than in the encoder.
//! - There is no final activation: the result is the logarithm that the vocoder takes.

use ltxc_ir::{Builder, DType, Module, Rate, TensorType, ValueId};

use super::encoder::statistics;
use super::layers::{Layers, Spectrogram};
use super::{AudioVaeConfig, check_frames};
use crate::{Functions, ModelError, Weights};

/// Builds the entry `decode`: `latent` f32 `[1, latents, z · bins]` → `mel` f32 `[1, 4 · latents − 3, mel_bins, 2]`.
///
/// - `latent`: normalised tokens; `mel`: natural logarithm of the mel magnitudes.
/// - `weights`: the whole checkpoint (keys `audio_vae.…`); `dtype`: of the activations.
///
/// # Errors
/// Missing or misshapen weights, a length of 0 or one that is too large.
///
/// Source: spec/audio-vae-vocoder §3.3, §3.4.
pub fn decode(
    config: &AudioVaeConfig,
    weights: &Weights<'_>,
    latents: usize,
    dtype: DType,
) -> Result<Module, ModelError> {
    check_frames("audio_vae", "latents", latents)?;
    let b = Builder::new("decode");
    let latent = b.param("latent", latent_type(config, latents), Rate::Step);
    let functions = Functions::default();
    let mel = decode_mel(&b, &functions, config, weights, latent, dtype);
    b.result("mel", b.cast(mel.value, DType::F32));
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// Type of the tokens that are decoded.
pub(super) fn latent_type(config: &AudioVaeConfig, latents: usize) -> TensorType {
    TensorType::f32([1, latents, config.token_channels()])
}

/// The spectrogram of `latent`, which has the type of [`latent_type`], in `dtype`.
pub(super) fn decode_mel(
    b: &Builder,
    functions: &Functions,
    config: &AudioVaeConfig,
    weights: &Weights<'_>,
    latent: ValueId,
    dtype: DType,
) -> Spectrogram {
    let latents = b.shape(latent)[1];
    let (mean, std) = statistics(b, weights, config);
    let tokens = b.add(b.mul(b.cast(latent, dtype), std), mean);
    let (c, m) = (config.z_channels, config.latent_bins());
    let value = b.transpose(b.reshape(tokens, &[1, latents, c, m]), &[0, 1, 3, 2]);
    let layers = Layers { b, functions, weights: weights.below("audio_vae.decoder.") };
    b.scope("audio_vae.decoder", || decoder(config, &layers, Spectrogram { value, t: latents, m, c }))
}

fn decoder(config: &AudioVaeConfig, layers: &Layers, latent: Spectrogram) -> Spectrogram {
    let x = layers.causal_conv("conv_in", latent, config.mid_channels(), 3);
    let mut x = layers.mid(x, config.has_mid_attention);
    for level in (0..config.levels()).rev() {
        for block in 0..=config.res_blocks {
            x = layers.residual_block(&format!("up.{level}.block.{block}"), x, config.level_channels(level));
            if config.level_attention[level] {
                x = layers.attention_block(&format!("up.{level}.attn.{block}"), x);
            }
        }
        if level > 0 {
            x = layers.upsample(&format!("up.{level}.upsample"), x);
        }
    }
    layers.causal_conv("conv_out", layers.norm_silu(x), config.out_channels, 3)
}
