//! Checks a plan as if it were hostile, so that the executor can rely on it.
//!
//! For every function:
//! - operands lie inside what they are in, at offsets their dtype can have; results are written to frames and results only;
//! - every kernel accepts its types, and no operand overlaps a result except where the kernel allows it;
//! - calls go to earlier functions with the types they take; frames of callees lie inside the caller's, apart from the
//!   operands of the call, and results of a call overlap nothing else of it;
//! - packed weights come from an earlier function without weights that makes what they say.
//!
//! For every program: slots and frame lie inside the arenas and the state, apart from each other; only a result may lie
//! exactly on an input that its function writes over ([`may_overwrite`]).
//!
//! Settings of the pipeline: see `settings.rs`.
//!
//! The number of steps of a function and of all programs is bounded, and so is the depth of calls: calls of calls can
//! neither make a small plan run forever nor exhaust the stack of who follows them.

use std::collections::BTreeSet;

use super::overwrite::may_overwrite;
use super::{
    FunctionCall, KernelCall, Operand, Place, Plan, PlanFunction, Program, Slot, SlotPlace, Step, Storage, WeightOrigin,
};

/// A plan file or plan that cannot be used.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)] // the messages are the documentation
pub enum PlanError {
    #[error("this is not an ltxc plan; make one with `ltxc compile`")]
    NotAPlan,
    #[error("the plan has format {found}, this build reads {expected}; run `ltxc compile` again")]
    Version { found: u32, expected: u32 },
    #[error("the plan ends after {bytes} bytes, before its last section is complete; copy or compile it again")]
    Truncated { bytes: u64 },
    #[error("the {part} of the plan does not have the hash it was written with; copy or compile it again")]
    Changed { part: &'static str },
    #[error("the plan is malformed: {0}; compile it again")]
    Malformed(String),
}

/// Most steps a function may run, and all programs together; a call is a step, besides those of its callee.
const MAX_STEPS: u64 = 10_000_000;

/// Deepest nesting of calls. Plans of real models need 3.
const MAX_DEPTH: u32 = 64;

/// What a call of a function sets off.
#[derive(Clone, Copy)]
struct Extent {
    steps: u64,
    depth: u32,
}

/// Bytes of the largest element: frames and slots begin where any can lie.
const LARGEST_ELEMENT: u64 = 4;

/// Most kinds of matrix units of a target; devices have two or three.
const MAX_UNITS: usize = 16;

/// Checks a plan. See the module documentation.
///
/// # Errors
/// The first thing that does not hold together.
pub fn verify(plan: &Plan) -> Result<(), PlanError> {
    let arenas =
        plan.functions.iter().map(|f| f.frame_bytes.len()).chain(plan.programs.iter().map(|p| p.arena_bytes.len()));
    let arenas = arenas.max().unwrap_or(0);
    let align = plan.target.alignment;
    if align < LARGEST_ELEMENT || !align.is_power_of_two() {
        return Err(PlanError::Malformed(format!("alignment {align} is not a power of two from {LARGEST_ELEMENT} on")));
    }
    let units = &plan.target.matrix_units;
    if units.len() > MAX_UNITS || units.iter().any(|unit| !unit.element.is_float() || unit.edge == 0) {
        return Err(PlanError::Malformed("the target has matrix units that there are not".into()));
    }
    let mut extents: Vec<Extent> = Vec::with_capacity(plan.functions.len());
    for (index, function) in plan.functions.iter().enumerate() {
        let check = FunctionCheck { plan, index, function, arenas };
        let extent =
            check.run(&extents).map_err(|e| PlanError::Malformed(format!("function `{}`: {e}", function.name)))?;
        extents.push(extent);
    }
    super::settings::check(&plan.pipeline).map_err(|e| PlanError::Malformed(format!("settings: {e}")))?;
    let (mut names, mut total) = (BTreeSet::new(), 0u64);
    for program in &plan.programs {
        let result = check_program(plan, program, arenas).and_then(|()| {
            total = total.saturating_add(extents[program.function as usize].steps);
            if !names.insert(&program.name) {
                return Err("there are two programs of that name".into());
            }
            check_steps(total)
        });
        result.map_err(|e| PlanError::Malformed(format!("program `{}`: {e}", program.name)))?;
    }
    Ok(())
}

fn check_steps(steps: u64) -> Result<(), String> {
    if steps > MAX_STEPS { Err(format!("runs {steps} steps, {MAX_STEPS} at most")) } else { Ok(()) }
}

/// Half-open byte range.
#[derive(Clone, Copy)]
struct Span {
    start: u64,
    end: u64,
}

impl Span {
    fn new(start: u64, bytes: u64) -> Result<Span, String> {
        let end = start.checked_add(bytes).ok_or("an offset overflows")?;
        Ok(Span { start, end })
    }

    fn overlaps(self, other: Span) -> bool {
        self.start < other.end && other.start < self.end
    }
}

struct FunctionCheck<'a> {
    plan: &'a Plan,
    index: usize,
    function: &'a PlanFunction,
    arenas: usize,
}

impl FunctionCheck<'_> {
    /// Returns what a call of this function sets off, given that of all earlier ones.
    fn run(&self, earlier: &[Extent]) -> Result<Extent, String> {
        let f = self.function;
        if f.frame_bytes.len() != self.arenas {
            return Err(format!("{} frames for {} arenas", f.frame_bytes.len(), self.arenas));
        }
        for ty in f.params.iter().chain(&f.results).chain(f.weights.iter().map(|w| &w.ty)) {
            ty.checked_bytes().ok_or_else(|| format!("type {ty} is too large"))?;
        }
        f.weights.iter().try_for_each(|w| self.check_weight(w))?;
        let mut extent = Extent { steps: 0, depth: 1 };
        let recipes = f.weights.iter().filter_map(|w| match w.origin {
            WeightOrigin::Packed { function, .. } => earlier.get(function as usize),
            WeightOrigin::File(_) => None,
        });
        for recipe in recipes {
            extent.steps = extent.steps.saturating_add(recipe.steps);
            extent.depth = extent.depth.max(recipe.depth + 1);
        }
        for (i, step) in f.steps.iter().enumerate() {
            let (result, callee) = match step {
                Step::Kernel(call) => (self.check_kernel(call), None),
                Step::Call(call) => (self.check_call(call), earlier.get(call.function as usize)),
            };
            result.map_err(|e| format!("step {i}: {e}"))?;
            let callee = callee.copied().unwrap_or(Extent { steps: 0, depth: 0 });
            extent.steps = extent.steps.saturating_add(1).saturating_add(callee.steps);
            extent.depth = extent.depth.max(callee.depth + 1);
        }
        if extent.depth > MAX_DEPTH {
            return Err(format!("calls nest {} deep, {MAX_DEPTH} at most", extent.depth));
        }
        check_steps(extent.steps).map(|()| extent)
    }

    fn check_weight(&self, weight: &super::PlanWeight) -> Result<(), String> {
        for t in weight.origin.tensors() {
            let known = (t.source as usize) < self.plan.sources.len();
            if !known || t.ty.checked_bytes().is_none() {
                return Err(format!("weight `{}` has no source or no possible type", t.key));
            }
        }
        match &weight.origin {
            WeightOrigin::File(t) if t.ty != weight.ty => {
                Err(format!("weight `{}` is {}, read as {}", t.key, t.ty, weight.ty))
            }
            WeightOrigin::File(_) => Ok(()),
            WeightOrigin::Packed { function, tensors } => {
                let recipe = self.earlier(*function)?;
                let fits = recipe.weights.is_empty()
                    && recipe.params.iter().eq(tensors.iter().map(|t| &t.ty))
                    && recipe.results == [weight.ty.clone()];
                if fits { Ok(()) } else { Err(format!("recipe `{}` does not make {}", recipe.name, weight.ty)) }
            }
        }
    }

    fn earlier(&self, function: u32) -> Result<&PlanFunction, String> {
        let index = function as usize;
        if index >= self.index {
            return Err(format!("function {index} does not stand before its caller"));
        }
        Ok(&self.plan.functions[index])
    }

    /// Checks that an operand lies inside what it is in, and returns its range there.
    fn check_operand(&self, operand: &Operand) -> Result<Span, String> {
        let f = self.function;
        let missing = || format!("operand {operand:?} refers to nothing");
        let room = match operand.place {
            Place::Frame { arena } => *f.frame_bytes.get(arena as usize).ok_or_else(missing)?,
            Place::Param(i) => f.params.get(i as usize).ok_or_else(missing)?.bytes() as u64,
            Place::Result(i) => f.results.get(i as usize).ok_or_else(missing)?.bytes() as u64,
            Place::Weight(i) => f.weights.get(i as usize).ok_or_else(missing)?.ty.bytes() as u64,
            Place::Constant => f.constants.len() as u64,
        };
        let bytes = operand.ty.checked_bytes().ok_or_else(|| format!("type {} is too large", operand.ty))? as u64;
        let span = Span::new(operand.offset, bytes)?;
        if span.end > room {
            return Err(format!("operand {operand:?} leaves its {room} bytes"));
        }
        if !operand.offset.is_multiple_of(operand.ty.dtype.bytes() as u64) {
            return Err(format!("operand {operand:?} is not aligned"));
        }
        if operand.storage != Storage::Native && self.plan.target.backend == "cpu" {
            return Err("packed storage is not for this target".into());
        }
        Ok(span)
    }

    fn check_result(&self, operand: &Operand) -> Result<Span, String> {
        match operand.place {
            Place::Frame { .. } | Place::Result(_) => self.check_operand(operand),
            _ => Err(format!("{operand:?} cannot be written")),
        }
    }

    fn check_kernel(&self, call: &KernelCall) -> Result<(), String> {
        // Operands come first: kernels compute with sizes that are known to be possible.
        let spans = call.args.iter().map(|arg| self.check_operand(arg)).collect::<Result<Vec<_>, _>>()?;
        let written = call.results.iter().map(|result| self.check_result(result)).collect::<Result<Vec<_>, _>>()?;
        let args: Vec<_> = call.args.iter().map(|a| &a.ty).collect();
        let results: Vec<_> = call.results.iter().map(|r| &r.ty).collect();
        call.work.check(&args, &results)?;
        for (i, (result, &span)) in call.results.iter().zip(&written).enumerate() {
            for (j, (arg, &other)) in call.args.iter().zip(&spans).enumerate() {
                if arg.place != result.place || !span.overlaps(other) {
                    continue;
                }
                let allowed = call.work.may_overwrite(j, i) && arg.offset == result.offset && arg.ty == result.ty;
                if !allowed {
                    return Err(format!("`{}` would write its result {i} over its operand {j}", call.work.name()));
                }
            }
            let meets = |other: usize| call.results[other].place == result.place && span.overlaps(written[other]);
            if let Some(other) = (0..i).find(|&other| meets(other)) {
                return Err(format!("`{}` would write its result {i} over its result {other}", call.work.name()));
            }
        }
        Ok(())
    }

    fn check_call(&self, call: &FunctionCall) -> Result<(), String> {
        let callee = self.earlier(call.function)?;
        let fits = callee.params.iter().eq(call.args.iter().map(|a| &a.ty))
            && callee.results.iter().eq(call.results.iter().map(|r| &r.ty))
            && call.frame.len() == self.arenas;
        if !fits {
            return Err(format!("the operands are not those of `{}`", callee.name));
        }
        let mut frames = Vec::with_capacity(self.arenas);
        for (a, (&offset, &bytes)) in call.frame.iter().zip(&callee.frame_bytes).enumerate() {
            let span = Span::new(offset, bytes)?;
            if span.end > self.function.frame_bytes[a] || !offset.is_multiple_of(self.plan.target.alignment) {
                return Err(format!("the frame of `{}` leaves the caller's frame or is not aligned", callee.name));
            }
            frames.push(span);
        }
        let in_callee_frame = |operand: &Operand, span: Span| match operand.place {
            Place::Frame { arena } => span.overlaps(frames[arena as usize]),
            _ => false,
        };
        let mut args = Vec::with_capacity(call.args.len());
        for arg in &call.args {
            let span = self.check_operand(arg)?;
            if in_callee_frame(arg, span) {
                return Err(format!("an operand lies in the frame of `{}`", callee.name));
            }
            args.push((arg, span));
        }
        let mut results: Vec<(&Operand, Span)> = Vec::with_capacity(call.results.len());
        for result in &call.results {
            let span = self.check_result(result)?;
            let meets = |(other, s): &(&Operand, Span)| other.place == result.place && s.overlaps(span);
            if in_callee_frame(result, span) || args.iter().any(meets) || results.iter().any(meets) {
                return Err(format!("a result of `{}` overlaps its frame or another operand", callee.name));
            }
            results.push((result, span));
        }
        Ok(())
    }
}

/// Memory of a program that is in use.
#[derive(Clone, Copy)]
struct Taken {
    /// `None` for the state.
    arena: Option<u32>,
    span: Span,
    used: Use,
}

/// What memory of a program is used for.
#[derive(Clone, Copy)]
enum Use {
    Frame,
    Input(u32),
    Output(u32),
}

fn check_program(plan: &Plan, program: &Program, arenas: usize) -> Result<(), String> {
    let function = plan.functions.get(program.function as usize).ok_or("its function does not exist")?;
    let group = plan.groups.get(program.group as usize).ok_or("its group does not exist")?;
    let types_fit = function.params.iter().eq(program.inputs.iter().map(|s| &s.ty))
        && function.results.iter().eq(program.outputs.iter().map(|s| &s.ty));
    if !types_fit || program.frame.len() != arenas || program.arena_bytes.len() != arenas {
        return Err(format!("its slots are not those of `{}`", function.name));
    }
    let mut taken: Vec<Taken> = Vec::new();
    for (a, &offset) in program.frame.iter().enumerate() {
        let span = Span::new(offset, function.frame_bytes[a])?;
        if span.end > program.arena_bytes[a] || !offset.is_multiple_of(plan.target.alignment) {
            return Err("its frame leaves the arena or is not aligned".into());
        }
        taken.push(Taken { arena: Some(a as u32), span, used: Use::Frame });
    }
    let inputs = program.inputs.iter().enumerate().map(|(i, s)| (s, Use::Input(i as u32)));
    let outputs = program.outputs.iter().enumerate().map(|(i, s)| (s, Use::Output(i as u32)));
    for (slot, used) in inputs.chain(outputs) {
        let (arena, span) = check_slot(slot, program, group.state_bytes, plan.target.alignment)?;
        let may_meet = |other: &Taken| match (other.used, used) {
            (Use::Input(_), Use::Input(_)) => true,
            (Use::Input(param), Use::Output(result)) => {
                other.span.start == span.start && may_overwrite(&plan.functions, program.function, param, result)
            }
            _ => false,
        };
        let meets = |other: &&Taken| other.arena == arena && other.span.overlaps(span);
        if !taken.iter().filter(meets).all(may_meet) {
            return Err(format!("slot `{}` overlaps another or the frame", slot.name));
        }
        taken.push(Taken { arena, span, used });
    }
    Ok(())
}

fn check_slot(slot: &Slot, program: &Program, state_bytes: u64, align: u64) -> Result<(Option<u32>, Span), String> {
    let bytes = slot.ty.checked_bytes().ok_or_else(|| format!("slot `{}` is too large", slot.name))? as u64;
    let (place, offset, room) = match slot.place {
        SlotPlace::Arena { arena, offset } => (Some(arena), offset, program.arena_bytes.get(arena as usize).copied()),
        SlotPlace::State { offset } => (None, offset, Some(state_bytes)),
    };
    let span = Span::new(offset, bytes)?;
    match room {
        Some(room) if span.end <= room && offset.is_multiple_of(align) => Ok((place, span)),
        _ => Err(format!("slot `{}` leaves its arena or is not aligned", slot.name)),
    }
}
