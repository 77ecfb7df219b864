//! Clips and recordings of the command line, read and fitted for a plan.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ltxc_ir::DType;
use ltxc_ir::plan::{Modality, Plan, ReferenceInput};
use ltxc_runtime::media::{
    Clip, ClipInfo, ClipRate, ColourSpace, ExrSequence, MediaError, Rational, Window, is_exr, load_audio,
    resize_and_crop,
};
use ltxc_runtime::pipeline::{Attention, Media, Reference, SourceClip};

use crate::args::{ContentArgs, Hdr, ShapeArgs};

/// A path with a strength, as given on the command line.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    /// File or folder.
    pub path: PathBuf,
    /// Strength.
    pub strength: f64,
}

/// Splits the values of repeated flags `PATH [STRENGTH]`: `occurrences` says how many values each one had.
///
/// # Errors
/// A strength that is no number.
pub fn weighted(flag: &str, values: &[String], occurrences: &[usize]) -> Result<Vec<Weighted>> {
    let mut rest = values;
    let mut out = Vec::new();
    for &n in occurrences {
        let (this, others) = rest.split_at(n.min(rest.len()));
        rest = others;
        let Some(path) = this.first() else { continue };
        let strength = match this.get(1) {
            Some(text) => {
                text.parse().with_context(|| format!("`{flag} {path}`: strength `{text}` is not a number"))?
            }
            None => 1.0,
        };
        out.push(Weighted { path: path.into(), strength });
    }
    Ok(out)
}

/// Size, length and rate that a clip gives to a plan which is compiled for it, where flags do not say otherwise.
///
/// # Errors
/// A clip that cannot be read, or has no rate while none is given.
pub fn shape_of_clip(args: &ShapeArgs, path: &Path) -> Result<ShapeArgs> {
    let info = info(path)?;
    let rate = match info.rate {
        ClipRate::Constant(rate) => Some(rate.to_string()),
        ClipRate::Variable(_) | ClipRate::Free => None,
    };
    if rate.is_none() && args.frame_rate.is_none() {
        bail!("`{}` has no frame rate of its own; give `--frame-rate`", path.display());
    }
    let number = |n: usize| u32::try_from(n).ok();
    Ok(ShapeArgs {
        height: args.height.or(number(info.height)),
        width: args.width.or(number(info.width)),
        // The encoder takes 8k+1 frames of every known model; others are refused later, with the nearest numbers.
        num_frames: args.num_frames.or(number(info.frames.saturating_sub(1) / 8 * 8 + 1)),
        frame_rate: args.frame_rate.clone().or(rate),
        ..args.clone()
    })
}

/// What a clip or a sequence of EXR files is.
fn info(path: &Path) -> Result<ClipInfo, MediaError> {
    match is_exr(path) {
        true => ExrSequence::open(path).map(|sequence| sequence.info()),
        false => Clip::open(path).map(|clip| clip.info()),
    }
}

/// The colour space of a run with a high dynamic range.
///
/// # Errors
/// A run without a clip, or a plan that computes with less than f32.
pub fn colour_space(content: &ContentArgs, plan: &Plan) -> Result<Option<ColourSpace>> {
    let Some(hdr) = content.hdr else { return Ok(None) };
    if content.video_path.is_none() {
        bail!("`--hdr` says what the EXR frames of a clip are; give the clip with `--video-path`, or leave it out");
    }
    if plan.pipeline.dtype != DType::F32 {
        bail!("`--hdr` needs the precision of f32; compile the plan without `--dtype {}`", plan.pipeline.dtype);
    }
    Ok(Some(match hdr {
        Hdr::SrgbLinear => ColourSpace::SrgbLinear,
        Hdr::AcesCg => ColourSpace::AcesCg,
        Hdr::AcesCct => ColourSpace::AcesCct,
    }))
}

/// The frames of a clip, as models see them.
fn frames_of(path: &Path, window: Window, info: ClipInfo, space: Option<ColourSpace>) -> Result<Vec<f32>> {
    match (is_exr(path), space) {
        (true, Some(space)) => Ok(ExrSequence::open(path)?.load(window.frames, space)?),
        (true, None) => bail!(
            "`{}` holds EXR frames; say what their numbers are with `--hdr SRGB_LINEAR`, `ACESCG` or `ACESCCT`",
            path.display()
        ),
        (false, Some(_)) => bail!("`{}` holds no EXR frames; leave `--hdr` out", path.display()),
        (false, None) => Ok(Clip::open(path)?.load(window, info.width, info.height)?),
    }
}

/// Reads what a run brings.
///
/// # Errors
/// A file that cannot be read, is too short, or has another rate or size than the plan.
pub fn load(content: &ContentArgs, references: &[Weighted], plan: &Plan) -> Result<Media> {
    let (inputs, video) = (&plan.pipeline.inputs, &plan.pipeline.video);
    let rate = Rational::new(video.frame_rate.0, video.frame_rate.1)?;
    let seconds = f64::from(video.frames) / rate.to_f64();
    let mut media = Media::default();
    if let Some(planned) = &inputs.references {
        let load = |given: &Weighted| reference(given, planned, rate);
        media.references = references.iter().map(load).collect::<Result<_>>()?;
        media.attention = attention(content, plan, rate)?;
    } else if let Some(given) = references.first() {
        bail!("pipeline `{}` takes no reference videos; leave `{}` out", plan.pipeline.name, given.path.display());
    }
    if let Some(path) = &content.video_path {
        let info = info(path)?;
        if (info.width, info.height) != (video.width as usize, video.height as usize) {
            bail!(
                "`{}` is {}x{}, the plan is for {}x{}; compile it with `--width {} --height {}`, which must be multiples of {}",
                path.display(),
                info.width,
                info.height,
                video.width,
                video.height,
                info.width,
                info.height,
                video.scale[1]
            );
        }
        let window = Window { rate, start_seconds: 0.0, frames: video.frames as usize };
        let frames = frames_of(path, window, info, colour_space(content, plan)?)?;
        let end = content.end_time.unwrap_or(seconds);
        let kept = match (content.keep_video, content.keep_audio) {
            (true, true) => bail!("`--keep-video` and `--keep-audio` leave nothing to be made anew; give one of them"),
            (true, false) => Some(Modality::Video),
            (false, true) => Some(Modality::Audio),
            (false, false) => None,
        };
        media.clip = Some(SourceClip { frames, start: content.start_time.unwrap_or(0.0), end, kept });
        media.sound = match load_audio(path, 0.0, seconds) {
            Ok(recording) => Some(recording),
            Err(MediaError::NoSound { .. }) => None,
            Err(_) if is_exr(path) => None,
            Err(error) => return Err(error.into()),
        };
    }
    if let Some(path) = &content.audio_path {
        if inputs.clip.is_some() {
            bail!("pipeline `{}` takes its sound from the clip; leave `--audio-path` out", plan.pipeline.name);
        }
        let longest = content.audio_max_duration.unwrap_or(seconds).min(seconds);
        media.sound = Some(load_audio(path, content.audio_start_time.unwrap_or(0.0), longest)?);
    }
    Ok(media)
}

/// Frames 0, 1, 1 + s, 1 + 2 s … of a video, fitted to the size of the plan.
fn reference(given: &Weighted, planned: &ReferenceInput, rate: Rational) -> Result<Reference> {
    let (count, step) = (planned.frames as usize, planned.time_scale.max(1) as usize);
    let (width, height) = (planned.width as usize, planned.height as usize);
    let needed = if count < 2 { count } else { 2 + (count - 2) * step };
    let mut frames = Vec::with_capacity(count * width * height * 3);
    let mut index = 0;
    let window = Window { rate, start_seconds: 0.0, frames: needed };
    let found = Clip::open(&given.path)?.read(window, &mut |image| {
        if index == 0 || (index - 1) % step == 0 {
            frames.extend(resize_and_crop(image, width, height)?);
        }
        index += 1;
        Ok(())
    })?;
    if found < needed {
        bail!(
            "`{}` has {found} frames, {needed} are needed; give a longer clip, or compile the plan with fewer `--num-frames`",
            given.path.display()
        );
    }
    Ok(Reference { frames, strength: given.strength })
}

/// How strongly references act; a mask video is made grey, at the size of the first stage.
fn attention(content: &ContentArgs, plan: &Plan, rate: Rational) -> Result<Option<Attention>> {
    let strength = content.conditioning_attention_strength;
    let Some(path) = &content.conditioning_attention_mask else {
        return Ok(strength.map(|strength| Attention { strength, mask: None }));
    };
    let stage = plan.pipeline.stages.first().context("the plan has no stages")?;
    let (width, height, frames) = (stage.width as usize, stage.height as usize, plan.pipeline.video.frames as usize);
    let mut mask = Vec::with_capacity(frames * width * height);
    let window = Window { rate, start_seconds: 0.0, frames };
    let found = Clip::open(path)?.read(window, &mut |image| {
        let fitted = resize_and_crop(image, width, height)?;
        // The mean of the three, from [-1, 1] to [0, 1].
        mask.extend(fitted.as_chunks::<3>().0.iter().map(|[r, g, b]| ((r + g + b) / 3.0 + 1.0) * 0.5));
        Ok(())
    })?;
    if found < frames {
        bail!("the mask `{}` has {found} frames, the video has {frames}; give a longer one", path.display());
    }
    Ok(Some(Attention { strength: strength.unwrap_or(1.0), mask: Some(mask) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strengths_follow_their_paths() {
        let values = ["a.mp4", "b.mp4", "0.5"].map(String::from);
        let found = weighted("--video-conditioning", &values, &[1, 2]).unwrap();
        assert_eq!(found.iter().map(|w| w.strength).collect::<Vec<_>>(), [1.0, 0.5]);
        assert!(weighted("--video-conditioning", &["a".into(), "x".into()], &[2]).is_err());
    }
}
