//! Running one graph with given arguments and keeping every named value: what the commands that look into a model share.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result};
use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::{Pipeline, Plan, Program, WeightSource};
use ltxc_ir::{Module, Rate, TensorType};
use ltxc_runtime::RunError;
use ltxc_runtime::adapters::AdapterSet;
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::stats::decoded;
use ltxc_runtime::tap::{Role, Tap, Value};
use ltxc_runtime::weights::WeightFiles;

use crate::compile::version;
use crate::run::INTERRUPT;

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
}

impl Bench<'_> {
    /// Compiles `entry` of a module, runs it, and keeps every named value.
    ///
    /// `args` are the values of the parameters, in their order.
    ///
    /// # Errors
    /// A graph that does not compile, or a device that cannot run it.
    pub fn run(&self, module: &Module, entry: &str, args: &[Tensor]) -> Result<Ran> {
        self.run_keeping(module, entry, args, &|_| true)
    }

    /// The same, keeping only the values inside whose names `keep` wants.
    ///
    /// # Errors
    /// Those of [`Bench::run`].
    pub fn run_keeping(
        &self,
        module: &Module,
        entry: &str,
        args: &[Tensor],
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<Ran> {
        self.run_with(module, entry, args, AdapterSet::default(), keep)
    }

    /// As [`Bench::run`], with adapters, keeping only the values inside whose names `keep` wants.
    ///
    /// # Errors
    /// As for [`Bench::run`], and adapters that do not fit.
    pub fn run_with(
        &self,
        module: &Module,
        entry: &str,
        args: &[Tensor],
        adapters: AdapterSet,
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<Ran> {
        let target = self.device.target.clone();
        let mut builder = PlanBuilder::new(&version(), target, self.options.clone(), self.sources.clone());
        builder.add("main", "main", module, entry)?;
        let plan = builder.finish(Pipeline::default())?;
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
        executor.set_tap(Some(Box::new(Keep { kept: kept.clone(), wants: keep })))?;
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
                    let kept = Kept { name: slot.name.clone(), ty: slot.ty.clone(), values };
                    results.insert(slot.name.clone(), kept);
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
