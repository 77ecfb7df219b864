//! Experiments: deviations from the model that people try when something else is wrong with a picture.
//!
//! None of them is part of any release, none mends anything, and all are off unless a run asks for them by name. They are
//! of the run, not of the plan: two of them change weights where these are bound, so that every plan can run them and no
//! plan is different because of them. What was made with one says so in its metadata.
//!
//! | name | what it does |
//! | --- | --- |
//! | `placeholder-latents=zero` or `=noise` | nothing is denoised; decoders get zeros, or noise |
//! | `early-text-layers=N` | only the first N hidden states of the text encoder count |
//! | `cross-attn-scale=S@FROM` | what blocks take from the text counts S times, from block FROM on |
//!
//! Source: spec/debug-tools §11, spec/pipelines §11.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};
use ltxc_ir::plan::Plan;
use ltxc_ir::plan::summary::tensors;
use ltxc_ir::{DType, TensorType};

use crate::error::RunError;
use crate::memory::Memory;

/// Block from which `cross-attn-scale` counts if it is not said.
const LATE: usize = 40;

/// One deviation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Experiment {
    /// Nothing is denoised.
    PlaceholderLatents(Placeholder),
    /// So many hidden states of the text encoder count, the embeddings first.
    EarlyTextLayers(usize),
    /// What attention to the text gives is multiplied in late blocks.
    CrossAttentionScale {
        /// By this.
        factor: f32,
        /// From this block on.
        from: usize,
    },
}

/// What decoders get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placeholder {
    /// The mean of all latents.
    Zero,
    /// Standard normal noise, that of the last stage.
    Noise,
}

impl FromStr for Experiment {
    type Err = String;

    fn from_str(text: &str) -> Result<Experiment, String> {
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let unknown = |what: &str| Err(format!("`{}` is not {what}", value.unwrap_or_default()));
        match (name, value) {
            ("placeholder-latents", None | Some("zero")) => Ok(Experiment::PlaceholderLatents(Placeholder::Zero)),
            ("placeholder-latents", Some("noise")) => Ok(Experiment::PlaceholderLatents(Placeholder::Noise)),
            ("placeholder-latents", _) => unknown("`zero` or `noise`"),
            ("early-text-layers", value) => match value.unwrap_or("1").parse() {
                Ok(count) if count > 0 => Ok(Experiment::EarlyTextLayers(count)),
                _ => unknown("a number of hidden states, at least 1"),
            },
            ("cross-attn-scale", Some(value)) => {
                let (factor, from) = value.split_once('@').map_or((value, None), |(s, from)| (s, Some(from)));
                let factor = factor.parse::<f32>().ok().filter(|f| f.is_finite());
                match (factor, from.map_or(Ok(LATE), str::parse)) {
                    (Some(factor), Ok(from)) => Ok(Experiment::CrossAttentionScale { factor, from }),
                    _ => unknown("a factor, with `@` and the first block behind it if that is not 40"),
                }
            }
            _ => Err("expected placeholder-latents=zero|noise, early-text-layers=N or cross-attn-scale=S@FROM".into()),
        }
    }
}

impl fmt::Display for Experiment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Experiment::PlaceholderLatents(Placeholder::Zero) => f.write_str("placeholder-latents=zero"),
            Experiment::PlaceholderLatents(Placeholder::Noise) => f.write_str("placeholder-latents=noise"),
            Experiment::EarlyTextLayers(count) => write!(f, "early-text-layers={count}"),
            Experiment::CrossAttentionScale { factor, from } => write!(f, "cross-attn-scale={factor}@{from}"),
        }
    }
}

/// The experiments of a run; none by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Experiments {
    list: Vec<Experiment>,
    /// Number of hidden states of the text encoder.
    states: usize,
}

impl Experiments {
    /// These experiments for the model of a plan.
    ///
    /// # Errors
    /// One that the model is too small for, and two of one kind.
    pub fn new(list: Vec<Experiment>, plan: &Plan) -> Result<Experiments, RunError> {
        let refused = |problem: String| Err(RunError::Input(problem));
        let all = tensors(plan);
        let shape = |end: &str| {
            let found = all.iter().find(|((_, key), _)| key.ends_with(end));
            found.and_then(|(_, ty)| ty.shape.get(1).copied()).unwrap_or(0)
        };
        let (hidden, columns) = (shape("embed_tokens.weight"), shape("aggregate_embed.weight"));
        let states = columns.checked_div(hidden).unwrap_or(0);
        for (i, experiment) in list.iter().enumerate() {
            let kind = std::mem::discriminant(experiment);
            if list[..i].iter().any(|e| std::mem::discriminant(e) == kind) {
                return refused(format!("experiment `{experiment}` is given twice; give it once"));
            }
            match *experiment {
                Experiment::EarlyTextLayers(count) if count > states => {
                    return refused(format!(
                        "experiment `{experiment}`: the text encoder has {states} hidden states; give fewer"
                    ));
                }
                Experiment::CrossAttentionScale { from, .. } => {
                    let last = all.keys().filter_map(|(_, key)| text_attention_block(key)).max();
                    if last.is_none_or(|last| from > last) {
                        return refused(format!(
                            "experiment `{experiment}`: the last block is {}; give an earlier one behind the `@`",
                            last.map_or("none".into(), |last| last.to_string())
                        ));
                    }
                }
                _ => {}
            }
        }
        Ok(Experiments { list, states })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Their names with values, as metadata has them.
    pub fn labels(&self) -> Vec<String> {
        self.list.iter().map(ToString::to_string).collect()
    }

    /// What decoders get instead of denoised latents.
    pub(crate) fn placeholder(&self) -> Option<Placeholder> {
        self.list.iter().find_map(|e| match e {
            Experiment::PlaceholderLatents(placeholder) => Some(*placeholder),
            _ => None,
        })
    }

    /// Whether weights with this key are changed.
    pub fn changes(&self, key: &str) -> bool {
        self.list.iter().any(|e| e.changes(key))
    }

    /// The weight `key` as experiments have it; `None` if they leave it alone. `base` are its bytes.
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn edited(&self, key: &str, ty: &TensorType, base: &[u8]) -> Result<Option<Memory>, RunError> {
        if !self.changes(key) {
            return Ok(None);
        }
        let mut memory = Memory::new(base.len() as u64)?;
        memory.bytes_mut().copy_from_slice(base);
        for experiment in self.list.iter().filter(|e| e.changes(key)) {
            match *experiment {
                Experiment::EarlyTextLayers(count) => zero_late_states(memory.bytes_mut(), ty, count, self.states),
                Experiment::CrossAttentionScale { factor, .. } => scale(memory.bytes_mut(), ty.dtype, factor),
                Experiment::PlaceholderLatents(_) => {}
            }
        }
        Ok(Some(memory))
    }
}

impl Experiment {
    fn changes(&self, key: &str) -> bool {
        match *self {
            Experiment::PlaceholderLatents(_) => false,
            Experiment::EarlyTextLayers(_) => {
                key.starts_with("text_embedding_projection.") && key.ends_with("aggregate_embed.weight")
            }
            Experiment::CrossAttentionScale { from, .. } => {
                text_attention_block(key).is_some_and(|block| block >= from)
            }
        }
    }
}

/// The block whose attention to the text ends with the layer that `key` belongs to.
fn text_attention_block(key: &str) -> Option<usize> {
    let (block, rest) = key.split_once("transformer_blocks.")?.1.split_once('.')?;
    let is_output = ["attn2.to_out.0.", "audio_attn2.to_out.0."].iter().any(|p| rest.starts_with(p));
    block.parse().ok().filter(|_| is_output)
}

/// Zeros in the columns of states from `count` on. Column `d · states + l` belongs to channel `d` of state `l`.
fn zero_late_states(bytes: &mut [u8], ty: &TensorType, count: usize, states: usize) {
    let width = ty.dtype.bytes();
    // A row is a whole number of channels, each of `states` columns.
    for channel in bytes.chunks_exact_mut((states * width).max(1)) {
        channel[count.min(states) * width..].fill(0);
    }
}

fn scale(bytes: &mut [u8], dtype: DType, factor: f32) {
    match dtype {
        DType::BF16 => bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|b| {
            *b = bf16::from_f32(bf16::from_le_bytes(*b).to_f32() * factor).to_le_bytes();
        }),
        DType::F16 => bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|b| {
            *b = f16::from_f32(f16::from_le_bytes(*b).to_f32() * factor).to_le_bytes();
        }),
        _ => bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|b| {
            *b = (f32::from_le_bytes(*b) * factor).to_le_bytes();
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_go_there_and_back() {
        for text in ["placeholder-latents=zero", "placeholder-latents=noise", "early-text-layers=3"] {
            assert_eq!(text.parse::<Experiment>().unwrap().to_string(), text);
        }
        assert_eq!("cross-attn-scale=10".parse::<Experiment>().unwrap().to_string(), "cross-attn-scale=10@40");
        assert_eq!("cross-attn-scale=0.5@2".parse::<Experiment>().unwrap().to_string(), "cross-attn-scale=0.5@2");
        for bad in ["", "early-text-layers=0", "cross-attn-scale", "cross-attn-scale=x", "placeholder-latents=one"] {
            assert!(bad.parse::<Experiment>().is_err(), "{bad}");
        }
    }

    #[test]
    fn weights_are_changed_where_an_experiment_says() {
        let early = Experiments { list: vec![Experiment::EarlyTextLayers(1)], states: 3 };
        let key = "text_embedding_projection.video_aggregate_embed.weight";
        let values: Vec<u8> = (1..=12).flat_map(|v| (v as f32).to_le_bytes()).collect();
        let edited = early.edited(key, &TensorType::f32([2, 6]), &values).unwrap().unwrap();
        let found: Vec<f32> = edited.bytes().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(found, [1.0, 0.0, 0.0, 4.0, 0.0, 0.0, 7.0, 0.0, 0.0, 10.0, 0.0, 0.0]);
        let list = vec![Experiment::CrossAttentionScale { factor: 2.0, from: 1 }];
        let late = Experiments { list, states: 0 };
        let key = |block: u32, rest: &str| format!("model.diffusion_model.transformer_blocks.{block}.{rest}");
        assert!(late.changes(&key(1, "audio_attn2.to_out.0.bias")) && late.changes(&key(12, "attn2.to_out.0.weight")));
        assert!(!late.changes(&key(0, "attn2.to_out.0.bias")) && !late.changes(&key(1, "attn1.to_out.0.bias")));
        let one = bf16::ONE.to_le_bytes();
        let edited = late.edited(&key(1, "attn2.to_out.0.bias"), &TensorType::new(DType::BF16, [1]), &one).unwrap();
        assert_eq!(edited.unwrap().bytes(), bf16::from_f32(2.0).to_le_bytes());
    }
}
