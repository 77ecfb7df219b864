//! How Gemma 3 sees an image: a SigLIP vision tower, and the projector that makes soft tokens of its patches.
//!
//! ```text
//! pixels ── patches, positions ── encoder layers ── norm ── means of squares of patches ── norm ── projection ── soft tokens
//! ```
//!
//! `generate` reads the soft tokens in the place of words.
//!
//! # Easy to get wrong
//! - The tower has layer norms with weight and bias; the projector's norm is Gemma's, an RMS norm that multiplies by
//!   `1 + w`, with the epsilon of the tower.
//! - Layer norms are computed in f32 and rounded once, behind weight and bias.
//! - The projection is stored `[in, out]`, unlike all other matrices.
//! - Published configurations leave out what equals the class defaults of `transformers`: channels, activation, epsilon.
//!
//! Source: transformers `SiglipVisionModel`, `Gemma3MultiModalProjector`, `Gemma3ImageProcessor` (4.57).

use ltxc_ir::ops::{Attention, Conv, ReduceKind};
use ltxc_ir::{Builder, DType, Float, Module, Rate, TensorType, ValueId};
use serde_json::Value;

use super::connector::linear;
use crate::fields::{Fields, MOST};
use crate::weights::check_compute_dtype;
use crate::{Block, Functions, ModelError, Weights};

/// Where the tower and the projector stand in a set of files.
const TOWER: &str = "vision_tower.vision_model.";
const PROJECTOR: &str = "multi_modal_projector.";

/// Colours of a pixel.
const COLOURS: usize = 3;

/// Largest number of layers or heads.
const MOST_COUNT: usize = 4096;

/// Largest side of an image, in pixels, and largest number of patches.
const MOST_SIDE: usize = 1 << 13;
const MOST_PATCHES: usize = 1 << 16;

/// What an image goes through before it is words to a Gemma 3.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Sides of the image, in pixels.
    pub image_size: usize,
    /// Sides of a patch, in pixels; divides `image_size`.
    pub patch_size: usize,
    /// Channels of the tower.
    pub hidden_size: usize,
    /// Channels inside of its MLP.
    pub intermediate_size: usize,
    /// Attention heads; divides `hidden_size`.
    pub heads: usize,
    /// Encoder layers.
    pub layers: usize,
    /// Epsilon of every norm.
    pub eps: f64,
    /// Soft tokens along each side of the image; divides the number of patches there.
    pub tokens_per_side: usize,
    /// Token ids of the beginning of an image, of a soft token, and of the end.
    pub token_ids: [usize; 3],
    /// How levels of 0 to 255 are scaled.
    pub levels: Levels,
}

/// Scaling of pixels: `(level · rescale − mean) / std` for each colour.
#[derive(Clone, Debug, PartialEq)]
pub struct Levels {
    /// Factor.
    pub rescale: f64,
    /// Subtracted.
    pub mean: [f64; COLOURS],
    /// Divides.
    pub std: [f64; COLOURS],
}

impl VisionConfig {
    /// Whether a Gemma can see: its configuration describes a vision tower, and its files have one. Published folders
    /// have both, folders of text encoders alone may lack either.
    pub fn is_in(config: &Value, weights: &Weights) -> bool {
        config.get("vision_config").is_some_and(Value::is_object)
            && weights.has(&format!("{TOWER}embeddings.patch_embedding.weight"))
    }

    /// Reads `config.json` of a Hugging Face folder, and its `preprocessor_config.json` if it has one.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that is missing, malformed or not supported in one of the two.
    pub fn from_json(config: &Value, preprocessor: Option<&Value>) -> Result<VisionConfig, ModelError> {
        let root = Fields::new("gemma", config);
        let vision = root.required_below("vision_config");
        vision.only("model_type", "siglip_vision_model");
        vision.only("hidden_act", "gelu_pytorch_tanh");
        vision.only("num_channels", COLOURS);
        let soft_tokens = root.size("mm_tokens_per_image", 256);
        let read = VisionConfig {
            image_size: vision.size_within("image_size", 224, MOST_SIDE),
            patch_size: vision.size_within("patch_size", 16, MOST_SIDE),
            hidden_size: vision.size("hidden_size", 768),
            intermediate_size: vision.size("intermediate_size", 3072),
            heads: vision.size_within("num_attention_heads", 12, MOST_COUNT),
            layers: vision.size_within("num_hidden_layers", 12, MOST_COUNT),
            eps: vision.positive("layer_norm_eps", 1e-6),
            tokens_per_side: soft_tokens.isqrt(),
            token_ids: [("boi_token_index", 255_999), ("image_token_index", 262_144), ("eoi_token_index", 256_000)]
                .map(|(key, default)| root.size_within(key, default, MOST)),
            levels: Levels { rescale: 1.0 / 255.0, mean: [0.5; COLOURS], std: [0.5; COLOURS] },
        };
        if root.is_clean() {
            let VisionConfig { image_size, patch_size, hidden_size, heads, tokens_per_side, .. } = read;
            let side = image_size / patch_size;
            if !image_size.is_multiple_of(patch_size) || side * side > MOST_PATCHES {
                let problem = format!("is {patch_size}, expected to divide `image_size` {image_size} into at most 256");
                vision.problem_at("patch_size", problem);
            } else if tokens_per_side * tokens_per_side != soft_tokens || !side.is_multiple_of(tokens_per_side) {
                let problem = format!("is {soft_tokens}, expected the square of a divisor of {side} patches");
                root.problem_at("mm_tokens_per_image", problem);
            }
            if !hidden_size.is_multiple_of(heads) {
                vision.problem_at(
                    "num_attention_heads",
                    format!("is {heads}, expected to divide {hidden_size} channels"),
                );
            }
        }
        let read = root.finish(read)?;
        match preprocessor {
            Some(preprocessor) => Ok(VisionConfig { levels: Levels::read(preprocessor, read.image_size)?, ..read }),
            None => Ok(read),
        }
    }

    /// Patches along each side.
    pub fn patches_per_side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Soft tokens of an image.
    pub fn soft_tokens(&self) -> usize {
        self.tokens_per_side * self.tokens_per_side
    }
}

impl Levels {
    /// Reads `preprocessor_config.json` for images with sides of `image_size` pixels.
    fn read(preprocessor: &Value, image_size: usize) -> Result<Levels, ModelError> {
        /// Bilinear, as PIL numbers filters.
        const BILINEAR: usize = 2;
        let read = Fields::new("preprocessor_config", preprocessor);
        read.only("do_resize", true);
        read.only("resample", BILINEAR);
        let size = read.below("size");
        for side in ["height", "width"] {
            size.only(side, image_size);
        }
        let colours = |key: &str, default: f64| {
            let Some(value) = read.value(key) else { return [default; COLOURS] };
            let number = |v: &Value| v.as_f64().filter(|v| v.is_finite());
            let list: Option<Vec<f64>> = value.as_array().and_then(|list| list.iter().map(number).collect());
            list.and_then(|list| list.try_into().ok()).unwrap_or_else(|| {
                read.problem_at(key, format!("is `{value}`, expected a list of {COLOURS} numbers"));
                [default; COLOURS]
            })
        };
        let is_rescaled = read.bool("do_rescale", true);
        let rescale = read.positive("rescale_factor", 1.0 / 255.0);
        let (mut mean, mut std) = (colours("image_mean", 0.5), colours("image_std", 0.5));
        if std.iter().any(|&v| v <= 0.0) {
            read.problem_at("image_std", "is not positive");
        }
        if !read.bool("do_normalize", true) {
            (mean, std) = ([0.0; COLOURS], [1.0; COLOURS]);
        }
        read.finish(Levels { rescale: if is_rescaled { rescale } else { 1.0 }, mean, std })
    }
}

/// The program that sees an image.
///
/// - `weights`: the complete set of Gemma's files; `hidden_size`: channels of its language model.
/// - Parameter of the entry `see`: `levels`, f32 `[1, image_size, image_size, 3]`, 0 to 255.
/// - Result: `soft_tokens`, f32 `[1, soft tokens, hidden_size]`; `dtype` is that of the activations inside.
///
/// # Errors
/// A dtype that activations cannot have, and weights that are missing or do not fit.
pub fn see(config: &VisionConfig, weights: &Weights, hidden_size: usize, dtype: DType) -> Result<Module, ModelError> {
    check_compute_dtype(dtype)?;
    let (b, functions) = (Builder::new("see"), Functions::default());
    let side = config.image_size;
    let levels = b.param("levels", TensorType::f32([1, side, side, COLOURS]), Rate::Step);
    let pixels = b.name("pixel_values", scaled(&b, &config.levels, levels));
    let seen = b.scope("vision_tower.vision_model", || tower(&b, &functions, config, weights, b.cast(pixels, dtype)));
    let tokens = b.scope("multi_modal_projector", || projected(&b, config, weights, hidden_size, seen));
    b.result("soft_tokens", b.cast(tokens, DType::F32));
    weights.finish()?;
    Ok(functions.into_module(b.finish()?)?)
}

/// Levels as the tower takes them.
fn scaled(b: &Builder, levels: &Levels, x: ValueId) -> ValueId {
    let colours = |values: [f64; COLOURS]| b.constant(&[COLOURS], &values.map(|v| v as f32));
    b.div(b.sub(b.mul_scalar(x, levels.rescale), colours(levels.mean)), colours(levels.std))
}

/// The tower: `[1, size, size, 3]` to `[1, patches, hidden]`.
fn tower(b: &Builder, functions: &Functions, config: &VisionConfig, weights: &Weights, pixels: ValueId) -> ValueId {
    let (weights, width, patch) = (weights.below(TOWER), config.hidden_size, config.patch_size);
    let patches = config.patches_per_side() * config.patches_per_side();
    let embeddings = b.scope("embeddings", || {
        let own = weights.below("embeddings.");
        let filter = own.get(b, "patch_embedding.weight", &[width, COLOURS, patch, patch]);
        let op = Conv { stride: vec![patch; 2], dilation: vec![1; 2], pad: vec![(0, 0); 2], groups: 1 };
        let h = b.conv(op, pixels, b.transpose(filter, &[2, 3, 1, 0]));
        let h = b.name("patch_embedding", b.add(h, own.get(b, "patch_embedding.bias", &[width])));
        b.add(b.reshape(h, &[1, patches, width]), own.get(b, "position_embedding.weight", &[patches, width]))
    });
    let mut h = b.name("embeddings", embeddings);
    for i in 0..config.layers {
        let key = format!("encoder.layers.{i}");
        h = functions.call_one(b, &weights, Block::at("vision_layer", &key), &[("h", h)], |b, weights, params| {
            layer(b, config, weights, params[0])
        });
    }
    layer_norm(b, config, &weights, "post_layernorm", h)
}

/// One encoder layer: attention and MLP, each behind a norm and with a residual.
fn layer(b: &Builder, config: &VisionConfig, weights: &Weights, h: ValueId) -> ValueId {
    let normed = layer_norm(b, config, weights, "layer_norm1", h);
    let a = b.scope("self_attn", || attention(b, config, &weights.below("self_attn."), normed));
    let h = b.add(h, b.name("self_attn", a));
    let normed = layer_norm(b, config, weights, "layer_norm2", h);
    let m = b.scope("mlp", || {
        let (own, width, inner) = (weights.below("mlp."), config.hidden_size, config.intermediate_size);
        linear(b, &own, "fc2", b.gelu(linear(b, &own, "fc1", normed, [inner, width], true)), [width, inner], true)
    });
    b.add(h, b.name("mlp", m))
}

/// Self attention in which every patch sees every other.
fn attention(b: &Builder, config: &VisionConfig, weights: &Weights, x: ValueId) -> ValueId {
    let (shape, width, heads) = (b.shape(x), config.hidden_size, config.heads);
    let head_dim = width / heads;
    let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| {
        let y = linear(b, weights, name, x, [width, width], true);
        b.reshape(y, &[shape[0], shape[1], heads, head_dim])
    });
    let scale = Float((head_dim as f64).powf(-0.5));
    let o = b.attention(Attention { scale, causal: false }, q, k, v, None);
    linear(b, weights, "out_proj", b.reshape(o, &shape), [width, width], true)
}

/// The layer norm `key`, with weight and bias.
fn layer_norm(b: &Builder, config: &VisionConfig, weights: &Weights, key: &str, x: ValueId) -> ValueId {
    let [weight, bias] = ["weight", "bias"].map(|name| weights.get(b, &format!("{key}.{name}"), &[config.hidden_size]));
    let y = b.layer_norm(b.cast(x, DType::F32), config.eps);
    b.name(key, b.cast(b.add(b.mul(y, weight), bias), b.ty(x).dtype))
}

/// Patches `[1, patches, hidden]` to soft tokens `[1, soft tokens, hidden_size]`.
fn projected(b: &Builder, config: &VisionConfig, weights: &Weights, hidden_size: usize, x: ValueId) -> ValueId {
    let (weights, width, tokens) = (weights.below(PROJECTOR), config.hidden_size, config.tokens_per_side);
    let square = config.patches_per_side() / tokens;
    let squares = b.reshape(x, &[1, tokens, square, tokens, square, width]);
    let means = b.reshape(b.reduce(ReduceKind::Mean, squares, &[2, 4]), &[1, config.soft_tokens(), width]);
    let weight = weights.get(b, "mm_soft_emb_norm.weight", &[width]);
    let weight = b.add_scalar(b.cast(weight, DType::F32), 1.0);
    let normed = b.name("mm_soft_emb_norm", b.rms_norm(means, Some(weight), config.eps));
    b.matmul(normed, weights.get(b, "mm_input_projection_weight", &[width, hidden_size]))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What the published 12B folder says, which leaves out class defaults.
    fn published() -> Value {
        json!({ "model_type": "gemma3", "mm_tokens_per_image": 256, "boi_token_index": 255_999,
            "eoi_token_index": 256_000, "image_token_index": 262_144,
            "vision_config": {
                "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": false,
            },
        })
    }

    #[test]
    fn absent_keys_have_the_class_defaults() {
        let vision = VisionConfig::from_json(&published(), None).expect("valid");
        assert_eq!((vision.patches_per_side(), vision.soft_tokens(), vision.eps), (64, 256, 1e-6));
        assert_eq!(vision.token_ids, [255_999, 262_144, 256_000]);
        let mut short = published();
        for key in ["mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"] {
            short[key] = Value::Null;
        }
        assert_eq!(VisionConfig::from_json(&short, Some(&json!({}))).expect("valid"), vision);
    }

    #[test]
    fn a_preprocessor_may_scale_otherwise() {
        let levels =
            |preprocessor: Value| VisionConfig::from_json(&published(), Some(&preprocessor)).expect("valid").levels;
        let found = levels(json!({"image_mean": [0.0, 0.1, 0.2], "image_std": [1, 2, 3], "rescale_factor": 0.5}));
        assert_eq!(found, Levels { rescale: 0.5, mean: [0.0, 0.1, 0.2], std: [1.0, 2.0, 3.0] });
        let plain = levels(json!({"do_rescale": false, "do_normalize": false, "size": {"height": 896, "width": 896}}));
        assert_eq!(plain, Levels { rescale: 1.0, mean: [0.0; 3], std: [1.0; 3] });
    }

    #[track_caller]
    fn check_error(config: Value, preprocessor: Value, text: &str) {
        let problem =
            VisionConfig::from_json(&config, Some(&preprocessor)).expect_err("must not be accepted").to_string();
        assert!(problem.contains(text) && problem.contains(": 1 problem(s):"), "{problem}");
    }

    #[test]
    fn bad_values_are_errors_that_name_the_key() {
        let tower = |key: &str, value: Value, text: &str| {
            let mut config = published();
            config["vision_config"][key] = value;
            check_error(config, json!({}), text);
        };
        tower("num_attention_heads", json!(7), "`vision_config.num_attention_heads` is 7, expected to divide 1152");
        tower("num_hidden_layers", json!(0), "`vision_config.num_hidden_layers` is `0`, expected a whole number");
        tower("image_size", json!(u64::MAX), "`vision_config.image_size` is");
        tower("patch_size", json!(15), "`vision_config.patch_size` is 15, expected to divide `image_size` 896");
        tower("patch_size", json!(1), "into at most 256");
        tower("hidden_act", json!("gelu"), "only `\"gelu_pytorch_tanh\"` is supported");
        tower("num_channels", json!(1), "only `3` is supported");
        let root = |key: &str, value: Value, text: &str| {
            let mut config = published();
            config[key] = value;
            check_error(config, json!({}), text);
        };
        root("mm_tokens_per_image", json!(255), "`mm_tokens_per_image` is 255, expected the square of a divisor of 64");
        root("mm_tokens_per_image", json!(9), "expected the square of a divisor of 64 patches");
        root("image_token_index", json!(-1), "`image_token_index` is `-1`");
        root("vision_config", json!([]), "`vision_config` is not an object");
        check_error(published(), json!({"resample": 3}), "`resample` is `3`, only `2` is supported");
        check_error(published(), json!({"size": {"height": 224}}), "`size.height` is `224`, only `896` is supported");
        check_error(published(), json!({"image_mean": [0.5]}), "`image_mean` is `[0.5]`, expected a list of 3 numbers");
        check_error(published(), json!({"image_std": [0.5, 0, 1]}), "`image_std` is not positive");
    }
}
