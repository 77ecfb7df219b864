//! Diffusers and FastVideo folders: one sub-folder per component, other key names.
//!
//! Names go back to the official ones segment by segment, so that a component called `ups` never changes a key that only
//! contains these letters. Components that diffusers stores with another split of the same numbers (the diffusion decoder
//! and the duration head, whose fused projections it cuts in three) have no key in the official names and are left out:
//! use the published files for them.
//!
//! Source of the names: scripts/convert_ltx2_to_diffusers.py (huggingface/diffusers @ 58eb52c). FastVideo keeps the
//! official names without prefix, which is recognised by the keys.

use std::path::Path;

use serde_json::{Map, Value};

use super::assemble::{Entry, Part};
use super::diffusers_config as config;
use super::file::{self, WeightFile};
use super::layout::{self, Component};
use crate::ModelError;

/// The sub-folders that are read, and the component whose keys they hold (connectors also hold the projection).
const FOLDERS: [(&str, Component); 6] = [
    ("transformer", Component::Transformer),
    ("connectors", Component::Connectors),
    ("text_embedding_projection", Component::TextProjection),
    ("vae", Component::VideoVae),
    ("audio_vae", Component::AudioVae),
    ("vocoder", Component::Vocoder),
];

/// Single segments of transformer and connector keys: diffusers, official.
const DIFFUSION_SEGMENTS: [(&str, &str); 18] = [
    ("proj_in", "patchify_proj"),
    ("audio_proj_in", "audio_patchify_proj"),
    ("time_embed", "adaln_single"),
    ("audio_time_embed", "audio_adaln_single"),
    ("prompt_adaln", "prompt_adaln_single"),
    ("audio_prompt_adaln", "audio_prompt_adaln_single"),
    ("av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
    ("av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
    ("av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
    ("av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
    ("video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"),
    ("audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
    ("video_connector", "video_embeddings_connector"),
    ("audio_connector", "audio_embeddings_connector"),
    ("latents_mean", "mean-of-means"),
    ("latents_std", "std-of-means"),
];

const VOCODER_SEGMENTS: [(&str, &str); 6] = [
    ("upsamplers", "ups"),
    ("resnets", "resblocks"),
    ("conv_in", "conv_pre"),
    ("conv_out", "conv_post"),
    ("act_out", "act_post"),
    ("downsample", "downsample.lowpass"),
];

/// The parts of the folder `root`, which has a `model_index.json`.
pub(super) fn parts(root: &Path) -> Result<Vec<Part>, ModelError> {
    let index = root.join("model_index.json");
    if !file::read_json(&index)?.is_object() {
        return Err(ModelError::file(&index, "is no JSON object; download it again"));
    }
    let mut parts = Vec::new();
    for (name, component) in FOLDERS {
        let folder = root.join(name);
        if folder.is_dir() {
            parts.push(component_part(&folder, component)?);
        }
    }
    let Some(transformer) = parts.iter().position(|p| p.entries.iter().any(|e| e.component == Component::Transformer))
    else {
        return Err(ModelError::file(root, "has no `transformer` folder with weights; download the whole folder"));
    };
    join_connector_config(&mut parts, transformer);
    Ok(parts)
}

/// The configuration of `folder`, and its files, for a `latent_upsampler` folder.
pub(super) fn upsampler(folder: &Path) -> Result<(Vec<WeightFile>, Value), ModelError> {
    let path = folder.join("config.json");
    let config = config::upsampler(&object(&path)?)?;
    Ok((open_all(folder)?, config))
}

fn component_part(folder: &Path, component: Component) -> Result<Part, ModelError> {
    let files = open_all(folder)?;
    let is_official = files.iter().any(|f| has_official_keys(f, component));
    let is_bare = files.iter().flat_map(|f| &f.header().tensors).any(|t| layout::canonical(&t.key, None).is_none());
    let config = match component {
        Component::TextProjection => Map::new(),
        _ => component_config(&folder.join("config.json"), component)?,
    };
    let blocks = encoder_blocks(&files);
    let mut part = Part { path: folder.into(), model_version: version(&config), ..Part::default() };
    for (f, file) in files.iter().enumerate() {
        for (t, tensor) in file.header().tensors.iter().enumerate() {
            let key = if is_official {
                with_prefix(&tensor.key, component, is_bare)
            } else {
                official(&tensor.key, component, blocks)
            };
            match layout::canonical(&key, None) {
                Some((component, key)) => part.entries.push(Entry { file: f, tensor: t, component, key }),
                None => part.ignored.push((f, tensor.key.clone())),
            }
        }
    }
    part.config = Some(config);
    part.files = files;
    Ok(part)
}

/// Official files have the settings of transformer and connectors in one object; diffusers has two.
fn join_connector_config(parts: &mut [Part], transformer: usize) {
    let connectors = parts.iter().position(|p| p.path.ends_with("connectors"));
    let section = |part: &Part| part.config.as_ref()?.get("transformer")?.as_object().cloned();
    let Some(connectors) = connectors.filter(|&c| c != transformer) else { return };
    let (Some(mut both), Some(more)) = (section(&parts[transformer]), section(&parts[connectors])) else { return };
    for (key, value) in more {
        both.entry(key).or_insert(value);
    }
    for part in [transformer, connectors] {
        let config = parts[part].config.get_or_insert_default();
        config.insert("transformer".into(), Value::Object(both.clone()));
    }
}

fn open_all(folder: &Path) -> Result<Vec<WeightFile>, ModelError> {
    let paths = file::shards(folder, "")?;
    if paths.is_empty() {
        return Err(ModelError::file(folder, "holds no `.safetensors` file; download the whole folder"));
    }
    paths.iter().map(|p| WeightFile::open(p)).collect()
}

fn object(path: &Path) -> Result<Map<String, Value>, ModelError> {
    match file::read_json(path)? {
        Value::Object(object) => Ok(object),
        _ => Err(ModelError::file(path, "is no JSON object; download it again")),
    }
}

/// The configuration under the names of the single file: converted, or taken as it is if it has these names already.
fn component_config(path: &Path, component: Component) -> Result<Map<String, Value>, ModelError> {
    let own = object(path)?;
    let (section, marker) = match component {
        Component::Transformer => ("transformer", "positional_embedding_max_pos"),
        Component::Connectors => ("transformer", "connector_positional_embedding_max_pos"),
        Component::VideoVae => ("vae", "decoder_blocks"),
        Component::AudioVae => ("audio_vae", "model"),
        _ => ("vocoder", "upsample_initial_channel"),
    };
    // The nested settings of a vocoder have a `vocoder` inside, beside `bwe`.
    let is_nested = own.contains_key("bwe");
    if own.get(section).is_some_and(Value::is_object) && !is_nested {
        return Ok(own);
    }
    let value = if own.contains_key(marker) || is_nested {
        Value::Object(own)
    } else {
        match component {
            Component::Transformer => config::transformer(&own)?,
            Component::Connectors => config::connectors(&own)?,
            Component::VideoVae => config::video_vae(&own)?,
            Component::AudioVae => config::audio_vae(&own)?,
            _ => config::vocoder(&own)?,
        }
    };
    Ok(Map::from_iter([(section.to_string(), value)]))
}

/// The first version whose transformer has these switches; diffusers folders do not record one.
fn version(config: &Map<String, Value>) -> Option<String> {
    let transformer = config.get("transformer")?;
    transformer.get("num_layers")?;
    let is = |key: &str, value: bool| transformer.get(key).and_then(Value::as_bool) == Some(value);
    Some(
        if is("use_keyframes_abs_pos_embedding", true) || is("ff_bias", false) {
            "2.5.0"
        } else if is("cross_attention_adaln", true) {
            "2.3.0"
        } else {
            "2.0.0"
        }
        .into(),
    )
}

fn has_official_keys(file: &WeightFile, component: Component) -> bool {
    let keys = || file.header().tensors.iter().map(|t| t.key.as_str());
    let has = |part: &str| keys().any(|k| k.split('.').any(|s| s == part));
    match component {
        Component::Transformer => has("adaln_single"),
        Component::Connectors => has("transformer_1d_blocks") || has("text_embedding_projection"),
        Component::TextProjection => true,
        Component::VideoVae => has("res_blocks") || has("per_channel_statistics"),
        Component::AudioVae => has("per_channel_statistics"),
        _ => has("conv_pre"),
    }
}

/// An official key with the prefix of its component, which FastVideo leaves out (`is_bare`).
///
/// A bare vocoder of LTX-2.3 has keys that look like those of LTX-2 with prefix, so there the key alone does not tell.
fn with_prefix(key: &str, component: Component, is_bare: bool) -> String {
    let is_complete = layout::canonical(key, None).is_some() && component != Component::Vocoder;
    if !is_bare || is_complete { key.into() } else { format!("{}{key}", prefix(component)) }
}

fn prefix(component: Component) -> &'static str {
    match component {
        Component::Transformer | Component::Connectors => "model.diffusion_model.",
        Component::TextProjection => "text_embedding_projection.",
        Component::VideoVae => "vae.",
        Component::AudioVae => "audio_vae.",
        Component::Vocoder => "vocoder.",
        Component::DurationHead => "duration_head.",
    }
}

/// The official key of a diffusers key. `blocks` is the number of encoder blocks of the video VAE.
fn official(key: &str, component: Component, blocks: usize) -> String {
    let prefix = prefix(component);
    match component {
        Component::Connectors => match key.split_once('.') {
            Some(("text_proj_in", rest)) => format!("text_embedding_projection.aggregate_embed.{rest}"),
            Some(("video_text_proj_in", rest)) => format!("text_embedding_projection.video_aggregate_embed.{rest}"),
            Some(("audio_text_proj_in", rest)) => format!("text_embedding_projection.audio_aggregate_embed.{rest}"),
            _ => {
                let key = renamed(key, &DIFFUSION_SEGMENTS);
                format!("{prefix}{}", renamed(&key, &[("transformer_blocks", "transformer_1d_blocks")]))
            }
        },
        Component::VideoVae if key.starts_with("latents_") => {
            format!("{prefix}per_channel_statistics.{}", renamed(key, &DIFFUSION_SEGMENTS))
        }
        Component::VideoVae => format!("{prefix}{}", video_vae_key(key, blocks)),
        Component::AudioVae if key.starts_with("latents_") => {
            format!("{prefix}per_channel_statistics.{}", renamed(key, &DIFFUSION_SEGMENTS))
        }
        Component::Vocoder => format!("{prefix}{}", renamed(key, &VOCODER_SEGMENTS)),
        Component::Transformer => format!("{prefix}{}", renamed(key, &DIFFUSION_SEGMENTS)),
        _ => format!("{prefix}{key}"),
    }
}

/// The name that diffusers has for a module of the transformer, the connectors or the text projection, given by its
/// official name; connectors and projection stand below `connectors.`.
pub(crate) fn diffusers_name(official: &str) -> String {
    if let Some(rest) = official.strip_prefix("text_embedding_projection.") {
        return format!("connectors.{}", rest.replacen("aggregate_embed", "text_proj_in", 1));
    }
    let name = official.strip_prefix(prefix(Component::Transformer)).unwrap_or(official);
    let segments = DIFFUSION_SEGMENTS.map(|(diffusers, official)| (official, diffusers));
    let name = renamed(name, &segments);
    if ["video_connector.", "audio_connector."].iter().any(|c| name.starts_with(c)) {
        return format!("connectors.{}", renamed(&name, &[("transformer_1d_blocks", "transformer_blocks")]));
    }
    name
}

/// `key` with whole segments replaced.
fn renamed(key: &str, table: &[(&str, &str)]) -> String {
    let segment = |s| table.iter().find(|(from, _)| *from == s).map_or(s, |(_, to)| *to);
    key.split('.').map(segment).collect::<Vec<_>>().join(".")
}

/// Number of encoder blocks that end in a downsampler.
fn encoder_blocks(files: &[WeightFile]) -> usize {
    let index = |key: &str| key.strip_prefix("encoder.down_blocks.")?.split('.').next()?.parse::<usize>().ok();
    let all = files.iter().flat_map(|f| &f.header().tensors).filter_map(|t| index(&t.key));
    all.max().map_or(0, |last| last.saturating_add(1))
}

/// Official block lists count samplers as blocks of their own and have no middle block.
fn video_vae_key(key: &str, blocks: usize) -> String {
    let segments: Vec<&str> = key.split('.').collect();
    let number = |s: &str| s.parse::<usize>().ok().filter(|&n| n < 1 << 16);
    let (side, index, rest) = match segments.as_slice() {
        ["encoder", "mid_block", rest @ ..] => ("encoder.down_blocks", Some(2 * blocks), rest),
        ["encoder", "down_blocks", i, "downsamplers", "0", rest @ ..] => {
            ("encoder.down_blocks", number(i).map(|i| 2 * i + 1), rest)
        }
        ["encoder", "down_blocks", i, rest @ ..] => ("encoder.down_blocks", number(i).map(|i| 2 * i), rest),
        ["decoder", "mid_block", rest @ ..] => ("decoder.up_blocks", Some(0), rest),
        ["decoder", "up_blocks", i, "upsamplers", "0", rest @ ..] => {
            ("decoder.up_blocks", number(i).map(|i| 2 * i + 1), rest)
        }
        ["decoder", "up_blocks", i, rest @ ..] => ("decoder.up_blocks", number(i).map(|i| 2 * i + 2), rest),
        ["decoder", "time_embedder", rest @ ..] => return format!("decoder.last_time_embedder.{}", rest.join(".")),
        ["decoder", "scale_shift_table"] => return "decoder.last_scale_shift_table".into(),
        _ => return key.into(),
    };
    match index {
        Some(index) => format!("{side}.{index}.{}", renamed(&rest.join("."), &[("resnets", "res_blocks")])),
        None => key.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(component: Component, diffusers: &str, expected: &str) {
        assert_eq!(official(diffusers, component, 4), expected);
    }

    #[test]
    fn prefixes_come_back() {
        let check = |key: &str, is_bare: bool| with_prefix(key, Component::Vocoder, is_bare);
        assert_eq!(check("vocoder.conv_pre.bias", true), "vocoder.vocoder.conv_pre.bias");
        assert_eq!(check("conv_pre.bias", true), "vocoder.conv_pre.bias");
        assert_eq!(check("vocoder.conv_pre.bias", false), "vocoder.conv_pre.bias");
        let projection = "text_embedding_projection.aggregate_embed.weight";
        assert_eq!(with_prefix(projection, Component::Connectors, true), projection);
        assert_eq!(with_prefix("aggregate_embed.weight", Component::TextProjection, true), projection);
    }

    #[test]
    fn diffusers_keys_become_official() {
        use Component::*;
        let d = "model.diffusion_model.";
        check(Transformer, "proj_in.weight", &format!("{d}patchify_proj.weight"));
        check(Transformer, "time_embed.linear.bias", &format!("{d}adaln_single.linear.bias"));
        check(
            Transformer,
            "transformer_blocks.3.attn1.norm_q.weight",
            &format!("{d}transformer_blocks.3.attn1.q_norm.weight"),
        );
        check(
            Transformer,
            "transformer_blocks.3.video_a2v_cross_attn_scale_shift_table",
            &format!("{d}transformer_blocks.3.scale_shift_table_a2v_ca_video"),
        );
        check(Connectors, "video_text_proj_in.bias", "text_embedding_projection.video_aggregate_embed.bias");
        check(
            Connectors,
            "audio_connector.transformer_blocks.1.attn1.norm_k.weight",
            &format!("{d}audio_embeddings_connector.transformer_1d_blocks.1.attn1.k_norm.weight"),
        );
        check(VideoVae, "latents_mean", "vae.per_channel_statistics.mean-of-means");
        check(
            VideoVae,
            "encoder.mid_block.resnets.1.conv1.conv.bias",
            "vae.encoder.down_blocks.8.res_blocks.1.conv1.conv.bias",
        );
        check(
            VideoVae,
            "encoder.down_blocks.2.downsamplers.0.conv.conv.bias",
            "vae.encoder.down_blocks.5.conv.conv.bias",
        );
        check(
            VideoVae,
            "decoder.mid_block.resnets.0.conv2.conv.bias",
            "vae.decoder.up_blocks.0.res_blocks.0.conv2.conv.bias",
        );
        check(VideoVae, "decoder.up_blocks.0.upsamplers.0.conv.conv.bias", "vae.decoder.up_blocks.1.conv.conv.bias");
        check(
            VideoVae,
            "decoder.up_blocks.2.resnets.4.conv1.conv.bias",
            "vae.decoder.up_blocks.6.res_blocks.4.conv1.conv.bias",
        );
        check(AudioVae, "latents_std", "audio_vae.per_channel_statistics.std-of-means");
        check(AudioVae, "decoder.up.1.upsample.conv.conv.bias", "audio_vae.decoder.up.1.upsample.conv.conv.bias");
        check(Vocoder, "upsamplers.0.bias", "vocoder.ups.0.bias");
        check(
            Vocoder,
            "vocoder.resnets.2.acts1.0.downsample.filter",
            "vocoder.vocoder.resblocks.2.acts1.0.downsample.lowpass.filter",
        );
        check(Vocoder, "bwe_generator.act_out.act.alpha", "vocoder.bwe_generator.act_post.act.alpha");
    }
}
