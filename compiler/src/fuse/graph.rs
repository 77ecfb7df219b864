//! A function with the questions that fusion asks about it.

use ltxc_ir::{Function, Node, Op, ValueId};

use super::Nodes;
use crate::lower::is_pointwise;

/// A function, with definitions and users of its values.
pub(super) struct Graph<'a> {
    pub function: &'a Function,
    pub definitions: Vec<Option<usize>>,
    /// Nodes that use each value, once for every use.
    pub users: Vec<Vec<usize>>,
    /// Whether each value is a result of the function.
    pub is_result: Vec<bool>,
    /// Largest number of operands and results of a group.
    pub max_bindings: usize,
}

impl<'a> Graph<'a> {
    pub fn new(function: &'a Function, max_bindings: u32) -> Graph<'a> {
        let mut users = vec![Vec::new(); function.values.len()];
        for (i, node) in function.nodes.iter().enumerate() {
            node.args.iter().for_each(|a| users[a.index()].push(i));
        }
        let mut is_result = vec![false; function.values.len()];
        function.results.iter().for_each(|r| is_result[r.value.index()] = true);
        let max_bindings = max_bindings as usize;
        Graph { function, definitions: function.definitions(), users, is_result, max_bindings }
    }

    pub fn node(&self, index: usize) -> &'a Node {
        &self.function.nodes[index]
    }

    /// The node that defines a value.
    pub fn definition(&self, value: ValueId) -> Option<usize> {
        self.definitions[value.index()]
    }

    /// The only user of the result of node `index`, if there is one and nobody else sees the value.
    pub fn only_user(&self, index: usize) -> Option<usize> {
        let [value] = self.node(index).results[..] else { return None };
        match self.users[value.index()][..] {
            _ if self.is_result[value.index()] => None,
            [] => None,
            [first, ref rest @ ..] => rest.iter().all(|&u| u == first).then_some(first),
        }
    }

    /// Elements of the result of a node.
    pub fn elements(&self, index: usize) -> usize {
        self.function.ty(self.node(index).results[0]).elements()
    }

    /// Extent of the last axis of the result of a node.
    pub fn last_extent(&self, index: usize) -> usize {
        self.function.ty(self.node(index).results[0]).shape.last().copied().unwrap_or(1)
    }

    pub fn is_pointwise(&self, index: usize) -> bool {
        is_pointwise(&self.node(index).op)
    }

    /// The chain behind node `from`: pointwise nodes on all of its elements, each the only user of what comes before.
    ///
    /// Reshapes on the way belong to it if something follows them. Whatever else a node of the chain reads does not
    /// depend on the chain, because all of it has one user only.
    pub fn pointwise_tail(&self, from: usize) -> Vec<usize> {
        let (mut tail, mut pending) = (Vec::new(), Vec::new());
        let mut at = from;
        while let Some(user) = self.only_user(at) {
            let keeps_elements = self.elements(user) == self.elements(from);
            match &self.node(user).op {
                Op::Reshape(_) => pending.push(user),
                _ if self.is_pointwise(user) && keeps_elements => {
                    tail.append(&mut pending);
                    tail.push(user);
                }
                _ => break,
            }
            at = user;
        }
        tail
    }

    /// The movement behind node `from` that one copy does: reshapes, transposes, and in the end a tensor in row-major order.
    pub fn store_tail(&self, from: usize) -> Vec<usize> {
        let (mut tail, mut at) = (Vec::new(), from);
        while let Some(user) = self.only_user(at) {
            if !matches!(self.node(user).op, Op::Reshape(_) | Op::Transpose(_)) {
                break;
            }
            tail.push(user);
            at = user;
        }
        let moves = tail.iter().any(|&i| matches!(self.node(i).op, Op::Transpose(_)));
        // What follows a transpose may be another one, which the next kernel would rather read as a view.
        if moves && matches!(self.node(at).op, Op::Reshape(_)) { tail } else { Vec::new() }
    }

    /// The slices that cut the result of node `from` along its last axis, if nothing else uses it.
    pub fn split_tail(&self, from: usize) -> Vec<usize> {
        let [value] = self.node(from).results[..] else { return Vec::new() };
        let users = &self.users[value.index()];
        let last = self.function.ty(value).rank().saturating_sub(1);
        let cuts_channels = |&u: &usize| match &self.node(u).op {
            Op::Slice(cut) => (0..last).all(|a| cut.start[a] == 0 && cut.end[a] == self.function.ty(value).shape[a]),
            _ => false,
        };
        let is_split = !self.is_result[value.index()] && users.len() > 1 && users.iter().all(cuts_channels);
        if is_split { users.clone() } else { Vec::new() }
    }

    /// Whether the nodes hold at least two kernels: with fewer there is nothing to fuse.
    pub fn is_worth_it(&self, nodes: &Nodes) -> bool {
        let is_view = |i: usize| matches!(self.node(i).op, Op::Reshape(_) | Op::Const(_));
        nodes.iter().filter(|&&i| !is_view(i)).count() > 1
    }
}
