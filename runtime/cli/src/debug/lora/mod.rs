//! `ltxc debug lora`: whether a LoRA does here what it does in the reference, and if not, why.
//!
//! | file | what |
//! | --- | --- |
//! | `layers` | the activations that are compared, and their names |
//! | `four_way` | reference and ltxc, each without and with the LoRA |
//! | `verdict` | what four distances mean |
//! | `files` | two LoRA files side by side, and merged weights against base weights |

pub mod files;
pub mod four_way;
pub mod layers;
pub mod verdict;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use ltxc_runtime::noise_files;

use self::files::{DiffArgs, MergeCheckArgs};
use self::four_way::FourWayArgs;
use super::evaluation::{DrawnArgs, Inputs};
use crate::args::LoraInspectArgs;
use crate::model_files::local;
use ltxc_models::checkpoint::Checkpoint;

/// `ltxc debug lora`.
#[derive(Debug, Subcommand)]
pub enum LoraDebugCommand {
    /// Write the inputs that both sides of a comparison share (phase 1).
    Inputs(InputsArgs),
    /// Compare reference and ltxc, each without and with a LoRA, and say what is wrong (phase 2).
    FourWay(Box<FourWayArgs>),
    /// What is in a LoRA file, as `ltxc lora inspect`, with the norm of what it adds to every layer.
    Inspect(LoraInspectArgs),
    /// Compare two LoRA files: keys, shapes, and what they add, whatever their dialects.
    Diff(DiffArgs),
    /// Compare merged weights with base + strength · scale · B · A.
    MergeCheck(MergeCheckArgs),
}

/// `ltxc debug lora inputs`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ltxc debug lora inputs --out four-way --checkpoint-path ltx-2-19b-dev.safetensors")]
pub struct InputsArgs {
    /// Folder to write `test_inputs` into; made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Model whose sizes the inputs have [default: those of LTX-2 19B]
    #[arg(long, value_name = "FILE", aliases = ["checkpoint", "model-path", "model"])]
    pub checkpoint_path: Option<PathBuf>,
    /// Format of this file, and of those that are compared.
    #[arg(long, value_enum, default_value_t)]
    pub format: FileFormat,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub drawn: DrawnArgs,
}

/// Formats of files with activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum FileFormat {
    /// `.safetensors`
    #[default]
    Safetensors,
    /// `.pt`
    Pt,
}

impl FileFormat {
    /// The extension of such files.
    pub fn extension(self) -> &'static str {
        match self {
            FileFormat::Safetensors => "safetensors",
            FileFormat::Pt => "pt",
        }
    }
}

/// Runs a command. Returns whether it found nothing wrong.
///
/// # Errors
/// Files that cannot be read, or do not belong together.
pub fn run(command: &LoraDebugCommand, json: bool) -> Result<bool> {
    match command {
        LoraDebugCommand::Inputs(args) => write_inputs(args, json).map(|()| true),
        LoraDebugCommand::FourWay(args) => four_way::run(args, json),
        LoraDebugCommand::Inspect(args) => {
            let args = LoraInspectArgs { norms: true, ..args.clone() };
            crate::lora::inspect(&args, json).map(|()| true)
        }
        LoraDebugCommand::Diff(args) => files::diff(args, json),
        LoraDebugCommand::MergeCheck(args) => files::merge_check(args, json),
    }
}

fn write_inputs(args: &InputsArgs, json: bool) -> Result<()> {
    let model =
        args.checkpoint_path.as_deref().map(|path| Checkpoint::open(&local(path)?).map_err(anyhow::Error::from));
    let inputs = Inputs::drawn(&args.drawn, model.transpose()?.as_ref())?;
    std::fs::create_dir_all(&args.out)?;
    let path = args.out.join(format!("{}.{}", four_way::INPUTS, args.format.extension()));
    let tensors = inputs.tensors();
    noise_files::write_all(&path, &tensors)?;
    if json {
        println!("{}", serde_json::json!({"file": path, "tensors": tensors.len(), "sigma": args.drawn.sigma}));
    } else {
        for tensor in &tensors {
            println!("{} {:?}", tensor.name, tensor.shape);
        }
        println!("wrote `{}`; {}", path.display(), four_way::reference_command(&args.out));
    }
    Ok(())
}

/// A LoRA with its strength, `FILE` or `FILE:STRENGTH`.
///
/// # Errors
/// A strength that is not finite.
fn with_strength(text: &str) -> Result<(PathBuf, f64)> {
    match text.rsplit_once(':').and_then(|(path, strength)| Some((path, strength.parse::<f64>().ok()?))) {
        Some((path, strength)) if strength.is_finite() => Ok((path.into(), strength)),
        Some((path, strength)) => bail!("`{path}`: strength {strength} is not a number"),
        None => Ok((text.into(), 1.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strengths_stand_behind_the_file() {
        assert_eq!(with_strength("a/b.safetensors:0.7").unwrap(), ("a/b.safetensors".into(), 0.7));
        assert_eq!(with_strength("C:b.pt").unwrap(), ("C:b.pt".into(), 1.0));
        assert!(with_strength("a:nan").is_err());
    }
}
