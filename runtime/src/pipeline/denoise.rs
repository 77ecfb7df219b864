//! One denoising stage: state in, sampler steps, state out.

use std::collections::BTreeMap;

use ltxc_ir::Rate;
use ltxc_ir::plan::{Program, Stage, StageClass};

use super::observe::{Event, Observer, numerical_problem};
use super::schedule::euler_step;
use super::state::State;
use super::text::TextContext;
use crate::error::RunError;
use crate::executor::Executor;

/// The denoising programs of one stage and class, with the inputs that do not change during the stage.
pub struct Denoiser<'p> {
    programs: Vec<&'p Program>,
    class: &'p StageClass,
    floats: BTreeMap<String, Vec<f32>>,
    ints: BTreeMap<String, Vec<i32>>,
}

/// The class of a stage that takes a first-frame image or not, and so many keyframes.
///
/// # Errors
/// If the plan has no program for that.
pub fn class_of(stage: &Stage, first_frame: bool, keyframes: usize) -> Result<&StageClass, RunError> {
    let found = stage.classes.iter().find(|c| c.first_frame == first_frame && c.keyframes as usize == keyframes);
    found.ok_or_else(|| {
        let most = stage.classes.iter().map(|c| c.keyframes).max().unwrap_or(0);
        RunError::Input(format!(
            "the plan has room for one image at frame 0 and {most} elsewhere, {keyframes} elsewhere were given; \
             compile it with `--max-keyframes {keyframes}`"
        ))
    })
}

impl<'p> Denoiser<'p> {
    /// Prepares a stage: loads its programs and runs what is constant for the stage.
    ///
    /// # Errors
    /// A program that cannot be loaded or run.
    pub fn new(
        executor: &mut Executor<'p>,
        class: &'p StageClass,
        video: &State,
        audio: &State,
        text: &TextContext,
    ) -> Result<Denoiser<'p>, RunError> {
        let plan = executor.plan();
        let group = plan.groups.iter().position(|g| g.name == class.program);
        let programs = plan.programs.iter().filter(|p| Some(p.group as usize) == group).collect();
        let mut denoiser = Denoiser { programs, class, floats: BTreeMap::new(), ints: BTreeMap::new() };
        for (modality, state, context) in [("video", video, &text.video), ("audio", audio, &text.audio)] {
            denoiser.floats.insert(format!("{modality}.positions"), state.positions.clone());
            denoiser.floats.insert(format!("{modality}.context"), context.clone());
            denoiser.ints.insert(format!("{modality}.rows"), state.rows.clone());
        }
        denoiser.run(executor, Rate::Generation)?;
        Ok(denoiser)
    }

    /// Velocities of both modalities at noise level `sigma`.
    ///
    /// # Errors
    /// A program that cannot run.
    pub fn velocities(
        &mut self,
        executor: &mut Executor<'p>,
        video: &State,
        audio: &State,
        sigma: f32,
    ) -> Result<[Vec<f32>; 2], RunError> {
        for (modality, state, rows) in [("video", video, self.class.rows as usize), ("audio", audio, 1)] {
            self.floats.insert(format!("{modality}.timesteps"), state.timesteps(sigma, rows));
            self.floats.insert(format!("{modality}.sigma"), vec![sigma]);
            self.floats.insert(format!("{modality}.latent"), state.latent.clone());
        }
        self.run(executor, Rate::Evaluation)?;
        self.run(executor, Rate::Step)?;
        let step = &self.class.program;
        Ok([executor.read(step, "video.velocity")?.into_owned(), executor.read(step, "audio.velocity")?.into_owned()])
    }

    /// Runs the programs of one rate. Slots in an arena do not outlive other programs, so all inputs are written anew.
    fn run(&self, executor: &mut Executor<'p>, rate: Rate) -> Result<(), RunError> {
        for program in self.programs.iter().filter(|p| p.rate == rate) {
            for slot in &program.inputs {
                if let Some(values) = self.floats.get(&slot.name) {
                    executor.write(&program.name, &slot.name, values)?;
                } else if let Some(values) = self.ints.get(&slot.name) {
                    executor.write(&program.name, &slot.name, values)?;
                }
            }
            executor.run(&program.name)?;
        }
        Ok(())
    }
}

/// Runs all Euler steps of a stage.
///
/// # Errors
/// A program that cannot run, or [`RunError::BadNumerics`] unless they are allowed.
#[allow(clippy::too_many_arguments)] // the two states are one thing; a struct for them would only be opened again
pub fn sample<'p>(
    executor: &mut Executor<'p>,
    denoiser: &mut Denoiser<'p>,
    stage: &str,
    sigmas: &[f32],
    video: &mut State,
    audio: &mut State,
    allow_bad_numerics: bool,
    observer: &mut dyn Observer,
) -> Result<(), RunError> {
    observer.event(Event::Stage { name: stage, steps: sigmas.len() - 1 });
    for (i, pair) in sigmas.windows(2).enumerate() {
        let velocities = denoiser.velocities(executor, video, audio, pair[0])?;
        for (modality, state, velocity) in
            [("video", &mut *video, &velocities[0]), ("audio", &mut *audio, &velocities[1])]
        {
            let x0 = state.prediction(velocity, pair[0]);
            let denoised = state.blended(&x0);
            if let Some(problem) = numerical_problem(&denoised)
                && !allow_bad_numerics
            {
                let first = executor.first_bad(&denoiser.class.program)?;
                let first = first.map(|f| format!(", first of all {f},")).unwrap_or_default();
                let what = format!("the {modality} latent{first}");
                return Err(RunError::BadNumerics { stage: stage.into(), step: i + 1, what, problem: problem.into() });
            }
            euler_step(&mut state.latent, &denoised, pair[0], pair[1]);
            let name = |what: &str| format!("{stage}.step{i}.{modality}.{what}");
            observer.event(Event::Tensor { name: name("x0"), values: &x0 });
            observer.event(Event::Tensor { name: name("denoised"), values: &denoised });
            observer.event(Event::Tensor { name: name("latent"), values: &state.latent });
        }
        observer.event(Event::Step { stage, index: i + 1 });
    }
    Ok(())
}
