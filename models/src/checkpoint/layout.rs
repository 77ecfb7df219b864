//! Which keys belong to which component, and what a file is.
//!
//! One checkpoint has one set of canonical keys, those of the published single file, whatever its files look like. Files
//! are recognised by what they hold, never by their names.

use super::file::WeightFile;

const DIFFUSION: &str = "model.diffusion_model.";

/// A part of the model that lives in one file or folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// The diffusion transformer.
    Transformer,
    /// The text connectors.
    Connectors,
    /// The projection of text features.
    TextProjection,
    /// The video VAE.
    VideoVae,
    /// The audio VAE.
    AudioVae,
    /// The vocoder.
    Vocoder,
    /// The duration head (LTX-2.5).
    DurationHead,
}

impl Component {
    /// Every component.
    pub const ALL: [Component; 7] = [
        Component::Transformer,
        Component::Connectors,
        Component::TextProjection,
        Component::VideoVae,
        Component::AudioVae,
        Component::Vocoder,
        Component::DurationHead,
    ];

    /// What messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Component::Transformer => "transformer",
            Component::Connectors => "text connectors",
            Component::TextProjection => "text projection",
            Component::VideoVae => "video VAE",
            Component::AudioVae => "audio VAE",
            Component::Vocoder => "vocoder",
            Component::DurationHead => "duration head",
        }
    }

    /// The sub-objects of `config` that describe it: those it cannot do without, then those that may be there.
    pub(super) fn sections(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Component::Transformer => (&["transformer"], &["scheduler"]),
            Component::Connectors => (&["transformer"], &[]),
            Component::VideoVae => (&["vae"], &[]),
            Component::AudioVae => (&["audio_vae"], &[]),
            Component::Vocoder => (&["vocoder"], &[]),
            Component::TextProjection => (&[], &[]),
            Component::DurationHead => (&[], &["duration_head"]),
        }
    }
}

/// The canonical key of `key`, and the component it belongs to. `bare` is the component whose keys the file stores
/// without their prefix, if any.
pub fn canonical(key: &str, bare: Option<Component>) -> Option<(Component, String)> {
    if let Some(rest) = key.strip_prefix(DIFFUSION).or_else(|| key.strip_prefix("diffusion_model.")) {
        return Some((diffusion_component(rest), format!("{DIFFUSION}{rest}")));
    }
    if let Some(rest) = key.strip_prefix("model.").filter(|k| k.starts_with("text_embedding_projection.")) {
        return Some((Component::TextProjection, rest.into()));
    }
    let prefixed = [
        ("text_embedding_projection.", Component::TextProjection),
        ("vae.", Component::VideoVae),
        ("audio_vae.", Component::AudioVae),
        ("vocoder.", Component::Vocoder),
        ("duration_head.", Component::DurationHead),
    ];
    if let Some((_, component)) = prefixed.iter().find(|(prefix, _)| key.starts_with(prefix)) {
        return Some((*component, key.into()));
    }
    match bare? {
        Component::VideoVae => {
            let known = ["encoder.", "decoder.", "per_channel_statistics."].iter().any(|p| key.starts_with(p));
            known.then(|| (Component::VideoVae, format!("vae.{key}")))
        }
        Component::Transformer => Some((diffusion_component(key), format!("{DIFFUSION}{key}"))),
        _ => None,
    }
}

/// The component of a key below the diffusion prefix.
fn diffusion_component(rest: &str) -> Component {
    let connectors = ["video_embeddings_connector.", "audio_embeddings_connector.", "embeddings_connector."];
    if connectors.iter().any(|c| rest.starts_with(c)) { Component::Connectors } else { Component::Transformer }
}

/// The component whose keys `file` stores without their prefix.
pub(super) fn bare_component(file: &WeightFile) -> Option<Component> {
    let header = file.header();
    if header.has_prefix("adaln_single.") {
        Some(Component::Transformer)
    } else if (header.has_prefix("encoder.") || header.has_prefix("decoder."))
        && file.metadata().section("vae").is_some()
    {
        Some(Component::VideoVae)
    } else {
        None
    }
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileKind {
    /// A whole model.
    Single,
    /// The transformer, usually with the connectors.
    Transformer,
    /// A text encoder with the projection.
    TextEncoder,
    /// The video VAE.
    VideoVae,
    /// The audio VAE, usually with the vocoder.
    AudioVae,
    /// The duration head.
    DurationHead,
    /// A latent upsampler.
    Upsampler,
    /// Low-rank adapters.
    Adapter,
    /// None of these.
    Other,
}

impl FileKind {
    /// What `file` is, by its keys and metadata.
    pub fn of(file: &WeightFile) -> FileKind {
        let (header, metadata) = (file.header(), file.metadata());
        let class = metadata.section("_class_name").and_then(|v| v.as_str());
        let low_rank = [".lora_A", ".lora_B", ".lora_down", ".lora_up", ".lora.down", ".lora.up"];
        if class == Some("LatentUpsampler") {
            return FileKind::Upsampler;
        }
        if header.tensors.iter().any(|t| low_rank.iter().any(|part| t.key.contains(part))) {
            return FileKind::Adapter;
        }
        if metadata.gemma_config.is_some() || header.tensor("tokenizer_json").is_some() {
            return FileKind::TextEncoder;
        }
        let bare = bare_component(file);
        let has = |component: Component| {
            header.tensors.iter().any(|t| canonical(&t.key, bare).is_some_and(|(c, _)| c == component))
        };
        let (transformer, video) = (has(Component::Transformer), has(Component::VideoVae));
        let audio = has(Component::AudioVae) || has(Component::Vocoder);
        match (transformer, video, audio) {
            (true, false, false) => FileKind::Transformer,
            (true, _, _) | (_, true, true) => FileKind::Single,
            (_, true, _) => FileKind::VideoVae,
            (_, _, true) => FileKind::AudioVae,
            _ if has(Component::DurationHead) => FileKind::DurationHead,
            _ if has(Component::Connectors) => FileKind::Transformer,
            _ if has(Component::TextProjection) => FileKind::TextEncoder,
            _ => FileKind::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(key: &str, bare: Option<Component>, expected: Option<(Component, &str)>) {
        assert_eq!(canonical(key, bare), expected.map(|(c, k)| (c, k.to_string())), "{key}");
    }

    #[test]
    fn keys_become_those_of_the_single_file() {
        use Component::*;
        let official = "model.diffusion_model.proj_out.weight";
        check(official, None, Some((Transformer, official)));
        check("diffusion_model.proj_out.weight", None, Some((Transformer, official)));
        check("proj_out.weight", Some(Transformer), Some((Transformer, official)));
        check("proj_out.weight", None, None);
        let connector = "model.diffusion_model.audio_embeddings_connector.learnable_registers";
        check(connector, None, Some((Connectors, connector)));
        let projection = "text_embedding_projection.aggregate_embed.weight";
        check(&format!("model.{projection}"), None, Some((TextProjection, projection)));
        check("encoder.conv_in.conv.bias", Some(VideoVae), Some((VideoVae, "vae.encoder.conv_in.conv.bias")));
        check("encoder.conv_in.conv.bias", None, None);
        check("vocoder.vocoder.ups.0.bias", None, Some((Vocoder, "vocoder.vocoder.ups.0.bias")));
        check("model.layers.0.mlp.up_proj.weight", None, None);
    }
}
