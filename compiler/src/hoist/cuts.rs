//! Choosing which slow values are kept between runs.
//!
//! A value that a faster part needs is worth keeping if computing it takes at least [`WORK_PER_BYTE`] for each byte that
//! keeping it takes. If its last op adds little work and many bytes (a broadcast, a widening cast), its operands are
//! looked at instead. A value that was given its name by a reshape is kept in that shape, under that name. What is not
//! worth keeping is computed by every part that needs it.

use std::collections::{BTreeMap, BTreeSet};

use ltxc_ir::{Op, ValueId};

use super::{Body, Level};
use crate::cost;

/// Least work, in units of [`cost::work`], that must be saved for each byte that is kept.
///
/// Reading a kept byte back costs about as much as one or two simple operations, so less would save nothing.
const WORK_PER_BYTE: u64 = 2;

/// Values that are kept: computed by the part of their level, and given to faster parts.
pub(super) type Cuts = BTreeSet<ValueId>;

/// The values worth keeping, whatever they take: a function's callers decide what is really kept.
pub(super) fn choose(body: &Body, work: &BTreeMap<String, u64>) -> Cuts {
    choose_within(body, work, u64::MAX)
}

/// The values worth keeping that together take at most `budget` bytes, those that save most for a byte first.
pub(super) fn choose_within(body: &Body, work: &BTreeMap<String, u64>, budget: u64) -> Cuts {
    let mut search = Search { body, work, accepted: BTreeSet::new(), rejected: BTreeSet::new(), kept: Cuts::new() };
    let mut left = budget;
    loop {
        let mut found = search.candidates();
        if found.is_empty() {
            return search.kept;
        }
        // Work per byte, descending; ties in order of the nodes.
        found.sort_by(|a, b| {
            let (x, y) = (a.work as u128 * b.bytes as u128, b.work as u128 * a.bytes as u128);
            y.cmp(&x).then(a.node.cmp(&b.node))
        });
        for candidate in found {
            if candidate.bytes <= left {
                left -= candidate.bytes;
                search.accepted.insert(candidate.node);
            } else {
                search.rejected.insert(candidate.node);
            }
        }
    }
}

/// A node whose results may be kept.
struct Candidate {
    node: usize,
    work: u64,
    bytes: u64,
}

struct Search<'a> {
    body: &'a Body,
    work: &'a BTreeMap<String, u64>,
    /// Nodes whose results are kept where a faster part needs them.
    accepted: BTreeSet<usize>,
    /// Nodes whose results did not fit the budget.
    rejected: BTreeSet<usize>,
    /// Results of accepted nodes that a faster part needs.
    kept: Cuts,
}

impl Search<'_> {
    /// Nodes worth keeping that were not decided about; records which results of accepted nodes are needed.
    fn candidates(&mut self) -> Vec<Candidate> {
        let body = self.body;
        self.kept.clear();
        let mut found: BTreeMap<usize, Candidate> = BTreeMap::new();
        // Parts from fast to slow: what a slower part must compute is known when it is its turn.
        for level in [Level::Step, Level::Evaluation, Level::Generation] {
            let mut stack: Vec<ValueId> = match level == body.top {
                true => body.function.results.iter().map(|r| r.value).collect(),
                false => self.kept.iter().copied().filter(|&v| body.level(v) == level).collect(),
            };
            if level > body.top {
                continue;
            }
            let mut seen = BTreeSet::new();
            while let Some(value) = stack.pop() {
                let Some(node) = body.definitions[value.index()] else { continue };
                if !seen.insert(value) {
                    continue;
                }
                if body.level(value) < level && body.level(value) > Level::Constant {
                    if self.accepted.contains(&node) {
                        self.kept.insert(value);
                        continue;
                    }
                    if !self.rejected.contains(&node)
                        && let Some(candidate) = self.judge(node)
                    {
                        found.insert(node, candidate);
                        continue;
                    }
                }
                stack.extend(&body.function.nodes[node].args);
            }
        }
        found.into_values().collect()
    }

    /// The node as a candidate, if keeping its results is better than keeping its operands or nothing.
    fn judge(&self, node: usize) -> Option<Candidate> {
        let f = &self.body.function;
        let bytes = f.nodes[node].results.iter().fold(0u64, |n, &r| n.saturating_add(f.ty(r).bytes() as u64));
        let work = self.cone_work(node);
        if bytes == 0 || work < bytes.saturating_mul(WORK_PER_BYTE) {
            return None;
        }
        let mut operands: Vec<ValueId> = f.nodes[node].args.clone();
        operands.sort_unstable();
        operands.dedup();
        // Operands that would have to be kept instead: parameters and constants are there anyway.
        operands.retain(|&a| self.body.definitions[a.index()].is_some() && self.body.level(a) > Level::Constant);
        let operand_bytes = operands.iter().fold(0u64, |n, &a| n.saturating_add(f.ty(a).bytes() as u64));
        let own = cost::work(f, &f.nodes[node], self.work);
        let more_bytes = bytes.saturating_sub(operand_bytes);
        let is_no_better = bytes >= operand_bytes && own <= more_bytes.saturating_mul(WORK_PER_BYTE);
        if !operands.is_empty() && is_no_better && !self.gives_name(node) {
            return None;
        }
        Some(Candidate { node, work, bytes })
    }

    /// Whether a node is a reshape that names a value which nothing else uses. Either can be kept; people know the named one.
    fn gives_name(&self, node: usize) -> bool {
        let f = &self.body.function;
        let reshape = &f.nodes[node];
        let [arg] = reshape.args[..] else { return false };
        let users = || f.nodes.iter().filter(|n| n.args.contains(&arg)).count();
        let is_named = !f.name_of(reshape.results[0]).is_empty() && f.name_of(arg).is_empty();
        matches!(reshape.op, Op::Reshape(_)) && is_named && users() == 1 && f.results.iter().all(|r| r.value != arg)
    }

    /// Work of a node and everything it is computed from.
    fn cone_work(&self, node: usize) -> u64 {
        let f = &self.body.function;
        let mut needed = vec![false; node + 1];
        needed[node] = true;
        let mut total = 0u64;
        for i in (0..=node).rev() {
            if !needed[i] {
                continue;
            }
            total = total.saturating_add(cost::work(f, &f.nodes[i], self.work));
            for a in &f.nodes[i].args {
                if let Some(definition) = self.body.definitions[a.index()] {
                    needed[definition] = true;
                }
            }
        }
        total
    }
}
