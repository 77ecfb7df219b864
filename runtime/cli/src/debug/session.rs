//! What is collected while programs run, and written as it comes: the one place where logs hook into a command.
//!
//! A session listens in two places: to the events of the driver (stages, steps, latents), and through a [`Tap`] to values
//! of programs. Both write into the same state, behind a cell, because the run holds both. A command has one session, off or
//! on, and gives it every plan that it runs, one after the other: a pipeline is one plan, a command that looks at parts of a
//! model has one for every graph.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use ltxc_ir::plan::{Plan, Program, Stage, StageAdapter, container};
use ltxc_ir::{DType, Rate, TensorType};
use ltxc_runtime::RunError;
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::pipeline::{Event, Observer, tile_of};
use ltxc_runtime::stats::{Stats, decoded};
use ltxc_runtime::tap::{CallInfo, Role, Tap, Value};
use ltxc_runtime::weights::WeightFiles;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::denoising::{around, listed};
use super::flags::{DebugMode, DebugOptions, LogFormat, LogPrefix, ModuleFormat};
use super::log::{Field, Line, Sink};
use super::names::{Modules, PASSES, component, full_name, pass_of};
use super::profile::Profile;
use super::sums::{
    Collected, DETAIL, MODULE_TRACE_NAMES, MODULE_TRACE_STATS, StageSums, Sum, Values, detail_line, model_lines,
    module_line, trace_record, traced,
};
use crate::report::remark;

/// Collects and writes what [`DebugOptions`] ask for; nothing, if they ask for nothing.
#[derive(Clone, Default)]
pub struct Session {
    state: Option<Rc<RefCell<State>>>,
}

#[derive(Default)]
struct State {
    options: DebugOptions,
    about: About,
    /// What runs, once something does.
    plan: Option<Plan>,
    modules: Modules,
    logs: Logs,
    profile: Option<Profile>,
    /// Name of the stage that runs or of its tile, its number of steps, and how many of them are done.
    stage: String,
    steps: usize,
    done: usize,
    /// How often the transformer has run in this step.
    evaluations: usize,
    sums: BTreeMap<String, StageSums>,
    /// All sums so far.
    batch: StageSums,
    values: Values,
    /// How many real tokens the prompt has.
    valid: usize,
    /// The last layer's state, which is none of the hidden states if nothing but the final norm follows; and the sum of all.
    pending: Option<(usize, Stats)>,
    stack: Sum,
    captured: Vec<(String, TensorType, Vec<u8>)>,
    /// How often each name was captured.
    names: BTreeMap<String, usize>,
    /// What is known of values that others read, for reports of the first bad one.
    seen: BTreeMap<String, Stats>,
    /// The first line that could not be written.
    failure: Option<RunError>,
}

/// The logs of a session, opened when the first plan is known.
#[derive(Default)]
struct Logs {
    is_open: bool,
    /// Sums of the patchify weights, for logs of the transformer.
    patchify: Option<[Sum; 4]>,
    stage_sums: Option<Sink>,
    model_sums: Option<Sink>,
    model_detail: Option<Sink>,
    gemma: Option<Sink>,
    module_sums: Option<Sink>,
    trace: Option<Sink>,
    taps: Option<Sink>,
}

/// What headers of logs say of a run, besides its plan.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// Hash of the file of the plan; of the plan itself, if it is in no file.
    pub hash: Option<[u8; 32]>,
    /// Name of the device.
    pub device: String,
    /// Seed, if anything is drawn.
    pub seed: Option<u64>,
    /// Files of noise, by slot.
    pub noise: BTreeMap<String, PathBuf>,
    /// Whether decoders add no noise to latents.
    pub spares_decoders: bool,
    /// Experiments of the run.
    pub experiments: Vec<String>,
    /// Which of several runs of a command it is.
    pub run: Option<String>,
}

impl Session {
    /// A session for what was asked for. No file is opened before something runs.
    pub fn new(options: DebugOptions, about: About) -> Session {
        let profile = options.profile.is_some().then(Profile::default);
        let is_on = options.is_on();
        let state = || Rc::new(RefCell::new(State { options, about, profile, ..State::default() }));
        Session { state: is_on.then(state) }
    }

    /// The tap of an executor that runs `plan`: that of the session, with `own` in front of it. `None` if nobody looks.
    /// The first plan opens the logs, each further one is a comment in them.
    ///
    /// # Errors
    /// A log that cannot be written.
    pub fn tap<'a>(
        &self,
        plan: &Plan,
        weights: &WeightFiles,
        own: Option<Box<dyn Tap + 'a>>,
    ) -> Result<Option<Box<dyn Tap + 'a>>> {
        let Some(state) = &self.state else { return Ok(own) };
        state.borrow_mut().attach(plan, weights)?;
        Ok(Some(Box::new(SessionTap { state: state.clone(), own })))
    }

    /// An observer that tells the session of everything, and then `next`.
    pub fn observer<'o>(&'o self, next: &'o mut dyn Observer) -> Watched<'o> {
        Watched { session: self, next }
    }

    /// Says in all logs what comes next, for commands that run the same more than once.
    ///
    /// # Errors
    /// A log that cannot be written.
    pub fn next_run(&self, name: &str) -> Result<()> {
        let Some(state) = &self.state else { return Ok(()) };
        let mut state = state.borrow_mut();
        state.about.run = Some(name.into());
        Ok(state.logs.comment(&format!("run={name}"))?)
    }

    /// [`Session::finish`] of a command that has no report: tells the user at once.
    ///
    /// # Errors
    /// Those of [`Session::finish`].
    pub fn close(&self) -> Result<()> {
        self.finish()?.iter().for_each(|note| remark(note));
        Ok(())
    }

    /// Writes what is written in the end, and returns what to tell the user about it.
    ///
    /// # Errors
    /// The first line or file that could not be written.
    pub fn finish(&self) -> Result<Vec<String>> {
        let Some(state) = &self.state else { return Ok(Vec::new()) };
        let mut state = state.borrow_mut();
        // Parts of a run that no other part follows.
        for stage in state.sums.keys().cloned().collect::<Vec<_>>() {
            state.flush(&stage);
        }
        if let Some(failure) = state.failure.take() {
            return Err(failure.into());
        }
        state.logs.all().try_for_each(Sink::finish)?;
        let mut notes = Vec::new();
        if let Some(path) = &state.options.tap_path {
            write_captured(path, &state.captured)?;
            notes.push(format!("{} captured values in `{}`", state.captured.len(), path.display()));
        }
        if state.names.is_empty() && state.options.captures_any() {
            let hint = match state.options.mode {
                Some(DebugMode::Exact) => "",
                _ => "; values inside fused kernels need `--debug-mode exact`",
            };
            let dump = state.options.dump.iter().map(|dump| dump.as_str().to_string());
            let wanted: Vec<String> = state.options.tap.include.iter().cloned().chain(dump).collect();
            notes.push(format!("no value has a name like `{}`{hint}", wanted.join("`, `")));
        }
        let is_empty = |sink: &Option<Sink>| sink.as_ref().is_some_and(|sink| sink.lines() == 0);
        if is_empty(&state.logs.module_sums) || is_empty(&state.logs.trace) {
            notes.push("no module that owns weights has such a name; `--tap '*'` shows the names of all values".into());
        }
        if let (Some(path), Some(profile)) = (&state.options.profile, &state.profile) {
            write_atomically(path, profile.to_json().to_string().as_bytes())?;
            notes.push(format!("profile in `{}`; open it at https://ui.perfetto.dev", path.display()));
        }
        Ok(notes)
    }
}

impl Logs {
    /// Opens what is wanted.
    fn open(options: &DebugOptions, header: &str) -> Result<Logs, RunError> {
        let open = |wanted: &Option<Option<PathBuf>>| -> Result<Option<Sink>, RunError> {
            let Some(path) = wanted else { return Ok(None) };
            let sink = Sink::open(path.as_deref(), options.format, options.prefix, options.append, header)?;
            Ok(Some(sink.with_f64(options.has_f64)))
        };
        let open_json =
            |path: Option<&Path>| Sink::open(path, LogFormat::Jsonl, options.prefix, options.append, header);
        let module_sums = match (&options.module_sums, options.module_format) {
            (Some(path), ModuleFormat::FastvideoTrace) => Some(open_json(path.as_deref())?),
            (wanted, _) => open(wanted)?,
        };
        let prints_taps = options.captures_any() && options.tap_path.is_none();
        Ok(Logs {
            is_open: true,
            patchify: None,
            stage_sums: open(&options.stage_sums)?,
            model_sums: open(&options.model_sums)?,
            model_detail: open(&options.model_detail)?,
            gemma: open(&options.gemma)?,
            module_sums,
            trace: options.trace.as_ref().map(|t| open_json(t.output.as_deref())).transpose()?,
            taps: open(&prints_taps.then_some(None))?,
        })
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Sink> {
        let (sums, detail, gemma) = (&mut self.model_sums, &mut self.model_detail, &mut self.gemma);
        [&mut self.stage_sums, sums, detail, gemma, &mut self.module_sums, &mut self.trace, &mut self.taps]
            .into_iter()
            .flatten()
    }

    fn comment(&mut self, text: &str) -> Result<(), RunError> {
        self.all().try_for_each(|sink| sink.comment(text))
    }
}

/// The beginning of the hash of a plan.
fn short(hash: &[u8; 32]) -> String {
    hash.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

fn header(plan: &Plan, hash: &str, options: &DebugOptions, about: &About) -> String {
    let mode = match options.mode.unwrap_or_default() {
        DebugMode::Fused => "fused",
        DebugMode::Exact => "exact",
    };
    let noise: Vec<String> = (about.noise.iter())
        .map(|(slot, path)| {
            let content = std::fs::read(path).map(|b| blake3::hash(&b).to_hex()[..16].to_string());
            format!(" noise.{slot}={}", content.unwrap_or_else(|_| "new".into()))
        })
        .collect();
    let seed = about.seed.map_or("none".into(), |seed| seed.to_string());
    let decoder_noise = if about.spares_decoders { "off" } else { "on" };
    let mut header = format!(
        "{} plan={hash} device={} dtype={} seed={seed} mode={mode} attention=plain fused_attention=off text_padding={} \
         decoder_noise={decoder_noise}{}",
        plan.compiler,
        about.device,
        plan.pipeline.dtype,
        plan.pipeline.text.length,
        noise.concat()
    );
    if !about.experiments.is_empty() {
        header += &format!(" experiments={}", about.experiments.join(","));
    }
    about.run.iter().for_each(|run| header += &format!(" run={run}"));
    header
}

/// Sums of weights and biases of both patchify projections.
fn patchify_sums(plan: &Plan, weights: &WeightFiles) -> Option<[Sum; 4]> {
    let tensors = || plan.functions.iter().flat_map(|f| &f.weights).flat_map(|w| w.origin.tensors());
    let sum = |name: &str| {
        let tensor = tensors().find(|t| t.key.ends_with(&format!("diffusion_model.{name}")))?;
        let weight = weights.tensor(tensor, &tensor.key).ok()?;
        Some(Sum::of(&decoded(&tensor.ty, weight.bytes())))
    };
    Some([
        sum("patchify_proj.weight")?,
        sum("patchify_proj.bias")?,
        sum("audio_patchify_proj.weight")?,
        sum("audio_patchify_proj.bias")?,
    ])
}

/// Passes events on to the session and to another observer.
pub struct Watched<'o> {
    session: &'o Session,
    next: &'o mut dyn Observer,
}

impl Observer for Watched<'_> {
    fn event(&mut self, event: Event<'_>) {
        if let Some(state) = &self.session.state {
            state.borrow_mut().event(&event);
        }
        self.next.event(event);
    }
}

/// The tap of a session, and in front of it that of the command.
struct SessionTap<'a> {
    state: Rc<RefCell<State>>,
    own: Option<Box<dyn Tap + 'a>>,
}

impl Tap for SessionTap<'_> {
    fn wants(&mut self, program: &Program, value: &Value) -> bool {
        let own = self.own.as_mut().is_some_and(|own| own.wants(program, value));
        self.state.borrow().wants(program, value) || own
    }

    fn begin(&mut self, program: &Program) {
        if let Some(profile) = &mut self.state.borrow_mut().profile {
            profile.begin(program);
        }
        self.own.iter_mut().for_each(|own| own.begin(program));
    }

    fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
        if let Some(own) = &mut self.own
            && own.wants(program, value)
        {
            own.value(program, value, bytes)?;
        }
        let mut state = self.state.borrow_mut();
        if state.wants(program, value) { state.value(program, value, bytes) } else { Ok(()) }
    }

    fn skips_finite(&self, program: &Program, value: &Value) -> bool {
        // Where nothing but the first bad value is wanted.
        !self.state.borrow().interest(program, value).is_any()
            && self.own.as_ref().is_none_or(|own| own.skips_finite(program, value))
    }

    fn finite(&mut self, program: &Program, value: &Value) {
        self.own.iter_mut().for_each(|own| own.finite(program, value));
    }

    fn end(&mut self, program: &Program) -> Result<(), RunError> {
        self.state.borrow_mut().end(program)?;
        self.own.iter_mut().try_for_each(|own| own.end(program))
    }

    fn times_calls(&self) -> bool {
        self.state.borrow().profile.is_some() || self.own.as_ref().is_some_and(|own| own.times_calls())
    }

    fn called(&mut self, program: &Program, call: &CallInfo, elapsed: Duration) {
        if let Some(profile) = &mut self.state.borrow_mut().profile {
            profile.called(program, call, elapsed);
        }
        self.own.iter_mut().for_each(|own| own.called(program, call, elapsed));
    }

    fn loaded(&mut self, program: &Program, elapsed: Duration) {
        let state = &mut *self.state.borrow_mut();
        if let (Some(profile), Some(plan)) = (&mut state.profile, &state.plan) {
            profile.loaded(plan, program, elapsed);
        }
        self.own.iter_mut().for_each(|own| own.loaded(program, elapsed));
    }
}

/// What is done with one value.
struct Interest {
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
    fn is_any(&self) -> bool {
        self.captures || self.sums_module || self.traces || self.details || self.collects
    }
}

impl State {
    /// What follows is about `plan`.
    fn attach(&mut self, plan: &Plan, weights: &WeightFiles) -> Result<()> {
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

    fn component(&self, program: &Program) -> &'static str {
        self.plan.as_ref().map_or("transformer", |plan| component(plan, program))
    }

    /// Stages of the pipeline that runs; single graphs have none.
    fn stages(&self) -> &[Stage] {
        self.plan.as_ref().map_or(&[], |plan| &plan.pipeline.stages)
    }

    fn wants(&self, program: &Program, value: &Value) -> bool {
        self.options.check_nan || self.interest(program, value).is_any()
    }

    fn interest(&self, program: &Program, value: &Value) -> Interest {
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

    /// The step that runs, from 0, in stages that have steps of the model.
    fn step(&self) -> Option<usize> {
        self.is_denoised(&self.stage).then_some(self.done)
    }

    /// Whether a part of a run is a stage of denoising, or a tile of one.
    fn is_denoised(&self, name: &str) -> bool {
        self.stages().iter().any(|s| s.name == stage_of(name))
    }

    fn value(&mut self, program: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
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
                        let name = super::names::trace_name(MODULE_TRACE_NAMES, interest.component, module);
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

    fn end(&mut self, program: &Program) -> Result<(), RunError> {
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

    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Stage { name, steps } => {
                self.stage_begins(name);
                (self.stage, self.steps, self.done, self.evaluations) = (name.to_string(), *steps, 0, 0);
                self.values.clear();
            }
            Event::Step { index, .. } => {
                (self.done, self.evaluations) = (*index, 0);
                self.step_ended();
            }
            Event::Tensor { name, values } => self.tensor(name, values),
            Event::Note(_) => {}
        }
    }

    fn tensor(&mut self, name: &str, values: &[f32]) {
        if self.logs.stage_sums.is_none() {
            return;
        }
        let sum = || Sum::of(values);
        let tile = tile_of_tensor(name);
        let parts: Vec<&str> = tile.as_deref().unwrap_or(name).split('.').collect();
        let side = |modality: &str, main: &str, audio: &str| {
            if modality == "video" { main.to_string() } else { audio.to_string() }
        };
        match parts[..] {
            ["final", "frames"] => {
                let shown: Vec<f32> = values.iter().map(|v| ((v + 1.0) * 0.5).clamp(0.0, 1.0)).collect();
                self.sums.entry("DecodingStage".into()).or_default().add("output", Sum::of(&shown));
            }
            ["final", "waveform"] => {
                self.sums.entry("LTX2AudioDecodingStage".into()).or_default().add("audio", sum());
            }
            // Of a stage in tiles the whole is listed, in front of them.
            [_, _, "initial_latent"] if tile.is_some() => {}
            // Of a pipeline that upscales a clip.
            ["clip", "latent"] => self.listed("LTX2ClipEncodingStage", sum()),
            ["upsample", _, "latent"] => self.listed("LTX2UpsampleStage", sum()),
            [_, modality, "initial_latent"] => {
                let field = side(modality, "latents", "ltx2_audio_latents");
                self.sums.entry("LTX2UpsampleStage".into()).or_default().add(&field, sum());
            }
            [_, modality, what @ ("noised" | "clean_latent" | "denoise_mask")] => {
                let field = match what {
                    "noised" => side(modality, "latents", "ltx2_audio_latents"),
                    what => format!("ltx2_{modality}_{what}"),
                };
                self.sums.entry("LTX2LatentPreparationStage".into()).or_default().add(&field, sum());
            }
            [_, step, modality, "latent"] if step.starts_with("step") => {
                let field = side(modality, "latents", "ltx2_audio_latents");
                let sums = self.sums.entry("LTX2DenoisingStage".into()).or_default();
                if modality == "video" {
                    *sums = StageSums::default();
                }
                sums.add(&field, sum());
            }
            // What tiles are blended to.
            [_, "video", "latent"] => {
                self.enter_tile(None);
                self.listed("LTX2DenoisingStage", sum());
            }
            _ => {}
        }
    }

    /// Writes the line of a stage that is about one latent.
    fn listed(&mut self, stage: &str, sum: Sum) {
        self.sums.entry(stage.into()).or_default().add("latents", sum);
        self.flush(stage);
    }

    /// What was collected before a stage belongs to what is before it.
    fn stage_begins(&mut self, name: &str) {
        self.flush("LTX2TextEncodingStage");
        if self.is_denoised(name) {
            self.flush("LTX2UpsampleStage");
        }
        self.enter_tile(tile_of(name).map(|(_, tile)| tile));
        if self.is_denoised(name) {
            let is_first = self.stages().first().is_some_and(|s| s.name == stage_of(name));
            match is_first || self.options.prefix == LogPrefix::Ltxc {
                true => self.flush("LTX2LatentPreparationStage"),
                // FastVideo prepares the latents of a second stage as a part of upsampling.
                false => drop(self.sums.remove("LTX2LatentPreparationStage")),
            }
        }
        if name == "sound" {
            self.flush("DecodingStage");
        }
    }

    /// Says in all logs which tile lines are about.
    fn enter_tile(&mut self, tile: Option<usize>) {
        let Logs { stage_sums, model_sums, model_detail, module_sums, trace, .. } = &mut self.logs;
        let mut sinks = [stage_sums, model_sums, model_detail, module_sums, trace].into_iter().flatten();
        if let Err(e) = sinks.try_for_each(|sink| sink.enter_tile(tile)) {
            self.failure.get_or_insert(e);
        }
    }

    fn step_ended(&mut self) {
        if self.done < self.steps {
            return;
        }
        if self.step().is_some() {
            self.flush("LTX2DenoisingStage");
        }
        match self.stage.as_str() {
            "text" => self.flush("LTX2TextEncodingStage"),
            "sound" => self.flush("LTX2AudioDecodingStage"),
            _ => {}
        }
    }

    fn flush(&mut self, stage: &str) {
        let Some(sums) = self.sums.remove(stage) else { return };
        if self.options.prefix == LogPrefix::Ltxc {
            return self.write_stage(stage, &sums);
        }
        // FastVideo hands one batch from stage to stage, and prints all that it holds by then.
        let stages = self.stages();
        let (refines, has_lora) = (stages.len() > 1, stages.get(1).is_some_and(has_refine_lora));
        self.batch.update(sums);
        let batch = self.batch.clone();
        self.write_stage(stage, &batch);
        match stage {
            "LTX2TextEncodingStage" if refines => self.write_stage("LTX2RefineInitStage", &batch),
            "LTX2UpsampleStage" if has_lora => self.write_stage("LTX2RefineLoRAStage", &batch),
            _ => {}
        }
    }

    fn write_stage(&mut self, stage: &str, sums: &StageSums) {
        if let (Some(sink), Some(line)) = (&mut self.logs.stage_sums, sums.line(stage))
            && let Err(e) = sink.line(&line, None, None)
        {
            self.failure.get_or_insert(e);
        }
    }
}

/// The name of a stage, or of the stage of a tile.
fn stage_of(name: &str) -> &str {
    tile_of(name).map_or(name, |(stage, _)| stage)
}

/// The name that a tensor of a tile would have if its stage were whole; `None` for what is of no tile.
fn tile_of_tensor(name: &str) -> Option<String> {
    let (tile, tensor) = name.match_indices('.').find_map(|(at, _)| Some((tile_of(&name[..at])?, &name[at..])))?;
    Some(format!("{}{tensor}", tile.0))
}

/// Whether a second stage runs with a LoRA of its own, which FastVideo loads in a stage for that.
fn has_refine_lora(stage: &Stage) -> bool {
    stage.adapters.iter().any(|adapter| adapter.role == StageAdapter::DISTILLED)
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

fn write_captured(path: &Path, captured: &[(String, TensorType, Vec<u8>)]) -> Result<(), RunError> {
    let internal = |e: safetensors::SafeTensorError| RunError::Internal(e.to_string());
    let views = captured.iter().map(|(name, ty, bytes)| {
        let view = TensorView::new(stored_dtype(ty.dtype), ty.shape.clone(), bytes).map_err(internal)?;
        Ok((name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>, RunError>>()?;
    // The format sorts tensors; who compares them wants to know which came first.
    let names: Vec<&str> = captured.iter().map(|(name, ..)| name.as_str()).collect();
    let meta = HashMap::from([("meta".to_string(), json!({"order": names}).to_string())]);
    write_atomically(path, &safetensors::serialize(views, Some(meta)).map_err(internal)?)
}

/// The inverse of [`ltxc_runtime::weights::dtype_of`].
fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F8E4M3 => Dtype::F8_E4M3,
        DType::F8E5M2 => Dtype::F8_E5M2,
        DType::I8 => Dtype::I8,
        DType::U8 => Dtype::U8,
        DType::I32 => Dtype::I32,
        DType::U32 => Dtype::U32,
        DType::Bool => Dtype::BOOL,
    }
}
