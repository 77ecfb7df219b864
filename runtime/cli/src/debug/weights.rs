//! `ltxc debug weights`: what model files hold, whether it is what the model needs, and how two sets of files differ.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use ltxc_ir::{DType, TensorType};
use ltxc_models::Weights;
use ltxc_models::audio::{self, AudioVaeConfig, VocoderConfig};
use ltxc_models::checkpoint::{Checkpoint, Location};
use ltxc_models::text::{self, Connectors};
use ltxc_models::transformer::{self, StreamSpec, TransformerConfig, TransformerSpec};
use ltxc_models::video_vae::{self, VideoVaeConfig};
use ltxc_runtime::stats::{Stats, decoded};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::against::{self, Other};
use super::manifest;
use crate::args::PipelineName;
use crate::model_files::{MODEL, local};
use crate::tensors::UNUSED;

/// Components by the beginnings of keys, the longest match counts.
const COMPONENTS: [(&str, &str); 9] = [
    ("model.diffusion_model.", "transformer"),
    ("model.diffusion_model.video_embeddings_connector.", "connectors"),
    ("model.diffusion_model.audio_embeddings_connector.", "connectors"),
    ("text_embedding_projection.", "text projection"),
    ("vae.encoder.", "video VAE encoder"),
    ("vae.", "video VAE"),
    ("audio_vae.", "audio VAE"),
    ("vocoder.", "vocoder"),
    ("duration_head.", "duration head"),
];

/// Keys that the text side reads, which is checked with its own encoder when a plan is compiled.
const TEXT_SIDE: [&str; 1] = ["text_embedding_projection."];

/// `ltxc debug weights`.
#[derive(Debug, Args)]
pub struct WeightsArgs {
    /// Model: a single file, a folder, or a split file.
    #[arg(required_unless_present = "download_manifest")]
    pub checkpoint: Option<PathBuf>,
    /// Only list which published files a pipeline needs and which are here, in the Hugging Face cache or below --folder.
    #[arg(long, value_enum, value_name = "PIPELINE")]
    pub download_manifest: Option<PipelineName>,
    /// Folder to look for them in; repeatable.
    #[arg(long, value_name = "DIR", requires = "download_manifest")]
    pub folder: Vec<PathBuf>,
    /// Statistics and checksums of every tensor.
    #[arg(long)]
    pub stats: bool,
    /// Only tensors whose keys contain one of these; repeatable.
    #[arg(long, value_name = "TEXT")]
    pub key: Vec<String>,
    /// Compare with these files tensor by tensor, whatever their layout: single, split, diffusers, or a GGUF file.
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,
    /// Statistics of the attention weights of a block [without a number: block 0]
    #[arg(long, value_name = "BLOCK", num_args = 0..=1, default_missing_value = "0")]
    pub attn: Option<usize>,
    /// Rows of the modulation tables of a block [without a number: block 0]
    #[arg(long, value_name = "BLOCK", num_args = 0..=1, default_missing_value = "0")]
    pub adaln: Option<usize>,
}

/// `ltxc debug weights`. Returns whether nothing is missing, misshapen, unknown, not finite, or different.
///
/// # Errors
/// Files that cannot be read.
pub fn run(args: &WeightsArgs, json_output: bool) -> Result<bool> {
    let checkpoint = args.checkpoint.as_deref().map(|path| anyhow::Ok(Checkpoint::open(&local(path)?)?)).transpose()?;
    if let Some(pipeline) = args.download_manifest {
        let generation = checkpoint.as_ref().map(Checkpoint::generation);
        return Ok(manifest::print(pipeline, generation, &args.folder, json_output));
    }
    let Some(checkpoint) = checkpoint else { bail!("there is no model to look into; name its file or folder") };
    let audit = audit(&checkpoint);
    let mut ok = audit.problems.is_empty() && audit.unknown.is_empty();
    if json_output {
        println!("{}", audit.facts(&checkpoint));
    } else {
        print!("{}", audit.text(&checkpoint));
    }
    let wanted = |key: &str| args.key.is_empty() || args.key.iter().any(|part| key.contains(part.as_str()));
    if args.stats {
        for (key, at) in checkpoint.tensors().filter(|(key, _)| wanted(key)) {
            ok &= print_stats(&checkpoint, key, &at, json_output);
        }
    }
    if let Some(block) = args.attn {
        print_attention(&checkpoint, block, json_output)?;
    }
    if let Some(block) = args.adaln {
        ok &= print_modulation(&checkpoint, block, json_output)?;
    }
    if let Some(other) = &args.against {
        ok &= against::compare(&checkpoint, &Other::open(&local(other)?)?, &wanted, json_output);
    }
    Ok(ok)
}

/// What is in the files, and what does not fit.
pub(crate) struct Audit {
    /// Number of tensors and bytes by component, and bytes by dtype.
    components: BTreeMap<&'static str, (usize, u64)>,
    dtypes: BTreeMap<String, u64>,
    /// Tensors that are missing or do not fit.
    problems: Vec<String>,
    /// Components whose configuration could not be read.
    absent: Vec<String>,
    /// Keys that nothing reads.
    unknown: Vec<String>,
}

/// Looks into a checkpoint.
pub(crate) fn audit(checkpoint: &Checkpoint) -> Audit {
    let (mut components, mut dtypes) = (BTreeMap::new(), BTreeMap::new());
    for (key, at) in checkpoint.tensors() {
        let component = COMPONENTS.iter().filter(|(p, _)| key.starts_with(p)).max_by_key(|(p, _)| p.len());
        let entry: &mut (usize, u64) = components.entry(component.map_or("other", |(_, name)| name)).or_default();
        entry.0 += 1;
        entry.1 += at.stored.bytes;
        *dtypes.entry(at.stored.dtype.to_string()).or_default() += at.stored.bytes;
    }
    let weights = Weights::new(MODEL, checkpoint);
    let absent = ask_for_everything(checkpoint, &weights);
    let mut problems: Vec<String> = weights.problems().into_iter().map(|p| p.text).collect();
    problems.extend(gate_problem(checkpoint));
    let is_known = |key: &str| {
        weights.was_asked_for(key)
            || against::is_companion(key)
            || UNUSED.iter().chain(&TEXT_SIDE).any(|part| key.starts_with(part))
    };
    let unknown = checkpoint.tensors().map(|(key, _)| key).filter(|key| !is_known(key)).map(String::from).collect();
    Audit { components, dtypes, problems, absent, unknown }
}

/// A factor of the timestep of gates between sound and picture that no released model has. It is what code takes where the
/// configuration does not say, and mutes speech.
fn gate_problem(checkpoint: &Checkpoint) -> Option<String> {
    let config = TransformerConfig::from_json(checkpoint.section("transformer").ok()?).ok()?;
    let (gate, own) = (config.gate_timestep_scale, config.timestep_scale);
    (gate == 1.0 && own != 1.0).then(|| {
        format!(
            "`transformer.av_ca_timestep_scale_multiplier` is 1 or missing, released models have {own}; read it from the file"
        )
    })
}

/// Builds the smallest graph of every component, so that each tensor a model needs is asked for. Returns what is not there.
fn ask_for_everything(checkpoint: &Checkpoint, weights: &Weights<'_>) -> Vec<String> {
    let mut absent = Vec::new();
    // What a builder says about weights is recorded in `weights`; anything else is about the configuration.
    let mut build = |name: &str, result: Result<()>| {
        if let Err(e) = result
            && !e.chain().any(|c| matches!(c.downcast_ref(), Some(ltxc_models::ModelError::Weights { .. })))
        {
            absent.push(format!("{name}: {e}"));
        }
    };
    let section = |name: &str| checkpoint.section(name).cloned();
    let dtype = DType::F32;
    build(
        "transformer",
        (|| -> Result<()> {
            let config = TransformerConfig::from_json(&section("transformer")?)?;
            let stream = || StreamSpec { has_keyframes_mask: false, ..StreamSpec::new(2, 2) };
            let spec = TransformerSpec {
                video: Some(StreamSpec { has_keyframes_mask: config.has_keyframes_embedding, ..stream() }),
                audio: Some(stream()),
                perturbation: Default::default(),
            };
            transformer::build(&config, weights, &spec, dtype)?;
            let connectors = Connectors::from_json(&section("transformer")?)?;
            connectors.registers(weights, text::CONTEXT_TOKENS)?;
            text::connect(&connectors, weights, text::CONTEXT_TOKENS, dtype)?;
            Ok(())
        })(),
    );
    build(
        "video VAE",
        (|| -> Result<()> {
            let config = VideoVaeConfig::from_json(&section("vae")?)?;
            let [_, h, w] = config.factors();
            let decoder = video_vae::decode(&config, weights, [2, 2, 2], dtype).map(|_| ());
            let encoder = video_vae::encode(&config, weights, [1, 2 * h, 2 * w], dtype).map(|_| ());
            Ok(decoder.and(encoder)?)
        })(),
    );
    build(
        "audio VAE",
        (|| -> Result<()> {
            let config = AudioVaeConfig::from_json(&section("audio_vae")?)?;
            let decoder = audio::decode(&config, weights, 1, dtype).map(|_| ());
            // The encoder is there only in files that can condition on sound.
            if checkpoint.tensors().any(|(key, _)| key.starts_with("audio_vae.encoder.")) {
                audio::encode(&config, weights, 1, dtype)?;
            }
            Ok(decoder?)
        })(),
    );
    build(
        "vocoder",
        (|| -> Result<()> {
            let vae = AudioVaeConfig::from_json(&section("audio_vae")?)?;
            let config = VocoderConfig::from_json(&section("vocoder")?)?;
            audio::vocode(&config, weights, vae.mel_frames(1), dtype)?;
            Ok(())
        })(),
    );
    absent
}

impl Audit {
    pub(crate) fn facts(&self, checkpoint: &Checkpoint) -> Value {
        let components: Vec<Value> = (self.components.iter())
            .map(|(name, (count, bytes))| json!({"component": name, "tensors": count, "bytes": bytes}))
            .collect();
        json!({
            "files": checkpoint.paths(), "generation": checkpoint.generation().name(), "model_version": checkpoint.model_version(),
            "gemma_version": checkpoint.gemma_version(), "configuration": sections(checkpoint), "synthetic": checkpoint.is_synthetic(), "components": components,
            "bytes_by_dtype": self.dtypes, "problems": self.problems, "absent": self.absent, "unknown": self.unknown,
        })
    }

    pub(crate) fn text(&self, checkpoint: &Checkpoint) -> String {
        let why = match checkpoint.model_version() {
            Some(version) => format!("its metadata says model_version {version}"),
            None => "its metadata has no model_version, which is how the first release looks".into(),
        };
        let mut out = format!("generation        {}, because {why}\n", checkpoint.generation().name());
        if let Some(version) = checkpoint.gemma_version() {
            out += &format!("text encoder      {version}\n");
        }
        let sections = sections(checkpoint);
        if !sections.is_empty() {
            out += &format!("configuration     {}\n", sections.join(", "));
        }
        for (name, (count, bytes)) in &self.components {
            out += &format!("{name:<17} {count:>6} tensors {:>14} bytes\n", bytes);
        }
        for (dtype, bytes) in &self.dtypes {
            out += &format!("in {dtype:<14} {bytes:>29} bytes\n");
        }
        for (what, lines) in
            [("does not fit", &self.problems), ("not in these files", &self.absent), ("read by nothing", &self.unknown)]
        {
            if !lines.is_empty() {
                out += &format!("{what}: {}\n", lines.len());
                lines.iter().take(20).for_each(|line| out += &format!("  {line}\n"));
                if lines.len() > 20 {
                    out += &format!("  … and {} more (`--json` has all)\n", lines.len() - 20);
                }
            }
        }
        out
    }
}

/// Names of the parts of a configuration.
fn sections(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.config().as_object().map(|parts| parts.keys().map(String::as_str).collect()).unwrap_or_default()
}

/// Values of a tensor, if its dtype has any.
fn values(checkpoint: &Checkpoint, key: &str) -> Option<(TensorType, Vec<f32>)> {
    let at = checkpoint.tensor(key)?;
    let ty = at.stored.ty()?;
    let values = decoded(&ty, checkpoint.data(key)?);
    Some((ty, values))
}

/// Prints a line about a tensor; returns whether it is finite.
fn print_stats(checkpoint: &Checkpoint, key: &str, at: &Location<'_>, json_output: bool) -> bool {
    let bytes = checkpoint.data(key).unwrap_or_default();
    let hash: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    let Some((ty, values)) = values(checkpoint, key) else {
        let (dtype, shape) = (at.stored.dtype.to_string(), &at.stored.shape);
        match json_output {
            true => println!("{}", json!({"key": key, "shape": shape, "dtype": dtype, "sha256": hash})),
            false => println!("{key} {dtype} {shape:?} sha256={hash}"),
        }
        return true;
    };
    let s = Stats::of_typed(ty, &values);
    if json_output {
        println!(
            "{}",
            json!({"key": key, "shape": s.ty.shape, "dtype": s.ty.dtype.to_string(), "sum": s.sum, "abs_mean": s.abs_mean,
                "min": s.min, "max": s.max, "std": s.std, "nan": s.nan, "infinite": s.infinite, "zeros": s.zeros,
                "checksum": s.checksum, "sha256": hash})
        );
    } else {
        println!(
            "{key} {} {} sum={:.6} abs_mean={:.6} min={:.6} max={:.6} std={:.6} nan={} inf={} zeros={} checksum={:.6} sha256={hash}",
            s.ty.dtype,
            s.shape_text(),
            s.sum,
            s.abs_mean,
            s.min,
            s.max,
            s.std,
            s.nan,
            s.infinite,
            s.zeros,
            s.checksum
        );
    }
    !s.is_bad()
}

const BLOCKS: &str = "model.diffusion_model.transformer_blocks";

fn print_attention(checkpoint: &Checkpoint, block: usize, json_output: bool) -> Result<()> {
    let prefix = format!("{BLOCKS}.{block}.");
    let mut count = 0;
    for (key, _) in checkpoint.tensors().filter(|(k, _)| k.starts_with(&prefix)) {
        let is_attention =
            ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "q_norm.weight", "k_norm.weight"];
        if is_attention.iter().any(|end| key.ends_with(end))
            && let Some((ty, values)) = values(checkpoint, key)
        {
            let s = Stats::of_typed(ty, &values);
            count += 1;
            if json_output {
                let facts =
                    json!({"key": key, "shape": s.ty.shape, "mean": s.mean, "std": s.std, "min": s.min, "max": s.max});
                println!("{facts}");
                continue;
            }
            println!("{key} {} mean={:.6} std={:.6} min={:.4} max={:.4}", s.shape_text(), s.mean, s.std, s.min, s.max);
        }
    }
    if count == 0 {
        bail!("there is no block {block} with attention weights");
    }
    Ok(())
}

/// Names of the rows of modulation tables, in order.
pub(super) fn row_names(key: &str, rows: usize) -> Vec<String> {
    if key.contains("a2v_ca") {
        let names = ["a2v scale", "a2v shift", "v2a scale", "v2a shift", "gate"];
        return names.iter().take(rows).map(ToString::to_string).collect();
    }
    let layers = ["self attention", "feed-forward", "text attention"];
    let parts = ["shift", "scale", "gate"];
    let name = |i: usize| format!("{} {}", layers.get(i / 3).unwrap_or(&"?"), parts[i % 3]);
    match rows {
        2 => vec!["shift".into(), "scale".into()],
        rows => (0..rows).map(name).collect(),
    }
}

/// Mean of the scales in the output tables of released models, about; shifts are about 0.
const OUTPUT_SCALE: f64 = -0.32; // measured on LTX-2 19B, spec/debug-tools §10

/// Whether the rows of an output table look swapped: the shift is where the scales of released models are, the scale is not.
fn looks_swapped(shift: f64, scale: f64) -> bool {
    let is_scale = |mean: f64| (mean - OUTPUT_SCALE).abs() < 0.5 * OUTPUT_SCALE.abs();
    is_scale(shift) && !is_scale(scale)
}

/// Prints the rows of modulation tables; a scale is used as `1 + scale`. Returns whether rows look right. Of rows inside of
/// blocks only a comparison with other files (`--against`) can tell.
fn print_modulation(checkpoint: &Checkpoint, block: usize, json_output: bool) -> Result<bool> {
    let prefix = format!("{BLOCKS}.{block}.");
    let is_table =
        |k: &str| k.contains("scale_shift_table") && (k.starts_with(&prefix) || !k.contains("transformer_blocks."));
    let keys: Vec<String> = checkpoint.tensors().map(|(k, _)| k.to_string()).filter(|k| is_table(k)).collect();
    if !keys.iter().any(|k| k.starts_with(&prefix)) {
        bail!("there is no block {block} with modulation tables");
    }
    let mut ok = true;
    for key in keys {
        let Some((ty, values)) = values(checkpoint, &key) else { continue };
        let [rows, width] = ty.shape[..] else { continue };
        let stats: Vec<Stats> = values.chunks(width.max(1)).map(|row| Stats::of(&[width], row)).collect();
        let is_swapped = rows == 2 && looks_swapped(stats[0].mean, stats[1].mean);
        ok &= !is_swapped && stats.iter().all(|s| !s.is_bad());
        let names = row_names(&key, rows);
        if json_output {
            let row = |(name, s): (&String, &Stats)| {
                let effective = name.ends_with("scale").then_some(1.0 + s.mean);
                json!({"row": name, "mean": s.mean, "std": s.std, "factor": effective})
            };
            let rows: Vec<Value> = names.iter().zip(&stats).map(row).collect();
            println!("{}", json!({"key": key, "rows": rows, "looks_swapped": is_swapped}));
            continue;
        }
        println!("{key} {ty}");
        if is_swapped {
            println!("  RED FLAG: shift and scale look swapped");
        }
        for (i, (name, s)) in names.iter().zip(&stats).enumerate() {
            let effective =
                if name.ends_with("scale") { format!(", factor {:.4}", 1.0 + s.mean) } else { String::new() };
            println!("  row {i} {name:<22} mean {:>9.5} std {:>9.5}{effective}", s.mean, s.std);
        }
    }
    Ok(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_tables_have_names() {
        assert_eq!(row_names("x.scale_shift_table", 2), ["shift", "scale"]);
        assert_eq!(row_names("x.scale_shift_table", 6)[4], "feed-forward scale");
        assert_eq!(row_names("scale_shift_table_a2v_ca_video", 5)[0], "a2v scale");
    }

    #[test]
    fn swapped_tables_look_swapped() {
        assert!(looks_swapped(-0.32, 0.01) && !looks_swapped(0.01, -0.32) && !looks_swapped(0.0, 0.0));
    }
}
