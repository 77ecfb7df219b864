//! Settings of the text encoder: Gemma's Hugging Face `config.json`.
//!
//! One description covers both generations that LTX models use, so that the graph builder has no notion of a version:
//! what differs (norm weights, value norm, shared key and value projections, layer scalars, RoPE) is a field.
//!
//! # Easy to get wrong
//! - Published Gemma 3 configs leave out what equals the class defaults of `transformers` (head size, vocabulary, RoPE
//!   bases, `query_pre_attn_scalar`): absent keys have the values below, they are not errors.
//! - The attention scale of Gemma 3 is `query_pre_attn_scalar^-0.5`, which need not be the head size.
//! - `rope_scaling` of the old form applies to global layers only.
//! - Proportional RoPE rotates the first `fraction` of the pairs `(j, j + d/2)`, with exponents over the whole head.
//!
//! Source: transformers `Gemma3TextConfig` (4.57) and `Gemma4UnifiedTextConfig` (5.14); spec/text-encoder §2.1, §3.

use serde_json::Value;

use crate::ModelError;
use crate::fields::{Fields, MOST};

/// Largest number of layers, heads or channels per head.
const MOST_COUNT: usize = 4096;

/// What one kind of Gemma layer does in its attention.
#[derive(Clone, Debug, PartialEq)]
pub struct GemmaAttention {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Channels per head, even.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f64,
    /// A query sees this many latest keys, itself included; `None` for all.
    pub window: Option<usize>,
    /// Rotary position embedding.
    pub rope: GemmaRope,
    /// Whether the value is the raw key projection, so that there is no `v_proj`.
    pub is_value_shared: bool,
    /// Whether values are normalised per head, without a weight.
    pub has_value_norm: bool,
}

/// Rotary position embedding of one kind of layer.
#[derive(Clone, Debug, PartialEq)]
pub struct GemmaRope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Frequencies are divided by it.
    pub factor: f64,
    /// Number of rotated pairs, at most half the head size; the other pairs have frequency 0.
    pub pairs: usize,
}

/// Kind of a Gemma layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// Sees a window of keys.
    Sliding,
    /// Sees every earlier key.
    Global,
}

impl LayerKind {
    /// Name in function names.
    pub fn name(self) -> &'static str {
        match self {
            LayerKind::Sliding => "sliding",
            LayerKind::Global => "global",
        }
    }
}

/// How a stored norm weight `w` multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormWeight {
    /// By `1 + w` (Gemma 3).
    OnePlus,
    /// By `w` (Gemma 4).
    Plain,
}

/// A Gemma text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct GemmaConfig {
    /// `model_type` of the config.
    pub model_type: String,
    /// Name of the fine-tune, which an LTX-2.5 transformer must agree with.
    pub gemma_version: Option<String>,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Channels inside the MLP.
    pub intermediate_size: usize,
    /// Epsilon of every RMS norm.
    pub eps: f64,
    /// Meaning of norm weights.
    pub norm_weight: NormWeight,
    /// Whether each layer ends with a multiplication by its `layer_scalar`.
    pub has_layer_scalar: bool,
    /// Bound of the scores of the next token, if they have one; states do not depend on it.
    pub score_cap: Option<f64>,
    /// Kind of every layer, at least one.
    pub layers: Vec<LayerKind>,
    /// Attention of sliding layers.
    pub sliding: GemmaAttention,
    /// Attention of global layers.
    pub global: GemmaAttention,
}

impl GemmaConfig {
    /// Reads `config.json` of a Hugging Face folder, or the `gemma_config` metadata of an LTX-2.5 text encoder file.
    ///
    /// # Errors
    /// [`ModelError::Config`]: a `model_type` that no LTX model uses; otherwise everything that is missing, malformed or
    /// not supported.
    pub fn from_json(config: &Value) -> Result<GemmaConfig, ModelError> {
        let root = Fields::new("gemma", config);
        let read = match root.text("model_type") {
            Some("gemma3") => gemma3,
            Some("gemma4_unified") => gemma4,
            found => {
                // The other keys mean something else then, so that their problems would only confuse.
                let found = found.map_or("missing".into(), |name| format!("`{name}`"));
                let problem = format!("is {found}, LTX models are conditioned by `gemma3` or `gemma4_unified`");
                return Err(ModelError::config("gemma.model_type", problem));
            }
        };
        let text = root.required_below("text_config");
        refuse_unsupported(&text);
        let gemma_version = root.text("gemma_version").map(str::to_string);
        root.finish(GemmaConfig { gemma_version, ..read(&text) })
    }

    /// Number of hidden states that the feature extractor sees: the embeddings and the output of every layer.
    pub fn states(&self) -> usize {
        self.layers.len() + 1
    }

    /// Attention of the layers of `kind`.
    pub fn attention(&self, kind: LayerKind) -> &GemmaAttention {
        match kind {
            LayerKind::Sliding => &self.sliding,
            LayerKind::Global => &self.global,
        }
    }

    /// Checks that this encoder is the one a transformer was trained with.
    ///
    /// `expected`: `gemma_version` of the transformer's `gemma_source_checkpoint`, if its file has one; `model_version`:
    /// leading numbers of the transformer file's version, empty if it has none.
    ///
    /// # Errors
    /// Another fine-tune, an undeclared one, or another generation of Gemma.
    ///
    /// Source: spec/text-encoder §3.
    pub fn check_pairing(&self, expected: Option<&str>, model_version: &[u64]) -> Result<(), ModelError> {
        /// First version whose transformers are conditioned by a fine-tuned encoder.
        const FINE_TUNED: [u64; 3] = [2, 4, 0];
        let declared = self.gemma_version.as_deref();
        let problem = match expected {
            Some(expected) if declared == Some(expected) => return Ok(()),
            Some(expected) => {
                let found = declared.map_or("none".into(), |d| format!("`{d}`"));
                format!("is {found}, the transformer was trained with `{expected}`; use that text encoder")
            }
            None if model_version >= &FINE_TUNED[..] => match declared {
                None => return Ok(()),
                Some(d) => format!("is `{d}`, but the transformer does not say which text encoder it was trained with"),
            },
            None if self.model_type == "gemma3" => return Ok(()),
            None => {
                let problem = format!("is `{}`, this transformer was trained with `gemma3`", self.model_type);
                return Err(ModelError::config("gemma.model_type", problem));
            }
        };
        Err(ModelError::config("gemma.gemma_version", problem))
    }
}

/// Refuses settings whose mathematics the graph builder does not have.
fn refuse_unsupported(text: &Fields<'_>) {
    for key in ["hidden_activation", "hidden_act"] {
        text.only(key, "gelu_pytorch_tanh");
    }
    for key in ["attention_bias", "enable_moe_block", "use_double_wide_mlp"] {
        text.only(key, false);
    }
    for key in ["attn_logit_softcapping", "num_kv_shared_layers", "hidden_size_per_layer_input"] {
        text.only(key, 0);
    }
    // Gemma 4 says "vision": only image tokens see later tokens, and prompts have none.
    if let Some(value) = text.value("use_bidirectional_attention")
        && *value != Value::Bool(false)
        && value != "vision"
    {
        text.problem_at("use_bidirectional_attention", format!("is `{value}`, text must be causal"));
    }
}

/// Gemma 3. Absent keys have the class defaults of `Gemma3TextConfig`, except the sizes that every file states.
fn gemma3(text: &Fields<'_>) -> GemmaConfig {
    let head_dim = head_dim(text, "head_dim", Some(256));
    let rope = |kind| {
        if text.has("rope_parameters") {
            return rope_of(&text.below("rope_parameters").required_below(layer_type(kind)), head_dim, None);
        }
        let unscaled = |theta| GemmaRope { theta, factor: 1.0, pairs: head_dim / 2 };
        match kind {
            LayerKind::Sliding => unscaled(text.positive("rope_local_base_freq", 10_000.0)),
            LayerKind::Global => {
                let theta = text.positive("rope_theta", 1_000_000.0);
                if text.has("rope_scaling") {
                    rope_of(&text.below("rope_scaling"), head_dim, Some(theta))
                } else {
                    unscaled(theta)
                }
            }
        }
    };
    let attention = |kind| {
        let (heads, kv_heads) = heads(text, "num_key_value_heads");
        GemmaAttention {
            heads,
            kv_heads,
            head_dim,
            scale: text.positive("query_pre_attn_scalar", 256.0).powf(-0.5),
            window: window(text, kind),
            rope: rope(kind),
            is_value_shared: false,
            has_value_norm: false,
        }
    };
    GemmaConfig {
        model_type: "gemma3".into(),
        gemma_version: None,
        vocab_size: text.size("vocab_size", 262_208),
        hidden_size: text.required_size("hidden_size", MOST),
        intermediate_size: text.required_size("intermediate_size", MOST),
        eps: text.positive("rms_norm_eps", 1e-6),
        norm_weight: NormWeight::OnePlus,
        has_layer_scalar: false,
        score_cap: text.find_positive("final_logit_softcapping"),
        layers: layers(text, Some(6)),
        sliding: attention(LayerKind::Sliding),
        global: attention(LayerKind::Global),
    }
}

/// Gemma 4, as published with LTX-2.5.
fn gemma4(text: &Fields<'_>) -> GemmaConfig {
    let ropes = text.required_below("rope_parameters");
    let attention = |kind| {
        let is_global = kind == LayerKind::Global;
        let is_value_shared = is_global && text.bool("attention_k_eq_v", false);
        let has_own_dim = is_global && text.has("global_head_dim");
        let head_dim = head_dim(text, if has_own_dim { "global_head_dim" } else { "head_dim" }, None);
        let has_own_heads = is_value_shared && text.has("num_global_key_value_heads");
        let kv_key = if has_own_heads { "num_global_key_value_heads" } else { "num_key_value_heads" };
        let (heads, kv_heads) = heads(text, kv_key);
        GemmaAttention {
            heads,
            kv_heads,
            head_dim,
            // The norms of queries and keys carry the scale.
            scale: 1.0,
            window: window(text, kind),
            rope: rope_of(&ropes.required_below(layer_type(kind)), head_dim, None),
            is_value_shared,
            has_value_norm: true,
        }
    };
    GemmaConfig {
        model_type: "gemma4_unified".into(),
        gemma_version: None,
        vocab_size: text.required_size("vocab_size", MOST),
        hidden_size: text.required_size("hidden_size", MOST),
        intermediate_size: text.required_size("intermediate_size", MOST),
        eps: text.positive("rms_norm_eps", 1e-6),
        norm_weight: NormWeight::Plain,
        has_layer_scalar: true,
        score_cap: text.find_positive("final_logit_softcapping"),
        layers: layers(text, None),
        sliding: attention(LayerKind::Sliding),
        global: attention(LayerKind::Global),
    }
}

fn layer_type(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Sliding => "sliding_attention",
        LayerKind::Global => "full_attention",
    }
}

/// Channels per head; without a default, the key must exist.
fn head_dim(text: &Fields<'_>, key: &str, default: Option<usize>) -> usize {
    let found = text.find_size(key, MOST_COUNT);
    match found {
        Some(channels) if channels % 2 != 0 => {
            text.problem_at(key, format!("is `{channels}`, which cannot be split into pairs"));
        }
        None if default.is_none() => text.require(key),
        _ => {}
    }
    found.or(default).unwrap_or(2)
}

fn heads(text: &Fields<'_>, kv_key: &str) -> (usize, usize) {
    let [heads, kv_heads] = ["num_attention_heads", kv_key].map(|key| {
        text.require(key);
        text.find_size(key, MOST_COUNT)
    });
    if let (Some(heads), Some(kv_heads)) = (heads, kv_heads)
        && heads % kv_heads != 0
    {
        text.problem_at(kv_key, format!("is `{kv_heads}`, which does not divide the {heads} query heads"));
    }
    (heads.unwrap_or(1), kv_heads.unwrap_or(1))
}

fn window(text: &Fields<'_>, kind: LayerKind) -> Option<usize> {
    match kind {
        LayerKind::Sliding => Some(text.required_size("sliding_window", MOST)),
        LayerKind::Global => None,
    }
}

/// Kinds of the layers: listed, or every `sliding_window_pattern`-th one is global.
fn layers(text: &Fields<'_>, default_pattern: Option<usize>) -> Vec<LayerKind> {
    text.require("num_hidden_layers");
    let found = text.find_size("num_hidden_layers", MOST_COUNT);
    let n = found.unwrap_or(1);
    let Some(list) = text.value("layer_types") else {
        let pattern = text.find_size("sliding_window_pattern", MOST_COUNT).or(default_pattern);
        if pattern.is_none() {
            text.require("layer_types");
        }
        let is_global = |i: usize| pattern.is_some_and(|p| i.is_multiple_of(p));
        return (1..=n).map(|i| if is_global(i) { LayerKind::Global } else { LayerKind::Sliding }).collect();
    };
    let kinds: Option<Vec<LayerKind>> = list.as_array().and_then(|list| list.iter().map(layer_kind).collect());
    match &kinds {
        None => text.problem_at("layer_types", "is not a list of `sliding_attention` and `full_attention`"),
        Some(kinds) if found.is_some() && kinds.len() != n => {
            text.problem_at("layer_types", format!("has {} entries for {n} layers", kinds.len()));
        }
        Some(_) => {}
    }
    kinds.unwrap_or_default()
}

fn layer_kind(value: &Value) -> Option<LayerKind> {
    [LayerKind::Sliding, LayerKind::Global].into_iter().find(|&kind| value == layer_type(kind))
}

/// How a `rope_type` spreads and scales the frequencies.
#[derive(Clone, Copy)]
enum RopeKind {
    Default,
    Linear,
    Proportional,
}

/// A RoPE description; `theta` is its base where it does not state one itself.
fn rope_of(rope: &Fields<'_>, head_dim: usize, theta: Option<f64>) -> GemmaRope {
    const KINDS: [(&str, RopeKind); 3] =
        [("default", RopeKind::Default), ("linear", RopeKind::Linear), ("proportional", RopeKind::Proportional)];
    if theta.is_none() {
        rope.require("rope_theta");
    }
    let theta = rope.positive("rope_theta", theta.unwrap_or(1.0));
    // `type` is the older name of the key.
    let key = if rope.has("rope_type") { "rope_type" } else { "type" };
    let half = head_dim / 2;
    match rope.choice(key, RopeKind::Default, &KINDS) {
        RopeKind::Default => GemmaRope { theta, factor: 1.0, pairs: half },
        RopeKind::Linear => {
            rope.require("factor");
            GemmaRope { theta, factor: rope.positive("factor", 1.0), pairs: half }
        }
        RopeKind::Proportional => {
            let fraction = rope.positive("partial_rotary_factor", 1.0);
            if fraction > 1.0 {
                rope.problem_at("partial_rotary_factor", format!("is `{fraction}`, expected at most 1"));
            }
            let pairs = (fraction * head_dim as f64 / 2.0) as usize;
            GemmaRope { theta, factor: rope.positive("factor", 1.0), pairs }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// `text_config` of the published 12B model, which leaves out class defaults.
    fn published() -> Value {
        json!({ "model_type": "gemma3", "text_config": {
            "hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text", "num_attention_heads": 16,
            "num_hidden_layers": 48, "num_key_value_heads": 8, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        }})
    }

    #[test]
    fn absent_keys_have_the_class_defaults() {
        let gemma = GemmaConfig::from_json(&published()).expect("valid");
        assert_eq!((gemma.vocab_size, gemma.sliding.head_dim, gemma.states()), (262_208, 256, 49));
        assert_eq!((gemma.sliding.scale, gemma.sliding.window, gemma.global.window), (1.0 / 16.0, Some(1024), None));
        assert_eq!(gemma.sliding.rope, GemmaRope { theta: 1e4, factor: 1.0, pairs: 128 });
        assert_eq!(gemma.global.rope, GemmaRope { theta: 1e6, factor: 8.0, pairs: 128 });
        let global = (0..48).filter(|&i| gemma.layers[i] == LayerKind::Global);
        assert!(global.eq([5, 11, 17, 23, 29, 35, 41, 47]));
    }

    #[test]
    fn rope_per_layer_type_means_the_same() {
        let mut config = published();
        let text = &mut config["text_config"];
        text["rope_scaling"] = Value::Null;
        text["rope_parameters"] = json!({
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        });
        let types = (1..=48).map(|i| if i % 6 == 0 { "full_attention" } else { "sliding_attention" });
        text["layer_types"] = types.collect();
        assert_eq!(
            GemmaConfig::from_json(&config).expect("valid"),
            GemmaConfig::from_json(&published()).expect("valid")
        );
    }

    /// Replaces `text_config.<key>` and expects an error with `text`.
    #[track_caller]
    fn check_error(key: &str, value: Value, text: &str) {
        let mut config = published();
        config["text_config"][key] = value;
        let message = GemmaConfig::from_json(&config).expect_err("must not be accepted").to_string();
        assert!(
            message.contains(text) && message.contains("config `gemma`: 1 problem(s):\n  `text_config."),
            "{message}"
        );
    }

    #[test]
    fn bad_values_are_errors_that_name_the_key() {
        check_error("hidden_size", Value::Null, "hidden_size` is missing");
        check_error("hidden_size", json!(0), "expected a whole number in 1..=");
        check_error("hidden_size", json!(-4), "expected a whole number in 1..=");
        check_error("hidden_size", json!(u64::MAX), "expected a whole number in 1..=");
        check_error("num_hidden_layers", json!("48"), "expected a whole number in 1..=");
        check_error("num_key_value_heads", json!(5), "does not divide");
        check_error("head_dim", json!(255), "cannot be split into pairs");
        check_error("rms_norm_eps", json!(-1.0), "expected a positive number");
        check_error("layer_types", json!(["full_attention"]), "has 1 entries for 48 layers");
        check_error("layer_types", json!(["chunked_attention"]), "is not a list of");
        check_error("rope_scaling", json!({"rope_type": "yarn"}), "is `\"yarn\"`, expected `default` or `linear`");
        check_error("rope_scaling", json!({"rope_type": "linear"}), "rope_scaling.factor` is missing");
        check_error("rope_scaling", json!([1]), "rope_scaling` is not an object");
        check_error("hidden_activation", json!("silu"), "only `\"gelu_pytorch_tanh\"` is supported");
        check_error("attn_logit_softcapping", json!(50.0), "only `0` is supported");
        check_error("attention_bias", json!(true), "only `false` is supported");
        check_error("use_bidirectional_attention", json!(true), "text must be causal");
    }

    #[test]
    fn other_models_are_refused() {
        for config in [json!(null), json!({}), json!({"model_type": "gemma2", "text_config": {}})] {
            assert!(GemmaConfig::from_json(&config).is_err(), "{config}");
        }
    }

    #[test]
    fn encoder_and_transformer_must_belong_together() {
        let stock = GemmaConfig::from_json(&published()).expect("valid");
        let tuned = GemmaConfig { gemma_version: Some("v1".into()), ..stock.clone() };
        let other = GemmaConfig { model_type: "gemma4_unified".into(), ..stock.clone() };
        assert!(tuned.check_pairing(Some("v1"), &[2, 5, 0]).is_ok());
        assert!(tuned.check_pairing(Some("v2"), &[2, 5, 0]).is_err());
        assert!(stock.check_pairing(Some("v1"), &[2, 5, 0]).is_err());
        assert!(tuned.check_pairing(None, &[2, 4, 0]).is_err());
        assert!(stock.check_pairing(None, &[2, 4, 0]).is_ok());
        assert!(stock.check_pairing(None, &[2, 3]).is_ok());
        assert!(stock.check_pairing(None, &[]).is_ok());
        assert!(other.check_pairing(None, &[2, 3, 0]).is_err());
    }
}
