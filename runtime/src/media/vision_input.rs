//! The image that a prompt is enhanced with, as the vision tower of the text encoder takes it.
//!
//! It is resized twice, as in the reference: its long side to that of a photo, then to the square of the tower.
//!
//! # Easy to get wrong
//! - The first resize does not smooth when it shrinks and cuts fractions off; the second one smooths, and rounds.
//! - The second one does not keep the aspect.
//! - Compression and crop of conditioning images have no part in this.
//!
//! Source: ltx_pipelines/utils (Lightricks/LTX-2, 1.2.0); transformers `Gemma3ImageProcessor` (4.57); spec/media-io.

use image::imageops::FilterType;

use super::MediaError;
use super::image_input::{RgbImage, resampled};

/// The long side of the image after the first resize, in pixels.
const LONG_SIDE: usize = 896; // ltx_pipelines/utils/helpers, generate_enhanced_prompt

/// `image` as a square of `side` pixels: f32 `[side, side, 3]`, whole numbers of 0 to 255.
///
/// # Errors
/// [`MediaError::Limit`] if the image is too narrow, or `side` is 0 or above 32768.
pub fn vision_levels(image: &RgbImage, side: usize) -> Result<Vec<f32>, MediaError> {
    let (from_width, from_height) = (image.width(), image.height());
    let scale = LONG_SIDE as f64 / from_width.max(from_height) as f64;
    let [width, height] = [from_width, from_height].map(|n| ((n as f64 * scale) as usize).max(1));
    let rgb = resampled([from_width, from_height], |i| f32::from(image.rgb()[i]), [width, height])?;
    let photo = RgbImage::new(width, height, rgb.into_iter().map(|v| v as u8).collect())?;
    let square = smoothed(photo, side)?;
    Ok(square.rgb().iter().map(|&v| f32::from(v)).collect())
}

/// `image` resized to a square of `side` pixels; where it shrinks, all pixels that become one have a part in it.
fn smoothed(image: RgbImage, side: usize) -> Result<RgbImage, MediaError> {
    // Checks the side before anything of that size is allocated.
    let limit = "it must be 1 to 32768 pixels";
    let sides = u32::try_from(side).ok().filter(|n| (1..=1 << 15).contains(n));
    let n = sides.ok_or_else(|| MediaError::limit("side of the image", side, limit))?;
    // Sides of an image are below 2^16.
    let (width, height) = (image.width() as u32, image.height() as u32);
    let buffer = image::RgbImage::from_raw(width, height, image.rgb().to_vec());
    let buffer = buffer.ok_or_else(|| MediaError::limit("image width", width as usize, limit))?;
    RgbImage::new(side, side, image::imageops::resize(&buffer, n, n, FilterType::Triangle).into_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(width: usize, height: usize, red: impl Fn(usize, usize) -> u8) -> RgbImage {
        let pixels = (0..width * height).flat_map(|i| [red(i % width, i / width), 100, 200]);
        RgbImage::new(width, height, pixels.collect()).expect("an image")
    }

    /// Compares the reds of the square; fractions that are cut off may be a rounding away from a whole level.
    #[track_caller]
    fn check_reds(image: &RgbImage, side: usize, want: &[f32]) {
        let levels = vision_levels(image, side).expect("resized");
        assert_eq!(levels.len(), 3 * side * side);
        let got: Vec<f32> = levels.into_iter().step_by(3).collect();
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1.0), "{got:?}, {want:?} expected");
    }

    #[test]
    fn a_square_is_filled_whatever_the_aspect() {
        check_reds(&image(5, 3, |_, _| 50), 4, &[50.0; 16]);
        let half = |x: usize, _: usize| if x < 896 { 10 } else { 90 };
        check_reds(&image(2 * 896, 448, half), 8, &[10.0, 10.0, 10.0, 20.0, 80.0, 90.0, 90.0, 90.0].repeat(8));
    }

    #[test]
    fn shrinking_to_the_square_smooths() {
        // Every second pixel is lit. A filter without smoothing would keep its value or lose it.
        check_reds(&image(896, 896, |x, _| if x % 2 == 0 { 200 } else { 0 }), 8, &[100.0; 64]);
    }

    #[test]
    fn thin_images_keep_a_row_and_impossible_sides_are_errors() {
        check_reds(&image(2000, 1, |_, _| 7), 2, &[7.0; 4]);
        let small = image(1, 1, |_, _| 0);
        assert!(vision_levels(&small, 0).is_err() && vision_levels(&small, 1 << 16).is_err());
    }
}
