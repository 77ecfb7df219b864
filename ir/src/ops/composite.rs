//! Composites: ops whose meaning is their expansion into primitives.
//!
//! All of them compute in f32 and round once to the dtype of their first operand.

use serde::{Deserialize, Serialize};

use super::{
    Binary, Compare, OpDef, ReduceKind, Unary, attributes_by_serde, broadcast_shapes, expect_args, expect_args_between,
    expect_float,
};
use crate::builder::Builder;
use crate::graph::ValueId;
use crate::types::{DType, Float, TensorType};

/// Implements [`OpDef`] and [`super::Composite`] for functions of single elements.
macro_rules! pointwise_composite {
    ($ty:ident, $name:literal, $flops:literal, |$op:ident, $b:ident, $x:ident| $body:expr) => {
        impl OpDef for $ty {
            attributes_by_serde!($name);
            fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
                expect_args(args, 1)?;
                expect_float(args[0], "operand")?;
                Ok(args[0].clone())
            }
            fn flops(&self, _: &[&TensorType], out: &TensorType) -> u64 {
                $flops * out.elements() as u64
            }
        }
        impl super::Composite for $ty {
            fn expand(&self, $b: &Builder, args: &[ValueId]) -> ValueId {
                let ($op, dtype) = (self, $b.ty(args[0]).dtype);
                let $x = $b.cast(args[0], DType::F32);
                let y = $body;
                $b.cast(y, dtype)
            }
        }
    };
}

/// `sigmoid`: `1 / (1 + exp(−x))`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sigmoid {}

pointwise_composite!(Sigmoid, "sigmoid", 4, |_op, b, x| {
    let e = b.unary(Unary::Exp, b.neg(x));
    b.div(b.scalar(1.0), b.add_scalar(e, 1.0))
});

/// `silu`: `x · sigmoid(x)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Silu {}

pointwise_composite!(Silu, "silu", 5, |_op, b, x| {
    let e = b.unary(Unary::Exp, b.neg(x));
    b.div(x, b.add_scalar(e, 1.0))
});

/// `gelu`: `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`, the tanh approximation that every model of the family uses.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Gelu {}

pointwise_composite!(Gelu, "gelu", 9, |_op, b, x| {
    let cube = b.mul(b.mul(x, x), x);
    let inner = b.add(x, b.mul_scalar(cube, 0.044715));
    let t = b.unary(Unary::Tanh, b.mul_scalar(inner, (2.0 / std::f64::consts::PI).sqrt()));
    b.mul(b.mul_scalar(x, 0.5), b.add_scalar(t, 1.0))
});

/// `leaky_relu`: `x` where positive, else `slope · x`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeakyRelu {
    /// Factor for negative values.
    pub slope: Float,
}

pointwise_composite!(LeakyRelu, "leaky_relu", 2, |op, b, x| {
    let positive = b.compare(Compare::Less, b.scalar(0.0), x);
    b.select(positive, x, b.mul_scalar(x, op.slope.0))
});

/// `snake`: `x + sin²(a x) / (b + 1e-9)`.
///
/// - `x`: float; `a`, `b`: broadcast to `x` (per channel: `[c]`), already exponentiated.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Snake {}

impl OpDef for Snake {
    attributes_by_serde!("snake");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 3)?;
        for ty in args {
            expect_float(ty, "operand")?;
            if broadcast_shapes(&args[0].shape, &ty.shape).as_ref() != Some(&args[0].shape) {
                return Err(format!("{ty} does not broadcast to {}", args[0]));
            }
        }
        Ok(args[0].clone())
    }
    fn flops(&self, _: &[&TensorType], out: &TensorType) -> u64 {
        6 * out.elements() as u64
    }
}

impl super::Composite for Snake {
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId {
        let dtype = b.ty(args[0]).dtype;
        let [x, alpha, beta] = [0, 1, 2].map(|i| b.cast(args[i], DType::F32));
        let s = b.unary(Unary::Sin, b.mul(x, alpha));
        let y = b.add(x, b.div(b.mul(s, s), b.add_scalar(beta, 1e-9)));
        b.cast(y, dtype)
    }
}

fn check_channel_vector(x: &TensorType, v: &TensorType) -> Result<(), String> {
    expect_float(v, "parameter")?;
    if v.rank() == 1 && Some(&v.shape[0]) == x.shape.last() {
        return Ok(());
    }
    Err(format!("{v} is not one value for each channel of {x}"))
}

/// `rms_norm`: `x / √(mean(x²) + eps) · w` over the last axis; also the pixel norm of channels-last activations.
///
/// - `x`: `[.., c]` float; `w`: `[c]`, optional.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: Float,
}

impl OpDef for RmsNorm {
    attributes_by_serde!("rms_norm");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args_between(args, 1, 2)?;
        infer_row_norm(args)
    }
    fn flops(&self, args: &[&TensorType], out: &TensorType) -> u64 {
        (2 + args.len() as u64) * out.elements() as u64
    }
}

fn infer_row_norm(args: &[&TensorType]) -> Result<TensorType, String> {
    expect_float(args[0], "operand")?;
    if args[0].shape.last().is_none_or(|&c| c == 0) {
        return Err(format!("{} has no channels", args[0]));
    }
    args[1..].iter().try_for_each(|v| check_channel_vector(args[0], v))?;
    Ok(args[0].clone())
}

impl super::Composite for RmsNorm {
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId {
        let ty = b.ty(args[0]);
        let x = b.cast(args[0], DType::F32);
        let mean = b.reduce(ReduceKind::Mean, b.mul(x, x), &[ty.rank() - 1]);
        let mut y = b.mul(x, b.unary(Unary::Rsqrt, b.add_scalar(mean, self.eps.0)));
        if let Some(&w) = args.get(1) {
            y = b.mul(y, w);
        }
        b.cast(y, ty.dtype)
    }
}

/// `layer_norm`: `(x − mean) / √(var + eps) · w + b` over the last axis, biased variance.
///
/// - `x`: `[.., c]` float; `w`, `b`: `[c]`, both or neither.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: Float,
}

impl OpDef for LayerNorm {
    attributes_by_serde!("layer_norm");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        if args.len() != 1 {
            expect_args(args, 3)?;
        }
        infer_row_norm(args)
    }
    fn flops(&self, _: &[&TensorType], out: &TensorType) -> u64 {
        7 * out.elements() as u64
    }
}

impl super::Composite for LayerNorm {
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId {
        let ty = b.ty(args[0]);
        let axis = [ty.rank() - 1];
        let x = b.cast(args[0], DType::F32);
        let centred = b.sub(x, b.reduce(ReduceKind::Mean, x, &axis));
        let var = b.reduce(ReduceKind::Mean, b.mul(centred, centred), &axis);
        let mut y = b.mul(centred, b.unary(Unary::Rsqrt, b.add_scalar(var, self.eps.0)));
        if let [_, w, bias] = *args {
            y = b.add(b.mul(y, w), bias);
        }
        b.cast(y, ty.dtype)
    }
}

/// `group_norm`: like `layer_norm`, with statistics over all axes between batch and channels and over the channels of a
/// group, then `· w + b` per channel.
///
/// - `x`: `[b, s.., c]` float; `w`, `b`: `[c]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GroupNorm {
    /// Number of groups; divides `c`.
    pub groups: usize,
    /// Added to the variance.
    pub eps: Float,
}

impl OpDef for GroupNorm {
    attributes_by_serde!("group_norm");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 3)?;
        let x = args[0];
        if x.rank() < 2 || self.groups == 0 || !x.shape[x.rank() - 1].is_multiple_of(self.groups) || x.elements() == 0 {
            return Err(format!("{x} cannot be split into {} groups of channels", self.groups));
        }
        infer_row_norm(args)
    }
    fn flops(&self, _: &[&TensorType], out: &TensorType) -> u64 {
        7 * out.elements() as u64
    }
}

impl super::Composite for GroupNorm {
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId {
        let ty = b.ty(args[0]);
        let c = ty.shape[ty.rank() - 1];
        let rows = ty.elements() / ty.shape[0] / c;
        let x = b.reshape(b.cast(args[0], DType::F32), &[ty.shape[0], rows, self.groups, c / self.groups]);
        let centred = b.sub(x, b.reduce(ReduceKind::Mean, x, &[1, 3]));
        let var = b.reduce(ReduceKind::Mean, b.mul(centred, centred), &[1, 3]);
        let y = b.mul(centred, b.unary(Unary::Rsqrt, b.add_scalar(var, self.eps.0)));
        let y = b.add(b.mul(b.reshape(y, &ty.shape), args[1]), args[2]);
        b.cast(y, ty.dtype)
    }
}

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Element `i` with element `i + d/2`.
    Split,
    /// Element `2i` with element `2i + 1`.
    Interleaved,
}

/// `rope`: rotates pairs of elements, `(a, b) → (a cos − b sin, b cos + a sin)`.
///
/// - `x`: `[b, t, n, d]` float; `cos`, `sin`: broadcast to `[b, t, n, d/2]`, rank 4.
///
/// Source: spec/transformer §5.3.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rope {
    /// Pairing inside a head.
    pub layout: RopeLayout,
}

impl OpDef for Rope {
    attributes_by_serde!("rope");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 3)?;
        let x = args[0];
        if x.rank() != 4 || !x.shape[3].is_multiple_of(2) {
            return Err(format!("{x} is not [b, t, n, even d]"));
        }
        let half = [x.shape[0], x.shape[1], x.shape[2], x.shape[3] / 2];
        for ty in args {
            expect_float(ty, "operand")?;
        }
        for table in &args[1..] {
            if table.rank() != 4 || broadcast_shapes(&half, &table.shape).as_deref() != Some(&half) {
                return Err(format!("table {table} does not broadcast to {half:?}"));
            }
        }
        Ok(x.clone())
    }
    fn flops(&self, _: &[&TensorType], out: &TensorType) -> u64 {
        3 * out.elements() as u64
    }
}

impl super::Composite for Rope {
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId {
        let ty = b.ty(args[0]);
        let (n, d) = (ty.shape[2], ty.shape[3]);
        let x = b.cast(args[0], DType::F32);
        // Both layouts become [b, t, n, 2, d/2] or [b, t, n, d/2, 2], so that the pair is an axis.
        let (pair_axis, shape) = match self.layout {
            RopeLayout::Split => (3, [ty.shape[0], ty.shape[1], n, 2, d / 2]),
            RopeLayout::Interleaved => (4, [ty.shape[0], ty.shape[1], n, d / 2, 2]),
        };
        let pairs = b.reshape(x, &shape);
        let as_table = |t: ValueId| {
            let mut s = b.ty(t).shape;
            s.insert(pair_axis, 1);
            b.reshape(t, &s)
        };
        let (cos, sin) = (as_table(args[1]), as_table(args[2]));
        let first = b.slice_axis(pairs, pair_axis, 0, 1);
        let second = b.slice_axis(pairs, pair_axis, 1, 2);
        let a = b.sub(b.mul(first, cos), b.mul(second, sin));
        let c = b.add(b.mul(second, cos), b.mul(first, sin));
        let y = b.reshape(b.concat(&[a, c], pair_axis), &ty.shape);
        b.cast(y, ty.dtype)
    }
}

/// `attention`: `softmax(q kᵀ · scale + bias) v` for every head. Softmax in f32.
///
/// - `q`: `[b, t, n, d]`; `k`: `[b, s, m, d]`; `v`: `[b, s, m, e]`, float; `n` is a multiple of `m`, and query head `j`
///   uses key head `j / (n / m)`. `bias` (optional): f32, broadcasts to `[b, n, t, s]`, rank 4, finite.
/// - `causal`: query `i` sees key `j` only if `j ≤ i + s − t`.
/// - Result: `[b, t, n, e]`, dtype of `q`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Attention {
    /// Factor of the scores.
    pub scale: Float,
    /// Whether later keys are hidden.
    pub causal: bool,
}

/// Added to the score of a hidden key: finite, so that a row that sees nothing stays finite.
pub const HIDDEN_SCORE: f64 = -1e30;

impl OpDef for Attention {
    attributes_by_serde!("attention");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args_between(args, 3, 4)?;
        let (q, k, v) = (args[0], args[1], args[2]);
        for ty in args {
            expect_float(ty, "operand")?;
            if ty.rank() != 4 {
                return Err(format!("{ty} does not have rank 4"));
            }
        }
        let heads_fit = k.shape[2] > 0 && q.shape[2] % k.shape[2] == 0 && k.shape[2] == v.shape[2];
        if q.shape[0] != k.shape[0] || k.shape[..2] != v.shape[..2] || q.shape[3] != k.shape[3] || !heads_fit {
            return Err(format!("q {q}, k {k} and v {v} do not fit together"));
        }
        if k.shape[1] == 0 || (self.causal && k.shape[1] < q.shape[1]) {
            return Err(format!("{} queries cannot look at {} keys", q.shape[1], k.shape[1]));
        }
        let scores = [q.shape[0], q.shape[2], q.shape[1], k.shape[1]];
        if let Some(bias) = args.get(3)
            && (bias.dtype != DType::F32 || broadcast_shapes(&scores, &bias.shape).as_deref() != Some(&scores))
        {
            return Err(format!("bias {bias} is not f32 that broadcasts to {scores:?}"));
        }
        Ok(TensorType::new(q.dtype, [q.shape[0], q.shape[1], q.shape[2], v.shape[3]]))
    }
    fn flops(&self, args: &[&TensorType], _: &TensorType) -> u64 {
        let (q, v) = (args[0], args[2]);
        2 * (q.elements() / q.shape[3].max(1)) as u64 * v.shape[1] as u64 * (q.shape[3] + v.shape[3]) as u64
    }
}

impl super::Composite for Attention {
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId {
        let (q_ty, k_ty, v_ty) = (b.ty(args[0]), b.ty(args[1]), b.ty(args[2]));
        let [batch, t, n, d] = [0, 1, 2, 3].map(|a| q_ty.shape[a]);
        let (s, m, e) = (k_ty.shape[1], k_ty.shape[2], v_ty.shape[3]);
        // [b, m, n/m · t, d]: the query heads that share a key head become more rows of one product.
        let q = b.reshape(b.cast(args[0], DType::F32), &[batch, t, m, n / m, d]);
        let q = b.reshape(b.transpose(q, &[0, 2, 3, 1, 4]), &[batch, m, n / m * t, d]);
        let k = b.transpose(b.cast(args[1], DType::F32), &[0, 2, 1, 3]);
        let v = b.transpose(b.cast(args[2], DType::F32), &[0, 2, 1, 3]);
        let scores = b.mul_scalar(b.matmul_transposed(q, k), self.scale.0);
        let mut scores = b.reshape(scores, &[batch, n, t, s]);
        if let Some(&bias) = args.get(3) {
            scores = b.add(scores, bias);
        }
        if self.causal {
            let row = b.iota(TensorType::i32([t, s]), 0);
            let column = b.iota(TensorType::i32([t, s]), 1);
            let offset = b.int_scalar((s - t) as i64);
            let visible = b.compare(Compare::LessEqual, column, b.add(row, offset));
            scores = b.select(visible, scores, b.broadcast(b.scalar(HIDDEN_SCORE), &[batch, n, t, s]));
        }
        let weights = b.unary(Unary::Exp, b.sub(scores, b.reduce(ReduceKind::Max, scores, &[3])));
        let weights = b.div(weights, b.reduce(ReduceKind::Sum, weights, &[3]));
        let o = b.matmul(b.reshape(weights, &[batch, m, n / m * t, s]), v);
        let o = b.transpose(b.reshape(o, &[batch, m, n / m, t, e]), &[0, 3, 1, 2, 4]);
        b.cast(b.reshape(o, &[batch, t, n, e]), q_ty.dtype)
    }
}

fn block_product(block: &[usize]) -> Option<usize> {
    block.iter().try_fold(1usize, |n, &f| if f == 0 { None } else { n.checked_mul(f) })
}

/// `depth_to_space`: moves groups of channels to space, `[b, s.., c · Π block] → [b, s · block.., c]`.
///
/// Channel `((c · f1 + p1) · f2 + p2) …` goes to channel `c` at offset `(p1, p2, …)`: the channel is slowest.
///
/// Source: spec/video-vae §4.7.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DepthToSpace {
    /// Factor per spatial axis.
    pub block: Vec<usize>,
}

impl OpDef for DepthToSpace {
    attributes_by_serde!("depth_to_space");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        let (x, n) = (args[0], self.block.len());
        let product = block_product(&self.block).filter(|p| x.rank() == n + 2 && n <= 4 && x.shape[n + 1] % p == 0);
        let Some(product) = product else {
            return Err(format!("{x} does not fit block {:?}", self.block));
        };
        let mut out = x.clone();
        for a in 0..n {
            out.shape[a + 1] = out.shape[a + 1].saturating_mul(self.block[a]);
        }
        out.shape[n + 1] /= product;
        Ok(out)
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl super::Composite for DepthToSpace {
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId {
        let (x, n) = (b.ty(args[0]), self.block.len());
        let out = b.infer_shape(self, &x);
        let mut split = x.shape[..n + 1].to_vec();
        split.push(out[n + 1]);
        split.extend(&self.block);
        // [b, s1.., c, f1..] → [b, s1, f1, s2, f2, .., c]
        let mut perm = vec![0];
        for a in 0..n {
            perm.extend([a + 1, n + 2 + a]);
        }
        perm.push(n + 1);
        b.reshape(b.transpose(b.reshape(args[0], &split), &perm), &out)
    }
}

/// `space_to_depth`: the inverse of `depth_to_space`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SpaceToDepth {
    /// Factor per spatial axis; divides its extent.
    pub block: Vec<usize>,
}

impl OpDef for SpaceToDepth {
    attributes_by_serde!("space_to_depth");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        let (x, n) = (args[0], self.block.len());
        let product = block_product(&self.block)
            .filter(|_| x.rank() == n + 2 && n <= 4 && (0..n).all(|a| x.shape[a + 1] % self.block[a] == 0));
        let Some(product) = product else {
            return Err(format!("{x} does not fit block {:?}", self.block));
        };
        let mut out = x.clone();
        for a in 0..n {
            out.shape[a + 1] /= self.block[a];
        }
        out.shape[n + 1] = out.shape[n + 1].saturating_mul(product);
        Ok(out)
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl super::Composite for SpaceToDepth {
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId {
        let (x, n) = (b.ty(args[0]), self.block.len());
        let out = b.infer_shape(self, &x);
        let mut split = vec![x.shape[0]];
        for a in 0..n {
            split.extend([out[a + 1], self.block[a]]);
        }
        split.push(x.shape[n + 1]);
        // [b, s1, f1, s2, f2, .., c] → [b, s1.., c, f1..]
        let mut perm = vec![0];
        perm.extend((0..n).map(|a| 1 + 2 * a));
        perm.push(2 * n + 1);
        perm.extend((0..n).map(|a| 2 + 2 * a));
        b.reshape(b.transpose(b.reshape(args[0], &split), &perm), &out)
    }
}

/// The composite form of [`Binary::Max`] and [`Binary::Min`]: limits `x` to `lo..=hi`.
pub(crate) fn clamp(b: &Builder, x: ValueId, lo: f64, hi: f64) -> ValueId {
    b.binary(Binary::Min, b.binary(Binary::Max, x, b.scalar(lo)), b.scalar(hi))
}
