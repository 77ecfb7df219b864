//! Flags for low-rank adapters.

use clap::{Args, ValueEnum};

/// Low-rank adapters.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Adapters (LoRA)")]
pub struct AdapterArgs {
    /// LoRA, repeatable: PATH, then STRENGTH if it is not 1, then stage=1 or stage=2 if it is not for all.
    #[arg(
        long,
        num_args = 1..=3,
        value_names = ["PATH", "STRENGTH", "STAGE"],
        action = clap::ArgAction::Append,
        aliases = ["lora-path", "hdr-lora", "ic-lora-weights"]
    )]
    pub lora: Vec<String>,
    /// Strength of LoRAs that have none of their own [default: 1]
    #[arg(long, value_name = "STRENGTH", hide_short_help = true, requires = "lora")]
    pub lora_strength: Option<f64>,
    /// LoRA that makes a dev model act like a distilled one: PATH, then STRENGTH if it is not 1.
    #[arg(
        long,
        num_args = 1..=2,
        value_names = ["PATH", "STRENGTH"],
        aliases = ["ltx2-refine-lora-path", "refine-lora-path"]
    )]
    pub distilled_lora: Vec<String>,
    /// Its strength, where that is not behind its path [default: 1]
    #[arg(
        long,
        value_name = "STRENGTH",
        hide_short_help = true,
        requires = "distilled_lora",
        alias = "distilled-lora-scale"
    )]
    pub distilled_lora_strength: Option<f64>,
    /// Strength of the distilled LoRA in stage 1, where that stage has it.
    #[arg(long, value_name = "STRENGTH", requires = "distilled_lora")]
    pub distilled_lora_strength_stage_1: Option<f64>,
    /// Strength of the distilled LoRA in stage 2, where that stage has it.
    #[arg(long, value_name = "STRENGTH", requires = "distilled_lora")]
    pub distilled_lora_strength_stage_2: Option<f64>,
    /// Go on with LoRAs that have keys which the model has nothing for.
    #[arg(long)]
    pub lora_ignore_unmatched: bool,
}

/// Low-rank adapters of a run, and how they act.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Adapters (LoRA)")]
pub struct RunAdapterArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub adapters: AdapterArgs,
    /// How LoRAs act [default: live if the plan has room for it]
    #[arg(long, value_enum)]
    pub lora_mode: Option<LoraMode>,
}

/// How LoRAs act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoraMode {
    /// Added to the weights when these are loaded, as the reference does.
    #[value(alias = "fuse")]
    Merged,
    /// Computed beside each layer, in plans compiled with --lora-rank.
    #[value(alias = "side")]
    Live,
}
