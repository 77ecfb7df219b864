//! Several kernels as one.
//!
//! | form | how it runs |
//! | --- | --- |
//! | rows | [`by_rows`]: the ordinary kernels, a few rows at a time |
//! | product | pads are folded into the convolution, and the [`tail`] runs on every finished block of sums |
//!
//! What cannot run so runs by rows too, its anchor as a whole: pads of batch or channels, and tails that [`tail`] refuses.

mod by_rows;
mod scatter;
mod tail;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{Form, Fused, InPlace, Kernel, PartArg, Source};

use super::parallel::{Need, Scratch};
use super::patches::{Grid, Padding};
use super::sink::Sink;
use super::{Arg, Output, conv, matmul};
use tail::{Layout, Tail};

/// A call whose tail runs with its anchor.
struct Together {
    anchor: usize,
    layout: Layout,
}

impl Together {
    /// `None` if the parts have to run one after the other.
    fn new(fused: &Fused) -> Option<Together> {
        let anchor = match fused.form() {
            Ok(Form::Product { anchor, .. }) if Grid::can_pad(&pads(fused, anchor)) => anchor,
            _ => return None,
        };
        Some(Together { anchor, layout: Layout::new(fused, anchor)? })
    }

    fn need(&self, fused: &Fused) -> Need {
        let part = &fused.parts[self.anchor];
        let args: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
        let need = match &part.kernel {
            Kernel::Conv(op) => conv::need(op, &args, &part.result),
            Kernel::ConvTranspose(op) => conv::need_transpose(op, &args, &part.result),
            _ => matmul::need(&args, &part.result),
        };
        need.with_room(self.layout.room)
    }

    /// # Safety
    /// As for [`super::launch`].
    unsafe fn launch(&self, fused: &Fused, args: &[Arg<'_>], results: &[Output<'_>], workspace: &mut [u8]) {
        let scratch = Scratch::new(workspace, self.need(fused));
        let tail = Tail::new(fused, &self.layout, args, results);
        let sink: &dyn Sink = &tail;
        let part = &fused.parts[self.anchor];
        let operands: Vec<Arg<'_>> = part
            .args
            .iter()
            .map(|arg| {
                // What is padded lies where the first pad reads.
                let source = match arg.source {
                    Source::Part(_) => fused.parts[0].args[0].source,
                    operand => operand,
                };
                let ptr = match source {
                    Source::Operand(a) => args[a as usize].ptr,
                    Source::Part(_) => unreachable!("the first part reads operands"),
                };
                Arg { ty: &arg.ty, ptr }
            })
            .collect();
        let out = &part.result;
        // SAFETY: the contract of this function; results are where the tail stores them.
        unsafe {
            match &part.kernel {
                Kernel::Matmul(op) => matmul::launch_into(op, &operands, out, sink, &scratch),
                Kernel::Conv(op) => {
                    conv::launch_into(op, &pads(fused, self.anchor), &operands, out, sink, &scratch);
                }
                Kernel::ConvTranspose(op) => conv::launch_transpose_into(op, &operands, out, sink, &scratch),
                _ => unreachable!("the rule of the form: a product"),
            }
        }
    }
}

/// The pads in front of part `anchor`, in order.
fn pads(fused: &Fused, anchor: usize) -> Vec<Padding<'_>> {
    let pads = fused.parts[..anchor].iter().filter_map(|part| match &part.kernel {
        Kernel::Pad(op) => Some((op, &part.args[0].ty.shape[..])),
        _ => None,
    });
    pads.collect()
}

/// Scratch for a run on `threads` threads.
pub(crate) fn need(fused: &Fused, threads: usize) -> Need {
    match Together::new(fused) {
        Some(together) => together.need(fused),
        None => by_rows::need(fused, threads),
    }
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(fused: &Fused, args: &[Arg<'_>], results: &[Output<'_>], workspace: &mut [u8]) {
    if results.iter().all(|r| r.ty.elements() == 0) {
        return;
    }
    // SAFETY: passed on to the caller.
    unsafe {
        match Together::new(fused) {
            Some(together) => together.launch(fused, args, results, workspace),
            None => by_rows::launch(fused, args, results, workspace),
        }
    }
}

/// Whether part `i` may write its result where it belongs, although an operand may lie there.
fn may_store_at_once(fused: &Fused, i: usize, args: &[Arg<'_>], out: &Output<'_>) -> bool {
    args.iter().zip(0u32..).filter(|(arg, _)| arg.ptr == out.ptr.cast_const()).all(|(_, operand)| {
        let uses = fused.parts.iter().enumerate().flat_map(|(p, part)| {
            let reads = move |a: &&PartArg| a.source == Source::Operand(operand);
            part.args.iter().enumerate().filter(move |(_, a)| reads(a)).map(move |(j, _)| (p, j))
        });
        let in_place: InPlace = fused.parts[i].kernel.in_place();
        uses.into_iter().all(|(p, j)| p < i || (p == i && in_place.allows(j)))
    })
}
