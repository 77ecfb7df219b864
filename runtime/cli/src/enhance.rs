//! Prompt enhancement: what is compiled for it, what the text encoder is told, and `ltxc enhance`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::DType;
use ltxc_ir::plan::{ImageTokens, Pipeline, Plan, Target, TextSettings};
use ltxc_models::checkpoint::GemmaFolder;
use ltxc_models::text::{self, GemmaConfig, VisionConfig, generate};
use ltxc_models::{ModelError, Weights};
use ltxc_runtime::backend::open;
use ltxc_runtime::executor::Executor;
use ltxc_runtime::media::image_input::load_image;
use ltxc_runtime::memory::{MemoryNeed, available};
use ltxc_runtime::pipeline::enhance::{DECODE, GROUP, PREFILL, PREFILL_IMAGE, SEE, can_enhance, can_see, enhance};
use ltxc_runtime::tokenizer::Tokenizer;
use ltxc_runtime::weights::WeightFiles;
use serde_json::json;

use crate::args::{ContentArgs, EnhanceArgs};
use crate::assemble::ProgramSource;
use crate::compile::version;
use crate::content;
use crate::job::pick;
use crate::model_files::{GEMMA, gemma_source, local};
use crate::report::Report;
use crate::run::INTERRUPT;

/// Tokens that are read at once; a multiple of 8, as texts are padded in the reference.
const PIECE: usize = 128;

/// Tokens of instructions, prompt and answer together, without an image: three times as many as a short prompt needs.
const SLOTS: usize = 2048;

/// What is not free to be chosen where the reference has no seed for it.
///
/// Source: spec/pipelines §9.
const FIXED_SEED: u64 = 42;

/// How a Gemma sees an image, if it can.
///
/// # Errors
/// Configurations with something that is missing, malformed or not supported.
pub fn vision(gemma: &GemmaFolder, weights: &Weights<'_>) -> Result<Option<VisionConfig>, ModelError> {
    if !VisionConfig::is_in(gemma.config(), weights) {
        return Ok(None);
    }
    VisionConfig::from_json(gemma.config(), gemma.preprocessor_config()?.as_ref()).map(Some)
}

/// Token ids of images, as a plan has them.
pub fn image_tokens(vision: &VisionConfig) -> ImageTokens {
    // Ids are at most 2^20.
    let [begin, soft, end] = vision.token_ids.map(|id| id as u32);
    ImageTokens { begin, soft, end }
}

/// The programs of prompt enhancement, all of one group; with `vision` an image can have a part in it.
///
/// # Errors
/// A Gemma that cannot write, and weights that are missing or do not fit.
pub fn programs(
    config: &GemmaConfig,
    vision: Option<&VisionConfig>,
    weights: &Weights<'_>,
    dtype: DType,
) -> Result<Vec<ProgramSource>, ModelError> {
    let image = vision.map(VisionConfig::soft_tokens);
    let slots = SLOTS + image.unwrap_or(0);
    let read = |tokens: usize, image: Option<usize>| generate(config, weights, [tokens, slots], image, dtype);
    let mut modules = vec![(PREFILL, read(PIECE, None)?)];
    if let Some(vision) = vision {
        modules.push((SEE, text::see(vision, weights, config.hidden_size, dtype)?));
        // Wherever an image begins in a piece, it ends in this many tokens.
        modules.push((PREFILL_IMAGE, read(PIECE + vision.soft_tokens(), image)?));
    }
    modules.push((DECODE, read(1, None)?));
    let program = |(name, module): (&str, _)| ProgramSource { group: GROUP.into(), name: name.into(), module };
    Ok(modules.into_iter().map(program).collect())
}

/// Refuses a plan that was compiled without prompt enhancement, and prompts that are encoded already.
///
/// # Errors
/// What to do instead.
pub fn check(plan: &Plan, content: &ContentArgs) -> Result<()> {
    if let Some(path) = &content.embeddings {
        bail!("`{}` holds an encoded prompt, which cannot be enhanced; leave `--enhance-prompt` out", path.display());
    }
    if !can_enhance(plan) {
        bail!("the plan was compiled without `--enhance-prompt`; compile it with that flag, or leave it out here");
    }
    Ok(())
}

/// The seed of enhancement in a run of `pipeline` with `seed`.
pub fn seed_of(pipeline: &str, seed: u64) -> u64 {
    match pipeline {
        "distilled" | "distilled-one-stage" | "a2v" => FIXED_SEED,
        _ => seed,
    }
}

/// What the text encoder is told about the beginning of the video.
#[derive(Clone, Copy)]
pub enum Beginning<'a> {
    /// Nothing.
    Open,
    /// It is an image that the text encoder is not shown.
    Unseen,
    /// It is this image.
    Image(&'a Path),
}

/// The prompt that the text encoder writes for what the user said, and whether it has seen an image.
///
/// # Errors
/// Those of [`enhance()`], and an image that cannot be read.
pub fn enhanced(
    executor: &mut Executor<'_>,
    tokenizer: &Tokenizer,
    said: &str,
    beginning: Beginning<'_>,
    seed: u64,
    report: &mut Report,
) -> Result<(String, bool)> {
    let image = match beginning {
        Beginning::Image(path) if can_see(executor.plan()) => Some((path, load_image(path)?)),
        Beginning::Image(_) => {
            report.note("note: the text encoder has no vision tower; prompt enhancement reads the prompt alone");
            None
        }
        Beginning::Open | Beginning::Unseen => None,
    };
    let (instructions, label) = match (beginning, &image) {
        // As the reference labels prompts.
        (Beginning::Open, _) => (include_str!("enhance/text_to_video.txt"), format!("user prompt: {said}")),
        (_, None) => (include_str!("enhance/image_unseen.txt"), format!("User Raw Input Prompt: {said}.")),
        (_, Some(_)) => (include_str!("enhance/image_to_video.txt"), format!("User Raw Input Prompt: {said}.")),
    };
    if let Some((path, _)) = &image {
        report.note(&format!("enhancement: looks at `{}`", path.display()));
    }
    let has_seen = image.is_some();
    let image = image.as_ref().map(|(_, image)| image);
    let written = enhance(executor, tokenizer, instructions.trim_end(), &label, image, seed, report)?;
    if written.is_empty() {
        report.note("note: the text encoder wrote no words; the prompt stays as it is");
        return Ok((said.into(), false));
    }
    Ok((written, has_seen))
}

/// `ltxc enhance`.
///
/// # Errors
/// A text encoder that cannot write, an image that cannot be read, or a device that cannot run it.
pub fn run(args: &EnhanceArgs, json: bool, report: &mut Report) -> Result<()> {
    let said = content::text(&args.prompt)?;
    let beginning = match &args.image {
        Some(path) => Beginning::Image(path),
        None if args.image_to_video => Beginning::Unseen,
        None => Beginning::Open,
    };
    if let Some(path) = &args.image {
        // What cannot be read is known before anything is compiled.
        load_image(path)?;
    }
    let gemma = GemmaFolder::open(&local(&args.gemma_root)?)?;
    let device = pick(&args.device, None)?;
    let plan = plan(&gemma, args.image.is_some(), device.target.clone())?;
    let paths: Vec<_> = gemma.files().iter().map(|file| file.path().to_path_buf()).collect();
    let weights = WeightFiles::open(&plan, &paths, false)?;
    MemoryNeed::of(&plan, rayon::current_num_threads()).check(available())?;
    let tokenizer = gemma.tokenizer_path();
    let folder = tokenizer.as_ref().and_then(|path| path.parent());
    let tokenizer = Tokenizer::from_folder(folder.context("the text encoder has no tokenizer beside it")?)?;
    let mut executor = Executor::on(open(&device)?, &plan, &weights, &INTERRUPT)?;
    let seed = content::seed(&args.seed)?;
    let (written, has_seen) = enhanced(&mut executor, &tokenizer, &said, beginning, seed, report)?;
    report.end();
    match json {
        true => println!("{}", json!({"event": "done", "prompt": written, "seed": seed, "saw_image": has_seen})),
        false => println!("{written}"),
    }
    Ok(())
}

/// A plan with these programs alone.
fn plan(gemma: &GemmaFolder, takes_image: bool, target: Target) -> Result<Plan> {
    let config = GemmaConfig::from_json(gemma.config())?;
    let weights = Weights::new(GEMMA, gemma);
    let vision = if takes_image { vision(gemma, &weights)? } else { None };
    let programs = programs(&config, vision.as_ref(), &weights, DType::F32)?;
    let mut builder = PlanBuilder::new(&version(), target, Options::default(), vec![gemma_source(gemma, false)?]);
    for ProgramSource { group, name, module } in &programs {
        for entry in &module.entries {
            builder.add(group, name, module, entry)?;
        }
    }
    let text = TextSettings { image: vision.as_ref().map(image_tokens), ..TextSettings::default() };
    Ok(builder.finish(Pipeline { text, ..Pipeline::default() })?)
}
