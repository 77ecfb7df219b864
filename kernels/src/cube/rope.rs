//! `rope`: rotations of pairs. A unit owns whole words at both ends of its pairs, so that it may overwrite the operand.

use cubecl::prelude::*;
use ltxc_ir::ops::{Rope, RopeLayout};
use ltxc_ir::{DType, TensorType};

use super::call::{Call, to_u32};
use super::index::{Walk, broadcast_strides, coordinates, numbers, offset};
use super::storage::{self, encode, load, place};

/// What a kernel is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    layout: RopeLayout,
    x: DType,
    cos: DType,
    sin: DType,
    out: DType,
}

/// Whether words of the result hold whole pairs, or corresponding halves of them.
pub(crate) fn is_whole(op: &Rope, out: &TensorType) -> bool {
    let lanes = storage::per_word(out.dtype) as usize;
    match op.layout {
        RopeLayout::Split => (out.shape[3] / 2).is_multiple_of(lanes),
        RopeLayout::Interleaved => out.shape[3].is_multiple_of(lanes),
    }
}

/// Pairs of a unit.
fn pairs_of(layout: RopeLayout, lanes: u32) -> u32 {
    match layout {
        RopeLayout::Split => lanes,
        RopeLayout::Interleaved => (lanes / 2).max(1),
    }
}

pub(crate) fn launch<R: Runtime>(op: &Rope, call: &Call<'_, R>) -> Result<(), String> {
    let types: Vec<&TensorType> = call.args.iter().map(|a| a.ty).collect();
    let x = types[0];
    let half = [x.shape[0], x.shape[1], x.shape[2], x.shape[3] / 2];
    let walk = Walk::new(&half, &[1, 2].map(|i| broadcast_strides(&types[i].shape, &half)));
    let pairs: usize = half.iter().product();
    let blueprint =
        Blueprint { layout: op.layout, x: x.dtype, cos: types[1].dtype, sin: types[2].dtype, out: call.out.ty.dtype };
    let each = pairs_of(op.layout, storage::per_word(call.out.ty.dtype));
    let (count, dim) = call.linear(pairs.div_ceil(each as usize))?;
    // SAFETY: units beyond the pairs do nothing; tables broadcast to them.
    unsafe {
        rope::launch_unchecked::<R>(
            call.client,
            count,
            dim,
            call.arg(0),
            call.arg(1),
            call.arg(2),
            call.out(),
            numbers(walk.extents.iter().copied())?,
            numbers(walk.strides.iter().flatten().copied())?,
            to_u32(half[3])?,
            to_u32(pairs)?,
            blueprint,
        );
    }
    Ok(())
}

/// The result may lie on `x`.
#[cube(launch_unchecked)]
fn rope(
    x: &mut Array<u32>,
    cos: &Array<u32>,
    sin: &Array<u32>,
    out: &mut Array<u32>,
    extents: &Sequence<u32>,
    strides: &Sequence<u32>,
    half: u32,
    pairs: u32,
    #[comptime] blueprint: Blueprint,
) {
    let lanes = comptime!(storage::per_word(blueprint.out));
    let each = comptime!(pairs_of(blueprint.layout, lanes));
    let bytes = comptime!(4 / lanes);
    let is_split = comptime!(blueprint.layout == RopeLayout::Split);
    let rank = extents.len();
    let start = ABSOLUTE_POS as u32 * each;
    if start < pairs {
        let row = start / half;
        let column = start - row * half;
        // The first elements of the first pair.
        let first = if is_split { row * (2u32 * half) + column } else { 2u32 * start };
        let second = if is_split { first + half } else { first + 1u32 };
        let mut low = 0u32;
        let mut high = 0u32;
        for i in 0..each {
            let at = coordinates(start + i, extents);
            let c = load(cos, offset(&at, strides, 0usize), comptime!(blueprint.cos));
            let s = load(sin, offset(&at, strides, rank), comptime!(blueprint.sin));
            let step = if is_split { i } else { 2u32 * i };
            let a = load(x, first + step, comptime!(blueprint.x));
            let b = load(x, second + step, comptime!(blueprint.x));
            let rotated_a = encode(a * c - b * s, comptime!(blueprint.out));
            let rotated_b = encode(b * c + a * s, comptime!(blueprint.out));
            if is_split {
                low |= place(rotated_a, i, bytes);
                high |= place(rotated_b, i, bytes);
            } else if comptime!(lanes == 1) {
                low = rotated_a;
                high = rotated_b;
            } else {
                low |= place(rotated_a, 2u32 * i, bytes) | place(rotated_b, 2u32 * i + 1u32, bytes);
            }
        }
        out[(first / lanes) as usize] = low;
        if comptime!(is_split || lanes == 1) {
            out[(second / lanes) as usize] = high;
        }
    }
}
