//! What is made of repeated measurements.

use serde::{Deserialize, Serialize};

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

/// `‖a − b‖ / ‖b‖` in f64: 0 if both are the same, infinite if they have not the same length.
pub fn relative_difference(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(a as f64 - b as f64)).sum();
    let norm: f64 = b.iter().map(|&b| square(b as f64)).sum();
    match a.len() == b.len() {
        true if difference == 0.0 => 0.0,
        true => (difference / norm).sqrt(),
        false => f64::INFINITY,
    }
}

/// The largest of some differences, 0 of none; NaN if one is.
pub fn largest(differences: impl IntoIterator<Item = f64>) -> f64 {
    differences.into_iter().fold(0.0, |most, d| if d.is_nan() || most.is_nan() { f64::NAN } else { most.max(d) })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn differences_are_relative() {
        assert_eq!(relative_difference(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative_difference(&[0.0, 0.0], &[3.0, 4.0]), 1.0);
        assert_eq!(relative_difference(&[0.0], &[0.0]), 0.0);
        assert!(relative_difference(&[f32::NAN], &[f32::NAN]).is_nan());
        assert_eq!(relative_difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
    }

    #[test]
    fn one_that_is_no_number_is_never_lost() {
        assert_eq!(largest([]), 0.0);
        assert_eq!(largest([1.0, 3.0, 2.0]), 3.0);
        assert!(largest([f64::NAN, 1.0]).is_nan() && largest([1.0, f64::NAN]).is_nan());
    }
}
