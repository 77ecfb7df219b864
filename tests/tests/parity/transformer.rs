//! The transformer against recorded activations: every recorded tensor of every case, for every stored precision.
//!
//! A case is what the recording's name says it is; inputs that it does not list are the shared ones (`in.*`).

use std::collections::BTreeMap;

use ltxc::debug::parity::transformer::{StreamCase, case_config, perturbation, stream_case};
use ltxc_ir::eval::{Evaluator, Tensor};
use ltxc_ir::{Builder, DType, Module, Rate, TensorType};
use ltxc_models::Weights;
use ltxc_models::transformer::rope::{RopeTable, frequencies, rotation};
use ltxc_models::transformer::{
    BlockSet, ENTRY, Pass, Perturbation, Stream, TransformerConfig, TransformerSpec, build_passes,
};
use ltxc_tests::compare::Report;
use ltxc_tests::fixtures::{self, TensorFile};
use ltxc_tests::harness::{Run, evaluate};
use ltxc_tests::recorded::Recorded;

/// Limit of the recording for everything but tables of cosines, relative L2.
const LIMIT: f64 = 1e-5;

/// Limit for tables of cosines and sines, absolute.
const ROPE_LIMIT: f64 = 1e-5;

#[test]
fn ltx2_transformer_matches_the_recording() {
    check("ltx2", "tiny-ltx2/ltx-2-tiny.safetensors");
}

#[test]
fn ltx2_transformer_stored_as_f32_matches_the_recording() {
    check_optional("ltx2", "tiny-ltx2/ltx-2-tiny-f32.safetensors");
}

#[test]
fn ltx23_transformer_matches_the_recording() {
    check("ltx23", "tiny-ltx23/ltx-2.3-tiny.safetensors");
}

#[test]
fn ltx23_transformer_stored_as_f32_matches_the_recording() {
    check_optional("ltx23", "tiny-ltx23/ltx-2.3-tiny-f32.safetensors");
}

#[test]
fn ltx25_transformer_matches_the_recording() {
    check_optional("ltx25", "tiny-ltx25/diffusion_models/ltx-2.5-tiny-distilled-transformer-bf16.safetensors");
}

fn check_optional(model: &str, checkpoint: &str) {
    if fixtures::root().join(checkpoint).exists() && fixtures::expected(&format!("{model}/transformer")).is_some() {
        check(model, checkpoint);
    } else {
        println!("absent: {checkpoint}");
    }
}

#[track_caller]
fn check(model: &str, checkpoint: &str) {
    let file = fixtures::required(&format!("{model}/transformer"));
    let checkpoint = TensorFile::read(&fixtures::root().join(checkpoint));
    let fixture = Fixture::new(&file, &checkpoint);
    let mut recorded = Recorded::required(&format!("{model}/transformer"));
    for case in fixture.cases() {
        match case.as_str() {
            "batch2" => check_batch(&fixture, &mut recorded),
            "bf16" => print_bf16(&fixture, &mut recorded),
            _ => check_case(&fixture, &case, &mut recorded),
        }
    }
    check_preparation(&fixture, &mut recorded);
    let is_input = |name: &str| {
        let inputs = ["timesteps", "sigma", "sigma_audio", "latent", "context", "positions", "denoise_mask"];
        let more =
            ["attention_mask", "context_mask", "keyframes_mask", "clean_latent", "keyframe_latent", "reference_latent"];
        let last = name.rsplit('.').next().unwrap_or(name);
        name.starts_with("in.") || (!name.starts_with("prep.") && (inputs.contains(&last) || more.contains(&last)))
    };
    for (name, _) in file.iter().filter(|(name, _)| is_input(name)) {
        recorded.input(name);
    }
    recorded.finish();
}

fn without_batch(x: &Tensor) -> Tensor {
    Tensor::f32(&x.ty.shape[1..], &x.to_f32())
}

/// Sample `i` of a batch.
fn sample(x: &Tensor, i: usize) -> Tensor {
    let mut shape = x.ty.shape.clone();
    shape[0] = 1;
    let n: usize = shape.iter().product();
    Tensor::f32(&shape, &x.to_f32()[i * n..(i + 1) * n])
}

/// A recording and the checkpoint it belongs to.
pub struct Fixture<'a> {
    recorded: &'a TensorFile,
    checkpoint: &'a TensorFile,
    config: serde_json::Value,
}

impl<'a> Fixture<'a> {
    pub fn new(recorded: &'a TensorFile, checkpoint: &'a TensorFile) -> Fixture<'a> {
        Fixture { recorded, checkpoint, config: checkpoint.config()["transformer"].clone() }
    }

    fn cases(&self) -> Vec<String> {
        let meta = self.recorded.meta();
        meta["cases"].as_object().expect("a recording lists its cases").keys().cloned().collect()
    }

    pub fn config(&self, case: &str) -> TransformerConfig {
        case_config(&self.config, case).unwrap_or_else(|e| panic!("{e:#}"))
    }

    /// The inputs of `stream` in `case`; `None` if it takes no part.
    pub fn stream(&self, case: &str, stream: Stream) -> Option<StreamCase> {
        stream_case(self.recorded, case, stream).unwrap_or_else(|e| panic!("{e:#}"))
    }

    fn perturbation(&self, case: &str) -> Perturbation {
        perturbation(&self.config(case), case)
    }

    /// The program of `case`, as the release computes it that recorded it.
    pub fn module(&self, case: &str, spec: &TransformerSpec, dtype: DType) -> Module {
        let perturbation = spec.perturbation.clone();
        let pass = Pass { perturbation, release: fixtures::release(), ..Pass::default() };
        let weights = Weights::new("model", self.checkpoint);
        build_passes(&self.config(case), &weights, spec, &[pass], dtype).unwrap_or_else(|e| panic!("{case}: {e}"))
    }

    fn run(
        &self,
        case: &str,
        video: Option<&StreamCase>,
        audio: Option<&StreamCase>,
        perturbation: Perturbation,
        dtype: DType,
    ) -> Run {
        let spec =
            TransformerSpec { video: video.map(StreamCase::spec), audio: audio.map(StreamCase::spec), perturbation };
        let module = self.module(case, &spec, dtype);
        let args: Vec<Tensor> = [video, audio].into_iter().flatten().flat_map(StreamCase::arguments).collect();
        evaluate(&module, ENTRY, &args, &[("model", self.checkpoint)])
    }
}

/// Compares with `name`, if a case of it was recorded.
fn expect(recorded: &mut Recorded, name: &str, found: &[f32]) {
    if recorded.has(name) {
        recorded.check(name, found, LIMIT);
    }
}

fn check_case(fixture: &Fixture<'_>, case: &str, recorded: &mut Recorded) {
    let streams = Stream::BOTH.map(|s| fixture.stream(case, s));
    let perturbation = fixture.perturbation(case);
    let run = fixture.run(case, streams[0].as_ref(), streams[1].as_ref(), perturbation, DType::F32);
    for (stream, inputs) in Stream::BOTH.into_iter().zip(&streams) {
        let (Some(inputs), name) = (inputs, stream.name()) else { continue };
        let velocity = run.results[&format!("{name}.velocity")].to_f32();
        expect(recorded, &format!("{case}.velocity.{name}"), &velocity);
        let x0 = denoised(inputs, &velocity);
        expect(recorded, &format!("{case}.x0.{name}"), &x0);
        for i in 0..fixture.config(case).layers {
            if let Some(tap) = run.taps.get(&format!("blocks.{i}.{name}")) {
                expect(recorded, &format!("{case}.block{i}.{name}"), &tap.to_f32());
            }
        }
        if stream == Stream::Video
            && let Some(slots) = fixture.recorded.find(&format!("{case}.extracted_x0"))
        {
            let found = appended_frames(&x0, &slots.ty.shape);
            expect(recorded, &format!("{case}.extracted_x0"), &found);
        }
    }
}

/// `latent − velocity · timestep`, per token.
fn denoised(inputs: &StreamCase, velocity: &[f32]) -> Vec<f32> {
    let (latent, channels) = (inputs.latent.to_f32(), inputs.latent.ty.shape[2]);
    (0..latent.len()).map(|i| latent[i] - velocity[i] * inputs.timesteps[i / channels]).collect()
}

/// The last tokens as frames of `shape` `[1, c, f, h, w]`.
fn appended_frames(tokens: &[f32], shape: &[usize]) -> Vec<f32> {
    let (channels, count) = (shape[1], shape[2] * shape[3] * shape[4]);
    let tail = &tokens[tokens.len() - channels * count..];
    (0..channels).flat_map(|c| (0..count).map(move |t| tail[t * channels + c])).collect()
}

/// Two samples with noise levels and perturbations of their own; a program has one sample, so each is run alone.
fn check_batch(fixture: &Fixture<'_>, recorded: &mut Recorded) {
    let sigmas = fixture.recorded.tensor("batch2.sigma").to_f32();
    let last = fixture.config("batch2").layers - 1;
    let perturbations = [
        Perturbation {
            skip_video_self: BlockSet::from_iter([last]),
            skip_audio_to_video: BlockSet::All,
            ..Perturbation::default()
        },
        Perturbation { skip_audio_self: BlockSet::from_iter([0]), ..Perturbation::default() },
    ];
    let mut found: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
    for (i, perturbation) in perturbations.into_iter().enumerate() {
        let streams = Stream::BOTH.map(|stream| {
            let shared = fixture.stream("uniform", stream).expect("`uniform` has both streams");
            let own = |key: &str| sample(fixture.recorded.tensor(&format!("batch2.{}.{key}", stream.name())), i);
            let timesteps = vec![sigmas[i]; shared.timesteps.len()];
            StreamCase { latent: own("latent"), context: own("context"), timesteps, sigma: sigmas[i], ..shared }
        });
        let run = fixture.run("batch2", Some(&streams[0]), Some(&streams[1]), perturbation, DType::F32);
        for stream in Stream::BOTH {
            let velocity = run.results[&format!("{}.velocity", stream.name())].to_f32();
            found.entry(stream.name()).or_default().extend(velocity);
        }
    }
    for (stream, velocity) in found {
        expect(recorded, &format!("batch2.velocity.{stream}"), &velocity);
    }
}

/// The recording in bf16 is informational: rounding noise of two implementations. Only finiteness can be asserted.
fn print_bf16(fixture: &Fixture<'_>, recorded: &mut Recorded) {
    let streams = Stream::BOTH.map(|s| fixture.stream("bf16", s).expect("`uniform` has both streams"));
    let run = |dtype| fixture.run("bf16", Some(&streams[0]), Some(&streams[1]), Perturbation::default(), dtype);
    let (narrow, wide) = (run(DType::BF16), run(DType::F32));
    for stream in Stream::BOTH {
        let name = format!("{}.velocity", stream.name());
        let found = narrow.results[&name].to_f32();
        assert!(found.iter().all(|v| v.is_finite()), "{name} in bf16 is not finite");
        let key = format!("bf16.velocity.{}", stream.name());
        let distance = |other: &[f32]| ltxc_tests::compare::relative_l2(&found, other);
        println!(
            "{key}: {:.3} from the recording in bf16, {:.3} from f32",
            distance(&recorded.input(&key).to_f32()),
            distance(&wide.results[&name].to_f32())
        );
    }
    let tables = ["bf16.rope_cos", "bf16.rope_sin", "bf16.video.positions"];
    recorded.skip(&tables, "rounded copies of tables that are compared, and of positions");
}

/// What happens before the first block, for the inputs of `uniform`.
fn check_preparation(fixture: &Fixture<'_>, recorded: &mut Recorded) {
    let streams = Stream::BOTH.map(|s| fixture.stream("prep", s).expect("`uniform` has both streams"));
    let run = fixture.run("prep", Some(&streams[0]), Some(&streams[1]), Perturbation::default(), DType::F32);
    for (name, expected) in fixture.recorded.iter().filter(|(name, _)| name.starts_with("prep.")) {
        let Some(tap) = run.taps.get(name) else {
            // Only a context that is passed on unchanged has no value of its own.
            let input = name.strip_prefix("prep.").filter(|n| n.ends_with(".context")).map(|n| format!("in.{n}"));
            match input.and_then(|input| fixture.recorded.find(&input)) {
                Some(input) => recorded.check(name, &input.to_f32(), LIMIT),
                None => recorded.note(false, format!("{name}: the graph has no value of this name"), &[name]),
            }
            continue;
        };
        if name.contains("rope_") {
            recorded.check_largest(name, &heads_first(tap), ROPE_LIMIT);
        } else {
            // Recorded once per token, computed once per distinct timestep.
            let found = tap.to_f32().repeat(expected.ty.elements() / tap.ty.elements().max(1));
            recorded.check(name, &found, LIMIT);
        }
    }
}

/// `[1, t, n, d]` as `[1, n, t, d]`.
fn heads_first(x: &Tensor) -> Vec<f32> {
    let [_, t, n, d] = x.ty.shape[..] else { panic!("{} is not a table for heads", x.ty) };
    let values = x.to_f32();
    (0..n).flat_map(|h| (0..t).map(move |i| (i * n + h) * d)).flat_map(|at| values[at..at + d].to_vec()).collect()
}

#[test]
fn rotary_tables_match_the_recording_at_real_sizes() {
    let mut recorded = Recorded::required("common/rope");
    let meta = recorded.meta().clone();
    for (case, settings) in meta["cases"].as_object().expect("the recording lists its cases") {
        let is_middle = settings["middle"].as_bool().expect("a flag");
        let has_f64_frequencies = case.ends_with(".np");
        let width = settings["dim"].as_u64().expect("a width") as usize;
        let is_tiny = width < 1024;
        // Connectors have positions of their own. A frequency that f32 arithmetic cannot pin down (see the next test) is
        // amplified by angles of 16,000, so f32 grids are compared where they agree.
        if !is_middle || !(has_f64_frequencies || is_tiny) {
            continue;
        }
        let max_positions: Vec<f64> =
            settings["max_pos"].as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect();
        let heads = settings["heads"].as_u64().expect("a count") as usize;
        let table = RopeTable { heads, width, theta: 10000.0, max_positions: &max_positions, has_f64_frequencies };
        let bounds =
            recorded.file.tensor(if case.starts_with("audio") { "audio.positions" } else { "video.positions" });
        let bounds = without_batch(bounds);
        let axes = max_positions.len();
        let tokens = bounds.ty.shape[1];
        let bounds = Tensor::f32(&[axes, tokens, 2], &bounds.to_f32()[..axes * tokens * 2]);
        let [cos, sin] = tables(&table, &bounds);
        for (function, values) in [("cos", cos), ("sin", sin)] {
            // Interleaved tables are recorded per token, every value twice.
            let all = if case.contains("interleaved") {
                values.to_f32().into_iter().flat_map(|v| [v, v]).collect()
            } else {
                heads_first(&values)
            };
            let name = format!("{case}.{function}");
            if recorded.has(&name) {
                recorded.check_largest(&name, &all, ROPE_LIMIT);
            }
        }
    }
    recorded.finish_part();
}

fn tables(table: &RopeTable<'_>, bounds: &Tensor) -> [Tensor; 2] {
    let b = Builder::new("tables");
    let bounds_ty = TensorType::f32(bounds.ty.shape.clone());
    let r = rotation(&b, table, b.param("bounds", bounds_ty, Rate::Generation), DType::F32);
    b.result("cos", r.cos);
    b.result("sin", r.sin);
    let module = Module { functions: vec![b.finish().expect("tables are well typed")], entries: vec!["tables".into()] };
    let outputs = Evaluator::new(&module, &|_, _, _| None).run("tables", std::slice::from_ref(bounds));
    outputs.expect("the arguments fit").try_into().expect("two results")
}

#[test]
fn rotary_frequencies_match_the_recording() {
    let recorded = fixtures::required("common/rope");
    let mut report = Report::default();
    for (name, expected) in recorded.iter() {
        let Some(rest) = name.strip_prefix("freq_grid.") else { continue };
        let [precision, axes, width] = rest.split('.').collect::<Vec<_>>()[..] else { panic!("{name}") };
        let (axes, width): (usize, usize) = (axes.parse().expect("a count"), width.parse().expect("a width"));
        let max_positions = vec![1.0; axes];
        let has_f64_frequencies = precision == "np";
        let table = RopeTable { heads: 1, width, theta: 10000.0, max_positions: &max_positions, has_f64_frequencies };
        let (found, expected) = (frequencies(&table), expected.to_f32());
        if has_f64_frequencies {
            report.check_equal(name, &found, &expected);
            continue;
        }
        // The f32 grid was recorded with a vectorised power that is not correctly rounded: one unit in the last place,
        // and the multiplication by π may carry it to the next.
        let units = found.iter().zip(&expected).map(|(a, b)| a.to_bits().abs_diff(b.to_bits())).max();
        let ok = found.len() == expected.len() && units.is_some_and(|u| u <= 2);
        report.note(ok, format!("{name}: {units:?} units in the last place"));
    }
    report.finish();
}
