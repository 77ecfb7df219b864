//! Tensors of other tools that results are compared with: recordings (thinned ones, too), or any file of tensors.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use ltxc_runtime::noise_files;
use serde_json::{Value, json};

use crate::debug::recording::{Distance, Form, TensorFile, thinned};

/// What a result is compared with.
#[derive(Debug, Args)]
pub struct ReferenceArgs {
    /// Compare the result with a tensor of this file (.safetensors, .npy, .npz, .pt), channels first.
    #[arg(long, value_name = "FILE", alias = "ref")]
    pub compare: Option<PathBuf>,
    /// Its name, if the file has several that could be it.
    #[arg(long, value_name = "NAME", requires = "compare")]
    pub compare_tensor: Option<String>,
    /// Largest relative L2 that counts as equal.
    #[arg(long, default_value_t = 1e-3)]
    pub limit: f64,
}

/// How a result compares.
pub(super) struct Verdict {
    name: String,
    distance: Distance,
    /// Whether it is the same.
    pub ok: bool,
}

impl ReferenceArgs {
    /// Compares `found`, channels first. `names`: what the tensor may be called if the user does not say.
    pub(super) fn check(&self, names: &[&str], found: &[f32]) -> Result<Option<Verdict>> {
        let Some(path) = &self.compare else { return Ok(None) };
        let names: Vec<&str> = self.compare_tensor.as_deref().map_or(names.to_vec(), |name| vec![name]);
        let Some((name, distance)) = distance(path, &names, found)? else {
            bail!("`{}` has none of `{}`; name its tensor with `--compare-tensor`", path.display(), names.join("`, `"))
        };
        let ok = distance.relative_l2 <= self.limit;
        Ok(Some(Verdict { name, distance, ok }))
    }
}

fn distance(path: &Path, names: &[&str], found: &[f32]) -> Result<Option<(String, Distance)>> {
    if path.extension().is_some_and(|e| e == "safetensors") {
        let file = TensorFile::open(path)?;
        let meta = file.meta();
        let form = names.iter().find_map(|name| Some((name, Form::of(&file, &meta, name, found.len())?)));
        return Ok(form.map(|(name, form)| {
            let is_whole = form.elements().is_none_or(|n| n == found.len());
            let picked = if is_whole { thinned(found, form.step) } else { Vec::new() };
            (name.to_string(), Distance::of(&picked, &form.values))
        }));
    }
    let tensors = noise_files::read(path)?;
    // A file with one tensor needs no name.
    let tensor = match &tensors[..] {
        [only] => Some(only),
        all => names.iter().find_map(|name| all.iter().find(|t| t.name == *name)),
    };
    Ok(tensor.map(|t| (t.name.clone(), Distance::of(found, &t.values))))
}

impl Verdict {
    /// As part of a JSON object.
    pub fn facts(&self) -> Value {
        let finite = |v: f64| if v.is_finite() { json!(v) } else { json!("inf") };
        json!({"tensor": self.name, "relative_l2": finite(self.distance.relative_l2),
            "max_abs": finite(self.distance.max_abs), "cosine": self.distance.cosine, "ok": self.ok})
    }

    /// In a line.
    pub fn text(&self) -> String {
        format!(
            "{} compared with `{}`: relative L2 {:.2e}, largest difference {:.2e}, cosine {:.6}",
            if self.ok { "ok " } else { "BAD" },
            self.name,
            self.distance.relative_l2,
            self.distance.max_abs,
            self.distance.cosine
        )
    }
}

/// Facts of a verdict that may not be there.
pub(super) fn facts(verdict: Option<&Verdict>) -> Value {
    verdict.map_or(Value::Null, Verdict::facts)
}
