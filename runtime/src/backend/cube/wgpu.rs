//! Vulkan and Metal devices, through wgpu.

use std::sync::{Mutex, PoisonError};

use ::wgpu::{Adapter, Backends, DeviceType, Features, Instance, InstanceDescriptor};
use cubecl::Runtime;
use cubecl::future::block_on;
use cubecl::wgpu::{RuntimeOptions, WgpuDevice, WgpuRuntime, init_setup};
use ltxc_ir::plan::Target;
use ltxc_kernels::cube::guard;

use super::Cube;
use crate::backend::{Backend, Device, DeviceKind, DeviceName};
use crate::error::RunError;
use crate::memory::{available, readable};

/// The interface of this system.
pub(crate) const API: &str = if cfg!(target_os = "macos") { "metal" } else { "vulkan" };

#[cfg(target_os = "macos")]
type Api = cubecl::wgpu::Metal;
#[cfg(not(target_os = "macos"))]
type Api = cubecl::wgpu::Vulkan;

/// A device with what is needed to open it.
struct Candidate {
    device: Device,
    /// How CubeCL names it.
    id: WgpuDevice,
    alignment: u64,
}

/// Devices in the order of their numbers: GPUs, then integrated ones, then software.
pub(crate) fn find() -> Result<Vec<Device>, String> {
    Ok(candidates().into_iter().map(|c| c.device).collect())
}

/// Opens a device.
pub(crate) fn open<'a>(device: &Device) -> Result<Box<dyn Backend<'a> + 'a>, RunError> {
    static OPENED: Mutex<Vec<WgpuDevice>> = Mutex::new(Vec::new());
    let problem = |problem: &str| RunError::Device { device: device.name.clone(), problem: problem.into() };
    let found = candidates().into_iter().find(|c| c.device.name == device.name);
    let found = found.ok_or_else(|| problem("it is not there any more"))?;
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if !opened.contains(&found.id) {
        // CubeCL panics where the driver refuses.
        let setup = std::panic::catch_unwind(|| init_setup::<Api>(&found.id, RuntimeOptions::default()));
        guard::watch_wgpu(&setup.map_err(|_| problem("the driver does not open it"))?);
        opened.push(found.id.clone());
    }
    let client = WgpuRuntime::client(&found.id);
    let memory_bytes = found.device.memory_bytes;
    let is_shared = found.device.kind != DeviceKind::Gpu || cfg!(target_os = "macos");
    // How much of a GPU's own memory others hold is not known here.
    let left = Box::new(move || if is_shared { memory_bytes.min(available()) } else { memory_bytes });
    Ok(Box::new(Cube::new(found.device, found.alignment, left, client)))
}

fn candidates() -> Vec<Candidate> {
    let backends = if cfg!(target_os = "macos") { Backends::METAL } else { Backends::VULKAN };
    let instance = Instance::new(InstanceDescriptor { backends, ..InstanceDescriptor::new_without_display_handle() });
    let adapters = block_on(instance.enumerate_adapters(backends));
    let mut candidates = Vec::with_capacity(adapters.len());
    // CubeCL counts the adapters of each type.
    let (mut discrete, mut integrated, mut virtual_) = (0, 0, 0);
    let next = |counter: &mut usize| {
        *counter += 1;
        *counter - 1
    };
    for adapter in &adapters {
        let (kind, id) = match adapter.get_info().device_type {
            DeviceType::DiscreteGpu => (DeviceKind::Gpu, WgpuDevice::DiscreteGpu(next(&mut discrete))),
            DeviceType::VirtualGpu => (DeviceKind::Gpu, WgpuDevice::VirtualGpu(next(&mut virtual_))),
            DeviceType::IntegratedGpu => {
                let kind = if cfg!(target_os = "macos") { DeviceKind::Gpu } else { DeviceKind::Integrated };
                (kind, WgpuDevice::IntegratedGpu(next(&mut integrated)))
            }
            DeviceType::Cpu => (DeviceKind::Software, WgpuDevice::Cpu),
            // CubeCL cannot name it.
            DeviceType::Other => continue,
        };
        candidates.push(candidate(adapter, kind, id));
    }
    candidates.sort_by_key(|c| c.device.kind as u8);
    for (number, candidate) in candidates.iter_mut().enumerate() {
        candidate.device.name = match API {
            "metal" => DeviceName::Metal,
            _ => DeviceName::Vulkan(Some(number)),
        };
    }
    candidates
}

fn candidate(adapter: &Adapter, kind: DeviceKind, id: WgpuDevice) -> Candidate {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let whole = |bytes: u64| bytes / Target::DEVICE_ALIGNMENT * Target::DEVICE_ALIGNMENT;
    let target = Target {
        max_arena_bytes: whole(limits.max_buffer_size),
        max_tensor_bytes: whole(limits.max_storage_buffer_binding_size),
        // CubeCL takes one for shapes.
        max_bindings: limits.max_storage_buffers_per_shader_stage.saturating_sub(1),
        ..Target::wgpu()
    };
    let alignment = limits.min_storage_buffer_offset_alignment.max(limits.min_uniform_buffer_offset_alignment) as u64;
    let features = adapter.features();
    let supported = [(Features::SHADER_F16, "f16"), (Features::SUBGROUP, "subgroups")];
    let mut words: Vec<String> =
        supported.iter().filter(|(f, _)| features.contains(*f)).map(|(_, word)| word.to_string()).collect();
    words.push(format!("tensors up to {}", readable(target.max_tensor_bytes)));
    let description = match info.driver_info.as_str() {
        "" => info.name,
        driver => format!("{} ({driver})", info.name),
    };
    let memory_bytes = own_memory(adapter).filter(|_| kind == DeviceKind::Gpu).unwrap_or_else(available);
    // The number follows when all are known.
    let device = Device { name: DeviceName::Metal, description, kind, memory_bytes, features: words, target };
    Candidate { device, id, alignment }
}

/// Bytes of the largest heap of the device's own memory.
#[cfg(not(target_os = "macos"))]
fn own_memory(adapter: &Adapter) -> Option<u64> {
    // The first flag of a heap, VK_MEMORY_HEAP_DEVICE_LOCAL_BIT.
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the adapter is only asked, and lives longer than what is asked of it.
    let properties = unsafe {
        let adapter = adapter.as_hal::<::wgpu::hal::vulkan::Api>()?;
        adapter.shared_instance().raw_instance().get_physical_device_memory_properties(adapter.raw_physical_device())
    };
    let heaps = properties.memory_heaps.iter().take(properties.memory_heap_count as usize);
    heaps.filter(|h| h.flags.as_raw() & DEVICE_LOCAL != 0).map(|h| h.size).max()
}

/// Apple devices share the memory of the machine.
#[cfg(target_os = "macos")]
fn own_memory(_: &Adapter) -> Option<u64> {
    None
}
