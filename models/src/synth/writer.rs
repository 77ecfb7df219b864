//! Writing safetensors files: with values, or sparse with nothing but a header.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use ltxc_ir::DType;
use serde_json::{Map, Value, json};

use super::tensors::TensorSpec;
use super::values;
use crate::ModelError;
use crate::checkpoint::header::format_name;

/// What the data of a file is.
#[derive(Clone, Copy)]
pub(super) enum Data {
    /// Random values of this seed.
    Random(u64),
    /// A hole in the file: reads as zeros and takes no space on the disk.
    Sparse,
}

/// Bytes of a bf16 element.
const ELEMENT: u64 = 2;

/// Writes `tensors` as bf16, sorted by key as the reference implementation does. The file appears when it is complete.
///
/// # Errors
/// If the folder cannot be written.
pub(super) fn write(
    path: &Path,
    metadata: &[(&str, String)],
    tensors: &[TensorSpec],
    data: Data,
) -> Result<(), ModelError> {
    let mut tensors: Vec<&TensorSpec> = tensors.iter().collect();
    tensors.sort();
    let (header, data_bytes) = header(path, metadata, &tensors)?;
    let part = path.with_extension("part");
    let file = File::create(&part).map_err(ModelError::io(&part, "create"))?;
    let mut out = BufWriter::new(file);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(ModelError::io(&part, "write"));
    put(&(header.len() as u64).to_le_bytes())?;
    put(&header)?;
    if let Data::Random(seed) = data {
        for tensor in tensors {
            put(&values::bytes(seed, tensor))?;
        }
    }
    let file = out.into_inner().map_err(|e| ModelError::io(&part, "write")(e.into_error()))?;
    file.set_len(8 + header.len() as u64 + data_bytes).map_err(ModelError::io(&part, "extend"))?;
    fs::rename(&part, path).map_err(ModelError::io(path, "create"))
}

/// The JSON header, padded to 8 bytes, and the length of the data.
fn header(path: &Path, metadata: &[(&str, String)], tensors: &[&TensorSpec]) -> Result<(Vec<u8>, u64), ModelError> {
    let strings: Map<String, Value> = metadata.iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
    let mut text = format!("{{\"__metadata__\":{}", Value::Object(strings));
    let mut end = 0u64;
    for tensor in tensors {
        let begin = end;
        let bytes = tensor.elements().and_then(|n| n.checked_mul(ELEMENT));
        end = bytes
            .and_then(|bytes| begin.checked_add(bytes))
            .ok_or_else(|| ModelError::file(path, format!("`{}` would be larger than any file", tensor.key)))?;
        let entry = json!({ "dtype": format_name(DType::BF16), "shape": tensor.shape, "data_offsets": [begin, end] });
        text += &format!(",{}:{entry}", json!(tensor.key));
    }
    text.push('}');
    while text.len() % 8 != 0 {
        text.push(' ');
    }
    Ok((text.into_bytes(), end))
}

/// Writes `tensors` into `count` files of about the same size, with an index, as Hugging Face folders have them.
///
/// # Errors
/// As for [`write`].
pub(super) fn write_shards(
    folder: &Path,
    metadata: &[(&str, String)],
    tensors: &[TensorSpec],
    count: usize,
    data: Data,
) -> Result<Vec<PathBuf>, ModelError> {
    let bytes = |tensor: &TensorSpec| tensor.elements().unwrap_or(u64::MAX).saturating_mul(ELEMENT);
    let total: u64 = tensors.iter().map(bytes).fold(0, u64::saturating_add);
    let mut shards: Vec<Vec<TensorSpec>> = vec![Vec::new(); count.max(1)];
    let mut before = 0u64;
    for tensor in tensors {
        // The shard that the middle of the tensor falls into.
        let middle = before.saturating_add(bytes(tensor) / 2);
        let shard = (middle as u128 * shards.len() as u128 / total.max(1) as u128) as usize;
        let last = shards.len() - 1;
        shards[shard.min(last)].push(tensor.clone());
        before = before.saturating_add(bytes(tensor));
    }
    let (mut paths, mut map) = (Vec::new(), Map::new());
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write(&folder.join(&name), metadata, shard, data)?;
        map.extend(shard.iter().map(|t| (t.key.clone(), json!(name))));
        paths.push(folder.join(name));
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    write_json(&folder.join("model.safetensors.index.json"), &index)?;
    Ok(paths)
}

/// Writes a JSON side file.
///
/// # Errors
/// If it cannot be written.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    fs::write(path, format!("{value:#}\n")).map_err(ModelError::io(path, "write"))
}
