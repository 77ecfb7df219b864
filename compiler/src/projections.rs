//! Pass `pack-projections`: products of one activation with several weights become one product.
//!
//! ```text
//! x·aᵀ + p,  x·bᵀ + q,  x·cᵀ + r   =   the parts of  x·[a b c]ᵀ + [p q r]
//! ```
//!
//! Queries, keys, values and gates of an attention read the same tokens; one larger product reads them once, is one launch,
//! and fills a device better. The joined weight is a recipe: a copy in memory beside the file. So this pass runs only where
//! weights are copied to a device anyway ([`Options::packs_projections`]); a CPU reads them in place from the mapped file.
//!
//! Left alone are products that would lose more than they gain: where functions of single elements follow, they run in the
//! product that they follow, but not in one whose results are stored apart. So the two halves of a gated layer, and
//! layers that a live adapter is added to, stay as they are. So do slots of adapters, which are written again and again.

use std::collections::BTreeMap;

use ltxc_ir::ops::{Binary, Matmul};
use ltxc_ir::plan::ADAPTER_SLOTS;
use ltxc_ir::{Builder, Function, Module, Op, ValueId};

use crate::lower::is_pointwise;
use crate::options::Options;
use crate::rebuild::Rebuild;

/// Joins products that share their first operand.
pub fn pack_projections(module: &Module, options: &Options) -> Module {
    if options.packs_projections != Some(true) {
        return module.clone();
    }
    let functions = module.functions.iter().map(|f| pack_function(f, options.max_tensor_bytes)).collect();
    Module { functions, entries: module.entries.clone() }
}

/// A product with a weight, and the sum with a bias behind it.
struct Projection {
    /// Node whose result the projection is: the sum if there is a bias.
    last: usize,
    product: usize,
    weight: ValueId,
    bias: Option<ValueId>,
}

fn pack_function(function: &Function, most_bytes: u64) -> Function {
    let groups = groups(function, most_bytes);
    if groups.is_empty() {
        return function.clone();
    }
    // A group is computed where its first product stood; weights may be defined later and are taken along.
    let first: BTreeMap<usize, &Vec<Projection>> = groups.iter().map(|g| (g[0].product, g)).collect();
    let replaced: Vec<usize> = groups.iter().flatten().flat_map(|p| [p.product, p.last]).collect();
    let definitions = function.definitions();
    let mut rebuild = Rebuild::new(function, &function.name);
    rebuild.params();
    for (i, node) in function.nodes.iter().enumerate() {
        if let Some(group) = first.get(&i) {
            let weights = group.iter().flat_map(|p| [Some(p.weight), p.bias]).flatten();
            for weight in weights {
                if let (None, Some(definition)) = (rebuild.find(weight), definitions[weight.index()]) {
                    rebuild.node(&function.nodes[definition]);
                }
            }
            emit(&mut rebuild, function, group);
        }
        let is_done = replaced.contains(&i) || node.results.iter().any(|&r| rebuild.find(r).is_some());
        if !is_done {
            rebuild.node(node);
        }
    }
    rebuild.results();
    rebuild.out
}

fn emit(rebuild: &mut Rebuild<'_>, function: &Function, group: &[Projection]) {
    let new = |v: ValueId| rebuild.get(v);
    let x = new(function.nodes[group[0].product].args[0]);
    let weights: Vec<ValueId> = group.iter().map(|p| new(p.weight)).collect();
    let biases: Option<Vec<ValueId>> = group.iter().map(|p| p.bias.map(new)).collect();
    let b = Builder::from_function(std::mem::take(&mut rebuild.out));
    let mut y = b.matmul_transposed(x, b.concat(&weights, 0));
    if let Some(biases) = biases {
        y = b.add(y, b.concat(&biases, 0));
    }
    let axis = b.shape(y).len() - 1;
    let mut start = 0;
    let mut parts = Vec::with_capacity(group.len());
    for p in group {
        let n = function.ty(p.weight).shape[0];
        parts.push(b.slice_axis(y, axis, start, start + n));
        start += n;
    }
    // Types follow from those of verified nodes.
    rebuild.out = b.finish().expect("products of verified operands are well typed");
    for (p, part) in group.iter().zip(parts) {
        let old = function.nodes[p.last].results[0];
        rebuild.out.values[part.index()].name = function.name_of(old).into();
        rebuild.set(old, part);
    }
}

/// Products that can be joined: two or more with the same first operand, all with a bias or all without, whose weight and
/// result have at most `most_bytes`.
fn groups(function: &Function, most_bytes: u64) -> Vec<Vec<Projection>> {
    let definitions = function.definitions();
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); function.values.len()];
    for (i, node) in function.nodes.iter().enumerate() {
        node.args.iter().for_each(|a| users[a.index()].push(i));
    }
    let is_result = |v: ValueId| function.results.iter().any(|r| r.value == v);
    let is_weight = |v: ValueId| match definitions[v.index()].map(|d| &function.nodes[d].op) {
        Some(Op::Weight(weight)) => weight.source != ADAPTER_SLOTS,
        _ => false,
    };
    // What follows one by one element reads a row of the product again and writes it; what is saved is a row of `x`.
    let loses = |last: usize, x: ValueId| {
        let row = |v: ValueId| function.ty(v).shape.last().copied().unwrap_or(1);
        let mut value = function.nodes[last].results[0];
        let is_large = 2 * row(value) > row(x);
        while let [user] = users[value.index()][..] {
            let node = &function.nodes[user];
            if !matches!(node.op, Op::Reshape(_)) {
                return is_large && is_pointwise(&node.op);
            }
            value = node.results[0];
        }
        false
    };
    let mut groups: BTreeMap<(ValueId, bool, String), Vec<Projection>> = BTreeMap::new();
    for (i, node) in function.nodes.iter().enumerate() {
        let Op::Matmul(Matmul { transpose_rhs: true }) = node.op else { continue };
        let (x, weight, product) = (node.args[0], node.args[1], node.results[0]);
        if !is_weight(weight) || users[weight.index()].len() != 1 {
            continue;
        }
        let sum = match users[product.index()][..] {
            [user] if !is_result(product) => Some(user),
            _ => None,
        };
        let bias = sum.and_then(|s| match function.nodes[s] {
            ref n if matches!(n.op, Op::Binary(Binary::Add)) && n.args[0] == product => Some((s, n.args[1])),
            _ => None,
        });
        let fits = |v: ValueId| {
            is_weight(v) && function.ty(v).rank() == 1 && function.ty(v).shape[0] == function.ty(weight).shape[0]
        };
        let bias = bias.filter(|&(_, v)| fits(v) && users[v.index()].len() == 1);
        let last = bias.map_or(i, |(s, _)| s);
        if loses(last, x) {
            continue;
        }
        // Only tensors of one dtype can be joined.
        let dtypes = format!("{} {:?}", function.ty(weight).dtype, bias.map(|(_, v)| function.ty(v).dtype));
        let projection = Projection { last, product: i, weight, bias: bias.map(|(_, v)| v) };
        groups.entry((x, bias.is_some(), dtypes)).or_default().push(projection);
    }
    let bytes = |v: ValueId| function.ty(v).bytes() as u64;
    let sum = |g: &[Projection], of: fn(&Projection, &Function) -> ValueId| {
        g.iter().fold(0, |n: u64, p| n.saturating_add(bytes(of(p, function))))
    };
    let fits = |g: &Vec<Projection>| {
        g.len() > 1
            && sum(g, |p, _| p.weight) <= most_bytes
            && sum(g, |p, f| f.nodes[p.product].results[0]) <= most_bytes
    };
    groups.into_values().filter(fits).collect()
}
