//! Two sets of model files, tensor by tensor, whatever their layout: what `ltxc debug weights --against` prints.
//!
//! # Easy to get wrong
//! - fp8 counts as what it is read as: values times their scale. The scales themselves are no weights.
//! - Some statistics of VAEs are in single files alone; nothing reads them.
//! - A quantised GGUF tensor may differ by what its integers cannot say, one step of the coarsest block.

use std::path::Path;

use anyhow::Result;
use half::bf16;
use ltxc_ir::{DType, TensorType};
use ltxc_models::checkpoint::gguf::{BlockType, GgufFile};
use ltxc_models::checkpoint::{Checkpoint, Component, layout};
use ltxc_runtime::stats::decoded;
use serde_json::{Value, json};

use super::recording::Distance;
use super::weights::row_names;

/// Largest difference of a weight that two layouts of one checkpoint may have.
const LOADED_LIMIT: f64 = 1e-3;

/// Ends of keys that only some layouts have and nothing reads.
const UNREAD: [&str; 3] =
    ["per_channel_statistics.channel", "statistics.mean-of-stds", "mean-of-stds_over_std-of-means"];

/// Whether `key` is what quantised files have beside a weight.
pub(super) fn is_companion(key: &str) -> bool {
    ["weight_scale", "input_scale", "weight_scale_2"].iter().any(|s| key.rsplit('.').next() == Some(s))
}

/// What a checkpoint is compared with.
pub(super) enum Other {
    /// Another one.
    Checkpoint(Checkpoint),
    /// A transformer in a GGUF file.
    Gguf(GgufFile),
}

/// Values of a tensor.
struct Values {
    shape: Vec<usize>,
    values: Vec<f32>,
    /// What they may differ by because of how they are stored.
    step: f64,
    /// How they are stored, where that is GGUF's.
    block: Option<BlockType>,
}

impl Other {
    /// Opens `path`.
    ///
    /// # Errors
    /// If it is neither a model nor a GGUF file of one.
    pub(super) fn open(path: &Path) -> Result<Other> {
        Ok(match path.is_file() && GgufFile::is_one(path) {
            true => Other::Gguf(GgufFile::open(path)?),
            false => Other::Checkpoint(Checkpoint::open(path)?),
        })
    }

    fn values(&self, key: &str) -> Option<Values> {
        match self {
            Other::Checkpoint(checkpoint) => values(checkpoint, key),
            Other::Gguf(file) => {
                let tensor = file.tensor(key)?;
                let decoded = file.values(tensor);
                Some(Values {
                    shape: tensor.shape.clone(),
                    values: decoded.values,
                    step: decoded.step.into(),
                    block: Some(tensor.ty),
                })
            }
        }
    }

    fn keys(&self) -> Vec<&str> {
        match self {
            Other::Checkpoint(checkpoint) => checkpoint.tensors().map(|(key, _)| key).collect(),
            Other::Gguf(file) => file.tensors().map(|(key, _)| key).collect(),
        }
    }

    /// Whether files of this kind can have the tensor `key`: GGUF is for transformers.
    fn can_have(&self, key: &str) -> bool {
        matches!(self, Other::Checkpoint(_))
            || layout::canonical(key, None).is_some_and(|(component, _)| component == Component::Transformer)
    }
}

/// Values of a tensor as a run reads them, if its dtype has any.
fn values(checkpoint: &Checkpoint, key: &str) -> Option<Values> {
    let (stored, data) = (checkpoint.tensor(key)?.stored, checkpoint.data(key)?);
    let ty = stored.ty()?;
    let mut values = decoded(&ty, data);
    if checkpoint.is_fp8(key) {
        let scale = checkpoint.data(&format!("{key}_scale")).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        let scale = scale.map_or(1.0, f32::from_le_bytes);
        values.iter_mut().for_each(|v| *v = bf16::from_f32(*v * scale).to_f32());
    }
    Some(Values { shape: ty.shape, values, step: 0.0, block: None })
}

/// A tensor that differs.
struct Difference {
    key: String,
    what: String,
    most: f64,
    /// Whether it is more than the way of storing explains.
    is_bad: bool,
}

/// Compares two sets of files by canonical keys; returns whether they hold the same values.
pub(super) fn compare(a: &Checkpoint, b: &Other, wanted: &dyn Fn(&str) -> bool, json_output: bool) -> bool {
    let is_compared = |key: &str| wanted(key) && b.can_have(key) && !is_companion(key);
    let (mut equal, mut different, mut only) = (0usize, Vec::new(), Vec::new());
    for (key, _) in a.tensors().filter(|(key, _)| is_compared(key)) {
        let (Some(x), Some(y)) = (values(a, key), b.values(key)) else {
            only.push(format!("{key} (only in the first)"));
            continue;
        };
        match difference(key, &x, &y) {
            None => equal += 1,
            Some(found) => different.push(found),
        }
    }
    let of_second = b.keys().into_iter().filter(|key| wanted(key) && !is_companion(key) && a.tensor(key).is_none());
    only.extend(of_second.map(|key| format!("{key} (only in the second)")));
    let (unread, only): (Vec<String>, Vec<String>) = only
        .into_iter()
        .partition(|line| UNREAD.iter().any(|end| line.split(' ').next().is_some_and(|k| k.ends_with(end))));
    different.sort_by(|x, y| y.is_bad.cmp(&x.is_bad).then(y.most.total_cmp(&x.most)));
    let ok = different.iter().all(|d| !d.is_bad) && only.is_empty();
    if json_output {
        let rows: Vec<Value> = different
            .iter()
            .map(|d| json!({"key": d.key, "what": d.what, "max_abs": format!("{:e}", d.most), "ok": !d.is_bad}))
            .collect();
        println!("{}", json!({"equal": equal, "different": rows, "only": only, "unread": unread, "ok": ok}));
        return ok;
    }
    println!("{equal} tensors are equal, {} differ, {} are in one only", different.len(), only.len());
    for d in different.iter().take(20) {
        println!("  {}: largest difference {:.3e}, {}", d.key, d.most, d.what);
    }
    only.iter().take(20).for_each(|line| println!("  {line}"));
    if !unread.is_empty() {
        println!("{} more are in one only and read by nothing", unread.len());
    }
    if let Other::Gguf(file) = b {
        println!("compared with the transformer in `{}`; GGUF holds nothing else", file.path().display());
    }
    println!("{}", if ok { "the same model" } else { "NOT the same model" });
    ok
}

fn difference(key: &str, x: &Values, y: &Values) -> Option<Difference> {
    let stored = y.block.map_or(String::new(), |ty| format!(" as {}", ty.name()));
    if x.shape != y.shape {
        let what = format!("{:?} and {:?}{stored}", x.shape, y.shape);
        return Some(Difference { key: key.into(), what, most: f64::INFINITY, is_bad: true });
    }
    let distance = Distance::of(&x.values, &y.values);
    let most = distance.max_abs;
    if most == 0.0 {
        return None;
    }
    let ty = TensorType::new(DType::F32, x.shape.clone());
    let what = swapped_rows(key, &ty, &x.values, &y.values);
    let what = what.unwrap_or_else(|| format!("relative L2 {:.2e}{stored}", distance.relative_l2));
    // Also if there is no number to compare.
    let is_fine = most < LOADED_LIMIT.max(y.step);
    Some(Difference { key: key.into(), what, most, is_bad: !is_fine })
}

/// What of two modulation tables that hold the same rows in another order was swapped.
fn swapped_rows(key: &str, ty: &TensorType, x: &[f32], y: &[f32]) -> Option<String> {
    let &[rows, width] = &ty.shape[..] else { return None };
    if !key.contains("scale_shift_table") || rows < 2 {
        return None;
    }
    let row = |values: &[f32], i: usize| values[i * width..(i + 1) * width].to_vec();
    let place = |i: usize| (0..rows).find(|&j| row(y, j) == row(x, i));
    let places: Vec<usize> = (0..rows).map(place).collect::<Option<_>>()?;
    let names = row_names(key, rows);
    let moved: Vec<&str> =
        places.iter().enumerate().filter(|(i, j)| i != *j).filter_map(|(i, _)| Some(names.get(i)?.as_str())).collect();
    (!moved.is_empty()).then(|| format!("the same rows in another order: {}", moved.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swapped_rows_are_told() {
        let ty = TensorType::f32([2, 2]);
        let found = swapped_rows("x.scale_shift_table", &ty, &[1.0, 2.0, 3.0, 4.0], &[3.0, 4.0, 1.0, 2.0]);
        assert_eq!(found.as_deref(), Some("the same rows in another order: shift, scale"));
        assert_eq!(swapped_rows("x.scale_shift_table", &ty, &[1.0, 2.0, 3.0, 4.0], &[1.0, 2.0, 3.0, 5.0]), None);
    }
}
