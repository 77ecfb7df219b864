//! Tiles of a video on their way into programs and out of them: cut out, weighted, added.

use ltxc_ir::tiling::{Axis, AxisTile};

use crate::error::RunError;

/// The part of `[f, h, w, c]` that a tile covers; `grid` is `[h, w]`.
pub fn crop(values: &[f32], grid: [usize; 2], channels: usize, tile: [AxisTile; 3]) -> Vec<f32> {
    let [time, row, column] = tile;
    let mut out = Vec::with_capacity(time.len() * row.len() * column.len() * channels);
    for f in time.start..time.end {
        for y in row.start..row.end {
            let line = (f * grid[0] + y) * grid[1];
            out.extend_from_slice(&values[(line + column.start) * channels..(line + column.end) * channels]);
        }
    }
    out
}

/// A sum of weighted tiles, `[f, h, w, c]`, handed out from the front as frames become complete.
pub struct Sum {
    size: [usize; 2],
    channels: usize,
    /// The kind of axis whose masks hold along time, height and width.
    masks: [Axis; 3],
    /// Sums of the weights per axis, where they are not 1.
    weights: Option<[Vec<f32>; 3]>,
    /// The sum from frame `first` on, and values in front of it that were handed out.
    values: Vec<f32>,
    handed_out: usize,
    first: usize,
}

impl Sum {
    /// An empty sum of frames of `[h, w]`.
    pub fn new(size: [usize; 2], channels: usize, weights: Option<[Vec<f32>; 3]>) -> Sum {
        Sum { size, channels, masks: Axis::ALL, weights, values: Vec::new(), handed_out: 0, first: 0 }
    }

    /// The same for tiles that fade over time as over space, and whose weights add up to 1.
    pub fn symmetric(size: [usize; 2], channels: usize) -> Sum {
        Sum { masks: [Axis::Height, Axis::Height, Axis::Width], ..Sum::new(size, channels, None) }
    }

    /// Adds the values of a tile.
    ///
    /// # Errors
    /// Values of another number than the tile has.
    pub fn add(&mut self, values: &[f32], tile: [AxisTile; 3]) -> Result<(), RunError> {
        let (c, [t, y, x]) = (self.channels, tile);
        if values.len() != t.len() * y.len() * x.len() * c {
            return Err(RunError::Internal(format!("a program gives {} values for a tile", values.len())));
        }
        self.values.drain(..std::mem::take(&mut self.handed_out));
        let needed = (t.end - self.first) * self.frame_len();
        self.values.resize(self.values.len().max(needed), 0.0);
        let masks: [Vec<f32>; 3] = std::array::from_fn(|i| tile[i].mask(self.masks[i]));
        for (f, wt) in masks[0].iter().enumerate() {
            for (r, wy) in masks[1].iter().enumerate() {
                let src = &values[(f * y.len() + r) * x.len() * c..][..x.len() * c];
                let at = ((t.start - self.first + f) * self.size[0] + y.start + r) * self.size[1] + x.start;
                let dst = &mut self.values[at * c..][..x.len() * c];
                let w = wt * wy;
                for ((d, s), wx) in dst.chunks_exact_mut(c).zip(src.chunks_exact(c)).zip(&masks[2]) {
                    let w = w * wx;
                    d.iter_mut().zip(s).for_each(|(d, s)| *d += w * s);
                }
            }
        }
        Ok(())
    }

    /// The frames in front of `end` that were not handed out yet; no tile may touch them any more.
    pub fn finished(&mut self, end: usize) -> &[f32] {
        const LEAST: f32 = 1e-8; // ltx_core/tiling, release 1.2.0
        self.values.drain(..std::mem::take(&mut self.handed_out));
        let len = (end - self.first) * self.frame_len();
        self.values.resize(self.values.len().max(len), 0.0);
        if let Some(sums) = &self.weights {
            for (row, line) in self.values[..len].chunks_exact_mut(self.size[1] * self.channels).enumerate() {
                let w = sums[0][self.first + row / self.size[0]] * sums[1][row % self.size[0]];
                for (pixel, wx) in line.chunks_exact_mut(self.channels).zip(&sums[2]) {
                    pixel.iter_mut().for_each(|v| *v /= (w * wx).max(LEAST));
                }
            }
        }
        (self.first, self.handed_out) = (end, len);
        &self.values[..len]
    }

    fn frame_len(&self) -> usize {
        self.size[0] * self.size[1] * self.channels
    }
}
