//! The components of the suite at every level of fusion, with random weights.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use ltxc::bench::ceilings::Ceilings;
use ltxc::bench::levels::{self, ByLevel, LEVELS, Side};
use ltxc::bench::profile;
use ltxc_compiler::{Fuse, Options};
use ltxc_ir::plan::{Plan, Program, Target};
use ltxc_ir::{DType, Rate};
use ltxc_models::checkpoint::WeightFile;
use ltxc_runtime::backend::Device;
use ltxc_runtime::weights::WeightFiles;

use crate::session;
use crate::subjects::Subject;
use crate::synthetic;

/// Benchmarks are stopped with the process.
static NEVER: AtomicBool = AtomicBool::new(false);

/// The plan of a component at a level, with any weights of these types.
///
/// # Errors
/// A graph that cannot be compiled.
pub fn plan(subject: &Subject, target: &Target, fuse: Fuse) -> Result<Plan> {
    session::compile_for(target, &subject.module, Vec::new(), Options { fuse, ..Options::default() })
}

/// Part of a device's ceilings that a whole component reaches at least, where nothing is known yet.
const EXPECTED_SHARE: f64 = 0.4;

/// About how long it takes to measure a component with this plan once: every level runs twice.
pub fn expected_seconds(plan: &Plan, ceilings: &Ceilings) -> f64 {
    let calls = plan.programs.iter().flat_map(|p| profile::calls(plan, p)).map(|c| c.call);
    let least: f64 = calls.map(|c| ceilings.seconds(c.flops, c.bytes, profile::dtype(c))).sum();
    2.0 * LEVELS.len() as f64 * least / EXPECTED_SHARE
}

/// Measures a component until `rounds` or the time are over. `folder` takes its weights.
///
/// # Errors
/// A graph or device that fails.
pub fn measure(
    subject: &Subject,
    device: &Device,
    weights: DType,
    ceilings: &Ceilings,
    limits: (usize, Duration),
    folder: &Path,
) -> Result<ByLevel> {
    let path = folder.join(format!("{}.safetensors", subject.name.replace(' ', "-")));
    synthetic::write_checkpoint(&path, &subject.config, &subject.tensors, weights)?;
    let file = WeightFile::open(&path)?;
    let mut row = ByLevel {
        name: subject.name.into(),
        sizes: subject.sizes.clone(),
        levels: Vec::new(),
        missing: Vec::new(),
        others: Vec::new(),
    };
    // Without fusion a device may not have the memory, or a tensor may be larger than it allows.
    let mut plans = Vec::with_capacity(LEVELS.len());
    for (name, fuse) in LEVELS {
        let options = Options { fuse, ..Options::default() };
        match session::compile_for(&device.target, &subject.module, vec![file.identity(false)?], options) {
            Ok(plan) => plans.push((name, plan)),
            Err(problem) => row.missing.push([name.into(), problem.to_string()]),
        }
    }
    let opened = plans.iter().map(|(_, plan)| Ok(WeightFiles::open(plan, std::slice::from_ref(&path), false)?));
    let opened = opened.collect::<Result<Vec<WeightFiles>>>()?;
    let sides = plans.iter().zip(&opened).map(|(&(level, ref plan), weights)| {
        let (measured, before): (Vec<&Program>, Vec<&Program>) =
            plan.programs.iter().partition(|p| fastest(plan).contains(&p.rate));
        Side { level, plan, weights, before, programs: measured.into_iter().map(|p| (p, 1)).collect() }
    });
    let row = levels::measure(row, sides.collect(), device, ceilings, limits, &NEVER)?;
    std::fs::remove_file(&path)?;
    Ok(row)
}

/// The rates whose programs are measured: those of every step, or what there is.
fn fastest(plan: &Plan) -> &'static [Rate] {
    match plan.programs.iter().any(|p| p.rate == Rate::Step) {
        true => &[Rate::Evaluation, Rate::Step],
        false => &[Rate::Generation],
    }
}
