//! A recorded file under comparison: every tensor in it must be compared, thinned or not.

use std::collections::BTreeSet;

use crate::compare::Report;
use crate::fixtures::TensorFile;

/// Compares values with the tensors of one recorded file, and knows which have been.
pub struct Recorded {
    /// The file.
    pub file: TensorFile,
    meta: serde_json::Value,
    report: Report,
    seen: BTreeSet<String>,
}

impl Recorded {
    /// Starts comparing with `file`.
    pub fn new(file: TensorFile) -> Recorded {
        let meta = file.meta();
        Recorded { file, meta, report: Report::default(), seen: BTreeSet::new() }
    }

    /// The JSON metadata of the recording.
    pub fn meta(&self) -> &serde_json::Value {
        &self.meta
    }

    /// Whether `name` was recorded, whole or thinned.
    pub fn has(&self, name: &str) -> bool {
        self.file.find(name).is_some() || self.file.find(&format!("{name}.sample")).is_some()
    }

    /// Compares `found`, in the reference's layout, with `name` or with its thinned form.
    ///
    /// # Panics
    /// If nothing of that name was recorded.
    #[track_caller]
    pub fn check(&mut self, name: &str, found: &[f32], limit: f64) {
        if self.file.find(name).is_some() {
            self.seen.insert(name.into());
            return self.report.check(name, found, &self.file.tensor(name).to_f32(), limit);
        }
        let (sample, stats) = (format!("{name}.sample"), format!("{name}.stats"));
        let stride = self.meta["sampled"][name]["stride"].as_u64().expect("thinned tensors record a stride") as usize;
        let thinned: Vec<f32> = found.iter().copied().step_by(stride).collect();
        self.report.check(&sample, &thinned, &self.file.tensor(&sample).to_f32(), limit);
        let expected = self.file.tensor(&stats).to_f32();
        for (i, (found, expected)) in statistics(found).into_iter().zip(&expected).enumerate() {
            // A mean near zero is measured against the spread of the values.
            let scale = (expected.abs().max(expected_spread(&self.file.tensor(&stats).to_f32()))) as f64;
            let error = (found - *expected as f64).abs() / scale.max(1e-30);
            self.report.note(error <= limit, format!("{stats}[{i}]: {error:.2e} (limit {limit:.0e})"));
        }
        self.seen.extend([sample, stats]);
    }

    /// Records a comparison that was made elsewhere, and that it covered these tensors.
    pub fn note(&mut self, ok: bool, line: String, covered: &[&str]) {
        self.report.note(ok, line);
        self.seen.extend(covered.iter().map(|n| n.to_string()));
    }

    /// Marks tensors as inputs, which are not compared.
    pub fn input(&mut self, names: &[&str]) {
        self.seen.extend(names.iter().map(|n| n.to_string()));
    }

    /// Ends the test.
    ///
    /// # Panics
    /// If a comparison failed, or a tensor of the file was not compared.
    #[track_caller]
    pub fn finish(self) {
        let forgotten: Vec<&str> = self.file.iter().map(|(name, _)| name).filter(|n| !self.seen.contains(*n)).collect();
        self.report.finish();
        assert!(forgotten.is_empty(), "not compared: {forgotten:?}");
    }
}

fn expected_spread(stats: &[f32]) -> f32 {
    stats[1].abs()
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
