//! Latent upsamplers: small convolutional networks that enlarge video latents between two stages of a generation.
//!
//! One entry, [`upsample`]. The network works on un-normalised latents; the statistics are those of the **video VAE**, so
//! that the entry has weights from two sets of files: `model` (statistics) and `upsampler` (everything else).
//!
//! # Easy to get wrong
//! - Every convolution is padded with zeros on all axes, time included: nothing here is causal.
//! - A residual block ends with the activation *after* the addition; there is no norm on the sum.
//! - The group norms' epsilon is 1e-5, and their statistics include time (unless `dims` is 2).
//! - A spatial upsampler treats every frame alone and keeps frame 0; one that doubles time drops its first frame.
//! - The rational resampler by 2/1 computes the same as the plain one; only its keys differ, so they decide.
//! - 1.5× of an odd extent n gives ⌈3n/2⌉.
//!
//! Source: spec/upsamplers.

use std::fmt;

use ltxc_ir::ops::Conv;
use ltxc_ir::{Builder, DType, Module, Rate, TensorType, ValueId};
use serde_json::Value;

use crate::checkpoint::Generation;
use crate::fields::Fields;
use crate::video_vae::layers::{Statistics, Video, depth_to_space, drop_first_frame, vae_weights};
use crate::{Block, Functions, ModelError, Weights};

/// Epsilon of every group norm.
const NORM_EPS: f64 = 1e-5; // torch.nn.GroupNorm

/// Groups of every group norm.
const NORM_GROUPS: usize = 32; // ltx_core/model/upsampler, ResBlock

/// Extent of the convolutions' kernels.
const KERNEL: usize = 3;

/// Extent of the blur's kernel.
const BLUR_KERNEL: usize = 5; // ltx_core/model/upsampler, BlurDownsample

/// Scales of the rational resampler and their fractions.
const RATIOS: [(f64, [usize; 2]); 4] = [(0.75, [3, 4]), (1.5, [3, 2]), (2.0, [2, 1]), (4.0, [4, 1])];

/// Most residual blocks before or behind the upsampler.
const MOST_BLOCKS: usize = 256;

/// Largest extent of a latent.
const MOST_LATENTS: usize = 1 << 14;

/// What an upsampler enlarges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enlarge {
    /// Rows and columns, by `numerator / denominator`.
    Space {
        /// Factor of the depth-to-space.
        numerator: usize,
        /// Step of the blur that follows; 1 for none.
        denominator: usize,
    },
    /// Frames: `f` to `2 f − 1`.
    Time,
    /// Frames, rows and columns, each by two, without the first frame.
    SpaceAndTime,
}

impl Enlarge {
    /// Rows and columns by two, as pipelines of two stages need it.
    pub const TWICE: Enlarge = Enlarge::Space { numerator: 2, denominator: 1 };
}

impl fmt::Display for Enlarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Enlarge::Space { numerator, denominator: 1 } => write!(f, "rows and columns by {numerator}"),
            Enlarge::Space { numerator, denominator } => write!(f, "rows and columns by {numerator}/{denominator}"),
            Enlarge::Time => f.write_str("time by 2"),
            Enlarge::SpaceAndTime => f.write_str("time, rows and columns by 2"),
        }
    }
}

/// A latent upsampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpsamplerConfig {
    /// Channels of a latent.
    pub in_channels: usize,
    /// Width inside.
    pub mid_channels: usize,
    /// Residual blocks before the upsampler, and again as many behind it.
    pub blocks_per_stage: usize,
    /// Whether the network looks at every frame alone (`dims` 2).
    pub is_per_frame: bool,
    /// What it enlarges.
    pub enlarge: Enlarge,
    /// Whether it has the rational resampler.
    pub is_rational: bool,
}

impl UpsamplerConfig {
    /// Reads the config of an upsampler's file (its top level).
    ///
    /// # Errors
    /// [`ModelError::Config`] if it is not an upsampler, and with everything that is malformed or unsupported.
    pub fn from_json(config: &Value) -> Result<UpsamplerConfig, ModelError> {
        let fields = Fields::new("upsampler", config);
        if let Some(class) = fields.value("_class_name").filter(|c| *c != "LatentUpsampler") {
            let problem = format!("`_class_name` is `{class}`, expected `LatentUpsampler`");
            return Err(ModelError::config("upsampler", problem));
        }
        let dims = fields.size("dims", 3);
        if ![2, 3].contains(&dims) {
            fields.problem_at("dims", format!("is `{dims}`, expected 2 or 3"));
        }
        let is_per_frame = dims == 2;
        let (space, time) = (fields.bool("spatial_upsample", true), fields.bool("temporal_upsample", false));
        let enlarge = match (space, time) {
            (true, true) => Enlarge::SpaceAndTime,
            (false, true) => Enlarge::Time,
            _ => {
                let [numerator, denominator] = read_ratio(&fields);
                Enlarge::Space { numerator, denominator }
            }
        };
        if !space && !time {
            fields.problem("`spatial_upsample` and `temporal_upsample` are both false; one must be true");
        }
        if time && is_per_frame {
            fields.problem("`temporal_upsample` needs `dims` 3, found 2");
        }
        let config = UpsamplerConfig {
            in_channels: fields.size("in_channels", 128),
            mid_channels: fields.size("mid_channels", 512),
            blocks_per_stage: fields.size_within("num_blocks_per_stage", 4, MOST_BLOCKS),
            is_per_frame,
            enlarge,
            is_rational: fields.bool("rational_resampler", false),
        };
        if !config.mid_channels.is_multiple_of(NORM_GROUPS) {
            fields.problem_at(
                "mid_channels",
                format!("is `{}`, expected a multiple of {NORM_GROUPS}", config.mid_channels),
            );
        }
        fields.finish(config)
    }

    /// Whether published files of `generation` look like this. Of upsamplers that double rows and columns, those of LTX-2
    /// have the rational resampler and those of later generations do not; others cannot be told apart.
    ///
    /// Source: spec/upsamplers §1.
    pub fn can_be_of(&self, generation: Generation) -> bool {
        let doubles = self.enlarge == Enlarge::TWICE;
        !doubles || self.is_per_frame || self.is_rational == (generation == Generation::Ltx2)
    }

    /// Frames, rows and columns of the result for a latent of `grid`.
    pub fn output_grid(&self, grid: [usize; 3]) -> [usize; 3] {
        let [f, h, w] = grid;
        let longer = (2 * f).saturating_sub(1);
        match self.enlarge {
            Enlarge::Space { numerator, denominator } => {
                [f, (h * numerator).div_ceil(denominator), (w * numerator).div_ceil(denominator)]
            }
            Enlarge::Time => [longer, h, w],
            Enlarge::SpaceAndTime => [longer, 2 * h, 2 * w],
        }
    }
}

/// Fraction by which a spatial upsampler enlarges. Without the rational resampler `spatial_scale` means nothing.
fn read_ratio(fields: &Fields<'_>) -> [usize; 2] {
    if !fields.bool("rational_resampler", false) {
        return [2, 1];
    }
    let scale = fields.positive("spatial_scale", 2.0);
    RATIOS.iter().find(|(s, _)| *s == scale).map(|(_, ratio)| *ratio).unwrap_or_else(|| {
        fields.problem_at("spatial_scale", format!("is `{scale}`, expected one of 0.75, 1.5, 2 and 4"));
        [2, 1]
    })
}

/// Builds the entry `upsample`: `latent` f32 `[1, f, h, w, c]` → `latent` f32 `[1, f', h', w', c]`, both normalised.
///
/// The network alone goes from the value named `upsampler.input` to the one named `upsampler.final_conv`.
///
/// - `upsampler`: all weights of the upsampler's file; `model`: those of the checkpoint or VAE file with the statistics.
/// - `grid`: f, h and w, for the result see [`UpsamplerConfig::output_grid`]; `dtype`: of the activations.
///
/// # Errors
/// Missing or misshapen weights, an extent out of range.
pub fn upsample(
    config: &UpsamplerConfig,
    upsampler: &Weights<'_>,
    model: &Weights<'_>,
    grid: [usize; 3],
    dtype: DType,
) -> Result<Module, ModelError> {
    let [f, h, w] = grid;
    if grid.iter().any(|n| !(1..=MOST_LATENTS).contains(n)) {
        let problem = format!("{f}×{h}×{w} latents cannot be upsampled, expected 1..={MOST_LATENTS} of each");
        return Err(ModelError::config("upsampler", problem));
    }
    let b = Builder::new("upsample");
    let c = config.in_channels;
    let latent = b.param("latent", TensorType::f32([1, f, h, w, c]), Rate::Step);
    let statistics = Statistics::new(&b, &vae_weights(model), c, dtype);
    let input = b.name("upsampler.input", statistics.unnormalise(&b, b.cast(latent, dtype)));
    let net = Net { b: &b, weights: upsampler, config };
    let functions = Functions::default();
    let output = b.scope("upsampler", || net.run(&functions, Video { value: input, f, h, w, c }));
    b.result("latent", b.cast(statistics.normalise(&b, output.value), DType::F32));
    upsampler.finish()?;
    model.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// Writes the network, or one residual block of it.
struct Net<'a, 'w> {
    b: &'a Builder,
    weights: &'a Weights<'w>,
    config: &'a UpsamplerConfig,
}

impl Net<'_, '_> {
    /// Un-normalised latent to un-normalised latent.
    fn run(&self, functions: &Functions, z: Video) -> Video {
        let UpsamplerConfig { in_channels, mid_channels, blocks_per_stage, .. } = *self.config;
        let stage = |key: &str, x: Video| {
            (0..blocks_per_stage).fold(x, |x, i| self.res_block(functions, &format!("{key}.{i}"), x))
        };
        let x = self.conv("initial_conv", z, mid_channels);
        let x = stage("res_blocks", self.silu(self.norm("initial_norm", x)));
        let x = stage("post_upsample_res_blocks", self.enlarge(x));
        self.conv("final_conv", x, in_channels)
    }

    /// `silu(norm2(conv2(silu(norm1(conv1(x))))) + x)`.
    fn res_block(&self, functions: &Functions, key: &str, x: Video) -> Video {
        let block = Block::at("res_block", key);
        x.with(functions.call_one(self.b, self.weights, block, &[("x", x.value)], |b, weights, params| {
            let (net, x) = (Net { b, weights, config: self.config }, x.with(params[0]));
            let y = net.silu(net.norm("norm1", net.conv("conv1", x, x.c)));
            let y = net.norm("norm2", net.conv("conv2", y, x.c));
            b.silu(b.add(y.value, x.value))
        }))
    }

    /// The layer between the two stages.
    fn enlarge(&self, x: Video) -> Video {
        let y = match self.config.enlarge {
            Enlarge::Space { numerator, denominator } => {
                let rational = "upsampler.conv";
                let is_rational = self.weights.has(&format!("{rational}.weight"));
                let key = if is_rational { rational } else { "upsampler.0" };
                let wide = self.conv_per_frame(key, x, x.c * numerator * numerator);
                let y = depth_to_space(self.b, wide, [1, numerator, numerator]);
                if denominator == 1 { y } else { self.blur("upsampler.blur_down.kernel", y, denominator) }
            }
            Enlarge::Time => depth_to_space(self.b, self.conv_over_time("upsampler.0", x, 2 * x.c), [2, 1, 1]),
            Enlarge::SpaceAndTime => depth_to_space(self.b, self.conv_over_time("upsampler.0", x, 8 * x.c), [2, 2, 2]),
        };
        self.name("upsampler", y);
        if matches!(self.config.enlarge, Enlarge::Space { .. }) { y } else { drop_first_frame(self.b, y) }
    }

    /// The convolution `key` of the network's dimensions, to `c` channels.
    fn conv(&self, key: &str, x: Video, c: usize) -> Video {
        let y = if self.config.is_per_frame { self.conv_per_frame(key, x, c) } else { self.conv_over_time(key, x, c) };
        self.name(key, y)
    }

    /// 3×3×3, zeros around.
    fn conv_over_time(&self, key: &str, x: Video, c: usize) -> Video {
        let b = self.b;
        let weight = self.weights.get(b, &format!("{key}.weight"), &[c, x.c, KERNEL, KERNEL, KERNEL]);
        let y = b.conv(same_conv(3), x.value, b.transpose(weight, &[2, 3, 4, 1, 0]));
        Video { value: self.add_bias(key, y, c), c, ..x }
    }

    /// 3×3 in every frame, zeros around.
    fn conv_per_frame(&self, key: &str, x: Video, c: usize) -> Video {
        let b = self.b;
        let weight = self.weights.get(b, &format!("{key}.weight"), &[c, x.c, KERNEL, KERNEL]);
        let y = b.conv(same_conv(2), fold_frames(b, x), b.transpose(weight, &[2, 3, 1, 0]));
        let y = Video { value: self.add_bias(key, y, c), c, ..x };
        y.with(b.reshape(y.value, &y.shape()))
    }

    fn add_bias(&self, key: &str, y: ValueId, c: usize) -> ValueId {
        self.b.add(y, self.weights.get(self.b, &format!("{key}.bias"), &[c]))
    }

    /// Every `step`-th row and column of each frame, each channel blurred by the stored kernel.
    fn blur(&self, key: &str, x: Video, step: usize) -> Video {
        let b = self.b;
        let kernel = self.weights.get(b, key, &[1, 1, BLUR_KERNEL, BLUR_KERNEL]);
        let kernel = b.broadcast(b.transpose(kernel, &[2, 3, 0, 1]), &[BLUR_KERNEL, BLUR_KERNEL, 1, x.c]);
        let half = BLUR_KERNEL / 2;
        let op = Conv { stride: vec![step; 2], dilation: vec![1; 2], pad: vec![(half, half); 2], groups: x.c };
        let y = b.conv(op, fold_frames(b, x), kernel);
        let y = Video { value: y, h: x.h.div_ceil(step), w: x.w.div_ceil(step), ..x };
        y.with(b.reshape(y.value, &y.shape()))
    }

    /// The group norm `key`, over each frame alone or over all of them.
    fn norm(&self, key: &str, x: Video) -> Video {
        let b = self.b;
        let weight = self.weights.get(b, &format!("{key}.weight"), &[x.c]);
        let bias = self.weights.get(b, &format!("{key}.bias"), &[x.c]);
        let input = if self.config.is_per_frame { fold_frames(b, x) } else { x.value };
        let y = b.group_norm(input, weight, bias, NORM_GROUPS, NORM_EPS);
        self.name(key, x.with(b.reshape(y, &x.shape())))
    }

    fn silu(&self, x: Video) -> Video {
        x.with(self.b.silu(x.value))
    }

    /// Gives the result of the module `key` its name.
    fn name(&self, key: &str, x: Video) -> Video {
        self.b.name(key, x.value);
        x
    }
}

/// Frames as items of a batch: `[f, h, w, c]`.
fn fold_frames(b: &Builder, x: Video) -> ValueId {
    b.reshape(x.value, &[x.f, x.h, x.w, x.c])
}

/// A convolution over `n` axes that keeps their extents.
fn same_conv(n: usize) -> Conv {
    let half = KERNEL / 2;
    Conv { stride: vec![1; n], dilation: vec![1; n], pad: vec![(half, half); n], groups: 1 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(config: Value, want: Enlarge) {
        assert_eq!(UpsamplerConfig::from_json(&config).unwrap().enlarge, want);
    }

    #[test]
    fn switches_choose_what_is_enlarged() {
        let space = |numerator, denominator| Enlarge::Space { numerator, denominator };
        check(json!({}), space(2, 1));
        check(json!({"spatial_scale": 1.5}), space(2, 1));
        check(json!({"spatial_scale": 1.5, "rational_resampler": true}), space(3, 2));
        check(json!({"spatial_scale": 0.75, "rational_resampler": true}), space(3, 4));
        check(json!({"spatial_upsample": false, "temporal_upsample": true, "rational_resampler": true}), Enlarge::Time);
        check(json!({"temporal_upsample": true}), Enlarge::SpaceAndTime);
    }

    #[test]
    fn all_problems_are_listed() {
        let config = json!({"dims": 4, "spatial_upsample": false, "mid_channels": 48, "in_channels": 0,
            "rational_resampler": true, "spatial_scale": 3.0, "num_blocks_per_stage": 1000});
        let error = UpsamplerConfig::from_json(&config).unwrap_err().to_string();
        for part in ["6 problem(s)", "dims", "both false", "mid_channels", "in_channels", "spatial_scale", "1..=256"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let config = json!({"dims": 2, "temporal_upsample": true});
        assert!(UpsamplerConfig::from_json(&config).unwrap_err().to_string().contains("needs `dims` 3"));
        let other =
            UpsamplerConfig::from_json(&json!({"_class_name": "AVTransformer3DModel"})).unwrap_err().to_string();
        assert!(other.contains("expected `LatentUpsampler`"), "{other}");
        assert!(UpsamplerConfig::from_json(&json!(null)).is_err());
    }

    #[test]
    fn grids_of_real_sizes() {
        let grid = |config, grid| UpsamplerConfig::from_json(&config).unwrap().output_grid(grid);
        assert_eq!(grid(json!({"rational_resampler": true, "spatial_scale": 1.5}), [16, 16, 24]), [16, 24, 36]);
        assert_eq!(grid(json!({}), [16, 8, 12]), [16, 16, 24]);
        assert_eq!(grid(json!({"spatial_upsample": false, "temporal_upsample": true}), [16, 16, 24]), [31, 16, 24]);
    }
}
