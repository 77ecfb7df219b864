//! What runs plans: memory of a device and kernel calls on it.
//!
//! A [`Backend`] knows nothing of programs, frames or files. `Binding` follows the functions of a plan and binds every
//! kernel call to memory once, when a program is loaded; running it is then a loop over [`Backend::launch`]. Memory is
//! named by numbers ([`BufferId`]), so that a call looks the same on every device.
//!
//! | file | what |
//! | --- | --- |
//! | `binding` | from the functions of a plan to bound calls |
//! | `cpu` | this machine's processor |
//! | `limits` | whether a plan fits a device |
//! | `devices` | which devices there are |
//! | `steps` | kernel calls as a GPU takes them: operands at aligned offsets |
//! | `submission` | how much work a GPU is given at once |
//! | `cube` | GPUs, through CubeCL |
//!
//! Every program runs on the device, those of rate *generation* and *evaluation* too: besides RoPE tables and timestep
//! sinusoids they have text keys and modulation, which read gigabytes of weights. Sines of large angles are exact everywhere
//! because the kernels of all backends take off whole turns themselves.

mod binding;
mod cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod cube;
mod devices;
#[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(dead_code))] // the CPU holds every plan
mod limits;
#[cfg(any(feature = "wgpu", feature = "cuda", test))]
mod steps;
#[cfg(any(feature = "wgpu", feature = "cuda", test))]
mod submission;

use std::borrow::Cow;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{KernelDevice, Kernels, Plan, Work};

pub use cpu::Cpu;
pub use devices::{Device, DeviceKind, DeviceName, Found, Missing, find, open, open_with};
pub use limits::missing_units;

pub(crate) use binding::{Binding, Frame, callee_frame};
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) use cube::gpu_scratch;

use crate::error::RunError;
use crate::memory::Memory;

/// Memory of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub(crate) u32);

/// A kernel call that is bound to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(pub(crate) u32);

/// A place in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The buffer.
    pub buffer: BufferId,
    /// Bytes from its start.
    pub offset: u64,
}

impl Region {
    /// The place `bytes` further on.
    pub fn at(self, bytes: u64) -> Region {
        // Offsets come from plans; a sum that is too large is refused where the region is bound.
        Region { offset: self.offset.saturating_add(bytes), ..self }
    }
}

/// A kernel call and where its operands lie. Only `Binding` makes them, from plans that were verified: types fit the
/// work, and results overlap operands only where the work allows it.
pub struct Call<'a> {
    pub(crate) work: &'a Work,
    pub(crate) args: Vec<(&'a TensorType, Region)>,
    pub(crate) results: Vec<(&'a TensorType, Region)>,
    /// Floating point operations, as the plan counts them.
    pub(crate) flops: u64,
    /// Bytes read and written.
    pub(crate) bytes: u64,
}

/// Bytes of a weight.
pub enum Weight<'a> {
    /// In a mapped file; kernels read it in units of so many bytes.
    Mapped(&'a [u8], usize),
    /// Made when it was bound.
    Made(Memory),
}

impl Weight<'_> {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Weight::Mapped(bytes, _) => bytes,
            Weight::Made(memory) => memory.bytes(),
        }
    }
}

/// A device with memory and kernels. One thread drives it.
///
/// Launches may return before they are done; they run in the order in which they were made, and what they fail with is
/// reported at the next [`Backend::read`] or [`Backend::synchronize`] at the latest.
pub trait Backend<'a> {
    /// What this is.
    fn device(&self) -> &Device;

    /// Refuses a plan that was compiled for another kind of device, or that does not fit; before it is run.
    ///
    /// # Errors
    /// [`RunError::Target`] or [`RunError::Memory`].
    fn check(&mut self, plan: &Plan) -> Result<(), RunError>;

    /// Memory that is aligned for every tensor, with anything in it.
    ///
    /// # Errors
    /// If there is not enough.
    fn allocate(&mut self, bytes: u64) -> Result<BufferId, RunError>;

    /// Memory with the bytes of a weight: these themselves where kernels can read them in place.
    ///
    /// # Errors
    /// If there is not enough.
    fn weight(&mut self, weight: Weight<'a>) -> Result<BufferId, RunError>;

    /// Writes bytes at a place that is aligned as the target says.
    ///
    /// # Errors
    /// If they do not fit.
    fn write(&mut self, to: Region, bytes: &[u8]) -> Result<(), RunError>;

    /// Waits for all launches and returns bytes: in place where the memory is the host's.
    ///
    /// # Errors
    /// What the launches failed with.
    fn read(&self, from: Region, bytes: u64) -> Result<Cow<'_, [u8]>, RunError>;

    /// Whether all values of a tensor are finite, where the device can tell that without handing them over; `None` where
    /// reading is as cheap. `false` may also mean that their sum is not.
    ///
    /// # Errors
    /// What the launches failed with.
    fn is_finite(&self, _from: Region, _ty: &TensorType) -> Result<Option<bool>, RunError> {
        Ok(None)
    }

    /// Binds a call to memory, and reserves the scratch that it needs.
    ///
    /// # Errors
    /// A call that the device cannot run, or not enough memory.
    fn bind(&mut self, call: Call<'a>) -> Result<CallId, RunError>;

    /// Runs a bound call.
    ///
    /// # Errors
    /// What the device refuses at once.
    fn launch(&mut self, call: CallId) -> Result<(), RunError>;

    /// Waits for all launches.
    ///
    /// # Errors
    /// What they failed with.
    fn synchronize(&self) -> Result<(), RunError>;

    /// Forgets all calls and buffers and gives their memory back; their numbers mean nothing afterwards.
    fn clear(&mut self);

    /// The kernels that were launched so far. Devices whose kernels are part of this program have none to count.
    fn kernels(&self) -> KernelCounts {
        KernelCounts::default()
    }

    /// From now on what would compile a kernel fails.
    fn freeze(&mut self) {}

    /// What a plan can carry of the kernels of its calls, each of which runs on memory with anything in it; `None` where
    /// kernels are part of this program. If `measures`, calls that can be cut into several tiles run with each of them, and
    /// the fastest is kept. `done` sees how many of how many calls have run.
    ///
    /// # Errors
    /// A plan that the device cannot run, what the launches failed with, and what `done` returns.
    fn tune(
        &mut self,
        _plan: &'a Plan,
        _measures: bool,
        _done: &mut Progress<'_>,
    ) -> Result<Option<Kernels>, RunError> {
        Ok(None)
    }

    /// What the kernels that a plan carries must be for; `None` where kernels are part of this program.
    fn kernel_device(&self) -> Option<KernelDevice> {
        None
    }
}

/// Sees how many of how many calls have run.
pub type Progress<'p> = dyn FnMut(usize, usize) -> Result<(), RunError> + 'p;

/// How many kernels a device was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelCounts {
    /// Different kernels that were launched.
    pub launched: usize,
    /// Those of them that had to be compiled; the plan carried the others.
    pub compiled: usize,
}

/// A place that is not in its buffer: plans are verified, so this is a bug.
pub(crate) fn outside(region: Region, bytes: u64, held: u64) -> RunError {
    RunError::Internal(format!("{bytes} bytes at {} of buffer {} of {held} bytes", region.offset, region.buffer.0))
}
