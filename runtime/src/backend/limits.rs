//! Whether a plan fits a device: its kind, and sizes of single tensors and arenas. All of it is known before anything is
//! allocated, because plans say what they need. Memory as a whole is [`crate::memory::MemoryNeed`].

use ltxc_ir::plan::{KernelCall, MatrixUnit, Plan, Step, Work};

use super::Device;
use crate::error::RunError;
use crate::memory::readable;

/// Refuses a plan for another kind of device.
///
/// # Errors
/// [`RunError::Target`].
pub(crate) fn check_target(plan: &Plan, device: &Device) -> Result<(), RunError> {
    if plan.target.backend == device.name.backend() {
        return Ok(());
    }
    Err(RunError::Target { plan: plan.target.backend.clone(), device: device.name.clone() })
}

/// The matrix units that a plan was compiled for and a device lacks. Products that they would do run without, slower.
pub fn missing_units(plan: &Plan, device: &Device) -> Vec<MatrixUnit> {
    let is_missing = |unit: &&MatrixUnit| !device.target.matrix_units.contains(unit);
    plan.target.matrix_units.iter().filter(is_missing).copied().collect()
}

/// Refuses a plan with calls or buffers that the device cannot hold: it was compiled for a larger one.
///
/// # Errors
/// [`RunError::DeviceLimit`].
pub(crate) fn check_sizes(plan: &Plan, device: &Device) -> Result<(), RunError> {
    let limits = &device.target;
    let refused = |what: String| Err(RunError::DeviceLimit { device: device.name.clone(), what });
    if !plan.target.alignment.is_multiple_of(limits.alignment) {
        return refused(format!(
            "the plan aligns buffers to {} bytes, not {}",
            plan.target.alignment, limits.alignment
        ));
    }
    let arenas = plan.arena_bytes().into_iter().chain([plan.state_bytes()]);
    if let Some(bytes) = arenas.max().filter(|&bytes| bytes > limits.max_arena_bytes) {
        let (bytes, most) = (readable(bytes), readable(limits.max_arena_bytes));
        return refused(format!("the plan has an arena of {bytes}, the device allows {most}"));
    }
    for function in &plan.functions {
        for call in kernel_calls(&function.steps) {
            let (bound, most) = (call.args.len() + call.results.len(), limits.max_bindings);
            if bound > most as usize {
                let kernel = call.work.name();
                return refused(format!("`{kernel}` of `{}` binds {bound} tensors, not {most}", function.name));
            }
            let (bytes, most) = (largest_tensor(call), limits.max_tensor_bytes);
            if bytes > most {
                let (kernel, bytes, most) = (call.work.name(), readable(bytes), readable(most));
                return refused(format!("`{kernel}` of `{}` has a tensor of {bytes}, not {most}", function.name));
            }
        }
    }
    Ok(())
}

fn largest_tensor(call: &KernelCall) -> u64 {
    let inner = match &call.work {
        Work::Kernel(_) => &[][..],
        Work::Fused(fused) => &fused.parts,
    };
    let types = call.args.iter().chain(&call.results).map(|o| &o.ty).chain(inner.iter().map(|p| &p.result));
    types.map(|ty| ty.bytes() as u64).max().unwrap_or(0)
}

fn kernel_calls(steps: &[Step]) -> impl Iterator<Item = &KernelCall> {
    steps.iter().filter_map(|step| match step {
        Step::Kernel(call) => Some(call),
        Step::Call(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use ltxc_ir::plan::Target;

    use super::*;
    use crate::backend::{DeviceKind, DeviceName};

    fn plan() -> Plan {
        crate::test_plan::copies(Target::wgpu(), &[("main", 1024)])
    }

    fn device(target: Target) -> Device {
        let name = DeviceName::Vulkan(Some(1));
        let (description, kind) = (String::new(), DeviceKind::Gpu);
        Device { name, description, kind, memory_bytes: 0, features: vec![], target, problem: None }
    }

    #[track_caller]
    fn refused(target: Target, words: &[&str]) {
        let message = check_sizes(&plan(), &device(target)).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "`{word}` is not in: {message}"));
    }

    #[test]
    fn plans_for_other_backends_are_refused() {
        assert!(check_target(&plan(), &device(Target::wgpu())).is_ok());
        let message = check_target(&plan(), &Device::cpu()).unwrap_err().to_string();
        assert!(message.contains("`wgpu`") && message.contains("`--device cpu`"), "{message}");
    }

    #[test]
    fn units_that_a_device_lacks_are_known() {
        let mut plan = plan();
        assert_eq!(missing_units(&plan, &device(Target::metal())), []);
        plan.target = Target::metal();
        assert_eq!(missing_units(&plan, &device(Target::metal())), []);
        assert_eq!(missing_units(&plan, &device(Target::wgpu())), plan.target.matrix_units);
    }

    #[test]
    fn what_a_device_cannot_hold_is_named() {
        assert!(check_sizes(&plan(), &device(Target::wgpu())).is_ok());
        refused(Target { max_tensor_bytes: 255, ..Target::wgpu() }, &["`map` of `copy`", "256 B", "vulkan:1"]);
        refused(Target { max_bindings: 1, ..Target::wgpu() }, &["binds 2 tensors, not 1"]);
        refused(Target { max_arena_bytes: 2047, ..Target::wgpu() }, &["an arena of 2.0 kB"]);
        refused(Target { alignment: 1024, ..Target::wgpu() }, &["512 bytes, not 1024"]);
    }
}
