//! The H.264 compression that conditioning images go through.
//!
//! The models saw video frames, hence compressed pictures, in training; the reference therefore passes every
//! conditioning image through one H.264 picture (libx264 `veryfast`, 4:2:0, `crf` 33 for LTX-2.0 to 2.3 and 18 later)
//! before the video encoder of the model sees it.
//!
//! With an `ffmpeg` on `PATH` that is what happens, to the bit (see [`Ffmpeg::image_round_trip`]). Otherwise OpenH264 takes its place.
//!
//! # Calibration
//! OpenH264 has one QP for a picture, while x264 derives one for every block from `crf` and the detail in the block, so
//! that the counterpart of a `crf` depends on the image:
//!
//! `QP = crf − 4.9 + 0.67·activity`, at least 12 (the encoder's limit), at most 51,
//!
//! where [`mean_activity`] is the mean over blocks of what x264 adds to QP. Both numbers are a least-squares fit of the
//! QP of equal PSNR over ten images (scenes, textures, noise) and `crf` 18, 25 and 33; it predicts that QP with a
//! root-mean-square error of 0.7, a fixed offset with 1.5. PSNR is taken after the conversion to 4:2:0, which both
//! codecs share. Over twelve images, two extreme ones included, the resulting PSNR differs from x264's by
//!
//! | crf | mean dB | root mean square dB | size of the stream |
//! | --- | --- | --- | --- |
//! | 18 | −0.37 | 1.54 (0.5 without the plain gradient, which would need a QP below 12) | 1.10 × |
//! | 25 | −0.05 | 0.92 | 1.05 × |
//! | 33 | −0.15 | 0.54 | 0.97 × |
//!
//! What cannot be matched is which details are lost: between the two results lie 40 to 48 dB at `crf` 18 and 31 to
//! 41 dB at `crf` 33 on most images, about as far as each is from the source. All rows are in
//! `bench/results/image-crf-calibration.md`.
//!
//! # Easy to get wrong
//! - Conversions are BT.601 limited range, unlike those of the output: swscale's default, no colour space being set.
//! - RGB → 4:2:0 averages chroma over two columns and filters it over four rows (1 3 3 1); 4:2:0 → RGB repeats chroma
//!   and truncates each product, which darkens by one level on average.

use super::colour::Colour;
use super::ffmpeg::Ffmpeg;
use super::h264::{self, Encoder, EncoderOptions, MIN_SIDE, QP_RANGE};
use super::{I420, MediaError, Rational, RgbImage};

/// Largest `crf` of libx264 at 8 bits.
const MAX_CRF: u8 = 51;

/// QP minus `crf` for a picture of usual detail; fitted, see the module's documentation.
const QP_ABOVE_CRF: f64 = -4.9;

/// QP for a unit of [`mean_activity`]; fitted together with [`QP_ABOVE_CRF`].
const QP_PER_ACTIVITY: f64 = 0.67;

/// Side of a piece of a large picture: a multiple of a macroblock within the limits of the encoder.
const TILE: usize = 2048;

/// Which codec compresses conditioning images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RoundTrip {
    /// `ffmpeg` if it is on `PATH`, else the embedded codec.
    #[default]
    Auto,
    /// The embedded codec.
    Embedded,
    /// `ffmpeg`, an error if it is absent.
    Ffmpeg,
}

/// Compresses `image` with the strength that `crf` has in libx264, and decodes it again.
///
/// An odd last row or column is cut. With `crf` 0, or a side below 2, `image` comes back as it is.
///
/// # Errors
/// [`MediaError::Limit`] for `crf` above 51; with ffmpeg those of [`Ffmpeg::image_round_trip`], except that
/// [`RoundTrip::Auto`] answers a failing ffmpeg with a warning and the embedded codec.
pub fn image_round_trip(image: &RgbImage, crf: u8, codec: RoundTrip) -> Result<RgbImage, MediaError> {
    if crf > MAX_CRF {
        return Err(MediaError::limit("image crf", crf, "it must be 0 (no compression) to 51"));
    }
    if crf == 0 || image.width() < 2 || image.height() < 2 {
        return Ok(image.clone());
    }
    let image = image.crop_to_even();
    let ffmpeg = match codec {
        RoundTrip::Embedded => None,
        RoundTrip::Auto => Ffmpeg::find(),
        RoundTrip::Ffmpeg => Some(Ffmpeg::find().unwrap_or_else(|| Ffmpeg::at("ffmpeg"))),
    };
    if let Some(ffmpeg) = ffmpeg {
        match ffmpeg.image_round_trip(&image, crf) {
            Ok((compressed, _)) => {
                tracing::debug!(program = %ffmpeg.program().display(), crf, "compressed an image with libx264");
                return Ok(compressed);
            }
            Err(error) if codec == RoundTrip::Auto => {
                tracing::warn!(%error, "compressing an image with the embedded codec instead");
            }
            Err(error) => return Err(error),
        }
    }
    let picture = to_i420_bt601(&image)?;
    let qp = image_qp(&picture, crf);
    Ok(compress_at_qp(&image, qp)?.0)
}

/// The QP at which OpenH264 distorts `picture` as libx264 does at `crf`; see the module's documentation.
pub fn image_qp(picture: &I420, crf: u8) -> u8 {
    let qp = f64::from(crf) + QP_ABOVE_CRF + QP_PER_ACTIVITY * mean_activity(picture);
    (qp.round() as u8).clamp(*QP_RANGE.start(), *QP_RANGE.end())
}

/// Compresses and decodes `image`, whose sides are even, at a given QP; also returns the size in bytes.
///
/// # Errors
/// [`MediaError::Limit`] for an odd side or a QP outside of 12 to 51; [`MediaError::Codec`] if the codec fails.
pub fn compress_at_qp(image: &RgbImage, qp: u8) -> Result<(RgbImage, usize), MediaError> {
    let source = to_i420_bt601(image)?;
    let mut result = I420::new(image.width(), image.height())?;
    let mut bytes = 0;
    for top in (0..image.height()).step_by(TILE) {
        for left in (0..image.width()).step_by(TILE) {
            let width = TILE.min(image.width() - left);
            let height = TILE.min(image.height() - top);
            let tile = extract(&source, left, top, width.max(MIN_SIDE), height.max(MIN_SIDE))?;
            let mut encoder = Encoder::new(EncoderOptions { qp, fps: Rational::new(1, 1)?, is_bt709: false })?;
            let sample = encoder.encode(&tile)?;
            let (sps, pps) = encoder.parameter_sets();
            bytes += sps.len() + pps.len() + sample.data.len();
            let decoded = h264::decode_single(sps, pps, &sample)?;
            if (decoded.width(), decoded.height()) != (tile.width(), tile.height()) {
                return Err(MediaError::codec("h264 decoder", "the picture changed its size"));
            }
            paste(&decoded, &mut result, left, top, width, height);
        }
    }
    Ok((Colour::UNSPECIFIED.to_rgb(&result)?, bytes))
}

/// Mean over macroblocks of how much more detail they hold than usual in video, in steps of QP.
///
/// x264 (`aq-mode 1`) raises the QP of a block by `1.04·(log2(energy) − 14.4)`, with the energy of luma and chroma
/// around their means.
pub fn mean_activity(picture: &I420) -> f64 {
    const STRENGTH: f64 = 1.0397;
    const USUAL_LOG2_ENERGY: f64 = 14.427;
    let (y, u, v) = picture.planes();
    let (width, height) = (picture.width(), picture.height());
    let mut sum = 0.0;
    let mut blocks = 0.0;
    for top in (0..height).step_by(16) {
        for left in (0..width).step_by(16) {
            let energy = block_energy(y, width, height, left, top, 16)
                + block_energy(u, width / 2, height / 2, left / 2, top / 2, 8)
                + block_energy(v, width / 2, height / 2, left / 2, top / 2, 8);
            sum += STRENGTH * (energy.max(1.0).log2() - USUAL_LOG2_ENERGY);
            blocks += 1.0;
        }
    }
    sum / blocks
}

/// Sum of squared differences from the mean in a block; the last row and column continue beyond the picture.
fn block_energy(plane: &[u8], width: usize, height: usize, left: usize, top: usize, side: usize) -> f64 {
    let (mut sum, mut squares) = (0_u32, 0_u32);
    for y in top..top + side {
        let row = y.min(height - 1) * width;
        for x in left..left + side {
            let value = u32::from(plane[row + x.min(width - 1)]);
            sum += value;
            squares += value * value;
        }
    }
    f64::from(squares) - f64::from(sum).powi(2) / (side * side) as f64
}

/// A rectangle of a picture; beyond the border the last row and column continue. All arguments are even.
fn extract(source: &I420, left: usize, top: usize, width: usize, height: usize) -> Result<I420, MediaError> {
    let mut tile = I420::new(width, height)?;
    let (y, u, v) = tile.planes_mut();
    let planes = source.planes();
    for (dst, src, shift) in [(y, planes.0, 0), (u, planes.1, 1), (v, planes.2, 1)] {
        let (src_width, src_height) = (source.width() >> shift, source.height() >> shift);
        for (row, dst) in dst.chunks_exact_mut(width >> shift).enumerate() {
            let from = ((top >> shift) + row).min(src_height - 1) * src_width;
            for (column, dst) in dst.iter_mut().enumerate() {
                *dst = src[from + ((left >> shift) + column).min(src_width - 1)];
            }
        }
    }
    Ok(tile)
}

/// Puts the top left `width` × `height` of `tile` at a place of `dst`. All arguments are even.
fn paste(tile: &I420, dst: &mut I420, left: usize, top: usize, width: usize, height: usize) {
    let dst_width = dst.width();
    let (y, u, v) = dst.planes_mut();
    let planes = tile.planes();
    for (dst, src, shift) in [(y, planes.0, 0), (u, planes.1, 1), (v, planes.2, 1)] {
        let rows = src.chunks_exact(tile.width() >> shift).take(height >> shift);
        for (row, src) in rows.enumerate() {
            let at = ((top >> shift) + row) * (dst_width >> shift) + (left >> shift);
            dst[at..at + (width >> shift)].copy_from_slice(&src[..width >> shift]);
        }
    }
}

/// BT.601 limited-range 4:2:0 of an image with even sides, as swscale makes it with its bilinear filter.
///
/// Luma is equal to swscale's, chroma off by at most 1 (in 7 % of the values).
///
/// # Errors
/// [`MediaError::Limit`] for an odd side.
pub fn to_i420_bt601(image: &RgbImage) -> Result<I420, MediaError> {
    // (0.299, 0.587, 0.114)·219/255 and the two chroma rows ·224/255, in units of 2^-15.
    const Y: [i32; 3] = [8414, 16519, 3208];
    const U: [i32; 3] = [-4865, -9528, 14392];
    const V: [i32; 3] = [14392, -12061, -2332];
    const ROWS: [i32; 4] = [1, 3, 3, 1];

    let mut picture = I420::new(image.width(), image.height())?;
    let (width, height) = (image.width(), image.height());
    let rgb = image.rgb();
    let dot = |weights: [i32; 3], at: usize| -> i32 {
        weights.iter().zip(&rgb[at..at + 3]).map(|(weight, value)| weight * i32::from(*value)).sum()
    };
    let (y, u, v) = picture.planes_mut();
    for (pixel, y) in y.iter_mut().enumerate() {
        // To 14 bits first, then rounded to 8.
        let fine = (dot(Y, 3 * pixel) + (32 << 14) + (1 << 8)) >> 9;
        *y = ((fine + 32) >> 6).clamp(0, 255) as u8;
    }
    for (plane, weights) in [(u, U), (v, V)] {
        for (row, out) in plane.chunks_exact_mut(width / 2).enumerate() {
            for (column, out) in out.iter_mut().enumerate() {
                let mut sum = 0;
                for (tap, weight) in ROWS.iter().enumerate() {
                    let from = (2 * row + tap).saturating_sub(1).min(height - 1);
                    let at = 3 * (from * width + 2 * column);
                    sum += weight * ((dot(weights, at) + dot(weights, at + 3) + (256 << 15) + (1 << 9)) >> 10);
                }
                *out = ((sum + (1 << 8)) >> 9).clamp(0, 255) as u8;
            }
        }
    }
    Ok(picture)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waves with a little grain.
    fn image(width: usize, height: usize) -> RgbImage {
        let mut state = 1_u32;
        let rgb = (0..width * height * 3).map(|i| {
            let (x, y, c) = ((i / 3 % width) as f32, (i / 3 / width) as f32, (i % 3) as f32);
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let grain = (state >> 24) as f32 / 16.0 - 8.0;
            (128.0 + 80.0 * (x / 17.0 + c).sin() * (y / 11.0 - c).cos() + grain) as u8
        });
        RgbImage::new(width, height, rgb.collect()).expect("an image")
    }

    fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
        let error: f64 = a.rgb().iter().zip(b.rgb()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
        10.0 * (255.0 * 255.0 * a.rgb().len() as f64 / error.max(1e-9)).log10()
    }

    #[test]
    fn conversion_is_bt601_limited() {
        let grey = |value: u8| RgbImage::new(2, 2, vec![value; 12]).expect("an image");
        let picture = to_i420_bt601(&grey(255)).expect("converted");
        assert_eq!(picture.data(), [235, 235, 235, 235, 128, 128]);
        assert_eq!(to_i420_bt601(&grey(0)).expect("converted").data(), [16, 16, 16, 16, 128, 128]);
        assert_eq!(Colour::UNSPECIFIED.to_rgb(&picture).expect("converted").rgb(), [255; 12]);
        let red = RgbImage::new(2, 2, [255, 0, 0].repeat(4)).expect("an image");
        assert_eq!(to_i420_bt601(&red).expect("converted").data(), [81, 81, 81, 81, 90, 240]);
    }

    #[test]
    fn more_crf_is_less_quality() {
        let source = image(160, 96);
        let quality = |crf| psnr(&source, &image_round_trip(&source, crf, RoundTrip::Embedded).expect("compressed"));
        let (fine, coarse) = (quality(18), quality(33));
        assert!(fine > coarse + 2.0, "{fine} dB and {coarse} dB");
    }

    #[test]
    fn no_compression_returns_the_image() {
        let source = image(33, 17);
        assert_eq!(image_round_trip(&source, 0, RoundTrip::Auto).expect("as it is"), source);
        let line = image(1, 40);
        assert_eq!(image_round_trip(&line, 33, RoundTrip::Auto).expect("as it is"), line);
        assert!(image_round_trip(&source, 52, RoundTrip::Embedded).is_err());
    }

    #[track_caller]
    fn check_size(width: usize, height: usize) {
        let source = image(width, height);
        let compressed = image_round_trip(&source, 18, RoundTrip::Embedded).expect("compressed");
        assert_eq!((compressed.width(), compressed.height()), (width / 2 * 2, height / 2 * 2));
        assert!(psnr(&source.crop_to_even(), &compressed) > 24.0);
    }

    #[test]
    fn sizes_of_all_kinds_work() {
        check_size(2, 2);
        check_size(2, 40);
        check_size(131, 77);
        check_size(TILE + 6, 20);
    }
}
