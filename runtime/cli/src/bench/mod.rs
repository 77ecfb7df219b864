//! `ltxc bench`: how long the parts of a plan take on a device, cold and warm, how that compares with what the device can do,
//! and what fusion gains.
//!
//! | file | what |
//! | --- | --- |
//! | `ceilings` | the device's best copy and matrix product, measured |
//! | `calls` | kernel calls outside of a model |
//! | `inputs` | what programs are given |
//! | `profile` | time by kernel |
//! | `levels` | the same work at every level of fusion |
//! | `statistics` | what is made of repeated measurements |
//! | `table`, `page` | the report for people, as text and as HTML |
//! | `levels_page` | its section on levels of fusion |
//! | `drawing` | what such pages are drawn with |
//!
//! Kernels are timed with a wait for the device after each. Such waits cost time that a run does not spend, which is taken
//! off all calls alike, so that the kernels of a program add up to a run of it without waits.

pub mod calls;
pub mod ceilings;
pub mod drawing;
pub mod inputs;
pub mod levels;
pub mod levels_page;
mod page;
pub mod profile;
pub mod statistics;
mod table;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ltxc_compiler::Options;
use ltxc_ir::Rate;
use ltxc_ir::plan::summary::{function_costs, weight_bytes};
use ltxc_ir::plan::{Pass, Plan, Program, Sampler, Stage, container};
use ltxc_ir::tiling::AxisTile;
use ltxc_runtime::RunError;
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::pipeline::decode::program_name;
use ltxc_runtime::pipeline::enhance;
use ltxc_runtime::pipeline::needed_passes;
use ltxc_runtime::weights::WeightFiles;
use serde::Serialize;

use crate::args::{BenchArgs, SamplingArgs};
use crate::compile::{compile, read};
use crate::job::{self, Shape, pick};
use crate::model_files::ModelFiles;
use crate::pipelines::{definition, refuse_idle};
use crate::planned;
use crate::report::Report;
use crate::run::INTERRUPT;
use ceilings::Ceilings;
use inputs::write_inputs;
use levels::{ByLevel, LEVELS, Side};
use profile::{KernelTime, Profile};
use statistics::median;
pub use table::figure;

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// Hash of the plan.
    pub plan: String,
    /// Name and description of the device.
    pub device: [String; 2],
    /// Its measured ceilings.
    pub ceilings: Ceilings,
    /// Whether the weights are synthetic: those of full-size models are zeros then.
    pub is_synthetic: bool,
    /// The programs of one generation, in the order in which they were measured.
    pub programs: Vec<ProgramTime>,
    /// The kernels of one generation, the slowest first.
    pub kernels: Vec<KernelTime>,
    /// The parts of one generation at every level of fusion, if that was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub levels: Vec<ByLevel>,
    /// Most resident memory of this process in bytes, mapped weights included; 0 where the system does not say.
    pub resident_bytes: u64,
}

/// A program, and what it took.
#[derive(Clone, Debug, Serialize)]
pub struct ProgramTime {
    /// Its group, which is a part of a generation.
    pub group: String,
    /// Its name.
    pub name: String,
    /// How often a generation runs it.
    pub runs: u64,
    /// Seconds to bind its weights: reading, packing, uploading.
    pub load_seconds: f64,
    /// Seconds of the first run, which compiles kernels where the device needs that.
    pub first_seconds: f64,
    /// Seconds of a later run, the median of some.
    pub warm_seconds: f64,
    /// Kernel calls of a run.
    pub calls: u64,
    /// Floating point operations of a run.
    pub flops: u64,
    /// Bytes that a run reads and writes.
    pub bytes: u64,
    /// The least time a run could take at the ceilings of the device.
    pub least_seconds: f64,
    /// Bytes of its arenas.
    pub arena_bytes: u64,
    /// Bytes of the weights it reads.
    pub weight_bytes: u64,
}

/// `ltxc bench`. `given` are the flags of the command line, by their ids.
///
/// # Errors
/// A plan, model files, weights or a device that cannot be used.
pub fn run(args: &BenchArgs, given: &[String], json: bool, report: &mut Report) -> Result<()> {
    let subject = Subject::open(args, given, json, report)?;
    let (plan, folders) = (&subject.plan, &subject.folders);
    let device = pick(&args.shape.device, Some(plan))?;
    let weights = WeightFiles::open(plan, folders, args.model.verify)?;
    let selected = selected(plan, args)?;
    // Before the device is measured for nothing.
    open(&device)?.check(plan)?;
    if !json {
        report.begin("ceilings", 1);
    }
    let ceilings = Ceilings::measure(&device)?;
    let mut findings = Findings {
        plan: subject.hash.iter().map(|b| format!("{b:02x}")).collect(),
        device: [device.name.to_string(), device.description.clone()],
        ceilings,
        is_synthetic: plan.pipeline.model.synthetic,
        programs: Vec::new(),
        kernels: Vec::new(),
        levels: Vec::new(),
        resident_bytes: 0,
    };
    if !json {
        report.begin("programs", selected.len());
    }
    let mut executor = Executor::on(open(&device)?, plan, &weights, &INTERRUPT)?;
    let mut profile = Profile::default();
    for (i, &(program, runs)) in selected.iter().enumerate() {
        // As in a run, the weights of one part of a generation make room for those of the next.
        if i > 0 && selected[i - 1].0.group != program.group {
            executor.unload_all()?;
        }
        let time = measure(&mut executor, program, runs, args.rounds, &mut profile, &findings.ceilings)?;
        findings.programs.push(time);
        if !json {
            report.step(i + 1);
        }
    }
    findings.kernels = profile.sorted();
    findings.resident_bytes = resident_bytes();
    // Levels need the memory.
    drop(executor);
    if args.levels {
        findings.levels = subject.by_level(args, &device, &findings.ceilings, json, report)?;
    }
    if let Some(path) = &args.html {
        let only = args.only.as_ref().map(|only| format!(" --only {only}")).unwrap_or_default();
        let levels = if args.levels { " --levels" } else { "" };
        let command = format!("ltxc bench {} --device {}{only}{levels}", subject.name.display(), device.name);
        write_atomically(path, page::html(&findings, &command).as_bytes())?;
    }
    if json {
        println!("{}", serde_json::to_string(&findings)?);
    } else {
        report.end();
        print!("{}", table::text(&findings));
    }
    Ok(())
}

/// What is measured: a plan that was named, or one that was made of model files.
struct Subject {
    /// Its file, or that of the model.
    name: PathBuf,
    plan: Plan,
    hash: [u8; 32],
    /// Folders and files with its weights.
    folders: Vec<PathBuf>,
    /// What it was made of.
    made_of: Option<(ModelFiles, Shape)>,
}

impl Subject {
    fn open(args: &BenchArgs, given: &[String], json: bool, report: &mut Report) -> Result<Subject> {
        let Some(path) = &args.plan else { return Subject::compiled(args, given, json, report) };
        if args.levels {
            bail!(
                "`{}` is a plan, which has one level of fusion; for `--levels` name the model files and its size instead",
                path.display()
            );
        }
        let (plan, hash) = read(path)?;
        planned::check(&args.shape, path, &plan)?;
        if args.shape.sampling != SamplingArgs::default() {
            bail!(
                "`{}` is measured with the steps and the guidance that it was compiled with; leave flags about these out, or \
                 name model files instead",
                path.display()
            );
        }
        let mut folders = args.weights.clone();
        folders.extend(args.model.paths().cloned());
        if folders.is_empty() {
            folders.push(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(".".as_ref()).into());
        }
        Ok(Subject { name: path.clone(), plan, hash, folders, made_of: None })
    }

    fn compiled(args: &BenchArgs, given: &[String], json: bool, report: &mut Report) -> Result<Subject> {
        let named = definition(args.shape.pipeline.unwrap_or_default());
        refuse_idle(named, given, &args.shape.sampling)?;
        let shape = Shape::resolve(&args.shape, named.brings.usual_keyframes())?;
        if !args.model.names_model() {
            bail!("there is nothing to measure; name a plan, or a model with `--checkpoint-path`");
        }
        let files = ModelFiles::of_pipeline(&args.model, shape.pipeline, true)?;
        job::refuse_quantization(&args.shape, files.model.name(), files.model.has_fp8())?;
        if !json {
            job::say_passed_over(&args.shape.device, report)?;
        }
        let plan = compile(&files, &shape, Options::default(), &mut |_, _, _| {})?;
        let hash = container::hash(&container::encode(&plan)?);
        let folders = [files.paths(), args.weights.clone()].concat();
        Ok(Subject { name: Path::new(files.model.name()).into(), plan, hash, folders, made_of: Some((files, shape)) })
    }

    /// Measures every part of a generation at every level of fusion, in turns.
    fn by_level(
        &self,
        args: &BenchArgs,
        device: &Device,
        ceilings: &Ceilings,
        json: bool,
        report: &mut Report,
    ) -> Result<Vec<ByLevel>> {
        let (files, shape) = self.made_of.as_ref().context("levels of fusion are compiled from model files")?;
        let (mut plans, mut missing) = (Vec::with_capacity(LEVELS.len()), Vec::new());
        for (level, fuse) in LEVELS {
            // Without fusion a tensor may be larger than the device allows.
            match compile(files, shape, Options { fuse, ..Options::default() }, &mut |_, _, _| {}) {
                Ok(plan) => plans.push((level, WeightFiles::open(&plan, &self.folders, false)?, plan)),
                Err(problem) => missing.push([level.to_string(), format!("{problem:#}")]),
            }
        }
        let mut parts: Vec<&str> = selected(&self.plan, args)?.iter().map(|(p, _)| group_of(&self.plan, p)).collect();
        parts.dedup();
        if !json {
            report.begin("levels", parts.len());
        }
        let mut rows = Vec::with_capacity(parts.len());
        for (i, part) in parts.into_iter().enumerate() {
            let mut sides = Vec::with_capacity(plans.len());
            for (level, weights, plan) in &plans {
                let mut programs = selected(plan, args)?;
                programs.retain(|(p, _)| group_of(plan, p) == part);
                sides.push(Side { level, plan, weights, before: Vec::new(), programs });
            }
            let row = ByLevel {
                name: part.into(),
                sizes: String::new(),
                levels: Vec::new(),
                missing: missing.clone(),
                others: Vec::new(),
            };
            let limits = (args.rounds.max(1), Duration::MAX);
            rows.push(levels::measure(row, sides, device, ceilings, limits, &INTERRUPT)?);
            if !json {
                report.step(i + 1);
            }
        }
        Ok(rows)
    }
}

/// The programs of a generation from text alone, with how often it runs each: by group, slow rates first.
fn selected<'p>(plan: &'p Plan, args: &BenchArgs) -> Result<Vec<(&'p Program, u64)>> {
    let buckets = &plan.pipeline.text.buckets;
    let fits = |bucket: &&u32| **bucket as usize >= args.tokens;
    let bucket = buckets.iter().find(fits).or(buckets.last()).copied().unwrap_or(0);
    let mut programs: Vec<(&Program, u64)> =
        plan.programs.iter().map(|p| (p, runs_of(plan, p, bucket))).filter(|&(_, runs)| runs > 0).collect();
    let rate = |p: &Program| [Rate::Generation, Rate::Evaluation, Rate::Step].iter().position(|&r| r == p.rate);
    // Stable: programs of a rate stay in the order in which they run.
    let order = |p: &Program| if is_stage(plan, p) { rate(p) } else { None };
    programs.sort_by_key(|(p, _)| (p.group, order(p)));
    if let Some(only) = &args.only {
        let names: Vec<&str> = plan.groups.iter().map(|g| g.name.as_str()).collect();
        programs.retain(|(p, _)| group_of(plan, p) == only);
        if programs.is_empty() {
            bail!("the plan runs no part `{only}` for a prompt; its parts are {}", names.join(", "));
        }
    }
    Ok(programs)
}

fn is_stage(plan: &Plan, program: &Program) -> bool {
    plan.pipeline.stages.iter().flat_map(|s| &s.classes).any(|class| class.name == group_of(plan, program))
}

fn group_of<'p>(plan: &'p Plan, program: &Program) -> &'p str {
    plan.groups.get(program.group as usize).map_or("", |g| g.name.as_str())
}

/// How often a generation from text alone runs a program, with a prompt of `bucket` tokens. Steps that skip a modality
/// count as whole ones.
fn runs_of(plan: &Plan, program: &Program, bucket: u32) -> u64 {
    let stages = &plan.pipeline.stages;
    let group = group_of(plan, program);
    if let Some((stage, class)) = stages.iter().find_map(|s| Some((s, s.classes.iter().find(|c| c.name == group)?))) {
        // The first class is that without conditioning, and its first program computes everything.
        let is_part = |name: &str| program.name == name || program.name.starts_with(&format!("{name}."));
        let own = class.programs.iter().filter(|p| is_part(&p.name)).max_by_key(|p| p.name.len());
        // A class of tiles is that of all which have its extent.
        let has_extent = |tile: &[AxisTile; 3]| tile.map(|axis| axis.len() as u32) == class.grid;
        let times = stage.tiles.as_ref().map_or(1, |tiles| tiles.tiles().filter(has_extent).count() as u64);
        let is_plain = (stage.tiles.is_some() || stage.classes.first() == Some(class))
            && own.is_some()
            && own == class.programs.first();
        return match (is_plain, program.rate) {
            (false, _) => 0,
            (true, Rate::Generation) => times,
            (true, _) => times * stage.sigmas.len().saturating_sub(1) as u64 * evaluations(stage.sampler),
        };
    }
    let is_guided = |s: &Stage| needed_passes(s.guidance.as_ref(), s.sampler).contains(&Pass::Negative);
    let prompts = 1 + u64::from(stages.iter().any(is_guided));
    if let Some(tokens) = program.name.strip_prefix("encode.") {
        return if tokens.split('.').next() == Some(&bucket.to_string()) { prompts } else { 0 };
    }
    let sees = [enhance::SEE, enhance::PREFILL_IMAGE].contains(&program.name.as_str());
    if program.name.starts_with("encode_image.") || sees {
        return 0;
    }
    if program.name == enhance::DECODE {
        return enhance::MOST_WRITTEN as u64;
    }
    if program.name.starts_with("decode.") {
        let is_own = |tile: &[ltxc_ir::tiling::AxisTile; 3]| {
            program.name == program_name(tile[0].len(), tile[1].len(), tile[2].len())
        };
        return plan.pipeline.decode.tiles().filter(is_own).count() as u64;
    }
    if group == "text" { prompts } else { 1 }
}

/// Evaluations of the model in a step.
fn evaluations(sampler: Sampler) -> u64 {
    if sampler == Sampler::Res2s { 2 } else { 1 }
}

/// Measures one program.
fn measure(
    executor: &mut Executor<'_>,
    program: &Program,
    runs: u64,
    rounds: usize,
    profile: &mut Profile,
    ceilings: &Ceilings,
) -> Result<ProgramTime, RunError> {
    let plan = executor.plan();
    let name = &program.name;
    let timed = |executor: &mut Executor<'_>, work: &dyn Fn(&mut Executor<'_>) -> Result<(), RunError>| {
        let start = Instant::now();
        work(executor)?;
        executor.synchronize()?;
        Ok::<f64, RunError>(start.elapsed().as_secs_f64())
    };
    let load_seconds = timed(executor, &|e| e.load(name))?;
    let run = |executor: &mut Executor<'_>| {
        write_inputs(executor, program)?;
        executor.synchronize()?;
        timed(executor, &|e| e.run(name))
    };
    let first_seconds = run(executor)?;
    let warm = (0..rounds.max(1)).map(|_| run(executor)).collect::<Result<Vec<f64>, _>>()?;
    let warm_seconds = median(warm).unwrap_or(f64::NAN);

    write_inputs(executor, program)?;
    let times = executor.run_timed(name)?;
    let calls = profile::calls(plan, program);
    let mut least_seconds = 0.0;
    for (call, seconds) in calls.iter().zip(without_waits(&times, warm_seconds)) {
        profile.add(call.call, runs, seconds, ceilings);
        least_seconds += ceilings.seconds(call.call.flops, call.call.bytes, profile::dtype(call.call));
    }
    let cost = function_costs(plan).swap_remove(program.function as usize);
    let (mapped, packed) = weight_bytes(plan, program);
    Ok(ProgramTime {
        group: group_of(plan, program).into(),
        name: name.clone(),
        runs,
        load_seconds,
        first_seconds,
        warm_seconds,
        calls: cost.calls,
        flops: cost.flops,
        bytes: cost.bytes,
        least_seconds,
        arena_bytes: program.arena_bytes.iter().fold(0u64, |sum, &b| sum.saturating_add(b)),
        weight_bytes: mapped.saturating_add(packed),
    })
}

/// Part of a call's time that is never taken for waiting.
const LEAST_PART: f64 = 0.05;

/// Seconds of calls that were timed with a wait after each, so that they add up to a run without waits of `total`.
///
/// Every call loses the same, the cost of a wait, but no more than nearly all it has; what is then left over or missing,
/// because no two runs are the same, is shared in proportion.
pub fn without_waits(times: &[Duration], total: f64) -> Vec<f64> {
    let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    let sum: f64 = seconds.iter().sum();
    let wait = (sum - total) / seconds.len().max(1) as f64;
    if wait > 0.0 {
        seconds.iter_mut().for_each(|s| *s = (*s - wait).max(LEAST_PART * *s));
    }
    let sum: f64 = seconds.iter().sum();
    if sum > 0.0 {
        seconds.iter_mut().for_each(|s| *s *= total / sum);
    }
    seconds
}

/// Time that a sample should take, so that starting and waiting do not count.
const SAMPLE_SECONDS: f64 = 0.02;

/// Most runs of a sample.
const MOST_RUNS: usize = 200;

/// Seconds of one run of a program, in `rounds` samples of as many runs as make the wait for the device negligible. Its
/// inputs must outlive a run.
///
/// # Errors
/// A program that cannot run.
pub fn seconds_of(executor: &mut Executor<'_>, program: &str, rounds: usize) -> Result<Vec<f64>, RunError> {
    let runs = runs_of_sample(executor, program)?;
    (0..rounds).map(|_| sample(executor, program, runs)).collect()
}

/// How many runs make a sample, after two that compile and time the program.
///
/// # Errors
/// A program that cannot run.
pub fn runs_of_sample(executor: &mut Executor<'_>, program: &str) -> Result<usize, RunError> {
    sample(executor, program, 1)?;
    Ok(((SAMPLE_SECONDS / sample(executor, program, 1)?).ceil() as usize).clamp(1, MOST_RUNS))
}

/// Seconds of one of `runs` runs of a program.
///
/// # Errors
/// A program that cannot run.
pub fn sample(executor: &mut Executor<'_>, program: &str, runs: usize) -> Result<f64, RunError> {
    let start = Instant::now();
    (0..runs).try_for_each(|_| executor.run(program))?;
    executor.synchronize()?;
    Ok(start.elapsed().as_secs_f64() / runs as f64)
}

/// The most memory that was resident in this process, as Linux counts it.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_taken_off_alike() {
        let ms = Duration::from_millis;
        let seconds = without_waits(&[ms(11), ms(2), ms(31)], 0.041);
        let expected = [0.010, 0.001, 0.030];
        assert!(seconds.iter().zip(expected).all(|(s, e)| (s - e).abs() < 1e-9), "{seconds:?}");
        // A slower run than the one with waits: nothing was waited for.
        assert!((without_waits(&[ms(10), ms(30)], 0.05)[1] - 0.0375).abs() < 1e-9);
        // A call that is as short as a wait keeps something, and the sum stays.
        let seconds = without_waits(&[ms(1), ms(9)], 0.004);
        assert!(seconds[0] > 0.0 && (seconds.iter().sum::<f64>() - 0.004).abs() < 1e-12, "{seconds:?}");
    }
}
