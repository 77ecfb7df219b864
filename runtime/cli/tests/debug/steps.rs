//! `ltxc debug step`, `block`, `export`, `loop --compare` and `pipeline`: one call, one block, one run, and every pipeline.

use std::path::{Path, PathBuf};

use ltxc::debug::recording::TensorFile;
use ltxc_runtime::noise_files::{self, Stored};
use serde_json::Value;

use crate::binary::{Done, Place, SHAPE, tiny, with};
use crate::faults::{plant_nan, swap_rows, with_tensor};
use crate::root;

const FAMILIES: [(&str, &str); 2] = [("ltx2", "tiny-ltx2/ltx-2-tiny"), ("ltx23", "tiny-ltx23/ltx-2.3-tiny")];

fn fixture(name: &str) -> PathBuf {
    root().join(format!("{name}.safetensors"))
}

/// The recording `name` of a family.
fn recording(name: &str) -> PathBuf {
    let places = ["expected-1.2.0", "expected"].map(|d| root().join(d).join(format!("{name}.safetensors")));
    places.into_iter().find(|p| p.is_file()).expect("it was recorded")
}

/// A command on a checkpoint alone.
fn on(place: &Place, checkpoint: &Path, command: &[&str], more: &[&str]) -> Done {
    let checkpoint = checkpoint.display().to_string();
    place.run(&[&["debug"], command, &["--checkpoint-path", &checkpoint], more].concat())
}

/// The last line of a command, as JSON.
#[track_caller]
fn facts(done: &Done) -> Value {
    let last = done.stdout.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {}{}", done.stdout, done.stderr))
}

#[test]
fn a_call_agrees_with_the_recording_until_something_is_wrong() {
    let place = Place::new();
    for (family, model) in FAMILIES {
        let (model, file) = (fixture(model), recording(&format!("{family}/transformer")).display().to_string());
        for case in ["uniform", "i2v", "stg", "unequal"] {
            let done = on(&place, &model, &["step"], &["--compare", &file, "--case", case, "--json"]);
            assert_eq!(done.code, Some(0), "{family} {case}: {}{}", done.stdout, done.stderr);
            let found = facts(&done);
            let names: Vec<&str> =
                found["tensors"].as_array().unwrap().iter().filter_map(|t| t["tensor"].as_str()).collect();
            for name in [format!("{case}.velocity.video"), format!("{case}.x0.audio")] {
                assert!(names.contains(&name.as_str()), "{name} of {names:?}");
            }
            // The table of sound for the other stream is its own one.
            for name in ["prep.video.cross_rope_cos", "prep.audio.rope_sin"].iter().filter(|_| case == "uniform") {
                assert!(names.contains(name), "{name} of {names:?}");
            }
        }
        let key = "model.diffusion_model.transformer_blocks.1.scale_shift_table";
        let rows = if family == "ltx2" { 6 } else { 9 };
        let faulty = with_tensor(&place, &model, key, |bytes| swap_rows(bytes, rows, 0, 1));
        let done = on(&place, &faulty, &["step"], &["--compare", &file, "--json"]);
        assert_eq!((done.code, facts(&done)["first"]["tensor"].as_str()), (Some(1), Some("uniform.block1.video")));
        let done = on(&place, &faulty, &["step"], &["--compare", &file, "--outputs-only", "--json"]);
        assert_eq!((done.code, facts(&done)["first"]["tensor"].as_str()), (Some(1), Some("uniform.velocity.video")));
    }
    let file = recording("ltx2/transformer").display().to_string();
    let done = on(&place, &fixture(FAMILIES[0].1), &["step"], &["--compare", &file, "--case", "nothing"]);
    assert!(done.code == Some(1) && done.stderr.contains("no case `nothing`"), "{}", done.stderr);
    let done = on(&place, &fixture(FAMILIES[1].1), &["step"], &["--compare", &file]);
    assert!(done.code == Some(1) && done.stderr.contains("this model takes"), "{}", done.stderr);
}

#[test]
fn a_block_is_judged_apart_from_those_before_it() {
    let place = Place::new();
    let model = fixture(FAMILIES[1].1);
    for format in ["safetensors", "pt", "npz"] {
        let out = format!("call.{format}");
        let done = on(&place, &model, &["export"], &["--out", &out]);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let done = on(&place, &model, &["step"], &["--compare", &out]);
        assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    }
    let file = TensorFile::open(&place.path("call.pt")).unwrap();
    for name in [
        "in.video.latent",
        "uniform.sigma_audio",
        "uniform.block0.video",
        "uniform.blocks.1.attn2.to_k",
        "prep.video.x",
    ] {
        assert!(file.find(name).is_some(), "no {name}");
    }
    let block = |model: &Path, number: &str| on(&place, model, &["block", number], &["--compare", "call.pt", "--json"]);
    for number in ["0", "1"] {
        let done = block(&model, number);
        assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    }
    let key = "model.diffusion_model.transformer_blocks.0.attn2.to_v.weight";
    let faulty = with_tensor(&place, &model, key, |bytes| bytes.fill(0));
    let done = block(&faulty, "0");
    assert_eq!((done.code, facts(&done)["first"]["tensor"].as_str()), (Some(1), Some("uniform.blocks.0.attn2.to_v")));
    assert_eq!(block(&faulty, "1").code, Some(0), "block 1 is right, whatever block 0 does");
    let done = on(&place, &faulty, &["step"], &["--compare", "call.pt"]);
    assert!(done.stdout.contains("first divergence: uniform.blocks.0.attn2.to_v"), "{}", done.stdout);
    let done = block(&model, "7");
    assert!(done.code == Some(1) && done.stderr.contains("uniform.block6.video"), "{}", done.stderr);
    // A recording that was thinned, or has nothing between blocks, cannot feed one.
    let recorded = recording("ltx23/transformer").display().to_string();
    let done = on(&place, &model, &["block", "1"], &["--compare", &recorded, "--json"]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
}

#[test]
fn velocity_taken_for_the_prediction_is_named() {
    let place = Place::new();
    let model = fixture(FAMILIES[0].1);
    let done = on(&place, &model, &["step"], &["--sigma", "0.7", "--velocity"]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.contains("video at σ 0.70000"), "{}", done.stdout);
    let recorded = recording("ltx2/transformer");
    let check = |file: &Path| {
        on(&place, &model, &["step"], &["--outputs-only", "--velocity", "--compare", &file.display().to_string()])
    };
    let done = check(&recorded);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    // A file of a port that returns what the model gives.
    let tensors: Vec<Stored> = (TensorFile::open(&recorded).unwrap().iter())
        .filter(|(name, _)| name.starts_with("in.") || name.starts_with("uniform."))
        .map(|(name, t)| Stored::f32(name, &t.ty.shape, t.to_f32()))
        .collect();
    let velocity = tensors.iter().find(|t| t.name == "uniform.velocity.video").unwrap().values.clone();
    let faulty: Vec<Stored> = tensors
        .into_iter()
        .map(|t| if t.name == "uniform.x0.video" { Stored { values: velocity.clone(), ..t } } else { t })
        .collect();
    noise_files::write_all(&place.path("faulty.safetensors"), &faulty).unwrap();
    let done = check(&place.path("faulty.safetensors"));
    assert!(done.code == Some(1) && done.stdout.contains("it is the velocity itself"), "{}", done.stdout);
}

#[test]
fn a_step_of_a_pipeline_is_looked_at_where_it_stands() {
    let place = Place::new();
    let step = |more: &[&str]| {
        let args = [&["debug".to_string(), "step".into()], &tiny().model_args()[..], &SHAPE.map(String::from)].concat();
        place.run(&with(args, &[&["--pipeline", "distilled-one-stage", "--velocity"], more].concat()))
    };
    let done = step(&["--trace", "--at", "2"]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    for words in ["blocks.0.attn1.to_q (", "video.velocity (", "video at σ", "audio at σ"] {
        assert!(done.stdout.contains(words), "no {words} in {}", done.stdout);
    }
    let done = step(&["--at", "8"]);
    assert!(done.code == Some(1) && done.stderr.contains("no step 8"), "{}", done.stderr);
    // Its inputs are those of the run, and nothing was recorded of it.
    for more in [
        &["--sigma", "0.5"][..],
        &["--inputs", "a.pt"],
        &["--case", "i2v"],
        &["--grid", "2,2,2"],
        &["--text-tokens", "8"],
        &["--compare", "a.pt"],
        &["--limit", "0.1"],
    ] {
        crate::binary::sentence(&step(more), &[more[0], "cannot be used with", "--pipeline"]);
    }
}

#[test]
fn a_call_alone_takes_no_flags_of_runs() {
    let (place, model) = (Place::new(), fixture(FAMILIES[0].1));
    for more in [
        &["--at", "2"][..],
        &["--prompt", "a fox"],
        &["--height", "64"],
        &["--num-frames", "9"],
        &["--dtype", "bf16"],
        &["--no-audio"],
        &["--cfg", "3"],
        &["--lora-rank", "4"],
    ] {
        crate::binary::sentence(&on(&place, &model, &["step"], more), &["--pipeline"]);
    }
    let done = on(&place, &model, &["step"], &["--device", "cpu", "--grid", "1,2,2", "--text-tokens", "64"]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
}

/// A port that lets queries see as many keys as there are queries.
#[test]
fn text_attention_over_too_few_keys_shows_at_its_layer() {
    let place = Place::new();
    for (family, model) in FAMILIES {
        let model = fixture(model);
        place.ok(&[
            "debug",
            "export",
            "--checkpoint-path",
            &model.display().to_string(),
            "--text-tokens",
            "64",
            "--out",
            "call.safetensors",
        ]);
        let file = TensorFile::open(&place.path("call.safetensors")).unwrap();
        let inputs = |name: &&str| name.starts_with("in.") || name.ends_with("timesteps") || name.contains(".sigma");
        let mut tensors: Vec<Stored> = (file.iter())
            .filter(|(name, _)| inputs(name) && !name.starts_with("prep."))
            .map(|(name, t)| Stored::f32(name, &t.ty.shape, t.to_f32()))
            .collect();
        noise_files::write_all(&place.path("right.safetensors"), &tensors).unwrap();
        let queries = file.find("in.video.latent").unwrap().ty.shape[1];
        assert!(queries < 64);
        let visible = (0..64).map(|i| if i < queries { 1.0 } else { 0.0 }).collect();
        tensors.push(Stored::f32("uniform.context_mask", &[1, 64], visible));
        noise_files::write_all(&place.path("wrong.safetensors"), &tensors).unwrap();
        for name in ["right", "wrong"] {
            let done = on(&place, &model, &["step"], &["--trace", "--inputs", &format!("{name}.safetensors")]);
            assert_eq!(done.code, Some(0), "{}", done.stderr);
            place.write(&format!("{name}.log"), done.stdout.as_bytes());
        }
        let done = place.run(&["debug", "compare", "wrong.log", "right.log", "--json"]);
        let found = facts(&done);
        assert!(
            found["first"]["key"].as_str().unwrap().starts_with("blocks.0.attn2.mixed"),
            "{family}: {}",
            found["first"]
        );
        assert!(found["likely_cause"].as_str().unwrap().contains("queries' length used for keys"));
        assert_eq!(place.run(&["debug", "compare", "right.log", "right.log"]).code, Some(0));
    }
}

/// A copy of a recorded run with another parameter of the same length.
fn with_parameter(place: &Place, source: &Path, name: &str, from: &str, to: &str) -> PathBuf {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(source).unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("it has the parameter");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    place.write(name, &bytes)
}

#[test]
fn guided_runs_are_compared_step_by_step() {
    let place = Place::new();
    let gemma = root().join("tiny-gemma3").display().to_string();
    for (family, model) in FAMILIES {
        let compare = |file: &Path| {
            let file = file.display().to_string();
            on(&place, &fixture(model), &["loop"], &["--gemma-root", &gemma, "--compare", &file, "--json"])
        };
        let recorded = recording(&format!("e2e/{family}/one_stage"));
        let done = compare(&recorded);
        assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
        // The same run with another scale of guidance is another run, from the first guided prediction on.
        let (from, to) = (r#"\"cfg_scale\": 3.0"#, r#"\"cfg_scale\": 4.0"#);
        let other = with_parameter(&place, &recorded, "one_stage.safetensors", from, to);
        let done = compare(&other);
        let first = facts(&done)["first"]["tensor"].as_str().unwrap_or_default().to_string();
        assert_eq!((done.code, first.as_str()), (Some(1), "one_stage/stage1.step0.video.denoised"), "{}", done.stderr);
    }
    let other = place.write("something.safetensors", &std::fs::read(recording("e2e/ltx2/one_stage")).unwrap());
    let args = ["--gemma-root", &gemma, "--compare", &other.display().to_string()];
    crate::binary::sentence(&on(&place, &fixture(FAMILIES[0].1), &["loop"], &args), &["named like no run", "retake"]);
}

#[test]
fn every_pipeline_makes_a_clip() {
    let place = Place::new();
    let done =
        place.run(&["debug", "pipeline", "all", "--preset", "tiny", "--steps", "3", "--json", "--device", "cpu"]);
    let runs: Vec<Value> = done.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    let names: Vec<&str> = runs.iter().filter_map(|r| r["pipeline"].as_str()).collect();
    for name in [
        "distilled",
        "distilled-one-stage",
        "one-stage",
        "two-stage",
        "hq",
        "retake",
        "retake-guided",
        "t2a",
        "keyframes",
        "a2v",
        "ic-lora",
        "dubit",
        "hdr-ic-lora",
        "upscale",
    ] {
        assert!(names.contains(&name), "no {name} in {names:?}");
    }
    for run in &runs {
        // A clip is encoded, upsampled and decoded.
        let least = if run["pipeline"] == "upscale" { 3 } else { 4 };
        assert!(run["ok"] == true && run["stage_sums"].as_array().unwrap().len() >= least, "{run}");
        assert!(run["pipeline"] == "t2a" || run["video"]["frames"] == 9, "{run}");
        assert_eq!(run["pipeline"] == "hdr-ic-lora", run["video"]["light"]["max"].is_number(), "{run}");
    }
    // A value that is not finite, and a model without its LoRA.
    let key = "model.diffusion_model.transformer_blocks.1.attn1.to_k.weight";
    let faulty = with_tensor(&place, &tiny().checkpoint, key, plant_nan);
    let of = |name: &str, checkpoint: &Path| {
        let args = ["debug", "pipeline", name, "--device", "cpu", "--json"].map(String::from);
        place.run(&[&args[..], &tiny().model_args_with(checkpoint, &tiny().gemma)].concat())
    };
    let done = of("distilled-one-stage", &faulty);
    let flag = facts(&done)["flags"][0].as_str().unwrap().to_string();
    assert!(done.code == Some(1) && flag.contains("transformer.blocks.1.") && flag.contains("NaN"), "{flag}");
    assert_eq!(of("distilled-one-stage", &tiny().checkpoint).code, Some(0));
    let refused = |name: &str, words: &[&str]| {
        let args = [&["debug".to_string(), "pipeline".into(), name.into()], &tiny().model_args()[..]].concat();
        crate::binary::sentence(&place.run(&args), words);
    };
    refused("two-stage", &["`two-stage` needs the distilled LoRA"]);
    refused("three-stage", &["no pipeline", "distilled-one-stage"]);
}

#[test]
fn a_whole_loop_tells_of_latents_and_frames() {
    let place = Place::new();
    let args = [&["debug".to_string(), "loop".into()], &tiny().model_args()[..], &SHAPE.map(String::from)].concat();
    let done = place.run(&with(args, &["--full", "--json", "--pipeline", "distilled-one-stage"]));
    let lines: Vec<Value> = done.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.iter().filter(|l| l["coherence"].is_number()).count(), 8, "{}", done.stderr);
    assert!(lines.iter().any(|l| l["frames"] == 9 && l["noise_ratio"].is_number()), "{}", done.stdout);
    // What decides about the exit code is told.
    let last = &lines.last().unwrap()["final_latent"];
    assert!(last["std"].is_number() && (last["ok"] == true || done.code == Some(1)), "{last}");
}

#[test]
fn pipelines_that_need_more_than_a_prompt_are_refused() {
    let place = Place::new();
    let refused = |command: &[&str], words: &[&str]| {
        crate::binary::sentence(&place.run(&command.iter().map(|s| s.to_string()).collect::<Vec<_>>()), words);
    };
    let alone = ["`retake` needs more than a prompt", "name another pipeline"];
    refused(&["debug", "bisect", "retake", "--preset", "tiny"], &alone);
    refused(&["debug", "latents", "--step", "0", "--pipeline", "retake"], &alone);
    refused(&["debug", "latents", "--step", "0", "--pipeline", "t2a"], &["`t2a` makes no video"]);
}
