//! One stage: states from latents, conditioning and noise; then the sampler; then the tokens that belong to the result.
//!
//! Source: spec/pipelines §3, §4.

use ltxc_ir::plan::{Modality, Pipeline, Release, Stage};

use super::conditioning::{Item, apply};
use super::denoise::{Contexts, Denoiser, Settings};
use super::noise::{Noise, SlotShape};
use super::observe::{Event, Observer};
use super::per::Per;
use super::positions::{audio_positions, keyframe_positions, video_positions};
use super::request::{ChosenStage, Conditioning, Request};
use super::sampler::{self, sample};
use super::state::State;
use crate::error::RunError;
use crate::executor::Executor;
use crate::media::resize_and_crop;

/// Mel bins of an audio latent; they are the fastest part of a token. Fixed in every model of the family.
pub(super) const MEL_BINS: usize = 16;

/// What a modality of a stage starts from.
#[derive(Clone, Debug, Default)]
pub(super) struct Start {
    /// Token form; zeros if there is none.
    pub latent: Option<Vec<f32>>,
    /// How much of it is replaced by noise.
    pub noise_scale: f32,
    /// Whether it is only looked at.
    pub frozen: bool,
    /// What conditions it besides images.
    pub items: Vec<Item>,
}

/// Runs one stage. Returns the latents of its target tokens: video `[f, h, w, c]`, sound `[t, c]`.
///
/// # Errors
/// A program that cannot run, noise that does not fit, or bad numerics.
pub(super) fn run_stage(
    executor: &mut Executor<'_>,
    observer: &mut dyn Observer,
    request: &Request<'_>,
    chosen: &ChosenStage<'_>,
    contexts: Contexts<'_>,
    starts: Per<Start>,
) -> Result<Per<Vec<f32>>, RunError> {
    let (pipeline, stage) = (&executor.plan().pipeline, chosen.stage);
    let mut tell = |name: String, values: &[f32]| {
        let name = format!("{}.{name}", stage.name);
        observer.event(Event::Tensor { name, values });
    };
    for (modality, latent) in starts.iter().filter_map(|(m, s)| Some((m, s.latent.as_ref()?))) {
        tell(format!("{}.initial_latent", modality.name()), latent);
    }
    let mut items = items(executor, pipeline, stage, request.images)?;
    let mut states = starts.try_map(|modality, start| {
        let mut state = initial_state(pipeline, stage, modality, start.latent);
        let of_images = items.slot(modality).take().unwrap_or_default();
        apply(of_images.iter().chain(&start.items), &mut state, pipeline.release);
        if start.frozen {
            state.freeze();
        }
        let noise = draw_noise(chosen.noise, stage, modality, &state)?;
        state.add_noise(&noise, start.noise_scale);
        let name = modality.name();
        tell(format!("{name}.noise"), &noise);
        tell(format!("{name}.noised"), &state.latent);
        tell(format!("{name}.clean_latent"), &state.clean);
        tell(format!("{name}.denoise_mask"), &state.mask);
        tell(format!("{name}.positions"), &state.positions);
        if let Some(attention) = &state.attention {
            tell(format!("{name}.attention_mask"), attention);
        }
        Ok::<State, RunError>(state)
    })?;
    tell("sigmas".into(), chosen.sigmas);

    let settings = Settings {
        stage,
        class: chosen.class,
        guidance: chosen.guidance.clone(),
        sampler: chosen.sampler,
        contexts,
        noise: chosen.noise,
        allow_bad_numerics: request.allow_bad_numerics,
    };
    observer.event(Event::Stage { name: &stage.name, steps: sampler::steps(chosen.sampler, chosen.sigmas) });
    let mut denoiser = Denoiser::new(executor, observer, settings);
    sample(chosen.sampler, chosen.sigmas, &mut states, &mut denoiser)?;
    states.try_map(|_, state| Ok(state.target().to_vec()))
}

fn initial_state(pipeline: &Pipeline, stage: &Stage, modality: Modality, latent: Option<Vec<f32>>) -> State {
    match modality {
        Modality::Video => {
            let [_, rows, columns] = stage.grid;
            let positions = video_positions(stage.grid, &pipeline.video);
            State::new(pipeline.video.channels as usize, positions, 3, (rows * columns) as usize, latent)
        }
        Modality::Audio => {
            State::new(pipeline.audio.channels as usize, audio_positions(pipeline.audio.tokens), 1, 0, latent)
        }
    }
}

/// What the images of a run do to a stage.
fn items(
    executor: &mut Executor<'_>,
    pipeline: &Pipeline,
    stage: &Stage,
    images: &[Conditioning],
) -> Result<Per<Vec<Item>>, RunError> {
    let [_, rows, columns] = stage.grid;
    let item = |conditioning: &Conditioning| {
        let values = rows as usize * columns as usize * pipeline.video.channels as usize;
        let (latent, strength) = (encode_image(executor, stage, conditioning, values)?, conditioning.strength);
        Ok(match conditioning.frame {
            0 if !pipeline.inputs.appends_first_image => Item::Replace { first: 0, latent, strength },
            frame => {
                let one_frame = pipeline.release != Release::V1_0_0;
                let positions = keyframe_positions([1, rows, columns], frame, one_frame, &pipeline.video);
                Item::Append { latent, positions, strength, attention: None }
            }
        })
    };
    let video = images.iter().map(item).collect::<Result<_, RunError>>()?;
    Ok(Per { video: Some(video), audio: None })
}

/// Latent tokens `[h · w, c]` of an image at the size of a stage, so many values.
fn encode_image(
    executor: &mut Executor<'_>,
    stage: &Stage,
    conditioning: &Conditioning,
    values: usize,
) -> Result<Vec<f32>, RunError> {
    let program = format!("encode_image.{}", stage.name);
    let pixels = resize_and_crop(&conditioning.image, stage.width as usize, stage.height as usize)?;
    executor.write(&program, "frames", &pixels)?;
    executor.run(&program)?;
    Ok(executor.read_values(&program, "latent", values)?.into_owned())
}

/// Noise of target and appended tokens.
fn draw_noise(noise: &Noise, stage: &Stage, modality: Modality, state: &State) -> Result<Vec<f32>, RunError> {
    let (spatial, inner) = match modality {
        Modality::Video => (stage.grid.iter().map(|&d| d as usize).collect(), 1),
        Modality::Audio => (vec![state.target_tokens], MEL_BINS),
    };
    let shape = SlotShape { spatial, channels: state.channels, inner };
    let slot = format!("{}.{}", stage.name, modality.name());
    noise.draw_all(&slot, &shape, state.tokens() - state.target_tokens)
}
