//! Matrix products against the reference evaluator.

use ltxc_ir::DType;

use super::cases::Product;

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
            Product { batch: &[], mnk, is_batched: false, transpose_rhs, dtypes }.check(seed as u64);
        }
    }
}

#[test]
fn products_of_every_dtype_match() {
    let floats = [DType::F32, DType::BF16, DType::F16];
    for a in floats {
        for b in floats.into_iter().chain([DType::F8E4M3, DType::F8E5M2]) {
            Product { batch: &[], mnk: (5, 12, 20), is_batched: false, transpose_rhs: true, dtypes: (a, b) }.check(81);
            Product { batch: &[], mnk: (6, 10, 15), is_batched: false, transpose_rhs: false, dtypes: (a, b) }.check(82);
        }
    }
}

#[test]
fn large_products_of_narrow_floats_match() {
    for dtypes in [(DType::F32, DType::BF16), (DType::BF16, DType::BF16), (DType::BF16, DType::F8E4M3)] {
        for (mnk, transpose_rhs) in [((70, 65, 33), true), ((36, 68, 64), true), ((66, 10, 40), false)] {
            Product { batch: &[], mnk, is_batched: false, transpose_rhs, dtypes }.check(83);
        }
    }
    let dtypes = (DType::F16, DType::F32);
    Product { batch: &[], mnk: (70, 66, 33), is_batched: false, transpose_rhs: true, dtypes }.check(84);
}

#[test]
fn batches_match() {
    for is_batched in [false, true] {
        for transpose_rhs in [false, true] {
            for (batch, mnk) in [(&[3][..], (5, 7, 9)), (&[2, 3], (66, 4, 20)), (&[1, 1, 2], (17, 65, 8))] {
                let dtypes = (DType::F32, DType::BF16);
                Product { batch, mnk, is_batched, transpose_rhs, dtypes }.check(83);
            }
        }
    }
}
