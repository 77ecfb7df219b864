//! `ltxc doctor`: what this machine offers.

use anyhow::Result;
use ltxc_models::checkpoint::hub;
use ltxc_runtime::media::ffmpeg::Ffmpeg;
use ltxc_runtime::memory::{available, readable};
use serde_json::json;

use crate::compile::{cache_folder, version};

/// `ltxc doctor`.
///
/// # Errors
/// None at present: what is missing is part of the report.
pub fn run(as_json: bool) -> Result<()> {
    let threads = rayon::current_num_threads();
    let cache = cache_folder().ok();
    let plans = cache.as_ref().map_or(0, |c| std::fs::read_dir(c).map_or(0, Iterator::count));
    let hub = hub::cache();
    let ffmpeg = Ffmpeg::find().map(|f| f.program().display().to_string());
    if as_json {
        let facts = json!({
            "version": version(), "devices": [{"backend": "cpu", "threads": threads}],
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
    println!("devices    cpu: {threads} threads");
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
