//! The command line in the words of this program.

use std::ffi::OsString;
use std::path::Path;

use clap::ValueEnum;

use super::PipelineName;

/// The command line in the words of this program, where other tools write it differently: `-` for `_` in the names of long
/// flags, and `--pipeline=NAME` for a flag or a first argument that names a pipeline.
pub fn in_our_words(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let in_our_words = args.into_iter().enumerate().map(|(i, arg)| match arg.to_str() {
        Some(text) if text.starts_with("--") => {
            let end = text.find('=').unwrap_or(text.len());
            let flag = text[..end].replace('_', "-");
            match MODES.iter().find(|(mode, _)| *mode == flag && end == text.len()) {
                Some((_, pipeline)) => format!("--pipeline={pipeline}").into(),
                None => format!("{flag}{}", &text[end..]).into(),
            }
        }
        // Behind the program and its command.
        Some(name) if i == 2 && PipelineName::from_str(name, false).is_ok() && !Path::new(name).exists() => {
            format!("--pipeline={name}").into()
        }
        _ => arg,
    });
    in_our_words.collect()
}

/// Flags that choose a pipeline in other tools.
const MODES: [(&str, &str); 5] = [
    ("--distilled", "distilled"),
    ("--one-stage", "one-stage"),
    ("--two-stage", "two-stage"),
    ("--two-stages", "two-stage"),
    ("--two-stages-hq", "hq"),
];
