//! The blocked matrix product behind `matmul` and the convolutions.
//!
//! A group of columns of the right operand is packed once, over all of k, into panels that every thread reads. Then each
//! task owns a block of rows by some of these columns: it packs its rows, a block of k at a time, and runs the tiles. So
//! the result is written while it is in the second cache, a bf16 operand is widened while it is packed, and a
//! convolution packs patches of its input instead of rows; nothing is ever converted or unfolded as a whole.
//!
//! Every element is summed over k in blocks of [`K_BLOCK`] in ascending order, whatever the partition: results do not
//! depend on the number of threads.
//!
//! Measured on 2 cores of a Xeon with AVX-512 (`ltxc-bench`, binary `kernels`), as the gemm crate 0.19 reaches only
//! AVX2 by default and can neither read bf16 nor convolve without an unfolded copy.

use ltxc_ir::DType;
use std::ops::Range;

use super::element::store;
use super::pack::Panels;
use super::parallel::{Need, Scratch, Shared, for_each, threads};
use super::tile::{MAX_ROWS, MAX_WIDTH, Store, Tile, max_rows, width};

/// Summed elements per block: a row panel of a tile and the panel of columns share the first cache.
pub(crate) const K_BLOCK: usize = 192;

/// Distance of packed rows. Not a power of two, so that rows fall into different sets of the cache.
pub(crate) const LDA: usize = K_BLOCK + 16;

/// Rows per task: packed, they take 300 KB of the second cache. A multiple of the tile heights.
const ROW_BLOCK: usize = 192;

/// Columns per task when the result is narrower than f32 and sums need a buffer.
const NARROW_COLUMNS: usize = 256;

/// Floats of packed columns: 16 MB, what the last cache holds.
const PACKED_FLOATS: usize = 4 << 20;

/// Columns packed at a time, between these bounds: fewer would repeat the packing of rows too often.
const MIN_COLUMNS: usize = 512;
const MAX_COLUMNS: usize = 4096;

/// Something whose rows can be packed: the left operand.
pub(crate) trait Rows: Sync {
    /// Writes rows `rows`, summed indices `ks` (at most [`K_BLOCK`]) as f32 at `dst`, rows [`LDA`] apart.
    ///
    /// # Safety
    /// The ranges lie inside the operand; `dst` is valid for the block and nothing else uses it.
    unsafe fn pack(&self, rows: Range<usize>, ks: Range<usize>, dst: *mut f32);
}

/// Where the rows of the result are: element offsets from `ptr`.
pub(crate) struct Target<'a> {
    /// First element of the result.
    pub ptr: Shared<u8>,
    /// Its dtype.
    pub dtype: DType,
    /// Offset of the first column of a row.
    pub row: &'a (dyn Fn(usize) -> usize + Sync),
}

/// Extents of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extents {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Summed elements.
    pub k: usize,
}

impl Extents {
    /// Columns that are packed at a time.
    fn columns(self) -> usize {
        let fit = PACKED_FLOATS / self.k.max(1);
        let columns = fit.clamp(MIN_COLUMNS, MAX_COLUMNS).min(self.n);
        columns.next_multiple_of(MAX_WIDTH)
    }
}

/// Scratch that [`product`] needs for a result of `dtype`.
pub(crate) fn need(e: Extents, dtype: DType) -> Need {
    let sums = if dtype == DType::F32 { 0 } else { ROW_BLOCK * NARROW_COLUMNS };
    Need { shared: e.columns().saturating_mul(e.k), per_thread: ROW_BLOCK * LDA + sums }
}

/// Computes `rows · columns` into `target`.
///
/// # Safety
/// The operands have the extents; the rows of `target` are valid for `n` elements, disjoint from each other and from the
/// operands; `scratch` was made for [`need`] of the same extents and dtype.
pub(crate) unsafe fn product(e: Extents, lhs: &dyn Rows, rhs: &dyn Panels, target: &Target<'_>, scratch: &Scratch<'_>) {
    let packed = scratch.shared();
    let (width, at_once) = (width(), e.columns());
    let k_blocks = e.k.div_ceil(K_BLOCK);
    for first in (0..e.n).step_by(at_once.max(1)) {
        let group = first..e.n.min(first + at_once);
        let panels = group.len().div_ceil(width);
        for_each(panels * k_blocks, group.len().saturating_mul(e.k), |task| {
            let (panel, block) = (task / k_blocks, task % k_blocks);
            let ks = block * K_BLOCK..e.k.min((block + 1) * K_BLOCK);
            let column = group.start + panel * width;
            // SAFETY: panels lie one after the other, each `k` rows of `width`; `columns()` made room for all of them.
            unsafe {
                let dst = packed.get().add((panel * e.k + ks.start) * width);
                rhs.pack(ks, column..group.end.min(column + width), width, dst);
            }
        });
        let part = Partition::new(e.m, group.len(), target.dtype);
        let work = e.m.saturating_mul(group.len()).saturating_mul(e.k.max(1));
        for_each(part.row_blocks * part.column_blocks, work, |task| {
            let (rows, columns) = part.task(task, e.m, group.len());
            // SAFETY: called once per task.
            let slot = unsafe { scratch.slot() };
            let (block, sums) = slot.split_at_mut(ROW_BLOCK * LDA);
            let job = Job { e, lhs, packed: packed.get(), target, group: &group, rows, columns };
            // SAFETY: tasks own disjoint parts of the result; the panels are complete.
            unsafe { job.run(block, sums.as_mut_ptr()) };
        });
    }
}

/// How the result is cut into tasks. Only balance depends on it, not values.
struct Partition {
    rows: usize,
    row_blocks: usize,
    columns: usize,
    column_blocks: usize,
}

impl Partition {
    fn new(m: usize, n: usize, dtype: DType) -> Partition {
        // Four tasks per thread even out what threads of different speed do.
        let wanted = if threads() > 1 { 4 * threads() } else { 1 };
        let mut rows = ROW_BLOCK;
        while rows > 48 && m.div_ceil(rows) < wanted {
            rows /= 2;
        }
        // Balanced blocks: 200 rows are 2 × 100, not 192 + 8.
        let rows = m.div_ceil(m.div_ceil(rows).max(1)).next_multiple_of(MAX_ROWS);
        let row_blocks = m.div_ceil(rows.max(1));
        let mut columns = n;
        while columns > 128 && row_blocks * n.div_ceil(columns) < wanted {
            columns = columns.div_ceil(2);
        }
        if dtype != DType::F32 {
            columns = columns.min(NARROW_COLUMNS);
        }
        let columns = columns.next_multiple_of(MAX_WIDTH);
        Partition { rows, row_blocks, columns, column_blocks: n.div_ceil(columns.max(1)) }
    }

    fn task(&self, task: usize, m: usize, n: usize) -> (Range<usize>, Range<usize>) {
        let (row, column) = (task / self.column_blocks * self.rows, task % self.column_blocks * self.columns);
        (row..m.min(row + self.rows), column..n.min(column + self.columns))
    }
}

/// A block of rows by a range of the packed columns.
struct Job<'a> {
    e: Extents,
    lhs: &'a dyn Rows,
    packed: *const f32,
    target: &'a Target<'a>,
    /// The packed columns, in columns of the result.
    group: &'a Range<usize>,
    rows: Range<usize>,
    /// In packed columns.
    columns: Range<usize>,
}

impl Job<'_> {
    /// # Safety
    /// As for [`product`]; nothing else writes this part of the result. `sums` has room for `ROW_BLOCK` rows of
    /// `NARROW_COLUMNS` if the result is narrower than f32.
    unsafe fn run(&self, block: &mut [f32], sums: *mut f32) {
        let f32_target = self.target.dtype == DType::F32;
        let mut offsets = [0usize; ROW_BLOCK];
        let offsets = &mut offsets[..self.rows.len()];
        offsets.iter_mut().zip(self.rows.clone()).for_each(|(o, r)| *o = (self.target.row)(r));
        let column = self.group.start + self.columns.start;
        // SAFETY: offsets of rows of the result, and rows of the buffer, hold `columns` elements each.
        let row = |r: usize| unsafe {
            if f32_target {
                self.target.ptr.get().cast::<f32>().add(offsets[r] + column)
            } else {
                sums.add(r * NARROW_COLUMNS)
            }
        };
        if self.e.k == 0 {
            for r in 0..self.rows.len() {
                // SAFETY: as above.
                unsafe { std::slice::from_raw_parts_mut(row(r), self.columns.len()).fill(0.0) };
            }
        }
        for k in (0..self.e.k).step_by(K_BLOCK) {
            let ks = k..self.e.k.min(k + K_BLOCK);
            // SAFETY: the block has room for `ROW_BLOCK` rows at distance `LDA`.
            unsafe {
                self.lhs.pack(self.rows.clone(), ks.clone(), block.as_mut_ptr());
                self.tiles(&ks, block, &row);
            }
        }
        if !f32_target {
            for (r, offset) in offsets.iter().enumerate() {
                let bytes = (offset + column) * self.target.dtype.bytes();
                // SAFETY: the rows of the buffer and of the result hold these columns.
                unsafe {
                    let from = std::slice::from_raw_parts(row(r), self.columns.len());
                    store(self.target.dtype, from, self.target.ptr.get().add(bytes));
                }
            }
        }
    }

    /// All tiles of one block of k.
    ///
    /// # Safety
    /// As for [`Job::run`]; `row` gives where each row of the block is summed.
    unsafe fn tiles(&self, ks: &Range<usize>, block: &[f32], row: &dyn Fn(usize) -> *mut f32) {
        let (width, m) = (width(), self.rows.len());
        // Tiles of equal height: 16 rows are 8 + 8, not 12 + 4.
        let tiles = m.div_ceil(max_rows());
        let height = m.div_ceil(tiles);
        let rows: [*mut f32; ROW_BLOCK] = std::array::from_fn(|r| if r < m { row(r) } else { std::ptr::null_mut() });
        for column in self.columns.clone().step_by(width) {
            let panel = column / width;
            for first in (0..m).step_by(height) {
                let mut c = [std::ptr::null_mut(); MAX_ROWS];
                let c = &mut c[..height.min(m - first)];
                let shift = column - self.columns.start;
                c.iter_mut().zip(&rows[first..]).for_each(|(c, r)| *c = r.wrapping_add(shift));
                // SAFETY: panel and rows are inside what was packed, `c` inside what this task owns.
                unsafe {
                    let panel_at = |panel: usize| self.packed.wrapping_add((panel * self.e.k + ks.start) * width);
                    let tile = Tile {
                        k: ks.len(),
                        a: block.as_ptr().add(first * LDA),
                        b: panel_at(panel),
                        next: panel_at(panel + 1).wrapping_add(first / height * ks.len() * width / tiles),
                        columns: width.min(self.columns.end - column),
                        store: if ks.start == 0 { Store::Set } else { Store::Add },
                    };
                    tile.run::<LDA>(c);
                }
            }
        }
    }
}
