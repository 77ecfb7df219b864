//! Safetensors files, written tensor by tensor: nothing of a file is in memory but the tensor that is on its way.
//!
//! The header is known before the first byte, so what is needed is compared with the free space of the disk, and nothing is
//! begun that cannot end. A file or folder appears under its name when it is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use ltxc_models::checkpoint::header::MAX_HEADER;
use ltxc_runtime::RunError;
use ltxc_runtime::files::{write_folder_with, write_with};
use ltxc_runtime::memory::readable;
use serde_json::{Value, json};

use super::space::free_bytes;
use crate::report::Report;
use crate::run::INTERRUPT;

/// Gives the bytes of a tensor, all of them and no more.
pub type Content<'a> = Box<dyn Fn(&mut dyn Write) -> Result<()> + 'a>;

/// A tensor to write.
pub struct OutTensor<'a> {
    /// Its key in the file.
    pub key: String,
    /// Element type by its name in the format.
    pub dtype: &'static str,
    /// Bytes of an element; tensors with larger ones come first, which aligns them all.
    pub element: usize,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Length in bytes.
    pub bytes: u64,
    /// Its bytes.
    pub content: Content<'a>,
}

/// A file to write.
pub struct OutFile<'a> {
    /// Where it is in the folder; empty if it is alone.
    pub path: PathBuf,
    /// Strings of its header.
    pub metadata: BTreeMap<String, String>,
    /// Its tensors, in any order.
    pub tensors: Vec<OutTensor<'a>>,
}

/// What was written.
pub struct Written {
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all files with tensors.
    pub bytes: u64,
}

/// A file whose header is ready.
struct Ready<'f, 'a> {
    path: &'f Path,
    header: Vec<u8>,
    tensors: Vec<&'f OutTensor<'a>>,
    bytes: u64,
}

/// Writes one file.
///
/// # Errors
/// Two tensors of one key, a disk that is too small or fails, or what keeps a tensor from being made; nothing is left then.
pub fn write_file(to: &Path, file: &OutFile<'_>, report: &mut Report) -> Result<Written> {
    let ready = ready(file)?;
    check_space(to, ready.bytes)?;
    let mut progress = Progress::begin(report, std::slice::from_ref(&ready));
    write_with(to, |out| ready.write(to, out, &mut progress))?;
    Ok(progress.end())
}

/// Writes a folder with `files` and the JSON files `sides`.
///
/// # Errors
/// Those of [`write_file`], or a folder that is there and not empty.
pub fn write_folder(
    to: &Path,
    files: &[OutFile<'_>],
    sides: &[(PathBuf, Value)],
    report: &mut Report,
) -> Result<Written> {
    let ready = files.iter().map(ready).collect::<Result<Vec<_>>>()?;
    check_space(to, ready.iter().fold(0, |sum, file| sum.saturating_add(file.bytes)))?;
    let mut progress = Progress::begin(report, &ready);
    write_folder_with(to, |folder| -> Result<()> {
        for file in &ready {
            write_with(&folder.join(file.path), |out| file.write(&to.join(file.path), out, &mut progress))?;
        }
        for (path, value) in sides {
            write_with(&folder.join(path), |out| -> Result<()> {
                Ok(writeln!(out, "{value:#}").map_err(|e| RunError::io(to, e))?)
            })?;
        }
        Ok(())
    })?;
    Ok(progress.end())
}

fn ready<'f, 'a>(file: &'f OutFile<'a>) -> Result<Ready<'f, 'a>> {
    let mut tensors: Vec<&OutTensor<'_>> = file.tensors.iter().collect();
    tensors.sort_by(|a, b| b.element.cmp(&a.element).then_with(|| a.key.cmp(&b.key)));
    let (mut keys, mut end, mut text) = (BTreeSet::new(), 0u64, String::from("{"));
    if !file.metadata.is_empty() {
        text += &format!("\"__metadata__\":{}", json!(file.metadata));
    }
    for tensor in &tensors {
        if !keys.insert(&tensor.key) {
            bail!("two tensors would have the key `{}`; write each of them under a name of its own", tensor.key);
        }
        let begin = end;
        end = begin.checked_add(tensor.bytes).with_context(|| format!("`{}` is larger than any file", tensor.key))?;
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]});
        let comma = if text.len() > 1 { "," } else { "" };
        text += &format!("{comma}{}:{entry}", json!(tensor.key));
    }
    text.push('}');
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    if text.len() as u64 > MAX_HEADER {
        bail!(
            "the header of {} tensors has {} bytes, the format takes {MAX_HEADER}; leave some out",
            keys.len(),
            text.len()
        );
    }
    let header = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let bytes = end.saturating_add(header.len() as u64);
    Ok(Ready { path: &file.path, header, tensors, bytes })
}

fn check_space(to: &Path, needed: u64) -> Result<()> {
    match free_bytes(to) {
        Some(free) if free < needed => bail!(
            "`{}` needs {}, {} are free on its disk; make room, or choose another place",
            to.display(),
            readable(needed),
            readable(free)
        ),
        _ => Ok(()),
    }
}

impl Ready<'_, '_> {
    /// `to` is what messages call the file.
    fn write(&self, to: &Path, out: &mut File, progress: &mut Progress<'_>) -> Result<()> {
        let failed = |e: std::io::Error| RunError::io(to, e);
        let mut out = Counted { out: BufWriter::with_capacity(1 << 20, out), bytes: 0 };
        out.write_all(&self.header).map_err(failed)?;
        for tensor in &self.tensors {
            if INTERRUPT.load(Ordering::Relaxed) {
                return Err(RunError::Interrupted.into());
            }
            let before = out.bytes;
            (tensor.content)(&mut out).map_err(|e| match e.downcast::<std::io::Error>() {
                Ok(e) => failed(e).into(),
                Err(e) => e,
            })?;
            if out.bytes - before != tensor.bytes {
                let found = out.bytes - before;
                return Err(
                    RunError::Internal(format!("`{}` has {found} bytes, not {}", tensor.key, tensor.bytes)).into()
                );
            }
            progress.add(tensor.bytes);
        }
        Ok(out.flush().map_err(failed)?)
    }
}

struct Counted<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// What of all files is done, in megabytes.
struct Progress<'r> {
    report: &'r mut Report,
    tensors: usize,
    done: u64,
}

const MEGABYTE: u64 = 1_000_000;

impl<'r> Progress<'r> {
    fn begin(report: &'r mut Report, files: &[Ready<'_, '_>]) -> Progress<'r> {
        let all = files.iter().flat_map(|f| &f.tensors).fold(0u64, |sum, tensor| sum.saturating_add(tensor.bytes));
        report.begin("convert", (all / MEGABYTE) as usize);
        Progress { report, tensors: 0, done: 0 }
    }

    fn add(&mut self, bytes: u64) {
        let before = self.done / MEGABYTE;
        (self.tensors, self.done) = (self.tensors + 1, self.done + bytes);
        if self.done / MEGABYTE > before {
            self.report.step((self.done / MEGABYTE) as usize);
        }
    }

    fn end(self) -> Written {
        self.report.end();
        Written { tensors: self.tensors, bytes: self.done }
    }
}
