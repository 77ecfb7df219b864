//! The convolutional video decoder: normalised latents to frames.
//!
//! # Easy to get wrong
//! - Blocks are numbered in execution order (`up_blocks.0` is next to the latent), the config lists them in reverse.
//! - Causality is the config's, and it holds for every convolution, `conv_in` and `conv_out` included.
//! - With a timestep, noise is mixed into the *normalised* latent: `0.025 ε + 0.975 z`. Without one, never.
//! - The last table has the rows shift, scale, and modulates between `conv_norm_out` and the activation.
//!
//! Source: spec/video-vae §6.

use ltxc_ir::{Builder, DType, Module, Rate, TensorType, ValueId};

use super::block_list::DecoderBlock;
use super::blocks::{ResInputs, attention, embed_timestep, modulation_rows, res_block, upsample};
use super::config::VideoVaeConfig;
use super::layers::{Layers, Statistics, Style, Video, unpatchify, vae_weights};
use super::refuse_request;
use crate::{Functions, ModelError, Weights};

/// Part of noise in the latent of a decoder with a timestep.
const NOISE_SCALE: f64 = 0.025; // ltx_core/model/video_vae, decode_noise_scale

/// The timestep with which such a decoder is run.
pub const DECODE_TIMESTEP: f32 = 0.05; // ltx_core/model/video_vae, decode_timestep

/// Largest number of latent frames, rows or columns.
const MOST_LATENTS: usize = 1 << 14;

/// Builds the entry `decode`: `latent` f32 `[1, f, h, w, c]` → `frames` f32 `[1, F, H, W, 3]`.
///
/// - `latent`: normalised; `frames`: about `[-1, 1]`, not clamped, `F = 8 (f − 1) + 1`, `H = 32 h`, `W = 32 w` for the
///   factors of the released models, see [`VideoVaeConfig::factors`].
/// - Only with a timestep: `noise` f32 `[1, f, h, w, c]` and `timestep` f32 `[1]`, see [`DECODE_TIMESTEP`].
/// - Only with injected noise: planes `noise.0`, `noise.1`, … f32 `[H, W]`, see [`noise_planes`]. All noise is normal.
/// - `grid`: f, h and w; `model`: the whole checkpoint or a VAE file; `dtype`: of the activations.
///
/// # Errors
/// Missing or misshapen weights, extents out of range, or of 1 where reflection needs 2.
pub fn decode(
    config: &VideoVaeConfig,
    model: &Weights<'_>,
    grid: [usize; 3],
    dtype: DType,
) -> Result<Module, ModelError> {
    let [f, h, w] = grid;
    if grid.iter().any(|n| !(1..=MOST_LATENTS).contains(n)) {
        return refuse_request(format!("{f}×{h}×{w} latents cannot be decoded, expected 1..={MOST_LATENTS} of each"));
    }
    let b = Builder::new("decode");
    let c = config.latent_channels;
    let latent_type = TensorType::f32([1, f, h, w, c]);
    let latent = b.param("latent", latent_type.clone(), Rate::Step);
    let conditioning = config
        .has_timestep
        .then(|| (b.param("noise", latent_type, Rate::Step), b.param("timestep", TensorType::f32([1]), Rate::Step)));
    let plane = |(i, shape): (usize, &[usize; 2])| b.param(&format!("noise.{i}"), TensorType::f32(*shape), Rate::Step);
    let planes: Vec<ValueId> = noise_planes(config, [h, w]).iter().enumerate().map(plane).collect();

    let vae = vae_weights(model);
    let style = Style { is_causal: config.is_decoder_causal, padding: config.decoder_padding, norm: config.norm };
    let layers = Layers { b: &b, weights: vae.below("decoder."), style };
    let functions = Functions::default();
    let mut z = b.cast(latent, dtype);
    let mut timestep = None;
    if let Some((noise, t)) = conditioning {
        let noise = b.mul_scalar(b.cast(noise, dtype), NOISE_SCALE);
        z = b.add(noise, b.mul_scalar(z, 1.0 - NOISE_SCALE));
        timestep = Some(b.mul(t, timestep_scale(&layers)));
    }
    let z = Statistics::new(&b, &vae, c, dtype).unnormalise(&b, z);
    let decoder = Decoder { config, layers, functions: &functions, timestep, planes: &planes, dtype };
    let frames = b.scope("vae.decoder", || decoder.frames(Video { value: z, f, h, w, c }));
    b.result("frames", b.name("vae.frames", frames.value));

    model.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// Rows and columns of the noise planes that [`decode`] takes, in their order; `latent`: rows and columns.
pub fn noise_planes(config: &VideoVaeConfig, latent: [usize; 2]) -> Vec<[usize; 2]> {
    let [mut h, mut w] = latent;
    let mut planes = Vec::new();
    for block in &config.decoder_blocks {
        let convolutions = match *block {
            DecoderBlock::ResStack { layers, has_noise: true } => 2 * layers,
            DecoderBlock::ResNarrow { has_noise: true, .. } => 2,
            DecoderBlock::DepthToSpace { stride, .. } => {
                (h, w) = (h.saturating_mul(stride[1]), w.saturating_mul(stride[2]));
                0
            }
            _ => 0,
        };
        planes.extend(std::iter::repeat_n([h, w], convolutions));
    }
    planes
}

/// The checkpoint's factor of the timestep, f32 `[]`.
fn timestep_scale(layers: &Layers<'_>) -> ValueId {
    const KEY: &str = "timestep_scale_multiplier";
    if !layers.weights.has(KEY) {
        let hint = "the decoder is configured to take a timestep (`vae.timestep_conditioning`, true if absent), but \
                    the weights are of one that does not";
        layers.weights.problem(hint.into());
    }
    layers.b.cast(layers.weights.get(layers.b, KEY, &[]), DType::F32)
}

/// Everything that the blocks of one decoder share.
struct Decoder<'a> {
    config: &'a VideoVaeConfig,
    layers: Layers<'a>,
    functions: &'a Functions,
    /// Scaled timestep, f32 `[1]`.
    timestep: Option<ValueId>,
    /// Noise planes in execution order.
    planes: &'a [ValueId],
    dtype: DType,
}

impl Decoder<'_> {
    /// Un-normalised latent to frames in f32.
    fn frames(&self, z: Video) -> Video {
        let (config, layers) = (self.config, &self.layers);
        let widths = config.decoder_widths();
        let mut planes = self.planes.chunks(2);
        let mut x = layers.name("conv_in", layers.conv("conv_in", z, widths[0], [1; 3]));
        for (i, (block, &c)) in config.decoder_blocks.iter().zip(&widths[1..]).enumerate() {
            let key = format!("up_blocks.{i}");
            let mut noise = |is_there: bool| {
                let pair = if is_there { planes.next() } else { None };
                pair.and_then(|p| p.first_chunk()).copied()
            };
            x = match *block {
                DecoderBlock::ResStack { layers: count, has_noise } => {
                    let timestep = self.timestep(&format!("{key}.time_embedder"), 4 * c);
                    (0..count).fold(x, |x, j| {
                        let inputs = ResInputs { timestep, noise: noise(has_noise) };
                        res_block(layers, self.functions, &format!("{key}.res_blocks.{j}"), x, c, inputs)
                    })
                }
                DecoderBlock::ResNarrow { has_noise, .. } => {
                    // The reference never gives these a timestep.
                    let inputs = ResInputs { timestep: None, noise: noise(has_noise) };
                    res_block(layers, self.functions, &key, x, c, inputs)
                }
                DecoderBlock::DepthToSpace { stride, divisor, is_residual } => {
                    upsample(layers, &key, x, stride, divisor, is_residual)
                }
                DecoderBlock::Attention => attention(layers, &key, x),
            };
            layers.name(&key, x);
        }
        let mut x = layers.norm("conv_norm_out", x);
        if let Some(embedding) = self.timestep("last_time_embedder", 2 * x.c) {
            let rows = modulation_rows(layers, "last_scale_shift_table", 2, x.c, embedding);
            x = layers.modulate(x, rows[0], rows[1]);
        }
        let outputs = 3 * config.patch_size * config.patch_size;
        let patches = layers.name("conv_out", layers.conv("conv_out", layers.silu(x), outputs, [1; 3]));
        // Programs give f32. Cast before it is rearranged, the last convolution stores frames as they are given.
        unpatchify(layers.b, patches.with(layers.b.cast(patches.value, DType::F32)), config.patch_size)
    }

    /// The embedding of the timestep by the module `key`, if this decoder takes one.
    fn timestep(&self, key: &str, width: usize) -> Option<ValueId> {
        self.timestep.map(|t| embed_timestep(&self.layers, key, t, width, self.dtype))
    }
}
