//! What one run is about, from what was typed: its prompts, seed and images.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::Plan;
use serde_json::{Value, json};

use crate::args::ContentArgs;
use crate::job::MOST;

/// The seed of a run; one of the clock for `random` and -1.
///
/// # Errors
/// Text that is no seed.
pub fn seed(text: &str) -> Result<u64> {
    if text == "random" || text == "-1" {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        return Ok(now.as_nanos() as u64 & 0x7fff_ffff);
    }
    text.parse().with_context(|| format!("`--seed {text}` is not a whole number or `random`"))
}

/// An image as given on the command line.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageArg {
    /// File.
    pub path: PathBuf,
    /// Pixel frame; `None` for the last one.
    pub frame: Option<u32>,
    /// Strength.
    pub strength: f64,
    /// CRF of the round trip, if not the model's.
    pub crf: Option<u8>,
}

impl ImageArg {
    /// The frame at which it stands in a run of `plan`.
    pub fn frame_in(&self, plan: &Plan) -> u32 {
        self.frame.unwrap_or(plan.pipeline.video.frames.saturating_sub(1))
    }

    /// CRF of its round trip in a run of `plan`.
    pub fn crf_in(&self, plan: &Plan) -> u8 {
        self.crf.unwrap_or(plan.pipeline.model.image_crf as u8)
    }

    /// What it is in a run of `plan`, for machines.
    pub fn facts(&self, plan: &Plan) -> Value {
        json!({"path": &self.path, "frame": self.frame_in(plan), "strength": self.strength, "crf": self.crf_in(plan)})
    }
}

/// What stands for the number of the last frame.
pub const LAST: &str = "last";

/// Splits the values of repeated `--image` flags: `occurrences` says how many values each one had.
///
/// # Errors
/// A frame, strength or CRF that is none.
pub fn images(content: &ContentArgs, occurrences: &[usize]) -> Result<Vec<ImageArg>> {
    if content.image.is_empty() && (content.image_strength.is_some() || content.image_crf.is_some()) {
        bail!(
            "`--image-strength` and `--image-crf` are for images, and there is none; give `--image`, or leave them out"
        );
    }
    let mut rest = &content.image[..];
    let mut out = Vec::new();
    for &n in occurrences {
        let (this, others) = rest.split_at(n.min(rest.len()));
        rest = others;
        let this = match this {
            [word] => in_one_word(word),
            values => values.iter().map(String::as_str).collect(),
        };
        let Some(&path) = this.first() else { continue };
        if let Some(more) = this.get(4) {
            bail!("`--image {path}`: `{more}` is one value too many, expected frame, strength and crf");
        }
        let number = |i: usize, what: &str, default: f64| -> Result<f64> {
            let Some(text) = this.get(i) else { return Ok(default) };
            text.parse().with_context(|| format!("`--image {path}`: {what} `{text}` is not a number"))
        };
        let frame = match this.get(1) {
            Some(&LAST) => None,
            _ => Some(number(1, "frame", 0.0)?),
        };
        if let Some(frame) = frame.filter(|&frame| frame < 0.0 || frame.fract() != 0.0 || frame > MOST as f64) {
            bail!("`--image {path}`: frame {frame} is not a frame number");
        }
        let crf = match this.get(3) {
            Some(text) => {
                let crf = text.parse().ok().filter(|crf| (0..=51).contains(crf));
                Some(crf.with_context(|| format!("`--image {path}`: crf `{text}` is not 0 to 51"))?)
            }
            None => content.image_crf,
        };
        let strength = number(2, "strength", content.image_strength.unwrap_or(1.0))?;
        out.push(ImageArg { path: path.into(), frame: frame.map(|frame| frame as u32), strength, crf });
    }
    Ok(out)
}

/// The values in `PATH@FRAME:STRENGTH:CRF` or `PATH:FRAME:STRENGTH`, unless all of it is the name of a file.
fn in_one_word(word: &str) -> Vec<&str> {
    let numbers = |text: &str| {
        text.split(':').enumerate().all(|(i, part)| part.parse::<f64>().is_ok() || (i == 0 && part == LAST))
    };
    let split = |at: usize| {
        let (path, rest) = (&word[..at], &word[at + 1..]);
        (!path.is_empty() && numbers(rest)).then(|| [path].into_iter().chain(rest.split(':')).collect::<Vec<_>>())
    };
    if Path::new(word).exists() {
        return vec![word];
    }
    // As many numbers as there are: what is in front of the first mark that has nothing else behind it.
    let marks = word.char_indices().filter(|(_, c)| matches!(c, '@' | ':')).map(|(at, _)| at);
    marks.into_iter().find_map(split).unwrap_or(vec![word])
}

/// The prompt of a run.
///
/// # Errors
/// Input that cannot be read.
pub fn prompt(args: &ContentArgs) -> Result<String> {
    let Some(path) = &args.prompt_file else { return text(args.prompt.as_deref().unwrap_or_default()) };
    let name = || format!("prompt file `{}`", path.display());
    let read = std::fs::read_to_string(path).with_context(name)?;
    let mut prompts = read.lines().map(str::trim).filter(|line| !line.is_empty());
    match (prompts.next(), prompts.count()) {
        (Some(prompt), 0) => Ok(prompt.into()),
        (None, _) => bail!("{} is empty", name()),
        (_, more) => bail!("{} has {} prompts, one a line; give them as jobs (`--jobs FILE.jsonl`)", name(), more + 1),
    }
}

/// A prompt: given, read from standard input (`-`), or from a file (`@FILE`).
///
/// # Errors
/// Input that cannot be read.
pub fn text(argument: &str) -> Result<String> {
    match argument {
        "-" => std::io::read_to_string(std::io::stdin()).context("prompt from standard input"),
        text => from_file(text),
    }
}

/// The negative prompt: given, read from a file (`@FILE`), or the default one.
///
/// # Errors
/// A file that cannot be read.
pub fn negative_prompt(args: &ContentArgs) -> Result<String> {
    match &args.negative_prompt {
        Some(text) => from_file(text),
        None => Ok(include_str!("negative.txt").trim_end().into()),
    }
}

fn from_file(text: &str) -> Result<String> {
    match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("prompt file `{path}`")),
        None => Ok(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_values_are_split_by_flag() {
        let images = |values: &[&str], occurrences: &[usize]| {
            let image = values.iter().map(|s| s.to_string()).collect();
            images(&ContentArgs { image, image_strength: Some(0.9), ..ContentArgs::default() }, occurrences)
        };
        let values = ["a.png", "b.png", "8", "0.5", "20"];
        let found = images(&values, &[1, 4]).unwrap();
        assert_eq!((found[0].frame, found[0].strength, found[0].crf), (Some(0), 0.9, None));
        assert_eq!((found[1].frame, found[1].strength, found[1].crf), (Some(8), 0.5, Some(20)));
        assert_eq!(images(&["a.png", "last"], &[2]).unwrap()[0].frame, None);
        for (word, frame, strength, crf) in [
            ("a@1.png@8:0.5:20", Some(8), 0.5, Some(20)),
            ("a@1.png@8", Some(8), 0.9, None),
            ("a@1.png:8:0.5", Some(8), 0.5, None),
            ("a@1.png@last", None, 0.9, None),
            ("a@1.png", Some(0), 0.9, None),
        ] {
            let found = images(&[word], &[1]).unwrap().remove(0);
            assert_eq!((found.frame, found.strength, found.crf), (frame, strength, crf), "{word}");
            assert_eq!(found.path, Path::new("a@1.png"), "{word}");
        }
        assert!(images(&["a", "x"], &[2]).is_err());
        assert!(images(&["a", "0", "1", "99"], &[4]).is_err());
        assert!(images(&["a@0:1:9:9"], &[1]).unwrap_err().to_string().contains("one value too many"));
    }
}
