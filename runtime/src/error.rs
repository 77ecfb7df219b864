//! What can go wrong when a plan is run.

use std::path::PathBuf;

use ltxc_ir::plan::verify::PlanError;

/// Problems of running a plan. Every message says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum RunError {
    #[error("`{}`: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("plan `{}`: {source}", path.display())]
    Plan { path: PathBuf, source: PlanError },
    #[error(
        "the plan needs the {name} weight file of {bytes} bytes with header hash {header}, which was not found below {}; {remedy}",
        searched.join(", ")
    )]
    WeightFile { name: String, bytes: u64, header: String, searched: Vec<String>, remedy: String },
    #[error("weight file `{}`: {problem}", path.display())]
    WeightContent { path: PathBuf, problem: String },
    #[error("this plan needs {needed} of memory at its peak, {available} are available; {remedy}")]
    Memory { needed: String, available: String, remedy: String },
    #[error("{0}")]
    Input(String),
    #[error(
        "{stage}, step {step}: {what} is {problem}; the weights or the plan are broken, or this needs `--allow-bad-numerics`"
    )]
    BadNumerics { stage: String, step: usize, what: String, problem: String },
    #[error("interrupted")]
    Interrupted,
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::TokenizerError),
    #[error(transparent)]
    Media(#[from] crate::media::MediaError),
    #[error("internal error: {0}; please report it with the plan's `ltxc inspect`")]
    Internal(String),
}

impl RunError {
    /// An I/O error about `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> RunError {
        RunError::Io { path: path.into(), source }
    }
}
