//! LoRA files side by side, and merged weights against what they should be.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use ltxc_ir::TensorType;
use ltxc_ir::eval::{Data, Tensor};
use ltxc_models::checkpoint::Checkpoint;
use ltxc_models::lora::{LoraFile, LoraModule, LoraTargets};
use ltxc_runtime::adapters::{AdapterMode, AdapterSet};
use ltxc_runtime::stats::decoded;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::with_strength;
use crate::adapters::opened_adapter;
use crate::lora::models;
use crate::model_files::{MODEL, local};

/// `ltxc debug lora diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A LoRA file, or folder with one.
    pub a: PathBuf,
    /// Another one.
    pub b: PathBuf,
    /// Model whose layers are meant; without one, the published ones.
    #[arg(long, value_name = "FILE", aliases = ["checkpoint", "model-path", "model"])]
    pub checkpoint_path: Option<PathBuf>,
    /// Relative difference up to which what they add to a layer is the same.
    #[arg(long, default_value_t = 1e-6)]
    pub limit: f64,
    /// Most rows of the table.
    #[arg(long, default_value_t = 20)]
    pub top: usize,
}

/// Layers of a LoRA by the canonical key of their weights; by their own names where no known model has them.
fn by_key<'f>(file: &'f LoraFile, targets: &[(String, LoraTargets)]) -> BTreeMap<String, &'f LoraModule> {
    let key = |module: &LoraModule| {
        let known = targets.iter().find_map(|(_, targets)| targets.key_of(&module.name));
        known.map_or_else(|| module.name.clone(), String::from)
    };
    file.modules().iter().map(|module| (key(module), module)).collect()
}

/// What differs in one layer.
struct LayerDiff {
    key: String,
    what: String,
    /// Relative Frobenius norm of the difference of both products; infinite for other shapes.
    relative: f64,
}

/// `ltxc debug lora diff`. Returns whether both add the same to the same layers.
///
/// # Errors
/// Files that are no LoRAs.
pub fn diff(args: &DiffArgs, json_output: bool) -> Result<bool> {
    let (a, b) = (LoraFile::open(&local(&args.a)?)?, LoraFile::open(&local(&args.b)?)?);
    let targets = models(args.checkpoint_path.as_deref())?;
    let (left, right) = (by_key(&a, &targets), by_key(&b, &targets));
    let only = |x: &BTreeMap<String, &LoraModule>, y: &BTreeMap<String, &LoraModule>| -> Vec<String> {
        x.keys().filter(|key| !y.contains_key(*key)).cloned().collect()
    };
    let only = [only(&left, &right), only(&right, &left)];
    let both: Vec<(&String, &LoraModule, &LoraModule)> =
        left.iter().filter_map(|(key, x)| Some((key, *x, *right.get(key)?))).collect();
    let mut layers: Vec<LayerDiff> = both.par_iter().map(|(key, x, y)| layer_diff(key, (&a, *x), (&b, *y))).collect();
    layers.sort_by(|x, y| y.relative.total_cmp(&x.relative));
    let bad = layers.iter().filter(|l| l.relative.is_nan() || l.relative > args.limit).count();
    let ok = bad == 0 && only.iter().all(Vec::is_empty);
    if json_output {
        let rows: Vec<Value> = (layers.iter())
            .map(|l| json!({"layer": l.key, "what": l.what, "relative": l.relative.is_finite().then_some(l.relative)}))
            .collect();
        println!("{}", json!({"only_a": only[0], "only_b": only[1], "layers": rows, "different": bad, "ok": ok}));
        return Ok(ok);
    }
    println!("{} and {}: {} layers in both, {bad} differ", a.dialect(), b.dialect(), layers.len());
    for (name, keys) in [("first", &only[0]), ("second", &only[1])] {
        keys.iter().take(args.top).for_each(|key| println!("only in the {name}: {key}"));
        if keys.len() > args.top {
            println!("  … and {} more", keys.len() - args.top);
        }
    }
    for l in layers.iter().take(args.top).filter(|l| l.relative > 0.0 || !l.what.is_empty()) {
        println!("{:<72} {:.3e} {}", l.key, l.relative, l.what);
    }
    println!("{}", if ok { "both add the same" } else { "they do NOT add the same" });
    Ok(ok)
}

fn layer_diff(key: &str, (a, x): (&LoraFile, &LoraModule), (b, y): (&LoraFile, &LoraModule)) -> LayerDiff {
    let mut what = Vec::new();
    let shape = |m: &LoraModule| [m.outputs, m.inputs];
    if shape(x) != shape(y) {
        let what = format!("shapes {:?} and {:?}", shape(x), shape(y));
        return LayerDiff { key: key.into(), what, relative: f64::INFINITY };
    }
    if x.rank != y.rank {
        what.push(format!("ranks {} and {}", x.rank, y.rank));
    }
    if x.scale != y.scale {
        what.push(format!("scales {} and {}", x.scale, y.scale));
    }
    let (p, q) = (Product::of(a, x), Product::of(b, y));
    if x.rank == y.rank {
        for (name, u, v) in [("A", &p.down, &q.down), ("B", &p.up, &q.up)] {
            let most = u.iter().zip(v).map(|(u, v)| (u - v).abs()).fold(0.0, f32::max);
            if most > 0.0 {
                what.push(format!("{name} by up to {most:.3e}"));
            }
        }
    }
    // ‖p − q‖² = ‖p‖² + ‖q‖² − 2 ⟨p, q⟩, all of which need no product of full size.
    let (pp, qq, pq) = (p.dot(&p), q.dot(&q), p.dot(&q));
    let relative = ((pp + qq - 2.0 * pq).max(0.0) / pp.max(qq).max(f64::MIN_POSITIVE)).sqrt();
    // What is left of equal products is cancellation.
    let relative = if what.is_empty() && relative < 1e-6 { 0.0 } else { relative };
    LayerDiff { key: key.into(), what: what.join(", "), relative }
}

/// A low-rank product, `scale · up · down`, that is not multiplied out.
struct Product {
    rank: usize,
    scale: f64,
    /// `[rank, inputs]`
    down: Vec<f32>,
    /// `[outputs, rank]`
    up: Vec<f32>,
}

impl Product {
    fn of(file: &LoraFile, module: &LoraModule) -> Product {
        let [down, up] = file.factors(module);
        Product { rank: module.rank, scale: module.scale, down, up }
    }

    /// `⟨self, other⟩`: the sum over both ranks of the products of `down` rows and `up` columns.
    fn dot(&self, other: &Product) -> f64 {
        let columns = |p: &Product| -> Vec<Vec<f32>> {
            (0..p.rank).map(|r| p.up.iter().skip(r).step_by(p.rank).copied().collect()).collect()
        };
        let rows = |p: &Product| -> Vec<Vec<f32>> {
            p.down.chunks((p.down.len() / p.rank.max(1)).max(1)).map(<[f32]>::to_vec).collect()
        };
        let (ours, theirs) = ((rows(self), columns(self)), (rows(other), columns(other)));
        let pairs = (0..self.rank).flat_map(|i| (0..other.rank).map(move |j| (i, j)));
        let sum: f64 = pairs.map(|(i, j)| dot(&ours.0[i], &theirs.0[j]) * dot(&ours.1[i], &theirs.1[j])).sum();
        self.scale * other.scale * sum
    }
}

/// `Σ aᵢ bᵢ` in f64, in lanes that the compiler can compute at once.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    for (a, b) in a.chunks(lanes.len()).zip(b.chunks(lanes.len())) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f64::from(a) * f64::from(b);
        }
    }
    lanes.iter().sum()
}

/// `ltxc debug lora merge-check`.
#[derive(Debug, Args)]
pub struct MergeCheckArgs {
    /// Model without the LoRA.
    #[arg(long, value_name = "FILE", aliases = ["checkpoint", "model-path", "model"])]
    pub checkpoint_path: PathBuf,
    /// LoRA and its strength, if that is not 1.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    pub lora: String,
    /// Model with the LoRA merged into it, by any tool; without one, the weights that ltxc runs with.
    #[arg(long, value_name = "FILE")]
    pub merged: Option<PathBuf>,
    /// Mean absolute difference from which a weight is wrong, unless rounding to bf16 explains it.
    #[arg(long, default_value_t = 1e-4)]
    pub limit: f64,
    /// Rows of each weight that are compared, evenly spread.
    #[arg(long, default_value_t = 256)]
    pub rows: usize,
    /// Most rows of the table, the worst first.
    #[arg(long, default_value_t = 10)]
    pub top: usize,
}

/// A merged weight against base + strength · scale · B · A.
struct Merged {
    key: String,
    mean_abs: f64,
    max_abs: f64,
    /// Mean magnitude of what is added.
    added: f64,
}

/// Share of what is added that rounding explains: the reference rounds a factor, the product and the sum to bf16.
const ROUNDING: f64 = 1.0 / 128.0;

/// `ltxc debug lora merge-check`. Returns whether every merged weight is what it should be, and every other one as before.
///
/// # Errors
/// A LoRA that does not fit the model.
pub fn merge_check(args: &MergeCheckArgs, json_output: bool) -> Result<bool> {
    let (path, strength) = with_strength(&args.lora)?;
    let base = Checkpoint::open(&local(&args.checkpoint_path)?)?;
    let lora = LoraFile::open(&local(&path)?)?;
    let targets = LoraTargets::of(&base);
    let fit = lora.fit(&targets, true)?;
    let unmatched = fit.unmatched.clone();
    let adapters = AdapterSet::new(vec![(opened_adapter(&lora, fit)?, strength as f32)], AdapterMode::Merged);
    let other =
        args.merged.as_deref().map(|path| Checkpoint::open(&local(path)?).map_err(anyhow::Error::from)).transpose()?;
    let (mut merged, mut changed) = (Vec::new(), Vec::new());
    let mut keys = std::collections::BTreeSet::new();
    for module in lora.modules() {
        let Some(key) = targets.key_of(&module.name) else { continue };
        let (ty, bytes) = weight(&base, key)?;
        let (found_ty, found) = match &other {
            Some(other) => {
                let (ty, bytes) = weight(other, key)?;
                (ty.clone(), decoded(&ty, bytes))
            }
            None => {
                let memory = adapters.merged(MODEL, key, &ty, bytes)?;
                let values = memory.map_or_else(|| decoded(&ty, bytes), |memory| decoded(&ty, memory.bytes()));
                (ty.clone(), values)
            }
        };
        keys.insert(key.to_string());
        let product = Product::of(&lora, module);
        let expected = Expected { base: decoded(&ty, bytes), inputs: module.inputs, strength, product };
        merged.push(compare(key, &expected, &found_ty, &found, args.rows));
    }
    if let Some(other) = &other {
        let is_other = |key: &&str| !keys.contains(*key) && other.tensor(key).is_some();
        changed.extend(base.tensors().map(|(key, _)| key).filter(is_other).filter_map(|key| {
            let (a, b) = (weight(&base, key).ok()?, weight(other, key).ok()?);
            (decoded(&a.0, a.1) != decoded(&b.0, b.1)).then(|| key.to_string())
        }));
    }
    merged.sort_by(|a, b| b.mean_abs.total_cmp(&a.mean_abs));
    let is_bad = |m: &&Merged| m.mean_abs.is_nan() || m.mean_abs >= args.limit.max(m.added * ROUNDING);
    let bad = merged.iter().filter(is_bad).count();
    let ok = bad == 0 && changed.is_empty() && unmatched.is_empty();
    if json_output {
        let rows: Vec<Value> = (merged.iter().take(args.top))
            .map(|m| json!({"weight": m.key, "mean_abs": m.mean_abs, "max_abs": m.max_abs, "added": m.added}))
            .collect();
        println!(
            "{}",
            json!({"weights": merged.len(), "bad": bad, "worst": rows, "changed_besides": changed, "unmatched": unmatched, "ok": ok})
        );
        return Ok(ok);
    }
    println!(
        "{} weights merged with strength {strength}, {bad} differ by more than {:.0e} and than rounding to bf16 explains",
        merged.len(),
        args.limit
    );
    println!("{:<72} {:>10} {:>10} {:>10}", "worst", "mean abs", "max abs", "added");
    for m in merged.iter().take(args.top) {
        println!("{:<72} {:>10.2e} {:>10.2e} {:>10.2e}", m.key, m.mean_abs, m.max_abs, m.added);
    }
    changed.iter().take(args.top).for_each(|key| println!("changed, though the LoRA has nothing for it: {key}"));
    unmatched.iter().take(args.top).for_each(|key| println!("unmatched key {key}"));
    println!("{}", if ok { "merged as it should be" } else { "NOT merged as it should be" });
    Ok(ok)
}

fn weight<'c>(checkpoint: &'c Checkpoint, key: &str) -> Result<(TensorType, &'c [u8])> {
    let at = checkpoint.tensor(key).with_context(|| format!("`{}` has no `{key}`", checkpoint.name()))?;
    let ty = at.stored.ty().with_context(|| format!("`{key}` is {}, expected floating point", at.stored.dtype))?;
    let bytes = checkpoint.data(key).with_context(|| format!("`{}` has no data for `{key}`", checkpoint.name()))?;
    Ok((ty, bytes))
}

/// What a merged weight should be.
struct Expected {
    base: Vec<f32>,
    inputs: usize,
    strength: f64,
    product: Product,
}

impl Expected {
    /// One row, in f64.
    fn row(&self, row: usize) -> Vec<f64> {
        let (n, p) = (self.inputs, &self.product);
        let mut sum: Vec<f64> = self.base[row * n..(row + 1) * n].iter().map(|&v| f64::from(v)).collect();
        for r in 0..p.rank {
            let factor = self.strength * p.scale * f64::from(p.up[row * p.rank + r]);
            sum.iter_mut().zip(&p.down[r * n..(r + 1) * n]).for_each(|(sum, &a)| *sum += factor * f64::from(a));
        }
        sum
    }
}

/// Compares with the exact sum, rounded once to the dtype of the merged weight.
fn compare(key: &str, expected: &Expected, ty: &TensorType, found: &[f32], most_rows: usize) -> Merged {
    let n = expected.inputs.max(1);
    let rows = expected.base.len() / n;
    if found.len() != expected.base.len() {
        return Merged { key: key.into(), mean_abs: f64::INFINITY, max_abs: f64::INFINITY, added: 0.0 };
    }
    let row_ty = TensorType::new(ty.dtype, [n]);
    let rounded = |row: Vec<f64>| decoded(&row_ty, &Tensor { ty: row_ty.clone(), data: Data::Float(row) }.to_bytes());
    let step = rows.div_ceil(most_rows.max(1)).max(1);
    let chosen: Vec<usize> = (0..rows).step_by(step).collect();
    let differences = |&row: &usize| {
        let exact = expected.row(row);
        let base = &expected.base[row * n..(row + 1) * n];
        let added: f64 = exact.iter().zip(base).map(|(sum, base)| (sum - f64::from(*base)).abs()).sum();
        let pairs = rounded(exact).into_iter().zip(&found[row * n..(row + 1) * n]);
        let errors = pairs.map(|(exact, found)| f64::from((exact - found).abs()));
        let larger = |most: f64, e: f64| if e.is_nan() { f64::INFINITY } else { most.max(e) };
        let (sum, most) = errors.fold((0.0, 0.0f64), |(sum, most), e| (sum + e, larger(most, e)));
        [sum, most, added]
    };
    let parts: Vec<[f64; 3]> = chosen.par_iter().map(differences).collect();
    let mean = |of: usize| parts.iter().map(|p| p[of]).sum::<f64>() / (chosen.len() * n).max(1) as f64;
    let max_abs = parts.iter().map(|p| p[1]).fold(0.0, f64::max);
    Merged { key: key.into(), mean_abs: mean(0), max_abs, added: mean(2) }
}

/// Frobenius norm of what a LoRA adds to a layer, without a strength.
pub fn added_norm(file: &LoraFile, module: &LoraModule) -> f64 {
    let product = Product::of(file, module);
    product.dot(&product).max(0.0).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_compared_without_being_multiplied_out() {
        // up · down = [[2, 4], [6, 12]] times 0.5
        let p = Product { rank: 1, scale: 0.5, down: vec![1.0, 2.0], up: vec![2.0, 6.0] };
        assert!((p.dot(&p) - (1.0 + 4.0 + 9.0 + 36.0)).abs() < 1e-12);
        // The same with a rank of 2 and the scale in a factor.
        let q = Product { rank: 2, scale: 1.0, down: vec![1.0, 2.0, 0.0, 0.0], up: vec![1.0, 7.0, 3.0, 7.0] };
        assert!((p.dot(&q) - q.dot(&q)).abs() < 1e-12 && (p.dot(&q) - 50.0).abs() < 1e-12);
    }
}
