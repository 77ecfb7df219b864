//! What several parts of a fused call compute for one element, as one step list.
//!
//! Registers are, in this order: what the kernel brings (the sum of a product, statistics of a row), operands read where
//! the element says, and steps. Everything but extents, strides and scalars is known when a kernel is built.

use cubecl::prelude::*;
use ltxc_ir::DType;
use ltxc_ir::plan::MapStep;

use super::steps::float_steps;
use super::storage::{decode, encode, load_bits, place};

/// What a kernel is built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Program {
    /// Registers that the kernel brings.
    pub(crate) inputs: usize,
    pub(crate) operands: Vec<Operand>,
    /// Index spaces in which operands are strided: where their extents stand among the numbers, and their rank.
    pub(crate) spaces: Vec<(usize, usize)>,
    pub(crate) steps: Vec<MapStep>,
    /// The register that is stored, where there is one.
    pub(crate) result: usize,
}

impl Default for Program {
    /// Stores what the kernel brings.
    fn default() -> Program {
        Program { inputs: 1, operands: Vec::new(), spaces: Vec::new(), steps: Vec::new(), result: 0 }
    }
}

/// An operand and how it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Operand {
    pub(crate) dtype: DType,
    pub(crate) binding: Binding,
    pub(crate) access: Access,
    /// Set if the element is one of a row that a table of row numbers chooses.
    pub(crate) table: Option<Table>,
}

/// Where an operand is bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Binding {
    pub(crate) index: usize,
    /// Whether a result may lie on it.
    pub(crate) may_overlap: bool,
}

/// The element of an operand for a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    /// The position.
    Flat,
    /// Always the first.
    Constant,
    /// By coordinates: the first of them, how many, and where their strides stand among the numbers.
    Strided(usize, usize, usize),
}

/// Row numbers, and where `[rows of the table, row numbers, elements of a row]` stand among the numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Table {
    pub(crate) rows: Binding,
    pub(crate) first: usize,
}

impl Program {
    /// Whether a register that is no step matters for `targets` after the first `steps` steps.
    fn is_needed(&self, register: usize, steps: usize, targets: &[usize]) -> bool {
        let before = self.inputs + self.operands.len();
        let mut live = vec![false; before + self.steps.len()];
        targets.iter().for_each(|&target| live[target] = true);
        for (i, step) in self.steps[..steps].iter().enumerate().rev() {
            if live[before + i] {
                step.registers().iter().for_each(|&r| live[r as usize] = true);
            }
        }
        live[register]
    }
}

/// What programs read, as an argument of a kernel.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Sources {
    /// Operands that no result lies on.
    reads: Sequence<Array<u32>>,
    overlaps: Overlaps,
    /// Extents and strides.
    numbers: Sequence<u32>,
    scalars: Sequence<f32>,
}

/// Operands that a result may lie on. Kernels only read them, but are told that they write: CUDA compilers assume that
/// nothing else points to what is only read.
#[derive(CubeType)]
pub(crate) struct Overlaps {
    arrays: Sequence<Array<u32>>,
}

impl LaunchArg for Overlaps {
    type RuntimeArg<R: Runtime> = SequenceArg<R, Array<u32>>;
    type CompilationArg = <Sequence<Array<u32>> as LaunchArg>::CompilationArg;

    fn register<R: Runtime>(arg: Self::RuntimeArg<R>, launcher: &mut KernelLauncher<R>) -> Self::CompilationArg {
        <Sequence<Array<u32>>>::register(arg, launcher)
    }

    fn expand(arg: &Self::CompilationArg, builder: &mut KernelBuilder) -> OverlapsExpand {
        OverlapsExpand { arrays: <Sequence<Array<u32>>>::expand_output(arg, builder) }
    }
}

/// What happens to elements before they are stored, as an argument of a kernel.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Tail {
    sources: Sources,
    #[cube(comptime)]
    program: Program,
    /// What they are stored as.
    #[cube(comptime)]
    out: DType,
}

/// The registers for a position after the first `count` steps. Operands that `targets` do not depend on are not read.
#[cube]
pub(crate) fn registers_at(
    inputs: &Sequence<f32>,
    position: u32,
    sources: &Sources,
    #[comptime] program: Program,
    #[comptime] count: usize,
    #[comptime] targets: Vec<usize>,
) -> Sequence<f32> {
    let mut coordinates = Sequence::<u32>::new();
    #[unroll]
    for s in 0..comptime!(program.spaces.len()) {
        push_coordinates(
            &mut coordinates,
            position,
            &sources.numbers,
            comptime!(program.spaces[s].0),
            comptime!(program.spaces[s].1),
        );
    }
    let mut registers = Sequence::<f32>::new();
    #[unroll]
    for i in 0..comptime!(program.inputs) {
        registers.push(*inputs.index(i));
    }
    #[unroll]
    for i in 0..comptime!(program.operands.len()) {
        if comptime!(program.is_needed(program.inputs + i, count, &targets)) {
            let value = load_operand(position, &coordinates, sources, comptime!(program.operands[i]));
            registers.push(value);
        } else {
            registers.push(0f32.runtime());
        }
    }
    if comptime!(count > 0) {
        float_steps(&mut registers, &sources.scalars, comptime!(program.steps[..count].to_vec()));
    }
    registers
}

/// What the value that a kernel computed at a position becomes on its way to memory, as bits at the place of `lane` in
/// their word.
#[cube]
pub(crate) fn finished(value: f32, position: u32, lane: u32, tail: &Tail) -> u32 {
    let mut inputs = Sequence::<f32>::new();
    inputs.push(value);
    let count = comptime!(tail.program.steps.len());
    let result = comptime!(tail.program.result);
    let registers = registers_at(
        &inputs,
        position,
        &tail.sources,
        comptime!(tail.program.clone()),
        count,
        comptime!(vec![tail.program.result]),
    );
    place(encode(*registers.index(result), comptime!(tail.out)), lane, comptime!(tail.out.bytes() as u32))
}

/// Appends the index along each of `rank` axes of a position.
#[cube]
fn push_coordinates(
    coordinates: &mut Sequence<u32>,
    position: u32,
    numbers: &Sequence<u32>,
    #[comptime] first: usize,
    #[comptime] rank: usize,
) {
    let mut reversed = Sequence::<u32>::new();
    let mut rest = position;
    #[unroll]
    for i in 0..rank {
        let a = comptime!(rank - 1 - i);
        if comptime!(a == 0) {
            reversed.push(rest);
        } else {
            let extent = *numbers.index(comptime!(first + a));
            let quotient = rest / extent;
            reversed.push(rest - quotient * extent);
            rest = quotient;
        }
    }
    #[unroll]
    for i in 0..rank {
        coordinates.push(*reversed.index(comptime!(rank - 1 - i)));
    }
}

#[cube]
fn load_operand(position: u32, coordinates: &Sequence<u32>, sources: &Sources, #[comptime] operand: Operand) -> f32 {
    let element = match comptime!(operand.access) {
        Access::Flat => position,
        Access::Constant => 0u32.runtime(),
        Access::Strided(start, rank, first) => strided(coordinates, &sources.numbers, start, rank, first),
    };
    let chosen = if comptime!(operand.table.is_some()) {
        let table = comptime!(operand.table.unwrap_or_default());
        let extent = *sources.numbers.index(comptime!(table.first));
        let count = *sources.numbers.index(comptime!(table.first + 1));
        let inner = *sources.numbers.index(comptime!(table.first + 2));
        let row = element / inner;
        let raw = bound_bits(row % count, sources, comptime!(table.rows), 4u32);
        let number = i32::reinterpret(raw);
        let raised = select(number < 0i32, 0u32, raw);
        let last = extent - 1u32;
        let clamped = select(raised > last, last, raised);
        ((row / count) * extent + clamped) * inner + element % inner
    } else {
        element
    };
    let bits = bound_bits(chosen, sources, comptime!(operand.binding), comptime!(operand.dtype.bytes() as u32));
    decode(bits, comptime!(operand.dtype))
}

#[cube]
fn strided(
    coordinates: &Sequence<u32>,
    numbers: &Sequence<u32>,
    #[comptime] start: usize,
    #[comptime] rank: usize,
    #[comptime] first: usize,
) -> u32 {
    let mut sum = 0u32;
    #[unroll]
    for a in 0..rank {
        sum += *coordinates.index(comptime!(start + a)) * *numbers.index(comptime!(first + a));
    }
    sum
}

#[cube]
fn bound_bits(element: u32, sources: &Sources, #[comptime] binding: Binding, #[comptime] bytes: u32) -> u32 {
    if comptime!(binding.may_overlap) {
        load_bits(sources.overlaps.arrays.index(comptime!(binding.index)), element, bytes)
    } else {
        load_bits(sources.reads.index(comptime!(binding.index)), element, bytes)
    }
}
