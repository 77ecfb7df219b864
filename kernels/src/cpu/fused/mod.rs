//! Several kernels as one.
//!
//! | form | how it runs |
//! | --- | --- |
//! | rows | [`by_rows`]: the ordinary kernels, a few rows at a time |
//! | product | a leaky ReLU and pads are folded into the convolution, and the [`tail`] runs on every finished block of sums |
//! | attention | queries and keys are [prepared](prepare) where they are loaded, and the tail runs on every block of queries |
//! | group norm | the tail runs on every chunk of rows as it is normed |
//!
//! A call of one part is that kernel. What cannot run so runs by rows too, its anchor as a whole: pads of batch or channels,
//! what [`prepare`] does not know, and tails that [`tail`] refuses.

mod by_rows;
mod prepare;
mod scatter;
mod tail;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{Form, Fused, InPlace, Kernel, PartArg, Source};

use super::parallel::{Need, Scratch};
use super::patches::{Front, Grid};
use super::sink::Sink;
use super::{Arg, Output, attention, conv, group_norm, launch_kernel, matmul, need_kernel};
use tail::{Layout, Tail};

/// A call whose tail runs with its anchor.
struct Together<'a> {
    fused: &'a Fused,
    anchor: usize,
    layout: Layout,
}

impl<'a> Together<'a> {
    /// `None` if the parts have to run one after the other.
    fn new(fused: &'a Fused, form: Option<Form>) -> Option<Together<'a>> {
        let anchor = match form? {
            Form::Product { anchor, .. } if Grid::can_have(&front(fused, anchor)) => anchor,
            Form::Attention { anchor, .. } if prepare::can_prepare(fused, anchor) => anchor,
            Form::GroupNorm { .. } => 0,
            _ => return None,
        };
        Some(Together { fused, anchor, layout: Layout::new(fused, anchor)? })
    }

    fn need(&self) -> Need {
        let part = &self.fused.parts[self.anchor];
        let args: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
        let need = match &part.kernel {
            Kernel::Matmul(_) => matmul::need(&args, &part.result),
            Kernel::Conv(op) => conv::need(op, &args, &part.result),
            Kernel::ConvTranspose(op) => conv::need_transpose(op, &args, &part.result),
            Kernel::Attention(_) => {
                // Types are enough to know what is needed.
                let nowhere = |_| std::ptr::null();
                attention::need(&args, &prepare::steps(self.fused, self.anchor, &nowhere))
            }
            Kernel::GroupNorm(op) => group_norm::need(op, &args),
            kernel => unreachable!("`{}` is no anchor", kernel.name()),
        };
        need.with_room(self.layout.room)
    }

    /// # Safety
    /// As for [`super::launch`].
    unsafe fn launch(&self, args: &[Arg<'_>], results: &[Output<'_>], workspace: &mut [u8]) {
        let scratch = Scratch::new(workspace, self.need());
        let tail = Tail::new(self.fused, &self.layout, args, results);
        let sink: &dyn Sink = &tail;
        let part = &self.fused.parts[self.anchor];
        let operand = |source| match source {
            Source::Operand(a) => args[a as usize].ptr,
            // What is padded, activated, normed or rotated lies where the first part of the chain reads.
            Source::Part(last) => match self.fused.parts[self.fused.chain(last as usize)[0]].args[0].source {
                Source::Operand(a) => args[a as usize].ptr,
                Source::Part(_) => unreachable!("a chain begins with an operand"),
            },
        };
        let operands: Vec<Arg<'_>> =
            part.args.iter().map(|arg| Arg { ty: &arg.ty, ptr: operand(arg.source) }).collect();
        let out = &part.result;
        // SAFETY: the contract of this function; results are where the tail stores them.
        unsafe {
            match &part.kernel {
                Kernel::Matmul(op) => matmul::launch_into(op, &operands, out, sink, &scratch),
                Kernel::Conv(op) => {
                    conv::launch_into(op, &front(self.fused, self.anchor), &operands, out, sink, &scratch);
                }
                Kernel::ConvTranspose(op) => {
                    conv::launch_transpose_into(op, &front(self.fused, self.anchor), &operands, out, sink, &scratch);
                }
                Kernel::Attention(op) => {
                    let steps = prepare::steps(self.fused, self.anchor, &operand);
                    attention::launch_into(op, &operands, &steps, sink, &scratch);
                }
                Kernel::GroupNorm(op) => group_norm::launch_into(op, &operands, sink, &scratch),
                kernel => unreachable!("`{}` is no anchor", kernel.name()),
            }
        }
    }
}

/// What stands in front of part `anchor`.
fn front(fused: &Fused, anchor: usize) -> Front<'_> {
    let parts = &fused.parts[..anchor];
    let pads = parts.iter().filter_map(|part| match &part.kernel {
        Kernel::Pad(op) => Some((op, &part.args[0].ty.shape[..])),
        _ => None,
    });
    let slope = parts.first().and_then(|part| part.leaky_slope());
    Front { slope: slope.map(|slope| slope.0 as f32), pads: pads.collect() }
}

/// Scratch for a run on `threads` threads.
pub(crate) fn need(fused: &Fused, threads: usize) -> Need {
    let form = fused.form().ok();
    let need = match Together::new(fused, form) {
        Some(together) => together.need(),
        None => by_rows::need(fused, form, threads),
    };
    match &fused.parts[..] {
        [part] => {
            let args: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
            need.max(need_kernel(&part.kernel, &args, &part.result))
        }
        _ => need,
    }
}

/// # Safety
/// As for [`super::launch`].
pub(crate) unsafe fn launch(fused: &Fused, args: &[Arg<'_>], results: &[Output<'_>], workspace: &mut [u8]) {
    if results.iter().all(|r| r.ty.elements() == 0) {
        return;
    }
    if let ([part], [out]) = (&fused.parts[..], results)
        && may_store_at_once(fused, 0, args, out)
    {
        let operand = |arg: &'_ PartArg| match arg.source {
            Source::Operand(a) => args[a as usize].ptr,
            Source::Part(_) => unreachable!("the first part reads operands"),
        };
        let operands: Vec<Arg<'_>> = part.args.iter().map(|arg| Arg { ty: &arg.ty, ptr: operand(arg) }).collect();
        let out = Output { ty: &part.result, ptr: out.ptr };
        // SAFETY: passed on to the caller; the kernel may write where the result is.
        return unsafe { launch_kernel(&part.kernel, &operands, &out, workspace) };
    }
    // Finding it takes as long as a row of a few thousand elements, so that it is looked for once.
    let form = fused.form().ok();
    // SAFETY: passed on to the caller.
    unsafe {
        match Together::new(fused, form) {
            Some(together) => together.launch(args, results, workspace),
            None => by_rows::launch(fused, form, args, results, workspace),
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
