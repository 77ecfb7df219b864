//! Recordings as input: WAV, FLAC, MP3, AAC, Ogg Vorbis, and the sound of MP4, MOV and MKV files; through `ffmpeg`
//! everything else.
//!
//! # Easy to get wrong
//! - An AAC encoder puts samples in front of the first real one; the edit list of the file says how many. A decoder that
//!   does not know it is late by 21 to 48 ms.
//! - 8-bit samples are centred at 128, which the reference forgets.
//! - A window is cut to the sample: `round(start · rate)`, `round(duration · rate)`.

use std::fs::File;
use std::path::Path;

use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::errors::Error as SoundError;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

use super::MediaError;
use super::ffmpeg::Ffmpeg;
use super::mp4::{self, SoundEdit};
use crate::files::map_file;

/// Longest window, in seconds: a day.
const MOST_SECONDS: f64 = 86_400.0;

/// A waveform with any number of channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Recording {
    /// Samples per second.
    pub rate_hz: u32,
    /// One waveform per channel, in `[-1, 1]`, all of one length.
    pub channels: Vec<Vec<f32>>,
}

impl Recording {
    /// Samples of each channel.
    pub fn len(&self) -> usize {
        self.channels.first().map_or(0, Vec::len)
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Without the samples outside of a window.
    fn cut(&mut self, first: usize, count: usize) {
        for channel in &mut self.channels {
            channel.drain(..first.min(channel.len()));
            channel.truncate(count);
        }
    }
}

/// Reads the sound of a file from `start_seconds` on for at most `seconds`.
///
/// The result is shorter where the recording ends earlier.
///
/// # Errors
/// [`MediaError::NoSound`] if the file has no sound track or is a folder of images, [`MediaError::Input`] if it is damaged
/// or ends before the start, [`MediaError::NeedsFfmpeg`] if only the absent ffmpeg could read it, [`MediaError::Limit`] for
/// an impossible window.
pub fn load_audio(path: &Path, start_seconds: f64, seconds: f64) -> Result<Recording, MediaError> {
    window(1, start_seconds, seconds)?;
    if path.is_dir() {
        return Err(MediaError::NoSound { path: path.to_path_buf() });
    }
    let recording = match decode_embedded(path, start_seconds, seconds)? {
        Ok(recording) => recording,
        Err(reason) => {
            let Some(ffmpeg) = Ffmpeg::find() else {
                return Err(MediaError::NeedsFfmpeg { path: path.to_path_buf(), reason });
            };
            let recording = ffmpeg.read_audio(path, start_seconds, seconds)?;
            recording.ok_or_else(|| MediaError::NoSound { path: path.to_path_buf() })?
        }
    };
    if recording.is_empty() {
        return Err(MediaError::input(path, format!("its sound ends before {start_seconds} s; give an earlier start")));
    }
    Ok(recording)
}

/// First sample and number of samples of a window.
pub(super) fn window(rate_hz: u32, start_seconds: f64, seconds: f64) -> Result<(usize, usize), MediaError> {
    for (what, value) in [("start time", start_seconds), ("duration of sound", seconds)] {
        if !(0.0..=MOST_SECONDS).contains(&value) {
            return Err(MediaError::limit(what, value, "it must be 0 to 86400 seconds"));
        }
    }
    let samples = |seconds: f64| (seconds * f64::from(rate_hz)).round_ties_even() as usize;
    Ok((samples(start_seconds), samples(seconds)))
}

/// Like [`load_audio`] with the embedded decoders alone; `Err` within says what they lack. The result may be empty.
///
/// # Errors
/// Those of [`load_audio`].
pub fn decode_embedded(path: &Path, start_seconds: f64, seconds: f64) -> Result<Result<Recording, String>, MediaError> {
    let edits = edits(path)?;
    let file = File::open(path).map_err(|error| MediaError::io("read", path, error))?;
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let mut hint = Hint::new();
    if let Some(extension) = path.extension().and_then(|e| e.to_str()) {
        hint.with_extension(extension);
    }
    let damaged = |error: SoundError| MediaError::input(path, format!("its sound cannot be read: {error}"));
    let probe = symphonia::default::get_probe();
    let mut format = match probe.probe(&hint, stream, FormatOptions::default(), MetadataOptions::default()) {
        Ok(format) => format,
        Err(SoundError::Unsupported(reason)) => return Ok(Err(format!("of its format: {reason}"))),
        // What no reader recognises ends the search for one.
        Err(SoundError::IoError(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Ok(Err("its format is unknown".to_owned()));
        }
        Err(error @ SoundError::IoError(_)) => return Err(damaged(error)),
        // A reader may refuse what it does not know of the other tracks; it may be damage, too, which ffmpeg then says.
        Err(error) => return Ok(Err(format!("of its format: {error}"))),
    };
    let Some(track) = format.default_track(TrackType::Audio) else {
        // Readers leave out tracks that they do not understand.
        return match edits.is_empty() {
            true => Err(MediaError::NoSound { path: path.to_path_buf() }),
            false => Ok(Err("its sound is of an unknown kind".to_owned())),
        };
    };
    let id = track.id;
    let edit = edits.iter().find(|edit| edit.track == id);
    let Some(params) = track.codec_params.as_ref().and_then(|params| params.audio()) else {
        return Ok(Err("its sound is of an unknown kind".to_owned()));
    };
    let mut decoder = match symphonia::default::get_codecs().make_audio_decoder(params, &AudioDecoderOptions::default())
    {
        Ok(decoder) => decoder,
        Err(SoundError::Unsupported(reason)) => return Ok(Err(format!("of its sound: {reason}"))),
        Err(error) => return Err(damaged(error)),
    };

    let mut recording = Recording { rate_hz: 0, channels: Vec::new() };
    let mut packet_channels: Vec<Vec<f32>> = Vec::new();
    let mut needed = usize::MAX;
    while recording.len() < needed {
        let packet = match format.next_packet() {
            Ok(Some(packet)) => packet,
            Ok(None) => break,
            Err(error) => return Err(damaged(error)),
        };
        if packet.track_id != id {
            continue;
        }
        let decoded = decoder.decode(&packet).map_err(damaged)?;
        let (rate_hz, channels) = (decoded.spec().rate(), decoded.num_planes());
        if recording.rate_hz == 0 {
            recording = Recording { rate_hz, channels: vec![Vec::new(); channels] };
            let (first, count) = window(rate_hz, start_seconds, seconds)?;
            let skipped = edit.map_or(0, |edit| samples(edit.skip_seconds, rate_hz));
            needed = first.saturating_add(count).saturating_add(skipped);
        }
        if (recording.rate_hz, recording.channels.len()) != (rate_hz, channels) {
            return Err(MediaError::input(path, "its sound changes rate or channels; convert it to WAV".to_owned()));
        }
        decoded.copy_to_vecs_planar(&mut packet_channels);
        for (all, new) in recording.channels.iter_mut().zip(&packet_channels) {
            all.extend_from_slice(new);
        }
    }
    if recording.rate_hz == 0 {
        return Err(MediaError::input(path, "its sound track is empty".to_owned()));
    }
    let (first, count) = window(recording.rate_hz, start_seconds, seconds)?;
    if let Some(edit) = edit {
        apply(edit, &mut recording, first.saturating_add(count));
    }
    recording.cut(first, count);
    Ok(Ok(recording))
}

/// The edits of an MP4 or MOV file; none for other files.
fn edits(path: &Path) -> Result<Vec<SoundEdit>, MediaError> {
    let map = map_file(path).map_err(|error| MediaError::io("read", path, error))?;
    let source = mp4::demux(&map).map_err(|error| MediaError::input(path, error.to_string()))?;
    Ok(source.map(|source| source.sounds).unwrap_or_default())
}

fn samples(seconds: f64, rate_hz: u32) -> usize {
    (seconds * f64::from(rate_hz)).round() as usize
}

/// Leaves what an edit list lets be heard, behind its silence, of which at most `most` samples are asked for.
fn apply(edit: &SoundEdit, recording: &mut Recording, most: usize) {
    let rate_hz = recording.rate_hz;
    let count = edit.length_seconds.map_or(usize::MAX, |seconds| samples(seconds, rate_hz));
    recording.cut(samples(edit.skip_seconds, rate_hz), count);
    let delay = samples(edit.delay_seconds, rate_hz).min(most);
    for channel in &mut recording.channels {
        channel.splice(..0, std::iter::repeat_n(0.0, delay));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_in_front_is_no_longer_than_what_is_asked_for() {
        let edit = SoundEdit { track: 1, skip_seconds: 0.0, length_seconds: None, delay_seconds: 1e12 };
        let mut recording = Recording { rate_hz: 48_000, channels: vec![vec![0.5; 2]] };
        apply(&edit, &mut recording, 3);
        assert_eq!(recording.channels, [[0.0, 0.0, 0.0, 0.5, 0.5]]);
    }
}
