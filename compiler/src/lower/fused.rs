//! A fused group as one kernel call.

use ltxc_ir::plan::{Fused, Part, PartArg, Source, Target, Work};
use ltxc_ir::{Function, Module};

use super::view::Base;
use super::{Action, Draft, DraftOperand, Drafter, Lowering};

/// Lowers the body of a fused group: its steps are the parts of the call.
///
/// # Errors
/// Why the group cannot run as one kernel.
pub(crate) fn lower(group: &Function) -> Result<Fused, String> {
    let (module, target) = (Module::default(), Target::cpu());
    let lowering = Lowering { target: &target, sources: &[] };
    let indices = Default::default();
    let drafter = Drafter {
        lowering: &lowering,
        module: &module,
        function: group,
        indices: &indices,
        draft: Draft::default(),
        chains: Default::default(),
    };
    let draft = drafter.run().map_err(|e| e.to_string())?;
    let mut parts: Vec<Part> = Vec::with_capacity(draft.steps.len());
    // The part that writes each buffer.
    let mut writers: Vec<Option<u32>> = vec![None; draft.buffers.len()];
    for step in &draft.steps {
        let Action::Work(Work::Kernel(kernel)) = &step.action else { return Err("a group holds kernels only".into()) };
        let [DraftOperand { base: Base::Buffer(buffer), offset_bytes: 0, ty }] = &step.results[..] else {
            return Err(format!("`{}` writes a part of a tensor", kernel.name()));
        };
        let args = step.args.iter().map(|arg| {
            let is_start = arg.offset_bytes == 0;
            let source = match arg.base {
                Base::Param(p) if is_start => Source::Operand(p),
                Base::Buffer(b) if is_start => Source::Part(writers[b].ok_or("a part reads what nothing has written")?),
                _ => return Err(format!("`{}` reads a part of a tensor or a constant", kernel.name())),
            };
            Ok(PartArg { source, ty: arg.ty.clone() })
        });
        let args = args.collect::<Result<_, String>>()?;
        if draft.buffers[*buffer].parent.is_some() || writers[*buffer].replace(parts.len() as u32).is_some() {
            return Err(format!("`{}` writes a part of a tensor", kernel.name()));
        }
        parts.push(Part { kernel: kernel.clone(), args, result: ty.clone() });
    }
    let mut stored = Vec::with_capacity(draft.results.len());
    for result in 0..draft.results.len() as u32 {
        let buffer = draft.buffers.iter().position(|b| b.result == Some(result));
        let writer = buffer.and_then(|b| writers[b]);
        stored.push(writer.ok_or("a result is not computed by the group")?);
    }
    let fused = Fused { pattern: group.pattern.clone().unwrap_or_default(), parts, stored };
    let (args, results) = (group.param_types(), group.result_types());
    fused.check(&args.iter().collect::<Vec<_>>(), &results.iter().collect::<Vec<_>>())?;
    Ok(fused)
}
