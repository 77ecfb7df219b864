//! Convolutions of every channel with a kernel of its own, of which filters that change the sampling rate are made.
//!
//! A task computes a run of output positions along the last axis. It copies the input that they see into a window, as
//! f32 and with zeros outside the input, and then sums all taps of a few positions and a vector of channels in
//! registers. With few channels, several positions in a row are treated as one with more channels.

use std::ops::Range;

use super::Arg;
use super::element::load;
use super::parallel::{Need, Scratch, for_each};
use super::patches::Grid;
use super::simd::multiversion;
use super::sink::{Sink, Sums};

/// Floats of the window of a task: with the results, half of a second cache at most.
const WINDOW: usize = 1 << 14;

/// Channels from which on vectors are mostly full.
const WIDE: usize = 32;

/// Whether every channel has its own kernel.
pub(crate) fn fits(grid: &Grid) -> bool {
    grid.groups == grid.ci && grid.co == grid.ci
}

/// How a grid is cut into tasks and windows.
struct Plan {
    outer_taps: Vec<Vec<usize>>,
    /// Output positions along the last axis per task.
    run: usize,
    /// Input positions that one output position spans.
    span: usize,
    /// Positions that are treated as one.
    merged: usize,
}

impl Plan {
    fn new(grid: &Grid) -> Plan {
        let axis = &grid.axes[grid.axes.len() - 1];
        let outer_taps = grid.outer_taps();
        let span = match (axis.taps.first(), axis.taps.last()) {
            (Some(first), Some(last)) => last.distance.wrapping_sub(first.distance).saturating_add(1),
            _ => 0,
        };
        let per_position = outer_taps.len().max(1).saturating_mul(axis.step).saturating_mul(grid.ci.max(1));
        let run = (WINDOW / per_position).clamp(1, axis.count.max(1));
        let merged = if axis.step == 1 { WIDE.div_ceil(grid.ci.max(1)) } else { 1 };
        Plan { outer_taps, run, span, merged }
    }

    /// Input positions under `run` output positions.
    fn window(&self, step: usize, run: usize) -> usize {
        (run - 1).saturating_mul(step).saturating_add(self.span)
    }
}

/// Scratch, besides what a sink needs for each thread.
pub(crate) fn need(grid: &Grid) -> Need {
    let plan = Plan::new(grid);
    let window = plan.window(grid.axes[grid.axes.len() - 1].step, plan.run).saturating_mul(plan.outer_taps.len());
    Need {
        shared: grid.taps().saturating_mul(grid.ci).saturating_mul(plan.merged),
        per_thread: window.saturating_add(plan.run).saturating_mul(grid.ci),
    }
}

/// # Safety
/// As for [`super::launch`]; the grid describes the operands and [`fits`], and `scratch` was made for [`need`] and the sink.
pub(crate) unsafe fn launch(grid: &Grid, args: &[Arg<'_>], sink: &dyn Sink, scratch: &Scratch<'_>) {
    let plan = Plan::new(grid);
    let (c, w) = (grid.ci, &args[1]);
    let wide = c * plan.merged;
    // SAFETY: scratch of this size, written before the tasks begin.
    let weights = unsafe { std::slice::from_raw_parts_mut(scratch.shared().get(), grid.taps() * wide) };
    for (row, position) in weights.chunks_exact_mut(wide).zip(grid.kernel_positions()) {
        // SAFETY: the position is one of the kernel.
        unsafe { load(w.ty.dtype, w.ptr.add(position * c * w.ty.dtype.bytes()), &mut row[..c]) };
        (1..plan.merged).for_each(|copy| row.copy_within(..c, copy * c));
    }
    let axis = &grid.axes[grid.axes.len() - 1];
    let parts = axis.count.div_ceil(plan.run);
    let rows = grid.positions() / axis.count;
    let work = grid.positions().saturating_mul(c).saturating_mul(grid.taps() + 1);
    for_each(rows * parts, work, |task| {
        let first = task % parts * plan.run;
        let run = first..axis.count.min(first + plan.run);
        // SAFETY: called once per task; tasks have different output positions.
        unsafe { task_run(grid, &plan, weights, task / parts, run, &args[0], sink, scratch.slot()) };
    });
}

/// Computes the output positions `run` of row `row`.
///
/// # Safety
/// As for [`launch`]; nothing else writes these positions of the result. `slot` has the size that [`need`] says.
#[allow(clippy::too_many_arguments)] // what a task needs, used once
unsafe fn task_run(
    grid: &Grid,
    plan: &Plan,
    weights: &[f32],
    row: usize,
    run: Range<usize>,
    x: &Arg<'_>,
    sink: &dyn Sink,
    slot: &mut [f32],
) {
    let c = grid.ci;
    let axis = &grid.axes[grid.axes.len() - 1];
    let length = plan.window(axis.step, run.len());
    let (window, rest) = slot.split_at_mut(length * c * plan.outer_taps.len());
    let (sums, room) = rest.split_at_mut(run.len() * c);
    let (batch, index) = grid.index(row * axis.count);
    let nearest = axis.taps.first().map_or(0, |t| t.distance);
    let start = run.start.wrapping_mul(axis.step).wrapping_add(axis.start).wrapping_add(nearest);
    for (part, distances) in window.chunks_exact_mut((length * c).max(1)).zip(&plan.outer_taps) {
        let Some(outer) = grid.input_row(batch, &index, distances) else {
            part.fill(0.0);
            continue;
        };
        let mut done = 0;
        while done < length {
            let (found, positions) = axis.run(start.wrapping_add(done), length - done);
            let part = &mut part[done * c..(done + positions) * c];
            match found {
                // SAFETY: these positions are inside the operand.
                Some(at) => unsafe {
                    grid.load(x.ty.dtype, x.ptr, (outer * axis.extent() + at) * c, part);
                },
                None => part.fill(0.0),
            }
            done += positions;
        }
    }
    let outer = 0..plan.outer_taps.len();
    let near = |o: usize| axis.taps.iter().map(move |t| (o * length + t.distance.wrapping_sub(nearest)) * c);
    let taps: Vec<usize> = outer.flat_map(near).collect();
    // Whole groups of merged positions, then what is left.
    let wide = c * plan.merged;
    let whole = run.len() / plan.merged * plan.merged;
    let (front, back) = sums.split_at_mut(whole * c);
    let mut filter = Filter { step: axis.step * wide, channels: wide, taps: &taps, weights, stride: wide };
    filter_run(&filter, window, front);
    (filter.step, filter.channels) = (axis.step * c, c);
    filter_run(&filter, &window[(whole * axis.step * c).min(window.len())..], back);

    let target = grid.target(row * axis.count + run.start);
    // Positions side by side are one row.
    let columns = if axis.every == 1 { run.len() * c } else { c };
    // SAFETY: positions of this row of the result, which this task owns.
    unsafe { sink.take(Sums::dense(sums, columns), &|position| target + position * axis.every * c, room) };
}

/// Sums of taps for positions in a row.
struct Filter<'a> {
    /// Floats from one position to the next.
    step: usize,
    /// Channels of a position.
    channels: usize,
    /// Where each tap begins.
    taps: &'a [usize],
    /// `stride` for each tap, of which the first `channels` are used.
    weights: &'a [f32],
    stride: usize,
}

/// Positions that share a load of weights. Sixteen channels of four stay in registers; more were moved to memory.
const POSITIONS: usize = 4;

multiversion! {
    fn filter_run(filter: &Filter, x: &[f32], y: &mut [f32]) {
        if filter.taps.is_empty() {
            return y.fill(0.0);
        }
        let mut channel = 0;
        while channel < filter.channels {
            channel += match filter.channels - channel {
                16.. => columns::<16>(filter, channel, x, y),
                8.. => columns::<8>(filter, channel, x, y),
                4.. => columns::<4>(filter, channel, x, y),
                _ => columns::<1>(filter, channel, x, y),
            };
        }
    }
}

/// Filters `N` channels from `channel` on, of all positions. Returns `N`.
#[inline(always)]
fn columns<const N: usize>(filter: &Filter, channel: usize, x: &[f32], y: &mut [f32]) -> usize {
    let mut at = channel;
    let mut groups = y.chunks_exact_mut(POSITIONS * filter.channels);
    for group in &mut groups {
        positions::<N, POSITIONS>(filter, channel, &x[at..], group);
        at += POSITIONS * filter.step;
    }
    for position in groups.into_remainder().chunks_exact_mut(filter.channels) {
        positions::<N, 1>(filter, channel, &x[at..], position);
        at += filter.step;
    }
    N
}

/// Filters `N` channels of `P` positions.
#[inline(always)]
fn positions<const N: usize, const P: usize>(filter: &Filter, channel: usize, x: &[f32], y: &mut [f32]) {
    let mut sums = [[0f32; N]; P];
    for (&tap, weights) in filter.taps.iter().zip(filter.weights.chunks_exact(filter.stride)) {
        let weights = &weights[channel..channel + N];
        for (p, sums) in sums.iter_mut().enumerate() {
            let x = &x[tap + p * filter.step..][..N];
            for i in 0..N {
                sums[i] = x[i].mul_add(weights[i], sums[i]);
            }
        }
    }
    for (p, sums) in sums.iter().enumerate() {
        y[p * filter.channels + channel..][..N].copy_from_slice(sums);
    }
}
