//! Made-up models: configs at odd sizes, checkpoints with the published tensors, plausible inputs.

use std::collections::BTreeMap;

use ltxc_ir::eval::{Evaluator, Tensor};
use ltxc_ir::{DType, Module, TensorType};
use ltxc_models::transformer::{ENTRY, KEY_PREFIX, StreamConfig, TransformerConfig, TransformerSpec, build};
use ltxc_models::{TensorDirectory, Weights};
use serde_json::{Value, json};

/// Switches of the three generations, and of a model that no published file describes.
pub const GENERATIONS: [(&str, &str); 4] = [
    ("ltx-2", "{}"),
    (
        "ltx-2.3",
        r#"{"apply_gated_attention": true, "cross_attention_adaln": true, "caption_proj_before_connector": true}"#,
    ),
    (
        "ltx-2.5",
        r#"{"apply_gated_attention": true, "cross_attention_adaln": true, "caption_proj_before_connector": true,
            "ff_bias": false, "use_keyframes_abs_pos_embedding": true}"#,
    ),
    (
        "other",
        r#"{"cross_attention_adaln": true, "use_prompt_adaln_single": false, "rope_type": "interleaved",
            "frequencies_precision": "float32", "audio_ff_bias": false}"#,
    ),
];

/// A config with what every published one has; sizes are the defaults.
pub fn config_json(generation: &str) -> Value {
    let mut config = json!({
        "dropout": 0.0, "attention_bias": true, "num_vector_embeds": null, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000.0, "use_linear_projection": false, "only_cross_attention": false,
        "cross_attention_norm": true, "double_self_attention": false, "upcast_attention": false,
        "standardization_norm": "rms_norm", "norm_elementwise_affine": false, "qk_norm": "rms_norm",
        "positional_embedding_type": "rope", "use_audio_video_cross_attention": true, "share_ff": false,
        "av_cross_ada_norm": true, "use_middle_indices_grid": true, "frequencies_precision": "float64",
        "av_ca_timestep_scale_multiplier": 1000.0, "caption_channels": 3840,
    });
    let (_, switches) = GENERATIONS.iter().find(|(name, _)| *name == generation).expect("a listed generation");
    merge(&mut config, &serde_json::from_str(switches).expect("switches are JSON"));
    config
}

fn merge(config: &mut Value, changes: &Value) {
    let (Some(into), Some(from)) = (config.as_object_mut(), changes.as_object()) else { panic!("not objects") };
    into.extend(from.clone());
}

#[track_caller]
pub fn parse(config: &Value) -> TransformerConfig {
    TransformerConfig::from_json(config).unwrap_or_else(|e| panic!("{e}"))
}

/// A small generator of reproducible numbers (splitmix64).
pub struct Random(u64);

impl Random {
    pub fn seeded(text: &str) -> Random {
        Random(text.bytes().fold(0xcbf29ce484222325, |h, c| (h ^ c as u64).wrapping_mul(0x100000001b3)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e3779b97f4a7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        z ^ (z >> 31)
    }

    /// In `[-1, 1)`.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn between(&mut self, lo: usize, hi: usize) -> usize {
        lo + (self.next() % (hi - lo + 1) as u64) as usize
    }

    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let n = shape.iter().product();
        Tensor::f32(shape, &(0..n).map(|_| self.value()).collect::<Vec<_>>())
    }
}

/// Odd sizes for a generation.
pub fn odd_config(generation: &str) -> TransformerConfig {
    let mut r = Random::seeded(generation);
    let heads = r.between(2, 5);
    let (dim, audio_dim) = (2 * r.between(3, 7), 2 * r.between(1, 4));
    let mut config = config_json(generation);
    let sizes = json!({
        "num_layers": r.between(2, 4), "num_attention_heads": heads, "attention_head_dim": dim,
        "audio_num_attention_heads": heads, "audio_attention_head_dim": audio_dim,
        "in_channels": r.between(1, 9), "out_channels": r.between(1, 9),
        "audio_in_channels": r.between(1, 9), "audio_out_channels": r.between(1, 9),
        "cross_attention_dim": heads * dim, "audio_cross_attention_dim": heads * audio_dim,
        "caption_channels": r.between(3, 20),
    });
    merge(&mut config, &sizes);
    parse(&config)
}

/// Every tensor of a transformer with its shape, as the published files list them (spec/transformer §2.2, §2.3).
fn published_tensors(c: &TransformerConfig) -> BTreeMap<String, Vec<usize>> {
    let mut list = BTreeMap::new();
    let (d, a, rows) = (c.video.width, c.audio.width, c.modulation_rows());
    let mut add = |key: String, shape: &[usize]| {
        list.insert(key, shape.to_vec());
    };
    let mut linear = |key: String, out: usize, inputs: usize, has_bias: bool| {
        add(format!("{key}.weight"), &[out, inputs]);
        if has_bias {
            add(format!("{key}.bias"), &[out]);
        }
    };
    let mut adaln = vec![
        ("adaln_single", d, rows),
        ("audio_adaln_single", a, rows),
        ("av_ca_video_scale_shift_adaln_single", d, 4),
        ("av_ca_audio_scale_shift_adaln_single", a, 4),
        ("av_ca_a2v_gate_adaln_single", d, 1),
        ("av_ca_v2a_gate_adaln_single", a, 1),
    ];
    if c.has_prompt_adaln {
        adaln.extend([("prompt_adaln_single", d, 2), ("audio_prompt_adaln_single", a, 2)]);
    }
    for (key, width, rows) in adaln {
        linear(format!("{key}.emb.timestep_embedder.linear_1"), width, 256, true);
        linear(format!("{key}.emb.timestep_embedder.linear_2"), width, width, true);
        linear(format!("{key}.linear"), rows * width, width, true);
    }
    for (prefix, s) in [("", &c.video), ("audio_", &c.audio)] {
        linear(format!("{prefix}patchify_proj"), s.width, s.in_channels, true);
        linear(format!("{prefix}proj_out"), s.out_channels, s.width, true);
        if let Some(channels) = c.caption_channels {
            linear(format!("{prefix}caption_projection.linear_1"), s.width, channels, true);
            linear(format!("{prefix}caption_projection.linear_2"), s.width, s.width, true);
        }
    }
    for i in 0..c.layers {
        let block = format!("transformer_blocks.{i}.");
        let attentions = [
            ("attn1", d, d, d),
            ("attn2", d, c.video.context_width, d),
            ("audio_attn1", a, a, a),
            ("audio_attn2", a, c.audio.context_width, a),
            ("audio_to_video_attn", d, a, a),
            ("video_to_audio_attn", a, d, a),
        ];
        for (name, query, context, inner) in attentions {
            linear(format!("{block}{name}.to_q"), inner, query, true);
            linear(format!("{block}{name}.to_k"), inner, context, true);
            linear(format!("{block}{name}.to_v"), inner, context, true);
            linear(format!("{block}{name}.to_out.0"), query, inner, true);
            if c.is_gated {
                linear(format!("{block}{name}.to_gate_logits"), c.heads, query, true);
            }
        }
        let feed_forward = |s: &StreamConfig| (s.width, 4 * s.width, s.has_ff_bias);
        for (name, (width, inner, has_bias)) in [("ff", feed_forward(&c.video)), ("audio_ff", feed_forward(&c.audio))] {
            linear(format!("{block}{name}.net.0.proj"), inner, width, has_bias);
            linear(format!("{block}{name}.net.2"), width, inner, has_bias);
        }
    }
    add("scale_shift_table".into(), &[2, d]);
    add("audio_scale_shift_table".into(), &[2, a]);
    if c.has_keyframes_embedding {
        add("keyframes_abs_pos_embedding".into(), &[1, d]);
    }
    for i in 0..c.layers {
        let block = format!("transformer_blocks.{i}.");
        for (name, inner) in [("attn1", d), ("attn2", d)] {
            for stream in ["", "audio_"] {
                let inner = if stream.is_empty() { inner } else { a };
                add(format!("{block}{stream}{name}.q_norm.weight"), &[inner]);
                add(format!("{block}{stream}{name}.k_norm.weight"), &[inner]);
            }
        }
        for name in ["audio_to_video_attn", "video_to_audio_attn"] {
            add(format!("{block}{name}.q_norm.weight"), &[a]);
            add(format!("{block}{name}.k_norm.weight"), &[a]);
        }
        for (name, stream, width) in [("", "video", d), ("audio_", "audio", a)] {
            add(format!("{block}{name}scale_shift_table"), &[rows, width]);
            add(format!("{block}scale_shift_table_a2v_ca_{stream}"), &[5, width]);
            if c.has_text_adaln {
                add(format!("{block}{name}prompt_scale_shift_table"), &[2, width]);
            }
        }
    }
    list
}

/// A made-up checkpoint: bf16, tables in f32.
pub struct Checkpoint {
    pub types: BTreeMap<String, TensorType>,
}

impl Checkpoint {
    pub fn new(config: &TransformerConfig) -> Checkpoint {
        let types = published_tensors(config).into_iter().map(|(key, shape)| {
            let dtype = if key.ends_with("scale_shift_table") { DType::F32 } else { DType::BF16 };
            (format!("{KEY_PREFIX}{key}"), TensorType::new(dtype, shape))
        });
        Checkpoint { types: types.collect() }
    }

    fn value(&self, key: &str) -> Option<Tensor> {
        let ty = self.types.get(key)?;
        let mut r = Random::seeded(key);
        // Linear layers keep the size of their input; norm weights are around 1.
        let (scale, offset) = match ty.shape[..] {
            [_, inputs] if key.ends_with(".weight") => ((3.0 / inputs as f32).sqrt(), 0.0),
            _ if key.ends_with("norm.weight") => (0.3, 1.0),
            _ => (0.3, 0.0),
        };
        let values: Vec<f32> = (0..ty.elements()).map(|_| r.value() * scale + offset).collect();
        Some(Tensor::from_bytes(ty.clone(), &encode(ty, &values)))
    }
}

fn encode(ty: &TensorType, values: &[f32]) -> Vec<u8> {
    match ty.dtype {
        DType::BF16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

impl TensorDirectory for Checkpoint {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.types.get(key).cloned()
    }
}

/// One made-up model and the inputs of its largest program.
pub struct Model {
    pub config: TransformerConfig,
    pub checkpoint: Checkpoint,
}

impl Model {
    pub fn new(generation: &str) -> Model {
        let config = odd_config(generation);
        Model { checkpoint: Checkpoint::new(&config), config }
    }

    #[track_caller]
    pub fn build(&self, spec: &TransformerSpec, dtype: DType) -> Module {
        build(&self.config, &Weights::new("model", &self.checkpoint), spec, dtype).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Velocities by name, with `inputs` for named parameters and random values for the others.
    #[track_caller]
    pub fn run(&self, spec: &TransformerSpec, dtype: DType, inputs: &[(&str, Tensor)]) -> BTreeMap<String, Vec<f32>> {
        let module = self.build(spec, dtype);
        let entry = module.function(ENTRY).expect("the entry");
        let args: Vec<Tensor> = entry
            .params
            .iter()
            .map(|p| {
                let (name, ty) = (entry.name_of(p.value), entry.ty(p.value));
                let given = inputs.iter().find(|(n, _)| *n == name).map(|(_, t)| t.clone());
                given.unwrap_or_else(|| default_input(name, ty))
            })
            .collect();
        let lookup = |_: &str, key: &str, _: &TensorType| self.checkpoint.value(key);
        let results = Evaluator::new(&module, &lookup).run(ENTRY, &args).unwrap_or_else(|e| panic!("{e}"));
        entry.results.iter().zip(results).map(|(r, t)| (r.name.clone(), t.to_f32())).collect()
    }
}

/// A plausible value for a parameter. The beginning of a longer one is that of a shorter one, along the tokens.
fn default_input(name: &str, ty: &TensorType) -> Tensor {
    let mut r = Random::seeded(name);
    let n = ty.elements();
    match name.rsplit('.').next().unwrap_or(name) {
        "rows" => Tensor::i32(&ty.shape, &(0..n).map(|i| (i % 2) as i32).collect::<Vec<_>>()),
        "timesteps" => Tensor::f32(&ty.shape, &vec![0.5; n]),
        "sigma" => Tensor::f32(&ty.shape, &[0.75]),
        "positions" => {
            // Every axis has its own pace; tokens are one apart and one long.
            let at = |i: usize| (i / (ty.shape[1] * 2) + 1) as f32 * 0.3 * (i / 2 % ty.shape[1] + i % 2) as f32;
            Tensor::f32(&ty.shape, &(0..n).map(at).collect::<Vec<_>>())
        }
        "self_mask" | "context_mask" => Tensor::f32(&ty.shape, &vec![1.0; n]),
        _ => r.tensor(&ty.shape),
    }
}
