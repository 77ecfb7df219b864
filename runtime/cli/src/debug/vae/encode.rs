//! Pictures through the encoder, and back.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use ltxc_ir::eval::Tensor;
use ltxc_ir::{DType, TensorType};
use ltxc_models::video_vae;
use ltxc_runtime::media::{Clip, ClipRate, Rational, Window, load_image, resize_and_crop};
use ltxc_runtime::stats::Stats;
use serde_json::json;

use super::reference::{ReferenceArgs, facts};
use super::{Model, by_channel, channels_last, chosen};
use crate::debug::modules::{Kept, Ran, Side};
use crate::debug::parity::channels_first;
use crate::debug::recording::Distance;

/// Mean and deviation that normalised latents of pictures stay within.
const MOST_MEAN: f64 = 0.5;
const STD: std::ops::RangeInclusive<f64> = 0.5..=2.0;

/// `ltxc debug vae encode`.
#[derive(Debug, Args)]
pub struct EncodeArgs {
    /// Image, clip, or file of tensors with pixels (1, 3, f, h, w) in [-1, 1] or 0 to 255.
    pub input: PathBuf,
    /// Tensor of that file, if it has several.
    #[arg(long, value_name = "NAME")]
    pub tensor: Option<String>,
    /// Height to which images and clips are resized, a multiple of 32.
    #[arg(long, short = 'H', default_value_t = 256)]
    pub height: usize,
    /// Width to which they are resized, a multiple of 32.
    #[arg(long, short = 'W', default_value_t = 256)]
    pub width: usize,
    /// Frames of a clip, 8k+1.
    #[arg(long, default_value_t = 1)]
    pub num_frames: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub reference: ReferenceArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// `ltxc debug vae roundtrip`.
#[derive(Debug, Args)]
pub struct RoundtripArgs {
    /// Image or clip.
    pub image: PathBuf,
    /// Height to which it is resized, a multiple of 32.
    #[arg(long, short = 'H', default_value_t = 256)]
    pub height: usize,
    /// Width to which it is resized, a multiple of 32.
    #[arg(long, short = 'W', default_value_t = 256)]
    pub width: usize,
    /// Frames of a clip, 8k+1.
    #[arg(long, default_value_t = 1)]
    pub num_frames: usize,
    /// PSNR in dB below which something is wrong; a VAE with trained weights reaches about 30.
    #[arg(long, default_value_t = 20.0)]
    pub least_psnr: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// Pixels `[1, f, h, w, 3]` in `[-1, 1]`.
fn pixels(path: &Path, tensor: Option<&str>, size: [usize; 3]) -> Result<Tensor> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    if ["safetensors", "npy", "npz", "pt", "pth"].contains(&extension.as_str()) {
        let tensor = chosen(path, tensor, 5)?;
        let &[1, 3, f, h, w] = &tensor.shape[..] else {
            bail!("`{}` of `{}` is {:?}, expected (1, 3, f, h, w)", tensor.name, path.display(), tensor.shape)
        };
        let is_bytes = tensor.values.iter().any(|v| v.abs() > 2.0);
        let values: Vec<f32> =
            channels_last(&tensor.values, 3).into_iter().map(|v| if is_bytes { v / 127.5 - 1.0 } else { v }).collect();
        return Ok(Tensor::f32(&[1, f, h, w, 3], &values));
    }
    let [frames, height, width] = size;
    let is_image =
        frames == 1 && ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"].contains(&extension.as_str());
    let values = match is_image {
        true => resize_and_crop(&load_image(path)?, width, height)?,
        false => {
            let clip = Clip::open(path)?;
            let rate = match clip.info().rate {
                ClipRate::Constant(rate) => rate,
                ClipRate::Variable(mean) => Rational::from_fps(mean)?,
                ClipRate::Free => Rational::new(24, 1)?,
            };
            clip.load(Window { rate, start_seconds: 0.0, frames }, width, height)?
        }
    };
    Ok(Tensor::f32(&[1, frames, height, width, 3], &values))
}

fn encoded(model: &Model<'_>, video: &Tensor) -> Result<Ran> {
    let size = [1, 2, 3].map(|axis| video.ty.shape[axis]);
    let module = video_vae::encode(&model.video_vae()?, &model.weights(), size, DType::F32)?;
    model.bench()?.run_keeping("vae", &module, "encode", std::slice::from_ref(video), &|_| false)
}

pub(super) fn encode(args: &EncodeArgs, model: &Model<'_>, json_output: bool) -> Result<bool> {
    let video = pixels(&args.input, args.tensor.as_deref(), [args.num_frames, args.height, args.width])?;
    let ran = encoded(model, &video)?;
    let latent = ran.result("latent")?;
    let c = latent.ty.shape.last().copied().unwrap_or(1);
    let s = Stats::of(&latent.ty.shape, &latent.values);
    let channels: Vec<Stats> = by_channel(&latent.values, c).iter().map(|v| Stats::of(&[v.len()], v)).collect();
    let mut flags = Vec::new();
    if s.is_bad() {
        flags.push(format!("{} NaN and {} infinite values", s.nan, s.infinite));
    }
    // Of random weights nothing is to be expected.
    if !model.checkpoint.is_synthetic() && args.reference.compare.is_none() {
        if s.mean.abs() > MOST_MEAN {
            flags.push(format!("mean {:.3}, expected about 0: is the latent normalised?", s.mean));
        }
        if !STD.contains(&s.std) {
            flags.push(format!("standard deviation {:.3}, expected about 1: is the latent normalised?", s.std));
        }
    }
    let names = ["latent", "enc.latent", "latents", "sample"];
    let verdict = args.reference.check(&names, &channels_first(&latent.values, c))?;
    let ok = flags.is_empty() && verdict.as_ref().is_none_or(|v| v.ok);
    if json_output {
        println!(
            "{}",
            json!({"shape": latent.ty.shape, "mean": s.mean, "std": s.std,
                "channel_mean": channels.iter().map(|s| s.mean).collect::<Vec<_>>(),
                "channel_std": channels.iter().map(|s| s.std).collect::<Vec<_>>(),
                "compared": facts(verdict.as_ref()), "flags": flags, "ok": ok})
        );
        return Ok(ok);
    }
    println!("latent {} mean {:.4} std {:.4} [{:.3}, {:.3}]", s.shape_text(), s.mean, s.std, s.min, s.max);
    for (i, s) in channels.iter().enumerate() {
        println!("channel {i:>4} mean {:>9.4} std {:>9.4}", s.mean, s.std);
    }
    if let Some(verdict) = verdict {
        println!("{}", verdict.text());
    }
    flags.iter().for_each(|flag| println!("RED FLAG: {flag}"));
    Ok(ok)
}

pub(super) fn roundtrip(args: &RoundtripArgs, model: &Model<'_>, json_output: bool) -> Result<bool> {
    let video = pixels(&args.image, None, [args.num_frames, args.height, args.width])?;
    let ran = encoded(model, &video)?;
    let latent = ran.result("latent")?;
    let frames = back(model, latent)?;
    let s = Stats::of(&latent.ty.shape, &latent.values);
    let before = video.to_f32();
    let (psnr, ssim) = (psnr(&before, &frames), ssim(&before, &frames, video.ty.shape[3]));
    let ok = psnr >= args.least_psnr;
    if json_output {
        println!("{}", json!({"psnr_db": psnr, "ssim": ssim, "latent_mean": s.mean, "latent_std": s.std, "ok": ok}));
        return Ok(ok);
    }
    println!("latent mean {:.4} std {:.4}; PSNR {psnr:.2} dB, SSIM {ssim:.4}", s.mean, s.std);
    if !ok {
        println!("RED FLAG: PSNR below {} dB", args.least_psnr);
    }
    Ok(ok)
}

/// Frames of a latent.
fn back(model: &Model<'_>, latent: &Kept) -> Result<Vec<f32>> {
    let mut noise = |_: &str, _: &TensorType| bail!("this decoder adds noise; its round trip says nothing");
    let latent = Tensor::f32(&latent.ty.shape, &latent.values);
    let decoded = model.decode(&model.video_vae()?, &latent, &mut noise, &|_| false)?;
    Ok(decoded.result("frames")?.values.clone())
}

/// PSNR of pixels in `[-1, 1]`, in dB.
pub(super) fn psnr(a: &[f32], b: &[f32]) -> f64 {
    let mse = Distance::of(a, &b.iter().map(|v| v.clamp(-1.0, 1.0)).collect::<Vec<_>>()).mse;
    10.0 * (4.0 / mse.max(1e-12)).log10()
}

/// Structural similarity of pixels `[.., h, w, 3]` in `[-1, 1]`, mean over blocks of 8×8 and channels.
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

#[cfg(test)]
mod tests {
    use ltxc_runtime::random::NormalStream;

    use super::*;

    #[test]
    fn equal_pictures_are_equal_and_noise_is_not() {
        let a: Vec<f32> = (0..16 * 16 * 3).map(|i| ((i as f32) * 0.01).sin()).collect();
        let noisy: Vec<f32> = a.iter().zip(NormalStream::new(1, "x").draw(a.len())).map(|(v, n)| v + 0.5 * n).collect();
        assert!(psnr(&a, &a) > 100.0 && psnr(&a, &noisy) < 20.0);
        assert!((ssim(&a, &a, 16) - 1.0).abs() < 1e-9 && ssim(&a, &noisy, 16) < 0.8);
    }
}
