//! What stands in the file of `--save-json`: how an output was made, for machines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use ltxc_ir::plan::{Plan, Stage};
use ltxc_runtime::adapters::StageAdapters;
use ltxc_runtime::pipeline::StageChoice;
use serde_json::{Value, json};

/// The file beside `output`: its name with `.json` behind it.
///
/// # Errors
/// A folder that stands in its place.
pub fn beside(output: &Path) -> Result<PathBuf> {
    let mut name = output.as_os_str().to_os_string();
    name.push(".json");
    let path = PathBuf::from(name);
    if path.is_dir() {
        bail!("`--save-json` writes `{}`, which is a folder; move it, or name another output", path.display());
    }
    Ok(path)
}

/// Noise levels, sampler, guidance and LoRAs of every stage, for machines.
pub fn sampling(plan: &Plan, stages: &BTreeMap<String, StageChoice>, adapters: &StageAdapters) -> Value {
    let of_stage = |stage: &Stage| {
        let choice = stages.get(&stage.name);
        let sigmas = choice.and_then(|c| c.sigmas.as_ref()).unwrap_or(&stage.sigmas);
        let guidance = choice.and_then(|c| c.guidance.as_ref()).or(stage.guidance.as_ref());
        let set = adapters.of(&stage.name);
        // As short as it was typed, not with the digits that f32 adds.
        let loras = set
            .members()
            .map(|(path, strength)| json!({"path": path, "strength": strength.to_string().parse::<f64>().ok()}));
        let mut facts = json!({
            "name": &stage.name, "steps": sigmas.len().saturating_sub(1), "sigmas": sigmas,
            "sampler": choice.and_then(|c| c.sampler).unwrap_or(stage.sampler), "guidance": guidance,
            "loras": loras.collect::<Vec<_>>(),
        });
        let levels = choice.map_or(&[][..], |c| &c.levels);
        if !levels.is_empty() {
            facts["guidance"] = levels.iter().map(|(up_to, g)| json!({"up_to": up_to, "guidance": g})).collect();
        }
        facts
    };
    json!({"stages": plan.pipeline.stages.iter().map(of_stage).collect::<Vec<_>>()})
}

/// The hash of a plan in hexadecimal digits.
pub fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|b| format!("{b:02x}")).collect()
}
