//! Maps, norms and rotations of fused calls in one launch.
//!
//! With norms a cube owns a row: its units sum up the statistics of each norm, then compute the elements. Without, units
//! share all elements. A unit owns whole words of every result; where pairs are rotated it owns both ends of them, so that
//! results may lie on operands.

use cubecl::prelude::*;
use ltxc_ir::DType;
use ltxc_ir::ops::RopeLayout;

use super::CubeTensor;
use super::call::{Bound, Call, Choice, bind, sources, to_u32};
use super::compose::Rows;
use super::program::{Program, Sources, registers_at};
use super::rows::{Combine, combined, row_units};
use super::storage::{self, encode, place};

/// What a kernel is built for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Blueprint {
    program: Program,
    norms: Vec<Norm>,
    turn: Option<Turn>,
    /// Register and dtype of each result.
    outs: Vec<(usize, DType)>,
    /// Adjacent elements of a unit.
    lanes: u32,
    units: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Norm {
    steps: usize,
    value: usize,
    is_centred: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Turn {
    steps: usize,
    value: usize,
    layout: RopeLayout,
    tables: Program,
}

impl Blueprint {
    fn is_split(&self) -> bool {
        self.turn.as_ref().is_some_and(|t| t.layout == RopeLayout::Split)
    }

    /// Elements of a unit.
    fn each(&self) -> u32 {
        if self.is_split() { 2 * self.lanes } else { self.lanes }
    }
}

/// Adjacent elements that a unit owns.
fn lanes(rows: &Rows, dtypes: impl Iterator<Item = DType>) -> u32 {
    let is_interleaved = rows.rotation.as_ref().is_some_and(|r| r.layout == RopeLayout::Interleaved);
    dtypes.map(storage::per_word).fold(if is_interleaved { 2 } else { 1 }, u32::max)
}

/// Whether words of results of these dtypes lie in one row each, and in one half of a head.
pub(crate) fn is_whole(rows: &Rows, dtypes: impl Iterator<Item = DType>) -> bool {
    let lanes = lanes(rows, dtypes) as usize;
    let channels = rows.channels.unwrap_or(lanes);
    let heads = rows.rotation.as_ref().is_none_or(|r| match r.layout {
        RopeLayout::Split => {
            r.half.is_multiple_of(lanes) && (rows.channels.is_none() || channels.is_multiple_of(2 * r.half))
        }
        RopeLayout::Interleaved => (2 * r.half).is_multiple_of(lanes),
    });
    channels.is_multiple_of(lanes) && heads
}

/// Enqueues the parts; `bound` are their operands, `outs` their results.
///
/// # Errors
/// If there are more elements than the device counts.
pub(crate) fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    rows: &Rows,
    bound: &Bound<'_>,
    outs: &[CubeTensor<'_>],
) -> Result<(), String> {
    let call = Call {
        client,
        args: &[],
        out: &outs[0],
        workspace: None,
        tail: None,
        stores: None,
        front: None,
        choice: Choice::default(),
    };
    let units = if rows.norms.is_empty() { super::call::UNITS } else { row_units(client) };
    let norm = |n: &super::compose::Norm| Norm { steps: n.steps, value: n.value, is_centred: n.is_centred };
    let turn = rows.rotation.as_ref().map(|r| Turn {
        steps: r.steps,
        value: r.value,
        layout: r.layout,
        tables: r.tables.clone(),
    });
    let blueprint = Blueprint {
        program: rows.composed.program.clone(),
        norms: rows.norms.iter().map(norm).collect(),
        turn,
        outs: rows.outs.iter().zip(outs).map(|(&(_, register), out)| (register, out.ty.dtype)).collect(),
        lanes: lanes(rows, outs.iter().map(|o| o.ty.dtype)),
        units,
    };
    let channels = rows.channels.unwrap_or(1);
    let count = match rows.channels {
        Some(channels) => call.cubes(rows.elements / channels)?,
        None => call.linear(rows.elements.div_ceil(blueprint.each() as usize))?.0,
    };
    let mut eps = SequenceArg::new();
    rows.norms.iter().for_each(|n| eps.push(n.eps as f32));
    let half = rows.rotation.as_ref().map_or(1, |r| r.half);
    // SAFETY: units beyond the elements do nothing, and read none; operands broadcast to them.
    unsafe {
        fused_rows::launch_unchecked::<R>(
            client,
            count,
            CubeDim::new_1d(units),
            sources(Some(bound))?,
            outs.iter().map(bind).collect(),
            eps,
            to_u32(rows.elements)?,
            to_u32(rows.elements / channels)?,
            to_u32(channels)?,
            to_u32(half)?,
            blueprint,
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
#[allow(clippy::collapsible_else_if)] // one of the conditions is known when the kernel is built
fn fused_rows(
    sources: &Sources,
    outs: &mut Sequence<Array<u32>>,
    eps: &Sequence<f32>,
    n: u32,
    rows: u32,
    channels: u32,
    half: u32,
    #[comptime] blueprint: Blueprint,
) {
    let each = comptime!(blueprint.each());
    let units = comptime!(blueprint.units);
    let mut inputs = Sequence::<f32>::new();
    if comptime!(blueprint.norms.is_empty()) {
        let group = ABSOLUTE_POS as u32;
        if group * each < n {
            compute(&inputs, group, sources, outs, n, half, comptime!(blueprint.clone()));
        }
    } else {
        let row = CUBE_POS as u32;
        let mut shared = SharedMemory::<f32>::new(comptime!(units as usize));
        if row < rows {
            let base = row * channels;
            #[unroll]
            for j in 0..comptime!(blueprint.norms.len()) {
                let norm = comptime!(blueprint.norms[j]);
                let padded = with_zeros(&inputs, comptime!(blueprint.program.inputs));
                let mut mean = 0f32.runtime();
                if comptime!(norm.is_centred) {
                    let mut sum = 0f32.runtime();
                    let mut i = UNIT_POS;
                    while i < channels {
                        sum += value_at(
                            &padded,
                            base + i,
                            sources,
                            comptime!(blueprint.program.clone()),
                            comptime!(norm.steps),
                            comptime!(norm.value),
                        );
                        i += units;
                    }
                    mean = combined(&mut shared, sum, units, Combine::Sum) / f32::cast_from(channels);
                }
                let mut squares = 0f32.runtime();
                let mut i = UNIT_POS;
                while i < channels {
                    let value = value_at(
                        &padded,
                        base + i,
                        sources,
                        comptime!(blueprint.program.clone()),
                        comptime!(norm.steps),
                        comptime!(norm.value),
                    ) - mean;
                    squares += value * value;
                    i += units;
                }
                let total = combined(&mut shared, squares, units, Combine::Sum);
                let factor = (total / f32::cast_from(channels) + *eps.index(j)).inverse_sqrt();
                inputs.push(mean);
                inputs.push(factor);
            }
            let groups = channels / each;
            let mut group = UNIT_POS;
            while group < groups {
                compute(&inputs, row * groups + group, sources, outs, n, half, comptime!(blueprint.clone()));
                group += units;
            }
        }
    }
}

/// Computes and stores the elements of a unit.
#[cube]
fn compute(
    inputs: &Sequence<f32>,
    group: u32,
    sources: &Sources,
    outs: &mut Sequence<Array<u32>>,
    n: u32,
    half: u32,
    #[comptime] blueprint: Blueprint,
) {
    let lanes = comptime!(blueprint.lanes);
    let each = comptime!(blueprint.each() as usize);
    let program = comptime!(blueprint.program.clone());
    let mut first = group * lanes;
    if comptime!(blueprint.is_split()) {
        let head = first / half;
        first += head * half;
    }
    let mut positions = Sequence::<u32>::new();
    #[unroll]
    for i in 0..each {
        if comptime!(i as u32 >= lanes) {
            positions.push(first + half + comptime!(i as u32 - lanes));
        } else {
            positions.push(first + comptime!(i as u32));
        }
    }
    let mut turned = Sequence::<f32>::new();
    if comptime!(blueprint.turn.is_some()) {
        // This branch is built for a blueprint with one only.
        let turn = comptime!(blueprint.turn.clone().expect("the condition saw it"));
        let is_split = comptime!(turn.layout == RopeLayout::Split);
        let padded = with_zeros(inputs, comptime!(program.inputs));
        let mut values = Sequence::<f32>::new();
        #[unroll]
        for i in 0..each {
            values.push(value_at(
                &padded,
                *positions.index(i),
                sources,
                comptime!(program.clone()),
                comptime!(turn.steps),
                comptime!(turn.value),
            ));
        }
        let none = Sequence::<f32>::new();
        #[unroll]
        for i in 0..each {
            let pair = if is_split {
                group * lanes + comptime!(i as u32 % lanes)
            } else {
                (group * lanes) / 2u32 + comptime!(i as u32 / 2)
            };
            let tables =
                registers_at(&none, pair, sources, comptime!(turn.tables.clone()), 0usize, comptime!(vec![0, 1]));
            let (c, s) = (*tables.index(0usize), *tables.index(1usize));
            let own = *values.index(i);
            let is_first = comptime!(if is_split { (i as u32) < lanes } else { i % 2 == 0 });
            let other = *values.index(comptime!(if is_split { (i + each / 2) % each } else { i ^ 1 }));
            if is_first {
                turned.push(own * c - other * s);
            } else {
                turned.push(own * c + other * s);
            }
        }
    }
    let mut bits = Sequence::<u32>::new();
    let targets = comptime!(blueprint.outs.iter().map(|o| o.0).collect::<Vec<usize>>());
    #[unroll]
    for i in 0..each {
        let position = *positions.index(i);
        let inside = if comptime!(blueprint.norms.is_empty() && blueprint.turn.is_none()) {
            select(position < n, position, n - 1u32)
        } else {
            position
        };
        let known = inputs.len();
        let mut own = with_zeros(inputs, known);
        if comptime!(blueprint.turn.is_some()) {
            own.push(*turned.index(i));
        }
        let registers = registers_at(
            &own,
            inside,
            sources,
            comptime!(program.clone()),
            comptime!(program.steps.len()),
            comptime!(targets.clone()),
        );
        #[unroll]
        for o in 0..comptime!(blueprint.outs.len()) {
            let value = *registers.index(comptime!(blueprint.outs[o].0));
            bits.push(encode(value, comptime!(blueprint.outs[o].1)));
        }
    }
    let count = comptime!(blueprint.outs.len());
    #[unroll]
    for o in 0..count {
        let per_word = comptime!(storage::per_word(blueprint.outs[o].1) as usize);
        #[unroll]
        for w in 0..comptime!(each / per_word) {
            let mut word = 0u32;
            #[unroll]
            for l in 0..per_word {
                let element = *bits.index(comptime!((w * per_word + l) * count + o));
                word |= place(element, comptime!(l as u32).runtime(), comptime!(4 / per_word as u32));
            }
            let position = *positions.index(comptime!(w * per_word));
            if position < n {
                outs.index_mut(o)[(position / comptime!(per_word as u32)) as usize] = word;
            }
        }
    }
}

/// The inputs, with zeros for those that are not known yet.
#[cube]
fn with_zeros(inputs: &Sequence<f32>, #[comptime] count: usize) -> Sequence<f32> {
    let mut all = Sequence::<f32>::new();
    #[unroll]
    for i in 0..count {
        let known = inputs.len();
        if comptime!(i < known) {
            all.push(*inputs.index(i));
        } else {
            all.push(0f32.runtime());
        }
    }
    all
}

/// One register for a position after some steps.
#[cube]
fn value_at(
    inputs: &Sequence<f32>,
    position: u32,
    sources: &Sources,
    #[comptime] program: Program,
    #[comptime] steps: usize,
    #[comptime] value: usize,
) -> f32 {
    let registers = registers_at(inputs, position, sources, program, steps, comptime!(vec![value]));
    *registers.index(value)
}
