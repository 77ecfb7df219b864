//! Tensors of Gemma 3, text part. The output head is tied to the embedding and not stored.

use serde_json::Value;

use super::{Fields, List, TensorSpec};
use crate::ModelError;

/// The language model of a `config.json` (its `text_config`).
///
/// # Errors
/// If the configuration lacks a number or has one that makes no sense.
pub fn gemma3(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let read = Fields::new("text_config", config.get("text_config").unwrap_or(config));
    let (hidden, inner) = (read.count("hidden_size")?, read.count("intermediate_size")?);
    let (heads, kv_heads) = (read.count("num_attention_heads")?, read.count("num_key_value_heads")?);
    let head_dim = read.count("head_dim")?;
    let mut list = List::below("language_model.model.");
    list.push("embed_tokens.weight", &[read.count("vocab_size")?, hidden]);
    list.push("norm.weight", &[hidden]);
    for layer in 0..read.layers("num_hidden_layers")? {
        let mut list = list.inside(&format!("layers.{layer}."));
        for norm in ["input", "post_attention", "pre_feedforward", "post_feedforward"] {
            list.push(&format!("{norm}_layernorm.weight"), &[hidden]);
        }
        list.linear("self_attn.q_proj", heads * head_dim, hidden, false);
        list.linear("self_attn.k_proj", kv_heads * head_dim, hidden, false);
        list.linear("self_attn.v_proj", kv_heads * head_dim, hidden, false);
        list.linear("self_attn.o_proj", hidden, heads * head_dim, false);
        list.push("self_attn.q_norm.weight", &[head_dim]);
        list.push("self_attn.k_norm.weight", &[head_dim]);
        list.linear("mlp.gate_proj", inner, hidden, false);
        list.linear("mlp.up_proj", inner, hidden, false);
        list.linear("mlp.down_proj", hidden, inner, false);
    }
    Ok(list.finish())
}
