//! What was measured, as a page that needs nothing else.

use ltxc_runtime::memory::readable;

use super::drawing::{
    ARITHMETIC, GREY, INK, MEMORY, bar, foot, head, key, label, operations, quarters, section, shortened, svg,
};
use super::profile::KernelTime;
use super::{Findings, ProgramTime, figure, levels_page};

/// Where bars begin.
const LABEL: f64 = 400.0;

/// Room for bars; words stand behind them.
const ROOM: f64 = 300.0;

/// Height of a row.
const ROW: f64 = 23.0;

/// Kernels that are drawn.
const MOST_KERNELS: usize = 28;

/// The page; `command` made it.
pub fn html(findings: &Findings, command: &str) -> String {
    let total = |p: &ProgramTime| p.runs as f64 * p.warm_seconds;
    let warm: f64 = findings.programs.iter().map(total).sum();
    let c = &findings.ceilings;
    let tiles = [
        (format!("{} s", figure(warm)), "one generation, warm"),
        (format!("{} GB/s", figure(c.copy / 1e9)), "best copy"),
        (format!("{}/s", operations(c.product_f32)), "best product, f32"),
        (format!("{}/s", operations(c.product_bf16)), "best product, bf16"),
        (readable(findings.resident_bytes), "resident at most"),
    ];
    let tiles: Vec<(String, String)> = tiles.into_iter().map(|(v, what)| (v, what.to_string())).collect();
    let weights = if findings.is_synthetic { "synthetic weights" } else { "published weights" };
    let lines = [format!("plan {}", findings.plan), weights.to_string()];
    let colours = format!("{}{}", key(MEMORY, "limited by memory"), key(ARITHMETIC, "limited by arithmetic"));
    let levels = match findings.levels.is_empty() {
        true => String::new(),
        false => levels_page::section_of("One generation, part by part", &findings.levels),
    };
    [
        head(&format!("ltxc on {}", findings.device.join(": ")), &lines, &tiles),
        section(
            "Programs",
            "Time of all runs of a generation, those that take most first; behind it how close they come to what the device \
             was measured to do at best.",
            &programs(&findings.programs, warm),
        ),
        section(
            "Kernels",
            &format!("Part of the device's measured ceiling, the kernels with the most time first. {colours}"),
            &kernels(&findings.kernels),
        ),
        levels,
        foot(command),
    ]
    .concat()
}

fn programs(programs: &[ProgramTime], warm: f64) -> String {
    let total = |p: &ProgramTime| p.runs as f64 * p.warm_seconds;
    let mut sorted: Vec<&ProgramTime> = programs.iter().collect();
    sorted.sort_by(|a, b| total(b).total_cmp(&total(a)));
    let most = sorted.first().map_or(1.0, |p| total(p));
    let rows = sorted.iter().enumerate().map(|(i, p)| {
        let (y, width) = (4.0 + ROW * i as f64, ROOM * total(p) / most);
        let runs = if p.runs == 1 { String::new() } else { format!(", {} × {} s", p.runs, figure(p.warm_seconds)) };
        let (part, share) = (100.0 * total(p) / warm, 100.0 * p.least_seconds / p.warm_seconds);
        let text = format!("{} s ({part:.0} %){runs}, {share:.0} % of the limit", figure(total(p)));
        [
            label(LABEL - 10.0, y + 13.0, "end", "400", INK, &shortened(&p.name, 58)),
            bar(LABEL, y, width, ROW - 7.0, "#1f6feb"),
            label(LABEL + width + 8.0, y + 13.0, "start", "400", GREY, &text),
        ]
        .concat()
    });
    let body: String = rows.collect();
    svg(8.0 + ROW * sorted.len() as f64, &body)
}

fn kernels(kernels: &[KernelTime]) -> String {
    let shown = &kernels[..kernels.len().min(MOST_KERNELS)];
    let bottom = 24.0 + ROW * shown.len() as f64;
    let rows = shown.iter().enumerate().map(|(i, k)| {
        let (y, share) = (24.0 + ROW * i as f64, k.share().clamp(0.0, 1.15));
        let made = k.types.rsplit("→ ").next().unwrap_or_default();
        let colour = if k.is_arithmetic { ARITHMETIC } else { MEMORY };
        let calls = if k.calls == 1 { "1 call".into() } else { format!("{} calls", k.calls) };
        let text = format!("{:.0} %, {} s in {calls}", 100.0 * k.share(), figure(k.seconds));
        [
            label(LABEL - 10.0, y + 13.0, "end", "400", INK, &shortened(&format!("{}  {made}", k.kernel), 58)),
            bar(LABEL, y, ROOM * share, ROW - 7.0, colour),
            label(LABEL + ROOM * share + 8.0, y + 13.0, "start", "400", GREY, &text),
        ]
        .concat()
    });
    let body: String = rows.collect();
    svg(bottom + 8.0, &(quarters(LABEL, ROOM, bottom) + &body))
}
