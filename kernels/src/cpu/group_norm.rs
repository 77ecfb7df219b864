//! `group_norm`, channels last.
//!
//! Statistics span rows. They are taken from chunks of fixed size while a chunk is in cache, the mean first and then the
//! squares around it, and merged in order and in f64 (Chan et al. 1979): a large mean does not drown the variance, and
//! the operand is read twice in all.

use ltxc_ir::TensorType;
use ltxc_ir::ops::GroupNorm;

use super::element::load;
use super::norm::{channels, wide};
use super::parallel::{Need, Scratch, Shared, for_each};
use super::simd::multiversion;
use super::sink::{Memory, Sink, Sums};
use super::{Arg, Output};
use ltxc_ir::DType;

/// Elements per chunk.
const CHUNK: usize = 1 << 14;

/// Most rows per chunk: a channel is summed over them in f32, one after the other.
const MOST_ROWS: usize = 256;

/// Mean, and sum of squares around it.
type Moments = [f64; 2];

/// Floats that moments take.
const MOMENT_FLOATS: usize = size_of::<Moments>() / size_of::<f32>();

/// How a call is cut into chunks of rows: fixed by the shape.
struct Cut {
    batches: usize,
    rows: usize,
    c: usize,
    groups: usize,
    rows_per_chunk: usize,
    chunks: usize,
}

impl Cut {
    fn new(op: &GroupNorm, x: &TensorType) -> Cut {
        let (c, batches) = (channels(x), x.shape[0].max(1));
        let rows = x.elements() / batches / c;
        let rows_per_chunk = (CHUNK / c).min(MOST_ROWS).clamp(1, rows.max(1));
        Cut { batches, rows, c, groups: op.groups, rows_per_chunk, chunks: rows.div_ceil(rows_per_chunk) }
    }

    /// First row and number of rows of a chunk, over all batches.
    fn chunk(&self, task: usize) -> (usize, usize) {
        let (batch, row) = (task / self.chunks, task % self.chunks * self.rows_per_chunk);
        (batch * self.rows + row, self.rows_per_chunk.min(self.rows - row))
    }

    /// Floats of the moments of all chunks and groups.
    fn moments(&self) -> usize {
        (MOMENT_FLOATS * self.batches).saturating_mul(self.chunks).saturating_mul(self.groups)
    }
}

/// Scratch, besides what a sink needs for each thread: moments, two parameters, and the mean and factor of every channel of a batch; for each thread two vectors of
/// channels and a chunk with its result.
pub(crate) fn need(op: &GroupNorm, args: &[&TensorType]) -> Need {
    let cut = Cut::new(op, args[0]);
    let vectors = (2 + 2 * cut.batches).saturating_mul(cut.c);
    let per_thread = (2 + 2 * cut.rows_per_chunk).saturating_mul(cut.c);
    Need { shared: cut.moments().saturating_add(vectors), per_thread }
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(op: &GroupNorm, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
    let scratch = Scratch::new(workspace, need(op, &types));
    // SAFETY: passed on to the caller.
    unsafe { launch_into(op, args, &Memory::new(out), &scratch) };
}

/// Gives the result to `sink`.
///
/// # Safety
/// As for [`super::launch`]; `scratch` was made for [`need`] and the sink.
pub(crate) unsafe fn launch_into(op: &GroupNorm, args: &[Arg<'_>], sink: &dyn Sink, scratch: &Scratch<'_>) {
    let cut = Cut::new(op, args[0].ty);
    let (c, groups) = (cut.c, cut.groups);
    let x = Rows { ptr: Shared::new(args[0].ptr.cast_mut()), dtype: args[0].ty.dtype, c };
    let (tasks, work) = (cut.batches * cut.chunks, args[0].ty.elements());

    // Scratch begins at a cache line, so f64 may stand there.
    let moments = Shared::new(scratch.shared().get().cast::<Moments>());
    let vectors = scratch.shared().get().wrapping_add(cut.moments());
    // SAFETY: the shared scratch has these vectors behind the moments, and nothing else uses them.
    let (w, b, channel_mean, factor) = unsafe {
        let n = cut.batches * c;
        let vector = |at: usize| std::slice::from_raw_parts_mut(vectors.add(at), n);
        (wide(&args[1], c, vectors), wide(&args[2], c, vectors.add(c)), vector(2 * c), vector(2 * c + n))
    };

    for_each(tasks, work * 2, |task| {
        // SAFETY: called once per task.
        let (mean, rest) = unsafe { scratch.slot() }.split_at_mut(c);
        let (sums, room) = rest.split_at_mut(c);
        let (first, rows) = cut.chunk(task);
        // SAFETY: the chunk is inside the operand, and this task owns its moments.
        unsafe {
            let own = std::slice::from_raw_parts_mut(moments.get().add(task * groups), groups);
            chunk_moments(x.read(first, rows, room), c, own, mean, sums);
        }
    });
    // SAFETY: all moments were written.
    let moments = unsafe { std::slice::from_raw_parts(moments.get().cast_const(), tasks * groups) };
    for batch in 0..cut.batches {
        for g in 0..groups {
            let of_chunks = (0..cut.chunks).map(|k| {
                let task = batch * cut.chunks + k;
                let count = cut.chunk(task).1 * (c / groups);
                (count as f64, moments[task * groups + g])
            });
            let (n, [mean, squares]) = of_chunks.fold((0.0, [0.0; 2]), merge);
            let channels = batch * c + g * (c / groups)..batch * c + (g + 1) * (c / groups);
            channel_mean[channels.clone()].fill(mean as f32);
            factor[channels].fill((1.0 / (squares / n + op.eps.0).sqrt()) as f32);
        }
    }
    let (channel_mean, factor) = (&*channel_mean, &*factor);
    for_each(tasks, work, |task| {
        // SAFETY: called once per task.
        let (room, rest) = unsafe { scratch.slot() }[2 * c..].split_at_mut(cut.rows_per_chunk * c);
        let (result, room_of_sink) = rest.split_at_mut(cut.rows_per_chunk * c);
        let (first, rows) = cut.chunk(task);
        let channels = task / cut.chunks * c..(task / cut.chunks + 1) * c;
        let result = &mut result[..rows * c];
        // SAFETY: the chunk is inside the operand, and this task owns it in the result.
        unsafe {
            let source = x.read(first, rows, room);
            for (x, y) in source.chunks_exact(c).zip(result.chunks_exact_mut(c)) {
                affine(x, &channel_mean[channels.clone()], &factor[channels.clone()], w, b, y);
            }
            sink.take(Sums::dense(result, rows * c), &|_| first * c, room_of_sink);
        }
    });
}

/// Rows of `c` elements, one after the other.
struct Rows {
    ptr: Shared<u8>,
    dtype: DType,
    c: usize,
}

impl Rows {
    fn row(&self, row: usize) -> *mut u8 {
        self.ptr.get().wrapping_add(row * self.c * self.dtype.bytes())
    }

    /// Rows as f32: where they lie, or widened into `room`.
    ///
    /// # Safety
    /// The rows exist, nobody writes to them, and `room` holds as many floats.
    unsafe fn read<'a>(&self, first: usize, rows: usize, room: &'a mut [f32]) -> &'a [f32] {
        let n = rows * self.c;
        let src = self.row(first).cast_const();
        // SAFETY: passed on to the caller.
        unsafe {
            if self.dtype == DType::F32 {
                return std::slice::from_raw_parts(src.cast(), n);
            }
            load(self.dtype, src, &mut room[..n]);
        }
        &room[..n]
    }
}

/// Moments of every group over some rows; `mean` and `sums` are room for `c` floats each.
fn chunk_moments(x: &[f32], c: usize, moments: &mut [Moments], mean: &mut [f32], sums: &mut [f32]) {
    let per_group = c / moments.len();
    let n = (x.len() / c * per_group) as f64;
    let total = |sums: &[f32]| sums.iter().map(|&v| v as f64).sum::<f64>();
    sums.fill(0.0);
    add_rows(x, sums);
    for (g, m) in moments.iter_mut().enumerate() {
        let channels = g * per_group..(g + 1) * per_group;
        // What squares are taken around, exactly: merging relies on it.
        let centre = (total(&sums[channels.clone()]) / n) as f32;
        m[0] = centre as f64;
        mean[channels].fill(centre);
    }
    sums.fill(0.0);
    add_squares_around(x, mean, sums);
    for (g, m) in moments.iter_mut().enumerate() {
        m[1] = total(&sums[g * per_group..(g + 1) * per_group]);
    }
}

/// Moments of two sets together.
fn merge((n, [mean, squares]): (f64, Moments), (count, [other_mean, other]): (f64, Moments)) -> (f64, Moments) {
    let (total, distance) = (n + count, other_mean - mean);
    (total, [mean + distance * count / total, squares + other + distance * distance * n * count / total])
}

multiversion! {
    fn add_rows(x: &[f32], sums: &mut [f32]) {
        for row in x.chunks_exact(sums.len()) {
            for (s, &x) in sums.iter_mut().zip(row) {
                *s += x;
            }
        }
    }
}

multiversion! {
    fn add_squares_around(x: &[f32], mean: &[f32], sums: &mut [f32]) {
        for row in x.chunks_exact(sums.len()) {
            for ((s, &x), &m) in sums.iter_mut().zip(row).zip(mean) {
                *s = (x - m).mul_add(x - m, *s);
            }
        }
    }
}

multiversion! {
    fn affine(x: &[f32], mean: &[f32], factor: &[f32], w: &[f32], b: &[f32], y: &mut [f32]) {
        for (((((y, &x), &m), &f), &w), &b) in y.iter_mut().zip(x).zip(mean).zip(factor).zip(w).zip(b) {
            *y = ((x - m) * f).mul_add(w, b);
        }
    }
}
