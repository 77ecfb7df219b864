//! `ltxc debug video-stats`: whether a finished clip is a picture at all.
//!
//! A broken run does not end with an error but with noise, one colour, or a picture that never moves. These are told apart by
//! a few numbers on the frames, on the scale 0 to 255. EXR frames are taken as light with the primaries of sRGB: what a screen
//! shows of it is looked at like any other clip, and the numbers themselves are searched for what is not finite, and for limits
//! that most of them are at.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use ltxc_runtime::media::exr_frames::FloatImage;
use ltxc_runtime::media::frames::to_rgb8;
use ltxc_runtime::media::{Clip, ClipRate, ExrSequence, MediaError, Rational, Window, displayed, is_exr, load_audio};
use serde_json::{Value, json};

/// Mean step between neighbours over twice the standard deviation: white noise gives about 1.13, pictures below 0.4.
const NOISE_RATIO: f64 = 0.7;

/// Standard deviation below which there is nothing to see.
const COLLAPSED_STD: f64 = 15.0;

/// Mean change between frames below which a clip stands still.
const FROZEN: f64 = 0.5;

/// Correlation of neighbours: 0.1 to 0.2 in noise, above 0.7 in pictures.
const COHERENT: f64 = 0.7;

/// Mean level below which a clip counts as black.
const BLACK: f64 = 3.0;

/// Share of the numbers of EXR frames that are the smallest or the largest one above which they are saturated.
const SATURATED: f64 = 0.5;

/// Names of all red flags.
const FLAGS: [&str; 7] = ["noise", "collapsed", "black", "frozen", "silent", "not-finite", "saturated"];

/// RMS of sound below which it counts as silent.
pub const SILENT: f64 = 1e-4;

/// `ltxc debug video-stats`.
#[derive(Debug, Args)]
pub struct VideoStatsArgs {
    /// Clip: .mp4 and other video files, or a folder of PNG or EXR frames with a WAV file beside them.
    pub input: PathBuf,
    /// Red flags to overlook: noise, collapsed, black, frozen, silent, not-finite, saturated; repeatable.
    #[arg(long, value_name = "FLAG")]
    pub allow: Vec<String>,
}

/// What is known about a clip after all of its frames.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClipStats {
    /// Number of frames.
    pub frames: usize,
    /// Extents of a frame.
    pub size: (usize, usize),
    /// Mean of red, green and blue.
    pub mean: [f64; 3],
    /// Their standard deviation over the whole clip.
    pub std: [f64; 3],
    /// Smallest and largest value.
    pub range: (u8, u8),
    /// Mean of grey as a share of 255.
    pub brightness: f64,
    /// Noise against structure, mean over frames; see the module documentation.
    pub noise_ratio: f64,
    /// Correlation of a pixel with its right and lower neighbours, mean over frames.
    pub autocorrelation: f64,
    /// Mean change of a pixel from frame to frame.
    pub change: f64,
    /// Frames that are one colour.
    pub flat_frames: usize,
    /// RMS of the sound, if there is any.
    pub sound_rms: Option<f64>,
    /// Standard deviation of grey within frames, mean over frames.
    pub grey_std: f64,
    /// The numbers of EXR frames.
    pub light: Option<LightStats>,
}

/// What is known about the numbers of EXR frames.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LightStats {
    /// How many there are.
    pub count: usize,
    /// How many of them are NaN or infinite.
    pub not_finite: usize,
    /// The smallest and the largest of the others.
    pub range: (f32, f32),
    /// How many are the smallest, and how many the largest.
    pub at_limits: [usize; 2],
}

impl Default for LightStats {
    fn default() -> Self {
        LightStats { count: 0, not_finite: 0, range: (f32::INFINITY, f32::NEG_INFINITY), at_limits: [0; 2] }
    }
}

impl LightStats {
    fn add(&mut self, value: f32) {
        self.count += 1;
        if !value.is_finite() {
            self.not_finite += 1;
            return;
        }
        let (is_below, is_above) = (value < self.range.0, value > self.range.1);
        let LightStats { range: (low, high), at_limits: [lowest, highest], .. } = self;
        for (limit, count, is_beyond) in [(low, lowest, is_below), (high, highest, is_above)] {
            if is_beyond {
                (*limit, *count) = (value, 0);
            }
            *count += usize::from(value == *limit);
        }
    }

    /// For JSON.
    pub fn facts(&self) -> Value {
        json!({"not_finite": self.not_finite, "min": self.range.0, "max": self.range.1, "saturation": self.saturation()})
    }

    /// Share of the numbers that are at a limit of theirs.
    pub fn saturation(&self) -> f64 {
        // A single number is both.
        let at_limits = self.at_limits.iter().sum::<usize>().min(self.count);
        at_limits as f64 / self.count.max(1) as f64
    }
}

impl ClipStats {
    /// What is wrong with the clip, by name.
    pub fn flags(&self) -> Vec<(&'static str, String)> {
        let mut flags = Vec::new();
        if self.noise_ratio > NOISE_RATIO {
            let text = format!(
                "noise ratio {:.2} above {NOISE_RATIO}, neighbours correlate by {:.2}",
                self.noise_ratio, self.autocorrelation
            );
            flags.push(("noise", text));
        }
        if self.grey_std < COLLAPSED_STD {
            flags.push(("collapsed", format!("standard deviation {:.1} below {COLLAPSED_STD}", self.grey_std)));
        }
        if self.brightness * 255.0 < BLACK {
            flags.push(("black", format!("mean level {:.1} of 255", self.brightness * 255.0)));
        }
        if self.frames > 1 && self.change < FROZEN {
            flags.push(("frozen", format!("pixels change by {:.2} from frame to frame", self.change)));
        }
        if self.sound_rms.is_some_and(|rms| rms < SILENT) {
            flags.push(("silent", "the sound is silence".into()));
        }
        if let Some(light) = &self.light {
            if light.not_finite > 0 {
                let text = format!("{} of {} numbers are NaN or infinite", light.not_finite, light.count);
                flags.push(("not-finite", text));
            }
            if light.saturation() > SATURATED {
                let (low, high) = light.range;
                let share = light.saturation() * 100.0;
                flags.push(("saturated", format!("{share:.0} % of the numbers are at their limits, {low} and {high}")));
            }
        }
        flags
    }
}

/// Collects statistics frame by frame.
#[derive(Default)]
pub struct Collector {
    stats: ClipStats,
    sums: [f64; 3],
    squares: [f64; 3],
    before: Vec<u8>,
    range: Option<(u8, u8)>,
}

impl Collector {
    /// Adds a frame, `[h, w, 3]` in 8 bits.
    ///
    /// # Errors
    /// A frame of another size.
    pub fn add(&mut self, width: usize, height: usize, rgb: &[u8]) -> Result<()> {
        if rgb.len() != width * height * 3 || rgb.is_empty() {
            bail!("{} bytes are no frame of {width}x{height}", rgb.len());
        }
        if self.stats.frames > 0 && self.stats.size != (width, height) {
            bail!("frame {} is {width}x{height}, those before it {:?}", self.stats.frames + 1, self.stats.size);
        }
        self.stats.size = (width, height);
        for pixel in rgb.as_chunks::<3>().0 {
            for ((sum, square), &v) in self.sums.iter_mut().zip(&mut self.squares).zip(pixel) {
                *sum += f64::from(v);
                *square += f64::from(v).powi(2);
            }
        }
        let (low, high) = self.range.unwrap_or((u8::MAX, 0));
        self.range = Some(rgb.iter().fold((low, high), |(l, h), &v| (l.min(v), h.max(v))));
        // BT.601 weights, as everyone takes for grey.
        let grey: Vec<f64> = (rgb.as_chunks::<3>().0.iter())
            .map(|p| 0.299 * f64::from(p[0]) + 0.587 * f64::from(p[1]) + 0.114 * f64::from(p[2]))
            .collect();
        let structure = structure(&grey, width);
        self.stats.brightness += structure.mean / 255.0;
        self.stats.grey_std += structure.std;
        self.stats.noise_ratio += structure.noise_ratio;
        self.stats.autocorrelation += structure.autocorrelation;
        self.stats.flat_frames += usize::from(structure.std < 0.5);
        if !self.before.is_empty() {
            let change: f64 = rgb.iter().zip(&self.before).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
            self.stats.change += change / rgb.len() as f64;
        }
        self.before = rgb.to_vec();
        self.stats.frames += 1;
        Ok(())
    }

    /// Adds a frame of light.
    ///
    /// # Errors
    /// A frame of another size.
    pub fn add_light(&mut self, image: &FloatImage) -> Result<()> {
        let light = self.stats.light.get_or_insert_default();
        image.rgb.iter().for_each(|&value| light.add(value));
        let shown: Vec<f32> = image.rgb.as_chunks::<3>().0.iter().flat_map(|&rgb| displayed(rgb)).collect();
        self.add(image.width, image.height, &to_rgb8(&shown))
    }

    /// Statistics of all frames.
    pub fn finish(mut self) -> ClipStats {
        let n = self.stats.frames.max(1) as f64;
        let pixels = n * (self.stats.size.0 * self.stats.size.1).max(1) as f64;
        let mean = self.sums.map(|sum| sum / pixels);
        self.stats.mean = mean;
        self.stats.std = std::array::from_fn(|c| (self.squares[c] / pixels - mean[c].powi(2)).max(0.0).sqrt());
        let s = &mut self.stats;
        for sum in [&mut s.brightness, &mut s.grey_std, &mut s.noise_ratio, &mut s.autocorrelation] {
            *sum /= n;
        }
        self.stats.change /= (n - 1.0).max(1.0);
        self.stats.range = self.range.unwrap_or((0, 0));
        self.stats
    }
}

/// What one plane of values looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Structure {
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub std: f64,
    /// `(mean |Δx| + mean |Δy|) / (2 std)`
    pub noise_ratio: f64,
    /// Pearson correlation with itself shifted by one in x and in y, averaged.
    pub autocorrelation: f64,
}

/// Structure of a plane of rows of `width` values.
pub fn structure(plane: &[f64], width: usize) -> Structure {
    let n = plane.len().max(1) as f64;
    let mean = plane.iter().sum::<f64>() / n;
    let std = (plane.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    let width = width.max(1);
    let right: Vec<(f64, f64)> = plane.chunks(width).flat_map(|row| row.windows(2).map(|w| (w[0], w[1]))).collect();
    let below: Vec<(f64, f64)> = plane.iter().copied().zip(plane.iter().skip(width).copied()).collect();
    let step = |pairs: &[(f64, f64)]| pairs.iter().map(|(a, b)| (a - b).abs()).sum::<f64>() / pairs.len().max(1) as f64;
    let noise_ratio = if std > 0.0 { (step(&right) + step(&below)) / (2.0 * std) } else { 0.0 };
    let directions: Vec<f64> = [right, below].iter().filter(|p| !p.is_empty()).map(|p| correlation(p)).collect();
    let autocorrelation = directions.iter().sum::<f64>() / directions.len().max(1) as f64;
    Structure { mean, std, noise_ratio, autocorrelation }
}

fn correlation(pairs: &[(f64, f64)]) -> f64 {
    let n = pairs.len().max(1) as f64;
    let (a, b) = (pairs.iter().map(|p| p.0).sum::<f64>() / n, pairs.iter().map(|p| p.1).sum::<f64>() / n);
    let sum = |f: &dyn Fn(f64, f64) -> f64| pairs.iter().map(|p| f(p.0 - a, p.1 - b)).sum::<f64>();
    let scale = (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt();
    // A plane of one value is like itself.
    if scale > 0.0 { sum(&|x, y| x * y) / scale } else { 1.0 }
}

/// `ltxc debug video-stats`. Returns whether there is no red flag.
///
/// # Errors
/// A clip that cannot be read.
pub fn run(args: &VideoStatsArgs, json: bool) -> Result<bool> {
    if let Some(unknown) = args.allow.iter().find(|a| !FLAGS.contains(&a.as_str())) {
        bail!("`--allow {unknown}` is no red flag, expected {}", FLAGS.join(", "));
    }
    let stats = of_clip(&args.input)?;
    let flags: Vec<_> = stats.flags().into_iter().filter(|(name, _)| !args.allow.iter().any(|a| a == name)).collect();
    if json {
        println!("{}", facts(&stats, &flags));
    } else {
        print!("{}", text(&stats, &flags));
    }
    Ok(flags.is_empty())
}

/// Statistics of a clip: a folder of frames with a WAV file beside them, or a file with or without sound.
///
/// # Errors
/// A clip that cannot be read, or holds no pictures.
pub fn of_clip(path: &Path) -> Result<ClipStats> {
    let mut collector = Collector::default();
    let mut problem = None;
    match is_exr(path) {
        true => {
            ExrSequence::open(path)?.read_numbers(usize::MAX, &mut |image| {
                problem = problem.take().or(collector.add_light(&image).err());
                Ok(())
            })?;
        }
        false => {
            let clip = Clip::open(path)?;
            let info = clip.info();
            let rate = match info.rate {
                ClipRate::Constant(rate) => rate,
                // Every picture, whatever its time.
                ClipRate::Variable(mean) => Rational::from_fps(mean)?,
                ClipRate::Free => Rational::new(24, 1)?,
            };
            clip.read(Window { rate, start_seconds: 0.0, frames: info.frames }, &mut |image| {
                let added = collector.add(image.width(), image.height(), image.rgb());
                problem = problem.take().or(added.err());
                Ok(())
            })?;
        }
    }
    if let Some(problem) = problem {
        return Err(problem.context(format!("`{}`", path.display())));
    }
    let mut stats = collector.finish();
    if stats.frames == 0 {
        bail!("`{}` holds no pictures", path.display());
    }
    let beside = || std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path());
    let sound = match path.is_dir() {
        true => beside().find(|p| p.extension().is_some_and(|e| e == "wav")),
        false => Some(path.to_path_buf()),
    };
    stats.sound_rms = sound.map(|sound| rms(&sound)).transpose()?.flatten();
    Ok(stats)
}

/// RMS of the sound of a file, if it has any.
///
/// # Errors
/// A file that cannot be read.
pub fn rms(path: &Path) -> Result<Option<f64>> {
    // A day: everything.
    let recording = match load_audio(path, 0.0, 86_400.0) {
        Ok(recording) => recording,
        Err(MediaError::NoSound { .. }) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let samples = || recording.channels.iter().flatten().map(|s| f64::from(*s).powi(2));
    Ok(Some((samples().sum::<f64>() / samples().count().max(1) as f64).sqrt()))
}

fn facts(s: &ClipStats, flags: &[(&str, String)]) -> Value {
    json!({
        "frames": s.frames, "width": s.size.0, "height": s.size.1, "mean": s.mean, "std": s.std, "min": s.range.0,
        "max": s.range.1, "brightness": s.brightness, "noise_ratio": s.noise_ratio, "grey_std": s.grey_std,
        "autocorrelation": s.autocorrelation, "change": s.change, "flat_frames": s.flat_frames, "sound_rms": s.sound_rms,
        "light": s.light.as_ref().map(LightStats::facts),
        "flags": flags.iter().map(|(name, why)| json!({"flag": name, "why": why})).collect::<Vec<_>>(),
        "verdict": if flags.is_empty() { "structured" } else { "bad" },
    })
}

fn text(s: &ClipStats, flags: &[(&str, String)]) -> String {
    let mut out = format!(
        "frames            {} of {}x{}, {} of one colour\nrgb mean          {:.1} {:.1} {:.1}\nrgb std           {:.1} {:.1} {:.1}\n\
         range             {} to {}\nbrightness        {:.1} %\ngrey std          {:.1}\nnoise ratio       {:.3} ({})\n\
         autocorrelation   {:.3} ({})\nchange            {:.2} from frame to frame\n",
        s.frames,
        s.size.0,
        s.size.1,
        s.flat_frames,
        s.mean[0],
        s.mean[1],
        s.mean[2],
        s.std[0],
        s.std[1],
        s.std[2],
        s.range.0,
        s.range.1,
        s.brightness * 100.0,
        s.grey_std,
        s.noise_ratio,
        if s.noise_ratio > NOISE_RATIO { "NOISE" } else { "STRUCTURED" },
        s.autocorrelation,
        if s.autocorrelation >= COHERENT { "coherent" } else { "incoherent" },
        s.change,
    );
    if let Some(light) = &s.light {
        let (low, high) = light.range;
        let share = light.saturation() * 100.0;
        out += &format!(
            "light             {low} to {high}, {share:.1} % of it at these limits; the above is what a screen shows\n"
        );
    }
    if let Some(rms) = s.sound_rms {
        out += &format!("sound             RMS {rms:.4}\n");
    }
    for (name, why) in flags {
        out += &format!("RED FLAG: {name}: {why}\n");
    }
    if flags.is_empty() {
        out += "no red flags\n";
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clip(frames: usize, pixel: impl Fn(usize, usize, usize) -> [u8; 3]) -> ClipStats {
        let mut collector = Collector::default();
        for f in 0..frames {
            let rgb: Vec<u8> =
                (0..48).flat_map(|y| (0..64).map(move |x| (y, x))).flat_map(|(y, x)| pixel(f, y, x)).collect();
            collector.add(64, 48, &rgb).unwrap();
        }
        collector.finish()
    }

    fn names(stats: &ClipStats) -> Vec<&'static str> {
        stats.flags().into_iter().map(|(name, _)| name).collect()
    }

    /// A wave that moves.
    fn wave(f: usize, y: usize, x: usize) -> [u8; 3] {
        let v = ((x as f64 * 0.1 + y as f64 * 0.15 + f as f64 * 0.5).sin() * 100.0 + 128.0) as u8;
        [v, 255 - v, v / 2]
    }

    fn noise(f: usize, y: usize, x: usize) -> [u8; 3] {
        let mut n = (f * 10_007 + y * 101 + x + 1) as u64;
        let mut next = || {
            n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (n >> 56) as u8
        };
        let v = next() ^ next();
        [v, v, v]
    }

    #[test]
    fn a_moving_picture_has_no_flags() {
        let stats = clip(4, wave);
        assert_eq!(names(&stats), Vec::<&str>::new(), "{stats:?}");
        assert!(stats.autocorrelation > 0.9 && stats.noise_ratio < 0.3);
    }

    #[test]
    fn noise_is_told_from_structure() {
        let stats = clip(3, noise);
        assert!(names(&stats).contains(&"noise"), "{stats:?}");
        assert!((1.0..1.3).contains(&stats.noise_ratio), "{stats:?}");
        assert!(stats.autocorrelation.abs() < 0.2);
    }

    #[test]
    fn one_colour_black_and_standstill_are_flagged() {
        assert_eq!(names(&clip(3, |_, _, _| [90, 90, 90])), ["collapsed", "frozen"]);
        assert_eq!(names(&clip(3, |_, _, _| [0, 0, 0])), ["collapsed", "black", "frozen"]);
        assert_eq!(names(&clip(3, |_, y, x| wave(0, y, x))), ["frozen"]);
    }

    #[test]
    fn light_is_looked_at_as_a_screen_shows_it() {
        let frames = |light: &dyn Fn(usize, usize) -> f32| {
            let mut collector = Collector::default();
            for frame in 0..3 {
                let rgb = (0..48 * 64).flat_map(|i| [light(frame, i); 3]).collect();
                collector.add_light(&FloatImage { width: 64, height: 48, rgb }).unwrap();
            }
            collector.finish()
        };
        let wave = |frame: usize, i: usize| ((i % 64) as f32 * 0.1 + frame as f32).sin() + 0.7;
        let stats = frames(&wave);
        assert_eq!(names(&stats), Vec::<&str>::new(), "{stats:?}");
        let light = stats.light.unwrap();
        assert!((-0.3..-0.29).contains(&light.range.0) && (1.69..1.7).contains(&light.range.1), "{light:?}");
        assert!((stats.range.0, stats.range.1) == (0, 255) && light.saturation() < 0.1);
        let broken = frames(&|frame, i| if frame == 1 && i == 7 { f32::NAN } else { wave(frame, i) });
        assert_eq!((names(&broken), broken.light.unwrap().not_finite), (vec!["not-finite"], 3));
        let clipped = frames(&|frame, i| (wave(frame, i) * 50.0).clamp(-0.02, 55.0));
        assert!(names(&clipped).contains(&"saturated"), "{clipped:?}");
        let constant = frames(&|_, _| 0.2);
        assert_eq!(names(&constant), ["collapsed", "frozen", "saturated"]);
    }

    #[test]
    fn frames_of_other_sizes_are_refused() {
        let mut collector = Collector::default();
        collector.add(2, 1, &[0; 6]).unwrap();
        assert!(collector.add(1, 2, &[0; 6]).is_err());
        assert!(collector.add(1, 1, &[0; 2]).is_err());
    }
}
