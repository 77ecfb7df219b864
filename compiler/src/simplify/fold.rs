//! Constants that are known at compile time: `f(c) = c'`.

use ltxc_ir::eval::{Data, Evaluator, Tensor};
use ltxc_ir::ops::{Const, Values};
use ltxc_ir::{Builder, Float, Module, Op, Rate, TensorType, ValueId};

use super::Graph;

/// Most elements of an operand or result that is computed at compile time. Larger tables would make plans large.
const MOST_ELEMENTS: usize = 4096;

/// The constant that `op` makes of constant operands, if it is small and finite.
///
/// Tensors with one value everywhere are stored as that value, so their size does not count.
pub(super) fn fold(graph: &Graph, op: &Op, args: &[ValueId], ty: &TensorType) -> Option<Const> {
    match op {
        Op::Weight(_) | Op::Call(_) => return None,
        Op::Const(c) => return Some(compact(c.clone())),
        Op::Iota(_) if ty.elements() > MOST_ELEMENTS => return None,
        _ => {}
    }
    let operands: Vec<&Const> = args.iter().map(|&a| graph.constant(a)).collect::<Option<_>>()?;
    if ty.elements() == 0 {
        return None;
    }
    if !operands.is_empty() && operands.iter().all(|c| c.values.len() == 1) && keeps_uniform(op) {
        return fold_uniform(op, &operands, ty);
    }
    if ty.elements() > MOST_ELEMENTS || operands.iter().any(|c| c.ty.elements() > MOST_ELEMENTS) {
        return None;
    }
    let tensor = evaluate(op, &operands)?;
    constant(tensor, ty)
}

/// Ops whose result has one value everywhere if every operand has.
fn keeps_uniform(op: &Op) -> bool {
    matches!(
        op,
        Op::Unary(_)
            | Op::Binary(_)
            | Op::Compare(_)
            | Op::Select(_)
            | Op::Cast(_)
            | Op::Reshape(_)
            | Op::Transpose(_)
            | Op::Slice(_)
            | Op::Broadcast(_)
            | Op::Gelu(_)
            | Op::Silu(_)
            | Op::Sigmoid(_)
            | Op::LeakyRelu(_)
    )
}

/// Computes an op of uniform tensors from one element of each.
fn fold_uniform(op: &Op, operands: &[&Const], ty: &TensorType) -> Option<Const> {
    match op {
        Op::Reshape(_) | Op::Transpose(_) | Op::Slice(_) | Op::Broadcast(_) => {
            return Some(Const { ty: ty.clone(), values: operands[0].values.clone() });
        }
        _ => {}
    }
    let points: Vec<Const> =
        operands.iter().map(|c| Const { ty: TensorType::new(c.ty.dtype, []), values: c.values.clone() }).collect();
    let tensor = evaluate(op, &points.iter().collect::<Vec<_>>())?;
    let point = constant(tensor, &TensorType::new(ty.dtype, []))?;
    Some(Const { ty: ty.clone(), values: point.values })
}

/// Runs one op with the reference evaluator.
fn evaluate(op: &Op, operands: &[&Const]) -> Option<Tensor> {
    let b = Builder::new("fold");
    let params: Vec<ValueId> = operands.iter().map(|c| b.param("", c.ty.clone(), Rate::Step)).collect();
    b.result("y", b.push(op.clone(), &params));
    let module = Module { functions: vec![b.finish().ok()?], entries: vec![] };
    let args: Vec<Tensor> = operands.iter().map(|c| tensor(c)).collect();
    Evaluator::new(&module, &|_, _, _| None).run("fold", &args).ok()?.pop()
}

/// The elements of a constant, rounded to its dtype as the evaluator does.
fn tensor(c: &Const) -> Tensor {
    let n = c.ty.elements();
    let data = match &c.values {
        Values::Float(v) if v.len() == n => Data::Float(v.iter().map(|x| x.0).collect()),
        Values::Float(v) => Data::Float(v.iter().map(|x| x.0).cycle().take(n).collect()),
        Values::Int(v) if v.len() == n => Data::Int(v.clone()),
        Values::Int(v) => Data::Int(v.iter().copied().cycle().take(n).collect()),
    };
    let exact = Tensor { ty: c.ty.clone(), data };
    Tensor::from_bytes(c.ty.clone(), &exact.to_bytes())
}

/// The constant of these elements; `None` if one is not finite, which a constant cannot be.
fn constant(tensor: Tensor, ty: &TensorType) -> Option<Const> {
    let values = match tensor.data {
        Data::Float(v) if v.iter().any(|x| !x.is_finite()) => return None,
        Data::Float(v) => Values::Float(v.into_iter().map(Float).collect()),
        Data::Int(v) => Values::Int(v),
    };
    (tensor.ty == *ty).then(|| compact(Const { ty: tensor.ty, values }))
}

/// Stores one value if all are equal.
fn compact(mut c: Const) -> Const {
    match &mut c.values {
        Values::Float(v) if v.windows(2).all(|w| w[0] == w[1]) => v.truncate(1),
        Values::Int(v) if v.windows(2).all(|w| w[0] == w[1]) => v.truncate(1),
        _ => {}
    }
    c
}
