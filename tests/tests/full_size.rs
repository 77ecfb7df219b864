//! Plans of the published sizes: how small they are, and what their blocks still move when everything is fused.

use std::collections::BTreeSet;

use ltxc::args::{ModelArgs, Precision, ShapeArgs};
use ltxc::compile::compile;
use ltxc::job::Shape;
use ltxc::model_files::ModelFiles;
use ltxc_compiler::{Fuse, Options};
use ltxc_ir::TensorType;
use ltxc_ir::plan::{Kernel, KernelCall, Operand, Plan, PlanFunction, Step, Target, Work, container};
use ltxc_kernels::cube::Schedule;
use ltxc_kernels::fusion::elementwise_bytes;
use ltxc_models::synth::{Preset, synth};

/// What a plan is made for.
struct For {
    size: [u32; 2],
    dtype: Precision,
    /// Images behind the first one.
    keyframes: usize,
    fuse: Fuse,
    target: Target,
    packs_projections: Option<bool>,
}

/// A video of 512×768 on CUDA, in f32.
fn usual() -> For {
    For {
        size: [512, 768],
        dtype: Precision::F32,
        keyframes: 0,
        fuse: Fuse::Full,
        target: Target::cuda(),
        packs_projections: None,
    }
}

/// A plan for the two-stage pipeline and 121 frames.
fn plan(preset: Preset, what: For) -> Plan {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = synth(preset, folder.path(), 0).expect("a sparse model takes no space");
    let args = ModelArgs {
        checkpoint_path: Some(model.checkpoint),
        gemma_root: Some(model.gemma),
        spatial_upsampler_path: model.upsamplers.iter().find(|p| p.to_string_lossy().contains("spatial")).cloned(),
        ..ModelArgs::default()
    };
    let files = ModelFiles::open(&args, true).expect("the model opens");
    let For { size: [height, width], dtype, keyframes, fuse, target, packs_projections } = what;
    let (height, width, num_frames) = (Some(height), Some(width), Some(121));
    let shape = ShapeArgs { height, width, num_frames, dtype: Some(dtype), ..ShapeArgs::default() };
    let shape = Shape::resolve(&shape, keyframes).expect("a shape that runs");
    let shape = Shape { target, ..shape };
    let options = Options { fuse, packs_projections, ..Options::default() };
    compile(&files, &shape, options, &mut |_, _, _| {}).expect("the model compiles")
}

fn calls(function: &PlanFunction) -> impl Iterator<Item = &KernelCall> {
    function.steps.iter().filter_map(|step| match step {
        Step::Kernel(call) => Some(call),
        Step::Call(_) => None,
    })
}

/// Passes over the video tokens that a block makes besides operands and results of products and attention, for each
/// function that is a block of a stage.
fn passes(plan: &Plan) -> Vec<(String, f64)> {
    let blocks = plan.functions.iter().filter(|f| f.name.starts_with("stage") && f.name.contains("/block"));
    let passes = blocks.filter_map(|function| {
        // The residual stream is what it takes and gives; text keys and values have functions of their own.
        let stream = function.results.iter().max_by_key(|ty| ty.bytes()).filter(|_| function.results.len() == 2)?;
        let bytes: u64 = calls(function).map(elementwise_bytes).sum();
        Some((function.name.clone(), bytes as f64 / stream.bytes() as f64))
    });
    passes.collect()
}

#[test]
fn blocks_make_few_passes_over_their_tokens() {
    for preset in [Preset::Ltx2, Preset::Ltx23] {
        for (dtype, keyframes) in [(Precision::F32, 0), (Precision::Bf16, 0), (Precision::Bf16, 1)] {
            let plan = plan(preset, For { dtype, keyframes, ..usual() });
            let bytes = container::encode(&plan).expect("a plan").len();
            let found = passes(&plan);
            println!("{} {dtype:?}, {keyframes} keyframes: {bytes} bytes, {found:.1?}", preset.name());
            assert!(bytes < 1_000_000, "{bytes} bytes");
            let stages: BTreeSet<&str> = found.iter().filter_map(|(name, _)| name.split('/').next()).collect();
            assert!(stages.contains("stage1") && stages.contains("stage2"), "{stages:?}");
            for (name, passes) in &found {
                assert!(*passes > 5.0 && *passes < 20.0, "{name} makes {passes:.1} passes");
            }
        }
    }
}

#[test]
fn fusion_saves_most_of_what_is_not_a_product() {
    for preset in [Preset::Ltx2, Preset::Ltx23] {
        let [full, composite] = [Fuse::Full, Fuse::Composite].map(|fuse| plan(preset, For { fuse, ..usual() }));
        let elementwise = |plan: &Plan| -> u64 {
            let blocks = plan.functions.iter().filter(|f| f.name.starts_with("stage2/block"));
            blocks.flat_map(calls).map(elementwise_bytes).sum()
        };
        let saved = 1.0 - elementwise(&full) as f64 / elementwise(&composite) as f64;
        println!("{}: {:.0} % of the elementwise bytes of a block are saved", preset.name(), 100.0 * saved);
        assert!(saved >= 0.8, "{saved}");
    }
}

/// Kernels that a call launches on a GPU, and copies in it that store what a product computes.
fn launches(call: &KernelCall) -> (usize, usize) {
    let types = |operands: &[Operand]| operands.iter().map(|o| o.ty.clone()).collect::<Vec<TensorType>>();
    let (args, results) = (types(&call.args), types(&call.results));
    let schedule = Schedule::new(&call.work, &args.iter().collect::<Vec<_>>(), &results.iter().collect::<Vec<_>>());
    let copies = match &call.work {
        Work::Fused(fused) => fused.parts.iter().filter(|part| matches!(part.kernel, Kernel::Copy(_))).count(),
        Work::Kernel(_) => 0,
    };
    (schedule.expect("the plan is verified").launches(), copies)
}

/// Depth-to-space with its residual is how the convolutions of the decoder store, also in words of two elements.
#[test]
fn decoders_launch_no_copies_behind_convolutions() {
    for preset in [Preset::Ltx2, Preset::Ltx23] {
        for dtype in [Precision::F32, Precision::Bf16] {
            let plan = plan(preset, For { dtype, ..usual() });
            let decoders = || plan.functions.iter().filter(|f| f.name.starts_with("decode.")).flat_map(calls);
            let all: Vec<(usize, usize)> = decoders().map(launches).collect();
            let (total, copies) = all.iter().fold((0, 0), |(a, b), (launches, copies)| (a + launches, b + copies));
            println!("{} {dtype:?}: {} calls with {copies} copies are {total} launches", preset.name(), all.len());
            assert!(copies > 2 && total < all.len() + copies, "{all:?}");
            assert!(all.iter().all(|&(launches, copies)| copies == 0 || launches == 1), "{all:?}");
        }
    }
}

/// Queries, keys and values of a GPU are one product that stores three tensors, in one launch.
#[test]
fn projections_of_one_activation_are_one_launch() {
    for preset in [Preset::Ltx2, Preset::Ltx23] {
        let [packed, apart] = [None, Some(false)].map(|packs_projections| {
            let plan = plan(preset, For { dtype: Precision::Bf16, packs_projections, ..usual() });
            let blocks = plan.functions.iter().filter(|f| f.name.starts_with("stage1/block")).flat_map(calls);
            let blocks: Vec<KernelCall> = blocks.cloned().collect();
            let split = blocks.iter().filter(|call| call.results.len() > 2 && launches(call).1 > 2).count();
            let launched: usize = blocks.iter().map(|call| launches(call).0).sum();
            let bytes: u64 = blocks.iter().map(|call| call.bytes).sum();
            println!("{}: {split} split products, {launched} launches, {} MB", preset.name(), bytes / 1_000_000);
            assert!(blocks.iter().map(launches).all(|(launches, copies)| copies == 0 || launches == 1));
            (split, launched, bytes)
        });
        assert!(packed.0 > 0 && apart.0 == 0, "{packed:?} {apart:?}");
        assert!(packed.1 < apart.1 && packed.2 < apart.2, "{packed:?} {apart:?}");
    }
}

/// Systems with a watchdog reset a GPU that does not come back.
#[test]
fn no_call_keeps_a_watched_gpu_for_long() {
    for preset in [Preset::Ltx2, Preset::Ltx23] {
        let large = |target| For { size: [1088, 1920], dtype: Precision::Bf16, target, ..usual() };
        let most = |plan: &Plan| plan.functions.iter().flat_map(calls).map(|call| call.flops).max().unwrap_or(0);
        let limit = Target::wgpu().max_call_flops();
        assert!(most(&plan(preset, large(Target::cuda()))) > 10 * limit);
        let watched = plan(preset, large(Target::metal()));
        let bytes = container::encode(&watched).expect("a plan").len();
        println!("{}: {} GFLOP at once, {bytes} bytes", preset.name(), most(&watched) / 1_000_000_000);
        assert!(most(&watched) <= limit && bytes < 1_000_000, "{} FLOP, {bytes} bytes", most(&watched));
    }
}
