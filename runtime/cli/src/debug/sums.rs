//! The lines of sums: after stages, of prepared inputs and blocks, inside blocks, of modules.
//!
//! Everything here turns statistics that were collected into [`Line`]s; [`super::session`] collects them.

use std::collections::BTreeMap;

use ltxc_runtime::stats::Stats;
use serde_json::{Value, json};

use super::flags::TraceNames;
use super::log::{Field, Line};
use super::names::{full_name, pass_of, trace_name};
use super::options::Trace;

/// Layers of a block whose results are listed in detail.
pub const DETAIL: [&str; 8] =
    ["attn1", "attn2", "ff", "audio_attn1", "audio_attn2", "audio_ff", "audio_to_video_attn", "video_to_audio_attn"];

/// Sums of a stage, in the order in which they are printed. Side tensors come last, in order of arrival.
#[derive(Clone, Debug, Default)]
pub struct StageSums {
    main: BTreeMap<usize, Sum>,
    extra: Vec<(String, Sum)>,
}

/// A sum in f32, in the documented order, and in f64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sum {
    /// In f32; sums of several tensors are added up in f64.
    pub narrow: f64,
    /// In f64.
    pub wide: f64,
}

impl Sum {
    /// The sums of some values.
    pub fn of(values: &[f32]) -> Sum {
        let wide = values.iter().map(|&v| f64::from(v)).sum();
        Sum { narrow: f64::from(ltxc_runtime::stats::sum_f32(values)), wide }
    }

    /// The sums of a tensor.
    pub fn from_stats(stats: &Stats) -> Sum {
        Sum { narrow: f64::from(stats.sum), wide: stats.sum_f64 }
    }

    /// As a field of a line.
    pub fn field(self) -> Field {
        Field::Sum(self.narrow, self.wide)
    }
}

impl std::ops::AddAssign for Sum {
    fn add_assign(&mut self, other: Sum) {
        self.narrow += other.narrow;
        self.wide += other.wide;
    }
}

/// Names on the line of a stage, in order.
const STAGE_FIELDS: [&str; 7] =
    ["latents", "image_latent", "video_latent", "noise_pred", "output", "prompt_embeds", "negative_prompt_embeds"];

impl StageSums {
    /// Adds to the sum of a field; lists of tensors are summed together. A field that no stage has is a side tensor.
    pub fn add(&mut self, field: &str, sum: Sum) {
        match STAGE_FIELDS.iter().position(|f| *f == field) {
            Some(at) => *self.main.entry(at).or_default() += sum,
            None => match self.extra.iter_mut().find(|(name, _)| name == field) {
                Some((_, known)) => *known += sum,
                None => self.extra.push((field.into(), sum)),
            },
        }
    }

    /// Takes over the sums of another one in the places of its own.
    pub fn update(&mut self, other: StageSums) {
        self.main.extend(other.main);
        for (name, sum) in other.extra {
            match self.extra.iter_mut().find(|(own, _)| *own == name) {
                Some((_, own)) => *own = sum,
                None => self.extra.push((name, sum)),
            }
        }
    }

    /// The line of a stage; nothing if there is nothing to print.
    pub fn line(&self, stage: &str) -> Option<Line> {
        if self.main.is_empty() && self.extra.is_empty() {
            return None;
        }
        let mut line = Line { separator: " ", ..Line::new(format!("stage={stage}")) };
        for (&at, &sum) in &self.main {
            line = line.field(STAGE_FIELDS[at], sum.field());
        }
        for (name, sum) in &self.extra {
            line = line.field(&format!("extra.{name}"), sum.field());
        }
        Some(line)
    }
}

/// A collected value: its statistics, and the values themselves where lines need more than statistics.
pub struct Collected {
    /// Statistics.
    pub stats: Stats,
    /// Values of small tensors that are weighted before they are summed.
    pub values: Vec<f32>,
}

/// Values of one evaluation of the transformer, by path.
pub type Values = BTreeMap<String, Collected>;

/// The lines of one pass of the transformer; `pass` stands in front of the paths of its values.
///
/// The sum of the timesteps is that of one row for each token, as the reference has it; ours are rows of distinct values.
pub fn model_lines(values: &Values, pass: &str, patchify: Option<[Sum; 4]>) -> Vec<Line> {
    let mut lines = Vec::new();
    for modality in ["video", "audio"] {
        lines.extend(modality_line(values, modality));
    }
    if let Some(sums) = patchify {
        let names = ["video_w_sum", "video_b_sum", "audio_w_sum", "audio_b_sum"];
        let line = Line::new("patchify_proj");
        lines.push(names.iter().zip(sums).fold(line, |line, (name, sum)| line.field(name, sum.field())));
    }
    for modality in ["video", "audio"] {
        lines.extend(prepared_line(values, pass, modality));
    }
    for block in 0.. {
        let of = |modality: &str| values.get(&format!("{pass}blocks.{block}.{modality}"));
        if of("video").is_none() && of("audio").is_none() {
            break;
        }
        let mut line = Line::new(format!("block={block}"));
        for modality in ["video", "audio"] {
            if let Some(found) = of(modality) {
                line = line.sum(&format!("{modality}_sum"), &found.stats);
            }
        }
        lines.push(line);
    }
    lines
}

fn modality_line(values: &Values, modality: &str) -> Option<Line> {
    let latent = &values.get(&format!("{modality}.latent"))?.stats;
    let mut line = Line::new(format!("modality_{modality}"))
        .sum("latent_sum", latent)
        .field("latent_shape", Field::Shape(latent.ty.shape.clone()));
    if let Some(positions) = values.get(&format!("{modality}.positions")) {
        line = line
            .sum("positions_sum", &positions.stats)
            .field("positions_shape", Field::Shape(positions.stats.ty.shape.clone()));
    }
    Some(line.field("latent_head", Field::Head(latent.head.clone())).number("latent_checksum", latent.checksum))
}

fn prepared_line(values: &Values, pass: &str, modality: &str) -> Option<Line> {
    // Passes share what is equal.
    let own = |name: &str| {
        let path = format!("prep.{modality}.{name}");
        values.get(&format!("{pass}{path}")).or_else(|| values.get(&path))
    };
    let latent = values.get(&format!("{modality}.latent"))?;
    // A context that the transformer does not project is passed on as it comes in.
    let context = own("context").or_else(|| values.get(&format!("{modality}.context")));
    let tokens = latent.stats.ty.shape.get(1).copied().unwrap_or(0);
    let rows = values.get(&format!("{modality}.rows")).map(|rows| &rows.values[..]);
    let mut line = Line::new(format!("prep_{modality}"));
    for (field, value) in [("x_sum", own("x")), ("context_sum", context)] {
        if let Some(value) = value {
            line = line.sum(field, &value.stats);
        }
    }
    for (field, name) in [("t_sum", "timesteps"), ("emb_sum", "embedded_timestep")] {
        if let Some(value) = own(name) {
            line = line.number(field, sum_per_token(value, rows, tokens));
        }
    }
    for table in ["rope", "cross_rope"] {
        for function in ["cos", "sin"] {
            let field = format!("{}pe_{function}_sum", if table == "rope" { "" } else { "cross_" });
            match own(&format!("{table}_{function}")) {
                Some(value) => line = line.sum(&field, &value.stats),
                None => match own(&format!("rope_{function}")).filter(|_| table == "cross_rope") {
                    // Sound goes by time alone: the table for the other stream is its own one, and computed once.
                    Some(shared) if modality == "audio" && values.contains_key("video.latent") => {
                        line = line.sum(&field, &shared.stats);
                    }
                    // Absent tables are printed as 0; in front of fused kernels a table may be there and not be seen.
                    Some(_) => line = line.number(&field, 0.0),
                    None => {}
                },
            }
        }
    }
    Some(match own("context_bias") {
        None => line.field("mask", Field::Word("None".into())),
        Some(mask) => {
            let finite: Vec<f32> = mask.values.iter().copied().filter(|v| v.is_finite()).collect();
            line.number("mask_min", f64::from(mask.stats.min))
                .number("mask_max", f64::from(mask.stats.max))
                .number("mask_finite_sum", f64::from(ltxc_runtime::stats::sum_f32(&finite)))
                .field("mask_finite_count", Field::Count(finite.len()))
        }
    })
}

/// The sum of a table of distinct rows, once for each token.
fn sum_per_token(table: &Collected, rows: Option<&[f32]>, tokens: usize) -> f64 {
    let count = table.stats.ty.shape.first().copied().unwrap_or(1).max(1);
    let width = table.values.len() / count;
    let row = |r: usize| {
        table.values.get(r * width..(r + 1) * width).map_or(0.0, |v| f64::from(ltxc_runtime::stats::sum_f32(v)))
    };
    match rows {
        Some(rows) => rows.iter().map(|&r| row(r as usize)).sum(),
        None => row(0) * tokens as f64,
    }
}

/// The detail line of a value inside a block, or of an output projection.
pub fn detail_line(path: &str, stats: &Stats) -> Option<Line> {
    let path = pass_of(path).1;
    let key = match path.strip_prefix("blocks.") {
        Some(rest) => {
            let (block, name) = rest.split_once('.')?;
            DETAIL.contains(&name).then(|| format!("{block}:{name}"))?
        }
        None => ["proj_out", "audio_proj_out"].contains(&path).then(|| format!("output:{path}"))?,
    };
    Some(Line::new(key).sum("out_sum", stats))
}

/// The line of a module.
pub fn module_line(component: &str, module: &str, stats: &Stats) -> Line {
    Line::new(format!("module={}", full_name(component, module)))
        .sum("out_sum", stats)
        .field("shape", Field::Shape(stats.ty.shape.clone()))
        .field("dtype", Field::Word(stats.ty.dtype.to_string()))
}

/// The record of a module in an activation trace: an object with the keys of the known tool, in its order and spacing.
pub fn trace_record(name: &str, step: Option<usize>, stats: &Stats, wanted: &[String]) -> String {
    let mut record =
        vec![("module".to_string(), json!(name)), ("tensor".into(), json!("out")), ("step".into(), json!(step))];
    for stat in wanted {
        let value = match stat.as_str() {
            "abs_mean" => json!(stats.abs_mean),
            "sum" => json!(f64::from(stats.sum)),
            "min" => json!(stats.min),
            "max" => json!(stats.max),
            "mean" => json!(stats.mean),
            "std" => json!(stats.std),
            "shape" => json!(stats.ty.shape),
            _ => json!(format!("torch.{}", torch_name(stats.ty.dtype))),
        };
        record.push((stat.clone(), value));
    }
    let text = |value: &Value| match value {
        Value::Array(items) => format!("[{}]", items.iter().map(Value::to_string).collect::<Vec<_>>().join(", ")),
        value => value.to_string(),
    };
    let pairs: Vec<String> = record.iter().map(|(key, value)| format!("{}: {}", json!(key), text(value))).collect();
    format!("{{{}}}", pairs.join(", "))
}

/// The name that the reference's framework gives a dtype.
fn torch_name(dtype: ltxc_ir::DType) -> String {
    match dtype.to_string().as_str() {
        "f32" => "float32".into(),
        "bf16" => "bfloat16".into(),
        "f16" => "float16".into(),
        "i32" => "int32".into(),
        other => other.into(),
    }
}

/// Whether a trace wants a module at a step, and the name that it has there.
pub fn traced(trace: &Trace, component: &str, module: &str, step: Option<usize>) -> Option<String> {
    let name = trace_name(trace.names, component, module);
    let is_step = trace.steps.is_empty() || step.is_some_and(|s| trace.steps.contains(&s));
    (is_step && trace.layers.is_match(&name)).then_some(name)
}

/// A trace of everything, for module sums in that format.
pub const MODULE_TRACE_STATS: [&str; 4] = ["abs_mean", "sum", "shape", "dtype"];

/// Names of modules in module sums that are written as a trace.
pub const MODULE_TRACE_NAMES: TraceNames = TraceNames::Checkpoint;

#[cfg(test)]
mod tests {
    use super::*;

    fn collected(shape: &[usize], values: &[f32]) -> Collected {
        Collected { stats: Stats::of(shape, values), values: values.into() }
    }

    #[test]
    fn stage_lines_keep_their_order_and_leave_out_what_is_absent() {
        let mut sums = StageSums::default();
        assert!(sums.line("X").is_none());
        sums.add("ltx2_audio_latents", Sum { narrow: 2.0, wide: 2.0 });
        sums.add("prompt_embeds", Sum { narrow: 1.0, wide: 1.0 });
        sums.add("latents", Sum { narrow: 3.0, wide: 3.0 });
        sums.add("prompt_embeds", Sum { narrow: 0.5, wide: 0.5 });
        let text = sums.line("X").unwrap().text(Default::default());
        assert_eq!(text, "ltxc:stage=X latents=3.000000 prompt_embeds=1.500000 extra.ltx2_audio_latents=2.000000");
    }

    #[test]
    fn records_of_traces_have_the_order_of_the_known_tool() {
        let stats = Stats::of(&[1, 2], &[1.0, -2.0]);
        let wanted = ["sum", "shape", "dtype"].map(String::from);
        assert_eq!(
            trace_record("a.b", None, &stats, &wanted),
            r#"{"module": "a.b", "tensor": "out", "step": null, "sum": -1.0, "shape": [1, 2], "dtype": "torch.float32"}"#
        );
    }

    #[test]
    fn timesteps_are_summed_once_for_each_token() {
        let table = collected(&[2, 3], &[1.0, 1.0, 1.0, 0.0, 0.0, 2.0]);
        assert_eq!(sum_per_token(&table, Some(&[0.0, 1.0, 1.0]), 3), 7.0);
        assert_eq!(sum_per_token(&table, None, 5), 15.0);
    }

    #[test]
    fn lines_of_a_call_are_those_of_the_known_log() {
        let mut values = Values::new();
        let mut add = |name: &str, shape: &[usize]| {
            let n = shape.iter().product();
            values.insert(name.into(), collected(shape, &vec![1.0; n]));
        };
        add("video.latent", &[1, 2, 3]);
        add("video.positions", &[3, 2, 2]);
        add("prep.video.x", &[1, 2, 4]);
        add("prep.video.rope_cos", &[1, 2, 1, 2]);
        add("prep.video.rope_sin", &[1, 2, 1, 2]);
        add("blocks.0.video", &[1, 2, 4]);
        add("blocks.0.audio", &[1, 1, 2]);
        let lines: Vec<String> = model_lines(&values, "", None).iter().map(|l| l.text(Default::default())).collect();
        assert_eq!(
            lines,
            [
                "ltxc:modality_video:latent_sum=6.000000 latent_shape=(1, 2, 3) positions_sum=12.000000 \
                 positions_shape=(3, 2, 2) latent_head=[1, 1, 1, 1, 1, 1] latent_checksum=15.000000",
                "ltxc:prep_video:x_sum=8.000000 pe_cos_sum=4.000000 pe_sin_sum=4.000000 cross_pe_cos_sum=0.000000 \
                 cross_pe_sin_sum=0.000000 mask=None",
                "ltxc:block=0:video_sum=8.000000 audio_sum=2.000000",
            ]
        );
    }

    #[test]
    fn detail_is_about_layers_and_projections() {
        let stats = Stats::of(&[1], &[1.0]);
        let text = |path| detail_line(path, &stats).map(|l| l.text(Default::default()));
        assert_eq!(text("blocks.3.attn1").as_deref(), Some("ltxc:3:attn1:out_sum=1.000000"));
        assert_eq!(text("audio_proj_out").as_deref(), Some("ltxc:output:audio_proj_out:out_sum=1.000000"));
        assert_eq!(text("blocks.3.attn1.to_q"), None);
        assert_eq!(text("blocks.3.video"), None);
    }
}
