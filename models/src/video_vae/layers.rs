//! Layers that everything in the convolutional video VAE is made of: convolutions, norms, statistics, patches.
//!
//! # Easy to get wrong
//! - Time is always padded with copies of the first and last frame, whatever the padding of rows and columns is.
//! - The pixel norm's epsilon is 1e-8 (the audio VAE has 1e-6), that of group norms is 1e-6.
//! - A patch is packed as (colour, column, row): the row offset varies fastest. Depth-to-space elsewhere has the column
//!   fastest.
//!
//! Source: spec/video-vae §4.

use ltxc_ir::ops::{Conv, PadMode};
use ltxc_ir::{Builder, DType, ValueId};

use super::block_list::Stride;
use super::config::{NORM_GROUPS, Norm, PaddingMode};
use crate::Weights;

/// Epsilon of every pixel norm of the video VAE.
const PIXEL_NORM_EPS: f64 = 1e-8; // ltx_core/model/common/normalization, PixelNorm

/// Epsilon of every group norm of the video VAE.
pub(super) const GROUP_NORM_EPS: f64 = 1e-6; // ltx_core/model/video_vae

/// Extent of every 3-D kernel along each axis.
const KERNEL: usize = 3;

/// A video activation `[1, f, h, w, c]` in a graph.
#[derive(Clone, Copy)]
pub(crate) struct Video {
    /// The value.
    pub value: ValueId,
    /// Frames.
    pub f: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Video {
    /// Shape of the value.
    pub fn shape(&self) -> [usize; 5] {
        [1, self.f, self.h, self.w, self.c]
    }

    /// The same extents around another value.
    pub fn with(self, value: ValueId) -> Video {
        Video { value, ..self }
    }
}

/// What the convolutions and norms of one half have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    /// Whether a convolution sees no later frame.
    pub is_causal: bool,
    /// Padding of rows and columns.
    pub padding: PaddingMode,
    /// Normalisation.
    pub norm: Norm,
}

/// Writes layers with the weights of one module.
#[derive(Clone)]
pub(super) struct Layers<'a> {
    /// The function that is written.
    pub b: &'a Builder,
    /// Weights of the module.
    pub weights: Weights<'a>,
    /// What all layers have in common.
    pub style: Style,
}

impl<'a> Layers<'a> {
    /// The layers of the module `key` inside this one.
    pub fn below(&self, key: &str) -> Layers<'a> {
        Layers { weights: self.weights.below(&format!("{key}.")), ..self.clone() }
    }

    /// The 3×3×3 convolution whose wrapper is `key` (weights `key.conv.*`): to `c` channels, extents divided by
    /// `stride`.
    pub fn conv(&self, key: &str, x: Video, c: usize, stride: Stride) -> Video {
        let b = self.b;
        let weights = self.weights.below(&format!("{key}.conv."));
        let weight = weights.get(b, "weight", &[c, x.c, KERNEL, KERNEL, KERNEL]);
        let bias = weights.get(b, "bias", &[c]);
        let (x, rows) = self.pad(x);
        let op = Conv { stride: stride.into(), dilation: vec![1; 3], pad: vec![(0, 0), rows, rows], groups: 1 };
        let y = b.conv(op, x.value, b.transpose(weight, &[2, 3, 4, 1, 0]));
        // Two frames were added; rows and columns are padded by one on each side in either way.
        let extent = |n: usize, s: usize| n.saturating_sub(KERNEL) / s + 1;
        let (h, w) = (extent(x.h + 2 * rows.0, stride[1]), extent(x.w + 2 * rows.0, stride[2]));
        Video { value: b.add(y, bias), f: extent(x.f, stride[0]), h, w, c }
    }

    /// `x` with two frames more, and with one row and column more on each side unless zeros are left to the
    /// convolution, which is then told how many.
    fn pad(&self, x: Video) -> (Video, (usize, usize)) {
        let b = self.b;
        let (before, after) = if self.style.is_causal { (KERNEL - 1, 0) } else { (KERNEL / 2, KERNEL / 2) };
        let edge = (KERNEL / 2, KERNEL / 2);
        let framed = b.pad(x.value, &[0, before, 0, 0, 0], &[0, after, 0, 0, 0], PadMode::Edge);
        let x = Video { value: framed, f: x.f + before + after, ..x };
        let mode = match self.style.padding {
            PaddingMode::Zeros => return (x, edge),
            PaddingMode::Reflect => PadMode::Reflect,
            PaddingMode::Replicate => PadMode::Edge,
            PaddingMode::Circular => PadMode::Circular,
        };
        let around = [0, 0, edge.0, edge.1, 0];
        let value = b.pad(x.value, &around, &around, mode);
        (Video { value, h: x.h + 2 * edge.0, w: x.w + 2 * edge.1, ..x }, (0, 0))
    }

    /// The norm `key`; it has weights only where it is a group norm.
    pub fn norm(&self, key: &str, x: Video) -> Video {
        match self.style.norm {
            Norm::Pixel => x.with(self.b.rms_norm(x.value, None, PIXEL_NORM_EPS)),
            Norm::Group => self.group_norm(key, x, NORM_GROUPS),
        }
    }

    /// The group norm `key` with its weights.
    pub fn group_norm(&self, key: &str, x: Video, groups: usize) -> Video {
        let weight = self.weights.get(self.b, &format!("{key}.weight"), &[x.c]);
        let bias = self.weights.get(self.b, &format!("{key}.bias"), &[x.c]);
        x.with(self.b.group_norm(x.value, weight, bias, groups, GROUP_NORM_EPS))
    }

    /// Names `x` by the path of the module `key`, which is relative to the scope of the builder.
    pub fn name(&self, key: &str, x: Video) -> Video {
        self.b.name(key, x.value);
        x
    }

    /// `x · sigmoid(x)`.
    pub fn silu(&self, x: Video) -> Video {
        x.with(self.b.silu(x.value))
    }

    /// `x · (1 + scale) + shift`; `shift`, `scale`: one value per channel.
    pub fn modulate(&self, x: Video, shift: ValueId, scale: ValueId) -> Video {
        x.with(self.b.add(self.b.mul(x.value, self.b.add_scalar(scale, 1.0)), shift))
    }
}

/// Channels to space, `[f, h, w, c · Π block] → [f · block.., c]`.
pub(crate) fn depth_to_space(b: &Builder, x: Video, block: Stride) -> Video {
    let value = b.depth_to_space(x.value, &block);
    let c = x.c / block.iter().product::<usize>();
    Video { value, f: x.f * block[0], h: x.h * block[1], w: x.w * block[2], c }
}

/// The inverse of [`depth_to_space`].
pub(super) fn space_to_depth(b: &Builder, x: Video, block: Stride) -> Video {
    let value = b.space_to_depth(x.value, &block);
    let c = x.c * block.iter().product::<usize>();
    Video { value, f: x.f / block[0], h: x.h / block[1], w: x.w / block[2], c }
}

/// `x` without its first frame.
pub(crate) fn drop_first_frame(b: &Builder, x: Video) -> Video {
    Video { value: b.slice_axis(x.value, 1, 1, x.f), f: x.f - 1, ..x }
}

/// Pixels to patches: `[f, h · p, w · p, c] → [f, h, w, c · p · p]`, channels in the order (colour, column, row).
pub(super) fn patchify(b: &Builder, x: Video, p: usize) -> Video {
    let (h, w) = (x.h / p, x.w / p);
    let cells = b.reshape(x.value, &[1, x.f, h, p, w, p, x.c]);
    let packed = b.transpose(cells, &[0, 1, 2, 4, 6, 5, 3]);
    let y = Video { value: packed, f: x.f, h, w, c: x.c * p * p };
    y.with(b.reshape(packed, &y.shape()))
}

/// The inverse of [`patchify`].
pub(super) fn unpatchify(b: &Builder, x: Video, p: usize) -> Video {
    let c = x.c / (p * p);
    let cells = b.reshape(x.value, &[1, x.f, x.h, x.w, c, p, p]);
    let spread = b.transpose(cells, &[0, 1, 2, 6, 3, 5, 4]);
    let y = Video { value: spread, f: x.f, h: x.h * p, w: x.w * p, c };
    y.with(b.reshape(spread, &y.shape()))
}

/// Mean and standard deviation per channel of latents, which the file stores next to the video VAE.
///
/// A file of its own stores them without the prefix `vae.`.
pub(crate) struct Statistics {
    mean: ValueId,
    std: ValueId,
}

impl Statistics {
    /// The statistics in `dtype`, for latents of `channels` channels. `vae`: weights of the video VAE.
    pub fn new(b: &Builder, vae: &Weights<'_>, channels: usize, dtype: DType) -> Statistics {
        let weights = vae.below("per_channel_statistics.");
        let get = |key| b.cast(weights.get(b, key, &[channels]), dtype);
        Statistics { mean: get("mean-of-means"), std: get("std-of-means") }
    }

    /// `(x − mean) / std`.
    pub fn normalise(&self, b: &Builder, x: ValueId) -> ValueId {
        b.div(b.sub(x, self.mean), self.std)
    }

    /// `x · std + mean`.
    pub fn unnormalise(&self, b: &Builder, x: ValueId) -> ValueId {
        b.add(b.mul(x, self.std), self.mean)
    }
}

/// The weights of the video VAE in `model`: below `vae.` in a monolithic checkpoint, at the top in a file of its own.
pub(crate) fn vae_weights<'a>(model: &Weights<'a>) -> Weights<'a> {
    if model.has("per_channel_statistics.mean-of-means") { model.clone() } else { model.below("vae.") }
}
