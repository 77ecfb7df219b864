//! What two contexts do to the blocks of the transformer: one step each, from the same noise.
//!
//! A model that listens to the text has streams that move apart block by block. Where they stay the same, attention to
//! the text adds nothing; the ratio of what it adds to the stream says how much.

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::VideoSettings;
use ltxc_models::Weights;
use ltxc_models::audio::AudioVaeConfig;
use ltxc_models::transformer::{ENTRY, Stream, StreamSpec, TransformerConfig, TransformerSpec, build};
use ltxc_models::video_vae::VideoVaeConfig;
use ltxc_runtime::pipeline::positions::{audio_positions, video_positions};
use ltxc_runtime::random::NormalStream;
use ltxc_runtime::stats::Stats;
use ltxc_runtime::tokenizer::CONTEXT_TOKENS;
use serde_json::json;

use super::Side;
use crate::assemble::{MODEL, ModelFiles};
use crate::debug::modules::Ran;
use crate::debug::parity::text::TextSide;
use crate::debug::recording::Distance;

/// Correlation of streams above which a block has heard nothing of the text.
const DEAF: f64 = 1.0 - 1e-9;

/// `ltxc debug text sensitivity`.
#[derive(Debug, Args)]
pub struct SensitivityArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
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
    let &[f, h, w] = &args.grid[..] else { bail!("`--grid` takes frames, rows and columns") };
    if args.grid.iter().any(|n| !(1..=256).contains(n)) || !(0.0..=1.0).contains(&args.sigma) {
        bail!("the grid must be 1 to 256 of each, the noise level 0 to 1");
    }
    let config = TransformerConfig::from_json(files.model.section("transformer")?)?;
    let [ft, fh, fw] = VideoVaeConfig::from_json(files.model.section("vae")?)?.factors().map(|n| n as u32);
    let settings = VideoSettings {
        height: h * fh,
        width: w * fw,
        frames: (f - 1) * ft + 1,
        frame_rate: (24, 1),
        channels: config.video.in_channels as u32,
        scale: [ft, fh, fw],
        max_keyframes: 0,
    };
    let (num, den) = AudioVaeConfig::from_json(files.model.section("audio_vae")?)?.latent_rate_hz();
    let seconds = f64::from(settings.frames) / 24.0;
    let sounds = ((seconds * num as f64 / den as f64).round_ties_even() as u32).max(1);
    let tokens = [(f * h * w) as usize, sounds as usize];
    let spec = TransformerSpec {
        video: Some(StreamSpec::new(tokens[0], CONTEXT_TOKENS)),
        audio: Some(StreamSpec::new(tokens[1], CONTEXT_TOKENS)),
        perturbation: Default::default(),
    };
    let module = build(&config, &Weights::new(MODEL, &files.model), &spec, DType::F32)?;
    let positions = [video_positions([f, h, w], &settings), audio_positions(sounds)];
    let step = |prompt: &str| -> Result<Ran> {
        let contexts = side.connect(&side.encode(&side.prompt(prompt)?)?)?;
        let mut arguments = Vec::new();
        for ((stream, n), positions) in Stream::BOTH.into_iter().zip(tokens).zip(&positions) {
            let channels = config.stream(stream).in_channels;
            let noise = NormalStream::new(args.seed, &format!("stage1.{}", stream.name())).draw(n * channels);
            let context = contexts.result(&format!("{}_context", stream.name()))?;
            arguments.push(Tensor::f32(&[1, n, channels], &noise));
            arguments.extend([Tensor::f32(&[1], &[args.sigma]), Tensor::f32(&[1], &[args.sigma])]);
            arguments.push(Tensor::f32(&[positions.len() / (2 * n), n, 2], positions));
            arguments.push(Tensor::f32(&context.ty.shape, &context.values));
        }
        let is_wanted = |name: &str| {
            let inside = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
            inside.is_some_and(|(_, last)| ["video", "audio", "attn2", "audio_attn2"].contains(&last))
        };
        side.bench().run_keeping(&module, ENTRY, &arguments, &is_wanted)
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
