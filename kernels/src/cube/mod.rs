//! The kernels of the plan in CubeCL: one source for CUDA (`CudaRuntime`) and for Vulkan and Metal (`WgpuRuntime`).
//!
//! [`launch`] checks what the device can do, chooses a blueprint (what a kernel is built for: dtypes, tiles, number of
//! axes) and enqueues one or a few launches; extents, strides and scalars are arguments, so that one kernel serves many
//! shapes. Arithmetic is f32; memory is 32-bit words (see `storage`). Whoever reads results calls [`guard::sync`] first.
//!
//! | file | what |
//! | --- | --- |
//! | `guard` | failures that CubeCL does not report |
//! | `call`, `index` | launching; positions and strides |
//! | `storage`, `math`, `steps` | dtypes, elementary functions and chains of them inside kernels |
//! | the others | kernels |

mod call;
pub mod guard;
mod index;
mod map;
mod math;
mod steps;
mod storage;

use cubecl::prelude::*;
use cubecl::server::Handle;
use ltxc_ir::TensorType;
use ltxc_ir::plan::Kernel;

use call::Call;

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
    guard::install();
    let arg_types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
    let result_types: Vec<&TensorType> = results.iter().map(|r| r.ty).collect();
    kernel.check(&arg_types, &result_types)?;
    args.iter().chain(results).try_for_each(call::check_tensor)?;
    let out = &results[0];
    if out.ty.elements() == 0 {
        return Ok(());
    }
    let call = Call { client, args, out, workspace };
    match kernel {
        Kernel::Map(op) => map::launch(op, &call),
        _ => Err("not yet".into()),
    }
}

/// Bytes of scratch that a call needs; they may hold anything.
pub fn workspace_bytes(kernel: &Kernel, args: &[&TensorType], results: &[&TensorType]) -> usize {
    let _ = (kernel, args, results);
    0
}
