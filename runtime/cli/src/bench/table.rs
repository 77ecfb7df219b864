//! What was measured, for people.

use std::fmt::Write;

use ltxc_runtime::memory::readable;

use super::levels::{LEGEND, cells, columns};
use super::{Findings, ProgramTime};

/// Kernels that are shown; JSON has all.
const MOST_KERNELS: usize = 16;

/// Characters of operand types that are shown.
const MOST_TYPES: usize = 64;

/// The report.
pub(super) fn text(findings: &Findings) -> String {
    let ceilings = &findings.ceilings;
    let mut out = format!(
        "device    {}: {}\nceilings  copy {} GB/s, product {} GFLOP/s in f32, {} in bf16 (measured with ltxc's own kernels)\n",
        findings.device[0],
        findings.device[1],
        figure(ceilings.copy / 1e9),
        figure(ceilings.product_f32 / 1e9),
        figure(ceilings.product_bf16 / 1e9),
    );
    if findings.is_synthetic {
        out +=
            "weights   synthetic; those of full-size models are zeros, which a GPU may multiply faster than others\n";
    }
    programs(&mut out, &findings.programs);
    kernels(&mut out, findings);
    if !findings.levels.is_empty() {
        levels(&mut out, findings);
    }
    if findings.resident_bytes > 0 {
        line(
            &mut out,
            &format!("\nmemory    {} resident at most, mapped weights included", readable(findings.resident_bytes)),
        );
    }
    out
}

fn programs(out: &mut String, programs: &[ProgramTime]) {
    line(
        out,
        "\nprogram                       runs   load s  first s   warm s  total s  GFLOP/s     GB/s  of limit     arena   weights",
    );
    let total = |p: &ProgramTime| p.runs as f64 * p.warm_seconds;
    for p in programs {
        line(
            out,
            &format!(
                "{:<28} {:>5} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>9}",
                p.name,
                p.runs,
                figure(p.load_seconds),
                figure(p.first_seconds),
                figure(p.warm_seconds),
                figure(total(p)),
                figure(p.flops as f64 / p.warm_seconds / 1e9),
                figure(p.bytes as f64 / p.warm_seconds / 1e9),
                percent(p.least_seconds / p.warm_seconds),
                readable(p.arena_bytes),
                readable(p.weight_bytes),
            ),
        );
    }
    let sum = |f: &dyn Fn(&ProgramTime) -> f64| programs.iter().map(f).sum::<f64>();
    let warm = sum(&total);
    let once_more = sum(&|p| p.load_seconds + (p.first_seconds - p.warm_seconds).max(0.0));
    line(out, "\npart of a generation          warm s   share");
    let mut groups: Vec<&str> = programs.iter().map(|p| p.group.as_str()).collect();
    groups.dedup();
    for group in groups {
        let own = programs.iter().filter(|p| p.group == group).map(total).sum::<f64>();
        line(out, &format!("{group:<28} {:>8} {:>7}", figure(own), percent(own / warm)));
    }
    line(
        out,
        &format!(
            "{:<28} {:>8}; cold {}, of which {} load weights",
            "together",
            figure(warm),
            figure(warm + once_more),
            figure(sum(&|p| p.load_seconds)),
        ),
    );
}

fn kernels(out: &mut String, findings: &Findings) {
    let total: f64 = findings.kernels.iter().map(|k| k.seconds).sum();
    line(out, "\nkernel         calls        ms   share  GFLOP/s     GB/s  of limit  by          operands → result");
    for kernel in findings.kernels.iter().take(MOST_KERNELS) {
        let types: String = match kernel.types.chars().count() {
            n if n > MOST_TYPES => kernel.types.chars().take(MOST_TYPES - 1).chain(['…']).collect(),
            _ => kernel.types.clone(),
        };
        line(
            out,
            &format!(
                "{:<13} {:>6} {:>9} {:>7} {:>8} {:>8} {:>8}  {:<10}  {types}",
                kernel.kernel,
                kernel.calls,
                figure(kernel.seconds * 1e3),
                percent(kernel.seconds / total),
                figure(kernel.flops / kernel.seconds / 1e9),
                figure(kernel.bytes / kernel.seconds / 1e9),
                percent(kernel.share()),
                if kernel.is_arithmetic { "arithmetic" } else { "memory" },
            ),
        );
    }
    let rest = findings.kernels.iter().skip(MOST_KERNELS);
    let (count, seconds) = rest.fold((0, 0.0), |(n, s), k| (n + 1, s + k.seconds));
    if count > 0 {
        line(
            out,
            &format!("{:<20} {:>9} {:>7}", format!("{count} others"), figure(seconds * 1e3), percent(seconds / total)),
        );
    }
}

/// Parts of a generation by level of fusion, in columns as wide as they need.
fn levels(out: &mut String, findings: &Findings) {
    let head = columns("part").map(String::from).to_vec();
    let rows = [vec![head], cells(&findings.levels)].concat();
    // What is missing has a reason for its last cell, which no column has the width of.
    let is_whole = |row: &&Vec<String>| row.len() == rows[0].len();
    let width = |i: usize| rows.iter().filter(is_whole).map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    line(out, "");
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(i, (cell, width))| match i < 2 {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        });
        line(out, cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    LEGEND.iter().for_each(|sentence| line(out, sentence));
}

fn percent(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

fn line(out: &mut String, content: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{content}");
}

/// A number with three significant digits, or more where it has more before the point.
pub fn figure(value: f64) -> String {
    if !value.is_finite() || value == 0.0 {
        return value.to_string();
    }
    let digits = value.abs().log10().floor();
    if digits < -3.0 {
        return format!("{value:.1e}");
    }
    let decimals = (2.0 - digits).max(0.0) as usize;
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let figures: Vec<String> = [0.0, 12345.6, 123.4, 12.34, 1.25, 0.98765, 0.0012, 1.0e-7].map(figure).into();
        assert_eq!(figures, ["0", "12346", "123", "12.3", "1.25", "0.988", "0.00120", "1.0e-7"]);
    }
}
