//! `ltxc debug pipeline`: a short run of one pipeline, or of every one, as a user would start it, and whether its result is a
//! picture.
//!
//! Every run is 9 frames of 64x64, or of 128x128 where there are two stages, or a clip of half that is upscaled. It logs sums
//! after every stage and stops at the first value that is not finite; the finished clip is looked at as `video-stats` does.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use ltxc_ir::plan::{SoundRole, StageAdapter};
use ltxc_models::checkpoint::{Checkpoint, Generation};
use ltxc_models::synth::{Preset, synth};
use ltxc_runtime::media::{Audio, MediaWriter, OutputOptions, Rational, VideoFormat, exr_frames, png};
use ltxc_runtime::noise_files::{self, Stored};
use ltxc_runtime::random::NormalStream;
use serde_json::json;

use super::commands::run_line;
use super::flags::{DebugFlags, LogFlags};
use super::video_stats::{ClipStats, LightStats, SILENT, of_clip, rms};
use crate::args::{ModelArgs, PipelineName};
use crate::model_files::local;
use crate::pipelines::{Basis, Definition, definition};

/// Frames of every run.
const FRAMES: usize = 9;

/// Frames per second.
const RATE: u32 = 24;

/// Samples per second of the sound of clips that are made.
const SAMPLES: u32 = 48_000;

/// `ltxc debug pipeline`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ltxc debug pipeline all --preset tiny\n  \
    ltxc debug pipeline two-stage --checkpoint-path … --gemma-root … --spatial-upsampler-path … --distilled-lora …")]
pub struct SmokeArgs {
    /// Name of a pipeline, or `all`.
    pub name: String,
    /// A small synthetic model instead of model files.
    #[arg(long, value_enum, conflicts_with = "checkpoint_path")]
    pub preset: Option<SmokePreset>,
    /// Distilled LoRA of the model, for pipelines that need it.
    #[arg(long, value_name = "FILE")]
    pub distilled_lora: Option<PathBuf>,
    /// LoRA for pipelines that take reference videos.
    #[arg(long, value_name = "FILE")]
    pub lora: Option<PathBuf>,
    /// Steps of the first stage [default: the pipeline's]
    #[arg(long, alias = "num-inference-steps")]
    pub steps: Option<usize>,
    /// Prompt.
    #[arg(long, short, default_value = "a red fox in deep snow")]
    pub prompt: String,
    /// Seed of all noise.
    #[arg(long, default_value_t = 10)]
    pub seed: u64,
    /// Device: auto, cpu, cuda:N, vulkan:N or metal
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Keep clips and logs in this folder.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub debug: DebugFlags,
}

/// Models that are made for a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SmokePreset {
    /// That of `ltxc synth --preset tiny`.
    Tiny,
}

/// Files of a run.
struct Material {
    folder: PathBuf,
    model: ModelArgs,
    distilled_lora: Option<PathBuf>,
    lora: Option<PathBuf>,
    /// Numbers of a trained model are not to be expected.
    is_synthetic: bool,
}

/// What came of a run.
struct Outcome {
    sums: Vec<String>,
    stats: Option<ClipStats>,
    /// What is wrong.
    flags: Vec<String>,
    /// What would be wrong with a trained model.
    remarks: Vec<String>,
}

/// `ltxc debug pipeline`. Returns whether no run has a red flag.
///
/// # Errors
/// A pipeline that is not known, or model files that are missing.
pub fn run(args: &SmokeArgs, json_output: bool) -> Result<bool> {
    let names = match args.name.as_str() {
        "all" => PipelineName::value_variants().to_vec(),
        name => vec![PipelineName::from_str(name, true).map_err(|_| {
            let known: Vec<&str> = PipelineName::value_variants().iter().map(|&p| definition(p).name).collect();
            anyhow::anyhow!("`{name}` is no pipeline, expected all, {}", known.join(", "))
        })?],
    };
    let temporary = tempfile::tempdir().context("temporary folder")?;
    let material = material(args, temporary.path())?;
    let mut ok = true;
    let mut debug = args.debug.clone();
    for &name in &names {
        let definition = definition(name);
        if let Some(missing) = missing(definition, &material) {
            if names.len() == 1 {
                bail!("pipeline `{}` needs {missing}", definition.name);
            }
            match json_output {
                true => println!("{}", json!({"pipeline": definition.name, "left_out": missing})),
                false => println!("{}: left out, it needs {missing}", definition.name),
            }
            continue;
        }
        let outcome = smoke(args, &debug, definition, &material)?;
        // The logs of all runs are one.
        debug.logs.debug_append |= names.len() > 1;
        ok &= outcome.flags.is_empty();
        if json_output { println!("{}", outcome.facts(definition)) } else { print!("{}", outcome.text(definition)) }
    }
    Ok(ok)
}

fn material(args: &SmokeArgs, temporary: &Path) -> Result<Material> {
    let folder = args.out.clone().unwrap_or_else(|| temporary.into());
    std::fs::create_dir_all(&folder).with_context(|| format!("`{}`", folder.display()))?;
    let mut material = Material {
        folder,
        model: args.model.clone(),
        distilled_lora: args.distilled_lora.clone(),
        lora: args.lora.clone(),
        is_synthetic: false,
    };
    if args.preset.is_some() {
        let (model, lora) = tiny(temporary, args.seed)?;
        material.model = model;
        material.distilled_lora.get_or_insert(lora.clone());
        material.lora.get_or_insert(lora);
    }
    let path = material.model.checkpoint_path.as_ref();
    let path =
        path.context("there is no model; name its files from `--checkpoint-path` on, or give `--preset tiny`")?;
    material.is_synthetic = Checkpoint::open(&local(path)?)?.is_synthetic();
    Ok(material)
}

/// The model of the preset, made in `folder`, and a LoRA for it.
pub(super) fn tiny(folder: &Path, seed: u64) -> Result<(ModelArgs, PathBuf)> {
    let made = synth(Preset::Tiny, folder, seed)?;
    let lora = folder.join("lora.safetensors");
    write_lora(&Checkpoint::open(&made.checkpoint)?, &lora)?;
    let model = ModelArgs {
        checkpoint_path: Some(made.checkpoint),
        gemma_root: Some(made.gemma),
        spatial_upsampler_path: made.upsamplers.into_iter().next(),
        ..ModelArgs::default()
    };
    Ok((model, lora))
}

/// A LoRA of rank 1 for one layer, so that pipelines with adapters have one.
fn write_lora(model: &Checkpoint, path: &Path) -> Result<()> {
    const LAYER: &str = "diffusion_model.transformer_blocks.0.attn1.to_q";
    let shape = model.tensor(&format!("model.{LAYER}.weight")).map(|at| at.stored.shape.clone());
    let Some(&[outputs, inputs]) = shape.as_deref() else { bail!("`{}` has no `{LAYER}`", model.name()) };
    let factor = |end: &str, shape: [usize; 2]| {
        let values = NormalStream::new(0, end).draw(shape[0] * shape[1]).into_iter().map(|v| v * 0.01).collect();
        Stored::f32(&format!("{LAYER}.{end}.weight"), &shape, values)
    };
    Ok(noise_files::write_all(path, &[factor("lora_A", [1, inputs]), factor("lora_B", [outputs, 1])])?)
}

/// What a pipeline needs and is not there.
fn missing(definition: &Definition, material: &Material) -> Option<&'static str> {
    let has = |path: &Option<PathBuf>| path.is_some();
    match () {
        () if !definition.denoises() && !has(&material.model.spatial_upsampler_path) => {
            Some("a spatial upscaler; name it with `--spatial-upsampler-path`")
        }
        () if definition.has_two_stages && !has(&material.model.spatial_upsampler_path) => {
            Some("a spatial upscaler; name it with `--spatial-upsampler-path`")
        }
        () if takes_distilled(definition) && !has(&material.distilled_lora) => {
            Some("the distilled LoRA of the model; name it with `--distilled-lora`")
        }
        () if definition.brings.references > 0 && !has(&material.lora) => {
            Some("a LoRA that reads reference videos; name it with `--lora`")
        }
        () => None,
    }
}

fn takes_distilled(definition: &Definition) -> bool {
    let basis = Basis { generation: Generation::Ltx2, layers: 1, first_tokens: 1, has_distilled_adapter: false };
    let drafts = (definition.stages)(&basis);
    drafts.iter().flat_map(|draft| &draft.adapters).any(|adapter| adapter.role == StageAdapter::DISTILLED)
}

/// Runs a pipeline and looks at its result.
fn smoke(args: &SmokeArgs, debug: &DebugFlags, definition: &Definition, material: &Material) -> Result<Outcome> {
    let size = if definition.has_two_stages { 128 } else { 64 };
    let file = |end: &str| material.folder.join(format!("{}.{end}", definition.name));
    let sums = debug.debug_stage_sums_path.clone().unwrap_or_else(|| file("sums.log"));
    let output = match (definition.brings.pads_references, definition.has_video) {
        (true, _) => {
            let folder = material.folder.join(definition.name);
            remove_frames(&folder)?;
            folder
        }
        (false, true) => file("mp4"),
        (false, false) => file("wav"),
    };
    let mut line: Vec<String> = ["run", "--pipeline", definition.name].map(String::from).into();
    let mut flag = |name: &str, value: String| line.extend([name.to_string(), value]);
    let path = |path: &Path| path.display().to_string();
    let model = &material.model;
    for (name, value) in [
        ("--checkpoint-path", &model.checkpoint_path),
        ("--gemma-root", &model.gemma_root),
        ("--spatial-upsampler-path", &model.spatial_upsampler_path),
    ] {
        value.iter().for_each(|value| flag(name, path(value)));
    }
    if definition.has_video {
        flag("--height", size.to_string());
        flag("--width", size.to_string());
    }
    flag("--num-frames", FRAMES.to_string());
    flag("--frame-rate", RATE.to_string());
    if definition.denoises() {
        flag("--prompt", args.prompt.clone());
    }
    flag("--seed", args.seed.to_string());
    flag("--device", args.device.clone());
    flag("--output", path(&output));
    // Of all pipelines, those that have steps take their number; one named alone says why it has none.
    let takes_steps = definition.denoises() || args.name != "all";
    args.steps.iter().filter(|_| takes_steps).for_each(|steps| flag("--num-inference-steps", steps.to_string()));
    if takes_distilled(definition) {
        material.distilled_lora.iter().for_each(|lora| flag("--distilled-lora", path(lora)));
    }
    let brings = &definition.brings;
    if brings.appends_first_image {
        let image = material.folder.join(format!("image{size}.png"));
        let mut file = std::fs::File::create(&image).with_context(|| format!("`{}`", image.display()))?;
        let bytes: Vec<u8> = wave(size, 0).into_iter().map(|v| (v * 255.0) as u8).collect();
        png::write(size, size, &bytes, &mut file)?;
        flag("--image", path(&image));
    }
    let clip = material.folder.join(format!("clip{size}.mp4"));
    if brings.clip || brings.references > 0 || brings.sound.is_some() {
        write_clip(&clip, size)?;
    }
    if brings.clip {
        flag("--video-path", path(&clip));
    }
    if brings.clip && definition.denoises() {
        flag("--start-time", "0.1".into());
    }
    match (brings.references > 0, brings.sound) {
        (true, Some(SoundRole::Reference)) => flag("--reference-video", path(&clip)),
        (true, _) => flag("--video-conditioning", path(&clip)),
        (false, Some(SoundRole::Kept)) => flag("--audio-path", path(&clip)),
        (false, _) => {}
    }
    if brings.references > 0 {
        material.lora.iter().for_each(|lora| flag("--lora", path(lora)));
    }
    let mut outcome = Outcome { sums: Vec::new(), stats: None, flags: Vec::new(), remarks: Vec::new() };
    let debug = DebugFlags {
        debug_stage_sums_path: Some(sums.clone()),
        logs: LogFlags { check_nan: true, ..debug.logs.clone() },
        ..debug.clone()
    };
    // What earlier runs wrote into the same log is theirs.
    let before =
        std::fs::metadata(&sums).map_or(0, |m| m.len()).min(if debug.logs.debug_append { u64::MAX } else { 0 });
    if let Err(e) = run_line(&line, |run| run.debug = debug) {
        outcome.flags.push(format!("the run failed: {e:#}"));
        return Ok(outcome);
    }
    let log = std::fs::read_to_string(&sums).with_context(|| format!("`{}`", sums.display()))?;
    let log = log.get(before as usize..).unwrap_or_default();
    outcome.sums = log.lines().filter(|l| !l.starts_with('#')).map(String::from).collect();
    let is_bad = |line: &&String| ["NaN", "inf", "-inf"].iter().any(|word| line.contains(&format!("={word}")));
    outcome.flags.extend(outcome.sums.iter().filter(is_bad).map(|line| format!("a sum is not finite: {line}")));
    if definition.has_video {
        let stats = of_clip(&output)?;
        // Published upscalers for two stages, and synthetic ones, double the sides.
        let size = if definition.denoises() { size } else { 2 * size };
        if stats.frames != FRAMES || stats.size != (size, size) {
            outcome.flags.push(format!("the clip has {} frames of {:?}", stats.frames, stats.size));
        }
        let found = stats.flags().into_iter().map(|(flag, why)| format!("{flag}: {why}"));
        if material.is_synthetic {
            outcome.remarks.extend(found)
        } else {
            outcome.flags.extend(found)
        }
        outcome.stats = Some(stats);
    } else if rms(&output)?.is_none_or(|rms| rms < SILENT) {
        outcome.flags.push("the sound is silence".into());
    }
    Ok(outcome)
}

/// Makes room for EXR frames and their preview where an earlier run left some; a folder that holds anything else stays.
fn remove_frames(folder: &Path) -> Result<()> {
    let remove = |path: &Path| std::fs::remove_file(path).with_context(|| format!("`{}`", path.display()));
    let preview = folder.with_extension("mp4");
    if preview.is_file() {
        remove(&preview)?;
    }
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_ours = |path: &PathBuf| path.file_name().and_then(|n| n.to_str()).is_some_and(exr_frames::is_frame_name);
    files.filter(is_ours).try_for_each(|path| remove(&path))
}

/// Writes a clip of a wave that moves, with a tone.
fn write_clip(path: &Path, size: usize) -> Result<()> {
    let format = VideoFormat::new(size, size, Rational::new(RATE, 1)?)?;
    let mut writer = MediaWriter::create(path, Some(format), OutputOptions::default())?;
    for frame in 0..FRAMES {
        writer.write_frames(&wave(size, frame))?;
    }
    let count = SAMPLES * FRAMES as u32 / RATE;
    let tone: Vec<f32> =
        (0..count).map(|i| (i as f32 * 440.0 * std::f32::consts::TAU / SAMPLES as f32).sin() * 0.3).collect();
    writer.write_audio(Audio::new(SAMPLES, [tone.clone(), tone].concat())?)?;
    writer.finish()?;
    Ok(())
}

/// A frame of the wave, `[size, size, 3]` in `[0, 1]`.
fn wave(size: usize, frame: usize) -> Vec<f32> {
    let level = |x: usize, y: usize, c: usize| {
        let phase = x as f32 * 0.1 + y as f32 * 0.07 * (c + 1) as f32 + frame as f32 * 0.4;
        phase.sin() * 0.4 + 0.5
    };
    (0..size * size * 3).map(|i| level(i / 3 % size, i / 3 / size, i % 3)).collect()
}

impl Outcome {
    fn facts(&self, definition: &Definition) -> serde_json::Value {
        let stats = self.stats.as_ref().map(|s| {
            json!({"frames": s.frames, "brightness": s.brightness, "grey_std": s.grey_std, "noise_ratio": s.noise_ratio,
                "change": s.change, "sound_rms": s.sound_rms, "light": s.light.as_ref().map(LightStats::facts)})
        });
        json!({"pipeline": definition.name, "stage_sums": self.sums, "video": stats, "flags": self.flags,
            "remarks": self.remarks, "ok": self.flags.is_empty()})
    }

    fn text(&self, definition: &Definition) -> String {
        let mut out = format!("{}: {}\n", definition.name, if self.flags.is_empty() { "ok" } else { "BAD" });
        self.sums.iter().for_each(|line| out += &format!("  {line}\n"));
        if let Some(s) = &self.stats {
            out += &format!(
                "  {} frames, brightness {:.3}, std {:.1}, noise ratio {:.3}, change {:.2}, sound RMS {:.4}\n",
                s.frames,
                s.brightness,
                s.grey_std,
                s.noise_ratio,
                s.change,
                s.sound_rms.unwrap_or(0.0)
            );
        }
        if let Some(light) = self.stats.as_ref().and_then(|s| s.light) {
            let (low, high) = light.range;
            out += &format!("  light {low} to {high}, {:.1} % of it at these limits\n", light.saturation() * 100.0);
        }
        self.flags.iter().for_each(|flag| out += &format!("  RED FLAG: {flag}\n"));
        self.remarks
            .iter()
            .for_each(|remark| out += &format!("  of synthetic weights no picture is expected; {remark}\n"));
        out
    }
}
