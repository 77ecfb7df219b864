//! `ltxc debug text`: whether the text side tells prompts apart, and where it loses them.

use anyhow::Result;
use clap::{Args, Subcommand};
use ltxc_models::text::Modality;
use ltxc_runtime::stats::Stats;
use serde_json::{Value, json};

use super::modules::{Bench, Kept};
use super::parity::text::{TextSide, last_rows};
use super::recording::Distance;
use crate::args::{DeviceChoice, ModelArgs};
use crate::assemble::{MODEL, ModelFiles};
use crate::compile::unfused;
use crate::job::pick;

/// `ltxc debug text`.
#[derive(Debug, Subcommand)]
pub enum TextCommand {
    /// Correlation of two prompts after every layer, projection and connector block.
    Diff(DiffArgs),
    /// Statistics of every layer for one prompt, and checks of what ports get wrong.
    Stats(StatsArgs),
}

/// `ltxc debug text diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// A prompt.
    #[arg(long, short)]
    pub prompt: String,
    /// Another one.
    #[arg(long)]
    pub prompt2: String,
    /// Correlation up to which prompts are told apart.
    #[arg(long, default_value_t = 0.9)]
    pub differentiated: f64,
    /// Correlation above which they are not.
    #[arg(long, default_value_t = 0.99)]
    pub similar: f64,
    /// Device.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceChoice,
}

/// `ltxc debug text stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Prompt.
    #[arg(long, short)]
    pub prompt: String,
    /// Device.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceChoice,
}

/// Runs a command. Returns whether it found nothing wrong.
///
/// # Errors
/// Model files that cannot be read or run.
pub fn run(command: &TextCommand, json: bool) -> Result<bool> {
    match command {
        TextCommand::Diff(args) => with_side(&args.model, &args.device, |side, _| diff(args, side, json)),
        TextCommand::Stats(args) => with_side(&args.model, &args.device, |side, files| stats(args, side, files, json)),
    }
}

fn with_side(
    model: &ModelArgs,
    device: &DeviceChoice,
    look: impl FnOnce(&TextSide<'_>, &ModelFiles) -> Result<bool>,
) -> Result<bool> {
    let files = ModelFiles::open(model, false)?;
    let device = pick(device, None)?;
    let bench = Bench { sources: files.sources()?, paths: files.paths(), options: unfused(), device: &device };
    let weights = ltxc_models::Weights::new(MODEL, &files.model);
    let side = TextSide::new(&files, bench, weights)?;
    look(&side, &files)
}

/// A stage of the text side, with the values of the first tokens of both prompts.
struct Stage {
    name: String,
    distance: Distance,
}

fn diff(args: &DiffArgs, side: &TextSide<'_>, json_output: bool) -> Result<bool> {
    let (p, q) = (side.prompt(&args.prompt)?, side.prompt(&args.prompt2)?);
    let (n, m) = (p.ids().len(), q.ids().len());
    // Both begin with the same token; what one has more has nothing to be compared with.
    let common = n.min(m);
    let (a, b) = (side.encode(&p)?, side.encode(&q)?);
    let mut stages: Vec<Stage> = Vec::new();
    let mut add = |name: String, x: &[f32], y: &[f32]| stages.push(Stage { name, distance: Distance::of(x, y) });
    let rows = |kept: &Kept, own: usize| -> Vec<f32> {
        let real = last_rows(kept, own);
        real[..real.len() / own.max(1) * common].to_vec()
    };
    let mut last = None;
    for i in 0..side.states() {
        if let (Some(x), Some(y)) = (side.state(&a, i), side.state(&b, i)) {
            let (x, y) = (rows(x, n), rows(y, m));
            add(format!("hidden {i}"), &x, &y);
            last = Some((x, y));
        }
    }
    // Behind the projection real tokens stand in front.
    let front = |kept: &Kept| {
        let width = kept.ty.shape.last().copied().unwrap_or(1);
        kept.values[..(common * width).min(kept.values.len())].to_vec()
    };
    for modality in Modality::ALL {
        add(
            format!("features {}", modality.name()),
            &front(a.result(modality.name())?),
            &front(b.result(modality.name())?),
        );
    }
    let (c, d) = (side.connect(&a)?, side.connect(&b)?);
    for modality in Modality::ALL {
        for i in 0..side.connector_layers(modality) {
            let name = format!("{}_connector.transformer_1d_blocks.{i}", modality.name());
            if let (Some(x), Some(y)) = (c.value(&name), d.value(&name)) {
                add(format!("{} connector {i}", modality.name()), &front(x), &front(y));
            }
        }
        let name = format!("{}_context", modality.name());
        add(format!("{} context", modality.name()), &front(c.result(&name)?), &front(d.result(&name)?));
    }
    let verdict = |r: f64| match r {
        r if r <= args.differentiated => "differentiated",
        r if r <= args.similar => "some difference",
        _ => "too similar",
    };
    let is_same = p.ids() == q.ids();
    let ok =
        is_same || stages.iter().filter(|s| s.name.ends_with("context")).all(|s| s.distance.pearson <= args.similar);
    if json_output {
        let rows: Vec<Value> = (stages.iter())
            .map(|s| {
                json!({"stage": s.name, "pearson": s.distance.pearson, "cosine": s.distance.cosine,
                "mean_abs": s.distance.mean_abs, "label": verdict(s.distance.pearson)})
            })
            .collect();
        println!("{}", json!({"tokens": [n, m], "stages": rows, "ok": ok}));
        return Ok(ok);
    }
    println!(
        "{n} and {m} tokens, the first {common} compared\n{:<22} {:>9} {:>9} {:>12}",
        "stage", "pearson", "cosine", "mean |diff|"
    );
    for s in &stages {
        println!(
            "{:<22} {:>9.5} {:>9.5} {:>12.5}  {}",
            s.name,
            s.distance.pearson,
            s.distance.cosine,
            s.distance.mean_abs,
            verdict(s.distance.pearson)
        );
    }
    if let Some((x, y)) = last {
        println!("\nlast hidden state, token by token");
        let width = x.len() / common.max(1);
        for t in 0..common {
            let of = |v: &[f32]| v[t * width..(t + 1) * width].to_vec();
            let (i, j) = (p.ids()[t], q.ids()[t]);
            let mark = if i == j { "" } else { "  < differs" };
            let r = Distance::of(&of(&x), &of(&y)).pearson;
            println!(
                "{t:>4} {:<16} {:<16} {r:>9.5}{mark}",
                format!("{:?}", side.token(i)?),
                format!("{:?}", side.token(j)?)
            );
        }
    }
    if is_same {
        println!("the prompts are the same tokens");
    }
    Ok(ok)
}

/// A check that ports fail: what it is about, whether it holds, and the numbers.
struct Check {
    what: &'static str,
    ok: bool,
    numbers: String,
}

fn stats(args: &StatsArgs, side: &TextSide<'_>, files: &ModelFiles, json_output: bool) -> Result<bool> {
    let prompt = side.prompt(&args.prompt)?;
    let n = prompt.ids().len();
    let ran = side.encode(&prompt)?;
    let states: Vec<(usize, Stats)> = (0..side.states())
        .filter_map(|i| Some((i, side.state(&ran, i)?)))
        .map(|(i, kept)| {
            let real = last_rows(kept, n);
            (i, Stats::of(&[n, real.len() / n.max(1)], real))
        })
        .collect();
    let checks = checks(side, files, &ran, prompt.ids(), n);
    let ok = checks.iter().all(|c| c.ok) && states.iter().all(|(_, s)| !s.is_bad());
    if json_output {
        let rows: Vec<Value> = (states.iter())
            .map(|(i, s)| json!({"state": i, "mean": s.mean, "std": s.std, "min": s.min, "max": s.max, "nan": s.nan}))
            .collect();
        let checks: Vec<Value> =
            checks.iter().map(|c| json!({"check": c.what, "ok": c.ok, "numbers": c.numbers})).collect();
        println!("{}", json!({"tokens": n, "states": rows, "checks": checks, "ok": ok}));
        return Ok(ok);
    }
    println!("{n} tokens\n{:<8} {:>12} {:>12} {:>12} {:>12} {:>6}", "state", "mean", "std", "min", "max", "NaN");
    for (i, s) in &states {
        println!("{i:<8} {:>12.5} {:>12.5} {:>12.4} {:>12.4} {:>6}", s.mean, s.std, s.min, s.max, s.nan);
    }
    for c in &checks {
        println!("{} {}: {}", if c.ok { "ok " } else { "BAD" }, c.what, c.numbers);
    }
    Ok(ok)
}

fn checks(side: &TextSide<'_>, files: &ModelFiles, ran: &super::modules::Ran, ids: &[i32], n: usize) -> Vec<Check> {
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
    checks
}

/// Width of the embeddings, and the rows of these tokens.
fn embedding_rows(files: &ModelFiles, ids: &[i32]) -> Option<(usize, Vec<f32>)> {
    let (_, at) = files.gemma.tensors().find(|(key, _)| key.ends_with("embed_tokens.weight"))?;
    let ty = at.stored.ty()?;
    let [_, width] = ty.shape[..] else { return None };
    let bytes = files.gemma.files().get(at.file)?.data(at.stored);
    let row = width * ty.dtype.bytes();
    let row_ty = ltxc_ir::TensorType::new(ty.dtype, [width]);
    let mut rows = Vec::new();
    for &id in ids {
        let start = usize::try_from(id).ok()?.checked_mul(row)?;
        rows.extend(ltxc_runtime::stats::decoded(&row_ty, bytes.get(start..start + row)?));
    }
    Some((width, rows))
}
