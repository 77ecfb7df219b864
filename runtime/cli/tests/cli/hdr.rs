//! Pipeline hdr-ic-lora: a video to EXR frames of its size, and what is said when something is missing or does not fit.

use std::path::Path;

use ltxc_runtime::media::exr_frames::{self, frame_name};
use ltxc_runtime::media::ffmpeg::Ffmpeg;
use ltxc_runtime::media::hlg;
use ltxc_runtime::media::{
    Clip, ClipRate, ColourSpace, MediaWriter, OutputOptions, Rational, VideoFormat, Window, displayed,
};

use crate::binary::{Place, fixtures, sentence, with};

fn fixture(name: &str) -> String {
    fixtures().join(name).display().to_string()
}

/// `<command> --pipeline hdr-ic-lora` with the files of the small LTX-2.
fn command(command: &str, more: &[&str]) -> Vec<String> {
    let files = [
        ("--checkpoint-path", fixture("tiny-ltx2/ltx-2-tiny.safetensors")),
        ("--gemma-root", fixture("tiny-gemma3")),
        ("--spatial-upsampler-path", fixture("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors")),
    ];
    let flags = files.iter().flat_map(|(flag, path)| [flag.to_string(), path.clone()]);
    let start = [command, "--pipeline", "hdr-ic-lora", "--device", "cpu"].map(String::from);
    with(start.into_iter().chain(flags).collect(), more)
}

/// EXR frames of 100x90 that move, with light above white.
fn source(place: &Place, frames: usize) -> String {
    source_of(place, "source", frames)
}

fn source_of(place: &Place, name: &str, frames: usize) -> String {
    std::fs::create_dir(place.path(name)).unwrap();
    for frame in 0..frames {
        let light = |i: usize| ((i % 100 + i / 100 + 5 * frame) % 40) as f32 / 16.0;
        let rgb: Vec<f32> = (0..100 * 90).flat_map(|i| [light(i), 0.18, 2.5 - light(i)]).collect();
        let mut file = std::fs::File::create(place.path(&format!("{name}/{frame:02}.exr"))).unwrap();
        exr_frames::write((100, 90), &rgb, ColourSpace::LogC3, &mut file).unwrap();
    }
    name.into()
}

/// All values of the frames in a folder, which must be `count` of this size.
#[track_caller]
fn values(place: &Place, folder: &str, count: usize, size: (usize, usize)) -> Vec<f32> {
    assert_eq!(std::fs::read_dir(place.path(folder)).unwrap().count(), count, "frames and nothing else");
    let read = |i: usize| {
        let frame = exr_frames::read(&place.path(folder).join(frame_name(i as u64))).unwrap();
        assert_eq!((frame.width, frame.height), size);
        frame.rgb
    };
    (0..count).flat_map(read).collect()
}

#[test]
fn a_video_gets_a_high_dynamic_range() {
    let place = Place::new();
    let (frames, lora) = (source(&place, 18), fixture("tiny-ltx2/ic-lora-tiny.safetensors"));
    // 128x128 are 4x4 latents, and 17 frames are 3: eight tiles of 2x3x3, which overlap.
    let run = |output: &str, more: &[&str]| {
        let input = ["--input", &frames, "--frame-rate", "24", "-o", output];
        let text = if more.contains(&"--text-embeddings") { &[][..] } else { &["-p", "rain"] };
        place.ok(&command("run", &[&input, text, more].concat()));
        values(&place, output, 17, (100, 90))
    };
    let made = run("made", &["--hdr-lora", &lora]);
    assert!(made.iter().all(|v| v.is_finite()) && made.iter().any(|v| *v != made[0]));
    assert_eq!(run("again", &["--lora", &lora, "--noise-bundle", "noise"]), made);
    assert_ne!(run("other", &["--lora", &lora, "--seed", "11"]), made);
    // The LoRA acts in the second stage, too.
    assert_ne!(run("first", &["--lora", &lora, "1", "stage=1"]), made);
    // Every tile has noise of its own, which a run with another seed can be given.
    let noise: Vec<String> = (0..8).map(|i| format!("noise/stage2.tile.{i:03}.video.safetensors")).collect();
    assert!(noise.iter().all(|path| place.path(path).exists()));
    assert_ne!(place.read(&noise[0]), place.read(&noise[1]));
    // Those of stage 1 and of eight tiles, and as many of the tokens of the reference.
    assert_eq!(std::fs::read_dir(place.path("noise")).unwrap().count(), 18);
    std::fs::remove_file(place.path(&noise[7])).unwrap();
    assert_eq!(run("last", &["--lora", &lora, "--noise-bundle", "noise"]), made);
    // A text context from a file is that of its prompt.
    let model = fixture("tiny-ltx2/ltx-2-tiny.safetensors");
    let text = ["debug", "text", "export", "--checkpoint-path", &model, "--gemma-root", &fixture("tiny-gemma3")];
    place.ok(&[&text[..], &["-p", "rain", "-o", "rain.safetensors"]].concat());
    assert_eq!(run("text", &["--lora", &lora, "--text-embeddings", "rain.safetensors"]), made);
}

/// The frames of a clip, 8 bits each.
fn pictures(path: &Path) -> (ClipRate, Vec<Vec<u8>>) {
    let clip = Clip::open(path).unwrap();
    let (info, mut pictures) = (clip.info(), Vec::new());
    let window = Window { rate: Rational::new(24, 1).unwrap(), start_seconds: 0.0, frames: info.frames };
    clip.read(window, &mut |picture| {
        pictures.push(picture.rgb().to_vec());
        Ok(())
    })
    .unwrap();
    (info.rate, pictures)
}

#[test]
fn a_preview_shows_the_frames() {
    let place = Place::new();
    let (frames, lora) = (source(&place, 9), fixture("tiny-ltx2/ic-lora-tiny.safetensors"));
    let flags = ["--input", &frames, "--frame-rate", "24", "--lora", &lora, "-p", "rain", "-o", "a"];
    let run = |more: &[&str]| command("run", &[&flags[..], more].concat());
    place.ok(&run(&["--save-json", "--crf", "1"]));
    let facts: serde_json::Value = serde_json::from_slice(&place.read("a.json")).unwrap();
    assert_eq!((&facts["preview"], &facts["frames"]), (&"a.mp4".into(), &9.into()));
    let light = values(&place, "a", 9, (100, 90));
    let stats = place.run(&["debug", "video-stats", "a", "--json"]);
    let stats: serde_json::Value = serde_json::from_str(&stats.stdout).unwrap();
    let extreme = |least: f64, pick: fn(f32, f32) -> f32| f64::from(light.iter().copied().fold(least as f32, pick));
    let range = (extreme(f64::MAX, f32::min), extreme(f64::MIN, f32::max));
    assert_eq!((stats["light"]["min"].as_f64(), stats["light"]["max"].as_f64()), (Some(range.0), Some(range.1)));
    assert_eq!((&stats["frames"], &stats["width"], &stats["light"]["not_finite"]), (&9.into(), &100.into(), &0.into()));
    let (rate, shown) = pictures(&place.path("a.mp4"));
    assert_eq!((rate, shown.len()), (ClipRate::Constant(Rational::new(24, 1).unwrap()), 9));
    // The same frames as a screen shows them, through the same codec; half floats are coarser than what it was given.
    let format = VideoFormat::new(100, 90, Rational::new(24, 1).unwrap()).unwrap();
    let options = OutputOptions { crf: 1, ..OutputOptions::default() };
    let mut writer = MediaWriter::create(&place.path("expected.mp4"), Some(format), options).unwrap();
    writer.write_frames(&light.as_chunks::<3>().0.iter().flat_map(|&rgb| displayed(rgb)).collect::<Vec<_>>()).unwrap();
    writer.finish().unwrap();
    let (_, expected) = pictures(&place.path("expected.mp4"));
    let pairs = shown.iter().flatten().zip(expected.iter().flatten());
    let errors: Vec<f64> = pairs.map(|(a, b)| f64::from(a.abs_diff(*b))).collect();
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    assert!(errors.len() == 9 * 100 * 90 * 3 && mean < 1.0, "mean error {mean} of 255 levels");
    assert!(shown.iter().flatten().any(|v| *v != shown[0][0]));

    // Neither folder nor preview is replaced.
    std::fs::remove_dir_all(place.path("a")).unwrap();
    place.refused(&run(&[]), &["`a.mp4` is there, where the preview of `a` goes", "--skip-mp4"]);
    place.ok(&run(&["--skip-mp4"]));
    values(&place, "a", 9, (100, 90));
    place.refused(&run(&["--skip-mp4"]), &["`a`"]);
    place.refused(&run(&["--skip-mp4", "--crf", "1"]), &["`--crf 1`", "leave it or `--skip-mp4` out"]);
}

/// Needs ffmpeg with libx265 for all but the refusal.
#[test]
fn an_hlg_master_shows_the_frames_in_ten_bits() {
    let place = Place::new();
    let (frames, lora) = (source(&place, 9), fixture("tiny-ltx2/ic-lora-tiny.safetensors"));
    let flags = ["--input", &frames, "--frame-rate", "24", "--lora", &lora, "-p", "rain", "--skip-mp4", "--hlg-master"];
    let args = with(command("run", &flags), &["-o", "a"]);
    let listing =
        || place.listing().into_keys().filter(|path| !path.starts_with(place.path("cache"))).collect::<Vec<_>>();
    let before = listing();
    let done = place.command(&args).env("PATH", "").output().unwrap().into();
    sentence(&done, &["`a.hlg.mp4`", "ffmpeg with libx265", "`--hlg-master`"]);
    assert_eq!(listing(), before);
    let Some(ffmpeg) = Ffmpeg::find().filter(Ffmpeg::has_x265) else {
        println!("absent: ffmpeg with libx265");
        return;
    };
    place.ok(&args);
    let light = values(&place, "a", 9, (100, 90));
    let (raw, about) = decoded(&ffmpeg, &place.path("a.hlg.mp4"));
    for part in ["hevc (Main 10) (hvc1", "yuv420p10le(tv, bt2020nc/bt2020/arib-std-b67", "100x90", "24 fps"] {
        assert!(about.contains(part), "`{part}` is missing in {about}");
    }
    let words =
        |bytes: &[u8]| -> Vec<u16> { bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect() };
    let expected: Vec<u16> =
        light.chunks_exact(100 * 90 * 3).flat_map(|frame| words(&hlg::planes(frame, (100, 90)))).collect();
    let found = words(&raw);
    assert_eq!(found.len(), expected.len());
    let mean = found.iter().zip(&expected).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / found.len() as f64;
    let spread = expected.iter().map(|v| f64::from(v.abs_diff(expected[0]))).sum::<f64>() / expected.len() as f64;
    // What the encoder loses is a fraction of what there is to see.
    assert!(mean < spread / 10.0, "mean error {mean} of codes that differ by {spread}");
    std::fs::remove_dir_all(place.path("a")).unwrap();
    place.refused(&args, &["`a.hlg.mp4` is there", "`--hlg-master`"]);
}

/// The frames of a file as planes of 10 bits, and what `ffmpeg` says of it.
pub fn decoded(ffmpeg: &Ffmpeg, path: &Path) -> (Vec<u8>, String) {
    let mut program = std::process::Command::new(ffmpeg.program());
    program.args(["-nostdin", "-i"]).arg(path).args(["-f", "rawvideo", "-pix_fmt", "yuv420p10le", "-"]);
    let done = program.output().unwrap();
    (done.stdout, String::from_utf8_lossy(&done.stderr).into_owned())
}

/// With high quality, 9 frames are 17 in between, of which every other one is written.
#[test]
fn every_other_frame_of_twice_as_many_is_written() {
    let place = Place::new();
    let (frames, lora) = (source(&place, 9), fixture("tiny-ltx2/ic-lora-tiny.safetensors"));
    let run = |input: &str, output: &str, more: &[&str]| {
        let flags = ["--input", input, "--frame-rate", "24", "--lora", &lora, "-p", "rain", "--skip-mp4", "-o", output];
        place.ok(&command("run", &[&flags, more].concat()))
    };
    let done = run(&frames, "high", &["--high-quality"]);
    assert!(done.stderr.contains("17 frames are made, 9 of them are written"), "{}", done.stderr);
    let high = values(&place, "high", 9, (100, 90));
    // The same as a run on a video whose frames stand twice, the last one once.
    std::fs::create_dir(place.path("twice")).unwrap();
    for i in 0..17 {
        let from = place.path(&format!("source/{:02}.exr", i / 2));
        std::fs::copy(from, place.path(&format!("twice/{i:02}.exr"))).unwrap();
    }
    run("twice", "all", &[]);
    let all = values(&place, "all", 17, (100, 90));
    let kept: Vec<f32> = all.chunks(100 * 90 * 3).step_by(2).flatten().copied().collect();
    assert_eq!(high, kept);
    run(&frames, "plain", &[]);
    assert_ne!(values(&place, "plain", 9, (100, 90)), high);

    // A plan knows it; other pipelines have no use for it, and lengths are those that are written.
    let plan = ["--height", "128", "--width", "128", "--num-frames", "9", "--high-quality", "--lora", &lora];
    place.ok(&command("compile", &[&plan[..], &["-o", "a.ltxplan"]].concat()));
    let weights = fixtures().display().to_string();
    let start = ["run", "a.ltxplan", "--weights", &weights, "-p", "rain", "--lora", &lora, "--skip-mp4"];
    place.ok(&[&start[..], &["--input", &frames, "-o", "planned"]].concat());
    assert_eq!(values(&place, "planned", 9, (100, 90)), high);
    let short = source_of(&place, "short", 8);
    place.refused(&[&start[..], &["--input", &short, "-o", "b"]].concat(), &["`short` has 8 frames, 9 are needed"]);
    let odd = ["--num-frames", "11", "--high-quality", "--lora", &lora, "-o", "b.ltxplan"];
    place.refused(&command("compile", &odd), &["`--num-frames 11` is not 4k+1", "9 and 13"]);
    let mut other = command("compile", &["--high-quality", "-o", "b.ltxplan"]);
    other[2] = "distilled".into();
    place.refused(&other, &["`--high-quality` is for pipeline `hdr-ic-lora`, not for `distilled`"]);
}

#[test]
fn references_may_be_smaller_and_of_eight_bits() {
    let place = Place::new();
    let clip = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/clips/reordered.mp4");
    let frames = Clip::open(&clip).unwrap().info().frames;
    let (clip, half) = (clip.display().to_string(), fixture("tiny-ltx2/ic-lora-ref2-tiny.safetensors"));
    let mut args = command("run", &["--lora", &half, "--video-conditioning", &clip, "-p", "rain", "-o", "a"]);
    args[2] = "hdr_ic_lora".into();
    place.ok(&args);
    values(&place, "a", (frames - 1) / 8 * 8 + 1, (64, 48));
}

#[test]
fn what_does_not_fit_is_refused() {
    let place = Place::new();
    let (frames, lora) = (source(&place, 9), fixture("tiny-ltx2/ic-lora-tiny.safetensors"));
    let text = ["-p", "rain", "--frame-rate", "24"];
    let refused = |more: &[&str], words: &[&str]| {
        place.refused(&command("run", &[&text, more].concat()), words);
        assert!(!place.path("cache").exists(), "something was compiled");
    };
    refused(&["--lora", &lora, "-o", "a"], &["pipeline `hdr-ic-lora` needs a reference video", "--video-conditioning"]);
    refused(&["--input", &frames, "-o", "a"], &["pipeline `hdr-ic-lora` needs an IC-LoRA", "--lora"]);
    let (given, image) = (["--input", &frames, "--lora", &lora], fixture("inputs/image0.png"));
    refused(&[&given[..], &["--image", &image, "-o", "a"]].concat(), &["takes no images", "leave `--image` out"]);
    refused(&[&given[..], &["--num-frames", "17", "-o", "a"]].concat(), &["runs in tiles", "found 9", "--num-frames"]);

    let plan = ["--height", "128", "--width", "128", "--num-frames", "9", "--lora", &lora, "-o", "a.ltxplan"];
    place.ok(&command("compile", &plan));
    let weights = fixtures().display().to_string();
    let run = |more: &[&str], words: &[&str]| {
        let start = ["run", "a.ltxplan", "--weights", &weights, "-p", "x", "--lora", &lora];
        place.refused(&[&start, more].concat(), words);
    };
    let input = ["--input", &frames];
    run(&[&input[..], &["-o", "a.mp4"]].concat(), &["a.mp4", "choose a folder"]);
    run(&[&input[..], &["-o", "a", "--fps-out", "48"]].concat(), &["`--fps-out 48`", "an ordinary range"]);
    run(&[&input[..], &["--hdr", "ACESCG", "-o", "a"]].concat(), &["works with LOGC3", "leave `--hdr` out"]);
    run(&[&input[..], &["--image", &image, "-o", "a"]].concat(), &["takes no images", "leave `--image` out"]);
    let noise = ["--ltx2-refine-noise-path", "n.npy", "-o", "a"];
    run(&[&input[..], &noise].concat(), &["runs in tiles", "--noise-bundle"]);
    let clip = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/clips/reordered.mp4").display().to_string();
    run(&["--input", &clip, "-o", "a"], &["is 64x48, which takes a plan for 64x64", "--width 64 --height 64"]);
}
