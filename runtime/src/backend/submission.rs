//! How much work a GPU is given at once.
//!
//! Systems watch how long a single submission takes and reset a GPU that does not come back: macOS and Windows after a few
//! seconds. What is submitted together is therefore bounded, by what the plan says that calls compute and move.

/// What a slow GPU (1 TFLOP/s, 50 GB/s) does in a tenth of a second. A fast one takes far less, and still enough to make
/// the cost of a submission, some ten microseconds, vanish.
const FLOPS: u64 = 100_000_000_000;
const BYTES: u64 = 5_000_000_000;

/// What was given to a device since the last submission.
#[derive(Debug, Default)]
pub(crate) struct Submission {
    flops: u64,
    bytes: u64,
}

impl Submission {
    /// Whether what was given before has to be submitted before a call of this size is.
    pub fn is_full_before(&self, flops: u64, bytes: u64) -> bool {
        let is_empty = self.flops == 0 && self.bytes == 0;
        !is_empty && (self.flops.saturating_add(flops) > FLOPS || self.bytes.saturating_add(bytes) > BYTES)
    }

    /// Counts a call.
    pub fn add(&mut self, flops: u64, bytes: u64) {
        self.flops = self.flops.saturating_add(flops);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many submissions calls of these sizes make.
    fn submissions(calls: &[(u64, u64)]) -> usize {
        let (mut current, mut made) = (Submission::default(), 1);
        for &(flops, bytes) in calls {
            if current.is_full_before(flops, bytes) {
                (current, made) = (Submission::default(), made + 1);
            }
            current.add(flops, bytes);
        }
        made
    }

    #[test]
    fn submissions_are_bounded_by_work_and_by_traffic() {
        assert_eq!(submissions(&[(1, 1); 1000]), 1);
        assert_eq!(submissions(&[(FLOPS / 4, 0); 9]), 3);
        assert_eq!(submissions(&[(0, BYTES / 2 + 1); 3]), 3);
        assert_eq!(submissions(&[(u64::MAX, 1), (1, u64::MAX), (1, 1)]), 3, "one call is never divided");
    }
}
