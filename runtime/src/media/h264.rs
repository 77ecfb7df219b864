//! H.264 in both directions with the embedded OpenH264.
//!
//! [`Decoder`] reads streams of any origin, as far as [`Sps`] finds nothing in them that the library lacks.
//!
//! The encoder runs at one constant QP: generated clips are short, and a quality target suits them better than a rate.
//! Its frames come out in order, one sample for each picture. [`video_qp`] gives the counterpart of x264's `crf`.

mod decoder;
mod sps;

use openh264::OpenH264API;
use openh264::encoder::{
    Complexity, EncoderConfig, FrameRate, FrameType, IntraFramePeriod, QpRange, RateControlMode, UsageType, VuiConfig,
};
use openh264::formats::{YUVSlices, YUVSource};

use super::mp4::VideoSample;
use super::{I420, MediaError, Rational};

pub use decoder::Decoder;
pub use sps::Sps;

/// Largest picture of the encoder in either orientation, pixels.
const MAX_SIDES: (usize, usize) = (3840, 2160);

/// Smallest side of a picture, pixels.
pub(super) const MIN_SIDE: usize = 16;

/// QP range of the encoder.
pub(super) const QP_RANGE: std::ops::RangeInclusive<u8> = 12..=51;

/// What the encoder is told once.
#[derive(Debug, Clone, Copy)]
pub struct EncoderOptions {
    /// Quantiser of every picture, 12 (best) to 51.
    pub qp: u8,
    /// Frames per second.
    pub fps: Rational,
    /// Whether to write the BT.709 limited-range colour description.
    pub is_bt709: bool,
}

/// The QP whose distortion is nearest to that of x264 `-preset veryfast -crf`; the numbers are in
/// `bench/results/image-crf-calibration.md`.
pub fn video_qp(crf: u8) -> u8 {
    crf.saturating_add(VIDEO_QP_ABOVE_CRF).clamp(*QP_RANGE.start(), *QP_RANGE.end())
}

/// Equal luma PSNR is at 1 above on a clean moving scene and at 3 above on a grainy one.
const VIDEO_QP_ABOVE_CRF: u8 = 2;

/// How much coarser a picture is tried again that the encoder could not hold; halves its size.
const QP_RETRY_STEP: u8 = 6;

/// An H.264 stream under construction.
pub struct Encoder {
    inner: openh264::encoder::Encoder,
    options: EncoderOptions,
    frames: u64,
    sps: Vec<u8>,
    pps: Vec<u8>,
}

impl Encoder {
    /// An encoder; the size of the stream is that of the first picture.
    ///
    /// # Errors
    /// [`MediaError::Limit`] for a QP out of range, [`MediaError::Codec`] if the library refuses.
    pub fn new(options: EncoderOptions) -> Result<Self, MediaError> {
        if !QP_RANGE.contains(&options.qp) {
            return Err(MediaError::limit("H.264 quantiser", options.qp, "it must be 12 to 51"));
        }
        Ok(Self { inner: open(options)?, options, frames: 0, sps: Vec::new(), pps: Vec::new() })
    }

    /// Encodes the next picture.
    ///
    /// The library fails on pictures that need more than about a byte per pixel, such as white noise at a low QP, and
    /// is of no use afterwards. Such a picture is tried again with a new encoder and a higher QP, which stays for the
    /// rest of the stream.
    ///
    /// # Errors
    /// [`MediaError::Limit`] for a picture below 16×16 or above 3840×2160 (either orientation),
    /// [`MediaError::Codec`] if the library fails.
    pub fn encode(&mut self, picture: &I420) -> Result<VideoSample, MediaError> {
        check_size(picture.width(), picture.height())?;
        loop {
            match self.try_encode(picture) {
                Err(error) if self.options.qp < *QP_RANGE.end() => {
                    self.options.qp = (self.options.qp + QP_RETRY_STEP).min(*QP_RANGE.end());
                    self.inner = open(self.options)?;
                    tracing::debug!(%error, qp = self.options.qp, "encoding a picture again");
                }
                result => return result,
            }
        }
    }

    fn try_encode(&mut self, picture: &I420) -> Result<VideoSample, MediaError> {
        let (width, height) = (picture.width(), picture.height());
        let source = YUVSlices::new(picture.planes(), (width, height), (width, width / 2, width / 2));
        let fps = self.options.fps;
        let milliseconds = self.frames * 1000 * u64::from(fps.den()) / u64::from(fps.num());
        let time = openh264::Timestamp::from_millis(milliseconds);
        let stream = self.inner.encode_at(&source, time).map_err(encoder_error)?;
        let is_sync = stream.frame_type() == FrameType::IDR;
        let mut data = Vec::new();
        for layer in (0..stream.num_layers()).filter_map(|i| stream.layer(i)) {
            for nal in (0..layer.nal_count()).filter_map(|i| layer.nal_unit(i)) {
                let nal = strip_start_code(nal);
                const SPS: u8 = 7;
                const PPS: u8 = 8;
                match nal.first().map(|byte| byte & 31) {
                    Some(SPS) => keep_parameter_set(&mut self.sps, nal)?,
                    Some(PPS) => keep_parameter_set(&mut self.pps, nal)?,
                    Some(_) => {
                        let len = u32::try_from(nal.len()).map_err(encoder_error)?;
                        data.extend(len.to_be_bytes());
                        data.extend(nal);
                    }
                    None => {}
                }
            }
        }
        if data.is_empty() {
            return Err(encoder_error("a picture was skipped"));
        }
        self.frames += 1;
        Ok(VideoSample { data, is_sync })
    }

    /// Sequence and picture parameter set, without start codes; empty before the first picture.
    pub fn parameter_sets(&self) -> (&[u8], &[u8]) {
        (&self.sps, &self.pps)
    }
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("options", &self.options).field("frames", &self.frames).finish_non_exhaustive()
    }
}

/// A fresh encoder of the library.
fn open(options: EncoderOptions) -> Result<openh264::encoder::Encoder, MediaError> {
    // Seeking in a player lands on such frames.
    let two_seconds = (2.0 * options.fps.to_f64()).ceil() as u32;
    let mut config = EncoderConfig::new()
        .rate_control_mode(RateControlMode::Quality)
        .qp(QpRange::new(options.qp, options.qp))
        .max_frame_rate(FrameRate::from_hz(options.fps.to_f64() as f32))
        .usage_type(UsageType::CameraVideoRealTime)
        .complexity(Complexity::High)
        .skip_frames(false)
        .adaptive_quantization(false)
        .background_detection(false)
        .intra_frame_period(IntraFramePeriod::from_num_frames(two_seconds))
        // One slice: the same bytes on any number of cores.
        .num_threads(1);
    if options.is_bt709 {
        config = config.vui(VuiConfig::bt709());
    }
    let mut inner =
        openh264::encoder::Encoder::with_api_config(OpenH264API::from_source(), config).map_err(encoder_error)?;
    silence(&mut inner)?;
    Ok(inner)
}

/// The size limits of the encoder.
///
/// # Errors
/// [`MediaError::Limit`] outside of 16×16 to 3840×2160 (either orientation).
pub fn check_size(width: usize, height: usize) -> Result<(), MediaError> {
    let (long, short) = (width.max(height), width.min(height));
    if long > MAX_SIDES.0 || short > MAX_SIDES.1 || short < MIN_SIDE {
        return Err(MediaError::limit(
            "video size",
            format!("{width}x{height}"),
            "the embedded H.264 encoder takes 16x16 to 3840x2160 in either orientation; write PNG frames",
        ));
    }
    Ok(())
}

/// Decodes a stream of one picture.
///
/// `sample` is what [`Encoder::encode`] gave for the first picture, `sps` and `pps` its parameter sets.
///
/// # Errors
/// [`MediaError::Codec`] if the stream is damaged or holds no picture.
pub fn decode_single(sps: &[u8], pps: &[u8], sample: &VideoSample) -> Result<I420, MediaError> {
    let mut decoder = Decoder::new(&[sps.to_vec(), pps.to_vec()], 4)?;
    decoder.push(&sample.data)?;
    decoder.finish()?;
    decoder.take_ready().ok_or_else(|| decoder_error("the stream holds no picture"))
}

fn copy_planes(source: &impl YUVSource) -> Result<I420, MediaError> {
    let (width, height) = source.dimensions();
    let mut picture = I420::new(width, height)?;
    let (y, u, v) = picture.planes_mut();
    let strides = source.strides();
    for (dst, src, row, stride) in [
        (y, source.y(), width, strides.0),
        (u, source.u(), width / 2, strides.1),
        (v, source.v(), width / 2, strides.2),
    ] {
        for (dst, src) in dst.chunks_exact_mut(row).zip(src.chunks(stride)) {
            dst.copy_from_slice(src.get(..row).ok_or_else(|| decoder_error("a row is cut"))?);
        }
    }
    Ok(picture)
}

/// Stops the library from writing warnings to the standard error output.
///
/// The library's own switch takes effect only after the set-up, which is what warns.
#[allow(unsafe_code)]
fn silence(encoder: &mut openh264::encoder::Encoder) -> Result<(), MediaError> {
    let mut level: std::ffi::c_int = openh264_sys2::WELS_LOG_QUIET;
    // SAFETY: the option is one that may be set before initialisation and reads one C int through the pointer, which
    // is valid for the call.
    let status =
        unsafe { encoder.raw_api().set_option(openh264_sys2::ENCODER_OPTION_TRACE_LEVEL, (&raw mut level).cast()) };
    if status == 0 { Ok(()) } else { Err(encoder_error(format!("status {status} when setting the log level"))) }
}

fn strip_start_code(nal: &[u8]) -> &[u8] {
    let zeros = nal.iter().take_while(|byte| **byte == 0).count();
    match nal.get(zeros) {
        Some(1) if zeros >= 2 => &nal[zeros + 1..],
        _ => nal,
    }
}

/// Keeps the first set; a file has room for one.
fn keep_parameter_set(kept: &mut Vec<u8>, nal: &[u8]) -> Result<(), MediaError> {
    if kept.is_empty() {
        kept.extend(nal);
    }
    if kept == nal { Ok(()) } else { Err(encoder_error("the parameter sets changed within the stream")) }
}

fn encoder_error(error: impl ToString) -> MediaError {
    MediaError::codec("h264 encoder", error)
}

fn decoder_error(error: impl ToString) -> MediaError {
    MediaError::codec("h264 decoder", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: usize, height: usize, shift: usize) -> I420 {
        let mut picture = I420::new(width, height).expect("even");
        let (y, u, v) = picture.planes_mut();
        y.iter_mut().enumerate().for_each(|(i, y)| *y = (40 + (i % width + i / width + shift) % 160) as u8);
        u.fill(110);
        v.fill(140);
        picture
    }

    fn encoder(qp: u8) -> Encoder {
        let fps = Rational::new(24, 1).expect("a rate");
        Encoder::new(EncoderOptions { qp, fps, is_bt709: true }).expect("an encoder")
    }

    #[test]
    fn a_picture_survives_both_directions() {
        let source = picture(66, 48, 0);
        let mut encoder = encoder(14);
        let sample = encoder.encode(&source).expect("encoded");
        assert!(sample.is_sync);
        let (sps, pps) = encoder.parameter_sets();
        let decoded = decode_single(sps, pps, &sample).expect("decoded");
        assert_eq!((decoded.width(), decoded.height()), (66, 48));
        let error: f64 = source.data().iter().zip(decoded.data()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
        assert!(error / (source.data().len() as f64) < 4.0, "mean squared error {error}");
    }

    #[test]
    fn every_picture_gives_a_sample_and_sync_comes_every_two_seconds() {
        let mut encoder = encoder(22);
        let samples: Vec<_> = (0..60).map(|i| encoder.encode(&picture(64, 64, i)).expect("encoded")).collect();
        let sync: Vec<usize> = (0..60).filter(|i| samples[*i].is_sync).collect();
        assert_eq!(sync, [0, 48]);
    }

    #[test]
    fn pictures_too_rich_for_the_encoder_get_a_higher_qp() {
        let mut state = 1_u32;
        let mut noise = I420::new(256, 256).expect("even");
        let (y, u, v) = noise.planes_mut();
        for value in y.iter_mut().chain(u).chain(v) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *value = if state >> 31 == 0 { 0 } else { 255 };
        }
        let mut encoder = encoder(12);
        for source in [&picture(256, 256, 0), &noise, &noise, &picture(256, 256, 0)] {
            encoder.encode(source).expect("encoded");
        }
        assert!(encoder.options.qp > 12);
    }

    #[test]
    fn encoding_is_deterministic() {
        let run = || {
            let mut encoder = encoder(22);
            (0..5).map(|i| encoder.encode(&picture(64, 64, i)).expect("encoded")).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn sizes_out_of_range_are_errors() {
        assert!(check_size(3840, 2160).is_ok() && check_size(2160, 3840).is_ok());
        for (width, height) in [(3842, 16), (2176, 2176), (14, 64), (64, 14)] {
            assert!(check_size(width, height).is_err(), "{width}x{height}");
        }
    }

    #[test]
    fn damaged_streams_are_errors() {
        let sample = |data: &[u8]| VideoSample { data: data.to_vec(), is_sync: true };
        for data in [&[][..], &[0, 0, 0, 9, 1], &[0, 0, 0, 1, 0x65], &[0xff; 40]] {
            assert!(decode_single(&[0x67, 66, 0, 30], &[0x68, 1], &sample(data)).is_err());
        }
    }
}
