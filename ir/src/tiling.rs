//! Tiles of large videos: splitting axes, blending masks, the order of chunks. Pure arithmetic on sizes.
//!
//! All splitting happens on the latent grid. An [`AxisTile`] is a range of latents with a ramp at each end;
//! [`AxisTile::pixels`] gives the frames or pixels that belong to it, [`AxisTile::mask`] its weights. Tiles of the three
//! axes are independent: a tile of the video is one tile of each, and its weight is the product of the three masks.
//!
//! - Decoding reads the latents of a tile and adds the result, weighted, to the pixels of the tile.
//! - Encoding reads the pixels of a tile and adds the result, weighted, to the latents of the tile.
//!
//! # Easy to get wrong
//! - A time tile behind the first starts one latent earlier than a spatial one would: its first latent stands for a
//!   single frame, as at the start of a clip, and that frame gets weight 0 (the ramp starts *from* zero).
//! - Spatial ramps and all falling ramps leave out both 0 and 1.
//! - The size on the shorter side is rounded half to even.
//!
//! Source: spec/video-vae §8.1–8.4, fixtures recorded with release 1.2.0.

use serde::{Deserialize, Serialize};

/// Largest number of latents of an axis.
pub const MOST_LATENTS: usize = 1 << 20;

/// Largest factor between latents and pixels.
pub const MOST_FACTOR: usize = 1 << 16;

/// Sums of masks further from 1 than this need a division.
const COMPLEMENTARY: f32 = 1e-5; // ltx_core/tiling, release 1.2.0

/// Smallest overlaps with which a video may be encoded in tiles, in frames and pixels.
const LEAST_ENCODE_OVERLAP: [usize; 3] = [16, 64, 64]; // ltx_core/model/video_vae, release 1.2.0

/// What is wrong with a tiling.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)] // the messages are the documentation
pub enum TilingError {
    #[error("{axis:?}: {latents} latents cannot be tiled, expected 1..={MOST_LATENTS}")]
    Extent { axis: Axis, latents: usize },
    #[error("{axis:?}: {factor} pixels per latent are out of range, expected 1..={MOST_FACTOR}")]
    Factor { axis: Axis, factor: usize },
    #[error("{axis:?}: tile size {size} is below {least}")]
    TooSmall { axis: Axis, size: usize, least: usize },
    #[error("{axis:?}: tile size {size} and overlap {overlap} must be multiples of {factor}")]
    NotMultiple { axis: Axis, size: usize, overlap: usize, factor: usize },
    #[error("{axis:?}: overlap {overlap} must be smaller than the tile size {size}")]
    Overlap { axis: Axis, size: usize, overlap: usize },
    #[error("{axis:?}: overlap {overlap} is below {least}, which encoding in tiles needs")]
    EncodeOverlap { axis: Axis, overlap: usize, least: usize },
    #[error("{axis:?}: {latents} latents cannot be split into {tiles} tiles that overlap by {overlap}")]
    Count { axis: Axis, latents: usize, tiles: usize, overlap: usize },
}

/// An axis of a video.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the names are the definitions
pub enum Axis {
    Time,
    Height,
    Width,
}

impl Axis {
    /// The axes in the order of a tensor.
    pub const ALL: [Axis; 3] = [Axis::Time, Axis::Height, Axis::Width];
}

/// How one axis is to be split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AxisTiling {
    /// Not at all.
    Whole,
    /// Into tiles of one size; `size` and `overlap` in frames or pixels.
    Size {
        /// Extent of a tile.
        size: usize,
        /// Part of it that the next tile covers too.
        overlap: usize,
    },
    /// Into a number of tiles of nearly equal size; `overlap` in latents.
    Count {
        /// Number of tiles.
        tiles: usize,
        /// Part of a tile that the next one covers too.
        overlap: usize,
    },
}

/// How a video is to be split, along time, height and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tiling {
    /// One rule per axis, in the order of [`Axis::ALL`].
    pub axes: [AxisTiling; 3],
}

impl Tiling {
    /// No tiles.
    pub const WHOLE: Tiling = Tiling { axes: [AxisTiling::Whole; 3] };

    /// The reference's plain default: 80 frames that overlap by 24, 768 pixels that overlap by 64.
    pub const DEFAULT: Tiling = {
        let space = AxisTiling::Size { size: 768, overlap: 64 };
        Tiling { axes: [AxisTiling::Size { size: 80, overlap: 24 }, space, space] }
    };

    /// What pipelines do on their own: [`Tiling::DEFAULT`] with 768 pixels meant for the longer side.
    ///
    /// `latent`: latent frames, rows and columns; `factors`: pixels per latent.
    ///
    /// # Errors
    /// Extents or factors out of range, or factors that do not divide the default sizes.
    pub fn automatic(latent: [usize; 3], factors: [usize; 3]) -> Result<Tiling, TilingError> {
        Tiling::long_side(Tiling::DEFAULT.axes[0], 768, 64, latent, factors)
    }

    /// Tiles of `size` pixels on the longer side, and on the other side so many that they have the shape of the picture.
    ///
    /// `size`, `overlap`: pixels; `latent`: latent frames, rows and columns; `factors`: pixels per latent.
    ///
    /// # Errors
    /// Extents or factors out of range, or sizes that do not fit the factor of their axis.
    pub fn long_side(
        time: AxisTiling,
        size: usize,
        overlap: usize,
        latent: [usize; 3],
        factors: [usize; 3],
    ) -> Result<Tiling, TilingError> {
        let long = latent[1].max(latent[2]);
        let mut axes = [time; 3];
        for (i, axis) in Axis::ALL.into_iter().enumerate().skip(1) {
            check_axis(axis, latent[i], factors[i])?;
            let (size, overlap) = in_latents(axis, size, overlap, factors[i])?;
            // `size` may come from a user, hence the wide product.
            let share = round_half_even(size as u128 * latent[i] as u128, long as u128) as usize;
            let size = share.max(2).max(overlap + 1);
            axes[i] = AxisTiling::Size { size: size * factors[i], overlap: overlap * factors[i] };
        }
        Ok(Tiling { axes })
    }
}

/// A range of one axis with the lengths over which it fades in and out, in latents or in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AxisTile {
    /// First element.
    pub start: usize,
    /// End, exclusive.
    pub end: usize,
    /// Elements over which it fades in.
    pub left_ramp: usize,
    /// Elements over which it fades out.
    pub right_ramp: usize,
}

impl AxisTile {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.end.saturating_sub(self.start)
    }

    /// Whether there are no elements; never so for tiles made here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same tile of latents in frames or pixels, `factor` per latent.
    ///
    /// Frames are those of a clip of its own: one for the first latent, `factor` for each other.
    pub fn pixels(&self, axis: Axis, factor: usize) -> AxisTile {
        match axis {
            Axis::Time => AxisTile {
                start: factor * self.start,
                end: 1 + factor * self.end.saturating_sub(1),
                left_ramp: if self.left_ramp == 0 { 0 } else { 1 + factor * (self.left_ramp - 1) },
                right_ramp: factor * self.right_ramp,
            },
            Axis::Height | Axis::Width => AxisTile {
                start: factor * self.start,
                end: factor * self.end,
                left_ramp: factor * self.left_ramp,
                right_ramp: factor * self.right_ramp,
            },
        }
    }

    /// Weights of the elements, in the arithmetic of the reference.
    ///
    /// - Rising over time: `k / left`, `k = 0..left`. Rising over space: `k / (left + 1)`, `k = 1..=left`.
    /// - Falling: `1 − k / (right + 1)`, `k = 1..=right`. Where both ramps meet, they are multiplied.
    pub fn mask(&self, axis: Axis) -> Vec<f32> {
        let n = self.len();
        let (left, right) = (self.left_ramp.min(n), self.right_ramp.min(n));
        let mut mask = vec![1.0f32; n];
        let (first, steps) = if axis == Axis::Time { (0, left + 1) } else { (1, left + 2) };
        for (k, weight) in mask.iter_mut().take(left).enumerate() {
            *weight *= linspace(0.0, 1.0, steps, first + k);
        }
        for (k, weight) in mask.iter_mut().skip(n - right).enumerate() {
            *weight *= linspace(1.0, 0.0, right + 2, 1 + k);
        }
        mask
    }
}

/// Element `i` of `steps` evenly spaced values as PyTorch computes them: from the nearer end, with one rounding.
fn linspace(from: f32, to: f32, steps: usize, i: usize) -> f32 {
    if steps < 2 {
        return from;
    }
    let step = (to - from) / (steps - 1) as f32;
    if i < steps / 2 { step.mul_add(i as f32, from) } else { (-step).mul_add((steps - 1 - i) as f32, to) }
}

/// The tiles of a video on the latent grid, per axis, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TilePlan {
    /// Tiles along time, height and width.
    pub axes: [Vec<AxisTile>; 3],
    /// Pixels per latent along time, height and width.
    pub factors: [usize; 3],
}

impl TilePlan {
    /// Tiles for decoding `latent` (frames, rows, columns) with `factors` pixels per latent.
    ///
    /// # Errors
    /// Extents, factors, sizes or overlaps that do not fit.
    pub fn decode(latent: [usize; 3], factors: [usize; 3], tiling: &Tiling) -> Result<TilePlan, TilingError> {
        let mut axes = [const { Vec::new() }; 3];
        for (i, axis) in Axis::ALL.into_iter().enumerate() {
            axes[i] = split_axis(axis, latent[i], factors[i], tiling.axes[i])?;
        }
        Ok(TilePlan { axes, factors })
    }

    /// Tiles for encoding a video to `latent` (frames, rows, columns), with `factors` pixels per latent.
    ///
    /// # Errors
    /// Like [`TilePlan::decode`], and overlaps of less than 16 frames or 64 pixels.
    pub fn encode(latent: [usize; 3], factors: [usize; 3], tiling: &Tiling) -> Result<TilePlan, TilingError> {
        for (i, axis) in Axis::ALL.into_iter().enumerate() {
            check_axis(axis, latent[i], factors[i])?;
            let overlap = match tiling.axes[i] {
                AxisTiling::Whole | AxisTiling::Count { tiles: 1, .. } => continue,
                AxisTiling::Size { overlap, .. } => overlap,
                AxisTiling::Count { overlap, .. } => overlap.saturating_mul(factors[i]),
            };
            let least = LEAST_ENCODE_OVERLAP[i];
            if overlap < least {
                return Err(TilingError::EncodeOverlap { axis, overlap, least });
            }
        }
        TilePlan::decode(latent, factors, tiling)
    }

    /// Tiles in which a latent (frames, rows, columns) is denoised: `(number, overlap in latents)` along every axis, in latents
    /// on both sides. An axis with fewer latents than that is whole, and overlaps are at most what leaves every tile one
    /// latent of its own.
    ///
    /// Time is split like space here, and weighted with [`Axis::Height`]: no tile has a frame to spare at its start.
    ///
    /// # Errors
    /// Extents out of range.
    pub fn denoise(latent: [usize; 3], tiles: [(usize, usize); 3]) -> Result<TilePlan, TilingError> {
        let mut axes = [const { Vec::new() }; 3];
        for (i, axis) in Axis::ALL.into_iter().enumerate() {
            let (count, overlap) = if latent[i] < tiles[i].0 { (1, 0) } else { tiles[i] };
            axes[i] = split_by_count(axis, latent[i], count, overlap.min(latent[i].saturating_sub(count)))?;
        }
        Ok(TilePlan { axes, factors: [1; 3] })
    }

    /// Number of tiles.
    pub fn len(&self) -> usize {
        self.axes.iter().map(Vec::len).product()
    }

    /// Whether there are no tiles; never so for plans made here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All tiles as latents of time, height and width; width varies fastest.
    pub fn tiles(&self) -> impl Iterator<Item = [AxisTile; 3]> + '_ {
        let [time, height, width] = &self.axes;
        time.iter().flat_map(move |&t| height.iter().flat_map(move |&h| width.iter().map(move |&w| [t, h, w])))
    }

    /// The same tile in frames and pixels.
    pub fn pixels(&self, tile: [AxisTile; 3]) -> [AxisTile; 3] {
        std::array::from_fn(|i| tile[i].pixels(Axis::ALL[i], self.factors[i]))
    }

    /// Frames that are finished once the tiles of each time tile are added: decoding can hand them out one by one.
    ///
    /// A chunk is empty if the next time tile starts at the same frame.
    pub fn chunks(&self) -> Vec<std::ops::Range<usize>> {
        let spans: Vec<AxisTile> = self.axes[0].iter().map(|t| t.pixels(Axis::Time, self.factors[0])).collect();
        let starts = spans.iter().map(|s| s.start);
        let ends = spans.iter().skip(1).map(|s| s.start).chain(spans.last().map(|s| s.end));
        starts.zip(ends).map(|(start, end)| start..end).collect()
    }

    /// Sums of the masks per axis if the blended result has to be divided by their product; `None` if they are all 1.
    pub fn decode_weights(&self) -> Option<[Vec<f32>; 3]> {
        self.weights(|tile, axis, factor| tile.pixels(axis, factor))
    }

    /// Like [`TilePlan::decode_weights`] for the latents of an encoded video.
    pub fn encode_weights(&self) -> Option<[Vec<f32>; 3]> {
        self.weights(|tile, _, _| tile)
    }

    fn weights(&self, span: impl Fn(AxisTile, Axis, usize) -> AxisTile) -> Option<[Vec<f32>; 3]> {
        let sums: [Vec<f32>; 3] = std::array::from_fn(|i| {
            let spans: Vec<AxisTile> = self.axes[i].iter().map(|&t| span(t, Axis::ALL[i], self.factors[i])).collect();
            let mut sum = vec![0.0f32; spans.iter().map(|s| s.end).max().unwrap_or(0)];
            for tile in &spans {
                sum[tile.start..].iter_mut().zip(tile.mask(Axis::ALL[i])).for_each(|(s, w)| *s += w);
            }
            sum
        });
        let differs = sums.iter().flatten().any(|s| (s - 1.0).abs() > COMPLEMENTARY);
        differs.then_some(sums)
    }
}

fn check_axis(axis: Axis, latents: usize, factor: usize) -> Result<(), TilingError> {
    if !(1..=MOST_LATENTS).contains(&latents) {
        return Err(TilingError::Extent { axis, latents });
    }
    if !(1..=MOST_FACTOR).contains(&factor) {
        return Err(TilingError::Factor { axis, factor });
    }
    Ok(())
}

/// Size and overlap in latents.
fn in_latents(axis: Axis, size: usize, overlap: usize, factor: usize) -> Result<(usize, usize), TilingError> {
    if size < 2 * factor {
        return Err(TilingError::TooSmall { axis, size, least: 2 * factor });
    }
    if !size.is_multiple_of(factor) || !overlap.is_multiple_of(factor) {
        return Err(TilingError::NotMultiple { axis, size, overlap, factor });
    }
    if overlap >= size {
        return Err(TilingError::Overlap { axis, size, overlap });
    }
    Ok((size / factor, overlap / factor))
}

/// The tiles of one axis, with the earlier start of time tiles.
fn split_axis(axis: Axis, latents: usize, factor: usize, tiling: AxisTiling) -> Result<Vec<AxisTile>, TilingError> {
    check_axis(axis, latents, factor)?;
    let tiles = match tiling {
        AxisTiling::Whole => vec![AxisTile { start: 0, end: latents, left_ramp: 0, right_ramp: 0 }],
        AxisTiling::Size { size, overlap } => {
            let (size, overlap) = in_latents(axis, size, overlap, factor)?;
            split_by_size(axis, latents, size, overlap, 1)?
        }
        AxisTiling::Count { tiles, overlap } => split_by_count(axis, latents, tiles, overlap)?,
    };
    Ok(if axis == Axis::Time { start_one_earlier(tiles) } else { tiles })
}

/// Splits `n` elements into tiles of `size` that overlap by `overlap`; the last one ends at `n` and may be shorter.
///
/// If it is shorter than `least`, it starts earlier, and both ramps of that overlap grow with it.
///
/// # Errors
/// [`TilingError::Extent`], [`TilingError::Overlap`] or [`TilingError::TooSmall`] for sizes that do not fit.
pub fn split_by_size(
    axis: Axis,
    n: usize,
    size: usize,
    overlap: usize,
    least: usize,
) -> Result<Vec<AxisTile>, TilingError> {
    check_axis(axis, n, 1)?;
    if size < least.max(1) {
        return Err(TilingError::TooSmall { axis, size, least: least.max(1) });
    }
    if overlap >= size {
        return Err(TilingError::Overlap { axis, size, overlap });
    }
    if n <= size {
        return Ok(vec![AxisTile { start: 0, end: n, left_ramp: 0, right_ramp: 0 }]);
    }
    let step = size - overlap;
    let count = (n - overlap).div_ceil(step);
    let mut tiles: Vec<AxisTile> = (0..count)
        .map(|i| AxisTile {
            start: i * step,
            end: (i * step + size).min(n),
            left_ramp: if i == 0 { 0 } else { overlap },
            right_ramp: if i + 1 == count { 0 } else { overlap },
        })
        .collect();
    if let [.., before, last] = tiles.as_mut_slice()
        && last.len() < least
    {
        last.start = n - least;
        let grown = before.end - last.start;
        (before.right_ramp, last.left_ramp) = (grown, grown);
    }
    Ok(tiles)
}

/// Splits `n` elements into `count` tiles of nearly equal size that overlap by `overlap`; the longer ones come first.
///
/// # Errors
/// [`TilingError::Count`] if a tile would not be longer than its overlap.
pub fn split_by_count(axis: Axis, n: usize, count: usize, overlap: usize) -> Result<Vec<AxisTile>, TilingError> {
    check_axis(axis, n, 1)?;
    let refused = TilingError::Count { axis, latents: n, tiles: count, overlap };
    if count == 0 || count > n {
        return Err(refused);
    }
    let total = (count - 1).checked_mul(overlap).and_then(|m| m.checked_add(n)).ok_or(refused.clone())?;
    let (size, longer) = (total / count, total % count);
    if count > 1 && size <= overlap {
        return Err(refused);
    }
    let mut start = 0;
    let tiles = (0..count).map(|i| {
        let end = start + size + usize::from(i < longer);
        let tile = AxisTile {
            start,
            end,
            left_ramp: if i == 0 { 0 } else { overlap },
            right_ramp: if i + 1 == count { 0 } else { overlap },
        };
        start = end - overlap.min(end);
        tile
    });
    Ok(tiles.collect())
}

/// Time tiles: each but the first takes one latent more in front, in the place of the first latent of a clip.
fn start_one_earlier(mut tiles: Vec<AxisTile>) -> Vec<AxisTile> {
    for tile in tiles.iter_mut().skip(1) {
        tile.start -= 1;
        tile.left_ramp += 1;
    }
    tiles
}

/// `a / b` to the nearest whole number, halves to the even one.
fn round_half_even(a: u128, b: u128) -> u128 {
    let (quotient, rest) = (a / b, a % b);
    match (2 * rest).cmp(&b) {
        std::cmp::Ordering::Less => quotient,
        std::cmp::Ordering::Greater => quotient + 1,
        std::cmp::Ordering::Equal => quotient + quotient % 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTORS: [usize; 3] = [8, 32, 32];

    #[track_caller]
    fn check_size(n: usize, size: usize, overlap: usize, want: &[(usize, usize, usize, usize)]) {
        let tiles = split_by_size(Axis::Width, n, size, overlap, 1).unwrap();
        let found: Vec<_> = tiles.iter().map(|t| (t.start, t.end, t.left_ramp, t.right_ramp)).collect();
        assert_eq!(found, want);
    }

    #[test]
    fn short_axis_is_one_tile() {
        check_size(5, 5, 2, &[(0, 5, 0, 0)]);
    }

    #[test]
    fn last_tile_ends_with_the_axis() {
        check_size(6, 3, 1, &[(0, 3, 0, 1), (2, 5, 1, 1), (4, 6, 1, 0)]);
    }

    #[test]
    fn short_last_tile_grows_to_the_minimum() {
        let tiles = split_by_size(Axis::Width, 11, 8, 4, 6).unwrap();
        let last = AxisTile { start: 4, end: 11, left_ramp: 4, right_ramp: 0 };
        assert_eq!(tiles[1], last);
        let tiles = split_by_size(Axis::Width, 9, 8, 4, 6).unwrap();
        assert_eq!(tiles[1], AxisTile { start: 3, end: 9, left_ramp: 5, right_ramp: 0 });
        assert_eq!(tiles[0].right_ramp, 5);
    }

    #[test]
    fn tiles_of_a_count_share_the_rest_from_the_front() {
        let tiles = split_by_count(Axis::Width, 6, 2, 1).unwrap();
        assert_eq!(tiles.iter().map(|t| (t.start, t.end)).collect::<Vec<_>>(), [(0, 4), (3, 6)]);
        assert!(split_by_count(Axis::Width, 3, 3, 2).is_err());
        assert!(split_by_count(Axis::Width, 3, 0, 0).is_err());
    }

    #[test]
    fn latents_are_denoised_in_tiles_of_a_count() {
        let tiles = |latent: [usize; 3]| {
            let plan = TilePlan::denoise(latent, [(2, 8), (2, 6), (2, 6)]).unwrap();
            plan.axes.map(|axis| axis.iter().map(|t| (t.start, t.end, t.left_ramp, t.right_ramp)).collect::<Vec<_>>())
        };
        // 161 frames of 1920x1088: 21 + 8 latents are 15 and 14, 34 + 6 are 20 and 20, 60 + 6 are 33 and 33.
        let [time, height, width] = tiles([21, 34, 60]);
        assert_eq!(time, [(0, 15, 0, 8), (7, 21, 8, 0)]);
        assert_eq!(height, [(0, 20, 0, 6), (14, 34, 6, 0)]);
        assert_eq!(width, [(0, 33, 0, 6), (27, 60, 6, 0)]);
        // Overlaps of 1 and 0, which is all that 3 and 2 latents have room for, and an axis that cannot be split.
        assert_eq!(
            tiles([1, 2, 3]),
            [vec![(0, 1, 0, 0)], vec![(0, 1, 0, 0), (1, 2, 0, 0)], vec![(0, 2, 0, 1), (1, 3, 1, 0)]]
        );
        assert!(TilePlan::denoise([0, 1, 1], [(2, 8); 3]).is_err());
    }

    #[test]
    fn masks_sum_to_one_whatever_the_extent() {
        for n in 1..40 {
            for (size, overlap) in [(2, 0), (2, 1), (3, 1), (4, 2), (7, 3)] {
                let size_of = |f: usize| AxisTiling::Size { size: size * f, overlap: overlap * f };
                let tiling = Tiling { axes: FACTORS.map(size_of) };
                let plan = TilePlan::decode([n, n, n], FACTORS, &tiling).unwrap();
                assert_eq!(plan.decode_weights(), None, "{n} in {size}/{overlap}");
                assert_eq!(plan.axes[0].last().unwrap().end, n);
                let chunks = plan.chunks();
                assert_eq!(chunks.first().unwrap().start, 0);
                assert_eq!(chunks.last().unwrap().end, 8 * (n - 1) + 1);
            }
        }
    }

    #[test]
    fn overlaps_of_more_than_half_a_tile_need_a_division() {
        let tiling =
            Tiling { axes: [AxisTiling::Whole, AxisTiling::Size { size: 128, overlap: 96 }, AxisTiling::Whole] };
        let plan = TilePlan::decode([1, 9, 1], FACTORS, &tiling).unwrap();
        let sums = plan.decode_weights().unwrap();
        assert_eq!(sums.map(|s| s.len()), [1, 288, 32]);
    }

    #[test]
    fn bad_sizes_are_refused() {
        let refused = |size, overlap| {
            let rule = AxisTiling::Size { size, overlap };
            TilePlan::decode([20, 20, 20], FACTORS, &Tiling { axes: [rule; 3] }).unwrap_err()
        };
        assert_eq!(refused(8, 0), TilingError::TooSmall { axis: Axis::Time, size: 8, least: 16 });
        assert!(matches!(refused(20, 0), TilingError::NotMultiple { .. }));
        assert!(matches!(refused(16, 16), TilingError::Overlap { .. }));
        assert!(matches!(refused(usize::MAX, 8), TilingError::NotMultiple { .. }));
        let whole = TilePlan::decode([0, 1, 1], FACTORS, &Tiling::WHOLE).unwrap_err();
        assert_eq!(whole, TilingError::Extent { axis: Axis::Time, latents: 0 });
    }

    #[test]
    fn encoding_needs_larger_overlaps() {
        let small = Tiling { axes: [AxisTiling::Size { size: 80, overlap: 8 }, AxisTiling::Whole, AxisTiling::Whole] };
        let error = TilePlan::encode([30, 4, 4], FACTORS, &small).unwrap_err();
        assert_eq!(error, TilingError::EncodeOverlap { axis: Axis::Time, overlap: 8, least: 16 });
        assert_eq!(TilePlan::encode([30, 40, 4], FACTORS, &Tiling::DEFAULT).unwrap().encode_weights(), None);
    }

    #[test]
    fn halves_round_to_even() {
        assert_eq!([(5, 2), (7, 2), (11, 4), (0, 3)].map(|(a, b)| round_half_even(a, b)), [2, 4, 3, 0]);
    }
}
