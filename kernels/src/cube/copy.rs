//! `copy`: a strided box from one tensor to a part of another.
//!
//! A word of the result is written by one unit. Where the box covers words as wholes, units count words of the box; else
//! they count words of the result from the first to the last that the box touches, look for each element whether the box
//! has it, and keep what it does not have.

use cubecl::prelude::*;
use ltxc_ir::plan::Copy;

use super::call::{Call, to_u32};
use super::index::{Walk, coordinates, numbers, offset};
use super::storage::{extract, load_bits, place};

pub(crate) fn launch<R: Runtime>(op: &Copy, call: &Call<'_, R>) -> Result<(), String> {
    let n: usize = op.shape.iter().product();
    if n == 0 {
        return Ok(());
    }
    let bytes = call.out.ty.dtype.bytes();
    let lanes = 4 / bytes;
    let walk = Walk::new(&op.shape, &[op.src_strides.clone(), op.dst_strides.clone()]);
    let covers_words = op.dst_offset.is_multiple_of(lanes)
        && (lanes == 1 || walk.extents.last().is_some_and(|extent| extent.is_multiple_of(lanes)))
        && match walk.strides[1].split_last() {
            Some((&last, outer)) => {
                lanes == 1 || (last == 1 && outer.iter().all(|stride| stride.is_multiple_of(lanes)))
            }
            None => lanes == 1,
        };
    let (src, dst) = (to_u32(op.src_offset)?, to_u32(op.dst_offset)?);
    if covers_words {
        let (count, dim) = call.linear(n / lanes)?;
        let (extents, strides) = arguments(&walk)?;
        // SAFETY: the type rule keeps the box inside both tensors; units beyond it do nothing.
        unsafe {
            copy_words::launch_unchecked::<R>(
                call.client,
                count,
                dim,
                call.arg(0),
                call.out(),
                extents,
                strides,
                src,
                dst,
                to_u32(n)?,
                bytes as u32,
            );
        }
    } else {
        // The type rule of the copy lets axes step over what smaller ones reach.
        let walk = walk.by_stride(1);
        let reach = walk.extents.iter().zip(&walk.strides[1]).fold(1, |n, (extent, stride)| n + (extent - 1) * stride);
        let (first, end) = (op.dst_offset / lanes, (op.dst_offset + reach).div_ceil(lanes));
        let (count, dim) = call.linear(end - first)?;
        let (extents, strides) = arguments(&walk)?;
        let (first, n) = (to_u32(first)?, to_u32(end - first)?);
        // SAFETY: as above.
        unsafe {
            copy_elements::launch_unchecked::<R>(
                call.client,
                count,
                dim,
                call.arg(0),
                call.out(),
                extents,
                strides,
                src,
                dst,
                first,
                n,
                bytes as u32,
            );
        }
    }
    Ok(())
}

#[allow(clippy::type_complexity)] // two lists of the same kind
fn arguments<R: Runtime>(walk: &Walk) -> Result<(SequenceArg<R, u32>, SequenceArg<R, u32>), String> {
    let strides = walk.strides.iter().flatten().copied();
    Ok((numbers(walk.extents.iter().copied())?, numbers(strides)?))
}

#[cube(launch_unchecked)]
fn copy_words(
    from: &Array<u32>,
    to: &mut Array<u32>,
    extents: &Sequence<u32>,
    strides: &Sequence<u32>,
    src_offset: u32,
    dst_offset: u32,
    n: u32,
    #[comptime] bytes: u32,
) {
    let lanes = comptime!(4 / bytes);
    let rank = extents.len();
    let first = ABSOLUTE_POS as u32 * lanes;
    if first < n {
        let at = coordinates(first, extents);
        let dst = dst_offset + offset(&at, strides, rank);
        let mut word = 0u32;
        for lane in 0..lanes {
            let at = coordinates(first + lane, extents);
            let src = src_offset + offset(&at, strides, 0usize);
            word |= place(load_bits(from, src, bytes), lane, bytes);
        }
        to[(dst / lanes) as usize] = word;
    }
}

#[cube(launch_unchecked)]
fn copy_elements(
    from: &Array<u32>,
    to: &mut Array<u32>,
    extents: &Sequence<u32>,
    strides: &Sequence<u32>,
    src_offset: u32,
    dst_offset: u32,
    first: u32,
    n: u32,
    #[comptime] bytes: u32,
) {
    let lanes = comptime!(4 / bytes);
    let rank = extents.len();
    let unit = ABSOLUTE_POS as u32;
    if unit < n {
        let at = first + unit;
        let before = to[at as usize];
        let mut word = 0u32;
        for lane in 0..lanes {
            let element = at * lanes + lane;
            let mut is_inside = element >= dst_offset;
            let mut rest = select(is_inside, element - dst_offset, 0u32);
            let mut src = src_offset;
            #[unroll]
            for a in 0..rank {
                let stride = *strides.index(comptime!(rank + a));
                let index = rest / stride;
                rest -= index * stride;
                is_inside = is_inside && index < *extents.index(a);
                src += index * *strides.index(a);
            }
            is_inside = is_inside && rest == 0u32;
            let mut bits = extract(before, lane, bytes);
            if is_inside {
                bits = load_bits(from, src, bytes);
            }
            word |= place(bits, lane, bytes);
        }
        to[at as usize] = word;
    }
}
