//! `ltxc run`: a prompt to a video with sound.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use clap::ArgMatches;
use ltxc_compiler::Options;
use ltxc_ir::plan::{Kernels, Modality, Plan};
use ltxc_runtime::RunError;
use ltxc_runtime::adapters::StageAdapters;
use ltxc_runtime::audio_frontend::resample;
use ltxc_runtime::backend::{Device, KernelCounts, missing_units, open_with};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::media::{
    Audio, MediaWriter, OutputOptions, Rational, RoundTrip, VideoFormat, Written, image_round_trip, load_image,
};
use ltxc_runtime::memory::{MemoryNeed, available};
use ltxc_runtime::noise_files;
use ltxc_runtime::pipeline::{Conditioning, Noise, Output, Request, StageChoice, run as run_pipeline};
use ltxc_runtime::stats::Stats;
use ltxc_runtime::tokenizer::Tokenizer;
use ltxc_runtime::weights::{WeightFiles, find_tokenizer};
use serde_json::json;

use crate::adapters::{self, Loras};
use crate::args::{ContentArgs, ImageCodec, PipelineName, RunArgs, SamplingArgs};
use crate::assemble::ModelFiles;
use crate::compile::{cached, memory, read_with_kernels, unfused};
use crate::debug::flags::{DebugMode, DebugOptions};
use crate::debug::noise::summary as noise_summary;
use crate::debug::session::{About, Session};
use crate::inputs;
use crate::job::{self, ImageArg, Shape, pick};
use crate::pipelines::{definition, describe, stage_choice};
use crate::report::Report;

/// Set by Ctrl-C; the run stops at the next kernel and removes what it has begun to write.
pub static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// `ltxc run` without `--jobs`.
///
/// # Errors
/// Anything that stops the run; no output is left then.
pub fn run(args: &RunArgs, occurrences: &Occurrences, report: &mut Report) -> Result<()> {
    let images = appended_images(args.shape.pipeline, &args.content, occurrences)?;
    let debug = DebugOptions::resolve(&args.debug, &|name| std::env::var(name).ok())?;
    let runner = Runner::open(args, images, &occurrences.lora, debug.mode, report)?;
    let choice = Choice {
        content: &args.content,
        sampling: &args.shape.sampling,
        occurrences,
        output: &args.output,
        has_metadata: !args.no_metadata,
    };
    let made = runner.run(&mut runner.executor(report)?, &choice, debug, report)?;
    let kernels = json!({"launched": made.kernels.launched, "compiled": made.kernels.compiled});
    let facts = json!({"frames": made.frames, "bytes": made.bytes, "seed": made.seed, "kernels": kernels});
    report.finish(&made.path, facts);
    Ok(())
}

/// How many values each occurrence of a flag had that takes several and can be repeated.
#[derive(Clone, Debug, Default)]
pub struct Occurrences {
    /// Of `--image`.
    pub image: Vec<usize>,
    /// Of `--video-conditioning`.
    pub reference: Vec<usize>,
    /// Of `--lora`.
    pub lora: Vec<usize>,
}

impl Occurrences {
    /// Those of a parsed command.
    pub fn of(matches: &ArgMatches) -> Occurrences {
        // Not every command has all of them.
        let count = |flag: &str| {
            let found = matches.try_get_occurrences::<String>(flag).ok().flatten();
            found.map(|occurrences| occurrences.map(Iterator::count).collect()).unwrap_or_default()
        };
        Occurrences { image: count("image"), reference: count("video_conditioning"), lora: count("lora") }
    }
}

/// Number of images that a plan for this content must have room for.
///
/// # Errors
/// Values of `--image` that are no frame, strength or CRF.
pub fn appended_images(
    pipeline: Option<PipelineName>,
    content: &ContentArgs,
    occurrences: &Occurrences,
) -> Result<usize> {
    let images = job::images(&content.image, &occurrences.image)?;
    let all = definition(pipeline.unwrap_or_default()).brings.appends_first_image;
    Ok(images.iter().filter(|image| all || image.frame > 0).count())
}

/// A plan with its weights and device, to run as often as there are prompts.
pub struct Runner {
    plan: Plan,
    kernels: Option<Kernels>,
    hash: [u8; 32],
    device: Device,
    weights: WeightFiles,
    tokenizer: PathBuf,
    adapters: StageAdapters,
    is_frozen: bool,
}

/// What one run chooses.
pub struct Choice<'a> {
    /// Prompt, images and so on.
    pub content: &'a ContentArgs,
    /// Sampling and guidance.
    pub sampling: &'a SamplingArgs,
    /// Of the flags in `content`.
    pub occurrences: &'a Occurrences,
    /// Where to write.
    pub output: &'a Path,
    /// Whether the output says how it was made.
    pub has_metadata: bool,
}

/// What one run wrote.
pub struct Made {
    /// The file or folder.
    pub path: PathBuf,
    /// Number of frames.
    pub frames: u64,
    /// Size.
    pub bytes: u64,
    /// Seed.
    pub seed: u64,
    /// Launches and compilations so far.
    pub kernels: KernelCounts,
}

impl Runner {
    /// Opens a plan, or compiles one with room for so many appended images, and finds its weights. `lora_occurrences` says
    /// how many values each `--lora` had.
    ///
    /// # Errors
    /// A plan, weights or LoRAs that do not fit, or too little memory.
    pub fn open(
        args: &RunArgs,
        images: usize,
        lora_occurrences: &[usize],
        mode: DebugMode,
        report: &mut Report,
    ) -> Result<Runner> {
        let loras = Loras::open(&args.adapters, lora_occurrences)?;
        let (plan_path, folders) = plan_and_folders(args, images, &loras, mode)?;
        let (plan, kernels, hash) = read_with_kernels(&plan_path)?;
        let device = pick(&args.shape.device, Some(&plan))?;
        let weights = WeightFiles::open(&plan, &folders, args.model.verify)?;
        let fits = match loras.is_empty() {
            true => Vec::new(),
            false => loras.fit(&adapters::targets(&plan, &weights)?, &plan.pipeline.name)?,
        };
        let adapters = loras.stages(fits, &plan.pipeline, adapters::mode(args.lora_mode, &plan), report)?;
        let tokenizer = find_tokenizer(&plan.pipeline.text, &folders)?;
        let need = MemoryNeed::of(&plan, rayon::current_num_threads()).with(&plan, &weights, &adapters);
        if need.is_on_gpu {
            // The executor compares what the plan needs with what the device has.
            report.note(&format!("device {}: {}", device.name, device.description));
        }
        let missing = missing_units(&plan, &device);
        if !missing.is_empty() {
            let names = missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            report.note(&format!(
                "matrix units: the plan is for {names}, which {} lacks; products run without, slower",
                device.name
            ));
        }
        report.note(&memory(&need));
        need.check(available())?;
        let tokenizer = tokenizer.parent().unwrap_or(Path::new(".")).to_path_buf();
        Ok(Runner { plan, kernels, hash, device, weights, tokenizer, adapters, is_frozen: args.frozen })
    }

    /// Hash of the plan.
    pub fn plan_hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// An executor, which can serve any number of runs.
    ///
    /// # Errors
    /// A device that cannot be opened, or does not run the plan, or would compile a kernel for it where `--frozen` forbids
    /// that.
    pub fn executor(&self, report: &mut Report) -> Result<Executor<'_>> {
        let backend = open_with(&self.device, self.kernels.as_ref())?;
        let mut executor = Executor::on(backend, &self.plan, &self.weights, &INTERRUPT)?;
        if self.is_frozen {
            executor.freeze(self.kernels.as_ref())?;
        }
        if let Some(note) = carried(&executor, self.kernels.as_ref()) {
            report.note(&note);
        }
        Ok(executor)
    }

    /// Runs once, and collects what `debug` asks for.
    ///
    /// # Errors
    /// Anything that stops the run; no output is left then.
    pub fn run<'r>(
        &'r self,
        executor: &mut Executor<'r>,
        choice: &Choice<'_>,
        debug: DebugOptions,
        report: &mut Report,
    ) -> Result<Made> {
        let (plan, content) = (&self.plan, choice.content);
        let seed = job::seed(&content.seed)?;
        let (prompt, negative) = (job::prompt(content)?, job::negative_prompt(content)?);
        report.note(&format!("seed {seed}, {} ({})", plan.pipeline.name, plan.pipeline.model.generation));
        let images = job::images(&content.image, &choice.occurrences.image)?;
        let conditioning = images.iter().map(|i| load(i, plan, content.image_codec)).collect::<Result<Vec<_>>>()?;
        let references =
            inputs::weighted("--video-conditioning", &content.video_conditioning, &choice.occurrences.reference)?;
        let stages = stage_choices(choice, plan)?;
        for stage in &plan.pipeline.stages {
            report.note(&describe(stage, stages.get(&stage.name), &plan.pipeline.modalities()));
        }
        let request = Request {
            prompt: &prompt,
            negative_prompt: &negative,
            images: &conditioning,
            media: inputs::load(content, &references, plan)?,
            stages,
            noise: Noise { seed, given: BTreeMap::new(), files: noise_files(content) },
            adapters: self.adapters.clone(),
            allow_bad_numerics: content.allow_bad_numerics,
        };
        let tags = if choice.has_metadata { tags(&prompt, seed, &self.hash) } else { Vec::new() };
        let mut output = FileOutput::create(choice.output, plan, tags)?;
        let tokenizer = Tokenizer::from_folder(&self.tokenizer)?;
        match debug.is_on() {
            false => run_pipeline(executor, tokenizer, &request, report, &mut output)?,
            true => {
                let device = self.device.name.to_string();
                let about = About { hash: self.hash, device, seed, noise: &request.noise.files };
                let session = Session::new(plan, &self.weights, debug, &about)?;
                executor.set_tap(Some(session.tap()))?;
                run_pipeline(executor, tokenizer, &request, &mut session.observer(report), &mut output)?;
                session.finish()?.iter().for_each(|note| report.note(note));
            }
        }
        for (slot, path) in request.noise.files.iter().filter(|(_, path)| path.exists()) {
            let noise = noise_files::pick(path, slot)?;
            let stats = Stats::of(&noise.shape, &noise.values);
            report.note(&format!("noise {slot} `{}`: {}", path.display(), noise_summary(&stats)));
        }
        let Written { path, frames, bytes, .. } = output.writer.finish()?;
        let kernels = executor.kernels();
        if kernels.launched > 0 {
            let KernelCounts { launched, compiled } = kernels;
            report.note(&format!("kernels: {launched} launched, {compiled} compiled in this run"));
        }
        Ok(Made { path, frames, bytes, seed, kernels })
    }
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

/// The plan to run and where its weights are. Nothing is compiled for LoRAs that do not fit.
fn plan_and_folders(args: &RunArgs, images: usize, loras: &Loras, mode: DebugMode) -> Result<(PathBuf, Vec<PathBuf>)> {
    let Some(plan) = &args.plan else {
        if args.model.checkpoint_path.is_none() {
            bail!(
                "there is nothing to run; name a plan made by `ltxc compile`, or model files from `--checkpoint-path` on"
            );
        }
        let target = pick(&args.shape.device, None)?.target;
        let takes_clip = definition(args.shape.pipeline.unwrap_or_default()).brings.clip;
        let shape = match args.content.video_path.as_ref().filter(|_| takes_clip) {
            Some(clip) => inputs::shape_of_clip(&args.shape, clip)?,
            None => args.shape.clone(),
        };
        let has_distilled_adapter = !args.adapters.distilled_lora.is_empty();
        let shape = Shape { target, has_distilled_adapter, ..Shape::resolve(&shape, images)? };
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
fn stage_choices(choice: &Choice<'_>, plan: &Plan) -> Result<BTreeMap<String, StageChoice>> {
    let content = choice.content;
    let first = plan.pipeline.stages.first().context("the plan has no stages")?;
    let modalities = plan.pipeline.modalities();
    let steps = content.num_inference_steps;
    let first_choice = stage_choice(first, &modalities, choice.sampling, steps, content.sigmas.as_deref())?;
    let mut out = BTreeMap::from([(first.name.clone(), first_choice)]);
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

/// Sampling rate that every format has.
const COMMON_RATE_HZ: usize = 48_000;

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
        let channel = |c: usize| samples.iter().skip(c).step_by(2).copied().collect::<Vec<f32>>();
        let (left, right) = (channel(0), channel(1));
        // Sound of a recording may have a rate that an MP4 file cannot.
        let audio = match self.writer.takes_rate(rate_hz) {
            true => Audio::new(rate_hz, [left, right].concat())?,
            false => {
                let to = |x: &[f32]| resample(x, rate_hz as usize, COMMON_RATE_HZ);
                Audio::new(COMMON_RATE_HZ as u32, [to(&left)?, to(&right)?].concat())?
            }
        };
        Ok(self.writer.write_audio(audio)?)
    }
}
