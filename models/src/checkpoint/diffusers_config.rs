//! Diffusers configurations, rewritten as the `config` of the published single file.
//!
//! Every number is taken from the folder. Switches that diffusers does not store, because its classes fix them, get the
//! value that the published files have.

use serde_json::{Map, Value, json};

use crate::ModelError;

type Object = Map<String, Value>;

fn wrong(key: &str, expected: &str) -> ModelError {
    ModelError::config(key, format!("expected {expected} in the diffusers configuration; download the folder again"))
}

fn value<'a>(from: &'a Object, key: &str) -> Result<&'a Value, ModelError> {
    from.get(key).ok_or_else(|| wrong(key, "a value"))
}

fn flag(from: &Object, key: &str, default: bool) -> Result<bool, ModelError> {
    match from.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(v) => v.as_bool().ok_or_else(|| wrong(key, "a truth value")),
    }
}

fn list<'a>(from: &'a Object, key: &str, len: Option<usize>) -> Result<&'a [Value], ModelError> {
    let list = value(from, key)?.as_array().ok_or_else(|| wrong(key, "a list"))?;
    match len {
        Some(len) if list.len() != len => Err(wrong(key, &format!("a list of {len}"))),
        _ => Ok(list),
    }
}

fn counts(from: &Object, key: &str, len: Option<usize>) -> Result<Vec<u64>, ModelError> {
    list(from, key, len)?.iter().map(|v| v.as_u64().ok_or_else(|| wrong(key, "a list of counts"))).collect()
}

fn fixed(from: &Object, key: &str, expected: Value) -> Result<(), ModelError> {
    match from.get(key) {
        None => Ok(()),
        Some(found) if *found == expected => Ok(()),
        Some(found) => Err(ModelError::config(key, format!("is {found}, and only {expected} is supported"))),
    }
}

/// Copies `(diffusers key, official key)` pairs; all must be there.
fn copied(from: &Object, pairs: &[(&str, &str)]) -> Result<Object, ModelError> {
    pairs.iter().map(|(theirs, ours)| Ok((ours.to_string(), value(from, theirs)?.clone()))).collect()
}

fn extend(to: &mut Object, more: Value) {
    if let Value::Object(more) = more {
        to.extend(more);
    }
}

/// `config.transformer` without the settings of the connectors.
pub(super) fn transformer(from: &Object) -> Result<Value, ModelError> {
    fixed(from, "patch_size", json!(1))?;
    fixed(from, "patch_size_t", json!(1))?;
    fixed(from, "norm_elementwise_affine", json!(false))?;
    fixed(from, "qk_norm", json!("rms_norm_across_heads"))?;
    let mut to = copied(
        from,
        &[
            ("in_channels", "in_channels"),
            ("out_channels", "out_channels"),
            ("num_attention_heads", "num_attention_heads"),
            ("attention_head_dim", "attention_head_dim"),
            ("cross_attention_dim", "cross_attention_dim"),
            ("audio_in_channels", "audio_in_channels"),
            ("audio_out_channels", "audio_out_channels"),
            ("audio_num_attention_heads", "audio_num_attention_heads"),
            ("audio_attention_head_dim", "audio_attention_head_dim"),
            ("audio_cross_attention_dim", "audio_cross_attention_dim"),
            ("num_layers", "num_layers"),
            ("caption_channels", "caption_channels"),
            ("activation_fn", "activation_fn"),
            ("attention_bias", "attention_bias"),
            ("norm_eps", "norm_eps"),
            ("rope_theta", "positional_embedding_theta"),
            ("timestep_scale_multiplier", "timestep_scale_multiplier"),
            ("cross_attn_timestep_scale_multiplier", "av_ca_timestep_scale_multiplier"),
            ("rope_type", "rope_type"),
        ],
    )?;
    let (gated, modulated) = (flag(from, "gated_attn", false)?, flag(from, "cross_attn_mod", false)?);
    fixed(from, "audio_gated_attn", json!(gated))?;
    fixed(from, "audio_cross_attn_mod", json!(modulated))?;
    let max_pos = [value(from, "pos_embed_max_pos")?, value(from, "base_height")?, value(from, "base_width")?];
    extend(
        &mut to,
        json!({
            "_class_name": "AVTransformer3DModel",
            "num_embeds_ada_norm": 1000, "norm_elementwise_affine": false, "qk_norm": "rms_norm",
            "standardization_norm": "rms_norm", "positional_embedding_type": "rope", "cross_attention_norm": true,
            "double_self_attention": false, "only_cross_attention": false, "upcast_attention": false,
            "use_linear_projection": false, "num_vector_embeds": null, "dropout": 0.0,
            "use_audio_video_cross_attention": true, "share_ff": false, "av_cross_ada_norm": true,
            "use_middle_indices_grid": true, "causal_temporal_positioning": true,
            "positional_embedding_max_pos": max_pos,
            "audio_positional_embedding_max_pos": [value(from, "audio_pos_embed_max_pos")?],
            "apply_gated_attention": gated,
            "cross_attention_adaln": modulated,
            "caption_proj_before_connector": !flag(from, "use_prompt_embeddings", true)?,
            "use_prompt_adaln_single": flag(from, "use_prompt_adaln_single", true)?,
            "ff_bias": flag(from, "ff_bias", true)?,
            "audio_ff_bias": flag(from, "audio_ff_bias", true)?,
            "use_keyframes_abs_pos_embedding": flag(from, "use_keyframes_abs_pos_embedding", false)?,
        }),
    );
    extend(&mut to, precision(from)?);
    if flag(from, "use_prompt_embeddings", true)? {
        // The feature extractor of LTX-2 is recognised by the absence of this key.
        to.remove("caption_proj_before_connector");
    }
    Ok(Value::Object(to))
}

fn precision(from: &Object) -> Result<Value, ModelError> {
    let precision = if flag(from, "rope_double_precision", false)? { "float64" } else { "float32" };
    Ok(json!({ "frequencies_precision": precision }))
}

/// The settings of the connectors in `config.transformer`.
pub(super) fn connectors(from: &Object) -> Result<Value, ModelError> {
    let mut to = copied(
        from,
        &[
            ("video_connector_num_attention_heads", "connector_num_attention_heads"),
            ("video_connector_attention_head_dim", "connector_attention_head_dim"),
            ("video_connector_num_layers", "connector_num_layers"),
            ("video_connector_num_learnable_registers", "connector_num_learnable_registers"),
            ("audio_connector_num_attention_heads", "audio_connector_num_attention_heads"),
            ("audio_connector_attention_head_dim", "audio_connector_attention_head_dim"),
            ("audio_connector_num_layers", "audio_connector_num_layers"),
            ("caption_channels", "caption_channels"),
            ("rope_type", "rope_type"),
        ],
    )?;
    let gated = flag(from, "video_gated_attn", false)?;
    fixed(from, "audio_gated_attn", json!(gated))?;
    let registers = value(from, "video_connector_num_learnable_registers")?.clone();
    fixed(from, "audio_connector_num_learnable_registers", registers)?;
    extend(
        &mut to,
        json!({
            "connector_positional_embedding_max_pos": [value(from, "connector_rope_base_seq_len")?],
            "connector_apply_gated_attention": gated,
        }),
    );
    extend(&mut to, precision(from)?);
    if flag(from, "per_modality_projections", false)? {
        extend(
            &mut to,
            json!({
                "caption_proj_before_connector": true, "caption_projection_first_linear": false,
                "caption_proj_input_norm": false, "caption_projection_second_linear": false,
            }),
        );
    }
    Ok(Value::Object(to))
}

/// `config.vae` of a convolutional VAE.
pub(super) fn video_vae(from: &Object) -> Result<Value, ModelError> {
    fixed(from, "_class_name", json!("AutoencoderKLLTX2Video"))?;
    fixed(from, "patch_size_t", json!(1))?;
    fixed(from, "encoder_causal", json!(true))?;
    let latent = value(from, "latent_channels")?
        .as_u64()
        .filter(|&c| c > 0)
        .ok_or_else(|| wrong("latent_channels", "a count"))?;

    let widths = counts(from, "block_out_channels", None)?;
    let layers = counts(from, "layers_per_block", Some(widths.len() + 1))?;
    let kinds = list(from, "downsample_type", Some(widths.len()))?;
    let mut encoder = Vec::new();
    let mut width = latent;
    for ((&layers, kind), &next) in layers.iter().zip(kinds).zip(&widths) {
        let multiplier = next.checked_div(width).filter(|&m| m > 0 && m.checked_mul(width) == Some(next));
        let multiplier =
            multiplier.ok_or_else(|| wrong("block_out_channels", "widths that are multiples of the one before"))?;
        encoder.push(json!(["res_x", { "num_layers": layers }]));
        encoder.push(json!([format!("{}_res", sampler(kind, "downsample_type")?), { "multiplier": multiplier }]));
        width = next;
    }
    encoder.push(json!(["res_x", { "num_layers": layers.last() }]));

    let widths = counts(from, "decoder_block_out_channels", None)?;
    let stages = widths.len();
    let layers = counts(from, "decoder_layers_per_block", Some(stages + 1))?;
    let factors = counts(from, "upsample_factor", Some(stages))?;
    let noise = list(from, "decoder_inject_noise", Some(stages + 1))?;
    let residual = match value(from, "upsample_residual")? {
        Value::Bool(all) => vec![json!(all); stages],
        _ => list(from, "upsample_residual", Some(stages))?.to_vec(),
    };
    // Older folders have no types: all of theirs are spatio-temporal. Types are in order of execution, the rest is not.
    let types = match from.get("upsample_type") {
        None => vec![json!("spatiotemporal"); stages],
        Some(_) => list(from, "upsample_type", Some(stages))?.to_vec(),
    };
    let mut decoder = Vec::new();
    for stage in 0..stages {
        decoder.push(json!(["res_x", { "num_layers": layers[stage], "inject_noise": noise[stage] }]));
        let kind = sampler(&types[stages - 1 - stage], "upsample_type")?;
        let mut settings = json!({ "multiplier": factors[stage] });
        if residual[stage] == json!(true) {
            settings["residual"] = json!(true);
        }
        decoder.push(json!([kind, settings]));
    }
    decoder.push(json!(["res_x", { "num_layers": layers[stages], "inject_noise": noise[stages] }]));
    let base = widths.first().zip(factors.first()).and_then(|(&w, &f)| w.checked_div(f));

    let mut to = json!({
        "_class_name": "CausalVideoAutoencoder", "dims": 3, "norm_layer": "pixel_norm", "latent_log_var": "uniform",
        "in_channels": value(from, "in_channels")?, "out_channels": value(from, "out_channels")?,
        "latent_channels": latent, "patch_size": value(from, "patch_size")?,
        "causal_decoder": flag(from, "decoder_causal", false)?,
        "timestep_conditioning": flag(from, "timestep_conditioning", false)?,
        "decoder_base_channels": base.ok_or_else(|| wrong("decoder_block_out_channels", "at least one width"))?,
        "encoder_blocks": encoder, "decoder_blocks": decoder,
    });
    let (theirs, ours) = (value(from, "encoder_spatial_padding_mode")?, value(from, "decoder_spatial_padding_mode")?);
    if theirs == ours {
        to["spatial_padding_mode"] = ours.clone();
    } else if ours == "reflect" {
        // What a decoder does if the official key is absent.
        to["encoder_spatial_padding_mode"] = theirs.clone();
    } else {
        return Err(wrong("decoder_spatial_padding_mode", "`reflect` or the encoder's mode"));
    }
    Ok(to)
}

fn sampler(kind: &Value, key: &str) -> Result<&'static str, ModelError> {
    match kind.as_str() {
        Some("spatial") => Ok("compress_space"),
        Some("temporal") => Ok("compress_time"),
        Some("spatiotemporal") => Ok("compress_all"),
        _ => Err(wrong(key, "`spatial`, `temporal` or `spatiotemporal`")),
    }
}

/// `config.audio_vae`.
pub(super) fn audio_vae(from: &Object) -> Result<Value, ModelError> {
    let rate = value(from, "sample_rate")?;
    let mut dd = copied(
        from,
        &[
            ("base_channels", "ch"),
            ("output_channels", "out_ch"),
            ("ch_mult", "ch_mult"),
            ("num_res_blocks", "num_res_blocks"),
            ("in_channels", "in_channels"),
            ("resolution", "resolution"),
            ("latent_channels", "z_channels"),
            ("norm_type", "norm_type"),
            ("causality_axis", "causality_axis"),
            ("mid_block_add_attention", "mid_block_add_attention"),
            ("mel_bins", "mel_bins"),
            ("double_z", "double_z"),
        ],
    )?;
    let attention = from.get("attn_resolutions").filter(|v| !v.is_null()).cloned().unwrap_or_else(|| json!([]));
    extend(&mut dd, json!({ "dropout": 0.0, "attn_resolutions": attention }));
    Ok(json!({
        "model": { "params": { "ddconfig": dd, "sampling_rate": rate } },
        "preprocessing": {
            "audio": { "sampling_rate": rate, "stereo": true },
            "stft": { "filter_length": 1024, "hop_length": value(from, "mel_hop_length")?, "win_length": 1024,
                      "causal": flag(from, "is_causal", true)? },
            "mel": { "n_mel_channels": value(from, "mel_bins")?, "mel_fmin": 0, "mel_fmax": 8000 },
        },
    }))
}

/// `config.vocoder`: flat, or nested with bandwidth extension.
pub(super) fn vocoder(from: &Object) -> Result<Value, ModelError> {
    let generator = |prefix: &str| -> Result<Object, ModelError> {
        let name = |key: &str| format!("{prefix}{key}");
        let pairs = [
            ("hidden_channels", "upsample_initial_channel"),
            ("upsample_factors", "upsample_rates"),
            ("upsample_kernel_sizes", "upsample_kernel_sizes"),
            ("resnet_kernel_sizes", "resblock_kernel_sizes"),
            ("resnet_dilations", "resblock_dilation_sizes"),
        ];
        let mut to = Object::new();
        for (theirs, ours) in pairs {
            to.insert(ours.into(), value(from, &name(theirs))?.clone());
        }
        fixed(from, &name("out_channels"), json!(2))?;
        to.insert("stereo".into(), json!(true));
        if flag(from, &name("antialias"), false)? {
            fixed(from, &name("act_fn"), json!("snakebeta"))?;
            extend(
                &mut to,
                json!({
                    "resblock": "AMP1", "activation": "snakebeta",
                    "use_tanh_at_final": from.get(&name("final_act_fn")).is_some_and(|v| v == "tanh"),
                    "use_bias_at_final": flag(from, &name("final_bias"), true)?,
                }),
            );
        } else {
            to.insert("resblock".into(), json!("1"));
        }
        Ok(to)
    };
    let mut first = generator("")?;
    if !from.contains_key("bwe_hidden_channels") {
        first.insert("output_sampling_rate".into(), value(from, "output_sampling_rate")?.clone());
        return Ok(Value::Object(first));
    }
    let mut second = generator("bwe_")?;
    second.extend(copied(
        from,
        &[
            ("filter_length", "n_fft"),
            ("hop_length", "hop_length"),
            ("num_mel_channels", "num_mels"),
            ("input_sampling_rate", "input_sampling_rate"),
            ("output_sampling_rate", "output_sampling_rate"),
        ],
    )?);
    Ok(json!({ "vocoder": first, "bwe": second }))
}

/// The configuration of a latent upsampler.
pub(super) fn upsampler(from: &Object) -> Result<Value, ModelError> {
    let mut to = copied(
        from,
        &[
            ("in_channels", "in_channels"),
            ("mid_channels", "mid_channels"),
            ("num_blocks_per_stage", "num_blocks_per_stage"),
            ("dims", "dims"),
            ("spatial_upsample", "spatial_upsample"),
            ("temporal_upsample", "temporal_upsample"),
        ],
    )?;
    let scale = from.get("rational_spatial_scale").filter(|v| !v.is_null()).cloned();
    // Folders from before the switch existed are rational if they name a scale.
    let is_rational = flag(from, "use_rational_resampler", scale.is_some())?;
    extend(
        &mut to,
        json!({
            "_class_name": "LatentUpsampler", "rational_resampler": is_rational,
            "spatial_scale": scale.unwrap_or_else(|| json!(2.0)),
        }),
    );
    Ok(Value::Object(to))
}
