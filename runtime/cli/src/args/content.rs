//! Flags for what a run may choose freely.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ltxc_runtime::experiments::Experiment;

/// What a run may choose freely.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Content")]
pub struct ContentArgs {
    /// What to show; `-` reads standard input, `@FILE` a file.
    #[arg(long, short)]
    pub prompt: Option<String>,
    /// File with one prompt.
    #[arg(
        long = "prompt-txt",
        value_name = "FILE",
        hide = true,
        conflicts_with_all = ["prompt", "embeddings"],
        alias = "prompt-path"
    )]
    pub prompt_file: Option<PathBuf>,
    /// Text contexts made elsewhere, instead of prompts: .safetensors, .npz or .pt, as `ltxc debug text export` writes them.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "negative_prompt"], aliases = ["text-embeddings", "embedding"])]
    pub embeddings: Option<PathBuf>,
    /// Many runs: tables `[[job]]` (.toml) or a JSON object per line (.jsonl), with the names of flags as keys.
    #[arg(long, value_name = "FILE")]
    pub jobs: Option<PathBuf>,
    /// What not to show, for guided pipelines; `@FILE` reads a file [default: a text for every picture]
    #[arg(long)]
    pub negative_prompt: Option<String>,
    /// Seed of all noise, or `random`.
    #[arg(long, default_value = "10", short_alias = 's')]
    pub seed: String,
    /// Image to start from or pass through, repeatable: PATH, then FRAME (or `last`), STRENGTH and CRF if they are not 0, 1 and
    /// the model's; or all in one word, as PATH@FRAME:STRENGTH:CRF.
    #[arg(
        long,
        num_args = 1..=4,
        value_names = ["PATH", "FRAME", "STRENGTH", "CRF"],
        action = clap::ArgAction::Append,
        aliases = ["image-path", "keyframe", "ltx2-images"],
        short_alias = 'i'
    )]
    pub image: Vec<String>,
    /// Strength of images that have none of their own [default: 1]
    #[arg(long, value_name = "STRENGTH", hide_short_help = true)]
    pub image_strength: Option<f64>,
    /// CRF of images that have none of their own, 0 to 51 [default: the model's]
    #[arg(
        long,
        value_name = "CRF",
        hide_short_help = true,
        value_parser = clap::value_parser!(u8).range(0..=51),
        alias = "ltx2-image-crf"
    )]
    pub image_crf: Option<u8>,
    /// Reference video of pipelines ic-lora and hdr-ic-lora, repeatable: PATH, then STRENGTH if it is not 1.
    #[arg(
        long,
        num_args = 1..=2,
        value_names = ["PATH", "STRENGTH"],
        action = clap::ArgAction::Append,
        aliases = ["input", "control-video", "ltx2-video-conditions"]
    )]
    pub video_conditioning: Vec<String>,
    /// Strength of reference videos that have none of their own [default: 1]
    #[arg(long, value_name = "STRENGTH", hide_short_help = true)]
    pub control_strength: Option<f64>,
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
    #[arg(long, value_name = "PATH", alias = "audio", short_alias = 'a')]
    pub audio_path: Option<PathBuf>,
    /// Where it starts, in seconds [default: 0]
    #[arg(long, value_name = "SECONDS", alias = "audio-start")]
    pub audio_start_time: Option<f64>,
    /// How much of it is used at most, in seconds [default: the length of the video]
    #[arg(long, value_name = "SECONDS")]
    pub audio_max_duration: Option<f64>,
    /// Clip of which a part is made anew, or that is upscaled: H.264 in MP4 or MOV, a folder of images, or what ffmpeg reads.
    #[arg(long, value_name = "PATH", alias = "video")]
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
    /// Where it begins, in latent frames, as another tool counts.
    #[arg(long, value_name = "N", hide_short_help = true, conflicts_with = "start_time")]
    pub start_latent: Option<u32>,
    /// The latent frame behind its last one.
    #[arg(long, value_name = "N", hide_short_help = true, conflicts_with = "end_time")]
    pub end_latent: Option<u32>,
    /// Make only the sound of that part anew.
    #[arg(long)]
    pub keep_video: bool,
    /// Make only the picture of that part anew.
    #[arg(long, alias = "no-regen-audio")]
    pub keep_audio: bool,
    /// Steps of the first stage; of a distilled model fewer than its own.
    #[arg(long, aliases = ["steps", "steps-stage1", "stage1-steps"])]
    pub num_inference_steps: Option<usize>,
    /// Steps of the second stage, at most its own.
    #[arg(
        long,
        value_name = "STEPS",
        aliases = ["stage2-steps", "ltx2-refine-num-inference-steps", "refine-num-inference-steps"],
        conflicts_with = "sigmas_stage2"
    )]
    pub steps_stage2: Option<usize>,
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
    #[arg(long, value_name = "FILE", alias = "refine-noise-path")]
    pub ltx2_refine_noise_path: Option<PathBuf>,
    /// Noise of stage 2, sound.
    #[arg(long, value_name = "FILE", alias = "refine-audio-noise-path")]
    pub ltx2_refine_audio_noise_path: Option<PathBuf>,
    /// Codec for the H.264 round trip of images.
    #[arg(long, value_enum, default_value_t)]
    pub image_codec: ImageCodec,
    /// Folder for all noise that a run draws, a file for each stream: files in it are read, missing ones are written.
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
