//! Tiled decoding of a video latent, streamed in time.
//!
//! Every tile is decoded as a clip of its own. Neighbouring tiles overlap and fade into each other with linear ramps
//! whose weights sum to 1, so the results are only added. Frames are handed on as soon as no later tile touches them.
//!
//! # Easy to get wrong
//! - A tile behind the first starts one latent early; that latent plays the causal first frame and has weight 0, because
//!   the ramp in time starts from zero.
//!
//! Source: spec/video-vae §8.1, §8.3.

use ltxc_ir::plan::{DecodeSettings, Pipeline, TileSpan};

use super::noise::{Noise, SlotShape};
use super::observe::{Event, Observer};
use crate::error::RunError;
use crate::executor::Executor;

/// Name of the program that decodes tiles of this size.
pub fn program_name(frames: usize, height: usize, width: usize) -> String {
    format!("decode.{frames}x{height}x{width}")
}

/// Where a tile of latents lands along one axis of the output, with a weight per output position.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// First output position.
    pub start: usize,
    /// Weight of each position.
    pub weights: Vec<f32>,
}

/// Output range and weights of a tile in time, for frames of `factor` per latent.
pub fn place_time(tile: TileSpan, factor: usize) -> Placed {
    let start = tile.start as usize * factor;
    let end = 1 + (tile.end as usize - 1) * factor;
    let left = if tile.left == 0 { 0 } else { 1 + factor * (tile.left as usize - 1) };
    let mut weights = vec![1.0f32; end - start];
    for (k, w) in weights.iter_mut().take(left).enumerate() {
        *w *= k as f32 / left as f32;
    }
    fade_out(&mut weights, tile.right as usize * factor);
    Placed { start, weights }
}

/// Output range and weights of a tile in height or width.
pub fn place_space(tile: TileSpan, factor: usize) -> Placed {
    let length = (tile.end - tile.start) as usize * factor;
    let left = tile.left as usize * factor;
    let mut weights = vec![1.0f32; length];
    for (k, w) in weights.iter_mut().take(left).enumerate() {
        *w *= (k + 1) as f32 / (left + 1) as f32;
    }
    fade_out(&mut weights, tile.right as usize * factor);
    Placed { start: tile.start as usize * factor, weights }
}

fn fade_out(weights: &mut [f32], right: usize) {
    let n = weights.len();
    for k in 1..=right.min(n) {
        weights[n - right.min(n) + k - 1] *= 1.0 - k as f32 / (right + 1) as f32;
    }
}

/// Decodes `latent` (`[f, h, w, c]`, normalised) and passes on RGB frames `[n, height, width, 3]` about `[-1, 1]`, in
/// order and each exactly once.
///
/// # Errors
/// A program that cannot run, or what `sink` returns.
pub fn decode_video(
    executor: &mut Executor<'_>,
    pipeline: &Pipeline,
    latent: &[f32],
    noise: &Noise,
    observer: &mut dyn Observer,
    sink: &mut dyn FnMut(&[f32]) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let video = &pipeline.video;
    let DecodeSettings { axes: [times, rows, columns] } = &pipeline.decode;
    let (height, width) = (video.height as usize, video.width as usize);
    let [ft, fh, fw] = video.scale.map(|s| s as usize);
    let grid = [height / fh, width / fw];
    let frame_len = height * width * 3;
    let tiles = times.len() * rows.len() * columns.len();
    observer.event(Event::Stage { name: "decode", steps: tiles });

    // Sum of the tiles so far, from frame `done` on.
    let mut pending: Vec<f32> = Vec::new();
    let (mut done, mut decoded) = (0usize, 0usize);
    for (i, time) in times.iter().enumerate() {
        let placed = place_time(*time, ft);
        let end = placed.start + placed.weights.len();
        pending.resize((end - done) * frame_len, 0.0);
        for row in rows {
            for column in columns {
                let program = program_name(span(time), span(row), span(column));
                let part = crop(latent, grid, video.channels as usize, time, row, column);
                executor.write(&program, "latent", &part)?;
                write_noise(executor, &program, noise, decoded)?;
                executor.run(&program)?;
                let frames = executor.read(&program, "frames")?;
                let (y, x) = (place_space(*row, fh), place_space(*column, fw));
                accumulate(&mut pending, [height, width], placed.start - done, frames, [&placed, &y, &x]);
                decoded += 1;
                observer.event(Event::Step { stage: "decode", index: decoded });
            }
        }
        // Frames in front of the next tile are complete.
        let next = times.get(i + 1).map_or(end, |t| t.start as usize * ft);
        let complete = (next - done) * frame_len;
        sink(&pending[..complete])?;
        pending.drain(..complete);
        done = next;
    }
    Ok(())
}

fn span(tile: &TileSpan) -> usize {
    (tile.end - tile.start) as usize
}

/// The part of `[f, h, w, c]` that a tile covers.
fn crop(latent: &[f32], grid: [usize; 2], channels: usize, time: &TileSpan, row: &TileSpan, column: &TileSpan) -> Vec<f32> {
    let mut out = Vec::with_capacity(span(time) * span(row) * span(column) * channels);
    for f in time.start as usize..time.end as usize {
        for y in row.start as usize..row.end as usize {
            let line = (f * grid[0] + y) * grid[1];
            out.extend_from_slice(&latent[(line + column.start as usize) * channels..(line + column.end as usize) * channels]);
        }
    }
    out
}

/// Draws what a decoder with timestep conditioning or injected noise needs; other programs have no such inputs.
fn write_noise(executor: &mut Executor<'_>, program: &str, noise: &Noise, tile: usize) -> Result<(), RunError> {
    // Decode timestep of conditioned decoders: spec/video-vae §6.4.
    const TIMESTEP: f32 = 0.05;
    for slot in &executor.program(program)?.inputs {
        if slot.name == "timestep" {
            executor.write(program, "timestep", &[TIMESTEP])?;
        } else if slot.name.starts_with("noise") {
            let shape = SlotShape { spatial: slot.ty.shape.clone(), channels: 1, inner: 1 };
            let values = noise.draw(&format!("decode.tile.{tile:03}.{}", slot.name), &shape)?;
            executor.write(program, &slot.name, &values)?;
        }
    }
    Ok(())
}

/// Adds a weighted tile to the frames it covers.
fn accumulate(out: &mut [f32], size: [usize; 2], first: usize, frames: &[f32], placed: [&Placed; 3]) {
    let [t, y, x] = placed;
    let (rows, columns) = (y.weights.len(), x.weights.len());
    for (f, wt) in t.weights.iter().enumerate() {
        for (r, wy) in y.weights.iter().enumerate() {
            let src = &frames[(f * rows + r) * columns * 3..][..columns * 3];
            let at = ((first + f) * size[0] + y.start + r) * size[1] + x.start;
            let dst = &mut out[at * 3..][..columns * 3];
            let w = wt * wy;
            for ((d, s), wx) in dst.as_chunks_mut::<3>().0.iter_mut().zip(src.as_chunks::<3>().0).zip(&x.weights) {
                let w = w * wx;
                (0..3).for_each(|c| d[c] += w * s[c]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(start: u32, end: u32, left: u32, right: u32) -> TileSpan {
        TileSpan { start, end, left, right }
    }

    #[test]
    fn ramps_of_neighbours_sum_to_one() {
        let check = |parts: &[Placed], n: usize| {
            let mut sum = vec![0f32; n];
            for p in parts {
                p.weights.iter().enumerate().for_each(|(i, w)| sum[p.start + i] += w);
            }
            assert!(sum.iter().all(|s| (s - 1.0).abs() < 1e-6), "{sum:?}");
        };
        // 512×768×121 with the default: latent frames 0..10 and 6..16.
        check(&[place_time(tile(0, 10, 0, 3), 8), place_time(tile(6, 16, 4, 0), 8)], 121);
        check(&[place_space(tile(0, 4, 0, 2), 32), place_space(tile(2, 6, 2, 0), 32)], 192);
    }
}
