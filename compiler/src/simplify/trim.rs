//! Dropping what nobody uses: nodes, functions, results and parameters of called functions.

use std::collections::BTreeMap;

use ltxc_ir::{Function, Module, Op, ValueId};

use crate::rebuild::Rebuild;

/// Drops what no entry needs. Entries keep their parameters and results.
pub(super) fn trim(module: &Module) -> Module {
    trim_params(&trim_results(module))
}

/// Callers first: a result that no caller uses goes, and with it the nodes that only served it.
fn trim_results(module: &Module) -> Module {
    let mut used: BTreeMap<&str, Vec<bool>> = BTreeMap::new();
    for entry in &module.entries {
        if let Some(f) = module.function(entry) {
            used.insert(&f.name, vec![true; f.results.len()]);
        }
    }
    let mut kept = Vec::new();
    for f in module.functions.iter().rev() {
        let Some(results) = used.get(f.name.as_str()).cloned() else { continue };
        let live = live_values(f, f.results.iter().zip(&results).filter(|(_, used)| **used).map(|(r, _)| r.value));
        for node in &f.nodes {
            let Op::Call(call) = &node.op else { continue };
            if !node.results.iter().any(|r| live[r.index()]) {
                continue;
            }
            let callee = used.entry(&call.function).or_insert_with(|| vec![false; node.results.len()]);
            for (flag, r) in callee.iter_mut().zip(&node.results) {
                *flag |= live[r.index()];
            }
        }
        kept.push((f, results, live));
    }
    let functions = kept
        .into_iter()
        .rev()
        .map(|(f, results, live)| {
            let mut rebuild = Rebuild::new(f, &f.name);
            rebuild.params();
            for node in f.nodes.iter().filter(|n| n.results.iter().any(|r| live[r.index()])) {
                let mut node = node.clone();
                if let Op::Call(call) = &node.op {
                    let used = &used[call.function.as_str()];
                    let mut flags = used.iter();
                    node.results.retain(|_| flags.next().copied().unwrap_or(true));
                }
                rebuild.node(&node);
            }
            rebuild.results_where(&results);
            rebuild.out
        })
        .collect();
    Module { functions, entries: module.entries.clone() }
}

/// Callees first: a parameter that its function does not use goes, and with it the operands of calls.
fn trim_params(module: &Module) -> Module {
    let mut used: BTreeMap<&str, Vec<bool>> = BTreeMap::new();
    let mut functions = Vec::with_capacity(module.functions.len());
    for f in &module.functions {
        let mut f_new = f.clone();
        for node in &mut f_new.nodes {
            if let Op::Call(call) = &node.op {
                let used = &used[call.function.as_str()];
                let mut flags = used.iter();
                node.args.retain(|_| flags.next().copied().unwrap_or(true));
            }
        }
        let live = live_values(&f_new, f_new.results.iter().map(|r| r.value));
        let is_entry = module.entries.contains(&f.name);
        let params: Vec<bool> = f_new.params.iter().map(|p| is_entry || live[p.value.index()]).collect();
        let mut rebuild = Rebuild::new(&f_new, &f.name);
        f_new.params.iter().zip(&params).filter(|(_, used)| **used).for_each(|(p, _)| rebuild.param(p));
        for node in f_new.nodes.iter().filter(|n| n.results.iter().any(|r| live[r.index()])) {
            rebuild.node(node);
        }
        rebuild.results();
        functions.push(rebuild.out);
        used.insert(&f.name, params);
    }
    Module { functions, entries: module.entries.clone() }
}

/// Which values the given ones are computed from, themselves included.
fn live_values(f: &Function, roots: impl Iterator<Item = ValueId>) -> Vec<bool> {
    let mut live = vec![false; f.values.len()];
    roots.for_each(|v| live[v.index()] = true);
    for node in f.nodes.iter().rev() {
        if node.results.iter().any(|r| live[r.index()]) {
            node.args.iter().for_each(|a| live[a.index()] = true);
        }
    }
    live
}
