//! What can go wrong when a plan is run.

use std::path::PathBuf;

use ltxc_ir::plan::verify::PlanError;

use crate::backend::DeviceName;

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
    #[error(
        "the plan was compiled for `{plan}`, the device is `{device}`; compile it with `--device {device}`, or run it elsewhere"
    )]
    Target { plan: String, device: DeviceName },
    #[error(
        "the plan was compiled for `{plan}` and no fast device of this machine runs it{}; see `ltxc doctor`, or compile it with `--device cpu`",
        or_why(named, why)
    )]
    NoDevice { plan: String, named: Option<DeviceName>, why: Vec<String> },
    #[error("`{device}`: {what}; compile the plan with `--device {device}` on this machine, or for a smaller size")]
    DeviceLimit { device: DeviceName, what: String },
    #[error("`{device}`: {problem}; run `ltxc doctor` to see the devices, or compile and run with `--device cpu`")]
    Device { device: DeviceName, problem: String },
    #[error(
        "`{device}` ran out of memory, which others may hold; close other programs, compile a smaller size or fewer frames, or choose another `--device`"
    )]
    DeviceMemory { device: DeviceName },
    #[error(
        "`{device}` was lost: its driver reset it, or it was unplugged; run again, and if that happens again, update the driver or choose another `--device`"
    )]
    DeviceLost { device: DeviceName },
    #[error("{}", frozen(device, kernel.as_deref()))]
    Frozen { device: DeviceName, kernel: Option<String> },
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
    Sound(#[from] crate::audio_frontend::FrontendError),
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

/// What is said about kernels that may not be compiled.
fn frozen(device: &DeviceName, kernel: Option<&str>) -> String {
    let kernel = kernel.map_or("kernels".into(), |kernel| format!("`{kernel}`"));
    let way_out = match device {
        DeviceName::Cuda(_) => {
            format!("run `ltxc tune PLAN --device {device}` on this machine, or leave `--frozen` out")
        }
        _ => "it takes no compiled kernels from a plan, so leave `--frozen` out".into(),
    };
    format!("`{device}` would have to compile {kernel}, which `--frozen` forbids; {way_out}")
}

/// The device that would run a plan slowly, or why none does.
fn or_why(named: &Option<DeviceName>, why: &[String]) -> String {
    match (named, why) {
        (Some(name), _) => format!(" (a slow one would: `--device {name}`)"),
        (None, []) => String::new(),
        (None, why) => format!(" ({})", why.join("; ")),
    }
}
