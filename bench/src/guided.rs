//! What guidance costs: a step with four passes in one program, against a step with one.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use ltxc::args::{ModelArgs, PipelineName, ShapeArgs};
use ltxc::bench::inputs::write_inputs;
use ltxc::compile::compile;
use ltxc::job::Shape;
use ltxc::model_files::ModelFiles;
use ltxc_compiler::Options;
use ltxc_ir::Rate;
use ltxc_ir::plan::summary::function_costs;
use ltxc_ir::plan::{Plan, Program};
use ltxc_models::synth::{Preset, synth};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::weights::WeightFiles;

use crate::block::Findings;
use crate::measure::{Sample, alternate, sample};
use crate::report::{Row, figure};

/// Height, width and frames of the videos: so many tokens that arithmetic counts, and few enough for a small machine.
const SIZES: [[u32; 3]; 2] = [[256, 384, 33], [512, 768, 33]];

/// Four steps, and what guidance itself takes.
const GOAL: f64 = 4.05;

static NEVER: AtomicBool = AtomicBool::new(false);

/// Measures steps of the tiny model, `rounds` times each, in turns. `folder` takes the model.
///
/// # Errors
/// A plan that cannot be compiled or run.
pub fn run(rounds: usize, folder: &Path) -> Result<Findings> {
    let model = synth(Preset::Tiny, folder, 0)?;
    let args =
        ModelArgs { checkpoint_path: Some(model.checkpoint), gemma_root: Some(model.gemma), ..ModelArgs::default() };
    let mut findings = Findings { rows: Vec::new(), tables: Vec::new(), notes: Vec::new() };
    for size @ [height, width, frames] in SIZES {
        let plan = |pipeline| plan(&args, pipeline, size);
        let (guided, single) = (plan(PipelineName::OneStage)?, plan(PipelineName::DistilledOneStage)?);
        let folders = [folder.to_path_buf()];
        let weights = [&guided, &single].map(|plan| WeightFiles::open(plan, &folders, false));
        let [guided_weights, single_weights] = weights;
        let (guided_weights, single_weights) = (guided_weights?, single_weights?);
        let (mut four, mut one) = (Step::new(&guided, &guided_weights)?, Step::new(&single, &single_weights)?);
        ensure!((four.passes, one.passes) == (4, 1), "steps of {} and {} passes", four.passes, one.passes);
        let costs = [(&guided, &four), (&single, &one)].map(|(plan, step)| {
            let cost = function_costs(plan).swap_remove(step.program.function as usize);
            [cost.flops, cost.bytes, step.program.arena_bytes.iter().sum()].map(|n| n as f64)
        });
        let turns = alternate(rounds, || four.run(), Some(&mut || one.run()))?;
        let what = format!("a step with four passes, {height}×{width}, {frames} frames");
        findings.rows.push(Row::turns(what, turns).ratio_at_most(GOAL));
        let [flops, bytes, arena] = [0, 1, 2].map(|i| figure(costs[0][i] / costs[1][i]));
        findings.notes.push(format!(
            "{height}×{width}, {frames} frames: {flops} times the operations, {bytes} times the bytes, {arena} of the arena"
        ));
    }
    Ok(findings)
}

fn plan(args: &ModelArgs, pipeline: PipelineName, [height, width, frames]: [u32; 3]) -> Result<Plan> {
    let shape = ShapeArgs {
        pipeline: Some(pipeline),
        height: Some(height),
        width: Some(width),
        num_frames: Some(frames),
        ..ShapeArgs::default()
    };
    let files = ModelFiles::open(args, false)?;
    compile(&files, &Shape::resolve(&shape, 0)?, Options::default(), &mut |_, _, _| {})
}

/// The step program of the first stage, ready to run.
struct Step<'p> {
    executor: Executor<'p>,
    program: &'p Program,
    passes: usize,
}

impl<'p> Step<'p> {
    fn new(plan: &'p Plan, weights: &'p WeightFiles) -> Result<Step<'p>> {
        let class = plan.pipeline.stages.first().and_then(|s| s.classes.first()).context("the plan has a stage")?;
        let program = plan.program(&class.name).context("the stage has a program")?;
        let mut executor = Executor::new(plan, weights, &NEVER)?;
        for slow in plan.programs.iter().filter(|p| p.group == program.group && p.rate != Rate::Step) {
            write_inputs(&mut executor, slow)?;
            executor.run(&slow.name)?;
        }
        let passes = class.programs.first().map_or(0, |p| p.passes.len());
        Ok(Step { executor, program, passes })
    }

    fn run(&mut self) -> Result<Sample> {
        write_inputs(&mut self.executor, self.program)?;
        sample(|| Ok(self.executor.run(&self.program.name)?))
    }
}
