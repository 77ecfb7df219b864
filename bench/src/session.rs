//! One module, compiled and run, with the time of every kernel call.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use ltxc::bench::profile;
use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::identity::FileIdentity;
use ltxc_ir::plan::{Pipeline, Plan, Program, Target, WeightSource};
use ltxc_ir::{Module, Rate};
use ltxc_models::checkpoint::WeightFile;
use ltxc_runtime::executor::Executor;
use ltxc_runtime::weights::WeightFiles;

use crate::measure::{self, Sample};
use crate::report::{Table, figure};

/// What graphs of benchmarks call their weight file.
pub const SOURCE: &str = "model";

/// Compiles the entries of a module whose weights are all in `file`.
///
/// # Errors
/// A graph that cannot be compiled.
pub fn compile(module: &Module, file: &WeightFile, options: Options) -> Result<Plan> {
    compile_for(&Target::cpu(), module, vec![file.identity(false)?], options)
}

/// [`compile`] for any device, with weights in `files`.
///
/// # Errors
/// A graph that cannot be compiled.
pub fn compile_for(target: &Target, module: &Module, files: Vec<FileIdentity>, options: Options) -> Result<Plan> {
    let source = WeightSource { name: SOURCE.into(), files, renames: Vec::new() };
    let mut builder = PlanBuilder::new("ltxc-bench", target.clone(), options, vec![source]);
    for entry in &module.entries {
        builder.add("bench", entry, module, entry)?;
    }
    Ok(builder.finish(Pipeline::default())?)
}

/// The weights of a plan made by [`compile`].
///
/// # Errors
/// If `file` changed.
pub fn open_weights(plan: &Plan, file: &WeightFile) -> Result<WeightFiles> {
    Ok(WeightFiles::open(plan, &[PathBuf::from(file.path())], false)?)
}

/// Benchmarks are stopped with the process.
static NEVER: AtomicBool = AtomicBool::new(false);

/// An input of programs.
pub enum Input {
    /// Floats.
    F32(Vec<f32>),
    /// Whole numbers.
    I32(Vec<i32>),
}

/// A plan that is being run.
pub struct Session<'p> {
    executor: Executor<'p>,
    programs: Vec<&'p Program>,
    inputs: BTreeMap<String, Input>,
}

impl<'p> Session<'p> {
    /// Loads all programs of the plan. `inputs` go by the names of parameters.
    ///
    /// # Errors
    /// A weight that is missing, or not enough memory.
    pub fn new(plan: &'p Plan, weights: &'p WeightFiles, inputs: BTreeMap<String, Input>) -> Result<Session<'p>> {
        let mut executor = Executor::new(plan, weights, &NEVER)?;
        for program in &plan.programs {
            executor.load(&program.name)?;
        }
        Ok(Session { executor, programs: plan.programs.iter().collect(), inputs })
    }

    /// Runs all programs of `rate`, and gives the time of the kernels, without that for writing inputs.
    ///
    /// # Errors
    /// A program that cannot run.
    pub fn run(&mut self, rate: Rate) -> Result<Sample> {
        let mut sum = Sample { seconds: 0.0, cpu_seconds: 0.0 };
        for program in self.of_rate(rate) {
            self.write(program)?;
            let sample = measure::sample(|| Ok(self.executor.run(&program.name)?))?;
            sum.seconds += sample.seconds;
            sum.cpu_seconds += sample.cpu_seconds;
        }
        Ok(sum)
    }

    /// As [`Session::run`], and adds the times of single calls to `times`.
    ///
    /// # Errors
    /// As for [`Session::run`].
    pub fn run_timed(&mut self, rate: Rate, times: &mut CallTimes) -> Result<Sample> {
        let mut sum = Sample { seconds: 0.0, cpu_seconds: 0.0 };
        for program in self.of_rate(rate) {
            self.write(program)?;
            let mut calls = Vec::new();
            let sample = measure::sample(|| {
                calls = self.executor.run_timed(&program.name)?;
                Ok(())
            })?;
            times.add(&program.name, &calls);
            sum.seconds += sample.seconds;
            sum.cpu_seconds += sample.cpu_seconds;
        }
        Ok(sum)
    }

    /// An f32 output of a program.
    ///
    /// # Errors
    /// A name that does not exist.
    pub fn output(&self, program: &str, name: &str) -> Result<Vec<f32>> {
        Ok(self.executor.read(program, name)?.into_owned())
    }

    fn of_rate(&self, rate: Rate) -> Vec<&'p Program> {
        self.programs.iter().copied().filter(|p| p.rate == rate).collect()
    }

    /// Slots outside the state do not outlive other programs, so inputs are written before each run.
    fn write(&mut self, program: &Program) -> Result<()> {
        for slot in &program.inputs {
            match self.inputs.get(&slot.name) {
                Some(Input::F32(values)) => self.executor.write(&program.name, &slot.name, values)?,
                Some(Input::I32(values)) => self.executor.write(&program.name, &slot.name, values)?,
                // What another program left.
                None => {}
            }
        }
        Ok(())
    }
}

/// Part of the time from which a kernel stands in the table.
const WORTH_NAMING: f64 = 0.004;

/// Times of the kernel calls of programs, added up over runs.
#[derive(Default)]
pub struct CallTimes {
    runs: usize,
    seconds: BTreeMap<String, Vec<f64>>,
}

impl CallTimes {
    fn add(&mut self, program: &str, calls: &[Duration]) {
        let sums = self.seconds.entry(program.into()).or_insert_with(|| vec![0.0; calls.len()]);
        sums.iter_mut().zip(calls).for_each(|(sum, call)| *sum += call.as_secs_f64());
    }

    /// Adds the rounds of `other`.
    pub fn merge(&mut self, other: CallTimes) {
        self.runs += other.runs;
        for (program, seconds) in other.seconds {
            let sums = self.seconds.entry(program).or_insert_with(|| vec![0.0; seconds.len()]);
            sums.iter_mut().zip(&seconds).for_each(|(sum, s)| *sum += s);
        }
    }

    /// Says that one more round of all programs is in.
    pub fn end_of_round(&mut self) {
        self.runs += 1;
    }

    /// Mean seconds per round of the calls whose name path begins with `prefix`.
    pub fn seconds_of(&self, plan: &Plan, prefix: &str) -> f64 {
        self.calls(plan).iter().filter(|c| c.name.starts_with(prefix)).map(|c| c.seconds).sum()
    }

    /// Where time goes, by kernel and operand types: what takes part in the time worth naming, the slowest first.
    pub fn table(&self, plan: &Plan) -> Table {
        let calls = self.calls(plan);
        let total: f64 = calls.iter().map(|c| c.seconds).sum();
        let mut groups: BTreeMap<(&str, &str), Group> = BTreeMap::new();
        for call in &calls {
            let group = groups.entry((&call.kernel, &call.types)).or_default();
            group.calls += 1;
            group.seconds += call.seconds;
            group.flops += call.flops as f64;
            group.bytes += call.bytes as f64;
        }
        let mut groups: Vec<_> = groups.into_iter().collect();
        groups.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        let named = groups.iter().filter(|(_, g)| g.seconds >= WORTH_NAMING * total);
        let rows = named.map(|((kernel, types), g)| {
            vec![
                kernel.to_string(),
                types.to_string(),
                g.calls.to_string(),
                figure(g.seconds * 1e3),
                format!("{:.1} %", 100.0 * g.seconds / total),
                figure(g.flops / g.seconds / 1e9),
                figure(g.bytes / g.seconds / 1e9),
            ]
        });
        let columns = vec!["kernel", "operands → result", "calls", "ms", "share", "GFLOP/s", "GB/s"];
        Table { title: format!("{} ms in {} calls", figure(total * 1e3), calls.len()), columns, rows: rows.collect() }
    }

    fn calls(&self, plan: &Plan) -> Vec<TimedCall> {
        let mut calls = Vec::new();
        for (program, seconds) in &self.seconds {
            let Some(program) = plan.program(program) else { continue };
            let timed = profile::calls(plan, program).into_iter().zip(seconds).map(|(c, sum)| TimedCall {
                types: c.types(),
                name: c.name,
                kernel: c.call.work.name().into(),
                flops: c.call.flops,
                bytes: c.call.bytes,
                seconds: sum / self.runs.max(1) as f64,
            });
            calls.extend(timed);
        }
        calls
    }
}

#[derive(Default)]
struct Group {
    calls: usize,
    seconds: f64,
    flops: f64,
    bytes: f64,
}

struct TimedCall {
    name: String,
    kernel: String,
    types: String,
    flops: u64,
    bytes: u64,
    seconds: f64,
}
