//! Where finished sums go: to memory, or through what follows the kernel that made them.
//!
//! Kernels whose results are complete block by block hand each block to a [`Sink`] while it is in cache. [`Memory`] is the
//! plain one; a fused call puts the maps and stores behind the kernel in its place.

use ltxc_ir::DType;

use super::Output;
use super::element::store;
use super::parallel::Shared;

/// A block of finished sums: panels of columns one after the other, each with all rows.
#[derive(Clone, Copy)]
pub(crate) struct Sums<'a> {
    /// The panels.
    pub values: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    /// Floats of a row of a panel. The last panel may use fewer.
    pub panel: usize,
}

impl<'a> Sums<'a> {
    /// Rows of `columns` elements, one after the other.
    pub(crate) fn dense(values: &'a [f32], columns: usize) -> Sums<'a> {
        let columns = columns.max(1);
        Sums { values, rows: values.len() / columns, columns, panel: columns }
    }

    /// The parts of a row, each with its first column.
    #[inline]
    pub(crate) fn row(self, row: usize) -> impl Iterator<Item = (usize, &'a [f32])> {
        (0..self.columns).step_by(self.panel).map(move |column| {
            let n = self.panel.min(self.columns - column);
            (column, &self.values[column * self.rows + row * self.panel..][..n])
        })
    }

    /// Writes `columns` columns from `column` on of the rows from `row` on to `dst`, row behind row until it is full.
    pub(crate) fn gather(self, row: usize, column: usize, columns: usize, dst: &mut [f32]) {
        let mut done = 0;
        while done < columns {
            let at = (column + done) % self.panel;
            let n = (self.panel - at).min(columns - done);
            let panel = &self.values[(column + done - at) * self.rows..];
            // Widths of panels are known, so that their rows are a few vectors each.
            let src = (&panel[row * self.panel + at..], self.panel);
            match n {
                16 => copy_rows::<16>(src, (&mut dst[done..], columns)),
                32 => copy_rows::<32>(src, (&mut dst[done..], columns)),
                _ if n == self.panel && n == columns => dst.copy_from_slice(&src.0[..dst.len()]),
                _ => {
                    let rows = dst[done..].chunks_mut(columns).zip(src.0.chunks(self.panel));
                    rows.for_each(|(to, from)| to[..n].copy_from_slice(&from[..n]));
                }
            }
            done += n;
        }
    }
}

/// Copies `N` elements to every row of the second matrix; rows begin at multiples of the numbers.
fn copy_rows<const N: usize>((src, src_step): (&[f32], usize), (dst, dst_step): (&mut [f32], usize)) {
    for (to, from) in dst.chunks_mut(dst_step).zip(src.chunks(src_step)) {
        to[..N].copy_from_slice(&from[..N]);
    }
}

/// Takes results block by block, from any thread.
pub(crate) trait Sink: Sync {
    /// Takes a block. Row `r` of it is the elements from `at(r)` of the result, counted row-major.
    ///
    /// # Safety
    /// Every element of the result is taken once, `room` has as many floats as the sink asked for, and nothing else uses it.
    unsafe fn take(&self, sums: Sums<'_>, at: &dyn Fn(usize) -> usize, room: &mut [f32]);
}

/// A tensor in memory.
pub(crate) struct Memory {
    ptr: Shared<u8>,
    dtype: DType,
}

impl Memory {
    pub(crate) fn new(out: &Output<'_>) -> Memory {
        Memory { ptr: Shared::new(out.ptr), dtype: out.ty.dtype }
    }
}

impl Sink for Memory {
    unsafe fn take(&self, sums: Sums<'_>, at: &dyn Fn(usize) -> usize, _: &mut [f32]) {
        for r in 0..sums.rows {
            let first = at(r);
            for (column, part) in sums.row(r) {
                // SAFETY: the caller owns these elements of the tensor.
                unsafe { store(self.dtype, part, self.ptr.get().add((first + column) * self.dtype.bytes())) };
            }
        }
    }
}
