//! Pass `pack`: what is made of weights alone is made once, when weights are bound.
//!
//! A maximal chain of ops between weights and the first op that also needs an activation becomes a function of its own,
//! a **recipe**: `pack.3(w) = transpose(w)`. The chain is replaced by a call of the recipe with the raw weights, and
//! lowering turns such calls into weights that the plan says how to make. Equal recipes are one function.
//!
//! Left alone: chains that only reshape or cut out a contiguous part, because the mapped file can be read in place, and
//! chains that make something much larger than the weights, because the copy stays in memory.

use std::collections::{BTreeMap, HashMap};

use ltxc_ir::ops::{Call, Slice};
use ltxc_ir::{Function, FunctionResult, Module, Node, Op, Param, Rate, TensorType, ValueId};

use crate::rebuild::Rebuild;

/// A recipe may make this many times the bytes of its weights: bf16 widened to f32 is twice as large.
const MOST_GROWTH: u64 = 2;

/// What a recipe may make however small its weights are.
const SMALL_BYTES: u64 = 4096;

/// Moves chains of ops on weights into recipes.
pub fn pack(module: &Module) -> Module {
    let mut recipes = Recipes { known: HashMap::new(), functions: Vec::new(), taken: Vec::new() };
    recipes.taken = module.functions.iter().map(|f| f.name.clone()).collect();
    let functions: Vec<Function> = module.functions.iter().map(|f| pack_function(f, &mut recipes)).collect();
    let functions = recipes.functions.into_iter().chain(functions).collect();
    Module { functions, entries: module.entries.clone() }
}

/// Recipes in the order in which they were first needed.
struct Recipes {
    // Hashed only to be looked up, never iterated. The key has no name.
    known: HashMap<Function, String>,
    functions: Vec<Function>,
    taken: Vec<String>,
}

impl Recipes {
    /// Name of the recipe with this body.
    fn name_of(&mut self, body: Function) -> String {
        if let Some(name) = self.known.get(&body) {
            return name.clone();
        }
        let mut n = self.functions.len();
        let mut name = format!("pack.{n}");
        while self.taken.contains(&name) {
            n += 1;
            name = format!("pack.{n}");
        }
        self.taken.push(name.clone());
        self.functions.push(Function { name: name.clone(), ..body.clone() });
        self.known.insert(body, name.clone());
        name
    }
}

/// What is known about a value that is made of weights and constants alone.
#[derive(Clone, Copy)]
struct Chain {
    /// Bytes of the weights it is made of, counted once for every use.
    weight_bytes: u64,
    /// Whether it lies in its weight as it is.
    is_part_of_file: bool,
}

fn pack_function(function: &Function, recipes: &mut Recipes) -> Function {
    let chains = chains(function);
    let definitions = function.definitions();
    let is_root = roots(function, &chains);
    if !is_root.contains(&true) {
        return function.clone();
    }
    let mut rebuild = Rebuild::new(function, &function.name);
    rebuild.params();
    for node in &function.nodes {
        let value = node.results[0];
        if !is_root[value.index()] {
            rebuild.node(node);
            continue;
        }
        let (body, weights) = recipe(function, &definitions, value);
        let name = recipes.name_of(body);
        let args = weights.iter().map(|&w| rebuild.get(w)).collect();
        rebuild.node_as(node, Op::Call(Call { function: name, prefix: String::new(), name: String::new() }), args);
    }
    rebuild.results();
    without_dead_nodes(&rebuild.out)
}

/// For every value that a recipe could make, what is known about it.
fn chains(f: &Function) -> Vec<Option<Chain>> {
    let mut chains: Vec<Option<Chain>> = vec![None; f.values.len()];
    for node in &f.nodes {
        let [result] = node.results[..] else { continue };
        let args: Option<Vec<Chain>> = node.args.iter().map(|a| chains[a.index()]).collect();
        let Some(args) = args else { continue };
        let bytes = f.ty(result).bytes() as u64;
        let chain = match &node.op {
            Op::Weight(_) => Chain { weight_bytes: bytes, is_part_of_file: true },
            op if !may_be_packed(op) => continue,
            op => Chain {
                weight_bytes: args.iter().fold(0, |n: u64, a| n.saturating_add(a.weight_bytes)),
                is_part_of_file: args
                    .first()
                    .is_some_and(|a| a.is_part_of_file && stays_in_place(op, f.ty(node.args[0]))),
            },
        };
        if bytes <= chain.weight_bytes.saturating_mul(MOST_GROWTH).saturating_add(SMALL_BYTES) {
            chains[result.index()] = Some(chain);
        }
    }
    chains
}

/// Movement and functions of single elements, and sums. Larger work on weights alone does not occur.
fn may_be_packed(op: &Op) -> bool {
    use Op::*;
    let is_movement =
        matches!(op, Reshape(_) | Transpose(_) | Slice(_) | Concat(_) | Broadcast(_) | Pad(_) | Gather(_));
    let is_pointwise = matches!(
        op,
        Unary(_) | Binary(_) | Compare(_) | Select(_) | Cast(_) | Gelu(_) | Silu(_) | Sigmoid(_) | LeakyRelu(_)
    );
    is_movement || is_pointwise || matches!(op, Const(_) | Iota(_) | Reduce(_))
}

/// Whether the result of `op` is a contiguous range of its operand.
fn stays_in_place(op: &Op, operand: &TensorType) -> bool {
    match op {
        Op::Reshape(_) => true,
        Op::Slice(o) => is_contiguous(o, operand),
        _ => false,
    }
}

/// Whether a slice is one range of the elements of its operand: one axis is cut, only extents of 1 stand before it.
pub(crate) fn is_contiguous(slice: &Slice, operand: &TensorType) -> bool {
    let extent = |a: usize| slice.end[a] - slice.start[a];
    if slice.step.iter().zip(0..).any(|(&step, a)| step != 1 && extent(a) > 1) {
        return false;
    }
    let first_cut = (0..operand.rank()).rev().find(|&a| extent(a) != operand.shape[a]);
    first_cut.is_none_or(|cut| (0..cut).all(|a| extent(a) == 1))
}

/// Values that become results of recipes: the last of their chain, with something to do.
fn roots(f: &Function, chains: &[Option<Chain>]) -> Vec<bool> {
    let mut is_root = vec![false; f.values.len()];
    let mut mark = |v: ValueId| {
        if let Some(chain) = chains[v.index()] {
            is_root[v.index()] = chain.weight_bytes > 0 && !chain.is_part_of_file;
        }
    };
    for node in &f.nodes {
        let goes_on = node.results.iter().all(|r| chains[r.index()].is_some());
        if !goes_on {
            node.args.iter().for_each(|&a| mark(a));
        }
    }
    f.results.iter().for_each(|r| mark(r.value));
    is_root
}

/// The function that makes `root` of raw weights, without a name, and those weights.
fn recipe(f: &Function, definitions: &[Option<usize>], root: ValueId) -> (Function, Vec<ValueId>) {
    let mut needed = vec![false; f.nodes.len()];
    let mut stack = vec![root];
    while let Some(value) = stack.pop() {
        if let Some(node) = definitions[value.index()]
            && !needed[node]
        {
            needed[node] = true;
            stack.extend(&f.nodes[node].args);
        }
    }
    let cone: Vec<&Node> = f.nodes.iter().zip(&needed).filter(|(_, needed)| **needed).map(|(n, _)| n).collect();
    let mut body = Function::default();
    let mut map: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    let mut weights = Vec::new();
    for node in cone.iter().filter(|n| matches!(n.op, Op::Weight(_))) {
        let old = node.results[0];
        let new = body.add_value(f.ty(old).clone(), "");
        body.params.push(Param { value: new, rate: Rate::Generation });
        map.insert(old, new);
        weights.push(old);
    }
    for node in cone.iter().filter(|n| !matches!(n.op, Op::Weight(_))) {
        let old = node.results[0];
        let args = node.args.iter().map(|a| map[a]).collect();
        let new = body.add_value(f.ty(old).clone(), "");
        body.nodes.push(Node { op: node.op.clone(), args, results: vec![new] });
        map.insert(old, new);
    }
    body.results.push(FunctionResult { name: "packed".into(), value: map[&root] });
    (body, weights)
}

/// Drops nodes whose results nobody uses.
fn without_dead_nodes(f: &Function) -> Function {
    let mut live = vec![false; f.values.len()];
    f.results.iter().for_each(|r| live[r.value.index()] = true);
    for node in f.nodes.iter().rev() {
        if node.results.iter().any(|r| live[r.index()]) {
            node.args.iter().for_each(|a| live[a.index()] = true);
        }
    }
    let mut rebuild = Rebuild::new(f, &f.name);
    rebuild.params();
    let is_live = |node: &&Node| node.results.iter().any(|r| live[r.index()]);
    f.nodes.iter().filter(is_live).for_each(|node| rebuild.node(node));
    rebuild.results();
    rebuild.out
}
