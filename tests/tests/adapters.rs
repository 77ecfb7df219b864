//! Adapters at run time: switching them, what they cost, and what plans promise about memory.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use ltxc::args::{ModelArgs, PipelineName, ShapeArgs};
use ltxc::compile::compile;
use ltxc::job::Shape;
use ltxc::model_files::ModelFiles;
use ltxc_compiler::Options;
use ltxc_ir::plan::{Plan, container};
use ltxc_ir::{DType, Rate};
use ltxc_models::lora::{LoraFile, LoraTargets, Place};
use ltxc_runtime::RunError;
use ltxc_runtime::adapters::{Adapter, AdapterMode, AdapterSet, Factor, StageAdapters, Stored};
use ltxc_runtime::backend::{Backend, BufferId, Call, CallId, Cpu, Device, Region, Weight};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::memory::MemoryNeed;
use ltxc_runtime::weights::WeightFiles;
use ltxc_tests::fixtures::root;

/// The CPU, counting what becomes of weights.
struct Counting<'a> {
    cpu: Cpu<'a>,
    counts: Rc<Counts>,
}

#[derive(Default)]
struct Counts {
    weights: Cell<usize>,
    written: Cell<usize>,
}

impl<'a> Backend<'a> for Counting<'a> {
    fn device(&self) -> &Device {
        self.cpu.device()
    }
    fn check(&mut self, plan: &Plan) -> Result<(), RunError> {
        self.cpu.check(plan)
    }
    fn allocate(&mut self, bytes: u64) -> Result<BufferId, RunError> {
        self.cpu.allocate(bytes)
    }
    fn weight(&mut self, weight: Weight<'a>) -> Result<BufferId, RunError> {
        self.counts.weights.set(self.counts.weights.get() + 1);
        self.cpu.weight(weight)
    }
    fn write(&mut self, to: Region, bytes: &[u8]) -> Result<(), RunError> {
        self.counts.written.set(self.counts.written.get() + bytes.len());
        self.cpu.write(to, bytes)
    }
    fn read(&self, from: Region, bytes: u64) -> Result<Cow<'_, [u8]>, RunError> {
        self.cpu.read(from, bytes)
    }
    fn bind(&mut self, call: Call<'a>) -> Result<CallId, RunError> {
        self.cpu.bind(call)
    }
    fn launch(&mut self, call: CallId) -> Result<(), RunError> {
        self.cpu.launch(call)
    }
    fn synchronize(&self) -> Result<(), RunError> {
        self.cpu.synchronize()
    }
    fn clear(&mut self) {
        self.cpu.clear()
    }
}

struct Model {
    args: ModelArgs,
    targets: LoraTargets,
}

impl Model {
    fn new() -> Model {
        let file = |name: &str| Some(root().join(name));
        let args = ModelArgs {
            checkpoint_path: file("tiny-ltx2/ltx-2-tiny.safetensors"),
            gemma_root: file("tiny-gemma3"),
            ..ModelArgs::default()
        };
        let files = ModelFiles::open(&args, false).unwrap();
        Model { args, targets: LoraTargets::of(&files.model) }
    }

    /// A plan of one stage with slots of `rank`.
    fn plan(&self, rank: u32) -> Plan {
        let shape = ShapeArgs {
            pipeline: Some(PipelineName::DistilledOneStage),
            height: Some(64),
            width: Some(96),
            num_frames: Some(9),
            lora_rank: Some(rank),
            ..ShapeArgs::default()
        };
        let shape = Shape::resolve(&shape, 0).unwrap();
        let files = ModelFiles::open(&self.args, false).unwrap();
        let plan = compile(&files, &shape, Options::default(), &mut |_, _, _| {}).unwrap();
        container::decode(&container::encode(&plan).unwrap()).unwrap()
    }

    fn weights(&self, plan: &Plan) -> WeightFiles {
        WeightFiles::open(plan, &[root().join("tiny-ltx2"), root().join("tiny-gemma3")], false).unwrap()
    }

    fn adapter(&self, name: &str) -> Arc<Adapter> {
        let file = LoraFile::open(&root().join(format!("tiny-ltx2/{name}.safetensors"))).unwrap();
        let stored = |p: Place| Stored { offset: p.offset, dtype: p.dtype };
        let factors = file.fit(&self.targets, false).unwrap().factors.into_iter().map(|f| {
            let (rank, inputs, outputs) = (f.rank, f.inputs, f.outputs);
            (f.key, Factor { rank, inputs, outputs, down: stored(f.down), up: stored(f.up), scale: f.scale })
        });
        Arc::new(Adapter::open(file.path(), factors).unwrap())
    }
}

/// Runs the programs of the first stage on inputs that are always the same. Returns the velocities.
fn velocities(executor: &mut Executor<'_>) -> Vec<f32> {
    let plan = executor.plan();
    let group = plan.groups.iter().position(|g| g.name == "stage1");
    let programs: Vec<_> = plan.programs.iter().filter(|p| Some(p.group as usize) == group).collect();
    let mut found: Vec<f32> = Vec::new();
    for rate in [Rate::Generation, Rate::Evaluation, Rate::Step] {
        for program in programs.iter().filter(|p| p.rate == rate) {
            let is_given = |name: &str| !plan.programs.iter().any(|p| p.outputs.iter().any(|o| o.name == name));
            for slot in program.inputs.iter().filter(|s| s.ty.dtype == DType::F32 && is_given(&s.name)) {
                let values: Vec<f32> = (0..slot.ty.elements()).map(|i| ((i * 7 % 23) as f32 - 11.0) / 23.0).collect();
                executor.write(&program.name, &slot.name, &values).unwrap();
            }
            executor.run(&program.name).unwrap();
            for output in program.outputs.iter().filter(|o| o.name.ends_with("velocity")) {
                found.extend(executor.read(&program.name, &output.name).unwrap().iter());
            }
        }
    }
    assert!(!found.is_empty() && found.iter().all(|v| v.is_finite()));
    found
}

#[test]
fn switching_live_adapters_writes_slots_and_no_weight() {
    let model = Model::new();
    let plan = model.plan(8);
    let weights = model.weights(&plan);
    let interrupt = AtomicBool::new(false);
    let (first, second) = (model.adapter("lora-rank4-tiny"), model.adapter("distilled-lora-tiny"));
    let live = |members: Vec<(Arc<Adapter>, f32)>| AdapterSet::new(members, AdapterMode::Live);
    let sets = [
        live(vec![(first.clone(), 1.0)]),
        live(vec![(first.clone(), 0.5), (second.clone(), 1.0)]),
        AdapterSet::default(),
        live(vec![(second, -1.0)]),
    ];
    let fresh: Vec<Vec<f32>> = (sets.iter())
        .map(|set| {
            let mut executor = Executor::new(&plan, &weights, &interrupt).unwrap();
            executor.set_adapters(set.clone()).unwrap();
            velocities(&mut executor)
        })
        .collect();
    assert!((0..4).all(|i| (0..i).all(|j| fresh[i] != fresh[j])), "adapters do nothing");

    let counts = Rc::new(Counts::default());
    let backend = Box::new(Counting { cpu: Cpu::default(), counts: counts.clone() });
    let mut executor = Executor::on(backend, &plan, &weights, &interrupt).unwrap();
    assert!(velocities(&mut executor) == fresh[2]);
    let bound = counts.weights.get();
    // Every layer that a LoRA can change has two slots in f32.
    let slots = plan.sources.iter().position(|s| s.name == "adapters").unwrap() as u32;
    let tensors = ltxc_ir::plan::summary::tensors(&plan);
    let slot_bytes: usize = tensors.iter().filter(|((s, _), _)| *s == slots).map(|(_, ty)| ty.bytes()).sum();
    assert!(bound > 0 && slot_bytes > 0);
    for (set, expected) in sets.iter().zip(&fresh) {
        counts.written.set(0);
        executor.set_adapters(set.clone()).unwrap();
        assert_eq!(counts.written.replace(0), slot_bytes);
        assert!(velocities(&mut executor) == *expected, "switching leaves something behind");
    }
    counts.written.set(0);
    executor.set_adapters(sets[3].clone()).unwrap();
    assert_eq!(counts.written.get(), 0, "the same adapters were written again");
    assert_eq!(counts.weights.get(), bound, "a weight was bound anew");
}

#[test]
fn merged_adapters_come_and_go() {
    let model = Model::new();
    let plan = model.plan(0);
    let weights = model.weights(&plan);
    let interrupt = AtomicBool::new(false);
    let adapter = model.adapter("lora-rank4-tiny");
    let merged = |strength: f32| AdapterSet::new(vec![(adapter.clone(), strength)], AdapterMode::Merged);
    let mut executor = Executor::new(&plan, &weights, &interrupt).unwrap();
    let plain = velocities(&mut executor);
    executor.set_adapters(merged(1.0)).unwrap();
    let whole = velocities(&mut executor);
    executor.set_adapters(merged(0.5)).unwrap();
    let half = velocities(&mut executor);
    assert!(plain != whole && whole != half && plain != half);
    executor.set_adapters(merged(1.0)).unwrap();
    assert!(velocities(&mut executor) == whole);
    executor.set_adapters(AdapterSet::default()).unwrap();
    assert!(velocities(&mut executor) == plain, "a merged weight is left");
    let live = AdapterSet::new(vec![(adapter, 1.0)], AdapterMode::Live);
    let error = executor.set_adapters(live).unwrap_err().to_string();
    assert!(error.contains("no slots for live adapters"), "{error}");
}

#[test]
fn predicted_memory_counts_merged_copies_and_slots() {
    let model = Model::new();
    let [plain, slotted] = [0, 8].map(|rank| model.plan(rank));
    let adapter = model.adapter("lora-rank4-tiny");
    let need = |plan: &Plan, mode: Option<AdapterMode>| -> BTreeMap<String, u64> {
        let mut adapters = StageAdapters::default();
        if let Some(mode) = mode {
            adapters.set("stage1", AdapterSet::new(vec![(adapter.clone(), 1.0)], mode));
        }
        let need = MemoryNeed::of(plan, 1).with(plan, &model.weights(plan), &adapters);
        need.parts.into_iter().map(|p| (p.name, p.packed)).collect()
    };
    let (none, merged) = (need(&plain, None), need(&plain, Some(AdapterMode::Merged)));
    // Copies of the 24 changed weights, in the bf16 that they are stored in.
    let file = LoraFile::open(&root().join("tiny-ltx2/lora-rank4-tiny.safetensors")).unwrap();
    let copies: usize = file.modules().iter().map(|m| m.inputs * m.outputs * 2).sum();
    assert_eq!(merged["stage1"], none["stage1"] + copies as u64);
    assert_eq!(merged["decode"], none["decode"]);
    let (empty, live) = (need(&slotted, None), need(&slotted, Some(AdapterMode::Live)));
    assert_eq!(empty["stage1"], live["stage1"]);
    assert!(empty["stage1"] > none["stage1"]);
}
