//! The graph level: typed tensors in SSA form, grouped into functions; no memory, no device.
//!
//! A [`Function`] is a list of [`Node`]s in execution order. Values are numbered densely per function: parameters first,
//! then the results of the nodes. Repeated parts of a model (the blocks of a transformer) are one function that is
//! called many times with different weight prefixes, so that everything done to a block is done once.
//!
//! Deliberately absent: control flow, symbolic shapes, aliasing.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ops::Op;
use crate::types::TensorType;

/// Number of a value inside one function; printed as `%7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ValueId(pub u32);

impl ValueId {
    /// Position in [`Function::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// How often a parameter of an entry function changes while one video is generated.
///
/// What depends only on slow parameters can be hoisted into a program that runs less often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    /// Constant for a whole stage of a generation: positions, text context.
    Generation,
    /// Changes once per model evaluation, shared by its guidance passes: timesteps.
    Evaluation,
    /// May change with every call: latents.
    Step,
}

impl Rate {
    /// Name in the text format.
    pub fn name(self) -> &'static str {
        match self {
            Rate::Generation => "generation",
            Rate::Evaluation => "evaluation",
            Rate::Step => "step",
        }
    }

    /// The inverse of [`Rate::name`].
    pub fn from_name(name: &str) -> Option<Rate> {
        [Rate::Generation, Rate::Evaluation, Rate::Step].into_iter().find(|r| r.name() == name)
    }
}

/// Type and name path of a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ValueInfo {
    /// Type of the tensor.
    pub ty: TensorType,
    /// Name path for people and debugging taps, for example `attn1.to_q`; empty if the value has none.
    ///
    /// Relative to the name of the call for values of a called function.
    pub name: String,
}

/// One operation: operands in, results out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Operands, all defined earlier in the function.
    pub args: Vec<ValueId>,
    /// Results: exactly one, except for `call`, which has one per result of the callee.
    pub results: Vec<ValueId>,
}

/// A parameter of a function.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// The value it defines.
    pub value: ValueId,
    /// How often it changes; meaningful on entry functions only.
    pub rate: Rate,
}

/// A named result of a function.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FunctionResult {
    /// Name by which callers and programs refer to it.
    pub name: String,
    /// The value returned.
    pub value: ValueId,
}

/// A function: parameters, nodes in execution order, results.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Function {
    /// Name, unique in the module; printed as `@name`.
    pub name: String,
    /// Name of the pattern, if the function is a fused group: a call of it becomes one kernel call.
    pub pattern: Option<String>,
    /// Parameters; their values come first, in order.
    pub params: Vec<Param>,
    /// Type and name of every value.
    pub values: Vec<ValueInfo>,
    /// Nodes in execution order.
    pub nodes: Vec<Node>,
    /// Results, in order.
    pub results: Vec<FunctionResult>,
}

impl Function {
    /// Type of a value.
    ///
    /// # Panics
    /// If `value` is not of this function (a broken invariant: the verifier checks ids).
    pub fn ty(&self, value: ValueId) -> &TensorType {
        &self.values[value.index()].ty
    }

    /// Name path of a value, empty if it has none.
    pub fn name_of(&self, value: ValueId) -> &str {
        &self.values[value.index()].name
    }

    /// Types of the parameters, in order.
    pub fn param_types(&self) -> Vec<TensorType> {
        self.params.iter().map(|p| self.ty(p.value).clone()).collect()
    }

    /// Types of the results, in order.
    pub fn result_types(&self) -> Vec<TensorType> {
        self.results.iter().map(|r| self.ty(r.value).clone()).collect()
    }

    /// The parameter called `name`.
    pub fn param(&self, name: &str) -> Option<&Param> {
        self.params.iter().find(|p| self.name_of(p.value) == name)
    }

    /// The node that defines each value, `None` for parameters.
    pub fn definitions(&self) -> Vec<Option<usize>> {
        let mut defs = vec![None; self.values.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for r in &node.results {
                defs[r.index()] = Some(i);
            }
        }
        defs
    }

    /// Adds a value of type `ty` without a definition yet.
    pub fn add_value(&mut self, ty: TensorType, name: impl Into<String>) -> ValueId {
        let id = ValueId(self.values.len() as u32);
        self.values.push(ValueInfo { ty, name: name.into() });
        id
    }
}

/// A set of functions. Callees stand before their callers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Module {
    /// Functions, callees first.
    pub functions: Vec<Function>,
    /// Names of the functions that programs start from, in a fixed order.
    pub entries: Vec<String>,
}

impl Module {
    /// The function called `name`.
    pub fn function(&self, name: &str) -> Option<&Function> {
        self.functions.iter().find(|f| f.name == name)
    }
}
