//! Rotary position tables of tokens, from their positions.
//!
//! # Easy to get wrong
//! - The axes alternate fastest: frequency 0 of time, height, width, then frequency 1 of each.
//! - What is missing to half the width is filled **in front** with cos 1, sin 0; only then the list is cut into heads, so
//!   each head has a different band of frequencies.
//! - Angles are f32 products of f32 numbers, even where the frequencies were computed in f64. They reach 16,000 rad, so
//!   another order of operations moves cos by 1e-3.
//!
//! Source: spec/transformer §5.

use ltxc_ir::ops::{ReduceKind, Unary};
use ltxc_ir::{Builder, DType, ValueId};

/// What a table is for.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable<'a> {
    /// Attention heads.
    pub heads: usize,
    /// Elements of all heads together; even, and at least twice the number of axes.
    pub width: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// Upper end of the positions, per axis.
    pub max_positions: &'a [f64],
    /// Whether frequencies are evaluated in f64 before they are rounded to f32.
    pub has_f64_frequencies: bool,
}

/// Cosines and sines, `[1, t, n, d/2]`, as the op `rope` takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Cosines.
    pub cos: ValueId,
    /// Sines.
    pub sin: ValueId,
}

/// Tables for tokens at the midpoints of `bounds`.
///
/// `bounds`: `[axes, t, 2]` f32, start and end of every token in the unit of [`RopeTable::max_positions`]. Result: f32
/// inside, rounded once to `dtype`.
pub fn rotation(b: &Builder, table: &RopeTable<'_>, bounds: ValueId, dtype: DType) -> Rotation {
    let midpoints = b.reduce(ReduceKind::Sum, bounds, &[2]);
    let shape = b.shape(bounds);
    let (axes, tokens) = (table.max_positions.len(), shape.get(1).copied().unwrap_or(0));
    let midpoints = b.reshape(b.mul_scalar(midpoints, 0.5), &[axes, tokens]);
    // u = p / max · 2 − 1, in this order.
    let limits: Vec<f32> = table.max_positions.iter().map(|&m| m as f32).collect();
    let fraction = b.div(midpoints, b.constant(&[axes, 1], &limits));
    let u = b.add_scalar(b.mul_scalar(fraction, 2.0), -1.0);

    let frequencies = frequencies(table);
    let n = frequencies.len();
    let u = b.reshape(b.transpose(u, &[1, 0]), &[tokens, 1, axes]);
    let angles = b.reshape(b.mul(b.constant(&[1, n, 1], &frequencies), u), &[tokens, n * axes]);

    let half = table.width / 2;
    let padding = half.saturating_sub(n * axes);
    let heads = table.heads.max(1);
    let finish = |values: ValueId, filler: f64| {
        let mut parts = vec![values];
        if padding > 0 {
            parts.insert(0, b.broadcast(b.scalar(filler), &[tokens, padding]));
        }
        b.cast(b.reshape(b.concat(&parts, 1), &[1, tokens, heads, half / heads]), dtype)
    };
    Rotation { cos: finish(b.unary(Unary::Cos, angles), 1.0), sin: finish(b.unary(Unary::Sin, angles), 0.0) }
}

/// `theta^(k / (K − 1)) · π/2` for `k < K`, where `K` is the number of frequencies per axis.
///
/// Source: `generate_freq_grid_np` (f64) and `generate_freq_grid_pytorch` (f32) of ltx_core/model/transformer/rope.py.
pub fn frequencies(table: &RopeTable<'_>) -> Vec<f32> {
    let n = table.width / (2 * table.max_positions.len().max(1));
    let steps = n.saturating_sub(1).max(1);
    (0..n)
        .map(|k| {
            if table.has_f64_frequencies {
                let exponent = k as f64 * (1.0 / steps as f64);
                return (table.theta.powf(exponent) * std::f64::consts::FRAC_PI_2) as f32;
            }
            // The f32 grid counts from both ends, with one rounding per element.
            let step = (1.0 / steps as f64) as f32 as f64;
            let exponent = if k < n / 2 || n == 1 { k as f64 * step } else { 1.0 - step * (n - 1 - k) as f64 };
            (table.theta.powf(exponent as f32 as f64) as f32 * std::f32::consts::PI) / 2.0
        })
        .collect()
}
