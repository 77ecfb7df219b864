//! Kernel calls as a GPU takes them.
//!
//! A plan allows more than devices do: operands may lie at any offset that their dtype can have, where devices bind memory
//! at multiples of some bytes; and results may end inside a word, where kernels write whole words. [`steps_of`] turns a call
//! into calls that ask for nothing like that:
//! - an operand at an odd offset is copied into scratch first, and such a result is copied to its place;
//! - a copy needs none of this, because its own offsets count elements.
//!
//! Scratch is shared by all calls: what one leaves there means nothing to the next.

use std::borrow::Cow;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{Copy, Kernel, Work};
use ltxc_kernels::scratch::Scratch;

use super::{Call, Region};

/// Kernels write whole words of this many bytes.
const WORD: usize = 4;

/// Where an operand of a step lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    Region(Region),
    /// Bytes from the start of scratch.
    Scratch(u64),
}

/// An operand of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tensor<'a> {
    pub ty: Cow<'a, TensorType>,
    pub at: At,
}

/// One call of a device.
#[derive(Debug)]
pub(crate) struct WorkStep<'a> {
    pub work: Cow<'a, Work>,
    pub args: Vec<Tensor<'a>>,
    pub results: Vec<Tensor<'a>>,
    /// Where the work's own scratch starts, and its size.
    pub scratch: (u64, u64),
}

/// What a device asks for.
pub(crate) struct Rules<'a, 'r> {
    /// Tensors start at multiples of this many bytes.
    pub alignment: u64,
    /// Scratch of a work with these operand and result types.
    pub scratch_bytes: &'r ScratchBytes<'a, 'r>,
}

/// Bytes for a work, its operand types and its result types.
pub(crate) type ScratchBytes<'a, 'r> = dyn Fn(&Cow<'a, Work>, &[&TensorType], &[&TensorType]) -> u64 + 'r;

/// The steps of a call in order, and the scratch that they need.
pub(crate) fn steps_of<'a>(call: &Call<'a>, rules: &Rules<'a, '_>) -> (Vec<WorkStep<'a>>, u64) {
    let mut writer = Writer { rules, steps: Vec::new(), scratch: Scratch::default() };
    let tensor = |&(ty, region): &(&'a TensorType, Region)| Tensor { ty: Cow::Borrowed(ty), at: At::Region(region) };
    let args: Vec<Tensor<'a>> = call.args.iter().map(tensor).collect();
    let results: Vec<Tensor<'a>> = call.results.iter().map(tensor).collect();
    writer.call(call.work, args, results);
    (writer.steps, writer.scratch.peak())
}

struct Writer<'a, 'r> {
    rules: &'r Rules<'a, 'r>,
    steps: Vec<WorkStep<'a>>,
    scratch: Scratch,
}

impl<'a> Writer<'a, '_> {
    /// One call, with copies around it where operands do not lie as the device asks.
    fn call(&mut self, work: &'a Work, args: Vec<Tensor<'a>>, results: Vec<Tensor<'a>>) {
        if results.iter().all(|result| result.ty.elements() == 0) {
            return;
        }
        if let (Work::Kernel(Kernel::Copy(op)), [from], [to]) = (work, &args[..], &results[..]) {
            return self.step_copy(op.clone(), from.clone(), to.clone());
        }
        let mut taken = Vec::new();
        let mut reserve = |scratch: &mut Scratch, ty: &Cow<'a, TensorType>| {
            let start = scratch.reserve(ty.bytes() as u64);
            taken.push(start);
            Tensor { ty: ty.clone(), at: At::Scratch(start) }
        };
        let mut own_args = Vec::with_capacity(args.len());
        for arg in args {
            if self.is_aligned(&arg) || arg.ty.elements() == 0 {
                own_args.push(arg);
            } else {
                let copy = reserve(&mut self.scratch, &arg.ty);
                self.copy(arg, copy.clone());
                own_args.push(copy);
            }
        }
        let mut places = Vec::with_capacity(results.len());
        for result in &results {
            let ends_in_word = !result.ty.bytes().is_multiple_of(WORD);
            let is_kept = self.is_aligned(result) && !ends_in_word;
            places.push(if is_kept { result.clone() } else { reserve(&mut self.scratch, &result.ty) });
        }
        self.push(Cow::Borrowed(work), own_args, places.clone());
        for (place, result) in places.into_iter().zip(results).filter(|(place, result)| place.at != result.at) {
            self.copy(place, result);
        }
        taken.into_iter().for_each(|start| self.scratch.release(start));
    }

    /// Copies all elements of a tensor.
    fn copy(&mut self, from: Tensor<'a>, to: Tensor<'a>) {
        let n = from.ty.elements();
        let all = Copy { shape: vec![n], src_offset: 0, src_strides: vec![1], dst_offset: 0, dst_strides: vec![1] };
        self.step_copy(all, from, to);
    }

    /// A copy between tensors that start at the aligned places before their own.
    fn step_copy(&mut self, mut op: Copy, from: Tensor<'a>, to: Tensor<'a>) {
        let (from, before_from) = self.widened(from);
        let (to, before_to) = self.widened(to);
        op.src_offset += before_from;
        op.dst_offset += before_to;
        self.push(Cow::Owned(Work::Kernel(Kernel::Copy(op))), vec![from], vec![to]);
    }

    /// The tensor as one line from the aligned place before it to the end of its last word, and the number of elements
    /// before its first.
    fn widened(&self, tensor: Tensor<'a>) -> (Tensor<'a>, usize) {
        let size = tensor.ty.dtype.bytes();
        let (at, before) = match tensor.at {
            At::Region(region) => {
                let start = region.offset / self.rules.alignment * self.rules.alignment;
                (At::Region(Region { offset: start, ..region }), (region.offset - start) as usize / size)
            }
            scratch => (scratch, 0),
        };
        let elements = (before + tensor.ty.elements()).next_multiple_of(WORD / size);
        (Tensor { ty: Cow::Owned(TensorType::new(tensor.ty.dtype, [elements])), at }, before)
    }

    fn is_aligned(&self, tensor: &Tensor<'_>) -> bool {
        match tensor.at {
            At::Region(region) => region.offset.is_multiple_of(self.rules.alignment),
            At::Scratch(_) => true,
        }
    }

    fn push(&mut self, work: Cow<'a, Work>, args: Vec<Tensor<'a>>, results: Vec<Tensor<'a>>) {
        let bytes = (self.rules.scratch_bytes)(&work, &types(&args), &types(&results));
        let start = self.scratch.reserve(bytes);
        self.scratch.release(start);
        self.steps.push(WorkStep { work, args, results, scratch: (start, bytes) });
    }
}

/// Types of tensors.
pub(crate) fn types<'t>(tensors: &'t [Tensor<'_>]) -> Vec<&'t TensorType> {
    tensors.iter().map(|t| &*t.ty).collect()
}

#[cfg(test)]
mod tests;
