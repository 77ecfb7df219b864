//! Measures which QP of the embedded encoder distorts a picture as libx264 does at a `crf`.
//!
//! Run with `cargo test --release -p ltxc-runtime --test media_crf -- --ignored --nocapture`; needs `ffmpeg`. Prints the
//! table of `bench/results/image-crf-calibration.md`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use ltxc_runtime::media::ffmpeg::Ffmpeg;
use ltxc_runtime::media::h264::video_qp;
use ltxc_runtime::media::round_trip::{compress_at_qp, from_i420_bt601, image_qp, mean_activity, to_i420_bt601};
use ltxc_runtime::media::{I420, MediaWriter, OutputOptions, Rational, RgbImage, VideoFormat, load_image};

/// Independent uniform numbers in `[-1, 1]` from a position.
fn hash(x: i64, y: i64, seed: u64) -> f64 {
    let mut h = (x as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (y as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f) ^ seed;
    for _ in 0..2 {
        h = (h ^ (h >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    (h >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
}

/// Smooth noise with one value per unit of length.
fn smooth(x: f64, y: f64, seed: u64) -> f64 {
    let (i, j) = (x.floor(), y.floor());
    let ease = |t: f64| t * t * (3.0 - 2.0 * t);
    let (u, v) = (ease(x - i), ease(y - j));
    let at = |di: i64, dj: i64| hash(i as i64 + di, j as i64 + dj, seed);
    (at(0, 0) * (1.0 - u) + at(1, 0) * u) * (1.0 - v) + (at(0, 1) * (1.0 - u) + at(1, 1) * u) * v
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

fn image(width: usize, height: usize, pixel: impl Fn(f64, f64, u64) -> f64) -> RgbImage {
    let value = |i: usize| {
        let (x, y, c) = (i / 3 % width, i / 3 / width, i % 3);
        pixel(x as f64, y as f64, c as u64).round().clamp(0.0, 255.0) as u8
    };
    RgbImage::new(width, height, (0..width * height * 3).map(value).collect()).expect("an image")
}

fn grain(x: f64, y: f64, c: u64) -> f64 {
    hash(x as i64, y as i64, c) + hash(x as i64, y as i64, c + 10)
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

fn images() -> Vec<(String, RgbImage)> {
    let mut images = vec![
        ("gradient".to_owned(), image(768, 512, |x, y, c| x / 4.0 + y / 8.0 + 20.0 * c as f64)),
        ("scene".to_owned(), image(768, 512, scene)),
        ("scene, grain 6".to_owned(), image(768, 512, |x, y, c| scene(x, y, c) + 7.3 * grain(x, y, c))),
        ("scene, half size".to_owned(), image(384, 256, |x, y, c| scene(2.0 * x, 2.0 * y, c))),
        ("soft texture".to_owned(), image(768, 512, |x, y, c| 128.0 + 70.0 * texture(x, y, 0.5, 20 + c))),
        ("rough texture".to_owned(), image(768, 512, |x, y, c| 128.0 + 50.0 * texture(x, y, 0.8, 20 + c))),
        ("grey noise 12".to_owned(), image(384, 256, |x, y, _| 128.0 + 14.7 * grain(x, y, 0))),
        ("colour noise 30".to_owned(), image(384, 256, |x, y, c| 128.0 + 36.7 * grain(x, y, c))),
        (
            "checks".to_owned(),
            image(384, 256, |x, y, c| if ((x + y) / 24.0) as i64 % 2 == c as i64 % 2 { 230.0 } else { 25.0 }),
        ),
    ];
    if let Some(folder) = std::env::var_os("LTXC_FIXTURES").map(PathBuf::from) {
        for name in ["image0", "image1", "image2"] {
            let path = folder.join(format!("inputs/{name}.png"));
            images.push((format!("{name}.png"), load_image(&path).expect("loaded").crop_to_even()));
        }
    }
    images
}

fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let error: f64 = a.rgb().iter().zip(b.rgb()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
    10.0 * (255.0 * 255.0 * a.rgb().len() as f64 / error.max(1e-9)).log10()
}

#[test]
#[ignore = "a measurement, needs ffmpeg"]
fn calibrate() {
    let Some(ffmpeg) = Ffmpeg::find() else {
        println!("absent: ffmpeg");
        return;
    };
    println!("| image | size | crf | x264 dB | x264 bytes | equal QP | chosen QP | dB | bytes | between dB |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for (name, source) in images() {
        let picture = to_i420_bt601(&source).expect("even");
        // What the conversion to 4:2:0 loses is the same for both codecs.
        let converted = from_i420_bt601(&picture).expect("even");
        let by_qp: Vec<_> = (12..=51).map(|qp| compress_at_qp(&source, qp).expect("compressed")).collect();
        let quality: Vec<f64> = by_qp.iter().map(|(image, _)| psnr(&converted, image)).collect();
        for crf in [18, 25, 33] {
            let (want, bytes) = ffmpeg.image_round_trip(&source, crf).expect("compressed");
            let target = psnr(&converted, &want);
            // The first QP with less quality, interpolated.
            let equal = match quality.iter().position(|quality| *quality < target) {
                Some(0) => 12.0,
                Some(i) => 11.0 + i as f64 + (quality[i - 1] - target) / (quality[i - 1] - quality[i]).max(1e-9),
                None => 51.0,
            };
            let qp = image_qp(&picture, crf);
            let (got, got_bytes) = &by_qp[usize::from(qp) - 12];
            println!(
                "| {name} | {}x{} | {crf} | {target:.2} | {bytes} | {equal:.1} | {qp} | {:.2} | {got_bytes} | {:.2} |",
                source.width(),
                source.height(),
                quality[usize::from(qp) - 12],
                psnr(got, &want),
            );
            eprintln!("#{name}\t{crf}\t{:.3}\t{equal:.2}", mean_activity(&picture));
        }
    }
}

const CLIP: (usize, usize, usize) = (768, 512, 97);

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

/// Mean PSNR of luma over the frames of an encoded clip, and the size of the file.
fn clip_quality(path: &Path, source: &[I420]) -> (f64, u64) {
    let output = Command::new("ffmpeg")
        .args(["-v", "error", "-i"])
        .arg(path)
        .args(["-map", "0:v", "-pix_fmt", "yuv420p", "-f", "rawvideo", "-"])
        .output()
        .expect("run");
    let luma = CLIP.0 * CLIP.1;
    let frames = output.stdout.chunks_exact(luma * 3 / 2);
    assert_eq!(frames.len(), source.len());
    let quality = |(got, want): (&[u8], &I420)| {
        let error: f64 = got[..luma].iter().zip(want.planes().0).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
        10.0 * (255.0 * 255.0 * luma as f64 / error.max(1e-9)).log10()
    };
    let mean = frames.zip(source).map(quality).sum::<f64>() / source.len() as f64;
    (mean, std::fs::metadata(path).expect("written").len())
}

#[test]
#[ignore = "a measurement, needs ffmpeg"]
fn calibrate_video() {
    if Ffmpeg::find().is_none() {
        println!("absent: ffmpeg");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let fps = Rational::new(24, 1).expect("a rate");
    let format = VideoFormat::new(CLIP.0, CLIP.1, fps).expect("a format");
    println!("| clip | encoder | luma dB | bytes | ms per frame |");
    println!("| --- | --- | --- | --- | --- |");
    for (name, grain_levels) in [("moving scene", 0.0), ("moving scene, grain 3", 3.7)] {
        let frames: Vec<Vec<f32>> = (0..CLIP.2).map(|index| clip_frame(index, grain_levels)).collect();
        let planes: Vec<I420> = frames
            .iter()
            .map(|rgb| {
                let mut picture = I420::new(CLIP.0, CLIP.1).expect("even");
                picture.fill_bt709(rgb).expect("a frame");
                picture
            })
            .collect();
        let raw: Vec<u8> = planes.iter().flat_map(|picture| picture.data()).copied().collect();
        let (input, path) = (folder.path().join("raw"), folder.path().join("out.mp4"));
        std::fs::write(&input, raw).expect("written");
        let status = Command::new("ffmpeg")
            .args(["-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", "768x512", "-r", "24", "-i"])
            .arg(&input)
            .args(["-c:v", "libx264", "-preset", "veryfast", "-crf", "19"])
            .arg(&path)
            .status()
            .expect("run");
        assert!(status.success());
        let (quality, bytes) = clip_quality(&path, &planes);
        println!("| {name} | libx264 veryfast crf 19 | {quality:.2} | {bytes} | |");
        for crf in [13, 15, 17, 19, 21, 23] {
            let options = OutputOptions { crf, ..OutputOptions::default() };
            let start = Instant::now();
            let mut writer = MediaWriter::create(&path, Some(format), options).expect("created");
            frames.iter().for_each(|frame| writer.write_frames(frame).expect("written"));
            writer.finish().expect("finished");
            let milliseconds = start.elapsed().as_secs_f64() * 1000.0 / CLIP.2 as f64;
            let (quality, bytes) = clip_quality(&path, &planes);
            println!("| {name} | OpenH264 QP {} | {quality:.2} | {bytes} | {milliseconds:.1} |", video_qp(crf));
        }
    }
}
