//! Clips and recordings that a run is given: what is made of them, and what is said about those that do not fit.

use std::path::Path;

use crate::binary::{Place, SHAPE, tiny, with};

/// A folder of `n` grey images of 64x64, each a little brighter.
fn folder(place: &Place, name: &str, n: u8) -> String {
    std::fs::create_dir(place.path(name)).unwrap();
    for i in 0..n {
        let mut png = Vec::new();
        ltxc_runtime::media::png::write(64, 64, &[40 + 3 * i; 64 * 64 * 3], &mut png).unwrap();
        place.write(&format!("{name}/{i}.png"), &png);
    }
    name.into()
}

/// `run --pipeline retake` with the model files of the small model.
fn retake(flags: &[&str]) -> Vec<String> {
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
    place.ok(&retake(&flags));
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
    place.refused(&retake(&["--video-path", &frames]), &["no frame rate of its own", "--frame-rate"]);
    let cut = place.write("cut.mp4", &std::fs::read(clip("portrait.mp4")).unwrap()[..900]).display().to_string();
    run(&["--video-path", &cut], &["cut.mp4", "the file is cut"]);
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
fn other_pipelines_take_no_clips() {
    let place = Place::new();
    let frames = folder(&place, "frames", 9);
    place.refused(&with(tiny().run_args(), &["-p", "x", "--video-path", &frames]), &["takes no clip"]);
}
