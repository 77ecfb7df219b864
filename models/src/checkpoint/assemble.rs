//! Putting one [`Checkpoint`] together from files.
//!
//! Every file or folder becomes a [`Part`]: its tensors under canonical keys, and its configuration. A component is taken
//! whole from the first part that has it; parts are ordered so that explicitly named files come before the single file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::file::{self, WeightFile};
use super::layout::{self, Component, FileKind};
use super::{Checkpoint, diffusers};
use crate::ModelError;

/// Files of a model that were named one by one. At least one must be there.
#[derive(Clone, Debug, Default)]
pub struct ModelFiles {
    /// A single file with everything.
    pub checkpoint: Option<PathBuf>,
    /// The transformer and the text connectors.
    pub transformer: Option<PathBuf>,
    /// The text encoder with its projection; only the projection is part of the checkpoint.
    pub text_encoder: Option<PathBuf>,
    /// Replaces the video VAE: encoder, decoder and statistics.
    pub video_vae: Option<PathBuf>,
    /// The audio VAE and the vocoder.
    pub audio_vae: Option<PathBuf>,
    /// The duration head.
    pub duration_head: Option<PathBuf>,
    /// Configuration for files that were published without: the object that `config` would hold.
    pub config: Option<Map<String, Value>>,
}

/// A tensor of a part.
pub(super) struct Entry {
    /// Index into [`Part::files`].
    pub file: usize,
    /// Index into the tensors of its header.
    pub tensor: usize,
    /// What it belongs to.
    pub component: Component,
    /// Its canonical key.
    pub key: String,
}

/// What one file or component folder contributes.
#[derive(Default)]
pub(super) struct Part {
    /// Where it is, for messages.
    pub path: PathBuf,
    /// Its files.
    pub files: Vec<WeightFile>,
    /// Its tensors.
    pub entries: Vec<Entry>,
    /// Its configuration, with the names of the published single file.
    pub config: Option<Map<String, Value>>,
    /// `model_version`.
    pub model_version: Option<String>,
    /// `gemma_source_checkpoint.gemma_version`.
    pub gemma_version: Option<String>,
    /// Keys without a component, with the index of their file.
    pub ignored: Vec<(usize, String)>,
}

/// See [`Checkpoint::open`].
pub(super) fn open(path: &Path) -> Result<Checkpoint, ModelError> {
    let is_folder = path.is_dir();
    if is_folder && path.join("model_index.json").is_file() {
        return merge(path, diffusers::parts(path)?);
    }
    if !is_folder || file::has_index(path)? {
        let part = file_part(path, &Component::ALL, None)?;
        if part.entries.is_empty() {
            return Err(not_a_model(&part));
        }
        return merge(path, vec![part]);
    }
    open_files(&split_files(path)?).map(|checkpoint| Checkpoint { name: path.display().to_string(), ..checkpoint })
}

/// See [`Checkpoint::open_files`].
pub(super) fn open_files(files: &ModelFiles) -> Result<Checkpoint, ModelError> {
    use Component::*;
    // In order of precedence. The connectors and the projection may lie in either of two files.
    let roles: [(&Option<PathBuf>, &[Component]); 6] = [
        (&files.video_vae, &[VideoVae]),
        (&files.audio_vae, &[AudioVae, Vocoder]),
        (&files.duration_head, &[DurationHead]),
        (&files.transformer, &[Transformer, Connectors, TextProjection]),
        (&files.checkpoint, &Component::ALL),
        (&files.text_encoder, &[TextProjection, Connectors]),
    ];
    let mut parts = Vec::new();
    for (path, allowed) in roles {
        let Some(path) = path else { continue };
        let part = file_part(path, allowed, files.config.as_ref())?;
        if !part.entries.iter().any(|e| e.component == allowed[0]) {
            let found = part.files.first().map_or(FileKind::Other, FileKind::of);
            let problem = format!("holds no {}, but looks like {found:?}; name the right file", allowed[0].name());
            return Err(ModelError::file(path, problem));
        }
        parts.push(part);
    }
    let name = files.checkpoint.as_ref().or(files.transformer.as_ref()).or(parts.first().map(|p| &p.path)).cloned();
    match name {
        Some(name) => merge(&name, parts),
        None => Err(ModelError::config("files", "no file of a model was named; name at least one")),
    }
}

/// See [`Checkpoint::open_upsampler`].
pub(super) fn open_upsampler(path: &Path) -> Result<Checkpoint, ModelError> {
    let (files, config) = if path.is_dir() {
        diffusers::upsampler(path)?
    } else {
        let file = WeightFile::open(path)?;
        let config = file.metadata().config.clone();
        (vec![file], config.map(Value::Object).ok_or_else(|| without_config(path))?)
    };
    if config.get("_class_name").and_then(Value::as_str) != Some("LatentUpsampler") {
        return Err(ModelError::file(path, "is no latent upsampler; name the upsampler file of the model"));
    }
    let mut tensors = BTreeMap::new();
    for (f, file) in files.iter().enumerate() {
        for (t, tensor) in file.header().tensors.iter().enumerate() {
            if tensors.insert(tensor.key.clone(), (f, t)).is_some() {
                return Err(twice(path, &tensor.key));
            }
        }
    }
    let model_version = files.iter().find_map(|f| f.metadata().model_version.clone());
    let name = path.display().to_string();
    Ok(Checkpoint { name, files, tensors, config, model_version, gemma_version: None, ignored: Vec::new() })
}

/// The part that is one file, or its shards. `config` is used if they have none.
fn file_part(path: &Path, allowed: &[Component], config: Option<&Map<String, Value>>) -> Result<Part, ModelError> {
    let files = file::stored_in(path)?.iter().map(|path| WeightFile::open(path)).collect::<Result<Vec<_>, _>>()?;
    if files.iter().any(|file| FileKind::of(file) == FileKind::Adapter) {
        return Err(ModelError::file(
            path,
            "holds low-rank adapters and no model; name the model here, and this as LoRA",
        ));
    }
    // Without a configuration of its own, only the role tells that bare keys are those of a VAE.
    let is_named_vae = config.is_some() && allowed == [Component::VideoVae];
    let bare = files.iter().find_map(layout::bare_component).or(is_named_vae.then_some(Component::VideoVae));
    let metadata = || files.iter().map(WeightFile::metadata);
    let mut part = Part {
        path: path.into(),
        config: metadata().find_map(|m| m.config.clone()).or_else(|| config.cloned()),
        model_version: metadata().find_map(|m| m.model_version.clone()),
        gemma_version: metadata().find_map(|m| m.gemma_version.clone()),
        ..Part::default()
    };
    let has_encoder = metadata().any(|m| m.gemma_config.is_some());
    for (f, file) in files.iter().enumerate() {
        for (t, tensor) in file.header().tensors.iter().enumerate() {
            match layout::canonical(&tensor.key, bare) {
                Some((component, key)) if allowed.contains(&component) => {
                    part.entries.push(Entry { file: f, tensor: t, component, key });
                }
                // A component that another file was named for, or the encoder that is opened on its own.
                Some(_) => {}
                None if has_encoder => {}
                None => part.ignored.push((f, tensor.key.clone())),
            }
        }
    }
    part.files = files;
    Ok(part)
}

/// Joins `parts`, given in order of precedence.
pub(super) fn merge(name: &Path, parts: Vec<Part>) -> Result<Checkpoint, ModelError> {
    let mut provider: BTreeMap<Component, usize> = BTreeMap::new();
    for (p, part) in parts.iter().enumerate() {
        for entry in &part.entries {
            provider.entry(entry.component).or_insert(p);
        }
    }
    let mut config = Map::new();
    for (component, &p) in &provider {
        copy_sections(&mut config, *component, &parts[p])?;
    }
    let version_of = provider.get(&Component::Transformer).map(|&p| &parts[p]);
    let first = |get: fn(&Part) -> &Option<String>| {
        version_of.and_then(|p| get(p).clone()).or_else(|| parts.iter().find_map(|p| get(p).clone()))
    };
    let (model_version, gemma_version) = (first(|p| &p.model_version), first(|p| &p.gemma_version));

    let (mut files, mut tensors, mut ignored) = (Vec::new(), BTreeMap::new(), Vec::new());
    for (p, part) in parts.into_iter().enumerate() {
        let base = files.len();
        for entry in part.entries {
            if provider.get(&entry.component) != Some(&p) {
                continue;
            }
            if tensors.insert(entry.key.clone(), (base + entry.file, entry.tensor)).is_some() {
                return Err(twice(&part.path, &entry.key));
            }
        }
        ignored.extend(part.ignored.into_iter().map(|(f, key)| (base + f, key)));
        files.extend(part.files);
    }
    let config = Value::Object(config);
    Ok(Checkpoint { name: name.display().to_string(), files, tensors, config, model_version, gemma_version, ignored })
}

/// Copies the part of the configuration that describes `component`.
fn copy_sections(config: &mut Map<String, Value>, component: Component, part: &Part) -> Result<(), ModelError> {
    let (needed, optional) = component.sections();
    for section in needed {
        let Some(own) = &part.config else { return Err(without_config(&part.path)) };
        let Some(value) = own.get(*section) else {
            let problem = format!(
                "holds the {}, but its configuration has no `{section}`; use the file as published",
                component.name()
            );
            return Err(ModelError::file(&part.path, problem));
        };
        if !value.is_object() {
            let problem = format!("is {}, expected an object", super::metadata::kind(value));
            return Err(ModelError::config(*section, problem));
        }
        config.entry(*section).or_insert_with(|| value.clone());
    }
    for section in optional {
        if let Some(value) = part.config.as_ref().and_then(|own| own.get(*section)) {
            config.entry(*section).or_insert_with(|| value.clone());
        }
    }
    Ok(())
}

/// The split files in `folder` and the folders inside it, recognised by their content.
fn split_files(folder: &Path) -> Result<ModelFiles, ModelError> {
    let mut paths = Vec::new();
    for entry in file::list(folder)? {
        if entry.is_dir() {
            paths.extend(file::list(&entry)?.into_iter().filter(|p| file::is_safetensors(p)));
        } else if file::is_safetensors(&entry) {
            paths.push(entry);
        }
    }
    let mut found: BTreeMap<FileKind, Vec<PathBuf>> = BTreeMap::new();
    for path in paths {
        found.entry(FileKind::of(&WeightFile::open(&path)?)).or_default().push(path);
    }
    let mut take = |kind: FileKind| match found.remove(&kind).unwrap_or_default().as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        several => {
            let names: Vec<String> = several.iter().map(|p| format!("`{}`", p.display())).collect();
            let problem =
                format!("holds {} files of kind {kind:?}: {}; name one of them", several.len(), names.join(", "));
            Err(ModelError::file(folder, problem))
        }
    };
    let files = ModelFiles {
        checkpoint: take(FileKind::Single)?,
        transformer: take(FileKind::Transformer)?,
        text_encoder: take(FileKind::TextEncoder)?,
        video_vae: take(FileKind::VideoVae)?,
        audio_vae: take(FileKind::AudioVae)?,
        duration_head: take(FileKind::DurationHead)?,
        config: None,
    };
    if files.checkpoint.is_none() && files.transformer.is_none() {
        let problem = "holds neither `model_index.json` nor a safetensors file with a transformer; name the folder or file of \
                       the model";
        return Err(ModelError::file(folder, problem));
    }
    Ok(files)
}

fn without_config(path: &Path) -> ModelError {
    let problem = "has no `config` in its metadata, and shapes do not tell everything (RoPE precision, timestep scale); use the \
                   file as published, or write it anew with the metadata of that";
    ModelError::file(path, problem)
}

fn twice(path: &Path, key: &str) -> ModelError {
    let key = super::header::clip(key);
    ModelError::file(
        path,
        format!("has `{key}` twice, under two spellings or in two files; use the files as published"),
    )
}

fn not_a_model(part: &Part) -> ModelError {
    let kind = part.files.first().map_or(FileKind::Other, FileKind::of);
    let first = part.files.iter().flat_map(|f| &f.header().tensors).next().map_or("none", |t| t.key.as_str());
    let problem = format!(
        "is no part of an LTX-2 model (kind {kind:?}, first key `{}`); name a model file",
        super::header::clip(first)
    );
    ModelError::file(&part.path, problem)
}
