//! Schedules, samplers and guidance of the driver against recorded tables.

use ltxc_ir::plan::{CfgRule, Guider, Pass, Schedule};
use ltxc_runtime::pipeline::guidance::{ActiveGuider, Predictions};
use ltxc_runtime::pipeline::sampler::{
    Res2sCoefficients, ancestral_coefficients, ancestral_step, cfg_plus_plus_step, euler_step, sde_step,
};
use ltxc_runtime::pipeline::schedule::{DEFAULT_TOKENS, DISTILLED_STAGE_1, DISTILLED_STAGE_2, noise_levels, shifted};
use ltxc_runtime::pipeline::state::State;
use ltxc_tests::compare::relative_l2;
use ltxc_tests::fixtures::{TensorFile, of_second_release};
use ltxc_tests::recorded::Recorded;

/// Relative L2 limit of everything the driver computes itself.
const LIMIT: f64 = 1e-6;
/// Limit of coefficients of ancestral steps; see there.
const COEFFICIENT_LIMIT: f64 = 1e-5;

#[test]
fn every_recorded_schedule() {
    let mut recorded = Recorded::required("common/schedules");
    let names: Vec<String> = recorded.file.iter().map(|(name, _)| name.to_string()).collect();
    for name in names {
        let parts: Vec<&str> = name.splitn(3, '.').collect();
        let steps = parts.get(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let levels = |schedule| noise_levels(schedule, &[], steps).unwrap_or_else(|e| panic!("{name}: {e}"));
        let narrow = |levels: Vec<f64>| levels.into_iter().map(|s| s as f32).collect();
        let own: Vec<f32> = match parts[..] {
            ["distilled"] => DISTILLED_STAGE_1.into(),
            ["distilled_stage2"] => DISTILLED_STAGE_2.into(),
            ["linear_quadratic", _] => levels(Schedule::LinearQuadratic),
            ["beta", _] => levels(Schedule::Beta),
            ["ltx2", _] => levels(Schedule::Shifted { tokens: DEFAULT_TOKENS }),
            ["ltx2", _, "nostretch"] => narrow(shifted(steps, DEFAULT_TOKENS, None)),
            ["ltx2", _, rule] => match (rule.strip_prefix("terminal"), rule.strip_prefix("tok")) {
                (Some(terminal), _) => narrow(shifted(steps, DEFAULT_TOKENS, terminal.parse().ok())),
                (_, Some(grid)) => {
                    let tokens = grid.split('x').map(|n| n.parse::<u32>().expect("an extent")).product();
                    levels(Schedule::Shifted { tokens })
                }
                _ => panic!("{name}: an unknown schedule"),
            },
            _ => continue,
        };
        recorded.check(&name, &own, LIMIT);
    }
    let steps = recorded.input("res2s.h").to_f32();
    let of = |h: f32| {
        let Res2sCoefficients { a21, b1, b2 } = Res2sCoefficients::new(f64::from(h));
        [a21, b1, b2].map(|v| v as f32)
    };
    let own: Vec<f32> = steps.into_iter().flat_map(of).collect();
    let error = relative_l2(&own, &wide_tensor(&recorded, "res2s.a21_b1_b2"));
    recorded.note(error <= LIMIT, format!("res2s.a21_b1_b2: {error:.2e}"), &[]);
    recorded.finish();
}

/// The one kind of tensor that is recorded in f64, rounded.
fn wide_tensor(recorded: &Recorded, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(&recorded.file.path).expect("it was read before");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("it was read before");
    let view = file.tensor(name).expect("it is in the file");
    view.data().as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect()
}

#[test]
fn every_recorded_guider_and_step() {
    let mut recorded = Recorded::required("common/guiders");
    let passes = [
        (Pass::Conditioned, "cond"),
        (Pass::Negative, "uncond"),
        (Pass::Perturbed, "perturbed"),
        (Pass::Isolated, "isolated"),
    ];
    let inputs = passes.map(|(pass, name)| (pass, recorded.input(name).to_f32()));
    let predictions = |count: usize| {
        let mut of = Predictions::default();
        inputs.iter().take(count).for_each(|(pass, x)| of.insert(*pass, x.clone()));
        of
    };
    let guided = |params: Guider| ActiveGuider::new(params).guide(&predictions(4));
    let cfg = |rule: CfgRule| guided(Guider { cfg: 3.0, rule, ..Guider::default() });
    recorded.check("cfg.3", &cfg(CfgRule::Plain), LIMIT);
    recorded.check("cfg_star.3", &cfg(CfgRule::Star), LIMIT);
    recorded.check("stg.1.5", &guided(Guider { stg: 1.5, ..Guider::default() }), LIMIT);
    recorded.check("apg.3.eta1.norm0", &cfg(CfgRule::Projected { eta: 1.0, threshold: 0.0 }), LIMIT);
    recorded.check("apg.3.eta0.5.norm4", &cfg(CfgRule::Projected { eta: 0.5, threshold: 4.0 }), LIMIT);

    let meta = recorded.meta().clone();
    for case in ["0", "1", "2", "3"].map(|i| format!("multimodal.{i}")) {
        let of = |key: &str, neutral: f64| meta[&case][key].as_f64().unwrap_or(neutral);
        let params = Guider {
            cfg: of("cfg_scale", 1.0),
            stg: of("stg_scale", 0.0),
            modality: of("modality_scale", 1.0),
            rescale: of("rescale_scale", 0.0),
            ..Guider::default()
        };
        recorded.check(&case, &guided(params), LIMIT);
    }
    let params = Guider { cfg: 4.0, rescale: 0.5, ..Guider::default() };
    recorded.check("multimodal.missing", &ActiveGuider::new(params).guide(&predictions(2)), LIMIT);
    momentum(&mut recorded, &inputs.each_ref().map(|(_, x)| &x[..]));
    for (skip_step, expected) in meta["skip_step"].as_object().expect("recorded") {
        let params = Guider { skip_step: skip_step.parse().expect("a number"), ..Guider::default() };
        let mut guider = ActiveGuider::new(params);
        guider.guide(&predictions(1));
        let found: Vec<bool> = (0..7).map(|step| guider.skips(step)).collect();
        let expected: Vec<bool> = expected.as_array().expect("a list").iter().filter_map(|v| v.as_bool()).collect();
        recorded.check_other(&format!("skip_step {skip_step}"), &found, &expected);
    }
    steps(&mut recorded);
    recorded.finish();
}

/// Two steps with momentum. The recording has what is added to the conditioned prediction.
fn momentum(recorded: &mut Recorded, [cond, negative, perturbed, isolated]: &[&[f32]; 4]) {
    let rule = CfgRule::Momentum { eta: 0.3, threshold: 5.0, momentum: -0.5 };
    let mut guider = ActiveGuider::new(Guider { cfg: 2.0, rule, ..Guider::default() });
    for (name, c, u) in [("legacy_apg.call1", cond, negative), ("legacy_apg.call2", perturbed, isolated)] {
        let mut predictions = Predictions::default();
        predictions.insert(Pass::Conditioned, c.to_vec());
        predictions.insert(Pass::Negative, u.to_vec());
        let added: Vec<f32> = guider.guide(&predictions).iter().zip(*c).map(|(p, c)| p - c).collect();
        recorded.check(name, &added, LIMIT);
    }
}

fn steps(recorded: &mut Recorded) {
    let input = |recorded: &mut Recorded, name: &str| recorded.input(name).to_f32();
    let [sample, denoised, noise, sigmas] =
        ["sample", "denoised", "noise", "sigmas"].map(|name| input(recorded, &format!("step.{name}")));
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&v| f64::from(v)).collect() };
    for (i, pair) in sigmas.windows(2).enumerate() {
        let mut latent = sample.clone();
        euler_step(&mut latent, &denoised, pair[0], pair[1]);
        recorded.check(&format!("step.euler.{i}"), &latent, LIMIT);
        let (sigma, next) = (f64::from(pair[0]), f64::from(pair[1]));
        let stepped = sde_step(&wide(&sample), &wide(&denoised), &wide(&noise), sigma, next);
        let stepped: Vec<f32> = stepped.into_iter().map(|v| v as f32).collect();
        recorded.check(&format!("step.res2s.{i}"), &stepped, LIMIT);
    }
    let mask = input(recorded, "post_process.mask");
    let channels = sample.len() / mask.len();
    let state =
        State { mask, ..State::new(channels, vec![0.0; 2 * sample.len() / channels], 1, 0, Some(sample.clone())) };
    recorded.check("post_process.out", &state.blended(&denoised), LIMIT);
    let whole = State { mask: vec![1.0; state.tokens()], ..state };
    recorded.check("to_denoised", &whole.prediction(&denoised, 0.7), LIMIT);
    // Velocity and prediction are each other's inverse.
    let velocity = input(recorded, "to_velocity");
    let back = whole.prediction(&velocity, 0.7);
    let error = relative_l2(&back, &denoised);
    recorded.note(error <= LIMIT, format!("to_velocity and back: {error:.2e}"), &["to_velocity"]);
}

#[test]
fn every_recorded_ancestral_step() {
    let Some(path) = of_second_release("ltx25/ancestral.safetensors") else { return };
    let mut recorded = Recorded::new(TensorFile::read(&path));
    let [sample, denoised, negative, noise, sigmas] =
        ["sample", "denoised", "uncond", "noise", "sigmas"].map(|name| recorded.input(name).to_f32());
    let names: Vec<String> = recorded.file.iter().map(|(name, _)| name.to_string()).collect();
    for name in names {
        // `ancestral.eta0.3.s0.8.5`, `cfgpp.eta1.0.2`, `coef.eta0.3.renoise`
        let Some((kind, rest)) = name.split_once(".eta") else { continue };
        let (rest, last) = rest.rsplit_once('.').expect("a name with parts");
        let (eta, scale) = rest.split_once(".s").unwrap_or((rest, "1"));
        let [eta, scale] = [eta, scale].map(|v| v.parse::<f64>().expect("a number"));
        let step = last.parse::<usize>().unwrap_or(0);
        let pair = [sigmas[step], sigmas[step + 1]];
        let own = match kind {
            "ancestral" => ancestral_step(&sample, &denoised, &noise, pair, eta, scale),
            "cfgpp" => cfg_plus_plus_step(&sample, &denoised, &negative, &noise, pair, eta, scale),
            "coef" => {
                let of = |w: &[f32]| ancestral_coefficients(w[0], w[1], eta as f32);
                let both = sigmas[..sigmas.len() - 1].windows(2).map(of);
                let own: Vec<f32> =
                    both.map(|(down, renoise)| if last == "renoise" { renoise } else { down }).collect();
                // Recorded in f64. In f32, 1 minus the level is off by half an ulp of it, and the kept part with it:
                // (1 - next) / (1 - down)² times 6e-8, of a root that is about 1.
                recorded.check_largest(&name, &own, COEFFICIENT_LIMIT);
                continue;
            }
            _ => panic!("{name}: an unknown step"),
        };
        recorded.check(&name, &own, LIMIT);
    }
    recorded.finish();
}
