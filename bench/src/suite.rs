//! The suite: kernels one by one and whole components at every level of fusion, on one device in one run.
//!
//! What takes most of a generation comes first, and results are handed out as they come, so that a run that is cut short
//! leaves what it has.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ltxc::bench::ceilings::Ceilings;
use ltxc::bench::levels::{ByLevel, LEGEND, Other, cells, columns};
use ltxc_compiler::Fuse;
use ltxc_ir::plan::{KernelCall, Plan};
use ltxc_runtime::backend::Device;
use serde::{Deserialize, Serialize};

use crate::kernels::{self, Distinct, KernelRow};
use crate::levels;
use crate::machine::Machine;
use crate::report::{figure, line, markdown_table};
use crate::subjects::{self, Subject};
use crate::torch::Torch;

/// What to measure, and for how long.
pub struct Settings {
    /// The components.
    pub subjects: subjects::Settings,
    /// When to stop.
    pub limit: Duration,
    /// Part of the time for kernels; the rest is for components.
    pub kernel_part: f64,
    /// Only kernels whose name or types have this in them.
    pub only: Option<String>,
    /// Only components whose name has this in it.
    pub component: Option<String>,
    /// Most rounds of a component.
    pub rounds: usize,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Suite {
    /// When, `YYYY-MM-DD`.
    pub date: String,
    /// On which machine.
    pub machine: Machine,
    /// Name and description of the device.
    pub device: [String; 2],
    /// The command line, without paths of this machine.
    pub command: String,
    /// Model, size, widths and dtypes.
    pub what: String,
    /// The best rates that were measured, by ltxc's kernels and by others.
    pub ceilings: Ceilings,
    /// What else reaches which rate: name, unit, value.
    pub references: Vec<(String, String, f64)>,
    /// Components.
    pub components: Vec<ByLevel>,
    /// Kernels.
    pub kernels: Vec<KernelRow>,
    /// What to know: what was left out, and why.
    pub notes: Vec<String>,
}

/// Runs the suite. `folder` takes weights; `save` gets what there is, now and then and at the end.
///
/// # Errors
/// A device that cannot be used. Single kernels and components that fail become notes.
pub fn run(
    settings: &Settings,
    device: &Device,
    mut suite: Suite,
    mut torch: Option<&mut Torch>,
    folder: &Path,
    save: &mut dyn FnMut(&Suite) -> Result<()>,
) -> Result<Suite> {
    let start = Instant::now();
    if let Some(torch) = &mut torch {
        match torch.ceilings(settings.subjects.dtype) {
            Ok(found) => suite.raise_ceilings(found),
            Err(e) => suite.notes.push(format!("PyTorch's ceilings: {e:#}")),
        }
    }
    let mut subjects = subjects::subjects(&settings.subjects)?;
    if let Some(component) = &settings.component {
        let names = subjects.iter().map(|s| s.name).collect::<Vec<_>>().join("`, `");
        subjects.retain(|subject| subject.name.contains(component));
        ensure!(!subjects.is_empty(), "no component has `{component}` in its name; there are `{names}`");
    }
    let until = |part: f64| start + settings.limit.mul_f64(part);
    let mut saved = Instant::now();
    let mut save_sometimes = |suite: &Suite| -> Result<()> {
        if saved.elapsed() < SAVE_EVERY {
            return Ok(());
        }
        saved = Instant::now();
        save(suite)
    };

    let plans = subjects.iter().map(|s| levels::plan(s, &device.target, Fuse::Full)).collect::<Result<Vec<Plan>>>()?;
    let is_wanted = |call: &KernelCall| {
        let text = || format!("{} {}", call.work.name(), ltxc::bench::profile::types(call));
        settings.only.as_ref().is_none_or(|only| text().contains(only))
    };
    let lists = plans.iter().map(|plan| {
        let all = kernels::distinct(plan, &suite.ceilings).into_iter();
        all.filter(|distinct| is_wanted(distinct.call)).collect()
    });
    let mut queue = in_turns(subjects.iter().zip(lists).collect());
    let (all, deadline) = (queue.len(), until(settings.kernel_part));
    let each = settings.limit.mul_f64(settings.kernel_part / 20.0);
    while let Some((subject, call)) = queue.next_before(deadline) {
        match kernels::measure(subject.name, &call, device, &suite.ceilings, each) {
            Ok(mut row) => {
                if let Some(torch) = &mut torch {
                    row.other = torch.kernel(call.call).unwrap_or_else(|e| {
                        suite.notes.push(format!("PyTorch on `{}` {}: {e:#}", row.kernel, row.types));
                        None
                    });
                }
                suite.kernels.push(row);
            }
            Err(e) => {
                suite.notes.push(format!("`{}` {}: {e}", call.call.work.name(), ltxc::bench::profile::types(call.call)))
            }
        }
        save_sometimes(&suite)?;
    }
    if queue.len() > 0 {
        suite.notes.push(format!("{} of {all} kernels were left out for time, those with the least work", queue.len()));
    }
    let expected: Vec<f64> = plans.iter().map(|plan| levels::expected_seconds(plan, &suite.ceilings)).collect();
    drop(plans);

    for (i, (subject, expected)) in subjects.iter().zip(expected).enumerate() {
        let left = (start + settings.limit).saturating_duration_since(Instant::now());
        if left.as_secs_f64() < expected {
            suite.notes.push(format!("`{}` was left out for time", subject.name));
            continue;
        }
        // Every later component may still have half of what is left.
        let limit = if i + 1 < subjects.len() { left / 2 } else { left };
        match levels::measure(
            subject,
            device,
            settings.subjects.weights,
            &suite.ceilings,
            (settings.rounds, limit),
            folder,
        ) {
            Ok(mut row) => {
                if let (Some(torch), Some(sizes)) = (&mut torch, subject.block) {
                    for found in torch.block(sizes, settings.subjects.dtype) {
                        match found {
                            Ok(other) => row.others.push(other),
                            Err(e) => suite.notes.push(format!("a block by PyTorch: {e:#}")),
                        }
                    }
                }
                suite.components.push(row);
            }
            Err(e) => suite.notes.push(format!("`{}`: {e:#}", subject.name)),
        }
        save_sometimes(&suite)?;
    }
    let wrong = suite.kernels.iter().filter(|k| !k.is_right());
    let wrong: Vec<String> =
        wrong.map(|k| format!("WRONG: `{}` {} differs from its parts", k.kernel, k.types)).collect();
    suite.notes.extend(wrong);
    save(&suite)?;
    Ok(suite)
}

/// Time between two savings.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// The calls of all components, one of each in turn.
struct Queue<'s, 'p>(std::collections::VecDeque<(&'s Subject, Distinct<'p>)>);

fn in_turns<'s, 'p>(lists: Vec<(&'s Subject, Vec<Distinct<'p>>)>) -> Queue<'s, 'p> {
    let mut lists: Vec<_> = lists.into_iter().map(|(subject, list)| (subject, list.into_iter())).collect();
    let mut queue = std::collections::VecDeque::new();
    loop {
        let before = queue.len();
        for (subject, list) in &mut lists {
            queue.extend(list.next().map(|call| (*subject, call)));
        }
        if queue.len() == before {
            return Queue(queue);
        }
    }
}

impl<'s, 'p> Queue<'s, 'p> {
    fn next_before(&mut self, deadline: Instant) -> Option<(&'s Subject, Distinct<'p>)> {
        if Instant::now() < deadline { self.0.pop_front() } else { None }
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

impl Suite {
    /// Takes rates of another library for ceilings where they are higher.
    fn raise_ceilings(&mut self, found: Vec<(String, String, f64)>) {
        for (name, unit, value) in &found {
            let own = match (name.contains("copy"), name.contains("bf16")) {
                (true, _) => &mut self.ceilings.copy,
                (_, true) => &mut self.ceilings.product_bf16,
                _ => &mut self.ceilings.product_f32,
            };
            let scale = if unit == "GB/s" || unit == "GFLOP/s" { 1e9 } else { 1.0 };
            *own = own.max(value * scale);
        }
        self.references.extend(found);
    }

    /// Whether no fused kernel differs from its parts.
    pub fn is_right(&self) -> bool {
        self.kernels.iter().all(KernelRow::is_right)
    }

    /// The results as Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!("# suite on {}\n\n", self.device[0]);
        for (name, value) in [
            ("date", self.date.clone()),
            ("device", format!("{}: {}", self.device[0], self.device[1])),
            ("machine", self.machine.to_string()),
            ("command", format!("`{}`", self.command)),
            ("measured", self.what.clone()),
        ] {
            line(&mut text, &format!("- {name}: {value}"));
        }
        line(&mut text, "\n## Ceilings, measured\n");
        let mut rows = vec![
            vec!["copy, read and written".into(), format!("{} GB/s", figure(self.ceilings.copy / 1e9))],
            vec!["product, f32".into(), format!("{} GFLOP/s", figure(self.ceilings.product_f32 / 1e9))],
            vec!["product, bf16".into(), format!("{} GFLOP/s", figure(self.ceilings.product_bf16 / 1e9))],
        ];
        rows.extend(self.references.iter().map(|(name, unit, v)| vec![name.clone(), format!("{} {unit}", figure(*v))]));
        markdown_table(&mut text, &["what", "rate"], &rows);
        self.component_table(&mut text);
        self.kernel_tables(&mut text);
        if !self.notes.is_empty() {
            line(&mut text, "\n## Notes\n");
            self.notes.iter().for_each(|note| line(&mut text, &format!("- {note}")));
        }
        text
    }

    fn component_table(&self, text: &mut String) {
        if self.components.is_empty() {
            return;
        }
        line(text, "\n## Components by level of fusion\n");
        LEGEND.iter().for_each(|sentence| line(text, sentence));
        line(text, "");
        markdown_table(text, &columns("component"), &cells(&self.components));
    }

    fn kernel_tables(&self, text: &mut String) {
        let mut names: Vec<&str> = self.kernels.iter().map(|k| k.component.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            line(text, &format!("\n## Kernels of one {name}\n"));
            let columns = [
                "kernel",
                "calls",
                "ms",
                "GFLOP/s",
                "GB/s",
                "of ceiling",
                "by",
                "parts",
                "parts ms",
                "fused / parts",
                "ms gained",
                "ms predicted",
                "difference",
                "other",
                "ltxc / other",
                "operands → result",
            ];
            let mut own: Vec<&KernelRow> = self.kernels.iter().filter(|k| k.component == name).collect();
            own.sort_by(|a, b| (b.seconds * b.calls as f64).total_cmp(&(a.seconds * a.calls as f64)));
            let rows: Vec<Vec<String>> = own.into_iter().map(kernel_cells).collect();
            markdown_table(text, &columns, &rows);
        }
    }
}

fn kernel_cells(k: &KernelRow) -> Vec<String> {
    let apart = |cell: &dyn Fn(&kernels::Apart) -> String| k.apart.as_ref().map(cell).unwrap_or_default();
    let other = |cell: &dyn Fn(&Other) -> String| k.other.as_ref().map(cell).unwrap_or_default();
    vec![
        k.kernel.clone(),
        k.calls.to_string(),
        figure(k.seconds * 1e3),
        figure(k.flops as f64 / k.seconds / 1e9),
        figure(k.bytes as f64 / k.seconds / 1e9),
        percent(k.share),
        if k.is_arithmetic { "arithmetic" } else { "memory" }.into(),
        apart(&|a| a.kernels.to_string()),
        apart(&|a| figure(a.seconds * 1e3)),
        apart(&|a| figure(k.seconds / a.seconds)),
        apart(&|a| figure((a.seconds - k.seconds) * 1e3)),
        apart(&|a| figure(a.predicted_gain * 1e3)),
        apart(&|a| a.difference.map(|d| format!("{d:.1e}")).unwrap_or_default()),
        other(&|o| o.name.clone()),
        other(&|o| figure(k.seconds / o.seconds)),
        k.types.clone(),
    ]
}

/// A part in percent.
pub fn percent(part: f64) -> String {
    format!("{:.0} %", 100.0 * part)
}
