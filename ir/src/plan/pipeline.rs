//! Pipeline settings: what the driver does with the programs of a plan.
//!
//! Everything here was decided when the plan was compiled. What a run may still choose (prompt, seed, sigmas, strengths
//! and content of conditioning) is not here, except for defaults.

use serde::{Deserialize, Serialize};

use super::{Inputs, ReferenceInput};
use crate::tiling::TilePlan;
use crate::types::DType;

/// Settings of the pipeline a plan was compiled for.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Pipeline {
    /// Name as on the command line, for example `distilled`.
    pub name: String,
    /// What kind of checkpoint it runs.
    pub model: ModelInfo,
    /// The release of the reference whose results it gives.
    pub release: Release,
    /// Dtype of the activations inside programs; what programs take and give is f32 with either.
    pub dtype: DType,
    /// Size of the video; its length and rate also hold for sound alone.
    pub video: VideoSettings,
    /// The sound track.
    pub audio: AudioSettings,
    /// Text encoding.
    pub text: TextSettings,
    /// Denoising stages, in order.
    pub stages: Vec<Stage>,
    /// What is done with the clip in place of stages.
    pub upscale: Option<Upscale>,
    /// What a run brings besides text and images.
    pub inputs: Inputs,
    /// Tiles of the video decoder, in latents; each size of tile is decoded by the program `decode.<f>x<h>x<w>`.
    pub decode: TilePlan,
}

impl Pipeline {
    /// What the pipeline makes, in order.
    pub fn modalities(&self) -> Vec<Modality> {
        let made = |m: &Modality| match m {
            Modality::Video => self.video.channels > 0,
            Modality::Audio => self.audio.tokens > 0,
        };
        Modality::BOTH.into_iter().filter(made).collect()
    }

    /// The reference videos that guide a stage.
    pub fn references_of(&self, stage: &Stage) -> Option<&ReferenceInput> {
        let index = self.stages.iter().position(|s| s.name == stage.name)?;
        self.inputs.references.get(index)
    }

    /// Frames, height and width of the clip that it takes, and its rate.
    pub fn clip_shape(&self) -> ([u32; 3], (u32, u32)) {
        let video = &self.video;
        let own = ([video.frames, video.height, video.width], video.frame_rate);
        self.upscale.as_ref().map_or(own, |upscale| (upscale.clip, upscale.clip_rate))
    }

    /// Whether images condition it: no clip does, and no stage is in tiles, which have no images of their own.
    pub fn takes_images(&self) -> bool {
        self.video.channels > 0 && self.inputs.clip.is_none() && self.stages.iter().all(|stage| stage.tiles.is_none())
    }
}

/// A clip is encoded, enlarged by latent upsamplers and decoded; nothing is denoised, and its sound is kept.
///
/// The video of the settings is the result.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Upscale {
    /// Frames, height and width of the clip.
    pub clip: [u32; 3],
    /// Its frames per second as a fraction.
    pub clip_rate: (u32, u32),
    /// Names of the programs that enlarge its latent, in turn.
    pub programs: Vec<String>,
}

/// A release of the reference implementation, where results depend on it.
///
/// 1.0.0 differs in this: scale and shift between the modalities follow the other one's noise level (`transformer`), and a
/// modality that is skipped takes part in the negative pass (`transformer`); conditioning is in the latent that noise is
/// mixed into; an appended image stands for as many frames as a latent; a frozen modality reports the schedule's noise level;
/// the sound of the last stage is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Release {
    /// 1.0.0, as published on PyPI.
    V1_0_0,
    /// 1.2.0.
    #[default]
    V1_2_0,
}

/// What the plan was compiled from.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Name of the generation, for example `LTX-2.3`.
    pub generation: String,
    /// `model_version` of the checkpoint, empty if it has none.
    pub version: String,
    /// Whether the checkpoint says that it is synthetic.
    pub synthetic: bool,
    /// Default quality of the H.264 round trip of conditioning images, in x264's CRF.
    pub image_crf: u32,
}

/// Size of the video.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VideoSettings {
    /// Height in pixels.
    pub height: u32,
    /// Width in pixels.
    pub width: u32,
    /// Number of frames, `8k + 1` for a temporal factor of 8.
    pub frames: u32,
    /// Frames per second as a fraction.
    pub frame_rate: (u32, u32),
    /// Channels of a latent; 0 if the pipeline makes no video.
    pub channels: u32,
    /// Pixels per latent in time, height and width.
    pub scale: [u32; 3],
    /// Largest number of keyframes (images behind frame 0) a run may append.
    pub max_keyframes: u32,
}

/// The sound track.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AudioSettings {
    /// Number of latent tokens, 25 per second; 0 if the pipeline makes no sound.
    pub tokens: u32,
    /// Width of a token.
    pub channels: u32,
    /// Sampling rate of the decoded waveform in Hz.
    pub rate_hz: u32,
    /// Index of the stage whose sound is written.
    pub stage: u32,
}

/// Text encoding.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TextSettings {
    /// Token counts for which an `encode.<n>` program exists, ascending.
    pub buckets: Vec<u32>,
    /// Number of context tokens; prompts are padded to it.
    pub length: u32,
    /// Number of learnable registers of the connectors.
    pub registers: u32,
    /// Length and BLAKE3 of the `tokenizer.json`.
    pub tokenizer: (u64, [u8; 32]),
    /// How an image stands between words, where prompts can be enhanced with one.
    pub image: Option<ImageTokens>,
}

/// Token ids that stand for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageTokens {
    /// In front of it.
    pub begin: u32,
    /// Each of its soft tokens.
    pub soft: u32,
    /// Behind it.
    pub end: u32,
}

/// One of the two things that a model makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Modality {
    /// The picture.
    Video,
    /// The sound.
    Audio,
}

impl Modality {
    /// Both, in the order in which everything is done with them.
    pub const BOTH: [Modality; 2] = [Modality::Video, Modality::Audio];

    /// `video` or `audio`, as in the names of parameters, noise streams and recordings.
    pub fn name(self) -> &'static str {
        match self {
            Modality::Video => "video",
            Modality::Audio => "audio",
        }
    }
}

/// Most steps of a stage: models of this kind are trained with about a thousand noise levels, so that more steps are no
/// finer. Distilled models run 8, guided ones 15 to 40.
pub const MOST_STEPS: usize = 1000;

/// One denoising stage.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Stage {
    /// Name, for example `stage1`.
    pub name: String,
    /// Height in pixels; 0 without video, like the width and the grid.
    pub height: u32,
    /// Width in pixels.
    pub width: u32,
    /// Latent frames, rows and columns.
    pub grid: [u32; 3],
    /// Default noise levels, ending with 0: one more than steps, of which there are at most [`MOST_STEPS`].
    pub sigmas: Vec<f32>,
    /// Where other numbers of steps get their noise levels from.
    pub schedule: Schedule,
    /// Default sampler.
    pub sampler: Sampler,
    /// Default guidance; `None` for a stage that runs one pass.
    pub guidance: Option<Guidance>,
    /// Adapters that act in this stage, in the order in which they are added to the weights.
    pub adapters: Vec<StageAdapter>,
    /// Whether the stage starts from the upsampled latent of the one before.
    pub upsampled: bool,
    /// Whether the sound of the stage before is kept as it is.
    pub keeps_sound: bool,
    /// Tiles of the grid that are denoised one after the other, each as a clip of its own, and blended; `None`: it is whole.
    pub tiles: Option<TilePlan>,
    /// Programs for each kind of conditioning a run may bring, and each extent of a tile.
    pub classes: Vec<StageClass>,
}

/// A rule that gives noise levels for a number of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Schedule {
    /// A choice out of the stage's own levels, for models that were distilled to them.
    #[default]
    Distilled,
    /// Evenly spaced levels, shifted towards noise by the number of tokens.
    Shifted {
        /// Number of tokens.
        tokens: u32,
    },
    /// Evenly spaced in the first half, then falling faster.
    LinearQuadratic,
    /// Quantiles of a beta distribution.
    Beta,
}

/// An adapter of a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageAdapter {
    /// What it is for: [`StageAdapter::USER`] or [`StageAdapter::DISTILLED`].
    pub role: String,
    /// Default strength; `None` for the one that is given with its file.
    pub strength: Option<f64>,
}

impl StageAdapter {
    /// Whatever adapters the user names.
    pub const USER: &str = "user";

    /// The one that makes a full model behave like a distilled one; a stage that has it needs it.
    pub const DISTILLED: &str = "distilled";

    /// The adapters that the user names, at their strengths.
    pub fn user() -> StageAdapter {
        StageAdapter { role: StageAdapter::USER.into(), strength: None }
    }

    /// The distilled one, at its strength.
    pub fn distilled() -> StageAdapter {
        StageAdapter { role: StageAdapter::DISTILLED.into(), strength: None }
    }
}

/// How a stage goes from one noise level to the next.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub enum Sampler {
    /// Euler.
    #[default]
    Euler,
    /// Euler with fresh noise: goes below the next noise level and comes back with noise.
    Ancestral {
        /// How far below, 0 to 1.
        eta: f64,
        /// Factor of the noise.
        noise: f64,
    },
    /// Two evaluations a step, of second order, with noise.
    Res2s,
    /// Euler along an extrapolated velocity.
    GradientEstimation {
        /// How far to extrapolate; 1 is Euler.
        gamma: f64,
    },
    /// Ancestral Euler whose direction comes from the negative prompt.
    CfgPlusPlus {
        /// How much noise, 0 to 1.
        eta: f64,
        /// Factor of the noise.
        noise: f64,
    },
}

/// Guidance of both modalities.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Guidance {
    /// Of the picture.
    pub video: Guider,
    /// Of the sound.
    pub audio: Guider,
}

impl Guidance {
    /// The guider of one modality.
    pub fn of(&self, modality: Modality) -> &Guider {
        match modality {
            Modality::Video => &self.video,
            Modality::Audio => &self.audio,
        }
    }

    /// The passes that it needs, in the order in which they run.
    pub fn passes(&self) -> Vec<Pass> {
        let needs = |pass: &Pass| Modality::BOTH.iter().any(|&m| self.of(m).needs(*pass));
        Pass::ALL.into_iter().filter(needs).collect()
    }
}

/// Guidance of one modality: what the prediction is moved towards, and how far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guider {
    /// Scale against the negative prompt; 1 is off.
    pub cfg: f64,
    /// How the difference from the negative prompt is used.
    pub rule: CfgRule,
    /// Scale against a pass without self attention in some blocks; 0 is off.
    pub stg: f64,
    /// Those blocks.
    pub stg_blocks: Vec<u32>,
    /// Scale against a pass in which the modalities do not see each other; 1 is off.
    pub modality: f64,
    /// Share of the standard deviation that is brought back to that of the conditioned prediction, 0 to 1.
    pub rescale: f64,
    /// Steps that reuse the prediction after each one that is computed.
    pub skip_step: u32,
}

impl Default for Guider {
    fn default() -> Guider {
        Guider {
            cfg: 1.0,
            rule: CfgRule::Plain,
            stg: 0.0,
            stg_blocks: Vec::new(),
            modality: 1.0,
            rescale: 0.0,
            skip_step: 0,
        }
    }
}

impl Guider {
    /// Factor of the difference from the negative prediction.
    pub fn cfg_factor(&self) -> f64 {
        match self.rule {
            CfgRule::Momentum { .. } => self.cfg,
            _ => self.cfg - 1.0,
        }
    }

    /// Whether it uses the prediction of `pass`.
    pub fn needs(&self, pass: Pass) -> bool {
        match pass {
            Pass::Conditioned => true,
            Pass::Negative => self.cfg_factor() != 0.0,
            Pass::Perturbed => self.stg != 0.0,
            Pass::Isolated => self.modality != 1.0,
        }
    }
}

/// How the difference between the conditioned and the negative prediction is used.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub enum CfgRule {
    /// As it is.
    #[default]
    Plain,
    /// Against the multiple of the negative prediction that is nearest to the conditioned one (CFG*).
    Star,
    /// Its part along the conditioned prediction is scaled (adaptive projected guidance).
    Projected {
        /// Factor of the parallel part.
        eta: f64,
        /// Largest norm of the difference; 0 for any.
        threshold: f64,
    },
    /// Projected as well, after differences of earlier steps were added. Here the scale counts in full, and 0 is off.
    Momentum {
        /// Factor of the parallel part.
        eta: f64,
        /// Largest norm of the difference; 0 for any.
        threshold: f64,
        /// Share of what was added up so far.
        momentum: f64,
    },
}

/// One evaluation of the model that guidance compares with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Pass {
    /// With the prompt.
    Conditioned,
    /// With the negative prompt.
    Negative,
    /// With the prompt, without self attention in some blocks.
    Perturbed,
    /// With the prompt, without attention between the modalities.
    Isolated,
}

impl Pass {
    /// All, in the order in which they run.
    pub const ALL: [Pass; 4] = [Pass::Conditioned, Pass::Negative, Pass::Perturbed, Pass::Isolated];

    /// Name in recordings.
    pub fn name(self) -> &'static str {
        match self {
            Pass::Conditioned => "cond",
            Pass::Negative => "uncond",
            Pass::Perturbed => "perturbed",
            Pass::Isolated => "isolated",
        }
    }

    /// Name of the velocity of `modality` among the results of a step program.
    pub fn velocity(self, modality: Modality) -> String {
        match self {
            Pass::Conditioned => format!("{}.velocity", modality.name()),
            _ => format!("{}.{}.velocity", self.name(), modality.name()),
        }
    }
}

/// Denoising programs for one kind of conditioning. All are of one group, which has the name of the class.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StageClass {
    /// Name, for example `stage1.key1`.
    pub name: String,
    /// Latent frames, rows and columns: those of the stage, or of a tile.
    pub grid: [u32; 3],
    /// What the video may look like; `None` if there is none.
    pub video: Option<StreamClass>,
    /// What the sound may look like; `None` if there is none.
    pub audio: Option<StreamClass>,
    /// Programs that differ in what they compute of a step.
    pub programs: Vec<StepProgram>,
}

impl StageClass {
    /// What one modality may look like.
    pub fn stream(&self, modality: Modality) -> Option<&StreamClass> {
        match modality {
            Modality::Video => self.video.as_ref(),
            Modality::Audio => self.audio.as_ref(),
        }
    }
}

/// The shape of a modality's state that a program was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StreamClass {
    /// Number of tokens that conditioning appends.
    pub appended: u32,
    /// Most distinct timesteps, which are those of tokens with different masks.
    pub rows: u32,
    /// Whether tokens attend to each other with given strengths.
    pub attention: bool,
}

/// A program that evaluates the model once for each of its passes.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StepProgram {
    /// Name of the program.
    pub name: String,
    /// Passes, in order; the first is the conditioned one.
    pub passes: Vec<Pass>,
    /// Modalities that are updated; the others are only looked at.
    pub updates: Vec<Modality>,
}
