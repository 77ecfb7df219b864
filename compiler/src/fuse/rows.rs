//! Work along rows: norms, rotations, gathers of rows and everything pointwise.
//!
//! ```text
//! x' = x + gate · y;  h = norm(x') · (1 + scale) + shift      AdaLN, with the residual stream stored on the way
//! h  = silu(rms_norm(x) · (1 + scale) + shift)                pixel norm in front of a convolution
//! q' = rope(rms_norm(q))                                      where attention could not take it
//! y  = x + sin²(a x) / b                                      snake and the like, with what stands around it
//! ```
//!
//! A group grows from a node along its users as long as all of it works by the same rows. Values that are used elsewhere
//! too are stored; all others never reach memory.

use ltxc_ir::Op;

use super::Nodes;
use super::graph::Graph;
use super::outline::outline;

/// Largest number of kernels in a group.
const MOST: usize = 24;

pub(super) fn propose(graph: &Graph<'_>, at: usize) -> Vec<Nodes> {
    if !works_by_rows(graph, at) {
        return Vec::new();
    }
    let mut group = Nodes::from([at]);
    // Candidates are users of the group and what those read, in the order of the function; a node that does not fit
    // is not tried again.
    let mut refused = Nodes::new();
    while group.len() < MOST {
        let Some(next) = next(graph, &group, &refused) else { break };
        let larger: Nodes = group.iter().copied().chain(next.iter().copied()).collect();
        match outline(graph, &larger) {
            Some(_) => group = larger,
            None => refused.extend(next),
        }
    }
    vec![group]
}

/// The next node that could join, with the reshapes between.
fn next(graph: &Graph<'_>, group: &Nodes, refused: &Nodes) -> Option<Vec<usize>> {
    let is_new = |i: &usize| !group.contains(i) && !refused.contains(i);
    // Users of the group, through reshapes that nobody else uses.
    for &member in group {
        for &result in &graph.node(member).results {
            for &user in &graph.users[result.index()] {
                let mut path = vec![user];
                while matches!(graph.node(path[path.len() - 1]).op, Op::Reshape(_)) {
                    match graph.only_user(path[path.len() - 1]) {
                        Some(user) => path.push(user),
                        None => break,
                    }
                }
                let fits = path.iter().all(|i| is_new(i)) && works_by_rows(graph, path[path.len() - 1]);
                if fits {
                    return Some(path);
                }
            }
        }
    }
    // What only the group reads.
    let mut operands = group.iter().flat_map(|&i| &graph.node(i).args).filter_map(|&a| graph.definition(a));
    let feeds_only = |&i: &usize| {
        let [value] = graph.node(i).results[..] else { return false };
        !graph.is_result[value.index()] && graph.users[value.index()].iter().all(|u| group.contains(u))
    };
    operands.find(|i| is_new(i) && works_by_rows(graph, *i) && feeds_only(i)).map(|i| vec![i])
}

fn works_by_rows(graph: &Graph<'_>, i: usize) -> bool {
    let node = graph.node(i);
    match &node.op {
        Op::RmsNorm(_) | Op::LayerNorm(_) | Op::Rope(_) => true,
        Op::Gather(op) => op.axis == 0,
        Op::Reduce(op) => op.axes.iter().eq([&graph.function.ty(node.args[0]).rank().wrapping_sub(1)]),
        _ => graph.is_pointwise(i),
    }
}
