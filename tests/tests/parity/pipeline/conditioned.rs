//! Runs that are given clips and recordings, fed with the recorded arrays.

use ltxc::args::PipelineName;
use ltxc::pipelines::stage_choice;
use ltxc_ir::plan::Modality;
use ltxc_runtime::media::{Recording, RgbImage, resize_and_crop};
use ltxc_runtime::pipeline::{Media, SourceClip};
use ltxc_tests::fixtures::TensorFile;

use super::guided::sampling;
use super::*;

#[test]
fn retake_of_a_clip_with_sound() {
    let shape = |_: &Value| ShapeArgs {
        pipeline: Some(PipelineName::RetakeGuided),
        height: Some(64),
        width: Some(96),
        num_frames: Some(17),
        frame_rate: Some("24".into()),
        ..ShapeArgs::default()
    };
    check_conditioned("ltx23", "retake", shape, |params, plan| {
        let video = &plan.pipeline.video;
        let [start, end] = ["start_time", "end_time"].map(|key| params[key].as_f64().expect("a time"));
        let frames = frames("retake.frames_uint8", video.width as usize, video.height as usize);
        Media {
            clip: Some(SourceClip { frames, start, end, kept: None }),
            sound: Some(waveform("retake.waveform")),
            ..Media::default()
        }
    });
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
fn check_conditioned(
    family: &str,
    name: &str,
    shape: impl Fn(&Value) -> ShapeArgs,
    media: impl Fn(&Value, &Plan) -> Media,
) {
    let model = Files::of(family);
    let mut recorded = Recorded::required(&format!("e2e/{family}/{name}"));
    let params = recorded.meta()["params"].clone();
    let images = images(&params);
    let sampling = sampling(&params);
    let plan = model.compile(&ShapeArgs { sampling: sampling.clone(), ..shape(&params) }, images.len());
    let steps = params["num_inference_steps"].as_u64().map(|n| n as usize);
    let first = &plan.pipeline.stages[0];
    let choice = stage_choice(first, &Modality::BOTH, &sampling, steps, None).unwrap_or_else(|e| panic!("{e:#}"));
    let request = Request {
        negative_prompt: params["negative_prompt"].as_str().unwrap_or_default(),
        media: media(&params, &plan),
        stages: BTreeMap::from([(first.name.clone(), choice)]),
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
    // The recording numbers the model's evaluations: the passes of the first step, or its first steps.
    let passes = needed_passes(first.guidance.as_ref(), first.sampler);
    for call in 0..4 {
        let (step, pass) = (call / passes.len(), passes[call % passes.len()]);
        for modality in ["video", "audio"] {
            let own = &result.tensors[&format!("stage1.call{step}.{}.{modality}.x0", pass.name())];
            recorded.check(&format!("x0_call{call}.{modality}"), own, RUN_LIMIT);
        }
    }
    check_outputs(&mut recorded, &result, &plan);
    recorded.finish();
}
