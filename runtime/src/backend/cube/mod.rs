//! GPUs, through CubeCL: one backend for its runtimes for Vulkan, Metal and CUDA.
//!
//! CubeCL's pools round sizes up and stop at a fraction of the device. What lives as long as a program is therefore
//! allocated as *persistent*, which is exact and as large as the driver allows; only uploads pass through the pools.
//!
//! Failures of a device come late, and some of them not at all by themselves: `ltxc_kernels::cube::guard` collects them, and
//! everything that hands results out asks it first.

#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod tune;
#[cfg(feature = "wgpu")]
pub(super) mod wgpu;

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use cubecl::client::ComputeClient;
use cubecl::server::Handle;
use ltxc_ir::ops::{Reduce, ReduceKind};
use ltxc_ir::plan::{
    Copy, Kernel, KernelCall, KernelDevice, Kernels, MatrixUnit, Operand, Plan, PlanKernel, Target, Work,
};
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::cube::tracked::{KernelLog, Known, LaunchedKernel, Tracked};
use ltxc_kernels::cube::{self, CubeTensor, Schedule, guard};

use super::steps::{At, Rules, Tensor, WorkStep, steps_of, types};
use super::submission::Submission;
use super::{
    Backend, BufferId, Call, CallId, Device, DeviceName, KernelCounts, Progress, Region, Weight, limits, outside,
};
use crate::error::RunError;
use crate::memory::MemoryNeed;
use crate::stats::decoded;

/// Uploads and downloads go in pieces of this size, so that staging memory stays small.
const STAGING_BYTES: usize = 16 << 20;

/// Values from which on a sum on the device is cheaper than a download.
const LEAST_SUMMED: usize = 1 << 10;

/// Most bytes of uploads on their way: staging memory is given back when the device has copied from it.
const MOST_STAGED_BYTES: u64 = 64 << 20;

/// Scratch of a call on a GPU that binds tensors at multiples of `alignment`.
pub(crate) fn gpu_scratch(call: &KernelCall, alignment: u64) -> u64 {
    // Buffers start at multiples of everything.
    let place = |operand: &Operand| Region { buffer: BufferId(0), offset: operand.offset };
    let args = call.args.iter().map(|a| (&a.ty, place(a))).collect();
    let results = call.results.iter().map(|r| (&r.ty, place(r))).collect();
    let call = Call { work: &call.work, args, results, flops: call.flops, bytes: call.bytes };
    let scratch_bytes = |work: &Cow<'_, Work>, args: &[&TensorType], results: &[&TensorType]| {
        // What cannot be scheduled is refused when it is bound.
        Schedule::new(work, args, results).map_or(0, |schedule| schedule.workspace_bytes() as u64)
    };
    steps_of(&call, &Rules { alignment, scratch_bytes: &scratch_bytes }).1
}

/// What a plan can carry of kernels that were launched.
type Carry = Box<dyn Fn(&[LaunchedKernel]) -> Vec<PlanKernel>>;

/// What printed the sources of kernels. Kernels are this program's, and their words are CubeCL's.
fn generator() -> String {
    format!("ltxc {} with CubeCL 0.10.0", env!("CARGO_PKG_VERSION"))
}

/// A failure in the words of CubeCL or a driver, as an error with a way out.
fn failure(device: DeviceName, problem: String) -> RunError {
    let says = |words: &[&str]| {
        let problem = problem.to_lowercase();
        words.iter().any(|word| problem.contains(word))
    };
    if says(&[
        "out of memory",
        "out-of-memory",
        "outofmemory",
        "out_of_memory",
        "buffertoobig",
        "can't allocate buffer",
    ]) {
        return RunError::DeviceMemory { device };
    }
    if says(&["device is lost", "device lost", "devicelost", "error_device_lost", "launch_timeout"]) {
        return RunError::DeviceLost { device };
    }
    RunError::Device { device, problem: first_words(&problem) }
}

/// Characters of a failure that are told.
const MOST_WORDS: usize = 300;

/// How a failure begins, on one line and without what is said of every one: behind that come more of them, and the whole
/// source of a kernel.
fn first_words(problem: &str) -> String {
    let line = problem.replace("\\n", " ").split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.replace("called `Result::unwrap()` on an `Err` value: ", "");
    let line = line.replace(" Backtrace: No backtrace available", "").replace(" No backtrace available", "");
    match line.char_indices().nth(MOST_WORDS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// A device behind the CubeCL runtime `R`.
struct Cube<'a, R: Known> {
    device: Device,
    /// Tensors are bound at multiples of this many bytes.
    alignment: u64,
    available: Box<dyn Fn() -> u64>,
    client: ComputeClient<Tracked<R>>,
    log: Arc<KernelLog>,
    carry: Carry,
    /// Matrix units that the plan was compiled for: kernels use no others.
    units: Vec<MatrixUnit>,
    /// Tiles that were measured on this device, by the hashes of calls.
    tiles: BTreeMap<[u8; 32], u32>,
    buffers: Vec<Buffer>,
    calls: Vec<Bound<'a>>,
    /// Of the works of the plan, by their addresses: a block that is called many times is scheduled once.
    schedules: RefCell<BTreeMap<*const Work, Rc<Schedule>>>,
    scratch: Option<Buffer>,
    submission: Submission,
    /// Bytes of uploads since the device was last waited for.
    staged: Cell<u64>,
}

#[derive(Clone)]
struct Buffer {
    handle: Handle,
    bytes: u64,
}

impl Buffer {
    /// Bytes `start..start + bytes`, up to the end of the last word.
    fn part(&self, start: u64, bytes: u64) -> Result<Handle, String> {
        let end = start.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(4));
        match end.and_then(|end| self.bytes.checked_sub(end)) {
            Some(behind) => Ok(self.handle.clone().offset_start(start).offset_end(behind)),
            None => Err(format!("{bytes} bytes at {start} are not in a buffer of {}", self.bytes)),
        }
    }
}

/// A call with what it costs.
struct Bound<'a> {
    steps: Vec<Prepared<'a>>,
    flops: u64,
    bytes: u64,
}

/// A work with the memory it is bound to.
struct Prepared<'a> {
    schedule: Rc<Schedule>,
    args: Vec<(Cow<'a, TensorType>, Memory)>,
    results: Vec<(Cow<'a, TensorType>, Memory)>,
    /// Type and start of the work's own scratch.
    scratch: Option<(TensorType, u64)>,
}

enum Memory {
    Bound(Handle),
    /// Bytes from the start of scratch, which moves when it grows.
    Scratch(u64),
}

impl<'a, R: Known> Cube<'a, R> {
    fn new(
        device: Device,
        alignment: u64,
        available: Box<dyn Fn() -> u64>,
        client: ComputeClient<Tracked<R>>,
        carry: Carry,
    ) -> Cube<'a, R> {
        guard::install();
        let log = client.info().log.clone();
        Cube {
            device,
            alignment,
            available,
            client,
            log,
            carry,
            units: Vec::new(),
            tiles: BTreeMap::new(),
            buffers: Vec::new(),
            calls: Vec::new(),
            schedules: RefCell::default(),
            scratch: None,
            submission: Submission::default(),
            staged: Cell::new(0),
        }
    }

    /// What went wrong, in the words of CubeCL or a driver, as an error.
    fn problem(&self, problem: String) -> RunError {
        let device = self.device.name.clone();
        match self.log.take_refused() {
            kernel @ Some(_) => RunError::Frozen { device, kernel },
            None => failure(device, problem),
        }
    }

    /// Refuses a plan that cannot run here; otherwise kernels are chosen as it says from now on.
    fn accept(&mut self, plan: &Plan) -> Result<(), RunError> {
        limits::check_target(plan, &self.device)?;
        limits::check_sizes(plan, &self.device)?;
        self.units = plan.target.matrix_units.clone();
        Ok(())
    }

    /// The steps of a call, and the scratch that they need.
    fn steps(&self, call: &Call<'a>) -> (Vec<WorkStep<'a>>, u64) {
        let scratch_bytes = |work: &Cow<'a, Work>, args: &[&TensorType], results: &[&TensorType]| {
            // What cannot be scheduled is refused when it is prepared.
            self.schedule(work, args, results).map_or(0, |schedule| schedule.workspace_bytes() as u64)
        };
        steps_of(call, &Rules { alignment: self.alignment, scratch_bytes: &scratch_bytes })
    }

    #[allow(clippy::ptr_arg)] // borrowed works live as long as the plan, owned ones do not
    fn schedule(
        &self,
        work: &Cow<'a, Work>,
        args: &[&TensorType],
        results: &[&TensorType],
    ) -> Result<Rc<Schedule>, String> {
        // Works of the plan stay where they are as long as this lives; copies that steps add are made anew.
        let new = |work| -> Result<Rc<Schedule>, String> {
            let schedule = Schedule::new(work, args, results)?.with_units(&self.units);
            let tile = if self.tiles.is_empty() { None } else { self.tiles.get(&schedule.hash()).copied() };
            Ok(Rc::new(schedule.with_tile(tile)))
        };
        let Cow::Borrowed(work) = *work else { return new(work) };
        let key: *const Work = work;
        if let Some(known) = self.schedules.borrow().get(&key) {
            return Ok(known.clone());
        }
        let schedule = new(work)?;
        self.schedules.borrow_mut().insert(key, schedule.clone());
        Ok(schedule)
    }

    /// Memory of this size, rounded up so that the last word of the last tensor is inside.
    fn reserve(&self, bytes: u64) -> Result<Buffer, RunError> {
        let bytes = bytes.max(1).checked_next_multiple_of(Target::DEVICE_ALIGNMENT);
        let size = bytes.and_then(|bytes| usize::try_from(bytes).ok());
        let size = size.ok_or_else(|| self.problem("a buffer is larger than can be addressed".into()))?;
        let client = &self.client;
        let handle = client.memory_persistent_allocation(size, |size| client.empty(size));
        let handle = handle.map_err(|e| self.problem(format!("{e:?}")))?;
        Ok(Buffer { handle, bytes: size as u64 })
    }

    fn add(&mut self, buffer: Buffer) -> BufferId {
        self.buffers.push(buffer);
        // Buffers are fewer than steps of a plan, which are counted in 32 bits.
        BufferId(self.buffers.len() as u32 - 1)
    }

    /// Writes bytes through staging memory and a copy on the device: CubeCL 0.10 has no other way into existing memory.
    fn upload(&self, to: &Buffer, offset: u64, bytes: &[u8]) -> Result<(), String> {
        for (i, piece) in bytes.chunks(STAGING_BYTES).enumerate() {
            let start = offset + (i * STAGING_BYTES) as u64;
            // A piece that ends inside a word leaves the rest of the word alone.
            let (dtype, words) = match piece.len() % 4 {
                0 => (DType::U32, Cow::Borrowed(piece)),
                _ => (DType::U8, Cow::Owned([piece, &[0; 3]].concat())),
            };
            let held = words.len() / 4 * 4;
            let staged = Buffer { handle: self.client.create_from_slice(&words[..held]), bytes: held as u64 };
            let n = piece.len() / dtype.bytes();
            let ty = TensorType::new(dtype, [held / dtype.bytes()]);
            let all = Copy { shape: vec![n], src_offset: 0, src_strides: vec![1], dst_offset: 0, dst_strides: vec![1] };
            let tensor = |handle| CubeTensor { ty: &ty, handle };
            let (from, to) = (staged.part(0, held as u64)?, to.part(start, held as u64)?);
            cube::launch(&self.client, &Kernel::Copy(all), &[tensor(from)], &[tensor(to)], None)?;
            self.staged.set(self.staged.get() + held as u64);
            if self.staged.get() >= MOST_STAGED_BYTES {
                self.staged.set(0);
                guard::sync(&self.client)?;
            }
        }
        Ok(())
    }

    fn uploaded(&self, bytes: &[u8]) -> Result<Buffer, RunError> {
        let buffer = self.reserve(bytes.len() as u64)?;
        self.upload(&buffer, 0, bytes).map_err(|e| self.problem(e))?;
        Ok(buffer)
    }

    fn buffer(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.0 as usize]
    }

    fn prepare(&self, step: WorkStep<'a>) -> Result<Prepared<'a>, String> {
        let schedule = self.schedule(&step.work, &types(&step.args), &types(&step.results))?;
        let memory = |tensor: Tensor<'a>| match tensor.at {
            At::Region(at) => {
                let handle = self.buffer(at.buffer).part(at.offset, tensor.ty.bytes() as u64)?;
                Ok((tensor.ty, Memory::Bound(handle)))
            }
            At::Scratch(start) => Ok((tensor.ty, Memory::Scratch(start))),
        };
        let all = |tensors: Vec<Tensor<'a>>| tensors.into_iter().map(memory).collect::<Result<Vec<_>, String>>();
        let (start, bytes) = step.scratch;
        Ok(Prepared {
            schedule,
            args: all(step.args)?,
            results: all(step.results)?,
            scratch: (bytes > 0).then(|| (TensorType::new(DType::U8, [bytes as usize]), start)),
        })
    }

    fn run(&self, step: &Prepared<'a>) -> Result<(), String> {
        let args = step.args.iter().map(|arg| self.tensor(arg)).collect::<Result<Vec<_>, _>>()?;
        let results = step.results.iter().map(|result| self.tensor(result)).collect::<Result<Vec<_>, _>>()?;
        let workspace = match &step.scratch {
            Some((ty, start)) => Some(CubeTensor { ty, handle: self.scratch(ty, *start)? }),
            None => None,
        };
        step.schedule.launch(&self.client, &args, &results, workspace.as_ref())
    }

    fn tensor<'t>(&self, operand: &'t (Cow<'a, TensorType>, Memory)) -> Result<CubeTensor<'t>, String> {
        let handle = match &operand.1 {
            Memory::Bound(handle) => handle.clone(),
            Memory::Scratch(start) => self.scratch(&operand.0, *start)?,
        };
        Ok(CubeTensor { ty: &operand.0, handle })
    }

    fn scratch(&self, ty: &TensorType, start: u64) -> Result<Handle, String> {
        let buffer = self.scratch.as_ref().ok_or("a kernel has no scratch")?;
        buffer.part(start, ty.bytes() as u64)
    }
}

impl<'a, R: Known> Backend<'a> for Cube<'a, R> {
    fn device(&self) -> &Device {
        &self.device
    }

    fn check(&mut self, plan: &Plan) -> Result<(), RunError> {
        self.accept(plan)?;
        MemoryNeed::on_gpu(plan, self.alignment).check_gpu((self.available)(), &self.device.name)
    }

    fn allocate(&mut self, bytes: u64) -> Result<BufferId, RunError> {
        let buffer = self.reserve(bytes)?;
        Ok(self.add(buffer))
    }

    fn weight(&mut self, weight: Weight<'a>) -> Result<BufferId, RunError> {
        let buffer = match &weight {
            Weight::Mapped(bytes, _) => self.uploaded(bytes)?,
            Weight::Made(memory) => self.uploaded(memory.bytes())?,
        };
        Ok(self.add(buffer))
    }

    fn write(&mut self, to: Region, bytes: &[u8]) -> Result<(), RunError> {
        self.upload(self.buffer(to.buffer), to.offset, bytes).map_err(|e| self.problem(e))
    }

    fn read(&self, from: Region, bytes: u64) -> Result<Cow<'_, [u8]>, RunError> {
        self.synchronize()?;
        let buffer = self.buffer(from.buffer);
        let size = usize::try_from(bytes).map_err(|_| outside(from, bytes, buffer.bytes))?;
        let mut out = Vec::with_capacity(size);
        while out.len() < size {
            let piece = (size - out.len()).min(STAGING_BYTES);
            let part = buffer.part(from.offset + out.len() as u64, piece as u64).map_err(|e| self.problem(e))?;
            let found = self.client.read_one(part).map_err(|e| self.problem(format!("{e:?}")))?;
            out.extend_from_slice(found.get(..piece).ok_or_else(|| self.problem("a download came short".into()))?);
        }
        guard::check_poisoned().map_err(|e| self.problem(e))?;
        Ok(Cow::Owned(out))
    }

    /// By a sum, which nothing that is not finite leaves finite: first of rows, then of their sums.
    fn is_finite(&self, from: Region, ty: &TensorType) -> Result<Option<bool>, RunError> {
        let elements = ty.elements();
        if !ty.dtype.is_float() {
            return Ok(None);
        }
        if elements < LEAST_SUMMED || !from.offset.is_multiple_of(self.alignment) {
            let bytes = self.read(from, ty.bytes() as u64)?;
            return Ok(Some(decoded(ty, &bytes).iter().all(|v| v.is_finite())));
        }
        // Rows about as many as columns, so that neither sum has few units.
        let columns = (1..=elements.isqrt()).rev().find(|c| elements.is_multiple_of(*c)).unwrap_or(1);
        let types = [[elements / columns, columns], [elements / columns, 1], [1, 1]];
        let types = types.map(|shape| TensorType::new(ty.dtype, shape));
        let sum = |axes: &[usize]| Kernel::Reduce(Reduce { kind: ReduceKind::Sum, axes: axes.into() });
        let summed = || -> Result<Handle, String> {
            let all = self.buffer(from.buffer).part(from.offset, types[0].bytes() as u64)?;
            let empty = |ty: &TensorType| self.client.empty(ty.bytes().next_multiple_of(4));
            let (rows, one) = (empty(&types[1]), empty(&types[2]));
            let tensor = |i: usize, handle: &Handle| CubeTensor { ty: &types[i], handle: handle.clone() };
            cube::launch(&self.client, &sum(&[1]), &[tensor(0, &all)], &[tensor(1, &rows)], None)?;
            cube::launch(&self.client, &sum(&[0]), &[tensor(1, &rows)], &[tensor(2, &one)], None)?;
            Ok(one)
        };
        let one = summed().map_err(|e| self.problem(e))?;
        self.synchronize()?;
        let found = self.client.read_one(one).map_err(|e| self.problem(format!("{e:?}")))?;
        guard::check_poisoned().map_err(|e| self.problem(e))?;
        let bytes = found.get(..types[2].bytes()).ok_or_else(|| self.problem("a download came short".into()))?;
        Ok(Some(decoded(&types[2], bytes).iter().all(|sum| sum.is_finite())))
    }

    fn bind(&mut self, call: Call<'a>) -> Result<CallId, RunError> {
        let (steps, scratch) = self.steps(&call);
        if self.scratch.as_ref().map_or(0, |s| s.bytes) < scratch {
            // The old one goes first, so that there is never room needed for both.
            self.scratch = None;
            self.scratch = Some(self.reserve(scratch)?);
        }
        let prepared = steps.into_iter().map(|step| self.prepare(step)).collect::<Result<Vec<_>, _>>();
        let steps = prepared.map_err(|e| self.problem(e))?;
        self.calls.push(Bound { steps, flops: call.flops, bytes: call.bytes });
        Ok(CallId(self.calls.len() as u32 - 1))
    }

    fn launch(&mut self, call: CallId) -> Result<(), RunError> {
        let Bound { flops, bytes, .. } = self.calls[call.0 as usize];
        if self.submission.is_full_before(flops, bytes) {
            self.submission = Submission::default();
            guard::submit(&self.client).map_err(|e| self.problem(e))?;
        }
        self.submission.add(flops, bytes);
        self.calls[call.0 as usize].steps.iter().try_for_each(|step| self.run(step)).map_err(|e| self.problem(e))
    }

    fn synchronize(&self) -> Result<(), RunError> {
        guard::sync(&self.client).map_err(|e| self.problem(e))
    }

    fn clear(&mut self) {
        self.calls.clear();
        self.schedules.borrow_mut().clear();
        self.buffers.clear();
        self.scratch = None;
        self.client.memory_cleanup();
    }

    fn kernels(&self) -> KernelCounts {
        let launched = self.log.launched();
        KernelCounts { launched: launched.len(), compiled: launched.iter().filter(|k| k.is_compiled).count() }
    }

    fn freeze(&mut self) {
        self.log.freeze(true);
    }

    fn tune(&mut self, plan: &'a Plan, measures: bool, done: &mut Progress<'_>) -> Result<Option<Kernels>, RunError> {
        self.tune_plan(plan, measures, done).map(Some)
    }

    fn kernel_device(&self) -> Option<KernelDevice> {
        Some(self.log.device())
    }
}

impl<R: Known> Drop for Cube<'_, R> {
    fn drop(&mut self) {
        // CubeCL keeps what is not given back for the life of the process.
        self.calls.clear();
        self.buffers.clear();
        self.scratch = None;
        self.client.memory_cleanup();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_drivers_have_ways_out() {
        let message = |problem: &str| failure(DeviceName::Metal, problem.into()).to_string();
        for problem in [
            "CUDA_ERROR_OUT_OF_MEMORY",
            "an out-of-memory error happened",
            "Out of memory",
            "can't allocate buffer of size: 9",
        ] {
            let message = message(problem);
            assert!(message.contains("`metal`") && message.contains("smaller size"), "{message}");
        }
        for problem in [
            "the device failed: the device is lost (Destroyed): Device destroyed",
            "Parent device is lost",
            "VK_ERROR_DEVICE_LOST",
            "CUDA_ERROR_LAUNCH_TIMEOUT",
        ] {
            let message = message(problem);
            assert!(message.contains("lost") && message.contains("run again"), "{message}");
        }
        assert!(message("something else").contains("something else; run `ltxc doctor`"));
        let long = message(&format!("a mistake,\n   {}", "of many words ".repeat(100)));
        assert!(long.contains("a mistake, of many words of") && long.len() < 500, "{long}");
    }
}
