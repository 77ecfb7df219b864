//! Runs that are given clips and recordings, fed with the recorded arrays.

use ltxc::args::PipelineName;
use ltxc::pipelines::stage_choice;
use ltxc_ir::plan::Modality;
use ltxc_runtime::media::{Recording, RgbImage, resize_and_crop};
use ltxc_runtime::pipeline::{Attention, Media, Reference, SourceClip};
use ltxc_tests::fixtures::TensorFile;

use super::guided::sampling;
use super::*;

#[test]
fn retake_of_a_clip_with_sound() {
    let shape = ShapeArgs {
        height: Some(64),
        width: Some(96),
        num_frames: Some(17),
        frame_rate: Some("24".into()),
        ..ShapeArgs::default()
    };
    let run = Conditioned::run("ltx23", "retake", PipelineName::RetakeGuided, shape, |params, plan| {
        let video = &plan.pipeline.video;
        let [start, end] = ["start_time", "end_time"].map(|key| params[key].as_f64().expect("a time"));
        let frames = frames("retake.frames_uint8", video.width as usize, video.height as usize);
        Media {
            clip: Some(SourceClip { frames, start, end, kept: None }),
            sound: Some(waveform("retake.waveform")),
            ..Media::default()
        }
    });
    run.check(&["stage1"], &["stage1"]).finish();
}

/// Up to the adapter of the second stage.
#[test]
fn keyframes_are_appended_in_both_stages() {
    let shape = recorded_shape(&Recorded::required("e2e/ltx2/keyframes"));
    let run = Conditioned::run("ltx2", "keyframes", PipelineName::Keyframes, shape, |_, _| Media::default());
    run.check(&["stage1"], &["stage1", "stage2"]).finish_part();
}

/// Up to the adapter of the second stage, and with the recording at the end.
#[test]
fn a_recording_is_kept_in_both_stages() {
    let shape = recorded_shape(&Recorded::required("e2e/ltx23/a2vid"));
    let run = Conditioned::run("ltx23", "a2vid", PipelineName::AudioToVideo, shape, |_, _| Media {
        sound: Some(waveform("audio.waveform")),
        ..Media::default()
    });
    let sound = channels_first(&run.result.sound, 2);
    let mut recorded = run.check(&["stage1"], &["stage1", "stage2"]);
    recorded.check("final.waveform", &sound, 0.0);
    recorded.finish_part();
}

/// Up to the adapter of the first stage.
#[test]
fn reference_videos_are_appended_with_their_attention() {
    let shape = |name: &str| ShapeArgs {
        reference_attention: name == "ic_lora",
        reference_downscale: (name == "ic_lora_ref2").then_some(2),
        skip_stage_2: name == "ic_lora_ref2",
        ..recorded_shape(&Recorded::required(&format!("e2e/ltx2/{name}")))
    };
    for name in ["ic_lora", "ic_lora_ref2"] {
        let run = Conditioned::run("ltx2", name, PipelineName::IcLora, shape(name), |params, plan| {
            let planned = plan.pipeline.inputs.references.as_ref().expect("the pipeline takes references");
            let frames = frames("video.frames_uint8", planned.width as usize, planned.height as usize);
            let strength = params["video_conditioning"][0][1].as_f64().expect("a strength");
            let attention = params["conditioning_attention_strength"].as_f64();
            Media {
                references: vec![Reference { frames, strength }],
                attention: attention.map(|strength| Attention { strength: strength as f32, mask: None }),
                ..Media::default()
            }
        });
        let own = run.result.tensors.get("stage1.video.attention_mask").cloned();
        let mut recorded = run.check(&[], &["stage1"]);
        assert_eq!(own.is_some(), recorded.has("stage1.video.attention_mask"));
        if let Some(own) = own {
            recorded.check("stage1.video.attention_mask", &own, DRIVER_LIMIT);
        }
        recorded.finish_part();
    }
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

/// A run and its recording.
struct Conditioned {
    recorded: Recorded,
    plan: Plan,
    result: Outcome,
}

impl Conditioned {
    fn run(
        family: &str,
        name: &str,
        pipeline: PipelineName,
        shape: ShapeArgs,
        media: impl Fn(&Value, &Plan) -> Media,
    ) -> Conditioned {
        let model = Files::of(family);
        let recorded = Recorded::required(&format!("e2e/{family}/{name}"));
        let params = recorded.meta()["params"].clone();
        let (images, sampling) = (images(&params), sampling(&params));
        let shape = ShapeArgs { pipeline: Some(pipeline), sampling: sampling.clone(), ..shape };
        let appended = images.iter().filter(|i| i.frame > 0 || pipeline == PipelineName::Keyframes).count();
        let plan = model.compile(&shape, appended);
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
        Conditioned { recorded, plan, result }
    }

    /// Compares all steps of some stages, what others start from, and the outputs if all steps of all stages are.
    #[track_caller]
    fn check(self, whole: &[&str], started: &[&str]) -> Recorded {
        let Conditioned { mut recorded, plan, result } = self;
        for stage in started {
            let sigmas = format!("{stage}.sigmas");
            recorded.check(&sigmas, &result.tensors[&sigmas], DRIVER_LIMIT);
            for modality in ["video", "audio"] {
                check_state(&mut recorded, &result, &plan, stage, modality);
            }
        }
        for stage in whole {
            for modality in ["video", "audio"] {
                check_steps(&mut recorded, &result, stage, modality);
            }
        }
        if whole.contains(&"stage1") {
            // The recording numbers the model's evaluations, of which there is one per pass.
            let first = &plan.pipeline.stages[0];
            let passes = needed_passes(first.guidance.as_ref(), first.sampler);
            for (call, pass) in passes.iter().enumerate() {
                for modality in ["video", "audio"] {
                    let own = &result.tensors[&format!("stage1.call0.{}.{modality}.x0", pass.name())];
                    recorded.check(&format!("x0_call{call}.{modality}"), own, RUN_LIMIT);
                }
            }
        }
        if whole.len() == plan.pipeline.stages.len() {
            check_outputs(&mut recorded, &result, &plan);
        }
        recorded
    }
}
