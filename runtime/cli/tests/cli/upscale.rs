//! Pipeline upscale: a clip to one of more pixels or more frames with its sound, and what is said when something does not fit.

use std::f32::consts::TAU;
use std::path::Path;

use ltxc_runtime::media::mp4::{Movie, read};
use ltxc_runtime::media::{Audio, MediaWriter, OutputOptions, Rational, VideoFormat, load_audio, png};

use crate::binary::{Place, fixtures, tiny, with};

const SPATIAL: &str = "tiny-ltx2/spatial-upscaler-x2-tiny.safetensors";
const TEMPORAL: &str = "tiny-ltx2/temporal-upscaler-x2-tiny.safetensors";

fn fixture(name: &str) -> String {
    fixtures().join(name).display().to_string()
}

/// `<command> upscale` with the small LTX-2; there is no text encoder.
fn command(command: &str, more: &[&str]) -> Vec<String> {
    let model = fixture("tiny-ltx2/ltx-2-tiny.safetensors");
    let start = [command, "--pipeline", "upscale", "--device", "cpu", "--checkpoint-path", &model].map(String::from);
    with(start.into(), more)
}

/// A frame of 64x64 that moves, in `[0, 1]`.
fn picture(frame: usize) -> impl Iterator<Item = f32> {
    (0..64 * 64 * 3).map(move |i| ((i / 3 % 64 + i / 192 + 4 * frame) as f32 * 0.1 + (i % 3) as f32).sin() * 0.4 + 0.5)
}

/// Nine frames at 24 per second, with a tone.
fn clip(place: &Place) {
    let format = VideoFormat::new(64, 64, Rational::new(24, 1).unwrap()).unwrap();
    let mut writer = MediaWriter::create(&place.path("clip.mp4"), Some(format), OutputOptions::default()).unwrap();
    (0..9).for_each(|i| writer.write_frames(&picture(i).collect::<Vec<_>>()).unwrap());
    let tone: Vec<f32> = (0..18_000u16).map(|i| (f32::from(i) * 440.0 * TAU / 48_000.0).sin() * 0.5).collect();
    writer.write_audio(Audio::new(48_000, [tone.clone(), tone].concat()).unwrap()).unwrap();
    writer.finish().unwrap();
}

/// Nine images without sound.
fn images(place: &Place) {
    std::fs::create_dir(place.path("images")).unwrap();
    for i in 0..9 {
        let rgb: Vec<u8> = picture(i).map(|v| (v * 255.0) as u8).collect();
        let mut file = Vec::new();
        png::write(64, 64, &rgb, &mut file).unwrap();
        place.write(&format!("images/{i}.png"), &file);
    }
}

#[track_caller]
fn movie(place: &Place, args: &[String], name: &str) -> Movie {
    place.ok(args);
    read(&place.read(name)).unwrap()
}

/// Width, height, frames and rate.
fn shape(movie: &Movie) -> (usize, usize, usize, Rational) {
    let video = movie.video.as_ref().expect("a picture");
    (video.width as usize, video.height as usize, video.samples.len(), video.fps)
}

#[test]
fn a_clip_gets_more_pixels_more_frames_and_keeps_its_sound() {
    let place = Place::new();
    clip(&place);
    let (spatial, temporal) = (fixture(SPATIAL), fixture(TEMPORAL));
    let rate = |n: u32| Rational::new(n, 1).unwrap();
    let run =
        |more: &[&str]| command("run", &[&["--video-path", "clip.mp4", "-o", "a.mp4", "--no-metadata"], more].concat());
    let larger = movie(&place, &run(&["--spatial-upsampler-path", &spatial]), "a.mp4");
    assert_eq!(shape(&larger), (128, 128, 9, rate(24)));
    let longer = movie(&place, &run(&["--temporal", "--temporal-upsampler-path", &temporal]), "a.mp4");
    assert_eq!(shape(&longer), (64, 64, 17, rate(48)));
    let bytes = place.read("a.mp4");
    place.ok(&run(&["--temporal-upscaler-weights", &temporal]));
    assert!(place.read("a.mp4") == bytes, "the file alone says it");
    let both = ["--spatial-upsampler-path", &spatial, "--temporal-upsampler-path", &temporal];
    let all = movie(&place, &run(&both), "a.mp4");
    assert_eq!(shape(&all), (128, 128, 17, rate(48)));
    let sounds = [&larger, &longer, &all].map(|movie| movie.audio.clone().expect("the sound of the clip"));
    assert!(sounds.iter().all(|sound| sound == &sounds[0]) && sounds[0].rate_hz == 48_000);
    place.ok(&command("run", &[&["--video-path", "clip.mp4", "-o", "frames"][..], &both[..2]].concat()));
    let [before, after] =
        ["clip.mp4", "frames/audio.wav"].map(|name| load_audio(&place.path(name), 0.0, 10.0).unwrap());
    assert_eq!(before.len(), after.len());
    for (a, b) in before.channels.iter().flatten().zip(after.channels.iter().flatten()) {
        assert!((a - b).abs() < 2.0 / 32767.0, "{a} became {b}");
    }

    // A plan gives the same, for clips of its size; it says how, and no text.
    let sizes = ["--height", "64", "--width", "64", "--num-frames", "9"];
    place.ok(&command("compile", &[&sizes[..], &both, &["-o", "a.ltxplan"]].concat()));
    let weights = fixtures().display().to_string();
    let planned = ["run", "a.ltxplan", "--weights", &weights, "-o", "b.mp4", "--video-path"];
    let done = place.ok(&[&planned[..], &["clip.mp4", "--no-metadata"]].concat());
    assert!(done.stderr.contains("9 frames of 64x64 at 24/1 to 17 of 128x128 at 48/1"), "{}", done.stderr);
    assert!(read(&place.read("b.mp4")).unwrap().video == all.video);
    let programs: serde_json::Value =
        serde_json::from_str(&place.ok(&["inspect", "a.ltxplan", "--json"]).stdout).unwrap();
    let names: Vec<&str> =
        programs["programs"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["encode_video.9x64x64", "upsample.space", "upsample.time", "decode.3x4x4"]);
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/clips/reordered.mp4").display().to_string();
    place.refused(&[&planned[..], &[&other]].concat(), &["is 64x48, the plan is for 64x64"]);
    place.refused(&[&planned[..], &["clip.mp4", "-p", "x"]].concat(), &["`upscale` reads no text", "--prompt"]);
    place.refused(
        &[&planned[..], &["clip.mp4", "--keep-audio"]].concat(),
        &["`--keep-audio` is about a clip of which a part"],
    );
    place.refused(&["run", "a.ltxplan", "--weights", &weights, "-o", "b.wav"], &["b.wav"]);
}

#[test]
fn fractions_stay_fractions_and_silence_stays_silence() {
    let place = Place::new();
    images(&place);
    let half = fixture("tiny-ltx23/spatial-upscaler-x1.5-ltx23-tiny.safetensors");
    let model = fixture("tiny-ltx23/ltx-2.3-tiny.safetensors");
    let input = ["--video-path", "images", "--frame-rate", "24000/1001", "-o", "a.mp4"];
    let args = ["run", "upscale", "--device", "cpu", "--checkpoint-path", &model, "--spatial-upsampler-path", &half];
    let larger = movie(&place, &with(args.map(String::from).into(), &input), "a.mp4");
    // Two latents by 3/2 are three.
    assert_eq!(shape(&larger), (96, 96, 9, Rational::new(24000, 1001).unwrap()));
    let args = command("run", &[&input[..], &["--temporal-upsampler-path", &fixture(TEMPORAL)]].concat());
    let longer = movie(&place, &args, "a.mp4");
    assert_eq!(shape(&longer), (64, 64, 17, Rational::new(48000, 1001).unwrap()));
    assert!(larger.audio.is_none() && longer.audio.is_none());
}

/// The decoder of this VAE adds noise, which depends on the seed and on nothing else of a run.
#[test]
fn decoders_add_noise_unless_they_are_told_not_to() {
    let place = Place::new();
    images(&place);
    let (vae, temporal) = (fixture("tiny-ltx2/vae-alt-tiny.safetensors"), fixture(TEMPORAL));
    let args = |more: &[&str]| {
        let start =
            ["run", "upscale", "--device", "cpu", "--checkpoint-path", &vae, "--temporal-upsampler-path", &temporal];
        let input = ["--video-path", "images", "--frame-rate", "24", "-o", "a.mp4", "--no-metadata"];
        with(start.map(String::from).into(), &[&input[..], more].concat())
    };
    let run = |more: &[&str], variable: Option<&str>| {
        let mut command = place.command(&args(more));
        command.envs(variable.map(|value| ("LTX2_DISABLE_VAE_NOISE", value)));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        place.read("a.mp4")
    };
    let (noisy, other) = (run(&[], None), run(&["--seed", "11"], None));
    assert!(noisy != other, "the decoder adds noise");
    let spared = run(&["--no-decode-noise"], None);
    assert!(spared != noisy && spared != other);
    assert!(run(&["--no-decode-noise", "--seed", "11"], None) == spared, "there is no noise that a seed could change");
    assert!(run(&[], Some("1")) == spared && run(&["--seed", "11"], Some("yes")) == spared);
    assert!(run(&[], Some("0")) == noisy && run(&[], Some("")) == noisy);
}

#[test]
fn what_does_not_fit_is_refused() {
    let place = Place::new();
    clip(&place);
    let (spatial, temporal) = (fixture(SPATIAL), fixture(TEMPORAL));
    let input = ["--video-path", "clip.mp4", "-o", "a.mp4"];
    let refused = |args: &[String], words: &[&str]| {
        place.refused(args, words);
        assert!(!place.path("cache").exists(), "something was compiled");
    };
    let run = |more: &[&str], words: &[&str]| refused(&command("run", &[&input[..], more].concat()), words);
    run(&[], &["needs an upscaler", "--spatial-upsampler-path", "--temporal-upsampler-path"]);
    run(&["--temporal", "--spatial-upsampler-path", &spatial], &["--temporal-upsampler-path"]);
    run(&["--spatial-upsampler-path", &temporal], &["enlarges time by 2", "`--temporal-upsampler-path` instead"]);
    run(&["--temporal-upsampler-path", &spatial], &["rows and columns by 2", "`--spatial-upsampler-path` instead"]);
    let newer = fixture("tiny-ltx23/spatial-upscaler-x2-ltx23-tiny.safetensors");
    run(&["--spatial-upsampler-path", &newer], &["is one of LTX-2.3 or newer, the model is LTX-2"]);
    let wide = tiny().upsampler.display().to_string();
    run(&["--spatial-upsampler-path", &wide], &["latents of 8 channels, the video VAE makes"]);
    let model = fixture("tiny-ltx2/ltx-2-tiny.safetensors");
    run(&["--spatial-upsampler-path", &model], &["is no latent upsampler"]);
    let fits = ["--spatial-upsampler-path", &spatial];
    let run = |more: &[&str], words: &[&str]| run(&[&fits[..], more].concat(), words);
    run(&["-p", "rain"], &["pipeline `upscale` reads no text", "leave `--prompt`"]);
    run(&["--image", &fixture("inputs/image0.png")], &["takes no images", "--image"]);
    run(&["--start-time", "0.1"], &["`--start-time` is about a clip of which a part", "takes a clip (`--video-path`)"]);
    run(&["--steps", "5"], &["`--num-inference-steps` is about steps of denoising, and pipeline `upscale` has none"]);
    run(&["--lora", &fixture("tiny-ltx2/ic-lora-tiny.safetensors")], &["runs no transformer", "leave it out"]);
    run(&["--audio-path", "a.wav"], &["takes no recording", "--audio-path"]);
    refused(&command("run", &[&fits[..], &["-o", "a.mp4"]].concat()), &["needs a clip", "--video-path"]);
    let odd = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/clips/reordered.mp4").display().to_string();
    let args = command("run", &[&fits[..], &["--video-path", &odd, "-o", "a.mp4"]].concat());
    refused(&args, &["`--height 48` is not a multiple of 32", "32 or 64"]);
    // Nowhere else is there a use for a temporal upscaler, and everything else is about a prompt.
    let elsewhere = [
        "run",
        "distilled-one-stage",
        "--checkpoint-path",
        &model,
        "--gemma-root",
        &fixture("tiny-gemma3"),
        "--temporal-upsampler-path",
        &temporal,
        "-o",
        "a.mp4",
        "-p",
        "x",
    ];
    refused(&elsewhere.map(String::from), &["has no use for the temporal upscaler", "--pipeline upscale"]);
    refused(&elsewhere[..10].iter().map(ToString::to_string).collect::<Vec<_>>(), &["`--prompt` is missing"]);
}
