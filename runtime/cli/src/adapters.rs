//! Adapters (LoRA) of a command: which files with which strength in which stage, and whether they fit the model.
//!
//! A file is opened and matched with the model by `ltxc_models`; the runtime gets keys and places in the file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::summary::tensors;
use ltxc_ir::plan::{ADAPTER_SLOTS, Pipeline, Plan, SoundRole, Stage, StageAdapter};
use ltxc_models::ModelError;
use ltxc_models::checkpoint::{Checkpoint, Generation, layout};
use ltxc_models::lora::{LoraFile, LoraFit, LoraTargets, Place};
use ltxc_runtime::adapters::{Adapter, AdapterMode, AdapterSet, Factor, StageAdapters, Stored};
use ltxc_runtime::pipeline::positions::ReferenceScale;
use ltxc_runtime::weights::WeightFiles;

use crate::args::{AdapterArgs, Hdr, LoraMode};
use crate::model_files::{MODEL, local};
use crate::pipelines::{Definition, takes_references};
use crate::report::{Report, remark};

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

/// Files that were opened for a plan, by their paths. Runs that share them do not bind weights anew.
pub type Opened = BTreeMap<PathBuf, Arc<Adapter>>;

/// The adapters of a run.
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
            list.push(Lora::parse("--lora", path, options, args.lora_strength)?);
        }
        if let Some((path, options)) = args.distilled_lora.split_first() {
            let is_file = |option: &&String| option.parse::<f64>().is_err() && Path::new(option.as_str()).exists();
            if let Some(second) = options.iter().find(is_file) {
                bail!("`--distilled-lora` is given as `{path}` and as `{second}`; a run has one, leave the other out");
            }
            let lora = Lora::parse("--distilled-lora", path, options, args.distilled_lora_strength)?;
            list.push(Lora { role: StageAdapter::DISTILLED, ..lora });
        }
        let distilled_strengths = [args.distilled_lora_strength_stage_1, args.distilled_lora_strength_stage_2];
        Ok(Loras { list, distilled_strengths, ignores_unmatched: args.lora_ignore_unmatched })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Whether the distilled one is among them.
    pub fn has_distilled(&self) -> bool {
        self.of_role(StageAdapter::DISTILLED).next().is_some()
    }

    /// Rank that slots for all of them need.
    pub fn rank(&self) -> usize {
        let ranks = self.list.iter().map(|lora| lora.file.modules().iter().map(|m| m.rank).max().unwrap_or(0));
        ranks.fold(0, usize::saturating_add)
    }

    /// How much coarser than the video reference videos are, which headers say.
    ///
    /// # Errors
    /// Two that say different things, or a header that says nothing sensible.
    pub fn reference_scale(&self) -> Result<ReferenceScale> {
        type Factor = fn(&LoraFile) -> Result<Option<u32>, ModelError>;
        let agreed = |what: &str, factor: Factor| -> Result<u32> {
            let mut found: Option<(&LoraFile, u32)> = None;
            for Lora { file, .. } in self.of_role(StageAdapter::USER) {
                // 1 is what headers that say nothing mean.
                let Some(value) = factor(file)?.filter(|&n| n != 1) else { continue };
                if let Some((other, earlier)) = found.filter(|(_, earlier)| *earlier != value) {
                    bail!(
                        "`{}` takes reference videos with {what} {earlier}, `{}` with {what} {value}; leave one of them out",
                        other.path().display(),
                        file.path().display()
                    );
                }
                found = Some((file, value));
            }
            Ok(found.map_or(1, |(_, value)| value))
        };
        Ok(ReferenceScale {
            space: agreed("downscale factor", LoraFile::reference_downscale)?,
            time: agreed("temporal factor", LoraFile::reference_temporal_scale)?,
        })
    }

    fn of_role<'a>(&'a self, role: &'a str) -> impl Iterator<Item = &'a Lora> {
        self.list.iter().filter(move |lora| lora.role == role)
    }

    /// What is odd about adapters for a pipeline, though nothing forbids it.
    pub fn doubts(&self, pipeline: &str) -> Vec<String> {
        let user: Vec<&Lora> = self.of_role(StageAdapter::USER).collect();
        let path = |lora: &Lora| lora.file.path().display().to_string();
        let is_known = |lora: &&Lora| lora.file.is_in_context() || lora.file.has_name_of_in_context();
        if !takes_references(pipeline) {
            let named = user.iter().filter(|lora| is_known(lora));
            let text = |lora: &&Lora| {
                format!(
                    "note: `{}` is called like a LoRA for reference videos, of which pipeline `{pipeline}` takes none",
                    path(lora)
                )
            };
            return named.map(text).collect();
        }
        match user.first() {
            Some(first) if !user.iter().any(is_known) => vec![format!(
                "note: neither header nor name says that `{}` is an IC-LoRA, and pipeline `{pipeline}` needs one: others do \
                 not know what reference videos mean",
                path(first)
            )],
            _ => Vec::new(),
        }
    }

    /// Checks that adapters agree with a pipeline, which may make a high dynamic range, and with the range that is asked for,
    /// as far as headers say.
    ///
    /// # Errors
    /// An adapter for a high dynamic range that is run without, or the other way round.
    pub fn check_range(&self, pipeline: &str, makes_hdr: bool, hdr: Option<Hdr>) -> Result<()> {
        // Elsewhere they are refused for want of reference videos.
        for lora in self.of_role(StageAdapter::USER).filter(|_| takes_references(pipeline)) {
            let path = lora.file.path().display();
            match lora.file.makes_light() {
                Some(true) if !makes_hdr && hdr.is_none() => bail!(
                    "`{path}` makes LogC3, a signal with a high dynamic range, which is no picture; choose `--pipeline \
                     hdr-ic-lora`, or pipeline `ic-lora` with `--hdr LOGC3` and a folder for EXR frames"
                ),
                Some(false) if makes_hdr => bail!(
                    "`{path}` says in its header that it makes no high dynamic range, for which pipeline `{pipeline}` is; choose \
                     another LoRA, or `--pipeline ic-lora`"
                ),
                _ => {}
            }
        }
        Ok(())
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

    /// Checks that a run of a pipeline has what it cannot do without.
    ///
    /// # Errors
    /// The adapter that is missing, or one too many.
    pub fn check_complete(&self, pipeline: &Definition) -> Result<()> {
        if !pipeline.denoises() && !self.is_empty() {
            bail!("pipeline `{}` runs no transformer that a LoRA could change; leave it out", pipeline.name);
        }
        if pipeline.needs_distilled_adapter() && !self.has_distilled() {
            bail!("{}", missing_distilled(pipeline.name));
        }
        match pipeline.brings.references {
            0 => Ok(()),
            _ => self.in_context(pipeline.name, pipeline.brings.sound).map(drop),
        }
    }

    /// The first adapter that knows what references mean. Sound that guides is known to a single one.
    fn in_context(&self, pipeline: &str, sound: Option<SoundRole>) -> Result<&Lora> {
        let mut given = self.of_role(StageAdapter::USER);
        let Some(first) = given.next() else {
            bail!("pipeline `{pipeline}` needs an IC-LoRA, which knows what references mean; name it with `--lora`");
        };
        if let (Some(SoundRole::Reference), Some(second)) = (sound, given.next()) {
            let path = second.file.path().display();
            bail!("pipeline `{pipeline}` runs with one LoRA, the one that was made for it; leave `{path}` out");
        }
        Ok(first)
    }

    /// Checks that reference videos of a plan are those that the adapters know.
    ///
    /// # Errors
    /// No adapter that knows any, or one for other sizes.
    pub fn check_references(&self, pipeline: &Pipeline) -> Result<()> {
        let Some(planned) = pipeline.inputs.references.first() else { return Ok(()) };
        let lora = self.in_context(&pipeline.name, pipeline.inputs.sound.map(|sound| sound.role))?;
        let (scale, own) =
            (ReferenceScale { space: planned.space_scale, time: planned.time_scale }, self.reference_scale()?);
        if own != scale {
            bail!(
                "the plan takes reference videos with downscale factor {} and temporal factor {}, the LoRA with {} and {}; \
                 compile the plan with `--lora {}`",
                scale.space,
                scale.time,
                own.space,
                own.time,
                lora.file.path().display()
            );
        }
        Ok(())
    }

    /// Checks that all of them fit a model and a pipeline. Returns what they change.
    ///
    /// # Errors
    /// One that was made for another model, or that the pipeline has no use for.
    pub fn fit(&self, targets: &LoraTargets, pipeline: &str) -> Result<Vec<LoraFit>> {
        let fits = self.list.iter().map(|lora| {
            if lora.file.is_in_context() && !takes_references(pipeline) {
                bail!(
                    "`{}` is an IC-LoRA, which needs reference videos; pipeline `{pipeline}` takes none, choose another LoRA",
                    lora.file.path().display()
                );
            }
            Ok(lora.file.fit(targets, self.ignores_unmatched)?)
        });
        fits.collect()
    }

    /// All of them, to become part of the weights of `targets` for good, and the keys of these.
    ///
    /// # Errors
    /// One that does not fit, or is for certain stages.
    pub fn merged_into(&self, targets: &LoraTargets, report: &mut Report) -> Result<(AdapterSet, BTreeSet<String>)> {
        let (mut members, mut keys) = (Vec::new(), BTreeSet::new());
        for lora in &self.list {
            if lora.stages.is_some() {
                bail!(
                    "`--lora {}` is for certain stages, and a merged weight acts in all; leave `stage=…` out",
                    lora.file.path().display()
                );
            }
            let fit = lora.file.fit(targets, self.ignores_unmatched)?;
            report.note(&lora.summary(&fit, &[Some(lora.strength)], &Pipeline::default()));
            keys.extend(fit.factors.iter().map(|factor| factor.key.clone()));
            members.push((opened_adapter(&lora.file, fit)?, lora.strength as f32));
        }
        Ok((AdapterSet::new(members, AdapterMode::Merged), keys))
    }

    /// The adapters of every stage of a plan, given what [`Loras::fit`] found, and a line about each of them.
    ///
    /// # Errors
    /// A stage that the pipeline does not have, an adapter that it has no use for or lacks, or a file that changed.
    pub fn stages(
        &self,
        fits: Vec<LoraFit>,
        pipeline: &Pipeline,
        mode: AdapterMode,
        opened: &mut Opened,
    ) -> Result<(StageAdapters, Vec<String>)> {
        self.check_roles(pipeline)?;
        let (mut acting, mut notes) = (Vec::new(), self.doubts(&pipeline.name));
        for (lora, fit) in self.list.iter().zip(fits) {
            let strengths = self.strengths(lora, pipeline);
            notes.push(lora.summary(&fit, &strengths, pipeline));
            let adapter = match opened.get(lora.file.path()) {
                Some(adapter) => adapter.clone(),
                None => opened.entry(lora.file.path().into()).or_insert(opened_adapter(&lora.file, fit)?).clone(),
            };
            acting.push((lora, strengths, adapter));
        }
        let mut adapters = StageAdapters::default();
        for (i, stage) in pipeline.stages.iter().enumerate() {
            let members = stage.adapters.iter().flat_map(|planned| {
                let of_role = acting.iter().filter(|(lora, ..)| planned.role == lora.role);
                of_role.filter_map(|(_, strengths, adapter)| Some((adapter.clone(), strengths[i]? as f32)))
            });
            adapters.set(&stage.name, AdapterSet::new(members.collect(), mode));
        }
        Ok((adapters, notes))
    }

    /// The strength with which an adapter acts in every stage of a pipeline, if it does.
    fn strengths(&self, lora: &Lora, pipeline: &Pipeline) -> Vec<Option<f64>> {
        let of_stage = |(i, stage): (usize, &Stage)| {
            let planned = stage.adapters.iter().find(|adapter| lora.acts_in(i, &adapter.role))?;
            let own = self.distilled_strengths.get(i).copied().flatten();
            let own = own.filter(|_| lora.role == StageAdapter::DISTILLED);
            Some(own.or(planned.strength).unwrap_or(lora.strength))
        };
        pipeline.stages.iter().enumerate().map(of_stage).collect()
    }

    /// Checks that the stages have a use for every adapter, and all that they need.
    fn check_roles(&self, pipeline: &Pipeline) -> Result<()> {
        let name = &pipeline.name;
        let takes = |stage: &Stage, role: &str| stage.adapters.iter().any(|a| a.role == role);
        let has_role = |role: &str| pipeline.stages.iter().any(|stage| takes(stage, role));
        for lora in &self.list {
            let (path, count) = (lora.file.path().display(), pipeline.stages.len());
            if !has_role(lora.role) {
                bail!("pipeline `{name}` of this model has no use for `{path}` as {} LoRA; leave it out", lora.role);
            }
            if let Some(stage) = lora.stages.iter().flatten().find(|&&stage| stage > count) {
                bail!("`--lora {path}` is for stage {stage}, pipeline `{name}` has {count}");
            }
            let acts = |(i, stage): (usize, &Stage)| takes(stage, lora.role) && lora.acts_in(i, lora.role);
            if !pipeline.stages.iter().enumerate().any(acts) {
                bail!("`--lora {path}` is for stages of pipeline `{name}` that take no LoRA; leave `stage=…` out");
            }
        }
        if has_role(StageAdapter::DISTILLED) && !self.has_distilled() {
            bail!("{}", missing_distilled(name));
        }
        Ok(())
    }
}

/// The factors of a file that fit a model, as the runtime takes them.
///
/// # Errors
/// A file that has changed since it was opened.
pub(crate) fn opened_adapter(file: &LoraFile, fit: LoraFit) -> Result<Arc<Adapter>> {
    let stored = |place: Place| Stored { offset: place.offset, dtype: place.dtype };
    let factors = fit.factors.into_iter().map(|f| {
        let (down, up) = (stored(f.down), stored(f.up));
        (f.key, Factor { rank: f.rank, inputs: f.inputs, outputs: f.outputs, down, up, scale: f.scale })
    });
    Ok(Arc::new(Adapter::open(file.path(), factors)?))
}

fn missing_distilled(pipeline: &str) -> String {
    format!("pipeline `{pipeline}` needs the distilled LoRA of its model; name it with `--distilled-lora`")
}

impl Lora {
    /// `flag` is for messages; `usual` is the strength of LoRAs without one of their own.
    fn parse(flag: &str, path: &str, options: &[String], usual: Option<f64>) -> Result<Lora> {
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
        Ok(Lora { file, role: StageAdapter::USER, strength: strength.or(usual).unwrap_or(1.0), stages })
    }

    /// Whether it acts in the stage with this index, as `role`.
    fn acts_in(&self, index: usize, role: &str) -> bool {
        self.role == role && self.stages.as_ref().is_none_or(|stages| stages.contains(&(index + 1)))
    }

    /// One line about it: layers, what it is multiplied by, and where that is not the same.
    fn summary(&self, fit: &LoraFit, strengths: &[Option<f64>], pipeline: &Pipeline) -> String {
        let scales: Vec<f64> = fit.factors.iter().map(|f| f.scale).collect();
        let (least, most) = scales.iter().fold((f64::MAX, f64::MIN), |(a, b), &s| (a.min(s), b.max(s)));
        let alpha = if least == most { format!("{least}") } else { format!("{least} to {most}") };
        let left = match fit.unmatched.len() {
            0 => String::new(),
            n => format!(", {n} of its keys left out"),
        };
        let mut acting = pipeline.stages.iter().zip(strengths).filter_map(|(stage, s)| Some((&stage.name, (*s)?)));
        let strength = match strengths {
            [Some(first), rest @ ..] if rest.iter().all(|s| *s == Some(*first)) => first.to_string(),
            _ => acting.by_ref().map(|(stage, s)| format!("{s} in {stage}")).collect::<Vec<_>>().join(" and "),
        };
        format!(
            "LoRA {}: {} layers, strength {strength}, alpha/rank {alpha}{left}",
            self.file.path().display(),
            fit.factors.len(),
        )
    }
}

fn strength_of(named: &str, text: &str) -> Result<f64> {
    let strength: Option<f64> = text.parse().ok().filter(|s: &f64| s.is_finite());
    let strength = strength.with_context(|| format!("{named}: strength `{text}` is not a number"))?;
    if strength.abs() > USUAL_STRENGTH {
        remark(&format!("note: {named} has the strength {strength}, beyond {USUAL_STRENGTH}"));
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
