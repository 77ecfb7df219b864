//! The kernels of the plan in CubeCL: one source for CUDA (`CudaRuntime`) and for Vulkan and Metal (`WgpuRuntime`).
//!
//! [`launch`] checks what the device can do, chooses a blueprint (what a kernel is built for: dtypes, tiles, number of
//! axes) and enqueues one or a few launches; extents, strides and scalars are arguments, so that one kernel serves many
//! shapes. Arithmetic is f32; memory is 32-bit words (see `storage`). Whoever reads results calls [`guard::sync`] first.
//!
//! | file | what |
//! | --- | --- |
//! | `guard` | failures that CubeCL does not report |
//! | `tracked`, `ptx` | which kernels a device was asked for, which had to be compiled, and compiled ones from elsewhere |
//! | `call`, `index` | launching; positions and strides |
//! | `storage`, `math`, `steps` | dtypes, elementary functions and chains of them inside kernels |
//! | `matrix_units`, `tuning` | tensor cores and simdgroup matrices: which there are, and how work is cut for them |
//! | `work`, `schedule`, `compose`, `program` | fused calls: what runs in one launch, and as which program |
//! | `store` | where products and convolutions store what they compute |
//! | the others | kernels |

mod attention;
mod call;
mod compose;
mod conv;
mod copy;
mod direct_conv;
mod fused_rows;
mod gemm;
mod group_norm;
pub mod guard;
mod index;
mod map;
mod math;
mod matmul;
mod matrix_attention;
mod matrix_gemm;
mod matrix_units;
mod movement;
mod norm;
mod patches;
mod program;
#[cfg(feature = "cuda")]
pub mod ptx;
mod reduce;
mod rope;
mod rows;
mod schedule;
mod steps;
mod storage;
mod store;
mod tile;
pub mod tracked;
mod tuning;
mod work;

use cubecl::prelude::*;
use cubecl::server::Handle;
use ltxc_ir::plan::{Kernel, Map, MapStep, MatrixUnit};
use ltxc_ir::{DType, TensorType};

use call::{Call, Choice};
pub use work::Schedule;

/// An operand or result of a kernel call: a sub-range of an arena.
pub struct CubeTensor<'a> {
    /// Its type.
    pub ty: &'a TensorType,
    /// Its memory: at least [`TensorType::bytes`], rounded up to whole words. Bytes behind the last element may be
    /// written.
    pub handle: Handle,
}

/// Enqueues one kernel call.
///
/// The result overlaps no operand, except that it may be exactly an operand that [`Kernel::in_place`] allows, of the same
/// type.
///
/// # Errors
/// If the types do not fit the kernel, or the device cannot run it on them; nothing is launched then. What goes wrong on
/// the device is reported by [`guard::sync`].
pub fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    kernel: &Kernel,
    args: &[CubeTensor<'_>],
    results: &[CubeTensor<'_>],
    workspace: Option<&CubeTensor<'_>>,
) -> Result<(), String> {
    let arg_types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
    let result_types: Vec<&TensorType> = results.iter().map(|r| r.ty).collect();
    kernel.check(&arg_types, &result_types)?;
    let choice = Choice::default();
    launch_checked(
        kernel,
        &Call { client, args, out: &results[0], workspace, tail: None, stores: None, front: None, choice },
    )
}

/// [`launch`] for types that fit the kernel. With a tail, which finishes each element, the result may have another dtype;
/// with stores there are other results; with pads in front the first operand is smaller by them. See `schedule` for which calls may
/// have them.
fn launch_checked<R: Runtime>(kernel: &Kernel, call: &Call<'_, R>) -> Result<(), String> {
    guard::install();
    call.args.iter().chain(call.written()).try_for_each(call::check_tensor)?;
    call::check_extent(call.out.ty)?;
    if call.out.ty.elements() == 0 {
        return Ok(());
    }
    if !needs_f32(kernel, call.out.ty) {
        return run(kernel, call);
    }
    if call.stores.is_some() {
        return Err(format!("`{}` cannot store parts of {}", kernel.name(), call.out.ty));
    }
    // Rows that are not whole words are computed in f32, and rounded by a map.
    let ty = call.out.ty.with_dtype(DType::F32);
    let wide = CubeTensor { ty: &ty, handle: call.scratch(ty.elements())? };
    run(kernel, &Call { out: &wide, workspace: None, tail: None, ..*call })?;
    let narrowed = Call { args: &[wide], workspace: None, tail: None, front: None, ..*call };
    map::launch(&Map { steps: Vec::new() }, &narrowed)
}

/// The matrix units of a device that kernels can use.
pub fn matrix_units<R: Runtime>(client: &ComputeClient<R>) -> Vec<MatrixUnit> {
    matrix_units::all(client.properties())
}

fn run<R: Runtime>(kernel: &Kernel, call: &Call<'_, R>) -> Result<(), String> {
    match kernel {
        Kernel::Map(op) => map::launch(op, call),
        Kernel::Copy(op) => copy::launch(op, call),
        Kernel::Pad(op) => movement::launch_pad(op, call),
        Kernel::Gather(op) => movement::launch_gather(op, call),
        Kernel::Update(op) => movement::launch_update(op, call),
        Kernel::Reduce(op) => reduce::launch(op, call),
        Kernel::Matmul(op) => matmul::launch(op, call),
        Kernel::Conv(op) => conv::launch(op, call),
        Kernel::ConvTranspose(op) => conv::launch_transpose(op, call),
        Kernel::RmsNorm(op) => norm::launch(op.eps.0, false, call),
        Kernel::LayerNorm(op) => norm::launch(op.eps.0, true, call),
        Kernel::GroupNorm(op) => group_norm::launch(op, call),
        Kernel::Rope(op) => rope::launch(op, call),
        Kernel::Attention(op) => attention::launch(op, call),
    }
}

/// What a sum of nothing gives.
fn fill_zeros<R: Runtime>(call: &Call<'_, R>) -> Result<(), String> {
    if call.stores.is_some() {
        return Err("a sum of nothing cannot be stored in parts".into());
    }
    let zero = Map { steps: vec![MapStep::Scalar(ltxc_ir::Float(0.0))] };
    map::launch(&zero, &Call { args: &[], tail: None, front: None, ..*call })
}

/// Whether units would have to share words of the result, so that it is computed in f32 first.
fn needs_f32(kernel: &Kernel, out: &TensorType) -> bool {
    match kernel {
        Kernel::RmsNorm(_) | Kernel::LayerNorm(_) => !norm::is_whole(out),
        Kernel::Rope(op) => !rope::is_whole(op, out),
        Kernel::Attention(_) => !attention::is_whole(out),
        Kernel::Matmul(_) => !matmul::is_whole(out),
        Kernel::Conv(op) => !conv::is_whole(op.groups, out),
        Kernel::ConvTranspose(op) => !conv::is_whole(op.groups, out),
        _ => false,
    }
}

/// Bytes of scratch that a call needs; they may hold anything.
pub fn workspace_bytes(kernel: &Kernel, args: &[&TensorType], results: &[&TensorType]) -> usize {
    let out = results[0];
    if needs_f32(kernel, out) {
        return out.elements().saturating_mul(4);
    }
    match kernel {
        Kernel::GroupNorm(op) => group_norm::workspace_bytes(op, args[0]),
        _ => 0,
    }
}
