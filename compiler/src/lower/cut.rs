//! Calls on tensors that are larger than a target can bind or count, or that would keep it busy for too long, cut into
//! calls on parts of them.
//!
//! Kernels of devices index with 32 bits. Where an extent needs more, the plan has several calls at different offsets, which
//! are 64 bits wide on every device: so no kernel pays for wide arithmetic, and that indices fit is known when the plan is
//! made.
//!
//! A call is cut along the outermost axis that it has, so that what a piece writes and reads is one range of each tensor:
//!
//! | call | pieces | what a piece reads |
//! | --- | --- | --- |
//! | form *rows*, product with one right operand | rows | the same rows |
//! | product of batches, group norm, transposed convolution | batches | the same batches |
//! | attention | batches, or queries of one batch | the same queries, all keys |
//! | convolution, pad | batches, or frames of one batch (then rows of one frame) | what lies under its taps |
//! | reduction, gather | what is outside of their axis | the same |
//! | copy | its outermost axis | the same |
//!
//! Pieces that are still too large are cut again along the next axis. What parts of a fused call need of each other
//! follows from the last part back to the operands.

use std::borrow::Cow;

use ltxc_ir::ops::PadMode;
use ltxc_ir::plan::fused::{cut_rows, leading_axes};
use ltxc_ir::plan::{Access, Copy, Fused, Kernel, Operand, Part, PartArg, Source, Target, Work};
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::catalogue;

/// Most calls that one becomes: with more, a plan is no longer small, and a smaller size is the better answer.
const MOST_PIECES: usize = 1 << 12;

/// Work on a part of what a call computes, or on all of it.
pub(super) struct Piece {
    pub work: Work,
    pub args: Vec<Operand>,
    pub results: Vec<Operand>,
}

impl Piece {
    fn operands(&self) -> impl Iterator<Item = &Operand> {
        self.args.iter().chain(&self.results)
    }

    /// The first type that a target does not hold. Parts of a fused call count, because a device may run them one by one.
    fn beyond(&self, target: &Target) -> Option<&TensorType> {
        let inner = match &self.work {
            Work::Kernel(_) => &[][..],
            Work::Fused(fused) => &fused.parts,
        };
        let mut types = self.operands().map(|o| &o.ty).chain(inner.iter().map(|p| &p.result));
        types.find(|ty| !target.holds(ty))
    }

    /// Whether a target is busy with it for so long that a system may take it for dead.
    fn is_long(&self, target: &Target) -> bool {
        let args: Vec<&TensorType> = self.args.iter().map(|o| &o.ty).collect();
        let results: Vec<&TensorType> = self.results.iter().map(|o| &o.ty).collect();
        catalogue::flops(&self.work, &args, &results) > target.max_call_flops()
    }

    /// Whether a target holds it, with what is bound in front of operands that do not begin where tensors can be bound.
    fn fits(&self, target: &Target) -> bool {
        let bound = |o: &Operand| o.ty.bytes() as u64 + o.offset % target.alignment;
        let count = self.args.len() + self.results.len();
        self.beyond(target).is_none()
            && !self.is_long(target)
            && count <= target.max_bindings as usize
            && self.operands().all(|o| bound(o) <= target.max_tensor_bytes)
    }
}

/// A call as pieces that the target holds, and does soon enough if they can be cut so: one if it does so already.
///
/// # Errors
/// A type that it does not hold, if the call cannot be cut.
pub(super) fn pieces(whole: Piece, target: &Target) -> Result<Vec<Piece>, TensorType> {
    let problem = whole.beyond(target).cloned();
    if problem.is_none() && !whole.is_long(target) {
        return Ok(vec![whole]);
    }
    let cut = Cut::all(&whole).iter().find_map(|cut| cut.pieces(target));
    match (cut, problem) {
        (Some(pieces), _) => Ok(pieces),
        (None, Some(problem)) => Err(problem),
        (None, None) => Ok(vec![whole]),
    }
}

/// A way to cut a call.
struct Cut<'a> {
    whole: &'a Piece,
    along: Along<'a>,
    /// What is counted: rows, or places of an axis.
    count: usize,
}

enum Along<'a> {
    /// Rows of what the call computes before copies store it; a kernel is the only part.
    Rows(Cow<'a, Fused>),
    /// An axis of the box of a copy.
    Axis(&'a Copy, usize),
}

impl<'a> Cut<'a> {
    /// All ways to cut a call, largest pieces first.
    fn all(whole: &'a Piece) -> Vec<Cut<'a>> {
        if let Work::Kernel(Kernel::Copy(copy)) = &whole.work {
            let mut axes: Vec<usize> = (0..copy.shape.len()).filter(|&a| copy.shape[a] > 1).collect();
            axes.sort_by_key(|&a| std::cmp::Reverse(copy.dst_strides[a]));
            return axes.iter().map(|&a| Cut { whole, along: Along::Axis(copy, a), count: copy.shape[a] }).collect();
        }
        let fused = match &whole.work {
            Work::Fused(fused) => Cow::Borrowed(fused),
            Work::Kernel(kernel) => match alone(kernel, whole) {
                Some(fused) => Cow::Owned(fused),
                None => return Vec::new(),
            },
        };
        let Some(computed) = computed(&fused) else { return Vec::new() };
        // Every product of leading axes counts rows.
        let mut counts: Vec<usize> = Vec::new();
        for &extent in computed.shape.iter().filter(|&&extent| extent > 1) {
            counts.push(counts.last().unwrap_or(&1).saturating_mul(extent));
        }
        counts.iter().map(|&count| Cut { whole, along: Along::Rows(fused.clone()), count }).collect()
    }

    /// Pieces that the target holds, as few as possible; `None` if there are none.
    fn pieces(&self, target: &Target) -> Option<Vec<Piece>> {
        let fits = |n: usize| self.each(n).all(|piece| piece.is_some_and(|p| p.fits(target)));
        // With fewer there are too many pieces.
        let least = self.count.div_ceil(MOST_PIECES);
        // All of a copy may fit, where what it copies from or to is larger.
        let is_smaller = matches!(self.along, Along::Rows(_));
        let (mut most, mut too_many) = (least - 1, self.count + usize::from(!is_smaller));
        while most + 1 < too_many {
            let middle = most + (too_many - most) / 2;
            if fits(middle) { most = middle } else { too_many = middle }
        }
        if most < least {
            return if least == 1 { self.cut_again(target) } else { None };
        }
        // Pieces begin where devices can bind them, if that is possible without too many of them.
        let begins_aligned = |piece: Piece| piece.operands().all(|o| o.offset.is_multiple_of(target.alignment));
        let are_aligned = |&n: &usize| self.each(n).all(|piece| piece.is_some_and(begins_aligned));
        let steps = (0..usize::BITS).map(|bit| 1 << bit).take_while(|&step| step <= most);
        let steps = steps.take_while(|&step| step as u64 <= target.alignment);
        let n = steps.map(|step| most / step * step).filter(|&n| n >= least).find(are_aligned).unwrap_or(most);
        self.each(n).collect()
    }

    /// The pieces of one row or place each, which are too large and are cut along another axis.
    fn cut_again(&self, target: &Target) -> Option<Vec<Piece>> {
        let mut all = Vec::new();
        for piece in self.each(1) {
            all.extend(pieces(piece?, target).ok()?);
            if all.len() > MOST_PIECES {
                return None;
            }
        }
        all.iter().all(|piece| piece.fits(target)).then_some(all)
    }

    /// The pieces of `n` rows or places, and one of what is left.
    fn each(&self, n: usize) -> impl Iterator<Item = Option<Piece>> {
        (0..self.count).step_by(n).map(move |start| {
            let n = n.min(self.count - start);
            match &self.along {
                Along::Axis(copy, axis) => Some(self.piece_of_copy(copy, *axis, start, n)),
                Along::Rows(fused) => self.piece_of_rows(fused, start, n),
            }
        })
    }

    fn piece_of_copy(&self, copy: &Copy, axis: usize, start: usize, n: usize) -> Piece {
        let (copy, from, to) = cut_copy(copy, axis, start, n, self.whole.args[0].ty.dtype);
        Piece {
            work: Kernel::Copy(copy).into(),
            args: vec![from.of(&self.whole.args[0])],
            results: vec![to.of(&self.whole.results[0])],
        }
    }

    fn piece_of_rows(&self, fused: &Fused, start: usize, n: usize) -> Option<Piece> {
        let asked = Span::Rows { of: self.count, start, n };
        let mut made: Vec<Option<Span>> = vec![None; fused.parts.len()];
        let mut parts: Vec<(Part, Vec<Span>)> = Vec::with_capacity(fused.parts.len());
        let mut stored: Vec<Option<Range>> = vec![None; fused.stored.len()];
        for (i, part) in fused.parts.iter().enumerate().rev() {
            let result = fused.stored.iter().position(|&s| s as usize == i);
            let (part, spans) = if let Kernel::Copy(copy) = &part.kernel {
                let (part, to) = cut_store(copy, part, self.count, start, n)?;
                stored[result?] = Some(to);
                (part, vec![asked])
            } else {
                if let Some(result) = result {
                    note(&mut made[i], asked)?;
                    stored[result] = Some(asked.range(&self.whole.results[result].ty));
                }
                cut_part(part, made[i]?)?
            };
            for (arg, &span) in part.args.iter().zip(&spans) {
                if let Source::Part(s) = arg.source {
                    note(&mut made[s as usize], span)?;
                }
            }
            parts.push((part, spans));
        }
        parts.reverse();
        // An operand of which parts need different rows is several ones.
        let mut operands: Vec<(u32, Span)> = Vec::new();
        for (part, spans) in &parts {
            let read = part.args.iter().zip(spans).filter_map(|(arg, &span)| match arg.source {
                Source::Operand(a) => Some((a, span)),
                Source::Part(_) => None,
            });
            operands.extend(read);
        }
        operands.sort_unstable();
        operands.dedup();
        for (part, spans) in &mut parts {
            for (arg, span) in part.args.iter_mut().zip(spans) {
                if let Source::Operand(a) = &mut arg.source {
                    *a = operands.iter().position(|o| *o == (*a, *span))? as u32;
                }
            }
        }
        let args = operands.iter().map(|&(a, span)| {
            let operand = &self.whole.args[a as usize];
            span.range(&operand.ty).of(operand)
        });
        let results = stored.into_iter().zip(&self.whole.results).map(|(range, result)| Some(range?.of(result)));
        let parts: Vec<Part> = parts.into_iter().map(|(part, _)| part).collect();
        let piece = Piece {
            args: args.collect(),
            results: results.collect::<Option<_>>()?,
            work: match &self.whole.work {
                Work::Kernel(_) => Work::Kernel(parts.into_iter().next()?.kernel),
                Work::Fused(_) => Work::Fused(Fused { parts, ..fused.clone() }),
            },
        };
        let types = |operands: &[Operand]| operands.iter().map(|o| o.ty.clone()).collect::<Vec<_>>();
        let (args, results) = (types(&piece.args), types(&piece.results));
        piece.work.check(&args.iter().collect::<Vec<_>>(), &results.iter().collect::<Vec<_>>()).ok()?;
        Some(piece)
    }
}

/// A kernel as the only part of a fused call.
fn alone(kernel: &Kernel, whole: &Piece) -> Option<Fused> {
    let args = whole.args.iter().zip(0..).map(|(arg, i)| PartArg { source: Source::Operand(i), ty: arg.ty.clone() });
    let part = Part { kernel: kernel.clone(), args: args.collect(), result: whole.results.first()?.ty.clone() };
    Some(Fused { pattern: String::new(), parts: vec![part], stored: vec![0] })
}

/// What a call computes, before copies rearrange it.
fn computed(fused: &Fused) -> Option<&TensorType> {
    let part = &fused.parts[*fused.stored.first()? as usize];
    match (&part.kernel, &part.args[..]) {
        (Kernel::Copy(_), [arg]) => match arg.source {
            Source::Part(s) => Some(&fused.parts[s as usize].result),
            Source::Operand(_) => None,
        },
        _ => Some(&part.result),
    }
}

/// What a piece has of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Span {
    Whole,
    /// `n` rows from `start` on, where leading axes count `of` rows.
    Rows {
        of: usize,
        start: usize,
        n: usize,
    },
}

impl Span {
    fn range(self, ty: &TensorType) -> Range {
        match self {
            Span::Whole => Range { start: 0, ty: ty.clone() },
            Span::Rows { of, start, n } => {
                let row = ty.elements() / of;
                let cut = match leading_axes(ty, of) {
                    Some(_) => cut_rows(ty, of, n),
                    None => TensorType::new(ty.dtype, [row * n]),
                };
                Range { start: row * start, ty: cut }
            }
        }
    }
}

/// Elements of a tensor from `start` on, read as another one.
#[derive(Clone)]
struct Range {
    start: usize,
    ty: TensorType,
}

impl Range {
    fn of(self, operand: &Operand) -> Operand {
        let offset = operand.offset + (self.start * operand.ty.dtype.bytes()) as u64;
        Operand { offset, ty: self.ty, ..operand.clone() }
    }
}

/// Notes what is needed of a part; all who read it need the same.
fn note(known: &mut Option<Span>, span: Span) -> Option<()> {
    (known.get_or_insert(span) == &span).then_some(())
}

/// The part that computes what `span` says, and what it needs of its operands.
fn cut_part(part: &Part, span: Span) -> Option<(Part, Vec<Span>)> {
    let Span::Rows { of, start, n } = span else {
        return Some((part.clone(), vec![Span::Whole; part.args.len()]));
    };
    let axes = leading_axes(&part.result, of)?;
    let has_taps = matches!(part.kernel, Kernel::Conv(_) | Kernel::Pad(_));
    if has_taps && axes > part.independent_axes() {
        return cut_under_taps(part, axes - 1, start, n);
    }
    let spans = (0..part.args.len()).map(|j| match part.access(j, of)? {
        Access::Row => Some(span),
        Access::Whole => Some(Span::Whole),
    });
    Some((part.cut(of, n), spans.collect::<Option<_>>()?))
}

/// Places `start .. start + n` of a convolution or pad along `axis`, before which there is only one of each: what they
/// read of the input is one range, too, and what they see of the padding belongs to the piece.
fn cut_under_taps(part: &Part, axis: usize, start: usize, n: usize) -> Option<(Part, Vec<Span>)> {
    let input = &part.args.first()?.ty;
    let is_outermost = input.shape.iter().zip(&part.result.shape).take(axis).all(|(&x, &y)| x == 1 && y == 1);
    let extent = input.shape[axis];
    if !is_outermost || n == 0 {
        return None;
    }
    let mut cut = part.clone();
    // Places of the padded input, and what of them is padding.
    let (first, end, lo, hi) = match &mut cut.kernel {
        Kernel::Conv(op) => {
            let a = axis.checked_sub(1).filter(|&a| a < op.stride.len())?;
            let reach = op.dilation[a] * (part.args.get(1)?.ty.shape[a] - 1) + 1;
            let (lo, hi) = &mut op.pad[a];
            (start * op.stride[a], (start + n - 1) * op.stride[a] + reach, lo, hi)
        }
        Kernel::Pad(op) if op.mode == PadMode::Circular && op.lo[axis] + op.hi[axis] > 0 => return None,
        Kernel::Pad(op) => (start, start + n, &mut op.lo[axis], &mut op.hi[axis]),
        _ => return None,
    };
    let before = *lo;
    let inside = first.saturating_sub(before).min(extent)..end.saturating_sub(before).min(extent);
    (*lo, *hi) = (before.saturating_sub(first), end.saturating_sub(before + extent));
    if inside.is_empty() {
        return None;
    }
    cut.args[0].ty.shape[axis] = inside.len();
    cut.result.shape[axis] = n;
    let mut spans = vec![Span::Whole; part.args.len()];
    spans[0] = Span::Rows { of: extent, start: inside.start, n: inside.len() };
    Some((cut, spans))
}

/// A copy that stores rows `start .. start + n` of `of` rows, and where they go: rows of one range to one range.
fn cut_store(copy: &Copy, part: &Part, of: usize, start: usize, n: usize) -> Option<(Part, Range)> {
    let [arg] = &part.args[..] else { return None };
    let row = arg.ty.elements() / of;
    // Its outermost axis counts the rows, or equal parts of them.
    let axis = (0..copy.shape.len()).filter(|&a| copy.shape[a] > 1).max_by_key(|&a| copy.src_strides[a])?;
    let step = copy.src_strides[axis];
    let inner = (0..copy.shape.len()).filter(|&a| a != axis);
    let reach: usize = inner.map(|a| (copy.shape[a] - 1) * copy.src_strides[a]).sum();
    if step == 0 || !row.is_multiple_of(step) || copy.src_offset + reach >= step {
        return None;
    }
    let each = row / step;
    if copy.shape[axis] != of * each {
        return None;
    }
    let (mut cut, from, to) = cut_copy(copy, axis, start * each, n * each, arg.ty.dtype);
    // What it leaves out belongs to other pieces, and must not be written at all.
    if cut.shape.iter().product::<usize>() != to.ty.elements() {
        return None;
    }
    // The source is all of the rows.
    cut.src_offset = from.start - row * start;
    let rows = Span::Rows { of, start, n }.range(&arg.ty).ty;
    let args = vec![PartArg { ty: rows, ..arg.clone() }];
    let part = Part { kernel: Kernel::Copy(cut), args, result: to.ty.clone() };
    Some((part, Range { start: to.start, ty: to.ty }))
}

/// Places `start .. start + n` along an axis of a copy, and the ranges that they read and write, with offsets in those.
fn cut_copy(copy: &Copy, axis: usize, start: usize, n: usize, dtype: DType) -> (Copy, Range, Range) {
    let mut cut = copy.clone();
    cut.shape[axis] = n;
    (cut.src_offset, cut.dst_offset) = (0, 0);
    let range = |offset: usize, strides: &[usize]| {
        let reach = cut.shape.iter().zip(strides).map(|(&d, &s)| d.saturating_sub(1) * s).sum::<usize>() + 1;
        Range { start: offset + start * strides[axis], ty: TensorType::new(dtype, [reach]) }
    };
    let (from, to) = (range(copy.src_offset, &copy.src_strides), range(copy.dst_offset, &copy.dst_strides));
    (cut, from, to)
}
