//! Guidance that depends on the noise level, from a file.
//!
//! ```toml
//! [[level]]
//! up_to = 0.5                       # noise levels up to this one
//! video-cfg-guidance-scale = 2.0    # flags of guidance, with and without dashes
//!
//! [[level]]
//! up_to = 1.0
//! ```
//!
//! Source: spec/pipelines §7.1.

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, FromArgMatches, Parser};
use ltxc_ir::plan::{Guidance, Modality};
use serde_json::{Map, Value};

use super::guidance;
use crate::args::SamplingArgs;
use crate::args::tables::{complaint, flags_of};

/// Key of a table that is no flag.
const UP_TO: &str = "up_to";

/// Flags of a table.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct LevelArgs {
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Reads guidance by noise level: upper bounds, ascending, and what holds up to them. What a table does not say is as in
/// `planned`.
///
/// # Errors
/// A file that is none, and everything that [`guidance`] refuses.
pub fn levels(path: &Path, planned: Option<&Guidance>, modalities: &[Modality]) -> Result<Vec<(f32, Guidance)>> {
    let file = || format!("guidance table `{}`", path.display());
    let text = std::fs::read_to_string(path).with_context(file)?;
    let Some(planned) = planned else {
        bail!("{}: this pipeline runs one pass per step, without guidance; leave `--guidance-table` out", file());
    };
    let parsed: toml::Table = text.parse().with_context(file)?;
    let parsed = serde_json::to_value(parsed).with_context(file)?;
    let Some(tables) = parsed["level"].as_array().filter(|tables| !tables.is_empty()) else {
        bail!("{} has no levels; write `[[level]]` tables with `{UP_TO}` and flags of guidance", file());
    };
    let read = |(i, table): (usize, &Value)| {
        let of = || format!("{}, level {}", file(), i + 1);
        level(table, planned, modalities).with_context(of)
    };
    let mut levels = tables.iter().enumerate().map(read).collect::<Result<Vec<_>>>()?;
    levels.sort_by(|a, b| a.0.total_cmp(&b.0));
    if let Some(pair) = levels.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        bail!("{}: two levels hold up to {}; change one of them", file(), pair[0].0);
    }
    Ok(levels)
}

fn level(table: &Value, planned: &Guidance, modalities: &[Modality]) -> Result<(f32, Guidance)> {
    let mut table: Map<String, Value> = table.as_object().cloned().unwrap_or_default();
    let bound = table.remove(UP_TO).and_then(|value| value.as_f64()).filter(|bound| (0.0..=1.0).contains(bound));
    let bound = bound.with_context(|| format!("`{UP_TO}` is missing or no noise level from 0 to 1"))?;
    let command = LevelArgs::command();
    let line = flags_of(&table, &command)?.0;
    let matches = command.try_get_matches_from(line).map_err(complaint)?;
    let args = LevelArgs::from_arg_matches(&matches).map_err(complaint)?.sampling;
    if args.sampler.is_some() || args.schedule.is_some() || args.ge_gamma.is_some() {
        bail!("sampler and schedule are the same at all levels; give them as flags");
    }
    let guided = guidance(Some(planned), &args, modalities)?.context("guided stages have guidance")?;
    Ok((bound as f32, guided))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(f32, Guidance)>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("table.toml");
        std::fs::write(&path, text).expect("written");
        let mut planned = Guidance::default();
        planned.video.stg_blocks = vec![0];
        levels(&path, Some(&planned), &Modality::BOTH)
    }

    #[test]
    fn tables_are_in_the_order_of_their_bounds() {
        let text = "[[level]]\nup_to = 1.0\ncfg = 3\n[[level]]\nup_to = 0.5\nvideo_stg_guidance_scale = 0.5\n";
        let found = read(text).unwrap();
        assert_eq!(found.iter().map(|(bound, _)| *bound).collect::<Vec<_>>(), [0.5, 1.0]);
        assert_eq!((found[0].1.video.cfg, found[0].1.video.stg), (1.0, 0.5));
        assert_eq!((found[1].1.video.cfg, found[1].1.video.stg), (3.0, 0.0));
    }

    #[test]
    fn bad_tables_say_why() {
        for (text, words) in [
            ("", &["no levels", "[[level]]"][..]),
            ("[[level]]\ncfg = 3", &["level 1", "`up_to` is missing"]),
            ("[[level]]\nup_to = 1.5", &["level 1", "from 0 to 1"]),
            ("[[level]]\nup_to = 1.0\nspeed = 3", &["level 1", "`speed`"]),
            (
                "[[level]]\nup_to = 1.0\ncfg = 'much'",
                &["level 1", "invalid value 'much' for '--video-cfg-guidance-scale"],
            ),
            ("[[level]]\nup_to = 1.0\nsampler = 'euler'", &["level 1", "same at all levels"]),
            ("[[level]]\nup_to = 1.0\n[[level]]\nup_to = 1.0", &["two levels hold up to 1"]),
        ] {
            let error = format!("{:#}", read(text).expect_err("a bad table"));
            words.iter().for_each(|word| assert!(error.contains(word), "`{word}` is missing in: {error}"));
            assert!(!error.contains('\n'), "more than a sentence: {error}");
        }
    }
}
