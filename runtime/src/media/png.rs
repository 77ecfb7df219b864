//! PNG frames, `frame_00000.png` and so on.

use std::io::{self, Write};

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};

/// File name of frame `index`, counted from 0.
pub fn frame_name(index: u64) -> String {
    format!("frame_{index:05}.png")
}

/// Whether [`frame_name`] makes this name.
pub fn is_frame_name(name: &str) -> bool {
    let digits = name.strip_prefix("frame_").and_then(|rest| rest.strip_suffix(".png"));
    digits.is_some_and(|digits| digits.len() >= 5 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Writes one picture, `rgb` `[h, w, 3]` in 8 bits, losslessly.
///
/// # Errors
/// What `dst` reports, and an error if `rgb` has another length.
pub fn write(width: usize, height: usize, rgb: &[u8], dst: &mut impl Write) -> io::Result<()> {
    let size = |side: usize| u32::try_from(side).map_err(io::Error::other);
    let (width, height) = (size(width)?, size(height)?);
    if rgb.len() as u64 != u64::from(width) * u64::from(height) * 3 {
        return Err(io::Error::other(format!("{} bytes are no picture of {width}x{height}", rgb.len())));
    }
    let encoder = PngEncoder::new_with_quality(dst, CompressionType::Fast, FilterType::Adaptive);
    encoder.write_image(rgb, width, height, ExtendedColorType::Rgb8).map_err(|error| match error {
        image::ImageError::IoError(error) => error,
        other => io::Error::other(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn png_is_lossless() {
        let rgb: Vec<u8> = (0..5 * 3 * 3).map(|i| (i * 37) as u8).collect();
        let mut bytes = Vec::new();
        write(5, 3, &rgb, &mut bytes).expect("written");
        assert_eq!(image::load_from_memory(&bytes).expect("read").to_rgb8().into_raw(), rgb);
        assert!(write(5, 4, &rgb, &mut bytes).is_err());
    }

    #[test]
    fn frame_names_are_recognised() {
        assert_eq!(frame_name(7), "frame_00007.png");
        assert!(is_frame_name(&frame_name(123_456)));
        assert!(!is_frame_name("frame_.png") && !is_frame_name("frame_0000x.png") && !is_frame_name("a.png"));
    }
}
