//! The PyTorch side: a process that runs one thing again and again. The protocol is in `bench/pytorch/worker.py`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::measure::Sample;

/// How to run the scripts.
#[derive(Clone, Debug)]
pub struct Python {
    /// Interpreter that has PyTorch and ltx-core.
    pub interpreter: PathBuf,
    /// Folder of the scripts.
    pub scripts: PathBuf,
    /// Threads that PyTorch uses.
    pub threads: usize,
}

impl Python {
    /// A command that runs `script`. Its standard error is ours.
    pub fn command(&self, script: &str) -> Command {
        let mut command = Command::new(&self.interpreter);
        let threads = self.threads.to_string();
        command.arg(self.scripts.join(script)).args(["--threads", &threads]);
        for variable in ["OMP_NUM_THREADS", "MKL_NUM_THREADS"] {
            command.env(variable, &threads);
        }
        command
    }

    /// Starts a worker and waits until it is ready.
    ///
    /// # Errors
    /// If it does not start, for example because the interpreter lacks a package.
    pub fn start(&self, script: &str, args: &[(&str, &Path)]) -> Result<Worker> {
        let mut command = self.command(script);
        for (flag, value) in args {
            command.arg(flag).arg(value);
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("`{}`", self.interpreter.display()))?;
        let (stdin, stdout) = child.stdin.take().zip(child.stdout.take()).context("pipes of the worker")?;
        let mut worker = Worker { child, stdin: Some(stdin), stdout: BufReader::new(stdout), about: Value::Null };
        worker.about = worker.answer().with_context(|| format!("starting `{script}`"))?;
        Ok(worker)
    }
}

/// A running worker. Ends with this value.
pub struct Worker {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    about: Value,
}

impl Worker {
    /// What the worker said about itself.
    pub fn about(&self) -> &Value {
        &self.about
    }

    /// Runs once; `words` are the worker's own. Returns the time and the whole answer.
    ///
    /// # Errors
    /// If the worker fails.
    pub fn run(&mut self, words: &str) -> Result<(Sample, Value)> {
        let answer = self.ask(&format!("run {words}"))?;
        let number = |key: &str| answer[key].as_f64().with_context(|| format!("answer of the worker without `{key}`"));
        let sample = Sample { seconds: number("seconds")?, cpu_seconds: number("cpu_seconds")? };
        Ok((sample, answer))
    }

    /// Writes the outputs of the last run to `path`.
    ///
    /// # Errors
    /// If the worker fails.
    pub fn save(&mut self, path: &Path) -> Result<()> {
        self.ask(&format!("save {}", path.display())).map(drop)
    }

    fn ask(&mut self, line: &str) -> Result<Value> {
        let stdin = self.stdin.as_mut().context("the worker has ended")?;
        writeln!(stdin, "{line}").context("writing to the worker")?;
        stdin.flush().context("writing to the worker")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stdout.read_line(&mut line).context("reading from the worker")? == 0 {
            bail!("the worker ended; its messages are above");
        }
        serde_json::from_str(&line).with_context(|| format!("the worker said `{}`", line.trim()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The end of its input is the worker's end.
        self.stdin = None;
        let _ = self.child.wait();
    }
}
