//! Values as views: movement ops change how a buffer is looked at, and only what a kernel cannot look at is copied.

use ltxc_ir::TensorType;
use ltxc_ir::ops::{Broadcast, Slice, Transpose};
use ltxc_ir::plan::Copy;
use ltxc_ir::types::strides_of;

/// What a view looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    /// A parameter of the function.
    Param(u32),
    /// A weight of the function.
    Weight(u32),
    /// A constant of the function.
    Constant(usize),
    /// A buffer that steps write.
    Buffer(usize),
}

/// Elements of a base, in an order given by strides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub base: Base,
    /// First element.
    pub offset: usize,
    /// Type of the value.
    pub ty: TensorType,
    /// Distance of neighbours along each axis, in elements; 0 repeats.
    pub strides: Vec<usize>,
}

impl View {
    /// All of a base of type `ty`.
    pub fn whole(base: Base, ty: TensorType) -> View {
        View { base, offset: 0, strides: ty.strides(), ty }
    }

    /// Whether the elements lie one after the other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let packed = self.ty.strides();
        let same = |a: usize| self.ty.shape[a] <= 1 || self.strides[a] == packed[a];
        self.ty.elements() == 0 || (0..self.ty.rank()).all(same)
    }

    pub fn transpose(&self, op: &Transpose, ty: &TensorType) -> View {
        View { ty: ty.clone(), strides: op.perm.iter().map(|&p| self.strides[p]).collect(), ..*self }
    }

    pub fn slice(&self, op: &Slice, ty: &TensorType) -> View {
        // An empty view has no first element; any offset inside the base will do.
        let start = |a: usize| if ty.elements() == 0 { 0 } else { op.start[a] * self.strides[a] };
        let offset = self.offset + (0..ty.rank()).map(start).sum::<usize>();
        let strides = self.strides.iter().zip(&op.step).map(|(&s, &step)| s.saturating_mul(step)).collect();
        View { base: self.base, offset, ty: ty.clone(), strides }
    }

    pub fn broadcast(&self, _: &Broadcast, ty: &TensorType) -> View {
        let lead = ty.rank() - self.ty.rank();
        let stride = |a: usize| match a.checked_sub(lead) {
            Some(own) if self.ty.shape[own] == ty.shape[a] => self.strides[own],
            _ => 0,
        };
        View { ty: ty.clone(), strides: (0..ty.rank()).map(stride).collect(), ..*self }
    }

    /// The same elements in row-major order under another shape, if strides can express that.
    pub fn reshape(&self, ty: &TensorType) -> Option<View> {
        let strides = match self.is_contiguous() {
            true => ty.strides(),
            false => reshaped_strides(&self.ty.shape, &self.strides, &ty.shape)?,
        };
        Some(View { base: self.base, offset: self.offset, ty: ty.clone(), strides })
    }

    /// The view with repeated axes reduced to extent 1: what a kernel that broadcasts can read instead.
    pub fn without_repeats(&self) -> View {
        let mut view = self.clone();
        for a in 0..view.ty.rank() {
            if view.strides[a] == 0 && view.ty.shape[a] > 1 {
                view.ty.shape[a] = 1;
            }
        }
        view
    }

    /// The copy of this view's elements to a tensor with these strides, starting at `dst_offset`.
    pub fn copy_to(&self, dst_offset: usize, dst_strides: &[usize]) -> Copy {
        let mut copy = Copy {
            shape: Vec::new(),
            src_offset: self.offset,
            src_strides: Vec::new(),
            dst_offset,
            dst_strides: Vec::new(),
        };
        for (a, &extent) in self.ty.shape.iter().enumerate() {
            let (src, dst) = (self.strides[a], dst_strides[a]);
            if extent == 1 {
                continue;
            }
            // Two axes that are one in both tensors are copied as one.
            if let (Some(n), Some(s), Some(d)) =
                (copy.shape.last_mut(), copy.src_strides.last_mut(), copy.dst_strides.last_mut())
                && *s == src * extent
                && *d == dst * extent
            {
                *n *= extent;
                (*s, *d) = (src, dst);
                continue;
            }
            copy.shape.push(extent);
            copy.src_strides.push(src);
            copy.dst_strides.push(dst);
        }
        copy
    }
}

/// Strides of `new` over the elements that `strides` gives for `old`; `None` if an axis of `new` would need two.
fn reshaped_strides(old: &[usize], strides: &[usize], new: &[usize]) -> Option<Vec<usize>> {
    // Runs of old axes that are one axis: extent and stride of the innermost.
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (&extent, &stride) in old.iter().zip(strides) {
        match runs.last_mut() {
            _ if extent == 1 => {}
            Some((n, s)) if *s == stride.checked_mul(extent)? => (*n, *s) = (n.checked_mul(extent)?, stride),
            _ => runs.push((extent, stride)),
        }
    }
    // Every run must be a product of consecutive new axes.
    let mut out = vec![0; new.len()];
    let mut axis = new.len();
    for &(run, stride) in runs.iter().rev() {
        let mut left = run;
        let mut step = stride;
        while left > 1 {
            axis = axis.checked_sub(1)?;
            if new[axis] == 0 || left % new[axis] != 0 {
                return None;
            }
            out[axis] = step;
            left /= new[axis];
            step = step.checked_mul(new[axis])?;
        }
    }
    // Axes of extent 1 that remain have any stride; give them that of a packed tensor.
    let packed = strides_of(new);
    new.iter().enumerate().filter(|(_, n)| **n == 1).for_each(|(a, _)| out[a] = packed[a]);
    new[..axis].iter().all(|&n| n == 1).then_some(out)
}
