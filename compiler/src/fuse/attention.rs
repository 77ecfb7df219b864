//! Attention with the norms and rotations of its queries and keys, and with what follows it element by element.
//!
//! ```text
//! y = attention(rope(rms_norm(q, w) …), rope(rms_norm(k, w') …), v) · gate
//! ```
//!
//! Queries and keys are normed and rotated as they are read, and each head is gated as it is written.

use ltxc_ir::{Op, ValueId};

use super::Nodes;
use super::graph::Graph;

pub(super) fn propose(graph: &Graph<'_>, at: usize) -> Vec<Nodes> {
    if !matches!(graph.node(at).op, Op::Attention(_)) {
        return Vec::new();
    }
    let args = &graph.node(at).args;
    let heads: Vec<usize> = args[..2].iter().flat_map(|&arg| chain(graph, arg)).collect();
    let tail = graph.pointwise_tail(at);
    let with = |parts: &[&[usize]]| parts.iter().flat_map(|p| p.iter().copied()).chain([at]).collect::<Nodes>();
    vec![with(&[&heads, &tail]), with(&[&heads]), with(&[&tail])]
}

/// Norms and rotations that make `value` and nothing else.
fn chain(graph: &Graph<'_>, value: ValueId) -> Vec<usize> {
    let (mut chain, mut pending) = (Vec::new(), Vec::new());
    let mut value = value;
    while let Some(node) = graph.definition(value).filter(|&d| graph.only_user(d).is_some()) {
        match graph.node(node).op {
            Op::Reshape(_) => pending.push(node),
            Op::RmsNorm(_) | Op::Rope(_) => {
                chain.append(&mut pending);
                chain.push(node);
            }
            _ => break,
        }
        value = graph.node(node).args[0];
    }
    chain
}
