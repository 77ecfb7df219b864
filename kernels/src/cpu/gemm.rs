//! The blocked matrix product behind `matmul` and the convolutions.
//!
//! Rows of the left operand are packed once, over all of k, into memory that every thread reads. Then each task owns some
//! of these rows by a range of columns: panel by panel of the right operand, it packs a block of k into its first cache
//! and runs the tiles of all its rows on it, while the source of the next panel is fetched. So the right operand is read
//! from memory once for hundreds of rows and written nowhere but to the cache, a bf16 operand is widened while it is
//! packed, and a convolution packs patches of its input instead of rows; nothing is ever unfolded as a whole.
//!
//! Every element is summed over k in blocks of [`K_BLOCK`] in ascending order, whatever the partition: results do not
//! depend on the number of threads.

use ltxc_ir::DType;
use std::ops::Range;

use super::element::store;
use super::pack::Panels;
use super::parallel::{Need, Scratch, Shared, for_each, threads};
use super::tile::{Fetch, MAX_ROWS, MAX_WIDTH, Store, Tile, max_rows, width};

/// Summed elements per block: a row panel of a tile and the panel of columns share the first cache.
pub(crate) const K_BLOCK: usize = 192;

/// Distance of packed rows. Not a power of two, so that rows fall into different sets of the cache.
pub(crate) const LDA: usize = K_BLOCK + 16;

/// Most rows per task: a block of k of them takes 640 KB of the second cache. A multiple of the tile heights.
const TASK_ROWS: usize = 768;

/// Most columns per task: with all rows, sums take 400 KB of the second cache.
const TASK_COLUMNS: usize = 128;

/// Columns that a task has at least where rows can be divided instead.
const MIN_COLUMNS: usize = 64;

/// Rows that a task has at least: every task packs its columns, which costs as much as a few rows.
const MIN_ROWS: usize = 48;

/// Floats of packed rows, if these are more than [`PACKED_ROWS`]: 16 MB, what the last cache holds.
const PACKED_FLOATS: usize = 4 << 20;

/// Rows that are packed at a time are a multiple of this: columns are packed again for the next ones.
const PACKED_ROWS: usize = TASK_ROWS / 2;

/// Rows that are packed by one task.
const PACKED_AT_ONCE: usize = 24;

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
    fn k_blocks(self) -> usize {
        self.k.div_ceil(K_BLOCK)
    }

    /// Rows that are packed at a time.
    fn rows(self) -> usize {
        let row = self.k_blocks().saturating_mul(LDA).max(1);
        (PACKED_FLOATS / row / PACKED_ROWS).max(1).saturating_mul(PACKED_ROWS).min(self.m)
    }
}

/// Scratch that [`product`] needs.
pub(crate) fn need(e: Extents) -> Need {
    let shared = e.rows().saturating_mul(e.k_blocks()).saturating_mul(LDA);
    let sums = TASK_ROWS.min(e.m) * TASK_COLUMNS.min(e.n.next_multiple_of(MAX_WIDTH));
    Need { shared, per_thread: K_BLOCK * MAX_WIDTH + sums }
}

/// Computes `rows · columns` into `target`.
///
/// # Safety
/// The operands have the extents; the rows of `target` are valid for `n` elements, disjoint from each other and from the
/// operands; `scratch` was made for [`need`] of the same extents.
pub(crate) unsafe fn product(e: Extents, lhs: &dyn Rows, rhs: &dyn Panels, target: &Target<'_>, scratch: &Scratch<'_>) {
    let packed = scratch.shared();
    for first in (0..e.m).step_by(e.rows().max(1)) {
        let group = first..e.m.min(first + e.rows());
        let pieces = group.len().div_ceil(PACKED_AT_ONCE);
        for_each(pieces * e.k_blocks(), group.len().saturating_mul(e.k), |task| {
            let (block, piece) = (task / pieces, task % pieces);
            let ks = block * K_BLOCK..e.k.min((block + 1) * K_BLOCK);
            let rows = group.start + piece * PACKED_AT_ONCE..group.end.min(group.start + (piece + 1) * PACKED_AT_ONCE);
            // SAFETY: each block of k has the rows of the group at distance `LDA`, and `need` counted all blocks.
            unsafe {
                lhs.pack(rows.clone(), ks, packed.get().add((block * group.len() + rows.start - group.start) * LDA))
            };
        });
        let part = Partition::new(group.len(), e.n);
        let work = group.len().saturating_mul(e.n).saturating_mul(e.k.max(1));
        for_each(part.row_blocks * part.column_blocks, work, |task| {
            let (rows, columns) = part.task(task, group.len(), e.n);
            // SAFETY: called once per task.
            let slot = unsafe { scratch.slot() };
            let (panel, sums) = slot.split_at_mut(K_BLOCK * MAX_WIDTH);
            let job = Job { e, rhs, packed: packed.get(), target, group: &group, rows, columns };
            // SAFETY: tasks own disjoint parts of the result; the rows are complete.
            unsafe { job.run(panel, sums) };
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
    fn new(m: usize, n: usize) -> Partition {
        // Four tasks per thread even out what threads of different speed do.
        let wanted = if threads() > 1 { 4 * threads() } else { 1 };
        let mut row_blocks = m.div_ceil(TASK_ROWS);
        let mut columns = TASK_COLUMNS.min(n);
        while columns > MIN_COLUMNS && row_blocks * n.div_ceil(columns) < wanted {
            columns = columns.div_ceil(2);
        }
        let columns = columns.next_multiple_of(MAX_WIDTH);
        let column_blocks = n.div_ceil(columns.max(1));
        while m.div_ceil(2 * row_blocks.max(1)) > MIN_ROWS && row_blocks * column_blocks < wanted {
            row_blocks *= 2;
        }
        // Balanced blocks: 400 rows are 2 × 200, not 384 + 16.
        let rows = m.div_ceil(row_blocks.max(1)).next_multiple_of(MAX_ROWS);
        Partition { rows, row_blocks: m.div_ceil(rows.max(1)), columns, column_blocks }
    }

    /// Rows are the inner index: tasks that follow each other read the same columns.
    fn task(&self, task: usize, m: usize, n: usize) -> (Range<usize>, Range<usize>) {
        let (row, column) = (task % self.row_blocks * self.rows, task / self.row_blocks * self.columns);
        (row..m.min(row + self.rows), column..n.min(column + self.columns))
    }
}

/// Some of the packed rows by a range of columns.
struct Job<'a> {
    e: Extents,
    rhs: &'a dyn Panels,
    packed: *const f32,
    target: &'a Target<'a>,
    /// The packed rows, in rows of the result.
    group: &'a Range<usize>,
    /// In packed rows.
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Job<'_> {
    /// Sums lie panel by panel, rows at the distance of a panel: rows of the result may be a power of two apart, and
    /// then their lines would drive each other out of the cache.
    ///
    /// # Safety
    /// As for [`product`]; nothing else writes this part of the result. `panel` has room for one panel of a block of k,
    /// `sums` for the rows and columns.
    unsafe fn run(&self, panel: &mut [f32], sums: &mut [f32]) {
        let (width, m, first) = (width(), self.rows.len(), self.columns.start);
        if self.e.k == 0 {
            sums.fill(0.0);
        }
        for (block, k) in (0..self.e.k).step_by(K_BLOCK).enumerate() {
            let ks = k..self.e.k.min(k + K_BLOCK);
            // SAFETY: the block has the rows of the group.
            let rows = unsafe { self.packed.add((block * self.group.len() + self.rows.start) * LDA) };
            for column in self.columns.clone().step_by(width) {
                let columns = column..self.columns.end.min(column + width);
                let next = if columns.end < self.columns.end { (ks.start, columns.end) } else { (ks.end, first) };
                // SAFETY: ranges are inside the operand, panel and sums have room.
                unsafe {
                    self.rhs.pack(ks.clone(), columns, width, panel.as_mut_ptr());
                    let sums = sums.as_mut_ptr().add((column - first) * m);
                    self.tiles(ks.len(), rows, panel.as_ptr(), sums, block > 0, next);
                }
            }
        }
        let dtype = self.target.dtype;
        for r in 0..m {
            let row = (self.target.row)(self.group.start + self.rows.start + r);
            for column in self.columns.clone().step_by(width) {
                let columns = width.min(self.columns.end - column);
                let from = &sums[(column - first) * m + r * width..][..columns];
                // SAFETY: this task owns these columns of the row.
                unsafe { store(dtype, from, self.target.ptr.get().add((row + column) * dtype.bytes())) };
            }
        }
    }

    /// All tiles of one panel.
    ///
    /// # Safety
    /// As for [`Job::run`]; `rows` are `k` summed elements of the rows of the task, `sums` has a row of the panel's width
    /// for each.
    unsafe fn tiles(
        &self,
        k: usize,
        rows: *const f32,
        panel: *const f32,
        sums: *mut f32,
        adds: bool,
        next: (usize, usize),
    ) {
        let (width, m) = (width(), self.rows.len());
        // Tiles of equal height: 16 rows are 8 + 8, not 12 + 4.
        let tiles = m.div_ceil(max_rows());
        let height = m.div_ceil(tiles);
        let source = self.rhs.source(next.0, next.1);
        for (i, first) in (0..m).step_by(height).enumerate() {
            let c: [*mut f32; MAX_ROWS] = std::array::from_fn(|r| sums.wrapping_add((first + r) * width));
            // SAFETY: panel and rows are inside what was packed, `c` inside the sums of this task.
            unsafe {
                let tile = Tile {
                    k,
                    a: rows.add(first * LDA),
                    b: panel,
                    columns: width,
                    store: if adds { Store::Add } else { Store::Set },
                    fetch: Fetch::part(source, i, tiles),
                };
                tile.run::<LDA>(&c[..height.min(m - first)]);
            }
        }
    }
}
