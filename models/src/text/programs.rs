//! The two programs of the text side, each a module of its own.

use ltxc_ir::{Builder, DType, Module, Rate, TensorType};
use serde_json::Value;

use super::CONTEXT_TOKENS;
use super::config::GemmaConfig;
use super::connector::{Connectors, Modality, connector, registers};
use super::features::{FeatureExtractor, features};
use super::gemma::gemma;
use crate::fields::Fields;
use crate::weights::check_compute_dtype;
use crate::{Functions, ModelError, Weights};

/// Everything that configures the text side of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    /// The language model.
    pub gemma: GemmaConfig,
    /// How its hidden states become features.
    pub extractor: FeatureExtractor,
    /// What turns features into contexts.
    pub connectors: Connectors,
}

impl TextConfig {
    /// Reads Gemma's configuration (see [`GemmaConfig::from_json`]) and the `transformer` object of the checkpoint's
    /// `config`.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that is missing, malformed or not supported in one of the two.
    pub fn from_json(gemma: &Value, transformer: &Value) -> Result<TextConfig, ModelError> {
        let gemma = GemmaConfig::from_json(gemma)?;
        let fields = Fields::new("transformer", transformer);
        let (extractor, connectors) = (FeatureExtractor::read(&fields), Connectors::read(&fields));
        fields.finish(TextConfig { gemma, extractor, connectors })
    }
}

impl TextConfig {
    /// The same where only some contexts are made; see [`Connectors::only`].
    pub fn only(self, made: Vec<Modality>) -> TextConfig {
        TextConfig { connectors: self.connectors.only(made), ..self }
    }
}

/// Where the weights of the text side are; each view is of a complete set of files.
pub struct TextWeights<'a> {
    /// Files with the language model.
    pub gemma: Weights<'a>,
    /// Files with `text_embedding_projection.*`: the model's own up to LTX-2.3, the text encoder's in LTX-2.5.
    pub projection: Weights<'a>,
    /// Files with the connectors, `model.diffusion_model.*`.
    pub transformer: Weights<'a>,
}

/// The program from token ids to the connectors' inputs, for prompts of at most `tokens` tokens.
///
/// Parameters of the entry `encode`, all constant for a generation:
/// - `ids`: `i32[tokens]`, left-padded;
/// - `valid`: `f32[tokens]`, 1 for real tokens (of which there is at least one) and 0 for pads;
/// - `place`: `i32[1024]`, the row of features (`0..tokens`) and registers (behind them) for each context token: with `n`
///   real tokens and `r` registers `tokens − n + p` where `p < n`, `tokens + p mod r` elsewhere.
///
/// Results: `video` and `audio`, f32 `[1, 1024, width]`, as far as their contexts are made; `dtype` is that of the
/// activations inside.
///
/// # Errors
/// A bucket outside `1..=1024`, a dtype that activations cannot have, and weights that are missing or do not fit.
pub fn encode(config: &TextConfig, weights: &TextWeights, tokens: usize, dtype: DType) -> Result<Module, ModelError> {
    check_compute_dtype(dtype)?;
    if !(1..=CONTEXT_TOKENS).contains(&tokens) {
        let problem = format!("is {tokens}, expected 1 to {CONTEXT_TOKENS} token slots");
        return Err(ModelError::config("text bucket", problem));
    }
    let rows = config.connectors.registers(&weights.transformer, CONTEXT_TOKENS)?;
    let b = Builder::new("encode");
    let functions = Functions::default();
    let ids = b.param("ids", TensorType::i32([tokens]), Rate::Generation);
    let valid = b.param("valid", TensorType::f32([tokens]), Rate::Generation);
    let place = b.param("place", TensorType::i32([CONTEXT_TOKENS]), Rate::Generation);

    let states = gemma(&b, &functions, &config.gemma, &weights.gemma, ids, valid, dtype);
    let made = config.connectors.made_widths();
    let features = features(&b, &functions, config.extractor, &weights.projection, &states, valid, &made);
    for ((modality, _), features) in made.into_iter().zip(features) {
        let connector = config.connectors.get(modality);
        let registers = registers(&b, connector, modality, &weights.transformer, rows, dtype);
        let placed = b.gather(b.concat(&[features, registers], 1), place, 1);
        b.result(modality.name(), b.cast(placed, DType::F32));
    }
    for part in [&weights.gemma, &weights.projection, &weights.transformer] {
        part.finish()?;
    }
    Ok(functions.into_module(b.finish()?)?)
}

/// The program from the connectors' inputs to the contexts, for `tokens` tokens ([`CONTEXT_TOKENS`] in every pipeline).
///
/// - `weights`: the complete set of transformer files.
/// - Parameters of the entry `connect`, constant for a generation: `video` and `audio` as far as their contexts are made,
///   f32 `[1, tokens, width]`, registers in place; `dtype` is that of the activations inside.
/// - Results: `video_context` and `audio_context`, of the same types.
///
/// # Errors
/// A dtype that activations cannot have, a length that is 0 or above 1024, and weights that are missing or do not fit.
pub fn connect(connectors: &Connectors, weights: &Weights, tokens: usize, dtype: DType) -> Result<Module, ModelError> {
    check_compute_dtype(dtype)?;
    if !(1..=CONTEXT_TOKENS).contains(&tokens) {
        let problem = format!("is {tokens}, expected 1 to {CONTEXT_TOKENS} tokens");
        return Err(ModelError::config("context length", problem));
    }
    let b = Builder::new("connect");
    let functions = Functions::default();
    let input = |&modality: &Modality| {
        let ty = TensorType::f32([1, tokens, connectors.get(modality).width()]);
        (modality, b.param(modality.name(), ty, Rate::Generation))
    };
    let inputs: Vec<_> = connectors.made.iter().map(input).collect();
    for (modality, x) in inputs {
        let (config, scope) = (connectors.get(modality), format!("{}_connector", modality.name()));
        let x = b.cast(x, dtype);
        let context = b.scope(&scope, || connector(&b, &functions, config, modality, weights, x));
        b.result(&format!("{}_context", modality.name()), b.cast(context, DType::F32));
    }
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}
