//! `ltxc run`: a prompt to a video with sound.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use clap::ArgMatches;
use clap::parser::ValueSource;
use ltxc_ir::plan::{Kernels, Modality, Plan, Release, Sampler, Stage, Upscale, VideoSettings};
use ltxc_runtime::adapters::StageAdapters;
use ltxc_runtime::backend::{Device, KernelCounts, missing_units, open_with};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::experiments::Experiments;
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::media::{RoundTrip, Written, image_round_trip, load_image};
use ltxc_runtime::memory::{MemoryNeed, available};
use ltxc_runtime::noise_files;
use ltxc_runtime::pipeline::{Conditioning, Noise, Request, StageChoice, run as run_pipeline, tile_name};
use ltxc_runtime::stats::Stats;
use ltxc_runtime::tokenizer::Tokenizer;
use ltxc_runtime::weights::{WeightFiles, find_tokenizer};
use serde_json::{Value, json};

use crate::adapters::{self, Loras, Opened};
use crate::args::{ContentArgs, ImageCodec, OutputArgs, RunAdapterArgs, RunArgs, SamplingArgs, ShapeArgs};
use crate::assemble::{GEMMA, ModelFiles};
use crate::compile::{cached, memory, read_with_kernels};
use crate::debug::flags::{DebugMode, DebugOptions};
use crate::debug::names::components;
use crate::debug::noise::summary as noise_summary;
use crate::debug::session::{About, Session};
use crate::debug::text::contexts::embeddings;
use crate::enhance::{self, Beginning};
use crate::inputs;
use crate::job::{self, ImageArg, Shape, pick};
use crate::output::FileOutput;
use crate::pipelines::{definition, definition_named, describe, describe_output, levels, refuse_idle, stage_choice};
use crate::planned;
use crate::report::Report;

/// Set by Ctrl-C; the run stops at the next kernel and removes what it has begun to write.
pub static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// `ltxc run` without `--jobs`.
///
/// # Errors
/// Anything that stops the run; no output is left then.
pub fn run(args: &RunArgs, occurrences: &Occurrences, report: &mut Report) -> Result<()> {
    let debug = DebugOptions::of(&args.debug)?;
    let choice = Choice {
        content: &args.content,
        sampling: &args.shape.sampling,
        adapters: &args.adapters,
        occurrences,
        writing: &args.writing,
    };
    let loras = choice.loras()?;
    if args.adapters.lora_mode.is_some() && loras.is_empty() {
        bail!("`--lora-mode` says how LoRAs act, and there is none; give `--lora`, or leave it out");
    }
    let shape = choice.shape(args, &loras)?;
    let mut runner = Runner::open(args, shape.as_ref(), &[&loras], debug.mode.unwrap_or_default(), report)?;
    let adapters = runner.prepare(&choice, &loras, report)?;
    let output = args.output.clone().unwrap_or_else(|| runner.usual_output("out", &args.content));
    let made = runner.run(&mut runner.executor(report)?, &choice, &adapters, &output, debug, report)?;
    let kernels = json!({"launched": made.kernels.launched, "compiled": made.kernels.compiled});
    let mut facts = json!({"frames": made.frames, "bytes": made.bytes, "seed": made.seed, "kernels": kernels});
    if !made.experiments.is_empty() {
        facts["experiments"] = json!(made.experiments);
    }
    report.finish(&made.path, facts);
    Ok(())
}

/// Which flags were given, and how many values each occurrence had of those that take several and can be repeated.
#[derive(Clone, Debug, Default)]
pub struct Occurrences {
    /// Of `--image`.
    pub image: Vec<usize>,
    /// Of `--video-conditioning`.
    pub reference: Vec<usize>,
    /// Of `--lora`.
    pub lora: Vec<usize>,
    /// Ids of all flags that are given.
    pub given: Vec<String>,
}

impl Occurrences {
    /// Those of a parsed command.
    pub fn of(matches: &ArgMatches) -> Occurrences {
        // Not every command has all of them.
        let count = |flag: &str| {
            let found = matches.try_get_occurrences::<String>(flag).ok().flatten();
            found.map(|occurrences| occurrences.map(Iterator::count).collect()).unwrap_or_default()
        };
        let ids = matches.ids().map(|id| id.as_str());
        let given = ids.filter(|id| matches.value_source(id) == Some(ValueSource::CommandLine)).map(String::from);
        Occurrences {
            image: count("image"),
            reference: count("video_conditioning"),
            lora: count("lora"),
            given: given.collect(),
        }
    }
}

/// What one run chooses.
#[derive(Clone, Copy)]
pub struct Choice<'a> {
    /// Prompt, images and so on.
    pub content: &'a ContentArgs,
    /// Sampling and guidance.
    pub sampling: &'a SamplingArgs,
    /// LoRAs.
    pub adapters: &'a RunAdapterArgs,
    /// Of the flags in `content` and `adapters`.
    pub occurrences: &'a Occurrences,
    /// How to write.
    pub writing: &'a OutputArgs,
}

impl Choice<'_> {
    /// Opens its LoRAs.
    ///
    /// # Errors
    /// Values that are no strength or stage, or a file that is no LoRA.
    pub fn loras(&self) -> Result<Loras> {
        Loras::open(&self.adapters.adapters, &self.occurrences.lora)
    }

    /// The shape of a plan for it, of a command that has none.
    ///
    /// # Errors
    /// Values of flags that no plan could have, media that the pipeline does not take or that cannot be read, or LoRAs that
    /// are missing.
    pub fn shape(&self, args: &RunArgs, loras: &Loras) -> Result<Option<Shape>> {
        let (content, occurrences) = (self.content, self.occurrences);
        let images = job::images(content, &occurrences.image)?;
        let has_attention =
            inputs::attention_strength(content)?.is_some() || !content.conditioning_attention_mask.is_empty();
        if args.plan.is_some() {
            return Ok(None);
        }
        let pipeline = args.shape.pipeline.unwrap_or_default();
        inputs::check_given(pipeline, content)?;
        refuse_idle(definition(pipeline), &occurrences.given, self.sampling)?;
        if !args.model.names_model() {
            bail!(
                "there is nothing to run; name a plan made by `ltxc compile`, or model files from `--checkpoint-path` on"
            );
        }
        let named = definition(pipeline);
        loras.check_complete(named)?;
        loras.check_range(named.name, named.brings.pads_references, content.hdr)?;
        let references = u32::try_from(occurrences.reference.len()).ok().filter(|&n| n > 0);
        let given = ShapeArgs {
            reference_count: args.shape.reference_count.or(references),
            reference_attention: args.shape.reference_attention || has_attention,
            ..args.shape.clone()
        };
        let (given, reference_seconds) = inputs::shape_of_media(&given, content, loras.reference_scale()?.space)?;
        let appended = images.iter().filter(|image| named.brings.appends_first_image || image.frame != Some(0)).count();
        let mut shape = Shape::resolve(&given, appended)?.with(loras)?;
        shape.target = pick(&args.shape.device, None)?.target;
        shape.reference_seconds = reference_seconds;
        shape.references.frames = inputs::shortest(content, occurrences, shape.frame_rate)?;
        Ok(Some(shape))
    }
}

/// A plan with its weights and device, to run as often as there are prompts.
pub struct Runner {
    plan: Plan,
    kernels: Option<Kernels>,
    hash: [u8; 32],
    device: Device,
    weights: WeightFiles,
    /// Folder of the tokenizer; none where contexts come from elsewhere.
    tokenizer: Option<PathBuf>,
    /// LoRAs of its runs.
    opened: Opened,
    /// What was said about them.
    told: BTreeSet<String>,
    encodes_text: bool,
    enhances_prompt: bool,
    is_frozen: bool,
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
    /// What it deviates from the model in.
    pub experiments: Vec<String>,
    /// Launches and compilations so far.
    pub kernels: KernelCounts,
}

impl Runner {
    /// Opens the plan of a command, or compiles one of this shape for runs with these LoRAs, and finds its weights.
    ///
    /// # Errors
    /// A plan, weights or LoRAs that do not fit.
    pub fn open(
        args: &RunArgs,
        shape: Option<&Shape>,
        loras: &[&Loras],
        mode: DebugMode,
        report: &mut Report,
    ) -> Result<Runner> {
        let (plan_path, folders) = plan_and_folders(args, shape, loras, mode)?;
        let (plan, kernels, hash) = read_with_kernels(&plan_path)?;
        match args.plan {
            Some(_) => planned::check(&args.shape, &plan_path, &plan)?,
            None => job::say_passed_over(&args.shape.device, report)?,
        }
        let enhances_prompt = args.shape.enhance_prompt;
        let device = pick(&args.shape.device, Some(&plan))?;
        // Contexts from elsewhere need no text encoder, and nothing else reads text.
        let encodes_text = args.content.embeddings.is_none() && plan.pipeline.upscale.is_none();
        if encodes_text && plan.pipeline.text.buckets.is_empty() {
            bail!("`{}` was compiled without a text encoder; give contexts with `--embeddings`", plan_path.display());
        }
        let unused = if encodes_text { None } else { Some(GEMMA) };
        let weights = WeightFiles::open_without(&plan, &folders, args.model.verify, unused)?;
        let tokenizer = encodes_text.then(|| find_tokenizer(&plan.pipeline.text, &folders)).transpose()?;
        if MemoryNeed::of(&plan, rayon::current_num_threads()).is_on_gpu {
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
        let tokenizer = tokenizer.map(|path| path.parent().unwrap_or(Path::new(".")).to_path_buf());
        Ok(Runner {
            plan,
            kernels,
            hash,
            device,
            weights,
            tokenizer,
            opened: Opened::new(),
            told: BTreeSet::new(),
            encodes_text,
            enhances_prompt,
            is_frozen: args.frozen,
        })
    }

    /// The adapters of a run in every stage. Says what it needs, if no run before said the same.
    ///
    /// # Errors
    /// LoRAs that do not fit the model or the plan, or too little memory.
    pub fn prepare(&mut self, choice: &Choice<'_>, loras: &Loras, report: &mut Report) -> Result<StageAdapters> {
        let (plan, weights) = (&self.plan, &self.weights);
        inputs::check_text(&plan.pipeline.name, plan.pipeline.upscale.is_none(), choice.content)?;
        if let Some(definition) = definition_named(&plan.pipeline.name) {
            refuse_idle(definition, &choice.occurrences.given, choice.sampling)?;
        }
        let fits = match loras.is_empty() {
            true => Vec::new(),
            false => loras.fit(&adapters::targets(plan, weights)?, &plan.pipeline.name)?,
        };
        loras.check_references(&plan.pipeline)?;
        loras.check_range(&plan.pipeline.name, plan.pipeline.inputs.pads_references, choice.content.hdr)?;
        let mode = adapters::mode(choice.adapters.lora_mode, plan);
        let (adapters, mut notes) = loras.stages(fits, &plan.pipeline, mode, &mut self.opened)?;
        let experiments = Experiments::new(choice.content.experiment.clone(), plan)?;
        let mut need = MemoryNeed::of(plan, rayon::current_num_threads()).with(plan, weights, &adapters);
        need = need.with_copies(plan, &|_, _, key| experiments.changes(key));
        need.parts.retain(|part| self.encodes_text || part.name != "text");
        notes.push(memory(&need));
        for note in notes {
            if !self.told.contains(&note) {
                report.note(&note);
                self.told.insert(note);
            }
        }
        need.check(available())?;
        Ok(adapters)
    }

    /// Hash of the plan.
    pub fn plan_hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// The output of a run that names none: a video, sound alone, or a folder for EXR frames.
    pub fn usual_output(&self, stem: &str, content: &ContentArgs) -> PathBuf {
        let pipeline = &self.plan.pipeline;
        let is_hdr = pipeline.inputs.pads_references || content.hdr.is_some();
        match (pipeline.modalities().contains(&Modality::Video), is_hdr) {
            (false, _) => format!("{stem}.wav"),
            (true, true) => stem.into(),
            (true, false) => format!("{stem}.mp4"),
        }
        .into()
    }

    /// The components that run.
    fn components(&self) -> Vec<&'static str> {
        let encodes_text = self.tokenizer.is_some();
        components(&self.plan).into_iter().filter(|&c| encodes_text || c != "text_encoder").collect()
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

    /// Runs once with [`Runner::prepare`]d adapters, writes the output `to`, and collects what `debug` asks for.
    ///
    /// # Errors
    /// Anything that stops the run; no output is left then.
    pub fn run<'r>(
        &'r self,
        executor: &mut Executor<'r>,
        choice: &Choice<'_>,
        adapters: &StageAdapters,
        to: &Path,
        debug: DebugOptions,
        report: &mut Report,
    ) -> Result<Made> {
        let (plan, content) = (&self.plan, choice.content);
        let debug = debug.only(&self.components())?;
        if self.enhances_prompt {
            enhance::check(plan, content)?;
        }
        let seed = job::seed(&content.seed)?;
        let (said, negative) = (job::prompt(content)?, job::negative_prompt(content)?);
        let embeddings = content.embeddings.as_deref().map(|path| embeddings(path, plan)).transpose()?;
        let experiments = Experiments::new(content.experiment.clone(), plan)?;
        for label in experiments.labels() {
            report.note(&format!("EXPERIMENT {label}: this is not what the model does, and the output says so"));
        }
        let release = match plan.pipeline.release {
            Release::V1_0_0 => ", as release 1.0.0 of the reference",
            Release::V1_2_0 => "",
        };
        report.note(&format!("seed {seed}, {} ({}){release}", plan.pipeline.name, plan.pipeline.model.generation));
        let images = job::images(content, &choice.occurrences.image)?;
        if plan.pipeline.inputs.appends_first_image && images.is_empty() {
            bail!("pipeline `{}` passes through images; give `--image PATH FRAME` for each", plan.pipeline.name);
        }
        let crfs: BTreeSet<u8> = images.iter().map(|image| image.crf_in(plan)).collect();
        report.note(&describe_output(&plan.pipeline, &crfs));
        let conditioning = images.iter().map(|i| load(i, plan, content.image_codec)).collect::<Result<Vec<_>>>()?;
        let references = inputs::references(content, choice.occurrences, plan)?;
        let size = inputs::size_of_references(&references, plan)?;
        let stages = stage_choices(choice, plan)?;
        for stage in &plan.pipeline.stages {
            report.note(&describe(stage, stages.get(&stage.name), &plan.pipeline.modalities()));
        }
        let sampler_of = |stage: &Stage| stages.get(&stage.name).and_then(|c| c.sampler).unwrap_or(stage.sampler);
        if content.compat.is_some() && !plan.pipeline.stages.iter().any(|stage| sampler_of(stage) == Sampler::Res2s) {
            let name = &plan.pipeline.name;
            bail!("`--compat official` is about the noise of sampler res2s, which pipeline `{name}` does not use here");
        }
        if let Some(Upscale { clip: [frames, height, width], clip_rate: (num, den), .. }) = &plan.pipeline.upscale {
            let VideoSettings { frames: f, height: h, width: w, frame_rate: (n, d), .. } = &plan.pipeline.video;
            report.note(&format!("{frames} frames of {width}x{height} at {num}/{den} to {f} of {w}x{h} at {n}/{d}"));
        }
        if plan.pipeline.inputs.doubles_frames {
            let made = plan.pipeline.video.frames;
            report.note(&format!("high quality: {made} frames are made, {} of them are written", made.div_ceil(2)));
        }
        let media = inputs::load(content, &references, plan, report)?;
        let hdr = inputs::colour_space(content, plan)?;
        let facts_path = choice.writing.save_json.then(|| sidecar(to));
        if let Some(path) = facts_path.as_ref().filter(|path| path.is_dir()) {
            bail!("`--save-json` writes `{}`, which is a folder; move it, or name another output", path.display());
        }
        let mut facts = sampling_facts(plan, &stages, adapters);
        facts["images"] = images.iter().map(|image| image.facts(plan)).collect();
        let mut output = FileOutput::create(to, plan, size, hdr, choice.writing)?;
        let tokenizer = match &self.tokenizer {
            Some(folder) => Some(Tokenizer::from_folder(folder)?),
            None if embeddings.is_none() && plan.pipeline.upscale.is_none() => {
                bail!("the text encoder was not loaded, because of `--embeddings` for all jobs; give it to every job")
            }
            None => None,
        };
        let (mut prompt, mut seen) = (said.clone(), None);
        if let (true, Some(tokenizer)) = (self.enhances_prompt, &tokenizer) {
            let seed = enhance::seed_of(&plan.pipeline.name, seed);
            let first = images.first().map(|image| &*image.path);
            let beginning = first.map_or(Beginning::Open, Beginning::Image);
            let (written, has_seen) = enhance::enhanced(executor, tokenizer, &said, beginning, seed, report)?;
            report.note(&format!("enhanced prompt: {written}"));
            prompt = written;
            seen = first.filter(|_| has_seen).and_then(Path::file_name).map(|name| name.to_string_lossy());
        }
        let request = Request {
            prompt: &prompt,
            negative_prompt: &negative,
            embeddings: embeddings.as_ref(),
            images: &conditioning,
            media,
            stages,
            noise: Noise {
                seed,
                fixes_res2s: content.compat.is_some(),
                files: noise_files(content, plan)?,
                folder: content.noise_bundle.clone(),
                spares_decoders: content.no_decode_noise || debug.spares_decoders,
                ..Noise::default()
            },
            adapters: adapters.clone(),
            experiments,
            allow_bad_numerics: content.allow_bad_numerics,
        };
        let labels = request.experiments.labels();
        if !choice.writing.no_metadata {
            let given = self.enhances_prompt.then(|| said.clone());
            let embeddings =
                content.embeddings.as_ref().map(|path| path.file_name().unwrap_or_default().to_string_lossy());
            output.tag("comment", Some(prompt.clone()).filter(|_| plan.pipeline.upscale.is_none()));
            output.tag("prompt_given", given);
            output.tag("prompt_image", seen.as_deref().map(String::from));
            output.tag("seed", Some(seed.to_string()));
            output.tag("plan_hash", Some(hex(&self.hash)));
            output.tag("embeddings", embeddings.map(String::from));
        }
        output.tag("experiments", (!labels.is_empty()).then(|| labels.join(", ")));
        let about = About {
            hash: Some(self.hash),
            device: self.device.name.to_string(),
            seed: Some(seed),
            noise: request.noise.files.clone(),
            spares_decoders: request.noise.spares_decoders,
            experiments: labels.clone(),
            run: None,
        };
        let session = Session::new(debug, about);
        if let Some(tap) = session.tap(plan, &self.weights, None)? {
            executor.set_tap(Some(tap))?;
        }
        run_pipeline(executor, tokenizer, &request, &mut session.observer(report), &mut output)?;
        session.finish()?.iter().for_each(|note| report.note(note));
        for (slot, path) in request.noise.files.iter().filter(|(_, path)| path.exists()) {
            let noise = noise_files::pick(path, slot)?;
            let stats = Stats::of(&noise.shape, &noise.values);
            report.note(&format!("noise {slot} `{}`: {}", path.display(), noise_summary(&stats)));
        }
        let shown = output.shown();
        let finished = output.finish()?;
        let Written { path, frames, bytes, .. } = finished.written.clone();
        for (name, path) in &finished.beside {
            report.note(&format!("{} in `{}`", name.replace('_', " "), path.display()));
        }
        if let Some(facts_path) = facts_path {
            let rate = plan.pipeline.video.frame_rate;
            for (key, value) in [
                ("output", json!(&path)),
                ("prompt", json!(&prompt)),
                ("seed", json!(seed)),
                ("plan_hash", json!(hex(&self.hash))),
                ("compiler", json!(&plan.compiler)),
                ("pipeline", json!(&plan.pipeline.name)),
                ("model", json!(&plan.pipeline.model.generation)),
                ("height", json!(shown.1)),
                ("width", json!(shown.0)),
                ("frames", json!(frames)),
                ("frame_rate", json!([rate.0, rate.1])),
            ] {
                facts[key] = value;
            }
            if plan.pipeline.upscale.is_none() && request.needs_negative(&plan.pipeline)? {
                facts["negative_prompt"] = json!(negative);
            }
            if self.enhances_prompt {
                facts["prompt_given"] = json!(said);
            }
            for (name, path) in &finished.beside {
                facts[*name] = json!(path);
            }
            if let Some(rate) = choice.writing.fps_out {
                facts["blended_to"] = json!([rate.num(), rate.den()]);
            }
            if let Some(name) = &seen {
                facts["prompt_image"] = json!(name);
            }
            if let Some(path) = &content.embeddings {
                facts["embeddings"] = json!(path);
            }
            if !labels.is_empty() {
                facts["experiments"] = json!(labels);
            }
            if let Err(error) = write_atomically(&facts_path, format!("{facts:#}\n").as_bytes()) {
                finished.remove();
                return Err(error.into());
            }
        }
        let kernels = executor.kernels();
        if kernels.launched > 0 {
            let KernelCounts { launched, compiled } = kernels;
            report.note(&format!("kernels: {launched} launched, {compiled} compiled in this run"));
        }
        Ok(Made { path, frames, bytes, seed, kernels, experiments: labels })
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
fn plan_and_folders(
    args: &RunArgs,
    shape: Option<&Shape>,
    loras: &[&Loras],
    mode: DebugMode,
) -> Result<(PathBuf, Vec<PathBuf>)> {
    if let Some(shape) = shape {
        let files = ModelFiles::of_pipeline(&args.model, shape.pipeline, args.content.embeddings.is_none())?;
        // The cache knows what is in files, and not what they are called.
        let named = definition(shape.pipeline);
        if named.denoises() {
            named.check_training(&files.model, shape.has_distilled_adapter)?;
        }
        job::refuse_quantization(&args.shape, files.model.name(), files.model.has_fp8())?;
        loras.iter().try_for_each(|loras| loras.check(&files.model, definition(shape.pipeline).name))?;
        let is_of_clip =
            definition(shape.pipeline).brings.clip && args.shape.height.is_none() && args.shape.size.is_none();
        let path = cached(&files, shape, &mode.compiler()).map_err(|error| match is_of_clip {
            true => error.context(format!("a plan for a clip of {}x{}", shape.width, shape.height)),
            false => error,
        })?;
        return Ok((path, [files.paths(), args.weights.clone()].concat()));
    }
    let plan = args.plan.as_ref().context("a command without a plan has a shape")?;
    if plan.extension().is_none() && !plan.exists() {
        bail!("there is no plan `{}`, and no pipeline of this name; `ltxc help run` lists pipelines", plan.display());
    }
    if mode == DebugMode::Exact {
        bail!("`--debug-mode exact` compiles the model without fusion; name model files instead of a plan");
    }
    let mut folders = args.weights.clone();
    folders.extend(args.model.paths().cloned());
    if folders.is_empty() {
        let beside = plan.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        folders.push(beside.into());
    }
    Ok((plan.clone(), folders))
}

fn load(arg: &ImageArg, plan: &Plan, codec: ImageCodec) -> Result<Conditioning> {
    let crf = arg.crf_in(plan);
    let codec = match codec {
        ImageCodec::Auto => RoundTrip::Auto,
        ImageCodec::Embedded => RoundTrip::Embedded,
        ImageCodec::Ffmpeg => RoundTrip::Ffmpeg,
    };
    let image = image_round_trip(&load_image(&arg.path)?, crf, codec)?;
    Ok(Conditioning { image, frame: arg.frame_in(plan), strength: arg.strength })
}

/// What the flags change in the stages of a plan.
fn stage_choices(choice: &Choice<'_>, plan: &Plan) -> Result<BTreeMap<String, StageChoice>> {
    let content = choice.content;
    let Some(first) = plan.pipeline.stages.first() else { return Ok(BTreeMap::new()) };
    let modalities = plan.pipeline.modalities();
    let steps = content.num_inference_steps;
    let mut first_choice = stage_choice(first, &modalities, choice.sampling, steps, content.sigmas.as_deref())?;
    if let Some(table) = &content.guidance_table {
        let planned = first_choice.guidance.as_ref().or(first.guidance.as_ref());
        first_choice.levels = levels(table, planned, &modalities)?;
    }
    let mut out = BTreeMap::from([(first.name.clone(), first_choice)]);
    if let Some(list) = &content.sigmas_stage2 {
        out.insert("stage2".into(), StageChoice { sigmas: Some(list.clone()), ..StageChoice::default() });
    }
    if let Some(steps) = content.steps_stage2 {
        let second = plan.pipeline.stages.get(1).context("`--steps-stage2`: the plan has one stage; leave it out")?;
        let own = SamplingArgs::default();
        let choice = stage_choice(second, &modalities, &own, Some(steps), None).context("`--steps-stage2`")?;
        out.insert(second.name.clone(), choice);
    }
    Ok(out)
}

/// Noise levels, sampler, guidance and LoRAs of every stage, for machines.
fn sampling_facts(plan: &Plan, stages: &BTreeMap<String, StageChoice>, adapters: &StageAdapters) -> Value {
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

/// Files of noise by slot: those that are named, or those of the bundle for all that the plan makes.
fn noise_files(content: &ContentArgs, plan: &Plan) -> Result<BTreeMap<String, PathBuf>> {
    if let Some(folder) = &content.noise_bundle {
        let stages = plan.pipeline.stages.iter();
        let made = plan.pipeline.modalities();
        let names = |stage: &Stage| -> Vec<String> {
            match &stage.tiles {
                Some(tiles) => (0..tiles.len()).map(|i| tile_name(&stage.name, i)).collect(),
                None => vec![stage.name.clone()],
            }
        };
        let slots = stages.flat_map(names).flat_map(|s| made.iter().map(move |m| format!("{s}.{}", m.name())));
        std::fs::create_dir_all(folder).with_context(|| format!("`{}`", folder.display()))?;
        return Ok(slots.map(|slot| (slot.clone(), noise_files::in_folder(folder, &slot))).collect());
    }
    let slots = [
        ("stage1.video", &content.ltx2_initial_latent_path),
        ("stage1.audio", &content.ltx2_audio_latent_path),
        ("stage2.video", &content.ltx2_refine_noise_path),
        ("stage2.audio", &content.ltx2_refine_audio_noise_path),
    ];
    let slots: BTreeMap<String, PathBuf> =
        slots.into_iter().filter_map(|(slot, path)| Some((slot.to_string(), path.clone()?))).collect();
    for stage in plan.pipeline.stages.iter().filter(|stage| stage.tiles.is_some()) {
        if let Some(path) = slots.iter().find_map(|(slot, path)| slot.starts_with(&stage.name).then_some(path)) {
            bail!(
                "{} runs in tiles, each with noise of its own; give `--noise-bundle` instead of `{}`",
                stage.name,
                path.display()
            );
        }
    }
    Ok(slots)
}

/// The file that says how `output` was made.
fn sidecar(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_os_string();
    name.push(".json");
    name.into()
}

fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|b| format!("{b:02x}")).collect()
}
