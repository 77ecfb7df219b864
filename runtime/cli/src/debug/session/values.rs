//! What a session does with values of programs: which it wants, and what it writes about them.

use anyhow::Result;
use ltxc_ir::Rate;
use ltxc_ir::plan::{Plan, Program, container};
use ltxc_runtime::RunError;
use ltxc_runtime::stats::{Stats, decoded};
use ltxc_runtime::tap::{Role, Value};
use ltxc_runtime::weights::WeightFiles;

use super::State;
use super::logs::{Logs, header, patchify_sums, short};
use crate::debug::flags::ModuleFormat;
use crate::debug::log::{Field, Line};
use crate::debug::names::{Modules, PASSES, component, full_name, pass_of, trace_name};
use crate::debug::nan::{around, listed};
use crate::debug::sums::{
    Collected, DETAIL, MODULE_TRACE_NAMES, MODULE_TRACE_STATS, Sum, detail_line, model_lines, module_line,
    trace_record, traced,
};

/// What is done with one value.
pub(super) struct Interest {
    component: &'static str,
    full: String,
    /// Path of the module that it is the output of.
    module: Option<String>,
    captures: bool,
    sums_module: bool,
    traces: bool,
    details: bool,
    /// Whether it belongs to the lines of sums of stages, models and text.
    collects: bool,
}

impl Interest {
    pub fn is_any(&self) -> bool {
        self.captures || self.sums_module || self.traces || self.details || self.collects
    }
}

impl State {
    /// What follows is about `plan`.
    pub(super) fn attach(&mut self, plan: &Plan, weights: &WeightFiles) -> Result<()> {
        let hash = match self.about.hash {
            Some(hash) => short(&hash),
            None => short(&container::hash(&container::encode(plan)?)),
        };
        match self.logs.is_open {
            false => self.logs = Logs::open(&self.options, &header(plan, &hash, &self.options, &self.about))?,
            true => self.logs.comment(&format!("plan={hash}"))?,
        }
        if self.options.model_sums.is_some() {
            self.logs.patchify = patchify_sums(plan, weights);
        }
        (self.plan, self.modules) = (Some(plan.clone()), Modules::of(plan));
        self.values.clear();
        self.seen.clear();
        Ok(())
    }

    pub(super) fn component(&self, program: &Program) -> &'static str {
        self.plan.as_ref().map_or("transformer", |plan| component(plan, program))
    }

    pub(super) fn wants(&self, program: &Program, value: &Value) -> bool {
        self.options.check_nan || self.interest(program, value).is_any()
    }

    pub(super) fn interest(&self, program: &Program, value: &Value) -> Interest {
        let component = self.component(program);
        let full = full_name(component, &value.name);
        let is_inner = value.role == Role::Inner && value.is_named();
        let module = is_inner.then(|| self.modules.path(component, &value.name)).flatten();
        // Names of modules as their lines have them.
        let shown = module.as_ref().map(|module| full_name(component, module)).unwrap_or_default();
        let has = |parts: &[String]| parts.iter().any(|part| shown.contains(part.as_str()));
        let is_chosen = (self.options.module_include.is_empty() || has(&self.options.module_include))
            && !has(&self.options.module_exclude);
        Interest {
            captures: self.options.captures(&full),
            sums_module: self.logs.module_sums.is_some() && module.is_some() && is_chosen,
            traces: self.logs.trace.is_some() && module.is_some(),
            details: self.logs.model_detail.is_some()
                && component == "transformer"
                && is_inner
                && is_detail(&value.name),
            collects: self.collects(component, value),
            component,
            full,
            module,
        }
    }

    fn collects(&self, component: &str, value: &Value) -> bool {
        let name = value.name.as_str();
        match component {
            "connectors" => {
                value.role == Role::Output && (self.logs.stage_sums.is_some() || self.logs.model_sums.is_some())
            }
            "text_encoder" => {
                let is_state = self.logs.gemma.is_some() && hidden_state(name).is_some();
                let is_feature = self.logs.model_sums.is_some() && ["features_video", "features_audio"].contains(&name);
                let is_valid = value.role == Role::Input && name == "valid";
                is_state || is_feature || (is_valid && (self.logs.gemma.is_some() || self.logs.model_sums.is_some()))
            }
            "transformer" if self.logs.model_sums.is_some() => {
                let name = pass_of(name).1;
                let is_block = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
                let is_block = is_block.is_some_and(|(_, last)| ["video", "audio"].contains(&last));
                value.role == Role::Input || (value.role == Role::Inner && (is_block || name.starts_with("prep.")))
            }
            _ => false,
        }
    }

    pub(super) fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
        let interest = self.interest(program, value);
        let values = decoded(&value.ty, bytes);
        let stats = Stats::of_typed(value.ty.clone(), &values);
        let step = self.step();
        if self.options.check_nan {
            self.check(&interest.full, value, &stats, &values)?;
        }
        if interest.captures {
            self.capture(&interest.full, value, bytes, &stats)?;
        }
        if let Some(module) = &interest.module {
            if interest.sums_module
                && let Some(sink) = &mut self.logs.module_sums
            {
                match self.options.module_format {
                    ModuleFormat::Ltxc => sink.line(&module_line(interest.component, module, &stats), step, None)?,
                    ModuleFormat::FastvideoTrace => {
                        let name = trace_name(MODULE_TRACE_NAMES, interest.component, module);
                        sink.object(&trace_record(&name, step, &stats, &MODULE_TRACE_STATS.map(String::from)))?;
                    }
                }
            }
            if interest.traces
                && let (Some(sink), Some(trace)) = (&mut self.logs.trace, &self.options.trace)
                && let Some(name) = traced(trace, interest.component, module, step)
            {
                sink.object(&trace_record(&name, step, &stats, &trace.stats))?;
            }
        }
        if interest.details
            && let (Some(sink), Some(line)) = (&mut self.logs.model_detail, detail_line(&value.name, &stats))
        {
            sink.line(&line, step, Some(pass_of(&value.name).0))?;
        }
        if interest.collects {
            self.collect(interest.component, value, stats, values)?;
        }
        Ok(())
    }

    /// Stops at the first value that is not finite.
    fn check(&mut self, full: &str, value: &Value, stats: &Stats, values: &[f32]) -> Result<(), RunError> {
        if !stats.is_bad() {
            self.seen.insert(value.name.clone(), stats.clone());
            return Ok(());
        }
        let inputs: Vec<String> = (value.reads.iter())
            .filter_map(|name| Some((name, self.seen.get(name)?)))
            .map(|(name, s)| format!("`{name}` mean {:.4} std {:.4} [{:.4}, {:.4}]", s.mean, s.std, s.min, s.max))
            .collect();
        let from = if inputs.is_empty() { String::new() } else { format!(" (computed from {})", inputs.join(", ")) };
        let what = format!("`{full}`, the first such value{from},");
        let (at, beside) = around(values, stats.first_bad.unwrap_or(0));
        let problem = format!(
            "NaN in {} and infinite in {} of {} values, first at {} (values from {at} on: {})",
            stats.nan,
            stats.infinite,
            stats.ty.elements(),
            stats.first_bad.unwrap_or(0),
            listed(&beside)
        );
        if self.stages().is_empty() {
            // Single graphs have no stages and no driver that could go on.
            return Err(RunError::Input(format!("{what} is {problem}")));
        }
        let stage = if self.stage.is_empty() { "start".into() } else { self.stage.clone() };
        Err(RunError::BadNumerics { stage, step: self.done + 1, what, problem })
    }

    fn capture(&mut self, full: &str, value: &Value, bytes: &[u8], stats: &Stats) -> Result<(), RunError> {
        let at = match self.step() {
            Some(step) => format!("{full}@{}.step{step}", self.stage),
            None => full.to_string(),
        };
        let count = self.names.entry(at.clone()).or_insert(0);
        *count += 1;
        if let Some(sink) = &mut self.logs.taps {
            let line = Line::new(format!("tap={at}"))
                .sum("sum", stats)
                .number("abs_mean", stats.abs_mean)
                .number("std", stats.std)
                .field("shape", Field::Shape(stats.ty.shape.clone()));
            return sink.line(&line, None, None);
        }
        let name = if *count > 1 { format!("{at}#{count}") } else { at };
        self.captured.push((name, value.ty.clone(), bytes.to_vec()));
        Ok(())
    }

    fn collect(&mut self, component: &str, value: &Value, stats: Stats, values: Vec<f32>) -> Result<(), RunError> {
        match component {
            "connectors" => {
                let (field, key) = match value.name.as_str() {
                    "video_context" => ("prompt_embeds", "gemma_video_encoding"),
                    _ => ("ltx2_audio_prompt_embeds", "gemma_audio_encoding"),
                };
                // The second prompt of a guided run is the negative one.
                let field = match (self.done > 0, field) {
                    (false, field) => field,
                    (true, "prompt_embeds") => "negative_prompt_embeds",
                    (true, _) => "ltx2_audio_negative_embeds",
                };
                let stage = self.sums.entry("LTX2TextEncodingStage".into()).or_default();
                stage.add(field, Sum::from_stats(&stats));
                if let Some(sink) = &mut self.logs.model_sums {
                    let shape = Field::Shape(stats.ty.shape.clone());
                    sink.line(&Line::new(key).sum("sum", &stats).field("shape", shape), None, None)?;
                }
            }
            "text_encoder" if value.role == Role::Input => {
                self.valid = values.iter().filter(|&&v| v > 0.0).count();
            }
            "text_encoder" => {
                // Only the rows of real tokens mean something; they are the last ones.
                let rows = value.ty.shape.iter().rev().nth(1).copied().unwrap_or(1).max(1);
                let width = values.len() / rows;
                let real = &values[(rows - self.valid.min(rows)) * width..];
                let stats = Stats::of(&[1, self.valid.min(rows), width], real);
                let shape = Field::Shape(stats.ty.shape.clone());
                match hidden_state(&value.name) {
                    Some(i) => {
                        self.write_pending(Some(i))?;
                        self.pending = Some((i, stats));
                    }
                    None => {
                        if let Some(sink) = &mut self.logs.model_sums {
                            let line = Line::new("gemma_feature").sum("sum", &stats).field("shape", shape);
                            sink.line(&line, None, None)?;
                        }
                    }
                }
            }
            _ => drop(self.values.insert(value.name.clone(), Collected { stats, values })),
        }
        Ok(())
    }

    /// Writes the line of the last hidden state, unless it is replaced by another one of the same number.
    fn write_pending(&mut self, next: Option<usize>) -> Result<(), RunError> {
        let Some((i, stats)) = self.pending.take() else { return Ok(()) };
        let Some(sink) = self.logs.gemma.as_mut().filter(|_| next != Some(i)) else { return Ok(()) };
        self.stack += Sum::from_stats(&stats);
        sink.line(&Line::new(format!("gemma_hidden_state_{i}")).sum("sum", &stats), None, None)
    }

    pub(super) fn end(&mut self, program: &Program) -> Result<(), RunError> {
        if let Some(profile) = &mut self.profile {
            profile.end(program);
        }
        if self.component(program) == "text_encoder" && self.logs.gemma.is_some() {
            self.write_pending(None)?;
            let line = Line::new("gemma_hidden_states_stack").field("sum", std::mem::take(&mut self.stack).field());
            if let Some(sink) = &mut self.logs.gemma {
                sink.line(&line, None, None)?;
            }
        }
        if self.component(program) != "transformer" || program.rate != Rate::Step {
            return Ok(());
        }
        let step = self.step();
        // Samplers that evaluate the model more than once a step do so under the same names.
        let again = if self.evaluations > 0 { format!("{}", self.evaluations + 1) } else { String::new() };
        self.evaluations += 1;
        let has = |prefix: &str| prefix.is_empty() || self.values.keys().any(|k| k.starts_with(prefix));
        if let Some(sink) = &mut self.logs.model_sums {
            for (prefix, name) in PASSES.into_iter().filter(|(prefix, _)| has(prefix)) {
                let pass = format!("{name}{again}");
                sink.comment(&format!("step={} pass={pass}", step.unwrap_or(0)))?;
                for line in model_lines(&self.values, prefix, self.logs.patchify) {
                    sink.line(&line, step, Some(&pass))?;
                }
            }
        }
        if let Some(sink) = &mut self.logs.model_detail {
            sink.comment(&format!("end of step={}{again}", step.unwrap_or(0)))?;
        }
        Ok(())
    }
}

fn is_detail(path: &str) -> bool {
    let path = pass_of(path).1;
    let last = path.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')).map(|(_, name)| name);
    last.is_some_and(|name| DETAIL.contains(&name)) || ["proj_out", "audio_proj_out"].contains(&path)
}

/// The number of a hidden state of the text encoder: 0 are the scaled embeddings, the last one is behind the final norm.
fn hidden_state(path: &str) -> Option<usize> {
    let layer = path.strip_prefix("layers.").and_then(|n| n.parse::<usize>().ok()).map(|n| n + 1);
    layer.or_else(|| path.strip_prefix("hidden_states.").and_then(|n| n.parse().ok()))
}
