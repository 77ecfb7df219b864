//! Fused calls of every form against the reference evaluator on the graph that they stand for.
//!
//! Operands are in `-1..1`, so the sums of a contraction over `k` elements are at most `k`, and f32 arithmetic loses at most
//! `k + 1` units of that; a map behind it changes errors by a factor of two at most and rounds a few times more.

use ltxc_ir::ops::{
    Attention, Binary, Conv, ConvTranspose, GroupNorm, LeakyRelu, Matmul, Op, Pad, PadMode, RmsNorm, Rope, RopeLayout,
    Transpose,
};
use ltxc_ir::plan::{Copy, Kernel, Map, MapFunction, MapStep, PartArg};
use ltxc_ir::{DType, Float, TensorType};

use crate::group::{Group, infer};
use crate::harness::{Random, close, reference, unit};
use ltxc_ir::eval::Tensor;

fn map(group: &mut Group, steps: Vec<MapStep>, args: Vec<PartArg>) -> PartArg {
    let result = args[0].ty.clone();
    group.part(Kernel::Map(Map { steps }), args, result)
}

fn f32_operand(group: &mut Group, random: &mut Random, shape: &[usize]) -> PartArg {
    group.operand(random.tensor(&TensorType::f32(shape.to_vec()), -1.0, 1.0))
}

/// The only result of a group.
fn result(group: &Group) -> Tensor {
    let ty = group.parts[group.stored[0] as usize].result.clone();
    let bytes = group.run().expect("the group has a form").remove(0);
    Tensor::from_bytes(ty, &bytes)
}

#[test]
fn gated_residual_behind_a_product() {
    let mut random = Random(51);
    let (m, n, k) = (130, 97, 61);
    let mut group = Group::new();
    let args = [vec![m, k], vec![n, k], vec![n], vec![m, 1], vec![m, n]];
    let [a, b, bias, gate, x] = args.map(|shape| f32_operand(&mut group, &mut random, &shape));
    let op = Matmul { transpose_rhs: true };
    let product = group.part(Kernel::Matmul(op.clone()), vec![a, b], TensorType::f32([m, n]));
    let steps = vec![
        MapStep::Binary(Binary::Add, 0, 1),
        MapStep::Function(MapFunction::Gelu, 4),
        MapStep::Binary(Binary::Mul, 5, 2),
        MapStep::Binary(Binary::Add, 3, 6),
    ];
    let sum = map(&mut group, steps, vec![product, bias, gate, x]);
    group.store(&sum);
    let want = reference(&group.args, |g, p| {
        let inner = g.add(g.push(op.clone(), &p[..2]), p[2]);
        g.add(p[4], g.mul(g.gelu(inner), p[3]))
    });
    let error = 4.0 * (k * (k + 1)) as f64 * unit(DType::F32);
    close(&result(&group), &want, |_| error);
}

#[test]
fn padded_convolution_with_a_transposed_store() {
    let mut random = Random(52);
    let (ci, co) = (5, 33);
    for mode in [PadMode::Edge, PadMode::Reflect, PadMode::Circular, PadMode::Zeros] {
        let mut group = Group::new();
        let x = f32_operand(&mut group, &mut random, &[1, 4, 9, 7, ci]);
        let pads = [
            Pad { lo: vec![0, 2, 0, 0, 0], hi: vec![0; 5], mode: PadMode::Edge },
            Pad { lo: vec![0, 0, 1, 1, 0], hi: vec![0, 0, 1, 2, 0], mode },
        ];
        let mut padded = x;
        for pad in &pads {
            let ty = infer(pad, &[&padded]).expect("extents fit");
            padded = group.part(Kernel::Pad(pad.clone()), vec![padded], ty);
        }
        let w = f32_operand(&mut group, &mut random, &[3, 3, 3, ci, co]);
        let op = Conv { stride: vec![1; 3], dilation: vec![1; 3], pad: vec![(0, 0); 3], groups: 1 };
        let ty = infer(&op, &[&padded, &w]).expect("extents fit");
        let sums = group.part(Kernel::Conv(op.clone()), vec![padded, w], ty.clone());
        let bias = f32_operand(&mut group, &mut random, &[co]);
        let sum = map(&mut group, vec![MapStep::Binary(Binary::Add, 0, 1)], vec![sums, bias]);
        // [rows, co] becomes [co, rows].
        let rows = ty.elements() / co;
        let copy = Copy {
            shape: vec![co, rows],
            src_offset: 0,
            src_strides: vec![1, co],
            dst_offset: 0,
            dst_strides: vec![rows, 1],
        };
        let turned = group.part(Kernel::Copy(copy), vec![sum], TensorType::f32([co, rows]));
        group.store(&turned);
        let want = reference(&group.args, |g, p| {
            let padded = pads.iter().fold(p[0], |x, pad| g.push(pad.clone(), &[x]));
            let sum = g.add(g.push(op.clone(), &[padded, p[1]]), p[2]);
            let flat = g.reshape(sum, &[rows, co]);
            g.push(Op::from(Transpose { perm: vec![1, 0] }), &[flat])
        });
        let k = 27 * ci;
        close(&result(&group), &want, |_| (k * (k + 2)) as f64 * unit(DType::F32));
    }
}

/// `conv(leaky_relu(x))` and its transpose, also with pads between the two, for random extents and dtypes.
#[test]
fn convolutions_of_what_is_activated_and_padded() {
    let mut random = Random(55);
    for case in 0..60 {
        let is_transposed = case % 2 == 1;
        let (t, k, stride) = (random.pick(&[1, 5, 37, 130]), random.pick(&[1, 3, 4, 12]), random.pick(&[1, 2, 3]));
        let (ci, co, groups) = random.pick(&[(6, 6, 6), (3, 5, 1), (8, 34, 1), (40, 33, 1)]);
        let dtype = random.pick(&[DType::F32, DType::F32, DType::BF16]);
        let mode = random.pick(&[PadMode::Edge, PadMode::Zeros]);
        let pad = Pad { lo: vec![0, random.pick(&[0, 5]), 0], hi: vec![0, random.pick(&[0, 6]), 0], mode };
        let slope = LeakyRelu { slope: Float(0.1) };
        let mut group = Group::new();
        let x = group.operand(random.tensor(&TensorType::new(dtype, vec![1, t, ci]), -1.0, 1.0));
        let w = group.operand(random.tensor(&TensorType::new(dtype, vec![k, ci / groups, co]), -1.0, 1.0));
        let activated = map(&mut group, vec![MapStep::Function(MapFunction::LeakyRelu(slope.slope), 0)], vec![x]);
        let ty = infer(&pad, &[&activated]).expect("extents fit");
        let padded = group.part(Kernel::Pad(pad.clone()), vec![activated], ty);
        let (stride, dilation, cut) = (vec![stride], vec![1], random.pick(&[(0, 0), (1, 2)]));
        let op: Op = match is_transposed {
            true => ConvTranspose { stride, dilation, pad: vec![cut], groups }.into(),
            false => Conv { stride, dilation, pad: vec![cut], groups }.into(),
        };
        let Ok(ty) = op.infer(&[&padded.ty, &w.ty]) else { continue };
        if ty.elements() == 0 {
            continue;
        }
        let kernel = match op.clone() {
            Op::ConvTranspose(op) => Kernel::ConvTranspose(op),
            Op::Conv(op) => Kernel::Conv(op),
            op => panic!("`{}` is no convolution", op.name()),
        };
        let sums = group.part(kernel, vec![padded, w], ty);
        group.store(&sums);
        let want = reference(&group.args, |g, p| {
            let padded = g.push(pad.clone(), &[g.push(slope.clone(), &p[..1])]);
            g.push(op.clone(), &[padded, p[1]])
        });
        // Each of the `k` operands of a sum that are activated is at most a tenth, and rounded to the dtype.
        let k = (k * ci / groups) as f64;
        close(&result(&group), &want, |_| k * ((k + 2.0) * unit(DType::F32) + 0.1 * unit(dtype)));
    }
}

#[test]
fn attention_with_norms_rotations_and_gates() {
    let mut random = Random(53);
    let (b, t, n, d) = (2, 101, 3, 16);
    let mut group = Group::new();
    let shape = [b, t, n, d];
    let args = [&shape[..], &shape, &shape, &[n * d], &[1, t, n, d / 2], &[1, t, n, d / 2], &[b, t, n, 1]];
    let [q, k, v, w, cos, sin, gate] = args.map(|shape| f32_operand(&mut group, &mut random, shape));
    let (norm, rope) = (RmsNorm { eps: Float(1e-6) }, Rope { layout: RopeLayout::Interleaved });
    let [q, k] = [q, k].map(|x| {
        let whole = x.ty.clone();
        let rows = TensorType::f32([b, t, n * d]);
        let operands = vec![PartArg { source: x.source, ty: rows.clone() }, w.clone()];
        let normed = group.part(Kernel::RmsNorm(norm.clone()), operands, rows);
        let normed = PartArg { source: normed.source, ty: whole.clone() };
        group.part(Kernel::Rope(rope.clone()), vec![normed, cos.clone(), sin.clone()], whole)
    });
    let op = Attention { scale: Float(0.25), causal: false };
    let mix = group.part(Kernel::Attention(op.clone()), vec![q, k, v], TensorType::f32(shape));
    let gated = map(&mut group, vec![MapStep::Binary(Binary::Mul, 0, 1)], vec![mix, gate]);
    group.store(&gated);
    let want = reference(&group.args, |g, p| {
        let prepare = |x| {
            let rows = g.reshape(x, &[b, t, n * d]);
            let normed = g.push(norm.clone(), &[rows, p[3]]);
            g.push(rope.clone(), &[g.reshape(normed, &shape), p[4], p[5]])
        };
        g.mul(g.push(op.clone(), &[prepare(p[0]), prepare(p[1]), p[2]]), p[6])
    });
    // Normed elements are below 2, rotated ones below 4: scores are at most 4 · d in magnitude and off by d · 16 · d units,
    // and exponentials relative to the largest are off by as much relative to themselves; then t values are averaged.
    let error = (d * d * 16 + t) as f64 * 2.0 * unit(DType::F32);
    close(&result(&group), &want, |_| error);
}

#[test]
fn activation_behind_a_group_norm() {
    let mut random = Random(54);
    let shape = [2, 9, 11, 24];
    let mut group = Group::new();
    let [x, w, b] = [&shape[..], &[24], &[24]].map(|shape| f32_operand(&mut group, &mut random, shape));
    let op = GroupNorm { groups: 8, eps: Float(1e-6) };
    let normed = group.part(Kernel::GroupNorm(op.clone()), vec![x, w, b], TensorType::f32(shape));
    let active = map(&mut group, vec![MapStep::Function(MapFunction::Silu, 0)], vec![normed]);
    group.store(&active);
    let want = reference(&group.args, |g, p| g.silu(g.push(op.clone(), p)));
    // Sums over chunks of at most 256 rows, of values below 2 after the norm.
    close(&result(&group), &want, |_| 300.0 * unit(DType::F32));
}
