//! The logs of a session: which there are, what their headers say, and the file of captured values.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ltxc_ir::plan::Plan;
use ltxc_ir::{DType, TensorType};
use ltxc_runtime::RunError;
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::stats::decoded;
use ltxc_runtime::weights::WeightFiles;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::About;
use crate::debug::flags::{DebugMode, LogFormat, ModuleFormat};
use crate::debug::log::Sink;
use crate::debug::options::DebugOptions;
use crate::debug::sums::Sum;

/// The logs of a session, opened when the first plan is known.
#[derive(Default)]
pub(super) struct Logs {
    pub is_open: bool,
    /// Sums of the patchify weights, for logs of the transformer.
    pub patchify: Option<[Sum; 4]>,
    pub stage_sums: Option<Sink>,
    pub model_sums: Option<Sink>,
    pub model_detail: Option<Sink>,
    pub gemma: Option<Sink>,
    pub module_sums: Option<Sink>,
    pub trace: Option<Sink>,
    pub taps: Option<Sink>,
}

impl Logs {
    /// Opens what is wanted.
    pub fn open(options: &DebugOptions, header: &str) -> Result<Logs, RunError> {
        let open = |wanted: &Option<Option<PathBuf>>| -> Result<Option<Sink>, RunError> {
            let Some(path) = wanted else { return Ok(None) };
            let sink = Sink::open(path.as_deref(), options.format, options.prefix, options.append, header)?;
            Ok(Some(sink.with_f64(options.has_f64)))
        };
        let open_json =
            |path: Option<&Path>| Sink::open(path, LogFormat::Jsonl, options.prefix, options.append, header);
        let module_sums = match (&options.module_sums, options.module_format) {
            (Some(path), ModuleFormat::FastvideoTrace) => Some(open_json(path.as_deref())?),
            (wanted, _) => open(wanted)?,
        };
        let prints_taps = options.captures_any() && options.tap_path.is_none();
        Ok(Logs {
            is_open: true,
            patchify: None,
            stage_sums: open(&options.stage_sums)?,
            model_sums: open(&options.model_sums)?,
            model_detail: open(&options.model_detail)?,
            gemma: open(&options.gemma)?,
            module_sums,
            trace: options.trace.as_ref().map(|t| open_json(t.output.as_deref())).transpose()?,
            taps: open(&prints_taps.then_some(None))?,
        })
    }

    pub fn all(&mut self) -> impl Iterator<Item = &mut Sink> {
        let (sums, detail, gemma) = (&mut self.model_sums, &mut self.model_detail, &mut self.gemma);
        [&mut self.stage_sums, sums, detail, gemma, &mut self.module_sums, &mut self.trace, &mut self.taps]
            .into_iter()
            .flatten()
    }

    pub fn comment(&mut self, text: &str) -> Result<(), RunError> {
        self.all().try_for_each(|sink| sink.comment(text))
    }
}

/// The beginning of the hash of a plan.
pub(super) fn short(hash: &[u8; 32]) -> String {
    hash.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

pub(super) fn header(plan: &Plan, hash: &str, options: &DebugOptions, about: &About) -> String {
    let mode = match options.mode.unwrap_or_default() {
        DebugMode::Fused => "fused",
        DebugMode::Exact => "exact",
    };
    let noise: Vec<String> = (about.noise.iter())
        .map(|(slot, path)| {
            let content = std::fs::read(path).map(|b| blake3::hash(&b).to_hex()[..16].to_string());
            format!(" noise.{slot}={}", content.unwrap_or_else(|_| "new".into()))
        })
        .collect();
    let seed = about.seed.map_or("none".into(), |seed| seed.to_string());
    let decoder_noise = if about.spares_decoders { "off" } else { "on" };
    let mut header = format!(
        "{} plan={hash} device={} dtype={} seed={seed} mode={mode} attention=plain fused_attention=off text_padding={} \
         decoder_noise={decoder_noise}{}",
        plan.compiler,
        about.device,
        plan.pipeline.dtype,
        plan.pipeline.text.length,
        noise.concat()
    );
    if !about.experiments.is_empty() {
        header += &format!(" experiments={}", about.experiments.join(","));
    }
    about.run.iter().for_each(|run| header += &format!(" run={run}"));
    header
}

/// Sums of weights and biases of both patchify projections.
pub(super) fn patchify_sums(plan: &Plan, weights: &WeightFiles) -> Option<[Sum; 4]> {
    let tensors = || plan.functions.iter().flat_map(|f| &f.weights).flat_map(|w| w.origin.tensors());
    let sum = |name: &str| {
        let tensor = tensors().find(|t| t.key.ends_with(&format!("diffusion_model.{name}")))?;
        let weight = weights.tensor(tensor, &tensor.key).ok()?;
        Some(Sum::of(&decoded(&tensor.ty, weight.bytes())))
    };
    Some([
        sum("patchify_proj.weight")?,
        sum("patchify_proj.bias")?,
        sum("audio_patchify_proj.weight")?,
        sum("audio_patchify_proj.bias")?,
    ])
}

pub(super) fn write_captured(path: &Path, captured: &[(String, TensorType, Vec<u8>)]) -> Result<(), RunError> {
    let internal = |e: safetensors::SafeTensorError| RunError::Internal(e.to_string());
    let views = captured.iter().map(|(name, ty, bytes)| {
        let view = TensorView::new(stored_dtype(ty.dtype), ty.shape.clone(), bytes).map_err(internal)?;
        Ok((name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>, RunError>>()?;
    // The format sorts tensors; who compares them wants to know which came first.
    let names: Vec<&str> = captured.iter().map(|(name, ..)| name.as_str()).collect();
    let meta = HashMap::from([("meta".to_string(), json!({"order": names}).to_string())]);
    write_atomically(path, &safetensors::serialize(views, Some(meta)).map_err(internal)?)
}

/// The inverse of [`ltxc_runtime::weights::dtype_of`].
fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F8E4M3 => Dtype::F8_E4M3,
        DType::F8E5M2 => Dtype::F8_E5M2,
        DType::I8 => Dtype::I8,
        DType::U8 => Dtype::U8,
        DType::I32 => Dtype::I32,
        DType::U32 => Dtype::U32,
        DType::Bool => Dtype::BOOL,
    }
}
