//! One evaluation of the transformer on given inputs, with every named value kept: what the commands share that look at a
//! single call of the model.
//!
//! Inputs are tensors as `tests/tools/record_reference.py` writes them: what all cases share under `in.<stream>.*`, what a
//! case adds under `<case>.*`. Where there is no file, they are drawn from a seed.

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::VideoSettings;
use ltxc_models::checkpoint::Checkpoint;
use ltxc_models::synth::{Preset, listed};
use ltxc_models::transformer::{
    ENTRY, KEY_PREFIX, Perturbation, Stream, TransformerConfig, TransformerSpec, build, build_block,
};
use ltxc_models::{TensorDirectory, Weights};
use ltxc_runtime::adapters::AdapterSet;
use ltxc_runtime::backend::Device;
use ltxc_runtime::noise_files::Stored;
use ltxc_runtime::pipeline::positions::{audio_positions, video_positions};
use ltxc_runtime::random::NormalStream;
use serde_json::Value;

use super::modules::{Bench, Ran};
use super::parity::transformer::{StreamCase, case_config, perturbation, stream_case};
use super::recording::TensorFile;
use super::session::Session;
use crate::args::ModelArgs;
use crate::compile::unfused;
use crate::model_files::{MODEL, checkpoint_source, local};

/// What runs.
pub const COMPONENT: &str = "transformer";

/// Name of the case whose noise level all tokens share.
pub const UNIFORM: &str = "uniform";

/// Scale factors of every published video VAE: time, height, width.
const SCALE: [u32; 3] = [8, 32, 32];

/// Latent mel bins, and audio latents of a second: those of every audio VAE of the family.
const AUDIO_RATE_HZ: f64 = 25.0;

/// Most video tokens that are drawn; a clip of 10 s in 1080p has fewer.
const MOST_TOKENS: u32 = 1 << 16;

/// A transformer, opened for single evaluations without fusion.
pub struct Model<'a> {
    /// Its file or folder.
    pub checkpoint: Checkpoint,
    /// The section `transformer` of its configuration.
    section: Value,
    device: &'a Device,
    session: &'a Session,
}

impl<'a> Model<'a> {
    /// Opens the checkpoint that `args` name; the text encoder is not needed.
    ///
    /// # Errors
    /// A file that is missing or is no model.
    pub fn open(args: &ModelArgs, device: &'a Device, session: &'a Session) -> Result<Model<'a>> {
        let path = args.checkpoint_path.as_ref().context("`--checkpoint-path` is missing: it names the model")?;
        let checkpoint = Checkpoint::open(&local(path)?)?;
        let section = checkpoint.section("transformer")?.clone();
        Ok(Model { checkpoint, section, device, session })
    }

    /// The configuration for a case; see [`case_config`].
    ///
    /// # Errors
    /// A configuration that is not supported.
    pub fn config(&self, case: &str) -> Result<TransformerConfig> {
        case_config(&self.section, case).with_context(|| format!("`{}`", self.checkpoint.name()))
    }

    /// Evaluates the model once.
    ///
    /// # Errors
    /// Inputs or adapters that do not fit the model.
    pub fn evaluate(&self, inputs: &Inputs, adapters: AdapterSet) -> Result<Ran> {
        let weights = Weights::new(MODEL, &self.checkpoint);
        inputs.run(&self.bench()?, &self.config(&inputs.case)?, &weights, adapters, &|_| true)
    }

    /// Evaluates block `index` alone; `x` are the residual streams in front of it, of the streams that there are.
    ///
    /// # Errors
    /// Inputs that do not fit the model, or a block that it does not have.
    pub fn evaluate_block(&self, index: usize, inputs: &Inputs, x: Vec<Tensor>) -> Result<Ran> {
        let config = self.config(&inputs.case)?;
        inputs.check(&config)?;
        let weights = Weights::new(MODEL, &self.checkpoint);
        let module = build_block(&config, &weights, &inputs.spec(&config), index, DType::F32)?;
        self.bench()?.run(COMPONENT, &module, ENTRY, &[inputs.arguments(), x].concat())
    }

    fn bench(&self) -> Result<Bench<'_>> {
        let sources = vec![checkpoint_source(MODEL, &self.checkpoint, false)?];
        let (paths, options) = (self.checkpoint.paths(), unfused());
        Ok(Bench { sources, paths, options, device: self.device, session: self.session })
    }
}

/// What one evaluation is given.
pub struct Inputs {
    /// Name of the case.
    pub case: String,
    /// Video and audio, as far as they take part.
    pub streams: [Option<StreamCase>; 2],
}

/// Inputs that are drawn where no file is given.
#[derive(Debug, Clone, Args)]
pub struct DrawnArgs {
    /// Frames, rows and columns of the latent.
    #[arg(long, value_name = "F,H,W", value_delimiter = ',', default_values_t = DrawnArgs::default().grid)]
    pub grid: Vec<u32>,
    /// Noise level, 0 to 1.
    #[arg(long, default_value_t = DrawnArgs::default().sigma)]
    pub sigma: f32,
    /// Seed of latents and text.
    #[arg(long, default_value_t = DrawnArgs::default().seed)]
    pub seed: u64,
    /// Text tokens.
    #[arg(long, value_name = "N", default_value_t = DrawnArgs::default().text_tokens)]
    pub text_tokens: usize,
}

impl Default for DrawnArgs {
    fn default() -> Self {
        DrawnArgs { grid: vec![2, 4, 6], sigma: 0.25, seed: 42, text_tokens: 16 }
    }
}

impl Inputs {
    /// The inputs of `case` in a file.
    ///
    /// # Errors
    /// A file without that case, or without an input that it needs.
    pub fn read(file: &TensorFile, case: &str) -> Result<Inputs> {
        // Cases that change the model and not its inputs have none of their own.
        let is_variant = case == "interleaved" && file.find(&format!("{UNIFORM}.sigma")).is_some();
        if file.find(&format!("{case}.sigma")).is_none() && !is_variant {
            let known: Vec<&str> = file.iter().filter_map(|(name, _)| name.strip_suffix(".sigma")).collect();
            bail!("`{}` has no case `{case}`; it has {}", file.path.display(), known.join(", "));
        }
        let [video, audio] = Stream::BOTH.map(|stream| stream_case(file, case, stream));
        Ok(Inputs { case: case.into(), streams: [video?, audio?] })
    }

    /// Draws inputs for a model, or for the sizes of LTX-2 19B if none is given.
    ///
    /// # Errors
    /// Sizes that are out of range.
    pub fn drawn(args: &DrawnArgs, model: Option<&Checkpoint>) -> Result<Inputs> {
        let &[f, h, w] = &args.grid[..] else { bail!("`--grid` takes frames, rows and columns") };
        if [f, h, w].iter().any(|n| !(1..=256).contains(n)) || !(1..=4096).contains(&args.text_tokens) {
            bail!("`--grid` must be 1 to 256 each, `--text-tokens` 1 to 4096");
        }
        if f * h * w > MOST_TOKENS {
            bail!("`--grid {f},{h},{w}` has {} tokens, expected at most {MOST_TOKENS}", f * h * w);
        }
        if !(0.0..=1.0).contains(&args.sigma) {
            bail!("`--sigma {}` is out of range, expected 0 to 1", args.sigma);
        }
        let widths = match model {
            Some(checkpoint) => widths(&|key| checkpoint.tensor_type(key).map(|ty| ty.shape.to_vec())),
            None => {
                let (_, tensors) = listed(Preset::Ltx2)?;
                widths(&|key| tensors.iter().find(|t| t.key == key).map(|t| t.shape.clone()))
            }
        }?;
        let video = VideoSettings {
            height: h * SCALE[1],
            width: w * SCALE[2],
            frames: (f - 1) * SCALE[0] + 1,
            frame_rate: (24, 1),
            channels: 0,
            scale: SCALE,
            max_keyframes: 0,
        };
        let seconds = f64::from(video.frames) / 24.0;
        let audio_tokens = ((seconds * AUDIO_RATE_HZ).round_ties_even() as u32).max(1);
        let stream = |stream: Stream, tokens: u32, axes: usize, positions: Vec<f32>| {
            let (n, [channels, context]) = (tokens as usize, widths[stream as usize]);
            let draw = |what: &str, shape: &[usize]| {
                let noise = NormalStream::new(args.seed, &format!("{}.{what}", stream.name()));
                Tensor::f32(shape, &noise.draw(shape.iter().product()))
            };
            StreamCase {
                latent: draw("latent", &[1, n, channels]),
                timesteps: vec![args.sigma; n],
                sigma: args.sigma,
                positions: Tensor::f32(&[1, axes, n, 2], &positions),
                context: draw("context", &[1, args.text_tokens, context]),
                self_mask: None,
                context_mask: None,
                keyframes_mask: None,
                is_enabled: true,
            }
        };
        let video = stream(Stream::Video, f * h * w, 3, video_positions([f, h, w], &video));
        let audio = stream(Stream::Audio, audio_tokens, 1, audio_positions(audio_tokens));
        Ok(Inputs { case: UNIFORM.into(), streams: [Some(video), Some(audio)] })
    }

    /// The streams that there are.
    pub fn streams(&self) -> impl Iterator<Item = (Stream, &StreamCase)> {
        Stream::BOTH.into_iter().zip(&self.streams).filter_map(|(stream, case)| Some((stream, case.as_ref()?)))
    }

    /// The inputs as tensors, under the names that [`Inputs::read`] knows.
    pub fn tensors(&self) -> Vec<Stored> {
        let case = &self.case;
        let stored = |name: String, tensor: &Tensor| Stored::f32(&name, &tensor.ty.shape, tensor.to_f32());
        let mut tensors = Vec::new();
        for (stream, of) in self.streams() {
            let (name, n) = (stream.name(), of.timesteps.len());
            for (key, tensor) in [("latent", &of.latent), ("positions", &of.positions), ("context", &of.context)] {
                tensors.push(stored(format!("in.{name}.{key}"), tensor));
            }
            tensors.push(Stored::f32(&format!("{case}.{name}.timesteps"), &[1, n, 1], of.timesteps.clone()));
            tensors.push(Stored::f32(&format!("{case}.sigma_{name}"), &[1], vec![of.sigma]));
            for (key, mask) in [("attention_mask", &of.self_mask), ("context_mask", &of.context_mask)] {
                tensors.extend(mask.as_ref().map(|mask| stored(format!("{case}.{key}"), mask)));
            }
            let marks = of.keyframes_mask.clone();
            tensors.extend(marks.map(|marks| Stored::f32(&format!("{case}.keyframes_mask"), &[n], marks)));
        }
        let sigma = self.streams().next().map_or(0.0, |(_, of)| of.sigma);
        tensors.push(Stored::f32(&format!("{case}.sigma"), &[1], vec![sigma]));
        // Masks are of the case, whichever stream has them.
        let mut seen = std::collections::BTreeSet::new();
        tensors.retain(|t| seen.insert(t.name.clone()));
        tensors
    }

    /// Sets the noise level of every token.
    pub fn set_sigma(&mut self, sigma: f32) {
        for stream in self.streams.iter_mut().flatten() {
            stream.sigma = sigma;
            stream.timesteps.fill(sigma);
        }
    }

    /// Evaluates a transformer on them, keeping the values inside whose names `keep` wants.
    ///
    /// # Errors
    /// Inputs or adapters that do not fit the model.
    pub fn run(
        &self,
        bench: &Bench<'_>,
        config: &TransformerConfig,
        weights: &Weights<'_>,
        adapters: AdapterSet,
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<Ran> {
        self.check(config)?;
        let module = build(config, weights, &self.spec(config), DType::F32)?;
        bench.run_with(COMPONENT, &module, ENTRY, &self.arguments(), adapters, keep)
    }

    fn arguments(&self) -> Vec<Tensor> {
        self.streams.iter().flatten().flat_map(StreamCase::arguments).collect()
    }

    fn spec(&self, config: &TransformerConfig) -> TransformerSpec {
        let spec = |stream: &Option<StreamCase>| stream.as_ref().map(StreamCase::spec);
        let [video, audio] = &self.streams;
        let perturbation: Perturbation = perturbation(config, &self.case);
        TransformerSpec { video: spec(video), audio: spec(audio), perturbation }
    }

    /// Refuses inputs of other sizes than the model's.
    fn check(&self, config: &TransformerConfig) -> Result<()> {
        for (stream, of) in self.streams() {
            let (n, sizes) = (of.timesteps.len(), config.stream(stream));
            let tokens = of.context.ty.shape.get(1).copied().unwrap_or(0);
            let expected = [
                ("latent", &of.latent, vec![1, n, sizes.in_channels]),
                ("positions", &of.positions, vec![1, sizes.max_positions.len(), n, 2]),
                ("context", &of.context, vec![1, tokens, config.context_channels(stream)]),
            ];
            for (what, tensor, shape) in expected {
                if tensor.ty.shape[..] != shape[..] {
                    bail!("`{what}` of {} is {:?}, this model takes {shape:?}", stream.name(), tensor.ty.shape);
                }
            }
        }
        Ok(())
    }
}

/// Channels of latents and of text, for video and audio, from the shapes of weights.
fn widths(shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<[[usize; 2]; 2]> {
    let inputs = |key: String| -> Option<usize> { shape(&format!("{KEY_PREFIX}{key}.weight"))?.get(1).copied() };
    let of = |prefix: &str| -> Result<[usize; 2]> {
        let latent = inputs(format!("{prefix}patchify_proj"));
        // Text is projected by the transformer, or comes as its text attention takes it.
        let text = inputs(format!("{prefix}caption_projection.linear_1"))
            .or_else(|| inputs(format!("transformer_blocks.0.{prefix}attn2.to_k")));
        let missing = || format!("the model has no `{prefix}patchify_proj`; name a whole transformer");
        Ok([latent.with_context(missing)?, text.with_context(missing)?])
    };
    Ok([of("")?, of("audio_")?])
}
