//! One block: self attention and text attention of each stream, attention between the streams, feed-forward.
//!
//! A block is a function. What it computes follows from the values it is given ([`StreamInputs`]): without a rotation
//! there is no self attention to compute, without a gate nothing comes in from the other stream. A block that skips
//! something is therefore a function of its own, with fewer parameters.
//!
//! # Easy to get wrong
//! - Rows of the main table: 0 shift, 1 scale, 2 gate of self attention; 3, 4, 5 the same for feed-forward, although it
//!   runs last; 6, 7, 8 for text attention.
//! - The tables of attention between the streams have the **scale first**: 0 scale, 1 shift for audio to video, 2 scale,
//!   3 shift for video to audio, 4 gate. Both tables are named `a2v` in checkpoints.
//! - Attention between the streams has the audio stream's heads in both directions.
//! - Both directions see the streams as they were before either of them ran.
//! - The text context is modulated but not normed.
//!
//! Source: spec/transformer §7.

use ltxc_ir::{Builder, DType, ValueId};

use super::adaln::Modulation;
use super::attention::{AttentionConfig, Mixing, attention};
use super::config::{Stream, TransformerConfig};
use super::linear;
use super::rope::Rotation;
use crate::Weights;

/// Inner width of the feed-forward layers, as a multiple of the stream's.
const FF_EXPANSION: usize = 4;

/// Row of the gate in the tables of attention between the streams.
const CROSS_GATE_ROW: usize = 4;

/// Rows `(scale, shift)` of those tables for what flows into `receiver`.
fn cross_rows(receiver: Stream) -> (usize, usize) {
    match receiver {
        Stream::Video => (0, 1),
        Stream::Audio => (2, 3),
    }
}

/// Name of the attention through which `receiver` looks at the other stream.
fn cross_attention_key(receiver: Stream) -> &'static str {
    match receiver {
        Stream::Video => "audio_to_video_attn",
        Stream::Audio => "video_to_audio_attn",
    }
}

/// What one stream brings into a block: values of the caller, or the parameters of the block.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamInputs {
    /// Residual stream, `[1, t, width]`.
    pub x: ValueId,
    /// Row of the timestep tables for every token, `i32[t]`.
    pub token_rows: Option<ValueId>,
    /// What the stream's own layers need; `None` if it is not updated.
    pub own: Option<OwnInputs>,
    /// What attention between the streams needs; `None` if there is none.
    pub cross: Option<CrossInputs>,
}

/// Inputs of a stream's own layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnInputs {
    /// Timesteps' part of the main table, `[rows, r, width]`.
    pub modulation: ValueId,
    /// Sigma's part of the text context's table, `[2, 1, width]`.
    pub prompt_modulation: Option<ValueId>,
    /// Text, `[1, s, context_width]`.
    pub context: ValueId,
    /// Bias that hides text tokens, `[1, 1, 1, s]`.
    pub context_bias: Option<ValueId>,
    /// Rotation of self attention; `None` if it is skipped.
    pub rotation: Option<Rotation>,
    /// Bias of self attention, `[1, 1, t, t]`.
    pub self_bias: Option<ValueId>,
}

/// Inputs of attention between the streams.
#[derive(Clone, Copy, Debug)]
pub(super) struct CrossInputs {
    /// Timesteps' part of rows 0 to 3 of the table, `[4, r, width]`.
    pub modulation: ValueId,
    /// Whether it has one row for all tokens, as in release 1.0.0 of the reference.
    pub is_even: bool,
    /// Rotation by time.
    pub rotation: Rotation,
    /// Part of the gate row from the other stream's sigma, `[1, 1, width]`; `None` if nothing comes in.
    pub gate: Option<ValueId>,
}

impl StreamInputs {
    /// The same structure with every value replaced by what `f` gives for its name and the value.
    fn map(&self, mut f: impl FnMut(&str, ValueId) -> ValueId) -> StreamInputs {
        let f = &mut f;
        StreamInputs {
            x: f("x", self.x),
            token_rows: self.token_rows.map(|v| f("rows", v)),
            own: self.own.map(|own| OwnInputs {
                modulation: f("modulation", own.modulation),
                prompt_modulation: own.prompt_modulation.map(|v| f("prompt_modulation", v)),
                context: f("context", own.context),
                context_bias: own.context_bias.map(|v| f("context_bias", v)),
                rotation: own.rotation.map(|r| Rotation { cos: f("rope_cos", r.cos), sin: f("rope_sin", r.sin) }),
                self_bias: own.self_bias.map(|v| f("self_bias", v)),
            }),
            cross: self.cross.map(|cross| CrossInputs {
                modulation: f("cross_modulation", cross.modulation),
                is_even: cross.is_even,
                rotation: Rotation {
                    cos: f("cross_rope_cos", cross.rotation.cos),
                    sin: f("cross_rope_sin", cross.rotation.sin),
                },
                gate: cross.gate.map(|v| f("cross_gate", v)),
            }),
        }
    }
}

/// Inputs of a block, per stream that it looks at.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockInputs {
    /// The video stream.
    pub video: Option<StreamInputs>,
    /// The audio stream.
    pub audio: Option<StreamInputs>,
}

impl BlockInputs {
    /// One of them.
    pub fn stream(&self, stream: Stream) -> Option<&StreamInputs> {
        match stream {
            Stream::Video => self.video.as_ref(),
            Stream::Audio => self.audio.as_ref(),
        }
    }

    fn stream_mut(&mut self, stream: Stream) -> Option<&mut StreamInputs> {
        match stream {
            Stream::Video => self.video.as_mut(),
            Stream::Audio => self.audio.as_mut(),
        }
    }

    /// The values with the names of the block's parameters, in their order.
    pub fn arguments(&self) -> Vec<(String, ValueId)> {
        let mut values = Vec::new();
        self.map(|name, value| {
            values.push((name, value));
            value
        });
        values
    }

    /// The same structure with other values, in the order of [`BlockInputs::arguments`].
    pub fn with(&self, values: &[ValueId]) -> BlockInputs {
        let mut values = values.iter().copied();
        self.map(|_, value| values.next().unwrap_or(value))
    }

    /// The streams that the block updates, in the order of its results.
    pub fn updated(&self) -> impl Iterator<Item = Stream> {
        Stream::BOTH.into_iter().filter(|&stream| self.stream(stream).is_some_and(|s| s.own.is_some()))
    }

    fn map(&self, mut f: impl FnMut(String, ValueId) -> ValueId) -> BlockInputs {
        let mut of = |stream: Stream| {
            let inputs = self.stream(stream)?;
            Some(inputs.map(|name, value| f(format!("{}.{name}", stream.name()), value)))
        };
        BlockInputs { video: of(Stream::Video), audio: of(Stream::Audio) }
    }
}

/// Writes one block. Returns the streams that are updated, `video` and `audio`.
///
/// Weights that do not fit are recorded in `weights`.
pub(super) fn block(
    b: &Builder,
    config: &TransformerConfig,
    weights: &Weights<'_>,
    inputs: &BlockInputs,
    dtype: DType,
) -> Vec<(&'static str, ValueId)> {
    let mut streams = *inputs;
    let block = Block { b, config, weights, dtype };
    let mut modulations = [None, None];
    for stream in Stream::BOTH {
        let Some(s) = streams.stream_mut(stream) else { continue };
        if let Some(own) = s.own {
            let modulation = block.main_modulation(stream, s, &own);
            s.x = block.self_attention(stream, s.x, &own, &modulation);
            s.x = block.text_attention(stream, s.x, &own, &modulation);
            modulations[stream as usize] = Some(modulation);
        }
    }
    if let (Some(video), Some(audio)) = (&mut streams.video, &mut streams.audio)
        && let (Some(v), Some(a)) = (video.cross, audio.cross)
    {
        let v = block.cross_side(Stream::Video, video, v);
        let a = block.cross_side(Stream::Audio, audio, a);
        video.x = block.cross_attention(Stream::Video, video.x, &v, &a);
        audio.x = block.cross_attention(Stream::Audio, audio.x, &a, &v);
    }
    let mut results = Vec::new();
    for stream in Stream::BOTH {
        if let (Some(s), Some(modulation)) = (streams.stream(stream), &modulations[stream as usize]) {
            let x = block.feed_forward(stream, s.x, modulation);
            results.push((stream.name(), b.name(stream.name(), x)));
        }
    }
    results
}

/// One side of the attention between the streams.
struct CrossSide<'a> {
    /// `N(x)`.
    normed: ValueId,
    scale_shift: Modulation<'a>,
    /// Gate for what comes in.
    gate: Option<Modulation<'a>>,
    rotation: Rotation,
}

/// What all parts of a block share.
struct Block<'a> {
    b: &'a Builder,
    config: &'a TransformerConfig,
    weights: &'a Weights<'a>,
    dtype: DType,
}

impl<'a> Block<'a> {
    fn norm(&self, x: ValueId) -> ValueId {
        self.b.rms_norm(x, None, self.config.norm_eps)
    }

    fn table(&self, key: &str, rows: usize, width: usize) -> ValueId {
        self.weights.get(self.b, key, &[rows, width])
    }

    fn main_modulation(&self, stream: Stream, s: &StreamInputs, own: &OwnInputs) -> Modulation<'a> {
        let width = self.config.stream(stream).width;
        Modulation {
            b: self.b,
            table: self.table(&stream.key("scale_shift_table"), self.config.modulation_rows(), width),
            timesteps: Some(own.modulation),
            token_rows: s.token_rows,
            dtype: self.dtype,
        }
    }

    fn attention_config(&self, query: Stream, context_width: usize, head_dim: usize) -> AttentionConfig {
        let c = self.config;
        AttentionConfig {
            query_width: c.stream(query).width,
            context_width,
            heads: c.heads,
            head_dim,
            is_gated: c.is_gated,
            norm_eps: c.norm_eps,
            rope_layout: c.rope_layout,
        }
    }

    /// `x + attn1(N(x)·(1 + s1) + s0) · s2`
    fn self_attention(&self, stream: Stream, x: ValueId, own: &OwnInputs, modulation: &Modulation<'_>) -> ValueId {
        let sizes = self.config.stream(stream);
        let config = self.attention_config(stream, sizes.width, sizes.head_dim);
        let h = modulation.apply(self.norm(x), 0, 1);
        let mixing = own.rotation.map(|r| Mixing { rotations: Some((r, r)), bias: own.self_bias });
        let y = attention(self.b, self.weights, &stream.key("attn1"), &config, h, h, mixing);
        self.b.add(x, self.b.mul(y, modulation.row(2)))
    }

    /// `x + attn2(N(x), context)`, or with text modulation `x + attn2(N(x)·(1 + s7) + s6, context·(1 + p1) + p0) · s8`.
    fn text_attention(&self, stream: Stream, x: ValueId, own: &OwnInputs, modulation: &Modulation<'_>) -> ValueId {
        let (b, sizes) = (self.b, self.config.stream(stream));
        let config = self.attention_config(stream, sizes.context_width, sizes.head_dim);
        let mixing = Some(Mixing { rotations: None, bias: own.context_bias });
        let attend = |q, kv| attention(b, self.weights, &stream.key("attn2"), &config, q, kv, mixing);
        if !self.config.has_text_adaln {
            return b.add(x, attend(self.norm(x), own.context));
        }
        let prompt = Modulation {
            table: self.table(&stream.key("prompt_scale_shift_table"), 2, sizes.width),
            timesteps: own.prompt_modulation,
            token_rows: None,
            ..*modulation
        };
        let y = attend(modulation.apply(self.norm(x), 6, 7), prompt.apply(own.context, 0, 1));
        b.add(x, b.mul(y, modulation.row(8)))
    }

    fn cross_side(&self, stream: Stream, s: &StreamInputs, cross: CrossInputs) -> CrossSide<'a> {
        let width = self.config.stream(stream).width;
        let table = self.table(&format!("scale_shift_table_a2v_ca_{}", stream.name()), CROSS_GATE_ROW + 1, width);
        let scale_shift = Modulation {
            b: self.b,
            table,
            timesteps: Some(cross.modulation),
            token_rows: s.token_rows.filter(|_| !cross.is_even),
            dtype: self.dtype,
        };
        let gate = cross.gate.map(|gate| Modulation { timesteps: Some(gate), token_rows: None, ..scale_shift });
        CrossSide { normed: self.norm(s.x), scale_shift, gate, rotation: cross.rotation }
    }

    /// `x + attn(to's query, from's context) · gate`; `x` itself if nothing comes in.
    fn cross_attention(&self, receiver: Stream, x: ValueId, to: &CrossSide<'_>, from: &CrossSide<'_>) -> ValueId {
        let Some(gate) = &to.gate else { return x };
        let (scale, shift) = cross_rows(receiver);
        let sender_width = self.config.stream(receiver.other()).width;
        let config = self.attention_config(receiver, sender_width, self.config.audio.head_dim);
        let q = to.scale_shift.apply(to.normed, shift, scale);
        let kv = from.scale_shift.apply(from.normed, shift, scale);
        let mixing = Some(Mixing { rotations: Some((to.rotation, from.rotation)), bias: None });
        let y = attention(self.b, self.weights, cross_attention_key(receiver), &config, q, kv, mixing);
        self.b.add(x, self.b.mul(y, gate.row(CROSS_GATE_ROW)))
    }

    /// `x + ff(N(x)·(1 + s4) + s3) · s5`
    fn feed_forward(&self, stream: Stream, x: ValueId, modulation: &Modulation<'_>) -> ValueId {
        let (b, sizes) = (self.b, self.config.stream(stream));
        let (width, inner, has_bias) = (sizes.width, FF_EXPANSION * sizes.width, sizes.has_ff_bias);
        let name = stream.key("ff");
        let w = self.weights.below(&format!("{name}.net."));
        let z = modulation.apply(self.norm(x), 3, 4);
        let y = b.scope(&name, || {
            let hidden = b.name("net.0.proj", linear(b, &w, "0.proj", z, width, inner, has_bias));
            b.name("", linear(b, &w, "2", b.gelu(hidden), inner, width, has_bias))
        });
        b.add(x, b.mul(y, modulation.row(5)))
    }
}
