//! Clips as input: H.264 in MP4 or MOV, folders of images, and through `ffmpeg` everything else.
//!
//! A clip is opened once, which tells its size, rate and length, and then read from any time on, picture by picture.
//! Pictures come upright and as 8-bit RGB. The parsers of common crates index past the ends of damaged tables, hence
//! [`mp4::demux`].
//!
//! # Rates
//! Rates are exact fractions, found from the times of all pictures and not from what a header claims. A run never
//! changes the rate of a clip: a mismatch is an error. Two kinds of clip have no rate that could mismatch: a folder of
//! images, and a clip whose rate varies (as telephones record). Its pictures are taken at the times of the run's frames.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::colour::Colour;
use super::ffmpeg::{Ffmpeg, RateOf};
use super::h264::{Decoder, Sps};
use super::mp4::{self, H264Track};
use super::{MediaError, Rational, RgbImage, load_image, resize_and_crop};
use crate::files::map_file;

/// Extensions of the images of a folder.
const IMAGE_EXTENSIONS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// Times closer than this many seconds are equal: far above rounding, far below a frame.
const SAME_TIME: f64 = 1e-6;

/// Frames by which times may be off that are rounded to milliseconds.
pub(super) const ROUNDING: f64 = 0.3;

/// A clip that was opened.
#[derive(Debug)]
pub struct Clip {
    path: PathBuf,
    info: ClipInfo,
    kind: Kind,
}

/// What a clip is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipInfo {
    /// Pixels per row, when upright.
    pub width: usize,
    /// Rows, when upright.
    pub height: usize,
    /// Frames per second.
    pub rate: ClipRate,
    /// Number of pictures.
    pub frames: usize,
}

/// The rate of a clip.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ClipRate {
    /// Every picture has the same duration.
    Constant(Rational),
    /// Pictures have different durations; this is their number divided by the length of the clip.
    Variable(f64),
    /// Images without times.
    Free,
}

impl ClipInfo {
    /// How many frames of a run at `rate` it is long: its pictures, unless these are chosen by their times.
    pub fn frames_at(&self, rate: Rational) -> usize {
        match self.rate {
            ClipRate::Variable(mean) if mean > 0.0 => {
                (self.frames as f64 / mean * rate.to_f64() + ROUNDING).floor() as usize
            }
            _ => self.frames,
        }
    }
}

#[derive(Debug)]
enum Kind {
    H264(Box<H264File>),
    Images(Vec<PathBuf>),
    Ffmpeg(Ffmpeg),
}

#[derive(Debug)]
struct H264File {
    map: Mmap,
    track: H264Track,
    colour: Colour,
    /// Time of every picture that is shown, in ticks and ascending.
    times: Vec<i64>,
    /// Duration of the last picture, in ticks.
    last_ticks: u32,
}

/// Which frames of a clip are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// Frames per second of the run.
    pub rate: Rational,
    /// Where the first frame is, in seconds.
    pub start_seconds: f64,
    /// Most frames.
    pub frames: usize,
}

impl Clip {
    /// Opens a clip and looks at its description; of H.264, also at its first picture.
    ///
    /// # Errors
    /// [`MediaError::Input`] if it is damaged or holds no pictures, [`MediaError::NeedsFfmpeg`] if only the absent ffmpeg
    /// could read it, [`MediaError::Io`] if it cannot be read at all.
    pub fn open(path: &Path) -> Result<Clip, MediaError> {
        let clip = |info, kind| Clip { path: path.to_path_buf(), info, kind };
        if path.is_dir() {
            let (info, images) = open_images(path, files_of_folder(path, &IMAGE_EXTENSIONS)?)?;
            return Ok(clip(info, Kind::Images(images)));
        }
        if has_extension(path, &IMAGE_EXTENSIONS) {
            let (info, images) = open_images(path, vec![path.to_path_buf()])?;
            return Ok(clip(info, Kind::Images(images)));
        }
        match H264File::open(path)? {
            Ok((file, info)) => Ok(clip(info, Kind::H264(Box::new(file)))),
            Err(reason) => {
                let Some(ffmpeg) = Ffmpeg::find() else {
                    return Err(MediaError::NeedsFfmpeg { path: path.to_path_buf(), reason });
                };
                let info = ffmpeg.probe(path)?;
                Ok(clip(info, Kind::Ffmpeg(ffmpeg)))
            }
        }
    }

    /// Size, rate and length.
    pub fn info(&self) -> ClipInfo {
        self.info
    }

    /// Hands on the pictures of a window in order, and returns how many there were: fewer than asked for at the end of the
    /// clip.
    ///
    /// # Errors
    /// [`MediaError::RateMismatch`] if the clip has another rate than the window, [`MediaError::Input`] if it is damaged,
    /// and what `sink` returns.
    pub fn read(
        &self,
        window: Window,
        sink: &mut dyn FnMut(&RgbImage) -> Result<(), MediaError>,
    ) -> Result<usize, MediaError> {
        if !window.start_seconds.is_finite() || window.start_seconds < 0.0 {
            return Err(MediaError::limit("start time", window.start_seconds, "it must be a time of 0 s or later"));
        }
        if let ClipRate::Constant(found) = self.info.rate
            && found != window.rate
        {
            let path = self.path.clone();
            return Err(MediaError::RateMismatch { path, found, wanted: window.rate });
        }
        if window.frames == 0 {
            return Ok(0);
        }
        match &self.kind {
            Kind::H264(file) => file.read(&self.path, self.info.rate, window, sink),
            Kind::Images(images) => self.read_images(images, window, sink),
            Kind::Ffmpeg(ffmpeg) => self.read_ffmpeg(ffmpeg, window, sink),
        }
    }

    /// The frames of a window, fitted to a size: `[n, height, width, 3]` f32 in `[-1, 1]`.
    ///
    /// # Errors
    /// Those of [`Clip::read`] and of [`resize_and_crop`].
    pub fn load(&self, window: Window, width: usize, height: usize) -> Result<Vec<f32>, MediaError> {
        let mut frames = Vec::new();
        self.read(window, &mut |image| {
            frames.extend(resize_and_crop(image, width, height)?);
            Ok(())
        })?;
        Ok(frames)
    }

    /// The first picture at or behind the start of a window.
    fn first(window: Window) -> usize {
        (window.start_seconds * window.rate.to_f64() - SAME_TIME).ceil().max(0.0) as usize
    }

    fn read_images(
        &self,
        images: &[PathBuf],
        window: Window,
        sink: &mut dyn FnMut(&RgbImage) -> Result<(), MediaError>,
    ) -> Result<usize, MediaError> {
        let mut count = 0;
        for path in images.iter().skip(Self::first(window)).take(window.frames) {
            let image = load_image(path)?;
            if (image.width(), image.height()) != (self.info.width, self.info.height) {
                return Err(MediaError::input(
                    path,
                    format!(
                        "the image is {}x{}, the first of the folder {}x{}; a clip has one size",
                        image.width(),
                        image.height(),
                        self.info.width,
                        self.info.height
                    ),
                ));
            }
            sink(&image)?;
            count += 1;
        }
        Ok(count)
    }

    fn read_ffmpeg(
        &self,
        ffmpeg: &Ffmpeg,
        window: Window,
        sink: &mut dyn FnMut(&RgbImage) -> Result<(), MediaError>,
    ) -> Result<usize, MediaError> {
        let first = Self::first(window);
        let rate = match self.info.rate {
            ClipRate::Variable(_) => RateOf::Run(window.rate),
            _ => RateOf::Clip,
        };
        let (mut index, mut count) = (0, 0);
        let size = (self.info.width, self.info.height);
        ffmpeg.read_video(&self.path, size, rate, first.saturating_add(window.frames), &mut |image| {
            index += 1;
            if index > first {
                count += 1;
                sink(image)?;
            }
            Ok(())
        })?;
        Ok(count)
    }
}

/// What `images` are as a clip; they are those of the folder `path`, or `path` itself.
fn open_images(path: &Path, images: Vec<PathBuf>) -> Result<(ClipInfo, Vec<PathBuf>), MediaError> {
    let Some(first) = images.first() else {
        return Err(MediaError::input(path, "the folder holds no PNG, JPEG or WebP images".to_owned()));
    };
    let image = load_image(first)?;
    let info = ClipInfo { width: image.width(), height: image.height(), rate: ClipRate::Free, frames: images.len() };
    Ok((info, images))
}

/// The files of a folder with one of these extensions, in the order of their numbers.
pub(super) fn files_of_folder(path: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, MediaError> {
    let failed = |error| MediaError::io("read", path, error);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if has_extension(&file, extensions) {
            files.push(file);
        }
    }
    files.sort_by_cached_key(|file| natural_key(&file.file_name().unwrap_or_default().to_string_lossy()));
    Ok(files)
}

fn has_extension(file: &Path, extensions: &[&str]) -> bool {
    let extension = file.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    extension.is_some_and(|e| extensions.contains(&e.as_str()))
}

/// A name as text and numbers, so that `f2` comes before `f10`.
fn natural_key(name: &str) -> Vec<(String, u128)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (word, tail) = rest.split_at(text);
        let (digits, tail) = tail.split_at(tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len()));
        key.push((word.to_owned(), digits.parse().unwrap_or(0)));
        rest = tail;
    }
    key
}

impl H264File {
    /// Opens a file of H.264 pictures; `Err` within says why it is none that can be decoded here.
    fn open(path: &Path) -> Result<Result<(H264File, ClipInfo), String>, MediaError> {
        let map = map_file(path).map_err(|error| MediaError::io("read", path, error))?;
        let damaged = |error: MediaError| MediaError::input(path, error.to_string());
        let track = match mp4::demux(&map).map_err(damaged)? {
            None => return Ok(Err("it is neither MP4 nor MOV".to_owned())),
            Some(source) => match source.video {
                None => return Err(MediaError::input(path, "it has no video track".to_owned())),
                Some(Err(reason)) => return Ok(Err(reason)),
                Some(Ok(track)) => track,
            },
        };
        let sps = track.parameter_sets.iter().find_map(|nal| Sps::parse(nal));
        if let Some(reason) = sps.and_then(|sps| sps.unsupported) {
            return Ok(Err(reason.to_owned()));
        }
        // The stream is closer to the pictures than the box, which may have been added later.
        let colour = sps.and_then(|sps| sps.colour).or(track.colour).unwrap_or(Colour::UNSPECIFIED);
        let mut times: Vec<i64> = track.samples.iter().filter(|s| s.is_shown).map(|s| s.time).collect();
        times.sort_unstable();
        if times.is_empty() {
            return Err(MediaError::input(path, "its edit list shows no picture".to_owned()));
        }
        let last_ticks = track.samples.last().map_or(1, |sample| sample.duration).max(1);
        let rate = rate_of(&times, track.ticks_per_second, last_ticks);
        let file = H264File { map, track, colour, times, last_ticks };
        let mut size = None;
        file.decode(path, &mut |_, image| {
            size = Some((image.width(), image.height()));
            Ok(false)
        })?;
        let (width, height) = size.ok_or_else(|| MediaError::input(path, "it holds no picture".to_owned()))?;
        let info = ClipInfo { width, height, rate, frames: file.times.len() };
        Ok(Ok((file, info)))
    }

    /// Decodes pictures in the order in which they are shown, until `sink` has had enough. `sink` gets the number of a
    /// picture among those that are shown.
    fn decode(
        &self,
        path: &Path,
        sink: &mut dyn FnMut(usize, RgbImage) -> Result<bool, MediaError>,
    ) -> Result<(), MediaError> {
        let mut decoder = Decoder::new(&self.track.parameter_sets, self.track.length_bytes)?;
        // Pictures that went in and did not come out yet, in the order in which they will.
        let mut waiting = BTreeSet::new();
        let mut size = None;
        let mut shown = 0;
        let total = self.track.samples.len();
        for (index, sample) in self.track.samples.iter().enumerate() {
            let at = |error: MediaError| {
                MediaError::input(path, format!("picture {} of {total} cannot be decoded: {error}", index + 1))
            };
            waiting.insert((sample.time, index));
            decoder.push(&self.map[sample.bytes.clone()]).map_err(at)?;
            if index + 1 == total {
                decoder.finish().map_err(at)?;
            }
            while let Some(picture) = decoder.take_ready() {
                let this = (picture.width(), picture.height());
                if *size.get_or_insert(this) != this {
                    return Err(at(MediaError::codec("h264 decoder", "the size of the pictures changes")));
                }
                let Some((_, number)) = waiting.pop_first() else {
                    return Err(at(MediaError::codec("h264 decoder", "there are more pictures than samples")));
                };
                if !self.track.samples[number].is_shown {
                    continue;
                }
                let image = self.colour.to_rgb(&picture)?.turned(self.track.quarter_turns);
                if !sink(shown, image)? {
                    return Ok(());
                }
                shown += 1;
            }
        }
        if shown < self.times.len() {
            let problem = format!("only {shown} of {} pictures can be decoded; it is damaged", self.times.len());
            return Err(MediaError::input(path, problem));
        }
        Ok(())
    }

    fn read(
        &self,
        path: &Path,
        rate: ClipRate,
        window: Window,
        sink: &mut dyn FnMut(&RgbImage) -> Result<(), MediaError>,
    ) -> Result<usize, MediaError> {
        let picks = picks(&self.times, self.track.ticks_per_second, self.last_ticks, rate, window);
        let mut count = 0;
        if !picks.is_empty() {
            self.decode(path, &mut |index, image| {
                while picks.get(count) == Some(&index) {
                    sink(&image)?;
                    count += 1;
                }
                Ok(count < picks.len())
            })?;
        }
        Ok(count)
    }
}

/// The pictures that the frames of a window show, by their number in `times`.
fn picks(times: &[i64], ticks_per_second: u32, last_ticks: u32, rate: ClipRate, window: Window) -> Vec<usize> {
    let seconds = |ticks: i64| ticks as f64 / f64::from(ticks_per_second);
    // Times in a file are rounded to ticks.
    let slack = 0.5 / f64::from(ticks_per_second) + SAME_TIME;
    let begun = |time: f64| times.partition_point(|t| seconds(*t) <= time + slack);
    if let ClipRate::Constant(_) = rate {
        let first = times.partition_point(|t| seconds(*t) < window.start_seconds - slack);
        return (first..times.len()).take(window.frames).collect();
    }
    let end = times.last().map_or(0.0, |last| seconds(last.saturating_add(last_ticks.into())));
    let frame_times = (0..window.frames).map(|k| window.start_seconds + k as f64 / window.rate.to_f64());
    frame_times.take_while(|time| time + slack < end).map(|time| begun(time).saturating_sub(1)).collect()
}

/// The rate that explains `times`, which are ascending and not empty.
///
/// Times are rounded to ticks, or cut; a usual rate that fits is preferred to an odd one that fits better.
fn rate_of(times: &[i64], ticks_per_second: u32, last_ticks: u32) -> ClipRate {
    let intervals = times.len() as u64 - 1;
    let span = times[times.len() - 1].abs_diff(times[0]);
    let (num, den) = match intervals {
        0 => (u64::from(ticks_per_second), u64::from(last_ticks)),
        _ => (intervals * u64::from(ticks_per_second), span),
    };
    let mean = num as f64 / den.max(1) as f64;
    // From time 0 to the end of the last picture, as frames of a run are counted.
    let length = times[times.len() - 1].saturating_add(last_ticks.into()).max(1) as f64 / f64::from(ticks_per_second);
    let variable = ClipRate::Variable(times.len() as f64 / length);
    if den == 0 {
        return variable;
    }
    let whole = |rate: f64, den| Rational::new(rate.round() as u32, den).ok();
    let candidates = [whole(mean, 1), whole(mean.ceil() * 1000.0, 1001), whole(mean * 2.0, 2), reduced(num, den)];
    for most_ticks in [0.5, 1.0] {
        for rate in candidates.into_iter().flatten() {
            let ticks = f64::from(ticks_per_second) * f64::from(rate.den()) / f64::from(rate.num());
            let off = |(i, t): (usize, &i64)| ((t - times[0]) as f64 - i as f64 * ticks).abs();
            let fits = match intervals {
                0 => (f64::from(last_ticks) - ticks).abs() <= most_ticks,
                _ => times.iter().enumerate().map(off).all(|off| off <= most_ticks + SAME_TIME),
            };
            if fits {
                return ClipRate::Constant(rate);
            }
        }
    }
    variable
}

/// A fraction in lowest terms, if its parts are small enough then.
fn reduced(num: u64, den: u64) -> Option<Rational> {
    let (mut a, mut b) = (num, den);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let part = |n: u64| u32::try_from(n / a.max(1)).ok();
    Rational::new(part(num)?, part(den)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times of `count` frames at `rate`, rounded to ticks.
    fn times(count: i64, rate: &str, ticks_per_second: u32, round: fn(f64) -> f64) -> Vec<i64> {
        let rate: Rational = rate.parse().expect("a rate");
        (0..count).map(|i| round(i as f64 / rate.to_f64() * f64::from(ticks_per_second)) as i64).collect()
    }

    #[track_caller]
    fn check_rate(rate: &str, ticks_per_second: u32, count: i64) {
        let want = ClipRate::Constant(rate.parse().expect("a rate"));
        for round in [f64::round, f64::floor] {
            let times = times(count, rate, ticks_per_second, round);
            let last = (f64::from(ticks_per_second) / rate.parse::<Rational>().expect("a rate").to_f64()).round();
            assert_eq!(rate_of(&times, ticks_per_second, last as u32), want);
        }
    }

    #[test]
    fn rates_are_found_exactly_in_fine_and_coarse_times() {
        check_rate("24", 12288, 17);
        check_rate("24000/1001", 24000, 121);
        check_rate("24000/1001", 90000, 121);
        check_rate("24000/1001", 1000, 121);
        check_rate("24", 1000, 121);
        check_rate("30000/1001", 600, 300);
        check_rate("25/2", 1000, 40);
        check_rate("15/2", 1000, 40);
        check_rate("24", 12288, 1);
    }

    #[test]
    fn an_odd_rate_is_a_fraction_and_a_changing_one_is_variable() {
        assert_eq!(
            rate_of(&[0, 700, 1400, 2100], 10_000, 700),
            ClipRate::Constant(Rational::new(100, 7).expect("a rate"))
        );
        assert!(matches!(rate_of(&[0, 300, 900, 1300], 9000, 300), ClipRate::Variable(_)));
        assert!(matches!(rate_of(&[5, 5, 5], 9000, 1), ClipRate::Variable(_)));
    }

    #[track_caller]
    fn check_picks(times: &[i64], rate: ClipRate, run: &str, start_seconds: f64, frames: usize, want: &[usize]) {
        let window = Window { rate: run.parse().expect("a rate"), start_seconds, frames };
        assert_eq!(picks(times, 1000, 100, rate, window), want);
    }

    #[test]
    fn a_window_begins_with_the_first_picture_at_its_start() {
        let ten = ClipRate::Constant(Rational::new(10, 1).expect("a rate"));
        let times: Vec<i64> = (0..6).map(|i| i * 100).collect();
        check_picks(&times, ten, "10", 0.0, 3, &[0, 1, 2]);
        check_picks(&times, ten, "10", 0.2, 3, &[2, 3, 4]);
        check_picks(&times, ten, "10", 0.21, 9, &[3, 4, 5]);
        check_picks(&times, ten, "10", 0.6, 9, &[]);
    }

    #[test]
    fn pictures_of_varying_length_are_held_and_dropped() {
        check_picks(&[0, 100, 400, 450], ClipRate::Variable(8.0), "10", 0.0, 99, &[0, 1, 1, 1, 2, 3]);
        check_picks(&[0, 100, 400, 450], ClipRate::Variable(8.0), "5", 0.2, 2, &[1, 2]);
    }

    #[test]
    fn names_are_sorted_by_their_numbers() {
        let mut names = ["f10.png", "f2.png", "f1.png", "g0.png", "f02b.png"];
        names.sort_by_cached_key(|name| natural_key(name));
        assert_eq!(names, ["f1.png", "f2.png", "f02b.png", "f10.png", "g0.png"]);
    }
}
