//! `ltxc run`: a prompt to a video with sound.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::{Kernels, Modality, Plan, Release, Sampler, Stage, Upscale, VideoSettings};
use ltxc_runtime::adapters::StageAdapters;
use ltxc_runtime::backend::{Device, KernelCounts, missing_units, open_with};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::experiments::Experiments;
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::media::{RoundTrip, Written, image_round_trip, load_image};
use ltxc_runtime::memory::{MemoryNeed, available};
use ltxc_runtime::noise_files;
use ltxc_runtime::pipeline::{Conditioning, Noise, Request, run as run_pipeline};
use ltxc_runtime::stats::Stats;
use ltxc_runtime::tokenizer::Tokenizer;
use ltxc_runtime::weights::{WeightFiles, find_tokenizer};
use serde_json::json;

use crate::adapters::{self, Loras, Opened};
use crate::args::{ContentArgs, ImageCodec, RunArgs};
use crate::choice::{Choice, Occurrences};
use crate::compile::{cached, memory, read_with_kernels};
use crate::content::{self, ImageArg};
use crate::debug::flags::DebugMode;
use crate::debug::names::components;
use crate::debug::noise::summary as noise_summary;
use crate::debug::options::DebugOptions;
use crate::debug::session::{About, Session};
use crate::debug::text::contexts::embeddings;
use crate::enhance::{self, Beginning};
use crate::facts;
use crate::inputs;
use crate::job::{self, Shape, pick};
use crate::model_files::{GEMMA, ModelFiles};
use crate::output::FileOutput;
use crate::pipelines::{definition, definition_named, describe, describe_output, refuse_idle};
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
        let seed = content::seed(&content.seed)?;
        let (said, negative) = (content::prompt(content)?, content::negative_prompt(content)?);
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
        let images = content::images(content, &choice.occurrences.image)?;
        if plan.pipeline.inputs.appends_first_image && images.is_empty() {
            bail!("pipeline `{}` passes through images; give `--image PATH FRAME` for each", plan.pipeline.name);
        }
        let crfs: BTreeSet<u8> = images.iter().map(|image| image.crf_in(plan)).collect();
        report.note(&describe_output(&plan.pipeline, &crfs));
        let conditioning = images.iter().map(|i| load(i, plan, content.image_codec)).collect::<Result<Vec<_>>>()?;
        let references = inputs::references(content, choice.occurrences, plan)?;
        let size = inputs::size_of_references(&references, plan)?;
        let stages = choice.stages(plan)?;
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
        let facts_path = choice.writing.save_json.then(|| facts::beside(to)).transpose()?;
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
                files: choice.noise_files(plan)?,
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
            output.tag("plan_hash", Some(facts::hex(&self.hash)));
            output.tag("embeddings", embeddings.map(String::from));
        }
        output.tag("experiments", (!labels.is_empty()).then(|| labels.join(", ")));
        let (width, height) = output.shown();
        let rate = plan.pipeline.video.frame_rate;
        let reads_negative = plan.pipeline.upscale.is_none() && request.needs_negative(&plan.pipeline)?;
        let mut facts = facts::sampling(plan, &request.stages, adapters);
        for (key, value) in [
            ("images", Some(images.iter().map(|image| image.facts(plan)).collect())),
            ("prompt", Some(json!(&prompt))),
            ("prompt_given", self.enhances_prompt.then(|| json!(&said))),
            ("prompt_image", seen.as_ref().map(|name| json!(name))),
            ("negative_prompt", reads_negative.then(|| json!(&negative))),
            ("embeddings", content.embeddings.as_ref().map(|path| json!(path))),
            ("seed", Some(json!(seed))),
            ("plan_hash", Some(json!(facts::hex(&self.hash)))),
            ("compiler", Some(json!(&plan.compiler))),
            ("pipeline", Some(json!(&plan.pipeline.name))),
            ("model", Some(json!(&plan.pipeline.model.generation))),
            ("experiments", (!labels.is_empty()).then(|| json!(&labels))),
            ("height", Some(json!(height))),
            ("width", Some(json!(width))),
            ("frame_rate", Some(json!([rate.0, rate.1]))),
            ("blended_to", choice.writing.fps_out.map(|rate| json!([rate.num(), rate.den()]))),
        ] {
            if let Some(value) = value {
                facts[key] = value;
            }
        }
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
        let finished = output.finish()?;
        let Written { path, frames, bytes, .. } = finished.written.clone();
        for (name, path) in &finished.beside {
            report.note(&format!("{} in `{}`", name.replace('_', " "), path.display()));
        }
        if let Some(facts_path) = facts_path {
            facts["output"] = json!(&path);
            facts["frames"] = json!(frames);
            for (name, path) in &finished.beside {
                facts[*name] = json!(path);
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
