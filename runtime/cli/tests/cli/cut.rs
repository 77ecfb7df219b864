//! Calls that are cut because a device binds smaller tensors compute the same on it.

use ltxc::debug::modules::Bench;
use ltxc::debug::recording::relative_l2;
use ltxc::debug::session::Session;
use ltxc_compiler::Options;
use ltxc_ir::eval::{Data, Evaluator, Tensor};
use ltxc_ir::plan::Target;
use ltxc_ir::{DType, TensorType};
use ltxc_runtime::backend::{Device, find};

use crate::binary::{Place, has_vulkan};

#[path = "../../../../compiler/tests/compiler/support/cuttable.rs"]
mod cuttable;

/// Numbers in `[-1, 1)`, or small indices, that depend on `seed` only.
fn tensor(ty: &TensorType, seed: u64) -> Tensor {
    let number = |i: usize| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed << 40).rotate_left(23);
    let unit = |i: usize| (number(i) >> 56) as f64 / 128.0 - 1.0;
    let n = ty.elements();
    let data = match ty.dtype.is_float() {
        true => Data::Float((0..n).map(unit).collect()),
        false => Data::Int((0..n).map(|i| (number(i) % 8) as i64).collect()),
    };
    Tensor { ty: ty.clone(), data }
}

#[track_caller]
fn check_on(backend: &str) {
    let found = find(Some(backend));
    let device = found.devices.iter().find(|d| d.name.backend() == backend).unwrap();
    for case in cuttable::all() {
        let function = case.module.function("main").unwrap();
        let types = function.param_types();
        let args: Vec<Tensor> = types.iter().zip(1..).map(|(ty, seed)| tensor(ty, seed)).collect();
        let want = Evaluator::new(&case.module, &|_, _, _| None).run("main", &args).unwrap().remove(0);
        // What is bound in front of an operand counts, too: less than an alignment.
        let max_tensor_bytes = case.limit + device.target.alignment;
        let target = Target { max_tensor_bytes, ..device.target.clone() };
        let small = Device { target, ..device.clone() };
        let (options, session) = (Options::default(), Session::default());
        let bench = Bench { sources: vec![], paths: vec![], options, device: &small, session: &session };
        let ran = bench.run("transformer", &case.module, "main", &args);
        let ran = ran.unwrap_or_else(|e| panic!("{}: {e:#}", case.name));
        let want: Vec<f32> = want.floats().iter().map(|&v| v as f32).collect();
        let error = relative_l2(&ran.result("y").unwrap().values, &want);
        // Sums of a few hundred products in f32; a few roundings to bf16 in the other case.
        let allowed = if types.iter().any(|ty| ty.dtype == DType::BF16) { 1.0 / 128.0 } else { 1e-5 };
        assert!(error <= allowed, "{} on {}: {error:e}", case.name, device.name);
    }
}

#[test]
fn pieces_compute_the_same_on_the_cpu() {
    check_on("cpu");
}

#[test]
fn pieces_compute_the_same_on_vulkan() {
    if has_vulkan(&Place::new()) {
        check_on("wgpu");
    }
}
