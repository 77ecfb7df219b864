//! What a call costs and needs: a function of kernel and types alone.

use ltxc_ir::TensorType;
use ltxc_ir::ops::OpDef;
use ltxc_ir::plan::{Fused, Kernel, Source, Work};

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
        // Of a table only what is looked up is read.
        Work::Kernel(Kernel::Gather(_)) => {
            let written = of(results[0]);
            written.saturating_add(written.min(of(args[0]))).saturating_add(of(args[1]))
        }
        Work::Kernel(_) => whole(),
        Work::Fused(fused) => {
            let read = args.iter().zip(0..).map(|(ty, a)| of(ty).min(looked_up(fused, a).unwrap_or(u64::MAX)));
            read.chain(results.iter().map(|ty| of(ty))).fold(0, u64::saturating_add)
        }
    }
}

/// Bytes that a fused call looks up in operand `a`; `None` if it does something else with it, too.
fn looked_up(fused: &Fused, a: u32) -> Option<u64> {
    let mut bytes = 0u64;
    for part in &fused.parts {
        for (j, _) in part.args.iter().enumerate().filter(|(_, arg)| arg.source == Source::Operand(a)) {
            match &part.kernel {
                Kernel::Gather(_) if j == 0 => bytes = bytes.saturating_add(part.result.bytes() as u64),
                _ => return None,
            }
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ltxc_ir::DType;
    use ltxc_ir::ops::{Binary, Gather};
    use ltxc_ir::plan::{Copy, Map, MapStep, Part, PartArg};

    #[test]
    fn a_map_counts_its_steps() {
        let ty = TensorType::f32([10]);
        let kernel = Kernel::Map(Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1); 3] }).into();
        assert_eq!(flops(&kernel, &[&ty, &ty], &[&ty]), 30);
        assert_eq!(bytes(&kernel, &[&ty, &ty], &[&ty]), 120);
    }

    #[test]
    fn of_a_table_only_what_is_looked_up_counts() {
        let rows = |n: usize| TensorType::f32([n, 8]);
        let (table, index, out) = (rows(1000), TensorType::new(DType::I32, [3]), rows(3));
        let gather = Kernel::Gather(Gather { axis: 0 });
        assert_eq!(bytes(&gather.clone().into(), &[&table, &index], &[&out]), 2 * 96 + 12);
        // A table that is smaller is read once.
        assert_eq!(bytes(&gather.clone().into(), &[&rows(2), &index], &[&out]), 96 + 64 + 12);
        let operand = |a, ty: &TensorType| PartArg { source: Source::Operand(a), ty: ty.clone() };
        let looked_up = PartArg { source: Source::Part(0), ty: out.clone() };
        let add = Kernel::Map(Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1)] });
        let parts = vec![
            Part { kernel: gather, args: vec![operand(0, &table), operand(1, &index)], result: out.clone() },
            Part { kernel: add, args: vec![looked_up, operand(2, &out)], result: out.clone() },
        ];
        let fused = Fused { pattern: String::new(), parts, stored: vec![1] }.into();
        assert_eq!(bytes(&fused, &[&table, &index, &out], &[&out]), 96 + 12 + 96 + 96);
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
