//! Which tensors a model has: keys and shapes as functions of its configuration.
//!
//! This is the published format written down once more, independently of the graph builders: synthetic checkpoints are
//! made from it, and tests hold it against real headers and against what builders ask for.

mod audio;
mod text;
mod upsampler;
mod video_vae;

use serde_json::Value;

pub use audio::{audio_vae, vocoder};
pub use text::{gemma3, gemma3_vision};
pub use upsampler::upsampler;
pub use video_vae::{unused_statistics, video_vae};

use crate::{ModelError, fields};

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TensorSpec {
    /// Published key.
    pub key: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements; `None` if there are more than fit.
    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))
    }
}

/// All tensors of a published single file with `config`, for a text encoder with `states` hidden states (layers + 1).
///
/// # Errors
/// If the configuration lacks a number or has one that makes no sense.
pub fn model(config: &Value, states: usize) -> Result<Vec<TensorSpec>, ModelError> {
    let parts = [
        transformer(&config["transformer"])?,
        connectors(&config["transformer"])?,
        text_projection(&config["transformer"], states)?,
        video_vae(&config["vae"])?,
        unused_statistics(&config["vae"])?,
        audio_vae(&config["audio_vae"])?,
        vocoder(&config["vocoder"])?,
    ];
    Ok(parts.concat())
}

/// The diffusion transformer, without connectors.
///
/// # Errors
/// As for [`model`].
pub fn transformer(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let read = Fields::new("transformer", config);
    let heads = read.count("num_attention_heads")?;
    let audio_heads = read.count("audio_num_attention_heads")?;
    let width = heads * read.count("attention_head_dim")?;
    let audio_inner = audio_heads * read.count("audio_attention_head_dim")?;
    let (context, audio_context) = (read.count("cross_attention_dim")?, read.count("audio_cross_attention_dim")?);
    let is_modulated = read.flag("cross_attention_adaln", false)?;
    let is_gated = read.flag("apply_gated_attention", false)?;
    let rows = if is_modulated { 9 } else { 6 };

    let mut list = List::below("model.diffusion_model.");
    let (input, output) = (read.count_or("in_channels", 128)?, read.count_or("out_channels", 128)?);
    let (audio_input, audio_output) =
        (read.count_or("audio_in_channels", 128)?, read.count_or("audio_out_channels", 128)?);
    let streams = [("", width, input, output), ("audio_", audio_inner, audio_input, audio_output)];
    for (side, width, input, output) in streams {
        list.linear(&format!("{side}patchify_proj"), width, input, true);
        list.adaln(&format!("{side}adaln_single"), width, rows);
        if is_modulated && read.flag("use_prompt_adaln_single", true)? {
            list.adaln(&format!("{side}prompt_adaln_single"), width, 2);
        }
        if !read.flag("caption_proj_before_connector", false)? {
            let caption = read.count("caption_channels")?;
            list.linear(&format!("{side}caption_projection.linear_1"), width, caption, true);
            list.linear(&format!("{side}caption_projection.linear_2"), width, width, true);
        }
        list.push(&format!("{side}scale_shift_table"), &[2, width]);
        list.linear(&format!("{side}proj_out"), output, width, true);
    }
    list.adaln("av_ca_video_scale_shift_adaln_single", width, 4);
    list.adaln("av_ca_audio_scale_shift_adaln_single", audio_inner, 4);
    list.adaln("av_ca_a2v_gate_adaln_single", width, 1);
    list.adaln("av_ca_v2a_gate_adaln_single", audio_inner, 1);
    if read.flag("use_keyframes_abs_pos_embedding", false)? {
        list.push("keyframes_abs_pos_embedding", &[1, width]);
    }

    for block in 0..read.layers("num_layers")? {
        let mut list = list.inside(&format!("transformer_blocks.{block}."));
        let gate = |heads: usize| is_gated.then_some(heads);
        list.attention("attn1", width, width, width, gate(heads));
        list.attention("attn2", width, context, width, gate(heads));
        list.attention("audio_attn1", audio_inner, audio_inner, audio_inner, gate(audio_heads));
        list.attention("audio_attn2", audio_inner, audio_context, audio_inner, gate(audio_heads));
        list.attention("audio_to_video_attn", width, audio_inner, audio_inner, gate(audio_heads));
        list.attention("video_to_audio_attn", audio_inner, width, audio_inner, gate(audio_heads));
        list.feed_forward("ff", width, read.flag("ff_bias", true)?);
        list.feed_forward("audio_ff", audio_inner, read.flag("audio_ff_bias", true)?);
        for (side, width) in [("", width), ("audio_", audio_inner)] {
            list.push(&format!("{side}scale_shift_table"), &[rows, width]);
            if is_modulated {
                list.push(&format!("{side}prompt_scale_shift_table"), &[2, width]);
            }
        }
        list.push("scale_shift_table_a2v_ca_video", &[5, width]);
        list.push("scale_shift_table_a2v_ca_audio", &[5, audio_inner]);
    }
    Ok(list.finish())
}

/// Both text connectors.
///
/// # Errors
/// As for [`model`].
pub fn connectors(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let read = Fields::new("transformer", config);
    let is_gated = read.flag("connector_apply_gated_attention", false)?;
    let has_bias = read.flag("connector_ff_bias", true)?;
    let mut all = Vec::new();
    for side in ["video", "audio"] {
        let (heads, head_dim, layers) = connector_sizes(&read, side)?;
        let width = heads * head_dim;
        let mut list = List::below(&format!("model.diffusion_model.{side}_embeddings_connector."));
        // The number of registers is fixed; the reference ignores its key.
        list.push("learnable_registers", &[128, width]);
        for layer in 0..layers {
            let mut list = list.inside(&format!("transformer_1d_blocks.{layer}."));
            list.attention("attn1", width, width, width, is_gated.then_some(heads));
            list.feed_forward("ff", width, has_bias);
        }
        all.extend(list.finish());
    }
    Ok(all)
}

/// Heads, head width and layers of a connector; the audio one falls back to the video one's.
fn connector_sizes(read: &Fields<'_>, side: &str) -> Result<(usize, usize, usize), ModelError> {
    let size = |key: &str, default: usize| {
        let own = format!("{}{key}", if side == "audio" { "audio_" } else { "" });
        match read.has(&own) {
            true => read.count(&own),
            false => read.count_or(key, default),
        }
    };
    let layers = size("connector_num_layers", 2)?;
    if layers > MOST_LAYERS {
        return Err(read.problem("connector_num_layers", "too many layers"));
    }
    Ok((size("connector_num_attention_heads", 30)?, size("connector_attention_head_dim", 128)?, layers))
}

/// The projection of text features: one for both streams, or one each.
///
/// # Errors
/// As for [`model`].
pub fn text_projection(config: &Value, states: usize) -> Result<Vec<TensorSpec>, ModelError> {
    let read = Fields::new("transformer", config);
    let hidden = read.count("caption_channels")?;
    let mut list = List::below("text_embedding_projection.");
    if read.flag("caption_proj_before_connector", false)? {
        for side in ["video", "audio"] {
            let (heads, head_dim, _) = connector_sizes(&read, side)?;
            list.linear(&format!("{side}_aggregate_embed"), heads * head_dim, hidden * states, true);
        }
    } else {
        list.linear("aggregate_embed", hidden, hidden * states, false);
    }
    Ok(list.finish())
}

/// Largest number of repeated parts that is believed.
const MOST_LAYERS: usize = 1024;

/// Largest extent that is believed: products of three of them still fit.
const MOST_WIDTH: usize = fields::MOST;

/// Typed access to a configuration object, of which the first problem ends the reading.
pub(super) struct Fields<'a>(fields::Fields<'a>);

impl<'a> Fields<'a> {
    pub(super) fn new(path: &str, value: &'a Value) -> Fields<'a> {
        Fields(fields::Fields::new(path, value))
    }

    /// The settings `value` of an entry of the list `key`; an empty object if it is none.
    pub(super) fn inside(&self, key: &str, value: &'a Value) -> Fields<'a> {
        Fields(self.0.inside(key, value))
    }

    pub(super) fn problem(&self, key: &str, problem: &str) -> ModelError {
        self.0.problem_at(key, problem);
        // There is a problem now, so that this cannot succeed.
        self.0.finish(()).err().unwrap_or_else(|| ModelError::config(key, problem))
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.0.has(key)
    }

    /// A positive integer; configurations may write it as a float.
    pub(super) fn count(&self, key: &str) -> Result<usize, ModelError> {
        self.0.finish(self.0.required_size(key, MOST_WIDTH))
    }

    pub(super) fn count_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        self.0.finish(self.0.size(key, default))
    }

    pub(super) fn layers(&self, key: &str) -> Result<usize, ModelError> {
        self.0.finish(self.0.required_size(key, MOST_LAYERS))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        self.0.finish(self.0.bool(key, default))
    }

    pub(super) fn text(&self, key: &str, default: &'a str) -> &'a str {
        self.0.text(key).unwrap_or(default)
    }

    pub(super) fn list(&self, key: &str) -> Result<&'a [Value], ModelError> {
        self.0.require(key);
        let list = self.0.finish(self.0.list(key))?;
        if list.len() > MOST_LAYERS { Err(self.problem(key, "has too many entries")) } else { Ok(list) }
    }

    pub(super) fn counts(&self, key: &str) -> Result<Vec<usize>, ModelError> {
        self.0.require(key);
        self.0.finish(self.0.sizes(key, &[]))
    }
}

/// A positive integer of believable size.
pub(super) fn count(value: &Value) -> Option<usize> {
    fields::as_size(value, MOST_WIDTH)
}

/// A list of tensors in the making.
pub(super) struct List {
    prefix: String,
    tensors: std::rc::Rc<std::cell::RefCell<Vec<TensorSpec>>>,
}

impl List {
    /// An empty list of keys that start with `prefix`.
    pub(super) fn below(prefix: &str) -> List {
        List { prefix: prefix.into(), tensors: Default::default() }
    }

    /// The same list, for keys that continue with `more`.
    pub(super) fn inside(&self, more: &str) -> List {
        List { prefix: format!("{}{more}", self.prefix), tensors: self.tensors.clone() }
    }

    pub(super) fn finish(self) -> Vec<TensorSpec> {
        self.tensors.take()
    }

    pub(super) fn push(&mut self, key: &str, shape: &[usize]) {
        let key = format!("{}{key}", self.prefix);
        self.tensors.borrow_mut().push(TensorSpec { key, shape: shape.into() });
    }

    /// A weight `[output, input, kernel..]` and maybe a bias.
    pub(super) fn conv(&mut self, key: &str, output: usize, input: usize, kernel: &[usize], has_bias: bool) {
        self.push(&format!("{key}.weight"), &[&[output, input], kernel].concat());
        if has_bias {
            self.push(&format!("{key}.bias"), &[output]);
        }
    }

    pub(super) fn linear(&mut self, key: &str, output: usize, input: usize, has_bias: bool) {
        self.conv(key, output, input, &[], has_bias);
    }

    /// Weight and bias of a normalisation.
    pub(super) fn norm(&mut self, key: &str, width: usize) {
        self.push(&format!("{key}.weight"), &[width]);
        self.push(&format!("{key}.bias"), &[width]);
    }

    /// A timestep embedder with `rows` modulation rows.
    fn adaln(&mut self, key: &str, width: usize, rows: usize) {
        self.linear(&format!("{key}.emb.timestep_embedder.linear_1"), width, 256, true);
        self.linear(&format!("{key}.emb.timestep_embedder.linear_2"), width, width, true);
        self.linear(&format!("{key}.linear"), rows * width, width, true);
    }

    /// An attention of width `inner`; `gates` is the number of gated heads.
    fn attention(&mut self, key: &str, query: usize, context: usize, inner: usize, gates: Option<usize>) {
        self.linear(&format!("{key}.to_q"), inner, query, true);
        self.linear(&format!("{key}.to_k"), inner, context, true);
        self.linear(&format!("{key}.to_v"), inner, context, true);
        self.linear(&format!("{key}.to_out.0"), query, inner, true);
        self.push(&format!("{key}.q_norm.weight"), &[inner]);
        self.push(&format!("{key}.k_norm.weight"), &[inner]);
        if let Some(heads) = gates {
            self.linear(&format!("{key}.to_gate_logits"), heads, query, true);
        }
    }

    fn feed_forward(&mut self, key: &str, width: usize, has_bias: bool) {
        self.linear(&format!("{key}.net.0.proj"), 4 * width, width, has_bias);
        self.linear(&format!("{key}.net.2"), width, 4 * width, has_bias);
    }
}
