//! Convolutions with few channels per group: a unit makes a word of the result, element by element.

use cubecl::prelude::*;
use ltxc_ir::ops::PadMode;
use ltxc_ir::{DType, Float};

use super::call::{Call, to_u32};
use super::patches::{BASE, EXTENT, POSITIONS, STEP, STRIDE, activated, number, source_index, split, split_taps};
use super::program::{Tail, finished};
use super::storage::{self, load};
use super::store::{Store, lane_position, store_word};

/// What a kernel is built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    x: DType,
    w: DType,
    out: DType,
    axes: usize,
    is_transposed: bool,
    /// What stands outside of the input, per axis.
    outside: Vec<PadMode>,
    /// Slope of the leaky ReLU through which elements are read.
    slope: Option<Float>,
}

/// `numbers` are those of the axes, whose positions are the places of the result.
pub(crate) fn launch<R: Runtime>(
    numbers: &[u32],
    axes: usize,
    groups: usize,
    is_transposed: bool,
    call: &Call<'_, R>,
) -> Result<(), String> {
    let (x, w, out) = (call.args[0].ty, call.args[1].ty, call.out.ty);
    let [ci, co] = [x, out].map(|ty| ty.shape.last().copied().unwrap_or(1));
    let taps: usize = w.shape[..axes].iter().product();
    let (outside, slope) = (call.outside(), call.slope());
    let blueprint = Blueprint { x: x.dtype, w: w.dtype, out: out.dtype, axes, is_transposed, outside, slope };
    let (count, dim) = call.linear(storage::words(out.dtype, out.elements()))?;
    let mut arg = SequenceArg::new();
    numbers.iter().for_each(|&n| arg.push(n));
    let [each_in, each_out, ci, co, taps, n] = [ci / groups, co / groups, ci, co, taps, out.elements()].map(to_u32);
    // SAFETY: units beyond the result do nothing; elements outside of the input are not read.
    unsafe {
        convolve::launch_unchecked::<R>(
            call.client,
            count,
            dim,
            call.arg(0),
            call.arg(1),
            call.outs(),
            call.tail()?,
            call.store()?,
            arg,
            each_in?,
            each_out?,
            ci?,
            co?,
            taps?,
            n?,
            blueprint,
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn convolve(
    x: &Array<u32>,
    w: &Array<u32>,
    outs: &mut Sequence<Array<u32>>,
    tail: &Tail,
    store: &Store,
    axes: &Sequence<u32>,
    each_in: u32,
    each_out: u32,
    ci: u32,
    co: u32,
    taps: u32,
    n: u32,
    #[comptime] blueprint: Blueprint,
) {
    let lanes = comptime!(storage::per_word(blueprint.out));
    let count = comptime!(blueprint.axes);
    let word = ABSOLUTE_POS as u32;
    if word * lanes < n {
        let mut bits = 0u32;
        for lane in 0..lanes {
            let element = lane_position(word, lane, co, store, lanes);
            if element < n {
                let row = element / co;
                let column = element - row * co;
                let first = (column / each_out) * each_in;
                let at = split(row, axes, POSITIONS, count);
                let mut sum = 0f32.runtime();
                for tap in 0..taps {
                    let tap_at = split_taps(tap, axes, count);
                    let mut source = *at.index(0usize);
                    let mut is_inside = true;
                    #[unroll]
                    for a in 0..count {
                        let base = i32::reinterpret(number(axes, a, BASE));
                        let step = i32::reinterpret(number(axes, a, STEP));
                        let stride = i32::reinterpret(number(axes, a, STRIDE));
                        let extent = number(axes, a, EXTENT);
                        let position = i32::reinterpret(*at.index(comptime!(a + 1)));
                        let moved = base + i32::reinterpret(*tap_at.index(comptime!(a + 1))) * step;
                        let index = if comptime!(blueprint.is_transposed) {
                            let distance = position + moved;
                            let quotient = distance / stride;
                            is_inside = is_inside && quotient * stride == distance;
                            quotient
                        } else {
                            position * stride + moved
                        };
                        let mode = comptime!(blueprint.outside.get(a).copied().unwrap_or(PadMode::Zeros));
                        if comptime!(mode == PadMode::Zeros) {
                            is_inside = is_inside && index >= 0i32 && index < i32::reinterpret(extent);
                        }
                        let chosen = source_index(index, i32::reinterpret(extent), mode);
                        source = source * extent + u32::reinterpret(chosen);
                    }
                    if is_inside {
                        for i in 0..each_in {
                            let value = load(x, source * ci + first + i, comptime!(blueprint.x));
                            let value = activated(value, comptime!(blueprint.x), comptime!(blueprint.slope));
                            let weight = load(w, (tap * each_in + i) * co + column, comptime!(blueprint.w));
                            sum += value * weight;
                        }
                    }
                }
                bits |= finished(sum, element, lane, tail);
            }
        }
        store_word(bits, lane_position(word, 0u32, co, store, lanes), outs, store, lanes);
    }
}
