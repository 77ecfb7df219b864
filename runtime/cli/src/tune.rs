//! `ltxc tune`: the kernels of a plan, compiled for a device of this machine.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::{KernelForm, Kernels, Plan, container};
use ltxc_runtime::RunError;
use ltxc_runtime::backend::{Device, DeviceKind, open};
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::memory::readable;
use serde_json::{Value, json};

use crate::args::TuneArgs;
use crate::compile::read;
use crate::job::pick;
use crate::report::Report;
use crate::run::INTERRUPT;

/// `ltxc tune`.
///
/// # Errors
/// A plan that cannot be read or written, or a device that is not there or does not run it.
pub fn run(args: &TuneArgs, report: &mut Report) -> Result<()> {
    let (plan, _) = read(&args.plan)?;
    let device = pick(&args.device, Some(&plan))?;
    if device.kind == DeviceKind::Cpu {
        bail!(
            "kernels for `{}` are part of this program; there is nothing to tune in `{}`",
            device.name,
            args.plan.display()
        );
    }
    let kernels = tune(&plan, &device, true, report)?;
    let output = args.output.as_ref().unwrap_or(&args.plan);
    let bytes = container::encode_with(&plan, Some(&kernels))?;
    write_atomically(output, &bytes)?;
    let mut facts = facts(&kernels);
    facts["bytes"] = json!(bytes.len());
    report.finish(output, facts);
    Ok(())
}

/// The kernels that a device compiles for a plan, each of whose calls it runs once; if `measures`, with each of the tiles
/// that it can be cut into, of which the fastest is kept.
///
/// # Errors
/// A device that does not run the plan.
pub fn tune(plan: &Plan, device: &Device, measures: bool, report: &mut Report) -> Result<Kernels> {
    let mut backend = open(device)?;
    let mut begun = false;
    let kernels = backend.tune(plan, measures, &mut |done, calls| {
        if !std::mem::replace(&mut begun, true) {
            report.begin("kernels", calls);
        }
        report.step(done);
        if INTERRUPT.load(Ordering::Relaxed) { Err(RunError::Interrupted) } else { Ok(()) }
    })?;
    report.end();
    let kernels = kernels.context("the device has no kernels to carry")?;
    report.note(&words(&kernels));
    Ok(kernels)
}

/// What a plan carries, in words.
pub fn words(kernels: &Kernels) -> String {
    let Counts { compiled, sources, bytes } = Counts::of(kernels);
    let tuned = match kernels.tuned.len() {
        0 => String::new(),
        calls => format!("; the tiles of {calls} calls were measured"),
    };
    let carried = match (compiled, sources) {
        (0, 0) => "none".into(),
        (compiled, 0) => format!("{compiled} compiled"),
        (0, sources) => format!("the sources of {sources}, which this backend compiles in every run"),
        (compiled, sources) => format!("{compiled} compiled, the sources of {sources}"),
    };
    format!("kernels: {carried} ({}), for {}{tuned}", readable(bytes), kernels.device)
}

/// The same for machines.
pub fn facts(kernels: &Kernels) -> Value {
    let Counts { compiled, sources, bytes } = Counts::of(kernels);
    let tuned = kernels.tuned.len();
    json!({"compiled": compiled, "sources": sources, "tuned": tuned, "text_bytes": bytes, "device": kernels.device})
}

struct Counts {
    compiled: usize,
    sources: usize,
    bytes: u64,
}

impl Counts {
    fn of(kernels: &Kernels) -> Counts {
        let compiled = kernels.kernels.iter().filter(|k| matches!(k.form, KernelForm::Ptx { .. })).count();
        let bytes = kernels.kernels.iter().map(|k| k.form.text().len() as u64).sum();
        Counts { compiled, sources: kernels.kernels.len() - compiled, bytes }
    }
}
