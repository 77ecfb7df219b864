//! Kernel calls as a GPU takes them.
//!
//! A plan allows more than devices do: operands may lie at any offset that their dtype can have, where devices bind memory
//! at multiples of some bytes; results may end inside a word, where kernels write whole words; and a fused call may have no
//! kernel of its own. [`steps_of`] turns a call into single kernels that ask for nothing like that:
//! - the parts of a fused call run one after the other, which is its meaning, with what flows between them in scratch;
//! - an operand at an odd offset is copied into scratch first, and such a result is copied to its place;
//! - a copy needs none of this, because its own offsets count elements.
//!
//! Scratch is shared by all calls: what one leaves there means nothing to the next.

use std::borrow::Cow;

use ltxc_ir::TensorType;
use ltxc_ir::plan::{Copy, Fused, Kernel, Part, PartArg, Source, Work};

use super::{Call, Region};

/// Every tensor in scratch starts at a multiple of this, which every device accepts.
const SCRATCH_ALIGNMENT: u64 = 512;

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

/// One kernel.
#[derive(Debug)]
pub(crate) struct KernelStep<'a> {
    pub kernel: Cow<'a, Kernel>,
    pub args: Vec<Tensor<'a>>,
    pub result: Tensor<'a>,
    /// Where the kernel's own scratch starts, and its size.
    pub scratch: (u64, u64),
}

/// What kernels of a device ask for.
pub(crate) struct Rules<'r> {
    /// Tensors start at multiples of this many bytes.
    pub alignment: u64,
    /// Scratch of a kernel with these operand types and result type.
    pub scratch_bytes: &'r dyn Fn(&Kernel, &[&TensorType], &TensorType) -> u64,
}

/// The steps of a call in order, and the scratch that they need.
pub(crate) fn steps_of<'a>(call: &Call<'a>, rules: &Rules<'_>) -> (Vec<KernelStep<'a>>, u64) {
    let mut writer = Writer { rules, steps: Vec::new(), scratch: Scratch::default() };
    let tensor = |&(ty, region): &(&'a TensorType, Region)| Tensor { ty: Cow::Borrowed(ty), at: At::Region(region) };
    let args: Vec<Tensor<'a>> = call.args.iter().map(tensor).collect();
    let results: Vec<Tensor<'a>> = call.results.iter().map(tensor).collect();
    match call.work {
        Work::Kernel(kernel) => writer.kernel(kernel, args, results[0].clone()),
        Work::Fused(fused) => writer.parts(fused, &args, &results),
    }
    (writer.steps, writer.scratch.peak)
}

struct Writer<'a, 'r> {
    rules: &'r Rules<'r>,
    steps: Vec<KernelStep<'a>>,
    scratch: Scratch,
}

impl<'a> Writer<'a, '_> {
    /// The parts of a fused call, one after the other.
    fn parts(&mut self, fused: &'a Fused, args: &[Tensor<'a>], results: &[Tensor<'a>]) {
        let readers = |source: Source| {
            let reads = move |i: &usize| fused.parts[*i].args.iter().any(|a| a.source == source);
            (0..fused.parts.len()).filter(reads)
        };
        let mut made: Vec<At> = Vec::with_capacity(fused.parts.len());
        let mut late: Vec<(Tensor<'a>, Tensor<'a>)> = Vec::new();
        for (i, part) in fused.parts.iter().enumerate() {
            let stored = fused.stored.iter().position(|&s| s as usize == i).map(|k| &results[k]);
            let operands: Vec<Tensor<'a>> = (part.args.iter())
                .map(|arg| {
                    let at = match arg.source {
                        Source::Operand(a) => args[a as usize].at,
                        Source::Part(p) => made[p as usize],
                    };
                    Tensor { ty: Cow::Borrowed(&arg.ty), at }
                })
                .collect();
            // A fused call reads all of an operand before it writes over it; its parts do not wait for each other.
            let is_free = |result: &Tensor<'a>| {
                (0..args.len()).filter(|&a| overlaps(&args[a], result)).all(|a| {
                    readers(Source::Operand(a as u32))
                        .all(|j| j < i || (j == i && may_overwrite(part, a, args, result)))
                })
            };
            let ty = Cow::Borrowed(&part.result);
            let result = match stored {
                Some(result) if is_free(result) => Tensor { ty, at: result.at },
                _ => Tensor { at: At::Scratch(self.scratch.reserve(part.result.bytes())), ty },
            };
            self.kernel(&part.kernel, operands, result.clone());
            made.push(result.at);
            match stored {
                Some(place) if place.at != result.at => {
                    late.push((result, Tensor { ty: Cow::Borrowed(&part.result), at: place.at }));
                }
                _ => {}
            }
            // What nobody reads any more makes room.
            for (p, at) in made[..i].iter().enumerate().filter(|&(p, _)| !fused.stored.contains(&(p as u32))) {
                if let At::Scratch(start) = *at
                    && readers(Source::Part(p as u32)).next_back() == Some(i)
                {
                    self.scratch.release(start);
                }
            }
        }
        late.into_iter().for_each(|(from, to)| self.copy(from, to));
    }

    /// One kernel, with copies around it where operands do not lie as the device asks.
    fn kernel(&mut self, kernel: &'a Kernel, args: Vec<Tensor<'a>>, result: Tensor<'a>) {
        if result.ty.elements() == 0 {
            return;
        }
        if let Kernel::Copy(op) = kernel {
            let [from] = &args[..] else { return };
            return self.step_copy(op.clone(), from.clone(), result);
        }
        let mut taken = Vec::new();
        let args: Vec<Tensor<'a>> = (args.into_iter())
            .map(|arg| match self.is_aligned(&arg) || arg.ty.elements() == 0 {
                true => arg,
                false => {
                    let start = self.scratch.reserve(arg.ty.bytes());
                    taken.push(start);
                    let copy = Tensor { ty: arg.ty.clone(), at: At::Scratch(start) };
                    self.copy(arg, copy.clone());
                    copy
                }
            })
            .collect();
        let ends_in_word = !result.ty.bytes().is_multiple_of(WORD) && matches!(result.at, At::Region(_));
        let place = match self.is_aligned(&result) && !ends_in_word {
            true => result.clone(),
            false => {
                let start = self.scratch.reserve(result.ty.bytes());
                taken.push(start);
                Tensor { ty: result.ty.clone(), at: At::Scratch(start) }
            }
        };
        self.push(Cow::Borrowed(kernel), args, place.clone());
        if place.at != result.at {
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
        self.push(Cow::Owned(Kernel::Copy(op)), vec![from], to);
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

    fn push(&mut self, kernel: Cow<'a, Kernel>, args: Vec<Tensor<'a>>, result: Tensor<'a>) {
        let types: Vec<&TensorType> = args.iter().map(|a| &*a.ty).collect();
        let bytes = (self.rules.scratch_bytes)(&kernel, &types, &result.ty);
        let start = self.scratch.reserve(bytes as usize);
        self.scratch.release(start);
        self.steps.push(KernelStep { kernel, args, result, scratch: (start, bytes) });
    }
}

/// Whether a part may write its result over operand `a` of the call, which it reads.
fn may_overwrite(part: &Part, a: usize, args: &[Tensor<'_>], result: &Tensor<'_>) -> bool {
    let own = |arg: &PartArg| arg.source == Source::Operand(a as u32);
    let allows = |(j, arg): (usize, &PartArg)| !own(arg) || (part.kernel.in_place().allows(j) && arg.ty == part.result);
    args[a].at == result.at && part.args.iter().enumerate().all(allows)
}

fn overlaps(a: &Tensor<'_>, b: &Tensor<'_>) -> bool {
    match (a.at, b.at) {
        (At::Region(x), At::Region(y)) => {
            let (x_end, y_end) = (x.at(a.ty.bytes() as u64).offset, y.at(b.ty.bytes() as u64).offset);
            x.buffer == y.buffer && x.offset < y_end && y.offset < x_end
        }
        _ => false,
    }
}

/// Places in scratch: each as early as it fits.
#[derive(Default)]
struct Scratch {
    /// Start and end of what is reserved, in order.
    taken: Vec<(u64, u64)>,
    peak: u64,
}

impl Scratch {
    fn reserve(&mut self, bytes: usize) -> u64 {
        let bytes = (bytes.max(1) as u64).next_multiple_of(SCRATCH_ALIGNMENT);
        let mut start = 0;
        let mut index = 0;
        for &(taken, end) in &self.taken {
            if taken - start >= bytes {
                break;
            }
            start = end;
            index += 1;
        }
        self.taken.insert(index, (start, start + bytes));
        self.peak = self.peak.max(start + bytes);
        start
    }

    fn release(&mut self, start: u64) {
        self.taken.retain(|&(taken, _)| taken != start);
    }
}

#[cfg(test)]
mod tests;
