//! Running a module in a test.

use std::cell::RefCell;
use std::collections::BTreeMap;

use ltxc_ir::eval::{Evaluator, Tensor};
use ltxc_ir::{Module, TensorType};

use crate::fixtures::TensorFile;

/// Weight sources of a test: the name that graphs use, and the file behind it.
pub type Sources<'a> = &'a [(&'a str, &'a TensorFile)];

/// Results of a run by name, and every named value by its full path.
pub struct Run {
    /// Results of the entry function.
    pub results: BTreeMap<String, Tensor>,
    /// Named values inside.
    pub taps: BTreeMap<String, Tensor>,
}

/// Runs `entry` with the reference evaluator.
///
/// # Panics
/// If arguments or weights do not fit.
#[track_caller]
pub fn evaluate(module: &Module, entry: &str, args: &[Tensor], sources: Sources<'_>) -> Run {
    let lookup = |source: &str, key: &str, _: &TensorType| {
        let (_, file) = sources.iter().find(|(name, _)| *name == source)?;
        file.find(key).cloned()
    };
    let taps = RefCell::new(BTreeMap::new());
    let tap = |name: &str, value: &Tensor| {
        taps.borrow_mut().insert(name.to_string(), value.clone());
    };
    let outputs = Evaluator::new(module, &lookup).tap(&tap).run(entry, args).unwrap_or_else(|e| panic!("{e}"));
    let names = &module.function(entry).expect("the evaluator found it").results;
    let results = names.iter().map(|r| r.name.clone()).zip(outputs).collect();
    Run { results, taps: taps.take() }
}
