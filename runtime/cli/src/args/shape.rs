//! Flags for what is fixed when a plan is compiled.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use ltxc_ir::plan::Release;
use ltxc_runtime::backend::DeviceName;

use super::SamplingArgs;

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
    #[arg(long, alias = "frames", short_alias = 'f')]
    pub num_frames: Option<u32>,
    /// Length in seconds instead, which is rounded down to 8k+1 frames.
    #[arg(long, conflicts_with = "num_frames")]
    pub seconds: Option<f64>,
    /// Frames per second, a number or a fraction like 24000/1001 [default: 24]
    #[arg(long, alias = "fps")]
    pub frame_rate: Option<String>,
    /// Images behind frame 0 that a run may give, for keyframes images at all [default: 0, keyframes 2, or what --image needs]
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
    /// Tiles of this many pixels on both sides instead, 256 of them and 16 of 32 frames shared [default: 1280 for hdr-ic-lora]
    #[arg(long, value_name = "PIXELS", conflicts_with = "vae_tile", hide_short_help = true)]
    pub spatial_tile: Option<u32>,
    /// Make two frames for each that hdr-ic-lora writes, which takes twice as long and is smoother.
    #[arg(long)]
    pub high_quality: bool,
    /// Room for live LoRAs, whose ranks add up to this at most; without, LoRAs are merged into the weights [default: 0]
    #[arg(long, value_name = "RANK")]
    pub lora_rank: Option<u32>,
    /// Let the text encoder write the prompt anew, in detail, before it is encoded.
    #[arg(long)]
    pub enhance_prompt: bool,
    /// Other tools quantise weights when they load them; here weights are used as they are stored.
    #[arg(long, value_name = "MODE", hide = true, alias = "quant")]
    pub quantization: Option<String>,
    /// Arithmetic of activations; bf16 and f16 take less memory, not less time on a CPU [default: bf16 for CUDA devices
    /// with tensor cores for it; f32 elsewhere, for hdr-ic-lora and in `debug`]
    #[arg(long, value_enum)]
    pub dtype: Option<Precision>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
}

/// Dtypes that activations can be computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// 32 bits.
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

impl From<ReferenceVersion> for Release {
    fn from(version: ReferenceVersion) -> Release {
        match version {
            ReferenceVersion::V1_0_0 => Release::V1_0_0,
            ReferenceVersion::V1_2_0 => Release::V1_2_0,
        }
    }
}

/// Pipelines that can be compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum PipelineName {
    /// Distilled model, two stages: half size, latent upscaling, full size.
    #[default]
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
    /// A clip with its sound through latent upscalers: spatial, temporal or both. Nothing is denoised, and no text is read.
    Upscale,
}
