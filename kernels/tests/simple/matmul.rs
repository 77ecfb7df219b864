//! Matrix products against the reference evaluator.

use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::ops::Matmul;
use ltxc_ir::plan::Kernel;
use ltxc_ir::{DType, TensorType};

use super::harness::{Random, close, reference, run, unit};

/// `batch` axes, `m`, `n`, `k`; whether there is a right matrix per batch, and whether it is transposed.
struct Case<'a> {
    batch: &'a [usize],
    mnk: (usize, usize, usize),
    is_batched: bool,
    transpose_rhs: bool,
    dtypes: (DType, DType),
}

impl Case<'_> {
    #[track_caller]
    fn check(&self, seed: u64) {
        let (m, n, k) = self.mnk;
        let b = if self.transpose_rhs { [n, k] } else { [k, n] };
        let lead = if self.is_batched { self.batch } else { &[] };
        let types = [
            TensorType::new(self.dtypes.0, [self.batch, &[m, k]].concat()),
            TensorType::new(self.dtypes.1, [lead, &b].concat()),
        ];
        let mut random = Random(seed);
        let args = types.map(|ty| random.tensor(&ty, -1.0, 1.0));
        let op = Matmul { transpose_rhs: self.transpose_rhs };
        let want = reference(&args, |b, p| b.push(op.clone(), p));
        // Every product and every sum of k terms rounds once: relative to the sum of magnitudes, at most k + 1 units.
        let sizes = reference(&args.clone().map(magnitudes), |b, p| b.push(op.clone(), p));
        let slack = 1.0 + 4.0 * unit(want.ty.dtype);
        let error = |i: usize| (k + 1) as f64 * unit(DType::F32) * sizes.floats()[i] * slack;
        close(&run(&Kernel::Matmul(op), &args, &want.ty), &want, error);
    }
}

/// Absolute values, in f32 so that the result is not rounded further.
fn magnitudes(t: Tensor) -> Tensor {
    let data = Data::Float(t.floats().iter().map(|v| v.abs()).collect());
    Tensor { ty: t.ty.with_dtype(DType::F32), data }
}

const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (7, 5, 3),
    (64, 64, 16),
    (65, 66, 17),
    (1, 200, 130),
    (33, 1, 70),
    (40, 72, 0),
    (128, 64, 100),
    (97, 131, 61),
    (16, 300, 64),
    (200, 130, 36),
    (31, 8, 257),
];

#[test]
fn products_of_every_shape_match() {
    for (seed, mnk) in SHAPES.into_iter().enumerate() {
        for transpose_rhs in [false, true] {
            let dtypes = (DType::F32, DType::F32);
            Case { batch: &[], mnk, is_batched: false, transpose_rhs, dtypes }.check(seed as u64);
        }
    }
}

#[test]
fn products_of_every_dtype_match() {
    let floats = [DType::F32, DType::BF16, DType::F16];
    for a in floats {
        for b in floats.into_iter().chain([DType::F8E4M3, DType::F8E5M2]) {
            Case { batch: &[], mnk: (5, 12, 20), is_batched: false, transpose_rhs: true, dtypes: (a, b) }.check(81);
            Case { batch: &[], mnk: (6, 10, 15), is_batched: false, transpose_rhs: false, dtypes: (a, b) }.check(82);
        }
    }
}

#[test]
fn large_products_of_narrow_floats_match() {
    for dtypes in [(DType::F32, DType::BF16), (DType::BF16, DType::BF16), (DType::BF16, DType::F8E4M3)] {
        for (mnk, transpose_rhs) in [((70, 65, 33), true), ((36, 68, 64), true), ((66, 10, 40), false)] {
            Case { batch: &[], mnk, is_batched: false, transpose_rhs, dtypes }.check(83);
        }
    }
    let dtypes = (DType::F16, DType::F32);
    Case { batch: &[], mnk: (70, 66, 33), is_batched: false, transpose_rhs: true, dtypes }.check(84);
}

#[test]
fn batches_match() {
    for is_batched in [false, true] {
        for transpose_rhs in [false, true] {
            for (batch, mnk) in [(&[3][..], (5, 7, 9)), (&[2, 3], (66, 4, 20)), (&[1, 1, 2], (17, 65, 8))] {
                let dtypes = (DType::F32, DType::BF16);
                Case { batch, mnk, is_batched, transpose_rhs, dtypes }.check(83);
            }
        }
    }
}
