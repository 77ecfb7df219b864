//! `rms_norm` and `layer_norm`: a cube per row, with sums over its units.
//!
//! The variance is that of differences from the mean, so that a large mean costs no digits.

use cubecl::prelude::*;
use ltxc_ir::DType;

use super::call::{Call, to_u32};
use super::rows::{Combine, combined, row_units};
use super::storage::{self, encode, load, place};

/// What a kernel is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    dtype: DType,
    out: DType,
    /// Whether the mean is taken away.
    is_centred: bool,
    /// Of the factor per channel, if there is one.
    weight: Option<DType>,
    /// Of the summand per channel, if there is one.
    bias: Option<DType>,
    units: u32,
}

/// Whether words of the result lie in one row each.
pub(crate) fn is_whole(call_ty: &ltxc_ir::TensorType) -> bool {
    call_ty.shape.last().is_some_and(|c| c.is_multiple_of(storage::per_word(call_ty.dtype) as usize))
}

pub(crate) fn launch<R: Runtime>(eps: f64, is_centred: bool, call: &Call<'_, R>) -> Result<(), String> {
    let x = call.args[0].ty;
    let channels = x.shape.last().copied().unwrap_or(1);
    let dtype_of = |i: usize| call.args.get(i).map(|a| a.ty.dtype);
    let units = row_units(call.client);
    let blueprint =
        Blueprint { dtype: x.dtype, out: call.out.ty.dtype, is_centred, weight: dtype_of(1), bias: dtype_of(2), units };
    let rows = x.elements() / channels;
    let parameters = |i: usize| (i..call.args.len().min(i + 1)).map(|i| call.arg(i)).collect();
    // SAFETY: cubes beyond the rows do nothing; words of the result lie in one row.
    unsafe {
        row_norm::launch_unchecked::<R>(
            call.client,
            call.cubes(rows)?,
            CubeDim::new_1d(units),
            call.arg(0),
            parameters(1),
            parameters(2),
            call.out(),
            to_u32(rows)?,
            to_u32(channels)?,
            eps as f32,
            blueprint,
        );
    }
    Ok(())
}

/// The result may lie on `x`. CUDA has a function `norm` of its own.
#[cube(launch_unchecked)]
fn row_norm(
    x: &mut Array<u32>,
    weight: &Sequence<Array<u32>>,
    bias: &Sequence<Array<u32>>,
    out: &mut Array<u32>,
    rows: u32,
    channels: u32,
    eps: f32,
    #[comptime] blueprint: Blueprint,
) {
    let units = comptime!(blueprint.units);
    let dtype = comptime!(blueprint.dtype);
    let lanes = comptime!(storage::per_word(blueprint.out));
    let bytes = comptime!(4 / lanes);
    let row = CUBE_POS as u32;
    let unit = UNIT_POS;
    let mut shared = SharedMemory::<f32>::new(comptime!(units as usize));
    if row < rows {
        let base = row * channels;
        let mut mean = 0f32.runtime();
        if comptime!(blueprint.is_centred) {
            let mut sum = 0f32.runtime();
            let mut i = unit;
            while i < channels {
                sum += load(x, base + i, dtype);
                i += units;
            }
            mean = combined(&mut shared, sum, units, Combine::Sum) / f32::cast_from(channels);
        }
        let mut squares = 0f32.runtime();
        let mut i = unit;
        while i < channels {
            let value = load(x, base + i, dtype) - mean;
            squares += value * value;
            i += units;
        }
        let total = combined(&mut shared, squares, units, Combine::Sum);
        let factor = (total / f32::cast_from(channels) + eps).inverse_sqrt();
        let mut word = unit;
        while word * lanes < channels {
            let mut bits = 0u32;
            for lane in 0..lanes {
                let c = word * lanes + lane;
                let mut value = (load(x, base + c, dtype) - mean) * factor;
                if comptime!(blueprint.weight.is_some()) {
                    value *= load(weight.index(0usize), c, comptime!(blueprint.weight.unwrap_or(DType::F32)));
                }
                if comptime!(blueprint.bias.is_some()) {
                    value += load(bias.index(0usize), c, comptime!(blueprint.bias.unwrap_or(DType::F32)));
                }
                bits |= place(encode(value, comptime!(blueprint.out)), lane, bytes);
            }
            out[(base / lanes + word) as usize] = bits;
            word += units;
        }
    }
}
