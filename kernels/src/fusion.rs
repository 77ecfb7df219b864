//! What fusion saved in a plan, and what it left apart and why.
//!
//! Both are read from the plan alone: a fused call knows the kernels it was made of, and whether two neighbours could
//! have been one call is asked of the same rule that fusion follows ([`Fused::form`]).

use std::collections::BTreeMap;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{Fused, Kernel, KernelCall, Operand, Part, PartArg, Plan, Source, Step, Work};

use crate::catalogue;

/// Kernels that run as one.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Name of the pattern that joined them.
    pub pattern: String,
    /// The kernels in order: `rms_norm, map 2`.
    pub kernels: String,
}

impl Group {
    fn of(fused: &Fused) -> Group {
        let names: Vec<&str> = fused.parts.iter().map(|part| part.kernel.name()).collect();
        let runs = names.chunk_by(|a, b| a == b).map(|run| match run.len() {
            1 => run[0].to_string(),
            n => format!("{} {n}", run[0]),
        });
        Group { pattern: fused.pattern.clone(), kernels: runs.collect::<Vec<_>>().join(", ") }
    }
}

/// Calls of one group in a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saving {
    /// What the first of them computes.
    pub example: String,
    /// Number of calls.
    pub calls: u64,
    /// Kernels that they replace.
    pub kernels: u64,
    /// Bytes that they read and write.
    pub bytes: u64,
    /// Bytes that those kernels would read and write besides.
    pub saved_bytes: u64,
}

/// Neighbours that stayed two calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Apart {
    /// How often.
    pub times: u64,
    /// Bytes of what flows between them, written and read.
    pub bytes: u64,
}

/// What fusion did in one run of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// By what was joined.
    pub fused: BTreeMap<Group, Saving>,
    /// By first call, second call and reason.
    pub apart: BTreeMap<(String, String, String), Apart>,
}

impl Summary {
    /// Counts another summary too.
    pub fn add(&mut self, other: &Summary) {
        for (group, s) in &other.fused {
            let sum = self.fused.entry(group.clone()).or_default();
            if sum.calls == 0 {
                sum.example.clone_from(&s.example);
            }
            sum.calls = sum.calls.saturating_add(s.calls);
            sum.kernels = sum.kernels.saturating_add(s.kernels);
            sum.bytes = sum.bytes.saturating_add(s.bytes);
            sum.saved_bytes = sum.saved_bytes.saturating_add(s.saved_bytes);
        }
        for (pair, a) in &other.apart {
            let sum = self.apart.entry(pair.clone()).or_default();
            sum.times = sum.times.saturating_add(a.times);
            sum.bytes = sum.bytes.saturating_add(a.bytes);
        }
    }

    /// Bytes saved by all groups.
    pub fn saved_bytes(&self) -> u64 {
        self.fused.values().fold(0, |n, s| n.saturating_add(s.saved_bytes))
    }
}

/// What fusion did in one call of each function of a verified plan.
pub fn summaries(plan: &Plan) -> Vec<Summary> {
    let mut all: Vec<Summary> = Vec::with_capacity(plan.functions.len());
    for function in &plan.functions {
        let mut summary = Summary::default();
        // The last kernel call that wrote to each place, unless a call of a function may have come between.
        let mut writers: Vec<(&Operand, &KernelCall, usize)> = Vec::new();
        for step in &function.steps {
            match step {
                Step::Kernel(call) => {
                    count_fused(call, &mut summary);
                    for arg in &call.args {
                        let same =
                            |w: &&(&Operand, &KernelCall, usize)| w.0.place == arg.place && w.0.offset == arg.offset;
                        if let Some(&(written, writer, result)) = writers.iter().rev().find(same) {
                            let reason = why_apart(writer, result, call, written);
                            let pair = (writer.work.name().into(), call.work.name().into(), reason);
                            let apart = summary.apart.entry(pair).or_default();
                            apart.times += 1;
                            apart.bytes = apart.bytes.saturating_add(2 * written.ty.bytes() as u64);
                        }
                    }
                    for (i, result) in call.results.iter().enumerate() {
                        writers.retain(|w| w.0.place != result.place || w.0.offset != result.offset);
                        writers.push((result, call, i));
                    }
                }
                Step::Call(call) => {
                    writers.clear();
                    if let Some(callee) = all.get(call.function as usize) {
                        summary.add(callee);
                    }
                }
            }
        }
        all.push(summary);
    }
    all
}

fn count_fused(call: &KernelCall, summary: &mut Summary) {
    let Work::Fused(fused) = &call.work else { return };
    let apart = fused.parts.iter().map(|part| {
        let args: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
        catalogue::bytes(&Work::Kernel(part.kernel.clone()), &args, &[&part.result])
    });
    let apart = apart.fold(0, u64::saturating_add);
    let saving = summary.fused.entry(Group::of(fused)).or_default();
    if saving.calls == 0 {
        saving.example.clone_from(&call.name);
    }
    saving.calls += 1;
    saving.kernels += fused.parts.len() as u64;
    saving.bytes = saving.bytes.saturating_add(call.bytes);
    saving.saved_bytes = saving.saved_bytes.saturating_add(apart.saturating_sub(call.bytes));
}

/// Bytes that a call reads and writes besides operands and results of products, convolutions and attention.
///
/// A fused call of one of those reads what its epilogue needs; its result counts as the product's, whatever is stored.
pub fn elementwise_bytes(call: &KernelCall) -> u64 {
    let is_contraction = |kernel: &Kernel| {
        matches!(kernel, Kernel::Matmul(_) | Kernel::Conv(_) | Kernel::ConvTranspose(_) | Kernel::Attention(_))
    };
    match &call.work {
        Work::Kernel(kernel) if is_contraction(kernel) => 0,
        Work::Kernel(_) => call.bytes,
        Work::Fused(fused) => {
            let Some(anchor) = fused.parts.iter().position(|p| is_contraction(&p.kernel)) else { return call.bytes };
            // Operands of the product itself, or of what is done to them on the way in.
            let into_anchor = fused.parts[..=anchor].iter().flat_map(|p| &p.args);
            let mut own: Vec<u32> = into_anchor
                .filter_map(|a| match a.source {
                    Source::Operand(i) => Some(i),
                    Source::Part(_) => None,
                })
                .collect();
            own.sort_unstable();
            own.dedup();
            let bytes = own.iter().filter_map(|&i| call.args.get(i as usize)).map(|a| a.ty.bytes() as u64);
            let results = call.results.iter().map(|r| r.ty.bytes() as u64);
            call.bytes.saturating_sub(bytes.chain(results).fold(0, u64::saturating_add))
        }
    }
}

/// Why `second`, which reads result `result` of `first`, is a call of its own.
fn why_apart(first: &KernelCall, result: usize, second: &KernelCall, between: &Operand) -> String {
    let mut parts = Vec::new();
    let first_stored = append(first, &mut parts, |a| Source::Operand(a as u32));
    let Some(&made) = first_stored.get(result) else { return "its operands are not known".into() };
    let is_between = |a: usize| second.args[a].place == between.place && second.args[a].offset == between.offset;
    let operands = first.args.len();
    let second_stored = append(second, &mut parts, |a| match is_between(a) {
        true => Source::Part(made),
        false => Source::Operand((operands + a) as u32),
    });
    let stored = first_stored.into_iter().chain(second_stored).collect();
    match (Fused { pattern: String::new(), parts, stored }).form() {
        Err(reason) => without_numbers(&reason),
        Ok(_) => "other work stands between them".into(),
    }
}

/// Appends the kernels of a call and returns which of them make its results.
fn append(call: &KernelCall, parts: &mut Vec<Part>, operand: impl Fn(usize) -> Source) -> Vec<u32> {
    let base = parts.len() as u32;
    match &call.work {
        Work::Kernel(kernel) => {
            let args = call.args.iter().enumerate().map(|(a, arg)| PartArg { source: operand(a), ty: arg.ty.clone() });
            let Some(result) = call.results.first() else { return Vec::new() };
            parts.push(Part { kernel: kernel.clone(), args: args.collect(), result: result.ty.clone() });
            vec![base]
        }
        Work::Fused(fused) => {
            for part in &fused.parts {
                let args = part.args.iter().map(|arg| {
                    let source = match arg.source {
                        Source::Operand(a) => operand(a as usize),
                        Source::Part(p) => Source::Part(base + p),
                    };
                    PartArg { source, ty: arg.ty.clone() }
                });
                parts.push(Part { args: args.collect(), ..part.clone() });
            }
            fused.stored.iter().map(|s| base + s).collect()
        }
    }
}

/// A reason that does not depend on where in the call it was found, so that equal ones are counted together.
fn without_numbers(reason: &str) -> String {
    let words = reason.split(' ').filter(|w| !w.trim_end_matches(',').chars().all(|c| c.is_ascii_digit()));
    words.filter(|w| !w.contains('[')).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use ltxc_ir::ops::{Binary, Matmul, RmsNorm};
    use ltxc_ir::plan::{Map, MapStep, Place, Storage};
    use ltxc_ir::{Float, plan::PlanFunction};

    use super::*;

    fn operand(offset: u64, ty: &TensorType) -> Operand {
        Operand { place: Place::Frame { arena: 0 }, offset, ty: ty.clone(), storage: Storage::Native }
    }

    fn call(work: Work, args: Vec<Operand>, result: Operand) -> KernelCall {
        let types: Vec<TensorType> = args.iter().map(|a| a.ty.clone()).collect();
        let types: Vec<&TensorType> = types.iter().collect();
        let bytes = catalogue::bytes(&work, &types, &[&result.ty]);
        KernelCall { work, args, results: vec![result], name: String::new(), flops: 0, bytes }
    }

    fn summary_of(steps: Vec<Step>) -> Summary {
        let function = PlanFunction {
            name: String::new(),
            params: vec![],
            results: vec![],
            weights: vec![],
            constants: vec![],
            frame_bytes: vec![],
            steps,
        };
        let mut plan = crate::test_plan::empty();
        plan.functions = vec![function];
        summaries(&plan).remove(0)
    }

    #[test]
    fn a_fused_call_saves_what_flows_inside_it() {
        let ty = TensorType::f32([4, 8]);
        let whole = |source| PartArg { source, ty: ty.clone() };
        let fused = Fused {
            pattern: "adaln".into(),
            parts: vec![
                Part {
                    kernel: Kernel::RmsNorm(RmsNorm { eps: Float(1e-6) }),
                    args: vec![whole(Source::Operand(0))],
                    result: ty.clone(),
                },
                Part {
                    kernel: Kernel::Map(Map { steps: vec![MapStep::Binary(Binary::Mul, 0, 1)] }),
                    args: vec![whole(Source::Part(0)), whole(Source::Operand(1))],
                    result: ty.clone(),
                },
            ],
            stored: vec![1],
        };
        let call = call(fused.into(), vec![operand(0, &ty), operand(128, &ty)], operand(256, &ty));
        let named = |name: &str| Step::Kernel(KernelCall { name: name.into(), ..call.clone() });
        let mut summary = summary_of(vec![named("norm1"), named("norm2")]);
        // The normed tensor is neither written nor read.
        let mut want = Saving { example: "norm1".into(), calls: 2, kernels: 4, bytes: 6 * 128, saved_bytes: 4 * 128 };
        let group = Group { pattern: "adaln".into(), kernels: "rms_norm, map".into() };
        assert_eq!(summary.fused, BTreeMap::from([(group.clone(), want.clone())]));
        assert_eq!(summary.saved_bytes(), 512);
        summary.add(&summary_of(vec![named("norm3")]));
        (want.calls, want.kernels, want.bytes, want.saved_bytes) = (3, 6, 9 * 128, 6 * 128);
        assert_eq!(summary.fused, BTreeMap::from([(group, want)]));
    }

    #[test]
    fn only_the_epilogue_of_a_product_is_elementwise() {
        let ty = TensorType::f32([8, 8]);
        let whole = |source| PartArg { source, ty: ty.clone() };
        let product = Kernel::Matmul(Matmul { transpose_rhs: true });
        let add = Kernel::Map(Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1)] });
        let fused = Fused {
            pattern: "gemm".into(),
            parts: vec![
                Part {
                    kernel: product.clone(),
                    args: vec![whole(Source::Operand(0)), whole(Source::Operand(1))],
                    result: ty.clone(),
                },
                Part {
                    kernel: add.clone(),
                    args: vec![whole(Source::Part(0)), whole(Source::Operand(2))],
                    result: ty.clone(),
                },
            ],
            stored: vec![1],
        };
        let args = || (0..3).map(|i| operand(256 * i, &ty)).collect::<Vec<_>>();
        assert_eq!(elementwise_bytes(&call(fused.into(), args(), operand(1024, &ty))), 256);
        assert_eq!(elementwise_bytes(&call(product.into(), args()[..2].to_vec(), operand(1024, &ty))), 0);
        assert_eq!(elementwise_bytes(&call(add.into(), args()[..2].to_vec(), operand(1024, &ty))), 768);
    }

    #[test]
    fn neighbours_say_why_they_are_two_calls() {
        let ty = TensorType::f32([8, 8]);
        let norm = Kernel::RmsNorm(RmsNorm { eps: Float(1e-6) });
        let product = Kernel::Matmul(Matmul { transpose_rhs: true });
        let steps = vec![
            Step::Kernel(call(norm.into(), vec![operand(0, &ty)], operand(256, &ty))),
            Step::Kernel(call(product.into(), vec![operand(256, &ty), operand(512, &ty)], operand(768, &ty))),
        ];
        let apart = summary_of(steps).apart;
        const REASON: &str =
            "a product reads its operands many times, so only a leaky ReLU and pads can run in front of it";
        let pair = ("rms_norm".to_string(), "matmul".to_string(), REASON.to_string());
        assert_eq!(apart, BTreeMap::from([(pair, Apart { times: 1, bytes: 512 })]));
    }
}
