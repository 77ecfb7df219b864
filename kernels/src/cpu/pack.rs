//! Right operands as panels: `width()` columns side by side, one row of the panel for each summed index.

use ltxc_ir::DType;
use std::ops::Range;

use super::element::load;
use super::simd::multiversion;
use super::tile::MAX_WIDTH;

/// Something that can be cut into panels.
pub(crate) trait Panels: Sync {
    /// Writes the panel of `columns` (at most `width`) and summed indices `ks`: `ks.len()` rows of `width` at `dst`,
    /// zeros behind the last column.
    ///
    /// # Safety
    /// The ranges lie inside the operand; `dst` is valid for the panel and nothing else uses it.
    unsafe fn pack(&self, ks: Range<usize>, columns: Range<usize>, width: usize, dst: *mut f32);
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

/// Summed indices that are transposed at once: two lines of a bf16 row, and a strip that stays in the first cache.
const STRIP: usize = 64;

/// # Safety
/// As for [`Panels::pack`].
unsafe fn pack_transposed(src: &Matrix, ks: Range<usize>, columns: Range<usize>, width: usize, dst: *mut f32) {
    let mut wide = [[0f32; STRIP]; MAX_WIDTH];
    for k in ks.clone().step_by(STRIP) {
        let strip = STRIP.min(ks.end - k);
        for (row, column) in wide.iter_mut().zip(columns.clone()) {
            // SAFETY: the element and the strip behind it are inside the operand.
            unsafe { load(src.dtype, src.offset(column * src.stride + k).ptr, &mut row[..strip]) };
        }
        wide[columns.len()..].as_flattened_mut().fill(0.0);
        // SAFETY: the strip begins `k − ks.start` rows into the panel.
        let out = unsafe { std::slice::from_raw_parts_mut(dst.add((k - ks.start) * width), strip * width) };
        transpose(&wide, out, width);
    }
}

multiversion! {
    /// `out[i · width + j] = wide[j][i]`.
    fn transpose(wide: &[[f32; STRIP]; MAX_WIDTH], out: &mut [f32], width: usize) {
        let strip = out.len() / width;
        let whole = strip / 8 * 8;
        for i in (0..whole).step_by(8) {
            for j in (0..width).step_by(8) {
                transpose_8x8(wide, i, j, &mut out[i * width + j..], width);
            }
        }
        for i in whole..strip {
            for j in 0..width {
                out[i * width + j] = wide[j][i];
            }
        }
    }
}

/// Transposes the square at `wide[j..j + 8][i..i + 8]`.
///
/// Three rounds of exchanges between rows at distance 4, 2 and 1 (in elements): the usual butterfly, written so that each
/// line is one shuffle of two vectors.
#[inline(always)]
fn transpose_8x8(wide: &[[f32; STRIP]; MAX_WIDTH], i: usize, j: usize, out: &mut [f32], stride: usize) {
    type Row = [f32; 8];
    let r: [Row; 8] = std::array::from_fn(|n| std::array::from_fn(|m| wide[j + n][i + m]));
    let low = |a: Row, b: Row| [a[0], b[0], a[1], b[1], a[4], b[4], a[5], b[5]];
    let high = |a: Row, b: Row| [a[2], b[2], a[3], b[3], a[6], b[6], a[7], b[7]];
    let low2 = |a: Row, b: Row| [a[0], a[1], b[0], b[1], a[4], a[5], b[4], b[5]];
    let high2 = |a: Row, b: Row| [a[2], a[3], b[2], b[3], a[6], a[7], b[6], b[7]];
    let low4 = |a: Row, b: Row| [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]];
    let high4 = |a: Row, b: Row| [a[4], a[5], a[6], a[7], b[4], b[5], b[6], b[7]];
    let pairs = [
        low(r[0], r[1]),
        high(r[0], r[1]),
        low(r[2], r[3]),
        high(r[2], r[3]),
        low(r[4], r[5]),
        high(r[4], r[5]),
        low(r[6], r[7]),
        high(r[6], r[7]),
    ];
    let quads = [
        low2(pairs[0], pairs[2]),
        high2(pairs[0], pairs[2]),
        low2(pairs[1], pairs[3]),
        high2(pairs[1], pairs[3]),
        low2(pairs[4], pairs[6]),
        high2(pairs[4], pairs[6]),
        low2(pairs[5], pairs[7]),
        high2(pairs[5], pairs[7]),
    ];
    for n in 0..4 {
        out[n * stride..n * stride + 8].copy_from_slice(&low4(quads[n], quads[n + 4]));
        out[(n + 4) * stride..(n + 4) * stride + 8].copy_from_slice(&high4(quads[n], quads[n + 4]));
    }
}
