//! Conditioning images: a file becomes the tensor that the video encoder reads.
//!
//! The steps and their order are those of the reference: EXIF rotation, alpha dropped, colour profile applied, H.264
//! round trip at the original size ([`super::round_trip`]), bilinear resize, centre crop, `x/127.5 − 1`.
//!
//! # Easy to get wrong
//! - The resize does not smooth when it shrinks. Large photos alias, and the models were trained on that.
//! - The size before the crop is rounded up.
//! - Mirrored EXIF orientations are ignored; only the rotations 3, 6 and 8 are applied.
//! - Alpha is dropped, not blended.

use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader};

use super::{MediaError, RoundTrip, image_round_trip};

/// Largest side of an image that is read.
pub(super) const MAX_SIDE: usize = 1 << 15;

/// An 8-bit picture, `[h, w, 3]`, sRGB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl RgbImage {
    /// A picture from its bytes.
    ///
    /// # Errors
    /// [`MediaError::Limit`] if a side is 0 or above 32768, [`MediaError::Length`] if `rgb` is not `[h, w, 3]`.
    pub fn new(width: usize, height: usize, rgb: Vec<u8>) -> Result<Self, MediaError> {
        for (what, side) in [("image width", width), ("image height", height)] {
            if !(1..=MAX_SIDE).contains(&side) {
                return Err(MediaError::limit(what, side, "it must be 1 to 32768 pixels"));
            }
        }
        if rgb.len() != width * height * 3 {
            let expected = format!("{height}x{width}x3");
            return Err(MediaError::Length { what: "image", got: rgb.len(), expected });
        }
        Ok(Self { width, height, rgb })
    }

    /// Pixels per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The bytes, `[h, w, 3]`.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Turned clockwise by so many quarters.
    pub fn turned(self, quarter_turns: u8) -> Self {
        let (width, height) = (self.width, self.height);
        let (turned_width, turned_height) = if quarter_turns % 2 == 1 { (height, width) } else { (width, height) };
        if quarter_turns.is_multiple_of(4) {
            return self;
        }
        let mut rgb = Vec::with_capacity(self.rgb.len());
        for y in 0..turned_height {
            for x in 0..turned_width {
                let (column, row) = match quarter_turns % 4 {
                    1 => (y, height - 1 - x),
                    2 => (width - 1 - x, height - 1 - y),
                    _ => (width - 1 - y, x),
                };
                rgb.extend_from_slice(&self.rgb[3 * (row * width + column)..][..3]);
            }
        }
        Self { width: turned_width, height: turned_height, rgb }
    }

    /// Without the last row or column where their number is odd. Sides of 1 stay.
    pub fn crop_to_even(&self) -> Self {
        let even = |side: usize| if side == 1 { 1 } else { side / 2 * 2 };
        let (width, height) = (even(self.width), even(self.height));
        let rows = self.rgb.chunks_exact(3 * self.width).take(height);
        Self { width, height, rgb: rows.flat_map(|row| &row[..3 * width]).copied().collect() }
    }
}

/// Loads, compresses and fits a conditioning image; see the module's documentation.
///
/// `width` and `height` are those of the stage, in pixels; `crf` is the strength of the compression, 0 for none.
/// Returns `[height, width, 3]` f32 in `[-1, 1]`.
///
/// # Errors
/// Those of [`load_image`], [`image_round_trip`] and [`resize_and_crop`].
///
/// Source: ltx_pipelines/utils/media_io (Lightricks/LTX-2 @ 400fd31).
pub fn load_conditioning_image(
    path: &Path,
    width: usize,
    height: usize,
    crf: u8,
    codec: RoundTrip,
) -> Result<Vec<f32>, MediaError> {
    let image = load_image(path)?;
    resize_and_crop(&image_round_trip(&image, crf, codec)?, width, height)
}

/// Reads a PNG, JPEG or WebP file as 8-bit sRGB.
///
/// Applies EXIF rotation (3, 6, 8), drops alpha, repeats grey. An embedded RGB colour profile is converted to sRGB;
/// one of another kind, or damaged, is ignored with a warning.
///
/// # Errors
/// [`MediaError::Io`] if the file cannot be read, [`MediaError::Image`] if it is damaged, too large or of another
/// format.
pub fn load_image(path: &Path) -> Result<RgbImage, MediaError> {
    let damaged = |error: image::ImageError| match error {
        // The file vanished or the disk fails; damaged contents are reported as an end that comes too early.
        image::ImageError::IoError(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => {
            MediaError::io("read", path, error)
        }
        error => MediaError::Image { path: path.to_path_buf(), message: error.to_string() },
    };
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    let mut decoder = reader.map_err(|error| MediaError::io("read", path, error))?.into_decoder().map_err(damaged)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let profile = decoder.icc_profile().unwrap_or(None);
    let mut image = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    if matches!(orientation, Orientation::Rotate90 | Orientation::Rotate180 | Orientation::Rotate270) {
        image.apply_orientation(orientation);
    }
    let image = image.to_rgb8();
    let (width, height) = (image.width() as usize, image.height() as usize);
    let mut rgb = image.into_raw();
    if let Some(converted) = profile.and_then(|profile| convert_to_srgb(&profile, &rgb, path)) {
        rgb = converted;
    }
    RgbImage::new(width, height, rgb)
}

/// Applies an embedded colour profile, with relative colorimetric intent; `None` if it is not usable.
fn convert_to_srgb(profile: &[u8], rgb: &[u8], path: &Path) -> Option<Vec<u8>> {
    use moxcms::{ColorProfile, DataColorSpace, Layout, RenderingIntent, TransformOptions};
    let convert = || -> Result<Vec<u8>, String> {
        let profile = ColorProfile::new_from_slice(profile).map_err(|error| error.to_string())?;
        if profile.color_space != DataColorSpace::Rgb {
            return Err("it is not an RGB profile".to_owned());
        }
        let options =
            TransformOptions { rendering_intent: RenderingIntent::RelativeColorimetric, ..Default::default() };
        let transform = profile
            .create_transform_8bit(Layout::Rgb, &ColorProfile::new_srgb(), Layout::Rgb, options)
            .map_err(|error| error.to_string())?;
        let mut converted = vec![0; rgb.len()];
        transform.transform(rgb, &mut converted).map_err(|error| error.to_string())?;
        Ok(converted)
    };
    convert().inspect_err(|problem| tracing::warn!(image = %path.display(), problem, "ignoring a colour profile")).ok()
}

/// Resizes `image` to cover `width` × `height`, crops the centre and maps 0..255 to `[-1, 1]`.
///
/// Bilinear with half-pixel centres and without smoothing, in f32. Returns `[height, width, 3]`.
///
/// # Errors
/// [`MediaError::Limit`] if a target side is 0 or above 32768, or the image is so narrow that the resized one would be
/// longer than 2^24 pixels.
pub fn resize_and_crop(image: &RgbImage, width: usize, height: usize) -> Result<Vec<f32>, MediaError> {
    let mut out = resampled([image.width, image.height], |i| f32::from(image.rgb[i]), [width, height])?;
    out.iter_mut().for_each(|v| *v = *v / 127.5 - 1.0);
    Ok(out)
}

/// Shrinks `image` to fit into `width` × `height` if it is larger, continues it below and to the right as in a mirror, and
/// maps 0..255 to `[-1, 1]`.
///
/// # Errors
/// Those of [`resize_and_crop`].
pub fn shrink_and_pad(image: &RgbImage, width: usize, height: usize) -> Result<Vec<f32>, MediaError> {
    let mut out = padded([image.width, image.height], |i| f32::from(image.rgb[i]), [width, height])?;
    out.iter_mut().for_each(|v| *v = *v / 127.5 - 1.0);
    Ok(out)
}

/// The picture of a width and a height with the values `at`, `[h, w, 3]`, resized and cropped to other ones.
pub(super) fn resampled(
    [from_width, from_height]: [usize; 2],
    at: impl Fn(usize) -> f32,
    [width, height]: [usize; 2],
) -> Result<Vec<f32>, MediaError> {
    check_target(width, height)?;
    // f64 and these very operations, because rounding up turns one last bit into one more pixel.
    let scale = (height as f64 / from_height as f64).max(width as f64 / from_width as f64);
    let columns = taps(from_width, (from_width as f64 * scale).ceil() as usize, width)?;
    let rows = taps(from_height, (from_height as f64 * scale).ceil() as usize, height)?;
    Ok(sampled(from_width, at, &rows, &columns))
}

/// The picture shrunk to fit into other sides, if it must be, and continued below and to the right as in a mirror; by its
/// last pixels where it is too small for that.
pub(super) fn padded(
    [from_width, from_height]: [usize; 2],
    at: impl Fn(usize) -> f32,
    [width, height]: [usize; 2],
) -> Result<Vec<f32>, MediaError> {
    check_target(width, height)?;
    let mut inner = [from_width, from_height];
    if from_width > width || from_height > height {
        let scale = (height as f64 / from_height as f64).min(width as f64 / from_width as f64);
        inner = inner.map(|side| ((side as f64 * scale).round_ties_even() as usize).max(1));
    }
    let [inner_width, inner_height] = [inner[0].min(width), inner[1].min(height)];
    let mirrors = width - inner_width < inner_width && height - inner_height < inner_height;
    let extended = |src: usize, inner: usize, target: usize| -> Result<Vec<Tap>, MediaError> {
        let taps = taps(src, inner, inner)?;
        let index = |i: usize| match mirrors {
            _ if i < inner => i,
            true => 2 * inner - 2 - i,
            false => inner - 1,
        };
        Ok((0..target).map(|i| taps[index(i)]).collect())
    };
    let (columns, rows) = (extended(from_width, inner_width, width)?, extended(from_height, inner_height, height)?);
    Ok(sampled(from_width, at, &rows, &columns))
}

fn check_target(width: usize, height: usize) -> Result<(), MediaError> {
    for (what, side) in [("target width", width), ("target height", height)] {
        if !(1..=MAX_SIDE).contains(&side) {
            return Err(MediaError::limit(what, side, "it must be 1 to 32768 pixels"));
        }
    }
    Ok(())
}

/// The values at these rows and columns of a picture, `[rows, columns, 3]`.
fn sampled(from_width: usize, at: impl Fn(usize) -> f32, rows: &[Tap], columns: &[Tap]) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len() * columns.len() * 3);
    for row in rows {
        let (top, bottom) = (row.first * from_width * 3, row.second * from_width * 3);
        for column in columns {
            for channel in 0..3 {
                let blend = |line: usize| {
                    let (a, b) = (at(line + column.first * 3 + channel), at(line + column.second * 3 + channel));
                    (1.0 - column.weight) * a + column.weight * b
                };
                out.push((1.0 - row.weight) * blend(top) + row.weight * blend(bottom));
            }
        }
    }
    out
}

/// One output position along an axis: two inputs and the weight of the second.
#[derive(Clone, Copy)]
struct Tap {
    first: usize,
    second: usize,
    weight: f32,
}

/// The centre `target` positions of an axis resized from `src` to `resized`.
fn taps(src: usize, resized: usize, target: usize) -> Result<Vec<Tap>, MediaError> {
    // Up to here an f32 holds every position.
    if resized > 1 << 24 {
        return Err(MediaError::limit("side of the resized image", resized, "use a less narrow image"));
    }
    let step = src as f32 / resized as f32;
    let offset = resized.saturating_sub(target) / 2;
    let tap = |i: usize| {
        let at = (step * ((offset + i) as f32 + 0.5) - 0.5).max(0.0);
        let first = (at as usize).min(src - 1);
        Tap { first, second: (first + 1).min(src - 1), weight: (at - first as f32).min(1.0) }
    };
    Ok((0..target).map(tap).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(width: usize, height: usize, red: impl Fn(usize, usize) -> u8) -> RgbImage {
        let pixels = (0..width * height).flat_map(|i| [red(i % width, i / width), 100, 200]);
        RgbImage::new(width, height, pixels.collect()).expect("an image")
    }

    fn reds(image: &RgbImage, width: usize, height: usize) -> Vec<f32> {
        let resized = resize_and_crop(image, width, height).expect("resized");
        resized.iter().step_by(3).map(|value| (value + 1.0) * 127.5).collect()
    }

    #[track_caller]
    fn check_reds(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-3), "{got:?}, {want:?} expected");
    }

    #[test]
    fn same_size_keeps_the_values() {
        let source = image(4, 2, |x, y| (10 * x + 100 * y) as u8);
        check_reds(&reds(&source, 4, 2), &[0.0, 10.0, 20.0, 30.0, 100.0, 110.0, 120.0, 130.0]);
    }

    #[test]
    fn pictures_are_continued_as_in_a_mirror() {
        let reds = |image: &RgbImage, width: usize, height: usize| -> Vec<f32> {
            let padded = shrink_and_pad(image, width, height).expect("padded");
            padded.as_chunks::<3>().0.iter().map(|rgb| ((rgb[0] + 1.0) * 127.5).round()).collect()
        };
        let picture = image(3, 2, |x, y| (10 * x + 100 * y) as u8);
        assert_eq!(reds(&picture, 5, 3), [0., 10., 20., 10., 0., 100., 110., 120., 110., 100., 0., 10., 20., 10., 0.]);
        // Three more columns than there are to mirror: the last pixels go on.
        assert_eq!(reds(&picture, 6, 2), [0., 10., 20., 20., 20., 20., 100., 110., 120., 120., 120., 120.]);
        // 4x2 pixels shrink to 2x1 and leave a row to fill.
        let wide = image(4, 2, |x, _| (10 * x) as u8);
        assert_eq!(reds(&wide, 2, 2), [5., 25., 5., 25.]);
        assert!(shrink_and_pad(&wide, 0, 2).is_err());
    }

    #[test]
    fn the_centre_is_cropped_and_pixels_have_their_centres_at_a_half() {
        // 4x2 covers 2x2 without scaling; columns 1 and 2 stay.
        check_reds(&reds(&image(4, 2, |x, _| (10 * x) as u8), 2, 2), &[10.0, 20.0, 10.0, 20.0]);
        // Doubling: positions -0.25 (held at 0), 0.25, 0.75, 1.25 (held at 1).
        check_reds(&reds(&image(2, 1, |x, _| (100 * x) as u8), 4, 2), &[0.0, 25.0, 75.0, 100.0].repeat(2));
    }

    #[test]
    fn shrinking_does_not_smooth() {
        // Every fourth pixel, interpolated between its two middle neighbours.
        let stripes = image(16, 4, |x, _| if x % 4 == 1 || x % 4 == 2 { 200 } else { 0 });
        check_reds(&reds(&stripes, 4, 1), &[200.0; 4]);
    }

    #[test]
    fn odd_sides_are_cut_for_compression() {
        let cut = image(3, 5, |x, y| (x + 10 * y) as u8).crop_to_even();
        assert_eq!((cut.width(), cut.height()), (2, 4));
        assert_eq!(cut.rgb().iter().step_by(3).copied().collect::<Vec<_>>(), [0, 1, 10, 11, 20, 21, 30, 31]);
    }

    fn load(name: &str, bytes: &[u8]) -> Result<RgbImage, MediaError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        load_image(&path)
    }

    /// A PNG file of `pixels`, with EXIF data if `orientation` is given.
    fn png(
        width: u32,
        height: u32,
        colour: image::ExtendedColorType,
        pixels: &[u8],
        orientation: Option<u8>,
    ) -> Vec<u8> {
        use image::ImageEncoder;
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        if let Some(orientation) = orientation {
            // One big-endian directory with one entry: tag 0x112, short, count 1.
            let mut exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
            exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
            encoder.set_exif_metadata(exif).expect("supported");
        }
        encoder.write_image(pixels, width, height, colour).expect("encoded");
        bytes
    }

    #[track_caller]
    fn check_orientation(orientation: u8, want: [u8; 3], is_upright: bool) {
        let bytes = png(3, 1, image::ExtendedColorType::L8, &[10, 20, 30], Some(orientation));
        let image = load("a.png", &bytes).expect("loaded");
        assert_eq!((image.width(), image.height()), if is_upright { (1, 3) } else { (3, 1) });
        assert_eq!(image.rgb().iter().step_by(3).copied().collect::<Vec<_>>(), want);
    }

    #[test]
    fn exif_rotations_apply_and_mirrors_do_not() {
        check_orientation(1, [10, 20, 30], false);
        check_orientation(2, [10, 20, 30], false);
        check_orientation(3, [30, 20, 10], false);
        check_orientation(5, [10, 20, 30], false);
        check_orientation(6, [10, 20, 30], true);
        check_orientation(8, [30, 20, 10], true);
    }

    #[test]
    fn jpeg_and_webp_are_read() {
        let pixels = [90, 150, 210].repeat(16 * 8);
        let mut jpeg = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 95);
        image::ImageEncoder::write_image(encoder, &pixels, 16, 8, image::ExtendedColorType::Rgb8).expect("encoded");
        let got = load("a.jpg", &jpeg).expect("loaded");
        assert_eq!((got.width(), got.height()), (16, 8));
        assert!(got.rgb().iter().zip(&pixels).all(|(a, b)| a.abs_diff(*b) <= 3), "{:?}", &got.rgb()[..3]);
        let mut webp = Vec::new();
        let encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut webp);
        image::ImageEncoder::write_image(encoder, &pixels, 16, 8, image::ExtendedColorType::Rgb8).expect("encoded");
        // The contents tell the format, not the name.
        assert_eq!(load("a.png", &webp).expect("loaded").rgb(), pixels);
    }

    #[test]
    fn alpha_is_dropped_not_blended() {
        let bytes = png(2, 1, image::ExtendedColorType::Rgba8, &[9, 8, 7, 0, 6, 5, 4, 255], None);
        assert_eq!(load("a.png", &bytes).expect("loaded").rgb(), [9, 8, 7, 6, 5, 4]);
    }

    #[test]
    fn profiles_convert_to_srgb_and_bad_ones_are_ignored() {
        use image::ImageEncoder;
        let with_profile = |profile: Vec<u8>| {
            let mut bytes = Vec::new();
            let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
            encoder.set_icc_profile(profile).expect("supported");
            encoder.write_image(&[200, 100, 50], 1, 1, image::ExtendedColorType::Rgb8).expect("encoded");
            load("a.png", &bytes).expect("loaded").rgb().to_vec()
        };
        assert_eq!(with_profile(b"nonsense".to_vec()), [200, 100, 50]);
        let srgb = moxcms::ColorProfile::new_srgb().encode().expect("encoded");
        assert!(with_profile(srgb).iter().zip([200, 100, 50]).all(|(a, b)| a.abs_diff(b) <= 1));
        // Display P3 is wider, so the same numbers mean a stronger red.
        let wide = moxcms::ColorProfile::new_display_p3().encode().expect("encoded");
        let converted = with_profile(wide);
        assert!(converted[0] > 210 && converted[1] < 100, "{converted:?}");
    }

    #[test]
    fn files_that_are_no_images_are_errors() {
        let error = load("a.png", b"no image").expect_err("not an image");
        assert!(error.to_string().contains("PNG, JPEG and WebP are read"), "{error}");
        let cut = png(64, 64, image::ExtendedColorType::L8, &[7; 4096], None);
        assert!(load("a.png", &cut[..60]).is_err());
        let error = load_image(Path::new("/nonexistent.png")).expect_err("missing");
        assert_eq!(error.to_string(), "cannot read `/nonexistent.png`");
    }

    #[test]
    fn impossible_targets_are_errors() {
        let source = image(1, 4000, |_, _| 0);
        assert!(resize_and_crop(&source, 0, 8).is_err());
        assert!(resize_and_crop(&source, 32_768, 8).is_err());
    }
}
