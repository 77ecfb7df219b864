//! One prompt, layer by layer, and checks of what ports get wrong.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use ltxc_models::text::{LayerKind, Modality};
use ltxc_runtime::stats::Stats;
use ltxc_runtime::tokenizer::CONTEXT_TOKENS;
use serde_json::{Value, json};

use super::{detail, mask, write_lines};
use crate::debug::modules::{Kept, Ran, Side};
use crate::debug::parity::text::{TextSide, last_rows};
use crate::debug::recording::Distance;
use crate::model_files::ModelFiles;

/// `ltxc debug text stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Prompt.
    #[arg(long, short)]
    pub prompt: String,
    /// Show the first values of every state, too.
    #[arg(long)]
    pub values: bool,
    /// Print sums inside feature extractor and connectors instead, as lines that other tools write, too.
    #[arg(long)]
    pub detail: bool,
    /// What those lines begin with.
    #[arg(long, value_name = "WORD", default_value = "ltxc", requires = "detail")]
    pub label: String,
    /// File for those lines, instead of standard output.
    #[arg(long, value_name = "FILE", requires = "detail")]
    pub detail_path: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// A check that ports fail: what it is about, whether it holds, and the numbers.
struct Check {
    what: &'static str,
    ok: bool,
    numbers: String,
}

pub(super) fn run(args: &StatsArgs, side: &TextSide<'_>, files: &ModelFiles, json_output: bool) -> Result<bool> {
    let prompt = side.prompt(&args.prompt)?;
    let n = prompt.ids().len();
    let ran = side.encode(&prompt)?;
    if args.detail {
        let lines = detail::lines(side, files, &ran, n, &args.label)?;
        write_lines(args.detail_path.as_ref(), &lines)?;
        return Ok(true);
    }
    let states: Vec<(usize, Stats)> = (0..side.states())
        .filter_map(|i| Some((i, side.state(&ran, i)?)))
        .map(|(i, kept)| {
            let real = last_rows(kept, n);
            (i, Stats::of(&[n, real.len() / n.max(1)], real))
        })
        .collect();
    let checks = checks(side, files, &ran, prompt.ids(), n);
    let facts = facts(side, &ran, n);
    let ok = checks.iter().all(|c| c.ok) && states.iter().all(|(_, s)| !s.is_bad());
    if json_output {
        let rows: Vec<Value> = (states.iter())
            .map(|(i, s)| {
                let mut row =
                    json!({"state": i, "mean": s.mean, "std": s.std, "min": s.min, "max": s.max, "nan": s.nan});
                if args.values {
                    row["head"] = json!(s.head);
                }
                row
            })
            .collect();
        let checks: Vec<Value> =
            checks.iter().map(|c| json!({"check": c.what, "ok": c.ok, "numbers": c.numbers})).collect();
        let facts: serde_json::Map<String, Value> =
            facts.into_iter().map(|(name, fact)| (name.replace(' ', "_"), json!(fact))).collect();
        println!("{}", json!({"tokens": n, "states": rows, "facts": facts, "checks": checks, "ok": ok}));
        return Ok(ok);
    }
    println!("{n} tokens\n{:<8} {:>12} {:>12} {:>12} {:>12} {:>6}", "state", "mean", "std", "min", "max", "NaN");
    for (i, s) in &states {
        println!("{i:<8} {:>12.5} {:>12.5} {:>12.4} {:>12.4} {:>6}", s.mean, s.std, s.min, s.max, s.nan);
        if args.values {
            println!("         {}", s.head.iter().map(|v| format!("{v:.5}")).collect::<Vec<_>>().join(" "));
        }
    }
    for (name, fact) in &facts {
        println!("{name:<22} {fact}");
    }
    for c in &checks {
        println!("{} {}: {}", if c.ok { "ok " } else { "BAD" }, c.what, c.numbers);
    }
    Ok(ok)
}

/// What the encoder is set to, by name.
fn facts(side: &TextSide<'_>, ran: &Ran, n: usize) -> Vec<(String, String)> {
    let config = &side.config().gemma;
    let slots = ran.value("hidden_states.0").map_or(n, |kept| kept.ty.shape.iter().rev().nth(1).copied().unwrap_or(n));
    let mut facts = vec![
        ("padding".to_string(), format!("left, {} pads in front of {n} tokens in {slots} slots", slots - n.min(slots))),
        (
            "registers".into(),
            format!("{} of {CONTEXT_TOKENS} places, {} learned ones in turn", CONTEXT_TOKENS - n, side.registers()),
        ),
    ];
    for kind in [LayerKind::Sliding, LayerKind::Global] {
        let layers = config.layers.iter().filter(|k| **k == kind).count();
        let rope = &config.attention(kind).rope;
        facts.push((
            format!("rope {}", kind.name()),
            format!(
                "{layers} layers, theta {}, divided by {}, {} of {} pairs",
                rope.theta,
                rope.factor,
                rope.pairs,
                config.attention(kind).head_dim / 2
            ),
        ));
        facts.push((format!("mask {}", kind.name()), mask::Mask::of(side, kind, ran, n).summary()));
    }
    facts
}

fn checks(side: &TextSide<'_>, files: &ModelFiles, ran: &Ran, ids: &[i32], n: usize) -> Vec<Check> {
    let mut checks = Vec::new();
    if let (Some(first), Some((hidden, rows))) = (side.state(ran, 0), embedding_rows(files, ids)) {
        let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let (found, expected) = (norm(last_rows(first, n)) / norm(&rows).max(1e-30), (hidden as f64).sqrt());
        checks.push(Check {
            what: "embeddings are scaled by the square root of the hidden size",
            ok: (found / expected - 1.0).abs() < 0.01,
            numbers: format!("factor {found:.4}, expected {expected:.4}"),
        });
    }
    let last = side.states().saturating_sub(1);
    if let (Some(normed), Some(raw)) = (side.state(ran, last), ran.value(&format!("layers.{}", last.saturating_sub(1))))
    {
        let distance = Distance::of(last_rows(normed, n), last_rows(raw, n));
        checks.push(Check {
            what: "the last state is behind the final norm, not the last layer's own",
            ok: distance.relative_l2 > 1e-3,
            numbers: format!("relative L2 {:.3e} from the layer's", distance.relative_l2),
        });
    }
    let states: Vec<&Kept> = (0..side.states()).filter_map(|i| side.state(ran, i)).collect();
    let is_stuck = states.windows(2).position(|w| Distance::of(&w[0].values, &w[1].values).relative_l2 < 1e-6);
    checks.push(Check {
        what: "every state differs from the one before it",
        ok: is_stuck.is_none(),
        numbers: is_stuck
            .map_or(format!("{} states", states.len()), |i| format!("states {i} and {} are the same", i + 1)),
    });
    for kind in [LayerKind::Sliding, LayerKind::Global] {
        let problem = mask::Mask::of(side, kind, ran, n).problem();
        checks.push(Check {
            what: match kind {
                LayerKind::Sliding => "tokens of sliding layers see the tokens of their window, and no pads",
                LayerKind::Global => "tokens of global layers see all earlier tokens, and no pads",
            },
            ok: problem.is_none(),
            numbers: problem.unwrap_or_else(|| "as defined".into()),
        });
    }
    let width = |m: Modality| side.config().connectors.get(m).width();
    checks.push(Check {
        what: "contexts have the full length",
        ok: Modality::ALL
            .iter()
            .all(|m| ran.results.get(m.name()).is_some_and(|r| r.values.len() == CONTEXT_TOKENS * width(*m))),
        numbers: format!("{CONTEXT_TOKENS} places"),
    });
    checks
}

/// Width of the embeddings, and the rows of these tokens.
fn embedding_rows(files: &ModelFiles, ids: &[i32]) -> Option<(usize, Vec<f32>)> {
    let gemma = files.gemma().ok()?;
    let (_, at) = gemma.tensors().find(|(key, _)| key.ends_with("embed_tokens.weight"))?;
    let ty = at.stored.ty()?;
    let [_, width] = ty.shape[..] else { return None };
    let bytes = gemma.files().get(at.file)?.data(at.stored);
    let row = width * ty.dtype.bytes();
    let row_ty = ltxc_ir::TensorType::new(ty.dtype, [width]);
    let mut rows = Vec::new();
    for &id in ids {
        let start = usize::try_from(id).ok()?.checked_mul(row)?;
        rows.extend(ltxc_runtime::stats::decoded(&row_ty, bytes.get(start..start.checked_add(row)?)?));
    }
    Some((width, rows))
}
