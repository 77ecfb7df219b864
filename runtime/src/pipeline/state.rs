//! The sampling state of one modality, in token form, and what conditioning does to it.
//!
//! # Easy to get wrong
//! - Conditioning writes the *clean* latent and the mask; the noisy latent keeps its value (replaced tokens) or is zero
//!   (appended tokens).
//! - Appended tokens stand behind all target tokens; the noise has their numbers too.
//! - A keyframe at frame 0 gets the causal first-frame correction, others do not.
//!
//! Source: spec/pipelines §2–4.

use ltxc_ir::plan::VideoSettings;

/// State of one modality during a stage. Tokens are rows of `channels` values.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Width of a token.
    pub channels: usize,
    /// Number of tokens that belong to the result; appended ones follow.
    pub target_tokens: usize,
    /// Noisy latent, `[tokens, channels]`.
    pub latent: Vec<f32>,
    /// What masked tokens are held to, `[tokens, channels]`.
    pub clean: Vec<f32>,
    /// 1 where a token is generated, 0 where it is kept, between for a strength below 1; `[tokens]`.
    pub mask: Vec<f32>,
    /// `[axes, tokens, 2]`: start and end of each token, in seconds and pixels.
    pub positions: Vec<f32>,
    /// Row of each token in the table of distinct timesteps, and the mask value of each row.
    pub rows: Vec<i32>,
    /// Mask value of each row; row 0 is 1.
    pub row_masks: Vec<f32>,
}

impl State {
    /// A state with one row: every token is generated from `initial`, zeros if there is none.
    pub fn new(channels: usize, tokens: usize, positions: Vec<f32>, initial: Option<Vec<f32>>) -> State {
        let latent = initial.unwrap_or_else(|| vec![0.0; tokens * channels]);
        State {
            channels,
            target_tokens: tokens,
            clean: latent.clone(),
            latent,
            mask: vec![1.0; tokens],
            positions,
            rows: vec![0; tokens],
            row_masks: vec![1.0],
        }
    }

    /// Number of tokens, appended ones included.
    pub fn tokens(&self) -> usize {
        self.mask.len()
    }

    /// Number of position axes.
    pub fn axes(&self) -> usize {
        self.positions.len() / (2 * self.tokens())
    }

    /// Replaces the target tokens from `first` on by the tokens of `image`, kept with `strength`.
    pub fn replace(&mut self, first: usize, image: &[f32], strength: f64) {
        let count = image.len() / self.channels;
        let mask = (1.0 - strength) as f32;
        let row = self.add_row(mask);
        self.clean[first * self.channels..][..image.len()].copy_from_slice(image);
        self.mask[first..first + count].fill(mask);
        self.rows[first..first + count].fill(row);
    }

    /// Appends tokens that are kept with `strength` and stand at `positions` (`[axes, new tokens, 2]`).
    pub fn append(&mut self, image: &[f32], positions: &[f32], strength: f64) {
        let count = image.len() / self.channels;
        let mask = (1.0 - strength) as f32;
        let row = self.add_row(mask);
        let (axes, old) = (self.axes(), self.tokens());
        let mut joined = Vec::with_capacity(self.positions.len() + positions.len());
        for axis in 0..axes {
            joined.extend_from_slice(&self.positions[axis * old * 2..(axis + 1) * old * 2]);
            joined.extend_from_slice(&positions[axis * count * 2..(axis + 1) * count * 2]);
        }
        self.positions = joined;
        self.latent.resize(self.latent.len() + image.len(), 0.0);
        self.clean.extend_from_slice(image);
        self.mask.resize(old + count, mask);
        self.rows.resize(old + count, row);
    }

    fn add_row(&mut self, mask: f32) -> i32 {
        self.row_masks.push(mask);
        self.row_masks.len() as i32 - 1
    }

    /// Mixes `noise` (`[tokens, channels]`) into the latent at `scale`, held to the clean latent by the mask.
    pub fn add_noise(&mut self, noise: &[f32], scale: f32) {
        let c = self.channels;
        let tokens = self.latent.chunks_mut(c).zip(self.clean.chunks(c)).zip(noise.chunks(c));
        for (((latent, clean), noise), &m) in tokens.zip(&self.mask) {
            for ((x, &clean), &noise) in latent.iter_mut().zip(clean).zip(noise) {
                *x = lerp(clean, lerp(*x, noise, scale), m);
            }
        }
    }

    /// Timesteps of the rows at noise level `sigma`, padded to `count` rows.
    pub fn timesteps(&self, sigma: f32, count: usize) -> Vec<f32> {
        let rows = self.row_masks.iter().map(|m| m * sigma);
        rows.chain(std::iter::repeat(sigma)).take(count.max(self.row_masks.len())).collect()
    }

    /// The prediction of the clean latent: `latent − velocity · mask · sigma` per token.
    pub fn prediction(&self, velocity: &[f32], sigma: f32) -> Vec<f32> {
        let timesteps = self.mask.iter().map(|m| m * sigma);
        let tokens = self.latent.chunks(self.channels).zip(velocity.chunks(self.channels));
        tokens.zip(timesteps).flat_map(|((x, v), t)| x.iter().zip(v).map(move |(x, v)| x - v * t)).collect()
    }

    /// A prediction held to the clean latent by the mask: `x0 · mask + clean · (1 − mask)`.
    pub fn blended(&self, x0: &[f32]) -> Vec<f32> {
        let tokens = x0.chunks(self.channels).zip(self.clean.chunks(self.channels));
        tokens
            .zip(&self.mask)
            .flat_map(|((x, c), &m)| x.iter().zip(c).map(move |(x, c)| x * m + c * (1.0 - m)))
            .collect()
    }

    /// The target tokens of the latent.
    pub fn target(&self) -> &[f32] {
        &self.latent[..self.target_tokens * self.channels]
    }
}

/// `a + t (b − a)`, exact at both ends.
pub fn lerp(a: f32, b: f32, t: f32) -> f32 {
    if t.abs() < 0.5 { a + t * (b - a) } else { b - (b - a) * (1.0 - t) }
}

/// Positions of a grid of video tokens, `[3, tokens, 2]`: seconds, then pixels of height and width.
///
/// Frame 0 spans one pixel frame, later ones `scale[0]` each.
pub fn video_positions(grid: [u32; 3], video: &VideoSettings) -> Vec<f32> {
    let causal = |t: u32| (t as i64 * video.scale[0] as i64 + 1 - video.scale[0] as i64).max(0);
    grid_positions(grid, video, |f| (causal(f), causal(f + 1)))
}

/// Positions of a keyframe latent that starts at pixel frame `frame`, `[3, tokens, 2]`.
///
/// `one_frame` says that the latent stands for a single pixel frame (an image), which spans just that frame.
pub fn keyframe_positions(grid: [u32; 3], frame: u32, one_frame: bool, video: &VideoSettings) -> Vec<f32> {
    let factor = video.scale[0] as i64;
    // Only a keyframe at the very start takes part in the causal correction of the first frame.
    let bound =
        |t: u32| if frame == 0 { (t as i64 * factor + 1 - factor).max(0) } else { t as i64 * factor + frame as i64 };
    grid_positions(grid, video, |f| (bound(f), if one_frame { bound(f) + 1 } else { bound(f + 1) }))
}

fn grid_positions(grid: [u32; 3], video: &VideoSettings, span: impl Fn(u32) -> (i64, i64)) -> Vec<f32> {
    let fps = video.frame_rate.0 as f64 / video.frame_rate.1 as f64;
    let seconds = |frame: i64| frame as f32 / fps as f32;
    let (mut time, mut y, mut x) = (Vec::new(), Vec::new(), Vec::new());
    for f in 0..grid[0] {
        let (start, end) = span(f);
        for row in 0..grid[1] {
            for column in 0..grid[2] {
                time.extend([seconds(start), seconds(end)]);
                y.extend([row * video.scale[1], (row + 1) * video.scale[1]].map(|v| v as f32));
                x.extend([column * video.scale[2], (column + 1) * video.scale[2]].map(|v| v as f32));
            }
        }
    }
    [time, y, x].concat()
}

/// Positions of audio tokens, `[1, tokens, 2]` in seconds.
pub fn audio_positions(tokens: u32) -> Vec<f32> {
    // Four mel frames of 160 samples at 16 kHz per latent; the first latent covers one frame (causal).
    let start = |token: u32| (4 * token as i64 + 1 - 4).max(0) as f32 * 160.0 / 16000.0;
    (0..tokens).flat_map(|t| [start(t), start(t + 1)]).collect()
}
