//! Runs that are given clips and recordings, fed with the recorded arrays.

use ltxc::args::PipelineName;
use ltxc::pipelines::stage_choice;
use ltxc_ir::plan::{Modality, ReferenceInput};
use ltxc_runtime::media::{Recording, RgbImage, resize_and_crop};
use ltxc_runtime::pipeline::{Attention, Media, Reference, SourceClip};
use ltxc_tests::fixtures::TensorFile;

use super::guided::sampling;
use super::*;

/// The recorded runs, with their pipelines.
const RUNS: [(&str, &str, PipelineName); 5] = [
    ("ltx23", "retake", PipelineName::RetakeGuided),
    ("ltx2", "keyframes", PipelineName::Keyframes),
    ("ltx23", "a2vid", PipelineName::AudioToVideo),
    ("ltx2", "ic_lora", PipelineName::IcLora),
    ("ltx2", "ic_lora_ref2", PipelineName::IcLora),
];

#[test]
fn conditioned_runs() {
    for (family, name, pipeline) in RUNS {
        check_conditioned(Case::new(family, name), pipeline);
    }
}

#[test]
fn conditioned_runs_of_the_first_release() {
    for (family, name, pipeline) in RUNS {
        check_conditioned(Case::new(family, name).of_first_release(), pipeline);
    }
}

#[test]
fn conditioned_runs_on_a_gpu() {
    let Some(device) = gpu() else { return };
    let model = Files { device, ..Files::of("ltx2") };
    check_conditioned_on(&model, Case::new("ltx2", "ic_lora"), PipelineName::IcLora);
}

/// The size of a run, and what its plan has room for.
fn shape(case: Case, params: &Value) -> ShapeArgs {
    let shape = match case.name {
        // A clip brings its size.
        "retake" => ShapeArgs {
            height: Some(64),
            width: Some(96),
            num_frames: Some(17),
            frame_rate: Some("24".into()),
            reference_version: Some(case.release),
            ..ShapeArgs::default()
        },
        _ => case.shape(),
    };
    ShapeArgs {
        reference_attention: params["conditioning_attention_strength"].is_number(),
        skip_stage_2: params["skip_stage_2"].as_bool().unwrap_or(false),
        ..shape
    }
}

/// What a run brings besides text and images.
fn brought(params: &Value, plan: &Plan) -> Media {
    let (inputs, video) = (&plan.pipeline.inputs, &plan.pipeline.video);
    let clip = inputs.clip.as_ref().map(|_| {
        let [start, end] = ["start_time", "end_time"].map(|key| params[key].as_f64().expect("a time"));
        let frames = frames("retake.frames_uint8", video.width as usize, video.height as usize);
        SourceClip { frames, start, end, kept: None }
    });
    let sound = inputs.sound.map(|sound| match sound.role {
        SoundRole::Clip => waveform("retake.waveform"),
        _ => waveform("audio.waveform"),
    });
    let reference = |planned: &ReferenceInput| {
        let frames = frames("video.frames_uint8", planned.width as usize, planned.height as usize);
        let strength = params["video_conditioning"][0][1].as_f64().expect("a strength");
        Reference { frames: vec![frames], strength }
    };
    let references = inputs.references.iter().map(reference).collect();
    let attention = params["conditioning_attention_strength"].as_f64();
    let attention = attention.map(|strength| Attention { strength: strength as f32, mask: None });
    Media { references, attention, clip, sound }
}

fn media() -> TensorFile {
    TensorFile::read(&root().join("inputs/media.safetensors"))
}

/// A recorded clip `[n, h, w, 3]`, fitted to a size.
fn frames(name: &str, width: usize, height: usize) -> Vec<f32> {
    let clip = media().tensor(name).clone();
    let [_, rows, columns, 3] = clip.ty.shape[..] else { panic!("{name} is {}", clip.ty) };
    let bytes: Vec<u8> = clip.ints().iter().map(|&v| v as u8).collect();
    let fitted = bytes.chunks(rows * columns * 3).flat_map(|frame| {
        let image = RgbImage::new(columns, rows, frame.to_vec()).expect("an image");
        resize_and_crop(&image, width, height).expect("a size")
    });
    fitted.collect()
}

/// A recorded waveform `[1, channels, n]` at 16 kHz.
fn waveform(name: &str) -> Recording {
    let sound = media().tensor(name).clone();
    let [1, _, samples] = sound.ty.shape[..] else { panic!("{name} is {}", sound.ty) };
    Recording { rate_hz: 16_000, channels: sound.to_f32().chunks(samples).map(<[f32]>::to_vec).collect() }
}

#[track_caller]
fn check_conditioned(case: Case, pipeline: PipelineName) {
    check_conditioned_on(&Files::of(case.family), case, pipeline);
}

/// Compares everything that was recorded, from the noise to the last frame and the sound.
#[track_caller]
fn check_conditioned_on(model: &Files, case: Case, pipeline: PipelineName) {
    let mut recorded = case.recorded();
    let params = recorded.meta()["params"].clone();
    let (images, sampling, loras) = (images(&params), sampling(&params), model.loras(&params));
    let shape = ShapeArgs { pipeline: Some(pipeline), sampling: sampling.clone(), ..shape(case, &params) };
    let appended = images.iter().filter(|i| i.frame > 0 || pipeline == PipelineName::Keyframes).count();
    let plan = model.compile_for(&shape, appended, &loras);
    let steps = params["num_inference_steps"].as_u64().map(|n| n as usize);
    let first = &plan.pipeline.stages[0];
    let choice = stage_choice(first, &Modality::BOTH, &sampling, steps, None).unwrap_or_else(|e| panic!("{e:#}"));
    let request = Request {
        negative_prompt: params["negative_prompt"].as_str().unwrap_or_default(),
        media: brought(&params, &plan),
        stages: BTreeMap::from([(first.name.clone(), choice)]),
        adapters: model.stage_adapters(&plan, &loras),
        ..request(params["prompt"].as_str().expect("a prompt"), &images, recorded_noise(&recorded, &plan))
    };
    let result = model.run(&plan, &request);

    for stage in &plan.pipeline.stages {
        let sigmas = format!("{}.sigmas", stage.name);
        recorded.check(&sigmas, &result.tensors[&sigmas], DRIVER_LIMIT);
        for modality in ["video", "audio"] {
            check_stage(&mut recorded, &result, &plan, &stage.name, modality);
        }
    }
    // The recording numbers the model's evaluations, of which a step has one per pass.
    let passes = needed_passes(first.guidance.as_ref(), first.sampler);
    let calls = (0..).take_while(|call| recorded.has(&format!("x0_call{call}.video"))).count();
    assert!(calls > 0, "no evaluation was recorded");
    for call in 0..calls {
        let (step, pass) = (call / passes.len(), passes[call % passes.len()].name());
        for modality in ["video", "audio"] {
            let own = &result.tensors[&format!("stage1.call{step}.{pass}.{modality}.x0")];
            recorded.check(&format!("x0_call{call}.{modality}"), own, RUN_LIMIT);
        }
    }
    check_outputs(&mut recorded, &result, &plan);
    recorded.finish();
}
