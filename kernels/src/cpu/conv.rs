//! `conv` and `conv_transpose`: blocked products of patches and weights, one for each [`Grid`] and group of channels.
//!
//! Patches are read where rows of the left operand are packed, so the input is never unfolded as a whole. With one
//! channel per group there is nothing to multiply out: see [`depthwise`].

use ltxc_ir::TensorType;
use ltxc_ir::ops::{Conv, ConvTranspose};

use super::depthwise;
use super::gemm::{self, Target};
use super::pack::Matrix;
use super::parallel::{Need, Scratch};
use super::patches::{Front, Grid, Patches, TapWeights};
use super::sink::{Memory, Sink};
use super::{Arg, Output};

/// Scratch, besides what a sink needs for each thread.
pub(crate) fn need(op: &Conv, args: &[&TensorType], out: &TensorType) -> Need {
    need_of_grid(&Grid::of_conv(op, args[0], args[1], out))
}

/// As [`need`].
pub(crate) fn need_transpose(op: &ConvTranspose, args: &[&TensorType], out: &TensorType) -> Need {
    Grid::of_transpose(op, args[0], args[1], out).fold(Need::default(), |all, grid| {
        let need = need_of_grid(&grid);
        Need { shared: all.shared.max(need.shared), per_thread: all.per_thread.max(need.per_thread) }
    })
}

fn need_of_grid(grid: &Grid) -> Need {
    if depthwise::fits(grid) { depthwise::need(grid) } else { gemm::need(grid.extents()) }
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(op: &Conv, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let scratch = Scratch::new(workspace, need(op, &[args[0].ty, args[1].ty], out.ty));
    // SAFETY: passed on to the caller.
    unsafe { launch_into(op, &Front::default(), args, out.ty, &Memory::new(out), &scratch) };
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch_transpose(op: &ConvTranspose, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    let scratch = Scratch::new(workspace, need_transpose(op, &[args[0].ty, args[1].ty], out.ty));
    // SAFETY: passed on to the caller.
    unsafe { launch_transpose_into(op, &Front::default(), args, out.ty, &Memory::new(out), &scratch) };
}

/// Gives the result, of type `out`, to `sink`. The first operand is what `front` makes of the memory it points to.
///
/// # Safety
/// As for [`super::launch`]; `scratch` was made for [`need`] and the sink; the first operand is valid for what `front`
/// reads.
pub(crate) unsafe fn launch_into(
    op: &Conv,
    front: &Front<'_>,
    args: &[Arg<'_>],
    out: &TensorType,
    sink: &dyn Sink,
    scratch: &Scratch<'_>,
) {
    let grid = Grid::of_conv(op, args[0].ty, args[1].ty, out).behind(front);
    // SAFETY: the grid is that of the operands.
    unsafe { launch_grid(&grid, args, sink, scratch) };
}

/// As [`launch_into`].
///
/// # Safety
/// As for [`launch_into`]; `scratch` was made for [`need_transpose`] and the sink.
pub(crate) unsafe fn launch_transpose_into(
    op: &ConvTranspose,
    front: &Front<'_>,
    args: &[Arg<'_>],
    out: &TensorType,
    sink: &dyn Sink,
    scratch: &Scratch<'_>,
) {
    for grid in Grid::of_transpose(op, args[0].ty, args[1].ty, out) {
        // SAFETY: the grids are those of the operands.
        unsafe { launch_grid(&grid.behind(front), args, sink, scratch) };
    }
}

/// # Safety
/// As for [`super::launch`]; the grid describes the operands, and `scratch` is what it and the sink need.
unsafe fn launch_grid(grid: &Grid, args: &[Arg<'_>], sink: &dyn Sink, scratch: &Scratch<'_>) {
    if depthwise::fits(grid) {
        // SAFETY: passed on to the caller.
        return unsafe { depthwise::launch(grid, args, sink, scratch) };
    }
    let (x, w) = (&args[0], &args[1]);
    let e = grid.extents();
    let weights = Matrix { ptr: w.ptr, dtype: w.ty.dtype, stride: grid.co, transposed: false };
    let kernel_positions = grid.kernel_positions();
    for group in 0..grid.groups {
        let patches = Patches::new(grid, x.ptr, x.ty.dtype, group);
        let weights = TapWeights {
            weights: weights.offset(group * e.n),
            kernel_positions: kernel_positions.clone(),
            channels: grid.ci / grid.groups,
        };
        let row = |r: usize| grid.target(r) + group * e.n;
        let target = Target { sink, row: &row };
        // SAFETY: positions of a grid, and columns of a group, are disjoint parts of the result.
        unsafe { gemm::product(e, &patches, &weights, &target, scratch) };
    }
}
