//! What one run chooses beside its plan: content, sampling, adapters and noise.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ArgMatches;
use clap::parser::ValueSource;
use ltxc_ir::plan::{Plan, Stage};
use ltxc_runtime::noise_files;
use ltxc_runtime::pipeline::{StageChoice, tile_name};

use crate::adapters::Loras;
use crate::args::{ContentArgs, OutputArgs, RunAdapterArgs, RunArgs, SamplingArgs, ShapeArgs};
use crate::job::{Shape, pick};
use crate::pipelines::{definition, levels, refuse_idle, stage_choice};
use crate::{content, inputs};

/// Which flags were given, and how many values each occurrence had of those that take several and can be repeated.
#[derive(Clone, Debug, Default)]
pub struct Occurrences {
    /// Of `--image`.
    pub image: Vec<usize>,
    /// Of `--video-conditioning`.
    pub reference: Vec<usize>,
    /// Of `--lora`.
    pub lora: Vec<usize>,
    /// Ids of all flags that are given.
    pub given: Vec<String>,
}

impl Occurrences {
    /// Those of a parsed command.
    pub fn of(matches: &ArgMatches) -> Occurrences {
        // Not every command has all of them.
        let count = |flag: &str| {
            let found = matches.try_get_occurrences::<String>(flag).ok().flatten();
            found.map(|occurrences| occurrences.map(Iterator::count).collect()).unwrap_or_default()
        };
        let ids = matches.ids().map(|id| id.as_str());
        let given = ids.filter(|id| matches.value_source(id) == Some(ValueSource::CommandLine)).map(String::from);
        Occurrences {
            image: count("image"),
            reference: count("video_conditioning"),
            lora: count("lora"),
            given: given.collect(),
        }
    }
}

/// What one run chooses.
#[derive(Clone, Copy)]
pub struct Choice<'a> {
    /// Prompt, images and so on.
    pub content: &'a ContentArgs,
    /// Sampling and guidance.
    pub sampling: &'a SamplingArgs,
    /// LoRAs.
    pub adapters: &'a RunAdapterArgs,
    /// Of the flags in `content` and `adapters`.
    pub occurrences: &'a Occurrences,
    /// How to write.
    pub writing: &'a OutputArgs,
}

impl Choice<'_> {
    /// Opens its LoRAs.
    ///
    /// # Errors
    /// Values that are no strength or stage, or a file that is no LoRA.
    pub fn loras(&self) -> Result<Loras> {
        Loras::open(&self.adapters.adapters, &self.occurrences.lora)
    }

    /// The shape of a plan for it; `None` where the command names a plan.
    ///
    /// # Errors
    /// Values of flags that no plan could have, media that the pipeline does not take or that cannot be read, or LoRAs that
    /// are missing.
    pub fn shape(&self, args: &RunArgs, loras: &Loras) -> Result<Option<Shape>> {
        let (content, occurrences) = (self.content, self.occurrences);
        let images = content::images(content, &occurrences.image)?;
        let has_attention =
            inputs::attention_strength(content)?.is_some() || !content.conditioning_attention_mask.is_empty();
        if args.plan.is_some() {
            return Ok(None);
        }
        let pipeline = args.shape.pipeline.unwrap_or_default();
        inputs::check_given(pipeline, content)?;
        refuse_idle(definition(pipeline), &occurrences.given, self.sampling)?;
        if !args.model.names_model() {
            bail!(
                "there is nothing to run; name a plan made by `ltxc compile`, or model files from `--checkpoint-path` on"
            );
        }
        let named = definition(pipeline);
        loras.check_complete(named)?;
        loras.check_range(named.name, named.brings.pads_references, content.hdr)?;
        let references = u32::try_from(occurrences.reference.len()).ok().filter(|&n| n > 0);
        let given = ShapeArgs {
            reference_count: args.shape.reference_count.or(references),
            reference_attention: args.shape.reference_attention || has_attention,
            ..args.shape.clone()
        };
        let (given, reference_seconds) = inputs::shape_of_media(&given, content, loras.reference_scale()?.space)?;
        let appended = images.iter().filter(|image| named.brings.appends_first_image || image.frame != Some(0)).count();
        let mut shape = Shape::resolve(&given, appended)?.with(loras)?;
        shape.target = pick(&args.shape.device, None)?.target;
        shape.reference_seconds = reference_seconds;
        shape.references.frames = inputs::shortest(content, occurrences, shape.frame_rate)?;
        Ok(Some(shape))
    }

    /// What the flags change in the stages of a plan.
    ///
    /// # Errors
    /// Sampling that a stage cannot have, or flags for a stage that the plan has not.
    pub fn stages(&self, plan: &Plan) -> Result<BTreeMap<String, StageChoice>> {
        let content = self.content;
        let Some(first) = plan.pipeline.stages.first() else { return Ok(BTreeMap::new()) };
        let modalities = plan.pipeline.modalities();
        let steps = content.num_inference_steps;
        let mut first_choice = stage_choice(first, &modalities, self.sampling, steps, content.sigmas.as_deref())?;
        if let Some(table) = &content.guidance_table {
            let planned = first_choice.guidance.as_ref().or(first.guidance.as_ref());
            first_choice.levels = levels(table, planned, &modalities)?;
        }
        let mut out = BTreeMap::from([(first.name.clone(), first_choice)]);
        if let Some(list) = &content.sigmas_stage2 {
            out.insert("stage2".into(), StageChoice { sigmas: Some(list.clone()), ..StageChoice::default() });
        }
        if let Some(steps) = content.steps_stage2 {
            let second =
                plan.pipeline.stages.get(1).context("`--steps-stage2`: the plan has one stage; leave it out")?;
            let own = SamplingArgs::default();
            let choice = stage_choice(second, &modalities, &own, Some(steps), None).context("`--steps-stage2`")?;
            out.insert(second.name.clone(), choice);
        }
        Ok(out)
    }

    /// Files of noise by slot: those that are named, or those of the bundle for all that the plan makes.
    ///
    /// # Errors
    /// A folder that cannot be made, or one file for a stage that runs in tiles.
    pub fn noise_files(&self, plan: &Plan) -> Result<BTreeMap<String, PathBuf>> {
        let content = self.content;
        if let Some(folder) = &content.noise_bundle {
            let stages = plan.pipeline.stages.iter();
            let made = plan.pipeline.modalities();
            let names = |stage: &Stage| -> Vec<String> {
                match &stage.tiles {
                    Some(tiles) => (0..tiles.len()).map(|i| tile_name(&stage.name, i)).collect(),
                    None => vec![stage.name.clone()],
                }
            };
            let slots = stages.flat_map(names).flat_map(|s| made.iter().map(move |m| format!("{s}.{}", m.name())));
            std::fs::create_dir_all(folder).with_context(|| format!("`{}`", folder.display()))?;
            return Ok(slots.map(|slot| (slot.clone(), noise_files::in_folder(folder, &slot))).collect());
        }
        let slots = [
            ("stage1.video", &content.ltx2_initial_latent_path),
            ("stage1.audio", &content.ltx2_audio_latent_path),
            ("stage2.video", &content.ltx2_refine_noise_path),
            ("stage2.audio", &content.ltx2_refine_audio_noise_path),
        ];
        let slots: BTreeMap<String, PathBuf> =
            slots.into_iter().filter_map(|(slot, path)| Some((slot.to_string(), path.clone()?))).collect();
        for stage in plan.pipeline.stages.iter().filter(|stage| stage.tiles.is_some()) {
            if let Some(path) = slots.iter().find_map(|(slot, path)| slot.starts_with(&stage.name).then_some(path)) {
                bail!(
                    "{} runs in tiles, each with noise of its own; give `--noise-bundle` instead of `{}`",
                    stage.name,
                    path.display()
                );
            }
        }
        Ok(slots)
    }
}
