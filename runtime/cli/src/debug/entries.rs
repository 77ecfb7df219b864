//! Reading debugging logs of any of the tools: ours, FastVideo's, those of older tests, and JSON traces.
//!
//! A log is a list of entries, each a number under a key. Prefixes (`ltxc`, `fastvideo`, `reference`: any word before the
//! first colon) do not count. Words without a value and the words `stage`, `block`, `module`, `step`, `pass` and `tap` say
//! what a line is about, all other `name=value` pairs are entries of it.

use std::collections::BTreeMap;

use serde_json::Value;

/// One number of a log.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// What the line is about: `block=3`.
    pub about: String,
    /// Name of the number: `video_sum`.
    pub field: String,
    /// The number.
    pub value: f64,
    /// Extents, if the line has them.
    pub shape: Option<String>,
    /// Mean magnitude of the tensor, if the line has it.
    pub abs_mean: Option<f64>,
    /// Tile, step and pass, if the log has them.
    pub step: Option<String>,
    /// Which line of this kind it is, from 0.
    pub occurrence: usize,
}

impl Entry {
    /// The key by which entries of two logs are matched.
    pub fn key(&self) -> String {
        if self.about.is_empty() { self.field.clone() } else { format!("{}.{}", self.about, self.field) }
    }
}

/// A log that was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Log {
    /// Numbers in the order in which they stand.
    pub entries: Vec<Entry>,
    /// What the header says, by name: `dtype`, `seed`, `mode`.
    pub header: BTreeMap<String, String>,
    /// Lines that nothing could be made of.
    pub unread: usize,
}

/// Tile behind which lines are about a whole stage again.
const ALL_TILES: &str = "all";

/// Words whose values belong to what a line is about.
const ABOUT: [&str; 4] = ["stage", "block", "module", "tap"];

/// Reads the text of a log.
pub fn parse(text: &str) -> Log {
    let mut log = Log::default();
    let mut occurrences: BTreeMap<String, usize> = BTreeMap::new();
    let (mut tile, mut step): (Option<String>, Option<String>) = (None, None);
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if let Some(comment) = line.strip_prefix('#') {
            let pairs: BTreeMap<&str, &str> = comment.split_whitespace().filter_map(|w| w.split_once('=')).collect();
            match (comment.trim_start().starts_with("end of"), pairs.get("step"), pairs.get("tile")) {
                (true, ..) => {}
                (false, Some(at), _) => step = Some(format!("step={at} pass={}", pairs.get("pass").unwrap_or(&"0"))),
                (false, None, Some(&at)) => {
                    (tile, step) = ((at != ALL_TILES).then(|| format!("tile={at}")), None);
                }
                (false, None, None) => log.header.extend(pairs.into_iter().map(|(k, v)| (k.into(), v.into()))),
            }
            continue;
        }
        let parsed = match line.starts_with('{') {
            true => json_line(line),
            false => text_line(line).or_else(|| template_line(line)),
        };
        let Some(mut parsed) = parsed else {
            log.unread += 1;
            continue;
        };
        let occurrence = occurrences.entry(parsed.about.clone()).or_default();
        let own = [parsed.tile.take().or_else(|| tile.clone()), parsed.step.take().or_else(|| step.clone())];
        let own = own.into_iter().flatten().collect::<Vec<_>>().join(" ");
        let own_step = (!own.is_empty()).then_some(own);
        for (field, value) in parsed.fields {
            log.entries.push(Entry {
                about: parsed.about.clone(),
                field,
                value,
                shape: parsed.shape.clone(),
                abs_mean: parsed.abs_mean,
                step: own_step.clone(),
                occurrence: *occurrence,
            });
        }
        *occurrence += 1;
    }
    log
}

#[derive(Default)]
struct Parsed {
    about: String,
    fields: Vec<(String, f64)>,
    shape: Option<String>,
    abs_mean: Option<f64>,
    tile: Option<String>,
    step: Option<String>,
}

impl Parsed {
    fn take(&mut self, name: &str, value: &str) {
        let inner = value.trim_start_matches(['(', '[']).trim_end_matches([')', ']']);
        match value.parse::<f64>() {
            Ok(number) => {
                if name == "abs_mean" {
                    self.abs_mean = Some(number);
                }
                self.fields.push((name.into(), number));
            }
            Err(_) if name == "shape" || name.ends_with("_shape") => {
                let extents: Vec<&str> = inner.split(',').map(str::trim).filter(|s| !s.is_empty()).collect();
                self.shape = Some(extents.join("x"));
            }
            // Heads are numbers too; the first differing one is as good as a sum.
            Err(_) if name.ends_with("_head") => {
                let numbers = inner.split(',').filter_map(|n| n.trim().parse::<f64>().ok());
                self.fields.extend(numbers.enumerate().map(|(i, v)| (format!("{name}[{i}]"), v)));
            }
            Err(_) => {}
        }
    }
}

/// `<prefix>:<about>:<name>=<value> …`, with commas or spaces between the pairs.
fn text_line(line: &str) -> Option<Parsed> {
    let (_, rest) = line.split_once(':')?;
    let mut parsed = Parsed::default();
    let mut about: Vec<String> = Vec::new();
    for token in tokens(rest) {
        match token.split_once('=') {
            Some((name @ ("step" | "pass"), value)) => {
                let known = parsed.step.take().unwrap_or_default();
                parsed.step = Some(format!("{known} {name}={value}").trim().into());
            }
            Some((name, value)) if ABOUT.contains(&name) => about.push(format!("{name}={value}")),
            Some((name, value)) => parsed.take(name, value),
            None => about.push(token),
        }
    }
    // Blocks are written with and without the word.
    let word = |part: String| if part.parse::<usize>().is_ok() { format!("block={part}") } else { part };
    parsed.about = about.into_iter().map(word).collect::<Vec<_>>().join(":");
    (!parsed.fields.is_empty()).then_some(parsed)
}

/// Splits at colons, commas and spaces that are in no brackets.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = vec![String::new()];
    let mut depth = 0usize;
    for c in text.chars() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        match c {
            ':' | ',' | ' ' | '\t' if depth == 0 => tokens.push(String::new()),
            // The list is never empty.
            _ => tokens.last_mut().into_iter().for_each(|t| t.push(c)),
        }
    }
    tokens.retain(|t| !t.is_empty());
    tokens
}

/// `name (shape) abs_mean sum min max`.
fn template_line(line: &str) -> Option<Parsed> {
    let (name, rest) = line.split_once('(')?;
    let (shape, rest) = rest.split_once(')')?;
    let numbers: Vec<f64> = rest.split_whitespace().map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let &[abs_mean, sum, min, max] = &numbers[..] else { return None };
    let mut parsed = Parsed { about: name.trim().into(), abs_mean: Some(abs_mean), ..Parsed::default() };
    parsed.take("shape", &format!("({shape})"));
    parsed.fields = [("abs_mean", abs_mean), ("sum", sum), ("min", min), ("max", max)]
        .map(|(name, value)| (name.to_string(), value))
        .into();
    Some(parsed)
}

/// An object of a trace, or of our own logs.
fn json_line(line: &str) -> Option<Parsed> {
    let Value::Object(object) = serde_json::from_str(line).ok()? else { return None };
    let mut parsed = Parsed::default();
    let word = |name: &str| object.get(name).and_then(Value::as_str);
    parsed.about = match (word("module"), word("key")) {
        (Some(module), _) => format!("{module}:{}", word("tensor").unwrap_or("out")),
        (None, Some(key)) => text_line(&format!("x:{key}:a=0")).map_or_else(|| key.to_string(), |p| p.about),
        (None, None) => return None,
    };
    parsed.tile = object.get("tile").and_then(Value::as_u64).map(|tile| format!("tile={tile}"));
    if let Some(step) = object.get("step").and_then(Value::as_u64) {
        parsed.step = Some(match word("pass") {
            Some(pass) => format!("step={step} pass={pass}"),
            None => format!("step={step}"),
        });
    }
    for (name, value) in
        object.iter().filter(|(name, _)| !["module", "tensor", "key", "tile", "step", "pass"].contains(&&name[..]))
    {
        match value {
            Value::Number(n) => parsed.take(name, &n.to_string()),
            Value::Array(items) => {
                let list: Vec<String> = items.iter().map(ToString::to_string).collect();
                parsed.take(name, &format!("({})", list.join(", ")));
            }
            _ => {}
        }
    }
    (!parsed.fields.is_empty()).then_some(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expected: &[(&str, f64)]) {
        let log = parse(line);
        let found: Vec<(String, f64)> = log.entries.iter().map(|e| (e.key(), e.value)).collect();
        let expected: Vec<(String, f64)> = expected.iter().map(|(k, v)| (k.to_string(), *v)).collect();
        assert_eq!(found, expected, "{line}");
    }

    #[test]
    fn every_known_form_is_read() {
        check("fastvideo:stage=X latents=1.5 extra.a=-2", &[("stage=X.latents", 1.5), ("stage=X.extra.a", -2.0)]);
        check("fastvideo:block=3:video_sum=1 audio_sum=2", &[("block=3.video_sum", 1.0), ("block=3.audio_sum", 2.0)]);
        check("reference:3:video_sum=1,audio_sum=2", &[("block=3.video_sum", 1.0), ("block=3.audio_sum", 2.0)]);
        check("ltxc:3:attn1:out_sum=7", &[("block=3:attn1.out_sum", 7.0)]);
        check("reference:upsample_latent_sum=4 shape=(1, 2, 3)", &[("upsample_latent_sum", 4.0)]);
        check(
            "reference:stage1:video:noised_latent_sum=1 noise_scale=0.5",
            &[("stage1:video.noised_latent_sum", 1.0), ("stage1:video.noise_scale", 0.5)],
        );
        check("reference:text:v_pos_sum=1 a_pos_sum=2", &[("text.v_pos_sum", 1.0), ("text.a_pos_sum", 2.0)]);
        check("ltxc:prep_video:x_sum=1 mask=None", &[("prep_video.x_sum", 1.0)]);
        check(
            "blocks.0 (1, 24, 64) 0.5 1.25 -3 3",
            &[("blocks.0.abs_mean", 0.5), ("blocks.0.sum", 1.25), ("blocks.0.min", -3.0), ("blocks.0.max", 3.0)],
        );
        check(r#"{"module":"a.b","tensor":"out","step":null,"sum":2.0}"#, &[("a.b:out.sum", 2.0)]);
        check(r#"{"key":"block=3","step":1,"pass":"0","video_sum":2.0}"#, &[("block=3.video_sum", 2.0)]);
        check(
            "x:modality_video:latent_head=[1, 2]",
            &[("modality_video.latent_head[0]", 1.0), ("modality_video.latent_head[1]", 2.0)],
        );
    }

    #[test]
    fn steps_come_from_comments_and_occurrences_are_counted() {
        let log = parse("# ltxc dtype=f32 seed=10\n# step=0 pass=0\nx:a:s=1\n# step=1 pass=0\nx:a:s=2\nnonsense");
        assert_eq!(log.header["dtype"], "f32");
        let steps: Vec<_> = log.entries.iter().map(|e| (e.step.as_deref().unwrap(), e.occurrence)).collect();
        assert_eq!(steps, [("step=0 pass=0", 0), ("step=1 pass=0", 1)]);
        assert_eq!(log.unread, 1);
        let log = parse("# tile=1\n# step=0 pass=cond\nx:a:s=1\n# tile=all\nx:a:s=2");
        let steps: Vec<_> = log.entries.iter().map(|e| e.step.as_deref()).collect();
        assert_eq!(steps, [Some("tile=1 step=0 pass=cond"), None]);
        let json = parse(r#"{"key":"a","tile":1,"step":0,"pass":"cond","s":1}"#);
        assert_eq!((json.entries.len(), &json.entries[0].step), (1, &log.entries[0].step));
        let shape = &parse("x:a:s=1 shape=(1, 2)").entries[0].shape;
        assert_eq!(shape.as_deref(), Some("1x2"));
    }
}
