//! The op table. Everything about an op stands in one place: doc, name, operands, attributes, type rule, meaning, cost.
//!
//! There are two kinds. A **primitive** has a meaning of its own, written as an evaluator arm ([`Primitive::eval`]). A
//! **composite** is defined by primitives: its [`Composite::expand`] *is* its meaning, and whatever computes it faster
//! must agree with that.
//!
//! To add an op: write the struct with its [`OpDef`] and its [`Primitive`] or [`Composite`] in the file of its family,
//! and name it in the `ops!` list below. The parser, the printer, the verifier, the builder's `push` and the evaluator
//! follow. Pointwise ops need nothing else; others need a kernel and a lowering arm.

mod composite;
mod contraction;
mod movement;
mod pointwise;
mod source;

use std::fmt::Debug;
use std::hash::Hash;

pub(crate) use composite::clamp;
pub use composite::{
    Attention, DepthToSpace, Gelu, GroupNorm, HIDDEN_SCORE, LayerNorm, LeakyRelu, RmsNorm, Rope, RopeLayout, Sigmoid,
    Silu, Snake, SpaceToDepth,
};
pub use contraction::{Conv, ConvTranspose, Matmul, Reduce, ReduceKind};
pub use movement::{Broadcast, Concat, Gather, Pad, PadMode, Reshape, Slice, Transpose, Update};
pub use pointwise::{Binary, Cast, Compare, Select, Unary, broadcast_shapes};
pub use source::{Call, Const, Iota, Values, Weight};

use crate::builder::Builder;
use crate::eval::{Evaluator, Tensor};
use crate::graph::ValueId;
use crate::types::TensorType;

/// What every op has: a name, attributes, a type rule and a cost.
pub trait OpDef: Sized + Clone + Eq + Hash + Debug {
    /// Names in the text format; more than one where an attribute is part of the name.
    const NAMES: &'static [&'static str];

    /// The name of this op.
    fn name(&self) -> &'static str {
        Self::NAMES[0]
    }

    /// Attributes as a JSON object; empty when there are none.
    fn attributes(&self) -> serde_json::Value;

    /// The op of that name and attributes.
    ///
    /// # Errors
    /// Which attribute is missing or malformed.
    fn from_text(name: &str, attributes: serde_json::Value) -> Result<Self, String>;

    /// The type of the result. Untrusted attributes must not make it panic.
    ///
    /// # Errors
    /// What is wrong with the operands or attributes.
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String>;

    /// Floating point operations, 0 for ops that only move data.
    fn flops(&self, _args: &[&TensorType], out: &TensorType) -> u64 {
        out.elements() as u64
    }
}

/// An op with a meaning of its own.
pub trait Primitive: OpDef {
    /// Computes the result. Sums run in f64; the evaluator rounds the result once to its dtype.
    fn eval(&self, ev: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor;
}

/// An op that is defined by primitives.
pub trait Composite: OpDef {
    /// Emits the primitives that this op means.
    fn expand(&self, b: &Builder, args: &[ValueId]) -> ValueId;
}

/// Implements the text half of [`OpDef`] through serde, for a struct with one name.
macro_rules! attributes_by_serde {
    ($name:literal) => {
        const NAMES: &'static [&'static str] = &[$name];
        fn attributes(&self) -> serde_json::Value {
            // Attributes are plain data with string keys, which JSON can always express.
            serde_json::to_value(self).unwrap_or_default()
        }
        fn from_text(_name: &str, attributes: serde_json::Value) -> Result<Self, String> {
            serde_json::from_value(attributes).map_err(|e| e.to_string())
        }
    };
}
pub(crate) use attributes_by_serde;

macro_rules! ops {
    (primitives { $($p:ident),* $(,)? } composites { $($c:ident),* $(,)? }) => {
        /// One operation of the graph. Data only: behaviour is in [`OpDef`], [`Primitive`] and [`Composite`].
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)] // each variant carries the documented struct of the same name
        pub enum Op {
            $($p($p),)*
            $($c($c),)*
            Call(Call),
        }

        $(impl From<$p> for Op { fn from(op: $p) -> Op { Op::$p(op) } })*
        $(impl From<$c> for Op { fn from(op: $c) -> Op { Op::$c(op) } })*
        impl From<Call> for Op { fn from(op: Call) -> Op { Op::Call(op) } }

        impl Op {
            /// Every name of the text format, in table order.
            pub fn names() -> Vec<&'static str> {
                let mut names = Vec::new();
                $(names.extend_from_slice($p::NAMES);)*
                $(names.extend_from_slice($c::NAMES);)*
                names.push("call");
                names
            }

            /// Name in the text format.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Op::$p(op) => op.name(),)*
                    $(Op::$c(op) => op.name(),)*
                    Op::Call(_) => "call",
                }
            }

            /// Attributes as a JSON object.
            pub fn attributes(&self) -> serde_json::Value {
                match self {
                    $(Op::$p(op) => op.attributes(),)*
                    $(Op::$c(op) => op.attributes(),)*
                    Op::Call(op) => serde_json::to_value(op).unwrap_or_default(),
                }
            }

            /// The op called `name` with these attributes.
            ///
            /// # Errors
            /// An unknown name, or attributes that do not fit.
            pub fn from_text(name: &str, attributes: serde_json::Value) -> Result<Op, String> {
                $(if $p::NAMES.contains(&name) { return $p::from_text(name, attributes).map(Op::$p); })*
                $(if $c::NAMES.contains(&name) { return $c::from_text(name, attributes).map(Op::$c); })*
                if name == "call" {
                    return serde_json::from_value(attributes).map(Op::Call).map_err(|e| e.to_string());
                }
                Err(format!("unknown op `{name}`"))
            }

            /// Type of the single result.
            ///
            /// # Errors
            /// What is wrong with operands or attributes; always an error for `call`, whose types come from its callee.
            pub fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
                match self {
                    $(Op::$p(op) => op.infer(args),)*
                    $(Op::$c(op) => op.infer(args),)*
                    Op::Call(_) => Err("the types of a call come from its callee".into()),
                }
            }

            /// Floating point operations of one execution; 0 for `call`.
            pub fn flops(&self, args: &[&TensorType], out: &TensorType) -> u64 {
                match self {
                    $(Op::$p(op) => op.flops(args, out),)*
                    $(Op::$c(op) => op.flops(args, out),)*
                    Op::Call(_) => 0,
                }
            }

            /// Whether the op is defined by an expansion.
            pub fn is_composite(&self) -> bool {
                match self {
                    $(Op::$c(_) => true,)*
                    _ => false,
                }
            }

            /// Emits the expansion of a composite; `None` for other ops.
            pub fn expand(&self, b: &Builder, args: &[ValueId]) -> Option<ValueId> {
                match self {
                    $(Op::$c(op) => Some(op.expand(b, args)),)*
                    _ => None,
                }
            }

            /// Evaluates a primitive; `None` for other ops.
            pub(crate) fn eval(&self, ev: &Evaluator, args: &[&Tensor], out: &TensorType) -> Option<Tensor> {
                match self {
                    $(Op::$p(op) => Some(op.eval(ev, args, out)),)*
                    _ => None,
                }
            }
        }
    };
}

ops! {
    primitives {
        Weight, Const, Iota,
        Unary, Binary, Compare, Select, Cast,
        Reshape, Transpose, Slice, Concat, Broadcast, Pad, Gather, Update,
        Reduce, Matmul, Conv, ConvTranspose,
    }
    composites {
        RmsNorm, LayerNorm, GroupNorm, Rope, Attention,
        Gelu, Silu, Sigmoid, Snake, LeakyRelu, DepthToSpace, SpaceToDepth,
    }
}

/// Fails unless there are exactly `n` operands.
pub(crate) fn expect_args(args: &[&TensorType], n: usize) -> Result<(), String> {
    expect_args_between(args, n, n)
}

/// Fails unless the number of operands is in `lo..=hi`.
pub(crate) fn expect_args_between(args: &[&TensorType], lo: usize, hi: usize) -> Result<(), String> {
    if (lo..=hi).contains(&args.len()) {
        return Ok(());
    }
    let want = if lo == hi { lo.to_string() } else { format!("{lo} to {hi}") };
    Err(format!("takes {want} operands, found {}", args.len()))
}

/// Fails unless `ty` is floating point.
pub(crate) fn expect_float(ty: &TensorType, what: &str) -> Result<(), String> {
    if ty.dtype.is_float() { Ok(()) } else { Err(format!("{what} is {ty}, which is not floating point")) }
}
