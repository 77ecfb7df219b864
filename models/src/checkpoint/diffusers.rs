//! Diffusers and FastVideo folders: one sub-folder per component, other key names.
//!
//! Names go back to the official ones (`diffusers_names`). Components that diffusers stores with another split of the same numbers (the diffusion decoder
//! and the duration head, whose fused projections it cuts in three) have no key in the official names and are left out:
//! use the published files for them.
//!
//! FastVideo keeps the official names without prefix, which is recognised by the keys.

use std::path::Path;

use serde_json::{Map, Value};

use super::assemble::{Entry, Part};
use super::diffusers_config as config;
use super::diffusers_names::{official, prefix};
use super::file::{self, WeightFile};
use super::layout::{self, Component};
use super::metadata::Metadata;
use crate::ModelError;

/// The sub-folders that are read, and the component whose keys they hold (connectors also hold the projection).
const FOLDERS: [(&str, Component); 6] = [
    ("transformer", Component::Transformer),
    ("connectors", Component::Connectors),
    ("text_embedding_projection", Component::TextProjection),
    ("vae", Component::VideoVae),
    ("audio_vae", Component::AudioVae),
    ("vocoder", Component::Vocoder),
];

/// The parts of the folder `root`, which has a `model_index.json`.
pub(super) fn parts(root: &Path) -> Result<Vec<Part>, ModelError> {
    let index = root.join("model_index.json");
    if !file::read_json(&index)?.is_object() {
        return Err(ModelError::file(&index, "is no JSON object; download it again"));
    }
    let mut parts = Vec::new();
    for (name, component) in FOLDERS {
        let folder = root.join(name);
        if folder.is_dir() {
            parts.push(component_part(&folder, component)?);
        }
    }
    let Some(transformer) = parts.iter().position(|p| p.entries.iter().any(|e| e.component == Component::Transformer))
    else {
        return Err(ModelError::file(root, "has no `transformer` folder with weights; download the whole folder"));
    };
    join_connector_config(&mut parts, transformer);
    Ok(parts)
}

/// The configuration of `folder`, and its files, for a `latent_upsampler` folder.
pub(super) fn upsampler(folder: &Path) -> Result<(Vec<WeightFile>, Value), ModelError> {
    let path = folder.join("config.json");
    let config = config::upsampler(&object(&path)?)?;
    Ok((open_all(folder)?, config))
}

fn component_part(folder: &Path, component: Component) -> Result<Part, ModelError> {
    let files = open_all(folder)?;
    let is_official = files.iter().any(|f| has_official_keys(f, component));
    let is_bare = files.iter().flat_map(|f| &f.header().tensors).any(|t| layout::canonical(&t.key, None).is_none());
    let config = match component {
        Component::TextProjection => Map::new(),
        _ => component_config(&folder.join("config.json"), component)?,
    };
    let blocks = encoder_blocks(&files);
    // Nobody but ltxc writes versions into the headers of such folders.
    let written = |of: fn(&Metadata) -> &Option<String>| files.iter().find_map(|f| of(f.metadata()).clone());
    let mut part = Part {
        path: folder.into(),
        model_version: written(|m| &m.model_version).or_else(|| version(&config)),
        gemma_version: written(|m| &m.gemma_version),
        ..Part::default()
    };
    for (f, file) in files.iter().enumerate() {
        for (t, tensor) in file.header().tensors.iter().enumerate() {
            let key = if is_official {
                with_prefix(&tensor.key, component, is_bare)
            } else {
                official(&tensor.key, component, blocks)
            };
            match layout::canonical(&key, None) {
                Some((component, key)) => part.entries.push(Entry { file: f, tensor: t, component, key }),
                None => part.ignored.push((f, tensor.key.clone())),
            }
        }
    }
    part.config = Some(config);
    part.files = files;
    Ok(part)
}

/// Official files have the settings of transformer and connectors in one object; diffusers has two.
fn join_connector_config(parts: &mut [Part], transformer: usize) {
    let connectors = parts.iter().position(|p| p.path.ends_with("connectors"));
    let section = |part: &Part| part.config.as_ref()?.get("transformer")?.as_object().cloned();
    let Some(connectors) = connectors.filter(|&c| c != transformer) else { return };
    let (Some(mut both), Some(more)) = (section(&parts[transformer]), section(&parts[connectors])) else { return };
    for (key, value) in more {
        both.entry(key).or_insert(value);
    }
    for part in [transformer, connectors] {
        let config = parts[part].config.get_or_insert_default();
        config.insert("transformer".into(), Value::Object(both.clone()));
    }
}

fn open_all(folder: &Path) -> Result<Vec<WeightFile>, ModelError> {
    let paths = file::shards(folder, "")?;
    if paths.is_empty() {
        return Err(ModelError::file(folder, "holds no `.safetensors` file; download the whole folder"));
    }
    paths.iter().map(|p| WeightFile::open(p)).collect()
}

fn object(path: &Path) -> Result<Map<String, Value>, ModelError> {
    match file::read_json(path)? {
        Value::Object(object) => Ok(object),
        _ => Err(ModelError::file(path, "is no JSON object; download it again")),
    }
}

/// The configuration under the names of the single file: converted, or taken as it is if it has these names already.
fn component_config(path: &Path, component: Component) -> Result<Map<String, Value>, ModelError> {
    let own = object(path)?;
    let (section, marker) = match component {
        Component::Transformer => ("transformer", "positional_embedding_max_pos"),
        Component::Connectors => ("transformer", "connector_positional_embedding_max_pos"),
        Component::VideoVae => ("vae", "decoder_blocks"),
        Component::AudioVae => ("audio_vae", "model"),
        _ => ("vocoder", "upsample_initial_channel"),
    };
    // The nested settings of a vocoder have a `vocoder` inside, beside `bwe`.
    let is_nested = own.contains_key("bwe");
    if own.get(section).is_some_and(Value::is_object) && !is_nested {
        return Ok(own);
    }
    let value = if own.contains_key(marker) || is_nested {
        Value::Object(own)
    } else {
        match component {
            Component::Transformer => config::transformer(&own)?,
            Component::Connectors => config::connectors(&own)?,
            Component::VideoVae => config::video_vae(&own)?,
            Component::AudioVae => config::audio_vae(&own)?,
            _ => config::vocoder(&own)?,
        }
    };
    Ok(Map::from_iter([(section.to_string(), value)]))
}

/// The first version whose transformer has these switches; diffusers folders do not record one.
fn version(config: &Map<String, Value>) -> Option<String> {
    let transformer = config.get("transformer")?;
    transformer.get("num_layers")?;
    let is = |key: &str, value: bool| transformer.get(key).and_then(Value::as_bool) == Some(value);
    Some(
        if is("use_keyframes_abs_pos_embedding", true) || is("ff_bias", false) {
            "2.5.0"
        } else if is("cross_attention_adaln", true) {
            "2.3.0"
        } else {
            "2.0.0"
        }
        .into(),
    )
}

fn has_official_keys(file: &WeightFile, component: Component) -> bool {
    let keys = || file.header().tensors.iter().map(|t| t.key.as_str());
    let has = |part: &str| keys().any(|k| k.split('.').any(|s| s == part));
    match component {
        Component::Transformer => has("adaln_single"),
        Component::Connectors => has("transformer_1d_blocks") || has("text_embedding_projection"),
        Component::TextProjection => true,
        Component::VideoVae => has("res_blocks") || has("per_channel_statistics"),
        Component::AudioVae => has("per_channel_statistics"),
        _ => has("conv_pre"),
    }
}

/// An official key with the prefix of its component, which FastVideo leaves out (`is_bare`).
///
/// A bare vocoder of LTX-2.3 has keys that look like those of LTX-2 with prefix, so there the key alone does not tell.
fn with_prefix(key: &str, component: Component, is_bare: bool) -> String {
    let is_complete = layout::canonical(key, None).is_some() && component != Component::Vocoder;
    if !is_bare || is_complete { key.into() } else { format!("{}{key}", prefix(component)) }
}

/// Number of encoder blocks that end in a downsampler.
fn encoder_blocks(files: &[WeightFile]) -> usize {
    let index = |key: &str| key.strip_prefix("encoder.down_blocks.")?.split('.').next()?.parse::<usize>().ok();
    let all = files.iter().flat_map(|f| &f.header().tensors).filter_map(|t| index(&t.key));
    all.max().map_or(0, |last| last.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_come_back() {
        let check = |key: &str, is_bare: bool| with_prefix(key, Component::Vocoder, is_bare);
        assert_eq!(check("vocoder.conv_pre.bias", true), "vocoder.vocoder.conv_pre.bias");
        assert_eq!(check("conv_pre.bias", true), "vocoder.conv_pre.bias");
        assert_eq!(check("vocoder.conv_pre.bias", false), "vocoder.conv_pre.bias");
        let projection = "text_embedding_projection.aggregate_embed.weight";
        assert_eq!(with_prefix(projection, Component::Connectors, true), projection);
        assert_eq!(with_prefix("aggregate_embed.weight", Component::TextProjection, true), projection);
    }
}
