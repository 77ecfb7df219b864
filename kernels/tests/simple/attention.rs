//! Attention against the reference evaluator.

use ltxc_ir::DType;
use ltxc_ir::eval::{Data, Tensor};

use super::cases::Heads;
use super::harness::Random;

#[test]
fn odd_extents_match() {
    for (t, s, n, d) in
        [(1, 1, 1, 1), (7, 5, 3, 2), (97, 101, 2, 24), (13, 400, 2, 128), (200, 33, 1, 64), (3, 800, 2, 31)]
    {
        Heads::new(t, s, n, d).check(3);
        Heads { e: d + 5, b: 2, ..Heads::new(t, s, n, d) }.check(4);
    }
    Heads { e: 1, ..Heads::new(20, 30, 2, 500) }.check(5);
    Heads { e: 500, ..Heads::new(20, 30, 2, 3) }.check(6);
    Heads { d: 0, e: 4, ..Heads::new(5, 6, 2, 1) }.check(7);
}

#[test]
fn narrow_floats_match() {
    for dtype in [DType::BF16, DType::F16] {
        Heads { dtype, ..Heads::new(50, 70, 3, 64) }.check(8);
        Heads { dtype, causal: true, n: 4, m: 2, ..Heads::new(99, 120, 1, 16) }.check(9);
    }
}

/// Every multiple of 8 up to 256, among odd numbers of queries and keys, masked and not.
#[test]
fn every_head_dim_matches() {
    for (d, dtype) in (8..=256).step_by(8).flat_map(|d| [(d, DType::F32), (d, DType::BF16)]) {
        Heads { dtype, ..Heads::new(5, 19, 2, d) }.check(18);
        let bias = Some([false, false, true, true]);
        Heads { dtype, bias, n: 3, m: 1, ..Heads::new(7, 33, 1, d) }.check(19);
        Heads { dtype, causal: true, ..Heads::new(9, 9, 1, d) }.check(20);
    }
}

/// Heads of vision towers, whose dims are no power of two.
#[test]
fn heads_of_vision_match() {
    for dtype in [DType::F32, DType::BF16] {
        Heads { dtype, ..Heads::new(150, 150, 3, 72) }.check(16);
    }
}

#[test]
fn grouped_queries_match() {
    for (n, m) in [(4, 2), (6, 1), (3, 3), (8, 4)] {
        Heads { n, m, b: 2, ..Heads::new(33, 41, 1, 8) }.check(10);
    }
}

#[test]
fn later_keys_are_hidden() {
    for (t, s) in [(1, 1), (5, 5), (100, 100), (3, 500), (500, 500), (97, 1000)] {
        Heads { causal: true, ..Heads::new(t, s, 2, 8) }.check(11);
    }
}

#[test]
fn biases_of_every_shape_match() {
    for axes in 0..16 {
        let bias = Some([0, 1, 2, 3].map(|a| axes >> a & 1 == 1));
        Heads { bias, b: 2, ..Heads::new(11, 13, 3, 8) }.check(12);
        Heads { bias, causal: true, b: 2, n: 4, m: 2, ..Heads::new(98, 390, 1, 4) }.check(13);
    }
}

/// Padding in front, whose bias is so low that rows of the padding see hidden keys rather than each other.
#[test]
fn rows_of_padding_match() {
    for (low, padding) in [(f32::MIN as f64, 450), (f32::MIN as f64, 3), (-1e9, 0)] {
        let case = Heads { causal: true, bias: Some([false, false, false, true]), ..Heads::new(900, 900, 1, 8) };
        let mut random = Random(14);
        let mut args: Vec<Tensor> = case.types().iter().map(|ty| random.tensor(ty, -2.0, 2.0)).collect();
        let keys = (0..case.s).map(|key| if key < padding { low } else { 0.0 }).collect();
        args[3].data = Data::Float(keys);
        case.check_with(&args);
    }
}

/// Each block of keys has larger scores than the one before, or smaller ones.
#[test]
fn growing_and_falling_scores_match() {
    for slope in [0.05, -0.05] {
        let case = Heads { bias: Some([false, false, false, true]), ..Heads::new(20, 2000, 1, 8) };
        let mut random = Random(15);
        let mut args: Vec<Tensor> = case.types().iter().map(|ty| random.tensor(ty, -2.0, 2.0)).collect();
        // Multiples of 2⁻⁶ up to 2⁷: sums with scores round like numbers of that size, which the scale of `v` makes up for.
        let bias = (0..case.s).map(|key| (slope * key as f64 * 64.0).round() / 64.0).collect();
        args[3].data = Data::Float(bias);
        if let Data::Float(v) = &mut args[2].data {
            v.iter_mut().for_each(|v| *v /= 64.0);
        }
        case.check_with(&args);
    }
}

/// Large enough that threads share the work.
#[test]
fn shared_work_gives_the_same_bytes() {
    Heads::new(300, 500, 4, 40).check(16);
    Heads { causal: true, n: 4, m: 2, dtype: DType::BF16, ..Heads::new(300, 300, 1, 64) }.check(17);
}
