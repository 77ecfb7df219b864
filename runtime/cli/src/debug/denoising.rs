//! `ltxc debug loop`: the steps of a run, and whether latents, predictions and velocities agree.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::Result;
use clap::Args;
use ltxc_ir::plan::{Plan, Program};
use ltxc_runtime::RunError;
use ltxc_runtime::stats::{Stats, decoded};
use ltxc_runtime::tap::{Role, Tap, Value};
use serde_json::json;

use super::flags::DebugMode;
use super::names::{COMPONENTS, component};
use super::options::DebugOptions;
use super::parity::Check;
use super::parity::runs::{RunOn, check_run};
use super::pipeline::{RunOf, Tensors};
use super::recording::{Distance, TensorFile};
use super::session::{About, Session};
use super::step::print_rows;
use super::video_stats::{Collector, structure};
use crate::job::pick;
use crate::model_files::ModelFiles;

/// `ltxc debug loop`.
#[derive(Debug, Args)]
pub struct LoopArgs {
    /// Show how streams grow from block to block, and how much of them comes from the text. Compiles without fusion.
    #[arg(long, conflicts_with = "compare")]
    pub blocks: bool,
    /// Compare with the tensors of this recording, from whose noise the run starts: `stage1.step0.video.latent` and so on.
    /// A recording of tests/tools or of the fixtures that is named for its pipeline says what to run; flags say it else.
    #[arg(long, value_name = "FILE", alias = "ref")]
    pub compare: Option<PathBuf>,
    /// Look at the latent after every step, and at the finished frames, too.
    #[arg(long, conflicts_with = "compare")]
    pub full: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run: RunOf,
}

/// Relative L2 by which a run may differ from a recording.
const COMPARED_LIMIT: f64 = 1e-3;

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
        let mut flags = self.inconsistencies();
        if self.x_x0 > 0.99 && self.sigma > 0.2 {
            flags.push("the model predicts no change".into());
        }
        if self.sigma == 1.0 && !(0.4..=1.3).contains(&self.std[0]) {
            flags.push(format!("velocity has a standard deviation of {:.2}, expected 0.4 to 1.3", self.std[0]));
        }
        flags
    }

    /// Where velocity, prediction and the next latent contradict each other, whatever the model is.
    pub fn inconsistencies(&self) -> Vec<String> {
        let mut flags = Vec::new();
        if let Some(error) = self.consistency.filter(|e| is_far(*e)) {
            let taken = if self.x0_v > 0.999 { "; it is the velocity itself, taken for the prediction" } else { "" };
            flags.push(format!("x0 is not x − σ·v (relative L2 {error:.1e}){taken}"));
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
pub fn run(args: &LoopArgs, json_output: bool) -> Result<bool> {
    let velocities = Rc::new(RefCell::new(Velocities::default()));
    let recording = args.compare.as_deref().map(TensorFile::open).transpose()?;
    if let Some(recording) = recording.as_ref().filter(|r| r.meta()["params"].is_object()) {
        let files = ModelFiles::open(&args.run.model, args.run.model.spatial_upsampler_path.is_some())?;
        let device = pick(&args.run.shape.device, None)?;
        let options = DebugOptions::of(&args.run.debug)?.only(&COMPONENTS)?;
        let compiler = options.mode.unwrap_or_default().compiler();
        let session = Session::new(options, About { device: device.name.to_string(), ..About::default() });
        let mut rows = Vec::new();
        let release = args.run.shape.reference_version;
        let on = RunOn { device: &device, options: compiler, session: &session, release };
        check_run(&files, &on, &recording.path, &mut rows)?;
        session.close()?;
        return print_rows(&rows, &recording.path.display().to_string(), json_output);
    }
    let given = recording.as_ref().map(recorded_noise).unwrap_or_default();
    // What attention to the text gives has no memory of its own in fused kernels.
    let usual = if args.blocks { DebugMode::Exact } else { DebugMode::Fused };
    let (plan, ran) = args.run.run(usual, given, |plan| {
        let tap = VelocityTap { plan: plan.clone(), blocks: args.blocks, kept: velocities.clone() };
        Some(Box::new(tap))
    })?;
    let velocities = velocities.take();
    if let Some(recording) = recording {
        return compare_run(&ran, recording, json_output);
    }
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
    velocities.blocks.iter().for_each(|(at, block)| print_block(at, block, json_output));
    if args.full {
        ok &= print_results(&plan, &ran, json_output);
    }
    if let Some(latent) = ran.tensors.get("final.video_latent") {
        let s = Stats::of(&[latent.len()], latent);
        let is_odd = !(0.7..=1.6).contains(&s.std);
        ok &= !is_odd && !s.is_bad();
        if json_output {
            println!("{}", json!({"final_latent": {"mean": s.mean, "std": s.std, "ok": !is_odd && !s.is_bad()}}));
        } else {
            let flag = if is_odd { "  RED FLAG: expected 0.7 to 1.6" } else { "" };
            println!("final latent: mean {:.4} std {:.4}{flag}", s.mean, s.std);
            if plan.pipeline.model.synthetic {
                println!("the weights are synthetic: numbers of a trained model are not to be expected");
            }
        }
    }
    Ok(ok)
}

/// Prints the coherence of the latent after every step, and what the frames look like; returns whether frames are finite
/// and, of weights that are not synthetic, look like a picture.
fn print_results(plan: &Plan, ran: &Tensors, json_output: bool) -> bool {
    let channels = (plan.pipeline.video.channels as usize).max(1);
    for stage in &plan.pipeline.stages {
        let [f, h, w] = stage.grid.map(|n| n as usize);
        for step in 0.. {
            let Some(latent) = ran.tensors.get(&format!("{}.step{step}.video.latent", stage.name)) else { break };
            // Tokens of the target come first, channels last.
            let place = |at: usize, c: usize| latent.get(at * channels + c).map_or(0.0, |v| f64::from(*v));
            let plane =
                |c: usize, i: usize| -> Vec<f64> { (i * h * w..(i + 1) * h * w).map(|at| place(at, c)).collect() };
            let planes = (0..channels).flat_map(|c| (0..f).map(move |i| (c, i)));
            let sum: f64 = planes.map(|(c, i)| structure(&plane(c, i), w).autocorrelation).sum();
            let coherence = sum / (channels * f).max(1) as f64;
            match json_output {
                true => println!("{}", json!({"stage": stage.name, "step": step, "coherence": coherence})),
                false => println!("{}.{step} video latent: spatial autocorrelation {coherence:.4}", stage.name),
            }
        }
    }
    let (width, height) = (plan.pipeline.video.width as usize, plan.pipeline.video.height as usize);
    let mut collector = Collector::default();
    let bytes = |frame: &[f32]| frame.iter().map(|v| (v * 255.0) as u8).collect::<Vec<u8>>();
    let is_whole =
        ran.frames.chunks((width * height * 3).max(1)).all(|f| collector.add(width, height, &bytes(f)).is_ok());
    let stats = collector.finish();
    let flags = stats.flags();
    match json_output {
        true => println!(
            "{}",
            json!({"frames": stats.frames, "brightness": stats.brightness, "noise_ratio": stats.noise_ratio,
            "std": stats.grey_std, "flags": flags.iter().map(|f| f.0).collect::<Vec<_>>()})
        ),
        false => {
            println!(
                "frames: {}, brightness {:.3}, std {:.1}, noise ratio {:.3}",
                stats.frames, stats.brightness, stats.grey_std, stats.noise_ratio
            );
            flags.iter().for_each(|(flag, why)| println!("  RED FLAG: {flag}: {why}"));
        }
    }
    let is_finite = ran.frames.iter().all(|v| v.is_finite());
    is_whole && is_finite && (flags.is_empty() || plan.pipeline.model.synthetic)
}

/// The noise of a recorded run, by slot.
fn recorded_noise(recording: &TensorFile) -> BTreeMap<String, Vec<f32>> {
    let noise = recording.iter().filter_map(|(name, t)| Some((name.strip_suffix(".noise")?.to_string(), t.to_f32())));
    noise.filter(|(slot, _)| slot.split('.').count() == 2).collect()
}

/// Compares the tensors of a run with recorded ones, in the order in which they came.
fn compare_run(ran: &Tensors, recording: TensorFile, json_output: bool) -> Result<bool> {
    let path = recording.path.display().to_string();
    let mut rows = Vec::new();
    let mut check = Check::new("runs", recording, COMPARED_LIMIT, &mut rows);
    // Results are laid out in other ways by other tools.
    let is_comparable = |name: &&String| !name.starts_with("final.") && !name.ends_with("initial_latent");
    for name in ran.order.iter().filter(is_comparable) {
        // Recordings name predictions after steps, of which each has one evaluation here.
        let recorded = match name.strip_suffix(".denoised") {
            Some(_) => name.replace(".call", ".step"),
            None => name.clone(),
        };
        check.check(&recorded, &ran.tensors[name]);
    }
    print_rows(&rows, &path, json_output)
}

/// A stream behind a block.
#[derive(Clone, Copy, Debug, Default)]
struct BlockFacts {
    /// Standard deviation.
    std: f64,
    /// Norm of the stream, and of what attention to the text gave.
    norm: f64,
    text: Option<f64>,
}

/// Stage, step from 0, block, stream.
type BlockAt = (String, usize, usize, &'static str);

fn print_block((stage, step, block, stream): &BlockAt, facts: &BlockFacts, json_output: bool) {
    let ratio = facts.text.map(|text| text / facts.norm.max(1e-30));
    if json_output {
        println!(
            "{}",
            json!({"stage": stage, "step": step, "block": block, "stream": stream, "std": facts.std, "text_ratio": ratio})
        );
        return;
    }
    let ratio = ratio.map_or("-".into(), |r| format!("{r:.5}"));
    println!(
        "{:<22} block {block:<3} std {:>12.5}  |attn2|/|stream| {ratio}",
        format!("{stage}.{step} {stream}"),
        facts.std
    );
}

/// Velocities by stage, step and modality.
#[derive(Default)]
struct Velocities {
    values: BTreeMap<String, Vec<f32>>,
    /// Streams behind blocks.
    blocks: BTreeMap<BlockAt, BlockFacts>,
    /// How often the step program of a stage has run.
    runs: BTreeMap<String, usize>,
}

struct VelocityTap {
    plan: Plan,
    /// Whether blocks are looked at, too.
    blocks: bool,
    kept: Rc<RefCell<Velocities>>,
}

impl Tap for VelocityTap {
    fn wants(&mut self, program: &Program, value: &Value) -> bool {
        // The conditioned pass; values of others have the name of the pass in front.
        let is_velocity =
            value.role == Role::Output && ["video.velocity", "audio.velocity"].contains(&value.name.as_str());
        let is_block = self.blocks && value.role == Role::Inner && block_part(&value.name).is_some();
        component(&self.plan, program) == "transformer" && (is_velocity || is_block)
    }

    fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
        let mut kept = self.kept.borrow_mut();
        let stage = program.name.split('.').next().unwrap_or_default().to_string();
        let run = kept.runs.get(&stage).copied().unwrap_or(0);
        if let Some((block, stream, is_text)) = block_part(&value.name) {
            let values = decoded(&value.ty, bytes);
            let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let facts = kept.blocks.entry((stage, run, block, stream)).or_default();
            match is_text {
                true => facts.text = Some(norm),
                false => (facts.std, facts.norm) = (Stats::of(&[values.len()], &values).std, norm),
            }
            return Ok(());
        }
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

/// Block and stream of a value that is a stream behind a block, or what attention to the text gives in it.
fn block_part(name: &str) -> Option<(usize, &'static str, bool)> {
    let (block, rest) = name.strip_prefix("blocks.")?.split_once('.')?;
    let (stream, is_text) = match rest {
        "video" => ("video", false),
        "audio" => ("audio", false),
        "attn2" => ("video", true),
        "audio_attn2" => ("audio", true),
        _ => return None,
    };
    Some((block.parse().ok()?, stream, is_text))
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
