//! From Y'CbCr pictures to RGB, as swscale does it without its accurate options.
//!
//! # Easy to get wrong
//! - A stream that does not name its matrix counts as BT.601, whatever its size: that is swscale's default, and therefore
//!   what the reference sees.
//! - Chroma is repeated, not interpolated, and each product is truncated, which darkens by one level on average.

use super::{I420, MediaError, RgbImage};

/// How the numbers of a picture mean colours.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Colour {
    /// Share of red and of blue in luma.
    luma: [f64; 2],
    is_full_range: bool,
}

impl Colour {
    /// BT.601, limited range: what counts where nothing is said.
    pub const UNSPECIFIED: Colour = Colour { luma: [0.299, 0.114], is_full_range: false };

    /// Colours with the matrix number of ISO/IEC 23091-2; `None` for one that is not Y'CbCr with constant factors.
    pub fn new(matrix: u8, is_full_range: bool) -> Option<Colour> {
        let luma = match matrix {
            1 => [0.2126, 0.0722],
            4 => [0.30, 0.11],
            // Unspecified, and the two names of BT.601.
            2 | 5 | 6 => Colour::UNSPECIFIED.luma,
            7 => [0.212, 0.087],
            9 => [0.2627, 0.0593],
            _ => return None,
        };
        Some(Colour { luma, is_full_range })
    }

    /// RGB of a 4:2:0 picture.
    ///
    /// Off by at most 1 from swscale on x86 (in less than 1 % of the values).
    ///
    /// # Errors
    /// [`MediaError::Limit`] if the picture is larger than an image can be.
    pub fn to_rgb(self, picture: &I420) -> Result<RgbImage, MediaError> {
        let factors = self.factors();
        let width = picture.width();
        let (y, u, v) = picture.planes();
        let mut rgb = Vec::with_capacity(3 * y.len());
        for (row, luma) in y.chunks_exact(width).enumerate() {
            let at = row / 2 * (width / 2);
            let (u, v) = (&u[at..at + width / 2], &v[at..at + width / 2]);
            for ((luma, u), v) in luma.chunks_exact(2).zip(u).zip(v) {
                let chroma = factors.chroma(*u, *v);
                for luma in luma {
                    let luma = factors.luma(*luma);
                    rgb.extend(chroma.map(|part| (luma + part).clamp(0, 255) as u8));
                }
            }
        }
        RgbImage::new(width, picture.height(), rgb)
    }

    fn factors(self) -> Factors {
        let [red, blue] = self.luma;
        let green = 1.0 - red - blue;
        let (luma_range, chroma_range, black) = if self.is_full_range { (255.0, 255.0, 0) } else { (219.0, 224.0, 16) };
        let fixed = |factor: f64| (factor * 8192.0).round() as i32;
        let chroma = |factor: f64| fixed(2.0 * factor * 255.0 / chroma_range);
        Factors {
            black,
            luma: fixed(255.0 / luma_range),
            red_v: chroma(1.0 - red),
            green_u: -chroma((1.0 - blue) * blue / green),
            green_v: -chroma((1.0 - red) * red / green),
            blue_u: chroma(1.0 - blue),
        }
    }
}

/// The matrix in units of 2^-13.
struct Factors {
    black: i32,
    luma: i32,
    red_v: i32,
    green_u: i32,
    green_v: i32,
    blue_u: i32,
}

impl Factors {
    fn luma(&self, y: u8) -> i32 {
        scaled(y, self.black, self.luma)
    }

    /// What the chroma of a pixel adds to red, green and blue.
    fn chroma(&self, u: u8, v: u8) -> [i32; 3] {
        let part = |value, factor| scaled(value, 128, factor);
        [part(v, self.red_v), part(u, self.green_u) + part(v, self.green_v), part(u, self.blue_u)]
    }
}

/// The upper half of a product of 16-bit numbers, as swscale's vector code takes it.
fn scaled(value: u8, zero: i32, factor: i32) -> i32 {
    ((i32::from(value) - zero) * 8 * factor) >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(colour: Option<Colour>, yuv: [u8; 3], want: [u8; 3]) {
        let mut picture = I420::new(2, 2).expect("even");
        let (y, u, v) = picture.planes_mut();
        y.fill(yuv[0]);
        u.fill(yuv[1]);
        v.fill(yuv[2]);
        let rgb = colour.expect("a matrix").to_rgb(&picture).expect("converted");
        let far = rgb.rgb()[..3].iter().zip(want).any(|(got, want)| got.abs_diff(want) > 2);
        assert!(!far, "{:?}, about {want:?} expected", &rgb.rgb()[..3]);
    }

    #[test]
    fn red_is_red_in_every_matrix_and_range() {
        // Y = 16 + 219·R, Cb = 128 + 224·(B − Y)/(2 − 2·b), Cr = 128 + 224·(R − Y)/(2 − 2·r) for pure red.
        check(Some(Colour::UNSPECIFIED), [81, 90, 240], [255, 0, 0]);
        check(Colour::new(1, false), [63, 102, 240], [255, 0, 0]);
        check(Colour::new(1, true), [54, 99, 255], [255, 0, 0]);
        check(Colour::new(9, false), [74, 97, 240], [255, 0, 0]);
    }

    #[test]
    fn greys_span_the_range() {
        for (matrix, full, black, white) in [(1, false, 16, 235), (6, true, 0, 255), (9, false, 16, 235)] {
            check(Colour::new(matrix, full), [black, 128, 128], [0; 3]);
            check(Colour::new(matrix, full), [white, 128, 128], [255; 3]);
        }
    }

    #[test]
    fn other_models_of_colour_are_refused() {
        // RGB, YCgCo and constant luminance.
        assert!([0, 8, 10, 14].into_iter().all(|matrix| Colour::new(matrix, false).is_none()));
    }
}
