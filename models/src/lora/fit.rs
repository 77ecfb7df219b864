//! Which weights of a model a LoRA file adds to, and why it does not fit.

use std::collections::BTreeMap;

use ltxc_ir::{DType, TensorType};

use super::{LoraFile, LoraModule, Origin, keys};
use crate::checkpoint::header::clip;
use crate::checkpoint::{Checkpoint, Generation, StoredTensor};
use crate::{Listed, ModelError};

/// The weights of a model that LoRAs may add to, under every name that a dialect has for them.
pub struct LoraTargets {
    name: String,
    generation: Generation,
    /// Shape by canonical key.
    shapes: BTreeMap<String, [usize; 2]>,
    /// Canonical key by name.
    keys: BTreeMap<String, String>,
}

impl LoraTargets {
    /// The targets among `tensors`, given by canonical key. `name` is what messages call the model.
    pub fn new(
        name: impl Into<String>,
        generation: Generation,
        tensors: impl IntoIterator<Item = (String, TensorType)>,
    ) -> LoraTargets {
        let mut targets = LoraTargets { name: name.into(), generation, shapes: BTreeMap::new(), keys: BTreeMap::new() };
        for (key, ty) in tensors {
            let (Some(names), &[outputs, inputs]) = (keys::names_of(&key), &ty.shape[..]) else { continue };
            for name in names {
                targets.keys.insert(name, key.clone());
            }
            targets.shapes.insert(key, [outputs, inputs]);
        }
        targets
    }

    /// The targets in a checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> LoraTargets {
        let tensors = checkpoint.tensors().filter_map(|(key, at)| Some((key.to_string(), at.stored.ty()?)));
        LoraTargets::new(checkpoint.name(), checkpoint.generation(), tensors)
    }

    /// Canonical key of the weight that a file calls `layer`, whatever its shape.
    pub fn key_of(&self, layer: &str) -> Option<&str> {
        self.find(layer).map(|(key, _)| key)
    }

    /// Canonical key and shape `[outputs, inputs]` of the layer that a file calls `layer`.
    fn find(&self, layer: &str) -> Option<(&str, [usize; 2])> {
        let key = keys::without_prefixes(layer).find_map(|name| self.keys.get(name))?;
        Some((key, *self.shapes.get(key)?))
    }
}

/// A matrix in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Element type: f32, bf16 or f16.
    pub dtype: DType,
}

/// What a LoRA adds to one weight: `scale · up · down`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFactor {
    /// Canonical key of the weight, `[outputs, inputs]`.
    pub key: String,
    /// Rank of the product.
    pub rank: usize,
    /// Inputs of the layer.
    pub inputs: usize,
    /// Outputs of the layer.
    pub outputs: usize,
    /// `[rank, inputs]`
    pub down: Place,
    /// `[outputs, rank]`
    pub up: Place,
    /// Alpha over rank, or 1.
    pub scale: f64,
}

/// A LoRA as far as it fits a model.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFit {
    /// What it adds, sorted by key.
    pub factors: Vec<LoraFactor>,
    /// Layers and other keys of the file that the model has nothing for.
    pub unmatched: Vec<String>,
}

impl LoraFile {
    /// Finds the weights that this file adds to. With `ignores_unmatched`, layers that the model does not have are left
    /// out.
    ///
    /// # Errors
    /// Layers that the model does not have or has with other shapes (20 at most are listed), and files that say that they
    /// were made for another generation.
    pub fn fit(&self, targets: &LoraTargets, ignores_unmatched: bool) -> Result<LoraFit, ModelError> {
        let model = format!("{} (`{}`)", targets.generation, targets.name);
        let is_other = |origin: &Origin| !origin.is(targets.generation);
        if let Some(origin) = self.declared().filter(is_other) {
            let text = format!("is a LoRA of {origin}; the model is {model}, use a LoRA made for it");
            return Err(ModelError::file(self.path(), text));
        }
        let mut fit = LoraFit { factors: Vec::new(), unmatched: Vec::new() };
        let (mut misshapen, mut twice) = (Vec::new(), Vec::new());
        let mut named: BTreeMap<&str, &str> = BTreeMap::new();
        for module in self.modules() {
            match targets.find(&module.name) {
                None => fit.unmatched.push(module.name.clone()),
                Some((_, shape)) if shape != [module.outputs, module.inputs] => {
                    let [outputs, inputs] = shape;
                    misshapen.push(format!(
                        "`{}` adds to [{}, {}], the model has [{outputs}, {inputs}]",
                        clip(&module.name),
                        module.outputs,
                        module.inputs
                    ));
                }
                Some((key, _)) => {
                    if let Some(other) = named.insert(key, &module.name) {
                        twice.push(format!("`{}` and `{}`", clip(other), clip(&module.name)));
                    }
                    fit.factors.push(self.factor_for(key, module));
                }
            }
        }
        let origin = self.implied().filter(is_other);
        let origin = origin.map_or(String::new(), |origin| format!(" (it looks like a LoRA of {origin})"));
        if !misshapen.is_empty() {
            let text = format!(
                "{} of its {} layers have another shape than in {model}{origin}; use a LoRA made for this model:{}",
                misshapen.len(),
                self.modules().len(),
                Listed(misshapen)
            );
            return Err(ModelError::file(self.path(), text));
        }
        if !twice.is_empty() {
            let text = format!("names a layer of {model} twice; keep one of each:{}", Listed(twice));
            return Err(ModelError::file(self.path(), text));
        }
        fit.unmatched.extend(self.others().iter().cloned());
        if fit.factors.is_empty() {
            let text = format!(
                "none of its {} layers are in {model}{origin}; use a LoRA made for this model:{}",
                self.modules().len(),
                Listed(quoted(&fit.unmatched))
            );
            return Err(ModelError::file(self.path(), text));
        }
        if !fit.unmatched.is_empty() && !ignores_unmatched {
            let text = format!(
                "{} of its keys match nothing in {model}{origin}; use a LoRA made for this model, or leave them out with \
                 `--lora-ignore-unmatched`:{}",
                fit.unmatched.len(),
                Listed(quoted(&fit.unmatched))
            );
            return Err(ModelError::file(self.path(), text));
        }
        fit.factors.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(fit)
    }

    fn factor_for(&self, key: &str, module: &LoraModule) -> LoraFactor {
        let place = |index: usize| {
            let tensor: &StoredTensor = self.tensor(index);
            // Factors were found to have one of the types that graphs know.
            Place { offset: tensor.offset, dtype: tensor.ty().map_or(DType::F32, |ty| ty.dtype) }
        };
        LoraFactor {
            key: key.into(),
            rank: module.rank,
            inputs: module.inputs,
            outputs: module.outputs,
            down: place(module.down),
            up: place(module.up),
            scale: module.scale,
        }
    }
}

fn quoted(names: &[String]) -> Vec<String> {
    names.iter().map(|name| format!("`{}`", clip(name))).collect()
}
