//! Running `ltxc` and other programs as a user would, and what they need.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::measure::Sample;

/// The binary next to this one, which cargo puts into the same folder.
///
/// # Errors
/// If it has not been built.
pub fn ltxc_binary() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("ltxc");
    anyhow::ensure!(path.is_file(), "`{}` is missing; build it with `cargo build --release -p ltxc`", path.display());
    Ok(path)
}

/// Runs a command from its start to its end. The processor time of children is not known and given as 0.
///
/// # Errors
/// A command that cannot be started or fails; its last words are in the message.
pub fn timed(command: &mut Command) -> Result<Sample> {
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let seconds = start.elapsed().as_secs_f64();
    check(output.status, &output.stderr)?;
    Ok(Sample { seconds, cpu_seconds: 0.0 })
}

fn check(status: ExitStatus, stderr: &[u8]) -> Result<()> {
    if !status.success() {
        bail!("{status}: {}", String::from_utf8_lossy(stderr).trim());
    }
    Ok(())
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peak {
    /// Most resident memory, as the system keeps it.
    pub resident: u64,
    /// Most resident memory at any look, without mapped files whose names end in `.safetensors`.
    pub without_weights: u64,
}

/// Time between two looks at a process.
const INTERVAL: Duration = Duration::from_millis(2);

/// Runs a command and looks at its memory every two milliseconds, which slows it down a little.
///
/// # Errors
/// As for [`timed`].
pub fn observed(command: &mut Command) -> Result<Peak> {
    let messages = tempfile::NamedTempFile::new()?;
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(messages.reopen()?);
    let mut child = quiet.spawn().with_context(|| format!("{command:?}"))?;
    let folder = PathBuf::from(format!("/proc/{}", child.id()));
    let mut peak = Peak::default();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let now = look(&folder);
        peak.resident = peak.resident.max(now.resident);
        peak.without_weights = peak.without_weights.max(now.without_weights);
        std::thread::sleep(INTERVAL);
    };
    check(status, &std::fs::read(messages.path())?)?;
    Ok(peak)
}

/// Memory of a process now; 0 when it is gone.
fn look(folder: &Path) -> Peak {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    let high_water = read("status").lines().find_map(|l| kibibytes(l, "VmHWM:")).unwrap_or(0);
    Peak { resident: high_water, without_weights: without_weights(&read("smaps")) }
}

/// Resident bytes of all maps in the text of `smaps`, except those of weight files.
fn without_weights(smaps: &str) -> u64 {
    let (mut sum, mut is_weights) = (0, false);
    for line in smaps.lines() {
        if let Some(bytes) = kibibytes(line, "Rss:") {
            sum += if is_weights { 0 } else { bytes };
        } else if line.split_whitespace().next().is_some_and(|first| first.contains('-')) {
            is_weights = line.ends_with(".safetensors");
        }
    }
    sum
}

/// The number of a line like `VmHWM:   123 kB`, in bytes.
fn kibibytes(line: &str, name: &str) -> Option<u64> {
    let number: u64 = line.strip_prefix(name)?.split_whitespace().next()?.parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_left_out_of_maps() {
        let smaps = "7f00-7f10 r--p 00000000 fe:00 1 /models/a.safetensors\nSize:  100 kB\nRss:    64 kB\n\
                     7f20-7f30 rw-p 00000000 00:00 0 \nSize:   50 kB\nRss:     8 kB\nVmFlags: rd wr\n\
                     7f40-7f50 r-xp 00000000 fe:00 2 /bin/ltxc\nRss:     4 kB\n";
        assert_eq!(without_weights(smaps), 12 * 1024);
    }
}
