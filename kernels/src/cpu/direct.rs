//! Convolutions and attention, straight from their definition.

use ltxc_ir::TensorType;
use ltxc_ir::ops::{Attention, Conv, ConvTranspose};

use super::element::{load, store};
use super::parallel::{Shared, for_each};
use super::{Arg, Output};

unsafe fn widened(arg: &Arg<'_>) -> Vec<f32> {
    let mut out = vec![0.0; arg.ty.elements()];
    unsafe { load(arg.ty.dtype, arg.ptr, &mut out) };
    out
}

fn unravel(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for a in (0..shape.len()).rev() {
        index[a] = i % shape[a];
        i /= shape[a];
    }
    index
}

fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Rows `[positions, co]`: `visit(position index, tap)` gives the flat row of `x` that a tap of the kernel meets.
unsafe fn rows(
    args: &[Arg<'_>],
    out: &Output<'_>,
    groups: usize,
    visit: impl Fn(&[usize], &[usize]) -> Option<usize> + Sync,
) {
    let (x, w) = unsafe { (widened(&args[0]), widened(&args[1])) };
    let n = args[0].ty.rank() - 2;
    let (ci, co) = (args[0].ty.shape[n + 1], args[1].ty.shape[n + 1]);
    let (gi, go) = (ci / groups, co / groups);
    let taps: usize = args[1].ty.shape[..n].iter().product();
    let positions = &out.ty.shape[..n + 1];
    let count: usize = positions.iter().product();
    let dst = Shared::new(out.ptr);
    for_each(count, count * taps * gi * co, |p| {
        let index = unravel(p, positions);
        let mut y = vec![0.0f32; co];
        for t in 0..taps {
            let Some(row) = visit(&index, &unravel(t, &args[1].ty.shape[..n])) else { continue };
            for i in 0..gi {
                let w_row = &w[(t * gi + i) * co..][..co];
                for g in 0..groups {
                    let v = x[row * ci + g * gi + i];
                    axpy(&mut y[g * go..(g + 1) * go], v, &w_row[g * go..(g + 1) * go]);
                }
            }
        }
        unsafe { store(out.ty.dtype, &y, dst.get().add(p * co * out.ty.dtype.bytes())) };
    });
}

fn flat(index: &[usize], shape: &[usize]) -> usize {
    index.iter().zip(shape).fold(0, |n, (&i, &d)| n * d + i)
}

pub(crate) unsafe fn conv(op: &Conv, args: &[Arg<'_>], out: &Output<'_>) {
    let shape: &TensorType = args[0].ty;
    unsafe {
        rows(args, out, op.groups, |index, k| {
            let mut at = vec![index[0]];
            for a in 0..k.len() {
                let i = (index[a + 1] * op.stride[a] + k[a] * op.dilation[a]).checked_sub(op.pad[a].0)?;
                (i < shape.shape[a + 1]).then_some(())?;
                at.push(i);
            }
            Some(flat(&at, &shape.shape[..k.len() + 1]))
        })
    }
}

pub(crate) unsafe fn conv_transpose(op: &ConvTranspose, args: &[Arg<'_>], out: &Output<'_>) {
    let shape: &TensorType = args[0].ty;
    unsafe {
        rows(args, out, op.groups, |index, k| {
            let mut at = vec![index[0]];
            for a in 0..k.len() {
                let i = (index[a + 1] + op.pad[a].0).checked_sub(k[a] * op.dilation[a])?;
                let (i, rest) = (i / op.stride[a], i % op.stride[a]);
                (rest == 0 && i < shape.shape[a + 1]).then_some(())?;
                at.push(i);
            }
            Some(flat(&at, &shape.shape[..k.len() + 1]))
        })
    }
}

pub(crate) unsafe fn attention(op: &Attention, args: &[Arg<'_>], out: &Output<'_>) {
    let (q, k, v) = unsafe { (widened(&args[0]), widened(&args[1]), widened(&args[2])) };
    let bias = args.get(3).map(|b| (unsafe { widened(b) }, b.ty));
    let [b, t, n, d] = [0, 1, 2, 3].map(|a| args[0].ty.shape[a]);
    let (s, m, e) = (args[1].ty.shape[1], args[1].ty.shape[2], args[2].ty.shape[3]);
    let dst = Shared::new(out.ptr);
    for_each(b * t * n, b * t * n * s * (d + e), |i| {
        let (batch, row, head) = (i / (t * n), i / n % t, i % n);
        let kv = head / (n / m);
        let q = &q[i * d..(i + 1) * d];
        let visible = if op.causal { row + s - t + 1 } else { s };
        let mut scores: Vec<f32> = (0..visible)
            .map(|j| {
                let k = &k[((batch * s + j) * m + kv) * d..][..d];
                let mut score = q.iter().zip(k).map(|(a, b)| a * b).sum::<f32>() * op.scale.0 as f32;
                if let Some((values, ty)) = &bias {
                    let pick = |a: usize, i: usize| if ty.shape[a] == 1 { 0 } else { i };
                    score += values[flat(&[pick(0, batch), pick(1, head), pick(2, row), pick(3, j)], &ty.shape)];
                }
                score
            })
            .collect();
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|x| *x = (*x - most).exp());
        let sum: f32 = scores.iter().sum();
        let mut y = vec![0.0f32; e];
        for (j, p) in scores.iter().enumerate() {
            axpy(&mut y, p / sum, &v[((batch * s + j) * m + kv) * e..][..e]);
        }
        unsafe { store(out.ty.dtype, &y, dst.get().add(i * e * out.ty.dtype.bytes())) };
    });
}
