//! Fused calls. What runs in one launch is decided in `schedule`; what flows between launches lies in the workspace.

use cubecl::prelude::*;
use cubecl::server::Handle;
use ltxc_ir::TensorType;
use ltxc_ir::plan::{Copy, Fused, Kernel, Source, Work};

use super::call::{Bound, check_tensor};
use super::compose::Composed;
use super::schedule::{Step, schedule};
use super::{CubeTensor, fused_rows, guard, launch, launch_checked, workspace_bytes};

/// Multiple of all offsets in the workspace.
const ALIGNMENT: usize = 512;

/// [`launch`] for everything that a plan can call.
///
/// # Errors
/// As for [`launch`].
pub fn launch_work<R: Runtime>(
    client: &ComputeClient<R>,
    work: &Work,
    args: &[CubeTensor<'_>],
    results: &[CubeTensor<'_>],
    workspace: Option<&CubeTensor<'_>>,
) -> Result<(), String> {
    let fused = match work {
        Work::Kernel(kernel) => return launch(client, kernel, args, results, workspace),
        Work::Fused(fused) => fused,
    };
    let arg_types: Vec<&TensorType> = args.iter().map(|a| a.ty).collect();
    let result_types: Vec<&TensorType> = results.iter().map(|r| r.ty).collect();
    fused.check(&arg_types, &result_types)?;
    let layout = Layout::new(fused, &arg_types, &result_types);
    let memory = workspace.map(|w| &w.handle).filter(|h| h.size_in_used() >= layout.bytes as u64);
    let range = |start: usize, bytes: usize| match memory {
        Some(memory) => Ok(part_of(memory, start, bytes)),
        None => Err(format!("the workspace is smaller than {} bytes", layout.bytes)),
    };
    let mut handles: Vec<Option<Handle>> = Vec::with_capacity(fused.parts.len());
    for (part, place) in fused.parts.iter().zip(&layout.places) {
        handles.push(match *place {
            Place::Nowhere => None,
            Place::Result(r) => Some(results[r].handle.clone()),
            Place::Workspace(start) => Some(range(start, part.result.bytes())?),
        });
    }
    let missing = || "a part is read that reaches no memory".to_string();
    let of_part = |part: usize| handles[part].clone().ok_or_else(missing);
    let of = |source: Source| match source {
        Source::Operand(a) => Ok(CubeTensor { ty: args[a as usize].ty, handle: args[a as usize].handle.clone() }),
        Source::Part(s) => of_part(s as usize).map(|handle| CubeTensor { ty: &fused.parts[s as usize].result, handle }),
    };
    let operands = |part: usize| {
        let tensors =
            fused.parts[part].args.iter().map(|arg| Ok(CubeTensor { ty: &arg.ty, handle: of(arg.source)?.handle }));
        tensors.collect::<Result<Vec<CubeTensor<'_>>, String>>()
    };
    let bound = |composed| bind_all(composed, &of);
    let scratch_ty = TensorType::new(ltxc_ir::DType::U8, [layout.bytes - layout.scratch]);
    let scratch = match scratch_ty.bytes() {
        0 => None,
        bytes => Some(CubeTensor { ty: &scratch_ty, handle: range(layout.scratch, bytes)? }),
    };
    for step in &layout.steps {
        match step {
            Step::Part(part) => {
                let result = [CubeTensor { ty: &fused.parts[*part].result, handle: of_part(*part)? }];
                launch(client, &fused.parts[*part].kernel, &operands(*part)?, &result, scratch.as_ref())?;
            }
            Step::Tail { anchor, composed, last } => {
                let kernel = &fused.parts[*anchor].kernel;
                // As the anchor shapes it, but of the last dtype.
                let ty = fused.parts[*anchor].result.with_dtype(fused.parts[*last].result.dtype);
                let out = CubeTensor { ty: &ty, handle: of_part(*last)? };
                launch_checked(client, kernel, &operands(*anchor)?, &out, scratch.as_ref(), Some(&bound(composed)?))?;
            }
            Step::Rows(rows) => {
                let outs = rows.outs.iter().map(|&(part, _)| of(Source::Part(part as u32)));
                let outs = outs.collect::<Result<Vec<CubeTensor<'_>>, String>>()?;
                guard::install();
                fused_rows::launch(client, rows, &bound(&rows.composed)?, &outs)?;
            }
        }
    }
    for (result, &part) in results.iter().zip(&fused.stored) {
        if let Place::Workspace(_) = layout.places[part as usize] {
            let from = [CubeTensor { ty: result.ty, handle: of_part(part as usize)? }];
            let to = [CubeTensor { ty: result.ty, handle: result.handle.clone() }];
            launch(client, &whole(result.ty), &from, &to, None)?;
        }
    }
    Ok(())
}

/// The operands of a program.
fn bind_all<'a>(
    composed: &'a Composed,
    of: &impl Fn(Source) -> Result<CubeTensor<'a>, String>,
) -> Result<Bound<'a>, String> {
    let all = |sources: &[Source]| {
        let tensors = sources.iter().map(|&source| {
            let tensor = of(source)?;
            check_tensor(&tensor).map(|()| tensor)
        });
        tensors.collect::<Result<Vec<CubeTensor<'a>>, String>>()
    };
    Ok(Bound { composed, reads: all(&composed.reads)?, overlaps: all(&composed.overlaps)? })
}

/// [`workspace_bytes`] for everything that a plan can call.
pub fn work_workspace_bytes(work: &Work, args: &[&TensorType], results: &[&TensorType]) -> usize {
    match work {
        Work::Kernel(kernel) => workspace_bytes(kernel, args, results),
        Work::Fused(fused) => Layout::new(fused, args, results).bytes,
    }
}

/// How many kernels [`launch_work`] runs one after the other for a call that was checked; some are a few launches each.
pub fn work_launches(work: &Work, args: &[&TensorType], results: &[&TensorType]) -> usize {
    match work {
        Work::Kernel(_) => 1,
        Work::Fused(fused) => schedule(fused, args, results).len(),
    }
}

/// Where the result of a part lies.
enum Place {
    /// In no memory.
    Nowhere,
    /// Where this result of the call does.
    Result(usize),
    /// From here in the workspace.
    Workspace(usize),
}

/// The launches of a fused call, and its workspace.
struct Layout {
    steps: Vec<Step>,
    places: Vec<Place>,
    /// Where the scratch of the parts begins, which use it in turn.
    scratch: usize,
    bytes: usize,
}

impl Layout {
    fn new(fused: &Fused, args: &[&TensorType], results: &[&TensorType]) -> Layout {
        let steps = schedule(fused, args, results);
        let mut scratch = 0usize;
        let mut places: Vec<Place> = fused.parts.iter().map(|_| Place::Nowhere).collect();
        let mut need = 0usize;
        for (at, step) in steps.iter().enumerate() {
            for out in step.outs() {
                let result = fused.stored.iter().position(|&part| part as usize == out);
                places[out] = match result.filter(|&r| is_last_reader(fused, &steps, at, args, results[r])) {
                    Some(r) => Place::Result(r),
                    None => {
                        let start = scratch;
                        let bytes = fused.parts[out].result.bytes().max(1);
                        scratch = start.saturating_add(bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX));
                        Place::Workspace(start)
                    }
                };
            }
            let (anchor, last) = match step {
                Step::Part(part) => (*part, *part),
                Step::Tail { anchor, last, .. } => (*anchor, *last),
                Step::Rows(_) => continue,
            };
            let part = &fused.parts[anchor];
            let types: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
            let stored = part.result.with_dtype(fused.parts[last].result.dtype);
            need = need.max(workspace_bytes(&part.kernel, &types, &[&stored]));
        }
        Layout {
            steps,
            places,
            scratch,
            bytes: scratch.saturating_add(need.checked_next_multiple_of(4).unwrap_or(usize::MAX)),
        }
    }
}

/// Whether step `at` may write a result of type `result` that lies on any operand of the same type: no later step reads
/// such an operand, and the step itself reads only what it overwrites.
fn is_last_reader(fused: &Fused, steps: &[Step], at: usize, args: &[&TensorType], result: &TensorType) -> bool {
    let is_overwritten = |source: Source| matches!(source, Source::Operand(a) if args[a as usize] == result);
    if steps[at + 1..].iter().flat_map(|step| step.reads(fused)).any(is_overwritten) {
        return false;
    }
    let own_reads = |part: usize| {
        let own = &fused.parts[part];
        let in_place = move |i: usize| own.kernel.in_place().allows(i) && own.args[i].ty == own.result;
        (0..own.args.len()).all(|i| !is_overwritten(own.args[i].source) || in_place(i))
    };
    match &steps[at] {
        Step::Part(part) => own_reads(*part),
        // Operands of products are never overwritten (`Fused::may_overwrite`), and maps read what they overwrite.
        Step::Tail { .. } => true,
        // Units read what they overwrite; statistics are complete before anything is written.
        Step::Rows(_) => true,
    }
}

/// Some bytes of a range of memory, as whole words.
fn part_of(memory: &Handle, start: usize, bytes: usize) -> Handle {
    let end = (start + bytes).next_multiple_of(4) as u64;
    memory.clone().offset_start(start as u64).offset_end(memory.size_in_used() - end)
}

/// A copy of all elements.
fn whole(ty: &TensorType) -> Kernel {
    Kernel::Copy(Copy {
        shape: vec![ty.elements()],
        src_offset: 0,
        src_strides: vec![1],
        dst_offset: 0,
        dst_strides: vec![1],
    })
}
