//! Work along rows: norms, rotations, gathers of rows and everything pointwise.
//!
//! ```text
//! x' = x + gate · y;  h = norm(x') · (1 + scale) + shift      AdaLN, with the residual stream stored on the way
//! h  = silu(rms_norm(x) · (1 + scale) + shift)                pixel norm in front of a convolution
//! q' = rope(rms_norm(q))                                      where attention could not take it
//! y  = x + sin²(a x) / b                                      snake and the like, with what stands around it
//! ```
//!
//! A group grows from a node along its users and operands as long as all of it works by the same rows. Values that are
//! used elsewhere too are stored; all others never reach memory. Small tensors of one shape (modulation rows) are worked
//! on together even if they have nothing to do with each other, because each call costs more than its work.

use ltxc_ir::Op;
use ltxc_ir::plan::Form;

use super::Nodes;
use super::graph::Graph;
use super::outline::outline;

/// Largest number of nodes in a group.
const MOST: usize = 48;

/// Elements of a tensor for which a call costs more than the work.
const SMALL: usize = 1 << 14;

pub(super) fn propose(graph: &Graph<'_>, at: usize) -> Vec<Nodes> {
    let Some(mut rows) = natural_rows(graph, at) else { return Vec::new() };
    let mut group = Nodes::from([at]);
    // A node that does not fit is not tried again.
    let mut refused = Nodes::new();
    while group.len() < MOST {
        let Some(path) = next(graph, at, &group, &refused) else { break };
        let larger: Nodes = group.iter().chain(&path).copied().collect();
        let least = path.iter().filter_map(|&i| natural_rows(graph, i)).fold(rows, usize::min);
        // Fewer rows than the longest ones need would leave threads without work.
        let fits = |form: Form| matches!(form, Form::Rows { rows } if rows == least);
        match outline(graph, &larger) {
            Some(outlined) if fits(outlined.form) => (group, rows) = (larger, least),
            _ => refused.extend(path),
        }
    }
    vec![group]
}

/// The next node that could join, with the reshapes on the way to it.
fn next(graph: &Graph<'_>, at: usize, group: &Nodes, refused: &Nodes) -> Option<Vec<usize>> {
    let elements = graph.elements(at);
    let fits = |i: usize| {
        // Row by row, or one number for each row.
        let is_as_large = graph.elements(i) == elements || graph.last_extent(i) == 1;
        is_as_large && natural_rows(graph, i).is_some()
    };
    let is_new = |path: &[usize]| path.iter().all(|i| !group.contains(i) && !refused.contains(i));
    // Users of the group, through reshapes that nobody else uses.
    let results = group.iter().flat_map(|&i| &graph.node(i).results);
    for &user in results.flat_map(|r| &graph.users[r.index()]) {
        let mut path = vec![user];
        let mut last = user;
        while let (Op::Reshape(_), Some(next)) = (&graph.node(last).op, graph.only_user(last)) {
            path.push(next);
            last = next;
        }
        if fits(last) && is_new(&path) {
            return Some(path);
        }
    }
    // What only the group reads.
    let mut operands = group.iter().flat_map(|&i| &graph.node(i).args).filter_map(|&a| graph.definition(a));
    let feeds_only_group = |i: usize| match graph.node(i).results[..] {
        [value] => !graph.is_result[value.index()] && graph.users[value.index()].iter().all(|u| group.contains(u)),
        _ => false,
    };
    if let Some(operand) = operands.find(|&i| fits(i) && is_new(&[i]) && feeds_only_group(i)) {
        return Some(vec![operand]);
    }
    let shape = |i: usize| &graph.function.ty(graph.node(i).results[0]).shape;
    let is_like = |i: &usize| graph.is_pointwise(*i) && is_new(&[*i]) && shape(*i) == shape(at);
    (elements <= SMALL && graph.is_pointwise(at))
        .then(|| (at..graph.function.nodes.len()).find(is_like).map(|i| vec![i]))?
}

/// The number of rows that a node can be cut into, `None` if it does not work by rows.
fn natural_rows(graph: &Graph<'_>, i: usize) -> Option<usize> {
    let node = graph.node(i);
    let shape = |v: ltxc_ir::ValueId| &graph.function.ty(v).shape;
    let leading = |axes: usize| {
        let shape = shape(node.results[0]);
        shape[..shape.len().saturating_sub(axes)].iter().product()
    };
    match &node.op {
        Op::RmsNorm(_) | Op::LayerNorm(_) => Some(leading(1)),
        Op::Rope(_) => Some(leading(2)),
        Op::Gather(op) if op.axis == 0 => shape(node.results[0]).first().copied(),
        Op::Reduce(op) if op.axes.iter().eq([&shape(node.args[0]).len().wrapping_sub(1)]) => Some(leading(1)),
        _ if graph.is_pointwise(i) => Some(leading(1)),
        _ => None,
    }
}
