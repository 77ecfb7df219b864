//! `rms_norm` and `layer_norm`: one row at a time, which stays in cache between its statistics and its result.

use ltxc_ir::ops::{LayerNorm, RmsNorm};
use ltxc_ir::{DType, TensorType};

use super::element::{load, store};
use super::matmul::{dot, sum_lanes};
use super::parallel::{Need, Scratch, Shared, for_each};
use super::simd::multiversion;
use super::{Arg, Output};

/// Elements per task.
const TASK: usize = 1 << 14;

/// Work per element: two passes.
const WEIGHT: usize = 2;

/// Sums that run side by side.
const LANES: usize = 64;

/// Extent of the last axis.
pub(crate) fn channels(x: &TensorType) -> usize {
    // The type rules of norms say that there is a last axis, and that it is not empty.
    x.shape[x.rank() - 1]
}

/// Scratch: parameters for all, two rows for each thread.
pub(crate) fn need(args: &[&TensorType]) -> Need {
    let c = channels(args[0]);
    Need { shared: (args.len() - 1).saturating_mul(c), per_thread: c.saturating_mul(2) }
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch_rms(op: &RmsNorm, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let eps = op.eps.0 as f32;
    // SAFETY: the contract of `launch`.
    unsafe {
        by_rows(args, out, workspace, |x, parameters, y| {
            let scale = rms_factor(x, eps);
            match parameters {
                [w, ..] => scale_by(x, scale, w, y),
                [] => scale_all(x, scale, y),
            }
        });
    }
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch_layer(op: &LayerNorm, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let eps = op.eps.0 as f32;
    // SAFETY: the contract of `launch`.
    unsafe {
        by_rows(args, out, workspace, |x, parameters, y| {
            let n = x.len() as f32;
            let mean = sum(x) / n;
            let scale = 1.0 / (squares_around(x, mean) / n + eps).sqrt();
            match parameters {
                [w, b, ..] => affine(x, mean, scale, w, b, y),
                _ => shift_scale(x, mean, scale, y),
            }
        });
    }
}

/// Calls `norm(row, parameters, result)` for every row.
///
/// # Safety
/// As for [`super::launch`].
unsafe fn by_rows(
    args: &[Arg<'_>],
    out: &Output<'_>,
    workspace: &mut [u8],
    norm: impl Fn(&[f32], &[&[f32]], &mut [f32]) + Sync,
) {
    let x = args[0];
    let types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
    let scratch = Scratch::new(workspace, need(&types));
    let (c, n) = (channels(x.ty), out.ty.elements());
    let mut parameters: [&[f32]; 2] = [&[]; 2];
    for (i, arg) in args[1..].iter().enumerate() {
        // SAFETY: parameters have `c` elements, and the shared scratch has room for all of them.
        parameters[i] = unsafe { wide(arg, c, scratch.shared().get().add(i * c)) };
    }
    let parameters = &parameters[..args.len() - 1];
    let (dtype, bytes) = (x.ty.dtype, x.ty.dtype.bytes());
    let (from, to) = (Shared::new(x.ptr.cast_mut()), Shared::new(out.ptr));
    let per_task = (TASK / c).max(1);
    for_each((n / c).div_ceil(per_task), n * WEIGHT, |task| {
        // SAFETY: called once per task.
        let (wide, result) = unsafe { scratch.slot() }.split_at_mut(c);
        for row in task * per_task..(n / c).min((task + 1) * per_task) {
            let at = row * c * bytes;
            let (src, dst) = (from.get().wrapping_add(at), to.get().wrapping_add(at));
            // SAFETY: the row is inside operand and result. Tasks own disjoint rows. A result that is not the operand
            // itself does not overlap it.
            unsafe {
                let row = if dtype == DType::F32 {
                    std::slice::from_raw_parts(src.cast_const().cast::<f32>(), c)
                } else {
                    load(dtype, src, wide);
                    &*wide
                };
                if dtype == DType::F32 && src != dst {
                    norm(row, parameters, std::slice::from_raw_parts_mut(dst.cast::<f32>(), c));
                } else {
                    norm(row, parameters, result);
                    store(dtype, result, dst);
                }
            }
        }
    });
}

/// A vector as f32: where it lies, or widened into `room`.
///
/// # Safety
/// `arg` has `n` elements and `room` is valid for as many floats, which nothing else uses.
pub(crate) unsafe fn wide<'a>(arg: &Arg<'a>, n: usize, room: *mut f32) -> &'a [f32] {
    // SAFETY: passed on to the caller.
    unsafe {
        if arg.ty.dtype == DType::F32 {
            return std::slice::from_raw_parts(arg.ptr.cast(), n);
        }
        let room = std::slice::from_raw_parts_mut(room, n);
        load(arg.ty.dtype, arg.ptr, room);
        room
    }
}

/// What `rms_norm` multiplies a row with.
pub(crate) fn rms_factor(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

multiversion! {
    pub(crate) fn scale_all(x: &[f32], scale: f32, y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * scale;
        }
    }
}

multiversion! {
    pub(crate) fn scale_by(x: &[f32], scale: f32, w: &[f32], y: &mut [f32]) {
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
            *y = x * scale * w;
        }
    }
}

multiversion! {
    fn shift_scale(x: &[f32], mean: f32, scale: f32, y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = (x - mean) * scale;
        }
    }
}

multiversion! {
    fn affine(x: &[f32], mean: f32, scale: f32, w: &[f32], b: &[f32], y: &mut [f32]) {
        for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
            *y = ((x - mean) * scale).mul_add(w, b);
        }
    }
}

multiversion! {
    /// Sum of a row in interleaved sums, added up in a fixed order.
    fn sum(x: &[f32]) -> f32 {
        lanes(x, |sum, x| sum + x)
    }
}

multiversion! {
    /// Sum of squares of the distances from `mean`.
    fn squares_around(x: &[f32], mean: f32) -> f32 {
        lanes(x, |sum, x| (x - mean).mul_add(x - mean, sum))
    }
}

#[inline(always)]
fn lanes(x: &[f32], add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for i in 0..LANES {
            sums[i] = add(sums[i], x[i]);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum = add(*sum, x);
    }
    sum_lanes(&mut sums)
}
