//! The HLG master of a video with a high dynamic range: 10-bit HEVC in MP4, for screens that show one.
//!
//! No encoder of this kind is embedded: `ffmpeg` with libx265 writes it. What the numbers are is decided here.
//!
//! Source: spec/media-io §6; ITU-R BT.2100 (HLG, Y'CbCr), BT.2087 (primaries).

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};

use super::ffmpeg::{Ffmpeg, file_arg};
use super::partial::part_name;
use super::{Audio, ColourSpace, MediaError, Rational};

/// Rows of the matrix that turns BT.709 into BT.2020.
const BT709_TO_BT2020: [[f64; 3]; 3] = [
    [0.627_403_89, 0.329_283_04, 0.043_313_07],
    [0.069_097_29, 0.919_540_40, 0.011_362_32],
    [0.016_391_44, 0.088_013_31, 0.895_595_25],
];

/// The curve of HLG.
const A: f64 = 0.178_832_77;
const B: f64 = 0.284_668_92;
const C: f64 = 0.559_910_73;

/// The signal of diffuse white.
const WHITE: f64 = 0.75;

/// Weights of red and blue in the luma of BT.2020.
const KR: f64 = 0.2627;
const KB: f64 = 0.0593;

/// Diffuse white as a share of the brightest light: the inverse of the curve at its signal.
fn white_light() -> f64 {
    (((WHITE - C) / A).exp() + B) / 12.0
}

/// The HLG signals in `[0, 1]` of light with the primaries of BT.709, where 1 is diffuse white. What is brighter than that
/// is rolled off. `white` is [`white_light`], which is the same for all pixels.
fn signals(light: [f32; 3], white: f64) -> [f64; 3] {
    let k = white / (1.0 - white);
    BT709_TO_BT2020.map(|row| {
        let l: f64 = row.iter().zip(light).map(|(c, v)| c * f64::from(v)).sum();
        let l = if l > 0.0 { l } else { 0.0 };
        let scene = if l <= 1.0 { white * l } else { 1.0 - (1.0 - white) * (-k * (l - 1.0)).exp() };
        if scene <= 1.0 / 12.0 { (3.0 * scene).sqrt() } else { A * (12.0 * scene - B).ln() + C }
    })
}

/// Luma in `[0, 1]` and both colour differences in `[−½, ½]`.
fn luma_chroma([r, g, b]: [f64; 3]) -> [f64; 3] {
    let y = KR * r + (1.0 - KR - KB) * g + KB * b;
    [y, (b - y) / (2.0 * (1.0 - KB)), (r - y) / (2.0 * (1.0 - KR))]
}

/// A frame of light, `[h, w, 3]` with even sides, as planes of 10 bits in limited range; colours have half the resolution.
pub fn planes(light: &[f32], (width, height): (usize, usize)) -> Vec<u8> {
    let white = white_light();
    let pixels: Vec<[f64; 3]> = light.as_chunks::<3>().0.iter().map(|&rgb| luma_chroma(signals(rgb, white))).collect();
    let code = |value: f64, (from, range): (f64, f64)| (from + range * value).round() as u16;
    let mut bytes: Vec<u8> = Vec::with_capacity(pixels.len() * 3);
    bytes.extend(pixels.iter().flat_map(|p| code(p[0], (64.0, 876.0)).to_le_bytes()));
    for chroma in [1, 2] {
        for y in (0..height).step_by(2) {
            for x in (0..width).step_by(2) {
                let at = y * width + x;
                let sum: f64 = [at, at + 1, at + width, at + width + 1].iter().map(|&i| pixels[i][chroma]).sum();
                bytes.extend(code(sum / 4.0, (512.0, 896.0)).to_le_bytes());
            }
        }
    }
    bytes
}

/// A master that is being written. It appears under its name when complete; dropping it removes it.
pub struct HlgMaster {
    ffmpeg: Ffmpeg,
    child: Child,
    frames: Option<ChildStdin>,
    sound: Option<Audio>,
    path: PathBuf,
    part: PathBuf,
    space: ColourSpace,
    size: (usize, usize),
}

impl HlgMaster {
    /// A master of frames of signals of this space and even size.
    ///
    /// # Errors
    /// [`MediaError::NoEncoder`] without `ffmpeg` or its encoder, [`MediaError::Limit`] if a side is odd.
    pub fn create(path: &Path, size: (usize, usize), rate: Rational, space: ColourSpace) -> Result<Self, MediaError> {
        for (what, side) in [("frame width", size.0), ("frame height", size.1)] {
            if !side.is_multiple_of(2) {
                return Err(MediaError::limit(what, side, "an HLG master has even sides"));
            }
        }
        let found = Ffmpeg::find().filter(Ffmpeg::has_x265);
        let ffmpeg = found.ok_or_else(|| MediaError::NoEncoder { path: path.to_path_buf() })?;
        let part = part_name(path);
        let mut args: Vec<OsString> = format!(
            "-y -f rawvideo -pix_fmt yuv420p10le -s {}x{} -r {rate} -i pipe:0 -c:v libx265 -preset ultrafast -crf 12 \
             -x265-params log-level=error -pix_fmt yuv420p10le -color_primaries bt2020 -color_trc arib-std-b67 \
             -colorspace bt2020nc -color_range tv -tag:v hvc1 -movflags +faststart -f mp4",
            size.0, size.1
        )
        .split_whitespace()
        .map(OsString::from)
        .collect();
        args.push(file_arg(&part));
        let mut child = ffmpeg.spawn(ffmpeg.program(), &args, Stdio::piped())?;
        let frames = child.stdin.take();
        Ok(HlgMaster { ffmpeg, child, frames, sound: None, path: path.to_path_buf(), part, space, size })
    }

    /// Writes a frame of signals, `[h, w, 3]`.
    ///
    /// # Errors
    /// What `ffmpeg` says.
    pub fn write_frame(&mut self, signals: &[f32]) -> Result<(), MediaError> {
        let light: Vec<f32> = signals.as_chunks::<3>().0.iter().flat_map(|&rgb| self.space.light(rgb)).collect();
        let bytes = planes(&light, self.size);
        match self.frames.as_mut().map(|pipe| pipe.write_all(&bytes)) {
            Some(Ok(())) => Ok(()),
            // The exit status explains a broken pipe better than the pipe does.
            _ => self.end().and(Err(MediaError::NoEncoder { path: self.path.clone() })),
        }
    }

    /// Keeps the sound for the end.
    pub fn write_sound(&mut self, sound: Audio) {
        self.sound = Some(sound);
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    /// What `ffmpeg` says, or a file that cannot be renamed.
    pub fn finish(mut self) -> Result<PathBuf, MediaError> {
        self.end()?;
        if let Some(sound) = self.sound.take() {
            let silent = self.part.with_extension("silent");
            std::fs::rename(&self.part, &silent).map_err(|e| MediaError::io("rename", &self.part, e))?;
            let joined = self.ffmpeg.join_sound(&silent, &sound, &self.part);
            let _ = std::fs::remove_file(&silent);
            joined?;
        }
        std::fs::rename(&self.part, &self.path).map_err(|e| MediaError::io("rename", &self.part, e))?;
        Ok(self.path.clone())
    }

    /// Closes the pipe and waits for the program.
    fn end(&mut self) -> Result<(), MediaError> {
        self.frames = None;
        self.ffmpeg.wait("writing the HLG master", &mut self.child)
    }
}

impl Drop for HlgMaster {
    fn drop(&mut self) {
        self.frames = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Renamed by now if it was finished.
        let _ = std::fs::remove_file(&self.part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of BT.2100 and of the curve's own definition.
    #[test]
    fn white_grey_and_light_beyond_white_have_their_signals() {
        let signals = |light: f32| signals([light; 3], white_light());
        let near = |light: f32, signal: f64| {
            let found = signals(light);
            assert!(found.iter().all(|s| (s - signal).abs() < 2e-6), "{light}: {found:?}, expected {signal}");
        };
        near(1.0, 0.75);
        near(0.0, 0.0);
        near(-1.0, 0.0);
        near(f32::NAN, 0.0);
        // White is at 0.264963 of the range; a tenth of it lies on the root: √(3 · 0.0264963).
        near(0.1, 0.281_939);
        // The roll-off continues the slope at white and ends at the whole range.
        near(1e9, 1.0);
        let slope = |a: f32, b: f32| (signals(b)[0] - signals(a)[0]) / f64::from(b - a);
        assert!((slope(0.999, 1.0) / slope(1.0, 1.001) - 1.0).abs() < 5e-3);
    }

    #[test]
    fn odd_sides_are_refused() {
        let create =
            |size| HlgMaster::create(Path::new("a.mp4"), size, Rational::new(24, 1).unwrap(), ColourSpace::LogC3);
        for (size, side) in [((3, 2), "width"), ((2, 1), "height")] {
            let problem = create(size).err().expect("no such master").to_string();
            assert!(problem.contains(side) && problem.contains("even"), "{problem}");
        }
    }

    #[test]
    fn planes_are_limited_range_with_colours_of_half_size() {
        let words = |light: &[f32], size| -> Vec<u16> {
            planes(light, size).as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect()
        };
        // Black, and white at ¾ of 876 above 64.
        assert_eq!(words(&[0.0; 12], (2, 2)), [64, 64, 64, 64, 512, 512]);
        assert_eq!(words(&[1.0; 12], (2, 2)), [721, 721, 721, 721, 512, 512]);
        // A red pixel among black ones has a quarter of its colour difference.
        let mut light = [0.0; 12];
        light[0] = 1.0;
        let (alone, all) = (words(&light, (2, 2)), words(&[1.0, 0.0, 0.0].repeat(4), (2, 2)));
        assert_eq!(alone[0], all[0]);
        assert!((f64::from(alone[5]) - 512.0 - (f64::from(all[5]) - 512.0) / 4.0).abs() <= 0.5, "{alone:?} {all:?}");
    }
}
