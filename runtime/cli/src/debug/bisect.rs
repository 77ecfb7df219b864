//! `ltxc debug bisect`: the first op whose value differs between two settings of the same run.
//!
//! Both settings run the whole pipeline with the same noise. Of every named value that exists in both, a sketch is kept: a few
//! thousand of its values, evenly spread. The first one that is further apart than rounding explains is where to look.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_ir::DType;
use ltxc_ir::plan::{Plan, Program};
use ltxc_models::lora::LoraTargets;
use ltxc_runtime::RunError;
use ltxc_runtime::adapters::AdapterMode;
use ltxc_runtime::pipeline::{Media, Noise};
use ltxc_runtime::stats::decoded;
use ltxc_runtime::tap::{Role, Tap, Value};
use serde_json::json;

use super::compare::likely_causes;
use super::flags::{DebugFlags, DebugMode};
use super::names::{component, components, full_name};
use super::options::DebugOptions;
use super::pipeline::{Pipeline, check_prompt_is_all, plan_for};
use super::recording::Distance;
use super::reference::run_against;
use super::session::{About, Session};
use super::smoke::{SmokePreset, tiny};
use crate::adapters::{Loras, Opened};
use crate::args::{AdapterArgs, CompilerArgs, FuseLevel, ModelArgs, PipelineName, Precision, ShapeArgs};
use crate::compile::{options, unfused};
use crate::job::{Shape, pick};
use crate::model_files::ModelFiles;
use crate::pipelines::definition;

/// Folder of a reference that is run, if no other is named.
const FOLDER: &str = "bisect";

/// Most values of a sketch.
const SKETCH: usize = 2048;

/// Relative L2 that rounding explains in f32. Errors grow along a run by less than the steps before the end amplify them.
const TOLERANCE_F32: f64 = 1e-3;

/// The same where one side computes in 16 bits.
const TOLERANCE_16: f64 = 0.1;

/// `ltxc debug bisect`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "A setting is a list of: fuse=none|composite|full|exact, device=NAME, dtype=f32|bf16|f16, disable=PASS,\n\
    checkpoint=FILE, gemma=DIR, upsampler=FILE.\n\
    Logs of the settings are two files: `sums.log` becomes `sums.a.log` and `sums.b.log`. With --ref all logs there are\n\
    lie in its folder.\n\n\
    Examples:\n  ltxc debug bisect two-stage --preset tiny\n  ltxc debug bisect --checkpoint-path x.safetensors --gemma-root gemma --pipeline distilled-one-stage \\\n    \
    -H 64 -W 96 --num-frames 9 --a fuse=none --b fuse=full,device=vulkan:0\n  \
    ltxc debug bisect --checkpoint-path x.safetensors --gemma-root gemma --ref logs --ref-cmd 'python reference.py {noise}'"
)]
pub struct BisectArgs {
    /// Pipeline, as for --pipeline.
    #[arg(value_enum, conflicts_with = "pipeline")]
    pub name: Option<PipelineName>,
    /// A small synthetic model instead of model files, and a small size.
    #[arg(long, value_enum, conflicts_with = "checkpoint_path")]
    pub preset: Option<SmokePreset>,
    /// One setting, what differs from the flags; the one to trust.
    #[arg(long, value_name = "SETTING", default_value = "fuse=exact")]
    pub a: String,
    /// The other setting.
    #[arg(long, value_name = "SETTING", default_value = "fuse=full")]
    pub b: String,
    /// Prompt.
    #[arg(long, short, default_value = "a red fox in deep snow")]
    pub prompt: String,
    /// Seed of all noise.
    #[arg(long, default_value_t = 10)]
    pub seed: u64,
    /// Relative L2 above which values differ [default: 1e-3, with bf16 or f16 0.1]
    #[arg(long, value_name = "LIMIT")]
    pub tolerance: Option<f64>,
    /// Compare with a reference instead, whose logs are in this folder, or are written there. [with --ref-cmd: bisect]
    #[arg(long = "ref", value_name = "DIR", conflicts_with_all = ["a", "b"])]
    pub reference: Option<PathBuf>,
    /// Command that runs the reference; it finds in its environment what to log (FASTVIDEO_DEBUG_…). {dir} stands for the
    /// folder, {noise} for flags that name files of noise, {dump} for flags that ask for values.
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["a", "b"])]
    pub ref_cmd: Option<String>,
    /// Model of the reference, to compare weights.
    #[arg(long, value_name = "FILE", requires = "reference")]
    pub ref_checkpoint: Option<PathBuf>,
    /// Distilled LoRA, for pipelines that need it.
    #[arg(long, value_name = "FILE")]
    pub distilled_lora: Option<PathBuf>,
    /// Relative tolerance of sums.
    #[arg(long, default_value_t = 5e-3, requires = "reference")]
    pub tol_rel: f64,
    /// Absolute tolerance of sums.
    #[arg(long, default_value_t = 1e-3, requires = "reference")]
    pub tol_abs: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub debug: DebugFlags,
}

/// A sketch of one value.
#[derive(Clone, Debug)]
struct Sketch {
    /// `<component>.<path>`
    name: String,
    /// Program and how often it has run before.
    program: String,
    run: usize,
    /// Which value of that name it is in the run.
    occurrence: usize,
    elements: usize,
    values: Vec<f32>,
    reads: Vec<String>,
}

/// A value that both settings have.
#[derive(Clone, Debug)]
struct Matched {
    name: String,
    program: String,
    run: usize,
    distance: Distance,
    reads: Vec<String>,
}

/// `ltxc debug bisect`. Returns whether the settings agree.
///
/// # Errors
/// A setting that is none, or a run that fails.
pub fn run(args: &BisectArgs, json_output: bool) -> Result<bool> {
    let default = args.ref_cmd.is_some().then(|| PathBuf::from(FOLDER));
    let folder = args.reference.clone().or(default);
    let temporary = tempfile::tempdir().context("temporary folder")?;
    // A reference that is run by hand has to find the model later.
    let made = folder.as_ref().map_or(temporary.path().to_path_buf(), |folder| folder.join("model"));
    let args = &prepared(args, &made)?;
    if let Some(folder) = &folder {
        if args.debug != DebugFlags::default() {
            bail!("the logs of a comparison with a reference are in `{}`; leave their flags out", folder.display());
        }
        return run_against(args, folder, json_output);
    }
    let a = sketches(args, &args.a, "a").context("setting a")?;
    let b = sketches(args, &args.b, "b").context("setting b")?;
    let is_narrow = [a.dtype, b.dtype].iter().any(|dtype| *dtype != DType::F32);
    let tolerance = args.tolerance.unwrap_or(if is_narrow { TOLERANCE_16 } else { TOLERANCE_F32 });
    let matched = matched(&a.sketches, &b.sketches);
    if matched.is_empty() {
        bail!("the two settings have no named value in common");
    }
    let first = matched.iter().position(|m| m.distance.relative_l2 > tolerance);
    if json_output {
        let row = |m: &Matched| {
            json!({"value": m.name, "program": m.program, "run": m.run, "relative_l2": format!("{:e}", m.distance.relative_l2),
                "max_abs": format!("{:e}", m.distance.max_abs), "cosine": m.distance.cosine, "reads": m.reads})
        };
        let worst = matched.iter().max_by(|x, y| x.distance.relative_l2.total_cmp(&y.distance.relative_l2));
        println!(
            "{}",
            json!({"agrees": first.is_none(), "values": matched.len(), "tolerance": tolerance,
            "first": first.map(|i| row(&matched[i])), "last_agreement": first.and_then(|i| i.checked_sub(1)).map(|i| row(&matched[i])),
            "worst": worst.map(row)})
        );
    } else {
        print!("{}", text(&matched, first, tolerance, &b.plan));
    }
    Ok(first.is_none())
}

/// The arguments with the pipeline that was named, and with the model and size of the preset; it is made in `folder`.
fn prepared(args: &BisectArgs, folder: &Path) -> Result<BisectArgs> {
    let mut args = args.clone();
    args.shape.pipeline = args.name.or(args.shape.pipeline);
    check_prompt_is_all(args.shape.pipeline.unwrap_or_default())?;
    if args.preset.is_none() {
        return Ok(args);
    }
    std::fs::create_dir_all(folder).with_context(|| format!("`{}`", folder.display()))?;
    let (model, lora) = tiny(folder, args.seed)?;
    args.model = model;
    let definition = definition(args.shape.pipeline.unwrap_or_default());
    if definition.needs_distilled_adapter() {
        args.distilled_lora.get_or_insert(lora);
    }
    let shape = &mut args.shape;
    let size = if definition.has_two_stages { 128 } else { 64 };
    if shape.size.is_none() {
        shape.height.get_or_insert(size);
        shape.width.get_or_insert(size);
    }
    if shape.seconds.is_none() {
        shape.num_frames.get_or_insert(9);
    }
    Ok(args)
}

/// A file of one of both sides.
fn of_side(path: &Path, side: &str) -> PathBuf {
    let word = |part: Option<&OsStr>| part.map(|part| part.to_string_lossy().into_owned()).unwrap_or_default();
    let end = path.extension().map(|end| format!(".{}", end.to_string_lossy())).unwrap_or_default();
    path.with_file_name(format!("{}.{side}{end}", word(path.file_stem())))
}

struct Side {
    plan: Plan,
    dtype: DType,
    sketches: Vec<Sketch>,
}

/// Runs a setting and sketches every named value.
fn sketches(args: &BisectArgs, setting: &str, side: &str) -> Result<Side> {
    let (mut model, mut shape) = (args.model.clone(), args.shape.clone());
    let (mut compiler, mut exact) = (CompilerArgs::default(), false);
    for part in setting.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (name, value) = part.split_once('=').with_context(|| format!("`{part}` is not `name=value`"))?;
        match (name, value) {
            ("fuse", "none") => compiler.fuse = Some(FuseLevel::None),
            ("fuse", "composite") => compiler.fuse = Some(FuseLevel::Composite),
            ("fuse", "full") => compiler.fuse = Some(FuseLevel::Full),
            ("fuse", "exact") => exact = true,
            ("dtype", "f32") => shape.dtype = Some(Precision::F32),
            ("dtype", "bf16") => shape.dtype = Some(Precision::Bf16),
            ("dtype", "f16") => shape.dtype = Some(Precision::F16),
            ("device", device) => shape.device = device.parse().map_err(anyhow::Error::msg)?,
            ("disable", pass) => compiler.disable.push(pass.into()),
            ("checkpoint", path) => model.checkpoint_path = Some(PathBuf::from(path)),
            ("gemma", path) => model.gemma_root = Some(PathBuf::from(path)),
            ("upsampler", path) => model.spatial_upsampler_path = Some(PathBuf::from(path)),
            _ => bail!("`{part}` is no part of a setting; see `ltxc help debug bisect`"),
        }
    }
    let mut logs = DebugOptions::of(&args.debug)?.with_files(&|path| of_side(path, side));
    if logs.mode.replace(if exact { DebugMode::Exact } else { DebugMode::Fused }).is_some() {
        bail!("`--debug-mode` is a part of the settings here: `--a fuse=exact`, `--b fuse=full`");
    }
    let device = pick(&shape.device, None)?;
    let adapters = AdapterArgs {
        distilled_lora: args.distilled_lora.iter().map(|path| path.display().to_string()).collect(),
        ..AdapterArgs::default()
    };
    let loras = Loras::open(&adapters, &[])?;
    shape.dtype.get_or_insert(Precision::F32);
    let shape = Shape::resolve(&shape, 0)?.with(&loras)?;
    loras.check_complete(definition(shape.pipeline))?;
    let files = ModelFiles::open(&model, shape.has_two_stages())?;
    let options = if exact { unfused() } else { options(&compiler) };
    let plan = plan_for(&files, &shape, &device, options)?;
    let fits = loras.fit(&LoraTargets::of(&files.model), &plan.pipeline.name)?;
    let (adapters, _) = loras.stages(fits, &plan.pipeline, AdapterMode::Merged, &mut Opened::new())?;
    let about = About {
        device: device.name.to_string(),
        seed: Some(args.seed),
        run: Some(setting.to_string()),
        spares_decoders: logs.spares_decoders,
        ..About::default()
    };
    let spares_decoders = logs.spares_decoders;
    let session = Session::new(logs.only(&components(&plan))?, about);
    let kept = Rc::new(RefCell::new(Vec::new()));
    let tap = Sketcher { plan: &plan, kept: kept.clone(), runs: BTreeMap::new(), seen: BTreeMap::new() };
    let pipeline = Pipeline {
        plan: &plan,
        paths: files.paths(),
        device: &device,
        session: &session,
        prompt: &args.prompt,
        negative_prompt: "",
        images: &[],
        media: Media::default(),
        stages: BTreeMap::new(),
        adapters,
        noise: Noise { seed: args.seed, spares_decoders, ..Noise::default() },
    };
    pipeline.run(Some(Box::new(tap)))?;
    session.close()?;
    let sketches = kept.take();
    Ok(Side { dtype: shape.dtype, plan, sketches })
}

struct Sketcher<'p> {
    plan: &'p Plan,
    kept: Rc<RefCell<Vec<Sketch>>>,
    /// How often each program has run.
    runs: BTreeMap<String, usize>,
    /// How often each name has been seen in this run of the program.
    seen: BTreeMap<String, usize>,
}

impl Tap for Sketcher<'_> {
    fn wants(&mut self, _: &Program, value: &Value) -> bool {
        value.role != Role::Input && value.is_named()
    }

    fn begin(&mut self, _: &Program) {
        self.seen.clear();
    }

    fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
        let all = decoded(&value.ty, bytes);
        let step = all.len().div_ceil(SKETCH).max(1);
        let component = component(self.plan, program);
        let occurrence = self.seen.entry(value.name.clone()).or_default();
        self.kept.borrow_mut().push(Sketch {
            name: full_name(component, &value.name),
            program: program.name.clone(),
            run: self.runs.get(&program.name).copied().unwrap_or(0),
            occurrence: *occurrence,
            elements: all.len(),
            values: all.into_iter().step_by(step).collect(),
            reads: value.reads.clone(),
        });
        *occurrence += 1;
        Ok(())
    }

    fn end(&mut self, program: &Program) -> Result<(), RunError> {
        *self.runs.entry(program.name.clone()).or_default() += 1;
        Ok(())
    }
}

/// Values that both have, in the order of the second.
fn matched(a: &[Sketch], b: &[Sketch]) -> Vec<Matched> {
    let key = |s: &Sketch| (s.program.clone(), s.run, s.name.clone(), s.occurrence);
    let known: BTreeMap<_, &Sketch> = a.iter().map(|s| (key(s), s)).collect();
    let pairs = b.iter().filter_map(|s| Some((s, *known.get(&key(s))?)));
    let pairs = pairs.filter(|(x, y)| x.elements == y.elements);
    pairs
        .map(|(ours, trusted)| Matched {
            name: ours.name.clone(),
            program: ours.program.clone(),
            run: ours.run,
            distance: Distance::of(&ours.values, &trusted.values),
            reads: ours.reads.clone(),
        })
        .collect()
}

fn text(matched: &[Matched], first: Option<usize>, tolerance: f64, plan: &Plan) -> String {
    let worst = matched.iter().map(|m| m.distance.relative_l2).fold(0.0, f64::max);
    let mut out =
        format!("{} values in common, worst relative L2 {worst:.2e} (tolerance {tolerance:.0e})\n", matched.len());
    let Some(at) = first else { return out + "the settings agree\n" };
    out += &format!("{:<52} {:<22} {:>4} {:>11} {:>10}\n", "value", "program", "run", "relative L2", "cosine");
    for (i, m) in matched.iter().enumerate().take(at + 6).skip(at.saturating_sub(5)) {
        out += &format!(
            "{:<52} {:<22} {:>4} {:>11.2e} {:>10.6}{}\n",
            m.name,
            m.program,
            m.run,
            m.distance.relative_l2,
            m.distance.cosine,
            if i == at { "  < first" } else { "" }
        );
    }
    let m = &matched[at];
    out += &format!("\nfirst bad op: {} in program {} (run {})\n", m.name, m.program, m.run);
    out += &format!("reads: {}\nlikely: {}\n", m.reads.join(", "), likely_causes(&cause_key(&m.name)));
    out += "in the plan of the second setting:\n";
    for line in neighbourhood(plan, &m.program, &m.name) {
        out += &format!("  {line}\n");
    }
    out
}

/// A name as logs have it: `transformer.blocks.3.attn1.to_q` is something of `3:attn1`.
fn cause_key(name: &str) -> String {
    match name.strip_prefix("transformer.blocks.").and_then(|rest| rest.split_once('.')) {
        Some((block, rest)) => format!("block={block}:{rest}"),
        None => name.replace("rope_", "pe_"),
    }
}

/// Lines of the plan's text around the step that computes a value.
fn neighbourhood(plan: &Plan, program: &str, full: &str) -> Vec<String> {
    const AROUND: usize = 4;
    let text = plan.to_string();
    let lines: Vec<&str> = text.lines().collect();
    let body = plan.program(program).and_then(|p| plan.functions.get(p.function as usize));
    let stem = body.map_or("", |f| f.name.split('/').next().unwrap_or_default());
    // The longest end of the path that a step of the program's functions has for a name.
    let ends: Vec<&str> = std::iter::once(full).chain(full.match_indices('.').map(|(i, _)| &full[i + 1..])).collect();
    for end in ends {
        let is_named =
            |line: &str| line.trim_end().rsplit('"').nth(1).is_some_and(|names| names.split('|').any(|n| n == end));
        let mut function = "";
        for (i, line) in lines.iter().enumerate() {
            if let Some(rest) = line.strip_prefix("fn @") {
                function = rest.split([' ', '/']).next().unwrap_or_default();
            }
            let is_inside = function == stem || stem.is_empty();
            if is_inside && is_named(line) {
                return lines[i.saturating_sub(AROUND)..(i + AROUND + 1).min(lines.len())]
                    .iter()
                    .map(|l| l.chars().take(200).collect())
                    .collect();
            }
        }
    }
    Vec::new()
}
