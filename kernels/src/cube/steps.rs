//! The step list of a `map`, evaluated for one element.
//!
//! The list is known when a kernel is built, its scalars when it is launched: lists that differ in scalars only are one
//! kernel.

use cubecl::prelude::*;
use ltxc_ir::ops::{Binary, Compare, Unary};
use ltxc_ir::plan::{MapFunction as Function, MapStep};

use super::{math, storage};

/// Steps with the values of their scalars taken out.
pub(crate) fn split_scalars(steps: &[MapStep]) -> (Vec<MapStep>, Vec<f64>) {
    let mut scalars = Vec::new();
    let steps = steps.iter().map(|step| match *step {
        MapStep::Scalar(value) => {
            scalars.push(value.0);
            MapStep::Scalar(ltxc_ir::Float(0.0))
        }
        step => step,
    });
    (steps.collect(), scalars)
}

/// Number of the scalar that step `at` is.
fn scalar_index(steps: &[MapStep], at: usize) -> usize {
    steps[..at].iter().filter(|step| matches!(step, MapStep::Scalar(_))).count()
}

/// The last register after all steps. `registers` are the operands, and grow.
#[cube]
pub(crate) fn float_steps(
    registers: &mut Sequence<f32>,
    scalars: &Sequence<f32>,
    #[comptime] steps: Vec<MapStep>,
) -> f32 {
    #[unroll]
    for i in 0..comptime!(steps.len()) {
        let value = match comptime!(steps[i]) {
            MapStep::Scalar(_) => *scalars.index(comptime!(scalar_index(&steps, i))),
            MapStep::Unary(op, a) => unary(*registers.index(comptime!(a as usize)), op),
            MapStep::Binary(op, a, b) => {
                binary(*registers.index(comptime!(a as usize)), *registers.index(comptime!(b as usize)), op)
            }
            MapStep::Compare(op, a, b) => {
                let (a, b) = (*registers.index(comptime!(a as usize)), *registers.index(comptime!(b as usize)));
                match comptime!(op) {
                    Compare::Equal => select(a == b, 1.0f32, 0.0f32),
                    Compare::Less => select(a < b, 1.0f32, 0.0f32),
                    Compare::LessEqual => select(a <= b, 1.0f32, 0.0f32),
                }
            }
            MapStep::Select(c, a, b) => select(
                *registers.index(comptime!(c as usize)) != 0.0f32,
                *registers.index(comptime!(a as usize)),
                *registers.index(comptime!(b as usize)),
            ),
            MapStep::Function(f, a) => function(*registers.index(comptime!(a as usize)), f),
            MapStep::Snake(x, a, b) => {
                let x = *registers.index(comptime!(x as usize));
                let sine = math::sin(x * *registers.index(comptime!(a as usize)));
                x + sine * sine / (*registers.index(comptime!(b as usize)) + 1e-9f32)
            }
            MapStep::Round(dtype, a) => storage::rounded(*registers.index(comptime!(a as usize)), dtype),
        };
        registers.push(value);
    }
    let count = registers.len();
    *registers.index(comptime!(count - 1))
}

#[cube]
fn unary(x: f32, #[comptime] op: Unary) -> f32 {
    match comptime!(op) {
        Unary::Neg => -x,
        Unary::Abs => x.abs(),
        Unary::Exp => math::exp(x),
        Unary::Log => math::ln(x),
        Unary::Sqrt => x.sqrt(),
        Unary::Rsqrt => x.inverse_sqrt(),
        Unary::Sin => math::sin(x),
        Unary::Cos => math::cos(x),
        Unary::Tanh => math::tanh(x),
        Unary::Erf => math::erf(x),
    }
}

#[cube]
fn binary(a: f32, b: f32, #[comptime] op: Binary) -> f32 {
    match comptime!(op) {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Max => math::larger(a, b),
        Binary::Min => math::smaller(a, b),
        Binary::Pow => math::pow(a, b),
    }
}

#[cube]
pub(crate) fn function(x: f32, #[comptime] function: Function) -> f32 {
    match comptime!(function) {
        Function::Sigmoid => math::sigmoid(x),
        Function::Silu => math::silu(x),
        Function::Gelu => math::gelu(x),
        Function::LeakyRelu(slope) => select(x > 0.0f32, x, x * f32::new(comptime!(slope.0 as f32))),
    }
}

/// Whether [`int_steps`] knows a step; no graph asks for the others on integers.
pub(crate) fn is_integer_step(step: &MapStep) -> bool {
    match step {
        MapStep::Unary(op, _) => matches!(op, Unary::Neg | Unary::Abs),
        MapStep::Binary(op, ..) => *op != Binary::Pow,
        MapStep::Function(..) | MapStep::Snake(..) | MapStep::Round(..) => false,
        MapStep::Scalar(_) | MapStep::Compare(..) | MapStep::Select(..) => true,
    }
}

/// Like [`float_steps`], on integers. Behind the scalars of the steps stand 0, 1 and two more.
#[cube]
pub(crate) fn int_steps<I: Int>(
    registers: &mut Sequence<I>,
    scalars: &Sequence<I>,
    #[comptime] steps: Vec<MapStep>,
) -> I {
    let count = scalars.len();
    let zero = *scalars.index(comptime!(count - 4));
    let one = *scalars.index(comptime!(count - 3));
    #[unroll]
    for i in 0..comptime!(steps.len()) {
        let value = match comptime!(steps[i]) {
            MapStep::Unary(op, a) => {
                let x = *registers.index(comptime!(a as usize));
                if comptime!(op == Unary::Neg) { zero - x } else { select(x < zero, zero - x, x) }
            }
            MapStep::Binary(op, a, b) => {
                let (a, b) = (*registers.index(comptime!(a as usize)), *registers.index(comptime!(b as usize)));
                int_binary::<I>(a, b, zero, one, op)
            }
            MapStep::Compare(op, a, b) => {
                let (a, b) = (*registers.index(comptime!(a as usize)), *registers.index(comptime!(b as usize)));
                match comptime!(op) {
                    Compare::Equal => select(a == b, one, zero),
                    Compare::Less => select(a < b, one, zero),
                    Compare::LessEqual => select(a <= b, one, zero),
                }
            }
            MapStep::Select(c, a, b) => select(
                *registers.index(comptime!(c as usize)) != zero,
                *registers.index(comptime!(a as usize)),
                *registers.index(comptime!(b as usize)),
            ),
            // The others are refused before: see `is_integer_step`.
            _ => *scalars.index(comptime!(scalar_index(&steps, i))),
        };
        registers.push(value);
    }
    let count = registers.len();
    *registers.index(comptime!(count - 1))
}

#[cube]
fn int_binary<I: Int>(a: I, b: I, zero: I, one: I, #[comptime] op: Binary) -> I {
    match comptime!(op) {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Max => select(a > b, a, b),
        Binary::Min => select(a < b, a, b),
        // Division by zero gives 0; powers are refused before.
        Binary::Div | Binary::Pow => {
            let divisor = select(b == zero, one, b);
            select(b == zero, zero, a / divisor)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ltxc_ir::Float;

    #[test]
    fn scalars_are_numbered_in_order() {
        let steps = [
            MapStep::Scalar(Float(2.0)),
            MapStep::Unary(Unary::Neg, 0),
            MapStep::Scalar(Float(-1.0)),
            MapStep::Binary(Binary::Add, 1, 2),
        ];
        let (split, scalars) = split_scalars(&steps);
        assert_eq!(scalars, [2.0, -1.0]);
        assert_eq!([0, 2].map(|at| scalar_index(&split, at)), [0, 1]);
        let (other, _) = split_scalars(&[MapStep::Scalar(Float(7.0))]);
        assert_eq!(other[0], split[0], "the value is not part of the kernel");
    }
}
