//! Pipelines that are given keyframes, a recording, reference videos, or a clip to dub: prompt to file, and what is said when
//! something is missing or does not fit.

use std::path::Path;

use ltxc_runtime::media::mp4::{Movie, read};
use ltxc_runtime::media::{ColourSpace, exr_frames, load_image};

use crate::binary::{Place, SHAPE, fixtures, with};
use crate::inputs::{is_like, stripes};

fn fixture(name: &str) -> String {
    fixtures().join(name).display().to_string()
}

/// `run --pipeline` with the files of a family; outputs are 9 frames of 128x128.
fn run(family: &str, pipeline: &str, more: &[&str]) -> Vec<String> {
    let (model, upsampler) = match family {
        "ltx2" => ("tiny-ltx2/ltx-2-tiny.safetensors", "tiny-ltx2/spatial-upscaler-x2-tiny.safetensors"),
        _ => ("tiny-ltx23/ltx-2.3-tiny.safetensors", "tiny-ltx23/spatial-upscaler-x2-ltx23-tiny.safetensors"),
    };
    let files = [fixture(model), fixture("tiny-gemma3"), fixture(upsampler)];
    let flags = [
        ("--checkpoint-path", files[0].as_str()),
        ("--gemma-root", &files[1]),
        ("--spatial-upsampler-path", &files[2]),
        ("--pipeline", pipeline),
        ("--device", "cpu"),
        ("--height", "128"),
        ("--width", "128"),
        ("--num-frames", "9"),
        ("-p", "rain"),
        ("-o", "a.mp4"),
    ];
    // What is asked for replaces the usual, and no pipeline is none.
    let usual = flags.into_iter().filter(|(flag, value)| !more.contains(flag) && !value.is_empty());
    let usual = usual.flat_map(|(flag, value)| [flag.to_string(), value.to_string()]);
    with(["run".to_string()].into_iter().chain(usual).collect(), more)
}

/// Runs, and reads what it wrote.
#[track_caller]
fn movie(place: &Place, args: &[String]) -> Movie {
    place.ok(args);
    read(&place.read("a.mp4")).unwrap()
}

#[track_caller]
fn size(movie: &Movie) -> (usize, usize, usize) {
    let video = movie.video.as_ref().expect("a picture");
    (video.width as usize, video.height as usize, video.samples.len())
}

/// A folder of `n` grey images of 64x64, each a little brighter.
fn folder(place: &Place, name: &str, n: u8) -> String {
    std::fs::create_dir(place.path(name)).unwrap();
    for i in 0..n {
        let mut png = Vec::new();
        ltxc_runtime::media::png::write(64, 64, &[40 + 3 * i; 64 * 64 * 3], &mut png).unwrap();
        place.write(&format!("{name}/{i:02}.png"), &png);
    }
    name.into()
}

/// Refused before anything is compiled.
#[track_caller]
fn refused(place: &Place, args: &[String], words: &[&str]) {
    place.refused(args, words);
    assert!(!place.path("cache").exists(), "something was compiled");
}

#[test]
fn videos_pass_through_keyframes() {
    let place = Place::new();
    let (first, last) = (fixture("inputs/image0.png"), fixture("inputs/image2.png"));
    let distilled = fixture("tiny-ltx2/distilled-lora-tiny.safetensors");
    let images = ["--image", &first, "0", "--image", &last, "8", "0.9", "--num-inference-steps", "2"];
    let run = |pipeline: &str, more: &[&str]| run("ltx2", pipeline, &[&images[..], more].concat());
    refused(&place, &run("keyframes", &[]), &["pipeline `keyframes` needs the distilled LoRA", "--distilled-lora"]);
    let made = movie(&place, &run("keyframes", &["--distilled-lora", &distilled]));
    assert_eq!(size(&made), (128, 128, 9));
    assert!(made.audio.is_some());
    // The official name of the pipeline, and other bytes than where the first image replaces a latent.
    let again = movie(&place, &run("keyframe_interpolation", &["--distilled-lora", &distilled]));
    assert_eq!(again.video, made.video);
    let replaced = movie(&place, &run("two-stage", &["--distilled-lora", &distilled]));
    assert_ne!(replaced.video, made.video);
}

#[test]
fn a_recording_is_kept() {
    let place = Place::new();
    let (sound, distilled) = (fixture("inputs/audio.wav"), fixture("tiny-ltx23/distilled-lora-tiny.safetensors"));
    let run = |more: &[&str]| {
        run("ltx23", "a2v", &[&["--distilled-lora", &distilled, "--num-inference-steps", "2"], more].concat())
    };
    let made = movie(&place, &run(&["--audio-path", &sound]));
    assert_eq!(size(&made), (128, 128, 9));
    // 9 frames at 24 per second, at the recording's 16 kHz.
    assert_eq!(made.audio.expect("the recording").rate_hz, 16_000);
    place.ok(&run(&["--audio-path", &sound, "--audio-start-time", "0.2", "-o", "a.wav"]));
    let (written, original) = (place.read("a.wav"), std::fs::read(&sound).unwrap());
    let left = |bytes: &[u8], at: usize| i16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let channels = i16::from_le_bytes([original[22], original[23]]) as usize;
    for i in [0, 1, 100, 4000] {
        let (found, expected) = (left(&written, 44 + 4 * i), left(&original, 44 + 2 * channels * (3200 + i)));
        assert!((found - expected).abs() <= 1, "sample {i} is {found}, it was {expected}");
    }
    std::fs::remove_file(place.path("a.mp4")).unwrap();
    place.refused(&run(&[]), &["pipeline `a2v` needs a recording", "--audio-path"]);
    place.refused(&run(&["--audio-path", "gone.wav"]), &["gone.wav"]);
    place.refused(&run(&["--audio-path", &sound, "--audio-start-time", "99"]), &["audio.wav", "99"]);
    place.refused(&run(&["--audio-path", &sound, "--audio-max-duration", "0"]), &["--audio-max-duration 0", "above 0"]);
    // Less than a transform takes is continued with silence.
    place.ok(&run(&["--audio-path", &sound, "--audio-max-duration", "0.02", "-o", "a.wav"]));
}

#[test]
fn references_have_the_size_that_the_lora_says() {
    let place = Place::new();
    let frames = folder(&place, "frames", 9);
    let (plain, half) =
        (fixture("tiny-ltx2/ic-lora-tiny.safetensors"), fixture("tiny-ltx2/ic-lora-ref2-tiny.safetensors"));
    let run = |more: &[&str]| run("ltx2", "ic-lora", &[&["--video-conditioning", &frames], more].concat());
    refused(&place, &run(&[]), &["pipeline `ic-lora` needs an IC-LoRA", "--lora"]);
    refused(&place, &run(&["--lora", &half, "--height", "192"]), &["height of 96 pixels", "multiple of 64"]);
    let whole = movie(&place, &run(&["--lora", &plain]));
    let halved = movie(&place, &run(&["--lora", &half]));
    assert_eq!((size(&whole), size(&halved)), ((128, 128, 9), (128, 128, 9)));
    assert_ne!(whole.video, halved.video);
    let one = movie(&place, &run(&["--lora", &half, "--skip-stage-2"]));
    assert_eq!(size(&one), (64, 64, 9));
    let skipping = |height: &str, words: &[&str]| {
        place.refused(&run(&["--lora", &half, "--skip-stage-2", "--height", height]), words);
    };
    skipping("100", &["`--height 100` is not a multiple of 64", "64 or 128"]);
    skipping("101", &["`--height 101` is odd", "give an even number"]);

    // What acts less is another picture, and a strength of 1 is none.
    let weaker = movie(&place, &run(&["--lora", &half, "--conditioning-attention-strength", "0.5"]));
    let full = movie(&place, &run(&["--lora", &half, "--conditioning-attention-strength", "1"]));
    assert_eq!(full.video, halved.video);
    assert_ne!(weaker.video, halved.video);
    let masked = movie(&place, &run(&["--lora", &half, "--conditioning-attention-mask", &frames, "0.5"]));
    assert!(masked.video != weaker.video && masked.video != halved.video);
}

/// A plan with room for strengths, and none given, is one without: references then attend to each other, too.
#[test]
fn without_strengths_nothing_is_masked() {
    let place = Place::new();
    let frames = folder(&place, "frames", 9);
    let lora = fixture("tiny-ltx2/ic-lora-ref2-tiny.safetensors");
    let sound = |more: &[&str]| {
        let video = ["--video-conditioning", &frames, "--video-conditioning", &frames];
        place.ok(&run("ltx2", "ic-lora", &[&["--lora", &lora, "-o", "a.wav"], &video[..], more].concat()));
        place.read("a.wav")[44..].as_chunks::<2>().0.iter().map(|b| i16::from_le_bytes(*b)).collect::<Vec<_>>()
    };
    let plain = sound(&[]);
    let largest = |other: Vec<i16>| plain.iter().zip(&other).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    let with_room = largest(sound(&["--reference-attention"]));
    let full = largest(sound(&["--reference-attention", "--conditioning-attention-strength", "1"]));
    let weaker = largest(sound(&["--conditioning-attention-strength", "0.5"]));
    // A mask of ones adds zeros; the kernel may add in another order.
    assert!(with_room <= 1 && full <= 1 && weaker > 20, "{with_room} {full} {weaker}");
}

/// One frame, and then every second one: what is between is not looked at.
#[test]
fn references_have_the_frames_that_the_lora_says() {
    let place = Place::new();
    let header = [("reference_downscale_factor", "2"), ("reference_temporal_scale_factor", "2")];
    place.write("slow.safetensors", &crate::loras::with_header("tiny-ltx2/ic-lora-tiny", &header));
    let video = |lora: &str, frames: &str, seen: Option<usize>| {
        if !place.path(frames).exists() {
            folder(&place, frames, 17);
        }
        if let Some(i) = seen {
            let mut png = Vec::new();
            ltxc_runtime::media::png::write(64, 64, &[255; 64 * 64 * 3], &mut png).unwrap();
            place.write(&format!("{frames}/{i:02}.png"), &png);
        }
        let more = ["--lora", lora, "--video-conditioning", frames, "--num-frames", "17"];
        movie(&place, &run("ltx2", "ic-lora", &more)).video.unwrap().samples
    };
    let slow = video("slow.safetensors", "a", None);
    assert!(slow == video("slow.safetensors", "b", Some(2)), "frame 2 is looked at");
    assert!(slow == video("slow.safetensors", "b", Some(16)), "frame 16 is looked at");
    assert!(slow != video("slow.safetensors", "b", Some(3)), "frame 3 is not looked at");
    assert!(slow != video("slow.safetensors", "c", Some(15)), "frame 15 is not looked at");
    let every = video(&fixture("tiny-ltx2/ic-lora-ref2-tiny.safetensors"), "a", None);
    assert!(every != slow, "the factor changes nothing");
    // The plan of the run says what it takes of the frames.
    let plan = std::fs::read_dir(place.path("cache")).unwrap().map(|entry| entry.unwrap().path().display().to_string());
    let scales: std::collections::BTreeSet<(u64, u64)> = plan
        .map(|plan| {
            let facts: serde_json::Value =
                serde_json::from_str(&place.ok(&["inspect", &plan, "--json"]).stdout).unwrap();
            let reference = &facts["pipeline"]["inputs"]["references"][0];
            (reference["time_scale"].as_u64().unwrap(), reference["frames"].as_u64().unwrap())
        })
        .collect();
    assert_eq!(scales, [(1, 17), (2, 9)].into());
}

#[test]
fn references_that_do_not_fit_are_refused() {
    let place = Place::new();
    let (frames, short) = (folder(&place, "frames", 9), folder(&place, "short", 8));
    let half = fixture("tiny-ltx2/ic-lora-ref2-tiny.safetensors");
    let run = |more: &[&str]| run("ltx2", "ic-lora", &[&["--lora", &half], more].concat());
    place.ok(&run(&["--video-conditioning", &frames, "-o", "a.wav"]));
    // One that is shorter guides as far as it goes, in whole latents.
    place.ok(&run(&["--video-conditioning", &short, "-o", "a.wav"]));
    for (flags, words) in [
        (&[][..], &["needs a reference video", "--video-conditioning"][..]),
        (&["--video-conditioning", "gone.mp4"], &["gone.mp4"]),
        (&["--video-conditioning", &frames, "2"], &["strength 2", "0 to 1"]),
        (&["--video-conditioning", &frames, "x"], &["strength `x` is not a number"]),
        (
            &["--video-conditioning", &frames, "--reference-video", "b.mp4"],
            &["takes no reference video", "leave `--reference-video` out"],
        ),
        (
            &["--video-conditioning", &frames, "--audio-path", "b.wav"],
            &["takes no recording", "leave `--audio-path` out"],
        ),
    ] {
        place.refused(&run(&[&["-o", "b.wav"], flags].concat()), words);
    }
    let attention = ["--video-conditioning", &frames, "--conditioning-attention-strength"];
    place.ok(&run(&[&attention[..], &["0.5", "-o", "a.wav"]].concat()));
    place.refused(&run(&[&attention[..], &["1.5", "-o", "b.wav"]].concat()), &["strength 1.5", "0 to 1"]);
    let twice = [&attention[..], &["0.5", "--conditioning-attention-mask", &frames, "0.5", "-o", "b.wav"]].concat();
    place.refused(&run(&twice), &["give one of them"]);
    let mask = ["--video-conditioning", &frames, "--conditioning-attention-mask", &short, "-o", "b.wav"];
    place.refused(&run(&mask), &["the mask `short` has 8 frames, the video has 9"]);
    place.refused(
        &run(&["--video-conditioning", &frames, "--lora", &half, "1", "stage=2"]),
        &["take no LoRA", "stage="],
    );
}

#[test]
fn a_plan_for_references_says_what_they_are() {
    let place = Place::new();
    let frames = folder(&place, "frames", 9);
    let (plain, half) =
        (fixture("tiny-ltx2/ic-lora-tiny.safetensors"), fixture("tiny-ltx2/ic-lora-ref2-tiny.safetensors"));
    let mut compile = run("ltx2", "ic-lora", &["--reference-count", "2", "--lora", &half]);
    compile[0] = "compile".into();
    compile.retain(|arg| arg != "-p" && arg != "rain");
    let output = compile.iter().position(|arg| arg == "a.mp4").unwrap();
    compile[output] = "a.ltxplan".into();
    place.ok(&compile);
    let weights = fixtures().display().to_string();
    let run = |more: &[&str]| {
        let start = ["run", "a.ltxplan", "--weights", &weights, "-p", "x", "-o", "a.wav"].map(String::from);
        with(start.into(), more)
    };
    let video = ["--video-conditioning", &frames];
    let both = [&video[..], &video].concat();
    place.refused(&run(&both), &["pipeline `ic-lora` needs an IC-LoRA"]);
    let words = ["downscale factor 2", "the LoRA with 1 and 1", "compile the plan with `--lora"];
    place.refused(&run(&[&both[..], &["--lora", &plain]].concat()), &words);
    let lora = ["--lora", &half];
    place.refused(
        &run(&[&video[..], &lora].concat()),
        &["takes 2 reference videos, 1 are given", "--reference-count 1"],
    );
    let short = folder(&place, "short", 8);
    let shorter = [&video[..], &["--video-conditioning", &short], &lora].concat();
    place.refused(&run(&shorter), &["`short` has 8 frames, 9 are needed"]);
    let acts = ["--conditioning-attention-strength", "0.5"];
    place.refused(&run(&[&both[..], &lora, &acts].concat()), &["without strengths", "--reference-attention"]);
    place.ok(&run(&[&both[..], &lora].concat()));
}

#[test]
fn a_clip_is_dubbed_in_its_own_length() {
    let place = Place::new();
    // Any clip with sound: what another pipeline makes. Its 17 frames are not those of the flags.
    place.ok(&run("ltx2", "distilled", &["--num-frames", "17", "-o", "clip.mp4"]));
    std::fs::remove_dir_all(place.path("cache")).unwrap();
    let lora = fixture("tiny-ltx2/ic-lora-ref2-tiny.safetensors");
    let dub = |pipeline: &str, more: &[&str]| {
        let mut args = run("ltx2", pipeline, more);
        let frames = args.iter().position(|arg| arg == "--num-frames").unwrap();
        args.drain(frames..frames + 2);
        args
    };
    refused(&place, &dub("dubit", &["--reference-video", "clip.mp4"]), &["pipeline `dubit` needs an IC-LoRA"]);
    let two = ["--reference-video", "clip.mp4", "--lora", &lora, "--lora", &lora];
    refused(&place, &dub("dubit", &two), &["runs with one LoRA", "leave `"]);
    let made = movie(&place, &dub("dubit", &["--reference-video", "clip.mp4", "--lora", &lora]));
    assert_eq!(size(&made), (128, 128, 17));
    assert!(made.audio.is_some());
    let again = movie(&place, &dub("lipdub", &["--reference-video", "clip.mp4", "--lora", &lora]));
    assert_eq!((&again.video, &again.audio), (&made.video, &made.audio));
    let weaker = ["--reference-video", "clip.mp4", "--reference-strength", "0.5", "--lora", &lora];
    assert_ne!(movie(&place, &dub("dubit", &weaker)).video, made.video);

    place.refused(&run("ltx2", "dubit", &["--lora", &lora]), &["needs a reference video", "--reference-video"]);
    let silent = folder(&place, "silent", 17);
    let flags = ["--reference-video", &silent, "--frame-rate", "24", "--lora", &lora];
    place.refused(&dub("dubit", &flags), &["silent", "no sound"]);
    let other = ["--reference-video", "clip.mp4", "--video-conditioning", &silent, "--lora", &lora];
    place.refused(&dub("dubit", &other), &["takes no reference video", "leave `--video-conditioning` out"]);
}

/// LoRAs of other pipelines are refused as ever, and those with references where there are none.
#[test]
fn loras_with_references_are_refused_elsewhere() {
    let place = Place::new();
    let lora = fixture("tiny-ltx2/ic-lora-ref2-tiny.safetensors");
    let distilled = fixture("tiny-ltx2/distilled-lora-tiny.safetensors");
    let (frames, sound) = (folder(&place, "frames", 9), fixture("inputs/audio.wav"));
    let image = fixture("inputs/image0.png");
    for (pipeline, brings) in [("keyframes", &["--image", &image][..]), ("a2v", &["--audio-path", &sound])] {
        let args = run("ltx2", pipeline, &[&["--lora", &lora, "--distilled-lora", &distilled], brings].concat());
        refused(&place, &args, &["is an IC-LoRA", &format!("pipeline `{pipeline}` takes none")]);
    }
    let other = fixture("tiny-ltx23/distilled-lora-tiny.safetensors");
    refused(
        &place,
        &run("ltx2", "ic-lora", &["--video-conditioning", &frames, "--lora", &other]),
        &["looks like a LoRA of LTX-2.3"],
    );
    refused(
        &place,
        &run("ltx2", "keyframes", &["--image", &image, "--distilled-lora", &other]),
        &["looks like a LoRA of LTX-2.3"],
    );
    let skipped = run("ltx2", "keyframes", &["--image", &image, "--skip-stage-2", "--distilled-lora", &distilled]);
    refused(&place, &skipped, &["`--skip-stage-2` is for pipeline `ic-lora`"]);
}

#[test]
fn pipelines_have_the_names_of_other_tools() {
    let place = Place::new();
    let own = |args: &[&str]| run("ltx2", "", args);
    let sentence = |args: &[String], words: &[&str]| refused(&place, args, words);
    for (flag, name) in [("--two-stage", "two-stage"), ("--two-stages-hq", "hq"), ("--two_stages", "two-stage")] {
        sentence(&own(&[flag]), &[&format!("pipeline `{name}` needs the distilled LoRA")]);
    }
    sentence(&own(&["--two-stage", "--pipeline", "hq"]), &["`two-stage` and `hq` are both asked for"]);
    let lora = "needs the distilled LoRA";
    for (name, words) in [
        ("ti2vid_two_stages", lora),
        ("ti2vid_two_stages_hq", lora),
        ("keyframe", "pipeline `keyframes` passes through images"),
        ("a2vid_two_stage", "pipeline `a2v` needs a recording"),
        ("ic_lora", "pipeline `ic-lora` needs a reference video"),
        ("lipdub", "pipeline `dubit` needs a reference video"),
    ] {
        let mut args = own(&[]);
        args.insert(1, name.into());
        sentence(&args, &[words]);
    }
    let mut args = own(&[]);
    args.insert(1, "dfr".into());
    sentence(&args, &["pipeline `dfr` needs an embedding", "`keyframes`"]);
    let mut args = own(&["-o", "a.wav"]);
    args.insert(1, "generate".into());
    place.ok(&args);
    assert!(Path::new(&place.path("a.wav")).exists());
}

/// The reference seeds the noise of the steps of its best pipeline with constants.
#[test]
fn noise_of_steps_can_be_that_of_every_seed() {
    let place = Place::new();
    let distilled = fixture("tiny-ltx2/distilled-lora-tiny.safetensors");
    let noise = [
        ["--ltx2-initial-latent-path", "v1.npy"],
        ["--ltx2-audio-latent-path", "a1.npy"],
        ["--ltx2-refine-noise-path", "v2.npy"],
        ["--ltx2-refine-audio-noise-path", "a2.npy"],
    ];
    let start = [&noise.concat()[..], &["--distilled-lora", &distilled, "--steps", "2", "--no-decode-noise"]].concat();
    let made = |more: &[&str]| movie(&place, &run("ltx2", "hq", &[&start[..], more].concat())).video;
    let (first, second) = (made(&["--seed", "1"]), made(&["--seed", "2"]));
    assert_ne!(first, second);
    let fixed = made(&["--seed", "1", "--compat", "official"]);
    assert!(fixed != first && fixed == made(&["--seed", "2", "--compat", "official"]));
    let other = with(crate::binary::tiny().run_args(), &["-p", "x", "-o", "b.mp4", "--compat", "official"]);
    place.refused(&other, &["--compat official", "res2s", "`distilled`"]);
}

#[test]
fn outputs_are_written_as_asked() {
    let place = Place::new();
    let run = |more: &[&str]| with(crate::binary::tiny().run_args(), &[&["-p", "rain", "-o", "a.mp4"], more].concat());
    let fine = movie(&place, &run(&["--crf", "5"]));
    let coarse = movie(&place, &run(&["--crf", "45", "--save-json"]));
    let bytes = |movie: &Movie| movie.video.as_ref().unwrap().samples.iter().map(|s| s.data.len()).sum::<usize>();
    assert!(bytes(&coarse) < bytes(&fine));
    let facts: serde_json::Value = serde_json::from_slice(&place.read("a.mp4.json")).unwrap();
    assert_eq!((&facts["prompt"], &facts["seed"], &facts["frames"]), (&"rain".into(), &10.into(), &9.into()));
    assert_eq!(facts["plan_hash"].as_str().map(str::len), Some(64));
    // A distilled model reads no negative prompt.
    assert!(facts["negative_prompt"].is_null() && facts["images"].as_array().is_some_and(Vec::is_empty));
    let stages: Vec<_> =
        facts["stages"].as_array().unwrap().iter().map(|s| (s["steps"].as_u64(), s["loras"].to_string())).collect();
    assert_eq!(stages, [(Some(8), "[]".into()), (Some(3), "[]".into())]);
    assert!(facts["stages"][0]["guidance"].is_null() && facts["stages"][0]["sampler"].is_string());
    let lora = fixture("tiny-ltx2/distilled-lora-tiny.safetensors");
    let (image, guided) =
        (fixture("inputs/image0.png"), ["--distilled-lora", &lora, "0.8", "--num-inference-steps", "2"]);
    let more = ["--image", &image, "0", "0.9", "--cfg", "2.5", "--save-json"];
    place.ok(&self::run("ltx2", "two-stage", &[&guided[..], &more].concat()));
    let facts: serde_json::Value = serde_json::from_slice(&place.read("a.mp4.json")).unwrap();
    assert!(facts["negative_prompt"].as_str().is_some_and(|text| text.len() > 100));
    assert_eq!(facts["images"], serde_json::json!([{"path": image, "frame": 0, "strength": 0.9, "crf": 33}]));
    assert_eq!(
        (&facts["stages"][0]["steps"], &facts["stages"][0]["guidance"]["video"]["cfg"]),
        (&2.into(), &2.5.into())
    );
    assert_eq!(facts["stages"][1]["loras"], serde_json::json!([{"path": lora, "strength": 0.8}]));
    // What says how it was made is not missing from what was made.
    std::fs::remove_file(place.path("a.mp4.json")).unwrap();
    std::fs::remove_file(place.path("a.mp4")).unwrap();
    std::fs::create_dir(place.path("a.mp4.json")).unwrap();
    place.refused(&run(&["--save-json"]), &["a.mp4.json", "which is a folder"]);
    std::fs::remove_dir(place.path("a.mp4.json")).unwrap();
    place.refused(&run(&["--crf", "52"]), &["52", "--crf"]);
    for output in ["frames", "a.wav"] {
        let with =
            |more: &[&str]| with(crate::binary::tiny().run_args(), &[&["-p", "rain", "-o", output], more].concat());
        place.refused(&with(&["--crf", "20"]), &["`--crf 20`", output, "leave it out", ".mp4"]);
        place.refused(&with(&["--integer-fps"]), &["`--integer-fps`", output, "leave it out", ".mp4"]);
    }

    let compile = ["compile".to_string()].into_iter().chain(crate::binary::tiny().model_args()).collect();
    place.ok(&with(compile, &[&SHAPE[..], &["--frame-rate", "24000/1001", "-o", "slow.ltxplan"]].concat()));
    let weights = crate::binary::tiny().folder.display().to_string();
    let slow = |more: &[&str]| {
        let args = ["run", "slow.ltxplan", "--weights", &weights, "-p", "x", "-o", "a.mp4"].map(String::from);
        movie(&place, &with(args.into(), more)).video.unwrap().fps
    };
    let rate = |num, den| ltxc_runtime::media::Rational::new(num, den).unwrap();
    assert_eq!((slow(&[]), slow(&["--integer-fps"])), (rate(24000, 1001), rate(23, 1)));
}

#[test]
fn references_with_a_high_dynamic_range_are_seen_as_their_signal() {
    let place = Place::new();
    let lora = fixture("tiny-ltx2/ic-lora-tiny.safetensors");
    let (images, frames) = (stripes(&place, "images", false), stripes(&place, "frames", true));
    let run = |more: &[&str]| run("ltx2", "ic-lora", &[&["--lora", &lora], more].concat());
    place.ok(&run(&["--video-conditioning", &images, "-o", "eight"]));
    place.ok(&run(&["--video-conditioning", &frames, "--hdr", "ACESCCT", "-o", "hdr"]));
    place.ok(&run(&["--video-conditioning", &frames, "--hdr", "SRGB_LINEAR", "-o", "light"]));
    for frame in 0..9 {
        let signal = is_like(&place, "hdr", "eight", frame);
        let light = exr_frames::read(&place.path(&format!("light/frame_{frame:05}.exr"))).unwrap();
        assert_ne!(light.rgb, signal.rgb);
    }
    place.refused(&run(&["--video-conditioning", &frames, "-o", "b"]), &["holds EXR frames", "--hdr SRGB_LINEAR"]);
}

#[test]
fn loras_for_a_high_dynamic_range_make_light_of_eight_bits() {
    let place = Place::new();
    let (lora, images) = (fixture("tiny-ltx2/ic-lora-tiny.safetensors"), stripes(&place, "images", false));
    let run =
        |more: &[&str]| run("ltx2", "ic-lora", &[&["--lora", &lora, "--video-conditioning", &images], more].concat());
    place.ok(&run(&["-o", "eight"]));
    place.ok(&run(&["--hdr", "LOGC3", "-o", "light"]));
    for frame in 0..9 {
        let light = exr_frames::read(&place.path(&format!("light/frame_{frame:05}.exr"))).unwrap();
        let bytes = load_image(&place.path(&format!("eight/frame_{frame:05}.png"))).unwrap();
        let signal = light.rgb.as_chunks::<3>().0.iter().flat_map(|&rgb| ColourSpace::LogC3.to_signal(rgb));
        for (found, byte) in signal.zip(bytes.rgb()) {
            let expected = f32::from(*byte) / 255.0;
            assert!((expected - 1e-3..=expected + 1.0 / 255.0 + 1e-3).contains(&found), "{found} for {byte}");
        }
    }
}
