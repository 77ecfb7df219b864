//! `pad`, `gather` and `update`: runs of bytes to places that the shapes or an operand say.

use ltxc_ir::DType;
use ltxc_ir::ops::{Gather, Pad, Update};
use ltxc_ir::types::MAX_RANK;

use super::parallel::{Shared, for_each};
use super::{Arg, Output};

/// Bytes that a task moves, about.
const TASK_BYTES: usize = 1 << 16;

/// Bytes that count as one element operation for [`for_each`].
const BYTES_PER_WORK: usize = 4;

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch_pad(op: &Pad, args: &[Arg<'_>], out: &Output<'_>) {
    let (from, to) = (&args[0].ty.shape, &out.ty.shape);
    let rank = to.len();
    // The last axis that grows; everything behind it moves together, and rows along it are filled as a whole.
    let Some(axis) = (0..rank).rev().find(|&a| from[a] != to[a]) else {
        // SAFETY: both have the same type, and do not overlap.
        return unsafe { std::ptr::copy_nonoverlapping(args[0].ptr, out.ptr, out.ty.bytes()) };
    };
    let unit = to[axis + 1..].iter().product::<usize>() * out.ty.dtype.bytes();
    let (row_bytes, src_row_bytes) = (to[axis] * unit, from[axis] * unit);
    let rows: usize = to[..axis].iter().product();
    let (src, dst) = (Shared::new(args[0].ptr.cast_mut()), Shared::new(out.ptr));
    let per_task = (TASK_BYTES / row_bytes).max(1);
    for_each(rows.div_ceil(per_task), out.ty.bytes() / BYTES_PER_WORK, |task| {
        for row in task * per_task..rows.min((task + 1) * per_task) {
            let source = source_row(op, &from[..axis], &to[..axis], row);
            // SAFETY: source indices are inside the operand, and this task owns the row of the result.
            unsafe {
                let d = dst.get().add(row * row_bytes);
                let Some(source) = source else {
                    d.write_bytes(0, row_bytes);
                    continue;
                };
                let s = src.get().cast_const().add(source * src_row_bytes);
                let (lo, n) = (op.lo[axis], from[axis]);
                d.add(lo * unit).copy_from_nonoverlapping(s, src_row_bytes);
                for i in (0..lo).chain(lo + n..to[axis]) {
                    match op.source_index(i, lo, n) {
                        Some(k) => d.add(i * unit).copy_from_nonoverlapping(s.add(k * unit), unit),
                        None => d.add(i * unit).write_bytes(0, unit),
                    }
                }
            }
        }
    });
}

/// The row of the operand that row `row` of the result is made of, `None` where it is zeros.
fn source_row(op: &Pad, from: &[usize], to: &[usize], mut row: usize) -> Option<usize> {
    let mut index = [0; MAX_RANK];
    for (i, &extent) in index.iter_mut().zip(to).rev() {
        (*i, row) = (row % extent, row / extent);
    }
    let mut source = 0;
    for (a, &n) in from.iter().enumerate() {
        source = source * n + op.source_index(index[a], op.lo[a], n)?;
    }
    Some(source)
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch_gather(op: &Gather, args: &[Arg<'_>], out: &Output<'_>) {
    let shape = &args[0].ty.shape;
    let (extent, chosen) = (shape[op.axis], out.ty.shape[op.axis]);
    let unit = shape[op.axis + 1..].iter().product::<usize>() * out.ty.dtype.bytes();
    let rows: usize = out.ty.shape[..=op.axis].iter().product();
    debug_assert_eq!(args[1].ty.dtype, DType::I32, "type rule");
    // SAFETY: the type rule says `i32[chosen]`.
    let indices = unsafe { std::slice::from_raw_parts(args[1].ptr.cast::<i32>(), chosen) };
    let (src, dst) = (Shared::new(args[0].ptr.cast_mut()), Shared::new(out.ptr));
    let per_task = (TASK_BYTES / unit).max(1);
    for_each(rows.div_ceil(per_task), out.ty.bytes() / BYTES_PER_WORK, |task| {
        for row in task * per_task..rows.min((task + 1) * per_task) {
            // Out of range is the nearest row.
            let index = usize::try_from(indices[row % chosen]).unwrap_or(0).min(extent - 1);
            let from = (row / chosen * extent + index) * unit;
            // SAFETY: the row is inside the operand, and this task owns the row of the result.
            unsafe { dst.get().add(row * unit).copy_from_nonoverlapping(src.get().add(from), unit) };
        }
    });
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch_update(op: &Update, args: &[Arg<'_>], out: &Output<'_>) {
    let (base, part) = (&args[0], &args[1]);
    let (room, rows) = (out.ty.shape[op.axis], part.ty.shape[op.axis]);
    let unit = out.ty.shape[op.axis + 1..].iter().product::<usize>() * out.ty.dtype.bytes();
    let blocks: usize = out.ty.shape[..op.axis].iter().product();
    // SAFETY: the type rule says `i32[]`.
    let row = unsafe { args[2].ptr.cast::<i32>().read() };
    let row = usize::try_from(row).unwrap_or(0).min(room - rows);
    let (old, new, dst) = (Shared::new(base.ptr.cast_mut()), Shared::new(part.ptr.cast_mut()), Shared::new(out.ptr));
    let in_place = base.ptr == out.ptr.cast_const();
    let (block, start, len) = (room * unit, row * unit, rows * unit);
    let moved = if in_place { len } else { block };
    for_each(blocks, blocks * moved / BYTES_PER_WORK, |i| {
        // SAFETY: each task owns a block of the result; the written rows are inside it.
        unsafe {
            let d = dst.get().add(i * block);
            if !in_place {
                let s = old.get().add(i * block);
                d.copy_from_nonoverlapping(s, start);
                d.add(start + len).copy_from_nonoverlapping(s.add(start + len), block - start - len);
            }
            d.add(start).copy_from_nonoverlapping(new.get().add(i * len), len);
        }
    });
}
