//! `ltxc compile` of full-size models: time, memory, size of the plan, and whether it is the same every time.
//!
//! The distilled pipeline, or the guided ones, whose steps have four passes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ltxc_models::synth::{Preset, SynthModel, synth};

use crate::block::Findings;
use crate::measure::Turns;
use crate::process;
use crate::report::Row;

/// Height, width and frames of the videos.
const SHAPE: [&str; 3] = ["512", "768", "121"];

/// Seconds that are aimed at.
const GOAL_SECONDS: f64 = 2.0;

/// Peak memory that is aimed at, in MB.
const GOAL_MEMORY: f64 = 500.0;

/// Size of the plan that is aimed at, in MB.
const GOAL_PLAN: f64 = 1.0;

/// Pipelines that guide.
const GUIDED: [&str; 3] = ["one-stage", "two-stage", "hq"];

/// Compiles each model `rounds` times at 512×768, 121 frames, for the two-stage distilled pipeline or for those that
/// guide. `folder` takes the model files, which are sparse.
///
/// # Errors
/// A model that cannot be written or compiled.
pub fn run(rounds: usize, folder: &Path, ltxc: &Path, is_guided: bool) -> Result<Findings> {
    let mut findings = Findings { rows: Vec::new(), tables: Vec::new(), notes: Vec::new() };
    let pipelines = if is_guided { &GUIDED[..] } else { &["distilled"] };
    for (preset, pipeline) in
        [Preset::Ltx2, Preset::Ltx23].into_iter().flat_map(|p| pipelines.iter().map(move |l| (p, l)))
    {
        let model = match is_guided {
            true => dev_model(preset, folder)?,
            false => synth(preset, &folder.join(preset.name()), 0)?,
        };
        let name = if is_guided { format!("{} {pipeline}", preset.name()) } else { preset.name().into() };
        let plan = folder.join(format!("{name}.ltxplan"));
        let mut command = compile_command(ltxc, &model, SHAPE, &plan)?;
        command.args(["--pipeline", pipeline]);
        let (mut turns, mut first) = (Turns::default(), None);
        for _ in 0..rounds.max(2) {
            turns.ours.push(process::timed(&mut command)?);
            let bytes = std::fs::read(&plan)?;
            let first = first.get_or_insert_with(|| bytes.clone());
            ensure!(*first == bytes, "two compilations of {name} gave different plans");
        }
        let bytes = first.map_or(0, |plan| plan.len());
        let peak = process::observed(&mut command)?;
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        findings.rows.push(Row::turns(format!("compile {name}"), turns).at_most(GOAL_SECONDS));
        findings
            .rows
            .push(Row::value(format!("peak memory, {name}"), "MB", megabytes(peak.resident)).at_most(GOAL_MEMORY));
        findings.rows.push(Row::value(format!("plan, {name}"), "MB", megabytes(bytes as u64)).at_most(GOAL_PLAN));
        findings.notes.push(format!("{name}: all {} plans are the same, byte for byte", rounds.max(2)));
    }
    Ok(findings)
}

/// The model under the name of one that is not distilled, which guided pipelines ask for.
fn dev_model(preset: Preset, folder: &Path) -> Result<SynthModel> {
    let model = synth(preset, &folder.join(format!("{}-dev", preset.name())), 0)?;
    let file = format!("{}-dev.safetensors", preset.name());
    let checkpoint = model.checkpoint.with_file_name(file);
    std::fs::rename(&model.checkpoint, &checkpoint).with_context(|| format!("`{}`", checkpoint.display()))?;
    Ok(SynthModel { checkpoint, ..model })
}

/// `ltxc compile` of a synthetic model, for the distilled pipeline if nothing is added.
///
/// # Errors
/// A model without an upsampler.
pub fn compile_command(ltxc: &Path, model: &SynthModel, shape: [&str; 3], plan: &Path) -> Result<Command> {
    let upsampler = model.upsamplers.first().context("the model has no upsampler")?;
    let mut command = Command::new(ltxc);
    command.arg("compile").arg("--checkpoint-path").arg(&model.checkpoint).arg("--gemma-root").arg(&model.gemma);
    command.arg("--spatial-upsampler-path").arg(upsampler).arg("--output").arg(plan);
    let [height, width, frames] = shape;
    command.args(["--height", height, "--width", width, "--num-frames", frames, "--quiet"]);
    Ok(command)
}
