//! OpenEXR frames: pictures with a high dynamic range, in and out.
//!
//! Read is the first layer with the channels R, G and B, as whatever numbers it has; a sequence is a folder of files, or
//! one file. Written are `frame_00000.exr` and so on: 16-bit floats in lines that are compressed without loss, with the
//! primaries in the header.

use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};

use exr::meta::attribute::Chromaticities;
use exr::prelude::traits::{ReadChannels, ReadLayers, ReadSpecificChannel, WritableImage};
use exr::prelude::{Encoding, Image, Layer, LayerAttributes, MetaData, SpecificChannels, Text, Vec2, f16};

use super::hdr::ColourSpace;
use super::image_input::{padded, resampled};
use super::video_input::files_of_folder;
use super::{ClipInfo, ClipRate, MediaError};

/// Largest side of a picture that is read.
const MAX_SIDE: usize = 1 << 14;

/// What no lossless compression reaches: a pixel has 6 bytes or more, of which deflate makes a thousandth at best.
const MOST_PIXELS_PER_BYTE: u64 = 1 << 10;

/// A picture in floats.
#[derive(Debug, Clone, PartialEq)]
pub struct FloatImage {
    /// Pixels per row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[h, w, 3]`.
    pub rgb: Vec<f32>,
}

impl FloatImage {
    /// Resizes a signal in `[0, 1]` to cover `width` × `height`, crops the centre and maps it to `[-1, 1]`, as
    /// [`super::resize_and_crop`] does with bytes.
    ///
    /// # Errors
    /// Those of [`super::resize_and_crop`].
    pub fn resize_and_crop(&self, width: usize, height: usize) -> Result<Vec<f32>, MediaError> {
        let mut out = resampled([self.width, self.height], |i| self.rgb[i], [width, height])?;
        out.iter_mut().for_each(|v| *v = *v * 2.0 - 1.0);
        Ok(out)
    }

    /// Shrinks and pads a signal in `[0, 1]` and maps it to `[-1, 1]`, as [`super::shrink_and_pad`] does with bytes.
    ///
    /// # Errors
    /// Those of [`super::shrink_and_pad`].
    pub fn shrink_and_pad(&self, width: usize, height: usize) -> Result<Vec<f32>, MediaError> {
        let mut out = padded([self.width, self.height], |i| self.rgb[i], [width, height])?;
        out.iter_mut().for_each(|v| *v = *v * 2.0 - 1.0);
        Ok(out)
    }
}

/// Whether a path is that of an EXR file, or of a folder that holds some.
pub fn is_exr(path: &Path) -> bool {
    match path.is_dir() {
        true => files_of_folder(path, &["exr"]).is_ok_and(|files| !files.is_empty()),
        false => path.extension().is_some_and(|e| e.eq_ignore_ascii_case("exr")),
    }
}

/// A sequence of EXR files that was opened.
#[derive(Debug)]
pub struct ExrSequence {
    files: Vec<PathBuf>,
    info: ClipInfo,
}

impl ExrSequence {
    /// Opens a folder of EXR files, in the order of their numbers, or a single one, and reads the first.
    ///
    /// # Errors
    /// [`MediaError::Input`] if there is none, or the first cannot be used.
    pub fn open(path: &Path) -> Result<ExrSequence, MediaError> {
        let files = match path.is_dir() {
            true => files_of_folder(path, &["exr"])?,
            false => vec![path.to_path_buf()],
        };
        let Some(first) = files.first() else {
            return Err(MediaError::input(path, "the folder holds no EXR files".to_owned()));
        };
        let FloatImage { width, height, .. } = read(first)?;
        let info = ClipInfo { width, height, rate: ClipRate::Free, frames: files.len() };
        Ok(ExrSequence { files, info })
    }

    /// Size and length.
    pub fn info(&self) -> ClipInfo {
        self.info
    }

    /// Hands on the first `frames` pictures, or all if there are not as many, as signals in `[0, 1]`; returns their number.
    ///
    /// # Errors
    /// A file that cannot be used, or has another size than the first, and what `sink` returns.
    pub fn read(
        &self,
        frames: usize,
        space: ColourSpace,
        sink: &mut dyn FnMut(&FloatImage) -> Result<(), MediaError>,
    ) -> Result<usize, MediaError> {
        self.read_numbers(frames, &mut |mut image| {
            image.rgb.as_chunks_mut::<3>().0.iter_mut().for_each(|rgb| *rgb = space.to_signal(*rgb));
            sink(&image)
        })
    }

    /// The same with the numbers that stand in the files.
    ///
    /// # Errors
    /// Those of [`ExrSequence::read`].
    pub fn read_numbers(
        &self,
        frames: usize,
        sink: &mut dyn FnMut(FloatImage) -> Result<(), MediaError>,
    ) -> Result<usize, MediaError> {
        let ClipInfo { width, height, .. } = self.info;
        let count = frames.min(self.files.len());
        for file in &self.files[..count] {
            let image = read(file)?;
            if (image.width, image.height) != (width, height) {
                let (found, expected) = ((image.width, image.height), (width, height));
                let problem = format!("it is {}x{}, the first frame {}x{}", found.0, found.1, expected.0, expected.1);
                return Err(MediaError::input(file, problem));
            }
            sink(image)?;
        }
        Ok(count)
    }
}

/// Reads a file.
///
/// # Errors
/// [`MediaError::Io`] or [`MediaError::Input`] if it cannot be read, is damaged, too large, cropped, or has no colours.
pub fn read(path: &Path) -> Result<FloatImage, MediaError> {
    let failed = |error| MediaError::io("read", path, error);
    let problem = |problem: String| MediaError::input(path, problem);
    let unreadable =
        |error: exr::error::Error| problem(format!("{error}; EXR files with the channels R, G and B are read"));
    let file = std::fs::File::open(path).map_err(failed)?;
    let most_pixels = file.metadata().map_err(failed)?.len().saturating_mul(MOST_PIXELS_PER_BYTE);
    // Before anything is read that takes memory.
    let meta = MetaData::read_from_unbuffered(&file, false).map_err(unreadable)?;
    for size in meta.headers.iter().map(|header| header.layer_size) {
        let (width, height) = (size.width(), size.height());
        if !(1..=MAX_SIDE).contains(&width) || !(1..=MAX_SIDE).contains(&height) {
            return Err(problem(format!("it is {width}x{height}, sides may have 1 to {MAX_SIDE} pixels")));
        }
        if size.area() as u64 > most_pixels {
            return Err(problem(format!("it says that it is {width}x{height}, but is too short; write it again")));
        }
    }
    (&file).rewind().map_err(failed)?;
    let create = |size: Vec2<usize>, _: &_| (size.width(), vec![0f32; size.area() * 3]);
    let set = |(width, rgb): &mut (usize, Vec<f32>), at: Vec2<usize>, (r, g, b): (f32, f32, f32)| {
        if let Some(pixel) = rgb.get_mut((at.y() * *width + at.x()) * 3..).and_then(|rest| rest.get_mut(..3)) {
            pixel.copy_from_slice(&[r, g, b]);
        }
    };
    let image = exr::prelude::read().no_deep_data().largest_resolution_level().specific_channels();
    let image = image.required("R").required("G").required("B").collect_pixels(create, set);
    let image = image.first_valid_layer().all_attributes().from_unbuffered(file).map_err(unreadable)?;
    let (layer, display) = (&image.layer_data, image.attributes.display_window);
    let (width, height) = (layer.size.width(), layer.size.height());
    if layer.attributes.layer_position != display.position || layer.size != display.size {
        let shown = format!("{}x{}", display.size.width(), display.size.height());
        return Err(problem(format!("it holds {width}x{height} of {shown} pixels; write it without cropping")));
    }
    let (_, rgb) = image.layer_data.channel_data.pixels;
    Ok(FloatImage { width, height, rgb })
}

/// Writes a picture, `rgb` `[h, w, 3]` in `space`.
///
/// # Errors
/// What `dst` reports, and an error if `rgb` has another length.
pub fn write(
    (width, height): (usize, usize),
    rgb: &[f32],
    space: ColourSpace,
    dst: &mut (impl Write + Seek),
) -> io::Result<()> {
    if rgb.is_empty() || width.checked_mul(height).and_then(|n| n.checked_mul(3)) != Some(rgb.len()) {
        return Err(io::Error::other(format!("{} values are no picture of {width}x{height}", rgb.len())));
    }
    let pixel = |at: Vec2<usize>| {
        let [r, g, b] = [0, 1, 2].map(|c| f16::from_f32(rgb[(at.y() * width + at.x()) * 3 + c]));
        (r, g, b)
    };
    let layer = Layer::new(
        (width, height),
        LayerAttributes { software_name: Some(Text::from("ltxc")), ..LayerAttributes::default() },
        Encoding::SMALL_LOSSLESS,
        SpecificChannels::rgb(pixel),
    );
    let mut image = Image::from_layer(layer);
    let [red, green, blue, white] = space.primaries().map(|(x, y)| Vec2(x, y));
    image.attributes.chromaticities = Some(Chromaticities { red, green, blue, white });
    image.write().to_unbuffered(dst).map_err(|error| match error {
        exr::error::Error::Io(error) => error,
        other => io::Error::other(other),
    })
}

/// File name of frame `index`, counted from 0.
pub fn frame_name(index: u64) -> String {
    format!("frame_{index:05}.exr")
}

/// Whether [`frame_name`] makes this name.
pub fn is_frame_name(name: &str) -> bool {
    let digits = name.strip_prefix("frame_").and_then(|rest| rest.strip_suffix(".exr"));
    digits.is_some_and(|digits| digits.len() >= 5 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: usize, height: usize) -> Vec<f32> {
        (0..width * height * 3).map(|i| f16::from_f32(i as f32 * 0.37 - 2.0).to_f32()).collect()
    }

    fn write_to(path: &Path, width: usize, height: usize, space: ColourSpace) {
        let mut file = std::fs::File::create(path).expect("created");
        write((width, height), &picture(width, height), space, &mut file).expect("written");
    }

    #[test]
    fn half_floats_are_lossless() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(frame_name(7));
        assert!(is_frame_name("frame_00007.exr") && !is_frame_name("frame_00007.png") && !is_frame_name("frame_7.exr"));
        write_to(&path, 5, 3, ColourSpace::AcesCg);
        assert_eq!(read(&path).expect("read"), FloatImage { width: 5, height: 3, rgb: picture(5, 3) });
        let header = exr::prelude::MetaData::read_from_file(&path, true).expect("a header").headers[0].clone();
        assert_eq!(header.shared_attributes.chromaticities.map(|c| c.red), Some(Vec2(0.713, 0.293)));
        let mut nowhere = io::Cursor::new(Vec::new());
        assert!(write((5, 4), &picture(5, 3), ColourSpace::AcesCg, &mut nowhere).is_err());
    }

    #[test]
    fn sequences_are_read_in_the_order_of_their_numbers() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(!is_exr(folder.path()));
        assert!(ExrSequence::open(folder.path()).is_err());
        for (name, width) in [("f2.exr", 4), ("f10.exr", 4), ("f1.EXR", 4)] {
            write_to(&folder.path().join(name), width, 2, ColourSpace::AcesCct);
        }
        assert!(is_exr(folder.path()) && is_exr(&folder.path().join("f2.exr")));
        let sequence = ExrSequence::open(folder.path()).expect("a sequence");
        let names: Vec<_> = sequence.files.iter().filter_map(|f| f.file_name()?.to_str()).collect();
        assert_eq!(names, ["f1.EXR", "f2.exr", "f10.exr"]);
        let info = sequence.info();
        assert_eq!((info.width, info.height, info.frames), (4, 2, 3));
        let load = |sequence: &ExrSequence, frames: usize| {
            let mut found = Vec::new();
            let read = sequence.read(frames, ColourSpace::AcesCct, &mut |image| {
                found.extend(image.resize_and_crop(4, 2)?);
                Ok(())
            });
            read.map(|count| (count, found))
        };
        // From signals in [0, 1] to what models see.
        let expected: Vec<f32> = picture(4, 2).iter().map(|v| v.clamp(0.0, 1.0) * 2.0 - 1.0).collect();
        assert_eq!(load(&sequence, 2).expect("read"), (2, [expected.clone(), expected].concat()));
        write_to(&folder.path().join("f11.exr"), 6, 2, ColourSpace::AcesCct);
        let sequence = ExrSequence::open(folder.path()).expect("a sequence");
        let problem = load(&sequence, 4).expect_err("another size").to_string();
        assert!(problem.contains("f11.exr") && problem.contains("6x2"), "{problem}");
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.exr");
        std::fs::write(&path, b"no picture at all").expect("written");
        assert!(read(&path).expect_err("damaged").to_string().contains("a.exr"));
        write_to(&path, 8, 8, ColourSpace::AcesCg);
        let bytes = std::fs::read(&path).expect("read");
        for end in [8, 100, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..end]).expect("written");
            assert!(read(&path).is_err(), "{end} of {} bytes", bytes.len());
        }
        assert!(read(&folder.path().join("nowhere.exr")).is_err());
    }
}
