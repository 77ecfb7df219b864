//! Running a whole pipeline for its tensors instead of its picture.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
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

use super::session::Session;
use crate::assemble::ModelFiles;
use crate::compile::compile;
use crate::job::Shape;
use crate::run::INTERRUPT;

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
