//! `ltxc debug positions`: where tokens stand, the rotary tables of a model for them, and whether both equal those of a file.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use ltxc_ir::eval::{Evaluator, Tensor};
use ltxc_ir::plan::VideoSettings;
use ltxc_ir::{Builder, DType, Rate, TensorType};
use ltxc_models::Functions;
use ltxc_models::checkpoint::Checkpoint;
use ltxc_models::transformer::rope::{RopeTable, Rotation, rotation};
use ltxc_models::transformer::{Stream, TransformerConfig};
use ltxc_runtime::pipeline::positions::{audio_positions, video_positions};
use ltxc_runtime::stats::sum_f32;
use serde_json::json;

use super::parity::transformer::heads_first;
use super::recording::{Distance, TensorFile};
use crate::model_files::local;

/// Largest difference of cosines and sines.
const ROPE_LIMIT: f64 = 1e-5;

/// `ltxc debug positions`.
#[derive(Debug, Args)]
pub struct PositionsArgs {
    /// Frames, rows and columns of the latent.
    #[arg(long, value_name = "F,H,W", value_delimiter = ',', default_value = "3,2,3")]
    pub grid: Vec<u32>,
    /// Frames per second.
    #[arg(long, default_value_t = 24)]
    pub frame_rate: u32,
    /// Audio tokens; those of the length of the video if not given.
    #[arg(long)]
    pub audio_tokens: Option<u32>,
    /// Model whose rotary tables are shown, too.
    #[arg(long, value_name = "FILE", aliases = ["checkpoint", "model-path", "model"])]
    pub checkpoint_path: Option<PathBuf>,
    /// Compare with `video.positions` and `audio.positions` of this safetensors file, and with `video.rope_cos` and the like.
    #[arg(long, value_name = "FILE", alias = "ref")]
    pub compare: Option<PathBuf>,
}

/// `ltxc debug positions`. Returns whether they equal those of the file.
///
/// # Errors
/// A file that cannot be read.
pub fn run(args: &PositionsArgs, json_output: bool) -> Result<bool> {
    let &[f, h, w] = &args.grid[..] else { bail!("`--grid` takes frames, rows and columns") };
    if [f, h, w, args.frame_rate].iter().any(|n| !(1..=4096).contains(n)) {
        bail!("the grid and the frame rate must be 1 to 4096");
    }
    let settings = VideoSettings {
        height: h * 32,
        width: w * 32,
        frames: (f - 1) * 8 + 1,
        frame_rate: (args.frame_rate, 1),
        channels: 128,
        scale: [8, 32, 32],
        max_keyframes: 0,
    };
    let seconds = f64::from(settings.frames) / f64::from(args.frame_rate);
    let tokens = args.audio_tokens.unwrap_or(((seconds * 25.0).round_ties_even() as u32).max(1));
    let (video, audio) = (video_positions([f, h, w], &settings), audio_positions(tokens));
    let spans = |values: &[f32], step: usize| -> Vec<(f32, f32)> {
        values.chunks(2).step_by(step).take(4).map(|p| (p[0], p[1])).collect()
    };
    let video_spans = spans(&video[..(f * h * w) as usize * 2], (h * w) as usize);
    let audio_spans = spans(&audio, 1);
    let tables = match &args.checkpoint_path {
        Some(path) => tables(&Checkpoint::open(&local(path)?)?, &video, &audio)?,
        None => Tables::default(),
    };
    let mut ok = true;
    let mut compared = Vec::new();
    if let Some(path) = &args.compare {
        let file = TensorFile::open(path)?;
        for (name, found) in [("video.positions", &video), ("audio.positions", &audio)] {
            let known = named(&file, name);
            let Some((key, tensor)) = known else { continue };
            let expected = tensor.to_f32();
            let distance = Distance::of(found, &expected);
            // Positions that were rounded to bf16 on the way have no bits below the eighth.
            let is_bf16 =
                expected.iter().all(|v| v.to_bits() & 0xffff == 0) && found.iter().any(|v| v.to_bits() & 0xffff != 0);
            let equal = distance.max_abs <= 1e-6;
            ok &= equal;
            let why = match (equal, found.len() == expected.len(), is_bf16) {
                (true, ..) => "equal".to_string(),
                (_, false, _) => {
                    format!("{} values, ours are {}: another number of tokens", expected.len(), found.len())
                }
                (_, _, true) => "theirs were rounded to bf16".into(),
                _ => format!("largest difference {:.3e}", distance.max_abs),
            };
            compared.push((key.to_string(), why));
        }
        for (name, found) in &tables.values {
            let known = named(&file, name);
            let Some((key, tensor)) = known else { continue };
            let distance = Distance::of(found, &tensor.to_f32());
            let equal = distance.max_abs <= ROPE_LIMIT;
            ok &= equal;
            let layout = "another layout (split or interleaved), precision or set of positions";
            compared.push((
                key.to_string(),
                match equal {
                    true => "equal".into(),
                    false => format!("largest difference {:.3e}: {layout}", distance.max_abs),
                },
            ));
        }
        if compared.is_empty() {
            bail!("`{}` has no `video.positions` or `audio.positions`", path.display());
        }
    }
    if json_output {
        println!(
            "{}",
            json!({"video_seconds": video_spans, "audio_seconds": audio_spans, "audio_tokens": tokens, "rope": tables.about,
                "rope_sums": tables.values.iter().map(|(name, v)| json!({"table": name, "sum": sum_f32(v)})).collect::<Vec<_>>(),
                "compared": compared, "ok": ok})
        );
        return Ok(ok);
    }
    println!("video, seconds of the first latent frames: {video_spans:?}");
    println!("audio, seconds of the first of {tokens} tokens: {audio_spans:?}");
    tables.about.iter().for_each(|line| println!("{line}"));
    tables.values.iter().for_each(|(name, v)| println!("{name:<22} {} values, sum {:.6}", v.len(), sum_f32(v)));
    compared.iter().for_each(|(name, why)| println!("{name}: {why}"));
    Ok(ok)
}

/// The tensor `name` of a file, or `<words>.name` with the fewest words.
fn named<'f>(file: &'f TensorFile, name: &str) -> Option<(&'f str, &'f Tensor)> {
    let is_it = |key: &str| key == name || key.ends_with(&format!(".{name}"));
    file.iter().filter(|(key, _)| is_it(key)).min_by_key(|(key, _)| key.len())
}

/// Rotary tables of a model.
#[derive(Default)]
struct Tables {
    /// What they are made of, in lines.
    about: Vec<String>,
    /// By name, heads first: `(n, t, d/2)`.
    values: Vec<(String, Vec<f32>)>,
}

/// The tables of a model for these positions, by the reference evaluator.
fn tables(checkpoint: &Checkpoint, video: &[f32], audio: &[f32]) -> Result<Tables> {
    let config = TransformerConfig::from_json(checkpoint.section("transformer")?)?;
    let precision = if config.has_f64_frequencies { "f64" } else { "f32" };
    let mut tables = Tables::default();
    tables.about.push(format!(
        "rope {:?}, theta {}, frequencies computed in {precision}, angles in f32",
        config.rope_layout, config.rope_theta
    ));
    for (stream, positions) in Stream::BOTH.into_iter().zip([video, audio]) {
        let sizes = config.stream(stream);
        let axes = sizes.max_positions.len();
        let tokens = positions.len() / (2 * axes).max(1);
        tables.about.push(format!(
            "{} positions up to {:?}, {} heads of {}",
            stream.name(),
            sizes.max_positions,
            config.heads,
            sizes.head_dim
        ));
        let time = &positions[..2 * tokens];
        let cross = [config.cross_max_seconds()];
        for (name, width, limits, bounds) in [
            ("rope", sizes.width, &sizes.max_positions[..], positions),
            ("cross_rope", config.audio.width, &cross[..], time),
        ] {
            let b = Builder::new("table");
            let shape = [limits.len(), tokens, 2];
            let param = b.param("bounds", TensorType::f32(&shape[..]), Rate::Generation);
            let table = RopeTable {
                heads: config.heads,
                width,
                theta: config.rope_theta,
                max_positions: limits,
                has_f64_frequencies: config.has_f64_frequencies,
            };
            let Rotation { cos, sin } = rotation(&b, &table, param, DType::F32);
            b.result("cos", cos);
            b.result("sin", sin);
            let module = Functions::default().into_module(b.finish()?)?;
            let no_weights = |_: &str, _: &str, _: &TensorType| None;
            let results = Evaluator::new(&module, &no_weights).run("table", &[Tensor::f32(&shape, bounds)])?;
            for (part, result) in ["cos", "sin"].into_iter().zip(&results) {
                let values = heads_first(&result.to_f32(), &result.ty.shape);
                tables.values.push((format!("{}.{name}_{part}", stream.name()), values));
            }
        }
    }
    Ok(tables)
}
