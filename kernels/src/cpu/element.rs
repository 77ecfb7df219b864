//! Element types in memory: runs of any dtype to and from f32 or i64.
//!
//! Every conversion works on a run, so that the dtype is looked at once per run and the loop inside vectorises.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ltxc_ir::DType;
use ltxc_ir::eval::{f8_to_f64, f64_to_f8};
use std::sync::LazyLock;

use super::math::leaky_relu;
use super::simd::multiversion;

/// Reads `dst.len()` elements as f32; truth values are 0 and 1.
///
/// # Safety
/// `src` is valid for that many elements of `dtype` and aligned to it.
#[inline]
pub(crate) unsafe fn load(dtype: DType, src: *const u8, dst: &mut [f32]) {
    let n = dst.len();
    // SAFETY: the caller promises `n` elements of the dtype at `src`.
    unsafe {
        match dtype {
            DType::F32 => std::ptr::copy_nonoverlapping(src.cast(), dst.as_mut_ptr(), n),
            DType::BF16 => widen_bf16(run(src, n), dst),
            DType::F16 => run::<f16>(src, n).convert_to_f32_slice(dst),
            DType::F8E4M3 => widen_f8(run(src, n), dst, &F8E4M3),
            DType::F8E5M2 => widen_f8(run(src, n), dst, &F8E5M2),
            DType::I8 => convert(run::<i8>(src, n), dst, |v| v as f32),
            DType::U8 | DType::Bool => convert(run::<u8>(src, n), dst, |v| v as f32),
            DType::I32 => convert(run::<i32>(src, n), dst, |v| v as f32),
            DType::U32 => convert(run::<u32>(src, n), dst, |v| v as f32),
        }
    }
}

/// As [`load`], through a leaky ReLU whose results are rounded to the dtype.
///
/// # Safety
/// As for [`load`]; `dtype` is floating point.
pub(crate) unsafe fn load_leaky(dtype: DType, src: *const u8, slope: f32, dst: &mut [f32]) {
    let n = dst.len();
    // SAFETY: passed on to the caller; no dtype is wider than `u32`, and a part is at most as long as `narrow`.
    unsafe {
        match dtype {
            DType::F32 => leaky_f32(run(src, n), slope, dst),
            DType::BF16 => leaky_bf16(run(src, n), slope, dst),
            _ => {
                load(dtype, src, dst);
                let mut narrow = [0u32; 64];
                for part in dst.chunks_mut(narrow.len()) {
                    part.iter_mut().for_each(|v| *v = leaky_relu(*v, slope));
                    store(dtype, part, narrow.as_mut_ptr().cast());
                    load(dtype, narrow.as_ptr().cast(), part);
                }
            }
        }
    }
}

multiversion! {
    fn leaky_f32(src: &[f32], slope: f32, dst: &mut [f32]) {
        for (d, &s) in dst.iter_mut().zip(src) {
            *d = leaky_relu(s, slope);
        }
    }
}

multiversion! {
    fn leaky_bf16(src: &[bf16], slope: f32, dst: &mut [f32]) {
        for (d, &s) in dst.iter_mut().zip(src) {
            *d = f32::from_bits(bf16_bits(leaky_relu(bf16_to_f32(s), slope)) << 16);
        }
    }
}

/// Writes f32 values in `dtype`: floats round to nearest, integers truncate and saturate, truth is what is not 0.
///
/// # Safety
/// `dst` is valid for `src.len()` elements of `dtype`, aligned to it, and does not overlap `src`.
#[inline]
pub(crate) unsafe fn store(dtype: DType, src: &[f32], dst: *mut u8) {
    let n = src.len();
    // SAFETY: the caller promises room for `n` elements of the dtype at `dst`.
    unsafe {
        match dtype {
            DType::F32 => std::ptr::copy_nonoverlapping(src.as_ptr(), dst.cast(), n),
            DType::BF16 => narrow_bf16(src, run_mut(dst, n)),
            DType::F16 => run_mut::<f16>(dst, n).convert_from_f32_slice(src),
            DType::F8E4M3 => convert(src, run_mut(dst, n), |v| f64_to_f8(v as f64, 4)),
            DType::F8E5M2 => convert(src, run_mut(dst, n), |v| f64_to_f8(v as f64, 5)),
            DType::I8 => convert(src, run_mut(dst, n), |v| v as i8),
            DType::U8 => convert(src, run_mut(dst, n), |v| v as u8),
            DType::I32 => convert(src, run_mut(dst, n), |v| v as i32),
            DType::U32 => convert(src, run_mut(dst, n), |v| v as u32),
            DType::Bool => convert(src, run_mut(dst, n), |v| (v != 0.0) as u8),
        }
    }
}

/// Reads `dst.len()` integers or truth values.
///
/// # Safety
/// As for [`load`]; `dtype` is not floating point.
pub(crate) unsafe fn load_int(dtype: DType, src: *const u8, dst: &mut [i64]) {
    let n = dst.len();
    // SAFETY: the caller promises `n` elements of the dtype at `src`.
    unsafe {
        match dtype {
            DType::I8 => convert(run::<i8>(src, n), dst, |v| v as i64),
            DType::I32 => convert(run::<i32>(src, n), dst, |v| v as i64),
            DType::U32 => convert(run::<u32>(src, n), dst, |v| v as i64),
            _ => convert(run::<u8>(src, n), dst, |v| v as i64),
        }
    }
}

/// Writes integers in `dtype`, saturating; truth is what is not 0.
///
/// # Safety
/// As for [`store`]; `dtype` is not floating point.
pub(crate) unsafe fn store_int(dtype: DType, src: &[i64], dst: *mut u8) {
    let n = src.len();
    // SAFETY: the caller promises room for `n` elements of the dtype at `dst`.
    unsafe {
        match dtype {
            DType::I8 => convert(src, run_mut(dst, n), |v| v.clamp(i8::MIN.into(), i8::MAX.into()) as i8),
            DType::U8 => convert(src, run_mut(dst, n), |v| v.clamp(0, u8::MAX.into()) as u8),
            DType::I32 => convert(src, run_mut(dst, n), |v| v.clamp(i32::MIN.into(), i32::MAX.into()) as i32),
            DType::U32 => convert(src, run_mut(dst, n), |v| v.clamp(0, u32::MAX.into()) as u32),
            _ => convert(src, run_mut(dst, n), |v| (v != 0) as u8),
        }
    }
}

/// # Safety
/// `src` is valid for `n` elements of `T` and aligned to it.
#[inline(always)]
unsafe fn run<'a, T>(src: *const u8, n: usize) -> &'a [T] {
    // SAFETY: passed on to the caller.
    unsafe { std::slice::from_raw_parts(src.cast(), n) }
}

/// # Safety
/// `dst` is valid for `n` elements of `T`, aligned to it, and nothing else refers to them.
#[inline(always)]
unsafe fn run_mut<'a, T>(dst: *mut u8, n: usize) -> &'a mut [T] {
    // SAFETY: passed on to the caller.
    unsafe { std::slice::from_raw_parts_mut(dst.cast(), n) }
}

#[inline(always)]
fn convert<S: Copy, D>(src: &[S], dst: &mut [D], f: impl Fn(S) -> D) {
    for (d, &s) in dst.iter_mut().zip(src) {
        *d = f(s);
    }
}

/// The value of a bfloat16.
#[inline(always)]
pub(crate) fn bf16_to_f32(v: bf16) -> f32 {
    f32::from_bits((v.to_bits() as u32) << 16)
}

multiversion! {
    fn widen_bf16(src: &[bf16], dst: &mut [f32]) {
        for (d, &s) in dst.iter_mut().zip(src) {
            *d = bf16_to_f32(s);
        }
    }
}

multiversion! {
    fn narrow_bf16(src: &[f32], dst: &mut [bf16]) {
        for (d, &s) in dst.iter_mut().zip(src) {
            *d = bf16::from_bits(bf16_bits(s) as u16);
        }
    }
}

/// The bits of the nearest bfloat16, ties to even; NaN stays NaN.
#[inline(always)]
fn bf16_bits(v: f32) -> u32 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    if v.is_nan() { quiet } else { rounded }
}

type F8Table = LazyLock<[f32; 256]>;
static F8E4M3: F8Table = LazyLock::new(|| std::array::from_fn(|i| f8_to_f64(i as u8, 4) as f32));
static F8E5M2: F8Table = LazyLock::new(|| std::array::from_fn(|i| f8_to_f64(i as u8, 5) as f32));

fn widen_f8(src: &[u8], dst: &mut [f32], table: &[f32; 256]) {
    convert(src, dst, |v| table[v as usize]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every value of a narrow dtype survives widening and narrowing.
    #[test]
    fn narrow_floats_round_trip() {
        for dtype in [DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2] {
            let codes = if dtype.bytes() == 2 { 1 << 16 } else { 1 << 8 };
            for code in 0..codes as u32 {
                let (src, mut dst, mut wide) = ((code as u16).to_le_bytes(), [0u16], [0f32]);
                let aligned = [u16::from_le_bytes(src)];
                // SAFETY: one element each.
                unsafe {
                    load(dtype, aligned.as_ptr().cast(), &mut wide);
                    store(dtype, &wide, dst.as_mut_ptr().cast());
                }
                if !wide[0].is_nan() {
                    assert_eq!(dst[0], code as u16, "{dtype} code {code:#x}");
                }
            }
        }
    }

    #[test]
    fn bf16_rounds_like_half() {
        for i in 0..200_000u32 {
            let x = f32::from_bits(i.wrapping_mul(2_654_435_761));
            let mut out = [bf16::ZERO];
            narrow_bf16(&[x], &mut out);
            let want = bf16::from_f32(x);
            assert!(out[0] == want || (x.is_nan() && out[0].is_nan()), "{x:e}");
        }
    }
}
