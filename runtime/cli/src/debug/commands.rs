//! Commands that other commands run: our own, in this process, and those of a reference implementation.

use std::ffi::OsString;
use std::process::Command as Process;

use anyhow::{Context, Result, bail};
use clap::{ArgMatches, FromArgMatches, Parser};

use super::command;
use crate::args::{self, Cli, Command, RunArgs, in_our_words};
use crate::choice::Occurrences;
use crate::report::{Report, Style};
use crate::run;

fn parsed(words: &[String]) -> Result<(Command, ArgMatches)> {
    let line = std::iter::once("ltxc").chain(words.iter().map(String::as_str)).map(OsString::from);
    let matches = args::command().try_get_matches_from(in_our_words(line)?.args)?;
    Ok((Cli::from_arg_matches(&matches)?.command, matches))
}

/// Runs `ltxc debug …` in this process, as a user would. Returns whether it found nothing wrong.
///
/// # Errors
/// Arguments that are none, or what the command fails with.
pub fn debug_line(args: &[String], json_output: bool) -> Result<bool> {
    match parsed(args)?.0 {
        Command::Debug(command) => command::run(&command, json_output),
        _ => bail!("`ltxc {}` is no debugging command", args.join(" ")),
    }
}

/// Runs `ltxc run …` in this process, with what `change` makes of its arguments.
///
/// # Errors
/// Arguments that are none, or what the run fails with.
pub fn run_line(args: &[String], change: impl FnOnce(&mut RunArgs)) -> Result<()> {
    let (Command::Run(mut run), matches) = parsed(args)? else { bail!("`ltxc {}` is no run", args.join(" ")) };
    change(&mut run);
    let occurrences = matches.subcommand_matches("run").map(Occurrences::of).unwrap_or_default();
    run::run(&run, &occurrences, &mut Report::new(Style::Silent))
}

/// What `ltxc run` without any flag but the prompt means.
///
/// # Errors
/// Never, unless the command line of this program is broken.
pub fn run_args(prompt: &str) -> Result<Box<RunArgs>> {
    match Cli::try_parse_from(["ltxc", "run", "--prompt", prompt])?.command {
        Command::Run(args) => Ok(args),
        _ => bail!("`ltxc run` is no run"),
    }
}

/// Runs a reference's `command` in a shell, with `values` in the places that have their names, and with `variables` in its
/// environment. What it prints goes to standard error.
///
/// # Errors
/// A command that cannot be started, or that fails.
pub fn shell(command: &str, values: &[(&str, String)], variables: &[(&str, String)]) -> Result<()> {
    let filled = values.iter().fold(command.to_string(), |text, (name, value)| text.replace(name, value));
    let (program, flag) = if cfg!(windows) { ("cmd", "/C") } else { ("sh", "-c") };
    let output = Process::new(program)
        .args([flag, &filled])
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .output()
        .with_context(|| format!("the reference's command `{filled}`"))?;
    let text = [output.stdout, output.stderr].concat();
    eprint!("{}", String::from_utf8_lossy(&text));
    if !output.status.success() {
        bail!("the reference's command failed ({}): `{filled}`; what it said is above", output.status);
    }
    Ok(())
}
