//! `reduce`: sums, means and extremes over axes.
//!
//! Long runs of adjacent elements are shared by the units of a cube; else a unit reduces an element of the result alone,
//! next to others that read next to it.

use cubecl::prelude::*;
use ltxc_ir::DType;
use ltxc_ir::ops::{Reduce, ReduceKind};

use super::call::{Call, to_u32};
use super::index::{Walk, coordinates, numbers, offset};
use super::rows::{Combine, combined, pair, row_units};
use super::storage::{self, encode, load, place};

/// Shortest run that a cube shares.
const SHARED_RUN: usize = 64;

/// What a kernel is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    kind: ReduceKind,
    combine: Combine,
    dtype: DType,
    /// Units of a cube that share a row; 1 if units work alone.
    units: u32,
}

pub(crate) fn launch<R: Runtime>(op: &Reduce, call: &Call<'_, R>) -> Result<(), String> {
    let (from, to) = (call.args[0].ty, call.out.ty);
    let strides = from.strides();
    let part = |is_reduced: bool| {
        let axes: Vec<usize> = (0..from.rank()).filter(|a| op.axes.contains(a) == is_reduced).collect();
        let shape: Vec<usize> = axes.iter().map(|&a| from.shape[a]).collect();
        Walk::new(&shape, &[axes.iter().map(|&a| strides[a]).collect()])
    };
    let (kept, reduced) = (part(false), part(true));
    let run = reduced.extents.iter().product::<usize>();
    let is_shared = run >= SHARED_RUN && reduced.strides[0].last() == Some(&1);
    let units = if is_shared { row_units(call.client) } else { 1 };
    let combine = match op.kind {
        ReduceKind::Sum | ReduceKind::Mean => Combine::Sum,
        ReduceKind::Max => Combine::Max,
        ReduceKind::Min => Combine::Min,
    };
    let blueprint = Blueprint { kind: op.kind, combine, dtype: to.dtype, units };
    let words = storage::words(to.dtype, to.elements());
    let (count, dim) = if is_shared { (call.cubes(words)?, CubeDim::new_1d(units)) } else { call.linear(words)? };
    let (n, run) = (to_u32(to.elements())?, to_u32(run)?);
    let extents = |walk: &Walk| numbers(walk.extents.iter().copied());
    let steps = |walk: &Walk| numbers(walk.strides[0].iter().copied());
    // SAFETY: units beyond the result do nothing; coordinates are inside the operand.
    unsafe {
        reduce::launch_unchecked::<R>(
            call.client,
            count,
            dim,
            call.arg(0),
            call.out(),
            extents(&kept)?,
            steps(&kept)?,
            extents(&reduced)?,
            steps(&reduced)?,
            n,
            run,
            blueprint,
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn reduce(
    from: &Array<u32>,
    to: &mut Array<u32>,
    kept: &Sequence<u32>,
    kept_strides: &Sequence<u32>,
    reduced: &Sequence<u32>,
    reduced_strides: &Sequence<u32>,
    n: u32,
    run: u32,
    #[comptime] blueprint: Blueprint,
) {
    let units = comptime!(blueprint.units);
    let dtype = comptime!(blueprint.dtype);
    let combine = comptime!(blueprint.combine);
    let lanes = comptime!(storage::per_word(dtype));
    let is_shared = comptime!(units > 1);
    let word = if is_shared { CUBE_POS as u32 } else { ABSOLUTE_POS as u32 };
    let unit = if is_shared { UNIT_POS } else { 0u32.runtime() };
    let mut shared = SharedMemory::<f32>::new(comptime!(units as usize));
    let mut bits = 0u32;
    for lane in 0..lanes {
        let position = word * lanes + lane;
        if position < n {
            let at = coordinates(position, kept);
            let base = offset(&at, kept_strides, 0usize);
            let mut sum = if comptime!(combine == Combine::Sum) { 0f32.runtime() } else { load(from, base, dtype) };
            let mut i = unit;
            while i < run {
                let at = coordinates(i, reduced);
                let value = load(from, base + offset(&at, reduced_strides, 0usize), dtype);
                sum = pair(sum, value, combine);
                i += units;
            }
            if is_shared {
                sum = combined(&mut shared, sum, units, combine);
            }
            if comptime!(blueprint.kind == ReduceKind::Mean) {
                sum /= f32::cast_from(run);
            }
            bits |= place(encode(sum, dtype), lane, comptime!(dtype.bytes() as u32));
        }
    }
    if word * lanes < n && unit == 0u32 {
        to[word as usize] = bits;
    }
}
