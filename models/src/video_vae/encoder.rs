//! The video encoder: frames to the normalised means of their latent.
//!
//! # Easy to get wrong
//! - It is always causal, whatever `causal_decoder` says.
//! - Frames behind the last multiple of the temporal factor are dropped: 12 frames encode like 9.
//! - Only the first `latent_channels` outputs are used; nothing is sampled.
//! - A plain strided block *is* the convolution wrapper (`down_blocks.n.conv.weight`), one with a skip path owns it
//!   (`down_blocks.n.conv.conv.weight`).
//!
//! Source: spec/video-vae §5.

use ltxc_ir::{Builder, DType, Module, Rate, TensorType};

use super::block_list::EncoderBlock;
use super::blocks::{ResInputs, attention, downsample, res_block};
use super::config::{LogVariance, VideoVaeConfig};
use super::layers::{Layers, Statistics, Style, Video, patchify, vae_weights};
use super::refuse_request;
use crate::{Functions, ModelError, Weights};

/// Largest number of frames, rows or columns.
const MOST_PIXELS: usize = 1 << 26;

/// Builds the entry `encode`: `frames` f32 `[1, F, H, W, 3]` → `latent` f32 `[1, f, h, w, c]`.
///
/// - `frames`: in `[-1, 1]`; `latent`: normalised means, `f = (F − 1) / 8 + 1`, `h = H / 32`, `w = W / 32` for the
///   factors of the released models, see [`VideoVaeConfig::factors`].
/// - `pixels`: F, H and W; `model`: the whole checkpoint or a VAE file; `dtype`: of the activations.
///
/// # Errors
/// Missing or misshapen weights, rows or columns that the factors do not divide, a `latent_log_var` of `none`.
pub fn encode(
    config: &VideoVaeConfig,
    model: &Weights<'_>,
    pixels: [usize; 3],
    dtype: DType,
) -> Result<Module, ModelError> {
    check_request(config, pixels)?;
    let [f, h, w] = pixels;
    let b = Builder::new("encode");
    let frames = b.param("frames", TensorType::f32([1, f, h, w, 3]), Rate::Step);
    let vae = vae_weights(model);
    let style = Style { is_causal: true, padding: config.encoder_padding, norm: config.norm };
    let layers = Layers { b: &b, weights: vae.below("encoder."), style };
    let functions = Functions::default();

    let kept = f - (f - 1) % config.factors()[0];
    let frames = Video { value: b.slice_axis(b.cast(frames, dtype), 1, 0, kept), f: kept, h, w, c: 3 };
    let means = b.scope("vae.encoder", || encoder(config, &layers, &functions, frames));
    let statistics = Statistics::new(&b, &vae, config.latent_channels, dtype);
    let latent = b.name("vae.latent", statistics.normalise(&b, means.value));
    b.result("latent", b.cast(latent, DType::F32));

    model.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// The means, not normalised.
fn encoder(config: &VideoVaeConfig, layers: &Layers<'_>, functions: &Functions, frames: Video) -> Video {
    let widths = config.encoder_widths();
    let patches = patchify(layers.b, frames, config.patch_size);
    let mut x = layers.name("conv_in", layers.conv("conv_in", patches, widths[0], [1; 3]));
    for (i, (block, &c)) in config.encoder_blocks.iter().zip(&widths[1..]).enumerate() {
        let key = format!("down_blocks.{i}");
        x = match *block {
            EncoderBlock::ResStack { layers: count } => (0..count).fold(x, |x, j| {
                res_block(layers, functions, &format!("{key}.res_blocks.{j}"), x, c, ResInputs::default())
            }),
            EncoderBlock::ResWiden { .. } => res_block(layers, functions, &key, x, c, ResInputs::default()),
            EncoderBlock::Conv { stride, .. } => layers.conv(&key, x, c, stride),
            EncoderBlock::SpaceToDepth { stride, .. } => downsample(layers, &key, x, stride, c),
            EncoderBlock::Attention => attention(layers, &key, x),
        };
        layers.name(&key, x);
    }
    let x = layers.silu(layers.norm("conv_norm_out", x));
    let y = layers.name("conv_out", layers.conv("conv_out", x, config.encoder_outputs(), [1; 3]));
    let c = config.latent_channels;
    Video { value: layers.b.slice_axis(y.value, 4, 0, c), c, ..y }
}

fn check_request(config: &VideoVaeConfig, pixels: [usize; 3]) -> Result<(), ModelError> {
    let [_, rows, columns] = config.factors();
    let [f, h, w] = pixels;
    if config.log_variance == LogVariance::None {
        return refuse_request("`latent_log_var` is `none`, with which the reference cannot encode either".into());
    }
    if pixels.iter().any(|n| !(1..=MOST_PIXELS).contains(n)) {
        return refuse_request(format!("{f} frames of {h}×{w} cannot be encoded, expected 1..={MOST_PIXELS} of each"));
    }
    if !h.is_multiple_of(rows) || !w.is_multiple_of(columns) {
        return refuse_request(format!("frames of {h}×{w} cannot be encoded, expected multiples of {rows}×{columns}"));
    }
    Ok(())
}
