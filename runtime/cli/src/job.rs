//! What a plan is compiled for, from what was typed: sizes, rates, tiles and the device, checked before anything is loaded.

use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use ltxc_ir::DType;
use ltxc_ir::plan::{Modality, Plan, Release, SoundRole, Target};
use ltxc_ir::tiling::{AxisTiling, TilePlan, Tiling};
use ltxc_runtime::RunError;
use ltxc_runtime::backend::{Device, DeviceName, Found, find};
use ltxc_runtime::media::Rational;
use ltxc_runtime::pipeline::positions::ReferenceScale;

use crate::adapters::Loras;
use crate::args::{DeviceChoice, PipelineName, Precision, SamplingArgs, ShapeArgs};
use crate::pipelines::{Definition, definition};
use crate::report::Report;

/// What a plan is compiled for.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Pipeline.
    pub pipeline: PipelineName,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// Number of frames that are made.
    pub frames: usize,
    /// Frames per second.
    pub frame_rate: Rational,
    /// Images behind frame 0 that a run may give.
    pub max_keyframes: usize,
    /// Tiles of the decoder.
    pub tile: VaeTile,
    /// Kind and limits of the device.
    pub target: Target,
    /// Dtype of activations.
    pub dtype: DType,
    /// Rank of the slots for live adapters; 0 for none.
    pub adapter_rank: usize,
    /// Whether a distilled adapter goes with the model.
    pub has_distilled_adapter: bool,
    /// Modalities that are made, in order.
    pub modalities: Vec<Modality>,
    /// Sampling and guidance, where they are not the pipeline's own.
    pub sampling: SamplingArgs,
    /// Reference videos, for pipelines that take some.
    pub references: References,
    /// Length of the recording that guides, for pipelines that take one, in seconds; `None` for that of the video.
    pub reference_seconds: Option<f64>,
    /// The release of the reference implementation whose results are given.
    pub release: Release,
    /// Whether the text encoder can write prompts anew.
    pub enhances_prompt: bool,
    /// Whether each frame stands twice in references, and every other one that is made is written; `frames` counts all.
    pub doubles_frames: bool,
}

/// Reference videos that a plan has room for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct References {
    /// Number of videos.
    pub count: usize,
    /// Frames that they have, if fewer than the video.
    pub frames: Option<usize>,
    /// How much coarser than their stage they are.
    pub scale: ReferenceScale,
    /// Whether a run says how strongly they act.
    pub has_attention: bool,
}

/// The device that is meant, for a new plan or for `plan`.
///
/// # Errors
/// One that is not there, or a plan that no device runs.
pub fn pick(choice: &DeviceChoice, plan: Option<&Plan>) -> Result<Device, RunError> {
    // Only drivers that can be meant are loaded.
    match (choice, plan) {
        (DeviceChoice::Auto, None) => all().best(None).cloned(),
        (DeviceChoice::Auto, Some(plan)) => find(Some(&plan.target.backend)).best(Some(plan)).cloned(),
        (DeviceChoice::Named(name), _) => find(Some(name.backend())).named(name).cloned(),
    }
}

/// Says what `auto` would rather have taken for a new plan, and why it cannot be used.
///
/// # Errors
/// As for [`pick`].
pub fn say_passed_over(choice: &DeviceChoice, report: &mut Report) -> Result<(), RunError> {
    if *choice == DeviceChoice::Auto {
        let chosen = pick(choice, None)?;
        let reasons = all().passed_over(&chosen);
        reasons.iter().for_each(|reason| report.note(&format!("device: `{}`, because {reason}", chosen.name)));
    }
    Ok(())
}

/// The devices of this machine, looked for once.
fn all() -> &'static Found {
    static ALL: OnceLock<Found> = OnceLock::new();
    ALL.get_or_init(|| find(None))
}

/// The device of this machine that is compiled for: one that is chosen, or named by its number.
///
/// # Errors
/// A number that is not there.
pub fn present(choice: &DeviceChoice) -> Result<Option<Device>, RunError> {
    match choice {
        DeviceChoice::Named(DeviceName::Cuda(Some(_)) | DeviceName::Vulkan(Some(_))) | DeviceChoice::Auto => {
            pick(choice, None).map(Some)
        }
        DeviceChoice::Named(_) => Ok(None),
    }
}

/// What to compile for: a device of this machine, or any of the kind that is named.
fn target(choice: &DeviceChoice) -> Result<Target> {
    Ok(match (present(choice)?, choice) {
        (Some(device), _) => device.target,
        (None, DeviceChoice::Named(name)) => name.target(),
        (None, DeviceChoice::Auto) => Target::cpu(),
    })
}

/// What activations are computed in where nobody says: bf16, as the reference does, where there are matrix units for it;
/// f32 elsewhere, where bf16 saves no time.
fn usual_dtype(target: &Target) -> DType {
    let has_units = target.matrix_units.iter().any(|unit| unit.element == DType::BF16);
    if has_units { DType::BF16 } else { DType::F32 }
}

/// How the decoder is tiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VaeTile {
    /// The reference's rule.
    Auto,
    /// Not at all.
    Off,
    /// Sizes on the longer side in pixels, and in frames.
    Size {
        /// Pixels on the longer side.
        space: (usize, usize),
        /// Frames.
        time: (usize, usize),
    },
    /// The same size on both sides, in pixels; and in frames.
    Square {
        /// Pixels on either side.
        space: (usize, usize),
        /// Frames.
        time: (usize, usize),
    },
}

impl VaeTile {
    /// Tiles of this many pixels on both sides, of which 256 overlap, and of 32 frames, of which 16 overlap.
    ///
    /// Source: ltx_pipelines/hdr_ic_lora.py, release 1.2.0.
    pub fn square(pixels: usize) -> VaeTile {
        VaeTile::Square { space: (pixels, 256), time: (32, 16) }
    }

    /// Reads a flag.
    ///
    /// # Errors
    /// Text that is no tiling.
    pub fn parse(text: &str) -> Result<VaeTile> {
        match text {
            "auto" => return Ok(VaeTile::Auto),
            "off" => return Ok(VaeTile::Off),
            _ => {}
        }
        let pair = |part: &str| -> Option<(usize, usize)> {
            let (size, overlap) = part.split_once('x')?;
            Some((size.trim().parse().ok()?, overlap.trim().parse().ok()?))
        };
        let parsed = text.split_once(',').and_then(|(space, time)| Some((pair(space)?, pair(time)?)));
        let Some((space, time)) = parsed else {
            bail!("`--vae-tile {text}` is not auto, off or SIZExOVERLAP,FRAMESxOVERLAP, for example 512x64,64x24");
        };
        Ok(VaeTile::Size { space, time })
    }

    /// The tiles of a latent of these frames, rows and columns.
    ///
    /// # Errors
    /// Sizes that the decoder cannot be split into.
    pub fn tiles(self, latent: [usize; 3], factors: [usize; 3]) -> Result<TilePlan> {
        let flag = if matches!(self, VaeTile::Square { .. }) { "--spatial-tile" } else { "--vae-tile" };
        let tiling = self.tiling(latent, factors);
        tiling
            .and_then(|tiling| Ok(TilePlan::decode(latent, factors, &tiling)?))
            .with_context(|| format!("tiles of the decoder, which `{flag}` chooses"))
    }

    fn tiling(self, latent: [usize; 3], factors: [usize; 3]) -> Result<Tiling> {
        Ok(match self {
            VaeTile::Auto => Tiling::automatic(latent, factors)?,
            VaeTile::Off => Tiling::WHOLE,
            VaeTile::Size { space, time } => {
                let time = AxisTiling::Size { size: time.0, overlap: time.1 };
                Tiling::long_side(time, space.0, space.1, latent, factors)?
            }
            VaeTile::Square { space, time } => {
                let axis = |(size, overlap)| AxisTiling::Size { size, overlap };
                Tiling { axes: [axis(time), axis(space), axis(space)] }
            }
        })
    }
}

/// Most pixels of a side and most frames: far beyond every model, small enough for all arithmetic.
pub const MOST: usize = 1 << 16;

/// Most reference videos, and how much coarser they may be.
const MOST_REFERENCES: u32 = 64;

/// Most keyframes a plan can be compiled for; each number of them has a program of its own.
const MOST_KEYFRAMES: u32 = 64;

impl Shape {
    /// Resolves the arguments; `keyframes` is what the images of the same command need.
    ///
    /// # Errors
    /// Values that no model could run. What depends on the model is checked when its files are known.
    pub fn resolve(args: &ShapeArgs, keyframes: usize) -> Result<Shape> {
        args.sampling.check()?;
        let named = args.pipeline.unwrap_or_default();
        let (height, width) = definition(named).size;
        let (pipeline, shrink) = match (named, args.skip_stage_2) {
            (PipelineName::IcLora, true) => (PipelineName::IcLoraOneStage, 2),
            (named, false) => (named, 1),
            (named, true) => {
                bail!("`--skip-stage-2` is for pipeline `ic-lora`, not for `{}`", definition(named).name)
            }
        };
        let Definition { has_video, has_sound, .. } = *definition(pipeline);
        let modalities = match (has_video, args.no_audio || !has_sound) {
            (true, true) => vec![Modality::Video],
            (true, false) => Modality::BOTH.to_vec(),
            (false, false) => vec![Modality::Audio],
            (false, true) => {
                bail!("pipeline `{}` makes sound alone; leave `--no-audio` out", definition(pipeline).name)
            }
        };
        if let (Some(SoundRole::Kept | SoundRole::Reference), true) = (definition(pipeline).brings.sound, args.no_audio)
        {
            bail!("pipeline `{}` is about sound; leave `--no-audio` out", definition(pipeline).name);
        }
        let size = |value: Option<u32>, default: usize, flag: &str| -> Result<usize> {
            let value = value.map_or(default, |v| v as usize);
            if !(1..=MOST).contains(&value) {
                bail!("`{flag} {value}` is out of range, expected 1 to {MOST}");
            }
            Ok(value)
        };
        let shrunk = |value: usize, flag: &str| match value.is_multiple_of(shrink) {
            true => Ok(value / shrink),
            false => {
                bail!("`{flag} {value}` is odd and cannot be halved, as `--skip-stage-2` does; give an even number")
            }
        };
        let count = |value: Option<u32>, flag: &str| match value.unwrap_or(1) {
            n @ 1..=MOST_REFERENCES => Ok(n as usize),
            n => bail!("`{flag} {n}` is out of range, expected 1 to {MOST_REFERENCES}"),
        };
        let keyframes = args.max_keyframes.unwrap_or(keyframes.try_into().unwrap_or(u32::MAX));
        if keyframes > MOST_KEYFRAMES {
            bail!("{keyframes} images behind frame 0 are too many, expected at most {MOST_KEYFRAMES}");
        }
        let frame_rate = frame_rate(args.frame_rate.as_deref().unwrap_or("24"))?;
        let (wide, high) = match &args.size {
            Some(text) => size_of(text).map(|(width, height)| (Some(width), Some(height)))?,
            None => (args.width, args.height),
        };
        let frames = match args.seconds {
            Some(seconds) => Some(frames_of(seconds, frame_rate)?),
            None => args.num_frames,
        };
        let release = args.reference_version.map_or(Release::V1_2_0, Release::from);
        let pads = definition(pipeline).brings.pads_references;
        let tile = match (&args.vae_tile, args.spatial_tile, release) {
            (Some(text), ..) => VaeTile::parse(text)?,
            (None, Some(pixels), _) => VaeTile::square(pixels as usize),
            (None, None, _) if pads => VaeTile::square(1280),
            // Release 1.2.0 chooses larger tiles.
            (None, None, Release::V1_0_0) => VaeTile::Size { space: (512, 64), time: (64, 24) },
            (None, None, Release::V1_2_0) => VaeTile::Auto,
        };
        if args.high_quality && !pads {
            bail!("`--high-quality` is for pipeline `hdr-ic-lora`, not for `{}`; leave it out", definition(named).name);
        }
        let frames = size(frames, definition(pipeline).frames, "--num-frames")?;
        let target = target(&args.device)?;
        Ok(Shape {
            pipeline,
            height: shrunk(size(high, height, "--height")?, "--height")?,
            width: shrunk(size(wide, width, "--width")?, "--width")?,
            frames: if args.high_quality { doubled(frames) } else { frames },
            frame_rate,
            max_keyframes: keyframes as usize,
            tile,
            dtype: match args.dtype {
                Some(Precision::F32) => DType::F32,
                Some(Precision::Bf16) => DType::BF16,
                Some(Precision::F16) => DType::F16,
                // A high dynamic range needs the precision.
                None if pads => DType::F32,
                None => usual_dtype(&target),
            },
            target,
            adapter_rank: adapter_rank(args.lora_rank.unwrap_or(0))?,
            has_distilled_adapter: false,
            modalities,
            sampling: args.sampling.clone(),
            references: References {
                count: count(args.reference_count, "--reference-count")?,
                frames: None,
                scale: ReferenceScale::SAME,
                has_attention: args.reference_attention,
            },
            reference_seconds: None,
            release,
            enhances_prompt: args.enhance_prompt,
            doubles_frames: args.high_quality,
        })
    }

    /// The same for these adapters, as far as a plan depends on them.
    ///
    /// # Errors
    /// Adapters that do not agree on the size of reference videos.
    pub fn with(self, loras: &Loras) -> Result<Shape> {
        let references = References { scale: loras.reference_scale()?, ..self.references };
        // Release 1.0.0 adds products in the dtype of the adapter, which live ones do and merged ones do not.
        let lives = self.release == Release::V1_0_0 && self.adapter_rank == 0;
        let adapter_rank = if lives { loras.rank() } else { self.adapter_rank };
        Ok(Shape { has_distilled_adapter: loras.has_distilled(), references, adapter_rank, ..self })
    }

    /// The shape of a plan that serves both, if that makes no difference to either: a plan may have room for more images.
    pub fn or(&self, other: &Shape) -> Option<Shape> {
        let max_keyframes = self.max_keyframes.max(other.max_keyframes);
        let (one, two) = (Shape { max_keyframes, ..self.clone() }, Shape { max_keyframes, ..other.clone() });
        (one == two).then_some(one)
    }

    /// Whether the pipeline has a second stage at twice the size.
    pub fn has_two_stages(&self) -> bool {
        definition(self.pipeline).has_two_stages
    }

    /// Whether the pipeline makes this.
    pub fn makes(&self, modality: Modality) -> bool {
        self.modalities.contains(&modality)
    }

    /// Checks sizes against the scale factors of a model (time, height, width) and names the nearest valid ones.
    ///
    /// # Errors
    /// A size or frame count that the pipeline cannot run.
    pub fn check(&self, factors: [usize; 3]) -> Result<()> {
        let stages = if self.has_two_stages() { 2 } else { 1 };
        let name = if stages == 2 { "two-stage" } else { "one-stage" };
        // As it was given, where only the first stage of a pipeline is run.
        let given = if self.pipeline == PipelineName::IcLoraOneStage { 2 } else { 1 };
        let sides = [("--height", self.height, factors[1]), ("--width", self.width, factors[2])];
        for (flag, value, factor) in sides.into_iter().filter(|_| self.makes(Modality::Video)) {
            let (value, unit) = (value * given, factor * stages * given);
            if !value.is_multiple_of(unit) {
                let below = value / unit * unit;
                let nearest = if below == 0 { format!("{unit}") } else { format!("{below} or {}", below + unit) };
                bail!(
                    "`{flag} {value}` is not a multiple of {unit}, which the {name} pipeline needs; the nearest is {nearest}"
                );
            }
        }
        let k = factors[0];
        if !self.makes(Modality::Video) {
            return Ok(());
        }
        if self.frames % k != 1 % k {
            let below = (self.frames - 1) / k * k + 1;
            // As it was given, where every frame stands twice.
            let (share, given) = if self.doubles_frames { (2, self.frames.div_ceil(2)) } else { (1, self.frames) };
            let nearest = [below, below + k].map(|n| n.div_ceil(share));
            let k = k / share;
            bail!("`--num-frames {given}` is not {k}k+1; the nearest are {} and {}", nearest[0], nearest[1]);
        }
        Ok(())
    }
}

/// How many frames are made where each of `frames` stands twice, the last one once.
pub fn doubled(frames: usize) -> usize {
    (2 * frames).saturating_sub(1)
}

/// What `--frame-rate` says.
///
/// # Errors
/// Text that is no rate.
pub fn frame_rate(text: &str) -> Result<Rational> {
    text.parse().with_context(|| format!("`--frame-rate {text}`"))
}

/// Width and height in `WIDTHxHEIGHT`.
///
/// # Errors
/// Text that is no size.
pub fn size_of(text: &str) -> Result<(u32, u32)> {
    let sides = text.split_once(['x', 'X']).and_then(|(w, h)| Some((w.trim().parse().ok()?, h.trim().parse().ok()?)));
    sides.with_context(|| format!("`--size {text}` is not WIDTHxHEIGHT, for example 768x512"))
}

/// The frames of so many seconds: one of the numbers 8k+1, which all known models take.
///
/// # Errors
/// A length that no model could run.
pub fn frames_of(seconds: f64, rate: Rational) -> Result<u32> {
    let frames = (seconds * rate.to_f64()).round();
    if !(1.0..=MOST as f64).contains(&frames) {
        bail!("`--seconds {seconds}` are {frames} frames, expected 1 to {MOST}");
    }
    Ok((frames as u32 - 1) / 8 * 8 + 1)
}

/// Refuses to quantise weights.
///
/// # Errors
/// Whatever was asked for, unless it is nothing; `is_fp8` says whether the model is quantised already.
pub fn refuse_quantization(args: &ShapeArgs, model: &str, is_fp8: bool) -> Result<()> {
    match args.quantization.as_deref() {
        None | Some("none") => Ok(()),
        Some(mode) if is_fp8 => {
            bail!("`{model}` is stored in fp8 already and is read as it is; leave `--quantization {mode}` out")
        }
        Some(mode) => bail!(
            "`--quantization {mode}`: weights are not quantised here but used as they are stored; name an fp8 file of the \
             model instead of `{model}`"
        ),
    }
}

/// Largest rank of slots for adapters: several times that of published ones.
const MOST_RANK: u32 = 4096;

fn adapter_rank(rank: u32) -> Result<usize> {
    if rank > MOST_RANK {
        bail!("`--lora-rank {rank}` is out of range, expected 0 to {MOST_RANK}");
    }
    Ok(rank as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(height: u32, width: u32, frames: u32) -> Result<()> {
        let args =
            ShapeArgs { height: Some(height), width: Some(width), num_frames: Some(frames), ..ShapeArgs::default() };
        Shape::resolve(&args, 0)?.check([8, 32, 32])
    }

    #[test]
    fn nearest_valid_sizes_are_named() {
        assert!(shape(512, 768, 121).is_ok());
        let message = |r: Result<()>| r.unwrap_err().to_string();
        assert!(message(shape(1080, 768, 121)).contains("1024 or 1088"));
        assert!(message(shape(512, 768, 120)).contains("113 and 121"));
        assert!(message(shape(16, 768, 121)).contains("the nearest is 64"));
    }

    #[test]
    fn frames_that_stand_twice_are_counted_once() {
        let shape = |frames: u32| {
            let pipeline = Some(PipelineName::HdrIcLora);
            let args = ShapeArgs { pipeline, num_frames: Some(frames), high_quality: true, ..ShapeArgs::default() };
            Shape::resolve(&args, 0).and_then(|shape| shape.check([8, 32, 32]).map(|()| shape.frames))
        };
        assert_eq!([1, 9, 13, 161].map(|n| shape(n).unwrap()), [1, 17, 25, 321]);
        let problem = shape(11).unwrap_err().to_string();
        assert!(problem.contains("`--num-frames 11` is not 4k+1; the nearest are 9 and 13"), "{problem}");
        let other = ShapeArgs { high_quality: true, ..ShapeArgs::default() };
        assert!(Shape::resolve(&other, 0).unwrap_err().to_string().contains("pipeline `hdr-ic-lora`"));
    }

    #[test]
    fn tensor_cores_compute_in_bf16_unless_told() {
        let dtype = |device: &str, pipeline, dtype| {
            let device = DeviceChoice::Named(device.parse().unwrap());
            let args = ShapeArgs { device, pipeline: Some(pipeline), dtype, ..ShapeArgs::default() };
            Shape::resolve(&args, 0).unwrap().dtype
        };
        let plain = PipelineName::Distilled;
        assert_eq!(dtype("cuda", plain, None), DType::BF16);
        assert_eq!(dtype("cuda", plain, Some(Precision::F32)), DType::F32);
        assert_eq!(dtype("cuda", PipelineName::HdrIcLora, None), DType::F32);
        for device in ["cpu", "metal"] {
            assert_eq!(dtype(device, plain, None), DType::F32);
        }
        assert_eq!(dtype("cpu", plain, Some(Precision::Bf16)), DType::BF16);
    }

    #[test]
    fn tiles_that_cannot_be_name_their_flag() {
        let problem = |tile: VaeTile| format!("{:#}", tile.tiles([2, 16, 16], [8, 32, 32]).unwrap_err());
        assert!(problem(VaeTile::square(256)).contains("`--spatial-tile`"));
        let whole = problem(VaeTile::parse("64x64,64x24").unwrap());
        assert!(whole.contains("`--vae-tile`") && whole.contains("overlap 64"), "{whole}");
    }

    #[test]
    fn sizes_and_lengths_can_be_given_at_once() {
        let of = |size: &str, seconds: f64| {
            let args = ShapeArgs { size: Some(size.into()), seconds: Some(seconds), ..ShapeArgs::default() };
            Shape::resolve(&args, 0).map(|s| (s.width, s.height, s.frames))
        };
        assert_eq!(of("768x512", 5.05).unwrap(), (768, 512, 121));
        assert_eq!(of("64X32", 0.3).unwrap(), (64, 32, 1));
        for (size, seconds) in [("768", 1.0), ("ax2", 1.0), ("64x64", -1.0), ("64x64", f64::NAN), ("64x64", 1e9)] {
            assert!(of(size, seconds).is_err(), "{size} {seconds}");
        }
    }
}
