//! Vulkan and Metal devices, through wgpu.

use std::sync::{Arc, Mutex, PoisonError};

use ::wgpu::{Adapter, Backends, DeviceType, Features, Instance, InstanceDescriptor, Limits};
use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use cubecl::server::ServerUtilities;
use cubecl::wgpu::{RuntimeOptions, WgpuDevice, WgpuRuntime, WgpuServer, init_setup};
use cubecl_runtime::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_runtime::logging::ServerLogger;
use ltxc_ir::plan::{KernelDevice, KernelForm, Kernels, PlanKernel, Target};
use ltxc_kernels::cube::guard;
use ltxc_kernels::cube::tracked::{self, LaunchedKernel, Tracked, TrackedServer};

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
    /// What it is, and the version of its driver.
    model: String,
    driver: String,
}

/// Devices in the order of their numbers: GPUs, then integrated ones, then software.
pub(crate) fn find() -> Vec<Device> {
    candidates().into_iter().map(|c| c.device).collect()
}

/// Opens a device, which takes the tiles that a plan carries if they were measured on it.
pub(crate) fn open<'a>(device: &Device, kernels: Option<&Kernels>) -> Result<Box<dyn Backend<'a> + 'a>, RunError> {
    static OPENED: Mutex<Vec<WgpuDevice>> = Mutex::new(Vec::new());
    let problem = |problem: &str| RunError::Device { device: device.name.clone(), problem: problem.into() };
    let found = candidates().into_iter().find(|c| c.device.name == device.name);
    let found = found.ok_or_else(|| problem("it is not there any more"))?;
    found.device.problem.as_ref().map_or(Ok(()), |shortcoming| Err(problem(shortcoming)))?;
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let client = match opened.contains(&found.id) {
        true => Tracked::<WgpuRuntime>::client(&found.id),
        false => {
            // CubeCL panics where the driver refuses.
            let started = guard::catch(|| start(&found.id));
            let refusal = || guard::check_poisoned().err().unwrap_or("the driver does not open it".into());
            let client = started.ok_or_else(|| super::failure(device.name.clone(), refusal()))?;
            client.info().log.describe(KernelDevice {
                backend: "wgpu".into(),
                architecture: found.model.clone(),
                driver: found.driver.clone(),
                generator: super::generator(),
            });
            opened.push(found.id.clone());
            client
        }
    };
    let memory_bytes = found.device.memory_bytes;
    let is_shared = found.device.kind != DeviceKind::Gpu || cfg!(target_os = "macos");
    // How much of a GPU's own memory others hold is not known here.
    let left = Box::new(move || if is_shared { memory_bytes.min(available()) } else { memory_bytes });
    let mut cube = Cube::new(found.device, found.alignment, left, client, Box::new(sources));
    cube.take_tuned(kernels);
    Ok(Box::new(cube))
}

/// The sources of kernels, for devices that take nothing else: CubeCL 0.10 gives wgpu text, and no way to give it more.
fn sources(launched: &[LaunchedKernel]) -> Vec<PlanKernel> {
    let kernels = launched.iter().filter(|kernel| !kernel.is_checked).map(|kernel| PlanKernel {
        hash: kernel.hash,
        name: kernel.name.clone(),
        cube_dim: kernel.cube_dim,
        form: KernelForm::Source(in_order(&kernel.source)),
    });
    kernels.collect()
}

/// A source with its variables in order: CubeCL declares them in another one every time, and the same kernels are to be
/// the same bytes.
fn in_order(source: &str) -> String {
    let is_declaration = |line: &&str| line.contains("l_mut_") && !line.contains('=') && line.ends_with(';');
    let mut lines: Vec<&str> = source.lines().collect();
    lines.chunk_by_mut(|a, b| is_declaration(a) && is_declaration(b)).for_each(<[&str]>::sort_unstable);
    lines.join("\n")
}

/// A client of a device that nobody has opened. CubeCL gives the servers that it makes to nobody, so the one that is
/// tracked is made anew, with what CubeCL's own knows of the device.
fn start(id: &WgpuDevice) -> ComputeClient<Tracked<WgpuRuntime>> {
    let setup = init_setup::<Api>(id, RuntimeOptions::default());
    guard::watch_wgpu(&setup);
    let known = WgpuRuntime::client(id);
    let properties = known.properties().clone();
    let options = tracked::compilation_options(&known).unwrap_or_default();
    let (memory, timing) = (properties.memory.clone(), properties.timing_method);
    let policy = ContiguousMemoryLayoutPolicy::new(memory.alignment as usize);
    let utilities = ServerUtilities::new(properties, Arc::new(ServerLogger::default()), setup.backend, policy);
    let RuntimeOptions { tasks_max, memory_config } = RuntimeOptions::default();
    let server = WgpuServer::new(
        memory,
        memory_config,
        options,
        setup.device,
        setup.queue,
        tasks_max,
        setup.backend,
        timing,
        utilities,
    );
    ComputeClient::init(id, TrackedServer::new(server))
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
        // Without MSL, the language of Metal, there is no way to name them.
        matrix_units: if cfg!(all(target_os = "macos", feature = "metal")) {
            Target::metal().matrix_units
        } else {
            Vec::new()
        },
        ..Target::wgpu()
    };
    let alignment = limits.min_storage_buffer_offset_alignment.max(limits.min_uniform_buffer_offset_alignment) as u64;
    let features = adapter.features();
    let supported = [(Features::SHADER_F16, "f16"), (Features::SUBGROUP, "subgroups")];
    let mut words: Vec<String> =
        supported.iter().filter(|(f, _)| features.contains(*f)).map(|(_, word)| word.to_string()).collect();
    words.push(format!("tensors up to {}", readable(target.max_tensor_bytes)));
    let (model, driver) = (info.name, info.driver_info);
    let description = match driver.as_str() {
        "" => model.clone(),
        driver => format!("{model} ({driver})"),
    };
    let memory_bytes = own_memory(adapter).filter(|_| kind == DeviceKind::Gpu).unwrap_or_else(available);
    // The number follows when all are known.
    let name = DeviceName::Metal;
    let problem = check_limits(&limits).err();
    let device = Device { name, description, kind, memory_bytes, features: words, target, problem };
    Candidate { device, id, alignment, model, driver }
}

/// Whether a driver allows what kernels ask for; those of the last years do.
fn check_limits(limits: &Limits) -> Result<(), String> {
    let needs = [
        ("buffers of a kernel", limits.max_storage_buffers_per_shader_stage, 30),
        ("units of a cube", limits.max_compute_invocations_per_workgroup, 256),
        ("bytes of shared memory", limits.max_compute_workgroup_storage_size, 32 << 10),
    ];
    match needs.iter().find(|(_, allowed, needed)| allowed < needed) {
        Some((what, allowed, needed)) => {
            Err(format!("its driver allows {allowed} {what}, kernels need {needed}; update the driver"))
        }
        None => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_in_order() {
        let sources = ["{\nvar l_mut_7: u32;\nvar l_mut_12: f32;\n", "{\nvar l_mut_12: f32;\nvar l_mut_7: u32;\n"];
        let rest = "l_mut_7 = a;\nl_mut_12 = b;\n}";
        let ordered = sources.map(|head| in_order(&format!("{head}{rest}")));
        assert_eq!(ordered[0], ordered[1]);
        assert!(ordered[0].starts_with("{\nvar ") && ordered[0].ends_with(rest));
    }

    #[test]
    fn drivers_that_allow_too_little_are_told() {
        let enough = Limits {
            max_storage_buffers_per_shader_stage: 30,
            max_compute_workgroup_storage_size: 32 << 10,
            ..Limits::default()
        };
        assert_eq!(check_limits(&enough), Ok(()));
        // What WebGPU promises is too little.
        let message = check_limits(&Limits::default()).unwrap_err();
        assert!(message.contains("allows 8 buffers") && message.contains("need 30; update the driver"), "{message}");
        let little = Limits { max_compute_workgroup_storage_size: 16 << 10, ..enough.clone() };
        assert!(check_limits(&little).unwrap_err().contains("16384 bytes of shared memory"));
        let small = Limits { max_compute_invocations_per_workgroup: 128, ..enough };
        assert!(check_limits(&small).unwrap_err().contains("128 units"));
    }
}
