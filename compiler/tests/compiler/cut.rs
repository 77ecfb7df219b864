//! Calls that are cut because a target binds smaller tensors compute the same.

use ltxc_compiler::{Fuse, Options};
use ltxc_ir::ops::Attention;
use ltxc_ir::plan::{KernelCall, Plan, Step, Target};
use ltxc_ir::{Builder, DType, Float, Module, Rate, TensorType};

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

/// The kernel calls of a plan.
fn calls(plan: &Plan) -> Vec<&KernelCall> {
    let steps = plan.functions.iter().flat_map(|f| &f.steps);
    let calls = steps.filter_map(|step| match step {
        Step::Kernel(call) => Some(call),
        Step::Call(_) => None,
    });
    calls.collect()
}

/// A transformer's work on a video of 1088x1920x121: several seconds on a slow GPU, which its system would take for dead.
#[test]
fn long_calls_are_cut_where_systems_watch() {
    let (tokens, width) = (32_640, 4096);
    let b = Builder::new("main");
    let param = |name: &str, shape: &[usize]| b.param(name, TensorType::new(DType::BF16, shape), Rate::Step);
    let [q, k, v] = ["q", "k", "v"].map(|name| param(name, &[1, tokens, 32, 128]));
    let (up, bias) = (param("up", &[4 * width, width]), param("bias", &[4 * width]));
    let down = param("down", &[width, 4 * width]);
    let mixed = b.attention(Attention { scale: Float(0.1), causal: false }, q, k, v, None);
    let x = b.reshape(mixed, &[1, tokens, width]);
    let hidden = b.gelu(b.add(b.matmul_transposed(x, up), bias));
    b.result("y", b.add(b.matmul_transposed(hidden, down), x));
    let module = Module { functions: vec![b.finish().unwrap()], entries: vec!["main".into()] };
    let of = |target: Target| plan(&module, Options::default(), target);
    let (whole, cut) = (of(Target::cuda()), of(Target::wgpu()));
    let (whole, cut) = (calls(&whole), calls(&cut));
    let sum = |calls: &[&KernelCall]| calls.iter().map(|call| call.flops).sum::<u64>();
    let most = |calls: &[&KernelCall]| calls.iter().map(|call| call.flops).max().unwrap();
    let limit = Target::wgpu().max_call_flops();
    assert_eq!(whole.len(), 3);
    assert!(most(&whole) > 10 * limit && most(&cut) <= limit, "{} and {} FLOP", most(&whole), most(&cut));
    // No work is done twice, and there are no more pieces than it takes.
    assert_eq!(sum(&whole), sum(&cut));
    assert!(cut.len() as u64 <= 2 * sum(&whole).div_ceil(limit), "{} pieces", cut.len());
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
