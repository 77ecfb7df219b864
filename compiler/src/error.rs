//! What can go wrong while a graph becomes a plan.

use ltxc_ir::plan::verify::PlanError;
use ltxc_ir::verify::VerifyError;

/// A module that could not be compiled.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)] // the messages are the documentation
pub enum CompileError {
    #[error("the graph of `{program}` does not verify: {source}")]
    Input { program: String, source: VerifyError },
    #[error("after pass `{pass}`: {source}\n  this is a bug in ltxc; please report it with the graph")]
    Pass { pass: &'static str, source: VerifyError },
    #[error("there is no pass `{name}`; the passes are {known}")]
    UnknownPass { name: String, known: String },
    #[error("module has no entry `{name}`")]
    UnknownEntry { name: String },
    #[error("program `{name}` was added twice")]
    DuplicateProgram { name: String },
    #[error("function `{function}` reads weights of `{name}`, which is none of the sources {known:?}")]
    UnknownSource { function: String, name: String, known: Vec<String> },
    #[error(
        "function `{function}` needs a buffer of {bytes} bytes, the target allows arenas of {limit}; compile a smaller size, with `--dtype bf16`, with smaller `--vae-tile` or for another device"
    )]
    BufferTooLarge { function: String, bytes: u64, limit: u64 },
    #[error("function `{function}` needs more memory than can be addressed")]
    TooMuchMemory { function: String },
    #[error("function `{function}`: `{kernel}` needs {found} bindings, the target allows {limit}")]
    TooManyBindings { function: String, kernel: String, found: usize, limit: u32 },
    #[error(
        "function `{function}`: `{kernel}` works on {ty} of {bytes} bytes, the target allows tensors of {limit}; compile a smaller size, with `--dtype bf16`, with smaller `--vae-tile` or for another device"
    )]
    TensorTooLarge { function: String, kernel: String, ty: String, bytes: u64, limit: u64 },
    #[error("function `{function}`: {problem}\n  this is a bug in ltxc; please report it with the graph")]
    Lowering { function: String, problem: String },
    #[error("the finished plan does not verify: {0}\n  this is a bug in ltxc; please report it")]
    Plan(#[from] PlanError),
}
