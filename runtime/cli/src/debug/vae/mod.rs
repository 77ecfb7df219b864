//! `ltxc debug vae`: the video VAE, the latent upsampler and the audio decoders, one at a time.
//!
//! | file | what |
//! | --- | --- |
//! | `decode` | known latents through the decoder, block by block; what the timestep does |
//! | `encode` | pictures through the encoder, and back |
//! | `norm` | statistics, and whether normalising and patches can be undone |
//! | `upscale` | the upsampler with and without its wrapper, beside plain enlargements |
//! | `audio` | spectrogram and waveform |
//! | `tiles` | tiles against the whole |
//! | `reference` | tensors of other tools |

mod audio;
mod decode;
mod encode;
mod norm;
mod reference;
mod tiles;
mod upscale;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use ltxc_ir::eval::Tensor;
use ltxc_ir::{DType, TensorType};
use ltxc_models::Weights;
use ltxc_models::checkpoint::Checkpoint;
use ltxc_models::video_vae::{self, VideoVaeConfig};
use ltxc_runtime::backend::Device;
use ltxc_runtime::noise_files::{self, Stored};
use ltxc_runtime::random::NormalStream;

use super::modules::{Bench, Ran, Side};
use super::session::Session;
use crate::args::ModelArgs;
use crate::compile::unfused;
use crate::model_files::{MODEL, UPSAMPLER, checkpoint_source, local};

/// `ltxc debug vae`.
#[derive(Debug, Subcommand)]
pub enum VaeCommand {
    /// Mean, deviation and range after every block of the decoder, with warnings.
    Trace(decode::TraceArgs),
    /// Brightness and contrast of what a known latent decodes to.
    Decode(decode::DecodeArgs),
    /// What the timestep does to a decoder that takes one: its weights, its tables, its effect.
    Timestep(decode::TimestepArgs),
    /// A picture or clip through the encoder: statistics of every channel of the latent.
    Encode(encode::EncodeArgs),
    /// An image through encoder and decoder: PSNR and SSIM.
    Roundtrip(encode::RoundtripArgs),
    /// Whether per-channel statistics are there, and normalising, patches and undoing both give the same back.
    Norm(norm::NormArgs),
    /// A latent through the upsampler, with and without its wrapper, beside nearest and bilinear enlargements.
    Upscale(upscale::UpscaleArgs),
    /// A latent or a spectrogram through audio decoder and vocoder: loudness by second, and whether it depends on length.
    Audio(audio::AudioArgs),
    /// Decode in tiles and whole: where they differ, and whether seams show.
    Tiles(tiles::TilesArgs),
}

/// A latent of the video VAE.
#[derive(Debug, Args)]
pub struct LatentArgs {
    /// Latent: zero, random, or a file (.safetensors, .npy, .npz, .pt) of shape (1, c, f, h, w).
    #[arg(long, default_value = "random")]
    pub latent: String,
    /// Tensor of that file, if it has several.
    #[arg(long, value_name = "NAME")]
    pub tensor: Option<String>,
    /// Frames, rows and columns of a latent that is not read from a file.
    #[arg(long, value_name = "F,H,W", value_delimiter = ',', default_value = "2,4,4")]
    pub grid: Vec<usize>,
}

/// Most values of a latent that is drawn: 1 GB.
const MOST_VALUES: usize = 1 << 28;

/// Runs a command. Returns whether it found nothing wrong.
///
/// # Errors
/// Model files that cannot be read or run.
pub fn run(command: &VaeCommand, json: bool) -> Result<bool> {
    match command {
        VaeCommand::Trace(args) => look(&args.source.side, &["vae"], |model| decode::trace(args, model, json)),
        VaeCommand::Decode(args) => look(&args.source.side, &["vae"], |model| decode::decode(args, model, json)),
        VaeCommand::Timestep(args) => look(&args.side, &["vae"], |model| decode::timestep(args, model, json)),
        VaeCommand::Encode(args) => look(&args.side, &["vae"], |model| encode::encode(args, model, json)),
        VaeCommand::Roundtrip(args) => look(&args.side, &["vae"], |model| encode::roundtrip(args, model, json)),
        VaeCommand::Norm(args) => norm::norm(args, json),
        VaeCommand::Upscale(args) => look(&args.side, &["upsampler"], |model| upscale::upscale(args, model, json)),
        VaeCommand::Audio(args) => look(&args.side, &["audio_vae", "vocoder"], |model| audio::audio(args, model, json)),
        VaeCommand::Tiles(args) => look(&args.side, &["vae"], |model| tiles::tiles(args, model, json)),
    }
}

/// The files of a model, without its text encoder, and what runs them.
struct Model<'a> {
    checkpoint: Checkpoint,
    upsampler: Option<Checkpoint>,
    device: &'a Device,
    session: &'a Session,
}

/// Opens a model and shows it to `look`, which runs `components` of it.
fn look(side: &Side, components: &[&str], look: impl FnOnce(&Model<'_>) -> Result<bool>) -> Result<bool> {
    // Latents that are drawn have one seed.
    side.look(components, Some(0), |device, session| {
        let upsampler = side.model.spatial_upsampler_path.as_ref();
        let upsampler = upsampler.map(|path| anyhow::Ok(Checkpoint::open_upsampler(&local(path)?)?)).transpose()?;
        look(&Model { checkpoint: checkpoint(&side.model)?, upsampler, device, session })
    })
}

fn checkpoint(model: &ModelArgs) -> Result<Checkpoint> {
    let path = model.checkpoint_path.as_ref();
    let path = path.context("`--checkpoint-path` is missing: it names the model file or folder")?;
    Ok(Checkpoint::open(&local(path)?)?)
}

impl Model<'_> {
    fn weights(&self) -> Weights<'_> {
        Weights::new(MODEL, &self.checkpoint)
    }

    fn video_vae(&self) -> Result<VideoVaeConfig> {
        Ok(VideoVaeConfig::from_json(self.checkpoint.section("vae")?)?)
    }

    fn bench(&self) -> Result<Bench<'_>> {
        let mut sources = vec![checkpoint_source(MODEL, &self.checkpoint, false)?];
        let mut paths: Vec<PathBuf> = self.checkpoint.paths();
        if let Some(upsampler) = &self.upsampler {
            sources.push(checkpoint_source(UPSAMPLER, upsampler, false)?);
            paths.extend(upsampler.paths());
        }
        Ok(Bench { sources, paths, options: unfused(), device: self.device, session: self.session })
    }

    /// Decodes a latent `[1, f, h, w, c]` with `config`, and keeps the values inside whose names `keep` wants. `given`
    /// makes the further arguments of the decoder, by name and type: a timestep, noise.
    fn decode(
        &self,
        config: &VideoVaeConfig,
        latent: &Tensor,
        given: &mut dyn FnMut(&str, &TensorType) -> Result<Vec<f32>>,
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<Ran> {
        let grid = [1, 2, 3].map(|axis| latent.ty.shape[axis]);
        let module = video_vae::decode(config, &self.weights(), grid, DType::F32)?;
        let function = module.function("decode").context("the decoder has an entry")?;
        let mut arguments = vec![latent.clone()];
        for param in function.params.iter().skip(1) {
            let ty = function.ty(param.value);
            arguments.push(Tensor::f32(&ty.shape, &given(function.name_of(param.value), ty)?));
        }
        self.bench()?.run_keeping("vae", &module, "decode", &arguments, keep)
    }
}

/// Means and standard deviations of the channels of a latent.
fn statistics(checkpoint: &Checkpoint) -> Result<[Vec<f32>; 2]> {
    let find = |name: &str| -> Result<Vec<f32>> {
        let end = format!("per_channel_statistics.{name}");
        let keys = checkpoint.tensors().map(|(k, _)| k.to_string());
        let Some(key) = keys.into_iter().find(|k| k.starts_with("vae.") && k.ends_with(&end)) else {
            bail!("`{}` has no `vae.{end}`: latents cannot be normalised", checkpoint.name())
        };
        let at = checkpoint.tensor(&key).and_then(|at| at.stored.ty());
        let (Some(ty), Some(bytes)) = (at, checkpoint.data(&key)) else { bail!("`{key}` cannot be read") };
        Ok(ltxc_runtime::stats::decoded(&ty, bytes))
    };
    let [mean, std] = [find("mean-of-means")?, find("std-of-means")?];
    if mean.is_empty() || mean.len() != std.len() {
        bail!("`{}` has {} means and {} deviations of channels", checkpoint.name(), mean.len(), std.len());
    }
    Ok([mean, std])
}

impl LatentArgs {
    /// The latent, `[1, f, h, w, c]`.
    fn load(&self, c: usize) -> Result<Tensor> {
        let path = match self.latent.as_str() {
            kind @ ("zero" | "random") => {
                let &[f, h, w] = &self.grid[..] else { bail!("`--grid` takes frames, rows and columns") };
                if [f, h, w].iter().any(|n| !(1..=1024).contains(n)) {
                    bail!("`--grid {f},{h},{w}` is out of range, expected 1 to 1024");
                }
                let count = [h, w, c].iter().try_fold(f, |n, &extent| n.checked_mul(extent));
                let Some(count) = count.filter(|&count| count <= MOST_VALUES) else {
                    bail!("`--grid {f},{h},{w}` of {c} channels is too large, expected at most {MOST_VALUES} values");
                };
                let values = if kind == "zero" { vec![0.0; count] } else { NormalStream::new(0, "latent").draw(count) };
                return Ok(Tensor::f32(&[1, f, h, w, c], &values));
            }
            path => path,
        };
        let tensor = chosen(path.as_ref(), self.tensor.as_deref(), 5)?;
        let &[1, channels, f, h, w] = &tensor.shape[..] else {
            bail!("`{path}` is {:?}, expected (1, {c}, f, h, w)", tensor.shape);
        };
        if channels != c {
            bail!("`{path}` has {channels} channels, the model takes {c}");
        }
        Ok(Tensor::f32(&[1, f, h, w, c], &channels_last(&tensor.values, c)))
    }
}

/// The tensor of a file: the one that is named, else the first with so many axes.
fn chosen(path: &std::path::Path, name: Option<&str>, axes: usize) -> Result<Stored> {
    let tensors = noise_files::read(path)?;
    let found = match name {
        Some(name) => tensors.into_iter().find(|t| t.name == name),
        None => tensors.into_iter().find(|t| t.shape.len() == axes),
    };
    let what = name.map_or(format!("tensor of {axes} axes"), |name| format!("tensor `{name}`"));
    found.with_context(|| format!("`{}` has no {what}", path.display()))
}

/// `[c, ..]` to `[.., c]`.
fn channels_last(values: &[f32], c: usize) -> Vec<f32> {
    let places = values.len() / c.max(1);
    (0..places).flat_map(|p| (0..c).map(move |k| k * places + p)).map(|i| values[i]).collect()
}

/// Values of each channel of `[.., c]`.
fn by_channel(values: &[f32], c: usize) -> Vec<Vec<f32>> {
    (0..c).map(|k| values.iter().skip(k).step_by(c.max(1)).copied().collect()).collect()
}
