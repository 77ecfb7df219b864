//! Files that are what they should be, but not for this: of another generation, kind, width or precision.

use std::path::{Path, PathBuf};

use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::{DType, TensorType};
use ltxc_models::synth::{Preset, synth};
use serde_json::{Value, json};

use crate::bad_files::Parts;
use crate::binary::{Place, SHAPE, fixtures, tiny, with};

/// Model files of a family of the fixtures.
struct Files {
    checkpoint: PathBuf,
    gemma: PathBuf,
    upsampler: PathBuf,
}

impl Files {
    fn of(family: &str) -> Files {
        let (folder, model, upsampler) = match family {
            "ltx2" => ("tiny-ltx2", "ltx-2-tiny", "spatial-upscaler-x2-tiny"),
            _ => ("tiny-ltx23", "ltx-2.3-tiny", "spatial-upscaler-x2-ltx23-tiny"),
        };
        let file = |name: &str| fixtures().join(folder).join(format!("{name}.safetensors"));
        Files { checkpoint: file(model), gemma: fixtures().join("tiny-gemma3"), upsampler: file(upsampler) }
    }

    fn args(&self, verb: &str, more: &[&str]) -> Vec<String> {
        let paths = [&self.checkpoint, &self.gemma, &self.upsampler].map(|p| p.display().to_string());
        let [checkpoint, gemma, upsampler] = &paths;
        let args =
            [verb, "--checkpoint-path", checkpoint, "--gemma-root", gemma, "--spatial-upsampler-path", upsampler];
        with(args.map(String::from).into(), &[&SHAPE[..], &["--device", "cpu"], more].concat())
    }

    /// `compile` and `run` must refuse these files, before anything is compiled.
    #[track_caller]
    fn refused(&self, more: &[&str], words: &[&str]) {
        let place = Place::new();
        place.refused(&self.args("compile", &[&["-o", "a.ltxplan"], more].concat()), words);
        place.refused(&self.args("run", &[&["-p", "rain", "-o", "a.wav"], more].concat()), words);
    }
}

#[test]
fn an_upscaler_of_the_wrong_kind_is_refused() {
    let upscaler = |name: &str| fixtures().join(format!("{name}.safetensors"));
    let with = |family: &str, name: &str| Files { upsampler: upscaler(name), ..Files::of(family) };
    let temporal = with("ltx2", "tiny-ltx2/temporal-upscaler-x2-tiny");
    temporal.refused(&[], &["temporal-upscaler-x2-tiny", "the second stage needs", "name a spatial x2 upscaler"]);
    let half = with("ltx23", "tiny-ltx23/spatial-upscaler-x1.5-ltx23-tiny");
    half.refused(&[], &["spatial-upscaler-x1.5", "the second stage needs", "name a spatial x2 upscaler"]);
}

#[test]
fn an_upscaler_of_another_generation_is_refused() {
    let mixed = |family: &str, other: &str| Files { upsampler: Files::of(other).upsampler, ..Files::of(family) };
    let words = ["is one of LTX-2.3 or newer, the model is LTX-2", "name the spatial x2 upscaler of LTX-2"];
    mixed("ltx2", "ltx23").refused(&[], &words);
    let words = ["is one of LTX-2, the model is LTX-2.3", "name the spatial x2 upscaler of LTX-2.3"];
    mixed("ltx23", "ltx2").refused(&[], &words);
    // A model that does not say what it is may be of either.
    let (place, newer) = (Place::new(), Files::of("ltx23"));
    let mut parts = Parts::read(&newer.checkpoint);
    parts.header["__metadata__"].as_object_mut().unwrap().remove("model_version");
    let unnamed = Files { checkpoint: place.write("unnamed.safetensors", &parts.bytes()), ..newer };
    place.ok(&unnamed.args("compile", &["-o", "a.ltxplan"]));
    // Another number of channels: the synthetic model has 8.
    let other = Files { upsampler: tiny().upsampler.clone(), ..Files::of("ltx2") };
    other.refused(&[], &["takes latents of 8 channels, the video VAE makes", "name the upscaler of this model"]);
}

#[test]
fn a_text_encoder_of_another_family_is_refused() {
    let place = Place::new();
    let gemma = synth(Preset::Tiny, &place.path("copy"), 10).unwrap().gemma;
    let path = gemma.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut refused = |kind: &str, words: &[&str]| {
        config["model_type"] = kind.into();
        std::fs::write(&path, config.to_string()).unwrap();
        Files { gemma: gemma.clone(), ..Files::of("ltx2") }.refused(&[], words);
    };
    refused("gemma4_unified", &["is a Gemma 4, but LTX-2 needs Gemma 3 12B; name its folder"]);
    refused("gemma4", &["is a stock Gemma 4"]);
    refused("llama", &["is a `llama`, expected `gemma3`"]);
}

#[test]
fn a_text_encoder_of_another_width_is_refused() {
    // The synthetic model's is of the right family and another size.
    let files = Files { gemma: tiny().gemma.clone(), ..Files::of("ltx2") };
    files.refused(&[], &["gemma-3-tiny", "states of 96 values", "name the Gemma that the model was trained with"]);
}

/// The files of a family with another checkpoint, made by `change`.
fn changed(place: &Place, family: &str, change: impl FnOnce(&mut Parts)) -> Files {
    let files = Files::of(family);
    let mut parts = Parts::read(&files.checkpoint);
    change(&mut parts);
    Files { checkpoint: place.write("changed.safetensors", &parts.bytes()), ..files }
}

#[test]
fn a_vae_of_another_latent_is_refused() {
    let place = Place::new();
    let mut own = 0;
    let channels = changed(&place, "ltx2", |parts| {
        parts.configure(|c| {
            own = c["vae"]["latent_channels"].as_u64().unwrap();
            c["vae"]["latent_channels"] = (2 * own).into();
        });
    });
    let problem = format!(
        "the video VAE has {} latent channels, the transformer takes {own}; they are not of one model",
        2 * own
    );
    channels.refused(&[], &[&problem]);
    let statistics = changed(&place, "ltx2", |parts| {
        for key in ["mean-of-means", "std-of-means"] {
            parts.header[&format!("vae.per_channel_statistics.{key}")]["shape"] = json!([2, own / 2]);
        }
    });
    let problem = format!("vae.per_channel_statistics.mean-of-means` is bf16[2,{}], expected [{own}]", own / 2);
    statistics.refused(&[], &[&problem, "use the files as published"]);
    let audio = changed(&place, "ltx2", |parts| {
        parts.configure(|c| {
            let z = &mut c["audio_vae"]["model"]["params"]["ddconfig"]["z_channels"];
            own = z.as_u64().unwrap();
            *z = (2 * own).into();
        });
    });
    let problem = format!("the audio VAE has tokens of {} values, the transformer takes {}", 32 * own, 16 * own);
    audio.refused(&[], &["changed.safetensors", &problem]);
}

/// Linear layers of the blocks in fp8 with a scale each, as published fp8 files have them; the same numbers in bf16.
fn fp8(place: &Place, family: &str) -> [Files; 2] {
    let files = Files::of(family);
    let original = Parts::read(&files.checkpoint);
    let is_quantised =
        |key: &str| key.contains(".transformer_blocks.") && key.ends_with(".weight") && !key.contains("norm");
    let mut written = [
        Parts { header: Default::default(), data: Vec::new() },
        Parts { header: Default::default(), data: Vec::new() },
    ];
    let mut add = |i: usize, key: &str, dtype: &str, shape: &Value, bytes: &[u8]| {
        let start = written[i].data.len();
        written[i].data.extend(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, start + bytes.len()]});
        written[i].header.insert(key.into(), entry);
    };
    for (key, entry) in original.header.iter().filter(|(key, _)| *key != "__metadata__") {
        let offsets = entry["data_offsets"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize);
        let [start, end] = offsets.collect::<Vec<_>>()[..] else { panic!("two offsets") };
        let bytes = &original.data[start..end];
        let shape = &entry["shape"];
        if !is_quantised(key) {
            (0..2).for_each(|i| add(i, key, entry["dtype"].as_str().unwrap(), shape, bytes));
            continue;
        }
        let extents: Vec<usize> = shape.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        let ty = |dtype| TensorType::new(dtype, extents.clone());
        let values = Tensor::from_bytes(ty(DType::BF16), bytes).to_f32();
        let scale = values.iter().fold(0f32, |m, v| m.max(v.abs())) / 448.0;
        let scaled =
            |f: &dyn Fn(f32) -> f32, values: &[f32]| Data::Float(values.iter().map(|&v| f(v).into()).collect());
        let narrow = Tensor { ty: ty(DType::F8E4M3), data: scaled(&|v| v / scale, &values) }.to_bytes();
        let read = Tensor::from_bytes(ty(DType::F8E4M3), &narrow).to_f32();
        let wide = Tensor { ty: ty(DType::BF16), data: scaled(&|v| v * scale, &read) }.to_bytes();
        add(0, key, "F8_E4M3", shape, &narrow);
        add(0, &format!("{key}_scale"), "F32", &json!([]), &scale.to_le_bytes());
        add(0, &key.replace(".weight", ".input_scale"), "F32", &json!([]), &1f32.to_le_bytes());
        add(1, key, "BF16", shape, &wide);
    }
    let mut names = ["fp8.safetensors", "bf16.safetensors"].into_iter();
    written.map(|mut parts| {
        parts.header.insert("__metadata__".into(), original.header["__metadata__"].clone());
        Files { checkpoint: place.write(names.next().unwrap(), &parts.bytes()), ..Files::of(family) }
    })
}

#[test]
fn fp8_checkpoints_run_like_their_numbers_in_bf16() {
    let place = Place::new();
    for family in ["ltx2", "ltx23"] {
        let [narrow, wide] = fp8(&place, family);
        let lora = fixtures().join(format!("tiny-{family}/lora-rank4-tiny.safetensors")).display().to_string();
        for more in [&[][..], &["--lora", &lora, "0.5"]] {
            let sound = |files: &Files| {
                let done = place.ok(&files.args("run", &[&["-p", "rain", "-o", "a.wav"], more].concat()));
                assert!(!done.stderr.contains("not part of this model"), "{}", done.stderr);
                place.read("a.wav")
            };
            assert!(sound(&narrow) == sound(&wide), "{family} {more:?}");
        }
    }
}

#[test]
fn fp8_checkpoints_are_not_cast_again() {
    let place = Place::new();
    let [narrow, wide] = fp8(&place, "ltx2");
    let cast = &["--quantization", "fp8-cast"];
    narrow.refused(cast, &["fp8.safetensors` is stored in fp8 already", "leave `--quantization fp8-cast` out"]);
    wide.refused(cast, &["used as they are stored", "name an fp8 file of the model"]);
    place.ok(&wide.args("compile", &["--quantization", "none", "-o", "a.ltxplan"]));
}

#[test]
fn scales_of_other_schemes_are_refused() {
    let place = Place::new();
    let [narrow, _] = fp8(&place, "ltx2");
    let path: &Path = &narrow.checkpoint;
    let original = Parts::read(path);
    let key = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight";
    let mut parts = Parts { header: original.header.clone(), data: original.data.clone() };
    let start = parts.data.len();
    parts.data.extend([0; 8]);
    parts.header[&format!("{key}_scale")]["shape"] = json!([1, 1]);
    parts
        .header
        .insert(format!("{key}_scale_2"), json!({"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]}));
    let files = Files { checkpoint: place.write("other.safetensors", &parts.bytes()), ..Files::of("ltx2") };
    files.refused(&[], &[key, "_scale_2` f32 [2], expected one f32 for all of it"]);
    let mut parts = Parts { header: original.header, data: original.data };
    let scale = parts.header[&format!("{key}_scale")].clone();
    let mut ints = scale.clone();
    ints["dtype"] = "I32".into();
    parts.header.insert(format!("{key}_scale"), ints);
    let files = Files { checkpoint: place.write("other.safetensors", &parts.bytes()), ..Files::of("ltx2") };
    files.refused(&[], &[key, "_scale` i32 [], expected one f32 for all of it"]);
}
