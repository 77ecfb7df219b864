//! The text form of a plan, for `ltxc inspect` and bug reports. It is only written, never read.

use std::fmt::{self, Display};

use super::{Fused, Kernel, Operand, Place, Plan, PlanFunction, Slot, SlotPlace, Source, Step, WeightOrigin, Work};

impl Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for function in &self.functions {
            write_function(f, self, function)?;
            writeln!(f)?;
        }
        for p in &self.programs {
            let group = self.groups.get(p.group as usize).map_or("?", |g| &g.name);
            let function = self.functions.get(p.function as usize).map_or("?", |x| &x.name);
            writeln!(
                f,
                "program {} = @{function} group {group} {} arena {:?} {{",
                p.name,
                p.rate.name(),
                p.arena_bytes
            )?;
            p.inputs.iter().try_for_each(|s| write_slot(f, "in ", s))?;
            p.outputs.iter().try_for_each(|s| write_slot(f, "out", s))?;
            writeln!(f, "}}")?;
        }
        Ok(())
    }
}

fn write_slot(f: &mut fmt::Formatter<'_>, direction: &str, slot: &Slot) -> fmt::Result {
    match slot.place {
        SlotPlace::Arena { arena, offset } => {
            writeln!(f, "  {direction} {}: {} arena{arena}+{offset}", slot.name, slot.ty)
        }
        SlotPlace::State { offset } => writeln!(f, "  {direction} {}: {} state+{offset}", slot.name, slot.ty),
    }
}

fn write_function(f: &mut fmt::Formatter<'_>, plan: &Plan, function: &PlanFunction) -> fmt::Result {
    writeln!(f, "fn @{} frame {:?} {{", function.name, function.frame_bytes)?;
    for (i, ty) in function.params.iter().enumerate() {
        writeln!(f, "  param{i}: {ty}")?;
    }
    for (i, ty) in function.results.iter().enumerate() {
        writeln!(f, "  result{i}: {ty}")?;
    }
    for (i, w) in function.weights.iter().enumerate() {
        write!(f, "  weight{i}: {}", w.ty)?;
        if let WeightOrigin::Packed { function, .. } = &w.origin {
            let recipe = plan.functions.get(*function as usize).map_or("?", |x| &x.name);
            write!(f, " = @{recipe} of")?;
        }
        for t in w.origin.tensors() {
            let source = plan.sources.get(t.source as usize).map_or("?", |s| &s.name);
            write!(f, " {source}:{} {}", t.key, t.ty)?;
        }
        writeln!(f)?;
    }
    for step in &function.steps {
        let (args, results, name) = match step {
            Step::Kernel(call) => (&call.args, &call.results, &call.name),
            Step::Call(call) => (&call.args, &call.results, &call.name),
        };
        let list =
            |operands: &[Operand]| operands.iter().map(Written).map(|o| o.to_string()).collect::<Vec<_>>().join(", ");
        write!(f, "  {} = ", list(results))?;
        match step {
            Step::Kernel(call) => match &call.work {
                Work::Kernel(kernel) => {
                    write!(f, "{} {}", kernel.name(), list(args)).and_then(|()| write_attributes(f, kernel))?
                }
                Work::Fused(fused) => {
                    write!(f, "fused {} {}", fused.pattern, list(args)).and_then(|()| write_parts(f, fused))?
                }
            },
            Step::Call(call) => {
                let callee = plan.functions.get(call.function as usize).map_or("?", |x| &x.name);
                write!(f, "call @{callee}({}) frame {:?} prefix `{}`", list(args), call.frame, call.prefix)?;
            }
        }
        if !name.is_empty() {
            write!(f, " \"{name}\"")?;
        }
        writeln!(f)?;
    }
    writeln!(f, "}}")
}

fn write_parts(f: &mut fmt::Formatter<'_>, fused: &Fused) -> fmt::Result {
    write!(f, " {{")?;
    for (i, part) in fused.parts.iter().enumerate() {
        write!(f, "\n    s{i} = {}", part.kernel.name())?;
        for (j, arg) in part.args.iter().enumerate() {
            let comma = if j > 0 { "," } else { "" };
            match arg.source {
                Source::Operand(a) => write!(f, "{comma} a{a}:{}", arg.ty)?,
                Source::Part(s) => write!(f, "{comma} s{s}:{}", arg.ty)?,
            }
        }
        write_attributes(f, &part.kernel)?;
        write!(f, " : {}", part.result)?;
    }
    let stored: Vec<String> = fused.stored.iter().map(|s| format!("s{s}")).collect();
    write!(f, "\n  }} -> {}", stored.join(", "))
}

fn write_attributes(f: &mut fmt::Formatter<'_>, kernel: &Kernel) -> fmt::Result {
    match serde_json::to_value(kernel) {
        // The value is `{"Variant": {attributes}}`, and the variant was written as the kernel's name.
        Ok(serde_json::Value::Object(map)) => map.values().try_for_each(|v| write!(f, " {v}")),
        _ => Ok(()),
    }
}

struct Written<'a>(&'a Operand);

impl Display for Written<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.place {
            Place::Frame { arena } => write!(f, "frame{arena}")?,
            Place::Param(i) => write!(f, "param{i}")?,
            Place::Result(i) => write!(f, "result{i}")?,
            Place::Weight(i) => write!(f, "weight{i}")?,
            Place::Constant => write!(f, "const")?,
        }
        if self.0.offset > 0 || matches!(self.0.place, Place::Frame { .. } | Place::Constant) {
            write!(f, "+{}", self.0.offset)?;
        }
        write!(f, ":{}", self.0.ty)
    }
}
