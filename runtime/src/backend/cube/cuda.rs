//! NVIDIA devices, through CUDA. Driver, compiler and headers are looked for before CubeCL opens anything, because it
//! panics where one is missing.

use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{result, sys};
use ltxc_ir::plan::Target;

use super::Cube;
use crate::backend::{Backend, Device, DeviceKind, DeviceName};
use crate::error::RunError;

/// Widest load of a kernel: operands start at its multiples.
const LOAD_BYTES: u64 = 16;

/// The devices, or what is missing to use them.
pub(crate) fn find() -> Result<Vec<Device>, String> {
    // SAFETY: only looks whether the library can be loaded.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver (libcuda)".into());
    }
    result::init().map_err(|e| format!("the driver does not start: {e:?}"))?;
    let count = result::device::get_count().map_err(|e| format!("{e:?}"))?;
    if count == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: as above.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(
            "the CUDA compiler library (libnvrtc) was not found; install it or add it to LD_LIBRARY_PATH".into()
        );
    }
    if cubecl::cuda::install::cuda_path().is_none() {
        return Err("the CUDA headers were not found; set CUDA_PATH to the folder that has `include`".into());
    }
    (0..count).map(|index| describe(index).map_err(|e| format!("device {index}: {e:?}"))).collect()
}

fn describe(index: i32) -> Result<Device, result::DriverError> {
    let device = result::device::get(index)?;
    // SAFETY: the driver gave the device.
    let attribute = |attribute: Attribute| unsafe { result::device::get_attribute(device, attribute) };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let mut features = vec![format!("sm_{major}{minor}"), "f16".into()];
    if major >= 8 {
        features.push("bf16".into());
    }
    if major >= 7 {
        features.push("tensor cores".into());
    }
    Ok(Device {
        name: DeviceName::Cuda(Some(index as usize)),
        description: result::device::get_name(device)?,
        kind: DeviceKind::Gpu,
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device)? } as u64,
        features,
        target: Target::cuda(),
    })
}

/// Opens a device of [`find`].
pub(crate) fn open<'a>(device: &Device) -> Result<Box<dyn Backend<'a> + 'a>, RunError> {
    let DeviceName::Cuda(Some(index)) = device.name else {
        return Err(RunError::Internal(format!("`{}` is no CUDA device", device.name)));
    };
    let problem = |problem: String| RunError::Device { device: device.name.clone(), problem };
    // CubeCL panics where the driver refuses.
    let client = std::panic::catch_unwind(|| CudaRuntime::client(&CudaDevice { index }));
    let client = client.map_err(|_| problem("the driver does not open it".into()))?;
    let total = device.memory_bytes;
    let left = Box::new(move || free_memory(index).unwrap_or(total));
    Ok(Box::new(Cube::new(device.clone(), LOAD_BYTES, left, client)))
}

/// Bytes that nobody holds.
fn free_memory(index: usize) -> Option<u64> {
    let device = result::device::get(i32::try_from(index).ok()?).ok()?;
    // SAFETY: the driver gave the device; its primary context is the one that CubeCL holds, and is released again.
    unsafe {
        let context = result::primary_ctx::retain(device).ok()?;
        let free = result::ctx::set_current(context).and_then(|()| result::mem_get_info());
        let released = result::primary_ctx::release(device);
        released.ok()?;
        free.ok().map(|(free, _)| free as u64)
    }
}
