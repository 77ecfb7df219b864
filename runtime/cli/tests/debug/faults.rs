//! Faults that ports of the model are known to have, planted in copies of small models, and the commands that name them.

use std::path::{Path, PathBuf};

use crate::root;
use safetensors::SafeTensors;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::binary::{Place, SHAPE, tiny, with};

/// A copy of a model file in which `change` has changed the bytes of one tensor.
pub fn with_tensor(place: &Place, source: &Path, key: &str, change: impl FnOnce(&mut [u8])) -> PathBuf {
    let mut bytes = std::fs::read(source).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let (start, end) = metadata.info(key).unwrap_or_else(|| panic!("no `{key}`")).data_offsets;
    change(&mut bytes[8 + header + start..8 + header + end]);
    place.write("faulty.safetensors", &bytes)
}

/// A copy of a model file in which `change` has changed the configuration.
pub fn with_config(place: &Place, source: &Path, change: impl FnOnce(&mut Value)) -> PathBuf {
    let bytes = std::fs::read(source).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut all: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let mut config: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["config"]).unwrap();
    change(&mut config);
    all["__metadata__"]["config"] = Value::String(config.to_string());
    let mut text = all.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let file = [&(text.len() as u64).to_le_bytes()[..], &text, &bytes[8 + header..]].concat();
    place.write("faulty.safetensors", &file)
}

pub fn swap_rows(bytes: &mut [u8], rows: usize, a: usize, b: usize) {
    let row = bytes.len() / rows;
    let (first, second) = bytes.split_at_mut(b * row);
    first[a * row..(a + 1) * row].swap_with_slice(&mut second[..row]);
}

/// A NaN in bf16 or f32: the upper bytes of the first value.
pub fn plant_nan(bytes: &mut [u8]) {
    bytes[..4].copy_from_slice(&[0xc0, 0x7f, 0xc0, 0x7f]);
}

const BLOCK_1: &str = "model.diffusion_model.transformer_blocks.1.";

/// What `debug parity` says about a model of the fixtures whose checkpoint is `checkpoint`.
fn parity(place: &Place, checkpoint: &Path, only: &str) -> Value {
    let of = |name: &str| root().join(name).display().to_string();
    let done = place.run(&[
        "debug",
        "parity",
        "--json",
        "--only",
        only,
        "--reference",
        &root().display().to_string(),
        "--checkpoint-path",
        &checkpoint.display().to_string(),
        "--gemma-root",
        &of("tiny-gemma3"),
        "--spatial-upsampler-path",
        &of("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors"),
    ]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
    let component = facts["components"][0].clone();
    assert_eq!(done.code, Some(if component["ok"] == true { 0 } else { 1 }));
    component
}

fn ltx2() -> PathBuf {
    root().join("tiny-ltx2/ltx-2-tiny.safetensors")
}

#[test]
fn swapped_rows_of_shift_and_scale_are_found_in_their_block() {
    let place = Place::new();
    let key = format!("{BLOCK_1}scale_shift_table");
    let faulty = with_tensor(&place, &ltx2(), &key, |bytes| swap_rows(bytes, 6, 0, 1));
    let found = parity(&place, &faulty, "transformer");
    assert!(found["first_bad"].as_str().unwrap().ends_with(".block1"), "{found}");
    assert_eq!(parity(&place, &ltx2(), "transformer")["ok"], true);
}

#[test]
fn interleaved_rotation_is_found_in_the_first_block() {
    let place = Place::new();
    let faulty = with_config(&place, &ltx2(), |c| c["transformer"]["rope_type"] = "interleaved".into());
    let found = parity(&place, &faulty, "transformer");
    assert!(
        found["first_bad"].as_str().unwrap().contains("rope")
            || found["first_bad"].as_str().unwrap().ends_with(".block0"),
        "{found}"
    );
}

#[test]
fn a_dropped_embedding_scale_is_found_in_the_first_state() {
    let place = Place::new();
    let gemma = place.path("gemma");
    std::fs::create_dir(&gemma).unwrap();
    for entry in std::fs::read_dir(root().join("tiny-gemma3")).unwrap().flatten() {
        std::fs::copy(entry.path(), gemma.join(entry.file_name())).unwrap();
    }
    // Embeddings of half the size are what a wrong factor gives.
    let source = gemma.join("model.safetensors");
    let key = "language_model.model.embed_tokens.weight";
    let faulty = with_tensor(&place, &source, key, |bytes| {
        for pair in bytes.as_chunks_mut::<2>().0 {
            let value = half::bf16::from_le_bytes(*pair);
            *pair = half::bf16::from_f32(value.to_f32() * 0.5).to_le_bytes();
        }
    });
    std::fs::copy(faulty, &source).unwrap();
    let of = |gemma: &Path| {
        let done = place.run(&[
            "debug",
            "parity",
            "--json",
            "--only",
            "text",
            "--reference",
            &root().display().to_string(),
            "--checkpoint-path",
            &ltx2().display().to_string(),
            "--gemma-root",
            &gemma.display().to_string(),
        ]);
        let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
        facts["components"][0].clone()
    };
    assert!(of(&gemma)["first_bad"].as_str().unwrap().ends_with("hidden.0"));
    assert_eq!(of(&root().join("tiny-gemma3"))["ok"], true);
}

#[test]
fn an_upsampler_between_wrong_statistics_is_found() {
    let place = Place::new();
    let key = "vae.per_channel_statistics.std-of-means";
    let faulty = with_tensor(&place, &ltx2(), key, |bytes| {
        // All deviations are 1: nothing is un-normalised.
        let width = if bytes.len().is_multiple_of(4) { bytes.len() } else { 0 };
        bytes[..width].as_chunks_mut::<2>().0.iter_mut().for_each(|v| *v = half::bf16::ONE.to_le_bytes());
    });
    assert_eq!(parity(&place, &faulty, "upsampler")["ok"], false);
    assert_eq!(parity(&place, &ltx2(), "upsampler")["ok"], true);
}

#[test]
fn the_first_nan_is_named_with_its_layer() {
    let place = Place::new();
    let key = format!("{BLOCK_1}attn1.to_k.weight");
    let faulty = with_tensor(&place, &tiny().checkpoint, &key, plant_nan);
    let nan = |checkpoint: &Path| {
        let args = [
            &["debug".to_string(), "nan".into()],
            &tiny().model_args_with(checkpoint, &tiny().gemma)[..],
            &SHAPE.map(String::from),
        ];
        place.run(&with(args.concat(), &["--json"]))
    };
    let done = nan(&faulty);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
    let value = facts["value"].as_str().unwrap();
    assert!(
        done.code == Some(1) && value.starts_with("transformer.blocks.1.") && value.contains("attn1.to_k"),
        "{facts}"
    );
    assert!(facts["nan"].as_u64() > Some(0) && !facts["reads"].as_array().unwrap().is_empty(), "{facts}");
    // Step and pass, and the values beside the first bad one.
    assert_eq!((facts["run"].as_u64(), facts["pass"].as_str()), (Some(0), Some("cond")), "{facts}");
    let place_of_first = facts["first"].as_u64().unwrap() - facts["around_from"].as_u64().unwrap();
    assert_eq!(facts["around"][place_of_first as usize], "NaN", "{facts}");
    assert_eq!(nan(&tiny().checkpoint).code, Some(0));
    let step = ["debug", "step", "--check-nan", "--checkpoint-path", &faulty.display().to_string()];
    let found = crate::binary::sentence(&place.run(&step), &["transformer.blocks.1.", "first at", "values from"]);
    assert!(!found.contains("--allow-bad-numerics"), "{found}");

    // A run stops, too, and says where; with the flag it names the first value.
    let run = |checkpoint: &Path, more: &[&str]| {
        let args =
            [&["run".to_string()], &tiny().model_args_with(checkpoint, &tiny().gemma)[..], &SHAPE.map(String::from)]
                .concat();
        place.run(&with(args, &[&["-p", "x", "-o", "a.wav"], more].concat()))
    };
    crate::binary::sentence(&run(&faulty, &[]), &["stage1, step 1", "NaN", "first of all `blocks.1."]);
    crate::binary::sentence(&run(&faulty, &["--check-nan"]), &["stage1, step 1", "transformer.blocks.1.", "first at"]);
    assert_eq!(run(&faulty, &["--allow-bad-numerics"]).code, Some(0));
    assert_eq!(run(&tiny().checkpoint, &["--check-nan"]).code, Some(0));
}

#[test]
fn a_gpu_is_asked_for_sums_instead_of_values_and_names_the_same_layer() {
    let place = Place::new();
    if !crate::binary::has_vulkan(&place) {
        return;
    }
    let key = format!("{BLOCK_1}attn1.to_k.weight");
    let faulty = with_tensor(&place, &tiny().checkpoint, &key, plant_nan);
    let nan = |checkpoint: &Path| {
        let args = [
            &["debug".to_string(), "nan".into()],
            &tiny().model_args_with(checkpoint, &tiny().gemma)[..],
            &SHAPE.map(String::from),
        ];
        let more = ["--json", "--device", "vulkan:0", "--pipeline", "distilled-one-stage"];
        place.run(&with(args.concat(), &more))
    };
    let done = nan(&faulty);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
    let value = facts["value"].as_str().unwrap();
    assert!(
        done.code == Some(1) && value.starts_with("transformer.blocks.1.") && value.contains("attn1.to_k"),
        "{facts}"
    );
    // What it was computed from is read then, though it was not before.
    assert!(facts["nan"].as_u64() > Some(0) && !facts["reads"].as_array().unwrap().is_empty(), "{facts}");
    let done = nan(&tiny().checkpoint);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
}

#[test]
fn bisecting_names_the_first_op_that_differs() {
    let place = Place::new();
    let key = format!("{BLOCK_1}attn2.to_v.weight");
    let faulty = with_tensor(&place, &tiny().checkpoint, &key, |bytes| bytes.fill(0));
    let bisect = |b: &str| {
        let args =
            [&["debug".to_string(), "bisect".into()], &tiny().model_args()[..], &SHAPE.map(String::from)].concat();
        place.run(&with(args, &["--a", "fuse=exact", "--b", b]))
    };
    let done = bisect(&format!("fuse=exact,checkpoint={}", faulty.display()));
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(done.stdout.contains("first bad op: transformer.blocks.1.attn2.to_v"), "{}", done.stdout);
    assert!(
        done.stdout.contains("in the plan of the second setting") && done.stdout.contains("\"attn2.to_v\""),
        "{}",
        done.stdout
    );
    let done = bisect(&format!("fuse=exact,dtype=f16,checkpoint={}", faulty.display()));
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(done.stdout.contains("first bad op: transformer.blocks.1.attn2.to_v"), "{}", done.stdout);
    // Rounding of 16 bits is no fault.
    for setting in ["fuse=full", "fuse=exact,dtype=f16", "fuse=full,dtype=f16", "fuse=exact,dtype=bf16"] {
        let done = bisect(setting);
        assert_eq!(done.code, Some(0), "{setting}: {}{}", done.stdout, done.stderr);
    }
}

#[test]
fn a_wrong_gate_multiplier_shows_in_the_first_block() {
    let place = Place::new();
    let faulty = with_config(&place, &tiny().checkpoint, |c| {
        c["transformer"]["av_ca_timestep_scale_multiplier"] = 1.into();
    });
    let run = |checkpoint: &Path, log: &str| {
        let args =
            [&["run".to_string()], &tiny().model_args_with(checkpoint, &tiny().gemma)[..], &SHAPE.map(String::from)]
                .concat();
        place.ok(&with(args, &["-p", "x", "-o", "a.wav", "--debug-model-sums-path", log]));
    };
    run(&tiny().checkpoint, "right.log");
    run(&faulty, "wrong.log");
    let done =
        place.run(&["debug", "compare", "wrong.log", "right.log", "--json", "--tol-rel", "1e-4", "--tol-abs", "1e-4"]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap();
    assert!(facts["first"]["key"].as_str().unwrap().starts_with("block=0."), "{}", facts["first"]);
    place.ok(&["debug", "compare", "right.log", "right.log"]);
}

#[test]
fn model_files_are_audited() {
    let place = Place::new();
    let weights = |more: &[&str]| place.run(&[&["debug", "weights"], more].concat());
    let good = ltx2().display().to_string();
    let done = weights(&[&good]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.contains("LTX-2, because") && done.stdout.contains("transformer"), "{}", done.stdout);
    let done = weights(&[&good, "--stats", "--key", "patchify_proj", "--adaln", "0", "--attn", "1"]);
    for word in ["patchify_proj.weight", "checksum=", "sha256=", "self attention shift", "to_q.weight"] {
        assert!(done.stdout.contains(word), "no `{word}` in\n{}", done.stdout);
    }
    assert!(!done.stdout.contains("audio_vae.decoder.conv_in.conv.weight sum"));
    let faulty = with_tensor(&place, &ltx2(), &format!("{BLOCK_1}ff.net.2.weight"), plant_nan).display().to_string();
    assert_eq!(weights(&[&faulty, "--stats", "--key", "ff.net.2"]).code, Some(1));
    let done = weights(&[&faulty, "--against", &good]);
    assert_eq!(done.code, Some(1));
    assert!(
        done.stdout.contains("blocks.1.ff.net.2.weight") && done.stdout.contains("NOT the same model"),
        "{}",
        done.stdout
    );
    assert_eq!(weights(&[&good, "--against", &good]).code, Some(0));
    // Checksums are those that hosts of models publish: of the bytes as they are stored.
    let bytes = std::fs::read(ltx2()).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let key = format!("{BLOCK_1}attn1.to_q.bias");
    let (start, end) = metadata.info(&key).unwrap().data_offsets;
    let sha256 = Sha256::digest(&bytes[8 + header + start..8 + header + end]);
    let sha256: String = sha256.iter().map(|b| format!("{b:02x}")).collect();
    let done = weights(&[&good, "--stats", "--key", &key]);
    assert!(done.stdout.contains(&format!("sha256={sha256}")), "{}", done.stdout);
    // The other name of the command, and what a wrong order of rows looks like.
    let table = format!("{BLOCK_1}scale_shift_table");
    let swapped = with_tensor(&place, &ltx2(), &table, |bytes| swap_rows(bytes, 6, 0, 1)).display().to_string();
    let done = place.run(&["debug", "audit", &swapped, "--against", &good, "--adaln", "1"]);
    assert_eq!(done.code, Some(1));
    assert!(
        done.stdout.contains("the same rows in another order: self attention shift, self attention scale"),
        "{}",
        done.stdout
    );
    // The factor that mutes speech.
    let muted = with_config(&place, &ltx2(), |c| c["transformer"]["av_ca_timestep_scale_multiplier"] = 1.into());
    let done = weights(&[&muted.display().to_string()]);
    assert!(done.code == Some(1) && done.stdout.contains("av_ca_timestep_scale_multiplier"), "{}", done.stdout);
}

#[test]
fn files_of_a_pipeline_are_listed() {
    let place = Place::new();
    let list = |more: &[&str]| {
        let mut command = place.command(&[&["debug", "weights", "--json", "--download-manifest"], more].concat());
        let output = command.env("HF_HUB_CACHE", place.path("cache")).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let rows: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        (output.status.code(), rows)
    };
    let (code, rows) = list(&["two-stage"]);
    assert_eq!((code, rows.len()), (Some(1), 8));
    assert!(rows.iter().all(|r| r["present"] == false));
    // A folder with all of it.
    std::fs::create_dir_all(place.path("models/gemma")).unwrap();
    for row in rows.iter().filter(|r| r["generation"] == "LTX-2") {
        let name = row["name"].as_str().unwrap();
        if let Some((_, file)) = name.split_once(':') {
            place.write(&format!("models/{file}"), b"");
        }
    }
    assert_eq!(list(&["two-stage", "--folder", "models"]).0, Some(1));
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(tiny().gemma.join(file), place.path("models/gemma").join(file)).unwrap();
    }
    let (code, rows) = list(&["two-stage", "--folder", "models"]);
    assert_eq!((code, rows.iter().filter(|r| r["present"] == true).count()), (Some(0), 5));
}

#[test]
fn prompts_are_told_apart_and_states_are_in_order() {
    let place = Place::new();
    let text = |command: &str, more: &[&str]| {
        let args = [&["debug".to_string(), "text".into(), command.into()], &tiny().model_args()[..]].concat();
        place.run(&with(args, more))
    };
    let done = text("diff", &["-p", "a cat sleeps", "--prompt2", "a rocket starts", "--json"]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
    let first = &facts["stages"][0];
    assert_eq!(first["stage"], "hidden 0");
    assert!(first["pearson"].as_f64() < Some(0.999), "{facts}");
    let done = text("stats", &["-p", "a cat sleeps"]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.contains("ok  embeddings are scaled"), "{}", done.stdout);
}

#[test]
fn positions_that_were_rounded_or_counted_otherwise_are_told() {
    use ltxc_runtime::pipeline::positions::{audio_positions, video_positions};
    use safetensors::tensor::TensorView;
    let place = Place::new();
    let settings = ltxc_ir::plan::VideoSettings {
        height: 64,
        width: 96,
        frames: 17,
        frame_rate: (24, 1),
        channels: 128,
        scale: [8, 32, 32],
        max_keyframes: 0,
    };
    let (video, audio) = (video_positions([3, 2, 3], &settings), audio_positions(18));
    let write = |name: &str, video: &[f32], audio: &[f32]| {
        let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (v, a) = (bytes(video), bytes(audio));
        let views = [
            ("video.positions", TensorView::new(safetensors::Dtype::F32, vec![3, 18, 2], &v).unwrap()),
            ("audio.positions", TensorView::new(safetensors::Dtype::F32, vec![1, audio.len() / 2, 2], &a).unwrap()),
        ];
        place.write(name, &safetensors::serialize(views, None).unwrap());
    };
    let compare = |name: &str| place.run(&["debug", "positions", "--grid", "3,2,3", "--compare", name]);
    write("good.safetensors", &video, &audio);
    assert_eq!(compare("good.safetensors").code, Some(0));
    let rounded: Vec<f32> = video.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
    write("rounded.safetensors", &rounded, &audio);
    let done = compare("rounded.safetensors");
    assert!(done.code == Some(1) && done.stdout.contains("bf16"), "{}", done.stdout);
    // Rotary tables of the model, by the recorded ones of the same tokens.
    let recorded = root().join("expected-1.2.0/ltx2/transformer.safetensors").display().to_string();
    let tables = |checkpoint: &Path| {
        let checkpoint = checkpoint.display().to_string();
        let args = ["--audio-tokens", "9", "--checkpoint-path", &checkpoint, "--compare", &recorded];
        place.run(&[&["debug", "positions", "--grid", "3,2,3"], &args[..]].concat())
    };
    let done = tables(&ltx2());
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    assert!(
        done.stdout.contains("rope Split") && done.stdout.contains("prep.audio.cross_rope_sin: equal"),
        "{}",
        done.stdout
    );
    let coarse = with_config(&place, &ltx2(), |c| c["transformer"]["positional_embedding_theta"] = 5000.into());
    let done = tables(&coarse);
    assert!(done.code == Some(1) && done.stdout.contains("rope_cos: largest difference"), "{}", done.stdout);
    write("more.safetensors", &video, &audio_positions(19));
    let done = compare("more.safetensors");
    assert!(done.code == Some(1) && done.stdout.contains("another number of tokens"), "{}", done.stdout);
}

#[test]
fn decoders_are_traced_and_steps_agree() {
    let place = Place::new();
    let of = |command: &[&str]| {
        [&["debug"], command].concat().iter().map(|s| s.to_string()).chain(tiny().model_args()).collect::<Vec<_>>()
    };
    let done = place.run(&with(of(&["vae", "trace"]), &["--latent", "zero", "--json"]));
    let blocks: Vec<Value> = done.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(blocks.len() > 3 && blocks[0]["block"] == "conv_in", "{}", done.stderr);
    // A decoder whose first convolution is a thousand times too large.
    let key = "vae.decoder.conv_in.conv.weight";
    let faulty = with_tensor(&place, &tiny().checkpoint, key, |bytes| {
        for pair in bytes.as_chunks_mut::<2>().0 {
            let value = half::bf16::from_le_bytes(*pair).to_f32() * 1e4;
            *pair = half::bf16::from_f32(value).to_le_bytes();
        }
    });
    let args: Vec<String> = ["debug", "vae", "trace", "--json"]
        .map(String::from)
        .into_iter()
        .chain(tiny().model_args_with(&faulty, &tiny().gemma))
        .collect();
    let done = place.run(&args);
    let first: Value = serde_json::from_str(done.stdout.lines().next().unwrap()).unwrap();
    assert_eq!((done.code, first["warning"].as_str()), (Some(1), Some("exploding")));
    place.ok(&of(&["vae", "norm"]));
    place.ok(&of(&["vae", "decode", "--latent", "zero"]));
    let steps = place.run(&with([of(&["loop"]), SHAPE.map(String::from).into()].concat(), &["--json"]));
    let steps: Vec<Value> =
        steps.stdout.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect();
    let (last, steps) = steps.split_last().unwrap();
    assert!(last["final_latent"].is_object(), "{last}");
    assert_eq!(steps.len(), 2 * 11);
    for step in steps {
        assert!(step["euler"].as_f64() < Some(1e-3) && step["x0_from_v"].as_f64() < Some(1e-3), "{step}");
    }
}

#[test]
fn runs_are_compared_step_by_step_and_shown_block_by_block() {
    let place = Place::new();
    let recording = root().join("expected/e2e/ltx2/distilled.safetensors");
    let meta = ltxc::debug::recording::TensorFile::open(&recording).unwrap().meta();
    let prompt = meta["params"]["prompt"].as_str().unwrap().to_string();
    let run = |checkpoint: &Path, more: &[&str]| {
        let of = |name: &str| root().join(name).display().to_string();
        let (checkpoint, gemma) = (checkpoint.display().to_string(), of("tiny-gemma3"));
        let upsampler = of("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors");
        let model = ["--checkpoint-path", &checkpoint, "--gemma-root", &gemma, "--spatial-upsampler-path", &upsampler];
        let size = ["-H", "128", "-W", "192", "--num-frames", "9", "-p", &prompt, "--json"];
        let done = place.run(&[&["debug", "loop"], &model[..], &size, more].concat());
        let lines = done.stdout.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}")));
        (done.code, lines.collect::<Vec<Value>>(), done.stderr)
    };
    // Without what was run, as other tools record: flags say it.
    let mut bytes = std::fs::read(&recording).unwrap();
    let key = br#"\"params\""#;
    let at = bytes.windows(key.len()).position(|part| part == key).expect("parameters were recorded");
    bytes[at + 2..at + 8].copy_from_slice(b"others");
    let recording = place.write("foreign.safetensors", &bytes);
    let compare = ["--compare", &recording.display().to_string()];
    let (code, rows, errors) = run(&ltx2(), &compare);
    assert_eq!(code, Some(0), "{rows:?} {errors}");
    let rows = rows.last().unwrap()["tensors"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().filter_map(|r| r["tensor"].as_str()).collect();
    for name in ["stage1.video.noised", "stage1.step7.audio.denoised", "stage2.step2.video.latent"] {
        assert!(names.contains(&name), "no `{name}` in {names:?}");
    }
    let table = format!("{BLOCK_1}scale_shift_table");
    let faulty = with_tensor(&place, &ltx2(), &table, |bytes| swap_rows(bytes, 6, 0, 1));
    let (code, rows, _) = run(&faulty, &compare);
    let first = rows.last().unwrap()["first"]["tensor"].clone();
    assert_eq!((code, first.as_str()), (Some(1), Some("stage1.step0.video.denoised")), "{rows:?}");
    // Streams behind every block of every step, and logs as a run writes them.
    let (_, rows, errors) = run(&ltx2(), &["--blocks", "--debug-stage-sums-path", "sums.log"]);
    let blocks = || rows.iter().filter(|r| r["block"].is_u64());
    assert!(blocks().count() >= 2 * 2 * 11, "{} {errors}", blocks().count());
    assert!(blocks().all(|b| b["std"].as_f64() > Some(0.0) && b["text_ratio"].as_f64() > Some(0.0)), "{rows:?}");
    let log = String::from_utf8(place.read("sums.log")).unwrap();
    assert!(log.starts_with("# ltxc ") && log.contains("stage=LTX2DenoisingStage"), "{log}");
    // The latent of a step, which is noise at first.
    let latents = |more: &[&str]| {
        let args = [&["debug".to_string(), "latents".into()], &tiny().model_args()[..], &SHAPE.map(String::from)];
        place.run(&with(args.concat(), more))
    };
    let done = latents(&["--step", "0", "--stage", "stage2", "--json", "--noise"]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
    assert_eq!(
        (facts["tensor"].as_str(), &facts["shape"]),
        (Some("stage2.step0.video.latent"), &serde_json::json!([1, 8, 2, 2, 2]))
    );
    let shares = facts["histogram"].as_array().unwrap().iter().map(|share| share[1].as_f64().unwrap());
    assert!((0.9..1.0 + 1e-9).contains(&shares.sum::<f64>()), "{facts}");
    crate::binary::sentence(&latents(&["--step", "99"]), &["`stage1` has no step 99"]);
}

#[test]
fn a_finished_clip_is_told_from_noise_and_one_colour() {
    use ltxc_runtime::media::png;
    let place = Place::new();
    let write = |folder: &str, pixel: &dyn Fn(usize, usize, usize) -> u8| {
        std::fs::create_dir_all(place.path(folder)).unwrap();
        for f in 0..3usize {
            let rgb: Vec<u8> = (0..64 * 64).flat_map(|p| [pixel(f, p / 64, p % 64); 3]).collect();
            let mut file =
                std::fs::File::create(place.path(&format!("{folder}/{}", png::frame_name(f as u64)))).unwrap();
            png::write(64, 64, &rgb, &mut file).unwrap();
        }
        place.run(&["debug", "video-stats", folder, "--json"])
    };
    let flags = |done: &crate::binary::Done| -> Vec<String> {
        let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
        facts["flags"].as_array().unwrap().iter().map(|f| f["flag"].as_str().unwrap().to_string()).collect()
    };
    let wave =
        write("wave", &|f, y, x| ((x as f64 * 0.1 + y as f64 * 0.2 + f as f64 * 0.4).sin() * 100.0 + 128.0) as u8);
    assert_eq!((wave.code, flags(&wave)), (Some(0), vec![]));
    let noise = write("noise", &|f, y, x| {
        let n = ((f * 4096 + y * 64 + x) as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((n ^ n >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
    });
    assert_eq!((noise.code, flags(&noise)), (Some(1), vec!["noise".to_string()]));
    let grey = write("grey", &|_, _, _| 128);
    assert_eq!(flags(&grey), ["collapsed", "frozen"]);
    place.refused(&["debug", "video-stats", "nowhere"], &["nowhere"]);
    // A finished file, whose pictures mean nothing.
    place.ok(&with(tiny().run_args(), &["-p", "x", "-o", "a.mp4"]));
    let done = place.run(&["debug", "video-stats", "a.mp4", "--json"]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
    assert_eq!((facts["frames"].as_u64(), facts["width"].as_u64()), (Some(9), Some(64)));
    assert!(facts["sound_rms"].as_f64() > Some(0.0), "{facts}");
}

#[test]
fn interleaved_rotation_shows_in_the_first_self_attention() {
    let place = Place::new();
    let faulty = with_config(&place, &tiny().checkpoint, |c| c["transformer"]["rope_type"] = "interleaved".into());
    let detail = |checkpoint: &Path, log: &str| {
        let args =
            [&["run".to_string()], &tiny().model_args_with(checkpoint, &tiny().gemma)[..], &SHAPE.map(String::from)]
                .concat();
        let more = ["-p", "x", "-o", "a.wav", "--debug-mode", "exact", "--debug-model-detail-path", log];
        place.ok(&with(args, &more));
    };
    detail(&tiny().checkpoint, "right.log");
    detail(&faulty, "wrong.log");
    let done = place.run(&["debug", "compare", "wrong.log", "right.log", "--json"]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!((done.code, facts["first"]["key"].as_str()), (Some(1), Some("block=0:attn1.out_sum")), "{facts}");
    assert!(facts["likely_cause"].as_str().unwrap().contains("RoPE layout"), "{facts}");
    place.ok(&["debug", "compare", "right.log", "right.log"]);
}

#[test]
fn noise_of_one_decoder_alone_is_told_by_the_headers() {
    let place = Place::new();
    place.ok(&with(tiny().run_args(), &["-p", "x", "-o", "a.wav", "--debug-stage-sums-path", "ours.log"]));
    let log = String::from_utf8(place.read("ours.log")).unwrap();
    for condition in ["dtype=f32", "attention=plain", "fused_attention=off", "text_padding=1024", "decoder_noise=on"] {
        assert!(log.contains(condition), "no {condition} in {log}");
    }
    place.write("theirs.log", log.replace("decoder_noise=on", "decoder_noise=off").as_bytes());
    let text = place.ok(&["debug", "compare", "ours.log", "theirs.log"]).stdout;
    assert!(text.contains("warning: the decoders add different noise: on and off"), "{text}");
    assert!(text.contains("decoder_noise on/off") && text.contains("dtype f32"), "{text}");
    let text = place.ok(&["debug", "compare", "ours.log", "ours.log"]).stdout;
    assert!(!text.contains("decoders add different noise"), "{text}");
}

/// A port that rounds the number of audio latents up: 10 instead of 9, which the rate below has by itself.
#[test]
fn a_wrong_number_of_audio_tokens_shows_after_the_first_latents() {
    let place = Place::new();
    let run = |rate: &str, log: &str| {
        let args = [&["run".to_string()], &tiny().model_args()[..], &SHAPE.map(String::from)].concat();
        place.ok(&with(args, &["-p", "x", "-o", "a.wav", "--frame-rate", rate, "--debug-stage-sums-path", log]));
    };
    run("24", "right.log");
    run("45/2", "wrong.log");
    let done = place.run(&["debug", "compare", "wrong.log", "right.log", "--json"]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap();
    let key = "stage=LTX2LatentPreparationStage.extra.ltx2_audio_latents";
    assert_eq!((done.code, facts["first"]["key"].as_str()), (Some(1), Some(key)), "{facts}");
    place.ok(&["debug", "compare", "right.log", "right.log"]);
}

/// Tables as in trained models: shifts around 0, scales around −0.32.
#[test]
fn swapped_rows_of_shift_and_scale_show_in_the_factors() {
    let place = Place::new();
    let table = |first: f32, second: f32| {
        let key = "model.diffusion_model.scale_shift_table";
        with_tensor(&place, &ltx2(), key, |bytes| {
            let half = bytes.len() / 2;
            for (i, pair) in bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let value = if 2 * i < half { first } else { second };
                *pair = half::bf16::from_f32(value).to_le_bytes();
            }
        })
    };
    let rows = |file: &Path| place.run(&["debug", "weights", &file.display().to_string(), "--adaln", "0"]);
    let right = rows(&table(0.0, -0.32));
    assert!(right.code == Some(0) && right.stdout.contains("factor 0.6797"), "{}", right.stdout);
    let swapped = rows(&table(-0.32, 0.0));
    assert!(swapped.code == Some(1) && swapped.stdout.contains("shift and scale look swapped"), "{}", swapped.stdout);
    assert!(!swapped.stdout.contains("factor 0.6797"), "{}", swapped.stdout);
}
