//! Totals of a plan: what a program costs, and what it needs.

use std::collections::BTreeMap;

use super::{Plan, Program, Step, WeightOrigin};

/// Cost of running a program once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Kernel calls, those of called functions included.
    pub calls: u64,
    /// Floating point operations.
    pub flops: u64,
    /// Bytes read and written, operands counted once per call.
    pub bytes: u64,
    /// Kernel calls by kernel name.
    pub by_kernel: BTreeMap<String, u64>,
}

impl Cost {
    fn add(&mut self, other: &Cost) {
        self.calls = self.calls.saturating_add(other.calls);
        self.flops = self.flops.saturating_add(other.flops);
        self.bytes = self.bytes.saturating_add(other.bytes);
        for (kernel, n) in &other.by_kernel {
            let sum = self.by_kernel.entry(kernel.clone()).or_default();
            *sum = sum.saturating_add(*n);
        }
    }
}

/// Cost of one call of each function of the plan.
pub fn function_costs(plan: &Plan) -> Vec<Cost> {
    let mut costs: Vec<Cost> = Vec::with_capacity(plan.functions.len());
    for function in &plan.functions {
        let mut cost = Cost::default();
        for step in &function.steps {
            match step {
                Step::Kernel(call) => {
                    let by_kernel = BTreeMap::from([(call.work.name().to_string(), 1)]);
                    cost.add(&Cost { calls: 1, flops: call.flops, bytes: call.bytes, by_kernel });
                }
                Step::Call(call) => {
                    // Callees stand before their callers in a verified plan.
                    let callee = costs.get(call.function as usize).cloned().unwrap_or_default();
                    cost.add(&callee);
                }
            }
        }
        costs.push(cost);
    }
    costs
}

/// Every distinct weight of a program: bytes read in place from files, and bytes of packed copies.
pub fn weight_bytes(plan: &Plan, program: &Program) -> (u64, u64) {
    distinct_weight_bytes(plan, std::slice::from_ref(&program))
}

/// [`weight_bytes`] of programs that share what they have in common.
pub fn distinct_weight_bytes(plan: &Plan, programs: &[&Program]) -> (u64, u64) {
    let mut seen = BTreeMap::new();
    programs.iter().for_each(|program| collect(plan, program.function, "", &mut seen));
    seen.values().fold((0, 0), |(mapped, packed): (u64, u64), &(bytes, is_packed)| {
        if is_packed { (mapped, packed.saturating_add(bytes)) } else { (mapped.saturating_add(bytes), packed) }
    })
}

type Seen = BTreeMap<(u32, String), (u64, bool)>;

fn collect(plan: &Plan, function: u32, prefix: &str, seen: &mut Seen) {
    let Some(function) = plan.functions.get(function as usize) else { return };
    for weight in &function.weights {
        let Some(first) = weight.origin.tensors().first() else { continue };
        let packed = matches!(weight.origin, WeightOrigin::Packed { .. });
        seen.insert((first.source, format!("{prefix}{}", first.key)), (weight.ty.bytes() as u64, packed));
    }
    for step in &function.steps {
        if let Step::Call(call) = step {
            collect(plan, call.function, &format!("{prefix}{}", call.prefix), seen);
        }
    }
}
