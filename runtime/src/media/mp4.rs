//! MP4 files of one H.264 and one AAC track.
//!
//! `moov` comes first, so that a file can play while it downloads; hence [`mux`] takes complete sample lists. The file
//! is `ftyp`, `moov`, `mdat`, with chunks of half a second, video and audio in turn.
//!
//! Sound starts with picture to the sample: an AAC encoder emits [`AudioTrack::priming`] samples before the first real
//! one, and the audio track's edit list (`edts/elst`) starts after them and lasts exactly
//! [`AudioTrack::samples_per_channel`].
//! The last frame is cut in `stts` as well. Chromium stops there; ffmpeg (5.1 and 8) follows the start but decodes the
//! last frame to its end, up to 1023 samples more, as it does with its own files.
//! Video has no reordering, thus no edit list and no `ctts`.
//!
//! Frame rates are exact: a video tick is `1/(k·num)` s and a frame lasts `k·den` ticks.
//!
//! [`plan`] does all arithmetic, checked, from sizes alone; [`mux`] only adds the bytes. [`read`] parses what [`mux`]
//! writes, strictly, and nothing else; [`demux`] finds the pictures in files of any origin.

mod boxes;
mod cursor;
mod demux;
mod read;
#[cfg(test)]
mod tests;

use std::io::Write;

use super::{MediaError, Rational};
use boxes::BoxWriter;

pub use demux::{H264Track, Sample, SoundEdit, Source, demux};
pub use read::read;

/// Samples of one AAC frame.
pub const AAC_FRAME: u32 = 1024;

/// One coded picture in AVCC form: NAL units, each after its length in 4 bytes, big endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VideoSample {
    /// The bytes.
    pub data: Vec<u8>,
    /// Whether decoding can start here.
    pub is_sync: bool,
}

/// An H.264 track without picture reordering.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VideoTrack {
    /// Pixels per row.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// Frames per second.
    pub fps: Rational,
    /// Sequence parameter set, a NAL unit without start code.
    pub sps: Vec<u8>,
    /// Picture parameter set, a NAL unit without start code.
    pub pps: Vec<u8>,
    /// The pictures, in order.
    pub samples: Vec<VideoSample>,
}

/// An AAC-LC track.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AudioTrack {
    /// Samples per second.
    pub rate_hz: u32,
    /// Channels.
    pub channels: u16,
    /// `AudioSpecificConfig`.
    pub config: Vec<u8>,
    /// Decoded samples before the first audible one.
    pub priming: u32,
    /// Audible samples of each channel.
    pub samples_per_channel: u64,
    /// Raw AAC frames of 1024 samples.
    pub frames: Vec<Vec<u8>>,
}

/// All that goes into a file. At least one track is present.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Movie {
    /// Pictures.
    pub video: Option<VideoTrack>,
    /// Sound.
    pub audio: Option<AudioTrack>,
    /// Names and values shown by players and `ffprobe`. `encoder`, `comment` and `title` become the tags that all
    /// players know, other names become free-form tags.
    pub tags: Vec<(String, String)>,
}

/// Sizes of the samples of both tracks, in bytes.
#[derive(Debug, Clone, Default)]
pub struct SampleSizes {
    /// Size of every picture.
    pub video: Vec<u64>,
    /// Size of every audio frame.
    pub audio: Vec<u64>,
}

/// Everything of the file that precedes the sample data.
#[derive(Debug, Clone)]
pub struct Header {
    /// `ftyp`, `moov` and the header of `mdat`.
    pub bytes: Vec<u8>,
    /// Sample data in file order.
    pub order: Vec<Chunk>,
    /// Length of the whole file.
    pub file_len: u64,
}

/// A run of samples of one track that lie next to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Whether the samples are pictures.
    pub is_video: bool,
    /// First sample.
    pub first: usize,
    /// Number of samples, at least 1.
    pub len: usize,
}

/// Writes `movie` to `dst` and returns the number of bytes.
///
/// # Errors
/// See [`plan`]; [`MediaError::Io`] or [`MediaError::DiskFull`] by way of `on_io`, which knows the file.
pub fn mux(
    movie: &Movie,
    dst: &mut impl Write,
    on_io: impl Fn(std::io::Error) -> MediaError,
) -> Result<u64, MediaError> {
    let sizes = SampleSizes {
        video: movie.video.iter().flat_map(|t| &t.samples).map(|s| s.data.len() as u64).collect(),
        audio: movie.audio.iter().flat_map(|t| &t.frames).map(|f| f.len() as u64).collect(),
    };
    let header = plan(movie, &sizes)?;
    let mut write = |bytes: &[u8]| dst.write_all(bytes).map_err(&on_io);
    write(&header.bytes)?;
    for chunk in &header.order {
        let range = chunk.first..chunk.first + chunk.len;
        match (&movie.video, &movie.audio) {
            (Some(video), _) if chunk.is_video => {
                video.samples[range].iter().try_for_each(|sample| write(&sample.data))?;
            }
            (_, Some(audio)) => audio.frames[range].iter().try_for_each(|frame| write(frame))?,
            _ => unreachable!("a chunk belongs to a track that is present"),
        }
    }
    Ok(header.file_len)
}

/// Lays out the file for samples of the given `sizes`; the samples in `movie` are looked at only for
/// [`VideoSample::is_sync`], where absent a picture counts as one where decoding can start.
///
/// # Errors
/// [`MediaError::Limit`] if there is no track or no sample, or a size, duration, rate or count exceeds its field.
pub fn plan(movie: &Movie, sizes: &SampleSizes) -> Result<Header, MediaError> {
    if movie.video.is_none() && movie.audio.is_none() {
        return Err(MediaError::limit("number of tracks", 0, "an mp4 file needs at least one"));
    }
    let video = movie.video.as_ref().map(|track| VideoTiming::new(track, &sizes.video)).transpose()?;
    let audio = movie.audio.as_ref().map(|track| AudioTiming::new(track, &sizes.audio)).transpose()?;
    let order = interleave(video.as_ref(), audio.as_ref());
    let data_len = sum(&sizes.video)?.checked_add(sum(&sizes.audio)?).ok_or_else(too_large)?;

    let ftyp = boxes::ftyp();
    let layout = Layout { movie, sizes, video, audio, order: &order };
    // The length of `moov` depends on the width of the offsets, not on their values.
    for is_wide in [false, true] {
        if !is_wide && data_len > u64::from(u32::MAX) {
            continue;
        }
        let mdat_header = if is_wide { 16 } else { 8 };
        let moov_len = layout.moov(0, is_wide)?.len();
        let data_at = (ftyp.len() + moov_len + mdat_header) as u64;
        let file_len = data_at.checked_add(data_len).ok_or_else(too_large)?;
        if !is_wide && file_len > u64::from(u32::MAX) {
            continue;
        }
        let mut bytes = ftyp;
        bytes.extend(layout.moov(data_at, is_wide)?);
        boxes::mdat_header(&mut bytes, data_len, is_wide)?;
        return Ok(Header { bytes, order, file_len });
    }
    unreachable!("wide offsets hold every file length")
}

fn too_large() -> MediaError {
    MediaError::limit("file length", "over 2^64 bytes", "write a shorter video")
}

fn sum(sizes: &[u64]) -> Result<u64, MediaError> {
    sizes.iter().try_fold(0_u64, |sum, size| sum.checked_add(*size)).ok_or_else(too_large)
}

/// Narrows a number to a field of the file.
fn fit<T: TryFrom<u64>>(what: &'static str, value: u64) -> Result<T, MediaError> {
    T::try_from(value).map_err(|_| MediaError::limit(what, value, "an mp4 field cannot hold it; write a shorter video"))
}

/// Ticks of the video track.
#[derive(Debug, Clone, Copy)]
struct VideoTiming {
    len: u32,
    ticks_per_second: u32,
    ticks_per_frame: u32,
    duration: u32,
}

impl VideoTiming {
    fn new(track: &VideoTrack, sizes: &[u64]) -> Result<Self, MediaError> {
        let len: u32 = fit("number of frames", sizes.len() as u64)?;
        if len == 0 {
            return Err(MediaError::limit("number of frames", 0, "a video track needs at least one"));
        }
        if track.width == 0 || track.height == 0 {
            return Err(MediaError::limit("frame size", 0, "a video track needs pixels"));
        }
        if track.sps.len() < 4 || track.pps.is_empty() {
            return Err(MediaError::codec("h264", "the stream has no parameter sets"));
        }
        // Some players round times to a clock of 1000 ticks or mistrust coarse ones, hence fine ticks.
        let mut fine = 1;
        while fine * u64::from(track.fps.num()) < 10_000 {
            fine *= 2;
        }
        let ticks_per_second = fit("frame rate", fine * u64::from(track.fps.num()))?;
        let ticks_per_frame: u32 = fit("frame duration", fine * u64::from(track.fps.den()))?;
        let duration = fit("video duration", u64::from(len) * u64::from(ticks_per_frame))?;
        Ok(Self { len, ticks_per_second, ticks_per_frame, duration })
    }
}

/// Ticks of the audio track; a tick is a sample.
#[derive(Debug, Clone, Copy)]
struct AudioTiming {
    len: u32,
    rate_hz: u16,
    priming: u32,
    audible: u32,
    /// Ticks of the last frame, which may be cut.
    last: u32,
    duration: u32,
}

impl AudioTiming {
    fn new(track: &AudioTrack, sizes: &[u64]) -> Result<Self, MediaError> {
        let len: u32 = fit("number of audio frames", sizes.len() as u64)?;
        let rate_hz: u16 = fit("audio rate", track.rate_hz.into())?;
        if rate_hz == 0 || track.channels == 0 {
            return Err(MediaError::limit("audio rate or channels", 0, "an audio track needs both"));
        }
        let audible: u32 = fit("audio duration", track.samples_per_channel)?;
        let needed: u32 = fit("audio duration", u64::from(audible) + u64::from(track.priming))?;
        let before_last = u64::from(len.saturating_sub(1)) * u64::from(AAC_FRAME);
        let coded = u64::from(len) * u64::from(AAC_FRAME);
        if audible == 0 || u64::from(needed) > coded {
            return Err(MediaError::limit(
                "number of audible samples",
                audible,
                "it must be positive and covered by the coded frames",
            ));
        }
        // Frames past the end of the sound, if any, keep their length and lie outside of the edit list.
        let duration = fit("audio duration", u64::from(needed).max(before_last + 1))?;
        let last = u64::from(duration) - before_last;
        Ok(Self { len, rate_hz, priming: track.priming, audible, last: fit("audio frame", last)?, duration })
    }
}

/// Groups samples into chunks of half a second, in order of time, video first.
fn interleave(video: Option<&VideoTiming>, audio: Option<&AudioTiming>) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut add = |is_video, len: u32, step: u32, per_second: u32| {
        let slot = |i: usize| i as u64 * u64::from(step) * 2 / u64::from(per_second);
        let mut first = 0;
        for i in 1..=len as usize {
            if i == len as usize || slot(i) != slot(first) {
                chunks.push((slot(first), Chunk { is_video, first, len: i - first }));
                first = i;
            }
        }
    };
    if let Some(t) = video {
        add(true, t.len, t.ticks_per_frame, t.ticks_per_second);
    }
    if let Some(t) = audio {
        add(false, t.len, AAC_FRAME, t.rate_hz.into());
    }
    // Stable: video stays before audio within a slot, and samples of a track in order.
    chunks.sort_by_key(|(slot, _)| *slot);
    chunks.into_iter().map(|(_, chunk)| chunk).collect()
}

/// Input of the box writers.
struct Layout<'a> {
    movie: &'a Movie,
    sizes: &'a SampleSizes,
    video: Option<VideoTiming>,
    audio: Option<AudioTiming>,
    order: &'a [Chunk],
}

impl Layout<'_> {
    /// `moov` for sample data that starts at byte `data_at`.
    fn moov(&self, data_at: u64, is_wide: bool) -> Result<Vec<u8>, MediaError> {
        // A movie tick is an audio sample, so that the edit list is exact.
        let ticks = match (self.audio, self.video) {
            (Some(audio), _) => u32::from(audio.rate_hz),
            (None, Some(video)) => video.ticks_per_second,
            (None, None) => unreachable!("one track is present"),
        };
        let video_len: u32 = match &self.video {
            Some(t) => fit(
                "video duration",
                (u64::from(t.duration) * u64::from(ticks)).div_ceil(u64::from(t.ticks_per_second)),
            )?,
            None => 0,
        };
        let audio_len = self.audio.map_or(0, |t| t.audible);

        let mut moov = BoxWriter::open(b"moov");
        let tracks = u32::from(self.video.is_some()) + u32::from(self.audio.is_some());
        moov.child(boxes::mvhd(ticks, video_len.max(audio_len), tracks + 1))?;
        let mut id = 0;
        if let (Some(track), Some(timing)) = (&self.movie.video, &self.video) {
            id += 1;
            let mut trak = BoxWriter::open(b"trak");
            trak.child(boxes::tkhd(id, video_len, Some((track.width, track.height))))?;
            let mut mdia = BoxWriter::open(b"mdia");
            mdia.child(boxes::mdhd(timing.ticks_per_second, timing.duration))?;
            mdia.child(boxes::hdlr(b"vide", b"VideoHandler\0"))?;
            let mut stbl = BoxWriter::open(b"stbl");
            stbl.child(boxes::avc1(track)?)?;
            stbl.child(boxes::stts(&[(timing.len, timing.ticks_per_frame)]))?;
            self.stss(&mut stbl, track, timing.len)?;
            self.sample_table(&mut stbl, true, data_at, is_wide)?;
            mdia.child(boxes::minf(boxes::vmhd(), stbl)?)?;
            trak.child(mdia)?;
            moov.child(trak)?;
        }
        if let (Some(track), Some(timing)) = (&self.movie.audio, &self.audio) {
            id += 1;
            let mut trak = BoxWriter::open(b"trak");
            trak.child(boxes::tkhd(id, audio_len, None))?;
            trak.child(boxes::edts(timing.audible, timing.priming)?)?;
            let mut mdia = BoxWriter::open(b"mdia");
            mdia.child(boxes::mdhd(timing.rate_hz.into(), timing.duration))?;
            mdia.child(boxes::hdlr(b"soun", b"SoundHandler\0"))?;
            let mut stbl = BoxWriter::open(b"stbl");
            stbl.child(boxes::mp4a(track, timing.rate_hz, sum(&self.sizes.audio)?, timing.duration)?)?;
            let full = [(timing.len - 1, AAC_FRAME), (1, timing.last)];
            stbl.child(boxes::stts(if timing.len == 1 { &full[1..] } else { &full }))?;
            self.sample_table(&mut stbl, false, data_at, is_wide)?;
            stbl.child(boxes::sgpd_roll())?;
            stbl.child(boxes::sbgp_roll(timing.len))?;
            mdia.child(boxes::minf(boxes::smhd(), stbl)?)?;
            trak.child(mdia)?;
            moov.child(trak)?;
        }
        if !self.movie.tags.is_empty() {
            moov.child(boxes::udta(&self.movie.tags)?)?;
        }
        moov.close()
    }

    /// `stss`, left out when decoding can start at every picture.
    fn stss(&self, stbl: &mut BoxWriter, track: &VideoTrack, len: u32) -> Result<(), MediaError> {
        let is_sync = |i: u32| track.samples.get(i as usize).is_none_or(|sample| sample.is_sync);
        let numbers: Vec<u32> = (0..len).filter(|i| is_sync(*i)).map(|i| i + 1).collect();
        if numbers.len() == len as usize {
            return Ok(());
        }
        stbl.child(boxes::numbers(b"stss", &numbers)?)
    }

    /// `stsc`, `stsz` and `stco` or `co64` of one track.
    fn sample_table(
        &self,
        stbl: &mut BoxWriter,
        is_video: bool,
        data_at: u64,
        is_wide: bool,
    ) -> Result<(), MediaError> {
        let mut offsets = Vec::new();
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let mut at = data_at;
        for chunk in self.order {
            let sizes = if chunk.is_video { &self.sizes.video } else { &self.sizes.audio };
            if chunk.is_video == is_video {
                offsets.push(at);
                // `chunk.len` is at most the sample count, which fits.
                let len = chunk.len as u32;
                if runs.last().is_none_or(|run| run.1 != len) {
                    runs.push((offsets.len() as u32, len));
                }
            }
            at = at.checked_add(sum(&sizes[chunk.first..chunk.first + chunk.len])?).ok_or_else(too_large)?;
        }
        stbl.child(boxes::stsc(&runs)?)?;
        stbl.child(boxes::stsz(if is_video { &self.sizes.video } else { &self.sizes.audio })?)?;
        stbl.child(boxes::chunk_offsets(&offsets, is_wide)?)
    }
}
