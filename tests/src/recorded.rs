//! A recorded file under comparison: every tensor in it must be compared, thinned or not.
//!
//! Large tensors are recorded thinned: of `x` there are `x.sample`, every k-th element, and `x.stats`, statistics of all
//! of them.

use std::collections::BTreeSet;

use ltxc::debug::recording::{Form, thinned};
use ltxc_ir::eval::Tensor;

use crate::compare::Report;
use crate::fixtures::{TensorFile, required};

pub use ltxc::debug::recording::statistics;

/// Largest difference of bytes, and largest share of bytes that may differ.
pub type ByteLimit = (i64, f64);

/// Compares values with the tensors of one recorded file, and knows which have been.
pub struct Recorded {
    /// The file.
    pub file: TensorFile,
    meta: serde_json::Value,
    report: Report,
    context: String,
    seen: BTreeSet<String>,
}

impl Recorded {
    /// Starts comparing with `file`.
    pub fn new(file: TensorFile) -> Recorded {
        let meta = file.meta();
        Recorded { file, meta, report: Report::default(), context: String::new(), seen: BTreeSet::new() }
    }

    /// Starts comparing with the recorded file `name`.
    ///
    /// # Panics
    /// If it is absent.
    #[track_caller]
    pub fn required(name: &str) -> Recorded {
        Recorded::new(required(name))
    }

    /// The JSON metadata of the recording.
    pub fn meta(&self) -> &serde_json::Value {
        &self.meta
    }

    /// Puts `context` in front of the lines of the report that follow.
    pub fn context(&mut self, context: impl Into<String>) {
        self.context = context.into();
    }

    /// Whether `name` was recorded, whole or thinned.
    pub fn has(&self, name: &str) -> bool {
        self.file.find(name).is_some() || self.file.find(&format!("{name}.sample")).is_some()
    }

    /// The recorded tensor `name`, which is an input and needs no comparison.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn input(&mut self, name: &str) -> Tensor {
        self.seen.insert(name.into());
        self.file.tensor(name).clone()
    }

    /// Leaves out `names`, which need not exist; `why` is for the report.
    pub fn skip(&mut self, names: &[&str], why: &str) {
        for name in names.iter().filter(|name| self.file.find(name).is_some()) {
            println!("skip {name}: {why}");
            self.seen.insert(name.to_string());
        }
    }

    /// Compares `found`, in the reference's layout, with `name`, whole or thinned, at a relative L2 limit.
    ///
    /// # Panics
    /// If nothing of that name was recorded, or statistics of another kind.
    #[track_caller]
    pub fn check(&mut self, name: &str, found: &[f32], limit: f64) {
        let form = self.form(name, found);
        self.report.check(&self.line(&form.key), &thinned(found, form.step), &form.values, limit);
        if let Some((key, expected)) = &form.statistics {
            assert_eq!(expected.len(), 6, "{key} holds other statistics");
            for (i, error) in form.statistics_errors(found).into_iter().enumerate() {
                let line = self.line(&format!("{key}[{i}]: {error:.2e} (limit {limit:.0e})"));
                self.report.note(error <= limit, line);
            }
        }
    }

    /// Compares as [`Recorded::check`], and the extents too; leading axes of 1 may be absent in `found`.
    ///
    /// # Panics
    /// If nothing of that name was recorded.
    #[track_caller]
    pub fn check_tensor(&mut self, name: &str, found: &Tensor, limit: f64) {
        let values = found.to_f32();
        self.check(name, &values, limit);
        if let Some(shape) = self.form(name, &values).shape {
            let leading = shape.len().saturating_sub(found.ty.rank());
            let fits = shape[leading..] == found.ty.shape && shape[..leading].iter().all(|&n| n == 1);
            let line = self.line(&format!("{name}: {} like {shape:?}", found.ty));
            self.report.note(fits, line);
        }
    }

    /// Compares `found` with `name`, whole or thinned, at a limit for the largest difference.
    ///
    /// # Panics
    /// If nothing of that name was recorded.
    #[track_caller]
    pub fn check_largest(&mut self, name: &str, found: &[f32], limit: f64) {
        let form = self.form(name, found);
        let found = thinned(found, form.step);
        let largest = found.iter().zip(&form.values).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        let is_complete = found.len() == form.values.len() && found.iter().all(|v| v.is_finite());
        let text = format!("{}: {largest:.2e} at most (limit {limit:.0e}, {} values)", form.key, found.len());
        let line = self.line(&text);
        self.report.note(is_complete && largest <= limit, line);
        // Where no value is off by more than that, no statistic can tell more.
        self.seen.extend(form.statistics.map(|(key, _)| key));
    }

    /// The values recorded as `name`, whole or thinned, and those of `found` that they belong to: recorded values second.
    ///
    /// # Panics
    /// If nothing of that name was recorded.
    #[track_caller]
    pub fn pair(&mut self, name: &str, found: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let form = self.form(name, found);
        (thinned(found, form.step), form.values)
    }

    /// Compares f32 values exactly.
    ///
    /// # Panics
    /// If nothing of that name was recorded.
    #[track_caller]
    pub fn check_exact(&mut self, name: &str, found: &[f32]) {
        let expected = self.input(name).to_f32();
        self.report.check_equal(&self.line(name), found, &expected);
    }

    /// Compares integers exactly.
    ///
    /// # Panics
    /// If nothing of that name was recorded.
    #[track_caller]
    pub fn check_ints(&mut self, name: &str, found: &[i64]) {
        let expected = self.input(name);
        self.report.check_equal(&self.line(name), found, expected.ints());
    }

    /// Compares bytes, of which some may be rounded the other way.
    ///
    /// # Panics
    /// If nothing of that name was recorded.
    #[track_caller]
    pub fn check_bytes(&mut self, name: &str, found: &[i64], limit: ByteLimit) {
        let expected = self.input(name);
        let expected = expected.ints();
        let differences: Vec<i64> = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).collect();
        let most = differences.iter().max().copied().unwrap_or(0);
        let share = differences.iter().filter(|&&d| d > 0).count() as f64 / expected.len().max(1) as f64;
        let ok = found.len() == expected.len() && most <= limit.0 && share <= limit.1;
        let line = self.line(&format!("{name}: off by at most {most}, in {:.4} % of the values", 100.0 * share));
        self.report.note(ok, line);
    }

    /// Compares what is not a tensor of the file.
    pub fn check_other<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, found: &[T], expected: &[T]) {
        self.report.check_equal(&self.line(what), found, expected);
    }

    /// Records a comparison that was made elsewhere, and that it covered these tensors.
    pub fn note(&mut self, ok: bool, line: String, covered: &[&str]) {
        let line = self.line(&line);
        self.report.note(ok, line);
        self.seen.extend(covered.iter().map(|n| n.to_string()));
    }

    /// Ends the test.
    ///
    /// # Panics
    /// If a comparison failed, or a tensor of the file was not compared.
    #[track_caller]
    pub fn finish(mut self) {
        for (name, _) in self.file.iter().filter(|(name, _)| !self.seen.contains(*name)) {
            self.report.note(false, format!("{name}: was not compared"));
        }
        self.report.finish();
    }

    /// Ends a test that is about a part of the file.
    ///
    /// # Panics
    /// If a comparison failed, or there was none.
    #[track_caller]
    pub fn finish_part(self) {
        self.report.finish();
    }

    fn line(&self, text: &str) -> String {
        format!("{}{text}", self.context)
    }

    /// How `name` was recorded; its tensors count as compared.
    #[track_caller]
    fn form(&mut self, name: &str, found: &[f32]) -> Form {
        let form = Form::of(&self.file, &self.meta, name, found.len());
        let form = form.unwrap_or_else(|| panic!("{}: no tensor `{name}`", self.file.path.display()));
        self.seen.insert(form.key.clone());
        if let Some((key, _)) = &form.statistics {
            let expected = form.elements().unwrap_or(found.len());
            self.report.note(found.len() == expected, format!("{name}: {} values of {expected}", found.len()));
            self.seen.insert(key.clone());
        }
        form
    }
}
