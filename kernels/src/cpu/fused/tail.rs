//! What follows an anchor: maps, rows of tables and stores, on each block of its result while that is in cache.
//!
//! The kernel hands over sums block by block. Elements that follow each other, [`BLOCK`] at most, are rounded to the dtype
//! of the anchor's result, and then every part runs on them before the next ones come. What is stored goes to its final
//! place, everything else stays in scratch memory of the thread. So the values are those of the parts one after the other.
//!
//! Some calls cannot run so, and [`Layout::new`] refuses them: maps on integers alone, and copies that cannot be turned
//! around ([`Scatter`]).

use ltxc_ir::plan::{Fused, Kernel, Map, Part, Source};
use ltxc_ir::{DType, TensorType};

use super::may_store_at_once;
use super::scatter::Scatter;
use crate::cpu::element::store;
use crate::cpu::map::{BLOCK, Frame, Operand, Program, frame_lanes};
use crate::cpu::parallel::Shared;
use crate::cpu::sink::{Sink, Sums};
use crate::cpu::{Arg, Output};

/// Where things are in the scratch memory of a thread, in floats.
pub(super) struct Layout {
    /// First part of the tail.
    anchor: usize,
    /// The current block of every part from the anchor to the first copy.
    blocks: Vec<usize>,
    /// Buffers of the maps, by part.
    frames: Vec<usize>,
    /// The copies, which are the last parts.
    scatters: Vec<Scatter>,
    /// Floats in all.
    pub(super) room: usize,
}

impl Layout {
    /// Lays out what follows part `anchor`; `None` if it cannot run block by block.
    pub(super) fn new(fused: &Fused, anchor: usize) -> Option<Layout> {
        let mut layout = Layout { anchor, blocks: vec![], frames: vec![], scatters: vec![], room: 0 };
        let row = fused.parts[anchor].result.shape.last().copied().unwrap_or(1);
        for part in &fused.parts[anchor..] {
            let (block, mut lanes) = ((BLOCK * part.result.dtype.bytes()).div_ceil(size_of::<f32>()), 0);
            match &part.kernel {
                Kernel::Copy(copy) => {
                    layout.scatters.push(Scatter::new(copy, row)?);
                    continue;
                }
                Kernel::Map(map) => {
                    let types: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
                    if !Map::is_float(&types, &part.result) {
                        return None;
                    }
                    lanes = frame_lanes(map, types.len());
                }
                _ => {}
            }
            layout.blocks.push(layout.room);
            layout.frames.push(layout.room + block);
            layout.room += block + lanes;
        }
        Some(layout)
    }
}

/// Where the result of a part is.
#[derive(Clone, Copy)]
enum Home {
    /// In the tensor that begins here.
    Memory(Shared<u8>),
    /// The elements of the current block, so many floats behind the beginning of scratch memory.
    Block(usize),
}

impl Home {
    /// Element `position`, in a block that begins at element `start`.
    #[inline(always)]
    fn at(self, position: usize, start: usize, dtype: DType, room: *mut f32) -> *mut u8 {
        match self {
            Home::Memory(first) => first.get().wrapping_add(position * dtype.bytes()),
            Home::Block(floats) => {
                room.wrapping_add(floats).cast::<u8>().wrapping_add((position - start) * dtype.bytes())
            }
        }
    }
}

/// What is done with every block, in order.
enum Step {
    Map {
        program: Program,
        frame: usize,
    },
    /// Rows of a table.
    Gather {
        table: Shared<u8>,
        /// Rows of the table.
        extent: usize,
        indices: Shared<i32>,
        /// Elements of a row.
        row: usize,
    },
}

/// The parts behind an anchor.
pub(super) struct Tail<'a> {
    layout: &'a Layout,
    /// Where the result of each part from the anchor to the first copy is, and its dtype.
    homes: Vec<(Home, DType)>,
    /// The parts behind the anchor.
    steps: Vec<Step>,
    /// Results that are stored behind all steps, because a later part reads what they replace: index of the part.
    late: Vec<(usize, Shared<u8>)>,
    /// Stores of the copies: what each moves and where to.
    stores: Vec<(usize, Shared<u8>)>,
}

impl<'a> Tail<'a> {
    /// The tail of a call with these operands and results.
    pub(super) fn new(fused: &Fused, layout: &'a Layout, args: &[Arg<'_>], results: &[Output<'_>]) -> Tail<'a> {
        let anchor = layout.anchor;
        let result_of = |part: usize| fused.stored.iter().position(|&s| s as usize == part).map(|k| &results[k]);
        let mut tail = Tail { layout, homes: vec![], steps: vec![], late: vec![], stores: vec![] };
        for (i, part) in fused.parts.iter().enumerate().skip(anchor) {
            let Some(&block) = layout.blocks.get(i - anchor) else {
                let moved = part.args.first().map_or(anchor, |a| source_part(a.source).unwrap_or(anchor));
                tail.stores.extend(result_of(i).map(|out| (moved - anchor, Shared::new(out.ptr))));
                continue;
            };
            let home = match result_of(i) {
                Some(out) if may_store_at_once(fused, i, args, out) => Home::Memory(Shared::new(out.ptr)),
                out => {
                    tail.late.extend(out.map(|out| (i - anchor, Shared::new(out.ptr))));
                    Home::Block(block)
                }
            };
            tail.homes.push((home, part.result.dtype));
            if i > anchor {
                tail.steps.extend(tail.step(part, layout.frames[i - anchor], home, args));
            }
        }
        tail
    }

    fn step(&self, part: &Part, frame: usize, home: Home, args: &[Arg<'_>]) -> Option<Step> {
        match &part.kernel {
            Kernel::Map(map) => {
                let mut overwrites = false;
                let operands = part.args.iter().map(|arg| match arg.source {
                    Source::Operand(a) => {
                        let ptr = args[a as usize].ptr;
                        overwrites |= matches!(home, Home::Memory(to) if to.get().cast_const() == ptr);
                        Operand::new(&Arg { ty: &arg.ty, ptr }, &part.result.shape)
                    }
                    Source::Part(p) => match self.homes[p as usize - self.layout.anchor] {
                        (Home::Memory(at), dtype) => Operand::in_order(at.get(), dtype),
                        (Home::Block(floats), dtype) => Operand::in_block(floats, dtype),
                    },
                });
                let operands = operands.collect();
                Some(Step::Map { program: Program::new(&map.steps, operands, part.result.dtype, !overwrites), frame })
            }
            Kernel::Gather(op) => {
                let pointer = |j: usize| match part.args[j].source {
                    Source::Operand(a) => args[a as usize].ptr.cast_mut(),
                    Source::Part(_) => unreachable!("the rule of the form: tables are operands"),
                };
                let shape = &part.args[0].ty.shape;
                Some(Step::Gather {
                    table: Shared::new(pointer(0)),
                    extent: shape[op.axis],
                    indices: Shared::new(pointer(1).cast()),
                    row: shape[op.axis + 1..].iter().product(),
                })
            }
            _ => None,
        }
    }

    /// Does everything with the `n` elements from `start` that the anchor has made.
    ///
    /// # Safety
    /// As for [`Sink::take`].
    unsafe fn block(&self, start: usize, n: usize, frames: &mut [Option<Frame<'_, f32>>], room: *mut f32) {
        for ((step, frame), &(home, dtype)) in self.steps.iter().zip(frames).zip(&self.homes[1..]) {
            let to = home.at(start, start, dtype, room);
            // SAFETY: the block belongs to the caller, in tensors as in scratch memory.
            unsafe {
                match (step, frame) {
                    (&Step::Gather { table, extent, indices, row }, _) => {
                        gather([table.get(), to], indices.get(), [extent, row, start, n], dtype.bytes());
                    }
                    (Step::Map { .. }, Some(frame)) => frame.block(start, n, to),
                    (Step::Map { .. }, None) => {}
                }
            }
        }
        for &(part, result) in &self.late {
            let (home, dtype) = self.homes[part];
            // SAFETY: as above; the block is in scratch memory.
            unsafe {
                let to = result.get().add(start * dtype.bytes());
                std::ptr::copy_nonoverlapping(home.at(start, start, dtype, room), to, n * dtype.bytes());
            }
        }
        for (scatter, &(part, result)) in self.layout.scatters.iter().zip(&self.stores) {
            let (home, dtype) = self.homes[part];
            let from = home.at(start, start, dtype, room).cast_const();
            // SAFETY: as above; no two elements have the same place.
            unsafe {
                match dtype.bytes() {
                    1 => scatter.run::<1>(start, n, from, result.get()),
                    2 => scatter.run::<2>(start, n, from, result.get()),
                    _ => scatter.run::<4>(start, n, from, result.get()),
                }
            }
        }
    }
}

fn source_part(source: Source) -> Option<usize> {
    match source {
        Source::Part(p) => Some(p as usize),
        Source::Operand(_) => None,
    }
}

impl Sink for Tail<'_> {
    unsafe fn take(&self, sums: Sums<'_>, at: &dyn Fn(usize) -> usize, room: &mut [f32]) {
        let room = room[..self.layout.room].as_mut_ptr();
        let mut frames: Vec<Option<Frame<'_, f32>>> = (self.steps.iter())
            .map(|step| match step {
                // SAFETY: the layout has room for the buffers of every map.
                Step::Map { program, frame } => Some(unsafe { Frame::new(program, room.add(*frame), room) }),
                Step::Gather { .. } => None,
            })
            .collect();
        let (home, dtype) = self.homes[0];
        // The block that is being filled.
        let (mut start, mut filled) = (0, 0);
        for r in 0..sums.rows {
            let first = at(r);
            for (column, mut part) in sums.row(r) {
                if start + filled != first + column {
                    if filled > 0 {
                        // SAFETY: these elements are complete.
                        unsafe { self.block(start, filled, &mut frames, room) };
                    }
                    (start, filled) = (first + column, 0);
                }
                while !part.is_empty() {
                    let (now, later) = part.split_at(part.len().min(BLOCK - filled));
                    // SAFETY: a block has room for `BLOCK` elements; those in the tensor belong to the caller.
                    unsafe { store(dtype, now, home.at(start + filled, start, dtype, room)) };
                    (filled, part) = (filled + now.len(), later);
                    if filled == BLOCK {
                        // SAFETY: as above.
                        unsafe { self.block(start, filled, &mut frames, room) };
                        (start, filled) = (start + filled, 0);
                    }
                }
            }
        }
        if filled > 0 {
            // SAFETY: as above.
            unsafe { self.block(start, filled, &mut frames, room) };
        }
    }
}

/// Copies the elements `start..start + n` of the rows of a table that the indices choose, `bytes` each.
///
/// # Safety
/// Table and indices are those of a `gather` along the first axis whose result has these elements; there is room for them
/// at `to`.
unsafe fn gather([table, to]: [*mut u8; 2], indices: *const i32, [extent, row, start, n]: [usize; 4], bytes: usize) {
    let mut done = 0;
    while done < n {
        let (number, column) = ((start + done) / row, (start + done) % row);
        let count = (row - column).min(n - done);
        // SAFETY: the row is one of the result, and has an index.
        unsafe {
            // Out of range is the nearest row.
            let index = usize::try_from(*indices.add(number)).unwrap_or(0).min(extent - 1);
            let from = table.add((index * row + column) * bytes);
            std::ptr::copy_nonoverlapping(from.cast_const(), to.add(done * bytes), count * bytes);
        }
        done += count;
    }
}
