//! Queries and keys that are normed and rotated where attention reads them.
//!
//! A norm spans a token with all its heads, or each head. Its factors are made first, in one pass over the operand, and
//! kept; norm and rotation are then applied to one head at a time, when a block of queries or keys is loaded. Between the
//! steps values are rounded as if each had been stored.

use ltxc_ir::ops::RopeLayout;
use ltxc_ir::{DType, TensorType};

use super::Arg;
use super::element::{load, store};
use super::norm::{rms_factor, scale_all, scale_by, wide};
use super::parallel::{Scratch, Shared, for_each};
use super::rope::{Table, rotate};
use super::tile::fetch_bytes;

/// Elements per task of the first pass.
const TASK: usize = 1 << 14;

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

    /// Floats that a thread needs: a row of the first pass, or what [`Heads::head`] needs.
    pub(crate) fn room(&self, x: &TensorType) -> usize {
        self.norm.as_ref().map_or(0, |n| n.row).max(room(x.shape[3]))
    }
}

/// Floats that [`Heads::head`] needs.
pub(crate) fn room(d: usize) -> usize {
    4 * d
}

/// Queries or keys with what is done to them: `[b, t, n, d]`.
pub(crate) struct Heads<'a> {
    x: Arg<'a>,
    norm: Option<Factors<'a>>,
    rope: Option<(RopeLayout, [Table; 2])>,
}

/// A norm whose factors are known.
struct Factors<'a> {
    /// Of each row.
    factors: &'a [f32],
    row: usize,
    weight: Option<&'a [f32]>,
}

impl<'a> Heads<'a> {
    /// Makes the factors of the norm.
    ///
    /// # Safety
    /// `steps` are those of a call on `x`; `kept` has room for [`Steps::shared`], which nothing else uses while the result
    /// lives, and slots have [`Steps::room`].
    pub(crate) unsafe fn new(x: Arg<'a>, steps: &Steps<'a>, kept: *mut f32, scratch: &Scratch<'_>) -> Heads<'a> {
        let norm = steps.norm.as_ref().map(|norm| {
            let rows = x.ty.elements() / norm.row;
            let (factors, from, dtype) = (Shared::new(kept), Shared::new(x.ptr.cast_mut()), x.ty.dtype);
            let per_task = (TASK / norm.row).max(1);
            for_each(rows.div_ceil(per_task), x.ty.elements(), |task| {
                // SAFETY: called once per task.
                let slot = unsafe { scratch.slot() };
                for row in task * per_task..rows.min((task + 1) * per_task) {
                    // SAFETY: the row is inside the operand, and this task owns its factor.
                    unsafe {
                        let first = from.get().add(row * norm.row * dtype.bytes());
                        let elements = widen(dtype, first, &mut slot[..norm.row]);
                        *factors.get().add(row) = rms_factor(elements, norm.eps);
                    }
                }
            });
            // SAFETY: all factors were written; the weight has a row of elements and lies behind them.
            unsafe {
                let weight = norm.weight.as_ref().map(|w| wide(w, norm.row, kept.add(rows)));
                Factors { factors: std::slice::from_raw_parts(kept, rows), row: norm.row, weight }
            }
        });
        let rope = steps.rope.as_ref().map(|r| (r.layout, [Table::new(&r.tables[0]), Table::new(&r.tables[1])]));
        Heads { x, norm, rope }
    }

    /// Asks for what [`Heads::head`] reads. Heads of tokens that follow each other are a page apart, which machines do not
    /// foresee.
    pub(crate) fn fetch(&self, [batch, token, head]: [usize; 3]) {
        let [tokens, heads, d] = [1, 2, 3].map(|a| self.x.ty.shape[a]);
        let bytes = d * self.x.ty.dtype.bytes();
        fetch_bytes(self.x.ptr.wrapping_add(((batch * tokens + token) * heads + head) * bytes), bytes);
        for table in self.rope.iter().flat_map(|(_, tables)| tables) {
            table.fetch([batch, token, head], d / 2);
        }
    }

    /// Head `head` of token `token` of a batch, as f32 where it lies or in `room`, which has [`room`] floats.
    ///
    /// # Safety
    /// There is such a head.
    pub(crate) unsafe fn head<'r>(&self, [batch, token, head]: [usize; 3], room: &'r mut [f32]) -> &'r [f32] {
        let [tokens, heads, d] = [1, 2, 3].map(|a| self.x.ty.shape[a]);
        let dtype = self.x.ty.dtype;
        let (first, rest) = room.split_at_mut(d);
        let (second, rest) = rest.split_at_mut(d);
        let (angles, narrow) = rest.split_at_mut(d);
        let number = (batch * tokens + token) * heads + head;
        let norm = |norm: &Factors<'_>, x: &[f32], y: &mut [f32], narrow: &mut [f32]| {
            let (row, column) = if norm.row == d { (number, 0) } else { (batch * tokens + token, head * d) };
            match norm.weight {
                Some(w) => scale_by(x, norm.factors[row], &w[column..column + d], y),
                None => scale_all(x, norm.factors[row], y),
            }
            round(dtype, y, narrow);
        };
        let mut turn =
            |(layout, [cos, sin]): &(RopeLayout, [Table; 2]), x: &[f32], y: &mut [f32], narrow: &mut [f32]| {
                let (cos_room, sin_room) = angles.split_at_mut(d / 2);
                let index = [batch, token, head];
                // SAFETY: tables broadcast to the heads.
                unsafe {
                    let cos = cos.read(index, d / 2, cos_room.as_mut_ptr());
                    let sin = sin.read(index, d / 2, sin_room.as_mut_ptr());
                    rotate(*layout, x, cos, sin, y);
                }
                round(dtype, y, narrow);
            };
        let src = self.x.ptr.wrapping_add(number * d * dtype.bytes());
        // SAFETY: the head is inside the operand.
        unsafe {
            match (&self.norm, &self.rope) {
                (None, None) => widen(dtype, src, first),
                (Some(factors), None) => {
                    norm(factors, widen(dtype, src, first), second, narrow);
                    second
                }
                (None, Some(rope)) => {
                    turn(rope, widen(dtype, src, first), second, narrow);
                    second
                }
                (Some(factors), Some(rope)) => {
                    norm(factors, widen(dtype, src, first), second, narrow);
                    turn(rope, second, first, narrow);
                    first
                }
            }
        }
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
