//! Checkpoints: published layouts are opened as one set of tensors, damage is refused, synthetic files are real ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ltxc_models::checkpoint::layouts::{Layout, lay_out};
use ltxc_models::checkpoint::{
    Checkpoint, FileKind, GemmaFamily, GemmaFolder, Generation, Header, ModelFiles, WeightFile, header, hub,
};
use ltxc_models::synth::{self, Preset, tensors};
use ltxc_models::{ModelError, TensorDirectory};
use ltxc_tests::fixtures;
use proptest::prelude::*;
use serde_json::{Value, json};

fn path(name: &str) -> PathBuf {
    fixtures::root().join(name)
}

/// Whether an optional part of the fixtures is there; says so if not.
fn has(name: &str) -> bool {
    let is_there = path(name).exists();
    if !is_there {
        println!("absent: {name}");
    }
    is_there
}

type Shapes = BTreeMap<String, Vec<usize>>;

fn shapes(specs: Vec<tensors::TensorSpec>) -> Shapes {
    let count = specs.len();
    let shapes: Shapes = specs.into_iter().map(|s| (s.key, s.shape)).collect();
    assert_eq!(shapes.len(), count, "a key is listed twice");
    shapes
}

fn stored(checkpoint: &Checkpoint) -> Shapes {
    checkpoint.tensors().map(|(key, found)| (key.to_string(), found.stored.shape.clone())).collect()
}

#[track_caller]
fn assert_same(found: &Shapes, expected: &Shapes) {
    let missing: Vec<_> = expected.iter().filter(|(k, v)| found.get(*k) != Some(v)).take(5).collect();
    let extra: Vec<_> = found.iter().filter(|(k, v)| expected.get(*k) != Some(v)).take(5).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing {missing:?}\nunexpected {extra:?}");
}

/// States of the fixtures' text encoder: its layers and the embedding.
fn states(gemma: &GemmaFolder) -> usize {
    gemma.text_config()["num_hidden_layers"].as_u64().unwrap() as usize + 1
}

#[track_caller]
fn message<T>(result: Result<T, ModelError>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.to_string(),
    }
}

// ---------------------------------------------------------------------------------------------- published layouts

#[test]
fn single_files_have_exactly_the_listed_tensors() {
    let gemma = GemmaFolder::open(&path("tiny-gemma3")).unwrap();
    for (name, generation) in [
        ("tiny-ltx2/ltx-2-tiny", Generation::Ltx2),
        ("tiny-ltx2/ltx-2-tiny-f32", Generation::Ltx2),
        ("tiny-ltx23/ltx-2.3-tiny", Generation::Ltx23),
    ] {
        if name.ends_with("-f32") && !has(&format!("{name}.safetensors")) {
            continue;
        }
        let checkpoint = Checkpoint::open(&path(&format!("{name}.safetensors"))).unwrap();
        assert_eq!(checkpoint.generation(), generation);
        assert_eq!(checkpoint.ignored(), []);
        assert_same(&stored(&checkpoint), &shapes(tensors::model(checkpoint.config(), states(&gemma)).unwrap()));
        assert_eq!(gemma.check_pairing(&checkpoint).unwrap(), None);
        assert!(!checkpoint.is_synthetic());
    }
}

#[test]
fn component_files_have_exactly_the_listed_tensors() {
    let video = Checkpoint::open(&path("tiny-ltx2/vae-alt-tiny.safetensors")).unwrap();
    assert_same(&stored(&video), &shapes(tensors::video_vae(video.section("vae").unwrap()).unwrap()));
    let audio = Checkpoint::open(&path("tiny-ltx2/audio-vae-alt-tiny.safetensors")).unwrap();
    assert_same(&stored(&audio), &shapes(tensors::audio_vae(audio.section("audio_vae").unwrap()).unwrap()));
    assert!(message(audio.section("vae").map(drop)).contains("`vae`"));
}

#[test]
fn upsamplers_have_exactly_the_listed_tensors() {
    let folders = ["tiny-ltx2", "tiny-ltx23", "tiny-ltx25/latent_upscale_models"];
    let files =
        folders.iter().filter(|f| has(f)).flat_map(|f| fs::read_dir(path(f)).unwrap().map(|e| e.unwrap().path()));
    let upsamplers: Vec<PathBuf> = files.filter(|p| p.to_string_lossy().contains("upscaler")).collect();
    assert!(upsamplers.len() > 3);
    for path in upsamplers {
        let upsampler = Checkpoint::open_upsampler(&path).unwrap();
        assert_same(&stored(&upsampler), &shapes(tensors::upsampler(upsampler.config()).unwrap()));
    }
    assert!(
        message(Checkpoint::open_upsampler(&path("tiny-ltx2/vae-alt-tiny.safetensors")))
            .contains("no latent upsampler")
    );
}

#[test]
fn text_encoders_are_the_same_in_every_layout() {
    let single = GemmaFolder::open(&path("tiny-gemma3")).unwrap();
    let sharded = GemmaFolder::open(&path("tiny-gemma3-sharded")).unwrap();
    assert_eq!((single.family(), single.files().len(), sharded.files().len()), (GemmaFamily::Gemma3, 1, 2));
    assert_eq!(single.tokenizer_json().unwrap(), sharded.tokenizer_json().unwrap());
    assert!(single.tokenizer_path().unwrap().is_file());
    let part = |gemma: &GemmaFolder, is_text: bool| -> Shapes {
        let all = gemma.tensors().map(|(k, found)| (k.to_string(), found.stored.shape.clone()));
        all.filter(|(k, _)| k.starts_with("language_model.") == is_text).collect()
    };
    let text = |gemma: &GemmaFolder| part(gemma, true);
    assert_same(&text(&single), &shapes(tensors::gemma3(single.config()).unwrap()));
    assert_same(&part(&single, false), &shapes(tensors::gemma3_vision(single.config()).unwrap()));
    assert_eq!((text(&single), part(&single, false)), (text(&sharded), part(&sharded, false)));
    assert_eq!(single.preprocessor_config().unwrap(), sharded.preprocessor_config().unwrap());
    assert!(single.preprocessor_config().unwrap().is_some());

    if !has("tiny-ltx25") {
        return;
    }
    let folder = GemmaFolder::open(&path("tiny-ltx25/gemma4-hf")).unwrap();
    let bundled = "tiny-ltx25/text_encoders/gemma4-tiny-with-proj-ltx-2.5-bf16.safetensors";
    let bundled = GemmaFolder::open(&path(bundled)).unwrap();
    assert_eq!((folder.family(), bundled.family()), (GemmaFamily::Gemma4, GemmaFamily::Gemma4));
    assert_eq!(text(&folder), text(&bundled));
    let key = "language_model.model.layers.0.layer_scalar";
    assert_eq!(bundled.actual_key(key), "model.layers.0.layer_scalar");
    assert_eq!(folder.actual_key(key), "model.language_model.layers.0.layer_scalar");
    let parse = |g: &GemmaFolder| serde_json::from_slice::<Value>(&g.tokenizer_json().unwrap()).unwrap();
    assert_eq!(parse(&bundled), parse(&folder));
    assert_eq!(bundled.tokenizer_config().unwrap()["bos_token"], "<bos>");
}

fn split_files() -> ModelFiles {
    let file = |name: &str| Some(path(&format!("tiny-ltx25/{name}.safetensors")));
    ModelFiles {
        transformer: file("diffusion_models/ltx-2.5-tiny-distilled-transformer-bf16"),
        text_encoder: file("text_encoders/gemma4-tiny-with-proj-ltx-2.5-bf16"),
        video_vae: file("vae/ltx-2.5-tiny-video-vae-conv-bf16"),
        audio_vae: file("vae/ltx-2.5-tiny-audio-vae-bf16"),
        duration_head: file("model_patches/ltx-2.5-tiny-duration-head-bf16"),
        ..ModelFiles::default()
    }
}

#[test]
fn split_files_are_one_checkpoint() {
    if !has("tiny-ltx25") {
        return;
    }
    let checkpoint = Checkpoint::open_files(&split_files()).unwrap();
    let gemma = GemmaFolder::open(&split_files().text_encoder.unwrap()).unwrap();
    assert_eq!(checkpoint.generation(), Generation::Ltx25);
    assert_eq!(checkpoint.files().len(), 5);
    let mut found = stored(&checkpoint);
    let heads = found.keys().filter(|k| k.starts_with("duration_head.")).count();
    assert_eq!(heads, 15);
    found.retain(|key, _| !key.starts_with("duration_head."));
    assert_same(&found, &shapes(tensors::model(checkpoint.config(), states(&gemma)).unwrap()));
    // The duration head carries two numbers of the transformer's configuration; they must not replace it.
    assert!(checkpoint.section("transformer").unwrap().get("num_layers").is_some());
    let key = "vae.decoder.conv_in.conv.weight";
    assert_eq!(checkpoint.actual_key(key), "decoder.conv_in.conv.weight");
    let found = checkpoint.tensor(key).unwrap();
    assert_eq!(checkpoint.data(key).unwrap().len() as u64, found.stored.bytes);
    assert!(checkpoint.paths()[found.file].to_string_lossy().contains("video-vae-conv"));
    assert_eq!(checkpoint.tensor_type("vae.decoder.nothing"), None);
}

#[test]
fn folders_with_a_choice_ask_for_it() {
    let text = message(Checkpoint::open(&path("inputs")));
    assert!(text.contains("neither `model_index.json` nor"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        fs::copy(path("tiny-ltx2/ltx-2-tiny.safetensors"), folder.path().join(name).with_extension("safetensors"))
            .unwrap();
    }
    let text = message(Checkpoint::open(folder.path()));
    assert!(text.contains("2 files of kind Single") && text.contains("name one"), "{text}");
}

#[test]
fn folders_of_split_files_are_recognised_by_content() {
    if !has("tiny-ltx25") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (i, file) in [split_files().transformer, split_files().video_vae, split_files().audio_vae].iter().enumerate() {
        fs::create_dir(folder.path().join(i.to_string())).unwrap();
        fs::copy(file.as_ref().unwrap(), folder.path().join(format!("{i}/weights.safetensors"))).unwrap();
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.section("vocoder").is_ok() && checkpoint.section("vae").is_ok());
    assert_eq!(checkpoint.name(), folder.path().display().to_string());
}

#[test]
fn a_named_vae_replaces_the_one_of_the_single_file() {
    let single = path("tiny-ltx2/ltx-2-tiny.safetensors");
    let alt = path("tiny-ltx2/vae-alt-tiny.safetensors");
    let files = ModelFiles { checkpoint: Some(single), video_vae: Some(alt.clone()), ..ModelFiles::default() };
    let checkpoint = Checkpoint::open_files(&files).unwrap();
    let other = Checkpoint::open(&alt).unwrap();
    assert_eq!(checkpoint.section("vae").unwrap(), other.section("vae").unwrap());
    let video = |c: &Checkpoint| -> Shapes { stored(c).into_iter().filter(|(k, _)| k.starts_with("vae.")).collect() };
    assert_eq!(video(&checkpoint), video(&other));
    assert!(checkpoint.tensor("vocoder.conv_pre.weight").is_some());
}

#[test]
fn wrong_pairings_are_refused() {
    if !has("tiny-ltx25") {
        return;
    }
    let gemma3 = GemmaFolder::open(&path("tiny-gemma3")).unwrap();
    let gemma4 = GemmaFolder::open(&path("tiny-ltx25/gemma4-hf")).unwrap();
    let ltx25 = Checkpoint::open(&split_files().transformer.unwrap()).unwrap();
    let ltx2 = Checkpoint::open(&path("tiny-ltx2/ltx-2-tiny.safetensors")).unwrap();
    assert_eq!(gemma4.check_pairing(&ltx25).unwrap(), None);
    assert!(message(gemma3.check_pairing(&ltx25)).contains("does not say which"));
    assert!(message(gemma4.check_pairing(&ltx2)).contains("needs Gemma 3"));
    assert!(message(GemmaFolder::open(&path("tiny-ltx2/ltx-2-tiny.safetensors"))).contains("gemma_config"));
    assert!(message(GemmaFolder::open(&path("tiny-ltx2"))).contains("config.json"));
}

// ------------------------------------------------------------------------------------------------ other layouts

/// Writes a safetensors file with the data of `tensors` of `from` under new keys.
fn rewrite(to: &Path, from: &WeightFile, keys: &[(&str, String)], metadata: Value) {
    let (mut header, mut data) = (json!({}), Vec::new());
    if metadata.is_object() {
        header["__metadata__"] = metadata;
    }
    for (key, new) in keys {
        let tensor = from.header().tensor(key).unwrap();
        let begin = data.len();
        data.extend_from_slice(from.data(tensor));
        let name = match tensor.dtype {
            header::StoredType::Known(dtype) => header::format_name(dtype),
            header::StoredType::Other(name) => name,
        };
        header[new] = json!({ "dtype": name, "shape": tensor.shape, "data_offsets": [begin, data.len()] });
    }
    let text = header.to_string();
    let bytes = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat();
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::write(to, bytes).unwrap();
}

#[test]
fn shards_with_an_index_are_the_single_file() {
    let single = path("tiny-ltx23/ltx-2.3-tiny.safetensors");
    let (file, whole) = (WeightFile::open(&single).unwrap(), Checkpoint::open(&single).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut index = json!({});
    let keys: Vec<&str> = file.header().tensors.iter().map(|t| t.key.as_str()).collect();
    for i in 0..3 {
        let name = format!("model-0000{}-of-00003.safetensors", i + 1);
        let part: Vec<(&str, String)> = keys.iter().skip(i).step_by(3).map(|&key| (key, key.into())).collect();
        part.iter().for_each(|(key, _)| index[key] = name.as_str().into());
        // Only the first says what the model is.
        let metadata = if i == 0 { json!(file.header().metadata) } else { Value::Null };
        rewrite(&folder.path().join(name), &file, &part, metadata);
    }
    let path_of_index = folder.path().join("model.safetensors.index.json");
    fs::write(&path_of_index, json!({ "weight_map": index }).to_string()).unwrap();
    for path in [folder.path(), &path_of_index] {
        let found = Checkpoint::open(path).unwrap();
        assert_eq!((stored(&found), found.config()), (stored(&whole), whole.config()));
        assert_eq!((found.model_version(), found.files().len()), (whole.model_version(), 3));
    }
    let vae = ModelFiles { checkpoint: Some(single), video_vae: Some(folder.path().into()), ..ModelFiles::default() };
    assert_eq!(stored(&Checkpoint::open_files(&vae).unwrap()), stored(&whole));
    fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    let text = message(Checkpoint::open(folder.path()));
    assert!(text.contains("model-00002-of-00003.safetensors") && text.contains("download the missing shard"), "{text}");
    let text = message(Checkpoint::open(&path("tiny-gemma3-sharded")));
    assert!(text.contains("no part of an LTX-2 model"), "{text}");
}

#[test]
fn files_without_configuration_are_refused_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let original = WeightFile::open(&path("tiny-ltx2/ltx-2-tiny.safetensors")).unwrap();
    let keys: Vec<_> = original.header().tensors.iter().map(|t| (t.key.as_str(), t.key.clone())).collect();
    let bare = folder.path().join("bare.safetensors");
    rewrite(&bare, &original, &keys, Value::Null);
    let text = message(Checkpoint::open(&bare));
    assert!(text.contains("`config`") && text.contains("bare.safetensors") && text.contains("as published"), "{text}");
    let config = original.metadata().config.clone();
    let files = ModelFiles { checkpoint: Some(bare), config, ..ModelFiles::default() };
    assert!(Checkpoint::open_files(&files).is_ok());

    let half = folder.path().join("half.safetensors");
    rewrite(&half, &original, &keys, json!({ "config": r#"{"transformer":{}}"# }));
    assert!(message(Checkpoint::open(&half)).contains("no `vae`"));
    let lora = folder.path().join("lora.safetensors");
    let (module, key) = ("diffusion_model.proj_out", "model.diffusion_model.proj_out.weight");
    rewrite(&lora, &original, &[(key, format!("{module}.lora_A.weight"))], Value::Null);
    assert_eq!(FileKind::of(&WeightFile::open(&lora).unwrap()), FileKind::Adapter);
    assert!(message(Checkpoint::open(&lora)).contains("adapters and no model"));
    assert!(message(Checkpoint::open(&path("tiny-gemma3/model.safetensors"))).contains("no part of an LTX-2 model"));
    assert!(message(Checkpoint::open_files(&ModelFiles::default())).contains("no file"));
    let files =
        ModelFiles { video_vae: Some(path("tiny-ltx2/audio-vae-alt-tiny.safetensors")), ..ModelFiles::default() };
    assert!(message(Checkpoint::open_files(&files)).contains("AudioVae"));
}

/// Official names to those of diffusers, applied as substring replacements in order, as its conversion script does.
fn to_diffusers(key: &str) -> Option<(&'static str, String)> {
    const DIFFUSION: [(&str, &str); 12] = [
        ("patchify_proj", "proj_in"),
        ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
        ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
        ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
        ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
        ("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
        ("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
        ("q_norm", "norm_q"),
        ("k_norm", "norm_k"),
        ("prompt_adaln_single", "prompt_adaln"),
        ("audio_adaln_single", "audio_time_embed"),
        ("adaln_single", "time_embed"),
    ];
    const VAE: [(&str, &str); 19] = [
        ("down_blocks.1.", "down_blocks.0.downsamplers.0."),
        ("down_blocks.2.", "down_blocks.1."),
        ("down_blocks.3.", "down_blocks.1.downsamplers.0."),
        ("down_blocks.4.", "down_blocks.2."),
        ("down_blocks.5.", "down_blocks.2.downsamplers.0."),
        ("down_blocks.6.", "down_blocks.3."),
        ("down_blocks.7.", "down_blocks.3.downsamplers.0."),
        ("down_blocks.8.", "mid_block."),
        ("up_blocks.0.", "mid_block."),
        ("up_blocks.1.", "up_blocks.0.upsamplers.0."),
        ("up_blocks.2.", "up_blocks.0."),
        ("up_blocks.3.", "up_blocks.1.upsamplers.0."),
        ("up_blocks.4.", "up_blocks.1."),
        ("up_blocks.5.", "up_blocks.2.upsamplers.0."),
        ("up_blocks.6.", "up_blocks.2."),
        ("up_blocks.7.", "up_blocks.3.upsamplers.0."),
        ("up_blocks.8.", "up_blocks.3."),
        ("res_blocks", "resnets"),
        ("per_channel_statistics.", ""),
    ];
    const CONNECTORS: [(&str, &str); 7] = [
        ("_embeddings_connector", "_connector"),
        ("transformer_1d_blocks", "transformer_blocks"),
        ("q_norm", "norm_q"),
        ("k_norm", "norm_k"),
        ("text_embedding_projection.aggregate_embed", "text_proj_in"),
        ("text_embedding_projection.audio_aggregate_embed", "audio_text_proj_in"),
        ("text_embedding_projection.video_aggregate_embed", "video_text_proj_in"),
    ];
    const VOCODER: [(&str, &str); 6] = [
        ("resblocks", "resnets"),
        ("conv_pre", "conv_in"),
        ("conv_post", "conv_out"),
        ("act_post", "act_out"),
        ("downsample.lowpass", "downsample"),
        ("ups.", "upsamplers."),
    ];
    const STATISTICS: [(&str, &str); 3] =
        [("per_channel_statistics.", ""), ("mean-of-means", "latents_mean"), ("std-of-means", "latents_std")];
    let replace = |key: &str, table: &[(&str, &str)]| table.iter().fold(key.to_string(), |k, (a, b)| k.replace(a, b));
    if key.ends_with("statistics.channel") || key.contains("mean-of-stds") {
        return None;
    }
    let diffusion = key.strip_prefix("model.diffusion_model.");
    Some(match key.split('.').next()? {
        _ if diffusion.is_some_and(|k| k.contains("_embeddings_connector")) => {
            ("connectors", replace(diffusion?, &CONNECTORS))
        }
        "text_embedding_projection" => ("connectors", replace(key, &CONNECTORS)),
        "model" => ("transformer", replace(diffusion?, &DIFFUSION)),
        "vae" => {
            let key = key.strip_prefix("vae.")?;
            // The chain must not rename twice what it has just renamed.
            let block = VAE[..17].iter().find(|(a, _)| key.contains(a) && !key.contains(&format!("_{a}")));
            let key = block.map_or(key.to_string(), |(a, b)| key.replacen(a, b, 1));
            ("vae", replace(&replace(&key, &VAE[17..]), &STATISTICS))
        }
        "audio_vae" => ("audio_vae", replace(key.strip_prefix("audio_vae.")?, &STATISTICS)),
        _ => ("vocoder", replace(key.strip_prefix("vocoder.")?, &VOCODER)),
    })
}

/// The diffusers configurations of the folder that an official configuration would be converted to.
fn diffusers_configs(config: &Value) -> Vec<(&'static str, Value)> {
    let t = &config["transformer"];
    let is = |key: &str| t.get(key) == Some(&json!(true));
    let or = |key: &str, other: &str| t.get(key).unwrap_or(&t[other]).clone();
    let transformer = json!({
        "_class_name": "LTX2VideoTransformer3DModel", "patch_size": 1, "patch_size_t": 1,
        "in_channels": t["in_channels"], "out_channels": t["out_channels"], "num_layers": t["num_layers"],
        "num_attention_heads": t["num_attention_heads"], "attention_head_dim": t["attention_head_dim"],
        "cross_attention_dim": t["cross_attention_dim"], "audio_in_channels": t["audio_in_channels"],
        "audio_out_channels": t["audio_out_channels"], "audio_num_attention_heads": t["audio_num_attention_heads"],
        "audio_attention_head_dim": t["audio_attention_head_dim"],
        "audio_cross_attention_dim": t["audio_cross_attention_dim"], "pos_embed_max_pos": 20, "base_height": 2048,
        "base_width": 2048, "audio_pos_embed_max_pos": 20, "gated_attn": is("apply_gated_attention"),
        "audio_gated_attn": is("apply_gated_attention"), "cross_attn_mod": is("cross_attention_adaln"),
        "audio_cross_attn_mod": is("cross_attention_adaln"), "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": false, "norm_eps": 1e-6,
        "caption_channels": t["caption_channels"], "attention_bias": true, "rope_theta": 10000.0,
        "rope_double_precision": true, "timestep_scale_multiplier": 1000, "rope_type": "split",
        "cross_attn_timestep_scale_multiplier": 1000, "use_prompt_embeddings": !is("caption_proj_before_connector"),
    });
    let connectors = json!({
        "caption_channels": t["caption_channels"], "rope_type": "split", "rope_double_precision": true,
        "video_connector_num_attention_heads": t["connector_num_attention_heads"],
        "video_connector_attention_head_dim": t["connector_attention_head_dim"],
        "video_connector_num_layers": t["connector_num_layers"], "video_connector_num_learnable_registers": 128,
        "audio_connector_num_attention_heads": or("audio_connector_num_attention_heads", "connector_num_attention_heads"),
        "audio_connector_attention_head_dim": or("audio_connector_attention_head_dim", "connector_attention_head_dim"),
        "audio_connector_num_layers": or("audio_connector_num_layers", "connector_num_layers"),
        "audio_connector_num_learnable_registers": 128, "connector_rope_base_seq_len": 4096,
        "video_gated_attn": is("connector_apply_gated_attention"), "audio_gated_attn": is("connector_apply_gated_attention"),
        "per_modality_projections": is("caption_proj_before_connector"),
    });
    let dd = &config["audio_vae"]["model"]["params"]["ddconfig"];
    let audio = json!({
        "base_channels": dd["ch"], "output_channels": 2, "ch_mult": dd["ch_mult"], "num_res_blocks": dd["num_res_blocks"],
        "attn_resolutions": null, "in_channels": 2, "resolution": 256, "latent_channels": dd["z_channels"],
        "norm_type": "pixel", "causality_axis": "height", "mid_block_add_attention": false, "sample_rate": 16000,
        "mel_hop_length": 160, "is_causal": true, "mel_bins": 64, "double_z": true,
    });
    let generator = |v: &Value, prefix: &str| -> Value {
        let amp = v["resblock"] == "AMP1";
        let entries = [
            ("hidden_channels", v["upsample_initial_channel"].clone()),
            ("upsample_kernel_sizes", v["upsample_kernel_sizes"].clone()),
            ("upsample_factors", v["upsample_rates"].clone()),
            ("resnet_kernel_sizes", v["resblock_kernel_sizes"].clone()),
            ("resnet_dilations", v["resblock_dilation_sizes"].clone()),
            ("out_channels", json!(2)),
            ("antialias", json!(amp)),
            ("act_fn", json!(if amp { "snakebeta" } else { "leaky_relu" })),
            ("final_act_fn", if amp { Value::Null } else { json!("tanh") }),
            ("final_bias", json!(!amp)),
        ];
        entries.into_iter().map(|(k, v)| (format!("{prefix}{k}"), v)).collect()
    };
    let v = &config["vocoder"];
    let mut vocoder = generator(v.get("vocoder").unwrap_or(v), "");
    vocoder["output_sampling_rate"] = v["output_sampling_rate"].clone();
    if let Some(bwe) = v.get("bwe") {
        vocoder.as_object_mut().unwrap().extend(generator(bwe, "bwe_").as_object().unwrap().clone());
        for (theirs, ours) in
            [("filter_length", "n_fft"), ("hop_length", "hop_length"), ("num_mel_channels", "num_mels")]
        {
            vocoder[theirs] = bwe[ours].clone();
        }
        vocoder["input_sampling_rate"] = bwe["input_sampling_rate"].clone();
        vocoder["output_sampling_rate"] = bwe["output_sampling_rate"].clone();
    }
    vec![
        ("transformer", transformer),
        ("connectors", connectors),
        ("vae", diffusers_vae(&config["vae"])),
        ("audio_vae", audio),
        ("vocoder", vocoder),
    ]
}

fn diffusers_vae(vae: &Value) -> Value {
    let setting = |block: &Value, key: &str, default: u64| block[1].get(key).and_then(Value::as_u64).unwrap_or(default);
    let kind = |block: &Value| match block[0].as_str().unwrap().trim_end_matches("_res") {
        "compress_space" => "spatial",
        "compress_time" => "temporal",
        _ => "spatiotemporal",
    };
    let split = |key: &str| {
        let (samplers, blocks): (Vec<_>, Vec<_>) =
            vae[key].as_array().unwrap().iter().cloned().partition(|b| b[0] != "res_x");
        (blocks.iter().map(|b| setting(b, "num_layers", 0)).collect::<Vec<_>>(), samplers)
    };
    let (layers, samplers) = split("encoder_blocks");
    let mut width = vae["latent_channels"].as_u64().unwrap();
    let widths = samplers.iter().map(|s| {
        width *= setting(s, "multiplier", 2);
        width
    });
    let widths: Vec<u64> = widths.collect();
    let (decoder_layers, ups) = split("decoder_blocks");
    let factors: Vec<u64> = ups.iter().map(|s| setting(s, "multiplier", 1)).collect();
    let mut width = vae["decoder_base_channels"].as_u64().unwrap();
    let decoder_widths = factors.iter().map(|f| {
        width *= f;
        width
    });
    let decoder_widths: Vec<u64> = decoder_widths.collect();
    let padding = vae.get("spatial_padding_mode").cloned();
    json!({
        "_class_name": "AutoencoderKLLTX2Video", "in_channels": 3, "out_channels": 3,
        "latent_channels": vae["latent_channels"], "patch_size": 4, "patch_size_t": 1,
        "block_out_channels": widths, "layers_per_block": layers,
        "downsample_type": samplers.iter().map(kind).collect::<Vec<_>>(),
        "decoder_block_out_channels": decoder_widths, "decoder_layers_per_block": decoder_layers,
        "upsample_factor": factors, "upsample_type": ups.iter().rev().map(kind).collect::<Vec<_>>(),
        "upsample_residual": ups.iter().map(|s| s[1].get("residual") == Some(&json!(true))).collect::<Vec<_>>(),
        "decoder_inject_noise": vec![false; decoder_layers.len()],
        "encoder_causal": true, "decoder_causal": false, "timestep_conditioning": false,
        "encoder_spatial_padding_mode": padding.clone().unwrap_or(json!("zeros")),
        "decoder_spatial_padding_mode": padding.unwrap_or(json!("reflect")),
    })
}

#[test]
fn diffusers_folders_are_the_single_file() {
    for name in ["tiny-ltx2/ltx-2-tiny", "tiny-ltx23/ltx-2.3-tiny"] {
        let single = path(&format!("{name}.safetensors"));
        let original = WeightFile::open(&single).unwrap();
        let expected = Checkpoint::open(&single).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut renamed: BTreeMap<&str, Vec<(&str, String)>> = BTreeMap::new();
        for tensor in &original.header().tensors {
            if let Some((component, key)) = to_diffusers(&tensor.key) {
                renamed.entry(component).or_default().push((&tensor.key, key));
            }
        }
        for (component, keys) in &renamed {
            // Two shards and an index, as large components have.
            let (first, second) = keys.split_at(keys.len() / 2);
            let mut map = json!({});
            for (i, shard) in [first, second].iter().enumerate() {
                let name = format!("diffusion_pytorch_model-0000{}-of-00002.safetensors", i + 1);
                rewrite(&folder.path().join(component).join(&name), &original, shard, json!({ "format": "pt" }));
                shard.iter().for_each(|(_, key)| map[key] = json!(name));
            }
            let index = folder.path().join(component).join("diffusion_pytorch_model.safetensors.index.json");
            fs::write(index, json!({ "weight_map": map }).to_string()).unwrap();
        }
        for (component, config) in diffusers_configs(expected.config()) {
            fs::write(folder.path().join(component).join("config.json"), config.to_string()).unwrap();
        }
        fs::write(folder.path().join("model_index.json"), r#"{"_class_name":"LTX2Pipeline"}"#).unwrap();

        let found = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(found.ignored(), []);
        assert_eq!(found.generation(), expected.generation());
        let mut used = stored(&expected);
        used.retain(|key, _| !key.ends_with("statistics.channel") && !key.contains("mean-of-stds"));
        assert_same(&stored(&found), &used);
        for key in used.keys() {
            assert_eq!(found.data(key), expected.data(key), "{key}");
        }
        // What the original says and decides shapes or results, the folder says too.
        for section in ["transformer", "vae", "audio_vae", "vocoder"] {
            same_settings(section, &found.config()[section], &expected.config()[section]);
        }
        let listed = |c: &Checkpoint| shapes(tensors::transformer(&c.config()["transformer"]).unwrap());
        assert_same(&listed(&found), &listed(&expected));
    }
}

#[test]
fn written_folders_are_what_the_conversion_script_gives() {
    for name in ["tiny-ltx2/ltx-2-tiny", "tiny-ltx23/ltx-2.3-tiny"] {
        let checkpoint = Checkpoint::open(&path(&format!("{name}.safetensors"))).unwrap();
        let tensors: Vec<(String, u64)> =
            checkpoint.tensors().map(|(key, found)| (key.to_string(), found.stored.bytes)).collect();
        let out = lay_out(&checkpoint, Layout::Diffusers, "unused", &tensors, None).unwrap();
        let mut count = out.left_out.len();
        for file in &out.files {
            let folder = file.path.parent().unwrap().to_str().unwrap();
            for (key, index) in &file.members {
                let expected = to_diffusers(&tensors[*index].0).unwrap();
                assert_eq!((folder, key.as_str()), (expected.0, expected.1.as_str()));
            }
            count += file.members.len();
        }
        assert_eq!(count, tensors.len());
        assert!(out.left_out.iter().all(|key| to_diffusers(key).is_none()), "{:?}", out.left_out);
        for (component, expected) in diffusers_configs(checkpoint.config()) {
            let path = Path::new(component).join("config.json");
            let found = out.side_files.iter().find(|(p, _)| *p == path).map(|(_, config)| config).unwrap();
            same_settings(component, found, &expected);
        }
    }
}

#[test]
fn folders_with_official_names_are_the_single_file() {
    for name in ["tiny-ltx2/ltx-2-tiny", "tiny-ltx23/ltx-2.3-tiny"] {
        let single = path(&format!("{name}.safetensors"));
        let original = WeightFile::open(&single).unwrap();
        let expected = Checkpoint::open(&single).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let components = [
            ("transformer", "model.diffusion_model.", "transformer"),
            ("text_embedding_projection", "text_embedding_projection.", ""),
            ("vae", "vae.", "vae"),
            ("audio_vae", "audio_vae.", "audio_vae"),
            ("vocoder", "vocoder.", "vocoder"),
        ];
        for (component, prefix, section) in components {
            let keys = original
                .header()
                .tensors
                .iter()
                .filter_map(|t| Some((t.key.as_str(), t.key.strip_prefix(prefix)?.into())));
            rewrite(
                &folder.path().join(component).join("model.safetensors"),
                &original,
                &keys.collect::<Vec<_>>(),
                Value::Null,
            );
            if !section.is_empty() {
                fs::write(folder.path().join(component).join("config.json"), expected.config()[section].to_string())
                    .unwrap();
            }
        }
        fs::write(folder.path().join("model_index.json"), "{}").unwrap();
        let found = Checkpoint::open(folder.path()).unwrap();
        assert_same(&stored(&found), &stored(&expected));
        assert_eq!(found.generation(), expected.generation());
        for section in ["transformer", "vae", "audio_vae", "vocoder"] {
            assert_eq!(found.config()[section], expected.config()[section]);
        }
    }
}

/// Every setting of `found` that `expected` has too is equal.
#[track_caller]
fn same_settings(path: &str, found: &Value, expected: &Value) {
    let (Value::Object(f), Value::Object(e)) = (found, expected) else {
        let same = found == expected || (found.as_f64().is_some() && found.as_f64() == expected.as_f64());
        assert!(same, "{path}: {found}, expected {expected}");
        return;
    };
    for (key, value) in f {
        if let Some(other) = e.get(key) {
            same_settings(&format!("{path}.{key}"), value, other);
        }
    }
    const NOT_IN_DIFFUSERS: [&str; 11] = [
        "attention_type",
        "norm_num_groups",
        "scaling_factor",
        "use_quant_conv",
        "normalize_latent_channels",
        "target",
        "downsample_time",
        "attn_type",
        "max_wav_value",
        "duration",
        "causal_padding",
    ];
    let missing: Vec<_> = e.keys().filter(|k| !f.contains_key(*k) && !NOT_IN_DIFFUSERS.contains(&k.as_str())).collect();
    assert!(missing.is_empty(), "{path}: the folder does not say {missing:?}");
}

#[test]
fn incomplete_folders_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model_index.json"), "{}").unwrap();
    assert!(message(Checkpoint::open(folder.path())).contains("`transformer`"));
    let transformer = folder.path().join("transformer");
    fs::create_dir(&transformer).unwrap();
    assert!(message(Checkpoint::open(folder.path())).contains("no `.safetensors` file"));
    let index = transformer.join("x.safetensors.index.json");
    fs::write(&index, r#"{"weight_map":{"a":"missing.safetensors"}}"#).unwrap();
    assert!(message(Checkpoint::open(folder.path())).contains("`missing.safetensors`"));
    fs::write(&index, r#"{"weight_map":{"a":"../../../etc/passwd"}}"#).unwrap();
    assert!(message(Checkpoint::open(folder.path())).contains("expected a file name"));
    let empty = tempfile::tempdir().unwrap();
    assert!(message(Checkpoint::open(empty.path())).contains("model_index.json"));
    assert!(message(Checkpoint::open(&empty.path().join("no"))).contains("cannot open"));
    assert!(message(hub::resolve("no/such/path")).contains("not there"));
}

// ------------------------------------------------------------------------------------------------------- damage

#[test]
fn truncated_files_are_refused_at_every_length() {
    let bytes = fs::read(path("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors")).unwrap();
    let header = Header::parse(&bytes).unwrap();
    for len in (0..header.data_start as usize).chain((header.data_start as usize..bytes.len()).step_by(997)) {
        let problem = Header::parse(&bytes[..len]).unwrap_err();
        assert!(problem.contains("download it again"), "{problem}");
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(Header::parse(&longer).unwrap_err().contains("1 belong to no tensor"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever bytes change, the reader returns, and what it returns covers the file exactly.
    #[test]
    fn mutated_headers_never_panic(changes in prop::collection::vec((0usize..700, any::<u8>()), 1..6), cut in 0usize..40) {
        let entry = |name: &str, dtype: &str, shape: &str, range: (usize, usize)| {
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{},{}]}}"#, range.0, range.1)
        };
        let json = format!(
            r#"{{"__metadata__":{{"config":"{{}}","model_version":"2.0.0"}},{},{},{},{}}}"#,
            entry("a.weight", "BF16", "[2,3]", (0, 12)),
            entry("b.weight", "F32", "[4]", (12, 28)),
            entry("c", "I64", "[]", (28, 36)),
            entry("d", "F8_E4M3", "[2,2]", (36, 40)),
        );
        let mut file = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0; 40]].concat();
        prop_assert!(Header::parse(&file).is_ok());
        let len = file.len();
        for (at, value) in changes {
            file[at % len] = value;
        }
        file.truncate(len - cut);
        if let Ok(header) = Header::parse(&file) {
            let total: u64 = header.tensors.iter().map(|t| t.bytes).sum();
            prop_assert_eq!(header.data_start + total, file.len() as u64);
        }
    }
}

// ----------------------------------------------------------------------------------------------------- identity

#[test]
fn identities_tell_files_apart() {
    let file = |name: &str| WeightFile::open(&path(name)).unwrap();
    let bf16 = file("tiny-ltx2/ltx-2-tiny.safetensors");
    let identity = bf16.identity(true).unwrap();
    assert_eq!(identity, file("tiny-ltx2/ltx-2-tiny.safetensors").identity(true).unwrap());
    assert_eq!(bf16.identity(false).unwrap().difference(&identity), None);
    assert!(file("tiny-ltx23/ltx-2.3-tiny.safetensors").identity(true).unwrap().difference(&identity).is_some());

    // The cache of the hub names blobs by their hash and links to them.
    let cache = tempfile::tempdir().unwrap();
    let name = "0123456789abcdef".repeat(4);
    fs::create_dir(cache.path().join("blobs")).unwrap();
    fs::copy(bf16.path(), cache.path().join("blobs").join(&name)).unwrap();
    #[cfg(unix)]
    {
        let link = cache.path().join("model.safetensors");
        std::os::unix::fs::symlink(cache.path().join("blobs").join(&name), &link).unwrap();
        let cached = WeightFile::open(&link).unwrap().identity(false).unwrap();
        assert_eq!(cached.sha256.unwrap()[..3], [0x01, 0x23, 0x45]);
        assert_eq!(cached.difference(&identity), None);
    }
}

// ---------------------------------------------------------------------------------------------- synthetic models

#[test]
fn the_tiny_model_is_complete_and_always_the_same() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let made = synth::synth(Preset::Tiny, first.path(), 7).unwrap();
    let again = synth::synth(Preset::Tiny, second.path(), 7).unwrap();
    let read = |p: &Path| fs::read(p).unwrap();
    assert_eq!(read(&made.checkpoint), read(&again.checkpoint));
    assert_eq!(read(&made.gemma.join("model.safetensors")), read(&again.gemma.join("model.safetensors")));
    assert!(read(&made.checkpoint).len() < 16 << 20);

    let checkpoint = Checkpoint::open(&made.checkpoint).unwrap();
    let gemma = GemmaFolder::open(&made.gemma).unwrap();
    assert!(checkpoint.is_synthetic());
    assert_eq!(gemma.check_pairing(&checkpoint).unwrap(), None);
    assert_same(&stored(&checkpoint), &shapes(tensors::model(checkpoint.config(), states(&gemma)).unwrap()));
    assert!(Checkpoint::open_upsampler(&made.upsamplers[0]).is_ok());
    // The folder as a whole is a model too; the upsampler and the text encoder in it are told apart.
    assert_eq!(Checkpoint::open(first.path()).unwrap().files().len(), 1);

    let other = synth::synth(Preset::Tiny, second.path(), 8).unwrap();
    assert_ne!(read(&made.checkpoint), read(&other.checkpoint));

    let tokenizer = tokenizers::Tokenizer::from_bytes(gemma.tokenizer_json().unwrap()).unwrap();
    let vocabulary = gemma.text_config()["vocab_size"].as_u64().unwrap() as usize;
    assert_eq!(tokenizer.get_vocab_size(true), vocabulary);
    for text in ["a cat walks slowly", "Ünïcode  and\n\nlines ✓", "", "<start_of_turn>user"] {
        let encoding = tokenizer.encode(text, true).unwrap();
        let ids = encoding.get_ids();
        assert_eq!(ids[0], 2, "{text}");
        assert!(ids.iter().all(|&id| (id as usize) < vocabulary && id != 3), "{text}: {ids:?}");
        assert_eq!(tokenizer.decode(ids, true).unwrap(), text.replace("<start_of_turn>", ""));
    }
    assert_eq!(tokenizer.encode(" the", false).unwrap().get_ids().len(), 1);
}

#[test]
#[cfg(unix)]
fn presets_of_real_size_take_no_space() {
    use std::os::unix::fs::MetadataExt;
    for (preset, tensors_in_block) in [(Preset::Ltx2, 72), (Preset::Ltx23, 86)] {
        let folder = tempfile::tempdir().unwrap();
        let made = synth::synth(preset, folder.path(), 0).unwrap();
        let checkpoint = Checkpoint::open(&made.checkpoint).unwrap();
        let gemma = GemmaFolder::open(&made.gemma).unwrap();
        assert_eq!((gemma.files().len(), states(&gemma)), (5, 49));
        assert_eq!(gemma.check_pairing(&checkpoint).unwrap(), None);
        let block = "model.diffusion_model.transformer_blocks.47.";
        assert_eq!(checkpoint.tensors().filter(|(k, _)| k.starts_with(block)).count(), tensors_in_block);
        let about = fs::metadata(&made.checkpoint).unwrap();
        assert!(about.len() > 40_000_000_000 && about.blocks() * 512 < 4 << 20, "{} {}", about.len(), about.blocks());
        assert!(checkpoint.is_synthetic());
        for upsampler in &made.upsamplers {
            Checkpoint::open_upsampler(upsampler).unwrap();
        }
        assert_eq!(checkpoint.identities(false).unwrap(), checkpoint.identities(false).unwrap());
    }
}
