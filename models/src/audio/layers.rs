//! Layers that encoder and decoder of the audio VAE share: causal convolutions, residual and attention blocks.
//!
//! Activations are spectrograms `[b, t, m, c]`. Each layer names its result by the key of its module.
//!
//! # Easy to get wrong
//! - A convolution pads time in front only, frequency on both sides, both with zeros.
//! - The pixel norm has no parameters, and its epsilon is 1e-6 (the video VAE has 1e-8).
//! - Attention runs over all positions of time and frequency together, with one head, and is not causal.

use ltxc_ir::ops::{Attention, Conv};
use ltxc_ir::{Builder, Float, ValueId};

use crate::{Block, Functions, Weights};

/// Epsilon of every pixel norm of the audio VAE.
pub(super) const NORM_EPS: f64 = 1e-6; // ltx_core/model/audio_vae, PixelNorm

/// A spectrogram `[1, t, m, c]` in a graph.
#[derive(Clone, Copy)]
pub(super) struct Spectrogram {
    /// The value.
    pub value: ValueId,
    /// Frames.
    pub t: usize,
    /// Bins.
    pub m: usize,
    /// Channels.
    pub c: usize,
}

/// Writes the layers of one module.
pub(super) struct Layers<'a> {
    /// The function that is written.
    pub b: &'a Builder,
    /// Those that it calls.
    pub functions: &'a Functions,
    /// Weights of the module.
    pub weights: Weights<'a>,
}

impl Layers<'_> {
    /// Gives the result of the module `key` its name.
    pub fn name(&self, key: &str, x: Spectrogram) -> Spectrogram {
        self.b.name(key, x.value);
        x
    }

    /// Square convolution with the weights `key` (without `.weight`), stored `[o, i, k, k]`, and its bias.
    ///
    /// `pad` are zeros in front of and behind time and frequency.
    fn conv(
        &self,
        key: &str,
        x: Spectrogram,
        c: usize,
        k: usize,
        stride: usize,
        pad: [(usize, usize); 2],
    ) -> Spectrogram {
        let b = self.b;
        let weight = self.weights.get(b, &format!("{key}.weight"), &[c, x.c, k, k]);
        let bias = self.weights.get(b, &format!("{key}.bias"), &[c]);
        let op = Conv { stride: vec![stride; 2], dilation: vec![1; 2], pad: pad.to_vec(), groups: 1 };
        let value = b.add(b.conv(op, x.value, b.transpose(weight, &[2, 3, 1, 0])), bias);
        let length = |n: usize, (lo, hi): (usize, usize)| (n + lo + hi).saturating_sub(k) / stride + 1;
        Spectrogram { value, t: length(x.t, pad[0]), m: length(x.m, pad[1]), c }
    }

    /// Causal convolution with an odd kernel `k`, stride 1: `[b, t, m, x.c] → [b, t, m, c]`.
    pub fn causal_conv(&self, key: &str, x: Spectrogram, c: usize, k: usize) -> Spectrogram {
        let y = self.conv(&format!("{key}.conv"), x, c, k, 1, [(k - 1, 0), (k / 2, k / 2)]);
        self.name(key, y)
    }

    /// `silu(x / √(mean over channels of x² + eps))`.
    pub fn norm_silu(&self, x: Spectrogram) -> Spectrogram {
        Spectrogram { value: self.b.silu(self.b.rms_norm(x.value, None, NORM_EPS)), ..x }
    }

    /// Calls the residual block `key`: `shortcut(x) + conv2(norm_silu(conv1(norm_silu(x))))` with `c` output channels.
    pub fn residual_block(&self, key: &str, x: Spectrogram, c: usize) -> Spectrogram {
        let functions = self.functions;
        let block = Block::at("audio_res_block", key);
        let value = functions.call_one(self.b, &self.weights, block, &[("x", x.value)], |b, weights, params| {
            let layers = Layers { b, functions, weights: weights.clone() };
            let x = Spectrogram { value: params[0], ..x };
            let h = layers.causal_conv("conv1", layers.norm_silu(x), c, 3);
            let h = layers.causal_conv("conv2", layers.norm_silu(h), c, 3);
            let skip = if c == x.c { x } else { layers.causal_conv("nin_shortcut", x, c, 1) };
            b.add(skip.value, h.value)
        });
        Spectrogram { value, c, ..x }
    }

    /// `x + proj_out(softmax(q kᵀ / √c) v)` of the normalised input, over all positions.
    pub fn attention_block(&self, key: &str, x: Spectrogram) -> Spectrogram {
        let b = self.b;
        let positions = x.t * x.m;
        let rows = b.reshape(b.rms_norm(x.value, None, NORM_EPS), &[1, positions, x.c]);
        let linear = |part: &str, rows: ValueId| {
            let weight = self.weights.get(b, &format!("{key}.{part}.weight"), &[x.c, x.c, 1, 1]);
            let bias = self.weights.get(b, &format!("{key}.{part}.bias"), &[x.c]);
            b.add(b.matmul_transposed(rows, b.reshape(weight, &[x.c, x.c])), bias)
        };
        let head = |part: &str| b.reshape(linear(part, rows), &[1, positions, 1, x.c]);
        let op = Attention { scale: Float(1.0 / (x.c as f64).sqrt()), causal: false };
        let o = b.reshape(b.attention(op, head("q"), head("k"), head("v"), None), &[1, positions, x.c]);
        let y = b.reshape(linear("proj_out", o), &[1, x.t, x.m, x.c]);
        self.name(key, Spectrogram { value: b.add(x.value, y), ..x })
    }

    /// Halves both axes, time rounded up: 3×3 convolution of stride 2, zeros in front of time and behind frequency.
    pub fn downsample(&self, key: &str, x: Spectrogram) -> Spectrogram {
        let y = self.conv(&format!("{key}.conv"), x, x.c, 3, 2, [(2, 0), (0, 1)]);
        self.name(key, y)
    }

    /// Doubles both axes: nearest neighbour, causal 3×3 convolution, then the first of the `2t` frames is dropped.
    pub fn upsample(&self, key: &str, x: Spectrogram) -> Spectrogram {
        let b = self.b;
        let Spectrogram { t, m, c, .. } = x;
        let blocks = b.broadcast(b.reshape(x.value, &[1, t, 1, m, 1, c]), &[1, t, 2, m, 2, c]);
        let doubled = Spectrogram { value: b.reshape(blocks, &[1, 2 * t, 2 * m, c]), t: 2 * t, m: 2 * m, c };
        let y = self.conv(&format!("{key}.conv.conv"), doubled, c, 3, 1, [(2, 0), (1, 1)]);
        let value = b.slice_axis(y.value, 1, 1, y.t);
        self.name(key, Spectrogram { value, t: y.t - 1, ..y })
    }

    /// The two middle blocks, with attention between them if the model has it.
    pub fn mid(&self, x: Spectrogram, has_attention: bool) -> Spectrogram {
        let x = self.residual_block("mid.block_1", x, x.c);
        let x = if has_attention { self.attention_block("mid.attn_1", x) } else { x };
        self.residual_block("mid.block_2", x, x.c)
    }
}
