//! Repeating, taking turns, and what is made of the numbers.

use std::time::{Duration, Instant};

use anyhow::Result;
use ltxc::bench::statistics::median;
use serde::Serialize;

/// One run of something.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Wall time.
    pub seconds: f64,
    /// Processor time of the process, all threads together.
    pub cpu_seconds: f64,
}

/// Runs `work` once.
///
/// # Errors
/// That of `work`.
pub fn sample(work: impl FnOnce() -> Result<()>) -> Result<Sample> {
    let (cpu, start) = (cpu_seconds(), Instant::now());
    work()?;
    Ok(Sample { seconds: start.elapsed().as_secs_f64(), cpu_seconds: cpu_seconds() - cpu })
}

/// Processor time of all threads of this process so far; 0 where the system does not say.
///
/// The scheduler counts nanoseconds, and brings the count of a running thread up to date some hundred times a second.
pub fn cpu_seconds() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanoseconds = |thread: std::fs::DirEntry| -> Option<f64> {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    threads.filter_map(nanoseconds).sum::<f64>() / 1e9
}

/// Runs of two sides that took turns.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Turns {
    /// Runs of ltxc.
    pub ours: Vec<Sample>,
    /// Runs of the other side, in the same order; empty without one.
    pub theirs: Vec<Sample>,
}

impl Turns {
    /// Median of `ours / theirs` over the rounds; `None` without another side.
    pub fn ratio(&self) -> Option<f64> {
        let pairs = self.ours.iter().zip(&self.theirs);
        median(pairs.map(|(a, b)| a.seconds / b.seconds))
    }

    /// Median wall time of ltxc.
    pub fn our_seconds(&self) -> f64 {
        median(self.ours.iter().map(|s| s.seconds)).unwrap_or(f64::NAN)
    }

    /// Median wall time of the other side.
    pub fn their_seconds(&self) -> Option<f64> {
        median(self.theirs.iter().map(|s| s.seconds))
    }

    /// Part of `threads` cores that each side got while it ran: below 1 if other work was there, or if a side does not
    /// use all threads.
    pub fn core_share(&self, threads: usize) -> [Option<f64>; 2] {
        [&self.ours, &self.theirs].map(|runs| {
            let (cpu, wall) = runs.iter().fold((0.0, 0.0), |(c, w), s| (c + s.cpu_seconds, w + s.seconds));
            (wall > 0.0).then(|| cpu / wall / threads as f64)
        })
    }
}

/// Threads of PyTorch spin for a while after a run; the other side starts when they sleep.
const PAUSE: Duration = Duration::from_millis(300);

/// Runs both sides in turns: once to warm up, then `rounds` times.
///
/// # Errors
/// That of either side.
pub fn alternate(
    rounds: usize,
    mut ours: impl FnMut() -> Result<Sample>,
    mut theirs: Option<&mut dyn FnMut() -> Result<Sample>>,
) -> Result<Turns> {
    let mut turns = Turns::default();
    for round in 0..=rounds {
        let our = ours()?;
        let their = match &mut theirs {
            Some(run) => {
                std::thread::sleep(PAUSE);
                let sample = run()?;
                std::thread::sleep(PAUSE);
                Some(sample)
            }
            None => None,
        };
        if round > 0 {
            turns.ours.push(our);
            turns.theirs.extend(their);
        }
    }
    Ok(turns)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(seconds: &[f64]) -> Vec<Sample> {
        seconds.iter().map(|&seconds| Sample { seconds, cpu_seconds: seconds }).collect()
    }

    #[test]
    fn ratios_are_of_neighbouring_runs() {
        // The machine was half as fast in the second round.
        let turns = Turns { ours: runs(&[1.0, 2.0, 1.0]), theirs: runs(&[2.0, 4.0, 2.1]) };
        assert_eq!(turns.ratio(), Some(0.5));
        assert_eq!(turns.core_share(2), [Some(0.5), Some(0.5)]);
        assert_eq!(Turns { ours: runs(&[1.0]), theirs: vec![] }.ratio(), None);
    }
}
