//! Text conditioning: tokenizer, Gemma, feature extractor, connectors.
//!
//! Fixtures: `gemma3/{tokenizer,gemma_hidden}` and `text_context` of every model; every recorded tensor is compared.
//! Limits are those of the fixtures' README: exact ids, 1e-5, and 2e-4 for Gemma 4's hidden states, whose attention scale
//! of 1 amplifies rounding (what follows is then compared from the recorded states).

mod generate;
mod odd_sizes;
mod vision;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::Release;
use ltxc_ir::{Builder, DType, Module, Rate, TensorType};
use ltxc_models::text::{self, Modality, TextConfig, TextWeights};
use ltxc_models::{Functions, TensorDirectory, Weights};
use ltxc_runtime::tokenizer::{CONTEXT_TOKENS, Prompt, Tokenizer};
use ltxc_tests::fixtures::{self, TensorFile, root};
use ltxc_tests::harness::{self, Run};
use ltxc_tests::recorded::{Recorded, statistics};
use serde_json::Value;

const LIMIT: f64 = 1e-5;
const PROMPTS: [&str; 3] = ["pos", "neg", "odd"];

/// A model with its text encoder, and where the reference's values are.
pub struct Model {
    pub config: TextConfig,
    tokenizer: Tokenizer,
    gemma: TensorFile,
    transformer: TensorFile,
    /// Source whose files hold the text projection.
    projection: &'static str,
    /// Recorded files: `<encoder>/gemma_hidden`, `<model>/text_context`.
    encoder: &'static str,
    pub name: &'static str,
    /// Limit of hidden states and of what is computed from them.
    state_limit: f64,
}

impl Model {
    fn with_gemma3(name: &'static str, checkpoint: &str) -> Model {
        let folder = root().join("tiny-gemma3");
        let gemma_config = json(&folder.join("config.json"));
        let transformer = TensorFile::read(&root().join(checkpoint));
        Model {
            config: TextConfig::from_json(&gemma_config, &transformer.config()["transformer"]).unwrap(),
            tokenizer: Tokenizer::from_folder(&folder).unwrap(),
            gemma: TensorFile::read(&folder.join("model.safetensors")),
            transformer,
            projection: "model",
            encoder: "gemma3",
            name,
            state_limit: LIMIT,
        }
    }

    pub fn ltx2() -> Model {
        Model::with_gemma3("ltx2", "tiny-ltx2/ltx-2-tiny.safetensors")
    }

    pub fn ltx23() -> Model {
        Model::with_gemma3("ltx23", "tiny-ltx23/ltx-2.3-tiny.safetensors")
    }

    /// LTX-2.5, if this set of fixtures has it and what release 1.2.0 computes with it, the first one that can.
    fn ltx25() -> Option<Model> {
        if fixtures::release() == Release::V1_0_0 {
            return None;
        }
        let gemma = TensorFile::read(&first_file(&root().join("tiny-ltx25/text_encoders"))?);
        let transformer = TensorFile::read(&first_file(&root().join("tiny-ltx25/diffusion_models"))?);
        let gemma_config: Value = serde_json::from_str(&gemma.metadata["gemma_config"]).unwrap();
        let asset = |key: &str| gemma.find(key).map(Tensor::to_bytes);
        let side_file = asset("hf_asset__tokenizer_config.json");
        Some(Model {
            config: TextConfig::from_json(&gemma_config, &transformer.config()["transformer"]).unwrap(),
            tokenizer: Tokenizer::from_bytes(&asset("tokenizer_json").unwrap(), side_file.as_deref()).unwrap(),
            gemma,
            transformer,
            projection: "gemma",
            encoder: "ltx25/gemma4",
            name: "ltx25",
            state_limit: 2e-4,
        })
    }

    pub fn sources(&self) -> [(&str, &TensorFile); 2] {
        [("gemma", &self.gemma), ("model", &self.transformer)]
    }

    pub fn weights(&self) -> TextWeights<'_> {
        let gemma = Weights::new("gemma", &self.gemma);
        let transformer = Weights::new("model", &self.transformer);
        let projection = if self.projection == "gemma" { gemma.clone() } else { transformer.clone() };
        TextWeights { gemma, projection, transformer }
    }

    pub fn registers(&self) -> usize {
        self.config.connectors.registers(&self.weights().transformer, CONTEXT_TOKENS).unwrap()
    }

    pub fn prompt(&self, name: &str) -> Prompt {
        let meta = fixtures::required(&format!("{}/tokenizer", self.encoder)).meta();
        self.tokenizer.encode(meta["prompts"][name].as_str().unwrap()).unwrap()
    }

    fn encode(&self, prompt: &Prompt, slots: usize, dtype: DType) -> Run {
        let module = text::encode(&self.config, &self.weights(), slots, dtype).unwrap();
        harness::evaluate(&module, "encode", &encode_arguments(prompt, slots, self.registers()), &self.sources())
    }

    fn connect(&self, inputs: [Tensor; 2]) -> Run {
        let (tokens, dtype) = (inputs[0].ty.shape[1], inputs[0].ty.dtype);
        let weights = self.weights().transformer;
        let module = text::connect(&self.config.connectors, &weights, tokens, dtype).unwrap();
        harness::evaluate(&module, "connect", &inputs, &self.sources())
    }

    /// The features from recorded hidden states alone.
    fn features_of(&self, states: &[Tensor]) -> Run {
        let b = Builder::new("main");
        let params: Vec<_> = (states.iter().enumerate())
            .map(|(i, s)| b.param(&format!("state.{i}"), s.ty.clone(), Rate::Step))
            .collect();
        let tokens = states[0].ty.shape[1];
        let valid = b.param("valid", TensorType::f32([tokens]), Rate::Step);
        let (functions, weights) = (Functions::default(), self.weights());
        let made = self.config.connectors.made_widths();
        let extractor = self.config.extractor;
        let features = text::features(&b, &functions, extractor, &weights.projection, &params, valid, &made);
        for (modality, value) in Modality::ALL.into_iter().zip(features) {
            b.result(modality.name(), value);
        }
        weights.projection.finish().unwrap();
        let module = functions.into_module(b.finish().unwrap()).unwrap();
        let valid = Tensor::f32(&[tokens], &vec![1.0; tokens]);
        let args: Vec<Tensor> = states.iter().cloned().chain([valid]).collect();
        harness::evaluate(&module, "main", &args, &self.sources())
    }

    /// Features in front, registers behind them: a connector's input.
    pub fn place(&self, modality: Modality, features: &[f32], tokens: usize) -> Tensor {
        let key = format!("model.diffusion_model.{}_embeddings_connector.learnable_registers", modality.name());
        let registers = self.transformer.tensor(&key);
        let width = registers.ty.shape[1];
        let mut placed = features.to_vec();
        for p in features.len() / width..tokens {
            let row = p % registers.ty.shape[0];
            placed.extend(registers.floats()[row * width..][..width].iter().map(|&v| v as f32));
        }
        Tensor::f32(&[1, tokens, width], &placed)
    }
}

pub fn encode_arguments(prompt: &Prompt, slots: usize, registers: usize) -> [Tensor; 3] {
    let inputs = prompt.inputs(slots, registers).unwrap();
    let ids = Tensor::i32(&[slots], &inputs.ids);
    [ids, Tensor::f32(&[slots], &inputs.valid), Tensor::i32(&[CONTEXT_TOKENS], &inputs.place)]
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

fn first_file(folder: &Path) -> Option<PathBuf> {
    std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).min()
}

/// The last `n` rows of `[1, t, ..]`.
fn last_rows(tensor: &Tensor, n: usize) -> Vec<f32> {
    let per_row: usize = tensor.ty.shape[2..].iter().product();
    let all = tensor.to_f32();
    all[all.len() - n * per_row..].to_vec()
}

/// Mean, unbiased standard deviation, largest magnitude, L2 norm: the statistics of recorded hidden states.
fn state_statistics(values: &[f32]) -> Vec<f32> {
    let s = statistics(values);
    [s[0], s[1], s[2].abs().max(s[3].abs()), s[4]].map(|v| v as f32).to_vec()
}

#[track_caller]
fn check_tokenizer(model: &Model) {
    assert_eq!(CONTEXT_TOKENS, text::CONTEXT_TOKENS);
    let mut recorded = Recorded::required(&format!("{}/tokenizer", model.encoder));
    let meta = recorded.meta().clone();
    for (name, prompt) in meta["prompts"].as_object().unwrap() {
        let prompt = model.tokenizer.encode(prompt.as_str().unwrap()).unwrap();
        let inputs = prompt.inputs(CONTEXT_TOKENS, model.registers()).unwrap();
        let ids: Vec<i64> = inputs.ids.iter().map(|&id| id as i64).collect();
        let mask: Vec<i64> = inputs.valid.iter().map(|&v| v as i64).collect();
        recorded.check_ints(&format!("{name}.input_ids"), &ids);
        recorded.check_ints(&format!("{name}.attention_mask"), &mask);
        let n = meta["n_valid"][name].as_u64().unwrap() as usize;
        recorded.check_other(&format!("{name}.n_valid"), &[prompt.ids().len()], &[n]);
        let is_full = n == CONTEXT_TOKENS || prompt.cut().is_empty();
        recorded.note(is_full, format!("{name}: {} tokens cut", prompt.cut().len()), &[]);
        let decoded = model.tokenizer.decode(&prompt.ids()[..n.min(60)]).unwrap();
        recorded.note(meta["decoded"][name] == decoded, format!("{name}: begins with `{decoded}`"), &[]);
    }
    recorded.finish();
}

/// Runs the encoder in several buckets, one of them the full length.
#[track_caller]
fn check_hidden(model: &Model) {
    let mut recorded = Recorded::required(&format!("{}/gemma_hidden", model.encoder));
    for name in PROMPTS {
        let prompt = model.prompt(name);
        let n = prompt.ids().len();
        recorded.check_ints(&format!("{name}.n_valid"), &[n as i64]);
        let bucket = prompt.bucket((5..=10).map(|k| 1 << k)).unwrap();
        let mut buckets = vec![bucket, 2 * bucket];
        buckets.extend((name == "neg").then_some(CONTEXT_TOKENS));
        for slots in buckets {
            let run = model.encode(&prompt, slots, DType::F32);
            recorded.context(format!("[{slots}] "));
            for i in 0..model.config.gemma.states() {
                let found = last_rows(&run.taps[&format!("hidden_states.{i}")], n);
                let name = format!("{name}.hidden.{i}");
                recorded.check(&format!("{name}.stats"), &state_statistics(&found), model.state_limit);
                recorded.check(&name, &found, model.state_limit);
            }
            if name == "pos" {
                check_inner(model, &mut recorded, &run, n);
            }
        }
    }
    recorded.finish();
}

/// Compares the recorded values inside layers.
fn check_inner(model: &Model, recorded: &mut Recorded, run: &Run, n: usize) {
    let names: Vec<String> = recorded.file.iter().map(|(name, _)| name.to_string()).collect();
    for name in names.iter().filter(|name| name.starts_with("pos.inner.layer")) {
        let (layer, part) = name["pos.inner.layer".len()..].split_once('.').unwrap();
        let path = match part {
            "q_norm" | "k_norm" => format!("layers.{layer}.self_attn.{part}"),
            "attn_out" => format!("layers.{layer}.self_attn.o_proj"),
            _ => format!("layers.{layer}.{part}"),
        };
        let tensor = &run.taps[&path];
        let mut found = last_rows(tensor, n);
        // Gemma 3's reference normalises heads behind the transposition, [n, t, d].
        if model.encoder == "gemma3" && tensor.ty.rank() == 4 {
            let (heads, dim) = (tensor.ty.shape[2], tensor.ty.shape[3]);
            found = (0..heads * n * dim).map(|i| found[(i / dim % n * heads + i / dim / n) * dim + i % dim]).collect();
        }
        recorded.check(name, &found, model.state_limit);
    }
}

#[track_caller]
fn check_context(model: &Model) {
    let mut recorded = Recorded::required(&format!("{}/text_context", model.name));
    let hidden = fixtures::required(&format!("{}/gemma_hidden", model.encoder));
    for name in PROMPTS {
        let prompt = model.prompt(name);
        let n = prompt.ids().len();
        let features = Modality::ALL.map(|m| format!("{name}.features_{}", m.name()));

        // The extractor alone, from recorded states.
        let states: Vec<Tensor> = (0..model.config.gemma.states())
            .map(|i| hidden.tensor(&format!("{name}.hidden.{i}")))
            .map(|t| Tensor::f32(&[1, t.ty.shape[0], t.ty.shape[1]], &t.to_f32()))
            .collect();
        let alone = model.features_of(&states);
        recorded.context("from states: ");
        for (modality, key) in Modality::ALL.into_iter().zip(&features) {
            recorded.check(key, &alone.results[modality.name()].to_f32(), LIMIT);
        }

        // The whole program: features of real tokens in front, registers behind them.
        let bucket = prompt.bucket((5..=10).map(|k| 1 << k)).unwrap();
        let encoded = model.encode(&prompt, bucket, DType::F32);
        let placed = Modality::ALL.map(|modality| encoded.results[modality.name()].clone());
        recorded.context("encode: ");
        for ((modality, key), placed) in Modality::ALL.into_iter().zip(&features).zip(&placed) {
            let width = placed.ty.shape[2];
            let found = placed.to_f32();
            recorded.check(key, &found[..n * width], model.state_limit);
            let expected = model.place(modality, &found[..n * width], CONTEXT_TOKENS);
            recorded.check_other(&format!("{name}: {} registers", modality.name()), &found, &expected.to_f32());
        }

        // The connectors: end to end, or from recorded features where the encoder has a limit of its own.
        let inputs = if model.state_limit <= LIMIT {
            placed
        } else {
            [0, 1].map(|i| model.place(Modality::ALL[i], &recorded.file.tensor(&features[i]).to_f32(), CONTEXT_TOKENS))
        };
        recorded.context("");
        let run = model.connect(inputs);
        for modality in Modality::ALL {
            let modality_name = modality.name();
            for i in 0..model.config.connectors.get(modality).layers {
                let tap = &run.taps[&format!("{modality_name}_connector.transformer_1d_blocks.{i}")];
                recorded.check(&format!("{name}.{modality_name}_connector.block{i}"), &tap.to_f32(), LIMIT);
            }
            let context = run.results[&format!("{modality_name}_context")].to_f32();
            recorded.check(&format!("{name}.{modality_name}_context"), &context, LIMIT);
        }
        recorded.check_ints(&format!("{name}.context_mask"), &[1; CONTEXT_TOKENS]);
    }
    check_short_connector(model, &mut recorded);
    recorded.finish();
}

/// The video connector on a short sequence, whose mask says which rows are real.
fn check_short_connector(model: &Model, recorded: &mut Recorded) {
    let x = recorded.input("connector128.input");
    let mask = recorded.input("connector128.mask");
    let (tokens, width) = (x.ty.shape[1], x.ty.shape[2]);
    let all = x.to_f32();
    let real =
        (0..tokens).filter(|&t| mask.ints()[t] != 0).flat_map(|t| all[t * width..(t + 1) * width].iter().copied());
    let video = model.place(Modality::Video, &real.collect::<Vec<_>>(), tokens);
    let audio = model.place(Modality::Audio, &[], tokens);
    let run = model.connect([video, audio]);
    recorded.check("connector128.output", &run.results["video_context"].to_f32(), LIMIT);
}

#[test]
fn gemma3_tokenizer() {
    check_tokenizer(&Model::ltx2());
}

#[test]
fn gemma3_hidden_states() {
    check_hidden(&Model::ltx2());
}

#[test]
fn ltx2_text_context() {
    check_context(&Model::ltx2());
}

#[test]
fn ltx23_text_context() {
    check_context(&Model::ltx23());
}

#[test]
fn ltx25_text() {
    let Some(model) = Model::ltx25() else {
        println!("absent: this set of fixtures has no LTX-2.5");
        return;
    };
    check_tokenizer(&model);
    check_hidden(&model);
    check_context(&model);
}

/// Several files as one directory, as a sharded folder is read.
struct Shards(Vec<TensorFile>);

impl TensorDirectory for Shards {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.0.iter().find_map(|file| file.tensor_type(key))
    }
}

#[test]
fn sharded_gemma_gives_the_same_program() {
    let model = Model::ltx2();
    let folder = root().join("tiny-gemma3-sharded");
    let index = json(&folder.join("model.safetensors.index.json"));
    let names: BTreeSet<&str> = index["weight_map"].as_object().unwrap().values().filter_map(Value::as_str).collect();
    assert!(names.len() > 1, "not sharded");
    let shards = Shards(names.iter().map(|name| TensorFile::read(&folder.join(name))).collect());
    let sharded = TextWeights { gemma: Weights::new("gemma", &shards), ..model.weights() };
    let build = |weights: &TextWeights| -> Module { text::encode(&model.config, weights, 32, DType::F32).unwrap() };
    assert_eq!(build(&sharded), build(&model.weights()));
    for (name, tensor) in model.gemma.iter() {
        assert_eq!(shards.0.iter().find_map(|file| file.find(name)), Some(tensor), "{name}");
    }
}

/// Gemma 4's attention has a scale of 1, which makes small errors of the scores large ones of the weights: in bf16 there
/// is no bound, but states stay finite. What has bounds is in `narrow.rs`.
#[test]
fn gemma4_is_finite_in_bf16() {
    let Some(model) = Model::ltx25() else { return println!("absent: this set of fixtures has no LTX-2.5") };
    let run = model.encode(&model.prompt("pos"), 64, DType::BF16);
    for (name, features) in &run.results {
        assert!(features.to_f32().iter().all(|v| v.is_finite()), "{name}");
    }
}
