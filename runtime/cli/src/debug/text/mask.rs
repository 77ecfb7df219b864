//! Who sees whom in the text encoder: causal, window and pads of every kind of layer; and what pads do to the rest.
//!
//! Pads stand in front of the prompt. A pad sees no real token, so its row of the mask may be empty: ports that add −∞ to
//! scores get NaN there, and then everywhere. Masks of other tools are read, too, and told apart.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use ltxc_models::text::LayerKind;
use ltxc_runtime::noise_files;
use ltxc_runtime::stats::Stats;
use serde_json::{Value, json};

use crate::debug::modules::{Ran, Side};
use crate::debug::parity::text::{TextSide, last_rows};
use crate::debug::recording::Distance;

/// Score below which a key is hidden; visible ones have 0.
const HIDDEN: f32 = -1e4;

/// Relative L2 that states of real tokens may differ by when there are more pads.
const LIMIT: f64 = 1e-5;

/// `ltxc debug text mask`.
#[derive(Debug, Args)]
pub struct MaskArgs {
    /// Prompt.
    #[arg(long, short)]
    pub prompt: String,
    /// Judge the mask of another tool for the same prompt: (n), (1, n) or (.., n, n), of flags or of what is added to scores.
    #[arg(long = "ref", value_name = "FILE")]
    pub reference: Option<PathBuf>,
    /// Tensor of that file, if it has several.
    #[arg(long, requires = "reference")]
    pub tensor: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// The mask of one kind of layer.
pub(super) struct Mask {
    kind: LayerKind,
    layers: usize,
    window: Option<usize>,
    /// Real tokens, and slots in all.
    tokens: usize,
    slots: usize,
    /// `[slots, slots]`: whether a query sees a key.
    sees: Vec<bool>,
}

impl Mask {
    /// The mask that layers of `kind` had in a run with `n` real tokens.
    pub fn of(side: &TextSide<'_>, kind: LayerKind, ran: &Ran, n: usize) -> Mask {
        let config = &side.config().gemma;
        // Equal masks are computed once, under the name of one of them.
        let bias = [kind, LayerKind::Sliding, LayerKind::Global]
            .iter()
            .find_map(|kind| ran.value(&format!("{}_attention_mask", kind.name())));
        let slots = ran.value("hidden_states.0").map_or(n, |h| h.ty.shape.iter().rev().nth(1).copied().unwrap_or(n));
        let biases = bias.map_or(&[][..], |b| &b.values[..]);
        // One row for all queries, or a row for each.
        let is_hidden = |i: usize, j: usize| match biases.len() {
            len if len == slots => biases[j] < HIDDEN,
            len if len == slots * slots => biases[i * slots + j] < HIDDEN,
            _ => false,
        };
        let sees = (0..slots * slots).map(|at| (at / slots, at % slots)).map(|(i, j)| j <= i && !is_hidden(i, j));
        Mask {
            kind,
            layers: config.layers.iter().filter(|k| **k == kind).count(),
            window: config.attention(kind).window,
            tokens: n,
            slots,
            sees: sees.collect(),
        }
    }

    /// Queries that see nothing.
    fn empty_rows(&self) -> usize {
        self.sees.chunks(self.slots.max(1)).filter(|row| !row.contains(&true)).count()
    }

    /// What is not as it is defined: a token sees itself and earlier real tokens inside the window.
    pub fn problem(&self) -> Option<String> {
        let first = self.slots - self.tokens.min(self.slots);
        for i in first..self.slots {
            for j in 0..self.slots {
                let defined = (first..=i).contains(&j) && self.window.is_none_or(|w| i - j < w);
                if self.sees[i * self.slots + j] != defined {
                    let verb = if defined { "does not see" } else { "sees" };
                    let what = if j < first { "a pad" } else { "a token" };
                    return Some(format!("slot {i} {verb} slot {j}, {what}"));
                }
            }
        }
        None
    }

    /// In a line.
    pub fn summary(&self) -> String {
        let window = self.window.map_or("no window".into(), |w| format!("window {w}"));
        format!(
            "{} layers, causal, {window}, {} of {} pairs visible, {} empty rows (of pads)",
            self.layers,
            self.sees.iter().filter(|s| **s).count(),
            self.sees.len(),
            self.empty_rows()
        )
    }
}

pub(super) fn run(args: &MaskArgs, side: &TextSide<'_>, json_output: bool) -> Result<bool> {
    let prompt = side.prompt(&args.prompt)?;
    let n = prompt.ids().len();
    if let Some(path) = &args.reference {
        return judge(path, args.tensor.as_deref(), n, json_output);
    }
    // At least one pad, so that there is something to see.
    let Some(slots) = (5..=10).map(|k| 1usize << k).find(|slots| *slots > n) else {
        bail!("the prompt fills all {n} places; give a shorter one")
    };
    let ran = side.encode_in(&prompt, slots)?;
    let masks = [LayerKind::Sliding, LayerKind::Global].map(|kind| Mask::of(side, kind, &ran, n));
    let mut problems: Vec<String> =
        masks.iter().filter_map(|m| Some(format!("{} layers: {}", m.kind.name(), m.problem()?))).collect();
    // Rows of pads must be numbers, and more pads must change nothing.
    let states = || (0..side.states()).filter_map(|i| Some((i, side.state(&ran, i)?)));
    if let Some((i, s)) =
        states().map(|(i, state)| (i, Stats::of(&state.ty.shape, &state.values))).find(|(_, s)| s.is_bad())
    {
        problems.push(format!("hidden state {i} has {} NaN and {} infinite values", s.nan, s.infinite));
    }
    let mut far = 0.0;
    if slots < 1024 {
        let wide = side.encode_in(&prompt, slots * 2)?;
        for (i, state) in states() {
            let Some(other) = side.state(&wide, i) else { continue };
            let distance = Distance::of(last_rows(state, n), last_rows(other, n)).relative_l2;
            if distance > LIMIT && far <= LIMIT {
                problems.push(format!("hidden state {i} changes with the number of pads, relative L2 {distance:.1e}"));
            }
            far = f64::max(far, distance);
        }
    }
    let ok = problems.is_empty();
    if json_output {
        let rows: Vec<Value> = (masks.iter())
            .map(|m| {
                json!({"kind": m.kind.name(), "layers": m.layers, "window": m.window, "causal": true,
                    "visible": m.sees.iter().filter(|s| **s).count(), "empty_rows": m.empty_rows()})
            })
            .collect();
        println!(
            "{}",
            json!({"tokens": n, "slots": slots, "padding": "left", "masks": rows, "more_pads": far, "problems": problems,
                "ok": ok})
        );
        return Ok(ok);
    }
    println!("{n} tokens behind {} pads, on the left", slots - n);
    masks.iter().for_each(|m| println!("{:<8} {}", m.kind.name(), m.summary()));
    println!("with twice the slots, states of tokens differ by at most {far:.1e}");
    problems.iter().for_each(|p| println!("BAD {p}"));
    if ok {
        println!("ok: tokens see no pads, and rows of pads are finite");
    }
    Ok(ok)
}

/// Judges the mask of another tool for a prompt of `n` tokens.
fn judge(path: &std::path::Path, tensor: Option<&str>, n: usize, json_output: bool) -> Result<bool> {
    let tensors = noise_files::read(path)?;
    let chosen = match tensor {
        Some(name) => tensors.iter().find(|t| t.name == *name),
        None => tensors.iter().find(|t| t.name.contains("mask")).or(tensors.first()),
    };
    let Some(mask) = chosen else { bail!("`{}` has no tensor `{}`", path.display(), tensor.unwrap_or("mask")) };
    let slots = mask.shape.last().copied().unwrap_or(0);
    let rows = mask.values.len().checked_div(slots).unwrap_or(0);
    if slots < n || rows == 0 || (rows != 1 && rows % slots != 0) {
        bail!(
            "`{}` is {:?}; a mask for {n} tokens has at least as many columns, and one row or as many",
            mask.name,
            mask.shape
        );
    }
    let has_flags = mask.values.iter().all(|v| [0.0, 1.0].contains(v));
    let is_visible = |v: f32| if has_flags { v > 0.5 } else { v > HIDDEN };
    let row = |i: usize| &mask.values[i * slots..(i + 1) * slots];
    // The last token sees all others, so its row shows where pads stand.
    let all = if rows == 1 { row(0) } else { row(slots - 1) };
    let visible: Vec<usize> = (0..slots).filter(|&j| is_visible(all[j])).collect();
    let ends = (visible.first().copied(), visible.last().copied());
    let side = match ends {
        (Some(first), _) if first == slots - n && visible.len() == n => "left",
        (Some(0), Some(last)) if last + 1 == n && visible.len() == n => "right",
        _ if visible.is_empty() && rows > 1 => "right",
        _ => "neither",
    };
    let empty = (0..rows).filter(|&i| row(i).iter().all(|v| !is_visible(*v))).count();
    let has_infinity = mask.values.contains(&f32::NEG_INFINITY);
    let mut problems = Vec::new();
    if side != "left" {
        problems.push(format!(
            "pads are on the {side} side: {} of {slots} places are visible, expected the last {n}",
            visible.len()
        ));
    }
    if has_infinity && empty > 0 {
        problems.push(format!("{empty} rows are −∞ throughout: their softmax is NaN"));
    }
    if mask.values.iter().any(|v| v.is_nan()) {
        problems.push("it has NaN".into());
    }
    let ok = problems.is_empty();
    let kind = if has_flags { "flags" } else { "added to scores" };
    if json_output {
        println!(
            "{}",
            json!({"tensor": mask.name, "shape": mask.shape, "kind": kind, "padding": side, "empty_rows": empty,
                "problems": problems, "ok": ok})
        );
        return Ok(ok);
    }
    println!("{} {:?}: {kind}, pads {side}, {empty} empty rows", mask.name, mask.shape);
    problems.iter().for_each(|p| println!("BAD {p}"));
    Ok(ok)
}
