//! The `config` of the published single file, rewritten as diffusers configurations.
//!
//! Settings are taken as the model builders read them, so that what a file leaves to a default is written out. Each result is
//! read back and compared: what a diffusers configuration has no word for is refused, never dropped.
//!
//! Source of the names: scripts/convert_ltx2_to_diffusers.py (huggingface/diffusers @ 58eb52c).

use std::fmt::Debug;

use serde_json::{Map, Value, json};

use super::{Checkpoint, diffusers_config as read};
use crate::ModelError;
use crate::audio::{AudioVaeConfig, FinalActivation, GeneratorConfig, GeneratorKind, VocoderConfig};
use crate::text::{ConnectorConfig, Connectors};
use crate::transformer::{ROPE_LAYOUTS, TransformerConfig};
use crate::video_vae::{DecoderBlock, EncoderBlock, LogVariance, PADDING_MODES, PaddingMode, VideoVaeConfig};

type Object = Map<String, Value>;

/// Release of diffusers whose classes these configurations are for.
const VERSION: &str = "0.42.0";

/// Channels of sound in and out of the vocoder.
const STEREO: usize = 2;

/// A component that settings have no diffusers form for.
fn refused(section: &str, problem: impl Into<String>) -> ModelError {
    let way_out = "write a single file or split files instead";
    ModelError::config(section, format!("{}, which a diffusers folder cannot hold; {way_out}", problem.into()))
}

/// Refuses settings that are not the same when `written` is read again.
fn same<T: PartialEq + Debug>(section: &str, original: &T, again: Result<T, ModelError>) -> Result<(), ModelError> {
    match again {
        Ok(again) if again == *original => Ok(()),
        Ok(_) => Err(refused(section, "has settings besides those of the published models")),
        Err(e) => Err(refused(section, format!("has settings that do not come back ({e})"))),
    }
}

fn object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        // Only literals of objects come here.
        _ => Object::new(),
    }
}

/// A whole number without a point, as other tools want it.
fn number(value: f64) -> Value {
    // 2^53: every whole number below is exact.
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

fn name_of<T: Copy + PartialEq>(value: T, names: &[(&'static str, T)]) -> &'static str {
    names.iter().find(|(_, v)| *v == value).map_or("", |(name, _)| name)
}

/// `transformer/config.json`.
pub(super) fn transformer(checkpoint: &Checkpoint) -> Result<Object, ModelError> {
    let section = checkpoint.section("transformer")?;
    let config = TransformerConfig::from_json(section)?;
    let [seconds, height, width] = config.video.max_positions[..] else {
        return Err(refused("transformer", "has other than three axes of video positions"));
    };
    let [audio_seconds] = config.audio.max_positions[..] else {
        return Err(refused("transformer", "has other than one axis of audio positions"));
    };
    let video_vae = checkpoint.section("vae").ok().and_then(|v| VideoVaeConfig::from_json(v).ok());
    let audio_vae = checkpoint.section("audio_vae").ok().and_then(|v| AudioVaeConfig::from_json(v).ok());
    let mut written = object(json!({
        "_class_name": "LTX2VideoTransformer3DModel", "_diffusers_version": VERSION,
        "in_channels": config.video.in_channels, "out_channels": config.video.out_channels,
        "patch_size": 1, "patch_size_t": 1,
        "num_attention_heads": config.heads, "attention_head_dim": config.video.head_dim,
        "cross_attention_dim": config.video.context_width,
        "vae_scale_factors": video_vae.map_or([8, 32, 32], |vae| vae.factors()),
        "pos_embed_max_pos": number(seconds), "base_height": number(height), "base_width": number(width),
        "gated_attn": config.is_gated, "cross_attn_mod": config.has_text_adaln, "ff_bias": config.video.has_ff_bias,
    }));
    written.extend(object(json!({
        "audio_in_channels": config.audio.in_channels, "audio_out_channels": config.audio.out_channels,
        "audio_patch_size": 1, "audio_patch_size_t": 1,
        "audio_num_attention_heads": config.heads, "audio_attention_head_dim": config.audio.head_dim,
        "audio_cross_attention_dim": config.audio.context_width,
        "audio_scale_factor": audio_vae.as_ref().map_or(4, AudioVaeConfig::time_factor),
        "audio_pos_embed_max_pos": number(audio_seconds),
        "audio_sampling_rate": audio_vae.as_ref().map_or(16_000, |vae| vae.sampling_rate_hz),
        "audio_hop_length": audio_vae.as_ref().map_or(160, |vae| vae.hop_length),
        "audio_gated_attn": config.is_gated, "audio_cross_attn_mod": config.has_text_adaln,
        "audio_ff_bias": config.audio.has_ff_bias,
    })));
    written.extend(object(json!({
        "num_layers": config.layers, "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads",
        "norm_elementwise_affine": false, "norm_eps": config.norm_eps,
        "caption_channels": section.get("caption_channels").cloned().unwrap_or(json!(3840)),
        "attention_bias": true, "attention_out_bias": true,
        "rope_theta": config.rope_theta, "rope_double_precision": config.has_f64_frequencies, "causal_offset": 1,
        "timestep_scale_multiplier": number(config.timestep_scale),
        "cross_attn_timestep_scale_multiplier": number(config.gate_timestep_scale),
        "rope_type": name_of(config.rope_layout, &ROPE_LAYOUTS),
        "use_prompt_embeddings": config.caption_channels.is_some(),
        // Which attention code diffusers runs: published models with gates have it.
        "perturbed_attn": config.is_gated,
        "use_prompt_adaln_single": config.has_prompt_adaln || !config.has_text_adaln,
        "use_keyframes_abs_pos_embedding": config.has_keyframes_embedding,
    })));
    let again = read::transformer(&written).and_then(|value| TransformerConfig::from_json(&value));
    same("transformer", &config, again)?;
    Ok(written)
}

/// `connectors/config.json`. `transformer` is what [`transformer()`] gave.
pub(super) fn connectors(checkpoint: &Checkpoint, transformer: &Object) -> Result<Object, ModelError> {
    let section = checkpoint.section("transformer")?;
    let Connectors { video, audio, .. } = Connectors::from_json(section)?;
    let shape = |key: &str| checkpoint.tensor(key).map(|t| t.stored.shape.clone());
    let registers = |name: &str| {
        shape(&format!("model.diffusion_model.{name}_embeddings_connector.learnable_registers"))
            .map_or(Value::Null, |shape| json!(shape.first()))
    };
    let [shared, own] = ["aggregate_embed", "video_aggregate_embed"]
        .map(|name| shape(&format!("text_embedding_projection.{name}.weight")));
    let is_per_modality = own.is_some();
    let columns = shared.or(own).and_then(|shape| shape.get(1).copied());
    let states = section.get("caption_channels").and_then(Value::as_u64).map(|n| n as usize);
    let factor = states.zip(columns).filter(|&(hidden, columns)| hidden > 0 && columns.is_multiple_of(hidden));
    let Some((hidden, columns)) = factor else {
        let problem = "needs a text projection whose columns are a multiple of `caption_channels`: diffusers keeps it with the \
                       connectors; name files that have both";
        return Err(ModelError::config("transformer", problem));
    };
    let has_bias = checkpoint
        .tensors()
        .any(|(key, _)| key.starts_with("text_embedding_projection.") && key.ends_with("aggregate_embed.bias"));
    let written = object(json!({
        "_class_name": "LTX2TextConnectors", "_diffusers_version": VERSION,
        "caption_channels": hidden, "text_proj_in_factor": columns / hidden,
        "video_connector_num_attention_heads": video.heads, "video_connector_attention_head_dim": video.head_dim,
        "video_connector_num_layers": video.layers, "video_connector_num_learnable_registers": registers("video"),
        "video_gated_attn": video.is_gated,
        "audio_connector_num_attention_heads": audio.heads, "audio_connector_attention_head_dim": audio.head_dim,
        "audio_connector_num_layers": audio.layers, "audio_connector_num_learnable_registers": registers("audio"),
        "audio_gated_attn": audio.is_gated,
        "connector_rope_base_seq_len": number(video.max_position), "rope_theta": 10000.0,
        "rope_double_precision": video.has_f64_grid, "causal_temporal_positioning": false,
        "rope_type": name_of(video.rope, &ROPE_LAYOUTS),
        "per_modality_projections": is_per_modality, "video_hidden_dim": video.width(),
        "audio_hidden_dim": audio.width(), "proj_bias": has_bias,
    }));
    // Both have their settings in one object when they are read.
    let again = read::transformer(transformer).and_then(|both| {
        let mut both = object(both);
        both.extend(object(read::connectors(&written)?));
        Connectors::from_json(&Value::Object(both))
    });
    let pair = |c: Connectors| -> [ConnectorConfig; 2] { [c.video, c.audio] };
    same("transformer", &[video, audio], again.map(pair))?;
    Ok(written)
}

/// `vae/config.json`.
pub(super) fn video_vae(checkpoint: &Checkpoint) -> Result<Object, ModelError> {
    let config = VideoVaeConfig::from_json(checkpoint.section("vae")?)?;
    let unlike =
        |half: &str| refused("vae", format!("has a {half} whose residual blocks and samplers do not take turns"));
    let (mut layers, mut kinds, mut widths) = (Vec::new(), Vec::new(), Vec::new());
    let mut width = config.latent_channels;
    for (i, block) in config.encoder_blocks.iter().enumerate() {
        match *block {
            EncoderBlock::ResStack { layers: n } if i % 2 == 0 => layers.push(n),
            EncoderBlock::SpaceToDepth { stride, multiplier } if i % 2 == 1 => {
                kinds.push(sampler(stride)?);
                width = width.saturating_mul(multiplier);
                widths.push(width);
            }
            _ => return Err(unlike("encoder")),
        }
    }
    let (mut decoder_layers, mut noise, mut ups) = (Vec::new(), Vec::new(), Vec::new());
    // As they are stored: the pixel side first.
    for (i, block) in config.decoder_blocks.iter().rev().enumerate() {
        match *block {
            DecoderBlock::ResStack { layers, has_noise } if i % 2 == 0 => {
                decoder_layers.push(layers);
                noise.push(has_noise);
            }
            DecoderBlock::DepthToSpace { stride, divisor, is_residual } if i % 2 == 1 => {
                ups.push((sampler(stride)?, divisor, is_residual));
            }
            _ => return Err(unlike("decoder")),
        }
    }
    if layers.len() != kinds.len() + 1 || decoder_layers.len() != ups.len() + 1 || ups.is_empty() {
        return Err(unlike("half"));
    }
    let mut width = config.decoder_base_channels;
    let decoder_widths = ups.iter().map(|(_, divisor, _)| {
        width = width.saturating_mul(*divisor);
        width
    });
    let decoder_widths: Vec<usize> = decoder_widths.collect();
    let padding = |mode: PaddingMode| name_of(mode, &PADDING_MODES);
    let [frames, rows, _] = config.factors();
    let written = object(json!({
        "_class_name": "AutoencoderKLLTX2Video", "_diffusers_version": VERSION,
        "in_channels": 3, "out_channels": 3, "latent_channels": config.latent_channels,
        "block_out_channels": widths, "down_block_types": vec!["LTX2VideoDownBlock3D"; kinds.len()],
        "layers_per_block": layers, "spatio_temporal_scaling": vec![true; kinds.len()], "downsample_type": kinds,
        "decoder_block_out_channels": decoder_widths, "decoder_layers_per_block": decoder_layers,
        "decoder_spatio_temporal_scaling": vec![true; ups.len()], "decoder_inject_noise": noise,
        // In order of execution, unlike everything else about the decoder.
        "upsample_type": ups.iter().rev().map(|up| up.0).collect::<Vec<_>>(),
        "upsample_residual": ups.iter().map(|up| up.2).collect::<Vec<_>>(),
        "upsample_factor": ups.iter().map(|up| up.1).collect::<Vec<_>>(),
        "timestep_conditioning": config.has_timestep, "patch_size": config.patch_size, "patch_size_t": 1,
        "resnet_norm_eps": 1e-6, "scaling_factor": 1.0,
        "encoder_causal": true, "decoder_causal": config.is_decoder_causal,
        "encoder_spatial_padding_mode": padding(config.encoder_padding),
        "decoder_spatial_padding_mode": padding(config.decoder_padding),
        "spatial_compression_ratio": rows, "temporal_compression_ratio": frames,
    }));
    // A variance that means nothing has no word, and nobody reads a variance.
    let log_variance = match config.log_variance {
        LogVariance::Constant => LogVariance::Uniform,
        other => other,
    };
    let config = VideoVaeConfig { log_variance, ..config };
    same("vae", &config, read::video_vae(&written).and_then(|value| VideoVaeConfig::from_json(&value)))?;
    Ok(written)
}

fn sampler(stride: [usize; 3]) -> Result<&'static str, ModelError> {
    match stride {
        [1, 2, 2] => Ok("spatial"),
        [2, 1, 1] => Ok("temporal"),
        [2, 2, 2] => Ok("spatiotemporal"),
        _ => Err(refused("vae", format!("has a sampler by {stride:?}"))),
    }
}

/// `audio_vae/config.json`.
pub(super) fn audio_vae(checkpoint: &Checkpoint) -> Result<Object, ModelError> {
    let section = checkpoint.section("audio_vae")?;
    let config = AudioVaeConfig::from_json(section)?;
    let stored = |key: &str| section.pointer(&format!("/model/params/ddconfig/{key}")).cloned();
    let has_attention = config.level_attention.contains(&true);
    let written = object(json!({
        "_class_name": "AutoencoderKLLTX2Audio", "_diffusers_version": VERSION,
        "base_channels": config.channels, "output_channels": config.out_channels,
        "ch_mult": config.channel_multipliers, "num_res_blocks": config.res_blocks,
        "attn_resolutions": has_attention.then(|| stored("attn_resolutions")).flatten(),
        "in_channels": config.in_channels, "resolution": stored("resolution").unwrap_or(json!(256)),
        "latent_channels": config.z_channels, "norm_type": "pixel", "causality_axis": "height", "dropout": 0.0,
        "mid_block_add_attention": config.has_mid_attention, "sample_rate": config.sampling_rate_hz,
        "mel_hop_length": config.hop_length, "is_causal": config.is_causal, "mel_bins": config.mel_bins,
        "double_z": config.has_log_variance,
    }));
    same("audio_vae", &config, read::audio_vae(&written).and_then(|value| AudioVaeConfig::from_json(&value)))?;
    Ok(written)
}

/// `vocoder/config.json`.
pub(super) fn vocoder(checkpoint: &Checkpoint) -> Result<Object, ModelError> {
    let config = VocoderConfig::from_json(checkpoint.section("vocoder")?)?;
    let inputs = |module: &str| -> Result<usize, ModelError> {
        let key = format!("vocoder.{module}conv_pre.weight");
        let shape = checkpoint.tensor(&key).and_then(|t| t.stored.shape.get(1).copied());
        shape
            .ok_or_else(|| ModelError::config("vocoder", format!("needs `{key}`, which is not there; use whole files")))
    };
    let mut written = object(json!({ "_diffusers_version": VERSION, "output_sampling_rate": config.output_rate_hz }));
    match &config.extension {
        None => {
            written.insert("_class_name".into(), json!("LTX2Vocoder"));
            written.extend(generator(&config.core, "", inputs("")?));
        }
        Some(extension) => {
            written.insert("_class_name".into(), json!("LTX2VocoderWithBWE"));
            written.extend(generator(&config.core, "", inputs("vocoder.")?));
            written.extend(generator(&extension.generator, "bwe_", inputs("bwe_generator.")?));
            written.extend(object(json!({
                "filter_length": extension.n_fft, "window_length": extension.n_fft, "hop_length": extension.hop_length,
                "num_mel_channels": extension.mel_bins,
                "input_sampling_rate": config.output_rate_hz / extension.ratio.max(1),
            })));
        }
    }
    same("vocoder", &config, read::vocoder(&written).and_then(|value| VocoderConfig::from_json(&value)))?;
    Ok(written)
}

fn generator(config: &GeneratorConfig, prefix: &str, inputs: usize) -> Object {
    let is_big = config.kind == GeneratorKind::BigVgan;
    let tanh = config.final_activation == FinalActivation::Tanh;
    let settings = object(json!({
        "in_channels": inputs, "hidden_channels": config.channels, "out_channels": STEREO,
        "upsample_kernel_sizes": config.rate_kernels, "upsample_factors": config.rates,
        "resnet_kernel_sizes": config.block_kernels, "resnet_dilations": config.block_dilations,
        "act_fn": if is_big { "snakebeta" } else { "leaky_relu" }, "leaky_relu_negative_slope": 0.1,
        "antialias": is_big, "antialias_ratio": 2, "antialias_kernel_size": 12,
        "final_act_fn": tanh.then_some("tanh"), "final_bias": config.has_final_bias,
    }));
    settings.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value)).collect()
}

/// `model_index.json`: the class of every component in `folders`.
pub(super) fn model_index(folders: &[&str], vocoder: Option<&Object>) -> Value {
    let class = |folder: &str| match folder {
        "transformer" => json!(["diffusers", "LTX2VideoTransformer3DModel"]),
        "connectors" => json!(["ltx2", "LTX2TextConnectors"]),
        "vae" => json!(["diffusers", "AutoencoderKLLTX2Video"]),
        "audio_vae" => json!(["diffusers", "AutoencoderKLLTX2Audio"]),
        "vocoder" => json!(["ltx2", vocoder.map_or(&Value::Null, |config| &config["_class_name"])]),
        _ => json!(["diffusers", "FlowMatchEulerDiscreteScheduler"]),
    };
    let mut index = object(json!({ "_class_name": "LTX2Pipeline", "_diffusers_version": VERSION }));
    index.extend(folders.iter().map(|folder| (folder.to_string(), class(folder))));
    // What is not in the folder: the text encoder has files of its own.
    for absent in ["text_encoder", "tokenizer", "processor"] {
        index.insert(absent.into(), json!([null, null]));
    }
    Value::Object(index)
}

/// `scheduler/scheduler_config.json`, as the published folders have it for models of either training.
pub(super) fn scheduler(is_distilled: bool) -> Value {
    json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": VERSION, "num_train_timesteps": 1000,
        "shift": 1.0, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096,
        "use_dynamic_shifting": !is_distilled, "shift_terminal": if is_distilled { json!(null) } else { json!(0.1) },
    })
}
