//! Pipeline settings: what the driver does with the programs of a plan.
//!
//! Everything here was decided when the plan was compiled. What a run may still choose (prompt, seed, sigmas, strengths
//! and content of conditioning) is not here, except for defaults.

use serde::{Deserialize, Serialize};

use crate::tiling::TilePlan;
use crate::types::DType;

/// Settings of the pipeline a plan was compiled for.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Pipeline {
    /// Name as on the command line, for example `distilled`.
    pub name: String,
    /// What kind of checkpoint it runs.
    pub model: ModelInfo,
    /// Dtype of the activations inside programs; what programs take and give is f32 with either.
    pub dtype: DType,
    /// Size of the video.
    pub video: VideoSettings,
    /// The sound track.
    pub audio: AudioSettings,
    /// Text encoding.
    pub text: TextSettings,
    /// Denoising stages, in order.
    pub stages: Vec<Stage>,
    /// Tiles of the video decoder, in latents; each size of tile is decoded by the program `decode.<f>x<h>x<w>`.
    pub decode: TilePlan,
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
    /// Channels of a latent.
    pub channels: u32,
    /// Pixels per latent in time, height and width.
    pub scale: [u32; 3],
    /// Largest number of keyframes (images behind frame 0) a run may append.
    pub max_keyframes: u32,
}

/// The sound track.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AudioSettings {
    /// Number of latent tokens; 25 per second.
    pub tokens: u32,
    /// Width of a token.
    pub channels: u32,
    /// Sampling rate of the decoded waveform in Hz.
    pub rate_hz: u32,
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
}

/// One denoising stage.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Stage {
    /// Name, for example `stage1`.
    pub name: String,
    /// Height in pixels.
    pub height: u32,
    /// Width in pixels.
    pub width: u32,
    /// Latent frames, rows and columns.
    pub grid: [u32; 3],
    /// Default noise levels, ending with 0.
    pub sigmas: Vec<f32>,
    /// Whether the stage starts from the upsampled latent of the one before.
    pub upsampled: bool,
    /// Programs for each kind of conditioning a run may bring.
    pub classes: Vec<StageClass>,
}

/// A denoising program for one kind of conditioning.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StageClass {
    /// Name of the program and of its group.
    pub program: String,
    /// Whether an image replaces the first latent frame.
    pub first_frame: bool,
    /// Number of appended keyframes.
    pub keyframes: u32,
    /// Number of distinct video timesteps the program can take.
    pub rows: u32,
}
