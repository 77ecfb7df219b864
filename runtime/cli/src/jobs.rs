//! `ltxc run --jobs`: many prompts and seeds, one after the other in one process, with the plan of the command or as few as
//! the media and LoRAs of the jobs ask for.
//!
//! A job is a table whose keys are the names of flags; the same flags on the command line are defaults for all jobs. An
//! output that is there was made by an earlier run, because outputs appear whole, and is not made again: after an
//! interruption the same command goes on where it stopped. Names are derived from all that an output depends on (plan,
//! flags, prompts, LoRAs, and what is in the files that are read), except that noise counts by the name of its file, which
//! a run may write. An output that is named by a job is kept, however it was made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, FromArgMatches, Parser, parser::ValueSource};
use ltxc_runtime::RunError;
use serde_json::{Map, Value};

use crate::adapters::Loras;
use crate::args::tables::{complaint, flags_of};
use crate::args::{ContentArgs, OutputArgs, RunAdapterArgs, RunArgs, SamplingArgs, with_negative_numbers};
use crate::choice::{Choice, Occurrences};
use crate::content::{negative_prompt, prompt};
use crate::debug::options::DebugOptions;
use crate::identity;
use crate::job::Shape;
use crate::model_files::local;
use crate::pipelines::{definition, refuse_idle};
use crate::report::Report;
use crate::run::Runner;

/// What a job may choose.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct JobArgs {
    #[command(flatten)]
    content: ContentArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    adapters: RunAdapterArgs,
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
    output: JobOutput,
}

/// Where a job writes.
#[derive(Debug)]
enum JobOutput {
    /// Where it says.
    Named(PathBuf),
    /// A name that follows from what the output is made of.
    Derived { folder: PathBuf, stem: String, made_of: blake3::Hash },
}

impl JobOutput {
    /// The path with the plan of this hash. `usual` makes a name of what stands in front.
    fn with(&self, plan: &[u8; 32], usual: &dyn Fn(&str) -> PathBuf) -> PathBuf {
        match self {
            JobOutput::Named(path) => path.clone(),
            JobOutput::Derived { folder, stem, made_of } => {
                let hash = blake3::Hasher::new().update(plan).update(made_of.as_bytes()).finalize();
                folder.join(usual(&format!("{stem}-{}", &hash.to_hex()[..8])))
            }
        }
    }
}

impl Job {
    fn choice(&self) -> Choice<'_> {
        let JobArgs { content, sampling, adapters, writing } = &self.args;
        Choice { content, sampling, adapters, occurrences: &self.occurrences, writing }
    }
}

/// Jobs that one plan serves as well as plans of their own would.
struct Group<'a> {
    /// What it is compiled for, unless the command has a plan.
    shape: Option<Shape>,
    jobs: Vec<(&'a Job, Loras)>,
}

/// Keys of a job that are no flags.
const NAME: &str = "name";
const OUTPUT: &str = "output";
const SEED: &str = "seed";

/// Keys that say where a job writes.
const OUTPUTS: [&str; 5] = [OUTPUT, "output_path", "output-path", "output_dir", "output-dir"];

/// Flags whose first value is a file or folder that a job reads, and on which its output depends.
const READ: [&str; 11] = [
    "prompt_file",
    "embeddings",
    "image",
    "video_conditioning",
    "conditioning_attention_mask",
    "reference_video",
    "audio_path",
    "video_path",
    "guidance_table",
    "lora",
    "distilled_lora",
];

/// Those of them that may be hub names.
const LORAS: [&str; 2] = ["lora", "distilled_lora"];

/// `ltxc run --jobs`. `command_line` is the parsed command of `args`.
///
/// # Errors
/// A file of jobs, LoRAs, or a plan that cannot be used, and in the end if any job failed. An interruption ends all of them.
pub fn run(args: &RunArgs, path: &Path, command_line: &ArgMatches, report: &mut Report) -> Result<()> {
    let folder = args.output.clone().unwrap_or_else(|| PathBuf::from("."));
    if args.plan.is_none() {
        let pipeline = definition(args.shape.pipeline.unwrap_or_default());
        refuse_idle(pipeline, &Occurrences::of(command_line).given, &args.shape.sampling)?;
    }
    let debug = DebugOptions::of(&args.debug)?;
    if debug.is_on() {
        bail!("flags for debugging look at one run; give them without `--jobs`");
    }
    let jobs = read(path, &tables(path)?, command_line, &folder)?;
    let (total, mut ended, mut made, mut failed) = (jobs.len(), 0, 0, 0);
    for Group { shape, jobs } in groups(args, path, &jobs)? {
        let loras: Vec<&Loras> = jobs.iter().map(|(_, loras)| loras).collect();
        let mut runner = Runner::open(args, shape.as_ref(), &loras, debug.mode.unwrap_or_default(), report)?;
        let mut prepared = Vec::new();
        for (job, loras) in &jobs {
            let output = job.output.with(runner.plan_hash(), &|stem| runner.usual_output(stem, &job.args.content));
            prepared.push((
                job.choice(),
                output,
                runner.prepare(&job.choice(), loras, report).with_context(|| of(path, job))?,
            ));
        }
        let mut executor = runner.executor(report)?;
        for (choice, output, adapters) in prepared {
            ended += 1;
            if is_made(&output) {
                report.job(ended, total, "kept", &output, None);
                made += 1;
                continue;
            }
            match runner.run(&mut executor, &choice, &adapters, &output, debug.clone(), report) {
                Ok(done) => {
                    report.job(ended, total, "done", &done.path, None);
                    made += 1;
                }
                Err(e) if matches!(e.downcast_ref::<RunError>(), Some(RunError::Interrupted)) => {
                    let text =
                        format!("interrupted; {made} of {total} outputs are there, the same command makes the others");
                    return Err(e.context(text));
                }
                Err(e) => {
                    failed += 1;
                    report.job(ended, total, "failed", &output, Some(&e));
                    // What a failed run left on the device is of no use to the next one.
                    executor.unload_all()?;
                }
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {total} jobs failed; the same command runs them again and keeps the others");
    }
    Ok(())
}

/// Opens the LoRAs of all jobs and finds the plans that they need, before anything is compiled.
///
/// # Errors
/// LoRAs that cannot be opened, or media that a plan depends on and that cannot be read; every message says which job.
fn groups<'a>(args: &RunArgs, path: &Path, jobs: &'a [Job]) -> Result<Vec<Group<'a>>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for job in jobs {
        let choice = job.choice();
        let loras = choice.loras().with_context(|| of(path, job))?;
        let shape = choice.shape(args, &loras).with_context(|| of(path, job))?;
        let both = |group: &Group<'_>| match (&group.shape, &shape) {
            (Some(one), Some(two)) => one.or(two).map(Some),
            _ => Some(None),
        };
        match groups.iter_mut().find_map(|group| Some((both(group)?, group))) {
            Some((shape, group)) => {
                group.shape = shape;
                group.jobs.push((job, loras));
            }
            None => groups.push(Group { shape, jobs: vec![(job, loras)] }),
        }
    }
    Ok(groups)
}

/// Which job is meant.
fn of(path: &Path, job: &Job) -> String {
    format!("job file `{}`, job {}", path.display(), job.number)
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

/// Makes jobs of tables. `command_line` holds the flags for all of them, `folder` is for outputs that are not named.
///
/// # Errors
/// A job with a key that is no flag or a value that it does not take, a prompt that cannot be read, or two jobs with the
/// same output. Every message says which job.
fn read(path: &Path, tables: &[Map<String, Value>], command_line: &ArgMatches, folder: &Path) -> Result<Vec<Job>> {
    let file = || format!("job file `{}`", path.display());
    let mut jobs: Vec<Job> = Vec::new();
    for (i, table) in tables.iter().enumerate() {
        let number = i + 1;
        let of = || format!("{}, job {number}", file());
        for table in seeds(table).with_context(of)? {
            jobs.push(job(number, table, command_line, folder).with_context(of)?);
        }
    }
    let mut written = BTreeMap::new();
    for job in &jobs {
        // Jobs that are made of the same have the same name with any plan.
        let output = job.output.with(&[0; 32], &|stem| stem.into());
        if let Some(other) = written.insert(output.clone(), job.number) {
            let output = output.display();
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

fn job(number: usize, mut table: Map<String, Value>, command_line: &ArgMatches, folder: &Path) -> Result<Job> {
    let text = |value: Option<Value>, key: &str| match value {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => bail!("`{key}` is {other}, expected a text"),
    };
    let name = text(table.remove(NAME), NAME)?;
    if let Some(name) = name.as_deref().filter(|name| name.contains(['/', '\\']) || *name == "..") {
        bail!("`{NAME}` is `{name}`, which leads into another folder; name the whole path as `{OUTPUT}`");
    }
    let outputs: Vec<&str> = OUTPUTS.into_iter().filter(|key| table.contains_key(*key)).collect();
    let output = match outputs[..] {
        [] => None,
        [key] => text(table.remove(key), key)?,
        [first, second, ..] => bail!("`{first}` and `{second}` both say where to write; give one of them"),
    };
    let command = with_negative_numbers(JobArgs::command());
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
        Some(path) => JobOutput::Named(PathBuf::from(path.replace("{seed}", &seed.to_string()))),
        None => {
            let made_of = made_of(&line, &matches, &args, command_line.get_flag("enhance_prompt"))?;
            let prompt = args.content.prompt.as_deref().unwrap_or_default();
            let stem = format!("{}-seed{seed}", name.unwrap_or_else(|| slug(prompt)));
            JobOutput::Derived { folder: folder.into(), stem, made_of }
        }
    };
    Ok(Job { number, args, occurrences, output })
}

/// The hash of all that the output of a job depends on besides the plan: its flags, prompts from files, and what is in the
/// files that it reads.
fn made_of(line: &[String], matches: &ArgMatches, args: &JobArgs, enhances_prompt: bool) -> Result<blake3::Hash> {
    let mut hash = blake3::Hasher::new();
    hash.update(&[u8::from(enhances_prompt)]);
    for part in line {
        hash.update(part.as_bytes()).update(&[0]);
    }
    let content = &args.content;
    if [&content.prompt, &content.negative_prompt].into_iter().flatten().any(|text| text == "-") {
        bail!("a job cannot read its prompt from standard input; name a file as `@FILE`");
    }
    for prompt in [prompt(content)?, negative_prompt(content)?] {
        hash.update(prompt.as_bytes()).update(&[0]);
    }
    for flag in READ {
        for occurrence in matches.get_raw_occurrences(flag).into_iter().flatten() {
            let Some(path) = occurrence.into_iter().next().map(Path::new) else { continue };
            // What is missing is said when the job is run.
            let found = if LORAS.contains(&flag) { local(path).ok() } else { Some(path.to_path_buf()) };
            if let Some(path) = found.filter(|path| path.exists()) {
                identity::add(&mut hash, &path).with_context(|| format!("`{}`", path.display()))?;
            }
        }
    }
    Ok(hash.finalize())
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

    fn mp4(stem: &str) -> PathBuf {
        format!("{stem}.mp4").into()
    }

    fn jobs(name: &str, text: &str, flags: &[&str]) -> Result<Vec<Job>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        let line = [&["ltxc", "run", "x.ltxplan", "--jobs", "f"], flags].concat();
        let matches = Cli::command().try_get_matches_from(line)?;
        let run = matches.subcommand_matches("run").expect("the command");
        read(&path, &tables(&path)?, run, Path::new("out"))
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
            assert_eq!(a.output.with(&[7; 32], &mp4), b.output.with(&[7; 32], &mp4));
        }
        assert_eq!(a[1].args.content.seed, "2");
        let output = a[0].output.with(&[7; 32], &mp4);
        assert!(output.to_string_lossy().starts_with("out/a-fox-seed1-"), "{output:?}");
        assert_ne!(a[0].output.with(&[8; 32], &mp4), output);
    }

    #[test]
    fn names_follow_from_what_a_job_says() {
        let one = |text: &str, flags: &[&str]| jobs("x.jsonl", text, flags).unwrap()[0].output.with(&[7; 32], &mp4);
        let plain = one(r#"{"prompt": "rain"}"#, &[]);
        assert_eq!(plain, one("\n{\"prompt\":\"rain\"}\n", &[]));
        assert_ne!(plain, one(r#"{"prompt": "rain."}"#, &[]));
        assert_ne!(plain, one(r#"{"prompt": "rain"}"#, &["--steps", "3"]));
        assert_eq!(one(r#"{"prompt": "rain", "output": "a/{seed}.mp4"}"#, &[]), Path::new("a/10.mp4"));
        assert_eq!(one(r#"{"prompt": "rain", "output_path": "a.mp4"}"#, &[]), Path::new("a.mp4"));
        assert!(one(r#"{"prompt": "", "name": "x"}"#, &[]).to_string_lossy().starts_with("out/x-seed10-"));
    }

    #[test]
    fn names_follow_from_what_files_hold() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("written");
            path.display().to_string()
        };
        let (prompt, image, lora) = (file("p.txt", "rain"), file("a.png", "1"), file("l.safetensors", "1"));
        let text = format!(r#"{{"prompt": "@{prompt}", "image": "{image}", "lora": ["{lora}", 0.5]}}"#);
        let name = |text: &str| jobs("x.jsonl", text, &[]).unwrap()[0].output.with(&[7; 32], &mp4);
        let mut names = vec![name(&text)];
        assert_eq!(name(&text), names[0]);
        for (changed, now) in [("p.txt", "snow"), ("a.png", "2"), ("l.safetensors", "2")] {
            file(changed, now);
            names.push(name(&text));
        }
        assert_ne!(jobs("x.jsonl", &text, &["--enhance-prompt"]).unwrap()[0].output.with(&[7; 32], &mp4), name(&text));
        for (from, to) in
            [("0.5", "0.6"), ("0.5", "0.5, \"stage=1\""), ("\"lora\"", "\"lora-mode\": \"live\", \"lora\"")]
        {
            names.push(name(&text.replace(from, to)));
        }
        let different: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
    }

    #[test]
    fn every_file_that_a_job_reads_counts() {
        // Noise may be written by the first run; the job file itself is no part of a job.
        let others = [
            "jobs",
            "noise_bundle",
            "ltx2_initial_latent_path",
            "ltx2_audio_latent_path",
            "ltx2_refine_noise_path",
            "ltx2_refine_audio_noise_path",
        ];
        for arg in JobArgs::command().get_arguments() {
            let names = arg.get_value_names().unwrap_or_default();
            let is_file = names.first().is_some_and(|name| ["FILE", "PATH", "DIR"].contains(&name.as_str()));
            let id = arg.get_id().as_str();
            assert_eq!(is_file && !others.contains(&id), READ.contains(&id), "`{id}`");
        }
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
        refused("x.jsonl", r#"{"prompt": "-"}"#, &["standard input"]);
        refused("x.jsonl", r#"{"prompt": "@gone.txt"}"#, &["job 1", "gone.txt"]);
        refused("x.jsonl", r#"{"prompt": "a", "name": "../esc"}"#, &["`../esc`", "`output`"]);
        refused("x.jsonl", r#"{"prompt": "a", "output": "a", "output_path": "b"}"#, &["both say where"]);
        refused("x.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"a\"}", &["jobs 1 and 2 both write"]);
    }
}
