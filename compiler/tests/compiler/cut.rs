//! Calls that are cut because a target binds smaller tensors compute the same.

use ltxc_compiler::{Fuse, Options};
use ltxc_ir::plan::{Plan, Step, Target};
use ltxc_ir::{Builder, DType, Module, Rate, TensorType};

use crate::support::cuttable::{self, Cuttable};
use crate::support::{arguments, assert_close, evaluate, interpret, plan};

/// Largest operand or result of the kernel calls of a plan, and how many calls there are.
fn largest(plan: &Plan) -> (u64, usize) {
    let steps = plan.functions.iter().flat_map(|f| &f.steps);
    let types = steps.clone().flat_map(|step| match step {
        Step::Kernel(call) => call.args.iter().chain(&call.results),
        Step::Call(_) => [].iter().chain(&[]),
    });
    (types.map(|o| o.ty.bytes() as u64).max().unwrap_or(0), steps.count())
}

#[test]
fn pieces_compute_the_same() {
    for Cuttable { name, module, limit } in cuttable::all() {
        let args = arguments(&module, "main", 3);
        let expected = evaluate(&module, "main", &args);
        // Kernels skip roundings that the graph has.
        let is_narrow = args.iter().any(|(_, tensor)| tensor.ty.dtype == DType::BF16);
        let allowed = if is_narrow { 1.0 / 256.0 } else { 0.0 };
        for fuse in [Fuse::Composite, Fuse::Full] {
            let what = format!("{name}, {fuse:?}");
            let options = Options { fuse, ..Options::default() };
            let whole = plan(&module, options.clone(), Target::cpu());
            let cut = plan(&module, options, Target { max_tensor_bytes: limit, ..Target::cpu() });
            let ((before, calls), (after, pieces)) = (largest(&whole), largest(&cut));
            assert!(before > limit && after <= limit && pieces > calls, "{what}: {cut}");
            let found = interpret(&cut, &args);
            assert_close(&found, &interpret(&whole, &args), 0.0, &what);
            assert_close(&found, &expected, allowed, &what);
        }
    }
}

/// Pieces of 25 elements would be as many as a call may become, those of 31 are too large.
#[test]
fn a_call_becomes_thousands_of_pieces_if_it_must() {
    let b = Builder::new("main");
    let x = b.param("x", TensorType::f32([100_003]), Rate::Step);
    b.result("y", b.silu(x));
    let module = Module { functions: vec![b.finish().unwrap()], entries: vec!["main".into()] };
    let cut = plan(&module, Options::default(), Target { max_tensor_bytes: 120, alignment: 4, ..Target::cpu() });
    assert_eq!(largest(&cut), (120, 100_003usize.div_ceil(30)));
}
