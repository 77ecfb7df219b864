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

use serde_json::{Value, json};

use crate::fields::Fields;

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

    /// What is wrong with the block if it has to take `c` channels to `c_out`.
    pub(super) fn problem(&self, c: usize, c_out: usize) -> Option<String> {
        let EncoderBlock::SpaceToDepth { stride, multiplier } = *self else { return None };
        let block: usize = stride.iter().product();
        (!block.is_multiple_of(multiplier) || !c_out.is_multiple_of(block))
            .then(|| format!("cannot turn {c} channels into {c_out} with a space-to-depth by {stride:?}"))
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

    /// What is wrong with the block if it has to take `c` channels.
    pub(super) fn problem(&self, c: usize) -> Option<String> {
        let DecoderBlock::DepthToSpace { stride, divisor, is_residual: true } = *self else { return None };
        let block: usize = stride.iter().product();
        (!block.is_multiple_of(divisor) || !c.is_multiple_of(block))
            .then(|| format!("cannot tile {c} channels by {stride:?} to {} channels on its residual path", c / divisor))
    }
}

/// The entries of the block list `key`; what `parse` refuses is recorded and left out.
///
/// `parse` gets the name and the parameters of an entry, and returns what is wrong with the name.
pub(super) fn read_blocks<T>(
    fields: &Fields<'_>,
    key: &str,
    parse: impl Fn(&str, &Fields<'_>) -> Result<T, String>,
) -> Vec<T> {
    let list = fields.list(key);
    if list.len() > MOST_BLOCKS {
        fields.problem_at(key, format!("has {} entries, at most {MOST_BLOCKS} are supported", list.len()));
        return Vec::new();
    }
    let mut blocks = Vec::new();
    for (i, value) in list.iter().enumerate() {
        let key = format!("{key}[{i}]");
        let Some((name, parameters)) = entry(value) else {
            fields.problem_at(&key, format!("is `{value}`, expected [name, number or object]"));
            continue;
        };
        match parse(name, &fields.inside(&key, &parameters)) {
            Ok(block) => blocks.push(block),
            Err(problem) => fields.problem_at(&key, problem),
        }
    }
    blocks
}

/// Name and parameters of an entry; a bare number as parameters is the number of layers.
fn entry(value: &Value) -> Option<(&str, Value)> {
    let [name, parameters] = value.as_array()?.as_slice() else { return None };
    let parameters = match parameters {
        Value::Object(_) => parameters.clone(),
        Value::Number(layers) => json!({ "num_layers": layers }),
        _ => return None,
    };
    Some((name.as_str()?, parameters))
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
pub(super) fn encoder_block(name: &str, parameters: &Fields<'_>) -> Result<EncoderBlock, String> {
    let unknown = || format!("is `{name}`, which the encoder does not have");
    let multiplier = || parameters.size_within("multiplier", 2, MOST_BLOCKS);
    match name {
        "res_x" => Ok(EncoderBlock::ResStack { layers: parameters.required_size("num_layers", MOST_BLOCKS) }),
        "res_x_y" => Ok(EncoderBlock::ResWiden { multiplier: multiplier() }),
        "compress_all_x_y" => Ok(EncoderBlock::Conv { stride: [2, 2, 2], multiplier: multiplier() }),
        "attn" => Ok(EncoderBlock::Attention),
        name => {
            let what = name.strip_prefix("compress_").ok_or_else(unknown)?;
            if let Some(stride) = stride_of(what) {
                return Ok(EncoderBlock::Conv { stride, multiplier: 1 });
            }
            let stride = what.strip_suffix("_res").and_then(stride_of).ok_or_else(unknown)?;
            Ok(EncoderBlock::SpaceToDepth { stride, multiplier: multiplier() })
        }
    }
}

/// What an entry of `decoder_blocks` means.
pub(super) fn decoder_block(name: &str, parameters: &Fields<'_>) -> Result<DecoderBlock, String> {
    let divisor = |default: usize| parameters.size_within("multiplier", default, MOST_BLOCKS);
    let has_noise = || parameters.bool("inject_noise", false);
    match name {
        "res_x" => Ok(DecoderBlock::ResStack {
            layers: parameters.required_size("num_layers", MOST_BLOCKS),
            has_noise: has_noise(),
        }),
        "res_x_y" => Ok(DecoderBlock::ResNarrow { divisor: divisor(2), has_noise: has_noise() }),
        "attn" => Ok(DecoderBlock::Attention),
        "attn_res_x" => Err("is `attn_res_x`, which cannot be built there in the reference either".into()),
        name => {
            let stride = name.strip_prefix("compress_").and_then(stride_of);
            let stride = stride.ok_or_else(|| format!("is `{name}`, which the decoder does not have"))?;
            // Only `compress_all` reads `residual` in the reference; the others ignore it.
            let is_residual = name == "compress_all" && parameters.bool("residual", false);
            Ok(DecoderBlock::DepthToSpace { stride, divisor: divisor(1), is_residual })
        }
    }
}
