//! `map`: chains of pointwise functions over operands that broadcast.
//!
//! A unit computes the elements of one word of the result, one after the other; registers are f32 if anything is floating
//! point. Else they are i64 or, on devices without that, i32 if no register can leave it.

use cubecl::prelude::*;
use ltxc_ir::ops::{Binary, Unary};
use ltxc_ir::plan::{Map, MapStep};
use ltxc_ir::{DType, TensorType};

use super::call::{Call, to_u32};
use super::index::{Walk, broadcast_strides, coordinates, numbers, offset};
use super::steps::{float_steps, int_steps, is_integer_step, split_scalars};
use super::storage::{self, load_bits, place, sign_extended};

/// Operands that every device can bind at once, with room for the result and the numbers.
const MAX_OPERANDS: usize = 24;

/// What a kernel is built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    steps: Vec<MapStep>,
    operands: Vec<Operand>,
    out: DType,
}

/// How an operand is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Operand {
    dtype: DType,
    access: Access,
    /// Whether the result may lie on it.
    may_overlap: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Access {
    /// At the position of the result.
    Flat,
    /// Always the first element.
    Constant,
    /// By coordinates; the strides are those of the operand of this number.
    Strided(usize),
}

pub(crate) fn launch<R: Runtime>(map: &Map, call: &Call<'_, R>) -> Result<(), String> {
    let types: Vec<&TensorType> = call.args.iter().map(|a| a.ty).collect();
    let ty = call.out.ty;
    if types.len() > MAX_OPERANDS {
        return Err(format!("map of {} operands, at most {MAX_OPERANDS} are supported", types.len()));
    }
    let strides: Vec<Vec<usize>> = types.iter().map(|t| broadcast_strides(&t.shape, &ty.shape)).collect();
    let walk = Walk::new(&ty.shape, &strides);
    let mut strided = Vec::new();
    let operands = types.iter().enumerate().map(|(i, t)| {
        let access = if walk.is_constant(i) {
            Access::Constant
        } else if walk.is_flat(i) {
            Access::Flat
        } else {
            strided.push(i);
            Access::Strided(strided.len() - 1)
        };
        Operand { dtype: t.dtype, access, may_overlap: *t == ty }
    });
    let operands = operands.collect();
    let (steps, scalars) = split_scalars(&map.steps);
    let is_float = Map::is_float(&types, ty);
    let numbers_of = Numbers {
        extents: if strided.is_empty() { Vec::new() } else { walk.extents.clone() },
        strides: strided.iter().flat_map(|&i| walk.strides[i].iter().copied()).collect(),
        scalars,
    };
    let blueprint = Blueprint { steps, operands, out: ty.dtype };
    if is_float {
        return run_floats(call, blueprint, &numbers_of);
    }
    if let Some(step) = map.steps.iter().find(|step| !is_integer_step(step)) {
        return Err(format!("map step {step:?} on integers is not supported"));
    }
    let has_i64 = call.client.properties().supports_type(i64::as_type_native_unchecked());
    if has_i64 {
        run_ints::<R, i64>(call, blueprint, &numbers_of, |v| v as i64)
    } else if fits_i32(map, &types) {
        run_ints::<R, i32>(call, blueprint, &numbers_of, |v| v as i32)
    } else {
        Err("integers of more than 32 bits are not supported by this device".into())
    }
}

/// What a launch adds to a blueprint.
struct Numbers {
    extents: Vec<usize>,
    /// Of strided operands, one after the other.
    strides: Vec<usize>,
    scalars: Vec<f64>,
}

fn run_floats<R: Runtime>(call: &Call<'_, R>, blueprint: Blueprint, values: &Numbers) -> Result<(), String> {
    let ty = call.out.ty;
    let (count, dim) = call.linear(storage::words(ty.dtype, ty.elements()))?;
    let mut scalars = SequenceArg::new();
    values.scalars.iter().for_each(|&v| scalars.push(v as f32));
    let (extents, strides) = (numbers(values.extents.iter().copied())?, numbers(values.strides.iter().copied())?);
    let n = to_u32(ty.elements())?;
    let (reads, overlaps) = operands(call, &blueprint);
    // SAFETY: units beyond the result do nothing; operands broadcast to it.
    unsafe {
        map_floats::launch_unchecked::<R>(
            call.client,
            count,
            dim,
            reads,
            overlaps,
            call.out(),
            extents,
            strides,
            scalars,
            n,
            blueprint,
        );
    }
    Ok(())
}

fn run_ints<R: Runtime, I: Int + CubeElement + LaunchArg<RuntimeArg<R> = I>>(
    call: &Call<'_, R>,
    blueprint: Blueprint,
    values: &Numbers,
    scalar: impl Fn(f64) -> I,
) -> Result<(), String> {
    let ty = call.out.ty;
    let (count, dim) = call.linear(storage::words(ty.dtype, ty.elements()))?;
    let mut scalars = SequenceArg::new();
    let limits = match ty.dtype {
        DType::I8 => [-128.0, 127.0],
        DType::U8 => [0.0, 255.0],
        DType::U32 => [0.0, u32::MAX.into()],
        _ => [i32::MIN.into(), i32::MAX.into()],
    };
    let constants = [0.0, 1.0].into_iter().chain(limits);
    values.scalars.iter().copied().chain(constants).for_each(|v| scalars.push(scalar(v)));
    let (extents, strides) = (numbers(values.extents.iter().copied())?, numbers(values.strides.iter().copied())?);
    let n = to_u32(ty.elements())?;
    let (reads, overlaps) = operands(call, &blueprint);
    // SAFETY: as for floats.
    unsafe {
        map_ints::launch_unchecked::<I, R>(
            call.client,
            count,
            dim,
            reads,
            overlaps,
            call.out(),
            extents,
            strides,
            scalars,
            n,
            blueprint,
        );
    }
    Ok(())
}

/// Operands apart from those that the result may lie on, and the latter.
#[allow(clippy::type_complexity)] // two lists of the same kind
fn operands<R: Runtime>(
    call: &Call<'_, R>,
    blueprint: &Blueprint,
) -> (SequenceArg<R, Array<u32>>, SequenceArg<R, Array<u32>>) {
    let of = |may_overlap| {
        let chosen = blueprint.operands.iter().enumerate().filter(move |(_, o)| o.may_overlap == may_overlap);
        chosen.map(|(i, _)| call.arg(i)).collect()
    };
    (of(false), of(true))
}

/// Number of an operand in its list.
fn binding(operands: &[Operand], operand: usize) -> usize {
    let may_overlap = operands[operand].may_overlap;
    operands[..operand].iter().filter(|o| o.may_overlap == may_overlap).count()
}

#[cube(launch_unchecked)]
fn map_floats(
    reads: &Sequence<Array<u32>>,
    overlaps: &mut Sequence<Array<u32>>,
    out: &mut Array<u32>,
    extents: &Sequence<u32>,
    strides: &Sequence<u32>,
    scalars: &Sequence<f32>,
    n: u32,
    #[comptime] blueprint: Blueprint,
) {
    let word = ABSOLUTE_POS as u32;
    let per_word = comptime!(storage::per_word(blueprint.out));
    if word * per_word < n {
        let mut bits = 0u32;
        for lane in 0..per_word {
            let position = word * per_word + lane;
            if position < n {
                let at = coordinates(position, extents);
                let mut registers = Sequence::<f32>::new();
                #[unroll]
                for i in 0..comptime!(blueprint.operands.len()) {
                    let raw =
                        operand_bits(reads, overlaps, position, &at, strides, i, comptime!(blueprint.operands.clone()));
                    registers.push(storage::decode(raw, comptime!(blueprint.operands[i].dtype)));
                }
                let value = float_steps(&mut registers, scalars, comptime!(blueprint.steps.clone()));
                bits |= place(storage::encode(value, comptime!(blueprint.out)), lane, comptime!(4 / per_word));
            }
        }
        out[word as usize] = bits;
    }
}

/// The scalars end with 0, 1, and the limits of the result: constants of 64 bits are compared wrongly by some Vulkan
/// drivers (Mesa 22.3).
#[cube(launch_unchecked)]
fn map_ints<I: Int + CubeElement>(
    reads: &Sequence<Array<u32>>,
    overlaps: &mut Sequence<Array<u32>>,
    out: &mut Array<u32>,
    extents: &Sequence<u32>,
    strides: &Sequence<u32>,
    scalars: &Sequence<I>,
    n: u32,
    #[comptime] blueprint: Blueprint,
) {
    let word = ABSOLUTE_POS as u32;
    let per_word = comptime!(storage::per_word(blueprint.out));
    if word * per_word < n {
        let mut bits = 0u32;
        for lane in 0..per_word {
            let position = word * per_word + lane;
            if position < n {
                let at = coordinates(position, extents);
                let mut registers = Sequence::<I>::new();
                #[unroll]
                for i in 0..comptime!(blueprint.operands.len()) {
                    let raw =
                        operand_bits(reads, overlaps, position, &at, strides, i, comptime!(blueprint.operands.clone()));
                    let value = match comptime!(blueprint.operands[i].dtype) {
                        DType::I8 => I::cast_from(sign_extended(raw)),
                        DType::I32 => I::cast_from(i32::reinterpret(raw)),
                        _ => I::cast_from(raw),
                    };
                    registers.push(value);
                }
                let value = int_steps::<I>(&mut registers, scalars, comptime!(blueprint.steps.clone()));
                let count = scalars.len();
                let limited =
                    select(value < *scalars.index(comptime!(count - 2)), *scalars.index(comptime!(count - 2)), value);
                let limited = select(
                    limited > *scalars.index(comptime!(count - 1)),
                    *scalars.index(comptime!(count - 1)),
                    limited,
                );
                let zero = *scalars.index(comptime!(count - 4));
                let raw = match comptime!(blueprint.out) {
                    DType::Bool => select(value != zero, 1u32, 0u32),
                    DType::U8 | DType::U32 => u32::cast_from(limited),
                    _ => u32::reinterpret(i32::cast_from(limited)),
                };
                bits |= place(raw & mask(comptime!(4 / per_word)), lane, comptime!(4 / per_word));
            }
        }
        out[word as usize] = bits;
    }
}

/// The bits of operand `i` for a position of the result.
#[cube]
fn operand_bits(
    reads: &Sequence<Array<u32>>,
    overlaps: &Sequence<Array<u32>>,
    position: u32,
    coordinates: &Sequence<u32>,
    strides: &Sequence<u32>,
    #[comptime] i: usize,
    #[comptime] all: Vec<Operand>,
) -> u32 {
    let bytes = comptime!(all[i].dtype.bytes() as u32);
    let rank = coordinates.len();
    let element = match comptime!(all[i].access) {
        Access::Flat => position,
        Access::Constant => 0u32.runtime(),
        Access::Strided(k) => offset(coordinates, strides, comptime!(k * rank)),
    };
    if comptime!(all[i].may_overlap) {
        load_bits(overlaps.index(comptime!(binding(&all, i))), element, bytes)
    } else {
        load_bits(reads.index(comptime!(binding(&all, i))), element, bytes)
    }
}

/// The low bytes of a word.
#[cube]
fn mask(#[comptime] bytes: u32) -> u32 {
    comptime!(u32::MAX >> (32 - 8 * bytes)).runtime()
}

/// Whether no register of a map on integers can leave i32: ranges of operands, carried through the steps.
fn fits_i32(map: &Map, args: &[&TensorType]) -> bool {
    let mut ranges: Vec<(i128, i128)> = args
        .iter()
        .map(|ty| match ty.dtype {
            DType::I8 => (-128, 127),
            DType::U8 => (0, 255),
            DType::Bool => (0, 1),
            DType::U32 => (0, u32::MAX.into()),
            _ => (i32::MIN.into(), i32::MAX.into()),
        })
        .collect();
    for step in &map.steps {
        let at = |r: u32| ranges[r as usize];
        let range = match *step {
            MapStep::Scalar(v) => (v.0 as i128, v.0 as i128),
            MapStep::Unary(Unary::Neg, a) => (-at(a).1, -at(a).0),
            MapStep::Unary(_, a) => (0, at(a).0.abs().max(at(a).1.abs())),
            MapStep::Binary(op, a, b) => {
                let (a, b) = (at(a), at(b));
                match op {
                    Binary::Add => (a.0 + b.0, a.1 + b.1),
                    Binary::Sub => (a.0 - b.1, a.1 - b.0),
                    Binary::Mul => {
                        let corners = [a.0 * b.0, a.0 * b.1, a.1 * b.0, a.1 * b.1];
                        corners.iter().fold((i128::MAX, i128::MIN), |r, &c| (r.0.min(c), r.1.max(c)))
                    }
                    Binary::Max => (a.0.max(b.0), a.1.max(b.1)),
                    Binary::Min => (a.0.min(b.0), a.1.min(b.1)),
                    Binary::Div | Binary::Pow => {
                        let most = a.0.abs().max(a.1.abs());
                        (-most, most)
                    }
                }
            }
            MapStep::Compare(..) => (0, 1),
            MapStep::Select(_, a, b) => (at(a).0.min(at(b).0), at(a).1.max(at(b).1)),
            _ => return false,
        };
        ranges.push(range);
        if range.0 < i32::MIN.into() || range.1 > i32::MAX.into() {
            return false;
        }
    }
    args.iter().all(|ty| ty.dtype != DType::U32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ltxc_ir::Float;

    #[test]
    fn ranges_decide_whether_32_bits_suffice() {
        let (byte, wide) = (TensorType::new(DType::U8, [3]), TensorType::i32([3]));
        let map = |steps: &[MapStep]| Map { steps: steps.to_vec() };
        let product = map(&[MapStep::Binary(Binary::Mul, 0, 0), MapStep::Binary(Binary::Mul, 1, 1)]);
        assert!(!fits_i32(&product, &[&byte]), "255^4 is more than 2^31");
        assert!(fits_i32(&map(&product.steps[..1]), &[&byte]));
        assert!(!fits_i32(&map(&[MapStep::Binary(Binary::Add, 0, 0)]), &[&wide]));
        assert!(!fits_i32(&map(&[MapStep::Unary(Unary::Neg, 0)]), &[&wide]), "the smallest has no negative");
        let limited = [
            MapStep::Scalar(Float(7.0)),
            MapStep::Binary(Binary::Min, 0, 1),
            MapStep::Compare(ltxc_ir::ops::Compare::Less, 0, 2),
        ];
        assert!(fits_i32(&map(&limited), &[&wide]));
    }
}
