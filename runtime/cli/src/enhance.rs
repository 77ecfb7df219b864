//! Prompt enhancement: what is compiled for it, what the text encoder is told, and `ltxc enhance`.

use anyhow::{Context, Result, bail};
use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::DType;
use ltxc_ir::plan::{Pipeline, Plan, Target};
use ltxc_models::checkpoint::GemmaFolder;
use ltxc_models::text::{GemmaConfig, generate};
use ltxc_models::{ModelError, Weights};
use ltxc_runtime::backend::open;
use ltxc_runtime::executor::Executor;
use ltxc_runtime::memory::{MemoryNeed, available};
use ltxc_runtime::pipeline::enhance::{DECODE, GROUP, PREFILL, can_enhance, enhance};
use ltxc_runtime::tokenizer::Tokenizer;
use ltxc_runtime::weights::WeightFiles;
use serde_json::json;

use crate::args::{ContentArgs, EnhanceArgs};
use crate::assemble::{GEMMA, ProgramSource, gemma_source, local};
use crate::compile::version;
use crate::job::{self, pick};
use crate::report::Report;
use crate::run::INTERRUPT;

/// Tokens that are read at once; a multiple of 8, as texts are padded in the reference.
const PIECE: usize = 128;

/// Tokens of instructions, prompt and answer together: three times as many as a short prompt needs.
const SLOTS: usize = 2048;

/// What is not free to be chosen where the reference has no seed for it.
///
/// Source: spec/pipelines §9.
const FIXED_SEED: u64 = 42;

/// The programs of prompt enhancement, all of one group.
pub fn programs(config: &GemmaConfig, weights: &Weights<'_>, dtype: DType) -> Result<Vec<ProgramSource>, ModelError> {
    let program = |(name, tokens): (&str, usize)| {
        let module = generate(config, weights, tokens, SLOTS, dtype)?;
        Ok(ProgramSource { group: GROUP.into(), name: name.into(), module })
    };
    [(PREFILL, PIECE), (DECODE, 1)].into_iter().map(program).collect()
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

/// The prompt that the text encoder writes for what the user said.
///
/// # Errors
/// Those of [`enhance()`].
pub fn enhanced(
    executor: &mut Executor<'_>,
    tokenizer: &Tokenizer,
    said: &str,
    has_image: bool,
    seed: u64,
    report: &mut Report,
) -> Result<String> {
    let (instructions, label) = match has_image {
        // As the reference labels prompts.
        false => (include_str!("enhance/text_to_video.txt"), format!("user prompt: {said}")),
        true => (include_str!("enhance/image_to_video.txt"), format!("User Raw Input Prompt: {said}.")),
    };
    if has_image {
        report.note("note: prompt enhancement reads the prompt alone; it does not look at images");
    }
    let written = enhance(executor, tokenizer, instructions.trim_end(), &label, seed, report)?;
    if written.is_empty() {
        report.note("note: the text encoder wrote no words; the prompt stays as it is");
        return Ok(said.into());
    }
    Ok(written)
}

/// `ltxc enhance`.
///
/// # Errors
/// A text encoder that cannot write, or a device that cannot run it.
pub fn run(args: &EnhanceArgs, json: bool, report: &mut Report) -> Result<()> {
    let said = job::text(&args.prompt)?;
    let gemma = GemmaFolder::open(&local(&args.gemma_root)?)?;
    let device = pick(&args.device, None)?;
    let plan = plan(&gemma, device.target.clone())?;
    let paths: Vec<_> = gemma.files().iter().map(|file| file.path().to_path_buf()).collect();
    let weights = WeightFiles::open(&plan, &paths, false)?;
    MemoryNeed::of(&plan, rayon::current_num_threads()).check(available())?;
    let tokenizer = gemma.tokenizer_path();
    let folder = tokenizer.as_ref().and_then(|path| path.parent());
    let tokenizer = Tokenizer::from_folder(folder.context("the text encoder has no tokenizer beside it")?)?;
    let mut executor = Executor::on(open(&device)?, &plan, &weights, &INTERRUPT)?;
    let seed = job::seed(&args.seed)?;
    let written = enhanced(&mut executor, &tokenizer, &said, args.image_to_video, seed, report)?;
    report.end();
    match json {
        true => println!("{}", json!({"event": "done", "prompt": written, "seed": seed})),
        false => println!("{written}"),
    }
    Ok(())
}

/// A plan with these programs alone.
fn plan(gemma: &GemmaFolder, target: Target) -> Result<Plan> {
    let config = GemmaConfig::from_json(gemma.config())?;
    let programs = programs(&config, &Weights::new(GEMMA, gemma), DType::F32)?;
    let mut builder = PlanBuilder::new(&version(), target, Options::default(), vec![gemma_source(gemma, false)?]);
    for ProgramSource { group, name, module } in &programs {
        for entry in &module.entries {
            builder.add(group, name, module, entry)?;
        }
    }
    Ok(builder.finish(Pipeline::default())?)
}
