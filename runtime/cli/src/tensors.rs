//! What does not fit between model files and their configurations, for all files in one message.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, bail};
use ltxc_models::{ModelError, Weights};

use crate::model_files::{GEMMA, ModelFiles};
use crate::report::remark;

/// Most tensors that are spelled out.
const MOST: usize = 20;

/// What published files have and nothing here reads, by the beginnings of keys.
pub(crate) const UNUSED: [&str; 4] = [
    "audio_vae.encoder.",
    "vae.per_channel_statistics.",
    "vocoder.mel_stft.stft_fn.inverse_basis",
    // Of a resampler that does not make anything smaller.
    "upsampler.blur_down.kernel",
];

/// The same by the ends of keys: scales of fp8 weights, which are read with them, and of activations.
const UNUSED_ENDS: [&str; 2] = [".weight_scale", ".input_scale"];

/// Fails if `asked` found problems; tells of tensors that nobody asked for.
///
/// - `asked`: the name of every weight source, and the view that all its programs were built with.
/// - `is_whole`: whether the programs are those of a whole model, so that tensors nobody asked for are worth a word.
/// - `failure`: a program that could not be built for another reason.
///
/// # Errors
/// All tensors that are missing, have another shape or type, or are not known, with file, expectation and what was
/// found; 20 at most are spelled out. Without such tensors: `failure`.
pub fn check(
    files: &ModelFiles,
    asked: &[(&str, Weights<'_>)],
    is_whole: bool,
    failure: Option<ModelError>,
) -> Result<()> {
    let mut lines = Vec::new();
    for (source, weights) in asked {
        lines.extend(weights.problems().into_iter().map(|p| {
            let file = files.file_of(source, p.key.as_deref().unwrap_or_default());
            format!("{}: {}", file_name(&file), p.text)
        }));
    }
    let unknown: Vec<String> = asked.iter().flat_map(|(source, weights)| unknown(files, source, weights)).collect();
    if lines.is_empty() {
        if is_whole && !unknown.is_empty() {
            let count = unknown.len();
            remark(&format!("note: {count} tensors are not part of this model and are left alone{}", listed(&unknown)));
        }
        return failure.map_or(Ok(()), |e| Err(e.into()));
    }
    lines.extend(unknown);
    lines.extend(failure.map(|e| e.to_string()));
    let cut = if lines.len() > MOST { format!(", the first {MOST} are listed") } else { String::new() };
    bail!(
        "{} problem(s) with the tensors of the model files{cut}; use the files as published:{}",
        lines.len(),
        listed(&lines)
    )
}

/// Tensors of a source that nobody asked for and that belong to nothing that is known.
fn unknown(files: &ModelFiles, source: &str, weights: &Weights<'_>) -> Vec<String> {
    // Text encoders come with parts for other inputs.
    if source == GEMMA {
        return Vec::new();
    }
    let checkpoint = files.checkpoint_of(source);
    let is_unused =
        |key: &str| UNUSED.iter().any(|part| key.starts_with(part)) || UNUSED_ENDS.iter().any(|end| key.ends_with(end));
    let is_unknown = |key: &str| !weights.was_asked_for(key) && !is_unused(key);
    (checkpoint.tensors())
        .filter(|(key, _)| is_unknown(key))
        .map(|(key, at)| {
            let (file, stored) = (checkpoint.files()[at.file].path(), at.stored);
            format!("{}: `{key}` is {} {:?}, expected no such tensor", file_name(file), stored.dtype, stored.shape)
        })
        .collect()
}

/// One per line, [`MOST`] at most.
fn listed(lines: &[String]) -> String {
    let mut out = String::new();
    for line in lines.iter().take(MOST) {
        // Writing to a string cannot fail.
        let _ = write!(out, "\n  {line}");
    }
    if lines.len() > MOST {
        let _ = write!(out, "\n  … and {} more", lines.len() - MOST);
    }
    out
}

fn file_name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy()
}
