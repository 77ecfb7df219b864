//! Calls on tensors that are larger than a target can bind or count, cut into calls on some of the rows each.
//!
//! Kernels of devices index with 32 bits. Where an extent needs more, the plan has several calls at different offsets, which
//! are 64 bits wide on every device: so no kernel pays for wide arithmetic, and that indices fit is known when the plan is
//! made. Rows need nothing from each other where a call has the form *rows*, and where a product has one right operand for
//! all of them. Other calls, as convolutions, cannot be cut.

use ltxc_ir::TensorType;
use ltxc_ir::plan::fused::{cut_rows, leading_axes};
use ltxc_ir::plan::{Access, Form, Fused, Kernel, Operand, Part, PartArg, Source, Target, Work};

/// Work on some of the rows of a call, or on all.
pub(super) struct Piece {
    pub work: Work,
    pub args: Vec<Operand>,
    pub results: Vec<Operand>,
}

/// A call as pieces that the target holds: one if it does so already.
///
/// # Errors
/// A type that it does not hold, if the call cannot be cut.
pub(super) fn pieces(whole: Piece, target: &Target) -> Result<Vec<Piece>, TensorType> {
    let inner = match &whole.work {
        Work::Kernel(_) => &[][..],
        Work::Fused(fused) => &fused.parts,
    };
    // Parts of a fused call count, because a device may run them one by one.
    let types = whole.args.iter().chain(&whole.results).map(|o| &o.ty).chain(inner.iter().map(|p| &p.result));
    let Some(problem) = types.into_iter().find(|ty| !target.holds(ty)).cloned() else { return Ok(vec![whole]) };
    let cut = Cut::new(&whole, target).ok_or(problem)?;
    let starts = (0..cut.rows).step_by(cut.block);
    Ok(starts.map(|start| cut.piece(&whole, start, cut.block.min(cut.rows - start))).collect())
}

/// How a call is cut.
struct Cut {
    fused: Fused,
    rows: usize,
    /// Rows of a piece.
    block: usize,
    /// Whether each operand is read by row.
    by_row: Vec<bool>,
}

impl Cut {
    fn new(whole: &Piece, target: &Target) -> Option<Cut> {
        let fused = match &whole.work {
            Work::Fused(fused) => fused.clone(),
            Work::Kernel(kernel) => alone(kernel, whole)?,
        };
        let rows = rows(&fused)?;
        let mut by_row = vec![None; whole.args.len()];
        for part in &fused.parts {
            for (j, arg) in part.args.iter().enumerate() {
                let is_row = part.access(j, rows)? == Access::Row;
                match arg.source {
                    Source::Operand(a) if by_row[a as usize].is_none_or(|before| before == is_row) => {
                        by_row[a as usize] = Some(is_row);
                    }
                    Source::Part(_) if is_row => {}
                    _ => return None,
                }
            }
        }
        let by_row: Vec<bool> = by_row.into_iter().map(|is_row| is_row == Some(true)).collect();
        let (by_rows, wholes): (Vec<_>, Vec<_>) = whole.args.iter().zip(&by_row).partition(|(_, is_row)| **is_row);
        if wholes.iter().any(|(arg, _)| !target.holds(&arg.ty)) {
            return None;
        }
        let bound = || by_rows.iter().map(|(arg, _)| &arg.ty).chain(whole.results.iter().map(|r| &r.ty));
        let (mut block, mut step) = (rows as u64, 1);
        for ty in bound().chain(fused.parts.iter().map(|p| &p.result)) {
            let (bytes, elements) = ((ty.bytes() / rows).max(1) as u64, (ty.elements() / rows).max(1) as u64);
            block = block.min(target.max_tensor_bytes / bytes).min(target.max_tensor_elements() / elements);
        }
        for ty in bound() {
            // Pieces begin where devices can bind them, if that is possible.
            let bytes = (ty.bytes() / rows).max(1) as u64;
            step = step.max(target.alignment >> bytes.trailing_zeros().min(target.alignment.trailing_zeros()));
        }
        let block = if block >= step { block / step * step } else { block };
        (block > 0).then_some(Cut { fused, rows, block: block as usize, by_row })
    }

    fn piece(&self, whole: &Piece, start: usize, n: usize) -> Piece {
        let parts: Vec<Part> = self.fused.parts.iter().map(|part| part.cut(self.rows, n)).collect();
        let operand = |operand: &Operand| {
            let row = operand.ty.bytes() / self.rows;
            let ty = match leading_axes(&operand.ty, self.rows) {
                Some(_) => cut_rows(&operand.ty, self.rows, n),
                None => TensorType::new(operand.ty.dtype, [operand.ty.elements() / self.rows * n]),
            };
            Operand { offset: operand.offset + (row * start) as u64, ty, ..operand.clone() }
        };
        let args = whole.args.iter().zip(&self.by_row);
        Piece {
            args: args.map(|(arg, is_row)| if *is_row { operand(arg) } else { arg.clone() }).collect(),
            results: whole.results.iter().map(operand).collect(),
            work: match &whole.work {
                Work::Kernel(kernel) => Work::Kernel(kernel.clone()),
                Work::Fused(_) => Work::Fused(Fused { parts, ..self.fused.clone() }),
            },
        }
    }
}

/// A kernel as the only part of a fused call.
fn alone(kernel: &Kernel, whole: &Piece) -> Option<Fused> {
    let args = whole.args.iter().zip(0..).map(|(arg, i)| PartArg { source: Source::Operand(i), ty: arg.ty.clone() });
    let part = Part { kernel: kernel.clone(), args: args.collect(), result: whole.results.first()?.ty.clone() };
    Some(Fused { pattern: String::new(), parts: vec![part], stored: vec![0] })
}

/// Rows that need nothing from each other.
fn rows(fused: &Fused) -> Option<usize> {
    match fused.form().ok()? {
        Form::Rows { rows } => Some(rows),
        Form::Product { anchor, .. } if fused.parts.iter().all(|p| !matches!(p.kernel, Kernel::Copy(_))) => {
            let (_, leading) = fused.parts[anchor].result.shape.split_last()?;
            Some(leading.iter().product())
        }
        _ => None,
    }
}
