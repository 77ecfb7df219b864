//! Clips and recordings of the command line, read and fitted for a plan.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ltxc_ir::DType;
use ltxc_ir::plan::{Modality, Plan, ReferenceInput, SoundRole};
use ltxc_runtime::media::{
    Clip, ClipInfo, ClipRate, ColourSpace, ExrSequence, MediaError, Rational, Window, is_exr, load_audio,
    resize_and_crop, shrink_and_pad,
};
use ltxc_runtime::pipeline::{Attention, Media, Reference, SourceClip};

use crate::args::{ContentArgs, Hdr, PipelineName, ShapeArgs};
use crate::choice::Occurrences;
use crate::job;
use crate::pipelines::{Definition, definition};
use crate::report::Report;

/// A path with a strength, as given on the command line.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    /// File or folder.
    pub path: PathBuf,
    /// Strength.
    pub strength: f64,
}

/// Splits the values of `--video-conditioning`: `occurrences` says how many values each one had.
///
/// # Errors
/// A strength that is no number.
pub fn weighted(content: &ContentArgs, occurrences: &[usize]) -> Result<Vec<Weighted>> {
    if content.video_conditioning.is_empty() && content.control_strength.is_some() {
        bail!("`--control-strength` is for reference videos; give them with `--video-conditioning`");
    }
    let mut rest = &content.video_conditioning[..];
    let mut out = Vec::new();
    for &n in occurrences {
        let (this, others) = rest.split_at(n.min(rest.len()));
        rest = others;
        let Some(path) = this.first() else { continue };
        let strength = match this.get(1) {
            Some(text) => {
                let named = || format!("`--video-conditioning {path}`: strength `{text}` is not a number");
                text.parse().with_context(named)?
            }
            None => content.control_strength.unwrap_or(1.0),
        };
        out.push(Weighted { path: path.into(), strength });
    }
    Ok(out)
}

/// Checks that a run brings what its pipeline takes and nothing else, before anything is compiled for it.
///
/// # Errors
/// What is missing or too much, with the flag that gives it.
pub fn check_given(pipeline: PipelineName, content: &ContentArgs) -> Result<()> {
    let of = definition(pipeline);
    let Definition { name, brings, .. } = of;
    check_text(name, of.denoises(), content)?;
    if (brings.pads_references || !of.denoises()) && !content.image.is_empty() {
        bail!("pipeline `{name}` takes no images; leave `--image` out");
    }
    if brings.appends_first_image && content.image.is_empty() {
        bail!("pipeline `{name}` passes through images; give `--image PATH FRAME` for each");
    }
    let dubs = brings.sound == Some(SoundRole::Reference);
    let is_kept = brings.sound == Some(SoundRole::Kept);
    for (what, taken, given, flag) in [
        ("clip", brings.clip, content.video_path.is_some(), "--video-path"),
        ("recording", is_kept, content.audio_path.is_some(), "--audio-path"),
        ("reference video", dubs, content.reference_video.is_some(), "--reference-video"),
        (
            "reference video",
            brings.references > 0 && !dubs,
            !content.video_conditioning.is_empty(),
            "--video-conditioning",
        ),
    ] {
        match (taken, given) {
            (true, false) => bail!("pipeline `{name}` needs a {what}; give `{flag}`"),
            (false, true) => bail!("pipeline `{name}` takes no {what}; leave `{flag}` out"),
            _ => {}
        }
    }
    let makes_part = brings.clip && of.denoises();
    if makes_part { part(content, &|latent| f64::from(latent)).map(drop) } else { Ok(()) }
}

/// Checks that there is text where it is read, and none elsewhere.
///
/// # Errors
/// A prompt that is missing or of no use.
pub fn check_text(pipeline: &str, is_read: bool, content: &ContentArgs) -> Result<()> {
    let is_given = content.prompt.is_some() || content.prompt_file.is_some() || content.embeddings.is_some();
    match (is_read, is_given) {
        (true, false) => bail!("`--prompt` is missing: it says what to show"),
        (false, true) => bail!("pipeline `{pipeline}` reads no text; leave `--prompt` and `--embeddings` out"),
        _ => Ok(()),
    }
}

/// The part of a clip that is made anew: where it starts and ends, in seconds; without an end it ends with the clip.
/// `begin_of` says where a latent frame begins.
///
/// # Errors
/// Nothing that says which part, or times that leave none.
fn part(content: &ContentArgs, begin_of: &dyn Fn(u32) -> f64) -> Result<(f64, Option<f64>)> {
    let start = content.start_time.or(content.start_latent.map(|latent| begin_of(latent) + LATENT_MARGIN));
    let end = content.end_time.or(content.end_latent.map(|latent| begin_of(latent) - LATENT_MARGIN));
    if start.is_none() && end.is_none() {
        bail!(
            "which part of the clip is made anew? give `--start-time`, `--end-time` or both; `--start-time 0` is all of it"
        );
    }
    for (flag, time) in [("--start-time", content.start_time), ("--end-time", content.end_time)] {
        if let Some(time) = time.filter(|time| !(time.is_finite() && *time >= 0.0)) {
            bail!("`{flag} {time}` is no time of the clip; give seconds from its beginning on");
        }
    }
    if let (Some(behind), None) = (content.end_latent, content.start_time) {
        let first = content.start_latent.unwrap_or(0);
        if behind <= first {
            bail!(
                "`--end-latent {behind}` is not behind latent frame {first}, where the part begins; give a larger one"
            );
        }
    }
    let start = start.unwrap_or(0.0);
    if let Some(end) = end.filter(|end| *end <= start) {
        bail!("the part from {start} s to {end} s is empty; give a start before the end");
    }
    Ok((start, end))
}

/// Frames of the shortest reference video of a run at `rate`; `None` without one.
///
/// # Errors
/// A strength that is no number, or a video that cannot be read.
pub fn shortest(content: &ContentArgs, occurrences: &Occurrences, rate: Rational) -> Result<Option<usize>> {
    let given = weighted(content, &occurrences.reference)?;
    let mut shortest: Option<usize> = None;
    for video in given {
        let frames = info(&video.path)?.frames_at(rate);
        shortest = Some(shortest.map_or(frames, |other| other.min(frames)));
    }
    Ok(shortest)
}

/// The reference videos of a run.
///
/// # Errors
/// A strength that is no number, or a video that the pipeline does not take.
pub fn references(content: &ContentArgs, occurrences: &Occurrences, plan: &Plan) -> Result<Vec<Weighted>> {
    let inputs = &plan.pipeline.inputs;
    let mut given = weighted(content, &occurrences.reference)?;
    let dubs = inputs.sound.is_some_and(|sound| sound.role == SoundRole::Reference);
    let dubbed = content
        .reference_video
        .as_ref()
        .map(|path| Weighted { path: path.clone(), strength: content.reference_strength.unwrap_or(1.0) });
    let (taken, other, flag) = match dubs {
        true => (dubbed.into_iter().collect(), given.pop(), "--video-conditioning"),
        false => (given, dubbed, "--reference-video"),
    };
    if let Some(other) = other {
        let (name, path) = (&plan.pipeline.name, other.path.display());
        bail!("pipeline `{name}` has no use for `{flag} {path}`; leave it out");
    }
    if content.reference_strength.is_some() && content.reference_video.is_none() {
        bail!("`--reference-strength` is that of `--reference-video`, which is missing");
    }
    Ok(taken)
}

/// Size, length and rate that a clip gives to a plan which is compiled for it, where flags do not say otherwise, and the
/// length of its sound in seconds if that guides. References are `space_scale` times coarser than the video.
///
/// # Errors
/// A clip that cannot be read, or has no rate while none is given.
pub fn shape_of_media(args: &ShapeArgs, content: &ContentArgs, space_scale: u32) -> Result<(ShapeArgs, Option<f64>)> {
    let Definition { brings, frames: most, .. } = *definition(args.pipeline.unwrap_or_default());
    let padded = content.video_conditioning.first().filter(|_| brings.pads_references);
    let (path, gives_size) = match (&content.video_path, &content.reference_video, padded) {
        (Some(path), _, _) if brings.clip => (path.as_path(), true),
        (_, Some(path), _) if brings.sound == Some(SoundRole::Reference) => (path.as_path(), false),
        (_, _, Some(path)) => (Path::new(path), true),
        _ => return Ok((args.clone(), None)),
    };
    let info = info(path)?;
    let rate = match (info.rate, &args.frame_rate) {
        (_, Some(rate)) => job::frame_rate(rate)?,
        (ClipRate::Constant(rate), None) => rate,
        (ClipRate::Variable(_) | ClipRate::Free, None) => {
            bail!("`{}` has no frame rate of its own; give `--frame-rate`", path.display())
        }
    };
    let number = |n: usize| u32::try_from(n).ok();
    // Whole latents of the first stage, which has half the size, and of references; of every known model.
    let unit = if padded.is_some() { 64 * space_scale as usize } else { 1 };
    let side = |n: usize| number(n.next_multiple_of(unit)).filter(|_| gives_size && args.size.is_none());
    let frames = info.frames_at(rate);
    let frames = if padded.is_some() { frames.min(most) } else { frames };
    let has_length = args.num_frames.is_some() || args.seconds.is_some();
    let shape = ShapeArgs {
        height: args.height.or(side(info.height)),
        width: args.width.or(side(info.width)),
        // The encoder takes 8k+1 frames of every known model; others are refused later, with the nearest numbers.
        num_frames: args.num_frames.or(number(frames.saturating_sub(1) / 8 * 8 + 1).filter(|_| !has_length)),
        frame_rate: Some(rate.to_string()),
        ..args.clone()
    };
    let seconds = match brings.sound {
        Some(SoundRole::Reference) => {
            let sound = load_audio(path, 0.0, MOST_REFERENCE_SECONDS)?;
            Some(sound.len() as f64 / f64::from(sound.rate_hz))
        }
        _ => None,
    };
    Ok((shape, seconds))
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
/// A run without a video, or a plan that computes with less than f32.
pub fn colour_space(content: &ContentArgs, plan: &Plan) -> Result<Option<ColourSpace>> {
    let hdr = match (content.hdr, plan.pipeline.inputs.pads_references) {
        (None, false) => return Ok(None),
        (None, true) => Hdr::LogC3,
        (Some(other), true) if other != Hdr::LogC3 => {
            bail!("pipeline `{}` works with LOGC3 and no other space; leave `--hdr` out", plan.pipeline.name)
        }
        (Some(hdr), _) => hdr,
    };
    if content.video_path.is_none() && content.video_conditioning.is_empty() {
        bail!(
            "`--hdr` says what EXR frames are; give them with `--video-path` or `--video-conditioning`, or leave it out"
        );
    }
    if plan.pipeline.dtype != DType::F32 {
        bail!(
            "a high dynamic range needs the precision of f32, and the plan computes in {}; compile it with `--dtype f32`",
            plan.pipeline.dtype
        );
    }
    Ok(Some(match hdr {
        Hdr::SrgbLinear => ColourSpace::SrgbLinear,
        Hdr::AcesCg => ColourSpace::AcesCg,
        Hdr::AcesCct => ColourSpace::AcesCct,
        Hdr::LogC3 => ColourSpace::LogC3,
    }))
}

/// Width and height of the result, where that has the size of the references.
///
/// # Errors
/// References that the plan is too small or too large for, or that have not all one size.
pub fn size_of_references(references: &[Weighted], plan: &Plan) -> Result<Option<(usize, usize)>> {
    let pipeline = &plan.pipeline;
    let (Some(planned), true) = (pipeline.inputs.references.first(), pipeline.inputs.pads_references) else {
        return Ok(None);
    };
    let first = pipeline.stages.first().context("the plan has no stages")?;
    let shrink = (pipeline.video.height / first.height.max(1)).max(1) as usize;
    let unit = |factor: u32| factor as usize * planned.space_scale as usize * shrink;
    let units = [unit(pipeline.video.scale[2]), unit(pipeline.video.scale[1])];
    let taken = (pipeline.video.width as usize, pipeline.video.height as usize);
    let mut size = None;
    for Weighted { path, .. } in references {
        let ClipInfo { width, height, .. } = info(path)?;
        let needed = (width.next_multiple_of(units[0]), height.next_multiple_of(units[1]));
        if needed != taken {
            bail!(
                "`{}` is {width}x{height}, which takes a plan for {}x{}; this one is for {}x{}: compile it with `--width {1} \
                 --height {2}`",
                path.display(),
                needed.0,
                needed.1,
                taken.0,
                taken.1
            );
        }
        if size.replace((width, height)).is_some_and(|other| other != (width, height)) {
            bail!("`{}` is {width}x{height}, other reference videos are not; give all one size", path.display());
        }
    }
    Ok(size)
}

/// How frames become as large as a plan takes them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fit {
    /// They are resized to cover it, and their centre is taken.
    Crop,
    /// They are shrunk if they must, and padded.
    Pad,
}

/// Hands on the frames of a clip or a sequence of EXR files, each fitted to `width` and `height`, as models see them:
/// `[height, width, 3]` in `[-1, 1]`. Returns how many there were.
fn read_frames(
    path: &Path,
    window: Window,
    space: Option<ColourSpace>,
    (width, height, fit): (usize, usize, Fit),
    sink: &mut dyn FnMut(Vec<f32>),
) -> Result<usize> {
    match (is_exr(path), space) {
        (true, Some(space)) => Ok(ExrSequence::open(path)?.read(window.frames, space, &mut |picture| {
            sink(match fit {
                Fit::Crop => picture.resize_and_crop(width, height)?,
                Fit::Pad => picture.shrink_and_pad(width, height)?,
            });
            Ok(())
        })?),
        (true, None) => bail!(
            "`{}` holds EXR frames; say what their numbers are with `--hdr SRGB_LINEAR`, `ACESCG` or `ACESCCT`",
            path.display()
        ),
        // To LogC3, 8 bits are a signal already.
        (false, Some(space)) if space != ColourSpace::LogC3 => {
            bail!("`{}` holds no EXR frames; leave `--hdr` out", path.display())
        }
        (false, _) => Ok(Clip::open(path)?.read(window, &mut |picture| {
            sink(match fit {
                Fit::Crop => resize_and_crop(picture, width, height)?,
                Fit::Pad => shrink_and_pad(picture, width, height)?,
            });
            Ok(())
        })?),
    }
}

/// Longest recording that can guide, in seconds; tokens of a minute are many already.
const MOST_REFERENCE_SECONDS: f64 = 600.0;

/// Reads what a run brings.
///
/// # Errors
/// A file that cannot be read, is too short, or has another rate or size than the plan.
pub fn load(content: &ContentArgs, references: &[Weighted], plan: &Plan, report: &mut Report) -> Result<Media> {
    let inputs = &plan.pipeline.inputs;
    let ([count, ..], (num, den)) = plan.pipeline.clip_shape();
    let rate = Rational::new(num, den)?;
    let seconds = f64::from(count) / rate.to_f64();
    let mut media = Media::default();
    let space = colour_space(content, plan)?;
    let load = |given: &Weighted| -> Result<Reference> {
        let fit = if inputs.pads_references { Fit::Pad } else { Fit::Crop };
        let stands = if inputs.doubles_frames { 2 } else { 1 };
        let frames = inputs.references.iter().map(|planned| reference(&given.path, planned, stands, rate, space, fit));
        Ok(Reference { frames: frames.collect::<Result<_>>()?, strength: given.strength })
    };
    if let (true, Some(given)) = (inputs.references.is_empty(), references.first()) {
        bail!("pipeline `{}` takes no reference videos; leave `{}` out", plan.pipeline.name, given.path.display());
    }
    media.references = references.iter().map(load).collect::<Result<_>>()?;
    media.attention = attention(content, plan, rate)?;
    let guide = inputs.sound.filter(|sound| sound.role == SoundRole::Reference);
    if let (Some(guide), Some(given)) = (guide, references.first()) {
        // All that the plan has tokens for, and what the window of the last one sees.
        let samples = u64::from(guide.mel_frames) * u64::from(guide.hop_length) + u64::from(guide.n_fft);
        media.sound = Some(load_audio(&given.path, 0.0, samples as f64 / f64::from(guide.rate_hz.max(1)))?);
    }
    if inputs.sound.is_some_and(|sound| sound.role == SoundRole::Reference) || inputs.pads_references {
        let taken = if inputs.doubles_frames { count.div_ceil(2) } else { count };
        references.iter().try_for_each(|given| note_cut(&given.path, rate, taken, report))?;
    }
    if let Some(path) = &content.video_path {
        if inputs.clip.is_none() {
            bail!("pipeline `{}` takes no clip; leave `--video-path {}` out", plan.pipeline.name, path.display());
        }
        media.clip = Some(clip(content, path, plan, Window { rate, start_seconds: 0.0, frames: count as usize })?);
        note_cut(path, rate, count, report)?;
        // A plan without sound has no use for that of the clip, unless it keeps it.
        let takes_sound = inputs.sound.is_some() || plan.pipeline.upscale.is_some();
        media.sound = match takes_sound.then(|| load_audio(path, 0.0, seconds)) {
            None | Some(Err(MediaError::NoSound { .. })) => None,
            Some(Ok(recording)) => Some(recording),
            Some(Err(_)) if is_exr(path) => None,
            Some(Err(error)) => return Err(error.into()),
        };
    }
    if let Some(path) = &content.audio_path {
        if let Some(SoundRole::Clip | SoundRole::Reference) = inputs.sound.map(|sound| sound.role) {
            bail!("pipeline `{}` takes its sound from the clip; leave `--audio-path` out", plan.pipeline.name);
        }
        if let Some(most) = content.audio_max_duration.filter(|most| !(most.is_finite() && *most > 0.0)) {
            bail!("`--audio-max-duration {most}` leaves nothing of `{}`; give seconds above 0", path.display());
        }
        let longest = content.audio_max_duration.unwrap_or(seconds).min(seconds);
        media.sound = Some(load_audio(path, content.audio_start_time.unwrap_or(0.0), longest)?);
    }
    Ok(media)
}

/// Says what the plan has no frames for.
fn note_cut(path: &Path, rate: Rational, taken: u32, report: &mut Report) -> Result<()> {
    let found = info(path)?.frames_at(rate);
    if found > taken as usize {
        let left = found - taken as usize;
        let last = if left == 1 { "the last one is".into() } else { format!("the last {left} are") };
        report.note(&format!("`{}` has {found} frames, of which {last} left out", path.display()));
    }
    Ok(())
}

/// A clip of which a part is made anew.
fn clip(content: &ContentArgs, path: &Path, plan: &Plan, window: Window) -> Result<SourceClip> {
    let ([_, height, width], _) = plan.pipeline.clip_shape();
    let info = info(path)?;
    if plan.pipeline.inputs.clip.is_some() && (info.width, info.height) != (width as usize, height as usize) {
        bail!(
            "`{}` is {}x{}, the plan is for {}x{}; compile it with `--width {} --height {}`, which must be multiples of {}",
            path.display(),
            info.width,
            info.height,
            width,
            height,
            info.width,
            info.height,
            plan.pipeline.video.scale[1]
        );
    }
    let mut frames = Vec::new();
    let space = colour_space(content, plan)?;
    read_frames(path, window, space, (info.width, info.height, Fit::Crop), &mut |frame| frames.extend(frame))?;
    let begin_of = |latent: u32| begin_of_latent(latent, plan.pipeline.video.scale[0], window.rate);
    let (start, end) = if plan.pipeline.upscale.is_some() { (0.0, None) } else { part(content, &begin_of)? };
    let length = window.frames as f64 / window.rate.to_f64();
    if start >= length {
        let given = match content.start_latent {
            Some(latent) => format!("--start-latent {latent}"),
            None => format!("--start-time {start}"),
        };
        bail!(
            "`{given}` is at or behind the end of `{}`, of which {length:.3} s are used; give an earlier start",
            path.display()
        );
    }
    let kept = match (content.keep_video, content.keep_audio) {
        (true, true) => bail!("`--keep-video` and `--keep-audio` leave nothing to be made anew; give one of them"),
        (true, false) => Some(Modality::Video),
        (false, true) => Some(Modality::Audio),
        (false, false) => None,
    };
    Ok(SourceClip { frames, start, end: end.unwrap_or(length), kept })
}

/// How far a part that is given in latent frames stays away from their ends, in seconds, because a latent is in a part that
/// touches it: less than the shortest token, more than f32 loses in an hour.
const LATENT_MARGIN: f64 = 1e-3;

/// Where a latent frame begins, in seconds: the first one is one frame long, all others `factor` frames.
fn begin_of_latent(latent: u32, factor: u32, rate: Rational) -> f64 {
    let frames = 1.0 + (f64::from(latent) - 1.0) * f64::from(factor);
    frames.max(0.0) / rate.to_f64()
}

/// Frames 0, 1, 1 + s, 1 + 2 s … of a video whose frames stand `stands` times each, fitted to the size of the plan.
fn reference(
    path: &Path,
    planned: &ReferenceInput,
    stands: usize,
    rate: Rational,
    space: Option<ColourSpace>,
    fit: Fit,
) -> Result<Vec<f32>> {
    let (count, step) = (planned.frames as usize, planned.time_scale.max(1) as usize);
    let (width, height) = (planned.width as usize, planned.height as usize);
    let end = if count < 2 { count } else { 2 + (count - 2) * step };
    let needed = end.div_ceil(stands);
    let mut frames = Vec::with_capacity(count * width * height * 3);
    let mut index = 0;
    let window = Window { rate, start_seconds: 0.0, frames: needed };
    let found = read_frames(path, window, space, (width, height, fit), &mut |frame| {
        for index in index..(index + stands).min(end) {
            if index == 0 || (index - 1) % step == 0 {
                frames.extend_from_slice(&frame);
            }
        }
        index += stands;
    })?;
    if found < needed {
        bail!(
            "`{}` has {found} frames, {needed} are needed; give a longer clip, or compile the plan with fewer `--num-frames`",
            path.display()
        );
    }
    Ok(frames)
}

/// How strongly references act, if not fully.
///
/// # Errors
/// A strength that is no number, or two of them.
pub fn attention_strength(content: &ContentArgs) -> Result<Option<f32>> {
    let beside_mask = content.conditioning_attention_mask.get(1);
    let strength = match (content.conditioning_attention_strength, beside_mask) {
        (Some(_), Some(_)) => {
            bail!("`--conditioning-attention-strength` and the strength behind the mask say the same; give one of them")
        }
        (strength, None) => strength,
        (None, Some(text)) => Some(
            text.parse()
                .with_context(|| format!("`--conditioning-attention-mask`: strength `{text}` is not a number"))?,
        ),
    };
    Ok(strength.filter(|&strength| strength != 1.0))
}

/// How strongly references act; a mask video is made grey, at the size of the first stage.
fn attention(content: &ContentArgs, plan: &Plan, rate: Rational) -> Result<Option<Attention>> {
    let strength = attention_strength(content)?;
    let Some(path) = content.conditioning_attention_mask.first().map(Path::new) else {
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
    fn a_clip_of_varying_rate_is_as_long_as_it_lasts() {
        // 12 pictures, which last 14 frames of 1/24 s.
        let clip = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/clips/varying.mp4");
        let content = ContentArgs { video_path: Some(clip), ..ContentArgs::default() };
        for (rate, frames) in [("12", 1), ("24", 9), ("60", 33)] {
            let args = ShapeArgs {
                pipeline: Some(PipelineName::Retake),
                frame_rate: Some(rate.into()),
                ..ShapeArgs::default()
            };
            let (shape, _) = shape_of_media(&args, &content, 1).unwrap();
            assert_eq!((shape.num_frames, shape.frame_rate.as_deref()), (Some(frames), Some(rate)));
        }
    }

    #[test]
    fn strengths_follow_their_paths() {
        let content = |values: &[&str]| ContentArgs {
            video_conditioning: values.iter().map(|s| s.to_string()).collect(),
            ..ContentArgs::default()
        };
        let given = content(&["a.mp4", "b.mp4", "0.5"]);
        let strengths = |content: &ContentArgs| -> Vec<f64> {
            weighted(content, &[1, 2]).unwrap().iter().map(|w| w.strength).collect()
        };
        assert_eq!(strengths(&given), [1.0, 0.5]);
        assert_eq!(strengths(&ContentArgs { control_strength: Some(0.9), ..given }), [0.9, 0.5]);
        assert!(weighted(&content(&["a", "x"]), &[2]).is_err());
    }
}
