//! Samplers: how a stage goes from noise to a latent, one noise level after the other.
//!
//! A sampler knows states, noise levels and a [`Model`] to ask for predictions. What is asked, guided or not, is not its
//! business. Steps are plain functions on slices; loops apply them to each modality, video first.
//!
//! # Easy to get wrong
//! - Steps use the schedule's noise level for all tokens; per-token timesteps are only for the model.
//! - Noise moves tokens that the mask keeps; samplers that add noise hold them to the clean latent again.
//!
//! Source: spec/pipelines §6.

mod res2s;

use ltxc_ir::plan::{Modality, Sampler};

pub use res2s::{Coefficients as Res2sCoefficients, sde_step};

use super::per::Per;
use super::state::State;
use crate::error::RunError;

/// What the model says about one modality.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// The clean latent that it expects, guided and held to the mask.
    pub denoised: Vec<f32>,
    /// The same with the negative prompt alone, where that was computed.
    pub negative: Option<Vec<f32>>,
}

/// What a sampler asks.
pub trait Model {
    /// Predictions for states at noise level `sigma`. `step` is the step that guidance counts.
    ///
    /// # Errors
    /// What stops the run.
    fn predict(&mut self, states: &Per<State>, sigma: f32, step: usize) -> Result<Per<Prediction>, RunError>;

    /// Standard normal noise, `count` values; `kind` and `step` name the draw.
    ///
    /// # Errors
    /// What stops the run.
    fn noise(&mut self, kind: &str, step: usize, modality: Modality, count: usize) -> Result<Vec<f32>, RunError>;

    /// Called after every step.
    fn stepped(&mut self, step: usize, states: &Per<State>);

    /// Shows values between evaluations, such as where a step leads before noise is added; `what` names them.
    fn show(&mut self, what: &str, step: usize, modality: Modality, values: &[f32]);
}

/// How often a sampler reports a step.
pub fn steps(sampler: Sampler, sigmas: &[f32]) -> usize {
    let last = usize::from(sampler == Sampler::Res2s && sigmas.last() == Some(&0.0));
    sigmas.len().saturating_sub(1) + last
}

/// Takes states from the first noise level to the last one.
///
/// # Errors
/// What the model returns.
pub fn sample(
    sampler: Sampler,
    sigmas: &[f32],
    states: &mut Per<State>,
    model: &mut dyn Model,
) -> Result<(), RunError> {
    if sampler == Sampler::Res2s {
        return res2s::sample(sigmas, states, model);
    }
    // What gradient estimation remembers.
    let mut velocities: Per<Vec<f32>> = Per::default();
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let mut predictions = model.predict(states, sigma, i)?;
        for (modality, state) in states.iter_mut() {
            let Some(Prediction { denoised, negative }) = predictions.slot(modality).take() else { continue };
            let mut fresh = |count: usize| match next == 0.0 {
                true => Ok(vec![0.0; count]),
                false => model.noise("step", i, modality, count),
            };
            match sampler {
                Sampler::Euler | Sampler::Res2s => euler_step(&mut state.latent, &denoised, sigma, next),
                Sampler::Ancestral { eta, noise } => {
                    let z = fresh(denoised.len())?;
                    let stepped = ancestral_step(&state.latent, &denoised, &z, [sigma, next], eta, noise);
                    state.latent = state.blended(&stepped);
                }
                Sampler::GradientEstimation { gamma } => {
                    let last = velocities.slot(modality);
                    gradient_estimation_step(&mut state.latent, &denoised, [sigma, next], gamma, last);
                }
                Sampler::CfgPlusPlus { eta, noise } => {
                    let negative = negative.as_ref().unwrap_or(&denoised);
                    let z = fresh(denoised.len())?;
                    let stepped = cfg_plus_plus_step(&state.latent, &denoised, negative, &z, [sigma, next], eta, noise);
                    state.latent = state.blended(&stepped);
                }
            }
        }
        model.stepped(i, states);
    }
    Ok(())
}

/// One Euler step of the rectified flow, from `sigma` to `next`.
pub fn euler_step(latent: &mut [f32], denoised: &[f32], sigma: f32, next: f32) {
    for (x, &x0) in latent.iter_mut().zip(denoised) {
        let velocity = (*x - x0) / sigma;
        *x += velocity * (next - sigma);
    }
}

/// The level below `next` that an ancestral step goes to, and how much noise brings it back. In f32, as in the reference:
/// near noise level 1 they depend on it.
pub fn ancestral_coefficients(sigma: f32, next: f32, eta: f32) -> (f32, f32) {
    if eta == 0.0 {
        return (next, 0.0);
    }
    let down = next * (1.0 + (next / sigma - 1.0) * eta);
    let kept = down * (1.0 - next) / (1.0 - down);
    (down, (next * next - kept * kept).max(0.0).sqrt())
}

/// One ancestral Euler step between two noise levels, with the noise `z`.
pub fn ancestral_step(
    latent: &[f32],
    denoised: &[f32],
    z: &[f32],
    [sigma, next]: [f32; 2],
    eta: f64,
    noise: f64,
) -> Vec<f32> {
    if next == 0.0 {
        return denoised.into();
    }
    let (down, renoise) = ancestral_coefficients(sigma, next, eta as f32);
    let ratio = down / sigma;
    // 1 without fresh noise: the step then ends where it went.
    let (scale, renoise) = ((1.0 - next) / (1.0 - down), noise as f32 * renoise);
    let step = |((x, x0), z): ((&f32, &f32), &f32)| scale * (ratio * x + (1.0 - ratio) * x0) + renoise * z;
    latent.iter().zip(denoised).zip(z).map(step).collect()
}

/// One Euler step along a velocity extrapolated from the last one, which it replaces.
pub fn gradient_estimation_step(
    latent: &mut [f32],
    denoised: &[f32],
    [sigma, next]: [f32; 2],
    gamma: f64,
    last: &mut Option<Vec<f32>>,
) {
    if next == 0.0 {
        latent.copy_from_slice(denoised);
        return;
    }
    let gamma = gamma as f32;
    let velocity: Vec<f32> = latent.iter().zip(denoised).map(|(x, x0)| (x - x0) / sigma).collect();
    let estimated: Vec<f32> = match last {
        None => denoised.into(),
        Some(last) => {
            let both = velocity.iter().zip(&*last).map(|(v, last)| gamma * (v - last) + last);
            latent.iter().zip(both).map(|(x, u)| x - u * sigma).collect()
        }
    };
    *last = Some(velocity);
    euler_step(latent, &estimated, sigma, next);
}

/// One CFG++ step: towards the guided prediction, along the direction from the negative one.
pub fn cfg_plus_plus_step(
    latent: &[f32],
    denoised: &[f32],
    negative: &[f32],
    z: &[f32],
    [sigma, next]: [f32; 2],
    eta: f64,
    noise: f64,
) -> Vec<f32> {
    let alpha = |sigma: f32| (1.0 - sigma).max(f32::EPSILON);
    let (eta, noise, scale, from_scale) = (eta as f32, noise as f32, alpha(next), alpha(sigma));
    // Noise levels relative to the signal, of which ancestral steps are made.
    let (a, b) = (sigma / from_scale, next / scale);
    let variance = b * b * (a * a - b * b).max(0.0) / (a * a);
    let up = b.min(eta * variance.sqrt());
    let down = scale * (b * b - up * up).max(0.0).sqrt();
    let renoise = if eta > 0.0 && noise > 0.0 { scale * noise * up } else { 0.0 };
    let step = |(((x, x0), u), z): (((&f32, &f32), &f32), &f32)| {
        scale * x0 + down * ((x - from_scale * u) / sigma) + renoise * z
    };
    latent.iter().zip(denoised).zip(negative).zip(z).map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::super::schedule::DISTILLED_STAGE_1;
    use super::*;

    /// Knows the answer.
    struct Oracle {
        answer: Vec<f32>,
        evaluations: usize,
        draws: Vec<(String, usize)>,
    }

    impl Model for Oracle {
        fn predict(&mut self, states: &Per<State>, _: f32, _: usize) -> Result<Per<Prediction>, RunError> {
            self.evaluations += 1;
            let of = |state: &State| Prediction { denoised: state.blended(&self.answer), negative: None };
            Ok(Per { video: states.video.as_ref().map(of), audio: None })
        }

        fn noise(&mut self, kind: &str, step: usize, _: Modality, count: usize) -> Result<Vec<f32>, RunError> {
            self.draws.push((kind.into(), step));
            Ok((0..count).map(|i| (i as f32 * 1.7).sin()).collect())
        }

        fn stepped(&mut self, _: usize, _: &Per<State>) {}

        fn show(&mut self, _: &str, _: usize, _: Modality, _: &[f32]) {}
    }

    /// A state of two tokens, the second of which is kept.
    fn state() -> State {
        let mut state = State::new(2, vec![0.0; 4], 1, 0, Some(vec![3.0, -1.0, 0.0, 0.0]));
        state.clean = vec![0.0, 0.0, 5.0, 6.0];
        state.latent[2..].copy_from_slice(&[5.0, 6.0]);
        state.mask[1] = 0.0;
        state
    }

    #[test]
    fn every_sampler_reaches_a_perfect_prediction_and_keeps_what_is_masked() {
        let samplers = [
            (Sampler::Euler, 8),
            (Sampler::Ancestral { eta: 1.0, noise: 1.0 }, 8),
            (Sampler::Res2s, 17),
            (Sampler::GradientEstimation { gamma: 2.0 }, 8),
            (Sampler::CfgPlusPlus { eta: 1.0, noise: 1.0 }, 8),
        ];
        for (sampler, evaluations) in samplers {
            let mut oracle = Oracle { answer: vec![0.5, 0.25, 9.0, 9.0], evaluations: 0, draws: Vec::new() };
            let mut states = Per { video: Some(state()), audio: None };
            sample(sampler, &DISTILLED_STAGE_1, &mut states, &mut oracle).unwrap();
            let found = &states.video.unwrap().latent;
            let is_near = found.iter().zip([0.5, 0.25, 5.0, 6.0]).all(|(a, b)| (a - b).abs() < 1e-4);
            assert!(is_near, "{sampler:?}: {found:?}");
            assert_eq!(oracle.evaluations, evaluations, "{sampler:?}");
        }
    }

    /// Published values on the distilled list.
    #[test]
    fn ancestral_coefficients_are_the_published_ones() {
        let published: [[f32; 4]; 2] = [[1.0, 0.99375, 0.987539, 0.86151], [0.725, 0.421875, 0.245488, 0.377621]];
        for [sigma, next, down, renoise] in published {
            let found = ancestral_coefficients(sigma, next, 1.0);
            assert!((found.0 - down).abs() < 2e-6 && (found.1 - renoise).abs() < 1e-5, "{found:?}");
        }
    }

    /// Says what is written down, one list of values per evaluation and modality.
    struct Script {
        video: Vec<Vec<f32>>,
        audio: Vec<Vec<f32>>,
    }

    impl Model for Script {
        fn predict(&mut self, _: &Per<State>, _: f32, step: usize) -> Result<Per<Prediction>, RunError> {
            let of = |said: &[Vec<f32>]| Some(Prediction { denoised: said[step].clone(), negative: None });
            Ok(Per { video: of(&self.video), audio: of(&self.audio) })
        }

        fn noise(&mut self, _: &str, _: usize, _: Modality, _: usize) -> Result<Vec<f32>, RunError> {
            Err(RunError::Internal("no noise is drawn".into()))
        }

        fn stepped(&mut self, _: usize, _: &Per<State>) {}

        fn show(&mut self, _: &str, _: usize, _: Modality, _: &[f32]) {}
    }

    /// By hand, from 1 through predictions 0, 0.1, 0.2 and 0.7. Velocities 1, 0.8 and 0.6 are extrapolated with gamma 2 to
    /// 0.6 and 0.4 (from 0.8, not from 0.6), and the last step is the prediction.
    #[test]
    fn gradient_estimation_extrapolates_each_velocity_from_the_one_before() {
        let levels = [1.0, 0.5, 0.25, 0.125, 0.0];
        let state = || Some(State::new(1, vec![0.0; 2], 1, 0, Some(vec![1.0])));
        let run = |steps: usize, gamma: f64| {
            let said = |values: [f32; 4]| values.map(|value| vec![value]).to_vec();
            // Each modality has velocities of its own: that of sound never changes.
            let mut script = Script { video: said([0.0, 0.1, 0.2, 0.7]), audio: said([0.0; 4]) };
            let mut states = Per { video: state(), audio: state() };
            sample(Sampler::GradientEstimation { gamma }, &levels[..=steps], &mut states, &mut script).unwrap();
            [states.video.unwrap().latent[0], states.audio.unwrap().latent[0]]
        };
        for (steps, expected) in [(1, [0.5, 0.5]), (2, [0.35, 0.25]), (3, [0.3, 0.125]), (4, [0.7, 0.0])] {
            let found = run(steps, 2.0);
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{steps}: {found:?}");
        }
        // Without extrapolation the second step is Euler's: 0.5 - 0.8 / 4.
        assert!((run(2, 1.0)[0] - 0.3).abs() < 1e-6);
    }

    #[test]
    fn gradient_estimation_with_gamma_1_is_euler() {
        let (mut a, mut b) = (vec![3.0f32, -1.0], vec![3.0f32, -1.0]);
        let mut last = None;
        for (i, w) in DISTILLED_STAGE_1.windows(2).enumerate() {
            let x0 = [0.5 + i as f32 / 10.0, 0.25];
            euler_step(&mut a, &x0, w[0], w[1]);
            gradient_estimation_step(&mut b, &x0, [w[0], w[1]], 1.0, &mut last);
        }
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
    }
}
