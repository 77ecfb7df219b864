//! The feature extractor: all hidden states of Gemma, normalised and projected to one vector per token and modality.
//!
//! # Easy to get wrong
//! - Element (channel `d`, state `l`) is column `d · states + l` of the projection: the state index runs fastest.
//! - The shared projection (LTX-2) is fed by states whose *range* over all real tokens and channels is scaled to 8; pads
//!   must not enter the statistics.
//! - The projections per modality (LTX-2.3 on) are fed by an RMS norm per token and state, times `√(width / hidden)`. The
//!   factor is applied before the projection and never scales its bias.
//!
//! Source: ltx_core/text_encoders/gemma/feature_extractor (Lightricks/LTX-2, 1.2.0); spec/text-encoder §4.

use ltxc_ir::ops::{Compare, ReduceKind};
use ltxc_ir::{Builder, DType, ValueId};

use super::connector::Modality;
use crate::fields::Fields;
use crate::{Block, Functions, Weights};

/// Added to denominators and mean squares.
const EPS: f64 = 1e-6;
/// Range of normalised states of the shared projection.
const RANGE: f64 = 8.0;

/// Version of the feature extractor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureExtractor {
    /// One projection without bias for both modalities, states scaled by their range (LTX-2).
    Shared,
    /// One projection with bias per modality, states normalised per token (LTX-2.3 on).
    PerModality,
}

impl FeatureExtractor {
    /// Chooses the version by the transformer's configuration.
    pub(super) fn read(transformer: &Fields<'_>) -> FeatureExtractor {
        const KEYS: [&str; 4] = [
            "caption_proj_before_connector",
            "caption_projection_first_linear",
            "caption_proj_input_norm",
            "caption_projection_second_linear",
        ];
        match KEYS.map(|key| transformer.find_bool(key)) {
            [None, None, None, None] => FeatureExtractor::Shared,
            [Some(true), Some(false), Some(false), Some(false)] => FeatureExtractor::PerModality,
            flags => {
                let problem = format!(
                    "and the other caption projection switches ({}) are {flags:?}; known are none of them, or true, \
                     false, false, false",
                    KEYS[1..].join(", ")
                );
                transformer.problem_at(KEYS[0], problem);
                FeatureExtractor::Shared
            }
        }
    }
}

/// Features of every modality in `made`, `[1, t, width]` each, of the dtype of the states.
///
/// - `weights`: the complete set of files with `text_embedding_projection.*`.
/// - `states`: every hidden state (at least one), `[1, t, hidden]`; `valid`: `f32[t]`, 1 for real tokens, of which the last one is.
/// - `made`: modalities, at least one, with the width of their connectors. The rows of pads are finite and mean nothing.
///
/// Problems with weights are recorded in `weights`.
pub fn features(
    b: &Builder,
    functions: &Functions,
    extractor: FeatureExtractor,
    weights: &Weights,
    states: &[ValueId],
    valid: ValueId,
    made: &[(Modality, usize)],
) -> Vec<ValueId> {
    let weights = weights.below("text_embedding_projection.");
    let hidden = b.shape(states[0])[2];
    let columns = hidden * states.len();
    let features = match extractor {
        FeatureExtractor::Shared => {
            let width = made.first().map_or(1, |(_, width)| *width);
            if let Some((_, other)) = made.iter().find(|(_, other)| *other != width) {
                weights.problem(format!(
                    "the projection `aggregate_embed` feeds both connectors, which are {width} and {other} wide"
                ));
            }
            let normalised = states.iter().enumerate().map(|(i, &state)| {
                let name = format!("features.normalised.{i}");
                let block = Block { function: "normalise_range", name: &name, prefix: String::new() };
                let args = [("state", state), ("valid", valid)];
                functions.call_one(b, &weights, block, &args, |b, _, p| normalise_range(b, p[0], p[1]))
            });
            let flat = flatten(b, &normalised.collect::<Vec<_>>());
            let w = weights.get(b, "aggregate_embed.weight", &[width, columns]);
            vec![b.matmul_transposed(flat, w); made.len()]
        }
        FeatureExtractor::PerModality => {
            let normalised: Vec<ValueId> = states.iter().map(|&state| b.rms_norm(state, None, EPS)).collect();
            let flat = flatten(b, &normalised);
            let project = |&(modality, width): &(Modality, usize)| {
                let name = format!("{}_aggregate_embed", modality.name());
                let scaled = b.mul_scalar(flat, (width as f64 / hidden as f64).sqrt());
                let w = weights.get(b, &format!("{name}.weight"), &[width, columns]);
                let bias = weights.get(b, &format!("{name}.bias"), &[width]);
                b.add(b.matmul_transposed(scaled, w), bias)
            };
            made.iter().map(project).collect()
        }
    };
    // A shared projection is one value: it has the name of the first features.
    for ((modality, _), &value) in made.iter().zip(&features).rev() {
        b.name(&format!("features_{}", modality.name()), value);
    }
    features
}

/// `[1, t, c]` of every state to `[1, t, c · states]`, the state index fastest.
fn flatten(b: &Builder, states: &[ValueId]) -> ValueId {
    let [batch, tokens, channels] = [0, 1, 2].map(|axis| b.shape(states[0])[axis]);
    let columns: Vec<ValueId> = states.iter().map(|&s| b.reshape(s, &[batch, tokens, channels, 1])).collect();
    b.reshape(b.concat(&columns, 3), &[batch, tokens, channels * states.len()])
}

/// `8 (x − mean) / (max − min + eps)` with statistics over the real tokens and all channels.
///
/// The mean is `sum / (count + eps)`. Sum, maximum, minimum and range have the dtype of the state, the rest is f32.
fn normalise_range(b: &Builder, x: ValueId, valid: ValueId) -> ValueId {
    let ty = b.ty(x);
    let [tokens, hidden] = [ty.shape[1], ty.shape[2]];
    let valid = b.reshape(valid, &[1, tokens, 1]);
    let count = b.mul_scalar(b.reduce(ReduceKind::Sum, valid, &[1]), hidden as f64);
    let sum = b.cast(b.reduce(ReduceKind::Sum, b.mul(x, valid), &[1, 2]), DType::F32);
    let mean = b.div(sum, b.add_scalar(count, EPS));
    // Pads count as repetitions of the last token, which is always real: that changes no extremum.
    let is_real = b.compare(Compare::Less, b.scalar(0.0), valid);
    let real = b.select(is_real, x, b.slice_axis(x, 1, tokens - 1, tokens));
    let [lowest, highest] = [ReduceKind::Min, ReduceKind::Max].map(|kind| b.reduce(kind, real, &[1, 2]));
    let range = b.cast(b.add_scalar(b.sub(highest, lowest), EPS), DType::F32);
    let centred = b.sub(b.cast(x, DType::F32), mean);
    b.cast(b.div(b.mul_scalar(centred, RANGE), range), ty.dtype)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[track_caller]
    fn check(transformer: Value, expected: Option<FeatureExtractor>) {
        let fields = Fields::new("transformer", &transformer);
        assert_eq!(fields.finish(FeatureExtractor::read(&fields)).ok(), expected);
    }

    #[test]
    fn only_the_two_known_combinations_choose_a_version() {
        let switches = |first: bool, second: bool| {
            json!({
                "caption_proj_before_connector": true, "caption_projection_first_linear": first,
                "caption_proj_input_norm": false, "caption_projection_second_linear": second,
            })
        };
        check(json!({}), Some(FeatureExtractor::Shared));
        check(switches(false, false), Some(FeatureExtractor::PerModality));
        check(switches(true, false), None);
        check(switches(false, true), None);
        check(json!({"caption_proj_before_connector": true}), None);
        check(json!({"caption_proj_before_connector": 1}), None);
    }
}
