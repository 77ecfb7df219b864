//! Running a module in a test: by the reference evaluator, and compiled for the CPU backend.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::eval::{Data, Evaluator, Tensor};
use ltxc_ir::plan::{ADAPTER_SLOTS, Pipeline, Plan, Target, WeightSource, container};
use ltxc_ir::{DType, Module, Rate, TensorType};
use ltxc_models::checkpoint::WeightFile;
use ltxc_runtime::adapters::AdapterSet;
use ltxc_runtime::backend::{Device, DeviceName, find, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::weights::WeightFiles;

use crate::compare::relative_l2;
use crate::fixtures::TensorFile;

/// Weight sources of a test: the name that graphs use, and the file behind it.
pub type Sources<'a> = &'a [(&'a str, &'a TensorFile)];

/// Results of a run by name, and every named value by its full path.
pub struct Run {
    /// Results of the entry function, as the compiled plan gives them.
    pub results: BTreeMap<String, Tensor>,
    /// Named values inside, as the evaluator gives them.
    pub taps: BTreeMap<String, Tensor>,
}

/// Largest relative L2 distance between evaluator and compiled plan in f32: the limit of a component against the
/// reference, which both must meet.
const LIMIT_F32: f64 = 1e-5;

/// Runs `entry` with the reference evaluator and as a compiled plan, which must agree.
///
/// Activations narrower than f32 are rounded at other places by the plan than by the evaluator; `LIMIT_F32` then has no
/// meaning, and only the evaluator runs. Bounds for bf16 come from [`crate::rounding`].
///
/// # Panics
/// If arguments or weights do not fit, or the two differ.
#[track_caller]
pub fn evaluate(module: &Module, entry: &str, args: &[Tensor], sources: Sources<'_>) -> Run {
    let mut run = reference(module, entry, args, sources);
    let function = module.function(entry).expect("the evaluator found it");
    let narrow = [DType::BF16, DType::F16];
    if function.values.iter().any(|v| narrow.contains(&v.ty.dtype)) && computes_narrow(module, &narrow) {
        return run;
    }
    let compiled = compiled(module, entry, args, sources);
    for (name, expected) in &run.results {
        let found = &compiled[name];
        assert_eq!(found.ty, expected.ty, "result `{name}` of `{entry}`");
        match (&found.data, &expected.data) {
            (Data::Float(_), _) => {
                let error = relative_l2(&found.to_f32(), &expected.to_f32());
                assert!(
                    error <= LIMIT_F32,
                    "result `{name}` of `{entry}`: compiled plan and evaluator differ by {error:.2e}"
                );
            }
            (found, expected) => assert_eq!(found, expected, "result `{name}` of `{entry}`"),
        }
    }
    run.results = compiled;
    run
}

/// Whether any function computes in a narrow dtype, rather than only reading weights of it.
fn computes_narrow(module: &Module, narrow: &[DType]) -> bool {
    let is_weight = |op: &ltxc_ir::Op| {
        matches!(op.name(), "weight" | "transpose" | "reshape" | "broadcast" | "slice" | "concat" | "cast")
    };
    module.functions.iter().any(|f| {
        f.nodes.iter().any(|n| !is_weight(&n.op) && n.results.iter().any(|&r| narrow.contains(&f.ty(r).dtype)))
    })
}

/// Runs `entry` with the reference evaluator.
///
/// # Panics
/// If arguments or weights do not fit.
#[track_caller]
pub fn reference(module: &Module, entry: &str, args: &[Tensor], sources: Sources<'_>) -> Run {
    let lookup = |source: &str, key: &str, _: &TensorType| {
        let (_, file) = sources.iter().find(|(name, _)| *name == source)?;
        file.find(key).cloned()
    };
    let taps = RefCell::new(BTreeMap::new());
    let tap = |name: &str, value: &Tensor| {
        taps.borrow_mut().insert(name.to_string(), value.clone());
    };
    let outputs = Evaluator::new(module, &lookup).tap(&tap).run(entry, args).unwrap_or_else(|e| panic!("{e}"));
    let names = &module.function(entry).expect("the evaluator found it").results;
    let results = names.iter().map(|r| r.name.clone()).zip(outputs).collect();
    Run { results, taps: taps.take() }
}

/// The file of a test as a source of a plan.
///
/// # Panics
/// If it cannot be read.
#[track_caller]
pub fn source(name: &str, file: &TensorFile) -> WeightSource {
    let opened = WeightFile::open(&file.path).unwrap_or_else(|e| panic!("{e}"));
    let identity = opened.identity(false).unwrap_or_else(|e| panic!("{e}"));
    WeightSource { name: name.into(), files: vec![identity], renames: Vec::new() }
}

/// Compiles `entry` for `target` into a plan of one program, which has passed through its file format.
///
/// # Panics
/// If it does not compile.
#[track_caller]
pub fn plan_of(target: &Target, module: &Module, entry: &str, sources: Sources<'_>) -> Plan {
    let options = Options { verify: true, ..Options::default() };
    let slots = WeightSource { name: ADAPTER_SLOTS.into(), files: Vec::new(), renames: Vec::new() };
    let sources = sources.iter().map(|(name, file)| source(name, file)).chain([slots]).collect();
    let mut builder = PlanBuilder::new("ltxc-tests", target.clone(), options, sources);
    builder.add("main", "main", module, entry).unwrap_or_else(|e| panic!("{e}"));
    let plan = builder.finish(Pipeline::default()).unwrap_or_else(|e| panic!("{e}"));
    let bytes = container::encode(&plan).unwrap_or_else(|e| panic!("{e}"));
    container::decode(&bytes).unwrap_or_else(|e| panic!("{e}"))
}

/// Compiles `entry` and runs it on the CPU backend.
///
/// # Panics
/// If it does not compile or run.
#[track_caller]
pub fn compiled(module: &Module, entry: &str, args: &[Tensor], sources: Sources<'_>) -> BTreeMap<String, Tensor> {
    compiled_with(&processor(), module, entry, args, sources, AdapterSet::default())
}

/// The processor as a device.
///
/// # Panics
/// Never: every machine has one.
pub fn processor() -> Device {
    find(Some("cpu")).named(&DeviceName::Cpu).expect("there is a processor").clone()
}

/// As [`compiled`], on any device and with adapters.
///
/// # Panics
/// As for [`compiled`], or if the adapters do not fit.
#[track_caller]
pub fn compiled_with(
    device: &Device,
    module: &Module,
    entry: &str,
    args: &[Tensor],
    sources: Sources<'_>,
    adapters: AdapterSet,
) -> BTreeMap<String, Tensor> {
    let plan = plan_of(&device.target, module, entry, sources);
    let folders: Vec<PathBuf> = sources.iter().map(|(_, file)| file.path.clone()).collect();
    let weights = WeightFiles::open(&plan, &folders, false).unwrap_or_else(|e| panic!("{e}"));
    let interrupt = AtomicBool::new(false);
    let backend = open(device).unwrap_or_else(|e| panic!("{e}"));
    let mut executor = Executor::on(backend, &plan, &weights, &interrupt).unwrap_or_else(|e| panic!("{e}"));
    executor.set_adapters(adapters).unwrap_or_else(|e| panic!("{e}"));
    let function = module.function(entry).expect("it was compiled");
    let named: BTreeMap<&str, &Tensor> = function.params.iter().map(|p| function.name_of(p.value)).zip(args).collect();
    let mut results = BTreeMap::new();
    for rate in [Rate::Generation, Rate::Evaluation, Rate::Step] {
        for program in plan.programs.iter().filter(|p| p.rate == rate) {
            for slot in &program.inputs {
                if let Some(value) = named.get(slot.name.as_str()) {
                    executor.write(&program.name, &slot.name, &value.to_bytes()).unwrap_or_else(|e| panic!("{e}"));
                }
            }
            executor.run(&program.name).unwrap_or_else(|e| panic!("{e}"));
            for slot in &program.outputs {
                let bytes = executor.read_bytes(&program.name, &slot.name).unwrap_or_else(|e| panic!("{e}"));
                results.insert(slot.name.clone(), Tensor::from_bytes(slot.ty.clone(), &bytes));
            }
        }
    }
    results.retain(|name, _| function.results.iter().any(|r| r.name == *name));
    results
}
