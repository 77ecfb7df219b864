//! Repeating, taking turns, and what is made of the numbers.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

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

/// Median of some numbers; `None` if there are none.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(values[n / 2]),
        _ => Some((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}

/// A median, and where the true one lies with 95 % certainty.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Median of what was measured.
    pub median: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// By order statistics, which ask nothing of the distribution: of n values, the true median lies below the k-th with the
    /// probability that fewer than k of n fair coins show heads. `None` below 6 values, where no two ends are that certain.
    pub fn of_median(values: impl IntoIterator<Item = f64>) -> Option<Interval> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let n = values.len();
        let median = median(values.iter().copied())?;
        // The probability of exactly `k` heads, and of at most `k`.
        let mut exactly = 0.5f64.powi(i32::try_from(n).ok()?);
        let (mut at_most, mut k) = (exactly, 0);
        while at_most <= 0.025 {
            k += 1;
            exactly *= (n - k + 1) as f64 / k as f64;
            at_most += exactly;
        }
        let low = k.checked_sub(1)?;
        Some(Interval { median, low: values[low], high: values[n - 1 - low] })
    }
}

/// `‖a − b‖ / ‖b‖` in f64.
pub fn relative_difference(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(a as f64 - b as f64)).sum();
    let norm: f64 = b.iter().map(|&b| square(b as f64)).sum();
    if a.len() == b.len() { (difference / norm).sqrt() } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(seconds: &[f64]) -> Vec<Sample> {
        seconds.iter().map(|&seconds| Sample { seconds, cpu_seconds: seconds }).collect()
    }

    #[test]
    fn intervals_of_medians() {
        let of = |n: u32| Interval::of_median((0..n).map(f64::from)).map(|i| (i.low, i.median, i.high));
        // Ranks of the sign test at 5 %, from a table: none for 5, 1 for 6 to 8, 2 for 9, 6 for 20.
        assert_eq!(of(5), None);
        assert_eq!(of(6), Some((0.0, 2.5, 5.0)));
        assert_eq!(of(8), Some((0.0, 3.5, 7.0)));
        assert_eq!(of(9), Some((1.0, 4.0, 7.0)));
        assert_eq!(of(20), Some((5.0, 9.5, 14.0)));
    }

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_of_neighbouring_runs() {
        // The machine was half as fast in the second round.
        let turns = Turns { ours: runs(&[1.0, 2.0, 1.0]), theirs: runs(&[2.0, 4.0, 2.1]) };
        assert_eq!(turns.ratio(), Some(0.5));
        assert_eq!(turns.core_share(2), [Some(0.5), Some(0.5)]);
        assert_eq!(Turns { ours: runs(&[1.0]), theirs: vec![] }.ratio(), None);
    }

    #[test]
    fn differences_are_relative() {
        assert_eq!(relative_difference(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative_difference(&[0.0, 0.0], &[3.0, 4.0]), 1.0);
        assert_eq!(relative_difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
    }
}
