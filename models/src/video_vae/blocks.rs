//! The blocks of encoder and decoder: residual blocks, samplers with and without a skip path, attention, timesteps.
//!
//! Residual blocks that differ in nothing but their weights are one function.
//!
//! # Easy to get wrong
//! - A decoder upsampler that doubles time drops the first frame, whether the decoder is causal or not, and on the
//!   residual path too.
//! - An encoder downsampler that halves time repeats the first frame in front of **both** paths.
//! - The residual path of the decoder tiles whole groups of channels; the skip path of the encoder averages neighbours.
//! - `norm3` comes before `conv_shortcut` and is a group norm with one group, whatever the other norms are.
//! - The rows of a scale-shift table are shift 1, scale 1, shift 2, scale 2.
//!
//! Source: spec/video-vae §4.4, §4.5, §4.7, §4.8.

use ltxc_ir::ops::{Attention, PadMode, ReduceKind, Unary};
use ltxc_ir::{Builder, DType, Float, ValueId};

use super::block_list::Stride;
use super::layers::{Layers, Video, depth_to_space, drop_first_frame, space_to_depth};
use crate::{Block, Functions};

/// Width of the sinusoid of a timestep.
const SINUSOID: usize = 256; // ltx_core/model/transformer/timestep_embedding, Timesteps

/// Longest period of the sinusoid.
const MAX_PERIOD: f64 = 10_000.0; // ltx_core/model/transformer/timestep_embedding

/// Smallest length by which attention divides a vector of channels.
const LEAST_LENGTH: f64 = 1e-12; // torch.nn.functional.normalize

/// What a residual block takes besides its input.
#[derive(Clone, Copy, Default)]
pub(super) struct ResInputs {
    /// Timestep embedding `[4 · c]` in the dtype of the activation.
    pub timestep: Option<ValueId>,
    /// Noise planes f32 `[h, w]`, one behind each convolution.
    pub noise: Option<[ValueId; 2]>,
}

/// Calls the residual block `key` on `x`: to `c` channels.
pub(super) fn res_block(
    layers: &Layers<'_>,
    functions: &Functions,
    key: &str,
    x: Video,
    c: usize,
    inputs: ResInputs,
) -> Video {
    let style = layers.style;
    let mut args = vec![("x", x.value)];
    args.extend(inputs.timestep.map(|t| ("timestep", t)));
    args.extend(inputs.noise.iter().flat_map(|&[first, second]| [("noise.0", first), ("noise.1", second)]));
    let block = Block::at("res_block", key);
    let value = functions.call_one(layers.b, &layers.weights, block, &args, |b, weights, params| {
        let layers = Layers { b, weights: weights.clone(), style };
        let (x, rest) = (x.with(params[0]), &params[1..]);
        let (timestep, noise) = rest.split_at(usize::from(inputs.timestep.is_some()));
        res_block_body(&layers, x, c, timestep.first().copied(), noise)
    });
    Video { value, c, ..x }
}

/// The residual block of `layers`; `noise`: no planes, or one behind each convolution.
fn res_block_body(layers: &Layers<'_>, x: Video, c: usize, timestep: Option<ValueId>, noise: &[ValueId]) -> ValueId {
    let rows = timestep.map(|t| modulation_rows(layers, "scale_shift_table", 4, x.c, t));
    let half = |x: Video, i: usize| {
        let number = i + 1;
        let mut y = layers.norm(&format!("norm{number}"), x);
        if let Some(rows) = &rows {
            y = layers.modulate(y, rows[2 * i], rows[2 * i + 1]);
        }
        let key = format!("conv{number}");
        let y = layers.name(&key, layers.conv(&key, layers.silu(y), c, [1; 3]));
        noise.get(i).map_or(y, |&plane| add_noise(layers, &format!("per_channel_scale{number}"), y, plane))
    };
    let y = half(half(x, 0), 1);
    let skip = if x.c == c { x.value } else { shortcut(layers, x, c) };
    layers.b.add(skip, y.value)
}

/// `conv1×1×1(norm(x))`, where a block changes the width.
fn shortcut(layers: &Layers<'_>, x: Video, c: usize) -> ValueId {
    let b = layers.b;
    let normed = layers.group_norm("norm3", x, 1);
    let weight = layers.weights.get(b, "conv_shortcut.weight", &[c, x.c, 1, 1, 1]);
    let bias = layers.weights.get(b, "conv_shortcut.bias", &[c]);
    linear_over_channels(b, normed, weight, bias, c)
}

/// A convolution with a kernel of one element, as a product over the channels.
fn linear_over_channels(b: &Builder, x: Video, weight: ValueId, bias: ValueId, c: usize) -> ValueId {
    b.add(b.matmul_transposed(x.value, b.reshape(weight, &[c, x.c])), bias)
}

/// `x + scale · plane`; `plane` f32 `[h, w]`, the same for all frames and channels.
fn add_noise(layers: &Layers<'_>, key: &str, x: Video, plane: ValueId) -> Video {
    let b = layers.b;
    let scale = b.reshape(layers.weights.get(b, key, &[x.c, 1, 1]), &[x.c]);
    let plane = b.reshape(b.cast(plane, b.ty(x.value).dtype), &[x.h, x.w, 1]);
    x.with(b.add(x.value, b.mul(plane, scale)))
}

/// The rows of the table `key` (`[rows, c]`), each with its part of the timestep embedding `[rows · c]` added.
pub(super) fn modulation_rows(
    layers: &Layers<'_>,
    key: &str,
    rows: usize,
    c: usize,
    timestep: ValueId,
) -> Vec<ValueId> {
    let b = layers.b;
    let table = layers.weights.get(b, key, &[rows, c]);
    let sum = b.add(b.reshape(timestep, &[rows, c]), table);
    (0..rows).map(|i| b.reshape(b.slice_axis(sum, 0, i, i + 1), &[c])).collect()
}

/// The embedding of a timestep by the module `key`: `[width]` in `dtype`.
///
/// `timestep`: f32 `[1]`, already multiplied by the checkpoint's factor.
pub(super) fn embed_timestep(layers: &Layers<'_>, key: &str, timestep: ValueId, width: usize, dtype: DType) -> ValueId {
    let b = layers.b;
    let half = SINUSOID / 2;
    // The exponent is rounded to f32 before the exponential, as in the reference.
    let exponent = |i: usize| (-MAX_PERIOD.ln()) as f32 * i as f32 / half as f32;
    let frequencies: Vec<f32> = (0..half).map(|i| (exponent(i) as f64).exp() as f32).collect();
    let angles = b.mul(b.reshape(timestep, &[1, 1]), b.constant(&[1, half], &frequencies));
    let sinusoid = b.cast(b.concat(&[b.unary(Unary::Cos, angles), b.unary(Unary::Sin, angles)], 1), dtype);
    let weights = layers.weights.below(&format!("{key}.timestep_embedder."));
    let linear = |x: ValueId, name: &str, from: usize| {
        let weight = weights.get(b, &format!("{name}.weight"), &[width, from]);
        let bias = weights.get(b, &format!("{name}.bias"), &[width]);
        b.add(b.matmul_transposed(x, weight), bias)
    };
    let hidden = b.silu(linear(sinusoid, "linear_1", SINUSOID));
    b.reshape(linear(hidden, "linear_2", width), &[width])
}

/// The decoder's upsampler `key`: extents times `stride`, channels divided by `divisor`.
pub(super) fn upsample(
    layers: &Layers<'_>,
    key: &str,
    x: Video,
    stride: Stride,
    divisor: usize,
    is_residual: bool,
) -> Video {
    let b = layers.b;
    let block: usize = stride.iter().product();
    let trim = |y: Video| if stride[0] == 1 { y } else { drop_first_frame(b, y) };
    let wide = layers.below(key).conv("conv", x, block * (x.c / divisor), [1; 3]);
    let y = trim(depth_to_space(b, wide, stride));
    if !is_residual {
        return y;
    }
    let residual = trim(depth_to_space(b, x, stride));
    let tiled = b.concat(&vec![residual.value; block / divisor], 4);
    y.with(b.add(y.value, tiled))
}

/// The encoder's downsampler `key` with a skip path: extents divided by `stride`, to `c` channels.
pub(super) fn downsample(layers: &Layers<'_>, key: &str, x: Video, stride: Stride, c: usize) -> Video {
    let b = layers.b;
    let block: usize = stride.iter().product();
    let x = if stride[0] == 1 {
        x
    } else {
        Video { value: b.pad(x.value, &[0, 1, 0, 0, 0], &[0; 5], PadMode::Edge), f: x.f + 1, ..x }
    };
    let y = space_to_depth(b, layers.below(key).conv("conv", x, c / block, [1; 3]), stride);
    let skip = space_to_depth(b, x, stride);
    let groups = b.reshape(skip.value, &[1, skip.f, skip.h, skip.w, c, skip.c / c]);
    let skip = b.reshape(b.reduce(ReduceKind::Mean, groups, &[5]), &y.shape());
    y.with(b.add(y.value, skip))
}

/// The block `key`: attention among the positions of each frame, one head over all channels.
pub(super) fn attention(layers: &Layers<'_>, key: &str, x: Video) -> Video {
    let (b, weights) = (layers.b, layers.weights.below(&format!("{key}.")));
    let dtype = b.ty(x.value).dtype;
    let wide = b.cast(x.value, DType::F32);
    let length = b.unary(Unary::Sqrt, b.reduce(ReduceKind::Sum, b.mul(wide, wide), &[4]));
    let gamma = b.reshape(weights.get(b, "norm.gamma", &[x.c, 1, 1]), &[x.c]);
    let unit = b.mul_scalar(b.div(wide, b.max(length, b.scalar(LEAST_LENGTH))), (x.c as f64).sqrt());
    let normed = x.with(b.cast(b.mul(unit, gamma), dtype));

    let linear = |x: Video, name: &str, c: usize| {
        let weight = weights.get(b, &format!("{name}.weight"), &[c, x.c, 1, 1]);
        let bias = weights.get(b, &format!("{name}.bias"), &[c]);
        linear_over_channels(b, x, weight, bias, c)
    };
    let qkv = linear(normed, "to_qkv", 3 * x.c);
    let head = |i: usize| {
        let part = b.slice_axis(qkv, 4, i * x.c, (i + 1) * x.c);
        b.reshape(part, &[x.f, x.h * x.w, 1, x.c])
    };
    let op = Attention { scale: Float((x.c as f64).powf(-0.5)), causal: false };
    let mixed = b.reshape(b.attention(op, head(0), head(1), head(2), None), &x.shape());
    x.with(b.add(x.value, linear(x.with(mixed), "proj", x.c)))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use ltxc_ir::TensorType;
    use ltxc_ir::eval::{Evaluator, Tensor};
    use serde_json::json;

    use super::super::{VideoVaeConfig, decode, encode};
    use super::*;
    use crate::{TensorDirectory, Weights};

    const CHANNELS: usize = 32;

    /// Weights of a VAE whose only block is attention, with group norms and patches of one pixel.
    struct File(BTreeMap<String, Tensor>);

    impl TensorDirectory for File {
        fn tensor_type(&self, key: &str) -> Option<TensorType> {
            self.0.get(key).map(|t| t.ty.clone())
        }
    }

    impl File {
        fn new() -> File {
            let c = CHANNELS;
            let mut file = File(BTreeMap::new());
            for (half, block, from, to) in [("encoder", "down_blocks.0", 3, c + 1), ("decoder", "up_blocks.0", c, 3)] {
                for (key, shape) in [
                    ("conv_in.conv.weight", vec![c, from, 3, 3, 3]),
                    ("conv_in.conv.bias", vec![c]),
                    ("conv_norm_out.weight", vec![c]),
                    ("conv_norm_out.bias", vec![c]),
                    ("conv_out.conv.weight", vec![to, c, 3, 3, 3]),
                    ("conv_out.conv.bias", vec![to]),
                ] {
                    file.add(format!("{half}.{key}"), &shape);
                }
                for (key, shape) in [
                    ("norm.gamma", vec![c, 1, 1]),
                    ("to_qkv.weight", vec![3 * c, c, 1, 1]),
                    ("to_qkv.bias", vec![3 * c]),
                    ("proj.weight", vec![c, c, 1, 1]),
                    ("proj.bias", vec![c]),
                ] {
                    file.add(format!("{half}.{block}.{key}"), &shape);
                }
            }
            file.add("per_channel_statistics.mean-of-means".into(), &[c]);
            file.add("per_channel_statistics.std-of-means".into(), &[c]);
            file
        }

        fn add(&mut self, key: String, shape: &[usize]) {
            self.0.insert(key, values(shape, self.0.len()));
        }

        fn at(&self, key: &str) -> &[f64] {
            self.0[key].floats()
        }
    }

    /// Values without structure.
    fn values(shape: &[usize], seed: usize) -> Tensor {
        let n: usize = shape.iter().product();
        let value = |i: usize| (((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0) / 2.0;
        Tensor::f32(shape, &(0..n).map(value).collect::<Vec<_>>())
    }

    /// `x + proj(softmax(q kᵀ / √c) v)` of one frame, written as the formula says.
    fn attention_of_a_frame(x: &[f64], file: &File, prefix: &str) -> Vec<f64> {
        let c = CHANNELS;
        let linear = |x: &[f64], name: &str, rows: usize| -> Vec<f64> {
            let (w, b) = (file.at(&format!("{prefix}{name}.weight")), file.at(&format!("{prefix}{name}.bias")));
            (0..rows).map(|o| b[o] + (0..c).map(|i| w[o * c + i] * x[i]).sum::<f64>()).collect()
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let gamma = file.at(&format!("{prefix}norm.gamma"));
        let qkv: Vec<Vec<f64>> = x
            .chunks(c)
            .map(|row| {
                let length = dot(row, row).sqrt();
                let normed: Vec<f64> = row.iter().zip(gamma).map(|(v, g)| v / length * (c as f64).sqrt() * g).collect();
                linear(&normed, "to_qkv", 3 * c)
            })
            .collect();
        let attend = |query: &Vec<f64>| {
            let scores: Vec<f64> =
                qkv.iter().map(|k| (dot(&query[..c], &k[c..2 * c]) / (c as f64).sqrt()).exp()).collect();
            let total: f64 = scores.iter().sum();
            let mixed: Vec<f64> =
                (0..c).map(|i| qkv.iter().zip(&scores).map(|(v, s)| s / total * v[2 * c + i]).sum()).collect();
            linear(&mixed, "proj", c)
        };
        x.chunks(c)
            .zip(&qkv)
            .flat_map(|(row, qkv)| row.iter().zip(attend(qkv)).map(|(x, y)| x + y).collect::<Vec<_>>())
            .collect()
    }

    #[test]
    fn attention_stays_inside_frames_and_follows_the_formula() {
        let file = File::new();
        let blocks = json!([["attn", {}]]);
        let config = json!({"latent_channels": CHANNELS, "decoder_base_channels": CHANNELS, "patch_size": 1,
            "norm_layer": "group_norm", "timestep_conditioning": false, "spatial_padding_mode": "circular",
            "encoder_blocks": blocks, "decoder_blocks": blocks});
        let config = VideoVaeConfig::from_json(&config).unwrap();
        let weights = Weights::new("model", &file);
        for (half, module, input) in [
            ("encoder.down_blocks.0", encode(&config, &weights, [2, 3, 2], DType::F32), values(&[1, 2, 3, 2, 3], 5)),
            (
                "decoder.up_blocks.0",
                decode(&config, &weights, [2, 3, 2], DType::F32),
                values(&[1, 2, 3, 2, CHANNELS], 6),
            ),
        ] {
            let module = module.unwrap();
            let taps = RefCell::new(BTreeMap::new());
            let tap = |name: &str, value: &Tensor| {
                taps.borrow_mut().insert(name.to_string(), value.clone());
            };
            let lookup = |_: &str, key: &str, _: &TensorType| file.0.get(key).cloned();
            Evaluator::new(&module, &lookup).tap(&tap).run(&module.entries[0], &[input]).unwrap();
            let taps = taps.into_inner();
            let (name, _) = half.split_once('.').unwrap();
            let (x, y) = (taps[&format!("vae.{name}.conv_in")].floats(), taps[&format!("vae.{half}")].floats());
            for (x, y) in x.chunks(6 * CHANNELS).zip(y.chunks(6 * CHANNELS)) {
                let want = attention_of_a_frame(x, &file, &format!("{half}."));
                let error = want.iter().zip(y).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(error < 1e-5, "{half}: {error}");
            }
        }
    }

    #[test]
    fn missing_weights_are_all_named() {
        let mut file = File::new();
        file.0.remove("decoder.conv_norm_out.weight");
        file.0.remove("decoder.up_blocks.0.proj.bias");
        let config = json!({"latent_channels": CHANNELS, "decoder_base_channels": CHANNELS, "patch_size": 1,
            "norm_layer": "group_norm", "decoder_blocks": [["attn", {}]]});
        let config = VideoVaeConfig::from_json(&config).unwrap();
        let error = decode(&config, &Weights::new("model", &file), [1, 2, 2], DType::F32).unwrap_err().to_string();
        for part in ["conv_norm_out.weight", "proj.bias", "timestep_scale_multiplier", "true if absent"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
