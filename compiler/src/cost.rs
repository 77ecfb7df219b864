//! The estimate of work that hoisting weighs. What plans report about calls comes from the catalogue of kernels.

use std::collections::BTreeMap;

use ltxc_ir::ops::{Binary, Unary};
use ltxc_ir::{Function, Node, Op, TensorType};

/// Rough work of a node, in units of one simple operation on one element.
///
/// `functions` knows the work of every function that may be called.
pub(crate) fn work(function: &Function, node: &Node, functions: &BTreeMap<String, u64>) -> u64 {
    // Library functions cost some tens of simple operations on every machine without special units for them.
    const TRANSCENDENTAL: u64 = 16;
    let elements = node.results.iter().map(|&r| function.ty(r).elements() as u64).sum::<u64>();
    match &node.op {
        Op::Call(call) => functions.get(&call.function).copied().unwrap_or(0),
        Op::Weight(_) | Op::Const(_) | Op::Iota(_) | Op::Reshape(_) => 0,
        Op::Unary(Unary::Neg | Unary::Abs) => elements,
        Op::Unary(_) | Op::Binary(Binary::Pow) => elements.saturating_mul(TRANSCENDENTAL),
        // Movement does no arithmetic, and is not free either.
        op => {
            let args: Vec<&TensorType> = node.args.iter().map(|&a| function.ty(a)).collect();
            op.flops(&args, function.ty(node.results[0])).max(elements)
        }
    }
}

/// Work of every function, calls included.
pub(crate) fn function_work(functions: &[Function]) -> BTreeMap<String, u64> {
    let mut known = BTreeMap::new();
    for f in functions {
        let total = f.nodes.iter().fold(0u64, |n, node| n.saturating_add(work(f, node, &known)));
        known.insert(f.name.clone(), total);
    }
    known
}
