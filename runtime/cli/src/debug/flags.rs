//! Flags about what is logged of programs while they run.
//!
//! [`LogFlags`] are those of every command that runs a part of a model; [`DebugFlags`] those of whole pipelines, which have
//! stages and steps, too. [`crate::debug::options`] says what they mean together with the environment.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use ltxc_compiler::Options;

use crate::compile::unfused;

/// Flags about what is logged of programs. All off by default, and then nothing of this costs anything.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "Logs of what is computed (see `ltxc help debug`)")]
pub struct LogFlags {
    /// Capture values by name, `*` for any characters: 'transformer.blocks.*.attn1'; repeatable.
    #[arg(long, value_name = "GLOB", num_args = 1.., hide_short_help = true)]
    pub tap: Vec<String>,
    /// Values not to capture, though --tap names them; repeatable.
    #[arg(long, value_name = "GLOB", num_args = 1.., hide_short_help = true)]
    pub tap_exclude: Vec<String>,
    /// Capture values in whose names this regular expression is found: 'blocks\.7\.attn'.
    #[arg(long, value_name = "REGEX", hide_short_help = true)]
    pub dump_tensors: Option<String>,
    /// Where captured values go; a safetensors file. Without it, a line of statistics for each goes to standard error.
    #[arg(long, value_name = "FILE", visible_alias = "dump-tensors-path", hide_short_help = true)]
    pub tap_path: Option<PathBuf>,
    /// Sums of prepared inputs and of every block, for each call of the transformer, and of text features.
    #[arg(long, hide_short_help = true)]
    pub debug_model_sums: bool,
    /// File for them.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_model_sums_path: Option<PathBuf>,
    /// Sums of every attention and feed-forward layer of every block of the transformer.
    #[arg(long, hide_short_help = true)]
    pub debug_model_detail: bool,
    /// File for them.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_model_detail_path: Option<PathBuf>,
    /// File for sums of every hidden state of the text encoder.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_gemma_path: Option<PathBuf>,
    /// Sums of every module that owns weights.
    #[arg(long, hide_short_help = true)]
    pub debug_module_sums: bool,
    /// File for them.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_module_sums_path: Option<PathBuf>,
    /// Only modules whose names contain one of these: transformer, text_encoder, vae …
    #[arg(long, value_name = "TEXT", num_args = 1.., hide_short_help = true)]
    pub debug_module_sums_include: Vec<String>,
    /// No modules whose names contain one of these.
    #[arg(long, value_name = "TEXT", num_args = 1.., hide_short_help = true)]
    pub debug_module_sums_exclude: Vec<String>,
    /// How module sums are written [default: ltxc]
    #[arg(long, value_enum, hide_short_help = true)]
    pub debug_module_sums_format: Option<ModuleFormat>,
    /// How logs are written [default: text]
    #[arg(long, value_enum, hide_short_help = true)]
    pub debug_format: Option<LogFormat>,
    /// What lines begin with [default: ltxc]
    #[arg(long, value_enum, hide_short_help = true)]
    pub debug_prefix: Option<LogPrefix>,
    /// Go on at the end of log files that exist, instead of beginning anew.
    #[arg(long, hide_short_help = true)]
    pub debug_append: bool,
    /// Sums in f64 beside those in f32, in fields that end in `_f64`.
    #[arg(long, hide_short_help = true)]
    pub debug_f64: bool,
    /// Statistics of activations as JSON lines.
    #[arg(long, hide_short_help = true)]
    pub trace_activations: bool,
    /// Modules to trace: a regular expression that is searched for in their names.
    #[arg(long, value_name = "REGEX", hide_short_help = true)]
    pub trace_layers: Option<String>,
    /// Statistics to trace: abs_mean, sum, min, max, mean, std, shape, dtype [default: abs_mean,sum]
    #[arg(long, value_name = "LIST", value_delimiter = ',', hide_short_help = true)]
    pub trace_stats: Vec<String>,
    /// File for the trace; `<pid>` becomes the number of the process.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub trace_output: Option<PathBuf>,
    /// Names of modules in traces [default: checkpoint]
    #[arg(long, value_enum, hide_short_help = true)]
    pub trace_names: Option<TraceNames>,
    /// Look for NaN and infinity behind every kernel, and stop at the first.
    #[arg(long, hide_short_help = true)]
    pub check_nan: bool,
    /// Time every kernel, and write a profile for Perfetto or chrome://tracing.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub profile: Option<PathBuf>,
}

/// Flags about what the run of a pipeline logs.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "Logs of a pipeline (see `ltxc help debug`)")]
pub struct DebugFlags {
    /// Which values there are: those of fused kernels, or every value of the graph, without fusion [default: fused]
    #[arg(long, value_enum, hide_short_help = true)]
    pub debug_mode: Option<DebugMode>,
    /// A line of sums after each stage; of a stage in tiles after each tile, behind `# tile=N`, and of all of them.
    #[arg(long, hide_short_help = true)]
    pub debug_stage_sums: bool,
    /// File for them, instead of standard error.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_stage_sums_path: Option<PathBuf>,
    /// Steps to trace, from 0; all without it.
    #[arg(long, value_name = "LIST", value_delimiter = ',', hide_short_help = true)]
    pub trace_steps: Vec<usize>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub logs: LogFlags,
}

impl DebugFlags {
    /// The flags for a command that was asked to run single graphs and no pipeline.
    ///
    /// # Errors
    /// A flag about stages or steps.
    pub fn of_graphs(&self) -> Result<&LogFlags> {
        let given = [
            (self.debug_mode.is_some(), "--debug-mode"),
            (self.debug_stage_sums, "--debug-stage-sums"),
            (self.debug_stage_sums_path.is_some(), "--debug-stage-sums-path"),
            (!self.trace_steps.is_empty(), "--trace-steps"),
        ];
        match given.iter().find(|(is_given, _)| *is_given) {
            Some((_, flag)) => {
                bail!("`{flag}` is about runs of pipelines; name one with `--pipeline`, or leave it out")
            }
            None => Ok(&self.logs),
        }
    }
}

/// Which values can be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DebugMode {
    /// Those at the boundaries of fused kernels; outputs are the same to the bit.
    #[default]
    Fused,
    /// All of the graph: nothing is fused or packed.
    Exact,
}

impl DebugMode {
    /// Options of the compiler for it.
    pub fn compiler(self) -> Options {
        match self {
            DebugMode::Fused => Options::default(),
            DebugMode::Exact => unfused(),
        }
    }
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// Lines as FastVideo writes them.
    #[default]
    Text,
    /// JSON objects, one a line.
    Jsonl,
    /// Both: JSON goes to the file with `.jsonl` behind its name.
    Both,
}

/// What log lines begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogPrefix {
    /// `ltxc:`
    #[default]
    Ltxc,
    /// `fastvideo:`, with that tool's names of stages.
    Fastvideo,
}

impl LogPrefix {
    /// The word itself.
    pub fn text(self) -> &'static str {
        match self {
            LogPrefix::Ltxc => "ltxc",
            LogPrefix::Fastvideo => "fastvideo",
        }
    }
}

/// How module sums are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ModuleFormat {
    /// `ltxc:module=<component>.<path>:out_sum=… shape=… dtype=…`
    #[default]
    Ltxc,
    /// JSON lines as FastVideo's activation trace.
    FastvideoTrace,
}

/// Names of modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum TraceNames {
    /// As weights stand in published checkpoints: `model.diffusion_model.transformer_blocks.0.attn1`.
    #[default]
    Checkpoint,
    /// `model.transformer_blocks.0.attn1`.
    Fastvideo,
    /// `transformer_blocks.0.attn1`.
    Diffusers,
}
