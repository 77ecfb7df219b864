//! Gemma as a writer: the scores of the token that follows, given tokens whose keys and values are kept.
//!
//! One form of program serves both parts of writing. With many tokens it reads a text, piece by piece; with one token it
//! goes on from there. Each run fills as many slots of the caches as it has tokens and sees all slots up to them.
//!
//! # Easy to get wrong
//! - The head that scores tokens is the embedding table; no file stores it a second time.
//! - Texts are padded on the left to whole pieces. Positions count real tokens, from 0, unlike where text is encoded.
//! - Slots behind the newest token hold anything, pads hold nonsense: the bias hides both, and what lies beyond the
//!   window of a sliding layer. Hidden slots still take part in sums with a weight of 0, so they must be finite.
//! - The tokens of an image see all of each other, later ones and those beyond the window too, in every layer. So they are
//!   all read by one run. They are not multiplied by `√hidden` as words are.
//!
//! Source: transformers `Gemma3ForConditionalGeneration` (4.57) with `generate`; spec/text-encoder §6.

use ltxc_ir::ops::{Compare, HIDDEN_SCORE, Unary};
use ltxc_ir::{Builder, DType, Module, Rate, TensorType, ValueId};

use super::config::{GemmaConfig, LayerKind};
use super::gemma::{Cache, Seen, embed, final_norm, language_model, layer, rope_tables, token_table};
use crate::weights::check_compute_dtype;
use crate::{Block, Functions, ModelError, Weights};

/// Axis of tokens.
const TOKENS: usize = 1;

/// Most tokens of a run, and most slots: far beyond every prompt.
const MOST_SLOTS: usize = 1 << 17;

/// The program that reads `tokens` tokens, given what was read before, with room for `slots` tokens altogether.
///
/// - `weights`: the complete set of Gemma's files.
/// - Parameters of the entry `generate`: `ids`, `i32[tokens]`; `row`, `i32[]`, the slot of the first of them; `first`,
///   `i32[]`, the slot of the first real token, behind pads; and for each layer `keys.<i>` and `values.<i>`,
///   `[1, slots, kv_heads, head_dim]` of `dtype`, which must be finite.
/// - Results: `logits`, f32 `[vocabulary]`, scores of what follows the last token, and the caches with these tokens.
/// - With `soft_tokens`, so many of the tokens are those of an image: `image`, f32 `[1, soft_tokens, hidden]`, stands for
///   them whatever their ids are, and `image_at`, `i32[]`, is the first of them, counted from the run's first token.
///
/// # Errors
/// A Gemma that was not made to write (that of LTX-2.5), sizes that are 0 or do not fit together, a dtype that activations
/// cannot have, and weights that are missing or do not fit.
pub fn generate(
    config: &GemmaConfig,
    weights: &Weights,
    [tokens, slots]: [usize; 2],
    soft_tokens: Option<usize>,
    dtype: DType,
) -> Result<Module, ModelError> {
    check_compute_dtype(dtype)?;
    check_writes(config)?;
    if !(1..=slots).contains(&tokens) || slots > MOST_SLOTS || soft_tokens.is_some_and(|n| !(1..=tokens).contains(&n)) {
        let image = soft_tokens.map_or(String::new(), |n| format!(", {n} of them an image"));
        let problem = format!("are {tokens} of {slots}{image}, expected at least 1 and at most {MOST_SLOTS}");
        return Err(ModelError::config("tokens of a text", problem));
    }
    let b = Builder::new("generate");
    let functions = Functions::default();
    let ids = b.param("ids", TensorType::i32([tokens]), Rate::Step);
    let [row, first] = ["row", "first"].map(|name| b.param(name, TensorType::i32([]), Rate::Step));
    let caches: Vec<[ValueId; 2]> = (config.layers.iter().enumerate())
        .map(|(i, &kind)| {
            let attention = config.attention(kind);
            let ty = TensorType::new(dtype, [1, slots, attention.kv_heads, attention.head_dim]);
            ["keys", "values"].map(|name| b.param(&format!("{name}.{i}"), ty.clone(), Rate::Step))
        })
        .collect();

    let image = soft_tokens.map(|n| {
        let soft = b.param("image", TensorType::f32([1, n, config.hidden_size]), Rate::Step);
        (soft, b.param("image_at", TensorType::i32([]), Rate::Step), n)
    });

    let weights_below = language_model(weights);
    let mut h = embed(&b, config, &weights_below, ids, dtype);
    let image = image.map(|(soft, at, n)| {
        h = b.update(h, b.cast(soft, dtype), at, TOKENS);
        [at, b.add(at, b.int_scalar(n as i64))]
    });
    let inputs = [LayerKind::Sliding, LayerKind::Global].map(|kind| {
        let attention = config.attention(kind);
        let [cos, sin] = b.scope("rotary_emb", || {
            let position = b.sub(b.add(b.iota(TensorType::i32([tokens, 1]), 0), row), first);
            rope_tables(&b, attention, b.cast(position, DType::F32), dtype)
        });
        let bias = visible(&b, [tokens, slots], row, first, attention.window, image);
        [cos, sin, b.name(&format!("{}_attention_mask", kind.name()), bias)]
    });
    let mut updated = Vec::with_capacity(caches.len());
    for ((i, &kind), [keys, values]) in config.layers.iter().enumerate().zip(caches) {
        let [cos, sin, bias] = match kind {
            LayerKind::Sliding => inputs[0],
            LayerKind::Global => inputs[1],
        };
        let (function, key) = (format!("gemma_{}_layer_cached", kind.name()), format!("layers.{i}"));
        let args =
            [("h", h), ("cos", cos), ("sin", sin), ("bias", bias), ("keys", keys), ("values", values), ("row", row)];
        let results = functions.call(&b, &weights_below, Block::at(&function, &key), &args, |b, weights, params| {
            let cache = Cache { keys: params[4], values: params[5], row: params[6] };
            let seen = Seen { cos: params[1], sin: params[2], bias: params[3], cache: Some(cache) };
            let (output, [keys, values]) = layer(b, config, kind, weights, params[0], seen);
            vec![("output", output), ("keys", keys), ("values", values)]
        });
        h = b.name(&key, results[0]);
        updated.push([results[1], results[2]]);
    }

    let last = b.slice_axis(h, 1, tokens - 1, tokens);
    let scores =
        b.matmul_transposed(final_norm(&b, config, &weights_below, last), token_table(&b, config, &weights_below));
    let mut scores = b.cast(scores, DType::F32);
    if let Some(cap) = config.score_cap {
        scores = b.mul_scalar(b.unary(Unary::Tanh, b.mul_scalar(scores, 1.0 / cap)), cap);
    }
    b.result("logits", b.reshape(scores, &[config.vocab_size]));
    for (i, [keys, values]) in updated.into_iter().enumerate() {
        b.result(&format!("keys.{i}"), keys);
        b.result(&format!("values.{i}"), values);
    }
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// Refuses a Gemma that was trained to encode prompts alone.
fn check_writes(config: &GemmaConfig) -> Result<(), ModelError> {
    if config.model_type == "gemma3" {
        return Ok(());
    }
    let problem = format!(
        "is `{}`, the text encoder of LTX-2.5, which was not trained to write; prompts are enhanced by Gemma 3: name its \
         folder, or go without prompt enhancement",
        config.model_type
    );
    Err(ModelError::config("gemma.model_type", problem))
}

/// What is added to scores: f32 `[1, 1, t, s]`, 0 for real tokens up to the query and inside the window, and for tokens of
/// one image, which `image` delimits among the run's tokens.
fn visible(
    b: &Builder,
    extents: [usize; 2],
    row: ValueId,
    first: ValueId,
    window: Option<usize>,
    image: Option<[ValueId; 2]>,
) -> ValueId {
    let [own, key] = [0, 1].map(|axis| b.iota(TensorType::i32(extents), axis));
    let query = b.add(own, row);
    let unless = |hidden: ValueId| b.select(hidden, b.scalar(HIDDEN_SCORE), b.scalar(0.0));
    let mut bias = unless(b.compare(Compare::Less, query, key));
    if let Some(window) = window {
        let is_far = b.compare(Compare::LessEqual, b.int_scalar(window as i64), b.sub(query, key));
        bias = b.min(bias, unless(is_far));
    }
    if let Some([at, end]) = image {
        let within = |token: ValueId| {
            let (before, behind) = (b.compare(Compare::Less, token, at), b.compare(Compare::LessEqual, end, token));
            b.min(unless(before), unless(behind))
        };
        bias = b.max(bias, b.min(within(own), within(b.sub(key, row))));
    }
    bias = b.min(bias, unless(b.compare(Compare::Less, key, first)));
    let [tokens, slots] = extents;
    b.reshape(bias, &[1, 1, tokens, slots])
}
