//! Keys of any safetensors file by rules, for checkpoints of other tools.
//!
//! Rules act one after the other, each on the key that those before it left, as tables of replacements in conversion scripts
//! do. What no rule touches keeps its key and is reported, and so are rules that touch nothing.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use ltxc_models::Listed;
use ltxc_models::checkpoint::header::format_name;
use ltxc_models::checkpoint::{StoredTensor, StoredType, WeightFile, shards};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Value, json};

use super::values::Elements;
use super::writer::{Content, OutFile, OutTensor, write_file};
use super::{ConvertArgs, StoredAs, copied};
use crate::report::Report;

/// Bytes that are gathered before they are written.
const PIECE: usize = 1 << 20;

/// A file of rules.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    #[serde(default, alias = "rules")]
    rule: Vec<RawRule>,
    #[serde(default)]
    metadata: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    regex: Option<String>,
    exact: Option<String>,
    to: Option<String>,
    #[serde(default)]
    drop: bool,
    permute: Option<Vec<usize>>,
}

/// What a rule looks for.
enum Pattern {
    Regex(Regex),
    Exact(String),
}

struct Rule {
    pattern: Pattern,
    to: Option<String>,
    is_drop: bool,
    permute: Option<Vec<usize>>,
    /// How many keys it matched.
    matched: usize,
}

/// What became of a key.
struct Mapped {
    key: String,
    /// Permutations of its axes, one after the other.
    permutes: Vec<Vec<usize>>,
}

/// Converts `input` by the rules in the file `rules`.
///
/// # Errors
/// Rules that cannot be read, two keys on one name, a permutation that does not fit, with `--strict` rules and keys without a
/// match, or a disk that fails.
pub fn run(args: &ConvertArgs, input: &Path, rules: &Path, report: &mut Report) -> Result<()> {
    if args.dtype == Some(StoredAs::Fp8) {
        bail!("`--dtype fp8` needs to know the model; convert the result once more without `--map`");
    }
    let Rules { rule, metadata: added } = read(rules)?;
    let mut rules_of =
        rule.into_iter().enumerate().map(|(i, rule)| Rule::new(rules, i, rule)).collect::<Result<Vec<_>>>()?;
    let files = open(input)?;
    super::refuse_input(&args.output, &files.iter().map(|f| f.path().to_path_buf()).collect::<Vec<_>>())?;
    let (mut tensors, mut sources, mut untouched) = (Vec::new(), BTreeMap::new(), Vec::new());
    for (file, stored) in files.iter().flat_map(|file| file.header().tensors.iter().map(move |t| (file, t))) {
        let (mapped, is_touched) = apply(&mut rules_of, &stored.key);
        if !is_touched {
            untouched.push(stored.key.clone());
        }
        let Some(mapped) = mapped else { continue };
        if let Some(other) = sources.insert(mapped.key.clone(), stored.key.clone()) {
            bail!(
                "`{other}` and `{}` would both be `{}`; change the rules in `{}`",
                stored.key,
                mapped.key,
                rules.display()
            );
        }
        tensors.push(out_tensor(args, file, stored, mapped)?);
    }
    let idle: Vec<String> = rules_of.iter().filter(|rule| rule.matched == 0).map(Rule::name).collect();
    for (one, many, list) in [
        ("rule matches no key", "rules match no key", idle),
        ("key matches no rule and stays as it is", "keys match no rule and stay as they are", untouched),
    ] {
        let what = format!("{} {}", list.len(), if list.len() == 1 { one } else { many });
        match (list.is_empty(), args.strict) {
            (true, _) => {}
            (false, true) => bail!("{what}; change the rules, or leave `--strict` out:{}", Listed(quoted(list))),
            (false, false) => report.note(&format!("note: {what}:{}", Listed(quoted(list)))),
        }
    }
    let is_fp8 = |tensor: &&OutTensor<'_>| tensor.dtype.starts_with("F8_");
    match tensors.iter().filter(is_fp8).count() {
        count if count > 0 && args.dtype.is_some() => report.note(&format!(
            "note: tensors in fp8 stay so ({count} of them), because their scales have no known names before the rules act; \
             `--dtype` without `--map` changes those of the result"
        )),
        _ => {}
    }
    let mut metadata = files.first().map(|file| file.header().metadata.clone()).unwrap_or_default();
    metadata.extend(added.into_iter().map(|(key, value)| match value {
        Value::String(text) => (key, text),
        other => (key, other.to_string()),
    }));
    let out = OutFile { path: PathBuf::new(), metadata, tensors };
    let written = write_file(&args.output, &out, report)?;
    report.finish(&args.output, json!({"tensors": written.tensors, "bytes": written.bytes}));
    Ok(())
}

fn quoted(list: Vec<String>) -> Vec<String> {
    list.into_iter().map(|name| format!("`{name}`")).collect()
}

fn read(path: &Path) -> Result<Rules> {
    let named = || format!("rules `{}`", path.display());
    let text = std::fs::read_to_string(path).with_context(named)?;
    let is_json = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("json"));
    let rules: Rules = if is_json {
        serde_json::from_str(&text).with_context(named)?
    } else {
        toml::from_str(&text).with_context(named)?
    };
    if rules.rule.is_empty() && rules.metadata.is_empty() {
        bail!("rules `{}` hold no `[[rule]]` and no `[metadata]`; write one of them", path.display());
    }
    Ok(rules)
}

/// The file, or the shards of a folder.
fn open(input: &Path) -> Result<Vec<WeightFile>> {
    let paths = if input.is_dir() { shards(input, "")? } else { vec![input.to_path_buf()] };
    if paths.is_empty() {
        bail!("`{}` holds no `.safetensors` file; name the file or folder that has one", input.display());
    }
    Ok(paths.iter().map(|path| WeightFile::open(path)).collect::<Result<_, _>>()?)
}

impl Rule {
    fn new(path: &Path, index: usize, raw: RawRule) -> Result<Rule> {
        let wrong = |problem: &str| format!("rules `{}`: rule {} {problem}", path.display(), index + 1);
        let pattern = match (raw.regex, raw.exact) {
            (Some(regex), None) => Pattern::Regex(Regex::new(&regex).map_err(|e| {
                // The library draws a picture in front of what it has to say.
                let reason = e.to_string();
                let reason = reason.lines().last().map_or("", |line| line.trim_start_matches("error: "));
                anyhow!("{}", wrong(&format!("has no valid `regex`: {reason}")))
            })?),
            (None, Some(exact)) => Pattern::Exact(exact),
            _ => bail!("{}", wrong("needs either `regex` or `exact`")),
        };
        if raw.drop && (raw.to.is_some() || raw.permute.is_some()) {
            bail!("{}", wrong("drops what it matches, so it has no `to` and no `permute`"));
        }
        if !raw.drop && raw.to.is_none() && raw.permute.is_none() {
            bail!("{}", wrong("does nothing; give it `to`, `permute` or `drop = true`"));
        }
        if let Some(axes) = &raw.permute
            && !(0..axes.len()).all(|axis| axes.contains(&axis))
        {
            bail!("{}", wrong("has a `permute` that does not name every axis once"));
        }
        Ok(Rule { pattern, to: raw.to, is_drop: raw.drop, permute: raw.permute, matched: 0 })
    }

    /// What messages call it.
    fn name(&self) -> String {
        match &self.pattern {
            Pattern::Regex(regex) => regex.as_str().into(),
            Pattern::Exact(key) => key.clone(),
        }
    }

    fn is_match(&self, key: &str) -> bool {
        match &self.pattern {
            Pattern::Regex(regex) => regex.is_match(key),
            Pattern::Exact(exact) => exact == key,
        }
    }
}

/// What the rules make of `key`, `None` if it is dropped; and whether any of them matched.
fn apply(rules: &mut [Rule], key: &str) -> (Option<Mapped>, bool) {
    let (mut mapped, mut is_touched) = (Mapped { key: key.into(), permutes: Vec::new() }, false);
    for rule in rules {
        if !rule.is_match(&mapped.key) {
            continue;
        }
        is_touched = true;
        rule.matched += 1;
        if rule.is_drop {
            return (None, true);
        }
        if let Some(to) = &rule.to {
            mapped.key = match &rule.pattern {
                Pattern::Regex(regex) => regex.replace_all(&mapped.key, to.as_str()).into_owned(),
                Pattern::Exact(_) => to.clone(),
            };
        }
        mapped.permutes.extend(rule.permute.clone());
    }
    (Some(mapped), is_touched)
}

fn out_tensor<'f>(
    args: &ConvertArgs,
    file: &'f WeightFile,
    stored: &'f StoredTensor,
    mapped: Mapped,
) -> Result<OutTensor<'f>> {
    let data = file.data(stored);
    let elements: u64 = stored.shape.iter().map(|&d| d as u64).product();
    let (name, element) = match stored.dtype {
        StoredType::Known(dtype) => (format_name(dtype), dtype.bytes()),
        StoredType::Other(name) => (name, stored.bytes.checked_div(elements).unwrap_or(1).max(1) as usize),
    };
    if let Some(axes) = mapped.permutes.iter().find(|axes| axes.len() != stored.shape.len()) {
        let (key, found) = (&stored.key, stored.shape.len());
        bail!("`{key}` has {found} axes, and a rule permutes {}; change the rule", axes.len());
    }
    // Axes of axes, as permutations in a row.
    let axes = mapped.permutes.into_iter().reduce(|before, axes| axes.iter().map(|&axis| before[axis]).collect());
    let is_permuted = axes.is_some();
    let (shape, content): (Vec<usize>, Content<'f>) = match axes {
        None => (stored.shape.clone(), copied(data)),
        Some(_) if element as u64 * elements != stored.bytes => {
            bail!(
                "`{}` is {name}, whose elements are no whole bytes, and a rule permutes it; change the rule",
                stored.key
            )
        }
        Some(axes) => {
            let shape = axes.iter().map(|&axis| stored.shape[axis]).collect();
            let old = &stored.shape;
            (shape, Box::new(move |to| permuted(data, element, old, &axes, to)))
        }
    };
    let wanted = args.dtype.map(StoredAs::dtype);
    match (wanted, stored.dtype) {
        (Some(wanted), StoredType::Known(found)) if found.is_float() && found.bytes() > 1 && found != wanted => {
            let key = mapped.key.clone();
            let content: Content<'f> = Box::new(move |to| {
                if !is_permuted {
                    return Elements::plain(data, found).write_as(&key, wanted, to);
                }
                let mut bytes = Vec::new();
                content(&mut bytes)?;
                Elements::plain(&bytes, found).write_as(&key, wanted, to)
            });
            let (element, bytes) = (wanted.bytes(), elements.saturating_mul(wanted.bytes() as u64));
            Ok(OutTensor { key: mapped.key, dtype: format_name(wanted), element, shape, bytes, content })
        }
        _ => Ok(OutTensor { key: mapped.key, dtype: name, element, shape, bytes: stored.bytes, content }),
    }
}

/// Writes elements of `element` bytes in the order that the axes `axes` of `shape` give.
fn permuted(data: &[u8], element: usize, shape: &[usize], axes: &[usize], to: &mut dyn Write) -> Result<()> {
    let mut strides = vec![element; shape.len()];
    for axis in (0..shape.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * shape[axis + 1];
    }
    let extents: Vec<usize> = axes.iter().map(|&axis| shape[axis]).collect();
    let strides: Vec<usize> = axes.iter().map(|&axis| strides[axis]).collect();
    let (mut index, mut at) = (vec![0; axes.len()], 0);
    let mut piece = Vec::with_capacity(PIECE + element);
    for _ in 0..data.len() / element {
        piece.extend_from_slice(&data[at..at + element]);
        if piece.len() >= PIECE {
            to.write_all(&piece)?;
            piece.clear();
        }
        // The next index, the last axis fastest.
        for axis in (0..extents.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < extents[axis] {
                break;
            }
            at -= strides[axis] * extents[axis];
            index[axis] = 0;
        }
    }
    Ok(to.write_all(&piece)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Vec<Rule> {
        let rules: Rules = toml::from_str(text).unwrap();
        rules.rule.into_iter().enumerate().map(|(i, rule)| Rule::new(Path::new("x"), i, rule).unwrap()).collect()
    }

    #[test]
    fn rules_act_one_after_the_other() {
        let mut rules = rules(
            r#"
            [[rule]]
            regex = '^blocks\.(\d+)\.'
            to = 'layers.$1.'
            [[rule]]
            exact = 'layers.0.w'
            to = 'first'
            permute = [1, 0]
            [[rule]]
            regex = 'counter$'
            drop = true
            [[rule]]
            exact = 'nothing'
            to = 'x'
            "#,
        );
        let mut of = |key: &str| {
            let (mapped, is_touched) = apply(&mut rules, key);
            (mapped.map(|m| (m.key, m.permutes)), is_touched)
        };
        assert_eq!(of("blocks.0.w"), (Some(("first".into(), vec![vec![1, 0]])), true));
        assert_eq!(of("blocks.12.w"), (Some(("layers.12.w".into(), vec![])), true));
        assert_eq!(of("blocks.1.counter"), (None, true));
        assert_eq!(of("other"), (Some(("other".into(), vec![])), false));
        assert_eq!(rules.iter().map(|r| r.matched).collect::<Vec<_>>(), [3, 1, 1, 0]);
    }

    #[test]
    fn axes_change_places() {
        // [2, 3, 2] with the axes 2, 0, 1.
        let data: Vec<u8> = (0..24).collect();
        let mut out = Vec::new();
        permuted(&data, 2, &[2, 3, 2], &[2, 0, 1], &mut out).unwrap();
        let first: Vec<u8> = out.chunks(2).map(|e| e[0] / 2).collect();
        assert_eq!(first, [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]);
        let mut back = Vec::new();
        permuted(&out, 2, &[2, 2, 3], &[1, 2, 0], &mut back).unwrap();
        assert_eq!(back, data);
        permuted(&[], 2, &[0, 3], &[1, 0], &mut Vec::new()).unwrap();
        let mut scalar = Vec::new();
        permuted(&[7], 1, &[], &[], &mut scalar).unwrap();
        assert_eq!(scalar, [7]);
    }
}
