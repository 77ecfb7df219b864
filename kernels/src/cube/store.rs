//! Where products and convolutions store what they compute: each element at its own position, or where copies behind them
//! take it (depth-to-space, space-to-depth, a split into several tensors).
//!
//! A copy is turned around: the position of an element, divided by the strides of the box, gives its index along every
//! axis, and from these follows its place in the result. The strides inside of a row of the product are part of the kernel,
//! so those divisions cost little.
//!
//! Words of narrow results hold elements that lie side by side in the *result*, and maybe apart in the product: a block of
//! channels apart for depth-to-space, a row for space-to-depth. Then sums pass through shared memory, where units find what
//! others computed.
//!
//! # Easy to get wrong
//! - All lanes of a word must lie in the patch that is stored together. Where they do not (a block of 9 channels, frames),
//!   narrow results have no such store: the product is stored as it is, and copies follow.

use cubecl::prelude::*;
use ltxc_ir::plan::Copy;
use ltxc_ir::{DType, TensorType};

use super::gemm::{Extents, result_row};
use super::index::Walk;
use super::patches::Patches;
use super::program::{Tail, finished};
use super::storage;

/// Rows and columns of which the patches of all tiles are multiples.
pub(crate) const PATCH_ROWS: u32 = 8;
pub(crate) const PATCH_COLUMNS: u32 = 16;

/// The store of a call, with what a launch adds to it.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) places: Places,
    pub(crate) numbers: Vec<usize>,
}

/// Where elements go, as far as kernels are built for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Places {
    /// One for each result; none if there is one result that has every element at its own position.
    targets: Vec<Target>,
    apart: Apart,
}

/// A copy to a result.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Target {
    /// Where its numbers begin: first element read and written, then extent, stride in the product and in the result of
    /// each axis, the largest stride in the product first.
    first: usize,
    /// Strides in the product; those of rows are known at the launch only.
    strides: Vec<Option<u32>>,
}

/// The distance of the lanes of a word in the product: rows or columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Apart {
    pub(crate) rows: u32,
    pub(crate) columns: u32,
}

impl Default for Apart {
    /// Side by side.
    fn default() -> Apart {
        Apart { rows: 0, columns: 1 }
    }
}

impl Places {
    /// Whether the lanes of a word lie side by side in the product.
    pub(crate) fn are_adjacent(&self) -> bool {
        self.apart == Apart::default()
    }
}

impl Stored {
    /// The store that copies of all that a product computes are; `groups` have equal parts of its columns. `None` if an
    /// element has more than one place in a result, or lanes of a word lie too far apart. Where the rows of the product are
    /// not those of the result, `has_rows` is false.
    pub(crate) fn new(copies: &[&Copy], computed: &TensorType, groups: usize, has_rows: bool) -> Option<Stored> {
        let (&length, outer) = computed.shape.split_last()?;
        let lanes = storage::per_word(computed.dtype) as usize;
        let (mut places, mut numbers) = (Places::default(), Vec::new());
        for (at, copy) in copies.iter().enumerate() {
            let walk = Walk::new(&copy.shape, &[copy.src_strides.clone(), copy.dst_strides.clone()]).by_stride(0);
            let axes: Vec<[usize; 3]> =
                (0..walk.rank()).map(|a| [walk.extents[a], walk.strides[0][a], walk.strides[1][a]]).collect();
            has_one_place(&axes).then_some(())?;
            let apart = match lanes {
                1 => Apart::default(),
                _ => {
                    let distance = lane_distance(copy, &axes, lanes)?;
                    let inner_rows = if has_rows { outer.last().copied().unwrap_or(1) } else { 0 };
                    apart(distance, lanes, length, length / groups, inner_rows)?
                }
            };
            if at > 0 && apart != places.apart {
                return None;
            }
            places.apart = apart;
            let in_row = |&[_, stride, _]: &[usize; 3]| u32::try_from(stride).ok().filter(|_| stride < length);
            places.targets.push(Target { first: numbers.len(), strides: axes.iter().map(in_row).collect() });
            numbers.extend([copy.src_offset, copy.dst_offset]);
            numbers.extend(axes.iter().flatten());
        }
        Some(Stored { places, numbers })
    }
}

/// Whether each axis steps over all that those with smaller strides in the product reach, largest stride first.
fn has_one_place(axes: &[[usize; 3]]) -> bool {
    let mut reach = 1;
    axes.iter().rev().all(|&[extent, stride, _]| {
        let steps_over = stride >= reach;
        reach += (extent - 1) * stride;
        steps_over
    })
}

/// The distance in the product of elements that lie side by side in a result, if words of `lanes` such elements are copied
/// as wholes, and the product consists of blocks of `lanes` times as many elements in which these are the lanes.
fn lane_distance(copy: &Copy, axes: &[[usize; 3]], lanes: usize) -> Option<usize> {
    let lane = axes.iter().position(|axis| axis[2] == 1)?;
    let [extent, distance, _] = axes[lane];
    let block = distance.checked_mul(lanes)?;
    let others = || axes.iter().enumerate().filter(|&(a, _)| a != lane).map(|(_, axis)| *axis);
    let are_words = extent.is_multiple_of(lanes)
        && others().map(|axis| axis[2]).chain([copy.dst_offset]).all(|n| n.is_multiple_of(lanes));
    let inside = others().filter(|axis| axis[1] < distance).map(|[extent, stride, _]| (extent - 1) * stride);
    let reach = copy.src_offset % block + inside.sum::<usize>();
    let are_blocks = others().all(|axis| axis[1] < distance || axis[1].is_multiple_of(block));
    (are_words && are_blocks && reach < distance).then_some(distance)
}

/// A distance of lanes as rows or columns, if blocks of them fill rows of `length` elements, each the columns of some groups,
/// or `inner_rows` rows, and patches.
fn apart(distance: usize, lanes: usize, length: usize, columns: usize, inner_rows: usize) -> Option<Apart> {
    let fits = |distance: usize, of: usize, patch: u32| {
        let block = distance * lanes;
        of > 0 && of.is_multiple_of(block) && (patch as usize).is_multiple_of(block)
    };
    if fits(distance, columns, PATCH_COLUMNS) {
        return Some(Apart { rows: 0, columns: distance as u32 });
    }
    let rows = distance / length;
    (distance.is_multiple_of(length) && fits(rows, inner_rows, PATCH_ROWS))
        .then_some(Apart { rows: rows as u32, columns: 0 })
}

/// Where elements go, as an argument of a kernel.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Store {
    numbers: Sequence<u32>,
    #[cube(comptime)]
    pub(crate) places: Places,
}

/// Stores a word whose first lane is the element at a position of the product.
#[cube]
pub(crate) fn store_word(
    word: u32,
    position: u32,
    outs: &mut Sequence<Array<u32>>,
    store: &Store,
    #[comptime] lanes: u32,
) {
    if comptime!(store.places.targets.is_empty()) {
        outs.index_mut(0usize)[(position / lanes) as usize] = word;
    } else {
        #[unroll]
        for t in 0..comptime!(store.places.targets.len()) {
            let target = comptime!(store.places.targets[t].clone());
            let (place, is_inside) = place_of(position, &store.numbers, target);
            if is_inside {
                outs.index_mut(t)[(place / lanes) as usize] = word;
            }
        }
    }
}

/// The place of an element in a result, and whether it has one.
#[cube]
fn place_of(position: u32, numbers: &Sequence<u32>, #[comptime] target: Target) -> (u32, bool) {
    let first = comptime!(target.first);
    let start = *numbers.index(first);
    let mut is_inside = position >= start;
    let mut rest = select(is_inside, position - start, 0u32);
    let mut place = *numbers.index(comptime!(first + 1));
    #[unroll]
    for a in 0..comptime!(target.strides.len()) {
        let at = comptime!(first + 2 + 3 * a);
        let stride = if comptime!(target.strides[a].is_some()) {
            comptime!(target.strides[a].unwrap_or(1)).runtime()
        } else {
            *numbers.index(comptime!(at + 1))
        };
        let index = rest / stride;
        rest -= index * stride;
        is_inside = is_inside && index < *numbers.index(at);
        place += index * *numbers.index(comptime!(at + 2));
    }
    (place, is_inside && rest == 0u32)
}

/// How a patch of sums lies in shared memory, and how many units store it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Patch {
    pub(crate) rows: u32,
    pub(crate) columns: u32,
    /// Distance of rows.
    pub(crate) row: u32,
    pub(crate) units: u32,
}

/// Finishes and stores the sums that lie in shared memory from `from` on, which are those of the product from a row and a
/// column of a batch on. `unit` is one of those that store them.
#[cube]
pub(crate) fn store_patch(
    sums: &SharedMemory<f32>,
    from: u32,
    first_row: u32,
    first_column: u32,
    batch: u32,
    unit: u32,
    extents: &Extents,
    tail: &Tail,
    store: &Store,
    outs: &mut Sequence<Array<u32>>,
    #[comptime] patch: Patch,
    #[comptime] out: DType,
    #[comptime] patches: Option<Patches>,
) {
    let lanes = comptime!(storage::per_word(out));
    let apart = comptime!(store.places.apart);
    for pass in 0..comptime!(patch.rows * patch.columns / lanes / patch.units) {
        let at = pass * comptime!(patch.units) + unit;
        let (own_row, own_column) = first_lane(at, lanes, comptime!(patch.columns), apart);
        let (row, column) = (first_row + own_row, first_column + own_column);
        // Words lie in one block of lanes: what begins inside ends inside.
        if row < extents.m && column < extents.n {
            let position = result_row(row, batch, extents, comptime!(patches.clone())) + column;
            let own = from + own_row * comptime!(patch.row) + own_column;
            let step = extents.out_row * comptime!(apart.rows) + comptime!(apart.columns);
            let mut word = 0u32;
            #[unroll]
            for l in 0..comptime!(lanes as usize) {
                let lane = comptime!(l as u32);
                let sum = sums[(own + comptime!(lane * (apart.rows * patch.row + apart.columns))) as usize];
                word |= finished(sum, position + lane * step, lane.runtime(), tail);
            }
            store_word(word, position, outs, store, lanes);
        }
    }
}

/// Row and column of the first lane of a word of a patch.
#[cube]
fn first_lane(at: u32, #[comptime] lanes: u32, #[comptime] columns: u32, #[comptime] apart: Apart) -> (u32, u32) {
    if comptime!(apart.rows > 0) {
        let (word, column) = (at / columns, at % columns);
        let row = (word / comptime!(apart.rows)) * comptime!(apart.rows * lanes) + word % comptime!(apart.rows);
        (row, column)
    } else {
        let words = comptime!(columns / lanes);
        let (row, word) = (at / words, at % words);
        let column =
            (word / comptime!(apart.columns)) * comptime!(apart.columns * lanes) + word % comptime!(apart.columns);
        (row, column)
    }
}

/// The position of lane `lane` of a word, of a product that has rows of `length` elements.
#[cube]
pub(crate) fn lane_position(word: u32, lane: u32, length: u32, store: &Store, #[comptime] lanes: u32) -> u32 {
    if comptime!(store.places.are_adjacent()) {
        word * lanes + lane
    } else {
        let step = length * comptime!(store.places.apart.rows) + comptime!(store.places.apart.columns);
        (word / step) * (step * lanes) + word % step + lane * step
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ltxc_ir::types::strides_of;

    /// A copy of a tensor of some shape with its axes in another order.
    fn transposed(shape: &[usize], order: &[usize]) -> Copy {
        let strides = strides_of(shape);
        let moved: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
        Copy {
            src_offset: 0,
            src_strides: order.iter().map(|&a| strides[a]).collect(),
            dst_offset: 0,
            dst_strides: strides_of(&moved),
            shape: moved,
        }
    }

    fn apart_of(copy: &Copy, dtype: DType, shape: &[usize]) -> Option<Apart> {
        Stored::new(&[copy], &TensorType::new(dtype, shape), 1, true).map(|s| s.places.apart)
    }

    #[test]
    fn lanes_of_depth_to_space_are_a_block_of_channels_apart() {
        // Rows 3 and 5, channels 6, blocks of 2 by 4.
        let copy = transposed(&[3, 5, 6, 2, 4], &[0, 3, 1, 4, 2]);
        let shape = [3, 5, 48];
        assert_eq!(apart_of(&copy, DType::F32, &shape), Some(Apart::default()));
        assert_eq!(apart_of(&copy, DType::BF16, &shape), Some(Apart { rows: 0, columns: 8 }));
        // Three channels are no words, and nine places are no part of a patch.
        assert_eq!(apart_of(&transposed(&[3, 5, 3, 2, 4], &[0, 3, 1, 4, 2]), DType::BF16, &[3, 5, 24]), None);
        assert_eq!(apart_of(&transposed(&[3, 5, 8, 3, 3], &[0, 3, 1, 4, 2]), DType::BF16, &[3, 5, 72]), None);
    }

    #[test]
    fn lanes_of_space_to_depth_are_rows_apart() {
        let copy = transposed(&[3, 2, 5, 2, 6], &[0, 2, 4, 1, 3]);
        assert_eq!(apart_of(&copy, DType::F16, &[6, 10, 6]), Some(Apart { rows: 1, columns: 0 }));
        // Frames lie too far apart for words of two.
        let copy = transposed(&[3, 2, 5, 6], &[0, 2, 3, 1]);
        assert_eq!(apart_of(&copy, DType::F16, &[6, 5, 6]), None);
        assert_eq!(apart_of(&copy, DType::F32, &[6, 5, 6]), Some(Apart::default()));
    }

    #[test]
    fn parts_of_rows_are_whole_words() {
        let part = |start: usize, n: usize| Copy {
            shape: vec![7, n],
            src_offset: start,
            src_strides: vec![20, 1],
            dst_offset: 0,
            dst_strides: vec![n, 1],
        };
        let ty = |dtype| TensorType::new(dtype, [7, 20]);
        let is_stored = |cuts: [Copy; 2], dtype| Stored::new(&[&cuts[0], &cuts[1]], &ty(dtype), 1, true).is_some();
        assert!(is_stored([part(0, 8), part(8, 12)], DType::BF16));
        assert!(!is_stored([part(0, 7), part(7, 13)], DType::BF16));
        assert!(is_stored([part(0, 7), part(7, 13)], DType::F32));
        // The same elements twice.
        let twice = Copy { src_strides: vec![0, 1], ..part(0, 8) };
        assert!(Stored::new(&[&twice], &ty(DType::F32), 1, true).is_none());
    }
}
