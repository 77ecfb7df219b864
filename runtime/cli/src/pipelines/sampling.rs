//! What the flags for sampling and guidance change, in a definition when a plan is compiled, and in a plan when it runs.

use anyhow::{Result, bail};
use ltxc_ir::plan::{CfgRule, Guidance, Guider, Modality, Sampler, Schedule, Stage};
use ltxc_runtime::pipeline::StageChoice;
use ltxc_runtime::pipeline::schedule::{DEFAULT_TOKENS, DISTILLED_STAGE_1, noise_levels};

use crate::args::{RuleName, SamplerName, SamplingArgs, ScheduleName, StgMode};

/// Threshold of projected guidance with momentum where none is given: ltx_core/components/guiders.py, release 1.2.0.
const MOMENTUM_THRESHOLD: f64 = 5.0;

/// The guidance of a stage with the flags applied, for the modalities that there are.
///
/// # Errors
/// Guidance for a stage that has none, or a scale that is not a number.
pub fn guidance(planned: Option<&Guidance>, args: &SamplingArgs, modalities: &[Modality]) -> Result<Option<Guidance>> {
    let Some(planned) = planned else {
        if let Some(flag) = args.guidance_flag() {
            bail!(
                "`{flag}` is for guided pipelines; this one runs one pass per step, and a distilled model is not to be guided"
            );
        }
        return Ok(None);
    };
    let mut guided = planned.clone();
    let (rescale, rescale_audio) = (args.rescale.or(args.rescale_both), args.rescale_audio.or(args.rescale_both));
    let rule = args.rule()?;
    let (stg, stg_audio) = args.stg_scales(planned)?;
    let values = [
        (
            &mut guided.video,
            [args.cfg.or(args.apg_scale), stg, args.modality, rescale],
            &args.stg_blocks,
            args.video_skip_step,
        ),
        (
            &mut guided.audio,
            [args.cfg_audio, stg_audio, args.modality_audio, rescale_audio],
            &args.stg_blocks_audio,
            args.audio_skip_step,
        ),
    ];
    for (guider, scales, blocks, skip_step) in values {
        let Guider { cfg, stg, modality, rescale, .. } = guider;
        for (value, given) in [cfg, stg, modality, rescale].into_iter().zip(scales) {
            *value = given.unwrap_or(*value);
            if !value.is_finite() {
                bail!("a guidance scale is {value}, expected a number");
            }
        }
        guider.stg_blocks = blocks.clone().unwrap_or(std::mem::take(&mut guider.stg_blocks));
        guider.skip_step = skip_step.unwrap_or(guider.skip_step);
        guider.rule = rule.unwrap_or(guider.rule);
    }
    for (flag, given, guider) in [
        ("--video-stg-guidance-scale", args.stg, &guided.video),
        ("--audio-stg-guidance-scale", args.stg_audio, &guided.audio),
    ] {
        if given.is_some_and(|scale| scale != 0.0) && guider.stg != 0.0 && guider.stg_blocks.is_empty() {
            let blocks = flag.replace("guidance-scale", "blocks");
            bail!("`{flag} {}` acts in blocks, and this pipeline has none of its own; give `{blocks}`", guider.stg);
        }
    }
    match modalities {
        // One alone has nothing to be isolated from.
        [Modality::Video] => (guided.audio, guided.video.modality) = (Guider::default(), 1.0),
        [Modality::Audio] => (guided.video, guided.audio.modality) = (Guider::default(), 1.0),
        _ => {}
    }
    Ok(Some(guided))
}

/// What the flags change in a stage of a plan. `steps` and `sigmas` choose its noise levels.
///
/// # Errors
/// Flags that exclude each other, or that the stage cannot follow.
pub fn stage_choice(
    stage: &Stage,
    modalities: &[Modality],
    args: &SamplingArgs,
    steps: Option<usize>,
    sigmas: Option<&[f32]>,
) -> Result<StageChoice> {
    args.check()?;
    let schedule = args.schedule.map(|name| match (name, stage.schedule) {
        (ScheduleName::Ltx2, Schedule::Shifted { tokens }) => Schedule::Shifted { tokens },
        (ScheduleName::Ltx2, _) => Schedule::Shifted { tokens: DEFAULT_TOKENS },
        (ScheduleName::LinearQuadratic, _) => Schedule::LinearQuadratic,
        (ScheduleName::Beta, _) => Schedule::Beta,
        (ScheduleName::Distilled, _) => Schedule::Distilled,
    });
    let own = if schedule == Some(Schedule::Distilled) { &DISTILLED_STAGE_1[..] } else { &stage.sigmas };
    let levels = match (sigmas, steps, schedule) {
        (Some(_), Some(_), _) => {
            bail!("`--sigmas` and `--num-inference-steps` both choose the noise levels; give one of them")
        }
        (Some(_), _, Some(_)) => bail!("`--sigmas` and `--schedule` both choose the noise levels; give one of them"),
        (Some(list), None, None) => Some(list.to_vec()),
        (None, None, None) => None,
        (None, steps, schedule) => {
            let steps = steps.unwrap_or(own.len() - 1);
            let levels = noise_levels(schedule.unwrap_or(stage.schedule), own, steps);
            Some(levels.map_err(anyhow::Error::msg)?)
        }
    };
    let guidance = match args.guidance_flag() {
        Some(_) => guidance(stage.guidance.as_ref(), args, modalities)?,
        None => None,
    };
    Ok(StageChoice { sigmas: levels, sampler: args.sampler()?, guidance, levels: Vec::new() })
}

impl SamplingArgs {
    /// The sampler that is asked for.
    ///
    /// # Errors
    /// Gradient estimation and another one.
    pub fn sampler(&self) -> Result<Option<Sampler>> {
        // Other tools leave gradient estimation out so.
        let gamma = self.ge_gamma.filter(|&gamma| gamma != 0.0);
        let name = match (self.sampler, gamma) {
            (Some(SamplerName::GradientEstimation), None) if self.ge_gamma.is_some() => {
                bail!("`--sampler ge --ge-gamma 0` is no gradient estimation; leave one of them out")
            }
            (Some(SamplerName::GradientEstimation) | None, Some(_)) => SamplerName::GradientEstimation,
            (Some(_), Some(_)) => bail!("`--ge-gamma` is for gradient estimation; leave `--sampler` or this out"),
            (Some(name), None) => name,
            (None, None) => return Ok(None),
        };
        Ok(Some(match name {
            SamplerName::Euler => Sampler::Euler,
            SamplerName::Ancestral => Sampler::Ancestral { eta: 1.0, noise: 1.0 },
            SamplerName::Res2s => Sampler::Res2s,
            SamplerName::GradientEstimation => Sampler::GradientEstimation { gamma: gamma.unwrap_or(2.0) },
            SamplerName::CfgPlusPlus => Sampler::CfgPlusPlus { eta: 1.0, noise: 1.0 },
        }))
    }

    /// Checks that numbers are some.
    ///
    /// # Errors
    /// One that is infinite or none.
    pub fn check(&self) -> Result<()> {
        let numbers = [
            ("--ge-gamma", self.ge_gamma),
            ("--apg-eta", self.apg_eta),
            ("--apg-norm-threshold", self.apg_norm_threshold),
            ("--apg-momentum", self.apg_momentum),
        ];
        match numbers.into_iter().find_map(|(flag, value)| Some((flag, value.filter(|value| !value.is_finite())?))) {
            Some((flag, value)) => bail!("`{flag} {value}` is not a number that can be computed with"),
            None => Ok(()),
        }
    }

    /// Scales of STG for video and sound, where they are not those of the plan.
    fn stg_scales(&self, planned: &Guidance) -> Result<(Option<f64>, Option<f64>)> {
        let Some(mode) = self.stg_mode else { return Ok((self.stg, self.stg_audio)) };
        if self.stg_audio.is_some() {
            bail!("`--stg-mode` says what one scale holds for; leave `--audio-stg-guidance-scale` out");
        }
        let (video, audio) = (self.stg.unwrap_or(planned.video.stg), self.stg.unwrap_or(planned.audio.stg));
        Ok(match mode {
            StgMode::Video => (Some(video), Some(0.0)),
            StgMode::Audio => (Some(0.0), Some(audio)),
            StgMode::Both => (Some(video), Some(audio)),
        })
    }

    /// The rule that is asked for.
    fn rule(&self) -> Result<Option<CfgRule>> {
        let eta = self.apg_eta.unwrap_or(1.0);
        let given =
            [self.apg_scale, self.apg_eta, self.apg_norm_threshold, self.apg_momentum].iter().any(Option::is_some);
        Ok(match (self.cfg_rule, self.apg_momentum) {
            (Some(RuleName::Plain | RuleName::Star), _) if given => {
                bail!("flags of projected guidance (`--apg-…`) need `--cfg-rule apg`")
            }
            (Some(RuleName::Plain), _) => Some(CfgRule::Plain),
            (Some(RuleName::Star), _) => Some(CfgRule::Star),
            (_, Some(momentum)) if momentum != 0.0 => {
                let threshold = self.apg_norm_threshold.unwrap_or(MOMENTUM_THRESHOLD);
                Some(CfgRule::Momentum { eta, threshold, momentum })
            }
            (None, _) if !given => None,
            _ => Some(CfgRule::Projected { eta, threshold: self.apg_norm_threshold.unwrap_or(0.0) }),
        })
    }

    /// A flag that is given and changes guidance.
    fn guidance_flag(&self) -> Option<&'static str> {
        let blocks = |b: &Option<Vec<u32>>| b.is_some();
        let given = [
            ("--video-cfg-guidance-scale", self.cfg.is_some()),
            ("--audio-cfg-guidance-scale", self.cfg_audio.is_some()),
            ("--cfg-rule", self.cfg_rule.is_some()),
            ("--video-stg-guidance-scale", self.stg.is_some()),
            ("--audio-stg-guidance-scale", self.stg_audio.is_some()),
            ("--stg-mode", self.stg_mode.is_some()),
            ("--video-stg-blocks", blocks(&self.stg_blocks)),
            ("--audio-stg-blocks", blocks(&self.stg_blocks_audio)),
            ("--a2v-guidance-scale", self.modality.is_some()),
            ("--v2a-guidance-scale", self.modality_audio.is_some()),
            ("--video-rescale-scale", self.rescale.is_some()),
            ("--audio-rescale-scale", self.rescale_audio.is_some()),
            ("--ltx2-rescale-scale", self.rescale_both.is_some()),
            ("--apg-scale", self.apg_scale.is_some()),
            ("--video-skip-step", self.video_skip_step.is_some()),
            ("--audio-skip-step", self.audio_skip_step.is_some()),
            ("--apg-eta", self.apg_eta.is_some()),
            ("--apg-norm-threshold", self.apg_norm_threshold.is_some()),
            ("--apg-momentum", self.apg_momentum.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }
}
