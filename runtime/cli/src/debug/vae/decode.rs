//! Known latents through the decoder: block by block, as frames, and at several timesteps.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_ir::TensorType;
use ltxc_ir::eval::Tensor;
use ltxc_models::video_vae::{DECODE_TIMESTEP, VideoVaeConfig};
use ltxc_runtime::noise_files;
use ltxc_runtime::random::NormalStream;
use ltxc_runtime::stats::{Stats, decoded};
use serde_json::{Value, json};

use super::reference::{ReferenceArgs, facts};
use super::{LatentArgs, Model, channels_last};
use crate::debug::modules::{Kept, Ran, Side};
use crate::debug::options::DebugOptions;
use crate::debug::parity::channels_first;
use crate::debug::recording::Distance;

/// Standard deviation above which activations explode, and below which they collapse.
const EXPLODES: f64 = 100.0;
const COLLAPSES: f64 = 0.1;

/// Relative difference of means and deviations that two traces may have.
const TRACE_LIMIT: f64 = 1e-3;

/// Relative L2 below which a timestep does nothing.
const NO_EFFECT: f64 = 1e-6;

/// A latent on its way through the decoder.
#[derive(Debug, Args)]
pub struct Source {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub latent: LatentArgs,
    /// Timestep, for decoders that take one; `none` leaves the conditioning out [default: the model's 0.05]
    #[arg(long)]
    pub timestep: Option<String>,
    /// Noise of decoders that add some: the tensors of this file that are called noise, in order, or `none` to add none;
    /// else it is drawn.
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// `ltxc debug vae trace`.
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// Compare with the lines that this command has written with --json for another model or by another tool.
    #[arg(long, value_name = "FILE", alias = "ref")]
    pub compare: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub source: Source,
}

/// `ltxc debug vae decode`.
#[derive(Debug, Args)]
pub struct DecodeArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub reference: ReferenceArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub source: Source,
}

/// `ltxc debug vae timestep`.
#[derive(Debug, Args)]
pub struct TimestepArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub latent: LatentArgs,
    /// Timesteps to decode at.
    #[arg(long, value_delimiter = ',', default_value = "0,0.05,0.5,1")]
    pub timesteps: Vec<f32>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

impl Source {
    /// The configuration, without conditioning if that is to be left out, and the timestep.
    fn conditioning(&self, config: &VideoVaeConfig) -> Result<(VideoVaeConfig, f32)> {
        let timestep = match self.timestep.as_deref() {
            Some(_) if !config.has_timestep => bail!("this decoder takes no timestep; leave `--timestep` out"),
            Some("none") => return Ok((VideoVaeConfig { has_timestep: false, ..config.clone() }, 0.0)),
            Some(text) => {
                text.parse().with_context(|| format!("`--timestep {text}` is neither a number nor `none`"))?
            }
            None => DECODE_TIMESTEP,
        };
        Ok((config.clone(), timestep))
    }

    fn decoded(&self, model: &Model<'_>) -> Result<Ran> {
        let (config, timestep) = self.conditioning(&model.video_vae()?)?;
        let latent = self.latent.load(config.latent_channels)?;
        let spares = DebugOptions::of_graphs(&self.side.logs)?.spares_decoders;
        let noise = self.noise.as_deref().or(spares.then_some(Path::new(NO_NOISE)));
        run(model, &config, &latent, timestep, noise)
    }
}

/// Instead of a file of noise: the decoder gets none.
const NO_NOISE: &str = "none";

/// Decodes a latent `[1, f, h, w, c]`. Noise comes from a file, or is drawn; the same for every timestep. Where there is to
/// be none, the latent takes the place of the noise that is mixed into it, as in a run.
fn run(
    model: &Model<'_>,
    config: &VideoVaeConfig,
    latent: &Tensor,
    timestep: f32,
    noise: Option<&Path>,
) -> Result<Ran> {
    let is_spared = noise.is_some_and(|path| path == Path::new(NO_NOISE));
    let mut given = noise.filter(|_| !is_spared).map(noise_of).transpose()?.map(Vec::into_iter);
    let mut argument = |name: &str, ty: &TensorType| match (name, &mut given) {
        ("timestep", _) => Ok(vec![timestep]),
        ("noise", _) if is_spared => Ok(latent.to_f32()),
        _ if is_spared => Ok(vec![0.0; ty.elements()]),
        (name, None) => Ok(NormalStream::new(0, name).draw(ty.elements())),
        (name, Some(given)) => {
            let values = given.next().with_context(|| format!("the file of noise has nothing for `{name}`"))?;
            if values.len() != ty.elements() {
                bail!("the noise for `{name}` has {} values, the decoder takes {ty}", values.len());
            }
            Ok(values)
        }
    };
    model.decode(config, latent, &mut argument, &|_| true)
}

/// Tensors of a file that are called noise, by the numbers behind that, channels last.
fn noise_of(path: &Path) -> Result<Vec<Vec<f32>>> {
    let number = |name: &str| {
        let last = name.rsplit_once("noise")?.1.trim_start_matches('.');
        if last.is_empty() { Some(0) } else { last.parse::<usize>().ok() }
    };
    let mut found: Vec<(usize, Vec<f32>)> = Vec::new();
    for tensor in noise_files::read(path)? {
        let Some(number) = number(&tensor.name) else { continue };
        let values = match tensor.shape[..] {
            [1, c, _, _, _] => channels_last(&tensor.values, c),
            _ => tensor.values,
        };
        found.push((number, values));
    }
    if found.is_empty() {
        bail!("`{}` has no tensor called `noise`", path.display());
    }
    found.sort_by_key(|(number, _)| *number);
    Ok(found.into_iter().map(|(_, values)| values).collect())
}

/// The blocks of a decoder in order, with statistics.
fn blocks(ran: &Ran) -> Vec<(String, Stats)> {
    let mut blocks: Vec<(String, Stats)> = Vec::new();
    for value in &ran.values {
        let Some(name) = value.name.strip_prefix("vae.decoder.").and_then(block_of) else { continue };
        let stats = Stats::of(&value.ty.shape, &value.values);
        match blocks.last_mut() {
            // What comes last in a block is its result.
            Some((last, known)) if *last == name => *known = stats,
            _ => blocks.push((name, stats)),
        }
    }
    if let Some(frames) = ran.results.get("frames") {
        blocks.push(("frames".into(), Stats::of(&frames.ty.shape, &frames.values)));
    }
    blocks
}

/// The block that a value is the result of: the last residual block of a stack stands for the stack.
fn block_of(name: &str) -> Option<String> {
    if name == "conv_in" || name == "conv_out" {
        return Some(name.into());
    }
    let parts: Vec<&str> = name.split('.').collect();
    match parts[..] {
        ["up_blocks", block] | ["up_blocks", block, "res_blocks", _] => Some(format!("up_blocks.{block}")),
        _ => None,
    }
}

/// What is wrong with a block, given the one before it.
fn warning(stats: &Stats, before: Option<&Stats>) -> Option<&'static str> {
    if stats.is_bad() {
        return Some("NaN or infinite");
    }
    if stats.std > EXPLODES {
        return Some("exploding");
    }
    if stats.std < COLLAPSES {
        return Some("collapsing");
    }
    let flips = |b: &Stats| b.mean * stats.mean < 0.0 && b.mean.abs() > b.std && stats.mean.abs() > stats.std;
    before.is_some_and(flips).then_some("the mean changes its sign")
}

pub(super) fn trace(args: &TraceArgs, model: &Model<'_>, json_output: bool) -> Result<bool> {
    let blocks = blocks(&args.source.decoded(model)?);
    if let Some(path) = &args.compare {
        return compare_traces(path, &blocks, json_output);
    }
    let warnings: Vec<Option<&str>> =
        blocks.iter().enumerate().map(|(i, (_, s))| warning(s, i.checked_sub(1).map(|i| &blocks[i].1))).collect();
    // Frames of one colour are no explosion, and their own command judges them.
    let inner = &warnings[..warnings.len().saturating_sub(1)];
    let first = inner.iter().position(Option::is_some);
    for ((name, s), warning) in blocks.iter().zip(&warnings) {
        if json_output {
            println!(
                "{}",
                json!({"block": name, "shape": s.ty.shape, "mean": s.mean, "std": s.std, "min": s.min, "max": s.max, "warning": warning})
            );
        } else {
            let note = warning.map(|w| format!("  < {w}")).unwrap_or_default();
            println!(
                "{name:<16} {:<22} mean {:>10.4} std {:>10.4} [{:.3}, {:.3}]{note}",
                s.shape_text(),
                s.mean,
                s.std,
                s.min,
                s.max
            );
        }
    }
    if let (Some(at), false) = (first, json_output) {
        println!("first warning at {}", blocks[at].0);
    }
    Ok(first.is_none())
}

/// Compares with a trace that was written before: the first block that differs is where to look.
fn compare_traces(path: &Path, blocks: &[(String, Stats)], json_output: bool) -> Result<bool> {
    let text = std::fs::read_to_string(path).with_context(|| format!("trace `{}`", path.display()))?;
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let mut first = None;
    let mut compared = 0;
    for (name, s) in blocks {
        let Some(other) = lines.iter().find(|l| l["block"] == name.as_str()) else { continue };
        let (Some(mean), Some(std)) = (other["mean"].as_f64(), other["std"].as_f64()) else { continue };
        compared += 1;
        // A mean near zero is measured against the spread of the values.
        let scale = std.abs().max(1e-30);
        let difference = ((s.mean - mean).abs().max((s.std - std).abs())) / scale;
        let differs = difference.is_nan() || difference > TRACE_LIMIT;
        if differs && first.is_none() {
            first = Some(name.clone());
        }
        if json_output {
            println!("{}", json!({"block": name, "difference": difference, "differs": differs}));
        } else {
            let note = if differs { "  < differs" } else { "" };
            println!("{name:<16} mean {:>10.4} and {mean:>10.4}, std {:>10.4} and {std:>10.4}{note}", s.mean, s.std);
        }
    }
    if compared == 0 {
        bail!(
            "`{}` has no line of a block of this decoder; write one with `ltxc debug vae trace --json`",
            path.display()
        );
    }
    match &first {
        Some(name) if json_output => println!("{}", json!({"first_different": name})),
        Some(name) => println!("first different block: {name}"),
        None => {}
    }
    Ok(first.is_none())
}

/// Share of white, and deviation on the scale 0 to 255.
fn brightness(frames: &Kept) -> (f64, f64, bool) {
    let bytes: Vec<f32> = frames.values.iter().map(|v| ((v + 1.0) * 0.5).clamp(0.0, 1.0) * 255.0).collect();
    let s = Stats::of(&frames.ty.shape, &bytes);
    (s.mean / 255.0, s.std, !s.is_bad())
}

pub(super) fn decode(args: &DecodeArgs, model: &Model<'_>, json_output: bool) -> Result<bool> {
    let ran = args.source.decoded(model)?;
    let frames = ran.result("frames")?;
    let (brightness, std, is_finite) = brightness(frames);
    let names = ["frames", "dec.output", "output", "sample"];
    let verdict = args.reference.check(&names, &channels_first(&frames.values, 3))?;
    let ok = is_finite && verdict.as_ref().is_none_or(|v| v.ok);
    if json_output {
        println!(
            "{}",
            json!({"shape": frames.ty.shape, "brightness": brightness, "std": std, "compared": facts(verdict.as_ref()), "ok": ok})
        );
        return Ok(ok);
    }
    println!(
        "latent {} gives {} frames: brightness {:.1} %, std {std:.2}",
        args.source.latent.latent,
        frames.ty.shape[1],
        brightness * 100.0
    );
    if let Some(verdict) = verdict {
        println!("{}", verdict.text());
    }
    Ok(ok)
}

pub(super) fn timestep(args: &TimestepArgs, model: &Model<'_>, json_output: bool) -> Result<bool> {
    let config = model.video_vae()?;
    if !config.has_timestep {
        match json_output {
            true => println!("{}", json!({"takes_timestep": false, "ok": true})),
            false => println!("this decoder takes no timestep"),
        }
        return Ok(true);
    }
    if args.timesteps.len() < 2 || args.timesteps.iter().any(|t| !t.is_finite()) {
        bail!("`--timesteps` takes at least two numbers");
    }
    let latent = args.latent.load(config.latent_channels)?;
    let mut problems = Vec::new();
    let weights = embedder_weights(model, &mut problems);
    let frames: Vec<Kept> = (args.timesteps.iter())
        .map(|&t| Ok(run(model, &config, &latent, t, None)?.result("frames")?.clone()))
        .collect::<Result<_>>()?;
    let rows: Vec<(f32, f64, f64)> = (args.timesteps.iter().zip(&frames))
        .map(|(&t, kept)| (t, brightness(kept).0, Distance::of(&kept.values, &frames[0].values).relative_l2))
        .collect();
    if rows.iter().all(|(_, _, effect)| *effect < NO_EFFECT) {
        problems.push("the timestep changes nothing: the decoder ignores it".into());
    }
    let ok = problems.is_empty();
    if json_output {
        let effects: Vec<Value> = (rows.iter())
            .map(|(t, brightness, effect)| json!({"timestep": t, "brightness": brightness, "relative_l2": effect}))
            .collect();
        println!(
            "{}",
            json!({"takes_timestep": true, "weights": weights.iter().map(|w| json!({"key": w.0, "what": w.1})).collect::<Vec<_>>(),
                "effects": effects, "problems": problems, "ok": ok})
        );
        return Ok(ok);
    }
    weights.iter().for_each(|(key, what)| println!("{key:<64} {what}"));
    for (t, brightness, effect) in &rows {
        println!("timestep {t:<8} brightness {:>5.1} %, relative L2 from the first {effect:.3e}", brightness * 100.0);
    }
    problems.iter().for_each(|p| println!("RED FLAG: {p}"));
    Ok(ok)
}

/// The weights of timestep conditioning, each with what is worth knowing, rows of tables by name.
fn embedder_weights(model: &Model<'_>, problems: &mut Vec<String>) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let is_part = |k: &str| {
        k.starts_with("vae.decoder.")
            && ["time_embedder.", "scale_shift_table", "timestep_scale_multiplier"].iter().any(|part| k.contains(part))
    };
    let keys: Vec<String> = model.checkpoint.tensors().map(|(k, _)| k.to_string()).filter(|k| is_part(k)).collect();
    for key in keys {
        let stored = model.checkpoint.tensor(&key).and_then(|at| at.stored.ty());
        let (Some(ty), Some(bytes)) = (stored, model.checkpoint.data(&key)) else { continue };
        let values = decoded(&ty, bytes);
        let s = Stats::of_typed(ty.clone(), &values);
        if s.is_bad() {
            problems.push(format!("`{key}` is not finite"));
        } else if key.ends_with("weight") && s.zeros == values.len() {
            problems.push(format!("`{key}` is all zeros, as if it had not been loaded"));
        }
        match ty.shape[..] {
            [] => lines.push((key, format!("factor of the timestep {:.4}", values.first().copied().unwrap_or(0.0)))),
            [rows, width] if key.ends_with("scale_shift_table") => {
                let names: &[&str] =
                    if rows == 2 { &["shift", "scale"] } else { &["shift 1", "scale 1", "shift 2", "scale 2"] };
                for (name, row) in names.iter().zip(values.chunks(width.max(1))) {
                    let s = Stats::of(&[width], row);
                    lines.push((format!("{key} {name}"), format!("mean {:.5} std {:.5}", s.mean, s.std)));
                }
            }
            _ => lines.push((key, format!("{ty} mean {:.5} std {:.5}", s.mean, s.std))),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn explosions_and_collapses_are_told() {
        let stats = |scale: f32| Stats::of(&[4], &[scale, -scale, scale, -scale]);
        assert_eq!(warning(&stats(1.0), None), None);
        assert_eq!(warning(&stats(500.0), None), Some("exploding"));
        assert_eq!(warning(&stats(0.01), None), Some("collapsing"));
        assert_eq!(warning(&stats(f32::NAN), None), Some("NaN or infinite"));
        let shifted = |mean: f32| Stats::of(&[2], &[mean - 0.5, mean + 0.5]);
        assert_eq!(warning(&shifted(3.0), Some(&shifted(-3.0))), Some("the mean changes its sign"));
    }
}
