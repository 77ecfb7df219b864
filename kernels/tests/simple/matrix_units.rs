//! Shapes at which kernels for matrix units change their ways, in the dtypes that these multiply. Devices without such
//! units compute the same.

use ltxc_ir::DType;
use ltxc_ir::eval::{Data, Tensor};

use super::cases::{Convolution, Heads, Product};
use super::harness::Random;

const BF16: (DType, DType) = (DType::BF16, DType::BF16);

fn product(mnk: (usize, usize, usize), transpose_rhs: bool, dtypes: (DType, DType)) {
    Product { batch: &[], mnk, is_batched: false, transpose_rhs, dtypes }.check(101);
}

/// Tiles are full, or end inside fragments, vectors and words.
#[test]
fn products_match() {
    for transpose_rhs in [true, false] {
        product((64, 64, 64), transpose_rhs, BF16);
        product((97, 74, 72), transpose_rhs, BF16);
        product((70, 130, 33), transpose_rhs, BF16);
        product((5, 200, 136), transpose_rhs, BF16);
        product((40, 66, 20), transpose_rhs, (DType::F16, DType::F16));
    }
    product((49, 1, 1), false, BF16);
    product((1, 6, 300), true, (DType::F16, DType::F16));
}

/// Tiles for many cubes, and rows of tiles in two groups.
#[test]
fn large_products_match() {
    product((200, 200, 72), true, BF16);
    product((300, 600, 72), true, BF16);
    product((260, 600, 40), false, (DType::F16, DType::F16));
    product((1160, 300, 24), false, BF16);
}

#[test]
fn operands_of_other_dtypes_match() {
    product((50, 72, 80), true, (DType::BF16, DType::F8E4M3));
    product((50, 72, 80), false, (DType::F16, DType::F8E5M2));
    product((50, 70, 81), true, (DType::F8E4M3, DType::BF16));
    // No unit holds both exactly.
    product((50, 72, 80), true, (DType::BF16, DType::F16));
    product((50, 72, 80), true, (DType::F32, DType::BF16));
}

#[test]
fn batches_match() {
    for (is_batched, batch, mnk) in
        [(true, &[3][..], (33, 40, 48)), (true, &[2, 2], (9, 18, 7)), (false, &[2], (31, 24, 16))]
    {
        Product { batch, mnk, is_batched, transpose_rhs: is_batched, dtypes: BF16 }.check(102);
    }
}

fn video(input: [usize; 3], ci: usize, co: usize) -> Convolution {
    Convolution {
        input: input.into(),
        kernel: vec![3; 3],
        stride: vec![1; 3],
        dilation: vec![1; 3],
        pad: vec![(2, 0), (1, 1), (1, 1)],
        dtypes: BF16,
        ..Convolution::line(0, 0, ci, co)
    }
}

#[test]
fn convolutions_match() {
    let check = |case: Convolution| assert!(case.check(103), "{case:?} is refused");
    check(video([3, 7, 9], 16, 32));
    check(video([2, 5, 6], 12, 18));
    check(Convolution { stride: vec![2, 2, 2], batch: 2, ..video([4, 6, 5], 8, 16) });
    check(Convolution {
        dtypes: (DType::F16, DType::F16),
        dilation: vec![3],
        pad: vec![(6, 0)],
        ..Convolution::line(70, 3, 24, 20)
    });
    check(Convolution { groups: 2, ..video([2, 4, 4], 8, 24) });
    let up = |pad| Convolution {
        transpose: true,
        stride: vec![3],
        pad: vec![pad],
        dtypes: BF16,
        ..Convolution::line(23, 7, 16, 34)
    };
    check(up((2, 2)));
    check(Convolution { channels: (10, 16), ..up((0, 1)) });
}

/// Head dims that end in every way among chunks of columns, queries and keys that end inside blocks.
#[test]
fn attention_matches() {
    for (t, s, d) in [(70, 75, 64), (130, 33, 128), (9, 100, 256), (33, 64, 16), (40, 31, 80)] {
        Heads { dtype: DType::BF16, ..Heads::new(t, s, 2, d) }.check(104);
    }
    Heads { dtype: DType::F16, e: 48, ..Heads::new(65, 150, 1, 32) }.check(105);
    Heads { dtype: DType::F16, d: 32, ..Heads::new(20, 40, 1, 112) }.check(106);
}

#[test]
fn masked_attention_matches() {
    let causal = |t, s, d| Heads { dtype: DType::BF16, causal: true, ..Heads::new(t, s, 2, d) };
    causal(140, 140, 64).check(107);
    causal(40, 100, 128).check(108);
    Heads { n: 4, m: 2, b: 2, ..causal(30, 30, 32) }.check(109);
    let bias = Some([true, false, true, true]);
    Heads { bias, b: 2, ..Heads { causal: false, ..causal(37, 70, 64) } }.check(110);
    Heads { bias, ..causal(50, 70, 64) }.check(111);
}

/// Padding in front, whose bias is so low that rows of the padding see hidden keys rather than each other.
#[test]
fn rows_of_padding_match() {
    for padding in [70, 3] {
        let bias = Some([false, false, false, true]);
        let case = Heads { causal: true, bias, dtype: DType::BF16, ..Heads::new(150, 150, 1, 32) };
        let mut random = Random(112);
        let mut args: Vec<Tensor> = case.types().iter().map(|ty| random.tensor(ty, -2.0, 2.0)).collect();
        let keys = (0..case.s).map(|key| if key < padding { f32::MIN as f64 } else { 0.0 }).collect();
        args[3].data = Data::Float(keys);
        case.check_with(&args);
    }
}

/// Each block of keys has larger scores than the one before, by less and by more than sums are scaled for, or smaller ones.
#[test]
fn growing_and_falling_scores_match() {
    for slope in [0.02, 0.5, -0.5] {
        let case = Heads { bias: Some([false, false, false, true]), dtype: DType::BF16, ..Heads::new(20, 400, 1, 144) };
        let mut random = Random(113);
        let mut args: Vec<Tensor> = case.types().iter().map(|ty| random.tensor(ty, -2.0, 2.0)).collect();
        // Multiples of 2⁻⁶ up to 2⁸: sums with scores round like numbers of that size, which the scale of `v` makes up for.
        let bias = (0..case.s).map(|key| (slope * key as f64 * 64.0).round() / 64.0).collect();
        args[3].data = Data::Float(bias);
        if let Data::Float(v) = &mut args[2].data {
            v.iter_mut().for_each(|v| *v /= 128.0);
        }
        case.check_with(&args);
    }
}
