//! `map`: chains of pointwise functions over operands that broadcast.
//!
//! The result is computed in blocks of [`BLOCK`] elements. Every step works on a whole block before the next one begins, in
//! buffers that stay in the first cache, so dtype and function are looked at once per block. An operand that already lies
//! in memory as the lanes need it is read where it is, and the last step writes to the result itself unless that would
//! change an operand. Buffers are given out by lifetime: a long chain needs few of them.
//!
//! A map behind another kernel of a fused call runs on blocks too, as they become complete: [`Program`] and [`Frame`] are
//! all it needs, with operands that lie in scratch memory for the current block ([`Operand::in_block`]). Such a block is a
//! few columns of some rows ([`Block`]), where a map of its own has one run of elements.

use ltxc_ir::plan::{Map, MapStep};
use ltxc_ir::types::MAX_RANK;
use ltxc_ir::{DType, TensorType};

use super::lanes::{Lane, Rows, RowsMut};
use super::parallel::{Need, Scratch, Shared, for_each};
use super::{Arg, Output};

/// Elements per block: 2 KB in f32, so that some twenty buffers fit into the first cache.
pub(crate) const BLOCK: usize = 512;

/// Blocks per task.
const BLOCKS: usize = 32;

/// No buffer.
const NONE: usize = usize::MAX;

pub(crate) fn need(map: &Map, args: &[&TensorType], out: &TensorType) -> Need {
    let lane = if Map::is_float(args, out) { 1 } else { 2 };
    Need { shared: 0, per_thread: frame_lanes(map, args.len()).saturating_mul(lane) }
}

/// Lanes of the buffers of a [`Frame`]: one block for each register and one for the result, at most.
pub(crate) fn frame_lanes(map: &Map, args: usize) -> usize {
    (args + map.steps.len() + 1).saturating_mul(BLOCK)
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(map: &Map, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
    let scratch = Scratch::new(workspace, need(map, &types, out.ty));
    // SAFETY: the contract of `launch`.
    unsafe {
        if Map::is_float(&types, out.ty) {
            run::<f32>(map, args, out, &scratch);
        } else {
            run::<i64>(map, args, out, &scratch);
        }
    }
}

/// # Safety
/// As for [`super::launch`]; `scratch` was made for [`need`].
unsafe fn run<T: Lane>(map: &Map, args: &[Arg<'_>], out: &Output<'_>, scratch: &Scratch<'_>) {
    let operands = args.iter().map(|a| Operand::new(a, &out.ty.shape)).collect();
    let overwrites = args.iter().any(|a| a.ptr == out.ptr.cast_const());
    let program = Program::new(&map.steps, operands, out.ty.dtype, !overwrites);
    let n = out.ty.elements();
    let per_task = BLOCK * BLOCKS;
    let (result, bytes) = (Shared::new(out.ptr), out.ty.dtype.bytes());
    for_each(n.div_ceil(per_task), n.saturating_mul(program.weight), |task| {
        // SAFETY: called once per task; the slot has room for the buffers of the program, whatever their lanes.
        let mut frame = unsafe { Frame::<T>::new(&program, scratch.slot().as_mut_ptr().cast(), std::ptr::null()) };
        let end = n.min((task + 1) * per_task);
        for start in (task * per_task..end).step_by(BLOCK) {
            let block = Block::run(start, BLOCK.min(end - start));
            // SAFETY: tasks own disjoint ranges of the result, and operands are read there or are not the result.
            unsafe { frame.block(block, result.get().add(start * bytes), block.step) };
        }
    });
}

/// Elements of a result that are computed together: `rows` runs of `columns`, the first from `start` on, `step` apart.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub start: usize,
    pub step: usize,
    pub rows: usize,
    pub columns: usize,
}

impl Block {
    /// `n` elements that follow each other.
    pub(crate) fn run(start: usize, n: usize) -> Block {
        Block { start, step: n, rows: 1, columns: n }
    }
}

/// An operand as seen from the flat positions of the result.
pub(crate) struct Operand {
    place: Place,
    dtype: DType,
    /// Extent and stride of merged axes, outermost first. The last stride is 0 or 1.
    axes: Vec<(usize, usize)>,
}

/// Where an operand lies.
#[derive(Clone, Copy)]
enum Place {
    /// In memory that begins here.
    Memory(*const u8),
    /// The elements of the current block, so many floats behind the beginning of scratch memory.
    Block(usize),
}

// SAFETY: only read, and valid for the time of a launch by the contract of `launch`.
unsafe impl Sync for Operand {}

impl Operand {
    /// An operand that broadcasts to the extents `out`.
    pub(crate) fn new(arg: &Arg<'_>, out: &[usize]) -> Operand {
        let (shape, strides) = (&arg.ty.shape, arg.ty.strides());
        let lead = out.len() - shape.len();
        let mut axes: Vec<(usize, usize)> = Vec::with_capacity(out.len());
        for (a, &extent) in out.iter().enumerate().filter(|&(_, &extent)| extent != 1) {
            let stride = if a < lead || shape[a - lead] == 1 { 0 } else { strides[a - lead] };
            match axes.last_mut() {
                // One step on the outer axis is `extent` steps on this one.
                Some(outer) if outer.1 == stride * extent => *outer = (outer.0 * extent, stride),
                _ => axes.push((extent, stride)),
            }
        }
        Operand { place: Place::Memory(arg.ptr), dtype: arg.ty.dtype, axes }
    }

    /// An operand with one element for each of the result, in its order.
    pub(crate) fn in_order(ptr: *const u8, dtype: DType) -> Operand {
        // One axis that never ends.
        Operand { place: Place::Memory(ptr), dtype, axes: vec![(usize::MAX, 1)] }
    }

    /// An operand with one element for each of the result, of which only those of the current block exist: so many floats
    /// behind the beginning of the scratch memory that a [`Frame`] is given.
    pub(crate) fn in_block(floats: usize, dtype: DType) -> Operand {
        Operand { place: Place::Block(floats), ..Operand::in_order(std::ptr::null(), dtype) }
    }

    /// Whether there is only one element.
    fn is_constant(&self) -> bool {
        self.axes.iter().all(|&(_, stride)| stride == 0)
    }

    /// Where the elements of `n` positions from `start` begin, if they are one run.
    fn run_at(&self, start: usize, n: usize) -> Option<usize> {
        let &(extent, stride) = self.axes.last()?;
        let column = start % extent;
        (stride == 1 && column + n <= extent).then(|| self.row(start / extent) + column)
    }

    /// Offset of a row: an index of all axes but the last.
    fn row(&self, mut row: usize) -> usize {
        let mut offset = 0;
        for &(extent, stride) in self.axes[..self.axes.len() - 1].iter().rev() {
            offset += row % extent * stride;
            row /= extent;
        }
        offset
    }

    /// Where the elements of a block lie, and how far its rows are apart in elements, if they are runs at distances that
    /// are known without looking at each.
    fn rows_at(&self, block: Block, blocks: *const f32) -> Option<(*const u8, usize)> {
        let first = match self.place {
            Place::Memory(first) => first,
            Place::Block(floats) => return Some((blocks.wrapping_add(floats).cast(), block.columns)),
        };
        let offset = self.run_at(block.start, block.columns)?;
        let step = match self.axes[..] {
            _ if block.rows == 1 => block.columns,
            [_] => block.step,
            // The same columns of something that repeats.
            [(_, 0), (extent, _)] if block.step.is_multiple_of(extent) => 0,
            _ => return None,
        };
        Some((first.wrapping_add(offset * self.dtype.bytes()), step))
    }

    /// Reads the elements of `dst.len()` positions from `start`.
    ///
    /// # Safety
    /// The operand is in memory and valid, and the positions are inside the result.
    unsafe fn load<T: Lane>(&self, start: usize, dst: &mut [T]) {
        let Place::Memory(first) = self.place else { return };
        let load = |offset: usize, dst: &mut [T]| {
            // SAFETY: offsets of positions inside the result are inside the operand.
            unsafe { T::load(self.dtype, first.add(offset * self.dtype.bytes()), dst) }
        };
        if let Some(offset) = self.run_at(start, dst.len()) {
            return load(offset, dst);
        }
        let Some((&(extent, stride), outer)) = self.axes.split_last() else {
            // The result has one element, however long the block of a constant is.
            let (first, rest) = dst.split_at_mut(1);
            load(0, first);
            rest.fill(first[0]);
            return;
        };
        // An index that counts, because a division for each row costs as much as a short row.
        let mut index = [0usize; MAX_RANK];
        let (mut column, mut row, mut offset) = (start % extent, start / extent, self.row(start / extent));
        for (i, &(extent, _)) in index.iter_mut().zip(outer).rev() {
            (*i, row) = (row % extent, row / extent);
        }
        let mut done = 0;
        while done < dst.len() {
            let n = (extent - column).min(dst.len() - done);
            let part = &mut dst[done..done + n];
            if stride == 1 {
                load(offset + column, part);
            } else {
                load(offset, &mut part[..1]);
                let value = part[0];
                part.fill(value);
            }
            (done, column) = (done + n, 0);
            for (i, &(extent, stride)) in index.iter_mut().zip(outer).rev() {
                (*i, offset) = (*i + 1, offset + stride);
                if *i < extent {
                    break;
                }
                (*i, offset) = (0, offset - extent * stride);
            }
        }
    }
}

/// What is done for each block, in order.
enum Action {
    /// Makes an operand available as its register, in this buffer if it cannot be read in place.
    Load { operand: usize, buffer: usize },
    /// Runs the step that defines the register into this buffer.
    Step { step: MapStep, register: usize, buffer: usize },
}

/// The steps of a map, with a buffer for each.
pub(crate) struct Program {
    operands: Vec<Operand>,
    registers: usize,
    /// Once per task: operands of one element and scalars.
    constants: Vec<Action>,
    /// For every block.
    actions: Vec<Action>,
    dtype: DType,
    /// Whether the last step may write where the result is.
    may_write_through: bool,
    /// Work per element, in element operations.
    weight: usize,
}

// SAFETY: as for `Operand`.
unsafe impl Sync for Program {}

impl Program {
    /// The program of a map whose result has this dtype. `may_write_through` says that no operand lies where it is stored.
    pub(crate) fn new(steps: &[MapStep], operands: Vec<Operand>, dtype: DType, may_write_through: bool) -> Program {
        let args = operands.len();
        let registers = args + steps.len();
        let mut last_use = vec![0; registers];
        for (j, step) in steps.iter().enumerate() {
            each_register(step, |r| last_use[r] = j);
        }
        // The result is read after all steps.
        last_use[registers - 1] = steps.len();

        let mut buffers = Buffers::default();
        let mut at = vec![NONE; registers];
        let (mut constants, mut actions) = (Vec::new(), Vec::with_capacity(registers));
        for (operand, o) in operands.iter().enumerate().filter(|(_, o)| o.is_constant()) {
            debug_assert!(o.axes.len() <= 1, "axes that repeat are merged");
            at[operand] = buffers.take();
            constants.push(Action::Load { operand, buffer: at[operand] });
        }
        for (j, step) in steps.iter().enumerate().filter(|(_, s)| matches!(s, MapStep::Scalar(_))) {
            let register = args + j;
            at[register] = buffers.take();
            constants.push(Action::Step { step: *step, register, buffer: at[register] });
        }
        let held = buffers.taken;
        let fetch = |operand: usize, at: &mut [usize], buffers: &mut Buffers, actions: &mut Vec<Action>| {
            if operand < args && at[operand] == NONE {
                at[operand] = buffers.take();
                actions.push(Action::Load { operand, buffer: at[operand] });
            }
        };
        for (j, step) in steps.iter().enumerate() {
            let register = args + j;
            if at[register] != NONE {
                continue;
            }
            each_register(step, |r| fetch(r, &mut at, &mut buffers, &mut actions));
            // Taken before the operands are given back: no step writes what it reads.
            at[register] = buffers.take();
            actions.push(Action::Step { step: *step, register, buffer: at[register] });
            each_register(step, |r| {
                if last_use[r] == j && at[r] >= held {
                    buffers.give_back(at[r]);
                }
            });
        }
        fetch(registers - 1, &mut at, &mut buffers, &mut actions);
        Program {
            operands,
            registers,
            constants,
            actions,
            dtype,
            may_write_through,
            weight: steps.iter().map(weight).sum::<usize>().max(1),
        }
    }
}

/// Calls `f` with the registers that a step reads.
fn each_register(step: &MapStep, mut f: impl FnMut(usize)) {
    match *step {
        MapStep::Scalar(_) => {}
        MapStep::Unary(_, a) | MapStep::Function(_, a) | MapStep::Round(_, a) => f(a as usize),
        MapStep::Binary(_, a, b) | MapStep::Compare(_, a, b) => [a, b].iter().for_each(|&r| f(r as usize)),
        MapStep::Select(a, b, c) | MapStep::Snake(a, b, c) => [a, b, c].iter().for_each(|&r| f(r as usize)),
    }
}

/// Work of a step per element, in simple operations.
pub(crate) fn weight(step: &MapStep) -> usize {
    use ltxc_ir::ops::{Binary, Unary};
    use ltxc_ir::plan::MapFunction as Function;
    match step {
        MapStep::Scalar(_) => 0,
        MapStep::Unary(Unary::Neg | Unary::Abs | Unary::Sqrt | Unary::Rsqrt, _) => 1,
        MapStep::Function(Function::LeakyRelu(_), _) => 2,
        MapStep::Unary(..) | MapStep::Function(..) | MapStep::Binary(Binary::Pow, ..) => 8,
        MapStep::Snake(..) => 12,
        _ => 1,
    }
}

/// Gives out buffers, those that came back first.
#[derive(Default)]
struct Buffers {
    free: Vec<usize>,
    taken: usize,
}

impl Buffers {
    fn take(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.taken += 1;
            self.taken - 1
        })
    }

    fn give_back(&mut self, buffer: usize) {
        // A step may read a register twice.
        if !self.free.contains(&buffer) {
            self.free.push(buffer);
        }
    }
}

/// Registers of one task.
pub(crate) struct Frame<'a, T> {
    program: &'a Program,
    buffers: *mut T,
    /// Scratch memory with the operands of the current block.
    blocks: *const f32,
    registers: Vec<Register<T>>,
}

/// Where the lanes of a register begin, and how far its rows are apart.
#[derive(Clone, Copy)]
struct Register<T> {
    at: *const T,
    step: usize,
}

impl<'a, T: Lane> Frame<'a, T> {
    /// # Safety
    /// `buffers` has room for [`frame_lanes`], and nothing else uses it while the frame lives. Operands in `blocks` are valid
    /// when a block is computed.
    pub(crate) unsafe fn new(program: &'a Program, buffers: *mut T, blocks: *const f32) -> Frame<'a, T> {
        let nothing = Register { at: std::ptr::null(), step: 0 };
        let mut frame = Frame { program, buffers, blocks, registers: vec![nothing; program.registers] };
        for action in &program.constants {
            // SAFETY: constants are the same in every block.
            unsafe { frame.act(action, Block::run(0, BLOCK), None) };
        }
        // All rows of a constant are one.
        frame.registers.iter_mut().for_each(|register| register.step = 0);
        frame
    }

    /// Computes a block of [`BLOCK`] elements at most, and stores its rows from `result` on, `step` elements apart.
    ///
    /// # Safety
    /// They are elements of the map's result, and nothing else uses the memory of the rows.
    pub(crate) unsafe fn block(&mut self, block: Block, result: *mut u8, step: usize) {
        let program = self.program;
        let is_lane = program.may_write_through && T::DTYPE == Some(program.dtype);
        let through = is_lane.then_some((result.cast(), step));
        for action in &program.actions {
            // SAFETY: actions are in order of their registers.
            unsafe { self.act(action, block, through) };
        }
        let last = self.registers[program.registers - 1];
        if last.at.cast() == result.cast_const() {
            return;
        }
        for r in 0..block.rows {
            let to = result.wrapping_add(r * step * program.dtype.bytes());
            // SAFETY: a register holds the rows, and is the result only if it begins there.
            unsafe {
                let lanes = std::slice::from_raw_parts(last.at.add(r * last.step), block.columns);
                T::store(program.dtype, lanes, to);
            }
        }
    }

    /// # Safety
    /// Registers that the action reads are set; the block is inside the result. `through` is where the rows of the block
    /// may be written as lanes, and how far they are apart.
    #[inline]
    unsafe fn act(&mut self, action: &Action, block: Block, through: Option<(*mut T, usize)>) {
        let Block { rows, columns, .. } = block;
        match *action {
            Action::Load { operand, buffer } => {
                let dst = self.buffers.wrapping_add(buffer * BLOCK);
                // SAFETY: a buffer holds a block, and no register that is still read lies in it.
                let row = |r: usize| unsafe { std::slice::from_raw_parts_mut(dst.add(r * columns), columns) };
                let o = &self.program.operands[operand];
                self.registers[operand] = match o.rows_at(block, self.blocks) {
                    Some((at, step)) if T::DTYPE == Some(o.dtype) => Register { at: at.cast(), step },
                    Some((at, step)) => {
                        // Rows that repeat are read once.
                        let (rows, apart) = if step == 0 { (1, 0) } else { (rows, columns) };
                        for r in 0..rows {
                            // SAFETY: the rows are inside the operand.
                            unsafe { T::load(o.dtype, at.add(r * step * o.dtype.bytes()), row(r)) };
                        }
                        Register { at: dst, step: apart }
                    }
                    None => {
                        // SAFETY: what is in scratch memory has rows.
                        (0..rows).for_each(|r| unsafe { o.load(block.start + r * block.step, row(r)) });
                        Register { at: dst, step: columns }
                    }
                };
            }
            Action::Step { ref step, register, buffer } => {
                let is_result = register + 1 == self.program.registers;
                let in_buffer = (self.buffers.wrapping_add(buffer * BLOCK), columns);
                let (dst, apart) = through.filter(|_| is_result).unwrap_or(in_buffer);
                let registers = &self.registers;
                // SAFETY: registers that a step reads hold the rows and do not lie where it writes.
                unsafe {
                    let read = |r: u32| Rows::new(registers[r as usize].at, registers[r as usize].step, rows, columns);
                    T::step(step, read, RowsMut::new(dst, apart, rows, columns));
                }
                self.registers[register] = Register { at: dst, step: apart };
            }
        }
    }
}
