//! Low-rank adapters (LoRA): files of every dialect, and the weights of a model that they add to.
//!
//! A LoRA file holds two factors for each layer that it changes: `down` (`[rank, inputs]`, A) and `up`
//! (`[outputs, rank]`, B), which add `scale · up · down` to the layer's weight. Dialects differ in how they name layers
//! and factors (`keys`) and in whether an alpha scales them. [`LoraFile`] knows what is in a file,
//! [`LoraFile::fit`] what that means for a model.
//!
//! # Easy to get wrong
//! - The scale is `alpha / rank` where there is an alpha and 1 where there is none; official files have none.
//! - Underscored names do not say where the dots were, so layers are looked up by all names that the model's have.
//! - A file of another generation often has nothing but known names; shapes and headers tell.
//!
//! Source: spec/cli-and-formats §4.

mod alpha;
mod fit;
mod keys;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;

pub use fit::{LoraFactor, LoraFit, LoraTargets, Place};
pub use write::{LayerKeys, WrittenDialect, adapter_settings, layer_keys};

use crate::checkpoint::header::clip;
use crate::checkpoint::{Generation, StoredTensor, StoredType, WeightFile};
use crate::{Listed, ModelError};
use alpha::AdapterConfig;
use keys::Role;

/// How a file names layers and factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dialect {
    /// `diffusion_model.<layer>.lora_A.weight`, no alpha: files of the model's authors and their trainer.
    Official,
    /// The same prefix with `alpha` tensors, or with `lora_down` and `lora_up`.
    ComfyUi,
    /// `transformer.<layer>`, `base_model.model.<layer>` or `connectors.<layer>`: diffusers and PEFT.
    Diffusers,
    /// `lora_unet_<layer>` with underscores for dots: kohya and musubi trainers.
    Kohya,
    /// Layers without a prefix: FastVideo.
    Bare,
}

impl Dialect {
    /// What messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Dialect::Official => "official",
            Dialect::ComfyUi => "ComfyUI",
            Dialect::Diffusers => "diffusers",
            Dialect::Kohya => "kohya",
            Dialect::Bare => "without prefix",
        }
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The generations that a LoRA can be for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The first of them.
    pub oldest: Generation,
    /// The last of them.
    pub newest: Generation,
    /// What says so.
    pub reason: String,
}

impl Origin {
    /// Whether `generation` is one of them.
    pub fn is(&self, generation: Generation) -> bool {
        (self.oldest..=self.newest).contains(&generation)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let newer = if self.oldest < self.newest { " or newer" } else { "" };
        write!(f, "{}{newer}: {}", self.oldest, self.reason)
    }
}

/// The factors for one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// Name of the layer as the file has it.
    pub name: String,
    /// Rank of the product.
    pub rank: usize,
    /// Inputs of the layer.
    pub inputs: usize,
    /// Outputs of the layer.
    pub outputs: usize,
    /// Alpha, if the file has one for this layer or for all.
    pub alpha: Option<f64>,
    /// What the product is multiplied by before any strength.
    pub scale: f64,
    /// Index of `down` among the tensors of the header.
    down: usize,
    /// Index of `up`.
    up: usize,
}

/// A LoRA file, opened: its header was checked, its data not touched.
pub struct LoraFile {
    file: WeightFile,
    dialect: Dialect,
    modules: Vec<LoraModule>,
    /// Keys that are no factor of a layer.
    others: Vec<String>,
}

/// Files that a folder with one LoRA has, in the order in which they are looked for.
const IN_FOLDER: [&str; 3] =
    ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors"];

impl LoraFile {
    /// Opens a LoRA file, or the one in a PEFT, diffusers or FastVideo folder.
    ///
    /// # Errors
    /// A file that holds no LoRA, one of another kind (DoRA, LoKr, LoHa), or factors that do not belong together.
    pub fn open(path: &Path) -> Result<LoraFile, ModelError> {
        let path = inside(path)?;
        let file = WeightFile::open(&path)?;
        let config = AdapterConfig::read(&file)?;
        let found = Found::of(&file)?;
        let dialect = found.dialect();
        let mut problems = Vec::new();
        let mut modules = Vec::new();
        for (name, parts) in &found.layers {
            match module(&file, name, parts, &config) {
                Ok(module) => modules.push(module),
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            let text =
                format!("{} problem(s) with its factors; download it again:{}", problems.len(), Listed(problems));
            return Err(ModelError::file(&path, text));
        }
        Ok(LoraFile { file, dialect, modules, others: found.others })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// How it names layers.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// The layers that it changes, sorted by their names.
    pub fn modules(&self) -> &[LoraModule] {
        &self.modules
    }

    /// Keys that are no factor of a layer.
    pub fn others(&self) -> &[String] {
        &self.others
    }

    /// The strings of its header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.file.header().metadata
    }

    /// Element types of the factors.
    pub fn dtypes(&self) -> BTreeSet<DType> {
        let tensors = self.modules.iter().flat_map(|m| [m.down, m.up]);
        tensors.filter_map(|t| self.tensor(t).ty()).map(|ty| ty.dtype).collect()
    }

    /// How many times smaller than the video reference videos are (`reference_downscale_factor`); `None` if the header
    /// does not say.
    ///
    /// # Errors
    /// A header that says something else than a whole number.
    pub fn reference_downscale(&self) -> Result<Option<u32>, ModelError> {
        self.factor(&["reference_downscale_factor", "reference_spatial_scale_factor"])
    }

    /// Of how many frames of the video a reference video has one (`reference_temporal_scale_factor`).
    ///
    /// # Errors
    /// As for [`LoraFile::reference_downscale`].
    pub fn reference_temporal_scale(&self) -> Result<Option<u32>, ModelError> {
        self.factor(&["reference_temporal_scale_factor"])
    }

    /// Whether the header says that this adapter reads reference videos, or the name does, for want of a better sign.
    pub fn is_in_context(&self) -> bool {
        let keys = ["reference_downscale_factor", "reference_spatial_scale_factor", "reference_temporal_scale_factor"];
        keys.iter().any(|key| self.metadata().contains_key(*key))
            || self.makes_light() == Some(true)
            || self.file_name().contains("ic-lora")
    }

    /// Whether the name is like those of adapters that read reference videos, which proves nothing.
    pub fn has_name_of_in_context(&self) -> bool {
        // Published ones move the camera and read no reference videos.
        let name = self.file_name().replace("camera-control", "");
        ["control", "ref0.5", "dubit", "lipdub", "hdr"].iter().any(|part| name.contains(part))
    }

    /// Whether it makes a signal with a high dynamic range, LogC3, as the header says (`hdr_transform`,
    /// `use_hdr_transform`); `None` if it says nothing.
    pub fn makes_light(&self) -> Option<bool> {
        let value = ["hdr_transform", "use_hdr_transform"].iter().find_map(|key| self.metadata().get(*key))?;
        let value = value.trim().trim_matches('"').to_lowercase();
        Some(!["", "false", "0", "none", "null"].contains(&value.as_str()))
    }

    /// In lower case, with dashes.
    fn file_name(&self) -> String {
        let name = self.path().file_name().unwrap_or_default();
        name.to_string_lossy().to_lowercase().replace(['_', ' '], "-")
    }

    /// What it was made for; `None` if nothing tells.
    pub fn origin(&self) -> Option<Origin> {
        self.declared().or_else(|| self.implied())
    }

    /// The generation that the header names.
    fn declared(&self) -> Option<Origin> {
        let keys = ["model_version", "ltx_version", "base_model", "ss_base_model_version", "modelspec.architecture"];
        keys.iter().find_map(|key| {
            let value = self.metadata().get(*key)?;
            let generation = generation_named(value)?;
            Some(Origin {
                oldest: generation,
                newest: generation,
                reason: format!("its header has `{key}: {}`", clip(value)),
            })
        })
    }

    /// The generations whose layers have these names and shapes.
    fn implied(&self) -> Option<Origin> {
        self.modules.iter().find_map(|module| {
            let name = module.name.replace('.', "_");
            let has = |part: &str| name.contains(part);
            // The main modulation of a block has 9 rows where text attention is modulated too, else 6.
            let is_main = name.ends_with("_adaln_single_linear") || name.ends_with("time_embed_linear");
            let rows =
                (module.outputs.checked_div(module.inputs)).filter(|_| is_main && !has("av_ca") && !has("prompt"));
            let (is_new, reason) = if has("prompt_adaln") || has("to_gate_logits") {
                (true, format!("it changes `{}`", clip(&module.name)))
            } else if has("caption_projection") {
                (false, format!("it changes `{}`", clip(&module.name)))
            } else {
                let is_new = match rows? {
                    6 => false,
                    9 => true,
                    _ => return None,
                };
                (
                    is_new,
                    format!("`{}` has {} outputs for {} inputs", clip(&module.name), module.outputs, module.inputs),
                )
            };
            let (oldest, newest) =
                if is_new { (Generation::Ltx23, Generation::Ltx25) } else { (Generation::Ltx2, Generation::Ltx2) };
            Some(Origin { oldest, newest, reason })
        })
    }

    /// A whole number of the header, under the first of `keys` that is there.
    fn factor(&self, keys: &[&str]) -> Result<Option<u32>, ModelError> {
        let Some((key, text)) = keys.iter().find_map(|key| Some((key, self.metadata().get(*key)?))) else {
            return Ok(None);
        };
        match text.trim().trim_matches('"').parse::<f64>() {
            Ok(value) if value.fract() == 0.0 && (1.0..=64.0).contains(&value) => Ok(Some(value as u32)),
            _ => {
                let problem = format!("metadata `{key}` is `{}`, expected a whole number from 1 to 64", clip(text));
                Err(ModelError::file(self.path(), format!("{problem}; use the file as published")))
            }
        }
    }

    /// The factors of one of [`LoraFile::modules`]: `down`, `[rank, inputs]`, and `up`, `[outputs, rank]`, without its scale.
    pub fn factors(&self, module: &LoraModule) -> [Vec<f32>; 2] {
        [module.down, module.up].map(|index| {
            let stored = self.tensor(index);
            // Modules have factors of types that graphs know.
            stored.ty().map(|ty| Tensor::from_bytes(ty, self.file.data(stored)).to_f32()).unwrap_or_default()
        })
    }

    /// The factors of one of [`LoraFile::modules`] as they are stored, `down` and `up`.
    pub fn stored_factors(&self, module: &LoraModule) -> [(DType, &[u8]); 2] {
        [module.down, module.up].map(|index| {
            let stored = self.tensor(index);
            // Factors were found to have one of the types that graphs know.
            (stored.ty().map_or(DType::F32, |ty| ty.dtype), self.file.data(stored))
        })
    }

    fn tensor(&self, index: usize) -> &StoredTensor {
        // Indices come from this header.
        &self.file.header().tensors[index]
    }
}

/// The file that `path` means.
fn inside(path: &Path) -> Result<PathBuf, ModelError> {
    if !path.is_dir() {
        return Ok(path.into());
    }
    match IN_FOLDER.iter().map(|name| path.join(name)).find(|p| p.is_file()) {
        Some(file) => Ok(file),
        None => Err(ModelError::file(path, format!("has no `{}`; name the LoRA file itself", IN_FOLDER[0]))),
    }
}

/// The generation whose name or version is somewhere in `text`.
fn generation_named(text: &str) -> Option<Generation> {
    let text = text.to_lowercase();
    let has = |names: &[&str]| names.iter().any(|n| text.contains(n));
    if has(&["ltx-2.5", "ltx2.5", "ltxv2.5"]) || text.starts_with("2.5") {
        Some(Generation::Ltx25)
    } else if has(&["ltx-2.3", "ltx2.3", "ltxv2.3", "2.3-22b"]) || text.starts_with("2.3") {
        Some(Generation::Ltx23)
    } else if has(&["ltx-2-19b", "ltx2-19b", "19b"]) || text.starts_with("2.0") {
        Some(Generation::Ltx2)
    } else {
        None
    }
}

/// Tensors of one layer, by index.
#[derive(Default)]
struct Parts {
    down: Option<usize>,
    up: Option<usize>,
    alpha: Option<usize>,
}

/// The tensors of a file by what they are for.
#[derive(Default)]
struct Found {
    layers: BTreeMap<String, Parts>,
    others: Vec<String>,
    has_down_and_up: bool,
}

impl Found {
    fn of(file: &WeightFile) -> Result<Found, ModelError> {
        let mut found = Found::default();
        let mut foreign = Vec::new();
        let mut twice = Vec::new();
        for (index, tensor) in file.header().tensors.iter().enumerate() {
            let Some((layer, role)) = keys::split(&tensor.key) else {
                found.others.push(tensor.key.clone());
                continue;
            };
            let parts = match role {
                Role::Foreign(kind) => {
                    foreign.push(format!("`{}` ({kind})", clip(&tensor.key)));
                    continue;
                }
                _ => found.layers.entry(layer.to_string()).or_default(),
            };
            found.has_down_and_up |= tensor.key.contains(".lora_down.") || tensor.key.contains(".lora.down.");
            let place = match role {
                Role::Down => &mut parts.down,
                Role::Up => &mut parts.up,
                Role::Alpha | Role::Foreign(_) => &mut parts.alpha,
            };
            if place.replace(index).is_some() {
                twice.push(format!("`{}` is there under two names", clip(&tensor.key)));
            }
        }
        if !foreign.is_empty() {
            let (count, list) = (foreign.len(), Listed(foreign));
            let text = format!("has {count} key(s) of kinds that are not supported; use a plain LoRA:{list}");
            return Err(ModelError::file(file.path(), text));
        }
        if !twice.is_empty() {
            return Err(ModelError::file(file.path(), format!("is ambiguous; keep one of each:{}", Listed(twice))));
        }
        if !found.layers.values().any(|parts| parts.down.is_some() || parts.up.is_some()) {
            let text = "holds no LoRA (no `lora_A` and `lora_B`, no `lora_down` and `lora_up`); name a LoRA file";
            return Err(ModelError::file(file.path(), text));
        }
        Ok(found)
    }

    fn dialect(&self) -> Dialect {
        let any = |prefix: &str| self.layers.keys().any(|layer| layer.starts_with(prefix));
        if any("lora_") {
            Dialect::Kohya
        } else if any("diffusion_model.") || any("model.diffusion_model.") {
            let has_alpha = self.layers.values().any(|parts| parts.alpha.is_some());
            if has_alpha || self.has_down_and_up { Dialect::ComfyUi } else { Dialect::Official }
        } else if any("transformer.") || any("base_model.") || any("connectors.") {
            Dialect::Diffusers
        } else {
            Dialect::Bare
        }
    }
}

/// Checks that the tensors of a layer belong together.
fn module(file: &WeightFile, name: &str, parts: &Parts, config: &AdapterConfig) -> Result<LoraModule, String> {
    let tensor = |index: usize| &file.header().tensors[index];
    let shown = clip(name);
    let (down, up) = match (parts.down, parts.up) {
        (Some(down), Some(up)) => (down, up),
        (None, None) => return Err(format!("`{shown}` has an alpha and no factors")),
        (down, _) => {
            let missing = if down.is_none() { "`lora_A` (down)" } else { "`lora_B` (up)" };
            return Err(format!("`{shown}` has no {missing}"));
        }
    };
    for index in [down, up] {
        let found = tensor(index);
        let is_float = matches!(found.dtype, StoredType::Known(DType::F32 | DType::BF16 | DType::F16));
        if !is_float {
            return Err(format!("`{}` is {}, expected f32, bf16 or f16", clip(&found.key), found.dtype));
        }
    }
    let (Some([rank, inputs]), Some([outputs, up_rank])) = (matrix(tensor(down)), matrix(tensor(up))) else {
        let (a, b) = (&tensor(down).shape, &tensor(up).shape);
        return Err(format!("`{shown}` has factors {a:?} and {b:?}, expected two matrices"));
    };
    if rank != up_rank || rank == 0 {
        return Err(format!("`{shown}` has factors of the ranks {rank} (down) and {up_rank} (up)"));
    }
    let alpha = match parts.alpha {
        Some(index) => Some(alpha::scalar(file, tensor(index))?),
        None => config.alpha(name),
    };
    let scale = config.scale(name, alpha, rank);
    Ok(LoraModule { name: name.into(), rank, inputs, outputs, alpha, scale, down, up })
}

/// The extents of a matrix; trailing axes of 1, which some trainers add, are left out.
fn matrix(tensor: &StoredTensor) -> Option<[usize; 2]> {
    match tensor.shape.split_at_checked(2)? {
        (&[rows, columns], rest) if rest.iter().all(|&n| n == 1) => Some([rows, columns]),
        _ => None,
    }
}
