//! A component at every level of fusion, in turns on one device.
//!
//! Every level takes the same inputs and weights and must give the same results, so that a wrong kernel is no fast one.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ltxc::bench::ceilings::Ceilings;
use ltxc::bench::inputs::write_inputs;
use ltxc::bench::profile;
use ltxc_compiler::{Fuse, Options};
use ltxc_ir::plan::{Plan, Target};
use ltxc_ir::{DType, Rate};
use ltxc_kernels::fusion::elementwise_bytes;
use ltxc_models::checkpoint::WeightFile;
use ltxc_runtime::RunError;
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::weights::WeightFiles;
use serde::{Deserialize, Serialize};

use crate::measure::{Interval, median, relative_difference};
use crate::session;
use crate::subjects::Subject;
use crate::synthetic;

/// A component at every level.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ComponentRow {
    /// Name.
    pub name: String,
    /// Sizes, in words.
    pub sizes: String,
    /// The levels that could be measured, the most fused one first.
    pub levels: Vec<Level>,
    /// The levels that could not, and why.
    pub missing: Vec<[String; 2]>,
    /// The same by another library.
    pub others: Vec<crate::kernels::Other>,
}

/// One level of fusion.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Level {
    /// Its name.
    pub level: String,
    /// Kernel calls.
    pub calls: u64,
    /// Floating point operations.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Those besides operands and results of products, convolutions and attention.
    pub elementwise_bytes: u64,
    /// Bytes of arenas.
    pub arena_bytes: u64,
    /// Seconds of a run, the median of the rounds.
    pub seconds: f64,
    /// The least seconds of every call over the rounds, added up: what is left where other work on the machine, and clocks
    /// that change, make single runs longer. `None` where calls cannot be timed without making them wait.
    pub least_seconds: Option<f64>,
    /// Seconds of full fusion by seconds of this level, the median over rounds.
    pub full_by_this: f64,
    /// Seconds that full fusion gains over this level, by neighbouring runs; `None` with too few rounds.
    pub gain: Option<Interval>,
    /// Seconds that full fusion gains over this level by the elementwise bytes that it does not move, at the rate of a large
    /// copy.
    pub predicted_gain: f64,
    /// Seconds of the first run, which compiles kernels.
    pub first_seconds: f64,
    /// Part of the device's ceilings that is reached.
    pub share: f64,
    /// Largest relative L2 distance of a result from that of full fusion.
    pub difference: f64,
}

/// Levels with their names, the most first.
pub const LEVELS: [(&str, Fuse); 3] = [("full", Fuse::Full), ("composite", Fuse::Composite), ("none", Fuse::None)];

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
/// Every other round runs the levels backwards, so that a machine that slows down or warms up favours none.
///
/// # Errors
/// A graph or device that fails.
pub fn measure(
    subject: &Subject,
    device: &Device,
    weights: DType,
    ceilings: &Ceilings,
    (rounds, limit): (usize, Duration),
    folder: &Path,
) -> Result<ComponentRow> {
    let path = folder.join(format!("{}.safetensors", subject.name.replace(' ', "-")));
    synthetic::write_checkpoint(&path, &subject.config, &subject.tensors, weights)?;
    let file = WeightFile::open(&path)?;
    let mut row = ComponentRow {
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
    let mut running: Vec<Running<'_>> = Vec::new();
    for (&(name, ref plan), weights) in plans.iter().zip(&opened) {
        match Running::start(name, plan, weights, device) {
            Ok(level) => running.push(level),
            Err(problem) => row.missing.push([name.to_string(), problem.to_string()]),
        }
    }
    let full = running.first().is_some_and(|level| level.name == LEVELS[0].0);
    ensure!(
        full,
        "not even fully fused: {}",
        row.missing.iter().map(|[_, why]| why.as_str()).collect::<Vec<_>>().join("; ")
    );
    let start = Instant::now();
    let count = running.len();
    for round in 0..rounds {
        for i in 0..count {
            let level = &mut running[if round % 2 == 0 { i } else { count - 1 - i }];
            let seconds = level.run()?;
            level.seconds.push(seconds);
        }
        // The next round takes as long as those so far.
        if start.elapsed() * (round as u32 + 2) / (round as u32 + 1) > limit {
            break;
        }
    }
    let results = running.iter_mut().map(Running::results).collect::<Result<Vec<_>, _>>()?;
    for (level, own) in running.iter().zip(&results) {
        row.levels.push(level.row(ceilings, &running[0].seconds, distance(own, &results[0])));
    }
    let full_bytes = row.levels.first().map_or(0, |full| full.elementwise_bytes);
    for level in &mut row.levels {
        level.predicted_gain = level.elementwise_bytes.saturating_sub(full_bytes) as f64 / ceilings.copy;
    }
    drop(running);
    std::fs::remove_file(&path)?;
    Ok(row)
}

/// A level that is being measured.
struct Running<'a> {
    name: &'static str,
    plan: &'a Plan,
    executor: Executor<'a>,
    first_seconds: f64,
    seconds: Vec<f64>,
    /// The least seconds of every call so far, where a call is over when it returns.
    least: Option<Vec<f64>>,
}

impl<'a> Running<'a> {
    fn start(
        name: &'static str,
        plan: &'a Plan,
        weights: &'a WeightFiles,
        device: &Device,
    ) -> Result<Running<'a>, RunError> {
        let executor = Executor::on(open(device)?, plan, weights, &NEVER)?;
        let least = (plan.target.backend == "cpu").then(Vec::new);
        let mut running = Running { name, plan, executor, first_seconds: 0.0, seconds: Vec::new(), least };
        for program in &plan.programs {
            running.executor.load(&program.name)?;
        }
        // What is constant for a generation leaves its results in the state.
        let fastest = fastest(plan);
        for program in plan.programs.iter().filter(|p| !fastest.contains(&p.rate)) {
            write_inputs(&mut running.executor, program)?;
            running.executor.run(&program.name)?;
        }
        running.executor.synchronize()?;
        running.first_seconds = running.run()?;
        Ok(running)
    }

    /// Runs the programs of every step once.
    fn run(&mut self) -> Result<f64, RunError> {
        let (mut seconds, mut calls) = (0.0, Vec::new());
        let fastest = fastest(self.plan);
        for program in self.plan.programs.iter().filter(|p| fastest.contains(&p.rate)) {
            write_inputs(&mut self.executor, program)?;
            self.executor.synchronize()?;
            let start = Instant::now();
            match self.least {
                Some(_) => calls.extend(self.executor.run_timed(&program.name)?.iter().map(Duration::as_secs_f64)),
                None => self.executor.run(&program.name)?,
            }
            self.executor.synchronize()?;
            seconds += start.elapsed().as_secs_f64();
        }
        if let Some(least) = &mut self.least {
            least.resize(calls.len(), f64::INFINITY);
            least.iter_mut().zip(calls).for_each(|(least, seconds)| *least = least.min(seconds));
        }
        Ok(seconds)
    }

    /// Results of the programs of every step that leave the component, by name.
    fn results(&mut self) -> Result<Vec<(String, Vec<f32>)>, RunError> {
        let mut results = Vec::new();
        let fastest = fastest(self.plan);
        for program in self.plan.programs.iter().filter(|p| fastest.contains(&p.rate)) {
            write_inputs(&mut self.executor, program)?;
            self.executor.run(&program.name)?;
            for slot in program.outputs.iter().filter(|s| s.ty.dtype == DType::F32) {
                // The programs of a step come last: what a slower one leaves is not their result.
                if program.rate == *fastest.last().unwrap_or(&program.rate) {
                    results.push((slot.name.clone(), self.executor.read(&program.name, &slot.name)?.into_owned()));
                }
            }
        }
        Ok(results)
    }

    fn row(&self, ceilings: &Ceilings, full: &[f64], difference: f64) -> Level {
        let fastest = fastest(self.plan);
        let programs = || self.plan.programs.iter().filter(|p| fastest.contains(&p.rate));
        let calls: Vec<_> = programs().flat_map(|p| profile::calls(self.plan, p)).map(|c| c.call).collect();
        let sum =
            |f: &dyn Fn(&ltxc_ir::plan::KernelCall) -> u64| calls.iter().map(|c| f(c)).fold(0, u64::saturating_add);
        let least: f64 = calls.iter().map(|c| ceilings.seconds(c.flops, c.bytes, profile::dtype(c))).sum();
        let seconds = median(self.seconds.iter().copied()).unwrap_or(f64::NAN);
        let ratio = median(full.iter().zip(&self.seconds).map(|(a, b)| a / b)).unwrap_or(f64::NAN);
        Level {
            level: self.name.into(),
            calls: calls.len() as u64,
            flops: sum(&|c| c.flops),
            bytes: sum(&|c| c.bytes),
            elementwise_bytes: sum(&elementwise_bytes),
            arena_bytes: programs().map(|p| p.arena_bytes.iter().sum::<u64>()).max().unwrap_or(0),
            seconds,
            least_seconds: self.least.as_ref().map(|calls| calls.iter().sum()),
            full_by_this: ratio,
            gain: Interval::of_median(self.seconds.iter().zip(full).map(|(this, full)| this - full)),
            predicted_gain: 0.0,
            first_seconds: self.first_seconds,
            share: least / seconds,
            difference,
        }
    }
}

/// The rates whose programs are measured: those of every step, or what there is.
fn fastest(plan: &Plan) -> Vec<Rate> {
    match plan.programs.iter().any(|p| p.rate == Rate::Step) {
        true => vec![Rate::Evaluation, Rate::Step],
        false => vec![Rate::Generation],
    }
}

/// The largest relative distance of results of the same name.
fn distance(own: &[(String, Vec<f32>)], full: &[(String, Vec<f32>)]) -> f64 {
    let pairs = own.iter().filter_map(|(name, a)| Some((a, &full.iter().find(|(n, _)| n == name)?.1)));
    pairs.map(|(a, b)| relative_difference(a, b)).fold(0.0, |most, d| if d.is_nan() { d } else { most.max(d) })
}
