//! A run, whatever the pipeline: encode text → stages → decode. What differs between pipelines stands in the plan. A
//! pipeline that upscales a clip has no stages, see `upscale`.

use ltxc_ir::plan::{Modality, Pipeline, Plan, SoundRole, Stage};

use super::decode::decode_video;
use super::denoise::Contexts;
use super::media::{Encoded, reference_sound};
use super::noise::SlotShape;
use super::observe::{Event, Observer, frames_problem, numerical_problem};
use super::per::Per;
use super::request::{Output, Request};
use super::stage::{MEL_BINS, Start, run_stage};
use super::text::{TextContext, encode_prompt};
use super::tiled::run_tiles;
use super::upscale::run_upscale;
use crate::error::RunError;
use crate::executor::Executor;
use crate::experiments::Placeholder;
use crate::media::Recording;
use crate::tokenizer::Tokenizer;

/// Runs the pipeline of the executor's plan. Without contexts from elsewhere ([`Request::embeddings`]) it needs a tokenizer.
///
/// # Errors
/// A request that the plan has no room for, bad numerics, an interruption, or what `output` returns.
pub fn run(
    executor: &mut Executor<'_>,
    tokenizer: impl Into<Option<Tokenizer>>,
    request: &Request<'_>,
    observer: &mut dyn Observer,
    output: &mut dyn Output,
) -> Result<(), RunError> {
    let pipeline = &executor.plan().pipeline;
    if let Some(upscale) = &pipeline.upscale {
        return run_upscale(executor, upscale, request, observer, output);
    }
    let stages = request.choose(pipeline)?;
    let needs_negative = request.needs_negative(pipeline)?;
    executor.set_experiments(&request.experiments)?;
    if let Some(placeholder) = request.experiments.placeholder() {
        let latents = placeholders(executor.plan(), request, placeholder)?;
        return decode(executor, request, observer, output, latents);
    }
    let mut texts = match request.embeddings {
        Some(embeddings) => embeddings.contexts(executor.plan(), needs_negative)?,
        None => encode_prompts(executor, tokenizer.into(), request, needs_negative, observer)?,
    };
    let encoded = request.media.encode(executor)?;
    if let ([prompt, negative], true) = (&mut texts[..], encoded.frozen.audio.is_some()) {
        // Nothing is to be avoided in a sound that stays.
        negative.audio.clone_from(&prompt.audio);
    }
    let contexts = Contexts { prompt: &texts[0], negative: texts.get(1) };

    let Encoded { mut latents, items, frozen } = encoded;
    let mut sound = None;
    let guides = pipeline.inputs.sound.is_some_and(|sound| sound.role == SoundRole::Reference);
    for (i, (chosen, mut items)) in stages.iter().zip(items).enumerate() {
        if let (true, true, Some(latent)) = (guides, i > 0, &latents.audio) {
            items.audio = Some(vec![reference_sound(latent.clone(), pipeline.audio.tokens)]);
        }
        let mut starts = starts(executor, pipeline, chosen.stage, chosen.sigmas[0], latents)?;
        for (modality, start) in starts.iter_mut() {
            start.items = items.slot(modality).take().unwrap_or_default();
            let is_kept = modality == Modality::Audio && chosen.stage.keeps_sound;
            start.frozen = is_kept || frozen.get(modality).is_some();
        }
        executor.set_adapters(request.adapters.of(&chosen.stage.name))?;
        latents = match (&chosen.stage.tiles, starts.video.take()) {
            (Some(tiles), Some(video)) => {
                let made = run_tiles(executor, observer, request, chosen, tiles, contexts, video)?;
                Per { video: Some(made), audio: None }
            }
            (_, video) => run_stage(executor, observer, request, chosen, contexts, Per { video, audio: starts.audio })?,
        };
        executor.unload_all()?;
        if i == pipeline.audio.stage as usize {
            sound = latents.audio.clone();
        }
    }
    let recording = request.media.sound.as_ref().filter(|_| frozen.audio.is_some());
    let made = Per { video: latents.video, audio: sound.filter(|_| recording.is_none()) };
    decode(executor, request, observer, output, made)?;
    recording.map_or(Ok(()), |recording| write_recording(recording, observer, output))
}

/// The contexts of the prompt, and of the negative one if it is needed.
fn encode_prompts(
    executor: &mut Executor<'_>,
    tokenizer: Option<Tokenizer>,
    request: &Request<'_>,
    needs_negative: bool,
    observer: &mut dyn Observer,
) -> Result<Vec<TextContext>, RunError> {
    let tokenizer = tokenizer.ok_or_else(|| RunError::Internal("there is no tokenizer for the prompt".into()))?;
    let pipeline = &executor.plan().pipeline;
    let prompts = [request.prompt, request.negative_prompt];
    let prompts = &prompts[..if needs_negative { 2 } else { 1 }];
    observer.event(Event::Stage { name: "text", steps: prompts.len() });
    executor.set_adapters(request.adapters.of_text(pipeline))?;
    let mut texts = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        texts.push(encode_prompt(executor, &pipeline.text, &tokenizer, prompt, observer)?);
        observer.event(Event::Step { stage: "text", index: i + 1 });
    }
    // The text encoder is the largest component besides the transformer; neither should wait for the other in memory.
    executor.unload_all()?;
    Ok(texts)
}

/// What an experiment decodes instead of what would be denoised.
fn placeholders(plan: &Plan, request: &Request<'_>, placeholder: Placeholder) -> Result<Per<Vec<f32>>, RunError> {
    let pipeline = &plan.pipeline;
    let stage = pipeline.stages.last().ok_or_else(|| RunError::Internal("the plan has no stages".into()))?;
    // Sound that stays as it was brought has no decoder.
    let mut made = pipeline.modalities();
    made.retain(|m| *m == Modality::Video || plan.program("decode_audio").is_some());
    let latent = |modality: Modality| {
        let (spatial, channels, inner) = match modality {
            Modality::Video => (stage.grid.iter().map(|&n| n as usize).collect(), pipeline.video.channels, 1),
            Modality::Audio => (vec![pipeline.audio.tokens as usize], pipeline.audio.channels, MEL_BINS),
        };
        let shape = SlotShape { spatial, channels: channels as usize, inner };
        match placeholder {
            Placeholder::Zero => Ok(vec![0.0; shape.len()]),
            Placeholder::Noise => request.noise.draw(&format!("{}.{}", stage.name, modality.name()), &shape),
        }
    };
    let wanted = Per::new(|m| made.contains(&m).then_some(m));
    wanted.try_map(|_, modality| latent(modality))
}

/// Decodes latents of target tokens, the video first.
pub(super) fn decode(
    executor: &mut Executor<'_>,
    request: &Request<'_>,
    observer: &mut dyn Observer,
    output: &mut dyn Output,
    latents: Per<Vec<f32>>,
) -> Result<(), RunError> {
    let pipeline = &executor.plan().pipeline;
    if let Some(latent) = latents.video {
        observer.event(Event::Tensor { name: "final.video_latent".into(), values: &latent });
        write_video(executor, pipeline, request, &latent, observer, output)?;
    }
    if let Some(latent) = latents.audio {
        observer.event(Event::Tensor { name: "final.audio_latent".into(), values: &latent });
        write_sound(executor, pipeline, request, &latent, observer, output)?;
    }
    Ok(())
}

/// What a stage starts from, given the latents of the one before. A stage that starts from a latent mixes noise into
/// it, up to its first noise level.
///
/// # Errors
/// An upsampler that cannot run, or a latent of another size than the stage has.
fn starts(
    executor: &mut Executor<'_>,
    pipeline: &Pipeline,
    stage: &Stage,
    sigma: f32,
    mut latents: Per<Vec<f32>>,
) -> Result<Per<Start>, RunError> {
    if stage.upsampled
        && let Some(latent) = latents.video.take()
    {
        latents.video = Some(upsample(executor, "upsample", &latent)?);
    }
    for (modality, latent) in latents.iter() {
        let (tokens, channels) = match modality {
            Modality::Video => (stage.grid.iter().map(|&n| n as usize).product(), pipeline.video.channels),
            Modality::Audio => (pipeline.audio.tokens as usize, pipeline.audio.channels),
        };
        let (found, expected): (usize, usize) = (latent.len(), tokens * channels as usize);
        if found != expected {
            let (name, stage) = (modality.name(), &stage.name);
            return Err(RunError::Internal(format!(
                "the {name} latent of `{stage}` has {found} values, not {expected}"
            )));
        }
    }
    let made = pipeline.modalities();
    Ok(Per::new(|modality| {
        let latent = latents.slot(modality).take();
        let noise_scale = if latent.is_some() { sigma } else { 1.0 };
        made.contains(&modality).then_some(Start { latent, noise_scale, ..Start::default() })
    }))
}

/// The latent that the upsampler in `program` makes of another one.
pub(super) fn upsample(executor: &mut Executor<'_>, program: &str, latent: &[f32]) -> Result<Vec<f32>, RunError> {
    executor.write(program, "latent", latent)?;
    executor.run(program)?;
    let upsampled = executor.read(program, "latent")?.into_owned();
    executor.unload_all()?;
    Ok(upsampled)
}

fn write_video(
    executor: &mut Executor<'_>,
    pipeline: &Pipeline,
    request: &Request<'_>,
    latent: &[f32],
    observer: &mut dyn Observer,
    output: &mut dyn Output,
) -> Result<(), RunError> {
    let frame_len = pipeline.video.height as usize * pipeline.video.width as usize * 3;
    let (mut chunk, mut rgb) = (0, Vec::with_capacity(frame_len));
    // One of two that were made for the same frame.
    let every = if pipeline.inputs.doubles_frames { 2 } else { 1 };
    let mut made = 0usize;
    let mut sink = |frames: &[f32]| {
        chunk += 1;
        check_numerics(request, "decode", chunk, "decoded video", frames_problem(frames))?;
        for frame in frames.chunks(frame_len) {
            if made.is_multiple_of(every) {
                rgb.clear();
                rgb.extend(frame.iter().map(|v| ((v + 1.0) * 0.5).clamp(0.0, 1.0)));
                output.frames(&rgb)?;
            }
            made += 1;
        }
        Ok(())
    };
    decode_video(executor, pipeline, latent, &request.noise, observer, &mut sink)?;
    executor.unload_all()
}

fn write_sound(
    executor: &mut Executor<'_>,
    pipeline: &Pipeline,
    request: &Request<'_>,
    latent: &[f32],
    observer: &mut dyn Observer,
    output: &mut dyn Output,
) -> Result<(), RunError> {
    observer.event(Event::Stage { name: "sound", steps: 1 });
    executor.write("decode_audio", "latent", latent)?;
    executor.run("decode_audio")?;
    let waveform = executor.read("decode_audio", "waveform")?;
    check_numerics(request, "sound", 1, "decoded sound", numerical_problem(&waveform))?;
    observer.event(Event::Tensor { name: "final.waveform".into(), values: &waveform });
    observer.event(Event::Step { stage: "sound", index: 1 });
    output.sound(&waveform, pipeline.audio.rate_hz)
}

/// Writes the recording that was given, as stereo.
pub(super) fn write_recording(
    recording: &Recording,
    observer: &mut dyn Observer,
    output: &mut dyn Output,
) -> Result<(), RunError> {
    let (Some(left), right) = (recording.channels.first(), recording.channels.get(1)) else { return Ok(()) };
    let samples: Vec<f32> = left.iter().zip(right.unwrap_or(left)).flat_map(|(l, r)| [*l, *r]).collect();
    observer.event(Event::Tensor { name: "final.waveform".into(), values: &samples });
    output.sound(&samples, recording.rate_hz)
}

pub(super) fn check_numerics(
    request: &Request<'_>,
    stage: &str,
    step: usize,
    what: &str,
    problem: Option<&str>,
) -> Result<(), RunError> {
    match problem {
        Some(problem) if !request.allow_bad_numerics => {
            let (stage, what, problem) = (stage.into(), what.into(), problem.into());
            Err(RunError::BadNumerics { stage, step, what, problem })
        }
        _ => Ok(()),
    }
}
