//! What four distances say about a LoRA.
//!
//! The reference's own effect is the yardstick. An effect of another size means another scale, one of about the same size that
//! is still not the reference's means other layers. Two things tell more than the size: keys that match nothing, and an
//! effect that is only stretched, by a scale that the file or the command line has.

use super::layers::FINAL;
use crate::debug::recording::{Distance, TensorFile};

/// Mean squared error above which outputs differ, and up to which a LoRA does nothing.
pub const LIMIT: f64 = 1e-4;

/// Factor between the effects of both sides that counts as the same.
const SAME_EFFECT: f64 = 2.0;

/// Cosine above which one effect is the other one stretched.
const SAME_DIRECTION: f64 = 0.98;

/// Relative difference of two scales that count as the same.
const SAME_SCALE: f64 = 0.05;

/// The distances, on the final output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distances {
    /// Mean squared errors: reference against ltxc without LoRA, with it; effect in the reference, effect here.
    pub mse: [f64; 4],
    /// Cosine between the two effects.
    pub cosine: f64,
}

/// The four files.
pub struct Sides<'a> {
    /// Reference, without and with the LoRA.
    pub reference: [&'a TensorFile; 2],
    /// ltxc, without and with it.
    pub ours: [&'a TensorFile; 2],
}

impl Distances {
    /// The distances of the final outputs; `None` if one is missing or their sizes differ.
    pub fn of(sides: &Sides<'_>) -> Option<Distances> {
        let output = |file: &TensorFile| file.find(FINAL).map(|tensor| tensor.to_f32());
        let [base, with] = sides.reference.map(output);
        let [own_base, own_with] = sides.ours.map(output);
        let (base, with, own_base, own_with) = (base?, with?, own_base?, own_with?);
        if [&with, &own_base, &own_with].iter().any(|other| other.len() != base.len()) {
            return None;
        }
        let mse = |a: &[f32], b: &[f32]| Distance::of(a, b).mse;
        let effect = |a: &[f32], b: &[f32]| -> Vec<f32> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
        Some(Distances {
            mse: [mse(&own_base, &base), mse(&own_with, &with), mse(&with, &base), mse(&own_with, &own_base)],
            cosine: Distance::of(&effect(&own_with, &own_base), &effect(&with, &base)).cosine,
        })
    }

    /// Whether each of the four comparisons is as it should be.
    pub fn passes(&self) -> [bool; 4] {
        let [base, with, reference, ours] = self.mse;
        let is_alike = ours <= reference * SAME_EFFECT && ours >= reference / SAME_EFFECT;
        [base < LIMIT, with < LIMIT, reference > LIMIT, ours > LIMIT && is_alike]
    }

    /// Size of the effect here as a multiple of the reference's.
    pub fn ratio(&self) -> f64 {
        (self.mse[3] / self.mse[2]).sqrt()
    }

    /// The verdict; `has_unmatched` says that the LoRA has keys which match nothing in the model, `scales` are those that a
    /// wrong one could be.
    pub fn verdict(&self, has_unmatched: bool, scales: &[f64]) -> Verdict {
        let [base, with, reference, alike] = self.passes();
        let has_effect = self.mse[3] > LIMIT;
        match (base, reference) {
            (false, _) => Verdict::BaseDiffers,
            (true, false) => Verdict::Inert,
            (true, true) if with && alike => Verdict::Parity,
            (true, true) if !has_effect => Verdict::NotApplied,
            // Layers are known to be missing.
            (true, true) if has_unmatched => Verdict::WrongLayers,
            (true, true) if !alike || self.is_stretched(scales) => Verdict::WrongScale,
            (true, true) => Verdict::WrongLayers,
        }
    }

    /// Whether the effect here is the reference's times one of `scales` that is near to 1.
    fn is_stretched(&self, scales: &[f64]) -> bool {
        self.cosine > SAME_DIRECTION && scales.iter().any(|&scale| is_near(self.ratio(), scale.abs()))
    }
}

/// Whether two scales are the same.
pub fn is_near(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < SAME_SCALE
}

/// What is wrong, if anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Parity,
    /// The model differs without the LoRA.
    BaseDiffers,
    /// The LoRA does nothing here.
    NotApplied,
    /// It does the same, more or less strongly.
    WrongScale,
    /// It does something else.
    WrongLayers,
    /// It does nothing in the reference.
    Inert,
}

impl Verdict {
    /// The sentence that is printed.
    pub fn text(self) -> &'static str {
        match self {
            Verdict::Parity => "LoRA parity",
            Verdict::BaseDiffers => "base model differs: fix conversion first, LoRA results are meaningless",
            Verdict::NotApplied => "LoRA not applied (key mapping, disabled layers, wrong file)",
            Verdict::WrongScale => "LoRA applied with a wrong scale (alpha/rank, strength)",
            Verdict::WrongLayers => "LoRA applied to wrong layers or partially",
            Verdict::Inert => "LoRA file itself is inert for this input",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(mse: [f64; 4], cosine: f64, has_unmatched: bool, expected: Verdict) {
        assert_eq!(Distances { mse, cosine }.verdict(has_unmatched, &[1.25, 0.8]), expected);
    }

    #[test]
    fn every_row_of_the_table_has_its_verdict() {
        check([1e-9, 1e-9, 1e-2, 1e-2], 1.0, false, Verdict::Parity);
        for rest in [[1e-9, 1e-2, 1e-2], [1e-2, 0.0, 0.0]] {
            check([1e-2, rest[0], rest[1], rest[2]], 1.0, false, Verdict::BaseDiffers);
        }
        check([1e-9, 1e-2, 1e-2, 0.0], 0.0, false, Verdict::NotApplied);
        check([1e-9, 1e-2, 1e-2, 4e-2], 0.9, false, Verdict::WrongScale);
        check([1e-9, 1e-2, 1e-2, 2.5e-3], 0.9, false, Verdict::WrongScale);
        check([1e-9, 1e-2, 1e-2, 1e-2 * 1.25 * 1.25], 0.99, false, Verdict::WrongScale);
        check([1e-9, 1e-2, 1e-2, 1e-2 * 1.25 * 1.25], 0.9, false, Verdict::WrongLayers);
        check([1e-9, 1e-2, 1e-2, 1e-2], 0.5, false, Verdict::WrongLayers);
        check([1e-9, 1e-2, 1e-2, 2e-3], 0.99, true, Verdict::WrongLayers);
        check([1e-9, 0.0, 1e-6, 1e-6], 1.0, false, Verdict::Inert);
        check([1e-9, 1e-2, 1e-6, 1e-2], 0.0, false, Verdict::Inert);
    }

    #[test]
    fn outputs_that_are_not_finite_do_not_pass() {
        check([f64::NAN, 0.0, 1e-2, 1e-2], 1.0, false, Verdict::BaseDiffers);
        assert_ne!(
            Distances { mse: [0.0, f64::NAN, 1e-2, f64::NAN], cosine: 0.0 }.verdict(false, &[]),
            Verdict::Parity
        );
    }
}
