//! The model files of a command: opened together, found beside each other, and as weight sources of plans.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ltxc_ir::identity::FileIdentity;
use ltxc_ir::plan::WeightSource;
use ltxc_models::checkpoint::{self, Checkpoint, GemmaFolder, Location, WeightFile, hub};

use crate::args::{ModelArgs, PipelineName, Variant};
use crate::pipelines::{Training, definition, training_named};
use crate::report::remark;

/// Names of the weight sources in graphs and plans.
pub(crate) const MODEL: &str = "model";
pub(crate) const GEMMA: &str = "gemma";
pub(crate) const UPSAMPLER: &str = "upsampler";
pub(crate) const TEMPORAL: &str = "temporal_upsampler";

/// The model files of a pipeline, opened.
pub struct ModelFiles {
    /// Transformer, VAEs, vocoder, text projection.
    pub model: Checkpoint,
    /// Text encoder; none for runs that read no text, or whose contexts come from elsewhere.
    pub(crate) gemma: Option<GemmaFolder>,
    /// Spatial latent upsampler, if the pipeline has two stages, or upscales with it.
    pub upsampler: Option<Checkpoint>,
    /// Temporal latent upsampler, if the pipeline upscales with it.
    pub temporal: Option<Checkpoint>,
    verify: bool,
}

impl ModelFiles {
    /// Opens what a pipeline needs, the text encoder only if it is to encode text. Hub names resolve in the local cache.
    ///
    /// # Errors
    /// A file that is missing, damaged, of another kind, or of no use to the pipeline.
    pub fn of_pipeline(args: &ModelArgs, pipeline: PipelineName, encodes_text: bool) -> Result<ModelFiles> {
        let definition = definition(pipeline);
        if !definition.denoises() {
            return ModelFiles::for_upscaling(args);
        }
        if let Some(path) = &args.temporal_upsampler_path {
            bail!(
                "pipeline `{}` has no use for the temporal upscaler `{}`; leave it out, or choose `--pipeline upscale`",
                definition.name,
                path.display()
            );
        }
        match encodes_text {
            true => ModelFiles::open(args, definition.has_two_stages),
            false => ModelFiles::open_without_text(args, definition.has_two_stages),
        }
    }

    /// Opens a model, of which the video VAE is used, and the upsamplers that there are.
    fn for_upscaling(args: &ModelArgs) -> Result<ModelFiles> {
        let open = |path: &Option<PathBuf>| -> Result<Option<Checkpoint>> {
            path.as_ref().map(|path| Ok(Checkpoint::open_upsampler(&local(path)?)?)).transpose()
        };
        let (upsampler, temporal) = (open(&args.spatial_upsampler_path)?, open(&args.temporal_upsampler_path)?);
        let files = ModelFiles::open_without_text(args, false)?;
        Ok(ModelFiles { upsampler, temporal, ..files })
    }

    /// Opens what `args` names of a model with text encoder. Hub names resolve in the local cache.
    ///
    /// # Errors
    /// A file that is missing, damaged, or of another kind.
    pub fn open(args: &ModelArgs, needs_upsampler: bool) -> Result<ModelFiles> {
        let mut files = ModelFiles::open_without_text(args, needs_upsampler)?;
        let found = |path: &Option<PathBuf>| path.as_deref().map(local).transpose();
        let bundled = found(&args.checkpoint_path)?.as_deref().and_then(bundled_gemma);
        let gemma = match (found(&args.gemma_root)?, found(&args.text_encoder_path)?, bundled) {
            (Some(path), ..) | (None, Some(path), _) | (None, None, Some(path)) => path,
            (None, None, None) => bail!("`--gemma-root` is missing: it names the folder of the Gemma text encoder"),
        };
        let gemma = GemmaFolder::open(&gemma)?;
        if let Some(note) = gemma.check_pairing(&files.model)? {
            remark(&format!("note: {note}"));
        }
        files.gemma = Some(gemma);
        Ok(files)
    }

    /// The same without the text encoder.
    ///
    /// # Errors
    /// Those of [`ModelFiles::open`].
    pub fn open_without_text(args: &ModelArgs, needs_upsampler: bool) -> Result<ModelFiles> {
        let (model, path) = model(args)?;
        let upsampler = match needs_upsampler {
            true => {
                let path = match &args.spatial_upsampler_path {
                    Some(path) => local(path)?,
                    None => {
                        let beside = upsampler_beside(&path)?.context(
                            "`--spatial-upsampler-path` is missing: it names the spatial upscaler, and there is none beside the \
                             model",
                        )?;
                        remark(&format!("note: upscaler `{}`, found beside the model", beside.display()));
                        beside
                    }
                };
                Some(Checkpoint::open_upsampler(&path)?)
            }
            false => None,
        };
        Ok(ModelFiles { model, gemma: None, upsampler, temporal: None, verify: args.verify })
    }

    /// The text encoder.
    ///
    /// # Errors
    /// Files that were opened without it.
    pub fn gemma(&self) -> Result<&GemmaFolder> {
        self.gemma.as_ref().context("the text encoder was not opened; name its folder with `--gemma-root`")
    }

    /// The checkpoint of a weight source that is not the text encoder.
    pub(crate) fn checkpoint_of(&self, source: &str) -> &Checkpoint {
        let upsampler = match source {
            UPSAMPLER => self.upsampler.as_ref(),
            TEMPORAL => self.temporal.as_ref(),
            _ => None,
        };
        upsampler.unwrap_or(&self.model)
    }

    /// The file of a weight source that has the tensor `key`; all of them together if none has.
    pub(crate) fn file_of(&self, source: &str, key: &str) -> PathBuf {
        if let Some(gemma) = self.gemma.as_ref().filter(|_| source == GEMMA) {
            let at = gemma.tensor(key).map(|t| gemma.files()[t.file].path());
            return at.unwrap_or(gemma.path()).into();
        }
        let checkpoint = self.checkpoint_of(source);
        let at = checkpoint.tensor(key).map(|t| checkpoint.files()[t.file].path());
        at.map_or_else(|| checkpoint.name().into(), PathBuf::from)
    }

    /// Paths of all files, for a run right after compiling.
    pub fn paths(&self) -> Vec<PathBuf> {
        let mut paths = self.model.paths();
        paths.extend(self.gemma.iter().filter_map(GemmaFolder::tokenizer_path));
        paths.extend(self.gemma.iter().flat_map(GemmaFolder::files).map(|f| f.path().to_path_buf()));
        paths.extend(self.upsampler.iter().chain(&self.temporal).flat_map(Checkpoint::paths));
        paths
    }

    /// The sources of a plan, with the identity of every file.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn sources(&self) -> Result<Vec<WeightSource>> {
        let mut sources = vec![checkpoint_source(MODEL, &self.model, self.verify)?];
        if let Some(gemma) = &self.gemma {
            sources.push(gemma_source(gemma, self.verify)?);
        }
        for (name, upsampler) in [(UPSAMPLER, &self.upsampler), (TEMPORAL, &self.temporal)] {
            if let Some(upsampler) = upsampler {
                sources.push(checkpoint_source(name, upsampler, self.verify)?);
            }
        }
        Ok(sources)
    }
}

/// A checkpoint as a source of plans, with the identity of every file.
pub(crate) fn checkpoint_source(name: &str, checkpoint: &Checkpoint, verify: bool) -> Result<WeightSource> {
    Ok(weight_source(name, checkpoint.identities(verify)?, checkpoint.files(), checkpoint.tensors()))
}

/// The text encoder as a source of plans, with the identity of every file.
pub(crate) fn gemma_source(gemma: &GemmaFolder, verify: bool) -> Result<WeightSource> {
    Ok(weight_source(GEMMA, gemma.identities(verify)?, gemma.files(), gemma.tensors()))
}

fn weight_source<'t>(
    name: &str,
    identities: Vec<FileIdentity>,
    files: &[WeightFile],
    tensors: impl Iterator<Item = (&'t str, Location<'t>)>,
) -> WeightSource {
    // Folders of components have the same keys in several files.
    let has = |file: &WeightFile, key: &str| file.header().tensor(key).is_some_and(|t| t.ty().is_some());
    let in_files = |at: Location<'_>| match files.iter().take(at.file).any(|file| has(file, &at.stored.key)) {
        true => WeightSource::in_file(at.file, &at.stored.key),
        false => at.stored.key.clone(),
    };
    let keys: Vec<(String, String)> = tensors.map(|(key, at)| (key.to_string(), in_files(at))).collect();
    let renames = WeightSource::renames_of(keys.iter().map(|(a, b)| (a.as_str(), b.as_str())));
    WeightSource { name: name.into(), files: identities, renames }
}

/// The model that is named, whole, in parts, or with parts replaced; and its path, or that of its transformer.
fn model(args: &ModelArgs) -> Result<(Checkpoint, PathBuf)> {
    let found = |path: &Option<PathBuf>| path.as_deref().map(local).transpose();
    let Some(named) = args.checkpoint_path.as_ref().or(args.transformer_path.as_ref()) else {
        bail!("`--checkpoint-path` is missing: it names the model file or folder");
    };
    let (path, is_split) = (variant(local(named)?, args.variant)?, args.transformer_path.is_some());
    let replaced = [&args.video_vae_path, &args.audio_vae_path, &args.embeddings_connectors];
    let replaced = replaced.into_iter().flatten().next();
    if let (false, Some(part), true) = (is_split, replaced, path.is_dir()) {
        bail!(
            "`{}` is a folder, and `{}` replaces a part of a single file; name that file, or the transformer's with \
             `--transformer-path`",
            path.display(),
            part.display()
        );
    }
    if !is_split && replaced.is_none() {
        return Ok((Checkpoint::open(&path)?, path));
    }
    let text = match &args.embeddings_connectors {
        // A single file has all but Gemma.
        None if is_split => found(&args.text_encoder_path)?.filter(|path| path.is_file()),
        connectors => found(connectors)?,
    };
    let parts = checkpoint::ModelFiles {
        checkpoint: (!is_split).then(|| path.clone()),
        transformer: is_split.then(|| path.clone()),
        text_encoder: text,
        video_vae: found(&args.video_vae_path)?,
        audio_vae: found(&args.audio_vae_path)?,
        ..checkpoint::ModelFiles::default()
    };
    Ok((Checkpoint::open_files(&parts)?, path))
}

/// A path as it is, or the local copy of a hub name.
pub(crate) fn local(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        return Ok(path.into());
    }
    let name = path.to_str().with_context(|| format!("`{}` does not exist", path.display()))?;
    Ok(hub::resolve(name)?)
}

/// The spatial upscaler that is in the folder of a model, or beside its file.
///
/// # Errors
/// Several of them.
pub(crate) fn upsampler_beside(model: &Path) -> Result<Option<PathBuf>> {
    let folder = if model.is_dir() { model } else { model.parent().unwrap_or(Path::new(".")) };
    let folders = ["latent_upsampler", "spatial_upsampler", "spatial_upscaler"].map(|name| folder.join(name));
    if let Some(path) = folders.into_iter().find(|path| model.is_dir() && path.is_dir()) {
        return Ok(Some(path));
    }
    let is_upsampler = |name: &str| name.contains("spatial-upscaler-x2") || name.contains("spatial-upsampler-x2");
    let mut found = named_files(folder, &is_upsampler);
    match (found.pop(), found.pop()) {
        (Some(one), Some(other)) => bail!(
            "`{}` and `{}` are both upscalers beside the model; name one with `--spatial-upsampler-path`",
            other.display(),
            one.display()
        ),
        (found, _) => Ok(found),
    }
}

/// The safetensors files in a folder whose names are like this, sorted.
fn named_files(folder: &Path, is_like: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_safetensors = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors");
    let named = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(is_like);
    let mut found: Vec<PathBuf> = entries.filter(is_safetensors).filter(named).collect();
    found.sort();
    found
}

/// The model in a folder of several that is meant; a file must be what is meant.
fn variant(model: PathBuf, variant: Option<Variant>) -> Result<PathBuf> {
    let Some(variant) = variant else { return Ok(model) };
    let (word, training) = match variant {
        Variant::Distilled => ("distilled", Training::Distilled),
        Variant::Dev => ("dev", Training::Full),
    };
    if !model.is_dir() || model.join("model_index.json").is_file() {
        return match training_named(&model) {
            Some(other) if other != training => {
                bail!("`{}` is not called {word}; leave `--variant {word}` out, or name another file", model.display())
            }
            _ => Ok(model),
        };
    }
    let is_other = |name: &str| ["lora", "upscaler", "upsampler", "vae"].iter().any(|part| name.contains(part));
    let is_meant = |name: &str| training_named(Path::new(name)) == Some(training) && !is_other(name);
    let mut found = named_files(&model, &is_meant);
    match (found.pop(), found.pop()) {
        (Some(one), None) => Ok(one),
        (None, _) => bail!("`{}` has no file that is called {word}; name the file of the model", model.display()),
        (Some(one), Some(other)) => bail!(
            "`{}` and `{}` are both called {word}; name one of them with `--checkpoint-path`",
            other.display(),
            one.display()
        ),
    }
}

/// Text encoder inside a diffusers folder.
fn bundled_gemma(checkpoint: &Path) -> Option<PathBuf> {
    let folder = checkpoint.join("text_encoder");
    folder.is_dir().then(|| checkpoint.to_path_buf())
}
