//! Whole runs of every pipeline, from the recorded noise.
//!
//! The name of a recording tells the pipeline, its parameters the rest: sizes, guidance, images, clips and LoRAs. LoRAs lie
//! beside the model, other files beside the recordings, in `inputs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ltxc_compiler::Options;
use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::plan::{Modality, Plan, SoundRole};
use ltxc_models::lora::LoraTargets;
use ltxc_runtime::adapters::StageAdapters;
use ltxc_runtime::backend::Device;
use ltxc_runtime::media::{Recording, RgbImage, load_image, resize_and_crop};
use ltxc_runtime::pipeline::{
    Attention, Conditioning, Media, Noise, Reference, SourceClip, StageChoice, needed_passes,
};
use serde_json::Value;

use super::audio::untokens;
use super::{Check, RUN_LIMIT, Row, Setup, channels_first};
use crate::adapters::{Loras, Opened, mode};
use crate::args::{AdapterArgs, PipelineName, Precision, ReferenceVersion, SamplingArgs, ShapeArgs};
use crate::debug::pipeline::{Pipeline, Tensors, plan_for};
use crate::debug::recording::TensorFile;
use crate::debug::session::Session;
use crate::job::Shape;
use crate::model_files::ModelFiles;
use crate::pipelines::{definition, stage_choice};

/// Relative L2 of what the driver computes before the model runs.
const DRIVER_LIMIT: f64 = 1e-6;

/// Pipelines by the beginnings of the names of recordings; the first that fits counts.
const PIPELINES: [(&str, PipelineName); 8] = [
    ("distilled", PipelineName::Distilled),
    ("one_stage", PipelineName::OneStage),
    ("two_stages_hq", PipelineName::HighQuality),
    ("two_stages", PipelineName::TwoStage),
    ("keyframes", PipelineName::Keyframes),
    ("a2vid", PipelineName::AudioToVideo),
    ("ic_lora", PipelineName::IcLora),
    ("retake", PipelineName::RetakeGuided),
];

/// Sampling rate of recorded waveforms that go into a run, in Hz.
const INPUT_RATE_HZ: u32 = 16_000;

pub(super) fn check(setup: &Setup<'_>, rows: &mut Vec<Row>) -> Result<()> {
    for folder in [format!("e2e/{}", setup.family), "e2e".into()] {
        for (name, path) in setup.references.below(&folder) {
            let needs_upsampler = pipeline_of(&name).is_some_and(|p| definition(p).has_two_stages);
            if pipeline_of(&name).is_some() && (setup.files.upsampler.is_some() || !needs_upsampler) {
                let on = RunOn {
                    device: setup.device,
                    options: Options::default(),
                    session: setup.session,
                    release: Some(setup.release),
                };
                check_run(&setup.files, &on, &path, rows).with_context(|| format!("run {name}"))?;
            }
        }
    }
    Ok(())
}

fn pipeline_of(name: &str) -> Option<PipelineName> {
    PIPELINES.iter().find(|(start, _)| name.starts_with(start)).map(|(_, pipeline)| *pipeline)
}

/// How a recorded run is repeated.
pub struct RunOn<'a> {
    /// What runs it.
    pub device: &'a Device,
    /// Options of the compiler.
    pub options: Options,
    /// What is logged.
    pub session: &'a Session,
    /// The release of the reference that made the recording, if it is not the newest.
    pub release: Option<ReferenceVersion>,
}

/// Runs what the recording at `path` is of, and compares; `rows` gets what is found, in the order of the run.
///
/// # Errors
/// A recording that is no run, a file that it names and that is not there, or a run that fails.
pub fn check_run(files: &ModelFiles, on: &RunOn<'_>, path: &Path, rows: &mut Vec<Row>) -> Result<()> {
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let known = || format!("`{}` is named like no run; recordings of runs begin with {}", path.display(), names());
    let pipeline = pipeline_of(&stem).with_context(known)?;
    let mut check = Check::new("runs", TensorFile::open(path)?, RUN_LIMIT, rows);
    check.prefix = format!("{stem}/");
    let run = Recorded { params: check.meta["params"].clone(), path, pipeline };
    let images = run.images()?;
    let appends_first = definition(pipeline).brings.appends_first_image;
    let keyframes = images.iter().filter(|i| i.frame > 0 || appends_first).count();
    let loras = run.loras(files)?;
    // Recordings are of f32, on any device.
    let dtype = Some(Precision::F32);
    let shape = ShapeArgs { reference_version: on.release, dtype, ..run.shape(&check.meta)? };
    let mut shape = Shape::resolve(&shape, keyframes)?.with(&loras)?;
    shape.references.frames = run.shortest_reference()?;
    let plan = plan_for(files, &shape, on.device, on.options.clone())?;
    let ran = Pipeline {
        plan: &plan,
        paths: files.paths(),
        device: on.device,
        session: on.session,
        prompt: run.params["prompt"].as_str().context("the recording has no prompt")?,
        negative_prompt: run.params["negative_prompt"].as_str().unwrap_or_default(),
        images: &images,
        media: run.media(&plan)?,
        stages: run.stages(&plan)?,
        adapters: adapters(&loras, &plan, files)?,
        noise: Noise { given: noise(&check, &plan)?, ..Noise::default() },
    };
    compare(&mut check, &plan, &ran.run(None)?);
    Ok(())
}

fn names() -> String {
    PIPELINES.map(|(start, _)| start).join(", ")
}

/// Compares everything that was recorded, under the names that it has there.
fn compare(check: &mut Check<'_>, plan: &Plan, ran: &Tensors) {
    let (video, audio) = (plan.pipeline.video.channels as usize, plan.pipeline.audio.channels as usize);
    // Evaluations of samplers with two a step were recorded one by one, under names that mean other things here.
    let has_substeps = plan.pipeline.stages.iter().any(|s| check.has(&format!("{}.call0.video.latent", s.name)));
    // The reference freezes a state after noise was added, and its mask was recorded between the two.
    let keeps_sound = plan.pipeline.inputs.sound.is_some_and(|sound| sound.role == SoundRole::Kept);
    let first = plan.pipeline.stages.first();
    let passes = first.map(|s| needed_passes(s.guidance.as_ref(), s.sampler)).unwrap_or_default();
    for name in &ran.order {
        let values = &ran.tensors[name];
        let limit = match name.rsplit('.').next().unwrap_or_default() {
            "noise" | "positions" | "denoise_mask" | "sigmas" | "attention_mask" => DRIVER_LIMIT,
            _ => RUN_LIMIT,
        };
        // Tokens are compared as they are, latents of whole stages in the layout of the reference.
        let values = match name.as_str() {
            "final.frames" => channels_first(values, 3),
            "final.waveform" => channels_first(values, 2),
            name if name.starts_with("final.") || name.ends_with("initial_latent") => match name.contains("video") {
                true => channels_first(values, video),
                false => untokens(values, audio / 16),
            },
            _ => values.clone(),
        };
        let call = name.split_once(".call").and_then(|(stage, rest)| Some((stage, rest.split_once('.')?)));
        let is_frozen_mask = keeps_sound && name.ends_with("audio.denoise_mask");
        if !is_frozen_mask && (call.is_none() || !has_substeps) {
            check.check_within(name, &values, limit);
        }
        // Predictions belong to steps in recordings, single passes to calls.
        match call {
            Some((stage, (i, rest))) if rest.ends_with(".denoised") && !has_substeps => {
                check.check_within(&format!("{stage}.step{i}.{rest}"), &values, RUN_LIMIT);
            }
            Some(("stage1", (i, rest))) => {
                let pass = rest.split_once('.').filter(|(_, rest)| rest.ends_with(".x0"));
                let number = |pass: &str| passes.iter().position(|p| p.name() == pass);
                // The recording numbers the model's evaluations, of which there is one per pass.
                let at = pass.and_then(|(pass, rest)| {
                    Some((number(pass)?, rest.strip_suffix(".x0")?, i.parse::<usize>().ok()?))
                });
                if let Some((pass, modality, call)) = at {
                    let number = call * passes.len() + pass;
                    check.check_within(&format!("x0_call{number}.{modality}"), &values, RUN_LIMIT);
                }
            }
            _ => {}
        }
    }
    if has_substeps {
        for stage in &plan.pipeline.stages {
            for modality in ["video", "audio"] {
                compare_substeps(check, ran, &stage.name, modality);
            }
        }
    }
}

/// Where steps with two evaluations lead, before noise is added and after. The recording counts both as calls.
fn compare_substeps(check: &mut Check<'_>, ran: &Tensors, stage: &str, modality: &str) {
    for call in 0.. {
        let name = |what: &str| format!("{stage}.call{call}.{modality}.{what}");
        if !check.has(&name("latent")) {
            break;
        }
        let step = call / 2;
        let (kind, after) = match call % 2 {
            // The next evaluation begins with what the noise made of the middle.
            0 => ("substep", format!("{stage}.call{}.{modality}.latent", call + 1)),
            _ => ("step", format!("{stage}.step{step}.{modality}.latent")),
        };
        for (what, own) in [("denoised", format!("{stage}.{kind}{step}.{modality}.target")), ("latent", after)] {
            check.check_within(&name(what), ran.tensors.get(&own).map_or(&[][..], Vec::as_slice), RUN_LIMIT);
        }
    }
}

/// The flags that the guiders of a recorded run stand for.
pub fn sampling(params: &Value) -> SamplingArgs {
    let number = |modality: &str, key: &str| params[format!("{modality}_guider")][key].as_f64();
    let blocks = |modality: &str| -> Option<Vec<u32>> {
        let listed = params[format!("{modality}_guider")]["stg_blocks"].as_array()?;
        Some(listed.iter().filter_map(Value::as_u64).map(|b| b as u32).collect())
    };
    let skip = |modality: &str| number(modality, "skip_step").map(|n| n as u32);
    SamplingArgs {
        cfg: number("video", "cfg_scale"),
        cfg_audio: number("audio", "cfg_scale"),
        stg: number("video", "stg_scale"),
        stg_audio: number("audio", "stg_scale"),
        stg_blocks: blocks("video"),
        stg_blocks_audio: blocks("audio"),
        modality: number("video", "modality_scale"),
        modality_audio: number("audio", "modality_scale"),
        rescale: number("video", "rescale_scale"),
        rescale_audio: number("audio", "rescale_scale"),
        video_skip_step: skip("video"),
        audio_skip_step: skip("audio"),
        ..SamplingArgs::default()
    }
}

/// A recorded run: what it was given.
struct Recorded<'a> {
    params: Value,
    path: &'a Path,
    pipeline: PipelineName,
}

impl Recorded<'_> {
    fn shape(&self, meta: &Value) -> Result<ShapeArgs> {
        let number = |key: &str| self.params[key].as_u64().map(|n| n as u32);
        // A run on a clip has its size and length.
        let clip = match self.tensor("video") {
            Some(frames) => Some(frames?.ty.shape),
            None => None,
        };
        let clip = |axis: usize| clip.as_ref().and_then(|shape| shape.get(axis)).map(|&n| n as u32);
        let size = |key: &str, axis: usize| {
            number(key).or_else(|| clip(axis)).with_context(|| format!("the recording has no `{key}`")).map(Some)
        };
        let rate =
            self.params["frame_rate"].as_f64().or(self.clip_rate()?).map_or("24".into(), |rate| rate.to_string());
        Ok(ShapeArgs {
            pipeline: Some(self.pipeline),
            height: size("height", 1)?,
            width: size("width", 2)?,
            num_frames: size("num_frames", 0)?,
            frame_rate: Some(rate),
            vae_tile: meta.get("tiling").and_then(Value::as_str).and_then(|t| tile_flag(t, &self.params)),
            sampling: sampling(&self.params),
            reference_attention: self.params["conditioning_attention_strength"].is_number(),
            skip_stage_2: self.params["skip_stage_2"].as_bool().unwrap_or(false),
            ..ShapeArgs::default()
        })
    }

    fn stages(&self, plan: &Plan) -> Result<BTreeMap<String, StageChoice>> {
        let first = plan.pipeline.stages.first().context("the plan has no stages")?;
        let steps = self.params["num_inference_steps"].as_u64().map(|n| n as usize);
        let choice = stage_choice(first, &plan.pipeline.modalities(), &sampling(&self.params), steps, None)?;
        Ok(BTreeMap::from([(first.name.clone(), choice)]))
    }

    /// A file beside the recordings.
    fn beside(&self, name: &str) -> Result<PathBuf> {
        let places = self.path.ancestors().flat_map(|folder| [folder.join(name), folder.join("inputs").join(name)]);
        let missing = || format!("`{name}` is not beside the recording `{}`", self.path.display());
        places.into_iter().find(|p| p.is_file()).with_context(missing)
    }

    fn images(&self) -> Result<Vec<Conditioning>> {
        let listed = self.params["images"].as_array().cloned().unwrap_or_default();
        let image = |i: &Value| -> Result<Conditioning> {
            Ok(Conditioning {
                image: load_image(&self.beside(i["image"].as_str().context("an image has no name")?)?)?,
                frame: i["frame_idx"].as_u64().context("an image has no frame")? as u32,
                strength: i["strength"].as_f64().context("an image has no strength")?,
            })
        };
        listed.iter().map(image).collect()
    }

    /// The tensor that a parameter names as `file:tensor`; of two, ` / ` between them, the first. `None` if there is no
    /// such parameter.
    fn tensor(&self, key: &str) -> Option<Result<Tensor>> {
        let text = self.params[key].as_str()?;
        Some(self.named(text.split(" / ").next().unwrap_or(text)))
    }

    fn named(&self, text: &str) -> Result<Tensor> {
        let (file, name) = self.file_of(text)?;
        file.find(name).cloned().with_context(|| format!("`{}` has no `{name}`", file.path.display()))
    }

    /// The file of `file:tensor`, and the name of the tensor.
    fn file_of<'t>(&self, text: &'t str) -> Result<(TensorFile, &'t str)> {
        let (file, name) = text.split_once(':').with_context(|| format!("`{text}` is not `file:tensor`"))?;
        Ok((TensorFile::open(&self.beside(file)?)?, name))
    }

    /// Frames per second of the clip that the run is on, if it is on one and its file says so.
    fn clip_rate(&self) -> Result<Option<f64>> {
        let Some(text) = self.params["video"].as_str() else { return Ok(None) };
        Ok(self.file_of(text)?.0.meta()["fps"].as_f64())
    }

    /// Frames of the shortest reference video, if there is one.
    fn shortest_reference(&self) -> Result<Option<usize>> {
        let listed = self.params["video_conditioning"].as_array().into_iter().flatten();
        let frames = listed.filter_map(|reference| Some(self.named(reference[0].as_str()?)));
        let frames = frames.map(|clip| Ok(clip?.ty.shape.first().copied().unwrap_or(0)));
        frames.collect::<Result<Vec<usize>>>().map(|frames| frames.into_iter().min())
    }

    fn media(&self, plan: &Plan) -> Result<Media> {
        let mut media = Media::default();
        let video = &plan.pipeline.video;
        if let Some(clip) = self.tensor("video") {
            let time = |key: &str| self.params[key].as_f64().with_context(|| format!("the recording has no `{key}`"));
            let frames = fitted(&clip?, video.width as usize, video.height as usize)?;
            media.clip = Some(SourceClip { frames, start: time("start_time")?, end: time("end_time")?, kept: None });
            // Its sound is in the same file.
            let text = self.params["video"].as_str().unwrap_or_default();
            if let (Some((file, _)), Some((_, sound))) = (text.split_once(':'), text.split_once(" / ")) {
                media.sound = Some(recording(&self.named(&format!("{file}:{sound}"))?)?);
            }
        }
        if let Some(sound) = self.tensor("audio") {
            media.sound = Some(recording(&sound?)?);
        }
        for reference in self.params["video_conditioning"].as_array().into_iter().flatten() {
            let clip = self.named(reference[0].as_str().context("a reference video has no name")?)?;
            // For every stage that it guides.
            let planned = plan.pipeline.inputs.references.iter();
            let frames = planned.map(|r| {
                let (width, height) = (r.width as usize, r.height as usize);
                // Of a longer one, the reference reads as many frames as the video has.
                let mut frames = fitted(&clip, width, height)?;
                frames.truncate(r.frames as usize * width * height * 3);
                Ok(frames)
            });
            let frames = frames.collect::<Result<_>>()?;
            media.references.push(Reference { frames, strength: reference[1].as_f64().unwrap_or(1.0) });
        }
        let attention = self.params["conditioning_attention_strength"].as_f64();
        media.attention = attention.map(|strength| Attention { strength: strength as f32, mask: None });
        Ok(media)
    }

    /// Its LoRAs, which lie beside the model.
    fn loras(&self, files: &ModelFiles) -> Result<Loras> {
        let path = |key: &str| -> Result<Option<String>> {
            let Some(name) = self.params[key].as_str() else { return Ok(None) };
            let folders = files.model.paths();
            let places = folders.iter().filter_map(|p| Some(p.parent()?.join(name)));
            let Some(path) = places.into_iter().find(|p| p.is_file()) else {
                bail!("the run was recorded with the LoRA `{name}`, which is not beside the model");
            };
            Ok(Some(path.display().to_string()))
        };
        let strength = |key: &str| self.params[key].as_f64();
        let args = AdapterArgs {
            lora: path("lora")?.into_iter().collect(),
            distilled_lora: path("distilled_lora")?.into_iter().collect(),
            distilled_lora_strength: strength("distilled_lora_strength"),
            distilled_lora_strength_stage_1: strength("strength_stage_1"),
            distilled_lora_strength_stage_2: strength("strength_stage_2"),
            ..AdapterArgs::default()
        };
        Loras::open(&args, &vec![1; args.lora.len()])
    }
}

/// What LoRAs do in the stages of a plan.
fn adapters(loras: &Loras, plan: &Plan, files: &ModelFiles) -> Result<StageAdapters> {
    if loras.is_empty() {
        return Ok(StageAdapters::default());
    }
    let fits = loras.fit(&LoraTargets::of(&files.model), &plan.pipeline.name)?;
    Ok(loras.stages(fits, &plan.pipeline, mode(None, plan), &mut Opened::default())?.0)
}

/// A clip `[n, h, w, 3]` in bytes, fitted to a size.
fn fitted(clip: &Tensor, width: usize, height: usize) -> Result<Vec<f32>> {
    let (&[_, rows, columns, 3], Data::Int(values)) = (&clip.ty.shape[..], &clip.data) else {
        bail!("a recorded clip is {}, expected frames of bytes", clip.ty)
    };
    let bytes: Vec<u8> = values.iter().map(|&v| v as u8).collect();
    let mut frames = Vec::new();
    for frame in bytes.chunks((rows * columns * 3).max(1)) {
        frames.extend(resize_and_crop(&RgbImage::new(columns, rows, frame.to_vec())?, width, height)?);
    }
    Ok(frames)
}

/// A waveform `[1, channels, n]`.
fn recording(sound: &Tensor) -> Result<Recording> {
    let [1, _, samples] = sound.ty.shape[..] else { bail!("a recorded waveform is {}, expected one sound", sound.ty) };
    let channels = sound.to_f32().chunks(samples.max(1)).map(<[f32]>::to_vec).collect();
    Ok(Recording { rate_hz: INPUT_RATE_HZ, channels })
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

/// The recorded noise: of states, split where appended tokens begin, and of samplers that draw more in every step.
fn noise(check: &Check<'_>, plan: &Plan) -> Result<BTreeMap<String, Vec<f32>>> {
    let mut given = BTreeMap::new();
    for stage in &plan.pipeline.stages {
        let name = &stage.name;
        if plan.pipeline.modalities().contains(&Modality::Video) {
            let values = check.input(&format!("{name}.video.noise"))?.to_f32();
            let target = stage.grid.iter().product::<u32>() as usize * plan.pipeline.video.channels as usize;
            let (own, extra) = values.split_at_checked(target).context("the recorded noise is too short")?;
            given.insert(format!("{name}.video"), own.to_vec());
            given.insert(format!("{name}.video.extra"), extra.to_vec());
        }
        given.insert(format!("{name}.audio"), check.input(&format!("{name}.audio.noise"))?.to_f32());
        for i in 0.. {
            let key = format!("{name}.sde_noise{i}");
            if !check.has(&key) {
                break;
            }
            // In the order in which it was drawn: the middle of a step before its end, video before audio.
            let (kind, modality) = (["substep", "step"][i / 2 % 2], ["video", "audio"][i % 2]);
            given.insert(format!("{name}.{kind}.{:03}.{modality}", i / 4), check.input(&key)?.to_f32());
        }
    }
    Ok(given)
}
