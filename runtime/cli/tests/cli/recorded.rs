//! Recorded runs of the reference through the binary: from files of noise to frames and sound.

use std::path::PathBuf;

use ltxc::debug::recording::{Form, TensorFile, thinned};
use ltxc_runtime::media::{load_image, png};
use ltxc_runtime::noise_files::{Container, Stored};
use serde_json::Value;

use crate::binary::{Place, fixtures};

/// A recorded run.
struct Recording {
    file: TensorFile,
    meta: Value,
}

impl Recording {
    /// As release 1.2.0 made it, which stands in the other folder where it differs from 1.0.0.
    fn open(family: &str, name: &str) -> Recording {
        let folders = ["expected-1.2.0", "expected"].into_iter();
        let mut paths = folders.map(|f| fixtures().join(format!("{f}/e2e/{family}/{name}.safetensors")));
        let file = TensorFile::open(&paths.find(|path| path.exists()).expect("a recording")).unwrap();
        Recording { meta: file.meta(), file }
    }

    fn param(&self, key: &str) -> &Value {
        &self.meta["params"][key]
    }

    fn text(&self, key: &str) -> Option<String> {
        match self.param(key) {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }

    /// The recorded noise of a stage and modality as a file.
    fn noise(&self, place: &Place, slot: &str) -> Option<PathBuf> {
        let tensor = self.file.find(&format!("{slot}.noise"))?;
        let stored = Stored::f32("noise", &tensor.ty.shape, tensor.to_f32());
        Some(place.write(&format!("{slot}.safetensors"), &Container::Safetensors.encode(&stored).unwrap()))
    }
}

fn fixture(name: &str) -> String {
    fixtures().join(name).display().to_string()
}

/// The recorded video as a folder of images.
fn reference(place: &Place) -> String {
    let media = TensorFile::open(&fixtures().join("inputs/media.safetensors")).unwrap();
    let frames = media.find("video.frames_uint8").expect("a clip");
    let [_, rows, columns, 3] = frames.ty.shape[..] else { panic!("frames are {}", frames.ty) };
    std::fs::create_dir(place.path("video")).unwrap();
    let bytes: Vec<u8> = frames.ints().iter().map(|&v| v as u8).collect();
    for (i, frame) in bytes.chunks(rows * columns * 3).enumerate() {
        let mut file = Vec::new();
        png::write(columns, rows, frame, &mut file).unwrap();
        place.write(&format!("video/{i:03}.png"), &file);
    }
    "video".into()
}

/// The command of a recorded run.
fn command(place: &Place, recording: &Recording, folder: &str, model: &str, upsampler: &str) -> Vec<String> {
    let mut args = vec!["run".to_string()];
    let mut flag = |name: &str, values: &[String]| {
        args.push(name.into());
        args.extend(values.iter().cloned());
    };
    flag("--checkpoint-path", &[fixture(&format!("{folder}/{model}.safetensors"))]);
    flag("--gemma-root", &[fixture("tiny-gemma3")]);
    flag("--spatial-upsampler-path", &[fixture(&format!("{folder}/{upsampler}.safetensors"))]);
    let given = [
        ("--prompt", "prompt"),
        ("--negative-prompt", "negative_prompt"),
        ("--height", "height"),
        ("--width", "width"),
        ("--num-frames", "num_frames"),
        ("--frame-rate", "frame_rate"),
        ("--num-inference-steps", "num_inference_steps"),
        ("--conditioning-attention-strength", "conditioning_attention_strength"),
    ];
    for (name, key) in given {
        recording.text(key).iter().for_each(|value| flag(name, std::slice::from_ref(value)));
    }
    for (name, key) in [("--lora", "lora"), ("--distilled-lora", "distilled_lora")] {
        recording.text(key).iter().for_each(|file| flag(name, &[fixture(&format!("{folder}/{file}"))]));
    }
    for image in recording.param("images").as_array().into_iter().flatten() {
        let path = fixture(&format!("inputs/{}", image["image"].as_str().unwrap()));
        flag(
            "--image",
            &[path, image["frame_idx"].to_string(), image["strength"].to_string(), image["crf"].to_string()],
        );
    }
    if let Some(strength) = recording.param("video_conditioning")[0][1].as_f64() {
        flag("--video-conditioning", &[reference(place), strength.to_string()]);
    }
    if recording.param("audio").is_string() {
        flag("--audio-path", &[fixture("inputs/audio.wav")]);
    }
    if *recording.param("skip_stage_2") == true {
        flag("--skip-stage-2", &[]);
    }
    let slots = [
        ("--ltx2-initial-latent-path", "stage1.video"),
        ("--ltx2-audio-latent-path", "stage1.audio"),
        ("--ltx2-refine-noise-path", "stage2.video"),
        ("--ltx2-refine-audio-noise-path", "stage2.audio"),
    ];
    for (name, slot) in slots {
        recording.noise(place, slot).iter().for_each(|path| flag(name, &[path.display().to_string()]));
    }
    flag("--device", &["cpu".into()]);
    flag("-o", &["frames".into()]);
    args
}

/// Frames differ by at most 1 in at most 2 % of their values, and sound by what 16 bits round and by 1e-3.
#[track_caller]
fn check(place: &Place, recording: &Recording) {
    let names = ["final.frames_uint8", "final.frames_uint8_every4"].into_iter().zip([1, 4]);
    let mut found = names.filter_map(|(name, every)| Some((recording.file.find(name)?, every)));
    let (expected, every) = found.next().expect("frames");
    let frame = expected.ty.shape[1..].iter().product::<usize>();
    let (mut different, mut count) = (0, 0);
    for (i, expected) in expected.ints().chunks(frame).enumerate() {
        let found = load_image(&place.path(&format!("frames/frame_{:05}.png", i * every))).unwrap();
        assert_eq!(found.rgb().len(), expected.len());
        for (&a, &b) in found.rgb().iter().zip(expected) {
            assert!((i64::from(a) - b).abs() <= 1, "frame {}: {a}, recorded {b}", i * every);
            different += usize::from(i64::from(a) != b);
            count += 1;
        }
    }
    assert!(count > 0 && different * 50 <= count, "{different} of {count} values differ");

    let samples_of = |wav: &[u8]| -> Vec<f32> {
        wav[44..].as_chunks::<2>().0.iter().map(|b| f32::from(i16::from_le_bytes(*b)) / 32767.0).collect()
    };
    let samples = samples_of(&place.read("frames/audio.wav"));
    if recording.param("audio").is_string() {
        // The library keeps all of a recording, its command line and this one as much as the video is long.
        let given = samples_of(&std::fs::read(fixtures().join("inputs/audio.wav")).unwrap());
        assert!(!samples.is_empty() && samples.len() < given.len());
        assert!(samples.iter().zip(&given).all(|(a, b)| (a - b).abs() <= 1.5 / 32767.0), "another recording");
        return;
    }
    let planar: Vec<f32> = (0..2).flat_map(|c| samples.iter().skip(c).step_by(2).copied()).collect();
    let form = Form::of(&recording.file, &recording.meta, "final.waveform", planar.len()).expect("sound");
    assert_eq!(form.elements(), Some(planar.len()));
    for (i, (found, &value)) in thinned(&planar, form.step).iter().zip(&form.values).enumerate() {
        let value = value.clamp(-1.0, 1.0);
        assert!((found - value).abs() <= 2.0 / 32767.0 + 1e-3, "value {i} of the sound: {found}, recorded {value}");
    }
}

#[track_caller]
fn run(family: &str, name: &str, pipeline: &str) {
    let place = Place::new();
    let recording = Recording::open(family, name);
    let (folder, model, upsampler) = match family {
        "ltx2" => ("tiny-ltx2", "ltx-2-tiny", "spatial-upscaler-x2-tiny"),
        _ => ("tiny-ltx23", "ltx-2.3-tiny", "spatial-upscaler-x2-ltx23-tiny"),
    };
    let mut args = command(&place, &recording, folder, model, upsampler);
    args.extend(["--pipeline", pipeline].map(String::from));
    place.ok(&args);
    check(&place, &recording);
}

#[test]
fn keyframes_from_noise_to_frames() {
    run("ltx2", "keyframes", "keyframes");
}

#[test]
fn audio_to_video_from_noise_to_frames() {
    run("ltx23", "a2vid", "a2v");
}

#[test]
fn references_from_noise_to_frames() {
    run("ltx2", "ic_lora", "ic-lora");
    run("ltx2", "ic_lora_ref2", "ic-lora");
}

#[test]
fn images_and_text_from_noise_to_frames() {
    run("ltx2", "two_stages_i2v", "two-stage");
    run("ltx23", "distilled", "distilled");
}
