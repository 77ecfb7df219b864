//! `ltxc debug lora`: every verdict with the fault that it is for, against recordings of the reference and against our own
//! runs of the right LoRA.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ltxc::debug::recording::TensorFile;
use ltxc_ir::eval::Tensor;
use ltxc_runtime::noise_files::{self, Stored};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::binary::{Place, ltxc};
use crate::root;

/// Tensors by name, to be changed and written again.
type Tensors = BTreeMap<String, Tensor>;

fn fixture(name: &str) -> PathBuf {
    root().join(format!("{name}.safetensors"))
}

fn read(path: &Path) -> Tensors {
    TensorFile::open(path).unwrap().iter().map(|(name, tensor)| (name.to_string(), tensor.clone())).collect()
}

fn write(path: &Path, tensors: &Tensors) -> String {
    let stored = tensors.iter().map(|(name, t)| Stored::f32(name, &t.ty.shape, t.to_f32()));
    noise_files::write_all(path, &stored.collect::<Vec<_>>()).unwrap();
    path.display().to_string()
}

/// The LoRA of the fixtures, with other names or values.
fn lora(place: &Place, name: &str, change: impl FnOnce(&mut Tensors)) -> String {
    let mut tensors = read(&fixture("tiny-ltx2/lora-rank4-tiny"));
    change(&mut tensors);
    write(&place.path(&format!("{name}.safetensors")), &tensors)
}

/// Adds an alpha of `times` the rank to every layer.
fn with_alpha(tensors: &mut Tensors, times: f32) {
    let downs: Vec<(String, usize)> = (tensors.iter())
        .filter_map(|(name, t)| Some((name.strip_suffix(".lora_A.weight")?.to_string(), t.ty.shape[0])))
        .collect();
    for (layer, rank) in downs {
        tensors.insert(format!("{layer}.alpha"), Tensor::f32(&[1], &[times * rank as f32]));
    }
}

fn rename(tensors: &mut Tensors, change: impl Fn(&str) -> String) {
    *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (change(&name), tensor)).collect();
}

/// A folder with the recorded inputs, and with what the reference computed without and with the LoRA.
fn recorded(place: &Place, family: &str) -> PathBuf {
    let folder = place.path(family);
    std::fs::create_dir(&folder).unwrap();
    let of = |name: &str| {
        let places =
            ["expected-1.2.0", "expected"].map(|d| root().join(d).join(family).join(format!("{name}.safetensors")));
        read(places.iter().find(|p| p.is_file()).expect("it was recorded"))
    };
    let (model, with) = (of("transformer"), of("lora"));
    let inputs = ["uniform.sigma", "uniform.video.timesteps", "uniform.audio.timesteps"];
    let is_input = |name: &String| name.starts_with("in.") || inputs.contains(&name.as_str());
    let mut shared = model.clone();
    shared.retain(|name, _| is_input(name));
    write(&folder.join("test_inputs.safetensors"), &shared);
    let mut plain = Tensors::new();
    for (name, tensor) in &model {
        let known = match name.as_str() {
            "uniform.velocity.video" => Some("final_output".to_string()),
            "uniform.velocity.audio" => Some("audio_final_output".into()),
            "prep.video.x" => Some("patch_embed".into()),
            "prep.video.timesteps" => Some("time_embed".into()),
            // Where nothing is projected this is the context itself.
            "prep.video.context" if family == "ltx2" => Some("caption_embed".into()),
            name => name.strip_prefix("uniform.block").and_then(|rest| match rest.split_once('.')? {
                (i, "video") => Some(format!("block_{i}")),
                (i, "audio") => Some(format!("block_{i}_audio")),
                _ => None,
            }),
        };
        plain.extend(known.map(|known| (known, tensor.clone())));
    }
    write(&folder.join("original_no_lora.safetensors"), &plain);
    let velocity = |stream: &str| with[&format!("velocity.f32.{stream}")].clone();
    let with =
        [("final_output", "video"), ("audio_final_output", "audio")].map(|(name, s)| (name.to_string(), velocity(s)));
    write(&folder.join("original_with_lora.safetensors"), &with.into());
    folder
}

/// What `lora four-way` says.
#[track_caller]
fn four_way(place: &Place, dir: &Path, model: &Path, lora: &str) -> Value {
    let args = ["debug", "lora", "four-way", "--json", "--lora", lora, "--dir", &dir.display().to_string()];
    let done = place.run(&[&args[..], &["--checkpoint-path", &model.display().to_string()]].concat());
    let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
    let is_parity = facts["verdict"] == "LoRA parity";
    assert_eq!(done.code, Some(i32::from(!is_parity)), "{facts}");
    facts
}

#[track_caller]
fn verdict(facts: &Value, words: &str) {
    assert!(facts["verdict"].as_str().unwrap().contains(words), "{facts}");
}

fn layer<'v>(facts: &'v Value, name: &str) -> &'v Value {
    facts["layers"].as_array().unwrap().iter().find(|l| l["layer"] == name).unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn recorded_activations_agree_and_a_changed_base_does_not() {
    let place = Place::new();
    for (family, folder, model) in [("ltx2", "tiny-ltx2", "ltx-2-tiny"), ("ltx23", "tiny-ltx23", "ltx-2.3-tiny")] {
        let dir = recorded(&place, family);
        let (model, lora) = (fixture(&format!("{folder}/{model}")), fixture(&format!("{folder}/lora-rank4-tiny")));
        let lora = format!("{}:0.7", lora.display());
        let facts = four_way(&place, &dir, &model, &lora);
        verdict(&facts, "LoRA parity");
        assert!(facts["comparisons"][0]["mse"].as_f64() < Some(1e-6), "{facts}");
        let caption = layer(&facts, "caption_embed");
        assert_eq!(caption["present"], family == "ltx2", "2.3 projects captions in front of the connector");
        for name in ["patch_embed", "time_embed", "block_0", "block_1_audio", "final_output"] {
            assert!(layer(&facts, name)["no_lora"].as_f64() < Some(1e-8), "{name}: {facts}");
        }
        for name in ["block_0_self_attn", "block_1_audio_ffn", "block_0_a2v", "block_0_v2a"] {
            assert_eq!(layer(&facts, name)["present"], true);
        }
        let table = 6;
        let faulty = crate::faults::with_tensor(
            &place,
            &model,
            "model.diffusion_model.transformer_blocks.1.scale_shift_table",
            |bytes| crate::faults::swap_rows(bytes, if family == "ltx2" { table } else { 9 }, 0, 1),
        );
        let facts = four_way(&place, &dir, &faulty, &lora);
        verdict(&facts, "base model differs");
        assert_eq!(facts["first_bad"]["no_lora"], "block_1", "{facts}");
        let text = place.run(&[
            "debug",
            "lora",
            "four-way",
            "--dir",
            &dir.display().to_string(),
            "--checkpoint-path",
            &model.display().to_string(),
            "--lora",
            &lora,
        ]);
        assert_eq!(text.stdout.matches("verdict: ").count(), 1, "{}", text.stdout);
        assert_eq!(
            text.stdout.contains("caption_embed                 not present"),
            family == "ltx23",
            "{}",
            text.stdout
        );
    }
}

/// The model in f32, whose merged weights are not rounded, so that effects are as large as their scales.
fn model() -> PathBuf {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    let write = || {
        let bytes = std::fs::read(fixture("tiny-ltx2/ltx-2-tiny")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let wide: Vec<(String, Vec<usize>, Vec<u8>)> = (file.tensors().into_iter())
            .map(|(name, view)| {
                assert_eq!(view.dtype(), Dtype::BF16, "{name}");
                let value = |b: &[u8; 2]| half::bf16::from_le_bytes(*b).to_f32().to_le_bytes();
                let values = view.data().as_chunks::<2>().0.iter().flat_map(value).collect();
                (name, view.shape().to_vec(), values)
            })
            .collect();
        let views = wide
            .iter()
            .map(|(name, shape, data)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ltx-2-tiny-f32.safetensors");
        std::fs::write(&path, safetensors::serialize(views, header.metadata().clone()).unwrap()).unwrap();
        path
    };
    MODEL.get_or_init(write).clone()
}

/// A folder whose reference is our own run with `lora`.
fn own_reference(place: &Place, name: &str, lora: &str, format: &str) -> PathBuf {
    let (dir, model) = (place.path(name), model().display().to_string());
    let folder = dir.display().to_string();
    place.ok(&["debug", "lora", "inputs", "--out", &folder, "--checkpoint-path", &model, "--format", format]);
    place.ok(&[
        "debug",
        "lora",
        "four-way",
        "--native-only",
        "--dir",
        &folder,
        "--checkpoint-path",
        &model,
        "--lora",
        lora,
    ]);
    for end in ["no_lora", "with_lora"] {
        let [from, to] = ["native", "original"].map(|side| dir.join(format!("{side}_{end}.{format}")));
        std::fs::rename(from, to).unwrap();
    }
    dir
}

#[test]
fn a_wrong_scale_is_told_from_wrong_layers() {
    let place = Place::new();
    let right = lora(&place, "right", |t| with_alpha(t, 2.0));
    let dir = own_reference(&place, "scaled", &format!("{right}:0.05"), "safetensors");
    let check = |file: &str, strength: f64| four_way(&place, &dir, &model(), &format!("{file}:{strength}"));
    verdict(&check(&right, 0.05), "LoRA parity");

    let ignored = lora(&place, "alpha-ignored", |_| ());
    let facts = check(&ignored, 0.05);
    verdict(&facts, "wrong scale");
    assert!((facts["ratio"].as_f64().unwrap() - 0.5).abs() < 0.05, "{facts}");
    let twice = lora(&place, "alpha-twice", |t| with_alpha(t, 4.0));
    let facts = check(&twice, 0.05);
    verdict(&facts, "wrong scale");
    assert!((facts["ratio"].as_f64().unwrap() - 2.0).abs() < 0.1, "{facts}");
    verdict(&check(&right, 0.0), "not applied");

    let prefix = lora(&place, "wrong-prefix", |t| {
        with_alpha(t, 2.0);
        rename(t, |name| name.replace("diffusion_model.", "unknown_model."));
    });
    let facts = check(&prefix, 0.05);
    verdict(&facts, "not applied");
    assert!(facts["unmatched"].as_array().unwrap().iter().any(|k| k.as_str().unwrap().starts_with("unknown_model.")));
    assert!(facts["problem"].as_str().unwrap().contains("none of its"), "{facts}");

    let partial = lora(&place, "partial", |t| {
        with_alpha(t, 2.0);
        rename(t, |name| name.replace(".attn1.", ".self_attention."));
    });
    let facts = check(&partial, 0.05);
    verdict(&facts, "wrong layers or partially");
    assert!(facts["unmatched"].as_array().unwrap().iter().all(|k| k.as_str().unwrap().contains("self_attention")));
    assert!(facts["first_bad"]["with_lora"].is_string(), "{facts}");
    // Nothing is left over, but what belongs to queries went to keys.
    let swapped = lora(&place, "swapped", |t| {
        with_alpha(t, 2.0);
        rename(t, |name| match name.contains(".to_q.") {
            true => name.replace(".to_q.", ".to_k."),
            false => name.replace(".to_k.", ".to_q."),
        });
    });
    verdict(&check(&swapped, 0.05), "wrong layers or partially");
}

#[test]
fn the_side_that_knows_of_alpha_says_what_the_ratio_is() {
    let place = Place::new();
    let without = lora(&place, "without", |_| ());
    let dir = own_reference(&place, "ignored", &format!("{without}:0.05"), "safetensors");
    let with = lora(&place, "with", |t| with_alpha(t, 2.0));
    let facts = four_way(&place, &dir, &model(), &format!("{with}:0.05"));
    verdict(&facts, "wrong scale");
    assert!(facts["near"][0].as_str().unwrap().contains("alpha/rank 2"), "{facts}");
    verdict(&four_way(&place, &dir, &model(), &format!("{without}:0.05")), "LoRA parity");
}

#[test]
fn an_inert_file_is_named_as_such_and_pt_files_work() {
    let place = Place::new();
    let inert = lora(&place, "inert", |t| {
        for (_, tensor) in t.iter_mut().filter(|(name, _)| name.contains("lora_B")) {
            *tensor = Tensor::f32(&tensor.ty.shape, &vec![0.0; tensor.ty.elements()]);
        }
    });
    let dir = own_reference(&place, "inert", &inert, "pt");
    verdict(&four_way(&place, &dir, &model(), &inert), "inert for this input");
    let right = lora(&place, "right", |_| ());
    let dir = own_reference(&place, "right", &right, "pt");
    verdict(&four_way(&place, &dir, &model(), &right), "LoRA parity");
    assert!(dir.join("native_with_lora.pt").exists());
}

#[test]
fn both_phases_run_with_a_command_for_the_reference() {
    let place = Place::new();
    let right = lora(&place, "right", |_| ());
    let (dir, model) = (place.path("auto"), model().display().to_string());
    let args = ["debug", "lora", "four-way", "--dir", &dir.display().to_string(), "--checkpoint-path", &model];
    let lora = format!("{right}:0.5");
    let phase_2 = [&args[..], &["--lora", &lora]].concat();
    place.refused(&phase_2, &["test_inputs", "ltxc debug lora inputs"]);
    // The reference is this binary.
    let command = format!(
        "cd {{dir}} && {} debug lora four-way --native-only --dir . --lora {{lora}}:{{strength}} --checkpoint-path {model} && \
         for end in no_lora with_lora; do mv native_$end.safetensors original_$end.safetensors; done",
        ltxc().display()
    );
    let done = place.ok(&[&phase_2[..], &["--auto", "--ref-cmd", &command]].concat());
    assert!(done.stdout.contains("verdict: LoRA parity"), "{}", done.stdout);
    std::fs::remove_file(dir.join("original_with_lora.safetensors")).unwrap();
    let done = place.run(&phase_2);
    crate::binary::sentence(&done, &["original_with_lora", "record_reference.py"]);
    let done = place.run(&[&phase_2[..], &["--auto", "--ref-cmd", "exit 3"]].concat());
    crate::binary::sentence(&done, &["the reference's command failed", "exit 3"]);
}

#[test]
fn two_files_are_compared_by_what_they_add() {
    let place = Place::new();
    let plain = lora(&place, "plain", |_| ());
    let diff = |other: &str| place.run(&["debug", "lora", "diff", &plain, other]);
    assert_eq!(diff(&plain).code, Some(0));
    let diffusers = lora(&place, "diffusers", |t| {
        rename(t, |name| name.replace("diffusion_model.", "transformer.").replace("patchify_proj", "proj_in"));
    });
    let done = diff(&diffusers);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    // Half of a factor and twice the alpha are the same thing.
    let folded = lora(&place, "folded", |t| {
        for (_, tensor) in t.iter_mut().filter(|(name, _)| name.contains("lora_B")) {
            let half: Vec<f32> = tensor.to_f32().iter().map(|v| v * 0.5).collect();
            *tensor = Tensor::f32(&tensor.ty.shape, &half);
        }
        with_alpha(t, 2.0);
    });
    let done = diff(&folded);
    assert!(done.code == Some(0) && done.stdout.contains("scales 1 and 2"), "{}", done.stdout);
    let faulty = lora(&place, "faulty", |t| {
        t.retain(|name, _| !name.contains("blocks.1.attn1.to_k"));
        let (_, tensor) = t.iter_mut().find(|(name, _)| name.contains("blocks.0.attn1.to_q.lora_B")).unwrap();
        *tensor = Tensor::f32(&tensor.ty.shape, &vec![0.5; tensor.ty.elements()]);
    });
    let done = diff(&faulty);
    assert_eq!(done.code, Some(1));
    for words in ["only in the first: model.diffusion_model.", "blocks.0.attn1.to_q.weight", "NOT add the same"] {
        assert!(done.stdout.contains(words), "{}", done.stdout);
    }
    let done = place.ok(&["debug", "lora", "inspect", &plain, "--json"]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap();
    let norms = facts["norms"].as_array().unwrap();
    assert_eq!(norms.len(), facts["layers"].as_u64().unwrap() as usize);
    // The norm of the product, multiplied out.
    let tensors = read(Path::new(&plain));
    let name = norms[0]["layer"].as_str().unwrap();
    let (a, b) = (&tensors[&format!("{name}.lora_A.weight")], &tensors[&format!("{name}.lora_B.weight")]);
    let (rank, n, m) = (a.ty.shape[0], a.ty.shape[1], b.ty.shape[0]);
    let (a, b) = (a.to_f32(), b.to_f32());
    let at = |i: usize, j: usize| (0..rank).map(|r| f64::from(b[i * rank + r] * a[r * n + j])).sum::<f64>();
    let square: f64 = (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| at(i, j).powi(2)).sum();
    assert!((norms[0]["norm"].as_f64().unwrap() / square.sqrt() - 1.0).abs() < 1e-5, "{}", norms[0]);
}

#[test]
fn merged_weights_are_checked_one_by_one() {
    let place = Place::new();
    let (base, lora) = (model(), fixture("tiny-ltx2/lora-rank4-tiny"));
    let with = format!("{}:0.7", lora.display());
    let check = |more: &[&str]| {
        let base = base.display().to_string();
        let args = ["debug", "lora", "merge-check", "--checkpoint-path", &base, "--lora", &with, "--json"];
        let done = place.run(&[&args[..], more].concat());
        let facts: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stderr));
        assert_eq!(done.code, Some(i32::from(facts["ok"] != true)));
        facts
    };
    let facts = check(&[]);
    assert!(facts["ok"] == true && facts["weights"] == 24 && facts["worst"].as_array().unwrap().len() == 10, "{facts}");
    // A model that another tool has merged: all layers, or all but one.
    let adapter = read(&lora);
    let merge = |bytes: &mut Vec<u8>, left_out: &str| {
        let (header, metadata) = SafeTensors::read_metadata(bytes).unwrap();
        for (name, down) in
            adapter.iter().filter(|(name, _)| name.ends_with("lora_A.weight") && !name.contains(left_out))
        {
            let layer = name.strip_suffix(".lora_A.weight").unwrap();
            let info = metadata.info(&format!("model.{layer}.weight")).expect("the model has the layer");
            let (rank, n) = (down.ty.shape[0], down.ty.shape[1]);
            let (a, b) = (down.to_f32(), adapter[&format!("{layer}.lora_B.weight")].to_f32());
            let start = 8 + header + info.data_offsets.0;
            for i in 0..info.shape[0] * n {
                let at = start + 4 * i;
                let old = f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                let sum: f32 = (0..rank).map(|r| b[i / n * rank + r] * a[r * n + i % n]).sum();
                bytes[at..at + 4].copy_from_slice(&(old + 0.7 * sum).to_le_bytes());
            }
        }
    };
    let mut whole = std::fs::read(&base).unwrap();
    merge(&mut whole, "nothing");
    let whole = place.write("whole.safetensors", &whole).display().to_string();
    assert_eq!(check(&["--merged", &whole])["ok"], true);
    let mut partial = std::fs::read(&base).unwrap();
    merge(&mut partial, "blocks.1.attn1.to_out");
    let partial = place.write("partial.safetensors", &partial).display().to_string();
    let facts = check(&["--merged", &partial]);
    assert_eq!((facts["ok"].as_bool(), facts["bad"].as_u64()), (Some(false), Some(1)), "{facts}");
    assert!(facts["worst"][0]["weight"].as_str().unwrap().contains("blocks.1.attn1.to_out"), "{facts}");
}
