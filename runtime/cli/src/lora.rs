//! `ltxc lora inspect`: what is in a LoRA file, and which models it fits.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use ltxc_ir::TensorType;
use ltxc_models::checkpoint::{Checkpoint, Generation, Version};
use ltxc_models::lora::{LoraFile, LoraTargets};
use ltxc_models::synth::{Preset, listed};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::args::LoraInspectArgs;
use crate::debug::lora::files::added_norm;
use crate::model_files::local;

/// `ltxc lora inspect`.
///
/// # Errors
/// A file that is no LoRA, or a model that cannot be opened. A LoRA that does not fit is no error here.
pub fn inspect(args: &LoraInspectArgs, json: bool) -> Result<()> {
    let lora = LoraFile::open(&local(&args.file)?)?;
    let mut facts = facts(&lora, &models(args.checkpoint_path.as_deref())?)?;
    if args.norms {
        let norms: Vec<Value> = (lora.modules().par_iter())
            .map(|m| json!({"layer": m.name, "rank": m.rank, "norm": added_norm(&lora, m)}))
            .collect();
        facts["norms"] = norms.into();
    }
    if json {
        println!("{facts}")
    } else {
        print!("{}", text(&facts))
    }
    Ok(())
}

/// The models to compare with, by name.
pub(crate) fn models(checkpoint: Option<&Path>) -> Result<Vec<(String, LoraTargets)>> {
    if let Some(path) = checkpoint {
        let checkpoint = Checkpoint::open(&local(path)?)?;
        return Ok(vec![(checkpoint.name().into(), LoraTargets::of(&checkpoint))]);
    }
    let published = [Preset::Ltx2, Preset::Ltx23].into_iter().map(|preset| {
        let (version, tensors) = listed(preset)?;
        let tensors = tensors.into_iter().map(|t| (t.key, TensorType::f32(t.shape)));
        let targets = LoraTargets::new(preset.name(), Generation::of(&Version::parse(version)), tensors);
        Ok((preset.name().into(), targets))
    });
    published.collect()
}

pub(crate) fn facts(lora: &LoraFile, models: &[(String, LoraTargets)]) -> Result<Value> {
    let (mut ranks, mut layers): (BTreeMap<usize, usize>, BTreeMap<String, usize>) = Default::default();
    let mut scales: BTreeSet<String> = BTreeSet::new();
    for module in lora.modules() {
        *ranks.entry(module.rank).or_default() += 1;
        *layers.entry(of_every_block(&module.name)).or_default() += 1;
        let alpha = module.alpha.map_or("none".to_string(), |alpha| alpha.to_string());
        scales.insert(format!("{alpha} (scale {})", module.scale));
    }
    let fits: Vec<Value> = (models.iter())
        .map(|(name, targets)| match lora.fit(targets, true) {
            Err(e) => json!({"model": name, "fits": false, "reason": e.to_string()}),
            Ok(fit) => json!({
                "model": name, "fits": fit.unmatched.is_empty(), "matched": fit.factors.len(), "unmatched": fit.unmatched,
            }),
        })
        .collect();
    let ranks: Vec<Value> = ranks.into_iter().map(|(rank, n)| json!({"rank": rank, "layers": n})).collect();
    Ok(json!({
        "file": lora.path(), "dialect": lora.dialect().name(),
        "dtypes": lora.dtypes().into_iter().map(|d| d.name()).collect::<Vec<_>>(),
        "layers": lora.modules().len(), "ranks": ranks, "alphas": scales, "targets": layers,
        "origin": lora.origin().map(|origin| origin.to_string()),
        "reference_downscale_factor": lora.reference_downscale()?,
        "reference_temporal_scale_factor": lora.reference_temporal_scale()?,
        "in_context": lora.is_in_context(), "metadata": lora.metadata(), "other_keys": lora.others(), "models": fits,
    }))
}

/// The name of a layer with `*` for the number of its block.
fn of_every_block(name: &str) -> String {
    let Some((start, rest)) = name.split_once("blocks").map(|(start, rest)| (start.len() + "blocks".len(), rest))
    else {
        return name.into();
    };
    let number = rest.get(1..).unwrap_or_default();
    let behind = number.trim_start_matches(|c: char| c.is_ascii_digit());
    if behind.len() == number.len() { name.into() } else { format!("{}*{behind}", &name[..start + 1]) }
}

/// The same for people.
pub(crate) fn text(facts: &Value) -> String {
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), String::from);
    let words = |value: &Value| value.as_array().into_iter().flatten().map(word).collect::<Vec<_>>().join(", ");
    let rank = |r: &Value| format!("{} ({} layers)", r["rank"], r["layers"]);
    let ranks: Vec<String> = facts["ranks"].as_array().into_iter().flatten().map(rank).collect();
    let mut out = format!(
        "file      {}\ndialect   {}, {}\nlayers    {}\nrank      {}\nalpha     {}\norigin    {}\n",
        word(&facts["file"]),
        word(&facts["dialect"]),
        words(&facts["dtypes"]),
        facts["layers"],
        ranks.join(", "),
        words(&facts["alphas"]),
        facts["origin"].as_str().unwrap_or("not told by header or layers"),
    );
    for (key, value) in facts["metadata"].as_object().into_iter().flatten() {
        out += &format!("header    {key}: {}\n", shortened(&word(value)));
    }
    for (layer, count) in facts["targets"].as_object().into_iter().flatten() {
        out += &format!("changes   {layer} ({count})\n");
    }
    for layer in facts["norms"].as_array().into_iter().flatten() {
        let norm = layer["norm"].as_f64().unwrap_or(f64::NAN);
        out += &format!("norm      {} {norm:.5} (rank {})\n", word(&layer["layer"]), layer["rank"]);
    }
    for key in facts["other_keys"].as_array().into_iter().flatten() {
        out += &format!("unknown   {}\n", shortened(&word(key)));
    }
    for model in facts["models"].as_array().into_iter().flatten() {
        let name = word(&model["model"]);
        let unmatched = model["unmatched"].as_array().map_or(0, Vec::len);
        out += &match model["reason"].as_str() {
            Some(reason) => format!("fits      {name}: no; {reason}\n"),
            None if unmatched == 0 => format!("fits      {name}: yes, all {} layers\n", model["matched"]),
            None => format!(
                "fits      {name}: no; {unmatched} keys match nothing: {}\n",
                shortened(&words(&model["unmatched"]))
            ),
        };
    }
    out
}

/// Text that fits a line or two.
fn shortened(text: &str) -> String {
    const MOST: usize = 160;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_together() {
        for (name, expected) in [
            (
                "diffusion_model.transformer_blocks.12.attn1.to_out.0",
                "diffusion_model.transformer_blocks.*.attn1.to_out.0",
            ),
            ("lora_unet_transformer_blocks_3_ff_net_2", "lora_unet_transformer_blocks_*_ff_net_2"),
            ("diffusion_model.patchify_proj", "diffusion_model.patchify_proj"),
            ("blocks", "blocks"),
            ("blocks.x", "blocks.x"),
        ] {
            assert_eq!(of_every_block(name), expected);
        }
    }
}
