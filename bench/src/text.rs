//! What it saves to compute only as many prompt tokens as there are: the text encoder by bucket.

use std::path::Path;

use anyhow::Result;
use ltxc::bench::statistics::median;
use ltxc_compiler::Options;
use ltxc_ir::{DType, Rate};
use ltxc_models::Weights;
use ltxc_models::checkpoint::WeightFile;
use ltxc_models::synth::{Preset, tensors};
use ltxc_models::text::{CONTEXT_TOKENS, TextConfig, TextWeights, encode};
use serde_json::json;

use crate::block::Findings;
use crate::measure::Sample;
use crate::report::{Row, Table, figure};
use crate::session::{self, CallTimes, Input, SOURCE, Session};
use crate::synthetic;

/// Prompt lengths that plans have programs for.
const BUCKETS: [usize; 6] = [32, 64, 128, 256, 512, 1024];

/// Sizes of the text encoder: those of Gemma 3 1B, with a small vocabulary and few layers.
const WIDTH: usize = 1152;
const INTERMEDIATE: usize = 6912;
const LAYERS: usize = 6;
const HEADS: usize = 4;
const KEY_HEADS: usize = 1;
const VOCABULARY: usize = 4096;

/// Measures every bucket `rounds` times. `folder` takes the weights.
///
/// # Errors
/// A program that cannot be compiled or run.
pub fn run(rounds: usize, folder: &Path) -> Result<Findings> {
    let (mut config, mut gemma) = synthetic::published_configs(Preset::Ltx2)?;
    let changes = [
        ("hidden_size", WIDTH),
        ("intermediate_size", INTERMEDIATE),
        ("num_hidden_layers", LAYERS),
        ("num_attention_heads", HEADS),
        ("num_key_value_heads", KEY_HEADS),
        ("vocab_size", VOCABULARY),
    ];
    for (key, value) in changes {
        gemma["text_config"][key] = json!(value);
    }
    let transformer = &mut config["transformer"];
    transformer["caption_channels"] = json!(WIDTH);
    transformer["connector_attention_head_dim"] = json!(128);
    transformer["connector_num_attention_heads"] = json!(WIDTH / 128);
    let transformer = config["transformer"].clone();

    let mut specs = tensors::gemma3(&gemma)?;
    specs.extend(tensors::text_projection(&transformer, LAYERS + 1)?);
    specs.extend(tensors::connectors(&transformer)?);
    let path = folder.join("text.safetensors");
    synthetic::write_checkpoint(&path, &config, &specs, DType::BF16)?;
    let file = WeightFile::open(&path)?;
    let text = TextConfig::from_json(&gemma, &transformer)?;
    let source = || Weights::new(SOURCE, &file);
    let weights = TextWeights { gemma: source(), projection: source(), transformer: source() };

    let (mut seconds, mut tables) = (Vec::new(), Vec::new());
    for tokens in BUCKETS {
        let module = encode(&text, &weights, tokens, DType::F32)?;
        let plan = session::compile(&module, &file, Options::default())?;
        let mapped = session::open_weights(&plan, &file)?;
        let registers = text.connectors.registers(&source(), CONTEXT_TOKENS)?;
        let place = |p: usize| if p < tokens { p } else { tokens + p % registers };
        let inputs = [
            ("ids", Input::I32((0..tokens).map(|i| (7 * i % VOCABULARY) as i32).collect())),
            ("valid", Input::F32(vec![1.0; tokens])),
            ("place", Input::I32((0..CONTEXT_TOKENS).map(|p| place(p) as i32).collect())),
        ];
        let inputs = inputs.into_iter().map(|(name, input)| (name.to_string(), input)).collect();
        let mut session = Session::new(&plan, &mapped, inputs)?;
        session.run(Rate::Generation)?;
        let mut times = CallTimes::default();
        let mut samples: Vec<Sample> = Vec::new();
        for _ in 0..rounds {
            samples.push(session.run_timed(Rate::Generation, &mut times)?);
            times.end_of_round();
        }
        seconds.push(median(samples.iter().map(|s| s.seconds)).unwrap_or(f64::NAN));
        if tokens == BUCKETS[0] || tokens == BUCKETS[BUCKETS.len() - 1] {
            let table = times.table(&plan);
            tables.push(Table { title: format!("Text encoder, {tokens} tokens: {}", table.title), ..table });
        }
    }
    let full = seconds.last().copied().unwrap_or(f64::NAN);
    let rows = BUCKETS.iter().zip(&seconds).map(|(tokens, &s)| {
        Row::compared(format!("encode {tokens} tokens instead of {CONTEXT_TOKENS}"), "s", s, full, None)
    });
    let rows: Vec<Row> = rows.collect();
    let saved = 1.0 - seconds[0] / full;
    let notes = vec![format!(
        "{LAYERS} layers of Gemma 3 1B's sizes; a prompt of up to {} tokens saves {} % of the time",
        BUCKETS[0],
        figure(100.0 * saved)
    )];
    Ok(Findings { rows, tables, notes })
}
