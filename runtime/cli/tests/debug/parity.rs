//! `ltxc debug parity` against the recordings of the repository.

use crate::root;
use serde_json::Value;

use crate::binary::Place;

#[test]
fn everything_that_was_recorded_agrees() {
    let place = Place::new();
    let reference = root().display().to_string();
    let done = place.run(&["debug", "parity", "--reference", &reference, "--json"]);
    let models: Vec<Value> = done.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(models.len(), 2, "{}", done.stderr);
    for model in &models {
        for component in model["components"].as_array().unwrap() {
            assert_eq!(component["ok"], true, "{component}");
            assert!(component["tensors"].as_u64() > Some(0));
        }
        let names: Vec<&str> =
            model["components"].as_array().unwrap().iter().filter_map(|c| c["component"].as_str()).collect();
        assert_eq!(names, ["text", "transformer", "upsampler", "video_vae", "audio_vae", "vocoder", "runs"]);
        // Layers inside are compared, not only results.
        let tensors: Vec<&str> =
            model["tensors"].as_array().unwrap().iter().filter_map(|t| t["tensor"].as_str()).collect();
        for name in [
            "pos.hidden.0",
            "uniform.block0.video",
            "enc.conv_in",
            "dec.conv_in",
            "dec.mid.block_1",
            "ups0",
            "distilled/stage1.step0.video.denoised",
            "one_stage/stage1.step0.audio.denoised",
        ] {
            assert!(tensors.contains(&name), "`{name}` was not compared");
        }
        // Every run that was recorded of the model.
        let guided = match model["model"].as_str().is_some_and(|name| name.contains("ltx2/")) {
            true => ["distilled_i2v_tiled/", "two_stages_i2v/", "keyframes/", "ic_lora/", "ic_lora_ref2/"],
            false => ["one_stage_i2v_skip/", "two_stages_hq/stage2.call0", "a2vid/", "retake/", "one_stage/"],
        };
        for run in guided {
            assert!(tensors.iter().any(|name| name.starts_with(run)), "nothing of `{run}` was compared");
        }
        // Which blocks of the decoder keep a value of their own depends on the model's upsamplers.
        assert!(tensors.iter().any(|name| name.starts_with("dec.up")), "no block of the decoder was compared");
    }
    assert_eq!(done.code, Some(0));
}

#[test]
fn recorded_schedules_are_the_same() {
    let place = Place::new();
    let file = root().join("expected/common/schedules.safetensors").display().to_string();
    let done = place.ok(&["debug", "schedule", "--compare", &file]);
    assert!(done.stdout.lines().count() > 30, "{}", done.stdout);
    assert!(place.ok(&["debug", "schedule", "--steps", "8"]).stdout.contains("linear_quadratic"));
    // The file of another recording has none.
    let other = root().join("expected/common/rope.safetensors").display().to_string();
    place.refused(&["debug", "schedule", "--compare", &other], &["rope.safetensors", "no schedule"]);
}

#[test]
fn what_cannot_be_compared_is_told() {
    let place = Place::new();
    place.refused(&["debug", "parity", "--reference", "nowhere"], &["nowhere", "no folder"]);
    let reference = root().display().to_string();
    place.refused(
        &["debug", "parity", "--reference", &reference, "--only", "everything"],
        &["everything", "expected text"],
    );
}
