//! Tests of `copy` against the reference evaluator.

use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::{Copy, Kernel};
use ltxc_ir::types::strides_of;
use ltxc_ir::{DType, TensorType};

use super::harness::{Random, equal, reference, run, run_onto};

/// The elements of a copy, one by one.
fn literally(copy: &Copy, src: &Tensor, before: &Tensor) -> Tensor {
    let bytes = src.ty.dtype.bytes();
    let (from, mut to) = (src.to_bytes(), before.to_bytes());
    let strides = strides_of(&copy.shape);
    for flat in 0..copy.shape.iter().product() {
        let (mut s, mut d) = (copy.src_offset, copy.dst_offset);
        for (a, stride) in strides.iter().enumerate() {
            let i = flat / stride % copy.shape[a];
            (s, d) = (s + i * copy.src_strides[a], d + i * copy.dst_strides[a]);
        }
        to[d * bytes..(d + 1) * bytes].copy_from_slice(&from[s * bytes..(s + 1) * bytes]);
    }
    Tensor::from_bytes(before.ty.clone(), &to)
}

#[track_caller]
fn check_transpose(dtype: DType, shape: &[usize], perm: &[usize]) {
    let mut random = Random(29);
    let x = [random.tensor(&TensorType::new(dtype, shape), -100.0, 100.0)];
    let want = reference(&x, |b, p| b.transpose(p[0], perm));
    let strides = strides_of(shape);
    let copy = Copy {
        shape: want.ty.shape.clone(),
        src_offset: 0,
        src_strides: perm.iter().map(|&p| strides[p]).collect(),
        dst_offset: 0,
        dst_strides: want.ty.strides(),
    };
    equal(&run(&Kernel::Copy(copy), &x, &want.ty), &want, &(dtype, shape, perm));
}

#[test]
fn transposes_match() {
    for dtype in [DType::F32, DType::BF16, DType::U8] {
        check_transpose(dtype, &[1, 1], &[1, 0]);
        check_transpose(dtype, &[7, 5], &[1, 0]);
        check_transpose(dtype, &[130, 67], &[1, 0]);
        check_transpose(dtype, &[256, 512], &[1, 0]);
        check_transpose(dtype, &[3, 5, 4, 2], &[0, 2, 1, 3]);
        check_transpose(dtype, &[2, 60, 4, 64], &[0, 2, 1, 3]);
        check_transpose(dtype, &[64, 33, 3], &[2, 0, 1]);
        check_transpose(dtype, &[3, 64, 33], &[1, 2, 0]);
        check_transpose(dtype, &[6, 7, 3, 3, 5], &[2, 3, 4, 1, 0]);
        check_transpose(dtype, &[2, 3, 4, 5, 2, 3, 2, 2], &[0, 1, 5, 2, 6, 3, 7, 4]);
        check_transpose(dtype, &[31, 70, 2], &[1, 0, 2]);
    }
}

/// Boxes with any strides: slices with steps, broadcasts, parts of concatenations.
#[test]
fn random_boxes_match() {
    let mut random = Random(31);
    for _ in 0..600 {
        let rank = random.below(6);
        let shape = random.shape(rank, 40_000);
        let (src_strides, src_len) = strides(&mut random, &shape, true);
        let (dst_strides, dst_len) = strides(&mut random, &shape, false);
        let (src_offset, dst_offset) = (random.below(5), random.below(5));
        let copy = Copy { shape, src_offset, src_strides, dst_offset, dst_strides };
        let dtype = random.pick(&DType::ALL);
        let src = random.tensor(&TensorType::new(dtype, [src_offset + src_len]), -100.0, 100.0);
        let before = random.tensor(&TensorType::new(dtype, [dst_offset + dst_len + 3]), -100.0, 100.0);
        let want = literally(&copy, &src, &before);
        equal(&run_onto(&Kernel::Copy(copy.clone()), &[src], &before), &want, &copy);
    }
}

/// Strides in a random order of the axes, sometimes with gaps, and how many elements they reach.
fn strides(random: &mut Random, shape: &[usize], may_repeat: bool) -> (Vec<usize>, usize) {
    let mut strides = vec![0; shape.len()];
    let mut order: Vec<usize> = (0..shape.len()).rev().collect();
    if random.below(2) == 0 {
        (1..order.len()).for_each(|i| order.swap(i, random.below(i + 1)));
    }
    let mut step = random.pick(&[1, 1, 1, 2]);
    let mut reach = 1;
    for a in order {
        if may_repeat && random.below(5) == 0 {
            continue;
        }
        strides[a] = step;
        reach += (shape[a] - 1) * step;
        step *= shape[a] * random.pick(&[1, 1, 1, 2]);
    }
    (strides, reach)
}

#[test]
fn large_copies_are_shared() {
    let mut random = Random(37);
    let x = random.tensor(&TensorType::f32([300_001]), -1.0, 1.0);
    let copy = Copy { shape: vec![300_000], src_offset: 1, src_strides: vec![1], dst_offset: 0, dst_strides: vec![1] };
    let out = Tensor::zeros(TensorType::f32([300_000]));
    let want = literally(&copy, &x, &out);
    equal(&run(&Kernel::Copy(copy.clone()), &[x], &out.ty), &want, &copy);
}
