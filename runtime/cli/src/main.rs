//! The `ltxc` binary.

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::{ArgMatches, FromArgMatches};
use ltxc::args::{self, Cli, Command, LoraCommand, in_our_words};
use ltxc::choice::Occurrences;
use ltxc::pipelines::{definition, refuse_idle};
use ltxc::report::{QUIET, Report, Style};
use ltxc::{bench, compile, convert, debug, demo, doctor, enhance, info, inspect, jobs, lora, run, synth, tune};
use ltxc_runtime::RunError;

/// Exit code for arguments that cannot be, as the parser has it.
const WRONG_USAGE: u8 = 2;

/// Exit code after Ctrl-C, as shells expect it.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    // Mesa sorts Vulkan devices by asking the display, and complains to standard error where there is none.
    // SAFETY: there is no other thread yet.
    unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    end_without_a_word_for_nobody();
    let line = match in_our_words(std::env::args_os()) {
        Ok(line) => line,
        Err(e) => {
            let is_json = std::env::args_os().any(|arg| arg == "--json");
            Report::new(if is_json { Style::Json } else { Style::Text }).fail(&e);
            return ExitCode::from(WRONG_USAGE);
        }
    };
    let matches = args::command().get_matches_from(line.args);
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    let style = match (cli.json, cli.quiet) {
        (true, _) => Style::Json,
        (_, true) => Style::Quiet,
        _ => Style::Text,
    };
    QUIET.store(cli.quiet, Ordering::Relaxed);
    let mut report = Report::new(style);
    line.notes.iter().for_each(|note| report.note(note));
    if let Err(e) = ctrlc::set_handler(|| run::INTERRUPT.store(true, Ordering::Relaxed)) {
        report.note(&format!("note: Ctrl-C will not clean up: {e}"));
    }
    match execute(&cli, &matches, &mut report) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) if matches!(e.downcast_ref::<RunError>(), Some(RunError::Interrupted)) => {
            let interrupted = RunError::Interrupted.to_string();
            // A batch says what it has written.
            let text = Some(e.to_string()).filter(|text| *text != interrupted);
            eprintln!("{}", text.unwrap_or_else(|| format!("{interrupted}; nothing was written")));
            ExitCode::from(INTERRUPTED)
        }
        Err(e) => {
            report.fail(&e);
            ExitCode::FAILURE
        }
    }
}

/// A reader that has seen enough, as `head` has, ends a command; that is no fault that somebody should be told.
fn end_without_a_word_for_nobody() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let words = info.payload_as_str().unwrap_or_default();
        // `println!` panics there, and the program ends as with any panic: what was begun is cleaned up.
        if !words.starts_with("failed printing to stdout: Broken pipe") {
            previous(info);
        }
    }));
}

/// Runs a command. Returns whether all is well: a command that looks for faults may find some.
fn execute(cli: &Cli, matches: &ArgMatches, report: &mut Report) -> anyhow::Result<bool> {
    let done = match &cli.command {
        Command::Debug(command) => return debug::command::run(command, cli.json),
        Command::Compile(args) => {
            let line = matches.subcommand_matches("compile").map(Occurrences::of).unwrap_or_default();
            let pipeline = definition(args.shape.pipeline.unwrap_or_default());
            refuse_idle(pipeline, &line.given, &args.shape.sampling)?;
            compile::run(args, &line.lora, report)
        }
        Command::Run(args) => match (&args.content.jobs, matches.subcommand_matches("run")) {
            (Some(file), Some(line)) => jobs::run(args, file, line, report),
            (_, line) => run::run(args, &line.map(Occurrences::of).unwrap_or_default(), report),
        },
        Command::Convert(args) => {
            let line = matches.subcommand_matches("convert");
            convert::run(args, &line.map(Occurrences::of).unwrap_or_default().lora, report)
        }
        Command::Tune(args) => tune::run(args, report),
        Command::Info(args) => {
            let line = matches.subcommand_matches("info").map(Occurrences::of).unwrap_or_default();
            info::run(args, &line.given, cli.json)
        }
        Command::EncodeText(args) => return debug::text::export(args, cli.json),
        Command::Inspect(args) => inspect::run(args, cli.json),
        Command::Lora(LoraCommand::Inspect(args)) => lora::inspect(args, cli.json),
        Command::Synth(args) => synth::run(args, report),
        Command::Enhance(args) => enhance::run(args, cli.json, report),
        Command::Bench(args) => {
            let line = matches.subcommand_matches("bench").map(Occurrences::of).unwrap_or_default();
            bench::run(args, &line.given, cli.json, report)
        }
        Command::Demo(args) => demo::run(args, report),
        Command::Doctor => doctor::run(cli.json),
    };
    done.map(|()| true)
}
