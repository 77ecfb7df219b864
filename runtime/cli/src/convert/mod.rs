//! `ltxc convert`: files into other files that mean the same.
//!
//! | file | what |
//! | --- | --- |
//! | `model` | a model to another layout, dtype, or with LoRAs merged into it |
//! | `lora` | a LoRA to another dialect |
//! | `map` | keys of any safetensors file by rules |
//! | `values` | elements from one dtype to another |
//! | `writer`, `space` | files written tensor by tensor, where the disk has room |
//!
//! What the layouts and dialects are is said in `ltxc_models::checkpoint::layouts` and `ltxc_models::lora`.

mod lora;
mod map;
mod model;
mod space;
mod values;
mod writer;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use ltxc_ir::DType;
use ltxc_models::checkpoint::{FileKind, WeightFile};

use crate::model_files::local;
use crate::report::Report;
use writer::Content;

/// `ltxc convert`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ltxc convert ltx-2-19b-dev.safetensors --to diffusers -o ltx-2-dev    and back with --to single
  ltxc convert ltx-2-19b-dev.safetensors --lora style.safetensors 0.8 -o styled.safetensors
  ltxc convert ltx-2-19b-dev.safetensors --dtype fp8 -o ltx-2-19b-dev-fp8.safetensors
  ltxc convert kohya.safetensors --to diffusers -o pytorch_lora_weights.safetensors
  ltxc convert theirs.safetensors --map rules.toml -o ours.safetensors

Rules (TOML or JSON) act one after the other, each on the key that those before it left:
  [[rule]]
  regex = '^blocks\\.(\\d+)\\.'          or exact = 'whole key'
  to = 'transformer_blocks.$1.'        or drop = true
  permute = [1, 0]                     axes of the result, for a transpose
  [metadata]                           strings for the header; tables become JSON
  model_version = '2.3.0'")]
pub struct ConvertArgs {
    /// Model (file, folder or hub name) or LoRA; with --map any safetensors file, or a folder with shards.
    pub input: PathBuf,
    /// File to write; for split, diffusers and peft a folder.
    #[arg(long, short, value_name = "PATH", alias = "output-path")]
    pub output: PathBuf,
    /// Layout of a model or dialect of a LoRA [default for a model: single]
    #[arg(long, value_enum)]
    pub to: Option<Target>,
    /// Store floating point like this [default: as it is]; fp8 is for the linear layers of the blocks, with scales.
    #[arg(long, value_enum)]
    pub dtype: Option<StoredAs>,
    /// Blocks that --dtype fp8 acts on [default: all but two at either end, as in published files]
    #[arg(long, value_name = "FIRST-LAST")]
    pub fp8_blocks: Option<String>,
    /// LoRA to merge into the model, repeatable: PATH, then STRENGTH if it is not 1. As a run does when it loads weights.
    #[arg(
        long,
        num_args = 1..=2,
        value_names = ["PATH", "STRENGTH"],
        action = clap::ArgAction::Append
    )]
    pub lora: Vec<String>,
    /// Go on with LoRAs that have keys which the model has nothing for.
    #[arg(long)]
    pub lora_ignore_unmatched: bool,
    /// Model whose layers a LoRA is for [default: the published ones]
    #[arg(long, value_name = "FILE", aliases = ["checkpoint", "model-path", "model"])]
    pub checkpoint_path: Option<PathBuf>,
    /// Rename keys by the rules in this file.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["to", "fp8_blocks", "lora", "lora_ignore_unmatched", "checkpoint_path"])]
    pub map: Option<PathBuf>,
    /// Fail if a rule matches no key, or a key no rule.
    #[arg(long, requires = "map")]
    pub strict: bool,
}

/// What files can be written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// A model in one file.
    Single,
    /// A model in a folder with a file for transformer, video VAE and sound.
    Split,
    /// A model in a folder with a configuration for each component; or a LoRA with the names of diffusers.
    Diffusers,
    /// A LoRA with the names of the model's authors, without alpha.
    Official,
    /// The same with alphas.
    Comfyui,
    /// A LoRA with underscores for dots, and alphas.
    Kohya,
    /// A LoRA in a folder with `adapter_config.json`.
    Peft,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Target::Single => "single",
            Target::Split => "split",
            Target::Diffusers => "diffusers",
            Target::Official => "official",
            Target::Comfyui => "comfyui",
            Target::Kohya => "kohya",
            Target::Peft => "peft",
        }
    }
}

/// How floating point is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StoredAs {
    /// 32 bits.
    F32,
    /// 16 bits with 8 bits of precision.
    Bf16,
    /// 16 bits with 11 bits of precision and numbers up to 65504.
    F16,
    /// Linear layers of the blocks in 8 bits (e4m3) with a scale each, everything else as it is.
    Fp8,
}

impl StoredAs {
    /// The dtype of elements.
    fn dtype(self) -> DType {
        match self {
            StoredAs::F32 => DType::F32,
            StoredAs::Bf16 => DType::BF16,
            StoredAs::F16 => DType::F16,
            StoredAs::Fp8 => DType::F8E4M3,
        }
    }
}

/// `ltxc convert`; `occurrences` says how many values each `--lora` had.
///
/// # Errors
/// Input that cannot be read or converted, or output that cannot be written.
pub fn run(args: &ConvertArgs, occurrences: &[usize], report: &mut Report) -> Result<()> {
    let input = local(&args.input)?;
    match &args.map {
        Some(rules) => map::run(args, &input, rules, report),
        None if is_lora(&input)? => lora::run(args, &input, report),
        None => model::run(args, &input, occurrences, report),
    }
}

/// Whether `path` holds low-rank adapters.
///
/// # Errors
/// A file that is no safetensors file.
pub(crate) fn is_lora(path: &Path) -> Result<bool> {
    if path.is_dir() {
        return Ok(["adapter_model", "pytorch_lora_weights"]
            .iter()
            .any(|n| path.join(n).with_extension("safetensors").is_file()));
    }
    Ok(FileKind::of(&WeightFile::open(path)?) == FileKind::Adapter)
}

/// Refuses to write over what is read.
fn refuse_input(output: &Path, inputs: &[PathBuf]) -> Result<()> {
    let Ok(there) = output.canonicalize() else { return Ok(()) };
    if inputs.iter().any(|input| input.canonicalize().is_ok_and(|input| input == there)) {
        bail!("`{}` is what is read; give another name to write to", output.display());
    }
    Ok(())
}

/// Bytes of a mapped file as the content of a tensor.
fn copied(data: &[u8]) -> Content<'_> {
    Box::new(move |to| Ok(to.write_all(data)?))
}
