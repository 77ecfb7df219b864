//! Tensors of Gemma 3: language model, vision tower and projector. The output head is tied to the embedding and not stored.

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

/// The vision tower of a `config.json` (its `vision_config`), and the projector to the language model.
///
/// # Errors
/// As for [`gemma3`].
pub fn gemma3_vision(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let read = Fields::new("vision_config", &config["vision_config"]);
    let (width, inner) = (read.count("hidden_size")?, read.count("intermediate_size")?);
    let (colours, patch) = (read.count_or("num_channels", 3)?, read.count("patch_size")?);
    let side = read.count("image_size")? / patch;
    let mut list = List::below("");
    let hidden = Fields::new("text_config", &config["text_config"]).count("hidden_size")?;
    list.push("multi_modal_projector.mm_input_projection_weight", &[width, hidden]);
    list.push("multi_modal_projector.mm_soft_emb_norm.weight", &[width]);
    let mut tower = list.inside("vision_tower.vision_model.");
    tower.conv("embeddings.patch_embedding", width, colours, &[patch, patch], true);
    tower.push("embeddings.position_embedding.weight", &[side * side, width]);
    for layer in 0..read.layers("num_hidden_layers")? {
        let mut list = tower.inside(&format!("encoder.layers.{layer}."));
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            list.linear(&format!("self_attn.{name}"), width, width, true);
        }
        list.norm("layer_norm1", width);
        list.norm("layer_norm2", width);
        list.linear("mlp.fc1", inner, width, true);
        list.linear("mlp.fc2", width, inner, true);
    }
    tower.norm("post_layernorm", width);
    Ok(list.finish())
}
