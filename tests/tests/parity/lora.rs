//! Adapters against recorded ones: fused weights, and what the transformer makes of them; merged and live.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ltxc::debug::parity::transformer::StreamCase;
use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::plan::Release;
use ltxc_ir::{DType, Module, TensorType};
use ltxc_models::Weights;
use ltxc_models::checkpoint::Checkpoint;
use ltxc_models::lora::{LoraFile, LoraTargets};
use ltxc_models::transformer::{ENTRY, KEY_PREFIX, Stream, TransformerSpec, build};
use ltxc_runtime::adapters::{Adapter, AdapterMode, AdapterSet, Factor, Stored};
use ltxc_runtime::backend::Device;
use ltxc_tests::compare::{Report, relative_l2};
use ltxc_tests::fixtures::{self, TensorFile};
use ltxc_tests::harness::{compiled_with, processor, reference};
use ltxc_tests::recorded::Recorded;
use ltxc_tests::rounding::typical_errors;

use super::pipeline::gpu;
use super::transformer::Fixture;

/// Relative L2 limit of velocities.
const LIMIT: f64 = 1e-5;

/// The same of weights to which f32 products were added in f32.
const SUM_LIMIT: f64 = 1e-6;

/// Families with the file of their model.
const FAMILIES: [(&str, &str); 2] = [("ltx2", "tiny-ltx2/ltx-2-tiny"), ("ltx23", "tiny-ltx23/ltx-2.3-tiny")];

/// The noise level of the recorded velocities.
const SIGMA: f32 = 0.725;

/// A checkpoint and its LoRA files.
struct Model {
    folder: PathBuf,
    path: PathBuf,
    targets: LoraTargets,
}

impl Model {
    fn new(name: &str) -> Model {
        let path = fixtures::root().join(format!("{name}.safetensors"));
        let checkpoint = Checkpoint::open(&path).unwrap_or_else(|e| panic!("{e}"));
        let folder = path.parent().expect("a file is in a folder").to_path_buf();
        Model { folder, path, targets: LoraTargets::of(&checkpoint) }
    }

    fn adapter(&self, name: &str) -> Arc<Adapter> {
        let file = LoraFile::open(&self.folder.join(format!("{name}.safetensors"))).unwrap_or_else(|e| panic!("{e}"));
        let fit = file.fit(&self.targets, false).unwrap_or_else(|e| panic!("{e}"));
        let factors = fit.factors.into_iter().map(|f| {
            let stored = |p: ltxc_models::lora::Place| Stored { offset: p.offset, dtype: p.dtype };
            let (rank, inputs, outputs) = (f.rank, f.inputs, f.outputs);
            (f.key, Factor { rank, inputs, outputs, down: stored(f.down), up: stored(f.up), scale: f.scale })
        });
        Arc::new(Adapter::open(file.path(), factors).unwrap_or_else(|e| panic!("{e}")))
    }

    /// A rank of slots that `members` fit into, and one more.
    fn slots(&self, members: &[(&str, f32)]) -> usize {
        let rank = |(name, _): &(&str, f32)| {
            let file = TensorFile::read(&self.folder.join(format!("{name}.safetensors")));
            let ranks =
                file.iter().filter(|(key, _)| key.ends_with(".lora_A.weight")).map(|(_, down)| down.ty.shape[0]);
            ranks.max().expect("an adapter has layers")
        };
        members.iter().map(rank).sum::<usize>() + 1
    }

    fn set(&self, members: &[(&str, f32)], mode: AdapterMode) -> AdapterSet {
        AdapterSet::new(members.iter().map(|(name, strength)| (self.adapter(name), *strength)).collect(), mode)
    }
}

/// Name of the weights, adapters with strengths, name of the velocities.
type Set = (&'static str, &'static [(&'static str, f32)], Option<&'static str>);

/// The recorded combinations.
const SETS: [Set; 3] = [
    ("fused.bf16", &[("lora-rank4-tiny-bf16", 0.7)], None),
    ("fused.f32", &[("lora-rank4-tiny", 0.7)], Some("f32")),
    ("fused2.f32", &[("lora-rank4-tiny", 0.7), ("distilled-lora-tiny", 1.0)], Some("two_loras_f32")),
];

/// Release 1.0.0 adds products in the dtype of the adapter, 1.2.0 rounds to that of the weights: the one is what live adapters
/// do, if adapters are f32, the other is merging.
#[test]
fn weights_and_velocities_match_the_recording() {
    for (family, name) in FAMILIES {
        let model = Model::new(name);
        let mut recorded = Recorded::required(&format!("{family}/lora"));
        let checkpoint = TensorFile::read(&model.path);
        for (prefix, members, velocity) in SETS {
            let is_wide = fixtures::release() == Release::V1_0_0 && prefix.ends_with(".f32");
            let (mode, slots) =
                if is_wide { (AdapterMode::Live, model.slots(members)) } else { (AdapterMode::Merged, 0) };
            let set = model.set(members, mode);
            match mode {
                AdapterMode::Live => {
                    check_sums(&mut recorded, &checkpoint, prefix, &exact(&model, &checkpoint, members).0)
                }
                AdapterMode::Merged => check_weights(&mut recorded, &checkpoint, prefix, &set),
            }
            if let Some(velocity) = velocity {
                let found = velocities(family, &checkpoint, slots, set);
                for stream in Stream::BOTH {
                    let key = format!("velocity.{velocity}.{}", stream.name());
                    recorded.check(&key, &found[stream as usize], LIMIT);
                }
            }
        }
        recorded.finish();
    }
}

/// Names of the weights that were recorded below `prefix`.
fn recorded_weights(recorded: &Recorded, prefix: &str) -> Vec<String> {
    let names: Vec<String> = (recorded.file.iter())
        .filter_map(|(key, _)| key.strip_prefix(&format!("{prefix}.")).map(String::from))
        .collect();
    assert!(!names.is_empty(), "{prefix} was recorded");
    names
}

/// What live adapters are compared with elsewhere is what the reference has.
fn check_sums(recorded: &mut Recorded, checkpoint: &TensorFile, prefix: &str, exact: &BTreeMap<String, Tensor>) {
    for name in recorded_weights(recorded, prefix) {
        let key = format!("{KEY_PREFIX}{name}");
        let base = checkpoint.tensor(&key);
        recorded.check_exact(&format!("base.{name}"), &base.to_f32());
        recorded.check(&format!("{prefix}.{name}"), &exact.get(&key).unwrap_or(base).to_f32(), SUM_LIMIT);
    }
}

/// Merged weights are rounded as the reference rounds. Sums of another order may fall on the other side of a tie, by a
/// unit in the last place of a bf16: 2⁻⁷ of a value at most.
fn check_weights(recorded: &mut Recorded, checkpoint: &TensorFile, prefix: &str, set: &AdapterSet) {
    for name in recorded_weights(recorded, prefix) {
        let key = format!("{KEY_PREFIX}{name}");
        let base = checkpoint.tensor(&key);
        recorded.check_exact(&format!("base.{name}"), &base.to_f32());
        let merged = set.merged("model", &key, &base.ty, &base.to_bytes()).unwrap_or_else(|e| panic!("{e}"));
        let found = match merged {
            Some(memory) => Tensor::from_bytes(base.ty.clone(), memory.bytes()).to_f32(),
            None => base.to_f32(),
        };
        let expected = recorded.input(&format!("{prefix}.{name}")).to_f32();
        let differ = |(a, b): (&f32, &f32)| a != b;
        let count = found.iter().zip(&expected).filter(|&pair| differ(pair)).count();
        let near = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= b.abs() / 128.0);
        let ok = found.len() == expected.len() && near && count * 1000 <= expected.len();
        recorded.note(ok, format!("{prefix}.{name}: {count} of {} values differ", expected.len()), &[]);
    }
}

/// The inputs of the recorded velocities.
fn inputs(fixture: &Fixture<'_>) -> [StreamCase; 2] {
    Stream::BOTH.map(|s| {
        let case = fixture.stream("uniform", s).expect("`uniform` has both streams");
        StreamCase { timesteps: vec![SIGMA; case.timesteps.len()], sigma: SIGMA, ..case }
    })
}

/// Velocities of a compiled plan with slots of `rank`.
fn velocities(family: &str, checkpoint: &TensorFile, rank: usize, set: AdapterSet) -> [Vec<f32>; 2] {
    let (module, args) = transformer(family, checkpoint, rank, DType::F32);
    velocities_on(&processor(), checkpoint, &module, &args, set)
}

/// Velocities of `module` as a plan on `device`.
fn velocities_on(
    device: &Device,
    checkpoint: &TensorFile,
    module: &Module,
    args: &[Tensor],
    set: AdapterSet,
) -> [Vec<f32>; 2] {
    let results = compiled_with(device, module, ENTRY, args, &[("model", checkpoint)], set);
    Stream::BOTH.map(|s| results[&format!("{}.velocity", s.name())].to_f32())
}

/// The transformer with slots of `rank`, and the arguments of the recorded velocities.
fn transformer(family: &str, checkpoint: &TensorFile, rank: usize, dtype: DType) -> (Module, Vec<Tensor>) {
    let file = fixtures::required(&format!("{family}/transformer"));
    let fixture = Fixture::new(&file, checkpoint);
    let streams = inputs(&fixture);
    let spec = TransformerSpec {
        video: Some(streams[0].spec()),
        audio: Some(streams[1].spec()),
        perturbation: Default::default(),
    };
    let weights = Weights::new("model", checkpoint).with_adapter_slots(rank);
    let module = build(&fixture.config("uniform"), &weights, &spec, dtype).unwrap_or_else(|e| panic!("{e}"));
    (module, streams.iter().flat_map(StreamCase::arguments).collect())
}

/// Live adapters compute what weights with nothing rounded would; merged ones differ by what rounding did to weights.
///
/// Each merged weight is off by its own relative error; with errors independent from layer to layer and passed on
/// unchanged, the velocity is off by the root of their sum of squares. Three times as much fails, and a tenth too, which
/// would mean that nothing was rounded.
#[test]
fn live_adapters_equal_merged_ones() {
    let mut report = Report::default();
    for (family, name) in FAMILIES {
        let model = Model::new(name);
        let checkpoint = TensorFile::read(&model.path);
        for (prefix, members, velocity) in SETS.into_iter().filter(|set| set.2.is_some()) {
            let velocity = velocity.unwrap_or_default();
            let merged = velocities(family, &checkpoint, 0, model.set(members, AdapterMode::Merged));
            let live = velocities(family, &checkpoint, model.slots(members), model.set(members, AdapterMode::Live));
            let plain = velocities(family, &checkpoint, model.slots(members), AdapterSet::default());
            let (exact, error) = exact(&model, &checkpoint, members);
            let exact = evaluated(family, &checkpoint, exact);
            for s in Stream::BOTH {
                let name = |what: &str| format!("{family} {prefix} {velocity} {}: {what}", s.name());
                let (live, merged, exact, plain) =
                    (&live[s as usize], &merged[s as usize], &exact[s as usize], &plain[s as usize]);
                report.check(&name("live against exact"), live, exact, LIMIT);
                report.check(&name("live against merged"), live, merged, 3.0 * error);
                let found = relative_l2(live, merged);
                report.note(found >= error / 10.0, name(&format!("{found:.1e} of {error:.1e} expected")));
                let effect = relative_l2(live, plain);
                report.note(effect > 0.01, name(&format!("changes the velocity by {effect:.1e}")));
            }
        }
    }
    report.finish();
}

/// Weights with adapters in f32, nothing rounded to bf16, and the error that rounding them as merging does would make.
fn exact(model: &Model, checkpoint: &TensorFile, members: &[(&str, f32)]) -> (BTreeMap<String, Tensor>, f64) {
    let mut weights = BTreeMap::new();
    let mut squares = 0.0;
    let merged = model.set(members, AdapterMode::Merged);
    let files: Vec<(TensorFile, f32)> = (members.iter())
        .map(|(name, strength)| (TensorFile::read(&model.folder.join(format!("{name}.safetensors"))), *strength))
        .collect();
    for (key, base) in checkpoint.iter() {
        let layer = key.strip_prefix("model.").and_then(|k| k.strip_suffix(".weight"));
        let Some(layer) = layer.filter(|l| files.iter().any(|(f, _)| f.find(&format!("{l}.lora_A.weight")).is_some()))
        else {
            continue;
        };
        let (mut sum, columns) = (base.to_f32(), base.ty.shape[1]);
        for (file, strength) in &files {
            let Some(down) = file.find(&format!("{layer}.lora_A.weight")) else { continue };
            let (rank, down) = (down.ty.shape[0], down.to_f32());
            let up = file.tensor(&format!("{layer}.lora_B.weight")).to_f32();
            for (i, value) in sum.iter_mut().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let terms = (0..rank).map(|r| f64::from(up[row * rank + r]) * f64::from(down[r * columns + column]));
                *value = (f64::from(*value) + f64::from(*strength) * terms.sum::<f64>()) as f32;
            }
        }
        let rounded = merged.merged("model", key, &base.ty, &base.to_bytes()).unwrap_or_else(|e| panic!("{e}"));
        let rounded = Tensor::from_bytes(base.ty.clone(), rounded.expect("it is changed").bytes()).to_f32();
        squares += relative_l2(&rounded, &sum).powi(2);
        weights.insert(key.to_string(), Tensor::f32(&base.ty.shape, &sum));
    }
    (weights, squares.sqrt())
}

/// Velocities by the reference evaluator, with some weights replaced.
fn evaluated(family: &str, checkpoint: &TensorFile, replaced: BTreeMap<String, Tensor>) -> [Vec<f32>; 2] {
    let file = fixtures::required(&format!("{family}/transformer"));
    let mut changed = checkpoint.clone();
    replaced.into_iter().for_each(|(key, tensor)| changed.insert(&key, tensor));
    let fixture = Fixture::new(&file, &changed);
    let streams = inputs(&fixture);
    let spec = TransformerSpec {
        video: Some(streams[0].spec()),
        audio: Some(streams[1].spec()),
        perturbation: Default::default(),
    };
    let module = build(&fixture.config("uniform"), &Weights::new("model", &changed), &spec, DType::F32);
    let args: Vec<Tensor> = streams.iter().flat_map(StreamCase::arguments).collect();
    let run = reference(&module.unwrap_or_else(|e| panic!("{e}")), ENTRY, &args, &[("model", &changed)]);
    Stream::BOTH.map(|s| run.results[&format!("{}.velocity", s.name())].to_f32())
}

/// In narrow dtypes, too, adapters act as they should: no further from exact values than the rounding of activations
/// explains, and, where they are merged, that of weights. Three times the typical error fails, as without adapters
/// (`narrow.rs`), and so does an eighth, which would mean that nothing was computed in the narrow dtype.
#[test]
fn adapters_act_in_narrow_dtypes() {
    let mut report = Report::default();
    for (family, name) in FAMILIES {
        let model = Model::new(name);
        let checkpoint = TensorFile::read(&model.path);
        let (_, members, _) = SETS[2];
        let (replaced, merge_error) = exact(&model, &checkpoint, members);
        let exact = evaluated(family, &checkpoint, replaced);
        for dtype in [DType::BF16, DType::F16] {
            let (plain, args) = transformer(family, &checkpoint, 0, dtype);
            let typical = typical_errors(&plain, ENTRY, dtype, &args, &[("model", &checkpoint)]);
            for (mode, slots, weights) in
                [(AdapterMode::Live, model.slots(members), 0.0), (AdapterMode::Merged, 0, merge_error)]
            {
                let (module, args) = transformer(family, &checkpoint, slots, dtype);
                let found = velocities_on(&processor(), &checkpoint, &module, &args, model.set(members, mode));
                for s in Stream::BOTH {
                    let typical = typical[&format!("{}.velocity", s.name())].hypot(weights);
                    let (found, exact) = (&found[s as usize], &exact[s as usize]);
                    let name = format!("{family} {}, {mode:?} in {dtype}", s.name());
                    report.check(&name, found, exact, 3.0 * typical);
                    let error = relative_l2(found, exact);
                    report.note(error >= typical / 8.0, format!("{name}: {error:.1e} of {typical:.1e} expected"));
                }
            }
        }
    }
    report.finish();
}

#[test]
fn adapters_act_on_a_gpu_as_on_the_processor() {
    let Some(device) = gpu() else { return };
    let mut report = Report::default();
    for (family, name) in FAMILIES {
        let model = Model::new(name);
        let checkpoint = TensorFile::read(&model.path);
        let (_, members, _) = SETS[2];
        for (mode, slots) in [(AdapterMode::Live, model.slots(members)), (AdapterMode::Merged, 0)] {
            let (module, args) = transformer(family, &checkpoint, slots, DType::F32);
            let run = |device: &Device, set| velocities_on(device, &checkpoint, &module, &args, set);
            let [found, expected] = [&device, &processor()].map(|device| run(device, model.set(members, mode)));
            let plain = run(&processor(), AdapterSet::default());
            for s in Stream::BOTH {
                let (found, expected, plain) = (&found[s as usize], &expected[s as usize], &plain[s as usize]);
                let name = format!("{family} {}, {mode:?}", s.name());
                report.check(&name, found, expected, LIMIT);
                let effect = relative_l2(found, plain);
                report.note(effect > 0.01, format!("{name}: changes the velocity by {effect:.1e}"));
            }
        }
    }
    report.finish();
}

/// Weights of every stored type take the same product; what they are rounded to is their own.
#[test]
fn weights_of_other_types_are_merged() {
    let model = Model::new(FAMILIES[0].1);
    let set = model.set(&[("lora-rank4-tiny", 0.7)], AdapterMode::Merged);
    let checkpoint = TensorFile::read(&model.path);
    let key = format!("{KEY_PREFIX}transformer_blocks.0.attn1.to_q.weight");
    let base = checkpoint.tensor(&key);
    let merged = |dtype: DType| {
        let ty = TensorType::new(dtype, base.ty.shape.clone());
        let floats = base.to_f32().into_iter().map(f64::from).collect();
        let bytes = Tensor { ty: ty.clone(), data: Data::Float(floats) }.to_bytes();
        let memory = set.merged("model", &key, &ty, &bytes).unwrap_or_else(|e| panic!("{e}")).expect("it is changed");
        Tensor::from_bytes(ty, memory.bytes()).to_f32()
    };
    let (wide, narrow, half) = (merged(DType::F32), merged(DType::BF16), merged(DType::F16));
    let rounded =
        Tensor { ty: base.ty.clone(), data: Data::Float(wide.iter().map(|&v| v.into()).collect()) }.to_bytes();
    assert_eq!(Tensor::from_bytes(base.ty.clone(), &rounded).to_f32(), narrow, "rounded once, in the end");
    // Ten more bits of f16 leave at most 2⁻¹¹ of each value.
    assert!(relative_l2(&half, &wide) <= 1.0 / 2048.0 && half != wide);
    assert!(
        set.merged("model", "other.weight", &base.ty, &base.to_bytes()).unwrap_or_else(|e| panic!("{e}")).is_none()
    );
    assert!(set.merged("gemma", &key, &base.ty, &base.to_bytes()).unwrap_or_else(|e| panic!("{e}")).is_none());
    let other = TensorType::new(DType::BF16, [base.ty.shape[0] / 2, base.ty.shape[1] * 2]);
    assert!(
        set.merged("model", &key, &other, &base.to_bytes())
            .is_err_and(|e| e.to_string().contains("use a LoRA made for"))
    );
}
