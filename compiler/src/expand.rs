//! Pass `expand`: composites become the primitives they mean.

use ltxc_ir::{Builder, Function, Module, Op, ValueId};

use crate::options::Fuse;
use crate::rebuild::Rebuild;

/// Replaces composites by their expansion: all of them without fusion, otherwise those that have no kernel.
///
/// `depth_to_space` and `space_to_depth` are always expanded: they only move elements, and a copy does that.
pub fn expand(module: &Module, fuse: Fuse) -> Module {
    let functions = module.functions.iter().map(|f| expand_function(f, fuse)).collect();
    Module { functions, entries: module.entries.clone() }
}

fn is_expanded(op: &Op, fuse: Fuse) -> bool {
    match op {
        Op::DepthToSpace(_) | Op::SpaceToDepth(_) => true,
        op => op.is_composite() && fuse == Fuse::None,
    }
}

fn expand_function(function: &Function, fuse: Fuse) -> Function {
    let mut rebuild = Rebuild::new(function, &function.name);
    rebuild.params();
    for node in &function.nodes {
        if !is_expanded(&node.op, fuse) {
            rebuild.node(node);
            continue;
        }
        let args: Vec<ValueId> = node.args.iter().map(|&a| rebuild.get(a)).collect();
        let builder = Builder::from_function(std::mem::take(&mut rebuild.out));
        let value = node.op.expand(&builder, &args);
        // The composite passed its type rule, and its expansion then has well-typed ops only.
        rebuild.out = builder.finish().expect("a composite that passed its type rule expands to well-typed primitives");
        match value {
            Some(value) => {
                let old = node.results[0];
                let named = &mut rebuild.out.values[value.index()].name;
                let is_new = !args.contains(&value);
                if is_new && named.is_empty() {
                    *named = function.name_of(old).into();
                }
                rebuild.set(old, value);
            }
            None => rebuild.node(node),
        }
    }
    rebuild.results();
    rebuild.out
}
