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
        Case::new(family, name).of_first_release().into_iter().for_each(|case| check_conditioned(case, pipeline));
    }
}

#[test]
fn conditioned_runs_on_a_gpu() {
    let Some(device) = gpu() else { return };
    let model = Files { device, ..Files::of("ltx2") };
    check_conditioned_on(&model, Case::new("ltx2", "ic_lora"), PipelineName::IcLora);
}

/// No run of this pipeline was recorded; its states must be what the specification says.
#[test]
fn a_clip_and_its_sound_guide_both_stages_of_a_dub() {
    const STRENGTH: f64 = 0.75;
    let model = Files::of("ltx2");
    let loras = model.loras(&serde_json::json!({"lora": "ic-lora-ref2-tiny.safetensors"}));
    let (width, height) = (192, 128);
    let shape = ShapeArgs {
        pipeline: Some(PipelineName::Dub),
        size: Some(format!("{width}x{height}")),
        num_frames: Some(9),
        ..ShapeArgs::default()
    };
    // References are half as large as their stage, which only the second one is a multiple for.
    let narrow = Shape::resolve(&shape, 0).and_then(|s| s.with(&loras)).expect("a shape");
    let files = ModelFiles::open(&model.args, true).expect("files");
    assert!(compile(&files, &narrow, Options::default(), &mut |_, _, _| {}).is_err());
    let shape = ShapeArgs { size: Some("256x128".into()), ..shape };
    let plan = model.compile_for(&shape, 0, &loras);
    let inputs = &plan.pipeline.inputs;
    let frames = inputs.references.iter().map(reference_frames).collect();
    let references = vec![Reference { frames, strength: STRENGTH }];
    let media = Media { references, sound: Some(waveform("audio.waveform")), ..Media::default() };
    let adapters = model.stage_adapters(&plan, &loras);
    let result = model.run(&plan, &Request { media, adapters, ..request("rain", &[], BTreeMap::new()) });
    let tensor = |name: &str| &result.tensors[name];

    // 9 frames at 24 per second are 0.375 s, of which the plan was compiled for all.
    let (tokens, channels) = (plan.pipeline.audio.tokens as usize, plan.pipeline.audio.channels as usize);
    let guides = inputs.sound.expect("sound").tokens() as usize;
    let start = |token: usize| (4.0 * token as f32 - 3.0).max(0.0) / 100.0;
    let shifted = |count: usize| (0..count).flat_map(move |t| [t, t + 1].map(|t| start(t) - start(count) - 0.04));
    for (stage, count) in [("stage1", guides), ("stage2", tokens)] {
        let own = (0..tokens).flat_map(|t| [start(t), start(t + 1)]);
        let expected: Vec<f32> = own.chain(shifted(count)).collect();
        let found = tensor(&format!("{stage}.audio.positions"));
        assert_eq!(found.len(), expected.len(), "{stage}");
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{stage}: positions of sound");
    }
    let mask = tensor("stage1.audio.denoise_mask");
    assert!(mask[..tokens].iter().all(|&m| m == 1.0) && mask[tokens..].iter().all(|&m| m == 0.0));
    assert!(tensor("stage2.audio.denoise_mask").iter().all(|&m| m == 0.0), "the second stage keeps all sound");
    let last =
        result.tensors.keys().filter(|k| k.starts_with("stage1.step") && k.ends_with("audio.latent")).count() - 1;
    let made = &tensor(&format!("stage1.step{last}.audio.latent"))[..tokens * channels];
    // It guides the second stage, too, is kept there to the end, and is written.
    for name in ["stage2.audio.clean_latent", "stage2.audio.noised", "stage2.step2.audio.latent"] {
        assert_eq!(tensor(name), &[made, made].concat(), "{name}");
    }
    assert_eq!(tensor("final.audio_latent"), made);
    for (stage, planned) in plan.pipeline.stages.iter().zip(&inputs.references) {
        let target = stage.grid.iter().product::<u32>() as usize;
        let mask = tensor(&format!("{}.video.denoise_mask", stage.name));
        assert_eq!([stage.height, stage.width], [planned.height * 2, planned.width * 2]);
        assert_eq!(mask.len(), target + planned.tokens() as usize, "{}", stage.name);
        assert!(mask[target..].iter().all(|&m| m == (1.0 - STRENGTH) as f32), "{}", stage.name);
    }
    assert_eq!(result.frames.len(), 9 * 256 * 128 * 3);
}

/// The size of a run, and what its plan has room for.
fn shape(case: Case, params: &Value) -> ShapeArgs {
    let shape = match case.name {
        // A clip brings its size, and its rate, which is that of all recorded clips.
        "retake" => {
            let media = media();
            let extent = |axis: usize| Some(media.tensor("retake.frames_uint8").ty.shape[axis] as u32);
            ShapeArgs {
                height: extent(1),
                width: extent(2),
                num_frames: extent(0),
                frame_rate: Some(media.meta()["fps"].to_string()),
                reference_version: Some(case.release),
                ..ShapeArgs::default()
            }
        }
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
        let strength = params["video_conditioning"][0][1].as_f64().expect("a strength");
        Reference { frames: vec![reference_frames(planned)], strength }
    };
    let references = inputs.references.iter().map(reference).collect();
    let attention = params["conditioning_attention_strength"].as_f64();
    let attention = attention.map(|strength| Attention { strength: strength as f32, mask: None });
    Media { references, attention, clip, sound }
}

fn media() -> TensorFile {
    TensorFile::read(&root().join("inputs/media.safetensors"))
}

/// Frames of the recorded reference video.
pub fn reference_length() -> usize {
    media().tensor("video.frames_uint8").ty.shape[0]
}

/// The recorded reference video, of which a run reads as many frames as its own has.
fn reference_frames(planned: &ReferenceInput) -> Vec<f32> {
    let (width, height) = (planned.width as usize, planned.height as usize);
    let mut frames = frames("video.frames_uint8", width, height);
    frames.truncate(planned.frames as usize * width * height * 3);
    frames
}

/// A recorded clip `[n, h, w, 3]`, fitted to a size.
pub fn frames(name: &str, width: usize, height: usize) -> Vec<f32> {
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
pub fn waveform(name: &str) -> Recording {
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
