//! `ltxc run --jobs`: many prompts and seeds with one plan, one after the other in one process.
//!
//! A job is a table whose keys are the names of flags; the same flags on the command line are defaults for all jobs. An
//! output that is there was made by an earlier run, because outputs appear whole, and is not made again: after an
//! interruption the same command goes on where it stopped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches, Id, Parser, parser::ValueSource};
use ltxc_runtime::RunError;
use serde_json::{Map, Value};

use crate::args::{ContentArgs, OutputArgs, RunArgs, SamplingArgs};
use crate::debug::flags::DebugOptions;
use crate::report::Report;
use crate::run::{Choice, Occurrences, Room, Runner};

/// What a job may choose.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct JobArgs {
    #[command(flatten)]
    content: ContentArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    writing: OutputArgs,
}

/// A job, ready to run.
#[derive(Debug)]
struct Job {
    /// Number in the file, from 1.
    number: usize,
    /// What it chooses.
    args: JobArgs,
    /// Of the flags in `args`.
    occurrences: Occurrences,
    /// Where it writes.
    output: PathBuf,
}

/// Keys of a job that are no flags.
const NAME: &str = "name";
const OUTPUT: &str = "output";
const SEED: &str = "seed";

/// `ltxc run --jobs`. `command_line` is the parsed command of `args`.
///
/// # Errors
/// A file of jobs or a plan that cannot be used, and in the end if any job failed. An interruption ends all of them.
pub fn run(args: &RunArgs, path: &Path, command_line: &ArgMatches, report: &mut Report) -> Result<()> {
    let tables = tables(path)?;
    // A plan that is compiled on the way has room for what every job brings.
    let jobs = |folder: &Path, hash: &[u8; 32]| read(path, &tables, command_line, folder, hash);
    let folder = match command_line.value_source("output") {
        Some(ValueSource::CommandLine) => args.output.clone(),
        _ => PathBuf::from("."),
    };
    let mut room = Room::default();
    for job in jobs(&folder, &[0; 32])? {
        room = room.or(Room::of(args, &job.args.content, &job.occurrences)?);
    }
    let debug = DebugOptions::of(&args.debug)?;
    if debug.is_on() {
        bail!("flags for debugging look at one run; give them without `--jobs`");
    }
    let loras = Occurrences::of(command_line).lora;
    let runner = Runner::open(args, room, &loras, debug.mode.unwrap_or_default(), report)?;
    let jobs = jobs(&folder, runner.plan_hash())?;
    let mut executor = runner.executor(report)?;
    let total = jobs.len();
    let mut failed = 0;
    for (i, job) in jobs.iter().enumerate() {
        if is_made(&job.output) {
            report.job(i + 1, total, "kept", &job.output, None);
            continue;
        }
        let choice = Choice {
            content: &job.args.content,
            sampling: &job.args.sampling,
            occurrences: &job.occurrences,
            output: &job.output,
            writing: &job.args.writing,
        };
        match runner.run(&mut executor, &choice, debug.clone(), report) {
            Ok(made) => report.job(i + 1, total, "done", &made.path, None),
            Err(e) if matches!(e.downcast_ref::<RunError>(), Some(RunError::Interrupted)) => return Err(e),
            Err(e) => {
                failed += 1;
                report.job(i + 1, total, "failed", &job.output, Some(&e));
                // What a failed run left on the device is of no use to the next one.
                executor.unload_all()?;
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {total} jobs failed; the same command runs them again and keeps the others");
    }
    Ok(())
}

/// Whether an output is there; a folder of frames has at least one.
fn is_made(path: &Path) -> bool {
    path.is_file() || std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

/// Reads the tables of a file: TOML with `[[job]]`, or one JSON object per line.
fn tables(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let file = || format!("job file `{}`", path.display());
    let text = std::fs::read_to_string(path).with_context(file)?;
    let is_toml = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml"));
    let tables = if is_toml { toml_jobs(&text) } else { json_jobs(&text) }.with_context(file)?;
    if tables.is_empty() {
        bail!("{} has no jobs; write `[[job]]` tables (.toml), or one JSON object per line (.jsonl)", file());
    }
    Ok(tables)
}

/// Makes jobs of tables. `command_line` holds the flags for all of them, `folder` is for outputs that are not named, and
/// `plan` is the hash of the plan.
///
/// # Errors
/// A job with a key that is no flag or a value that it does not take, two jobs with the same
/// output. Every message says which job.
fn read(
    path: &Path,
    tables: &[Map<String, Value>],
    command_line: &ArgMatches,
    folder: &Path,
    plan: &[u8; 32],
) -> Result<Vec<Job>> {
    let file = || format!("job file `{}`", path.display());
    let mut jobs: Vec<Job> = Vec::new();
    for (i, table) in tables.iter().enumerate() {
        let number = i + 1;
        let of = || format!("{}, job {number}", file());
        for table in seeds(table).with_context(of)? {
            jobs.push(job(number, table, command_line, folder, plan).with_context(of)?);
        }
    }
    let mut written = BTreeMap::new();
    for job in &jobs {
        if let Some(other) = written.insert(&job.output, job.number) {
            let output = job.output.display();
            bail!("{}: jobs {other} and {} both write `{output}`; change one of them", file(), job.number);
        }
    }
    Ok(jobs)
}

/// `[[job]]` tables; keys in front of them hold for all.
fn toml_jobs(text: &str) -> Result<Vec<Map<String, Value>>> {
    let parsed: toml::Table = text.parse()?;
    let Value::Object(mut all) = serde_json::to_value(parsed)? else { bail!("it is not a table") };
    let jobs = match all.remove("job") {
        Some(Value::Array(jobs)) => jobs,
        None => Vec::new(),
        Some(_) => bail!("`job` is not a list of tables; write `[[job]]`"),
    };
    let with_defaults = |job| match job {
        Value::Object(job) => Ok(all.clone().into_iter().chain(job).collect()),
        _ => bail!("`job` is not a list of tables; write `[[job]]`"),
    };
    jobs.into_iter().map(with_defaults).collect()
}

fn json_jobs(text: &str) -> Result<Vec<Map<String, Value>>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("line {} is not a JSON object", i + 1))
    };
    lines.map(parse).collect()
}

/// A table for each of its seeds.
fn seeds(table: &Map<String, Value>) -> Result<Vec<Map<String, Value>>> {
    let Some(Value::Array(seeds)) = table.get(SEED) else { return Ok(vec![table.clone()]) };
    if seeds.is_empty() {
        bail!("`seed` is an empty list");
    }
    let with = |seed: &Value| {
        let mut table = table.clone();
        table.insert(SEED.into(), seed.clone());
        table
    };
    Ok(seeds.iter().map(with).collect())
}

fn job(
    number: usize,
    mut table: Map<String, Value>,
    command_line: &ArgMatches,
    folder: &Path,
    plan: &[u8; 32],
) -> Result<Job> {
    let text = |value: Option<Value>, key: &str| match value {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => bail!("`{key}` is {other}, expected a text"),
    };
    let (name, output) = (text(table.remove(NAME), NAME)?, text(table.remove(OUTPUT), OUTPUT)?);
    let command = JobArgs::command();
    let (mut line, given) = flags_of(&table, &command)?;
    let defaults = command.get_arguments().filter(|arg| {
        let source = command_line
            .try_contains_id(arg.get_id().as_str())
            .ok()
            .and_then(|_| command_line.value_source(arg.get_id().as_str()));
        source == Some(ValueSource::CommandLine) && !given.contains(arg.get_id()) && arg.get_id() != "jobs"
    });
    for arg in defaults {
        push_given(&mut line, arg, command_line);
    }

    let matches = command.clone().try_get_matches_from(&line).map_err(complaint)?;
    let args = JobArgs::from_arg_matches(&matches).map_err(complaint)?;
    let occurrences = Occurrences::of(&matches);
    let Ok(seed) = args.content.seed.parse::<u64>() else {
        bail!(
            "`seed` is `{}`; a job needs a number, so that it gives the same video when it is run again",
            args.content.seed
        );
    };
    let output = match output {
        Some(path) => PathBuf::from(path.replace("{seed}", &seed.to_string())),
        None => {
            let mut hash = blake3::Hasher::new();
            hash.update(plan);
            for part in &line {
                hash.update(part.as_bytes()).update(&[0]);
            }
            let prompt = args.content.prompt.as_deref().unwrap_or_default();
            let stem = name.unwrap_or_else(|| slug(prompt));
            folder.join(format!("{stem}-seed{seed}-{}.mp4", &hash.finalize().to_hex()[..8]))
        }
    };
    Ok(Job { number, args, occurrences, output })
}

/// The flags of `command` whose names are keys of a table, as a command line, and their ids.
///
/// # Errors
/// A key that is no flag, or a value that is none.
pub fn flags_of(table: &Map<String, Value>, command: &Command) -> Result<(Vec<String>, Vec<Id>)> {
    let (mut line, mut given) = (Vec::new(), Vec::new());
    for (key, value) in table {
        let flag = key.replace('_', "-");
        let found = command.get_arguments().find(|arg| names(arg).contains(&flag));
        let Some(arg) = found.filter(|arg| arg.get_id() != "jobs") else {
            bail!("`{key}` is not a flag that can be given here");
        };
        given.push(arg.get_id().clone());
        push(&mut line, arg, value).with_context(|| format!("`{key}`"))?;
    }
    Ok((line, given))
}

/// The long names of a flag.
fn names(arg: &Arg) -> Vec<String> {
    let aliases = arg.get_all_aliases().unwrap_or_default();
    arg.get_long().into_iter().chain(aliases).map(str::to_owned).collect()
}

/// Adds a flag with the values of a job.
fn push(line: &mut Vec<String>, arg: &Arg, value: &Value) -> Result<()> {
    let flag = format!("--{}", arg.get_long().unwrap_or_default());
    let scalar = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => bail!("{other} is not a text or number"),
    };
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return match value {
            Value::Bool(is_on) => {
                line.extend(is_on.then_some(flag));
                Ok(())
            }
            other => bail!("{other} is not true or false"),
        };
    }
    let takes_many = arg.get_num_args().is_some_and(|n| n.max_values() > 1);
    match value {
        Value::Array(lists) if takes_many && lists.iter().any(Value::is_array) => {
            return lists.iter().try_for_each(|list| push(line, arg, list));
        }
        Value::Array(values) if takes_many => {
            line.push(flag);
            line.extend(values.iter().map(scalar).collect::<Result<Vec<_>>>()?);
        }
        Value::Array(values) if arg.get_value_delimiter().is_some() => {
            let values = values.iter().map(scalar).collect::<Result<Vec<_>>>()?;
            line.push(format!("{flag}={}", values.join(",")));
        }
        value => line.push(format!("{flag}={}", scalar(value)?)),
    }
    Ok(())
}

/// Adds a flag as it was given on the command line.
fn push_given(line: &mut Vec<String>, arg: &Arg, command_line: &ArgMatches) {
    let flag = format!("--{}", arg.get_long().unwrap_or_default());
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        line.push(flag);
        return;
    }
    for occurrence in command_line.get_raw_occurrences(arg.get_id().as_str()).into_iter().flatten() {
        let values: Vec<String> = occurrence.map(|value| value.to_string_lossy().into_owned()).collect();
        match (&values[..], arg.get_value_delimiter()) {
            (many, Some(delimiter)) => line.push(format!("{flag}={}", many.join(&delimiter.to_string()))),
            ([one], None) => line.push(format!("{flag}={one}")),
            (many, None) => line.extend(std::iter::once(flag.clone()).chain(many.iter().cloned())),
        }
    }
}

/// What the parser of the command line complains about, without its advice on usage.
fn complaint(error: clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    anyhow::Error::msg(lines.join(" ").trim_start_matches("error: ").to_owned())
}

/// The first words of a prompt, as a file name.
fn slug(prompt: &str) -> String {
    let words = prompt.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    let mut slug = String::new();
    for word in words {
        if slug.len() + word.len() > 40 {
            break;
        }
        if !slug.is_empty() {
            slug.push('-');
        }
        slug.push_str(&word.to_lowercase());
    }
    if slug.is_empty() { "video".into() } else { slug }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;

    fn jobs(name: &str, text: &str, flags: &[&str]) -> Result<Vec<Job>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        let line = [&["ltxc", "run", "x.ltxplan", "--jobs", "f"], flags].concat();
        let matches = Cli::command().try_get_matches_from(line)?;
        let run = matches.subcommand_matches("run").expect("the command");
        read(&path, &tables(&path)?, run, Path::new("out"), &[7; 32])
    }

    #[track_caller]
    fn refused(name: &str, text: &str, words: &[&str]) {
        let error = format!("{:#}", jobs(name, text, &[]).expect_err("a bad file"));
        for word in words {
            assert!(error.contains(word), "`{word}` is missing in: {error}");
        }
    }

    #[test]
    fn jobs_of_both_formats_mean_the_same() {
        let toml = "num_inference_steps = 4\n[[job]]\nprompt = 'a fox'\nseed = [1, 2]\nimage = [['a.png'], ['b.png', 8, 0.5]]\n";
        let json =
            r#"{"prompt": "a fox", "seed": [1, 2], "num-inference-steps": 4, "image": [["a.png"], ["b.png", 8, 0.5]]}"#;
        let (a, b) = (jobs("x.toml", toml, &[]).unwrap(), jobs("x.jsonl", json, &[]).unwrap());
        assert_eq!((a.len(), b.len()), (2, 2));
        for (a, b) in a.iter().zip(&b) {
            assert_eq!(a.args.content.prompt.as_deref(), Some("a fox"));
            assert_eq!(a.args.content.num_inference_steps, Some(4));
            assert_eq!(a.args.content.image, ["a.png", "b.png", "8", "0.5"]);
            assert_eq!(a.occurrences.image, [1, 3]);
            assert_eq!(a.output, b.output);
        }
        assert_eq!(a[1].args.content.seed, "2");
        assert!(a[0].output.to_string_lossy().starts_with("out/a-fox-seed1-"), "{:?}", a[0].output);
    }

    #[test]
    fn names_follow_from_what_a_job_says() {
        let one = |text: &str, flags: &[&str]| jobs("x.jsonl", text, flags).unwrap().remove(0).output;
        let plain = one(r#"{"prompt": "rain"}"#, &[]);
        assert_eq!(plain, one("\n{\"prompt\":\"rain\"}\n", &[]));
        assert_ne!(plain, one(r#"{"prompt": "rain."}"#, &[]));
        assert_ne!(plain, one(r#"{"prompt": "rain"}"#, &["--steps", "3"]));
        assert_eq!(one(r#"{"prompt": "rain", "output": "a/{seed}.mp4"}"#, &[]), Path::new("a/10.mp4"));
        assert!(one(r#"{"prompt": "", "name": "x"}"#, &[]).to_string_lossy().starts_with("out/x-seed10-"));
    }

    #[test]
    fn flags_of_the_command_line_are_defaults() {
        let flags = ["--prompt", "rain", "--seed", "5", "--image", "a.png", "0", "0.9", "--sigmas", "1,0.5,0"];
        let found = jobs("x.jsonl", "{}\n{\"prompt\": \"snow\", \"image\": \"b.png\"}", &flags).unwrap();
        let prompts: Vec<_> = found.iter().filter_map(|job| job.args.content.prompt.as_deref()).collect();
        assert_eq!(prompts, ["rain", "snow"]);
        assert!(found.iter().all(|job| job.args.content.sigmas == Some(vec![1.0, 0.5, 0.0])));
        assert!(found.iter().all(|job| job.args.content.seed == "5"));
        assert_eq!((&found[0].occurrences.image[..], &found[1].occurrences.image[..]), (&[3][..], &[1][..]));
    }

    #[test]
    fn bad_files_say_where_and_why() {
        refused("x.jsonl", "", &["has no jobs", "[[job]]"]);
        refused("x.jsonl", "{\"prompt\": \"a\"}\n[1]", &["line 2"]);
        refused("x.toml", "job = 3", &["[[job]]"]);
        refused("x.jsonl", r#"{"prompt": "a", "promt": 1}"#, &["job 1", "`promt`"]);
        refused("x.jsonl", r#"{"prompt": "a", "height": 64}"#, &["`height`"]);
        refused("x.jsonl", r#"{"prompt": "a", "num_inference_steps": "x"}"#, &["job 1", "invalid value"]);
        refused("x.jsonl", r#"{"prompt": "a", "seed": "random"}"#, &["`random`", "number"]);
        refused("x.jsonl", r#"{"prompt": ["a"]}"#, &["`prompt`"]);
        refused("x.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"a\"}", &["jobs 1 and 2 both write"]);
        refused("x.jsonl", "{}", &["--prompt"]);
    }
}
