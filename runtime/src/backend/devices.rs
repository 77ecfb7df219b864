//! Which devices there are, what they are called, and which one is meant.

use std::fmt;
use std::str::FromStr;

use ltxc_ir::plan::{Kernels, Plan, Target};

use super::{Backend, Cpu};
use crate::error::RunError;
use crate::memory::available;

/// A device as users name it: `cpu`, `cuda:0`, `vulkan:0`, `metal`. Without a number the first one is meant, and any one
/// where a plan is compiled.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are the devices
pub enum DeviceName {
    Cpu,
    Cuda(Option<usize>),
    Vulkan(Option<usize>),
    Metal,
}

impl DeviceName {
    /// The backend that plans for it name.
    pub fn backend(&self) -> &'static str {
        match self {
            DeviceName::Cpu => "cpu",
            DeviceName::Cuda(_) => "cuda",
            DeviceName::Vulkan(_) | DeviceName::Metal => "wgpu",
        }
    }

    /// Target of plans for any device of this kind, for machines that are not this one.
    pub fn target(&self) -> Target {
        match self {
            DeviceName::Cpu => Target::cpu(),
            DeviceName::Cuda(_) => Target::cuda(),
            DeviceName::Vulkan(_) => Target::wgpu(),
            DeviceName::Metal => Target::metal(),
        }
    }

    /// Whether a device called `found` is meant.
    fn means(&self, found: &DeviceName) -> bool {
        match (self, found) {
            (DeviceName::Cuda(None), DeviceName::Cuda(_)) | (DeviceName::Vulkan(None), DeviceName::Vulkan(_)) => true,
            _ => self == found,
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, number) = match self {
            DeviceName::Cpu => ("cpu", &None),
            DeviceName::Cuda(number) => ("cuda", number),
            DeviceName::Vulkan(number) => ("vulkan", number),
            DeviceName::Metal => ("metal", &None),
        };
        match number {
            Some(number) => write!(f, "{name}:{number}"),
            None => f.write_str(name),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceName, String> {
        let wrong = || format!("`{text}` is no device; devices are cpu, cuda:0, vulkan:0 and metal");
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number.parse().map_err(|_| wrong())?)),
            None => (text, None),
        };
        match (name, number) {
            ("cpu", None | Some(0)) => Ok(DeviceName::Cpu),
            ("cuda", number) => Ok(DeviceName::Cuda(number)),
            ("vulkan", number) => Ok(DeviceName::Vulkan(number)),
            ("metal", None | Some(0)) => Ok(DeviceName::Metal),
            _ => Err(wrong()),
        }
    }
}

/// What a device is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The processor, with the native backend.
    Cpu,
    /// A GPU with memory of its own, or one that shares all memory by design (Apple).
    Gpu,
    /// A GPU that borrows the processor's memory.
    Integrated,
    /// A program that plays GPU on the processor.
    Software,
}

/// A device of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name, with its number.
    pub name: DeviceName,
    /// What its driver calls it.
    pub description: String,
    /// What it is made of.
    pub kind: DeviceKind,
    /// Bytes of memory it has, `u64::MAX` if that is not known.
    pub memory_bytes: u64,
    /// What it supports, in words.
    pub features: Vec<String>,
    /// What plans for it are compiled for.
    pub target: Target,
    /// Why it cannot be used, if it cannot: a driver that is too old.
    pub problem: Option<String>,
}

impl Device {
    /// The processor.
    pub(crate) fn cpu() -> Device {
        Device {
            name: DeviceName::Cpu,
            description: format!("{} threads", rayon::current_num_threads()),
            kind: DeviceKind::Cpu,
            memory_bytes: available(),
            features: vec!["every dtype".into()],
            target: Target::cpu(),
            problem: None,
        }
    }
}

/// The devices of this machine.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Its devices, the processor last.
    pub devices: Vec<Device>,
    /// Kinds of which there are none.
    pub missing: Vec<Missing>,
}

/// A kind of device that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// How devices of the kind are called.
    pub kind: String,
    /// Why there is none.
    pub why: String,
    /// Whether something is installed for it that cannot be used as it is.
    pub is_broken: bool,
}

impl Missing {
    /// Nothing is installed for `kind`.
    pub(crate) fn absent(kind: &str, why: &str) -> Missing {
        Missing { kind: kind.into(), why: why.into(), is_broken: false }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.why)
    }
}

/// Looks for devices: all of them, or those of one backend and the processor. Nothing is opened, and nothing that is not
/// installed is an error, but drivers are loaded, which takes time.
pub fn find(backend: Option<&str>) -> Found {
    let mut found = Found::default();
    let is_wanted = |name: &str| backend.is_none_or(|b| b == name);
    if is_wanted("cuda") {
        #[cfg(feature = "cuda")]
        found.add("cuda", super::cube::cuda::find());
        #[cfg(not(feature = "cuda"))]
        found.missing.push(Missing::absent("cuda", "this program was built without it"));
    }
    if is_wanted("wgpu") {
        #[cfg(feature = "wgpu")]
        found.add(super::cube::wgpu::API, Ok(super::cube::wgpu::find()));
        #[cfg(not(feature = "wgpu"))]
        found.missing.push(Missing::absent("vulkan, metal", "this program was built without them"));
    }
    found.devices.push(Device::cpu());
    found
}

impl Found {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    fn add(&mut self, kind: &str, devices: Result<Vec<Device>, Missing>) {
        match devices {
            Ok(devices) if !devices.is_empty() => self.devices.extend(devices),
            Ok(_) => self.missing.push(Missing::absent(kind, "no device found")),
            Err(missing) => self.missing.push(missing),
        }
    }

    /// The device called `name`.
    ///
    /// # Errors
    /// If there is none, or it cannot be used.
    pub fn named(&self, name: &DeviceName) -> Result<&Device, RunError> {
        let device = self.devices.iter().find(|d| name.means(&d.name)).ok_or_else(|| {
            let there: Vec<String> = self.devices.iter().map(|d| format!("`{}`", d.name)).collect();
            let why = self.missing.first().map(|m| format!(" ({m})"));
            let (why, there) = (why.unwrap_or_default(), there.join(", "));
            RunError::Input(format!("there is no device `{name}` on this machine{why}; there is {there}"))
        })?;
        match &device.problem {
            None => Ok(device),
            Some(problem) => Err(RunError::Device { device: device.name.clone(), problem: problem.clone() }),
        }
    }

    /// The device to use when none is named, for a new plan or for `plan`: CUDA, then other GPUs, then the processor.
    /// Software is used only when it is named, and so are integrated GPUs, which a processor often beats.
    ///
    /// # Errors
    /// If no device runs the plan.
    pub fn best(&self, plan: Option<&Plan>) -> Result<&Device, RunError> {
        let is_fast = |d: &&Device| matches!(d.kind, DeviceKind::Gpu | DeviceKind::Cpu) && d.problem.is_none();
        match plan {
            None => self.devices.iter().find(is_fast).ok_or_else(|| RunError::Internal("there is no processor".into())),
            Some(plan) => {
                let fits = |d: &&Device| is_fast(d) && d.name.backend() == plan.target.backend;
                self.devices.iter().find(fits).ok_or_else(|| RunError::NoDevice {
                    plan: plan.target.backend.clone(),
                    named: self
                        .devices
                        .iter()
                        .find(|d| d.name.backend() == plan.target.backend && d.problem.is_none())
                        .map(|d| d.name.clone()),
                    why: self.reasons(|_| true, |d| d.name.backend() == plan.target.backend),
                })
            }
        }
    }

    /// What [`Found::best`] would have taken instead of `chosen` if it could be used, and why it cannot.
    pub fn passed_over(&self, chosen: &Device) -> Vec<String> {
        let place = |name: &DeviceName| self.devices.iter().position(|d| d.name == *name);
        self.reasons(|m| m.is_broken, |d| d.kind == DeviceKind::Gpu && place(&d.name) < place(&chosen.name))
    }

    /// What is wrong with kinds of devices and with single ones.
    fn reasons(&self, kinds: impl Fn(&Missing) -> bool, devices: impl Fn(&Device) -> bool) -> Vec<String> {
        let kinds = self.missing.iter().filter(|m| kinds(m)).map(Missing::to_string);
        let devices = self.devices.iter().filter(|d| devices(d));
        kinds.chain(devices.filter_map(|d| Some(format!("{}: {}", d.name, d.problem.as_ref()?)))).collect()
    }
}

/// Opens a device of [`find`].
///
/// # Errors
/// If its driver refuses.
pub fn open<'a>(device: &Device) -> Result<Box<dyn Backend<'a> + 'a>, RunError> {
    open_with(device, None)
}

/// Opens a device of [`find`], which uses the kernels that a plan carries where they are for it. That is compiled code: as
/// trustworthy as whoever made the plan. A process that has opened the device before goes on with what it had then.
///
/// # Errors
/// If its driver refuses.
pub fn open_with<'a>(device: &Device, kernels: Option<&Kernels>) -> Result<Box<dyn Backend<'a> + 'a>, RunError> {
    match &device.name {
        DeviceName::Cpu => Ok(Box::new(Cpu::default())),
        #[cfg(feature = "cuda")]
        DeviceName::Cuda(_) => super::cube::cuda::open(device, kernels),
        #[cfg(feature = "wgpu")]
        DeviceName::Vulkan(_) | DeviceName::Metal => super::cube::wgpu::open(device, kernels),
        #[cfg(not(all(feature = "cuda", feature = "wgpu")))]
        name => {
            let _ = kernels;
            Err(RunError::Input(format!("this program was built without support for `{name}`")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, kind: DeviceKind) -> Device {
        let name: DeviceName = name.parse().unwrap();
        let target = name.target();
        Device { name, description: String::new(), kind, memory_bytes: 1, features: vec![], target, problem: None }
    }

    fn machine() -> Found {
        let devices = vec![
            device("cuda:0", DeviceKind::Gpu),
            device("vulkan:0", DeviceKind::Gpu),
            device("vulkan:1", DeviceKind::Software),
            Device::cpu(),
        ];
        Found { devices, missing: vec![Missing::absent("metal", "no device found")] }
    }

    fn plan(backend: &str) -> Plan {
        let target = Target { backend: backend.into(), ..Target::cpu() };
        Plan {
            compiler: String::new(),
            target,
            sources: vec![],
            functions: vec![],
            programs: vec![],
            groups: vec![],
            pipeline: Default::default(),
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["cpu", "cuda", "cuda:1", "vulkan", "vulkan:0", "metal"] {
            assert_eq!(name.parse::<DeviceName>().unwrap().to_string(), name);
        }
        for name in ["", "gpu", "cuda:", "cuda:x", "vulkan:-1", "metal:1", "cpu:2"] {
            assert!(name.parse::<DeviceName>().unwrap_err().contains("devices are"), "{name}");
        }
    }

    #[test]
    fn cuda_comes_first_and_software_only_by_name() {
        let mut found = machine();
        let best = |found: &Found, plan: Option<&Plan>| found.best(plan).map(|d| d.name.to_string());
        assert_eq!(best(&found, None).unwrap(), "cuda:0");
        assert_eq!(best(&found, Some(&plan("wgpu"))).unwrap(), "vulkan:0");
        assert_eq!(best(&found, Some(&plan("cpu"))).unwrap(), "cpu");
        found.devices.drain(..2);
        assert_eq!(best(&found, None).unwrap(), "cpu");
        let refused = best(&found, Some(&plan("wgpu"))).unwrap_err().to_string();
        assert!(refused.contains("`--device vulkan:1`"), "{refused}");
        let refused = best(&found, Some(&plan("cuda"))).unwrap_err().to_string();
        assert!(refused.contains("`cuda`") && refused.contains("ltxc doctor"), "{refused}");
    }

    #[test]
    fn what_cannot_be_used_is_passed_over_aloud() {
        let mut found = machine();
        let chosen = |found: &Found| {
            let best = found.best(None).unwrap();
            (best.name.to_string(), found.passed_over(best))
        };
        // What is slower, or not there at all, is not missed.
        found.devices[1].problem = Some("an old driver".into());
        assert_eq!(chosen(&found), ("cuda:0".into(), vec![]));
        found.devices[0].problem = Some("no compiler".into());
        let reasons = ["cuda:0: no compiler", "vulkan:0: an old driver"].map(String::from).to_vec();
        assert_eq!(chosen(&found), ("cpu".into(), reasons));
        let refused = found.named(&"cuda".parse().unwrap()).unwrap_err().to_string();
        assert!(refused.contains("`cuda:0`: no compiler") && refused.contains("ltxc doctor"), "{refused}");
        found.devices.remove(0);
        found.missing.push(Missing { kind: "cuda".into(), why: "an old driver".into(), is_broken: true });
        assert_eq!(chosen(&found).1, ["cuda: an old driver", "vulkan:0: an old driver"]);
        let refused = found.best(Some(&plan("cuda"))).unwrap_err().to_string();
        assert!(refused.contains("cuda: an old driver"), "{refused}");
    }

    #[test]
    fn a_device_that_is_not_there_is_one_sentence() {
        let found = machine();
        assert_eq!(found.named(&"vulkan".parse().unwrap()).unwrap().name, DeviceName::Vulkan(Some(0)));
        let refused = found.named(&DeviceName::Metal).unwrap_err().to_string();
        assert!(refused.contains("`metal`") && refused.contains("no device found") && refused.contains("`cuda:0`"));
    }
}
