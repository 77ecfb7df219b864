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

use ltxc_ir::plan::Pipeline;
use ltxc_ir::tiling::{Axis, AxisTile};

use super::noise::{Noise, SlotShape};
use super::observe::{Event, Observer};
use crate::error::RunError;
use crate::executor::Executor;

/// Name of the program that decodes tiles of this size.
pub fn program_name(frames: usize, height: usize, width: usize) -> String {
    format!("decode.{frames}x{height}x{width}")
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
    let (video, plan) = (&pipeline.video, &pipeline.decode);
    let (height, width) = (video.height as usize, video.width as usize);
    let grid = [height / plan.factors[1], width / plan.factors[2]];
    let frame_len = height * width * 3;
    observer.event(Event::Stage { name: "decode", steps: plan.len() });

    // Sum of the tiles so far, from frame `done` on.
    let mut pending: Vec<f32> = Vec::new();
    let sums = plan.decode_weights();
    let (mut done, mut decoded) = (0usize, 0usize);
    let [times, rows, columns] = &plan.axes;
    for (&time, chunk) in times.iter().zip(plan.chunks()) {
        for &row in rows {
            for &column in columns {
                let program = program_name(time.len(), row.len(), column.len());
                executor.write(
                    &program,
                    "latent",
                    &crop(latent, grid, video.channels as usize, [time, row, column]),
                )?;
                write_noise(executor, &program, noise, decoded)?;
                executor.run(&program)?;
                let [t, y, x] = plan.pixels([time, row, column]);
                pending.resize(pending.len().max((t.end - done) * frame_len), 0.0);
                let frames = executor.read(&program, "frames")?;
                if frames.len() != t.len() * y.len() * x.len() * 3 {
                    return Err(RunError::Internal(format!("`{program}` gives {} values for a tile", frames.len())));
                }
                accumulate(&mut pending, [height, width], done, &frames, [t, y, x]);
                decoded += 1;
                observer.event(Event::Step { stage: "decode", index: decoded });
            }
        }
        // Frames in front of the next tile are complete.
        let complete = (chunk.end - done) * frame_len;
        if let Some(sums) = &sums {
            divide(&mut pending[..complete], [height, width], done, sums);
        }
        if complete > 0 {
            observer.event(Event::Tensor { name: "final.frames".into(), values: &pending[..complete] });
            sink(&pending[..complete])?;
            pending.drain(..complete);
            done = chunk.end;
        }
    }
    Ok(())
}

/// The part of `[f, h, w, c]` that a tile covers.
fn crop(latent: &[f32], grid: [usize; 2], channels: usize, tile: [AxisTile; 3]) -> Vec<f32> {
    let [time, row, column] = tile;
    let mut out = Vec::with_capacity(time.len() * row.len() * column.len() * channels);
    for f in time.start..time.end {
        for y in row.start..row.end {
            let line = (f * grid[0] + y) * grid[1];
            out.extend_from_slice(&latent[(line + column.start) * channels..(line + column.end) * channels]);
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

/// Adds a weighted tile to the frames from `first` on.
fn accumulate(out: &mut [f32], size: [usize; 2], first: usize, frames: &[f32], tile: [AxisTile; 3]) {
    let [t, y, x] = tile;
    let masks: [Vec<f32>; 3] = std::array::from_fn(|i| tile[i].mask(Axis::ALL[i]));
    for (f, wt) in masks[0].iter().enumerate() {
        for (r, wy) in masks[1].iter().enumerate() {
            let src = &frames[(f * y.len() + r) * x.len() * 3..][..x.len() * 3];
            let at = ((t.start - first + f) * size[0] + y.start + r) * size[1] + x.start;
            let dst = &mut out[at * 3..][..x.len() * 3];
            let w = wt * wy;
            for ((d, s), wx) in dst.as_chunks_mut::<3>().0.iter_mut().zip(src.as_chunks::<3>().0).zip(&masks[2]) {
                let w = w * wx;
                (0..3).for_each(|c| d[c] += w * s[c]);
            }
        }
    }
}

/// Divides frames from `first` on by the sums of the weights, where those are not 1.
fn divide(frames: &mut [f32], size: [usize; 2], first: usize, sums: &[Vec<f32>; 3]) {
    const LEAST: f32 = 1e-8; // ltx_core/tiling, release 1.2.0
    for (row, line) in frames.chunks_exact_mut(size[1] * 3).enumerate() {
        let w = sums[0][first + row / size[0]] * sums[1][row % size[0]];
        for (pixel, wx) in line.as_chunks_mut::<3>().0.iter_mut().zip(&sums[2]) {
            pixel.iter_mut().for_each(|v| *v /= (w * wx).max(LEAST));
        }
    }
}
