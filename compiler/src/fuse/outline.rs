//! Takes a group of nodes out of a function and puts a call in their place.

use std::collections::{BTreeMap, BTreeSet};

use ltxc_ir::ops::Call;
use ltxc_ir::plan::{Form, Fused, Kernel};
use ltxc_ir::{Function, FunctionResult, Node, Op, Param, Rate, ValueId};

use super::Nodes;
use super::graph::Graph;
use crate::lower::{lower_group, uniform_value};
use crate::rebuild::Rebuild;

/// A group that can run as one kernel.
pub(super) struct Outlined<'a> {
    function: &'a Function,
    /// How it can be cut into pieces.
    pub form: Form,
    /// The group as a function without a name.
    body: Function,
    /// Values of the function that the group reads, and those it makes.
    args: Vec<ValueId>,
    results: Vec<ValueId>,
    /// Nodes outside the group before the call and behind it.
    before: Vec<usize>,
    after: Vec<usize>,
}

/// Outlines `nodes`; `None` if they are not one kernel, or one with more operands than the target binds.
pub(super) fn outline<'a>(graph: &Graph<'a>, nodes: &Nodes) -> Option<Outlined<'a>> {
    if !graph.is_worth_it(nodes) {
        return None;
    }
    let function = graph.function;
    let is_copied = |v: ValueId| match graph.definition(v).map(|d| &graph.node(d).op) {
        Some(Op::Const(c)) => uniform_value(&c.values).is_some(),
        _ => false,
    };
    let mut args: Vec<ValueId> = Vec::new();
    let mut copied: Vec<ValueId> = Vec::new();
    for &arg in nodes.iter().flat_map(|&i| &graph.node(i).args) {
        let is_inside = graph.definition(arg).is_some_and(|d| nodes.contains(&d));
        let list = if is_copied(arg) { &mut copied } else { &mut args };
        if !is_inside && !list.contains(&arg) {
            list.push(arg);
        }
    }
    let is_seen = |v: &ValueId| graph.is_result[v.index()] || graph.users[v.index()].iter().any(|u| !nodes.contains(u));
    let results: Vec<ValueId> = nodes.iter().flat_map(|&i| &graph.node(i).results).copied().filter(is_seen).collect();
    if args.len() + results.len() > graph.max_bindings {
        return None;
    }
    let (before, after) = split(graph, nodes, &args)?;
    let mut body = Function::default();
    let mut map: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for &arg in &args {
        let value = body.add_value(function.ty(arg).clone(), "");
        body.params.push(Param { value, rate: Rate::Step });
        map.insert(arg, value);
    }
    let constants = copied.iter().filter_map(|&v| graph.definition(v));
    for node in constants.chain(nodes.iter().copied()).map(|i| graph.node(i)) {
        let args = node.args.iter().map(|a| map[a]).collect();
        let new = node.results.iter().map(|&r| {
            let new = body.add_value(function.ty(r).clone(), function.name_of(r));
            map.insert(r, new);
            new
        });
        let results = new.collect();
        body.nodes.push(Node { op: node.op.clone(), args, results });
    }
    for &result in &results {
        body.results.push(FunctionResult { name: function.name_of(result).into(), value: map[&result] });
    }
    body.pattern = Some(String::new());
    let fused = lower_group(&body).ok()?;
    body.pattern = Some(pattern(&fused).into());
    let form = fused.form().ok()?;
    Some(Outlined { function, form, body, args, results, before, after })
}

/// Nodes outside the group that run before it and behind it; `None` if some would have to run in the middle.
///
/// Only nodes between the first and the last of the group have to be looked at.
fn split(graph: &Graph<'_>, nodes: &Nodes, args: &[ValueId]) -> Option<(Vec<usize>, Vec<usize>)> {
    let (&first, &last) = (nodes.first()?, nodes.last()?);
    let (mut before, mut after): (Vec<usize>, Vec<usize>) = ((0..first).collect(), Vec::new());
    let mut depends = vec![false; graph.function.values.len()];
    for i in first..=last {
        let node = graph.node(i);
        let is_inside = nodes.contains(&i);
        let does_depend = is_inside || node.args.iter().any(|a| depends[a.index()]);
        if does_depend {
            node.results.iter().for_each(|r| depends[r.index()] = true);
        }
        match (is_inside, does_depend) {
            (true, _) => {}
            (false, true) => after.push(i),
            (false, false) => before.push(i),
        }
    }
    after.extend(last + 1..graph.function.nodes.len());
    let is_late = |a: &&ValueId| graph.definition(**a).is_some_and(|d| after.contains(&d));
    args.iter().find(is_late).is_none().then_some((before, after))
}

/// Name of the pattern for reports.
fn pattern(fused: &Fused) -> &'static str {
    let has = |f: fn(&Kernel) -> bool| fused.parts.iter().any(|p| f(&p.kernel));
    let is_norm = |k: &Kernel| matches!(k, Kernel::RmsNorm(_) | Kernel::LayerNorm(_));
    match () {
        () if has(|k| matches!(k, Kernel::Attention(_))) => "attention",
        () if has(|k| matches!(k, Kernel::Matmul(_))) => "gemm",
        () if has(|k| matches!(k, Kernel::Conv(_) | Kernel::ConvTranspose(_))) => "conv",
        () if has(|k| matches!(k, Kernel::GroupNorm(_))) => "group-norm",
        () if has(|k| matches!(k, Kernel::Rope(_))) => "norm-rope",
        () if has(is_norm) && has(|k| matches!(k, Kernel::Map(_))) && modulates(fused) => "adaln",
        () if has(is_norm) => "norm",
        () => "map",
    }
}

/// Whether a map takes more than one operand.
fn modulates(fused: &Fused) -> bool {
    fused.parts.iter().any(|p| matches!(p.kernel, Kernel::Map(_)) && p.args.len() > 1)
}

impl Outlined<'_> {
    /// The function with a call of the group, which is added to `groups` unless an equal one is there.
    pub fn finish(self, groups: &mut Vec<Function>, taken: &mut BTreeSet<String>) -> Function {
        let is_same = |g: &&Function| Function { name: String::new(), ..(*g).clone() } == self.body;
        let name = match groups.iter().find(is_same) {
            Some(known) => known.name.clone(),
            None => {
                let pattern = self.body.pattern.clone().unwrap_or_default();
                let stem = format!("{}.{pattern}", self.function.name);
                let mut names = (0..).map(|n| format!("{stem}.{n}"));
                // There are more numbers than names.
                let name = names.find(|n| !taken.contains(n)).unwrap_or(stem);
                taken.insert(name.clone());
                groups.push(Function { name: name.clone(), ..self.body });
                name
            }
        };
        let mut rebuild = Rebuild::new(self.function, &self.function.name);
        rebuild.params();
        self.before.iter().for_each(|&i| rebuild.node(&self.function.nodes[i]));
        let names: Vec<&str> = self.results.iter().map(|&r| self.function.name_of(r)).collect();
        // Results without any name need no separators.
        let value_name = if names.iter().all(|n| n.is_empty()) { String::new() } else { names.join("|") };
        let node = Node {
            op: Op::Call(Call { function: name, prefix: String::new(), name: value_name }),
            args: self.args,
            results: self.results,
        };
        rebuild.node(&node);
        self.after.iter().for_each(|&i| rebuild.node(&self.function.nodes[i]));
        rebuild.results();
        rebuild.out
    }
}
