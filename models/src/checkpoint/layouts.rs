//! Layouts that a checkpoint can be written in: which file a tensor goes to, under which key, and what stands beside.
//!
//! Nothing is written here. [`lay_out`] says what the files are, and whoever writes them brings the bytes.
//!
//! # Easy to get wrong
//! - Split files of a video VAE have bare keys, all others those of the single file.
//! - Every split file has the sections of `config` that its components need, and the other strings of the header.
//! - Diffusers has no place for some statistics of VAEs that no network reads; they are left out and named.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::diffusers_config_write as config;
use super::diffusers_names::in_diffusers;
use super::layout::{self, Component};
use super::{Checkpoint, header::clip};
use crate::{Listed, ModelError};

/// How the files of a model are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One file with everything, as LTX-2 and LTX-2.3 were published.
    Single,
    /// A file for the transformer with its text connectors, and one for each of the others, as LTX-2.5 was published.
    Split,
    /// A folder for each component with a configuration beside the weights.
    Diffusers,
}

/// A file of a layout.
#[derive(Clone, Debug, PartialEq)]
pub struct LaidOutFile {
    /// Where it is in the folder; empty for a single file.
    pub path: PathBuf,
    /// Strings of its header.
    pub metadata: BTreeMap<String, String>,
    /// Keys in this file, with the index of each tensor among those that were laid out.
    pub members: Vec<(String, usize)>,
}

/// The files of a layout.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LaidOut {
    /// Files with weights.
    pub files: Vec<LaidOutFile>,
    /// JSON files beside them, by their paths in the folder.
    pub side_files: Vec<(PathBuf, Value)>,
    /// Keys that the layout has no place for and nothing reads.
    pub left_out: Vec<String>,
}

/// Largest file of a diffusers folder; larger components are cut into shards with an index.
const SHARD: u64 = 5_000_000_000; // scripts/convert_ltx2_to_diffusers.py (huggingface/diffusers @ 58eb52c), max_shard_size

/// Strings of a header that belong to one layout, or to text encoders that are not part of a checkpoint.
fn is_of_one_layout(key: &str) -> bool {
    ["config", "format", "gemma_config"].contains(&key)
        || key.starts_with("tokenizer_")
        || key.starts_with("hf_asset__")
}

/// Arranges `tensors`, given by canonical key and length in bytes, as `layout` has them.
///
/// - `name`: what the names of split files begin with.
/// - `training`: whether the model is a distilled one, if that is known; a diffusers folder says so in its scheduler.
///
/// # Errors
/// Settings or tensors that the layout has no place for, or components that it cannot do without.
pub fn lay_out(
    checkpoint: &Checkpoint,
    layout: Layout,
    name: &str,
    tensors: &[(String, u64)],
    training: Option<bool>,
) -> Result<LaidOut, ModelError> {
    let strings = strings(checkpoint);
    match layout {
        Layout::Single => {
            let members = tensors.iter().enumerate().map(|(i, (key, _))| (key.clone(), i)).collect();
            let metadata = with_config(&strings, checkpoint.config());
            Ok(LaidOut { files: vec![LaidOutFile { path: PathBuf::new(), metadata, members }], ..LaidOut::default() })
        }
        Layout::Split => Ok(split(checkpoint, name, tensors, &strings)),
        Layout::Diffusers => diffusers(checkpoint, tensors, strings, training),
    }
}

/// What headers say besides the configuration: the strings of the file with the transformer, or of the first.
fn strings(checkpoint: &Checkpoint) -> BTreeMap<String, String> {
    let transformer = checkpoint.tensors().find(|(key, _)| component(key) == Some(Component::Transformer));
    let file = checkpoint.files().get(transformer.map_or(0, |(_, at)| at.file));
    let all = file.map(|file| file.header().metadata.clone()).unwrap_or_default();
    let mut strings: BTreeMap<_, _> = all.into_iter().filter(|(key, _)| !is_of_one_layout(key)).collect();
    if let Some(version) = checkpoint.model_version() {
        strings.entry("model_version".into()).or_insert_with(|| version.into());
    }
    strings
}

fn with_config(strings: &BTreeMap<String, String>, config: &Value) -> BTreeMap<String, String> {
    let mut all = strings.clone();
    all.insert("config".into(), config.to_string());
    all
}

fn component(key: &str) -> Option<Component> {
    layout::canonical(key, None).map(|(component, _)| component)
}

/// The file of each component: folder, and what stands behind the name of the model.
fn split_place(component: Component) -> (&'static str, &'static str) {
    match component {
        Component::Transformer | Component::Connectors | Component::TextProjection => {
            ("diffusion_models", "transformer")
        }
        Component::VideoVae => ("vae", "video-vae"),
        Component::AudioVae | Component::Vocoder => ("vae", "audio-vae"),
        Component::DurationHead => ("model_patches", "duration-head"),
    }
}

fn split(
    checkpoint: &Checkpoint,
    name: &str,
    tensors: &[(String, u64)],
    strings: &BTreeMap<String, String>,
) -> LaidOut {
    type Found = (BTreeSet<Component>, Vec<(String, usize)>);
    let mut files: BTreeMap<(&str, &str), Found> = BTreeMap::new();
    for (i, (key, _)) in tensors.iter().enumerate() {
        let Some(component) = component(key) else { continue };
        let (components, members) = files.entry(split_place(component)).or_default();
        let bare = key.strip_prefix("vae.").filter(|_| component == Component::VideoVae);
        components.insert(component);
        members.push((bare.unwrap_or(key).to_string(), i));
    }
    let files = files.into_iter().map(|((folder, end), (components, members))| {
        let wanted = components.iter().flat_map(|c| [c.sections().0, c.sections().1].concat());
        let sections = wanted.filter_map(|section| Some((section.into(), checkpoint.config().get(section)?.clone())));
        let config = Value::Object(sections.collect::<Map<String, Value>>());
        let path = [folder, &format!("{name}-{end}.safetensors")].iter().collect();
        LaidOutFile { path, metadata: with_config(strings, &config), members }
    });
    LaidOut { files: files.collect(), ..LaidOut::default() }
}

fn diffusers(
    checkpoint: &Checkpoint,
    tensors: &[(String, u64)],
    mut metadata: BTreeMap<String, String>,
    training: Option<bool>,
) -> Result<LaidOut, ModelError> {
    // Other loaders ask for this one; what ltxc needs of a header does not disturb them.
    metadata.insert("format".into(), "pt".into());
    let blocks = checkpoint.config().pointer("/vae/encoder_blocks").and_then(Value::as_array);
    let blocks = blocks.map_or(0, |list| list.len() / 2);
    let mut folders: BTreeMap<&str, Vec<(String, usize)>> = BTreeMap::new();
    let mut out = LaidOut::default();
    let mut without_name = Vec::new();
    for (i, (key, _)) in tensors.iter().enumerate() {
        match component(key).and_then(|component| in_diffusers(key, component, blocks)) {
            Some((folder, name)) => folders.entry(folder).or_default().push((name, i)),
            None if key.contains(".per_channel_statistics.") => out.left_out.push(key.clone()),
            None => without_name.push(format!("`{}`", clip(key))),
        }
    }
    if !without_name.is_empty() {
        let problem = format!(
            "{} of the tensors of `{}` have no name in a diffusers folder; write a single file or split files instead:{}",
            without_name.len(),
            checkpoint.name(),
            Listed(without_name)
        );
        return Err(ModelError::config("files", problem));
    }
    if !folders.contains_key("transformer") {
        let problem =
            format!("`{}` has no transformer, which a diffusers folder needs; name all files", checkpoint.name());
        return Err(ModelError::config("files", problem));
    }
    let transformer = config::transformer(checkpoint)?;
    let mut vocoder = None;
    for (folder, members) in &folders {
        let config = match *folder {
            "transformer" => transformer.clone(),
            "connectors" => config::connectors(checkpoint, &transformer)?,
            "vae" => config::video_vae(checkpoint)?,
            "audio_vae" => config::audio_vae(checkpoint)?,
            _ => vocoder.insert(config::vocoder(checkpoint)?).clone(),
        };
        out.side_files.push(([folder, "config.json"].iter().collect(), Value::Object(config)));
        shards(folder, members, tensors, &metadata, &mut out);
    }
    let mut names: Vec<&str> = folders.keys().copied().collect();
    if let Some(is_distilled) = training {
        out.side_files.push(("scheduler/scheduler_config.json".into(), config::scheduler(is_distilled)));
        names.push("scheduler");
    }
    out.side_files.push(("model_index.json".into(), config::model_index(&names, vocoder.as_ref())));
    Ok(out)
}

/// The files of one component, with an index if there are several.
fn shards(
    folder: &str,
    members: &[(String, usize)],
    tensors: &[(String, u64)],
    metadata: &BTreeMap<String, String>,
    out: &mut LaidOut,
) {
    const STEM: &str = "diffusion_pytorch_model";
    let bytes = |index: usize| tensors.get(index).map_or(0, |(_, bytes)| *bytes);
    let (mut shards, mut filled, mut total): (Vec<Vec<(String, usize)>>, u64, u64) = (vec![Vec::new()], 0, 0);
    for member in members {
        let more = bytes(member.1);
        total = total.saturating_add(more);
        if filled > 0 && filled.saturating_add(more) > SHARD {
            shards.push(Vec::new());
            filled = 0;
        }
        filled = filled.saturating_add(more);
        if let Some(last) = shards.last_mut() {
            last.push(member.clone());
        }
    }
    let (count, mut map) = (shards.len(), Map::new());
    for (i, members) in shards.into_iter().enumerate() {
        let name = match count {
            1 => format!("{STEM}.safetensors"),
            _ => format!("{STEM}-{:05}-of-{count:05}.safetensors", i + 1),
        };
        map.extend(members.iter().map(|(key, _)| (key.clone(), json!(name))));
        out.files.push(LaidOutFile { path: [folder, &name].iter().collect(), metadata: metadata.clone(), members });
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        out.side_files.push(([folder, &format!("{STEM}.safetensors.index.json")].iter().collect(), index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_components_are_cut_into_shards() {
        let members: Vec<(String, usize)> = ["a", "b", "c", "d"].map(String::from).into_iter().zip(0..).collect();
        let sizes = [3_000_000_000u64, 2_000_000_000, 1, 9_000_000_000];
        let tensors: Vec<(String, u64)> = members.iter().map(|m| m.0.clone()).zip(sizes).collect();
        let mut out = LaidOut::default();
        shards("vae", &members, &tensors, &BTreeMap::new(), &mut out);
        let files: Vec<(String, Vec<usize>)> = (out.files.iter())
            .map(|f| (f.path.display().to_string(), f.members.iter().map(|m| m.1).collect()))
            .collect();
        let name = |i: usize| format!("vae/diffusion_pytorch_model-0000{i}-of-00003.safetensors");
        assert_eq!(files, [(name(1), vec![0, 1]), (name(2), vec![2]), (name(3), vec![3])]);
        let [(path, index)] = &out.side_files[..] else { panic!("one index") };
        assert!(path.ends_with("diffusion_pytorch_model.safetensors.index.json"));
        assert_eq!(index["weight_map"]["c"], "diffusion_pytorch_model-00002-of-00003.safetensors");
        assert_eq!(index["metadata"]["total_size"], sizes.iter().sum::<u64>());
        let mut one = LaidOut::default();
        shards("vae", &members[2..3], &tensors, &BTreeMap::new(), &mut one);
        assert!(one.side_files.is_empty() && one.files[0].path.ends_with("diffusion_pytorch_model.safetensors"));
    }
}
