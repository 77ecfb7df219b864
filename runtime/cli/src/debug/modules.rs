//! Running one graph with given arguments and keeping every named value: what the commands that look into a model share.
//!
//! Their arguments are a [`Side`], which opens the device and the logs; a [`Bench`] runs graphs on it, which commands let it
//! compile without fusion, so that every value is there.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result};
use clap::Args;
use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::{Pipeline, Plan, Program, TextSettings, WeightSource};
use ltxc_ir::{Module, Rate, TensorType};
use ltxc_runtime::RunError;
use ltxc_runtime::adapters::AdapterSet;
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::stats::decoded;
use ltxc_runtime::tap::{Role, Tap, Value};
use ltxc_runtime::tokenizer::CONTEXT_TOKENS;
use ltxc_runtime::weights::WeightFiles;

use super::flags::LogFlags;
use super::options::DebugOptions;
use super::session::{About, Session};
use crate::args::{DeviceChoice, ModelArgs};
use crate::compile::version;
use crate::job::pick;
use crate::run::INTERRUPT;

/// A model, what it runs on, and what is logged.
#[derive(Debug, Clone, Args)]
pub struct Side {
    /// Device.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceChoice,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub logs: LogFlags,
}

impl Side {
    /// Opens the device, and logs of graphs of `components`; shows both to `look`, and closes the logs. `seed` is that of
    /// what is drawn.
    ///
    /// # Errors
    /// A device that is not there, a log that no such graph can give, and those of `look`.
    pub fn look<T>(
        &self,
        components: &[&str],
        seed: Option<u64>,
        look: impl FnOnce(&Device, &Session) -> Result<T>,
    ) -> Result<T> {
        let options = DebugOptions::of_graphs(&self.logs)?.only(components)?;
        let device = pick(&self.device, None)?;
        let session = Session::new(options, About { device: device.name.to_string(), seed, ..About::default() });
        let found = look(&device, &session)?;
        session.close()?;
        Ok(found)
    }
}

/// A value of a run.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Name path in the program.
    pub name: String,
    /// Type, as the program stores it.
    pub ty: TensorType,
    /// Values.
    pub values: Vec<f32>,
}

/// What a run of one graph gave.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    /// Results of the entry.
    pub results: BTreeMap<String, Kept>,
    /// Named values inside, in the order in which they were computed. A name may stand several times.
    pub values: Vec<Kept>,
}

impl Ran {
    /// The last value called `name`.
    pub fn value(&self, name: &str) -> Option<&Kept> {
        self.values.iter().rev().find(|v| v.name == name)
    }

    /// The result called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn result(&self, name: &str) -> Result<&Kept> {
        self.results.get(name).with_context(|| format!("the program gave no `{name}`"))
    }
}

/// Where weights are and what runs on them.
pub struct Bench<'a> {
    /// Weight sources of plans.
    pub sources: Vec<WeightSource>,
    /// Files behind them, or folders of them.
    pub paths: Vec<PathBuf>,
    /// Options of the compiler.
    pub options: Options,
    /// What runs.
    pub device: &'a Device,
    /// What is logged.
    pub session: &'a Session,
}

impl Bench<'_> {
    /// Compiles `entry` of a module of `component`, runs it, and keeps every named value.
    ///
    /// `args` are the values of the parameters, in their order.
    ///
    /// # Errors
    /// A graph that does not compile, or a device that cannot run it.
    pub fn run(&self, component: &str, module: &Module, entry: &str, args: &[Tensor]) -> Result<Ran> {
        self.run_keeping(component, module, entry, args, &|_| true)
    }

    /// The same, keeping only the values inside whose names `keep` wants.
    ///
    /// # Errors
    /// Those of [`Bench::run`].
    pub fn run_keeping(
        &self,
        component: &str,
        module: &Module,
        entry: &str,
        args: &[Tensor],
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<Ran> {
        self.run_with(component, module, entry, args, AdapterSet::default(), keep)
    }

    /// As [`Bench::run`], with adapters, keeping only the values inside whose names `keep` wants.
    ///
    /// # Errors
    /// As for [`Bench::run`], and adapters that do not fit.
    pub fn run_with(
        &self,
        component: &str,
        module: &Module,
        entry: &str,
        args: &[Tensor],
        adapters: AdapterSet,
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<Ran> {
        let target = self.device.target.clone();
        let mut builder = PlanBuilder::new(&version(), target, self.options.clone(), self.sources.clone());
        builder.add(component, component, module, entry)?;
        let text = TextSettings { length: CONTEXT_TOKENS as u32, ..TextSettings::default() };
        let plan = builder.finish(Pipeline { text, ..Pipeline::default() })?;
        let function = module.function(entry).with_context(|| format!("the module has no `{entry}`"))?;
        let named: BTreeMap<&str, &Tensor> =
            function.params.iter().map(|p| function.name_of(p.value)).zip(args).collect();
        let mut ran = self.run_plan(&plan, &named, adapters, keep)?;
        ran.results.retain(|name, _| function.results.iter().any(|r| r.name == *name));
        Ok(ran)
    }

    fn run_plan(
        &self,
        plan: &Plan,
        args: &BTreeMap<&str, &Tensor>,
        adapters: AdapterSet,
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<Ran> {
        let weights = WeightFiles::open(plan, &self.paths, false)?;
        let kept = Rc::new(RefCell::new(Vec::new()));
        let mut executor = Executor::on(open(self.device)?, plan, &weights, &INTERRUPT)?;
        let keep = Keep { kept: kept.clone(), wants: keep };
        executor.set_tap(self.session.tap(plan, &weights, Some(Box::new(keep)))?)?;
        executor.set_adapters(adapters)?;
        let mut results = BTreeMap::new();
        for rate in [Rate::Generation, Rate::Evaluation, Rate::Step] {
            for program in plan.programs.iter().filter(|p| p.rate == rate) {
                for slot in &program.inputs {
                    if let Some(value) = args.get(slot.name.as_str()) {
                        executor.write(&program.name, &slot.name, &value.to_bytes())?;
                    }
                }
                executor.run(&program.name)?;
                for slot in &program.outputs {
                    let bytes = executor.read_bytes(&program.name, &slot.name)?;
                    let values = decoded(&slot.ty, &bytes);
                    // What is kept for faster programs has the shape of the graph, not that in which it was computed.
                    if let Some(known) = kept.borrow_mut().iter_mut().rev().find(|k: &&mut Kept| k.name == slot.name) {
                        known.ty = slot.ty.clone();
                    }
                    results.insert(slot.name.clone(), Kept { name: slot.name.clone(), ty: slot.ty.clone(), values });
                }
            }
        }
        drop(executor);
        let values = kept.take();
        Ok(Ran { results, values })
    }
}

/// Keeps named values.
struct Keep<'k> {
    kept: Rc<RefCell<Vec<Kept>>>,
    wants: &'k dyn Fn(&str) -> bool,
}

impl Tap for Keep<'_> {
    fn wants(&mut self, _: &Program, value: &Value) -> bool {
        value.role == Role::Inner && value.is_named() && (self.wants)(&value.name)
    }

    fn value(&mut self, _: &Program, value: &Value, bytes: &[u8]) -> Result<(), RunError> {
        let values = decoded(&value.ty, bytes);
        self.kept.borrow_mut().push(Kept { name: value.name.clone(), ty: value.ty.clone(), values });
        Ok(())
    }
}
