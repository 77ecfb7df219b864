//! `ltxc info`: what a file is, and what a run of it would need.
//!
//! Everything is found out elsewhere; this puts the answers in one place. `ltxc inspect`, `ltxc lora inspect` and
//! `ltxc debug weights` say more about a plan, a LoRA and a model.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use ltxc_models::checkpoint::gguf::GgufFile;
use ltxc_models::checkpoint::{Checkpoint, FileKind, GemmaFamily, GemmaFolder, WeightFile};
use ltxc_models::lora::LoraFile;
use ltxc_models::upsampler::{Enlarge, UpsamplerConfig};
use ltxc_runtime::memory::{MemoryNeed, readable};
use serde_json::{Value, json};

use crate::args::{ModelArgs, ShapeArgs};
use crate::compile::{self, compile, read_with_kernels};
use crate::convert::is_lora;
use crate::debug::weights::audit;
use crate::job::Shape;
use crate::model_files::{MODEL, ModelFiles, local};
use crate::pipelines::is_distilled;
use crate::{inspect, lora};

/// `ltxc info`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ltxc info ltx-2-19b-distilled.safetensors
  ltxc info ltx-2-19b-distilled.safetensors --gemma-root gemma-3-12b --spatial-upsampler-path up.safetensors --size 1536x1024
                                 what a run of that size would need")]
pub struct InfoArgs {
    /// Plan, model, LoRA, upsampler, text encoder or GGUF file; a folder of one, or its hub name.
    pub path: PathBuf,
    /// Text encoder of the model, for an estimate of the memory that a run needs.
    #[arg(long, value_name = "DIR", aliases = ["gemma-path", "text-encoder", "gemma"])]
    pub gemma_root: Option<PathBuf>,
    /// Spatial upscaler, for that of a pipeline of two stages.
    #[arg(long, value_name = "FILE", alias = "spatial-upsampler")]
    pub spatial_upsampler_path: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub shape: ShapeArgs,
}

/// `ltxc info`; `given` are the ids of the flags that are given.
///
/// # Errors
/// A file that is none of these or damaged; with `--gemma-root` files that do not fit, without it flags of a run.
pub fn run(args: &InfoArgs, given: &[String], json_output: bool) -> Result<()> {
    let path = local(&args.path)?;
    let (text, facts) = look(args, &path)?;
    let is_about_a_run = given.iter().any(|id| !["path", "json", "quiet"].contains(&id.as_str()));
    match (is_about_a_run, facts["kind"] == "model", facts["memory"].is_null()) {
        (true, false, _) => bail!("`{}` is no model, and flags of a run are for one; leave them out", path.display()),
        (true, true, true) => bail!("an estimate of memory needs the text encoder, too; name it with `--gemma-root`"),
        _ => {}
    }
    if json_output {
        println!("{facts}")
    } else {
        print!("{text}")
    }
    Ok(())
}

/// What `path` is, in words and for machines.
fn look(args: &InfoArgs, path: &Path) -> Result<(String, Value)> {
    if begins_with(path, b"LTXCPLAN") {
        let (plan, _, hash) = read_with_kernels(path)?;
        let mut facts = inspect::facts(&plan, &hash, std::fs::metadata(path)?.len());
        facts["kind"] = "plan".into();
        let need = MemoryNeed::of(&plan, rayon::current_num_threads());
        return Ok((format!("a plan\n{}{}\n", inspect::text(&plan, &facts), compile::memory(&need)), facts));
    }
    if path.is_file() && GgufFile::is_one(path) {
        return gguf(path);
    }
    if is_lora(path)? {
        let file = LoraFile::open(path)?;
        let mut facts = lora::facts(&file, &lora::models(None)?)?;
        facts["kind"] = "lora".into();
        return Ok((format!("a LoRA\n{}", lora::text(&facts)), facts));
    }
    let kind = if path.is_file() { Some(FileKind::of(&WeightFile::open(path)?)) } else { None };
    let is_gemma_folder = path.is_dir() && path.join("config.json").is_file() && path.join("tokenizer.json").is_file();
    match kind {
        Some(FileKind::Upsampler) => upsampler(path),
        Some(FileKind::TextEncoder) => gemma(path),
        None if is_gemma_folder => gemma(path),
        _ => model(args, path),
    }
}

fn begins_with(path: &Path, magic: &[u8]) -> bool {
    let mut found = vec![0; magic.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut found)).is_ok() && found == magic
}

fn gguf(path: &Path) -> Result<(String, Value)> {
    let file = GgufFile::open(path)?;
    let mut types = std::collections::BTreeMap::new();
    for tensor in &file.header().tensors {
        let entry: &mut (usize, u64) = types.entry(tensor.ty.name()).or_default();
        *entry = (entry.0 + 1, entry.1 + tensor.bytes);
    }
    let generation = if file.tensors().any(|(key, _)| key.contains("prompt_adaln_single")) {
        "LTX-2.3 or newer, because text attention is modulated by the timestep"
    } else {
        "LTX-2, because text attention is not modulated by the timestep"
    };
    let mut text = format!(
        "the transformer of {generation}, as GGUF; ltxc compares it (`ltxc debug weights MODEL --against`) and does not run it\n"
    );
    for (name, (count, bytes)) in &types {
        text += &format!("in {name:<6} {count:>6} tensors {:>10}\n", readable(*bytes));
    }
    let types: Vec<Value> = types
        .into_iter()
        .map(|(name, (count, bytes))| json!({"type": name, "tensors": count, "bytes": bytes}))
        .collect();
    Ok((text, json!({"kind": "gguf", "generation": generation, "types": types})))
}

fn upsampler(path: &Path) -> Result<(String, Value)> {
    let checkpoint = Checkpoint::open_upsampler(path)?;
    let config = UpsamplerConfig::from_json(checkpoint.config())?;
    let what = match config.enlarge {
        Enlarge::Space { numerator, denominator } => {
            format!("a latent upsampler that enlarges pictures {} times", numerator as f64 / denominator.max(1) as f64)
        }
        Enlarge::Time => "a latent upsampler that doubles the frame rate".into(),
        Enlarge::SpaceAndTime => "a latent upsampler that doubles pictures and frame rate".into(),
    };
    let (channels, width) = (config.in_channels, config.mid_channels);
    let text = format!("{what}, for latents of {channels} channels, {width} wide{}\n", size(&checkpoint));
    Ok((
        text,
        json!({"kind": "upsampler", "what": what, "in_channels": channels, "mid_channels": width, "bytes": bytes(&checkpoint)}),
    ))
}

fn gemma(path: &Path) -> Result<(String, Value)> {
    let gemma = GemmaFolder::open(path)?;
    let (family, of) = match gemma.family() {
        GemmaFamily::Gemma3 => ("Gemma 3", "LTX-2 and LTX-2.3"),
        GemmaFamily::Gemma4 => ("Gemma 4", "LTX-2.5"),
    };
    let number = |key: &str| gemma.text_config().get(key).and_then(Value::as_u64).unwrap_or(0);
    let (layers, hidden) = (number("num_hidden_layers"), number("hidden_size"));
    let bytes: u64 = gemma.tensors().map(|(_, at)| at.stored.bytes).sum();
    let text = format!(
        "a text encoder, {family}, for {of}: {layers} layers, {hidden} wide, {} in {} file{}\n",
        readable(bytes),
        gemma.files().len(),
        if gemma.files().len() == 1 { "" } else { "s" }
    );
    Ok((
        text,
        json!({"kind": "text encoder", "family": family, "layers": layers, "hidden_size": hidden, "bytes": bytes}),
    ))
}

fn model(args: &InfoArgs, path: &Path) -> Result<(String, Value)> {
    let checkpoint = Checkpoint::open(path)?;
    let found = audit(&checkpoint);
    let mut facts = found.facts(&checkpoint);
    facts["kind"] = "model".into();
    facts["distilled"] = json!(is_distilled(&checkpoint));
    let training = match is_distilled(&checkpoint) {
        Some(true) => "a distilled model, by its name",
        Some(false) => "a dev model, by its name",
        None => "a model; its name does not say whether it is distilled, and nothing else does",
    };
    let mut text = format!("{training}\n{}", found.text(&checkpoint));
    if args.gemma_root.is_some() || path.join("text_encoder").is_dir() {
        let shape = Shape::resolve(&args.shape, 0)?;
        let files = ModelArgs {
            checkpoint_path: Some(path.into()),
            gemma_root: args.gemma_root.clone(),
            spatial_upsampler_path: args.spatial_upsampler_path.clone(),
            ..ModelArgs::default()
        };
        let files = ModelFiles::of_pipeline(&files, shape.pipeline, true)?;
        let plan = compile(&files, &shape, Default::default(), &mut |_, _, _| {})?;
        let need = MemoryNeed::of(&plan, rayon::current_num_threads());
        let need = need.with_copies(&plan, &|_, source, key| source == MODEL && files.model.is_fp8(key));
        let video = &plan.pipeline.video;
        facts["memory"] =
            json!({"peak_bytes": need.peak(), "host_peak_bytes": need.host_peak(), "device": plan.target.backend});
        text += &format!(
            "pipeline {}, {}x{}, {} frames, for {}\n{}\n",
            plan.pipeline.name,
            video.width,
            video.height,
            video.frames,
            plan.target.backend,
            compile::memory(&need)
        );
    }
    Ok((text, facts))
}

fn bytes(checkpoint: &Checkpoint) -> u64 {
    checkpoint.tensors().map(|(_, at)| at.stored.bytes).sum()
}

fn size(checkpoint: &Checkpoint) -> String {
    format!(", {}", readable(bytes(checkpoint)))
}
