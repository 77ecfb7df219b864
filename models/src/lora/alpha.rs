//! What scales a low-rank product: alpha tensors, and the settings that trainers leave in headers and side files.

use half::{bf16, f16};
use ltxc_ir::DType;
use serde_json::Value;

use crate::ModelError;
use crate::checkpoint::header::clip;
use crate::checkpoint::{StoredTensor, StoredType, WeightFile, read_json};

/// Settings for all layers of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct AdapterConfig {
    /// Alpha of layers that have none of their own.
    pub alpha: Option<f64>,
    /// Whether alpha is divided by the square root of the rank (rsLoRA).
    has_root_scale: bool,
}

/// Settings of PEFT beside its file.
const SIDE_FILE: &str = "adapter_config.json";

impl AdapterConfig {
    /// Reads the header of `file`, or the `adapter_config.json` beside it if the file is PEFT's.
    ///
    /// # Errors
    /// Settings that are no JSON, or an alpha that is no number.
    pub fn read(file: &WeightFile) -> Result<AdapterConfig, ModelError> {
        let header = &file.header().metadata;
        let beside = file.path().with_file_name(SIDE_FILE);
        let is_peft = file.path().file_name().is_some_and(|n| n == super::IN_FOLDER[0]);
        if let Some(text) = header.get("lora_adapter_metadata") {
            // Keys are those of PEFT, behind the name of the component: `transformer.lora_alpha`.
            let value: Value = serde_json::from_str(text).map_err(|e| {
                let problem = format!("metadata `lora_adapter_metadata` is not valid JSON: {e}");
                ModelError::file(file.path(), format!("{problem}; use the file as published"))
            })?;
            let entry = |key: &str| {
                let entries = value.as_object().into_iter().flatten();
                entries.into_iter().find(|(k, _)| k.rsplit('.').next() == Some(key)).map(|(_, v)| v.clone())
            };
            return AdapterConfig::new(file, entry("lora_alpha"), entry("use_rslora"));
        }
        if is_peft && beside.is_file() {
            let value = read_json(&beside)?;
            return AdapterConfig::new(file, value.get("lora_alpha").cloned(), value.get("use_rslora").cloned());
        }
        let alpha = ["lora_alpha", "ss_network_alpha"].iter().find_map(|key| header.get(*key));
        AdapterConfig::new(file, alpha.map(|text| Value::String(text.clone())), None)
    }

    fn new(file: &WeightFile, alpha: Option<Value>, root: Option<Value>) -> Result<AdapterConfig, ModelError> {
        let alpha = match alpha {
            None | Some(Value::Null) => None,
            Some(value) => {
                let number = match &value {
                    Value::String(text) => text.trim().parse().ok(),
                    other => other.as_f64(),
                };
                let number: Option<f64> = number.filter(|n: &f64| n.is_finite());
                Some(number.ok_or_else(|| {
                    let text = clip(&value.to_string());
                    ModelError::file(
                        file.path(),
                        format!("has the alpha {text}, expected a number; use it as published"),
                    )
                })?)
            }
        };
        Ok(AdapterConfig { alpha, has_root_scale: root.and_then(|v| v.as_bool()).unwrap_or(false) })
    }

    /// What a product of `rank` is multiplied by.
    pub fn scale(&self, alpha: Option<f64>, rank: usize) -> f64 {
        let rank = rank as f64;
        let divisor = if self.has_root_scale { rank.sqrt() } else { rank };
        alpha.map_or(1.0, |alpha| alpha / divisor)
    }
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
