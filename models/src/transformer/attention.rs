//! The attention module that every block has six of.
//!
//! # Easy to get wrong
//! - The norms of queries and keys run over all heads together, with a plain weight, before rotation.
//! - Gate logits come from the module's query input, already normed and modulated; the factor 2 is outside the sigmoid.
//! - Where self attention is skipped the values take the place of its result: gate and output projection still apply.
//!
//! Source: spec/transformer §6.

use ltxc_ir::ops::{Attention, RopeLayout};
use ltxc_ir::{Builder, Float, ValueId};

use super::linear;
use super::rope::Rotation;
use crate::Weights;

/// Sizes and switches of one attention module.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttentionConfig {
    /// Channels of the queries' input and of the result.
    pub query_width: usize,
    /// Channels of the keys' and values' input.
    pub context_width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Whether heads are gated.
    pub is_gated: bool,
    /// Added to the mean square in the norms of queries and keys.
    pub norm_eps: f64,
    /// Pairing of the rotated elements.
    pub rope_layout: RopeLayout,
}

/// How values are mixed between tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mixing {
    /// Rotations of queries and keys.
    pub rotations: Option<(Rotation, Rotation)>,
    /// Added to the scores, f32, broadcasts to `[1, n, t, s]`.
    pub bias: Option<ValueId>,
}

/// Evaluates the module `name` of a block. `x`: `[1, t, query_width]`; `context`: `[1, s, context_width]`.
///
/// Without `mixing` every token keeps its own value; `context` must then be as long as `x`.
pub(super) fn attention(
    b: &Builder,
    weights: &Weights<'_>,
    name: &str,
    config: &AttentionConfig,
    x: ValueId,
    context: ValueId,
    mixing: Option<Mixing>,
) -> ValueId {
    let w = weights.below(&format!("{name}."));
    let (heads, head_dim) = (config.heads, config.head_dim);
    let inner = heads * head_dim;
    let tokens = |x: ValueId| b.shape(x).get(1).copied().unwrap_or(0);
    let split = |x: ValueId| b.reshape(x, &[1, tokens(x), heads, head_dim]);
    b.scope(name, || {
        let normed = |linear_key: &str, norm_key: &str, input: ValueId, width: usize| {
            let projected = b.name(linear_key, linear(b, &w, linear_key, input, width, inner, true));
            let weight = w.get(b, &format!("{norm_key}.weight"), &[inner]);
            split(b.name(norm_key, b.rms_norm(projected, Some(weight), config.norm_eps)))
        };
        let v = b.name("to_v", linear(b, &w, "to_v", context, config.context_width, inner, true));
        let mut o = split(v);
        if let Some(mixing) = mixing {
            let mut q = normed("to_q", "q_norm", x, config.query_width);
            let mut k = normed("to_k", "k_norm", context, config.context_width);
            if let Some((for_q, for_k)) = mixing.rotations {
                q = b.rope(q, for_q.cos, for_q.sin, config.rope_layout);
                k = b.rope(k, for_k.cos, for_k.sin, config.rope_layout);
            }
            let op = Attention { scale: Float(1.0 / (head_dim as f64).sqrt()), causal: false };
            o = b.name("mixed", b.attention(op, q, k, o, mixing.bias));
        }
        if config.is_gated {
            let logits = linear(b, &w, "to_gate_logits", x, config.query_width, heads, true);
            let gate = b.mul_scalar(b.sigmoid(b.name("to_gate_logits", logits)), 2.0);
            o = b.mul(o, b.reshape(gate, &[1, tokens(x), heads, 1]));
        }
        let o = b.reshape(o, &[1, tokens(x), inner]);
        b.name("", linear(b, &w, "to_out.0", o, inner, config.query_width, true))
    })
}
