//! The processor of this machine. Weights are read where their files are mapped.

use std::borrow::Cow;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{Plan, Work};
use ltxc_kernels::catalogue::workspace_bytes;
use ltxc_kernels::cpu::{Arg, Output, launch};

use super::{Backend, BufferId, Call, CallId, Device, Region, Weight, limits, outside};
use crate::error::RunError;
use crate::memory::Memory;

/// Alignment of owned memory, which is that of pages.
const PAGE: usize = 4096;

/// The native backend.
pub struct Cpu<'a> {
    device: Device,
    buffers: Vec<Buffer<'a>>,
    calls: Vec<Bound<'a>>,
    workspace: Vec<u8>,
}

enum Buffer<'a> {
    Owned(Memory),
    Mapped(&'a [u8]),
}

struct Bound<'a> {
    work: &'a Work,
    args: Vec<Arg<'a>>,
    results: Vec<Output<'a>>,
}

impl Default for Cpu<'_> {
    fn default() -> Self {
        Cpu { device: Device::cpu(), buffers: Vec::new(), calls: Vec::new(), workspace: Vec::new() }
    }
}

impl<'a> Cpu<'a> {
    /// Takes a buffer out, which must not be used afterwards. `None` if it is not memory of this backend's own.
    pub(crate) fn take(&mut self, buffer: BufferId) -> Option<Memory> {
        match std::mem::replace(self.buffers.get_mut(buffer.0 as usize)?, Buffer::Mapped(&[])) {
            Buffer::Owned(memory) => Some(memory),
            Buffer::Mapped(_) => None,
        }
    }

    fn add(&mut self, buffer: Buffer<'a>) -> BufferId {
        self.buffers.push(buffer);
        // Buffers are fewer than steps of a plan, which are counted in 32 bits.
        BufferId(self.buffers.len() as u32 - 1)
    }

    /// First byte of a region that has room for `ty`, and that kernels may write if `written`.
    fn address(&mut self, region: Region, ty: &TensorType, written: bool) -> Result<*mut u8, RunError> {
        let (bytes, align) = (ty.bytes() as u64, ty.dtype.bytes());
        let (start, held) = match &mut self.buffers[region.buffer.0 as usize] {
            Buffer::Owned(memory) => (memory.start(), memory.len()),
            Buffer::Mapped(mapped) if !written => (mapped.as_ptr().cast_mut(), mapped.len() as u64),
            Buffer::Mapped(_) => return Err(RunError::Internal("a kernel would write to a weight file".into())),
        };
        if region.offset.checked_add(bytes).is_none_or(|end| end > held) {
            return Err(outside(region, bytes, held));
        }
        if bytes == 0 {
            return Ok(std::ptr::without_provenance_mut(align));
        }
        // SAFETY: the region lies inside its buffer.
        let address = unsafe { start.add(region.offset as usize) };
        if address.align_offset(align) != 0 {
            return Err(RunError::Internal(format!("{ty} is not aligned at {} of its buffer", region.offset)));
        }
        Ok(address)
    }
}

impl<'a> Backend<'a> for Cpu<'a> {
    fn device(&self) -> &Device {
        &self.device
    }

    fn check(&mut self, plan: &Plan) -> Result<(), RunError> {
        // Memory is checked with what the driver needs beside it: `MemoryNeed`.
        limits::check_target(plan, &self.device)
    }

    fn allocate(&mut self, bytes: u64) -> Result<BufferId, RunError> {
        let memory = Memory::new(bytes)?;
        Ok(self.add(Buffer::Owned(memory)))
    }

    fn weight(&mut self, weight: Weight<'a>) -> Result<BufferId, RunError> {
        let buffer = match weight {
            Weight::Mapped(bytes, align) if bytes.as_ptr().align_offset(align.min(PAGE)) == 0 => Buffer::Mapped(bytes),
            Weight::Mapped(bytes, _) => {
                let mut memory = Memory::new(bytes.len() as u64)?;
                memory.bytes_mut().copy_from_slice(bytes);
                Buffer::Owned(memory)
            }
            Weight::Made(memory) => Buffer::Owned(memory),
        };
        Ok(self.add(buffer))
    }

    fn write(&mut self, to: Region, bytes: &[u8]) -> Result<(), RunError> {
        let Buffer::Owned(memory) = &mut self.buffers[to.buffer.0 as usize] else {
            return Err(RunError::Internal("the driver would write to a weight file".into()));
        };
        let held = memory.len();
        let start = usize::try_from(to.offset).unwrap_or(usize::MAX);
        let place = memory.bytes_mut().get_mut(start..start.saturating_add(bytes.len()));
        place.ok_or_else(|| outside(to, bytes.len() as u64, held))?.copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, from: Region, bytes: u64) -> Result<Cow<'_, [u8]>, RunError> {
        let memory = match &self.buffers[from.buffer.0 as usize] {
            Buffer::Owned(memory) => memory.bytes(),
            Buffer::Mapped(mapped) => mapped,
        };
        let end = from.offset.saturating_add(bytes);
        let range = usize::try_from(from.offset).ok().zip(usize::try_from(end).ok());
        let found = range.and_then(|(start, end)| memory.get(start..end));
        found.map(Cow::Borrowed).ok_or_else(|| outside(from, bytes, memory.len() as u64))
    }

    fn bind(&mut self, call: Call<'a>) -> Result<CallId, RunError> {
        let types = |operands: &[(&'a TensorType, Region)]| operands.iter().map(|o| o.0).collect::<Vec<_>>();
        let threads = rayon::current_num_threads();
        let need = workspace_bytes(call.work, &types(&call.args), &types(&call.results), threads);
        if self.workspace.len() < need {
            self.workspace = vec![0; need];
        }
        let args = call.args.iter().map(|&(ty, region)| {
            let ptr = self.address(region, ty, false)?.cast_const();
            Ok(Arg { ty, ptr })
        });
        let args = args.collect::<Result<Vec<_>, RunError>>()?;
        let results = call.results.iter().map(|&(ty, region)| Ok(Output { ty, ptr: self.address(region, ty, true)? }));
        let results = results.collect::<Result<Vec<_>, RunError>>()?;
        self.calls.push(Bound { work: call.work, args, results });
        Ok(CallId(self.calls.len() as u32 - 1))
    }

    fn launch(&mut self, call: CallId) -> Result<(), RunError> {
        let call = &self.calls[call.0 as usize];
        // SAFETY: a `Call` comes from a verified plan: types fit the work, and results overlap operands only where that is
        // allowed. `bind` saw that addresses are aligned and lie in buffers, which live until `clear` forgets the call too;
        // nobody else has their memory while `self` is borrowed. The workspace is large enough for every bound call.
        unsafe { launch(call.work, &call.args, &call.results, &mut self.workspace) };
        Ok(())
    }

    fn synchronize(&self) -> Result<(), RunError> {
        Ok(())
    }

    fn clear(&mut self) {
        self.calls.clear();
        self.buffers.clear();
        self.workspace = Vec::new();
    }
}
