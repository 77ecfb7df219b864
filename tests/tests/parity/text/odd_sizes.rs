//! Sizes and switches that no fixture has, with random weights.
//!
//! Connectors are compared with a direct computation in f64, the encoder with itself in other buckets.

use std::collections::BTreeMap;

use ltxc_ir::eval::{Evaluator, Tensor};
use ltxc_ir::ops::RopeLayout;
use ltxc_ir::{DType, Module, TensorType};
use ltxc_models::text::{
    self, ConnectorConfig, Connectors, GemmaAttention, LayerKind, Modality, TextConfig, TextWeights,
};
use ltxc_models::{TensorDirectory, Weights};
use ltxc_runtime::tokenizer::CONTEXT_TOKENS;
use ltxc_tests::compare::Report;
use serde_json::{Value, json};

/// Random tensors by key.
#[derive(Default)]
struct Random {
    tensors: BTreeMap<String, Tensor>,
    state: u64,
}

impl Random {
    /// A number in `-1..1`, from a linear congruential generator.
    fn next(&mut self) -> f32 {
        self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.next()).collect();
        Tensor::f32(shape, &values)
    }

    fn add(&mut self, key: String, shape: &[usize]) {
        let tensor = self.tensor(shape);
        self.tensors.insert(key, tensor);
    }

    fn linear(&mut self, key: &str, out: usize, input: usize, has_bias: bool) {
        self.add(format!("{key}.weight"), &[out, input]);
        if has_bias {
            self.add(format!("{key}.bias"), &[out]);
        }
    }

    fn connector(&mut self, modality: Modality, config: &ConnectorConfig, registers: usize) {
        let width = config.width();
        let prefix = prefix(modality);
        self.add(format!("{prefix}learnable_registers"), &[registers, width]);
        for i in 0..config.layers {
            let prefix = format!("{prefix}transformer_1d_blocks.{i}.");
            for name in ["to_q", "to_k", "to_v", "to_out.0"] {
                self.linear(&format!("{prefix}attn1.{name}"), width, width, true);
            }
            for name in ["q_norm", "k_norm"] {
                self.add(format!("{prefix}attn1.{name}.weight"), &[width]);
            }
            if config.is_gated {
                self.linear(&format!("{prefix}attn1.to_gate_logits"), config.heads, width, true);
            }
            self.linear(&format!("{prefix}ff.net.0.proj"), 4 * width, width, config.has_ff_bias);
            self.linear(&format!("{prefix}ff.net.2"), width, 4 * width, config.has_ff_bias);
        }
    }

    fn gemma(&mut self, config: &TextConfig) {
        let gemma = &config.gemma;
        let (hidden, inner) = (gemma.hidden_size, gemma.intermediate_size);
        self.add("model.embed_tokens.weight".into(), &[gemma.vocab_size, hidden]);
        self.add("model.norm.weight".into(), &[hidden]);
        for (i, &kind) in gemma.layers.iter().enumerate() {
            let GemmaAttention { heads, kv_heads, head_dim, is_value_shared, .. } = *gemma.attention(kind);
            let prefix = format!("model.layers.{i}.");
            for name in ["input", "post_attention", "pre_feedforward", "post_feedforward"] {
                self.add(format!("{prefix}{name}_layernorm.weight"), &[hidden]);
            }
            self.linear(&format!("{prefix}self_attn.q_proj"), heads * head_dim, hidden, false);
            self.linear(&format!("{prefix}self_attn.k_proj"), kv_heads * head_dim, hidden, false);
            if !is_value_shared {
                self.linear(&format!("{prefix}self_attn.v_proj"), kv_heads * head_dim, hidden, false);
            }
            self.linear(&format!("{prefix}self_attn.o_proj"), hidden, heads * head_dim, false);
            for name in ["q_norm", "k_norm"] {
                self.add(format!("{prefix}self_attn.{name}.weight"), &[head_dim]);
            }
            self.linear(&format!("{prefix}mlp.gate_proj"), inner, hidden, false);
            self.linear(&format!("{prefix}mlp.up_proj"), inner, hidden, false);
            self.linear(&format!("{prefix}mlp.down_proj"), hidden, inner, false);
            if gemma.has_layer_scalar {
                self.add(format!("{prefix}layer_scalar"), &[1]);
            }
        }
        let [video, audio] = config.connectors.widths();
        let (columns, prefix) = (hidden * gemma.states(), "text_embedding_projection.");
        self.linear(&format!("{prefix}aggregate_embed"), video, columns, false);
        self.linear(&format!("{prefix}video_aggregate_embed"), video, columns, true);
        self.linear(&format!("{prefix}audio_aggregate_embed"), audio, columns, true);
    }

    fn run(&self, module: &Module, entry: &str, args: &[Tensor]) -> Vec<Tensor> {
        let lookup = |_: &str, key: &str, _: &TensorType| self.tensors.get(key).cloned();
        Evaluator::new(module, &lookup).run(entry, args).unwrap()
    }
}

impl TensorDirectory for Random {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.tensors.get(key).map(|t| t.ty.clone())
    }
}

fn prefix(modality: Modality) -> String {
    format!("model.diffusion_model.{}_embeddings_connector.", modality.name())
}

/// A connector computed directly; only the RoPE angles are f32, as they are in the model.
struct Direct<'a> {
    random: &'a Random,
    config: &'a ConnectorConfig,
    prefix: String,
}

impl Direct<'_> {
    fn weight(&self, key: &str) -> &[f64] {
        self.random.tensors[&format!("{}{key}", self.prefix)].floats()
    }

    fn linear(&self, name: &str, x: &[f64], has_bias: bool) -> Vec<f64> {
        let w = self.weight(&format!("{name}.weight"));
        let rows = w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>());
        if !has_bias {
            return rows.collect();
        }
        rows.zip(self.weight(&format!("{name}.bias"))).map(|(y, bias)| y + bias).collect()
    }

    fn norm(x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        x.iter().map(|v| v / (mean + 1e-6).sqrt()).collect()
    }

    fn rotated(&self, name: &str, x: &[f64], position: usize) -> Vec<f64> {
        let ConnectorConfig { head_dim, max_position, rope, .. } = *self.config;
        let mut x: Vec<f64> =
            Direct::norm(x).iter().zip(self.weight(&format!("{name}.weight"))).map(|(a, b)| a * b).collect();
        let pairs = x.len() / 2;
        for e in 0..pairs {
            let exponent = if pairs > 1 { e as f64 / (pairs - 1) as f64 } else { 0.0 };
            let frequency = (10_000f64.powf(exponent) * std::f64::consts::FRAC_PI_2) as f32;
            let angle = (frequency * (2.0 * (position as f32 / max_position as f32) - 1.0)) as f64;
            let (head, i) = (e / (head_dim / 2), e % (head_dim / 2));
            let (first, second) = match rope {
                RopeLayout::Split => (head * head_dim + i, head * head_dim + i + head_dim / 2),
                RopeLayout::Interleaved => (2 * e, 2 * e + 1),
            };
            let (a, b) = (x[first], x[second]);
            (x[first], x[second]) = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
        }
        x
    }

    fn block(&self, i: usize, x: &mut [Vec<f64>]) {
        let (name, config) = (format!("transformer_1d_blocks.{i}."), self.config);
        let attn = |part: &str| format!("{name}attn1.{part}");
        let normed: Vec<Vec<f64>> = x.iter().map(|row| Direct::norm(row)).collect();
        let project = |part: &str| normed.iter().map(|row| self.linear(&attn(part), row, true)).collect::<Vec<_>>();
        let rotate = |part: &str, rows: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
            rows.iter().enumerate().map(|(p, row)| self.rotated(&attn(part), row, p)).collect()
        };
        let (q, k, v) = (rotate("q_norm", project("to_q")), rotate("k_norm", project("to_k")), project("to_v"));
        for (t, row) in x.iter_mut().enumerate() {
            let mut o = vec![0.0; row.len()];
            for head in 0..config.heads {
                let range = head * config.head_dim..(head + 1) * config.head_dim;
                let dot = |s: usize| range.clone().map(|c| q[t][c] * k[s][c]).sum::<f64>();
                let scores: Vec<f64> = (0..k.len()).map(|s| dot(s) / (config.head_dim as f64).sqrt()).collect();
                let total: f64 = scores.iter().map(|s| s.exp()).sum();
                for c in range {
                    o[c] = scores.iter().zip(&v).map(|(s, v)| s.exp() / total * v[c]).sum();
                    if config.is_gated {
                        let logit = self.linear(&attn("to_gate_logits"), &normed[t], true)[head];
                        o[c] *= 2.0 / (1.0 + (-logit).exp());
                    }
                }
            }
            row.iter_mut().zip(self.linear(&attn("to_out.0"), &o, true)).for_each(|(x, y)| *x += y);
        }
        for row in x {
            let inner = self.linear(&format!("{name}ff.net.0.proj"), &Direct::norm(row), config.has_ff_bias);
            let gelu =
                |x: &f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            let inner: Vec<f64> = inner.iter().map(gelu).collect();
            let y = self.linear(&format!("{name}ff.net.2"), &inner, config.has_ff_bias);
            row.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        }
    }

    fn run(&self, x: &Tensor) -> Vec<f32> {
        let mut rows: Vec<Vec<f64>> = x.floats().chunks(self.config.width()).map(<[f64]>::to_vec).collect();
        (0..self.config.layers).for_each(|i| self.block(i, &mut rows));
        rows.iter().flat_map(|row| Direct::norm(row)).map(|v| v as f32).collect()
    }
}

#[track_caller]
fn check_connectors(seed: u64, tokens: usize, transformer: Value) {
    let connectors = Connectors::from_json(&transformer).unwrap();
    let mut random = Random { state: seed, ..Random::default() };
    let mut inputs = Vec::new();
    for modality in Modality::ALL {
        let config = connectors.get(modality);
        random.connector(modality, config, 1);
        inputs.push(random.tensor(&[1, tokens, config.width()]));
    }
    let module = text::connect(&connectors, &Weights::new("model", &random), tokens, DType::F32).unwrap();
    let results = random.run(&module, "connect", &inputs);
    let mut report = Report::default();
    for ((modality, x), found) in Modality::ALL.into_iter().zip(&inputs).zip(&results) {
        let direct = Direct { random: &random, config: connectors.get(modality), prefix: prefix(modality) };
        report.check(modality.name(), &found.to_f32(), &direct.run(x), 1e-5);
    }
    report.finish();
}

#[test]
fn connectors_match_a_direct_computation() {
    check_connectors(
        1,
        13,
        json!({
            "connector_num_attention_heads": 3, "connector_attention_head_dim": 6, "connector_num_layers": 2,
            "audio_connector_num_attention_heads": 1, "audio_connector_attention_head_dim": 2,
            "connector_apply_gated_attention": true, "connector_ff_bias": false, "rope_type": "split",
            "connector_positional_embedding_max_pos": [4096], "frequencies_precision": "float64",
        }),
    );
    check_connectors(
        2,
        7,
        json!({
            "connector_num_attention_heads": 5, "connector_attention_head_dim": 4, "connector_num_layers": 1,
            "audio_connector_num_layers": 3, "rope_type": "interleaved",
            "connector_positional_embedding_max_pos": [100], "frequencies_precision": "float64",
        }),
    );
}

fn transformer(is_shared: bool) -> Value {
    let mut config = json!({
        "connector_num_attention_heads": 3, "connector_attention_head_dim": 2, "connector_num_layers": 1,
    });
    if !is_shared {
        config["audio_connector_num_attention_heads"] = 2.into();
        config["caption_proj_before_connector"] = true.into();
        for key in ["caption_projection_first_linear", "caption_proj_input_norm", "caption_projection_second_linear"] {
            config[key] = false.into();
        }
    }
    config
}

fn gemma3() -> Value {
    json!({ "model_type": "gemma3", "text_config": {
        "vocab_size": 11, "hidden_size": 10, "intermediate_size": 7, "num_hidden_layers": 4, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": 2,
        "sliding_window_pattern": 2,
    }})
}

fn gemma4() -> Value {
    json!({ "model_type": "gemma4_unified", "text_config": {
        "vocab_size": 9, "hidden_size": 5, "intermediate_size": 3, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 2, "global_head_dim": 10, "num_global_key_value_heads": 2,
        "attention_k_eq_v": true, "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000.0},
        },
    }})
}

/// The program of a larger bucket gives what the smallest gives: pads enter neither attention nor statistics.
#[track_caller]
fn check_buckets(seed: u64, gemma: &Value, is_shared: bool) {
    const REGISTERS: usize = 8;
    let config = TextConfig::from_json(gemma, &transformer(is_shared)).unwrap();
    let mut random = Random { state: seed, ..Random::default() };
    random.gemma(&config);
    for modality in Modality::ALL {
        random.connector(modality, config.connectors.get(modality), REGISTERS);
    }
    let weights = Weights::new("model", &random);
    let weights = TextWeights { gemma: weights.clone(), projection: weights.clone(), transformer: weights };
    let ids = [2, 5, 5, 8, 1];
    let run = |slots: usize| {
        let pads = slots - ids.len();
        // Any id may stand on a pad.
        let ids: Vec<i32> = (0..pads).map(|i| i as i32 % 9).chain(ids).collect();
        let valid: Vec<f32> = (0..slots).map(|slot| if slot < pads { 0.0 } else { 1.0 }).collect();
        let n = slots - pads;
        let place: Vec<i32> =
            (0..CONTEXT_TOKENS).map(|p| if p < n { pads + p } else { slots + p % REGISTERS } as i32).collect();
        let module = text::encode(&config, &weights, slots, DType::F32).unwrap();
        let args = [Tensor::i32(&[slots], &ids), Tensor::f32(&[slots], &valid), Tensor::i32(&[CONTEXT_TOKENS], &place)];
        random.run(&module, "encode", &args)
    };
    let smallest = run(ids.len());
    let mut report = Report::default();
    for slots in [6, 11, 32] {
        for ((modality, found), expected) in Modality::ALL.into_iter().zip(run(slots)).zip(&smallest) {
            let name = format!("{} in {slots} slots", modality.name());
            report.check(&name, &found.to_f32(), &expected.to_f32(), 1e-6);
        }
    }
    report.finish();
}

#[test]
fn every_bucket_gives_the_same_features() {
    check_buckets(3, &gemma3(), true);
    check_buckets(4, &gemma3(), false);
    check_buckets(5, &gemma4(), true);
    check_buckets(6, &gemma4(), false);
}

#[test]
fn layers_that_are_stored_differently_get_functions_of_their_own() {
    let config = TextConfig::from_json(&gemma3(), &transformer(true)).unwrap();
    assert_eq!(config.gemma.layers[..2], [LayerKind::Sliding, LayerKind::Global]);
    let mut random = Random::default();
    random.gemma(&config);
    Modality::ALL.iter().for_each(|&modality| random.connector(modality, config.connectors.get(modality), 8));
    let key = "model.layers.2.mlp.up_proj.weight";
    let narrow = TensorType { dtype: DType::BF16, ..random.tensors[key].ty.clone() };
    random.tensors.insert(key.into(), Tensor::zeros(narrow));
    let weights = Weights::new("model", &random);
    let weights = TextWeights { gemma: weights.clone(), projection: weights.clone(), transformer: weights };
    let module = text::encode(&config, &weights, 5, DType::F32).unwrap();
    let names: Vec<&str> = module.functions.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(
        names,
        ["gemma_sliding_layer", "gemma_global_layer", "gemma_sliding_layer_2", "normalise_range", "encode"]
    );
}

#[test]
fn weights_that_do_not_fit_are_all_named() {
    let config = TextConfig::from_json(&gemma3(), &transformer(true)).unwrap();
    let mut random = Random::default();
    random.gemma(&config);
    Modality::ALL.iter().for_each(|&modality| random.connector(modality, config.connectors.get(modality), 8));
    random.tensors.remove("model.layers.1.mlp.up_proj.weight");
    random.add("model.norm.weight".into(), &[3]);
    let build = |random: &Random, slots, dtype| {
        let weights = Weights::new("model", random);
        let weights = TextWeights { gemma: weights.clone(), projection: weights.clone(), transformer: weights };
        text::encode(&config, &weights, slots, dtype).map_err(|e| e.to_string()).err().unwrap_or_default()
    };
    let message = build(&random, 5, DType::F32);
    assert!(message.contains("2 problem(s)"), "{message}");
    assert!(message.contains("`model.layers.1.mlp.up_proj.weight` is missing"), "{message}");
    assert!(message.contains("`model.norm.weight` is f32[3]"), "{message}");

    assert!(build(&random, 0, DType::F32).contains("expected 1 to 1024"));
    assert!(build(&random, 1025, DType::F32).contains("expected 1 to 1024"));
    assert!(build(&random, 5, DType::I32).contains("activations are"));
    random.add(format!("{}learnable_registers", prefix(Modality::Audio)), &[7, 6]);
    assert!(build(&random, 5, DType::F32).contains("learnable_registers"));
}
