//! The kernel calls of a program, and where its time goes.

use std::collections::BTreeMap;

use ltxc_ir::DType;
use ltxc_ir::plan::{KernelCall, Plan, Program, Step};
use serde::Serialize;

use super::ceilings::Ceilings;

/// A kernel call of a program.
#[derive(Clone, Debug)]
pub struct ProgramCall<'p> {
    /// Name path of what it computes.
    pub name: String,
    /// The call.
    pub call: &'p KernelCall,
}

impl ProgramCall<'_> {
    /// Types of operands and results.
    pub fn types(&self) -> String {
        types(self.call)
    }
}

/// Types of operands and results of a call, as reports write them.
pub fn types(call: &KernelCall) -> String {
    let args: Vec<String> = call.args.iter().map(|a| a.ty.to_string()).collect();
    let results: Vec<String> = call.results.iter().map(|r| r.ty.to_string()).collect();
    format!("{} → {}", args.join(" "), results.join(" "))
}

/// The dtype that a call computes its products in: that of its first operand, if it is a float.
pub fn dtype(call: &KernelCall) -> DType {
    call.args.first().map_or(DType::F32, |a| a.ty.dtype)
}

/// The calls of a program in the order in which an executor runs them.
pub fn calls<'p>(plan: &'p Plan, program: &Program) -> Vec<ProgramCall<'p>> {
    let mut calls = Vec::new();
    collect(plan, program.function, "", &mut calls);
    calls
}

fn collect<'p>(plan: &'p Plan, function: u32, path: &str, out: &mut Vec<ProgramCall<'p>>) {
    let join = |name: &str| [path, name].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(".");
    for step in &plan.functions[function as usize].steps {
        match step {
            Step::Kernel(call) => out.push(ProgramCall { name: join(&call.name), call }),
            Step::Call(call) => collect(plan, call.function, &join(&call.name), out),
        }
    }
}

/// Calls of the same kernel on the same types.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct KernelTime {
    /// Name of the kernel.
    pub kernel: String,
    /// Types of operands and results.
    pub types: String,
    /// Number of calls.
    pub calls: u64,
    /// Time of all of them.
    pub seconds: f64,
    /// Floating point operations.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: f64,
    /// The least time that they could take at the ceilings of the device.
    pub least_seconds: f64,
    /// Whether arithmetic, not memory, sets that limit.
    pub is_arithmetic: bool,
}

impl KernelTime {
    /// Part of the ceiling that is reached.
    pub fn share(&self) -> f64 {
        self.least_seconds / self.seconds
    }
}

/// Times by kernel.
#[derive(Default)]
pub struct Profile(BTreeMap<(String, String), KernelTime>);

impl Profile {
    /// Adds `runs` runs of a call that takes `seconds`.
    pub fn add(&mut self, call: &KernelCall, runs: u64, seconds: f64, ceilings: &Ceilings) {
        let (kernel, types) = (call.work.name().to_string(), types(call));
        let time = self.0.entry((kernel.clone(), types.clone())).or_insert_with(|| KernelTime {
            kernel,
            types,
            is_arithmetic: ceilings.is_arithmetic(call.flops, call.bytes, dtype(call)),
            ..KernelTime::default()
        });
        time.calls += runs;
        time.seconds += runs as f64 * seconds;
        time.flops += runs as f64 * call.flops as f64;
        time.bytes += runs as f64 * call.bytes as f64;
        time.least_seconds += runs as f64 * ceilings.seconds(call.flops, call.bytes, dtype(call));
    }

    /// The kernels, the slowest first.
    pub fn sorted(self) -> Vec<KernelTime> {
        let mut times: Vec<KernelTime> = self.0.into_values().collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        times
    }
}
