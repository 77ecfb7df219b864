//! Where frames and sound of a run go: a file or a folder, and a preview and a master beside a folder of EXR frames; on their
//! way, frames may get another rate.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::{Modality, Plan};
use ltxc_runtime::RunError;
use ltxc_runtime::audio_frontend::resample;
use ltxc_runtime::media::hlg::HlgMaster;
use ltxc_runtime::media::interpolate::Interpolator;
use ltxc_runtime::media::{Audio, ColourSpace, Kind, MediaWriter, OutputOptions, Rational, VideoFormat, Written};
use ltxc_runtime::pipeline::Output;

use crate::args::OutputArgs;

/// Sampling rate that every format has.
const COMMON_RATE_HZ: usize = 48_000;

/// Writes frames and sound to a file or folder.
pub struct FileOutput {
    writer: MediaWriter,
    preview: Option<Preview>,
    master: Option<HlgMaster>,
    interpolator: Option<Interpolator>,
    has_video: bool,
    /// Width and height of the frames that come.
    made: (usize, usize),
    /// Width and height of what is written of them, from the top left.
    shown: (usize, usize),
}

/// An MP4 file of what a screen without a high dynamic range shows of signals.
struct Preview {
    writer: MediaWriter,
    space: ColourSpace,
    /// Width and height, which are even.
    size: (usize, usize),
}

/// What was written.
pub struct Finished {
    /// The file or folder.
    pub written: Written,
    /// What stands beside it, by name.
    pub beside: Vec<(&'static str, PathBuf)>,
}

impl Finished {
    /// Removes everything.
    pub fn remove(&self) {
        remove_files(&self.beside);
        let path = &self.written.path;
        let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    }
}

impl FileOutput {
    /// `size` is the width and height of what is written, if that is not all.
    ///
    /// # Errors
    /// An output that does not hold what the plan makes, or cannot be created.
    pub fn create(
        path: &Path,
        plan: &Plan,
        size: Option<(usize, usize)>,
        hdr: Option<ColourSpace>,
        writing: &OutputArgs,
    ) -> Result<FileOutput> {
        let video = &plan.pipeline.video;
        let made = plan.pipeline.modalities();
        let is_sound = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("wav"));
        if is_sound && !made.contains(&Modality::Audio) {
            bail!("`{}` is for sound, and the plan makes none; choose `.mp4` or a folder", path.display());
        }
        let has_video = made.contains(&Modality::Video) && !is_sound;
        let (num, den) = video.frame_rate;
        let rate = match writing.integer_fps {
            true if num < den => {
                bail!("`--integer-fps`: {num}/{den} frames per second are less than one; leave it out")
            }
            true => Rational::new(num / den, 1)?,
            false => Rational::new(num, den)?,
        };
        // EXR frames have an MP4 file beside them.
        let is_encoded = has_video
            && match hdr {
                Some(_) => !writing.skip_mp4,
                None => Kind::of_path(path)? == Kind::Mp4,
            };
        let instead = match hdr {
            Some(_) => "leave it or `--skip-mp4` out",
            None => "leave it out, or name an output that ends with `.mp4`",
        };
        if let (Some(crf), false) = (writing.crf, is_encoded) {
            bail!(
                "`--crf {crf}` is the quality of an MP4 video, of which none is written with `{}`; {instead}",
                path.display()
            );
        }
        if writing.integer_fps && !is_encoded && !writing.hlg_master {
            bail!(
                "`--integer-fps` is about the rate at which a video plays, and nothing that is written with `{}` has one; \
                 {instead}",
                path.display()
            );
        }
        let interpolated = writing.fps_out.filter(|_| has_video && hdr.is_none());
        if let (Some(to), true) = (writing.fps_out, interpolated.is_none()) {
            bail!(
                "`--fps-out {to}` blends frames of a video with an ordinary range, of which none is written; leave it out"
            );
        }
        if writing.skip_mp4 && hdr.is_none() {
            bail!("`--skip-mp4` leaves out what stands beside EXR frames, of which none are written; leave it out");
        }
        let interpolator = interpolated.map(|to| Interpolator::new(rate, to));
        let written_rate = interpolated.unwrap_or(rate);
        let whole = (video.width as usize, video.height as usize);
        let shown = size.unwrap_or(whole);
        let format = || VideoFormat::new(shown.0, shown.1, written_rate);
        let mut options = OutputOptions { hdr, ..OutputOptions::default() };
        options.crf = writing.crf.unwrap_or(options.crf);
        let crf = options.crf;
        let writer = MediaWriter::create(path, has_video.then(format).transpose()?, options)?;
        let preview = match hdr {
            Some(space) if has_video && !writing.skip_mp4 => Some(Preview::create(path, shown, rate, space, crf)?),
            _ => None,
        };
        let master = match (writing.hlg_master, hdr) {
            (false, _) => None,
            (true, Some(space)) if has_video => Some(master(path, shown, rate, space)?),
            _ => bail!(
                "`--hlg-master` stands beside EXR frames, of which none are written; leave it out, or give `--hdr`"
            ),
        };
        let mut output = FileOutput { writer, preview, master, interpolator, has_video, made: whole, shown };
        output.tag("frame_rate", interpolated.map(|to| format!("{rate} blended to {to}")));
        Ok(output)
    }

    /// Width and height of what is written.
    pub fn shown(&self) -> (usize, usize) {
        self.shown
    }

    /// Says something in the output about how it was made, if there is anything to say.
    pub fn tag(&mut self, name: &str, value: Option<String>) {
        let Some(value) = value else { return };
        if let Some(preview) = &mut self.preview {
            preview.writer.tag(name, value.clone());
        }
        self.writer.tag(name, value);
    }

    /// Completes everything, the output itself last: where that is, all of it is. After an error nothing is left.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn finish(self) -> Result<Finished> {
        let mut beside = Vec::new();
        match self.finish_in_order(&mut beside) {
            Ok(written) => Ok(Finished { written, beside }),
            Err(error) => {
                remove_files(&beside);
                Err(error)
            }
        }
    }

    fn finish_in_order(mut self, beside: &mut Vec<(&'static str, PathBuf)>) -> Result<Written> {
        if let Some(interpolator) = self.interpolator.take() {
            interpolator.finish(&mut |frame| self.writer.write_frames(frame))?;
        }
        if let Some(preview) = self.preview {
            beside.push(("preview", preview.writer.finish()?.path));
        }
        if let Some(master) = self.master {
            beside.push(("hlg_master", master.finish()?));
        }
        Ok(self.writer.finish()?)
    }
}

fn remove_files(beside: &[(&'static str, PathBuf)]) {
    beside.iter().for_each(|(_, path)| drop(std::fs::remove_file(path)));
}

impl Preview {
    /// The preview of a folder of frames of this size.
    fn create(
        folder: &Path,
        (width, height): (usize, usize),
        rate: Rational,
        space: ColourSpace,
        crf: u8,
    ) -> Result<Preview> {
        let path = folder.with_extension("mp4");
        let remedy = "leave the preview out with `--skip-mp4`";
        if path.exists() {
            bail!(
                "`{}` is there, where the preview of `{}` goes; choose another folder, or {remedy}",
                path.display(),
                folder.display()
            );
        }
        let size = even((width, height));
        let create = || {
            MediaWriter::create(
                &path,
                Some(VideoFormat::new(size.0, size.1, rate)?),
                OutputOptions { crf, ..OutputOptions::default() },
            )
        };
        let writer = create().with_context(|| format!("preview `{}`; {remedy}", path.display()))?;
        Ok(Preview { writer, space, size })
    }
}

/// The largest size inside for a format that halves the resolution of colours.
fn even((width, height): (usize, usize)) -> (usize, usize) {
    (width / 2 * 2, height / 2 * 2)
}

/// The master of a folder of frames of this size.
fn master(folder: &Path, size: (usize, usize), rate: Rational, space: ColourSpace) -> Result<HlgMaster> {
    let path = folder.with_extension("hlg.mp4");
    if path.exists() {
        bail!(
            "`{}` is there, where the HLG master of `{}` goes; choose another folder, or leave out `--hlg-master`",
            path.display(),
            folder.display()
        );
    }
    Ok(HlgMaster::create(&path, even(size), rate, space)?)
}

/// The part of a frame `[h, w, 3]` of size `from` that has the size `to`, from the top left.
fn cropped(frame: &[f32], from: (usize, usize), to: (usize, usize)) -> Vec<f32> {
    frame.chunks_exact(from.0 * 3).take(to.1).flat_map(|row| &row[..to.0 * 3]).copied().collect()
}

impl Output for FileOutput {
    fn frames(&mut self, rgb: &[f32]) -> Result<(), RunError> {
        if !self.has_video {
            return Ok(());
        }
        let is_alone = self.preview.is_none() && self.master.is_none() && self.interpolator.is_none();
        if self.made == self.shown && is_alone {
            return Ok(self.writer.write_frames(rgb)?);
        }
        for frame in rgb.chunks_exact(self.made.0 * self.made.1 * 3) {
            let frame = cropped(frame, self.made, self.shown);
            match &mut self.interpolator {
                Some(interpolator) => interpolator.push(&frame, &mut |frame| self.writer.write_frames(frame))?,
                None => self.writer.write_frames(&frame)?,
            }
            if let Some(Preview { writer, space, size }) = &mut self.preview {
                let mut shown = cropped(&frame, self.shown, *size);
                shown.as_chunks_mut::<3>().0.iter_mut().for_each(|rgb| *rgb = space.displayed(*rgb));
                writer.write_frames(&shown)?;
            }
            if let Some(master) = &mut self.master {
                master.write_frame(&cropped(&frame, self.shown, even(self.shown)))?;
            }
        }
        Ok(())
    }

    fn sound(&mut self, samples: &[f32], rate_hz: u32) -> Result<(), RunError> {
        let channels = [0, 1].map(|c| samples.iter().skip(c).step_by(2).copied().collect::<Vec<f32>>());
        if let Some(preview) = &mut self.preview {
            write_sound(&mut preview.writer, &channels, rate_hz)?;
        }
        if let Some(master) = &mut self.master {
            master.write_sound(Audio::new(rate_hz, channels.concat())?);
        }
        write_sound(&mut self.writer, &channels, rate_hz)
    }
}

/// Writes the sound of both channels at its rate, or at another one that the format has.
fn write_sound(writer: &mut MediaWriter, channels: &[Vec<f32>; 2], rate_hz: u32) -> Result<(), RunError> {
    let audio = match writer.takes_rate(rate_hz) {
        true => Audio::new(rate_hz, channels.concat())?,
        false => {
            let [left, right] = channels.each_ref().map(|x| resample(x, rate_hz as usize, COMMON_RATE_HZ));
            Audio::new(COMMON_RATE_HZ as u32, [left?, right?].concat())?
        }
    };
    Ok(writer.write_audio(audio)?)
}
