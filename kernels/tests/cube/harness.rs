//! Runs kernel calls on a device, in an arena as a backend does; otherwise the harness of the CPU.
//!
//! The device is the first one that Vulkan or Metal has, or with `LTXC_TEST_DEVICE=cuda:N` one of CUDA.

use std::sync::OnceLock;

use cubecl::prelude::*;
use cubecl::wgpu::{AutoGraphicsApi, RuntimeOptions, WgpuDevice, WgpuRuntime, WgpuSetup, init_setup};
use ltxc_ir::TensorType;
use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::Unary;
use ltxc_ir::plan::{Kernel, Work};
use ltxc_kernels::cube::{CubeTensor, Schedule, guard};

#[path = "../simple/harness.rs"]
#[allow(dead_code)] // what runs on the CPU
mod shared;

pub use shared::{Random, close, equal, in_dtype, reference, unit};

/// Vulkan lets a division or a root be off by 2.5 units of the last place, 5 roundings, where the CPU rounds once.
pub const DIVISION_ROUNDINGS: f64 = 5.0;

/// Sums are f32: the error of one addition.
pub const SUM_ROUNDING: f64 = 1.0 / (1 << 24) as f64;

/// Units of the last place and absolute error of a function on f32.
pub fn accuracy(op: Unary) -> (f64, f64) {
    match op {
        Unary::Neg | Unary::Abs => (0.0, 0.0),
        // The last sum and product round by half a unit each, what is summed has an error of less than one.
        Unary::Exp => (2.0, 0.0),
        // The sum of two parts rounds once, the parts are smaller; near 1 the series has three roundings and a division.
        Unary::Log => (5.0, 0.0),
        Unary::Sqrt | Unary::Rsqrt => (2.5, 0.0),
        // What is left of up to 1e5 after subtracting quarters, off by two roundings of π/4 and one of the result.
        Unary::Sin | Unary::Cos => (0.0, 3e-7),
        // A division (2.5) and a sum behind an exponential (2).
        Unary::Tanh => (5.0, 0.0),
        Unary::Erf => (3.0, 0.0),
    }
}

/// Roundings of a power whose exponential has this argument: what that loses, and the exponential.
pub fn power_roundings(argument: f64) -> f64 {
    2.0 * accuracy(Unary::Exp).0 + argument.abs() * (2.0 * accuracy(Unary::Log).0 + 1.0)
}

/// The device behind Vulkan or Metal, or the end of this process where there is none.
fn wgpu_client() -> ComputeClient<WgpuRuntime> {
    static SETUP: OnceLock<Option<WgpuSetup>> = OnceLock::new();
    let setup = SETUP.get_or_init(|| {
        let device = WgpuDevice::DefaultDevice;
        let setup =
            std::panic::catch_unwind(|| init_setup::<AutoGraphicsApi>(&device, RuntimeOptions::default())).ok()?;
        guard::watch_wgpu(&setup);
        Some(setup)
    });
    if setup.is_none() {
        assert!(std::env::var_os("LTXC_REQUIRE_VULKAN").is_none_or(|v| v != "1"), "no Vulkan device");
        eprintln!("skipped: no Vulkan device");
        std::process::exit(0);
    }
    WgpuRuntime::client(&WgpuDevice::DefaultDevice)
}

/// Multiple of all offsets in an arena.
const ALIGNMENT: usize = 512;

/// Memory for tensors, filled with bytes that are no zeros.
#[derive(Default)]
struct Arena {
    bytes: Vec<u8>,
}

impl Arena {
    /// Places bytes and returns their range.
    fn push(&mut self, bytes: &[u8]) -> (u64, u64) {
        let start = self.bytes.len();
        self.bytes.extend(bytes);
        self.bytes.resize((start + bytes.len().max(1)).next_multiple_of(ALIGNMENT), 0xa5);
        (start as u64, (start + bytes.len()).next_multiple_of(4) as u64)
    }
}

/// The results of a call on memory that held `before`; `in_place` are the operands that they lie on.
#[track_caller]
pub fn call_all(work: &Work, args: &[Tensor], before: &[Tensor], in_place: &[Option<usize>]) -> Vec<Vec<u8>> {
    let name = std::env::var("LTXC_TEST_DEVICE").unwrap_or_else(|_| "vulkan".into());
    #[cfg(feature = "cuda")]
    if let Some(index) = name.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
        use cubecl::cuda::{CudaDevice, CudaRuntime};
        // Who asks for CUDA has it: there is nothing to skip.
        return call_on(&CudaRuntime::client(&CudaDevice { index }), work, args, before, in_place);
    }
    assert!(
        name.starts_with("vulkan") || name == "metal",
        "LTXC_TEST_DEVICE: no device `{name}`, but vulkan or cuda:N"
    );
    call_on(&wgpu_client(), work, args, before, in_place)
}

#[track_caller]
fn call_on<R: Runtime>(
    client: &ComputeClient<R>,
    work: &Work,
    args: &[Tensor],
    before: &[Tensor],
    in_place: &[Option<usize>],
) -> Vec<Vec<u8>> {
    let types: Vec<&TensorType> = args.iter().map(|a| &a.ty).collect();
    let result_types: Vec<&TensorType> = before.iter().map(|b| &b.ty).collect();
    let mut arena = Arena::default();
    let mut ranges: Vec<(u64, u64)> = args.iter().map(|a| arena.push(&a.to_bytes())).collect();
    for (before, in_place) in before.iter().zip(in_place) {
        ranges.push(in_place.map_or_else(|| arena.push(&before.to_bytes()), |i| ranges[i]));
    }
    let schedule = Schedule::new(work, &types, &result_types).unwrap();
    let scratch_bytes = schedule.workspace_bytes();
    let scratch = arena.push(&vec![0xa5; scratch_bytes]);
    let memory = client.create_from_slice(&arena.bytes);
    let total = arena.bytes.len() as u64;
    let part = |(start, end): (u64, u64)| memory.clone().offset_start(start).offset_end(total - end);

    let operands: Vec<CubeTensor<'_>> =
        types.iter().zip(&ranges).map(|(&ty, &range)| CubeTensor { ty, handle: part(range) }).collect();
    let results: Vec<CubeTensor<'_>> = (result_types.iter().zip(&ranges[args.len()..]))
        .map(|(&ty, &range)| CubeTensor { ty, handle: part(range) })
        .collect();
    let scratch_ty = TensorType::new(ltxc_ir::DType::U8, [scratch_bytes]);
    let workspace = CubeTensor { ty: &scratch_ty, handle: part(scratch) };
    schedule.launch(client, &operands, &results, Some(&workspace)).unwrap();
    guard::sync(client).unwrap();
    let read = |result: &CubeTensor<'_>| match result.ty.bytes() {
        0 => Vec::new(),
        bytes => client.read_one(result.handle.clone()).unwrap()[..bytes].to_vec(),
    };
    results.iter().map(read).collect()
}

/// The result of a call that has one.
#[track_caller]
fn call(work: &Work, args: &[Tensor], before: &Tensor, in_place: Option<usize>) -> Vec<u8> {
    call_all(work, args, std::slice::from_ref(before), &[in_place]).remove(0)
}

/// Runs the call, and again in place wherever that is allowed; all must give the same bytes.
#[track_caller]
pub fn run_work(work: &Work, args: &[Tensor], before: &Tensor) -> Tensor {
    let types: Vec<&TensorType> = args.iter().map(|a| &a.ty).collect();
    work.check(&types, &[&before.ty]).unwrap();
    let bytes = call(work, args, before, None);
    for i in (0..args.len()).filter(|&i| work.may_overwrite(i, 0) && args[i].ty == before.ty) {
        assert!(call(work, args, before, Some(i)) == bytes, "{work:?} {types:?}: in place of {i} differs");
    }
    Tensor::from_bytes(before.ty.clone(), &bytes)
}

/// Runs a kernel on memory that held `before`.
#[track_caller]
pub fn run_onto(kernel: &Kernel, args: &[Tensor], before: &Tensor) -> Tensor {
    run_work(&kernel.clone().into(), args, before)
}

/// [`run_onto`] zeros.
#[track_caller]
pub fn run(kernel: &Kernel, args: &[Tensor], out: &TensorType) -> Tensor {
    run_onto(kernel, args, &Tensor::zeros(out.clone()))
}
