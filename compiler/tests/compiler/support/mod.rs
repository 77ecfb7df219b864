//! Shared by the tests of the compiler: random graphs, weights for them, and a plan interpreter.

pub mod cuttable;
pub mod interp;
pub mod random;

use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::eval::{Data, Evaluator, Tensor};
use ltxc_ir::plan::{Pipeline, Plan, Target, WeightSource};
use ltxc_ir::tiling::TilePlan;
use ltxc_ir::{Module, TensorType};

/// Settings of no pipeline.
pub fn pipeline() -> Pipeline {
    Pipeline { decode: TilePlan { axes: Default::default(), factors: [1; 3] }, ..Pipeline::default() }
}

/// A builder of a plan whose graphs may read weights of `model`.
pub fn builder(options: Options, target: Target) -> PlanBuilder {
    let source = WeightSource { name: "model".into(), files: vec![], renames: vec![] };
    PlanBuilder::new("test", target, options, vec![source])
}

/// The plan of the entry `main`.
#[track_caller]
pub fn plan(module: &Module, options: Options, target: Target) -> Plan {
    let mut builder = builder(options, target);
    builder.add("group", "main", module, "main").unwrap_or_else(|e| panic!("{e}\n{module}"));
    builder.finish(pipeline()).unwrap_or_else(|e| panic!("{e}\n{module}"))
}

/// Deterministic numbers from a seed (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// A number in `[-1, 1)` with few bits, so that it is exact in every dtype.
    pub fn unit(&mut self) -> f64 {
        (self.below(64) as f64 - 32.0) / 32.0
    }

    pub fn tensor(&mut self, ty: &TensorType) -> Tensor {
        let n = ty.elements();
        let data = match ty.dtype.is_float() {
            true => Data::Float((0..n).map(|_| self.unit()).collect()),
            false => Data::Int((0..n).map(|_| self.below(2) as i64).collect()),
        };
        Tensor { ty: ty.clone(), data }
    }
}

/// The weight that every test finds under a key: any numbers that depend on source and key only.
pub fn weight(source: &str, key: &str, ty: &TensorType) -> Option<Tensor> {
    let seed = source.bytes().chain(key.bytes()).fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b as u64));
    Some(Numbers(seed).tensor(ty))
}

/// Runs an entry with arguments by name, and returns its results by name.
pub fn evaluate(module: &Module, entry: &str, args: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let f = module.function(entry).unwrap_or_else(|| panic!("no function `{entry}`"));
    let find = |name: &str| args.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no argument `{name}`"));
    let ordered: Vec<Tensor> = f.params.iter().map(|p| find(f.name_of(p.value)).1.clone()).collect();
    let results = Evaluator::new(module, &weight).run(entry, &ordered).unwrap();
    f.results.iter().map(|r| r.name.clone()).zip(results).collect()
}

/// Runs all parts of `main` of a plan and returns what the last one gives.
pub fn interpret(plan: &Plan, args: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let mut interpreter = interp::Interpreter::new(plan);
    let mut last = Vec::new();
    for program in &plan.programs {
        last = interpreter.run(&program.name, args);
    }
    last
}

/// Runs `main` as it was split: slow parts first, and what they give is there for the faster ones.
pub fn evaluate_split(module: &Module, args: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let mut known = args.to_vec();
    let mut last = Vec::new();
    for entry in &module.entries {
        last = evaluate(module, entry, &known);
        known.extend(last.iter().cloned());
    }
    last
}

/// Arguments for an entry of a module.
pub fn arguments(module: &Module, entry: &str, seed: u64) -> Vec<(String, Tensor)> {
    let f = module.function(entry).unwrap();
    let mut numbers = Numbers(seed);
    f.params.iter().map(|p| (f.name_of(p.value).to_string(), numbers.tensor(f.ty(p.value)))).collect()
}

/// Fails unless all results are there and differ by at most `limit` relative to the largest value.
#[track_caller]
pub fn assert_close(found: &[(String, Tensor)], expected: &[(String, Tensor)], limit: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: number of results");
    for (name, want) in expected {
        let (_, have) = found.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{what}: no result `{name}`"));
        assert_eq!(have.ty, want.ty, "{what}: type of `{name}`");
        assert_eq!(have.ints(), want.ints(), "{what}: `{name}`");
        let scale = want.floats().iter().fold(1.0f64, |m, v| m.max(v.abs()));
        for (i, (a, b)) in have.floats().iter().zip(want.floats()).enumerate() {
            let same = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= limit * scale;
            assert!(same, "{what}: `{name}`[{i}] is {a}, expected {b}");
        }
    }
}
