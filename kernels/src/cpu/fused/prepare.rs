//! What stands in front of attention, as steps that it does itself.
//!
//! It can norm and then rotate queries and keys, either or both: a norm spans a head or a token with all its heads, and a
//! rotation sees the heads that attention sees. Other orders and shapes run as a whole.

use ltxc_ir::plan::{Fused, Kernel, Part, Source};

use crate::cpu::Arg;
use crate::cpu::attention::Prepare;
use crate::cpu::heads::{Norm, Rotation, Steps};

/// Whether attention can do all that stands in front of it.
pub(super) fn can_prepare(fused: &Fused, anchor: usize) -> bool {
    let [queries, keys] = [0, 1].map(|j| {
        let arg = &fused.parts[anchor].args[j];
        let Source::Part(last) = arg.source else { return true };
        let parts: Vec<&Part> = fused.chain(last as usize).iter().map(|&p| &fused.parts[p]).collect();
        let (heads, d) = (arg.ty.shape[2], arg.ty.shape[3]);
        let can_norm = |part: &Part| match part.kernel {
            Kernel::RmsNorm(_) => part.result.shape.last().is_some_and(|&row| row == d || row == heads * d),
            _ => false,
        };
        let can_rotate = |part: &Part| matches!(part.kernel, Kernel::Rope(_)) && part.result == arg.ty;
        match parts[..] {
            [one] => can_norm(one) || can_rotate(one),
            [first, second] => can_norm(first) && can_rotate(second),
            _ => false,
        }
    });
    queries && keys
}

/// The steps of a call for which [`can_prepare`] holds; `operand` says where an operand lies.
pub(super) fn steps<'a>(fused: &'a Fused, anchor: usize, operand: &dyn Fn(Source) -> *const u8) -> Prepare<'a> {
    [0, 1].map(|j| {
        let Source::Part(last) = fused.parts[anchor].args[j].source else { return None };
        let mut steps = Steps { norm: None, rope: None };
        for part in fused.chain(last as usize).into_iter().map(|p| &fused.parts[p]) {
            let arg = |i: usize| Arg { ty: &part.args[i].ty, ptr: operand(part.args[i].source) };
            match &part.kernel {
                Kernel::RmsNorm(op) => {
                    let row = part.result.shape[part.result.rank() - 1];
                    let weight = (part.args.len() > 1).then(|| arg(1));
                    steps.norm = Some(Norm { eps: op.eps.0 as f32, row, weight });
                }
                Kernel::Rope(op) => steps.rope = Some(Rotation { layout: op.layout, tables: [arg(1), arg(2)] }),
                _ => {}
            }
        }
        Some(steps)
    })
}
