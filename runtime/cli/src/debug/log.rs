//! Lines of debugging logs and where they go.
//!
//! A line is `<prefix>:<key>:<field>=<value> …`. JSON lines hold the same under the same names.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use ltxc_runtime::RunError;
use ltxc_runtime::stats::Stats;
use serde_json::{Map, Value, json};

use super::flags::{LogFormat, LogPrefix};

/// One line of a log.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// What it is about: `block=3`, `stage=LTX2DenoisingStage`.
    pub key: String,
    /// What stands between key and fields: `:`, or a space.
    pub separator: &'static str,
    /// What is said about it.
    pub fields: Vec<(String, Field)>,
}

/// A value on a line.
#[derive(Clone, Debug)]
pub enum Field {
    /// A number with six decimals.
    Number(f64),
    /// A sum in f32, and the same sum in f64, which logs show on request.
    Sum(f64, f64),
    /// A whole number.
    Count(usize),
    /// Extents.
    Shape(Vec<usize>),
    /// The first values.
    Head(Vec<f32>),
    /// A word.
    Word(String),
}

impl Line {
    /// A line about `key`.
    pub fn new(key: impl Into<String>) -> Line {
        Line { key: key.into(), separator: ":", fields: Vec::new() }
    }

    /// The line with a number.
    pub fn number(mut self, name: &str, value: f64) -> Line {
        self.fields.push((name.into(), Field::Number(value)));
        self
    }

    /// The line with a sum.
    pub fn sum(self, name: &str, stats: &Stats) -> Line {
        self.field(name, Field::Sum(f64::from(stats.sum), stats.sum_f64))
    }

    /// The line with every sum in f64, too, under its name and `_f64`.
    fn with_f64(&self) -> Line {
        let fields = self.fields.iter().flat_map(|(name, field)| {
            let wide = match field {
                Field::Sum(_, wide) => Some((format!("{name}_f64"), Field::Number(*wide))),
                _ => None,
            };
            std::iter::once((name.clone(), field.clone())).chain(wide)
        });
        Line { fields: fields.collect(), ..self.clone() }
    }

    /// The line with a field of any kind.
    pub fn field(mut self, name: &str, field: Field) -> Line {
        self.fields.push((name.into(), field));
        self
    }

    /// The line as text.
    pub fn text(&self, prefix: LogPrefix) -> String {
        let fields: Vec<String> = self.fields.iter().map(|(name, field)| format!("{name}={}", field.text())).collect();
        format!("{}:{}{}{}", prefix.text(), self.key, self.separator, fields.join(" "))
    }

    /// The line as JSON, with the step and pass that it belongs to.
    pub fn json(&self, step: Option<usize>, pass: Option<&str>) -> Value {
        let mut object = Map::from_iter([("key".to_string(), json!(self.key))]);
        if let Some(step) = step {
            object.insert("step".into(), json!(step));
        }
        if let Some(pass) = pass {
            object.insert("pass".into(), json!(pass));
        }
        object.extend(self.fields.iter().map(|(name, field)| (name.clone(), field.json())));
        Value::Object(object)
    }
}

impl Field {
    fn text(&self) -> String {
        match self {
            Field::Number(v) | Field::Sum(v, _) => format!("{v:.6}"),
            Field::Count(n) => n.to_string(),
            Field::Shape(shape) => shape_text(shape),
            Field::Head(values) => {
                format!("[{}]", values.iter().map(|v| v.to_string()).collect::<Vec<_>>().join(", "))
            }
            Field::Word(word) => word.clone(),
        }
    }

    fn json(&self) -> Value {
        match self {
            Field::Number(v) | Field::Sum(v, _) => json!(v),
            Field::Count(n) => json!(n),
            Field::Shape(shape) => json!(shape),
            Field::Head(values) => json!(values),
            Field::Word(word) => json!(word),
        }
    }
}

/// `(1, 24, 64)`; one extent has a comma behind it.
pub fn shape_text(shape: &[usize]) -> String {
    match shape {
        [one] => format!("({one},)"),
        shape => format!("({})", shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}

/// Where the lines of one log go.
pub struct Sink {
    format: LogFormat,
    prefix: LogPrefix,
    has_f64: bool,
    /// The tile that lines are about, in stages that run in tiles.
    tile: Option<usize>,
    text: Option<Out>,
    json: Option<Out>,
    lines: usize,
}

struct Out {
    path: Option<PathBuf>,
    writer: Box<dyn Write>,
}

impl Sink {
    /// Opens a log: `path`, or standard error. Folders are made; files begin anew unless `append`. `header` is the first
    /// line, without its `#`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn open(
        path: Option<&Path>,
        format: LogFormat,
        prefix: LogPrefix,
        append: bool,
        header: &str,
    ) -> Result<Sink, RunError> {
        let beside = |path: &Path| {
            let mut name = path.as_os_str().to_owned();
            name.push(".jsonl");
            PathBuf::from(name)
        };
        let text = match format {
            LogFormat::Text | LogFormat::Both => Some(Out::open(path, append)?),
            LogFormat::Jsonl => None,
        };
        let json = match format {
            LogFormat::Text => None,
            LogFormat::Jsonl => Some(Out::open(path, append)?),
            LogFormat::Both => Some(Out::open(path.map(beside).as_deref(), append)?),
        };
        let mut sink = Sink { format, prefix, has_f64: false, tile: None, text, json, lines: 0 };
        sink.comment(header)?;
        Ok(sink)
    }

    /// The log with sums in f64 beside those in f32, or without.
    pub fn with_f64(self, has_f64: bool) -> Sink {
        Sink { has_f64, ..self }
    }

    /// Says that what follows is about this tile of a stage, or about all of it again: `# tile=3`, `# tile=all`. JSON has
    /// the number in every object.
    ///
    /// # Errors
    /// A disk that is full, or another reason not to write.
    pub fn enter_tile(&mut self, tile: Option<usize>) -> Result<(), RunError> {
        if std::mem::replace(&mut self.tile, tile) == tile {
            return Ok(());
        }
        self.comment(&tile.map_or("tile=all".into(), |tile| format!("tile={tile}")))
    }

    /// How many lines it got, headers and comments left out.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// Writes a line that parsers skip.
    ///
    /// # Errors
    /// A disk that is full, or another reason not to write.
    pub fn comment(&mut self, text: &str) -> Result<(), RunError> {
        match &mut self.text {
            Some(out) => out.line(&format!("# {text}")),
            None => Ok(()),
        }
    }

    /// Writes a line.
    ///
    /// # Errors
    /// A disk that is full, or another reason not to write.
    pub fn line(&mut self, line: &Line, step: Option<usize>, pass: Option<&str>) -> Result<(), RunError> {
        self.lines += 1;
        let wide = self.has_f64.then(|| line.with_f64());
        let line = wide.as_ref().unwrap_or(line);
        if let Some(out) = &mut self.text {
            out.line(&line.text(self.prefix))?;
        }
        if let Some(out) = &mut self.json {
            out.line(&of_tile(line.json(step, pass), self.tile).to_string())?;
        }
        Ok(())
    }

    /// Writes an object to a log that is all JSON.
    ///
    /// # Errors
    /// A disk that is full, or another reason not to write.
    pub fn object(&mut self, object: &str) -> Result<(), RunError> {
        debug_assert_eq!(self.format, LogFormat::Jsonl);
        self.lines += 1;
        let of_tile =
            self.tile.map(|tile| format!("{}, \"tile\": {tile}}}", object.strip_suffix('}').unwrap_or(object)));
        match &mut self.json {
            Some(out) => out.line(of_tile.as_deref().unwrap_or(object)),
            None => Ok(()),
        }
    }

    /// Hands everything to the system.
    ///
    /// # Errors
    /// A disk that is full, or another reason not to write.
    pub fn finish(&mut self) -> Result<(), RunError> {
        [&mut self.text, &mut self.json].into_iter().flatten().try_for_each(Out::flush)
    }
}

/// An object with the tile that it is about.
fn of_tile(mut object: Value, tile: Option<usize>) -> Value {
    if let (Some(fields), Some(tile)) = (object.as_object_mut(), tile) {
        fields.insert("tile".into(), json!(tile));
    }
    object
}

impl Out {
    fn open(path: Option<&Path>, append: bool) -> Result<Out, RunError> {
        let Some(path) = path else { return Ok(Out { path: None, writer: Box::new(std::io::stderr()) }) };
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|e| RunError::io(folder, e))?;
        }
        let mut options = OpenOptions::new();
        options.create(true).write(true).append(append).truncate(!append);
        let file: File = options.open(path).map_err(|e| RunError::io(path, e))?;
        Ok(Out { path: Some(path.into()), writer: Box::new(BufWriter::new(file)) })
    }

    fn line(&mut self, text: &str) -> Result<(), RunError> {
        writeln!(self.writer, "{text}").map_err(|e| RunError::io(self.path.clone().unwrap_or_default(), e))
    }

    fn flush(&mut self) -> Result<(), RunError> {
        self.writer.flush().map_err(|e| RunError::io(self.path.clone().unwrap_or_default(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_known_form() {
        let stats = Stats::of(&[1, 2, 3], &[0.5; 6]);
        let line = Line::new("gemma_feature").sum("sum", &stats).field("shape", Field::Shape(stats.ty.shape.clone()));
        assert_eq!(line.text(LogPrefix::Fastvideo), "fastvideo:gemma_feature:sum=3.000000 shape=(1, 2, 3)");
        assert_eq!(
            line.json(Some(2), None).to_string(),
            r#"{"key":"gemma_feature","shape":[1,2,3],"step":2,"sum":3.0}"#
        );
        assert_eq!(
            line.with_f64().text(LogPrefix::Ltxc),
            "ltxc:gemma_feature:sum=3.000000 sum_f64=3.000000 shape=(1, 2, 3)"
        );
        let stage = Line { separator: " ", ..Line::new("stage=X").number("latents", -1.5) };
        assert_eq!(stage.text(LogPrefix::Ltxc), "ltxc:stage=X latents=-1.500000");
    }
}
