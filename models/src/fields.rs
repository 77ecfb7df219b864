//! Reading configurations, which are untrusted JSON: every key with its default and range, every problem collected.
//!
//! A wrong value is recorded and replaced by something harmless, so that one pass over a component's configuration finds
//! all problems. What is read means nothing until [`Fields::finish`] has said that there are none.
//!
//! # Easy to get wrong
//! - A value of null counts as absent, as most loaders have it ([`Fields::refusing_null`] is for the others).
//! - JSON written by other tools spells whole numbers as floats (`1000.0`).
//! - Relations only mean something between values that are right ([`Fields::is_clean`]).

use std::cell::RefCell;
use std::fmt::Display;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::ModelError;

/// Largest count or size a configuration may name. Released models stay below 300 000, their vocabulary; products of three
/// such numbers still fit 64 bits.
pub(crate) const MOST: usize = 1 << 20;

/// Largest number of entries of a list of numbers.
const MOST_ENTRIES: usize = 16;

/// One JSON object of a component's configuration.
#[derive(Clone)]
pub(crate) struct Fields<'a> {
    object: Option<&'a Map<String, Value>>,
    /// Name of the component's whole configuration, for the error.
    root: Rc<str>,
    /// What stands before a key in messages: the path from the component's configuration to this object, with a dot.
    path: String,
    refuses_null: bool,
    problems: Rc<RefCell<Vec<String>>>,
}

impl<'a> Fields<'a> {
    /// The configuration `value` of a component; `root` is what messages call it.
    pub fn new(root: &str, value: &'a Value) -> Fields<'a> {
        let fields = Fields {
            object: value.as_object(),
            root: root.into(),
            path: String::new(),
            refuses_null: false,
            problems: Rc::default(),
        };
        if fields.object.is_none() {
            fields.problem("is absent or not an object; a checkpoint needs a config in its metadata");
        }
        fields
    }

    /// The same object, in which null is a value like others.
    pub fn refusing_null(self) -> Fields<'a> {
        Fields { refuses_null: true, ..self }
    }

    /// The object at `key`; an empty one if there is none.
    pub fn below(&self, key: &str) -> Fields<'a> {
        let value = self.value(key);
        if value.is_some_and(|v| !v.is_object()) {
            self.problem_at(key, "is not an object");
        }
        self.inside(key, value.unwrap_or(&Value::Null))
    }

    /// The object at `key`, which must exist.
    pub fn required_below(&self, key: &str) -> Fields<'a> {
        self.require(key);
        self.below(key)
    }

    /// The object `value`, which stands at `key` in messages.
    pub fn inside<'b>(&self, key: &str, value: &'b Value) -> Fields<'b> {
        Fields {
            object: value.as_object(),
            root: self.root.clone(),
            path: format!("{}{key}.", self.path),
            refuses_null: self.refuses_null,
            problems: self.problems.clone(),
        }
    }

    /// The value at `key`.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.object?.get(key).filter(|v| self.refuses_null || !v.is_null())
    }

    /// Whether there is a value at `key`.
    pub fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// Records a problem, once.
    pub fn problem(&self, text: impl Display) {
        let text = text.to_string();
        let mut problems = self.problems.borrow_mut();
        if !problems.contains(&text) {
            problems.push(text);
        }
    }

    /// Records what is wrong with `key`.
    pub fn problem_at(&self, key: &str, text: impl Display) {
        self.problem(format!("`{}{key}` {text}", self.path));
    }

    /// Records a problem if there is no value at `key`.
    pub fn require(&self, key: &str) {
        if !self.has(key) {
            self.problem_at(key, "is missing, and no default would be safe");
        }
    }

    /// Whether no problem was found so far, in all of the component's configuration.
    pub fn is_clean(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    /// Ends the reading of a component: `value` if nothing is wrong.
    ///
    /// # Errors
    /// [`ModelError::Config`] with all problems, of this object, those around it and those inside of it.
    pub fn finish<T>(&self, value: T) -> Result<T, ModelError> {
        ModelError::unless_empty(&self.root, self.problems.borrow().clone()).map(|()| value)
    }

    /// The value at `key` as `convert` understands it.
    fn find<T>(&self, key: &str, expected: impl Display, convert: impl FnOnce(&'a Value) -> Option<T>) -> Option<T> {
        let value = self.value(key)?;
        let found = convert(value);
        if found.is_none() {
            self.problem_at(key, format!("is `{value}`, expected {expected}"));
        }
        found
    }

    /// The count or size at `key`, in `1..=most`.
    pub fn find_size(&self, key: &str, most: usize) -> Option<usize> {
        self.find(key, format!("a whole number in 1..={most}"), |v| as_size(v, most))
    }

    /// The count or size at `key`, in `1..=2^20`.
    pub fn size(&self, key: &str, default: usize) -> usize {
        self.size_within(key, default, MOST)
    }

    /// The count or size at `key`, in `1..=most`.
    pub fn size_within(&self, key: &str, default: usize, most: usize) -> usize {
        self.find_size(key, most).unwrap_or(default)
    }

    /// The count or size at `key`, in `1..=most`, which must exist.
    pub fn required_size(&self, key: &str, most: usize) -> usize {
        self.require(key);
        self.size_within(key, 1, most)
    }

    /// The list of sizes at `key`.
    pub fn sizes(&self, key: &str, default: &[usize]) -> Vec<usize> {
        let expected = format!("at most {MOST_ENTRIES} whole numbers in 1..={MOST}");
        self.find(key, expected, as_sizes).unwrap_or_else(|| default.to_vec())
    }

    /// The list of lists of sizes at `key`.
    pub fn size_lists(&self, key: &str, default: &[&[usize]]) -> Vec<Vec<usize>> {
        let expected = format!("at most {MOST_ENTRIES} lists of whole numbers in 1..={MOST}");
        let convert = |v: &Value| v.as_array().filter(|l| l.len() <= MOST_ENTRIES)?.iter().map(as_sizes).collect();
        self.find(key, expected, convert).unwrap_or_else(|| default.iter().map(|l| l.to_vec()).collect())
    }

    /// The number above 0 at `key`.
    pub fn find_positive(&self, key: &str) -> Option<f64> {
        self.find(key, "a positive number", as_positive)
    }

    /// The number above 0 at `key`.
    pub fn positive(&self, key: &str, default: f64) -> f64 {
        self.find_positive(key).unwrap_or(default)
    }

    /// The list at `key` of as many numbers above 0 as `default` has.
    pub fn positives(&self, key: &str, default: &[f64]) -> Vec<f64> {
        let count = default.len();
        let convert = |v: &Value| v.as_array().filter(|l| l.len() == count)?.iter().map(as_positive).collect();
        self.find(key, format!("a list of {count} positive number(s)"), convert).unwrap_or_else(|| default.to_vec())
    }

    /// The truth value at `key`.
    pub fn find_bool(&self, key: &str) -> Option<bool> {
        self.find(key, "true or false", Value::as_bool)
    }

    /// The truth value at `key`.
    pub fn bool(&self, key: &str, default: bool) -> bool {
        self.find_bool(key).unwrap_or(default)
    }

    /// The string at `key`.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.find(key, "a string", Value::as_str)
    }

    /// The list at `key`; an empty one if there is none.
    pub fn list(&self, key: &str) -> &'a [Value] {
        self.find(key, "a list", |v| v.as_array().map(Vec::as_slice)).unwrap_or(&[])
    }

    /// The meaning of the string at `key` among `choices`.
    pub fn choice<T: Copy>(&self, key: &str, default: T, choices: &[(&str, T)]) -> T {
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
        let find = |v: &Value| choices.iter().find(|(name, _)| v.as_str() == Some(name)).map(|(_, meaning)| *meaning);
        self.find(key, names.join(" or "), find).unwrap_or(default)
    }

    /// Refuses every value of `key` but `supported`, which an absent key also means.
    pub fn only(&self, key: &str, supported: impl Into<Value>) {
        if let Some(found) = self.value(key) {
            self.check_same(key, found, &supported.into());
        }
    }

    /// Refuses every value of `key` but `supported`; an absent key means null.
    pub fn exactly(&self, key: &str, supported: &Value) {
        self.check_same(key, self.value(key).unwrap_or(&Value::Null), supported);
    }

    fn check_same(&self, key: &str, found: &Value, supported: &Value) {
        let is_same = match (found.as_f64(), supported.as_f64()) {
            (Some(found), Some(supported)) => found == supported,
            _ => found == supported,
        };
        if !is_same {
            self.problem_at(key, format!("is `{found}`, only `{supported}` is supported"));
        }
    }
}

/// A whole number in `1..=most`.
pub(crate) fn as_size(value: &Value, most: usize) -> Option<usize> {
    // Sizes are far below 2^53, so that floats hold them exactly.
    value.as_f64().filter(|v| v.fract() == 0.0 && (1.0..=most as f64).contains(v)).map(|v| v as usize)
}

fn as_sizes(value: &Value) -> Option<Vec<usize>> {
    value.as_array().filter(|l| l.len() <= MOST_ENTRIES)?.iter().map(|v| as_size(v, MOST)).collect()
}

fn as_positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|v| v.is_finite() && *v > 0.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What reading `config` with `read` finds wrong.
    #[track_caller]
    fn check<T>(config: Value, read: impl Fn(&Fields<'_>) -> T, expected: &str) {
        let fields = Fields::new("part", &config);
        read(&fields);
        let found = fields.finish(()).map_err(|e| e.to_string());
        if expected.is_empty() {
            assert_eq!(found, Ok(()));
        } else {
            assert_eq!(found, Err(format!("config `part`: 1 problem(s):\n  {expected}")));
        }
    }

    #[test]
    fn whole_numbers_may_be_floats() {
        let fields = json!({"a": 3.0, "b": 3, "c": null});
        let fields = Fields::new("part", &fields);
        assert_eq!(["a", "b", "c", "d"].map(|key| fields.size(key, 7)), [3, 3, 7, 7]);
        assert!(fields.is_clean());
    }

    #[test]
    fn wrong_values_are_named_with_what_was_expected() {
        let size = |f: &Fields<'_>| assert_eq!(f.size_within("a", 7, 9), 7);
        for wrong in ["2.5", "0", "-1", "10", "1e300", "18446744073709551615", "\"3\"", "[]", "true"] {
            let value: Value = serde_json::from_str(wrong).expect("JSON");
            let text = format!("`a` is `{value}`, expected a whole number in 1..=9");
            check(json!({ "a": value }), size, &text);
        }
        check(json!({"a": 0}), |f| f.positive("a", 1.0), "`a` is `0`, expected a positive number");
        check(json!({"a": 1}), |f| f.bool("a", true), "`a` is `1`, expected true or false");
        check(json!({"a": "z"}), |f| f.choice("a", 1, &[("x", 1), ("y", 2)]), "`a` is `\"z\"`, expected `x` or `y`");
        check(
            json!({"a": [1]}),
            |f| drop(f.positives("a", &[1.0, 2.0])),
            "`a` is `[1]`, expected a list of 2 positive number(s)",
        );
        check(
            json!({"a": {"b": {"c": []}}}),
            |f| f.below("a").below("b").text("c").is_some(),
            "`a.b.c` is `[]`, expected a string",
        );
        check(json!({"a": [1]}), |f| drop(f.below("a")), "`a` is not an object");
        check(json!({}), |f| f.required_size("a", 9), "`a` is missing, and no default would be safe");
        check(json!([]), |_| (), "is absent or not an object; a checkpoint needs a config in its metadata");
    }

    #[test]
    fn supported_values_are_compared_as_numbers() {
        check(json!({"a": 3.0}), |f| f.only("a", 3), "");
        check(json!({}), |f| f.only("a", 3), "");
        check(json!({"a": "w"}), |f| f.only("a", "v"), "`a` is `\"w\"`, only `\"v\"` is supported");
        check(json!({}), |f| f.exactly("a", &json!(0)), "`a` is `null`, only `0` is supported");
        check(json!({}), |f| f.exactly("a", &Value::Null), "");
    }

    #[test]
    fn null_is_absent_unless_refused() {
        check(json!({"a": null}), |f| f.bool("a", true), "");
        check(
            json!({"a": null}),
            |f| f.clone().refusing_null().bool("a", true),
            "`a` is `null`, expected true or false",
        );
    }
}
