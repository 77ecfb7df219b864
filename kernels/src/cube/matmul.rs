//! `matmul`: a product of matrices in memory.

use cubecl::prelude::*;
use ltxc_ir::TensorType;
use ltxc_ir::ops::Matmul;

use super::call::Call;
use super::gemm::{self, Product};
use super::storage;

/// Whether words of the result lie in one row each.
pub(crate) fn is_whole(out: &TensorType) -> bool {
    out.shape.last().is_some_and(|n| n.is_multiple_of(storage::per_word(out.dtype) as usize))
}

pub(crate) fn launch<R: Runtime>(op: &Matmul, call: &Call<'_, R>) -> Result<(), String> {
    let (a, b, out) = (call.args[0].ty, call.args[1].ty, call.out.ty);
    let r = out.rank();
    let (m, n, k) = (out.shape[r - 2], out.shape[r - 1], a.shape[r - 1]);
    let batches: usize = out.shape[..r - 2].iter().product();
    let is_shared = b.rank() == 2;
    // One right matrix for all batches: they are rows of one product.
    let (m, batches) = if is_shared { (m * batches, 1) } else { (m, batches) };
    let product = Product {
        m,
        n,
        k,
        batches,
        rows: [k, if op.transpose_rhs { k } else { n }, n],
        batch: [m * k, n * k, m * n],
        is_transposed: op.transpose_rhs,
        patches: None,
    };
    if k == 0 { super::fill_zeros(call) } else { gemm::launch(&product, call) }
}
