//! What a run brings besides text and images, as the plan records it.

use anyhow::{Result, bail};
use ltxc_ir::plan::{ClipInput, Inputs, ReferenceInput, SoundInput, SoundRole, Stage};
use ltxc_ir::tiling::{TilePlan, Tiling};
use ltxc_models::audio::AudioVaeConfig;

use super::definition;
use crate::job::{Shape, doubled};

/// The inputs of a pipeline of these stages, with `factors` pixels per latent and sound of so many tokens.
///
/// # Errors
/// References that do not fit the size of a stage.
pub fn inputs(
    shape: &Shape,
    stages: &[Stage],
    factors: [usize; 3],
    audio_vae: Option<&AudioVaeConfig>,
    tokens: usize,
) -> Result<Inputs> {
    let brings = definition(shape.pipeline).brings;
    let guided = stages.iter().take(brings.references);
    let references = guided.map(|stage| references(shape, stage, factors)).collect::<Result<_>>()?;
    let clip = match (brings.clip, stages.first()) {
        (true, Some(first)) => Some(ClipInput { tiles: tiles(first.grid.map(|n| n as usize), factors)? }),
        _ => None,
    };
    let mel_frames = |role: SoundRole, audio_vae: &AudioVaeConfig| match role {
        SoundRole::Kept | SoundRole::Clip => audio_vae.mel_frames(tokens),
        // The whole recording guides, however long it is.
        SoundRole::Reference => {
            let seconds = shape.frames as f64 / shape.frame_rate.to_f64();
            let seconds = shape.reference_seconds.unwrap_or(seconds);
            // As many as resampling gives, which rounds up; quotients are not exact.
            let samples = (seconds * audio_vae.sampling_rate_hz as f64 - 1e-6).ceil() as usize;
            audio_vae.mel_frames(audio_vae.latent_frames(1 + samples / audio_vae.hop_length.max(1)))
        }
    };
    let sound = brings.sound.zip(audio_vae).map(|(role, audio_vae)| SoundInput {
        role,
        rate_hz: audio_vae.sampling_rate_hz as u32,
        n_fft: audio_vae.n_fft as u32,
        hop_length: audio_vae.hop_length as u32,
        mel_bins: audio_vae.mel_bins as u32,
        mel_frames: mel_frames(role, audio_vae) as u32,
        time_factor: audio_vae.time_factor() as u32,
    });
    Ok(Inputs {
        appends_first_image: brings.appends_first_image,
        references,
        pads_references: brings.pads_references,
        doubles_frames: shape.doubles_frames,
        clip,
        sound,
    })
}

/// The tiles in which a clip is encoded.
///
/// # Errors
/// A grid that cannot be split.
pub fn tiles(grid: [usize; 3], factors: [usize; 3]) -> Result<TilePlan> {
    Ok(TilePlan::encode(grid, factors, &Tiling::DEFAULT)?)
}

/// The reference videos of a stage.
fn references(shape: &Shape, stage: &Stage, factors: [usize; 3]) -> Result<ReferenceInput> {
    let [ft, fh, fw] = factors;
    let given = shape.references;
    let (downscale, stride) = (given.scale.space as usize, given.scale.time as usize);
    for (side, length, factor) in [("height", stage.height, fh), ("width", stage.width, fw)] {
        let unit = factor * downscale;
        if !(length as usize).is_multiple_of(unit) {
            bail!(
                "{} has a {side} of {length} pixels, and its reference videos are {downscale} times smaller, so it needs a \
                 multiple of {unit}; choose another `--{side}`",
                stage.name
            );
        }
    }
    let (height, width) = (stage.height as usize / downscale, stage.width as usize / downscale);
    // Frame 0, then one of `stride` from frame 1 on; the encoder takes whole latents.
    let available = given.frames.map_or(shape.frames, |n| if shape.doubles_frames { doubled(n) } else { n });
    let longest = available.clamp(1, shape.frames);
    let frames = 1 + (longest - 1).div_ceil(stride);
    let latents = (frames - 1) / ft + 1;
    if stage.tiles.is_some() && (stride != 1 || latents != stage.grid[0] as usize) {
        let given = |n: usize| if shape.doubles_frames { n.div_ceil(2) } else { n };
        bail!(
            "{} runs in tiles, whose parts of a reference video are as long as they are: it takes a LoRA with temporal factor 1 \
             (found {stride}) and a reference video of {} frames (found {}); choose another `--num-frames`",
            stage.name,
            given(shape.frames),
            given(longest)
        );
    }
    Ok(ReferenceInput {
        count: given.count as u32,
        frames: ((latents - 1) * ft + 1) as u32,
        height: height as u32,
        width: width as u32,
        space_scale: given.scale.space,
        time_scale: given.scale.time,
        has_attention: given.has_attention,
        tiles: tiles([latents, height / fh, width / fw], factors)?,
    })
}
