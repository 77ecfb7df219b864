//! One writer for every kind of output.
//!
//! Frames arrive in chunks while the decoder runs, sound at the end. Everything is written beside the final place and
//! gets its name in [`MediaWriter::finish`]; dropping the writer, or an error, removes what was written so far. The
//! file is created at once, so that a wrong path fails before the hours of work, not after.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::frames::to_rgb8;
use super::h264::{self, Encoder, EncoderOptions};
use super::mp4::{self, Movie, VideoSample, VideoTrack};
use super::partial::{PartialDir, PartialFile};
use super::{Audio, ColourSpace, Frames, I420, MediaError, VideoFormat, aac, exr_frames, png, wav};

/// Name of the sound beside PNG frames.
const FOLDER_AUDIO: &str = "audio.wav";

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// MP4 with H.264 and AAC.
    Mp4,
    /// A folder of PNG or EXR frames, with `audio.wav` if there is sound.
    Frames,
    /// 16-bit WAV, sound only.
    Wav,
}

impl Kind {
    /// The kind that a path asks for: `.mp4`, `.wav`, or no extension for a folder of frames.
    ///
    /// # Errors
    /// [`MediaError::UnknownOutput`] for any other extension.
    pub fn of_path(path: &Path) -> Result<Self, MediaError> {
        let unknown = || MediaError::UnknownOutput { path: path.to_path_buf() };
        if path.file_name().is_none() {
            return Err(unknown());
        }
        match path.extension().map(|extension| extension.to_ascii_lowercase()) {
            None => Ok(Self::Frames),
            Some(extension) if extension == "mp4" => Ok(Self::Mp4),
            Some(extension) if extension == "wav" => Ok(Self::Wav),
            Some(_) => Err(unknown()),
        }
    }
}

/// Called after every frame with the number of frames written.
pub type Progress = Box<dyn FnMut(u64) + Send>;

/// Choices of an output; the default fits.
pub struct OutputOptions {
    /// What to write; `None` chooses by the path.
    pub kind: Option<Kind>,
    /// Video quality on the scale of x264's `crf`; lower is better. The reference writes 19.
    pub crf: u8,
    /// Frames are signals for a high dynamic range, to be written as EXR files of this colour space.
    pub hdr: Option<ColourSpace>,
    /// Names and values that an MP4 file carries; see [`MediaWriter::tag`] for later ones.
    pub tags: Vec<(String, String)>,
    /// Called after every frame.
    pub progress: Option<Progress>,
}

impl Default for OutputOptions {
    fn default() -> Self {
        let encoder = format!("ltxc {}", env!("CARGO_PKG_VERSION"));
        Self { kind: None, crf: 19, hdr: None, tags: vec![("encoder".to_owned(), encoder)], progress: None }
    }
}

impl std::fmt::Debug for OutputOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutputOptions")
            .field("kind", &self.kind)
            .field("crf", &self.crf)
            .field("hdr", &self.hdr)
            .field("tags", &self.tags)
            .finish_non_exhaustive()
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The file or folder.
    pub path: PathBuf,
    /// Number of frames.
    pub frames: u64,
    /// Samples of sound in each channel.
    pub samples_per_channel: u64,
    /// Total size.
    pub bytes: u64,
}

/// An output under construction.
#[derive(Debug)]
pub struct MediaWriter {
    path: PathBuf,
    video: Option<VideoFormat>,
    options: OutputOptions,
    audio: Option<Audio>,
    frames: u64,
    /// `None` after an error; the partial output is gone then.
    sink: Option<Sink>,
}

#[derive(Debug)]
enum Sink {
    Mp4(Box<Mp4Sink>),
    Frames { dir: PartialDir, bytes: u64 },
    Wav(PartialFile),
}

#[derive(Debug)]
struct Mp4Sink {
    file: PartialFile,
    /// Present when there is video.
    stream: Option<(Encoder, I420)>,
    samples: Vec<VideoSample>,
}

impl MediaWriter {
    /// Starts an output at `path`, creating folders above it. `video` is the form of the frames, `None` for sound only.
    ///
    /// # Errors
    /// [`MediaError::UnknownOutput`] if the kind cannot be told, [`MediaError::WrongStream`] for video into a WAV file
    /// or frames without video, [`MediaError::Limit`] if the codec does not take the size or `crf`,
    /// [`MediaError::OutputExists`] if a folder is in use, [`MediaError::Io`] if nothing can be created there.
    pub fn create(path: &Path, video: Option<VideoFormat>, options: OutputOptions) -> Result<Self, MediaError> {
        let kind = match options.kind {
            Some(kind) => kind,
            None => Kind::of_path(path)?,
        };
        let wrong = |what, remedy| MediaError::WrongStream { path: path.to_path_buf(), what, remedy };
        let sink = match (kind, video) {
            (Kind::Wav, Some(_)) => {
                return Err(wrong("video", "choose `.mp4` or a folder of PNG frames"));
            }
            (Kind::Mp4, Some(_)) if options.hdr.is_some() => {
                return Err(wrong("frames with a high dynamic range", "choose a folder, for EXR frames"));
            }
            (Kind::Frames, None) => return Err(wrong("sound alone", "choose `.wav` or `.mp4`")),
            (Kind::Wav, None) => Sink::Wav(PartialFile::create(path)?),
            (Kind::Frames, Some(_)) => {
                let is_ours =
                    |name: &str| png::is_frame_name(name) || exr_frames::is_frame_name(name) || name == FOLDER_AUDIO;
                Sink::Frames { dir: PartialDir::create(path, is_ours)?, bytes: 0 }
            }
            (Kind::Mp4, video) => {
                // Sizes are checked first; nothing is created for a video that cannot be encoded.
                let stream = video.map(|format| video_stream(format, options.crf)).transpose()?;
                Sink::Mp4(Box::new(Mp4Sink { file: PartialFile::create(path)?, stream, samples: Vec::new() }))
            }
        };
        Ok(Self { path: path.to_path_buf(), video, options, audio: None, frames: 0, sink: Some(sink) })
    }

    /// Appends frames, `[f, h, w, 3]` f32 in `[0, 1]`; values outside are clipped.
    ///
    /// # Errors
    /// [`MediaError::Length`] if `rgb` holds no whole number of frames, [`MediaError::WrongStream`] without video, and
    /// codec or file errors. After an error the output is gone and every further call fails.
    pub fn write_frames(&mut self, rgb: &[f32]) -> Result<(), MediaError> {
        let result = self.append(rgb);
        if result.is_err() {
            self.sink = None;
        }
        result
    }

    fn append(&mut self, rgb: &[f32]) -> Result<(), MediaError> {
        let Some(format) = self.video else {
            return Err(self.wrong_stream("video", "it was opened for sound only"));
        };
        for frame in Frames::new(format, rgb)?.iter() {
            match self.sink.as_mut().ok_or_else(|| closed(&self.path))? {
                Sink::Mp4(sink) => sink.append(frame)?,
                Sink::Frames { dir, bytes } => {
                    *bytes += match self.options.hdr {
                        Some(space) => write_exr(dir, self.frames, format, frame, space)?,
                        None => write_png(dir, self.frames, format, frame)?,
                    }
                }
                Sink::Wav(_) => unreachable!("create refuses video here"),
            }
            self.frames += 1;
            if let Some(progress) = &mut self.options.progress {
                progress(self.frames);
            }
        }
        Ok(())
    }

    /// Adds a name and a value that an MP4 file carries.
    pub fn tag(&mut self, name: &str, value: String) {
        self.options.tags.push((name.into(), value));
    }

    /// Whether the format holds sound of this rate, in samples per second.
    pub fn takes_rate(&self, rate_hz: u32) -> bool {
        !matches!(self.sink, Some(Sink::Mp4(_))) || aac::RATES_HZ.contains(&rate_hz)
    }

    /// Sets the sound, which starts with the first frame. It may be shorter or longer than the video.
    ///
    /// # Errors
    /// [`MediaError::WrongStream`] if there was sound already.
    pub fn write_audio(&mut self, audio: Audio) -> Result<(), MediaError> {
        if self.audio.is_some() {
            return Err(self.wrong_stream("a second sound", "join the waveforms first"));
        }
        self.audio = Some(audio);
        Ok(())
    }

    /// Completes the output and gives it its name, replacing a file that is there.
    ///
    /// # Errors
    /// [`MediaError::Empty`] without a frame, or without sound where there is no video; [`MediaError::Limit`] for a
    /// sampling rate that AAC lacks; [`MediaError::DiskFull`] and other file errors. After an error nothing is left.
    pub fn finish(mut self) -> Result<Written, MediaError> {
        let sink = self.sink.take().ok_or_else(|| closed(&self.path))?;
        let empty = |expected| MediaError::Empty { path: self.path.clone(), expected };
        if self.video.is_some() && self.frames == 0 {
            return Err(empty("frames"));
        }
        if self.video.is_none() && self.audio.is_none() {
            return Err(empty("sound"));
        }
        let audio = self.audio.as_ref();
        let bytes = match sink {
            Sink::Mp4(sink) => sink.finish(self.video, audio, std::mem::take(&mut self.options.tags))?,
            Sink::Frames { dir, bytes } => finish_folder(dir, audio)? + bytes,
            Sink::Wav(mut file) => {
                if let Some(audio) = audio {
                    wav::write(audio, &mut file).map_err(|error| file.error(error))?;
                }
                file.commit()?;
                std::fs::metadata(&self.path).map_err(|error| MediaError::io("read", &self.path, error))?.len()
            }
        };
        let samples_per_channel = audio.map_or(0, |audio| audio.len() as u64);
        Ok(Written { path: self.path, frames: self.frames, samples_per_channel, bytes })
    }

    fn wrong_stream(&self, what: &'static str, remedy: &'static str) -> MediaError {
        MediaError::WrongStream { path: self.path.clone(), what, remedy }
    }
}

fn closed(path: &Path) -> MediaError {
    MediaError::WrongStream {
        path: path.to_path_buf(),
        what: "more frames",
        remedy: "an earlier error ended this output; create a new one",
    }
}

fn video_stream(format: VideoFormat, crf: u8) -> Result<(Encoder, I420), MediaError> {
    if crf > 51 {
        return Err(MediaError::limit("video crf", crf, "it must be 0 to 51"));
    }
    let picture = I420::new(format.width(), format.height())?;
    h264::check_size(format.width(), format.height())?;
    let options = EncoderOptions { qp: h264::video_qp(crf), fps: format.fps(), is_bt709: true };
    Ok((Encoder::new(options)?, picture))
}

impl Mp4Sink {
    fn append(&mut self, frame: &[f32]) -> Result<(), MediaError> {
        let (encoder, picture) = self.stream.as_mut().expect("present with video, which the caller checked");
        picture.fill_bt709(frame)?;
        self.samples.push(encoder.encode(picture)?);
        Ok(())
    }

    fn finish(
        self,
        video: Option<VideoFormat>,
        audio: Option<&Audio>,
        tags: Vec<(String, String)>,
    ) -> Result<u64, MediaError> {
        let Self { mut file, stream, samples } = self;
        let side = |what, side: usize| {
            u16::try_from(side).map_err(|_| MediaError::limit(what, side, "an mp4 file holds up to 65535"))
        };
        let video = match (video, stream) {
            (Some(format), Some((encoder, _))) => {
                let (sps, pps) = encoder.parameter_sets();
                Some(VideoTrack {
                    width: side("frame width", format.width())?,
                    height: side("frame height", format.height())?,
                    fps: format.fps(),
                    sps: sps.to_vec(),
                    pps: pps.to_vec(),
                    samples,
                })
            }
            _ => None,
        };
        let movie = Movie { video, audio: audio.map(aac::encode).transpose()?, tags };
        let path = file.path().to_path_buf();
        let len = mp4::mux(&movie, &mut file, |error| MediaError::io("write", &path, error))?;
        file.commit()?;
        Ok(len)
    }
}

/// Writes one frame and returns its size.
fn write_png(dir: &PartialDir, index: u64, format: VideoFormat, frame: &[f32]) -> Result<u64, MediaError> {
    let mut bytes = Vec::new();
    let path = dir.part().join(png::frame_name(index));
    let failed = |error| MediaError::io("write", &path, error);
    png::write(format.width(), format.height(), &to_rgb8(frame), &mut bytes).map_err(failed)?;
    std::fs::write(&path, &bytes).map_err(failed)?;
    Ok(bytes.len() as u64)
}

/// Writes one frame, a signal, in `space`, and returns its size.
fn write_exr(
    dir: &PartialDir,
    index: u64,
    format: VideoFormat,
    frame: &[f32],
    space: ColourSpace,
) -> Result<u64, MediaError> {
    let rgb: Vec<f32> = frame.as_chunks::<3>().0.iter().flat_map(|&signal| space.from_signal(signal)).collect();
    let path = dir.part().join(exr_frames::frame_name(index));
    let failed = |error| MediaError::io("write", &path, error);
    let mut bytes = std::io::Cursor::new(Vec::new());
    exr_frames::write((format.width(), format.height()), &rgb, space, &mut bytes).map_err(failed)?;
    let bytes = bytes.into_inner();
    std::fs::write(&path, &bytes).map_err(failed)?;
    Ok(bytes.len() as u64)
}

/// Adds the sound to a folder of frames and returns its size.
fn finish_folder(dir: PartialDir, audio: Option<&Audio>) -> Result<u64, MediaError> {
    let mut bytes = 0;
    if let Some(audio) = audio {
        let path = dir.part().join(FOLDER_AUDIO);
        let failed = |error| MediaError::io("write", &path, error);
        let mut file = BufWriter::new(File::create(&path).map_err(failed)?);
        wav::write(audio, &mut file).and_then(|()| file.flush()).map_err(failed)?;
        bytes = std::fs::metadata(&path).map_err(failed)?.len();
    }
    tracing::debug!(folder = %dir.path().display(), "wrote frames");
    dir.commit()?;
    Ok(bytes)
}
