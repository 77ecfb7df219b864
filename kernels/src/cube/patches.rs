//! The input under a convolution as left matrix of a product: a row per position of the result, a column per tap and
//! channel.
//!
//! Along an axis, position `q` and tap `t` read element `q · stride + base + t · step`, or 0 outside; they use row
//! `weight_base + t · weight_step` of the kernel and belong to place `q · out_step + out_base` of the result. That covers
//! convolutions, and each phase of a transposed one: the places of the result that the same taps reach. Pads in front of a
//! convolution only change what stands outside, and a leaky ReLU what elements are read as.

use cubecl::prelude::*;
use ltxc_ir::DType;
use ltxc_ir::ops::PadMode;
use ltxc_ir::plan::MapFunction;

use super::call::to_u32;
use super::matrix_units::{self, Load};
use super::steps;
use super::storage::{self, load_four, load_one};

/// What a kernel is built for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Patches {
    /// Spatial axes.
    pub(crate) axes: usize,
    /// Channels of a group in the input; not part of a blueprint.
    pub(crate) channels: usize,
    /// Whether rows of the product are those of the result, and rows of the kernel are used in order.
    pub(crate) is_dense: bool,
    /// What stands outside of the input, per axis; zeros if there are none.
    pub(crate) outside: Vec<PadMode>,
    /// Slope of the leaky ReLU through which elements are read.
    pub(crate) slope: Option<ltxc_ir::Float>,
}

impl Patches {
    /// What does not change from launch to launch.
    pub(crate) fn without_numbers(&self) -> Patches {
        Patches { channels: 0, ..self.clone() }
    }
}

/// One spatial axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axis {
    /// Positions.
    pub(crate) positions: usize,
    /// Extent of the input.
    pub(crate) extent: usize,
    pub(crate) stride: usize,
    pub(crate) base: i64,
    pub(crate) taps: usize,
    pub(crate) step: i64,
    /// Extent of the kernel, and which of its rows are used.
    pub(crate) weight_extent: usize,
    pub(crate) weight_base: usize,
    pub(crate) weight_step: usize,
    /// Extent of the result, and which of its places are made.
    pub(crate) out_extent: usize,
    pub(crate) out_base: usize,
    pub(crate) out_step: usize,
}

/// Numbers of an axis in the argument of a launch, in the order of the fields.
const NUMBERS: usize = 12;
pub(crate) const POSITIONS: usize = 0;
pub(crate) const EXTENT: usize = 1;
pub(crate) const STRIDE: usize = 2;
pub(crate) const BASE: usize = 3;
pub(crate) const TAPS: usize = 4;
pub(crate) const STEP: usize = 5;
const WEIGHT_EXTENT: usize = 6;
const WEIGHT_BASE: usize = 7;
const WEIGHT_STEP: usize = 8;
const OUT_EXTENT: usize = 9;
const OUT_BASE: usize = 10;
const OUT_STEP: usize = 11;

impl Axis {
    /// The numbers of the axis.
    ///
    /// # Errors
    /// If an index may leave 31 bits.
    pub(crate) fn numbers(&self) -> Result<[u32; NUMBERS], String> {
        let most = i64::from(i32::MAX / 2);
        let far = |n: usize, step: i64| i64::try_from(n).ok().and_then(|n| n.checked_mul(step));
        let reach = [
            Some(self.base),
            Some(self.step),
            i64::try_from(self.extent).ok(),
            i64::try_from(self.stride).ok().and_then(|stride| far(self.positions, stride)),
            far(self.taps, self.step),
        ];
        if reach.iter().any(|r| r.is_none_or(|r| r.unsigned_abs() > most as u64)) {
            return Err(format!("convolution over {self:?} is more than kernels count"));
        }
        Ok([
            to_u32(self.positions)?,
            to_u32(self.extent)?,
            to_u32(self.stride)?,
            self.base as i32 as u32,
            to_u32(self.taps)?,
            self.step as i32 as u32,
            to_u32(self.weight_extent)?,
            to_u32(self.weight_base)?,
            to_u32(self.weight_step)?,
            to_u32(self.out_extent)?,
            to_u32(self.out_base)?,
            to_u32(self.out_step)?,
        ])
    }
}

/// One number of an axis.
#[cube]
pub(crate) fn number(axes: &Sequence<u32>, #[comptime] axis: usize, #[comptime] which: usize) -> u32 {
    *axes.index(comptime!(axis * NUMBERS + which))
}

/// Splits an index over all taps into one per axis, outermost first, behind a 0.
#[cube]
pub(crate) fn split_taps(tap: u32, axes: &Sequence<u32>, #[comptime] count: usize) -> Sequence<u32> {
    let mut reversed = Sequence::<u32>::new();
    let mut rest = tap;
    #[unroll]
    for i in 0..comptime!(count - 1) {
        let extent = number(axes, comptime!(count - 1 - i), TAPS);
        let quotient = rest / extent;
        reversed.push(rest - quotient * extent);
        rest = quotient;
    }
    reversed.push(rest);
    let mut ordered = Sequence::<u32>::new();
    ordered.push(0u32.runtime());
    #[unroll]
    for i in 0..count {
        ordered.push(*reversed.index(comptime!(count - 1 - i)));
    }
    ordered
}

/// Splits an index over all axes into one per axis, outermost first; what remains is in front.
#[cube]
pub(crate) fn split(
    index: u32,
    axes: &Sequence<u32>,
    #[comptime] which: usize,
    #[comptime] count: usize,
) -> Sequence<u32> {
    let mut reversed = Sequence::<u32>::new();
    let mut rest = index;
    #[unroll]
    for i in 0..count {
        let extent = number(axes, comptime!(count - 1 - i), which);
        let quotient = rest / extent;
        reversed.push(rest - quotient * extent);
        rest = quotient;
    }
    reversed.push(rest);
    let mut ordered = Sequence::<u32>::new();
    #[unroll]
    for i in 0..comptime!(count + 1) {
        ordered.push(*reversed.index(comptime!(count - i)));
    }
    ordered
}

/// Pushes where a row begins: its batch, and its first element along each axis, which may lie outside.
#[cube]
pub(crate) fn push_start(starts: &mut Sequence<i32>, row: u32, axes: &Sequence<u32>, #[comptime] patches: Patches) {
    let at = split(row, axes, POSITIONS, comptime!(patches.axes));
    starts.push(i32::cast_from(*at.index(0usize)));
    #[unroll]
    for a in 0..comptime!(patches.axes) {
        let position = i32::cast_from(*at.index(comptime!(a + 1)) * number(axes, a, STRIDE));
        starts.push(position + i32::reinterpret(number(axes, a, BASE)));
    }
}

/// Four summed elements of row slot `s`, 0 from `k` on. `offset` is the first channel of the group.
#[cube]
pub(crate) fn four<N: Size>(
    x: &Array<Vector<u32, N>>,
    starts: &Sequence<i32>,
    summed: u32,
    k: u32,
    axes: &Sequence<u32>,
    channels: u32,
    offset: u32,
    #[comptime] s: usize,
    #[comptime] dtype: DType,
    #[comptime] is_aligned: bool,
    #[comptime] patches: Patches,
) -> Vector<f32, Const<4>> {
    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
    if is_aligned {
        if summed < k {
            let (element, is_inside) = element(starts, summed, axes, channels, s, comptime!(patches.clone()));
            if is_inside {
                values = load_four::<N>(x, element + offset, dtype);
                if comptime!(patches.slope.is_some()) {
                    #[unroll]
                    for i in 0..4usize {
                        values[i] = activated(values[i], dtype, comptime!(patches.slope));
                    }
                }
            }
        }
    } else {
        #[unroll]
        for i in 0..4usize {
            let at = summed + comptime!(i as u32);
            if at < k {
                let (element, is_inside) = element(starts, at, axes, channels, s, comptime!(patches.clone()));
                if is_inside {
                    values[i] = activated(load_one::<N>(x, element + offset, dtype), dtype, comptime!(patches.slope));
                }
            }
        }
    }
    values
}

/// The vector of a matrix unit from `summed` on, of row slot `s`; 0 from `k` on. `offset` is the first channel of the
/// group.
#[cube]
pub(crate) fn vector<E: Float, S: Size, W: Size>(
    x: &Array<Vector<u32, W>>,
    starts: &Sequence<i32>,
    summed: u32,
    k: u32,
    axes: &Sequence<u32>,
    channels: u32,
    offset: u32,
    #[comptime] s: usize,
    #[comptime] load: Load,
    #[comptime] patches: Patches,
) -> Vector<E, S> {
    let mut values = Vector::<E, S>::new(E::new(0.0));
    if comptime!(load.is_aligned) {
        if summed < k {
            let (element, is_inside) = element(starts, summed, axes, channels, s, comptime!(patches.clone()));
            if is_inside {
                values = matrix_units::whole::<E, S, W>(x, element + offset, load);
                if comptime!(patches.slope.is_some()) {
                    #[unroll]
                    for i in 0..comptime!(load.vector as usize) {
                        let value = f32::cast_from(values[i]);
                        values[i] = E::cast_from(activated(value, comptime!(load.dtype), comptime!(patches.slope)));
                    }
                }
            }
        }
    } else {
        #[unroll]
        for i in 0..comptime!(load.vector as usize) {
            let at = summed + comptime!(i as u32);
            if at < k {
                let (element, is_inside) = element(starts, at, axes, channels, s, comptime!(patches.clone()));
                if is_inside {
                    let value = storage::load_one::<W>(x, element + offset, comptime!(load.dtype));
                    values[i] = E::cast_from(activated(value, comptime!(load.dtype), comptime!(patches.slope)));
                }
            }
        }
    }
    values
}

/// An element of a dtype, through the leaky ReLU of a slope if there is one.
#[cube]
pub(crate) fn activated(value: f32, #[comptime] dtype: DType, #[comptime] slope: Option<ltxc_ir::Float>) -> f32 {
    if comptime!(slope.is_some()) {
        let function = comptime!(MapFunction::LeakyRelu(slope.unwrap_or(ltxc_ir::Float(1.0))));
        storage::rounded(steps::function(value, function), dtype)
    } else {
        value
    }
}

/// The element of the input that a row slot reads for a summed element, and whether there is one.
#[cube]
fn element(
    starts: &Sequence<i32>,
    summed: u32,
    axes: &Sequence<u32>,
    channels: u32,
    #[comptime] s: usize,
    #[comptime] patches: Patches,
) -> (u32, bool) {
    let count = comptime!(patches.axes);
    let tap = summed / channels;
    let taps = split_taps(tap, axes, count);
    let mut element = u32::cast_from(*starts.index(comptime!(s * (count + 1))));
    let mut is_inside = true;
    #[unroll]
    for a in 0..count {
        let step = i32::reinterpret(number(axes, a, STEP));
        let at =
            *starts.index(comptime!(s * (count + 1) + 1 + a)) + i32::cast_from(*taps.index(comptime!(a + 1))) * step;
        let extent = number(axes, a, EXTENT);
        let mode = comptime!(patches.outside.get(a).copied().unwrap_or(PadMode::Zeros));
        let source = source_index(at, i32::cast_from(extent), mode);
        if comptime!(mode == PadMode::Zeros) {
            is_inside = is_inside && at >= 0i32 && at < i32::cast_from(extent);
        }
        element = element * extent + u32::reinterpret(source);
    }
    // All groups together have `input_channels`, which is the last number.
    let all = *axes.index(comptime!(count * NUMBERS));
    (element * all + summed % channels, is_inside)
}

/// The element along an axis that stands at an index, which may lie outside. Zeros have none, and keep the index.
#[cube]
pub(crate) fn source_index(index: i32, extent: i32, #[comptime] mode: PadMode) -> i32 {
    match comptime!(mode) {
        PadMode::Zeros => index,
        PadMode::Edge => {
            let raised = select(index < 0i32, 0i32, index);
            select(raised >= extent, extent - 1i32, raised)
        }
        PadMode::Reflect => {
            let raised = select(index < 0i32, 0i32 - index, index);
            select(raised >= extent, 2i32 * (extent - 1i32) - raised, raised)
        }
        PadMode::Circular => {
            let raised = select(index < 0i32, index + extent, index);
            select(raised >= extent, raised - extent, raised)
        }
    }
}

/// The row of the kernel for a summed element.
#[cube]
pub(crate) fn weight_row(summed: u32, axes: &Sequence<u32>, channels: u32, #[comptime] patches: Patches) -> u32 {
    let taps = split_taps(summed / channels, axes, comptime!(patches.axes));
    let mut row = 0u32;
    #[unroll]
    for a in 0..comptime!(patches.axes) {
        let tap = number(axes, a, WEIGHT_BASE) + *taps.index(comptime!(a + 1)) * number(axes, a, WEIGHT_STEP);
        row = row * number(axes, a, WEIGHT_EXTENT) + tap;
    }
    row * channels + summed % channels
}

/// The row of the result for a row of the product.
#[cube]
pub(crate) fn result_row(row: u32, axes: &Sequence<u32>, #[comptime] patches: Patches) -> u32 {
    let at = split(row, axes, POSITIONS, comptime!(patches.axes));
    let mut result = *at.index(0usize);
    #[unroll]
    for a in 0..comptime!(patches.axes) {
        let place = number(axes, a, OUT_BASE) + *at.index(comptime!(a + 1)) * number(axes, a, OUT_STEP);
        result = result * number(axes, a, OUT_EXTENT) + place;
    }
    result
}
