//! Noise levels and the Euler step.
//!
//! Source: spec/pipelines §5.2, §6.2.

/// Noise levels of a distilled model, first stage.
pub const DISTILLED_STAGE_1: [f32; 9] = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0];
/// Noise levels of a distilled model, second stage.
pub const DISTILLED_STAGE_2: [f32; 4] = [0.909375, 0.725, 0.421875, 0.0];

/// One Euler step of the rectified flow, from `sigma` to `next`.
pub fn euler_step(latent: &mut [f32], denoised: &[f32], sigma: f32, next: f32) {
    for (x, &x0) in latent.iter_mut().zip(denoised) {
        let velocity = (*x - x0) / sigma;
        *x += velocity * (next - sigma);
    }
}

/// Checks noise levels given by a user.
///
/// # Errors
/// Which rule they break: at least two, finite, in `(0, 1]` and falling, the last one 0.
pub fn check_sigmas(sigmas: &[f32]) -> Result<(), String> {
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
/// If the list does not have that many steps.
pub fn distilled_subset(sigmas: &[f32], steps: usize) -> Result<Vec<f32>, String> {
    let available = sigmas.len() - 1;
    if steps == 0 || steps > available {
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

    #[test]
    fn distilled_list_is_linear_quadratic_with_8_steps() {
        let (steps, threshold) = (8usize, 0.025f64);
        let linear = steps / 2;
        let q = (steps - linear) as f64;
        let d = linear as f64 - threshold * steps as f64;
        let a = d / (linear as f64 * q * q);
        let b = threshold / linear as f64 - 2.0 * d / (q * q);
        let c = a * (linear * linear) as f64;
        for (i, &sigma) in DISTILLED_STAGE_1.iter().enumerate() {
            let x = i as f64;
            let y = match i {
                _ if i < linear => x * threshold / linear as f64,
                _ if i < steps => a * x * x + b * x + c,
                _ => 1.0,
            };
            assert!((1.0 - y - sigma as f64).abs() < 1e-6, "{i}: {} {sigma}", 1.0 - y);
        }
    }

    #[test]
    fn a_perfect_prediction_is_reached_at_sigma_0() {
        let mut x = vec![3.0f32, -1.0];
        for w in DISTILLED_STAGE_1.windows(2) {
            euler_step(&mut x, &[0.5, 0.25], w[0], w[1]);
        }
        assert!((x[0] - 0.5).abs() < 1e-5 && (x[1] - 0.25).abs() < 1e-5, "{x:?}");
    }

    #[test]
    fn subset_keeps_both_ends() {
        let s = distilled_subset(&DISTILLED_STAGE_1, 5).unwrap();
        assert_eq!((s.len(), s[0], s[5]), (6, 1.0, 0.0));
        assert_eq!(distilled_subset(&DISTILLED_STAGE_1, 8).unwrap(), DISTILLED_STAGE_1);
        assert!(distilled_subset(&DISTILLED_STAGE_1, 9).is_err());
    }
}
