//! Ops that move elements and compute nothing.

use serde::{Deserialize, Serialize};

use super::{OpDef, Primitive, attributes_by_serde, broadcast_shapes, expect_args};
use crate::eval::{Evaluator, Tensor};
use crate::types::{DType, MAX_RANK, TensorType};

/// `reshape`: the same elements in row-major order under another shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Reshape {
    /// Shape of the result, with as many elements.
    pub shape: Vec<usize>,
}

impl OpDef for Reshape {
    attributes_by_serde!("reshape");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        let out = TensorType::new(args[0].dtype, self.shape.clone());
        let fits = out.checked_bytes().is_some() && out.elements() == args[0].elements();
        if fits { Ok(out) } else { Err(format!("{} does not have the elements of {:?}", args[0], self.shape)) }
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Reshape {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        Tensor { ty: out.clone(), data: args[0].data.clone() }
    }
}

/// `transpose`: axis `i` of the result is axis `perm[i]` of the operand.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Transpose {
    /// A permutation of the axes.
    pub perm: Vec<usize>,
}

impl OpDef for Transpose {
    attributes_by_serde!("transpose");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        let mut sorted = self.perm.clone();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..args[0].rank()) {
            return Err(format!("{:?} is not a permutation of the axes of {}", self.perm, args[0]));
        }
        Ok(TensorType::new(args[0].dtype, self.perm.iter().map(|&p| args[0].shape[p]).collect::<Vec<_>>()))
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Transpose {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let src = args[0].ty.strides();
        args[0].pick(out, |index| index.iter().zip(&self.perm).map(|(&i, &p)| i * src[p]).sum())
    }
}

/// `slice`: elements `start, start + step, …` below `end` of every axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Slice {
    /// First index per axis.
    pub start: Vec<usize>,
    /// End (exclusive) per axis.
    pub end: Vec<usize>,
    /// Distance per axis, at least 1.
    pub step: Vec<usize>,
}

impl OpDef for Slice {
    attributes_by_serde!("slice");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        let rank = args[0].rank();
        if [&self.start, &self.end, &self.step].iter().any(|v| v.len() != rank) {
            return Err(format!("start, end and step need one value for each axis of {}", args[0]));
        }
        let shape = (0..rank)
            .map(|a| {
                let (start, end, step) = (self.start[a], self.end[a], self.step[a]);
                (start <= end && end <= args[0].shape[a] && step > 0).then(|| (end - start).div_ceil(step))
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| {
                format!("range {:?}..{:?} by {:?} is outside {}", self.start, self.end, self.step, args[0])
            })?;
        Ok(TensorType::new(args[0].dtype, shape))
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Slice {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let src = args[0].ty.strides();
        args[0].pick(out, |index| {
            index.iter().enumerate().map(|(a, &i)| (self.start[a] + i * self.step[a]) * src[a]).sum()
        })
    }
}

/// `concat`: the operands one after the other along `axis`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Concat {
    /// Axis along which they are joined.
    pub axis: usize,
}

impl OpDef for Concat {
    attributes_by_serde!("concat");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        let first = args.first().ok_or("needs at least one operand")?;
        if self.axis >= first.rank() {
            return Err(format!("axis {} is out of range for {first}", self.axis));
        }
        let mut out = (*first).clone();
        for ty in &args[1..] {
            let fits = ty.dtype == first.dtype
                && ty.rank() == first.rank()
                && (0..first.rank()).all(|a| a == self.axis || ty.shape[a] == first.shape[a]);
            if !fits {
                return Err(format!("{ty} cannot be joined with {first} along axis {}", self.axis));
            }
            out.shape[self.axis] = out.shape[self.axis].saturating_add(ty.shape[self.axis]);
        }
        Ok(out)
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Concat {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let mut result = Tensor::zeros(out.clone());
        let dst = out.strides();
        let mut base = 0;
        for part in args {
            part.scatter_into(&mut result, |index| {
                base * dst[self.axis] + index.iter().zip(&dst).map(|(&i, &s)| i * s).sum::<usize>()
            });
            base += part.ty.shape[self.axis];
        }
        result
    }
}

/// `broadcast`: repeats extents of 1 (and missing leading axes) up to `shape`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Broadcast {
    /// Shape of the result.
    pub shape: Vec<usize>,
}

impl OpDef for Broadcast {
    attributes_by_serde!("broadcast");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        match broadcast_shapes(&args[0].shape, &self.shape) {
            Some(shape) if shape == self.shape => Ok(TensorType::new(args[0].dtype, shape)),
            _ => Err(format!("{} does not broadcast to {:?}", args[0], self.shape)),
        }
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Broadcast {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let map = args[0].broadcast_index(&out.shape);
        args[0].pick_flat(out, |i| map.at(i))
    }
}

/// What `pad` puts outside the operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PadMode {
    /// Zeros.
    Zeros,
    /// The nearest element.
    Edge,
    /// The mirror image without repeating the edge; needs an extent larger than the padding.
    Reflect,
    /// The other end.
    Circular,
}

/// `pad`: `lo` and `hi` elements more in front of and behind every axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pad {
    /// Elements in front, per axis.
    pub lo: Vec<usize>,
    /// Elements behind, per axis.
    pub hi: Vec<usize>,
    /// What they are.
    pub mode: PadMode,
}

impl Pad {
    /// The source index of result index `i` on an axis of extent `n` with `lo` in front; `None` where a zero stands.
    pub fn source_index(&self, i: usize, lo: usize, n: usize) -> Option<usize> {
        let k = i as isize - lo as isize;
        let n = n as isize;
        let inside = (0..n).contains(&k);
        match self.mode {
            _ if inside => Some(k as usize),
            PadMode::Zeros => None,
            PadMode::Edge => Some(k.clamp(0, n - 1) as usize),
            PadMode::Reflect => Some(if k < 0 { -k } else { 2 * (n - 1) - k } as usize),
            PadMode::Circular => Some(k.rem_euclid(n) as usize),
        }
    }
}

impl OpDef for Pad {
    attributes_by_serde!("pad");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        let ty = args[0];
        if self.lo.len() != ty.rank() || self.hi.len() != ty.rank() {
            return Err(format!("lo and hi need one value for each axis of {ty}"));
        }
        let mut out = ty.clone();
        for a in 0..ty.rank() {
            let (n, most) = (ty.shape[a], self.lo[a].max(self.hi[a]));
            let ok = match self.mode {
                PadMode::Zeros => true,
                PadMode::Edge => most == 0 || n > 0,
                PadMode::Reflect => most == 0 || most < n,
                PadMode::Circular => most <= n,
            };
            if !ok {
                return Err(format!("padding {most} of axis {a} is too large for {ty} in mode {:?}", self.mode));
            }
            out.shape[a] = n.saturating_add(self.lo[a]).saturating_add(self.hi[a]);
        }
        Ok(out)
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Pad {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let (src, shape) = (args[0].ty.strides(), &args[0].ty.shape);
        args[0].pick_or_zero(out, |index| {
            (0..index.len()).map(|a| Some(self.source_index(index[a], self.lo[a], shape[a])? * src[a])).sum()
        })
    }
}

/// `gather`: rows of the first operand along `axis`, chosen by the second (`i32[m]`). Indices are clamped into range.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Gather {
    /// Axis that is indexed; it gets extent m.
    pub axis: usize,
}

impl OpDef for Gather {
    attributes_by_serde!("gather");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 2)?;
        if self.axis >= args[0].rank() || args[0].shape[self.axis] == 0 {
            return Err(format!("axis {} of {} cannot be indexed", self.axis, args[0]));
        }
        if args[1].dtype != DType::I32 || args[1].rank() != 1 {
            return Err(format!("indices are {}, expected i32[m]", args[1]));
        }
        let mut out = args[0].clone();
        out.shape[self.axis] = args[1].shape[0];
        Ok(out)
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Gather {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let src = args[0].ty.strides();
        let last = args[0].ty.shape[self.axis] as i64 - 1;
        let rows: Vec<usize> = args[1].ints().iter().map(|&i| i.clamp(0, last) as usize).collect();
        args[0].pick(out, |index| {
            index.iter().enumerate().map(|(a, &i)| if a == self.axis { rows[i] * src[a] } else { i * src[a] }).sum()
        })
    }
}

/// `update`: the first operand with the second written at row `row` of `axis`; the third is that row, an `i32[]`.
///
/// The row is clamped so that the written part stays inside. Meant for caches that live across calls.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Update {
    /// Axis along which the row counts.
    pub axis: usize,
}

impl OpDef for Update {
    attributes_by_serde!("update");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 3)?;
        let (base, part) = (args[0], args[1]);
        let fits = base.dtype == part.dtype
            && base.rank() == part.rank()
            && base.rank() <= MAX_RANK
            && self.axis < base.rank()
            && (0..base.rank())
                .all(|a| if a == self.axis { part.shape[a] <= base.shape[a] } else { part.shape[a] == base.shape[a] });
        if !fits {
            return Err(format!("{part} cannot be written into {base} along axis {}", self.axis));
        }
        if *args[2] != TensorType::i32([]) {
            return Err(format!("the row is {}, expected i32[]", args[2]));
        }
        Ok(base.clone())
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Update {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let mut result = args[0].clone();
        let dst = out.strides();
        let room = (out.shape[self.axis] - args[1].ty.shape[self.axis]) as i64;
        let row = args[2].ints()[0].clamp(0, room) as usize;
        args[1].scatter_into(&mut result, |index| {
            row * dst[self.axis] + index.iter().zip(&dst).map(|(&i, &s)| i * s).sum::<usize>()
        });
        result
    }
}
