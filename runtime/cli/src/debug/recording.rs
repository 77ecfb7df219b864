//! Recorded tensors of a reference, and how ours compare with them.
//!
//! A recording is a safetensors file with tensors by name and a JSON text `meta` in its metadata. Large tensors are thinned:
//! of `x` there are `x.sample`, every k-th element of it flattened (k and the shape stand in `meta` under `sampled`), and
//! `x.stats`: mean, standard deviation (unbiased), minimum, maximum, L2 norm, sum of magnitudes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ltxc_ir::TensorType;
use ltxc_ir::eval::Tensor;
use ltxc_models::TensorDirectory;
use ltxc_runtime::noise_files::{self, Container};
use ltxc_runtime::weights::dtype_of;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::args::ReferenceVersion;

/// All tensors of a file, decoded.
#[derive(Clone)]
pub struct TensorFile {
    /// Path, for messages.
    pub path: PathBuf,
    /// Header metadata.
    pub metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

impl TensorFile {
    /// Reads a file: safetensors, or one of the containers of noise, by its extension. Tensors of dtypes that graphs do not
    /// know are left out.
    ///
    /// # Errors
    /// A file that cannot be read or is damaged.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let name = || format!("`{}`", path.display());
        if matches!(Container::of(path), Ok(Container::Npy | Container::Npz | Container::Pt)) {
            let stored = noise_files::read(path)?.into_iter();
            let tensors = stored.map(|t| (t.name, Tensor::f32(&t.shape, &t.values))).collect();
            return Ok(TensorFile { path: path.into(), metadata: BTreeMap::new(), tensors });
        }
        let bytes = std::fs::read(path).with_context(name)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).with_context(name)?;
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let file = SafeTensors::deserialize(&bytes).with_context(name)?;
        let tensors = file.tensors().into_iter().filter_map(|(name, view)| {
            let ty = TensorType::new(dtype_of(view.dtype())?, view.shape());
            Some((name, Tensor::from_bytes(ty, view.data())))
        });
        Ok(TensorFile { path: path.into(), metadata, tensors: tensors.collect() })
    }

    /// The tensor `name`, if it is there.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Puts a tensor in the place of the one called `name`, in memory alone.
    pub fn insert(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The JSON in the metadata entry `meta`.
    pub fn meta(&self) -> Value {
        self.json("meta")
    }

    /// The JSON in the metadata entry `config`.
    pub fn config(&self) -> Value {
        self.json("config")
    }

    fn json(&self, name: &str) -> Value {
        self.metadata.get(name).and_then(|m| serde_json::from_str(m).ok()).unwrap_or_default()
    }
}

impl TensorDirectory for TensorFile {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.tensors.get(key).map(|t| t.ty.clone())
    }
}

/// How a tensor was recorded.
#[derive(Clone, Debug)]
pub struct Form {
    /// Extents, where they are known.
    pub shape: Option<Vec<usize>>,
    /// Key of the values.
    pub key: String,
    /// Every `step`-th value was recorded.
    pub step: usize,
    /// Recorded values.
    pub values: Vec<f32>,
    /// Key and values of the statistics, if not every value was recorded.
    pub statistics: Option<(String, Vec<f32>)>,
}

impl Form {
    /// How `name` was recorded in `file`, of which `meta` is the metadata; `len` is how many values ours has.
    pub fn of(file: &TensorFile, meta: &Value, name: &str, len: usize) -> Option<Form> {
        if let Some(tensor) = file.find(name) {
            let shape = Some(tensor.ty.shape.clone());
            return Some(Form { shape, key: name.into(), step: 1, values: tensor.to_f32(), statistics: None });
        }
        let (key, stats) = (format!("{name}.sample"), format!("{name}.stats"));
        let values = file.find(&key)?.to_f32();
        let meta = &meta["sampled"][name];
        let size = |v: &Value| v.as_u64().map(|n| n as usize);
        let shape: Option<Vec<usize>> = meta["shape"].as_array().and_then(|s| s.iter().map(size).collect());
        let step = size(&meta["stride"]).filter(|&s| s > 0).unwrap_or_else(|| sample_step(len, values.len()));
        let statistics = Some((stats.clone(), file.find(&stats)?.to_f32()));
        Some(Form { shape, key, step, values, statistics })
    }

    /// Number of values that the whole tensor has, where that is known.
    pub fn elements(&self) -> Option<usize> {
        self.shape.as_ref().map(|s| s.iter().product())
    }

    /// How far statistics of all our values are from the recorded ones, relative to the spread of the values: for each of
    /// the six. Nothing where every value was recorded.
    pub fn statistics_errors(&self, found: &[f32]) -> Vec<f64> {
        let Some((_, expected)) = &self.statistics else { return Vec::new() };
        let spread = expected.get(1).map_or(0.0, |s| s.abs());
        let errors = statistics(found).into_iter().zip(expected).map(|(found, &expected)| {
            // A mean or an extreme near zero is measured against the spread of the values.
            let scale = f64::from(spread.max(expected.abs()));
            (found - f64::from(expected)).abs() / scale.max(1e-30)
        });
        errors.collect()
    }
}

/// Every `step`-th value.
pub fn thinned(values: &[f32], step: usize) -> Vec<f32> {
    values.iter().copied().step_by(step.max(1)).collect()
}

/// The distance of samples where none was written down: the generator takes steps that neither 2 nor 3 divides.
fn sample_step(len: usize, samples: usize) -> usize {
    let fits = |step: &usize| len.div_ceil(*step) == samples && !step.is_multiple_of(2) && !step.is_multiple_of(3);
    (1..=len).find(fits).unwrap_or(1)
}

/// Mean, standard deviation (unbiased), minimum, maximum, L2 norm, sum of magnitudes.
pub fn statistics(values: &[f32]) -> [f64; 6] {
    let n = values.len() as f64;
    let wide = || values.iter().map(|&v| v as f64);
    let mean = wide().sum::<f64>() / n;
    let variance = wide().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    [
        mean,
        variance.sqrt(),
        wide().fold(f64::INFINITY, f64::min),
        wide().fold(f64::NEG_INFINITY, f64::max),
        wide().map(|v| v * v).sum::<f64>().sqrt(),
        wide().map(f64::abs).sum(),
    ]
}

/// Relative L2 distance `‖a − b‖ / ‖b‖`, in f64. Infinite if lengths differ or a value of either is not finite: NaN would be
/// within every limit.
pub fn relative_l2(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() || found.iter().chain(expected).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let (mut diff, mut norm) = (0f64, 0f64);
    for (&a, &b) in found.iter().zip(expected) {
        diff += (a as f64 - b as f64).powi(2);
        norm += (b as f64).powi(2);
    }
    if diff == 0.0 { 0.0 } else { (diff / norm.max(1e-60)).sqrt() }
}

/// How two tensors compare, element by element.
#[derive(Clone, Debug, PartialEq)]
pub struct Distance {
    /// Relative L2.
    pub relative_l2: f64,
    /// Largest difference.
    pub max_abs: f64,
    /// Mean difference.
    pub mean_abs: f64,
    /// The same by the mean magnitude of the second list.
    pub relative_mean: f64,
    /// Mean squared difference.
    pub mse: f64,
    /// Cosine of the angle between the two.
    pub cosine: f64,
    /// Pearson correlation.
    pub pearson: f64,
}

impl Distance {
    /// The distance of two lists of equal length; infinite otherwise.
    pub fn of(a: &[f32], b: &[f32]) -> Distance {
        if a.len() != b.len() || a.is_empty() {
            let far = f64::INFINITY;
            let (cosine, pearson) = (0.0, 0.0);
            return Distance {
                relative_l2: far,
                max_abs: far,
                mean_abs: far,
                relative_mean: far,
                mse: far,
                cosine,
                pearson,
            };
        }
        let n = a.len() as f64;
        let pairs = || a.iter().zip(b).map(|(&x, &y)| (f64::from(x), f64::from(y)));
        let (mean_a, mean_b) = (pairs().map(|p| p.0).sum::<f64>() / n, pairs().map(|p| p.1).sum::<f64>() / n);
        let dot = |f: &dyn Fn(f64, f64) -> f64| pairs().map(|(x, y)| f(x, y)).sum::<f64>();
        let angle = |xy: f64, xx: f64, yy: f64| match xx * yy {
            0.0 => f64::from(xx == yy),
            product => xy / product.sqrt(),
        };
        let difference = dot(&|x, y| (x - y).abs());
        Distance {
            relative_l2: relative_l2(a, b),
            // A difference that is no number is larger than any.
            max_abs: pairs()
                .map(|(x, y)| (x - y).abs())
                .fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { d.max(m) }),
            mean_abs: difference / n,
            relative_mean: if difference == 0.0 { 0.0 } else { difference / dot(&|_, y| y.abs()).max(1e-30) },
            mse: dot(&|x, y| (x - y).powi(2)) / n,
            cosine: angle(dot(&|x, y| x * y), dot(&|x, _| x * x), dot(&|_, y| y * y)),
            pearson: angle(
                dot(&|x, y| (x - mean_a) * (y - mean_b)),
                dot(&|x, _| (x - mean_a).powi(2)),
                dot(&|_, y| (y - mean_b).powi(2)),
            ),
        }
    }
}

/// The folders in which recordings are looked for, in that order.
#[derive(Clone, Debug)]
pub struct References {
    folders: Vec<PathBuf>,
}

impl References {
    /// Recordings below `roots`: in a folder of components, or in one of the layout of the fixtures
    /// (`expected-1.2.0` before `expected`).
    ///
    /// # Errors
    /// A folder that is not there.
    pub fn new(roots: &[PathBuf]) -> Result<References> {
        let mut folders = Vec::new();
        for root in roots {
            if !root.is_dir() {
                bail!("`{}` is no folder of recordings", root.display());
            }
            folders.extend(["expected-1.2.0", "expected"].map(|d| root.join(d)).into_iter().filter(|d| d.is_dir()));
            folders.push(root.clone());
        }
        Ok(References { folders })
    }

    /// The release of the reference that recordings are of: 1.0.0 in a layout that has nothing of 1.2.0.
    pub fn release(&self) -> ReferenceVersion {
        let has = |name: &str| self.folders.iter().any(|folder| folder.ends_with(name));
        if has("expected") && !has("expected-1.2.0") { ReferenceVersion::V1_0_0 } else { ReferenceVersion::V1_2_0 }
    }

    /// The recording `name` of a family of models: `<family>/<name>`, or `<name>` in a folder for one model.
    pub fn find(&self, family: &str, name: &str) -> Option<PathBuf> {
        let places = [format!("{family}/{name}.safetensors"), format!("{name}.safetensors")];
        let all = places.iter().flat_map(|place| self.folders.iter().map(move |folder| folder.join(place)));
        all.into_iter().find(|path| path.is_file())
    }

    /// Names of recordings below `<folder>`, for example of whole runs.
    pub fn below(&self, folder: &str) -> BTreeMap<String, PathBuf> {
        let mut found = BTreeMap::new();
        for path in self.folders.iter().map(|f| f.join(folder)) {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path());
            for path in entries.filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
                let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
                found.entry(name).or_insert(path);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_what_they_say() {
        let d = Distance::of(&[1.0, 2.0, 3.0], &[1.0, 2.0, 5.0]);
        assert!((d.max_abs - 2.0).abs() < 1e-12 && (d.mse - 4.0 / 3.0).abs() < 1e-12);
        assert!((d.relative_l2 - (4.0f64 / 30.0).sqrt()).abs() < 1e-12);
        assert!((d.relative_mean - 2.0 / 8.0).abs() < 1e-12);
        let same = Distance::of(&[1.0, -1.0], &[1.0, -1.0]);
        assert_eq!((same.relative_l2, same.cosine, same.pearson), (0.0, 1.0, 1.0));
        let opposite = Distance::of(&[1.0, -1.0], &[-1.0, 1.0]);
        assert!((opposite.cosine + 1.0).abs() < 1e-12);
        assert_eq!(Distance::of(&[1.0], &[1.0, 2.0]).relative_l2, f64::INFINITY);
        for (found, expected) in [([f32::NAN], [1.0]), ([1.0], [f32::NAN]), ([1.0], [f32::INFINITY])] {
            assert_eq!(relative_l2(&found, &expected), f64::INFINITY, "{found:?} {expected:?}");
        }
    }
}
