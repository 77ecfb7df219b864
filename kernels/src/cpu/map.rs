//! `map`: chains of pointwise functions over operands that broadcast.
//!
//! The result is computed in blocks of [`BLOCK`] consecutive elements. Every step works on a whole block before the next
//! one begins, in buffers that stay in the first cache, so dtype and function are looked at once per block. An operand
//! that already lies in memory as the lanes need it is read where it is, and the last step writes to the result itself
//! unless that would change an operand. Buffers are given out by lifetime: a long chain needs few of them.

use ltxc_ir::plan::{Map, MapStep};
use ltxc_ir::types::MAX_RANK;
use ltxc_ir::{DType, TensorType};

use super::lanes::Lane;
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
    // One for each register and one for the result, at most.
    let buffers = args.len() + map.steps.len() + 1;
    Need { shared: 0, per_thread: buffers.saturating_mul(BLOCK * lane) }
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
    let program = Program::new(&map.steps, args, out);
    let n = out.ty.elements();
    let per_task = BLOCK * BLOCKS;
    let result = Shared::new(out.ptr);
    for_each(n.div_ceil(per_task), n.saturating_mul(program.weight), |task| {
        // SAFETY: called once per task; the slot has room for the buffers of the program, whatever their lanes.
        let mut frame = unsafe { Frame::<T>::new(&program, scratch.slot().as_mut_ptr().cast()) };
        let end = n.min((task + 1) * per_task);
        for start in (task * per_task..end).step_by(BLOCK) {
            // SAFETY: tasks own disjoint ranges of the result, and operands are read there or are not the result.
            unsafe { frame.block(start, BLOCK.min(end - start), result.get()) };
        }
    });
}

/// An operand as seen from the flat positions of the result.
struct Operand {
    ptr: *const u8,
    dtype: DType,
    /// Extent and stride of merged axes, outermost first. The last stride is 0 or 1.
    axes: Vec<(usize, usize)>,
}

// SAFETY: only read, and valid for the time of a launch by the contract of `launch`.
unsafe impl Sync for Operand {}

impl Operand {
    fn new(arg: &Arg<'_>, out: &[usize]) -> Operand {
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
        Operand { ptr: arg.ptr, dtype: arg.ty.dtype, axes }
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

    /// Reads the elements of `dst.len()` positions from `start`.
    ///
    /// # Safety
    /// The operand is valid, and the positions are inside the result.
    unsafe fn load<T: Lane>(&self, start: usize, dst: &mut [T]) {
        let bytes = self.dtype.bytes();
        let load = |offset: usize, dst: &mut [T]| {
            // SAFETY: offsets of positions inside the result are inside the operand.
            unsafe { T::load(self.dtype, self.ptr.add(offset * bytes), dst) }
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

struct Program {
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
    fn new(steps: &[MapStep], args: &[Arg<'_>], out: &Output<'_>) -> Program {
        let operands: Vec<Operand> = args.iter().map(|a| Operand::new(a, &out.ty.shape)).collect();
        let registers = args.len() + steps.len();
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
            let register = args.len() + j;
            at[register] = buffers.take();
            constants.push(Action::Step { step: *step, register, buffer: at[register] });
        }
        let held = buffers.taken;
        let fetch = |operand: usize, at: &mut [usize], buffers: &mut Buffers, actions: &mut Vec<Action>| {
            if operand < args.len() && at[operand] == NONE {
                at[operand] = buffers.take();
                actions.push(Action::Load { operand, buffer: at[operand] });
            }
        };
        for (j, step) in steps.iter().enumerate() {
            let register = args.len() + j;
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
            dtype: out.ty.dtype,
            may_write_through: args.iter().all(|a| a.ptr != out.ptr.cast_const()),
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
struct Frame<'a, T> {
    program: &'a Program,
    buffers: *mut T,
    /// Where each register lies.
    at: Vec<*const T>,
}

impl<'a, T: Lane> Frame<'a, T> {
    /// # Safety
    /// `buffers` has room for the buffers of the program, and nothing else uses it while the frame lives.
    unsafe fn new(program: &'a Program, buffers: *mut T) -> Frame<'a, T> {
        let mut frame = Frame { program, buffers, at: vec![std::ptr::null(); program.registers] };
        for action in &program.constants {
            // SAFETY: constants are the same in every block.
            unsafe { frame.act(action, 0, BLOCK, std::ptr::null_mut()) };
        }
        frame
    }

    /// Computes `n` elements from `start`.
    ///
    /// # Safety
    /// They are inside the result, which begins at `result`, and nothing else uses them.
    unsafe fn block(&mut self, start: usize, n: usize, result: *mut u8) {
        let program = self.program;
        // SAFETY: the position is inside the result.
        let result = unsafe { result.add(start * program.dtype.bytes()) };
        let through = if program.may_write_through && T::DTYPE == Some(program.dtype) {
            result.cast()
        } else {
            std::ptr::null_mut()
        };
        for action in &program.actions {
            // SAFETY: actions are in order of their registers.
            unsafe { self.act(action, start, n, through) };
        }
        let last = self.at[program.registers - 1];
        if last.cast() != result.cast_const() {
            // SAFETY: a register holds `n` lanes, and is the result only if it begins there.
            unsafe { T::store(program.dtype, std::slice::from_raw_parts(last, n), result) };
        }
    }

    /// # Safety
    /// Registers that the action reads are set; the block is inside the result. `through` is null or where the result of
    /// the block may be written as lanes.
    #[inline]
    unsafe fn act(&mut self, action: &Action, start: usize, n: usize, through: *mut T) {
        match *action {
            Action::Load { operand, buffer } => {
                let o = &self.program.operands[operand];
                let in_place = if T::DTYPE == Some(o.dtype) { o.run_at(start, n) } else { None };
                if let Some(offset) = in_place {
                    self.at[operand] = o.ptr.cast::<T>().wrapping_add(offset);
                    return;
                }
                let dst = self.buffers.wrapping_add(buffer * BLOCK);
                // SAFETY: a buffer holds a block, and no register that is still read lies in it.
                unsafe { o.load(start, std::slice::from_raw_parts_mut(dst, n)) };
                self.at[operand] = dst;
            }
            Action::Step { ref step, register, buffer } => {
                let is_result = register + 1 == self.program.registers && !through.is_null();
                let dst = if is_result { through } else { self.buffers.wrapping_add(buffer * BLOCK) };
                let at = &self.at;
                // SAFETY: registers that a step reads hold `n` lanes and do not lie where it writes.
                unsafe {
                    let register = |r: u32| std::slice::from_raw_parts(at[r as usize], n);
                    T::step(step, register, std::slice::from_raw_parts_mut(dst, n));
                }
                self.at[register] = dst;
            }
        }
    }
}
