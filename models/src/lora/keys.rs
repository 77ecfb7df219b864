//! Names of layers and factors in the dialects of LoRA files.

use crate::checkpoint::diffusers_name;

/// What a tensor of a LoRA file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The factor next to the input, A.
    Down,
    /// The factor next to the output, B.
    Up,
    /// What the product is scaled by, times the rank.
    Alpha,
    /// Part of another kind of adapter.
    Foreign(&'static str),
}

/// Ends of keys. A name may stand before the `weight` of PEFT's: `.lora_A.default.weight`.
const ENDS: [(&str, Role); 14] = [
    (".lora_A", Role::Down),
    (".lora_B", Role::Up),
    (".lora_down", Role::Down),
    (".lora_up", Role::Up),
    (".lora.down", Role::Down),
    (".lora.up", Role::Up),
    (".lora_linear_layer.down", Role::Down),
    (".lora_linear_layer.up", Role::Up),
    (".alpha", Role::Alpha),
    (".lora_alpha", Role::Alpha),
    (".dora_scale", Role::Foreign("DoRA")),
    (".lora_magnitude_vector", Role::Foreign("DoRA")),
    (".lora_mid", Role::Foreign("Tucker decomposition")),
    (".diff", Role::Foreign("whole weights")),
];

/// Parts that only keys of other kinds of adapters have.
const FOREIGN: [(&str, &str); 5] =
    [(".lokr_", "LoKr"), (".hada_", "LoHa"), (".oft_", "OFT"), (".diff_b", "whole biases"), (".lora_bias", "biases")];

/// The layer and the role of `key`; `None` if it is nothing of an adapter.
pub(super) fn split(key: &str) -> Option<(&str, Role)> {
    if let Some((at, kind)) = FOREIGN.iter().find_map(|(part, kind)| Some((key.find(part)?, kind))) {
        return Some((&key[..at], Role::Foreign(kind)));
    }
    let key = key.strip_suffix(".weight").unwrap_or(key);
    // `.default` and the like.
    let without_name = key.rsplit_once('.').map_or(key, |(rest, _)| rest);
    [key, without_name].into_iter().find_map(|key| {
        let (end, role) = ENDS.iter().find(|(end, _)| key.ends_with(end))?;
        Some((&key[..key.len() - end.len()], *role))
    })
}

/// What dialects put in front of the names of layers.
const PREFIXES: [&str; 9] = [
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "diffusion_model_",
    "base_model_model_",
    "lycoris_",
];

/// `name`, then `name` without one prefix after the other.
pub(super) fn without_prefixes(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(name), |name| PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)))
}

/// Where the transformer and the connectors stand in published files.
pub(super) const DIFFUSION: &str = "model.diffusion_model.";

/// All names that a layer has in LoRA files, without prefixes. `key` is the canonical key of its weight; `None` if no
/// LoRA can change it.
pub(super) fn names_of(key: &str) -> Option<Vec<String>> {
    let layer = key.strip_suffix(".weight")?;
    let mut names = match layer.strip_prefix(DIFFUSION) {
        Some(rest) => vec![rest.to_string()],
        None if layer.starts_with("text_embedding_projection.") => vec![layer.to_string()],
        None => return None,
    };
    let diffusers = diffusers_name(layer);
    if let Some(inner) = diffusers.strip_prefix("connectors.") {
        names.push(inner.to_string());
    }
    names.push(diffusers);
    let underscored: Vec<String> = names.iter().map(|name| name.replace('.', "_")).collect();
    names.extend(underscored);
    names.sort();
    names.dedup();
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_every_dialect_are_recognised() {
        let layer = "x.attn1.to_out.0";
        for (end, role) in [
            ("lora_A.weight", Role::Down),
            ("lora_B.weight", Role::Up),
            ("lora_A.default.weight", Role::Down),
            ("lora_B", Role::Up),
            ("lora_down.weight", Role::Down),
            ("lora_up.weight", Role::Up),
            ("lora.down.weight", Role::Down),
            ("lora.up.weight", Role::Up),
            ("alpha", Role::Alpha),
            ("lora_alpha", Role::Alpha),
            ("dora_scale", Role::Foreign("DoRA")),
            ("lora_magnitude_vector.default.weight", Role::Foreign("DoRA")),
            ("lokr_w1", Role::Foreign("LoKr")),
            ("hada_w1_a", Role::Foreign("LoHa")),
            ("diff_b", Role::Foreign("whole biases")),
        ] {
            assert_eq!(split(&format!("{layer}.{end}")), Some((layer, role)), "{end}");
        }
        assert_eq!(split("x.attn1.to_out.0.weight"), None);
        assert_eq!(split("weight"), None);
    }

    #[test]
    fn layers_have_all_their_names() {
        let names = |key: &str| names_of(&format!("{key}.weight")).unwrap();
        assert_eq!(
            names("model.diffusion_model.transformer_blocks.0.attn1.to_out.0"),
            ["transformer_blocks.0.attn1.to_out.0", "transformer_blocks_0_attn1_to_out_0"]
        );
        let connector = names("model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.1.attn1.to_q");
        for name in [
            "audio_embeddings_connector.transformer_1d_blocks.1.attn1.to_q",
            "connectors.audio_connector.transformer_blocks.1.attn1.to_q",
            "audio_connector.transformer_blocks.1.attn1.to_q",
            "connectors_audio_connector_transformer_blocks_1_attn1_to_q",
        ] {
            assert!(connector.iter().any(|n| n == name), "{name} of {connector:?}");
        }
        assert!(names("model.diffusion_model.adaln_single.linear").contains(&"time_embed.linear".to_string()));
        let projection = names("text_embedding_projection.video_aggregate_embed");
        assert!(projection.contains(&"connectors.video_text_proj_in".to_string()), "{projection:?}");
        assert_eq!(names_of("vae.decoder.conv_in.conv.weight"), None);
        assert_eq!(names_of("model.diffusion_model.proj_out.bias"), None);
    }

    #[test]
    fn prefixes_come_off_one_by_one() {
        let names: Vec<&str> = without_prefixes("base_model.model.transformer.proj_in").collect();
        assert_eq!(names, ["base_model.model.transformer.proj_in", "transformer.proj_in", "proj_in"]);
        assert_eq!(without_prefixes("lora_unet_proj_in").last(), Some("proj_in"));
        assert_eq!(without_prefixes("transformer_blocks.0.x").count(), 1);
    }
}
