//! The Gemma text encoder (generations 3 and 4): token ids to all hidden states.
//!
//! Only a bucket of `t` token slots is computed: the last `t` of the [`CONTEXT_TOKENS`] positions, left-padded. Causal
//! attention never looks at a pad, so the states of real tokens equal those of the full length.
//!
//! # Easy to get wrong
//! - The position of a token is its index in the padded sequence of 1024: slot `i` of a bucket has position
//!   `1024 − t + i`, whatever the number of real tokens.
//! - State 0 are the scaled embeddings and the last one is behind the final norm; the others are raw layer outputs.
//! - The embedding scale `√hidden` is rounded to the compute dtype: 62 instead of 61.97 in bf16.
//! - Norm weights of generation 3 multiply by `1 + w`, those of generation 4 by `w`.
//! - Queries and keys are normalised per head, before RoPE; RoPE pairs are `(j, j + d/2)`, one table for all heads.
//! - Generation 4: the value of a global layer is the raw key projection, normalised without weight and not rotated.
//! - A sliding window of `w` hides keys with `i − j ≥ w`.
//!
//! `generate` writes text with the same layers.
//!
//! Source: transformers `Gemma3TextModel` (4.57), `Gemma4UnifiedTextModel` (5.14); spec/text-encoder §2, §3.

use half::{bf16, f16};
use ltxc_ir::ops::{Attention, Compare, HIDDEN_SCORE, RopeLayout, Unary};
use ltxc_ir::{Builder, DType, Float, TensorType, ValueId};

use super::CONTEXT_TOKENS;
use super::config::{GemmaAttention, GemmaConfig, GemmaRope, LayerKind, NormWeight};
use crate::{Block, Functions, Weights};

/// Where the language model stands in a set of files: Hugging Face folders of Gemma 3, of Gemma 4 (and of Gemma 3 as
/// later releases of transformers write it), and the single file of LTX-2.5.
const PREFIXES: [&str; 3] = ["language_model.model.", "model.language_model.", "model."];

/// All hidden states: scaled embeddings, the output of every layer but the last, the normed output of the last.
///
/// - `weights`: the complete set of Gemma's files.
/// - `ids`: `i32[t]`; `valid`: `f32[t]`, 1 for real tokens and 0 for the pads in front of them; `t ≤ 1024`.
/// - Result: `layers + 1` values `[1, t, hidden]` of `dtype`. Those of pads are finite and mean nothing.
///
/// Problems with weights are recorded in `weights`.
pub fn gemma(
    b: &Builder,
    functions: &Functions,
    config: &GemmaConfig,
    weights: &Weights,
    ids: ValueId,
    valid: ValueId,
    dtype: DType,
) -> Vec<ValueId> {
    let weights = language_model(weights);
    let tokens = b.shape(ids)[0];
    let mut h = b.name("hidden_states.0", embed(b, config, &weights, ids, dtype));

    let inputs = [LayerKind::Sliding, LayerKind::Global].map(|kind| {
        let attention = config.attention(kind);
        let [cos, sin] = b.scope("rotary_emb", || {
            let position = b.add_scalar(b.iota(TensorType::f32([tokens, 1]), 0), (CONTEXT_TOKENS - tokens) as f64);
            rope_tables(b, attention, position, dtype)
        });
        let bias = b.name(&format!("{}_attention_mask", kind.name()), attention_bias(b, valid, attention.window));
        [cos, sin, bias]
    });
    let mut states = vec![h];
    for (i, &kind) in config.layers.iter().enumerate() {
        let [cos, sin, bias] = match kind {
            LayerKind::Sliding => inputs[0],
            LayerKind::Global => inputs[1],
        };
        let (function, key) = (format!("gemma_{}_layer", kind.name()), format!("layers.{i}"));
        let args = [("h", h), ("cos", cos), ("sin", sin), ("bias", bias)];
        h = functions.call_one(b, &weights, Block::at(&function, &key), &args, |b, weights, params| {
            let seen = Seen { cos: params[1], sin: params[2], bias: params[3], cache: None };
            layer(b, config, kind, weights, params[0], seen).0
        });
        if i + 1 < config.layers.len() {
            states.push(b.name(&format!("hidden_states.{}", i + 1), h));
        }
    }
    let last = final_norm(b, config, &weights, h);
    states.push(b.name(&format!("hidden_states.{}", config.layers.len()), last));
    states
}

/// The language model's own weights in a complete set of files.
pub(super) fn language_model<'a>(weights: &Weights<'a>) -> Weights<'a> {
    let prefix = PREFIXES.into_iter().find(|p| weights.has(&format!("{p}embed_tokens.weight")));
    weights.below(prefix.unwrap_or(PREFIXES[0]))
}

/// The embedding of every token, which is also the head that gives the next one: `[vocabulary, hidden]`.
pub(super) fn token_table(b: &Builder, config: &GemmaConfig, weights: &Weights) -> ValueId {
    weights.get(b, "embed_tokens.weight", &[config.vocab_size, config.hidden_size])
}

/// Scaled embeddings `[1, t, hidden]` of `ids`, `i32[t]`.
pub(super) fn embed(b: &Builder, config: &GemmaConfig, weights: &Weights, ids: ValueId, dtype: DType) -> ValueId {
    let table = token_table(b, config, weights);
    let embedded = b.cast(b.gather(table, ids, 0), dtype);
    let embedded = b.mul_scalar(embedded, rounded((config.hidden_size as f64).sqrt(), dtype));
    b.reshape(embedded, &[1, b.shape(ids)[0], config.hidden_size])
}

/// The norm behind the last layer.
pub(super) fn final_norm(b: &Builder, config: &GemmaConfig, weights: &Weights, h: ValueId) -> ValueId {
    norm(b, config, h, weights.get(b, "norm.weight", &[config.hidden_size]))
}

/// What the attention of a layer sees besides the layer's own tokens.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    /// Cosines of the tokens' positions, `[1, t, 1, d/2]`.
    pub cos: ValueId,
    /// Sines, of the same type.
    pub sin: ValueId,
    /// What is added to scores, f32 `[1, 1, 1 or t, keys]`.
    pub bias: ValueId,
    /// Earlier tokens. Without, the tokens see each other causally; with, the bias alone says what is seen.
    pub cache: Option<Cache>,
}

/// Keys and values of `s` slots, of which the layer's tokens are to fill some.
#[derive(Clone, Copy)]
pub(super) struct Cache {
    /// Keys `[1, s, kv_heads, d]`, normalised and rotated.
    pub keys: ValueId,
    /// Values, of the same type.
    pub values: ValueId,
    /// The slot of the first token, `i32[]`.
    pub row: ValueId,
}

/// One layer. Gives its output, and the keys and values that its attention saw: with a cache, its new content.
pub(super) fn layer(
    b: &Builder,
    config: &GemmaConfig,
    kind: LayerKind,
    weights: &Weights,
    h: ValueId,
    seen: Seen,
) -> (ValueId, [ValueId; 2]) {
    let norm_layer = |name: &str, x| {
        let w = weights.get(b, &format!("{name}.weight"), &[config.hidden_size]);
        b.name(name, norm(b, config, x, w))
    };

    let a = norm_layer("input_layernorm", h);
    let (a, memory) = b.scope("self_attn", || self_attention(b, config, kind, &weights.below("self_attn."), a, seen));
    let h = b.add(h, norm_layer("post_attention_layernorm", a));
    let m = norm_layer("pre_feedforward_layernorm", h);
    let m = b.name("mlp", b.scope("mlp", || mlp(b, config, &weights.below("mlp."), m)));
    let mut h = b.add(h, norm_layer("post_feedforward_layernorm", m));
    if config.has_layer_scalar {
        h = b.mul(h, weights.get(b, "layer_scalar", &[1]));
    }
    (h, memory)
}

/// Grouped-query attention with normalised queries and keys. Gives what [`layer`] does.
fn self_attention(
    b: &Builder,
    config: &GemmaConfig,
    kind: LayerKind,
    weights: &Weights,
    x: ValueId,
    Seen { cos, sin, bias, cache }: Seen,
) -> (ValueId, [ValueId; 2]) {
    let GemmaAttention { heads, kv_heads, head_dim, .. } = *config.attention(kind);
    let attention = config.attention(kind);
    let [batch, tokens, hidden] = [0, 1, 2].map(|axis| b.shape(x)[axis]);
    let project = |name: &str, heads: usize| {
        let w = weights.get(b, &format!("{name}.weight"), &[heads * head_dim, hidden]);
        let y = b.name(name, b.matmul_transposed(x, w));
        b.reshape(y, &[batch, tokens, heads, head_dim])
    };
    let norm_heads = |name: &str, x| {
        let w = weights.get(b, &format!("{name}.weight"), &[head_dim]);
        b.name(name, norm(b, config, x, w))
    };

    let (q, raw_k) = (project("q_proj", heads), project("k_proj", kv_heads));
    let mut v = if attention.is_value_shared { raw_k } else { project("v_proj", kv_heads) };
    if attention.has_value_norm {
        v = b.name("v_norm", b.rms_norm(v, None, config.eps));
    }
    let q = b.rope(norm_heads("q_norm", q), cos, sin, RopeLayout::Split);
    let mut k = b.rope(norm_heads("k_norm", raw_k), cos, sin, RopeLayout::Split);
    if let Some(Cache { keys, values, row }) = cache {
        const SLOTS: usize = 1;
        (k, v) = (b.update(keys, k, row, SLOTS), b.update(values, v, row, SLOTS));
    }
    let op = Attention { scale: Float(attention.scale), causal: cache.is_none() };
    let o = b.reshape(b.attention(op, q, k, v, Some(bias)), &[batch, tokens, heads * head_dim]);
    let w = weights.get(b, "o_proj.weight", &[hidden, heads * head_dim]);
    (b.name("o_proj", b.matmul_transposed(o, w)), [k, v])
}

/// `down(gelu(gate x) · up x)`.
fn mlp(b: &Builder, config: &GemmaConfig, weights: &Weights, x: ValueId) -> ValueId {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let project = |name: &str, x, out: usize, input: usize| {
        let w = weights.get(b, &format!("{name}.weight"), &[out, input]);
        b.name(name, b.matmul_transposed(x, w))
    };
    let gate = b.gelu(project("gate_proj", x, inner, hidden));
    let up = project("up_proj", x, inner, hidden);
    project("down_proj", b.mul(gate, up), hidden, inner)
}

/// RMS norm over the last axis with a stored weight, in f32, rounded once.
fn norm(b: &Builder, config: &GemmaConfig, x: ValueId, weight: ValueId) -> ValueId {
    let weight = match config.norm_weight {
        NormWeight::OnePlus => b.add_scalar(b.cast(weight, DType::F32), 1.0),
        NormWeight::Plain => weight,
    };
    b.rms_norm(x, Some(weight), config.eps)
}

/// Cosines and sines of `position`, f32 `[t, 1]`: each `[1, t, 1, d/2]` of `dtype`; angles in f32.
pub(super) fn rope_tables(b: &Builder, attention: &GemmaAttention, position: ValueId, dtype: DType) -> [ValueId; 2] {
    let tokens = b.shape(position)[0];
    let frequencies = frequencies(&attention.rope, attention.head_dim);
    let angles = b.mul(position, b.constant(&[1, frequencies.len()], &frequencies));
    let angles = b.reshape(angles, &[1, tokens, 1, frequencies.len()]);
    [Unary::Cos, Unary::Sin].map(|f| b.cast(b.unary(f, angles), dtype))
}

/// Radians per position of every pair of a head, rounded to f32 where the reference rounds.
fn frequencies(rope: &GemmaRope, head_dim: usize) -> Vec<f32> {
    let frequency = |pair: usize| {
        let exponent = (2 * pair) as f32 / head_dim as f32;
        // The power is rounded from f64: equal on every platform, unlike a power in f32.
        let frequency = 1.0 / rope.theta.powf(exponent as f64) as f32;
        if pair < rope.pairs { frequency / rope.factor as f32 } else { 0.0 }
    };
    (0..head_dim / 2).map(frequency).collect()
}

/// What is added to scores besides the causal mask: f32 `[1, 1, 1, t]` for hidden pads, `[1, 1, t, t]` where the window
/// is shorter than the bucket.
fn attention_bias(b: &Builder, valid: ValueId, window: Option<usize>) -> ValueId {
    let tokens = b.shape(valid)[0];
    let pads = b.mul_scalar(b.add_scalar(b.reshape(valid, &[1, 1, 1, tokens]), -1.0), -HIDDEN_SCORE);
    let Some(window) = window.filter(|&w| w < tokens) else { return pads };
    let [row, column] = [0, 1].map(|axis| b.iota(TensorType::i32([tokens, tokens]), axis));
    let is_near = b.compare(Compare::Less, b.sub(row, column), b.int_scalar(window as i64));
    let far = b.select(is_near, b.scalar(0.0), b.scalar(HIDDEN_SCORE));
    b.min(pads, b.reshape(far, &[1, 1, tokens, tokens]))
}

/// `value` as `dtype` can hold it.
fn rounded(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => bf16::from_f64(value).to_f64(),
        DType::F16 => f16::from_f64(value).to_f64(),
        _ => value as f32 as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proportional_rope_turns_the_first_pairs_of_the_whole_head() {
        let rope = GemmaRope { theta: 1e6, factor: 1.0, pairs: 64 };
        let f = frequencies(&rope, 512);
        assert_eq!(f.len(), 256);
        assert_eq!(f[0], 1.0);
        assert!((f[63] - 1e6f32.powf(-126.0 / 512.0)).abs() < 1e-7);
        assert!(f[64..].iter().all(|&v| v == 0.0));
    }

    #[test]
    fn linear_rope_divides_every_frequency() {
        let f = frequencies(&GemmaRope { theta: 1e6, factor: 8.0, pairs: 128 }, 256);
        assert_eq!(f[0], 0.125);
        assert!((f[127] - 1e6f32.powf(-254.0 / 256.0) / 8.0).abs() < 1e-12);
    }

    #[test]
    fn embedding_scale_is_what_the_dtype_can_hold() {
        assert_eq!(rounded(3840f64.sqrt(), DType::BF16), 62.0);
        assert_eq!(rounded(3840f64.sqrt(), DType::F32), 3840f64.sqrt() as f32 as f64);
    }
}
