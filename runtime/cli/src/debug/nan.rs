//! `ltxc debug nan`: the first value of a run that is not finite, and what it was computed from.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use anyhow::Result;
use clap::Args;
use ltxc_ir::plan::{Plan, Program};
use ltxc_runtime::RunError;
use ltxc_runtime::stats::{Stats, decoded};
use ltxc_runtime::tap::{Tap, Value};
use serde_json::json;

use super::flags::DebugMode;
use super::names::{component, full_name, pass_of};
use super::pipeline::RunOf;

/// `ltxc debug nan`.
#[derive(Debug, Args)]
pub struct NanArgs {
    /// Go on after the first bad value, and list the first of every program.
    #[arg(long)]
    pub full: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run: RunOf,
}

/// The first bad value of a program.
#[derive(Clone, Debug)]
struct Finding {
    program: String,
    run: usize,
    name: String,
    /// Pass of the transformer that it belongs to.
    pass: Option<&'static str>,
    stats: Stats,
    /// Number of the first value of those, and the values themselves: the first bad one and those beside it.
    around: (usize, Vec<f32>),
    reads: Vec<(String, Stats)>,
}

#[derive(Default)]
struct Found {
    findings: Vec<Finding>,
    checked: usize,
}

struct NanTap {
    plan: Plan,
    full: bool,
    runs: BTreeMap<String, usize>,
    seen: BTreeMap<String, Stats>,
    found: Rc<RefCell<Found>>,
}

impl Tap for NanTap {
    fn wants(&mut self, _: &Program, _: &Value) -> bool {
        true
    }

    fn begin(&mut self, _: &Program) {
        self.seen.clear();
    }

    fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
        let stats = Stats::of_bytes(&value.ty, bytes);
        let mut found = self.found.borrow_mut();
        found.checked += 1;
        if stats.is_bad() && !found.findings.iter().any(|f| f.program == program.name) {
            let reads = value.reads.iter().filter_map(|n| Some((n.clone(), self.seen.get(n)?.clone()))).collect();
            let component = component(&self.plan, program);
            let name = full_name(component, &value.name);
            let pass = (component == "transformer").then(|| pass_of(&value.name).0);
            let run = self.runs.get(&program.name).copied().unwrap_or(0);
            found.findings.push(Finding {
                program: program.name.clone(),
                run,
                name: name.clone(),
                pass,
                around: around(&decoded(&value.ty, bytes), stats.first_bad.unwrap_or(0)),
                stats: stats.clone(),
                reads,
            });
            if !self.full {
                // Ends the run; what was found is reported by whoever began it.
                return Err(RunError::Input(format!("`{name}` is not finite")));
            }
        }
        self.seen.insert(value.name.clone(), stats);
        Ok(())
    }

    fn skips_finite(&self, _: &Program, _: &Value) -> bool {
        true
    }

    fn finite(&mut self, _: &Program, _: &Value) {
        self.found.borrow_mut().checked += 1;
    }

    fn end(&mut self, program: &Program) -> Result<(), RunError> {
        *self.runs.entry(program.name.clone()).or_default() += 1;
        Ok(())
    }
}

/// Values in a line.
pub fn listed(values: &[f32]) -> String {
    values.iter().map(|v| format!("{v:.4}")).collect::<Vec<_>>().join(" ")
}

/// The value at an index and those beside it, with the number of the first of them.
pub fn around(values: &[f32], index: usize) -> (usize, Vec<f32>) {
    const BESIDE: usize = 3;
    let first = index.saturating_sub(BESIDE);
    (first, values.iter().skip(first).take(index - first + 1 + BESIDE).copied().collect())
}

/// `ltxc debug nan`. Returns whether every value is finite.
///
/// # Errors
/// A run that fails for another reason.
pub fn run(args: &NanArgs, json_output: bool) -> Result<bool> {
    let found = Rc::new(RefCell::new(Found::default()));
    let result = args.run.run(DebugMode::Exact, BTreeMap::new(), |plan| {
        let (runs, seen) = (BTreeMap::new(), BTreeMap::new());
        Some(Box::new(NanTap { plan: plan.clone(), full: args.full, runs, seen, found: found.clone() }))
    });
    let found = found.take();
    if found.findings.is_empty() {
        result?;
    }
    for f in &found.findings {
        let s = &f.stats;
        if json_output {
            println!(
                "{}",
                json!({"value": f.name, "program": f.program, "run": f.run, "pass": f.pass, "nan": s.nan, "infinite": s.infinite,
                "of": s.ty.elements(), "first": s.first_bad, "around_from": f.around.0,
                "around": f.around.1.iter().map(ToString::to_string).collect::<Vec<_>>(), "reads": f.reads.iter().map(|(n, s)| json!({"value": n, "mean": s.mean,
                "std": s.std, "min": s.min, "max": s.max})).collect::<Vec<_>>()})
            );
            continue;
        }
        println!(
            "{}: NaN in {}, infinite in {} of {} values, first at {} (program {}, step {}{})",
            f.name,
            s.nan,
            s.infinite,
            s.ty.elements(),
            s.first_bad.unwrap_or(0),
            f.program,
            f.run,
            f.pass.map(|pass| format!(", pass {pass}")).unwrap_or_default()
        );
        println!("  values from {} on: {}", f.around.0, listed(&f.around.1));
        for (name, s) in &f.reads {
            println!("  computed from {name}: mean {:.4} std {:.4} [{:.4}, {:.4}]", s.mean, s.std, s.min, s.max);
        }
    }
    if found.findings.is_empty() && !json_output {
        println!("all {} values are finite", found.checked);
    }
    Ok(found.findings.is_empty())
}
