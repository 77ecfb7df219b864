//! 16-bit stereo WAV.

use std::io::{self, Seek, Write};

use super::aac::{Audio, CHANNELS, to_i16};

/// Writes `audio` as a WAV file of 16-bit samples.
///
/// # Errors
/// What `dst` reports, and an error if the sound is longer than the format's 4 GiB.
pub fn write(audio: &Audio, dst: &mut (impl Write + Seek)) -> io::Result<()> {
    // The lengths in the file have 32 bits; 64 bytes are more than its headers.
    if audio.len() as u64 * 4 > u64::from(u32::MAX) - 64 {
        return Err(io::Error::other("the sound is longer than a wav file can hold"));
    }
    let spec = hound::WavSpec {
        channels: CHANNELS as u16,
        sample_rate: audio.rate_hz(),
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut writer = hound::WavWriter::new(dst, spec).map_err(into_io)?;
    let (left, right) = audio.channels();
    for (left, right) in left.iter().zip(right) {
        writer.write_sample(to_i16(*left)).map_err(into_io)?;
        writer.write_sample(to_i16(*right)).map_err(into_io)?;
    }
    writer.finalize().map_err(into_io)
}

fn into_io(error: hound::Error) -> io::Error {
    match error {
        hound::Error::IoError(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wav_holds_the_sixteen_bit_samples() {
        let audio = Audio::new(24_000, vec![0.0, 0.5, 1.0, -1.0, -0.5, 2.0]).expect("stereo");
        let mut bytes = io::Cursor::new(Vec::new());
        write(&audio, &mut bytes).expect("written");
        bytes.set_position(0);
        let mut reader = hound::WavReader::new(bytes).expect("read");
        assert_eq!((reader.spec().sample_rate, reader.spec().channels), (24_000, 2));
        let samples: Vec<i16> = reader.samples().map(|sample| sample.expect("read")).collect();
        assert_eq!(samples, [0, -32767, 16383, -16383, 32767, 32767]);
    }
}
