//! From the start of the process to the closed file: a distilled run of a tiny model.
//!
//! The model is so small that this measures everything but arithmetic: starting, loading, planning, calling kernels,
//! encoding. The other side is the published pipeline in one Python process, in float32.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use ltxc_models::synth::SynthModel;

use crate::block::Findings;
use crate::compile::compile_command;
use crate::measure::alternate;
use crate::process;
use crate::report::{Row, figure};
use crate::worker::Python;

/// What to run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Model files.
    pub model: SynthModel,
    /// Height, width and frames.
    pub shape: [u32; 3],
    /// Runs of each side.
    pub rounds: usize,
}

const PROMPT: &str = "A red fox runs through deep snow, wind howling softly in the distance.";

/// Three times as fast.
const GOAL: f64 = 0.333;

/// Measures. `folder` takes plan and videos.
///
/// # Errors
/// A side that fails or writes no video.
pub fn run(settings: &Settings, folder: &Path, ltxc: &Path, python: Option<&Python>) -> Result<Findings> {
    let (plan, ours, theirs) = (folder.join("e2e.ltxplan"), folder.join("ltxc.mp4"), folder.join("reference.mp4"));
    let shape = settings.shape.map(|n| n.to_string());
    process::timed(&mut compile_command(ltxc, &settings.model, shape.each_ref().map(String::as_str), &plan)?)?;
    let mut our_command = Command::new(ltxc);
    our_command.arg("run").arg(&plan).args(["--prompt", PROMPT, "--quiet", "--output"]).arg(&ours);
    for folder in weight_folders(&settings.model) {
        our_command.arg("--weights").arg(folder);
    }
    let mut their_command = python.map(|p| reference_command(p, settings, &theirs));
    let run_ours = || {
        let sample = process::timed(&mut our_command)?;
        ensure!(std::fs::metadata(&ours)?.len() > 0, "`{}` is empty", ours.display());
        Ok(sample)
    };
    let turns = match &mut their_command {
        None => alternate(settings.rounds, run_ours, None)?,
        Some(command) => alternate(settings.rounds, run_ours, Some(&mut || process::timed(command)))?,
    };
    let [height, width, frames] = settings.shape;
    let what = format!("start to closed mp4, {height}×{width}, {frames} frames");
    let (ours, theirs) = (turns.our_seconds(), turns.their_seconds());
    let mut rows = vec![Row::turns(what, turns).ratio_at_most(GOAL)];
    let mut notes = Vec::new();
    if let Some(theirs) = theirs {
        let both = ours + compile_seconds(settings, ltxc, &plan)?;
        rows.push(Row::compared("the same, compiled before every run", "s", both, theirs, None));
        notes.push(format!("{} times as fast as the published pipeline", figure(theirs / ours)));
    }
    Ok(Findings { rows, tables: Vec::new(), notes })
}

fn compile_seconds(settings: &Settings, ltxc: &Path, plan: &Path) -> Result<f64> {
    let shape = settings.shape.map(|n| n.to_string());
    let mut command = compile_command(ltxc, &settings.model, shape.each_ref().map(String::as_str), plan)?;
    Ok(process::timed(&mut command)?.seconds)
}

/// Folders that have the weights of a model.
pub fn weight_folders(model: &SynthModel) -> Vec<PathBuf> {
    let files = [&model.checkpoint].into_iter().chain(model.upsamplers.first());
    let mut folders: Vec<PathBuf> = files.filter_map(|f| f.parent()).map(PathBuf::from).collect();
    folders.push(model.gemma.clone());
    folders.dedup();
    folders
}

fn reference_command(python: &Python, settings: &Settings, output: &Path) -> Command {
    let mut command = python.command("e2e.py");
    command.arg("--checkpoint").arg(&settings.model.checkpoint).arg("--gemma").arg(&settings.model.gemma);
    command.arg("--upsampler").args(settings.model.upsamplers.first());
    let [height, width, frames] = settings.shape.map(|n| n.to_string());
    command.args(["--height", &height, "--width", &width, "--frames", &frames, "--prompt", PROMPT]);
    command.arg("--output").arg(output);
    command
}
