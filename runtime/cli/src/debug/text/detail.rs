//! Sums inside feature extractor and connectors, as lines that parity tests of other tools write.
//!
//! `<label>:embeddings_block_0:attn1:sum=…`, the sound's with `audio_` in front of the name. Sums are over the whole
//! context, registers included; those of the feature extractor over real tokens.

use anyhow::Result;
use ltxc_models::text::{FeatureExtractor, Modality};
use ltxc_runtime::stats::{decoded, sum_f32};

use crate::debug::modules::{Kept, Ran};
use crate::debug::parity::text::{TextSide, last_rows};
use crate::model_files::ModelFiles;

/// Where the connectors stand in model files.
const CONNECTORS: &str = "model.diffusion_model.";

/// Where the projections do.
const PROJECTION: &str = "text_embedding_projection.";

/// Added to denominators and mean squares of the feature extractor.
const EPS: f64 = 1e-6;

/// The lines for what the encoder gave for a prompt of `n` tokens.
pub(super) fn lines(
    side: &TextSide<'_>,
    files: &ModelFiles,
    encoded: &Ran,
    n: usize,
    label: &str,
) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut add = |key: String, values: &[f32]| lines.push(format!("{label}:{key}={:.6}", sum_f32(values)));
    let connected = side.connect(encoded)?;
    for modality in Modality::ALL {
        let own = modality.name();
        let prefix = if modality == Modality::Video { "" } else { "audio_" };
        let input = encoded.result(own)?;
        let width = input.ty.shape.last().copied().unwrap_or(1);
        let inputs = extractor_input(side, encoded, n, width);
        // Features of real tokens stand in front of the registers.
        add(format!("{prefix}feature_extractor_linear:in_sum"), &inputs);
        add(format!("{prefix}feature_extractor_linear:sum"), input.values.get(..n * width).unwrap_or_default());
        let mut before: &Kept = input;
        for i in 0..side.connector_layers(modality) {
            let path = format!("{own}_connector.transformer_1d_blocks.{i}");
            let Some(output) = connected.value(&path) else { continue };
            let key = format!("{prefix}embeddings_block_{i}");
            add(format!("{key}:input:in_sum"), &before.values);
            add(format!("{key}:output:sum"), &output.values);
            for part in ["attn1", "ff"] {
                if let Some(value) = connected.value(&format!("{path}.{part}")) {
                    add(format!("{key}:{part}:sum"), &value.values);
                }
            }
            before = output;
        }
        add(format!("{prefix}embeddings_connector:sum"), &connected.result(&format!("{own}_context"))?.values);
        let registers = format!("{CONNECTORS}{own}_embeddings_connector.learnable_registers");
        if let Some(values) = stored(files, &registers) {
            add(
                if prefix.is_empty() { "embeddings_registers:sum".into() } else { "audio_registers:sum".into() },
                &values,
            );
        }
    }
    let keys: Vec<String> = files.model.tensors().map(|(key, _)| key.to_string()).collect();
    for key in keys {
        let name = key.strip_prefix(CONNECTORS).filter(|k| k.contains("_embeddings_connector."));
        if let Some(name) = name.or_else(|| key.strip_prefix(PROJECTION))
            && let Some(values) = stored(files, &key)
        {
            add(format!("param:{name}:sum"), &values);
        }
    }
    Ok(lines)
}

fn stored(files: &ModelFiles, key: &str) -> Option<Vec<f32>> {
    let ty = files.model.tensor(key)?.stored.ty()?;
    Some(decoded(&ty, files.model.data(key)?))
}

/// What the projection to `width` channels multiplies: normalised states of the last `n` tokens. Computed here from the
/// states by the formula, because the encoder's program rearranges them in place.
fn extractor_input(side: &TextSide<'_>, encoded: &Ran, n: usize, width: usize) -> Vec<f32> {
    let states = (0..side.states()).filter_map(|i| side.state(encoded, i));
    let hidden = side.config().gemma.hidden_size;
    let normalised = states.flat_map(|state| {
        let rows: Vec<f64> = last_rows(state, n).iter().map(|&v| f64::from(v)).collect();
        let values: Vec<f32> = match side.config().extractor {
            FeatureExtractor::Shared => {
                let mean = rows.iter().sum::<f64>() / (rows.len() as f64 + EPS);
                let (low, high) = rows.iter().fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)));
                rows.iter().map(|v| (8.0 * (v - mean) / (high - low + EPS)) as f32).collect()
            }
            FeatureExtractor::PerModality => {
                let factor = (width as f64 / hidden as f64).sqrt();
                rows.chunks(hidden.max(1))
                    .flat_map(|row| {
                        let square = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
                        row.iter().map(move |v| (v / (square + EPS).sqrt() * factor) as f32)
                    })
                    .collect()
            }
        };
        values
    });
    normalised.collect()
}
