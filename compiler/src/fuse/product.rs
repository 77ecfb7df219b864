//! Matrix products and convolutions with what follows them.
//!
//! ```text
//! y = gelu(a · b + bias)                       bias and activation
//! y = x + gate · (a · b + bias)                gated residual; the gate may be chosen per token from a table
//! y = depth_to_space(conv(pad(x)) + bias)      rearranged where it is stored
//! q, k, v = split(x · [a b c] + [p q r])       each part stored as a tensor of its own
//! ```
//!
//! Each element of the product is finished and stored where it belongs while it is still in a register or in cache.

use ltxc_ir::Op;

use super::Nodes;
use super::graph::Graph;

pub(super) fn propose(graph: &Graph<'_>, at: usize) -> Vec<Nodes> {
    if !matches!(graph.node(at).op, Op::Matmul(_) | Op::Conv(_) | Op::ConvTranspose(_)) {
        return Vec::new();
    }
    let tail = graph.pointwise_tail(at);
    let last = tail.last().copied().unwrap_or(at);
    let store = [graph.store_tail(last), graph.split_tail(last)].concat();
    let tables = gathers(graph, &tail);
    let pads = pads(graph, at);
    let with = |parts: &[&[usize]]| parts.iter().flat_map(|p| p.iter().copied()).chain([at]).collect::<Nodes>();
    let mut proposals = vec![
        with(&[&pads, &tail, &tables, &store]),
        with(&[&pads, &tail, &store]),
        with(&[&pads, &tail, &tables]),
        with(&[&pads, &tail]),
    ];
    // Where the whole tail does not fit, its beginning may.
    proposals.extend((0..tail.len()).rev().map(|n| with(&[&pads, &tail[..n]])));
    proposals
}

/// Pads of the input of a convolution, last one first.
fn pads(graph: &Graph<'_>, at: usize) -> Vec<usize> {
    let mut pads = Vec::new();
    let mut value = graph.node(at).args[0];
    let is_conv = matches!(graph.node(at).op, Op::Conv(_));
    while let Some(pad) = graph.definition(value).filter(|&d| is_conv && graph.only_user(d).is_some()) {
        if !matches!(graph.node(pad).op, Op::Pad(_)) {
            break;
        }
        pads.push(pad);
        value = graph.node(pad).args[0];
    }
    pads
}

/// Gathers that only the tail uses: rows of a table, one for each row of the product.
fn gathers(graph: &Graph<'_>, tail: &[usize]) -> Vec<usize> {
    let operands = tail.iter().flat_map(|&i| &graph.node(i).args).filter_map(|&a| graph.definition(a));
    let is_table =
        |&i: &usize| matches!(graph.node(i).op, Op::Gather(_)) && graph.only_user(i).is_some_and(|u| tail.contains(&u));
    operands.filter(is_table).collect()
}
