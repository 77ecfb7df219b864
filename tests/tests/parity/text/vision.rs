//! How Gemma sees an image, and writes about it: vision tower, projector, and a turn with the image in it.
//!
//! Fixture: `gemma3/vision`, which `tools/record_reference.py --only vision` makes; every recorded tensor is compared. What
//! needs no recording runs with every set of fixtures that has a vision tower.

use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::{ImageTokens, Pipeline, Plan, TextSettings, container};
use ltxc_ir::{DType, Module};
use ltxc_models::Weights;
use ltxc_models::text::{self, GemmaConfig, VisionConfig};
use ltxc_runtime::backend::Device;
use ltxc_runtime::executor::Executor;
use ltxc_runtime::media::image_input::load_image;
use ltxc_runtime::media::vision_input::vision_levels;
use ltxc_runtime::pipeline::enhance::{
    DECODE, GROUP, PREFILL, PREFILL_IMAGE, SEE, TurnImage, Writer, can_see, turn_with_image,
};
use ltxc_runtime::tokenizer::Turn;
use ltxc_tests::compare::{Report, relative_l2};
use ltxc_tests::fixtures::{self, root};
use ltxc_tests::harness::{self, Run, processor};
use ltxc_tests::recorded::Recorded;

use super::generate::{best, with_executor};
use super::{Model, json};
use crate::pipeline::gpu;

/// Relative L2 limit of everything.
const LIMIT: f64 = 1e-5;

/// A text encoder that sees; none if this set of fixtures has no such.
struct Seeing {
    model: Model,
    vision: VisionConfig,
}

impl Seeing {
    fn new() -> Option<Seeing> {
        let (model, folder) = (Model::ltx2(), root().join("tiny-gemma3"));
        let config = json(&folder.join("config.json"));
        if !VisionConfig::is_in(&config, &Weights::new("gemma", model.sources()[0].1)) {
            println!("absent: the text encoder of these fixtures has no vision tower");
            return None;
        }
        let preprocessor = folder.join("preprocessor_config.json");
        let preprocessor = preprocessor.is_file().then(|| json(&preprocessor));
        let vision = VisionConfig::from_json(&config, preprocessor.as_ref()).unwrap();
        Some(Seeing { model, vision })
    }

    /// The model and its recording.
    fn recorded() -> Option<(Seeing, Recorded)> {
        let file = fixtures::expected("gemma3/vision");
        if file.is_none() {
            println!("absent: this set of fixtures has no recording of the vision tower");
        }
        Some((Seeing::new()?, Recorded::new(file?)))
    }

    fn weights(&self) -> Weights<'_> {
        Weights::new("gemma", self.model.sources()[0].1)
    }

    fn see(&self, levels: Vec<f32>, dtype: DType) -> Run {
        let hidden_size = self.model.config.gemma.hidden_size;
        let module = text::see(&self.vision, &self.weights(), hidden_size, dtype).unwrap();
        let side = self.vision.image_size;
        harness::evaluate(&module, "see", &[Tensor::f32(&[1, side, side, 3], &levels)], &self.model.sources())
    }

    /// Levels of a picture that is not recorded.
    fn some_levels(&self) -> Vec<f32> {
        let side = self.vision.image_size;
        (0..3 * side * side).map(|i| ((i * i / 7 + 31 * i) % 256) as f32).collect()
    }

    /// A plan that reads pieces of `piece` tokens, an image, and single tokens.
    fn plan(&self, config: &GemmaConfig, [piece, slots]: [usize; 2], device: &Device) -> Plan {
        let (weights, file) = (self.weights(), self.model.sources()[0].1);
        let options = Options { verify: true, ..Options::default() };
        let source = harness::source("gemma", file);
        let mut builder = PlanBuilder::new("ltxc-tests", device.target.clone(), options, vec![source]);
        let count = self.vision.soft_tokens();
        let read = |tokens, image| text::generate(config, &weights, [tokens, slots], image, DType::F32).unwrap();
        let programs: [(&str, &str, Module); 4] = [
            (SEE, "see", text::see(&self.vision, &weights, config.hidden_size, DType::F32).unwrap()),
            (PREFILL, "generate", read(piece, None)),
            (PREFILL_IMAGE, "generate", read(piece + count, Some(count))),
            (DECODE, "generate", read(1, None)),
        ];
        for (name, entry, module) in &programs {
            builder.add(GROUP, name, module, entry).unwrap_or_else(|e| panic!("{e}"));
        }
        let [begin, soft, end] = self.vision.token_ids.map(|id| id as u32);
        let text = TextSettings { image: Some(ImageTokens { begin, soft, end }), ..TextSettings::default() };
        let plan = builder.finish(Pipeline { text, ..Pipeline::default() }).unwrap_or_else(|e| panic!("{e}"));
        let bytes = container::encode(&plan).unwrap_or_else(|e| panic!("{e}"));
        container::decode(&bytes).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Scores of what follows `ids`, all of which are read at once, and all named values.
    fn whole(&self, config: &GemmaConfig, ids: &[i32], image: &TurnImage) -> (Vec<f32>, Run) {
        let (tokens, count) = (ids.len(), self.vision.soft_tokens());
        let module = text::generate(config, &self.weights(), [tokens; 2], Some(count), DType::F32).unwrap();
        let scalar = |value: usize| Tensor::i32(&[], &[value as i32]);
        let mut args = vec![Tensor::i32(&[tokens], ids), scalar(0), scalar(0)];
        for &kind in &config.layers {
            let attention = config.attention(kind);
            let shape = [1, tokens, attention.kv_heads, attention.head_dim];
            let empty = Tensor::f32(&shape, &vec![0.0; shape.iter().product()]);
            args.extend([empty.clone(), empty]);
        }
        args.extend([Tensor::f32(&[1, count, config.hidden_size], &image.soft_tokens), scalar(image.at)]);
        let run = harness::evaluate(&module, "generate", &args, &self.model.sources());
        (run.results["logits"].to_f32(), run)
    }
}

/// What the tower sees in a picture, through a plan.
fn soft_tokens(executor: &mut Executor<'_>, levels: &[f32]) -> Vec<f32> {
    executor.write(SEE, "levels", levels).unwrap();
    executor.run(SEE).unwrap_or_else(|e| panic!("{e}"));
    executor.read(SEE, "soft_tokens").unwrap_or_else(|e| panic!("{e}")).into_owned()
}

/// The turn of the recording.
fn turn(seeing: &Seeing, executor: &mut Executor<'_>, levels: &[f32]) -> (Turn, TurnImage) {
    let soft_tokens = soft_tokens(executor, levels);
    let said = "User Raw Input Prompt: A lighthouse at night..";
    turn_with_image(executor, &seeing.model.tokenizer, "Say what happens.", said, soft_tokens).unwrap()
}

/// Scores of what follows a turn, and of what follows each of `written` tokens that are then chosen as the best ones.
fn cached(executor: &mut Executor<'_>, (turn, image): &(Turn, TurnImage), written: usize) -> Vec<Vec<f32>> {
    let mut writer = Writer::begin(executor, turn, Some(image)).unwrap_or_else(|e| panic!("{e}"));
    let mut scores = vec![writer.read_turn(executor, turn, Some(image)).unwrap_or_else(|e| panic!("{e}"))];
    for i in 0..written {
        let token = best(&scores[i]);
        scores.push(writer.read(executor, token).unwrap_or_else(|e| panic!("{e}")));
    }
    scores
}

#[test]
fn an_image_becomes_soft_tokens_as_recorded() {
    let Some((seeing, mut recorded)) = Seeing::recorded() else { return };
    let run = seeing.see(recorded.input("pixels_uint8").to_f32(), DType::F32);
    recorded.check("pixel_values", &run.taps["pixel_values"].to_f32(), LIMIT);
    recorded.check_tensor("tower.embeddings", &run.taps["vision_tower.vision_model.embeddings"], LIMIT);
    for i in 0..seeing.vision.layers {
        let tap = &run.taps[&format!("vision_tower.vision_model.encoder.layers.{i}")];
        recorded.check_tensor(&format!("tower.layer{i}"), tap, LIMIT);
    }
    recorded.check_tensor("tower.output", &run.taps["vision_tower.vision_model.post_layernorm"], LIMIT);
    recorded.check_tensor("soft_tokens", &run.results["soft_tokens"], LIMIT);
    recorded.finish_part();
}

/// A level may be one off: PIL rounds between rows and columns, which alone changes a twentieth of the levels here.
#[test]
fn images_are_prepared_as_recorded() {
    let Some((seeing, mut recorded)) = Seeing::recorded() else { return };
    let image = load_image(&root().join("inputs").join(recorded.meta()["image"].as_str().unwrap())).unwrap();
    let levels = vision_levels(&image, seeing.vision.image_size).unwrap();
    let levels: Vec<i64> = levels.iter().map(|&v| v as i64).collect();
    recorded.check_bytes("pixels_uint8", &levels, (1, 0.1));
    recorded.finish_part();
}

#[test]
fn scores_are_those_of_the_recorded_turn() {
    let Some((seeing, mut recorded)) = Seeing::recorded() else { return };
    let config = &seeing.model.config.gemma;
    let levels = recorded.input("pixels_uint8").to_f32();
    let device = processor();
    let plan = seeing.plan(config, [16, 1024], &device);
    let (turn, image) = with_executor(&seeing.model, &plan, &device, |executor| turn(&seeing, executor, &levels));
    recorded.check_ints("ids", &turn.ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());

    let (scores, run) = seeing.whole(config, &turn.ids, &image);
    recorded.check("image.logits", &scores, LIMIT);
    recorded.check("hidden", &normed(&seeing, &run.taps[&format!("layers.{}", config.layers.len() - 1)]), LIMIT);
    let (found, causal) = recorded.pair("causal.logits", &scores);
    let difference = relative_l2(&found, &causal);
    let line = format!("without the mask of the image, scores differ by {difference:.1e}");
    recorded.note(difference > 100.0 * LIMIT, line, &["causal.logits.sample", "causal.logits.stats"]);
    let mut narrow = config.clone();
    narrow.sliding.window = Some(recorded.meta()["narrow_window"].as_u64().unwrap() as usize);
    recorded.check("narrow.logits", &seeing.whole(&narrow, &turn.ids, &image).0, LIMIT);
    recorded.finish_part();
}

/// The norm behind the last layer, of every token.
fn normed(seeing: &Seeing, states: &Tensor) -> Vec<f32> {
    let config = &seeing.model.config.gemma;
    let weight = seeing.model.sources()[0].1.tensor("language_model.model.norm.weight").to_f32();
    let norm = |row: &[f32]| -> Vec<f32> {
        let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / row.len() as f64;
        let scale = (mean + config.eps).sqrt().recip();
        row.iter().zip(&weight).map(|(&v, &w)| (f64::from(v) * scale * (1.0 + f64::from(w))) as f32).collect()
    };
    states.to_f32().chunks(config.hidden_size).flat_map(norm).collect()
}

#[track_caller]
fn check_greedy(device: &Device) {
    let Some((seeing, mut recorded)) = Seeing::recorded() else { return };
    let levels = recorded.input("pixels_uint8").to_f32();
    let ids: Vec<i64> = recorded.input("greedy.ids").ints().to_vec();
    let plan = seeing.plan(&seeing.model.config.gemma, [8, 1024], device);
    let scores = with_executor(&seeing.model, &plan, device, |executor| {
        let turn = turn(&seeing, executor, &levels);
        cached(executor, &turn, ids.len() - 1)
    });
    let written: Vec<i64> = scores.iter().map(|scores| i64::from(best(scores))).collect();
    recorded.check_ints("greedy.ids", &written);
    recorded.check("greedy.logits", &scores.concat(), LIMIT);
    recorded.finish_part();
}

#[test]
fn what_follows_is_as_recorded() {
    check_greedy(&processor());
}

#[test]
fn what_follows_is_as_recorded_on_a_gpu() {
    gpu().iter().for_each(check_greedy);
}

/// Reading in pieces of any length, and going on token by token, is reading all at once.
#[track_caller]
fn check_against_whole(device: &Device, window: Option<usize>, pieces: &[usize]) {
    let Some(seeing) = Seeing::new() else { return };
    let mut config = seeing.model.config.gemma.clone();
    config.sliding.window = window.or(config.sliding.window);
    let mut report = Report::default();
    for &piece in pieces {
        let plan = seeing.plan(&config, [piece, 1024], device);
        assert!(can_see(&plan));
        let ((turn, image), found) = with_executor(&seeing.model, &plan, device, |executor| {
            let turn = turn(&seeing, executor, &seeing.some_levels());
            let found = cached(executor, &turn, 3);
            (turn, found)
        });
        let mut ids = turn.ids.clone();
        for (i, scores) in found.iter().enumerate() {
            let expected = seeing.whole(&config, &ids, &image).0;
            report.check(&format!("pieces of {piece}, scores of token {i}"), scores, &expected, LIMIT);
            ids.push(best(&expected));
        }
    }
    report.finish();
}

#[test]
fn an_image_is_read_in_pieces_of_any_length() {
    check_against_whole(&processor(), None, &[1, 5, 8, 128]);
}

#[test]
fn an_image_is_read_in_pieces_on_a_gpu() {
    gpu().iter().for_each(|device| check_against_whole(device, None, &[8]));
}

/// The tokens of an image see each other beyond the window.
#[test]
fn a_window_may_be_shorter_than_the_image() {
    check_against_whole(&processor(), Some(2), &[8]);
}

#[test]
fn words_that_stand_for_images_are_refused() {
    let Some(seeing) = Seeing::new() else { return };
    let device = processor();
    let plan = seeing.plan(&seeing.model.config.gemma, [8, 1024], &device);
    with_executor(&seeing.model, &plan, &device, |executor| {
        let [_, soft, _] = seeing.vision.token_ids.map(|id| id as i32);
        let word = seeing.model.tokenizer.decode(&[soft]).unwrap();
        let soft_tokens = soft_tokens(executor, &seeing.some_levels());
        let found = turn_with_image(executor, &seeing.model.tokenizer, "Say.", &format!("a {word} b"), soft_tokens);
        let problem = found.unwrap_err().to_string();
        assert!(problem.contains("words that stand for images") && problem.contains("leave them out"), "{problem}");
    });
}
