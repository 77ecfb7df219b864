//! The kernel calls of full-size models, and what they launch on a GPU that is not there.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use ltxc::args::{ModelArgs, PipelineName, Precision, ShapeArgs};
use ltxc::compile::compile;
use ltxc::job::Shape;
use ltxc::model_files::ModelFiles;
use ltxc_compiler::Options;
use ltxc_ir::plan::{KernelCall, Plan, Step, Target};
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::cube::{CubeTensor, Schedule};
use ltxc_models::synth::{Preset, synth};

use crate::recorder::{Generation, Launch, Recorder, Source};
use crate::targets::Gpu;

/// Plans of the full-size models for the two-stage pipeline at 512×768, 121 frames, with activations in f32, in bf16 and in f16
/// (where the text encoder stays in f32). Those of LTX-2 in bf16 also write prompts anew after a look at an image, and encode
/// a clip with its sound.
///
/// # Panics
/// If a model cannot be written or compiled.
pub fn plans(target: &Target) -> Vec<Plan> {
    [Preset::Ltx2, Preset::Ltx23].into_iter().flat_map(|preset| plans_of(preset, target)).collect()
}

fn plans_of(preset: Preset, target: &Target) -> Vec<Plan> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = synth(preset, folder.path(), 0).expect("a sparse model takes no space");
    let args = ModelArgs {
        checkpoint_path: Some(model.checkpoint),
        gemma_root: Some(model.gemma),
        spatial_upsampler_path: model.upsamplers.first().cloned(),
        ..ModelArgs::default()
    };
    let files = ModelFiles::open(&args, true).expect("the model opens");
    let has_all = preset == Preset::Ltx2;
    let plan = |pipeline, dtype| {
        let shape = ShapeArgs {
            height: Some(512),
            width: Some(768),
            num_frames: Some(121),
            dtype: Some(dtype),
            pipeline: Some(pipeline),
            enhance_prompt: has_all && dtype == Precision::Bf16,
            ..Default::default()
        };
        let shape = Shape { target: target.clone(), ..Shape::resolve(&shape, 0).expect("a shape that runs") };
        compile(&files, &shape, Options::default(), &mut |_, _, _| {}).expect("the model compiles")
    };
    let mut plans =
        [Precision::F32, Precision::Bf16, Precision::F16].map(|dtype| plan(PipelineName::Distilled, dtype)).to_vec();
    plans.extend(has_all.then(|| plan(PipelineName::Retake, Precision::Bf16)));
    plans
}

/// The calls of plans that differ in what they compute or in types.
pub fn distinct_calls(plans: &[Plan]) -> Vec<&KernelCall> {
    let steps = plans.iter().flat_map(|plan| &plan.functions).flat_map(|function| &function.steps);
    let calls = steps.filter_map(|step| match step {
        Step::Kernel(call) => Some(call),
        Step::Call(_) => None,
    });
    let mut seen = HashSet::new();
    calls.filter(|call| seen.insert((&call.work, types(&call.args), types(&call.results)))).collect()
}

fn types(operands: &[ltxc_ir::plan::Operand]) -> Vec<&TensorType> {
    operands.iter().map(|operand| &operand.ty).collect()
}

/// The call as a report names it: what is computed, of which types.
pub fn name(call: &KernelCall) -> String {
    let list = |types: Vec<&TensorType>| types.iter().map(|ty| ty.to_string()).collect::<Vec<_>>().join(" ");
    format!("{} {} → {}", call.work.name(), list(types(&call.args)), list(types(&call.results)))
}

/// A kernel with everything that launches it.
pub struct Kernel {
    /// Its text.
    pub source: Arc<Source>,
    /// Calls that launch it.
    pub calls: usize,
    /// The first of them.
    pub example: String,
}

/// What calls launch on a GPU.
#[derive(Default)]
pub struct Recording {
    /// Kernels of distinct text, in the order in which they are first launched. CubeCL declares variables in any order, so
    /// texts of the same lines are the same.
    pub kernels: Vec<Kernel>,
    /// What is wrong, in words.
    pub problems: Vec<String>,
}

/// Launches every call once on a device of `generation`, and checks each launch against the limits of the device.
pub fn record<G: Gpu>(generation: u16, calls: &[&KernelCall]) -> Recording {
    let client = Recorder::<G>::client(&Generation(generation));
    let mut recording = Recording::default();
    let mut places: BTreeMap<Vec<String>, usize> = BTreeMap::new();
    for call in calls {
        let name = name(call);
        let mut problem = |what: String| recording.problems.push(format!("{name}: {what}"));
        let launches = match launch(&client, call) {
            Ok(launches) => launches,
            Err(error) => {
                problem(error);
                continue;
            }
        };
        if launches.is_empty() {
            problem("nothing is launched".into());
        }
        let mut here = HashSet::new();
        for launch in launches {
            let source = match &launch.source {
                Ok(source) => source,
                Err(error) => {
                    problem(error.clone());
                    continue;
                }
            };
            check(&client, &launch, source).into_iter().for_each(&mut problem);
            let mut lines: Vec<String> = source.text.lines().map(Into::into).collect();
            lines.sort();
            let place = *places.entry(lines).or_insert_with(|| {
                recording.kernels.push(Kernel { source: source.clone(), calls: 0, example: name.clone() });
                recording.kernels.len() - 1
            });
            if here.insert(place) {
                recording.kernels[place].calls += 1;
            }
        }
    }
    recording
}

/// Launches a call on memory of the right sizes that is not there.
fn launch<G: Gpu>(client: &ComputeClient<Recorder<G>>, call: &KernelCall) -> Result<Vec<Launch>, String> {
    let memory = |bytes: usize| client.empty(bytes.max(1).next_multiple_of(Target::DEVICE_ALIGNMENT as usize));
    let tensor = |ty| CubeTensor { ty, handle: memory(ty.bytes()) };
    let (arg_types, result_types) = (types(&call.args), types(&call.results));
    let args: Vec<CubeTensor<'_>> = arg_types.iter().copied().map(tensor).collect();
    let results: Vec<CubeTensor<'_>> = result_types.iter().copied().map(tensor).collect();
    let schedule = Schedule::new(&call.work, &arg_types, &result_types)?;
    let scratch = TensorType::new(DType::U8, [schedule.workspace_bytes()]);
    let workspace = CubeTensor { ty: &scratch, handle: memory(scratch.bytes()) };
    schedule.launch(client, &args, &results, Some(&workspace))?;
    cubecl::future::block_on(client.sync()).map_err(|e| format!("{e:?}"))?;
    Ok(client.info().take())
}

/// Arguments of a CUDA kernel that every driver takes.
const ARGUMENT_BYTES: u64 = 4096;

/// What a device would refuse.
fn check<G: Gpu>(client: &ComputeClient<Recorder<G>>, launch: &Launch, source: &Source) -> Vec<String> {
    let limits = &client.properties().hardware;
    let mut problems = Vec::new();
    let mut limit = |what: &str, value: u64, most: u64| {
        if value > most {
            problems.push(format!("`{}` has {value} {what}, the device at most {most}", source.name));
        }
    };
    limit("bytes of shared memory", source.shared_bytes as u64, limits.max_shared_memory_size as u64);
    limit("buffers", launch.buffers.len() as u64, u64::from(limits.max_bindings));
    limit("bytes of arguments", 8 * (launch.buffers.len() + launch.info.len()) as u64, ARGUMENT_BYTES);
    let units = source.cube_dim.iter().map(|&n| u64::from(n)).product();
    limit("units in a cube", units, u64::from(limits.max_units_per_cube));
    let (x, y, z) = limits.max_cube_dim;
    source.cube_dim.iter().zip([x, y, z]).for_each(|(&n, most)| limit("units on an axis", n.into(), most.into()));
    let (x, y, z) = limits.max_cube_count;
    for (n, most) in launch.cubes.unwrap_or_default().into_iter().zip([x, y, z]) {
        limit("cubes on an axis", n.into(), most.into());
    }
    match launch.cubes {
        Some(cubes) if cubes.contains(&0) || units == 0 => problems.push(format!("`{}` runs no unit", source.name)),
        Some(_) => {}
        None => problems.push(format!("the device counts the cubes of `{}`", source.name)),
    }
    if !source.text.contains(&source.name) {
        problems.push(format!("`{}` is not in its own source", source.name));
    }
    problems
}
