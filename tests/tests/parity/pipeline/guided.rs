//! Guided runs: several passes per step, of which some modality may skip some.

use ltxc::args::{PipelineName, SamplingArgs};
use ltxc::pipelines::stage_choice;
use ltxc_ir::plan::summary::function_costs;
use ltxc_ir::plan::{Modality, Pass};

use super::*;

#[test]
fn one_stage_run_of_ltx2() {
    check_guided("ltx2", "one_stage", PipelineName::OneStage);
}

#[test]
fn one_stage_run_of_ltx23() {
    check_guided("ltx23", "one_stage", PipelineName::OneStage);
}

#[test]
fn one_stage_run_with_an_image_and_skipped_steps() {
    check_guided("ltx23", "one_stage_i2v_skip", PipelineName::OneStage);
}

/// The flags that a recorded run stands for.
pub fn sampling(params: &Value) -> SamplingArgs {
    let number = |modality: &str, key: &str| params[format!("{modality}_guider")][key].as_f64();
    let blocks = |modality: &str| {
        let listed = params[format!("{modality}_guider")]["stg_blocks"].as_array()?;
        Some(listed.iter().filter_map(|b| b.as_u64()).map(|b| b as u32).collect())
    };
    let skip = |modality: &str| number(modality, "skip_step").map(|n| n as u32);
    SamplingArgs {
        cfg: number("video", "cfg_scale"),
        cfg_audio: number("audio", "cfg_scale"),
        stg: number("video", "stg_scale"),
        stg_audio: number("audio", "stg_scale"),
        stg_blocks: blocks("video"),
        stg_blocks_audio: blocks("audio"),
        modality: number("video", "modality_scale"),
        modality_audio: number("audio", "modality_scale"),
        rescale: number("video", "rescale_scale"),
        rescale_audio: number("audio", "rescale_scale"),
        video_skip_step: skip("video"),
        audio_skip_step: skip("audio"),
        ..SamplingArgs::default()
    }
}

#[track_caller]
fn check_guided(family: &str, name: &str, pipeline: PipelineName) {
    let model = Files::of(family);
    let mut recorded = Recorded::required(&format!("e2e/{family}/{name}"));
    let params = recorded.meta()["params"].clone();
    let images = images(&params);
    let sampling = sampling(&params);
    let shape = ShapeArgs { pipeline: Some(pipeline), sampling: sampling.clone(), ..recorded_shape(&recorded) };
    let plan = model.compile(&shape, images.iter().filter(|i| i.frame > 0).count());
    let [prompt, negative] = ["prompt", "negative_prompt"].map(|key| params[key].as_str().expect("a prompt"));
    let steps = params["num_inference_steps"].as_u64().map(|n| n as usize);
    let first = &plan.pipeline.stages[0];
    let choice = stage_choice(first, &Modality::BOTH, &sampling, steps, None).unwrap_or_else(|e| panic!("{e:#}"));
    let request = Request {
        negative_prompt: negative,
        stages: BTreeMap::from([(first.name.clone(), choice)]),
        ..request(prompt, &images, recorded_noise(&recorded, &plan))
    };
    let result = model.run(&plan, &request);

    for stage in &plan.pipeline.stages {
        let sigmas = format!("{}.sigmas", stage.name);
        recorded.check(&sigmas, &result.tensors[&sigmas], DRIVER_LIMIT);
        for modality in ["video", "audio"] {
            check_stage(&mut recorded, &result, &plan, &stage.name, modality);
        }
    }
    // The recording numbers the model's passes, of which there are four a step.
    for (i, pass) in Pass::ALL.into_iter().enumerate() {
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

/// What four passes cost beside one: work by the plan's own account, and memory.
#[test]
fn four_passes_cost_no_more_than_four_steps_and_one_arena() {
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
            (class.programs[0].passes.len(), cost.flops as f64, cost.bytes as f64, program.arena_bytes.clone())
        };
        let (one, flops, bytes, arenas) = cost(PipelineName::DistilledOneStage);
        let (four, guided_flops, guided_bytes, guided_arenas) = cost(PipelineName::OneStage);
        assert_eq!((one, four), (1, 4));
        assert!(guided_flops <= 4.05 * flops, "{family}: {} steps of work", guided_flops / flops);
        assert!(guided_bytes <= 4.05 * bytes, "{family}: {} steps of traffic", guided_bytes / bytes);
        let total = |arenas: &[u64]| arenas.iter().sum::<u64>() as f64;
        let ratio = total(&guided_arenas) / total(&arenas);
        println!(
            "{family}: {:.3} of work, {:.3} of traffic, {ratio:.3} of arena",
            guided_flops / flops,
            guided_bytes / bytes
        );
        assert!(ratio <= 1.5, "{family}: {ratio} arenas");
    }
}
