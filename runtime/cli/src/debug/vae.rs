//! `ltxc debug vae`: what the video VAE does to known inputs, block by block.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_models::Weights;
use ltxc_models::video_vae::{self, VideoVaeConfig};
use ltxc_runtime::media::{load_image, resize_and_crop};
use ltxc_runtime::noise_files;
use ltxc_runtime::random::NormalStream;
use ltxc_runtime::stats::Stats;
use serde_json::{Value, json};

use super::modules::{Bench, Kept, Ran};
use super::recording::Distance;
use crate::args::{DeviceChoice, ModelArgs};
use crate::assemble::{MODEL, ModelFiles};
use crate::compile::unfused;
use crate::job::pick;

/// Standard deviation above which activations explode, and below which they collapse.
const EXPLODES: f64 = 100.0;
const COLLAPSES: f64 = 0.1;

/// `ltxc debug vae`.
#[derive(Debug, Subcommand)]
pub enum VaeCommand {
    /// Mean, deviation and range after every block of the decoder, with warnings.
    Trace(DecodeArgs),
    /// Brightness and contrast of what a known latent decodes to.
    Decode(DecodeArgs),
    /// An image through encoder and decoder: PSNR and SSIM.
    Roundtrip(RoundtripArgs),
    /// Whether per-channel statistics are there, and normalising and undoing it gives the latent back.
    Norm(NormArgs),
}

/// `ltxc debug vae trace` and `decode`.
#[derive(Debug, Args)]
pub struct DecodeArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Latent: zero, random, or a file (.safetensors, .npy, .npz, .pt) of shape (1, c, f, h, w).
    #[arg(long, default_value = "random")]
    pub latent: String,
    /// Frames, rows and columns of a latent that is not read from a file.
    #[arg(long, value_name = "F,H,W", value_delimiter = ',', default_value = "2,4,4")]
    pub grid: Vec<usize>,
    /// Timestep, for decoders that take one [default: the model's 0.05]
    #[arg(long)]
    pub timestep: Option<f32>,
    /// Device.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceChoice,
}

/// `ltxc debug vae roundtrip`.
#[derive(Debug, Args)]
pub struct RoundtripArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Image.
    pub image: PathBuf,
    /// Height to which it is resized, a multiple of 32.
    #[arg(long, short = 'H', default_value_t = 256)]
    pub height: usize,
    /// Width to which it is resized, a multiple of 32.
    #[arg(long, short = 'W', default_value_t = 256)]
    pub width: usize,
    /// PSNR in dB below which something is wrong; a VAE with trained weights reaches about 30.
    #[arg(long, default_value_t = 20.0)]
    pub least_psnr: f64,
    /// Device.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceChoice,
}

/// `ltxc debug vae norm`.
#[derive(Debug, Args)]
pub struct NormArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
}

/// Runs a command. Returns whether it found nothing wrong.
///
/// # Errors
/// Model files that cannot be read or run.
pub fn run(command: &VaeCommand, json: bool) -> Result<bool> {
    match command {
        VaeCommand::Trace(args) => trace(args, json),
        VaeCommand::Decode(args) => decode(args, json),
        VaeCommand::Roundtrip(args) => roundtrip(args, json),
        VaeCommand::Norm(args) => norm(args, json),
    }
}

/// Decodes the latent that was asked for.
fn decoded(args: &DecodeArgs) -> Result<Ran> {
    let files = ModelFiles::open(&args.model, false)?;
    let config = VideoVaeConfig::from_json(files.model.section("vae")?)?;
    let c = config.latent_channels;
    let &[f, h, w] = &args.grid[..] else { bail!("`--grid` takes frames, rows and columns") };
    if [f, h, w].iter().any(|n| !(1..=1024).contains(n)) {
        bail!("`--grid {f},{h},{w}` is out of range, expected 1 to 1024");
    }
    let latent = match args.latent.as_str() {
        "zero" => Tensor::f32(&[1, f, h, w, c], &vec![0.0; f * h * w * c]),
        "random" => Tensor::f32(&[1, f, h, w, c], &NormalStream::new(0, "latent").draw(f * h * w * c)),
        path => {
            let tensor = noise_files::pick(path.as_ref(), "")?;
            let &[1, channels, f, h, w] = &tensor.shape[..] else {
                bail!("`{path}` is {:?}, expected (1, {c}, f, h, w)", tensor.shape);
            };
            if channels != c {
                bail!("`{path}` has {channels} channels, the decoder takes {c}");
            }
            let places = f * h * w;
            let moved: Vec<f32> =
                (0..places).flat_map(|p| (0..c).map(move |k| k * places + p)).map(|i| tensor.values[i]).collect();
            Tensor::f32(&[1, f, h, w, c], &moved)
        }
    };
    let grid = [1, 2, 3].map(|axis| latent.ty.shape[axis]);
    let weights = Weights::new(MODEL, &files.model);
    let module = video_vae::decode(&config, &weights, grid, DType::F32)?;
    let device = pick(&args.device, None)?;
    let bench = Bench { sources: files.sources()?, paths: files.paths(), options: unfused(), device: &device };
    // Decoders with a timestep take noise too.
    let mut arguments = vec![latent];
    if let Some(function) = module.function("decode") {
        for param in function.params.iter().skip(1) {
            let (name, ty) = (function.name_of(param.value), function.ty(param.value));
            let values = match name {
                "timestep" => vec![args.timestep.unwrap_or(video_vae::DECODE_TIMESTEP)],
                name => NormalStream::new(0, name).draw(ty.elements()),
            };
            arguments.push(Tensor::f32(&ty.shape, &values));
        }
    }
    if arguments.len() == 1 && args.timestep.is_some() {
        bail!("this decoder takes no timestep; leave `--timestep` out");
    }
    bench.run(&module, "decode", &arguments)
}

/// The blocks of a decoder in order, with statistics.
fn blocks(ran: &Ran) -> Vec<(String, Stats)> {
    let of = |v: &Kept| {
        let name = v.name.strip_prefix("vae.decoder.")?;
        let is_block = name.strip_prefix("up_blocks.").is_some_and(|rest| !rest.contains('.'));
        (is_block || name == "conv_in" || name == "conv_out")
            .then(|| (name.to_string(), Stats::of(&v.ty.shape, &v.values)))
    };
    let mut blocks: Vec<(String, Stats)> = ran.values.iter().filter_map(of).collect();
    if let Some(frames) = ran.results.get("frames") {
        blocks.push(("frames".into(), Stats::of(&frames.ty.shape, &frames.values)));
    }
    blocks
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

fn trace(args: &DecodeArgs, json_output: bool) -> Result<bool> {
    let blocks = blocks(&decoded(args)?);
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

fn decode(args: &DecodeArgs, json_output: bool) -> Result<bool> {
    let ran = decoded(args)?;
    let frames = ran.result("frames")?;
    let bytes: Vec<f32> = frames.values.iter().map(|v| ((v + 1.0) * 0.5).clamp(0.0, 1.0) * 255.0).collect();
    let s = Stats::of(&frames.ty.shape, &bytes);
    let ok = !s.is_bad();
    let brightness = s.mean / 255.0;
    if json_output {
        println!("{}", json!({"shape": frames.ty.shape, "brightness": brightness, "std": s.std, "ok": ok}));
    } else {
        println!(
            "latent {} gives {} frames: brightness {:.1} %, std {:.2}",
            args.latent,
            frames.ty.shape[1],
            brightness * 100.0,
            s.std
        );
    }
    Ok(ok)
}

fn roundtrip(args: &RoundtripArgs, json_output: bool) -> Result<bool> {
    let files = ModelFiles::open(&args.model, false)?;
    let config = VideoVaeConfig::from_json(files.model.section("vae")?)?;
    let pixels = resize_and_crop(&load_image(&args.image)?, args.width, args.height)?;
    let weights = Weights::new(MODEL, &files.model);
    let device = pick(&args.device, None)?;
    let bench = Bench { sources: files.sources()?, paths: files.paths(), options: unfused(), device: &device };
    let image = Tensor::f32(&[1, 1, args.height, args.width, 3], &pixels);
    let module = video_vae::encode(&config, &weights, [1, args.height, args.width], DType::F32)?;
    let encoded = bench.run(&module, "encode", &[image])?;
    let latent = encoded.result("latent")?;
    let [_, h, w] = [0, 2, 3].map(|axis| latent.ty.shape[axis]);
    let module = video_vae::decode(&config, &weights, [1, h, w], DType::F32)?;
    if module.function("decode").is_some_and(|f| f.params.len() > 1) {
        bail!("this decoder adds noise; its round trip says nothing");
    }
    let decoded = bench.run(&module, "decode", &[Tensor::f32(&latent.ty.shape, &latent.values)])?;
    let frames = &decoded.result("frames")?.values;
    let s = Stats::of(&latent.ty.shape, &latent.values);
    let (psnr, ssim) = (psnr(&pixels, frames), ssim(&pixels, frames, args.width));
    let ok = psnr >= args.least_psnr;
    if json_output {
        println!("{}", json!({"psnr_db": psnr, "ssim": ssim, "latent_mean": s.mean, "latent_std": s.std, "ok": ok}));
    } else {
        println!("latent mean {:.4} std {:.4}; PSNR {psnr:.2} dB, SSIM {ssim:.4}", s.mean, s.std);
        if !ok {
            println!("RED FLAG: PSNR below {} dB", args.least_psnr);
        }
    }
    Ok(ok)
}

/// PSNR of pixels in `[-1, 1]`, in dB.
fn psnr(a: &[f32], b: &[f32]) -> f64 {
    let mse = Distance::of(a, &b.iter().map(|v| v.clamp(-1.0, 1.0)).collect::<Vec<_>>()).mse;
    10.0 * (4.0 / mse.max(1e-12)).log10()
}

/// Structural similarity of pixels `[h, w, 3]` in `[-1, 1]`, mean over blocks of 8×8 and channels.
fn ssim(a: &[f32], b: &[f32], width: usize) -> f64 {
    const SIDE: usize = 8;
    // (0.01 L)² and (0.03 L)² of the definition, with L = 2.
    const C1: f64 = 0.0004;
    const C2: f64 = 0.0036;
    let height = a.len() / (3 * width).max(1);
    let (mut sum, mut count) = (0.0, 0usize);
    for y in (0..height.saturating_sub(SIDE - 1)).step_by(SIDE) {
        for x in (0..width.saturating_sub(SIDE - 1)).step_by(SIDE) {
            for c in 0..3 {
                let block = |v: &[f32]| -> Vec<f64> {
                    let at = (0..SIDE).flat_map(|j| (0..SIDE).map(move |i| ((y + j) * width + x + i) * 3 + c));
                    at.map(|i| f64::from(v[i].clamp(-1.0, 1.0))).collect()
                };
                let (p, q) = (block(a), block(b));
                let n = p.len() as f64;
                let (mp, mq) = (p.iter().sum::<f64>() / n, q.iter().sum::<f64>() / n);
                let cov = |r: &[f64], s: &[f64], mr: f64, ms: f64| {
                    r.iter().zip(s).map(|(u, v)| (u - mr) * (v - ms)).sum::<f64>() / (n - 1.0)
                };
                let (vp, vq, vpq) = (cov(&p, &p, mp, mp), cov(&q, &q, mq, mq), cov(&p, &q, mp, mq));
                sum += (2.0 * mp * mq + C1) * (2.0 * vpq + C2) / ((mp * mp + mq * mq + C1) * (vp + vq + C2));
                count += 1;
            }
        }
    }
    sum / count.max(1) as f64
}

fn norm(args: &NormArgs, json_output: bool) -> Result<bool> {
    let files = ModelFiles::open(&args.model, false)?;
    let find = |name: &str| -> Result<Vec<f32>> {
        let end = format!("per_channel_statistics.{name}");
        let key =
            files.model.tensors().map(|(k, _)| k.to_string()).find(|k| k.starts_with("vae.") && k.ends_with(&end));
        let Some(key) = key else { bail!("`{}` has no `vae.{end}`: latents cannot be normalised", files.model.name()) };
        let at = files.model.tensor(&key).and_then(|at| at.stored.ty());
        let (Some(ty), Some(bytes)) = (at, files.model.data(&key)) else { bail!("`{key}` cannot be read") };
        Ok(ltxc_runtime::stats::decoded(&ty, bytes))
    };
    let (mean, std) = (find("mean-of-means")?, find("std-of-means")?);
    let latent = NormalStream::new(0, "latent").draw(mean.len() * 64);
    let there: Vec<f32> =
        latent.iter().enumerate().map(|(i, v)| (v - mean[i % mean.len()]) / std[i % std.len()]).collect();
    let back: Vec<f32> = there.iter().enumerate().map(|(i, v)| v * std[i % std.len()] + mean[i % mean.len()]).collect();
    let error = Distance::of(&back, &latent);
    let (m, s) = (Stats::of(&[mean.len()], &mean), Stats::of(&[std.len()], &std));
    let ok = error.relative_l2 < 1e-5 && s.min > 0.0 && !m.is_bad() && !s.is_bad() && mean.len() == std.len();
    if json_output {
        let facts: Value = json!({"channels": mean.len(), "mean": [m.min, m.max], "std": [s.min, s.max], "identity": error.relative_l2, "ok": ok});
        println!("{facts}");
    } else {
        println!(
            "{} channels, means {:.4} to {:.4}, deviations {:.4} to {:.4}",
            mean.len(),
            m.min,
            m.max,
            s.min,
            s.max
        );
        println!("normalised and undone: relative L2 {:.2e} ({})", error.relative_l2, if ok { "ok" } else { "BAD" });
    }
    Ok(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_pictures_are_equal_and_noise_is_not() {
        let a: Vec<f32> = (0..16 * 16 * 3).map(|i| ((i as f32) * 0.01).sin()).collect();
        let noisy: Vec<f32> = a.iter().zip(NormalStream::new(1, "x").draw(a.len())).map(|(v, n)| v + 0.5 * n).collect();
        assert!(psnr(&a, &a) > 100.0 && psnr(&a, &noisy) < 20.0);
        assert!((ssim(&a, &a, 16) - 1.0).abs() < 1e-9 && ssim(&a, &noisy, 16) < 0.8);
    }

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
