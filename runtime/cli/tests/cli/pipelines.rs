//! Pipelines from the command line: models that they do not fit, choices that a plan has no room for, sound alone.

use crate::binary::{Place, SHAPE, tiny, with};

/// `compile` with the small model under another name, and these flags.
fn compile_as(place: &Place, name: &str, flags: &[&str]) -> Vec<String> {
    let path = place.path(name);
    if !path.exists() {
        std::fs::hard_link(&tiny().checkpoint, &path)
            .or_else(|_| std::fs::copy(&tiny().checkpoint, &path).map(drop))
            .unwrap();
    }
    let files = tiny().model_args_with(&path, &tiny().gemma);
    with(["compile".to_string()].into_iter().chain(files).collect(), &[flags, &["-o", "a.ltxplan"]].concat())
}

#[track_caller]
fn refused(name: &str, flags: &[&str], words: &[&str]) {
    let place = Place::new();
    let args = compile_as(&place, name, &[flags, &SHAPE].concat());
    place.refused(&args, words);
}

#[test]
fn checkpoints_of_the_other_training_are_refused() {
    for pipeline in ["one-stage", "two-stage", "hq", "ti2vid_one_stage", "t2a", "keyframes", "a2v", "retake-guided"] {
        let words = ["ltx-2-tiny-distilled.safetensors", "is a distilled model", "CFG", "name the dev checkpoint"];
        refused("ltx-2-tiny-distilled.safetensors", &["--pipeline", pipeline], &words);
    }
    for pipeline in ["distilled", "distilled-one-stage", "ic-lora", "dubit", "retake"] {
        let words = ["ltx-2-tiny-dev.safetensors", "is a dev model", "name the distilled checkpoint"];
        refused("ltx-2-tiny-dev.safetensors", &["--pipeline", pipeline], &words);
    }
    let place = Place::new();
    place.ok(&compile_as(&place, "ltx-2-tiny-dev.safetensors", &[&["--pipeline", "one-stage"], &SHAPE[..]].concat()));
}

#[test]
fn guidance_of_a_distilled_model_is_refused() {
    for flags in [&["--cfg", "3"][..], &["--stg", "1"], &["--apg-eta", "0.5"], &["--video-skip-step", "1"]] {
        refused("model.safetensors", flags, &["guidance", "pipeline `distilled` has none", "take it"]);
    }
    let args = with(tiny().run_args(), &["-p", "x", "-o", "a.mp4", "--cfg", "3"]);
    Place::new().refused(&args, &["--video-cfg-guidance-scale", "pipeline `distilled` has none"]);
}

#[test]
fn guidance_that_the_model_cannot_follow_is_refused() {
    let guided = |flags: &[&str], words: &[&str]| {
        refused("model.safetensors", &[&["--pipeline", "one-stage"], flags].concat(), words);
    };
    guided(&["--stg-blocks", "7"], &["block 7 is to be skipped"]);
    guided(&["--cfg", "nan"], &["scale is NaN"]);
    guided(&["--cfg-rule", "star", "--apg-eta", "1"], &["--apg-", "--cfg-rule apg"]);
    guided(&["--cfg-rule", "none"], &["none", "plain"]);
    refused("model.safetensors", &["--pipeline", "t2a", "--no-audio"], &["sound alone", "--no-audio"]);
    for pipeline in ["a2v", "dubit"] {
        let words = format!("pipeline `{pipeline}` is about sound");
        refused("model.safetensors", &["--pipeline", pipeline, "--no-audio"], &[&words, "leave `--no-audio` out"]);
    }
    guided(&["--stg-mode", "both", "--audio-stg-guidance-scale", "1"], &["--stg-mode", "leave `--audio-stg"]);
}

#[test]
fn a_plan_says_what_it_was_not_compiled_for() {
    let place = Place::new();
    let shape = [&["--pipeline", "one-stage", "--a2v-guidance-scale", "1", "--v2a-guidance-scale", "1"], &SHAPE[..]];
    place.ok(&compile_as(&place, "model.safetensors", &shape.concat()));
    let folder = tiny().folder.display().to_string();
    let run = |flags: &[&str], words: &[&str]| {
        let args = [&["run", "a.ltxplan", "--weights", &folder, "-p", "x", "-o", "a.mp4"], flags].concat();
        place.refused(&args, words);
    };
    run(&["--stg-blocks", "0"], &["stage1", "blocks [", "ltxc compile"]);
    run(&["--stg", "0"], &["stage1", "ltxc compile"]);
    run(&["--modality", "3"], &["no program for the passes", "isolated"]);
    run(&["--audio-skip-step", "1"], &["skips audio", "--audio-skip-step"]);
    run(&["--steps", "3", "--sigmas", "1,0"], &["give one of them"]);
    run(&["--sigmas", "1,0", "--schedule", "beta"], &["--schedule", "give one of them"]);
    run(&["--steps", "0"], &["1 to 1000 steps", "0 were"]);
    let more = ["--cfg", "5", "--cfg-rule", "apg", "--sampler", "ge", "--schedule", "linear-quadratic", "--steps", "2"];
    let args = [&["run", "a.ltxplan", "--weights", &folder, "-p", "x", "-o", "a.mp4"], &more[..]].concat();
    let done = place.ok(&args);
    for word in
        ["stage1: 2 steps, gradient estimation", "video CFG projected 5", "audio CFG projected 7", "STG 1 in blocks"]
    {
        assert!(done.stderr.contains(word), "{word}: {}", done.stderr);
    }
}

#[test]
fn two_stages_of_a_full_model_need_its_distilled_lora() {
    let place = Place::new();
    let folder = tiny().folder.display().to_string();
    for pipeline in ["two-stage", "hq", "keyframes", "a2v"] {
        place.ok(&compile_as(&place, "model.safetensors", &[&["--pipeline", pipeline], &SHAPE[..]].concat()));
        let args = ["run", "a.ltxplan", "--weights", &folder, "-p", "x", "-o", "a.mp4"];
        place.refused(&args, &[pipeline, "needs the distilled LoRA", "--distilled-lora"]);
    }
    let one = ["--pipeline", "two-stage", "--height", "32", "--width", "64", "--num-frames", "9"];
    place.refused(&compile_as(&place, "model.safetensors", &one), &["--height 32", "multiple of 64", "two-stage"]);
    let frames = ["--pipeline", "hq", "--height", "64", "--width", "64", "--num-frames", "12"];
    place.refused(&compile_as(&place, "model.safetensors", &frames), &["--num-frames 12", "8k+1"]);
}

#[test]
fn sound_alone_and_silent_videos() {
    let place = Place::new();
    let folder = tiny().folder.display().to_string();
    let run = |output: &str| {
        let args = ["run", "a.ltxplan", "--weights", &folder, "-p", "rain", "--steps", "2", "-o", output];
        args.map(String::from).to_vec()
    };
    place.ok(&compile_as(&place, "model.safetensors", &["--pipeline", "t2a", "--num-frames", "9"]));
    place.ok(&run("rain.wav"));
    let wav = place.read("rain.wav");
    assert!(wav.starts_with(b"RIFF") && wav.len() > 1000);
    place.ok(&run("again.wav"));
    assert_eq!(wav, place.read("again.wav"));
    place.write("a.png", b"");
    place.refused(&run("frames"), &["sound alone", ".wav"]);

    let silent = [&["--pipeline", "one-stage", "--no-audio"], &SHAPE[..]].concat();
    place.ok(&compile_as(&place, "model.safetensors", &silent));
    place.refused(&run("b.wav"), &["b.wav", "the plan makes none"]);
    place.ok(&run("b.mp4"));
    assert!(!place.read("b.mp4").is_empty());
}

#[test]
fn guidance_can_depend_on_the_noise_level() {
    let place = Place::new();
    place.ok(&compile_as(&place, "model.safetensors", &[&["--pipeline", "one-stage"], &SHAPE[..]].concat()));
    let folder = tiny().folder.display().to_string();
    let run = |flags: &[&str]| {
        let args = ["run", "a.ltxplan", "--weights", &folder, "-p", "x", "--steps", "3", "-o", "a.wav"];
        [&args, flags].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    let sound = |flags: &[&str]| {
        place.ok(&run(flags));
        place.read("a.wav")
    };
    let table = |text: &str| place.write("table.toml", text.as_bytes());
    table("[[level]]\nup_to = 1.0\naudio-cfg-guidance-scale = 2.0\n");
    let even = sound(&["--guidance-table", "table.toml"]);
    assert!(even == sound(&["--cfg-audio", "2"]), "one level is like flags");
    // Two noise levels of three steps are above 0.5: 1 and 0.9.
    table("[[level]]\nup_to = 1.0\ncfg_audio = 4\n[[level]]\nup_to = 0.5\ncfg_audio = 2\n");
    let split = sound(&["--guidance-table", "table.toml"]);
    assert!(split != even && split != sound(&["--cfg-audio", "4"]), "levels do nothing");
    table("[[level]]\nup_to = 1.0\nstg = 0\n");
    place.refused(&run(&["--guidance-table", "table.toml"]), &["stage1", "self attention of video", "ltxc compile"]);
    place.refused(&run(&["--guidance-table", "gone.toml"]), &["guidance table `gone.toml`"]);
    let distilled = with(tiny().run_args(), &["-p", "x", "-o", "b.wav", "--guidance-table", "table.toml"]);
    place.refused(&distilled, &["--guidance-table", "pipeline `distilled` has none"]);
}

#[test]
fn one_scale_of_stg_can_hold_for_either() {
    let place = Place::new();
    let compile = |mode: &str| {
        let flags = ["--pipeline", "one-stage", "--stg", "0.5", "--stg-mode", mode];
        place.ok(&compile_as(&place, "model.safetensors", &[&flags, &SHAPE[..]].concat()));
        let folder = tiny().folder.display().to_string();
        let args = ["run", "a.ltxplan", "--weights", &folder, "-p", "x", "--steps", "1", "-o", "a.wav"];
        place.ok(&args).stderr
    };
    let stderr = compile("audio");
    assert!(stderr.contains("audio CFG 7, STG 0.5") && !stderr.contains("video CFG 3, STG"), "{stderr}");
    let stderr = compile("both");
    assert!(stderr.contains("audio CFG 7, STG 0.5") && stderr.contains("video CFG 3, STG 0.5"), "{stderr}");
}
