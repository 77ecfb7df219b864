//! What a call costs and needs: a function of kernel and types alone.

use ltxc_ir::TensorType;
use ltxc_ir::ops::OpDef;
use ltxc_ir::plan::{Kernel, Work};

/// Bytes of scratch that a call needs on `threads` threads of the CPU backend.
pub fn workspace_bytes(work: &Work, args: &[&TensorType], results: &[&TensorType], threads: usize) -> usize {
    crate::cpu::need(work, args, results, threads).bytes(threads)
}

/// Floating point operations of a call; 0 if it only moves data. An exponential or the like counts as 8.
pub fn flops(work: &Work, args: &[&TensorType], results: &[&TensorType]) -> u64 {
    match work {
        Work::Kernel(kernel) => kernel_flops(kernel, args, results[0]),
        Work::Fused(fused) => {
            let parts = fused.parts.iter().map(|part| {
                let args: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
                kernel_flops(&part.kernel, &args, &part.result)
            });
            parts.fold(0, u64::saturating_add)
        }
    }
}

fn kernel_flops(kernel: &Kernel, args: &[&TensorType], out: &TensorType) -> u64 {
    match kernel {
        Kernel::Map(map) => {
            (out.elements() as u64).saturating_mul(map.steps.iter().map(|s| crate::cpu::step_weight(s) as u64).sum())
        }
        Kernel::Copy(_) => 0,
        Kernel::Pad(op) => op.flops(args, out),
        Kernel::Gather(op) => op.flops(args, out),
        Kernel::Update(op) => op.flops(args, out),
        Kernel::Reduce(op) => op.flops(args, out),
        Kernel::Matmul(op) => op.flops(args, out),
        Kernel::Conv(op) => op.flops(args, out),
        Kernel::ConvTranspose(op) => op.flops(args, out),
        Kernel::RmsNorm(op) => op.flops(args, out),
        Kernel::LayerNorm(op) => op.flops(args, out),
        Kernel::GroupNorm(op) => op.flops(args, out),
        Kernel::Rope(op) => op.flops(args, out),
        Kernel::Attention(op) => op.flops(args, out),
    }
}

/// Bytes that a call reads and writes at least, every element once.
pub fn bytes(work: &Work, args: &[&TensorType], results: &[&TensorType]) -> u64 {
    let of = |ty: &TensorType| ty.bytes() as u64;
    let whole = || args.iter().chain(results).map(|t| of(t)).fold(0, u64::saturating_add);
    match work {
        Work::Kernel(Kernel::Copy(op)) => {
            let moved = op.shape.iter().fold(results[0].dtype.bytes() as u64, |n, &d| n.saturating_mul(d as u64));
            // Repeated elements are read once.
            moved.saturating_add(moved.min(of(args[0])))
        }
        Work::Kernel(Kernel::Gather(_)) => of(results[0]).saturating_mul(2).saturating_add(of(args[1])),
        _ => whole(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ltxc_ir::ops::Binary;
    use ltxc_ir::plan::{Copy, Map, MapStep};

    #[test]
    fn a_map_counts_its_steps() {
        let ty = TensorType::f32([10]);
        let kernel = Kernel::Map(Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1); 3] }).into();
        assert_eq!(flops(&kernel, &[&ty, &ty], &[&ty]), 30);
        assert_eq!(bytes(&kernel, &[&ty, &ty], &[&ty]), 120);
    }

    #[test]
    fn a_copy_counts_what_it_moves() {
        let (src, dst) = (TensorType::f32([4]), TensorType::f32([100]));
        let strides = |a| vec![a, 1];
        let kernel = Work::Kernel(Kernel::Copy(Copy {
            shape: vec![5, 4],
            src_offset: 0,
            src_strides: strides(0),
            dst_offset: 0,
            dst_strides: strides(4),
        }));
        assert_eq!(bytes(&kernel, &[&src], &[&dst]), 16 + 80);
    }
}
