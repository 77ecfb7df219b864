//! Fused calls one by one: each against its parts as kernels of their own, on the same operands.
//!
//! Both sides take turns, and the least processor time of each counts. So a kernel that is slower fused than apart shows even
//! where a whole run hides it in noise.

use anyhow::{Context, Result};
use ltxc_ir::plan::{Fused, KernelCall, Plan, Source, Step, Work};
use ltxc_ir::{DType, Rate, TensorType};
use ltxc_kernels::{catalogue, cpu};

use crate::measure::cpu_seconds;

/// A fused call and what it takes.
pub struct Pair {
    /// The pattern that made it.
    pub pattern: String,
    /// Types of its operands and results.
    pub types: String,
    /// How often the programs of a step make it.
    pub calls: u64,
    /// Bytes that its parts move beyond what it moves itself.
    pub saved_bytes: u64,
    /// Processor seconds of one call, all threads together.
    pub fused: f64,
    /// Those of its parts.
    pub parts: f64,
}

/// Least processor time that one sample takes: short calls run several times.
const SAMPLE_SECONDS: f64 = 0.1;

/// Measures every fused call of the programs that run with each step, equal ones once.
///
/// # Errors
/// A call that is larger than memory.
pub fn measure(plan: &Plan, rounds: usize) -> Result<Vec<Pair>> {
    let mut calls: Vec<(&KernelCall, u64)> = Vec::new();
    for program in plan.programs.iter().filter(|p| p.rate == Rate::Step) {
        collect(plan, program.function, &mut calls);
    }
    let mut pairs = Vec::with_capacity(calls.len());
    for (call, count) in calls {
        let Work::Fused(fused) = &call.work else { continue };
        let [fused_seconds, parts_seconds] = take_turns(call, fused, rounds)?;
        let part_bytes = fused.parts.iter().map(|part| {
            let args: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
            catalogue::bytes(&Work::Kernel(part.kernel.clone()), &args, &[&part.result])
        });
        let names =
            |types: &mut dyn Iterator<Item = &TensorType>| types.map(|t| t.to_string()).collect::<Vec<_>>().join(" ");
        let args = names(&mut call.args.iter().map(|a| &a.ty));
        let results = names(&mut call.results.iter().map(|r| &r.ty));
        pairs.push(Pair {
            pattern: fused.pattern.clone(),
            types: format!("{args} → {results}"),
            calls: count,
            saved_bytes: part_bytes.sum::<u64>().saturating_sub(call.bytes),
            fused: fused_seconds,
            parts: parts_seconds,
        });
    }
    Ok(pairs)
}

/// Adds the fused calls of a function, callees included.
fn collect<'p>(plan: &'p Plan, function: u32, calls: &mut Vec<(&'p KernelCall, u64)>) {
    for step in &plan.functions[function as usize].steps {
        match step {
            Step::Kernel(call) if matches!(call.work, Work::Fused(_)) => {
                match calls.iter_mut().find(|(known, _)| known.work == call.work) {
                    Some((_, count)) => *count += 1,
                    None => calls.push((call, 1)),
                }
            }
            Step::Kernel(_) => {}
            Step::Call(call) => collect(plan, call.function, calls),
        }
    }
}

/// Least processor seconds of the call and of its parts.
fn take_turns(call: &KernelCall, fused: &Fused, rounds: usize) -> Result<[f64; 2]> {
    let types = |operands: &'_ [ltxc_ir::plan::Operand]| operands.iter().map(|o| o.ty.clone()).collect::<Vec<_>>();
    let (arg_types, result_types) = (types(&call.args), types(&call.results));
    let mut operands = arg_types.iter().map(Memory::filled).collect::<Result<Vec<_>>>()?;
    let mut results = result_types.iter().map(Memory::new).collect::<Result<Vec<_>>>()?;
    let mut inner = fused.parts.iter().map(|p| Memory::new(&p.result)).collect::<Result<Vec<_>>>()?;

    let operand_ptrs: Vec<*mut u8> = operands.iter_mut().map(Memory::ptr).collect();
    let inner_ptrs: Vec<*mut u8> = inner.iter_mut().map(Memory::ptr).collect();
    let args = (arg_types.iter().zip(&operand_ptrs)).map(|(ty, &ptr)| cpu::Arg { ty, ptr });
    let outputs = (result_types.iter().zip(&mut results)).map(|(ty, memory)| cpu::Output { ty, ptr: memory.ptr() });
    let together = Launch::new(call.work.clone(), args.collect(), outputs.collect());
    let apart = fused.parts.iter().zip(&inner_ptrs).map(|(part, &to)| {
        let args = part.args.iter().map(|arg| {
            let ptr = match arg.source {
                Source::Operand(a) => operand_ptrs[a as usize],
                Source::Part(p) => inner_ptrs[p as usize],
            };
            cpu::Arg { ty: &arg.ty, ptr }
        });
        Launch::new(Work::Kernel(part.kernel.clone()), args.collect(), vec![cpu::Output { ty: &part.result, ptr: to }])
    });
    let mut sides = [vec![together], apart.collect()];
    let mut best = [f64::INFINITY; 2];
    let mut repeats = 1;
    for round in 0..=rounds {
        for (side, best) in sides.iter_mut().zip(&mut best) {
            let before = cpu_seconds();
            for _ in 0..repeats {
                side.iter_mut().for_each(Launch::run);
            }
            let seconds = (cpu_seconds() - before) / repeats as f64;
            if round > 0 {
                *best = best.min(seconds);
            } else {
                // A short call may seem to take no time.
                let wanted = (SAMPLE_SECONDS / seconds.max(1e-4)).ceil();
                repeats = repeats.max(wanted as usize);
            }
        }
    }
    Ok(best)
}

/// A call with its operands.
struct Launch<'a> {
    work: Work,
    args: Vec<cpu::Arg<'a>>,
    results: Vec<cpu::Output<'a>>,
    workspace: Vec<u8>,
}

impl<'a> Launch<'a> {
    fn new(work: Work, args: Vec<cpu::Arg<'a>>, results: Vec<cpu::Output<'a>>) -> Launch<'a> {
        let arg_types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
        let result_types: Vec<&TensorType> = results.iter().map(|r| r.ty).collect();
        let bytes = catalogue::workspace_bytes(&work, &arg_types, &result_types, cpu::threads());
        Launch { work, args, results, workspace: vec![0; bytes] }
    }

    fn run(&mut self) {
        // SAFETY: the plan was verified, so types fit the work; every operand and result has memory of its own, aligned
        // to 8 bytes, that outlives this value; the workspace has the size that the catalogue says.
        unsafe { cpu::launch(&self.work, &self.args, &self.results, &mut self.workspace) };
    }
}

/// Memory of a tensor.
struct Memory(Vec<u64>);

impl Memory {
    fn new(ty: &TensorType) -> Result<Memory> {
        let bytes = ty.checked_bytes().with_context(|| format!("{ty} is too large"))?;
        Ok(Memory(vec![0; bytes.div_ceil(8)]))
    }

    /// Numbers between −1 and 1 in floats, zeros in everything else.
    fn filled(ty: &TensorType) -> Result<Memory> {
        let mut memory = Memory::new(ty)?;
        // Three mantissa bits that change and one sign, in every 16 bits: a bf16, or half of an f32, of 0.5 to 1.
        let half = |i: u64| 0x3f00 | (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57 << 4 & 0x70) | (i & 1) << 15;
        if matches!(ty.dtype, DType::F32 | DType::BF16) {
            for (i, word) in (0u64..).step_by(4).zip(&mut memory.0) {
                *word = (0..4).map(|j| half(i + j) << (16 * j)).fold(0, |a, b| a | b);
            }
        }
        Ok(memory)
    }

    fn ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}
