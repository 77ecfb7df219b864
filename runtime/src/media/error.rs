//! The one error type of this module.

use std::io;
use std::path::{Path, PathBuf};

use super::Rational;

/// What can go wrong between frames and files.
///
/// Every variant is a situation a caller can act on; the text names the file, what was expected, what was found and
/// what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MediaError {
    /// A file operation failed for a reason other than a full disk.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// Verb, as in "cannot *create* `x`".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The disk, or the quota of the user, is exhausted.
    #[error("disk full while writing `{}`; nothing was kept; free some space or write to another disk", path.display())]
    DiskFull {
        /// The file that was being written.
        path: PathBuf,
    },
    /// The output folder already holds files.
    #[error("output folder `{}` already exists and is not empty (`{found}`); remove it or choose another name", path.display())]
    OutputExists {
        /// The folder.
        path: PathBuf,
        /// One of the files in it.
        found: String,
    },
    /// Something that is no file has the name of the output.
    #[error("cannot write `{}`: {found}; give the name of a file", path.display())]
    OutputName {
        /// The output.
        path: PathBuf,
        /// What has that name.
        found: &'static str,
    },
    /// The extension names no format this module writes.
    #[error("cannot tell the format of `{}` from its extension; use `.mp4`, `.wav`, or a folder name without extension for PNG frames", path.display())]
    UnknownOutput {
        /// What was asked for.
        path: PathBuf,
    },
    /// Audio or video was handed to an output that cannot hold it.
    #[error("`{}` cannot hold {what}; {remedy}", path.display())]
    WrongStream {
        /// The output.
        path: PathBuf,
        /// What was handed over.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The stream ended before anything was written.
    #[error("nothing to write to `{}`: {expected} expected, none arrived", path.display())]
    Empty {
        /// The output.
        path: PathBuf,
        /// What was expected.
        expected: &'static str,
    },
    /// A number is outside of what the format or the codec can express.
    #[error("{what} is {got}; {limit}")]
    Limit {
        /// The quantity.
        what: &'static str,
        /// Its value.
        got: String,
        /// The limit, with the way out.
        limit: &'static str,
    },
    /// A buffer does not have the length that its shape says.
    #[error("{what} has {got} values, {expected} expected")]
    Length {
        /// The buffer.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length of its shape, or of one unit of it.
        expected: String,
    },
    /// A frame rate that is no rate.
    #[error("frame rate `{got}` is not usable; give a positive number such as `24`, `23.976` or `30000/1001`")]
    FrameRate {
        /// What was asked for.
        got: String,
    },
    /// An embedded codec refused.
    #[error("{codec} failed: {message}")]
    Codec {
        /// Name of the codec.
        codec: &'static str,
        /// What it said.
        message: String,
    },
    /// An image could not be decoded.
    #[error("cannot decode image `{}`: {message}; PNG, JPEG and WebP are read", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        message: String,
    },
    /// An input is damaged, or does not hold what is asked of it.
    #[error("cannot use `{}`: {problem}", path.display())]
    Input {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A clip does not run at the rate of the video that is made from it.
    #[error(
        "`{}` has {found} frames per second, this run has {wanted}; give `--frame-rate {found}`, or convert the clip, \
         for example with `ffmpeg -i {} -r {wanted} converted.mp4`",
        path.display(),
        path.display()
    )]
    RateMismatch {
        /// The clip.
        path: PathBuf,
        /// Its rate.
        found: Rational,
        /// The rate of the run.
        wanted: Rational,
    },
    /// A file has no sound.
    #[error("`{}` has no sound track; name a file that has one", path.display())]
    NoSound {
        /// The file.
        path: PathBuf,
    },
    /// An input of a kind that only `ffmpeg` reads, and there is none.
    #[error(
        "`{}` needs ffmpeg, because {reason}; install ffmpeg, or convert the file to H.264 in MP4, or sound to WAV",
        path.display()
    )]
    NeedsFfmpeg {
        /// The file.
        path: PathBuf,
        /// What the embedded readers lack.
        reason: String,
    },
    /// The `ffmpeg` program could not be run.
    #[error("cannot run `{program}`; install ffmpeg or choose the embedded codec")]
    NoFfmpeg {
        /// The program.
        program: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// An output that only `ffmpeg` writes.
    #[error(
        "`{}` is 10-bit HEVC, which only ffmpeg with libx265 writes; install it, or leave out `--hlg-master`",
        path.display()
    )]
    NoEncoder {
        /// The file.
        path: PathBuf,
    },
    /// The `ffmpeg` program ran and did not deliver.
    #[error("`{program}` failed while {doing} ({status}): {message}")]
    Ffmpeg {
        /// The program.
        program: String,
        /// The step.
        doing: &'static str,
        /// Exit status, or what was wrong with the result.
        status: String,
        /// Last lines of its error output.
        message: String,
    },
    /// An MP4 file is damaged, or not of the form that its reader takes.
    #[error("{problem} (at byte {offset} of the mp4 file)")]
    Mp4 {
        /// What is wrong.
        problem: String,
        /// Where.
        offset: u64,
    },
}

impl MediaError {
    /// Turns the failure of a file operation into the matching situation.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io { action, path, source },
        }
    }

    pub(crate) fn limit(what: &'static str, got: impl ToString, limit: &'static str) -> Self {
        Self::Limit { what, got: got.to_string(), limit }
    }

    pub(crate) fn input(path: &Path, problem: String) -> Self {
        Self::Input { path: path.to_path_buf(), problem }
    }

    pub(crate) fn codec(codec: &'static str, error: impl ToString) -> Self {
        Self::Codec { codec, message: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_is_its_own_situation() {
        let error = MediaError::io("write", Path::new("a.mp4"), io::Error::from(io::ErrorKind::StorageFull));
        assert!(error.to_string().starts_with("disk full while writing `a.mp4`"), "{error}");
        let error = MediaError::io("write", Path::new("a.mp4"), io::Error::from(io::ErrorKind::PermissionDenied));
        assert_eq!(error.to_string(), "cannot write `a.mp4`");
    }
}
