//! The joint audio-video transformer: config, shape class and graph.
//!
//! [`build`] writes a module with one entry function, [`ENTRY`], that predicts velocities. It takes per-token timesteps as
//! a short table of distinct values and a row number per token, so that modulation is computed once per value. Blocks that
//! skip the same and whose weights are stored alike are calls of one function.
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
//! | `negative_context` | `f32[1, s, c]` | text of passes with the negative prompt; only if there are any |
//! | `self_mask` | `f32[t, t]` | strengths of self attention, `[0, 1]`; only if asked for |
//! | `context_mask` | `f32[s]` | 1 for visible text tokens, else 0; only if asked for |
//! | `keyframes_mask` | `f32[t]` | above 0 for keyframe tokens; only if asked for |
//!
//! Results: `video.velocity` and `audio.velocity`, `f32[1, t, c]`, of every pass; those of a pass with a name have it in
//! front. Passes of one program share what is equal: a perturbed pass, for example, begins at the first block it changes.
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

pub(crate) use config::ROPE_LAYOUTS;
pub use config::{Stream, StreamConfig, TransformerConfig};
use ltxc_ir::plan::{SLOT_DOWN, SLOT_UP};
use ltxc_ir::{Builder, DType, Module, Rate, TensorType, ValueId};
pub use spec::{BlockSet, Pass, Perturbation, StreamSpec, TransformerSpec};
use step::Step;

use crate::weights::check_compute_dtype;
use crate::{Block, Functions, ModelError, Weights};

/// Name of the entry function.
pub const ENTRY: &str = "step";

/// Where the transformer's keys stand in published files.
pub const KEY_PREFIX: &str = "model.diffusion_model.";

/// Writes the module of a program that evaluates the model once. `weights` is the view of a whole checkpoint, `dtype`
/// that of the activations.
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
    build_passes(config, weights, spec, &[Pass { perturbation: spec.perturbation.clone(), ..Pass::default() }], dtype)
}

/// Writes the module of a program that evaluates the model once for each of `passes`, which say what each leaves out.
///
/// # Errors
/// Those of [`build()`].
pub fn build_passes(
    config: &TransformerConfig,
    weights: &Weights<'_>,
    spec: &TransformerSpec,
    passes: &[Pass],
    dtype: DType,
) -> Result<Module, ModelError> {
    let specs: Vec<TransformerSpec> = passes.iter().map(|pass| pass.spec(spec)).collect();
    specs.iter().try_for_each(|spec| spec.check(config))?;
    check_compute_dtype(dtype)?;
    let weights = weights.below(KEY_PREFIX);
    let b = Builder::new(ENTRY);
    let functions = Functions::default();
    let has_negative = passes.iter().any(|p| p.is_negative);
    let params = Step::new(&b, config, &weights, dtype).params(spec, has_negative);
    for (pass, spec) in passes.iter().zip(&specs) {
        let skips: Vec<Skips> = (0..config.layers).map(|i| Skips::of_block(spec, i)).collect();
        let write = || {
            let step = Step::new(&b, config, &weights, dtype);
            let mut step = step.prepare(spec, &params, pass, &skips);
            for (i, skips) in skips.iter().enumerate().filter(|(_, skips)| **skips != Skips::EVERYTHING) {
                let inputs = step.block_inputs(*skips);
                let (function, name) = (skips.function_name(), format!("blocks.{i}"));
                let block = Block { function: &function, name: &name, prefix: format!("transformer_blocks.{i}.") };
                let results = functions.call(&b, &weights, block, &inputs.arguments(), |b, weights, params| {
                    block::block(b, config, weights, &inputs.with(params), dtype)
                });
                for (stream, x) in inputs.updated().zip(results) {
                    step.update(stream, x);
                }
            }
            step.finish(&pass.name);
        };
        match pass.name.as_str() {
            "" => write(),
            name => b.scope(name, write),
        }
    }
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// Writes the module of a program that evaluates block `index` alone, in f32 or with activations of `dtype`.
///
/// Its parameters are those of [`build()`], then `video.x` and `audio.x`, `f32[1, t, width]`: the residual streams in front
/// of the block. Results: `video` and `audio`, f32, of the streams that are updated.
///
/// # Errors
/// Those of [`build()`], and a block that the model does not have.
pub fn build_block(
    config: &TransformerConfig,
    weights: &Weights<'_>,
    spec: &TransformerSpec,
    index: usize,
    dtype: DType,
) -> Result<Module, ModelError> {
    spec.check(config)?;
    check_compute_dtype(dtype)?;
    if index >= config.layers {
        let problem = format!("is {}, there is no block {index}", config.layers);
        return Err(ModelError::config("transformer.num_layers", problem));
    }
    let weights = weights.below(KEY_PREFIX);
    let b = Builder::new(ENTRY);
    let functions = Functions::default();
    let skips = Skips::of_block(spec, index);
    let step = Step::new(&b, config, &weights, dtype);
    let params = step.params(spec, false);
    let before = Stream::BOTH.map(|stream| {
        let ty = TensorType::f32([1, spec.stream(stream)?.tokens, config.stream(stream).width]);
        Some(b.param(&format!("{}.x", stream.name()), ty, Rate::Step))
    });
    let mut step = step.prepare(spec, &params, &Pass::default(), &[skips]);
    for (stream, x) in Stream::BOTH.into_iter().zip(before) {
        if let Some(x) = x {
            step.update(stream, b.cast(x, dtype));
        }
    }
    let inputs = step.block_inputs(skips);
    let (function, name) = (skips.function_name(), format!("blocks.{index}"));
    let block = Block { function: &function, name: &name, prefix: format!("transformer_blocks.{index}.") };
    let results = functions.call(&b, &weights, block, &inputs.arguments(), |b, weights, params| {
        block::block(b, config, weights, &inputs.with(params), dtype)
    });
    for (stream, x) in inputs.updated().zip(results) {
        b.result(stream.name(), b.cast(x, DType::F32));
    }
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// What one block does not compute, once everything about the program is taken into account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// `x wᵀ + bias` of the linear layer `key`, and `x downᵀ upᵀ` with the slots for adapters if there are any. `x`:
/// `[.., inputs]`, result `[.., outputs]` in the dtype of `x`.
fn linear(
    b: &Builder,
    weights: &Weights<'_>,
    key: &str,
    x: ValueId,
    inputs: usize,
    outputs: usize,
    has_bias: bool,
) -> ValueId {
    let mut y = b.matmul_transposed(x, weights.get(b, &format!("{key}.weight"), &[outputs, inputs]));
    if has_bias {
        y = b.add(y, weights.get(b, &format!("{key}.bias"), &[outputs]));
    }
    let (rank, dtype) = (weights.adapter_rank(), b.ty(x).dtype);
    if rank == 0 {
        return y;
    }
    let slot = |end: &str, shape| weights.adapter_slot(b, &format!("{key}{end}"), TensorType::new(dtype, shape));
    let low = b.matmul_transposed(x, slot(SLOT_DOWN, [rank, inputs]));
    b.add(y, b.matmul_transposed(low, slot(SLOT_UP, [outputs, rank])))
}
