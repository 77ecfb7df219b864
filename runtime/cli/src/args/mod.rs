//! What was typed. Names are those of the official tools where they have one; other spellings are aliases.
//!
//! Nothing is resolved here: see [`crate::job`] for what it means.

mod adapters;
mod compiler;
mod config;
mod content;
mod foreign;
mod model;
mod output;
mod sampling;
mod shape;
pub mod tables;
mod words;

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, CommandFactory, Parser, Subcommand};
use ltxc_models::synth::Preset;

use crate::convert::ConvertArgs;
use crate::debug::command::{DebugCommand, SCRIPTS};
use crate::debug::flags::DebugFlags;
use crate::debug::text::contexts::ExportArgs;
use crate::info::InfoArgs;

pub use adapters::{AdapterArgs, LoraMode, RunAdapterArgs};
pub use compiler::{CompilerArgs, FuseLevel};
pub use content::{Compat, ContentArgs, Hdr, ImageCodec};
pub use model::{ModelArgs, Variant};
pub use output::OutputArgs;
pub use sampling::{RuleName, SamplerName, SamplingArgs, ScheduleName, StgMode};
pub use shape::{DeviceChoice, PipelineName, Precision, ReferenceVersion, ShapeArgs};
pub use words::{Line, in_our_words};

/// Compile LTX-2 models ahead of time and run them.
#[derive(Debug, Parser)]
#[command(
    name = "ltxc",
    version,
    about,
    after_help = "Example:\n  ltxc demo            writes ./demo.mp4 from a tiny synthetic model"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print one JSON object per event to standard output.
    #[arg(long, global = true)]
    pub json: bool,
    /// Print nothing but results and errors.
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// The parser of the command line. A value may be a negative number everywhere, so that flags say themselves what they take.
pub fn command() -> clap::Command {
    with_negative_numbers(Cli::command())
}

/// The same parser, in which values of flags may be negative numbers.
pub fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|arg| match arg.get_action().takes_values() && !arg.is_positional() {
        true => arg.allow_negative_numbers(true),
        false => arg,
    });
    command.mut_subcommands(with_negative_numbers)
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compile a plan from model files.
    Compile(CompileArgs),
    /// Make a video from a prompt, with a plan or straight from model files.
    Run(Box<RunArgs>),
    /// Compile the kernels of a plan for a device of this machine, and store them in the plan.
    Tune(TuneArgs),
    /// Tell what a file is: model, LoRA, upsampler, text encoder, plan or GGUF; and what a run of a model would need.
    Info(Box<InfoArgs>),
    /// Show what a plan, or the graph of model files, contains.
    Inspect(InspectArgs),
    /// Show what a LoRA file contains and which models it fits.
    #[command(subcommand)]
    Lora(LoraCommand),
    /// Convert model files and LoRAs to other layouts, dtypes and dialects; merge LoRAs; rename keys.
    Convert(ConvertArgs),
    /// Write synthetic model files in the published format.
    Synth(SynthArgs),
    /// Let the text encoder write a prompt anew, in detail, and print that.
    Enhance(EnhanceArgs),
    /// Write the text contexts of a prompt to a file, for runs with --embeddings.
    EncodeText(Box<ExportArgs>),
    /// Measure how long the parts of a plan take, and how close to the limits of the device.
    Bench(BenchArgs),
    /// Make ./demo.mp4 with a tiny synthetic model.
    Demo(DemoArgs),
    /// Show devices, memory, caches and codecs of this machine.
    Doctor,
    /// Find the first tensor that is wrong.
    #[command(subcommand, after_long_help = SCRIPTS)]
    Debug(Box<DebugCommand>),
}

/// `ltxc compile`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc compile --checkpoint-path ltx-2-19b-distilled.safetensors --gemma-root gemma-3-12b \\\n    \
    --spatial-upsampler-path ltx-2-spatial-upscaler-x2-1.0.safetensors --height 512 --width 768 -o x.ltxplan"
)]
pub struct CompileArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub compiler: CompilerArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub adapters: AdapterArgs,
    /// File of flags: .toml, .json or .yaml with their names as keys; the command line wins.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Leave kernels out of the plan; otherwise it carries those of a GPU that is chosen or named by number.
    #[arg(long)]
    pub no_kernels: bool,
    /// Where to write the plan.
    #[arg(long, short, value_name = "FILE", default_value = "model.ltxplan", alias = "output-path")]
    pub output: PathBuf,
}

/// `ltxc tune`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc tune x.ltxplan --device cuda:0   runs of x.ltxplan on this GPU compile nothing"
)]
pub struct TuneArgs {
    /// Plan made by `ltxc compile`.
    pub plan: PathBuf,
    /// Device: auto, cuda:N, vulkan:N or metal
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Where to write the plan [default: where it is]
    #[arg(long, short, value_name = "FILE", alias = "output-path")]
    pub output: Option<PathBuf>,
}

/// `ltxc run`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc run x.ltxplan --weights models/ --prompt \"a red fox in deep snow\" -o fox.mp4"
)]
pub struct RunArgs {
    /// Plan made by `ltxc compile`; without one, model files are compiled into the cache first. The name of a pipeline and the
    /// prompt may stand here, too.
    pub plan: Option<PathBuf>,
    /// Folder with the weight files of the plan; may be repeated.
    #[arg(long, value_name = "DIR")]
    pub weights: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub content: ContentArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub adapters: RunAdapterArgs,
    /// Output: .mp4, .wav, or a folder for PNG or EXR frames and a WAV file [default: out.mp4, out.wav for sound, out for EXR]
    #[arg(long, short, value_name = "PATH", aliases = ["output-path", "output-dir"])]
    pub output: Option<PathBuf>,
    /// File of flags: .toml, .json or .yaml with their names as keys; the command line wins.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Fail rather than compile a kernel: use those that the plan carries.
    #[arg(long)]
    pub frozen: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub writing: OutputArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub debug: DebugFlags,
}

/// `ltxc inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Plan to show; without one, the graph of the model files.
    pub plan: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub shape: ShapeArgs,
    /// Print the IR text: kernel calls of a plan, ops of model files.
    #[arg(long)]
    pub graph: bool,
    /// Print the text of the kernels that a plan carries.
    #[arg(long, conflicts_with = "graph")]
    pub kernels: bool,
    /// Write a page that draws the plan: steps, memory over time, and the roofline of every kernel.
    #[arg(long, value_name = "FILE", requires = "plan")]
    pub html: Option<PathBuf>,
    /// Ceiling of the roofline in GFLOP/s.
    #[arg(long, value_name = "N", default_value_t = 500.0, requires = "html")]
    pub peak_gflops: f64,
    /// Memory bandwidth of the roofline in GB/s.
    #[arg(long, value_name = "N", default_value_t = 40.0, requires = "html")]
    pub peak_gbytes: f64,
}

/// `ltxc lora`.
#[derive(Debug, Subcommand)]
pub enum LoraCommand {
    /// Dialect, ranks, alphas, layers and header of a LoRA file, and whether it fits a model.
    Inspect(LoraInspectArgs),
}

/// `ltxc lora inspect`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  ltxc lora inspect my-lora.safetensors --checkpoint-path ltx-2-19b-dev.safetensors")]
pub struct LoraInspectArgs {
    /// LoRA file, or folder with one.
    pub file: PathBuf,
    /// Model to compare with; without one, the published ones.
    #[arg(long, value_name = "FILE", aliases = ["checkpoint", "model-path", "model"])]
    pub checkpoint_path: Option<PathBuf>,
    /// Read the whole file, and tell the norm of what it adds to every layer.
    #[arg(long)]
    pub norms: bool,
}

/// `ltxc synth`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc synth --preset ltx-2-19b models/   writes sparse files of full size in a second"
)]
pub struct SynthArgs {
    /// Model to write; the full-size ones have real shapes and no data.
    #[arg(long, value_parser = preset_parser())]
    pub preset: Preset,
    /// Folder to write into.
    pub dir: PathBuf,
}

/// `ltxc enhance`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ltxc enhance --gemma-root gemma-3-12b --prompt \"a red fox in deep snow\"")]
pub struct EnhanceArgs {
    /// Folder of the Gemma text encoder, or its hub name.
    #[arg(long, value_name = "DIR", aliases = ["gemma-path", "text-encoder", "gemma"])]
    pub gemma_root: PathBuf,
    /// What to show; `-` reads standard input, `@FILE` a file.
    #[arg(long, short)]
    pub prompt: String,
    /// Seed of the words that are drawn, or `random`.
    #[arg(long, default_value = "42")]
    pub seed: String,
    /// Image that the video begins with, which the text encoder looks at.
    #[arg(long, value_name = "FILE", conflicts_with = "image_to_video")]
    pub image: Option<PathBuf>,
    /// For a video that begins with an image which the text encoder does not see: leave its looks to it.
    #[arg(long)]
    pub image_to_video: bool,
    /// Device: auto, cpu, cuda:N, vulkan:N or metal
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
}

/// `ltxc bench`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ltxc bench x.ltxplan --weights models/ --only stage1\n  \
    ltxc bench --checkpoint-path ltx-2-19b-distilled.safetensors --gemma-root gemma-3-12b -H 512 -W 768 --levels --rounds 9")]
pub struct BenchArgs {
    /// Plan made by `ltxc compile`; without one, model files are compiled.
    pub plan: Option<PathBuf>,
    /// Folder with the weight files of the plan; may be repeated [default: the plan's]
    #[arg(long, value_name = "DIR")]
    pub weights: Vec<PathBuf>,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// Warm runs of each program; the median counts. From 6 on, gains of fusion have an interval of confidence.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Measure one part only, for example stage1 or decode.
    #[arg(long, value_name = "PART")]
    pub only: Option<String>,
    /// Compile model files at every level of fusion, too, and measure every part at each in turns: what fusion gains.
    #[arg(long)]
    pub levels: bool,
    /// Also draw what was measured, as a page that needs nothing else.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub shape: ShapeArgs,
}

/// `ltxc demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where to write the video.
    #[arg(long, short, default_value = "demo.mp4")]
    pub output: PathBuf,
}

fn preset_parser() -> impl TypedValueParser<Value = Preset> {
    let names = PossibleValuesParser::new(Preset::ALL.map(Preset::name));
    // The parser before has accepted the name, so there is a preset of it.
    names.map(|name| Preset::from_name(&name).unwrap_or(Preset::Tiny))
}
