//! What can be wrong with a checkpoint or a request for a model.

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
    #[error(transparent)]
    Build(#[from] BuildError),
}
