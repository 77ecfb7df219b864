//! Devices: which are named, which plans run on them, and what is said where one is missing.

use serde_json::Value;

use crate::binary::{Place, SHAPE, tiny, with};

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

#[test]
fn a_run_on_vulkan_makes_a_video() {
    let place = Place::new();
    let facts: Value = serde_json::from_str(&place.ok(&["doctor", "--json"]).stdout).unwrap();
    if !facts["devices"].as_array().unwrap().iter().any(|d| d["name"] == "vulkan:0") {
        let is_required = std::env::var("LTXC_REQUIRE_VULKAN").is_ok_and(|v| v == "1");
        assert!(!is_required, "no Vulkan device: {facts}");
        return println!("absent: no Vulkan device");
    }
    compile_for(&place, "vulkan:0", "a.ltxplan");
    let done = place.ok(&run("a.ltxplan", &["--device", "vulkan:0", "-q"]));
    assert_eq!(done.stderr, "");
    let movie = ltxc_runtime::media::mp4::read(&place.read("a.mp4")).unwrap();
    assert_eq!(movie.video.unwrap().samples.len(), 9);
}
