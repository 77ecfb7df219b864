//! `ltxc compile` of full-size models: time, memory, size of the plan, and whether it is the same every time.

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

/// Compiles each model `rounds` times for the two-stage pipeline at 512×768, 121 frames. `folder` takes the model files,
/// which are sparse.
///
/// # Errors
/// A model that cannot be written or compiled.
pub fn run(rounds: usize, folder: &Path, ltxc: &Path) -> Result<Findings> {
    let mut findings = Findings { rows: Vec::new(), tables: Vec::new(), notes: Vec::new() };
    for preset in [Preset::Ltx2, Preset::Ltx23] {
        let name = preset.name();
        let model = synth(preset, &folder.join(name), 0)?;
        let plan = folder.join(format!("{name}.ltxplan"));
        let mut command = compile_command(ltxc, &model, SHAPE, &plan)?;
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

/// `ltxc compile` of a synthetic model for the distilled pipeline.
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
