//! Running a whole pipeline for its tensors instead of its picture.
//!
//! The arguments of commands that do so are a [`RunOf`], as those of commands that run single graphs are a
//! [`Side`](super::modules::Side).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use ltxc_compiler::Options;
use ltxc_ir::plan::Plan;
use ltxc_runtime::RunError;
use ltxc_runtime::adapters::StageAdapters;
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::pipeline::{Conditioning, Event, Media, Noise, Observer, Output, Request, StageChoice, run};
use ltxc_runtime::tap::Tap;
use ltxc_runtime::tokenizer::Tokenizer;
use ltxc_runtime::weights::{WeightFiles, find_tokenizer};

use super::flags::{DebugFlags, DebugMode};
use super::names::components;
use super::options::DebugOptions;
use super::session::{About, Session};
use crate::args::{ModelArgs, PipelineName, Precision, ShapeArgs};
use crate::compile::compile;
use crate::job::{Shape, pick};
use crate::model_files::ModelFiles;
use crate::pipelines::{Definition, definition};
use crate::run::INTERRUPT;

/// A model and a run of it.
#[derive(Debug, Args)]
pub struct RunOf {
    /// Prompt.
    #[arg(long, short, default_value = "a red fox in deep snow")]
    pub prompt: String,
    /// Seed of all noise.
    #[arg(long, default_value_t = 10)]
    pub seed: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub debug: DebugFlags,
}

impl RunOf {
    /// Compiles the pipeline; without fusion if every value is to be seen, which is `usual` where nobody says otherwise.
    ///
    /// # Errors
    /// Model files that are missing or do not fit, or a log that the pipeline cannot give.
    pub fn open(&self, usual: DebugMode) -> Result<OpenRun<'_>> {
        let mut options = DebugOptions::of(&self.debug)?;
        let mode = options.mode.unwrap_or(usual);
        options.mode = Some(mode);
        check_prompt_is_all(self.shape.pipeline.unwrap_or_default())?;
        let device = pick(&self.shape.device, None)?;
        // What is looked for is not rounding, unless somebody says so.
        let dtype = self.shape.dtype.or(Some(Precision::F32));
        let shape = Shape::resolve(&ShapeArgs { dtype, ..self.shape.clone() }, 0)?;
        let files = ModelFiles::open(&self.model, shape.has_two_stages())?;
        let plan = plan_for(&files, &shape, &device, mode.compiler())?;
        let spares_decoders = options.spares_decoders;
        let device_name = device.name.to_string();
        let about = About { device: device_name, seed: Some(self.seed), spares_decoders, ..About::default() };
        let session = Session::new(options.only(&components(&plan))?, about);
        Ok(OpenRun { of: self, session, spares_decoders, plan, paths: files.paths(), device })
    }

    /// Compiles and runs; `tap` looks at values of the plan that it is given. Noise that is not in `given` is drawn.
    pub(super) fn run(
        &self,
        usual: DebugMode,
        given: BTreeMap<String, Vec<f32>>,
        tap: impl FnOnce(&Plan) -> Option<Box<dyn Tap>>,
    ) -> Result<(Plan, Tensors)> {
        let open = self.open(usual)?;
        let tap = tap(&open.plan);
        let tensors = match open.run(given, tap)? {
            (tensors, Ok(())) => tensors,
            (_, Err(e)) => return Err(e.into()),
        };
        Ok((open.plan, tensors))
    }
}

/// A pipeline that was compiled.
pub struct OpenRun<'a> {
    of: &'a RunOf,
    session: Session,
    spares_decoders: bool,
    /// Its plan.
    pub plan: Plan,
    paths: Vec<PathBuf>,
    device: Device,
}

impl OpenRun<'_> {
    /// Runs it, with the logs that were asked for. Gives what came before `tap` ended it, if it did, and why it ended.
    ///
    /// # Errors
    /// What keeps the run from beginning, or logs that cannot be written.
    pub fn run(
        &self,
        given: BTreeMap<String, Vec<f32>>,
        tap: Option<Box<dyn Tap>>,
    ) -> Result<(Tensors, Result<(), RunError>)> {
        let pipeline = Pipeline {
            plan: &self.plan,
            paths: self.paths.clone(),
            device: &self.device,
            session: &self.session,
            prompt: &self.of.prompt,
            negative_prompt: "",
            images: &[],
            media: Media::default(),
            stages: BTreeMap::new(),
            adapters: StageAdapters::default(),
            noise: Noise { seed: self.of.seed, given, spares_decoders: self.spares_decoders, ..Noise::default() },
        };
        let ran = pipeline.run_until(tap)?;
        self.session.close()?;
        Ok(ran)
    }
}

/// What is run.
pub struct Pipeline<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Files and folders with its weights and tokenizer.
    pub paths: Vec<PathBuf>,
    /// What runs it.
    pub device: &'a Device,
    /// What is logged.
    pub session: &'a Session,
    /// Prompt.
    pub prompt: &'a str,
    /// What not to show, for guided pipelines.
    pub negative_prompt: &'a str,
    /// Images.
    pub images: &'a [Conditioning],
    /// Clips and recordings.
    pub media: Media,
    /// What differs from the plan, by stage.
    pub stages: BTreeMap<String, StageChoice>,
    /// Adapters of every stage.
    pub adapters: StageAdapters,
    /// Noise.
    pub noise: Noise,
}

/// What a run gave.
#[derive(Debug, Default)]
pub struct Tensors {
    /// Tensors of the driver by name; frames as decoded are `final.frames`.
    pub tensors: BTreeMap<String, Vec<f32>>,
    /// Their names in the order in which they came.
    pub order: Vec<String>,
    /// Frames as they are written, in `[0, 1]`.
    pub frames: Vec<f32>,
    /// Sound, `[samples, 2]`.
    pub sound: Vec<f32>,
}

/// Refuses a pipeline that needs more than a prompt, which is all that commands of this folder bring.
///
/// # Errors
/// A pipeline that needs a clip, reference videos or a recording.
pub(super) fn check_prompt_is_all(pipeline: PipelineName) -> Result<()> {
    let Definition { name, brings, .. } = definition(pipeline);
    if brings.clip || brings.references > 0 || brings.sound.is_some() {
        bail!(
            "pipeline `{name}` needs more than a prompt, and this command brings nothing else; name another pipeline, or \
             look into `ltxc run` with its flags of logs"
        );
    }
    Ok(())
}

/// Compiles a plan for a device.
///
/// # Errors
/// A model that does not fit the pipeline, or sizes that it cannot run.
pub fn plan_for(files: &ModelFiles, shape: &Shape, device: &Device, options: Options) -> Result<Plan> {
    let shape = Shape { target: device.target.clone(), ..shape.clone() };
    compile(files, &shape, options, &mut |_, _, _| {})
}

impl Pipeline<'_> {
    /// Runs it. Numbers that are not finite do not end it: finding them is what debugging is for.
    ///
    /// # Errors
    /// Weights that are missing, or a device that cannot run the plan.
    pub fn run(self, tap: Option<Box<dyn Tap + '_>>) -> Result<Tensors> {
        let (tensors, result) = self.run_until(tap)?;
        result?;
        Ok(tensors)
    }

    /// The same for taps that may end the run: gives what came before that, and why it ended.
    ///
    /// # Errors
    /// What keeps the run from beginning.
    pub fn run_until(self, tap: Option<Box<dyn Tap + '_>>) -> Result<(Tensors, Result<(), RunError>)> {
        let weights = WeightFiles::open(self.plan, &self.paths, false)?;
        let tokenizer = find_tokenizer(&self.plan.pipeline.text, &self.paths)?;
        let tokenizer = Tokenizer::from_folder(tokenizer.parent().unwrap_or(Path::new(".")))?;
        let mut executor = Executor::on(open(self.device)?, self.plan, &weights, &INTERRUPT)?;
        executor.set_tap(self.session.tap(self.plan, &weights, tap)?)?;
        let request = Request {
            prompt: self.prompt,
            negative_prompt: self.negative_prompt,
            images: self.images,
            media: self.media,
            stages: self.stages,
            adapters: self.adapters,
            noise: self.noise,
            allow_bad_numerics: true,
            ..Request::default()
        };
        let mut collected = Tensors::default();
        let mut output = Written::default();
        let mut collecting = Collecting(&mut collected);
        let result = run(&mut executor, tokenizer, &request, &mut self.session.observer(&mut collecting), &mut output);
        Ok((Tensors { frames: output.frames, sound: output.sound, ..collected }, result))
    }
}

struct Collecting<'a>(&'a mut Tensors);

impl Observer for Collecting<'_> {
    fn event(&mut self, event: Event<'_>) {
        let Event::Tensor { name, values } = &event else { return };
        if !self.0.tensors.contains_key(name) {
            self.0.order.push(name.clone());
        }
        // Frames come in chunks.
        self.0.tensors.entry(name.clone()).or_default().extend_from_slice(values);
    }
}

#[derive(Default)]
struct Written {
    frames: Vec<f32>,
    sound: Vec<f32>,
}

impl Output for Written {
    fn frames(&mut self, rgb: &[f32]) -> Result<(), RunError> {
        self.frames.extend_from_slice(rgb);
        Ok(())
    }

    fn sound(&mut self, samples: &[f32], _: u32) -> Result<(), RunError> {
        self.sound.extend_from_slice(samples);
        Ok(())
    }
}
