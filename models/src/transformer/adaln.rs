//! Timestep embeddings and the modulation they drive.
//!
//! Timesteps take few distinct values, so everything here works on a table of `r` rows, one per distinct timestep. Only
//! where a row meets tokens it is gathered, one row per token; with a single row it is broadcast instead.
//!
//! # Easy to get wrong
//! - The sinusoid has cosines first, and its exponent is divided by 128, not 127.
//! - The output layer uses the embedding itself, blocks use its projection.
//! - Modulation is `norm(x) · (1 + scale) + shift`; which row is the shift differs between tables (see `block`).
//!
//! Source: spec/transformer §4.3, §7.1.

use ltxc_ir::ops::Unary;
use ltxc_ir::{Builder, DType, ValueId};

use super::linear;
use crate::Weights;

/// Elements of the sinusoid; fixed in the reference (`PixArtAlphaCombinedTimestepSizeEmbeddings`).
const SINUSOID: usize = 256;

/// Period of the slowest element of the sinusoid, in its argument.
const MAX_PERIOD: f64 = 10000.0;

/// Result of one AdaLN module for `r` timesteps.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimestepEmbedding {
    /// `[r, width]`: the embedding.
    pub embedded: ValueId,
    /// `[r, rows · width]`: its projection, row `k` at `k · width`.
    pub modulation: ValueId,
}

/// `[rows, r, width]` from `[r, rows · width]`. Row `k` of all timesteps lies together there, so that blocks read it where
/// it is.
pub(super) fn by_row(b: &Builder, modulation: ValueId, width: usize) -> ValueId {
    let (r, channels) = match *b.shape(modulation) {
        [r, channels] => (r, channels),
        _ => (0, 0),
    };
    b.transpose(b.reshape(modulation, &[r, channels / width.max(1), width]), &[1, 0, 2])
}

/// Evaluates the AdaLN module at `weights` for `argument` (`[r]` f32, timesteps already scaled).
pub(super) fn timestep_embedding(
    b: &Builder,
    weights: &Weights<'_>,
    argument: ValueId,
    width: usize,
    rows: usize,
    dtype: DType,
) -> TimestepEmbedding {
    let embedder = weights.below("emb.timestep_embedder.");
    let s = b.cast(sinusoid(b, argument), dtype);
    let hidden = b.silu(linear(b, &embedder, "linear_1", s, SINUSOID, width, true));
    let embedded = linear(b, &embedder, "linear_2", hidden, width, width, true);
    let modulation = linear(b, weights, "linear", b.silu(embedded), width, rows * width, true);
    TimestepEmbedding { embedded, modulation }
}

/// `[cos(t f_0) … cos(t f_127), sin(t f_0) … sin(t f_127)]`, `f_i = exp(−ln(10000) · i / 128)`, all in f32.
///
/// `argument`: `[r]` f32; result `[r, 256]` f32.
fn sinusoid(b: &Builder, argument: ValueId) -> ValueId {
    let half = SINUSOID / 2;
    let log_period = (-MAX_PERIOD.ln()) as f32;
    let frequencies: Vec<f32> =
        (0..half).map(|i| (((log_period * i as f32) / half as f32) as f64).exp() as f32).collect();
    let rows = b.shape(argument).first().copied().unwrap_or(0);
    let angles = b.mul(b.reshape(argument, &[rows, 1]), b.constant(&[1, half], &frequencies));
    b.concat(&[b.unary(Unary::Cos, angles), b.unary(Unary::Sin, angles)], 1)
}

/// A learned table together with what timesteps add to its rows.
#[derive(Clone, Copy)]
pub(super) struct Modulation<'a> {
    /// Where ops are written.
    pub b: &'a Builder,
    /// `[rows, width]`: the learned table, in the dtype it is stored in.
    pub table: ValueId,
    /// `[rows, r, width]`: what timesteps add, `None` for nothing; `[1, r, width]` if all rows get the same.
    pub timesteps: Option<ValueId>,
    /// `i32[t]`: row of `timesteps` for every token, if there is more than one.
    pub token_rows: Option<ValueId>,
    /// Dtype of the activations.
    pub dtype: DType,
}

impl Modulation<'_> {
    /// Row `row` for every token: `[t, width]`, or `[1, width]` if all are the same.
    pub fn row(&self, row: usize) -> ValueId {
        self.per_token(self.sum(row))
    }

    /// `x · (1 + row(scale)) + row(shift)`.
    pub fn apply(&self, x: ValueId, shift: usize, scale: usize) -> ValueId {
        let b = self.b;
        let factor = self.per_token(b.add_scalar(self.sum(scale), 1.0));
        b.add(b.mul(x, factor), self.row(shift))
    }

    /// `[r, width]`
    fn sum(&self, row: usize) -> ValueId {
        let b = self.b;
        let learned = b.slice_axis(self.table, 0, row, row + 1);
        let Some(timesteps) = self.timesteps else { return b.cast(learned, self.dtype) };
        // Tables are stored wider than the activations and rounded at use; a narrower one needs no cast to be added.
        let is_wider = b.ty(learned).dtype.bytes() > self.dtype.bytes();
        let learned = if is_wider { b.cast(learned, self.dtype) } else { learned };
        let (rows, r, width) = match *b.shape(timesteps) {
            [rows, r, width] => (rows, r, width),
            _ => (0, 0, 0),
        };
        let row = if rows == 1 { 0 } else { row };
        b.add(b.reshape(b.slice_axis(timesteps, 0, row, row + 1), &[r, width]), learned)
    }

    fn per_token(&self, rows: ValueId) -> ValueId {
        match self.token_rows {
            Some(indices) => self.b.gather(rows, indices, 0),
            None => rows,
        }
    }
}
