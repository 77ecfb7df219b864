//! A picture of the ratios in all results of one date, as SVG.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A bar: a measured ratio and what it should be.
#[derive(Clone, Debug, PartialEq)]
struct Bar {
    label: String,
    ratio: f64,
    /// `ratio ≤ 1.25`, if there is a goal.
    goal: String,
    is_met: bool,
}

/// Sizes in pixels.
const WIDTH: f64 = 900.0;
const LABEL: f64 = 420.0;
const ROW: f64 = 24.0;
const TOP: f64 = 48.0;

/// Colours of goals that are met and missed; of results without goals.
const MET: &str = "#2f7d4f";
const MISSED: &str = "#b4432f";
const PLAIN: &str = "#6b7280";

/// Draws the ratios of all results of `date` in `folder` into `<date>.svg` there.
///
/// # Errors
/// If there are none, or files cannot be read or written.
pub fn draw(folder: &Path, date: &str) -> Result<()> {
    let mut paths: Vec<_> = std::fs::read_dir(folder)?.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    let mut bars = Vec::new();
    for path in paths {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.starts_with(date) && name.ends_with(".json") {
            let text = std::fs::read_to_string(&path).with_context(|| format!("`{}`", path.display()))?;
            bars.extend(bars_of(&serde_json::from_str(&text)?));
        }
    }
    ensure!(!bars.is_empty(), "`{}` has no results of {date} with ratios", folder.display());
    let path = folder.join(format!("{date}.svg"));
    std::fs::write(&path, svg(&bars, date)).with_context(|| format!("`{}`", path.display()))
}

/// The rows of a report that have a ratio of seconds or rates.
fn bars_of(report: &Value) -> Vec<Bar> {
    let rows = report["rows"].as_array().map_or(&[][..], Vec::as_slice);
    let benchmark = report["benchmark"].as_str().unwrap_or_default();
    let bars = rows.iter().filter_map(|row| {
        let goal = &row["goal"];
        Some(Bar {
            label: format!("{benchmark}: {}", row["what"].as_str()?),
            ratio: row["ratio"].as_f64()?,
            goal: goal["text"].as_str().unwrap_or_default().into(),
            is_met: goal["is_met"].as_bool().unwrap_or(false),
        })
    });
    bars.collect()
}

fn svg(bars: &[Bar], date: &str) -> String {
    let height = TOP + ROW * bars.len() as f64 + 16.0;
    let most = bars.iter().map(|b| b.ratio).fold(1.5, f64::max);
    let x = |ratio: f64| LABEL + (WIDTH - LABEL - 130.0) * ratio / most;
    let mut out = String::new();
    let mut put = |line: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{line}");
    };
    put(format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">"#
    ));
    put(format!(r#"<rect width="{WIDTH}" height="{height}" fill="white"/>"#));
    put(format!(r#"<text x="12" y="22" font-size="15">ltxc / other side, {date} (seconds: less is better)</text>"#));
    let one = x(1.0);
    put(format!(r##"<line x1="{one:.1}" y1="{}" x2="{one:.1}" y2="{height}" stroke="#9ca3af"/>"##, TOP - 12.0));
    for (i, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * i as f64;
        let colour = match (bar.goal.is_empty(), bar.is_met) {
            (true, _) => PLAIN,
            (_, true) => MET,
            (_, false) => MISSED,
        };
        put(format!(r#"<text x="{}" y="{}" text-anchor="end">{}</text>"#, LABEL - 8.0, y + 13.0, escape(&bar.label)));
        let width = x(bar.ratio) - LABEL;
        put(format!(r#"<rect x="{LABEL}" y="{}" width="{width:.1}" height="14" fill="{colour}"/>"#, y + 2.0));
        let text = format!("{:.2} {}", bar.ratio, bar.goal.replace("ratio ", ""));
        put(format!(r#"<text x="{:.1}" y="{}">{}</text>"#, x(bar.ratio) + 6.0, y + 13.0, escape(text.trim())));
    }
    put("</svg>".into());
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ratio_becomes_a_bar() {
        let report = serde_json::json!({"benchmark": "gemm", "rows": [
            {"what": "a <b>", "ratio": 0.5, "goal": {"text": "ratio ≥ 0.9", "is_met": false}},
            {"what": "plan", "ratio": null, "goal": null},
        ]});
        let bars = bars_of(&report);
        assert_eq!(bars.len(), 1);
        let picture = svg(&bars, "2026-11-20");
        assert!(picture.contains("gemm: a &lt;b&gt;") && picture.contains(MISSED) && picture.contains("0.50 ≥ 0.9"));
        assert!(picture.trim_end().ends_with("</svg>"));
    }
}
