//! Group norm with what follows it element by element.
//!
//! ```text
//! y = silu(group_norm(x, w, b))
//! ```
//!
//! The statistics need all of `x` first; the rest is one more pass, in which the norm is applied and whatever follows.

use ltxc_ir::Op;

use super::Nodes;
use super::graph::Graph;

pub(super) fn propose(graph: &Graph<'_>, at: usize) -> Vec<Nodes> {
    match graph.node(at).op {
        Op::GroupNorm(_) => vec![graph.pointwise_tail(at).into_iter().chain([at]).collect()],
        _ => Vec::new(),
    }
}
