//! What was typed. Names are those of the official tools where they have one; other spellings are aliases.
//!
//! Nothing is resolved here: see [`crate::job`] for what it means.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ltxc_models::synth::Preset;
use ltxc_runtime::backend::DeviceName;
use ltxc_runtime::experiments::Experiment;

use crate::debug::command::{DebugCommand, SCRIPTS};
use crate::debug::flags::DebugFlags;

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

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compile a plan from model files.
    Compile(CompileArgs),
    /// Make a video from a prompt, with a plan or straight from model files.
    Run(Box<RunArgs>),
    /// Compile the kernels of a plan for a device of this machine, and store them in the plan.
    Tune(TuneArgs),
    /// Show what a plan, or the graph of model files, contains.
    Inspect(InspectArgs),
    /// Show what a LoRA file contains and which models it fits.
    #[command(subcommand)]
    Lora(LoraCommand),
    /// Write synthetic model files in the published format.
    Synth(SynthArgs),
    /// Let the text encoder write a prompt anew, in detail, and print that.
    Enhance(EnhanceArgs),
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

/// Model files.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Model files (path, or hub name looked up in the local cache)")]
pub struct ModelArgs {
    /// Model: a single file, a folder with model_index.json, or `org/name[:file]`.
    #[arg(long, value_name = "FILE", aliases = ["checkpoint", "model-path", "model", "distilled-checkpoint-path"])]
    pub checkpoint_path: Option<PathBuf>,
    /// Folder of the Gemma text encoder.
    #[arg(long, value_name = "DIR", aliases = ["gemma-path", "text-encoder", "gemma"])]
    pub gemma_root: Option<PathBuf>,
    /// Spatial upscaler, needed by pipelines of two stages.
    #[arg(long, value_name = "FILE", alias = "spatial-upsampler")]
    pub spatial_upsampler_path: Option<PathBuf>,
    /// Compare complete hashes of weight files instead of samples.
    #[arg(long)]
    pub verify: bool,
}

/// What is fixed when a plan is compiled.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Shape")]
pub struct ShapeArgs {
    /// Pipeline [default: distilled]
    #[arg(long, value_enum)]
    pub pipeline: Option<PipelineName>,
    /// Height in pixels [default: 1024, or 512 for one stage]
    #[arg(long, short = 'H')]
    pub height: Option<u32>,
    /// Width in pixels [default: 1536, or 768 for one stage]
    #[arg(long, short = 'W')]
    pub width: Option<u32>,
    /// Both at once, as WIDTHxHEIGHT.
    #[arg(long, value_name = "WxH", conflicts_with_all = ["height", "width"])]
    pub size: Option<String>,
    /// Number of frames, 8k+1 [default: 121, or what a clip has; for hdr-ic-lora at most 161]
    #[arg(long, alias = "frames")]
    pub num_frames: Option<u32>,
    /// Length in seconds instead, which is rounded down to 8k+1 frames.
    #[arg(long, conflicts_with = "num_frames")]
    pub seconds: Option<f64>,
    /// Frames per second, a number or a fraction like 24000/1001 [default: 24]
    #[arg(long, alias = "fps")]
    pub frame_rate: Option<String>,
    /// Images behind frame 0 that a run may give [default: 0, or what --image needs]
    #[arg(long)]
    pub max_keyframes: Option<u32>,
    /// Leave out the second stage of pipeline ic-lora; the video has half the size given.
    #[arg(long, alias = "single-stage")]
    pub skip_stage_2: bool,
    /// Reference videos that a run gives [default: 1, or what --video-conditioning needs]
    #[arg(long, value_name = "N")]
    pub reference_count: Option<u32>,
    /// Let a run say how strongly reference videos act, everywhere or with a mask [default: if it does]
    #[arg(long)]
    pub reference_attention: bool,
    /// Release of the reference implementation whose results are given; LoRAs named here run live with 1.0.0 [default: 1.2.0]
    #[arg(long, value_enum, value_name = "VERSION")]
    pub reference_version: Option<ReferenceVersion>,
    /// Device: auto, cpu, cuda:N, vulkan:N or metal; compile for any one with cuda or vulkan alone
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Make a silent video, without the part of the model that makes sound.
    #[arg(long)]
    pub no_audio: bool,
    /// Tiles of the video decoder: auto, off, or SIZExOVERLAP,FRAMESxOVERLAP in pixels and frames [default: auto]
    #[arg(long)]
    pub vae_tile: Option<String>,
    /// Room for live LoRAs, whose ranks add up to this at most; without, LoRAs are merged into the weights [default: 0]
    #[arg(long, value_name = "RANK")]
    pub lora_rank: Option<u32>,
    /// Let the text encoder write the prompt anew, in detail, before it is encoded.
    #[arg(long)]
    pub enhance_prompt: bool,
    /// Other tools quantise weights when they load them; here weights are used as they are stored.
    #[arg(long, value_name = "MODE", hide = true, alias = "quant")]
    pub quantization: Option<String>,
    /// Arithmetic of activations; bf16 and f16 take less memory, not less time on a CPU [default: f32]
    #[arg(long, value_enum)]
    pub dtype: Option<Precision>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
}

/// Sampling and guidance. A plan is compiled for passes, skipped steps and blocks; scales can be changed in a run.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "Sampling and guidance (defaults are the model's; compile and run with the same)")]
pub struct SamplingArgs {
    /// Sampler of the first stage [default: the pipeline's]
    #[arg(long, value_enum)]
    pub sampler: Option<SamplerName>,
    /// Extrapolation of gradient estimation, which this chooses as the sampler [default: 2]
    #[arg(long)]
    pub ge_gamma: Option<f64>,
    /// Noise levels of the first stage [default: the pipeline's]
    #[arg(long, value_enum)]
    pub schedule: Option<ScheduleName>,
    /// Scale of video against the negative prompt, 1 for none.
    #[arg(long = "video-cfg-guidance-scale", value_name = "SCALE", aliases = ["cfg", "cfg-scale", "guidance-scale"])]
    pub cfg: Option<f64>,
    /// The same for sound.
    #[arg(long = "audio-cfg-guidance-scale", value_name = "SCALE", alias = "cfg-audio")]
    pub cfg_audio: Option<f64>,
    /// How the difference from the negative prompt is used [default: plain]
    #[arg(long, value_enum)]
    pub cfg_rule: Option<RuleName>,
    /// Scale of video against a pass without self attention in some blocks (STG), 0 for none.
    #[arg(long = "video-stg-guidance-scale", value_name = "SCALE", aliases = ["stg", "stg-scale"])]
    pub stg: Option<f64>,
    /// The same for sound.
    #[arg(long = "audio-stg-guidance-scale", value_name = "SCALE", alias = "stg-audio")]
    pub stg_audio: Option<f64>,
    /// What the scale of STG holds for [default: video; sound has a scale of its own]
    #[arg(long, value_enum, value_name = "MODALITY")]
    pub stg_mode: Option<StgMode>,
    /// Blocks in which that pass leaves out self attention of video.
    #[arg(long = "video-stg-blocks", value_name = "BLOCKS", value_delimiter = ',', alias = "stg-blocks")]
    pub stg_blocks: Option<Vec<u32>>,
    /// Blocks in which it leaves out self attention of sound.
    #[arg(long = "audio-stg-blocks", value_name = "BLOCKS", value_delimiter = ',', alias = "stg-blocks-audio")]
    pub stg_blocks_audio: Option<Vec<u32>>,
    /// Scale of video against a pass in which it does not hear the sound, 1 for none.
    #[arg(long = "a2v-guidance-scale", value_name = "SCALE", alias = "modality")]
    pub modality: Option<f64>,
    /// Scale of sound against a pass in which it does not see the video.
    #[arg(long = "v2a-guidance-scale", value_name = "SCALE", alias = "modality-audio")]
    pub modality_audio: Option<f64>,
    /// How far guided video returns to its contrast without guidance, 0 to 1.
    #[arg(long = "video-rescale-scale", value_name = "SHARE", aliases = ["rescale", "guidance-rescale"])]
    pub rescale: Option<f64>,
    /// The same for sound.
    #[arg(long = "audio-rescale-scale", value_name = "SHARE", alias = "rescale-audio")]
    pub rescale_audio: Option<f64>,
    /// Steps of video that reuse the prediction of each one that is computed.
    #[arg(long, value_name = "STEPS")]
    pub video_skip_step: Option<u32>,
    /// The same for sound.
    #[arg(long, value_name = "STEPS")]
    pub audio_skip_step: Option<u32>,
    /// Projected guidance: factor of the part along the prediction [default: 1]
    #[arg(long, value_name = "FACTOR")]
    pub apg_eta: Option<f64>,
    /// Projected guidance: largest norm of the difference, 0 for any [default: 0, or 5 with momentum]
    #[arg(long, value_name = "NORM")]
    pub apg_norm_threshold: Option<f64>,
    /// Projected guidance: share of earlier differences; not 0, the scale counts in full [default: 0]
    #[arg(long, value_name = "SHARE")]
    pub apg_momentum: Option<f64>,
}

/// What one scale of STG holds for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StgMode {
    /// Video alone.
    Video,
    /// Sound alone.
    Audio,
    /// Both.
    Both,
}

/// Samplers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SamplerName {
    /// Euler.
    Euler,
    /// Ancestral Euler, with fresh noise in every step.
    #[value(name = "euler-a")]
    Ancestral,
    /// Second order with fresh noise, two evaluations a step.
    Res2s,
    /// Euler along an extrapolated velocity.
    #[value(name = "ge")]
    GradientEstimation,
    /// Ancestral Euler along the direction of the negative prompt.
    #[value(name = "cfg-pp")]
    CfgPlusPlus,
}

/// Schedules of noise levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScheduleName {
    /// Even, shifted towards noise.
    Ltx2,
    /// Even, then falling faster.
    LinearQuadratic,
    /// Quantiles of a beta distribution.
    Beta,
    /// Those of distilled models.
    Distilled,
}

/// Ways to use the difference from the negative prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RuleName {
    /// As it is.
    Plain,
    /// Against the nearest multiple of the negative prediction (CFG*).
    Star,
    /// Its part along the prediction is scaled (adaptive projected guidance).
    Apg,
}

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
        allow_negative_numbers = true,
        aliases = ["lora-path", "hdr-lora"]
    )]
    pub lora: Vec<String>,
    /// LoRA that makes a dev model act like a distilled one: PATH, then STRENGTH if it is not 1.
    #[arg(long, num_args = 1..=2, value_names = ["PATH", "STRENGTH"], allow_negative_numbers = true)]
    pub distilled_lora: Vec<String>,
    /// Strength of the distilled LoRA in stage 1, where that stage has it.
    #[arg(long, value_name = "STRENGTH", allow_negative_numbers = true)]
    pub distilled_lora_strength_stage_1: Option<f64>,
    /// Strength of the distilled LoRA in stage 2, where that stage has it.
    #[arg(long, value_name = "STRENGTH", allow_negative_numbers = true)]
    pub distilled_lora_strength_stage_2: Option<f64>,
    /// Go on with LoRAs that have keys which the model has nothing for.
    #[arg(long)]
    pub lora_ignore_unmatched: bool,
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

/// Dtypes that activations can be computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with 8 bits of precision, as the reference runs on a GPU. Sums are f32 all the same.
    Bf16,
    /// 16 bits with 11 bits of precision and numbers up to 65504. The text encoder, whose states are larger, stays f32.
    F16,
}

/// What to run on, or to compile for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The fastest device of this machine, or the fastest that runs the plan.
    Auto,
    /// This one.
    Named(DeviceName),
}

/// For callers of the library, whom the devices of a machine should not surprise; the command line says `auto`.
impl Default for DeviceChoice {
    fn default() -> Self {
        DeviceChoice::Named(DeviceName::Cpu)
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            name => name.parse().map(DeviceChoice::Named),
        }
    }
}

/// Releases of the reference implementation that compute different things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReferenceVersion {
    /// The first one, as published on PyPI.
    #[value(name = "1.0.0")]
    V1_0_0,
    /// The one that everything else here follows.
    #[value(name = "1.2.0")]
    V1_2_0,
}

/// Pipelines that can be compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum PipelineName {
    /// Distilled model, two stages: half size, latent upscaling, full size.
    #[default]
    #[value(alias = "generate")]
    Distilled,
    /// Distilled, one stage at full size.
    #[value(alias = "text-to-video")]
    DistilledOneStage,
    /// Full model, guided, one stage at full size.
    #[value(alias = "ti2vid_one_stage")]
    OneStage,
    /// Full model with its distilled LoRA, two stages: guided at half size, latent upscaling, full size.
    #[value(alias = "ti2vid_two_stages")]
    TwoStage,
    /// The same with a sampler of second order and more pixels, for the best quality.
    #[value(name = "hq", aliases = ["two-stage-hq", "ti2vid_two_stages_hq"])]
    HighQuality,
    /// Full model with its distilled LoRA, two stages: every image is a keyframe that the video passes through.
    #[value(aliases = ["keyframe", "keyframe_interpolation"])]
    Keyframes,
    /// Full model with its distilled LoRA, two stages: a video for a recording, which is kept.
    #[value(name = "a2v", aliases = ["a2vid_two_stage", "audio-to-video"])]
    AudioToVideo,
    /// Distilled, two stages, the first one guided by reference videos through an IC-LoRA.
    #[value(alias = "ic_lora")]
    IcLora,
    /// The first stage of that alone, at the size given.
    #[value(skip)]
    IcLoraOneStage,
    /// Distilled, a part of a clip is made anew.
    Retake,
    /// Full model, guided, a part of a clip is made anew.
    RetakeGuided,
    /// Full model, guided, sound alone.
    #[value(name = "t2a", aliases = ["t2a_one_stage", "text-to-audio"])]
    TextToAudio,
    /// Distilled with the Dub-It LoRA, two stages: a clip is spoken anew, in its own voice.
    #[value(name = "dubit", alias = "lipdub")]
    Dub,
    /// Distilled with the HDR IC-LoRA, two stages, the second one in tiles: a video gets a high dynamic range, without sound.
    #[value(alias = "hdr_ic_lora")]
    HdrIcLora,
}

/// What the compiler does.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Compiler")]
pub struct CompilerArgs {
    /// Level of fusion [default: full]
    #[arg(long, value_enum)]
    pub fuse: Option<FuseLevel>,
    /// Leave out a pass; may be repeated.
    #[arg(long, value_name = "PASS", value_parser = pass_names())]
    pub disable: Vec<String>,
    /// Print the graph of every program after a pass; may be repeated.
    #[arg(long, value_name = "PASS", value_parser = pass_names())]
    pub print_after: Vec<String>,
}

/// Levels of fusion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum FuseLevel {
    /// One kernel per primitive, for comparison.
    None,
    /// One kernel per composite, as an eager framework runs.
    Composite,
    /// As few kernels as possible.
    #[default]
    Full,
}

/// Names of the compiler's passes.
fn pass_names() -> impl TypedValueParser<Value = String> {
    let mut names: Vec<&'static str> = ltxc_compiler::passes().iter().map(|p| p.name).collect();
    names.sort_unstable();
    names.dedup();
    PossibleValuesParser::new(names)
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
    /// Plan made by `ltxc compile`; without one, model files are compiled into the cache first.
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
    pub adapters: AdapterArgs,
    /// How LoRAs act [default: live if the plan has room for it]
    #[arg(long, value_enum)]
    pub lora_mode: Option<LoraMode>,
    /// Output: .mp4, .wav, or a folder for PNG or EXR frames and a WAV file.
    #[arg(long, short, value_name = "PATH", default_value = "out.mp4", aliases = ["output-path", "output-dir"])]
    pub output: PathBuf,
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

/// How outputs are written.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Quality of the video on x264's scale, 0 to 51; lower is better and larger [default: 19]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=51))]
    pub crf: Option<u8>,
    /// Write whole frames per second, rounded down, as the reference does; a fractional rate then drifts from the sound.
    #[arg(long)]
    pub integer_fps: bool,
    /// Write how the output was made into a file beside it, `<OUTPUT>.json`.
    #[arg(long)]
    pub save_json: bool,
    /// Leave prompt and seed out of the output's metadata.
    #[arg(long)]
    pub no_metadata: bool,
}

/// What a run may choose freely.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Content")]
pub struct ContentArgs {
    /// What to show; `-` reads standard input, `@FILE` a file.
    #[arg(long, short, required_unless_present_any = ["jobs", "embeddings"])]
    pub prompt: Option<String>,
    /// Text contexts made elsewhere, instead of prompts: .safetensors, .npz or .pt, as `ltxc debug text export` writes them.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "negative_prompt"], alias = "text-embeddings")]
    pub embeddings: Option<PathBuf>,
    /// Many runs: tables `[[job]]` (.toml) or a JSON object per line (.jsonl), with the names of flags as keys.
    #[arg(long, value_name = "FILE")]
    pub jobs: Option<PathBuf>,
    /// What not to show, for guided pipelines; `@FILE` reads a file [default: a text for every picture]
    #[arg(long)]
    pub negative_prompt: Option<String>,
    /// Seed of all noise, or `random`.
    #[arg(long, default_value = "10")]
    pub seed: String,
    /// Image to start from or pass through, repeatable: PATH, then FRAME, STRENGTH and CRF if they are not 0, 1 and the model's.
    #[arg(long, num_args = 1..=4, value_names = ["PATH", "FRAME", "STRENGTH", "CRF"], action = clap::ArgAction::Append)]
    pub image: Vec<String>,
    /// Reference video of pipelines ic-lora and hdr-ic-lora, repeatable: PATH, then STRENGTH if it is not 1.
    #[arg(
        long,
        num_args = 1..=2,
        value_names = ["PATH", "STRENGTH"],
        action = clap::ArgAction::Append,
        alias = "input"
    )]
    pub video_conditioning: Vec<String>,
    /// How strongly reference videos act, 0 to 1 [default: 1]
    #[arg(long, value_name = "STRENGTH", alias = "conditioning-strength")]
    pub conditioning_attention_strength: Option<f32>,
    /// Video whose brightness says where they act: PATH, then STRENGTH if it is not 1.
    #[arg(long, num_args = 1..=2, value_names = ["PATH", "STRENGTH"])]
    pub conditioning_attention_mask: Vec<String>,
    /// Clip that pipeline dubit speaks anew: H.264 in MP4 or MOV with sound, or what ffmpeg reads.
    #[arg(long, value_name = "PATH")]
    pub reference_video: Option<PathBuf>,
    /// How closely its picture is followed, 0 to 1 [default: 1]
    #[arg(long, value_name = "STRENGTH")]
    pub reference_strength: Option<f64>,
    /// Recording that a2v makes the video for: WAV, FLAC, MP3, AAC, the sound of a video, or what ffmpeg reads.
    #[arg(long, value_name = "PATH", alias = "audio")]
    pub audio_path: Option<PathBuf>,
    /// Where it starts, in seconds [default: 0]
    #[arg(long, value_name = "SECONDS", alias = "audio-start")]
    pub audio_start_time: Option<f64>,
    /// How much of it is used at most, in seconds [default: the length of the video]
    #[arg(long, value_name = "SECONDS")]
    pub audio_max_duration: Option<f64>,
    /// Clip of which a part is made anew: H.264 in MP4 or MOV, a folder of images, or what ffmpeg reads.
    #[arg(long, value_name = "PATH")]
    pub video_path: Option<PathBuf>,
    /// Clip and references are EXR frames, whose numbers are these; EXR frames are written too, into a folder.
    #[arg(long, value_enum, value_name = "SPACE", ignore_case = true)]
    pub hdr: Option<Hdr>,
    /// Where that part begins, in seconds [default: 0]
    #[arg(long, value_name = "SECONDS")]
    pub start_time: Option<f64>,
    /// Where it ends, in seconds [default: with the clip]
    #[arg(long, value_name = "SECONDS")]
    pub end_time: Option<f64>,
    /// Make only the sound of that part anew.
    #[arg(long)]
    pub keep_video: bool,
    /// Make only the picture of that part anew.
    #[arg(long)]
    pub keep_audio: bool,
    /// Steps of the first stage; of a distilled model fewer than its own.
    #[arg(long, alias = "steps")]
    pub num_inference_steps: Option<usize>,
    /// Noise levels of the first stage, from at most 1 down to 0.
    #[arg(long, value_delimiter = ',')]
    pub sigmas: Option<Vec<f32>>,
    /// Noise levels of the second stage.
    #[arg(long, value_delimiter = ',')]
    pub sigmas_stage2: Option<Vec<f32>>,
    /// Guidance by noise level: tables `[[level]]` (.toml) with `up_to` and flags of guidance.
    #[arg(long, value_name = "FILE")]
    pub guidance_table: Option<PathBuf>,
    /// Noise of stage 1, video: read if the file exists, else written.
    #[arg(long, value_name = "FILE")]
    pub ltx2_initial_latent_path: Option<PathBuf>,
    /// Noise of stage 1, sound.
    #[arg(long, value_name = "FILE")]
    pub ltx2_audio_latent_path: Option<PathBuf>,
    /// Noise of stage 2, video.
    #[arg(long, value_name = "FILE")]
    pub ltx2_refine_noise_path: Option<PathBuf>,
    /// Noise of stage 2, sound.
    #[arg(long, value_name = "FILE")]
    pub ltx2_refine_audio_noise_path: Option<PathBuf>,
    /// Codec for the H.264 round trip of images.
    #[arg(long, value_enum, default_value_t)]
    pub image_codec: ImageCodec,
    /// Folder for the noise of all stages: files in it are read, missing ones are written.
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = [
            "ltx2_initial_latent_path", "ltx2_audio_latent_path", "ltx2_refine_noise_path", "ltx2_refine_audio_noise_path"
        ]
    )]
    pub noise_bundle: Option<PathBuf>,
    /// Decode without the noise that some decoders add to latents.
    #[arg(long, hide_short_help = true)]
    pub no_decode_noise: bool,
    /// Deviate from the model, not a fix of anything; repeatable: placeholder-latents=zero|noise, early-text-layers=N,
    /// cross-attn-scale=S@FROM. The output is marked.
    #[arg(long, value_name = "NAME[=VALUE]", hide_short_help = true)]
    pub experiment: Vec<Experiment>,
    /// Go on with latents or frames that are NaN, infinite or constant.
    #[arg(long)]
    pub allow_bad_numerics: bool,
}

/// What the numbers of EXR frames are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Hdr {
    /// Light, primaries of sRGB.
    #[value(name = "SRGB_LINEAR")]
    SrgbLinear,
    /// Light, primaries AP1.
    #[value(name = "ACESCG")]
    AcesCg,
    /// A logarithm of light, primaries AP1.
    #[value(name = "ACESCCT")]
    AcesCct,
    /// Light, primaries of sRGB, for LoRAs that know LogC3; references of 8 bits may be given, too.
    #[value(name = "LOGC3")]
    LogC3,
}

/// Codec for the H.264 round trip of conditioning images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ImageCodec {
    /// ffmpeg's libx264 if ffmpeg is installed, else the embedded codec.
    #[default]
    Auto,
    /// The embedded codec.
    Embedded,
    /// ffmpeg's libx264.
    Ffmpeg,
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
#[command(after_help = "Example:\n  ltxc bench x.ltxplan --weights models/ --only stage1")]
pub struct BenchArgs {
    /// Plan made by `ltxc compile`.
    pub plan: PathBuf,
    /// Folder with the weight files of the plan; may be repeated [default: the plan's]
    #[arg(long, value_name = "DIR")]
    pub weights: Vec<PathBuf>,
    /// Device: auto, cpu, cuda:N, vulkan:N or metal
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// Warm runs of each program; the median counts.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Measure one part only, for example stage1 or decode.
    #[arg(long, value_name = "PART")]
    pub only: Option<String>,
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

/// The command line in the words of this program, where other tools write it differently: `-` for `_` in the names of long
/// flags, and `--pipeline=NAME` for a flag or a first argument that names a pipeline.
pub fn in_our_words(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let in_our_words = args.into_iter().enumerate().map(|(i, arg)| match arg.to_str() {
        Some(text) if text.starts_with("--") => {
            let end = text.find('=').unwrap_or(text.len());
            let flag = text[..end].replace('_', "-");
            match MODES.iter().find(|(mode, _)| *mode == flag && end == text.len()) {
                Some((_, pipeline)) => format!("--pipeline={pipeline}").into(),
                None => format!("{flag}{}", &text[end..]).into(),
            }
        }
        // Behind the program and its command.
        Some(name) if i == 2 && PipelineName::from_str(name, false).is_ok() && !Path::new(name).exists() => {
            format!("--pipeline={name}").into()
        }
        _ => arg,
    });
    in_our_words.collect()
}

/// Flags that choose a pipeline in other tools.
const MODES: [(&str, &str); 5] = [
    ("--distilled", "distilled"),
    ("--one-stage", "one-stage"),
    ("--two-stage", "two-stage"),
    ("--two-stages", "two-stage"),
    ("--two-stages-hq", "hq"),
];
