//! Configuration of the convolutional video VAE: the block lists with their widths, and the switches around them.
//!
//! Reading checks everything that does not need the weights: names and values, that the widths work out from block to
//! block, that encoder and decoder agree on their factors. What is left can only fail on missing or misshapen weights.
//!
//! # Easy to get wrong
//! - `decoder_blocks` is stored with the pixel side first and executed in reverse.
//! - Absent, `spatial_padding_mode` means zeros in the encoder (after `encoder_spatial_padding_mode`) but reflection in
//!   the decoder, and `timestep_conditioning` means **true**.
//! - The width of the encoder starts at `latent_channels`; `encoder_base_channels` is ignored, as in the reference.
//! - `multiplier` is 1 by default for decoder upsamplers, 2 everywhere else.
//!
//! Source: spec/video-vae §2.

use serde_json::Value;

use super::fields::{Fields, MOST, as_size};
use crate::ModelError;

/// Most entries of a block list, and most layers of a block.
const MOST_BLOCKS: usize = 256;

/// Largest factor between latents and pixels.
const MOST_FACTOR: usize = 1 << 12;

/// Groups of a group norm over activations.
pub(super) const NORM_GROUPS: usize = 32; // ltx_core/model/video_vae, norm_num_groups

/// What is put around the rows and columns of an activation before a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PaddingMode {
    /// Zeros.
    Zeros,
    /// The mirror image without the edge.
    Reflect,
    /// The edge.
    Replicate,
    /// The other side.
    Circular,
}

/// Normalisation in front of the activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// RMS over the channels, without parameters.
    Pixel,
    /// Group norm with 32 groups.
    Group,
}

/// What the encoder says about the variance of its latent, next to the means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogVariance {
    /// One channel for each channel of the latent.
    PerChannel,
    /// One channel for all.
    Uniform,
    /// One channel that means nothing.
    Constant,
    /// Nothing. The reference then halves the latent by mistake; encoding is refused.
    None,
}

/// Factors between input and output along time, height and width.
pub type Stride = [usize; 3];

/// One block of the encoder. Widths follow from the list, see [`VideoVaeConfig::encoder_widths`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncoderBlock {
    /// A stack of residual blocks of one width.
    ResStack {
        /// How many.
        layers: usize,
    },
    /// One residual block that multiplies the width.
    ResWiden {
        /// By how much.
        multiplier: usize,
    },
    /// A strided convolution.
    Conv {
        /// Its stride.
        stride: Stride,
        /// Factor of the width.
        multiplier: usize,
    },
    /// Space-to-depth of a convolution, with a skip path.
    SpaceToDepth {
        /// Factor per axis.
        stride: Stride,
        /// Factor of the width.
        multiplier: usize,
    },
    /// Attention inside each frame.
    Attention,
}

/// One block of the decoder. Widths follow from the list, see [`VideoVaeConfig::decoder_widths`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecoderBlock {
    /// A stack of residual blocks of one width.
    ResStack {
        /// How many.
        layers: usize,
        /// Whether each convolution is followed by noise.
        has_noise: bool,
    },
    /// One residual block that divides the width.
    ResNarrow {
        /// By how much.
        divisor: usize,
        /// Whether each convolution is followed by noise.
        has_noise: bool,
    },
    /// Depth-to-space of a convolution.
    DepthToSpace {
        /// Factor per axis.
        stride: Stride,
        /// Divisor of the width.
        divisor: usize,
        /// Whether the input is added, brought to the size of the output.
        is_residual: bool,
    },
    /// Attention inside each frame.
    Attention,
}

/// A convolutional video VAE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VideoVaeConfig {
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Rows and columns of pixels that become channels at the pixel end.
    pub patch_size: usize,
    /// Normalisation of both halves.
    pub norm: Norm,
    /// Further outputs of the encoder.
    pub log_variance: LogVariance,
    /// Whether the decoder looks at no later frame.
    pub is_decoder_causal: bool,
    /// Whether the decoder takes a timestep and mixes noise into the latent.
    pub has_timestep: bool,
    /// Padding of the encoder's convolutions.
    pub encoder_padding: PaddingMode,
    /// Padding of the decoder's convolutions.
    pub decoder_padding: PaddingMode,
    /// Width of the decoder at the pixel end.
    pub decoder_base_channels: usize,
    /// Blocks of the encoder in execution order.
    pub encoder_blocks: Vec<EncoderBlock>,
    /// Blocks of the decoder in execution order.
    pub decoder_blocks: Vec<DecoderBlock>,
}

impl VideoVaeConfig {
    /// Reads the object `vae` of a checkpoint's config.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that is malformed, contradictory or unsupported.
    pub fn from_json(vae: &Value) -> Result<VideoVaeConfig, ModelError> {
        let fields = Fields::new("vae", vae);
        if let Some(class) = fields.value("_class_name").filter(|c| *c != "CausalVideoAutoencoder") {
            // The other keys mean something else then, so that their problems would only confuse.
            let problem = match class.as_str() {
                Some("CausalDiffusionVAE") => "the diffusion decoder of LTX-2.5 (`CausalDiffusionVAE`) is not \
                     supported yet; use the file with the convolutional video VAE"
                    .into(),
                _ => format!("`_class_name` is `{class}`, expected `CausalVideoAutoencoder`"),
            };
            return Err(ModelError::Config { path: "vae".into(), problem });
        }
        for (key, supported) in [("dims", 3), ("in_channels", 3), ("out_channels", 3)] {
            if let Some(value) = fields.value(key)
                && as_size(value) != Some(supported)
            {
                fields.problem(format!("`{key}` is `{value}`, only {supported} is supported"));
            }
        }
        let encoder_padding = fields.choice("encoder_spatial_padding_mode", PaddingMode::Zeros, &PADDING_MODES);
        let common_padding = fields.choice("spatial_padding_mode", None, &PADDING_MODES.map(|(n, m)| (n, Some(m))));
        let mut decoder_blocks = read_blocks(&fields, "decoder_blocks", decoder_block);
        decoder_blocks.reverse();
        let config = VideoVaeConfig {
            latent_channels: fields.size("latent_channels", 128),
            patch_size: fields.size("patch_size", 4),
            norm: fields.choice("norm_layer", Norm::Pixel, &[("pixel_norm", Norm::Pixel), ("group_norm", Norm::Group)]),
            log_variance: fields.choice("latent_log_var", LogVariance::Uniform, &LOG_VARIANCES),
            is_decoder_causal: fields.bool("causal_decoder", false),
            has_timestep: fields.bool("timestep_conditioning", true),
            encoder_padding: common_padding.unwrap_or(encoder_padding),
            decoder_padding: common_padding.unwrap_or(PaddingMode::Reflect),
            decoder_base_channels: fields.size("decoder_base_channels", 128),
            encoder_blocks: read_blocks(&fields, "encoder_blocks", encoder_block),
            decoder_blocks,
        };
        // Relations only mean something between values that are right.
        if fields.is_clean() {
            config.check(&fields);
        }
        fields.finish(config)
    }

    /// Pixels per latent along time, height and width: `[8, 32, 32]` in all released models.
    pub fn factors(&self) -> Stride {
        let strides = self.encoder_blocks.iter().filter_map(EncoderBlock::stride);
        let factors = product(self.patch_size, strides);
        let decoder = product(self.patch_size, self.decoder_blocks.iter().filter_map(DecoderBlock::stride));
        // A file may hold one half only; `from_json` made sure that both agree otherwise.
        if self.encoder_blocks.is_empty() { decoder } else { factors }
    }

    /// Width behind `conv_in` of the encoder and behind each of its blocks.
    pub fn encoder_widths(&self) -> Vec<usize> {
        let mut widths = vec![self.latent_channels];
        for block in &self.encoder_blocks {
            let width = widths.last().copied().unwrap_or(1);
            widths.push(width.saturating_mul(block.multiplier()));
        }
        widths
    }

    /// Width behind `conv_in` of the decoder and behind each of its blocks.
    pub fn decoder_widths(&self) -> Vec<usize> {
        let bottleneck =
            self.decoder_blocks.iter().fold(self.decoder_base_channels, |n, b| n.saturating_mul(b.divisor()));
        let mut widths = vec![bottleneck];
        for block in &self.decoder_blocks {
            let width = widths.last().copied().unwrap_or(1);
            widths.push(width / block.divisor());
        }
        widths
    }

    /// Channels of the encoder's `conv_out`; the first [`VideoVaeConfig::latent_channels`] of them are the means.
    pub fn encoder_outputs(&self) -> usize {
        match self.log_variance {
            LogVariance::PerChannel => 2 * self.latent_channels,
            LogVariance::Uniform | LogVariance::Constant => self.latent_channels + 1,
            LogVariance::None => self.latent_channels,
        }
    }

    /// What is wrong between the values.
    fn check(&self, fields: &Fields<'_>) {
        if self.encoder_blocks.is_empty() && self.decoder_blocks.is_empty() {
            fields.problem("`encoder_blocks` and `decoder_blocks` are empty");
        }
        let factors = self.factors();
        if factors.iter().any(|&f| f > MOST_FACTOR) {
            fields.problem(format!("{factors:?} pixels per latent are too many, at most {MOST_FACTOR} are supported"));
        }
        let decoder = product(self.patch_size, self.decoder_blocks.iter().filter_map(DecoderBlock::stride));
        if !self.decoder_blocks.is_empty() && decoder != factors {
            fields.problem(format!("the encoder has factors {factors:?}, but the decoder {decoder:?}"));
        }
        for (i, (block, widths)) in self.encoder_blocks.iter().zip(self.encoder_widths().windows(2)).enumerate() {
            if let Some(problem) = block.problem(widths[0], widths[1]) {
                fields.problem(format!("`encoder_blocks[{i}]`: {problem}"));
            }
        }
        let stored = |i: usize| self.decoder_blocks.len() - 1 - i;
        for (i, (block, widths)) in self.decoder_blocks.iter().zip(self.decoder_widths().windows(2)).enumerate() {
            if let Some(problem) = block.problem(widths[0]) {
                fields.problem(format!("`decoder_blocks[{}]`: {problem}", stored(i)));
            }
        }
        let widths = [self.encoder_widths(), self.decoder_widths()];
        if widths.iter().flatten().any(|&w| w > MOST) {
            fields.problem(format!("the widths {widths:?} are out of range, at most {MOST} channels are supported"));
        }
        if self.norm == Norm::Group && widths.iter().flatten().any(|w| !w.is_multiple_of(NORM_GROUPS)) {
            fields.problem(format!("`norm_layer` needs widths that are multiples of {NORM_GROUPS}, found {widths:?}"));
        }
    }
}

const PADDING_MODES: [(&str, PaddingMode); 4] = [
    ("zeros", PaddingMode::Zeros),
    ("reflect", PaddingMode::Reflect),
    ("replicate", PaddingMode::Replicate),
    ("circular", PaddingMode::Circular),
];

const LOG_VARIANCES: [(&str, LogVariance); 4] = [
    ("per_channel", LogVariance::PerChannel),
    ("uniform", LogVariance::Uniform),
    ("constant", LogVariance::Constant),
    ("none", LogVariance::None),
];

impl EncoderBlock {
    /// Factors between input and output, if they differ in size.
    fn stride(&self) -> Option<Stride> {
        match *self {
            EncoderBlock::Conv { stride, .. } | EncoderBlock::SpaceToDepth { stride, .. } => Some(stride),
            _ => None,
        }
    }

    fn multiplier(&self) -> usize {
        match *self {
            EncoderBlock::ResWiden { multiplier }
            | EncoderBlock::Conv { multiplier, .. }
            | EncoderBlock::SpaceToDepth { multiplier, .. } => multiplier,
            EncoderBlock::ResStack { .. } | EncoderBlock::Attention => 1,
        }
    }

    /// Why the block cannot take `c` channels to `c_out`.
    fn problem(&self, c: usize, c_out: usize) -> Option<String> {
        let EncoderBlock::SpaceToDepth { stride, multiplier } = *self else { return None };
        let block: usize = stride.iter().product();
        (!block.is_multiple_of(multiplier) || !c_out.is_multiple_of(block))
            .then(|| format!("space-to-depth by {stride:?} cannot turn {c} channels into {c_out}"))
    }
}

impl DecoderBlock {
    /// Factors between input and output, if they differ in size.
    fn stride(&self) -> Option<Stride> {
        if let DecoderBlock::DepthToSpace { stride, .. } = *self { Some(stride) } else { None }
    }

    fn divisor(&self) -> usize {
        match *self {
            DecoderBlock::ResNarrow { divisor, .. } | DecoderBlock::DepthToSpace { divisor, .. } => divisor,
            DecoderBlock::ResStack { .. } | DecoderBlock::Attention => 1,
        }
    }

    /// Why the block cannot take `c` channels.
    fn problem(&self, c: usize) -> Option<String> {
        let DecoderBlock::DepthToSpace { stride, divisor, is_residual: true } = *self else { return None };
        let block: usize = stride.iter().product();
        (!block.is_multiple_of(divisor) || !c.is_multiple_of(block))
            .then(|| format!("the residual path cannot tile {c} channels by {stride:?} to {} channels", c / divisor))
    }
}

/// Factors of a list of blocks, with the patches.
fn product(patch_size: usize, strides: impl Iterator<Item = Stride>) -> Stride {
    strides.fold([1, patch_size, patch_size], |f, s| std::array::from_fn(|i| f[i].saturating_mul(s[i])))
}

/// Parameters of one entry of a block list.
struct BlockFields<'a> {
    name: &'a str,
    /// An object, or a bare number that stands for `num_layers`.
    parameters: &'a Value,
}

impl BlockFields<'_> {
    fn value(&self, key: &str) -> Option<&Value> {
        let is_bare = key == "num_layers" && self.parameters.is_number();
        let value = if is_bare { Some(self.parameters) } else { self.parameters.get(key) };
        value.filter(|v| !v.is_null())
    }

    fn size(&self, key: &str, default: Option<usize>) -> Result<usize, String> {
        let Some(value) = self.value(key) else { return default.ok_or_else(|| format!("`{key}` is missing")) };
        as_size(value)
            .filter(|&n| n <= MOST_BLOCKS)
            .ok_or_else(|| format!("`{key}` is `{value}`, expected a whole number in 1..={MOST_BLOCKS}"))
    }

    fn bool(&self, key: &str) -> Result<bool, String> {
        match self.value(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(format!("`{key}` is `{other}`, expected true or false")),
        }
    }
}

/// The entries of the block list `key`; what `parse` refuses is recorded and left out.
fn read_blocks<T>(fields: &Fields<'_>, key: &str, parse: impl Fn(&BlockFields<'_>) -> Result<T, String>) -> Vec<T> {
    let list = fields.list(key);
    if list.len() > MOST_BLOCKS {
        fields.problem(format!("`{key}` has {} entries, at most {MOST_BLOCKS} are supported", list.len()));
        return Vec::new();
    }
    let entry = |value: &Value| {
        let malformed = || format!("is `{value}`, expected [name, number or object]");
        let [name, parameters] = value.as_array().map(Vec::as_slice).ok_or_else(malformed)? else {
            return Err(malformed());
        };
        let name = name.as_str().ok_or_else(malformed)?;
        if !parameters.is_object() && !parameters.is_number() {
            return Err(malformed());
        }
        parse(&BlockFields { name, parameters })
    };
    let mut blocks = Vec::new();
    for (i, value) in list.iter().enumerate() {
        match entry(value) {
            Ok(block) => blocks.push(block),
            Err(problem) => fields.problem(format!("`{key}[{i}]`: {problem}")),
        }
    }
    blocks
}

/// Stride of the compressing blocks, by the part of their names that says so.
fn stride_of(name: &str) -> Option<Stride> {
    match name {
        "time" => Some([2, 1, 1]),
        "space" => Some([1, 2, 2]),
        "all" => Some([2, 2, 2]),
        _ => None,
    }
}

fn encoder_block(block: &BlockFields<'_>) -> Result<EncoderBlock, String> {
    let unknown = || format!("the encoder has no block `{}`", block.name);
    match block.name {
        "res_x" => Ok(EncoderBlock::ResStack { layers: block.size("num_layers", None)? }),
        "res_x_y" => Ok(EncoderBlock::ResWiden { multiplier: block.size("multiplier", Some(2))? }),
        "compress_all_x_y" => {
            Ok(EncoderBlock::Conv { stride: [2, 2, 2], multiplier: block.size("multiplier", Some(2))? })
        }
        "attn" => Ok(EncoderBlock::Attention),
        name => {
            let what = name.strip_prefix("compress_").ok_or_else(unknown)?;
            if let Some(stride) = stride_of(what) {
                return Ok(EncoderBlock::Conv { stride, multiplier: 1 });
            }
            let stride = what.strip_suffix("_res").and_then(stride_of).ok_or_else(unknown)?;
            Ok(EncoderBlock::SpaceToDepth { stride, multiplier: block.size("multiplier", Some(2))? })
        }
    }
}

fn decoder_block(block: &BlockFields<'_>) -> Result<DecoderBlock, String> {
    match block.name {
        "res_x" => Ok(DecoderBlock::ResStack {
            layers: block.size("num_layers", None)?,
            has_noise: block.bool("inject_noise")?,
        }),
        "res_x_y" => {
            let divisor = block.size("multiplier", Some(2))?;
            Ok(DecoderBlock::ResNarrow { divisor, has_noise: block.bool("inject_noise")? })
        }
        "attn" => Ok(DecoderBlock::Attention),
        "attn_res_x" => Err("`attn_res_x` is named in the reference but cannot be built there either".into()),
        name => {
            let stride = name.strip_prefix("compress_").and_then(stride_of);
            let stride = stride.ok_or_else(|| format!("the decoder has no block `{name}`"))?;
            // Only `compress_all` reads `residual` in the reference; the others ignore it.
            let is_residual = name == "compress_all" && block.bool("residual")?;
            Ok(DecoderBlock::DepthToSpace { stride, divisor: block.size("multiplier", Some(1))?, is_residual })
        }
    }
}
