//! What diffusers calls the tensors of a model, in both directions.
//!
//! Names change segment by segment, so that a component called `ups` never changes a key that only contains these letters.
//!
//! *Invariant:* [`in_diffusers`] gives a name only if [`official`] leads back to the same key.
//!
//! Source of the names: scripts/convert_ltx2_to_diffusers.py (huggingface/diffusers @ 58eb52c).

use super::layout::Component;

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

/// What the keys of a component begin with in the published single file.
pub(super) fn prefix(component: Component) -> &'static str {
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
pub(super) fn official(key: &str, component: Component, blocks: usize) -> String {
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
    let name = renamed(name, &swapped(&DIFFUSION_SEGMENTS));
    if ["video_connector.", "audio_connector."].iter().any(|c| name.starts_with(c)) {
        return format!("connectors.{}", renamed(&name, &[("transformer_1d_blocks", "transformer_blocks")]));
    }
    name
}

/// The folder and the key that diffusers has for the official `key` of `component`; `None` if it has neither. `blocks` is the
/// number of encoder blocks of the video VAE that end in a downsampler.
pub(super) fn in_diffusers(key: &str, component: Component, blocks: usize) -> Option<(&'static str, String)> {
    let rest = key.strip_prefix(prefix(component))?;
    let statistic = || Some(renamed(rest.strip_prefix("per_channel_statistics.")?, &swapped(&DIFFUSION_SEGMENTS)));
    let (folder, reader, name) = match component {
        Component::Transformer => ("transformer", component, diffusers_name(key)),
        Component::Connectors | Component::TextProjection => {
            ("connectors", Component::Connectors, diffusers_name(key).strip_prefix("connectors.")?.to_string())
        }
        Component::VideoVae => ("vae", component, statistic().unwrap_or_else(|| video_vae_name(rest, blocks))),
        Component::AudioVae => ("audio_vae", component, statistic().unwrap_or_else(|| rest.into())),
        Component::Vocoder => {
            let name = rest.replace(".downsample.lowpass.", ".downsample.");
            ("vocoder", component, renamed(&name, &swapped(&VOCODER_SEGMENTS)))
        }
        Component::DurationHead => return None,
    };
    (official(&name, reader, blocks) == key).then_some((folder, name))
}

/// `key` with whole segments replaced.
fn renamed(key: &str, table: &[(&str, &str)]) -> String {
    let segment = |s| table.iter().find(|(from, _)| *from == s).map_or(s, |(_, to)| *to);
    key.split('.').map(segment).collect::<Vec<_>>().join(".")
}

/// A table for the other direction.
fn swapped<const N: usize>(table: &[(&'static str, &'static str); N]) -> [(&'static str, &'static str); N] {
    table.map(|(from, to)| (to, from))
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

/// The inverse of [`video_vae_key`], where there is one.
fn video_vae_name(key: &str, blocks: usize) -> String {
    let segments: Vec<&str> = key.split('.').collect();
    let number = |s: &str| s.parse::<usize>().ok();
    let (block, rest) = match segments.as_slice() {
        ["encoder", "down_blocks", i, rest @ ..] => match number(i) {
            Some(i) if i > 2 * blocks => return key.into(),
            Some(i) if i == 2 * blocks => ("encoder.mid_block".into(), rest),
            Some(i) if i % 2 == 1 => (format!("encoder.down_blocks.{}.downsamplers.0", i / 2), rest),
            Some(i) => (format!("encoder.down_blocks.{}", i / 2), rest),
            None => return key.into(),
        },
        ["decoder", "up_blocks", i, rest @ ..] => match number(i) {
            Some(0) => ("decoder.mid_block".into(), rest),
            Some(i) if i % 2 == 1 => (format!("decoder.up_blocks.{}.upsamplers.0", i / 2), rest),
            Some(i) => (format!("decoder.up_blocks.{}", i / 2 - 1), rest),
            None => return key.into(),
        },
        ["decoder", "last_time_embedder", rest @ ..] => return format!("decoder.time_embedder.{}", rest.join(".")),
        ["decoder", "last_scale_shift_table"] => return "decoder.scale_shift_table".into(),
        _ => return key.into(),
    };
    format!("{block}.{}", renamed(&rest.join("."), &[("res_blocks", "resnets")]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(component: Component, diffusers: &str, expected: &str) {
        assert_eq!(official(diffusers, component, 4), expected);
        let owner = if expected.starts_with("text_") { Component::TextProjection } else { component };
        assert_eq!(in_diffusers(expected, owner, 4).map(|(_, name)| name).as_deref(), Some(diffusers));
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
    #[test]
    fn keys_that_lead_nowhere_have_no_name() {
        use Component::*;
        for (component, key) in [
            (VideoVae, "vae.per_channel_statistics.mean-of-stds"),
            (VideoVae, "vae.per_channel_statistics.channel"),
            (VideoVae, "vae.encoder.down_blocks.9.res_blocks.0.conv1.conv.bias"),
            (Transformer, "model.diffusion_model.proj_in.weight"),
            (Vocoder, "vocoder.conv_in.bias"),
            (DurationHead, "duration_head.mlp_hidden.weight"),
        ] {
            assert_eq!(in_diffusers(key, component, 4), None, "{key}");
        }
    }
}
