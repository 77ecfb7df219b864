//! Gives the buffers of a draft their addresses.
//!
//! A **unit** is memory that is placed as one: a buffer with the parts that were written into it, or several buffers in
//! turn where a kernel writes its result over an operand that nobody reads again. A unit that is a result of the
//! function lies in the caller's memory, every other one in the frame. The frame of a callee is a block like the units,
//! alive for one step, so it lies wherever the caller's own buffers leave room.

use ltxc_ir::TensorType;
use ltxc_ir::plan::{FunctionCall, KernelCall, Operand, Place, PlanFunction, Step, Storage, Target, Work};
use ltxc_kernels::catalogue;

use super::cut::{self, Piece};
use super::view::Base;
use super::{Action, Draft, DraftOperand, DraftStep};
use crate::error::CompileError;
use crate::memory::{self, Block, MemoryError};

/// Places all buffers and writes the plan function. `plan` has the functions that it calls.
pub(super) fn place(
    name: &str,
    draft: Draft,
    plan: &[PlanFunction],
    target: &Target,
) -> Result<PlanFunction, CompileError> {
    let mut units = Units::new(&draft);
    units.merge_in_place(&draft);
    let addresses = Addresses::new(name, &draft, &units, plan, target)?;
    let mut steps = Vec::with_capacity(draft.steps.len());
    let mut frames = addresses.frames.iter();
    for step in &draft.steps {
        let args: Vec<Operand> = step.args.iter().map(|a| addresses.operand(a)).collect();
        let results: Vec<Operand> = step.results.iter().map(|r| addresses.operand(r)).collect();
        match &step.action {
            Action::Work(work) => {
                check_bindings(name, work, args.len() + results.len(), target)?;
                let pieces = cut::pieces(Piece { work: work.clone(), args, results }, target);
                let pieces = pieces.map_err(|ty| too_large(name, work, &ty, target))?;
                steps.extend(pieces.into_iter().map(|Piece { work, args, results }| {
                    let arg_types: Vec<&TensorType> = args.iter().map(|a| &a.ty).collect();
                    let result_types: Vec<&TensorType> = results.iter().map(|r| &r.ty).collect();
                    let bytes = catalogue::bytes(&work, &arg_types, &result_types);
                    let flops = catalogue::flops(&work, &arg_types, &result_types);
                    Step::Kernel(KernelCall { work, bytes, flops, name: step.name.clone(), args, results })
                }));
            }
            Action::Call { function, prefix } => steps.push(Step::Call(FunctionCall {
                function: *function,
                prefix: prefix.clone(),
                name: step.name.clone(),
                frame: frames.next().cloned().unwrap_or_default(),
                args,
                results,
            })),
        }
    }
    Ok(PlanFunction {
        name: name.into(),
        constants: addresses.constant_bytes,
        frame_bytes: addresses.frame_bytes,
        params: draft.params,
        results: draft.results,
        weights: draft.weights,
        steps,
    })
}

/// Checks how many operands and results a call has.
fn check_bindings(name: &str, work: &Work, found: usize, target: &Target) -> Result<(), CompileError> {
    if found <= target.max_bindings as usize {
        return Ok(());
    }
    let (function, kernel) = (name.to_string(), work.name().to_string());
    Err(CompileError::TooManyBindings { function, kernel, found, limit: target.max_bindings })
}

fn too_large(name: &str, work: &Work, ty: &TensorType, target: &Target) -> CompileError {
    let counted = target.max_tensor_elements().saturating_mul(ty.dtype.bytes() as u64);
    CompileError::TensorTooLarge {
        function: name.into(),
        kernel: work.name().into(),
        ty: ty.to_string(),
        bytes: ty.bytes() as u64,
        limit: target.max_tensor_bytes.min(counted),
    }
}

/// Which buffers share memory, and when that memory is needed.
struct Units {
    /// The buffer that a buffer lies in, and at which byte.
    parent: Vec<Option<(usize, u64)>>,
    /// Result of the function that a unit is; meaningful for its outermost buffer, like the steps below.
    result: Vec<Option<u32>>,
    first: Vec<usize>,
    last: Vec<usize>,
    bytes: Vec<u64>,
}

impl Units {
    fn new(draft: &Draft) -> Units {
        let n = draft.buffers.len();
        let mut units = Units {
            parent: draft.buffers.iter().map(|b| b.parent).collect(),
            result: draft.buffers.iter().map(|b| b.result).collect(),
            first: vec![usize::MAX; n],
            last: vec![0; n],
            bytes: draft.buffers.iter().map(|b| b.ty.bytes() as u64).collect(),
        };
        for (i, step) in draft.steps.iter().enumerate() {
            for operand in step.args.iter().chain(&step.results) {
                if let Base::Buffer(b) = operand.base {
                    let (unit, _) = units.find(b);
                    units.first[unit] = units.first[unit].min(i);
                    units.last[unit] = units.last[unit].max(i);
                }
            }
        }
        for b in (0..n).filter(|&b| draft.buffers[b].result.is_some()) {
            units.last[b] = usize::MAX;
        }
        units
    }

    /// The unit that a buffer lies in, and at which byte.
    fn find(&self, buffer: usize) -> (usize, u64) {
        let (mut at, mut offset) = (buffer, 0);
        while let Some((parent, inner)) = self.parent[at] {
            // A part lies inside its parent, whose size was checked.
            (at, offset) = (parent, offset + inner);
        }
        (at, offset)
    }

    /// Lets results lie on operands that nobody reads again, where the kernel allows it.
    fn merge_in_place(&mut self, draft: &Draft) {
        for (i, step) in draft.steps.iter().enumerate() {
            let Action::Work(work) = &step.action else { continue };
            for (k, result) in step.results.iter().enumerate() {
                let mut operands = step.args.iter().enumerate().filter(|&(j, _)| work.may_overwrite(j, k));
                operands.find(|(_, arg)| self.merge(i, step, (work, k), arg, result));
            }
        }
    }

    /// Tries to give `result`, number `k` of step `i`, the memory of `arg`.
    fn merge(
        &mut self,
        i: usize,
        step: &DraftStep,
        (work, k): (&Work, usize),
        arg: &DraftOperand,
        result: &DraftOperand,
    ) -> bool {
        let (Base::Buffer(from), Base::Buffer(to)) = (arg.base, result.base) else { return false };
        let ((old, old_offset), (new, _)) = (self.find(from), self.find(to));
        let is_all = |unit: usize| self.bytes[unit] == result.ty.bytes() as u64;
        let dies_here = old != new && self.last[old] == i && is_all(old) && old_offset == 0;
        let result_is_all = result.offset_bytes == 0 && is_all(to);
        if !dies_here || !result_is_all || arg.offset_bytes != 0 || arg.ty != result.ty {
            return false;
        }
        // An operand that may not be written over must not look at the same memory, nor one that looks at it otherwise.
        let may_meet = |(j, other): (usize, &DraftOperand)| match other.base {
            Base::Buffer(b) => self.find(b).0 != old || (other == arg && work.may_overwrite(j, k)),
            _ => true,
        };
        // Another result may have moved there already.
        let is_taken = step.results.iter().any(|r| matches!(r.base, Base::Buffer(b) if self.find(b).0 == old));
        if is_taken || !step.args.iter().enumerate().all(may_meet) {
            return false;
        }
        if new == to && self.result[new].is_none() {
            // The result is bound to nothing: it moves into the operand's memory.
            self.parent[new] = Some((old, 0));
            self.last[old] = self.last[old].max(self.last[new]);
        } else {
            // The result is a part of something or a result of the function: the operand moves there.
            self.parent[old] = Some((to, 0));
            self.first[new] = self.first[new].min(self.first[old]);
        }
        true
    }
}

/// Where everything of a function lies.
struct Addresses {
    /// Place and offset of every buffer.
    buffers: Vec<(Place, u64)>,
    constants: Vec<u64>,
    constant_bytes: Vec<u8>,
    /// Offsets of the callee's frame per arena, for every call in order.
    frames: Vec<Vec<u64>>,
    frame_bytes: Vec<u64>,
}

impl Addresses {
    fn new(
        name: &str,
        draft: &Draft,
        units: &Units,
        plan: &[PlanFunction],
        target: &Target,
    ) -> Result<Addresses, CompileError> {
        let mut blocks = Vec::new();
        let mut block_of = vec![None; draft.buffers.len()];
        for (b, block) in block_of.iter_mut().enumerate() {
            // A buffer that no step touches is empty.
            if units.parent[b].is_none() && units.result[b].is_none() && units.first[b] <= units.last[b] {
                *block = Some(blocks.len());
                let (bytes, first, last) = (units.bytes[b], units.first[b], units.last[b]);
                blocks.push(Block { bytes, first, last, arena: None });
            }
        }
        let mut calls: Vec<(usize, usize)> = Vec::new();
        for (i, step) in draft.steps.iter().enumerate() {
            if let Action::Call { function, .. } = step.action {
                let frame = &plan[function as usize].frame_bytes;
                calls.push((blocks.len(), frame.len()));
                let block = |(a, &bytes): (usize, &u64)| Block { bytes, first: i, last: i, arena: Some(a as u32) };
                blocks.extend(frame.iter().enumerate().map(block));
            }
        }
        let layout = memory::place(&blocks, target.alignment, target.max_arena_bytes).map_err(|e| match e {
            MemoryError::TooLarge(i) => CompileError::BufferTooLarge {
                function: name.into(),
                bytes: blocks[i].bytes,
                limit: target.max_arena_bytes,
            },
            MemoryError::Overflow => CompileError::TooMuchMemory { function: name.into() },
        })?;
        let buffers = (0..draft.buffers.len()).map(|b| {
            let (unit, inner) = units.find(b);
            match (units.result[unit], block_of[unit]) {
                (Some(r), _) => (Place::Result(r), inner),
                (None, Some(block)) => {
                    let (arena, offset) = layout.places[block];
                    (Place::Frame { arena }, offset + inner)
                }
                (None, None) => (Place::Frame { arena: 0 }, 0),
            }
        });
        let buffers = buffers.collect();
        let frames = calls.iter().map(|&(at, n)| layout.places[at..at + n].iter().map(|p| p.1).collect()).collect();
        let mut constants = Vec::with_capacity(draft.constants.len());
        let mut constant_bytes: Vec<u8> = Vec::new();
        for (_, bytes) in &draft.constants {
            let start = constant_bytes.len().next_multiple_of(target.alignment as usize);
            constant_bytes.resize(start, 0);
            constants.push(start as u64);
            constant_bytes.extend(bytes);
        }
        Ok(Addresses { buffers, constants, constant_bytes, frames, frame_bytes: layout.arena_bytes })
    }

    fn operand(&self, operand: &DraftOperand) -> Operand {
        let (place, start) = match operand.base {
            Base::Param(i) => (Place::Param(i), 0),
            Base::Weight(i) => (Place::Weight(i), 0),
            Base::Constant(i) => (Place::Constant, self.constants[i]),
            Base::Buffer(b) => self.buffers[b],
        };
        Operand { place, offset: start + operand.offset_bytes, ty: operand.ty.clone(), storage: Storage::Native }
    }
}
