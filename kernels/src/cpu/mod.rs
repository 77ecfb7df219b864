//! The native CPU backend: every kernel of the plan on this machine, on all threads of the current rayon pool.
//!
//! [`launch`] looks at dtypes and attributes once and then runs loops over slices. Arithmetic is f32 whatever the dtype
//! of the operands: narrower ones are widened in panels or rows where they are used, results are rounded once when they
//! are stored. The same call gives the same bytes with any number of threads.
//!
//! | file | what |
//! | --- | --- |
//! | `simd` | instruction sets |
//! | `math` | elementary functions |
//! | `element` | dtypes in memory |
//! | `parallel` | threads and scratch memory |
//! | `tile`, `pack`, `gemm` | blocked matrix product |
//! | `patches` | the input under a convolution as operand of a product |
//! | `fused` | several kernels as one |
//! | the others | kernels |

mod attention;
mod conv;
mod copy;
mod depthwise;
mod element;
mod fused;
mod gemm;
mod group_norm;
mod lanes;
mod map;
mod math;
mod matmul;
mod movement;
mod norm;
mod pack;
mod parallel;
mod patches;
mod reduce;
mod rope;
mod simd;
mod tile;
mod transpose;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{Kernel, Work};

pub(crate) use map::weight as step_weight;
pub use parallel::threads;

/// An operand of a kernel call.
#[derive(Clone, Copy, Debug)]
pub struct Arg<'a> {
    /// Its type.
    pub ty: &'a TensorType,
    /// Its first element.
    pub ptr: *const u8,
}

/// A result of a kernel call.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// Its type.
    pub ty: &'a TensorType,
    /// Its first element.
    pub ptr: *mut u8,
}

// SAFETY: operands are only read, and valid for the time of a launch by the contract of `launch`.
unsafe impl Sync for Arg<'_> {}
// SAFETY: tasks of a launch write disjoint parts; each writes in an unsafe block that says which.
unsafe impl Sync for Output<'_> {}

/// Does `work`. Returns when the results are complete.
///
/// # Safety
/// - [`Work::check`] accepts the types, which fit into memory ([`TensorType::checked_bytes`]);
/// - every pointer is valid for the bytes of its type, and aligned to its dtype;
/// - a result overlaps no other result and no operand, except that it may be exactly an operand that
///   [`Work::may_overwrite`] allows, of the same type; nobody else writes to operands or reads results meanwhile.
///
/// # Panics
/// If `workspace` is smaller than [`crate::catalogue::workspace_bytes`] says for this call and [`threads`].
pub unsafe fn launch(work: &Work, args: &[Arg<'_>], results: &[Output<'_>], workspace: &mut [u8]) {
    // SAFETY: the contract of this function is the contract of each kernel.
    unsafe {
        match work {
            Work::Kernel(kernel) => launch_kernel(kernel, args, &results[0], workspace),
            Work::Fused(fused) => fused::launch(fused, args, results, workspace),
        }
    }
}

/// Runs one kernel.
///
/// # Safety
/// As for [`launch`].
unsafe fn launch_kernel(kernel: &Kernel, args: &[Arg<'_>], out: &Output<'_>, workspace: &mut [u8]) {
    if out.ty.elements() == 0 {
        return;
    }
    // SAFETY: the contract of this function is the contract of each kernel.
    unsafe {
        match kernel {
            Kernel::Matmul(op) => matmul::launch(op, args, out, workspace),
            Kernel::Map(map) => map::launch(map, args, out, workspace),
            Kernel::Copy(op) => copy::launch(op, args, out),
            Kernel::Pad(op) => movement::launch_pad(op, args, out),
            Kernel::Gather(op) => movement::launch_gather(op, args, out),
            Kernel::Update(op) => movement::launch_update(op, args, out),
            Kernel::Reduce(op) => reduce::launch(op, args, out),
            Kernel::RmsNorm(op) => norm::launch_rms(op, args, out, workspace),
            Kernel::LayerNorm(op) => norm::launch_layer(op, args, out, workspace),
            Kernel::GroupNorm(op) => group_norm::launch(op, args, out, workspace),
            Kernel::Rope(op) => rope::launch(op, args, out, workspace),
            Kernel::Conv(op) => conv::launch(op, args, out, workspace),
            Kernel::Attention(op) => attention::launch(op, args, out, workspace),
            Kernel::ConvTranspose(op) => conv::launch_transpose(op, args, out, workspace),
        }
    }
}

/// Scratch that a call needs on `threads` threads.
pub(crate) fn need(work: &Work, args: &[&TensorType], results: &[&TensorType], threads: usize) -> parallel::Need {
    match work {
        Work::Kernel(kernel) => need_kernel(kernel, args, results[0]),
        Work::Fused(fused) => fused::need(fused, threads),
    }
}

fn need_kernel(kernel: &Kernel, args: &[&TensorType], out: &TensorType) -> parallel::Need {
    match kernel {
        Kernel::Matmul(_) => matmul::need(args, out),
        Kernel::Map(map) => map::need(map, args, out),
        Kernel::Attention(_) => attention::need(args),
        Kernel::RmsNorm(_) | Kernel::LayerNorm(_) => norm::need(args),
        Kernel::GroupNorm(op) => group_norm::need(op, args),
        Kernel::Rope(_) => rope::need(args),
        Kernel::Conv(op) => conv::need(op, args, out),
        Kernel::ConvTranspose(op) => conv::need_transpose(op, args, out),
        _ => Default::default(),
    }
}
