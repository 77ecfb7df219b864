//! Fused against composite against none: the same graph compiled three ways, run in turns.
//!
//! Beside each measured gain stands what the bytes predict: elementwise bytes that are not read and written any more, at
//! the rate at which this machine copies. Fusion changes nothing else, so a gain far below the prediction is a kernel to
//! look at: a second table has every fused call against its parts ([`crate::parts`]).
//!
//! Times are processor times, those of the best round: other work on the machine adds more to the wall time of some rounds
//! than a fused kernel saves. The rate of copying is per second of processor time too.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};
use ltxc_compiler::{Fuse, Options};
use ltxc_ir::plan::{Plan, Step};
use ltxc_ir::{Module, Rate};
use ltxc_kernels::fusion::elementwise_bytes;
use ltxc_models::checkpoint::WeightFile;

use crate::block::{self, Findings};
use crate::measure::{Sample, cpu_seconds, median, relative_difference};
use crate::parts;
use crate::report::{Row, Table, figure};
use crate::session::{self, CallTimes, Input, Session};
use crate::vae;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The block of the transformer.
    pub block: block::Settings,
    /// The video decoder.
    pub vae: vae::Settings,
}

/// Levels of fusion with their names, the most first.
const LEVELS: [(&str, Fuse); 3] = [("full", Fuse::Full), ("composite", Fuse::Composite), ("none", Fuse::None)];

/// Largest difference of results between levels: fusion adds no rounding, sums may run in another order.
const MOST_DIFFERENT: f64 = 1e-5;

/// Measures. `folder` takes the weight files.
///
/// # Errors
/// A graph that does not compile or run, or levels that compute different things.
pub fn run(settings: &Settings, folder: &Path) -> Result<Findings> {
    let mut findings = Findings { rows: Vec::new(), tables: Vec::new(), notes: Vec::new() };
    let copy = copy_bytes_per_second();
    findings.rows.push(Row::value("copy in memory, read and written", "GB/s of processors", copy / 1e9));
    let rounds = settings.block.rounds;
    let (module, file, inputs) = block::subject(&settings.block, folder)?;
    measure("block", &module, &file, &inputs, rounds, copy, &mut findings)?;
    let (module, file, inputs) = vae::subject(&settings.vae, folder)?;
    measure("decoder", &module, &file, &inputs, rounds, copy, &mut findings)?;
    Ok(findings)
}

/// Bytes and calls of the programs that run with every step.
struct Cost {
    calls: u64,
    bytes: u64,
    elementwise: u64,
}

fn measure(
    what: &str,
    module: &Module,
    file: &WeightFile,
    inputs: &BTreeMap<String, Vec<f32>>,
    rounds: usize,
    copy: f64,
    findings: &mut Findings,
) -> Result<()> {
    let compile = |fuse| session::compile(module, file, Options { fuse, ..Options::default() });
    let plans = LEVELS.iter().map(|&(_, fuse)| compile(fuse)).collect::<Result<Vec<Plan>>>()?;
    let weights = session::open_weights(&plans[0], file)?;
    let mut sessions = Vec::with_capacity(plans.len());
    for plan in &plans {
        let inputs = inputs.iter().map(|(name, v)| (name.clone(), Input::F32(v.clone()))).collect();
        let mut session = Session::new(plan, &weights, inputs)?;
        session.run(Rate::Generation)?;
        sessions.push(session);
    }
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); LEVELS.len()];
    let mut best: Vec<CallTimes> = LEVELS.iter().map(|_| CallTimes::default()).collect();
    for round in 0..=rounds {
        for ((session, best), samples) in sessions.iter_mut().zip(&mut best).zip(&mut samples) {
            let mut times = CallTimes::default();
            let sample = session.run_timed(Rate::Step, &mut times)?;
            if round > 0 {
                samples.push(sample);
                best.keep_best(times);
            }
        }
    }
    let program = plans[0].programs.iter().find(|p| p.rate == Rate::Step);
    for slot in program.iter().flat_map(|p| &p.outputs) {
        let name = program.map_or("", |p| &p.name);
        let outputs = sessions.iter().map(|s| s.output(name, &slot.name)).collect::<Result<Vec<_>>>()?;
        for (output, (level, _)) in outputs.iter().zip(LEVELS).skip(1) {
            let difference = relative_difference(&outputs[0], output);
            ensure!(difference < MOST_DIFFERENT, "{what}: `{}` differs by {difference:.1e} from {level}", slot.name);
            findings.notes.push(format!("{what}: `{}` is {difference:.1e} from {level} (relative L2)", slot.name));
        }
    }
    drop(sessions);
    let costs: Vec<Cost> = plans.iter().map(cost).collect();
    let time = |level: usize| samples[level].iter().map(|s| s.cpu_seconds).fold(f64::INFINITY, f64::min);
    let paired = |other: usize| {
        let pairs = samples[0].iter().zip(&samples[other]);
        median(pairs.map(|(full, other)| full.cpu_seconds / other.cpu_seconds))
    };
    let rows = LEVELS.iter().enumerate().map(|(i, (level, _))| {
        let cost = &costs[i];
        vec![
            level.to_string(),
            cost.calls.to_string(),
            figure(cost.bytes as f64 / 1e6),
            figure(cost.elementwise as f64 / 1e6),
            figure(time(i) * 1e3),
            paired(i).map(figure).unwrap_or_default(),
            figure(median(samples[i].iter().map(|s| s.seconds)).unwrap_or(f64::NAN) * 1e3),
        ]
    });
    findings.tables.push(Table {
        title: format!("{what}: one step by level of fusion"),
        columns: vec![
            "fusion",
            "calls",
            "MB moved",
            "MB elementwise",
            "ms of processors",
            "full against it, median of rounds",
            "ms, median",
        ],
        rows: rows.collect(),
    });
    for (level, (name, _)) in LEVELS.iter().enumerate().take(2) {
        let table = best[level].table(&plans[level]);
        findings.tables.push(Table { title: format!("{what}, {name}: {}", table.title), ..table });
    }
    for (other, (level, _)) in LEVELS.iter().enumerate().skip(1) {
        let row = Row::compared(format!("{what}, full against {level}"), "s", time(0), time(other), None);
        findings.rows.push(row.ratio_at_most(1.0));
        let saved = costs[other].elementwise.saturating_sub(costs[0].elementwise) as f64;
        let row = Row::compared(
            format!("{what}, gain over {level} against what the bytes predict"),
            "s",
            time(other) - time(0),
            saved / copy,
            None,
        );
        findings.rows.push(row.ratio_at_least(0.8));
        let kept = costs[0].elementwise as f64 / costs[other].elementwise.max(1) as f64;
        let row = Row::value(format!("{what}, elementwise bytes saved against {level}"), "%", 100.0 * (1.0 - kept));
        findings.rows.push(row);
    }
    call_by_call(what, &plans[0], rounds, copy, findings)
}

/// Every fused call against its parts, those with most time first.
fn call_by_call(what: &str, plan: &Plan, rounds: usize, copy: f64, findings: &mut Findings) -> Result<()> {
    let mut pairs = parts::measure(plan, rounds)?;
    let of_step = |seconds: f64, calls: u64| seconds * calls as f64;
    pairs.sort_by(|a, b| of_step(b.parts, b.calls).total_cmp(&of_step(a.parts, a.calls)));
    let sum = |of: &dyn Fn(&parts::Pair) -> f64| pairs.iter().map(|p| of(p) * p.calls as f64).sum::<f64>();
    let (fused, apart) = (sum(&|p| p.fused), sum(&|p| p.parts));
    let row = Row::compared(format!("{what}, fused calls against their parts"), "s", fused, apart, None);
    findings.rows.push(row.ratio_at_most(1.0));
    let predicted = sum(&|p| p.saved_bytes as f64) / copy;
    let name = format!("{what}, gain over the parts against what the bytes predict");
    findings.rows.push(Row::compared(name, "s", apart - fused, predicted, None).ratio_at_least(0.8));
    let rows = pairs.iter().map(|p| {
        let predicted = p.saved_bytes as f64 / copy;
        vec![
            p.pattern.clone(),
            p.types.clone(),
            p.calls.to_string(),
            figure(p.saved_bytes as f64 / 1e6),
            figure(p.parts * 1e3),
            figure(p.fused * 1e3),
            figure(p.fused / p.parts),
            figure((p.parts - p.fused) * 1e3),
            figure(predicted * 1e3),
        ]
    });
    let columns = vec![
        "fused call",
        "operands → results",
        "calls",
        "MB saved",
        "ms, parts",
        "ms, fused",
        "ratio",
        "ms gained",
        "ms predicted",
    ];
    let title = format!("{what}: every fused call against its parts, the best of {rounds} rounds");
    findings.tables.push(Table { title, columns, rows: rows.collect() });
    Ok(())
}

/// What the programs of every step cost.
fn cost(plan: &Plan) -> Cost {
    let mut costs: Vec<Cost> = Vec::with_capacity(plan.functions.len());
    for function in &plan.functions {
        let mut sum = Cost { calls: 0, bytes: 0, elementwise: 0 };
        for step in &function.steps {
            let (calls, bytes, elementwise) = match step {
                Step::Kernel(call) => (1, call.bytes, elementwise_bytes(call)),
                Step::Call(call) => {
                    let callee = &costs[call.function as usize];
                    (callee.calls, callee.bytes, callee.elementwise)
                }
            };
            sum.calls += calls;
            sum.bytes += bytes;
            sum.elementwise += elementwise;
        }
        costs.push(sum);
    }
    let mut total = Cost { calls: 0, bytes: 0, elementwise: 0 };
    for program in plan.programs.iter().filter(|p| p.rate == Rate::Step) {
        let cost = &costs[program.function as usize];
        total.calls += cost.calls;
        total.bytes += cost.bytes;
        total.elementwise += cost.elementwise;
    }
    total
}

/// Bytes read and written per second of processor time by a copy much larger than any cache, on all threads.
fn copy_bytes_per_second() -> f64 {
    use rayon::prelude::*;
    const FLOATS: usize = 1 << 26;
    const CHUNK: usize = 1 << 16;
    let source = vec![1.0f32; FLOATS];
    let mut target = vec![0.0f32; FLOATS];
    let rates = (0..5).map(|_| {
        let start = cpu_seconds();
        target.par_chunks_mut(CHUNK).zip(source.par_chunks(CHUNK)).for_each(|(t, s)| t.copy_from_slice(s));
        (2 * size_of::<f32>() * FLOATS) as f64 / (cpu_seconds() - start)
    });
    rates.fold(0.0, f64::max)
}
