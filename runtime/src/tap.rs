//! Taps: looking at named values of programs while they run, on any device, without changing what is computed.
//!
//! Values exist where kernel calls end. A tap reads them there, after the call, and nothing else is different: the plan,
//! its memory and its kernels are the same with and without. What stands inside a fused call has no memory of its own;
//! a plan that was compiled without fusion shows it.
//!
//! Names are those of the graph: `blocks.7.attn1` is the value `attn1` in the function that is called as `blocks.7`.

use std::time::Duration;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{FunctionCall, Kernel, KernelCall, Operand, Place, Plan, PlanFunction, Program, Step, Work};

use crate::backend::{Frame, Region, callee_frame};
use crate::error::RunError;

/// What a value is to its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A parameter; read before the first call.
    Input,
    /// The result of a kernel call or of a called function.
    Inner,
    /// A result of the program; read after the last call.
    Output,
}

/// A value of a program that can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// What it is to the program.
    pub role: Role,
    /// Full name path in the program. Values without a name of their own are called after what computes them, in angle
    /// brackets: kernel, step of the function, and the weight that it reads, as in `blocks.7.<matmul 12 attn1.to_q.weight>`.
    pub name: String,
    /// Type.
    pub ty: TensorType,
    /// Number of the kernel call after which it is there.
    pub call: usize,
    /// Names of the values that the call reads, where those are known: parameters and results of earlier calls.
    pub reads: Vec<String>,
    region: Region,
}

impl Value {
    /// Whether the graph gave it a name.
    pub fn is_named(&self) -> bool {
        !self.name.ends_with('>')
    }
}

/// A kernel call of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallInfo {
    /// Full name path of its last result, as for [`Value::name`].
    pub name: String,
    /// Name of the kernel or of the fused pattern.
    pub kernel: String,
    /// Name of the function of the plan that it stands in, and its number among the steps of that.
    pub step: (String, usize),
    /// Floating point operations.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

/// Looks at the values of programs while they run.
pub trait Tap {
    /// Whether a value is wanted. Asked once for each value of a program, when that is bound.
    fn wants(&mut self, program: &Program, value: &Value) -> bool;

    /// A program is about to run.
    fn begin(&mut self, _program: &Program) {}

    /// A value that was wanted: its bytes as they stand in memory.
    ///
    /// # Errors
    /// What stops the run.
    fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError>;

    /// Whether a value that is wanted need not be read if the device says that all of it is finite.
    fn skips_finite(&self, _program: &Program, _value: &Value) -> bool {
        false
    }

    /// A value was left unread, because all of it is finite.
    fn finite(&mut self, _program: &Program, _value: &Value) {}

    /// A program has run.
    ///
    /// # Errors
    /// What stops the run.
    fn end(&mut self, _program: &Program) -> Result<(), RunError> {
        Ok(())
    }

    /// Whether [`Tap::called`] is wanted, for which the device is waited for after every call.
    fn times_calls(&self) -> bool {
        false
    }

    /// How long a kernel call took.
    fn called(&mut self, _program: &Program, _call: &CallInfo, _elapsed: Duration) {}

    /// How long it took to bind a program: to find, make and upload its weights.
    fn loaded(&mut self, _program: &Program, _elapsed: Duration) {}
}

/// What of a program can be looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sites {
    /// Values, in the order in which they are there.
    pub values: Vec<Value>,
    /// Calls, in the order in which they run.
    pub calls: Vec<CallInfo>,
}

impl Value {
    pub(crate) fn region(&self) -> Region {
        self.region
    }
}

/// The values and calls of a program whose frame lies at `frame`, in the order in which `Binding` binds them.
pub(crate) fn sites(plan: &Plan, program: &Program, frame: &Frame) -> Sites {
    let mut walk = Walk { plan, sites: Sites::default() };
    for (slot, &region) in program.inputs.iter().zip(&frame.params) {
        walk.value(Role::Input, slot.name.clone(), &slot.ty, 0, region, &[]);
    }
    walk.function(program.function, frame, "");
    let last = walk.sites.calls.len().saturating_sub(1);
    for (slot, &region) in program.outputs.iter().zip(&frame.results) {
        walk.value(Role::Output, slot.name.clone(), &slot.ty, last, region, &[]);
    }
    walk.sites
}

struct Walk<'a> {
    plan: &'a Plan,
    sites: Sites,
}

impl Walk<'_> {
    fn value(&mut self, role: Role, name: String, ty: &TensorType, call: usize, region: Region, reads: &[String]) {
        self.sites.values.push(Value { role, name, ty: ty.clone(), call, reads: reads.into(), region });
    }

    fn function(&mut self, function: u32, frame: &Frame, path: &str) {
        let body = &self.plan.functions[function as usize];
        // Weights and constants are no values of a program.
        let place = |operand: &Operand| -> Option<Region> {
            let base = match operand.place {
                Place::Frame { arena } => frame.arenas[arena as usize],
                Place::Param(i) => frame.params[i as usize],
                Place::Result(i) => frame.results[i as usize],
                Place::Weight(_) | Place::Constant => return None,
            };
            Some(base.at(operand.offset))
        };
        for (i, step) in body.steps.iter().enumerate() {
            match step {
                Step::Kernel(call) => {
                    let is_complete = !body.steps.get(i + 1).is_some_and(|next| goes_on(call, next));
                    self.kernel(body, i, call, path, &place, is_complete);
                }
                Step::Call(call) => self.call(call, frame, path, &place),
            }
        }
    }

    fn kernel(
        &mut self,
        function: &PlanFunction,
        step: usize,
        call: &KernelCall,
        path: &str,
        place: &dyn Fn(&Operand) -> Option<Region>,
        is_complete: bool,
    ) {
        let number = self.sites.calls.len();
        // A call with several results has their names one after the other.
        let names: Vec<&str> = call.name.split(RESULT_SEPARATOR).collect();
        let last = call.results.len().saturating_sub(1);
        let weight = call.args.iter().find_map(|a| match a.place {
            Place::Weight(i) => function.weights.get(i as usize)?.origin.tensors().first(),
            _ => None,
        });
        let weight = weight.map(|tensor| format!(" {}", tensor.key)).unwrap_or_default();
        let mut own = Vec::with_capacity(call.results.len());
        for (j, result) in call.results.iter().enumerate() {
            let name = match names.get(j) {
                Some(name) if !name.is_empty() => joined(path, name),
                _ if last == 0 => joined(path, &format!("<{} {step}{weight}>", call.work.name())),
                _ => joined(path, &format!("<{} {step}.{j}{weight}>", call.work.name())),
            };
            if let Some(region) = place(result) {
                own.push((name, result, region));
            }
        }
        let reads: Vec<String> = call.args.iter().filter_map(|a| self.writer(place(a)?)).collect();
        self.sites.calls.push(CallInfo {
            name: own.last().map(|(name, ..)| name.clone()).unwrap_or_default(),
            kernel: call.work.name().into(),
            step: (function.name.clone(), step),
            flops: call.flops,
            bytes: call.bytes,
        });
        for (name, result, region) in own.into_iter().filter(|_| is_complete) {
            self.value(Role::Inner, name, &result.ty, number, region, &reads);
        }
    }

    fn call(&mut self, call: &FunctionCall, frame: &Frame, path: &str, place: &dyn Fn(&Operand) -> Option<Region>) {
        // Operands of a call may be weights or constants; those have no values inside either.
        let nowhere = frame.arenas.first().copied();
        let Some(nowhere) = nowhere else { return };
        let callee = callee_frame(call, frame, &|operand| place(operand).unwrap_or(nowhere));
        let inner = joined(path, &call.name);
        self.function(call.function, &callee, &inner);
        let Some(number) = self.sites.calls.len().checked_sub(1) else { return };
        if let [result] = &call.results[..]
            && let Some(region) = place(result)
            && !call.name.is_empty()
        {
            let reads: Vec<String> = call.args.iter().filter_map(|a| self.writer(place(a)?)).collect();
            self.value(Role::Inner, inner, &result.ty, number, region, &reads);
        }
    }

    /// Name of the value that was last written at a place.
    fn writer(&self, region: Region) -> Option<String> {
        self.sites.values.iter().rev().find(|v| v.region == region).map(|v| v.name.clone())
    }
}

/// Whether `next` writes another part of the tensor that `call` writes a part of: a concatenation in several copies.
fn goes_on(call: &KernelCall, next: &Step) -> bool {
    let Step::Kernel(next) = next else { return false };
    let is_copy = |call: &KernelCall| matches!(call.work, Work::Kernel(Kernel::Copy(_)));
    is_copy(call) && is_copy(next) && call.results == next.results
}

/// Between the names of the results of one kernel call.
pub const RESULT_SEPARATOR: char = '|';

fn joined(path: &str, name: &str) -> String {
    match (path, name) {
        ("", name) => name.into(),
        (path, "") => path.into(),
        (path, name) => format!("{path}.{name}"),
    }
}

/// Names to look at: some of `include`, none of `exclude`. `*` stands for any characters, `?` for one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Globs {
    /// Patterns of names that are wanted.
    pub include: Vec<String>,
    /// Patterns of names that are not, even if one of the others has them.
    pub exclude: Vec<String>,
}

impl Globs {
    /// Whether `name` is wanted.
    pub fn matches(&self, name: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|p| glob(p, name));
        any(&self.include) && !any(&self.exclude)
    }
}

/// Whether `pattern` stands for all of `text`.
pub fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // Where the last star stands, and up to where it reaches.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((at, reach)) => {
                    star = Some((at, reach + 1));
                    (p, t) = (at + 1, reach + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_names() {
        assert!(glob("transformer.blocks.*.attn1", "transformer.blocks.17.attn1"));
        assert!(!glob("transformer.blocks.*.attn1", "transformer.blocks.17.attn1.to_q"));
        assert!(!glob("blocks.*", "transformer.blocks.1"));
        assert!(glob("*attn?", "a.attn1") && !glob("*attn?", "a.attn"));
        assert!(glob("**", "") && glob("a*b*c", "axxbxbyc") && !glob("a*b*c", "axxbxby"));
    }

    #[test]
    fn exclusion_wins() {
        let globs = Globs { include: vec!["a.*".into()], exclude: vec!["*.bias".into()] };
        assert!(globs.matches("a.x") && !globs.matches("a.bias") && !globs.matches("b"));
    }
}
