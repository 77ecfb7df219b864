//! `ltxc debug compare` on files of tensors: values under the same names, element by element.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use ltxc_runtime::noise_files::Container;
use regex::Regex;
use serde_json::Value;

use super::compare::CompareArgs;
use super::parity::Check;
use super::recording::TensorFile;
use super::step::print_rows;

/// Whether a file holds tensors, as its extension says.
pub fn has_tensors(path: &Path) -> bool {
    Container::of(path).is_ok()
}

/// Compares two files of tensors; `map` gives their name for ours. Returns whether all that both have agree.
///
/// # Errors
/// Files that cannot be read, or that have no name in common.
pub fn run(args: &CompareArgs, theirs: &Path, map: &BTreeMap<String, String>, json_output: bool) -> Result<bool> {
    let ours = TensorFile::open(&args.ours)?;
    let mut other = TensorFile::open(theirs)?;
    let expression = args.dump_tensors.as_deref().map(Regex::new).transpose();
    let wanted = expression.context("`--dump-tensors` is no regular expression")?;
    for (own, their) in map {
        if let Some(tensor) = other.find(their).cloned() {
            other.insert(own, tensor);
        }
    }
    let names = ordered(&ours);
    let names = || names.iter().filter(|name| wanted.as_ref().is_none_or(|wanted| wanted.is_match(name)));
    let is_reshaped = |name: &&String| match (ours.find(name), other.find(name)) {
        (Some(a), Some(b)) => a.ty.shape != b.ty.shape,
        _ => false,
    };
    let reshaped: Vec<&String> = names().filter(is_reshaped).collect();
    let mut rows = Vec::new();
    let mut check = Check::new("values", other.clone(), args.tol_rel, &mut rows);
    for name in names() {
        if let Some(tensor) = ours.find(name) {
            check.check(name, &tensor.to_f32());
        }
    }
    for row in &mut rows {
        if let Some(least) = args.correlation {
            row.ok = row.distance.pearson >= least;
        }
        row.ok &= !reshaped.contains(&&row.name);
    }
    if rows.is_empty() {
        let first = |file: &TensorFile| file.iter().next().map_or(String::new(), |(name, _)| name.to_string());
        bail!(
            "`{}` and `{}` have no tensor in common; the first has `{}`, the second `{}`; give `--map` if names differ",
            args.ours.display(),
            theirs.display(),
            first(&ours),
            first(&other)
        );
    }
    for name in reshaped {
        if let (Some(a), Some(b), false) = (ours.find(name), other.find(name), json_output) {
            println!("{name}: {} and {}", a.ty, b.ty);
        }
    }
    print_rows(&rows, &theirs.display().to_string(), json_output)
}

/// The names of a file in the order in which its values were computed, if it says that; else by their numbers.
fn ordered(file: &TensorFile) -> Vec<String> {
    let meta = file.meta();
    let listed: Vec<String> =
        meta["order"].as_array().into_iter().flatten().filter_map(Value::as_str).map(String::from).collect();
    if !listed.is_empty() {
        return listed;
    }
    let mut names: Vec<String> = file.iter().map(|(name, _)| name.to_string()).collect();
    names.sort_by_key(|name| by_numbers(name));
    names
}

/// A key that sorts `blocks.10` behind `blocks.9`.
fn by_numbers(name: &str) -> Vec<(String, u64)> {
    let parts = name.split(['.', '@', '_']);
    parts
        .map(|part| {
            let digits = part.trim_start_matches(|c: char| !c.is_ascii_digit());
            (part[..part.len() - digits.len()].to_string(), digits.parse().unwrap_or(0))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_in_their_order() {
        let mut names = ["blocks.10.attn1@stage1.step2", "blocks.9.attn1@stage1.step2", "blocks.9.attn1@stage1.step10"];
        names.sort_by_key(|name| by_numbers(name));
        assert_eq!(
            names,
            ["blocks.9.attn1@stage1.step2", "blocks.9.attn1@stage1.step10", "blocks.10.attn1@stage1.step2"]
        );
    }
}
