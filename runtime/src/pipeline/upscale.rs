//! A clip through latent upsamplers: encode → upsample → decode, without text, transformer or stages. Its sound is kept.
//!
//! # Easy to get wrong
//! - Upsamplers work on latents that are not normalised; their programs undo the normalisation and do it again.
//! - One that doubles time makes `2 f − 1` latents of `f`, which are `16 k + 1` frames of `8 k + 1`, at twice the rate.
//!
//! Source: spec/upsamplers §4.

use ltxc_ir::plan::Upscale;

use super::encode::encode_video;
use super::observe::{Event, Observer, numerical_problem};
use super::per::Per;
use super::request::{Output, Request};
use super::run::{check_numerics, decode, upsample, write_recording};
use crate::error::RunError;
use crate::executor::Executor;

/// Upscales the clip of a request, and writes it with the recording of the request.
///
/// # Errors
/// A clip that is missing or has another size, other inputs, bad numerics, or what `output` returns.
pub(super) fn run_upscale(
    executor: &mut Executor<'_>,
    upscale: &Upscale,
    request: &Request<'_>,
    observer: &mut dyn Observer,
    output: &mut dyn Output,
) -> Result<(), RunError> {
    let pipeline = &executor.plan().pipeline;
    let refused = |problem: String| Err(RunError::Input(format!("pipeline `{}` {problem}", pipeline.name)));
    if !request.images.is_empty() || !request.media.references.is_empty() || request.media.attention.is_some() {
        return refused("takes a clip and nothing else".into());
    }
    let (Some(planned), Some(clip)) = (&pipeline.inputs.clip, &request.media.clip) else {
        return refused("needs a clip; give `--video-path`".into());
    };
    clip.check(pipeline)?;

    observer.event(Event::Stage { name: "encode", steps: 1 });
    let mut latent = encode_video(executor, &planned.tiles, pipeline.video.channels as usize, &clip.frames)?;
    executor.unload_all()?;
    check_numerics(request, "encode", 1, "the latent of the clip", numerical_problem(&latent))?;
    observer.event(Event::Tensor { name: "clip.latent".into(), values: &latent });
    observer.event(Event::Step { stage: "encode", index: 1 });
    for program in &upscale.programs {
        observer.event(Event::Stage { name: program, steps: 1 });
        latent = upsample(executor, program, &latent)?;
        check_numerics(request, program, 1, "the upsampled latent", numerical_problem(&latent))?;
        observer.event(Event::Tensor { name: format!("{program}.latent"), values: &latent });
        observer.event(Event::Step { stage: program, index: 1 });
    }
    decode(executor, request, observer, output, Per { video: Some(latent), audio: None })?;
    request.media.sound.as_ref().map_or(Ok(()), |recording| write_recording(recording, observer, output))
}
