//! `group_norm` in three launches: statistics of chunks of every group, statistics of the groups, and the norm itself.
//!
//! A chunk gives its mean and the sum of squares of differences from that; together they give those of the group without
//! subtracting large numbers from each other.

use cubecl::prelude::*;
use ltxc_ir::ops::GroupNorm;
use ltxc_ir::{DType, TensorType};

use super::call::{Call, bind_words, to_u32};
use super::program::{Tail, finished};
use super::rows::{Combine, combined, row_units};
use super::storage::{self, load};

/// Elements of a chunk, about.
const CHUNK: usize = 1 << 14;

/// Chunks of a group at most.
const MAX_CHUNKS: usize = 256;

/// Extents of a call: `[b, rows, groups, each]`, and how many chunks of how many rows a group has.
struct Plan {
    b: usize,
    rows: usize,
    groups: usize,
    each: usize,
    chunks: usize,
    chunk_rows: usize,
}

impl Plan {
    fn new(op: &GroupNorm, x: &TensorType) -> Plan {
        let channels = x.shape.last().copied().unwrap_or(1);
        let (b, each) = (x.shape[0], channels / op.groups);
        let rows = x.elements() / b.max(1) / channels.max(1);
        let chunk_rows = CHUNK.div_ceil(each.max(1)).max(rows.div_ceil(MAX_CHUNKS)).max(1);
        Plan { b, rows, groups: op.groups, each, chunks: rows.div_ceil(chunk_rows), chunk_rows }
    }

    /// Words of the statistics of chunks, which those of groups follow.
    fn chunk_words(&self) -> usize {
        2 * self.b * self.groups * self.chunks
    }

    fn words(&self) -> usize {
        self.chunk_words() + 2 * self.b * self.groups
    }
}

pub(crate) fn workspace_bytes(op: &GroupNorm, x: &TensorType) -> usize {
    4 * Plan::new(op, x).words()
}

pub(crate) fn launch<R: Runtime>(op: &GroupNorm, call: &Call<'_, R>) -> Result<(), String> {
    let (x, out) = (call.args[0].ty, call.out.ty);
    let plan = Plan::new(op, x);
    let scratch = || Ok::<_, String>(bind_words::<R>(call.scratch(plan.words())?, plan.words()));
    let units = row_units(call.client);
    let [rows, groups, each, chunks, chunk_rows] =
        [plan.rows, plan.groups, plan.each, plan.chunks, plan.chunk_rows].map(|n| n as u32);
    let group_offset = to_u32(plan.chunk_words())?;
    let dtypes = Dtypes { x: x.dtype, weight: call.args[1].ty.dtype, bias: call.args[2].ty.dtype, out: out.dtype };
    let (count, dim) = call.linear(storage::words(out.dtype, out.elements()))?;
    // SAFETY: extents were checked to fit 32 bits; the workspace holds the statistics; cubes and units beyond do nothing.
    unsafe {
        chunk_statistics::launch_unchecked::<R>(
            call.client,
            call.cubes(plan.b * plan.groups * plan.chunks)?,
            CubeDim::new_1d(units),
            call.arg(0),
            scratch()?,
            rows,
            groups,
            each,
            chunks,
            chunk_rows,
            to_u32(plan.b * plan.groups * plan.chunks)?,
            x.dtype,
            units,
        );
        group_statistics::launch_unchecked::<R>(
            call.client,
            call.cubes(plan.b * plan.groups)?,
            CubeDim::new_1d(units),
            scratch()?,
            rows,
            each,
            chunks,
            chunk_rows,
            to_u32(plan.b * plan.groups)?,
            group_offset,
            op.eps.0 as f32,
            units,
        );
        normalise::launch_unchecked::<R>(
            call.client,
            count,
            dim,
            call.arg(0),
            call.arg(1),
            call.arg(2),
            scratch()?,
            call.out(),
            call.tail()?,
            rows,
            groups,
            each,
            group_offset,
            to_u32(out.elements())?,
            dtypes,
        );
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Dtypes {
    x: DType,
    weight: DType,
    bias: DType,
    out: DType,
}

/// Mean and sum of squared differences of each chunk.
#[cube(launch_unchecked)]
fn chunk_statistics(
    x: &Array<u32>,
    statistics: &mut Array<u32>,
    rows: u32,
    groups: u32,
    each: u32,
    chunks: u32,
    chunk_rows: u32,
    n: u32,
    #[comptime] dtype: DType,
    #[comptime] units: u32,
) {
    let at = CUBE_POS as u32;
    let unit = UNIT_POS;
    let mut shared = SharedMemory::<f32>::new(comptime!(units as usize));
    if at < n {
        let chunk = at % chunks;
        let group = at / chunks;
        let first = chunk * chunk_rows;
        let left = rows - first;
        let elements = select(left < chunk_rows, left, chunk_rows) * each;
        let channels = groups * each;
        let base = ((group / groups) * rows + first) * channels + (group % groups) * each;
        let mut sum = 0f32.runtime();
        let mut i = unit;
        while i < elements {
            sum += load(x, base + (i / each) * channels + i % each, dtype);
            i += units;
        }
        let mean = combined(&mut shared, sum, units, Combine::Sum) / f32::cast_from(elements);
        let mut squares = 0f32.runtime();
        let mut i = unit;
        while i < elements {
            let value = load(x, base + (i / each) * channels + i % each, dtype) - mean;
            squares += value * value;
            i += units;
        }
        let total = combined(&mut shared, squares, units, Combine::Sum);
        if unit == 0u32 {
            statistics[(2u32 * at) as usize] = u32::reinterpret(mean);
            statistics[(2u32 * at + 1u32) as usize] = u32::reinterpret(total);
        }
    }
}

/// Mean and factor of each group, behind the statistics of the chunks.
#[cube(launch_unchecked)]
fn group_statistics(
    statistics: &mut Array<u32>,
    rows: u32,
    each: u32,
    chunks: u32,
    chunk_rows: u32,
    n: u32,
    group_offset: u32,
    eps: f32,
    #[comptime] units: u32,
) {
    let group = CUBE_POS as u32;
    let unit = UNIT_POS;
    let mut shared = SharedMemory::<f32>::new(comptime!(units as usize));
    if group < n {
        // Differences from the first mean, which is close to all others, keep their digits.
        let anchor = f32::reinterpret(statistics[(2u32 * group * chunks) as usize]);
        let mut sum = 0f32.runtime();
        let mut i = unit;
        while i < chunks {
            let mean = f32::reinterpret(statistics[(2u32 * (group * chunks + i)) as usize]);
            sum += (mean - anchor) * chunk_weight(i, rows, chunk_rows);
            i += units;
        }
        let shift = combined(&mut shared, sum, units, Combine::Sum) / f32::cast_from(rows);
        let mut squares = 0f32.runtime();
        let mut i = unit;
        while i < chunks {
            let mean = f32::reinterpret(statistics[(2u32 * (group * chunks + i)) as usize]);
            let own = f32::reinterpret(statistics[(2u32 * (group * chunks + i) + 1u32) as usize]);
            let difference = (mean - anchor) - shift;
            squares += own + difference * difference * (chunk_weight(i, rows, chunk_rows) * f32::cast_from(each));
            i += units;
        }
        let total = combined(&mut shared, squares, units, Combine::Sum);
        if unit == 0u32 {
            let elements = f32::cast_from(rows) * f32::cast_from(each);
            let factor = (total / elements + eps).inverse_sqrt();
            statistics[(group_offset + 2u32 * group) as usize] = u32::reinterpret(anchor + shift);
            statistics[(group_offset + 2u32 * group + 1u32) as usize] = u32::reinterpret(factor);
        }
    }
}

/// Rows of a chunk.
#[cube]
fn chunk_weight(chunk: u32, rows: u32, chunk_rows: u32) -> f32 {
    let left = rows - chunk * chunk_rows;
    f32::cast_from(select(left < chunk_rows, left, chunk_rows))
}

#[cube(launch_unchecked)]
fn normalise(
    x: &Array<u32>,
    weight: &Array<u32>,
    bias: &Array<u32>,
    statistics: &Array<u32>,
    out: &mut Array<u32>,
    tail: &Tail,
    rows: u32,
    groups: u32,
    each: u32,
    group_offset: u32,
    n: u32,
    #[comptime] dtypes: Dtypes,
) {
    let lanes = comptime!(storage::per_word(dtypes.out));
    let word = ABSOLUTE_POS as u32;
    if word * lanes < n {
        let channels = groups * each;
        let mut bits = 0u32;
        for lane in 0..lanes {
            let position = word * lanes + lane;
            if position < n {
                let row = position / channels;
                let channel = position - row * channels;
                let group = (row / rows) * groups + channel / each;
                let mean = f32::reinterpret(statistics[(group_offset + 2u32 * group) as usize]);
                let factor = f32::reinterpret(statistics[(group_offset + 2u32 * group + 1u32) as usize]);
                let value = (load(x, position, comptime!(dtypes.x)) - mean) * factor;
                let w = load(weight, channel, comptime!(dtypes.weight));
                let b = load(bias, channel, comptime!(dtypes.bias));
                bits |= finished(value * w + b, position, lane, tail);
            }
        }
        out[word as usize] = bits;
    }
}
