//! `ltxc debug latents`: statistics and spatial coherence of a latent, from a file or from a step of a run.
//!
//! Latents of pictures are coherent: a channel correlates with itself one place further by 0.7 and more. Noise does not.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_runtime::noise_files::{self, Stored};
use ltxc_runtime::pipeline::SlotShape;
use ltxc_runtime::stats::Stats;
use serde_json::json;

use super::flags::{DebugFlags, DebugMode};
use super::pipeline::RunOf;
use super::video_stats::structure;
use crate::pipelines::definition;

/// `ltxc debug latents`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc debug latents latent.safetensors\n  ltxc debug latents --step 3 --checkpoint-path … --gemma-root …"
)]
pub struct LatentsArgs {
    /// File with latents of shape (1, c, f, h, w): .safetensors, .npy, .npz or .pt.
    #[arg(required_unless_present = "step")]
    pub file: Option<PathBuf>,
    /// Step of a run from 0, of which the latent is looked at instead of a file.
    #[arg(long, conflicts_with = "file")]
    pub step: Option<usize>,
    /// Stage of that step.
    #[arg(long, default_value = "stage1", requires = "step")]
    pub stage: String,
    /// Tensor of the file, if it has several.
    #[arg(long, conflicts_with = "step")]
    pub tensor: Option<String>,
    /// What it should be: an encoded or finished latent is coherent, noise is not.
    #[arg(long, default_value_t = false)]
    pub noise: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run: RunOf,
}

/// The latent that was asked for, (1, c, f, h, w).
fn latent(args: &LatentsArgs) -> Result<Stored> {
    let Some(step) = args.step else {
        if args.run.debug != DebugFlags::default() {
            bail!("nothing is run to look into a file; leave the flags of logs out, or name a step with `--step`");
        }
        let path = args.file.as_ref().context("there is neither a file nor a step")?;
        let tensors = noise_files::read(path)?;
        let chosen = match &args.tensor {
            Some(name) => tensors.into_iter().find(|t| t.name == *name),
            None => tensors.into_iter().find(|t| t.shape.len() == 5),
        };
        return chosen.with_context(|| format!("`{}` has no such tensor of shape (1, c, f, h, w)", path.display()));
    };
    let pipeline = definition(args.run.shape.pipeline.unwrap_or_default());
    if !pipeline.has_video {
        bail!("pipeline `{}` makes no video, and only latents of video are looked at; name another one", pipeline.name);
    }
    let (plan, ran) = args.run.run(DebugMode::Fused, BTreeMap::new(), |_| None)?;
    let stage = plan.pipeline.stages.iter().find(|s| s.name == args.stage);
    let stage = stage.with_context(|| format!("pipeline `{}` has no stage `{}`", plan.pipeline.name, args.stage))?;
    let name = format!("{}.step{step}.video.latent", stage.name);
    let values = ran.tensors.get(&name).with_context(|| format!("`{}` has no step {step}", stage.name))?;
    let channels = plan.pipeline.video.channels as usize;
    let shape = SlotShape { spatial: stage.grid.iter().map(|&n| n as usize).collect(), channels, inner: 1 };
    // Tokens that images appended stand behind the others.
    let own = values.get(..shape.len()).with_context(|| format!("`{name}` has {} values", values.len()))?;
    Ok(Stored::f32(&name, &shape.native(), shape.to_native(own)))
}

/// `ltxc debug latents`. Returns whether the latents look like what they should be.
///
/// # Errors
/// A file without such a tensor.
pub fn run(args: &LatentsArgs, json_output: bool) -> Result<bool> {
    let tensor = latent(args)?;
    let &[1, c, f, h, w] = &tensor.shape[..] else {
        bail!("`{}` is {:?}, expected (1, c, f, h, w)", tensor.name, tensor.shape)
    };
    if tensor.values.is_empty() {
        bail!("`{}` is {:?}, which holds no values; give a latent that does", tensor.name, tensor.shape);
    }
    let s = Stats::of(&tensor.shape, &tensor.values);
    let plane = |channel: usize, frame: usize| -> Vec<f64> {
        let at = (channel * f + frame) * h * w;
        tensor.values[at..at + h * w].iter().map(|&v| f64::from(v)).collect()
    };
    let planes = || (0..c).flat_map(|k| (0..f).map(move |i| (k, i)));
    let n = (c * f).max(1) as f64;
    let autocorrelation = planes().map(|(k, i)| structure(&plane(k, i), w).autocorrelation).sum::<f64>() / n;
    let stds: Vec<f64> = (0..c)
        .map(|k| {
            let channel = &tensor.values[k * f * h * w..(k + 1) * f * h * w];
            Stats::of(&[channel.len()], channel).std
        })
        .collect();
    let change = planes()
        .filter(|(_, i)| *i > 0)
        .map(|(k, i)| {
            plane(k, i).iter().zip(plane(k, i - 1)).map(|(a, b)| (a - b).abs()).sum::<f64>() / (h * w).max(1) as f64
        })
        .sum::<f64>()
        / (c * f.saturating_sub(1)).max(1) as f64;
    let dc = s.mean.abs() / s.std.max(1e-30);
    let mut flags = Vec::new();
    if s.is_bad() {
        flags.push(format!("{} NaN and {} infinite values", s.nan, s.infinite));
    }
    match (args.noise, autocorrelation) {
        (false, r) if r < 0.7 => {
            flags.push(format!("neighbours correlate by {r:.2}; latents of pictures reach 0.7 and more"))
        }
        (true, r) if r > 0.3 => flags.push(format!("neighbours correlate by {r:.2}; noise stays below 0.3")),
        _ => {}
    }
    if !args.noise && !(0.7..=1.6).contains(&s.std) {
        flags.push(format!("standard deviation {:.3}, expected 0.7 to 1.6", s.std));
    }
    let (low, high) = (stds.iter().copied().fold(f64::INFINITY, f64::min), stds.iter().copied().fold(0.0, f64::max));
    if json_output {
        println!(
            "{}",
            json!({"tensor": tensor.name, "shape": tensor.shape, "mean": s.mean, "std": s.std, "min": s.min, "max": s.max,
            "channel_std": stds, "dc_ratio": dc, "temporal_difference": change, "autocorrelation": autocorrelation,
            "histogram": shares(&tensor.values), "flags": flags})
        );
    } else {
        println!(
            "{} {}\nmean {:.4} std {:.4} [{:.3}, {:.3}]",
            tensor.name,
            s.shape_text(),
            s.mean,
            s.std,
            s.min,
            s.max
        );
        println!("std by channel {low:.4} to {high:.4}, DC ratio {dc:.4}, temporal difference {change:.4}");
        println!("spatial autocorrelation {autocorrelation:.4}\n{}", histogram(&tensor.values));
        flags.iter().for_each(|flag| println!("RED FLAG: {flag}"));
    }
    Ok(flags.is_empty())
}

/// Shares of values in steps of 1 from −4 to 4, by the beginnings of the steps.
fn shares(values: &[f32]) -> Vec<(f32, f64)> {
    let n = values.len().max(1) as f64;
    let share = |low: f32| values.iter().filter(|&&v| (low..low + 1.0).contains(&v)).count() as f64 / n;
    (-4..4).map(|i| (i as f32, share(i as f32))).collect()
}

fn histogram(values: &[f32]) -> String {
    let bar =
        |(low, share): (f32, f64)| format!("{low:>4} {:>6.2} % {}", share * 100.0, "█".repeat((share * 60.0) as usize));
    shares(values).into_iter().map(bar).collect::<Vec<_>>().join("\n")
}
