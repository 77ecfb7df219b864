//! The kernels a plan can call. A kernel is an op of the graph, or one of the two general forms that cover all pointwise
//! and all movement ops: [`Map`] and [`Copy`].
//!
//! [`Kernel::check`] is the contract on types; backends may rely on it, because every plan is checked when it is read.

use serde::{Deserialize, Serialize};

use crate::ops::{
    Attention, Binary, Compare, Conv, ConvTranspose, Gather, GroupNorm, LayerNorm, Matmul, OpDef, Pad, Reduce, RmsNorm,
    Rope, Unary, Update, broadcast_shapes,
};
use crate::types::{DType, Float, MAX_RANK, TensorType};

/// One kernel with everything about it that does not depend on operands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // each variant carries the documented struct of the same name
pub enum Kernel {
    Map(Map),
    Copy(Copy),
    Pad(Pad),
    Gather(Gather),
    Update(Update),
    Reduce(Reduce),
    Matmul(Matmul),
    Conv(Conv),
    ConvTranspose(ConvTranspose),
    RmsNorm(RmsNorm),
    LayerNorm(LayerNorm),
    GroupNorm(GroupNorm),
    Rope(Rope),
    Attention(Attention),
}

/// A chain of pointwise functions over operands that broadcast to the result.
///
/// Register `i` is operand `i`; after the operands, register `args + j` is what step `j` gives. The last register is
/// stored, rounded once to the dtype of the result. Registers are f32 if any operand or the result is floating point
/// (integers are converted, truth values are 0 and 1), and i64 otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Map {
    /// Steps in order; may be empty for a plain conversion or broadcast of the only operand.
    pub steps: Vec<MapStep>,
}

/// One step of a [`Map`]. Numbers are registers, all defined earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the variants are the functions of the same name
pub enum MapStep {
    Scalar(Float),
    Unary(Unary, u32),
    Binary(Binary, u32, u32),
    Compare(Compare, u32, u32),
    /// Condition, value if it is not 0, value otherwise.
    Select(u32, u32, u32),
    /// A pointwise composite.
    Function(Function, u32),
    /// `x + sin²(a x) / (b + 1e-9)`.
    Snake(u32, u32, u32),
    /// Rounds to a narrower float and back.
    Round(DType, u32),
}

impl MapStep {
    /// Registers it reads.
    pub fn registers(&self) -> Vec<u32> {
        match *self {
            MapStep::Scalar(_) => vec![],
            MapStep::Unary(_, a) | MapStep::Function(_, a) | MapStep::Round(_, a) => vec![a],
            MapStep::Binary(_, a, b) | MapStep::Compare(_, a, b) => vec![a, b],
            MapStep::Select(a, b, c) | MapStep::Snake(a, b, c) => vec![a, b, c],
        }
    }
}

/// Pointwise composites of one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are the definitions
pub enum Function {
    Sigmoid,
    Silu,
    Gelu,
    LeakyRelu(Float),
}

/// A strided copy: moves `shape` elements from the operand to the result, and leaves the rest of the result alone.
///
/// Transposes, slices, broadcasts and the parts of a concatenation are all this. Offsets and strides count elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Copy {
    /// Extents of the copied box.
    pub shape: Vec<usize>,
    /// First element read.
    pub src_offset: usize,
    /// Stride of each axis in the operand; 0 repeats.
    pub src_strides: Vec<usize>,
    /// First element written.
    pub dst_offset: usize,
    /// Stride of each axis in the result; no two indices may meet.
    pub dst_strides: Vec<usize>,
}

impl Copy {
    /// Largest element touched with these strides plus one, `None` on overflow; 0 for an empty box.
    fn reach(shape: &[usize], offset: usize, strides: &[usize]) -> Option<usize> {
        if shape.contains(&0) {
            return Some(0);
        }
        let last = shape.iter().zip(strides).try_fold(offset, |n, (&d, &s)| n.checked_add((d - 1).checked_mul(s)?))?;
        last.checked_add(1)
    }

    fn check(&self, src: &TensorType, dst: &TensorType) -> Result<(), String> {
        let rank = self.shape.len();
        let is_malformed = rank > MAX_RANK || self.src_strides.len() != rank || self.dst_strides.len() != rank;
        if is_malformed || src.dtype != dst.dtype {
            return Err(format!("copy of rank {rank} from {src} to {dst} is malformed"));
        }
        let fits = |reach: Option<usize>, ty: &TensorType| reach.is_some_and(|r| r <= ty.elements());
        if !fits(Copy::reach(&self.shape, self.src_offset, &self.src_strides), src)
            || !fits(Copy::reach(&self.shape, self.dst_offset, &self.dst_strides), dst)
        {
            return Err(format!("copy of {:?} leaves {src} or {dst}", self.shape));
        }
        // Sorted by stride, each axis must step over everything the smaller ones reach: then no two indices meet.
        let mut axes: Vec<(usize, usize)> = self.dst_strides.iter().copied().zip(self.shape.iter().copied()).collect();
        axes.retain(|&(_, extent)| extent > 1);
        axes.sort_unstable();
        let mut reach = 1usize;
        for (stride, extent) in axes {
            if stride < reach {
                return Err("copy writes elements twice".into());
            }
            reach = (extent - 1).saturating_mul(stride).saturating_add(reach);
        }
        Ok(())
    }
}

impl Map {
    fn check(&self, args: &[&TensorType], result: &TensorType) -> Result<(), String> {
        if args.is_empty() && self.steps.is_empty() {
            return Err("map without operands or steps".into());
        }
        for ty in args {
            if broadcast_shapes(&result.shape, &ty.shape).as_ref() != Some(&result.shape) {
                return Err(format!("map operand {ty} does not broadcast to {result}"));
            }
        }
        for (i, step) in self.steps.iter().enumerate() {
            if step.registers().iter().any(|&r| r as usize >= args.len() + i) {
                return Err(format!("map step {i} reads a register that is not set"));
            }
        }
        Ok(())
    }

    /// Whether registers are f32 (else i64).
    pub fn is_float(args: &[&TensorType], result: &TensorType) -> bool {
        result.dtype.is_float() || args.iter().any(|t| t.dtype.is_float())
    }
}

impl Kernel {
    /// Name for reports.
    pub fn name(&self) -> &'static str {
        match self {
            Kernel::Map(_) => "map",
            Kernel::Copy(_) => "copy",
            Kernel::Pad(op) => op.name(),
            Kernel::Gather(op) => op.name(),
            Kernel::Update(op) => op.name(),
            Kernel::Reduce(op) => op.name(),
            Kernel::Matmul(op) => op.name(),
            Kernel::Conv(op) => op.name(),
            Kernel::ConvTranspose(op) => op.name(),
            Kernel::RmsNorm(op) => op.name(),
            Kernel::LayerNorm(op) => op.name(),
            Kernel::GroupNorm(op) => op.name(),
            Kernel::Rope(op) => op.name(),
            Kernel::Attention(op) => op.name(),
        }
    }

    /// Checks that the kernel may be called with these types. Attributes may be hostile.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self, args: &[&TensorType], results: &[&TensorType]) -> Result<(), String> {
        let [result] = results else {
            return Err(format!("`{}` has one result, found {}", self.name(), results.len()));
        };
        let inferred = match self {
            Kernel::Map(map) => return map.check(args, result),
            Kernel::Copy(copy) => {
                let [src] = args else { return Err(format!("copy takes one operand, found {}", args.len())) };
                return copy.check(src, result);
            }
            Kernel::Pad(op) => op.infer(args),
            Kernel::Gather(op) => op.infer(args),
            Kernel::Update(op) => op.infer(args),
            Kernel::Reduce(op) => op.infer(args),
            Kernel::Matmul(op) => op.infer(args),
            Kernel::Conv(op) => op.infer(args),
            Kernel::ConvTranspose(op) => op.infer(args),
            Kernel::RmsNorm(op) => op.infer(args),
            Kernel::LayerNorm(op) => op.infer(args),
            Kernel::GroupNorm(op) => op.infer(args),
            Kernel::Rope(op) => op.infer(args),
            Kernel::Attention(op) => op.infer(args),
        }?;
        if inferred == **result { Ok(()) } else { Err(format!("`{}` gives {inferred}, found {result}", self.name())) }
    }

    /// Operands that the result may lie on, if they have its type: the kernel reads an element only to write that one.
    pub fn in_place(&self) -> InPlace {
        match self {
            Kernel::Map(_) => InPlace::Any,
            Kernel::Update(_) | Kernel::RmsNorm(_) | Kernel::LayerNorm(_) | Kernel::Rope(_) => InPlace::First,
            _ => InPlace::Never,
        }
    }
}

/// See [`Kernel::in_place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InPlace {
    /// Results need memory of their own.
    Never,
    /// The result may lie on the first operand.
    First,
    /// The result may lie on any operand.
    Any,
}

impl InPlace {
    /// Whether the result may lie on operand `index`.
    pub fn allows(self, index: usize) -> bool {
        self == InPlace::Any || (self == InPlace::First && index == 0)
    }
}
