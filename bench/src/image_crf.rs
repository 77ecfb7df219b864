//! The embedded H.264 encoder against libx264: at which QP it distorts as libx264 does at a `crf`.
//!
//! Conditioning images go through one picture of video before the model sees them, and written videos have a `crf`; both
//! have to come out alike with either encoder. The other side is `ffmpeg`, which must be there. Pictures are synthetic, so
//! that everybody measures the same; further ones can be named.
//!
//! # Easy to get wrong
//! - What the conversion to 4:2:0 loses is the same for both, so that quality is measured against the converted picture.
//! - OpenH264 has no QP below 12; an equal QP of 12.0 means that or less.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ltxc_runtime::media::Colour;
use ltxc_runtime::media::ffmpeg::Ffmpeg;
use ltxc_runtime::media::h264::video_qp;
use ltxc_runtime::media::round_trip::{compress_at_qp, image_qp, mean_activity, to_i420_bt601};
use ltxc_runtime::media::{I420, MediaWriter, OutputOptions, Rational, RgbImage, VideoFormat, load_image};

use crate::block::Findings;
use crate::report::{Row, Table};

/// Rate factors of conditioning images; 33 is the pipelines' default.
const IMAGE_CRFS: [u8; 3] = [18, 25, 33];

/// Smallest and largest QP that OpenH264 takes.
const QPS: std::ops::RangeInclusive<u8> = 12..=51;

/// Rate factors of videos, with libx264 at the one in the middle.
const VIDEO_CRFS: [u8; 6] = [13, 15, 17, 19, 21, 23];

/// Width, height and frames of the clips.
const CLIP: (usize, usize, usize) = (768, 512, 97);

/// Measures. `folder` takes the clips, `images` are measured beside the synthetic ones.
///
/// # Errors
/// No `ffmpeg` with libx264; an image that cannot be read.
pub fn run(images: &[PathBuf], folder: &Path) -> Result<Findings> {
    let ffmpeg =
        Ffmpeg::find().context("no `ffmpeg` with libx264 was found, which is the other side of this benchmark")?;
    let mut pictures = synthetic_images()?;
    for path in images {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        pictures.push((name, load_image(path)?.crop_to_even()));
    }
    let (rows, table) = compare_images(&ffmpeg, &pictures)?;
    Ok(Findings { rows, tables: vec![table, compare_clips(folder)?], notes: Vec::new() })
}

/// Quality and size of one picture at one `crf`, from both encoders.
struct Pair {
    crf: u8,
    /// Of ours less that of libx264.
    decibels: f64,
    /// Of ours over that of libx264.
    bytes: f64,
}

fn compare_images(ffmpeg: &Ffmpeg, pictures: &[(String, RgbImage)]) -> Result<(Vec<Row>, Table)> {
    let (mut pairs, mut cells) = (Vec::new(), Vec::new());
    for (name, source) in pictures {
        let picture = to_i420_bt601(source)?;
        let converted = Colour::UNSPECIFIED.to_rgb(&picture)?;
        let by_qp = QPS.map(|qp| Ok(compress_at_qp(source, qp)?)).collect::<Result<Vec<_>>>()?;
        let quality: Vec<f64> = by_qp.iter().map(|(image, _)| psnr(converted.rgb(), image.rgb())).collect();
        for crf in IMAGE_CRFS {
            let (want, bytes) = ffmpeg.image_round_trip(source, crf)?;
            let target = psnr(converted.rgb(), want.rgb());
            let qp = image_qp(&picture, crf);
            let at = usize::from(qp - QPS.start());
            let (got, got_bytes) = &by_qp[at];
            pairs.push(Pair { crf, decibels: quality[at] - target, bytes: *got_bytes as f64 / bytes as f64 });
            cells.push(vec![
                name.clone(),
                format!("{}x{}", source.width(), source.height()),
                format!("{:.3}", mean_activity(&picture)),
                crf.to_string(),
                format!("{target:.2}"),
                bytes.to_string(),
                format!("{:.1}", equal_qp(&quality, target)),
                qp.to_string(),
                format!("{:.2}", quality[at]),
                got_bytes.to_string(),
                format!("{:.2}", psnr(got.rgb(), want.rgb())),
            ]);
        }
    }
    let columns = vec![
        "image",
        "size",
        "activity",
        "crf",
        "x264 dB",
        "x264 bytes",
        "equal QP",
        "chosen QP",
        "dB",
        "bytes",
        "between dB",
    ];
    Ok((summary(&pairs), Table { title: "Images".into(), columns, rows: cells }))
}

fn summary(pairs: &[Pair]) -> Vec<Row> {
    let of = |crf: u8| {
        let own = || pairs.iter().filter(move |p| p.crf == crf);
        let mean = |f: &dyn Fn(&Pair) -> f64| own().map(f).sum::<f64>() / own().count().max(1) as f64;
        [
            Row::value(format!("quality above x264, crf {crf}, mean"), "dB", mean(&|p| p.decibels)),
            Row::value(format!("its root mean square, crf {crf}"), "dB", mean(&|p| p.decibels.powi(2)).sqrt()),
            Row::value(format!("bytes over x264, crf {crf}, geometric mean"), "", mean(&|p| p.bytes.ln()).exp()),
        ]
    };
    IMAGE_CRFS.into_iter().flat_map(of).collect()
}

/// The QP at which the quality falls to `target`, interpolated; `quality`: one value per QP.
fn equal_qp(quality: &[f64], target: f64) -> f64 {
    let first = f64::from(*QPS.start());
    match quality.iter().position(|q| *q < target) {
        Some(0) => first,
        Some(i) => first - 1.0 + i as f64 + (quality[i - 1] - target) / (quality[i - 1] - quality[i]).max(1e-9),
        None => f64::from(*QPS.end()),
    }
}

/// Peak signal-to-noise ratio of 8-bit values in dB.
fn psnr(a: &[u8], b: &[u8]) -> f64 {
    let error: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
    10.0 * (255.0 * 255.0 * a.len() as f64 / error.max(1e-9)).log10()
}

fn compare_clips(folder: &Path) -> Result<Table> {
    let format = VideoFormat::new(CLIP.0, CLIP.1, Rational::new(24, 1).context("a rate")?)?;
    let (raw, path) = (folder.join("clip.raw"), folder.join("clip.mp4"));
    let mut cells = Vec::new();
    for (name, grain_levels) in [("moving scene", 0.0), ("moving scene, grain 3", 3.7)] {
        let frames: Vec<Vec<f32>> = (0..CLIP.2).map(|index| clip_frame(index, grain_levels)).collect();
        let mut planes = Vec::new();
        for rgb in &frames {
            let mut picture = I420::new(CLIP.0, CLIP.1)?;
            picture.fill_bt709(rgb)?;
            planes.push(picture);
        }
        let mut row = |encoder: String, seconds: Option<f64>| -> Result<()> {
            let (quality, bytes) = clip_quality(&path, &planes)?;
            let milliseconds = seconds.map_or(String::new(), |s| format!("{:.1}", s * 1000.0 / CLIP.2 as f64));
            cells.push(vec![name.into(), encoder, format!("{quality:.2}"), bytes.to_string(), milliseconds]);
            Ok(())
        };
        std::fs::write(&raw, planes.iter().flat_map(|picture| picture.data()).copied().collect::<Vec<u8>>())?;
        encode_with_x264(&raw, &path)?;
        row("libx264 veryfast crf 19".into(), None)?;
        for crf in VIDEO_CRFS {
            let start = Instant::now();
            let mut writer =
                MediaWriter::create(&path, Some(format), OutputOptions { crf, ..OutputOptions::default() })?;
            frames.iter().try_for_each(|frame| writer.write_frames(frame))?;
            writer.finish()?;
            row(format!("OpenH264 QP {}", video_qp(crf)), Some(start.elapsed().as_secs_f64()))?;
        }
    }
    let columns = vec!["clip", "encoder", "luma dB", "bytes", "ms per frame"];
    Ok(Table { title: "Clips".into(), columns, rows: cells })
}

fn encode_with_x264(raw: &Path, path: &Path) -> Result<()> {
    let size = format!("{}x{}", CLIP.0, CLIP.1);
    let status = Command::new("ffmpeg")
        .args(["-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", &size, "-r", "24", "-i"])
        .arg(raw)
        .args(["-c:v", "libx264", "-preset", "veryfast", "-crf", "19"])
        .arg(path)
        .status()?;
    ensure!(status.success(), "ffmpeg could not encode `{}`: {status}", raw.display());
    Ok(())
}

/// Mean PSNR of luma over the frames of an encoded clip, and the size of the file.
fn clip_quality(path: &Path, source: &[I420]) -> Result<(f64, u64)> {
    let output = Command::new("ffmpeg")
        .args(["-v", "error", "-i"])
        .arg(path)
        .args(["-map", "0:v", "-pix_fmt", "yuv420p", "-f", "rawvideo", "-"])
        .output()?;
    let luma = CLIP.0 * CLIP.1;
    let frames = output.stdout.chunks_exact(luma * 3 / 2);
    ensure!(frames.len() == source.len(), "`{}` has {} frames of {}", path.display(), frames.len(), source.len());
    let quality: f64 = frames.zip(source).map(|(got, want)| psnr(&got[..luma], want.planes().0)).sum();
    Ok((quality / source.len() as f64, std::fs::metadata(path)?.len()))
}

/// A frame of a moving scene, with grain of the given strength that changes from frame to frame.
fn clip_frame(index: usize, grain_levels: f64) -> Vec<f32> {
    let (width, height, _) = CLIP;
    let t = index as f64;
    let pixel = |i: usize| {
        let (x, y, c) = ((i / 3 % width) as f64, (i / 3 / width) as f64, (i % 3) as u64);
        let noise = grain_levels * grain(x + 1000.0 * t, y, c);
        ((scene(x + 1.5 * t, y + 6.0 * (t / 9.0).sin(), c) + noise) / 255.0).clamp(0.0, 1.0) as f32
    };
    (0..width * height * 3).map(pixel).collect()
}

fn synthetic_images() -> Result<Vec<(String, RgbImage)>> {
    let checks = |x: f64, y: f64, c: u64| if ((x + y) / 24.0) as i64 % 2 == c as i64 % 2 { 230.0 } else { 25.0 };
    let images = [
        ("gradient", image(768, 512, |x, y, c| x / 4.0 + y / 8.0 + 20.0 * c as f64)?),
        ("scene", image(768, 512, scene)?),
        ("scene, grain 6", image(768, 512, |x, y, c| scene(x, y, c) + 7.3 * grain(x, y, c))?),
        ("scene, half size", image(384, 256, |x, y, c| scene(2.0 * x, 2.0 * y, c))?),
        ("soft texture", image(768, 512, |x, y, c| 128.0 + 70.0 * texture(x, y, 0.5, 20 + c))?),
        ("rough texture", image(768, 512, |x, y, c| 128.0 + 50.0 * texture(x, y, 0.8, 20 + c))?),
        ("grey noise 12", image(384, 256, |x, y, _| 128.0 + 14.7 * grain(x, y, 0))?),
        ("colour noise 30", image(384, 256, |x, y, c| 128.0 + 36.7 * grain(x, y, c))?),
        ("checks", image(384, 256, checks)?),
    ];
    Ok(images.into_iter().map(|(name, image)| (name.to_string(), image)).collect())
}

fn image(width: usize, height: usize, pixel: impl Fn(f64, f64, u64) -> f64) -> Result<RgbImage> {
    let value = |i: usize| {
        let (x, y, c) = (i / 3 % width, i / 3 / width, i % 3);
        pixel(x as f64, y as f64, c as u64).round().clamp(0.0, 255.0) as u8
    };
    Ok(RgbImage::new(width, height, (0..width * height * 3).map(value).collect())?)
}

/// Waves, hills with a horizon, and hard edges.
fn scene(x: f64, y: f64, c: u64) -> f64 {
    let horizon = 200.0 + 60.0 * texture(x, 0.0, 0.5, 3);
    let tone = |dark: f64, light: f64, t: f64| dark + (light - dark) * t;
    if ((x - 500.0).powi(2) + (y - 260.0).powi(2)).sqrt() < 90.0 {
        return [210.0, 60.0, 50.0][c as usize] * (1.0 - 0.004 * (y - 170.0));
    }
    if y < horizon {
        tone([90.0, 140.0, 220.0][c as usize], 235.0, y / 300.0) + 10.0 * texture(x, 2.0 * y, 0.5, 7)
    } else {
        let light = 0.5 + 0.25 * texture(x, 3.0 * y, 0.7, 11);
        tone([20.0, 40.0, 15.0][c as usize], [170.0, 190.0, 110.0][c as usize], light)
    }
}

/// Octaves of smooth noise whose strength falls with `decay` for each halving of the size.
fn texture(x: f64, y: f64, decay: f64, seed: u64) -> f64 {
    (0..8)
        .map(|octave| {
            let scale = f64::from(1 << octave) / 128.0;
            decay.powi(octave) * smooth(x * scale, y * scale, seed + octave as u64)
        })
        .sum()
}

/// Smooth noise with one value per unit of length.
fn smooth(x: f64, y: f64, seed: u64) -> f64 {
    let (i, j) = (x.floor(), y.floor());
    let ease = |t: f64| t * t * (3.0 - 2.0 * t);
    let (u, v) = (ease(x - i), ease(y - j));
    let at = |di: i64, dj: i64| hash(i as i64 + di, j as i64 + dj, seed);
    (at(0, 0) * (1.0 - u) + at(1, 0) * u) * (1.0 - v) + (at(0, 1) * (1.0 - u) + at(1, 1) * u) * v
}

fn grain(x: f64, y: f64, c: u64) -> f64 {
    hash(x as i64, y as i64, c) + hash(x as i64, y as i64, c + 10)
}

/// Independent uniform numbers in `[-1, 1]` from a position.
fn hash(x: i64, y: i64, seed: u64) -> f64 {
    let mut h = (x as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (y as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f) ^ seed;
    for _ in 0..2 {
        h = (h ^ (h >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    (h >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_quality_is_found_between_two_qps() {
        let quality = [50.0, 48.0, 44.0];
        assert_eq!(equal_qp(&quality, 46.0), 13.5);
        assert_eq!(equal_qp(&quality, 51.0), 12.0);
        assert_eq!(equal_qp(&quality, 40.0), 51.0);
    }

    #[test]
    fn synthetic_images_have_structure() {
        for (name, image) in synthetic_images().unwrap() {
            let (least, most) = (image.rgb().iter().min().unwrap(), image.rgb().iter().max().unwrap());
            assert!(most - least > 40, "{name}: {least}..={most}");
        }
    }
}
