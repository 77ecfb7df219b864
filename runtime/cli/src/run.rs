//! `ltxc run`: a prompt to a video with sound.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use ltxc_compiler::Options;
use ltxc_ir::plan::{Kernels, Modality, Plan};
use ltxc_runtime::RunError;
use ltxc_runtime::backend::{KernelCounts, open_with};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::media::{
    Audio, MediaWriter, OutputOptions, Rational, RoundTrip, VideoFormat, image_round_trip, load_image,
};
use ltxc_runtime::memory::{MemoryNeed, available};
use ltxc_runtime::noise_files;
use ltxc_runtime::pipeline::{Conditioning, Noise, Output, Request, StageChoice, run as run_pipeline};
use ltxc_runtime::stats::Stats;
use ltxc_runtime::tokenizer::Tokenizer;
use ltxc_runtime::weights::{WeightFiles, find_tokenizer};
use serde_json::json;

use crate::adapters::{self, Loras};
use crate::args::{ContentArgs, ImageCodec, RunArgs};
use crate::assemble::ModelFiles;
use crate::compile::{cached, memory, read_with_kernels, unfused};
use crate::debug::flags::{DebugMode, DebugOptions};
use crate::debug::noise::summary as noise_summary;
use crate::debug::session::{About, Session};
use crate::job::{self, ImageArg, Shape, pick};
use crate::pipelines::{definition, describe, stage_choice};
use crate::report::Report;

/// Set by Ctrl-C; the run stops at the next kernel and removes what it has begun to write.
pub static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// `ltxc run`. `image_occurrences` and `lora_occurrences` say how many values each `--image` and `--lora` had.
///
/// # Errors
/// Anything that stops the run; no output is left then.
pub fn run(args: &RunArgs, image_occurrences: &[usize], lora_occurrences: &[usize], report: &mut Report) -> Result<()> {
    let images = job::images(&args.content.image, image_occurrences)?;
    let debug = DebugOptions::resolve(&args.debug, &|name| std::env::var(name).ok())?;
    let loras = Loras::open(&args.adapters, lora_occurrences)?;
    let (plan_path, folders) = plan_and_folders(args, &images, &loras, debug.mode)?;
    let (plan, kernels, hash) = read_with_kernels(&plan_path)?;
    let device = pick(&args.shape.device, Some(&plan))?;
    let weights = WeightFiles::open(&plan, &folders, args.model.verify)?;
    let fits = match loras.is_empty() {
        true => Vec::new(),
        false => loras.fit(&adapters::targets(&plan, &weights)?, &plan.pipeline.name)?,
    };
    let adapters = loras.stages(fits, &plan.pipeline, adapters::mode(args.lora_mode, &plan), report)?;
    let tokenizer = tokenizer(&plan, &folders)?;
    let need = MemoryNeed::of(&plan, rayon::current_num_threads()).with(&plan, &weights, &adapters);
    if need.is_on_gpu {
        // The executor compares what the plan needs with what the device has.
        report.note(&format!("device {}: {}", device.name, device.description));
    }
    report.note(&memory(&need));
    need.check(available())?;

    let seed = job::seed(&args.content.seed)?;
    let (prompt, negative) = (job::prompt(&args.content)?, job::negative_prompt(&args.content)?);
    report.note(&format!("seed {seed}, {} ({})", plan.pipeline.name, plan.pipeline.model.generation));
    let conditioning = images.iter().map(|i| load(i, &plan, args.content.image_codec)).collect::<Result<Vec<_>>>()?;
    let stages = stage_choices(args, &plan)?;
    for stage in &plan.pipeline.stages {
        report.note(&describe(stage, stages.get(&stage.name), &plan.pipeline.modalities()));
    }
    let request = Request {
        prompt: &prompt,
        negative_prompt: &negative,
        images: &conditioning,
        stages,
        noise: Noise { seed, given: BTreeMap::new(), files: noise_files(&args.content) },
        adapters,
        allow_bad_numerics: args.content.allow_bad_numerics,
    };
    let mut executor = Executor::on(open_with(&device, kernels.as_ref())?, &plan, &weights, &INTERRUPT)?;
    if args.frozen {
        executor.freeze(kernels.as_ref())?;
    }
    if let Some(note) = carried(&executor, kernels.as_ref()) {
        report.note(&note);
    }
    let session = match debug.is_on() {
        true => {
            let about = About { hash, device: device.name.to_string(), seed, noise: &request.noise.files };
            let session = Session::new(&plan, &weights, debug, &about)?;
            executor.set_tap(Some(session.tap()))?;
            Some(session)
        }
        false => None,
    };
    let tags = if args.no_metadata { Vec::new() } else { tags(&prompt, seed, &hash) };
    let mut output = FileOutput::create(&args.output, &plan, tags)?;
    match &session {
        None => run_pipeline(&mut executor, tokenizer, &request, report, &mut output)?,
        Some(session) => {
            run_pipeline(&mut executor, tokenizer, &request, &mut session.observer(report), &mut output)?;
            session.finish()?.iter().for_each(|note| report.note(note));
        }
    }
    for (slot, path) in request.noise.files.iter().filter(|(_, path)| path.exists()) {
        let noise = noise_files::pick(path, slot)?;
        let stats = Stats::of(&noise.shape, &noise.values);
        report.note(&format!("noise {slot} `{}`: {}", path.display(), noise_summary(&stats)));
    }
    let written = output.writer.finish()?;
    let KernelCounts { launched, compiled } = executor.kernels();
    if launched > 0 {
        report.note(&format!("kernels: {launched} launched, {compiled} compiled in this run"));
    }
    let kernels = json!({"launched": launched, "compiled": compiled});
    let facts = json!({"frames": written.frames, "bytes": written.bytes, "seed": seed, "kernels": kernels});
    report.finish(&written.path, facts);
    Ok(())
}

/// What is said about the kernels that a plan carries: compiled code is never used in silence.
fn carried(executor: &Executor<'_>, kernels: Option<&Kernels>) -> Option<String> {
    let (kernels, device) = (kernels?, executor.kernel_device()?);
    Some(match kernels.device == device {
        true if kernels.are_compiled_for(&device) => {
            let count = kernels.kernels.len();
            format!("kernels: {count} compiled ones from the plan, as trustworthy as whoever made it")
        }
        true => "kernels: the plan carries sources only, which this backend compiles".into(),
        false => format!("kernels: those of the plan are for {}, this is {device}; they are not used", kernels.device),
    })
}

fn tokenizer(plan: &Plan, folders: &[PathBuf]) -> Result<Tokenizer> {
    let path = find_tokenizer(&plan.pipeline.text, folders)?;
    Ok(Tokenizer::from_folder(path.parent().unwrap_or(Path::new(".")))?)
}

/// The plan to run and where its weights are. Nothing is compiled for LoRAs that do not fit.
fn plan_and_folders(
    args: &RunArgs,
    images: &[ImageArg],
    loras: &Loras,
    mode: DebugMode,
) -> Result<(PathBuf, Vec<PathBuf>)> {
    let Some(plan) = &args.plan else {
        if args.model.checkpoint_path.is_none() {
            bail!(
                "there is nothing to run; name a plan made by `ltxc compile`, or model files from `--checkpoint-path` on"
            );
        }
        let keyframes = images.iter().filter(|i| i.frame > 0).count();
        let target = pick(&args.shape.device, None)?.target;
        let has_distilled_adapter = !args.adapters.distilled_lora.is_empty();
        let shape = Shape { target, has_distilled_adapter, ..Shape::resolve(&args.shape, keyframes)? };
        let files = ModelFiles::open(&args.model, shape.has_two_stages())?;
        job::refuse_quantization(&args.shape, files.model.name(), files.model.has_fp8())?;
        loras.check(&files.model, definition(shape.pipeline).name)?;
        let options = match mode {
            DebugMode::Fused => Options::default(),
            DebugMode::Exact => unfused(),
        };
        let path = cached(&files, &shape, &options)?;
        return Ok((path, [files.paths(), args.weights.clone()].concat()));
    };
    if mode == DebugMode::Exact {
        bail!("`--debug-mode exact` compiles the model without fusion; name model files instead of a plan");
    }
    let mut folders = args.weights.clone();
    let named = [&args.model.checkpoint_path, &args.model.gemma_root, &args.model.spatial_upsampler_path];
    folders.extend(named.into_iter().flatten().cloned());
    if folders.is_empty() {
        let beside = plan.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        folders.push(beside.into());
    }
    Ok((plan.clone(), folders))
}

fn load(arg: &ImageArg, plan: &Plan, codec: ImageCodec) -> Result<Conditioning> {
    let crf = arg.crf.unwrap_or(plan.pipeline.model.image_crf as u8);
    let codec = match codec {
        ImageCodec::Auto => RoundTrip::Auto,
        ImageCodec::Embedded => RoundTrip::Embedded,
        ImageCodec::Ffmpeg => RoundTrip::Ffmpeg,
    };
    let image = image_round_trip(&load_image(&arg.path)?, crf, codec)?;
    Ok(Conditioning { image, frame: arg.frame, strength: arg.strength })
}

/// What the flags change in the stages of a plan.
fn stage_choices(args: &RunArgs, plan: &Plan) -> Result<BTreeMap<String, StageChoice>> {
    let content = &args.content;
    let first = plan.pipeline.stages.first().context("the plan has no stages")?;
    let modalities = plan.pipeline.modalities();
    let steps = content.num_inference_steps;
    let choice = stage_choice(first, &modalities, &args.shape.sampling, steps, content.sigmas.as_deref())?;
    let mut out = BTreeMap::from([(first.name.clone(), choice)]);
    if let Some(list) = &content.sigmas_stage2 {
        out.insert("stage2".into(), StageChoice { sigmas: Some(list.clone()), ..StageChoice::default() });
    }
    Ok(out)
}

fn noise_files(content: &ContentArgs) -> BTreeMap<String, PathBuf> {
    let slots = [
        ("stage1.video", &content.ltx2_initial_latent_path),
        ("stage1.audio", &content.ltx2_audio_latent_path),
        ("stage2.video", &content.ltx2_refine_noise_path),
        ("stage2.audio", &content.ltx2_refine_audio_noise_path),
    ];
    slots.into_iter().filter_map(|(slot, path)| Some((slot.to_string(), path.clone()?))).collect()
}

fn tags(prompt: &str, seed: u64, hash: &[u8; 32]) -> Vec<(String, String)> {
    let hex: String = hash.iter().map(|b| format!("{b:02x}")).collect();
    [("comment", prompt.to_string()), ("seed", seed.to_string()), ("plan_hash", hex)]
        .map(|(name, value)| (name.to_string(), value))
        .into()
}

/// Writes frames and sound to a file or folder.
struct FileOutput {
    writer: MediaWriter,
    has_video: bool,
}

impl FileOutput {
    fn create(path: &Path, plan: &Plan, tags: Vec<(String, String)>) -> Result<FileOutput> {
        let video = &plan.pipeline.video;
        let made = plan.pipeline.modalities();
        let is_sound = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("wav"));
        if is_sound && !made.contains(&Modality::Audio) {
            bail!("`{}` is for sound, and the plan makes none; choose `.mp4` or a folder", path.display());
        }
        let has_video = made.contains(&Modality::Video) && !is_sound;
        let rate = Rational::new(video.frame_rate.0, video.frame_rate.1)?;
        let format = || VideoFormat::new(video.width as usize, video.height as usize, rate);
        let mut options = OutputOptions::default();
        options.tags.extend(tags);
        let writer = MediaWriter::create(path, has_video.then(format).transpose()?, options)?;
        Ok(FileOutput { writer, has_video })
    }
}

impl Output for FileOutput {
    fn frames(&mut self, rgb: &[f32]) -> Result<(), RunError> {
        if self.has_video {
            self.writer.write_frames(rgb)?;
        }
        Ok(())
    }

    fn sound(&mut self, samples: &[f32], rate_hz: u32) -> Result<(), RunError> {
        let channel = |c: usize| samples.iter().skip(c).step_by(2).copied();
        let planar = channel(0).chain(channel(1)).collect();
        Ok(self.writer.write_audio(Audio::new(rate_hz, planar)?)?)
    }
}
