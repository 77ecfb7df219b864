//! One mapped safetensors file.

use std::fs::File;
use std::path::{Path, PathBuf};

use ltxc_ir::TensorType;
use ltxc_ir::identity::{FileIdentity, Span};
use memmap2::Mmap;
use serde_json::Value;

use super::header::{Header, StoredTensor};
use super::metadata::Metadata;
use crate::{ModelError, TensorDirectory};

/// Largest side file (configuration, index, tokenizer) that is read, in bytes.
const MAX_SIDE_FILE: u64 = 256 << 20;

/// A safetensors file: its checked header, and its bytes as a read-only map.
pub struct WeightFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
    metadata: Metadata,
}

impl WeightFile {
    /// Maps `path` and reads its header.
    ///
    /// # Errors
    /// If it cannot be read or its header is not what the format asks for; the message says what to do.
    pub fn open(path: &Path) -> Result<WeightFile, ModelError> {
        let file = File::open(path).map_err(ModelError::io(path, "open"))?;
        let about = file.metadata().map_err(ModelError::io(path, "open"))?;
        if !about.is_file() {
            return Err(ModelError::file(path, "is no file, expected a `.safetensors` file; name the file inside"));
        }
        if about.len() == 0 {
            return Err(ModelError::file(path, "is empty, expected a `.safetensors` file; download it again"));
        }
        // SAFETY: the map is private and read-only. It stays valid as long as no other process truncates the file;
        // weight files are not written while in use, and no reader in user space can protect itself from that.
        let map = unsafe { Mmap::map(&file) }.map_err(ModelError::io(path, "map"))?;
        let header = Header::parse(&map).map_err(|problem| ModelError::file(path, problem))?;
        let metadata = Metadata::parse(&header.metadata)
            .map_err(|p| ModelError::file(path, format!("{p}; use the file as published")))?;
        Ok(WeightFile { path: path.into(), map, header, metadata })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What its header says about the model.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The bytes of one of its tensors.
    pub fn data(&self, tensor: &StoredTensor) -> &[u8] {
        // The header was checked against the length of this map, so the range is inside; an empty slice is what a
        // tensor of another file would get.
        let start = tensor.offset as usize;
        self.map.get(start..start.saturating_add(tensor.bytes as usize)).unwrap_or_default()
    }

    /// What the file is recognised by; `full` also hashes all of it.
    ///
    /// # Errors
    /// If the file changed since it was opened.
    pub fn identity(&self, full: bool) -> Result<FileIdentity, ModelError> {
        // Reading ahead of a sample would read most of the file.
        self.read_ahead(false);
        let spans: Vec<Span<'_>> = self.header.tensors.iter().map(StoredTensor::span).collect();
        let identity = FileIdentity::of(&self.map, self.header.data_start, &spans).map_err(|e| {
            ModelError::file(&self.path, format!("header does not describe the file: {e}; open it again"))
        })?;
        self.read_ahead(true);
        let identity = if full { identity.with_full_hash(&self.map) } else { identity };
        Ok(FileIdentity { sha256: cached_sha256(&self.path), ..identity })
    }

    /// Tells the system whether to read more than it is asked for. It may refuse, which costs time and nothing else.
    fn read_ahead(&self, wanted: bool) {
        #[cfg(unix)]
        let _ = self.map.advise(if wanted { memmap2::Advice::Normal } else { memmap2::Advice::Random });
        #[cfg(not(unix))]
        let _ = wanted;
    }
}

impl TensorDirectory for WeightFile {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.header.tensor(key).and_then(StoredTensor::ty)
    }
}

/// The SHA-256 that the Hugging Face cache names a blob by, if `path` leads to such a blob.
fn cached_sha256(path: &Path) -> Option<[u8; 32]> {
    let blob = path.canonicalize().ok()?;
    if blob.parent()?.file_name()? != "blobs" {
        return None;
    }
    let name = blob.file_name()?.to_str()?.as_bytes();
    let mut sha256 = [0u8; 32];
    if name.len() != 64 {
        return None;
    }
    for (byte, pair) in sha256.iter_mut().zip(name.chunks_exact(2)) {
        let digit = |c: u8| (c as char).to_digit(16);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(sha256)
}

/// Reads a side file whole.
///
/// # Errors
/// If it cannot be read or is implausibly large.
pub(super) fn read_side_file(path: &Path) -> Result<Vec<u8>, ModelError> {
    let bytes = std::fs::metadata(path).map_err(ModelError::io(path, "read"))?.len();
    if bytes > MAX_SIDE_FILE {
        return Err(ModelError::file(
            path,
            format!("has {bytes} bytes, expected at most {MAX_SIDE_FILE}; check the folder"),
        ));
    }
    std::fs::read(path).map_err(ModelError::io(path, "read"))
}

/// Reads a JSON side file.
///
/// # Errors
/// If it cannot be read or is no JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value, ModelError> {
    let bytes = read_side_file(path)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| ModelError::file(path, format!("is not valid JSON: {e}; download it again")))
}

/// End of the names of indices: the files that say which shard has which tensor.
const INDEX: &str = ".safetensors.index.json";

/// Whether `path` is an index of shards.
fn is_index(path: &Path) -> bool {
    path.file_name().and_then(|n| n.to_str()).is_some_and(|name| name.ends_with(INDEX))
}

/// Whether `folder` has an index of shards.
///
/// # Errors
/// If it cannot be read.
pub(super) fn has_index(folder: &Path) -> Result<bool, ModelError> {
    Ok(list(folder)?.iter().any(|entry| is_index(entry)))
}

/// The files that `path` stands for: the shards of an index, or of a folder with one; otherwise the file itself.
///
/// # Errors
/// Those of [`shards`].
pub(super) fn stored_in(path: &Path) -> Result<Vec<PathBuf>, ModelError> {
    match path.parent() {
        _ if path.is_dir() && has_index(path)? => shards(path, ""),
        Some(folder) if is_index(path) => {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            shards(folder, name.strip_suffix(INDEX).unwrap_or_default())
        }
        _ => Ok(vec![path.into()]),
    }
}

/// The safetensors files directly in `folder`, sorted. `stem` is what their names start with.
///
/// With an index (`*.safetensors.index.json`) these are the files it names, all of which must be there.
///
/// # Errors
/// If the folder cannot be read, the index is malformed or names a file that is not there.
pub fn shards(folder: &Path, stem: &str) -> Result<Vec<PathBuf>, ModelError> {
    let entries = list(folder)?;
    let name = |p: &Path| p.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_string();
    let index = entries.iter().find(|p| name(p).starts_with(stem) && is_index(p));
    let Some(index) = index else {
        return Ok(entries.into_iter().filter(|p| name(p).starts_with(stem) && is_safetensors(p)).collect());
    };
    let json = read_json(index)?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return Err(ModelError::file(index, "has no object `weight_map`; download it again"));
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for value in map.values() {
        let Some(file) = value.as_str().filter(|f| is_plain_name(f)) else {
            return Err(ModelError::file(
                index,
                format!("names the shard {value}, expected a file name; download it again"),
            ));
        };
        files.push(folder.join(file));
    }
    files.sort();
    files.dedup();
    match files.iter().find(|f| !f.is_file()) {
        Some(missing) => {
            let problem =
                format!("names the shard `{}`, which is not there; download the missing shard", name(missing));
            Err(ModelError::file(index, problem))
        }
        None => Ok(files),
    }
}

/// Entries of a folder, sorted by name.
pub(super) fn list(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let entries = std::fs::read_dir(folder).map_err(ModelError::io(folder, "list"))?;
    let mut paths =
        entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(ModelError::io(folder, "list"))?;
    paths.sort();
    Ok(paths)
}

/// Whether `path` has the ending of safetensors files.
pub(super) fn is_safetensors(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "safetensors" || e == "sft")
}

/// Whether `name` stays in its folder.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['/', '\\']) && name != "." && name != ".."
}
