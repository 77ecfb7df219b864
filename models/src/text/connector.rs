//! The connectors: transformers over the 1024 context tokens, in which registers fill the places without a real token.
//!
//! # Easy to get wrong
//! - Real tokens stand in front, place `p ≥ n` holds register `p mod registers`: the index is the absolute place.
//! - Everything attends to everything, registers included. There is no mask.
//! - Queries and keys are normalised over all heads together, before they are split.
//! - RoPE gives every head its own band of frequencies; positions are the integers `0..1024` against a limit of 4096.
//! - The frequency grid is f64 or f32 by configuration; everything behind it is f32.
//! - The audio connector falls back to the video connector's settings key by key (LTX-2 states only its depth).
//!
//! Source: ltx_core/text_encoders/gemma/embeddings_connector (Lightricks/LTX-2, 1.2.0); spec/text-encoder §5,
//! spec/transformer §5, §6.

use std::f64::consts::FRAC_PI_2;

use ltxc_ir::ops::{Attention, RopeLayout, Unary};
use ltxc_ir::{Builder, DType, Float, TensorType, ValueId};

use crate::fields::Fields;
use crate::transformer::ROPE_LAYOUTS;
use crate::{Block, Functions, ModelError, Weights};

/// Epsilon of all norms: the reference passes none of the configured ones to the connectors.
const EPS: f64 = 1e-6;
/// Base of the RoPE frequencies: the reference's default, which no configuration overrides.
const THETA: f64 = 10_000.0;
/// Largest number of layers, heads or channels per head.
const MOST_COUNT: usize = 4096;

/// A stream of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Modality {
    /// Pictures.
    Video,
    /// Sound.
    Audio,
}

impl Modality {
    /// Both, video first.
    pub const ALL: [Modality; 2] = [Modality::Video, Modality::Audio];

    /// Name in functions and values.
    pub fn name(self) -> &'static str {
        match self {
            Modality::Video => "video",
            Modality::Audio => "audio",
        }
    }
}

/// One connector.
#[derive(Clone, Debug, PartialEq)]
pub struct ConnectorConfig {
    /// Number of attention heads.
    pub heads: usize,
    /// Channels per head, even.
    pub head_dim: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Position that RoPE maps to 1 (and 0 to −1).
    pub max_position: f64,
    /// Pairing of rotated channels.
    pub rope: RopeLayout,
    /// Whether the frequency grid is computed in f64.
    pub has_f64_grid: bool,
    /// Whether every head's output is gated.
    pub is_gated: bool,
    /// Whether the feed-forward layers have biases.
    pub has_ff_bias: bool,
}

impl ConnectorConfig {
    /// Channels of a token.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// The connectors of both modalities.
#[derive(Clone, Debug, PartialEq)]
pub struct Connectors {
    /// Video.
    pub video: ConnectorConfig,
    /// Audio.
    pub audio: ConnectorConfig,
    /// Those whose context is made, in order; at least one.
    pub made: Vec<Modality>,
}

impl Connectors {
    /// The same where only some contexts are made, which need no weights of the others.
    pub fn only(self, made: Vec<Modality>) -> Connectors {
        Connectors { made, ..self }
    }

    /// The connector of `modality`.
    pub fn get(&self, modality: Modality) -> &ConnectorConfig {
        match modality {
            Modality::Video => &self.video,
            Modality::Audio => &self.audio,
        }
    }

    /// The modalities whose context is made, with the widths of their connectors.
    pub fn made_widths(&self) -> Vec<(Modality, usize)> {
        self.made.iter().map(|&m| (m, self.get(m).width())).collect()
    }

    /// Widths of the video and audio connector.
    pub fn widths(&self) -> [usize; 2] {
        [self.video.width(), self.audio.width()]
    }

    /// Reads the `transformer` object of a checkpoint's `config`.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that is malformed or not supported.
    pub fn from_json(transformer: &serde_json::Value) -> Result<Connectors, ModelError> {
        let fields = Fields::new("transformer", transformer);
        fields.finish(Connectors::read(&fields))
    }

    pub(super) fn read(transformer: &Fields<'_>) -> Connectors {
        let count = |key: &str, default: usize| transformer.size_within(key, default, MOST_COUNT);
        let head_dim = |key: &str, default: usize| {
            let found = transformer.find_size(key, MOST_COUNT);
            if let Some(channels) = found.filter(|n| n % 2 != 0) {
                transformer.problem_at(key, format!("is `{channels}`, which cannot be split into pairs"));
            }
            found.unwrap_or(default)
        };
        let video = ConnectorConfig {
            heads: count("connector_num_attention_heads", 30),
            head_dim: head_dim("connector_attention_head_dim", 128),
            layers: count("connector_num_layers", 2),
            max_position: transformer.positives("connector_positional_embedding_max_pos", &[1.0])[0],
            rope: transformer.choice("rope_type", RopeLayout::Split, &ROPE_LAYOUTS),
            has_f64_grid: transformer.text("frequencies_precision") == Some("float64"),
            is_gated: transformer.bool("connector_apply_gated_attention", false),
            has_ff_bias: transformer.bool("connector_ff_bias", true),
        };
        let audio = ConnectorConfig {
            heads: count("audio_connector_num_attention_heads", video.heads),
            head_dim: head_dim("audio_connector_attention_head_dim", video.head_dim),
            layers: count("audio_connector_num_layers", video.layers),
            ..video.clone()
        };
        Connectors { video, audio, made: Modality::ALL.into() }
    }

    /// Number of learnable registers: the rows stored in the files of `weights`, equal for all connectors.
    ///
    /// # Errors
    /// Registers that are missing, that differ in number, or whose number does not divide `tokens`.
    pub fn registers(&self, weights: &Weights, tokens: usize) -> Result<usize, ModelError> {
        let rows = |&modality: &Modality| match below(weights, modality).shape("learnable_registers").as_deref() {
            Some(&[rows, _]) => Some(rows),
            _ => None,
        };
        let found: Vec<Option<usize>> = self.made.iter().map(rows).collect();
        match found.first() {
            Some(&Some(rows)) if found.iter().all(|n| *n == Some(rows)) && rows > 0 && tokens.is_multiple_of(rows) => {
                Ok(rows)
            }
            _ => {
                let names: Vec<&str> = self.made.iter().map(|m| m.name()).collect();
                let problem = format!(
                    "does not fit the tensors `learnable_registers`: they have {found:?} rows ({}), expected the same \
                     number everywhere, which divides {tokens} tokens",
                    names.join(", ")
                );
                Err(ModelError::config("transformer.connector_num_learnable_registers", problem))
            }
        }
    }
}

/// The weights of one connector among all of a transformer file.
fn below<'a>(weights: &Weights<'a>, modality: Modality) -> Weights<'a> {
    weights.below(&format!("model.diffusion_model.{}_embeddings_connector.", modality.name()))
}

/// The registers of one connector: `[1, registers, width]` of `dtype`.
///
/// `weights`: the complete set of transformer files.
pub fn registers(
    b: &Builder,
    config: &ConnectorConfig,
    modality: Modality,
    weights: &Weights,
    rows: usize,
    dtype: DType,
) -> ValueId {
    let w = below(weights, modality).get(b, "learnable_registers", &[rows, config.width()]);
    b.reshape(b.cast(w, dtype), &[1, rows, config.width()])
}

/// One connector: tokens and registers to the context that the transformer attends to.
///
/// - `weights`: the complete set of transformer files.
/// - `x`: `[1, t, width]`, registers in place. Result: the same type.
///
/// Problems with weights are recorded in `weights`.
pub fn connector(
    b: &Builder,
    functions: &Functions,
    config: &ConnectorConfig,
    modality: Modality,
    weights: &Weights,
    x: ValueId,
) -> ValueId {
    let weights = below(weights, modality);
    let ty = b.ty(x);
    let [cos, sin] = rope_tables(b, config, ty.shape[1], ty.dtype);
    let mut x = x;
    for i in 0..config.layers {
        let (function, key) = (format!("{}_connector_block", modality.name()), format!("transformer_1d_blocks.{i}"));
        let args = [("x", x), ("cos", cos), ("sin", sin)];
        x = functions.call_one(b, &weights, Block::at(&function, &key), &args, |b, weights, params| {
            block(b, config, weights, params[0], [params[1], params[2]])
        });
    }
    b.rms_norm(x, None, EPS)
}

/// One block: attention and feed-forward, each behind a norm and with a residual; `tables`: cosines and sines.
fn block(b: &Builder, config: &ConnectorConfig, weights: &Weights, x: ValueId, tables: [ValueId; 2]) -> ValueId {
    let normed = b.rms_norm(x, None, EPS);
    let a = b.scope("attn1", || attention(b, config, &weights.below("attn1."), normed, tables));
    let x = b.add(x, b.name("attn1", a));
    let normed = b.rms_norm(x, None, EPS);
    let f = b.scope("ff", || feed_forward(b, config, &weights.below("ff."), normed));
    b.add(x, b.name("ff", f))
}

/// Self attention over all tokens, every head's output optionally multiplied by `2 σ(logit)`.
fn attention(
    b: &Builder,
    config: &ConnectorConfig,
    weights: &Weights,
    x: ValueId,
    [cos, sin]: [ValueId; 2],
) -> ValueId {
    let ConnectorConfig { heads, head_dim, .. } = *config;
    let width = config.width();
    let shape = b.shape(x);
    let split = |x| b.reshape(x, &[shape[0], shape[1], heads, head_dim]);
    let normed = |name: &str, x| {
        let w = weights.get(b, &format!("{name}.weight"), &[width]);
        b.rope(split(b.rms_norm(x, Some(w), EPS)), cos, sin, config.rope)
    };
    let q = normed("q_norm", linear(b, weights, "to_q", x, [width, width], true));
    let k = normed("k_norm", linear(b, weights, "to_k", x, [width, width], true));
    let v = split(linear(b, weights, "to_v", x, [width, width], true));
    let scale = Float((head_dim as f64).powf(-0.5));
    let mut o = b.attention(Attention { scale, causal: false }, q, k, v, None);
    if config.is_gated {
        let logits = linear(b, weights, "to_gate_logits", x, [heads, width], true);
        let gates = b.mul_scalar(b.sigmoid(logits), 2.0);
        o = b.mul(o, b.reshape(gates, &[shape[0], shape[1], heads, 1]));
    }
    linear(b, weights, "to_out.0", b.reshape(o, &shape), [width, width], true)
}

/// `W2 gelu(W1 x)`, four times as wide inside.
fn feed_forward(b: &Builder, config: &ConnectorConfig, weights: &Weights, x: ValueId) -> ValueId {
    let (width, inner) = (config.width(), 4 * config.width());
    let x = b.gelu(linear(b, weights, "net.0.proj", x, [inner, width], config.has_ff_bias));
    linear(b, weights, "net.2", x, [width, inner], config.has_ff_bias)
}

/// The linear layer `name`, whose weight has `shape`: `[out, in]`.
pub(super) fn linear(
    b: &Builder,
    weights: &Weights,
    name: &str,
    x: ValueId,
    shape: [usize; 2],
    has_bias: bool,
) -> ValueId {
    let y = b.matmul_transposed(x, weights.get(b, &format!("{name}.weight"), &shape));
    let bias = has_bias.then(|| weights.get(b, &format!("{name}.bias"), &shape[..1]));
    b.name(name, bias.map_or(y, |bias| b.add(y, bias)))
}

/// Cosines and sines of the positions `0..tokens`, each `[1, t, heads, d/2]` of `dtype`; angles in f32.
fn rope_tables(b: &Builder, config: &ConnectorConfig, tokens: usize, dtype: DType) -> [ValueId; 2] {
    let grid = frequencies(config);
    let fraction = b.div(b.iota(TensorType::f32([tokens, 1]), 0), b.scalar(config.max_position));
    let position = b.add_scalar(b.mul_scalar(fraction, 2.0), -1.0);
    let angles = b.mul(position, b.constant(&[1, grid.len()], &grid));
    let angles = b.reshape(angles, &[1, tokens, config.heads, config.head_dim / 2]);
    [Unary::Cos, Unary::Sin].map(|f| b.cast(b.unary(f, angles), dtype))
}

/// `theta^(k / (K − 1)) · π/2` for `k = 0..K`, `K = width / 2`.
fn frequencies(config: &ConnectorConfig) -> Vec<f32> {
    let count = config.width() / 2;
    let last = count.saturating_sub(1).max(1);
    (0..count)
        .map(|k| {
            if config.has_f64_grid {
                (THETA.powf(k as f64 / last as f64) * FRAC_PI_2) as f32
            } else {
                // The power is rounded from f64: equal on every platform, unlike a power in f32.
                THETA.powf((k as f32 / last as f32) as f64) as f32 * FRAC_PI_2 as f32
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check values of spec/text-encoder §5.3: width 4096, 32 heads, position 7.
    #[test]
    fn rope_matches_the_published_check_values() {
        let transformer = serde_json::json!({
            "connector_num_attention_heads": 32,
            "connector_positional_embedding_max_pos": [4096],
            "frequencies_precision": "float64",
        });
        let config = Connectors::from_json(&transformer).expect("a valid configuration").video;
        let position = 2.0 * (7f32 / 4096.0) - 1.0;
        let grid = frequencies(&config);
        let expected = [
            (0, 0, 0.0053689, -0.9999856),
            (0, 1, -0.0016904, -0.9999986),
            (16, 5, -0.9704273, 0.2413935),
            (31, 63, -0.9602903, -0.2790027),
        ];
        for (head, pair, cos, sin) in expected {
            let angle = (grid[head * 64 + pair] * position) as f64;
            assert!((angle.cos() - cos).abs() < 2e-7 && (angle.sin() - sin).abs() < 2e-7, "head {head}, pair {pair}");
        }
    }

    #[test]
    fn audio_connector_falls_back_to_video_key_by_key() {
        let transformer = serde_json::json!({
            "connector_num_attention_heads": 6,
            "connector_num_layers": 5,
            "audio_connector_attention_head_dim": 64,
        });
        let connectors = Connectors::from_json(&transformer).expect("a valid configuration");
        assert_eq!((connectors.audio.heads, connectors.audio.head_dim, connectors.audio.layers), (6, 64, 5));
        assert_eq!(connectors.widths(), [6 * 128, 6 * 64]);
    }

    #[track_caller]
    fn check_error(key: &str, value: serde_json::Value) {
        let message = Connectors::from_json(&serde_json::json!({ key: value })).expect_err("must not be accepted");
        let message = message.to_string();
        assert!(message.contains("`transformer`") && message.contains(&format!("`{key}` is")), "{message}");
    }

    #[test]
    fn bad_values_are_errors_that_name_the_key() {
        check_error("connector_num_attention_heads", 0.into());
        check_error("connector_num_layers", u64::MAX.into());
        check_error("connector_attention_head_dim", 7.into());
        check_error("audio_connector_attention_head_dim", 5.into());
        check_error("connector_positional_embedding_max_pos", serde_json::json!([20, 2048]));
        check_error("connector_positional_embedding_max_pos", 4096.into());
        check_error("connector_apply_gated_attention", "yes".into());
        check_error("rope_type", "spiral".into());
        assert!(Connectors::from_json(&serde_json::Value::Null).is_err());
    }

    #[test]
    fn a_single_frequency_is_finite() {
        let config = Connectors::from_json(&serde_json::json!({
            "connector_num_attention_heads": 1, "connector_attention_head_dim": 2,
        }));
        assert_eq!(frequencies(&config.expect("a valid configuration").video), [FRAC_PI_2 as f32]);
    }
}
