//! One call of the model with all of its values: `ltxc debug step`, `ltxc debug block` and `ltxc debug export`.
//!
//! The call is one of the transformer alone, on drawn or recorded inputs, or the first step of a pipeline. Its values can be
//! printed, written, and compared with recorded ones, in the order in which they are computed, so that the first that
//! differs is where to look.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use clap::{Arg, Args, Command, Id};
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::{Plan, Program};
use ltxc_models::transformer::Stream;
use ltxc_runtime::RunError;
use ltxc_runtime::adapters::AdapterSet;
use ltxc_runtime::noise_files::{self, Stored};
use ltxc_runtime::stats::{Stats, decoded};
use ltxc_runtime::tap::{Role, Tap, Value};
use serde_json::json;

use super::compare::likely_causes;
use super::denoising::{StepFacts, step_facts};
use super::evaluation::{COMPONENT, DrawnArgs, Inputs, Model, UNIFORM};
use super::flags::DebugMode;
use super::modules::{Kept, Ran, Side};
use super::names::component;
use super::parity::transformer::{StreamCase, check_call, check_preparation, heads_first, prediction, recorded_name};
use super::parity::{Check, Row, hint};
use super::pipeline::{RunOf, Tensors};
use super::recording::TensorFile;
use crate::args::ShapeArgs;

/// Relative L2 that two implementations in f32 may differ by.
const LIMIT: f64 = 1e-5;

/// Where inputs of a single call come from.
#[derive(Debug, Args)]
pub struct CallArgs {
    /// Inputs: a recording, or what `debug export` or `debug lora inputs` wrote [default: that of --compare, or drawn]
    #[arg(long, value_name = "FILE")]
    pub inputs: Option<PathBuf>,
    /// Case of that file.
    #[arg(long, default_value = UNIFORM)]
    pub case: String,
    /// Noise level of every token [default: that of the file, or 0.25]
    #[arg(long)]
    pub sigma: Option<f32>,
    /// Frames, rows and columns of a latent that is drawn.
    #[arg(long, value_name = "F,H,W", value_delimiter = ',', default_values_t = DrawnArgs::default().grid)]
    pub grid: Vec<u32>,
    /// Text tokens that are drawn.
    #[arg(long, value_name = "N", default_value_t = DrawnArgs::default().text_tokens)]
    pub text_tokens: usize,
}

impl CallArgs {
    fn inputs(&self, fallback: Option<&Path>, seed: u64, model: &Model<'_>) -> Result<Inputs> {
        let file = self.inputs.as_deref().or(fallback);
        let mut inputs = match file {
            Some(path) => Inputs::read(&TensorFile::open(path)?, &self.case)?,
            None => {
                let sigma = self.sigma.unwrap_or(DrawnArgs::default().sigma);
                let drawn = DrawnArgs { grid: self.grid.clone(), sigma, seed, text_tokens: self.text_tokens };
                Inputs::drawn(&drawn, Some(&model.checkpoint))?
            }
        };
        if let Some(sigma) = self.sigma {
            if !(0.0..=1.0).contains(&sigma) {
                bail!("`--sigma {sigma}` is out of range, expected 0 to 1");
            }
            inputs.set_sigma(sigma);
        }
        Ok(inputs)
    }
}

/// `ltxc debug step`.
#[derive(Debug, Args)]
#[command(
    mut_args(of_one_kind()),
    after_help = "Examples:\n  ltxc debug step --checkpoint-path x.safetensors --sigma 0.7 --stats\n  \
    ltxc debug step --checkpoint-path x.safetensors --compare recordings/transformer.safetensors\n  \
    ltxc debug step --pipeline distilled-one-stage -H 64 -W 64 --num-frames 9 --velocity --checkpoint-path … --gemma-root …"
)]
pub struct StepArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub call: CallArgs,
    /// Check that x0 = x − σ·v, and that Euler steps from x0 and from v agree.
    #[arg(long)]
    pub velocity: bool,
    /// Compare with the recorded values of this file: a recording, or what `debug export` wrote.
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
    /// Compare velocities and predictions alone.
    #[arg(long, requires = "compare")]
    pub outputs_only: bool,
    /// Relative L2 up to which values agree.
    #[arg(long, default_value_t = LIMIT)]
    pub limit: f64,
    /// Print every value, not blocks and results alone.
    #[arg(long)]
    pub stats: bool,
    /// Print every value as a line `name (shape) abs_mean sum min max`, which `debug compare` reads.
    #[arg(long)]
    pub trace: bool,
    /// Of the first stage of a pipeline (--pipeline): the step to look at, from 0.
    #[arg(long, default_value_t = 0)]
    pub at: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run: RunOf,
}

/// Flags about inputs and recordings of a call of the transformer alone exclude a pipeline, and those of a run need one: the
/// others' would do nothing.
fn of_one_kind() -> impl FnMut(Arg) -> Arg {
    let ids = |command: Command| command.get_arguments().map(|arg| arg.get_id().clone()).collect::<Vec<Id>>();
    let of_call =
        [ids(CallArgs::augment_args(Command::new("call"))), ["compare", "limit"].map(Id::from).into()].concat();
    let mut of_run =
        [ids(ShapeArgs::augment_args(Command::new("run"))), ["prompt", "at"].map(Id::from).into()].concat();
    of_run.retain(|id| id != "pipeline" && id != "device");
    move |arg| match arg.get_id() {
        id if of_call.contains(id) => arg.conflicts_with("pipeline"),
        id if of_run.contains(id) => arg.requires("pipeline"),
        _ => arg,
    }
}

/// `ltxc debug block`.
#[derive(Debug, Args)]
pub struct BlockArgs {
    /// Number of the block, from 0; without it every block, each on what was recorded in front of it.
    pub block: Option<usize>,
    /// File with the values in front of the block and behind it: a recording, or what `debug export` wrote.
    #[arg(long, value_name = "FILE")]
    pub compare: PathBuf,
    /// Case of that file.
    #[arg(long, default_value = UNIFORM)]
    pub case: String,
    /// Relative L2 up to which values agree.
    #[arg(long, default_value_t = LIMIT)]
    pub limit: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// `ltxc debug export`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc debug export --checkpoint-path x.safetensors --out call.pt     then, in Python: torch.load(\"call.pt\")"
)]
pub struct ExportArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub call: CallArgs,
    /// Seed of what is drawn.
    #[arg(long, default_value_t = DrawnArgs::default().seed)]
    pub seed: u64,
    /// File to write: .safetensors, .npz or .pt.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// `ltxc debug step`. Returns whether every value is finite, and what was asked for agrees.
///
/// # Errors
/// Inputs that do not fit the model, or a run that fails.
pub fn run(args: &StepArgs, json_output: bool) -> Result<bool> {
    if args.run.shape.pipeline.is_some() {
        return run_in_pipeline(args, json_output);
    }
    let RunOf { model, shape, debug, seed, .. } = &args.run;
    let side = Side { model: model.clone(), device: shape.device.clone(), logs: debug.of_graphs()?.clone() };
    let (inputs, ran) = side.look(&[COMPONENT], Some(*seed), |device, session| {
        let model = Model::open(model, device, session)?;
        let inputs = args.call.inputs(args.compare.as_deref(), *seed, &model)?;
        let ran = model.evaluate(&inputs, AdapterSet::default())?;
        Ok((inputs, ran))
    })?;
    let mut ok = print_values(args, &ran, json_output);
    let file = args.compare.as_deref().map(TensorFile::open).transpose()?;
    if let Some(file) = &file {
        let mut rows = Vec::new();
        let mut check = Check::new("transformer", file.clone(), args.limit, &mut rows);
        if !args.outputs_only && inputs.case == UNIFORM && inputs.streams().all(|(_, s)| s.keyframes_mask.is_none()) {
            check_preparation(&mut check, &ran);
        }
        check_call(&mut check, &inputs, &ran, args.outputs_only);
        ok &= print_rows(&rows, &file.path.display().to_string(), json_output)?;
    }
    if args.velocity {
        for facts in velocity_facts(&inputs, &ran, file.as_ref(), &args.call.case)? {
            ok &= print_velocity(&facts, json_output);
        }
    }
    Ok(ok)
}

/// `ltxc debug block`. Returns whether the block, or every block that was recorded, gives what was recorded behind it.
///
/// # Errors
/// A file that has not what stands in front of the block.
pub fn run_block(args: &BlockArgs, json_output: bool) -> Result<bool> {
    let file = TensorFile::open(&args.compare)?;
    let inputs = Inputs::read(&file, &args.case)?;
    let mut rows = Vec::new();
    args.side.look(&[COMPONENT], None, |device, session| {
        let model = Model::open(&args.side.model, device, session)?;
        let blocks = match args.block {
            Some(block) => vec![block],
            None => recorded_blocks(&file, &inputs, model.config(&args.case)?.layers)?,
        };
        for block in blocks {
            session.next_run(&format!("block{block}"))?;
            let ran = model.evaluate_block(block, &inputs, before(&file, &inputs, block)?)?;
            let mut check = Check::new("transformer", file.clone(), args.limit, &mut rows);
            check_call(&mut check, &inputs, &ran, false);
        }
        Ok(())
    })?;
    print_rows(&rows, &file.path.display().to_string(), json_output)
}

/// The blocks that have both in a file: what stands in front of them, and behind.
fn recorded_blocks(file: &TensorFile, inputs: &Inputs, layers: usize) -> Result<Vec<usize>> {
    let is_recorded = |&block: &usize| {
        let behind = |(stream, _): (Stream, &StreamCase)| name_before(inputs, stream, block + 1);
        inputs.streams().all(|stream| file.find(&behind(stream)).is_some()) && before(file, inputs, block).is_ok()
    };
    let blocks: Vec<usize> = (0..layers).filter(is_recorded).collect();
    if blocks.is_empty() {
        bail!("`{}` has no block of case `{}` with what stands in front of it", file.path.display(), inputs.case);
    }
    Ok(blocks)
}

/// What recordings call the stream in front of a block.
fn name_before(inputs: &Inputs, stream: Stream, block: usize) -> String {
    match block.checked_sub(1) {
        Some(i) => format!("{}.block{i}.{}", inputs.case, stream.name()),
        None => format!("prep.{}.x", stream.name()),
    }
}

/// The streams in front of a block.
fn before(file: &TensorFile, inputs: &Inputs, block: usize) -> Result<Vec<Tensor>> {
    let stream = |(stream, _): (Stream, &StreamCase)| {
        let name = name_before(inputs, stream, block);
        let missing = || format!("`{}` has no whole `{name}`, which goes into block {block}", file.path.display());
        file.find(&name).map(|x| Tensor::f32(&x.ty.shape, &x.to_f32())).with_context(missing)
    };
    inputs.streams().map(stream).collect()
}

/// `ltxc debug export`: the inputs and every value of one call.
///
/// # Errors
/// Inputs that do not fit the model, or a file that cannot be written.
pub fn run_export(args: &ExportArgs, json_output: bool) -> Result<bool> {
    let (inputs, ran) = args.side.look(&[COMPONENT], Some(args.seed), |device, session| {
        let model = Model::open(&args.side.model, device, session)?;
        let inputs = args.call.inputs(None, args.seed, &model)?;
        let ran = model.evaluate(&inputs, AdapterSet::default())?;
        Ok((inputs, ran))
    })?;
    let tensors = exported(&inputs, &ran);
    noise_files::write_all(&args.out, &tensors)?;
    if json_output {
        println!("{}", json!({"file": args.out, "tensors": tensors.len(), "case": inputs.case}));
    } else {
        println!("{} tensors of one call in `{}`", tensors.len(), args.out.display());
    }
    Ok(true)
}

/// Everything about a call, under the names of recordings.
fn exported(inputs: &Inputs, ran: &Ran) -> Vec<Stored> {
    let case = &inputs.case;
    let mut tensors = inputs.tensors();
    for kept in &ran.values {
        let name = recorded_name(case, &kept.name);
        let (shape, values) = match (kept.name.contains("rope_"), &kept.ty.shape[..]) {
            (true, &[b, t, n, d]) => (vec![b, n, t, d], heads_first(&kept.values, &kept.ty.shape)),
            (_, shape) => (shape.to_vec(), kept.values.clone()),
        };
        tensors.push(Stored::f32(&name, &shape, values));
    }
    for (stream, of) in inputs.streams() {
        let Some(velocity) = ran.results.get(&format!("{}.velocity", stream.name())) else { continue };
        let x0 = prediction(&of.latent.to_f32(), &velocity.values, &of.timesteps);
        let shape = &velocity.ty.shape;
        tensors.push(Stored::f32(&format!("{case}.velocity.{}", stream.name()), shape, velocity.values.clone()));
        tensors.push(Stored::f32(&format!("{case}.x0.{}", stream.name()), shape, x0));
    }
    // Some names stand several times: the last value counts.
    let mut seen = std::collections::BTreeSet::new();
    tensors.reverse();
    tensors.retain(|t| seen.insert(t.name.clone()));
    tensors.reverse();
    tensors
}

/// The facts of one Euler step from this call: of the recorded predictions if there are any, else of our own.
fn velocity_facts(inputs: &Inputs, ran: &Ran, file: Option<&TensorFile>, case: &str) -> Result<Vec<StepFacts>> {
    let (mut tensors, mut velocities) = (BTreeMap::new(), BTreeMap::new());
    for (stream, of) in inputs.streams() {
        let name = stream.name();
        let sigma = of.sigma;
        if sigma <= 0.0 || of.timesteps.iter().any(|t| *t != sigma) {
            bail!("`--velocity` needs one noise level above 0 on every token; choose another case, or give `--sigma`");
        }
        let latent = of.latent.to_f32();
        let recorded = |what: &str| file.and_then(|f| f.find(&format!("{case}.{what}.{name}"))).map(Tensor::to_f32);
        let own = &ran.result(&format!("{name}.velocity"))?.values;
        let velocity = recorded("velocity").unwrap_or_else(|| own.clone());
        let x0 = recorded("x0").unwrap_or_else(|| prediction(&latent, own, &of.timesteps));
        if [velocity.len(), x0.len()] != [latent.len(); 2] {
            bail!(
                "velocity, prediction and latent of {name} have {}, {} and {} values",
                velocity.len(),
                x0.len(),
                latent.len()
            );
        }
        // Half of the noise is left after the step. What it is from the velocity, it must be from the prediction, too.
        let next = sigma / 2.0;
        let stepped: Vec<f32> = latent.iter().zip(&velocity).map(|(x, v)| x + (next - sigma) * v).collect();
        tensors.insert("call.sigmas".to_string(), vec![sigma, next]);
        for (key, values) in [
            (format!("call.{name}.noised"), latent),
            (format!("call.call0.cond.{name}.x0"), x0.clone()),
            (format!("call.call0.{name}.denoised"), x0),
            (format!("call.step0.{name}.latent"), stepped),
        ] {
            tensors.insert(key, values);
        }
        velocities.insert(format!("call.0.{name}"), velocity);
    }
    Ok(step_facts(&tensors, &velocities))
}

/// Prints what a step did; returns whether velocity, prediction and step agree.
fn print_velocity(f: &StepFacts, json_output: bool) -> bool {
    let flags = f.inconsistencies();
    let (stage, step, modality) = &f.at;
    if json_output {
        println!(
            "{}",
            json!({"stage": stage, "step": step, "modality": modality, "sigma": f.sigma, "x0_from_v": f.consistency,
            "euler": f.euler, "corr_x0_v": f.x0_v, "std_v": f.std[0], "std_x0": f.std[1], "flags": flags})
        );
        return flags.is_empty();
    }
    println!(
        "{modality} at σ {:.5}: x0 against x − σ·v {:.1e}, Euler from x0 against from v {:.1e}, std of v {:.4}, of x0 {:.4}",
        f.sigma,
        f.consistency.unwrap_or(f64::NAN),
        f.euler,
        f.std[0],
        f.std[1]
    );
    flags.iter().for_each(|flag| println!("  RED FLAG: {flag}"));
    flags.is_empty()
}

/// Prints values of a call, all or those of blocks and results; returns whether all are finite.
fn print_values(args: &StepArgs, ran: &Ran, json_output: bool) -> bool {
    let is_main = |name: &str| {
        let rest = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
        matches!(rest, Some((_, "video" | "audio")))
    };
    if !args.trace && !json_output {
        println!("{:<46} {:<18} {:>10} {:>10} {:>10} {:>10}", "value", "shape", "mean", "std", "min", "max");
    }
    let mut ok = true;
    let inner = ran.values.iter().map(|kept| (kept, args.stats || args.trace || is_main(&kept.name)));
    for (kept, is_shown) in inner.chain(ran.results.values().map(|kept| (kept, true))) {
        let s = Stats::of_typed(kept.ty.clone(), &kept.values);
        ok &= !s.is_bad();
        match (is_shown || s.is_bad(), args.trace, json_output) {
            (false, ..) => {}
            (_, true, _) => {
                println!("{} {} {} {} {} {}", kept.name, s.shape_text(), s.abs_mean, s.sum, s.min, s.max);
            }
            (_, _, true) => println!(
                "{}",
                json!({"value": kept.name, "shape": s.ty.shape, "mean": s.mean, "std": s.std, "abs_mean": s.abs_mean,
                    "sum": s.sum, "min": s.min, "max": s.max, "nan": s.nan, "infinite": s.infinite})
            ),
            _ => {
                let bad = if s.is_bad() { "  NOT FINITE" } else { "" };
                println!(
                    "{:<46} {:<18} {:>10.5} {:>10.5} {:>10.4} {:>10.4}{bad}",
                    kept.name,
                    s.shape_text(),
                    s.mean,
                    s.std,
                    s.min,
                    s.max
                );
            }
        }
    }
    ok
}

/// Prints how values compare, element by element; returns whether all agree.
///
/// # Errors
/// A file with nothing to compare.
pub fn print_rows(rows: &[Row], file: &str, json_output: bool) -> Result<bool> {
    if rows.is_empty() {
        bail!("`{file}` has no recorded value of this run");
    }
    let first = rows.iter().position(|row| !row.ok);
    if json_output {
        let row = |r: &Row| {
            let d = &r.distance;
            json!({"tensor": r.name, "values": r.count, "relative_l2": d.relative_l2.is_finite().then_some(d.relative_l2),
                "max_abs": d.max_abs.is_finite().then_some(d.max_abs), "mean_abs": d.mean_abs,
                "relative_mean": d.relative_mean.is_finite().then_some(d.relative_mean), "mse": d.mse, "cosine": d.cosine,
                "pearson": d.pearson, "ok": r.ok, "first_differing": r.worst.map(|w| w.0)})
        };
        let cause = first.map(|i| likely_causes(&hint(&rows[i].name)));
        let all: Vec<_> = rows.iter().map(row).collect();
        println!(
            "{}",
            json!({"agrees": first.is_none(), "first": first.map(|i| row(&rows[i])), "likely_cause": cause, "tensors": all})
        );
        return Ok(first.is_none());
    }
    println!(
        "{:<40} {:>11} {:>10} {:>10} {:>10} {:>9} {:>9} {:>10}  first differing",
        "compared", "relative L2", "max", "mean", "rel. mean", "pearson", "cosine", "MSE"
    );
    for r in rows {
        let d = &r.distance;
        let place = match (r.ok, r.worst) {
            (false, Some((index, ours, theirs))) => format!("  [{index}] {ours} and {theirs}"),
            (false, None) => "  all a little".into(),
            (true, _) => String::new(),
        };
        println!(
            "{:<40} {:>11.2e} {:>10.2e} {:>10.2e} {:>10.2e} {:>9.6} {:>9.6} {:>10.2e}{place}",
            r.name, d.relative_l2, d.max_abs, d.mean_abs, d.relative_mean, d.pearson, d.cosine, d.mse
        );
    }
    match first {
        None => println!("all {} values agree", rows.len()),
        Some(i) => {
            println!("\nfirst divergence: {}", rows[i].name);
            if let Some(before) = i.checked_sub(1).map(|i| &rows[i]) {
                println!("last agreement:   {}", before.name);
            }
            println!("likely:           {}", likely_causes(&hint(&rows[i].name)));
        }
    }
    Ok(first.is_none())
}

/// A step of a pipeline, with the text and the state that it has there.
fn run_in_pipeline(args: &StepArgs, json_output: bool) -> Result<bool> {
    let open = args.run.open(DebugMode::Exact)?;
    let captured = Rc::new(RefCell::new(Captured::default()));
    let stage = open.plan.pipeline.stages.first().map(|s| s.name.clone()).unwrap_or_default();
    let tap = StepTap { plan: open.plan.clone(), stage, at: args.at, runs: 0, captured: captured.clone() };
    let (tensors, result) = open.run(BTreeMap::new(), Some(Box::new(tap)))?;
    let captured = captured.take();
    if !captured.is_done {
        result?;
        bail!("the pipeline has no step {}; the first is step 0", args.at);
    }
    let mut ok = print_values(args, &captured.ran, json_output);
    if args.velocity {
        for facts in pipeline_facts(&tensors, &captured, args.at) {
            ok &= print_velocity(&facts, json_output);
        }
    }
    Ok(ok)
}

/// What the driver made of the velocities of a step.
fn pipeline_facts(tensors: &Tensors, captured: &Captured, at: usize) -> Vec<StepFacts> {
    let stage = &captured.stage;
    let velocities = Stream::BOTH.into_iter().filter_map(|stream| {
        let kept = captured.ran.results.get(&format!("{}.velocity", stream.name()))?;
        Some((format!("{stage}.{at}.{}", stream.name()), kept.values.clone()))
    });
    let facts = step_facts(&tensors.tensors, &velocities.collect());
    facts.into_iter().filter(|f| f.at.0 == *stage && f.at.1 == at).collect()
}

/// What was seen of a step.
#[derive(Default)]
struct Captured {
    stage: String,
    ran: Ran,
    is_done: bool,
}

/// Keeps the values of one call of the step program, and ends the run at the next program.
struct StepTap {
    plan: Plan,
    /// The first stage.
    stage: String,
    at: usize,
    runs: usize,
    captured: Rc<RefCell<Captured>>,
}

impl StepTap {
    fn is_step(&self, program: &Program) -> bool {
        let stage = program.name.split('.').next().unwrap_or_default();
        component(&self.plan, program) == "transformer" && program.rate == ltxc_ir::Rate::Step && stage == self.stage
    }
}

impl Tap for StepTap {
    fn wants(&mut self, program: &Program, value: &Value) -> bool {
        // Any input of another program tells that the step is over.
        value.role == Role::Input || (self.is_step(program) && value.is_named())
    }

    fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
        let mut captured = self.captured.borrow_mut();
        if captured.is_done {
            return Err(RunError::Interrupted);
        }
        if !self.is_step(program) || self.runs != self.at || value.role == Role::Input {
            return Ok(());
        }
        let kept = Kept { name: value.name.clone(), ty: value.ty.clone(), values: decoded(&value.ty, bytes) };
        match value.role {
            Role::Output => drop(captured.ran.results.insert(value.name.clone(), kept)),
            _ => captured.ran.values.push(kept),
        }
        Ok(())
    }

    fn end(&mut self, program: &Program) -> Result<(), RunError> {
        if self.is_step(program) {
            let mut captured = self.captured.borrow_mut();
            captured.is_done |= self.runs == self.at;
            captured.stage.clone_from(&self.stage);
            self.runs += 1;
        }
        Ok(())
    }
}
