//! Flags from tables of files: keys are names of flags, with dashes or underscores.
//!
//! Files of jobs, of guidance by noise level, and of flags (`--config`) are such tables. They become command lines, which the
//! parser reads like any other.

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgAction, Command, Id};
use serde_json::{Map, Value};

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

/// Adds a flag with the values of a table. A list is for a flag with several values, or for one that may be repeated; a list
/// of lists is for one that is both.
///
/// # Errors
/// A value that is none for this flag.
pub fn push(line: &mut Vec<String>, arg: &Arg, value: &Value) -> Result<()> {
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
        Value::Array(values) if matches!(arg.get_action(), ArgAction::Append) => {
            return values.iter().try_for_each(|value| push(line, arg, value));
        }
        value => line.push(format!("{flag}={}", scalar(value)?)),
    }
    Ok(())
}

/// What the parser of the command line complains about, without its advice on usage.
pub fn complaint(error: clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    anyhow::Error::msg(lines.join(" ").trim_start_matches("error: ").to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use serde_json::json;

    use super::*;
    use crate::args::Cli;

    /// The command line of a key of `ltxc run`.
    fn line(key: &str, value: Value) -> Result<Vec<String>> {
        let cli = Cli::command();
        let run = cli.find_subcommand("run").expect("a command");
        Ok(flags_of(&Map::from_iter([(key.into(), value)]), run)?.0)
    }

    #[test]
    fn lists_are_values_or_repetitions() {
        for (key, value, expected) in [
            ("weights", json!(["a", "b"]), &["--weights=a", "--weights=b"][..]),
            ("weights", json!("a"), &["--weights=a"]),
            ("experiment", json!(["early-text-layers=2"]), &["--experiment=early-text-layers=2"]),
            ("sigmas", json!([1, 0.5, 0]), &["--sigmas=1,0.5,0"]),
            ("lora", json!(["a", 0.5]), &["--lora", "a", "0.5"]),
            ("lora", json!([["a", 0.5], ["b"]]), &["--lora", "a", "0.5", "--lora", "b"]),
            ("no_audio", json!(true), &["--no-audio"]),
            ("no_audio", json!(false), &[]),
        ] {
            assert_eq!(line(key, value).unwrap(), expected, "{key}");
        }
        for (key, value) in [("height", json!([64])), ("no_audio", json!("yes")), ("weights", json!([true]))] {
            assert!(line(key, value).is_err(), "{key}");
        }
    }
}
