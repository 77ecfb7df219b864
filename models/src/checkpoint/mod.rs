//! Checkpoints: the files people have, seen as one set of tensors with one configuration.
//!
//! A [`Checkpoint`] is opened from a published single file, from split files, from a folder of either, or from a diffusers
//! or FastVideo folder. It has the keys of the published single file ([`layout`]) and that file's `config`, and knows
//! where every tensor really is. Nothing of the weights is read: files are mapped, and only headers are looked at.
//!
//! Text encoders are separate ([`GemmaFolder`]), latent upsamplers are opened on their own
//! ([`Checkpoint::open_upsampler`]). Tensors in fp8 count as what they become when they are read: bf16, multiplied by the
//! `weight_scale` beside them. Other quantised layouts are not read here, except GGUF for comparisons ([`gguf`]).
//! [`layouts`] is the other direction: what the files of a layout are.
//!
//! *Invariant:* every location points into a file whose header was fully checked.

mod assemble;
mod diffusers;
mod diffusers_config;
mod diffusers_config_write;
mod diffusers_names;
mod file;
mod gemma;
pub mod generation;
pub mod gguf;
mod gguf_blocks;
pub mod header;
pub mod hub;
pub mod layout;
pub mod layouts;
mod metadata;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ltxc_ir::identity::FileIdentity;
use ltxc_ir::{DType, TensorType};
use serde_json::Value;

pub use assemble::ModelFiles;
pub(crate) use diffusers_names::diffusers_name;
pub use file::WeightFile;
pub(crate) use file::read_json;
pub use file::shards;
pub use gemma::{GemmaFamily, GemmaFolder};
pub use generation::{Generation, Version};
pub use header::{Header, StoredTensor, StoredType};
pub use layout::{Component, FileKind};
pub use metadata::Metadata;

use crate::{ModelError, TensorDirectory};

/// The files of a model, as one set of tensors under canonical keys.
pub struct Checkpoint {
    name: String,
    files: Vec<WeightFile>,
    /// Canonical key → index of the file and of the tensor in it.
    tensors: BTreeMap<String, (usize, usize)>,
    config: Value,
    model_version: Option<String>,
    gemma_version: Option<String>,
    ignored: Vec<(usize, String)>,
}

/// A tensor of a [`Checkpoint`] or [`GemmaFolder`].
#[derive(Clone, Copy, Debug)]
pub struct Location<'a> {
    /// Index of its file.
    pub file: usize,
    /// Key, type, shape and place in that file.
    pub stored: &'a StoredTensor,
}

impl Checkpoint {
    /// Opens `path`: a single file, one split file, the index of either's shards, or a folder (diffusers, FastVideo, split
    /// files, shards with their index, or one with a single file). Names of the Hugging Face hub go through [`hub::resolve`] first.
    ///
    /// # Errors
    /// If something is missing, ambiguous, damaged or without configuration; the message says what to do.
    pub fn open(path: &Path) -> Result<Checkpoint, ModelError> {
        assemble::open(path)
    }

    /// Opens the named files. Explicit components win over those of the single file.
    ///
    /// # Errors
    /// As for [`Checkpoint::open`].
    pub fn open_files(files: &ModelFiles) -> Result<Checkpoint, ModelError> {
        assemble::open_files(files)
    }

    /// Opens a latent upsampler: a published file, or a diffusers `latent_upsampler` folder. Its keys have no prefix, and
    /// [`Checkpoint::config`] is its own configuration.
    ///
    /// # Errors
    /// If it is none, or damaged.
    pub fn open_upsampler(path: &Path) -> Result<Checkpoint, ModelError> {
        assemble::open_upsampler(path)
    }

    /// What messages call it: the path it was opened from.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its files, in the order that [`Location::file`] counts.
    pub fn files(&self) -> &[WeightFile] {
        &self.files
    }

    /// The configuration, as in the metadata of the published single file.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The sub-object `name` of the configuration.
    ///
    /// # Errors
    /// If the files have none, that is, if the component is not in them.
    pub fn section(&self, name: &str) -> Result<&Value, ModelError> {
        self.config.get(name).ok_or_else(|| {
            ModelError::config(name, format!("`{}` has no such part; name the file that has it", self.name))
        })
    }

    /// `model_version` as written; for diffusers folders, which have none, the first version with these switches.
    pub fn model_version(&self) -> Option<&str> {
        self.model_version.as_deref()
    }

    /// The generation that decides on defaults.
    pub fn generation(&self) -> Generation {
        Generation::of(&self.version())
    }

    /// The version, parsed.
    pub fn version(&self) -> Version {
        self.model_version.as_deref().map(Version::parse).unwrap_or_default()
    }

    /// The text encoder that the transformer was trained with (`gemma_version` of LTX-2.5).
    pub fn gemma_version(&self) -> Option<&str> {
        self.gemma_version.as_deref()
    }

    /// Whether a file was written by [`crate::synth`], so that results mean nothing.
    pub fn is_synthetic(&self) -> bool {
        self.files.iter().any(|f| f.metadata().is_synthetic)
    }

    /// The tensor with the canonical key `key`.
    pub fn tensor(&self, key: &str) -> Option<Location<'_>> {
        let &(file, tensor) = self.tensors.get(key)?;
        Some(Location { file, stored: self.files.get(file)?.header().tensors.get(tensor)? })
    }

    /// All tensors by canonical key, sorted.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Location<'_>)> {
        self.tensors.keys().filter_map(|key| Some((key.as_str(), self.tensor(key)?)))
    }

    /// The key that the file has for the canonical `key`; `key` itself if there is no such tensor.
    pub fn actual_key(&self, key: &str) -> String {
        self.tensor(key).map_or_else(|| key.to_string(), |found| found.stored.key.clone())
    }

    /// The bytes of the tensor `key`.
    pub fn data(&self, key: &str) -> Option<&[u8]> {
        let found = self.tensor(key)?;
        Some(self.files.get(found.file)?.data(found.stored))
    }

    /// Keys that belong to no component, with the index of their file: reported, never used.
    pub fn ignored(&self) -> &[(usize, String)] {
        &self.ignored
    }

    /// Tensors whose element type graphs do not know, with the name of the type. A builder that needs one finds it
    /// missing.
    pub fn unsupported(&self) -> impl Iterator<Item = (&str, StoredType)> {
        self.tensors().filter(|(_, found)| found.stored.ty().is_none()).map(|(key, found)| (key, found.stored.dtype))
    }

    /// Whether the tensor `key` is stored in fp8.
    pub fn is_fp8(&self, key: &str) -> bool {
        self.tensor(key).is_some_and(|found| is_fp8(found.stored))
    }

    /// Whether any tensor is stored in fp8.
    pub fn has_fp8(&self) -> bool {
        self.tensors().any(|(_, found)| is_fp8(found.stored))
    }

    /// What is wrong with the scales of the fp8 tensor `key`, if something is.
    fn fp8_problem(&self, key: &str) -> Option<String> {
        let problem = |end: &str, found: &StoredTensor| {
            format!("fp8 with `{key}{end}` {} {:?}, expected one f32 for all of it", found.dtype, found.shape)
        };
        if let Some(second) = self.tensor(&format!("{key}_scale_2")) {
            return Some(problem("_scale_2", second.stored));
        }
        let scale = self.tensor(&format!("{key}_scale"))?.stored;
        let is_scalar = scale.dtype == StoredType::Known(DType::F32) && scale.bytes == 4;
        (!is_scalar).then(|| problem("_scale", scale))
    }

    /// The identity of every file; `full` reads all of them.
    ///
    /// # Errors
    /// If a file changed since it was opened.
    pub fn identities(&self, full: bool) -> Result<Vec<FileIdentity>, ModelError> {
        self.files.iter().map(|f| f.identity(full)).collect()
    }

    /// Paths of the files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|f| f.path().to_path_buf()).collect()
    }
}

impl TensorDirectory for Checkpoint {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        let stored = self.tensor(key)?.stored;
        match is_fp8(stored) {
            true if self.fp8_problem(key).is_some() => None,
            true => Some(TensorType::new(DType::BF16, stored.shape.clone())),
            false => stored.ty(),
        }
    }

    fn unsupported_type(&self, key: &str) -> Option<String> {
        let stored = self.tensor(key)?.stored;
        let unknown = || stored.ty().is_none().then(|| stored.dtype.to_string());
        self.fp8_problem(key).filter(|_| is_fp8(stored)).or_else(unknown)
    }
}

fn is_fp8(stored: &StoredTensor) -> bool {
    matches!(stored.dtype, StoredType::Known(DType::F8E4M3 | DType::F8E5M2))
}
