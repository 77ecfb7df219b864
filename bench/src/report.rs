//! Results: a table for people and JSON for programs, with everything that is needed to measure again.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
pub use ltxc::bench::figure;
use serde::Serialize;

use crate::machine::Machine;
use crate::measure::Turns;

/// What a benchmark found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the benchmark.
    pub benchmark: String,
    /// When it was measured, `YYYY-MM-DD`.
    pub date: String,
    /// What it was measured on.
    pub machine: Machine,
    /// Threads of each side.
    pub threads: usize,
    /// The command line, without paths of this machine.
    pub command: String,
    /// What the other side is, for the head of the table.
    pub reference: String,
    /// What was measured.
    pub rows: Vec<Row>,
    /// Where time goes and the like.
    pub tables: Vec<Table>,
    /// What else to know: differences of the results, sides that were left out.
    pub notes: Vec<String>,
}

/// One measured thing.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What it is.
    pub what: String,
    /// Unit of both values.
    pub unit: &'static str,
    /// Value of ltxc.
    pub ours: f64,
    /// Value of the other side.
    pub reference: Option<f64>,
    /// `ours / reference`, the median over rounds where there are several.
    pub ratio: Option<f64>,
    /// What is aimed at.
    pub goal: Option<Goal>,
    /// The single runs behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turns: Option<Turns>,
}

impl Row {
    /// A value without another side.
    pub fn value(what: impl Into<String>, unit: &'static str, ours: f64) -> Row {
        Row { what: what.into(), unit, ours, reference: None, ratio: None, goal: None, turns: None }
    }

    /// Seconds of two sides that took turns.
    pub fn turns(what: impl Into<String>, turns: Turns) -> Row {
        Row { reference: turns.their_seconds(), ratio: turns.ratio(), ..Row::value(what, "s", turns.our_seconds()) }
            .with_turns(turns)
    }

    /// Values of which the ratio was taken elsewhere.
    pub fn compared(what: impl Into<String>, unit: &'static str, ours: f64, reference: f64, ratio: Option<f64>) -> Row {
        Row { reference: Some(reference), ratio: ratio.or(Some(ours / reference)), ..Row::value(what, unit, ours) }
    }

    fn with_turns(self, turns: Turns) -> Row {
        Row { turns: Some(turns), ..self }
    }

    /// Aims at a ratio of at most `limit`.
    pub fn ratio_at_most(self, limit: f64) -> Row {
        let goal = self.ratio.map(|r| Goal { text: format!("ratio ≤ {limit}"), is_met: r <= limit });
        Row { goal, ..self }
    }

    /// Aims at a ratio of at least `limit`.
    pub fn ratio_at_least(self, limit: f64) -> Row {
        let goal = self.ratio.map(|r| Goal { text: format!("ratio ≥ {limit}"), is_met: r >= limit });
        Row { goal, ..self }
    }

    /// Aims at a value of at most `limit`.
    pub fn at_most(self, limit: f64) -> Row {
        let goal = Some(Goal { text: format!("≤ {limit} {}", self.unit), is_met: self.ours <= limit });
        Row { goal, ..self }
    }
}

/// What a value should be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// For the table.
    pub text: String,
    /// Whether it is.
    pub is_met: bool,
}

/// A table of its own.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// Line above it.
    pub title: String,
    /// Head.
    pub columns: Vec<&'static str>,
    /// Cells, as printed.
    pub rows: Vec<Vec<String>>,
}

impl Report {
    /// The report as Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!("# {}\n\n", self.benchmark);
        let lines = [
            ("date", self.date.clone()),
            ("machine", self.machine.to_string()),
            ("threads", self.threads.to_string()),
            ("command", format!("`{}`", self.command)),
        ];
        for (name, value) in lines {
            line(&mut text, &format!("- {name}: {value}"));
        }
        text.push('\n');
        let mut columns = vec!["what", "ltxc", self.reference.as_str(), "ratio", "goal"];
        let mut rows: Vec<Vec<String>> = self.rows.iter().map(cells).collect();
        // Columns that are empty everywhere are left out.
        for i in (0..columns.len()).rev() {
            if rows.iter().all(|r| r[i].is_empty()) {
                columns.remove(i);
                rows.iter_mut().for_each(|r| drop(r.remove(i)));
            }
        }
        markdown_table(&mut text, &columns, &rows);
        for table in &self.tables {
            line(&mut text, &format!("\n## {}\n", table.title));
            markdown_table(&mut text, &table.columns, &table.rows);
        }
        if !self.notes.is_empty() {
            text.push('\n');
            self.notes.iter().for_each(|note| line(&mut text, &format!("- {note}")));
        }
        text
    }

    /// Writes `<date>-<benchmark>.md` and `.json` into `folder`.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let name = format!("{}-{}", self.date, self.benchmark.replace(' ', "-"));
        let write = |extension: &str, text: String| {
            let path = folder.join(format!("{name}.{extension}"));
            std::fs::write(&path, text).with_context(|| format!("`{}`", path.display()))
        };
        std::fs::create_dir_all(folder).with_context(|| format!("`{}`", folder.display()))?;
        write("md", self.markdown())?;
        write("json", serde_json::to_string_pretty(self)? + "\n")
    }
}

fn cells(row: &Row) -> Vec<String> {
    let with_unit = |value: f64| format!("{} {}", figure(value), row.unit).trim_end().to_string();
    let goal = row.goal.as_ref().map(|g| format!("{} {}", g.text, if g.is_met { "✓" } else { "✗" }));
    vec![
        row.what.clone(),
        with_unit(row.ours),
        row.reference.map(with_unit).unwrap_or_default(),
        row.ratio.map(figure).unwrap_or_default(),
        goal.unwrap_or_default(),
    ]
}

/// Appends a table.
pub(crate) fn markdown_table(text: &mut String, columns: &[&str], rows: &[Vec<String>]) {
    let width = |i: usize| {
        let cells = rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count());
        cells.chain([columns[i].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut put = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells.zip(&widths).map(|(c, w)| format!("{c:w$}"));
        line(text, &format!("| {} |", padded.collect::<Vec<_>>().join(" | ")));
    };
    put(&mut columns.iter().copied());
    let rules: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
    put(&mut rules.iter().map(String::as_str));
    rows.iter().for_each(|row| put(&mut row.iter().map(String::as_str)));
}

/// Appends a line.
pub(crate) fn line(text: &mut String, content: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{content}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_checked() {
        let row = |ratio| Row::compared("x", "s", ratio, 1.0, None);
        assert!(row(1.2).ratio_at_most(1.25).goal.unwrap().is_met);
        assert!(!row(1.2).ratio_at_least(3.0).goal.unwrap().is_met);
        assert_eq!(Row::value("x", "s", 1.0).ratio_at_most(1.25).goal, None);
        assert_eq!(Row::value("x", "MB", 3.0).at_most(1.0).goal.unwrap().text, "≤ 1 MB");
    }
}
