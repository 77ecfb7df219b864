//! The text side: hidden states, features, connectors and contexts of every recorded prompt.

use anyhow::{Context, Result};
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_models::Weights;
use ltxc_models::text::{self, Modality, TextConfig, TextWeights};
use ltxc_runtime::tokenizer::{CONTEXT_TOKENS, Prompt, Tokenizer};

use super::{Check, GEMMA, Row, Setup, tensor_of};
use crate::debug::modules::{Bench, Kept, Ran};
use crate::debug::recording::TensorFile;

/// Folder of the recordings of the text encoder.
const ENCODER: &str = "gemma3";

/// The text side of a model, ready to run.
pub struct TextSide<'a> {
    config: TextConfig,
    tokenizer: Tokenizer,
    weights: TextWeights<'a>,
    bench: Bench<'a>,
    registers: usize,
}

impl<'a> TextSide<'a> {
    /// Reads configurations and the tokenizer.
    ///
    /// # Errors
    /// A model that has no text side of a known form.
    pub fn new(
        files: &'a crate::model_files::ModelFiles,
        bench: Bench<'a>,
        model: Weights<'a>,
    ) -> Result<TextSide<'a>> {
        let folder = files.gemma()?;
        let config = TextConfig::from_json(folder.config(), files.model.section("transformer")?)?;
        let gemma = Weights::new(GEMMA, folder);
        let weights = TextWeights { gemma, projection: model.clone(), transformer: model };
        let registers = config.connectors.registers(&weights.transformer, CONTEXT_TOKENS)?;
        let path = folder.tokenizer_path().context("the text encoder has no tokenizer.json")?;
        let tokenizer = Tokenizer::from_folder(path.parent().context("the tokenizer lies in a folder")?)?;
        Ok(TextSide { config, tokenizer, weights, bench, registers })
    }

    /// The configuration.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// What runs it.
    pub fn bench(&self) -> &Bench<'a> {
        &self.bench
    }

    /// Number of registers that fill up a context.
    pub fn registers(&self) -> usize {
        self.registers
    }

    /// Number of hidden states.
    pub fn states(&self) -> usize {
        self.config.gemma.states()
    }

    /// Tokens of a prompt.
    ///
    /// # Errors
    /// Text that cannot be tokenised.
    pub fn prompt(&self, text: &str) -> Result<Prompt> {
        Ok(self.tokenizer.encode(text)?)
    }

    /// The text of one token.
    ///
    /// # Errors
    /// A token that is none.
    pub fn token(&self, id: i32) -> Result<String> {
        Ok(self.tokenizer.decode(&[id])?)
    }

    /// Runs the encoder in the smallest bucket.
    ///
    /// # Errors
    /// A program that cannot be built or run.
    pub fn encode(&self, prompt: &Prompt) -> Result<Ran> {
        self.encode_in(prompt, prompt.bucket((5..=10).map(|k| 1usize << k)).context("the prompt is too long")?)
    }

    /// Runs the encoder with this many token slots, pads on the left.
    ///
    /// # Errors
    /// A program that cannot be built or run.
    pub fn encode_in(&self, prompt: &Prompt, slots: usize) -> Result<Ran> {
        let inputs = prompt.inputs(slots, self.registers).context("the prompt does not fit its bucket")?;
        let module = text::encode(&self.config, &self.weights, slots, DType::F32)?;
        let args = [
            Tensor::i32(&[slots], &inputs.ids),
            Tensor::f32(&[slots], &inputs.valid),
            Tensor::i32(&[CONTEXT_TOKENS], &inputs.place),
        ];
        self.bench.run("text_encoder", &module, "encode", &args)
    }

    /// Runs the connectors on what the encoder gave.
    ///
    /// # Errors
    /// A program that cannot be built or run.
    pub fn connect(&self, encoded: &Ran) -> Result<Ran> {
        let module = text::connect(&self.config.connectors, &self.weights.transformer, CONTEXT_TOKENS, DType::F32)?;
        let args = Modality::ALL.map(|m| {
            let kept = encoded.result(m.name())?;
            tensor_of(kept, &kept.ty.shape)
        });
        let [video, audio] = args;
        self.bench.run("connectors", &module, "connect", &[video?, audio?])
    }

    /// Number of blocks of a connector.
    pub fn connector_layers(&self, modality: Modality) -> usize {
        self.config.connectors.get(modality).layers
    }

    /// A hidden state of a run: 0 are the scaled embeddings, the last one is behind the final norm.
    pub fn state<'r>(&self, ran: &'r Ran, i: usize) -> Option<&'r Kept> {
        ran.value(&format!("hidden_states.{i}")).or_else(|| ran.value(&format!("layers.{}", i.checked_sub(1)?)))
    }
}

/// The last `n` rows of `[.., t, c]`: those of real tokens.
pub fn last_rows(kept: &Kept, n: usize) -> &[f32] {
    let rows = kept.ty.shape.iter().rev().nth(1).copied().unwrap_or(1).max(1);
    let width = kept.values.len() / rows;
    &kept.values[(rows - n.min(rows)) * width..]
}

pub(super) fn check(setup: &Setup<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let Some(prompts) = setup.references.find(ENCODER, "tokenizer") else { return Ok(()) };
    let prompts = TensorFile::open(&prompts)?.meta()["prompts"].clone();
    let side = TextSide::new(&setup.files, setup.bench(), setup.weights())?;
    for (name, text) in prompts.as_object().into_iter().flatten() {
        let recorded = |recording: &str, key: &str, rows: &mut Vec<Row>| -> Result<bool> {
            Ok(setup.open("text", recording, rows)?.is_some_and(|c| c.has(key)))
        };
        let hidden = setup.references.find(ENCODER, "gemma_hidden").map(|p| TensorFile::open(&p)).transpose()?;
        let has_hidden = hidden.as_ref().is_some_and(|f| f.find(&format!("{name}.hidden.0")).is_some());
        let has_context = recorded("text_context", &format!("{name}.video_context"), rows)?
            || recorded("text_context", &format!("{name}.video_context.sample"), rows)?;
        let Some(text) = text.as_str().filter(|_| has_hidden || has_context) else { continue };
        let prompt = side.prompt(text)?;
        let n = prompt.ids().len();
        let encoded = side.encode(&prompt)?;
        if let Some(file) = hidden.filter(|_| has_hidden) {
            let mut check = Check::new("text", file, setup.limit, rows);
            for i in 0..side.states() {
                if let Some(state) = side.state(&encoded, i) {
                    check.check(&format!("{name}.hidden.{i}"), last_rows(state, n));
                }
            }
        }
        let Some(mut check) = setup.open("text", "text_context", rows)? else { continue };
        for modality in Modality::ALL {
            let found = encoded.result(modality.name())?;
            let width = found.ty.shape.last().copied().unwrap_or(1);
            // Features of real tokens come first, registers behind them.
            let features = found.values.get(..n * width).unwrap_or_default();
            check.check(&format!("{name}.features_{}", modality.name()), features);
        }
        let connected = side.connect(&encoded)?;
        for modality in Modality::ALL {
            let own = modality.name();
            for i in 0..side.connector_layers(modality) {
                if let Some(block) = connected.value(&format!("{own}_connector.transformer_1d_blocks.{i}")) {
                    check.check(&format!("{name}.{own}_connector.block{i}"), &block.values);
                }
            }
            check.check(&format!("{name}.{own}_context"), &connected.result(&format!("{own}_context"))?.values);
        }
    }
    Ok(())
}
