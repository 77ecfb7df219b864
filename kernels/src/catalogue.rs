//! What a call costs and needs.

use ltxc_ir::TensorType;
use ltxc_ir::plan::Kernel;

/// Bytes of scratch.
pub fn workspace_bytes(kernel: &Kernel, args: &[&TensorType], results: &[&TensorType], threads: usize) -> usize {
    crate::cpu::need(kernel, args, results[0]).bytes(threads)
}
