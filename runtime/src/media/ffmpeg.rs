//! The `ffmpeg` program, when there is one.
//!
//! Used only where libx264 itself is the specification: the compression of conditioning images. Data go through pipes;
//! no temporary file is made.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use super::{MediaError, RgbImage};

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

    /// Runs the program with `input` on its standard input and returns its standard output.
    fn run(&self, doing: &'static str, args: &[&str], input: &[u8]) -> Result<Vec<u8>, MediaError> {
        let mut all: Vec<OsString> = ["-nostdin", "-hide_banner", "-loglevel", "error"].map(OsString::from).to_vec();
        all.extend(args.iter().map(OsString::from));
        let mut child = Command::new(&self.program)
            .args(all)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| MediaError::NoFfmpeg { program: self.name(), source })?;
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
        assert!(text.contains("while testing (exit status: 3): Unknown encoder libx264;"), "{text}");
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
