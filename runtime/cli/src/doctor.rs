//! `ltxc doctor`: what this machine offers.

use anyhow::Result;
use ltxc_models::checkpoint::hub;
use ltxc_runtime::backend::{Device, DeviceKind, find};
use ltxc_runtime::media::ffmpeg::Ffmpeg;
use ltxc_runtime::memory::{available, readable};
use serde_json::{Value, json};

use crate::compile::{cache_folder, version};

/// `ltxc doctor`.
///
/// # Errors
/// None at present: what is missing is part of the report.
pub fn run(as_json: bool) -> Result<()> {
    let found = find(None);
    let cache = cache_folder().ok();
    let plans = cache.as_ref().map_or(0, |c| std::fs::read_dir(c).map_or(0, Iterator::count));
    let hub = hub::cache();
    let ffmpeg = Ffmpeg::find().map(|f| f.program().display().to_string());
    if as_json {
        let facts = json!({
            "version": version(), "devices": found.devices.iter().map(facts_of).collect::<Vec<_>>(),
            "missing_devices": found.missing.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "available_bytes": available(), "cache": cache, "cached_plans": plans, "hub_cache": hub, "ffmpeg": ffmpeg,
        });
        println!("{facts}");
        return Ok(());
    }
    let path = |p: &Option<std::path::PathBuf>| match p {
        Some(p) if p.exists() => p.display().to_string(),
        Some(p) => format!("{} (not there yet)", p.display()),
        None => "none; set LTXC_CACHE or HOME".into(),
    };
    println!("{}", version());
    for (i, device) in found.devices.iter().enumerate() {
        let label = if i == 0 { "devices" } else { "" };
        println!("{label:<10} {}: {}, {}", device.name, device.description, words(device));
    }
    found.missing.iter().for_each(|missing| println!("           {missing}"));
    println!("memory     {} available", readable(available()));
    println!("cache      {} ({plans} plans)", path(&cache));
    println!("hub cache  {}", path(&hub));
    println!("codecs     H.264 (openh264), AAC (syom), PNG, WAV: built in");
    match ffmpeg {
        Some(program) => println!("ffmpeg     {program}: image round trips as in the reference"),
        None => println!("ffmpeg     not found: image round trips by the built-in codec, calibrated to libx264"),
    }
    Ok(())
}

fn kind(device: &Device) -> &'static str {
    match device.kind {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Gpu => "gpu",
        DeviceKind::Integrated => "integrated",
        DeviceKind::Software => "software",
    }
}

fn facts_of(device: &Device) -> Value {
    let mut facts = json!({
        "name": device.name.to_string(), "backend": device.name.backend(), "description": device.description,
        "kind": kind(device), "memory_bytes": device.memory_bytes, "features": device.features, "target": device.target,
        "problem": device.problem,
    });
    if device.kind == DeviceKind::Cpu {
        facts["threads"] = json!(rayon::current_num_threads());
    }
    facts
}

fn words(device: &Device) -> String {
    if let Some(problem) = &device.problem {
        return format!("cannot be used: {problem}");
    }
    let memory = match device.kind {
        DeviceKind::Cpu => return device.features.join(", "),
        DeviceKind::Gpu => format!("{} of its own", readable(device.memory_bytes)),
        DeviceKind::Integrated => format!("{} shared", readable(device.memory_bytes)),
        DeviceKind::Software => "software: only when it is named".into(),
    };
    format!("{memory}, {}", device.features.join(", "))
}
