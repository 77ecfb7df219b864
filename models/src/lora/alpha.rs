//! What scales a low-rank product: alpha tensors, and the settings that trainers leave in headers and side files.

use std::collections::BTreeMap;

use half::{bf16, f16};
use ltxc_ir::DType;
use serde_json::{Map, Value};

use crate::ModelError;
use crate::checkpoint::header::clip;
use crate::checkpoint::{StoredTensor, StoredType, WeightFile, read_json};

/// Settings of a file for its layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct AdapterConfig {
    parts: Vec<Part>,
}

/// Settings for the layers of one component.
#[derive(Clone, Debug, Default, PartialEq)]
struct Part {
    /// What the names of its layers begin with; empty for all.
    component: String,
    /// Alpha of layers that have none of their own.
    alpha: Option<f64>,
    /// Alphas of some layers, by the ends of their names.
    patterns: Vec<(String, f64)>,
    /// Whether alpha is divided by the square root of the rank (rsLoRA).
    has_root_scale: bool,
}

/// Settings of PEFT beside its file.
const SIDE_FILE: &str = "adapter_config.json";

impl AdapterConfig {
    /// Reads the header of `file`, or the `adapter_config.json` beside it if the file is PEFT's.
    ///
    /// # Errors
    /// Settings that are no JSON, an alpha that is no number, or alphas for layers that are named by a pattern.
    pub fn read(file: &WeightFile) -> Result<AdapterConfig, ModelError> {
        let header = &file.header().metadata;
        let beside = file.path().with_file_name(SIDE_FILE);
        let is_peft = file.path().file_name().is_some_and(|n| n == super::IN_FOLDER[0]);
        if let Some(text) = header.get("lora_adapter_metadata") {
            let value: Value = serde_json::from_str(text).map_err(|e| {
                let problem = format!("metadata `lora_adapter_metadata` is not valid JSON: {e}");
                ModelError::file(file.path(), format!("{problem}; use the file as published"))
            })?;
            // Keys are those of PEFT, behind the name of the component: `transformer.lora_alpha`.
            let mut components: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
            for (key, value) in value.as_object().into_iter().flatten() {
                let (component, setting) = key.rsplit_once('.').unwrap_or(("", key));
                components.entry(component).or_default().insert(setting.into(), value.clone());
            }
            let parts = components.into_iter().map(|(component, settings)| Part::read(file, component, &settings));
            return Ok(AdapterConfig { parts: parts.collect::<Result<_, _>>()? });
        }
        if is_peft && beside.is_file() {
            let value = read_json(&beside)?;
            let settings = value.as_object().cloned().unwrap_or_default();
            return Ok(AdapterConfig { parts: vec![Part::read(file, "", &settings)?] });
        }
        let alpha = ["lora_alpha", "ss_network_alpha"].iter().find_map(|key| header.get(*key));
        let alpha = number(file, alpha.map(|text| Value::String(text.clone())).as_ref())?;
        Ok(AdapterConfig { parts: vec![Part { alpha, ..Part::default() }] })
    }

    /// The settings for `layer`: those of its component, or the only ones there are.
    fn part(&self, layer: &str) -> Option<&Part> {
        let is_of = |part: &&Part| {
            part.component.is_empty() || layer.strip_prefix(&part.component).is_some_and(|rest| rest.starts_with('.'))
        };
        self.parts.iter().filter(is_of).max_by_key(|part| part.component.len()).or(match &self.parts[..] {
            [only] => Some(only),
            _ => None,
        })
    }

    /// Alpha of a layer that has no tensor for it.
    pub fn alpha(&self, layer: &str) -> Option<f64> {
        let part = self.part(layer)?;
        let ends = |end: &str| layer.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        part.patterns.iter().find(|(end, _)| ends(end)).map(|(_, alpha)| *alpha).or(part.alpha)
    }

    /// What a product of `rank` is multiplied by.
    pub fn scale(&self, layer: &str, alpha: Option<f64>, rank: usize) -> f64 {
        let rank = rank as f64;
        let has_root_scale = self.part(layer).is_some_and(|part| part.has_root_scale);
        let divisor = if has_root_scale { rank.sqrt() } else { rank };
        alpha.map_or(1.0, |alpha| alpha / divisor)
    }
}

impl Part {
    fn read(file: &WeightFile, component: &str, settings: &Map<String, Value>) -> Result<Part, ModelError> {
        let mut patterns = Vec::new();
        for (name, alpha) in settings.get("alpha_pattern").and_then(Value::as_object).into_iter().flatten() {
            let end = name.replace("\\.", ".");
            if end.contains(['^', '$', '*', '+', '?', '(', ')', '[', ']', '{', '}', '|', '\\']) {
                let problem = format!("has an alpha for the pattern `{}`, expected the name of a layer", clip(name));
                return Err(ModelError::file(file.path(), format!("{problem}; write the names out")));
            }
            let alpha = number(file, Some(alpha))?;
            patterns.extend(alpha.map(|alpha| (end, alpha)));
        }
        Ok(Part {
            component: component.into(),
            alpha: number(file, settings.get("lora_alpha"))?,
            patterns,
            has_root_scale: settings.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        })
    }
}

/// An alpha of the settings.
fn number(file: &WeightFile, value: Option<&Value>) -> Result<Option<f64>, ModelError> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let number = match value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    };
    let number: Option<f64> = number.filter(|n: &f64| n.is_finite());
    number.map(Some).ok_or_else(|| {
        let text = clip(&value.to_string());
        ModelError::file(file.path(), format!("has the alpha {text}, expected a number; use it as published"))
    })
}

/// The number in a tensor with a single element.
///
/// # Errors
/// A sentence, for a tensor of another size or type, or a number that is not finite.
pub(super) fn scalar(file: &WeightFile, tensor: &StoredTensor) -> Result<f64, String> {
    let bytes = file.data(tensor);
    let value = match (tensor.dtype, bytes) {
        (StoredType::Known(DType::F32), &[a, b, c, d]) => Some(f64::from(f32::from_le_bytes([a, b, c, d]))),
        (StoredType::Known(DType::BF16), &[a, b]) => Some(bf16::from_le_bytes([a, b]).to_f64()),
        (StoredType::Known(DType::F16), &[a, b]) => Some(f16::from_le_bytes([a, b]).to_f64()),
        (StoredType::Known(DType::I32), &[a, b, c, d]) => Some(f64::from(i32::from_le_bytes([a, b, c, d]))),
        (StoredType::Other("F64"), bytes) => bytes.try_into().ok().map(f64::from_le_bytes),
        (StoredType::Other("I64"), bytes) => bytes.try_into().ok().map(|b| i64::from_le_bytes(b) as f64),
        _ => None,
    };
    value.filter(|v| v.is_finite()).ok_or_else(|| {
        format!("`{}` is {} {:?}, expected one finite number", clip(&tensor.key), tensor.dtype, tensor.shape)
    })
}
