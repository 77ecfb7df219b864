//! `pad`, `gather` and `update`: elements from places that the shapes or an operand say. A unit makes one word.

use cubecl::prelude::*;
use ltxc_ir::ops::{Gather, Pad, PadMode, Update};

use super::call::{Call, to_u32};
use super::index::{coordinates, numbers};
use super::patches::source_index;
use super::storage::{load_bits, place, words};

/// Cubes for the words of the result, and its elements.
fn cover<R: Runtime>(call: &Call<'_, R>) -> Result<(CubeCount, CubeDim, u32), String> {
    let ty = call.out.ty;
    let (count, dim) = call.linear(words(ty.dtype, ty.elements()))?;
    Ok((count, dim, to_u32(ty.elements())?))
}

pub(crate) fn launch_pad<R: Runtime>(op: &Pad, call: &Call<'_, R>) -> Result<(), String> {
    let to = &call.out.ty.shape;
    let axes = merged_axes(&call.args[0].ty.shape, &op.lo, to);
    if axes.iter().any(|axis| axis[2] > MOST_OF_AXIS) {
        return Err(format!("padding to {to:?} is more than kernels count"));
    }
    let column = |i: usize| numbers(axes.iter().map(move |axis| axis[i]));
    let (count, dim, n) = cover(call)?;
    // SAFETY: units beyond the result do nothing; the type rule keeps indices inside the operand.
    unsafe {
        pad::launch_unchecked::<R>(
            call.client,
            count,
            dim,
            call.arg(0),
            call.out(),
            column(0)?,
            column(1)?,
            column(2)?,
            n,
            op.mode,
            call.out.ty.dtype.bytes() as u32,
        );
    }
    Ok(())
}

/// Longest axis of a padded tensor: indices are signed, because they begin in front of the operand.
const MOST_OF_AXIS: usize = i32::MAX as usize / 2;

/// Extent in the operand, elements in front, and extent in the result of each axis; axes that stay as they are move
/// together, as far as indices reach.
fn merged_axes(from: &[usize], lo: &[usize], to: &[usize]) -> Vec<[usize; 3]> {
    let mut axes: Vec<[usize; 3]> = Vec::new();
    for a in 0..to.len() {
        let stays = from[a] == to[a];
        match axes.last_mut() {
            Some([outer, 0, own]) if stays && outer == own && own.saturating_mul(to[a]) <= MOST_OF_AXIS => {
                (*outer, *own) = (*outer * to[a], *own * to[a]);
            }
            _ => axes.push([from[a], lo[a], to[a]]),
        }
    }
    axes
}

#[cube(launch_unchecked)]
fn pad(
    from: &Array<u32>,
    to: &mut Array<u32>,
    sources: &Sequence<u32>,
    lows: &Sequence<u32>,
    extents: &Sequence<u32>,
    n: u32,
    #[comptime] mode: PadMode,
    #[comptime] bytes: u32,
) {
    let lanes = comptime!(4 / bytes);
    let rank = extents.len();
    let unit = ABSOLUTE_POS as u32;
    if unit * lanes < n {
        let mut word = 0u32;
        for lane in 0..lanes {
            let position = unit * lanes + lane;
            if position < n {
                let at = coordinates(position, extents);
                let mut is_zero = false;
                let mut element = 0u32;
                #[unroll]
                for a in 0..rank {
                    let extent = i32::cast_from(*sources.index(a));
                    let index = i32::cast_from(*at.index(a)) - i32::cast_from(*lows.index(a));
                    let is_outside = index < 0i32 || index >= extent;
                    let source = source_index(index, extent, mode);
                    if comptime!(mode == PadMode::Zeros) {
                        is_zero = is_zero || is_outside;
                    }
                    element = element * *sources.index(a) + u32::cast_from(source);
                }
                if !is_zero {
                    word |= place(load_bits(from, element, bytes), lane, bytes);
                }
            }
        }
        to[unit as usize] = word;
    }
}

pub(crate) fn launch_gather<R: Runtime>(op: &Gather, call: &Call<'_, R>) -> Result<(), String> {
    let shape = &call.args[0].ty.shape;
    let inner = to_u32(shape[op.axis + 1..].iter().product())?;
    let (extent, chosen) = (to_u32(shape[op.axis])?, to_u32(call.out.ty.shape[op.axis])?);
    let bytes = call.out.ty.dtype.bytes() as u32;
    let (count, dim, n) = cover(call)?;
    // SAFETY: units beyond the result do nothing; indices are clamped.
    unsafe {
        gather::launch_unchecked::<R>(
            call.client,
            count,
            dim,
            call.arg(0),
            call.arg(1),
            call.out(),
            extent,
            chosen,
            inner,
            n,
            bytes,
        );
    }
    Ok(())
}

/// A row number in `0..=last`.
#[cube]
fn clamped_row(memory: &Array<u32>, index: u32, last: u32) -> u32 {
    let row = i32::reinterpret(memory[index as usize]);
    let raised = select(row < 0i32, 0u32, u32::reinterpret(row));
    select(raised > last, last, raised)
}

#[cube(launch_unchecked)]
fn gather(
    from: &Array<u32>,
    rows: &Array<u32>,
    to: &mut Array<u32>,
    extent: u32,
    chosen: u32,
    inner: u32,
    n: u32,
    #[comptime] bytes: u32,
) {
    let lanes = comptime!(4 / bytes);
    let unit = ABSOLUTE_POS as u32;
    if unit * lanes < n {
        let mut word = 0u32;
        for lane in 0..lanes {
            let position = unit * lanes + lane;
            if position < n {
                let row = position / inner;
                let index = clamped_row(rows, row % chosen, extent - 1u32);
                let element = ((row / chosen) * extent + index) * inner + position % inner;
                word |= place(load_bits(from, element, bytes), lane, bytes);
            }
        }
        to[unit as usize] = word;
    }
}

pub(crate) fn launch_update<R: Runtime>(op: &Update, call: &Call<'_, R>) -> Result<(), String> {
    let ty = call.out.ty;
    let inner = to_u32(ty.shape[op.axis + 1..].iter().product())?;
    let (room, rows) = (to_u32(ty.shape[op.axis])?, to_u32(call.args[1].ty.shape[op.axis])?);
    let (count, dim, n) = cover(call)?;
    let bytes = ty.dtype.bytes() as u32;
    // SAFETY: units beyond the result do nothing; the row is clamped.
    unsafe {
        update::launch_unchecked::<R>(
            call.client,
            count,
            dim,
            call.arg(0),
            call.arg(1),
            call.arg(2),
            call.out(),
            room,
            rows,
            inner,
            n,
            bytes,
        );
    }
    Ok(())
}

/// The result may lie on `base`.
#[cube(launch_unchecked)]
fn update(
    base: &mut Array<u32>,
    part: &Array<u32>,
    row: &Array<u32>,
    to: &mut Array<u32>,
    room: u32,
    rows: u32,
    inner: u32,
    n: u32,
    #[comptime] bytes: u32,
) {
    let lanes = comptime!(4 / bytes);
    let unit = ABSOLUTE_POS as u32;
    if unit * lanes < n {
        let start = clamped_row(row, 0u32, room - rows);
        let mut word = 0u32;
        for lane in 0..lanes {
            let position = unit * lanes + lane;
            if position < n {
                let line = position / inner;
                let own = line % room;
                let mut bits = load_bits(base, position, bytes);
                if own >= start && own - start < rows {
                    let element = ((line / room) * rows + (own - start)) * inner + position % inner;
                    bits = load_bits(part, element, bytes);
                }
                word |= place(bits, lane, bytes);
            }
        }
        to[unit as usize] = word;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_that_stay_merge_as_far_as_signed_indices_reach() {
        assert_eq!(merged_axes(&[3, 5, 7, 2], &[0, 1, 0, 0], &[3, 8, 7, 2]), [[3, 0, 3], [5, 1, 8], [14, 0, 14]]);
        // An axis that grows at its end only is not merged either.
        assert_eq!(merged_axes(&[3, 5, 7], &[0, 0, 0], &[3, 8, 7]), [[3, 0, 3], [5, 0, 8], [7, 0, 7]]);
        // 2^31 elements of a frame.
        let [rows, columns] = [1 << 15, 1 << 16];
        assert_eq!(
            merged_axes(&[1, rows, columns], &[1, 0, 0], &[2, rows, columns]),
            [[1, 1, 2], [rows, 0, rows], [columns, 0, columns]]
        );
    }
}
