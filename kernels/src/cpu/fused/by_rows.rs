//! Fused calls by rows, with the ordinary kernels.
//!
//! A block of rows is a call of its own with smaller types, and what one part leaves for the next stays in cache, in
//! scratch memory of the thread. So nothing but the cutting is written here.
//!
//! Anchors are not cut: what leads to one and the anchor itself run whole, into scratch memory for all threads, and only
//! the maps behind it run by rows. That is for the calls that cannot run together, see [`super::Together`].

use std::ops::Range;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{Access, Form, Fused, Kernel, Part, Source};

use super::may_store_at_once;
use crate::cpu::parallel::{Need, Scratch, Shared, for_each, serial};
use crate::cpu::{Arg, Output, launch_kernel, need_kernel, threads};

/// Bytes that the results of all parts for one block of rows may take: a good part of a second level cache.
const BLOCK_BYTES: usize = 256 << 10;

/// Elements per task, so that small tensors are not shared among threads.
const TASK: usize = 1 << 14;

/// How a fused call is run: some parts whole, then a range of parts by rows, then copies.
struct Schedule {
    /// Parts that run whole, in order.
    whole: Range<usize>,
    /// Parts that run by rows.
    by_rows: Range<usize>,
    rows: usize,
    /// Rows of a block.
    block: usize,
    /// Types of operands and result of the parts that run by rows, for a block.
    types: Vec<Types>,
    /// Copies that store what they made.
    copies: Range<usize>,
}

/// Types of a part's operands and result.
type Types = (Vec<TensorType>, TensorType);

impl Schedule {
    fn new(fused: &Fused, form: Option<Form>) -> Schedule {
        let n = fused.parts.len();
        let is_copy = |p: &Part| matches!(p.kernel, Kernel::Copy(_));
        let behind = |anchor: usize| {
            let first_copy = fused.parts.iter().skip(anchor + 1).position(is_copy).map_or(n, |i| anchor + 1 + i);
            (0..anchor + 1, anchor + 1..first_copy, first_copy..n)
        };
        let ((whole, by_rows, copies), rows) = match form {
            Some(Form::Rows { rows }) => ((0..0, 0..n, n..n), rows),
            Some(Form::Product { anchor, rows } | Form::Attention { anchor, rows }) => (behind(anchor), rows),
            Some(Form::GroupNorm { rows }) => (behind(0), rows),
            // Calls are checked when a plan is read or made, so there is a form.
            None => (behind(0), 1),
        };
        let parts = &fused.parts[by_rows.clone()];
        let bytes: usize = parts.iter().map(|p| p.result.bytes()).sum();
        let row = bytes.div_ceil(rows.max(1)).max(1);
        let block = (BLOCK_BYTES / row).clamp(1, rows.max(1));
        let types = cut_parts(parts, rows, block);
        Schedule { whole, by_rows, rows, block, types, copies }
    }

    /// Types of a part that runs by rows, for a block.
    fn types_of(&self, part: usize) -> &Types {
        &self.types[part - self.by_rows.start]
    }

    /// Scratch for a run on `threads` threads.
    fn need(&self, fused: &Fused, threads: usize) -> Need {
        let mut shared = 0usize;
        let mut inner = 0usize;
        for i in self.whole.clone().chain(self.copies.clone()) {
            let part = &fused.parts[i];
            let args: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
            // Parts that run whole use the scratch memory one after the other.
            let need = need_kernel(&part.kernel, &args, &part.result);
            inner = inner.max(need.bytes(threads).div_ceil(size_of::<f32>()));
            shared = shared.saturating_add(floats(&part.result));
        }
        let (mut buffers, mut scratch) = (0usize, 0usize);
        for i in self.by_rows.clone() {
            let part = &fused.parts[i];
            let (args, result) = self.types_of(i);
            let need = need_kernel(&part.kernel, &args.iter().collect::<Vec<_>>(), result);
            scratch = scratch.max(need.bytes(1).div_ceil(size_of::<f32>()));
            buffers = buffers.saturating_add(floats(result));
            if self.is_kept(fused, i) {
                shared = shared.saturating_add(floats(&part.result));
            }
        }
        Need { shared: shared.saturating_add(inner), per_thread: buffers.saturating_add(scratch) }
    }

    /// Parts of `by_rows` whose results are needed as a whole.
    fn is_kept(&self, fused: &Fused, part: usize) -> bool {
        fused.parts[self.copies.clone()].iter().any(|p| p.args.iter().any(|a| a.source == Source::Part(part as u32)))
    }
}

/// Floats that a tensor takes in scratch memory.
fn floats(ty: &TensorType) -> usize {
    ty.bytes().div_ceil(size_of::<f32>()).next_multiple_of(16)
}

/// Types of parts for a block of rows.
fn cut_parts(parts: &[Part], rows: usize, block: usize) -> Vec<Types> {
    let cut = |part: &Part| {
        let part = if block == rows { part.clone() } else { part.cut(rows, block) };
        (part.args.into_iter().map(|arg| arg.ty).collect(), part.result)
    };
    parts.iter().map(cut).collect()
}

/// Scratch for a run on `threads` threads.
pub(super) fn need(fused: &Fused, form: Option<Form>, threads: usize) -> Need {
    Schedule::new(fused, form).need(fused, threads)
}

/// Where the result of a part lies.
#[derive(Clone, Copy)]
enum Home {
    /// In memory that holds all of it.
    Whole(Shared<u8>),
    /// In scratch memory of the thread, at this many floats, for the current block.
    Block(usize),
}

/// # Safety
/// As for [`crate::cpu::launch`].
pub(super) unsafe fn launch(
    fused: &Fused,
    form: Option<Form>,
    args: &[Arg<'_>],
    results: &[Output<'_>],
    workspace: &mut [u8],
) {
    let schedule = Schedule::new(fused, form);
    let need = schedule.need(fused, threads());
    let scratch = Scratch::new(workspace, need);
    let mut free = 0usize;
    let mut shared = |ty: &TensorType| {
        // SAFETY: `need` counted all of these.
        let at = unsafe { scratch.shared().get().add(free) };
        free += floats(ty);
        Shared::new(at.cast::<u8>())
    };
    let mut homes: Vec<Home> = Vec::with_capacity(fused.parts.len());
    let mut block_floats = 0;
    // Results that are stored after their block, because a later part still reads what they replace.
    let mut late: Vec<(usize, Shared<u8>)> = Vec::new();
    for (i, part) in fused.parts.iter().enumerate() {
        let result = fused.stored.iter().position(|&s| s as usize == i).map(|k| &results[k]);
        let is_by_rows = schedule.by_rows.contains(&i);
        homes.push(match result {
            Some(out) if may_store_at_once(fused, i, args, out) => Home::Whole(Shared::new(out.ptr)),
            _ if schedule.is_kept(fused, i) || !is_by_rows => Home::Whole(shared(&part.result)),
            _ => {
                late.extend(result.map(|out| (i, Shared::new(out.ptr))));
                let at = block_floats;
                block_floats += floats(&schedule.types_of(i).1);
                Home::Block(at)
            }
        });
    }
    // SAFETY: the rest of the shared part was counted for the parts that run whole.
    let rest = unsafe {
        let start = scratch.shared().get().add(free);
        std::slice::from_raw_parts_mut(start.cast::<u8>(), (need.shared - free) * size_of::<f32>())
    };
    let whole_pointer = |source: Source| -> *const u8 {
        match source {
            Source::Operand(a) => args[a as usize].ptr,
            Source::Part(p) => match homes[p as usize] {
                Home::Whole(at) => at.get(),
                Home::Block(_) => unreachable!("parts that run whole read what is kept whole"),
            },
        }
    };
    let run_whole = |i: usize, rest: &mut [u8]| {
        let part = &fused.parts[i];
        let operands: Vec<Arg<'_>> =
            part.args.iter().map(|a| Arg { ty: &a.ty, ptr: whole_pointer(a.source) }).collect();
        let Home::Whole(at) = homes[i] else { return };
        let out = Output { ty: &part.result, ptr: at.get() };
        // SAFETY: types were checked; every part has memory of its own.
        unsafe { launch_kernel(&part.kernel, &operands, &out, rest) };
    };
    schedule.whole.clone().for_each(|i| run_whole(i, rest));
    if !schedule.by_rows.is_empty() {
        let run = Rows { fused, schedule: &schedule, args, homes: &homes, late: &late, block_floats };
        // SAFETY: the contract of this function.
        unsafe { run.launch(&scratch) };
    }
    schedule.copies.clone().for_each(|i| run_whole(i, rest));
}

/// Parts that run by rows.
struct Rows<'a> {
    fused: &'a Fused,
    schedule: &'a Schedule,
    args: &'a [Arg<'a>],
    homes: &'a [Home],
    late: &'a [(usize, Shared<u8>)],
    block_floats: usize,
}

impl Rows<'_> {
    /// # Safety
    /// As for [`crate::cpu::launch`]; `scratch` was made for [`need`].
    unsafe fn launch(&self, scratch: &Scratch<'_>) {
        let Schedule { rows, block, ref types, .. } = *self.schedule;
        let elements: usize = self.fused.parts[self.schedule.by_rows.clone()].iter().map(|p| p.result.elements()).sum();
        let per_block = elements / rows.max(1) * block;
        // Several small blocks are one task.
        let blocks = TASK.div_ceil(per_block.max(1)).max(1);
        let rest = rows % block;
        let parts = &self.fused.parts[self.schedule.by_rows.clone()];
        let last_types = if rest > 0 { cut_parts(parts, rows, rest) } else { Vec::new() };
        let tasks = rows.div_ceil(block * blocks);
        for_each(tasks, elements.saturating_mul(4), |task| {
            // SAFETY: called once per task.
            let slot = unsafe { scratch.slot() };
            let (buffers, rest) = slot.split_at_mut(self.block_floats);
            let end = rows.min((task + 1) * block * blocks);
            for start in (task * block * blocks..end).step_by(block) {
                let n = block.min(end - start);
                let types = if n == block { types } else { &last_types };
                // SAFETY: tasks own disjoint rows.
                serial(|| unsafe { self.block(start, n, types, buffers, bytemuck::cast_slice_mut(rest)) });
            }
        });
    }

    /// Runs all parts on `n` rows from `start`.
    ///
    /// # Safety
    /// Nobody else works on these rows.
    unsafe fn block(&self, start: usize, n: usize, types: &[Types], buffers: &mut [f32], rest: &mut [u8]) {
        let rows = self.schedule.rows;
        let buffers = buffers.as_mut_ptr();
        let at = |home: Home, ty: &TensorType| match home {
            // SAFETY: the row is inside the tensor.
            Home::Whole(base) => unsafe { base.get().add(ty.bytes() / rows * start) },
            // SAFETY: `need` counted the buffers.
            Home::Block(offset) => unsafe { buffers.add(offset).cast::<u8>() },
        };
        for (i, (arg_types, result_type)) in self.schedule.by_rows.clone().zip(types) {
            let part = &self.fused.parts[i];
            let operands: Vec<Arg<'_>> = (part.args.iter().zip(arg_types).enumerate())
                .map(|(j, (arg, ty))| {
                    let by_row = part.access(j, rows) == Some(Access::Row);
                    let ptr = match arg.source {
                        Source::Operand(a) if by_row => {
                            // SAFETY: the row is inside the operand.
                            unsafe { self.args[a as usize].ptr.add(arg.ty.bytes() / rows * start) }
                        }
                        Source::Operand(a) => self.args[a as usize].ptr,
                        Source::Part(p) => at(self.homes[p as usize], &arg.ty).cast_const(),
                    };
                    Arg { ty, ptr }
                })
                .collect();
            let out = Output { ty: result_type, ptr: at(self.homes[i], &part.result) };
            // SAFETY: types were checked as a whole, and rows are cut from all of them alike.
            unsafe { launch_kernel(&part.kernel, &operands, &out, rest) };
        }
        for &(i, result) in self.late {
            let part = &self.fused.parts[i];
            let row = part.result.bytes() / rows;
            // SAFETY: the result is no scratch memory.
            unsafe {
                let from = at(self.homes[i], &part.result).cast_const();
                std::ptr::copy_nonoverlapping(from, result.get().add(row * start), row * n);
            }
        }
    }
}
