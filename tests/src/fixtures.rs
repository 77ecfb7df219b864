//! The recorded fixtures: where they are, and how their files are read.
//!
//! `LTXC_FIXTURES` names another folder of the same layout; without it the thinned set of this repository is used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ltxc_ir::TensorType;
use ltxc_ir::eval::Tensor;
use ltxc_models::TensorDirectory;
use ltxc_runtime::weights::dtype_of;
use safetensors::SafeTensors;

/// Folder of the fixtures.
pub fn root() -> PathBuf {
    std::env::var_os("LTXC_FIXTURES")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures"))
}

/// The recorded file `name` (for example `ltx2/transformer`): release 1.2.0 where it differs, else 1.0.0.
pub fn expected(name: &str) -> Option<TensorFile> {
    ["expected-1.2.0", "expected"]
        .into_iter()
        .map(|dir| root().join(dir).join(format!("{name}.safetensors")))
        .find(|p| p.exists())
        .map(|p| TensorFile::read(&p))
}

/// Like [`expected`] for a file that must be there.
///
/// # Panics
/// If it is absent.
#[track_caller]
pub fn required(name: &str) -> TensorFile {
    expected(name).unwrap_or_else(|| panic!("required fixture `{name}` is absent below {}", root().display()))
}

/// All tensors of a safetensors file, decoded.
#[derive(Clone)]
pub struct TensorFile {
    /// Path, for messages.
    pub path: PathBuf,
    /// Header metadata.
    pub metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

impl TensorFile {
    /// Reads `path`.
    ///
    /// # Panics
    /// If it cannot be read; fixtures are part of the test.
    #[track_caller]
    pub fn read(path: &Path) -> TensorFile {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensors = file.tensors().into_iter().filter_map(|(name, view)| {
            let ty = TensorType::new(dtype_of(view.dtype())?, view.shape());
            Some((name, Tensor::from_bytes(ty, view.data())))
        });
        TensorFile { path: path.into(), metadata, tensors: tensors.collect() }
    }

    /// The tensor `name`.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor `{name}`", self.path.display()))
    }

    /// The tensor `name`, if recorded.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Puts a tensor in the place of the one called `name`, in memory alone.
    pub fn insert(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The JSON in the metadata entry `meta`.
    pub fn meta(&self) -> serde_json::Value {
        self.metadata.get("meta").and_then(|m| serde_json::from_str(m).ok()).unwrap_or_default()
    }

    /// The JSON in the metadata entry `config`.
    pub fn config(&self) -> serde_json::Value {
        self.metadata.get("config").and_then(|m| serde_json::from_str(m).ok()).unwrap_or_default()
    }
}

impl TensorDirectory for TensorFile {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.tensors.get(key).map(|t| t.ty.clone())
    }
}
