//! Guidance: one prediction of a modality out of those of several passes.
//!
//! # Easy to get wrong
//! - Guidance acts on predictions of the clean latent, before they are held to the mask.
//! - Standard deviations are over the whole tensor, appended tokens included, and unbiased.
//! - Scales against a pass that was not run have no effect.
//! - The momentum of projected guidance lives as long as the stage.
//!
//! Source: spec/pipelines §7.

use ltxc_ir::plan::{CfgRule, Guidance, Guider, Pass};

/// Keeps the norms and products of differences finite: ltx_core/components/guiders.py, release 1.2.0.
const EPSILON: f64 = 1e-8;

/// Guidance by noise level: upper bounds, ascending, and what holds up to them. Empty where there is no guidance.
pub type Levels<'a> = Vec<(f32, &'a Guidance)>;

/// What holds at a noise level: the entry with the smallest bound that is not below it, or the last.
pub fn at_level<'a>(levels: &Levels<'a>, sigma: f32) -> Option<&'a Guidance> {
    let found = levels.iter().find(|(bound, _)| *bound >= sigma).or(levels.last());
    found.map(|(_, guidance)| *guidance)
}

/// Predictions of one modality by the passes that were run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Predictions {
    of: Vec<(Pass, Vec<f32>)>,
}

impl Predictions {
    /// Adds the prediction of a pass.
    pub fn insert(&mut self, pass: Pass, prediction: Vec<f32>) {
        self.of.push((pass, prediction));
    }

    /// The prediction of a pass, if it was run.
    pub fn get(&self, pass: Pass) -> Option<&[f32]> {
        self.of.iter().find(|(p, _)| *p == pass).map(|(_, x)| &x[..])
    }

    /// All, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = (Pass, &[f32])> {
        self.of.iter().map(|(p, x)| (*p, &x[..]))
    }
}

/// A guider with what it remembers during a stage.
#[derive(Clone, Debug)]
pub struct ActiveGuider {
    /// Its parameters.
    pub params: Guider,
    /// Differences from the negative prediction so far, for momentum.
    running: Option<Vec<f32>>,
    /// The last guided prediction, for steps that are skipped.
    last: Option<Vec<f32>>,
}

impl ActiveGuider {
    /// A guider at the start of a stage.
    pub fn new(params: Guider) -> ActiveGuider {
        ActiveGuider { params, running: None, last: None }
    }

    /// Whether the step reuses the last prediction.
    pub fn skips(&self, step: usize) -> bool {
        self.last.is_some() && !step.is_multiple_of(self.params.skip_step as usize + 1)
    }

    /// Takes other parameters, and remembers what it did.
    pub fn change(&mut self, params: &Guider) {
        if self.params != *params {
            self.params.clone_from(params);
        }
    }

    /// The last guided prediction.
    pub fn last(&self) -> Option<&[f32]> {
        self.last.as_deref()
    }

    /// The guided prediction, which is remembered.
    pub fn guide(&mut self, predictions: &Predictions) -> Vec<f32> {
        let guided = self.combine(predictions);
        if self.params.skip_step > 0 {
            self.last = Some(guided.clone());
        }
        guided
    }

    fn combine(&mut self, predictions: &Predictions) -> Vec<f32> {
        let Some(cond) = predictions.get(Pass::Conditioned) else { return Vec::new() };
        let params = &self.params;
        let mut guided = cond.to_vec();
        if let (Some(negative), true) = (predictions.get(Pass::Negative), params.needs(Pass::Negative)) {
            let direction = match params.rule {
                CfgRule::Plain => difference(cond, negative),
                CfgRule::Star => star_difference(cond, negative),
                CfgRule::Projected { eta, threshold } => projected(cond, difference(cond, negative), eta, threshold),
                CfgRule::Momentum { eta, threshold, momentum } => {
                    let running = with_momentum(&mut self.running, difference(cond, negative), momentum);
                    projected(cond, running, eta, threshold)
                }
            };
            add(&mut guided, params.cfg_factor(), &direction);
        }
        if let (Some(perturbed), true) = (predictions.get(Pass::Perturbed), params.needs(Pass::Perturbed)) {
            add(&mut guided, params.stg, &difference(cond, perturbed));
        }
        if let (Some(isolated), true) = (predictions.get(Pass::Isolated), params.needs(Pass::Isolated)) {
            add(&mut guided, params.modality - 1.0, &difference(cond, isolated));
        }
        if params.rescale != 0.0 {
            rescale(&mut guided, cond, params.rescale);
        }
        guided
    }
}

/// `cond − other`.
fn difference(cond: &[f32], other: &[f32]) -> Vec<f32> {
    cond.iter().zip(other).map(|(c, o)| c - o).collect()
}

/// `cond − k · negative` with the `k` that makes it shortest (CFG*).
fn star_difference(cond: &[f32], negative: &[f32]) -> Vec<f32> {
    let k = (dot(cond, negative) / (dot(negative, negative) + EPSILON)) as f32;
    cond.iter().zip(negative).map(|(c, u)| c - k * u).collect()
}

/// A difference with its part along `cond` scaled by `eta`, and cut to the norm `threshold` before, if that is not 0.
fn projected(cond: &[f32], difference: Vec<f32>, eta: f64, threshold: f64) -> Vec<f32> {
    let norm = dot(&difference, &difference).sqrt();
    let cut = if threshold > 0.0 { (threshold / norm).min(1.0) as f32 } else { 1.0 };
    let difference: Vec<f32> = difference.into_iter().map(|g| g * cut).collect();
    let along = (dot(&difference, cond) / (dot(cond, cond) + EPSILON)) as f32;
    let eta = eta as f32;
    let part = |(g, c): (&f32, &f32)| {
        let parallel = along * c;
        eta * parallel + (g - parallel)
    };
    difference.iter().zip(cond).map(part).collect()
}

/// The difference with a share of the former ones, which it joins.
fn with_momentum(running: &mut Option<Vec<f32>>, difference: Vec<f32>, momentum: f64) -> Vec<f32> {
    let momentum = momentum as f32;
    let joined = match running.take() {
        Some(former) => former.iter().zip(&difference).map(|(r, g)| momentum * r + g).collect(),
        None => difference,
    };
    *running = Some(joined.clone());
    joined
}

/// Brings the standard deviation of `guided` to that of `cond`, as far as `share` says.
fn rescale(guided: &mut [f32], cond: &[f32], share: f64) {
    let factor = deviation(cond) / deviation(guided);
    let factor = (share * factor + (1.0 - share)) as f32;
    guided.iter_mut().for_each(|v| *v *= factor);
}

fn add(guided: &mut [f32], scale: f64, direction: &[f32]) {
    let scale = scale as f32;
    guided.iter_mut().zip(direction).for_each(|(p, d)| *p += scale * d);
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Standard deviation over all values, unbiased.
fn deviation(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let sum = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
    (sum / (n - 1.0).max(1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predictions() -> Predictions {
        let mut predictions = Predictions::default();
        let wave = |phase: f32| (0..64).map(|i| (i as f32 * 0.7 + phase).sin()).collect();
        Pass::ALL.into_iter().enumerate().for_each(|(i, pass)| predictions.insert(pass, wave(i as f32)));
        predictions
    }

    #[test]
    fn guidance_holds_up_to_its_noise_level() {
        let of = |cfg: f64| Guidance { video: Guider { cfg, ..Guider::default() }, ..Guidance::default() };
        let (low, high) = (of(2.0), of(4.0));
        let levels = vec![(0.5, &low), (0.9, &high)];
        let at = |sigma: f32| at_level(&levels, sigma).map(|g| g.video.cfg);
        // A bound belongs to what it bounds; above all of them the last one holds.
        assert_eq!([0.1, 0.5, 0.51, 0.9, 1.0].map(at), [2.0, 2.0, 4.0, 4.0, 4.0].map(Some));
        assert_eq!(at_level(&Vec::new(), 0.5), None);
    }

    #[test]
    fn neutral_guidance_changes_nothing() {
        let predictions = predictions();
        let guided = ActiveGuider::new(Guider::default()).guide(&predictions);
        assert_eq!(Some(&guided[..]), predictions.get(Pass::Conditioned));
    }

    #[test]
    fn full_rescale_keeps_the_standard_deviation() {
        let predictions = predictions();
        let params = Guider { cfg: 7.0, stg: 1.0, modality: 3.0, rescale: 1.0, ..Guider::default() };
        let guided = ActiveGuider::new(params).guide(&predictions);
        let cond = predictions.get(Pass::Conditioned).unwrap();
        assert!((deviation(&guided) / deviation(cond) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn projection_without_changes_is_the_difference() {
        let predictions = predictions();
        let both = [Pass::Conditioned, Pass::Negative].map(|p| predictions.get(p).unwrap());
        let plain = difference(both[0], both[1]);
        let same = projected(both[0], plain.clone(), 1.0, 0.0);
        assert!(plain.iter().zip(&same).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn steps_are_skipped_between_those_that_count() {
        let mut guider = ActiveGuider::new(Guider { skip_step: 2, ..Guider::default() });
        assert!(!guider.skips(1), "there is nothing to reuse");
        let guided = guider.guide(&predictions());
        let skipped: Vec<bool> = (0..7).map(|step| guider.skips(step)).collect();
        assert_eq!(skipped, [false, true, true, false, true, true, false]);
        assert_eq!(guider.last(), Some(&guided[..]));
    }
}
