//! Matrix products against the reference evaluator.

#[path = "simple/harness.rs"]
#[allow(dead_code)] // what only the other kernels need
mod harness;

use harness::{Random, close, reference, run, unit};
use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::ops::{Matmul, Op};
use ltxc_ir::plan::Kernel;
use ltxc_ir::{Builder, DType, TensorType, ValueId};

/// `a · b`, or `a · bᵀ`: shapes as stored, dtypes of operands and result.
#[track_caller]
fn check(a: &[usize], b: &[usize], transpose_rhs: bool, dtypes: [DType; 2]) {
    let op = Matmul { transpose_rhs };
    let [a, b] = [TensorType::new(dtypes[0], a), TensorType::new(dtypes[1], b)];
    let out = Op::from(op.clone()).infer(&[&a, &b]).expect("the operands fit");
    let terms = a.shape[a.rank() - 1] as f64;
    let mut random = Random(11);
    let args = [random.tensor(&a, -1.0, 1.0), random.tensor(&b, -1.0, 1.0)];
    let build = |g: &Builder, p: &[ValueId]| g.push(Op::from(op.clone()), p);
    let found = run(&Kernel::Matmul(op.clone()), &args, &out);
    let want = reference(&args, build);
    // Every product and every sum rounds once: relative to the sum of magnitudes, at most `terms + 1` units.
    let sizes = reference(&args.map(|t| magnitudes(&t)), build);
    let slack = 1.0 + 4.0 * unit(out.dtype);
    close(&found, &want, |i| (terms + 1.0) * unit(DType::F32) * sizes.floats()[i] * slack);
}

/// Absolute values, in f32 so that the result is not rounded further.
fn magnitudes(t: &Tensor) -> Tensor {
    let data = Data::Float(t.floats().iter().map(|v| v.abs()).collect());
    Tensor { ty: t.ty.with_dtype(DType::F32), data }
}

/// `[m, k] · [n, k]ᵀ` and `[m, k] · [k, n]`.
#[track_caller]
fn check_both(m: usize, n: usize, k: usize, dtypes: [DType; 2]) {
    check(&[m, k], &[n, k], true, dtypes);
    check(&[m, k], &[k, n], false, dtypes);
}

const F32: [DType; 2] = [DType::F32; 2];
const NARROW_WEIGHTS: [DType; 2] = [DType::F32, DType::BF16];
const BF16: [DType; 2] = [DType::BF16; 2];

/// Around the limits of direct products, tiles, squares of words, panels and blocks of k.
#[test]
fn odd_extents_match() {
    for m in [1, 2, 6, 7, 12, 13, 31] {
        for n in [1, 7, 8, 33, 70] {
            for k in [1, 7, 8, 9, 17, 191, 193, 400] {
                check_both(m, n, k, F32);
                check_both(m, n, k, NARROW_WEIGHTS);
            }
        }
    }
}

#[test]
fn every_dtype_of_weights_matches() {
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2] {
        check_both(3, 50, 215, [DType::F32, dtype]);
        check_both(21, 50, 215, [DType::F32, dtype]);
    }
}

#[test]
fn narrow_results_match() {
    for m in [5, 50] {
        check_both(m, 70, 215, BF16);
        check_both(m, 70, 215, [DType::F16; 2]);
    }
}

/// More rows than one task has, in tasks of both directions.
#[test]
fn many_rows_match() {
    check_both(391, 290, 40, F32);
    check_both(800, 33, 200, BF16);
}

/// More rows than are packed at a time.
#[test]
fn rows_in_groups_match() {
    check(&[400, 20_000], &[5, 20_000], true, F32);
}

#[test]
fn batches_match() {
    check(&[3, 4, 9, 30], &[3, 4, 21, 30], true, F32);
    check(&[3, 2, 30], &[3, 30, 21], false, BF16);
    // One right operand for the whole batch.
    check(&[3, 4, 9, 30], &[21, 30], true, F32);
}

/// Nothing to sum gives zeros, and nothing to write is no error.
#[test]
fn empty_extents_match() {
    for [m, n, k] in [[3, 5, 0], [30, 5, 0], [30, 0, 5], [0, 5, 5]] {
        check_both(m, n, k, F32);
    }
}
