//! `matmul`: blocked products, and for a few rows products that read every weight once.
//!
//! With at most [`FEW_ROWS`] rows there is nothing to gain from packing: the weights come from memory once, and that is
//! the time it takes. Linear layers (`[n, k]`) become dot products, `[k, n]` becomes a sum of scaled rows.

use half::bf16;
use ltxc_ir::ops::Matmul;
use ltxc_ir::{DType, TensorType};
use std::ops::Range;

use super::element::{bf16_to_f32, load, store};
use super::gemm::{self, Extents, LDA, Rows, Target};
use super::pack::Matrix;
use super::parallel::{Need, Scratch, Shared, for_each};
use super::simd::multiversion;
use super::{Arg, Output};

/// Rows up to which weights are read directly.
const FEW_ROWS: usize = 6;

/// Columns of the result per task with few rows.
const COLUMNS_PER_TASK: usize = 64;

/// Summed elements that are widened at a time with few rows.
const STRIP: usize = 512;

/// A matrix in memory as left operand.
pub(crate) struct Dense {
    /// First element.
    pub ptr: *const u8,
    /// Its dtype.
    pub dtype: DType,
    /// Elements from row to row.
    pub stride: usize,
}

// SAFETY: only read, and valid for the time of a launch by the contract of `launch`.
unsafe impl Sync for Dense {}

impl Rows for Dense {
    unsafe fn pack(&self, rows: Range<usize>, ks: Range<usize>, dst: *mut f32) {
        for (i, row) in rows.enumerate() {
            // SAFETY: the element is inside the operand, the row inside the block, by the promise of the caller.
            unsafe {
                let src = self.ptr.add((row * self.stride + ks.start) * self.dtype.bytes());
                load(self.dtype, src, std::slice::from_raw_parts_mut(dst.add(i * LDA), ks.len()));
            }
        }
    }
}

/// The products of a call: `batches` of them, with these extents each.
struct Plan {
    batches: usize,
    e: Extents,
    /// Elements from one right operand to the next.
    rhs_step: usize,
}

impl Plan {
    fn new(a: &TensorType, b: &TensorType, out: &TensorType) -> Plan {
        let r = out.rank();
        let e = Extents { m: out.shape[r - 2], n: out.shape[r - 1], k: a.shape[r - 1] };
        let batches = out.shape[..r - 2].iter().product();
        if b.rank() == 2 {
            // One right operand for all: the batch is just more rows.
            return Plan { batches: 1, e: Extents { m: batches * e.m, ..e }, rhs_step: 0 };
        }
        Plan { batches, e, rhs_step: e.k * e.n }
    }

    fn has_few_rows(&self) -> bool {
        self.e.m <= FEW_ROWS
    }
}

pub(crate) fn need(args: &[&TensorType], out: &TensorType) -> Need {
    let plan = Plan::new(args[0], args[1], out);
    if plan.has_few_rows() {
        return Need { shared: plan.e.m * plan.e.k, per_thread: 0 };
    }
    gemm::need(plan.e)
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(op: &Matmul, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let plan = Plan::new(args[0].ty, args[1].ty, out.ty);
    let scratch = Scratch::new(workspace, need(&[args[0].ty, args[1].ty], out.ty));
    let Extents { m, n, k } = plan.e;
    let stride = if op.transpose_rhs { k } else { n };
    let (a_bytes, out_bytes) = (args[0].ty.dtype.bytes(), out.ty.dtype.bytes());
    for batch in 0..plan.batches {
        let b = Matrix { ptr: args[1].ptr, dtype: args[1].ty.dtype, stride, transposed: op.transpose_rhs };
        let b = b.offset(batch * plan.rhs_step);
        // SAFETY: each batch lies inside the operands.
        let (a, y) = unsafe { (args[0].ptr.add(batch * m * k * a_bytes), out.ptr.add(batch * m * n * out_bytes)) };
        let lhs = Dense { ptr: a, dtype: args[0].ty.dtype, stride: k };
        let target = Target { ptr: Shared::new(y), dtype: out.ty.dtype, row: &|r| r * n };
        // SAFETY: the contract of `launch`.
        unsafe {
            if plan.has_few_rows() {
                few_rows(plan.e, &lhs, &b, &target, &scratch);
            } else {
                gemm::product(plan.e, &lhs, &b, &target, &scratch);
            }
        }
    }
}

/// # Safety
/// As for [`gemm::product`]; `scratch` has room for the left operand.
unsafe fn few_rows(e: Extents, lhs: &Dense, rhs: &Matrix, target: &Target<'_>, scratch: &Scratch<'_>) {
    let Extents { m, n, k } = e;
    // SAFETY: scratch of `m · k` floats, written before the tasks begin.
    let a = unsafe { std::slice::from_raw_parts_mut(scratch.shared().get(), m * k) };
    // SAFETY: rows of a matrix product lie one after the other.
    unsafe { load(lhs.dtype, lhs.ptr, a) };
    let a = &*a;
    for_each(n.div_ceil(COLUMNS_PER_TASK), m.saturating_mul(n).saturating_mul(k), |task| {
        let columns = task * COLUMNS_PER_TASK..n.min((task + 1) * COLUMNS_PER_TASK);
        let mut sums = [[0f32; COLUMNS_PER_TASK]; FEW_ROWS];
        // SAFETY: the columns are inside the right operand.
        unsafe {
            if rhs.transposed {
                dot_rows(a, k, rhs, columns.clone(), &mut sums);
            } else {
                add_rows(a, k, rhs, columns.clone(), &mut sums);
            }
        }
        for (r, sums) in sums.iter().enumerate().take(m) {
            let at = ((target.row)(r) + columns.start) * target.dtype.bytes();
            // SAFETY: this task owns these columns of the result.
            unsafe { store(target.dtype, &sums[..columns.len()], target.ptr.get().add(at)) };
        }
    });
}

type Sums = [[f32; COLUMNS_PER_TASK]; FEW_ROWS];

/// # Safety
/// `rhs` is transposed and has `columns` and `k`; `a` has at most [`FEW_ROWS`] rows of `k`.
unsafe fn dot_rows(a: &[f32], k: usize, rhs: &Matrix, columns: Range<usize>, sums: &mut Sums) {
    let mut wide = [0f32; STRIP];
    for (c, column) in columns.enumerate() {
        let row = rhs.offset(column * rhs.stride);
        for (r, a) in a.chunks_exact(k.max(1)).enumerate() {
            // SAFETY: the stored row has `k` elements of the dtype, and is aligned to it.
            sums[r][c] = unsafe {
                match rhs.dtype {
                    DType::F32 => dot(a, std::slice::from_raw_parts(row.ptr.cast::<f32>(), k)),
                    DType::BF16 => dot_bf16(a, std::slice::from_raw_parts(row.ptr.cast::<bf16>(), k)),
                    _ => {
                        let mut sum = 0.0;
                        for (i, a) in a.chunks(STRIP).enumerate() {
                            load(rhs.dtype, row.offset(i * STRIP).ptr, &mut wide[..a.len()]);
                            sum += dot(a, &wide[..a.len()]);
                        }
                        sum
                    }
                }
            };
        }
    }
}

/// # Safety
/// `rhs` is not transposed and has `columns` and `k`; `a` has at most [`FEW_ROWS`] rows of `k`.
unsafe fn add_rows(a: &[f32], k: usize, rhs: &Matrix, columns: Range<usize>, sums: &mut Sums) {
    let mut wide = [0f32; COLUMNS_PER_TASK];
    let wide = &mut wide[..columns.len()];
    for p in 0..k {
        // SAFETY: row `p` of the right operand has these columns.
        unsafe { load(rhs.dtype, rhs.offset(p * rhs.stride + columns.start).ptr, wide) };
        for (r, sums) in sums.iter_mut().enumerate().take(a.len() / k) {
            add_scaled(a[r * k + p], wide, &mut sums[..wide.len()]);
        }
    }
}

multiversion! {
    /// `y += a · x`.
    fn add_scaled(a: f32, x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = a.mul_add(x, *y);
        }
    }
}

/// Sums that run side by side in a dot product: four vectors of AVX-512.
pub(crate) const LANES: usize = 64;

multiversion! {
    /// `Σ x · y` in [`LANES`] interleaved sums, added up in a fixed order.
    pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
        dot_by(x, y, |v| v)
    }
}

multiversion! {
    /// As [`dot`], widening the second operand on the way.
    fn dot_bf16(x: &[f32], y: &[bf16]) -> f32 {
        dot_by(x, y, bf16_to_f32)
    }
}

#[inline(always)]
fn dot_by<T: Copy>(x: &[f32], y: &[T], widen: impl Fn(T) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (x_rest, y_rest) = (xs.remainder(), ys.remainder());
    for (x, y) in xs.zip(ys) {
        for i in 0..LANES {
            sums[i] = x[i].mul_add(widen(y[i]), sums[i]);
        }
    }
    for (i, (&x, &y)) in x_rest.iter().zip(y_rest).enumerate() {
        sums[i] = x.mul_add(widen(y), sums[i]);
    }
    sum_lanes(&mut sums)
}

/// Adds up by halves.
#[inline(always)]
pub(crate) fn sum_lanes(sums: &mut [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}
