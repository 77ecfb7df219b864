//! `rope`: rotates pairs of elements of every head by the angles of its token.

use ltxc_ir::ops::{Rope, RopeLayout};
use ltxc_ir::{DType, TensorType};

use super::element::{load, store};
use super::parallel::{Need, Scratch, Shared, for_each};
use super::simd::multiversion;
use super::{Arg, Output};

/// Elements per task, about.
const TASK: usize = 1 << 14;

/// Work per element.
const WEIGHT: usize = 3;

/// Scratch: for each thread a token, its result, and angles of a head.
pub(crate) fn need(args: &[&TensorType]) -> Need {
    let [heads, d] = [2, 3].map(|a| args[0].shape[a]);
    Need { shared: 0, per_thread: heads.saturating_mul(d).saturating_mul(2).saturating_add(d) }
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(op: &Rope, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let x = args[0];
    let scratch = Scratch::new(workspace, need(&[x.ty]));
    let [batches, tokens, heads, d] = [0, 1, 2, 3].map(|a| x.ty.shape[a]);
    let (dtype, bytes, n) = (x.ty.dtype, x.ty.dtype.bytes(), heads * d);
    let tables = [Table::new(&args[1]), Table::new(&args[2])];
    let (from, to) = (Shared::new(x.ptr.cast_mut()), Shared::new(out.ptr));
    let rows = batches * tokens;
    let per_task = (TASK / n.max(1)).max(1);
    for_each(rows.div_ceil(per_task), out.ty.elements() * WEIGHT, |task| {
        // SAFETY: called once per task.
        let (input, rest) = unsafe { scratch.slot() }.split_at_mut(n);
        let (result, angles) = rest.split_at_mut(n);
        for row in task * per_task..rows.min((task + 1) * per_task) {
            let first = [row / tokens, row % tokens, 0];
            let (src, dst) = (from.get().wrapping_add(row * n * bytes), to.get().wrapping_add(row * n * bytes));
            // SAFETY: the token is inside operand and result, and this task owns it. A result that is not the operand
            // itself does not overlap it.
            unsafe {
                let x = if dtype == DType::F32 {
                    std::slice::from_raw_parts(src.cast_const().cast::<f32>(), n)
                } else {
                    load(dtype, src, input);
                    &*input
                };
                if dtype == DType::F32 && src != dst {
                    let y = std::slice::from_raw_parts_mut(dst.cast::<f32>(), n);
                    rotate_heads(op.layout, &tables, first, d, x, angles, y);
                } else {
                    rotate_heads(op.layout, &tables, first, d, x, angles, result);
                    store(dtype, result, dst);
                }
            }
        }
    });
}

/// A table of cosines or sines that broadcasts to `[b, t, n, d/2]`.
pub(crate) struct Table {
    ptr: *const u8,
    dtype: DType,
    /// Elements from index to index, 0 where it repeats.
    strides: [usize; 4],
}

// SAFETY: only read, and valid for the time of a launch by the contract of `launch`.
unsafe impl Sync for Table {}

impl Table {
    pub(crate) fn new(arg: &Arg<'_>) -> Table {
        let strides = arg.ty.strides();
        let strides = [0, 1, 2, 3].map(|a| if arg.ty.shape[a] == 1 { 0 } else { strides[a] });
        Table { ptr: arg.ptr, dtype: arg.ty.dtype, strides }
    }

    /// The `n` values of a head: where they lie, or widened into `room`.
    ///
    /// # Safety
    /// The index is inside the shape that the table broadcasts to; `room` is valid for `n` floats, which nothing else
    /// uses while the result lives.
    pub(crate) unsafe fn read<'a>(&self, index: [usize; 3], n: usize, room: *mut f32) -> &'a [f32] {
        let offset: usize = index.iter().zip(self.strides).map(|(i, s)| i * s).sum();
        // SAFETY: passed on to the caller.
        unsafe {
            let src = self.ptr.add(offset * self.dtype.bytes());
            if self.dtype == DType::F32 && (self.strides[3] == 1 || n == 1) {
                return std::slice::from_raw_parts(src.cast(), n);
            }
            let room = std::slice::from_raw_parts_mut(room, n);
            if self.strides[3] == 1 {
                load(self.dtype, src, room);
            } else if n > 0 {
                load(self.dtype, src, &mut room[..1]);
                let value = room[0];
                room.fill(value);
            }
            room
        }
    }
}

/// Rotates heads of a token that lie side by side, from head `first` on. `angles` has room for `d` floats.
///
/// # Safety
/// `tables` broadcast to these heads.
pub(crate) unsafe fn rotate_heads(
    layout: RopeLayout,
    tables: &[Table; 2],
    [batch, token, first]: [usize; 3],
    d: usize,
    x: &[f32],
    angles: &mut [f32],
    y: &mut [f32],
) {
    let (cos_room, sin_room) = angles.split_at_mut(d / 2);
    let changes = tables.iter().any(|t| t.strides[2] != 0);
    let [mut cos, mut sin]: [&[f32]; 2] = [&[]; 2];
    for (h, (x, y)) in x.chunks_exact(d.max(1)).zip(y.chunks_exact_mut(d.max(1))).enumerate() {
        if h == 0 || changes {
            // SAFETY: passed on to the caller; the rooms are used for nothing else until the next angles are read.
            unsafe {
                cos = tables[0].read([batch, token, first + h], d / 2, cos_room.as_mut_ptr());
                sin = tables[1].read([batch, token, first + h], d / 2, sin_room.as_mut_ptr());
            }
        }
        rotate(layout, x, cos, sin, y);
    }
}

/// Rotates a head.
fn rotate(layout: RopeLayout, x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
    match layout {
        RopeLayout::Split => rotate_halves(x, cos, sin, y),
        RopeLayout::Interleaved => rotate_neighbours(x, cos, sin, y),
    }
}

multiversion! {
    fn rotate_halves(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
        let half = x.len() / 2;
        let ((a, b), (p, q)) = (x.split_at(half), y.split_at_mut(half));
        let (b, q, cos, sin) = (&b[..half], &mut q[..half], &cos[..half], &sin[..half]);
        for i in 0..half {
            p[i] = a[i] * cos[i] - b[i] * sin[i];
            q[i] = b[i] * cos[i] + a[i] * sin[i];
        }
    }
}

multiversion! {
    fn rotate_neighbours(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
        let (x, _) = x.as_chunks::<2>();
        let (y, _) = y.as_chunks_mut::<2>();
        for (((y, &[a, b]), &c), &s) in y.iter_mut().zip(x).zip(cos).zip(sin) {
            *y = [a * c - b * s, b * c + a * s];
        }
    }
}
