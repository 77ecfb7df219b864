//! Matrix products and convolutions with what follows them.
//!
//! ```text
//! y = gelu(a · b + bias)                       bias and activation
//! y = x + gate · (a · b + bias)                gated residual; the gate may be chosen per token from a table
//! y = depth_to_space(conv(pad(x)) + bias)      padded where it is read, rearranged where it is stored
//! y = conv(leaky_relu(x)) + bias               activated where it is read, if x is needed elsewhere, too
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
    let front = front(graph, at);
    let with = |parts: &[&[usize]]| parts.iter().flat_map(|p| p.iter().copied()).chain([at]).collect::<Nodes>();
    let mut proposals = vec![
        with(&[&front, &tail, &tables, &store]),
        with(&[&front, &tail, &store]),
        with(&[&front, &tail, &tables]),
        with(&[&front, &tail]),
    ];
    // Where the whole tail does not fit, its beginning may.
    proposals.extend((0..tail.len()).rev().map(|n| with(&[&front, &tail[..n]])));
    proposals
}

/// What a convolution does to its input where it reads it, last one first: pads, and a leaky ReLU.
///
/// Activating again for every tap costs less than a pass over the input; as much on a CPU in 16 bits with eleven taps of few
/// channels. An activation whose operand nobody else reads belongs to what makes that.
fn front(graph: &Graph<'_>, at: usize) -> Vec<usize> {
    let mut front = Vec::new();
    let mut value = graph.node(at).args[0];
    let is_conv = matches!(graph.node(at).op, Op::Conv(_) | Op::ConvTranspose(_));
    while let Some(before) = graph.definition(value).filter(|&d| is_conv && graph.only_user(d).is_some()) {
        value = match (&graph.node(before).op, &graph.node(before).args[..]) {
            (Op::Pad(_), &[x]) => x,
            (Op::LeakyRelu(_), &[x]) => {
                let is_read_elsewhere = graph.definition(x).is_none_or(|d| graph.only_user(d).is_none());
                front.extend(is_read_elsewhere.then_some(before));
                break;
            }
            _ => break,
        };
        front.push(before);
    }
    front
}

/// Gathers that only the tail uses: rows of a table, one for each row of the product.
fn gathers(graph: &Graph<'_>, tail: &[usize]) -> Vec<usize> {
    let operands = tail.iter().flat_map(|&i| &graph.node(i).args).filter_map(|&a| graph.definition(a));
    let is_table =
        |&i: &usize| matches!(graph.node(i).op, Op::Gather(_)) && graph.only_user(i).is_some_and(|u| tail.contains(&u));
    operands.filter(is_table).collect()
}
