//! The equations of `simplify`, each above the code that uses it. `x` is a value, `c` a constant, `k` an attribute.
//!
//! Rules for rules: the right side has the type of the left, is never slower, and is equal element by element; only the
//! sign of a zero may differ. A cast is dropped only where it changed nothing.

use ltxc_ir::ops::{Binary, Broadcast, Cast, Concat, Const, Gather, Iota, Reshape, Slice, Transpose, Unary, Values};
use ltxc_ir::{DType, Op, TensorType, ValueId};

use super::Graph;

/// What stands for a node.
pub(super) enum Rewrite {
    /// A value that exists.
    Value(ValueId),
    /// Another op with other operands.
    Node(Op, Vec<ValueId>),
}

fn node(op: impl Into<Op>, args: &[ValueId]) -> Option<Rewrite> {
    Some(Rewrite::Node(op.into(), args.to_vec()))
}

fn value(v: ValueId) -> Option<Rewrite> {
    Some(Rewrite::Value(v))
}

/// A simpler form of the node, `None` if no equation fits.
pub(super) fn rewrite(g: &mut Graph, op: &Op, args: &[ValueId], ty: &TensorType) -> Option<Rewrite> {
    match op {
        // Ops that did nothing.
        Op::Reshape(_) | Op::Cast(_) | Op::Broadcast(_) | Op::Slice(_) if g.ty(args[0]) == ty => value(args[0]),
        // pad(x) = x, reduce(x) = x, depth_to_space(x) = x where no axis changes its extent.
        Op::Pad(_) | Op::Reduce(_) | Op::DepthToSpace(_) | Op::SpaceToDepth(_) if g.ty(args[0]) == ty => {
            let nothing_moves = match op {
                Op::DepthToSpace(o) => o.block.iter().all(|&f| f == 1),
                Op::SpaceToDepth(o) => o.block.iter().all(|&f| f == 1),
                _ => true,
            };
            if nothing_moves { value(args[0]) } else { None }
        }
        Op::Iota(o) => iota(g, o, ty),
        Op::Reshape(_) => reshape(g, args[0], ty),
        Op::Transpose(o) => transpose(g, o, args[0], ty),
        Op::Slice(o) => slice(g, o, args[0]),
        Op::Concat(o) => concat(g, o, args, ty),
        Op::Broadcast(_) => broadcast(g, args[0], ty),
        Op::Gather(o) => gather(g, o, args),
        Op::Cast(o) => cast(g, *o, args[0]),
        // −(−x) = x
        Op::Unary(Unary::Neg) => match g.definition(args[0])? {
            (Op::Unary(Unary::Neg), inner) => value(inner[0]),
            _ => None,
        },
        Op::Binary(o) => identity(g, *o, args, ty).or_else(|| operands(g, op, args, ty)),
        Op::Select(_) => select(g, args, ty).or_else(|| operands(g, op, args, ty)),
        Op::Compare(_)
        | Op::Matmul(_)
        | Op::Conv(_)
        | Op::ConvTranspose(_)
        | Op::RmsNorm(_)
        | Op::LayerNorm(_)
        | Op::GroupNorm(_)
        | Op::Snake(_)
        | Op::Rope(_) => operands(g, op, args, ty),
        _ => None,
    }
}

/// iota of `[.., n, ..]` = broadcast(iota of `[1, n, 1]`): one line is stored, not the tensor.
fn iota(g: &mut Graph, o: &Iota, ty: &TensorType) -> Option<Rewrite> {
    let mut line = TensorType::new(ty.dtype, vec![1; ty.rank()]);
    line.shape[o.axis] = ty.shape[o.axis];
    if line == *ty {
        return None;
    }
    let line = g.emit(Op::Iota(Iota { ty: line.clone(), axis: o.axis }), vec![], line);
    node(Broadcast { shape: ty.shape.clone() }, &[line])
}

/// reshape(reshape(x, j), k) = reshape(x, k)
fn reshape(g: &Graph, x: ValueId, ty: &TensorType) -> Option<Rewrite> {
    match g.definition(x)? {
        (Op::Reshape(_), inner) => node(Reshape { shape: ty.shape.clone() }, &[inner[0]]),
        _ => None,
    }
}

fn transpose(g: &Graph, o: &Transpose, x: ValueId, ty: &TensorType) -> Option<Rewrite> {
    if o.perm.iter().enumerate().all(|(i, &p)| i == p) {
        return value(x);
    }
    // transpose(x, k) = reshape(x) if only axes of extent 1 change places
    let shape = &g.ty(x).shape;
    let moved: Vec<usize> = o.perm.iter().copied().filter(|&p| shape[p] != 1).collect();
    if moved.windows(2).all(|w| w[0] < w[1]) {
        return node(Reshape { shape: ty.shape.clone() }, &[x]);
    }
    // transpose(transpose(x, j), k) = transpose(x, j ∘ k)
    match g.definition(x)? {
        (Op::Transpose(inner), args) => {
            node(Transpose { perm: o.perm.iter().map(|&p| inner.perm[p]).collect() }, &[args[0]])
        }
        _ => None,
    }
}

fn slice(g: &Graph, o: &Slice, x: ValueId) -> Option<Rewrite> {
    match g.definition(x)? {
        // slice(slice(x, j), k) = slice(x, j ∘ k)
        (Op::Slice(inner), args) => node(compose_slices(inner, o)?, &[args[0]]),
        // slice(concat(.., x, ..), k) = slice(x, k') if the range lies in x
        (Op::Concat(joined), parts) => {
            let axis = joined.axis;
            let mut base = 0;
            for &part in parts {
                let extent = g.ty(part).shape[axis];
                if o.start[axis] >= base && o.end[axis] <= base + extent && o.start[axis] < o.end[axis] {
                    let mut inner = o.clone();
                    inner.start[axis] -= base;
                    inner.end[axis] -= base;
                    return node(inner, &[part]);
                }
                base += extent;
            }
            None
        }
        _ => None,
    }
}

/// The slice that does what `first` and then `second` do. `None` if a bound does not fit a number.
fn compose_slices(first: &Slice, second: &Slice) -> Option<Slice> {
    let mut out = Slice { start: vec![], end: vec![], step: vec![] };
    for a in 0..first.start.len() {
        let step = first.step[a].checked_mul(second.step[a])?;
        let start = first.start[a].checked_add(first.step[a].checked_mul(second.start[a])?)?;
        let n = (second.end[a] - second.start[a]).div_ceil(second.step[a]);
        let end = if n == 0 { start } else { start.checked_add(step.checked_mul(n - 1)?)?.checked_add(1)? };
        // An empty range may start behind the end of the operand.
        let start = if n == 0 { 0 } else { start };
        out.start.push(start);
        out.end.push(if n == 0 { 0 } else { end });
        out.step.push(step);
    }
    Some(out)
}

fn concat(g: &mut Graph, o: &Concat, args: &[ValueId], ty: &TensorType) -> Option<Rewrite> {
    // concat(x) = x
    if let [only] = args {
        return value(*only);
    }
    // concat(.., concat(x, y), ..) = concat(.., x, y, ..), and empty parts count for nothing
    let mut parts = Vec::with_capacity(args.len());
    for &arg in args {
        match g.definition(arg) {
            _ if g.ty(arg).shape[o.axis] == 0 => {}
            Some((Op::Concat(inner), inner_args)) if inner.axis == o.axis => parts.extend_from_slice(inner_args),
            _ => parts.push(arg),
        }
    }
    if parts.is_empty() {
        return value(args[0]);
    }
    // concat(x[a..b], x[b..c]) = x[a..c]
    let mut joined: Vec<ValueId> = Vec::with_capacity(parts.len());
    for &part in &parts {
        let merged = joined.last().and_then(|&last| adjacent(g, last, part, o.axis));
        match merged {
            Some((slice, x)) => {
                let mut whole = g.ty(part).clone();
                whole.shape[o.axis] = slice.end[o.axis] - slice.start[o.axis];
                joined.pop();
                joined.push(g.emit(Op::Slice(slice), vec![x], whole));
            }
            None => joined.push(part),
        }
    }
    if joined == args {
        return None;
    }
    debug_assert_eq!(joined.iter().map(|&p| g.ty(p).shape[o.axis]).sum::<usize>(), ty.shape[o.axis]);
    node(o.clone(), &joined)
}

/// The slice that covers two slices of the same value which follow each other along `axis`, and that value.
fn adjacent(g: &Graph, first: ValueId, second: ValueId, axis: usize) -> Option<(Slice, ValueId)> {
    let ((Op::Slice(a), x), (Op::Slice(b), y)) = (g.definition(first)?, g.definition(second)?) else { return None };
    let rank = a.start.len();
    let fits = x == y
        && a.step == b.step
        && a.step[axis] == 1
        && a.end[axis] == b.start[axis]
        && (0..rank).all(|i| i == axis || (a.start[i] == b.start[i] && a.end[i] == b.end[i]));
    let mut whole = a.clone();
    whole.end[axis] = b.end[axis];
    fits.then(|| (whole, x[0]))
}

fn broadcast(g: &Graph, x: ValueId, ty: &TensorType) -> Option<Rewrite> {
    // broadcast(x, k) = reshape(x, k) if it only adds axes of extent 1
    if g.ty(x).elements() == ty.elements() {
        return node(Reshape { shape: ty.shape.clone() }, &[x]);
    }
    // broadcast(broadcast(x, j), k) = broadcast(x, k)
    match g.definition(x)? {
        (Op::Broadcast(_), inner) => node(Broadcast { shape: ty.shape.clone() }, &[inner[0]]),
        _ => None,
    }
}

/// gather(x, [i, i + 1, ..]) = x[i ..]
fn gather(g: &Graph, o: &Gather, args: &[ValueId]) -> Option<Rewrite> {
    let indices = g.constant(args[1])?;
    let Values::Int(rows) = &indices.values else { return None };
    let x = g.ty(args[0]);
    let first = usize::try_from(*rows.first()?).ok()?;
    let end = first.checked_add(rows.len())?;
    let consecutive = rows.windows(2).all(|w| w[1] == w[0].wrapping_add(1));
    if rows.len() != indices.ty.elements() || !consecutive || end > x.shape[o.axis] {
        return None;
    }
    let mut slice = Slice { start: vec![0; x.rank()], end: x.shape.clone(), step: vec![1; x.rank()] };
    (slice.start[o.axis], slice.end[o.axis]) = (first, end);
    node(slice, &[args[0]])
}

/// cast(cast(x, j), k) = cast(x, k) if j holds every value of the dtype of x
fn cast(g: &Graph, o: Cast, x: ValueId) -> Option<Rewrite> {
    match g.definition(x)? {
        (Op::Cast(inner), args) if is_exact(g.ty(args[0]).dtype, inner.dtype) => node(o, &[args[0]]),
        _ => None,
    }
}

/// Whether every value of `from` is a value of the float `to`.
fn is_exact(from: DType, to: DType) -> bool {
    use DType::*;
    match to {
        F32 => !matches!(from, I32 | U32),
        BF16 | F16 => matches!(from, F8E4M3 | F8E5M2 | I8 | U8 | Bool) || from == to,
        _ => from == to,
    }
}

/// x + 0 = x − 0 = x · 1 = x / 1 = x ^ 1 = x, and 0 + x = 1 · x = x
fn identity(g: &Graph, o: Binary, args: &[ValueId], ty: &TensorType) -> Option<Rewrite> {
    let is = |v: ValueId, number: f64| g.constant(v).is_some_and(|c| uniform(c) == Some(number));
    let neutral = match o {
        Binary::Add | Binary::Sub => 0.0,
        Binary::Mul | Binary::Div | Binary::Pow => 1.0,
        Binary::Max | Binary::Min => return None,
    };
    if is(args[1], neutral) && g.ty(args[0]) == ty {
        return value(args[0]);
    }
    if matches!(o, Binary::Add | Binary::Mul) && is(args[0], neutral) && g.ty(args[1]) == ty {
        return value(args[1]);
    }
    None
}

/// The number that every element of a constant is.
fn uniform(c: &Const) -> Option<f64> {
    match &c.values {
        Values::Float(v) if v.len() == 1 => Some(v[0].0),
        Values::Int(v) if v.len() == 1 => Some(v[0] as f64),
        _ => None,
    }
}

/// select(true, x, y) = x, select(false, x, y) = y, select(c, x, x) = x
fn select(g: &Graph, args: &[ValueId], ty: &TensorType) -> Option<Rewrite> {
    let chosen = match g.constant(args[0]).and_then(uniform) {
        Some(c) => args[if c != 0.0 { 1 } else { 2 }],
        None if args[1] == args[2] => args[1],
        None => return None,
    };
    if g.ty(chosen) == ty { value(chosen) } else { None }
}

/// Operands that an op would change itself need not be changed before:
/// f(x, broadcast(y)) = f(x, y) and f(x, widen(y)) = f(x, y).
fn operands(g: &Graph, op: &Op, args: &[ValueId], ty: &TensorType) -> Option<Rewrite> {
    for (i, &arg) in args.iter().enumerate() {
        let source = match g.definition(arg) {
            Some((Op::Broadcast(_), inner)) => inner[0],
            // Every op below computes on widened operands, and takes its result dtype from the first.
            Some((Op::Cast(o), inner)) if widens(op, i) && is_widening(g.ty(inner[0]).dtype, o.dtype) => inner[0],
            _ => continue,
        };
        let mut new = args.to_vec();
        new[i] = source;
        let types: Vec<&TensorType> = new.iter().map(|&a| g.ty(a)).collect();
        if op.infer(&types).as_ref() == Ok(ty) {
            return node(op.clone(), &new);
        }
    }
    None
}

/// Whether `op` takes floats of any dtype as operand `i`.
fn widens(op: &Op, i: usize) -> bool {
    let is_parameter = i > 0;
    match op {
        Op::Binary(_) | Op::Matmul(_) | Op::Conv(_) | Op::ConvTranspose(_) => is_parameter,
        Op::RmsNorm(_) | Op::LayerNorm(_) | Op::GroupNorm(_) | Op::Snake(_) => is_parameter,
        _ => false,
    }
}

fn is_widening(from: DType, to: DType) -> bool {
    from.is_float() && to.is_float() && is_exact(from, to)
}
