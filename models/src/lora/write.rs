//! Dialects that LoRA files can be written in: names of layers and factors, and where alphas stand.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::keys::DIFFUSION;
use crate::checkpoint::diffusers_name;

/// A dialect that a file can be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrittenDialect {
    /// `diffusion_model.<layer>.lora_A.weight`; there is no alpha, so that the scale has to be in the factors.
    Official,
    /// The same with `alpha` tensors.
    ComfyUi,
    /// `transformer.<layer>` and `connectors.<layer>` in the words of diffusers; alphas in the header.
    Diffusers,
    /// `lora_unet_<layer>` with underscores for dots, and `alpha` tensors.
    Kohya,
    /// `base_model.model.<layer>` in the words of diffusers; alphas in `adapter_config.json`.
    Peft,
}

/// Keys of the tensors of one layer, and its name where settings name layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerKeys {
    /// Component of diffusers; empty where there is none.
    pub component: &'static str,
    /// Name in the component.
    pub name: String,
    /// Key of `down`, `[rank, inputs]`.
    pub down: String,
    /// Key of `up`, `[outputs, rank]`.
    pub up: String,
    /// Key of the alpha, where the dialect has such tensors.
    pub alpha: Option<String>,
}

/// What `dialect` calls the layer whose weight has the canonical key `key`; `None` if that is no weight of a layer.
pub fn layer_keys(dialect: WrittenDialect, key: &str) -> Option<LayerKeys> {
    let layer = key.strip_suffix(".weight")?;
    let official = layer.strip_prefix(DIFFUSION);
    let theirs = diffusers_name(layer);
    let (component, name) = match theirs.strip_prefix("connectors.") {
        Some(name) => ("connectors", name.to_string()),
        None => ("transformer", theirs.clone()),
    };
    let (component, name, module) = match dialect {
        WrittenDialect::Official | WrittenDialect::ComfyUi => {
            let module = official.map_or_else(|| layer.to_string(), |rest| format!("diffusion_model.{rest}"));
            ("", module.clone(), module)
        }
        WrittenDialect::Kohya => {
            let module = format!("lora_unet_{}", official.unwrap_or(layer).replace('.', "_"));
            ("", module.clone(), module)
        }
        WrittenDialect::Diffusers => (component, name.clone(), format!("{component}.{name}")),
        WrittenDialect::Peft => ("", theirs.clone(), format!("base_model.model.{theirs}")),
    };
    let [down, up] = if dialect == WrittenDialect::Kohya { ["lora_down", "lora_up"] } else { ["lora_A", "lora_B"] };
    let has_alpha = matches!(dialect, WrittenDialect::ComfyUi | WrittenDialect::Kohya);
    Some(LayerKeys {
        component,
        name,
        down: format!("{module}.{down}.weight"),
        up: format!("{module}.{up}.weight"),
        alpha: has_alpha.then(|| format!("{module}.alpha")),
    })
}

/// The settings that PEFT keeps for layers, given by name, rank and alpha: what most of them have, and what the others have.
pub fn adapter_settings(layers: &[(&str, usize, f64)]) -> Map<String, Value> {
    let rank = most_common(layers.iter().map(|layer| layer.1)).unwrap_or(1);
    // The order of bits is that of positive numbers, and any order will do.
    let alpha = most_common(layers.iter().map(|layer| layer.2.to_bits())).map_or(1.0, f64::from_bits);
    let ranks = layers.iter().filter(|layer| layer.1 != rank).map(|layer| (layer.0.to_string(), json!(layer.1)));
    let alphas = layers.iter().filter(|layer| layer.2 != alpha).map(|layer| (layer.0.to_string(), json!(layer.2)));
    let settings = json!({
        "peft_type": "LORA", "task_type": null, "base_model_name_or_path": null, "auto_mapping": null, "revision": null,
        "r": rank, "lora_alpha": alpha, "rank_pattern": ranks.collect::<Map<_, _>>(),
        "alpha_pattern": alphas.collect::<Map<_, _>>(), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": false,
        "use_rslora": false, "use_dora": false, "init_lora_weights": true, "inference_mode": true,
        "modules_to_save": null, "layers_to_transform": null, "layers_pattern": null,
        "target_modules": layers.iter().map(|layer| layer.0).collect::<Vec<_>>(),
    });
    match settings {
        Value::Object(settings) => settings,
        // The literal is an object.
        _ => Map::new(),
    }
}

/// The value that is there most often; of several the smallest.
fn most_common<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_default() += 1);
    counts.iter().max_by(|a, b| a.1.cmp(b.1).then(b.0.cmp(a.0))).map(|(value, _)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::keys::{names_of, without_prefixes};

    #[test]
    fn written_names_are_read_as_the_layer() {
        use WrittenDialect::*;
        for key in [
            "model.diffusion_model.transformer_blocks.3.attn1.to_out.0.weight",
            "model.diffusion_model.adaln_single.linear.weight",
            "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.1.attn1.to_q.weight",
            "text_embedding_projection.video_aggregate_embed.weight",
        ] {
            for dialect in [Official, ComfyUi, Diffusers, Kohya, Peft] {
                let keys = layer_keys(dialect, key).unwrap();
                let (module, _) = super::super::keys::split(&keys.down).unwrap();
                let names = names_of(key).unwrap();
                assert!(without_prefixes(module).any(|name| names.iter().any(|n| n == name)), "{module} of {names:?}");
            }
        }
        assert_eq!(layer_keys(Official, "model.diffusion_model.proj_out.bias"), None);
    }

    #[test]
    fn settings_are_those_of_most_layers() {
        let settings = adapter_settings(&[("a", 4, 4.0), ("b", 4, 2.0), ("c", 8, 4.0)]);
        assert_eq!((&settings["r"], &settings["lora_alpha"]), (&json!(4), &json!(4.0)));
        assert_eq!((&settings["rank_pattern"], &settings["alpha_pattern"]), (&json!({"c": 8}), &json!({"b": 2.0})));
    }
}
