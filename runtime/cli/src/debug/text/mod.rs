//! `ltxc debug text`: whether the text side tells prompts apart, and where it loses them.
//!
//! | file | what |
//! | --- | --- |
//! | `diff` | two prompts, stage by stage |
//! | `stats`, `detail` | one prompt, layer by layer, and the lines of sums that other tools write |
//! | `mask` | who sees whom |
//! | `contexts` | contexts in files: written, read, compared |
//! | `sensitivity` | what two contexts do to the blocks of the transformer |

pub mod contexts;
mod detail;
mod diff;
mod mask;
mod sensitivity;
mod stats;

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;

use super::modules::{Bench, Side};
use super::parity::text::TextSide;
use crate::compile::unfused;
use crate::model_files::{MODEL, ModelFiles};

/// `ltxc debug text`.
#[derive(Debug, Subcommand)]
pub enum TextCommand {
    /// Correlation of two prompts after every layer, projection and connector block.
    Diff(diff::DiffArgs),
    /// Statistics of every layer for one prompt, and checks of what ports get wrong.
    Stats(stats::StatsArgs),
    /// The attention mask of every layer: causal, window, pads; and what pads do.
    Mask(mask::MaskArgs),
    /// Compare hidden states and contexts with those of another tool, in a .npz, .safetensors or .pt file.
    Compare(contexts::CompareArgs),
    /// Write contexts, and hidden states if wanted, to a .npz, .safetensors or .pt file.
    Export(contexts::ExportArgs),
    /// Run one step with two prompts: how far the streams are apart after every block.
    Sensitivity(sensitivity::SensitivityArgs),
}

/// Runs a command. Returns whether it found nothing wrong.
///
/// # Errors
/// Model files that cannot be read or run.
pub fn run(command: &TextCommand, json: bool) -> Result<bool> {
    match command {
        TextCommand::Diff(args) => {
            // The caption projection is a part of the transformer.
            let parts = if args.stages == diff::Stages::All { &ALL[..] } else { &ALL[..2] };
            look(&args.side, parts, None, |side, files| diff::run(args, side, files, json))
        }
        TextCommand::Stats(args) => {
            let parts = if args.detail { &ALL[..2] } else { &ALL[..1] };
            look(&args.side, parts, None, |side, files| stats::run(args, side, files, json))
        }
        TextCommand::Mask(args) => look(&args.side, &ALL[..1], None, |side, _| mask::run(args, side, json)),
        TextCommand::Compare(args) => look(&args.side, &ALL[..2], None, |side, _| contexts::compare(args, side, json)),
        TextCommand::Export(args) => export(args, json),
        TextCommand::Sensitivity(args) => {
            look(&args.side, &ALL, Some(args.seed), |side, files| sensitivity::run(args, side, files, json))
        }
    }
}

/// `ltxc encode-text`, also `ltxc debug text export`.
///
/// # Errors
/// Model files that cannot be read or run, or a file that cannot be written.
pub fn export(args: &contexts::ExportArgs, json: bool) -> Result<bool> {
    look(&args.side, &ALL[..2], None, |side, _| contexts::export(args, side, json))
}

/// What may run, in this order.
const ALL: [&str; 3] = ["text_encoder", "connectors", "transformer"];

/// Opens a model and shows its text side to `look`. `parts` of it run.
fn look(
    side: &Side,
    parts: &[&str],
    seed: Option<u64>,
    look: impl FnOnce(&TextSide<'_>, &ModelFiles) -> Result<bool>,
) -> Result<bool> {
    side.look(parts, seed, |device, session| {
        let files = ModelFiles::open(&side.model, false)?;
        let bench = Bench { sources: files.sources()?, paths: files.paths(), options: unfused(), device, session };
        let weights = ltxc_models::Weights::new(MODEL, &files.model);
        look(&TextSide::new(&files, bench, weights)?, &files)
    })
}

/// Where a log goes: a file, or standard output.
fn write_lines(path: Option<&PathBuf>, lines: &[String]) -> Result<()> {
    let text = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    match path {
        Some(path) => Ok(ltxc_runtime::files::write_atomically(path, text.as_bytes())?),
        None => {
            print!("{text}");
            Ok(())
        }
    }
}
