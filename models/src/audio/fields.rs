//! Reading a component's configuration: every key with its fallback and range, every problem collected.
//!
//! A wrong value is recorded and replaced by its fallback, so that one pass over the configuration finds all problems.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::Value;

use crate::{Listed, ModelError};

/// Largest count or size a configuration may name. The released models stay below 50 000; products of three such
/// numbers still fit 64 bits.
pub(super) const MOST: usize = 1 << 20;

/// Largest number of entries of a list.
const MOST_ENTRIES: usize = 16;

/// One JSON object of a configuration.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    object: &'a Value,
    path: String,
    problems: Rc<RefCell<Vec<String>>>,
}

impl<'a> Fields<'a> {
    /// The object `value`, which stands at `path`.
    pub fn new(path: &str, value: &'a Value) -> Fields<'a> {
        let fields = Fields { object: value, path: path.into(), problems: Rc::default() };
        if !value.is_object() {
            fields.problem("is not an object");
        }
        fields
    }

    /// The object below `key`; an empty one if there is none.
    pub fn below(&self, key: &str) -> Fields<'a> {
        let object = self.object.get(key).unwrap_or(&Value::Null);
        let below = Fields { object, path: format!("{}.{key}", self.path), problems: self.problems.clone() };
        if !object.is_null() && !object.is_object() {
            below.problem("is not an object");
        }
        below
    }

    /// Whether `key` exists and is not null.
    pub fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(|v| !v.is_null())
    }

    /// Records what is wrong with this object.
    pub fn problem(&self, text: &str) {
        self.problems.borrow_mut().push(format!("`{}` {text}", self.path));
    }

    /// Records what is wrong with `key`.
    pub fn problem_at(&self, key: &str, text: &str) {
        self.problems.borrow_mut().push(format!("`{}.{key}` {text}", self.path));
    }

    /// The count or size at `key`, `1..=2^20`.
    pub fn size(&self, key: &str, fallback: usize) -> usize {
        self.size_if_any(key).unwrap_or(fallback)
    }

    /// The count or size at `key`, which must exist.
    pub fn required_size(&self, key: &str) -> usize {
        if !self.has(key) {
            self.problem_at(key, "is missing");
        }
        self.size_if_any(key).unwrap_or(1)
    }

    /// The count or size at `key`, if it exists.
    pub fn size_if_any(&self, key: &str) -> Option<usize> {
        let value = self.object.get(key).filter(|v| !v.is_null())?;
        let size = as_size(value);
        if size.is_none() {
            self.problem_at(key, &format!("is `{value}`, expected a whole number in 1..={MOST}"));
        }
        size
    }

    /// The truth value at `key`.
    pub fn bool(&self, key: &str, fallback: bool) -> bool {
        match self.object.get(key) {
            None | Some(Value::Null) => fallback,
            Some(Value::Bool(b)) => *b,
            Some(other) => {
                self.problem_at(key, &format!("is `{other}`, expected true or false"));
                fallback
            }
        }
    }

    /// The string at `key`; `None` if the key is absent or null.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        match self.object.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::String(s)) => Some(s),
            Some(other) => {
                self.problem_at(key, &format!("is `{other}`, expected a string"));
                None
            }
        }
    }

    /// Refuses every value of `key` but `supported`, which an absent key also means.
    pub fn only_text(&self, key: &str, supported: &str) {
        if let Some(found) = self.text(key)
            && found != supported
        {
            self.problem_at(key, &format!("is `{found}`, only `{supported}` is supported"));
        }
    }

    /// Refuses every value of `key` but `supported`; `fallback` is what an absent key means.
    pub fn only_bool(&self, key: &str, supported: bool, fallback: bool) {
        if self.bool(key, fallback) != supported {
            self.problem_at(key, &format!("is `{}`, only `{supported}` is supported", !supported));
        }
    }

    /// The list of sizes at `key`.
    pub fn sizes(&self, key: &str, fallback: &[usize]) -> Vec<usize> {
        let Some(value) = self.object.get(key).filter(|v| !v.is_null()) else { return fallback.to_vec() };
        match size_list(value) {
            Some(list) => list,
            None => {
                self.problem_at(key, &format!("is `{value}`, expected at most {MOST_ENTRIES} numbers in 1..={MOST}"));
                fallback.to_vec()
            }
        }
    }

    /// The list of lists of sizes at `key`.
    pub fn size_lists(&self, key: &str, fallback: &[&[usize]]) -> Vec<Vec<usize>> {
        let fallback = || fallback.iter().map(|l| l.to_vec()).collect();
        let Some(value) = self.object.get(key).filter(|v| !v.is_null()) else { return fallback() };
        let lists =
            value.as_array().filter(|l| l.len() <= MOST_ENTRIES).and_then(|l| l.iter().map(size_list).collect());
        lists.unwrap_or_else(|| {
            self.problem_at(key, &format!("is `{value}`, expected lists of numbers in 1..={MOST}"));
            fallback()
        })
    }

    /// Ends the reading of a component: `value` if nothing is wrong.
    ///
    /// # Errors
    /// All problems found in this object, those above and those below it.
    pub fn finish<T>(&self, value: T) -> Result<T, ModelError> {
        let problems = self.problems.borrow();
        if problems.is_empty() {
            return Ok(value);
        }
        let problem = format!("{} problem(s):{}", problems.len(), Listed(problems.clone()));
        Err(ModelError::Config { path: self.path.clone(), problem })
    }
}

/// A whole number in range. JSON written by other tools also spells whole numbers as floats.
fn as_size(value: &Value) -> Option<usize> {
    let number = match value.as_u64() {
        Some(n) => usize::try_from(n).ok()?,
        None => value.as_f64().filter(|f| f.fract() == 0.0 && (1.0..=MOST as f64).contains(f))? as usize,
    };
    (1..=MOST).contains(&number).then_some(number)
}

fn size_list(value: &Value) -> Option<Vec<usize>> {
    let list = value.as_array()?;
    if list.len() > MOST_ENTRIES { None } else { list.iter().map(as_size).collect() }
}
