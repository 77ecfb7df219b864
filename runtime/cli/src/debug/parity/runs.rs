//! Whole runs, from the recorded noise.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use ltxc_compiler::Options;
use ltxc_ir::plan::Plan;
use ltxc_runtime::media::load_image;
use ltxc_runtime::pipeline::{Conditioning, Noise};
use serde_json::Value;

use super::audio::untokens;
use super::{Check, RUN_LIMIT, Row, Setup, channels_first};
use crate::args::ShapeArgs;
use crate::debug::pipeline::{Pipeline, plan_for};
use crate::debug::recording::TensorFile;
use crate::job::Shape;

/// Relative L2 of what the driver computes before the model runs.
const DRIVER_LIMIT: f64 = 1e-6;

/// Runs whose names begin so are runs of a pipeline that can be compiled and compared.
const KNOWN: &str = "distilled";

pub(super) fn check(setup: &Setup<'_>, rows: &mut Vec<Row>) -> Result<()> {
    if setup.files.upsampler.is_none() {
        return Ok(());
    }
    for folder in [format!("e2e/{}", setup.family), "e2e".into()] {
        for (name, path) in setup.references.below(&folder).into_iter().filter(|(name, _)| name.starts_with(KNOWN)) {
            let file = TensorFile::open(&path)?;
            let meta = file.meta();
            let mut check = Check { component: "runs", file, meta, limit: RUN_LIMIT, rows: &mut *rows };
            check_run(setup, &mut check, &path).with_context(|| format!("run {name}"))?;
        }
    }
    Ok(())
}

fn check_run(setup: &Setup<'_>, check: &mut Check<'_>, path: &Path) -> Result<()> {
    let params = check.meta["params"].clone();
    let prompt = params["prompt"].as_str().context("the recording has no prompt")?.to_string();
    let images = images(&params, path)?;
    let keyframes = images.iter().filter(|i| i.frame > 0).count();
    let shape = Shape::resolve(&shape_of(check, &params)?, keyframes)?;
    let plan = plan_for(&setup.files, &shape, setup.device, Options::default())?;
    let noise = Noise { given: noise(check, &plan)?, ..Noise::default() };
    let pipeline = Pipeline {
        plan: &plan,
        paths: setup.files.paths(),
        device: setup.device,
        prompt: &prompt,
        negative_prompt: "",
        images: &images,
        noise,
    };
    let ran = pipeline.run(None)?;
    let (video, audio) = (plan.pipeline.video.channels as usize, plan.pipeline.audio.channels as usize);
    for name in &ran.order {
        let values = &ran.tensors[name];
        let limit = match name.rsplit('.').next().unwrap_or_default() {
            "noise" | "positions" | "denoise_mask" | "sigmas" => DRIVER_LIMIT,
            _ => RUN_LIMIT,
        };
        // Tokens are compared as they are, latents of whole stages in the layout of the reference.
        let is_video = name.contains("video");
        let values = match name.as_str() {
            "final.frames" => channels_first(values, 3),
            "final.waveform" => channels_first(values, 2),
            name if name.starts_with("final.") || name.ends_with("initial_latent") => match is_video {
                true => channels_first(values, video),
                false => untokens(values, audio / 16),
            },
            _ => values.clone(),
        };
        check.check_within(name, &values, limit);
        // Evaluations of the model have other names in recordings: predictions belong to steps, single passes to calls.
        let call = name.split_once(".call").and_then(|(stage, rest)| Some((stage, rest.split_once('.')?)));
        match call {
            Some((stage, (i, rest))) if rest.ends_with(".denoised") => {
                check.check_within(&format!("{stage}.step{i}.{rest}"), &values, RUN_LIMIT);
            }
            Some(("stage1", (i, rest))) => {
                if let Some(modality) = rest.strip_prefix("cond.").and_then(|r| r.strip_suffix(".x0")) {
                    check.check_within(&format!("x0_call{i}.{modality}"), &values, RUN_LIMIT);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn shape_of(check: &Check<'_>, params: &Value) -> Result<ShapeArgs> {
    let number =
        |key: &str| params[key].as_u64().with_context(|| format!("the recording has no `{key}`")).map(|n| n as u32);
    Ok(ShapeArgs {
        height: Some(number("height")?),
        width: Some(number("width")?),
        num_frames: Some(number("num_frames")?),
        frame_rate: Some(params["frame_rate"].to_string()),
        vae_tile: check.meta.get("tiling").and_then(Value::as_str).and_then(|t| tile_flag(t, params)),
        ..ShapeArgs::default()
    })
}

/// Sizes of tiles as a flag. The recorded text names the tile of each axis: `tile_size=16, overlap=8` for frames, height and
/// width; `params` may spell it as pixels and frames.
fn tile_flag(text: &str, params: &Value) -> Option<String> {
    let spelled = params["tiling"].as_str().unwrap_or(text);
    let numbers: Vec<&str> = spelled.split(|c: char| !c.is_ascii_digit()).filter(|s| !s.is_empty()).collect();
    match numbers[..] {
        [space, space_overlap, time, time_overlap] => Some(format!("{space}x{space_overlap},{time}x{time_overlap}")),
        _ => None,
    }
}

/// Images of a run: files beside the recordings, in `inputs`.
fn images(params: &Value, recording: &Path) -> Result<Vec<Conditioning>> {
    let listed = params["images"].as_array().cloned().unwrap_or_default();
    let image = |i: &Value| -> Result<Conditioning> {
        let name = i["image"].as_str().context("an image has no name")?;
        let places = recording.ancestors().map(|folder| folder.join("inputs").join(name));
        let path = places
            .into_iter()
            .find(|p| p.is_file())
            .with_context(|| format!("image `{name}` is not beside the recording"))?;
        Ok(Conditioning {
            image: load_image(&path)?,
            frame: i["frame_idx"].as_u64().context("an image has no frame")? as u32,
            strength: i["strength"].as_f64().context("an image has no strength")?,
        })
    };
    listed.iter().map(image).collect()
}

/// The recorded noise, split where appended tokens begin.
fn noise(check: &Check<'_>, plan: &Plan) -> Result<BTreeMap<String, Vec<f32>>> {
    let mut given = BTreeMap::new();
    for stage in &plan.pipeline.stages {
        let values = check.input(&format!("{}.video.noise", stage.name))?.to_f32();
        let target = stage.grid.iter().product::<u32>() as usize * plan.pipeline.video.channels as usize;
        let (own, extra) = values.split_at_checked(target).context("the recorded noise is too short")?;
        given.insert(format!("{}.video", stage.name), own.to_vec());
        given.insert(format!("{}.video.extra", stage.name), extra.to_vec());
        given.insert(format!("{}.audio", stage.name), check.input(&format!("{}.audio.noise", stage.name))?.to_f32());
    }
    Ok(given)
}
