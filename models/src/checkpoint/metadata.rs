//! The strings in a file header, read as what they mean.
//!
//! Every value is JSON if it parses as JSON and a plain string otherwise; `license` and `model_version` are plain.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// What the header of one file says about the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// `config`: sub-objects `transformer`, `vae`, `audio_vae`, `vocoder`, `scheduler`, or an upsampler's keys.
    pub config: Option<Map<String, Value>>,
    /// `model_version` as written.
    pub model_version: Option<String>,
    /// `gemma_source_checkpoint.gemma_version`: the text encoder that a transformer was trained with (LTX-2.5).
    pub gemma_version: Option<String>,
    /// `gemma_config`: configuration of a bundled text encoder (LTX-2.5).
    pub gemma_config: Option<Value>,
    /// Whether this build of ltxc made the file (`synthetic`): real shapes, weights without meaning.
    pub is_synthetic: bool,
}

impl Metadata {
    /// Reads the strings of a header.
    ///
    /// # Errors
    /// A sentence, if `config` or `gemma_config` is there but no JSON object.
    pub fn parse(strings: &BTreeMap<String, String>) -> Result<Metadata, String> {
        let object = |key: &str| match strings.get(key) {
            None => Ok(None),
            Some(text) => match serde_json::from_str::<Value>(text) {
                Ok(Value::Object(object)) => Ok(Some(object)),
                Ok(other) => Err(format!("metadata `{key}` is {}, expected an object", kind(&other))),
                Err(e) => Err(format!("metadata `{key}` is not valid JSON: {e}")),
            },
        };
        let gemma_source = strings.get("gemma_source_checkpoint").and_then(|t| serde_json::from_str::<Value>(t).ok());
        let gemma_version = gemma_source.as_ref().and_then(|v| v.get("gemma_version")).and_then(Value::as_str);
        Ok(Metadata {
            config: object("config")?,
            model_version: strings.get("model_version").map(|text| plain(text)),
            gemma_version: gemma_version.map(str::to_string),
            gemma_config: object("gemma_config")?.map(Value::Object),
            is_synthetic: strings.get("synthetic").is_some_and(|text| text == "true"),
        })
    }

    /// The sub-object `name` of `config`.
    pub fn section(&self, name: &str) -> Option<&Value> {
        self.config.as_ref().and_then(|c| c.get(name))
    }
}

/// A plain string, which some writers quote.
fn plain(text: &str) -> String {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::String(inner)) => inner,
        _ => text.to_string(),
    }
}

/// The kind of a JSON value, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(entries: &[(&str, &str)]) -> Result<Metadata, String> {
        Metadata::parse(&entries.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    #[test]
    fn reads_json_and_plain_strings() {
        let metadata = parse(&[
            ("config", r#"{"transformer":{"num_layers":2}}"#),
            ("model_version", "2.5.0"),
            ("gemma_source_checkpoint", r#"{"ltx_version":"2.5.0","gemma_version":"g1"}"#),
            ("license", "text, not JSON"),
        ])
        .unwrap();
        assert_eq!(metadata.section("transformer").unwrap()["num_layers"], 2);
        assert_eq!(metadata.model_version.as_deref(), Some("2.5.0"));
        assert_eq!(metadata.gemma_version.as_deref(), Some("g1"));
        assert!(!metadata.is_synthetic);
        assert_eq!(parse(&[("model_version", "\"2.3\"")]).unwrap().model_version.as_deref(), Some("2.3"));
        assert_eq!(parse(&[("model_version", "2.3")]).unwrap().model_version.as_deref(), Some("2.3"));
    }

    #[test]
    fn refuses_configs_that_are_no_objects() {
        assert!(parse(&[("config", "[]")]).unwrap_err().contains("is a list"));
        assert!(parse(&[("config", "{")]).unwrap_err().contains("not valid JSON"));
        assert!(parse(&[("gemma_config", "3")]).unwrap_err().contains("gemma_config"));
    }
}
