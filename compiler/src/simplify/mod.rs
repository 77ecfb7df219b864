//! Pass `simplify`: the same values with fewer and smaller ops.
//!
//! One walk over every function, callees first, does three things with each node: it looks for an equation that makes
//! the node simpler ([`rules`]), computes it if all operands are small constants ([`fold`]), and looks for an equal node
//! that stands already. Operands are simple by then, so one walk nearly always reaches the end. After it, nodes, results
//! and parameters that nobody uses are dropped ([`trim`]).
//!
//! Values are equal before and after; equations that change a rounding are not used.

mod fold;
mod rules;
mod trim;

use std::collections::{BTreeMap, HashMap};

use ltxc_ir::ops::{Call, Const};
use ltxc_ir::{Function, Module, Node, Op, TensorType, ValueId};

use crate::rebuild::Rebuild;

/// Most walks over a module. Two reach the end in practice; the limit only bounds the time.
const MOST_ROUNDS: usize = 4;

/// Simplifies a module. Entries keep their parameters and results.
pub fn simplify(module: &Module) -> Module {
    let mut module = module.clone();
    for _ in 0..MOST_ROUNDS {
        let next = trim::trim(&forward(&module));
        if next == module {
            break;
        }
        module = next;
    }
    module
}

/// What a caller may know about a result of a function.
enum Known {
    /// It is a parameter.
    Param(usize),
    /// It is a constant.
    Const(Const),
    /// It is the same as an earlier result.
    Result(usize),
    /// It is computed.
    Computed,
}

fn forward(module: &Module) -> Module {
    let mut known: BTreeMap<String, Vec<Known>> = BTreeMap::new();
    let mut functions = Vec::with_capacity(module.functions.len());
    for f in &module.functions {
        let simple = simplify_function(f, &known);
        known.insert(f.name.clone(), known_results(&simple));
        functions.push(simple);
    }
    Module { functions, entries: module.entries.clone() }
}

fn known_results(f: &Function) -> Vec<Known> {
    let definitions = f.definitions();
    let of = |i: usize| {
        let value = f.results[i].value;
        if let Some(first) = f.results[..i].iter().position(|r| r.value == value) {
            return Known::Result(first);
        }
        match definitions[value.index()].map(|n| &f.nodes[n].op) {
            None => f.params.iter().position(|p| p.value == value).map_or(Known::Computed, Known::Param),
            Some(Op::Const(c)) => Known::Const(c.clone()),
            Some(_) => Known::Computed,
        }
    };
    (0..f.results.len()).map(of).collect()
}

fn simplify_function(function: &Function, known: &BTreeMap<String, Vec<Known>>) -> Function {
    let mut rebuild = Rebuild::new(function, &function.name);
    rebuild.params();
    let mut graph = Graph {
        definitions: vec![None; rebuild.out.values.len()],
        function: std::mem::take(&mut rebuild.out),
        nodes: HashMap::new(),
        calls: HashMap::new(),
    };
    for node in &function.nodes {
        let args: Vec<ValueId> = node.args.iter().map(|&a| rebuild.get(a)).collect();
        if let Op::Call(call) = &node.op {
            let types = node.results.iter().map(|&r| function.ty(r).clone()).collect();
            let names: Vec<&str> = node.results.iter().map(|&r| function.name_of(r)).collect();
            let facts = known.get(&call.function).map_or(&[][..], |k| k);
            let results = graph.call(call, args, types, &names, facts);
            node.results.iter().zip(results).for_each(|(&old, new)| rebuild.set(old, new));
            continue;
        }
        let old = node.results[0];
        let new = graph.emit(node.op.clone(), args, function.ty(old).clone());
        graph.suggest_name(new, function.name_of(old));
        rebuild.set(old, new);
    }
    rebuild.out = graph.function;
    rebuild.results();
    rebuild.out
}

/// A function in the making in which no two nodes are equal.
struct Graph {
    function: Function,
    /// The node that defines each value, `None` for parameters.
    definitions: Vec<Option<usize>>,
    // Hashed only to be looked up, never iterated.
    nodes: HashMap<(Op, Vec<ValueId>), ValueId>,
    calls: HashMap<(String, String, Vec<ValueId>), Vec<ValueId>>,
}

impl Graph {
    /// The op and operands that define `value`; `None` for parameters and results of calls.
    fn definition(&self, value: ValueId) -> Option<(&Op, &[ValueId])> {
        let node = &self.function.nodes[self.definitions[value.index()]?];
        if matches!(node.op, Op::Call(_)) { None } else { Some((&node.op, &node.args)) }
    }

    /// The constant that `value` is, if it is one.
    fn constant(&self, value: ValueId) -> Option<&Const> {
        match self.definition(value) {
            Some((Op::Const(c), _)) => Some(c),
            _ => None,
        }
    }

    fn ty(&self, value: ValueId) -> &TensorType {
        self.function.ty(value)
    }

    /// A value of type `ty` that is what `op` makes of `args`: a simpler one, an equal one that stands, or a new one.
    fn emit(&mut self, op: Op, args: Vec<ValueId>, ty: TensorType) -> ValueId {
        let (mut op, mut args) = (op, args);
        loop {
            if let Some(constant) = fold::fold(self, &op, &args, &ty)
                && op != Op::Const(constant.clone())
            {
                (op, args) = (Op::Const(constant), vec![]);
            }
            match rules::rewrite(self, &op, &args, &ty) {
                Some(rules::Rewrite::Value(value)) => return value,
                Some(rules::Rewrite::Node(new_op, new_args)) => (op, args) = (new_op, new_args),
                None => break,
            }
        }
        let key = (op, args);
        if let Some(&value) = self.nodes.get(&key) {
            return value;
        }
        let value = self.function.add_value(ty, "");
        self.definitions.push(Some(self.function.nodes.len()));
        let (op, args) = key.clone();
        self.function.nodes.push(Node { op, args, results: vec![value] });
        self.nodes.insert(key, value);
        value
    }

    /// Results of a call, of which some may be known without it. Equal calls are one.
    fn call(
        &mut self,
        call: &Call,
        args: Vec<ValueId>,
        types: Vec<TensorType>,
        names: &[&str],
        known: &[Known],
    ) -> Vec<ValueId> {
        let key = (call.function.clone(), call.prefix.clone(), args.clone());
        let results = match self.calls.get(&key) {
            Some(results) => results.clone(),
            None => {
                let node = self.function.nodes.len();
                let new = types.iter().zip(names).map(|(ty, name)| self.function.add_value(ty.clone(), *name));
                let results: Vec<ValueId> = new.collect();
                self.definitions.extend(results.iter().map(|_| Some(node)));
                let op = Op::Call(call.clone());
                self.function.nodes.push(Node { op, args: args.clone(), results: results.clone() });
                self.calls.insert(key, results.clone());
                results
            }
        };
        let value = |(i, fact): (usize, &Known)| match fact {
            Known::Param(p) => args[*p],
            Known::Const(c) => self.emit(Op::Const(c.clone()), vec![], types[i].clone()),
            Known::Result(first) => results[*first],
            Known::Computed => results[i],
        };
        known.iter().enumerate().map(value).collect()
    }

    /// Lets a value without a name have that of the value it stands for. Parameters keep theirs.
    fn suggest_name(&mut self, value: ValueId, name: &str) {
        let is_param = self.definitions[value.index()].is_none();
        let info = &mut self.function.values[value.index()];
        if info.name.is_empty() && !is_param {
            info.name = name.into();
        }
    }
}
