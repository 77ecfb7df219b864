//! Comparison of tensors with recorded ones.

pub use ltxc::debug::recording::relative_l2;

/// Collects comparisons of one file, so that a failure shows all of them.
#[derive(Default)]
pub struct Report {
    lines: Vec<String>,
    failed: usize,
    compared: usize,
}

impl Report {
    /// Compares `found` with `expected` at a relative L2 limit.
    pub fn check(&mut self, name: &str, found: &[f32], expected: &[f32], limit: f64) {
        let error = relative_l2(found, expected);
        let ok = error <= limit;
        self.note(ok, format!("{name}: {error:.2e} (limit {limit:.0e}, {} values)", found.len()));
    }

    /// Records an exact comparison.
    pub fn check_equal<T: PartialEq + std::fmt::Debug>(&mut self, name: &str, found: &[T], expected: &[T]) {
        let first = found.iter().zip(expected).position(|(a, b)| a != b);
        let ok = found.len() == expected.len() && first.is_none();
        self.note(
            ok,
            format!("{name}: {} values, expected {}, first difference {first:?}", found.len(), expected.len()),
        );
    }

    /// Records a comparison that was made elsewhere.
    pub fn note(&mut self, ok: bool, line: String) {
        self.compared += 1;
        self.failed += !ok as usize;
        self.lines.push(format!("{} {line}", if ok { "ok  " } else { "FAIL" }));
    }

    /// Ends the test.
    ///
    /// # Panics
    /// If a comparison failed, or if there was none.
    #[track_caller]
    pub fn finish(self) {
        println!("{}", self.lines.join("\n"));
        assert!(self.compared > 0, "nothing was compared");
        assert!(
            self.failed == 0,
            "{} of {} comparisons failed:\n{}",
            self.failed,
            self.compared,
            self.lines.join("\n")
        );
    }
}
