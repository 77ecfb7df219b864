//! Weights and inputs: random numbers with the keys and shapes of published models, in files that both sides read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use half::bf16;
use ltxc_ir::DType;
use ltxc_models::checkpoint::{Checkpoint, GemmaFolder};
use ltxc_models::synth::tensors::TensorSpec;
use ltxc_models::synth::{Preset, synth};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

/// Configurations of a published model: `config` of the checkpoint, and that of its text encoder.
///
/// # Errors
/// If the temporary folder cannot be written.
pub fn published_configs(preset: Preset) -> Result<(Value, Value)> {
    let folder = tempfile::tempdir()?;
    let files = synth(preset, folder.path(), 0)?;
    let model = Checkpoint::open(&files.checkpoint)?.config().clone();
    Ok((model, GemmaFolder::open(&files.gemma)?.config().clone()))
}

/// Configuration of the spatial upsampler of a published model.
///
/// # Errors
/// If the temporary folder cannot be written.
pub fn published_upsampler(preset: Preset) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    let files = synth(preset, folder.path(), 0)?;
    let path = files.upsamplers.first().context("the model has no upsampler")?;
    Ok(Checkpoint::open_upsampler(path)?.config().clone())
}

/// Writes a checkpoint with `config` in its metadata and random weights, stored as f32 or bf16. Values are the same for
/// both: every one is a bf16 number.
///
/// # Errors
/// If the file cannot be written, or is larger than any file.
pub fn write_checkpoint(path: &Path, config: &Value, tensors: &[TensorSpec], dtype: DType) -> Result<()> {
    let file = File::create(path).with_context(|| format!("`{}`", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let header = header(config, tensors, dtype)?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for tensor in tensors {
        let len = tensor.elements().context("a tensor that is too large")?;
        let mut numbers = Numbers::of_key(&tensor.key);
        let (centre, reach) = range(tensor);
        for _ in 0..len {
            let value = bf16::from_f32(centre + reach * numbers.next());
            match dtype {
                DType::BF16 => out.write_all(&value.to_le_bytes())?,
                _ => out.write_all(&value.to_f32().to_le_bytes())?,
            }
        }
    }
    out.flush().with_context(|| format!("`{}`", path.display()))
}

/// Header of a safetensors file with `tensors` in this order, padded to 8 bytes.
fn header(config: &Value, tensors: &[TensorSpec], dtype: DType) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "config": config.to_string(), "synthetic": "true" }));
    let name = if dtype == DType::BF16 { "BF16" } else { "F32" };
    let element = if dtype == DType::BF16 { DType::BF16 } else { DType::F32 }.bytes() as u64;
    let mut end = 0u64;
    for tensor in tensors {
        let bytes = tensor.elements().and_then(|n| n.checked_mul(element)).context("a tensor that is too large")?;
        let begin = end;
        end = begin.checked_add(bytes).context("a file that is too large")?;
        entries.insert(tensor.key.clone(), json!({"dtype": name, "shape": tensor.shape, "data_offsets": [begin, end]}));
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok(text)
}

/// Centre and half width of the values of a tensor: those under which activations keep their scale.
fn range(tensor: &TensorSpec) -> (f32, f32) {
    let leaf = tensor.key.rsplit('.').next().unwrap_or_default();
    match tensor.shape.as_slice() {
        _ if leaf == "std-of-means" => (1.0, 0.4),
        _ if leaf == "bias" || leaf == "mean-of-means" || leaf.contains("table") => (0.0, 0.2),
        [] | [_] => (1.0, 0.4),
        [_, inner @ ..] => (0.0, (3.0 / inner.iter().product::<usize>().max(1) as f32).sqrt()),
    }
}

/// Uniform numbers in [-1, 1), always the same for a key.
pub struct Numbers(u64);

impl Numbers {
    /// The numbers of `key`.
    pub fn of_key(key: &str) -> Numbers {
        // FNV-1a.
        let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3));
        Numbers(hash | 1)
    }

    /// The next one: xorshift64, the upper 24 bits.
    #[allow(clippy::should_implement_trait)] // it never ends
    pub fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 * (2.0 / (1 << 24) as f32) - 1.0
    }

    /// `len` of them, with a variance of 1.
    pub fn normalised(key: &str, len: usize) -> Vec<f32> {
        let mut numbers = Numbers::of_key(key);
        (0..len).map(|_| 3f32.sqrt() * numbers.next()).collect()
    }
}

/// A tensor of f32 with its shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub data: Vec<f32>,
}

/// Writes named tensors for a worker.
///
/// # Errors
/// If the file cannot be written.
pub fn write_values(path: &Path, values: &BTreeMap<String, Values>) -> Result<()> {
    let mut views = Vec::new();
    for (name, v) in values {
        views.push((name, TensorView::new(Dtype::F32, v.shape.clone(), bytemuck::cast_slice(&v.data))?));
    }
    safetensors::serialize_to_file(views, None, path).with_context(|| format!("`{}`", path.display()))
}

/// Reads what a worker wrote.
///
/// # Errors
/// A file that cannot be read, or with other tensors than f32.
pub fn read_values(path: &Path) -> Result<BTreeMap<String, Values>> {
    let bytes = std::fs::read(path).with_context(|| format!("`{}`", path.display()))?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let mut values = BTreeMap::new();
    for (name, view) in tensors.tensors() {
        anyhow::ensure!(view.dtype() == Dtype::F32, "`{name}` in `{}` is not f32", path.display());
        let data = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        values.insert(name, Values { shape: view.shape().to_vec(), data: data.collect() });
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_read_back_with_the_same_values_in_both_dtypes() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = [("a.weight", vec![3, 5]), ("a.bias", vec![3])];
        let tensors = tensors.map(|(key, shape)| TensorSpec { key: key.into(), shape });
        let values = [DType::F32, DType::BF16].map(|dtype| {
            let path = folder.path().join(dtype.name());
            write_checkpoint(&path, &json!({}), &tensors, dtype).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let data = file.tensor("a.weight").unwrap().data().to_vec();
            match dtype {
                DType::BF16 => data.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect::<Vec<_>>(),
                _ => bytemuck::pod_collect_to_vec(&data),
            }
        });
        assert_eq!(values[0], values[1]);
        assert!(values[0].iter().all(|v| v.abs() < 0.8) && values[0][0] != values[0][1]);
    }

    #[test]
    fn numbers_have_the_variance_they_say() {
        let numbers = Numbers::normalised("key", 10_000);
        let square = numbers.iter().map(|x| x * x).sum::<f32>() / 10_000.0;
        assert!((square - 1.0).abs() < 0.05, "{square}");
    }
}
