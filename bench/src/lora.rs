//! What it takes to switch a LoRA: one that is computed beside the layers, against one that is merged into the weights.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use ltxc::args::{ModelArgs, PipelineName, ShapeArgs};
use ltxc::compile::compile;
use ltxc::job::Shape;
use ltxc::model_files::ModelFiles;
use ltxc_compiler::Options;
use ltxc_ir::plan::{ADAPTER_SLOTS, Plan, summary};
use ltxc_models::lora::{LoraFile, LoraTargets, Place};
use ltxc_models::synth::{Preset, synth};
use ltxc_runtime::adapters::{Adapter, AdapterMode, AdapterSet, Factor, Stored};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::weights::WeightFiles;
use safetensors::tensor::{Dtype, TensorView};

use crate::block::Findings;
use crate::measure::{Sample, alternate, sample};
use crate::report::{Row, figure};

/// Rank of the LoRA.
const RANK: usize = 8;

/// Seconds that are aimed at.
const GOAL_SECONDS: f64 = 0.1;

static NEVER: AtomicBool = AtomicBool::new(false);

/// Switches between strengths of a LoRA on every linear layer of the tiny model, `rounds` times each way, in turns.
/// `folder` takes the files.
///
/// # Errors
/// A plan that cannot be compiled or run.
pub fn run(rounds: usize, folder: &Path) -> Result<Findings> {
    let model = synth(Preset::Tiny, folder, 0)?;
    let args =
        ModelArgs { checkpoint_path: Some(model.checkpoint), gemma_root: Some(model.gemma), ..ModelArgs::default() };
    let files = ModelFiles::open(&args, false)?;
    let path = folder.join("lora.safetensors");
    let layers = write_lora(&files, &path)?;
    let adapter = adapter(&files, &path)?;
    let (slotted, plain) = (plan(&files, RANK as u32)?, plan(&files, 0)?);
    let folders = [folder.to_path_buf()];
    let (slotted_weights, plain_weights) =
        (WeightFiles::open(&slotted, &folders, false)?, WeightFiles::open(&plain, &folders, false)?);
    let mut live = Switch::new(&slotted, &slotted_weights, &adapter, AdapterMode::Live)?;
    let mut merged = Switch::new(&plain, &plain_weights, &adapter, AdapterMode::Merged)?;
    let turns = alternate(rounds, || live.run(), Some(&mut || merged.run()))?;
    let slots = slotted.sources.iter().position(|s| s.name == ADAPTER_SLOTS).context("the plan has slots")? as u32;
    let bytes: usize =
        summary::tensors(&slotted).iter().filter(|((s, _), _)| *s == slots).map(|(_, ty)| ty.bytes()).sum();
    let rows = vec![Row::turns(format!("switch a LoRA of rank {RANK}, tiny model"), turns).at_most(GOAL_SECONDS)];
    let notes = vec![format!(
        "{layers} layers; live, {} MB of slots are written and no weight; merged, weights are bound anew",
        figure(bytes as f64 / 1e6)
    )];
    Ok(Findings { rows, tables: Vec::new(), notes })
}

/// Writes a LoRA with small random numbers for every linear layer of the transformer. Returns how many there are.
fn write_lora(files: &ModelFiles, path: &Path) -> Result<usize> {
    const PREFIX: &str = "model.diffusion_model.transformer_blocks.";
    let mut state = 1u32;
    let mut numbers = |n: usize| -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1u32 << 24) as f32 * 0.1 - 0.05
        };
        (0..n).flat_map(|_| next().to_le_bytes()).collect()
    };
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (key, at) in files.model.tensors() {
        let layer =
            key.strip_prefix("model.").filter(|_| key.starts_with(PREFIX)).and_then(|k| k.strip_suffix(".weight"));
        let (Some(layer), &[outputs, inputs]) = (layer, &at.stored.shape[..]) else { continue };
        tensors.insert(format!("{layer}.lora_A.weight"), (vec![RANK, inputs], numbers(RANK * inputs)));
        tensors.insert(format!("{layer}.lora_B.weight"), (vec![outputs, RANK], numbers(outputs * RANK)));
    }
    ensure!(!tensors.is_empty(), "the model has no linear layers");
    let views =
        tensors.iter().map(|(key, (shape, bytes))| Ok((key, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(views, None::<HashMap<String, String>>)?;
    std::fs::write(path, bytes).with_context(|| format!("`{}`", path.display()))?;
    Ok(tensors.len() / 2)
}

fn adapter(files: &ModelFiles, path: &Path) -> Result<Arc<Adapter>> {
    let file = LoraFile::open(path)?;
    let stored = |p: Place| Stored { offset: p.offset, dtype: p.dtype };
    let factors = file.fit(&LoraTargets::of(&files.model), false)?.factors.into_iter().map(|f| {
        let (rank, inputs, outputs) = (f.rank, f.inputs, f.outputs);
        (f.key, Factor { rank, inputs, outputs, down: stored(f.down), up: stored(f.up), scale: f.scale })
    });
    Ok(Arc::new(Adapter::open(path, factors)?))
}

fn plan(files: &ModelFiles, rank: u32) -> Result<Plan> {
    let shape = ShapeArgs {
        pipeline: Some(PipelineName::DistilledOneStage),
        height: Some(128),
        width: Some(192),
        num_frames: Some(17),
        lora_rank: Some(rank),
        ..ShapeArgs::default()
    };
    compile(files, &Shape::resolve(&shape, 0)?, Options::default(), &mut |_, _, _| {})
}

/// Programs of a stage that go from one strength to the other, until they can run again.
struct Switch<'p> {
    executor: Executor<'p>,
    programs: Vec<&'p str>,
    sets: [AdapterSet; 2],
    next: usize,
}

impl<'p> Switch<'p> {
    fn new(plan: &'p Plan, weights: &'p WeightFiles, adapter: &Arc<Adapter>, mode: AdapterMode) -> Result<Switch<'p>> {
        let group = plan.groups.iter().position(|g| g.name == "stage1").context("the plan has a stage")?;
        let programs = plan.programs.iter().filter(|p| p.group as usize == group).map(|p| p.name.as_str()).collect();
        let sets = [1.0, 0.5].map(|strength| AdapterSet::new(vec![(adapter.clone(), strength)], mode));
        Ok(Switch { executor: Executor::new(plan, weights, &NEVER)?, programs, sets, next: 0 })
    }

    fn run(&mut self) -> Result<Sample> {
        let set = self.sets[self.next].clone();
        self.next = 1 - self.next;
        sample(|| {
            self.executor.set_adapters(set)?;
            self.programs.iter().try_for_each(|program| Ok(self.executor.load(program)?))
        })
    }
}
