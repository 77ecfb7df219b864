//! The kernels of components, one by one: every distinct call of their plans, on tensors of its own.
//!
//! The list is that of the plans, and so what the offline tests of the kernels generate and what a generation launches. A
//! fused call is measured beside its parts, one kernel each, which is what an eager framework runs; both take the same
//! operands and must give the same.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use half::{bf16, f16};
use ltxc::bench::calls::{BareCall, CallPlan};
use ltxc::bench::ceilings::Ceilings;
use ltxc::bench::inputs::write_noise;
use ltxc::bench::levels::Other;
use ltxc::bench::statistics::{largest, median, relative_difference};
use ltxc::bench::{profile, runs_of_sample, sample};
use ltxc_ir::plan::{KernelCall, Plan, Source, Work};
use ltxc_ir::{DType, TensorType};
use ltxc_runtime::RunError;
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::weights::WeightFiles;
use serde::{Deserialize, Serialize};

/// What was measured of a kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelRow {
    /// Component that calls it.
    pub component: String,
    /// Name path of the first value that it computes.
    pub example: String,
    /// Name of the kernel or of the pattern of a fused call.
    pub kernel: String,
    /// Types of operands and results.
    pub types: String,
    /// Times that the component calls it.
    pub calls: u64,
    /// Floating point operations of a call.
    pub flops: u64,
    /// Bytes that a call reads and writes.
    pub bytes: u64,
    /// Seconds of a call.
    pub seconds: f64,
    /// Part of the device's ceiling that it reaches.
    pub share: f64,
    /// Whether arithmetic, not memory, sets that ceiling.
    pub is_arithmetic: bool,
    /// A fused call against its parts.
    pub apart: Option<Apart>,
    /// The same work by another library.
    pub other: Option<Other>,
}

/// The parts of a fused call, one after the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Apart {
    /// Their number.
    pub kernels: usize,
    /// Bytes that they read and write.
    pub bytes: u64,
    /// Seconds of all of them.
    pub seconds: f64,
    /// Seconds that fusion gains by the bytes that are not moved any more, at the rate of a large copy.
    pub predicted_gain: f64,
    /// Relative L2 distance of what both give; `None` if that is too large to compare.
    pub difference: Option<f64>,
}

/// A call, and how often a plan makes it.
pub struct Distinct<'p> {
    /// Name path of the first of them.
    pub example: String,
    /// The call.
    pub call: &'p KernelCall,
    /// Number of such calls in all programs, each run once.
    pub times: u64,
}

/// The calls of a plan that differ in what they compute or in types, those with the most work first.
pub fn distinct<'p>(plan: &'p Plan, ceilings: &Ceilings) -> Vec<Distinct<'p>> {
    let mut places: HashMap<(&Work, String), usize> = HashMap::new();
    let mut found: Vec<Distinct<'p>> = Vec::new();
    for call in plan.programs.iter().flat_map(|p| profile::calls(plan, p)) {
        let place = *places.entry((&call.call.work, call.types())).or_insert(found.len());
        match found.get_mut(place) {
            Some(known) => known.times += 1,
            None => found.push(Distinct { example: call.name, call: call.call, times: 1 }),
        }
    }
    let weight =
        |d: &Distinct<'_>| d.times as f64 * ceilings.seconds(d.call.flops, d.call.bytes, profile::dtype(d.call));
    found.sort_by(|a, b| weight(b).total_cmp(&weight(a)));
    found
}

/// Samples of each side.
const ROUNDS: usize = 5;

/// A kernel that takes this long is sampled less often.
const SLOW_SECONDS: f64 = 0.5;

/// Benchmarks are stopped with the process.
static NEVER: AtomicBool = AtomicBool::new(false);

/// Results with more elements are not compared.
const MOST_COMPARED: usize = 1 << 27;

/// Largest distance between a fused call and its parts that are f32 throughout, and if something is rounded in between.
const MOST_DIFFERENT: [f64; 2] = [1e-4, 3e-2];

/// Measures one call. With `limit`, sampling stops when that time is over.
///
/// # Errors
/// A device that cannot run it.
pub fn measure(
    component: &str,
    distinct: &Distinct<'_>,
    device: &Device,
    ceilings: &Ceilings,
    limit: Duration,
) -> Result<KernelRow, RunError> {
    let call = distinct.call;
    let bare = call_plan(call);
    let plan = bare.plan(&device.target)?;
    let weights = WeightFiles::open(&plan, &[], false)?;
    let mut executor = Executor::on(open(device)?, &plan, &weights, &NEVER)?;
    for (i, ty) in bare.operands.iter().enumerate() {
        let name = i.to_string();
        match ty.dtype.is_float() {
            true => write_noise(&mut executor, FUSED, &name, ty)?,
            // Rows and tokens: the first one always exists.
            false => executor.write(FUSED, &name, &vec![0u8; ty.bytes()])?,
        }
    }
    let start = Instant::now();
    let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); plan.programs.len()];
    let runs = plan.programs.iter().map(|p| runs_of_sample(&mut executor, &p.name));
    let runs = runs.collect::<Result<Vec<_>, _>>()?;
    for round in 0..ROUNDS {
        for ((program, times), &runs) in plan.programs.iter().zip(&mut seconds).zip(&runs) {
            times.push(sample(&mut executor, &program.name, runs)?);
        }
        let is_slow = start.elapsed().as_secs_f64() > (round + 1) as f64 * SLOW_SECONDS;
        if start.elapsed() > limit || (is_slow && round > 0) {
            break;
        }
    }
    let mut medians = seconds.into_iter().map(|times| median(times).unwrap_or(f64::NAN));
    let fused = medians.next().unwrap_or(f64::NAN);
    let apart = match (&call.work, medians.next()) {
        (Work::Fused(work), Some(seconds)) => {
            let bytes = bytes_apart(&plan);
            Some(Apart {
                kernels: work.parts.len(),
                bytes,
                seconds,
                predicted_gain: bytes.saturating_sub(call.bytes) as f64 / ceilings.copy,
                difference: difference(&mut executor, &bare)?,
            })
        }
        _ => None,
    };
    let dtype = profile::dtype(call);
    Ok(KernelRow {
        component: component.into(),
        example: distinct.example.clone(),
        kernel: call.work.name().into(),
        types: profile::types(call),
        calls: distinct.times,
        flops: call.flops,
        bytes: call.bytes,
        seconds: fused,
        share: ceilings.seconds(call.flops, call.bytes, dtype) / fused,
        is_arithmetic: ceilings.is_arithmetic(call.flops, call.bytes, dtype),
        apart,
        other: None,
    })
}

impl KernelRow {
    /// Whether a fused call and its parts give the same, as far as that was compared.
    pub fn is_right(&self) -> bool {
        let is_rounded = ["bf16", "f16", "f8"].iter().any(|dtype| self.types.contains(dtype));
        let limit = MOST_DIFFERENT[usize::from(is_rounded)];
        self.apart.as_ref().and_then(|a| a.difference).is_none_or(|d| d <= limit)
    }
}

const FUSED: &str = "fused";
const APART: &str = "apart";

/// A call on tensors of its own, and its parts on the same ones.
fn call_plan(call: &KernelCall) -> CallPlan {
    let types = |list: &[ltxc_ir::plan::Operand]| list.iter().map(|o| o.ty.clone()).collect::<Vec<TensorType>>();
    let (operands, results) = (types(&call.args), types(&call.results));
    let slots = operands.len() + results.len();
    let numbered =
        |types: &[TensorType], first: usize| types.iter().cloned().enumerate().map(|(i, ty)| (first + i, ty)).collect();
    let whole =
        BareCall { work: call.work.clone(), args: numbered(&operands, 0), results: numbered(&results, operands.len()) };
    let mut programs = vec![(FUSED.to_string(), vec![whole])];
    let mut between = Vec::new();
    if let Work::Fused(fused) = &call.work {
        let mut places: Vec<usize> = Vec::with_capacity(fused.parts.len());
        let mut calls = Vec::with_capacity(fused.parts.len());
        for (i, part) in fused.parts.iter().enumerate() {
            let place = match fused.stored.iter().position(|&s| s as usize == i) {
                Some(result) => operands.len() + result,
                None => {
                    between.push(part.result.clone());
                    slots + between.len() - 1
                }
            };
            places.push(place);
            let of = |source: Source| match source {
                Source::Operand(a) => a as usize,
                Source::Part(p) => places[p as usize],
            };
            calls.push(BareCall {
                work: part.kernel.clone().into(),
                args: part.args.iter().map(|a| (of(a.source), a.ty.clone())).collect(),
                results: vec![(place, part.result.clone())],
            });
        }
        programs.push((APART.to_string(), calls));
    }
    CallPlan { operands, results, between, programs }
}

/// Bytes that the parts of a call move.
fn bytes_apart(plan: &Plan) -> u64 {
    let calls = plan.programs.iter().filter(|p| p.name == APART).flat_map(|p| profile::calls(plan, p));
    calls.map(|c| c.call.bytes).fold(0, u64::saturating_add)
}

/// How far the results of both programs are apart.
fn difference(executor: &mut Executor<'_>, calls: &CallPlan) -> Result<Option<f64>, RunError> {
    if calls.results.iter().any(|ty| ty.elements() > MOST_COMPARED || !ty.dtype.is_float()) {
        return Ok(None);
    }
    let mut read = |program: &str| {
        executor.run(program)?;
        let results = calls.results.iter().enumerate().map(|(r, ty)| {
            let name = (calls.operands.len() + r).to_string();
            Ok(floats(&executor.read_bytes(program, &name)?, ty.dtype))
        });
        results.collect::<Result<Vec<Vec<f32>>, RunError>>()
    };
    let (fused, apart) = (read(FUSED)?, read(APART)?);
    Ok(Some(largest(fused.iter().zip(&apart).map(|(a, b)| relative_difference(a, b)))))
}

fn floats(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter().map(|&b| u16::from_ne_bytes(b));
    match dtype {
        DType::BF16 => halves().map(|b| bf16::from_bits(b).to_f32()).collect(),
        DType::F16 => halves().map(|b| f16::from_bits(b).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_ne_bytes(b)).collect(),
    }
}
