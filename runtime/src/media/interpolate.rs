//! Frames at another rate: each is a blend of the two given frames between which it stands in time.
//!
//! This is no optical flow: what moves is seen twice, faintly, and not halfway. Values are blended as they are, in the
//! signal that screens are sent. Times are exact fractions, so that a video of any length keeps its duration and its sound
//! in sync.

use super::Rational;

/// Blends a stream of frames to another rate, holding one frame at a time.
#[derive(Debug)]
pub struct Interpolator {
    /// A frame that is made stands `step.0 / step.1` given frames behind the one before.
    step: (u64, u64),
    /// The latest frame that was given.
    latest: Option<Vec<f32>>,
    /// How many were given, and how many were made.
    given: u64,
    made: u64,
}

impl Interpolator {
    /// Frames of the rate `from` to frames of the rate `to`.
    pub fn new(from: Rational, to: Rational) -> Interpolator {
        let product = |a: u32, b: u32| u64::from(a) * u64::from(b);
        let step = (product(from.num(), to.den()), product(from.den(), to.num()));
        Interpolator { step, latest: None, given: 0, made: 0 }
    }

    /// Takes the next frame, and hands on those that stand in front of it.
    ///
    /// # Errors
    /// What `sink` returns.
    pub fn push<E>(&mut self, frame: &[f32], sink: &mut dyn FnMut(&[f32]) -> Result<(), E>) -> Result<(), E> {
        if let Some(earlier) = self.latest.take() {
            while let Some(share) = self.share_in_front() {
                let blend = |(a, b): (&f32, &f32)| a + (b - a) * share;
                match share {
                    0.0 => sink(&earlier)?,
                    _ => sink(&earlier.iter().zip(frame).map(blend).collect::<Vec<_>>())?,
                }
                self.made += 1;
            }
        }
        self.latest = Some(frame.to_vec());
        self.given += 1;
        Ok(())
    }

    /// Hands on the frames that stand behind the last one, which shows until the end.
    ///
    /// # Errors
    /// What `sink` returns.
    pub fn finish<E>(mut self, sink: &mut dyn FnMut(&[f32]) -> Result<(), E>) -> Result<(), E> {
        let Some(last) = self.latest.take() else { return Ok(()) };
        while self.share_in_front().is_some() {
            sink(&last)?;
            self.made += 1;
        }
        Ok(())
    }

    /// How far behind the latest frame the next one stands, as a share of the way to the one after it; `None` if it stands
    /// behind that one.
    fn share_in_front(&self) -> Option<f32> {
        // In shares of `1 / step.1` of a given frame; wide, because rates have 32 bits in each part.
        let at = u128::from(self.made) * u128::from(self.step.0);
        let whole = u128::from(self.step.1);
        let first = u128::from(self.given.saturating_sub(1));
        (at / whole == first).then(|| ((at % whole) as f64 / whole as f64) as f32)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// Frames of one value, at another rate.
    fn interpolated(values: &[f32], from: (u32, u32), to: (u32, u32)) -> Vec<f32> {
        let rate = |(num, den)| Rational::new(num, den).unwrap();
        let mut interpolator = Interpolator::new(rate(from), rate(to));
        let mut made = Vec::new();
        let mut sink = |frame: &[f32]| {
            assert_eq!(frame.len(), 2);
            made.push(frame[0]);
            Ok::<(), Infallible>(())
        };
        values.iter().for_each(|&v| interpolator.push(&[v, v], &mut sink).unwrap());
        interpolator.finish(&mut sink).unwrap();
        made
    }

    #[test]
    fn frames_between_are_blends() {
        assert_eq!(interpolated(&[0.0, 1.0, 4.0], (24, 1), (48, 1)), [0.0, 0.5, 1.0, 2.5, 4.0, 4.0]);
        assert_eq!(interpolated(&[0.0, 3.0], (24, 1), (72, 1)), [0.0, 1.0, 2.0, 3.0, 3.0, 3.0]);
        // Three for two.
        assert_eq!(interpolated(&[0.0, 3.0, 6.0, 9.0], (24, 1), (36, 1)), [0.0, 2.0, 4.0, 6.0, 8.0, 9.0]);
    }

    #[test]
    fn the_same_rate_changes_nothing_and_a_lower_one_leaves_frames_out() {
        let values = [0.3, 0.1, 0.7, 0.2];
        assert_eq!(interpolated(&values, (24000, 1001), (24000, 1001)), values);
        assert_eq!(interpolated(&values, (24, 1), (12, 1)), [0.3, 0.7]);
        assert_eq!(interpolated(&[5.0], (24, 1), (60, 1)), [5.0, 5.0, 5.0]);
        assert!(interpolated(&[], (24, 1), (60, 1)).is_empty());
    }

    #[test]
    fn durations_are_kept_to_the_frame() {
        for (count, from, to) in [
            (1001u32, (24000, 1001), (60000, 1001)),
            (121, (24, 1), (60, 1)),
            (97, (25, 1), (30000, 1001)),
            (5, (24, 1), (1, 1)),
        ] {
            let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
            let made = interpolated(&values, from, to);
            let seconds = |n: u64, (num, den): (u32, u32)| n as f64 * f64::from(den) / f64::from(num);
            // The first that would start when the last frame has ended is not there.
            assert!(seconds(made.len() as u64 - 1, to) < seconds(count.into(), from) - 1e-9, "{count} {from:?} {to:?}");
            assert!(seconds(made.len() as u64, to) >= seconds(count.into(), from) - 1e-9, "{count} {from:?} {to:?}");
            for (i, value) in made.iter().enumerate() {
                let expected = (seconds(i as u64, to) / seconds(1, from)).min(f64::from(count - 1));
                assert!((f64::from(*value) - expected).abs() < 1e-3, "frame {i} is {value}, expected {expected}");
            }
        }
    }
}
