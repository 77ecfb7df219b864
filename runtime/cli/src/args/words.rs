//! The command line in the words of this program, where other tools write it differently.
//!
//! Other names of one flag are aliases, which the parser knows. Here is what it cannot do: pipelines, plans and prompts as
//! words without a flag; flags that mean a pipeline, another flag with a value, or nothing; files of flags (see
//! [`super::config`]). The line is read with the parser's own definitions, so both agree on which word is a value.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::error::ContextKind;
use clap::{Arg, Command, ValueEnum};

use super::config::Refinement;
use super::foreign::{Answer, Values, foreign, missing_pipeline};
use super::{PipelineName, config};
use crate::content::LAST;
use crate::model_files::{local, upsampler_beside};
use crate::pipelines::{Training, definition, training_named};

/// A command line in our words.
#[derive(Debug, Default)]
pub struct Line {
    /// The arguments, with the program in front.
    pub args: Vec<OsString>,
    /// What is to be said about them.
    pub notes: Vec<String>,
}

/// A flag with its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given {
    /// Its name without dashes in front: that of the help, for a flag of this program.
    pub name: String,
    /// What follows it.
    pub values: Vec<OsString>,
}

impl Given {
    pub fn new(name: &str, value: impl Into<OsString>) -> Given {
        Given { name: name.into(), values: vec![value.into()] }
    }

    /// Its only value as text.
    fn text(&self) -> Option<&str> {
        self.values.first()?.to_str()
    }

    /// As arguments. One value stays with its flag, so that it can look like one.
    fn args(self) -> Vec<OsString> {
        let mut flag = OsString::from(format!("--{}", self.name));
        match <[OsString; 1]>::try_from(self.values) {
            Ok([value]) => {
                flag.push("=");
                flag.push(value);
                vec![flag]
            }
            Err(values) => [vec![flag], values].concat(),
        }
    }
}

/// A part of a command line.
#[derive(Debug)]
enum Token {
    Flag(Given),
    /// A word that is no value of a flag. `behind` is a flag in front of it that has all the values it takes, several.
    Word {
        word: OsString,
        behind: Option<String>,
    },
}

/// Commands whose words and flags are translated.
const COMMANDS: [&str; 3] = ["run", "compile", "inspect"];

/// Flags that choose a pipeline in other tools.
const MODES: [(&str, &str); 5] = [
    ("distilled", "distilled"),
    ("one-stage", "one-stage"),
    ("two-stage", "two-stage"),
    ("two-stages", "two-stage"),
    ("two-stages-hq", "hq"),
];

/// Flags that mean another one with a value.
const SWITCHES: [(&str, &str, &str); 3] =
    [("fp8", "quantization", "fp8-cast"), ("fp16", "dtype", "f16"), ("fp32", "dtype", "f32")];

/// Flags that are translated one by one below, with the number of values that they take.
const TRANSLATED: [(&str, Values); 7] = [
    ("start", Values::One),
    ("end", Values::One),
    ("output-video-name", Values::One),
    ("refine-enabled", Values::Switch),
    ("refine-guidance-scale", Values::One),
    ("refine-add-noise", Values::Switch),
    ("refine-transformer-path", Values::One),
];

/// The word for a pipeline that fits the model.
const GENERATE: &str = "generate";

/// Flags that words without a flag may stand for.
const PIPELINE: &str = "pipeline";
const PROMPT: &str = "prompt";

/// The command line in our words.
///
/// # Errors
/// Flags and words of other tools for what does not exist here, and files of flags that cannot be read.
pub fn in_our_words(args: impl IntoIterator<Item = OsString>) -> Result<Line> {
    let args: Vec<OsString> = args.into_iter().collect();
    let mut root = super::command();
    root.build();
    // Flags in front of the command take no values.
    let at = args.iter().skip(1).position(|arg| !arg.to_string_lossy().starts_with('-')).map(|i| i + 1);
    let command = at.and_then(|at| root.find_subcommand(args[at].to_str()?));
    let (Some(at), Some(command)) = (at, command.filter(|command| COMMANDS.contains(&command.get_name()))) else {
        return Ok(Line { args: args.into_iter().map(dashed).map(pipeline_of_mode).collect(), notes: Vec::new() });
    };
    let (front, rest) = args.split_at(at + 1);
    let (tokens, tail) = tokens(rest, command)?;
    let (mut flags, mut loose) = (Vec::new(), Vec::new());
    for token in tokens {
        match token {
            Token::Flag(flag) => flags.push(flag),
            Token::Word { word, .. } if names_pipeline(&word) => flags.push(Given::new(PIPELINE, word)),
            Token::Word { word, behind } => loose.push((word, behind)),
        }
    }
    let mut words = Words { has_prompt: has(&flags, PROMPT), ..Words::default() };
    let flags = config::with_files(flags, command)?;
    let mut kept = Vec::new();
    for flag in flags {
        words.translate(flag, &mut kept)?;
    }
    for (word, behind) in loose {
        words.place(word, behind, command.get_name() == "run", &mut kept)?;
    }
    words.finish(command, &mut kept)?;
    let front = front.iter().cloned().map(dashed);
    let kept = kept.into_iter().flat_map(Given::args);
    // Words come first: behind flags of several values they would be one of these.
    Ok(Line { args: front.chain(words.plan).chain(words.others).chain(kept).chain(tail).collect(), notes: words.notes })
}

/// `-` for `_` in the name of a long flag.
fn dashed(arg: OsString) -> OsString {
    match arg.to_str() {
        Some(text) if text.starts_with("--") => {
            let end = text.find('=').unwrap_or(text.len());
            format!("{}{}", text[..end].replace('_', "-"), &text[end..]).into()
        }
        _ => arg,
    }
}

/// `--pipeline=NAME` for a flag that chooses a pipeline.
fn pipeline_of_mode(arg: OsString) -> OsString {
    let mode = arg.to_str().and_then(|text| text.strip_prefix("--"));
    let pipeline = mode.and_then(|mode| MODES.iter().find(|(flag, _)| *flag == mode));
    pipeline.map_or(arg.clone(), |(_, pipeline)| format!("--pipeline={pipeline}").into())
}

/// Splits arguments into flags with their values, and other words. What follows a flag that nobody knows is left to the
/// parser, which complains.
fn tokens(args: &[OsString], command: &Command) -> Result<(Vec<Token>, Vec<OsString>)> {
    let mut tokens = Vec::new();
    let mut rest = args;
    let mut behind = None;
    while let Some((arg, after)) = rest.split_first() {
        let Some(text) = arg.to_str() else {
            if arg.to_string_lossy().starts_with('-') {
                return Ok((tokens, rest.to_vec()));
            }
            tokens.push(Token::Word { word: arg.clone(), behind: None });
            rest = after;
            continue;
        };
        // Behind two dashes there are no flags, and help has a short and a long form.
        if ["--", "-h", "--help"].contains(&text) {
            return Ok((tokens, rest.to_vec()));
        }
        if !is_flag(text) {
            tokens.push(Token::Word { word: arg.clone(), behind: behind.take() });
            rest = after;
            continue;
        }
        let (found, attached) = match text.strip_prefix("--") {
            Some(long) => {
                let (name, value) = long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
                (known(name, command)?, value)
            }
            None => {
                let mut letters = text[1..].chars();
                let found = letters.next().and_then(|letter| short(letter, command));
                let value = letters.as_str();
                (found, (!value.is_empty()).then(|| value.strip_prefix('=').unwrap_or(value)))
            }
        };
        let Some((name, takes)) = found else {
            return Ok((tokens, rest.iter().cloned().map(dashed).collect()));
        };
        if let (Some(letters), 0, false) = (attached, takes.most, text.starts_with("--")) {
            // Several letters behind one dash.
            tokens.push(Token::Flag(Given { name, values: Vec::new() }));
            let others: Vec<OsString> = [vec![format!("-{letters}").into()], after.to_vec()].concat();
            let (more, tail) = self::tokens(&others, command)?;
            tokens.extend(more);
            return Ok((tokens, tail));
        }
        let (values, used): (Vec<OsString>, usize) = match attached {
            Some(value) => (vec![value.into()], 0),
            None => {
                let fits = |next: &&OsString| (takes.fits)(&next.to_string_lossy());
                let values: Vec<OsString> = after.iter().take_while(fits).take(takes.most).cloned().collect();
                let used = values.len();
                (values, used)
            }
        };
        rest = &after[used..];
        behind = (takes.most > 1 && used == takes.most).then(|| name.clone());
        tokens.push(Token::Flag(Given { name, values }));
    }
    Ok((tokens, Vec::new()))
}

/// The flags among arguments that all are flags and their values.
///
/// # Errors
/// Flags for what does not exist here.
pub(super) fn flags(args: &[OsString], command: &Command) -> Result<Vec<Given>> {
    let (tokens, _) = tokens(args, command)?;
    let flags = tokens.into_iter().filter_map(|token| match token {
        Token::Flag(flag) => Some(flag),
        Token::Word { .. } => None,
    });
    Ok(flags.collect())
}

/// The values that follow a flag.
pub(super) struct Takes {
    most: usize,
    /// Whether a word can be one of them.
    fits: fn(&str) -> bool,
}

fn is_flag(text: &str) -> bool {
    let is_number = || text[1..].starts_with(|c: char| c.is_ascii_digit() || c == '.') && text.parse::<f64>().is_ok();
    text.len() > 1 && text.starts_with('-') && !is_number()
}

/// The long flag `name` of this program or of another one.
///
/// # Errors
/// A name with dots whose last part is no flag.
pub(super) fn known(name: &str, command: &Command) -> Result<Option<(String, Takes)>> {
    let name = name.replace('_', "-");
    if let Some(arg) = argument(&name, command) {
        return Ok(Some(of_arg(arg)));
    }
    let short = name.strip_prefix("ltx2-").filter(|rest| rest.starts_with("refine-")).unwrap_or(&name);
    let translated = TRANSLATED.iter().find(|(flag, _)| *flag == short).map(|(_, values)| *values);
    let is_mode = MODES.iter().any(|(mode, _)| *mode == short) || SWITCHES.iter().any(|(flag, ..)| *flag == short);
    let values = translated.or(is_mode.then_some(Values::Switch)).or(foreign(short).map(|flag| flag.values));
    if let Some(values) = values {
        let (most, fits): (usize, fn(&str) -> bool) = match values {
            Values::Switch => (1, |text| ["true", "false"].contains(&text.to_lowercase().as_str())),
            Values::One => (1, |text| !is_flag(text)),
            Values::Pairs => (usize::MAX, |text| !is_flag(text) && text.contains('=')),
        };
        return Ok(Some((short.into(), Takes { most, fits })));
    }
    // As FastVideo names the fields of its requests.
    match name.rsplit_once('.') {
        Some((_, last)) => match known(last, command)? {
            Some(found) => Ok(Some(found)),
            None => bail!("`--{name}`: `{last}` is no flag{}", nearest(last, command)),
        },
        None => Ok(None),
    }
}

/// The flag of this program that is called `name`, with dashes.
pub(super) fn argument<'c>(name: &str, command: &'c Command) -> Option<&'c Arg> {
    let is_called = |arg: &&Arg| {
        arg.get_long() == Some(name) || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    };
    command.get_arguments().find(is_called)
}

fn short(letter: char, command: &Command) -> Option<(String, Takes)> {
    let is_called = |arg: &&Arg| {
        arg.get_short() == Some(letter) || arg.get_all_short_aliases().is_some_and(|aliases| aliases.contains(&letter))
    };
    command.get_arguments().find(is_called).map(of_arg)
}

fn of_arg(arg: &Arg) -> (String, Takes) {
    let most = match arg.get_action().takes_values() {
        true => arg.get_num_args().map_or(1, |n| n.max_values()),
        false => 0,
    };
    (arg.get_long().unwrap_or_default().into(), Takes { most, fits: |text| !is_flag(text) })
}

/// `; did you mean …?` for a name that is no flag, if one is near.
pub(super) fn nearest(name: &str, command: &Command) -> String {
    let tried = command.clone().try_get_matches_from([command.get_name(), &format!("--{}", name.replace('_', "-"))]);
    let error = tried.err();
    let suggested = error.as_ref().and_then(|e| e.get(ContextKind::SuggestedArg));
    suggested.map_or(String::new(), |flag| format!("; the nearest one is `{flag}`"))
}

/// What has been understood of a command line.
#[derive(Default)]
struct Words {
    notes: Vec<String>,
    /// Pipelines as they were named.
    pipelines: Vec<String>,
    plan: Option<OsString>,
    /// Whether the line says what to show; a file of flags may have said something else.
    has_prompt: bool,
    /// Words that mean nothing, for the parser to complain about.
    others: Vec<OsString>,
    /// Whether a second stage is asked for, or none.
    refines: Option<bool>,
    /// Name of the output, in the folder of the output.
    video_name: Option<OsString>,
    needs_embeddings: bool,
}

impl Words {
    /// Adds what a flag means to `kept`.
    fn translate(&mut self, flag: Given, kept: &mut Vec<Given>) -> Result<()> {
        let (name, value) = (flag.name.as_str(), flag.text().unwrap_or_default());
        let is_on = !value.eq_ignore_ascii_case("false");
        if let Some((_, pipeline)) = MODES.iter().find(|(mode, _)| *mode == name) {
            self.pipelines.extend(is_on.then(|| (*pipeline).into()));
            return Ok(());
        }
        if let Some((_, other, value)) = SWITCHES.iter().find(|(switch, ..)| *switch == name) {
            kept.extend(is_on.then(|| Given::new(other, *value)));
            return Ok(());
        }
        match name {
            PIPELINE => {
                if let Some(why) = missing_pipeline(value) {
                    bail!("{why}");
                }
                self.pipelines.push(value.into());
            }
            "num-frames" if value == "auto" => self.notes.push(
                "warning: `--num-frames auto` takes a duration head, which LTX-2 and LTX-2.3 lack; the length is that of the \
                 clip, if there is one, else the usual 121 frames"
                    .into(),
            ),
            "start" | "end" => {
                if value.parse::<f64>().is_ok() {
                    bail!(
                        "`--{name} {value}` is in seconds in one tool and in latent frames in another; give `--{name}-time` or \
                         `--{name}-latent`"
                    );
                }
                let frame = if name == "start" { "0" } else { LAST };
                let values = [flag.values, vec![frame.into()]].concat();
                kept.push(Given { name: "image".into(), values });
            }
            "output-video-name" => self.video_name = flag.values.into_iter().next(),
            "refine-enabled" => self.refines = Some(is_on),
            "refine-guidance-scale" if value.parse() == Ok(1.0) => {}
            "refine-guidance-scale" => {
                bail!("`--{name} {value}`: the second stage runs without guidance, as at scale 1; leave it out")
            }
            "refine-add-noise" if is_on => {}
            "refine-add-noise" => {
                bail!("`--{name} false`: the second stage begins with noise at its first level; leave it out")
            }
            "refine-transformer-path" => bail!(
                "`--{name}`: both stages run one transformer; name the distilled LoRA of the model with `--distilled-lora`"
            ),
            "generate-audio" if !is_on => kept.push(Given { name: "no-audio".into(), values: Vec::new() }),
            _ => match foreign(name).map(|foreign| foreign.answer) {
                Some(Answer::Note(note)) => {
                    self.needs_embeddings |= name == "no-gemma" && is_on;
                    self.notes.push(format!("note: `--{name}` changes nothing: {note}"));
                }
                Some(Answer::Refused(but, why)) if !but.contains(&value) => bail!("`--{name}`: {why}"),
                Some(Answer::Refused(..)) => {}
                None => kept.push(flag),
            },
        }
        Ok(())
    }

    /// Says what a word without a flag is that names no pipeline: a plan, or in a run the prompt.
    fn place(&mut self, word: OsString, behind: Option<String>, is_run: bool, kept: &mut Vec<Given>) -> Result<()> {
        let text = word.to_string_lossy().into_owned();
        let is_path = Path::new(&word).exists();
        if let (Some(flag), Ok(_)) = (behind, text.parse::<f64>()) {
            bail!("`{text}` is one value too many for `--{flag}`");
        }
        if let (Some(why), false) = (missing_pipeline(&text), is_path) {
            bail!("{why}");
        }
        let is_plan = is_path || Path::new(&word).extension().is_some_and(|e| e == "ltxplan");
        let is_prompt = self.plan.is_some()
            || text.contains(char::is_whitespace)
            || text.starts_with('@')
            || MODELS.iter().any(|flag| has(kept, flag));
        match (is_plan && self.plan.is_none(), is_run && is_prompt && !self.has_prompt) {
            (true, _) => self.plan = Some(word),
            (false, true) => {
                self.has_prompt = true;
                kept.retain(|flag| flag.name != PROMPT);
                kept.push(Given::new(PROMPT, word));
            }
            (false, false) => self.others.push(word),
        }
        Ok(())
    }

    /// Adds what follows from all of the line.
    fn finish(&mut self, command: &Command, kept: &mut Vec<Given>) -> Result<()> {
        if self.needs_embeddings && !has(kept, "embeddings") {
            bail!("`--no-gemma` needs text contexts that were made elsewhere; give `--embeddings FILE`");
        }
        if let Some(name) = self.video_name.take() {
            let folder = taken(kept, "output").and_then(|flag| flag.values.into_iter().next());
            let mut path = folder.map_or_else(PathBuf::new, PathBuf::from).join(name);
            if path.extension().is_none() {
                path.set_extension("mp4");
            }
            kept.push(Given::new("output", path));
        }
        let has_plan = self.plan.is_some();
        let is_model = |flag: &Given| flag.values.first().is_some_and(|value| Path::new(value).is_file());
        if !has_plan && !MODELS.iter().any(|flag| has(kept, flag)) {
            // One tool calls the model so.
            let weights = kept.iter_mut().find(|flag| flag.name == "weights" && is_model(flag));
            weights.into_iter().for_each(|flag| flag.name = MODELS[0].into());
        }
        // A plan has its pipeline, and without a model there is none to choose.
        if let Some(pipeline) = self.pipeline(command, kept)?.filter(|pipeline| pipeline != GENERATE) {
            kept.insert(0, Given::new(PIPELINE, pipeline));
        }
        Ok(())
    }

    /// The pipeline that is named, or that fits the model; and what the folder of the model says about its second stage.
    fn pipeline(&mut self, command: &Command, kept: &mut Vec<Given>) -> Result<Option<String>> {
        let mut names: Vec<String> = self.pipelines.iter().map(|name| usual_name(name)).collect();
        names.dedup();
        let named = match &names[..] {
            [] => None,
            [one] => Some(one.clone()),
            [one, other, ..] => bail!("pipelines `{one}` and `{other}` are both asked for; name one of them"),
        };
        let model = kept.iter().find(|flag| MODELS.contains(&flag.name.as_str())).and_then(|flag| flag.values.first());
        let (Some(model), None) = (model.map(PathBuf::from), &self.plan) else { return Ok(named) };
        let folder = local(&model).ok();
        let index = folder.as_deref().map(config::refinement).transpose()?.flatten();
        let asked = self.refines.or(index.as_ref().and_then(|index| index.is_enabled));
        let pipeline = match named {
            Some(name) if name != GENERATE => name,
            None if asked.is_none() => return Ok(None),
            _ => {
                let own = || folder.as_deref().and_then(|path| upsampler_beside(path).ok().flatten()).is_some();
                let refines = asked.unwrap_or_else(|| has(kept, "spatial-upsampler-path") || own());
                let adapts = has(kept, "distilled-lora") || index.as_ref().is_some_and(|index| index.has_adapter);
                let is_full = training_named(&model) == Some(Training::Full) || (refines && adapts);
                let name = match (is_full, refines) {
                    (false, true) => "distilled",
                    (false, false) => "distilled-one-stage",
                    (true, true) => "two-stage",
                    (true, false) => "one-stage",
                };
                self.notes.push(format!("pipeline {name}, chosen for `{}`", model.display()));
                name.into()
            }
        };
        let Ok(known) = PipelineName::from_str(&pipeline, false) else { return Ok(Some(pipeline)) };
        let refines = definition(known).has_two_stages;
        match self.refines {
            Some(true) if !refines => bail!("`--refine-enabled` is for two stages, pipeline `{pipeline}` has one"),
            Some(false) if refines => {
                bail!("`--refine-enabled false` is for one stage, pipeline `{pipeline}` has two; name `generate`")
            }
            _ => {}
        }
        if let Some(Refinement { path, flags, .. }) = index.filter(|_| refines) {
            for flag in flags {
                if !kept.iter().any(|typed| config::excludes(typed, &flag, command)) {
                    self.translate(flag, kept).with_context(|| format!("`{}`", path.display()))?;
                }
            }
        }
        Ok(Some(pipeline))
    }
}

/// Whether a word is the name of a pipeline, and of no file.
fn names_pipeline(word: &OsString) -> bool {
    let is_name = |text: &str| text == GENERATE || PipelineName::from_str(text, false).is_ok();
    word.to_str().is_some_and(is_name) && !Path::new(word).exists()
}

/// Whether a flag chooses the pipeline.
pub(super) fn chooses_pipeline(name: &str) -> bool {
    name == PIPELINE || MODES.iter().any(|(mode, _)| *mode == name)
}

/// Flags that name a model.
const MODELS: [&str; 2] = ["checkpoint-path", "transformer-path"];

fn has(flags: &[Given], name: &str) -> bool {
    flags.iter().any(|flag| flag.name == name)
}

fn taken(flags: &mut Vec<Given>, name: &str) -> Option<Given> {
    let at = flags.iter().position(|flag| flag.name == name)?;
    Some(flags.remove(at))
}

/// The name of a pipeline as help has it; what is none stays, for the parser to complain about.
fn usual_name(name: &str) -> String {
    let known = PipelineName::from_str(name, false).ok();
    let value = known.and_then(|pipeline| pipeline.to_possible_value());
    value.map_or(name.into(), |value| value.get_name().into())
}
