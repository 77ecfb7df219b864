//! The distilled pipeline: text, or text and images, to a video with sound. Two stages, or one.
//!
//! Source: spec/pipelines §9.1.

use std::collections::BTreeMap;

use ltxc_ir::plan::{Pipeline, Stage};

use super::decode::decode_video;
use super::denoise::{Denoiser, class_of, sample};
use super::noise::{Noise, SlotShape};
use super::observe::{Event, Observer, numerical_problem};
use super::schedule::check_sigmas;
use super::state::{State, audio_positions, keyframe_positions, video_positions};
use super::text::{TextContext, encode_prompt};
use crate::adapters::StageAdapters;
use crate::error::RunError;
use crate::executor::Executor;
use crate::media::{RgbImage, resize_and_crop};
use crate::tokenizer::Tokenizer;

/// What a run may choose without compiling again.
pub struct Request<'a> {
    /// What to show.
    pub prompt: &'a str,
    /// Images to start from or to pass through, in the order they were given.
    pub images: &'a [Conditioning],
    /// Noise levels by stage name, where they differ from the plan's.
    pub sigmas: BTreeMap<String, Vec<f32>>,
    /// Where noise comes from.
    pub noise: Noise,
    /// Adapters of every stage.
    pub adapters: StageAdapters,
    /// Go on with latents that are NaN, infinite or constant.
    pub allow_bad_numerics: bool,
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

/// Runs the pipeline of the executor's plan.
///
/// # Errors
/// A request that the plan has no room for, bad numerics, an interruption, or what `output` returns.
pub fn run(
    executor: &mut Executor<'_>,
    tokenizer: Tokenizer,
    request: &Request<'_>,
    observer: &mut dyn Observer,
    output: &mut dyn Output,
) -> Result<(), RunError> {
    let pipeline = &executor.plan().pipeline;
    check(pipeline, request)?;
    observer.event(Event::Stage { name: "text", steps: 1 });
    executor.set_adapters(request.adapters.of_text(pipeline))?;
    let text = encode_prompt(executor, &pipeline.text, &tokenizer, request.prompt, observer)?;
    drop(tokenizer);
    observer.event(Event::Step { stage: "text", index: 1 });
    // The text encoder is the largest component besides the transformer; neither should wait for the other in memory.
    executor.unload_all()?;

    let mut video_latent: Option<Vec<f32>> = None;
    let mut audio_latent: Option<Vec<f32>> = None;
    for stage in &pipeline.stages {
        let initial = match (stage.upsampled, video_latent.take()) {
            (true, Some(latent)) => Some(upsample(executor, &latent)?),
            (_, latent) => latent,
        };
        executor.set_adapters(request.adapters.of(&stage.name))?;
        let (video, audio) =
            run_stage(executor, pipeline, stage, request, &text, initial, audio_latent.take(), observer)?;
        (video_latent, audio_latent) = (Some(video), Some(audio));
        executor.unload_all()?;
    }
    let missing = || RunError::Internal("the plan has no stages".into());
    let (video, audio) = (video_latent.ok_or_else(missing)?, audio_latent.ok_or_else(missing)?);
    observer.event(Event::Tensor { name: "final.video_latent".into(), values: &video });
    observer.event(Event::Tensor { name: "final.audio_latent".into(), values: &audio });
    decode(executor, pipeline, request, &video, &audio, observer, output)
}

/// Checks a request against what the plan was compiled for.
fn check(pipeline: &Pipeline, request: &Request<'_>) -> Result<(), RunError> {
    for (i, image) in request.images.iter().enumerate() {
        let frames = pipeline.video.frames;
        if image.frame >= frames {
            let last = frames.saturating_sub(1);
            return Err(RunError::Input(format!(
                "image {} stands at frame {}, the last frame is {last}; give a frame of the clip",
                i + 1,
                image.frame
            )));
        }
        if !(0.0..=1.0).contains(&image.strength) {
            return Err(RunError::Input(format!("image {} has strength {}, it must be 0 to 1", i + 1, image.strength)));
        }
    }
    if request.images.iter().filter(|i| i.frame == 0).count() > 1 {
        return Err(RunError::Input("two images stand at frame 0; give one of them another frame".into()));
    }
    for (stage, sigmas) in &request.sigmas {
        if !pipeline.stages.iter().any(|s| s.name == *stage) {
            return Err(RunError::Input(format!(
                "noise levels for `{stage}`, which pipeline `{}` does not have",
                pipeline.name
            )));
        }
        check_sigmas(sigmas).map_err(RunError::Input)?;
    }
    for slot in request.noise.files.keys() {
        let stage = slot.split('.').next().unwrap_or_default();
        if !pipeline.stages.iter().any(|s| s.name == stage) {
            return Err(RunError::Input(format!(
                "a noise file for `{stage}`, which pipeline `{}` does not have",
                pipeline.name
            )));
        }
    }
    let keyframes = request.images.iter().filter(|i| i.frame > 0).count();
    let first_frame = keyframes < request.images.len();
    pipeline.stages.iter().try_for_each(|stage| class_of(stage, first_frame, keyframes).map(|_| ()))
}

/// One stage from noise to the cleaned latents of video (`[f, h, w, c]`) and audio (`[t, c]`).
#[allow(clippy::too_many_arguments)] // everything a stage depends on, once
fn run_stage<'p>(
    executor: &mut Executor<'p>,
    pipeline: &'p Pipeline,
    stage: &'p Stage,
    request: &Request<'_>,
    text: &TextContext,
    video_latent: Option<Vec<f32>>,
    audio_latent: Option<Vec<f32>>,
    observer: &mut dyn Observer,
) -> Result<(Vec<f32>, Vec<f32>), RunError> {
    let settings = &pipeline.video;
    let tokens = stage.grid.iter().map(|&d| d as usize).product();
    let sigmas = request.sigmas.get(&stage.name).unwrap_or(&stage.sigmas);
    // A stage that starts from a latent mixes noise into it, up to its first noise level.
    let scale = if video_latent.is_some() { sigmas[0] } else { 1.0 };
    if let (Some(v), Some(a)) = (&video_latent, &audio_latent) {
        observer.event(Event::Tensor { name: format!("{}.video.initial_latent", stage.name), values: v });
        observer.event(Event::Tensor { name: format!("{}.audio.initial_latent", stage.name), values: a });
    }
    let mut video = State::new(settings.channels as usize, tokens, video_positions(stage.grid, settings), video_latent);
    let audio_tokens = pipeline.audio.tokens;
    let audio_channels = pipeline.audio.channels as usize;
    let mut audio = State::new(audio_channels, audio_tokens as usize, audio_positions(audio_tokens), audio_latent);

    for conditioning in request.images {
        let latent = encode_image(executor, stage, conditioning)?;
        let [_, rows, columns] = stage.grid;
        if conditioning.frame == 0 {
            video.replace(0, &latent, conditioning.strength);
        } else {
            let positions = keyframe_positions([1, rows, columns], conditioning.frame, true, settings);
            video.append(&latent, &positions, conditioning.strength);
        }
    }

    let noise = video_noise(request, stage, &video)?;
    video.add_noise(&noise, scale);
    observer.event(Event::Tensor { name: format!("{}.video.noise", stage.name), values: &noise });
    let shape = SlotShape { spatial: vec![audio_tokens as usize], channels: audio_channels, inner: MEL_BINS };
    let noise = request.noise.draw(&format!("{}.audio", stage.name), &shape)?;
    audio.add_noise(&noise, scale);
    observer.event(Event::Tensor { name: format!("{}.audio.noise", stage.name), values: &noise });
    for (modality, state) in [("video", &video), ("audio", &audio)] {
        let name = |what: &str| format!("{}.{modality}.{what}", stage.name);
        observer.event(Event::Tensor { name: name("noised"), values: &state.latent });
        observer.event(Event::Tensor { name: name("clean_latent"), values: &state.clean });
        observer.event(Event::Tensor { name: name("denoise_mask"), values: &state.mask });
        observer.event(Event::Tensor { name: name("positions"), values: &state.positions });
    }
    observer.event(Event::Tensor { name: format!("{}.sigmas", stage.name), values: sigmas });

    let keyframes = request.images.iter().filter(|i| i.frame > 0).count();
    let class = class_of(stage, keyframes < request.images.len(), keyframes)?;
    let mut denoiser = Denoiser::new(executor, class, &video, &audio, text)?;
    let allow = request.allow_bad_numerics;
    sample(executor, &mut denoiser, &stage.name, sigmas, &mut video, &mut audio, allow, observer)?;
    Ok((video.target().to_vec(), audio.target().to_vec()))
}

/// Mel bins of an audio latent; they are the fastest part of a token. Fixed in every model of the family.
const MEL_BINS: usize = 16;

/// Noise of target and appended tokens. Appended ones have a slot of their own, so that conditioning does not change
/// the noise of the picture.
fn video_noise(request: &Request<'_>, stage: &Stage, video: &State) -> Result<Vec<f32>, RunError> {
    let spatial = stage.grid.iter().map(|&d| d as usize).collect();
    let shape = SlotShape { spatial, channels: video.channels, inner: 1 };
    let mut noise = request.noise.draw(&format!("{}.video", stage.name), &shape)?;
    let appended = video.tokens() - video.target_tokens;
    if appended > 0 {
        let shape = SlotShape { spatial: vec![appended], channels: video.channels, inner: 1 };
        noise.extend(request.noise.draw(&format!("{}.video.extra", stage.name), &shape)?);
    }
    Ok(noise)
}

/// Latent tokens `[h · w, c]` of an image at the size of a stage.
fn encode_image(executor: &mut Executor<'_>, stage: &Stage, conditioning: &Conditioning) -> Result<Vec<f32>, RunError> {
    let program = format!("encode_image.{}", stage.name);
    let pixels = resize_and_crop(&conditioning.image, stage.width as usize, stage.height as usize)?;
    executor.write(&program, "frames", &pixels)?;
    executor.run(&program)?;
    Ok(executor.read(&program, "latent")?.into_owned())
}

fn upsample(executor: &mut Executor<'_>, latent: &[f32]) -> Result<Vec<f32>, RunError> {
    executor.write("upsample", "latent", latent)?;
    executor.run("upsample")?;
    let upsampled = executor.read("upsample", "latent")?.into_owned();
    executor.unload_all()?;
    Ok(upsampled)
}

fn decode(
    executor: &mut Executor<'_>,
    pipeline: &Pipeline,
    request: &Request<'_>,
    video: &[f32],
    audio: &[f32],
    observer: &mut dyn Observer,
    output: &mut dyn Output,
) -> Result<(), RunError> {
    let frame_len = pipeline.video.height as usize * pipeline.video.width as usize * 3;
    let (mut chunk, mut rgb) = (0, Vec::with_capacity(frame_len));
    let mut sink = |frames: &[f32]| {
        if let Some(problem) = numerical_problem(frames)
            && !request.allow_bad_numerics
        {
            let what = "decoded video".into();
            return Err(RunError::BadNumerics {
                stage: "decode".into(),
                step: chunk + 1,
                what,
                problem: problem.into(),
            });
        }
        chunk += 1;
        for frame in frames.chunks(frame_len) {
            rgb.clear();
            rgb.extend(frame.iter().map(|v| ((v + 1.0) * 0.5).clamp(0.0, 1.0)));
            output.frames(&rgb)?;
        }
        Ok(())
    };
    decode_video(executor, pipeline, video, &request.noise, observer, &mut sink)?;
    executor.unload_all()?;

    observer.event(Event::Stage { name: "sound", steps: 1 });
    executor.write("decode_audio", "latent", audio)?;
    executor.run("decode_audio")?;
    let waveform = executor.read("decode_audio", "waveform")?;
    if let Some(problem) = numerical_problem(&waveform)
        && !request.allow_bad_numerics
    {
        let what = "decoded sound".into();
        return Err(RunError::BadNumerics { stage: "sound".into(), step: 1, what, problem: problem.into() });
    }
    observer.event(Event::Tensor { name: "final.waveform".into(), values: &waveform });
    observer.event(Event::Step { stage: "sound", index: 1 });
    output.sound(&waveform, pipeline.audio.rate_hz)
}
