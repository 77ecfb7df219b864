//! Where tokens stand: `[axes, tokens, 2]`, start and end, in seconds and (video only) pixels of height and width.
//!
//! # Easy to get wrong
//! - The first latent frame stands for one pixel frame, later ones for `scale[0]` each.
//! - A keyframe at frame 0 takes part in that correction, others do not.
//! - Pixels are those of the stage's own resolution.
//! - Everything is rounded to f32 where the reference rounds.
//!
//! Source: spec/pipelines §2.3, §2.4, §3.

use ltxc_ir::plan::VideoSettings;

/// How a reference video is coarser than the video that it guides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReferenceScale {
    /// Its pixels stand for so many in height and width.
    pub space: u32,
    /// It has one frame for so many.
    pub time: u32,
}

impl ReferenceScale {
    /// As fine as the video.
    pub const SAME: ReferenceScale = ReferenceScale { space: 1, time: 1 };
}

/// Positions of a grid of video tokens, `[3, tokens, 2]`.
pub fn video_positions(grid: [u32; 3], video: &VideoSettings) -> Vec<f32> {
    let fps = frame_rate(video);
    grid_positions(grid, video.scale, |f| [f, f + 1].map(|t| causal(t, video.scale[0]) as f32 / fps))
}

/// Positions of a keyframe latent that starts at pixel frame `frame`, `[3, tokens, 2]`.
///
/// `one_frame` says that the latent stands for a single pixel frame (an image), which spans just that frame.
pub fn keyframe_positions(grid: [u32; 3], frame: u32, one_frame: bool, video: &VideoSettings) -> Vec<f32> {
    let (fps, scale) = (frame_rate(video), video.scale[0]);
    // Only a keyframe at the very start takes part in the causal correction of the first frame.
    let bound = |t: u32| if frame == 0 { causal(t, scale) } else { t as i64 * scale as i64 + frame as i64 };
    grid_positions(grid, video.scale, |f| {
        let end = if one_frame { bound(f) + 1 } else { bound(f + 1) };
        [bound(f), end].map(|t| t as f32 / fps)
    })
}

/// Positions of the latent of a reference video, `[3, tokens, 2]`.
pub fn reference_positions(grid: [u32; 3], scale: ReferenceScale, video: &VideoSettings) -> Vec<f32> {
    let fps = frame_rate(video);
    let early = if scale.time == 1 { 0.0 } else { (scale.time - 1) as f32 * (1.0 / fps) };
    let seconds = |t: u32| (causal(t, video.scale[0]) as f32 / (fps / scale.time as f32) - early).max(0.0);
    let [_, height, width] = video.scale;
    grid_positions(grid, [video.scale[0], height * scale.space, width * scale.space], |f| [f, f + 1].map(seconds))
}

/// Positions of audio tokens, `[1, tokens, 2]` in seconds.
pub fn audio_positions(tokens: u32) -> Vec<f32> {
    // Four mel frames of 160 samples at 16 kHz per latent; the first latent covers one frame (causal).
    let start = |token: u32| (4 * token as i64 + 1 - 4).max(0) as f32 * 160.0 / 16000.0;
    (0..tokens).flat_map(|t| [start(t), start(t + 1)]).collect()
}

/// Positions of the tokens of a recording that guides, `[1, tokens, 2]` in seconds: they end shortly before the sound begins.
pub fn reference_audio_positions(tokens: u32) -> Vec<f32> {
    const GAP: f32 = 0.04; // ltx_pipelines/dubit.py, release 1.2.0
    let positions = audio_positions(tokens);
    let end = positions.last().copied().unwrap_or(0.0);
    positions.into_iter().map(|t| t - end - GAP).collect()
}

/// First pixel frame of latent frame `t`.
fn causal(t: u32, scale: u32) -> i64 {
    (t as i64 * scale as i64 + 1 - scale as i64).max(0)
}

fn frame_rate(video: &VideoSettings) -> f32 {
    (video.frame_rate.0 as f64 / video.frame_rate.1 as f64) as f32
}

/// Positions of a grid whose latent frame `f` spans the seconds `span(f)`.
fn grid_positions(grid: [u32; 3], scale: [u32; 3], span: impl Fn(u32) -> [f32; 2]) -> Vec<f32> {
    let (mut time, mut y, mut x) = (Vec::new(), Vec::new(), Vec::new());
    for f in 0..grid[0] {
        for row in 0..grid[1] {
            for column in 0..grid[2] {
                time.extend(span(f));
                y.extend([row * scale[1], (row + 1) * scale[1]].map(|v| v as f32));
                x.extend([column * scale[2], (column + 1) * scale[2]].map(|v| v as f32));
            }
        }
    }
    [time, y, x].concat()
}
