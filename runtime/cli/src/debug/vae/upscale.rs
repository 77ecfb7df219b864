//! A latent through the upsampler: with its wrapper (un-normalise, network, normalise), without, and beside enlargements
//! that need no network.
//!
//! Without the wrapper the network sees values of another scale than it was trained on. The result is close to a latent
//! and far from a picture, which is why the fault is easily overlooked.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_models::Weights;
use ltxc_models::upsampler::{Enlarge, UpsamplerConfig, upsample};
use ltxc_runtime::noise_files::{self, Stored};
use ltxc_runtime::stats::Stats;
use serde_json::{Value, json};

use super::reference::{ReferenceArgs, facts};
use super::{LatentArgs, Model, statistics};
use crate::debug::modules::Side;
use crate::debug::parity::channels_first;
use crate::debug::recording::Distance;
use crate::debug::video_stats::structure;
use crate::model_files::UPSAMPLER;

/// Relative L2 below which the wrapper does nothing.
const NO_EFFECT: f64 = 1e-6;

/// Growth of the deviation over the network, in either direction, that is too much for a trained one.
const MOST_GROWTH: f64 = 2.0;

/// `ltxc debug vae upscale`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc debug vae upscale --checkpoint-path … --spatial-upsampler-path … --latent stage1.safetensors"
)]
pub struct UpscaleArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub latent: LatentArgs,
    /// Which result is written and compared.
    #[arg(long, value_enum, default_value_t)]
    pub mode: Mode,
    /// File for it: .safetensors, .npy, .npz or .pt, as `ltxc debug vae decode --latent` reads it.
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub reference: ReferenceArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// Ways to enlarge a latent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Mode {
    /// The network, wrapped as it should be.
    #[default]
    Network,
    /// Copies of values. For comparison: not what the second stage was trained on.
    Nearest,
    /// Linear in rows and columns. For comparison.
    Bilinear,
}

/// An enlarged latent, `[f, h, w, c]`.
struct Enlarged {
    name: &'static str,
    values: Vec<f32>,
}

pub(super) fn upscale(args: &UpscaleArgs, model: &Model<'_>, json_output: bool) -> Result<bool> {
    let Some(upsampler) = &model.upsampler else {
        bail!("`--spatial-upsampler-path` is missing: it names the spatial upscaler")
    };
    let config = UpsamplerConfig::from_json(upsampler.config())?;
    let latent = args.latent.load(config.in_channels)?;
    let [mean, std] = statistics(&model.checkpoint)?;
    let c = config.in_channels;
    if mean.len() != c {
        bail!("the VAE has statistics of {} channels, the upscaler takes {c}; they are not of one model", mean.len());
    }
    let grid @ [f, h, w] = [1, 2, 3].map(|axis| latent.ty.shape[axis]);
    let out = config.output_grid(grid);
    let module = upsample(&config, &Weights::new(UPSAMPLER, upsampler), &model.weights(), grid, DType::F32)?;
    let bench = model.bench()?;
    let run = |values: &[f32]| bench.run("upsampler", &module, "upsample", &[Tensor::f32(&latent.ty.shape, values)]);
    let input = latent.to_f32();
    let normalise =
        |v: &[f32]| -> Vec<f32> { v.iter().enumerate().map(|(i, v)| (v - mean[i % c]) / std[i % c]).collect() };
    let undo = |v: &[f32]| -> Vec<f32> { v.iter().enumerate().map(|(i, v)| v * std[i % c] + mean[i % c]).collect() };
    let wrapped = run(&input)?;
    // What the wrapper does is undone on both sides, so that the network sees the latent itself.
    let bare = undo(&run(&normalise(&input))?.result("latent")?.values);
    let mut results = vec![
        Enlarged { name: "network", values: wrapped.result("latent")?.values.clone() },
        Enlarged { name: "network without wrapper", values: bare },
    ];
    // Frames that an upscaler of time makes have no counterpart without it.
    if matches!(config.enlarge, Enlarge::Space { .. }) {
        let source = |place: usize, from: usize, to: usize| (place as f32 + 0.5) * from as f32 / to as f32 - 0.5;
        for (name, is_smooth) in [("nearest", false), ("bilinear", true)] {
            results
                .push(Enlarged { name, values: enlarged(&input, [f, h, w, c], [out[1], out[2]], &source, is_smooth) });
        }
    }
    let before = Stats::of(&latent.ty.shape, &input);
    let after: Vec<Stats> = results.iter().map(|r| Stats::of(&[out[0], out[1], out[2], c], &r.values)).collect();
    let mut flags = Vec::new();
    let effect = Distance::of(&results[0].values, &results[1].values).relative_l2;
    if effect < NO_EFFECT {
        flags.push("the wrapper does nothing: the statistics of the VAE are those of no model (0 and 1)".to_string());
    }
    if after[0].is_bad() {
        flags.push("the result is not finite".into());
    }
    let growth = after[0].std / before.std.max(1e-30);
    let is_trained = !model.checkpoint.is_synthetic() && !upsampler.is_synthetic();
    if is_trained && args.reference.compare.is_none() && !(1.0 / MOST_GROWTH..=MOST_GROWTH).contains(&growth) {
        flags.push(format!("the deviation is {growth:.2} times that of the latent, expected about 1"));
    }
    let wanted = match args.mode {
        Mode::Network => "network",
        Mode::Nearest => "nearest",
        Mode::Bilinear => "bilinear",
    };
    let chosen = results.iter().find(|r| r.name == wanted);
    let chosen =
        chosen.with_context(|| format!("this upscaler enlarges {}, which `{wanted}` cannot", config.enlarge))?;
    let native = channels_first(&chosen.values, c);
    let verdict = args.reference.check(&["latent", "normalized_output", "output"], &native)?;
    if let Some(path) = &args.output {
        let shape = [1, c, out[0], out[1], out[2]];
        noise_files::write(path, &Stored::f32("latent", &shape, native))?;
    }
    let blocks: Vec<(String, Stats)> = (wrapped.values.iter())
        .filter_map(|v| Some((v.name.strip_prefix("upsampler.")?.to_string(), v)))
        .filter(|(name, _)| !name.contains("conv") && name.split('.').count() <= 2 && !name.contains("norm1"))
        .map(|(name, v)| (name, Stats::of(&v.ty.shape, &v.values)))
        .collect();
    let ok = flags.is_empty() && verdict.as_ref().is_none_or(|v| v.ok);
    // Neighbours in a channel of a frame.
    let coherence = |values: &[f32], [f, h, w]: [usize; 3]| {
        let planes = (0..f).flat_map(|i| (0..c).map(move |k| (i, k)));
        let plane = |(i, k): (usize, usize)| -> Vec<f64> {
            (0..h * w).map(|p| f64::from(values[(i * h * w + p) * c + k])).collect()
        };
        planes.map(|at| structure(&plane(at), w).autocorrelation).sum::<f64>() / (f * c).max(1) as f64
    };
    let facts_of = |name: &str, s: &Stats, coherence: f64| json!({"latent": name, "mean": s.mean, "std": s.std, "min": s.min, "max": s.max, "autocorrelation": coherence});
    if json_output {
        let mut rows = vec![facts_of("input", &before, coherence(&input, grid))];
        rows.extend(results.iter().zip(&after).map(|(r, s)| facts_of(r.name, s, coherence(&r.values, out))));
        let blocks: Vec<Value> =
            blocks.iter().map(|(name, s)| json!({"block": name, "std": s.std, "min": s.min, "max": s.max})).collect();
        println!(
            "{}",
            json!({"latents": rows, "blocks": blocks, "wrapper_effect": effect, "compared": facts(verdict.as_ref()),
                "flags": flags, "ok": ok})
        );
        return Ok(ok);
    }
    let line = |name: &str, s: &Stats, coherence: f64| {
        println!(
            "{name:<24} mean {:>9.4} std {:>9.4} [{:.3}, {:.3}] autocorrelation {coherence:.3}",
            s.mean, s.std, s.min, s.max
        );
    };
    line("input", &before, coherence(&input, grid));
    results.iter().zip(&after).for_each(|(r, s)| line(r.name, s, coherence(&r.values, out)));
    for (name, s) in &blocks {
        println!("  {name:<30} std {:>10.4} [{:.3}, {:.3}]", s.std, s.min, s.max);
    }
    println!("with and without wrapper: relative L2 {effect:.3e}");
    if let Some(verdict) = verdict {
        println!("{}", verdict.text());
    }
    flags.iter().for_each(|flag| println!("RED FLAG: {flag}"));
    Ok(ok)
}

/// `[f, h, w, c]` with other rows and columns; `source` gives the place of a new row or column among the old ones.
fn enlarged(
    values: &[f32],
    [f, h, w, c]: [usize; 4],
    [rows, columns]: [usize; 2],
    source: &dyn Fn(usize, usize, usize) -> f32,
    is_smooth: bool,
) -> Vec<f32> {
    // Two neighbours and the weight of the second.
    let neighbours = |place: f32, extent: usize| {
        let place = place.clamp(0.0, (extent - 1) as f32);
        match is_smooth {
            true => (place as usize, (place as usize + 1).min(extent - 1), place.fract()),
            false => (place.round() as usize, place.round() as usize, 0.0),
        }
    };
    let mut out = Vec::with_capacity(f * rows * columns * c);
    for frame in 0..f {
        for y in 0..rows {
            let (top, bottom, dy) = neighbours(source(y, h, rows), h);
            for x in 0..columns {
                let (left, right, dx) = neighbours(source(x, w, columns), w);
                for k in 0..c {
                    let at = |y: usize, x: usize| values[((frame * h + y) * w + x) * c + k];
                    let upper = at(top, left) * (1.0 - dx) + at(top, right) * dx;
                    let lower = at(bottom, left) * (1.0 - dx) + at(bottom, right) * dx;
                    out.push(upper * (1.0 - dy) + lower * dy);
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enlargements_keep_the_mean() {
        let source = |place: usize, from: usize, to: usize| (place as f32 + 0.5) * from as f32 / to as f32 - 0.5;
        let line = [0.0, 4.0];
        assert_eq!(enlarged(&line, [1, 1, 2, 1], [1, 4], &source, true), [0.0, 1.0, 3.0, 4.0]);
        assert_eq!(enlarged(&line, [1, 1, 2, 1], [1, 4], &source, false), [0.0, 0.0, 4.0, 4.0]);
    }
}
