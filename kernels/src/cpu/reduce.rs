//! `reduce`: sums, means, maxima and minima over any axes. Sums accumulate in f64.
//!
//! Neighbouring axes that are both summed or both kept are merged. If the last one is summed, each result is a task of
//! contiguous runs; if it is kept, a strip of results is accumulated row by row. The order of additions depends on the
//! shape only.

use ltxc_ir::DType;
use ltxc_ir::ops::{Reduce, ReduceKind};

use super::element::{load, store};
use super::parallel::{Shared, for_each};
use super::simd::multiversion;
use super::{Arg, Output};

/// Results per strip, and operand elements that are widened at a time.
const STRIP: usize = 512;

/// Accumulators that run side by side.
const LANES: usize = 32;

/// Operand elements per task, about.
const TASK: usize = 1 << 14;

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(op: &Reduce, args: &[Arg<'_>], out: &Output<'_>) {
    let x = Operand::new(&args[0], &op.axes);
    let count = x.summed.iter().map(|a| a.0).product::<usize>() * x.run;
    let scale = if op.kind == ReduceKind::Mean { count as f64 } else { 1.0 };
    let n = args[0].ty.elements();
    let results = Shared::new(out.ptr);
    let (dtype, bytes) = (out.ty.dtype, out.ty.dtype.bytes());
    // SAFETY (of the callers): `at` and what follows are results of one task.
    let finish = |at: usize, sums: &[f64]| unsafe {
        let mut rounded = [0f32; STRIP];
        let rounded = &mut rounded[..sums.len()];
        rounded.iter_mut().zip(sums).for_each(|(r, &s)| *r = (s / scale) as f32);
        store(dtype, rounded, results.get().add(at * bytes));
    };
    if x.strip == 1 {
        let kept = out.ty.elements();
        let per_task = (TASK / count.max(1)).clamp(1, STRIP);
        for_each(kept.div_ceil(per_task), n, |task| {
            let first = task * per_task;
            let mut sums = [0f64; STRIP];
            let sums = &mut sums[..per_task.min(kept - first)];
            for (i, s) in sums.iter_mut().enumerate() {
                // SAFETY: the result exists.
                *s = unsafe { x.reduce_runs(op.kind, offset(&x.kept, first + i)) };
            }
            finish(first, sums);
        });
    } else {
        let strips = x.strip.div_ceil(STRIP);
        let rows: usize = x.kept.iter().map(|a| a.0).product();
        for_each(rows * strips, n, |task| {
            let (row, column) = (task / strips, task % strips * STRIP);
            let mut sums = [0f64; STRIP];
            let sums = &mut sums[..STRIP.min(x.strip - column)];
            // SAFETY: the strip is inside the row.
            unsafe { x.reduce_strip(op.kind, offset(&x.kept, row) + column, sums) };
            finish(row * x.strip + column, sums);
        });
    }
}

/// Extent and stride in elements.
type Axis = (usize, usize);

/// Offset of position `index` of some axes, counted row-major.
fn offset(axes: &[Axis], mut index: usize) -> usize {
    let mut offset = 0;
    for &(extent, stride) in axes.iter().rev() {
        offset += index % extent * stride;
        index /= extent;
    }
    offset
}

/// The operand, its axes merged.
struct Operand {
    ptr: *const u8,
    dtype: DType,
    /// Kept axes, without the strip.
    kept: Vec<Axis>,
    /// Summed axes, without the run.
    summed: Vec<Axis>,
    /// Extent of the last axis if it is summed, else 1.
    run: usize,
    /// Extent of the last axis if it is kept, else 1.
    strip: usize,
}

// SAFETY: only read, and valid for the time of a launch by the contract of `launch`.
unsafe impl Sync for Operand {}

impl Operand {
    fn new(arg: &Arg<'_>, summed: &[usize]) -> Operand {
        let strides = arg.ty.strides();
        let mut axes: Vec<(bool, Axis)> = Vec::with_capacity(strides.len());
        for (a, &extent) in arg.ty.shape.iter().enumerate().filter(|&(_, &extent)| extent != 1) {
            let is_summed = summed.contains(&a);
            match axes.last_mut() {
                Some((s, outer)) if *s == is_summed => *outer = (outer.0 * extent, strides[a]),
                _ => axes.push((is_summed, (extent, strides[a]))),
            }
        }
        let last = axes.pop();
        let of = |kind: bool| axes.iter().filter(|a| a.0 == kind).map(|a| a.1).collect();
        Operand {
            ptr: arg.ptr,
            dtype: arg.ty.dtype,
            kept: of(false),
            summed: of(true),
            run: last.filter(|a| a.0).map_or(1, |a| a.1.0),
            strip: last.filter(|a| !a.0).map_or(1, |a| a.1.0),
        }
    }

    /// Calls `f` with `n` elements at `start`, in pieces of at most [`STRIP`].
    ///
    /// # Safety
    /// They are inside the operand.
    unsafe fn pieces(&self, start: usize, n: usize, mut f: impl FnMut(&[f32])) {
        let mut wide = [0f32; STRIP];
        for i in (0..n).step_by(STRIP) {
            let wide = &mut wide[..STRIP.min(n - i)];
            // SAFETY: passed on to the caller.
            unsafe {
                let src = self.ptr.add((start + i) * self.dtype.bytes());
                if self.dtype == DType::F32 {
                    f(std::slice::from_raw_parts(src.cast(), wide.len()));
                } else {
                    load(self.dtype, src, wide);
                    f(wide);
                }
            }
        }
    }

    /// Reduces all runs of the result whose first element is at `start`.
    ///
    /// # Safety
    /// That is the offset of a result.
    unsafe fn reduce_runs(&self, kind: ReduceKind, start: usize) -> f64 {
        let runs: usize = self.summed.iter().map(|a| a.0).product();
        let mut sums = [neutral(kind); LANES];
        for i in 0..runs {
            // SAFETY: the run is inside the operand.
            unsafe {
                self.pieces(start + offset(&self.summed, i), self.run, |x| match kind {
                    ReduceKind::Sum | ReduceKind::Mean => fold_sum(x, &mut sums),
                    ReduceKind::Max => fold_max(x, &mut sums),
                    ReduceKind::Min => fold_min(x, &mut sums),
                });
            }
        }
        sums.into_iter().reduce(|a, b| join(kind, a, b)).unwrap_or(0.0)
    }

    /// Reduces the strip of results whose first elements are at `start`.
    ///
    /// # Safety
    /// The strip is inside a row of results.
    unsafe fn reduce_strip(&self, kind: ReduceKind, start: usize, sums: &mut [f64]) {
        sums.fill(neutral(kind));
        let rows: usize = self.summed.iter().map(|a| a.0).product();
        for i in 0..rows {
            // SAFETY: the row is inside the operand.
            unsafe {
                self.pieces(start + offset(&self.summed, i), sums.len(), |x| match kind {
                    ReduceKind::Sum | ReduceKind::Mean => fold_sum(x, sums),
                    ReduceKind::Max => fold_max(x, sums),
                    ReduceKind::Min => fold_min(x, sums),
                });
            }
        }
    }
}

fn neutral(kind: ReduceKind) -> f64 {
    match kind {
        ReduceKind::Sum | ReduceKind::Mean => 0.0,
        ReduceKind::Max => f64::NEG_INFINITY,
        ReduceKind::Min => f64::INFINITY,
    }
}

#[inline(always)]
fn join(kind: ReduceKind, a: f64, b: f64) -> f64 {
    match kind {
        ReduceKind::Sum | ReduceKind::Mean => a + b,
        // NaN survives on either side, unlike in f64::max.
        ReduceKind::Max => {
            if a > b || a.is_nan() {
                a
            } else {
                b
            }
        }
        ReduceKind::Min => {
            if a < b || a.is_nan() {
                a
            } else {
                b
            }
        }
    }
}

#[inline(always)]
fn fold(kind: ReduceKind, x: &[f32], sums: &mut [f64]) {
    for x in x.chunks(sums.len()) {
        for (s, &x) in sums.iter_mut().zip(x) {
            *s = join(kind, *s, x as f64);
        }
    }
}

multiversion! {
    fn fold_sum(x: &[f32], sums: &mut [f64]) {
        fold(ReduceKind::Sum, x, sums);
    }
}

multiversion! {
    fn fold_max(x: &[f32], sums: &mut [f64]) {
        fold(ReduceKind::Max, x, sums);
    }
}

multiversion! {
    fn fold_min(x: &[f32], sums: &mut [f64]) {
        fold(ReduceKind::Min, x, sums);
    }
}
