//! What a plan says it needs, against what a run of it really takes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use ltxc_ir::plan::container;
use ltxc_models::synth::{Preset, synth};
use ltxc_runtime::memory::MemoryNeed;

use crate::block::Findings;
use crate::compile::compile_command;
use crate::e2e::weight_folders;
use crate::process;
use crate::report::{Row, Table, figure};

/// Heights, widths, frames and dtypes, small to larger; the second is the demo's.
const SHAPES: [([&str; 3], &str); 5] = [
    (["128", "192", "9"], "f32"),
    (["256", "384", "49"], "f32"),
    (["512", "768", "25"], "f32"),
    (["512", "768", "57"], "f32"),
    (["512", "768", "57"], "bf16"),
];

/// Runs the tiny synthetic model at several sizes.
///
/// # Errors
/// A run that fails.
pub fn run(folder: &Path, ltxc: &Path, threads: usize) -> Result<Findings> {
    let model = synth(Preset::Tiny, &folder.join("tiny"), 0)?;
    let plan_path = folder.join("memory.ltxplan");
    let (mut rows, mut cells) = (Vec::new(), Vec::new());
    for (shape, dtype) in SHAPES {
        process::timed(compile_command(ltxc, &model, shape, &plan_path)?.args(["--dtype", dtype]))?;
        let bytes = std::fs::read(&plan_path).with_context(|| format!("`{}`", plan_path.display()))?;
        let need = MemoryNeed::of(&container::decode(&bytes)?, threads);
        let mut command = Command::new(ltxc);
        command.arg("run").arg(&plan_path).args(["--prompt", "a red fox", "--quiet", "--allow-bad-numerics"]);
        command.arg("--output").arg(folder.join("memory.mp4"));
        for folder in weight_folders(&model) {
            command.arg("--weights").arg(folder);
        }
        let peak = process::observed(&mut command)?;
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let (predicted, measured) = (megabytes(need.peak()), megabytes(peak.without_weights));
        let what = format!("{}×{}, {} frames, {dtype}: predicted, measured", shape[0], shape[1], shape[2]);
        rows.push(Row::compared(&what, "MB", predicted, measured, None));
        cells.extend(need.parts.iter().map(|part| {
            let parts = [need.total(part), part.arena, part.state, part.packed, part.workspace, part.host];
            let named = [what.split(':').next().unwrap_or_default().to_string(), part.name.clone()];
            named.into_iter().chain(parts.map(|b| figure(megabytes(b)))).collect()
        }));
    }
    let columns = vec!["shape", "part", "total", "arena", "state", "packed", "workspace", "host"];
    let tables = vec![Table { title: "Predicted parts, MB".into(), columns, rows: cells }];
    Ok(Findings { rows, tables, notes: vec!["without pages of mapped weight files".into()] })
}
