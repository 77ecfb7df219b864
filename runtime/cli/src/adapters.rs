//! Adapters (LoRA) of a command: which files with which strength in which stage, and whether they fit the model.
//!
//! A file is opened and matched with the model by `ltxc_models`; the runtime gets keys and places in the file.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::summary::tensors;
use ltxc_ir::plan::{ADAPTER_SLOTS, Pipeline, Plan, StageAdapter};
use ltxc_models::checkpoint::{Checkpoint, Generation, layout};
use ltxc_models::lora::{LoraFile, LoraFit, LoraTargets, Place};
use ltxc_runtime::adapters::{Adapter, AdapterMode, AdapterSet, Factor, StageAdapters, Stored};
use ltxc_runtime::weights::WeightFiles;

use crate::args::{AdapterArgs, LoraMode};
use crate::assemble::{MODEL, local};
use crate::report::Report;

/// Strengths beyond this are possible, but hardly ever meant.
const USUAL_STRENGTH: f64 = 2.0;

/// A LoRA as given on the command line, opened.
struct Lora {
    file: LoraFile,
    /// What it is for, as in [`StageAdapter::role`].
    role: &'static str,
    strength: f64,
    /// Numbers of the stages, from 1; `None` for those that the pipeline chooses.
    stages: Option<Vec<usize>>,
}

/// The adapters of a command.
pub struct Loras {
    list: Vec<Lora>,
    /// Strengths of the distilled one, stage by stage.
    distilled_strengths: [Option<f64>; 2],
    ignores_unmatched: bool,
}

impl Loras {
    /// Opens what `args` names; `occurrences` says how many values each `--lora` had.
    ///
    /// # Errors
    /// Values that are no strength or stage, or a file that is no LoRA.
    pub fn open(args: &AdapterArgs, occurrences: &[usize]) -> Result<Loras> {
        let mut rest = &args.lora[..];
        let mut list = Vec::new();
        for &n in occurrences {
            let (this, others) = rest.split_at(n.min(rest.len()));
            rest = others;
            let Some((path, options)) = this.split_first() else { continue };
            list.push(Lora::parse("--lora", path, options)?);
        }
        if let Some((path, options)) = args.distilled_lora.split_first() {
            let lora = Lora::parse("--distilled-lora", path, options)?;
            list.push(Lora { role: StageAdapter::DISTILLED, ..lora });
        }
        let distilled_strengths = [args.distilled_lora_strength_stage_1, args.distilled_lora_strength_stage_2];
        Ok(Loras { list, distilled_strengths, ignores_unmatched: args.lora_ignore_unmatched })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// As [`Loras::fit`] for a checkpoint, before anything is compiled for it.
    ///
    /// # Errors
    /// As for [`Loras::fit`].
    pub fn check(&self, checkpoint: &Checkpoint, pipeline: &str) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        self.fit(&LoraTargets::of(checkpoint), pipeline).map(drop)
    }

    /// Checks that all of them fit a model and a pipeline. Returns what they change.
    ///
    /// # Errors
    /// One that was made for another model, or that the pipeline has no use for.
    pub fn fit(&self, targets: &LoraTargets, pipeline: &str) -> Result<Vec<LoraFit>> {
        let fits = self.list.iter().map(|lora| {
            if lora.file.is_in_context() && !REFERENCES.contains(&pipeline) {
                bail!(
                    "`{}` is an IC-LoRA, which needs reference videos; pipeline `{pipeline}` takes none, choose another LoRA",
                    lora.file.path().display()
                );
            }
            Ok(lora.file.fit(targets, self.ignores_unmatched)?)
        });
        fits.collect()
    }

    /// The adapters of every stage of a plan, given what [`Loras::fit`] found.
    ///
    /// # Errors
    /// A stage that the pipeline does not have, an adapter that it has no use for or lacks, or a file that changed.
    pub fn stages(
        &self,
        fits: Vec<LoraFit>,
        pipeline: &Pipeline,
        mode: AdapterMode,
        report: &mut Report,
    ) -> Result<StageAdapters> {
        let mut opened = Vec::new();
        for (lora, fit) in self.list.iter().zip(fits) {
            report.note(&lora.summary(&fit));
            let stored = |place: Place| Stored { offset: place.offset, dtype: place.dtype };
            let factors = fit.factors.into_iter().map(|f| {
                let (down, up) = (stored(f.down), stored(f.up));
                (f.key, Factor { rank: f.rank, inputs: f.inputs, outputs: f.outputs, down, up, scale: f.scale })
            });
            opened.push((lora, Arc::new(Adapter::open(lora.file.path(), factors)?)));
        }
        self.check_roles(pipeline)?;
        let mut adapters = StageAdapters::default();
        for (i, stage) in pipeline.stages.iter().enumerate() {
            let mut members = Vec::new();
            for of_stage in &stage.adapters {
                for (lora, adapter) in opened.iter().filter(|(lora, _)| lora.acts_in(i, &of_stage.role)) {
                    let own = self.distilled_strengths.get(i).copied().flatten();
                    let own = own.filter(|_| of_stage.role == StageAdapter::DISTILLED);
                    let strength = own.or(of_stage.strength).unwrap_or(lora.strength);
                    members.push((adapter.clone(), strength as f32));
                }
            }
            adapters.set(&stage.name, AdapterSet::new(members, mode));
        }
        Ok(adapters)
    }

    /// Checks that the stages have a use for every adapter, and all that they need.
    fn check_roles(&self, pipeline: &Pipeline) -> Result<()> {
        let name = &pipeline.name;
        let has_role = |role: &str| pipeline.stages.iter().any(|s| s.adapters.iter().any(|a| a.role == role));
        for lora in &self.list {
            let (path, count) = (lora.file.path().display(), pipeline.stages.len());
            if !has_role(lora.role) {
                bail!("pipeline `{name}` of this model has no use for `{path}` as {} LoRA; leave it out", lora.role);
            }
            if let Some(stage) = lora.stages.iter().flatten().find(|&&stage| stage > count) {
                bail!("`--lora {path}` is for stage {stage}, pipeline `{name}` has {count}");
            }
        }
        if has_role(StageAdapter::DISTILLED) && !self.list.iter().any(|lora| lora.role == StageAdapter::DISTILLED) {
            bail!("pipeline `{name}` needs the distilled LoRA of its model; name it with `--distilled-lora`");
        }
        Ok(())
    }
}

/// Pipelines that take reference videos.
const REFERENCES: [&str; 1] = ["ic-lora"];

impl Lora {
    /// `flag` is for messages.
    fn parse(flag: &str, path: &str, options: &[String]) -> Result<Lora> {
        let named = format!("`{flag} {path}`");
        let (mut strength, mut stages) = (None, None);
        for option in options {
            match option.strip_prefix("stage=") {
                Some(list) if stages.is_none() && flag == "--lora" => {
                    let numbers = list.split(',').map(|n| n.trim().parse::<usize>().ok().filter(|&n| n > 0));
                    let numbers: Option<Vec<usize>> = numbers.collect();
                    stages = Some(numbers.with_context(|| {
                        format!("{named}: `{option}` does not name stages; write `stage=1`, `stage=2` or `stage=1,2`")
                    })?);
                }
                None if strength.is_none() => strength = Some(strength_of(&named, option)?),
                _ => bail!(
                    "{named}: `{option}` is one value too many; expected PATH, STRENGTH and for `--lora` stage=1,2"
                ),
            }
        }
        let file = LoraFile::open(&local(Path::new(path))?)?;
        Ok(Lora { file, role: StageAdapter::USER, strength: strength.unwrap_or(1.0), stages })
    }

    /// Whether it acts in the stage with this index, as `role`.
    fn acts_in(&self, index: usize, role: &str) -> bool {
        self.role == role && self.stages.as_ref().is_none_or(|stages| stages.contains(&(index + 1)))
    }

    fn summary(&self, fit: &LoraFit) -> String {
        let scales: Vec<f64> = fit.factors.iter().map(|f| f.scale).collect();
        let (least, most) = scales.iter().fold((f64::MAX, f64::MIN), |(a, b), &s| (a.min(s), b.max(s)));
        let alpha = if least == most { format!("{least}") } else { format!("{least} to {most}") };
        let left = match fit.unmatched.len() {
            0 => String::new(),
            n => format!(", {n} of its keys left out"),
        };
        format!(
            "LoRA {}: {} layers, strength {}, alpha/rank {alpha}{left}",
            self.file.path().display(),
            fit.factors.len(),
            self.strength
        )
    }
}

fn strength_of(named: &str, text: &str) -> Result<f64> {
    let strength: Option<f64> = text.parse().ok().filter(|s: &f64| s.is_finite());
    let strength = strength.with_context(|| format!("{named}: strength `{text}` is not a number"))?;
    if strength.abs() > USUAL_STRENGTH {
        eprintln!("note: {named} has the strength {strength}, beyond {USUAL_STRENGTH}");
    }
    Ok(strength)
}

/// What LoRAs may change in the model that a plan was compiled for: all that its programs read, and all that else is in its
/// weight files.
///
/// # Errors
/// A plan of a generation that does not exist.
pub fn targets(plan: &Plan, weights: &WeightFiles) -> Result<LoraTargets> {
    let model = &plan.pipeline.model;
    let generation = Generation::from_name(&model.generation);
    let generation = generation.with_context(|| format!("the plan is for `{}`, which is unknown", model.generation))?;
    let source = plan.sources.iter().position(|s| s.name == MODEL);
    let in_files = source
        .map(|source| weights.tensors(source))
        .into_iter()
        .flatten()
        .filter_map(|(key, ty)| Some((layout::canonical(key, None)?.1, ty.clone())));
    let read = tensors(plan).into_iter().filter(|((s, _), _)| Some(*s as usize) == source);
    let read = read.map(|((_, key), ty)| (key, ty.clone()));
    let paths = source.map(|source| weights.paths_of(source)).unwrap_or_default();
    let name = paths.first().map_or(String::from(MODEL), |path| path.display().to_string());
    Ok(LoraTargets::new(name, generation, in_files.chain(read)))
}

/// How adapters act in a plan: as asked, or live where it has slots.
pub fn mode(asked: Option<LoraMode>, plan: &Plan) -> AdapterMode {
    let has_slots = plan.sources.iter().any(|s| s.name == ADAPTER_SLOTS);
    match asked {
        Some(LoraMode::Live) => AdapterMode::Live,
        None if has_slots => AdapterMode::Live,
        Some(LoraMode::Merged) | None => AdapterMode::Merged,
    }
}
