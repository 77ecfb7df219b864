//! Which parts of a fused call run in one launch.
//!
//! | form | one launch | launches of their own |
//! | --- | --- | --- |
//! | rows | neighbours that are maps, norms of one row length, gathers of rows and at most one rotation | reductions, integer maps, parts of other sizes |
//! | product | the product or convolution with leaky ReLU and pads, maps, gathers and copies | pads that meet on an axis, copies that `store` cannot turn around |
//! | attention | norm and rotation of queries, those of keys, attention with its maps | |
//! | group norm | the last of its three launches with its maps | |
//!
//! Results that are stored on the way to another are stored by a rows launch only. What does not fit runs part by part.

use ltxc_ir::TensorType;
use ltxc_ir::ops::PadMode;
use ltxc_ir::plan::{Copy, Form, Fused, Kernel, PartArg, Source};

use super::call::{Front, PadAxis};
use super::compose::{self, Composed, MAX_BINDINGS, Rows};
use super::fused_rows;
use super::store::Stored;

/// A launch, or what a kernel takes to launch itself.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// One part alone.
    Part(usize),
    /// Part `anchor` with maps behind it up to part `last` and copies of that, and perhaps with all that stands in front of
    /// its first operand, of which this is read instead.
    Tail {
        anchor: usize,
        front: Option<(PartArg, Front)>,
        composed: Option<Composed>,
        last: usize,
        copied: Option<Copied>,
    },
    /// Maps, norms and rotations.
    Rows(Rows),
}

/// Copies that store what a part gives, which itself reaches no memory.
#[derive(Clone, Debug)]
pub(crate) struct Copied {
    pub(crate) parts: Vec<usize>,
    pub(crate) stored: Stored,
}

impl Step {
    /// Parts whose results reach memory.
    pub(crate) fn outs(&self) -> Vec<usize> {
        match self {
            Step::Part(part) => vec![*part],
            Step::Tail { copied: Some(copied), .. } => copied.parts.clone(),
            Step::Tail { last, .. } => vec![*last],
            Step::Rows(rows) => rows.outs.iter().map(|o| o.0).collect(),
        }
    }

    /// What it reads.
    pub(crate) fn reads(&self, fused: &Fused) -> Vec<Source> {
        let own = |part: usize| fused.parts[part].args.iter().map(|a| a.source);
        let of = |c: &Composed| c.reads.iter().chain(&c.overlaps).copied().collect::<Vec<_>>();
        match self {
            Step::Part(part) => own(*part).collect(),
            Step::Tail { anchor, front, composed, .. } => {
                let first = front.as_ref().map(|(operand, _)| operand.source);
                let rest = own(*anchor).skip(usize::from(first.is_some()));
                first.into_iter().chain(rest).chain(composed.iter().flat_map(of)).collect()
            }
            Step::Rows(rows) => of(&rows.composed),
        }
    }
}

/// The launches of a fused call that was checked.
pub(crate) fn schedule(fused: &Fused, args: &[&TensorType], results: &[&TensorType]) -> Vec<Step> {
    let n = fused.parts.len();
    let is_empty = |ty: &TensorType| ty.elements() == 0;
    if args.iter().any(|ty| is_empty(ty)) || fused.parts.iter().any(|p| is_empty(&p.result)) {
        return (0..n).map(Step::Part).collect();
    }
    let may_overlap: Vec<bool> = args.iter().map(|ty| results.contains(ty)).collect();
    let scheduler = Scheduler { fused, may_overlap };
    let copies = |anchor: usize| {
        let is_copy = |&i: &usize| matches!(fused.parts[i].kernel, Kernel::Copy(_));
        (anchor + 1..n).find(is_copy).unwrap_or(n)
    };
    let mut steps = Vec::new();
    let mut front = None;
    let anchor = match fused.form() {
        Ok(Form::Rows { .. }) => {
            scheduler.by_rows((0..n).collect(), &mut steps);
            return steps;
        }
        Ok(Form::Product { anchor, .. }) => {
            front = in_front(fused, anchor);
            if front.is_none() {
                steps.extend((0..anchor).map(Step::Part));
            }
            anchor
        }
        Ok(Form::Attention { anchor, .. }) => {
            for arg in &fused.parts[anchor].args {
                if let Source::Part(last) = arg.source {
                    scheduler.by_rows(fused.chain(last as usize), &mut steps);
                }
            }
            anchor
        }
        Ok(Form::GroupNorm { .. }) => 0,
        Err(_) => return (0..n).map(Step::Part).collect(),
    };
    let end = copies(anchor);
    scheduler.by_tail(anchor, front, end, &mut steps);
    if !scheduler.by_store(end, &mut steps) {
        steps.extend((end..n).map(Step::Part));
    }
    steps
}

struct Scheduler<'a> {
    fused: &'a Fused,
    may_overlap: Vec<bool>,
}

impl Scheduler<'_> {
    /// Parts of `group` that something else reads, or the call stores.
    fn outs(&self, group: &[usize]) -> Vec<usize> {
        let is_read = |part: usize| {
            let readers = (0..self.fused.parts.len()).filter(|r| !group.contains(r));
            readers.into_iter().any(|r| self.fused.parts[r].args.iter().any(|a| a.source == Source::Part(part as u32)))
        };
        group.iter().copied().filter(|&part| self.fused.stored.contains(&(part as u32)) || is_read(part)).collect()
    }

    /// Cuts parts into as few launches as fit, from the front.
    fn by_rows(&self, parts: Vec<usize>, steps: &mut Vec<Step>) {
        let mut rest = &parts[..];
        while let [first, ..] = rest {
            let fitting = (2..=rest.len()).rev().find_map(|count| self.rows(&rest[..count]).map(|rows| (count, rows)));
            match fitting {
                Some((count, rows)) => {
                    steps.push(Step::Rows(rows));
                    rest = &rest[count..];
                }
                None => {
                    steps.push(Step::Part(*first));
                    rest = &rest[1..];
                }
            }
        }
    }

    fn rows(&self, group: &[usize]) -> Option<Rows> {
        let outs = self.outs(group);
        let rows = compose::rows(self.fused, group, &outs, &self.may_overlap).ok()?;
        let dtypes = outs.iter().map(|&out| self.fused.parts[out].result.dtype);
        fused_rows::is_whole(&rows, dtypes).then_some(rows)
    }

    /// The anchor with as much of the maps before part `end` as fits, then the rest.
    fn by_tail(&self, anchor: usize, front: Option<(PartArg, Front)>, end: usize, steps: &mut Vec<Step>) {
        for last in (anchor + 1..end).rev() {
            let group: Vec<usize> = (anchor..=last).collect();
            let result = &self.fused.parts[last].result;
            if self.outs(&group) != [last] || !can_finish(&self.fused.parts[anchor], result) {
                continue;
            }
            if let Ok(composed) = compose::tail(self.fused, anchor, &group[1..], last, &self.may_overlap) {
                steps.push(Step::Tail { anchor, front, composed: Some(composed), last, copied: None });
                return self.by_rows((last + 1..end).collect(), steps);
            }
        }
        steps.push(match front {
            Some(_) => Step::Tail { anchor, front, composed: None, last: anchor, copied: None },
            None => Step::Part(anchor),
        });
        self.by_rows((anchor + 1..end).collect(), steps);
    }

    /// Lets the last step store what the copies from part `end` on store, if it computes all that they copy, and only they
    /// read it. Gives whether it does.
    fn by_store(&self, end: usize, steps: &mut [Step]) -> bool {
        let Some(step) = steps.last_mut() else { return false };
        let (anchor, front, composed) = match step {
            Step::Tail { anchor, front, composed, last, .. } if *last + 1 == end => (*anchor, front, composed),
            Step::Part(anchor) if *anchor + 1 == end => (*anchor, &mut None, &mut None),
            _ => return false,
        };
        let parts: Vec<usize> = (end..self.fused.parts.len()).collect();
        let stored = match self.stored(anchor, &parts) {
            Some(stored) if parts.len() + composed.as_ref().map_or(0, Composed::bindings) <= MAX_BINDINGS + 1 => stored,
            _ => return false,
        };
        let (front, composed) = (front.take(), composed.take());
        *step = Step::Tail { anchor, front, composed, last: end - 1, copied: Some(Copied { parts, stored }) };
        true
    }

    /// The store of copies of part `copies[0] - 1`, which is as part `anchor` computes it.
    fn stored(&self, anchor: usize, copies: &[usize]) -> Option<Stored> {
        let (part, last) = (&self.fused.parts[anchor], copies.first()? - 1);
        let result = &self.fused.parts[last].result;
        let own = |&copy: &usize| match (&self.fused.parts[copy].kernel, &self.fused.parts[copy].args[..]) {
            (Kernel::Copy(copy), [arg]) if arg.source == Source::Part(last as u32) => Some(copy),
            _ => None,
        };
        let copies: Vec<&Copy> = copies.iter().map(own).collect::<Option<_>>()?;
        if self.fused.stored.contains(&(last as u32)) || !can_finish(part, result) {
            return None;
        }
        let (groups, has_rows) = match &part.kernel {
            Kernel::Conv(op) => (op.groups, true),
            // The phases of a transposed convolution are products of their own.
            Kernel::ConvTranspose(op) => (op.groups, false),
            Kernel::Matmul(_) => (1, true),
            _ => return None,
        };
        Stored::new(&copies, &part.result.with_dtype(result.dtype), groups, has_rows)
    }
}

/// What stands in front of a convolution, and what that reads, if the convolution can do its work: each axis that is padded
/// is spatial, and padded by one pad, or with zeros only. Outside of its operand a convolution sees zeros itself.
fn in_front(fused: &Fused, anchor: usize) -> Option<(PartArg, Front)> {
    let (part, parts) = (&fused.parts[anchor], &fused.parts[..anchor]);
    let first = parts.first()?;
    let sees_outside: Vec<bool> = match &part.kernel {
        Kernel::Conv(op) => op.pad.iter().map(|&(lo, hi)| lo + hi > 0).collect(),
        // Its outermost taps are this far from the operand, less what is cut off.
        Kernel::ConvTranspose(op) => (op.pad.iter().enumerate())
            .map(|(a, &(lo, hi))| {
                let reach = op.dilation[a] * (part.args[1].ty.shape[a] - 1);
                reach >= op.stride[a].saturating_add(lo.min(hi))
            })
            .collect(),
        _ => return None,
    };
    let own = |sees: bool| sees.then_some(PadAxis { lo: 0, mode: PadMode::Zeros });
    let mut pads: Vec<Option<PadAxis>> = sees_outside.into_iter().map(own).collect();
    let slope = first.leaky_slope();
    for part in &parts[usize::from(slope.is_some())..] {
        let Kernel::Pad(pad) = &part.kernel else { return None };
        for (axis, &lo) in pad.lo.iter().enumerate().filter(|&(axis, &lo)| lo + pad.hi[axis] > 0) {
            let known = pads.get_mut(axis.checked_sub(1)?)?;
            let before = known.unwrap_or(PadAxis { lo: 0, mode: pad.mode });
            if known.is_some() && (before.mode, pad.mode) != (PadMode::Zeros, PadMode::Zeros) {
                return None;
            }
            *known = Some(PadAxis { lo: before.lo + lo, mode: pad.mode });
        }
    }
    let pads = pads.into_iter().map(|pad| pad.unwrap_or(PadAxis { lo: 0, mode: PadMode::Zeros })).collect();
    Some((first.args[0].clone(), Front { slope, pads }))
}

/// Whether the kernel of a part computes each element once and in one place when it stores elements like those of
/// `result`.
fn can_finish(part: &ltxc_ir::plan::Part, result: &TensorType) -> bool {
    let types: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
    let stored = part.result.with_dtype(result.dtype);
    let is_empty = types.iter().any(|ty| ty.elements() == 0);
    // A place that no tap reaches is filled with zeros, not finished.
    let is_reached = match &part.kernel {
        Kernel::ConvTranspose(op) => {
            (0..op.stride.len()).all(|a| op.dilation[a] == 1 && types[1].shape[a] >= op.stride[a])
        }
        _ => true,
    };
    !is_empty && is_reached && !super::needs_f32(&part.kernel, &stored)
}
