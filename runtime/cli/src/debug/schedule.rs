//! `ltxc debug schedule`: noise levels of every schedule, and whether they equal those of a recording.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use ltxc_ir::plan::MOST_STEPS;
use ltxc_runtime::pipeline::schedule::{
    DEFAULT_TOKENS, DISTILLED_STAGE_1, DISTILLED_STAGE_2, TERMINAL, beta, linear_quadratic, mu, shifted,
};
use serde_json::json;

use super::recording::TensorFile;

/// Largest difference of a noise level in f32.
const LIMIT: f64 = 1e-6;

/// `ltxc debug schedule`.
#[derive(Debug, Args)]
pub struct ScheduleArgs {
    /// Number of steps.
    #[arg(long, default_value_t = 30)]
    pub steps: usize,
    /// Tokens that shift the schedule of the full models.
    #[arg(long, default_value_t = DEFAULT_TOKENS)]
    pub tokens: u32,
    /// Compare with the schedules of this file: `ltx2.30`, `ltx2.30.tok16x16x24`, `beta.8`, `linear_quadratic.8`, `distilled`.
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
}

/// Noise levels by the name that recordings have for them.
fn levels(name: &str) -> Option<Vec<f64>> {
    let wide = |list: &[f32]| list.iter().map(|&s| f64::from(s)).collect();
    let parts: Vec<&str> = name.split('.').collect();
    let steps = |text: &str| text.parse::<usize>().ok().filter(|n| (1..=MOST_STEPS).contains(n));
    match parts[..] {
        ["distilled"] => Some(wide(&DISTILLED_STAGE_1)),
        ["distilled_stage2"] => Some(wide(&DISTILLED_STAGE_2)),
        ["ltx2", n] => Some(shifted(steps(n)?, DEFAULT_TOKENS, Some(TERMINAL))),
        ["ltx2", n, grid] => {
            let extents = grid.strip_prefix("tok")?.split('x').map(|e| e.parse::<u32>().ok());
            let tokens = extents.collect::<Option<Vec<u32>>>()?.into_iter().try_fold(1u32, u32::checked_mul)?;
            Some(shifted(steps(n)?, tokens, Some(TERMINAL)))
        }
        ["linear_quadratic", n] => Some(linear_quadratic(steps(n)?)),
        ["beta", n] => Some(beta(steps(n)?)),
        _ => None,
    }
}

/// `ltxc debug schedule`. Returns whether the recorded schedules are the same.
///
/// # Errors
/// A number of steps that no schedule has, or a file without schedules.
pub fn run(args: &ScheduleArgs, json_output: bool) -> Result<bool> {
    if !(1..=MOST_STEPS).contains(&args.steps) {
        bail!("`--steps {}` is out of range, expected 1 to {MOST_STEPS}", args.steps);
    }
    let Some(path) = &args.compare else {
        let n = args.steps;
        let all = [
            ("ltx2", shifted(n, args.tokens, Some(TERMINAL))),
            ("linear_quadratic", linear_quadratic(n)),
            ("beta", beta(n)),
            ("distilled", levels("distilled").unwrap_or_default()),
            ("distilled_stage2", levels("distilled_stage2").unwrap_or_default()),
        ];
        for (name, list) in all {
            // Only this one is shifted.
            let mu = (name == "ltx2").then(|| mu(args.tokens));
            if json_output {
                println!("{}", json!({"schedule": name, "mu": mu, "levels": list}));
            } else {
                let shown: Vec<String> = list.iter().map(|s| format!("{s:.6}")).collect();
                let mu = mu.map(|mu| format!("μ {mu:.4}: ")).unwrap_or_default();
                println!("{name:<18} {mu}{}", shown.join(" "));
            }
        }
        return Ok(true);
    };
    let file = TensorFile::open(path)?;
    let mut ok = true;
    let mut compared = 0;
    for (name, recorded) in file.iter() {
        let Some(found) = levels(name) else { continue };
        let recorded = recorded.to_f32();
        let same_length = found.len() == recorded.len();
        let difference = found.iter().zip(&recorded).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
        let equal = same_length && difference <= LIMIT;
        (ok, compared) = (ok && equal, compared + 1);
        if json_output {
            println!("{}", json!({"schedule": name, "largest_difference": difference, "equal": equal}));
        } else {
            println!("{name:<26} {} largest difference {difference:.1e}", if equal { "ok " } else { "BAD" });
        }
    }
    if compared == 0 {
        bail!("`{}` has no schedule of a known name, for example `ltx2.30`", path.display());
    }
    Ok(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_recordings_are_understood() {
        assert_eq!(levels("ltx2.30").unwrap().len(), 31);
        assert_ne!(levels("ltx2.8.tok2x2x3"), levels("ltx2.8"));
        assert_eq!(levels("distilled").unwrap().len(), 9);
        assert!(levels("res2s.h").is_none() && levels("ltx2.0").is_none() && levels("ltx2.8.nostretch").is_none());
    }
}
