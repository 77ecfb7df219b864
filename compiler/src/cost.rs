//! What an op costs: the floating point operations and bytes that plans report, and the estimate that hoisting weighs.

use std::collections::BTreeMap;

use ltxc_ir::ops::{Binary, Unary};
use ltxc_ir::plan::{Kernel, Operand};
use ltxc_ir::{Function, Node, Op, TensorType};

/// Bytes that a kernel call reads and writes, every operand counted once. A copy touches only what it moves.
pub(crate) fn bytes(kernel: &Kernel, args: &[Operand], results: &[Operand]) -> u64 {
    if let (Kernel::Copy(copy), [result]) = (kernel, results) {
        let elements = copy.shape.iter().fold(1u64, |n, &d| n.saturating_mul(d as u64));
        return elements.saturating_mul(2 * result.ty.dtype.bytes() as u64);
    }
    let mut seen: Vec<&Operand> = Vec::with_capacity(args.len());
    for arg in args {
        if !seen.contains(&arg) {
            seen.push(arg);
        }
    }
    seen.into_iter().chain(results).fold(0, |n: u64, o| n.saturating_add(o.ty.bytes() as u64))
}

/// Floating point operations of a node that is not a call.
pub(crate) fn flops(function: &Function, node: &Node) -> u64 {
    let args: Vec<&TensorType> = node.args.iter().map(|&a| function.ty(a)).collect();
    node.op.flops(&args, function.ty(node.results[0]))
}

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
        _ => flops(function, node).max(elements),
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
