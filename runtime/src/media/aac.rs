//! Stereo sound, its 16-bit form, and AAC-LC.
//!
//! As the reference does, sound is first reduced to 16 bits (`trunc(clamp(x, -1, 1) · 32767)`), then encoded from
//! those. WAV and AAC therefore carry the same samples.

use super::MediaError;
use super::mp4::AudioTrack;

/// Channels of all sound here.
pub const CHANNELS: usize = 2;

/// Bits per second for stereo, unless the format allows less at a low sampling rate.
const BITRATE: u32 = 192_000;

/// Sampling rates of AAC in mp4: ISO/IEC 14496-3, table 1.18, less the two whose number does not fit an mp4 sample
/// description.
pub const RATES_HZ: [u32; 11] = [64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350];

/// A stereo waveform.
#[derive(Debug, Clone, PartialEq)]
pub struct Audio {
    rate_hz: u32,
    planar: Vec<f32>,
}

impl Audio {
    /// Sound from `planar`, `[2, n]` f32 in `[-1, 1]` (left, then right) at `rate_hz` samples per second.
    ///
    /// # Errors
    /// [`MediaError::Length`] if the length is odd; [`MediaError::Limit`] if there is no sample or no rate.
    pub fn new(rate_hz: u32, planar: Vec<f32>) -> Result<Self, MediaError> {
        if !planar.len().is_multiple_of(CHANNELS) {
            let expected = "two channels of equal length".to_owned();
            return Err(MediaError::Length { what: "stereo waveform", got: planar.len(), expected });
        }
        if planar.is_empty() || rate_hz == 0 {
            return Err(MediaError::limit("length or rate of the sound", 0, "it must be positive"));
        }
        Ok(Self { rate_hz, planar })
    }

    /// Samples per second.
    pub fn rate_hz(&self) -> u32 {
        self.rate_hz
    }

    /// Samples of each channel.
    pub fn len(&self) -> usize {
        self.planar.len() / CHANNELS
    }

    /// Never true; a waveform has at least one sample.
    pub fn is_empty(&self) -> bool {
        self.planar.is_empty()
    }

    /// Left and right channel.
    pub fn channels(&self) -> (&[f32], &[f32]) {
        self.planar.split_at(self.len())
    }
}

/// The 16-bit form of one sample: clipped to `[-1, 1]`, times 32767, truncated towards zero. NaN becomes 0.
pub fn to_i16(sample: f32) -> i16 {
    (sample.clamp(-1.0, 1.0) * 32767.0) as i16
}

/// Encodes `audio` as AAC-LC, ready for [`super::mp4::mux`].
///
/// # Errors
/// [`MediaError::Limit`] if AAC does not know the sampling rate; [`MediaError::Codec`] if the encoder fails.
pub fn encode(audio: &Audio) -> Result<AudioTrack, MediaError> {
    if !RATES_HZ.contains(&audio.rate_hz) {
        return Err(MediaError::limit(
            "audio sampling rate",
            audio.rate_hz,
            "AAC in mp4 knows 7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000 and 64000 Hz; resample or write a `.wav`",
        ));
    }
    // 6144 bits per channel and frame of 1024 samples is the most that the format allows.
    let most = 6144 * CHANNELS as u64 * u64::from(audio.rate_hz) / 1024;
    let bitrate = BITRATE.min(u32::try_from(most).unwrap_or(u32::MAX));
    let options = syom::EncodeOptions::raw().with_bitrate_bps(bitrate);
    let failed = |error: syom::AacError| MediaError::codec("aac encoder", error);
    let mut encoder = syom::Encoder::new(audio.rate_hz, CHANNELS, &options).map_err(failed)?;

    let (left, right) = audio.channels();
    let quantised =
        |channel: &[f32]| -> Vec<f32> { channel.iter().map(|sample| f32::from(to_i16(*sample)) / 32768.0).collect() };
    let (left, right) = (quantised(left), quantised(right));
    let mut frames = Vec::new();
    let mut keep = |frame: syom::EncodedFrame<'_>| {
        frames.push(frame.au.to_vec());
        Ok(())
    };
    encoder.feed(&[&left, &right], &mut keep).map_err(failed)?;
    let info = encoder.finish(&mut keep).map_err(failed)?;
    let priming = u32::try_from(info.priming).map_err(|error| MediaError::codec("aac encoder", error))?;
    Ok(AudioTrack {
        rate_hz: audio.rate_hz,
        channels: CHANNELS as u16,
        config: encoder.asc().to_vec(),
        priming,
        samples_per_channel: audio.len() as u64,
        frames,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bits_clip_and_truncate() {
        let got = [0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 1e-5, f32::NAN].map(to_i16);
        assert_eq!(got, [0, 32767, -32767, 32767, -32767, 16383, -16383, 0, 0]);
    }

    /// A click of one sample in noise-free silence.
    fn click(rate_hz: u32, len: usize, at: usize) -> Audio {
        let mut planar = vec![0.0; 2 * len];
        planar[at] = 0.9;
        planar[len + at] = 0.9;
        Audio::new(rate_hz, planar).expect("stereo")
    }

    #[track_caller]
    fn check_click(rate_hz: u32, len: usize, at: usize) {
        let track = encode(&click(rate_hz, len, at)).expect("encoded");
        assert!(track.frames.len() as u64 * 1024 >= u64::from(track.priming) + len as u64);
        let channels = match &track.config[..] {
            [_, second, ..] => second >> 3 & 15,
            _ => panic!("a configuration has two bytes"),
        };
        assert_eq!(channels, 2);
        let adts: Vec<u8> =
            track.frames.iter().flat_map(|frame| syom::wrap_adts_au(frame, rate_hz, 2).expect("wrapped")).collect();
        let decoded = syom::decode_with(&adts, &syom::DecodeOptions::unbounded()).expect("decoded");
        let left = &decoded.channels[0];
        let peak = (0..left.len()).max_by(|a, b| left[*a].abs().total_cmp(&left[*b].abs())).expect("not empty");
        assert_eq!(peak - track.priming as usize, at);
    }

    #[test]
    fn priming_says_where_the_sound_starts() {
        check_click(48_000, 60_000, 48_000);
        check_click(24_000, 30_001, 24_000);
        check_click(44_100, 5000, 777);
    }

    #[test]
    fn very_short_sound_is_encoded() {
        assert_eq!(encode(&click(24_000, 1, 0)).expect("encoded").samples_per_channel, 1);
    }

    #[test]
    fn an_unknown_rate_is_an_error() {
        let error = encode(&click(47_999, 100, 0)).expect_err("not an AAC rate");
        assert!(error.to_string().starts_with("audio sampling rate is 47999; AAC in mp4 knows"), "{error}");
    }

    #[test]
    fn mono_and_nothing_are_errors() {
        assert!(Audio::new(48_000, vec![0.0; 3]).is_err());
        assert!(Audio::new(48_000, vec![]).is_err());
    }
}
