//! RGB float frames and their conversions to 8 bits.
//!
//! A decoder hands over chunks of frames `[f, h, w, 3]` f32 in `[0, 1]`; they become either RGB bytes (PNG) or BT.709
//! limited-range planes (H.264). Both conversions truncate, as the reference does; rounding would be half a level
//! brighter on average.

use rayon::prelude::*;

use super::MediaError;

/// Largest side of a frame. Keeps every size computed from it far from overflow.
const MAX_SIDE: usize = 1 << 14;

/// A positive fraction in lowest terms; here always frames per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rational {
    num: u32,
    den: u32,
}

impl Rational {
    /// `num / den` in lowest terms.
    ///
    /// # Errors
    /// [`MediaError::FrameRate`] if either part is zero.
    pub fn new(num: u32, den: u32) -> Result<Self, MediaError> {
        if num == 0 || den == 0 {
            return Err(MediaError::FrameRate { got: format!("{num}/{den}") });
        }
        let divisor = gcd(num, den);
        Ok(Self { num: num / divisor, den: den / divisor })
    }

    /// The rate that a decimal number means: whole rates, the NTSC family (23.976 → 24000/1001), else a multiple of
    /// 1/1000.
    ///
    /// # Errors
    /// [`MediaError::FrameRate`] unless `fps` is finite and in `0.001..=1000`.
    pub fn from_fps(fps: f64) -> Result<Self, MediaError> {
        if !(0.001..=1000.0).contains(&fps) {
            return Err(MediaError::FrameRate { got: fps.to_string() });
        }
        if (fps - fps.round()).abs() < 1e-6 {
            return Self::new(fps.round() as u32, 1);
        }
        // 24000/1001 is written 23.976, 23.98 or with all its digits.
        let nominal = fps.ceil();
        let ntsc = nominal * 1000.0 / 1001.0;
        if (nominal as u32).is_multiple_of(6) && (fps - ntsc).abs() < 0.005 {
            return Self::new(nominal as u32 * 1000, 1001);
        }
        Self::new((fps * 1000.0).round() as u32, 1000)
    }

    /// Numerator.
    pub fn num(self) -> u32 {
        self.num
    }

    /// Denominator.
    pub fn den(self) -> u32 {
        self.den
    }

    /// Nearest f64.
    pub fn to_f64(self) -> f64 {
        f64::from(self.num) / f64::from(self.den)
    }
}

impl std::fmt::Display for Rational {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.den {
            1 => write!(f, "{}", self.num),
            den => write!(f, "{}/{den}", self.num),
        }
    }
}

impl std::str::FromStr for Rational {
    type Err = MediaError;

    /// Reads `24`, `23.976` or `24000/1001`.
    fn from_str(text: &str) -> Result<Self, MediaError> {
        let bad = || MediaError::FrameRate { got: text.to_owned() };
        match text.split_once('/') {
            Some((num, den)) => {
                Self::new(num.trim().parse().map_err(|_| bad())?, den.trim().parse().map_err(|_| bad())?)
            }
            None => Self::from_fps(text.trim().parse().map_err(|_| bad())?),
        }
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Size and rate of a video, fixed for a whole stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VideoFormat {
    width: usize,
    height: usize,
    fps: Rational,
}

impl VideoFormat {
    /// A format of `width` × `height` pixels.
    ///
    /// # Errors
    /// [`MediaError::Limit`] if a side is 0 or above 16384.
    pub fn new(width: usize, height: usize, fps: Rational) -> Result<Self, MediaError> {
        for (what, side) in [("frame width", width), ("frame height", height)] {
            if !(1..=MAX_SIDE).contains(&side) {
                return Err(MediaError::limit(what, side, "it must be 1 to 16384 pixels"));
            }
        }
        Ok(Self { width, height, fps })
    }

    /// Pixels per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Frames per second.
    pub fn fps(&self) -> Rational {
        self.fps
    }

    /// Values of one frame, `h·w·3`.
    pub fn frame_len(&self) -> usize {
        self.width * self.height * 3
    }
}

/// A chunk of frames, `[f, h, w, 3]` f32 in `[0, 1]`, borrowed from the decoder's output.
#[derive(Debug, Clone, Copy)]
pub struct Frames<'a> {
    format: VideoFormat,
    rgb: &'a [f32],
}

impl<'a> Frames<'a> {
    /// Views `rgb` as whole frames of `format`.
    ///
    /// # Errors
    /// [`MediaError::Length`] if the length is no multiple of one frame.
    pub fn new(format: VideoFormat, rgb: &'a [f32]) -> Result<Self, MediaError> {
        if !rgb.len().is_multiple_of(format.frame_len()) {
            return Err(MediaError::Length {
                what: "chunk of frames",
                got: rgb.len(),
                expected: format!("a multiple of {}x{}x3", format.height, format.width),
            });
        }
        Ok(Self { format, rgb })
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.rgb.len() / self.format.frame_len()
    }

    /// Whether there is no frame.
    pub fn is_empty(&self) -> bool {
        self.rgb.is_empty()
    }

    /// The frames one by one, each `[h, w, 3]`.
    pub fn iter(&self) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        self.rgb.chunks_exact(self.format.frame_len())
    }
}

/// 8-bit RGB of float RGB: `trunc(clamp(v, 0, 1) · 255)`. NaN becomes 0.
pub fn to_rgb8(rgb: &[f32]) -> Vec<u8> {
    // A cast from float to integer truncates, saturates and maps NaN to 0.
    rgb.iter().map(|v| (v * 255.0) as u8).collect()
}

/// One 8-bit 4:2:0 picture: planes Y `[h, w]`, U and V `[h/2, w/2]`, packed in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct I420 {
    width: usize,
    height: usize,
    data: Vec<u8>,
}

impl I420 {
    /// A picture of zeros.
    ///
    /// # Errors
    /// [`MediaError::Limit`] if a side is 0, odd or above 16384.
    pub fn new(width: usize, height: usize) -> Result<Self, MediaError> {
        for (what, side) in [("frame width", width), ("frame height", height)] {
            if side == 0 || side % 2 != 0 || side > MAX_SIDE {
                return Err(MediaError::limit(
                    what,
                    side,
                    "H.264 with 4:2:0 chroma needs an even number up to 16384; crop the frames or write PNG frames",
                ));
            }
        }
        Ok(Self { width, height, data: vec![0; width * height * 3 / 2] })
    }

    /// Pixels per row of Y.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows of Y.
    pub fn height(&self) -> usize {
        self.height
    }

    /// All planes, packed.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The planes Y, U and V.
    pub fn planes(&self) -> (&[u8], &[u8], &[u8]) {
        let luma = self.width * self.height;
        let (y, uv) = self.data.split_at(luma);
        let (u, v) = uv.split_at(luma / 4);
        (y, u, v)
    }

    /// The planes Y, U and V, writable.
    pub fn planes_mut(&mut self) -> (&mut [u8], &mut [u8], &mut [u8]) {
        let luma = self.width * self.height;
        let (y, uv) = self.data.split_at_mut(luma);
        let (u, v) = uv.split_at_mut(luma / 4);
        (y, u, v)
    }

    /// Fills the picture with the BT.709 limited-range conversion of `rgb`, `[h, w, 3]` f32 in `[0, 1]`.
    ///
    /// Rounded matrix coefficients, chroma by the mean of 2×2 pixels, Y·219+16 and C·224+128 clamped to 0..255 and
    /// truncated, all in f32.
    ///
    /// # Errors
    /// [`MediaError::Length`] if `rgb` is not one frame of this size.
    ///
    /// Source: the video encoder of the reference (Lightricks/LTX-2 @ 400fd31).
    pub fn fill_bt709(&mut self, rgb: &[f32]) -> Result<(), MediaError> {
        let (width, expected) = (self.width, self.width * self.height * 3);
        if rgb.len() != expected {
            return Err(MediaError::Length { what: "frame", got: rgb.len(), expected: expected.to_string() });
        }
        let (y, u, v) = self.planes_mut();
        y.par_chunks_exact_mut(2 * width)
            .zip(u.par_chunks_exact_mut(width / 2))
            .zip(v.par_chunks_exact_mut(width / 2))
            .zip(rgb.par_chunks_exact(6 * width))
            .for_each(|(((y, u), v), rgb)| convert_row_pair(rgb, y, u, v));
        Ok(())
    }
}

/// Converts two rows of RGB into two rows of Y and one of U and V.
fn convert_row_pair(rgb: &[f32], y: &mut [u8], u: &mut [u8], v: &mut [u8]) {
    let width = u.len() * 2;
    let (top, bottom) = rgb.split_at(3 * width);
    let (y_top, y_bottom) = y.split_at_mut(width);
    for x in 0..u.len() {
        let (mut cb_sum, mut cr_sum) = (0.0, 0.0);
        for (rgb, y) in [(top, &mut *y_top), (bottom, &mut *y_bottom)] {
            for pixel in 2 * x..2 * x + 2 {
                let [r, g, b] = [rgb[3 * pixel], rgb[3 * pixel + 1], rgb[3 * pixel + 2]];
                y[pixel] = ((0.2126 * r + 0.7152 * g + 0.0722 * b) * 219.0 + 16.0) as u8;
                cb_sum += -0.1146 * r - 0.3854 * g + 0.5 * b;
                cr_sum += 0.5 * r - 0.4542 * g - 0.0458 * b;
            }
        }
        u[x] = (cb_sum * 0.25 * 224.0 + 128.0) as u8;
        v[x] = (cr_sum * 0.25 * 224.0 + 128.0) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_rate(text: &str, num: u32, den: u32) {
        let rate: Rational = text.parse().expect("a rate");
        assert_eq!((rate.num(), rate.den()), (num, den));
    }

    #[test]
    fn rates_are_exact() {
        check_rate("24", 24, 1);
        check_rate("24.0", 24, 1);
        check_rate("23.976", 24000, 1001);
        check_rate("23.98", 24000, 1001);
        check_rate("29.97", 30000, 1001);
        check_rate("59.94", 60000, 1001);
        check_rate("12.5", 25, 2);
        check_rate("48/2", 24, 1);
    }

    #[test]
    fn impossible_rates_are_errors() {
        for text in ["0", "-1", "nan", "inf", "1/0", "0/1", "", "x", "1e9", "4294967296/1"] {
            assert!(text.parse::<Rational>().is_err(), "{text}");
        }
    }

    #[test]
    fn rgb8_truncates_and_saturates() {
        assert_eq!(to_rgb8(&[0.0, 0.999, 1.0, 2.0, -1.0, f32::NAN, 0.5]), [0, 254, 255, 255, 0, 0, 127]);
    }

    #[track_caller]
    fn check_bt709(rgb: [f32; 3], want: [u8; 3]) {
        let mut picture = I420::new(2, 2).expect("even");
        picture.fill_bt709(&rgb.repeat(4)).expect("one frame");
        let (y, u, v) = picture.planes();
        assert_eq!((y, u, v), (&[want[0]; 4][..], &[want[1]][..], &[want[2]][..]));
    }

    #[test]
    fn bt709_has_the_known_corners() {
        check_bt709([0.0, 0.0, 0.0], [16, 128, 128]);
        // 0.2126·219+16 = 62.6; -0.1146·224+128 = 102.3; 0.5·224+128 = 240.
        check_bt709([1.0, 0.0, 0.0], [62, 102, 240]);
        check_bt709([0.0, 1.0, 0.0], [172, 41, 26]);
        check_bt709([0.0, 0.0, 1.0], [31, 240, 117]);
    }

    #[test]
    fn chroma_is_the_mean_of_four_pixels() {
        let mut picture = I420::new(2, 2).expect("even");
        picture.fill_bt709(&[1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]).expect("one frame");
        // (-0.1146 + 0.5)/4·224+128 = 149.6, (0.5 - 0.0458)/4·224+128 = 153.4.
        assert_eq!(picture.planes(), (&[62, 31, 16, 16][..], &[149][..], &[153][..]));
    }

    #[test]
    fn odd_and_empty_pictures_are_errors() {
        assert!(I420::new(3, 2).is_err());
        assert!(I420::new(0, 2).is_err());
        assert!(VideoFormat::new(0, 2, Rational { num: 24, den: 1 }).is_err());
    }

    #[test]
    fn a_cut_frame_is_an_error() {
        let format = VideoFormat::new(4, 2, Rational { num: 24, den: 1 }).expect("a format");
        assert!(Frames::new(format, &[0.0; 23]).is_err());
        assert_eq!(Frames::new(format, &[0.0; 48]).expect("two frames").len(), 2);
    }
}
