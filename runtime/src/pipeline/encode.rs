//! Encoding of clips and recordings.
//!
//! Both encoders are causal in time: a latent depends on nothing behind the frames that it stands for. An input that is
//! shorter than the program takes is therefore continued anyhow, and what the continuation gives is cut off.
//!
//! Source: spec/video-vae §8.4, spec/media-io §3.

use ltxc_ir::tiling::TilePlan;

use super::tiles::{Sum, crop};
use crate::error::RunError;
use crate::executor::Executor;

/// Name of the program that encodes clips of this size.
pub fn program_name(frames: usize, height: usize, width: usize) -> String {
    format!("encode_video.{frames}x{height}x{width}")
}

/// Encodes `frames` (`[n, h, w, 3]` in `[-1, 1]`) in tiles to a normalised latent `[f, h, w, c]`.
///
/// # Errors
/// A program that cannot run, or frames of another size than the tiles cover.
pub fn encode_video(
    executor: &mut Executor<'_>,
    tiles: &TilePlan,
    channels: usize,
    frames: &[f32],
) -> Result<Vec<f32>, RunError> {
    let end = |axis: usize| tiles.axes[axis].last().map_or(0, |tile| tile.end);
    let grid = [end(0), end(1), end(2)];
    let size = [grid[1] * tiles.factors[1], grid[2] * tiles.factors[2]];
    let count = 1 + tiles.factors[0] * grid[0].saturating_sub(1);
    if frames.len() != count * size[0] * size[1] * 3 {
        return Err(RunError::Internal(format!(
            "{} values are not a clip of {count} frames of {size:?}",
            frames.len()
        )));
    }
    let mut sum = Sum::new([grid[1], grid[2]], channels, tiles.encode_weights());
    for tile in tiles.tiles() {
        let [t, y, x] = tiles.pixels(tile);
        let program = program_name(t.len(), y.len(), x.len());
        executor.write(&program, "frames", &crop(frames, size, 3, [t, y, x]))?;
        executor.run(&program)?;
        sum.add(&executor.read(&program, "latent")?, tile)?;
    }
    Ok(sum.finished(grid[0]).to_vec())
}
