//! What a run brings besides text and images, turned into latents and conditioning.
//!
//! # Easy to get wrong
//! - A recording that is too short is continued with zeros in the normalised latent, which is no silence.
//! - The encoders are causal in time: what stands behind a recording does not change the latents before it.
//! - The weight of a mask video is averaged over whole latents: the first frame alone, then groups of frames.
//! - A recording that guides is encoded for the first stage; later stages are guided by the sound that this one made.
//!
//! Source: spec/pipelines §9.5, §9.7, §9.8, §9.11; spec/media-io §3.

use std::borrow::Cow;

use ltxc_ir::plan::{Inputs, Modality, Pipeline, ReferenceInput, SoundInput, SoundRole};

use super::conditioning::Item;
use super::encode::encode_video;
use super::per::Per;
use super::positions::{ReferenceScale, reference_audio_positions, reference_positions};
use crate::audio_frontend::{MelFrontend, MelSettings};
use crate::error::RunError;
use crate::executor::Executor;
use crate::media::Recording;

/// What a run brings besides text and images.
#[derive(Clone, Debug, Default)]
pub struct Media {
    /// Videos that guide.
    pub references: Vec<Reference>,
    /// How strongly references and target attend to each other; fully if it is not said.
    pub attention: Option<Attention>,
    /// A clip of which a part is made anew, or that is upscaled.
    pub clip: Option<SourceClip>,
    /// A recording at its own rate.
    pub sound: Option<Recording>,
}

/// A video that guides.
#[derive(Clone, Debug)]
pub struct Reference {
    /// For every stage that takes it, `[n, height, width, 3]` in `[-1, 1]`, of the size that the plan takes.
    pub frames: Vec<Vec<f32>>,
    /// 1 shows it to the model as it is, 0 as noise.
    pub strength: f64,
}

/// Attention between references and target.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Everywhere, in `[0, 1]`.
    pub strength: f32,
    /// Factor of it, `[n, height, width]` in `[0, 1]`: as many frames as the video, of the size of the first stage.
    pub mask: Option<Vec<f32>>,
}

/// A clip of which a part is made anew; one that is upscaled is used as a whole.
#[derive(Clone, Debug)]
pub struct SourceClip {
    /// `[n, height, width, 3]` in `[-1, 1]`, of the size that the plan takes.
    pub frames: Vec<f32>,
    /// Start of the part, in seconds.
    pub start: f64,
    /// End of the part, in seconds.
    pub end: f64,
    /// A modality that stays as it is.
    pub kept: Option<Modality>,
}

impl SourceClip {
    /// Checks that it has the size and length that the plan takes.
    pub(super) fn check(&self, pipeline: &Pipeline) -> Result<(), RunError> {
        check_frames("the clip", self.frames.len(), pipeline.clip_shape().0)
    }
}

/// Latents of what was brought, and what they do to the stages.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    /// What the first stage starts from, in token form.
    pub latents: Per<Vec<f32>>,
    /// Items of every stage, behind those of images.
    pub items: Vec<Per<Vec<Item>>>,
    /// Modalities that are only looked at, in all stages.
    pub frozen: Per<()>,
}

impl Media {
    /// Whether a run brings exactly what the pipeline takes.
    ///
    /// # Errors
    /// What is missing or too much, with the flag that gives it.
    pub(super) fn check(&self, pipeline: &Pipeline) -> Result<(), RunError> {
        let (name, inputs) = (&pipeline.name, &pipeline.inputs);
        let refused = |problem: String| Err(RunError::Input(problem));
        // A video whose sound guides, too, has a flag of its own.
        let (reference_flag, sound_flag) = match inputs.sound.map(|sound| sound.role) {
            Some(SoundRole::Reference) => ("--reference-video", "--reference-video"),
            _ => ("--video-conditioning", "--audio-path"),
        };
        let sound_is_optional = inputs.sound.is_some_and(|sound| sound.role == SoundRole::Clip);
        for (what, taken, given, flag) in [
            ("clip", inputs.clip.is_some(), self.clip.is_some(), "--video-path"),
            ("recording", inputs.sound.is_some(), self.sound.is_some() || sound_is_optional, sound_flag),
            ("reference video", !inputs.references.is_empty(), !self.references.is_empty(), reference_flag),
        ] {
            match (taken, given) {
                (true, false) => return refused(format!("pipeline `{name}` needs a {what}; give `{flag}`")),
                (false, true) => return refused(format!("pipeline `{name}` takes no {what}; leave `{flag}` out")),
                _ => {}
            }
        }
        if let Some(clip) = &self.clip {
            clip.check(pipeline)?;
            let in_order = clip.start.is_finite() && clip.end.is_finite() && (0.0..clip.end).contains(&clip.start);
            if clip.kept == Some(Modality::Audio) && self.sound.is_none() {
                return refused("the clip has no sound that could be kept; leave `--keep-audio` out".into());
            }
            if !in_order {
                return refused(format!(
                    "the part from {} s to {} s is empty; give a start before the end",
                    clip.start, clip.end
                ));
            }
        }
        if inputs.references.is_empty() && self.attention.is_some() {
            return refused(format!("pipeline `{name}` has no reference videos whose attention could be set"));
        }
        (inputs.references.iter().enumerate()).try_for_each(|(i, planned)| self.check_references(i, planned, pipeline))
    }

    /// Checks the references of the stage with this index.
    fn check_references(&self, index: usize, planned: &ReferenceInput, pipeline: &Pipeline) -> Result<(), RunError> {
        let refused = |problem: String| Err(RunError::Input(problem));
        if self.references.len() != planned.count as usize {
            return refused(format!(
                "the plan takes {} reference videos, {} are given; compile it with `--reference-count {1}`",
                planned.count,
                self.references.len()
            ));
        }
        for (i, reference) in self.references.iter().enumerate() {
            let what = format!("reference video {}", i + 1);
            let values = reference.frames.get(index).map_or(0, Vec::len);
            check_frames(&what, values, [planned.frames, planned.height, planned.width])?;
            if !(0.0..=1.0).contains(&reference.strength) {
                return refused(format!("{what} has strength {}, it must be 0 to 1", reference.strength));
            }
        }
        match (&self.attention, planned.has_attention) {
            (Some(_), false) => refused(
                "the plan was compiled without strengths of attention; compile it with `--reference-attention`".into(),
            ),
            (Some(attention), true) => {
                let stage = pipeline.stages.first();
                let pixels = stage.map_or(0, |s| s.height as usize * s.width as usize);
                let expected = pipeline.video.frames as usize * pixels;
                if attention.mask.as_ref().is_some_and(|mask| mask.len() != expected) {
                    return Err(RunError::Internal("the mask does not have the size of the first stage".into()));
                }
                if !(0.0..=1.0).contains(&attention.strength) {
                    return refused(format!("strength {} of attention must be 0 to 1", attention.strength));
                }
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }

    /// Encodes everything.
    ///
    /// # Errors
    /// A program that cannot run, or a recording that has no spectrogram.
    pub(super) fn encode(&self, executor: &mut Executor<'_>) -> Result<Encoded, RunError> {
        let pipeline = &executor.plan().pipeline;
        let Inputs { references, clip, sound, .. } = &pipeline.inputs;
        let channels = pipeline.video.channels as usize;
        let items = pipeline.stages.iter().map(|_| Per::default()).collect();
        let mut encoded = Encoded { items, ..Encoded::default() };
        if let (Some(planned), Some(clip), Some(items)) = (clip, &self.clip, encoded.items.first_mut()) {
            encoded.latents.video = Some(encode_video(executor, &planned.tiles, channels, &clip.frames)?);
            let region = || vec![Item::Region { start: clip.start, end: clip.end }];
            // A silent clip gets new sound from its start to its end.
            *items = Per { video: Some(region()), audio: self.sound.is_some().then(region) };
            if let Some(kept) = clip.kept {
                *encoded.frozen.slot(kept) = Some(());
            }
        }
        if let (Some(planned), Some(recording)) = (sound, &self.sound) {
            let latent = encode_sound(executor, planned, pipeline, recording)?;
            match planned.role {
                SoundRole::Kept => (encoded.latents.audio, encoded.frozen.audio) = (Some(latent), Some(())),
                SoundRole::Clip => encoded.latents.audio = Some(latent),
                SoundRole::Reference => {
                    let item = reference_sound(latent, planned.tokens());
                    encoded.items.iter_mut().take(1).for_each(|items| items.audio = Some(vec![item.clone()]));
                }
            }
        }
        for (i, (planned, items)) in references.iter().zip(&mut encoded.items).enumerate() {
            let scale = ReferenceScale { space: planned.space_scale, time: planned.time_scale };
            let positions = reference_positions(planned.grid(), scale, &pipeline.video);
            let attention = self.attention.as_ref().and_then(|attention| strengths(attention, planned, pipeline));
            for reference in &self.references {
                let frames = reference.frames.get(i).map_or(&[][..], Vec::as_slice);
                let latent = encode_video(executor, &planned.tiles, channels, frames)?;
                let (positions, attention, strength) = (positions.clone(), attention.clone(), reference.strength);
                let item = Item::Append { latent, positions, strength, attention };
                items.video.get_or_insert_default().push(item);
            }
        }
        if clip.is_some() || sound.is_some() || !references.is_empty() {
            executor.unload_all()?;
        }
        Ok(encoded)
    }
}

/// The item of `tokens` tokens of sound that guide.
pub(super) fn reference_sound(latent: Vec<f32>, tokens: u32) -> Item {
    Item::Append { latent, positions: reference_audio_positions(tokens), strength: 1.0, attention: None }
}

fn check_frames(what: &str, values: usize, [frames, height, width]: [u32; 3]) -> Result<(), RunError> {
    let frame = height as usize * width as usize * 3;
    if values == frames as usize * frame {
        return Ok(());
    }
    let found = values / frame.max(1);
    Err(RunError::Input(format!(
        "{what} has {found} frames of {height}x{width}, the plan takes {frames}; give a longer clip, or compile with \
         `--num-frames` for this one"
    )))
}

/// The latent tokens of a recording, `[tokens, channels]`, continued with zeros or cut.
fn encode_sound(
    executor: &mut Executor<'_>,
    planned: &SoundInput,
    pipeline: &Pipeline,
    recording: &Recording,
) -> Result<Vec<f32>, RunError> {
    let frontend = MelFrontend::new(MelSettings {
        rate_hz: planned.rate_hz as usize,
        n_fft: planned.n_fft as usize,
        hop_length: planned.hop_length as usize,
        mel_bins: planned.mel_bins as usize,
    })?;
    // One that is shorter than a transform has silence behind it.
    let least = (u64::from(planned.n_fft) * u64::from(recording.rate_hz)).div_ceil(u64::from(planned.rate_hz).max(1));
    let mut channels = Cow::Borrowed(&recording.channels);
    if (recording.len() as u64) < least {
        channels.to_mut().iter_mut().for_each(|channel| channel.resize(least as usize, 0.0));
    }
    let (frames, mut mel) = frontend.stereo_log_mel(&channels, recording.rate_hz as usize)?;
    mel.resize(planned.mel_frames as usize * planned.mel_bins as usize * 2, 0.0);
    executor.write("encode_audio", "mel", &mel)?;
    executor.run("encode_audio")?;
    let expected = planned.tokens() as usize * pipeline.audio.channels as usize;
    let mut latent = executor.read_values("encode_audio", "latent", expected)?.into_owned();
    // A latent stands for `time_factor` frames, the first one for a single frame.
    let whole = 1 + frames.saturating_sub(1) / planned.time_factor.max(1) as usize;
    let channels = pipeline.audio.channels as usize;
    if let Some(missing) = latent.get_mut(whole * channels..) {
        missing.fill(0.0);
    }
    Ok(latent)
}

/// Strength of attention of every token of a reference; `None` if that is full everywhere, which sets nothing: references
/// then attend to each other, too.
fn strengths(attention: &Attention, planned: &ReferenceInput, pipeline: &Pipeline) -> Option<Vec<f32>> {
    let Some((mask, stage)) = attention.mask.as_ref().zip(pipeline.stages.first()) else {
        return (attention.strength != 1.0).then(|| vec![attention.strength]);
    };
    let [frames, rows, columns] = planned.grid().map(|n| n as usize);
    let (height, width) = (stage.height as usize, stage.width as usize);
    let count = mask.len() / (height * width).max(1);
    let mut out = Vec::with_capacity(frames * rows * columns);
    for f in 0..frames {
        let group = match f {
            0 => 0..1,
            _ => {
                let size = (count - 1) / (frames - 1);
                1 + (f - 1) * size..1 + f * size
            }
        };
        for row in 0..rows {
            for column in 0..columns {
                let (ys, xs) = (span(row, height, rows), span(column, width, columns));
                let mean_of_frame = |frame: usize| {
                    let line = |y: usize| &mask[(frame * height + y) * width..][xs.clone()];
                    let sum: f32 = ys.clone().flat_map(line).sum();
                    sum / (ys.len() * xs.len()) as f32
                };
                let sum: f32 = group.clone().map(mean_of_frame).sum();
                out.push(attention.strength * sum / group.len() as f32);
            }
        }
    }
    Some(out)
}

/// The pixels that cell `i` of `cells` is the mean of.
fn span(i: usize, pixels: usize, cells: usize) -> std::ops::Range<usize> {
    i * pixels / cells..((i + 1) * pixels).div_ceil(cells)
}

#[cfg(test)]
mod tests {
    use ltxc_ir::plan::Stage;
    use ltxc_ir::tiling::{TilePlan, Tiling};

    use super::*;

    #[test]
    fn a_mask_is_averaged_over_what_each_latent_stands_for() {
        let stage = Stage { height: 2, width: 4, ..Stage::default() };
        let tiles = TilePlan::decode([3, 1, 2], [2, 2, 2], &Tiling::WHOLE).unwrap();
        let planned = ReferenceInput { tiles, ..ReferenceInput::default() };
        let pipeline = Pipeline { stages: vec![stage], ..Pipeline::default() };
        // Five frames whose left half is 1, 0.5, 0, 1 and 1, and whose right half is 0.
        let frame = |v: f32| [v, v, 0.0, 0.0].repeat(2);
        let mask: Vec<f32> = [1.0, 0.5, 0.0, 1.0, 1.0].into_iter().flat_map(frame).collect();
        let attention = Attention { strength: 0.5, mask: Some(mask) };
        assert_eq!(strengths(&attention, &planned, &pipeline).unwrap(), [0.5, 0.0, 0.125, 0.0, 0.5, 0.0]);
        let even = |strength| strengths(&Attention { strength, mask: None }, &planned, &pipeline);
        assert_eq!((even(0.25), even(1.0)), (Some(vec![0.25]), None));
    }
}
