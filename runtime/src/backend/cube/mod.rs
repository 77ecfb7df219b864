//! GPUs, through CubeCL: one backend for its runtimes for Vulkan, Metal and CUDA.
//!
//! CubeCL's pools round sizes up and stop at a fraction of the device. What lives as long as a program is therefore
//! allocated as *persistent*, which is exact and as large as the driver allows; only uploads pass through the pools.
//!
//! Failures of a device come late, and some of them not at all by themselves: `ltxc_kernels::cube::guard` collects them, and
//! everything that hands results out asks it first.

#[cfg(feature = "cuda")]
pub(super) mod cuda;
#[cfg(feature = "wgpu")]
pub(super) mod wgpu;

use std::borrow::Cow;

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::server::Handle;
use ltxc_ir::plan::{Copy, Kernel, KernelCall, Plan, Target};
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::cube::{self, CubeTensor, guard};

use super::steps::{At, KernelStep, Rules, Tensor, steps_of};
use super::{Backend, BufferId, Call, CallId, Device, Region, Weight, limits, outside};
use crate::error::RunError;

/// Uploads and downloads go in pieces of this size, so that staging memory stays small.
const STAGING_BYTES: usize = 32 << 20;

/// What a run needs besides the plan's own memory: pieces of uploads on their way, shapes and scalars of launches.
const OVERHEAD_BYTES: u64 = 128 << 20;

/// A device behind the CubeCL runtime `R`.
struct Cube<'a, R: Runtime> {
    device: Device,
    /// Tensors are bound at multiples of this many bytes.
    alignment: u64,
    available: Box<dyn Fn() -> u64>,
    client: ComputeClient<R>,
    buffers: Vec<Buffer>,
    calls: Vec<Vec<Prepared<'a>>>,
    scratch: Option<Buffer>,
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

/// A kernel with the memory it is bound to.
struct Prepared<'a> {
    kernel: Cow<'a, Kernel>,
    args: Vec<(Cow<'a, TensorType>, Memory)>,
    result: (Cow<'a, TensorType>, Memory),
    /// Type and start of the kernel's own scratch.
    scratch: Option<(TensorType, u64)>,
}

enum Memory {
    Bound(Handle),
    /// Bytes from the start of scratch, which moves when it grows.
    Scratch(u64),
}

impl<'a, R: Runtime> Cube<'a, R> {
    fn new(device: Device, alignment: u64, available: Box<dyn Fn() -> u64>, client: ComputeClient<R>) -> Cube<'a, R> {
        guard::install();
        Cube { device, alignment, available, client, buffers: Vec::new(), calls: Vec::new(), scratch: None }
    }

    fn problem(&self, problem: String) -> RunError {
        RunError::Device { device: self.device.name.clone(), problem }
    }

    fn rules(&self) -> Rules<'static> {
        Rules {
            alignment: self.alignment,
            scratch_bytes: &|kernel, args, result| cube::workspace_bytes(kernel, args, &[result]) as u64,
        }
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

    fn prepare(&self, step: KernelStep<'a>) -> Result<Prepared<'a>, String> {
        let memory = |tensor: Tensor<'a>| match tensor.at {
            At::Region(at) => {
                let handle = self.buffer(at.buffer).part(at.offset, tensor.ty.bytes() as u64)?;
                Ok((tensor.ty, Memory::Bound(handle)))
            }
            At::Scratch(start) => Ok((tensor.ty, Memory::Scratch(start))),
        };
        let (start, bytes) = step.scratch;
        Ok(Prepared {
            kernel: step.kernel,
            args: step.args.into_iter().map(memory).collect::<Result<_, String>>()?,
            result: memory(step.result)?,
            scratch: (bytes > 0).then(|| (TensorType::new(DType::U8, [bytes as usize]), start)),
        })
    }

    fn run(&self, step: &Prepared<'a>) -> Result<(), String> {
        let args = step.args.iter().map(|arg| self.tensor(arg)).collect::<Result<Vec<_>, _>>()?;
        let result = self.tensor(&step.result)?;
        let workspace = match &step.scratch {
            Some((ty, start)) => Some(CubeTensor { ty, handle: self.scratch(ty, *start)? }),
            None => None,
        };
        cube::launch(&self.client, &step.kernel, &args, &[result], workspace.as_ref())
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

impl<'a, R: Runtime> Backend<'a> for Cube<'a, R> {
    fn device(&self) -> &Device {
        &self.device
    }

    fn check(&self, plan: &Plan) -> Result<(), RunError> {
        limits::check_target(plan, &self.device)?;
        limits::check_sizes(plan, &self.device)?;
        let scratch = |call: &KernelCall| {
            let nowhere = Region { buffer: BufferId(0), offset: 0 };
            let place = |operand: &ltxc_ir::plan::Operand| Region { offset: operand.offset, ..nowhere };
            let args = call.args.iter().map(|a| (&a.ty, place(a))).collect();
            let results = call.results.iter().map(|r| (&r.ty, place(r))).collect();
            steps_of(&Call { work: &call.work, args, results }, &self.rules()).1
        };
        let needed = limits::device_bytes(plan, &scratch).saturating_add(OVERHEAD_BYTES);
        limits::check_memory(needed, (self.available)(), &self.device.name)
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

    fn bind(&mut self, call: Call<'a>) -> Result<CallId, RunError> {
        let (steps, scratch) = steps_of(&call, &self.rules());
        if self.scratch.as_ref().map_or(0, |s| s.bytes) < scratch {
            // The old one goes first, so that there is never room needed for both.
            self.scratch = None;
            self.scratch = Some(self.reserve(scratch)?);
        }
        let prepared = steps.into_iter().map(|step| self.prepare(step)).collect::<Result<Vec<_>, _>>();
        self.calls.push(prepared.map_err(|e| self.problem(e))?);
        Ok(CallId(self.calls.len() as u32 - 1))
    }

    fn launch(&mut self, call: CallId) -> Result<(), RunError> {
        self.calls[call.0 as usize].iter().try_for_each(|step| self.run(step)).map_err(|e| self.problem(e))
    }

    fn synchronize(&self) -> Result<(), RunError> {
        guard::sync(&self.client).map_err(|e| self.problem(e))
    }

    fn clear(&mut self) {
        self.calls.clear();
        self.buffers.clear();
        self.scratch = None;
        self.client.memory_cleanup();
    }
}

impl<R: Runtime> Drop for Cube<'_, R> {
    fn drop(&mut self) {
        // CubeCL keeps what is not given back for the life of the process.
        self.calls.clear();
        self.buffers.clear();
        self.scratch = None;
        self.client.memory_cleanup();
    }
}
