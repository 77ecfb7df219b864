//! What a run may choose without compiling again, and whether the plan has room for it.

use std::collections::BTreeMap;

use ltxc_ir::plan::{Guidance, Modality, Pass, Pipeline, Sampler, SoundRole, Stage, StageClass, StreamClass};
use ltxc_ir::tiling::AxisTile;

use super::denoise::{needed_passes, program_of};
use super::guidance::Levels;
use super::media::Media;
use super::noise::Noise;
use super::per::Per;
use super::schedule::check_sigmas;
use super::text::Embeddings;
use crate::adapters::StageAdapters;
use crate::error::RunError;
use crate::experiments::Experiments;
use crate::media::RgbImage;

/// What a run may choose.
#[derive(Default)]
pub struct Request<'a> {
    /// What to show.
    pub prompt: &'a str,
    /// What not to show; only guided pipelines read it.
    pub negative_prompt: &'a str,
    /// Contexts that were encoded elsewhere, instead of both prompts.
    pub embeddings: Option<&'a Embeddings>,
    /// Images to start from or to pass through, in the order they were given.
    pub images: &'a [Conditioning],
    /// Clips and recordings.
    pub media: Media,
    /// What differs from the plan, by stage name.
    pub stages: BTreeMap<String, StageChoice>,
    /// Where noise comes from.
    pub noise: Noise,
    /// Adapters of every stage.
    pub adapters: StageAdapters,
    /// Deviations from the model.
    pub experiments: Experiments,
    /// Go on with latents that are NaN, infinite or constant.
    pub allow_bad_numerics: bool,
}

/// What a run chooses for one stage; `None` leaves it as the plan says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageChoice {
    /// Noise levels.
    pub sigmas: Option<Vec<f32>>,
    /// Sampler.
    pub sampler: Option<Sampler>,
    /// Guidance of a stage that is guided.
    pub guidance: Option<Guidance>,
    /// Guidance by noise level instead: upper bounds, ascending, and what holds up to them; the last holds above, too.
    pub levels: Vec<(f32, Guidance)>,
}

/// An image that the video must show.
#[derive(Clone, Debug)]
pub struct Conditioning {
    /// The image at its own size, after its H.264 round trip.
    pub image: RgbImage,
    /// Pixel frame at which it stands.
    pub frame: u32,
    /// 1 keeps it as it is, 0 ignores it. In f64, because `1 − strength` is rounded to f32 once.
    pub strength: f64,
}

/// Receives what a run produces, in this order: all frames, then the sound.
pub trait Output {
    /// RGB frames `[n, height, width, 3]` in `[0, 1]`.
    ///
    /// # Errors
    /// What stops the run.
    fn frames(&mut self, rgb: &[f32]) -> Result<(), RunError>;

    /// The whole sound track, `[samples, 2]` in `[-1, 1]` at `rate_hz`.
    ///
    /// # Errors
    /// What stops the run.
    fn sound(&mut self, samples: &[f32], rate_hz: u32) -> Result<(), RunError>;
}

/// A stage as a run wants it: the plan's, with the run's choices.
#[derive(Clone)]
pub(super) struct ChosenStage<'a> {
    pub stage: &'a Stage,
    /// The programs; for a stage in tiles those of the first one.
    pub class: &'a StageClass,
    pub sigmas: &'a [f32],
    pub sampler: Sampler,
    pub guidance: Levels<'a>,
    pub noise: &'a Noise,
}

impl<'a> Request<'a> {
    /// Checks the request against what the plan was compiled for, and returns every stage as it will run.
    ///
    /// # Errors
    /// [`RunError::Input`] with what the plan has no room for.
    pub(super) fn choose<'s>(&'s self, pipeline: &'s Pipeline) -> Result<Vec<ChosenStage<'s>>, RunError> {
        self.check_images(pipeline)?;
        self.media.check(pipeline)?;
        let named = self.stages.keys().map(|stage| (stage.as_str(), "settings"));
        let noise = self.noise.files.keys().map(|slot| (slot.split('.').next().unwrap_or_default(), "a noise file"));
        for (stage, what) in named.chain(noise) {
            if !pipeline.stages.iter().any(|s| s.name == stage) {
                let name = &pipeline.name;
                return Err(RunError::Input(format!("{what} for `{stage}`, which pipeline `{name}` does not have")));
            }
        }
        pipeline.stages.iter().map(|stage| self.choose_stage(pipeline, stage)).collect()
    }

    /// Whether a run reads the negative prompt.
    ///
    /// # Errors
    /// As for a run.
    pub fn needs_negative(&self, pipeline: &Pipeline) -> Result<bool, RunError> {
        let stages = self.choose(pipeline)?;
        Ok(stages.iter().any(|stage| stage.passes().any(|passes| passes.contains(&Pass::Negative))))
    }

    fn check_images(&self, pipeline: &Pipeline) -> Result<(), RunError> {
        if !pipeline.takes_images() && !self.images.is_empty() {
            return Err(RunError::Input(format!("pipeline `{}` takes no images; leave `--image` out", pipeline.name)));
        }
        for (i, image) in self.images.iter().enumerate() {
            let (n, frame, frames) = (i + 1, image.frame, pipeline.video.frames);
            if frame >= frames {
                let last = frames.saturating_sub(1);
                return Err(RunError::Input(format!(
                    "image {n} stands at frame {frame}, the last frame is {last}; give a frame of the clip"
                )));
            }
            if !(0.0..=1.0).contains(&image.strength) {
                return Err(RunError::Input(format!("image {n} has strength {}, it must be 0 to 1", image.strength)));
            }
        }
        if !pipeline.inputs.appends_first_image && self.images.iter().filter(|i| i.frame == 0).count() > 1 {
            return Err(RunError::Input("two images stand at frame 0; give one of them another frame".into()));
        }
        Ok(())
    }

    fn choose_stage<'s>(&'s self, pipeline: &'s Pipeline, stage: &'s Stage) -> Result<ChosenStage<'s>, RunError> {
        let first = stage.tiles.as_ref().and_then(|tiles| tiles.tiles().next());
        let class = self.class(pipeline, stage, first)?;
        let choice = self.stages.get(&stage.name);
        let sigmas = choice.and_then(|c| c.sigmas.as_deref()).unwrap_or(&stage.sigmas);
        check_sigmas(sigmas).map_err(RunError::Input)?;
        let sampler = choice.and_then(|c| c.sampler).unwrap_or(stage.sampler);
        let constant = choice.and_then(|c| c.guidance.as_ref()).or(stage.guidance.as_ref());
        let guidance = match choice.map(|c| &c.levels[..]) {
            Some(levels @ [_, ..]) => levels.iter().map(|(bound, guidance)| (*bound, guidance)).collect(),
            _ => constant.map(|guidance| (f32::INFINITY, guidance)).into_iter().collect(),
        };
        let chosen = ChosenStage { stage, class, sigmas, sampler, guidance, noise: &self.noise };
        chosen.check()?;
        Ok(chosen)
    }

    /// The programs of a stage, or of a tile of it, for the conditioning of this request.
    pub(super) fn class<'p>(
        &self,
        pipeline: &Pipeline,
        stage: &'p Stage,
        tile: Option<[AxisTile; 3]>,
    ) -> Result<&'p StageClass, RunError> {
        let needs = self.needs(pipeline, stage, tile);
        let grid = tile.map_or(stage.grid, |tile| tile.map(|axis| axis.len() as u32));
        let fits = |class: &&StageClass| {
            class.grid == grid
                && Modality::BOTH.into_iter().all(|m| match (needs.get(m), class.stream(m)) {
                    (None, None) => true,
                    (Some(need), Some(has)) => {
                        need.appended == has.appended && need.attention == has.attention && need.rows <= has.rows
                    }
                    _ => false,
                })
        };
        let rows_of = |stream: Option<StreamClass>| u64::from(stream.map_or(0, |s| s.rows));
        let rows = |class: &&StageClass| rows_of(class.video) + rows_of(class.audio);
        stage.classes.iter().filter(fits).min_by_key(rows).ok_or_else(|| {
            let (most, given) = (pipeline.video.max_keyframes, self.keyframes(pipeline));
            let room = match pipeline.inputs.appends_first_image {
                true => format!("{most} images, {given}"),
                false => format!("one image at frame 0 and {most} elsewhere, {given} elsewhere"),
            };
            RunError::Input(format!(
                "the plan has room for {room} were given; compile it with `--max-keyframes {given}`"
            ))
        })
    }

    /// What the states of a stage will look like.
    fn needs(&self, pipeline: &Pipeline, stage: &Stage, tile: Option<[AxisTile; 3]>) -> Per<StreamClass> {
        let [_, rows, columns] = stage.grid;
        let index = pipeline.stages.iter().position(|s| s == stage).unwrap_or(0);
        let (mut video, mut audio) = (StreamClass { rows: 1, ..StreamClass::default() }, StreamClass::default());
        video.appended = self.keyframes(pipeline).saturating_mul(rows).saturating_mul(columns);
        // Every strength is a timestep of its own.
        video.rows += self.images.len() as u32;
        audio.rows = 1;
        if let Some(references) = pipeline.references_of(stage) {
            let tokens = references.tokens_of(tile).saturating_mul(references.count);
            video.appended = video.appended.saturating_add(tokens);
            video.rows += references.count;
            video.attention = references.has_attention;
        }
        if index == 0 && pipeline.inputs.clip.is_some() {
            // What is kept has the timestep 0.
            video.rows += 1;
            audio.rows += 1;
        }
        if let Some(sound) = pipeline.inputs.sound.filter(|sound| sound.role == SoundRole::Reference) {
            audio.appended = if index == 0 { sound.tokens() } else { pipeline.audio.tokens };
            audio.rows += u32::from(!stage.keeps_sound);
        }
        Per {
            video: (pipeline.video.channels > 0).then_some(video),
            audio: (pipeline.audio.tokens > 0).then_some(audio),
        }
    }

    /// Number of images that are appended.
    fn keyframes(&self, pipeline: &Pipeline) -> u32 {
        let appended = |i: &&Conditioning| i.frame > 0 || pipeline.inputs.appends_first_image;
        self.images.iter().filter(appended).count() as u32
    }
}

impl ChosenStage<'_> {
    /// The passes that it needs, at every level of noise that guidance tells apart.
    pub fn passes(&self) -> impl Iterator<Item = Vec<Pass>> {
        let guided = self.guidance.iter().map(|(_, guidance)| Some(*guidance));
        let unguided = self.guidance.is_empty().then_some(None);
        guided.chain(unguided).map(|guidance| needed_passes(guidance, self.sampler))
    }

    /// Checks that there are programs for everything that guidance and sampler may ask.
    fn check(&self) -> Result<(), RunError> {
        let name = &self.stage.name;
        let refused = |problem: String| Err(RunError::Input(format!("stage `{name}`: {problem}")));
        let modalities = || Modality::BOTH.into_iter().filter(|&m| self.class.stream(m).is_some());
        for (bound, guidance) in &self.guidance {
            if bound.is_nan() {
                return refused("guidance holds up to a noise level that is not a number".into());
            }
            let Some(planned) = &self.stage.guidance else {
                return refused("the plan runs it without guidance".into());
            };
            for m in modalities() {
                let (own, plan) = (guidance.of(m), planned.of(m));
                let values = [own.cfg, own.stg, own.modality, own.rescale];
                if values.iter().any(|v| !v.is_finite()) {
                    return refused(format!("{} guidance has a scale that is not a number", m.name()));
                }
                if own.stg_blocks != plan.stg_blocks || (own.stg != 0.0) != (plan.stg != 0.0) {
                    return refused(format!(
                        "the plan leaves out self attention of {} in blocks {:?} at scale {}; other blocks, or switching \
                         this on or off, take another plan: give the same flags to `ltxc compile`",
                        m.name(),
                        plan.stg_blocks,
                        plan.stg
                    ));
                }
            }
        }
        let all: Vec<Modality> = modalities().collect();
        for passes in self.passes() {
            if program_of(self.class, &passes, &all).is_none() {
                let names: Vec<&str> = passes.iter().map(|p| p.name()).collect();
                return refused(format!(
                    "the plan has no program for the passes {}; give the same guidance and sampler to `ltxc compile`",
                    names.join(", ")
                ));
            }
            let skips = |m: &Modality| self.guidance.iter().any(|(_, g)| g.of(*m).skip_step > 0);
            for skipped in all.iter().filter(|m| skips(m)) {
                let rest: Vec<Modality> = all.iter().copied().filter(|m| m != skipped).collect();
                if !rest.is_empty() && program_of(self.class, &passes, &rest).is_none() {
                    let flag = skipped.name();
                    return refused(format!(
                        "the plan has no program that skips {flag}; give `--{flag}-skip-step` to `ltxc compile`"
                    ));
                }
            }
        }
        Ok(())
    }
}
