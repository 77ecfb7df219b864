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

use super::noise::{Noise, SlotShape};
use super::observe::{Event, Observer};
use super::tiles::{Sum, crop};
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
    let frames = plan.axes[0].last().map_or(0, |tile| tile.end);
    let expected = frames * grid[0] * grid[1] * video.channels as usize;
    if latent.len() != expected {
        let found = latent.len();
        return Err(RunError::Internal(format!("{found} values are no latent of the video, which has {expected}")));
    }
    observer.event(Event::Stage { name: "decode", steps: plan.len() });

    let mut sum = Sum::new([height, width], 3, plan.decode_weights());
    let mut decoded = 0;
    let [times, rows, columns] = &plan.axes;
    for (&time, chunk) in times.iter().zip(plan.chunks()) {
        for &row in rows {
            for &column in columns {
                let program = program_name(time.len(), row.len(), column.len());
                let latent = crop(latent, grid, video.channels as usize, [time, row, column]);
                executor.write(&program, "latent", &latent)?;
                write_noise(executor, &program, noise, &latent, decoded)?;
                executor.run(&program)?;
                let frames = executor.read(&program, "frames")?;
                sum.add(&frames, plan.pixels([time, row, column]))?;
                decoded += 1;
                observer.event(Event::Step { stage: "decode", index: decoded });
            }
        }
        // Frames in front of the next tile are complete.
        let complete = sum.finished(chunk.end);
        if !complete.is_empty() {
            observer.event(Event::Tensor { name: "final.frames".into(), values: complete });
            sink(complete)?;
        }
    }
    Ok(())
}

/// Draws what a decoder with timestep conditioning or injected noise needs; other programs have no such inputs.
///
/// Where decoders are to be spared, the latent itself takes the place of the noise that is mixed into it, so that the
/// mixture is the latent, and injected noise is 0.
fn write_noise(
    executor: &mut Executor<'_>,
    program: &str,
    noise: &Noise,
    latent: &[f32],
    tile: usize,
) -> Result<(), RunError> {
    // Decode timestep of conditioned decoders: spec/video-vae §6.4.
    const TIMESTEP: f32 = 0.05;
    for slot in &executor.program(program)?.inputs {
        if slot.name == "timestep" {
            executor.write(program, "timestep", &[TIMESTEP])?;
        } else if noise.spares_decoders && slot.name == "noise" {
            executor.write(program, "noise", latent)?;
        } else if noise.spares_decoders && slot.name.starts_with("noise") {
            executor.write(program, &slot.name, &vec![0.0f32; slot.ty.elements()])?;
        } else if slot.name.starts_with("noise") {
            let shape = SlotShape { spatial: slot.ty.shape.clone(), channels: 1, inner: 1 };
            let values = noise.draw(&format!("decode.tile.{tile:03}.{}", slot.name), &shape)?;
            executor.write(program, &slot.name, &values)?;
        }
    }
    Ok(())
}
