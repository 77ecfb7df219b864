//! Right operands as panels: `width()` columns side by side, one row of the panel for each summed index.

use ltxc_ir::DType;
use std::ops::Range;

use super::element::load;
use super::tile::Source;
use super::transpose;

/// Something that can be cut into panels.
pub(crate) trait Panels: Sync {
    /// Writes the panel of `columns` (at most `width`) and summed indices `ks`: `ks.len()` rows of `width` at `dst`,
    /// zeros behind the last column.
    ///
    /// # Safety
    /// The ranges lie inside the operand; `dst` is valid for the panel and nothing else uses it.
    unsafe fn pack(&self, ks: Range<usize>, columns: Range<usize>, width: usize, dst: *mut f32);

    /// Where the panel that begins at summed index `k` and `column` is read from. May lie outside the operand.
    fn source(&self, k: usize, column: usize) -> Source;
}

/// A matrix in memory as right operand.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    /// First element.
    pub ptr: *const u8,
    /// Its dtype.
    pub dtype: DType,
    /// Elements from one stored row to the next.
    pub stride: usize,
    /// Whether a stored row holds the summed index (`[n, k]`), else the columns (`[k, n]`).
    pub transposed: bool,
}

// SAFETY: only read, and valid for the time of a launch by the contract of `launch`.
unsafe impl Sync for Matrix {}

impl Matrix {
    /// The same matrix from another element on.
    pub(crate) fn offset(self, elements: usize) -> Matrix {
        Matrix { ptr: self.ptr.wrapping_add(elements * self.dtype.bytes()), ..self }
    }
}

impl Panels for Matrix {
    unsafe fn pack(&self, ks: Range<usize>, columns: Range<usize>, width: usize, dst: *mut f32) {
        // SAFETY: passed on to the caller.
        unsafe {
            if self.transposed {
                pack_transposed(self, ks, columns, width, dst);
            } else {
                let at = self.offset(ks.start * self.stride + columns.start);
                pack_rows(&at, ks.len(), columns.len(), width, dst);
            }
        }
    }

    fn source(&self, k: usize, column: usize) -> Source {
        let (element, row) = (self.dtype.bytes(), self.stride * self.dtype.bytes());
        let (along, across) = if self.transposed { (element, row) } else { (row, element) };
        Source { at: self.ptr.wrapping_add(k * along + column * across), along, across }
    }
}

/// Writes `rows` stored rows of `columns` elements as rows of a panel.
///
/// # Safety
/// `src` has these rows; `dst` is valid for `rows · width`.
pub(crate) unsafe fn pack_rows(src: &Matrix, rows: usize, columns: usize, width: usize, dst: *mut f32) {
    for r in 0..rows {
        // SAFETY: row `r` is inside both by the promise of the caller.
        unsafe {
            let row = std::slice::from_raw_parts_mut(dst.add(r * width), width);
            let (used, rest) = row.split_at_mut(columns);
            load(src.dtype, src.offset(r * src.stride).ptr, used);
            rest.fill(0.0);
        }
    }
}

/// # Safety
/// As for [`Panels::pack`].
unsafe fn pack_transposed(src: &Matrix, ks: Range<usize>, columns: Range<usize>, width: usize, dst: *mut f32) {
    for first in (0..width).step_by(transpose::SIDE) {
        let count = columns.len().saturating_sub(first).min(transpose::SIDE);
        let at = src.offset((columns.start + first) * src.stride + ks.start);
        // SAFETY: the columns are inside the operand, the place inside the panel.
        unsafe { transpose::columns(&at, ks.len(), count, width, dst.add(first)) };
    }
}
