//! `ltxc info`: what files are; and `ltxc encode-text`, which is a command under another name.

use serde_json::Value;

use crate::binary::{Place, SHAPE, fixtures, tiny, with};
use crate::convert::gguf;

#[track_caller]
fn info(place: &Place, path: &str, more: &[&str]) -> (String, Value) {
    let args = with(vec!["info".into(), path.into()], more);
    let text = place.ok(&args).stdout;
    let facts = place.ok(&with(args, &["--json"])).stdout;
    (text, serde_json::from_str(&facts).unwrap_or_else(|e| panic!("{e}: {facts}")))
}

#[test]
fn files_are_what_they_are() {
    let place = Place::new();
    place.write("model.gguf", &gguf("ltx23", "", |_, _| {}));
    let fixture = |name: &str| fixtures().join(name).display().to_string();
    for (path, kind, words) in [
        (tiny().plan.display().to_string(), "plan", &["a plan", "pipeline  distilled, 64x64", "memory: "][..]),
        (
            fixture("tiny-ltx2/ltx-2-tiny.safetensors"),
            "model",
            &["does not say", "LTX-2, because its metadata says", "vocoder"],
        ),
        (
            fixture("tiny-ltx23/ltx-2.3-tiny.safetensors"),
            "model",
            &["LTX-2.3, because", "in bf16", "configuration     audio_vae, "],
        ),
        (fixture("tiny-ltx2/lora-rank4-tiny.safetensors"), "lora", &["a LoRA", "official", "rank      "]),
        (
            fixture("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors"),
            "upsampler",
            &["enlarges pictures 2 times", " channels"],
        ),
        (fixture("tiny-ltx23/spatial-upscaler-x1.5-ltx23-tiny.safetensors"), "upsampler", &["1.5 times"]),
        (fixture("tiny-ltx2/temporal-upscaler-x2-tiny.safetensors"), "upsampler", &["doubles the frame rate"]),
        (fixture("tiny-gemma3"), "text encoder", &["Gemma 3, for LTX-2 and LTX-2.3", "1 file\n"]),
        (fixture("tiny-gemma3-sharded"), "text encoder", &["2 files"]),
        ("model.gguf".into(), "gguf", &["LTX-2.3 or newer", "does not run it", "Q8_0"]),
    ] {
        let (text, facts) = info(&place, &path, &[]);
        assert_eq!(facts["kind"], kind, "{path}");
        assert!(words.iter().all(|word| text.contains(word)), "{path}:\n{text}");
    }
    let media = fixture("inputs/audio.wav");
    place.refused(&["info", &media], &["audio.wav"]);
    place.refused(&["info", "nowhere"], &["nowhere"]);
    place.refused(&["info", &fixture("inputs")], &["inputs", "neither `model_index.json` nor"]);
}

#[test]
fn memory_is_estimated_for_a_size() {
    let (place, model) = (Place::new(), tiny().checkpoint.display().to_string());
    let [gemma, upsampler] = [&tiny().gemma, &tiny().upsampler].map(|p| p.display().to_string());
    let files = ["--gemma-root", &gemma, "--spatial-upsampler-path", &upsampler, "--device", "cpu"];
    let peak = |more: &[&str]| {
        let (text, facts) = info(&place, &model, &[&files[..], more].concat());
        assert!(text.contains("pipeline distilled, ") && text.contains("memory: "), "{text}");
        facts["memory"]["host_peak_bytes"].as_u64().unwrap()
    };
    let (small, large) = (peak(&SHAPE), peak(&["--size", "256x256", "--num-frames", "25"]));
    assert!(small > 0 && small < large, "{small} and {large}");
    // The estimate is that of the plan.
    let plan = with(["compile", "--checkpoint-path", &model].map(String::from).into(), &files);
    let done = place.ok(&with(plan, &[&SHAPE[..], &["-o", "a.ltxplan", "--json"]].concat()));
    let facts: Value = serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(facts["facts"]["host_peak_bytes"], small);
    for flags in [["--spatial-upsampler-path", &upsampler], ["--size", "96x64"]] {
        place.refused(&[&["info", &model], &flags[..]].concat(), &["`--gemma-root`"]);
        place.refused(&[&["info", &upsampler], &flags[..]].concat(), &["is no model", "leave them out"]);
    }
}

#[test]
fn contexts_are_written_under_both_names() {
    let place = Place::new();
    let write = |command: &[&str], output: &str| {
        let args = [command.iter().map(|s| s.to_string()).collect(), tiny().model_args()].concat();
        place.ok(&with(args, &["-p", "rain", "-o", output]));
        place.read(output)
    };
    assert!(write(&["encode-text"], "a.safetensors") == write(&["debug", "text", "export"], "b.safetensors"));
}
