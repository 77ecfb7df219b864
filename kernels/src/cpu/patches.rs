//! Which input positions each output position of a convolution sums, as operands of the blocked product.
//!
//! A [`Grid`] is a box of output positions whose taps lie at fixed distances from one input position that moves in steps.
//! `conv` is one grid. `conv_transpose` is one grid for every phase, that is remainder of the output position divided by
//! the stride: positions of a phase are reached by the same taps, so nothing is scattered.
//!
//! What stands in front of a convolution is folded into the grid ([`Front`]): where a padded axis is read outside of the
//! operand, a table says which position of it stands there, and elements are activated as they are read.
//!
//! Positions are counted modulo 2⁶⁴, so that those in front of the input are very large: one comparison tells both ends,
//! and attributes of any size overflow nowhere.

use ltxc_ir::ops::{Conv, ConvTranspose, Pad};
use ltxc_ir::{DType, TensorType};
use std::ops::Range;

use super::element::{load, load_leaky};
use super::gemm::{Extents, LDA, Rows};
use super::pack::{Matrix, Panels, pack_rows};
use super::tile::Source;

/// Most spatial axes of a tensor: the others are batch and channels.
const MAX_AXES: usize = ltxc_ir::types::MAX_RANK - 2;

/// A box of output positions with common taps.
#[derive(Clone, Debug)]
pub(crate) struct Grid {
    pub batch: usize,
    pub axes: Vec<Axis>,
    /// Channels of the input.
    pub ci: usize,
    /// Channels of the result.
    pub co: usize,
    pub groups: usize,
    /// Slope of a leaky ReLU in front.
    slope: Option<f32>,
}

/// One spatial axis of a [`Grid`].
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    /// Extent of the input, padded.
    pub input: usize,
    /// What stands around the input in memory, if it is padded.
    pub padded: Option<Padded>,
    /// Extent of the result.
    pub output: usize,
    /// Extent of the kernel.
    pub kernel: usize,
    /// Output positions of the grid.
    pub count: usize,
    /// The first of them.
    pub first: usize,
    /// From one to the next.
    pub every: usize,
    /// Input position that belongs to the first.
    pub start: usize,
    /// From one to the next.
    pub step: usize,
    /// What is summed for each, by ascending distance.
    pub taps: Vec<Tap>,
}

/// A padded axis: the input in memory, and what stands in front of it and behind it.
#[derive(Clone, Debug)]
pub(crate) struct Padded {
    /// Extent in memory.
    extent: usize,
    /// Positions in front of it.
    front: usize,
    /// The positions in front and behind, in order.
    around: Vec<Around>,
}

/// A position of a padded axis that is not in memory.
#[derive(Clone, Copy, Debug)]
struct Around {
    /// The position in memory that stands here, `None` for zeros.
    source: Option<usize>,
    /// From here on, how many lie side by side in memory, or are zeros.
    run: usize,
}

/// What a convolution does to its input where it reads it.
#[derive(Default)]
pub(crate) struct Front<'a> {
    /// Slope of a leaky ReLU, if there is one.
    pub slope: Option<f32>,
    /// Then pads, one after the other.
    pub pads: Vec<Padding<'a>>,
}

/// A pad with the extents of its operand.
pub(crate) type Padding<'a> = (&'a Pad, &'a [usize]);

impl Axis {
    /// Extent of the input in memory.
    #[inline(always)]
    pub(crate) fn extent(&self) -> usize {
        self.padded.as_ref().map_or(self.input, |p| p.extent)
    }

    /// Where position `at` of the input is in memory, and for how many positions, `most` at most, what follows does in
    /// memory too; `None` where these are zeros.
    #[inline(always)]
    pub(crate) fn run(&self, at: usize, most: usize) -> (Option<usize>, usize) {
        if at >= self.input {
            // Positions in front of the input are large.
            return (None, most.min(at.wrapping_neg().max(1)));
        }
        match &self.padded {
            None => (Some(at), most.min(self.input - at)),
            Some(padded) => {
                let Around { source, run } = padded.at(at);
                (source, most.min(run))
            }
        }
    }

    /// Where a position of the input is in memory.
    #[inline(always)]
    fn source(&self, at: usize) -> Option<usize> {
        if at >= self.input {
            return None;
        }
        match &self.padded {
            None => Some(at),
            Some(padded) => padded.at(at).source,
        }
    }
}

impl Padded {
    /// What stands at a position, and for how long.
    #[inline(always)]
    fn at(&self, at: usize) -> Around {
        let inside = at.wrapping_sub(self.front);
        if inside < self.extent {
            return Around { source: Some(inside), run: self.extent - inside };
        }
        self.around[if at < self.front { at } else { at - self.extent }]
    }

    /// What pads one after the other do along axis `axis` of their tensors; `None` if nothing.
    fn new(pads: &[Padding<'_>], axis: usize, input: usize) -> Option<Padded> {
        if pads.iter().all(|(pad, _)| pad.lo[axis] == 0 && pad.hi[axis] == 0) {
            return None;
        }
        let find = |position| {
            let back = |at: usize, (pad, from): &Padding<'_>| pad.source_index(at, pad.lo[axis], from[axis]);
            pads.iter().rev().try_fold(position, back)
        };
        let (extent, front) = (pads[0].1[axis], pads.iter().map(|(pad, _)| pad.lo[axis]).sum());
        let positions = (0..front).chain(front + extent..input);
        let mut around: Vec<Around> = positions.map(|at| Around { source: find(at), run: 1 }).collect();
        for i in (1..around.len()).rev().filter(|&i| i != front) {
            if around[i].source == around[i - 1].source.map(|s| s + 1) {
                around[i - 1].run = around[i].run + 1;
            }
        }
        Some(Padded { extent, front, around })
    }
}

/// One tap along one axis.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tap {
    /// From the input position of the grid.
    pub distance: usize,
    /// Position in the kernel.
    pub index: usize,
}

impl Grid {
    /// The grid of a convolution.
    pub(crate) fn of_conv(op: &Conv, x: &TensorType, w: &TensorType, out: &TensorType) -> Grid {
        Grid::new(x, w, op.groups, |a| Axis {
            input: x.shape[a + 1],
            padded: None,
            output: out.shape[a + 1],
            kernel: w.shape[a],
            count: out.shape[a + 1],
            first: 0,
            every: 1,
            start: 0usize.wrapping_sub(op.pad[a].0),
            step: op.stride[a],
            taps: (0..w.shape[a]).map(|index| Tap { distance: index.wrapping_mul(op.dilation[a]), index }).collect(),
        })
    }

    /// The grids of a transposed convolution; together they cover the result once.
    ///
    /// Input `i` and tap `k` reach output `o = i · stride + k · dilation − lo`. With `o + lo = q · stride + phase` the taps
    /// of a phase are those for which `phase − k · dilation` is a multiple of the stride, and `i` is `q` plus that multiple.
    pub(crate) fn of_transpose<'a>(
        op: &'a ConvTranspose,
        x: &'a TensorType,
        w: &'a TensorType,
        out: &'a TensorType,
    ) -> impl Iterator<Item = Grid> + 'a {
        let phases: Vec<usize> = op.stride.iter().zip(&out.shape[1..]).map(|(&s, &o)| s.min(o)).collect();
        (0..phases.iter().product()).map(move |number: usize| {
            let mut number = number;
            let mut first = vec![0; phases.len()];
            for a in (0..phases.len()).rev() {
                first[a] = number % phases[a];
                number /= phases[a];
            }
            Grid::new(x, w, op.groups, |a| {
                let (stride, output, lo) = (op.stride[a] as i128, out.shape[a + 1], op.pad[a].0 as i128);
                let at = first[a] as i128 + lo;
                let distance = |k: usize| at % stride - k as i128 * op.dilation[a] as i128;
                Axis {
                    input: x.shape[a + 1],
                    padded: None,
                    output,
                    kernel: w.shape[a],
                    count: (output - first[a]).div_ceil(op.stride[a]),
                    first: first[a],
                    every: op.stride[a],
                    start: (at / stride) as usize,
                    step: 1,
                    // Backwards, because later taps reach back further.
                    taps: (0..w.shape[a])
                        .rev()
                        .filter(|&k| distance(k) % stride == 0)
                        .map(|index| Tap { distance: (distance(index) / stride) as usize, index })
                        .collect(),
                }
            })
        })
    }

    fn new(x: &TensorType, w: &TensorType, groups: usize, axis: impl Fn(usize) -> Axis) -> Grid {
        let n = x.rank() - 2;
        Grid {
            batch: x.shape[0],
            axes: (0..n).map(axis).collect(),
            ci: x.shape[n + 1],
            co: w.shape[n + 1],
            groups,
            slope: None,
        }
    }

    /// Whether something can be folded into a grid: pads leave batch and channels alone.
    pub(crate) fn can_have(front: &Front<'_>) -> bool {
        let grows = |pad: &Pad, axis: usize| pad.lo[axis] > 0 || pad.hi[axis] > 0;
        front.pads.iter().all(|(pad, from)| !grows(pad, 0) && !grows(pad, from.len() - 1))
    }

    /// Lets the input be what `front`, for which [`Grid::can_have`] holds, makes of the tensor in memory.
    pub(crate) fn behind(mut self, front: &Front<'_>) -> Grid {
        for (a, axis) in self.axes.iter_mut().enumerate() {
            axis.padded = Padded::new(&front.pads, a + 1, axis.input);
        }
        Grid { slope: front.slope, ..self }
    }

    /// Reads elements of the input from element `at` of the memory at `ptr` on.
    ///
    /// # Safety
    /// The elements are inside the operand, which has this dtype.
    #[inline(always)]
    pub(crate) unsafe fn load(&self, dtype: DType, ptr: *const u8, at: usize, dst: &mut [f32]) {
        let src = ptr.wrapping_add(at * dtype.bytes());
        // SAFETY: passed on to the caller.
        unsafe {
            match self.slope {
                None => load(dtype, src, dst),
                Some(slope) => load_leaky(dtype, src, slope, dst),
            }
        }
    }

    /// Taps of every output position.
    pub(crate) fn taps(&self) -> usize {
        self.axes.iter().map(|a| a.taps.len()).product()
    }

    /// Number of output positions of the grid.
    pub(crate) fn positions(&self) -> usize {
        self.batch * self.axes.iter().map(|a| a.count).product::<usize>()
    }

    /// The product of one group of channels.
    pub(crate) fn extents(&self) -> Extents {
        Extents { m: self.positions(), n: self.co / self.groups, k: self.taps() * (self.ci / self.groups) }
    }

    /// Batch index and position along each axis of output position `row`.
    pub(crate) fn index(&self, mut row: usize) -> (usize, [usize; MAX_AXES]) {
        let mut index = [0; MAX_AXES];
        for (i, axis) in index[..self.axes.len()].iter_mut().zip(&self.axes).rev() {
            *i = row % axis.count;
            row /= axis.count;
        }
        (row, index)
    }

    /// Offset in the result of the first channel of output position `row`, in elements.
    pub(crate) fn target(&self, row: usize) -> usize {
        let (batch, index) = self.index(row);
        let at = |offset: usize, (axis, &i): (&Axis, &usize)| offset * axis.output + axis.first + i * axis.every;
        self.axes.iter().zip(&index).fold(batch, at) * self.co
    }

    /// Positions in the kernel of all taps, in the order in which they are summed, counted row-major.
    pub(crate) fn kernel_positions(&self) -> Vec<usize> {
        self.axes.iter().fold(vec![0], |outer, axis| {
            outer.iter().flat_map(|o| axis.taps.iter().map(move |t| o * axis.kernel + t.index)).collect()
        })
    }

    /// Combinations of taps of all axes but the last: distances per axis.
    pub(crate) fn outer_taps(&self) -> Vec<Vec<usize>> {
        let outer = &self.axes[..self.axes.len() - 1];
        outer.iter().fold(vec![vec![]], |all: Vec<Vec<usize>>, axis| {
            let with = |head: &Vec<usize>, t: &Tap| [head.as_slice(), &[t.distance]].concat();
            all.iter().flat_map(|head| axis.taps.iter().map(move |t| with(head, t))).collect()
        })
    }

    /// The row in memory, along the last axis, that output position `index` sees through a combination of
    /// [`outer_taps`](Grid::outer_taps), or `None` if all of it is zeros.
    #[inline(always)]
    pub(crate) fn input_row(&self, batch: usize, index: &[usize], distances: &[usize]) -> Option<usize> {
        let mut row = batch;
        for ((axis, &i), &distance) in self.axes.iter().zip(index).zip(distances) {
            let at = i.wrapping_mul(axis.step).wrapping_add(axis.start).wrapping_add(distance);
            row = row * axis.extent() + axis.source(at)?;
        }
        Some(row)
    }
}

/// The patches under the output positions of a grid as rows of the left operand, for one group of channels.
pub(crate) struct Patches<'a> {
    grid: &'a Grid,
    ptr: *const u8,
    dtype: DType,
    /// First channel of the group.
    channel: usize,
    /// Channels of the group.
    channels: usize,
    /// Taps that lie side by side in the input, with all their channels.
    run: usize,
    lines: Vec<Line>,
}

/// A run of summed elements that lie side by side in the input.
struct Line {
    /// Of each axis but the last.
    distances: Vec<usize>,
    /// Along the last axis, of the first tap.
    distance: usize,
}

// SAFETY: the operand is only read, and valid for the time of a launch by the contract of `launch`.
unsafe impl Sync for Patches<'_> {}

impl<'a> Patches<'a> {
    /// The patches of `group` in the input at `ptr`.
    pub(crate) fn new(grid: &'a Grid, ptr: *const u8, dtype: DType, group: usize) -> Patches<'a> {
        let taps = &grid.axes[grid.axes.len() - 1].taps;
        let adjacent = taps.windows(2).all(|t| t[0].distance.wrapping_add(1) == t[1].distance);
        let run = if grid.groups == 1 && adjacent { taps.len() } else { 1 };
        let outer = grid.outer_taps();
        let lines = outer
            .iter()
            .flat_map(|o| taps.iter().step_by(run.max(1)).map(|t| Line { distances: o.clone(), distance: t.distance }));
        let channels = grid.ci / grid.groups;
        Patches { grid, ptr, dtype, channel: group * channels, channels, run, lines: lines.collect() }
    }
}

impl Rows for Patches<'_> {
    unsafe fn pack(&self, rows: Range<usize>, ks: Range<usize>, dst: *mut f32) {
        let grid = self.grid;
        let last = grid.axes.len() - 1;
        let axis = &grid.axes[last];
        let length = self.run * self.channels;
        let (mut batch, mut index) = grid.index(rows.start);
        for r in 0..rows.len() {
            // SAFETY: row `r` of the block has room for all summed indices of the range.
            let row = unsafe { std::slice::from_raw_parts_mut(dst.add(r * LDA), ks.len()) };
            let start = index[last].wrapping_mul(axis.step).wrapping_add(axis.start);
            let mut k = ks.start;
            while k < ks.end {
                let line = &self.lines[k / length];
                let begin = k / length * length;
                let end = ks.end.min(begin + length);
                let part = &mut row[k - ks.start..end - ks.start];
                match grid.input_row(batch, &index, &line.distances) {
                    // SAFETY: the row of the input is inside the operand.
                    Some(outer) => unsafe { self.line(outer, start.wrapping_add(line.distance), k - begin, part) },
                    None => part.fill(0.0),
                }
                k = end;
            }
            for a in (0..=last).rev() {
                index[a] += 1;
                if index[a] < grid.axes[a].count {
                    break;
                }
                index[a] = 0;
                batch += usize::from(a == 0);
            }
        }
    }
}

impl Patches<'_> {
    /// Reads elements `from..from + dst.len()` of a line that begins at input position `at` of row `outer`.
    ///
    /// # Safety
    /// The row is inside the operand.
    #[inline(always)]
    unsafe fn line(&self, outer: usize, at: usize, from: usize, dst: &mut [f32]) {
        let axis = &self.grid.axes[self.grid.axes.len() - 1];
        let (mut tap, mut channel) = (from / self.channels, from % self.channels);
        let mut done = 0;
        while done < dst.len() {
            let (found, taps) = axis.run(at.wrapping_add(tap), self.run - tap);
            let n = (taps * self.channels - channel).min(dst.len() - done);
            let part = &mut dst[done..done + n];
            match found {
                Some(position) => {
                    let element = (outer * axis.extent() + position) * self.grid.ci + self.channel + channel;
                    // SAFETY: position and channels are inside the row.
                    unsafe { self.grid.load(self.dtype, self.ptr, element, part) };
                }
                None => part.fill(0.0),
            }
            (done, tap, channel) = (done + n, tap + taps, 0);
        }
    }
}

/// The weights of the taps of a grid as right operand, for one group of channels.
pub(crate) struct TapWeights {
    /// The columns of the group: `channels` rows for every position in the kernel.
    pub weights: Matrix,
    /// Positions in the kernel in the order in which they are summed.
    pub kernel_positions: Vec<usize>,
    /// Input channels of the group.
    pub channels: usize,
}

impl Panels for TapWeights {
    unsafe fn pack(&self, ks: Range<usize>, columns: Range<usize>, width: usize, dst: *mut f32) {
        let mut k = ks.start;
        while k < ks.end {
            let (tap, channel) = (k / self.channels, k % self.channels);
            let end = ks.end.min(k - channel + self.channels);
            let row = self.kernel_positions[tap] * self.channels + channel;
            let at = self.weights.offset(row * self.weights.stride + columns.start);
            // SAFETY: the rows are inside the weights, and at this place of the panel.
            unsafe { pack_rows(&at, end - k, columns.len(), width, dst.add((k - ks.start) * width)) };
            k = end;
        }
    }

    fn source(&self, k: usize, column: usize) -> Source {
        // Taps that are summed one after the other mostly lie one after the other.
        let tap = self.kernel_positions.get(k / self.channels).copied().unwrap_or(0);
        self.weights.source(tap * self.channels + k % self.channels, column)
    }
}
