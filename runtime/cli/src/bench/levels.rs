//! The same work at every level of fusion, in turns on one device: parts of a generation here, components in the suite.
//!
//! Every level takes the same inputs and weights and must give the same results, so that a wrong kernel is no fast one.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ltxc_compiler::Fuse;
use ltxc_ir::DType;
use ltxc_ir::plan::{KernelCall, Plan, Program};
use ltxc_kernels::fusion::elementwise_bytes;
use ltxc_runtime::RunError;
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::memory::{MemoryNeed, available};
use ltxc_runtime::weights::WeightFiles;
use serde::{Deserialize, Serialize};

use super::ceilings::Ceilings;
use super::inputs::write_inputs;
use super::statistics::{Interval, largest, median, relative_difference};
use super::{figure, profile};

/// Levels with their names, the most first.
pub const LEVELS: [(&str, Fuse); 3] = [("full", Fuse::Full), ("composite", Fuse::Composite), ("none", Fuse::None)];

/// Something that was measured at every level.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ByLevel {
    /// Name.
    pub name: String,
    /// Sizes, in words.
    pub sizes: String,
    /// The levels that could be measured, the most fused one first.
    pub levels: Vec<Level>,
    /// The levels that could not, and why.
    pub missing: Vec<[String; 2]>,
    /// The same by another library.
    pub others: Vec<Other>,
}

/// The same work by another library.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Other {
    /// What it is.
    pub name: String,
    /// Seconds of a call.
    pub seconds: f64,
}

/// One level of fusion. Where programs count several times, everything but arenas and the first run is of all of them.
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
    /// The least seconds over the rounds of every call, or on a GPU, where a call cannot be timed without a wait, of every
    /// program, added up: what is left where other work on the machine, and clocks that change, make single runs longer.
    /// `None` in results from before this was measured.
    pub least_seconds: Option<f64>,
    /// Seconds of full fusion by seconds of this level, the median over rounds.
    pub full_by_this: f64,
    /// Seconds that full fusion gains over this level, by neighbouring runs; `None` with too few rounds.
    pub gain: Option<Interval>,
    /// Seconds that full fusion gains over this level by the elementwise bytes that it does not move, at the rate of a large
    /// copy.
    pub predicted_gain: f64,
    /// Seconds of the first run of every program, which compiles kernels.
    pub first_seconds: f64,
    /// Part of the device's ceilings that is reached.
    pub share: f64,
    /// Largest relative L2 distance of a result from that of full fusion.
    pub difference: f64,
}

impl Level {
    /// Seconds that full fusion gains over this level: the median of neighbouring runs.
    pub fn gained(&self) -> f64 {
        self.gain.map_or(self.seconds * (1.0 - self.full_by_this), |gain| gain.median)
    }
}

/// A plan at one level, and what of it is measured.
pub struct Side<'a> {
    /// The name of the level.
    pub level: &'static str,
    /// The plan.
    pub plan: &'a Plan,
    /// Its weights.
    pub weights: &'a WeightFiles,
    /// Programs that run once before, for what they leave in the state.
    pub before: Vec<&'a Program>,
    /// Programs that are measured, in the order in which they run, and how often each counts.
    pub programs: Vec<(&'a Program, u64)>,
}

/// Measures until `rounds` or the time are over, the first side being that of full fusion. `row` has a name, and the levels
/// that are missing already.
///
/// Every other round runs the levels backwards, so that a machine that slows down or warms up favours none.
///
/// # Errors
/// A device that fails, also on the first side alone. Other levels may have more than the device can hold, and then become
/// missing ones.
pub fn measure<'a>(
    mut row: ByLevel,
    sides: Vec<Side<'a>>,
    device: &Device,
    ceilings: &Ceilings,
    (rounds, limit): (usize, Duration),
    interrupt: &'a AtomicBool,
) -> Result<ByLevel> {
    let mut running: Vec<Running<'a>> = Vec::with_capacity(sides.len());
    for side in sides {
        let level = side.level;
        match Running::start(side, device, interrupt) {
            Ok(level) => running.push(level),
            Err(RunError::Interrupted) => return Err(RunError::Interrupted.into()),
            Err(problem) => row.missing.push([level.to_string(), problem.to_string()]),
        }
    }
    let full = running.first().is_some_and(|level| level.side.level == LEVELS[0].0);
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
            level.run()?;
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
    Ok(row)
}

/// A level that is being measured.
struct Running<'a> {
    side: Side<'a>,
    executor: Executor<'a>,
    first_seconds: f64,
    seconds: Vec<f64>,
    /// The least seconds so far of every piece that is timed apart, those of a program one after the other.
    least: Vec<Vec<f64>>,
}

impl<'a> Running<'a> {
    fn start(side: Side<'a>, device: &Device, interrupt: &'a AtomicBool) -> Result<Running<'a>, RunError> {
        // Other levels have run by now, and hold what they need.
        let groups: Vec<u32> = side.programs.iter().map(|(program, _)| program.group).collect();
        let names = side.plan.groups.iter().enumerate().filter(|(i, _)| groups.contains(&(*i as u32)));
        let names: Vec<&str> = names.map(|(_, group)| group.name.as_str()).collect();
        let mut need = MemoryNeed::of(side.plan, rayon::current_num_threads());
        need.parts.retain(|part| names.contains(&part.name.as_str()));
        need.check(available())?;
        let executor = Executor::on(open(device)?, side.plan, side.weights, interrupt)?;
        let mut running = Running { side, executor, first_seconds: 0.0, seconds: Vec::new(), least: Vec::new() };
        let programs = running.side.before.iter().copied().chain(running.side.programs.iter().map(|(p, _)| *p));
        for program in programs.collect::<Vec<_>>() {
            running.executor.load(&program.name)?;
        }
        for program in running.side.before.clone() {
            write_inputs(&mut running.executor, program)?;
            running.executor.run(&program.name)?;
        }
        running.executor.synchronize()?;
        let pieces = running.run_once()?;
        running.first_seconds = pieces.iter().map(|(seconds, _)| seconds).sum();
        Ok(running)
    }

    /// One more round.
    fn run(&mut self) -> Result<(), RunError> {
        let pieces = self.run_once()?;
        let weighted = pieces.iter().zip(&self.side.programs).map(|((seconds, _), (_, runs))| *runs as f64 * seconds);
        self.seconds.push(weighted.sum());
        self.least.resize(pieces.len(), Vec::new());
        for (least, (_, pieces)) in self.least.iter_mut().zip(pieces) {
            least.resize(pieces.len(), f64::INFINITY);
            least.iter_mut().zip(pieces).for_each(|(least, seconds)| *least = least.min(seconds));
        }
        Ok(())
    }

    /// Runs every program once: its seconds, and those of its pieces.
    fn run_once(&mut self) -> Result<Vec<(f64, Vec<f64>)>, RunError> {
        // Elsewhere a call is not over when it returns.
        let times_calls = self.side.plan.target.backend == "cpu";
        let mut all = Vec::with_capacity(self.side.programs.len());
        for &(program, _) in &self.side.programs {
            write_inputs(&mut self.executor, program)?;
            self.executor.synchronize()?;
            let start = Instant::now();
            let calls = match times_calls {
                true => self.executor.run_timed(&program.name)?,
                false => {
                    self.executor.run(&program.name)?;
                    Vec::new()
                }
            };
            self.executor.synchronize()?;
            let seconds = start.elapsed().as_secs_f64();
            let pieces = if times_calls { calls.iter().map(Duration::as_secs_f64).collect() } else { vec![seconds] };
            all.push((seconds, pieces));
        }
        Ok(all)
    }

    /// What leaves the programs of the highest rate, by name: what slower ones leave goes into these.
    fn results(&mut self) -> Result<Vec<(String, Vec<f32>)>, RunError> {
        let mut results = Vec::new();
        let highest = self.side.programs.iter().map(|(program, _)| program.rate).max();
        for &(program, _) in &self.side.programs {
            write_inputs(&mut self.executor, program)?;
            self.executor.run(&program.name)?;
            if Some(program.rate) != highest {
                continue;
            }
            for slot in program.outputs.iter().filter(|s| s.ty.dtype == DType::F32) {
                let values = self.executor.read(&program.name, &slot.name)?.into_owned();
                results.push((format!("{} {}", program.name, slot.name), values));
            }
        }
        Ok(results)
    }

    fn row(&self, ceilings: &Ceilings, full: &[f64], difference: f64) -> Level {
        let Side { level, plan, programs, .. } = &self.side;
        let calls: Vec<(&KernelCall, u64)> = (programs.iter())
            .flat_map(|&(program, runs)| profile::calls(plan, program).into_iter().map(move |c| (c.call, runs)))
            .collect();
        let sum = |f: &dyn Fn(&KernelCall) -> u64| {
            calls.iter().map(|&(call, runs)| f(call).saturating_mul(runs)).fold(0, u64::saturating_add)
        };
        let at_best = |c: &KernelCall| ceilings.seconds(c.flops, c.bytes, profile::dtype(c));
        let at_best: f64 = calls.iter().map(|&(call, runs)| runs as f64 * at_best(call)).sum();
        let least =
            programs.iter().zip(&self.least).map(|((_, runs), pieces)| *runs as f64 * pieces.iter().sum::<f64>());
        let seconds = median(self.seconds.iter().copied()).unwrap_or(f64::NAN);
        let arenas = programs.iter().map(|(p, _)| p.arena_bytes.iter().fold(0u64, |sum, &b| sum.saturating_add(b)));
        Level {
            level: level.to_string(),
            calls: sum(&|_| 1),
            flops: sum(&|c| c.flops),
            bytes: sum(&|c| c.bytes),
            elementwise_bytes: sum(&elementwise_bytes),
            arena_bytes: arenas.max().unwrap_or(0),
            seconds,
            least_seconds: Some(least.sum()),
            full_by_this: median(full.iter().zip(&self.seconds).map(|(a, b)| a / b)).unwrap_or(f64::NAN),
            gain: Interval::of_median(self.seconds.iter().zip(full).map(|(this, full)| this - full)),
            predicted_gain: 0.0,
            first_seconds: self.first_seconds,
            share: at_best / seconds,
            difference,
        }
    }
}

/// The largest relative distance of results of the same name; infinite if there are others.
fn distance(own: &[(String, Vec<f32>)], full: &[(String, Vec<f32>)]) -> f64 {
    let of = |(name, values): &(String, Vec<f32>)| {
        let same = full.iter().find(|(n, _)| n == name);
        same.map_or(f64::INFINITY, |(_, expected)| relative_difference(values, expected))
    };
    if own.len() == full.len() { largest(own.iter().map(of)) } else { f64::INFINITY }
}

/// How a table of rows is to be read.
pub const LEGEND: [&str; 3] = [
    "Ratios are of full fusion to the level, medians over rounds of neighbouring runs. Gains are of full fusion over",
    "the level, in brackets where the true median lies with 95 % certainty, and beside that by the least time of every",
    "call over the rounds; predicted is what the elementwise bytes saved take at the rate of a large copy.",
];

/// The head of a table of rows, of which each is called a `name`.
pub fn columns(name: &'static str) -> [&'static str; 14] {
    [
        name,
        "fusion",
        "calls",
        "MB moved",
        "MB elementwise",
        "ms",
        "least ms",
        "full / this",
        "ms gained",
        "by least times",
        "ms predicted",
        "of ceiling",
        "first run, ms",
        "difference",
    ]
}

/// The cells of a table: a line per level, for what is missing, and for other libraries. Lines may be shorter than the head.
pub fn cells(rows: &[ByLevel]) -> Vec<Vec<String>> {
    let ms = |seconds: f64| figure(seconds * 1e3);
    let mut lines = Vec::new();
    for row in rows {
        for (i, level) in row.levels.iter().enumerate() {
            let name = match (i, row.sizes.is_empty()) {
                (0, true) => row.name.clone(),
                (0, false) => format!("{}: {}", row.name, row.sizes),
                _ => String::new(),
            };
            let against_full = |cell: String| if i == 0 { String::new() } else { cell };
            let least = level.least_seconds.zip(row.levels[0].least_seconds);
            lines.push(vec![
                name,
                level.level.clone(),
                level.calls.to_string(),
                figure(level.bytes as f64 / 1e6),
                figure(level.elementwise_bytes as f64 / 1e6),
                ms(level.seconds),
                level.least_seconds.map(ms).unwrap_or_default(),
                against_full(figure(level.full_by_this)),
                against_full(match level.gain {
                    Some(gain) => format!("{} [{}, {}]", ms(gain.median), ms(gain.low), ms(gain.high)),
                    None => ms(level.gained()),
                }),
                against_full(least.map(|(this, full)| ms(this - full)).unwrap_or_default()),
                against_full(ms(level.predicted_gain)),
                format!("{:.0} %", 100.0 * level.share),
                ms(level.first_seconds),
                against_full(format!("{:.1e}", level.difference)),
            ]);
        }
        for [level, why] in &row.missing {
            lines.push(vec![String::new(), level.clone(), why.clone()]);
        }
        for other in &row.others {
            let blank = String::new;
            lines.push(vec![blank(), other.name.clone(), blank(), blank(), blank(), ms(other.seconds)]);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_that_are_not_the_same_are_far() {
        let of = |name: &str, value: f32| (name.to_string(), vec![value]);
        assert_eq!(distance(&[of("a", 1.0), of("b", 4.0)], &[of("b", 2.0), of("a", 1.0)]), 1.0);
        assert_eq!(distance(&[of("a", 1.0)], &[of("b", 1.0)]), f64::INFINITY);
        assert_eq!(distance(&[], &[of("b", 1.0)]), f64::INFINITY);
        assert!(distance(&[of("a", f32::NAN), of("b", 1.0)], &[of("a", 1.0), of("b", 1.0)]).is_nan());
    }
}
