//! What `config.transformer` of a checkpoint says about the model, checked and in our words.
//!
//! One reading serves every generation: LTX-2, 2.3 and 2.5 differ only in switches. A key that is absent has the default
//! of the reference; keys that the reference needs to have one certain value are checked, and all problems are reported
//! together.
//!
//! # Easy to get wrong
//! - `av_ca_timestep_scale_multiplier` has a default in the reference (1) that is wrong for every published file, so a
//!   config without it is refused.
//! - `caption_channels` is present in files that have no caption projection; `caption_proj_before_connector` decides.
//! - Without `frequencies_precision: float64` the frequency grid of RoPE is computed in f32.
//! - Numbers may be written as floats (`1000.0`).
//!
//! Source: spec/transformer §2.5.

use ltxc_ir::ops::RopeLayout;
use serde_json::{Value, json};

use crate::ModelError;
use crate::fields::{Fields, MOST};

/// Largest number of layers that is believed; every block is looked up in the checkpoint.
const MAX_LAYERS: usize = 1 << 10;

/// One of the two token streams of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// Video latents.
    Video,
    /// Audio latents.
    Audio,
}

impl Stream {
    /// Both, in the order in which programs take their parameters.
    pub const BOTH: [Stream; 2] = [Stream::Video, Stream::Audio];

    /// `video` or `audio`.
    pub fn name(self) -> &'static str {
        match self {
            Stream::Video => "video",
            Stream::Audio => "audio",
        }
    }

    /// The other stream.
    pub fn other(self) -> Stream {
        match self {
            Stream::Video => Stream::Audio,
            Stream::Audio => Stream::Video,
        }
    }

    /// Checkpoint name of the module that the video stream calls `module`.
    pub(super) fn key(self, module: &str) -> String {
        match self {
            Stream::Video => module.into(),
            Stream::Audio => format!("audio_{module}"),
        }
    }
}

/// Sizes of one stream.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamConfig {
    /// Channels of a latent token.
    pub in_channels: usize,
    /// Channels of the velocity.
    pub out_channels: usize,
    /// Elements per attention head.
    pub head_dim: usize,
    /// Channels of the residual stream: heads × head dim.
    pub width: usize,
    /// Channels of the text context as the blocks see it.
    pub context_width: usize,
    /// Upper end of the positions per axis: seconds, then pixels.
    pub max_positions: Vec<f64>,
    /// Whether the feed-forward layers have biases.
    pub has_ff_bias: bool,
}

/// Configuration of the transformer of any generation.
#[derive(Clone, Debug, PartialEq)]
pub struct TransformerConfig {
    /// Number of blocks.
    pub layers: usize,
    /// Attention heads of every attention module.
    pub heads: usize,
    /// Sizes of the video stream.
    pub video: StreamConfig,
    /// Sizes of the audio stream.
    pub audio: StreamConfig,
    /// Channels of the text features if the transformer projects them itself (LTX-2).
    pub caption_channels: Option<usize>,
    /// Added to the mean square or variance of every norm.
    pub norm_eps: f64,
    /// Base of the RoPE frequencies.
    pub rope_theta: f64,
    /// Pairing of the rotated elements.
    pub rope_layout: RopeLayout,
    /// Whether the RoPE frequencies are evaluated in f64 before they are rounded to f32.
    pub has_f64_frequencies: bool,
    /// Factor from timesteps in `[0, 1]` to the argument of the sinusoid.
    pub timestep_scale: f64,
    /// The same for the gates between the streams.
    pub gate_timestep_scale: f64,
    /// Whether attention outputs are gated per head.
    pub is_gated: bool,
    /// Whether text cross attention is modulated by the timestep (9 instead of 6 rows).
    pub has_text_adaln: bool,
    /// Whether the modulation of the text context depends on sigma.
    pub has_prompt_adaln: bool,
    /// Whether marked video tokens get a learned embedding.
    pub has_keyframes_embedding: bool,
}

impl TransformerConfig {
    /// Reads the object `config.transformer`.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that is missing, malformed or not supported.
    pub fn from_json(transformer: &Value) -> Result<TransformerConfig, ModelError> {
        // Nulls are not left out here: the reference takes most of them for false.
        let fields = Fields::new("transformer", transformer).refusing_null();
        check_fixed_values(&fields);
        let config = read(&fields);
        config.check_relations(&fields);
        fields.finish(config)
    }

    /// Sizes of a stream.
    pub fn stream(&self, stream: Stream) -> &StreamConfig {
        match stream {
            Stream::Video => &self.video,
            Stream::Audio => &self.audio,
        }
    }

    /// Channels of the text context that a program takes.
    pub fn context_channels(&self, stream: Stream) -> usize {
        self.caption_channels.unwrap_or(self.stream(stream).context_width)
    }

    /// Rows of the main modulation tables.
    pub fn modulation_rows(&self) -> usize {
        if self.has_text_adaln { 9 } else { 6 }
    }

    /// Upper end of the time axis, in seconds, for attention between the streams.
    pub fn cross_max_seconds(&self) -> f64 {
        [&self.video, &self.audio].iter().filter_map(|s| s.max_positions.first()).fold(0.0, |a, &b| a.max(b))
    }
}

/// Refuses values that nothing is implemented for, here or in the reference.
fn check_fixed_values(fields: &Fields<'_>) {
    let fixed = [
        ("dropout", json!(0)),
        ("attention_bias", json!(true)),
        ("num_vector_embeds", json!(null)),
        ("activation_fn", json!("gelu-approximate")),
        ("num_embeds_ada_norm", json!(1000)),
        ("use_linear_projection", json!(false)),
        ("only_cross_attention", json!(false)),
        ("cross_attention_norm", json!(true)),
        ("double_self_attention", json!(false)),
        ("upcast_attention", json!(false)),
        ("standardization_norm", json!("rms_norm")),
        ("norm_elementwise_affine", json!(false)),
        ("qk_norm", json!("rms_norm")),
        ("positional_embedding_type", json!("rope")),
        ("use_audio_video_cross_attention", json!(true)),
        ("share_ff", json!(false)),
        ("av_cross_ada_norm", json!(true)),
    ];
    for (key, value) in fixed {
        fields.exactly(key, &value);
    }
    fields.only("use_middle_indices_grid", true);
}

fn read(fields: &Fields<'_>) -> TransformerConfig {
    let heads = fields.size("num_attention_heads", 32);
    let audio_heads = fields.size("audio_num_attention_heads", 32);
    if heads != audio_heads {
        fields
            .problem_at("num_attention_heads", format!("is {heads}, but `audio_num_attention_heads` is {audio_heads}"));
    }
    let head_dim = fields.size("attention_head_dim", 128);
    let video = StreamConfig {
        in_channels: fields.size("in_channels", 128),
        out_channels: fields.size("out_channels", 128),
        head_dim,
        width: width(fields, "num_attention_heads", heads, "attention_head_dim", head_dim),
        context_width: fields.size("cross_attention_dim", 4096),
        max_positions: fields.positives("positional_embedding_max_pos", &[20.0, 2048.0, 2048.0]),
        has_ff_bias: fields.bool("ff_bias", true),
    };
    let audio_head_dim = fields.size("audio_attention_head_dim", 64);
    let audio = StreamConfig {
        in_channels: fields.size("audio_in_channels", 128),
        out_channels: fields.size("audio_out_channels", 128),
        head_dim: audio_head_dim,
        width: width(fields, "audio_num_attention_heads", audio_heads, "audio_attention_head_dim", audio_head_dim),
        context_width: fields.size("audio_cross_attention_dim", 2048),
        max_positions: fields.positives("audio_positional_embedding_max_pos", &[20.0]),
        has_ff_bias: fields.bool("audio_ff_bias", true),
    };
    let projects_captions = !fields.bool("caption_proj_before_connector", false);
    let has_text_adaln = fields.bool("cross_attention_adaln", false);
    fields.require("av_ca_timestep_scale_multiplier");
    TransformerConfig {
        layers: fields.size_within("num_layers", 48, MAX_LAYERS),
        heads,
        video,
        audio,
        caption_channels: projects_captions.then(|| fields.required_size("caption_channels", MOST)),
        norm_eps: fields.positive("norm_eps", 1e-6),
        rope_theta: fields.positive("positional_embedding_theta", 10000.0),
        rope_layout: fields.choice("rope_type", RopeLayout::Split, &ROPE_LAYOUTS),
        has_f64_frequencies: fields.text("frequencies_precision") == Some("float64"),
        timestep_scale: fields.positive("timestep_scale_multiplier", 1000.0),
        gate_timestep_scale: fields.positive("av_ca_timestep_scale_multiplier", 1.0),
        is_gated: fields.bool("apply_gated_attention", false),
        has_text_adaln,
        has_prompt_adaln: fields.bool("use_prompt_adaln_single", true) && has_text_adaln,
        has_keyframes_embedding: fields.bool("use_keyframes_abs_pos_embedding", false),
    }
}

/// Values of `rope_type`.
pub(crate) const ROPE_LAYOUTS: [(&str, RopeLayout); 2] =
    [("split", RopeLayout::Split), ("interleaved", RopeLayout::Interleaved)];

/// Heads × head dim.
fn width(fields: &Fields<'_>, heads_key: &str, heads: usize, dim_key: &str, head_dim: usize) -> usize {
    match heads.checked_mul(head_dim) {
        Some(width) if width <= MOST => width,
        _ => {
            fields.problem_at(heads_key, format!("times `{dim_key}` is more than {MOST}"));
            MOST
        }
    }
}

impl TransformerConfig {
    /// What the reference takes for granted between keys.
    fn check_relations(&self, fields: &Fields<'_>) {
        let wrong_width = |key: &str, stream: &str, sizes: &StreamConfig| {
            let (found, expected) = (sizes.context_width, sizes.width);
            fields.problem_at(key, format!("is {found}, expected the width {expected} of the {stream} stream"));
        };
        if self.audio.context_width != self.audio.width {
            // The rotary table of the attention between the streams has this width, its heads that of the audio stream.
            wrong_width("audio_cross_attention_dim", "audio", &self.audio);
        }
        if (self.caption_channels.is_some() || self.has_text_adaln) && self.video.context_width != self.video.width {
            // Projected captions and the text modulation have the width of their stream.
            wrong_width("cross_attention_dim", "video", &self.video);
        }
        for (stream, sizes) in [("video", &self.video), ("audio", &self.audio)] {
            let axes = sizes.max_positions.len();
            if sizes.head_dim % 2 != 0 || sizes.width < 2 * axes {
                fields.problem(format!(
                    "{stream} heads of {} elements, {} in all, cannot be rotated over {axes} axes",
                    sizes.head_dim, sizes.width
                ));
            }
        }
        if self.rope_theta <= 1.0 {
            let theta = self.rope_theta;
            fields.problem_at("positional_embedding_theta", format!("is `{theta}`, expected more than 1"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A published config, with `changes`; a change to the string `absent` removes the key.
    fn read(changes: Value) -> Result<TransformerConfig, ModelError> {
        let mut config = json!({
            "dropout": 0.0, "attention_bias": true, "num_vector_embeds": null, "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000, "use_linear_projection": false, "only_cross_attention": false,
            "cross_attention_norm": true, "double_self_attention": false, "upcast_attention": false,
            "standardization_norm": "rms_norm", "norm_elementwise_affine": false, "qk_norm": "rms_norm",
            "positional_embedding_type": "rope", "use_audio_video_cross_attention": true, "share_ff": false,
            "av_cross_ada_norm": true, "av_ca_timestep_scale_multiplier": 1000.0, "caption_channels": 3840,
        });
        let object = config.as_object_mut().expect("an object");
        for (key, value) in changes.as_object().expect("an object") {
            if value == "absent" {
                object.remove(key);
            } else {
                object.insert(key.clone(), value.clone());
            }
        }
        TransformerConfig::from_json(&config)
    }

    #[track_caller]
    fn check_refused(changes: Value, expected: &[&str]) {
        let text = read(changes).expect_err("the config is wrong").to_string();
        for part in expected {
            assert!(text.contains(part), "`{part}` is not in:\n{text}");
        }
    }

    #[test]
    fn absent_keys_have_the_defaults_of_the_reference() {
        let c = read(json!({})).expect("a published config");
        assert_eq!((c.layers, c.heads, c.video.width, c.audio.width), (48, 32, 4096, 2048));
        assert_eq!((c.caption_channels, c.modulation_rows(), c.cross_max_seconds()), (Some(3840), 6, 20.0));
        assert_eq!((c.rope_layout, c.has_f64_frequencies), (RopeLayout::Split, false));
        assert!(!c.has_prompt_adaln && !c.is_gated && c.video.has_ff_bias && c.audio.has_ff_bias);
    }

    #[test]
    fn prompt_modulation_needs_text_modulation() {
        let switches = |prompt: bool| json!({"cross_attention_adaln": true, "use_prompt_adaln_single": prompt});
        assert!(read(switches(true)).expect("a published config").has_prompt_adaln);
        assert!(!read(switches(false)).expect("a config").has_prompt_adaln);
    }

    #[test]
    fn unused_caption_channels_are_ignored() {
        let c = read(json!({"caption_proj_before_connector": true})).expect("a published config");
        assert_eq!((c.caption_channels, c.context_channels(Stream::Audio)), (None, 2048));
    }

    #[test]
    fn values_that_are_not_implemented_are_refused_together() {
        check_refused(
            json!({"dropout": 0.1, "qk_norm": "absent", "use_middle_indices_grid": false, "num_vector_embeds": 7}),
            &[
                "4 problem(s)",
                "`dropout` is `0.1`, only `0`",
                "`qk_norm` is `null`",
                "use_middle_indices_grid",
                "num_vector_embeds",
            ],
        );
    }

    #[test]
    fn keys_without_a_safe_default_are_required() {
        check_refused(
            json!({"av_ca_timestep_scale_multiplier": "absent", "caption_channels": "absent"}),
            &["2 problem(s)", "`av_ca_timestep_scale_multiplier` is missing", "`caption_channels` is missing"],
        );
    }

    #[test]
    fn sizes_are_checked() {
        check_refused(json!({"num_layers": 1e30}), &["expected a whole number in 1..=1024"]);
        check_refused(
            json!({"in_channels": 2.5, "out_channels": -1}),
            &["`in_channels` is `2.5`", "`out_channels` is `-1`"],
        );
        check_refused(json!({"num_attention_heads": 16}), &["but `audio_num_attention_heads` is 32"]);
        check_refused(json!({"num_attention_heads": 1048576, "attention_head_dim": 1048576}), &["more than 1048576"]);
        check_refused(json!({"audio_cross_attention_dim": 1024}), &["expected the width 2048 of the audio stream"]);
        check_refused(json!({"cross_attention_dim": 1024}), &["expected the width 4096 of the video stream"]);
        check_refused(json!({"attention_head_dim": 127}), &["cannot be rotated"]);
        check_refused(json!({"positional_embedding_max_pos": [20]}), &["expected a list of 3 positive number(s)"]);
        check_refused(
            json!({"rope_type": "spiral", "norm_eps": 0}),
            &["`\"spiral\"`, expected `split` or `interleaved`", "expected a positive number"],
        );
    }

    #[test]
    fn a_checkpoint_without_config_is_refused() {
        assert!(TransformerConfig::from_json(&Value::Null).is_err());
    }
}
