//! Guided runs: several passes per step, of which some modality may skip some.

use ltxc::args::PipelineName;
pub use ltxc::debug::parity::runs::sampling;
use ltxc::pipelines::stage_choice;
use ltxc_ir::plan::Modality;
use ltxc_ir::plan::summary::function_costs;
use ltxc_models::transformer::{Stream, TransformerConfig};
use ltxc_runtime::tokenizer::CONTEXT_TOKENS;
use ltxc_tests::fixtures::TensorFile;

use super::*;

/// The recorded runs, with their pipelines.
const RUNS: [(&str, &str, PipelineName); 5] = [
    ("ltx2", "one_stage", PipelineName::OneStage),
    ("ltx23", "one_stage", PipelineName::OneStage),
    ("ltx23", "one_stage_i2v_skip", PipelineName::OneStage),
    ("ltx2", "two_stages_i2v", PipelineName::TwoStage),
    ("ltx23", "two_stages_hq", PipelineName::HighQuality),
];

#[test]
fn guided_runs() {
    for (family, name, pipeline) in RUNS {
        check_guided(Case::new(family, name), pipeline);
    }
}

#[test]
fn guided_runs_of_the_first_release() {
    for (family, name, pipeline) in RUNS {
        Case::new(family, name).of_first_release().into_iter().for_each(|case| check_guided(case, pipeline));
    }
}

#[test]
fn guided_runs_on_a_gpu() {
    let Some(device) = gpu() else { return };
    let model = Files { device, ..Files::of("ltx23") };
    check_guided_on(&model, Case::new("ltx23", "one_stage_i2v_skip"), PipelineName::OneStage);
}

#[track_caller]
fn check_guided(case: Case, pipeline: PipelineName) {
    check_guided_on(&Files::of(case.family), case, pipeline);
}

#[track_caller]
fn check_guided_on(model: &Files, case: Case, pipeline: PipelineName) {
    let mut recorded = case.recorded();
    let params = recorded.meta()["params"].clone();
    let images = images(&params);
    let sampling = sampling(&params);
    let loras = model.loras(&params);
    let shape = ShapeArgs { pipeline: Some(pipeline), sampling: sampling.clone(), ..case.shape() };
    let plan = model.compile_for(&shape, images.iter().filter(|i| i.frame > 0).count(), &loras);
    let [prompt, negative] = ["prompt", "negative_prompt"].map(|key| params[key].as_str().expect("a prompt"));
    let steps = params["num_inference_steps"].as_u64().map(|n| n as usize);
    let first = &plan.pipeline.stages[0];
    let choice = stage_choice(first, &Modality::BOTH, &sampling, steps, None).unwrap_or_else(|e| panic!("{e:#}"));
    let mut noise = recorded_noise(&recorded, &plan);
    plan.pipeline.stages.iter().for_each(|s| noise.extend(fresh_noise(&mut recorded, &s.name)));
    let request = Request {
        negative_prompt: negative,
        stages: BTreeMap::from([(first.name.clone(), choice)]),
        adapters: model.stage_adapters(&plan, &loras),
        ..request(prompt, &images, noise)
    };
    let result = model.run(&plan, &request);

    for stage in &plan.pipeline.stages {
        let sigmas = format!("{}.sigmas", stage.name);
        // Those of the sampler with two evaluations a step were not recorded; every step depends on them.
        if recorded.has(&sigmas) {
            recorded.check(&sigmas, &result.tensors[&sigmas], DRIVER_LIMIT);
        }
        for modality in ["video", "audio"] {
            check_stage(&mut recorded, &result, &plan, &stage.name, modality);
            check_substeps(&mut recorded, &result, &stage.name, modality);
        }
    }
    // The recording numbers the model's passes.
    for (i, pass) in first.classes[0].programs[0].passes.iter().enumerate() {
        for modality in ["video", "audio"] {
            let own = &result.tensors[&format!("stage1.call0.{}.{modality}.x0", pass.name())];
            recorded.check(&format!("x0_call{i}.{modality}"), own, RUN_LIMIT);
        }
    }
    check_outputs(&mut recorded, &result, &plan);
    recorded.finish();

    let again = model.run(&plan, &request);
    assert_eq!((result.tensors, result.frames, result.sound), (again.tensors, again.frames, again.sound));
}

/// Recorded noise of the steps of a stage, in the order in which it was drawn.
fn fresh_noise(recorded: &mut Recorded, stage: &str) -> BTreeMap<String, Vec<f32>> {
    let mut given = BTreeMap::new();
    for i in 0.. {
        let name = format!("{stage}.sde_noise{i}");
        if !recorded.has(&name) {
            break;
        }
        let (kind, modality) = (["substep", "step"][i / 2 % 2], ["video", "audio"][i % 2]);
        given.insert(format!("{stage}.{kind}.{:03}.{modality}", i / 4), recorded.input(&name).to_f32());
    }
    given
}

/// Where steps with two evaluations lead, before noise is added and after. The recording counts both as calls.
fn check_substeps(recorded: &mut Recorded, result: &Outcome, stage: &str, modality: &str) {
    for call in 0.. {
        let name = |what: &str| format!("{stage}.call{call}.{modality}.{what}");
        if !recorded.has(&name("latent")) {
            break;
        }
        let step = call / 2;
        let (kind, after) = match call % 2 {
            // The next evaluation begins with what the noise made of the middle.
            0 => ("substep", format!("{stage}.call{}.{modality}.latent", call + 1)),
            _ => ("step", format!("{stage}.step{step}.{modality}.latent")),
        };
        let before = format!("{stage}.{kind}{step}.{modality}.target");
        recorded.check(&name("denoised"), &result.tensors[&before], RUN_LIMIT);
        recorded.check(&name("latent"), &result.tensors[&after], RUN_LIMIT);
    }
}

/// What four passes cost beside one: work by the plan's own account, and memory. They run one after the other in the arena
/// of one; beside it lies what all of them read ([`shared_bytes`]), and the predictions of those that ran.
#[test]
fn four_passes_cost_no_more_than_four_steps_and_share_one_arena() {
    for family in ["ltx2", "ltx23"] {
        let model = Files::of(family);
        let shape = |pipeline: PipelineName| ShapeArgs {
            pipeline: Some(pipeline),
            height: Some(256),
            width: Some(384),
            num_frames: Some(33),
            ..ShapeArgs::default()
        };
        let cost = |pipeline: PipelineName| {
            let plan = model.compile(&shape(pipeline), 0);
            let costs = function_costs(&plan);
            let class = &plan.pipeline.stages[0].classes[0];
            let program = plan.program(&class.name).expect("the class has a program");
            let cost = &costs[program.function as usize];
            let passes = class.programs[0].passes.len();
            let beside = shared_bytes(&model, &plan) + program.outputs.iter().map(|o| o.ty.bytes() as u64).sum::<u64>();
            (passes, cost.flops as f64, cost.bytes as f64, program.arena_bytes.clone(), beside)
        };
        let (one, flops, bytes, arenas, _) = cost(PipelineName::DistilledOneStage);
        let (four, guided_flops, guided_bytes, guided_arenas, beside) = cost(PipelineName::OneStage);
        assert_eq!((one, four), (1, 4));
        assert!(guided_flops <= 4.05 * flops, "{family}: {} steps of work", guided_flops / flops);
        assert!(guided_bytes <= 4.05 * bytes, "{family}: {} steps of traffic", guided_bytes / bytes);
        assert_eq!((arenas.len(), guided_arenas.len()), (1, 1), "{family}: passes have arenas of their own");
        println!(
            "{family}: {:.3} of work, {:.3} of traffic, {:.3} of arena",
            guided_flops / flops,
            guided_bytes / bytes,
            guided_arenas[0] as f64 / arenas[0] as f64
        );
        let most = arenas[0] + beside;
        assert!(guided_arenas[0] <= most, "{family}: {guided_arenas:?} of {arenas:?} and {beside}");
    }
}

/// What the passes of a step have in common, in f32: tokens where they are embedded and behind the blocks that no pass
/// perturbs; and, where prompts are modulated by the noise level and so belong to the step, a prompt as one block reads it.
fn shared_bytes(model: &Files, plan: &Plan) -> u64 {
    let checkpoint = TensorFile::read(model.args.checkpoint_path.as_ref().expect("a checkpoint"));
    let config = TransformerConfig::from_json(&checkpoint.config()["transformer"]).expect("a transformer");
    let tokens = [plan.pipeline.stages[0].grid.iter().product::<u32>(), plan.pipeline.audio.tokens];
    let prompt = if config.has_prompt_adaln { CONTEXT_TOKENS as u64 } else { 0 };
    let of =
        |(stream, tokens): (Stream, u32)| (2 * u64::from(tokens) + prompt) * config.stream(stream).width as u64 * 4;
    Stream::BOTH.into_iter().zip(tokens).map(of).sum()
}
