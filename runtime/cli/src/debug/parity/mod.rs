//! `ltxc debug parity`: components and whole runs against recorded tensors of a reference.
//!
//! Every component is compiled without fusion, so that all of its named values can be compared, and run with the recorded
//! inputs; whole runs are compiled as usual and start from the recorded noise. Components are checked in the order in which
//! they run, values in the order in which they are computed, so that the first bad one is where to look.
//!
//! What a folder of recordings looks like stands in `tests/tools/record_reference.py`, which makes one from the published
//! Python packages for any checkpoint.

mod audio;
pub mod runs;
pub(crate) mod text;
pub mod transformer;
mod video;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::{TensorType, plan::WeightSource};
use ltxc_models::Weights;
use ltxc_models::checkpoint::{Checkpoint, Generation};
use ltxc_runtime::backend::Device;
use serde_json::{Value, json};

use super::modules::{Bench, Kept, Side};
use super::names;
use super::recording::{Distance, Form, References, TensorFile, thinned};
use super::session::Session;
use crate::args::{ModelArgs, ReferenceVersion};
use crate::compile::unfused;
use crate::model_files::{GEMMA, MODEL, ModelFiles, UPSAMPLER};

/// Relative L2 that two implementations in f32 may differ by, for components.
const LIMIT: f64 = 1e-5;

/// The same for whole runs.
const RUN_LIMIT: f64 = 1e-3;

/// `ltxc debug parity`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc debug parity --reference recordings/ --checkpoint-path ltx-2-19b-distilled.safetensors \\\n    \
    --gemma-root gemma-3-12b --drill"
)]
pub struct ParityArgs {
    /// Folder of recordings, made by tests/tools/record_reference.py; repeatable, earlier ones win.
    #[arg(long, value_name = "DIR", required = true)]
    pub reference: Vec<PathBuf>,
    /// Only these: text, transformer, video_vae, upsampler, audio_vae, vocoder, runs; repeatable.
    #[arg(long, value_name = "COMPONENT")]
    pub only: Vec<String>,
    /// Relative L2 limit of components, instead of 1e-5.
    #[arg(long, value_name = "LIMIT")]
    pub limit: Option<f64>,
    /// Release of the reference that recordings are of [default: 1.2.0, or 1.0.0 of a folder with `expected` alone]
    #[arg(long, value_enum, value_name = "VERSION")]
    pub reference_version: Option<ReferenceVersion>,
    /// Go from the first bad block down to the first bad value.
    #[arg(long)]
    pub drill: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// One compared tensor.
#[derive(Clone, Debug)]
pub struct Row {
    /// Component.
    pub component: &'static str,
    /// Name of the recorded tensor.
    pub name: String,
    /// Number of values compared.
    pub count: usize,
    /// How far apart.
    pub distance: Distance,
    /// Largest relative L2 that is all right.
    pub limit: f64,
    /// Whether it is.
    pub ok: bool,
    /// The first value that is clearly different: index in what was compared, ours, theirs.
    pub worst: Option<(usize, f32, f32)>,
}

/// A recorded file under comparison.
pub(crate) struct Check<'a> {
    component: &'static str,
    file: TensorFile,
    meta: Value,
    limit: f64,
    /// What stands in front of names in `rows`.
    prefix: String,
    rows: &'a mut Vec<Row>,
}

impl<'a> Check<'a> {
    /// Compares with tensors of `file`; `rows` gets what is found.
    pub(crate) fn new(component: &'static str, file: TensorFile, limit: f64, rows: &'a mut Vec<Row>) -> Check<'a> {
        let meta = file.meta();
        Check { component, file, meta, limit, prefix: String::new(), rows }
    }

    fn has(&self, name: &str) -> bool {
        self.file.find(name).is_some() || self.file.find(&format!("{name}.sample")).is_some()
    }

    fn input(&self, name: &str) -> Result<&Tensor> {
        self.file.find(name).with_context(|| format!("`{}` has no `{name}`", self.file.path.display()))
    }

    /// Compares with what was recorded as `name`, if anything was.
    pub(crate) fn check(&mut self, name: &str, found: &[f32]) {
        self.check_within(name, found, self.limit);
    }

    fn check_within(&mut self, name: &str, found: &[f32], limit: f64) {
        let Some(form) = Form::of(&self.file, &self.meta, name, found.len()) else { return };
        let picked = thinned(found, form.step);
        let distance = Distance::of(&picked, &form.values);
        // Statistics cover values that were not recorded.
        let is_whole = form.elements().is_none_or(|n| n == found.len());
        let statistics = form.statistics_errors(found).into_iter().all(|e| e <= limit);
        let ok = distance.relative_l2 <= limit && is_whole && statistics;
        let scale = form.values.iter().map(|v| v.abs()).fold(0.0, f32::max).max(1e-30);
        let differs = |(_, (a, b)): &(usize, (&f32, &f32))| {
            let difference = (*a - *b).abs();
            difference.is_nan() || difference > 10.0 * limit as f32 * scale
        };
        let worst =
            picked.iter().zip(&form.values).enumerate().find(differs).map(|(i, (a, b))| (i * form.step, *a, *b));
        let name = format!("{}{name}", self.prefix);
        let row = Row { component: self.component, name, count: picked.len(), distance, limit, ok, worst };
        self.rows.push(row);
    }

    /// Compares a video or sound, channels last, with what was recorded channels first.
    fn check_channels(&mut self, name: &str, found: &Kept) {
        let sampled = self.meta["sampled"][name]["shape"].as_array().map(Vec::len);
        let rank = self.file.find(name).map(|t| t.ty.rank()).or(sampled).unwrap_or(0);
        let values = match (rank, &found.ty.shape[..]) {
            // Frames one by one.
            (4, &[_, f, _, _, c]) => frames_first(&found.values, f, c),
            _ => channels_first(&found.values, found.ty.shape.last().copied().unwrap_or(1)),
        };
        self.check(name, &values);
    }
}

/// `[.., c]` to `[c, ..]`.
pub(crate) fn channels_first(values: &[f32], channels: usize) -> Vec<f32> {
    (0..channels).flat_map(|c| values.iter().skip(c).step_by(channels.max(1)).copied()).collect()
}

/// `[f, .., c]` to `[f, c, ..]`.
fn frames_first(values: &[f32], frames: usize, channels: usize) -> Vec<f32> {
    values.chunks(values.len() / frames.max(1)).flat_map(|frame| channels_first(frame, channels)).collect()
}

/// A recorded (1, c, ..) as f32 `[1, .., c]`; bytes become `v / 127.5 − 1`.
fn channels_last(x: &Tensor) -> Result<Tensor> {
    let [1, c, ref rest @ ..] = x.ty.shape[..] else { bail!("a recorded tensor is {}, expected one sample", x.ty) };
    let values: Vec<f32> = match &x.data {
        Data::Float(v) => v.iter().map(|&v| v as f32).collect(),
        Data::Int(v) => v.iter().map(|&v| v as f32 / 127.5 - 1.0).collect(),
    };
    let places: usize = rest.iter().product();
    let moved: Vec<f32> = (0..places).flat_map(|p| (0..c).map(move |k| k * places + p)).map(|i| values[i]).collect();
    let shape: Vec<usize> = [&[1], rest, &[c]].concat();
    Ok(Tensor::f32(&shape, &moved))
}

/// What all components share.
struct Setup<'a> {
    files: ModelFiles,
    references: &'a References,
    release: ReferenceVersion,
    family: &'static str,
    device: &'a Device,
    session: &'a Session,
    sources: Vec<WeightSource>,
    limit: f64,
}

impl Setup<'_> {
    /// A recording of this model, if there is one.
    fn open<'r>(&self, component: &'static str, name: &str, rows: &'r mut Vec<Row>) -> Result<Option<Check<'r>>> {
        let Some(path) = self.references.find(self.family, name) else { return Ok(None) };
        Ok(Some(Check::new(component, TensorFile::open(&path)?, self.limit, rows)))
    }

    fn bench(&self) -> Bench<'_> {
        let (sources, paths) = (self.sources.clone(), self.files.paths());
        Bench { sources, paths, options: unfused(), device: self.device, session: self.session }
    }

    fn weights(&self) -> Weights<'_> {
        Weights::new(MODEL, &self.files.model)
    }
}

type Component = (&'static str, fn(&Setup<'_>, &mut Vec<Row>) -> Result<()>);

/// Components in the order in which a run needs them.
const COMPONENTS: [Component; 7] = [
    ("text", text::check),
    ("transformer", transformer::check),
    ("upsampler", video::check_upsampler),
    ("video_vae", video::check_vae),
    ("audio_vae", audio::check_vae),
    ("vocoder", audio::check_vocoder),
    ("runs", runs::check),
];

/// `ltxc debug parity`. Returns whether everything that was recorded agrees.
///
/// # Errors
/// Files that cannot be read, or nothing that was recorded of this model.
pub fn run(args: &ParityArgs, json: bool) -> Result<bool> {
    let references = References::new(&args.reference)?;
    if let Some(unknown) = args.only.iter().find(|o| !COMPONENTS.iter().any(|(name, _)| name == o)) {
        let known: Vec<&str> = COMPONENTS.iter().map(|(name, _)| *name).collect();
        bail!("`--only {unknown}` is no component, expected {}", known.join(", "));
    }
    let models = match &args.side.model.checkpoint_path {
        Some(_) => vec![args.side.model.clone()],
        None => models_below(&args.reference),
    };
    if models.is_empty() {
        bail!("there is no model to compare; name it from `--checkpoint-path` on");
    }
    let components = logged(&args.only);
    args.side
        .look(&components, None, |device, session| compare_all(args, &models, &references, (device, session), json))
}

/// The components of logs that the components of a comparison have.
fn logged(only: &[String]) -> Vec<&'static str> {
    let all = |name: &&str| only.is_empty() || only.iter().any(|o| o == name);
    let of = |name: &'static str| match name {
        "text" => vec!["text_encoder", "connectors"],
        "video_vae" => vec!["vae"],
        "runs" => names::COMPONENTS.to_vec(),
        name => vec![name],
    };
    COMPONENTS.iter().map(|(name, _)| *name).filter(all).flat_map(of).collect()
}

fn compare_all(
    args: &ParityArgs,
    models: &[ModelArgs],
    references: &References,
    (device, session): (&Device, &Session),
    json: bool,
) -> Result<bool> {
    if args.reference_version.is_none() && references.release() == ReferenceVersion::V1_0_0 {
        eprintln!(
            "note: there are no recordings of release 1.2.0; these are compared with what `--reference-version 1.0.0` gives"
        );
    }
    let mut all_ok = true;
    for model in models {
        let rows = compare_model(args, model, references, (device, session))?;
        if rows.is_empty() {
            bail!(
                "nothing was recorded of `{}` below `{}`",
                model.checkpoint_path.as_deref().unwrap_or(Path::new("")).display(),
                args.reference[0].display()
            );
        }
        all_ok &= rows.iter().all(|r| r.ok);
        let name = model.checkpoint_path.as_deref().unwrap_or(Path::new("")).display().to_string();
        if json { println!("{}", facts(&name, &rows)) } else { print!("{}", table(&name, &rows, args.drill)) }
    }
    Ok(all_ok)
}

fn compare_model(
    args: &ParityArgs,
    model: &ModelArgs,
    references: &References,
    (device, session): (&Device, &Session),
) -> Result<Vec<Row>> {
    let files = ModelFiles::open(model, model.spatial_upsampler_path.is_some())?;
    let family = match files.model.generation() {
        Generation::Ltx2 => "ltx2",
        Generation::Ltx23 => "ltx23",
        other => bail!("`{}` is {}, of which no recordings can be compared yet", files.model.name(), other.name()),
    };
    let sources = files.sources()?;
    let limit = args.limit.unwrap_or(LIMIT);
    let release = args.reference_version.unwrap_or(references.release());
    let setup = Setup { files, references, release, family, device, session, sources, limit };
    let mut rows = Vec::new();
    for (name, check) in
        COMPONENTS.iter().filter(|(name, _)| args.only.is_empty() || args.only.iter().any(|o| o == name))
    {
        check(&setup, &mut rows).with_context(|| format!("component {name}"))?;
    }
    Ok(rows)
}

/// The models that lie beside recordings in the layout of the fixtures: `tiny-<family>` and `tiny-gemma3`.
fn models_below(roots: &[PathBuf]) -> Vec<ModelArgs> {
    let mut models = Vec::new();
    for root in roots {
        let gemma = root.join("tiny-gemma3");
        for family in ["ltx2", "ltx23"] {
            let entries = std::fs::read_dir(root.join(format!("tiny-{family}"))).into_iter().flatten().flatten();
            let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
            paths.sort_by_key(|p| (std::fs::metadata(p).map(|m| m.len()).unwrap_or(0), p.clone()));
            let is_complete = |path: &&PathBuf| {
                Checkpoint::open(path).is_ok_and(|c| {
                    ["transformer", "vae", "audio_vae", "vocoder"].iter().all(|s| c.section(s).is_ok())
                        && c.tensors().any(|(key, _)| key.starts_with("vocoder."))
                })
            };
            let is_spatial = |path: &&PathBuf| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                name.contains("spatial-upscaler-x2") && !name.contains("dims2")
            };
            if let Some(checkpoint) = paths.iter().find(is_complete) {
                models.push(ModelArgs {
                    checkpoint_path: Some(checkpoint.clone()),
                    gemma_root: Some(gemma.clone()),
                    spatial_upsampler_path: paths.iter().find(is_spatial).cloned(),
                    ..ModelArgs::default()
                });
            }
        }
    }
    models
}

/// What the first bad tensor belongs to: `uniform.block1` of `uniform.block1.video`.
fn block_of(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((block, "video" | "audio" | "latent" | "denoised" | "output" | "stats")) => block,
        _ => name,
    }
}

fn facts(model: &str, rows: &[Row]) -> Value {
    let row = |r: &Row| {
        json!({"component": r.component, "tensor": r.name, "values": r.count, "relative_l2": finite(r.distance.relative_l2),
            "max_abs": finite(r.distance.max_abs), "cosine": r.distance.cosine, "limit": r.limit, "ok": r.ok})
    };
    let components: Vec<Value> = by_component(rows)
        .map(|(component, rows)| {
            let bad = rows.iter().find(|r| !r.ok);
            json!({
                "component": component, "tensors": rows.len(), "ok": bad.is_none(),
                "relative_l2": finite(worst(rows, |d| d.relative_l2)), "max_abs": finite(worst(rows, |d| d.max_abs)),
                "cosine": rows.iter().map(|r| r.distance.cosine).fold(1.0, f64::min),
                "first_bad": bad.map(|r| block_of(&r.name)),
            })
        })
        .collect();
    json!({"model": model, "components": components, "tensors": rows.iter().map(row).collect::<Vec<_>>()})
}

/// Infinity has no place in JSON.
fn finite(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { json!("inf") }
}

fn by_component(rows: &[Row]) -> impl Iterator<Item = (&'static str, &[Row])> {
    rows.chunk_by(|a, b| a.component == b.component).map(|rows| (rows[0].component, rows))
}

fn worst(rows: &[Row], of: fn(&Distance) -> f64) -> f64 {
    rows.iter().map(|r| of(&r.distance)).fold(0.0, f64::max)
}

fn table(model: &str, rows: &[Row], drill: bool) -> String {
    let mut out = format!(
        "{model}\n{:<12} {:>8} {:>12} {:>12} {:>10}  {:<8} first bad\n",
        "component", "tensors", "relative L2", "max error", "cosine", "verdict"
    );
    for (component, rows) in by_component(rows) {
        let bad = rows.iter().find(|r| !r.ok);
        out += &format!(
            "{component:<12} {:>8} {:>12.2e} {:>12.2e} {:>10.6}  {:<8} {}\n",
            rows.len(),
            worst(rows, |d| d.relative_l2),
            worst(rows, |d| d.max_abs),
            rows.iter().map(|r| r.distance.cosine).fold(1.0, f64::min),
            if bad.is_none() { "ok" } else { "BAD" },
            bad.map_or("-", |r| block_of(&r.name)),
        );
    }
    let Some(at) = rows.iter().position(|r| !r.ok).filter(|_| drill) else { return out };
    out += "\ndrill: around the first bad tensor\n";
    for row in &rows[at.saturating_sub(3)..(at + 6).min(rows.len())] {
        out += &format!(
            "  {} {:<36} {:.2e} (limit {:.0e}, cosine {:.6})\n",
            if row.ok { "ok " } else { "BAD" },
            row.name,
            row.distance.relative_l2,
            row.limit,
            row.distance.cosine
        );
    }
    let row = &rows[at];
    match row.worst {
        Some((index, ours, theirs)) => {
            out += &format!("first bad value: {}[{index}] (flattened): ours {ours}, theirs {theirs}\n", row.name);
        }
        None => out += &format!("no single value of {} stands out: all are a little off\n", row.name),
    }
    out += &format!("likely: {}\n", super::compare::likely_causes(&hint(&row.name)));
    out
}

/// The name of a recorded tensor as logs would have it, for what usually is behind it.
pub(crate) fn hint(name: &str) -> String {
    match name {
        // `uniform.blocks.3.attn1.to_q` is something of `3:attn1`.
        n if n.contains(".blocks.") => n.into(),
        n if n.contains("rope_cos") || n.contains("rope_sin") => "prep.pe_cos_sum".into(),
        n if n.contains("timestep") => "prep.t_sum".into(),
        n if n.contains(".block") => format!("block={}", n.rsplit('.').next().unwrap_or_default()),
        n if n.contains("noised") || n.contains("noise") => "latent_sum".into(),
        n if n.contains("positions") => "positions_sum".into(),
        n if n.contains("hidden.0") => "gemma_hidden_state_0".into(),
        n if n.contains("hidden.") => "gemma_hidden_state".into(),
        n if n.contains("features") => "gemma_feature".into(),
        n if n.contains("context") => "context_sum".into(),
        n => n.into(),
    }
}

/// A tensor from what was kept of a run.
fn tensor_of(kept: &Kept, shape: &[usize]) -> Result<Tensor> {
    let ty = TensorType::f32(shape);
    if ty.checked_bytes().is_none() || ty.elements() != kept.values.len() {
        bail!("`{}` has {} values, expected {ty}", kept.name, kept.values.len());
    }
    Ok(Tensor::f32(shape, &kept.values))
}
