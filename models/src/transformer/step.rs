//! The entry function: parameters, what is prepared once per evaluation, the chain of blocks, the output layer.
//!
//! # Easy to get wrong
//! - Scale and shift between the streams follow the stream's own per-token timesteps, the gate follows the **other**
//!   stream's scalar sigma (which is 0 if that stream is frozen). In release 1.0.0 both follow that sigma.
//! - Keyframe marks are `mask > 0`, whatever the value.
//! - The output layer has a LayerNorm, blocks have RMS norms.
//! - A strength of 0 hides a token; other strengths are added to the scores as logarithms.
//!
//! Source: spec/transformer §3, §4, §7.3.

use ltxc_ir::ops::{Compare, HIDDEN_SCORE, Unary};
use ltxc_ir::plan::Release;
use ltxc_ir::{Builder, DType, Rate, TensorType, ValueId};

use super::adaln::{Modulation, TimestepEmbedding, by_row, timestep_embedding};
use super::block::{BlockInputs, CrossInputs, OwnInputs, StreamInputs};
use super::config::{Stream, TransformerConfig};
use super::rope::{RopeTable, Rotation, rotation};
use super::spec::{Pass, StreamSpec, TransformerSpec};
use super::{Skips, linear};
use crate::Weights;

/// Parameters of one stream, in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamParams {
    latent: ValueId,
    timesteps: ValueId,
    rows: Option<ValueId>,
    sigma: ValueId,
    positions: ValueId,
    context: ValueId,
    negative_context: Option<ValueId>,
    self_mask: Option<ValueId>,
    context_mask: Option<ValueId>,
    keyframes_mask: Option<ValueId>,
}

/// A stream between preparation and output.
#[derive(Clone, Copy, Debug)]
struct Prepared {
    inputs: StreamInputs,
    /// Timestep embedding, `[r, width]`, for the output layer.
    embedded: ValueId,
}

/// Writes the entry function.
pub(super) struct Step<'a> {
    b: &'a Builder,
    config: &'a TransformerConfig,
    weights: &'a Weights<'a>,
    dtype: DType,
    video: Option<Prepared>,
    audio: Option<Prepared>,
}

impl<'a> Step<'a> {
    /// Starts a function whose activations are `dtype`.
    pub fn new(b: &'a Builder, config: &'a TransformerConfig, weights: &'a Weights<'a>, dtype: DType) -> Step<'a> {
        Step { b, config, weights, dtype, video: None, audio: None }
    }

    /// Declares the parameters of both streams.
    pub fn params(&self, spec: &TransformerSpec, has_negative: bool) -> [Option<StreamParams>; 2] {
        Stream::BOTH.map(|stream| spec.stream(stream).map(|s| self.stream_params(stream, s, has_negative)))
    }

    /// Prepares both streams for blocks that skip what `skips` lists.
    pub fn prepare(
        mut self,
        spec: &TransformerSpec,
        params: &[Option<StreamParams>; 2],
        pass: &Pass,
        skips: &[Skips],
    ) -> Step<'a> {
        let (b, step) = (self.b, &mut self);
        for (stream, own) in Stream::BOTH.into_iter().zip(params) {
            let sender = params[stream.other() as usize];
            let (Some(mut own), Some(s)) = (*own, spec.stream(stream)) else { continue };
            if let (true, Some(negative)) = (pass.is_negative, own.negative_context) {
                own.context = negative;
            }
            let own = &own;
            let prepared = b.scope("prep", || {
                b.scope(stream.name(), || step.prepare_stream(stream, s, own, sender, pass.release, skips))
            });
            *step.stream_mut(stream) = Some(prepared);
        }
        self
    }

    /// What a block that skips `skips` is given.
    pub fn block_inputs(&self, skips: Skips) -> BlockInputs {
        let has_cross = skips.has_cross();
        let inputs = |stream: Stream| {
            let full = self.stream(stream)?.inputs;
            let own = full.own.map(|own| {
                let attends = skips.attends(stream);
                let (rotation, self_bias) = if attends { (own.rotation, own.self_bias) } else { (None, None) };
                OwnInputs { rotation, self_bias, ..own }
            });
            let cross = full.cross.filter(|_| has_cross).map(|cross| {
                let gate = cross.gate.filter(|_| skips.receives(stream));
                CrossInputs { gate, ..cross }
            });
            // A stream that is neither updated nor looked at is left out.
            (own.is_some() || cross.is_some()).then_some(StreamInputs { own, cross, ..full })
        };
        BlockInputs { video: inputs(Stream::Video), audio: inputs(Stream::Audio) }
    }

    /// The residual stream after a block.
    pub fn update(&mut self, stream: Stream, x: ValueId) {
        if let Some(prepared) = self.stream_mut(stream) {
            prepared.inputs.x = x;
        }
    }

    /// Writes the output layers and declares the results, with the name of the pass in front.
    pub fn finish(&self, pass: &str) {
        let prefix = if pass.is_empty() { String::new() } else { format!("{pass}.") };
        for stream in Stream::BOTH {
            if let Some(prepared) = self.stream(stream) {
                let velocity = self.output(stream, prepared);
                self.b.result(&format!("{prefix}{}.velocity", stream.name()), velocity);
            }
        }
    }

    fn stream(&self, stream: Stream) -> Option<&Prepared> {
        match stream {
            Stream::Video => self.video.as_ref(),
            Stream::Audio => self.audio.as_ref(),
        }
    }

    fn stream_mut(&mut self, stream: Stream) -> &mut Option<Prepared> {
        match stream {
            Stream::Video => &mut self.video,
            Stream::Audio => &mut self.audio,
        }
    }

    fn stream_params(&self, stream: Stream, spec: &StreamSpec, has_negative: bool) -> StreamParams {
        let sizes = self.config.stream(stream);
        let (n, s) = (spec.tokens, spec.context_tokens);
        let param = |name: &str, ty, rate| self.b.param(&format!("{}.{name}", stream.name()), ty, rate);
        let f32s = |shape: &[usize]| TensorType::f32(shape);
        let context = f32s(&[1, s, self.config.context_channels(stream)]);
        StreamParams {
            latent: param("latent", f32s(&[1, n, sizes.in_channels]), Rate::Step),
            timesteps: param("timesteps", f32s(&[spec.timestep_rows]), Rate::Evaluation),
            rows: (spec.timestep_rows > 1).then(|| param("rows", TensorType::i32([n]), Rate::Generation)),
            sigma: param("sigma", f32s(&[1]), Rate::Evaluation),
            positions: param("positions", f32s(&[sizes.max_positions.len(), n, 2]), Rate::Generation),
            context: param("context", context.clone(), Rate::Generation),
            negative_context: has_negative.then(|| param("negative_context", context, Rate::Generation)),
            self_mask: spec.has_self_mask.then(|| param("self_mask", f32s(&[n, n]), Rate::Generation)),
            context_mask: spec.has_context_mask.then(|| param("context_mask", f32s(&[s]), Rate::Generation)),
            keyframes_mask: spec.has_keyframes_mask.then(|| param("keyframes_mask", f32s(&[n]), Rate::Generation)),
        }
    }

    fn prepare_stream(
        &self,
        stream: Stream,
        spec: &StreamSpec,
        own: &StreamParams,
        sender: Option<StreamParams>,
        release: Release,
        skips: &[Skips],
    ) -> Prepared {
        let (b, c, sizes) = (self.b, self.config, self.config.stream(stream));
        let scaled = b.mul_scalar(own.timesteps, c.timestep_scale);
        let embedding = self.embed(&stream.key("adaln_single"), scaled, sizes.width, c.modulation_rows());
        let embedded = b.name("embedded_timestep", embedding.embedded);
        let own_inputs = spec.is_enabled.then(|| OwnInputs {
            modulation: by_row(b, b.name("timesteps", embedding.modulation), sizes.width),
            prompt_modulation: c.has_prompt_adaln.then(|| {
                let scaled = b.mul_scalar(own.sigma, c.timestep_scale);
                let key = stream.key("prompt_adaln_single");
                let modulation = self.embed(&key, scaled, sizes.width, 2).modulation;
                by_row(b, b.name("prompt_timestep", modulation), sizes.width)
            }),
            context: self.context(stream, own.context),
            context_bias: own.context_mask.map(|mask| self.context_bias(mask)),
            rotation: skips.iter().any(|s| s.attends(stream)).then(|| self.self_rotation(stream, own.positions)),
            self_bias: own.self_mask.map(|mask| self.self_bias(mask)),
        });
        let cross = sender.filter(|_| skips.iter().any(Skips::has_cross)).map(|sender| CrossInputs {
            modulation: {
                let key = format!("av_ca_{}_scale_shift_adaln_single", stream.name());
                let timesteps = match release {
                    Release::V1_0_0 => b.mul_scalar(sender.sigma, c.timestep_scale),
                    Release::V1_2_0 => scaled,
                };
                let modulation = self.embed(&key, timesteps, sizes.width, 4).modulation;
                by_row(b, b.name("cross_scale_shift_timestep", modulation), sizes.width)
            },
            is_even: release == Release::V1_0_0,
            rotation: self.cross_rotation(own.positions),
            gate: skips.iter().any(|s| s.receives(stream)).then(|| {
                let key = match stream {
                    Stream::Video => "av_ca_a2v_gate_adaln_single",
                    Stream::Audio => "av_ca_v2a_gate_adaln_single",
                };
                let scaled = b.mul_scalar(sender.sigma, c.timestep_scale);
                let scaled = b.mul_scalar(scaled, c.gate_timestep_scale / c.timestep_scale);
                let modulation = self.embed(key, scaled, sizes.width, 1).modulation;
                by_row(b, b.name("cross_gate_timestep", modulation), sizes.width)
            }),
        });
        let inputs =
            StreamInputs { x: self.token_embedding(stream, own), token_rows: own.rows, own: own_inputs, cross };
        Prepared { inputs, embedded }
    }

    fn embed(&self, module: &str, argument: ValueId, width: usize, rows: usize) -> TimestepEmbedding {
        timestep_embedding(self.b, &self.weights.below(&format!("{module}.")), argument, width, rows, self.dtype)
    }

    /// `patchify_proj(latent)`, plus the keyframes embedding for marked tokens.
    fn token_embedding(&self, stream: Stream, own: &StreamParams) -> ValueId {
        let (b, sizes) = (self.b, self.config.stream(stream));
        let latent = b.cast(own.latent, self.dtype);
        let key = stream.key("patchify_proj");
        let mut x = linear(b, self.weights, &key, latent, sizes.in_channels, sizes.width, true);
        if let Some(mask) = own.keyframes_mask {
            let embedding = self.weights.get(b, "keyframes_abs_pos_embedding", &[1, sizes.width]);
            let marked = b.cast(b.compare(Compare::Less, b.scalar(0.0), mask), self.dtype);
            let tokens = b.shape(mask).first().copied().unwrap_or(0);
            x = b.add(x, b.mul(b.reshape(marked, &[tokens, 1]), embedding));
        }
        b.name("x", x)
    }

    /// The text context as blocks see it: `linear_2(gelu(linear_1(context)))` where the transformer projects captions.
    fn context(&self, stream: Stream, context: ValueId) -> ValueId {
        let (b, width) = (self.b, self.config.stream(stream).width);
        let context = b.cast(context, self.dtype);
        let Some(channels) = self.config.caption_channels else { return context };
        let w = self.weights.below(&format!("{}.", stream.key("caption_projection")));
        let hidden = b.gelu(linear(b, &w, "linear_1", context, channels, width, true));
        b.name("context", linear(b, &w, "linear_2", hidden, width, width, true))
    }

    /// `0` for visible text tokens, [`HIDDEN_SCORE`] for hidden ones.
    fn context_bias(&self, mask: ValueId) -> ValueId {
        let b = self.b;
        let tokens = b.shape(mask).first().copied().unwrap_or(0);
        let bias = b.mul_scalar(b.add_scalar(mask, -1.0), -HIDDEN_SCORE);
        b.name("context_bias", b.reshape(bias, &[1, 1, 1, tokens]))
    }

    /// `ln(strength)`; [`HIDDEN_SCORE`] for a strength of 0.
    fn self_bias(&self, strengths: ValueId) -> ValueId {
        let b = self.b;
        let n = b.shape(strengths).first().copied().unwrap_or(0);
        let log = b.unary(Unary::Log, b.max(strengths, b.scalar(f32::MIN_POSITIVE as f64)));
        let visible = b.compare(Compare::Less, b.scalar(0.0), strengths);
        let bias = b.select(visible, log, b.scalar(HIDDEN_SCORE));
        b.name("self_bias", b.reshape(bias, &[1, 1, n, n]))
    }

    fn self_rotation(&self, stream: Stream, positions: ValueId) -> Rotation {
        let sizes = self.config.stream(stream);
        self.rotation("rope", sizes.width, &sizes.max_positions, positions)
    }

    /// By time only, which is the first axis of both streams, in seconds.
    fn cross_rotation(&self, positions: ValueId) -> Rotation {
        let time = self.b.slice_axis(positions, 0, 0, 1);
        self.rotation("cross_rope", self.config.audio.width, &[self.config.cross_max_seconds()], time)
    }

    fn rotation(&self, name: &str, width: usize, max_positions: &[f64], positions: ValueId) -> Rotation {
        let c = self.config;
        let table = RopeTable {
            heads: c.heads,
            width,
            theta: c.rope_theta,
            max_positions,
            has_f64_frequencies: c.has_f64_frequencies,
        };
        let Rotation { cos, sin } = rotation(self.b, &table, positions, self.dtype);
        Rotation { cos: self.b.name(&format!("{name}_cos"), cos), sin: self.b.name(&format!("{name}_sin"), sin) }
    }

    /// `proj_out(LayerNorm(x)·(1 + t1 + e) + t0 + e)` with the timestep embedding `e`; f32.
    fn output(&self, stream: Stream, prepared: &Prepared) -> ValueId {
        let (b, sizes) = (self.b, self.config.stream(stream));
        let modulation = Modulation {
            b,
            table: self.weights.get(b, &stream.key("scale_shift_table"), &[2, sizes.width]),
            timesteps: Some(by_row(b, prepared.embedded, sizes.width)),
            token_rows: prepared.inputs.token_rows,
            dtype: self.dtype,
        };
        let x = modulation.apply(b.layer_norm(prepared.inputs.x, self.config.norm_eps), 0, 1);
        let key = stream.key("proj_out");
        let velocity = linear(b, self.weights, &key, x, sizes.width, sizes.out_channels, true);
        b.cast(b.name(&key, velocity), DType::F32)
    }
}
