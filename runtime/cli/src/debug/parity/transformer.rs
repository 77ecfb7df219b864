//! The transformer: every recorded case, from preparation through the blocks to velocities.
//!
//! A case is what the recording's name says; inputs that it does not list are the shared ones (`in.*`).

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_models::transformer::{
    BlockSet, ENTRY, Pass, Perturbation, Stream, StreamSpec, TransformerConfig, TransformerSpec, build_passes,
};
use serde_json::Value;

use super::{Check, Row, Setup};
use crate::debug::evaluation::Inputs;
use crate::debug::modules::Ran;
use crate::debug::recording::TensorFile;

/// Absolute limit of rotary tables, as a share of 1.
const ROPE_LIMIT: f64 = 1e-5;

/// Cases that are no runs of one sample in f32.
const LEFT_OUT: [&str; 2] = ["batch2", "bf16"];

/// The inputs of one stream of one case.
pub struct StreamCase {
    /// Noisy latent, `[1, t, c]`.
    pub latent: Tensor,
    /// One per token.
    pub timesteps: Vec<f32>,
    /// Noise level of the stream.
    pub sigma: f32,
    /// Positions, `[1, axes, t, 2]`.
    pub positions: Tensor,
    /// Text, `[1, s, c]`.
    pub context: Tensor,
    /// Strengths of self attention, `[1, t, t]`.
    pub self_mask: Option<Tensor>,
    /// Visible text tokens, `[1, s]`.
    pub context_mask: Option<Tensor>,
    /// Marks of keyframe tokens.
    pub keyframes_mask: Option<Vec<f32>>,
    /// Whether the stream is computed, not only looked at.
    pub is_enabled: bool,
}

impl StreamCase {
    /// Distinct timesteps in the order of their first token, and the row of every token.
    pub fn rows(&self) -> (Vec<f32>, Vec<i32>) {
        let mut distinct: Vec<f32> = Vec::new();
        let rows = self.timesteps.iter().map(|t| {
            distinct.iter().position(|d| d.to_bits() == t.to_bits()).unwrap_or_else(|| {
                distinct.push(*t);
                distinct.len() - 1
            }) as i32
        });
        let rows = rows.collect();
        (distinct, rows)
    }

    /// What a program for this case looks like.
    pub fn spec(&self) -> StreamSpec {
        StreamSpec {
            timestep_rows: self.rows().0.len(),
            has_self_mask: self.self_mask.is_some(),
            has_context_mask: self.context_mask.is_some(),
            has_keyframes_mask: self.keyframes_mask.is_some(),
            is_enabled: self.is_enabled,
            ..StreamSpec::new(self.timesteps.len(), self.context.ty.shape[1])
        }
    }

    /// Arguments in the order of the parameters.
    pub fn arguments(&self) -> Vec<Tensor> {
        let (distinct, rows) = self.rows();
        let n = rows.len();
        let mut args = vec![self.latent.clone(), Tensor::f32(&[distinct.len()], &distinct)];
        if distinct.len() > 1 {
            args.push(Tensor::i32(&[n], &rows));
        }
        args.push(Tensor::f32(&[1], &[self.sigma]));
        args.push(without_batch(&self.positions));
        args.push(self.context.clone());
        args.extend(self.self_mask.as_ref().map(without_batch));
        args.extend(self.context_mask.as_ref().map(|m| Tensor::f32(&m.ty.shape[1..], &m.to_f32())));
        args.extend(self.keyframes_mask.as_ref().map(|m| Tensor::f32(&[n], m)));
        args
    }
}

fn without_batch(x: &Tensor) -> Tensor {
    Tensor::f32(x.ty.shape.get(1..).unwrap_or_default(), &x.to_f32())
}

/// The inputs of `stream` in `case`; `None` if it takes no part.
///
/// # Errors
/// A recording that lacks an input.
pub fn stream_case(file: &TensorFile, case: &str, stream: Stream) -> Result<Option<StreamCase>> {
    let name = stream.name();
    // These are `uniform` without inputs of their own, and were recorded without keyframe marks.
    let is_marked = !["prep", "interleaved", "bf16", "no_keyframes_mask"].contains(&case);
    let case = if file.find(&format!("{case}.sigma")).is_some() { case } else { "uniform" };
    let own = |key: &str| file.find(&format!("{case}.{key}")).or_else(|| file.find(&format!("{case}.state.{key}")));
    let Some(timesteps) = own(&format!("{name}.timesteps")).map(Tensor::to_f32) else { return Ok(None) };
    let is_video = stream == Stream::Video;
    let missing = |key: &str| format!("`{}` has no `{key}`", file.path.display());
    let shared = |key: &str| {
        let key = format!("in.{name}.{key}");
        file.find(&key).cloned().with_context(|| missing(&key))
    };
    let video_input = |key: &str| match own(key).filter(|_| is_video) {
        Some(own) => Ok(own.clone()),
        None => shared(key),
    };
    let sigma = own(&format!("sigma_{name}")).or_else(|| own("sigma")).with_context(|| missing("sigma"))?;
    let marked = own("keyframes_mask").or_else(|| file.find("in.video.keyframes_mask"));
    let keyframes_mask = marked.filter(|_| is_video && is_marked).map(|mask| {
        // Appended tokens are not marked.
        let mut mask = mask.to_f32();
        mask.resize(timesteps.len(), 0.0);
        mask
    });
    Ok(Some(StreamCase {
        latent: video_input("latent")?,
        sigma: sigma.to_f32().first().copied().with_context(|| missing("sigma"))?,
        positions: video_input("positions")?,
        context: shared("context")?,
        self_mask: own("attention_mask").filter(|_| is_video).cloned(),
        context_mask: own("context_mask").cloned(),
        keyframes_mask,
        is_enabled: case != format!("{name}_disabled"),
        timesteps,
    }))
}

/// The configuration of a case; one of them has another layout of rotations.
///
/// # Errors
/// A configuration that is not supported.
pub fn case_config(transformer: &Value, case: &str) -> Result<TransformerConfig> {
    let mut config = transformer.clone();
    if case == "interleaved"
        && let Some(keys) = config.as_object_mut()
    {
        keys.insert("rope_type".into(), "interleaved".into());
        keys.remove("frequencies_precision");
    }
    Ok(TransformerConfig::from_json(&config)?)
}

/// What a case leaves out.
pub fn perturbation(config: &TransformerConfig, case: &str) -> Perturbation {
    let only = |i: usize| BlockSet::from_iter([i]);
    let last = config.layers.saturating_sub(1);
    let none = Perturbation::default();
    match case {
        "stg" => Perturbation { skip_video_self: only(last), skip_audio_self: only(last), ..none },
        "stg_video0" => Perturbation { skip_video_self: only(0), ..none },
        "isolated" => Perturbation { skip_audio_to_video: BlockSet::All, skip_video_to_audio: BlockSet::All, ..none },
        _ => none,
    }
}

pub(super) fn check(setup: &Setup<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let Some(mut check) = setup.open("transformer", "transformer", rows)? else { return Ok(()) };
    let cases: Vec<String> = match check.meta["cases"].as_object() {
        Some(cases) => cases.keys().filter(|c| !LEFT_OUT.contains(&c.as_str())).cloned().collect(),
        None => vec!["uniform".into()],
    };
    // Cases of which blocks were recorded tell more, and come first.
    let has_blocks = |case: &String| !check.has(&format!("{case}.block0.video"));
    let mut cases = cases;
    cases.sort_by_key(has_blocks);
    let transformer = setup.files.model.section("transformer")?.clone();
    for case in ["prep".to_string()].into_iter().chain(cases) {
        let config = case_config(&transformer, &case)?;
        let [video, audio] = Stream::BOTH.map(|s| stream_case(&check.file, &case, s));
        let (video, audio) = (video?, audio?);
        let spec = TransformerSpec {
            video: video.as_ref().map(StreamCase::spec),
            audio: audio.as_ref().map(StreamCase::spec),
            perturbation: perturbation(&config, &case),
        };
        let perturbation = spec.perturbation.clone();
        let pass = Pass { perturbation, release: setup.release.into(), ..Pass::default() };
        let module = build_passes(&config, &setup.weights(), &spec, &[pass], DType::F32)?;
        let args: Vec<Tensor> = [&video, &audio].into_iter().flatten().flat_map(StreamCase::arguments).collect();
        let ran = setup.bench().run("transformer", &module, ENTRY, &args)?;
        if case == "prep" {
            check_preparation(&mut check, &ran);
            continue;
        }
        check_call(&mut check, &Inputs { case, streams: [video, audio] }, &ran, false);
    }
    Ok(())
}

/// Compares values of a call with recorded ones, in the order in which they are computed.
pub(crate) fn check_call(check: &mut Check<'_>, inputs: &Inputs, ran: &Ran, outputs_only: bool) {
    let case = &inputs.case;
    // A name may stand several times; the last value counts.
    let last: BTreeMap<&str, usize> = ran.values.iter().enumerate().map(|(i, kept)| (kept.name.as_str(), i)).collect();
    for (i, kept) in ran.values.iter().enumerate().filter(|_| !outputs_only) {
        if !kept.name.starts_with("prep.") && last.get(kept.name.as_str()) == Some(&i) {
            check.check(&recorded_name(case, &kept.name), &kept.values);
        }
    }
    for (stream, of) in inputs.streams() {
        let Some(velocity) = ran.results.get(&format!("{}.velocity", stream.name())) else { continue };
        check.check(&format!("{case}.velocity.{}", stream.name()), &velocity.values);
        let x0 = prediction(&of.latent.to_f32(), &velocity.values, &of.timesteps);
        check.check(&format!("{case}.x0.{}", stream.name()), &x0);
    }
}

/// What recordings call a value of a call.
pub(crate) fn recorded_name(case: &str, path: &str) -> String {
    let block = path.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
    match block {
        Some((i, stream @ ("video" | "audio"))) => format!("{case}.block{i}.{stream}"),
        _ if path.starts_with("prep.") => path.into(),
        _ => format!("{case}.{path}"),
    }
}

/// `x − t·v`, with a timestep per token.
pub(crate) fn prediction(latent: &[f32], velocity: &[f32], timesteps: &[f32]) -> Vec<f32> {
    let channels = (velocity.len() / timesteps.len().max(1)).max(1);
    latent.iter().zip(velocity).enumerate().map(|(i, (x, v))| x - v * timesteps[i / channels]).collect()
}

/// What happens before the first block.
pub(crate) fn check_preparation(check: &mut Check<'_>, ran: &Ran) {
    let names: Vec<String> = check.file.iter().map(|(n, _)| n.to_string()).filter(|n| n.starts_with("prep.")).collect();
    for name in names {
        let (Some(found), Some(recorded)) = (ran.value(&name), check.file.find(&name)) else { continue };
        if name.contains("rope_") {
            let table = heads_first(&found.values, &found.ty.shape);
            // Cosines are about 1: absolute and relative limits are the same thing.
            check.check_within(&name, &table, ROPE_LIMIT);
        } else {
            // Recorded once per token, computed once per distinct timestep.
            let times = recorded.ty.elements() / found.values.len().max(1);
            check.check(&name, &found.values.repeat(times.max(1)));
        }
    }
}

/// `[1, t, n, d]` as `[1, n, t, d]`.
pub(crate) fn heads_first(values: &[f32], shape: &[usize]) -> Vec<f32> {
    let &[_, t, n, d] = shape else { return values.to_vec() };
    let starts = (0..n).flat_map(|h| (0..t).map(move |i| (i * n + h) * d));
    starts.flat_map(|at| values[at..at + d].to_vec()).collect()
}
