//! Synthetic checkpoints in the published format, for work without the weights.
//!
//! `tiny` is a complete small model with random weights: every stage of a generation runs on it in seconds. The presets
//! with real sizes have the real keys, shapes, metadata and file names, but sparse data: they read as zeros and take no
//! space on the disk. They are for compiling, planning and inspecting, not for looking at. All are marked `synthetic` in
//! their metadata.

mod config;
pub mod philox;
mod smooth;
pub mod tensors;
pub mod tokenizer;
mod values;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use config::{Sizes, Upscale};
use writer::Data;

use crate::ModelError;

/// A model that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preset {
    /// A few megabytes in the layout of LTX-2, usable end to end.
    Tiny,
    /// LTX-2 19B, sparse.
    Ltx2,
    /// LTX-2.3 22B, sparse.
    Ltx23,
}

impl Preset {
    /// Every preset.
    pub const ALL: [Preset; 3] = [Preset::Tiny, Preset::Ltx2, Preset::Ltx23];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Tiny => "tiny",
            Preset::Ltx2 => "ltx-2-19b",
            Preset::Ltx23 => "ltx-2.3-22b",
        }
    }

    /// The inverse of [`Preset::name`].
    pub fn from_name(name: &str) -> Option<Preset> {
        Preset::ALL.into_iter().find(|p| p.name() == name)
    }
}

/// The files that were made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthModel {
    /// The single file.
    pub checkpoint: PathBuf,
    /// The folder of the text encoder.
    pub gemma: PathBuf,
    /// Latent upsamplers, the spatial one that doubles first.
    pub upsamplers: Vec<PathBuf>,
}

/// Everything about a preset: what to write, and under which names.
struct Recipe {
    file: &'static str,
    version: &'static str,
    config: Value,
    gemma: (&'static str, Value),
    shards: usize,
    upsamplers: Vec<(&'static str, Value)>,
}

/// Writes the model `preset` into `folder`, which is made if it is not there. Files of the same names are replaced.
/// `seed` decides the weights of `tiny`.
///
/// # Errors
/// If the folder cannot be written.
pub fn synth(preset: Preset, folder: &Path, seed: u64) -> Result<SynthModel, ModelError> {
    let tokenizer = tokenizer::tokenizer();
    let (recipe, data) = match preset {
        Preset::Tiny => (tiny(tokenizer.vocabulary), Data::Random(seed)),
        Preset::Ltx2 => (ltx2(), Data::Sparse),
        Preset::Ltx23 => (ltx23(), Data::Sparse),
    };
    let make = |path: &Path| fs::create_dir_all(path).map_err(ModelError::io(path, "create"));
    let marked = |config: &Value| vec![("config", config.to_string()), ("synthetic", "true".to_string())];

    make(folder)?;
    let (gemma_name, gemma_config) = &recipe.gemma;
    let states = gemma_config["text_config"]["num_hidden_layers"].as_u64().map_or(0, |layers| layers as usize + 1);
    let checkpoint = folder.join(recipe.file);
    let mut metadata = marked(&recipe.config);
    metadata.push(("model_version", recipe.version.into()));
    metadata.push(("license", "synthetic: no weights of any model are in this file".into()));
    writer::write(&checkpoint, &metadata, &tensors::model(&recipe.config, states)?, data)?;

    let gemma = folder.join(gemma_name);
    make(&gemma)?;
    let format = [("format", "pt".to_string()), ("synthetic", "true".to_string())];
    let gemma_tensors = [tensors::gemma3(gemma_config)?, tensors::gemma3_vision(gemma_config)?].concat();
    match recipe.shards {
        1 => writer::write(&gemma.join("model.safetensors"), &format, &gemma_tensors, data)?,
        shards => drop(writer::write_shards(&gemma, &format, &gemma_tensors, shards, data)?),
    }
    writer::write_json(&gemma.join("config.json"), gemma_config)?;
    writer::write_json(&gemma.join("preprocessor_config.json"), &config::preprocessor(gemma_config))?;
    let generation = json!({ "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0 });
    writer::write_json(&gemma.join("generation_config.json"), &generation)?;
    for (name, content) in &tokenizer.files {
        writer::write_json(&gemma.join(name), content)?;
    }

    let mut upsamplers = Vec::new();
    for (name, config) in &recipe.upsamplers {
        let path = folder.join(name);
        writer::write(&path, &marked(config), &tensors::upsampler(config)?, data)?;
        upsamplers.push(path);
    }
    Ok(SynthModel { checkpoint, gemma, upsamplers })
}

/// The tensors of the single file of `preset`, and the version in its header.
///
/// # Errors
/// Never for these presets; their configurations are complete.
pub fn listed(preset: Preset) -> Result<(&'static str, Vec<tensors::TensorSpec>), ModelError> {
    let recipe = match preset {
        Preset::Tiny => tiny(tokenizer::tokenizer().vocabulary),
        Preset::Ltx2 => ltx2(),
        Preset::Ltx23 => ltx23(),
    };
    let layers = recipe.gemma.1["text_config"]["num_hidden_layers"].as_u64();
    Ok((recipe.version, tensors::model(&recipe.config, layers.map_or(0, |layers| layers as usize + 1))?))
}

/// Small, and different in every dimension that a program could confuse.
fn tiny(vocabulary: usize) -> Recipe {
    let sizes = Sizes { heads: 4, head_dims: [32, 16], layers: 3, latents: [8, 2], text: 96 };
    Recipe {
        file: "ltx-2-tiny.safetensors",
        version: "2.0.0",
        config: json!({
            "transformer": config::transformer_ltx2(&sizes, [4, 24, 2]),
            "vae": config::video_vae_ltx2(8, 8, [1, 2, 1, 1, 1], [1, 1, 2, 1]),
            "audio_vae": config::audio_vae(32, [1, 2, 2], 1, 2),
            "vocoder": config::vocoder_ltx2(64, &[6, 5, 4, 2], &[16, 15, 8, 4]),
            "scheduler": config::scheduler(),
        }),
        // Seven layers: the sixth attends globally, as every sixth of the real one.
        gemma: ("gemma-3-tiny", {
            let vision = config::vision(24, 40, 2, 3, [42, 7], 9, tokenizer::IMAGE.map(|(_, id)| id));
            config::gemma3(96, 192, 7, [6, 2, 32], 64, vocabulary, vision)
        }),
        shards: 1,
        upsamplers: vec![(
            "ltx-2-tiny-spatial-upscaler-x2.safetensors",
            config::upsampler(8, 64, 1, Upscale::Space { scale: 2.0, is_rational: true }),
        )],
    }
}

/// Gemma 3 12B.
fn gemma3_12b() -> (&'static str, Value) {
    let vision = config::vision(1152, 4304, 27, 16, [896, 14], 256, [255_999, 262_144, 256_000]);
    ("gemma-3-12b", config::gemma3(3840, 15360, 48, [16, 8, 256], 1024, 262208, vision))
}

/// Shards of the published Gemma 3 12B folder.
const GEMMA_SHARDS: usize = 5;

fn ltx2() -> Recipe {
    let sizes = Sizes { heads: 32, head_dims: [128, 64], layers: 48, latents: [128, 8], text: 3840 };
    Recipe {
        file: "ltx-2-19b-distilled.safetensors",
        version: "2.0.0",
        config: json!({
            "transformer": config::transformer_ltx2(&sizes, [30, 128, 2]),
            "vae": config::video_vae_ltx2(128, 128, [4, 6, 6, 2, 2], [5, 5, 5, 5]),
            "audio_vae": config::audio_vae(128, [1, 2, 4], 2, 8),
            "vocoder": config::vocoder_ltx2(1024, &[6, 5, 2, 2, 2], &[16, 15, 8, 4, 4]),
            "scheduler": config::scheduler(),
        }),
        gemma: gemma3_12b(),
        shards: GEMMA_SHARDS,
        upsamplers: vec![
            (
                "ltx-2-spatial-upscaler-x2-1.0.safetensors",
                config::upsampler(128, 1024, 4, Upscale::Space { scale: 2.0, is_rational: true }),
            ),
            ("ltx-2-temporal-upscaler-x2-1.0.safetensors", config::upsampler(128, 512, 4, Upscale::Time)),
        ],
    }
}

fn ltx23() -> Recipe {
    let sizes = Sizes { heads: 32, head_dims: [128, 64], layers: 48, latents: [128, 8], text: 3840 };
    Recipe {
        file: "ltx-2.3-22b-distilled.safetensors",
        version: "2.3.0",
        config: json!({
            "transformer": config::transformer_ltx23(&sizes, 8),
            "vae": config::video_vae_ltx23(128, 128, [4, 6, 4, 2, 2], [4, 6, 4, 2, 2]),
            "audio_vae": config::audio_vae(128, [1, 2, 4], 2, 8),
            "vocoder": config::vocoder_ltx23(),
            "scheduler": config::scheduler(),
        }),
        gemma: gemma3_12b(),
        shards: GEMMA_SHARDS,
        upsamplers: vec![
            (
                "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
                config::upsampler(128, 1024, 4, Upscale::Space { scale: 2.0, is_rational: false }),
            ),
            (
                "ltx-2.3-spatial-upscaler-x1.5-1.0.safetensors",
                config::upsampler(128, 1024, 4, Upscale::Space { scale: 1.5, is_rational: true }),
            ),
            ("ltx-2.3-temporal-upscaler-x2-1.0.safetensors", config::upsampler(128, 512, 4, Upscale::Time)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::tensors::TensorSpec;
    use super::*;

    fn count(tensors: &[TensorSpec], prefix: &str) -> u64 {
        tensors.iter().filter(|t| t.key.starts_with(prefix)).map(|t| t.elements().unwrap()).sum()
    }

    #[track_caller]
    fn check(tensors: Vec<TensorSpec>, elements: u64) {
        assert_eq!(count(&tensors, ""), elements);
    }

    const BLOCK: &str = "model.diffusion_model.transformer_blocks.7.";

    #[test]
    fn ltx2_has_the_published_counts() {
        let config = ltx2().config;
        let transformer = tensors::transformer(&config["transformer"]).unwrap();
        assert_eq!(transformer.iter().filter(|t| t.key.starts_with(BLOCK)).count(), 72);
        assert_eq!(count(&transformer, BLOCK), 386_074_624);
        check(transformer, 18_876_174_592);
        let connectors = tensors::connectors(&config["transformer"]).unwrap();
        assert_eq!(connectors.len(), 2 * 29);
        check(connectors, 2 * 354_470_400);
        check(tensors::text_projection(&config["transformer"], 49).unwrap(), 3840 * 188_160);
        let video = tensors::video_vae(&config["vae"]).unwrap();
        assert_eq!(count(&video, "vae.encoder."), 694_098_881);
        assert_eq!(count(&video, "vae.decoder."), 528_380_720);
        let audio = tensors::audio_vae(&config["audio_vae"]).unwrap();
        assert_eq!(count(&audio, "audio_vae.encoder."), 21_333_008);
        assert_eq!(count(&audio, "audio_vae.decoder."), 31_915_138);
        check(tensors::vocoder(&config["vocoder"]).unwrap(), 55_592_802);
    }

    #[test]
    fn ltx23_has_the_published_counts() {
        let config = ltx23().config;
        let transformer = tensors::transformer(&config["transformer"]).unwrap();
        assert_eq!(transformer.iter().filter(|t| t.key.starts_with(BLOCK)).count(), 86);
        assert_eq!(count(&transformer, BLOCK), 386_695_360);
        check(transformer, 18_988_838_144);
        let connectors = tensors::connectors(&config["transformer"]).unwrap();
        assert_eq!(connectors.len(), 2 * 129);
        check(connectors, 1_612_546_304 + 403_620_096);
        check(tensors::text_projection(&config["transformer"], 49).unwrap(), 1_156_061_184);
        let video = tensors::video_vae(&config["vae"]).unwrap();
        assert_eq!(count(&video, "vae.encoder."), 318_936_897);
        assert_eq!(count(&video, "vae.decoder."), 407_169_072);
        // The published count leaves fixed filters out: 200 activations have 24 taps each.
        let (filters, bases) = (200 * 24, 2 * 514 * 512 + 64 * 257);
        check(tensors::vocoder(&config["vocoder"]).unwrap(), 128_537_448 + filters + bases);
    }

    #[test]
    fn ltx25_transformer_has_the_published_counts() {
        let mut config = ltx23().config["transformer"].clone();
        config["ff_bias"] = json!(false);
        config["use_keyframes_abs_pos_embedding"] = json!(true);
        let transformer = tensors::transformer(&config).unwrap();
        assert_eq!(transformer.len() + 258, 4349);
        check(transformer, 18_987_859_200);
    }

    #[test]
    fn text_encoder_and_upsamplers_have_the_published_counts() {
        let gemma = gemma3_12b().1;
        check(tensors::gemma3(&gemma).unwrap(), 11_766_034_176);
        // Of 12,187,325,040 in the published folder.
        check(tensors::gemma3_vision(&gemma).unwrap(), 421_290_864);
        let upsampler = |recipe: Recipe, i: usize| tensors::upsampler(&recipe.upsamplers[i].1).unwrap();
        // The published counts leave the blur kernel out.
        check(upsampler(ltx2(), 0), 497_867_904 + 25);
        check(upsampler(ltx23(), 0), 497_867_904);
        check(upsampler(ltx23(), 1), 545_058_944 + 25);
        assert_eq!(upsampler(ltx2(), 1).len(), 72);
        check(upsampler(ltx2(), 1), 130_968_192);
    }

    #[test]
    fn bad_configurations_are_errors() {
        for (key, value) in [("num_layers", json!(1e18)), ("attention_head_dim", json!(-1)), ("num_layers", json!("3"))]
        {
            let mut config = ltx2().config;
            config["transformer"][key] = value;
            assert!(tensors::model(&config, 49).is_err(), "{key}");
        }
        assert!(tensors::model(&json!({}), 49).is_err());
        let mut config = ltx2().config;
        config["vae"]["decoder_blocks"][1] = json!(["compress_all", { "multiplier": 1048576 }]);
        assert!(tensors::model(&config, 49).is_err());
        config["vae"]["decoder_blocks"][1] = json!(["attn_res_x", {}]);
        assert!(tensors::model(&config, 49).unwrap_err().to_string().contains("attn_res_x"));
    }
}
