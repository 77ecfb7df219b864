//! Random modules: every op, calls of shared functions with weights of their own, parameters of every rate.

use ltxc_ir::ops::{Attention, Compare, Conv, ConvTranspose, PadMode, ReduceKind, RopeLayout, Unary, Update};
use ltxc_ir::{Builder, DType, Function, Module, Rate, TensorType, ValueId};

use super::Numbers;

/// Channels of every activation.
const CHANNELS: usize = 8;

/// A module with the entry `main`. `narrow` allows dtypes below f32, whose rounding magnifies tiny differences.
pub fn module(seed: u64, narrow: bool) -> Module {
    let mut numbers = Numbers(seed);
    let tokens = 1 + numbers.below(4);
    let inner = function("inner", &mut numbers, tokens, narrow, &[], Shape { params: 2, ops: 6, results: 1 });
    let block = function("block", &mut numbers, tokens, narrow, &[&inner], Shape { params: 3, ops: 14, results: 2 });
    let main =
        function("main", &mut numbers, tokens, narrow, &[&inner, &block], Shape { params: 4, ops: 20, results: 3 });
    Module { functions: vec![inner, block, main], entries: vec!["main".into()] }
}

struct Shape {
    params: usize,
    ops: usize,
    results: usize,
}

fn function(name: &str, n: &mut Numbers, tokens: usize, narrow: bool, callees: &[&Function], shape: Shape) -> Function {
    let b = Builder::new(name);
    let ty = TensorType::f32([1, tokens, CHANNELS]);
    let rates = [Rate::Generation, Rate::Evaluation, Rate::Step, Rate::Generation];
    let mut pool: Vec<ValueId> =
        (0..shape.params).map(|i| b.param(&format!("p{i}"), ty.clone(), rates[i % rates.len()])).collect();
    for i in 0..shape.ops {
        // Recent values more often, so that chains form.
        let (x, y) = (pick(n, &pool), pick(n, &pool));
        let values = step(&b, n, x, y, tokens, narrow, callees, i);
        for value in values {
            // Values stay near 1, so that differences stay comparable.
            let bounded = if n.below(3) == 0 { b.unary(Unary::Tanh, value) } else { value };
            if n.below(2) == 0 {
                b.name(&format!("v{i}"), bounded);
            }
            pool.push(bounded);
        }
    }
    for i in 0..shape.results {
        b.result(&format!("r{i}"), b.unary(Unary::Tanh, pick(n, &pool)));
    }
    // Results that are parameters or shared are legal too.
    b.result("same", pick(n, &pool));
    b.finish().unwrap()
}

fn pick(n: &mut Numbers, pool: &[ValueId]) -> ValueId {
    let recent = pool.len().min(5);
    if n.below(3) == 0 { pool[n.below(pool.len())] } else { pool[pool.len() - 1 - n.below(recent)] }
}

/// One or several ops that lead from `[1, t, c]` to `[1, t, c]`.
#[allow(clippy::too_many_arguments)]
fn step(
    b: &Builder,
    n: &mut Numbers,
    x: ValueId,
    y: ValueId,
    t: usize,
    narrow: bool,
    callees: &[&Function],
    i: usize,
) -> Vec<ValueId> {
    let c = CHANNELS;
    let key = |what: &str| format!("{what}.{i}.weight");
    let weight_dtype = [DType::F32, DType::BF16, DType::F16][n.below(3)];
    let weight = |what: &str, shape: &[usize]| b.weight("model", &key(what), TensorType::new(weight_dtype, shape));
    let value = match n.below(33) {
        0 => b.add(x, y),
        1 => b.mul(x, b.add_scalar(y, 1.0)),
        2 => b.add(b.mul_scalar(x, 1.0), b.scalar(0.0)),
        3 => b.silu(x),
        4 => b.gelu(b.leaky_relu(x, 0.25)),
        5 => b.sigmoid(b.neg(b.neg(x))),
        6 => b.snake(x, b.unary(Unary::Exp, weight("alpha", &[c])), b.unary(Unary::Exp, weight("beta", &[c]))),
        7 => b.rms_norm(x, (n.below(2) == 0).then(|| weight("norm", &[c])), 1e-6),
        8 => b.layer_norm(x, 1e-6),
        9 => {
            let w = weight("group", &[c]);
            b.group_norm(x, w, weight("group_bias", &[c]), 2, 1e-5)
        }
        10 | 11 => b.add(b.matmul_transposed(x, weight("linear", &[c, c])), weight("bias", &[c])),
        12 => b.matmul(x, b.transpose(weight("swapped", &[c, c]), &[1, 0])),
        13 => {
            let w = b.transpose(weight("conv", &[c, c, 3]), &[2, 1, 0]);
            let op = Conv { stride: vec![1], dilation: vec![1], pad: vec![(1, 1)], groups: 1 };
            b.conv(op, x, w)
        }
        14 => {
            let heads = b.reshape(x, &[1, t, 2, c / 2]);
            b.reshape(b.transpose(b.transpose(heads, &[0, 2, 1, 3]), &[0, 2, 1, 3]), &[1, t, c])
        }
        15 => {
            let heads = b.transpose(b.reshape(x, &[1, t, 2, c / 2]), &[0, 3, 1, 2]);
            b.reshape(b.transpose(heads, &[0, 2, 1, 3]), &[1, t, c])
        }
        16 => {
            let cut = 1 + n.below(c - 1);
            b.concat(&[b.slice_axis(x, 2, cut, c), b.slice_axis(x, 2, 0, cut)], 2)
        }
        17 => {
            let both = b.concat(&[x, y], 1);
            let from = n.below(t + 1);
            b.slice_axis(both, 1, from, from + t)
        }
        18 => {
            let first = b.slice_axis(x, 1, 0, 1);
            b.mul(y, b.broadcast(first, &[1, t, c]))
        }
        19 => {
            let mode = [PadMode::Zeros, PadMode::Edge, PadMode::Circular][n.below(3)];
            let padded = b.pad(x, &[0, 1, 0], &[0, 0, 0], mode);
            b.slice_axis(padded, 1, 0, t)
        }
        20 => {
            let rows: Vec<i32> = (0..t).map(|_| n.below(t) as i32).collect();
            b.gather(x, b.int_constant(&[t], &rows), 1)
        }
        21 => {
            let kind = [ReduceKind::Mean, ReduceKind::Sum, ReduceKind::Max, ReduceKind::Min][n.below(4)];
            b.sub(x, b.reduce(kind, y, &[[1], [2]][n.below(2)]))
        }
        22 => {
            let heads = |v: ValueId| b.reshape(v, &[1, t, 2, c / 2]);
            let op = Attention { scale: 0.5.into(), causal: n.below(2) == 0 };
            b.reshape(b.attention(op, heads(x), heads(y), heads(x), None), &[1, t, c])
        }
        23 => {
            let heads = b.reshape(x, &[1, t, 2, c / 2]);
            let table = b.reshape(b.slice_axis(y, 2, 0, c / 4), &[1, t, 1, c / 4]);
            let layout = [RopeLayout::Split, RopeLayout::Interleaved][n.below(2)];
            let rotated = b.rope(heads, b.unary(Unary::Cos, table), b.unary(Unary::Sin, table), layout);
            b.reshape(rotated, &[1, t, c])
        }
        24 => b.space_to_depth(b.depth_to_space(x, &[2]), &[2]),
        25 => {
            let ramp = b.cast(b.iota(TensorType::i32([1, t, c]), 1 + n.below(2)), DType::F32);
            b.add(x, b.mul_scalar(ramp, 0.125))
        }
        26 => {
            let row = b.int_scalar(n.below(t) as i64);
            b.push(Update { axis: 1 }, &[x, b.slice_axis(y, 1, 0, 1), row])
        }
        27 => b.select(b.compare(Compare::Less, x, y), x, b.mul_scalar(y, 0.5)),
        28 => {
            // The residual path of an upsampler.
            let wide = b.depth_to_space(b.concat(&[x, y], 2), &[2]);
            let skip = b.depth_to_space(x, &[2]);
            let sum = b.add(wide, b.concat(&[skip, skip], 2));
            b.slice_axis(b.space_to_depth(sum, &[2]), 2, 0, c)
        }
        29 => {
            let w = b.transpose(weight("activated", &[c, c, 3]), &[2, 1, 0]);
            let op = Conv { stride: vec![1], dilation: vec![1], pad: vec![(1, 1)], groups: 1 };
            b.conv(op, b.leaky_relu(x, 0.25), w)
        }
        30 => {
            // A filter that doubles the rate.
            let padded = b.pad(x, &[0, 2, 0], &[0, 2, 0], PadMode::Edge);
            let op = ConvTranspose { stride: vec![2], dilation: vec![1], pad: vec![(5, 5)], groups: c };
            let doubled = b.conv_transpose(op, padded, weight("filter", &[4, 1, c]));
            b.slice_axis(doubled, 1, 0, t)
        }
        31 if narrow => {
            let dtype = [DType::BF16, DType::F16][n.below(2)];
            b.cast(b.add(b.cast(x, dtype), y), DType::F32)
        }
        _ if !callees.is_empty() => {
            let callee = callees[n.below(callees.len())];
            let calls = 1 + n.below(2);
            let mut out = vec![x];
            for k in 0..calls {
                let mut args = vec![out[0], y, x];
                args.truncate(callee.params.len());
                out = b.call(callee, &format!("{}.{i}.{k}", callee.name), &format!("{}.{i}.{k}.", callee.name), &args);
            }
            return out;
        }
        _ => b.max(x, y),
    };
    vec![value]
}
