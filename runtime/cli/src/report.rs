//! What the user sees while a command runs: progress bars on a terminal, lines elsewhere, JSON objects on request.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use ltxc_runtime::pipeline::{Event, Observer};
use serde_json::json;

/// How to report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Bars and remarks on standard error.
    Text,
    /// One JSON object per event on standard output.
    Json,
    /// What was written.
    Quiet,
    /// Nothing: the command is part of another one.
    Silent,
}

/// Whether nothing but results and errors is printed (`--quiet`), also by code that has no [`Report`].
pub static QUIET: AtomicBool = AtomicBool::new(false);

/// A remark of code that has no [`Report`], to standard error.
pub fn remark(text: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        eprintln!("{text}");
    }
}

/// Reports the events of a run.
pub struct Report {
    style: Style,
    started: Instant,
    stage: Option<Running>,
}

struct Running {
    name: String,
    steps: usize,
    started: Instant,
    bar: Option<ProgressBar>,
}

impl Report {
    /// Reports in `style`.
    pub fn new(style: Style) -> Report {
        Report { style, started: Instant::now(), stage: None }
    }

    /// A remark.
    pub fn note(&mut self, text: &str) {
        match self.style {
            Style::Text => match self.stage.as_ref().and_then(|s| s.bar.as_ref()) {
                Some(bar) => bar.suspend(|| eprintln!("{text}")),
                None => eprintln!("{text}"),
            },
            Style::Json => println!("{}", json!({"event": "note", "text": text})),
            Style::Quiet | Style::Silent => {}
        }
    }

    /// A part of a command that is not a run begins.
    pub fn begin(&mut self, name: &str, steps: usize) {
        self.end();
        let bar = (self.style == Style::Text).then(|| {
            let style = ProgressStyle::with_template("{msg:<8} {wide_bar} {pos}/{len} {elapsed_precise} eta {eta}");
            // The template is a constant that indicatif accepts; the default bar is a good second.
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(steps as u64).with_style(style).with_message(name.to_string())
        });
        if self.style == Style::Json {
            println!("{}", json!({"event": "stage", "name": name, "steps": steps}));
        }
        self.stage = Some(Running { name: name.into(), steps, started: Instant::now(), bar });
    }

    /// A step of the current part has ended.
    pub fn step(&mut self, index: usize) {
        let Some(running) = &self.stage else { return };
        if let Some(bar) = &running.bar {
            bar.set_position(index as u64);
        }
        if self.style == Style::Json {
            let elapsed = running.started.elapsed();
            let left = elapsed.mul_f64((running.steps.saturating_sub(index)) as f64 / index.max(1) as f64);
            let line = json!({
                "event": "step", "stage": running.name, "i": index, "n": running.steps,
                "ms": elapsed.as_millis() as u64, "eta_ms": left.as_millis() as u64,
            });
            println!("{line}");
        }
    }

    /// The current part has ended.
    pub fn end(&mut self) {
        let Some(running) = self.stage.take() else { return };
        let ms = running.started.elapsed().as_millis() as u64;
        if let Some(bar) = running.bar {
            bar.finish_and_clear();
        }
        match self.style {
            Style::Text => eprintln!("{:<8} {:>7.1} s", running.name, ms as f64 / 1e3),
            Style::Json => println!("{}", json!({"event": "stage_end", "name": running.name, "ms": ms})),
            Style::Quiet | Style::Silent => {}
        }
    }

    /// The command has failed: one sentence, with what caused it.
    pub fn fail(&mut self, error: &anyhow::Error) {
        if let Some(Running { bar: Some(bar), .. }) = self.stage.take() {
            bar.finish_and_clear();
        }
        if self.style == Style::Json {
            println!("{}", json!({"event": "error", "text": sentence(error)}));
        }
        eprintln!("error: {}", sentence(error));
    }

    /// A job of many has ended: one line on standard output, whatever the style.
    pub fn job(&mut self, i: usize, n: usize, status: &str, path: &std::path::Path, error: Option<&anyhow::Error>) {
        self.end();
        let error = error.map(sentence);
        match (self.style, &error) {
            (Style::Json, _) => {
                println!("{}", json!({"event": "job", "i": i, "n": n, "status": status, "path": path, "error": error}));
            }
            (_, None) => println!("{status} {}", path.display()),
            (_, Some(error)) => println!("{status} {}: {error}", path.display()),
        }
    }

    /// The command has written `path`; the path is the last line on standard output.
    pub fn finish(&mut self, path: &std::path::Path, facts: serde_json::Value) {
        self.end();
        let ms = self.started.elapsed().as_millis() as u64;
        match self.style {
            Style::Json => println!("{}", json!({"event": "done", "path": path, "ms": ms, "facts": facts})),
            Style::Silent => {}
            _ => println!("{}", path.display()),
        }
    }
}

impl Observer for Report {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Stage { name, steps } => self.begin(name, steps),
            Event::Step { index, .. } => self.step(index),
            Event::Note(text) => self.note(&text),
            Event::Tensor { .. } => {}
        }
    }
}

/// An error with its causes. Many messages quote their cause already; it is not said twice.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        _ if text.contains(&cause) => text,
        _ => format!("{text}: {cause}"),
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn causes_are_said_once() {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let quoting = anyhow::Error::from(ltxc_runtime::RunError::io("x", missing()));
        assert_eq!(sentence(&quoting), "`x`: entity not found");
        let context = Err::<(), _>(missing()).context("plan `x`").unwrap_err();
        assert_eq!(sentence(&context), "plan `x`: entity not found");
    }
}
