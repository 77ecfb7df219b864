//! Pass `hoist`: what does not change with every step leaves the step program.
//!
//! Every value has a [`Level`]: the fastest rate of the parameters it is computed from. An entry `main` becomes up to
//! three: `main.generation` and `main.evaluation` compute what is slow and worth keeping, and `main` takes it as
//! parameters. A value that crosses is a result of the slower entry and a parameter of the faster one under one name.
//!
//! Calls are split too, from the inside out: a function whose operands have several levels becomes one function per
//! level ([`split`]), and its callers call each part where it belongs. So text keys and values leave every block of a
//! transformer, though the block function is called with the latents.
//!
//! Keeping costs memory, so only what saves enough work for each byte is kept ([`cuts`]), the best first, until the
//! budget is spent. Everything else slow is computed again where it is needed. Weights and constants alone are never
//! kept here: what is made of weights belongs to `pack`.

mod cuts;
mod split;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ltxc_ir::{Function, Module, Op, Rate, ValueId};

use crate::cost;
use crate::options::Options;
use split::Split;

/// The fastest thing that a value depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Level {
    /// Weights and constants only.
    Constant,
    /// Parameters that are constant for a generation.
    Generation,
    /// Parameters that change once per evaluation.
    Evaluation,
    /// Parameters that change with every call.
    Step,
}

impl Level {
    fn of(rate: Rate) -> Level {
        match rate {
            Rate::Generation => Level::Generation,
            Rate::Evaluation => Level::Evaluation,
            Rate::Step => Level::Step,
        }
    }

    /// The rate of a program of this level.
    fn rate(self) -> Rate {
        match self {
            Level::Constant | Level::Generation => Rate::Generation,
            Level::Evaluation => Rate::Evaluation,
            Level::Step => Rate::Step,
        }
    }
}

/// Splits every entry by the rates of its parameters.
pub fn hoist(module: &Module, options: &Options) -> Module {
    let mut hoister = Hoister {
        module,
        work: cost::function_work(&module.functions),
        splits: BTreeMap::new(),
        functions: Vec::new(),
        written: BTreeSet::new(),
        taken: module.functions.iter().map(|f| f.name.clone()).collect(),
    };
    let mut entries = Vec::new();
    for entry in &module.entries {
        // Verified: entries exist.
        let Some(function) = module.function(entry) else { continue };
        entries.extend(hoister.entry(function, options));
    }
    Module { functions: hoister.functions, entries }
}

struct Hoister<'m> {
    module: &'m Module,
    /// Work of every function, also of those that were written here.
    work: BTreeMap<String, u64>,
    /// How each function is split for each combination of levels of its operands.
    splits: BTreeMap<(String, Vec<Level>), Rc<Split>>,
    /// What has been written, callees first.
    functions: Vec<Function>,
    /// Names of those.
    written: BTreeSet<String>,
    /// Names that new functions must not have.
    taken: BTreeSet<String>,
}

impl Hoister<'_> {
    /// Writes the parts of an entry, and returns their names, slowest first.
    fn entry(&mut self, function: &Function, options: &Options) -> Vec<String> {
        let mut levels: Vec<Level> = function.params.iter().map(|p| Level::of(p.rate)).collect();
        if options.passes_per_evaluation <= 1 && levels.contains(&Level::Step) {
            // What would run once per step anyway belongs into the step program.
            levels.iter_mut().filter(|l| **l == Level::Evaluation).for_each(|l| *l = Level::Step);
        }
        let body = self.expand_calls(function, &levels);
        let cuts = cuts::choose_within(&body, &self.work, options.hoist_budget_bytes);
        if cuts.is_empty() {
            self.write_original(&function.name);
            return vec![function.name.clone()];
        }
        // Only this entry may have the name of the whole; its original is not written.
        let parts = split::parts(&body, &cuts, true);
        let mut names = Vec::new();
        for part in parts {
            let is_whole = part.level == body.top;
            let name = match is_whole {
                true => function.name.clone(),
                false => self.fresh_name(&format!("{}.{}", function.name, part.level.rate().name())),
            };
            self.write(split::emit(&body, &part, &name));
            names.push(name);
        }
        names
    }

    /// How `function` is split when its operands have these levels.
    fn split(&mut self, name: &str, levels: &[Level]) -> Option<Rc<Split>> {
        let key = (name.to_string(), levels.to_vec());
        if let Some(split) = self.splits.get(&key) {
            return Some(split.clone());
        }
        let module = self.module;
        let function = module.function(name)?;
        let body = self.expand_calls(function, levels);
        let cuts = cuts::choose(&body, &self.work);
        let mut split = Split { parts: Vec::new() };
        if !cuts.is_empty() {
            for part in split::parts(&body, &cuts, false) {
                let name = self.fresh_name(&format!("{}.{}", function.name, part.level.rate().name()));
                let name = self.share(split::emit(&body, &part, &name));
                split.parts.push(split::Called::new(&body, &part, name));
            }
        }
        let split = Rc::new(split);
        self.splits.insert(key, split.clone());
        Some(split)
    }

    /// Writes a function unless an equal one was written, and returns the name of the one that stands. Blocks that differ
    /// in what they skip have slow parts in common.
    fn share(&mut self, function: Function) -> String {
        let is_same = |f: &&Function| {
            f.params == function.params
                && f.results == function.results
                && f.nodes == function.nodes
                && f.values == function.values
        };
        if let Some(same) = self.functions.iter().find(is_same) {
            return same.name.clone();
        }
        let name = function.name.clone();
        self.write(function);
        name
    }

    /// Writes a function under its own name, and before it what it calls.
    fn write_original(&mut self, name: &str) {
        let module = self.module;
        if let Some(function) = module.function(name)
            && !self.written.contains(name)
        {
            self.write(function.clone());
        }
    }

    fn write(&mut self, function: Function) {
        for node in &function.nodes {
            if let Op::Call(call) = &node.op {
                self.write_original(&call.function);
            }
        }
        self.work.entry(function.name.clone()).or_insert_with(|| 0);
        let total =
            function.nodes.iter().fold(0u64, |n, node| n.saturating_add(cost::work(&function, node, &self.work)));
        self.work.insert(function.name.clone(), total);
        self.written.insert(function.name.clone());
        self.functions.push(function);
    }

    fn fresh_name(&mut self, wanted: &str) -> String {
        let mut name = wanted.to_string();
        let mut n = 2;
        while !self.taken.insert(name.clone()) {
            name = format!("{wanted}.{n}");
            n += 1;
        }
        name
    }
}

/// A function whose calls are each of one level, with the level of every value.
struct Body {
    function: Function,
    levels: Vec<Level>,
    /// Level of the whole function.
    top: Level,
    /// The node that defines each value.
    definitions: Vec<Option<usize>>,
}

impl Body {
    fn level(&self, value: ValueId) -> Level {
        self.levels[value.index()]
    }
}
