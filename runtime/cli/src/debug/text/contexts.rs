//! Contexts and hidden states in files: written for other tools, read from them, compared.
//!
//! `video_context` and `audio_context` are `(1, 1024, width)`; those of a negative prompt have `negative_` in front; hidden
//! states are `hidden_states.<i>`, `(1, tokens, width)`. Other tools' names are understood, too, and words with a dot in
//! front of them.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use ltxc_ir::plan::Plan;
use ltxc_models::text::Modality;
use ltxc_runtime::noise_files::{self, Stored};
use ltxc_runtime::pipeline::{Embeddings, TextContext};
use serde_json::{Value, json};

use crate::debug::modules::{Ran, Side};
use crate::debug::parity::text::{TextSide, last_rows};
use crate::debug::recording::Distance;

/// Names of contexts in files: ours first.
const VIDEO: [&str; 4] = ["video_context", "prompt_embeds", "video_prompt_embeds", "video_embeddings"];
const AUDIO: [&str; 4] = ["audio_context", "audio_prompt_embeds", "ltx2_audio_prompt_embeds", "audio_embeddings"];
const NEGATIVE_VIDEO: [&str; 2] = ["negative_video_context", "negative_prompt_embeds"];
const NEGATIVE_AUDIO: [&str; 3] =
    ["negative_audio_context", "negative_audio_prompt_embeds", "ltx2_audio_negative_embeds"];

/// Correlation with another state above which a state is taken for that one.
const SAME: f64 = 0.999;

/// `ltxc encode-text`, also `ltxc debug text export`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc encode-text --checkpoint-path … --gemma-root … -p \"a fox\" -o fox.safetensors"
)]
pub struct ExportArgs {
    /// Prompt.
    #[arg(long, short)]
    pub prompt: String,
    /// Negative prompt, for guided pipelines.
    #[arg(long)]
    pub negative_prompt: Option<String>,
    /// Write hidden states and features, too.
    #[arg(long)]
    pub states: bool,
    /// File to write; its extension is the format.
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// `ltxc debug text compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Prompt that the other tool encoded.
    #[arg(long, short)]
    pub prompt: String,
    /// File of the other tool.
    #[arg(long = "ref", value_name = "FILE")]
    pub reference: PathBuf,
    /// Largest relative L2 that counts as equal.
    #[arg(long, default_value_t = 1e-3)]
    pub limit: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// Contexts from elsewhere, for a plan.
///
/// # Errors
/// A file that cannot be read, lacks contexts, or has some of another shape than the plan takes.
pub fn embeddings(path: &Path, plan: &Plan) -> Result<Embeddings> {
    let tensors = noise_files::read(path)?;
    let shapes = Embeddings::shapes(plan)?;
    let find = |names: [&[&str]; 2]| -> Result<[Option<Vec<f32>>; 2]> {
        let mut found = [None, None];
        for ((slot, names), shape) in found.iter_mut().zip(names).zip(&shapes) {
            if shape[..] == [0] {
                // Of what the plan does not make, nothing is needed.
                *slot = Some(Vec::new());
                continue;
            }
            let Some(tensor) = names.iter().find_map(|name| named(&tensors, name)) else { continue };
            // An axis for one sample may be left out.
            if tensor.shape != *shape && tensor.shape[..] != shape[1..] {
                bail!(
                    "`{}` of `{}` is {:?}, the plan takes {shape:?}; encode with the text encoder of its model",
                    tensor.name,
                    path.display(),
                    tensor.shape
                );
            }
            *slot = Some(tensor.values.clone());
        }
        Ok(found)
    };
    let [Some(video), Some(audio)] = find([&VIDEO, &AUDIO])? else {
        bail!(
            "`{}` lacks a context: expected `{}` and `{}`, or other tools' names of them",
            path.display(),
            VIDEO[0],
            AUDIO[0]
        )
    };
    let negative = match find([&NEGATIVE_VIDEO, &NEGATIVE_AUDIO])? {
        [Some(video), Some(audio)] => Some(TextContext { video, audio }),
        _ => None,
    };
    Ok(Embeddings { name: path.display().to_string(), prompt: TextContext { video, audio }, negative })
}

/// The tensor called `name`, or `<word>.name`.
fn named<'t>(tensors: &'t [Stored], name: &str) -> Option<&'t Stored> {
    let exact = tensors.iter().find(|t| t.name == name);
    exact.or_else(|| tensors.iter().find(|t| t.name.split_once('.').is_some_and(|(_, rest)| rest == name)))
}

pub(super) fn export(args: &ExportArgs, side: &TextSide<'_>, json_output: bool) -> Result<bool> {
    let mut tensors = Vec::new();
    for (prompt, prefix) in [(Some(&args.prompt), ""), (args.negative_prompt.as_ref(), "negative_")] {
        let Some(prompt) = prompt else { continue };
        let prompt = side.prompt(prompt)?;
        let encoded = side.encode(&prompt)?;
        let connected = side.connect(&encoded)?;
        for modality in Modality::ALL {
            let name = format!("{}_context", modality.name());
            let context = connected.result(&name)?;
            tensors.push(Stored::f32(&format!("{prefix}{name}"), &context.ty.shape, context.values.clone()));
        }
        if args.states {
            tensors.extend(states(side, &encoded, prompt.ids().len(), prefix));
        }
    }
    noise_files::write_all(&args.output, &tensors)?;
    if json_output {
        let names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
        println!("{}", json!({"file": args.output, "tensors": names}));
    } else {
        println!("{}", args.output.display());
    }
    Ok(true)
}

/// Hidden states and features of the `n` real tokens.
fn states(side: &TextSide<'_>, encoded: &Ran, n: usize, prefix: &str) -> Vec<Stored> {
    let mut tensors = Vec::new();
    for i in 0..side.states() {
        if let Some(state) = side.state(encoded, i) {
            let real = last_rows(state, n);
            let shape = [1, n, real.len() / n.max(1)];
            tensors.push(Stored::f32(&format!("{prefix}hidden_states.{i}"), &shape, real.to_vec()));
        }
    }
    for modality in Modality::ALL {
        if let Some(features) = encoded.results.get(modality.name()) {
            let width = features.ty.shape.last().copied().unwrap_or(1);
            let real = features.values.get(..n * width).unwrap_or_default().to_vec();
            tensors.push(Stored::f32(&format!("{prefix}features_{}", modality.name()), &[1, n, width], real));
        }
    }
    tensors
}

/// One compared tensor.
struct Row {
    name: String,
    distance: Distance,
    /// Ratio of the norms, ours by theirs.
    ratio: f64,
}

pub(super) fn compare(args: &CompareArgs, side: &TextSide<'_>, json_output: bool) -> Result<bool> {
    let theirs = noise_files::read(&args.reference)?;
    let prompt = side.prompt(&args.prompt)?;
    let n = prompt.ids().len();
    let encoded = side.encode(&prompt)?;
    let connected = side.connect(&encoded)?;
    let mut rows = Vec::new();
    let ours = states(side, &encoded, n, "");
    let of = |i: usize| ours.iter().find(|t| t.name == format!("hidden_states.{i}"));
    for tensor in &ours {
        let other = tensor.name.replace("hidden_states.", "hidden.");
        if let Some(found) = named(&theirs, &tensor.name).or_else(|| named(&theirs, &other)) {
            rows.push(row(&tensor.name, &tensor.values, real_rows(found, &tensor.shape)));
        }
    }
    for (modality, names) in Modality::ALL.into_iter().zip([VIDEO, AUDIO]) {
        let name = format!("{}_context", modality.name());
        if let Some(found) = names.iter().find_map(|name| named(&theirs, name)) {
            rows.push(row(&name, &connected.result(&name)?.values, &found.values));
        }
    }
    if rows.is_empty() {
        let names: Vec<&str> = theirs.iter().take(5).map(|t| t.name.as_str()).collect();
        bail!(
            "`{}` has `{}`, expected `hidden_states.<i>`, `features_video`, `video_context` and the like",
            args.reference.display(),
            names.join("`, `")
        );
    }
    let is_bad = |row: &Row| row.distance.relative_l2.is_nan() || row.distance.relative_l2 > args.limit;
    let first = rows.iter().position(is_bad);
    let hints = first.map(|_| hints(&theirs, &of, side.states())).unwrap_or_default();
    if json_output {
        let facts: Vec<Value> = (rows.iter())
            .map(|r| {
                json!({"tensor": r.name, "relative_l2": format!("{:e}", r.distance.relative_l2), "pearson": r.distance.pearson,
                    "cosine": r.distance.cosine, "norm_ratio": r.ratio, "ok": !is_bad(r)})
            })
            .collect();
        println!(
            "{}",
            json!({"tokens": n, "tensors": facts, "first_bad": first.map(|i| &rows[i].name), "likely": hints,
                "ok": first.is_none()})
        );
        return Ok(first.is_none());
    }
    println!("{:<20} {:>12} {:>9} {:>9} {:>11}", "tensor", "relative L2", "pearson", "cosine", "norm ratio");
    for r in &rows {
        println!(
            "{:<20} {:>12.2e} {:>9.5} {:>9.5} {:>11.5}{}",
            r.name,
            r.distance.relative_l2,
            r.distance.pearson,
            r.distance.cosine,
            r.ratio,
            if is_bad(r) { "  < differs" } else { "" }
        );
    }
    if let Some(first) = first {
        println!("first difference: {}", rows[first].name);
        hints.iter().for_each(|hint| println!("likely: {hint}"));
    }
    Ok(first.is_none())
}

/// The rows of a foreign tensor that have the place of ours: the last ones, in front of which pads stand.
fn real_rows<'t>(tensor: &'t Stored, shape: &[usize]) -> &'t [f32] {
    let (rows, width) = (shape[1], shape[2]);
    let is_padded = tensor.shape.last() == Some(&width) && tensor.values.len() > rows * width;
    if is_padded { &tensor.values[tensor.values.len() - rows * width..] } else { &tensor.values }
}

fn row(name: &str, ours: &[f32], theirs: &[f32]) -> Row {
    let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let ratio = norm(ours) / norm(theirs).max(1e-30);
    Row { name: name.into(), distance: Distance::of(ours, theirs), ratio }
}

/// What usually is behind such a difference of hidden states.
fn hints<'t>(theirs: &[Stored], ours: &dyn Fn(usize) -> Option<&'t Stored>, states: usize) -> Vec<String> {
    let foreign =
        |i: usize| named(theirs, &format!("hidden_states.{i}")).or_else(|| named(theirs, &format!("hidden.{i}")));
    // Whether our state `i` is their state `j`, and by which factor.
    let same = |i: usize, j: usize| -> Option<f64> {
        let (a, b) = (ours(i)?, foreign(j)?);
        let found = row("", &a.values, real_rows(b, &a.shape));
        (found.distance.pearson > SAME).then_some(found.ratio)
    };
    let mut hints = Vec::new();
    let hidden = ours(0).map_or(1, |t| t.shape[2]) as f64;
    if let Some(factor) = same(0, 0).filter(|f| (f / hidden.sqrt() - 1.0).abs() < 0.02) {
        hints.push(format!(
            "their embeddings lack the factor {:.4}, the square root of the hidden size (ours are {factor:.4} times theirs)",
            hidden.sqrt()
        ));
    }
    let is_shifted = |i: usize| same(i + 1, i).is_some() && same(i, i).is_none();
    if states > 2 && (0..states - 1).filter(|i| is_shifted(*i)).count() * 2 > states - 1 {
        hints.push("their states are collected after each layer instead of before it".into());
    }
    let all_alike = (1..states).all(|i| {
        let (Some(a), Some(b)) = (foreign(0), foreign(i)) else { return false };
        Distance::of(&a.values, &b.values).pearson > SAME
    });
    if states > 1 && all_alike {
        hints.push("all of their states are one: only one layer was used".into());
    }
    let first = (0..states).find(|&i| foreign(i).is_some() && same(i, i).is_none());
    if let Some(i) = first.filter(|i| *i > 0 && hints.is_empty()) {
        hints.push(format!(
            "state {i} is the first that differs: compare the RoPE settings and masks of layer {}",
            i - 1
        ));
    }
    hints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_tools_are_found() {
        let tensors = ["pos.video_context", "ltx2_audio_prompt_embeds"].map(|name| Stored::f32(name, &[1], vec![1.0]));
        assert!(VIDEO.iter().any(|name| named(&tensors, name).is_some()));
        assert!(AUDIO.iter().any(|name| named(&tensors, name).is_some()));
        assert!(NEGATIVE_VIDEO.iter().all(|name| named(&tensors, name).is_none()));
    }

    #[test]
    fn pads_in_front_are_left_out() {
        let padded = Stored::f32("x", &[1, 3, 2], vec![0.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(real_rows(&padded, &[1, 2, 2]), [1.0, 2.0, 3.0, 4.0]);
    }
}
