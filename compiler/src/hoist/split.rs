//! Cutting a function into one function per level, and calling the parts instead of the whole.

use std::collections::{BTreeMap, BTreeSet};

use ltxc_ir::ops::Call;
use ltxc_ir::{Function, Node, Op, Param, TensorType, ValueId};

use super::cuts::Cuts;
use super::{Body, Hoister, Level};
use crate::rebuild::Rebuild;

/// The part of a function that belongs to one level.
pub(super) struct Part {
    pub level: Level,
    /// Which nodes of the body it computes.
    nodes: Vec<bool>,
    /// Positions of the parameters of the whole that it takes.
    params: Vec<usize>,
    /// Kept values that it takes from slower parts, with their names.
    takes: Vec<(ValueId, String)>,
    /// What it gives.
    results: Vec<PartResult>,
}

struct PartResult {
    name: String,
    value: ValueId,
    /// Positions among the results of the whole.
    positions: Vec<usize>,
}

/// A function that was split, as its callers see it: the parts, slowest first. No parts: it was not split.
pub(super) struct Split {
    pub parts: Vec<Called>,
}

/// One part as its callers see it.
pub(super) struct Called {
    level: Level,
    function: String,
    args: Vec<Source>,
    results: Vec<CalledResult>,
}

/// Where an operand of a part comes from.
enum Source {
    /// The operand of the whole at this position.
    Param(usize),
    /// A result of a slower part.
    Kept(ValueId),
}

struct CalledResult {
    name: String,
    ty: TensorType,
    value: ValueId,
    positions: Vec<usize>,
}

impl Called {
    pub(super) fn new(body: &Body, part: &Part, function: String) -> Called {
        let params = part.params.iter().map(|&p| Source::Param(p));
        let takes = part.takes.iter().map(|(v, _)| Source::Kept(*v));
        let results = part.results.iter().map(|r| CalledResult {
            name: r.name.clone(),
            ty: body.function.ty(r.value).clone(),
            value: r.value,
            positions: r.positions.clone(),
        });
        Called { level: part.level, function, args: params.chain(takes).collect(), results: results.collect() }
    }
}

/// The parts that the cuts make of a function, slowest first. An entry's own part gives all its results.
pub(super) fn parts(body: &Body, cuts: &Cuts, is_entry: bool) -> Vec<Part> {
    let f = &body.function;
    let names = names(f, cuts);
    let levels = [Level::Generation, Level::Evaluation, Level::Step];
    let mut parts = Vec::new();
    for level in levels.into_iter().filter(|&l| l <= body.top) {
        let results: Vec<PartResult> = if level == body.top {
            let own = f.results.iter().enumerate().filter(|(_, r)| is_entry || !cuts.contains(&r.value));
            own.map(|(i, r)| PartResult { name: r.name.clone(), value: r.value, positions: vec![i] }).collect()
        } else {
            let here = cuts.iter().filter(|&&v| body.level(v) == level);
            here.map(|&value| PartResult {
                name: names[&value].clone(),
                value,
                positions: (0..f.results.len()).filter(|&i| f.results[i].value == value).collect(),
            })
            .collect()
        };
        if !results.is_empty() {
            parts.push(part(body, cuts, &names, level, results));
        }
    }
    parts
}

/// Collects what a part needs to compute its results.
fn part(body: &Body, cuts: &Cuts, names: &BTreeMap<ValueId, String>, level: Level, results: Vec<PartResult>) -> Part {
    let f = &body.function;
    let mut nodes = vec![false; f.nodes.len()];
    let mut params = BTreeSet::new();
    let mut takes = BTreeSet::new();
    let mut stack: Vec<ValueId> = results.iter().map(|r| r.value).collect();
    while let Some(value) = stack.pop() {
        if body.level(value) < level && cuts.contains(&value) {
            takes.insert(value);
            continue;
        }
        match body.definitions[value.index()] {
            None => {
                params.insert(value);
            }
            Some(node) if !nodes[node] => {
                nodes[node] = true;
                stack.extend(&f.nodes[node].args);
            }
            Some(_) => {}
        }
    }
    let params = (0..f.params.len()).filter(|&i| params.contains(&f.params[i].value)).collect();
    let takes = takes.into_iter().map(|v| (v, names[&v].clone())).collect();
    Part { level, nodes, params, takes, results }
}

/// A name for every kept value: its own name path if that is free, else a numbered one.
fn names(f: &Function, cuts: &Cuts) -> BTreeMap<ValueId, String> {
    let params = f.params.iter().map(|p| f.name_of(p.value).to_string());
    let mut taken: BTreeSet<String> = params.chain(f.results.iter().map(|r| r.name.clone())).collect();
    let mut names = BTreeMap::new();
    for (i, &value) in cuts.iter().enumerate() {
        let wanted = match f.name_of(value) {
            "" => format!("kept.{i}"),
            name => name.to_string(),
        };
        let mut name = wanted.clone();
        let mut n = 2;
        while !taken.insert(name.clone()) {
            name = format!("{wanted}.{n}");
            n += 1;
        }
        names.insert(value, name);
    }
    names
}

/// Writes a part as a function.
pub(super) fn emit(body: &Body, part: &Part, name: &str) -> Function {
    let f = &body.function;
    let mut rebuild = Rebuild::new(f, name);
    part.params.iter().for_each(|&p| rebuild.param(&f.params[p]));
    for (value, name) in &part.takes {
        let new = rebuild.out.add_value(f.ty(*value).clone(), name.clone());
        rebuild.out.params.push(Param { value: new, rate: body.level(*value).rate() });
        rebuild.set(*value, new);
    }
    f.nodes.iter().zip(&part.nodes).filter(|(_, needed)| **needed).for_each(|(node, _)| rebuild.node(node));
    for r in &part.results {
        let value = rebuild.get(r.value);
        rebuild.out.results.push(ltxc_ir::FunctionResult { name: r.name.clone(), value });
    }
    rebuild.out
}

impl Hoister<'_> {
    /// The function with every call replaced by calls of the parts of its callee, and the level of every value.
    pub(super) fn expand_calls(&mut self, function: &Function, levels: &[Level]) -> Body {
        let mut rebuild = Rebuild::new(function, &function.name);
        rebuild.params();
        let mut new_levels = levels.to_vec();
        let mut calls = Calls::new();
        for node in &function.nodes {
            let args: Vec<Level> = node.args.iter().map(|&a| new_levels[rebuild.get(a).index()]).collect();
            let fastest = args.iter().copied().max().unwrap_or(Level::Constant);
            let Op::Call(call) = &node.op else {
                rebuild.node(node);
                new_levels.push(fastest);
                continue;
            };
            let split = if is_mixed(&args) { self.split(&call.function, &args) } else { None };
            match split {
                Some(split) if !split.parts.is_empty() => {
                    call_parts(&mut rebuild, &mut new_levels, &mut calls, node, call, &split);
                }
                _ => {
                    rebuild.node(node);
                    new_levels.extend(node.results.iter().map(|_| fastest));
                }
            }
        }
        rebuild.results();
        let top = levels.iter().copied().max().unwrap_or(Level::Constant).max(Level::Generation);
        let definitions = rebuild.out.definitions();
        Body { function: rebuild.out, levels: new_levels, top, definitions }
    }
}

/// Whether there is something to separate.
fn is_mixed(levels: &[Level]) -> bool {
    let mut slow = levels.iter().filter(|&&l| l > Level::Constant);
    slow.next().is_some_and(|first| slow.any(|l| l != first))
}

/// Results of the calls of parts so far, by function, prefix of the weights and operands: what is asked twice, as by the
/// passes of one step, is computed and kept once.
type Calls = BTreeMap<(String, String, Vec<ValueId>), Vec<ValueId>>;

fn call_parts(
    rebuild: &mut Rebuild<'_>,
    levels: &mut Vec<Level>,
    calls: &mut Calls,
    node: &Node,
    call: &Call,
    split: &Split,
) {
    let mut kept: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for part in &split.parts {
        let args = part.args.iter().map(|source| match source {
            Source::Param(i) => rebuild.get(node.args[*i]),
            Source::Kept(v) => kept[v],
        });
        let args: Vec<ValueId> = args.collect();
        let key = (part.function.clone(), call.prefix.clone(), args.clone());
        let standing = calls.get(&key).cloned();
        let mut results = Vec::with_capacity(part.results.len());
        for (i, r) in part.results.iter().enumerate() {
            let value = standing.as_ref().map_or_else(
                || {
                    let dot = if call.name.is_empty() { "" } else { "." };
                    levels.push(part.level);
                    rebuild.out.add_value(r.ty.clone(), format!("{}{dot}{}", call.name, r.name))
                },
                |standing| standing[i],
            );
            kept.insert(r.value, value);
            r.positions.iter().for_each(|&i| rebuild.set(node.results[i], value));
            results.push(value);
        }
        if standing.is_none() {
            calls.insert(key, results.clone());
            let op = Op::Call(Call { function: part.function.clone(), ..call.clone() });
            rebuild.out.nodes.push(Node { op, args, results });
        }
    }
}
