//! Totals of a plan: what a program costs, and what it needs.

use std::collections::BTreeMap;

use super::{ADAPTER_SLOTS, FileTensor, Plan, PlanWeight, Program, Step, WeightOrigin};
use crate::types::TensorType;

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

/// Every distinct weight of a program: bytes read in place from files, and bytes of memory that a run fills: packed copies
/// and slots for adapters.
pub fn weight_bytes(plan: &Plan, program: &Program) -> (u64, u64) {
    distinct_weight_bytes(plan, std::slice::from_ref(&program))
}

/// [`weight_bytes`] of programs that share what they have in common.
pub fn distinct_weight_bytes(plan: &Plan, programs: &[&Program]) -> (u64, u64) {
    let slots = plan.sources.iter().position(|s| s.name == ADAPTER_SLOTS);
    let mut seen: BTreeMap<(u32, String), (u64, bool)> = BTreeMap::new();
    for program in programs {
        for_each_weight(plan, program, &mut |prefix, weight| {
            let Some(first) = weight.origin.tensors().first() else { return };
            let is_slot = slots == Some(first.source as usize);
            let is_filled = is_slot || matches!(weight.origin, WeightOrigin::Packed { .. });
            seen.insert((first.source, format!("{prefix}{}", first.key)), (weight.ty.bytes() as u64, is_filled));
        });
    }
    seen.values().fold((0, 0), |(mapped, filled): (u64, u64), &(bytes, is_filled)| {
        if is_filled { (mapped, filled.saturating_add(bytes)) } else { (mapped.saturating_add(bytes), filled) }
    })
}

/// Bytes of the weights of a program that are read in place and that `is_chosen`, by source and complete key.
pub fn mapped_bytes(plan: &Plan, program: &Program, is_chosen: &dyn Fn(&str, &str) -> bool) -> u64 {
    let mut seen: BTreeMap<(u32, String), u64> = BTreeMap::new();
    for_each_weight(plan, program, &mut |prefix, weight| {
        let WeightOrigin::File(tensor) = &weight.origin else { return };
        let (source, key) = (plan.sources.get(tensor.source as usize), format!("{prefix}{}", tensor.key));
        if source.is_some_and(|s| is_chosen(&s.name, &key)) {
            seen.insert((tensor.source, key), weight.ty.bytes() as u64);
        }
    });
    seen.values().fold(0, |sum, &bytes| sum.saturating_add(bytes))
}

/// Every tensor that programs of a plan read, by source and complete key.
pub fn tensors(plan: &Plan) -> BTreeMap<(u32, String), &TensorType> {
    let mut found = BTreeMap::new();
    for program in &plan.programs {
        for_each_weight(plan, program, &mut |prefix, weight| {
            for FileTensor { source, key, ty } in weight.origin.tensors() {
                found.insert((*source, format!("{prefix}{key}")), ty);
            }
        });
    }
    found
}

/// Calls `f` with every weight of a program, in every function that it calls, and what stands before its keys there.
fn for_each_weight<'p>(plan: &'p Plan, program: &Program, f: &mut dyn FnMut(&str, &'p PlanWeight)) {
    visit(plan, program.function, "", f);
}

fn visit<'p>(plan: &'p Plan, function: u32, prefix: &str, f: &mut dyn FnMut(&str, &'p PlanWeight)) {
    let Some(function) = plan.functions.get(function as usize) else { return };
    function.weights.iter().for_each(|weight| f(prefix, weight));
    for step in &function.steps {
        if let Step::Call(call) = step {
            visit(plan, call.function, &format!("{prefix}{}", call.prefix), f);
        }
    }
}
