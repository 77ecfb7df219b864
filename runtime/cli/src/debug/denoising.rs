//! Looking at denoising: the steps of a run, latents, positions, and the first value that is not finite.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_compiler::Options;
use ltxc_ir::plan::{Plan, Program, VideoSettings};
use ltxc_runtime::RunError;
use ltxc_runtime::noise_files;
use ltxc_runtime::pipeline::Noise;
use ltxc_runtime::pipeline::positions::{audio_positions, video_positions};
use ltxc_runtime::stats::{Stats, decoded};
use ltxc_runtime::tap::{Role, Tap, Value};
use serde_json::json;

use super::names::{component, full_name};
use super::pipeline::{Pipeline, Tensors, plan_for};
use super::recording::{Distance, TensorFile};
use super::video_stats::structure;
use crate::args::{ModelArgs, ShapeArgs};
use crate::assemble::ModelFiles;
use crate::compile::unfused;
use crate::job::{Shape, pick};

/// A model and a run of it.
#[derive(Debug, Args)]
pub struct RunOf {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub shape: ShapeArgs,
    /// Prompt.
    #[arg(long, short, default_value = "a red fox in deep snow")]
    pub prompt: String,
    /// Seed of all noise.
    #[arg(long, default_value_t = 10)]
    pub seed: u64,
}

impl RunOf {
    /// Compiles and runs; `tap` looks at values of the plan that it is given.
    fn run(&self, options: Options, tap: impl FnOnce(&Plan) -> Option<Box<dyn Tap>>) -> Result<(Plan, Tensors)> {
        let device = pick(&self.shape.device, None)?;
        let shape = Shape::resolve(&self.shape, 0)?;
        let files = ModelFiles::open(&self.model, shape.has_two_stages())?;
        let plan = plan_for(&files, &shape, &device, options)?;
        let pipeline = Pipeline {
            plan: &plan,
            paths: files.paths(),
            device: &device,
            prompt: &self.prompt,
            negative_prompt: "",
            images: &[],
            noise: Noise { seed: self.seed, ..Noise::default() },
        };
        let tensors = pipeline.run(tap(&plan))?;
        Ok((plan, tensors))
    }
}

/// `ltxc debug loop`.
#[derive(Debug, Args)]
pub struct LoopArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run: RunOf,
}

/// What one step of one modality did.
#[derive(Clone, Debug)]
pub struct StepFacts {
    /// Stage, step from 0, modality.
    pub at: (String, usize, &'static str),
    /// Noise level.
    pub sigma: f64,
    /// Correlation of the latent with the prediction.
    pub x_x0: f64,
    /// Correlation of the prediction with the noise.
    pub x0_noise: f64,
    /// Standard deviations of velocity, prediction and latent.
    pub std: [f64; 3],
    /// How far the prediction is from `x − σ v`, relative L2, where the velocity is known.
    pub consistency: Option<f64>,
    /// Correlation of the prediction with the velocity.
    pub x0_v: f64,
    /// How far the next latent is from an Euler step, relative L2.
    pub euler: f64,
}

/// Facts of every step. `velocities` are those of the model, by stage, step and modality.
pub fn step_facts(tensors: &BTreeMap<String, Vec<f32>>, velocities: &BTreeMap<String, Vec<f32>>) -> Vec<StepFacts> {
    let mut facts = Vec::new();
    let stages: Vec<String> = tensors.keys().filter_map(|k| k.strip_suffix(".sigmas")).map(String::from).collect();
    for stage in stages {
        let sigmas = &tensors[&format!("{stage}.sigmas")];
        for modality in ["video", "audio"] {
            let Some(mut x) = tensors.get(&format!("{stage}.{modality}.noised")) else { continue };
            let noise = tensors.get(&format!("{stage}.{modality}.noise"));
            for (step, pair) in sigmas.windows(2).enumerate() {
                let of = |name: String| tensors.get(&format!("{stage}.{name}"));
                // Samplers that evaluate the model once a step count evaluations as they count steps.
                let x0 = of(format!("call{step}.cond.{modality}.x0"));
                let denoised = of(format!("call{step}.{modality}.denoised"));
                let next = of(format!("step{step}.{modality}.latent"));
                let (Some(x0), Some(denoised), Some(next)) = (x0, denoised, next) else { break };
                let sigma = pair[0];
                let implied: Vec<f32> = x.iter().zip(x0).map(|(x, d)| (x - d) / sigma).collect();
                let known = velocities.get(&format!("{stage}.{step}.{modality}"));
                let v = known.unwrap_or(&implied);
                let from_v: Vec<f32> = x.iter().zip(v).map(|(x, v)| x - sigma * v).collect();
                let euler: Vec<f32> =
                    x.iter().zip(denoised).map(|(x, d)| x + (x - d) / sigma * (pair[1] - pair[0])).collect();
                let std = |values: &[f32]| Stats::of(&[values.len()], values).std;
                facts.push(StepFacts {
                    at: (stage.clone(), step, modality),
                    sigma: f64::from(sigma),
                    x_x0: Distance::of(x, x0).pearson,
                    x0_noise: noise.map_or(0.0, |n| Distance::of(x0, n).pearson),
                    std: [std(v), std(x0), std(x)],
                    consistency: known.map(|_| Distance::of(x0, &from_v).relative_l2),
                    x0_v: Distance::of(x0, v).pearson,
                    euler: Distance::of(next, &euler).relative_l2,
                });
                x = next;
            }
        }
    }
    facts
}

/// Whether a relative distance is more than rounding; one that is no number is.
fn is_far(distance: f64) -> bool {
    distance.is_nan() || distance > 1e-3
}

impl StepFacts {
    /// What is wrong with the step.
    pub fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        if let Some(error) = self.consistency.filter(|e| is_far(*e)) {
            let taken = if self.x0_v > 0.999 { "; it is the velocity itself, taken for the prediction" } else { "" };
            flags.push(format!("x0 is not x − σ·v (relative L2 {error:.1e}){taken}"));
        }
        if self.x_x0 > 0.99 && self.sigma > 0.2 {
            flags.push("the model predicts no change".into());
        }
        if self.sigma == 1.0 && !(0.4..=1.3).contains(&self.std[0]) {
            flags.push(format!("velocity has a standard deviation of {:.2}, expected 0.4 to 1.3", self.std[0]));
        }
        if is_far(self.euler) {
            flags.push(format!("the next latent is no Euler step (relative L2 {:.1e})", self.euler));
        }
        flags
    }
}

/// `ltxc debug loop`. Returns whether no step looks wrong.
///
/// # Errors
/// A run that fails.
pub fn run_loop(args: &LoopArgs, json_output: bool) -> Result<bool> {
    let velocities = Rc::new(RefCell::new(Velocities::default()));
    let (plan, ran) = args.run.run(Options::default(), |plan| {
        let tap = VelocityTap { plan: plan.clone(), kept: velocities.clone() };
        Some(Box::new(tap))
    })?;
    let velocities = velocities.take();
    let facts = step_facts(&ran.tensors, &velocities.values);
    let mut ok = true;
    if !json_output {
        println!(
            "{:<22} {:>8} {:>9} {:>10} {:>8} {:>8} {:>8} {:>9}",
            "step", "sigma", "corr x,x0", "corr x0,n", "std v", "std x0", "std x", "euler"
        );
    }
    for f in &facts {
        let flags = f.flags();
        ok &= flags.is_empty();
        let (stage, step, modality) = &f.at;
        if json_output {
            println!(
                "{}",
                json!({"stage": stage, "step": step, "modality": modality, "sigma": f.sigma, "corr_x_x0": f.x_x0,
                "corr_x0_noise": f.x0_noise, "std_v": f.std[0], "std_x0": f.std[1], "std_x": f.std[2],
                "x0_from_v": f.consistency, "euler": f.euler, "flags": flags})
            );
            continue;
        }
        println!(
            "{:<22} {:>8.5} {:>9.4} {:>10.4} {:>8.4} {:>8.4} {:>8.4} {:>9.1e}",
            format!("{stage}.{step} {modality}"),
            f.sigma,
            f.x_x0,
            f.x0_noise,
            f.std[0],
            f.std[1],
            f.std[2],
            f.euler
        );
        flags.iter().for_each(|flag| println!("  RED FLAG: {flag}"));
    }
    if let Some(latent) = ran.tensors.get("final.video_latent") {
        let s = Stats::of(&[latent.len()], latent);
        let is_odd = !(0.7..=1.6).contains(&s.std);
        ok &= !is_odd && !s.is_bad();
        if !json_output {
            let flag = if is_odd { "  RED FLAG: expected 0.7 to 1.6" } else { "" };
            println!("final latent: mean {:.4} std {:.4}{flag}", s.mean, s.std);
            if plan.pipeline.model.synthetic {
                println!("the weights are synthetic: numbers of a trained model are not to be expected");
            }
        }
    }
    Ok(ok)
}

/// Velocities by stage, step and modality.
#[derive(Default)]
struct Velocities {
    values: BTreeMap<String, Vec<f32>>,
    /// How often the step program of a stage has run.
    runs: BTreeMap<String, usize>,
}

struct VelocityTap {
    plan: Plan,
    kept: Rc<RefCell<Velocities>>,
}

impl Tap for VelocityTap {
    fn wants(&mut self, program: &Program, value: &Value) -> bool {
        component(&self.plan, program) == "transformer"
            && value.role == Role::Output
            // The conditioned pass; those of others have the name of the pass in front.
            && ["video.velocity", "audio.velocity"].contains(&value.name.as_str())
    }

    fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
        let mut kept = self.kept.borrow_mut();
        let stage = program.name.split('.').next().unwrap_or_default().to_string();
        let run = kept.runs.get(&stage).copied().unwrap_or(0);
        let modality = value.name.split('.').next().unwrap_or_default();
        kept.values.insert(format!("{stage}.{run}.{modality}"), decoded(&value.ty, bytes));
        Ok(())
    }

    fn end(&mut self, program: &Program) -> Result<(), RunError> {
        if component(&self.plan, program) == "transformer" && program.rate == ltxc_ir::Rate::Step {
            let stage = program.name.split('.').next().unwrap_or_default().to_string();
            *self.kept.borrow_mut().runs.entry(stage).or_default() += 1;
        }
        Ok(())
    }
}

/// `ltxc debug nan`.
#[derive(Debug, Args)]
pub struct NanArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run: RunOf,
    /// Go on after the first bad value, and list the first of every program.
    #[arg(long)]
    pub full: bool,
}

/// The first bad value of a program.
#[derive(Clone, Debug)]
struct Finding {
    program: String,
    run: usize,
    name: String,
    stats: Stats,
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
            let name = full_name(component(&self.plan, program), &value.name);
            let run = self.runs.get(&program.name).copied().unwrap_or(0);
            found.findings.push(Finding {
                program: program.name.clone(),
                run,
                name: name.clone(),
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

    fn end(&mut self, program: &Program) -> Result<(), RunError> {
        *self.runs.entry(program.name.clone()).or_default() += 1;
        Ok(())
    }
}

/// `ltxc debug nan`. Returns whether every value is finite.
///
/// # Errors
/// A run that fails for another reason.
pub fn run_nan(args: &NanArgs, json_output: bool) -> Result<bool> {
    let found = Rc::new(RefCell::new(Found::default()));
    let result = args.run.run(unfused(), |plan| {
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
                json!({"value": f.name, "program": f.program, "run": f.run, "nan": s.nan, "infinite": s.infinite,
                "of": s.ty.elements(), "first": s.first_bad, "reads": f.reads.iter().map(|(n, s)| json!({"value": n, "mean": s.mean,
                "std": s.std, "min": s.min, "max": s.max})).collect::<Vec<_>>()})
            );
            continue;
        }
        println!(
            "{}: NaN in {}, infinite in {} of {} values, first at {} (program {}, run {})",
            f.name,
            s.nan,
            s.infinite,
            s.ty.elements(),
            s.first_bad.unwrap_or(0),
            f.program,
            f.run
        );
        for (name, s) in &f.reads {
            println!("  computed from {name}: mean {:.4} std {:.4} [{:.4}, {:.4}]", s.mean, s.std, s.min, s.max);
        }
    }
    if found.findings.is_empty() && !json_output {
        println!("all {} values are finite", found.checked);
    }
    Ok(found.findings.is_empty())
}

/// `ltxc debug latents`.
#[derive(Debug, Args)]
pub struct LatentsArgs {
    /// File with latents of shape (1, c, f, h, w): .safetensors, .npy, .npz or .pt.
    pub file: PathBuf,
    /// Tensor of the file, if it has several.
    #[arg(long)]
    pub tensor: Option<String>,
    /// What it should be: an encoded or finished latent is coherent, noise is not.
    #[arg(long, default_value_t = false)]
    pub noise: bool,
}

/// `ltxc debug latents`. Returns whether the latents look like what they should be.
///
/// # Errors
/// A file without such a tensor.
pub fn run_latents(args: &LatentsArgs, json_output: bool) -> Result<bool> {
    let tensors = noise_files::read(&args.file)?;
    let chosen = match &args.tensor {
        Some(name) => tensors.iter().find(|t| t.name == *name),
        None => tensors.iter().find(|t| t.shape.len() == 5),
    };
    let tensor =
        chosen.with_context(|| format!("`{}` has no such tensor of shape (1, c, f, h, w)", args.file.display()))?;
    let &[_, c, f, h, w] = &tensor.shape[..] else {
        bail!("`{}` is {:?}, expected (1, c, f, h, w)", tensor.name, tensor.shape)
    };
    let s = Stats::of(&tensor.shape, &tensor.values);
    let plane = |channel: usize, frame: usize| -> Vec<f64> {
        let at = (channel * f + frame) * h * w;
        tensor.values[at..at + h * w].iter().map(|&v| f64::from(v)).collect()
    };
    let planes = || (0..c).flat_map(|k| (0..f).map(move |i| (k, i)));
    let n = (c * f).max(1) as f64;
    let autocorrelation = planes().map(|(k, i)| structure(&plane(k, i), w).autocorrelation).sum::<f64>() / n;
    let stds: Vec<f64> = (0..c)
        .map(|k| {
            let channel = &tensor.values[k * f * h * w..(k + 1) * f * h * w];
            Stats::of(&[channel.len()], channel).std
        })
        .collect();
    let change = planes()
        .filter(|(_, i)| *i > 0)
        .map(|(k, i)| {
            plane(k, i).iter().zip(plane(k, i - 1)).map(|(a, b)| (a - b).abs()).sum::<f64>() / (h * w).max(1) as f64
        })
        .sum::<f64>()
        / (c * f.saturating_sub(1)).max(1) as f64;
    let dc = s.mean.abs() / s.std.max(1e-30);
    let mut flags = Vec::new();
    if s.is_bad() {
        flags.push(format!("{} NaN and {} infinite values", s.nan, s.infinite));
    }
    match (args.noise, autocorrelation) {
        (false, r) if r < 0.7 => {
            flags.push(format!("neighbours correlate by {r:.2}; latents of pictures reach 0.7 and more"))
        }
        (true, r) if r > 0.3 => flags.push(format!("neighbours correlate by {r:.2}; noise stays below 0.3")),
        _ => {}
    }
    if !args.noise && !(0.7..=1.6).contains(&s.std) {
        flags.push(format!("standard deviation {:.3}, expected 0.7 to 1.6", s.std));
    }
    let (low, high) = (stds.iter().copied().fold(f64::INFINITY, f64::min), stds.iter().copied().fold(0.0, f64::max));
    if json_output {
        println!(
            "{}",
            json!({"tensor": tensor.name, "shape": tensor.shape, "mean": s.mean, "std": s.std, "min": s.min, "max": s.max,
            "channel_std": stds, "dc_ratio": dc, "temporal_difference": change, "autocorrelation": autocorrelation, "flags": flags})
        );
    } else {
        println!(
            "{} {}\nmean {:.4} std {:.4} [{:.3}, {:.3}]",
            tensor.name,
            s.shape_text(),
            s.mean,
            s.std,
            s.min,
            s.max
        );
        println!("std by channel {low:.4} to {high:.4}, DC ratio {dc:.4}, temporal difference {change:.4}");
        println!("spatial autocorrelation {autocorrelation:.4}\n{}", histogram(&tensor.values));
        flags.iter().for_each(|flag| println!("RED FLAG: {flag}"));
    }
    Ok(flags.is_empty())
}

/// Shares of values in steps of 1 from −4 to 4.
fn histogram(values: &[f32]) -> String {
    let n = values.len().max(1) as f64;
    let bar = |low: f32| {
        let count = values.iter().filter(|&&v| (low..low + 1.0).contains(&v)).count() as f64 / n;
        format!("{low:>4} {:>6.2} % {}", count * 100.0, "█".repeat((count * 60.0) as usize))
    };
    (-4..4).map(|i| bar(i as f32)).collect::<Vec<_>>().join("\n")
}

/// `ltxc debug positions`.
#[derive(Debug, Args)]
pub struct PositionsArgs {
    /// Frames, rows and columns of the latent.
    #[arg(long, value_name = "F,H,W", value_delimiter = ',', default_value = "3,2,3")]
    pub grid: Vec<u32>,
    /// Frames per second.
    #[arg(long, default_value_t = 24)]
    pub frame_rate: u32,
    /// Audio tokens; those of the length of the video if not given.
    #[arg(long)]
    pub audio_tokens: Option<u32>,
    /// Compare with `video.positions` and `audio.positions` of this safetensors file.
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
}

/// `ltxc debug positions`. Returns whether they equal those of the file.
///
/// # Errors
/// A file that cannot be read.
pub fn run_positions(args: &PositionsArgs, json_output: bool) -> Result<bool> {
    let &[f, h, w] = &args.grid[..] else { bail!("`--grid` takes frames, rows and columns") };
    if [f, h, w, args.frame_rate].iter().any(|n| !(1..=4096).contains(n)) {
        bail!("the grid and the frame rate must be 1 to 4096");
    }
    let settings = VideoSettings {
        height: h * 32,
        width: w * 32,
        frames: (f - 1) * 8 + 1,
        frame_rate: (args.frame_rate, 1),
        channels: 128,
        scale: [8, 32, 32],
        max_keyframes: 0,
    };
    let seconds = f64::from(settings.frames) / f64::from(args.frame_rate);
    let tokens = args.audio_tokens.unwrap_or(((seconds * 25.0).round_ties_even() as u32).max(1));
    let (video, audio) = (video_positions([f, h, w], &settings), audio_positions(tokens));
    let spans = |values: &[f32], step: usize| -> Vec<(f32, f32)> {
        values.chunks(2).step_by(step).take(4).map(|p| (p[0], p[1])).collect()
    };
    let video_spans = spans(&video[..(f * h * w) as usize * 2], (h * w) as usize);
    let audio_spans = spans(&audio, 1);
    let mut ok = true;
    let mut compared = Vec::new();
    if let Some(path) = &args.compare {
        let file = TensorFile::open(path)?;
        for (name, found) in [("video.positions", &video), ("audio.positions", &audio)] {
            let known = file.iter().find(|(key, _)| *key == name || key.ends_with(&format!(".{name}")));
            let Some((key, tensor)) = known else { continue };
            let expected = tensor.to_f32();
            let distance = Distance::of(found, &expected);
            // Positions that were rounded to bf16 on the way have no bits below the eighth.
            let is_bf16 =
                expected.iter().all(|v| v.to_bits() & 0xffff == 0) && found.iter().any(|v| v.to_bits() & 0xffff != 0);
            let equal = distance.max_abs <= 1e-6;
            ok &= equal;
            let why = match (equal, found.len() == expected.len(), is_bf16) {
                (true, ..) => "equal".to_string(),
                (_, false, _) => {
                    format!("{} values, ours are {}: another number of tokens", expected.len(), found.len())
                }
                (_, _, true) => "theirs were rounded to bf16".into(),
                _ => format!("largest difference {:.3e}", distance.max_abs),
            };
            compared.push((key.to_string(), why));
        }
        if compared.is_empty() {
            bail!("`{}` has no `video.positions` or `audio.positions`", path.display());
        }
    }
    if json_output {
        println!(
            "{}",
            json!({"video_seconds": video_spans, "audio_seconds": audio_spans, "audio_tokens": tokens, "compared": compared, "ok": ok})
        );
        return Ok(ok);
    }
    println!("video, seconds of the first latent frames: {video_spans:?}");
    println!("audio, seconds of the first of {tokens} tokens: {audio_spans:?}");
    compared.iter().for_each(|(name, why)| println!("{name}: {why}"));
    Ok(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of one step with a known velocity; `x0` as the caller likes.
    fn facts(x0: impl Fn(f32, f32, f32) -> f32) -> StepFacts {
        let n = 4000;
        let noise = ltxc_runtime::random::NormalStream::new(1, "a").draw(n);
        let v = ltxc_runtime::random::NormalStream::new(1, "b").draw(n);
        let (sigma, next) = (1.0f32, 0.9);
        let x0: Vec<f32> = noise.iter().zip(&v).map(|(x, v)| x0(*x, *v, sigma)).collect();
        let latent = noise.iter().zip(&x0).map(|(x, d)| x + (x - d) / sigma * (next - sigma)).collect();
        let mut tensors = BTreeMap::from([("s.sigmas".to_string(), vec![sigma, next])]);
        for (name, values) in [("noised", &noise), ("noise", &noise)] {
            tensors.insert(format!("s.video.{name}"), values.clone());
        }
        for (name, values) in
            [("call0.cond.video.x0", x0.clone()), ("call0.video.denoised", x0), ("step0.video.latent", latent)]
        {
            tensors.insert(format!("s.{name}"), values);
        }
        step_facts(&tensors, &BTreeMap::from([("s.0.video".to_string(), v)])).remove(0)
    }

    #[test]
    fn a_right_step_has_no_flags() {
        assert_eq!(facts(|x, v, s| x - s * v).flags(), Vec::<String>::new());
    }

    #[test]
    fn velocity_taken_for_the_prediction_is_named() {
        let flags = facts(|_, v, _| v).flags();
        assert!(flags.iter().any(|f| f.contains("velocity itself")), "{flags:?}");
    }

    #[test]
    fn a_model_that_predicts_no_change_is_flagged() {
        let flags = facts(|x, v, _| x - 0.01 * v).flags();
        assert!(flags.iter().any(|f| f.contains("no change")), "{flags:?}");
    }
}
