//! The text encoder: a Hugging Face folder, or the single file that LTX-2.5 bundles it in.
//!
//! Keys of the language model are canonical under `language_model.model.`, whichever of the four spellings in use the
//! files have; those of the vision tower and its projector have no `model.` in front. Everything else (projections, side
//! files) keeps its key.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ltxc_ir::TensorType;
use ltxc_ir::identity::FileIdentity;
use serde_json::Value;

use super::file::{self, WeightFile};
use super::{Checkpoint, Location};
use crate::{ModelError, TensorDirectory};

/// Canonical prefix of the language model.
const TEXT: &str = "language_model.model.";

/// Canonical prefixes of what sees images.
const VISION: [&str; 2] = ["vision_tower.", "multi_modal_projector."];

/// Which architecture a text encoder has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GemmaFamily {
    /// Gemma 3 (LTX-2 and LTX-2.3).
    Gemma3,
    /// Gemma 4 unified (LTX-2.5).
    Gemma4,
}

/// Where the tokenizer is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Tokenizer {
    /// Files in this folder.
    Folder(PathBuf),
    /// Tensors and metadata of the weight file.
    Bundled,
}

/// A text encoder: configuration, tokenizer and tensors.
pub struct GemmaFolder {
    path: PathBuf,
    config: Value,
    family: GemmaFamily,
    tokenizer: Tokenizer,
    files: Vec<WeightFile>,
    /// Canonical key → index of the file and of the tensor in it.
    tensors: BTreeMap<String, (usize, usize)>,
}

impl GemmaFolder {
    /// Opens a Hugging Face folder (sharded or not), a diffusers or FastVideo folder that contains one, or a bundled file.
    ///
    /// # Errors
    /// If something is missing or damaged, or the model is of another family.
    pub fn open(path: &Path) -> Result<GemmaFolder, ModelError> {
        if !path.is_dir() {
            let file = WeightFile::open(path)?;
            let Some(config) = file.metadata().gemma_config.clone() else {
                let problem =
                    "has no `gemma_config` in its metadata; name the folder that has `config.json` and the tokenizer";
                return Err(ModelError::file(path, problem));
            };
            return GemmaFolder::new(path, config, Tokenizer::Bundled, vec![file]);
        }
        let inside = ["", "text_encoder", "text_encoder/gemma"].map(|sub| path.join(sub));
        let Some(folder) = inside.iter().find(|f| f.join("config.json").is_file()) else {
            return Err(ModelError::file(path, "has no `config.json`; name the folder of the Gemma model"));
        };
        let config = file::read_json(&folder.join("config.json"))?;
        let shards = match file::shards(folder, "model")? {
            none if none.is_empty() => file::shards(folder, "")?,
            some => some,
        };
        if shards.is_empty() {
            return Err(ModelError::file(folder, "holds no `.safetensors` file; download the whole folder"));
        }
        let files = shards.iter().map(|p| WeightFile::open(p)).collect::<Result<Vec<_>, _>>()?;
        let places = [folder.clone(), path.join("tokenizer"), folder.join("../tokenizer")];
        let tokenizer = places.into_iter().find(|p| p.join("tokenizer.json").is_file()).unwrap_or(folder.clone());
        GemmaFolder::new(folder, config, Tokenizer::Folder(tokenizer), files)
    }

    fn new(
        path: &Path,
        config: Value,
        tokenizer: Tokenizer,
        files: Vec<WeightFile>,
    ) -> Result<GemmaFolder, ModelError> {
        let family = family(path, &config)?;
        let mut tensors = BTreeMap::new();
        for (f, file) in files.iter().enumerate() {
            for (t, tensor) in file.header().tensors.iter().enumerate() {
                if tensors.insert(canonical(&tensor.key), (f, t)).is_some() {
                    let key = super::header::clip(&tensor.key);
                    let problem = format!(
                        "has `{key}` twice, under two spellings or in two files; keep one set of weights in it"
                    );
                    return Err(ModelError::file(path, problem));
                }
            }
        }
        if !tensors.contains_key("language_model.model.embed_tokens.weight") {
            let problem =
                "has no `embed_tokens.weight`, so it is no language model; name the folder of the Gemma model";
            return Err(ModelError::file(path, problem));
        }
        Ok(GemmaFolder { path: path.into(), config, family, tokenizer, files, tensors })
    }

    /// The folder or file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The architecture.
    pub fn family(&self) -> GemmaFamily {
        self.family
    }

    /// `config.json`, or the `gemma_config` of a bundled file.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The settings of the language model: `text_config`, or the whole of a text-only configuration.
    pub fn text_config(&self) -> &Value {
        self.config.get("text_config").unwrap_or(&self.config)
    }

    /// The fine-tune it declares to be (`gemma_version`, LTX-2.5).
    pub fn gemma_version(&self) -> Option<&str> {
        self.config.get("gemma_version").and_then(Value::as_str)
    }

    /// Its files, in the order that [`Location::file`] counts.
    pub fn files(&self) -> &[WeightFile] {
        &self.files
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

    /// Path of `tokenizer.json`, if it is a file of its own.
    pub fn tokenizer_path(&self) -> Option<PathBuf> {
        match &self.tokenizer {
            Tokenizer::Folder(folder) => Some(folder.join("tokenizer.json")),
            Tokenizer::Bundled => None,
        }
    }

    /// The bytes of `tokenizer.json`.
    ///
    /// # Errors
    /// If there is none.
    pub fn tokenizer_json(&self) -> Result<Cow<'_, [u8]>, ModelError> {
        self.side_file("tokenizer.json", "tokenizer_json")
    }

    /// `tokenizer_config.json`: names of the special tokens.
    ///
    /// # Errors
    /// If there is none, or it is no JSON.
    pub fn tokenizer_config(&self) -> Result<Value, ModelError> {
        let bytes = self.side_file("tokenizer_config.json", "hf_asset__tokenizer_config.json")?;
        let problem = |e| {
            ModelError::file(&self.path, format!("`tokenizer_config.json` is not valid JSON: {e}; download it again"))
        };
        serde_json::from_slice(&bytes).map_err(problem)
    }

    /// `preprocessor_config.json`: how images are prepared. Folders without one use the defaults.
    ///
    /// # Errors
    /// If it cannot be read, or is no JSON.
    pub fn preprocessor_config(&self) -> Result<Option<Value>, ModelError> {
        let Tokenizer::Folder(tokenizer) = &self.tokenizer else { return Ok(None) };
        let mut files = [&self.path, tokenizer].map(|folder| folder.join("preprocessor_config.json")).into_iter();
        files.find(|path| path.is_file()).map(|path| file::read_json(&path)).transpose()
    }

    /// The file `name` beside the weights, or the tensor or metadata entry `bundled` of the weight file.
    fn side_file(&self, name: &str, bundled: &str) -> Result<Cow<'_, [u8]>, ModelError> {
        match &self.tokenizer {
            Tokenizer::Folder(folder) => file::read_side_file(&folder.join(name)).map(Cow::Owned),
            Tokenizer::Bundled => {
                let found = self.files.iter().find_map(|f| {
                    let as_tensor = f.header().tensor(bundled).map(|t| f.data(t));
                    as_tensor.or_else(|| f.header().metadata.get(bundled).map(String::as_bytes))
                });
                let missing =
                    || ModelError::file(&self.path, format!("bundles no `{name}`; use the file as published"));
                found.map(Cow::Borrowed).ok_or_else(missing)
            }
        }
    }

    /// Whether this is the text encoder that `checkpoint` was trained with. Gives a warning where neither side says.
    ///
    /// # Errors
    /// If it is another one: results would be wrong without a visible sign.
    ///
    /// Source: text_encoders/gemma (Lightricks/LTX-2, release 1.2.0), check of `gemma_source_checkpoint`.
    pub fn check_pairing(&self, checkpoint: &Checkpoint) -> Result<Option<String>, ModelError> {
        let own = self.gemma_version();
        let wrong = |problem: String| Err(ModelError::file(&self.path, problem));
        if let Some(needed) = checkpoint.gemma_version() {
            return match own {
                Some(own) if own == needed => Ok(None),
                Some(own) => {
                    wrong(format!("is the text encoder `{own}`, but the transformer needs `{needed}`; name that one"))
                }
                None => wrong(format!(
                    "does not say which text encoder it is, but the transformer needs `{needed}`; name that one"
                )),
            };
        }
        if checkpoint.version().at_least(2, 4) {
            return match own {
                Some(own) => wrong(format!(
                    "is the text encoder `{own}`, but the transformer does not say which one it needs; use the transformer as published"
                )),
                None => Ok(Some("neither the text encoder nor the transformer says which version it is".into())),
            };
        }
        match self.family {
            GemmaFamily::Gemma3 => Ok(None),
            GemmaFamily::Gemma4 => {
                wrong(format!("is a Gemma 4, but {} needs Gemma 3 12B; name its folder", checkpoint.generation()))
            }
        }
    }

    /// The identity of every file; `full` reads all of them.
    ///
    /// # Errors
    /// If a file changed since it was opened.
    pub fn identities(&self, full: bool) -> Result<Vec<FileIdentity>, ModelError> {
        self.files.iter().map(|f| f.identity(full)).collect()
    }
}

impl TensorDirectory for GemmaFolder {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.tensor(key).and_then(|found| found.stored.ty())
    }

    fn unsupported_type(&self, key: &str) -> Option<String> {
        self.tensor(key).filter(|found| found.stored.ty().is_none()).map(|found| found.stored.dtype.to_string())
    }
}

fn family(path: &Path, config: &Value) -> Result<GemmaFamily, ModelError> {
    let Some(kind) = config.get("model_type").and_then(Value::as_str) else {
        return Err(ModelError::file(
            path,
            "its configuration has no `model_type`; name the folder of the Gemma model",
        ));
    };
    match kind {
        "gemma3" | "gemma3_text" => Ok(GemmaFamily::Gemma3),
        "gemma4_unified" => Ok(GemmaFamily::Gemma4),
        "gemma4" | "gemma4_text" => Err(ModelError::file(
            path,
            "is a stock Gemma 4, which LTX-2.5 was not trained with; name the text encoder file of LTX-2.5",
        )),
        other => Err(ModelError::file(
            path,
            format!(
                "is a `{}`, expected `gemma3` (LTX-2, LTX-2.3) or `gemma4_unified` (LTX-2.5); name the folder of that model",
                super::header::clip(other)
            ),
        )),
    }
}

/// The canonical key of `key`.
fn canonical(key: &str) -> String {
    let part_of_text = |rest: &str| ["layers.", "embed_tokens.", "norm."].iter().any(|p| rest.starts_with(p));
    for prefix in [TEXT, "model.language_model.", "language_model.", "model.", ""] {
        if let Some(rest) = key.strip_prefix(prefix).filter(|rest| part_of_text(rest)) {
            return format!("{TEXT}{rest}");
        }
    }
    let vision = key.strip_prefix("model.").filter(|rest| VISION.iter().any(|part| rest.starts_with(part)));
    vision.unwrap_or(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_spellings_are_one() {
        let wanted = "language_model.model.layers.3.mlp.up_proj.weight";
        for prefix in [TEXT, "model.language_model.", "model.", "language_model.", ""] {
            assert_eq!(canonical(&format!("{prefix}layers.3.mlp.up_proj.weight")), wanted);
        }
        for key in ["vision_tower.vision_model.encoder.layers.0.x", "multi_modal_projector.y"] {
            assert_eq!([canonical(key), canonical(&format!("model.{key}"))], [key, key]);
        }
        for other in ["vision_tower.vision_model.encoder.layers.0.x", "tokenizer_json", "model.embed_vision.x"] {
            assert_eq!(canonical(other), other);
        }
    }

    #[test]
    fn other_families_are_refused_by_name() {
        let check = |kind: &str| family(Path::new("x"), &serde_json::json!({ "model_type": kind }));
        assert_eq!(check("gemma3").unwrap(), GemmaFamily::Gemma3);
        assert!(check("gemma4").unwrap_err().to_string().contains("stock Gemma 4"));
        assert!(check("llama").unwrap_err().to_string().contains("`llama`"));
        assert!(family(Path::new("x"), &Value::Null).is_err());
    }
}
