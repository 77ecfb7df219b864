//! The `ffmpeg` program, when there is one.
//!
//! Used where libx264 itself is the specification, which is the compression of conditioning images, and for inputs of kinds
//! that the embedded readers do not know. Data go through pipes; no temporary file is made.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde_json::Value;

use super::audio_input::Recording;
use super::image_input::MAX_SIDE;
use super::video_input::{ClipInfo, ClipRate, ROUNDING};
use super::{Audio, MediaError, Rational, RgbImage};

/// Which rate pictures are read at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RateOf {
    /// Every picture once.
    Clip,
    /// Pictures are held and left out so that they come at this rate.
    Run(Rational),
}

/// A program that takes the arguments of `ffmpeg`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ffmpeg {
    program: PathBuf,
}

impl Ffmpeg {
    /// The first `ffmpeg` on `PATH`, which is not run yet.
    pub fn find() -> Option<Self> {
        let name = format!("ffmpeg{}", std::env::consts::EXE_SUFFIX);
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|folder| folder.join(&name)).find(|file| file.is_file()).map(Self::at)
    }

    /// The program at a given place.
    pub fn at(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// Where the program is.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Compresses `image` as one H.264 picture and decodes it again, as the reference does: libx264, preset
    /// `veryfast`, the given `crf`, one frame per second (x264's rate control depends on it), 4:2:0, conversions by
    /// swscale with its bilinear filter. Sides must be even.
    ///
    /// Returns the picture and the size of the stream in bytes.
    ///
    /// The reference encodes with one slice for each core, as far as every slice gets four rows of macroblocks, so that
    /// its result for pictures of 128 rows and more depends on the machine. This always makes one slice; where the
    /// reference does too, the results are equal to the bit.
    ///
    /// # Errors
    /// [`MediaError::NoFfmpeg`] or [`MediaError::Ffmpeg`].
    ///
    /// Source: ltx_pipelines/utils/media_io (Lightricks/LTX-2 @ 400fd31).
    pub fn image_round_trip(&self, image: &RgbImage, crf: u8) -> Result<(RgbImage, usize), MediaError> {
        let size = format!("{}x{}", image.width(), image.height());
        let crf = crf.to_string();
        let encode = [
            &["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", &size, "-r", "1", "-i", "pipe:0"][..],
            &["-vf", "scale=flags=bilinear", "-pix_fmt", "yuv420p", "-frames:v", "1"],
            &["-c:v", "libx264", "-preset", "veryfast", "-crf", &crf, "-f", "h264", "pipe:1"],
        ]
        .concat();
        let stream = self.run("encoding an image with libx264", &encode, image.rgb())?;
        let decode = [
            &["-f", "h264", "-i", "pipe:0", "-vf", "scale=flags=bilinear"][..],
            &["-pix_fmt", "rgb24", "-frames:v", "1", "-f", "rawvideo", "pipe:1"],
        ]
        .concat();
        let rgb = self.run("decoding an image", &decode, &stream)?;
        if rgb.len() != image.rgb().len() {
            let status = format!("{} bytes instead of {}", rgb.len(), image.rgb().len());
            return Err(self.failure("decoding an image", status, String::new()));
        }
        Ok((RgbImage::new(image.width(), image.height(), rgb)?, stream.len()))
    }

    /// Size, rate and length of the first video stream of a file.
    ///
    /// # Errors
    /// [`MediaError::Input`] if ffmpeg cannot read the file or finds no pictures, [`MediaError::NoFfmpeg`] if the program
    /// `ffprobe` is not beside it.
    pub fn probe(&self, path: &Path) -> Result<ClipInfo, MediaError> {
        let show =
            "stream=width,height,avg_frame_rate,r_frame_rate:stream_side_data=rotation:packet=pts_time,duration_time";
        let facts = self.ffprobe(path, &["-select_streams", "v:0", "-show_entries", show])?;
        let bad = |what: &str| MediaError::input(path, format!("ffmpeg reads it and finds {what}"));
        let stream = facts["streams"].get(0).ok_or_else(|| bad("no pictures"))?;
        let side = |name: &str| stream[name].as_u64().and_then(|n| usize::try_from(n).ok());
        let side = |name: &str| side(name).filter(|side| (1..=MAX_SIDE).contains(side));
        let (width, height) = side("width").zip(side("height")).ok_or_else(|| bad("pictures of no possible size"))?;
        let rate = |name: &str| stream[name].as_str().and_then(|text| text.parse::<Rational>().ok());
        let times = PictureTimes::of(&facts["packets"]);
        // The first is a guess from the times, or a claim of the header; the second their mean, which may be off by the
        // rounding of the times.
        let is_mean = |rate: Rational, mean: Rational| (rate.to_f64() / mean.to_f64() - 1.0).abs() < 1e-3;
        let rate = match (rate("r_frame_rate"), rate("avg_frame_rate")) {
            (Some(rate), mean) if mean.is_none_or(|mean| is_mean(rate, mean)) && times.are_at(rate) => {
                ClipRate::Constant(rate)
            }
            _ => ClipRate::Variable(times.mean_rate()),
        };
        let frames = times.count;
        let side_data = stream["side_data_list"].as_array().into_iter().flatten();
        let degrees = side_data.filter_map(|data| data["rotation"].as_i64()).next().unwrap_or(0);
        let (width, height) = if degrees.rem_euclid(180) == 90 { (height, width) } else { (width, height) };
        Ok(ClipInfo { width, height, rate, frames })
    }

    /// Hands on at most `most` pictures of the first video stream of a file, upright, of the size that [`Ffmpeg::probe`] tells.
    ///
    /// # Errors
    /// [`MediaError::Ffmpeg`] if ffmpeg fails, and what `sink` returns.
    pub fn read_video(
        &self,
        path: &Path,
        (width, height): (usize, usize),
        rate: RateOf,
        most: usize,
        sink: &mut dyn FnMut(&RgbImage) -> Result<(), MediaError>,
    ) -> Result<(), MediaError> {
        let doing = "reading a clip";
        let (most, rate) = match rate {
            RateOf::Clip => (most.to_string(), vec!["-fps_mode".to_owned(), "passthrough".to_owned()]),
            RateOf::Run(rate) => (most.to_string(), vec!["-vf".to_owned(), format!("fps={rate}")]),
        };
        let mut args = input_args(path);
        args.extend(["-map", "0:v:0", "-frames:v", &most].map(OsString::from));
        args.extend(rate.into_iter().map(OsString::from));
        args.extend(["-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"].map(OsString::from));
        let mut child = Running(self.spawn(&self.program, &args, Stdio::null())?);
        let (stdout, stderr) = (child.0.stdout.take(), child.0.stderr.take());
        let message = thread::spawn(move || read_all(stderr));
        let mut stdout = stdout.ok_or_else(|| self.failure(doing, "no output".to_owned(), String::new()))?;
        let mut frame = vec![0; width * height * 3];
        let mut result = Ok(());
        loop {
            let filled = fill(&mut stdout, &mut frame);
            match filled {
                Ok(0) => break,
                Ok(n) if n == frame.len() => {
                    result = RgbImage::new(width, height, frame.clone()).and_then(|image| sink(&image));
                    if result.is_err() {
                        break;
                    }
                }
                Ok(n) => {
                    result =
                        Err(self.failure(doing, format!("{n} of {} bytes of a picture", frame.len()), String::new()));
                    break;
                }
                Err(error) => {
                    result = Err(self.failure(doing, error.to_string(), String::new()));
                    break;
                }
            }
        }
        // A program whose output nobody reads would wait for ever.
        drop(stdout);
        let status = child.0.wait().map_err(|source| MediaError::NoFfmpeg { program: self.name(), source })?;
        let message = join(message.join()).map(|bytes| last_lines(&bytes)).unwrap_or_default();
        result?;
        if status.success() { Ok(()) } else { Err(self.failure(doing, status.to_string(), message)) }
    }

    /// The sound of a file from `start_seconds` on for `seconds`; `None` if there is none.
    ///
    /// # Errors
    /// Those of [`Ffmpeg::probe`] and [`MediaError::Ffmpeg`] if ffmpeg fails.
    pub fn read_audio(&self, path: &Path, start_seconds: f64, seconds: f64) -> Result<Option<Recording>, MediaError> {
        let facts = self.ffprobe(path, &["-select_streams", "a:0", "-show_entries", "stream=channels,sample_rate"])?;
        let Some(stream) = facts["streams"].get(0) else { return Ok(None) };
        let channels = stream["channels"].as_u64().unwrap_or(0).clamp(1, 64) as usize;
        let rate_hz = stream["sample_rate"].as_str().and_then(|text| text.parse::<u32>().ok()).unwrap_or(48_000);
        let (first, count) = super::audio_input::window(rate_hz, start_seconds, seconds)?;
        let cut = format!("aresample=async=1:first_pts=0,atrim=start_sample={first}:end_sample={}", first + count);
        let (channels_text, rate_text) = (channels.to_string(), rate_hz.to_string());
        let mut args = input_args(path);
        let rest = ["-map", "0:a:0", "-af", &cut, "-ac", &channels_text, "-ar", &rate_text, "-f", "f32le", "pipe:1"];
        args.extend(rest.map(OsString::from));
        let bytes = self.run_os("reading sound", &args, &[])?;
        let samples: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let channel = |c: usize| samples.iter().skip(c).step_by(channels).copied().collect();
        Ok(Some(Recording { rate_hz, channels: (0..channels).map(channel).collect() }))
    }

    /// Whether it was built with an encoder for HEVC.
    pub fn has_x265(&self) -> bool {
        let listed = self.run("listing its encoders", &["-encoders"], &[]);
        listed.is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(" libx265 "))
    }

    /// Waits for a program that was started, whose input is closed.
    pub(super) fn wait(&self, doing: &'static str, child: &mut Child) -> Result<(), MediaError> {
        let message = read_all(child.stderr.take()).map(|bytes| last_lines(&bytes)).unwrap_or_default();
        let status = child.wait().map_err(|source| MediaError::NoFfmpeg { program: self.name(), source })?;
        if status.success() { Ok(()) } else { Err(self.failure(doing, status.to_string(), message)) }
    }

    /// Joins the pictures of an MP4 file, as they are, with sound into another one.
    pub(super) fn join_sound(&self, video: &Path, sound: &Audio, to: &Path) -> Result<(), MediaError> {
        let mut args: Vec<OsString> = vec!["-y".into()];
        args.extend(input_args(video));
        let format =
            format!("-f f32le -ar {} -ac 2 -i pipe:0 -map 0:v -map 1:a -c:v copy -tag:v hvc1", sound.rate_hz());
        let output = "-c:a aac -b:a 192k -movflags +faststart -f mp4";
        args.extend(format.split_whitespace().chain(output.split_whitespace()).map(OsString::from));
        args.push(file_arg(to));
        let (left, right) = sound.channels();
        let bytes: Vec<u8> = left.iter().zip(right).flat_map(|(l, r)| [*l, *r]).flat_map(f32::to_le_bytes).collect();
        self.run_os("adding sound to the HLG master", &args, &bytes).map(drop)
    }

    /// What `ffprobe` tells of a file.
    fn ffprobe(&self, path: &Path, ask: &[&str]) -> Result<Value, MediaError> {
        let beside = self.program.with_file_name(format!("ffprobe{}", std::env::consts::EXE_SUFFIX));
        let program = Ffmpeg { program: if beside.is_file() { beside } else { PathBuf::from("ffprobe") } };
        let mut args: Vec<OsString> = ["-v", "error", "-of", "json"].map(OsString::from).to_vec();
        args.extend(ask.iter().map(OsString::from));
        args.extend(input_args(path));
        let child = program.spawn(&program.program, &args, Stdio::null())?;
        let output =
            child.wait_with_output().map_err(|source| MediaError::NoFfmpeg { program: program.name(), source })?;
        if !output.status.success() {
            let message = last_lines(&output.stderr);
            return Err(MediaError::input(path, format!("ffmpeg cannot read it: {message}")));
        }
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    /// Starts a program with pipes for its output.
    pub(super) fn spawn(&self, program: &Path, args: &[OsString], stdin: Stdio) -> Result<Child, MediaError> {
        let quiet = ["-hide_banner", "-loglevel", "error"];
        let mut command = Command::new(program);
        command.args(quiet).args(args).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().map_err(|source| MediaError::NoFfmpeg { program: self.name(), source })
    }

    /// Runs the program with `input` on its standard input and returns its standard output.
    fn run(&self, doing: &'static str, args: &[&str], input: &[u8]) -> Result<Vec<u8>, MediaError> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        self.run_os(doing, &args, input)
    }

    fn run_os(&self, doing: &'static str, args: &[OsString], input: &[u8]) -> Result<Vec<u8>, MediaError> {
        let args: Vec<OsString> = std::iter::once("-nostdin".into()).chain(args.iter().cloned()).collect();
        let mut child = self.spawn(&self.program, &args, Stdio::piped())?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());

        // All three pipes are served at once; a full one would stop the program for ever.
        let (written, read, message) = thread::scope(|scope| {
            let writer = scope.spawn(move || stdin.map_or(Ok(()), |mut pipe| pipe.write_all(input)));
            let errors = scope.spawn(move || read_all(stderr));
            let read = read_all(stdout);
            (join(writer.join()), read, join(errors.join()))
        });
        let status = child.wait().map_err(|source| MediaError::NoFfmpeg { program: self.name(), source })?;
        let message = message.map(|bytes| last_lines(&bytes)).unwrap_or_default();
        // The exit status explains a broken pipe better than the pipe does.
        if !status.success() {
            return Err(self.failure(doing, status.to_string(), message));
        }
        match (written, read) {
            (Ok(()), Ok(output)) => Ok(output),
            (Err(error), _) | (_, Err(error)) => Err(self.failure(doing, error.to_string(), message)),
        }
    }

    fn name(&self) -> String {
        self.program.display().to_string()
    }

    fn failure(&self, doing: &'static str, status: String, message: String) -> MediaError {
        MediaError::Ffmpeg { program: self.name(), doing, status, message }
    }
}

/// When the pictures of a stream are shown.
struct PictureTimes {
    /// Number of pictures.
    count: usize,
    /// When they begin, in seconds and ascending; without those whose times are not told.
    starts: Vec<f64>,
    /// When the last one ends.
    end: f64,
}

impl PictureTimes {
    /// Those of the packets that `ffprobe` tells.
    fn of(packets: &Value) -> PictureTimes {
        let packets = packets.as_array().map(Vec::as_slice).unwrap_or_default();
        let seconds = |packet: &Value, name: &str| packet[name].as_str().and_then(|text| text.parse::<f64>().ok());
        let (mut starts, mut end) = (Vec::new(), f64::MIN);
        for packet in packets {
            let Some(time) = seconds(packet, "pts_time") else { continue };
            starts.push(time);
            end = end.max(time + seconds(packet, "duration_time").unwrap_or(0.0));
        }
        starts.sort_by(f64::total_cmp);
        PictureTimes { count: packets.len(), starts, end }
    }

    /// Whether they come at a constant rate; headers claim more than there is.
    fn are_at(&self, rate: Rational) -> bool {
        let first = self.starts.first().copied().unwrap_or(0.0);
        let off = |(i, time): (usize, &f64)| ((time - first) * rate.to_f64() - i as f64).abs();
        self.starts.iter().enumerate().map(off).all(|frames| frames < ROUNDING)
    }

    /// Number of pictures divided by their time; 0 if that is not told.
    fn mean_rate(&self) -> f64 {
        match self.starts.first() {
            Some(first) if self.end > *first => self.count as f64 / (self.end - first),
            _ => 0.0,
        }
    }
}

/// A program that ends with us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The arguments that name an input.
fn input_args(path: &Path) -> Vec<OsString> {
    vec![OsStr::new("-i").to_os_string(), file_arg(path)]
}

/// The argument that names a file; a name that looks like an option or a protocol is still a file.
pub(super) fn file_arg(path: &Path) -> OsString {
    let mut file = OsString::from("file:");
    file.push(path);
    file
}

/// Reads until `buffer` is full or the input ends.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn read_all(pipe: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        pipe.read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

fn join<T>(result: thread::Result<io::Result<T>>) -> io::Result<T> {
    result.unwrap_or_else(|_| Err(io::Error::other("a pipe thread panicked")))
}

/// The end of an error output, on one line.
fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(3)..].join("; ")
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Mutex;

    /// A script can't be started while a child forked by another test still holds it open for writing.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    /// Runs a shell script in place of `ffmpeg`, with 1 MiB of input.
    fn run_script(script: &str) -> Result<Vec<u8>, MediaError> {
        let _guard = ONE_AT_A_TIME.lock();
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("ffmpeg");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("written");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("executable");
        Ffmpeg::at(&program).run("testing", &[], &vec![7; 1 << 20])
    }

    #[test]
    fn data_larger_than_a_pipe_pass() {
        assert_eq!(run_script("cat").expect("copied"), vec![7; 1 << 20]);
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = run_script("echo 'Unknown encoder libx264' >&2; exit 3").expect_err("failed");
        let text = error.to_string();
        assert!(text.contains("while testing (exit status: 3): Unknown encoder libx264"), "{text}");
    }

    #[test]
    fn a_program_that_does_not_read_is_an_error() {
        let error = run_script("exit 0").expect_err("unread input");
        assert!(matches!(error, MediaError::Ffmpeg { .. }), "{error}");
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let _guard = ONE_AT_A_TIME.lock();
        let error = Ffmpeg::at("/nonexistent/ffmpeg").run("testing", &[], &[]).expect_err("missing");
        assert!(matches!(error, MediaError::NoFfmpeg { .. }), "{error}");
    }
}
