//! Queries and keys that are normed and rotated where attention reads them.
//!
//! A norm spans a token with all its heads, or each head. Its factors are made first, in one pass over the operand, and
//! kept; norm and rotation are then applied to some heads of a token at a time, when queries or keys are loaded. Between
//! the steps values are rounded as if each had been stored.

use std::ops::Range;

use ltxc_ir::ops::RopeLayout;
use ltxc_ir::{DType, TensorType};

use super::Arg;
use super::element::{load, store};
use super::norm::{rms_factor, scale_all, scale_by, wide};
use super::parallel::{Scratch, Shared, for_each};
use super::rope::{Table, rotate_heads};

/// Elements per task of the first pass: few, so that threads end together where there are few tokens.
const TASK: usize = 1 << 13;

/// What is done to queries or keys before they are used.
pub(crate) struct Steps<'a> {
    /// A norm along rows of so many elements: a head or all heads of a token.
    pub norm: Option<Norm<'a>>,
    /// A rotation.
    pub rope: Option<Rotation<'a>>,
}

/// An `rms_norm`.
pub(crate) struct Norm<'a> {
    pub eps: f32,
    /// Elements of a row.
    pub row: usize,
    pub weight: Option<Arg<'a>>,
}

/// A `rope`, with its tables of cosines and sines.
pub(crate) struct Rotation<'a> {
    pub layout: RopeLayout,
    pub tables: [Arg<'a>; 2],
}

impl Steps<'_> {
    /// Floats that [`Heads`] keeps for all threads.
    pub(crate) fn shared(&self, x: &TensorType) -> usize {
        self.norm.as_ref().map_or(0, |n| x.elements() / n.row + n.row)
    }

    /// Floats that a thread needs: a row of the first pass, or what [`Heads::token`] needs for so many heads of dim `d`.
    pub(crate) fn room(&self, heads: usize, d: usize) -> usize {
        self.norm.as_ref().map_or(0, |n| n.row).max(room(heads, d))
    }
}

/// Floats that [`Heads::token`] needs for so many heads of dim `d`: them widened, normed and narrowed again, and angles.
fn room(heads: usize, d: usize) -> usize {
    heads.saturating_mul(d).saturating_mul(3).saturating_add(d)
}

/// Queries or keys with what is done to them: `[b, t, n, d]`.
pub(crate) struct Heads<'a> {
    x: Arg<'a>,
    norm: Option<Factors<'a>>,
    rope: Option<(RopeLayout, [Table; 2])>,
}

/// A norm with the factors that it multiplies rows with.
struct Factors<'a> {
    /// Of each row, once [`find_factors`] has run.
    factors: Shared<f32>,
    rows: usize,
    row: usize,
    eps: f32,
    weight: Option<&'a [f32]>,
}

impl Factors<'_> {
    /// Rows of a task that finds factors.
    fn per_task(&self) -> usize {
        (TASK / self.row).max(1)
    }

    fn tasks(&self) -> usize {
        self.rows.div_ceil(self.per_task())
    }

    /// # Safety
    /// The factor was found.
    unsafe fn of(&self, row: usize) -> f32 {
        // SAFETY: there is a factor for each row, and only [`find_factors`] writes them.
        unsafe { *self.factors.get().add(row) }
    }
}

/// Finds the factors of the norms of queries and keys, in one pass over each.
///
/// # Safety
/// Slots of `scratch` have [`Steps::room`]; nothing else uses the factors meanwhile.
pub(crate) unsafe fn find_factors(heads: [Option<&Heads<'_>>; 2], scratch: &Scratch<'_>) {
    let norms: Vec<(&Arg<'_>, &Factors<'_>)> =
        heads.into_iter().flatten().filter_map(|heads| Some((&heads.x, heads.norm.as_ref()?))).collect();
    let first = norms.first().map_or(0, |(_, norm)| norm.tasks());
    let tasks = norms.iter().map(|(_, norm)| norm.tasks()).sum();
    let elements: usize = norms.iter().map(|(x, _)| x.ty.elements()).sum();
    for_each(tasks, elements, |task| {
        let ((x, norm), task) = if task < first { (norms[0], task) } else { (norms[1], task - first) };
        let (dtype, per_task) = (x.ty.dtype, norm.per_task());
        // SAFETY: called once per task.
        let slot = unsafe { scratch.slot() };
        for row in task * per_task..norm.rows.min((task + 1) * per_task) {
            // SAFETY: the row is inside the operand, and this task owns its factor.
            unsafe {
                let src = x.ptr.add(row * norm.row * dtype.bytes());
                let elements = widen(dtype, src, &mut slot[..norm.row]);
                *norm.factors.get().add(row) = rms_factor(elements, norm.eps);
            }
        }
    });
}

impl<'a> Heads<'a> {
    /// What [`find_factors`] has yet to find the factors of.
    ///
    /// # Safety
    /// `steps` are those of a call on `x`; `kept` has room for [`Steps::shared`], which nothing else uses while the result
    /// lives.
    pub(crate) unsafe fn new(x: Arg<'a>, steps: &Steps<'a>, kept: *mut f32) -> Heads<'a> {
        let norm = steps.norm.as_ref().map(|norm| {
            let rows = x.ty.elements() / norm.row;
            // SAFETY: the weight has a row of elements and lies behind the factors.
            let weight = norm.weight.as_ref().map(|w| unsafe { wide(w, norm.row, kept.add(rows)) });
            Factors { factors: Shared::new(kept), rows, row: norm.row, eps: norm.eps, weight }
        });
        let rope = steps.rope.as_ref().map(|r| (r.layout, [Table::new(&r.tables[0]), Table::new(&r.tables[1])]));
        Heads { x, norm, rope }
    }

    /// Writes some heads of a token of a batch, as f32, side by side. `room` has what [`Steps::room`] says.
    ///
    /// # Safety
    /// There are such heads, their factors were found, and `out` has room for them.
    pub(crate) unsafe fn token(
        &self,
        [batch, token]: [usize; 2],
        heads: Range<usize>,
        out: &mut [f32],
        room: &mut [f32],
    ) {
        let [tokens, all, d] = [1, 2, 3].map(|a| self.x.ty.shape[a]);
        let (dtype, count, row) = (self.x.ty.dtype, heads.len() * d, batch * tokens + token);
        let (wide, rest) = room.split_at_mut(count);
        let (normed, rest) = rest.split_at_mut(count);
        let (narrow, angles) = rest.split_at_mut(count);
        let src = self.x.ptr.wrapping_add((row * all + heads.start) * d * dtype.bytes());
        // SAFETY: the heads are inside the operand.
        let x = unsafe { widen(dtype, src, wide) };
        let out = &mut out[..count];
        let norm = |norm: &Factors<'_>, y: &mut [f32], narrow: &mut [f32]| {
            if norm.row == d {
                for (h, head) in heads.clone().enumerate() {
                    // SAFETY: the factor was found.
                    let factor = unsafe { norm.of(row * all + head) };
                    scale(&x[h * d..][..d], factor, norm.weight, &mut y[h * d..][..d]);
                }
            } else {
                // SAFETY: as above.
                scale(x, unsafe { norm.of(row) }, norm.weight.map(|w| &w[heads.start * d..][..count]), y);
            }
            round(dtype, y, narrow);
        };
        let mut turn = |(layout, tables): &(RopeLayout, [Table; 2]), x: &[f32], y: &mut [f32], narrow: &mut [f32]| {
            // SAFETY: tables broadcast to the heads.
            unsafe { rotate_heads(*layout, tables, [batch, token, heads.start], d, x, angles, y) };
            round(dtype, y, narrow);
        };
        match (&self.norm, &self.rope) {
            (None, None) => out.copy_from_slice(x),
            (Some(factors), None) => norm(factors, out, narrow),
            (None, Some(rope)) => turn(rope, x, out, narrow),
            (Some(factors), Some(rope)) => {
                norm(factors, normed, narrow);
                turn(rope, normed, out, narrow);
            }
        }
    }
}

/// Applies a factor, and a weight if there is one.
fn scale(x: &[f32], factor: f32, weight: Option<&[f32]>, y: &mut [f32]) {
    match weight {
        Some(w) => scale_by(x, factor, w, y),
        None => scale_all(x, factor, y),
    }
}

/// Elements as f32: where they lie, or widened into `room`.
///
/// # Safety
/// `src` has as many elements as there is room for.
unsafe fn widen(dtype: DType, src: *const u8, room: &mut [f32]) -> &[f32] {
    // SAFETY: passed on to the caller.
    unsafe {
        if dtype == DType::F32 {
            return std::slice::from_raw_parts(src.cast(), room.len());
        }
        load(dtype, src, room);
    }
    room
}

/// Rounds to `dtype` and back; `narrow` is room for as many elements.
fn round(dtype: DType, x: &mut [f32], narrow: &mut [f32]) {
    if dtype != DType::F32 {
        debug_assert!(narrow.len() >= x.len());
        let narrow = narrow.as_mut_ptr().cast::<u8>();
        // SAFETY: no dtype is wider than f32.
        unsafe {
            store(dtype, x, narrow);
            load(dtype, narrow, x);
        }
    }
}
