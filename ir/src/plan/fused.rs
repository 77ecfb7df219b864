//! Several kernels as one: what flows between them never reaches memory.
//!
//! A [`Fused`] is a short list of ordinary kernels, the **parts**. Running them one after the other *is* its meaning;
//! a backend runs them together. It can do so because every fused call has one of a few forms ([`Form`]), each of which
//! says how the work can be cut into pieces that need nothing from each other:
//!
//! | form | what it is | pieces |
//! | --- | --- | --- |
//! | rows | pointwise maps, norms, rotations, gathers and reductions along rows | rows |
//! | product | a matrix product or convolution, leaky ReLU and pads in front, maps on its result, stores that rearrange | tiles of the result |
//! | attention | norms and rotations of queries and keys, attention, maps on its result | query blocks |
//! | group norm | group norm and maps on its result | rows, after the statistics |
//!
//! To add a form: a variant of [`Form`], its rule in [`Fused::form`], and an implementation in each backend.

use serde::{Deserialize, Serialize};

use super::kernel::{Function, Kernel, MapStep};
use crate::types::{Float, TensorType};

/// Most elements of a row: rows of a few parts must fit into the cache of a core.
const MAX_ROW: usize = 1 << 18;

/// Most parts of one call; real groups have about ten.
const MAX_PARTS: usize = 64;

/// What a kernel call computes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Work {
    /// One kernel.
    Kernel(Kernel),
    /// Several kernels as one.
    Fused(Fused),
}

impl From<Kernel> for Work {
    fn from(kernel: Kernel) -> Work {
        Work::Kernel(kernel)
    }
}

impl From<Fused> for Work {
    fn from(fused: Fused) -> Work {
        Work::Fused(fused)
    }
}

impl Work {
    /// Name for reports: that of the kernel, or of the pattern that fused several.
    pub fn name(&self) -> &str {
        match self {
            Work::Kernel(kernel) => kernel.name(),
            Work::Fused(fused) => &fused.pattern,
        }
    }

    /// Checks that it may be called with these types. Attributes may be hostile.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self, args: &[&TensorType], results: &[&TensorType]) -> Result<(), String> {
        match self {
            Work::Kernel(kernel) => kernel.check(args, results),
            Work::Fused(fused) => fused.check(args, results),
        }
    }

    /// Whether result `result` may lie exactly on operand `arg`, of the same type: the operand's elements are read for
    /// nothing but the elements of the result that stand in their place. The work must have passed [`Work::check`].
    pub fn may_overwrite(&self, arg: usize, result: usize) -> bool {
        match self {
            Work::Kernel(kernel) => kernel.in_place().allows(arg),
            Work::Fused(fused) => fused.may_overwrite(arg, result),
        }
    }
}

/// Kernels that run as one. See the module documentation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fused {
    /// Name of the pattern that made it, for reports: `adaln`.
    pub pattern: String,
    /// The kernels in order.
    pub parts: Vec<Part>,
    /// The part that computes each result of the call.
    pub stored: Vec<u32>,
}

/// One kernel of a [`Fused`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Part {
    /// What is computed.
    pub kernel: Kernel,
    /// Its operands.
    pub args: Vec<PartArg>,
    /// Type of its result.
    pub result: TensorType,
}

/// An operand of a [`Part`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PartArg {
    /// Where it comes from.
    pub source: Source,
    /// The type as which it is read: the same elements, possibly in another shape.
    pub ty: TensorType,
}

/// Where an operand of a [`Part`] comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Source {
    /// An operand of the call.
    Operand(u32),
    /// The result of an earlier part.
    Part(u32),
}

/// How a fused call can be cut into independent pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Every part computes row `r` of its result from row `r` of what earlier parts gave, for this many rows.
    Rows {
        /// Number of rows.
        rows: usize,
    },
    /// Part `anchor` is a `matmul`, `conv` or `conv_transpose`; in front of the first operand of the latter two there may
    /// be a leaky ReLU and `pad`s. Maps on the result follow, then copies that store parts of it or rearrange it.
    Product {
        /// Index of the product.
        anchor: usize,
        /// Rows into which the maps can be cut.
        rows: usize,
    },
    /// Part `anchor` is `attention`; the parts before it are of the form *rows*, and make its queries and keys. Maps
    /// on its result follow.
    Attention {
        /// Index of the attention.
        anchor: usize,
        /// Rows into which the maps can be cut.
        rows: usize,
    },
    /// Part 0 is `group_norm`; maps on its result follow.
    GroupNorm {
        /// Rows into which the maps can be cut.
        rows: usize,
    },
}

impl Fused {
    /// Checks parts, types and form.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self, args: &[&TensorType], results: &[&TensorType]) -> Result<(), String> {
        if self.parts.len() > MAX_PARTS {
            return Err(format!("{} parts, {MAX_PARTS} at most", self.parts.len()));
        }
        let mut used = vec![false; self.parts.len()];
        for (i, part) in self.parts.iter().enumerate() {
            part.result.checked_bytes().ok_or_else(|| format!("type {} is too large", part.result))?;
            let mut types = Vec::with_capacity(part.args.len());
            for arg in &part.args {
                let source = match arg.source {
                    Source::Operand(a) => args.get(a as usize).copied(),
                    Source::Part(s) if (s as usize) < i => Some(&self.parts[s as usize].result),
                    Source::Part(_) => None,
                };
                let source = source.ok_or_else(|| format!("part {i} reads {:?}, which is not there", arg.source))?;
                arg.ty.checked_bytes().ok_or_else(|| format!("type {} is too large", arg.ty))?;
                if arg.ty.dtype != source.dtype || arg.ty.elements() != source.elements() {
                    return Err(format!("part {i} reads {source} as {}", arg.ty));
                }
                if let Source::Part(s) = arg.source {
                    used[s as usize] = true;
                }
                types.push(&arg.ty);
            }
            part.kernel.check(&types, &[&part.result]).map_err(|e| format!("part {i}: {e}"))?;
        }
        if self.stored.len() != results.len() || results.is_empty() {
            return Err(format!("{} results are stored, {} asked for", self.stored.len(), results.len()));
        }
        for (i, (&part, result)) in self.stored.iter().zip(results).enumerate() {
            let found = self.parts.get(part as usize).map(|s| &s.result);
            let fits = found.is_some_and(|f| f.dtype == result.dtype && f.elements() == result.elements());
            if !fits || self.stored[..i].contains(&part) {
                return Err(format!("result {i} is {result}, part {part} gives {found:?}"));
            }
            used[part as usize] = true;
        }
        if let Some(unused) = used.iter().position(|u| !u) {
            return Err(format!("nothing uses part {unused}"));
        }
        self.form().map(|_| ())
    }

    /// The form of a call whose parts fit together.
    ///
    /// # Errors
    /// Why it has none: these kernels cannot run as one.
    pub fn form(&self) -> Result<Form, String> {
        let anchors: Vec<usize> = (0..self.parts.len()).filter(|&i| is_anchor(&self.parts[i].kernel)).collect();
        match anchors[..] {
            [] => Ok(Form::Rows { rows: self.rows(0..self.parts.len())? }),
            [anchor] => match &self.parts[anchor].kernel {
                Kernel::GroupNorm(_) if anchor == 0 => self.check_tail(0).map(|rows| Form::GroupNorm { rows }),
                Kernel::GroupNorm(_) => Err("nothing can run before a group norm".into()),
                Kernel::Attention(_) => {
                    self.check_heads(anchor)?;
                    self.check_tail(anchor).map(|rows| Form::Attention { anchor, rows })
                }
                _ => {
                    self.check_front(anchor)?;
                    self.check_tail(anchor).map(|rows| Form::Product { anchor, rows })
                }
            },
            _ => Err("two contractions cannot run as one kernel".into()),
        }
    }

    /// The largest number of rows into which the parts of `range` can be cut.
    fn rows(&self, range: std::ops::Range<usize>) -> Result<usize, String> {
        let parts = &self.parts[range];
        let mut longest: Option<(usize, &TensorType)> = None;
        for part in parts {
            let n = natural_rows(part).ok_or_else(|| format!("`{}` does not work by rows", part.kernel.name()))?;
            if longest.is_none_or(|(least, _)| n < least) {
                longest = Some((n, &part.result));
            }
        }
        let (most, ty) = longest.ok_or("there are no parts")?;
        // Every product of leading axes counts rows; the more there are, the better the work can be shared.
        let mut counts = vec![1usize];
        for &extent in &ty.shape {
            let rows = counts[counts.len() - 1].saturating_mul(extent);
            if rows > 1 && rows <= most {
                counts.push(rows);
            }
        }
        let mut problem = String::new();
        for &rows in counts.iter().rev() {
            match self.check_rows(parts, rows) {
                Ok(()) => return Ok(rows),
                Err(e) if problem.is_empty() => problem = e,
                Err(_) => {}
            }
        }
        Err(problem)
    }

    fn check_rows(&self, parts: &[Part], rows: usize) -> Result<(), String> {
        for (i, part) in parts.iter().enumerate() {
            if leading_axes(&part.result, rows).is_none() {
                return Err(format!("{} of part {i} has no {rows} rows", part.result));
            }
            if part.result.elements() / rows > MAX_ROW {
                return Err(format!("rows of {} elements are too long", part.result.elements() / rows));
            }
            for (j, arg) in part.args.iter().enumerate() {
                let is_part = matches!(arg.source, Source::Part(_));
                match part.access(j, rows) {
                    None => return Err(format!("operand {j} of part {i}, {}, is not cut along {rows} rows", arg.ty)),
                    Some(Access::Whole) if is_part => {
                        return Err(format!("part {i} reads all rows of an earlier part"));
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    /// After the anchor: maps on its result, element by element, and rows of tables; then copies of those. Returns the
    /// rows into which the maps can be cut.
    fn check_tail(&self, anchor: usize) -> Result<usize, String> {
        let space = self.parts[anchor].result.elements();
        let is_product = !matches!(self.parts[anchor].kernel, Kernel::Attention(_) | Kernel::GroupNorm(_));
        let is_copy = |p: &Part| matches!(p.kernel, Kernel::Copy(_));
        let copies = self.parts.iter().position(is_copy).unwrap_or(self.parts.len());
        for (i, part) in self.parts.iter().enumerate().skip(anchor + 1) {
            let sources = || {
                part.args.iter().filter_map(|a| match a.source {
                    Source::Part(s) => Some((s as usize, &a.ty)),
                    Source::Operand(_) => None,
                })
            };
            if sources().any(|(s, _)| s < anchor || s >= copies) {
                return Err(format!("part {i} reads more than the result of part {anchor}"));
            }
            match &part.kernel {
                Kernel::Map(_) if i < copies => {
                    if part.result.elements() != space || sources().any(|(_, ty)| ty.elements() != space) {
                        return Err(format!("part {i} is not a function of single elements of part {anchor}"));
                    }
                }
                Kernel::Gather(_) if i < copies && part.result.elements() == space && sources().count() == 0 => {}
                Kernel::Copy(copy) if is_product => {
                    // A copy that leaves elements alone would leave them undefined.
                    let moved = copy.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
                    if moved != Some(part.result.elements()) || sources().count() != 1 {
                        return Err(format!("part {i} does not store all of {}", part.result));
                    }
                }
                kernel => return Err(format!("`{}` cannot follow part {anchor}", kernel.name())),
            }
        }
        let rows = match anchor + 1 < copies {
            true => self.rows(anchor + 1..copies)?,
            false => 1,
        };
        match leading_axes(&self.parts[anchor].result, rows) {
            Some(_) => Ok(rows),
            None => Err(format!("{} has no {rows} rows", self.parts[anchor].result)),
        }
    }

    /// Before a product: nothing, or, of the first operand of a convolution, a leaky ReLU and then pads, each of what the
    /// one before it gives.
    fn check_front(&self, anchor: usize) -> Result<(), String> {
        let part = &self.parts[anchor];
        let reads_last = |i: usize| {
            let Some(first) = self.parts[i].args.first() else { return false };
            match i.checked_sub(1) {
                None => matches!(first.source, Source::Operand(_)),
                Some(before) => first.source == Source::Part(before as u32) && first.ty == self.parts[before].result,
            }
        };
        let can_precede = |(i, part): (usize, &Part)| {
            let is_read_through = matches!(part.kernel, Kernel::Pad(_)) || (i == 0 && part.leaky_slope().is_some());
            is_read_through && reads_last(i) && !self.stored.contains(&(i as u32))
        };
        let is_conv = matches!(part.kernel, Kernel::Conv(_) | Kernel::ConvTranspose(_));
        let reads_elsewhere = part.args[1..].iter().any(|a| matches!(a.source, Source::Part(_)));
        let fits =
            anchor == 0 || (is_conv && reads_last(anchor) && self.parts[..anchor].iter().enumerate().all(can_precede));
        if fits && !reads_elsewhere {
            return Ok(());
        }
        Err("a product reads its operands many times, so only a leaky ReLU and pads can run in front of it".into())
    }

    /// Before attention: rows that make queries and keys and nothing else.
    fn check_heads(&self, anchor: usize) -> Result<(), String> {
        let attention = &self.parts[anchor];
        if self.stored.iter().any(|&s| (s as usize) < anchor) {
            return Err("what is made for attention cannot be stored".into());
        }
        for (j, arg) in attention.args.iter().enumerate() {
            let Source::Part(last) = arg.source else { continue };
            if j > 1 {
                return Err(format!("operand {j} of attention cannot be computed in it"));
            }
            let chain = self.chain(last as usize);
            let rows = arg.ty.shape[..2].iter().product::<usize>();
            for &s in &chain {
                let part = &self.parts[s];
                let fits = matches!(part.kernel, Kernel::RmsNorm(_) | Kernel::Rope(_))
                    && natural_rows(part).is_some_and(|n| n >= rows);
                if !fits || part.args[1..].iter().any(|a| matches!(a.source, Source::Part(_))) {
                    return Err(format!("`{}` cannot run in front of attention", part.kernel.name()));
                }
            }
        }
        let chains = attention.args.iter().filter_map(|a| match a.source {
            Source::Part(s) => Some(self.chain(s as usize)),
            Source::Operand(_) => None,
        });
        let mut covered: Vec<usize> = chains.flatten().collect();
        covered.sort_unstable();
        if covered.iter().copied().eq(0..anchor) {
            Ok(())
        } else {
            Err("queries and keys share what makes them".into())
        }
    }

    /// The parts that lead to part `last` through first operands, first one first.
    pub fn chain(&self, last: usize) -> Vec<usize> {
        let mut chain = vec![last];
        let mut at = last;
        while let Some(Source::Part(s)) = self.parts[at].args.first().map(|a| a.source) {
            at = s as usize;
            chain.push(at);
        }
        chain.reverse();
        chain
    }

    fn may_overwrite(&self, arg: usize, result: usize) -> bool {
        let Some(stored) = self.stored.get(result).map(|&s| &self.parts[s as usize]) else { return false };
        let Ok(form) = self.form() else { return false };
        let mut uses = self.parts.iter().enumerate().flat_map(|(i, part)| {
            let matching = move |a: &&PartArg| a.source == Source::Operand(arg as u32);
            part.args.iter().enumerate().filter(move |(_, a)| matching(a)).map(move |(j, a)| (i, j, a))
        });
        let is_element = |part: &Part, a: &PartArg| {
            matches!(part.kernel, Kernel::Map(_)) && a.ty.elements() == part.result.elements()
        };
        match form {
            // A worker computes whole rows before it stores them.
            Form::Rows { rows } => uses.all(|(i, j, _)| self.parts[i].access(j, rows) == Some(Access::Row)),
            // Epilogues see the elements that they store; copies move them, and what is in front of the product is read by
            // other elements, too.
            Form::Product { anchor, .. } => {
                matches!(stored.kernel, Kernel::Map(_))
                    && self.parts.iter().all(|s| !matches!(s.kernel, Kernel::Copy(_)))
                    && uses.all(|(i, _, a)| i > anchor && is_element(&self.parts[i], a))
            }
            Form::Attention { .. } | Form::GroupNorm { .. } => false,
        }
    }
}

/// How a part reads an operand while it computes a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The row of the same number.
    Row,
    /// All of it.
    Whole,
}

impl Part {
    /// The part on `block` of its `rows` rows.
    pub fn cut(&self, rows: usize, block: usize) -> Part {
        let args = self.args.iter().enumerate().map(|(j, arg)| match self.access(j, rows) {
            Some(Access::Row) => PartArg { ty: cut_rows(&arg.ty, rows, block), ..*arg },
            _ => arg.clone(),
        });
        Part { kernel: self.kernel.clone(), args: args.collect(), result: cut_rows(&self.result, rows, block) }
    }

    /// How the part reads operand `arg` when its work is cut into `rows` rows; `None` if it cannot be cut so.
    pub fn access(&self, arg: usize, rows: usize) -> Option<Access> {
        let (ty, result) = (&self.args[arg].ty, &self.result);
        let split = leading_axes(result, rows).filter(|&axes| axes <= self.independent_axes())?;
        let as_row = || leading_axes(ty, rows).map(|_| Access::Row);
        let is_first = arg == 0;
        match &self.kernel {
            Kernel::Map(_) => broadcast_access(ty, &result.shape[..split], result.rank()),
            Kernel::Rope(_) if !is_first => broadcast_access(ty, &result.shape[..split], result.rank()),
            // Whoever works on some rows of a matrix needs all of the other one.
            Kernel::Matmul(_) if !is_first && (ty.rank() == 2 || split + 1 == result.rank()) => Some(Access::Whole),
            // All queries look at the same keys, and add what the bias has for them.
            Kernel::Attention(_) if split > 1 => match arg {
                0 => as_row(),
                1 | 2 => Some(Access::Whole),
                _ => match ty.shape.split_last_chunk::<2>() {
                    Some((heads, &[t, _])) if t > 1 => heads.iter().all(|&n| n == 1).then_some(Access::Row),
                    _ => Some(Access::Whole),
                },
            },
            Kernel::Attention(_) if arg > 2 => broadcast_access(ty, &result.shape[..split], result.rank()),
            // The table is read where the index says, the index by row.
            Kernel::Gather(op) if is_first == (op.axis == 0) => Some(Access::Whole),
            Kernel::RmsNorm(_) | Kernel::LayerNorm(_) | Kernel::GroupNorm(_) if !is_first => Some(Access::Whole),
            Kernel::Conv(_) | Kernel::ConvTranspose(_) if !is_first => Some(Access::Whole),
            _ => as_row(),
        }
    }

    /// The slope, if the part is a leaky ReLU and nothing else.
    pub fn leaky_slope(&self) -> Option<Float> {
        let Kernel::Map(map) = &self.kernel else { return None };
        match (&map.steps[..], &self.args[..]) {
            (&[MapStep::Function(Function::LeakyRelu(slope), 0)], [x]) if x.ty == self.result => Some(slope),
            _ => None,
        }
    }

    /// How many of the leading axes of the result count rows that need nothing from each other.
    pub fn independent_axes(&self) -> usize {
        let rank = self.result.rank();
        match &self.kernel {
            Kernel::Map(_) => rank,
            Kernel::RmsNorm(_) | Kernel::LayerNorm(_) => rank.saturating_sub(1),
            Kernel::Rope(_) => rank.saturating_sub(2),
            Kernel::Gather(op) => op.axis.max(1),
            Kernel::Reduce(op) => op.axes.first().copied().unwrap_or(rank),
            Kernel::Matmul(_) => {
                let batch = rank.saturating_sub(2);
                let is_shared = self.args.get(1).is_some_and(|b| b.ty.rank() == 2);
                if is_shared || self.result.shape[..batch].iter().all(|&d| d == 1) { batch + 1 } else { batch }
            }
            // How many keys a query sees depends on how many come after it.
            Kernel::Attention(op) if !op.causal && self.result.shape.first() == Some(&1) => 2,
            Kernel::Attention(_) | Kernel::Conv(_) | Kernel::ConvTranspose(_) | Kernel::GroupNorm(_) => 1,
            Kernel::Pad(op) => (0..rank).find(|&a| op.lo[a] + op.hi[a] > 0).unwrap_or(rank),
            Kernel::Copy(_) | Kernel::Update(_) => 0,
        }
    }
}

/// Access of an operand that broadcasts to a result of rank `rank` whose rows are counted by `leading` axes.
fn broadcast_access(ty: &TensorType, leading: &[usize], rank: usize) -> Option<Access> {
    let missing = rank.checked_sub(ty.rank())?;
    let extent = |a: usize| a.checked_sub(missing).map_or(1, |own| ty.shape[own]);
    if (0..leading.len()).all(|a| extent(a) == 1) {
        // One row is the same as every row.
        return Some(if leading.iter().product::<usize>() == 1 { Access::Row } else { Access::Whole });
    }
    (0..leading.len()).all(|a| extent(a) == leading[a]).then_some(Access::Row)
}

/// The number of leading axes of `ty` that count `rows` rows.
pub fn leading_axes(ty: &TensorType, rows: usize) -> Option<usize> {
    let mut count = 1usize;
    for axes in 0..=ty.rank() {
        if count == rows {
            return Some(axes);
        }
        count = count.checked_mul(*ty.shape.get(axes)?)?;
    }
    None
}

/// `ty` with `block` of its `rows` rows. The rank stays.
pub fn cut_rows(ty: &TensorType, rows: usize, block: usize) -> TensorType {
    let axes = leading_axes(ty, rows).unwrap_or(0);
    let mut out = ty.clone();
    out.shape[..axes].fill(1);
    match axes.checked_sub(1) {
        Some(last) => out.shape[last] = block,
        // Only a single row has no leading axes.
        None => debug_assert_eq!(block, 1),
    }
    out
}

/// The largest number of rows that a part can be cut into; `None` if it cannot.
fn natural_rows(part: &Part) -> Option<usize> {
    let rows_of =
        |ty: &TensorType, axes: usize| ty.shape.get(..ty.rank().checked_sub(axes)?).map(|s| s.iter().product());
    match &part.kernel {
        Kernel::Map(_) | Kernel::RmsNorm(_) | Kernel::LayerNorm(_) => rows_of(&part.result, 1),
        Kernel::Rope(_) => rows_of(&part.result, 2),
        Kernel::Gather(op) if op.axis == 0 => part.result.shape.first().copied(),
        Kernel::Reduce(op) if op.axes[..] == [part.result.rank() - 1] => rows_of(&part.result, 1),
        _ => None,
    }
}

fn is_anchor(kernel: &Kernel) -> bool {
    matches!(
        kernel,
        Kernel::Matmul(_) | Kernel::Conv(_) | Kernel::ConvTranspose(_) | Kernel::Attention(_) | Kernel::GroupNorm(_)
    )
}
