//! Models that make one thing alone: checkpoints without the weights for sound, and without those for video.

use serde_json::Value;

use crate::bad_files::Parts;
use crate::binary::{Place, SHAPE, fixtures, with};

/// The model of a family, changed, as `model.safetensors`.
fn written(place: &Place, family: &str, change: impl FnOnce(Parts) -> Parts) -> String {
    let model = if family == "ltx2" { "tiny-ltx2/ltx-2-tiny" } else { "tiny-ltx23/ltx-2.3-tiny" };
    let parts = change(Parts::read(&fixtures().join(format!("{model}.safetensors"))));
    place.write("model.safetensors", &parts.bytes()).display().to_string()
}

/// Leaves out parts of the configuration.
fn unconfigured(mut parts: Parts, sections: &[&str]) -> Parts {
    parts.configure(|config: &mut Value| {
        let config = config.as_object_mut().unwrap();
        config.retain(|name, _| !sections.contains(&name.as_str()));
    });
    parts
}

fn is_transformer(key: &str) -> bool {
    key.starts_with("model.diffusion_model.")
}

/// Whether only sound needs it.
fn is_of_sound(key: &str) -> bool {
    let own = ["audio_vae.", "vocoder."].iter().any(|start| key.starts_with(start)) || key.contains("audio_aggregate");
    own || (is_transformer(key) && ["audio", "a2v", "v2a", "av_ca"].iter().any(|part| key.contains(part)))
}

/// Whether sound does without it.
fn is_of_video(key: &str) -> bool {
    let parts = [
        "audio_attn1",
        "audio_attn2",
        "audio_ff",
        "audio_patchify",
        "audio_proj_out",
        "audio_adaln_single",
        "audio_prompt",
        "audio_scale_shift_table",
        "audio_embeddings_connector",
        "audio_caption_projection",
    ];
    let is_sound = parts.iter().any(|part| key.contains(part)) && !key.contains("av_ca");
    key.starts_with("vae.") || key.contains("video_aggregate") || (is_transformer(key) && !is_sound)
}

fn run(family: &str, model: &str, more: &[&str]) -> Vec<String> {
    let upsampler = match family {
        "ltx2" => "tiny-ltx2/spatial-upscaler-x2-tiny.safetensors",
        _ => "tiny-ltx23/spatial-upscaler-x2-ltx23-tiny.safetensors",
    };
    let [upsampler, gemma] = [upsampler, "tiny-gemma3"].map(|name| fixtures().join(name).display().to_string());
    let args = [
        "run",
        "--checkpoint-path",
        model,
        "--gemma-root",
        &gemma,
        "--spatial-upsampler-path",
        &upsampler,
        "-p",
        "rain",
    ];
    with(args.map(String::from).into(), &[&["--device", "cpu"], more].concat())
}

fn model(family: &str) -> String {
    let name = if family == "ltx2" { "tiny-ltx2/ltx-2-tiny" } else { "tiny-ltx23/ltx-2.3-tiny" };
    fixtures().join(format!("{name}.safetensors")).display().to_string()
}

#[test]
fn models_of_video_alone_make_silent_videos() {
    for family in ["ltx2", "ltx23"] {
        let place = Place::new();
        let part = written(&place, family, |parts| unconfigured(parts.without(is_of_sound), &["audio_vae", "vocoder"]));
        let silent = [&SHAPE[..], &["--no-audio", "--no-metadata", "-o"]].concat();
        let bytes = |model: &str, name: &str| {
            place.ok(&run(family, model, &[&silent[..], &[name]].concat()));
            place.read(name)
        };
        assert!(bytes(&part, "a.mp4") == bytes(&model(family), "b.mp4"), "{family}: the weights for sound mattered");
        let args = run(family, &part, &[&SHAPE[..], &["-o", "c.mp4"]].concat());
        let words =
            ["model.safetensors", "no sound", "no tensor `audio_vae.…`", "add `--no-audio`", "--audio-vae-path"];
        place.refused(&args, &words);
        // A configuration that describes what is not there changes nothing.
        let described = written(&place, family, |parts| parts.without(is_of_sound));
        let args = run(family, &described, &[&SHAPE[..], &["-o", "c.mp4"]].concat());
        place.refused(&args, &words);
        let args = run(family, &described, &["--pipeline", "t2a", "--num-frames", "9", "-o", "c.wav"]);
        place.refused(&args, &["no tensor `audio_vae.…`", "pipeline `t2a` is about sound"]);
        // Sound that stays a spectrogram is none.
        let mute = written(&place, family, |parts| parts.without(|key| key.starts_with("vocoder.")));
        let args = run(family, &mute, &[&SHAPE[..], &["-o", "c.mp4"]].concat());
        place.refused(&args, &["no sound", "no tensor `vocoder.…`", "add `--no-audio`"]);
    }
}

#[test]
fn models_of_sound_alone_make_sound() {
    for family in ["ltx2", "ltx23"] {
        let place = Place::new();
        let part = written(&place, family, |parts| unconfigured(parts.without(is_of_video), &["vae"]));
        let sound = ["--pipeline", "t2a", "--num-frames", "9", "--num-inference-steps", "2", "-o"];
        let bytes = |model: &str, name: &str| {
            place.ok(&run(family, model, &[&sound[..], &[name]].concat()));
            place.read(name)
        };
        assert!(bytes(&part, "a.wav") == bytes(&model(family), "b.wav"), "{family}: the weights for video mattered");
        let args = run(family, &part, &[&SHAPE[..], &["-o", "c.mp4"]].concat());
        place.refused(&args, &["model.safetensors", "no video", "no tensor `vae.…`", "`--pipeline t2a`"]);
    }
}
