//! The sampler of the high-quality pipeline: second-order exponential steps with noise at the middle and at the end.
//!
//! # Easy to get wrong
//! - A schedule that ends with 0 ends with 0.0011 and one more evaluation instead.
//! - Small steps move the anchor until the middle is where the model was asked.
//! - The middle of a step counts as step 0 for guidance, so nothing is ever skipped there.
//! - Everything is f64 between evaluations; the state is rounded before each.
//!
//! Source: spec/pipelines §6.6.

use super::super::per::Per;
use super::super::state::State;
use super::{Model, Prediction};
use crate::error::RunError;

/// Level that stands for 0: ltx_pipelines/utils/samplers.py, release 1.2.0, as the constants below.
const LAST_LEVEL: f64 = 0.0011;
/// Share of each level that is fresh noise.
const ETA: f64 = 0.5;
/// Steps shorter than this, above [`ANCHOR_LEVEL`], move their anchor so many times.
const ANCHOR_STEP: f64 = 0.5;
const ANCHOR_LEVEL: f64 = 0.03;
const ANCHOR_ROUNDS: usize = 100;

/// Weights of a step of length `h` in `−ln σ`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefficients {
    /// Of the first difference, for the middle.
    pub a21: f64,
    /// Of the first difference.
    pub b1: f64,
    /// Of the second difference.
    pub b2: f64,
}

impl Coefficients {
    /// The weights of a step of length `h`.
    pub fn new(h: f64) -> Coefficients {
        let b2 = 2.0 * phi2(-h);
        Coefficients { a21: 0.5 * phi1(-h / 2.0), b1: phi1(-h) - b2, b2 }
    }
}

/// Below this, the functions are their limits.
const SMALL: f64 = 1e-10;

fn phi1(z: f64) -> f64 {
    if z.abs() < SMALL { 1.0 } else { (z.exp() - 1.0) / z }
}

fn phi2(z: f64) -> f64 {
    if z.abs() < SMALL { 0.5 } else { (z.exp() - 1.0 - z) / (z * z) }
}

/// Takes `target`, to which a step from `sample` led, to the same noise level with fresh noise `z` in it.
pub fn sde_step(sample: &[f64], target: &[f64], z: &[f64], sigma: f64, next: f64) -> Vec<f64> {
    let mut up = (next * ETA).min(next * 0.9999);
    let rest = (next * next - up * up).max(0.0).sqrt();
    let mut alpha = (1.0 - next) + rest;
    let mut down = rest / alpha;
    if up.is_nan() {
        up = 0.0;
    }
    if alpha.is_nan() {
        alpha = 1.0;
    }
    if down.is_nan() {
        down = next;
    }
    if up == 0.0 || next == 0.0 {
        return target.into();
    }
    let step = |((sample, target), z): ((&f64, &f64), &f64)| {
        let noise = (sample - target) / (sigma - next);
        let denoised = sample - sigma * noise;
        alpha * (denoised + down * noise) + up * z
    };
    sample.iter().zip(target).zip(z).map(step).collect()
}

/// Mean 0 and standard deviation 1 (unbiased).
fn normalised(z: &[f32]) -> Vec<f64> {
    let n = z.len() as f64;
    let mean = z.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = z.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let deviation = variance.sqrt();
    z.iter().map(|&v| (f64::from(v) - mean) / deviation).collect()
}

/// `x · mask + clean · (1 − mask)`, as [`State::blended`].
fn blended(state: &State, x: &[f64]) -> Vec<f64> {
    let c = state.channels;
    let tokens = x.chunks(c).zip(state.clean.chunks(c)).zip(&state.mask);
    let blend = |((x, clean), &m): ((&[f64], &[f32]), &f32)| -> Vec<f64> {
        let m = f64::from(m);
        x.iter().zip(clean).map(|(x, &clean)| x * m + f64::from(clean) * (1.0 - m)).collect()
    };
    tokens.flat_map(blend).collect()
}

/// One modality within a step.
struct Half {
    /// Where the step starts, as the weights see it.
    anchor: Vec<f64>,
    /// From there to the first prediction.
    slope: Vec<f64>,
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

fn minus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// `a + scale · b`.
fn plus(a: &[f64], scale: f64, b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + scale * b).collect()
}

/// Runs all steps.
pub(super) fn sample(sigmas: &[f32], states: &mut Per<State>, model: &mut dyn Model) -> Result<(), RunError> {
    let steps = sigmas.len() - 1;
    let mut levels = wide(sigmas);
    let ends_clean = levels[steps] == 0.0;
    if ends_clean {
        levels[steps] = LAST_LEVEL;
    }
    for (i, pair) in levels.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let h = -(next / sigma).ln();
        let middle = (sigma * next).sqrt();
        let Coefficients { a21, b1, b2 } = Coefficients::new(h);

        let mut predictions = model.predict(states, sigma as f32, i)?;
        let mut halves: Per<Half> = Per::default();
        for (modality, state) in states.iter_mut() {
            let Some(Prediction { denoised, .. }) = predictions.slot(modality).take() else { continue };
            let (mut anchor, first) = (wide(&state.latent), wide(&denoised));
            let mut slope = minus(&first, &anchor);
            let z = normalised(&model.noise("substep", i, modality, denoised.len())?);
            let point = plus(&anchor, h * a21, &slope);
            model.show("substep", i, modality, &narrow(&point));
            let point = blended(state, &sde_step(&anchor, &point, &z, sigma, middle));
            if h < ANCHOR_STEP && sigma > ANCHOR_LEVEL {
                for _ in 0..ANCHOR_ROUNDS {
                    anchor = plus(&point, -h * a21, &slope);
                    slope = minus(&first, &anchor);
                }
            }
            state.latent = narrow(&point);
            *halves.slot(modality) = Some(Half { anchor, slope });
        }

        let mut predictions = model.predict(states, middle as f32, 0)?;
        for (modality, state) in states.iter_mut() {
            let Some(half) = halves.slot(modality).take() else { continue };
            let Some(Prediction { denoised, .. }) = predictions.slot(modality).take() else { continue };
            let second = minus(&wide(&denoised), &half.anchor);
            let point = plus(&plus(&half.anchor, h * b1, &half.slope), h * b2, &second);
            model.show("step", i, modality, &narrow(&point));
            let z = normalised(&model.noise("step", i, modality, denoised.len())?);
            state.latent = narrow(&blended(state, &sde_step(&half.anchor, &point, &z, sigma, next)));
        }
        model.stepped(i, states);
    }
    if ends_clean {
        let mut predictions = model.predict(states, LAST_LEVEL as f32, steps)?;
        for (modality, state) in states.iter_mut() {
            if let Some(prediction) = predictions.slot(modality).take() {
                state.latent = prediction.denoised;
            }
        }
        model.stepped(steps, states);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published values, to eight digits.
    #[test]
    fn coefficients_are_the_published_ones() {
        let published = [(0.1, [0.48770575, -0.01585779, 0.96748361]), (0.5, [0.44239843, -0.0653066, 0.85224528])];
        for (h, [a21, b1, b2]) in published {
            let found = Coefficients::new(h);
            let pairs = [(found.a21, a21), (found.b1, b1), (found.b2, b2)];
            assert!(pairs.iter().all(|(a, b)| (a - b).abs() < 1e-8), "{found:?}");
        }
        assert_eq!(Coefficients::new(0.0), Coefficients { a21: 0.5, b1: 0.0, b2: 1.0 });
    }
}
