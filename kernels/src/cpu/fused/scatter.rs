//! A strided copy turned around: where each element that is made belongs.
//!
//! A [`Copy`] says which element stands at each place of a box. Behind a product elements come in runs, in the order of
//! the operand, and each has to find its place. It can wherever the axes of the box step either through rows of the operand
//! or inside of one: then the place is a sum of one offset for the row and one for the column, and the latter is a table.

use std::ops::Range;

use ltxc_ir::plan::Copy;

/// Columns that are not copied.
const NONE: usize = usize::MAX;

/// Elements of a run from which on it is moved as one.
const RUN: usize = 8;

/// Where the elements of rows of some length go.
pub(super) struct Scatter {
    /// First row that is copied.
    first_row: usize,
    /// Axes that step through rows, the largest step first.
    rows: Vec<Axis>,
    /// Place of the first row.
    first: usize,
    /// For every column its distance from the place of its row.
    columns: Vec<usize>,
    /// Runs of columns whose places lie side by side, if these are long on average.
    runs: Vec<Range<usize>>,
}

/// An axis of the box; strides count elements or rows of the operand, and elements of the result.
#[derive(Clone, Copy)]
struct Axis {
    extent: usize,
    src: usize,
    dst: usize,
}

impl Scatter {
    /// Turns a copy around, whose operand has rows of `length` elements. `None` if places are no such sums, or if elements
    /// are copied more than once.
    pub(super) fn new(copy: &Copy, length: usize) -> Option<Scatter> {
        let length = length.max(1);
        let (mut rows, mut inside) = (Vec::new(), Vec::new());
        let strides = copy.src_strides.iter().zip(&copy.dst_strides);
        for (&extent, (&src, &dst)) in copy.shape.iter().zip(strides).filter(|&(&extent, _)| extent != 1) {
            if src == 0 {
                return None;
            } else if src.is_multiple_of(length) {
                rows.push(Axis { extent, src: src / length, dst });
            } else if extent.saturating_sub(1).saturating_mul(src) < length {
                inside.push(Axis { extent, src, dst });
            } else {
                // Steps that fill rows exactly are two axes.
                let steps = length / src;
                if !length.is_multiple_of(src) || !extent.is_multiple_of(steps) {
                    return None;
                }
                inside.push(Axis { extent: steps, src, dst });
                rows.push(Axis { extent: extent / steps, src: 1, dst: dst * steps });
            }
        }
        rows.sort_by_key(|a| std::cmp::Reverse(a.src));
        let mut reach = 1;
        for axis in rows.iter().rev() {
            if axis.src < reach {
                return None;
            }
            reach += axis.extent.saturating_sub(1) * axis.src;
        }
        let columns = columns(&inside, copy.src_offset % length, length)?;
        let mut runs: Vec<Range<usize>> = Vec::new();
        for column in (0..length).filter(|&c| columns[c] != NONE) {
            match runs.last_mut() {
                Some(run) if run.end == column && columns[column] == columns[column - 1] + 1 => run.end += 1,
                _ => runs.push(column..column + 1),
            }
        }
        if runs.len() * RUN > length {
            runs = Vec::new();
        }
        Some(Scatter { first_row: copy.src_offset / length, rows, first: copy.dst_offset, columns, runs })
    }

    /// Copies the elements from `start` on, `N` bytes each, that lie at `src`.
    ///
    /// # Safety
    /// There are `n` elements at `src`, they are inside the operand, and nothing else uses their places in the result, which
    /// begins at `dst`.
    pub(super) unsafe fn run<const N: usize>(&self, start: usize, n: usize, src: *const u8, dst: *mut u8) {
        let length = self.columns.len();
        let mut done = 0;
        while done < n {
            let (row, column) = ((start + done) / length, (start + done) % length);
            let count = (length - column).min(n - done);
            if let Some(place) = self.row(row) {
                // SAFETY: these are elements of one row; places are inside the result by the type rule of the copy.
                unsafe { self.part::<N>(column, count, src.add(done * N), dst.add(place * N)) };
            }
            done += count;
        }
    }

    /// Place of a row.
    fn row(&self, row: usize) -> Option<usize> {
        let mut rest = row.checked_sub(self.first_row)?;
        let mut place = self.first;
        for axis in &self.rows {
            let index = rest / axis.src;
            if index >= axis.extent {
                return None;
            }
            rest -= index * axis.src;
            place += index * axis.dst;
        }
        (rest == 0).then_some(place)
    }

    /// # Safety
    /// As for [`Scatter::run`], with `dst` at the place of the row.
    unsafe fn part<const N: usize>(&self, column: usize, count: usize, src: *const u8, dst: *mut u8) {
        let places = &self.columns[column..column + count];
        // SAFETY: passed on to the caller.
        unsafe {
            if self.runs.is_empty() {
                for (i, &place) in places.iter().enumerate().filter(|&(_, &place)| place != NONE) {
                    *dst.add(place * N).cast::<[u8; N]>() = *src.add(i * N).cast::<[u8; N]>();
                }
                return;
            }
            let (first, end) = (column, column + count);
            let from = self.runs.partition_point(|run| run.end <= first);
            for run in self.runs[from..].iter().take_while(|run| run.start < end) {
                let (start, n) = (run.start.max(first), run.end.min(end) - run.start.max(first));
                let to = dst.add(self.columns[start] * N);
                std::ptr::copy_nonoverlapping(src.add((start - first) * N), to, n * N);
            }
        }
    }
}

/// Places of the columns that the axes reach from column `first`; `None` if they leave the row or meet.
fn columns(axes: &[Axis], first: usize, length: usize) -> Option<Vec<usize>> {
    let mut reached = vec![(first, 0usize)];
    for axis in axes {
        // A box that visits a column twice would grow without end.
        if reached.len().saturating_mul(axis.extent) > length {
            return None;
        }
        let steps = |&(column, place): &(usize, usize)| {
            (0..axis.extent).map(move |i| (column + i * axis.src, place + i * axis.dst))
        };
        reached = reached.iter().flat_map(steps).collect();
    }
    let mut columns = vec![NONE; length];
    for (column, place) in reached {
        let slot = columns.get_mut(column).filter(|slot| **slot == NONE)?;
        *slot = place;
    }
    Some(columns)
}
