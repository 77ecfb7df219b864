//! What a run brings besides text and images, as the plan records it.

use anyhow::{Result, bail};
use ltxc_ir::plan::{ClipInput, Inputs, Modality, ReferenceInput, SoundInput, Stage};
use ltxc_ir::tiling::{TilePlan, Tiling};
use ltxc_models::audio::AudioVaeConfig;
use ltxc_models::video_vae::VideoVaeConfig;

use super::definition;
use crate::job::Shape;

/// The inputs of a pipeline whose first stage is `first`, with sound of so many tokens.
///
/// # Errors
/// References that do not fit the size of the stage.
pub fn inputs(
    shape: &Shape,
    first: &Stage,
    video_vae: &VideoVaeConfig,
    audio_vae: &AudioVaeConfig,
    tokens: usize,
) -> Result<Inputs> {
    let brings = definition(shape.pipeline).brings;
    let factors = video_vae.factors();
    let references = match brings.references {
        true => Some(references(shape, first, factors)?),
        false => None,
    };
    let clip = match brings.clip {
        true => Some(ClipInput { tiles: tiles(first.grid.map(|n| n as usize), factors)? }),
        false => None,
    };
    let takes_sound = (brings.sound || brings.clip) && shape.makes(Modality::Audio);
    let sound = takes_sound.then(|| SoundInput {
        is_kept: brings.sound,
        rate_hz: audio_vae.sampling_rate_hz as u32,
        n_fft: audio_vae.n_fft as u32,
        hop_length: audio_vae.hop_length as u32,
        mel_bins: audio_vae.mel_bins as u32,
        mel_frames: audio_vae.mel_frames(tokens) as u32,
        time_factor: audio_vae.time_factor() as u32,
    });
    Ok(Inputs { appends_first_image: brings.appends_first_image, references, clip, sound })
}

/// The tiles in which a clip is encoded.
fn tiles(grid: [usize; 3], factors: [usize; 3]) -> Result<TilePlan> {
    Ok(TilePlan::encode(grid, factors, &Tiling::DEFAULT)?)
}

/// The reference videos of a first stage.
fn references(shape: &Shape, first: &Stage, factors: [usize; 3]) -> Result<ReferenceInput> {
    let [ft, fh, fw] = factors;
    let given = shape.references;
    for (side, length, factor) in [("height", first.height, fh), ("width", first.width, fw)] {
        let unit = factor * given.downscale;
        if !(length as usize).is_multiple_of(unit) {
            bail!(
                "the first stage has a {side} of {length} pixels, references that are {} times smaller need a multiple of \
                 {unit}; choose another `--{side}`",
                given.downscale
            );
        }
    }
    let (height, width) = (first.height as usize / given.downscale, first.width as usize / given.downscale);
    // Frame 0, then one of `stride` from frame 1 on; the encoder takes whole latents.
    let frames = 1 + (shape.frames - 1).div_ceil(given.stride);
    let latents = (frames - 1) / ft + 1;
    Ok(ReferenceInput {
        count: given.count as u32,
        frames: ((latents - 1) * ft + 1) as u32,
        height: height as u32,
        width: width as u32,
        space_scale: given.downscale as u32,
        time_scale: given.stride as u32,
        has_attention: given.has_attention,
        tiles: tiles([latents, height / fh, width / fw], factors)?,
    })
}
