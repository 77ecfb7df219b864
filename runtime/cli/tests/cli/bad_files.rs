//! Model files that are damaged, incomplete, or of another model.

use std::path::{Path, PathBuf};

use ltxc_models::synth::{Preset, synth};
use serde_json::{Map, Value, json};

use crate::binary::{Place, SHAPE, tiny, with};

/// A safetensors file, taken apart.
pub struct Parts {
    pub header: Map<String, Value>,
    pub data: Vec<u8>,
}

impl Parts {
    pub fn read(path: &Path) -> Parts {
        let bytes = std::fs::read(path).unwrap();
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (json, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        Parts { header: serde_json::from_slice(json).unwrap(), data: data.to_vec() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        file(&serde_json::to_string(&self.header).unwrap(), &self.data)
    }

    /// Keys of tensors that contain `part`.
    pub fn keys(&self, part: &str) -> Vec<String> {
        self.header.keys().filter(|k| k.contains(part) && *k != "__metadata__").cloned().collect()
    }

    /// Leaves out the tensors whose keys `goes` says.
    pub fn without(self, goes: impl Fn(&str) -> bool) -> Parts {
        let mut left = Parts { header: Map::new(), data: Vec::new() };
        for (key, mut entry) in self.header {
            if key != "__metadata__" {
                if goes(&key) {
                    continue;
                }
                let [start, end] = [0, 1].map(|i| entry["data_offsets"][i].as_u64().unwrap() as usize);
                let at = left.data.len();
                left.data.extend(&self.data[start..end]);
                entry["data_offsets"] = vec![at, left.data.len()].into();
            }
            left.header.insert(key, entry);
        }
        left
    }

    /// Calls the tensor `key` something else.
    pub fn rename(&mut self, key: &str) {
        let tensor = self.header.remove(key).unwrap_or_else(|| panic!("no tensor `{key}`"));
        self.header.insert(format!("{key}.old"), tensor);
    }

    /// Calls the tensor `from` `to`.
    pub fn rename_to(&mut self, from: &str, to: &str) {
        let entry = self.header.remove(from).unwrap_or_else(|| panic!("{from}"));
        self.header.insert(to.into(), entry);
    }

    /// Shape and bytes of the tensor `key`.
    pub fn tensor(&self, key: &str) -> (Value, &[u8]) {
        let [start, end] = self.place(key);
        (self.header[key]["shape"].clone(), &self.data[start..end])
    }

    /// Gives the tensor `key` other bytes of the same length.
    pub fn set(&mut self, key: &str, bytes: &[u8]) {
        let [start, end] = self.place(key);
        self.data[start..end].copy_from_slice(bytes);
    }

    fn place(&self, key: &str) -> [usize; 2] {
        [0, 1].map(|i| self.header[key]["data_offsets"][i].as_u64().unwrap() as usize)
    }

    /// Changes the configuration in the metadata.
    pub fn configure(&mut self, change: impl FnOnce(&mut Value)) {
        let config = &mut self.header["__metadata__"]["config"];
        let mut value: Value = serde_json::from_str(config.as_str().unwrap()).unwrap();
        change(&mut value);
        *config = value.to_string().into();
    }
}

fn file(json: &str, data: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), data].concat()
}

/// `compile`, `inspect` and `run` must refuse these bytes as a model. Returns what `compile` says.
#[track_caller]
fn refused(bytes: &[u8], words: &[&str]) -> String {
    let place = Place::new();
    let path = place.write("model.safetensors", bytes);
    let words = [&["model.safetensors"], words].concat();
    let args = |verb: &str, more: &[&str]| {
        let files = tiny().model_args_with(&path, &tiny().gemma);
        with([verb.to_string()].into_iter().chain(files).collect(), &[more, &SHAPE].concat())
    };
    place.refused(&args("inspect", &[]), &words);
    place.refused(&args("run", &["-p", "x", "-o", "a.mp4"]), &words);
    place.refused(&args("compile", &["-o", "a.ltxplan"]), &words)
}

#[test]
fn hostile_headers_are_refused() {
    let whole = std::fs::read(&tiny().checkpoint).unwrap();
    refused(&[], &["is empty", "download it again"]);
    refused(&whole[..5], &["5 bytes", "download it again"]);
    refused(&whole[..1000], &["only 992 follow", "download it again"]);
    refused(&whole[..whole.len() / 2], &["incomplete", "download it again"]);
    refused(&[&whole[..], b"tail"].concat(), &["4 belong to no tensor"]);
    refused(&file("{", &[]), &["not valid"]);
    refused(&file(&"[".repeat(100_000), &[]), &["not valid"]);
    refused(&file(&format!(r#"{{"a":{}}}"#, "[".repeat(100_000)), &[]), &["not valid"]);
    refused(&u64::MAX.to_le_bytes(), &["claims 18446744073709551615 bytes"]);
    refused(&[&99_999_999u64.to_le_bytes()[..], b"{}"].concat(), &["claims 99999999 bytes", "only 2 follow"]);
    refused(b"version https://git-lfs.github.com/spec/v1", &["git lfs pull"]);
    refused(b"GGUF\x03\0\0\0\0\0\0\0\0", &["GGUF"]);
    let one = |entry: &str| file(&format!(r#"{{"a":{entry}}}"#), &[0; 8]);
    let entry =
        |shape: &str, offsets: &str| one(&format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#));
    refused(&entry("[2]", "[8,0]"), &["`a`"]);
    refused(&entry("[2]", "[0,18446744073709551615]"), &["`a`", "lies at bytes"]);
    refused(&entry("[4611686018427387904,8]", "[0,8]"), &["`a`", "no file can hold"]);
    refused(&entry("[0,18446744073709551615]", "[0,8]"), &["`a`"]);
    refused(&entry("[1,1,1,1,1,1,1,1,1,1,1,2]", "[0,8]"), &["`a`", "12 axes"]);
    refused(&entry("[-2]", "[0,8]"), &["`a`"]);
    refused(&entry("[3]", "[0,8]"), &["`a`", "expected 12 bytes, found 8"]);
    refused(&one(r#"{"dtype":"F33","shape":[2],"data_offsets":[0,8]}"#), &["`F33`", "BF16"]);
    refused(&entry("[2]", "[0,8]"), &["no part of an LTX-2 model", "name a model file"]);
}

#[test]
fn overlapping_tensors_and_holes_are_refused() {
    let mut parts = Parts::read(&tiny().checkpoint);
    let keys = parts.keys("audio_vae.decoder.conv_in");
    parts.header[&keys[1]] = parts.header[&keys[0]].clone();
    refused(&parts.bytes(), &["conv_in"]);
    let mut parts = Parts::read(&tiny().checkpoint);
    parts.header.remove(&keys[0]);
    refused(&parts.bytes(), &["hole", "download it again"]);
}

#[test]
fn all_missing_tensors_are_listed_up_to_twenty() {
    let mut parts = Parts::read(&tiny().checkpoint);
    let keys = parts.keys("transformer_blocks.1.");
    assert!(keys.len() > 21, "{} tensors in a block", keys.len());
    keys.iter().for_each(|key| parts.rename(key));
    // Every one is missing, and there under a name that nobody knows.
    let more = format!("and {} more", 2 * keys.len() - 20);
    let count = format!("{} problem(s) with the tensors", 2 * keys.len());
    let words = [&count, &more, "the first 20 are listed", "is missing, expected [", "use the files as published"];
    let text = refused(&parts.bytes(), &words);
    assert_eq!(text.matches("is missing").count(), 20, "{text}");
}

#[test]
fn tensors_of_all_components_are_listed_at_once() {
    let mut parts = Parts::read(&tiny().checkpoint);
    let missing = [
        "model.diffusion_model.transformer_blocks.1.attn1.to_q.weight",
        "model.diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_k.weight",
        "vae.encoder.conv_in.conv.weight",
        "vae.decoder.conv_in.conv.weight",
        "vocoder.conv_pre.weight",
    ];
    missing.iter().for_each(|key| parts.rename(key));
    let misshapen = "audio_vae.decoder.conv_out.conv.weight";
    parts.header[misshapen]["shape"].as_array_mut().unwrap().swap(0, 1);
    // The sizes that were written are the ones that are expected.
    let written = |key: &str| {
        let shape = Parts::read(&tiny().checkpoint).header[key]["shape"].as_array().unwrap().clone();
        shape.iter().map(|n| n.to_string()).collect::<Vec<_>>().join(", ")
    };
    let mut words = vec!["11 problem(s)".to_string()];
    for key in missing {
        words.push(format!("model.safetensors: `{key}` is missing, expected [{}] in f32, bf16 or f16", written(key)));
        words.push(format!("model.safetensors: `{key}.old` is bf16 [{}], expected no such tensor", written(key)));
    }
    words.push(format!("model.safetensors: `{misshapen}` is bf16["));
    words.push(format!(", expected [{}] in f32, bf16 or f16", written(misshapen)));
    let text = refused(&parts.bytes(), &words.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(!text.contains("more"), "{text}");
}

#[test]
fn types_and_shapes_are_compared() {
    let first = |parts: &Parts, part: &str| parts.keys(part).remove(0);
    let linear = "transformer_blocks.0.audio_ff.net.0.proj.weight";
    let mut parts = Parts::read(&tiny().checkpoint);
    let key = first(&parts, linear);
    parts.header[&key]["shape"].as_array_mut().unwrap().reverse();
    refused(&parts.bytes(), &["1 problem(s)", linear, "expected ["]);

    let mut parts = Parts::read(&tiny().checkpoint);
    assert_eq!(parts.header[&key]["dtype"], "BF16");
    parts.header[&key]["dtype"] = "I16".into();
    refused(&parts.bytes(), &["1 problem(s)", linear, "is I16, expected [", "in f32, bf16 or f16"]);

    // Half as many values of a type that graphs know, but not for weights.
    let mut parts = Parts::read(&tiny().checkpoint);
    let shape = parts.header[&key]["shape"].as_array_mut().unwrap();
    shape[0] = (shape[0].as_u64().unwrap() / 2).into();
    parts.header[&key]["dtype"] = "I32".into();
    refused(&parts.bytes(), &["1 problem(s)", linear, "i32["]);
}

#[test]
fn more_tensors_than_needed_do_no_harm() {
    let mut parts = Parts::read(&tiny().checkpoint);
    let end = parts.data.len();
    parts.data.extend([0; 8]);
    parts.header.insert(
        "model.diffusion_model.added.weight".into(),
        json!({"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}),
    );
    let place = Place::new();
    let path = place.write("model.safetensors", &parts.bytes());
    let files = tiny().model_args_with(&path, &tiny().gemma);
    let output = place.ok(&with(["compile".to_string()].into_iter().chain(files).collect(), &SHAPE));
    let told = output.stderr;
    assert!(
        told.contains("note: 1 tensors are not part") && told.contains("model.diffusion_model.added.weight"),
        "{told}"
    );
}

#[test]
fn configurations_are_checked() {
    let changed = |change: fn(&mut Value)| {
        let mut parts = Parts::read(&tiny().checkpoint);
        parts.configure(change);
        parts.bytes()
    };
    let mut parts = Parts::read(&tiny().checkpoint);
    parts.header.remove("__metadata__");
    refused(&parts.bytes(), &["no `config` in its metadata", "use the file as published"]);
    let mut parts = Parts::read(&tiny().checkpoint);
    parts.header["__metadata__"]["config"] = "{".into();
    refused(&parts.bytes(), &["`config` is not valid JSON"]);
    let mut parts = Parts::read(&tiny().checkpoint);
    parts.header["__metadata__"]["model_version"] = "2.5.0".into();
    refused_somehow(&parts.bytes());
    refused(&changed(|c| drop(c.as_object_mut().unwrap().remove("vae"))), &["video VAE", "no `vae`"]);
}

#[test]
fn no_value_of_a_configuration_causes_a_panic() {
    let mut parts = Parts::read(&tiny().checkpoint);
    let original = parts.header["__metadata__"]["config"].clone();
    let config: Value = serde_json::from_str(original.as_str().unwrap()).unwrap();
    for section in ["transformer", "vae", "audio_vae", "vocoder"] {
        for name in config[section].as_object().unwrap().keys() {
            for value in [json!(-1), json!(1e300), json!(u64::MAX), json!(0), json!(null), json!("x"), json!([[]])] {
                parts.header["__metadata__"]["config"] = original.clone();
                parts.configure(|c| c[section][name] = value.clone());
                no_panic(&parts.bytes(), &format!("{section}.{name} = {value}"));
            }
        }
    }
}

/// Compiles in this process, where thousands of configurations are cheap: an error or a plan, never a panic.
fn no_panic(bytes: &[u8], what: &str) {
    use ltxc::args::{ModelArgs, ShapeArgs};
    let place = Place::new();
    let args = ModelArgs {
        checkpoint_path: Some(place.write("model.safetensors", bytes)),
        gemma_root: Some(tiny().gemma.clone()),
        spatial_upsampler_path: Some(tiny().upsampler.clone()),
        ..ModelArgs::default()
    };
    let shape = ShapeArgs { height: Some(64), width: Some(64), num_frames: Some(9), ..ShapeArgs::default() };
    let shape = ltxc::job::Shape::resolve(&shape, 0).unwrap();
    let result = std::panic::catch_unwind(|| {
        ltxc::model_files::ModelFiles::open(&args, true)
            .and_then(|files| ltxc::assemble::assemble(&files, &shape))
            .map(drop)
    });
    match result {
        Err(_) => panic!("{what} panics"),
        Ok(Err(e)) => assert!(!format!("{e:#}").is_empty()),
        Ok(Ok(())) => {}
    }
}

#[track_caller]
fn refused_somehow(bytes: &[u8]) {
    refused_with_gemma(bytes, &tiny().gemma, &[]);
}

#[track_caller]
fn refused_with_gemma(bytes: &[u8], gemma: &Path, words: &[&str]) {
    let place = Place::new();
    let path = place.write("model.safetensors", bytes);
    let files = tiny().model_args_with(&path, gemma);
    let args = with(["compile".to_string()].into_iter().chain(files).collect(), &SHAPE);
    place.refused(&with(args, &["-o", "a.ltxplan"]), words);
}

/// A copy of the text encoder.
fn gemma_in(place: &Place) -> PathBuf {
    synth(Preset::Tiny, &place.path("copy"), 10).unwrap().gemma
}

#[test]
fn a_gemma_of_another_width_is_named() {
    let (place, model) = (Place::new(), std::fs::read(&tiny().checkpoint).unwrap());
    let gemma = gemma_in(&place);
    // Another width in configuration and tensors alike, as a smaller model of the family has it.
    let mut config: Value = serde_json::from_slice(&std::fs::read(gemma.join("config.json")).unwrap()).unwrap();
    let hidden = config["text_config"]["hidden_size"].as_u64().unwrap();
    config["text_config"]["hidden_size"] = (hidden / 2).into();
    std::fs::write(gemma.join("config.json"), config.to_string()).unwrap();
    refused_with_gemma(&model, &gemma, &["gemma-3-tiny", "name the Gemma"]);
    let mut parts = Parts::read(&gemma.join("model.safetensors"));
    parts.data.clear();
    for (key, tensor) in parts.header.iter_mut().filter(|(key, _)| *key != "__metadata__") {
        assert_eq!(tensor["dtype"], "BF16", "{key}");
        let shape = tensor["shape"].as_array_mut().unwrap();
        shape.iter_mut().filter(|n| **n == hidden).for_each(|n| *n = (hidden / 2).into());
        let elements: u64 = shape.iter().map(|n| n.as_u64().unwrap()).product();
        let start = parts.data.len();
        parts.data.resize(start + 2 * elements as usize, 0);
        tensor["data_offsets"] = json!([start, parts.data.len()]);
    }
    std::fs::write(gemma.join("model.safetensors"), parts.bytes()).unwrap();
    let values = format!("states of {} values", hidden / 2);
    refused_with_gemma(&model, &gemma, &["gemma-3-tiny", &values, "name the Gemma"]);
}

#[test]
fn folders_that_are_no_text_encoder_are_refused() {
    let (place, model) = (Place::new(), std::fs::read(&tiny().checkpoint).unwrap());
    refused_with_gemma(&model, &place.path("nowhere"), &["nowhere"]);
    let gemma = gemma_in(&place);
    let replaced = |name: &str, bytes: &[u8], words: &[&str]| {
        let old = std::fs::read(gemma.join(name)).unwrap();
        std::fs::write(gemma.join(name), bytes).unwrap();
        refused_with_gemma(&model, &gemma, words);
        std::fs::write(gemma.join(name), old).unwrap();
    };
    replaced("config.json", b"{}", &["gemma-3-tiny", "model_type"]);
    replaced("config.json", b"[", &["config.json", "not valid JSON"]);
    replaced("config.json", br#"{"model_type":"llama"}"#, &["llama", "gemma3"]);
    replaced("model.safetensors", b"", &["model.safetensors", "is empty"]);
    std::fs::remove_file(gemma.join("tokenizer.json")).unwrap();
    refused_with_gemma(&model, &gemma, &["gemma-3-tiny", "tokenizer"]);
}

#[test]
fn files_of_another_kind_are_told_apart() {
    let tiny = tiny();
    let upsampler = std::fs::read(&tiny.upsampler).unwrap();
    refused(&upsampler, &["model.safetensors"]);
    let place = Place::new();
    let args = with(["compile".to_string()].into_iter().chain(tiny.model_args()).collect(), &SHAPE);
    let model = tiny.checkpoint.display().to_string();
    place.refused(&with(args, &["--spatial-upsampler-path", &model]), &["cannot be used multiple times"]);
    let checkpoint =
        ["compile", "--checkpoint-path", &model, "--gemma-root", &tiny.gemma.display().to_string()].map(String::from);
    let args = with(checkpoint.into(), &[&["--spatial-upsampler-path", &model][..], &SHAPE].concat());
    place.refused(&args, &["no latent upsampler", "name the upsampler"]);
    let files: [&[&str]; 3] = [&[], &["--checkpoint-path", "nowhere"], &["--checkpoint-path", &model]];
    for (files, word) in files.into_iter().zip(["--checkpoint-path", "nowhere", "--gemma-root"]) {
        place.refused(&[&["compile"], files].concat(), &[word]);
    }
}
