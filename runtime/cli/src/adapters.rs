//! Adapters (LoRA) of a command: which files with which strength in which stage, and whether they fit the model.
//!
//! A file is opened and matched with the model by `ltxc_models`; the runtime gets keys and places in the file.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::summary::tensors;
use ltxc_ir::plan::{ADAPTER_SLOTS, Pipeline, Plan};
use ltxc_models::checkpoint::{Generation, layout};
use ltxc_models::lora::{LoraFile, LoraFit, LoraTargets, Place};
use ltxc_runtime::adapters::{Adapter, AdapterMode, AdapterSet, Factor, StageAdapters, Stored};
use ltxc_runtime::weights::WeightFiles;

use crate::args::{AdapterArgs, LoraMode};
use crate::assemble::{MODEL, local};
use crate::report::Report;

/// Strengths beyond this are possible, but hardly ever meant.
const USUAL_STRENGTH: f32 = 2.0;

/// A LoRA as given on the command line, opened.
pub struct Lora {
    file: LoraFile,
    strength: f32,
    /// Numbers of the stages, from 1; `None` for those that the pipeline chooses.
    stages: Option<Vec<usize>>,
}

/// The adapters of a command.
pub struct Loras {
    list: Vec<Lora>,
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
            list.push(Lora::parse(path, options)?);
        }
        Ok(Loras { list, ignores_unmatched: args.lora_ignore_unmatched })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
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
    /// A stage that the pipeline does not have, or a file that changed.
    pub fn stages(
        &self,
        fits: Vec<LoraFit>,
        pipeline: &Pipeline,
        mode: AdapterMode,
        report: &mut Report,
    ) -> Result<StageAdapters> {
        let mut members = vec![Vec::new(); pipeline.stages.len()];
        for (lora, fit) in self.list.iter().zip(fits) {
            let path = lora.file.path();
            report.note(&lora.summary(&fit));
            let stored = |place: Place| Stored { offset: place.offset, dtype: place.dtype };
            let factors = fit.factors.into_iter().map(|f| {
                let (down, up) = (stored(f.down), stored(f.up));
                (f.key, Factor { rank: f.rank, inputs: f.inputs, outputs: f.outputs, down, up, scale: f.scale })
            });
            let adapter = Arc::new(Adapter::open(path, factors)?);
            let stages = lora.stages.clone().unwrap_or_else(|| (1..=members.len()).collect());
            for stage in stages {
                let Some(of_stage) = stage.checked_sub(1).and_then(|i| members.get_mut(i)) else {
                    bail!(
                        "`--lora {}` is for stage {stage}, pipeline `{}` has {}",
                        path.display(),
                        pipeline.name,
                        pipeline.stages.len()
                    );
                };
                of_stage.push((adapter.clone(), lora.strength));
            }
        }
        let mut adapters = StageAdapters::default();
        for (stage, members) in pipeline.stages.iter().zip(members) {
            adapters.set(&stage.name, AdapterSet::new(members, mode));
        }
        Ok(adapters)
    }
}

/// Pipelines that take reference videos.
const REFERENCES: [&str; 1] = ["ic-lora"];

impl Lora {
    fn parse(path: &str, options: &[String]) -> Result<Lora> {
        let (mut strength, mut stages) = (None, None);
        for option in options {
            match option.strip_prefix("stage=") {
                Some(list) if stages.is_none() => {
                    let numbers = list.split(',').map(|n| n.trim().parse::<usize>().ok().filter(|&n| n > 0));
                    let numbers: Option<Vec<usize>> = numbers.collect();
                    let numbers = numbers.with_context(|| {
                        format!("`--lora {path}`: `{option}` does not name stages; write `stage=1`, `stage=2` or `stage=1,2`")
                    })?;
                    stages = Some(numbers);
                }
                None if strength.is_none() => strength = Some(strength_of(path, option)?),
                _ => bail!("`--lora {path}`: `{option}` is one value too many; expected PATH [STRENGTH] [stage=1,2]"),
            }
        }
        Ok(Lora { file: LoraFile::open(&local(Path::new(path))?)?, strength: strength.unwrap_or(1.0), stages })
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

fn strength_of(path: &str, text: &str) -> Result<f32> {
    let strength: Option<f32> = text.parse().ok().filter(|s: &f32| s.is_finite());
    let strength = strength.with_context(|| format!("`--lora {path}`: strength `{text}` is not a number"))?;
    if strength.abs() > USUAL_STRENGTH {
        eprintln!("note: `--lora {path}` has the strength {strength}, beyond {USUAL_STRENGTH}");
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
