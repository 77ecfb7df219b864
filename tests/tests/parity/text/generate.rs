//! Gemma as a writer: with keys and values kept, it must say what it says about the whole text at once.
//!
//! The oracle is the same graph with room for the whole text, in the reference evaluator; and what that says is what the
//! encoder's graph says, of which hidden states were recorded.

use std::sync::atomic::AtomicBool;

use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::{Pipeline, Plan, SlotPlace, container};
use ltxc_ir::{Builder, DType, Module, Rate, TensorType};
use ltxc_models::text::{self, GemmaConfig};
use ltxc_models::{Functions, Weights};
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::pipeline::Silent;
use ltxc_runtime::pipeline::enhance::{DECODE, GROUP, MOST_WRITTEN, PREFILL, answer, can_enhance, enhance};
use ltxc_runtime::tokenizer::Turn;
use ltxc_runtime::weights::WeightFiles;
use ltxc_tests::compare::{Report, relative_l2};
use ltxc_tests::harness::{self, processor};

use super::Model;
use crate::pipeline::gpu;

/// Relative L2 limit of scores.
const LIMIT: f64 = 1e-5;

/// The same between texts whose positions begin elsewhere, as the encoder's do: behind the pads of a prompt of 1024 tokens,
/// where a rounded angle is off by up to 1024 · 2⁻²⁴.
const SHIFTED_LIMIT: f64 = 6.1e-5;

/// Tokens that are chosen after a text.
const WRITTEN: usize = 12;

/// Scores of what follows `ids`, all of which are read at once, with nothing kept from before.
fn whole(model: &Model, config: &GemmaConfig, ids: &[i32]) -> Vec<f32> {
    let n = ids.len();
    let module = text::generate(config, &model.weights().gemma, [n, n], None, DType::F32).unwrap();
    let zero = Tensor::i32(&[], &[0]);
    let mut args = vec![Tensor::i32(&[n], ids), zero.clone(), zero];
    for &kind in &config.layers {
        let attention = config.attention(kind);
        let empty = Tensor::zeros(TensorType::f32([1, n, attention.kv_heads, attention.head_dim]));
        args.extend([empty.clone(), empty]);
    }
    harness::reference(&module, "generate", &args, &model.sources()).results["logits"].to_f32()
}

/// The same by the encoder's graph, with scores from the embedding table.
fn encoded(model: &Model, config: &GemmaConfig, ids: &[i32]) -> Vec<f32> {
    let b = Builder::new("whole");
    let (functions, weights) = (Functions::default(), model.weights().gemma);
    let tokens = b.param("ids", TensorType::i32([ids.len()]), Rate::Step);
    let valid = b.param("valid", TensorType::f32([ids.len()]), Rate::Step);
    let states = text::gemma(&b, &functions, config, &weights, tokens, valid, DType::F32);
    let last = b.slice_axis(*states.last().expect("there are states"), 1, ids.len() - 1, ids.len());
    let table = &model.sources()[0].1.tensor("language_model.model.embed_tokens.weight").ty;
    let table = b.weight("gemma", "language_model.model.embed_tokens.weight", table.clone());
    b.result("scores", b.matmul_transposed(last, table));
    let module = functions.into_module(b.finish().unwrap()).unwrap();
    let args = [Tensor::i32(&[ids.len()], ids), Tensor::f32(&[ids.len()], &vec![1.0; ids.len()])];
    harness::reference(&module, "whole", &args, &model.sources()).results["scores"].to_f32()
}

/// A plan that reads pieces of `piece` tokens and single ones, with room for `slots`.
fn plan(model: &Model, config: &GemmaConfig, [piece, slots]: [usize; 2], device: &Device) -> Plan {
    let weights = Weights::new("gemma", model.sources()[0].1);
    let options = Options { verify: true, ..Options::default() };
    let source = harness::source("gemma", model.sources()[0].1);
    let mut builder = PlanBuilder::new("ltxc-tests", device.target.clone(), options, vec![source]);
    for (name, tokens) in [(PREFILL, piece), (DECODE, 1)] {
        let module: Module = text::generate(config, &weights, [tokens, slots], None, DType::F32).unwrap();
        builder.add(GROUP, name, &module, "generate").unwrap_or_else(|e| panic!("{e}"));
    }
    let plan = builder.finish(Pipeline::default()).unwrap_or_else(|e| panic!("{e}"));
    let bytes = container::encode(&plan).unwrap_or_else(|e| panic!("{e}"));
    container::decode(&bytes).unwrap_or_else(|e| panic!("{e}"))
}

/// Runs `body` with an executor of `plan`.
pub fn with_executor<T>(model: &Model, plan: &Plan, device: &Device, body: impl FnOnce(&mut Executor<'_>) -> T) -> T {
    let weights =
        WeightFiles::open(plan, &[model.sources()[0].1.path.clone()], false).unwrap_or_else(|e| panic!("{e}"));
    let interrupt = AtomicBool::new(false);
    let backend = open(device).unwrap_or_else(|e| panic!("{e}"));
    body(&mut Executor::on(backend, plan, &weights, &interrupt).unwrap_or_else(|e| panic!("{e}")))
}

/// Scores of what follows `ids`, and of what follows each token that is then chosen as the best one.
fn cached(executor: &mut Executor<'_>, ids: &[i32], written: usize) -> Vec<Vec<f32>> {
    let piece = executor.program(PREFILL).unwrap().input("ids").unwrap().ty.elements();
    for slot in executor.program(PREFILL).unwrap().inputs.iter().filter(|s| s.name.contains('.')) {
        executor.write(PREFILL, &slot.name, &vec![0u8; slot.ty.bytes()]).unwrap();
    }
    let first = ids.len().next_multiple_of(piece) - ids.len();
    let padded = [vec![0; first], ids.to_vec()].concat();
    let mut run = |program: &str, row: usize, ids: &[i32]| {
        executor.write(program, "ids", ids).unwrap();
        executor.write(program, "row", &[row as i32]).unwrap();
        executor.write(program, "first", &[first as i32]).unwrap();
        executor.run(program).unwrap_or_else(|e| panic!("{e}"));
        executor.read(program, "logits").unwrap_or_else(|e| panic!("{e}")).into_owned()
    };
    let mut scores = Vec::new();
    for (i, ids) in padded.chunks(piece).enumerate() {
        scores = vec![run(PREFILL, i * piece, ids)];
    }
    for i in 0..written {
        scores.push(run(DECODE, padded.len() + i, &[best(&scores[i])]));
    }
    scores
}

/// The token with the largest score.
pub fn best(scores: &[f32]) -> i32 {
    (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).expect("there are scores") as i32
}

/// `n` tokens: the recorded prompt, again and again.
fn text_ids(model: &Model, n: usize) -> Vec<i32> {
    model.prompt("pos").ids().iter().copied().cycle().take(n).collect()
}

#[track_caller]
fn check_against_whole(config: &GemmaConfig, device: &Device, piece: usize) {
    let model = Model::ltx2();
    // Not a multiple of a piece, so that there are pads.
    let ids = text_ids(&model, 45);
    assert_ne!(ids.len() % piece, 0);
    let plan = plan(&model, config, [piece, 256], device);
    let found = with_executor(&model, &plan, device, |executor| cached(executor, &ids, WRITTEN));
    let (mut report, mut ids) = (Report::default(), ids);
    for (i, scores) in found.iter().enumerate() {
        let expected = whole(&model, config, &ids);
        report.check(&format!("scores after {} tokens", ids.len()), scores, &expected, LIMIT);
        report.check_equal(&format!("token {i}"), &[best(scores)], &[best(&expected)]);
        ids.push(best(&expected));
    }
    report.finish();
}

#[test]
fn what_is_written_follows_from_what_is_encoded() {
    let model = Model::ltx2();
    let (config, mut report) = (&model.config.gemma, Report::default());
    for n in [1, 8, 45] {
        let ids = text_ids(&model, n);
        let (found, expected) = (whole(&model, config, &ids), encoded(&model, config, &ids));
        report.check(&format!("scores after {n} tokens"), &found, &expected, SHIFTED_LIMIT);
        report.check_equal(&format!("token {n}"), &[best(&found)], &[best(&expected)]);
    }
    report.finish();
}

#[test]
fn kept_keys_and_values_change_nothing() {
    check_against_whole(&Model::ltx2().config.gemma, &processor(), 8);
}

#[test]
fn kept_keys_and_values_change_nothing_on_a_gpu() {
    let Some(device) = gpu() else { return };
    check_against_whole(&Model::ltx2().config.gemma, &device, 8);
}

/// Also where no layer slides, and where a window is one token.
#[test]
fn windows_of_any_length_are_kept() {
    let config = Model::ltx2().config.gemma;
    for window in [None, Some(1), Some(7), Some(16)] {
        let mut config = config.clone();
        config.sliding.window = window;
        check_against_whole(&config, &processor(), 16);
    }
}

/// The published window, and a text beyond it: read in pieces with kept keys, and at once.
#[test]
fn a_text_beyond_the_published_window_is_read_in_pieces() {
    let (model, device) = (Model::ltx2(), processor());
    let mut config = model.config.gemma.clone();
    config.sliding.window = Some(1024);
    let ids = text_ids(&model, 1152);
    let scores = |piece: usize, config: &GemmaConfig| {
        let plan = plan(&model, config, [piece, 1280], &device);
        with_executor(&model, &plan, &device, |executor| cached(executor, &ids, 4))
    };
    let (at_once, pieces) = (scores(1152, &config), scores(64, &config));
    let mut report = Report::default();
    for (i, (found, expected)) in pieces.iter().zip(&at_once).enumerate() {
        report.check(&format!("scores after {} tokens", 1152 + i), found, expected, LIMIT);
    }
    config.sliding.window = Some(2048);
    let unlimited = scores(64, &config);
    let difference = relative_l2(&unlimited[0], &pieces[0]);
    report.note(difference > 100.0 * LIMIT, format!("without the window, scores differ by {difference:.1e}"));
    report.finish();
}

#[test]
fn caches_are_kept_in_place() {
    let (model, device) = (Model::ltx2(), processor());
    let plan = plan(&model, &model.config.gemma, [8, 64], &device);
    assert!(can_enhance(&plan));
    let cache_bytes: u64 = (plan.program(DECODE).unwrap().inputs.iter())
        .filter(|slot| slot.name.contains('.'))
        .map(|slot| (slot.ty.bytes() as u64).next_multiple_of(plan.target.alignment))
        .sum();
    assert_eq!(plan.state_bytes(), cache_bytes);
    for program in [PREFILL, DECODE].map(|name| plan.program(name).unwrap()) {
        for slot in program.inputs.iter().filter(|slot| slot.name.contains('.')) {
            assert!(matches!(slot.place, SlotPlace::State { .. }), "{}", slot.name);
            assert_eq!(program.output(&slot.name).map(|s| s.place), Some(slot.place), "{}", slot.name);
        }
    }
}

/// What is written depends on the seed alone, ends where the model ends its turn, and does not depend on what was
/// written before.
#[test]
fn writing_is_seeded_and_stops() {
    let (model, device) = (Model::ltx2(), processor());
    let mut plan = plan(&model, &model.config.gemma, [32, 1024], &device);
    with_executor(&model, &plan, &device, |executor| {
        let mut write =
            |said: &str, seed| enhance(executor, &model.tokenizer, "Say more.", said, None, seed, &mut Silent);
        let first = write("a red fox", 1).unwrap();
        assert!(!first.is_empty() && first.chars().next().is_some_and(char::is_alphabetic), "{first}");
        assert_ne!(write("a red fox", 2).unwrap(), first);
        assert_ne!(write("a boat", 1).unwrap(), first);
        assert_eq!(write("a red fox", 1).unwrap(), first);
        let most = 1024 - MOST_WRITTEN;
        let problem = write(&"fox ".repeat(most), 1).unwrap_err().to_string();
        assert!(problem.contains(&format!("{most} at most")), "{problem}");
    });
    // Programs that do not keep what they read cannot write.
    plan.programs.retain(|program| program.name != DECODE);
    assert!(!can_enhance(&plan));
}

#[test]
fn the_token_that_ends_an_answer_is_not_written() {
    let (model, device) = (Model::ltx2(), processor());
    let plan = plan(&model, &model.config.gemma, [32, 1024], &device);
    let turn = model.tokenizer.encode_turn("a red fox").unwrap();
    let end = model.tokenizer.encode("<end_of_turn>").unwrap().ids()[1];
    assert!(turn.stops.contains(&end) && turn.ids.contains(&end), "{turn:?}");
    with_executor(&model, &plan, &device, |executor| {
        let mut written =
            |stops: Vec<i32>| answer(executor, &Turn { stops, ..turn.clone() }, None, 3, &mut Silent).unwrap();
        let endless = written(Vec::new());
        assert_eq!(endless.len(), MOST_WRITTEN);
        let stop = endless[40];
        let until = endless.iter().position(|&token| token == stop).unwrap();
        assert_eq!(written(vec![-1, stop]), endless[..until]);
    });
}

#[test]
fn the_encoder_of_ltx25_does_not_write() {
    let Some(model) = Model::ltx25() else { return println!("absent: this set of fixtures has no LTX-2.5") };
    let weights = Weights::new("gemma", model.sources()[0].1);
    let problem = text::generate(&model.config.gemma, &weights, [1, 8], None, DType::F32).unwrap_err().to_string();
    assert!(problem.contains("LTX-2.5") && problem.contains("not trained to write"), "{problem}");
}
