//! Reading an object of a checkpoint's configuration: every key with its default, every problem collected.
//!
//! A wrong value is recorded and replaced by its default, so that one pass finds all problems.

use std::cell::RefCell;

use serde_json::{Map, Value};

use crate::{Listed, ModelError};

/// Largest count or size a configuration may name. Released models stay below 5000; products of three still fit 64 bits.
pub(crate) const MOST: usize = 1 << 20;

/// One JSON object and the problems found in it.
pub(crate) struct Fields<'a> {
    path: String,
    object: Option<&'a Map<String, Value>>,
    problems: RefCell<Vec<String>>,
}

impl<'a> Fields<'a> {
    /// The object `value`, which stands at `path` for messages.
    pub fn new(path: &str, value: &'a Value) -> Fields<'a> {
        let fields = Fields { path: path.into(), object: value.as_object(), problems: RefCell::default() };
        if fields.object.is_none() {
            fields.problem("is absent or not an object; a checkpoint needs a config in its metadata");
        }
        fields
    }

    /// Records a problem.
    pub fn problem(&self, text: impl Into<String>) {
        self.problems.borrow_mut().push(text.into());
    }

    /// Whether no problem was found so far.
    pub fn is_clean(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    /// The value at `key`; `None` if it is absent or null.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.object?.get(key).filter(|v| !v.is_null())
    }

    /// The value at `key` as `convert` understands it, else `default`.
    fn read<T>(&self, key: &str, default: T, expected: &str, convert: impl Fn(&'a Value) -> Option<T>) -> T {
        let Some(value) = self.value(key) else { return default };
        convert(value).unwrap_or_else(|| {
            self.problem(format!("`{key}` is `{value}`, expected {expected}"));
            default
        })
    }

    /// The count or size at `key`, in `1..=2^20`.
    pub fn size(&self, key: &str, default: usize) -> usize {
        self.read(key, default, &format!("a whole number in 1..={MOST}"), as_size)
    }

    /// The truth value at `key`.
    pub fn bool(&self, key: &str, default: bool) -> bool {
        self.read(key, default, "true or false", Value::as_bool)
    }

    /// The number at `key`.
    pub fn number(&self, key: &str, default: f64) -> f64 {
        self.read(key, default, "a number", Value::as_f64)
    }

    /// The list at `key`.
    pub fn list(&self, key: &str) -> &'a [Value] {
        self.read(key, &[], "a list", |v| v.as_array().map(Vec::as_slice))
    }

    /// The meaning of the string at `key` among `choices`, else `default`.
    pub fn choice<T: Copy>(&self, key: &str, default: T, choices: &[(&str, T)]) -> T {
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
        let find = |v: &Value| choices.iter().find(|(name, _)| v.as_str() == Some(name)).map(|(_, meaning)| *meaning);
        self.read(key, default, &names.join(" or "), find)
    }

    /// Ends the reading: `value` if nothing is wrong.
    ///
    /// # Errors
    /// [`ModelError::Config`] with all problems.
    pub fn finish<T>(self, value: T) -> Result<T, ModelError> {
        let problems = self.problems.into_inner();
        if problems.is_empty() {
            return Ok(value);
        }
        let problem = format!("{} problem(s):{}", problems.len(), Listed(problems));
        Err(ModelError::Config { path: self.path, problem })
    }
}

/// A whole number in range. JSON written by other tools also spells whole numbers as floats.
pub(crate) fn as_size(value: &Value) -> Option<usize> {
    let number = match value.as_u64() {
        Some(n) => usize::try_from(n).ok()?,
        None => value.as_f64().filter(|f| f.fract() == 0.0 && (1.0..=MOST as f64).contains(f))? as usize,
    };
    (1..=MOST).contains(&number).then_some(number)
}
