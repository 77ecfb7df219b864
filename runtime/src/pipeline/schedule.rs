//! Noise levels: from at most 1 down to 0, one more than there are steps.
//!
//! Source: spec/pipelines §5.

use ltxc_ir::plan::{MOST_STEPS, Schedule};

/// Noise levels of a distilled model, first stage.
pub const DISTILLED_STAGE_1: [f32; 9] = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0];
/// Noise levels of a distilled model, second stage.
pub const DISTILLED_STAGE_2: [f32; 4] = [0.909375, 0.725, 0.421875, 0.0];
/// Noise levels of a distilled model, second stage of the HDR IC-LoRA.
pub const HDR_STAGE_2: [f32; 3] = [0.909375, 0.725, 0.0];
/// Number of tokens that the shifted schedule assumes where none is given.
pub const DEFAULT_TOKENS: u32 = 4096;

/// Noise levels of `steps` steps. `own`: the levels that a distilled model knows.
///
/// # Errors
/// A number of steps that the schedule does not have.
pub fn noise_levels(schedule: Schedule, own: &[f32], steps: usize) -> Result<Vec<f32>, String> {
    if schedule == Schedule::Distilled {
        return distilled_subset(own, steps);
    }
    if !(1..=MOST_STEPS).contains(&steps) {
        return Err(format!("a schedule has 1 to {MOST_STEPS} steps, {steps} were asked for"));
    }
    let levels = match schedule {
        Schedule::Shifted { tokens } => shifted(steps, tokens, Some(TERMINAL)),
        Schedule::Beta => beta(steps),
        _ => linear_quadratic(steps),
    };
    Ok(levels.into_iter().map(|s| s as f32).collect())
}

/// Level of the last step after stretching: ltx_core/components/schedulers.py, release 1.2.0, as all constants below.
pub const TERMINAL: f64 = 0.1;

/// Logarithm of the shift of [`shifted`] for a number of tokens.
pub fn mu(tokens: u32) -> f64 {
    const SHIFT: [(f64, f64); 2] = [(1024.0, 0.95), (4096.0, 2.05)];
    let [(t0, base), (t1, max)] = SHIFT;
    let slope = (max - base) / (t1 - t0);
    tokens as f64 * slope + (base - slope * t0)
}

/// Evenly spaced levels, shifted by the number of tokens, and stretched so that the last step starts at `terminal`.
///
/// In f32 and in the order of the reference, which divides by multiplying with a reciprocal: near 1 its roundings are what
/// is left of the distances from 1 that are stretched.
pub fn shifted(steps: usize, tokens: u32, terminal: Option<f64>) -> Vec<f64> {
    let shift = mu(tokens).exp() as f32;
    let level = |i: usize| {
        let u = (1.0 - i as f64 / steps as f64) as f32;
        if i == steps { 0.0 } else { (1.0 / (shift + (1.0 / u - 1.0))) * shift }
    };
    let mut levels: Vec<f32> = (0..=steps).map(level).collect();
    // One step alone starts at 1, which nothing can be stretched from.
    if let (Some(terminal), true) = (terminal, steps > 1) {
        let ratio = (1.0 - levels[steps - 1]) / (1.0 - terminal) as f32;
        levels[..steps].iter_mut().for_each(|s| *s = 1.0 - (1.0 - *s) / ratio);
    }
    levels.into_iter().map(f64::from).collect()
}

/// Evenly spaced down to a threshold for half of the steps, then along a parabola.
pub fn linear_quadratic(steps: usize) -> Vec<f64> {
    const THRESHOLD: f64 = 0.025;
    let linear = steps / 2;
    if linear == 0 {
        return vec![1.0, 0.0];
    }
    let (l, s) = (linear as f64, steps as f64);
    let quadratic = s - l;
    let difference = l - THRESHOLD * s;
    let a = difference / (l * quadratic * quadratic);
    let b = THRESHOLD / l - 2.0 * difference / (quadratic * quadratic);
    let c = a * l * l;
    let level = |i: usize| {
        let x = i as f64;
        1.0 - if i < linear { x * THRESHOLD / l } else { a * x * x + b * x + c }
    };
    (0..steps).map(level).chain([0.0]).collect()
}

/// Quantiles of a beta distribution, looked up in a shifted table. Equal ones are left out, so there may be fewer.
pub fn beta(steps: usize) -> Vec<f64> {
    const TABLE: f64 = 10000.0;
    const SHIFT: f64 = 2.37;
    const SHAPE: f64 = 0.6;
    let level = |index: f64| {
        let t = (index + 1.0) / TABLE;
        let shift = SHIFT.exp();
        shift / (shift + (1.0 / t - 1.0))
    };
    let index = |i: usize| (beta_quantile(1.0 - i as f64 / steps as f64, SHAPE) * (TABLE - 1.0)).round_ties_even();
    let mut indices: Vec<f64> = (0..steps).map(index).collect();
    indices.dedup();
    indices.into_iter().map(level).chain([0.0]).collect()
}

/// The value below which a beta distribution with both parameters `shape` lies with probability `p`, by bisection.
fn beta_quantile(p: f64, shape: f64) -> f64 {
    if p > 0.5 {
        return 1.0 - beta_quantile(1.0 - p, shape);
    }
    // Exactly, because it is looked up halfway between two entries of a table.
    if p == 0.5 {
        return 0.5;
    }
    // The distribution is symmetric about a half.
    let half = half_beta_integral(0.5, shape);
    let (mut low, mut high) = (0.0, 0.5);
    while high - low > f64::EPSILON * high {
        let middle = (low + high) / 2.0;
        if middle <= low || middle >= high {
            break;
        }
        if half_beta_integral(middle, shape) / half < 2.0 * p { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// `∫₀ˣ (t (1 − t))^(shape − 1) dt` for `x` up to a half, by the power series of the second factor.
fn half_beta_integral(x: f64, shape: f64) -> f64 {
    let (mut term, mut sum) = (x.powf(shape), 0.0);
    for n in 0..200 {
        let add = term / (shape + n as f64);
        sum += add;
        if add < sum * f64::EPSILON {
            break;
        }
        term *= x * (n as f64 + 1.0 - shape) / (n as f64 + 1.0);
    }
    sum
}

/// Checks noise levels given by a user.
///
/// # Errors
/// Which rule they break: at least two and at most one more than [`MOST_STEPS`], finite, in `(0, 1]` and falling, the last one 0.
pub fn check_sigmas(sigmas: &[f32]) -> Result<(), String> {
    if sigmas.len() > MOST_STEPS + 1 {
        return Err(format!("{} noise levels are too many, expected at most {}", sigmas.len(), MOST_STEPS + 1));
    }
    let falling = sigmas.windows(2).all(|w| w[0] > w[1]);
    let in_range = sigmas.iter().all(|s| (0.0..=1.0).contains(s));
    if sigmas.len() < 2 || !falling || !in_range || sigmas.last() != Some(&0.0) {
        return Err(format!("noise levels {sigmas:?} must fall from at most 1 to 0"));
    }
    Ok(())
}

/// The best choice of `steps` steps out of a distilled list: keeps both ends and makes, in this order, the largest gap,
/// the last gap and the sum of squared gaps smallest.
///
/// # Errors
/// If the list does not have that many steps, or too many to look at every choice.
fn distilled_subset(sigmas: &[f32], steps: usize) -> Result<Vec<f32>, String> {
    const MOST_CHOICES: usize = 16; // levels between the ends; distilled lists have 7
    let available = sigmas.len() - 1;
    if steps == available {
        return Ok(sigmas.into());
    }
    if steps == 0 || steps > available || available > MOST_CHOICES {
        return Err(format!("a distilled model runs 1 to {available} steps here, {steps} were asked for"));
    }
    let inner = available - 1;
    let mut best: Option<([f64; 3], Vec<f32>)> = None;
    for choice in 0u32..1 << inner {
        if choice.count_ones() as usize != steps - 1 {
            continue;
        }
        let kept = (0..inner).filter(|i| choice >> i & 1 == 1).map(|i| sigmas[i + 1]);
        let list: Vec<f32> = std::iter::once(sigmas[0]).chain(kept).chain([sigmas[available]]).collect();
        let gaps: Vec<f64> = list.windows(2).map(|w| (w[0] - w[1]) as f64).collect();
        let cost = [gaps.iter().copied().fold(0.0, f64::max), gaps[gaps.len() - 1], gaps.iter().map(|g| g * g).sum()];
        if best.as_ref().is_none_or(|(b, _)| cost < *b) {
            best = Some((cost, list));
        }
    }
    best.map(|(_, list)| list).ok_or_else(|| "no choice of steps".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len(), "{found:?}");
        found.iter().zip(expected).for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{found:?}"));
    }

    #[test]
    fn distilled_list_is_linear_quadratic_with_8_steps() {
        close(&linear_quadratic(8), &DISTILLED_STAGE_1.map(f64::from));
        close(&linear_quadratic(1), &[1.0, 0.0]);
    }

    /// Published levels of the high-quality pipeline at its own size, rounded to six digits.
    #[test]
    fn shifted_levels_are_the_published_ones() {
        close(&shifted(4, 4096, Some(0.1)), &[1.0, 0.867083, 0.631569, 0.1, 0.0]);
        let hq = [
            1.0, 0.993491, 0.986015, 0.97734, 0.967151, 0.955015, 0.940314, 0.92214, 0.899096, 0.868923, 0.827707,
            0.768028, 0.673897, 0.503378, 0.1, 0.0,
        ];
        close(&shifted(15, 8160, Some(0.1)), &hq);
        close(&shifted(1, 4096, Some(0.1)), &[1.0, 0.0]);
    }

    #[test]
    fn every_schedule_falls_from_1_to_0() {
        for schedule in [Schedule::Shifted { tokens: 4096 }, Schedule::LinearQuadratic, Schedule::Beta] {
            for steps in [1, 2, 3, 7, 40, MOST_STEPS] {
                let levels = noise_levels(schedule, &[], steps).unwrap();
                check_sigmas(&levels).unwrap();
                assert!(levels.len() <= steps + 1 && levels[0] > 0.99, "{schedule:?} {steps}");
            }
            assert!(noise_levels(schedule, &[], 0).is_err());
        }
    }

    #[test]
    fn subset_keeps_both_ends() {
        let subset = |steps| noise_levels(Schedule::Distilled, &DISTILLED_STAGE_1, steps);
        let s = subset(5).unwrap();
        assert_eq!((s.len(), s[0], s[5]), (6, 1.0, 0.0));
        assert_eq!(subset(8).unwrap(), DISTILLED_STAGE_1);
        assert!(subset(9).is_err() && subset(0).is_err());
    }
}
