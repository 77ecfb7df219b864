//! `ltxc synth`: synthetic model files.

use anyhow::Result;
use ltxc_models::synth::synth;
use serde_json::json;

use crate::args::SynthArgs;
use crate::report::Report;

/// Seed of the weights: the same command writes the same files everywhere.
pub const SEED: u64 = 10;

/// `ltxc synth`.
///
/// # Errors
/// A folder that cannot be written.
pub fn run(args: &SynthArgs, report: &mut Report) -> Result<()> {
    let model = synth(args.preset, &args.dir, SEED)?;
    report.note(&format!("model      {}", model.checkpoint.display()));
    report.note(&format!("gemma      {}", model.gemma.display()));
    for upsampler in &model.upsamplers {
        report.note(&format!("upsampler  {}", upsampler.display()));
    }
    let facts = json!({"checkpoint": model.checkpoint, "gemma": model.gemma, "upsamplers": model.upsamplers});
    report.finish(&args.dir, facts);
    Ok(())
}
