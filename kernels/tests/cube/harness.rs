//! Runs kernel calls on a device, in an arena as a backend does; otherwise the harness of the CPU.
//!
//! The device is the first one that Vulkan or Metal has, or with `LTXC_TEST_DEVICE=cuda:N` one of CUDA.

use std::ops::Range;
use std::sync::OnceLock;

use cubecl::prelude::*;
use cubecl::wgpu::{AutoGraphicsApi, RuntimeOptions, WgpuDevice, WgpuRuntime, WgpuSetup, init_setup};
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::Work;
use ltxc_kernels::cube::guard;

mod laid;
mod runs;

#[path = "../simple/harness.rs"]
#[allow(dead_code)] // what runs on the CPU
mod shared;

use laid::{Choose, Laid};
pub use runs::{DIVISION_ROUNDINGS, SUM_ROUNDING, accuracy, power_roundings, run, run_onto, run_work};
pub use shared::{Random, close, equal, in_dtype, reference, unit};

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

/// The device that is asked for.
fn device() -> String {
    std::env::var("LTXC_TEST_DEVICE").unwrap_or_else(|_| "vulkan".into())
}

/// The results of a call on memory that held `before`; `in_place` are the operands that they lie on.
#[track_caller]
pub fn call_all(work: &Work, args: &[Tensor], before: &[Tensor], in_place: &[Option<usize>]) -> Vec<Vec<u8>> {
    call_chosen(work, args, before, in_place, &|schedule| schedule)
}

/// [`call_all`], scheduled as `choose` says.
#[track_caller]
pub fn call_chosen(
    work: &Work,
    args: &[Tensor],
    before: &[Tensor],
    in_place: &[Option<usize>],
    choose: Choose<'_>,
) -> Vec<Vec<u8>> {
    let laid = Laid::new(work, args, before, in_place, choose);
    let name = device();
    #[cfg(feature = "cuda")]
    if let Some(index) = name.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
        use cubecl::cuda::{CudaDevice, CudaRuntime};
        // Who asks for CUDA has it: there is nothing to skip.
        return call_on(&CudaRuntime::client(&CudaDevice { index }), &laid);
    }
    assert!(
        name.starts_with("vulkan") || name == "metal",
        "LTXC_TEST_DEVICE: no device `{name}`, but vulkan or cuda:N"
    );
    call_on(&wgpu_client(), &laid)
}

#[track_caller]
fn call_on<R: Runtime>(client: &ComputeClient<R>, laid: &Laid<'_>) -> Vec<Vec<u8>> {
    let memory = client.create_from_slice(laid.bytes());
    laid.launch(client, &memory);
    guard::sync(client).unwrap();
    let read = |bytes: Range<u64>| match (bytes.end - bytes.start) as usize {
        0 => Vec::new(),
        n => client.read_one(laid.part(&memory, bytes)).unwrap()[..n].to_vec(),
    };
    laid.results().map(read).collect()
}

/// Whether narrow floats are multiplied by matrix units.
pub fn has_matrix_units() -> bool {
    device().starts_with("cuda")
}

/// Roundings of a product and its addition to a sum, in units of f32. Matrix units cut off what lies behind the last bit
/// of the largest addend, which is twice as much as rounding.
pub fn product_roundings() -> f64 {
    if has_matrix_units() { 2.0 } else { 1.0 }
}
