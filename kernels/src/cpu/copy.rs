//! `copy`: strided copies, of which transposes, slices, broadcasts and concatenations are made.
//!
//! Axes are merged where both sides step through them alike, and a short contiguous run becomes one wider unit, so that
//! what is left shows which loop it needs: whole rows, a transpose, or single units. Transposes go through a square of
//! one cache line by one cache line, so every line is touched once whatever the strides are.

use ltxc_ir::plan::Copy;
use std::mem::MaybeUninit;

use super::parallel::{Shared, for_each};
use super::{Arg, Output};

/// Bytes that a task copies, about.
const TASK_BYTES: usize = 1 << 16;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Lines side by side that a transpose reads from each row: the memory fetches neighbours ahead.
const BAND: usize = 4;

/// Unit of largest width: longer runs are copied as runs.
const WIDEST: usize = 16;

/// Work of a copied unit, as [`for_each`] counts it, is one for each so many bytes.
const BYTES_PER_WORK: usize = 4;

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(op: &Copy, args: &[Arg<'_>], out: &Output<'_>) {
    if op.shape.contains(&0) {
        return;
    }
    let bytes = out.ty.dtype.bytes();
    let axes = op.shape.iter().zip(op.src_strides.iter().zip(&op.dst_strides));
    let axes = axes.map(|(&extent, (&src, &dst))| Axis { extent, src: src * bytes, dst: dst * bytes });
    // SAFETY: the offsets are inside operand and result.
    unsafe {
        let (src, dst) = (args[0].ptr.add(op.src_offset * bytes), out.ptr.add(op.dst_offset * bytes));
        copy(axes.collect(), bytes, src, dst);
    }
}

/// An axis of a copied box; strides in bytes.
#[derive(Clone, Copy, Debug)]
struct Axis {
    extent: usize,
    src: usize,
    dst: usize,
}

/// Copies units of `unit` bytes.
///
/// # Safety
/// Everything that the axes reach from `src` can be read, and from `dst` written, no byte twice; they do not overlap.
unsafe fn copy(mut axes: Vec<Axis>, mut unit: usize, src: *const u8, dst: *mut u8) {
    merge(&mut axes);
    // A run that both sides have in common, whole: a unit of its own if it is narrow.
    if let Some(&run) = axes.last()
        && (run.src, run.dst) == (unit, unit)
    {
        let bytes = run.extent * unit;
        if !(bytes <= WIDEST && bytes.is_power_of_two() && axes.len() > 1) {
            axes.pop();
            // SAFETY: the contract of this function.
            return unsafe { runs(&axes, bytes, src, dst) };
        }
        axes.pop();
        unit = bytes;
    }
    // SAFETY: as above; a unit has this many bytes.
    unsafe {
        match unit {
            1 => units::<1>(axes, src, dst),
            2 => units::<2>(axes, src, dst),
            4 => units::<4>(axes, src, dst),
            8 => units::<8>(axes, src, dst),
            _ => units::<WIDEST>(axes, src, dst),
        }
    }
}

/// Sorts axes by their stride in the result, and joins neighbours that both sides step through alike.
fn merge(axes: &mut Vec<Axis>) {
    axes.retain(|a| a.extent > 1);
    axes.sort_by_key(|a| std::cmp::Reverse((a.dst, a.src)));
    let mut merged: Vec<Axis> = Vec::with_capacity(axes.len());
    for &axis in axes.iter() {
        match merged.last_mut() {
            Some(outer) if (outer.src, outer.dst) == (axis.src * axis.extent, axis.dst * axis.extent) => {
                *outer = Axis { extent: outer.extent * axis.extent, ..axis };
            }
            _ => merged.push(axis),
        }
    }
    *axes = merged;
}

/// Byte offsets of position `index` of some axes, counted row-major.
fn offsets(axes: &[Axis], mut index: usize) -> (usize, usize) {
    let (mut src, mut dst) = (0, 0);
    for axis in axes.iter().rev() {
        let i = index % axis.extent;
        index /= axis.extent;
        (src, dst) = (src + i * axis.src, dst + i * axis.dst);
    }
    (src, dst)
}

fn positions(axes: &[Axis]) -> usize {
    axes.iter().map(|a| a.extent).product()
}

/// Copies a run of `bytes` at every position of the axes.
///
/// # Safety
/// As for [`copy`].
unsafe fn runs(axes: &[Axis], bytes: usize, src: *const u8, dst: *mut u8) {
    let (rows, to) = (positions(axes), Shared::new(dst));
    let from = Shared::new(src.cast_mut());
    // A task has some rows, or a part of a row.
    let per_task = (TASK_BYTES / bytes).max(1);
    let parts = if per_task > 1 { 1 } else { bytes.div_ceil(TASK_BYTES) };
    for_each(rows.div_ceil(per_task) * parts, rows * bytes / BYTES_PER_WORK, |task| {
        let (group, part) = (task / parts, task % parts);
        let start = part * bytes.div_ceil(parts);
        let end = bytes.min(start + bytes.div_ceil(parts));
        for row in group * per_task..rows.min((group + 1) * per_task) {
            let (s, d) = offsets(axes, row);
            // SAFETY: tasks have different parts of runs, which do not meet.
            unsafe {
                let (s, d) = (from.get().add(s + start), to.get().add(d + start));
                std::ptr::copy_nonoverlapping(s, d, end.saturating_sub(start));
            }
        }
    });
}

/// Copies single units of `N` bytes.
///
/// # Safety
/// As for [`copy`].
unsafe fn units<const N: usize>(mut axes: Vec<Axis>, src: *const u8, dst: *mut u8) {
    // SAFETY: the contract of this function.
    unsafe {
        let reads_along = axes.iter().position(|a| a.src == N && a.extent >= 4);
        let writes_along = axes.iter().position(|a| a.dst == N && a.extent >= 4);
        if let (Some(read), Some(write)) = (reads_along, writes_along)
            && axes[write].src != 0
        {
            let (q, p) = (axes[read], axes[write]);
            // The same axis would have been a run.
            axes.retain(|a| (a.src, a.dst) != (q.src, q.dst) && (a.src, a.dst) != (p.src, p.dst));
            return transpose::<N>(&axes, p, q, src, dst);
        }
        // The inner loop runs along the axis that the result has contiguous, unless that is too short to be worth it.
        let longest = (0..axes.len()).max_by_key(|&i| axes[i].extent);
        let inner = match writes_along.or(longest) {
            Some(i) => axes.remove(i),
            None => Axis { extent: 1, src: N, dst: N },
        };
        rows::<N>(&axes, inner, src, dst);
    }
}

/// Copies units along `inner` at every position of the other axes.
///
/// # Safety
/// As for [`copy`].
unsafe fn rows<const N: usize>(axes: &[Axis], inner: Axis, src: *const u8, dst: *mut u8) {
    let (from, to) = (Shared::new(src.cast_mut()), Shared::new(dst));
    let count = positions(axes);
    // A task has some rows, or a part of a row.
    let part = inner.extent.min(TASK_BYTES / N);
    let parts = inner.extent.div_ceil(part);
    let per_task = (TASK_BYTES / N / inner.extent).max(1);
    let work = count * inner.extent * N.div_ceil(BYTES_PER_WORK);
    for_each(count.div_ceil(per_task) * parts, work, |task| {
        let (group, start) = (task / parts, task % parts * part);
        let n = part.min(inner.extent - start);
        for row in group * per_task..count.min((group + 1) * per_task) {
            let (s, d) = offsets(axes, row);
            // SAFETY: tasks have different units, which do not meet.
            unsafe {
                let s = from.get().add(s + start * inner.src);
                let d = to.get().add(d + start * inner.dst);
                match (inner.src, inner.dst == N) {
                    (0, true) => {
                        let value: [u8; N] = s.cast::<[u8; N]>().read();
                        std::slice::from_raw_parts_mut(d.cast::<[u8; N]>(), n).fill(value);
                    }
                    (_, true) => (0..n).for_each(|i| {
                        *d.cast::<[u8; N]>().add(i) = *s.add(i * inner.src).cast::<[u8; N]>();
                    }),
                    _ => (0..n).for_each(|i| {
                        *d.add(i * inner.dst).cast::<[u8; N]>() = *s.add(i * inner.src).cast::<[u8; N]>();
                    }),
                }
            }
        }
    });
}

/// Copies the plane of `p`, along which the result is contiguous, and `q`, along which the operand is.
///
/// # Safety
/// As for [`copy`].
unsafe fn transpose<const N: usize>(axes: &[Axis], p: Axis, q: Axis, src: *const u8, dst: *mut u8) {
    let (from, to) = (Shared::new(src.cast_mut()), Shared::new(dst));
    let side = LINE / N;
    let band = side * BAND;
    let bands = q.extent.div_ceil(band);
    let planes = positions(axes);
    let per_task = (TASK_BYTES / (p.extent * BAND * LINE)).max(1);
    let work = planes * p.extent * q.extent * N.div_ceil(BYTES_PER_WORK) * 2;
    for_each((planes * bands).div_ceil(per_task), work, |task| {
        for index in task * per_task..(planes * bands).min((task + 1) * per_task) {
            let (s, d) = offsets(axes, index / bands);
            let first = index % bands * band;
            for row in (0..p.extent).step_by(side) {
                for column in (first..q.extent.min(first + band)).step_by(side) {
                    let (rows, columns) = (side.min(p.extent - row), side.min(q.extent - column));
                    // SAFETY: tasks have different bands, which do not meet.
                    unsafe {
                        let s = from.get().cast_const().add(s + row * p.src + column * N);
                        let d = to.get().add(d + row * N + column * q.dst);
                        if rows == side && columns == side {
                            square::<N>(s, p.src, d, q.dst);
                        } else {
                            part_of_square::<N>([rows, columns], s, p.src, d, q.dst);
                        }
                    }
                }
            }
        }
    });
}

/// Transposes `rows` by `columns` units.
///
/// # Safety
/// As many runs at these strides can be read and written.
unsafe fn part_of_square<const N: usize>(
    [rows, columns]: [usize; 2],
    src: *const u8,
    src_stride: usize,
    dst: *mut u8,
    dst_stride: usize,
) {
    for j in 0..columns {
        for i in 0..rows {
            // SAFETY: unit `j` of run `i` of the operand, unit `i` of run `j` of the result.
            unsafe {
                *dst.add(j * dst_stride + i * N).cast::<[u8; N]>() = *src.add(i * src_stride + j * N).cast::<[u8; N]>();
            }
        }
    }
}

/// Transposes a square of one line by one line.
///
/// # Safety
/// As many lines at these strides can be read and written.
#[inline(always)]
unsafe fn square<const N: usize>(src: *const u8, src_stride: usize, dst: *mut u8, dst_stride: usize) {
    let side = LINE / N;
    // Not cleared: that would cost more than the transpose.
    let mut lines = [const { MaybeUninit::<[u8; LINE]>::uninit() }; LINE];
    let lines = &mut lines[..side];
    for (i, line) in lines.iter_mut().enumerate() {
        // SAFETY: line `i` of the operand.
        line.write(unsafe { src.add(i * src_stride).cast::<[u8; LINE]>().read() });
    }
    let lines = lines.as_ptr().cast::<[u8; N]>();
    for j in 0..side {
        let mut line = [0u8; LINE];
        for i in 0..side {
            // SAFETY: `side` lines of `side` units each were written.
            let unit = unsafe { lines.add(i * side + j).read() };
            line[i * N..(i + 1) * N].copy_from_slice(&unit);
        }
        // SAFETY: line `j` of the result.
        unsafe { dst.add(j * dst_stride).cast::<[u8; LINE]>().write(line) };
    }
}
