//! Calls that can be cut into several tiles: each gives the same.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Attention, Conv, Matmul, Op};
use ltxc_ir::plan::Kernel;
use ltxc_ir::{DType, Float, TensorType};

use super::harness::{Random, call_chosen, unit};

/// More than any table has.
const TILES: u32 = 9;

/// Runs a call with every tile; `spread` is how far the values may be apart, relative to the largest.
#[track_caller]
fn check(op: Op, kernel: Kernel, types: &[TensorType], spread: f64) {
    let out = op.infer(&types.iter().collect::<Vec<_>>()).unwrap();
    let mut random = Random(11);
    let args: Vec<Tensor> = types.iter().map(|ty| random.tensor(ty, -1.0, 1.0)).collect();
    let (work, before) = (kernel.into(), [Tensor::zeros(out.clone())]);
    let with = |tile: Option<u32>| {
        let bytes = call_chosen(&work, &args, &before, &[None], &|schedule| schedule.with_tile(tile)).remove(0);
        Tensor::from_bytes(out.clone(), &bytes)
    };
    let chosen = with(None);
    let largest = chosen.floats().iter().fold(0.0, |most: f64, v| most.max(v.abs()));
    for tile in 0..TILES {
        for (i, (a, b)) in chosen.floats().iter().zip(with(Some(tile)).floats()).enumerate() {
            assert!((a - b).abs() <= spread * largest, "tile {tile}, {types:?}: element {i} is {b:e}, not {a:e}");
        }
    }
}

const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

#[test]
fn products_are_the_same_in_every_tile() {
    for dtype in DTYPES {
        // Extents that vectors divide, and others.
        for [m, n, k] in [[70, 68, 40], [67, 37, 41], [33, 130, 5], [1, 1, 1]] {
            let op = Matmul { transpose_rhs: true };
            let types = [TensorType::new(dtype, [m, k]), TensorType::new(dtype, [n, k])];
            // Every tile sums in the same order.
            check(op.clone().into(), Kernel::Matmul(op), &types, 0.0);
        }
    }
}

#[test]
fn convolutions_are_the_same_in_every_tile() {
    for dtype in DTYPES {
        for (ci, co) in [(8, 20), (7, 17)] {
            let op = Conv { stride: vec![1; 2], dilation: vec![1; 2], pad: vec![(1, 1); 2], groups: 1 };
            let types = [TensorType::new(dtype, [1, 7, 6, ci]), TensorType::new(dtype, [3, 3, ci, co])];
            check(op.clone().into(), Kernel::Conv(op), &types, 0.0);
        }
    }
}

#[test]
fn attention_is_the_same_in_every_tile() {
    for dtype in DTYPES {
        for [t, s, d] in [[35, 70, 32], [37, 71, 13], [1, 1, 16]] {
            let op = Attention { scale: Float(0.3), causal: true };
            let types = [t, s, s].map(|rows| TensorType::new(dtype, [1, rows, 2, d]));
            // Blocks of keys are corrected one after the other: two roundings of the result, and of weights on matrix
            // units.
            check(op.clone().into(), Kernel::Attention(op), &types, 4.0 * unit(dtype).max(70.0 * unit(DType::F32)));
        }
    }
}
