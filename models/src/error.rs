//! What can be wrong with a checkpoint or a request for a model.

use std::path::{Path, PathBuf};

use ltxc_ir::BuildError;

use crate::Listed;

/// Problems of checkpoints, configurations and graph building.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum ModelError {
    #[error("{source_name}: {} problem(s) with the weights:{problems}", problems.0.len())]
    Weights { source_name: String, problems: Listed },
    #[error("config `{path}`: {problem}")]
    Config { path: String, problem: String },
    /// A file or folder whose content is not what it has to be; `problem` ends with a way out.
    #[error("`{}`: {problem}", path.display())]
    File { path: PathBuf, problem: String },
    #[error("`{}`: cannot {doing}: {source}", path.display())]
    Io { path: PathBuf, doing: &'static str, source: std::io::Error },
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl ModelError {
    /// A [`ModelError::File`].
    pub fn file(path: &Path, problem: impl Into<String>) -> ModelError {
        ModelError::File { path: path.into(), problem: problem.into() }
    }

    /// A [`ModelError::Config`]: `path` is the key path, for example `transformer.num_layers`.
    pub fn config(path: impl Into<String>, problem: impl Into<String>) -> ModelError {
        ModelError::Config { path: path.into(), problem: problem.into() }
    }

    /// A [`ModelError::Config`] with all of `problems`, if there are any.
    pub(crate) fn unless_empty(path: &str, problems: Vec<String>) -> Result<(), ModelError> {
        if problems.is_empty() {
            return Ok(());
        }
        Err(ModelError::config(path, format!("{} problem(s):{}", problems.len(), Listed(problems))))
    }

    /// Turns an I/O error into a [`ModelError::Io`], for `map_err`.
    pub fn io(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> ModelError {
        move |source| ModelError::Io { path: path.into(), doing, source }
    }
}
