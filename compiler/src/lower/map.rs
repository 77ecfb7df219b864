//! Pointwise ops as one [`Map`].

use ltxc_ir::ops::Values;
use ltxc_ir::plan::{Map, MapFunction, MapStep};
use ltxc_ir::{DType, Float, Function, Node, Op, ValueId};

/// Whether a [`Map`] can compute the op.
pub(crate) fn is_pointwise(op: &Op) -> bool {
    let is_primitive = matches!(op, Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select(_) | Op::Cast(_));
    is_primitive || matches!(op, Op::Gelu(_) | Op::Silu(_) | Op::Sigmoid(_) | Op::LeakyRelu(_) | Op::Snake(_))
}

/// A map that computes a chain of pointwise nodes, and the values it reads.
pub(super) struct Chain {
    pub map: Map,
    pub operands: Vec<ValueId>,
}

/// Builds the map of a chain: nodes in order, of which only the last one's result is used outside.
///
/// `uniform` gives the number of a value that is the same everywhere; such operands become steps. A result of the chain
/// that is narrower than f32 is rounded where it is computed, as it would be if it were stored.
pub(super) fn chain(function: &Function, nodes: &[&Node], uniform: &dyn Fn(ValueId) -> Option<f64>) -> Chain {
    let is_inner = |v: ValueId| nodes.iter().any(|n| n.results[0] == v);
    let mut operands: Vec<ValueId> = Vec::new();
    for &arg in nodes.iter().flat_map(|n| &n.args) {
        if !is_inner(arg) && uniform(arg).is_none() && !operands.contains(&arg) {
            operands.push(arg);
        }
    }
    let mut registers: Vec<(ValueId, u32)> = operands.iter().copied().zip(0..).collect();
    let mut steps: Vec<MapStep> = Vec::new();
    let first = operands.len() as u32;
    for (i, node) in nodes.iter().enumerate() {
        let mut args = [0u32; 3];
        for (slot, &arg) in args.iter_mut().zip(&node.args) {
            let known = registers.iter().find(|(v, _)| *v == arg).map(|(_, r)| *r);
            *slot = known.unwrap_or_else(|| {
                let register = first + steps.len() as u32;
                steps.push(MapStep::Scalar(Float(uniform(arg).unwrap_or_default())));
                registers.push((arg, register));
                register
            });
        }
        let is_last = i + 1 == nodes.len();
        let dtype = function.ty(node.results[0]).dtype;
        let mut register = args[0];
        // A cast is the rounding below, or the conversion when the result is stored.
        if let Some(step) = step(&node.op, args) {
            register = first + steps.len() as u32;
            steps.push(step);
        }
        if !is_last && dtype.is_float() && dtype != DType::F32 {
            steps.push(MapStep::Round(dtype, register));
            register = first + steps.len() as u32 - 1;
        }
        registers.push((node.results[0], register));
    }
    Chain { map: Map { steps }, operands }
}

fn step(op: &Op, [a, b, c]: [u32; 3]) -> Option<MapStep> {
    match op {
        Op::Unary(f) => Some(MapStep::Unary(*f, a)),
        Op::Binary(f) => Some(MapStep::Binary(*f, a, b)),
        Op::Compare(f) => Some(MapStep::Compare(*f, a, b)),
        Op::Select(_) => Some(MapStep::Select(a, b, c)),
        Op::Gelu(_) => Some(MapStep::Function(MapFunction::Gelu, a)),
        Op::Silu(_) => Some(MapStep::Function(MapFunction::Silu, a)),
        Op::Sigmoid(_) => Some(MapStep::Function(MapFunction::Sigmoid, a)),
        Op::LeakyRelu(o) => Some(MapStep::Function(MapFunction::LeakyRelu(o.slope), a)),
        Op::Snake(_) => Some(MapStep::Snake(a, b, c)),
        _ => None,
    }
}

/// The number that every element of a constant is, if it is one number.
pub(crate) fn uniform_value(values: &Values) -> Option<f64> {
    match values {
        Values::Float(v) if v.len() == 1 => Some(v[0].0),
        Values::Int(v) if v.len() == 1 => Some(v[0] as f64),
        _ => None,
    }
}
