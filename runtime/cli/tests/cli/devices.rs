//! Devices: which are named, which plans run on them, and what is said where one is missing.

use serde_json::Value;

use crate::binary::{Place, SHAPE, has_vulkan, tiny, with};

/// Compiles the small model for a device.
#[track_caller]
fn compile_for(place: &Place, device: &str, plan: &str) {
    let compile = with(["compile".to_string()].into_iter().chain(tiny().model_args()).collect(), &SHAPE);
    place.ok(&with(compile, &["--device", device, "-o", plan]));
}

/// `run <plan>` with the small model's weights.
fn run(plan: &str, more: &[&str]) -> Vec<String> {
    let folder = tiny().folder.display().to_string();
    with(["run", plan, "--weights", &folder, "-p", "x", "-o", "a.mp4"].map(String::from).into(), more)
}

#[test]
fn plans_for_gpus_are_compiled_without_one() {
    let place = Place::new();
    for (device, backend) in [("vulkan", "wgpu"), ("metal", "wgpu"), ("cuda", "cuda"), ("cpu", "cpu")] {
        compile_for(&place, device, "a.ltxplan");
        let facts: Value = serde_json::from_str(&place.ok(&["inspect", "a.ltxplan", "--json"]).stdout).unwrap();
        assert_eq!(facts["target"]["backend"], backend);
        let alignment = if backend == "cpu" { 64 } else { 512 };
        assert_eq!(facts["target"]["alignment"], alignment);
    }
}

#[test]
fn a_plan_runs_on_what_it_was_compiled_for() {
    let place = Place::new();
    compile_for(&place, "vulkan", "gpu.ltxplan");
    compile_for(&place, "cpu", "cpu.ltxplan");
    place.refused(&run("gpu.ltxplan", &["--device", "cpu"]), &["`wgpu`", "`cpu`", "--device cpu"]);
    place.ok(&run("cpu.ltxplan", &[]));
    place.ok(&run("cpu.ltxplan", &["--device", "cpu"]));
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let place = Place::new();
    place.refused(&run("a.ltxplan", &["--device", "gpu"]), &["`gpu` is no device", "cuda:0", "vulkan:0", "metal"]);
    compile_for(&place, "cuda", "cuda.ltxplan");
    place.refused(&run("cuda.ltxplan", &["--device", "cuda:99"]), &["no device `cuda:99`", "`cpu`"]);
    place.refused(&run("cuda.ltxplan", &["--device", "vulkan:99"]), &["no device `vulkan:99`", "`cpu`"]);
}

#[test]
fn doctor_lists_devices_and_what_is_missing() {
    let place = Place::new();
    let facts: Value = serde_json::from_str(&place.ok(&["doctor", "--json"]).stdout).unwrap();
    let devices = facts["devices"].as_array().unwrap();
    assert_eq!(devices.last().unwrap()["name"], "cpu");
    let backends = |name: &str| devices.iter().any(|d| d["backend"] == name);
    let missing = facts["missing_devices"].as_array().unwrap();
    let explained = |name: &str| missing.iter().any(|m| m.as_str().unwrap().starts_with(name));
    assert!(backends("cuda") != explained("cuda"), "{facts}");
    assert!(backends("wgpu") != (explained("vulkan") || explained("metal")), "{facts}");
    let text = place.ok(&["doctor"]);
    assert_eq!(text.stderr, "");
    for device in devices {
        assert!(text.stdout.contains(device["name"].as_str().unwrap()), "{}", text.stdout);
    }
}

/// What the last event of a command with `--json` says.
fn facts_of(stdout: &str) -> Value {
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "done");
    last["facts"].clone()
}

#[test]
fn a_run_on_vulkan_makes_a_video() {
    let place = Place::new();
    if !has_vulkan(&place) {
        return;
    }
    compile_for(&place, "vulkan", "a.ltxplan");
    let done = place.ok(&run("a.ltxplan", &["--device", "vulkan:0", "-q"]));
    assert_eq!(done.stderr, "");
    let movie = ltxc_runtime::media::mp4::read(&place.read("a.mp4")).unwrap();
    assert_eq!(movie.video.unwrap().samples.len(), 9);
}

#[test]
fn kernels_are_stored_and_counted() {
    let place = Place::new();
    if !has_vulkan(&place) {
        return;
    }
    compile_for(&place, "metal", "plain.ltxplan");
    let inspect =
        |plan: &str| -> Value { serde_json::from_str(&place.ok(&["inspect", plan, "--json"]).stdout).unwrap() };
    assert_eq!(inspect("plain.ltxplan")["kernels"], Value::Null);
    place.refused(&["inspect", "plain.ltxplan", "--kernels"], &["plain.ltxplan", "no kernels", "ltxc tune"]);
    let tune = ["tune", "plain.ltxplan", "--device", "vulkan:0", "-o", "a.ltxplan", "--json"];
    let facts = facts_of(&place.ok(&tune).stdout);
    let sources = facts["sources"].as_u64().unwrap();
    assert!(sources > 20 && facts["compiled"] == 0, "{facts}");
    let tuned = facts["tuned"].as_u64().unwrap();
    assert!(tuned > 20, "{facts}");
    assert_eq!(inspect("a.ltxplan")["kernels"]["sources"], sources);
    let text = place.ok(&["inspect", "a.ltxplan"]).stdout;
    assert!(text.contains(&format!("the sources of {sources}")), "{text}");
    assert!(text.contains(&format!("the tiles of {tuned} calls were measured")), "{text}");
    assert_eq!(place.ok(&["inspect", "a.ltxplan", "--kernels"]).stdout.matches("@compute").count() as u64, sources);

    // The run says how many it compiled: all, and none that the plan does not know. This device has no simdgroups.
    let done = place.ok(&run("a.ltxplan", &["--device", "vulkan:0", "--json"]));
    let kernels = facts_of(&done.stdout)["kernels"].clone();
    assert_eq!(kernels["launched"], kernels["compiled"]);
    let launched = kernels["launched"].as_u64().unwrap();
    assert!((20..=sources).contains(&launched), "{launched} of {sources}");
    for words in [
        &format!("{launched} launched, {launched} compiled in this run"),
        "carries sources only",
        "the plan is for f16 8x8, f32 8x8, which vulkan:0 lacks",
    ] {
        assert!(done.stdout.contains(words), "{}", done.stdout);
    }
}

#[test]
fn compiled_plans_carry_the_same_kernels_every_time() {
    let place = Place::new();
    if !has_vulkan(&place) {
        return;
    }
    compile_for(&place, "vulkan:0", "a.ltxplan");
    compile_for(&place, "vulkan:0", "b.ltxplan");
    assert!(place.read("a.ltxplan") == place.read("b.ltxplan"), "the same kernels make the same file");
    let facts: Value = serde_json::from_str(&place.ok(&["inspect", "a.ltxplan", "--json"]).stdout).unwrap();
    assert!(facts["kernels"]["sources"].as_u64().unwrap() > 20, "{}", facts["kernels"]);
}

#[test]
fn frozen_runs_compile_nothing() {
    let place = Place::new();
    compile_for(&place, "cpu", "cpu.ltxplan");
    place.ok(&run("cpu.ltxplan", &["--frozen", "-q"]));
    place.refused(&["tune", "cpu.ltxplan"], &["cpu.ltxplan", "part of this program"]);
    if !has_vulkan(&place) {
        return;
    }
    compile_for(&place, "vulkan", "a.ltxplan");
    let words = ["`vulkan:0`", "--frozen", "forbids", "leave `--frozen` out"];
    place.refused(&run("a.ltxplan", &["--device", "vulkan:0", "--frozen"]), &words);
}

#[test]
fn memory_of_a_plan_is_that_of_its_device() {
    let place = Place::new();
    let peaks = ["cpu", "vulkan"].map(|device| {
        compile_for(&place, device, "a.ltxplan");
        let text = place.ok(&["inspect", "a.ltxplan"]).stdout;
        assert_eq!(text.contains("memory of the device over time"), device == "vulkan", "{text}");
        let facts: Value = serde_json::from_str(&place.ok(&["inspect", "a.ltxplan", "--json"]).stdout).unwrap();
        assert_eq!(facts["memory"]["is_on_gpu"], device == "vulkan");
        let parts = facts["memory"]["parts"].as_array().unwrap();
        assert_eq!(parts.iter().any(|part| part["weight_bytes"].as_u64().unwrap() > 0), device == "vulkan");
        facts["memory"]["peak_bytes"].as_u64().unwrap()
    });
    assert_ne!(peaks[0], peaks[1]);
}
