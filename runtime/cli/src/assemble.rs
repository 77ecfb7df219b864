//! From model files and a shape to the graphs of a pipeline: which programs there are, and what each is built from.
//!
//! # Programs
//! - `encode.<n>` and `connect`: text to contexts, a program per bucket of prompt lengths;
//! - `enhance.prefill` and `enhance.decode`, if prompts are to be enhanced; `enhance.see` and `enhance.prefill_image`, if
//!   they can be enhanced with an image;
//! - one group per stage and kind of conditioning, named by [`StageClass::name`], with a program for every combination
//!   of modalities that one step may update;
//! - `encode_image.<stage>`, `upsample`, `decode.<f>x<h>x<w>`, `decode_audio`.
//!
//! A pipeline that upscales a clip has none of the model but its VAE, see [`crate::upscale`].

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::{
    AudioSettings, Inputs, Modality, ModelInfo, Pass, Pipeline, ReferenceInput, Release, SoundRole, Stage,
    StageAdapter, StageClass, StepProgram, StreamClass, TextSettings, VideoSettings,
};
use ltxc_ir::tiling::TilePlan;
use ltxc_ir::{DType, Module};
use ltxc_models::audio::{self, AudioVaeConfig, VocoderConfig, decode_audio};
use ltxc_models::checkpoint::{Checkpoint, GemmaFolder, Generation};
use ltxc_models::text::{self, Connectors, TextConfig, TextWeights};
use ltxc_models::transformer::{self, BlockSet, Perturbation, StreamSpec, TransformerConfig, TransformerSpec};
use ltxc_models::upsampler::{Enlarge, UpsamplerConfig, upsample};
use ltxc_models::video_vae::{self, VideoVaeConfig};
use ltxc_models::{ModelError, TensorDirectory, Weights};
use ltxc_runtime::pipeline::decode::program_name;
use ltxc_runtime::pipeline::encode;
use ltxc_runtime::pipeline::needed_passes;

use crate::enhance;
use crate::job::Shape;
use crate::model_files::{GEMMA, MODEL, ModelFiles, UPSAMPLER};
use crate::pipelines::{Basis, StageDraft, definition, guidance, inputs};
use crate::tensors;
use crate::upscale;

/// Prompt lengths that have a program of their own, in tokens.
const BUCKETS: [usize; 6] = [32, 64, 128, 256, 512, 1024];

/// A program to compile.
pub struct ProgramSource {
    /// Group that shares state.
    pub group: String,
    /// Name of the program.
    pub name: String,
    /// Its graph.
    pub module: Module,
}

/// Everything a plan is compiled from.
pub struct Assembly {
    /// Programs, in the order they run.
    pub programs: Vec<ProgramSource>,
    /// What the driver does with them.
    pub pipeline: Pipeline,
}

/// Builds the graphs of a pipeline.
///
/// # Errors
/// A model that does not fit the pipeline, or sizes that it cannot run.
pub fn assemble(files: &ModelFiles, shape: &Shape) -> Result<Assembly> {
    if !definition(shape.pipeline).denoises() {
        return upscale::assemble(files, shape);
    }
    let model = Components::read(files, shape)?;
    model.check(files, shape)?;
    let (dtype, mut programs) = (shape.dtype, Programs::default());
    let mut asked = vec![(MODEL, model.weights.clone())];

    let (mut stages, factors) = (model.stages(shape)?, model.factors());
    let tokens = model.audio_tokens(shape);
    let inputs = inputs(shape, &stages, factors, model.audio_vae.as_ref(), tokens)?;
    let takes_images = inputs.clip.is_none() && stages.iter().all(|stage| stage.tiles.is_none());

    let mut vision = None;
    if let (Some(config), Some(folder)) = (&model.text, &files.gemma) {
        let gemma = Weights::new(GEMMA, folder);
        let text_weights =
            TextWeights { gemma: gemma.clone(), projection: model.weights.clone(), transformer: model.weights.clone() };
        // Gemma 3 adds up states beyond 65504, the largest number of f16.
        let states = if dtype == DType::F16 { DType::F32 } else { dtype };
        for bucket in BUCKETS {
            programs.add("text", &format!("encode.{bucket}"), text::encode(config, &text_weights, bucket, states));
        }
        if shape.enhances_prompt {
            if takes_images && shape.makes(Modality::Video) {
                vision = enhance::vision(folder, &gemma)?;
            }
            match enhance::programs(&config.gemma, vision.as_ref(), &gemma, states) {
                Ok(built) => programs.built.extend(built),
                Err(failure) => programs.fail(failure),
            }
        }
        asked.push((GEMMA, gemma));
    }
    // Contexts from elsewhere have the shapes that this one gives.
    let connectors = &model.connectors;
    programs.add("text", "connect", text::connect(connectors, &model.weights, text::CONTEXT_TOKENS, dtype));

    for (i, stage) in stages.iter_mut().enumerate() {
        stage.classes = match &stage.tiles {
            Some(tiles) => classes_of_tiles(stage, tiles, shape, inputs.references.get(i)),
            None => classes(stage, i, shape, &inputs, tokens, takes_images),
        };
    }
    for stage in &stages {
        for class in &stage.classes {
            for program in &class.programs {
                let spec = model.spec(shape, class, &program.updates);
                let pass = |&pass: &Pass| transformer_pass(stage, pass, shape.release);
                let passes: Vec<_> = program.passes.iter().map(pass).collect();
                let module = transformer::build_passes(&model.transformer, &model.weights, &spec, &passes, dtype);
                programs.add(&class.name, &program.name, module);
            }
        }
        if let Some(vae) = &model.video_vae {
            let pixels = [1, stage.height as usize, stage.width as usize];
            let module = video_vae::encode(vae, &model.weights, pixels, dtype);
            programs.add("image", &format!("encode_image.{}", stage.name), module);
        }
    }
    let clips = inputs.references.iter().map(|r| &r.tiles).chain(inputs.clip.iter().map(|c| &c.tiles));
    let sizes: BTreeSet<[usize; 3]> =
        clips.flat_map(|tiles| tiles.tiles().map(move |t| tiles.pixels(t).map(|axis| axis.len()))).collect();
    for pixels @ [f, h, w] in sizes {
        if let Some(vae) = &model.video_vae {
            let module = video_vae::encode(vae, &model.weights, pixels, dtype);
            programs.add("inputs", &encode::program_name(f, h, w), module);
        }
    }
    if let (Some(sound), Some(vae)) = (&inputs.sound, &model.audio_vae) {
        let frames = sound.mel_frames as usize;
        let module = audio::encode(vae, &model.weights, frames, dtype);
        programs.add("inputs", "encode_audio", module);
    }
    let last = stages.last().context("a pipeline has stages")?;
    if let (Some(upsampler), [first, ..]) = (&files.upsampler, &stages[..]) {
        let config = UpsamplerConfig::from_json(upsampler.config())?;
        let grid = first.grid.map(|n| n as usize);
        if config.enlarge != Enlarge::TWICE {
            bail!(
                "the upscaler `{}` enlarges {}, the second stage needs {}; name a spatial x2 upscaler",
                upsampler.name(),
                config.enlarge,
                Enlarge::TWICE
            );
        }
        let channels = model.video_vae.as_ref().map_or(0, |vae| vae.latent_channels);
        upscale::check_upsampler(upsampler, &config, &files.model, channels)?;
        let weights = Weights::new(UPSAMPLER, upsampler);
        programs.add("upsample", "upsample", upsample(&config, &weights, &model.weights, grid, dtype));
        asked.push((UPSAMPLER, weights));
    }
    let mut tiles = TilePlan::default();
    if let Some(vae) = &model.video_vae {
        let grid = last.grid.map(|n| n as usize);
        tiles = shape.tile.tiles(grid, factors)?;
        let sizes: BTreeSet<[usize; 3]> = tiles.tiles().map(|t| t.map(|axis| axis.len())).collect();
        for [f, h, w] in sizes {
            let module = video_vae::decode(vae, &model.weights, [f, h, w], dtype);
            programs.add("decode", &program_name(f, h, w), module);
        }
    }
    let keeps_sound = inputs.sound.is_some_and(|sound| sound.role == SoundRole::Kept);
    if let (Some((vae, vocoder)), false) = (model.audio_vae.as_ref().zip(model.vocoder.as_ref()), keeps_sound) {
        let module = decode_audio(vae, vocoder, &model.weights, tokens, dtype);
        programs.add("sound", "decode_audio", module);
    }

    let is_whole = shape.modalities.len() == 2 && !keeps_sound && model.text.is_some();
    tensors::check(files, &asked, is_whole, programs.failure)?;
    let mut pipeline = model.pipeline(files, shape, stages, inputs, tiles)?;
    pipeline.text.image = vision.as_ref().map(enhance::image_tokens);
    Ok(Assembly { programs: programs.built, pipeline })
}

/// What a pass of a stage leaves out, as the transformer is told.
fn transformer_pass(stage: &Stage, pass: Pass, release: Release) -> transformer::Pass {
    let guidance = stage.guidance.clone().unwrap_or_default();
    // A modality whose own scale is 0 is not perturbed.
    let blocks = |m: Modality| match guidance.of(m) {
        guider if guider.stg != 0.0 => guider.stg_blocks.iter().map(|&b| b as usize).collect(),
        _ => BlockSet::default(),
    };
    let perturbation = match pass {
        Pass::Conditioned | Pass::Negative => Perturbation::default(),
        Pass::Perturbed => Perturbation {
            skip_video_self: blocks(Modality::Video),
            skip_audio_self: blocks(Modality::Audio),
            ..Perturbation::default()
        },
        Pass::Isolated => Perturbation {
            skip_audio_to_video: BlockSet::All,
            skip_video_to_audio: BlockSet::All,
            ..Perturbation::default()
        },
    };
    let name = if pass == Pass::Conditioned { "" } else { pass.name() };
    transformer::Pass { name: name.into(), is_negative: pass == Pass::Negative, perturbation, release }
}

/// Programs as they are built. One that fails does not keep others from being tried: all have something to report.
#[derive(Default)]
pub(crate) struct Programs {
    pub built: Vec<ProgramSource>,
    /// The first failure that is not about weights, which keep a list of their own.
    pub failure: Option<ModelError>,
}

impl Programs {
    /// Adds a program to a group, or what is wrong with it.
    pub fn add(&mut self, group: &str, name: &str, module: Result<Module, ModelError>) {
        match module {
            Ok(module) => self.built.push(ProgramSource { group: group.into(), name: name.into(), module }),
            Err(failure) => self.fail(failure),
        }
    }

    fn fail(&mut self, failure: ModelError) {
        if !matches!(failure, ModelError::Weights { .. }) {
            self.failure.get_or_insert(failure);
        }
    }
}

/// Configurations of all components of a model.
struct Components<'a> {
    checkpoint: &'a Checkpoint,
    /// One view for all programs, so that what is wrong with the files is known in the end.
    weights: Weights<'a>,
    /// Of the text encoder, if there is one.
    text: Option<TextConfig>,
    connectors: Connectors,
    transformer: TransformerConfig,
    /// Of what is made; files of models for one modality have no others.
    video_vae: Option<VideoVaeConfig>,
    audio_vae: Option<AudioVaeConfig>,
    vocoder: Option<VocoderConfig>,
}

/// Frames, rows and columns of a latent, for positions where no VAE says it: spec/pipelines §2.1.
const FACTORS: [usize; 3] = [8, 32, 32];

impl<'a> Components<'a> {
    fn read(files: &'a ModelFiles, shape: &Shape) -> Result<Components<'a>> {
        let model = &files.model;
        let name = || format!("`{}`", model.name());
        // A component has a section exactly if there are tensors of it.
        let lacks = |part: &&str| model.section(part).is_err();
        let needs_sound = shape.makes(Modality::Audio) && !lacks(&"vae");
        if let Some(part) = ["audio_vae", "vocoder"].iter().find(|part| needs_sound && lacks(part)) {
            let pipeline = definition(shape.pipeline);
            let is_kept = matches!(pipeline.brings.sound, Some(SoundRole::Kept | SoundRole::Reference));
            let remedy = match is_kept || !pipeline.has_video {
                true => format!("pipeline `{}` is about sound", pipeline.name),
                false => "add `--no-audio` for a silent video".into(),
            };
            bail!(
                "`{}` has no sound: there is no tensor `{part}.…` in it; {remedy}, or name the whole model, or the file that has \
                 them with `--audio-vae-path`",
                model.name()
            );
        }
        if shape.makes(Modality::Video) && lacks(&"vae") && !lacks(&"audio_vae") {
            bail!(
                "`{}` has no video: there is no tensor `vae.…` in it; choose `--pipeline t2a` for sound alone, or name the whole \
                 model, or the file that has them with `--video-vae-path`",
                model.name()
            );
        }
        let section = |modality: Modality, name: &str| match shape.makes(modality) {
            true => model.section(name).map(Some),
            false => Ok(None),
        };
        let [vae, audio_vae] = [section(Modality::Video, "vae")?, section(Modality::Audio, "audio_vae")?];
        let vocoder = section(Modality::Audio, "vocoder")?;
        let made = shape.modalities.iter().map(|m| match m {
            Modality::Video => text::Modality::Video,
            Modality::Audio => text::Modality::Audio,
        });
        let made: Vec<text::Modality> = made.collect();
        let text = |gemma: &GemmaFolder| -> Result<TextConfig> {
            Ok(TextConfig::from_json(gemma.config(), model.section("transformer")?)?.only(made.clone()))
        };
        // The transformer comes before the text side, which reads the same section and a file of its own.
        Ok(Components {
            checkpoint: model,
            weights: Weights::new(MODEL, model).with_adapter_slots(shape.adapter_rank),
            transformer: TransformerConfig::from_json(model.section("transformer")?).with_context(name)?,
            text: files.gemma.as_ref().map(text).transpose()?,
            connectors: Connectors::from_json(model.section("transformer")?)?.only(made),
            video_vae: vae.map(VideoVaeConfig::from_json).transpose().with_context(name)?,
            audio_vae: audio_vae.map(AudioVaeConfig::from_json).transpose().with_context(name)?,
            vocoder: vocoder.map(VocoderConfig::from_json).transpose().with_context(name)?,
        })
    }

    /// Pixels per latent in time, height and width.
    fn factors(&self) -> [usize; 3] {
        self.video_vae.as_ref().map_or(FACTORS, VideoVaeConfig::factors)
    }

    /// What the parts of one model must agree on, and what the pipeline can run.
    fn check(&self, files: &ModelFiles, shape: &Shape) -> Result<()> {
        let name = files.model.name();
        let generation = files.model.generation();
        if !matches!(generation, Generation::Ltx2 | Generation::Ltx23) {
            bail!("`{name}` is {}, which is not supported yet; LTX-2 and LTX-2.3 are", generation.name());
        }
        let video = self.transformer.video.in_channels;
        if let Some(latent) = self.video_vae.as_ref().map(|vae| vae.latent_channels).filter(|&n| n != video) {
            bail!(
                "`{name}`: the video VAE has {latent} latent channels, the transformer takes {video}; they are not of one model"
            );
        }
        let audio = self.transformer.audio.in_channels;
        if let Some(tokens) = self.audio_vae.as_ref().map(AudioVaeConfig::token_channels).filter(|&n| n != audio) {
            bail!(
                "`{name}`: the audio VAE has tokens of {tokens} values, the transformer takes {audio}; they are not of one model"
            );
        }
        for (modality, width) in self.connectors.made_widths() {
            let stream = match modality {
                text::Modality::Video => transformer::Stream::Video,
                text::Modality::Audio => transformer::Stream::Audio,
            };
            let (kind, taken) = (stream.name(), self.transformer.context_channels(stream));
            if width != taken {
                bail!("`{name}`: the text connector for {kind} gives {width} channels, the transformer takes {taken}");
            }
        }
        definition(shape.pipeline).check_training(self.checkpoint, shape.has_distilled_adapter)?;
        self.check_projection(files)?;
        shape.check(self.factors())
    }

    /// Checks that the text projection was made for the states of this text encoder.
    fn check_projection(&self, files: &ModelFiles) -> Result<()> {
        let (Some(text), Some(folder)) = (&self.text, &files.gemma) else { return Ok(()) };
        let gemma = &text.gemma;
        let given = gemma.states().saturating_mul(gemma.hidden_size);
        for kind in ["", "video_", "audio_"] {
            let stored = files.model.tensor_type(&format!("text_embedding_projection.{kind}aggregate_embed.weight"));
            let Some(&[_, taken]) = stored.as_ref().map(|ty| &ty.shape[..]) else { continue };
            if taken != given {
                bail!(
                    "the text encoder `{}` gives {} states of {} values, {given} in all; `{}` takes {taken}; name the Gemma that \
                     the model was trained with",
                    folder.path().display(),
                    gemma.states(),
                    gemma.hidden_size,
                    files.model.name()
                );
            }
        }
        Ok(())
    }

    /// The stages of the pipeline for this model and shape.
    fn stages(&self, shape: &Shape) -> Result<Vec<Stage>> {
        let [ft, fh, fw] = self.factors();
        // Every stage before the last has half the size of the next.
        let grid = |shrink: usize| {
            let (height, width) = (shape.height / shrink, shape.width / shrink);
            [(shape.frames - 1) / ft + 1, height / fh, width / fw].map(|n| n as u32)
        };
        let first = grid(if shape.has_two_stages() { 2 } else { 1 });
        let basis = Basis {
            generation: self.checkpoint.generation(),
            layers: self.transformer.layers,
            first_tokens: first.iter().fold(1u32, |n, &d| n.saturating_mul(d)),
            has_distilled_adapter: shape.has_distilled_adapter,
        };
        let drafts = (definition(shape.pipeline).stages)(&basis);
        let takes_distilled = drafts.iter().flat_map(|d| &d.adapters).any(|a| a.role == StageAdapter::DISTILLED);
        if shape.has_distilled_adapter && !takes_distilled {
            let name = definition(shape.pipeline).name;
            bail!("pipeline `{name}` runs the full model as it is; leave `--distilled-lora` out");
        }
        let guided = drafts.iter().any(|d| d.guidance.is_some());
        let count = drafts.len();
        let stage = |(i, draft): (usize, StageDraft)| {
            let shrink = 1 << (count - 1 - i);
            let (height, width) = (shape.height / shrink, shape.width / shrink);
            let has_video = shape.makes(Modality::Video);
            let guidance = match draft.guidance.is_some() || !guided {
                true => guidance(draft.guidance.as_ref(), &shape.sampling, &shape.modalities)?,
                false => None,
            };
            let grid = if has_video { grid(shrink) } else { [0; 3] };
            let tiles = draft.tiles.map(|tiles| TilePlan::denoise(grid.map(|n| n as usize), tiles)).transpose()?;
            let sampler = shape.sampling.sampler()?.filter(|_| i == 0).unwrap_or(draft.sampler);
            Ok(Stage {
                name: draft.name.into(),
                height: if has_video { height as u32 } else { 0 },
                width: if has_video { width as u32 } else { 0 },
                grid,
                sigmas: draft.sigmas,
                schedule: draft.schedule,
                sampler,
                guidance,
                adapters: draft.adapters,
                upsampled: draft.upsampled,
                keeps_sound: draft.keeps_sound && shape.makes(Modality::Audio),
                tiles,
                classes: Vec::new(),
            })
        };
        drafts.into_iter().enumerate().map(stage).collect()
    }

    fn spec(&self, shape: &Shape, class: &StageClass, updates: &[Modality]) -> TransformerSpec {
        let spec = |modality: Modality, tokens: usize| {
            let stream = class.stream(modality)?;
            Some(StreamSpec {
                timestep_rows: stream.rows as usize,
                has_self_mask: stream.attention,
                is_enabled: updates.contains(&modality),
                ..StreamSpec::new(tokens + stream.appended as usize, text::CONTEXT_TOKENS)
            })
        };
        TransformerSpec {
            video: spec(Modality::Video, class.grid.iter().map(|&n| n as usize).product()),
            audio: spec(Modality::Audio, self.audio_tokens(shape)),
            perturbation: Perturbation::default(),
        }
    }

    /// Number of audio latents for the length of the video, rounded half to even.
    fn audio_tokens(&self, shape: &Shape) -> usize {
        let Some((num, den)) = self.audio_vae.as_ref().map(AudioVaeConfig::latent_rate_hz) else { return 0 };
        let seconds = shape.frames as f64 / shape.frame_rate.to_f64();
        ((seconds * num as f64 / den as f64).round_ties_even() as usize).max(1)
    }

    fn pipeline(
        &self,
        files: &ModelFiles,
        shape: &Shape,
        stages: Vec<Stage>,
        inputs: Inputs,
        decode: TilePlan,
    ) -> Result<Pipeline> {
        let tokenizer = files.gemma.as_ref().map(GemmaFolder::tokenizer_json).transpose()?;
        let tokenizer = tokenizer.map(|json| (json.len() as u64, *blake3::hash(&json).as_bytes()));
        let version = self.checkpoint.model_version().unwrap_or_default();
        let definition = definition(shape.pipeline);
        let audio_vae = self.audio_vae.as_ref();
        Ok(Pipeline {
            name: definition.name.into(),
            release: shape.release,
            model: ModelInfo {
                generation: self.checkpoint.generation().name().into(),
                version: version.into(),
                synthetic: self.checkpoint.is_synthetic(),
                // Generations up to 2.3: spec/pipelines §1.1.
                image_crf: 33,
            },
            dtype: shape.dtype,
            video: VideoSettings {
                height: shape.height as u32,
                width: shape.width as u32,
                frames: shape.frames as u32,
                frame_rate: (shape.frame_rate.num(), shape.frame_rate.den()),
                channels: self.video_vae.as_ref().map_or(0, |vae| vae.latent_channels as u32),
                scale: self.factors().map(|n| n as u32),
                max_keyframes: shape.max_keyframes as u32,
            },
            audio: AudioSettings {
                tokens: self.audio_tokens(shape) as u32,
                channels: audio_vae.map_or(0, |vae| vae.token_channels() as u32),
                rate_hz: self.vocoder.as_ref().map_or(0, |vocoder| vocoder.output_rate_hz as u32),
                stage: match shape.release {
                    Release::V1_0_0 => stages.len().saturating_sub(1) as u32,
                    Release::V1_2_0 => definition.sound_stage as u32,
                },
            },
            text: TextSettings {
                buckets: tokenizer.iter().flat_map(|_| BUCKETS.map(|n| n as u32)).collect(),
                length: text::CONTEXT_TOKENS as u32,
                registers: self.connectors.registers(&self.weights, text::CONTEXT_TOKENS)? as u32,
                tokenizer: tokenizer.unwrap_or_default(),
                image: None,
            },
            stages,
            upscale: None,
            inputs,
            decode,
        })
    }
}

/// The programs of a stage for each kind of conditioning that a run may bring.
/// `index` is that of the stage, `tokens` the number of audio tokens.
fn classes(
    stage: &Stage,
    index: usize,
    shape: &Shape,
    inputs: &Inputs,
    tokens: usize,
    takes_images: bool,
) -> Vec<StageClass> {
    let [_, rows, columns] = stage.grid;
    let references = inputs.references.get(index);
    // What is kept of a clip has the timestep 0.
    let kept = u32::from(index == 0 && inputs.clip.is_some());
    // So has sound that guides; where all sound is kept there is no other.
    let guide = inputs.sound.filter(|sound| sound.role == SoundRole::Reference);
    let guides = guide.map_or(0, |sound| if index == 0 { sound.tokens() } else { tokens as u32 });
    let audio_rows = 1 + kept + u32::from(guide.is_some() && !stage.keeps_sound);
    let class = |keyframes: u32, first_frame: bool| {
        let kind = match (first_frame, keyframes) {
            (false, 0) => String::new(),
            (true, 0) => ".first".into(),
            (false, n) => format!(".key{n}"),
            (true, n) => format!(".first.key{n}"),
        };
        let video = StreamClass {
            appended: keyframes * rows * columns + references.map_or(0, |r| r.count * r.tokens()),
            // Every strength is a timestep of its own.
            rows: 1 + keyframes + first_frame as u32 + references.map_or(0, |r| r.count) + kept,
            attention: references.is_some_and(|r| r.has_attention),
        };
        let audio = StreamClass { appended: guides, rows: audio_rows, attention: false };
        let name = format!("{}{kind}", stage.name);
        StageClass {
            programs: step_programs(&name, stage, shape),
            name,
            grid: stage.grid,
            video: shape.makes(Modality::Video).then_some(video),
            audio: shape.makes(Modality::Audio).then_some(audio),
        }
    };
    if !shape.makes(Modality::Video) || !takes_images {
        return vec![class(0, false)];
    }
    let replaces = if inputs.appends_first_image { &[false][..] } else { &[false, true] };
    let keyframes = 0..=shape.max_keyframes as u32;
    keyframes
        .flat_map(|n| replaces.iter().map(move |&first_frame| (n, first_frame)))
        .map(|(n, f)| class(n, f))
        .collect()
}

/// The programs of a stage in tiles: one for every extent of a tile and of the part of a reference that it sees.
fn classes_of_tiles(
    stage: &Stage,
    tiles: &TilePlan,
    shape: &Shape,
    references: Option<&ReferenceInput>,
) -> Vec<StageClass> {
    let mut classes: Vec<StageClass> = Vec::new();
    for tile in tiles.tiles() {
        let video = StreamClass {
            appended: references.map_or(0, |r| r.count * r.tokens_of(Some(tile))),
            rows: 1 + references.map_or(0, |r| r.count),
            attention: references.is_some_and(|r| r.has_attention),
        };
        let grid = tile.map(|axis| axis.len() as u32);
        if classes.iter().any(|class| class.grid == grid && class.video == Some(video)) {
            continue;
        }
        let name = format!("{}.extent{}", stage.name, classes.len());
        let programs = step_programs(&name, stage, shape);
        classes.push(StageClass { name, grid, video: Some(video), audio: None, programs });
    }
    classes
}

/// A program that updates everything, and one for each modality that a step may skip.
fn step_programs(class: &str, stage: &Stage, shape: &Shape) -> Vec<StepProgram> {
    let passes = needed_passes(stage.guidance.as_ref(), stage.sampler);
    let all = StepProgram { name: class.into(), passes: passes.clone(), updates: shape.modalities.clone() };
    let skips = |m: &&Modality| stage.guidance.as_ref().is_some_and(|g| g.of(**m).skip_step > 0);
    let without = |skipped: &Modality| StepProgram {
        name: format!("{class}.without_{}", skipped.name()),
        passes: passes.clone(),
        updates: shape.modalities.iter().copied().filter(|m| m != skipped).collect(),
    };
    let rest = shape.modalities.iter().filter(skips).map(without).filter(|p| !p.updates.is_empty());
    std::iter::once(all).chain(rest).collect()
}
