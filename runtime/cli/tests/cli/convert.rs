//! `ltxc convert`: layouts, dtypes, merged LoRAs, dialects and rules, there and back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_models::audio::{AudioVaeConfig, VocoderConfig};
use ltxc_models::checkpoint::{Checkpoint, WeightFile};
use ltxc_models::lora::LoraFile;
use ltxc_models::text::Connectors;
use ltxc_models::transformer::TransformerConfig;
use ltxc_models::video_vae::VideoVaeConfig;
use serde_json::{Value, json};

use crate::bad_files::Parts;
use crate::binary::{Place, SHAPE, fixtures, sentence, with};

const FAMILIES: [&str; 2] = ["ltx2", "ltx23"];

fn model(family: &str) -> PathBuf {
    let name = if family == "ltx2" { "tiny-ltx2/ltx-2-tiny" } else { "tiny-ltx23/ltx-2.3-tiny" };
    fixtures().join(format!("{name}.safetensors"))
}

fn lora(family: &str) -> String {
    fixtures().join(format!("tiny-{family}/lora-rank4-tiny.safetensors")).display().to_string()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// `convert` with these arguments, in a place; gives what is written.
#[track_caller]
fn convert(place: &Place, input: &Path, output: &str, more: &[&str]) -> PathBuf {
    let input = text(input);
    let args = [&["convert", &input, "-o", output], more].concat();
    let done = place.ok(&args);
    assert_eq!(done.stdout.trim(), output, "{}", done.stderr);
    place.path(output)
}

/// Statistics that diffusers folders have no place for and nothing reads.
fn is_unread(key: &str) -> bool {
    key.ends_with("statistics.channel") || key.contains("mean-of-stds")
}

/// Type and bytes of every tensor that something reads.
fn content(path: &Path) -> BTreeMap<String, (String, Vec<u8>)> {
    let checkpoint = Checkpoint::open(path).unwrap_or_else(|e| panic!("{e}"));
    let tensors = checkpoint.tensors().filter(|(key, _)| !is_unread(key)).map(|(key, at)| {
        let ty = format!("{} {:?}", at.stored.dtype, at.stored.shape);
        (key.to_string(), (ty, checkpoint.data(key).unwrap().to_vec()))
    });
    tensors.collect()
}

#[track_caller]
fn assert_same_content(a: &Path, b: &Path) {
    let (a, b) = (content(a), content(b));
    let differ: Vec<&String> = a.keys().chain(b.keys()).filter(|key| a.get(*key) != b.get(*key)).take(5).collect();
    assert!(differ.is_empty(), "{} and {} tensors, {differ:?} differ", a.len(), b.len());
}

/// The settings that graphs are built from, all of them comparable.
fn settings(path: &Path) -> impl PartialEq + std::fmt::Debug + use<> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let section = |name: &str| checkpoint.section(name).unwrap().clone();
    (
        checkpoint.model_version().map(String::from),
        TransformerConfig::from_json(&section("transformer")).unwrap(),
        Connectors::from_json(&section("transformer")).unwrap(),
        VideoVaeConfig::from_json(&section("vae")).unwrap(),
        AudioVaeConfig::from_json(&section("audio_vae")).unwrap(),
        VocoderConfig::from_json(&section("vocoder")).unwrap(),
    )
}

/// Pictures and sound of a short run with a model.
#[track_caller]
fn run(place: &Place, family: &str, checkpoint: &Path, more: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    let upsampler = match family {
        "ltx2" => "tiny-ltx2/spatial-upscaler-x2-tiny.safetensors",
        _ => "tiny-ltx23/spatial-upscaler-x2-ltx23-tiny.safetensors",
    };
    let (upsampler, gemma) = (text(&fixtures().join(upsampler)), text(&fixtures().join("tiny-gemma3")));
    let files = ["run", "--checkpoint-path", &text(checkpoint), "--gemma-root", &gemma].map(String::from);
    let rest = ["--spatial-upsampler-path", &upsampler, "--device", "cpu", "-p", "rain"];
    let common = with(files.into(), &[&SHAPE[..], &rest, more].concat());
    let mut out = BTreeMap::new();
    place.ok(&with(common.clone(), &["-o", "out.wav"]));
    out.insert("out.wav".into(), place.read("out.wav"));
    place.ok(&with(common, &["-o", "frames"]));
    let frames = place.path("frames");
    for entry in
        std::fs::read_dir(&frames).unwrap().flatten().filter(|e| e.path().extension().is_some_and(|x| x == "png"))
    {
        out.insert(entry.file_name().into(), std::fs::read(entry.path()).unwrap());
    }
    assert!(out.len() > 9, "{:?}", out.keys());
    std::fs::remove_dir_all(frames).unwrap();
    out
}

// ------------------------------------------------------------------------------------------------------------ layouts

#[test]
fn diffusers_folders_and_back_keep_every_bit() {
    for family in FAMILIES {
        let (place, original) = (Place::new(), model(family));
        let folder = convert(&place, &original, "folder", &["--to", "diffusers"]);
        let names: Vec<String> = ["transformer", "connectors", "vae", "audio_vae", "vocoder"].map(String::from).into();
        for name in &names {
            assert!(folder.join(name).join("config.json").is_file(), "{name}");
            assert!(folder.join(name).join("diffusion_pytorch_model.safetensors").is_file(), "{name}");
        }
        let index: Value = serde_json::from_slice(&std::fs::read(folder.join("model_index.json")).unwrap()).unwrap();
        assert_eq!(index["transformer"], json!(["diffusers", "LTX2VideoTransformer3DModel"]));
        let back = convert(&place, &folder, "back.safetensors", &[]);
        for copy in [&folder, &back] {
            assert_same_content(&original, copy);
            assert_eq!(settings(&original), settings(copy));
        }
        // Once more: nothing is lost that was there the first time.
        let again = convert(&place, &back, "again", &["--to", "diffusers"]);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), std::fs::read_dir(&again).unwrap().count());
        assert_same_content(&folder, &again);
        for (a, b) in [(&original, &folder), (&folder, &back), (&back, &original)] {
            let done = place.ok(&["debug", "weights", &text(a), "--against", &text(b), "--json"]);
            let facts: Value = serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap();
            assert_eq!((&facts["ok"], &facts["different"], &facts["only"]), (&json!(true), &json!([]), &json!([])));
        }
        assert!(run(&place, family, &original, &[]) == run(&place, family, &folder, &[]), "{family} runs otherwise");
    }
}

#[test]
fn split_files_run_as_the_single_file() {
    for family in FAMILIES {
        let (place, original) = (Place::new(), model(family));
        let split = convert(&place, &original, "split", &["--to", "split"]);
        let stem = original.file_stem().unwrap().to_string_lossy().into_owned();
        let part = |folder: &str, end: &str| split.join(folder).join(format!("{stem}-{end}.safetensors"));
        let video = WeightFile::open(&part("vae", "video-vae")).unwrap();
        assert!(video.header().has_prefix("decoder.") && !video.header().has_prefix("vae."));
        let transformer = WeightFile::open(&part("diffusion_models", "transformer")).unwrap();
        assert!(transformer.header().has_prefix("text_embedding_projection."));
        let sections: Vec<&String> = transformer.metadata().config.as_ref().unwrap().keys().collect();
        assert_eq!(sections, ["scheduler", "transformer"]);
        assert!(part("vae", "audio-vae").is_file());
        let back = convert(&place, &split, "back.safetensors", &["--to", "single"]);
        for copy in [&split, &back] {
            assert_same_content(&original, copy);
            assert_eq!(settings(&original), settings(copy));
            // Split files have a place for everything.
            let count = |path: &Path| Checkpoint::open(path).unwrap().tensors().count();
            assert_eq!(count(&original), count(copy));
            let config = |path: &Path| Checkpoint::open(path).unwrap().config().clone();
            assert_eq!(config(&original), config(copy));
        }
        assert!(run(&place, family, &original, &[]) == run(&place, family, &split, &[]), "{family} runs otherwise");
    }
}

#[test]
fn headers_are_carried() {
    let place = Place::new();
    let mut parts = Parts::read(&model("ltx2"));
    parts.header["__metadata__"]["model_version"] = "2.0.7".into();
    parts.header["__metadata__"]["license"] = "what may be done".into();
    let input = place.write("ltx-2-tiny-dev.safetensors", &parts.bytes());
    for (to, output) in [("split", "split"), ("diffusers", "folder")] {
        let middle = convert(&place, &input, output, &["--to", to]);
        let back = convert(&place, &middle, &format!("{to}.safetensors"), &[]);
        let header = WeightFile::open(&back).unwrap().header().metadata.clone();
        assert_eq!((header["model_version"].as_str(), header["license"].as_str()), ("2.0.7", "what may be done"));
    }
    let scheduler = std::fs::read(place.path("folder/scheduler/scheduler_config.json")).unwrap();
    let scheduler: Value = serde_json::from_slice(&scheduler).unwrap();
    assert_eq!((&scheduler["use_dynamic_shifting"], &scheduler["shift_terminal"]), (&json!(true), &json!(0.1)));
}

#[test]
fn what_a_layout_cannot_hold_is_refused() {
    let (place, input) = (Place::new(), text(&model("ltx2")));
    let refused = |parts: Parts, words: &[&str]| {
        let path = text(&place.write("changed.safetensors", &parts.bytes()));
        place.refused(&["convert", &path, "--to", "diffusers", "-o", "out"], words);
        std::fs::remove_file(path).unwrap();
    };
    let mut parts = Parts::read(&model("ltx2"));
    parts.configure(|c| c["vae"]["latent_log_var"] = "per_channel".into());
    refused(parts, &["`vae`", "besides those of the published models", "write a single file or split files"]);
    let mut parts = Parts::read(&model("ltx2"));
    parts.configure(|c| {
        c["vae"]["encoder_blocks"].as_array_mut().unwrap().push(json!(["res_x", {"num_layers": 1}]));
    });
    refused(parts, &["`vae`", "do not take turns"]);
    let mut parts = Parts::read(&model("ltx2"));
    parts.configure(|c| c["audio_vae"]["preprocessing"]["stft"]["filter_length"] = 512.into());
    refused(parts, &["`audio_vae`", "a diffusers folder cannot hold"]);
    let without = |part: &'static str| Parts::read(&model("ltx2")).without(move |key| key.contains(part));
    refused(without("text_embedding_projection"), &["needs a text projection", "name files that have both"]);
    let mut parts = Parts::read(&model("ltx2"));
    parts.rename_to("model.diffusion_model.proj_out.bias", "model.diffusion_model.proj_in.bias");
    refused(parts, &["1 of the tensors", "`model.diffusion_model.proj_in.bias`"]);

    let folder = convert(&place, &model("ltx2"), "folder", &["--to", "diffusers"]);
    std::fs::remove_file(folder.join("vae/config.json")).unwrap();
    place.refused(&["convert", &text(&folder), "-o", "back.safetensors"], &["vae/config.json", "cannot read"]);
    place.refused(&["convert", &input, "--to", "split", "-o", "folder"], &["`folder`", "is not empty"]);
    place.refused(&["convert", &input, "-o", "folder"], &["`folder`", "it is a folder"]);
}

#[test]
fn wrong_files_and_places_are_refused() {
    let (place, input) = (Place::new(), text(&model("ltx2")));
    let fixture = |name: &str| text(&fixtures().join(name));
    place.refused(&["convert", &input, "--to", "kohya", "-o", "out"], &["is a model", "dialect of LoRAs"]);
    let upsampler = fixture("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors");
    place.refused(&["convert", &upsampler, "-o", "out"], &["is no part of an LTX-2 model", "Upsampler"]);
    place.refused(
        &["convert", &fixture("tiny-gemma3/model.safetensors"), "-o", "out"],
        &["is no part of an LTX-2 model"],
    );
    place.refused(&["convert", "nowhere", "-o", "out"], &["nowhere"]);
    let gguf = text(&place.write("model.gguf", b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"));
    let words = ["model.gguf", "is GGUF", "does not run", "use the safetensors file"];
    place.refused(&["convert", &gguf, "-o", "out"], &words);
    place.refused(&["compile", "--checkpoint-path", &gguf, "-o", "a.ltxplan"], &words);
    let copy = text(&place.write("copy.safetensors", &std::fs::read(&input).unwrap()));
    place.refused(&["convert", &copy, "-o", "copy.safetensors", "--dtype", "f32"], &["is what is read"]);
    place.refused(&["convert", &copy, "-o", "./copy.safetensors"], &["is what is read"]);
}

/// A file that is far larger than any disk, but takes no space on this one.
#[cfg(unix)]
#[test]
fn disks_that_are_too_small_are_refused_before_writing() {
    let place = Place::new();
    let bytes = 8u64 << 40;
    let header = json!({"w": {"dtype": "F32", "shape": [bytes / 4], "data_offsets": [0, bytes]}}).to_string();
    let head = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let path = place.write("large.safetensors", &head);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(head.len() as u64 + bytes).unwrap();
    place.write("rules.toml", b"[metadata]\na = 'b'\n");
    let args = ["convert", "large.safetensors", "--map", "rules.toml", "-o", "out.safetensors"];
    place.refused(&args, &["out.safetensors", "needs 8.8 TB", "free on its disk", "make room"]);
}

// ------------------------------------------------------------------------------------------------------------- dtypes

/// Values of a tensor as a run reads it.
fn values(checkpoint: &Checkpoint, key: &str) -> Vec<f32> {
    let at = checkpoint.tensor(key).unwrap();
    let values = Tensor::from_bytes(at.stored.ty().unwrap(), checkpoint.data(key).unwrap()).to_f32();
    let scale = checkpoint.data(&format!("{key}_scale")).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    match scale {
        Some(scale) => values.iter().map(|v| bf16::from_f32(v * scale).to_f32()).collect(),
        None => values,
    }
}

#[test]
fn wider_dtypes_hold_the_same_numbers() {
    let (place, original) = (Place::new(), model("ltx2"));
    let wide = convert(&place, &original, "wide.safetensors", &["--dtype", "f32"]);
    let (a, b) = (Checkpoint::open(&original).unwrap(), Checkpoint::open(&wide).unwrap());
    assert_eq!(a.tensors().count(), b.tensors().count());
    for (key, at) in b.tensors() {
        assert_eq!(at.stored.ty().unwrap().dtype, DType::F32, "{key}");
        assert_eq!(values(&a, key), values(&b, key), "{key}");
    }
    let narrow = convert(&place, &wide, "narrow.safetensors", &["--dtype", "bf16"]);
    assert_same_content(&original, &narrow);
    let half = convert(&place, &wide, "half", &["--dtype", "f16", "--to", "diffusers"]);
    let half = Checkpoint::open(&half).unwrap();
    for (key, at) in half.tensors() {
        assert_eq!(at.stored.ty().unwrap().dtype, DType::F16, "{key}");
        let expected: Vec<f32> = values(&a, key).iter().map(|&v| f16::from_f32(v).to_f32()).collect();
        assert_eq!(values(&half, key), expected, "{key}");
    }
}

#[test]
fn fp8_is_what_published_files_have() {
    for family in FAMILIES {
        let (place, original) = (Place::new(), model(family));
        let args = ["--dtype", "fp8", "--fp8-blocks", "1-1"];
        let narrow = convert(&place, &original, "narrow.safetensors", &args);
        let (a, b) = (Checkpoint::open(&original).unwrap(), Checkpoint::open(&narrow).unwrap());
        let mut count = 0;
        for (key, at) in a.tensors() {
            let is_linear =
                key.contains(".transformer_blocks.1.") && key.ends_with(".weight") && at.stored.shape.len() == 2;
            assert_eq!(b.is_fp8(key), is_linear, "{key}");
            if !is_linear {
                assert_eq!(a.data(key), b.data(key), "{key}");
                continue;
            }
            count += 1;
            let (x, y) = (values(&a, key), values(&b, key));
            let most = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            // 3 bits of mantissa and a rounding to bf16, or half a step of the smallest codes.
            let is_near = |(x, y): (&f32, &f32)| (x - y).abs() <= (x.abs() / 15.0).max(most / 448.0 / 1024.0);
            assert!(x.iter().zip(&y).all(is_near), "{key}");
            let scale = b.data(&format!("{key}_scale")).map(|b| f32::from_le_bytes(b.try_into().unwrap())).unwrap();
            assert_eq!(scale, 1.0 / (448.0 / most), "{key}");
        }
        // Linear layers of a block: 6 attentions with 4 or (gated) 5, and two feed-forwards with 2.
        assert_eq!(count, if family == "ltx2" { 28 } else { 34 });
        let wide = convert(&place, &narrow, "wide", &["--dtype", "bf16", "--to", "split"]);
        assert!(!content(&wide).keys().any(|key| key.ends_with("_scale")));
        assert!(run(&place, family, &narrow, &[]) == run(&place, family, &wide, &[]), "{family}");
        // A layout alone changes nothing of it.
        let folder = convert(&place, &narrow, "folder", &["--to", "diffusers"]);
        assert_same_content(&narrow, &folder);
        let path = text(&narrow);
        place.refused(&["convert", &path, "--dtype", "fp8", "-o", "twice"], &["is stored in fp8 already"]);
    }
    let (place, path) = (Place::new(), text(&model("ltx2")));
    let blocks =
        Checkpoint::open(&model("ltx2")).unwrap().section("transformer").unwrap()["num_layers"].as_u64().unwrap();
    let args = ["convert", &path, "--dtype", "fp8", "-o", "out"];
    match blocks {
        0..=4 => place.refused(&args, &["leave 2 blocks at either end", &format!("has {blocks}"), "--fp8-blocks"]),
        _ => place.ok(&args).stdout,
    };
    for wrong in ["1", &format!("0-{blocks}"), "1-0", "a-b"] {
        let args = ["convert", &path, "--dtype", "fp8", "--fp8-blocks", wrong, "-o", "out"];
        place.refused(&args, &["names no blocks", &format!("from 0 to {}", blocks - 1)]);
    }
    place.refused(&["convert", &path, "--fp8-blocks", "0-1", "-o", "out"], &["is for `--dtype fp8`"]);
}

// ------------------------------------------------------------------------------------------------------ merged LoRAs

#[test]
fn merged_models_run_as_with_the_adapter() {
    for family in FAMILIES {
        let (place, original, lora) = (Place::new(), model(family), lora(family));
        let distilled = text(&fixtures().join(format!("tiny-{family}/distilled-lora-tiny.safetensors")));
        let both = ["--lora", &lora, "0.5", "--lora", &distilled];
        let expected = run(&place, family, &original, &both);
        let merged = convert(&place, &original, "merged.safetensors", &both);
        assert!(expected == run(&place, family, &merged, &[]), "{family}: merged and live differ");
        assert!(expected != run(&place, family, &original, &[]), "{family}: the adapters do nothing");
        // The same in another layout, and nothing else has changed.
        let folder = convert(&place, &original, "folder", &[&both[..], &["--to", "diffusers"]].concat());
        assert_same_content(&merged, &folder);
        let (a, b) = (content(&original), content(&merged));
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        let changed = a.iter().filter(|(key, value)| b.get(*key) != Some(value)).count();
        let layers = |path: &str| LoraFile::open(path.as_ref()).unwrap().modules().len();
        assert!(changed > 0 && changed <= layers(&lora) + layers(&distilled), "{changed}");
    }
}

#[test]
fn adapters_are_merged_into_fp8_as_a_run_reads_it() {
    let (place, lora) = (Place::new(), lora("ltx2"));
    let narrow = convert(&place, &model("ltx2"), "narrow.safetensors", &["--dtype", "fp8", "--fp8-blocks", "0-1"]);
    let merged = convert(&place, &narrow, "merged.safetensors", &["--lora", &lora]);
    let (a, b) = (Checkpoint::open(&narrow).unwrap(), Checkpoint::open(&merged).unwrap());
    let widened: Vec<&str> = a.tensors().map(|(key, _)| key).filter(|key| a.is_fp8(key) && !b.is_fp8(key)).collect();
    assert!(!widened.is_empty() && b.has_fp8());
    assert!(widened.iter().all(|key| b.tensor(&format!("{key}_scale")).is_none()), "a scale without its weight");
    assert!(run(&place, "ltx2", &narrow, &["--lora", &lora]) == run(&place, "ltx2", &merged, &[]));
}

#[test]
fn adapters_that_do_not_fit_are_not_merged() {
    let (place, path) = (Place::new(), text(&model("ltx2")));
    let merge = |lora: &[&str]| {
        [&["convert", &path, "-o", "out", "--lora"], lora].concat().iter().map(|s| s.to_string()).collect::<Vec<_>>()
    };
    place.refused(&merge(&[&lora("ltx23")]), &["LTX-2"]);
    place.refused(&merge(&[&lora("ltx2"), "much"]), &["strength `much` is not a number"]);
    place.refused(&merge(&[&lora("ltx2"), "stage=1"]), &["is for certain stages", "leave `stage=…` out"]);
    let mut parts = Parts::read(lora("ltx2").as_ref());
    let layer = "diffusion_model.transformer_blocks.0.attn1.to_";
    for end in ["lora_A.weight", "lora_B.weight"] {
        parts.rename_to(&format!("{layer}q.{end}"), &format!("{layer}x.{end}"));
    }
    let unknown = text(&place.write("unknown.safetensors", &parts.bytes()));
    place.refused(&merge(&[&unknown]), &["1 of its keys match nothing", &format!("`{layer}x`")]);
    place.ok(&[merge(&[&unknown]), vec!["--lora-ignore-unmatched".into()]].concat());
}

// ----------------------------------------------------------------------------------------------------------- dialects

const DIALECTS: [(&str, &str); 5] = [
    ("official", "official"),
    ("comfyui", "ComfyUI"),
    ("diffusers", "diffusers"),
    ("kohya", "kohya"),
    ("peft", "diffusers"),
];

/// Layers of a LoRA by their canonical names, with scale and factors.
fn layers(place: &Place, path: &Path, family: &str) -> BTreeMap<String, (f64, [Vec<f32>; 2])> {
    let (lora, targets) = (LoraFile::open(path).unwrap(), Checkpoint::open(&model(family)).unwrap());
    let targets = ltxc_models::lora::LoraTargets::of(&targets);
    let layers = lora.modules().iter().map(|module| {
        let key = targets.key_of(&module.name).unwrap_or_else(|| panic!("{}", module.name));
        (key.to_string(), (module.scale, lora.factors(module)))
    });
    // The command that users would ask.
    place.ok(&["lora", "inspect", &text(path)]);
    layers.collect()
}

#[test]
fn dialects_and_back_keep_every_number() {
    for family in FAMILIES {
        let (place, original) = (Place::new(), PathBuf::from(lora(family)));
        let expected = layers(&place, &original, family);
        let expected_run = run(&place, family, &model(family), &["--lora", &text(&original), "0.5"]);
        for (dialect, name) in DIALECTS {
            let there = convert(&place, &original, &format!("to-{dialect}"), &["--to", dialect]);
            assert_eq!(there.is_dir(), dialect == "peft");
            assert_eq!(LoraFile::open(&there).unwrap().dialect().name(), name);
            assert_eq!(layers(&place, &there, family), expected, "{dialect}");
            let back = convert(&place, &there, &format!("from-{dialect}"), &["--to", "official"]);
            let (a, b) = (Parts::read(&original), Parts::read(&back));
            for key in a.keys("") {
                assert_eq!(a.tensor(&key), b.tensor(&key), "{dialect} {key}");
            }
            assert_eq!(a.keys("").len(), b.keys("").len());
            let found = run(&place, family, &model(family), &["--lora", &text(&there), "0.5"]);
            assert!(found == expected_run, "{dialect} runs otherwise");
        }
    }
}

/// Rank of the LoRA of LTX-2.
fn rank() -> f32 {
    LoraFile::open(lora("ltx2").as_ref()).unwrap().modules()[0].rank as f32
}

/// That LoRA with an alpha for every layer, as kohya has it, so that these scales alternate.
fn with_scales(place: &Place, name: &str, scales: [f32; 2]) -> PathBuf {
    let kohya = convert(place, lora("ltx2").as_ref(), "plain-kohya", &["--to", "kohya"]);
    let mut parts = Parts::read(&kohya);
    for (i, key) in parts.keys(".alpha").into_iter().enumerate() {
        parts.set(&key, &(scales[i % 2] * rank()).to_le_bytes());
    }
    std::fs::remove_file(kohya).unwrap();
    place.write(name, &parts.bytes())
}

#[test]
fn alphas_are_kept_or_multiplied_in() {
    let place = Place::new();
    let kohya = with_scales(&place, "kohya.safetensors", [0.5, 3.0]);
    let expected = layers(&place, &kohya, "ltx2");
    assert!(expected.values().any(|l| l.0 == 0.5) && expected.values().any(|l| l.0 == 3.0));
    let expected_run = run(&place, "ltx2", &model("ltx2"), &["--lora", &text(&kohya)]);
    for (dialect, _) in DIALECTS {
        let there = convert(&place, &kohya, &format!("to-{dialect}"), &["--to", dialect]);
        let found = layers(&place, &there, "ltx2");
        if dialect == "official" {
            for (key, (scale, [down, up])) in &expected {
                let (one, [d, u]) = &found[key];
                let scaled: Vec<f32> = up.iter().map(|v| v * *scale as f32).collect();
                assert_eq!((*one, d, u), (1.0, down, &scaled), "{key}");
            }
        } else {
            assert_eq!(found, expected, "{dialect}");
        }
        let found = run(&place, "ltx2", &model("ltx2"), &["--lora", &text(&there)]);
        assert!(found == expected_run, "{dialect} runs otherwise");
    }
    // What f32 factors and a scale of a third make has more digits than f32.
    let thirds = with_scales(&place, "thirds.safetensors", [1.0 / 3.0, 1.0]);
    let args = ["convert", &text(&thirds), "--to", "official", "-o", "out"];
    place.refused(&args, &["cannot be multiplied into its factors without rounding", "--to comfyui"]);
    let there = convert(&place, &thirds, "thirds", &["--to", "peft"]);
    assert_eq!(layers(&place, &there, "ltx2"), layers(&place, &thirds, "ltx2"));
}

#[test]
fn headers_of_adapters_are_carried_without_their_old_alphas() {
    let place = Place::new();
    let path = fixtures().join("tiny-ltx2/ic-lora-ref2-tiny.safetensors");
    let kohya = convert(&place, &path, "kohya", &["--to", "kohya"]);
    assert_eq!(LoraFile::open(&kohya).unwrap().reference_downscale().unwrap(), Some(2));
    let mut parts = Parts::read(lora("ltx2").as_ref());
    parts.header.insert("__metadata__".into(), json!({"lora_alpha": (rank() / 2.0).to_string(), "author": "me"}));
    let scaled = place.write("scaled.safetensors", &parts.bytes());
    let official = convert(&place, &scaled, "official", &["--to", "official"]);
    let lora = LoraFile::open(&official).unwrap();
    assert_eq!(lora.metadata().keys().collect::<Vec<_>>(), ["author"]);
    assert!(lora.modules().iter().all(|module| module.scale == 1.0));
    assert_eq!(layers(&place, &scaled, "ltx2").values().next().unwrap().0, 0.5);
}

#[test]
fn adapters_in_the_wrong_place_are_refused() {
    let (place, path) = (Place::new(), lora("ltx2"));
    let refused = |more: &[&str], words: &[&str]| {
        place.refused(&[&["convert", &path, "-o", "out"], more].concat(), words);
    };
    refused(&[], &["is a LoRA", "`--to official`"]);
    refused(&["--to", "split"], &["is a LoRA", "layout of models"]);
    refused(&["--to", "kohya", "--dtype", "fp8"], &["has no fp8"]);
    refused(&["--to", "kohya", "--lora", &path], &["is a LoRA", "name the model first"]);
    let distilled = text(&fixtures().join("tiny-ltx23/distilled-lora-tiny.safetensors"));
    let other = text(&model("ltx2"));
    let args = ["convert", &distilled, "--to", "kohya", "--checkpoint-path", &other, "-o", "out"];
    place.refused(&args, &["looks like a LoRA of LTX-2.3 or newer"]);
    let mut parts = Parts::read(path.as_ref());
    let layer = "diffusion_model.transformer_blocks.0.attn1.to_";
    for end in ["lora_A.weight", "lora_B.weight"] {
        parts.rename_to(&format!("{layer}q.{end}"), &format!("{layer}x.{end}"));
    }
    let unknown = text(&place.write("unknown.safetensors", &parts.bytes()));
    let args = ["convert", &unknown, "--to", "kohya", "-o", "out"];
    place.refused(&args, &["1 keys of", "are no layers of LTX-2", &format!("`{layer}x`")]);
    let done = place.ok(&[&args[..], &["--lora-ignore-unmatched"]].concat());
    assert!(done.stderr.contains("1 keys of") && done.stderr.contains("left out"), "{}", done.stderr);
    let bf16 = fixtures().join("tiny-ltx2/lora-rank4-tiny-bf16.safetensors");
    let wide = convert(&place, &bf16, "wide", &["--to", "comfyui", "--dtype", "f32"]);
    assert_eq!(layers(&place, &wide, "ltx2"), layers(&place, &bf16, "ltx2"));
    assert_eq!(LoraFile::open(&wide).unwrap().dtypes().into_iter().collect::<Vec<_>>(), [DType::F32]);
}

// -------------------------------------------------------------------------------------------------------------- rules

#[test]
fn rules_make_foreign_keys_ours() {
    let place = Place::new();
    // A checkpoint as another tool may have it: other prefix, one weight transposed, a counter, no configuration.
    let original = Parts::read(&model("ltx2"));
    let turned = "model.diffusion_model.patchify_proj.weight";
    let (shape, bytes) = original.tensor(turned);
    let [rows, columns] = [0, 1].map(|i| shape[i].as_u64().unwrap() as usize);
    let transposed: Vec<u8> = (0..columns)
        .flat_map(|c| (0..rows).flat_map(move |r| [2 * (r * columns + c), 2 * (r * columns + c) + 1]))
        .map(|i| bytes[i])
        .collect();
    let mut foreign = Parts::read(&model("ltx2"));
    foreign.set(turned, &transposed);
    foreign.header[turned]["shape"] = json!([columns, rows]);
    for key in foreign.keys("model.diffusion_model.") {
        foreign.rename_to(&key, &key.replace("model.diffusion_model.", "dit/").replace(".attn1.", ".self_attn."));
    }
    let config = foreign.header.remove("__metadata__").unwrap();
    foreign.header.insert(
        "counter".into(),
        json!({"dtype": "F32", "shape": [0], "data_offsets": [foreign.data.len(), foreign.data.len()]}),
    );
    place.write("foreign.safetensors", &foreign.bytes());
    let rules = format!(
        "[[rule]]\nregex = '^dit/'\nto = 'model.diffusion_model.'\n\
         [[rule]]\nregex = '(transformer_blocks\\.\\d+|transformer_1d_blocks\\.\\d+)\\.self_attn\\.'\nto = '$1.attn1.'\n\
         [[rule]]\nexact = '{turned}'\npermute = [1, 0]\n\
         [[rule]]\nexact = 'counter'\ndrop = true\n\
         [[rule]]\nregex = '^(vae|audio_vae|vocoder|text_embedding_projection)\\.'\nto = '$1.'\n\
         [metadata]\nmodel_version = '2.0.0'\nconfig = '''{}'''\n",
        config["config"].as_str().unwrap()
    );
    place.write("rules.toml", rules.as_bytes());
    let args = ["convert", "foreign.safetensors", "--map", "rules.toml", "-o", "ours.safetensors", "--strict"];
    place.ok(&args);
    assert_same_content(&model("ltx2"), &place.path("ours.safetensors"));
    assert_eq!(settings(&model("ltx2")), settings(&place.path("ours.safetensors")));
    // The same as JSON.
    let rules: Value = serde_json::to_value(toml::from_str::<toml::Table>(&rules).unwrap()).unwrap();
    place.write("rules.json", rules.to_string().as_bytes());
    place.ok(&["convert", "foreign.safetensors", "--map", "rules.json", "-o", "again.safetensors"]);
    assert_eq!(place.read("ours.safetensors"), place.read("again.safetensors"));
}

#[test]
fn rules_that_go_wrong_are_told() {
    let place = Place::new();
    let head = json!({
        "a.x": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "b.x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    });
    let input = Parts { header: head.as_object().unwrap().clone(), data: vec![1; 16] };
    place.write("in.safetensors", &input.bytes());
    let map = |rules: &str, more: &[&str]| {
        std::fs::write(place.path("rules.toml"), rules).unwrap();
        [&["convert", "in.safetensors", "--map", "rules.toml", "-o", "out.safetensors"], more]
            .concat()
            .iter()
            .map(|s| s.to_string())
            .collect::<Vec<_>>()
    };
    place.write("rules.toml", b"");
    let refused = |rules: &str, more: &[&str], words: &[&str]| place.refused(&map(rules, more), words);
    let rename = "[[rule]]\nregex = '^[ab]\\.'\nto = 'c.'\n";
    refused(rename, &[], &["`a.x` and `b.x` would both be `c.x`", "change the rules"]);
    let one = "[[rule]]\nexact = 'a.x'\nto = 'y'\n[[rule]]\nexact = 'z'\nto = 'w'\n";
    refused(one, &["--strict"], &["1 rule matches no key", "`z`", "leave `--strict` out"]);
    refused("[[rule]]\nexact = 'a.x'\nto = 'y'\n", &["--strict"], &["1 key matches no rule", "`b.x`"]);
    refused("[[rule]]\nexact = 'b.x'\npermute = [1, 0]\n", &[], &["`b.x` has 1 axes, and a rule permutes 2"]);
    let both = "[[rule]]\nexact = 'b.x'\npermute = [1, 0]\n[[rule]]\nexact = 'b.x'\npermute = [0]\n";
    refused(both, &[], &["`b.x` has 1 axes, and a rule permutes 2"]);
    refused(
        "[[rule]]\nregex = '('\nto = 'x'\n",
        &[],
        &["rules `rules.toml`: rule 1 has no valid `regex`: unclosed group"],
    );
    refused("[[rule]]\nto = 'x'\n", &[], &["rule 1 needs either `regex` or `exact`"]);
    refused("[[rule]]\nexact = 'a.x'\n", &[], &["rule 1 does nothing"]);
    refused("[[rule]]\nexact = 'a.x'\nto = 'b'\ndrop = true\n", &[], &["rule 1 drops what it matches"]);
    refused("[[rule]]\nexact = 'a.x'\npermute = [0, 0]\n", &[], &["does not name every axis once"]);
    refused("[[rule]]\nexact = 'a.x'\nfrom = 'b'\n", &[], &["rules `rules.toml`", "unknown field `from`"]);
    refused("", &[], &["hold no `[[rule]]`"]);
    refused(rename, &["--dtype", "fp8"], &["needs to know the model"]);
    let done = place.ok(&map(one, &["--dtype", "bf16"]));
    assert!(
        done.stderr.contains("1 rule matches no key") && done.stderr.contains("1 key matches no rule"),
        "{}",
        done.stderr
    );
    let out = Parts::read(&place.path("out.safetensors"));
    assert_eq!(out.keys(""), ["b.x", "y"]);
    assert_eq!((&out.header["y"]["dtype"], &out.header["y"]["shape"]), (&json!("BF16"), &json!([1, 2])));
}

// --------------------------------------------------------------------------------------------------------------- GGUF

/// The transformer of a family as GGUF: matrices of whole blocks in Q8_0, some tensors in bf16, the others in f32.
pub fn gguf(family: &str, prefix: &str, change: impl Fn(&str, &mut Vec<f32>)) -> Vec<u8> {
    let checkpoint = Checkpoint::open(&model(family)).unwrap();
    let connector = "_embeddings_connector.";
    let keys: Vec<&str> = checkpoint
        .tensors()
        .map(|(key, _)| key)
        .filter(|key| key.starts_with("model.diffusion_model.") && !key.contains(connector))
        .collect();
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let (mut infos, mut data) = (Vec::new(), Vec::new());
    for key in &keys {
        let mut values = values(&checkpoint, key);
        change(key, &mut values);
        let shape = &checkpoint.tensor(key).unwrap().stored.shape;
        let row = *shape.last().unwrap();
        let (ty, bytes): (u32, Vec<u8>) = if shape.len() == 2 && row.is_multiple_of(32) {
            (8, values.chunks(32).flat_map(block_q8_0).collect())
        } else if key.ends_with("bias") {
            (30, values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect())
        } else {
            (0, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        };
        infos.extend(text(&key.replace("model.diffusion_model.", prefix)));
        infos.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&d| infos.extend((d as u64).to_le_bytes()));
        infos.extend([&ty.to_le_bytes()[..], &(data.len() as u64).to_le_bytes()].concat());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let mut file =
        [&b"GGUF"[..], &3u32.to_le_bytes(), &(keys.len() as u64).to_le_bytes(), &1u64.to_le_bytes()].concat();
    file.extend([text("general.architecture"), 8u32.to_le_bytes().into(), text("ltxv"), infos].concat());
    file.resize(file.len().next_multiple_of(32), 0);
    [file, data].concat()
}

fn block_q8_0(values: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(values.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0);
    let quantised = values
        .iter()
        .map(|v| if scale.to_f32() == 0.0 { 0 } else { (v / scale.to_f32()).round().clamp(-127.0, 127.0) as i8 as u8 });
    scale.to_le_bytes().into_iter().chain(quantised).collect()
}

#[test]
fn gguf_files_are_compared_with_the_model() {
    for family in FAMILIES {
        let (place, original) = (Place::new(), text(&model(family)));
        for prefix in ["model.diffusion_model.", ""] {
            place.write("model.gguf", &gguf(family, prefix, |_, _| {}));
            let done = place.ok(&["debug", "weights", &original, "--against", "model.gguf", "--json"]);
            let facts: Value = serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap();
            assert_eq!((&facts["ok"], &facts["only"]), (&json!(true), &json!([])));
            assert!(facts["equal"].as_u64().unwrap() > 40, "{facts}");
            let rows = facts["different"].as_array().unwrap();
            assert!(
                !rows.is_empty() && rows.iter().all(|r| r["what"].as_str().unwrap().contains("as Q8_0")),
                "{rows:?}"
            );
        }
        let wrong = |change: fn(&str, &mut Vec<f32>), words: &[&str]| {
            place.write("wrong.gguf", &gguf(family, "", change));
            let done = place.run(&["debug", "weights", &original, "--against", "wrong.gguf"]);
            assert_eq!(done.code, Some(1), "{}", done.stderr);
            assert!(words.iter().all(|w| done.stdout.contains(w)), "{}", done.stdout);
        };
        let key = "transformer_blocks.1.attn1.to_q.weight";
        wrong(
            |key, v| {
                if key.ends_with("blocks.1.attn1.to_q.weight") {
                    v[7] += 0.5
                }
            },
            &[key, "NOT the same model"],
        );
        wrong(
            |key, v| {
                if key.ends_with("blocks.0.attn1.to_k.bias") {
                    v[0] = f32::NAN
                }
            },
            &["blocks.0.attn1.to_k.bias", "NOT"],
        );
    }
}

#[test]
fn gguf_files_that_are_none_are_refused() {
    let (place, original) = (Place::new(), text(&model("ltx2")));
    let good = gguf("ltx2", "", |_, _| {});
    for (name, bytes, words) in [
        ("short.gguf", &good[..good.len() - 64], "expected inside of the file"),
        ("head.gguf", &good[..40], "only"),
        ("other.gguf", b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "holds no transformer"),
    ] {
        place.write(name, bytes);
        let done = place.run(&["debug", "weights", &original, "--against", name]);
        let done = crate::binary::Done { stdout: String::new(), ..done };
        sentence(&done, &[name, words]);
    }
}
