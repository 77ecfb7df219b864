//! The recorded fixtures: where they are, and how their files are read.
//!
//! `LTXC_FIXTURES` names another folder of the same layout; without it the thinned set of this repository is used.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use ltxc::debug::recording;
use ltxc_ir::TensorType;
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::Release;
use ltxc_models::TensorDirectory;

/// Folder, below that of the fixtures, of what release 1.2.0 computes otherwise than 1.0.0.
const SECOND_RELEASE: &str = "expected-1.2.0";

/// Folder of the fixtures.
pub fn root() -> PathBuf {
    std::env::var_os("LTXC_FIXTURES")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures"))
}

/// The release of the reference that [`expected`] is of: 1.2.0, or 1.0.0 in a set that tells nothing of 1.2.0. PyPI only has
/// 1.0.0, so that every set may be made with it.
pub fn release() -> Release {
    if root().join(SECOND_RELEASE).is_dir() { Release::V1_2_0 } else { Release::V1_0_0 }
}

/// The recorded file `name` (for example `ltx2/transformer`): release 1.2.0 where it differs, else 1.0.0.
pub fn expected(name: &str) -> Option<TensorFile> {
    [SECOND_RELEASE, "expected"]
        .into_iter()
        .map(|dir| root().join(dir).join(format!("{name}.safetensors")))
        .find(|p| p.exists())
        .map(|p| TensorFile::read(&p))
}

/// The file `name` as recorded with release 1.0.0.
///
/// # Panics
/// If it is absent.
#[track_caller]
pub fn of_first_release(name: &str) -> TensorFile {
    TensorFile::read(&root().join(format!("expected/{name}.safetensors")))
}

/// The file `name`, with its extension, of which release 1.0.0 has nothing. `None`, and a line that says so, in a set of that
/// release; in other sets it must be there.
pub fn of_second_release(name: &str) -> Option<PathBuf> {
    if release() == Release::V1_0_0 {
        println!("absent: this set of fixtures is of release 1.0.0, which has no `{name}`");
        return None;
    }
    Some(root().join(SECOND_RELEASE).join(name))
}

/// Like [`expected`] for a file that must be there.
///
/// # Panics
/// If it is absent.
#[track_caller]
pub fn required(name: &str) -> TensorFile {
    expected(name).unwrap_or_else(|| panic!("required fixture `{name}` is absent below {}", root().display()))
}

/// All tensors of a safetensors file, decoded; what is missing fails the test.
#[derive(Clone)]
pub struct TensorFile(recording::TensorFile);

impl TensorFile {
    /// Reads `path`.
    ///
    /// # Panics
    /// If it cannot be read; fixtures are part of the test.
    #[track_caller]
    pub fn read(path: &Path) -> TensorFile {
        TensorFile(recording::TensorFile::open(path).unwrap_or_else(|e| panic!("{e:#}")))
    }

    /// The tensor `name`.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("{}: no tensor `{name}`", self.path.display()))
    }

    /// Puts a tensor in the place of the one called `name`, in memory alone.
    pub fn insert(&mut self, name: &str, tensor: Tensor) {
        self.0.insert(name, tensor);
    }
}

impl Deref for TensorFile {
    type Target = recording::TensorFile;

    fn deref(&self) -> &recording::TensorFile {
        &self.0
    }
}

impl TensorDirectory for TensorFile {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.0.tensor_type(key)
    }
}
