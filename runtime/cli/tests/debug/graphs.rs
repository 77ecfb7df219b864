//! Logs of commands that run single graphs: the same flags, variables and numbers as in a run.

use std::path::{Path, PathBuf};

use ltxc::debug::entries::{Log, parse};
use ltxc::debug::recording::TensorFile;
use serde_json::Value;

use crate::binary::{Done, Place, SHAPE, sentence, tiny, with};
use crate::faults::with_tensor;
use crate::root;

fn fixture(name: &str) -> String {
    root().join(name).display().to_string()
}

fn recording(name: &str) -> PathBuf {
    let places = ["expected-1.2.0", "expected"].map(|d| root().join(d).join(format!("{name}.safetensors")));
    places.into_iter().find(|p| p.is_file()).expect("it was recorded")
}

fn log(place: &Place, name: &str) -> Log {
    parse(&String::from_utf8(place.read(name)).expect("logs are text"))
}

/// Compares a sum of a log with that of a recorded tensor, within what f32 loses in adding it up.
#[track_caller]
fn same_sum(log: &Log, key: &str, values: &[f64]) {
    let entry = log.entries.iter().find(|e| e.key() == key).unwrap_or_else(|| panic!("no `{key}` in {log:?}"));
    let (sum, size) = (values.iter().sum::<f64>(), values.iter().map(|v| v.abs()).sum::<f64>());
    assert!((entry.value - sum).abs() < 1e-5 * size.max(1.0), "{key}: {} and {sum}", entry.value);
}

/// A command on a model of the fixtures.
fn on(place: &Place, command: &[&str], model: &str, more: &[&str]) -> Done {
    place.run(&[&["debug"], command, &["--checkpoint-path", model], more].concat())
}

#[test]
fn one_call_logs_the_sums_that_the_reference_has() {
    let place = Place::new();
    let model = fixture("tiny-ltx23/ltx-2.3-tiny.safetensors");
    let file = recording("ltx23/transformer");
    let path = file.display().to_string();
    let logs = [
        "--debug-model-sums-path",
        "deep/model.log",
        "--debug-model-detail-path",
        "detail.log",
        "--debug-module-sums-path",
        "module.log",
        "--debug-module-sums-include",
        "blocks.1.",
        "--debug-prefix",
        "fastvideo",
        "--debug-f64",
        "--trace-activations",
        "--trace-layers",
        "attn1$",
        "--trace-stats",
        "abs_mean,sum,shape",
        "--trace-output",
        "trace.jsonl",
        "--dump-tensors",
        r"blocks\.0\.video$",
        "--tap-path",
        "taps.safetensors",
        "--check-nan",
        "--profile",
        "profile.json",
    ];
    let done = on(
        &place,
        &["step"],
        &model,
        &with(vec!["--inputs".into(), path], &logs).iter().map(String::as_str).collect::<Vec<_>>(),
    );
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let recorded = TensorFile::open(&file).unwrap();
    let values = |name: &str| recorded.find(name).unwrap_or_else(|| panic!("no {name}")).floats();
    let sums = log(&place, "deep/model.log");
    for (key, name) in [
        ("modality_video.latent_sum", "in.video.latent"),
        ("modality_audio.positions_sum", "in.audio.positions"),
        ("prep_video.x_sum", "prep.video.x"),
        ("prep_video.pe_cos_sum", "prep.video.rope_cos"),
        ("prep_video.cross_pe_sin_sum", "prep.video.cross_rope_sin"),
        ("prep_audio.pe_sin_sum", "prep.audio.rope_sin"),
        ("prep_audio.cross_pe_cos_sum", "prep.audio.cross_rope_cos"),
        ("block=0.video_sum", "uniform.block0.video"),
        ("block=1.audio_sum", "uniform.block1.audio"),
    ] {
        same_sum(&sums, key, values(name));
    }
    for (part, is_there) in [("mode=exact", true), ("text_padding=1024", true), ("seed=10", true), ("noise.", false)] {
        let header = String::from_utf8(place.read("deep/model.log")).unwrap().lines().next().unwrap().to_string();
        assert_eq!(header.contains(part), is_there, "{part}: {header}");
    }
    let text = String::from_utf8(place.read("deep/model.log")).unwrap();
    assert!(text.contains("\n# step=0 pass=cond\nfastvideo:modality_video:latent_sum="), "{text}");
    let detail = log(&place, "detail.log");
    assert!(detail.entries.iter().any(|e| e.key() == "block=1:video_to_audio_attn.out_sum_f64"), "{detail:?}");
    let modules = String::from_utf8(place.read("module.log")).unwrap();
    let lines: Vec<&str> = modules.lines().filter(|l| !l.starts_with('#')).collect();
    assert!(
        !lines.is_empty() && lines.iter().all(|l| l.starts_with("fastvideo:module=transformer.transformer_blocks.1."))
    );
    let trace = String::from_utf8(place.read("trace.jsonl")).unwrap();
    let records: Vec<Value> = trace.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(records.len() >= 4 && records.iter().all(|r| r["step"].is_null() && r["abs_mean"].is_f64()), "{trace}");
    let taps = TensorFile::open(&place.path("taps.safetensors")).unwrap();
    let found = taps.find("transformer.blocks.0.video").expect("it was captured").floats();
    let expected = values("uniform.block0.video");
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?}");
    assert!(String::from_utf8(place.read("profile.json")).unwrap().contains("traceEvents"));
}

#[test]
fn the_text_side_logs_the_states_that_the_reference_has() {
    let place = Place::new();
    let prompts = TensorFile::open(&recording("gemma3/tokenizer")).unwrap().meta()["prompts"].clone();
    let prompt = prompts["pos"].as_str().unwrap().to_string();
    let gemma = fixture("tiny-gemma3");
    let model = fixture("tiny-ltx2/ltx-2-tiny.safetensors");
    let args = [
        "--gemma-root",
        &gemma,
        "-p",
        &prompt,
        "--prompt2",
        "x",
        "--debug-gemma-path",
        "g.log",
        "--debug-model-sums-path",
        "m.log",
    ];
    let done = on(&place, &["text", "diff"], &model, &args);
    assert!(done.stdout.contains("hidden 0"), "{}{}", done.stdout, done.stderr);
    let hidden = TensorFile::open(&recording("gemma3/gemma_hidden")).unwrap();
    let states = log(&place, "g.log");
    for i in [0, 1, 2] {
        let recorded = hidden.find(&format!("pos.hidden.{i}")).expect("it was recorded").floats();
        same_sum(&states, &format!("gemma_hidden_state_{i}.sum"), recorded);
    }
    let context = TensorFile::open(&recording("ltx2/text_context")).unwrap();
    same_sum(
        &log(&place, "m.log"),
        "gemma_video_encoding.sum",
        context.find("pos.video_context").expect("recorded").floats(),
    );
}

#[test]
fn decoders_log_their_modules_and_variables_say_so_too() {
    let place = Place::new();
    let model = fixture("tiny-ltx2/ltx-2-tiny.safetensors");
    let file = recording("ltx2/video_vae");
    let recorded = TensorFile::open(&file).unwrap();
    let args = [
        "debug",
        "vae",
        "decode",
        "--checkpoint-path",
        &model,
        "--latent",
        &file.display().to_string(),
        "--tensor",
        "dec.latent",
    ];
    let mut command = place.command(&args);
    command
        .env("FASTVIDEO_DEBUG_MODULE_SUMS_PATH", place.path("m.log"))
        .env("FASTVIDEO_DEBUG_MODULE_SUMS_INCLUDE", "conv_in,conv_out")
        // A decoder has none of these, which is no failure of a variable that holds for all commands.
        .env("LTX2_DEBUG_DIR", place.path("logs"))
        .env("FASTVIDEO_DEBUG_STAGE_SUMS_PATH", place.path("stages.log"));
    let done: Done = command.output().unwrap().into();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(!place.path("logs").exists() && !place.path("stages.log").exists());
    let sums = log(&place, "m.log");
    same_sum(&sums, "module=vae.decoder.conv_in.out_sum", recorded.find("dec.conv_in").expect("recorded").floats());
    assert!(sums.entries.iter().all(|e| e.about.contains("conv_")), "{sums:?}");
    // Every part of a model that runs alone.
    let upsampler = fixture("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors");
    for (command, more) in [
        ("trace", &["--grid", "1,2,2"][..]),
        ("upscale", &["--grid", "1,2,2", "--spatial-upsampler-path", &upsampler]),
        ("audio", &["--seconds", "0.2"]),
        ("tiles", &["--grid", "2,4,4"]),
    ] {
        let done = on(&place, &["vae", command], &model, &[more, &["--debug-module-sums-path", "each.log"]].concat());
        assert!(matches!(done.code, Some(0 | 1)), "{command}: {}", done.stderr);
        assert!(log(&place, "each.log").entries.len() > 3, "{command}");
    }
}

#[test]
fn flags_of_logs_that_cannot_be_are_refused() {
    let place = Place::new();
    let model = fixture("tiny-ltx2/ltx-2-tiny.safetensors");
    let gemma = fixture("tiny-gemma3");
    let refused = |command: &[&str], more: &[&str], words: &[&str]| {
        let args = [&["debug"], command, &["--checkpoint-path", &model], more].concat();
        place.refused(&args, words);
    };
    refused(&["vae", "decode"], &["--debug-gemma-path", "x"], &["`--debug-gemma-path` is about text_encoder"]);
    refused(&["vae", "decode"], &["--debug-stage-sums"], &["--debug-stage-sums"]);
    refused(&["step"], &["--debug-stage-sums"], &["runs of pipelines", "--pipeline"]);
    refused(&["step"], &["--debug-mode", "fused"], &["runs of pipelines"]);
    refused(&["step"], &["--trace-activations", "--trace-steps", "1"], &["`--trace-steps`"]);
    refused(&["step"], &["--debug-f64"], &["does nothing without a log of sums"]);
    refused(&["export"], &["--out", "x.pt", "--tap-path", "y"], &["nothing without `--tap`"]);
    let text = ["--gemma-root", &gemma, "-p", "a fox"];
    refused(&["text", "stats"], &[&text[..], &["--debug-model-detail"]].concat(), &["is about transformer"]);
    place.refused(&["debug", "latents", "x.safetensors", "--check-nan"], &["nothing is run", "--step"]);
}

#[test]
fn every_block_is_judged_on_its_own_with_one_command() {
    let place = Place::new();
    let model = fixture("tiny-ltx23/ltx-2.3-tiny.safetensors");
    assert_eq!(on(&place, &["export"], &model, &["--out", "call.pt"]).code, Some(0));
    let block = |model: &str| {
        on(&place, &["block"], model, &["--compare", "call.pt", "--json", "--debug-model-detail-path", "d.log"])
    };
    let done = block(&model);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    for name in ["uniform.block0.video", "uniform.block1.audio", "uniform.blocks.1.attn2.to_k"] {
        assert!(done.stdout.contains(name), "no {name} in {}", done.stdout);
    }
    let text = String::from_utf8(place.read("d.log")).unwrap();
    assert!(
        text.contains("run=block0") && text.contains("run=block1") && text.contains("ltxc:1:attn1:out_sum="),
        "{text}"
    );
    let key = "model.diffusion_model.transformer_blocks.0.attn2.to_v.weight";
    let faulty = with_tensor(&place, Path::new(&model), key, |bytes| bytes.fill(0));
    let done = block(&faulty.display().to_string());
    let facts: Value = serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(facts["first"]["tensor"], "uniform.blocks.0.attn2.to_v");
    // The next block gets what was recorded, not what this one made of it.
    let bad: Vec<&str> = facts["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|t| t["ok"] == false)
        .filter_map(|t| t["tensor"].as_str())
        .collect();
    assert!(bad.iter().all(|name| !name.contains("block1.") && !name.contains("blocks.1.")), "{bad:?}");
}

#[test]
fn two_settings_of_a_built_in_pipeline_are_compared() {
    let place = Place::new();
    let args = [
        "debug",
        "bisect",
        "two-stage",
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--debug-stage-sums-path",
        "s.log",
        "--debug-model-sums-path",
        "m.log",
    ];
    let done = place.run(&args);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.contains("the settings agree"), "{}", done.stdout);
    for (name, mode) in [
        ("s.a.log", "mode=exact"),
        ("s.b.log", "mode=fused"),
        ("m.a.log", "run=fuse=exact"),
        ("m.b.log", "run=fuse=full"),
    ] {
        let text = String::from_utf8(place.read(name)).unwrap();
        assert!(text.lines().next().is_some_and(|header| header.contains(mode)), "{name}: {text}");
    }
    assert!(place.ok(&["debug", "compare", "s.a.log", "s.b.log"]).stdout.contains("entries agree"));
    let refused = |more: &[&str], words: &[&str]| {
        sentence(
            &place.run(&[&["debug", "bisect", "two-stage", "--preset", "tiny", "--device", "cpu"], more].concat()),
            words,
        );
    };
    refused(&["--debug-mode", "exact"], &["fuse=exact"]);
    refused(&["--ref", "logs", "--check-nan"], &["leave their flags out"]);
    refused(&["--pipeline", "distilled"], &["--pipeline"]);
    // A pipeline that needs an adapter says so where it has none.
    let model = with(tiny().model_args(), &["--pipeline", "two-stage", "-H", "128", "-W", "128", "--num-frames", "9"]);
    let done = place.run(&[&["debug".to_string(), "bisect".into()], &model[..]].concat());
    sentence(&done, &["needs the distilled LoRA"]);
}

#[test]
fn short_runs_of_pipelines_log_what_runs_log() {
    let place = Place::new();
    let args = [
        "debug",
        "pipeline",
        "one-stage",
        "--preset",
        "tiny",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--debug-model-sums-path",
        "m.log",
        "--debug-stage-sums-path",
        "s.log",
    ];
    let done = place.run(&args);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    let sums = log(&place, "m.log");
    let steps: std::collections::BTreeSet<_> = sums.entries.iter().filter_map(|e| e.step.clone()).collect();
    assert!(steps.contains("step=1 pass=uncond"), "{steps:?}");
    let stages = String::from_utf8(place.read("s.log")).unwrap();
    let last = stages.lines().last().unwrap();
    assert!(done.stdout.contains(last), "{last} of {}", done.stdout);
    // With another run behind it in the same file, each shows its own lines.
    let done = place.run(&with(args.map(String::from).into(), &["--debug-append"]));
    assert_eq!(done.stdout.matches(last).count(), 1, "{}", done.stdout);
    assert_eq!(String::from_utf8(place.read("s.log")).unwrap(), stages.repeat(2));
}

#[test]
fn captured_tensors_are_compared_one_by_one() {
    let place = Place::new();
    let run = |checkpoint: &Path, name: &str| {
        let model = tiny().model_args_with(checkpoint, &tiny().gemma);
        let args = [&["run".to_string()], &model[..], &SHAPE.map(String::from)].concat();
        let more = [
            "--pipeline",
            "distilled-one-stage",
            "--device",
            "cpu",
            "-p",
            "x",
            "-o",
            "a.wav",
            "--debug-mode",
            "exact",
            "--dump-tensors",
            r"blocks\.\d\.attn",
            "--tap-path",
            name,
        ];
        let done = place.run(&with(args, &more));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
    };
    run(&tiny().checkpoint, "a.safetensors");
    let key = "model.diffusion_model.transformer_blocks.1.attn2.to_v.weight";
    let faulty = with_tensor(&place, &tiny().checkpoint, key, |bytes| bytes.fill(0));
    run(&faulty, "b.safetensors");
    place.ok(&["debug", "compare", "a.safetensors", "a.safetensors"]);
    let compare = |more: &[&str]| {
        let done = place.run(&[&["debug", "compare", "b.safetensors", "a.safetensors", "--json"], more].concat());
        (done.code, serde_json::from_str::<Value>(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr)))
    };
    let (code, facts) = compare(&[]);
    assert_eq!(
        (code, facts["first"]["tensor"].as_str()),
        (Some(1), Some("transformer.blocks.1.attn2.to_v@stage1.step0"))
    );
    for number in ["relative_mean", "pearson", "mse", "cosine", "first_differing"] {
        assert!(facts["first"][number].is_number(), "{number}: {}", facts["first"]);
    }
    let (code, facts) = compare(&["--dump-tensors", r"blocks\.0.*step0"]);
    assert_eq!((code, facts["agrees"].as_bool()), (Some(0), Some(true)), "{facts}");
    let (code, facts) = compare(&["--dump-tensors", r"blocks\.1\.attn1.*step0", "--correlation", "0.9999"]);
    assert_eq!(code, Some(0), "{facts}");
    place.write("a.log", b"ltxc:block=0:video_sum=1.0\n");
    place.refused(&["debug", "compare", "a.log", "a.safetensors"], &["two of a kind"]);
    place.refused(&["debug", "compare", "a.log", "a.log", "--correlation", "0.9"], &["these are logs"]);
}

#[test]
fn values_of_fused_kernels_are_checked_for_nan_too() {
    let place = Place::new();
    let args = [&["debug".to_string(), "nan".into()], &tiny().model_args()[..], &SHAPE.map(String::from)].concat();
    let nan = |mode: &str| {
        let done = place
            .run(&with(args.clone(), &["--pipeline", "distilled-one-stage", "--device", "cpu", "--debug-mode", mode]));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let count = done.stdout.split_whitespace().find_map(|word| word.parse::<usize>().ok());
        count.unwrap_or_else(|| panic!("{}", done.stdout))
    };
    // Fewer values exist between fused kernels.
    assert!(nan("fused") < nan("exact"));
}
