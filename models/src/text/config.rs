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

use super::fields::{Fields, MAX_COUNT, MAX_SIZE};
use crate::ModelError;

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
    /// A `model_type` that no LTX model uses, a missing or malformed key, or a setting that is not supported.
    pub fn from_json(config: &Value) -> Result<GemmaConfig, ModelError> {
        let root = Fields::new("gemma", config)?;
        let model_type = root.optional_text("model_type")?.ok_or_else(|| root.error("model_type", "is missing"))?;
        let text = root.object("text_config")?;
        refuse_unsupported(&text)?;
        let mut gemma = match model_type {
            "gemma3" => gemma3(&text)?,
            "gemma4_unified" => gemma4(&text)?,
            _ => {
                let problem = format!("is `{model_type}`, LTX models are conditioned by `gemma3` or `gemma4_unified`");
                return Err(root.error("model_type", problem));
            }
        };
        gemma.gemma_version = root.optional_text("gemma_version")?.map(str::to_string);
        Ok(gemma)
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
                let path = "gemma.model_type".into();
                let problem = format!("is `{}`, this transformer was trained with `gemma3`", self.model_type);
                return Err(ModelError::Config { path, problem });
            }
        };
        Err(ModelError::Config { path: "gemma.gemma_version".into(), problem })
    }
}

/// Fails on settings whose mathematics the graph builder does not have.
fn refuse_unsupported(text: &Fields) -> Result<(), ModelError> {
    for key in ["hidden_activation", "hidden_act"] {
        if let Some(name) = text.optional_text(key)?.filter(|&name| name != "gelu_pytorch_tanh") {
            return Err(text.error(key, format!("is `{name}`, expected `gelu_pytorch_tanh`")));
        }
    }
    for key in ["attention_bias", "enable_moe_block", "use_double_wide_mlp"] {
        if text.flag_or(key, false)? {
            return Err(text.error(key, "is true, which no supported encoder has"));
        }
    }
    for key in ["attn_logit_softcapping", "num_kv_shared_layers", "hidden_size_per_layer_input"] {
        if let Some(value) = text.find(key).filter(|v| v.as_f64() != Some(0.0)) {
            return Err(text.error(key, format!("is {value}, which no supported encoder has")));
        }
    }
    // Gemma 4 says "vision": only image tokens see later tokens, and prompts have none.
    if let Some(value) = text.find("use_bidirectional_attention")
        && *value != Value::Bool(false)
        && value != "vision"
    {
        return Err(text.error("use_bidirectional_attention", format!("is {value}, text must be causal")));
    }
    Ok(())
}

/// Gemma 3. Absent keys have the class defaults of `Gemma3TextConfig`, except the sizes that every file states.
fn gemma3(text: &Fields) -> Result<GemmaConfig, ModelError> {
    let head_dim = head_dim(text, "head_dim", Some(256))?;
    let ropes = text.optional_object("rope_parameters")?;
    let rope = |kind| match (&ropes, kind) {
        (Some(ropes), _) => rope_of(&ropes.object(layer_type(kind))?, head_dim, None),
        (None, LayerKind::Sliding) => {
            let theta = text.number_or("rope_local_base_freq", 10_000.0)?;
            Ok(GemmaRope { theta, factor: 1.0, pairs: head_dim / 2 })
        }
        (None, LayerKind::Global) => {
            let theta = text.number_or("rope_theta", 1_000_000.0)?;
            match text.optional_object("rope_scaling")? {
                Some(scaling) => rope_of(&scaling, head_dim, Some(theta)),
                None => Ok(GemmaRope { theta, factor: 1.0, pairs: head_dim / 2 }),
            }
        }
    };
    let attention = |kind| -> Result<GemmaAttention, ModelError> {
        let (heads, kv_heads) = heads(text, "num_key_value_heads")?;
        Ok(GemmaAttention {
            heads,
            kv_heads,
            head_dim,
            scale: text.number_or("query_pre_attn_scalar", 256.0)?.powf(-0.5),
            window: window(text, kind)?,
            rope: rope(kind)?,
            is_value_shared: false,
            has_value_norm: false,
        })
    };
    Ok(GemmaConfig {
        model_type: "gemma3".into(),
        gemma_version: None,
        vocab_size: text.size_or("vocab_size", MAX_SIZE, 262_208)?,
        hidden_size: text.size("hidden_size", MAX_SIZE)?,
        intermediate_size: text.size("intermediate_size", MAX_SIZE)?,
        eps: text.number_or("rms_norm_eps", 1e-6)?,
        norm_weight: NormWeight::OnePlus,
        has_layer_scalar: false,
        layers: layers(text, Some(6))?,
        sliding: attention(LayerKind::Sliding)?,
        global: attention(LayerKind::Global)?,
    })
}

/// Gemma 4, as published with LTX-2.5.
fn gemma4(text: &Fields) -> Result<GemmaConfig, ModelError> {
    let ropes = text.object("rope_parameters")?;
    let attention = |kind| -> Result<GemmaAttention, ModelError> {
        let is_global = kind == LayerKind::Global;
        let is_value_shared = is_global && text.flag_or("attention_k_eq_v", false)?;
        let head_dim = match kind {
            LayerKind::Global if text.find("global_head_dim").is_some() => head_dim(text, "global_head_dim", None)?,
            _ => head_dim(text, "head_dim", None)?,
        };
        let has_own_heads = is_value_shared && text.find("num_global_key_value_heads").is_some();
        let kv_key = if has_own_heads { "num_global_key_value_heads" } else { "num_key_value_heads" };
        let (heads, kv_heads) = heads(text, kv_key)?;
        Ok(GemmaAttention {
            heads,
            kv_heads,
            head_dim,
            // The norms of queries and keys carry the scale.
            scale: 1.0,
            window: window(text, kind)?,
            rope: rope_of(&ropes.object(layer_type(kind))?, head_dim, None)?,
            is_value_shared,
            has_value_norm: true,
        })
    };
    Ok(GemmaConfig {
        model_type: "gemma4_unified".into(),
        gemma_version: None,
        vocab_size: text.size("vocab_size", MAX_SIZE)?,
        hidden_size: text.size("hidden_size", MAX_SIZE)?,
        intermediate_size: text.size("intermediate_size", MAX_SIZE)?,
        eps: text.number_or("rms_norm_eps", 1e-6)?,
        norm_weight: NormWeight::Plain,
        has_layer_scalar: true,
        layers: layers(text, None)?,
        sliding: attention(LayerKind::Sliding)?,
        global: attention(LayerKind::Global)?,
    })
}

fn layer_type(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Sliding => "sliding_attention",
        LayerKind::Global => "full_attention",
    }
}

fn head_dim(text: &Fields, key: &str, default: Option<usize>) -> Result<usize, ModelError> {
    let size = match default {
        Some(default) => text.size_or(key, MAX_COUNT, default)?,
        None => text.size(key, MAX_COUNT)?,
    };
    if size % 2 == 0 { Ok(size) } else { Err(text.error(key, format!("is {size}, which cannot be split into pairs"))) }
}

fn heads(text: &Fields, kv_key: &str) -> Result<(usize, usize), ModelError> {
    let heads = text.size("num_attention_heads", MAX_COUNT)?;
    let kv_heads = text.size(kv_key, MAX_COUNT)?;
    if heads % kv_heads == 0 {
        return Ok((heads, kv_heads));
    }
    Err(text.error(kv_key, format!("is {kv_heads}, which does not divide the {heads} query heads")))
}

fn window(text: &Fields, kind: LayerKind) -> Result<Option<usize>, ModelError> {
    match kind {
        LayerKind::Sliding => text.size("sliding_window", MAX_SIZE).map(Some),
        LayerKind::Global => Ok(None),
    }
}

/// Kinds of the layers: listed, or every `sliding_window_pattern`-th one is global.
fn layers(text: &Fields, default_pattern: Option<usize>) -> Result<Vec<LayerKind>, ModelError> {
    let n = text.size("num_hidden_layers", MAX_COUNT)?;
    let Some(list) = text.find("layer_types") else {
        let pattern = match text.optional_size("sliding_window_pattern", MAX_COUNT)?.or(default_pattern) {
            Some(pattern) => pattern,
            None => return Err(text.error("layer_types", "is missing")),
        };
        return Ok((1..=n).map(|i| if i % pattern == 0 { LayerKind::Global } else { LayerKind::Sliding }).collect());
    };
    let kinds = list.as_array().and_then(|list| list.iter().map(layer_kind).collect::<Option<Vec<_>>>());
    let kinds =
        kinds.ok_or_else(|| text.error("layer_types", "is not a list of `sliding_attention` and `full_attention`"))?;
    if kinds.len() == n {
        return Ok(kinds);
    }
    Err(text.error("layer_types", format!("has {} entries for {n} layers", kinds.len())))
}

fn layer_kind(value: &Value) -> Option<LayerKind> {
    [LayerKind::Sliding, LayerKind::Global].into_iter().find(|&kind| value == layer_type(kind))
}

/// A RoPE description; `theta` is its base where it does not state one itself.
fn rope_of(rope: &Fields, head_dim: usize, theta: Option<f64>) -> Result<GemmaRope, ModelError> {
    let theta = rope.optional_number("rope_theta")?.or(theta).ok_or_else(|| rope.error("rope_theta", "is missing"))?;
    // `type` is the older name of the key.
    let kind = rope.optional_text("rope_type")?.or(rope.optional_text("type")?).unwrap_or("default");
    let half = head_dim / 2;
    match kind {
        "default" => Ok(GemmaRope { theta, factor: 1.0, pairs: half }),
        "linear" => {
            let factor = rope.optional_number("factor")?.ok_or_else(|| rope.error("factor", "is missing"))?;
            Ok(GemmaRope { theta, factor, pairs: half })
        }
        "proportional" => {
            let fraction = rope.number_or("partial_rotary_factor", 1.0)?;
            if fraction > 1.0 {
                return Err(rope.error("partial_rotary_factor", format!("is {fraction}, expected at most 1")));
            }
            let pairs = (fraction * head_dim as f64 / 2.0) as usize;
            Ok(GemmaRope { theta, factor: rope.number_or("factor", 1.0)?, pairs })
        }
        _ => Err(rope.error("rope_type", format!("is `{kind}`, expected `default`, `linear` or `proportional`"))),
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
        assert!(message.contains(text) && message.contains("gemma.text_config"), "{message}");
    }

    #[test]
    fn bad_values_are_errors_that_name_the_key() {
        check_error("hidden_size", Value::Null, "hidden_size`: is missing");
        check_error("hidden_size", json!(0), "expected an integer in 1..=");
        check_error("hidden_size", json!(-4), "expected an integer in 1..=");
        check_error("hidden_size", json!(u64::MAX), "expected an integer in 1..=");
        check_error("num_hidden_layers", json!("48"), "expected an integer in 1..=");
        check_error("num_key_value_heads", json!(5), "does not divide");
        check_error("head_dim", json!(255), "cannot be split into pairs");
        check_error("rms_norm_eps", json!(-1.0), "expected a positive number");
        check_error("layer_types", json!(["full_attention"]), "has 1 entries for 48 layers");
        check_error("layer_types", json!(["chunked_attention"]), "is not a list of");
        check_error("rope_scaling", json!({"rope_type": "yarn"}), "is `yarn`");
        check_error("rope_scaling", json!({"rope_type": "linear"}), "factor`: is missing");
        check_error("rope_scaling", json!([1]), "is missing or not an object");
        check_error("hidden_activation", json!("silu"), "expected `gelu_pytorch_tanh`");
        check_error("attn_logit_softcapping", json!(50.0), "which no supported encoder has");
        check_error("attention_bias", json!(true), "which no supported encoder has");
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
