//! What follows an anchor: maps, rows of tables and stores, on each block of its result while that is in cache.
//!
//! The kernel hands over sums block by block. Some rows of them, [`BLOCK`] elements at most, are rounded to the dtype of the
//! anchor's result, and then every part runs on them before the next ones come. What is stored goes to its final place,
//! everything else stays in scratch memory of the thread, row behind row. So the values are those of the parts one after
//! the other.
//!
//! Some calls cannot run so, and [`Layout::new`] refuses them: maps on integers alone, and copies that cannot be turned
//! around ([`Scatter`]).

use ltxc_ir::plan::{Fused, Kernel, Map, Part, Source};
use ltxc_ir::{DType, TensorType};

use super::may_store_at_once;
use super::scatter::Scatter;
use crate::cpu::element::store;
use crate::cpu::map::{BLOCK, Block, Frame, Operand, Program, frame_lanes};
use crate::cpu::parallel::Shared;
use crate::cpu::sink::{Sink, Sums};
use crate::cpu::{Arg, Output};

/// Columns below which operands that repeat are worth copying to have longer rows.
const SHORT: usize = 64;

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
    /// Sums of a block, row behind row, before they are rounded.
    sums: usize,
    /// Floats in all.
    pub(super) room: usize,
}

impl Layout {
    /// Lays out what follows part `anchor`; `None` if it cannot run block by block.
    pub(super) fn new(fused: &Fused, anchor: usize) -> Option<Layout> {
        let mut layout = Layout { anchor, blocks: vec![], frames: vec![], scatters: vec![], sums: 0, room: BLOCK };
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
    /// The first element of a block, and how far its rows are apart in elements.
    #[inline(always)]
    fn of(self, block: Block, dtype: DType, room: *mut f32) -> (*mut u8, usize) {
        match self {
            Home::Memory(first) => (first.get().wrapping_add(block.start * dtype.bytes()), block.step),
            Home::Block(floats) => (room.wrapping_add(floats).cast(), block.columns),
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

    /// Does everything with a block that the anchor has made.
    ///
    /// # Safety
    /// As for [`Sink::take`].
    unsafe fn block(&self, block: Block, frames: &mut [Option<Frame<'_, f32>>], room: *mut f32) {
        for ((step, frame), &(home, dtype)) in self.steps.iter().zip(frames).zip(&self.homes[1..]) {
            let (to, apart) = home.of(block, dtype, room);
            // SAFETY: the block belongs to the caller, in tensors as in scratch memory.
            unsafe {
                match (step, frame) {
                    (&Step::Gather { table, extent, indices, row }, _) => {
                        for r in 0..block.rows {
                            let to = to.wrapping_add(r * apart * dtype.bytes());
                            let elements = [extent, row, block.start + r * block.step, block.columns];
                            gather([table.get(), to], indices.get(), elements, dtype.bytes());
                        }
                    }
                    (Step::Map { .. }, Some(frame)) => frame.block(block, to, apart),
                    (Step::Map { .. }, None) => unreachable!("every map has a frame"),
                }
            }
        }
        let of_each_row = |part: usize, store: &dyn Fn(usize, *const u8, usize)| {
            let (home, dtype) = self.homes[part];
            let (from, apart) = home.of(block, dtype, room);
            for r in 0..block.rows {
                let row = from.wrapping_add(r * apart * dtype.bytes()).cast_const();
                store(block.start + r * block.step, row, dtype.bytes());
            }
        };
        for &(part, result) in &self.late {
            of_each_row(part, &|start, row, bytes| {
                let to = result.get().wrapping_add(start * bytes);
                // SAFETY: as above; the result is no scratch memory.
                unsafe { std::ptr::copy_nonoverlapping(row, to, block.columns * bytes) };
            });
        }
        for (scatter, &(part, result)) in self.layout.scatters.iter().zip(&self.stores) {
            of_each_row(part, &|start, row, bytes| {
                // SAFETY: as above; no two elements have the same place.
                unsafe {
                    match bytes {
                        1 => scatter.run::<1>(start, block.columns, row, result.get()),
                        2 => scatter.run::<2>(start, block.columns, row, result.get()),
                        _ => scatter.run::<4>(start, block.columns, row, result.get()),
                    }
                }
            });
        }
    }

    /// Puts a block of sums, made of `columns` columns from `column` on of the rows from `row` on, where the anchor's result
    /// is.
    ///
    /// # Safety
    /// As for [`Sink::take`].
    unsafe fn round(&self, sums: Sums<'_>, [row, column, columns]: [usize; 3], block: Block, room: *mut f32) {
        let (home, dtype) = self.homes[0];
        let (to, apart) = home.of(block, dtype, room);
        let n = block.rows * block.columns;
        let is_in_order = apart == block.columns || block.rows == 1;
        // SAFETY: the block belongs to the caller, in tensors as in scratch memory.
        unsafe {
            if dtype == DType::F32 && is_in_order {
                return sums.gather(row, column, columns, std::slice::from_raw_parts_mut(to.cast(), n));
            }
            let dense = std::slice::from_raw_parts_mut(room.add(self.layout.sums), n);
            sums.gather(row, column, columns, dense);
            for (r, values) in dense.chunks(if is_in_order { n } else { block.columns }).enumerate() {
                store(dtype, values, to.add(r * apart * dtype.bytes()));
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
        let mut r = 0;
        while r < sums.rows {
            let start = at(r);
            // Rows at equal distances, as many as a block has room for.
            let step = if r + 1 < sums.rows { at(r + 1).saturating_sub(start) } else { sums.columns };
            let most = (BLOCK / sums.columns).clamp(1, sums.rows - r);
            let is_next = |i: &usize| at(r + i) == start + i * step;
            let rows = 1 + (1..most).take_while(is_next).count();
            for column in (0..sums.columns).step_by(BLOCK) {
                let columns = BLOCK.min(sums.columns - column);
                let mut block = Block { start: start + column, step, rows, columns };
                // Short rows that follow each other are a run.
                if step == columns && columns < SHORT {
                    block = Block::run(start, rows * columns);
                }
                // SAFETY: these elements are complete and belong to the caller.
                unsafe {
                    self.round(sums, [r, column, columns], block, room);
                    self.block(block, &mut frames, room);
                }
            }
            r += rows;
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
