//! What a run is about to do, in words: what it makes, and steps, sampler and guidance of a stage, whoever chose them.

use std::collections::BTreeSet;

use ltxc_ir::plan::{CfgRule, Guidance, Guider, Modality, Pipeline, Sampler, Stage};
use ltxc_runtime::pipeline::StageChoice;

/// One line about what is made: size, length and rate, and the CRF of the images that are given.
pub fn describe_output(pipeline: &Pipeline, image_crfs: &BTreeSet<u8>) -> String {
    let (video, made) = (&pipeline.video, pipeline.modalities());
    let (num, den) = video.frame_rate;
    if !made.contains(&Modality::Video) {
        return format!("{:.3} s of sound", f64::from(video.frames) * f64::from(den) / f64::from(num.max(1)));
    }
    let rate = if den == 1 { num.to_string() } else { format!("{num}/{den}") };
    // Of two that are made for the same frame, one is written.
    let frames = if pipeline.inputs.doubles_frames { video.frames.div_ceil(2) } else { video.frames };
    let mut text = format!("{}x{}, {frames} frames at {rate} per second", video.width, video.height);
    // A clip that is upscaled keeps what it has.
    if !made.contains(&Modality::Audio) && pipeline.upscale.is_none() {
        text += ", without sound";
    }
    if !image_crfs.is_empty() {
        let crfs: Vec<String> = image_crfs.iter().map(u8::to_string).collect();
        text += &format!(", images at CRF {}", crfs.join(" and "));
    }
    text
}

/// One line about a stage.
pub fn describe(stage: &Stage, choice: Option<&StageChoice>, modalities: &[Modality]) -> String {
    let sigmas = choice.and_then(|c| c.sigmas.as_ref()).unwrap_or(&stage.sigmas);
    let sampler = choice.and_then(|c| c.sampler).unwrap_or(stage.sampler);
    let constant = choice.and_then(|c| c.guidance.as_ref()).or(stage.guidance.as_ref());
    let levels = choice.map_or(&[][..], |c| &c.levels);
    let mut text = format!("{}: {} steps, {}", stage.name, sigmas.len().saturating_sub(1), sampler_name(sampler));
    for (bound, guidance) in levels {
        text += &format!("; up to noise level {bound}");
        modalities.iter().for_each(|&m| text += &format!(", {}", guided(guidance, m)));
    }
    if let Some(tiles) = &stage.tiles {
        text += &format!(", {} tiles", tiles.len());
    }
    match constant.filter(|_| levels.is_empty()) {
        None if levels.is_empty() => text += ", no guidance",
        None => {}
        Some(guidance) => modalities.iter().for_each(|&m| text += &format!("; {}", guided(guidance, m))),
    }
    text
}

fn sampler_name(sampler: Sampler) -> String {
    match sampler {
        Sampler::Euler => "Euler".into(),
        Sampler::Ancestral { eta, .. } => format!("ancestral Euler (eta {eta})"),
        Sampler::Res2s => "res_2s".into(),
        Sampler::GradientEstimation { gamma } => format!("gradient estimation (gamma {gamma})"),
        Sampler::CfgPlusPlus { eta, .. } => format!("CFG++ (eta {eta})"),
    }
}

fn guided(guidance: &Guidance, modality: Modality) -> String {
    let Guider { cfg, rule, stg, stg_blocks, modality: other, rescale, skip_step } = guidance.of(modality);
    let rule = match rule {
        CfgRule::Plain => "",
        CfgRule::Star => "*",
        CfgRule::Projected { .. } => " projected",
        CfgRule::Momentum { .. } => " projected with momentum",
    };
    let mut text = format!("{} CFG{rule} {cfg}", modality.name());
    if *stg != 0.0 {
        text += &format!(", STG {stg} in blocks {stg_blocks:?}");
    }
    if *other != 1.0 {
        text += &format!(", modality {other}");
    }
    if *rescale != 0.0 {
        text += &format!(", rescale {rescale}");
    }
    if *skip_step > 0 {
        text += &format!(", {skip_step} steps skipped after each");
    }
    text
}
