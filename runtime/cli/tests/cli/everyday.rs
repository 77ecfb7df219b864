//! What users do every day.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use ltxc_ir::text::parse;
use ltxc_ir::verify::verify;
use ltxc_runtime::media::mp4::read;
use ltxc_runtime::media::{Rational, load_image};
use serde_json::Value;

use crate::binary::{Done, Place, SHAPE, tiny, with};

/// The lines of `--json`, parsed.
#[track_caller]
fn events(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

fn render(place: &Place, more: &[&str]) -> Done {
    place.ok(&with(tiny().run_args(), more))
}

#[test]
fn synth_compile_and_run_make_a_video() {
    let place = Place::new();
    let made = place.ok(&["synth", "--preset", "tiny", "models"]);
    assert_eq!(made.stdout, "models\n");
    let model = |name: &str| place.path(&format!("models/{name}")).display().to_string();
    let paths =
        [model("ltx-2-tiny.safetensors"), model("gemma-3-tiny"), model("ltx-2-tiny-spatial-upscaler-x2.safetensors")];
    let compile = ["compile", "--checkpoint_path", &paths[0], "--gemma", &paths[1], "--spatial-upsampler", &paths[2]];
    assert_eq!(place.ok(&[&compile[..], &SHAPE, &["-o", "a.ltxplan"]].concat()).stdout, "a.ltxplan\n");
    let done = place.ok(&["run", "a.ltxplan", "--weights", "models", "-p", "a red fox", "-o", "new/fox.mp4"]);
    assert_eq!(done.stdout, "new/fox.mp4\n");
    let movie = ltxc_runtime::media::mp4::read(&place.read("new/fox.mp4")).unwrap();
    let video = movie.video.unwrap();
    assert_eq!((video.width, video.height, video.samples.len()), (64, 64, 9));
    assert!(movie.audio.is_some());
    assert!(movie.tags.contains(&("comment".into(), "a red fox".into())), "{:?}", movie.tags);
    assert!(movie.tags.contains(&("seed".into(), "10".into())), "{:?}", movie.tags);
}

#[test]
fn a_plan_is_not_run_as_another() {
    let place = Place::new();
    let words = |flags: &[&str], words: &[&str]| {
        let args = with(tiny().run_args(), &[&["-p", "x", "-o", "a.mp4"], flags].concat());
        place.refused(&args, &[&["tiny.ltxplan` was compiled", "or compile a plan"], words].concat());
    };
    words(&["--height", "256"], &["with `--height 64`, not with `--height 256`; leave `--height` out"]);
    words(&["--num-frames", "17"], &["with `--num-frames 9`"]);
    words(&["--frame-rate", "30"], &["with `--frame-rate 24`"]);
    words(&["--no-audio"], &["without it, not with `--no-audio`"]);
    words(&["--max-keyframes", "3"], &["with `--max-keyframes 1`"]);
    words(&["--lora-rank", "8"], &["with `--lora-rank 0`"]);
    words(&["--pipeline", "two-stage"], &["with `--pipeline distilled`"]);
    let mut named = with(tiny().run_args(), &["-p", "x", "-o", "a.mp4"]);
    named.insert(1, "two-stage".into());
    place.refused(&named, &["with `--pipeline distilled`, not with `--pipeline two-stage`"]);
    // What it has may be said again, and is told.
    let same = [&SHAPE[..], &["--pipeline", "distilled", "--frame-rate", "24", "--max-keyframes", "1"]].concat();
    let done = render(&place, &[&["-p", "x", "-o", "a.wav"], &same[..]].concat());
    assert!(done.stderr.contains("64x64, 9 frames at 24 per second\n"), "{}", done.stderr);
    place.refused(&["inspect", &tiny().plan.display().to_string(), "--width", "128"], &["with `--width 64`"]);
}

#[test]
fn readers_may_have_enough() {
    let place = Place::new();
    let plan = tiny().plan.display().to_string();
    let mut command = place.command(&["inspect", &plan, "--graph"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The graph is larger than what a pipe holds.
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert!(!done.status.success());
    assert_eq!(String::from_utf8_lossy(&done.stderr), "");
}

#[test]
fn sound_and_frames_are_outputs_too() {
    let place = Place::new();
    render(&place, &["-p", "x", "-o", "a.wav", "-q"]);
    assert_eq!(&place.read("a.wav")[..4], b"RIFF");
    let done = render(&place, &["-p", "x", "-o", "frames", "-q"]);
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("frames\n", ""));
    for i in 0..9 {
        assert_eq!(&place.read(&format!("frames/frame_{i:05}.png"))[1..4], b"PNG");
    }
    assert_eq!(place.read("frames/audio.wav"), place.read("a.wav"));
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let place = Place::new();
    for (name, seed) in [("a.mp4", "7"), ("b.mp4", "7"), ("c.mp4", "8")] {
        render(&place, &["-p", "x", "--seed", seed, "-o", name, "--no-metadata"]);
    }
    assert!(place.read("a.mp4") == place.read("b.mp4"));
    assert!(place.read("a.mp4") != place.read("c.mp4"));
}

#[test]
fn recorded_noise_replaces_the_seed() {
    let place = Place::new();
    let files = [
        ["--ltx2-initial-latent-path", "v1.safetensors"],
        ["--ltx2-audio-latent-path", "a1.safetensors"],
        ["--ltx2-refine-noise-path", "v2.safetensors"],
        ["--ltx2-refine-audio-noise-path", "a2.safetensors"],
    ];
    let files = files.concat();
    for (name, seed) in [("a.mp4", "7"), ("b.mp4", "8")] {
        render(&place, &[&["-p", "x", "--seed", seed, "-o", name, "--no-metadata"], &files[..]].concat());
    }
    assert!(place.read("a.mp4") == place.read("b.mp4"));
    place.write("v1.safetensors", &place.read("a1.safetensors"));
    let args = with(tiny().run_args(), &[&["-p", "x", "-o", "c.mp4"], &files[..]].concat());
    place.refused(&args, &["v1.safetensors", "this run needs"]);
}

#[test]
fn a_bundle_has_all_noise_of_a_run() {
    let place = Place::new();
    render(&place, &["-p", "x", "-o", "frames"]);
    let (lora, own) = (crate::loras::fixture("tiny-ltx2/distilled-lora-tiny"), tiny().run_args());
    let shape = ["--device", "cpu", "--distilled-lora", &lora, "--pipeline", "hq"];
    let hq = with([vec!["run".to_string()], crate::loras::files("ltx2")].concat(), &[&SHAPE[..], &shape].concat());
    let image = ["--image", "frames/frame_00004.png", "8", "0.5"];
    for (i, (start, flags, names)) in [
        (&own, &image[..], &["stage1.video.extra", "stage2.video.extra"][..]),
        (&own, &["--sampler", "euler-a"], &["stage1.step.000.video", "stage1.step.000.audio"]),
        (&hq, &image, &["stage1.video.extra", "stage1.substep.000.audio", "stage2.step.001.video"]),
    ]
    .into_iter()
    .enumerate()
    {
        let bundle = format!("noise{i}");
        let made = |seed: &str, more: &[&str]| {
            let usual = ["-p", "x", "--steps", "2", "--seed", seed, "--no-metadata", "-o", "a.mp4"];
            place.ok(&with(start.clone(), &[&usual, flags, more].concat()));
            place.read("a.mp4")
        };
        let first = made("7", &["--noise-bundle", &bundle]);
        assert!(first == made("7", &[]), "run {i}: saving noise changes it");
        assert!(first == made("8", &["--noise-bundle", &bundle]), "run {i}: some noise is not in the bundle");
        assert!(first != made("8", &[]), "run {i}");
        for name in [&["stage1.video", "stage1.audio", "stage2.video", "stage2.audio"], names].concat() {
            assert!(place.path(&format!("{bundle}/{name}.safetensors")).exists(), "{bundle}/{name}");
        }
    }
}

#[test]
fn images_and_steps_are_free_at_run_time() {
    let place = Place::new();
    render(&place, &["-p", "x", "-o", "frames"]);
    let image = ["--image", "frames/frame_00000.png", "0", "1", "--image", "frames/frame_00004.png", "8", "0.5", "20"];
    render(&place, &[&["-p", "x", "-o", "a.mp4", "--steps", "2", "--image-codec", "embedded"], &image[..]].concat());
    render(&place, &["-p", "x", "-o", "b.mp4", "--sigmas", "1,0.5,0", "--sigmas-stage2", "0.9,0"]);
    assert!(place.read("a.mp4") != place.read("b.mp4"));
}

#[test]
fn long_and_empty_prompts_are_mentioned() {
    let place = Place::new();
    let long = format!("{} at the very end", "a fox ".repeat(900));
    let done = render(&place, &["-p", &long, "-o", "a.wav"]);
    assert!(done.stderr.contains("longer than 1024; cut off: `"), "{}", done.stderr);
    assert!(done.stderr.contains("end`"), "{}", done.stderr);
    let done = render(&place, &["-p", "", "-o", "b.wav"]);
    assert!(done.stderr.contains("the prompt is empty"), "{}", done.stderr);
    place.write("prompt.txt", b"from a file");
    render(&place, &["-p", "@prompt.txt", "-o", "c.wav"]);
}

#[test]
fn events_are_json_lines() {
    let place = Place::new();
    let done = render(&place, &["-p", "", "-o", "a.mp4", "--json"]);
    assert_eq!(done.stderr, "");
    let events = events(&done.stdout);
    let count = |kind: &str| events.iter().filter(|e| e["event"] == kind).count();
    assert!(count("note") >= 2 && count("step") >= 11, "{}", done.stdout);
    assert_eq!(count("stage"), count("stage_end"));
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["path"], &last["facts"]["frames"]), (&"done".into(), &"a.mp4".into(), &9.into()));
    let failed = place.run(&["run", "nope.ltxplan", "-p", "x", "--json"]);
    let error = serde_json::from_str::<Value>(&failed.stdout).unwrap();
    assert_eq!(failed.code, Some(1));
    assert!(error["text"].as_str().unwrap().contains("nope.ltxplan"), "{error}");
}

#[test]
fn inspect_shows_plans_and_graphs() {
    let (place, tiny) = (Place::new(), tiny());
    let plan = tiny.plan.display().to_string();
    let text = place.ok(&["inspect", &plan]).stdout;
    for word in ["stage1", "encode.1024", "64x64, 9 frames at 24 per second", "synthetic weights", "peak"] {
        assert!(text.contains(word), "{text}");
    }
    let facts: Value = serde_json::from_str(&place.ok(&["inspect", &plan, "--json"]).stdout).unwrap();
    assert!(facts["programs"].as_array().is_some_and(|p| p.len() > 10), "{facts}");
    assert!(facts["memory"]["peak_bytes"].as_u64().is_some_and(|n| n > 0), "{facts}");
    assert!(place.ok(&["inspect", &plan, "--graph"]).stdout.contains("fn @"));
    // The graphs of a real model are text that can be read again.
    let args = with(["inspect".to_string()].into_iter().chain(tiny.model_args()).collect(), &SHAPE);
    let graphs = place.ok(&args).stdout;
    let mut programs = 0;
    for graph in graphs.split("; program ").skip(1) {
        let (_, body) = graph.split_once('\n').unwrap();
        let module = parse(body).unwrap();
        verify(&module).unwrap();
        assert_eq!(module.to_string().trim(), body.trim());
        programs += 1;
    }
    assert!(programs > 10, "{programs} programs");
}

#[test]
fn frames_are_blended_to_another_rate() {
    let place = Place::new();
    let image = |folder: &str, i: usize| {
        let path = place.path(&format!("{folder}/frame_{i:05}.png"));
        load_image(&path).unwrap().rgb().iter().map(|&v| f32::from(v)).collect::<Vec<f32>>()
    };
    render(&place, &["-p", "x", "-o", "plain"]);
    render(&place, &["-p", "x", "-o", "blended", "--fps-out", "48"]);
    // Two for each of nine frames; the last one shows until the end.
    assert_eq!(std::fs::read_dir(place.path("blended")).unwrap().count(), 18 + 1);
    assert!(place.read("plain/audio.wav") == place.read("blended/audio.wav"), "sound stays as it is");
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1.0);
    for i in 0..9 {
        assert!(image("blended", 2 * i) == image("plain", i), "frame {i}");
        let next = image("plain", (i + 1).min(8));
        let mean: Vec<f32> = image("plain", i).iter().zip(&next).map(|(a, b)| (a + b) / 2.0).collect();
        // Bytes are cut off, not rounded.
        assert!(near(&image("blended", 2 * i + 1), &mean), "behind frame {i}");
    }
    assert!(!near(&image("plain", 0), &image("plain", 1)), "something moves");

    render(&place, &["-p", "x", "-o", "a.mp4", "--fps-out", "60000/1001", "--save-json"]);
    let movie = read(&place.read("a.mp4")).unwrap();
    let video = movie.video.unwrap();
    // 9 frames at 24 per second last as long as 22.48 of these, of which the last begins in time.
    assert_eq!((video.samples.len(), video.fps), (23, Rational::new(60000, 1001).unwrap()));
    assert!(movie.tags.contains(&("frame_rate".into(), "24 blended to 60000/1001".into())), "{:?}", movie.tags);
    let facts: Value = serde_json::from_slice(&place.read("a.mp4.json")).unwrap();
    assert_eq!((&facts["blended_to"], &facts["frames"]), (&serde_json::json!([60000, 1001]), &23.into()));
    let refused = |more: &[&str], words: &[&str]| {
        place.refused(&with(tiny().run_args(), &[&["-p", "x"], more].concat()), words);
    };
    refused(&["-o", "b.wav", "--fps-out", "48"], &["`--fps-out 48` blends frames", "leave it out"]);
    refused(&["-o", "b.mp4", "--fps-out", "48", "--integer-fps"], &["--fps-out", "--integer-fps"]);
    refused(&["-o", "b.mp4", "--fps-out", "0"], &["--fps-out", "frame rate"]);
}

#[test]
fn doctor_knows_the_machine() {
    let place = Place::new();
    assert!(place.ok(&["doctor"]).stdout.contains("memory "));
    let facts: Value = serde_json::from_str(&place.ok(&["doctor", "--json"]).stdout).unwrap();
    assert!(facts["available_bytes"].as_u64().is_some_and(|n| n > 0), "{facts}");
}

#[test]
fn help_and_versions_are_answers() {
    let place = Place::new();
    for verb in ["compile", "run", "enhance", "inspect", "synth", "bench", "demo", "doctor"] {
        assert!(place.ok(&[verb, "--help"]).stdout.contains("Usage: ltxc"));
    }
    assert!(place.ok(&["--version"]).stdout.starts_with("ltxc "));
}

#[test]
fn a_run_without_a_plan_compiles_once() {
    let (place, tiny) = (Place::new(), tiny());
    let args = |output: &str| {
        let args = ["run".to_string()].into_iter().chain(tiny.model_args()).collect();
        with(args, &[&["-p", "x", "-o", output][..], &SHAPE].concat())
    };
    let cached = || {
        let mut entries = std::fs::read_dir(place.path("cache")).unwrap().map(|e| e.unwrap().path());
        let (one, more) = (entries.next().unwrap(), entries.next());
        assert_eq!(more, None, "one plan");
        (std::fs::metadata(&one).unwrap().modified().unwrap(), std::fs::read(&one).unwrap(), one)
    };
    place.ok(&args("a.mp4"));
    let first = cached();
    place.ok(&args("b.mp4"));
    assert!(cached() == first, "the plan was written again");
    assert!(place.read("a.mp4") == place.read("b.mp4"));
    // A damaged plan in the cache is no reason to fail.
    std::fs::write(&first.2, &first.1[..100]).unwrap();
    place.ok(&args("c.mp4"));
    assert!(cached().1 == first.1);
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_leaves_nothing() {
    let (place, tiny) = (Place::new(), tiny());
    let args = ["compile".to_string()].into_iter().chain(tiny.model_args()).collect();
    place.ok(&with(args, &["--height", "512", "--width", "512", "--num-frames", "121", "-o", "big.ltxplan"]));
    let before = place.listing();
    let folder = tiny.folder.display().to_string();
    let args = ["run", "big.ltxplan", "--weights", &folder, "-p", "x", "-o", "a.mp4", "--json"];
    let mut child = place.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let begun = lines.by_ref().map_while(Result::ok).find(|l| l.contains("stage2") && l.contains("\"stage\""));
    assert!(begun.is_some(), "the second stage begins");
    assert!(place.path("a.mp4.part").exists());
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    lines.for_each(drop);
    let done: Done = child.wait_with_output().unwrap().into();
    assert_eq!(done.code, Some(130), "{}", done.stderr);
    assert!(done.stderr.contains("interrupted"), "{}", done.stderr);
    assert_eq!(place.listing(), before);
}
