//! Files of tensors that tools exchange: `.safetensors`, `.npy`, `.npz` and `.pt`, so that runs of several tools can start
//! from the same noise and the same contexts.
//!
//! | file | what |
//! | --- | --- |
//! | `npy` | NumPy arrays: a header and values |
//! | `archive` | zip archives of bounded size: `.npz` is one of arrays, `.pt` one of a pickle and storages |
//! | `pickle` | the part of the pickle format that tensors need; nothing that a file says is executed |
//! | `pt` | tensors of a `.pt` file |
//!
//! Source: spec/debug-tools §6.

mod archive;
mod npy;
mod pickle;
mod pt;

use std::path::{Path, PathBuf};

use ltxc_ir::eval::Tensor;
use ltxc_ir::{DType, TensorType};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::RunError;
use crate::files::write_atomically;
use crate::weights::dtype_of;

pub use pt::around as pt_around;

/// A kind of file, by the extension of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// `.safetensors`
    Safetensors,
    /// `.npy`
    Npy,
    /// `.npz`
    Npz,
    /// `.pt`
    Pt,
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Name in the file; empty where a file holds a single tensor without one.
    pub name: String,
    /// Dtype that it is stored in.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<f32>,
}

/// Why a file cannot be read as tensors.
pub type Problem = String;

impl Container {
    /// The kind that a path names.
    ///
    /// # Errors
    /// Another extension.
    pub fn of(path: &Path) -> Result<Container, RunError> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        Ok(match extension.as_str() {
            "safetensors" => Container::Safetensors,
            "npy" => Container::Npy,
            "npz" => Container::Npz,
            "pt" | "pth" => Container::Pt,
            _ => {
                return Err(RunError::Input(format!(
                    "`{}` has no extension of a file of tensors; name it .safetensors, .npy, .npz or .pt",
                    path.display()
                )));
            }
        })
    }

    /// The bytes of a file that holds `tensor`, under its name where the format has names.
    ///
    /// # Errors
    /// A dtype that the format does not have, or more values than it can count.
    pub fn encode(self, tensor: &Stored) -> Result<Vec<u8>, RunError> {
        self.encode_all(std::slice::from_ref(tensor))
    }

    /// The bytes of a file that holds `tensors` under their names.
    ///
    /// # Errors
    /// Those of [`Container::encode`], and several tensors in a format that holds one.
    pub fn encode_all(self, tensors: &[Stored]) -> Result<Vec<u8>, RunError> {
        let encoded = match (self, tensors) {
            (Container::Safetensors, _) => {
                let bytes: Vec<Vec<u8>> = tensors.iter().map(Stored::bytes).collect();
                let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
                    let view = TensorView::new(stored_dtype(tensor.dtype)?, tensor.shape.clone(), bytes);
                    view.map(|view| (tensor.name.as_str(), view)).map_err(|e| RunError::Internal(e.to_string()))
                });
                let views = views.collect::<Result<Vec<_>, RunError>>()?;
                safetensors::serialize(views, None).map_err(|e| e.to_string())
            }
            (Container::Npy, [tensor]) => npy::encode(tensor),
            (Container::Npy, _) => Err(format!("an `.npy` file holds one tensor, not {}; use .npz", tensors.len())),
            (Container::Npz, _) => {
                let name = |tensor: &Stored| if tensor.name.is_empty() { "noise".into() } else { tensor.name.clone() };
                let arrays = tensors.iter().map(|t| Ok((format!("{}.npy", name(t)), npy::encode(t)?)));
                arrays.collect::<Result<Vec<_>, Problem>>().and_then(|arrays| archive::encode(&arrays))
            }
            (Container::Pt, _) => pt::encode(tensors),
        };
        encoded.map_err(|problem| RunError::Input(format!("tensors cannot be written: {problem}")))
    }

    /// The tensors in the bytes of a file.
    ///
    /// # Errors
    /// Bytes that are no such file, or hold anything but tensors.
    pub fn decode(self, bytes: &[u8]) -> Result<Vec<Stored>, String> {
        match self {
            Container::Safetensors => decode_safetensors(bytes),
            Container::Npy => npy::decode(bytes, "").map(|t| vec![t]),
            Container::Npz => archive::entries(bytes)?
                .into_iter()
                .filter_map(|(name, array)| Some((name.strip_suffix(".npy")?.to_string(), array)))
                .map(|(name, array)| npy::decode(&array, &name).map_err(|e| format!("`{name}`: {e}")))
                .collect(),
            Container::Pt => pt::decode(bytes),
        }
    }
}

impl Stored {
    /// An f32 tensor called `name`.
    pub fn f32(name: &str, shape: &[usize], values: Vec<f32>) -> Stored {
        Stored { name: name.into(), dtype: DType::F32, shape: shape.into(), values }
    }

    /// The values as they stand in a file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        if self.dtype == DType::F32 {
            return bytemuck::cast_slice(&self.values).to_vec();
        }
        let ty = TensorType::new(self.dtype, self.shape.clone());
        let wide = self.values.iter().map(|&v| f64::from(v)).collect();
        Tensor { ty, data: ltxc_ir::eval::Data::Float(wide) }.to_bytes()
    }

    /// Values of a dtype and shape from bytes. Integers and flags become numbers.
    ///
    /// # Errors
    /// Bytes of another number, or a shape that overflows.
    pub(crate) fn from_bytes(name: &str, dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Stored, Problem> {
        let ty = TensorType::new(dtype, shape.to_vec());
        match ty.checked_bytes() {
            Some(expected) if expected == bytes.len() => {}
            _ => return Err(format!("{} bytes for {ty}", bytes.len())),
        }
        let values = crate::stats::decoded(&ty, bytes);
        Ok(Stored { name: name.into(), dtype, shape: shape.into(), values })
    }
}

/// Integers of 64 bits, which masks often are, as tensors of 32.
fn narrowed(bytes: &[u8]) -> Vec<u8> {
    let narrow = |b: &[u8; 8]| i64::from_le_bytes(*b).clamp(i32::MIN.into(), i32::MAX.into()) as i32;
    bytes.as_chunks::<8>().0.iter().flat_map(|b| narrow(b).to_le_bytes()).collect()
}

/// Reads all tensors of a file.
///
/// # Errors
/// A file that cannot be read or is damaged.
pub fn read(path: &Path) -> Result<Vec<Stored>, RunError> {
    let container = Container::of(path)?;
    let bytes = std::fs::read(path).map_err(|e| RunError::io(path, e))?;
    container.decode(&bytes).map_err(|problem| bad(path, &problem))
}

/// Writes a file with one tensor.
///
/// # Errors
/// A file that cannot be written.
pub fn write(path: &Path, tensor: &Stored) -> Result<(), RunError> {
    write_all(path, std::slice::from_ref(tensor))
}

/// Writes a file with these tensors.
///
/// # Errors
/// A file that cannot be written.
pub fn write_all(path: &Path, tensors: &[Stored]) -> Result<(), RunError> {
    write_atomically(path, &Container::of(path)?.encode_all(tensors)?)
}

/// Names under which the noise of a slot stands in files, the one that is written first.
///
/// `slot`: `stage1.video`, `stage1.audio`, `stage2.video`, `stage2.audio`, or any other.
pub fn keys(slot: &str) -> &'static [&'static str] {
    match slot {
        "stage1.video" => &["video_latent", "latent", "noise"],
        "stage1.audio" => &["audio_latent", "latent", "audio", "noise"],
        _ => &["noise", "latent_noise", "latent", "video_noise"],
    }
}

/// The tensor of a file that is the noise of `slot`: the only one, or the one with a known name.
///
/// # Errors
/// Several tensors, none of which has a name of this slot.
pub fn pick(path: &Path, slot: &str) -> Result<Stored, RunError> {
    let mut tensors = read(path)?;
    if let Some(tensor) = tensors.iter().find(|t| !t.dtype.is_float()) {
        return Err(bad(path, &format!("`{}` is {}, expected floating point", tensor.name, tensor.dtype)));
    }
    if tensors.len() == 1 && (tensors[0].name.is_empty() || keys(slot).contains(&tensors[0].name.as_str())) {
        return Ok(tensors.remove(0));
    }
    let known = keys(slot).iter().find_map(|key| tensors.iter().position(|t| t.name == *key));
    match known {
        Some(at) => Ok(tensors.swap_remove(at)),
        None => {
            let found: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
            let problem = format!("it holds `{}`, expected one of `{}`", found.join("`, `"), keys(slot).join("`, `"));
            Err(bad(path, &problem))
        }
    }
}

/// The file of a slot in a folder of noise files, as `<slot>.<extension>`: the one that is there, else a new one.
pub fn in_folder(folder: &Path, slot: &str) -> PathBuf {
    let named = |extension: &str| folder.join(format!("{slot}.{extension}"));
    let known = ["safetensors", "npy", "npz", "pt"].map(named);
    known.iter().find(|path| path.exists()).unwrap_or(&known[0]).clone()
}

/// The name under which the noise of `slot` is written to a file of this kind.
pub fn key_for(container: Container, slot: &str) -> &'static str {
    match container {
        Container::Safetensors | Container::Npz => "noise",
        Container::Npy => "",
        Container::Pt => keys(slot)[0],
    }
}

fn bad(path: &Path, problem: &str) -> RunError {
    RunError::Input(format!("file of tensors `{}`: {problem}", path.display()))
}

fn decode_safetensors(bytes: &[u8]) -> Result<Vec<Stored>, Problem> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        let tensor = match dtype_of(view.dtype()) {
            Some(dtype) => Stored::from_bytes(&name, dtype, view.shape(), view.data()),
            None if view.dtype() == Dtype::I64 => {
                Stored::from_bytes(&name, DType::I32, view.shape(), &narrowed(view.data()))
            }
            None => Err(format!("it is {:?}", view.dtype())),
        };
        tensors.push(tensor.map_err(|e| format!("`{name}`: {e}"))?);
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn stored_dtype(dtype: DType) -> Result<Dtype, RunError> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::BF16 => Ok(Dtype::BF16),
        DType::F16 => Ok(Dtype::F16),
        other => Err(RunError::Input(format!("noise is not written in {other}; use f32, bf16 or f16"))),
    }
}

/// Paths of noise files, by slot.
pub type NoisePaths = std::collections::BTreeMap<String, PathBuf>;

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Container; 4] = [Container::Safetensors, Container::Npy, Container::Npz, Container::Pt];

    #[test]
    fn every_container_gives_back_what_was_written() {
        let values: Vec<f32> = (0..24).map(|i| i as f32 * 0.25 - 3.0).collect();
        for container in ALL {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                if dtype == DType::BF16 && matches!(container, Container::Npy | Container::Npz) {
                    continue; // NumPy has no bf16
                }
                let name = if container == Container::Npy { "" } else { "noise" };
                let tensor = Stored { dtype, ..Stored::f32(name, &[1, 2, 3, 4], values.clone()) };
                let bytes = container.encode(&tensor).unwrap();
                assert_eq!(container.decode(&bytes).unwrap(), [tensor], "{container:?} {dtype}");
            }
        }
    }

    #[test]
    fn several_tensors_stand_under_their_names() {
        let tensors = [Stored::f32("a", &[1, 2], vec![1.0, 2.0]), Stored::f32("b", &[3], vec![3.0, 4.0, 5.0])];
        for container in [Container::Safetensors, Container::Npz, Container::Pt] {
            assert_eq!(container.decode(&container.encode_all(&tensors).unwrap()).unwrap(), tensors, "{container:?}");
        }
        assert!(Container::Npy.encode_all(&tensors).unwrap_err().to_string().contains("one tensor"));
    }

    #[test]
    fn a_bare_tensor_has_no_name() {
        let bare = Stored::f32("", &[3], vec![1.0, 2.0, 3.0]);
        let bytes = Container::Pt.encode(&bare).unwrap();
        assert_eq!(Container::Pt.decode(&bytes).unwrap(), [bare]);
    }

    #[test]
    fn bf16_needs_a_container_that_has_it() {
        let tensor = Stored { dtype: DType::BF16, ..Stored::f32("", &[1], vec![1.0]) };
        assert!(Container::Npy.encode(&tensor).unwrap_err().to_string().contains("bf16"));
    }

    #[test]
    fn slots_have_known_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pt");
        write(&path, &Stored::f32("audio_latent", &[1], vec![7.0])).unwrap();
        assert_eq!(pick(&path, "stage1.audio").unwrap().values, [7.0]);
        let message = pick(&path, "stage2.video").unwrap_err().to_string();
        assert!(message.contains("`audio_latent`") && message.contains("latent_noise"), "{message}");
        assert!(Container::of(Path::new("x.bin")).is_err());
    }
}
