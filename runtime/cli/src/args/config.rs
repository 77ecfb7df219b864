//! Flags from files: `--config`, and what folders of FastVideo say about their second stage.
//!
//! Keys are the names of flags, ours or those of other tools, with `-` or `_`. Sections are flattened: the last name
//! counts. The command line wins.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Command;
use serde_json::{Map, Value};

use super::tables::push;
use super::words::{Given, argument, chooses_pipeline, flags, known, nearest};

/// The flag that names a file of flags.
const CONFIG: &str = "config";

/// The flags of a command line and of the files that it names with `--config`.
///
/// # Errors
/// A file that cannot be read, or has a key that is no flag.
pub(super) fn with_files(given: Vec<Given>, command: &Command) -> Result<Vec<Given>> {
    let (files, typed): (Vec<Given>, Vec<Given>) = given.into_iter().partition(|flag| flag.name == CONFIG);
    let mut all = Vec::new();
    for path in files.iter().flat_map(|file| &file.values) {
        let path = Path::new(path);
        let of = || format!("config file `{}`", path.display());
        let read = file_flags(path, command).with_context(of)?;
        all.extend(read.into_iter().filter(|flag| !typed.iter().any(|other| excludes(other, flag, command))));
    }
    all.extend(typed);
    Ok(all)
}

/// Whether a flag is given already, or says the same in another way.
pub(super) fn excludes(typed: &Given, flag: &Given, command: &Command) -> bool {
    let conflicts = |a: &Given, b: &Given| {
        argument(&a.name, command).is_some_and(|arg| {
            command.get_arg_conflicts_with(arg).iter().any(|other| other.get_long() == Some(&b.name))
        })
    };
    typed.name == flag.name
        || (chooses_pipeline(&typed.name) && chooses_pipeline(&flag.name))
        || conflicts(typed, flag)
        || conflicts(flag, typed)
}

fn file_flags(path: &Path, command: &Command) -> Result<Vec<Given>> {
    let text = std::fs::read_to_string(path)?;
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    let table = match extension.as_deref() {
        Some("toml") => serde_json::to_value(text.parse::<toml::Table>()?)?,
        Some("json") => serde_json::from_str(&text)?,
        Some("yaml" | "yml") => serde_yaml_ng::from_str(&text)?,
        _ => bail!("its name does not say what it is; call it .toml, .json, .yaml or .yml"),
    };
    let Value::Object(table) = table else { bail!("it is no table of flags") };
    let mut leaves = BTreeMap::new();
    flatten("", table, &mut leaves)?;
    let mut line: Vec<OsString> = Vec::new();
    for (name, (path, value)) in leaves {
        line.extend(argument_of(&name, &value, command).with_context(|| format!("`{path}`"))?);
    }
    flags(&line, command)
}

/// Collects values by the last part of their names, with dashes; and the whole of these for messages.
fn flatten(at: &str, table: Map<String, Value>, leaves: &mut BTreeMap<String, (String, Value)>) -> Result<()> {
    for (key, value) in table {
        let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        let value = match value {
            Value::Object(section) => {
                flatten(&path, section, leaves)?;
                continue;
            }
            value => value,
        };
        let name = key.rsplit('.').next().unwrap_or_default().replace('_', "-");
        if let Some((other, _)) = leaves.insert(name, (path.clone(), value)) {
            bail!("`{other}` and `{path}` are one flag; leave one of them out");
        }
    }
    Ok(())
}

/// A flag with its value, as arguments.
fn argument_of(name: &str, value: &Value, command: &Command) -> Result<Vec<OsString>> {
    if value.is_null() {
        return Ok(Vec::new());
    }
    if name == CONFIG {
        bail!("is no flag in a file of flags");
    }
    if let Some(arg) = argument(name, command) {
        let mut line = Vec::new();
        push(&mut line, arg, value)?;
        return Ok(line.into_iter().map(OsString::from).collect());
    }
    if known(name, command)?.is_none() {
        bail!("is no flag{}", nearest(name, command));
    }
    Ok(match value {
        Value::Bool(true) => vec![format!("--{name}").into()],
        Value::Bool(false) => vec![format!("--{name}=false").into()],
        Value::String(text) => vec![format!("--{name}={text}").into()],
        Value::Number(number) => vec![format!("--{name}={number}").into()],
        other => bail!("{other} is not a text, number, true or false"),
    })
}

/// What a folder of FastVideo says about its second stage.
pub(super) struct Refinement {
    /// The file that says it.
    pub path: PathBuf,
    /// Whether there is to be one.
    pub is_enabled: Option<bool>,
    /// Whether it has a LoRA of its own.
    pub has_adapter: bool,
    /// The rest, as flags.
    pub flags: Vec<Given>,
}

/// Keys of `model_index.json` with this in front, and the flags that they mean.
const REFINE: &str = "fastvideo_refine_";
const REFINE_FLAGS: [(&str, &str); 8] = [
    ("upsampler_path", "spatial-upsampler-path"),
    ("transformer_path", "refine-transformer-path"),
    ("lora_path", "distilled-lora"),
    ("num_inference_steps", "steps-stage2"),
    ("guidance_scale", "refine-guidance-scale"),
    ("add_noise", "refine-add-noise"),
    ("noise_path", "ltx2-refine-noise-path"),
    ("audio_noise_path", "ltx2-refine-audio-noise-path"),
];

/// What the folder of a model says about its second stage, if it does. Paths are relative to it.
///
/// # Errors
/// A `model_index.json` that is damaged, or has a key of this kind that means nothing here.
pub(super) fn refinement(folder: &Path) -> Result<Option<Refinement>> {
    let path = folder.join("model_index.json");
    if !path.is_file() {
        return Ok(None);
    }
    let name = format!("`{}`", path.display());
    let of = || name.clone();
    let text = std::fs::read_to_string(&path).with_context(of)?;
    let index: Map<String, Value> = serde_json::from_str(&text).with_context(of)?;
    let keys = index.iter().filter_map(|(key, value)| Some((key.strip_prefix(REFINE)?, value)));
    let given: BTreeMap<&str, &Value> = keys.filter(|(_, value)| !value.is_null()).collect();
    if given.is_empty() {
        return Ok(None);
    }
    let mut flags = Vec::new();
    for (key, value) in &given {
        let Some((_, flag)) = REFINE_FLAGS.iter().find(|(name, _)| name == key) else {
            if *key == "enabled" {
                continue;
            }
            bail!("{}: `{REFINE}{key}` is not known", of());
        };
        let value = match value {
            Value::String(path) if key.ends_with("path") => {
                let inside = folder.join(path);
                if inside.exists() { inside } else { PathBuf::from(path) }
            }
            Value::String(text) => text.into(),
            other => other.to_string().into(),
        };
        flags.push(Given::new(flag, value));
    }
    let is_enabled = given.get("enabled").map(|value| {
        value.as_bool().with_context(|| format!("{}: `{REFINE}enabled` is {value}, expected true or false", of()))
    });
    let (is_enabled, has_adapter) = (is_enabled.transpose()?, given.contains_key("lora_path"));
    Ok(Some(Refinement { path, is_enabled, has_adapter, flags }))
}
