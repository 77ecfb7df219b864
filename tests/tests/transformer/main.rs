//! The transformer at odd sizes: properties that hold for any checkpoint, and the structure of full-size modules.
//!
//! Checkpoints are made up: shapes from the published lists, values from the hash of a key.

mod model;

use std::collections::BTreeSet;

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::Op;
use ltxc_ir::{DType, Module};
use ltxc_models::Weights;
use ltxc_models::transformer::{BlockSet, ENTRY, KEY_PREFIX, Perturbation, Stream, StreamSpec, TransformerSpec, build};
use ltxc_tests::compare::relative_l2;
use model::{Checkpoint, GENERATIONS, Model, Random, config_json, parse};

fn stream_spec(generation: &str, stream: Stream) -> StreamSpec {
    let mut r = Random::seeded(&format!("{generation}.{}", stream.name()));
    StreamSpec::new(2 * r.between(2, 8) + 1, 2 * r.between(1, 3) + 1)
}

fn joint_spec(generation: &str) -> TransformerSpec {
    TransformerSpec {
        video: Some(stream_spec(generation, Stream::Video)),
        audio: Some(stream_spec(generation, Stream::Audio)),
        perturbation: Perturbation::default(),
    }
}

fn isolated() -> Perturbation {
    let all = || BlockSet::All;
    Perturbation { skip_audio_to_video: all(), skip_video_to_audio: all(), ..Perturbation::default() }
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], limit: f64) {
    let distance = relative_l2(found, expected);
    assert!(distance <= limit, "{distance:.2e} is more than {limit:.0e}");
}

/// Keys of all weights that a module reads, prefixes of calls included.
fn weight_keys(module: &Module) -> BTreeSet<String> {
    let own = |name: &str| -> Vec<String> {
        let function = module.function(name).expect("callees are in the module");
        let key = |op: &Op| if let Op::Weight(w) = op { Some(w.key.clone()) } else { None };
        function.nodes.iter().filter_map(|n| key(&n.op)).collect()
    };
    let mut keys: BTreeSet<String> = own(ENTRY).into_iter().collect();
    for node in &module.function(ENTRY).expect("the entry").nodes {
        if let Op::Call(call) = &node.op {
            keys.extend(own(&call.function).into_iter().map(|key| format!("{}{key}", call.prefix)));
        }
    }
    keys
}

#[test]
fn every_published_tensor_is_read() {
    for (generation, _) in GENERATIONS {
        let model = Model::new(generation);
        let mut spec = joint_spec(generation);
        spec.video.as_mut().expect("the program has video").has_keyframes_mask = model.config.has_keyframes_embedding;
        let read = weight_keys(&model.build(&spec, DType::F32));
        assert!(read.iter().eq(model.checkpoint.types.keys()), "{generation}: other tensors are read than published");
    }
}

#[test]
fn full_size_models_have_the_published_sizes_and_one_block() {
    // Parameters of the transformer and tensors per block: spec/transformer §2.1.
    let published =
        [("ltx-2", 18_876_174_592u64, 72), ("ltx-2.3", 18_988_838_144, 86), ("ltx-2.5", 18_987_859_200, 84)];
    for (generation, parameters, per_block) in published {
        let config = parse(&config_json(generation));
        let checkpoint = Checkpoint::new(&config);
        let listed: u64 = checkpoint.types.values().map(|ty| ty.elements() as u64).sum();
        assert_eq!(listed, parameters, "{generation}");
        let mut video = StreamSpec::new(32_640, 1024);
        video.timestep_rows = 2;
        video.has_keyframes_mask = config.has_keyframes_embedding;
        let spec = TransformerSpec {
            video: Some(video),
            audio: Some(StreamSpec::new(126, 1024)),
            perturbation: Perturbation::default(),
        };
        let start = std::time::Instant::now();
        let module =
            build(&config, &Weights::new("model", &checkpoint), &spec, DType::BF16).expect("a published model");
        println!("{generation}: built in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
        let [block, entry] = &module.functions[..] else { panic!("{generation}: more than one block function") };
        let calls = entry.nodes.iter().filter(|n| matches!(n.op, Op::Call(_))).count();
        let weights = block.nodes.iter().filter(|n| matches!(n.op, Op::Weight(_))).count();
        assert_eq!((calls, weights), (48, per_block), "{generation}");
    }
}

#[test]
fn isolated_streams_are_those_of_programs_with_one_stream() {
    for (generation, _) in GENERATIONS {
        let model = Model::new(generation);
        let spec = TransformerSpec { perturbation: isolated(), ..joint_spec(generation) };
        let both = model.run(&spec, DType::F32, &[]);
        let video = model.run(&TransformerSpec { audio: None, ..joint_spec(generation) }, DType::F32, &[]);
        let audio = model.run(&TransformerSpec { video: None, ..joint_spec(generation) }, DType::F32, &[]);
        assert_eq!(both["video.velocity"], video["video.velocity"], "{generation}");
        assert_eq!(both["audio.velocity"], audio["audio.velocity"], "{generation}");
        let joint = model.run(&joint_spec(generation), DType::F32, &[]);
        assert_ne!(joint["video.velocity"], video["video.velocity"], "{generation}");
    }
}

#[test]
fn equal_timesteps_in_several_rows_are_one_row() {
    for (generation, _) in GENERATIONS {
        let model = Model::new(generation);
        let one = model.run(&joint_spec(generation), DType::F32, &[]);
        let mut spec = joint_spec(generation);
        for stream in [&mut spec.video, &mut spec.audio] {
            stream.as_mut().expect("the program has both").timestep_rows = 2;
        }
        assert_eq!(model.run(&spec, DType::F32, &[]), one, "{generation}");
        let other = model.run(&spec, DType::F32, &[("video.timesteps", Tensor::f32(&[2], &[0.5, 0.0]))]);
        assert_ne!(other["video.velocity"], one["video.velocity"], "{generation}");
    }
}

#[test]
fn masks_that_hide_nothing_change_nothing() {
    for (generation, _) in GENERATIONS {
        let model = Model::new(generation);
        let mut spec = joint_spec(generation);
        for stream in [&mut spec.video, &mut spec.audio] {
            let stream = stream.as_mut().expect("the program has both");
            (stream.has_self_mask, stream.has_context_mask) = (true, true);
        }
        assert_eq!(
            model.run(&spec, DType::F32, &[]),
            model.run(&joint_spec(generation), DType::F32, &[]),
            "{generation}"
        );
    }
}

#[test]
fn hidden_tokens_might_as_well_be_absent() {
    for (generation, _) in GENERATIONS {
        let model = Model::new(generation);
        let short = stream_spec(generation, Stream::Audio);
        let mut long =
            StreamSpec { tokens: short.tokens + 2, context_tokens: short.context_tokens + 3, ..short.clone() };
        (long.has_self_mask, long.has_context_mask) = (true, true);
        let only =
            |audio: &StreamSpec| TransformerSpec { video: None, audio: Some(audio.clone()), ..joint_spec(generation) };
        let (n, s) = (long.tokens, long.context_tokens);
        // The first tokens do not see the last two, and no token sees the last three of the text.
        let self_mask: Vec<f32> =
            (0..n * n).map(|i| if i / n < short.tokens && i % n >= short.tokens { 0.0 } else { 1.0 }).collect();
        let context_mask: Vec<f32> = (0..s).map(|i| if i < short.context_tokens { 1.0 } else { 0.0 }).collect();
        let inputs = [
            ("audio.self_mask", Tensor::f32(&[n, n], &self_mask)),
            ("audio.context_mask", Tensor::f32(&[s], &context_mask)),
        ];
        let expected = &model.run(&only(&short), DType::F32, &[])["audio.velocity"];
        let found = &model.run(&only(&long), DType::F32, &inputs)["audio.velocity"];
        assert_close(&found[..expected.len()], expected, 1e-6);
    }
}

#[test]
fn equal_strengths_are_as_good_as_none() {
    // Each adds the same logarithm to all scores of a row.
    let model = Model::new("ltx-2");
    let mut spec = TransformerSpec { video: None, ..joint_spec("ltx-2") };
    let audio = spec.audio.as_mut().expect("the program has audio");
    audio.has_self_mask = true;
    let n = audio.tokens;
    let uniform = |strength: f32| [("audio.self_mask", Tensor::f32(&[n, n], &vec![strength; n * n]))];
    let (one, half) = (model.run(&spec, DType::F32, &uniform(1.0)), model.run(&spec, DType::F32, &uniform(0.5)));
    assert_close(&half["audio.velocity"], &one["audio.velocity"], 1e-6);
}

#[test]
fn skipped_blocks_are_functions_of_their_own() {
    let model = Model::new("ltx-2.3");
    let last = model.config.layers - 1;
    let mut spec = joint_spec("ltx-2.3");
    spec.perturbation.skip_video_self = BlockSet::from_iter([last]);
    let module = model.build(&spec, DType::F32);
    let names: Vec<&str> = module.functions.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["block", "block_without_video_self", ENTRY]);
    assert!(!weight_keys(&module).contains(&format!("{KEY_PREFIX}transformer_blocks.{last}.attn1.to_q.weight")));
}

#[test]
fn blocks_stored_in_other_dtypes_are_functions_of_their_own() {
    let mut model = Model::new("ltx-2.5");
    let key = format!("{KEY_PREFIX}transformer_blocks.1.attn1.to_q.weight");
    let before = model.run(&joint_spec("ltx-2.5"), DType::F32, &[]);
    model.checkpoint.types.get_mut(&key).expect("a published key").dtype = DType::F32;
    let module = model.build(&joint_spec("ltx-2.5"), DType::F32);
    let names: Vec<&str> = module.functions.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["block", "block_2", ENTRY]);
    // The values differ by their rounding to bf16 only.
    let after = model.run(&joint_spec("ltx-2.5"), DType::F32, &[]);
    assert_close(&after["video.velocity"], &before["video.velocity"], 1e-2);
}

#[test]
fn narrow_activations_stay_close_to_wide_ones() {
    for (generation, _) in GENERATIONS {
        let model = Model::new(generation);
        let mut spec = joint_spec(generation);
        for stream in [&mut spec.video, &mut spec.audio] {
            let stream = stream.as_mut().expect("the program has both");
            (stream.timestep_rows, stream.has_self_mask, stream.has_context_mask) = (2, true, true);
        }
        spec.video.as_mut().expect("the program has video").has_keyframes_mask = model.config.has_keyframes_embedding;
        let wide = model.run(&spec, DType::F32, &[]);
        // Some ten roundings per block, each of half a unit in the last place, in each of up to four blocks.
        for (dtype, epsilon) in [(DType::BF16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))] {
            let narrow = model.run(&spec, dtype, &[]);
            for (name, expected) in &wide {
                assert_close(&narrow[name], expected, 40.0 * epsilon);
            }
        }
    }
}

#[track_caller]
fn check_error(result: Result<Module, ltxc_models::ModelError>, expected: &[&str]) {
    let text = result.expect_err("the request is wrong").to_string();
    for part in expected {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}

#[test]
fn all_problems_with_weights_are_reported() {
    let mut model = Model::new("ltx-2.3");
    let types = &mut model.checkpoint.types;
    types.remove(&format!("{KEY_PREFIX}transformer_blocks.1.ff.net.2.bias"));
    types.get_mut(&format!("{KEY_PREFIX}proj_out.weight")).expect("a published key").shape[0] += 1;
    types.get_mut(&format!("{KEY_PREFIX}transformer_blocks.0.attn2.to_v.weight")).expect("a published key").dtype =
        DType::I8;
    let result = build(&model.config, &Weights::new("model", &model.checkpoint), &joint_spec("ltx-2.3"), DType::F32);
    check_error(
        result,
        &["3 problem(s)", "blocks.1.ff.net.2.bias` is missing", "proj_out.weight` is", "attn2.to_v.weight` is i8"],
    );
}

#[test]
fn impossible_programs_are_refused() {
    let model = Model::new("ltx-2.3");
    let refuse = |spec: &TransformerSpec, expected: &[&str]| {
        check_error(build(&model.config, &Weights::new("model", &model.checkpoint), spec, DType::F32), expected);
    };
    let none = TransformerSpec { video: None, audio: None, perturbation: Perturbation::default() };
    refuse(&none, &["neither video nor audio"]);
    let mut spec = joint_spec("ltx-2.3");
    spec.perturbation.skip_audio_self = BlockSet::from_iter([48]);
    let video = spec.video.as_mut().expect("the program has video");
    (video.tokens, video.context_tokens, video.has_keyframes_mask) = (0, usize::MAX, true);
    refuse(
        &spec,
        &[
            "4 problem(s)",
            "video has 0 tokens",
            "context tokens, expected 1 to",
            "no embedding",
            "block 48 is to be skipped",
        ],
    );
    let weights = Weights::new("model", &model.checkpoint);
    check_error(
        build(&model.config, &weights, &joint_spec("ltx-2.3"), DType::I32),
        &["is i32, activations are f32, bf16 or f16"],
    );
}
