//! `ltxc demo`: everything once, with a tiny synthetic model.

use anyhow::{Context, Result};
use ltxc_models::synth::{Preset, synth};

use crate::args::{ContentArgs, DemoArgs, ModelArgs, OutputArgs, RunAdapterArgs, RunArgs, ShapeArgs};
use crate::choice::Occurrences;
use crate::report::Report;
use crate::synth::SEED;

const PROMPT: &str = "Slow waves of colour roll over a calm sea at dusk, wind and distant bells.";

/// `ltxc demo`: synthesises a model, compiles it, runs it.
///
/// # Errors
/// A folder that cannot be written, or anything that would stop `ltxc run`.
pub fn run(args: &DemoArgs, report: &mut Report) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("ltxc-demo-").tempdir().context("a temporary folder")?;
    let model = synth(Preset::Tiny, folder.path(), SEED)?;
    report.note("made a tiny model with random weights; its pictures mean nothing, but everything is real");
    let run = RunArgs {
        plan: None,
        weights: Vec::new(),
        model: ModelArgs {
            checkpoint_path: Some(model.checkpoint),
            gemma_root: Some(model.gemma),
            spatial_upsampler_path: model.upsamplers.into_iter().next(),
            ..ModelArgs::default()
        },
        shape: ShapeArgs { height: Some(256), width: Some(384), num_frames: Some(49), ..ShapeArgs::default() },
        content: ContentArgs { prompt: Some(PROMPT.into()), seed: SEED.to_string(), ..ContentArgs::default() },
        adapters: RunAdapterArgs::default(),
        output: Some(args.output.clone()),
        config: None,
        frozen: false,
        writing: OutputArgs::default(),
        debug: Default::default(),
    };
    crate::run::run(&run, &Occurrences::default(), report)?;
    report.note("with real weights:\n  ltxc run --checkpoint-path ltx-2-19b-distilled.safetensors --gemma-root gemma-3-12b \\\n    \
         --spatial-upsampler-path ltx-2-spatial-upscaler-x2-1.0.safetensors --prompt \"…\" -o out.mp4");
    Ok(())
}
