//! Reading untrusted JSON configurations: every value has a kind and a range, every error names its path.

use ltxc_ir::DType;
use serde_json::{Map, Value};

use crate::ModelError;

/// Largest channel count or vocabulary a configuration may ask for. Far above any model; keeps products of two sizes
/// and a layer count far inside 64 bits.
pub(super) const MAX_SIZE: usize = 1 << 24;
/// Largest number of layers, heads or hidden states.
pub(super) const MAX_COUNT: usize = 4096;

/// An object of a configuration and the path to it. A value of `null` counts as absent, as in the Python loaders.
pub(super) struct Fields<'a> {
    path: String,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The object `value`, which stands at `path`.
    pub fn new(path: &str, value: &'a Value) -> Result<Fields<'a>, ModelError> {
        match value.as_object() {
            Some(object) => Ok(Fields { path: path.into(), object }),
            None => Err(ModelError::Config { path: path.into(), problem: "is missing or not an object".into() }),
        }
    }

    /// An error about `key`.
    pub fn error(&self, key: &str, problem: impl Into<String>) -> ModelError {
        ModelError::Config { path: format!("{}.{key}", self.path), problem: problem.into() }
    }

    /// The value of `key`, unless absent or null.
    pub fn find(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    /// The object `key`.
    pub fn object(&self, key: &str) -> Result<Fields<'a>, ModelError> {
        Fields::new(&format!("{}.{key}", self.path), self.find(key).unwrap_or(&Value::Null))
    }

    /// The object `key`, if there is one.
    pub fn optional_object(&self, key: &str) -> Result<Option<Fields<'a>>, ModelError> {
        self.find(key).map(|_| self.object(key)).transpose()
    }

    /// The integer `key` in `1..=most`, if present.
    pub fn optional_size(&self, key: &str, most: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.find(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| (1..=most).contains(v));
        size.map(Some).ok_or_else(|| self.error(key, format!("is {value}, expected an integer in 1..={most}")))
    }

    /// The integer `key` in `1..=most`.
    pub fn size(&self, key: &str, most: usize) -> Result<usize, ModelError> {
        self.optional_size(key, most)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// The integer `key` in `1..=most`, or `default`.
    pub fn size_or(&self, key: &str, most: usize, default: usize) -> Result<usize, ModelError> {
        Ok(self.optional_size(key, most)?.unwrap_or(default))
    }

    /// The positive finite number `key`, if present.
    pub fn optional_number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.find(key) else { return Ok(None) };
        positive(value).map(Some).ok_or_else(|| self.error(key, format!("is {value}, expected a positive number")))
    }

    /// The positive finite number `key`, or `default`.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    /// The positive finite numbers in the list `key`, if present.
    pub fn optional_numbers(&self, key: &str) -> Result<Option<Vec<f64>>, ModelError> {
        let Some(value) = self.find(key) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(positive).collect::<Option<Vec<_>>>());
        list.map(Some).ok_or_else(|| self.error(key, format!("is {value}, expected a list of positive numbers")))
    }

    /// The truth value `key`, if present.
    pub fn optional_flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.find(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(key, format!("is {value}, expected true or false")))
    }

    /// The truth value `key`, or `default`.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        Ok(self.optional_flag(key)?.unwrap_or(default))
    }

    /// The string `key`, if present.
    pub fn optional_text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.find(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, format!("is {value}, expected a string")))
    }
}

fn positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|v| v.is_finite() && *v > 0.0)
}

/// Fails unless activations may have the dtype `dtype`.
pub(super) fn check_compute_dtype(dtype: DType) -> Result<(), ModelError> {
    if matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
        return Ok(());
    }
    Err(ModelError::Config { path: "dtype".into(), problem: format!("is {dtype}, activations are f32, bf16 or f16") })
}
