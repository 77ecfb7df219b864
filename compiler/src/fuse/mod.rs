//! Fusion: groups of ops that become one kernel call.
//!
//! A group is a function with a pattern ([`ltxc_ir::Function::pattern`]): its body says what is computed, a call of it
//! becomes one [`ltxc_ir::plan::Fused`]. So every fused group can be evaluated, printed and compared with what it replaced.
//! Whether a group can run as one kernel is decided in one place, [`ltxc_ir::plan::Fused::form`]; passes only propose.
//!
//! | pass | equation | saves |
//! | --- | --- | --- |
//! | [`attention`] | `g · attention(rope(norm(q)), rope(norm(k)), v)` | queries, keys and the mix, each written and read |
//! | [`product`] | `x + g · act(a · b + c)`, stored where it belongs | every step behind the product, written and read |
//! | [`group_norm`] | `silu(group_norm(x))` | the normed tensor, written and read |
//! | [`residual`] | `d2s(y) + tile(d2s(x)) = d2s(y + tile(x))` | the residual path, rearranged and tiled |
//! | [`rows`] | `norm(x) · (1 + s) + t` and other work along rows | every intermediate, written and read |
//!
//! Products come before rows, so that gate and residual end up in the product that feeds them, and the norm behind them
//! reads the residual stream once.
//!
//! To add a pass: propose groups as [`group_norm`] does, and add a file test.

mod attention;
mod graph;
mod group_norm;
mod outline;
mod product;
mod residual;
mod rows;

use std::collections::BTreeSet;

use ltxc_ir::{Function, Module};

use crate::options::{Fuse, Options};
use graph::Graph;
pub use residual::fuse_residual;

/// Node indices of a group, by what comes first in the function.
type Nodes = BTreeSet<usize>;

/// Proposes the groups of a function that stand at node `at`, best first; the first that can run as one is taken.
type Propose = fn(&Graph<'_>, usize) -> Vec<Nodes>;

/// Pass `fuse-attention`: norms, rotations and gates join the attention they belong to.
pub fn fuse_attention(module: &Module, options: &Options) -> Module {
    with_groups(module, options, attention::propose)
}

/// Pass `fuse-product`: bias, activation, gate, residual, padding and rearranging join their product.
pub fn fuse_product(module: &Module, options: &Options) -> Module {
    with_groups(module, options, product::propose)
}

/// Pass `fuse-group-norm`: what follows a group norm element by element joins it.
pub fn fuse_group_norm(module: &Module, options: &Options) -> Module {
    with_groups(module, options, group_norm::propose)
}

/// Pass `fuse-rows`: AdaLN, pixel norms, rotations, snake and whatever else works along rows.
pub fn fuse_rows(module: &Module, options: &Options) -> Module {
    with_groups(module, options, rows::propose)
}

/// Outlines the groups that `propose` finds in every function. Groups of earlier passes and recipes are left alone.
fn with_groups(module: &Module, options: &Options, propose: Propose) -> Module {
    if options.fuse != Fuse::Full {
        return module.clone();
    }
    let mut taken: BTreeSet<String> = module.functions.iter().map(|f| f.name.clone()).collect();
    let mut functions = Vec::with_capacity(module.functions.len());
    for function in &module.functions {
        if function.pattern.is_some() {
            functions.push(function.clone());
            continue;
        }
        let (function, groups) = fuse_function(function, options, propose, &mut taken);
        functions.extend(groups);
        functions.push(function);
    }
    Module { functions, entries: module.entries.clone() }
}

/// The function with calls of its groups, and the groups.
fn fuse_function(
    function: &Function,
    options: &Options,
    propose: Propose,
    taken: &mut BTreeSet<String>,
) -> (Function, Vec<Function>) {
    let mut function = function.clone();
    let mut groups: Vec<Function> = Vec::new();
    let mut at = 0;
    while at < function.nodes.len() {
        let graph = Graph::new(&function, options.max_bindings);
        let outlined = propose(&graph, at).into_iter().find_map(|nodes| outline::outline(&graph, &nodes));
        match outlined {
            Some(outlined) => {
                // The call stands where the first node of the group stood or later, and nothing before `at` is new.
                function = outlined.finish(&mut groups, taken);
            }
            None => at += 1,
        }
    }
    (function, groups)
}
