//! The joint audio-video transformer: config, shape class and graph.
//!
//! [`build`] writes a module with one entry function, [`ENTRY`], that predicts velocities. It takes per-token timesteps as
//! a short table of distinct values and a row number per token, so that modulation is computed once per value. All blocks
//! of one kind are calls of one function; a kind is what a block skips and the dtypes its weights are stored in.
//!
//! Not here: the text encoder and its connectors, guidance, samplers, and the conversion from velocity to denoised latent
//! (`latent − velocity · timestep`, per token).
//!
//! Parameters of the entry, in this order, for video and then for audio, prefixed `video.` and `audio.`:
//!
//! | name | type | content |
//! |---|---|---|
//! | `latent` | `f32[1, t, c]` | tokens |
//! | `timesteps` | `f32[r]` | distinct values of mask · sigma, `[0, 1]` |
//! | `rows` | `i32[t]` | row of `timesteps` for every token; only if r > 1 |
//! | `sigma` | `f32[1]` | noise level of the stream, 0 if frozen |
//! | `positions` | `f32[axes, t, 2]` | start and end: seconds, then pixels |
//! | `context` | `f32[1, s, c]` | text |
//! | `self_mask` | `f32[t, t]` | strengths of self attention, `[0, 1]`; only if asked for |
//! | `context_mask` | `f32[s]` | 1 for visible text tokens, else 0; only if asked for |
//! | `keyframes_mask` | `f32[t]` | above 0 for keyframe tokens; only if asked for |
//!
//! Results: `video.velocity` and `audio.velocity`, `f32[1, t, c]`.
//!
//! # Easy to get wrong
//! - Heads see different bands of rotary frequencies ([`rope`]).
//! - Tables between the streams have scale before shift (`block`).
//! - Gates between the streams follow the other stream's sigma (`step`).
//! - A skipped self attention passes values on, it is not zero (`attention`).
//!
//! Source: spec/transformer; ltx_core/model/transformer of Lightricks/LTX-2, release 1.2.0.

mod adaln;
mod attention;
mod block;
mod config;
pub mod rope;
mod spec;
mod step;

use std::collections::BTreeMap;

pub use config::{Stream, StreamConfig, TransformerConfig};
use ltxc_ir::ops::Op;
use ltxc_ir::{BuildError, Builder, DType, Function, Module, ValueId};
pub use spec::{BlockSet, Perturbation, StreamSpec, TransformerSpec};
use step::Step;

use crate::{Listed, ModelError, Weights};

/// Name of the entry function.
pub const ENTRY: &str = "step";

/// Where the transformer's keys stand in published files.
pub const KEY_PREFIX: &str = "model.diffusion_model.";

/// Writes the module of one program. `weights` is the view of a whole checkpoint, `dtype` that of the activations.
///
/// # Errors
/// - [`ModelError::Config`]: a program that this model cannot have, or activations that are not f32, bf16 or f16.
/// - [`ModelError::Weights`]: weights that are missing or have another shape or dtype, all of them.
pub fn build(
    config: &TransformerConfig,
    weights: &Weights<'_>,
    spec: &TransformerSpec,
    dtype: DType,
) -> Result<Module, ModelError> {
    spec.check(config)?;
    if ![DType::F32, DType::BF16, DType::F16].contains(&dtype) {
        refuse("transformer program", vec![format!("activations cannot be {dtype}, only f32, bf16 or f16")])?;
    }
    let weights = weights.below(KEY_PREFIX);
    let skips: Vec<Skips> = (0..config.layers).map(|i| Skips::of_block(spec, i)).collect();

    let b = Builder::new(ENTRY);
    let mut step = Step::prepare(&b, config, &weights, spec, dtype, &skips);
    let mut functions = Vec::new();
    let mut function_of_block = vec![None; config.layers];
    if skips.iter().any(|s| *s != Skips::EVERYTHING) {
        for (s, blocks) in group_by(0..config.layers, |&i| skips[i]) {
            let inputs = step.block_inputs(s);
            let make = |name: &str, blocks: &[usize], w: &Weights<'_>| {
                let prefixes: Vec<String> = blocks.iter().map(|&i| block_prefix(i)).collect();
                block::block(name, config, &w.repeated(&prefixes), &b, &inputs, dtype)
            };
            for (n, blocks) in group_by_storage(&weights, &blocks, &make)?.into_iter().enumerate() {
                let name = if n == 0 { s.function_name() } else { format!("{}_{n}", s.function_name()) };
                blocks.iter().for_each(|&i| function_of_block[i] = Some(functions.len()));
                functions.push(make(&name, &blocks, &weights)?);
            }
        }
    }
    for (i, function) in function_of_block.iter().enumerate() {
        let Some(function) = function.map(|f: usize| &functions[f]) else { continue };
        let arguments = step.block_inputs(skips[i]).arguments();
        let prefix = weights.call_prefix(&block_prefix(i));
        let results = b.call(function, &format!("blocks.{i}"), &prefix, &arguments);
        for (result, x) in function.results.iter().zip(results) {
            let stream = Stream::BOTH.into_iter().find(|s| s.name() == result.name);
            stream.into_iter().for_each(|s| step.update(s, x));
        }
    }
    step.finish();
    weights.finish()?;
    functions.push(b.finish()?);
    Ok(Module { functions, entries: vec![ENTRY.into()] })
}

fn block_prefix(i: usize) -> String {
    format!("transformer_blocks.{i}.")
}

/// What one block does not compute, once everything about the program is taken into account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Skips {
    /// Per stream: whether its own layers are skipped.
    own: [bool; 2],
    /// Per stream: whether self attention is.
    self_attention: [bool; 2],
    /// Per stream: whether attention to the other stream is.
    incoming: [bool; 2],
}

impl Skips {
    /// Nothing is left to compute.
    const EVERYTHING: Skips = Skips { own: [true; 2], self_attention: [true; 2], incoming: [true; 2] };

    fn of_block(spec: &TransformerSpec, i: usize) -> Skips {
        let p = &spec.perturbation;
        let own = Stream::BOTH.map(|s| !spec.stream(s).is_some_and(|s| s.is_enabled));
        let is_alone = spec.video.is_none() || spec.audio.is_none();
        Skips {
            own,
            self_attention: [own[0] || p.skip_video_self.contains(i), own[1] || p.skip_audio_self.contains(i)],
            incoming: [
                own[0] || is_alone || p.skip_audio_to_video.contains(i),
                own[1] || is_alone || p.skip_video_to_audio.contains(i),
            ],
        }
    }

    /// Whether tokens of `stream` attend to each other.
    fn attends(&self, stream: Stream) -> bool {
        !self.self_attention[stream as usize]
    }

    /// Whether `stream` attends to the other one.
    fn receives(&self, stream: Stream) -> bool {
        !self.incoming[stream as usize]
    }

    /// Whether there is attention between the streams in any direction.
    fn has_cross(&self) -> bool {
        Stream::BOTH.iter().any(|&s| self.receives(s))
    }

    fn function_name(&self) -> String {
        let mut name = String::from("block");
        for stream in Stream::BOTH.into_iter().filter(|&s| !self.own[s as usize]) {
            if !self.attends(stream) {
                name += &format!("_without_{}_self", stream.name());
            }
            if !self.receives(stream) {
                name += &format!("_without_{}_to_{}", stream.other().name(), stream.name());
            }
        }
        name
    }
}

/// Splits blocks of one kind by the dtypes their weights are stored in: a function declares its weights' types.
///
/// `make` builds the function of some blocks; it tells which weights there are.
fn group_by_storage(
    weights: &Weights<'_>,
    blocks: &[usize],
    make: &impl Fn(&str, &[usize], &Weights<'_>) -> Result<Function, BuildError>,
) -> Result<Vec<Vec<usize>>, ModelError> {
    let Some(&first) = blocks.first() else { return Ok(Vec::new()) };
    let sketch = make("sketch", &[first], &weights.unreported())?;
    let keys: Vec<&str> = sketch
        .nodes
        .iter()
        .filter_map(|node| if let Op::Weight(weight) = &node.op { Some(weight.key.as_str()) } else { None })
        .collect();
    let storage = |i: &usize| -> Vec<Option<DType>> {
        let block = weights.below(&block_prefix(*i));
        keys.iter().map(|key| block.stored_type(key).map(|ty| ty.dtype)).collect()
    };
    Ok(group_by(blocks.iter().copied(), storage).into_iter().map(|(_, blocks)| blocks).collect())
}

/// Groups of numbers with the same key, in the order in which the keys first appear.
fn group_by<K: Ord + Clone>(items: impl IntoIterator<Item = usize>, key: impl Fn(&usize) -> K) -> Vec<(K, Vec<usize>)> {
    let mut index = BTreeMap::new();
    let mut groups: Vec<(K, Vec<usize>)> = Vec::new();
    for item in items {
        let k = key(&item);
        let at = *index.entry(k.clone()).or_insert_with(|| {
            groups.push((k, Vec::new()));
            groups.len() - 1
        });
        groups[at].1.push(item);
    }
    groups
}

/// `x wᵀ + bias` of the linear layer `key`. `x`: `[.., inputs]`, result `[.., outputs]` in the dtype of `x`.
fn linear(
    b: &Builder,
    weights: &Weights<'_>,
    key: &str,
    x: ValueId,
    inputs: usize,
    outputs: usize,
    has_bias: bool,
) -> ValueId {
    let y = b.matmul_transposed(x, weights.get(b, &format!("{key}.weight"), &[outputs, inputs]));
    if !has_bias {
        return y;
    }
    b.add(y, weights.get(b, &format!("{key}.bias"), &[outputs]))
}

/// An error that lists `problems`, if there are any.
fn refuse(path: &str, problems: Vec<String>) -> Result<(), ModelError> {
    if problems.is_empty() {
        return Ok(());
    }
    let problem = format!("{} problem(s):{}", problems.len(), Listed(problems));
    Err(ModelError::Config { path: path.into(), problem })
}
