//! Statistics of one tensor, as debugging logs and noise files print them.
//!
//! Sums follow a fixed order, so that the same values give the same digits on every machine: blocks of [`BLOCK`] elements
//! are added up in f32 in order of memory, then block sums are added in pairs, neighbours first, until one is left.

use ltxc_ir::TensorType;
use ltxc_ir::eval::Tensor;

/// Elements that are added up in order before sums are paired.
pub const BLOCK: usize = 4096;

/// What is known about the values of a tensor. NaN and infinities take part in the sums and are counted.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// Shape and dtype.
    pub ty: TensorType,
    /// Sum in f32, in the order of the module documentation.
    pub sum: f32,
    /// Sum in f64.
    pub sum_f64: f64,
    /// Mean of the magnitudes.
    pub abs_mean: f64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation (unbiased); 0 of a single value.
    pub std: f64,
    /// Smallest value, NaN left out.
    pub min: f32,
    /// Largest value, NaN left out.
    pub max: f32,
    /// How many are NaN.
    pub nan: usize,
    /// How many are infinite.
    pub infinite: usize,
    /// How many are 0.
    pub zeros: usize,
    /// Index of the first value that is NaN or infinite.
    pub first_bad: Option<usize>,
    /// Sum of value times index in f64: tells a permutation, which sums do not.
    pub checksum: f64,
    /// The first eight values.
    pub head: Vec<f32>,
}

impl Stats {
    /// Statistics of f32 values of this shape.
    pub fn of(shape: &[usize], values: &[f32]) -> Stats {
        Stats::of_typed(TensorType::f32(shape), values)
    }

    /// Statistics of the bytes of a tensor as they stand in memory of a program.
    pub fn of_bytes(ty: &TensorType, bytes: &[u8]) -> Stats {
        Stats::of_typed(ty.clone(), &decoded(ty, bytes))
    }

    /// Statistics of values that were decoded from a tensor of type `ty`.
    pub fn of_typed(ty: TensorType, values: &[f32]) -> Stats {
        let n = values.len().max(1) as f64;
        let wide = || values.iter().map(|&v| f64::from(v));
        let sum_f64: f64 = wide().sum();
        let mean = sum_f64 / n;
        let variance = wide().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        Stats {
            ty,
            sum: sum_f32(values),
            sum_f64,
            abs_mean: wide().map(f64::abs).sum::<f64>() / n,
            mean,
            std: variance.sqrt(),
            min: values.iter().copied().fold(f32::INFINITY, f32::min),
            max: values.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            nan: values.iter().filter(|v| v.is_nan()).count(),
            infinite: values.iter().filter(|v| v.is_infinite()).count(),
            zeros: values.iter().filter(|&&v| v == 0.0).count(),
            first_bad: values.iter().position(|v| !v.is_finite()),
            checksum: wide().enumerate().map(|(i, v)| v * i as f64).sum(),
            head: values.iter().take(8).copied().collect(),
        }
    }

    /// Whether any value is NaN or infinite.
    pub fn is_bad(&self) -> bool {
        self.first_bad.is_some()
    }

    /// Shape as logs print it: `(1, 24, 64)`, and `(3,)` for one axis.
    pub fn shape_text(&self) -> String {
        match &self.ty.shape[..] {
            [one] => format!("({one},)"),
            shape => format!("({})", shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
        }
    }
}

/// Values of a tensor as f32; integers and flags become numbers.
pub fn decoded(ty: &TensorType, bytes: &[u8]) -> Vec<f32> {
    Tensor::from_bytes(ty.clone(), bytes).to_f32()
}

/// The sum in f32, in the order of the module documentation.
pub fn sum_f32(values: &[f32]) -> f32 {
    let mut sums: Vec<f32> = values.chunks(BLOCK).map(|block| block.iter().sum()).collect();
    while sums.len() > 1 {
        sums = sums.chunks(2).map(|pair| pair.iter().sum()).collect();
    }
    sums.first().copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_paired_in_blocks() {
        // One long sum in f32 would lose every 1 after 2^24.
        let values = vec![1.0f32; (1 << 24) + 8192];
        assert_eq!(sum_f32(&values), ((1 << 24) + 8192) as f32);
        assert_eq!(sum_f32(&[]), 0.0);
    }

    #[test]
    fn a_permutation_changes_the_checksum_only() {
        let (a, b) = (Stats::of(&[4], &[1.0, 2.0, 3.0, 4.0]), Stats::of(&[4], &[2.0, 1.0, 3.0, 4.0]));
        assert_eq!((a.sum, a.mean, a.std), (b.sum, b.mean, b.std));
        assert_ne!(a.checksum, b.checksum);
        assert_eq!(a.shape_text(), "(4,)");
    }

    #[test]
    fn bad_values_are_counted_and_found() {
        let stats = Stats::of(&[4], &[0.0, f32::INFINITY, f32::NAN, -1.0]);
        assert_eq!((stats.nan, stats.infinite, stats.zeros, stats.first_bad), (1, 1, 1, Some(1)));
        assert_eq!((stats.min, stats.max), (-1.0, f32::INFINITY));
    }
}
