//! `conv` and `conv_transpose`: products of the patches of the input and the kernel, one launch for all groups.
//!
//! A transposed convolution is one product per phase: places of the result at a distance of the stride are reached by
//! the same taps. Few channels per group do not fill the tile of a product; then [`super::direct_conv`] computes.

use cubecl::prelude::*;
use ltxc_ir::TensorType;
use ltxc_ir::ops::{Conv, ConvTranspose};

use super::call::{Call, to_u32};
use super::direct_conv;
use super::gemm::{self, Product};
use super::patches::{Axis, Patches};
use super::storage;

/// Channels of the result in a group from which on a product pays.
const PRODUCT_CHANNELS: usize = 16;

/// Whether a product computes the result, in which `co` is the number of channels.
fn is_product(groups: usize, co: usize) -> bool {
    co / groups >= PRODUCT_CHANNELS
}

/// Whether units own the words they write: those of a product write rows of a group.
pub(crate) fn is_whole(groups: usize, out: &TensorType) -> bool {
    let co = out.shape.last().copied().unwrap_or(1);
    !is_product(groups, co) || (co / groups).is_multiple_of(storage::per_word(out.dtype) as usize)
}

/// Extents of a call of either direction, with a kernel of `[k.., ci / groups, co]`.
struct Shapes<'a> {
    b: usize,
    x: &'a [usize],
    w: &'a [usize],
    out: &'a [usize],
    ci: usize,
    co: usize,
}

impl<'a> Shapes<'a> {
    fn new<R: Runtime>(call: &'a Call<'_, R>) -> Shapes<'a> {
        let (x, w, out) = (&call.args[0].ty.shape, &call.args[1].ty.shape, &call.out.ty.shape);
        let n = x.len() - 2;
        Shapes { b: x[0], x: &x[1..=n], w: &w[..n], out: &out[1..=n], ci: x[n + 1], co: w[n + 1] }
    }
}

pub(crate) fn launch<R: Runtime>(op: &Conv, call: &Call<'_, R>) -> Result<(), String> {
    let shapes = Shapes::new(call);
    let axes = (0..op.stride.len()).map(|a| {
        Ok(Axis {
            positions: shapes.out[a],
            extent: shapes.x[a],
            stride: op.stride[a],
            base: -signed(op.pad[a].0 + call.before(a))?,
            taps: shapes.w[a],
            step: signed(op.dilation[a])?,
            weight_extent: shapes.w[a],
            weight_base: 0,
            weight_step: 1,
            out_extent: shapes.out[a],
            out_base: 0,
            out_step: 1,
        })
    });
    let axes = axes.collect::<Result<Vec<Axis>, String>>()?;
    if shapes.ci == 0 {
        super::fill_zeros(call)
    } else if is_product(op.groups, shapes.co) {
        product(&axes, op.groups, &shapes, true, call)
    } else {
        let numbers = axis_numbers(&axes, shapes.ci)?;
        direct_conv::launch(&numbers, axes.len(), op.groups, false, call)
    }
}

pub(crate) fn launch_transpose<R: Runtime>(op: &ConvTranspose, call: &Call<'_, R>) -> Result<(), String> {
    let shapes = Shapes::new(call);
    if shapes.ci == 0 {
        return super::fill_zeros(call);
    }
    if !is_product(op.groups, shapes.co) {
        // Place `o` and tap `t` meet element `(o + lo − t · dilation) / stride` of the padded input, where that is one.
        let axes = (0..op.stride.len()).map(|a| {
            Ok(Axis {
                positions: shapes.out[a],
                extent: shapes.x[a],
                stride: op.stride[a],
                base: signed(op.pad[a].0)? - signed(call.before(a))? * signed(op.stride[a])?,
                taps: shapes.w[a],
                step: -signed(op.dilation[a])?,
                weight_extent: shapes.w[a],
                weight_base: 0,
                weight_step: 1,
                out_extent: shapes.out[a],
                out_base: 0,
                out_step: 1,
            })
        });
        let axes = axes.collect::<Result<Vec<Axis>, String>>()?;
        let numbers = axis_numbers(&axes, shapes.ci)?;
        return direct_conv::launch(&numbers, axes.len(), op.groups, true, call);
    }
    let phases = (0..op.stride.len())
        .map(|a| {
            let mut phases =
                phases(op.stride[a], op.dilation[a], op.pad[a].0, shapes.x[a], shapes.w[a], shapes.out[a])?;
            let before = signed(call.before(a))?;
            phases.iter_mut().for_each(|phase| phase.base -= before);
            Ok(phases)
        })
        .collect::<Result<Vec<Vec<Axis>>, String>>()?;
    // What no tap reaches stays zero.
    if phases.iter().any(|axis| axis.iter().any(|phase| phase.taps == 0)) {
        super::fill_zeros(call)?;
    }
    let count: usize = phases.iter().map(Vec::len).product();
    for index in 0..count {
        let mut rest = index;
        let axes: Vec<Axis> = phases
            .iter()
            .map(|axis| {
                let phase = axis[rest % axis.len()];
                rest /= axis.len();
                phase
            })
            .collect();
        if axes.iter().all(|axis| axis.taps > 0) {
            product(&axes, op.groups, &shapes, false, call)?;
        }
    }
    Ok(())
}

/// The phases of an axis of a transposed convolution that have places in the result.
fn phases(
    stride: usize,
    dilation: usize,
    lo: usize,
    extent: usize,
    taps: usize,
    out: usize,
) -> Result<Vec<Axis>, String> {
    let (s, d, lo) = (signed(stride)?, signed(dilation)?, signed(lo)?);
    // Taps of a phase are at a distance of `every`, which moves the input by `step` elements.
    let common = greatest_common_divisor(stride, dilation);
    let (every, step) = (stride / common, d / signed(common)?);
    let phase = |p: usize| {
        let place = signed(p)? + lo;
        let first = (0..every.min(taps)).find(|&t| (place - t as i64 * d).rem_euclid(s) == 0);
        Ok(Axis {
            positions: (out - p).div_ceil(stride),
            extent,
            stride: 1,
            base: first.map_or(0, |t| (place - t as i64 * d).div_euclid(s)),
            taps: first.map_or(0, |t| (taps - t).div_ceil(every)),
            step: -step,
            weight_extent: taps,
            weight_base: first.unwrap_or(0),
            weight_step: every,
            out_extent: out,
            out_base: p,
            out_step: stride,
        })
    };
    (0..stride.min(out)).map(phase).collect()
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// A number as signed.
fn signed(n: usize) -> Result<i64, String> {
    i64::try_from(n).ok().filter(|&n| n <= i64::from(i32::MAX)).ok_or_else(|| format!("{n} is more than kernels count"))
}

/// The numbers of all axes, and the channels of the input behind them.
fn axis_numbers(axes: &[Axis], ci: usize) -> Result<Vec<u32>, String> {
    let mut numbers = Vec::new();
    for axis in axes {
        numbers.extend(axis.numbers()?);
    }
    numbers.push(to_u32(ci)?);
    Ok(numbers)
}

/// Convolves over some positions of the result, all groups at once.
fn product<R: Runtime>(
    axes: &[Axis],
    groups: usize,
    shapes: &Shapes<'_>,
    is_dense: bool,
    call: &Call<'_, R>,
) -> Result<(), String> {
    let (each_in, each_out) = (shapes.ci / groups, shapes.co / groups);
    let numbers = axis_numbers(axes, shapes.ci)?;
    let (outside, slope) = (call.outside(), call.slope());
    let patches = Patches { axes: axes.len(), channels: each_in, is_dense, outside, slope };
    let product = Product {
        m: shapes.b * axes.iter().map(|a| a.positions).product::<usize>(),
        n: each_out,
        k: each_in * axes.iter().map(|a| a.taps).product::<usize>(),
        batches: groups,
        rows: [0, shapes.co, shapes.co],
        batch: [each_in, each_out, each_out],
        is_transposed: false,
        patches: Some((patches, &numbers)),
    };
    gemm::launch(&product, call)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every place of the result gets the taps and elements of the definition, from exactly one phase.
    #[test]
    fn phases_cover_the_definition() {
        for (stride, dilation, lo, extent, taps) in
            [(2, 1, 0, 5, 4), (5, 1, 3, 4, 11), (4, 2, 1, 6, 3), (3, 6, 2, 4, 3)]
        {
            let out = (extent - 1) * stride + dilation * (taps - 1) + 1 - lo;
            let mut found = vec![Vec::new(); out];
            for phase in phases(stride, dilation, lo, extent, taps, out).unwrap() {
                for q in 0..phase.positions {
                    let place = &mut found[q * phase.out_step + phase.out_base];
                    assert!(place.is_empty());
                    for t in 0..phase.taps {
                        let at = (q * phase.stride) as i64 + phase.base + t as i64 * phase.step;
                        if (0..extent as i64).contains(&at) {
                            place.push((phase.weight_base + t * phase.weight_step, at as usize));
                        }
                    }
                }
            }
            for (o, found) in found.iter().enumerate() {
                let meets = |t: usize| (0..extent).find(|s| s * stride + t * dilation == o + lo).map(|s| (t, s));
                assert_eq!(*found, (0..taps).filter_map(meets).collect::<Vec<_>>(), "place {o}");
            }
        }
    }
}
