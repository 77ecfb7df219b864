//! Model files to another layout, another dtype, or with LoRAs merged into them.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Context, Result, bail};
use ltxc_ir::{DType, TensorType};
use ltxc_models::checkpoint::header::format_name;
use ltxc_models::checkpoint::layouts::{LaidOut, Layout, lay_out};
use ltxc_models::checkpoint::{Checkpoint, Location, StoredType};
use ltxc_models::lora::LoraTargets;
use ltxc_models::transformer::TransformerConfig;
use ltxc_runtime::adapters::AdapterSet;
use serde_json::json;

use super::values::Elements;
use super::writer::{Content, OutFile, OutTensor, write_file, write_folder};
use super::{ConvertArgs, StoredAs, Target};
use crate::adapters::Loras;
use crate::args::AdapterArgs;
use crate::model_files::MODEL;
use crate::pipelines::is_distilled;
use crate::report::Report;

/// Where the blocks are among the keys.
const BLOCKS: &str = "model.diffusion_model.transformer_blocks.";

/// Blocks at either end that published fp8 files leave alone.
const WIDE_BLOCKS: usize = 2; // spec/transformer §9.2

/// Converts the model at `input`; `occurrences` says how many values each `--lora` had.
///
/// # Errors
/// Files that are no model, what a layout or dtype has no room for, LoRAs that do not fit, or a disk that fails.
pub fn run(args: &ConvertArgs, input: &Path, occurrences: &[usize], report: &mut Report) -> Result<()> {
    let layout = match args.to {
        None | Some(Target::Single) => Layout::Single,
        Some(Target::Split) => Layout::Split,
        Some(Target::Diffusers) => Layout::Diffusers,
        Some(other) => bail!(
            "`{}` is a model, and `{}` is a dialect of LoRAs; write it `--to single`, `split` or `diffusers`",
            input.display(),
            other.name()
        ),
    };
    let checkpoint = Checkpoint::open(input)?;
    super::refuse_input(&args.output, &checkpoint.paths())?;
    if let Some((_, key)) = checkpoint.ignored().first() {
        let count = checkpoint.ignored().len();
        report.note(&format!("note: {count} tensors belong to no part of the model and are left out, `{key}` for one"));
    }
    let change = Change::of(args, &checkpoint, occurrences, report)?;
    let tensors = change.tensors()?;
    let sizes: Vec<(String, u64)> = tensors.iter().map(|t| (t.key.clone(), t.bytes)).collect();
    let laid_out = lay_out(&checkpoint, layout, &name(input, &args.output), &sizes, is_distilled(&checkpoint))?;
    let LaidOut { files, side_files, left_out } = laid_out;
    if !left_out.is_empty() {
        let names = left_out.join(", ");
        report.note(&format!("note: {} tensors that nothing reads have no place there: {names}", left_out.len()));
    }
    let mut tensors: Vec<Option<OutTensor<'_>>> = tensors.into_iter().map(Some).collect();
    let files: Vec<OutFile<'_>> = files
        .into_iter()
        .map(|file| {
            // Each tensor is a member of one file.
            let members = file.members.into_iter().filter_map(|(key, i)| Some(OutTensor { key, ..tensors[i].take()? }));
            OutFile { path: file.path, metadata: file.metadata, tensors: members.collect() }
        })
        .collect();
    let written = match (layout, files.as_slice()) {
        (Layout::Single, [file]) => write_file(&args.output, file, report)?,
        (_, files) => write_folder(&args.output, files, &side_files, report)?,
    };
    let facts = json!({
        "tensors": written.tensors, "bytes": written.bytes, "files": files.len(), "left_out": left_out,
        "merged": change.merged.len(),
    });
    report.finish(&args.output, facts);
    Ok(())
}

/// What the names of split files begin with: the name of the input without its ending, or that of the folder.
fn name(input: &Path, output: &Path) -> String {
    let stem = if input.is_file() { input.file_stem() } else { output.file_name() };
    stem.map_or_else(|| "model".into(), |stem| stem.to_string_lossy().into_owned())
}

/// What happens to the tensors of a checkpoint.
struct Change<'a> {
    checkpoint: &'a Checkpoint,
    adapters: AdapterSet,
    /// Keys that adapters add to.
    merged: BTreeSet<String>,
    dtype: Option<StoredAs>,
    fp8_blocks: RangeInclusive<usize>,
}

/// How a tensor is stored.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// With the bytes that it has.
    Same,
    /// As f32, bf16 or f16.
    As(DType),
    /// As e4m3 with a scale beside it.
    Fp8,
}

impl<'a> Change<'a> {
    fn of(
        args: &ConvertArgs,
        checkpoint: &'a Checkpoint,
        occurrences: &[usize],
        report: &mut Report,
    ) -> Result<Change<'a>> {
        let adapters = AdapterArgs {
            lora: args.lora.clone(),
            lora_ignore_unmatched: args.lora_ignore_unmatched,
            ..AdapterArgs::default()
        };
        let (adapters, merged) =
            Loras::open(&adapters, occurrences)?.merged_into(&LoraTargets::of(checkpoint), report)?;
        let is_fp8 = args.dtype == Some(StoredAs::Fp8);
        if is_fp8 && checkpoint.has_fp8() {
            bail!("`{}` is stored in fp8 already; leave `--dtype fp8` out", checkpoint.name());
        }
        if args.fp8_blocks.is_some() && !is_fp8 {
            bail!("`--fp8-blocks` is for `--dtype fp8`; leave it out, or add that");
        }
        let fp8_blocks = if is_fp8 { blocks(args.fp8_blocks.as_deref(), checkpoint)? } else { 0..=0 };
        Ok(Change { checkpoint, adapters, merged, dtype: args.dtype, fp8_blocks })
    }

    /// All tensors of the result under canonical keys.
    fn tensors(&self) -> Result<Vec<OutTensor<'_>>> {
        let (mut tensors, mut narrow) = (Vec::new(), 0);
        for (key, at) in self.checkpoint.tensors() {
            if self.is_obsolete(key) {
                continue;
            }
            let form = self.form(key, &at);
            narrow += usize::from(form == Form::Fp8);
            self.add(key, &at, form, &mut tensors)?;
        }
        if self.dtype == Some(StoredAs::Fp8) && narrow == 0 {
            bail!(
                "`{}` has no linear layer in blocks {} to {}; name blocks that it has with `--fp8-blocks`",
                self.checkpoint.name(),
                self.fp8_blocks.start(),
                self.fp8_blocks.end()
            );
        }
        Ok(tensors)
    }

    /// Whether `key` is a scale of an fp8 weight that will be no fp8.
    fn is_obsolete(&self, key: &str) -> bool {
        let ends = ["weight_scale", "input_scale"];
        let Some((layer, _)) = key.rsplit_once('.').filter(|(_, end)| ends.contains(end)) else { return false };
        let weight = format!("{layer}.weight");
        let at = self.checkpoint.tensor(&weight).filter(|_| self.checkpoint.is_fp8(&weight));
        at.is_some_and(|at| self.form(&weight, &at) != Form::Same)
    }

    fn form(&self, key: &str, at: &Location<'_>) -> Form {
        let StoredType::Known(stored) = at.stored.dtype else { return Form::Same };
        if !stored.is_float() {
            return Form::Same;
        }
        let read = if self.checkpoint.is_fp8(key) { DType::BF16 } else { stored };
        let wanted = match self.dtype {
            Some(StoredAs::Fp8) if at.stored.shape.len() == 2 && self.is_block_weight(key) => return Form::Fp8,
            Some(wide) if wide != StoredAs::Fp8 => wide.dtype(),
            _ if self.merged.contains(key) => read,
            _ => stored,
        };
        if wanted == stored && !self.merged.contains(key) { Form::Same } else { Form::As(wanted) }
    }

    /// Whether `key` is a weight in one of the blocks that go to fp8.
    fn is_block_weight(&self, key: &str) -> bool {
        let block = key.strip_prefix(BLOCKS).filter(|_| key.ends_with(".weight")).and_then(|rest| rest.split_once('.'));
        block.and_then(|(n, _)| n.parse().ok()).is_some_and(|n: usize| self.fp8_blocks.contains(&n))
    }

    fn add<'s>(&'s self, key: &'s str, at: &Location<'_>, form: Form, out: &mut Vec<OutTensor<'s>>) -> Result<()> {
        let shape = at.stored.shape.clone();
        let elements = TensorType::new(DType::U8, shape.clone()).bytes() as u64;
        let mut push = |key: String, dtype: &'static str, element: usize, shape: Vec<usize>, bytes: u64, content| {
            out.push(OutTensor { key, dtype, element, shape, bytes, content });
        };
        match form {
            Form::Same => {
                let data = self.checkpoint.data(key).with_context(|| format!("`{key}` has no data"))?;
                let (name, element) = match at.stored.dtype {
                    StoredType::Known(dtype) => (format_name(dtype), dtype.bytes()),
                    StoredType::Other(name) => (name, (at.stored.bytes / elements.max(1)).max(1) as usize),
                };
                push(key.into(), name, element, shape, at.stored.bytes, super::copied(data));
            }
            Form::As(dtype) => {
                let bytes = elements.saturating_mul(dtype.bytes() as u64);
                let content: Content<'s> =
                    Box::new(move |to| self.with_elements(key, |elements| elements.write_as(key, dtype, to)));
                push(key.into(), format_name(dtype), dtype.bytes(), shape, bytes, content);
            }
            Form::Fp8 => {
                let codes: Content<'s> = Box::new(move |to| {
                    self.with_elements(key, |elements| elements.write_fp8(elements.fp8_factor(key)?, to))
                });
                push(key.into(), format_name(DType::F8E4M3), 1, shape, elements, codes);
                let scale: Content<'s> = Box::new(move |to| {
                    let factor = self.with_elements(key, |elements| elements.fp8_factor(key))?;
                    Ok(to.write_all(&(1.0 / factor).to_le_bytes())?)
                });
                push(format!("{key}_scale"), format_name(DType::F32), 4, Vec::new(), 4, scale);
            }
        }
        Ok(())
    }

    /// Hands the elements of a tensor over, with all adapters added as they are when a run loads it.
    fn with_elements<R>(&self, key: &str, take: impl FnOnce(Elements<'_>) -> Result<R>) -> Result<R> {
        let stored = Elements::of(self.checkpoint, key)?;
        if !self.merged.contains(key) {
            return take(stored);
        }
        let dtype = stored.read_dtype();
        let shape = self.checkpoint.tensor(key).map(|at| at.stored.shape.clone()).unwrap_or_default();
        let made;
        let base = match self.checkpoint.data(key).filter(|_| !self.checkpoint.is_fp8(key)) {
            Some(data) => data,
            None => {
                made = stored.to_vec(key, dtype)?;
                &made
            }
        };
        match self.adapters.merged(MODEL, key, &TensorType::new(dtype, shape), base)? {
            Some(merged) => take(Elements::plain(merged.bytes(), dtype)),
            None => take(Elements::plain(base, dtype)),
        }
    }
}

/// The blocks that go to fp8: those named, or all but two at either end.
fn blocks(named: Option<&str>, checkpoint: &Checkpoint) -> Result<RangeInclusive<usize>> {
    let layers = TransformerConfig::from_json(checkpoint.section("transformer")?)?.layers;
    if let Some(text) = named {
        let range = text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
        return match range {
            Some((first, last)) if first <= last && last < layers => Ok(first..=last),
            _ => bail!(
                "`--fp8-blocks {text}` names no blocks; write FIRST-LAST, both from 0 to {}",
                layers.saturating_sub(1)
            ),
        };
    }
    if layers <= 2 * WIDE_BLOCKS {
        bail!(
            "published fp8 files leave {WIDE_BLOCKS} blocks at either end alone, and `{}` has {layers}; name blocks with \
             `--fp8-blocks FIRST-LAST`",
            checkpoint.name()
        );
    }
    Ok(WIDE_BLOCKS..=layers - 1 - WIDE_BLOCKS)
}
