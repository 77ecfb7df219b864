//! Media that a run brings besides text and images, and what is done with them.

use serde::{Deserialize, Serialize};

use crate::tiling::{AxisTile, TilePlan};

/// What a pipeline takes. Everything that is not `None` must be given.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Inputs {
    /// Whether an image at frame 0 is appended like all others; if not, it replaces the first latent frame.
    pub appends_first_image: bool,
    /// Videos that guide stages: what the first stage takes of them, then the next.
    pub references: Vec<ReferenceInput>,
    /// Whether references are padded to their size instead of cropped, and the result is cropped to the size of the first.
    pub pads_references: bool,
    /// Whether each frame of a reference stands twice, the last one once, and every other frame that is made is written.
    pub doubles_frames: bool,
    /// A clip of the size of the result, of which a part is made anew, or one that is upscaled.
    pub clip: Option<ClipInput>,
    /// A recording.
    pub sound: Option<SoundInput>,
}

/// Videos that guide a stage.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReferenceInput {
    /// Number of videos.
    pub count: u32,
    /// Number of frames of each, after those that the scale leaves out.
    pub frames: u32,
    /// Height in pixels.
    pub height: u32,
    /// Width in pixels.
    pub width: u32,
    /// One of its pixels stands for so many in height and width.
    pub space_scale: u32,
    /// One of its frames stands for so many.
    pub time_scale: u32,
    /// Whether a run says how strongly references and target attend to each other.
    pub has_attention: bool,
    /// Tiles of the encoder.
    pub tiles: TilePlan,
}

impl ReferenceInput {
    /// Latent frames, rows and columns of one video.
    pub fn grid(&self) -> [u32; 3] {
        std::array::from_fn(|i| self.tiles.axes[i].last().map_or(0, |tile| tile.end as u32))
    }

    /// Tokens of one video.
    pub fn tokens(&self) -> u32 {
        self.grid().iter().fold(1, |n: u32, &d| n.saturating_mul(d))
    }

    /// Tokens of one video, or of the part of it that guides a tile.
    pub fn tokens_of(&self, tile: Option<[AxisTile; 3]>) -> u32 {
        let part = tile.map(|tile| self.of_tile(tile));
        part.map_or(self.tokens(), |part| part.iter().fold(1, |n: u32, axis| n.saturating_mul(axis.len() as u32)))
    }

    /// The part of one video, in latents of its own, that guides a tile of its stage: every side at least one latent.
    pub fn of_tile(&self, tile: [AxisTile; 3]) -> [AxisTile; 3] {
        let scale = [1, self.space_scale, self.space_scale].map(|n| n.max(1) as usize);
        std::array::from_fn(|i| {
            let start = tile[i].start / scale[i];
            AxisTile { start, end: (tile[i].end / scale[i]).max(start + 1), left_ramp: 0, right_ramp: 0 }
        })
    }
}

/// A clip.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClipInput {
    /// Tiles of the encoder.
    pub tiles: TilePlan,
}

/// What a recording is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SoundRole {
    /// It is kept, and written as it is.
    #[default]
    Kept,
    /// It belongs to the clip, which may also be silent, and a part of it is made anew.
    Clip,
    /// It guides: tokens of it stand in front of the sound that is made.
    Reference,
}

/// A recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SoundInput {
    /// What it is for.
    pub role: SoundRole,
    /// Sampling rate of the spectrogram in Hz.
    pub rate_hz: u32,
    /// Length of the Fourier transform.
    pub n_fft: u32,
    /// Samples from one frame of the spectrogram to the next.
    pub hop_length: u32,
    /// Mel bins per channel.
    pub mel_bins: u32,
    /// Frames of the spectrogram that the encoder takes.
    pub mel_frames: u32,
    /// Frames of the spectrogram that a latent stands for; the first stands for one.
    pub time_factor: u32,
}

impl SoundInput {
    /// Latent tokens that it is encoded to.
    pub fn tokens(&self) -> u32 {
        self.mel_frames.saturating_sub(1) / self.time_factor.max(1) + 1
    }
}
