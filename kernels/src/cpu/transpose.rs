//! Transposing stored rows into panels, in registers: eight rows side by side, a square of 32-bit words at a time.
//!
//! A word is one f32, or two bf16 that are widened after they were moved: so bf16 needs half the shuffles.

use ltxc_ir::DType;

use super::element::load;
use super::pack::Matrix;
use super::simd::{Level, level};

/// Stored rows that are transposed side by side.
pub(crate) const SIDE: usize = 8;

/// Elements that are widened at a time where squares of words do not fit.
const STRIP: usize = 64;

/// Writes `ks` elements of `columns` stored rows (at most [`SIDE`]) as columns: element `p` of row `j` at `dst[p · width + j]`,
/// zeros for the missing rows.
///
/// # Safety
/// `src` has these rows; `dst` is valid for `SIDE` floats at each of `ks` multiples of `width`.
pub(crate) unsafe fn columns(src: &Matrix, ks: usize, columns: usize, width: usize, dst: *mut f32) {
    // SAFETY: the extents are those of the caller; `wide` holds `SIDE` rows of a strip.
    unsafe {
        let mut done = if columns == SIDE { words(src, ks, width, dst) } else { 0 };
        let mut wide = [[0f32; STRIP]; SIDE];
        while done < ks {
            let strip = STRIP.min(ks - done);
            for (j, row) in wide[..columns].iter_mut().enumerate() {
                load(src.dtype, src.offset(j * src.stride + done).ptr, &mut row[..strip]);
            }
            let from = Matrix { ptr: wide.as_ptr().cast(), dtype: DType::F32, stride: STRIP, transposed: true };
            let whole = words(&from, strip, width, dst.add(done * width));
            for p in whole..strip {
                for (j, row) in wide.iter().enumerate() {
                    *dst.add((done + p) * width + j) = row[p];
                }
            }
            done += strip;
        }
    }
}

/// Transposes as many elements of [`SIDE`] rows as fill whole squares, and returns how many these are.
///
/// # Safety
/// As for [`columns`].
unsafe fn words(src: &Matrix, ks: usize, width: usize, dst: *mut f32) -> usize {
    #[cfg(target_arch = "x86_64")]
    if level() != Level::Portable {
        // SAFETY: both wider levels have AVX2; the extents are those of the caller.
        return unsafe {
            match src.dtype {
                DType::F32 => avx2::f32s(src.ptr.cast(), src.stride, ks, width, dst),
                DType::BF16 => avx2::bf16s(src.ptr.cast(), src.stride, ks, width, dst),
                _ => 0,
            }
        };
    }
    let _ = (level() == Level::Portable, src, ks, width, dst);
    0
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::SIDE;
    use std::arch::x86_64::*;

    /// # Safety
    /// As for [`super::words`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn f32s(src: *const f32, stride: usize, ks: usize, width: usize, dst: *mut f32) -> usize {
        let whole = ks / SIDE * SIDE;
        for k in (0..whole).step_by(SIDE) {
            // SAFETY: `SIDE` elements from `k` on are inside each row.
            unsafe {
                let out = square(src.add(k).cast(), stride * size_of::<f32>());
                for (i, row) in out.into_iter().enumerate() {
                    _mm256_storeu_ps(dst.add((k + i) * width), row);
                }
            }
        }
        whole
    }

    /// A word holds an even element in its low half and the odd one after it in its high half.
    ///
    /// # Safety
    /// As for [`super::words`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn bf16s(src: *const u16, stride: usize, ks: usize, width: usize, dst: *mut f32) -> usize {
        let whole = ks / (2 * SIDE) * (2 * SIDE);
        let high = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000u32.cast_signed()));
        for k in (0..whole).step_by(2 * SIDE) {
            // SAFETY: `2 · SIDE` elements from `k` on are inside each row.
            unsafe {
                let out = square(src.add(k).cast(), stride * size_of::<u16>());
                for (i, row) in out.into_iter().enumerate() {
                    let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(row)));
                    _mm256_storeu_ps(dst.add((k + 2 * i) * width), even);
                    _mm256_storeu_ps(dst.add((k + 2 * i + 1) * width), _mm256_and_ps(row, high));
                }
            }
        }
        whole
    }

    /// The transposed square of words at `src`, rows `stride` bytes apart.
    ///
    /// Rows 0 to 3 go into the low halves of vectors and rows 4 to 7 into the high ones as they are loaded, so that the
    /// rest are exchanges within halves.
    ///
    /// # Safety
    /// `src` is valid for eight words in each of eight rows.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn square(src: *const u8, stride: usize) -> [__m256; SIDE] {
        // SAFETY: four words from word `4 · half` on are inside row `r`.
        let quad = |r: usize, half: usize| unsafe { _mm_loadu_ps(src.add(r * stride + half * 16).cast()) };
        let mut out = [_mm256_setzero_ps(); SIDE];
        for half in 0..2 {
            let row = |r: usize| _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(quad(r, half)), quad(r + 4, half));
            let (a, b, c, d) = (row(0), row(1), row(2), row(3));
            let low = [_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)].map(|v| _mm256_castps_pd(v));
            let high = [_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)].map(|v| _mm256_castps_pd(v));
            out[4 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low[0], low[1]));
            out[4 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low[0], low[1]));
            out[4 * half + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high[0], high[1]));
            out[4 * half + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high[0], high[1]));
        }
        out
    }
}
