//! Clips and recordings that a run is given: what is made of them, and what is said about those that do not fit.

use std::path::Path;

use ltxc_runtime::media::ffmpeg::Ffmpeg;
use ltxc_runtime::media::{ColourSpace, exr_frames};

use crate::binary::{Place, SHAPE, sentence, tiny, with};
use crate::hdr::decoded;

/// A folder of `n` grey images of 64x64, each a little brighter.
pub fn folder(place: &Place, name: &str, n: u8) -> String {
    std::fs::create_dir(place.path(name)).unwrap();
    for i in 0..n {
        let mut png = Vec::new();
        ltxc_runtime::media::png::write(64, 64, &[40 + 3 * i; 64 * 64 * 3], &mut png).unwrap();
        place.write(&format!("{name}/{i}.png"), &png);
    }
    name.into()
}

/// `run --pipeline retake` with the model files of the small model.
pub fn retake(flags: &[&str]) -> Vec<String> {
    let start = ["run", "--pipeline", "retake", "-p", "x", "--steps", "1"].map(String::from);
    with([&start[..], &tiny().model_args()].concat(), flags)
}

/// Clips of other encoders, with the library that reads them.
fn clip(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/clips").join(name).display().to_string()
}

#[test]
fn a_part_of_a_folder_of_images_is_made_anew() {
    let place = Place::new();
    let frames = folder(&place, "frames", 10);
    let flags = ["--video-path", &frames, "--frame-rate", "24", "--start-time", "0.2", "-o", "a.mp4"];
    let done = place.ok(&retake(&flags));
    assert!(done.stderr.contains("`frames` has 10 frames, of which the last one is left out"), "{}", done.stderr);
    let movie = ltxc_runtime::media::mp4::read(&place.read("a.mp4")).unwrap();
    let video = movie.video.unwrap();
    // Ten images are one group of eight behind the first.
    assert_eq!((video.width, video.height, video.samples.len()), (64, 64, 9));
    assert!(movie.audio.is_some(), "a silent clip gets sound");
}

#[test]
fn clips_that_do_not_fit_are_refused() {
    let place = Place::new();
    let frames = folder(&place, "frames", 9);
    let plan = place.path("a.ltxplan").display().to_string();
    let compile = ["compile", "--pipeline", "retake"].map(String::from);
    place.ok(&with([&compile[..], &tiny().model_args()].concat(), &[&SHAPE[..], &["-o", &plan]].concat()));
    let weights = tiny().folder.display().to_string();
    let run = |flags: &[&str], words: &[&str]| {
        let start = ["run", &plan, "--weights", &weights, "-p", "x", "-o", "a.mp4"];
        place.refused(&[&start, flags].concat(), words);
    };
    run(&[], &["pipeline `retake` needs a clip", "--video-path"]);
    run(&["--video-path", &frames], &["which part", "--start-time", "--end-time"]);
    run(
        &["--video-path", &frames, "--start-time", "5", "--end-time", "6"],
        &["--start-time 5", "behind the end", "0.375 s"],
    );
    run(&["--video-path", &frames, "--start-time", "0.375"], &["behind the end"]);
    run(&["--video-path", &frames, "--start-time=-1"], &["--start-time -1", "no time of the clip"]);
    let start = ["--start-time", "0.1"];
    let run = |flags: &[&str], words: &[&str]| {
        run(&[flags, &start[..if flags.contains(&"--start-time") { 0 } else { 2 }]].concat(), words)
    };
    run(&["--video-path", "gone.mp4"], &["cannot read `gone.mp4`"]);
    run(&["--video-path", &clip("reordered.mp4")], &["is 64x48, the plan is for 64x64", "--height 48"]);
    run(&["--video-path", &frames, "--image", "a.png"], &["a.png"]);
    run(&["--video-path", &frames, "--start-time", "0.3", "--end-time", "0.2"], &["from 0.3 s to 0.2 s is empty"]);
    run(&["--video-path", &frames, "--keep-video", "--keep-audio"], &["leave nothing"]);
    run(&["--video-path", &frames, "--keep-audio"], &["no sound that could be kept"]);
    run(&["--video-path", &folder(&place, "short", 8)], &["the clip has 8 frames", "takes 9"]);
    let empty = place.path("empty");
    std::fs::create_dir(&empty).unwrap();
    run(&["--video-path", "empty"], &["holds no PNG"]);
    place.refused(&retake(&["--video-path", &frames]), &["which part"]);
    place
        .refused(&retake(&["--video-path", &frames, "--end-time", "1"]), &["no frame rate of its own", "--frame-rate"]);
    let cut = place.write("cut.mp4", &std::fs::read(clip("portrait.mp4")).unwrap()[..900]).display().to_string();
    run(&["--video-path", &cut], &["cut.mp4", "the file is cut"]);
}

#[test]
fn a_part_can_be_given_in_latent_frames() {
    let place = Place::new();
    let frames = folder(&place, "frames", 17);
    let flags = ["--video-path", &frames, "--frame-rate", "24", "--no-audio", "--no-metadata", "-o", "a.mp4"];
    let run = |part: &[&str]| retake(&[&flags[..], part].concat());
    // The bytes of the video, and how many of its tokens are made anew.
    let made = |part: &[&str]| {
        place.ok(&run(&[part, &["--debug-stage-sums-path", "s.log"]].concat()));
        let log = String::from_utf8(place.read("s.log")).unwrap();
        let (_, mask) = log.split_once("ltx2_video_denoise_mask=").unwrap();
        let sum: f64 = mask.split_whitespace().next().unwrap().parse().unwrap();
        (place.read("a.mp4"), sum)
    };
    // 17 frames are three latents of 2x2 places: frame 0, frames 1 to 8, frames 9 to 16.
    let middle = made(&["--start-latent", "1", "--end-latent", "2"]);
    assert_eq!(middle.1, 4.0);
    // Frame 1 begins at 1/24 s, frame 9 at 9/24 s.
    assert!(middle == made(&["--start-time", "0.042", "--end-time", "0.374"]));
    let counts =
        [&["--start-latent", "1"][..], &["--end-latent", "2"], &["--start-latent", "0"]].map(|part| made(part).1);
    assert_eq!(counts, [8.0, 8.0, 12.0]);
    std::fs::remove_file(place.path("a.mp4")).unwrap();
    for (part, words) in [
        (&["--end-latent", "0"][..], &["`--end-latent 0` is not behind latent frame 0"][..]),
        (&["--start-latent", "2", "--end-latent", "2"], &["`--end-latent 2` is not behind latent frame 2"]),
        (&["--start-latent", "3"], &["`--start-latent 3` is at or behind the end of `frames`", "0.708 s"]),
        (&["--start-latent", "1", "--start-time", "0.1"], &["--start-latent", "cannot be used with"]),
    ] {
        place.refused(&run(part), words);
    }
}

/// Nobody gave the size of the clip as a flag.
#[test]
fn a_clip_of_odd_size_is_named() {
    let place = Place::new();
    std::fs::create_dir(place.path("wide")).unwrap();
    let mut png = Vec::new();
    ltxc_runtime::media::png::write(130, 64, &[90; 130 * 64 * 3], &mut png).unwrap();
    place.write("wide/0.png", &png);
    let done = place.run(&retake(&["--video-path", "wide", "--frame-rate", "24", "--start-time", "0"]));
    sentence(&done, &["a plan for a clip of 130x64", "multiple of 32", "128 or 160"]);
}

#[test]
fn one_of_picture_and_sound_can_stay() {
    let place = Place::new();
    place.ok(&with(tiny().run_args(), &["-p", "x", "-o", "clip.mp4"]));
    let movie = |flag: &str, seed: &str| {
        let flags = ["--video-path", "clip.mp4", "--start-time", "0.1", flag, "--seed", seed, "--no-metadata"];
        place.ok(&retake(&[&flags[..], &["-o", "a.mp4"]].concat()));
        let movie = ltxc_runtime::media::mp4::read(&place.read("a.mp4")).unwrap();
        (movie.video.unwrap().samples, movie.audio.unwrap().frames)
    };
    let (kept, other) = (movie("--keep-audio", "1"), movie("--keep-audio", "2"));
    assert!(kept.1 == other.1 && kept.0 != other.0, "sound stays, the picture is new");
    let (kept, other) = (movie("--keep-video", "1"), movie("--keep-video", "2"));
    assert!(kept.0 == other.0 && kept.1 != other.1, "the picture stays, sound is new");
}

#[test]
fn a_silent_video_can_be_made_of_a_clip_with_sound() {
    let place = Place::new();
    place.ok(&with(tiny().run_args(), &["-p", "x", "-o", "clip.mp4"]));
    place.ok(&retake(&["--video-path", "clip.mp4", "--start-time", "0.1", "--no-audio", "-o", "a.mp4"]));
    let movie = ltxc_runtime::media::mp4::read(&place.read("a.mp4")).unwrap();
    assert!(movie.video.is_some() && movie.audio.is_none());
}

#[test]
fn other_pipelines_take_no_clips() {
    let place = Place::new();
    let frames = folder(&place, "frames", 9);
    place.refused(&with(tiny().run_args(), &["-p", "x", "--video-path", &frames]), &["takes no clip"]);
}

/// Nine frames of black and white, which 8 bits and floats hold alike: `png` images, or EXR files.
pub fn stripes(place: &Place, name: &str, is_exr: bool) -> String {
    std::fs::create_dir(place.path(name)).unwrap();
    for frame in 0..9 {
        let value = |i: usize| (i % 64 / 8 + i / 64 / 16 + frame) % 2;
        let file = place.path(&format!("{name}/{frame}.{}", if is_exr { "exr" } else { "png" }));
        let mut file = std::fs::File::create(file).unwrap();
        if is_exr {
            let rgb: Vec<f32> = (0..64 * 64).flat_map(|i| [value(i) as f32, 0.0, 1.0]).collect();
            exr_frames::write((64, 64), &rgb, ColourSpace::AcesCct, &mut file).unwrap();
        } else {
            let rgb: Vec<u8> = (0..64 * 64).flat_map(|i| [255 * value(i) as u8, 0, 255]).collect();
            ltxc_runtime::media::png::write(64, 64, &rgb, &mut file).unwrap();
        }
    }
    name.into()
}

#[test]
fn frames_with_a_high_dynamic_range_come_and_go_as_exr() {
    let place = Place::new();
    let (images, frames) = (stripes(&place, "images", false), stripes(&place, "frames", true));
    let flags = ["--frame-rate", "24", "--start-time", "0.1"];
    let run = |more: &[&str]| retake(&[&flags[..], more].concat());
    place.ok(&run(&["--video-path", &images, "-o", "eight"]));
    place.ok(&run(&["--video-path", &frames, "--hdr", "acescct", "-o", "hdr"]));
    place.ok(&run(&["--video-path", &frames, "--hdr", "ACESCG", "-o", "light"]));
    assert_eq!(place.read("eight/audio.wav"), place.read("hdr/audio.wav"));
    for frame in 0..9 {
        let signal = is_like(&place, "hdr", "eight", frame);
        let name = |folder: &str| place.path(&format!("{folder}/frame_{frame:05}.exr"));
        // Numbers that are light stand for brighter pictures than signals do, and are written as light.
        let light = exr_frames::read(&name("light")).unwrap();
        assert!(light.rgb.iter().all(|v| v.is_finite() && *v < 223.0) && light.rgb != signal.rgb);
    }
    if let Some(ffmpeg) = Ffmpeg::find().filter(Ffmpeg::has_x265) {
        place.ok(&run(&["--video-path", &frames, "--hdr", "acescct", "--hlg-master", "-o", "shown"]));
        let (_, about) = decoded(&ffmpeg, &place.path("shown.hlg.mp4"));
        assert!(about.contains("Video: hevc (Main 10)") && about.contains("Audio: aac"), "{about}");
    }
    place.refused(&run(&["--video-path", &images, "--hlg-master", "-o", "b"]), &["`--hlg-master`", "EXR frames"]);
    place.refused(&run(&["--video-path", &frames, "-o", "b"]), &["holds EXR frames", "--hdr SRGB_LINEAR"]);
    place.refused(&run(&["--video-path", &images, "--hdr", "ACESCG", "-o", "b"]), &["no EXR frames"]);
    place.refused(&run(&["--video-path", &frames, "--hdr", "ACESCG", "-o", "b.mp4"]), &["b.mp4", "choose a folder"]);
    place.refused(&with(tiny().run_args(), &["-p", "x", "--hdr", "ACESCG"]), &["--video-path"]);
    let narrow = ["--video-path", &frames, "--hdr", "ACESCG", "--dtype", "bf16", "-o", "b"];
    sentence(&place.run(&run(&narrow)), &["needs the precision of f32"]);
}

/// A frame of the EXR files in `hdr`, which must be the signal of what the PNG file in `eight` has in bytes.
#[track_caller]
pub fn is_like(place: &Place, hdr: &str, eight: &str, frame: usize) -> exr_frames::FloatImage {
    let signal = exr_frames::read(&place.path(&format!("{hdr}/frame_{frame:05}.exr"))).unwrap();
    let bytes = ltxc_runtime::media::load_image(&place.path(&format!("{eight}/frame_{frame:05}.png"))).unwrap();
    assert_eq!((signal.width, signal.height), (bytes.width(), bytes.height()));
    for (found, byte) in signal.rgb.iter().zip(bytes.rgb()) {
        // Bytes are cut off, halves are rounded.
        let expected = f32::from(*byte) / 255.0;
        assert!((expected - 1e-3..=expected + 1.0 / 255.0 + 1e-3).contains(found), "{found} for {byte}");
    }
    signal
}
