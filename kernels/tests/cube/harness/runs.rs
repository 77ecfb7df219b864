//! What every way to run CubeCL kernels shares: bounds of f32 arithmetic on GPUs, and the ways in which a call may run.

use ltxc_ir::TensorType;
use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::Unary;
use ltxc_ir::plan::{Kernel, Work};

use super::call_all;

/// Vulkan lets a division or a root be off by 2.5 units of the last place, 5 roundings, where the CPU rounds once.
pub const DIVISION_ROUNDINGS: f64 = 5.0;

/// Sums are f32: the error of one addition.
pub const SUM_ROUNDING: f64 = 1.0 / (1 << 24) as f64;

/// Units of the last place and absolute error of a function on f32.
pub fn accuracy(op: Unary) -> (f64, f64) {
    match op {
        Unary::Neg | Unary::Abs => (0.0, 0.0),
        // The last sum and product round by half a unit each, what is summed has an error of less than one.
        Unary::Exp => (2.0, 0.0),
        // The sum of two parts rounds once, the parts are smaller; near 1 the series has three roundings and a division.
        Unary::Log => (5.0, 0.0),
        Unary::Sqrt | Unary::Rsqrt => (2.5, 0.0),
        // What is left of up to 1e5 after subtracting quarters, off by two roundings of π/4 and one of the result.
        Unary::Sin | Unary::Cos => (0.0, 3e-7),
        // A division (2.5) and a sum behind an exponential (2).
        Unary::Tanh => (5.0, 0.0),
        Unary::Erf => (3.0, 0.0),
    }
}

/// Roundings of a power whose exponential has this argument: what that loses, and the exponential.
pub fn power_roundings(argument: f64) -> f64 {
    2.0 * accuracy(Unary::Exp).0 + argument.abs() * (2.0 * accuracy(Unary::Log).0 + 1.0)
}

/// The result of a call that has one.
#[track_caller]
fn call(work: &Work, args: &[Tensor], before: &Tensor, in_place: Option<usize>) -> Vec<u8> {
    call_all(work, args, std::slice::from_ref(before), &[in_place]).remove(0)
}

/// Runs the call, and again in place wherever that is allowed; all must give the same bytes.
#[track_caller]
pub fn run_work(work: &Work, args: &[Tensor], before: &Tensor) -> Tensor {
    let types: Vec<&TensorType> = args.iter().map(|a| &a.ty).collect();
    work.check(&types, &[&before.ty]).unwrap();
    let bytes = call(work, args, before, None);
    for i in (0..args.len()).filter(|&i| work.may_overwrite(i, 0) && args[i].ty == before.ty) {
        assert!(call(work, args, before, Some(i)) == bytes, "{work:?} {types:?}: in place of {i} differs");
    }
    Tensor::from_bytes(before.ty.clone(), &bytes)
}

/// Runs a kernel on memory that held `before`.
#[track_caller]
pub fn run_onto(kernel: &Kernel, args: &[Tensor], before: &Tensor) -> Tensor {
    run_work(&kernel.clone().into(), args, before)
}

/// [`run_onto`] zeros.
#[track_caller]
pub fn run(kernel: &Kernel, args: &[Tensor], out: &TensorType) -> Tensor {
    run_onto(kernel, args, &Tensor::zeros(out.clone()))
}
