//! `ltxc debug compare`: two logs side by side, the first difference, and what it usually means. Files of tensors are
//! compared element by element, see `elements`.
//!
//! Two numbers differ if `|a − b| > abs + rel · max(|a|, |b|)`. A sum may be near zero although its tensor is large; where both
//! logs have the mean magnitude of a tensor, that decides instead (0.5 %), and its sums are only shown.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::elements;
use super::entries::{Entry, Log, parse};

/// `ltxc debug compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Our log, of any kind, or a file of captured tensors.
    pub ours: PathBuf,
    /// What to compare with; kinds of logs may be mixed [default: the file that FASTVIDEO_DEBUG_REF_SUMS_PATH or
    /// LTX2_REFERENCE_GEMMA_LOG names]
    pub theirs: Option<PathBuf>,
    /// Relative tolerance; of tensors the largest relative L2.
    #[arg(long, default_value_t = 5e-3)]
    pub tol_rel: f64,
    /// Absolute tolerance.
    #[arg(long, default_value_t = 1e-3)]
    pub tol_abs: f64,
    /// File with lines `our key = their key`, for names that differ.
    #[arg(long, value_name = "FILE")]
    pub map: Option<PathBuf>,
    /// Most rows of the table.
    #[arg(long, default_value_t = 20)]
    pub top: usize,
    /// Of files of tensors: only those in whose names this regular expression is found.
    #[arg(long, value_name = "REGEX")]
    pub dump_tensors: Option<String>,
    /// Of files of tensors: the least Pearson correlation that counts as equal, instead of a tolerance. Usual are 0.95 for
    /// stages of a pipeline and 0.9999 for a block in f32.
    #[arg(long, value_name = "R")]
    pub correlation: Option<f64>,
}

/// Variables that name the log of a reference.
const REFERENCES: [&str; 2] = ["FASTVIDEO_DEBUG_REF_SUMS_PATH", "LTX2_REFERENCE_GEMMA_LOG"];

/// One matched pair.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Key of both.
    pub key: String,
    /// Where in the run: step and pass, or the number of the line.
    pub at: String,
    /// Our number.
    pub ours: f64,
    /// Their number.
    pub theirs: f64,
    /// Both shapes, if they differ.
    pub shapes: Option<(String, String)>,
    /// Whether the two differ.
    pub diverges: bool,
}

/// What a comparison found.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Matched pairs in the order of our log.
    pub pairs: Vec<Pair>,
    /// Keys that only one log has.
    pub unmatched: (Vec<String>, Vec<String>),
    /// Warnings about the two runs.
    pub warnings: Vec<String>,
    /// What must be the same on both sides: its name, and what the logs say of it.
    pub conditions: Vec<(&'static str, Option<String>, Option<String>)>,
}

impl Comparison {
    /// The first pair that differs.
    pub fn first(&self) -> Option<usize> {
        self.pairs.iter().position(|p| p.diverges)
    }
}

/// `ltxc debug compare`. Returns whether the logs agree.
///
/// # Errors
/// A file that cannot be read, or logs that have nothing in common.
pub fn run(args: &CompareArgs, json_output: bool) -> Result<bool> {
    let theirs = args.theirs.clone().or_else(|| REFERENCES.iter().find_map(std::env::var_os).map(PathBuf::from));
    let Some(theirs) = theirs else { bail!("there is no log to compare with; name it, or set `{}`", REFERENCES[0]) };
    let map = match &args.map {
        Some(path) => parse_map(&std::fs::read_to_string(path).with_context(|| format!("map `{}`", path.display()))?)?,
        None => BTreeMap::new(),
    };
    match [&args.ours, &theirs].map(|path| elements::has_tensors(path)) {
        [true, true] => return elements::run(args, &theirs, &map, json_output),
        [false, false] => {}
        _ => bail!("one file holds tensors and the other is a log; compare two of a kind"),
    }
    if args.dump_tensors.is_some() || args.correlation.is_some() {
        bail!("`--dump-tensors` and `--correlation` are about files of tensors, and these are logs");
    }
    let read = |path: &PathBuf| -> Result<Log> {
        let text = std::fs::read_to_string(path).with_context(|| format!("log `{}`", path.display()))?;
        let log = parse(&text);
        if log.entries.is_empty() {
            bail!("`{}` has no line of a known debugging log; see `ltxc help debug compare`", path.display());
        }
        Ok(log)
    };
    let comparison = compare(&read(&args.ours)?, &read(&theirs)?, &map, args.tol_rel, args.tol_abs);
    if comparison.pairs.is_empty() {
        bail!(
            "the logs have no key in common; ours has `{}`, theirs `{}`; give `--map` if names differ",
            comparison.unmatched.0.first().map_or("", |k| k),
            comparison.unmatched.1.first().map_or("", |k| k)
        );
    }
    let agrees = comparison.first().is_none();
    if json_output {
        println!("{}", facts(&comparison));
    } else {
        print!("{}", text(&comparison, args.top));
    }
    Ok(agrees)
}

fn parse_map(text: &str) -> Result<BTreeMap<String, String>> {
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines
        .map(|line| {
            let (ours, theirs) =
                line.split_once(" = ").with_context(|| format!("`{line}` is not `our key = their key`"))?;
            Ok((ours.trim().to_string(), theirs.trim().to_string()))
        })
        .collect()
}

/// Compares two logs; `map` gives their key for ours, as `about.field` or `about` alone.
pub fn compare(ours: &Log, theirs: &Log, map: &BTreeMap<String, String>, tol_rel: f64, tol_abs: f64) -> Comparison {
    // Steps match steps; where one log has none, lines are counted.
    let has_steps = |log: &Log| log.entries.iter().any(|e| e.step.is_some());
    let by_step = has_steps(ours) && has_steps(theirs);
    let (conditions, warnings) = conditions(ours, theirs);
    let mut found = Comparison { warnings, conditions, ..Comparison::default() };
    let mut known: BTreeMap<(String, String), &Entry> = BTreeMap::new();
    for (entry, at) in theirs.entries.iter().zip(places(theirs, by_step)) {
        known.entry((entry.key(), at)).or_insert(entry);
    }
    for (entry, at) in ours.entries.iter().zip(places(ours, by_step)) {
        let key = entry.key();
        let renamed = map.get(&key).cloned();
        let renamed = renamed.or_else(|| map.get(&entry.about).map(|about| format!("{about}.{}", entry.field)));
        let Some(other) = known.remove(&(renamed.unwrap_or_else(|| key.clone()), at.clone())) else {
            if !found.unmatched.0.contains(&key) {
                found.unmatched.0.push(key);
            }
            continue;
        };
        found.pairs.push(pair(entry, other, at, tol_rel, tol_abs));
    }
    let mut rest: Vec<String> = known.into_keys().map(|(key, _)| key).collect();
    rest.dedup();
    found.unmatched.1 = rest;
    let only_sums =
        found.pairs.iter().all(|p| p.key.ends_with("sum") || p.key.ends_with("_f64") || p.key.contains(".latents"));
    if only_sums && !found.pairs.is_empty() {
        let note = "only sums are compared; a sum near zero hides a large difference, traces with abs_mean do not";
        found.warnings.push(note.into());
    }
    found
}

/// Where each entry stands: its step and the number of the line in it, or the number of the line in the log.
fn places(log: &Log, by_step: bool) -> Vec<String> {
    let mut counts: BTreeMap<(String, Option<String>), usize> = BTreeMap::new();
    let place = |entry: &Entry| match (&entry.step, by_step) {
        (Some(step), true) => {
            let count = counts.entry((entry.key(), entry.step.clone())).or_default();
            *count += 1;
            if *count > 1 { format!("{step} line {count}") } else { step.clone() }
        }
        _ => format!("line {}", entry.occurrence + 1),
    };
    log.entries.iter().map(place).collect()
}

/// Largest relative difference of mean magnitudes that counts as equal.
const ABS_MEAN_LIMIT: f64 = 5e-3;

fn pair(ours: &Entry, theirs: &Entry, at: String, tol_rel: f64, tol_abs: f64) -> Pair {
    let (a, b) = (ours.value, theirs.value);
    let shapes = match (&ours.shape, &theirs.shape) {
        (Some(x), Some(y)) if x != y => Some((x.clone(), y.clone())),
        _ => None,
    };
    // Infinities and NaN have no distance.
    let is_equal = |a: f64, b: f64, abs: f64, rel: f64| match a.is_finite() && b.is_finite() {
        true => (a - b).abs() <= abs + rel * a.abs().max(b.abs()),
        false => a == b || (a.is_nan() && b.is_nan()),
    };
    let diverges = match (ours.abs_mean, theirs.abs_mean) {
        (Some(x), Some(y)) => !is_equal(x, y, 0.0, ABS_MEAN_LIMIT),
        _ => !is_equal(a, b, tol_abs, tol_rel),
    };
    Pair { key: ours.key(), at, ours: a, theirs: b, diverges: diverges || shapes.is_some(), shapes }
}

/// What the headers of logs say about a run, and what it means if they do not say the same.
const CONDITIONS: [(&str, &str); 5] = [
    ("dtype", "activations are computed in different dtypes"),
    ("attention", "the attention algorithms differ"),
    ("fused_attention", "one side has fused variants of attention"),
    ("text_padding", "texts are padded to different lengths, so that registers of the connectors differ"),
    ("decoder_noise", "the decoders add different noise"),
];

type Condition = (&'static str, Option<String>, Option<String>);

/// What must be the same on both sides for numbers to agree, and warnings where it is not.
fn conditions(ours: &Log, theirs: &Log) -> (Vec<Condition>, Vec<String>) {
    let (mut conditions, mut warnings) = (Vec::new(), Vec::new());
    for (name, what) in CONDITIONS {
        let of = |log: &Log| log.header.get(name).cloned();
        if let (Some(a), Some(b)) = (of(ours), of(theirs))
            && a != b
        {
            warnings.push(format!("{what}: {a} and {b}"));
        }
        conditions.push((name, of(ours), of(theirs)));
    }
    let experiments = |log: &Log| log.header.get("experiments").cloned().unwrap_or_else(|| "none".into());
    if experiments(ours) != experiments(theirs) {
        warnings.push(format!("the runs are different experiments: {} and {}", experiments(ours), experiments(theirs)));
    }
    let noise = |log: &Log| -> Vec<(String, String)> {
        log.header.iter().filter(|(k, _)| k.starts_with("noise.")).map(|(k, v)| (k.clone(), v.clone())).collect()
    };
    match (noise(ours), noise(theirs)) {
        (a, b) if a.is_empty() && b.is_empty() => {
            let seed = |log: &Log| log.header.get("seed").cloned();
            if seed(ours) != seed(theirs) || theirs.header.is_empty() {
                warnings.push("neither run read noise files; a seed means different noise in every tool".into());
            }
        }
        (a, b) if a != b && !theirs.header.is_empty() => warnings.push("the noise files differ".into()),
        _ => {}
    }
    (conditions, warnings)
}

/// What usually is behind a difference that shows here first.
pub fn likely_causes(key: &str) -> &'static str {
    let has = |part: &str| key.contains(part);
    match () {
        () if has("patchify_proj") => "other weights are loaded: compare the files with `ltxc debug weights --against`",
        () if has("latent_checksum") || has("latent_head") => {
            "the same values in another order: noise in token form taken for native layout, or another patch order"
        }
        () if has("noised") || has("LatentPreparation") || has("latent_sum") => {
            "other noise, another noise scale, or conditioning written into the noisy latent: replay one set of noise files"
        }
        () if has("positions_sum") => {
            "positions: bf16 instead of f32, another frame rate, a wrong number of audio tokens, or no causal first frame"
        }
        () if has("gemma_hidden_state_0") => "the embedding is not scaled by the square root of the hidden size",
        () if has("gemma_hidden_state") => {
            "the text encoder: states collected after the layer, one RoPE setting for all layers, or right instead of left padding"
        }
        () if has("gemma_feature") || has("features") => {
            "the feature extractor: order of the stacked layers, or its norm"
        }
        () if has("TextEncoding") || has("_encoding") || has("context_sum") || has("text.") => {
            "the text side: another prompt, padding, registers, or connectors; `ltxc debug text` looks closer"
        }
        () if has(".t_sum") || has(".emb_sum") => "timesteps: the multiplier, or one sigma for all tokens",
        () if has("pe_cos") || has("pe_sin") => {
            "RoPE tables: interleaved instead of split, a grid in f32 instead of f64, or positions in bf16"
        }
        () if has(".x_sum") => "the patchify projection, or the keyframes embedding",
        () if has("audio_to_video") || has("video_to_audio") => {
            "attention between the streams: scale comes before shift, the gate follows the other stream's sigma, or its multiplier is 1"
        }
        () if has("attn1") => "self attention: RoPE layout, shift and scale rows swapped, or norms per head",
        () if has("attn2") => "text attention: queries' length used for keys, or a context that is normed",
        () if has(":ff") || has("_ff") => "feed-forward: rows 3 to 5 of the modulation, or another GELU",
        () if has("audio_sum") => {
            "the audio stream of this block; see `--debug-model-detail` for the layer, and the A/V gate multiplier"
        }
        () if has("block=") => "a layer of this block; `--debug-model-detail` and `--debug-mode exact` tell which",
        () if has("Upsample") || has("upsample") => {
            "the upsampler: latents must be un-normalised before it and normalised after"
        }
        () if has("Denoising") => "a step: velocity taken for the prediction, sigmas, or guidance",
        () if has("Decoding") => "the decoder: its timestep, its noise, or reflect padding",
        () => "see the entries just before it",
    }
}

/// The command that looks closer at a difference that shows here first.
fn next_command(key: &str) -> &'static str {
    match () {
        () if key.contains("stage=") => "run both sides again with `--debug-model-sums-path FILE` and compare those",
        () if key.contains("attn") || key.contains("ff.") || key.contains("module=") => {
            "run with `--debug-mode exact --tap '*.blocks.N.*' --tap-path FILE` and compare element by element"
        }
        () if key.contains("block=") => "run both sides again with `--debug-mode exact --debug-model-detail-path FILE`",
        () => "run both sides again with `--debug-mode exact --debug-module-sums-path FILE`",
    }
}

fn facts(c: &Comparison) -> serde_json::Value {
    let row = |p: &Pair| {
        json!({"key": p.key, "at": p.at, "ours": p.ours, "theirs": p.theirs, "abs": (p.ours - p.theirs).abs(),
            "diverges": p.diverges, "shapes": p.shapes})
    };
    json!({
        "agrees": c.first().is_none(),
        "first": c.first().map(|i| row(&c.pairs[i])),
        "likely_cause": c.first().map(|i| likely_causes(&c.pairs[i].key)),
        "pairs": c.pairs.iter().map(row).collect::<Vec<_>>(),
        "only_ours": c.unmatched.0, "only_theirs": c.unmatched.1, "warnings": c.warnings,
        "conditions": c.conditions.iter().map(|(name, a, b)| json!({"name": name, "ours": a, "theirs": b})).collect::<Vec<_>>(),
    })
}

fn text(c: &Comparison, top: usize) -> String {
    let mut out = String::new();
    let word = |value: &Option<String>| value.clone().unwrap_or("unknown".into());
    if c.conditions.iter().any(|(_, ours, theirs)| ours.is_some() || theirs.is_some()) {
        let one = |(name, ours, theirs): &Condition| match ours == theirs {
            true => format!("{name} {}", word(ours)),
            false => format!("{name} {}/{}", word(ours), word(theirs)),
        };
        out += &format!("conditions (ours/theirs): {}\n", c.conditions.iter().map(one).collect::<Vec<_>>().join(", "));
        out += "targets of public tests: transformer 1e-4 abs and rel, pixels 2/255 abs and 1e-3 rel\n";
    }
    for warning in &c.warnings {
        out += &format!("warning: {warning}\n");
    }
    let first = c.first();
    // What leads to the first difference, and what follows.
    let start = first.map_or(0, |i| i.saturating_sub(top / 2));
    out += &format!("{:<44} {:>18} {:>16} {:>16} {:>10} {:>10}\n", "key", "at", "ours", "theirs", "abs", "rel");
    for p in c.pairs.iter().skip(start).take(top) {
        let abs = (p.ours - p.theirs).abs();
        let rel = abs / p.ours.abs().max(p.theirs.abs()).max(1e-30);
        let mark = if p.diverges { " <" } else { "" };
        out += &format!(
            "{:<44} {:>18} {:>16.6} {:>16.6} {abs:>10.2e} {rel:>10.2e}{mark}\n",
            p.key, p.at, p.ours, p.theirs
        );
        if let Some((a, b)) = &p.shapes {
            out += &format!("  shape {a} and {b}\n");
        }
    }
    let hidden = c.pairs.len().saturating_sub(start + top) + start;
    if hidden > 0 {
        out += &format!("… and {hidden} more (`--top`)\n");
    }
    for (whose, keys) in [("ours", &c.unmatched.0), ("theirs", &c.unmatched.1)] {
        if !keys.is_empty() {
            let shown: Vec<&str> = keys.iter().take(5).map(String::as_str).collect();
            out += &format!("only in {whose}: {} keys, for example {}\n", keys.len(), shown.join(", "));
        }
    }
    match first {
        None => out += &format!("all {} entries agree\n", c.pairs.len()),
        Some(i) => {
            let p = &c.pairs[i];
            out += &format!("\nfirst divergence: {} ({}): ours {:.6}, theirs {:.6}\n", p.key, p.at, p.ours, p.theirs);
            match i.checked_sub(1).map(|i| &c.pairs[i]) {
                Some(before) => out += &format!("last agreement:   {} ({})\n", before.key, before.at),
                None => out += "nothing before it agrees\n",
            }
            out +=
                &format!("likely:           {}\nnext:             {}\n", likely_causes(&p.key), next_command(&p.key));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ours: &str, theirs: &str) -> Comparison {
        compare(&parse(ours), &parse(theirs), &BTreeMap::new(), 5e-3, 1e-3)
    }

    #[test]
    fn equal_logs_agree_whatever_their_prefix() {
        let c = check("ltxc:block=0:video_sum=1.0 audio_sum=2.0", "fastvideo:0:video_sum=1.0001,audio_sum=2.0");
        assert_eq!((c.pairs.len(), c.first()), (2, None));
    }

    #[test]
    fn the_first_difference_is_the_first_of_our_order() {
        let ours =
            "# step=0 pass=0\nx:block=0:video_sum=1\nx:block=1:video_sum=5\n# step=1 pass=0\nx:block=0:video_sum=9";
        let theirs =
            "# step=0 pass=0\nx:block=0:video_sum=1\nx:block=1:video_sum=2\n# step=1 pass=0\nx:block=0:video_sum=9";
        let c = check(ours, theirs);
        assert_eq!(c.pairs[c.first().unwrap()].key, "block=1.video_sum");
        assert_eq!(c.pairs.len(), 3);
        let output = text(&c, 20);
        assert!(output.contains("last agreement:   block=0.video_sum (step=0 pass=0)"), "{output}");
    }

    #[test]
    fn mean_magnitudes_decide_where_both_logs_have_them() {
        let line =
            |sum: f64, mean: f64| format!(r#"{{"module":"a","tensor":"out","step":0,"abs_mean":{mean},"sum":{sum}}}"#);
        assert!(check(&line(0.001, 1.0), &line(3.0, 1.001)).first().is_none());
        assert!(check(&line(3.0, 1.0), &line(3.0, 1.1)).first().is_some());
    }

    #[test]
    fn what_is_not_finite_equals_itself_alone() {
        let differs = |a: &str, b: &str| check(&format!("x:a:s={a}"), &format!("x:a:s={b}")).first().is_some();
        assert!(!differs("inf", "inf") && !differs("nan", "nan"));
        for (a, b) in [("inf", "1"), ("1", "inf"), ("inf", "-inf"), ("nan", "1"), ("inf", "nan")] {
            assert!(differs(a, b), "{a} and {b}");
        }
    }

    #[test]
    fn other_shapes_and_conditions_are_told() {
        let c = check("x:gemma_feature:sum=1 shape=(1, 2)", "x:gemma_feature:sum=1 shape=(1, 3)");
        assert!(c.first().is_some());
        let c = check("# a dtype=f32 decoder_noise=0\nx:a:s=1", "# b dtype=bf16 decoder_noise=0.025\nx:a:s=1");
        assert_eq!(
            c.warnings.iter().filter(|w| w.contains("dtype") || w.contains("noise")).count(),
            2,
            "{:?}",
            c.warnings
        );
    }

    #[test]
    fn names_can_be_mapped() {
        let map = parse_map("# comment\nblock=0 = layer0\n").unwrap();
        let c = compare(&parse("x:block=0:s=1"), &parse("x:layer0:s=1"), &map, 5e-3, 1e-3);
        assert_eq!((c.pairs.len(), c.first()), (1, None));
        assert!(parse_map("nonsense").is_err());
    }
}
