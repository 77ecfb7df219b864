//! Ops that sum: reductions, matrix products, convolutions.

use serde::{Deserialize, Serialize};

use super::{OpDef, Primitive, attributes_by_serde, expect_args, expect_float};
use crate::eval::{Data, Evaluator, Tensor, each_index};
use crate::types::TensorType;

/// What a `reduce` computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the names are the definitions
pub enum ReduceKind {
    Sum,
    Mean,
    Max,
    Min,
}

/// `reduce`: sum, mean, maximum or minimum over `axes`, which stay with extent 1. Sums accumulate in f32 or better.
///
/// Operand: float. An axis of extent 0 gives 0 for the sum and is a type error otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Reduce {
    /// What is computed.
    pub kind: ReduceKind,
    /// Axes, ascending, at least one.
    pub axes: Vec<usize>,
}

impl OpDef for Reduce {
    attributes_by_serde!("reduce");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        expect_float(args[0], "operand")?;
        let ascending = self.axes.windows(2).all(|w| w[0] < w[1]);
        if self.axes.is_empty() || !ascending || self.axes.iter().any(|&a| a >= args[0].rank()) {
            return Err(format!("axes {:?} must be ascending and inside {}", self.axes, args[0]));
        }
        if self.kind != ReduceKind::Sum && self.axes.iter().any(|&a| args[0].shape[a] == 0) {
            return Err(format!("{:?} over nothing in {}", self.kind, args[0]));
        }
        let mut out = args[0].clone();
        for &a in &self.axes {
            out.shape[a] = 1;
        }
        Ok(out)
    }
    fn flops(&self, args: &[&TensorType], _: &TensorType) -> u64 {
        args[0].elements() as u64
    }
}

impl Primitive for Reduce {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let start = match self.kind {
            ReduceKind::Sum | ReduceKind::Mean => 0.0,
            ReduceKind::Max => f64::NEG_INFINITY,
            ReduceKind::Min => f64::INFINITY,
        };
        let mut acc = vec![start; out.elements()];
        let dst = out.strides();
        let x = args[0].floats();
        each_index(&args[0].ty.shape, |flat, index| {
            let o: usize =
                index.iter().enumerate().map(|(a, &i)| if self.axes.contains(&a) { 0 } else { i * dst[a] }).sum();
            acc[o] = match self.kind {
                ReduceKind::Sum | ReduceKind::Mean => acc[o] + x[flat],
                ReduceKind::Max => super::Binary::Max.apply(acc[o], x[flat]),
                ReduceKind::Min => super::Binary::Min.apply(acc[o], x[flat]),
            };
        });
        if self.kind == ReduceKind::Mean {
            let n = self.axes.iter().map(|&a| args[0].ty.shape[a]).product::<usize>() as f64;
            acc.iter_mut().for_each(|v| *v /= n);
        }
        Tensor { ty: out.clone(), data: Data::Float(acc) }
    }
}

/// `matmul`: `a · b`, or `a · bᵀ`. Accumulates in f32 or better.
///
/// - `a`: `[batch.., m, k]`; `b`: `[k, n]` (`[n, k]` if `transpose_rhs`), either rank 2 for every batch or with the
///   batch axes of `a`. Both float, possibly of different dtypes. Result: `[batch.., m, n]`, dtype of `a`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Matmul {
    /// Whether the last axis of `b` is the summed one, as in the weight of a linear layer.
    pub transpose_rhs: bool,
}

impl OpDef for Matmul {
    attributes_by_serde!("matmul");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 2)?;
        let (a, b) = (args[0], args[1]);
        expect_float(a, "lhs")?;
        expect_float(b, "rhs")?;
        if a.rank() < 2 || b.rank() < 2 || (b.rank() > 2 && b.shape[..b.rank() - 2] != a.shape[..a.rank() - 2]) {
            return Err(format!("{a} and {b} have no common batch axes"));
        }
        let (br, bc) = (b.shape[b.rank() - 2], b.shape[b.rank() - 1]);
        let (k, n) = if self.transpose_rhs { (bc, br) } else { (br, bc) };
        if a.shape[a.rank() - 1] != k {
            return Err(format!("{a} and {b} differ in the summed axis"));
        }
        let mut out = a.clone();
        out.shape[a.rank() - 1] = n;
        Ok(out)
    }
    fn flops(&self, args: &[&TensorType], out: &TensorType) -> u64 {
        2 * (out.elements() as u64).saturating_mul(*args[0].shape.last().unwrap_or(&0) as u64)
    }
}

impl Primitive for Matmul {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let (a, b) = (args[0].floats(), args[1].floats());
        let r = out.rank();
        let (m, n, k) = (out.shape[r - 2], out.shape[r - 1], args[0].ty.shape[r - 1]);
        let batches: usize = out.shape[..r - 2].iter().product();
        let b_step = if args[1].ty.rank() > 2 { k * n } else { 0 };
        let (b_row, b_col) = if self.transpose_rhs { (1, k) } else { (n, 1) };
        let mut y = vec![0.0; out.elements()];
        for batch in 0..batches {
            let (a, b) = (&a[batch * m * k..], &b[batch * b_step..]);
            let y = &mut y[batch * m * n..(batch + 1) * m * n];
            for i in 0..m {
                for j in 0..n {
                    y[i * n + j] = (0..k).map(|p| a[i * k + p] * b[p * b_row + j * b_col]).sum();
                }
            }
        }
        Tensor { ty: out.clone(), data: Data::Float(y) }
    }
}

/// `conv`: cross-correlation over any number of spatial axes, channels last. Accumulates in f32 or better.
///
/// - `x`: `[b, s.., ci]`; `w`: `[k.., ci / groups, co]`, float, possibly of another dtype. Result: `[b, o.., co]`.
/// - `pad` are zeros in front of and behind each spatial axis; other paddings are a `pad` op before.
/// - Output channel `j` belongs to group `j / (co / groups)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Conv {
    /// Step per spatial axis.
    pub stride: Vec<usize>,
    /// Distance of taps per spatial axis.
    pub dilation: Vec<usize>,
    /// Zeros in front and behind per spatial axis.
    pub pad: Vec<(usize, usize)>,
    /// Number of channel groups.
    pub groups: usize,
}

impl OpDef for Conv {
    attributes_by_serde!("conv");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 2)?;
        let (x, w) = (args[0], args[1]);
        check_conv(x, w, &self.stride, &self.dilation, &self.pad, self.groups)?;
        let mut out = x.clone();
        for a in 0..self.stride.len() {
            let (lo, hi) = self.pad[a];
            let span = self.dilation[a].saturating_mul(w.shape[a] - 1).saturating_add(1);
            let padded = x.shape[a + 1].saturating_add(lo).saturating_add(hi);
            if padded < span {
                return Err(format!("axis {} of {x} is shorter than the kernel {w}", a + 1));
            }
            out.shape[a + 1] = (padded - span) / self.stride[a] + 1;
        }
        out.shape[x.rank() - 1] = w.shape[w.rank() - 1];
        Ok(out)
    }
    fn flops(&self, args: &[&TensorType], out: &TensorType) -> u64 {
        let taps: usize = args[1].shape[..args[1].rank() - 1].iter().product();
        2 * (out.elements() as u64).saturating_mul(taps as u64)
    }
}

/// The checks that both convolutions share.
fn check_conv(
    x: &TensorType,
    w: &TensorType,
    stride: &[usize],
    dilation: &[usize],
    pad: &[(usize, usize)],
    groups: usize,
) -> Result<(), String> {
    expect_float(x, "input")?;
    expect_float(w, "weight")?;
    let n = stride.len();
    if n == 0 || dilation.len() != n || pad.len() != n || x.rank() != n + 2 || w.rank() != n + 2 {
        return Err(format!("{n} spatial axes do not fit input {x} and weight {w}"));
    }
    if stride.contains(&0) || dilation.contains(&0) || w.shape[..n].contains(&0) {
        return Err("stride, dilation and kernel must be positive".into());
    }
    let (ci, co) = (x.shape[n + 1], w.shape[n + 1]);
    if groups == 0 || ci % groups != 0 || co % groups != 0 || w.shape[n] != ci / groups {
        return Err(format!("weight {w} does not fit the channels of {x} in {groups} groups"));
    }
    Ok(())
}

impl Primitive for Conv {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let (x, w) = (args[0].floats(), args[1].floats());
        let (xs, ws) = (&args[0].ty, &args[1].ty);
        let n = self.stride.len();
        let (ci, co) = (xs.shape[n + 1], ws.shape[n + 1]);
        let (gi, go) = (ci / self.groups, co / self.groups);
        let x_strides = xs.strides();
        let mut y = vec![0.0; out.elements()];
        let positions = &out.shape[..n + 1];
        each_index(positions, |row, index| {
            let y = &mut y[row * co..(row + 1) * co];
            each_index(&ws.shape[..n], |tap, k| {
                let mut base = index[0] * x_strides[0];
                for a in 0..n {
                    let at = (index[a + 1] * self.stride[a] + k[a] * self.dilation[a]).wrapping_sub(self.pad[a].0);
                    if at >= xs.shape[a + 1] {
                        return;
                    }
                    base += at * x_strides[a + 1];
                }
                for i in 0..gi {
                    let w_row = &w[(tap * gi + i) * co..(tap * gi + i + 1) * co];
                    for g in 0..self.groups {
                        let v = x[base + g * gi + i];
                        for j in g * go..(g + 1) * go {
                            y[j] += v * w_row[j];
                        }
                    }
                }
            });
        });
        Tensor { ty: out.clone(), data: Data::Float(y) }
    }
}

/// `conv_transpose`: the adjoint of `conv`, channels last. Accumulates in f32 or better.
///
/// - `x`: `[b, s.., ci]`; `w`: `[k.., ci / groups, co]`. Result: `[b, o.., co]` with
///   `o = (s − 1) · stride + dilation · (k − 1) + 1 − lo − hi`: `pad` is cut off both ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ConvTranspose {
    /// Step per spatial axis.
    pub stride: Vec<usize>,
    /// Distance of taps per spatial axis.
    pub dilation: Vec<usize>,
    /// Elements cut off in front and behind per spatial axis.
    pub pad: Vec<(usize, usize)>,
    /// Number of channel groups.
    pub groups: usize,
}

impl OpDef for ConvTranspose {
    attributes_by_serde!("conv_transpose");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 2)?;
        let (x, w) = (args[0], args[1]);
        check_conv(x, w, &self.stride, &self.dilation, &self.pad, self.groups)?;
        let mut out = x.clone();
        for a in 0..self.stride.len() {
            let full = x.shape[a + 1]
                .checked_sub(1)
                .and_then(|s| s.checked_mul(self.stride[a]))
                .and_then(|s| s.checked_add(self.dilation[a].checked_mul(w.shape[a] - 1)?.checked_add(1)?));
            let cut = self.pad[a].0.saturating_add(self.pad[a].1);
            out.shape[a + 1] = full
                .and_then(|f| f.checked_sub(cut))
                .ok_or_else(|| format!("axis {} of {x} does not fit stride, kernel and cut", a + 1))?;
        }
        out.shape[x.rank() - 1] = w.shape[w.rank() - 1];
        Ok(out)
    }
    fn flops(&self, args: &[&TensorType], _: &TensorType) -> u64 {
        let per_row: usize = args[1].elements();
        let rows = args[0].elements() / args[0].shape[args[0].rank() - 1].max(1);
        2 * (rows as u64).saturating_mul(per_row as u64)
    }
}

impl Primitive for ConvTranspose {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let (x, w) = (args[0].floats(), args[1].floats());
        let (xs, ws) = (&args[0].ty, &args[1].ty);
        let n = self.stride.len();
        let (ci, co) = (xs.shape[n + 1], ws.shape[n + 1]);
        let (gi, go) = (ci / self.groups, co / self.groups);
        let y_strides = out.strides();
        let mut y = vec![0.0; out.elements()];
        each_index(&xs.shape[..n + 1], |row, index| {
            let x = &x[row * ci..(row + 1) * ci];
            each_index(&ws.shape[..n], |tap, k| {
                let mut base = index[0] * y_strides[0];
                for a in 0..n {
                    let at = (index[a + 1] * self.stride[a] + k[a] * self.dilation[a]).wrapping_sub(self.pad[a].0);
                    if at >= out.shape[a + 1] {
                        return;
                    }
                    base += at * y_strides[a + 1];
                }
                for i in 0..gi {
                    let w_row = &w[(tap * gi + i) * co..(tap * gi + i + 1) * co];
                    for g in 0..self.groups {
                        for j in g * go..(g + 1) * go {
                            y[base + j] += x[g * gi + i] * w_row[j];
                        }
                    }
                }
            });
        });
        Tensor { ty: out.clone(), data: Data::Float(y) }
    }
}
