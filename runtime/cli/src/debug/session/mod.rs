//! What is collected while programs run, and written as it comes: the one place where logs hook into a command.
//!
//! A session listens in two places: to the events of the driver (stages, steps, latents), and through a [`Tap`] to values
//! of programs. Both write into the same state, behind a cell, because the run holds both. A command has one session, off or
//! on, and gives it every plan that it runs, one after the other: a pipeline is one plan, a command that looks at parts of a
//! model has one for every graph.
//!
//! | file | what |
//! | --- | --- |
//! | `events` | where the run is, and sums after stages |
//! | `values` | what is wanted of values of programs, and written about them |
//! | `logs` | the logs themselves, and their headers |

mod events;
mod logs;
mod values;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use ltxc_ir::TensorType;
use ltxc_ir::plan::{Plan, Program};
use ltxc_runtime::RunError;
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::pipeline::{Event, Observer};
use ltxc_runtime::stats::Stats;
use ltxc_runtime::tap::{CallInfo, Tap, Value};
use ltxc_runtime::weights::WeightFiles;

use self::logs::{Logs, write_captured};
use super::flags::DebugMode;
use super::log::Sink;
use super::names::Modules;
use super::options::DebugOptions;
use super::profile::Profile;
use super::sums::{StageSums, Sum, Values};
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
