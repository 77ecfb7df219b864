//! Runs kernel calls on a GPU: CUDA if there is a device, otherwise Vulkan; `LTXC_CUBE_DEVICE=vulkan` or `cuda` chooses.

use std::panic::catch_unwind;
use std::sync::OnceLock;

use cubecl::prelude::*;
use cubecl::wgpu::{AutoGraphicsApi, RuntimeOptions, WgpuDevice, WgpuRuntime, init_setup};
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::Work;
use ltxc_kernels::cube::guard;

mod laid;
mod runs;

#[path = "../simple/harness.rs"]
#[allow(dead_code)] // what runs on the CPU
mod shared;

use laid::Laid;
pub use runs::{DIVISION_ROUNDINGS, SUM_ROUNDING, accuracy, power_roundings, run, run_onto, run_work};
pub use shared::{Random, close, equal, in_dtype, reference, unit};

#[derive(Clone, Copy, PartialEq)]
enum Device {
    Cuda,
    Vulkan,
}

/// The device, or the end of this process where there is none.
fn device() -> Device {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let chosen = std::env::var("LTXC_CUBE_DEVICE").unwrap_or_default();
        let open: [(&str, fn() -> Option<Device>); 2] = [("cuda", open_cuda), ("vulkan", open_vulkan)];
        open.into_iter().filter(|(name, _)| chosen.is_empty() || chosen == *name).find_map(|(_, open)| open())
    });
    device.unwrap_or_else(|| {
        assert!(std::env::var_os("LTXC_REQUIRE_VULKAN").is_none_or(|v| v != "1"), "no Vulkan device");
        assert!(std::env::var_os("LTXC_CUBE_DEVICE").is_none(), "there is no device of the kind `LTXC_CUBE_DEVICE`");
        eprintln!("skipped: no GPU");
        std::process::exit(0)
    })
}

fn open_vulkan() -> Option<Device> {
    let setup =
        catch_unwind(|| init_setup::<AutoGraphicsApi>(&WgpuDevice::DefaultDevice, RuntimeOptions::default())).ok()?;
    guard::watch_wgpu(&setup);
    Some(Device::Vulkan)
}

#[cfg(feature = "cuda")]
fn open_cuda() -> Option<Device> {
    // CubeCL panics where something is missing.
    cubecl::cuda::install::cuda_path()?;
    catch_unwind(cuda).ok().map(|_| Device::Cuda)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda() -> Option<Device> {
    None
}

#[cfg(feature = "cuda")]
fn cuda() -> ComputeClient<cubecl::cuda::CudaRuntime> {
    cubecl::cuda::CudaRuntime::client(&cubecl::cuda::CudaDevice { index: 0 })
}

/// The results of a call on memory that held `before`; `in_place` are the operands that they lie on.
#[track_caller]
pub fn call_all(work: &Work, args: &[Tensor], before: &[Tensor], in_place: &[Option<usize>]) -> Vec<Vec<u8>> {
    let laid = Laid::new(work, args, before, in_place);
    match device() {
        Device::Vulkan => call_on(&WgpuRuntime::client(&WgpuDevice::DefaultDevice), &laid),
        #[cfg(feature = "cuda")]
        Device::Cuda => call_on(&cuda(), &laid),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda => unreachable!("`open_cuda` opens nothing"),
    }
}

#[track_caller]
fn call_on<R: Runtime>(client: &ComputeClient<R>, laid: &Laid<'_>) -> Vec<Vec<u8>> {
    let memory = client.create_from_slice(laid.bytes());
    laid.launch(client, &memory);
    guard::sync(client).unwrap();
    let read = |bytes: std::ops::Range<u64>| match (bytes.end - bytes.start) as usize {
        0 => Vec::new(),
        n => client.read_one(laid.part(&memory, bytes)).unwrap()[..n].to_vec(),
    };
    laid.results().map(read).collect()
}

/// Whether narrow floats are multiplied by matrix units.
pub fn has_matrix_units() -> bool {
    device() == Device::Cuda
}

/// Roundings of a product and its addition to a sum, in units of f32. Matrix units cut off what lies behind the last bit
/// of the largest addend, which is twice as much as rounding.
pub fn product_roundings() -> f64 {
    if has_matrix_units() { 2.0 } else { 1.0 }
}
