//! Pipeline hdr-ic-lora: a video to EXR frames of its size, and what is said when something is missing or does not fit.

use std::path::Path;

use ltxc_runtime::media::exr_frames::{self, frame_name};
use ltxc_runtime::media::{Clip, ColourSpace};

use crate::binary::{Place, fixtures, with};

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
    std::fs::create_dir(place.path("source")).unwrap();
    for frame in 0..frames {
        let light = |i: usize| ((i % 100 + i / 100 + 5 * frame) % 40) as f32 / 16.0;
        let rgb: Vec<f32> = (0..100 * 90).flat_map(|i| [light(i), 0.18, 2.5 - light(i)]).collect();
        let mut file = std::fs::File::create(place.path(&format!("source/{frame:02}.exr"))).unwrap();
        exr_frames::write((100, 90), &rgb, ColourSpace::LogC3, &mut file).unwrap();
    }
    "source".into()
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
    run(&[&input[..], &["--hdr", "ACESCG", "-o", "a"]].concat(), &["works with LOGC3", "leave `--hdr` out"]);
    run(&[&input[..], &["--image", &image, "-o", "a"]].concat(), &["takes no images", "leave `--image` out"]);
    let noise = ["--ltx2-refine-noise-path", "n.npy", "-o", "a"];
    run(&[&input[..], &noise].concat(), &["runs in tiles", "--noise-bundle"]);
    let clip = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/clips/reordered.mp4").display().to_string();
    run(&["--input", &clip, "-o", "a"], &["is 64x48, which takes a plan for 64x64", "--width 64 --height 64"]);
}
