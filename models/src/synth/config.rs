//! Configurations of synthetic models, with the structure and the values of the published files.

use serde_json::{Value, json};

/// What the models of one generation differ in; everything else is common.
pub(super) struct Sizes {
    /// Heads of both streams.
    pub heads: usize,
    /// Head widths, video and audio.
    pub head_dims: [usize; 2],
    /// Blocks of the transformer.
    pub layers: usize,
    /// Latent channels, video and audio (before folding 16 mel bins into them).
    pub latents: [usize; 2],
    /// Width of the text encoder.
    pub text: usize,
}

/// Transformer settings that all models share.
fn common_transformer(sizes: &Sizes) -> Value {
    let [video, audio] = sizes.head_dims;
    let fixed = json!({
        "_class_name": "AVTransformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": true,
        "attention_type": "default", "cross_attention_norm": true, "double_self_attention": false, "dropout": 0.0,
        "norm_elementwise_affine": false, "norm_eps": 1e-6, "norm_num_groups": 32, "num_embeds_ada_norm": 1000,
        "num_vector_embeds": null, "only_cross_attention": false, "upcast_attention": false,
        "use_linear_projection": false, "qk_norm": "rms_norm", "standardization_norm": "rms_norm",
        "positional_embedding_type": "rope", "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048], "audio_positional_embedding_max_pos": [20],
        "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000,
        "use_audio_video_cross_attention": true, "share_ff": false, "av_cross_ada_norm": true,
        "use_middle_indices_grid": true, "causal_temporal_positioning": true, "rope_type": "split",
        "frequencies_precision": "float64",
        "connector_positional_embedding_max_pos": [4096], "connector_num_learnable_registers": 128,
    });
    let sized = json!({
        "num_attention_heads": sizes.heads, "attention_head_dim": video, "num_layers": sizes.layers,
        "in_channels": sizes.latents[0], "out_channels": sizes.latents[0], "cross_attention_dim": sizes.heads * video,
        "caption_channels": sizes.text,
        "audio_num_attention_heads": sizes.heads, "audio_attention_head_dim": audio,
        "audio_in_channels": sizes.latents[1] * 16, "audio_out_channels": sizes.latents[1] * 16,
        "audio_cross_attention_dim": sizes.heads * audio,
    });
    with(fixed, sized)
}

fn with(mut value: Value, more: Value) -> Value {
    if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
        value.extend(more);
    }
    value
}

/// Transformer of LTX-2: connectors as wide as the text encoder, captions projected inside.
pub(super) fn transformer_ltx2(sizes: &Sizes, connector: [usize; 3]) -> Value {
    let [heads, head_dim, layers] = connector;
    let more = json!({
        "connector_num_attention_heads": heads, "connector_attention_head_dim": head_dim, "connector_num_layers": layers,
    });
    with(common_transformer(sizes), more)
}

/// Transformer of LTX-2.3: gates, prompt modulation, connectors as wide as the streams.
pub(super) fn transformer_ltx23(sizes: &Sizes, connector_layers: usize) -> Value {
    let more = json!({
        "apply_gated_attention": true, "cross_attention_adaln": true,
        "caption_proj_before_connector": true, "caption_projection_first_linear": false,
        "caption_proj_input_norm": false, "caption_projection_second_linear": false,
        "connector_apply_gated_attention": true, "connector_num_layers": connector_layers,
        "connector_num_attention_heads": sizes.heads, "connector_attention_head_dim": sizes.head_dims[0],
        "audio_connector_num_attention_heads": sizes.heads, "audio_connector_attention_head_dim": sizes.head_dims[1],
    });
    with(common_transformer(sizes), more)
}

/// Block lists take `[name, settings]` pairs.
fn blocks(list: &[(&str, Value)]) -> Value {
    list.iter().map(|(name, settings)| json!([name, settings])).collect()
}

fn common_video_vae(latent: usize, base: usize, encoder: Value, decoder: Value) -> Value {
    json!({
        "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3,
        "latent_channels": latent, "norm_layer": "pixel_norm", "patch_size": 4, "scaling_factor": 1.0,
        "latent_log_var": "uniform", "use_quant_conv": false, "causal_decoder": false, "timestep_conditioning": false,
        "normalize_latent_channels": false, "decoder_base_channels": base,
        "encoder_blocks": encoder, "decoder_blocks": decoder,
    })
}

fn encoder_blocks(layers: [usize; 5], last_multiplier: usize) -> Value {
    let res = |i: usize| ("res_x", json!({ "num_layers": layers[i] }));
    let down = |name, multiplier: usize| (name, json!({ "multiplier": multiplier }));
    blocks(&[
        res(0),
        down("compress_space_res", 2),
        res(1),
        down("compress_time_res", 2),
        res(2),
        down("compress_all_res", 2),
        res(3),
        down("compress_all_res", last_multiplier),
        res(4),
    ])
}

/// Video VAE of LTX-2. No padding mode is stored: zeros in the encoder, reflection in the decoder.
pub(super) fn video_vae_ltx2(latent: usize, base: usize, encoder: [usize; 5], decoder: [usize; 4]) -> Value {
    let res = |i: usize| ("res_x", json!({ "num_layers": decoder[i], "inject_noise": false }));
    let up = || ("compress_all", json!({ "residual": true, "multiplier": 2 }));
    let list = blocks(&[res(0), up(), res(1), up(), res(2), up(), res(3)]);
    common_video_vae(latent, base, encoder_blocks(encoder, 2), list)
}

/// Video VAE of LTX-2.3.
pub(super) fn video_vae_ltx23(latent: usize, base: usize, encoder: [usize; 5], decoder: [usize; 5]) -> Value {
    let res = |i: usize| ("res_x", json!({ "num_layers": decoder[i], "inject_noise": false }));
    let up = |name, multiplier: usize| (name, json!({ "multiplier": multiplier }));
    let list = blocks(&[
        res(0),
        up("compress_space", 2),
        res(1),
        up("compress_time", 2),
        res(2),
        up("compress_all", 1),
        res(3),
        up("compress_all", 2),
        res(4),
    ]);
    let vae = common_video_vae(latent, base, encoder_blocks(encoder, 1), list);
    with(vae, json!({ "spatial_padding_mode": "zeros" }))
}

/// Audio VAE of every generation.
pub(super) fn audio_vae(base: usize, multipliers: [usize; 3], res_blocks: usize, latent: usize) -> Value {
    json!({
        "model": { "params": {
            "sampling_rate": 16000,
            "ddconfig": {
                "double_z": true, "mel_bins": 64, "z_channels": latent, "resolution": 256, "downsample_time": false,
                "in_channels": 2, "out_ch": 2, "ch": base, "ch_mult": multipliers, "num_res_blocks": res_blocks,
                "attn_resolutions": [], "dropout": 0.0, "mid_block_add_attention": false, "norm_type": "pixel",
                "causality_axis": "height",
            },
        } },
        "preprocessing": {
            "audio": { "sampling_rate": 16000, "max_wav_value": 32768.0, "duration": 5.12, "stereo": true, "causal_padding": 3 },
            "stft": { "filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": true },
            "mel": { "n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000 },
        },
    })
}

fn dilations() -> Value {
    json!([[1, 3, 5], [1, 3, 5], [1, 3, 5]])
}

/// HiFi-GAN vocoder of LTX-2, 24 kHz. The rates must multiply to 240.
pub(super) fn vocoder_ltx2(width: usize, rates: &[usize], kernels: &[usize]) -> Value {
    json!({
        "resblock": "1", "upsample_rates": rates, "upsample_kernel_sizes": kernels, "upsample_initial_channel": width,
        "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": dilations(), "stereo": true,
        "output_sampling_rate": 24000,
    })
}

/// Vocoder of LTX-2.3: 16 kHz core and bandwidth extension to 48 kHz.
pub(super) fn vocoder_ltx23() -> Value {
    let common = json!({
        "resblock": "AMP1", "activation": "snakebeta", "stereo": true, "use_tanh_at_final": false,
        "use_bias_at_final": false, "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": dilations(),
    });
    let core = json!({
        "upsample_rates": [5, 2, 2, 2, 2, 2], "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        "upsample_initial_channel": 1536,
    });
    let extension = json!({
        "upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4], "upsample_initial_channel": 512,
        "input_sampling_rate": 16000, "output_sampling_rate": 48000, "hop_length": 80, "n_fft": 512, "num_mels": 64,
    });
    json!({ "vocoder": with(common.clone(), core), "bwe": with(common, extension) })
}

/// The scheduler entry of every file; nothing reads it.
pub(super) fn scheduler() -> Value {
    json!({
        "_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "shifting": null, "base_resolution": null,
        "sampler": "LinearQuadratic",
    })
}

/// A latent upsampler. `scale` is 2 or 1.5 for space; time is always doubled.
pub(super) fn upsampler(latent: usize, mid: usize, blocks: usize, scale: Upscale) -> Value {
    let (space, time, spatial_scale, is_rational) = match scale {
        Upscale::Space { scale, is_rational } => (true, false, scale, is_rational),
        Upscale::Time => (false, true, 1.0, true),
    };
    json!({
        "_class_name": "LatentUpsampler", "in_channels": latent, "mid_channels": mid, "num_blocks_per_stage": blocks,
        "dims": 3, "spatial_upsample": space, "temporal_upsample": time, "spatial_scale": spatial_scale,
        "rational_resampler": is_rational,
    })
}

/// What an upsampler enlarges.
#[derive(Clone, Copy)]
pub(super) enum Upscale {
    /// Height and width.
    Space { scale: f64, is_rational: bool },
    /// Frames.
    Time,
}

/// `config.json` of a Gemma 3 with this vision tower. `heads` are query heads, key-value heads and their width.
pub(super) fn gemma3(
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: [usize; 3],
    window: usize,
    vocabulary: usize,
    vision: Value,
) -> Value {
    let [query, key_value, head_dim] = heads;
    let text = json!({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
        "eos_token_id": [1, 106],
        "initializer_range": 0.02, "transformers_version": "4.51.0",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": query, "num_key_value_heads": key_value, "head_dim": head_dim,
            "query_pre_attn_scalar": head_dim, "vocab_size": vocabulary, "sliding_window": window,
            "sliding_window_pattern": 6, "rope_theta": 1000000, "rope_local_base_freq": 10000,
            "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": false,
            "attention_dropout": 0.0, "attn_logit_softcapping": null, "final_logit_softcapping": null,
            "initializer_range": 0.02, "cache_implementation": "hybrid", "use_cache": true, "torch_dtype": "bfloat16",
        },
    });
    with(text, vision)
}

/// What a Gemma 3 has to see with. `sizes` are those of image and patch, in pixels; `ids` are the tokens of the beginning of
/// an image, of each of its `soft_tokens`, and of the end.
pub(super) fn vision(
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    sizes: [usize; 2],
    soft_tokens: usize,
    ids: [u64; 3],
) -> Value {
    let [image, patch] = sizes;
    let [begin, soft, end] = ids;
    json!({
        "mm_tokens_per_image": soft_tokens,
        "boi_token_index": begin, "image_token_index": soft, "eoi_token_index": end,
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": image, "patch_size": patch,
            "vision_use_head": false,
        },
    })
}

/// `preprocessor_config.json` of a Gemma 3 with this `config.json`.
pub(super) fn preprocessor(gemma: &Value) -> Value {
    let side = &gemma["vision_config"]["image_size"];
    json!({
        "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor",
        "do_resize": true, "size": { "height": side, "width": side }, "resample": 2,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "image_seq_length": gemma["mm_tokens_per_image"],
    })
}
