//! Flags for sampling and guidance.

use clap::{Args, ValueEnum};

/// Sampling and guidance. A plan is compiled for passes, skipped steps and blocks; scales can be changed in a run.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "Sampling and guidance (defaults are the model's; compile and run with the same)")]
pub struct SamplingArgs {
    /// Sampler of the first stage [default: the pipeline's]
    #[arg(long, value_enum)]
    pub sampler: Option<SamplerName>,
    /// Extrapolation of gradient estimation, which this chooses as the sampler; 0 for none [default: 2]
    #[arg(long)]
    pub ge_gamma: Option<f64>,
    /// Noise levels of the first stage [default: the pipeline's]
    #[arg(long, value_enum)]
    pub schedule: Option<ScheduleName>,
    /// Scale of video against the negative prompt, 1 for none.
    #[arg(long = "video-cfg-guidance-scale", value_name = "SCALE", aliases = [
        "cfg", "cfg-scale", "guidance-scale", "cfg-stage1", "ltx2-cfg-scale-video"
    ])]
    pub cfg: Option<f64>,
    /// The same for sound.
    #[arg(long = "audio-cfg-guidance-scale", value_name = "SCALE", aliases = ["cfg-audio", "ltx2-cfg-scale-audio"])]
    pub cfg_audio: Option<f64>,
    /// How the difference from the negative prompt is used [default: plain]
    #[arg(long, value_enum)]
    pub cfg_rule: Option<RuleName>,
    /// Scale of video against a pass without self attention in some blocks (STG), 0 for none.
    #[arg(long = "video-stg-guidance-scale", value_name = "SCALE", aliases = ["stg", "stg-scale", "ltx2-stg-scale-video"])]
    pub stg: Option<f64>,
    /// The same for sound.
    #[arg(long = "audio-stg-guidance-scale", value_name = "SCALE", aliases = ["stg-audio", "ltx2-stg-scale-audio"])]
    pub stg_audio: Option<f64>,
    /// What the scale of STG holds for [default: video; sound has a scale of its own]
    #[arg(long, value_enum, value_name = "MODALITY")]
    pub stg_mode: Option<StgMode>,
    /// Blocks in which that pass leaves out self attention of video.
    #[arg(
        long = "video-stg-blocks",
        value_name = "BLOCKS",
        value_delimiter = ',',
        aliases = ["stg-blocks", "ltx2-stg-blocks-video"]
    )]
    pub stg_blocks: Option<Vec<u32>>,
    /// Blocks in which it leaves out self attention of sound.
    #[arg(
        long = "audio-stg-blocks",
        value_name = "BLOCKS",
        value_delimiter = ',',
        aliases = ["stg-blocks-audio", "ltx2-stg-blocks-audio"]
    )]
    pub stg_blocks_audio: Option<Vec<u32>>,
    /// Scale of video against a pass in which it does not hear the sound, 1 for none.
    #[arg(long = "a2v-guidance-scale", value_name = "SCALE", aliases = ["modality", "ltx2-modality-scale-video"])]
    pub modality: Option<f64>,
    /// Scale of sound against a pass in which it does not see the video.
    #[arg(long = "v2a-guidance-scale", value_name = "SCALE", aliases = ["modality-audio", "ltx2-modality-scale-audio"])]
    pub modality_audio: Option<f64>,
    /// How far guided video returns to its contrast without guidance, 0 to 1.
    #[arg(long = "video-rescale-scale", value_name = "SHARE", aliases = ["rescale", "guidance-rescale"])]
    pub rescale: Option<f64>,
    /// The same for sound.
    #[arg(long = "audio-rescale-scale", value_name = "SHARE", alias = "rescale-audio")]
    pub rescale_audio: Option<f64>,
    /// Both at once.
    #[arg(long = "ltx2-rescale-scale", value_name = "SHARE", hide = true, conflicts_with_all = ["rescale", "rescale_audio"])]
    pub rescale_both: Option<f64>,
    /// Steps of video that reuse the prediction of each one that is computed.
    #[arg(long, value_name = "STEPS")]
    pub video_skip_step: Option<u32>,
    /// The same for sound.
    #[arg(long, value_name = "STEPS")]
    pub audio_skip_step: Option<u32>,
    /// Projected guidance of this scale: that of video, by the rule `apg`.
    #[arg(long, value_name = "SCALE", hide = true, conflicts_with = "cfg")]
    pub apg_scale: Option<f64>,
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
