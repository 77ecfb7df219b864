//! Flags of a shape beside a finished plan: a plan has its own, and is not run as if it had others.

use std::path::Path;

use anyhow::{Result, bail};
use clap::ValueEnum;
use ltxc_ir::DType;
use ltxc_ir::plan::summary::tensors;
use ltxc_ir::plan::{ADAPTER_SLOTS, Modality, Plan, Release, SLOT_DOWN};
use ltxc_runtime::media::Rational;

use crate::args::{PipelineName, ShapeArgs};
use crate::job::{self, VaeTile};
use crate::pipelines::definition;

/// Refuses flags that say something else than the plan at `path` was compiled for. Its own values may be repeated.
///
/// # Errors
/// The flag, what the plan has, and the way out.
pub fn check(args: &ShapeArgs, path: &Path, plan: &Plan) -> Result<()> {
    // Every field is named, so that a new one cannot be forgotten.
    let ShapeArgs {
        pipeline,
        height,
        width,
        size,
        num_frames,
        seconds,
        frame_rate,
        max_keyframes,
        skip_stage_2,
        reference_count,
        reference_attention,
        reference_version,
        no_audio,
        vae_tile,
        spatial_tile,
        high_quality,
        lora_rank,
        dtype,
        // Refused with and without a plan.
        quantization: _,
        // These are of a run. What the plan has no room for is refused where they act.
        device: _,
        enhance_prompt: _,
        sampling: _,
    } = args;
    let planned = &plan.pipeline;
    let video = &planned.video;
    let skips = planned.name == definition(PipelineName::IcLoraOneStage).name;
    let own_pipeline = if skips { definition(PipelineName::IcLora).name } else { &planned.name };
    // Flags give the size of the second stage even where that is left out.
    let shrink = if skips { 2 } else { 1 };
    // A plan that upscales was compiled for its clip.
    let ([frames, height_of_clip, width_of_clip], (num, den)) = planned.clip_shape();
    let (own_height, own_width) = (u64::from(height_of_clip) * shrink, u64::from(width_of_clip) * shrink);
    let rate = Rational::new(num, den)?;
    let doubles = planned.inputs.doubles_frames;
    // Those that are written.
    let own_frames = if doubles { frames.div_ceil(2) } else { frames };
    let references = planned.inputs.references.first();
    let refused = |flag: &str, given: &str, own: String| -> Result<()> {
        bail!(
            "the plan `{}` was compiled {own}, not with `--{flag}{given}`; leave `--{flag}` out, or compile a plan with it",
            path.display()
        )
    };
    let check = |flag: &str, given: Option<String>, own: String| match given {
        Some(given) if given != own => refused(flag, &format!(" {given}"), format!("with `--{flag} {own}`")),
        _ => Ok(()),
    };
    let check_number =
        |flag: &str, given: &Option<u32>, own: u64| check(flag, given.map(|n| n.to_string()), own.to_string());
    let check_switch = |flag: &str, given: bool, own: bool| match (given, own) {
        (true, false) => refused(flag, "", "without it".into()),
        _ => Ok(()),
    };

    check("pipeline", pipeline.map(|p| definition(p).name.into()), own_pipeline.into())?;
    check_switch("skip-stage-2", *skip_stage_2, skips)?;
    check_switch("no-audio", *no_audio, !planned.modalities().contains(&Modality::Audio))?;
    if let Some(size) = size {
        let given = job::size_of(size)?;
        check("size", Some(format!("{}x{}", given.0, given.1)), format!("{own_width}x{own_height}"))?;
    }
    check_number("height", height, own_height)?;
    check_number("width", width, own_width)?;
    if let Some(text) = frame_rate {
        let given = job::frame_rate(text)?;
        check("frame-rate", Some(given.to_string()), rate.to_string())?;
    }
    check_number("num-frames", num_frames, own_frames.into())?;
    check_switch("high-quality", *high_quality, doubles)?;
    if let Some(seconds) = seconds {
        let frames = job::frames_of(*seconds, rate)?;
        if frames != own_frames {
            refused("seconds", &format!(" {seconds}"), format!("with `--num-frames {own_frames}`"))?;
        }
    }
    check_number("max-keyframes", max_keyframes, video.max_keyframes.into())?;
    check_number("reference-count", reference_count, references.map_or(0, |r| r.count).into())?;
    check_switch("reference-attention", *reference_attention, references.is_some_and(|r| r.has_attention))?;
    let release = match planned.release {
        Release::V1_0_0 => "1.0.0",
        Release::V1_2_0 => "1.2.0",
    };
    check("reference-version", reference_version.and_then(name), release.into())?;
    check_number("lora-rank", lora_rank, adapter_rank(plan) as u64)?;
    let own_dtype = match planned.dtype {
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        _ => "f32",
    };
    check("dtype", dtype.and_then(name), own_dtype.into())?;
    let tile = match (vae_tile, spatial_tile) {
        (Some(text), _) => Some(("vae-tile", format!(" {text}"), VaeTile::parse(text)?)),
        (None, Some(pixels)) => Some(("spatial-tile", format!(" {pixels}"), VaeTile::square(*pixels as usize))),
        (None, None) => None,
    };
    if let (Some((flag, given, tile)), [Modality::Video, ..]) = (tile, &planned.modalities()[..]) {
        let factors = video.scale.map(|n| n as usize);
        let grid = [0, 1, 2].map(|axis| planned.decode.axes[axis].last().map_or(0, |tile| tile.end));
        if tile.tiles(grid, factors)? != planned.decode {
            refused(flag, &given, format!("with {} tiles of another size", planned.decode.len()))?;
        }
    }
    job::refuse_quantization(args, &path.display().to_string(), false)
}

/// What a value is called on the command line.
fn name(value: impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().into())
}

/// Rank of the slots for live adapters; 0 without.
fn adapter_rank(plan: &Plan) -> usize {
    let Some(source) = plan.sources.iter().position(|s| s.name == ADAPTER_SLOTS) else { return 0 };
    let slots = tensors(plan).into_iter().filter(|((s, key), _)| *s as usize == source && key.ends_with(SLOT_DOWN));
    slots.filter_map(|(_, ty)| ty.shape.first().copied()).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command, FromArgMatches};
    use ltxc_ir::plan::{AudioSettings, Pipeline, Stage, Target, VideoSettings};
    use ltxc_ir::tiling::{TilePlan, Tiling};

    use super::*;
    use crate::args::SamplingArgs;

    /// 9 frames of 96x64 with sound.
    fn plan() -> Plan {
        let (grid, factors) = ([2, 2, 3], [8, 32, 32]);
        let video = VideoSettings {
            height: 64,
            width: 96,
            frames: 9,
            frame_rate: (24, 1),
            channels: 8,
            scale: factors.map(|n| n as u32),
            ..VideoSettings::default()
        };
        let audio = AudioSettings { tokens: 9, ..AudioSettings::default() };
        let stages = vec![Stage { grid: grid.map(|n| n as u32), ..Stage::default() }];
        let decode = TilePlan::decode(grid, factors, &Tiling::WHOLE).unwrap();
        let pipeline = Pipeline { name: "distilled".into(), video, audio, stages, decode, ..Pipeline::default() };
        Plan {
            compiler: String::new(),
            target: Target::cpu(),
            sources: Vec::new(),
            functions: Vec::new(),
            programs: Vec::new(),
            groups: Vec::new(),
            pipeline,
        }
    }

    fn checked(line: &[&str]) -> Result<()> {
        let command = ShapeArgs::augment_args(Command::new("run").no_binary_name(true));
        let matches = command.try_get_matches_from(line)?;
        check(&ShapeArgs::from_arg_matches(&matches)?, Path::new("a.ltxplan"), &plan())
    }

    /// For every flag of a shape, what the plan above has, and something else.
    const VALUES: [(&str, &str, &str); 19] = [
        ("pipeline", "distilled", "two-stage"),
        ("height", "64", "256"),
        ("width", "96", "64"),
        ("size", "96x64", "64x96"),
        ("num-frames", "9", "17"),
        ("seconds", "0.4", "1"),
        ("frame-rate", "24/1", "30"),
        ("max-keyframes", "0", "3"),
        ("skip-stage-2", "", "+"),
        ("reference-count", "0", "1"),
        ("reference-attention", "", "+"),
        ("reference-version", "1.2.0", "1.0.0"),
        ("no-audio", "", "+"),
        ("vae-tile", "off", "64x32,16x8"),
        ("spatial-tile", "512", "256"),
        ("high-quality", "", "+"),
        ("lora-rank", "0", "8"),
        ("dtype", "f32", "bf16"),
        ("quantization", "none", "fp8-cast"),
    ];

    #[test]
    fn every_flag_of_a_shape_is_compared_with_the_plan() {
        let of_runs = SamplingArgs::augment_args(Command::new("sampling"));
        let of_runs: Vec<_> = of_runs.get_arguments().map(|arg| arg.get_id().clone()).collect();
        let command = ShapeArgs::augment_args(Command::new("shape"));
        for arg in command.get_arguments().filter(|arg| !of_runs.contains(arg.get_id())) {
            let flag = arg.get_long().unwrap();
            if ["device", "enhance-prompt"].contains(&flag) {
                continue;
            }
            let found = VALUES.iter().find(|(name, ..)| *name == flag);
            let (_, own, other) = found.unwrap_or_else(|| panic!("nothing is known of `--{flag}` beside a plan"));
            let line = |value: &str| match value {
                "" => Vec::new(),
                "+" => vec![format!("--{flag}")],
                value => vec![format!("--{flag}={value}")],
            };
            let run = |value: &str| checked(&line(value).iter().map(String::as_str).collect::<Vec<_>>());
            run(own).unwrap_or_else(|e| panic!("{e:#}"));
            let sentence = format!("{:#}", run(other).expect_err(flag));
            let words = match flag {
                "quantization" => vec!["weights are not quantised".to_string()],
                // A picture of this size is one tile of any that is larger than what tiles share.
                "spatial-tile" => vec!["overlap 256 must be smaller than the tile size 256".into()],
                _ => ["`a.ltxplan` was compiled", &format!("leave `--{flag}` out"), "compile a plan"]
                    .map(String::from)
                    .into(),
            };
            assert!(words.iter().all(|word| sentence.contains(word)), "{sentence}");
        }
    }

    #[test]
    fn what_the_plan_has_is_said() {
        let sentence = |line: &[&str]| checked(line).unwrap_err().to_string();
        assert!(sentence(&["--height", "256"]).contains("compiled with `--height 64`, not with `--height 256`"));
        assert!(
            sentence(&["--pipeline", "two-stage"])
                .contains("with `--pipeline distilled`, not with `--pipeline two-stage`")
        );
        assert!(sentence(&["--seconds", "1"]).contains("`--num-frames 9`, not with `--seconds 1`"));
        assert!(sentence(&["--no-audio"]).contains("compiled without it, not with `--no-audio`"));
    }
}
