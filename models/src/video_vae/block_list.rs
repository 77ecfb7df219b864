//! The block lists of a configuration: the vocabulary of blocks, and how an entry is read.
//!
//! An entry is `[name, parameters]`; a bare number as parameters is the number of layers.
//!
//! # Easy to get wrong
//! - `multiplier` is 1 by default for decoder upsamplers, 2 everywhere else. In the decoder it divides the width.
//! - A plain strided `compress_*` of the encoder keeps the width, whatever its `multiplier` says.
//! - Only `compress_all` of the decoder reads `residual`.
//!
//! Source: spec/video-vae §2.4.

use serde_json::Value;

use super::fields::{Fields, as_size};

/// Most entries of a block list, and largest parameter of a block.
const MOST_BLOCKS: usize = 256;

/// Factors between input and output along time, height and width.
pub type Stride = [usize; 3];

/// One block of the encoder. Widths follow from the list, see [`super::VideoVaeConfig::encoder_widths`].
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

/// One block of the decoder. Widths follow from the list, see [`super::VideoVaeConfig::decoder_widths`].
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

impl EncoderBlock {
    /// Factors between input and output, if they differ in size.
    pub(super) fn stride(&self) -> Option<Stride> {
        match *self {
            EncoderBlock::Conv { stride, .. } | EncoderBlock::SpaceToDepth { stride, .. } => Some(stride),
            _ => None,
        }
    }

    pub(super) fn multiplier(&self) -> usize {
        match *self {
            EncoderBlock::ResWiden { multiplier }
            | EncoderBlock::Conv { multiplier, .. }
            | EncoderBlock::SpaceToDepth { multiplier, .. } => multiplier,
            EncoderBlock::ResStack { .. } | EncoderBlock::Attention => 1,
        }
    }

    /// Why the block cannot take `c` channels to `c_out`.
    pub(super) fn problem(&self, c: usize, c_out: usize) -> Option<String> {
        let EncoderBlock::SpaceToDepth { stride, multiplier } = *self else { return None };
        let block: usize = stride.iter().product();
        (!block.is_multiple_of(multiplier) || !c_out.is_multiple_of(block))
            .then(|| format!("space-to-depth by {stride:?} cannot turn {c} channels into {c_out}"))
    }
}

impl DecoderBlock {
    /// Factors between input and output, if they differ in size.
    pub(super) fn stride(&self) -> Option<Stride> {
        if let DecoderBlock::DepthToSpace { stride, .. } = *self { Some(stride) } else { None }
    }

    pub(super) fn divisor(&self) -> usize {
        match *self {
            DecoderBlock::ResNarrow { divisor, .. } | DecoderBlock::DepthToSpace { divisor, .. } => divisor,
            DecoderBlock::ResStack { .. } | DecoderBlock::Attention => 1,
        }
    }

    /// Why the block cannot take `c` channels.
    pub(super) fn problem(&self, c: usize) -> Option<String> {
        let DecoderBlock::DepthToSpace { stride, divisor, is_residual: true } = *self else { return None };
        let block: usize = stride.iter().product();
        (!block.is_multiple_of(divisor) || !c.is_multiple_of(block))
            .then(|| format!("the residual path cannot tile {c} channels by {stride:?} to {} channels", c / divisor))
    }
}

/// Parameters of one entry of a block list.
pub(super) struct BlockFields<'a> {
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
pub(super) fn read_blocks<T>(
    fields: &Fields<'_>,
    key: &str,
    parse: impl Fn(&BlockFields<'_>) -> Result<T, String>,
) -> Vec<T> {
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

/// What an entry of `encoder_blocks` means.
pub(super) fn encoder_block(block: &BlockFields<'_>) -> Result<EncoderBlock, String> {
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

/// What an entry of `decoder_blocks` means.
pub(super) fn decoder_block(block: &BlockFields<'_>) -> Result<DecoderBlock, String> {
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
