//! The model of one stage: programs of the plan, asked for guided predictions.

use std::collections::BTreeSet;

use ltxc_ir::plan::{Guidance, Guider, Modality, Pass, Program, Release, Sampler, Stage, StageClass, StepProgram};

use super::guidance::{ActiveGuider, Levels, Predictions, at_level};
use super::noise::{Noise, SlotShape};
use super::observe::{Event, Observer, numerical_problem};
use super::per::Per;
use super::sampler::{Model, Prediction};
use super::state::State;
use super::text::TextContext;
use crate::error::RunError;
use crate::executor::Executor;

/// Text contexts of a stage.
#[derive(Clone, Copy, Debug)]
pub struct Contexts<'a> {
    /// Of the prompt.
    pub prompt: &'a TextContext,
    /// Of the negative prompt, if guidance needs it.
    pub negative: Option<&'a TextContext>,
}

/// The model of one stage.
pub struct Denoiser<'d, 'p> {
    executor: &'d mut Executor<'p>,
    observer: &'d mut dyn Observer,
    stage: &'d Stage,
    class: &'d StageClass,
    contexts: Contexts<'d>,
    noise: &'d Noise,
    allow_bad_numerics: bool,
    guiders: Per<ActiveGuider>,
    /// Guidance by noise level.
    levels: Levels<'d>,
    sampler: Sampler,
    /// What guidance and sampler need at the current level; the programs may compute more.
    passes: Vec<Pass>,
    /// Programs whose results for the generation are in the state.
    prepared: BTreeSet<&'d str>,
    /// The program that ran last.
    latest: Option<&'d str>,
    /// Evaluations so far.
    calls: usize,
}

/// What a [`Denoiser`] needs besides the executor.
pub struct Settings<'d> {
    /// The stage.
    pub stage: &'d Stage,
    /// The programs for its conditioning.
    pub class: &'d StageClass,
    /// Guidance by noise level.
    pub guidance: Levels<'d>,
    /// Sampler.
    pub sampler: Sampler,
    /// Text.
    pub contexts: Contexts<'d>,
    /// Source of noise.
    pub noise: &'d Noise,
    /// Go on with predictions that are NaN, infinite or constant.
    pub allow_bad_numerics: bool,
}

/// The passes that guidance and sampler need.
pub fn needed_passes(guidance: Option<&Guidance>, sampler: Sampler) -> Vec<Pass> {
    let mut passes = guidance.map_or_else(|| vec![Pass::Conditioned], Guidance::passes);
    if matches!(sampler, Sampler::CfgPlusPlus { .. }) {
        passes.push(Pass::Negative);
        passes.sort_unstable();
        passes.dedup();
    }
    passes
}

/// The program of a class that updates exactly `updates` and runs at least `passes`, the cheapest one.
pub fn program_of<'c>(class: &'c StageClass, passes: &[Pass], updates: &[Modality]) -> Option<&'c StepProgram> {
    let fits = |p: &&StepProgram| p.updates == updates && passes.iter().all(|pass| p.passes.contains(pass));
    class.programs.iter().filter(fits).min_by_key(|p| p.passes.len())
}

impl<'d, 'p> Denoiser<'d, 'p> {
    /// The model of a stage.
    pub fn new(
        executor: &'d mut Executor<'p>,
        observer: &'d mut dyn Observer,
        settings: Settings<'d>,
    ) -> Denoiser<'d, 'p> {
        let Settings { stage, class, guidance, sampler, contexts, noise, allow_bad_numerics } = settings;
        let guider = |m: Modality| class.stream(m).map(|_| ActiveGuider::new(Guider::default()));
        Denoiser {
            executor,
            observer,
            stage,
            class,
            contexts,
            noise,
            allow_bad_numerics,
            guiders: Per::new(guider),
            levels: guidance,
            sampler,
            passes: Vec::new(),
            prepared: BTreeSet::new(),
            latest: None,
            calls: 0,
        }
    }

    /// Predictions of all passes for the modalities in `updates`.
    fn evaluate(
        &mut self,
        states: &Per<State>,
        sigma: f32,
        updates: &[Modality],
    ) -> Result<Per<Predictions>, RunError> {
        let found = program_of(self.class, &self.passes, updates);
        let step = found.ok_or_else(|| RunError::Internal(format!("no program of `{}` fits", self.class.name)))?;
        let plan = self.executor.plan();
        let part = |suffix: &str| plan.program(&format!("{}{suffix}", step.name));
        if self.prepared.insert(&step.name)
            && let Some(program) = part(".generation")
        {
            self.run(program, states, sigma)?;
        }
        for program in [part(".evaluation"), part("")].into_iter().flatten() {
            self.run(program, states, sigma)?;
        }
        self.latest = Some(&step.name);
        let mut predictions: Per<Predictions> = Per::default();
        for (modality, state) in states.iter().filter(|(m, _)| updates.contains(m)) {
            let of = predictions.slot(modality).insert(Predictions::default());
            for &pass in step.passes.iter().filter(|p| self.passes.contains(p)) {
                let velocity = self.executor.read_values(&step.name, &pass.velocity(modality), state.latent.len())?;
                of.insert(pass, state.prediction(&velocity, state.sigma(sigma)));
            }
        }
        Ok(predictions)
    }

    /// Runs a program. Slots in an arena do not outlive other programs, so all inputs are written anew.
    fn run(&mut self, program: &Program, states: &Per<State>, sigma: f32) -> Result<(), RunError> {
        for slot in &program.inputs {
            for (modality, state) in states.iter() {
                if let Some(field) = slot.name.strip_prefix(modality.name()).and_then(|s| s.strip_prefix('.')) {
                    self.write(program, modality, field, state, sigma)?;
                }
            }
        }
        self.executor.run(&program.name)
    }

    /// Writes one parameter of the transformer. Other slots hold what slower programs left.
    fn write(
        &mut self,
        program: &Program,
        modality: Modality,
        field: &str,
        state: &State,
        sigma: f32,
    ) -> Result<(), RunError> {
        let name = format!("{}.{field}", modality.name());
        let reported = match self.executor.plan().pipeline.release {
            Release::V1_0_0 => sigma,
            Release::V1_2_0 => state.sigma(sigma),
        };
        let sigma = state.sigma(sigma);
        let mut floats = |values: &[f32]| self.executor.write(&program.name, &name, values);
        match field {
            "latent" => floats(&state.latent),
            "positions" => floats(&state.positions),
            "sigma" => floats(&[reported]),
            "timesteps" => {
                let capacity = self.class.stream(modality).map_or(1, |s| s.rows as usize);
                let rows = state.rows().0.into_iter().map(|m| m * sigma);
                floats(&rows.chain(std::iter::repeat(sigma)).take(capacity).collect::<Vec<_>>())
            }
            "rows" => self.executor.write(&program.name, &name, &state.rows().1),
            "self_mask" => match &state.attention {
                Some(attention) => floats(attention),
                None => floats(&vec![1.0; state.tokens() * state.tokens()]),
            },
            "context" => floats(self.contexts.prompt.of(modality)),
            "negative_context" => floats(self.contexts.negative.unwrap_or(self.contexts.prompt).of(modality)),
            _ => Ok(()),
        }
    }

    fn tell(&mut self, name: &str, values: &[f32]) {
        let name = format!("{}.{name}", self.stage.name);
        self.observer.event(Event::Tensor { name, values });
    }
}

impl Model for Denoiser<'_, '_> {
    fn predict(&mut self, states: &Per<State>, sigma: f32, step: usize) -> Result<Per<Prediction>, RunError> {
        let guidance = at_level(&self.levels, sigma);
        self.passes = needed_passes(guidance, self.sampler);
        for (modality, guider) in self.guiders.iter_mut() {
            if let Some(guidance) = guidance {
                guider.change(guidance.of(modality));
            }
        }
        let skipped = |m: Modality| self.guiders.get(m).is_some_and(|g| g.skips(step));
        let updates: Vec<Modality> = states.iter().map(|(m, _)| m).filter(|&m| !skipped(m)).collect();
        let mut predictions = match updates.is_empty() {
            true => Per::default(),
            false => self.evaluate(states, sigma, &updates)?,
        };
        let mut out: Per<Prediction> = Per::default();
        for (modality, state) in states.iter() {
            let Some(guider) = self.guiders.slot(modality) else { continue };
            let passes = predictions.slot(modality).take();
            let guided = match &passes {
                Some(passes) => guider.guide(passes),
                None => guider.last().unwrap_or(&state.latent).to_vec(),
            };
            let denoised = state.blended(&guided);
            let call = format!("call{}", self.calls);
            for (pass, x0) in passes.iter().flat_map(Predictions::iter) {
                self.tell(&format!("{call}.{}.{}.x0", pass.name(), modality.name()), x0);
            }
            self.tell(&format!("{call}.{}.latent", modality.name()), &state.latent);
            self.tell(&format!("{call}.{}.denoised", modality.name()), &denoised);
            if let Some(problem) = numerical_problem(&denoised)
                && !(state.frozen || self.allow_bad_numerics)
            {
                let first = match self.latest {
                    Some(program) => self.executor.first_bad(program)?,
                    None => None,
                };
                let first = first.map(|f| format!(", first of all {f},")).unwrap_or_default();
                let what = format!("the {} latent{first}", modality.name());
                let stage = self.stage.name.clone();
                return Err(RunError::BadNumerics { stage, step: step + 1, what, problem: problem.into() });
            }
            let negative = passes.and_then(|p| Some(state.blended(p.get(Pass::Negative)?)));
            *out.slot(modality) = Some(Prediction { denoised, negative });
        }
        self.calls += 1;
        Ok(out)
    }

    fn noise(&mut self, kind: &str, step: usize, modality: Modality, count: usize) -> Result<Vec<f32>, RunError> {
        let shape = SlotShape { spatial: vec![count], channels: 1, inner: 1 };
        let slot = format!("{}.{kind}.{step:03}.{}", self.stage.name, modality.name());
        self.noise.draw_step(kind, self.sampler, &slot, &shape)
    }

    fn show(&mut self, what: &str, step: usize, modality: Modality, values: &[f32]) {
        self.tell(&format!("{what}{step}.{}.target", modality.name()), values);
    }

    fn stepped(&mut self, step: usize, states: &Per<State>) {
        for (modality, state) in states.iter() {
            self.tell(&format!("step{step}.{}.latent", modality.name()), &state.latent);
        }
        self.observer.event(Event::Step { stage: &self.stage.name, index: step + 1 });
    }
}
