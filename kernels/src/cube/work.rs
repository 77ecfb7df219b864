//! Fused calls. Their parts run one after the other, which is their meaning; what flows between parts lies in the
//! workspace.

use cubecl::prelude::*;
use cubecl::server::Handle;
use ltxc_ir::TensorType;
use ltxc_ir::plan::{Copy, Fused, Kernel, Source, Work};

use super::{CubeTensor, launch, workspace_bytes};

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
    let mut handles: Vec<Handle> = Vec::with_capacity(fused.parts.len());
    for (part, place) in fused.parts.iter().zip(&layout.places) {
        let operands = part.args.iter().map(|arg| {
            let handle = match arg.source {
                Source::Operand(a) => args[a as usize].handle.clone(),
                Source::Part(s) => handles[s as usize].clone(),
            };
            CubeTensor { ty: &arg.ty, handle }
        });
        let operands: Vec<CubeTensor<'_>> = operands.collect();
        let handle = match *place {
            Place::Result(r) => results[r].handle.clone(),
            Place::Workspace(start) => range(start, part.result.bytes())?,
        };
        let result = [CubeTensor { ty: &part.result, handle: handle.clone() }];
        let scratch_ty = TensorType::new(ltxc_ir::DType::U8, [layout.bytes - layout.scratch]);
        let scratch = match scratch_ty.bytes() {
            0 => None,
            bytes => Some(CubeTensor { ty: &scratch_ty, handle: range(layout.scratch, bytes)? }),
        };
        launch(client, &part.kernel, &operands, &result, scratch.as_ref())?;
        handles.push(handle);
    }
    for (result, &part) in results.iter().zip(&fused.stored) {
        if let Place::Workspace(_) = layout.places[part as usize] {
            let from = [CubeTensor { ty: result.ty, handle: handles[part as usize].clone() }];
            let to = [CubeTensor { ty: result.ty, handle: result.handle.clone() }];
            launch(client, &whole(result.ty), &from, &to, None)?;
        }
    }
    Ok(())
}

/// [`workspace_bytes`] for everything that a plan can call.
pub fn work_workspace_bytes(work: &Work, args: &[&TensorType], results: &[&TensorType]) -> usize {
    match work {
        Work::Kernel(kernel) => workspace_bytes(kernel, args, results),
        Work::Fused(fused) => Layout::new(fused, args, results).bytes,
    }
}

/// Where the result of a part lies.
enum Place {
    /// Where this result of the call does.
    Result(usize),
    /// From here in the workspace.
    Workspace(usize),
}

/// The workspace of a fused call.
struct Layout {
    places: Vec<Place>,
    /// Where the scratch of the parts begins, which use it in turn.
    scratch: usize,
    bytes: usize,
}

impl Layout {
    fn new(fused: &Fused, args: &[&TensorType], results: &[&TensorType]) -> Layout {
        let mut scratch = 0usize;
        let places = (0..fused.parts.len()).map(|i| match fused.stored.iter().position(|&part| part as usize == i) {
            Some(r) if is_last_reader(fused, i, args, results[r]) => Place::Result(r),
            _ => {
                let start = scratch;
                let bytes = fused.parts[i].result.bytes().max(1);
                scratch = start.saturating_add(bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX));
                Place::Workspace(start)
            }
        });
        let places = places.collect();
        let needs = fused.parts.iter().map(|part| {
            let types: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
            workspace_bytes(&part.kernel, &types, &[&part.result])
        });
        let need = needs.max().unwrap_or(0);
        Layout {
            places,
            scratch,
            bytes: scratch.saturating_add(need.checked_next_multiple_of(4).unwrap_or(usize::MAX)),
        }
    }
}

/// Whether part `part` may write a result of type `result` that lies on any operand of the same type: no later part reads
/// such an operand, and the part itself reads only what it overwrites.
fn is_last_reader(fused: &Fused, part: usize, args: &[&TensorType], result: &TensorType) -> bool {
    let is_overwritten = |source: Source| matches!(source, Source::Operand(a) if args[a as usize] == result);
    let own = &fused.parts[part];
    let later = fused.parts[part + 1..].iter().flat_map(|p| &p.args).any(|arg| is_overwritten(arg.source));
    let in_place = |i: usize| own.kernel.in_place().allows(i) && own.args[i].ty == own.result;
    !later && (0..own.args.len()).all(|i| !is_overwritten(own.args[i].source) || in_place(i))
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
