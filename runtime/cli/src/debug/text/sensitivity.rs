//! What two contexts do to the blocks of the transformer: one step each, from the same noise.
//!
//! A model that listens to the text has streams that move apart block by block. Where they stay the same, attention to
//! the text adds nothing; the ratio of what it adds to the stream says how much.

use anyhow::{Context, Result};
use clap::Args;
use ltxc_ir::eval::Tensor;
use ltxc_models::Weights;
use ltxc_models::transformer::{Stream, TransformerConfig};
use ltxc_runtime::adapters::AdapterSet;
use ltxc_runtime::stats::Stats;
use ltxc_runtime::tokenizer::CONTEXT_TOKENS;
use serde_json::json;

use crate::debug::evaluation::{DrawnArgs, Inputs};
use crate::debug::modules::{Ran, Side};
use crate::debug::parity::text::TextSide;
use crate::debug::recording::Distance;
use crate::model_files::{MODEL, ModelFiles};

/// Correlation of streams above which a block has heard nothing of the text.
const DEAF: f64 = 1.0 - 1e-9;

/// `ltxc debug text sensitivity`.
#[derive(Debug, Args)]
pub struct SensitivityArgs {
    /// A prompt.
    #[arg(long, short)]
    pub prompt: String,
    /// Another one.
    #[arg(long)]
    pub prompt2: String,
    /// Frames, rows and columns of the latent.
    #[arg(long, value_name = "F,H,W", value_delimiter = ',', default_value = "2,4,6")]
    pub grid: Vec<u32>,
    /// Noise level.
    #[arg(long, default_value_t = 1.0)]
    pub sigma: f32,
    /// Seed of the noise.
    #[arg(long, default_value_t = 10)]
    pub seed: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// One stream behind one block.
struct Row {
    block: usize,
    stream: &'static str,
    correlation: f64,
    /// Norm of what attention to the text gave, by that of the stream.
    ratio: Option<f64>,
    /// Standard deviation of the stream.
    std: f64,
}

pub(super) fn run(args: &SensitivityArgs, side: &TextSide<'_>, files: &ModelFiles, json_output: bool) -> Result<bool> {
    let config = TransformerConfig::from_json(files.model.section("transformer")?)?;
    let (grid, text_tokens) = (args.grid.clone(), CONTEXT_TOKENS);
    let drawn = DrawnArgs { grid, sigma: args.sigma, seed: args.seed, text_tokens };
    let is_wanted = |name: &str| {
        let inside = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
        inside.is_some_and(|(_, last)| ["video", "audio", "attn2", "audio_attn2"].contains(&last))
    };
    let step = |prompt: &str| -> Result<Ran> {
        let contexts = side.connect(&side.encode(&side.prompt(prompt)?)?)?;
        let mut inputs = Inputs::drawn(&drawn, Some(&files.model))?;
        for (stream, of) in Stream::BOTH.into_iter().zip(&mut inputs.streams) {
            let context = contexts.result(&format!("{}_context", stream.name()))?;
            of.iter_mut().for_each(|of| of.context = Tensor::f32(&context.ty.shape, &context.values));
        }
        let weights = Weights::new(MODEL, &files.model);
        inputs.run(side.bench(), &config, &weights, AdapterSet::default(), &is_wanted)
    };
    let (a, b) = (step(&args.prompt)?, step(&args.prompt2)?);
    let mut rows = Vec::new();
    for block in 0..config.layers {
        for stream in Stream::BOTH {
            let path = format!("blocks.{block}.{}", stream.name());
            let (x, y) = (a.value(&path), b.value(&path));
            let (x, y) = (x.context("a block gave nothing")?, y.context("a block gave nothing")?);
            let prefix = if stream == Stream::Audio { "audio_" } else { "" };
            let attention = a.value(&format!("blocks.{block}.{prefix}attn2"));
            rows.push(Row {
                block,
                stream: stream.name(),
                correlation: Distance::of(&x.values, &y.values).pearson,
                ratio: attention.map(|attention| norm(&attention.values) / norm(&x.values).max(1e-30)),
                std: Stats::of(&x.ty.shape, &x.values).std,
            });
        }
    }
    // The last block of a stream has heard of all text.
    let deaf = |stream: &str| rows.iter().rev().find(|r| r.stream == stream).is_some_and(|r| r.correlation > DEAF);
    let is_same = side.prompt(&args.prompt)?.ids() == side.prompt(&args.prompt2)?.ids();
    let flags: Vec<String> = Stream::BOTH
        .iter()
        .filter(|s| !is_same && deaf(s.name()))
        .map(|s| format!("the text does nothing to the {} stream", s.name()))
        .collect();
    if json_output {
        for r in &rows {
            println!(
                "{}",
                json!({"block": r.block, "stream": r.stream, "correlation": r.correlation, "text_ratio": r.ratio, "std": r.std})
            );
        }
        println!("{}", json!({"flags": flags}));
        return Ok(flags.is_empty());
    }
    println!("{:<8} {:<6} {:>12} {:>16} {:>12}", "block", "stream", "correlation", "|attn2|/|stream|", "std");
    for r in &rows {
        let ratio = r.ratio.map_or("-".into(), |ratio| format!("{ratio:.5}"));
        println!("{:<8} {:<6} {:>12.8} {ratio:>16} {:>12.5}", r.block, r.stream, r.correlation, r.std);
    }
    flags.iter().for_each(|flag| println!("RED FLAG: {flag}"));
    Ok(flags.is_empty())
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}
