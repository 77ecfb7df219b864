//! The convolutional generators: HiFi-GAN (LTX-2) and BigVGAN (LTX-2.3 and later, also for bandwidth extension).
//!
//! Both turn a log-mel spectrogram into a waveform: `conv_pre`, then stages of a transposed convolution and the mean of
//! several residual blocks, then `conv_post`. Activations are `[1, t, c]`. Residual blocks and anti-aliased activations
//! are functions: a stage applies the same activation many times.
//!
//! # Easy to get wrong
//! - The input channel is `stereo · mel_bins + mel`.
//! - A stage takes the mean of its residual blocks, all of which see the same input; not their sum.
//! - HiFi-GAN's leaky ReLU has slope 0.1, but 0.01 before `conv_post`.
//! - BigVGAN applies nothing between a stage's blocks and the next transposed convolution.
//! - The parameters of SnakeBeta are logarithms. Its filters are the stored ones, rounded as they are.

use ltxc_ir::ops::{Conv, ConvTranspose, PadMode, Unary};
use ltxc_ir::{Builder, DType, ValueId};

use super::layers::Spectrogram;
use super::vocoder_config::{FinalActivation, GeneratorConfig, GeneratorKind};
use crate::{Block, Functions, Weights};

const SLOPE: f64 = 0.1; // ltx_core/model/audio_vae, LRELU_SLOPE
const FINAL_SLOPE: f64 = 0.01; // default of torch's leaky_relu, which the reference calls without a slope
const OUTER_KERNEL: usize = 7; // kernel of conv_pre and conv_post
const FILTER_TAPS: usize = 12; // taps of the filters around SnakeBeta, for a ratio of 2

/// Channels of every waveform: left and right.
pub(super) const STEREO: usize = 2;

/// A sequence `[1, t, c]` in a graph.
#[derive(Clone, Copy)]
pub(super) struct Sequence {
    /// The value.
    pub value: ValueId,
    /// Samples or frames.
    pub t: usize,
    /// Channels.
    pub c: usize,
}

/// One generator of a checkpoint.
pub(super) struct Generator<'a> {
    config: &'a GeneratorConfig,
    weights: Weights<'a>,
    /// Key prefix without the dot, for example `vocoder.bwe_generator`; also the name path.
    prefix: &'a str,
}

impl<'a> Generator<'a> {
    /// The generator whose keys start with `prefix` and a dot.
    pub fn new(config: &'a GeneratorConfig, weights: &Weights<'a>, prefix: &'a str) -> Generator<'a> {
        Generator { config, weights: weights.below(&format!("{prefix}.")), prefix }
    }

    /// Mel bins per channel of the input: what the stored first convolution takes.
    pub fn mel_bins(&self) -> Option<usize> {
        self.weights
            .shape("conv_pre.weight")
            .filter(|s| s.len() == 3 && s[1] > 0 && s[1].is_multiple_of(STEREO))
            .map(|s| s[1] / STEREO)
    }

    /// The waveform `[1, n, 2]` of a log-mel spectrogram `[1, t, m, 2]`, in the dtype of `mel`.
    pub fn waveform(&self, b: &Builder, functions: &Functions, mel: Spectrogram) -> Sequence {
        let layers = Layers { b, functions, config: self.config, weights: &self.weights };
        b.scope(self.prefix, || layers.waveform(mel))
    }
}

/// Writes a generator, or one block of it.
struct Layers<'a> {
    b: &'a Builder,
    functions: &'a Functions,
    config: &'a GeneratorConfig,
    weights: &'a Weights<'a>,
}

impl Layers<'_> {
    fn waveform(&self, mel: Spectrogram) -> Sequence {
        let (b, config) = (self.b, self.config);
        let features = mel.c * mel.m;
        let value = b.reshape(b.transpose(mel.value, &[0, 1, 3, 2]), &[1, mel.t, features]);
        let mut x = self.conv("conv_pre", Sequence { value, t: mel.t, c: features }, config.channels, OUTER_KERNEL, 1);
        for stage in 0..config.rates.len() {
            if config.kind == GeneratorKind::HifiGan {
                x.value = b.leaky_relu(x.value, SLOPE);
            }
            x = self.upsample(stage, x);
            x = self.mean_of_blocks(stage, x);
        }
        x = match config.kind {
            GeneratorKind::HifiGan => Sequence { value: b.leaky_relu(x.value, FINAL_SLOPE), ..x },
            GeneratorKind::BigVgan => self.snake("act_post", x),
        };
        let y = self.convolve("conv_post", x, STEREO, OUTER_KERNEL, 1, config.has_final_bias);
        let value = match config.final_activation {
            FinalActivation::Tanh => b.unary(Unary::Tanh, y.value),
            FinalActivation::Clamp => b.clamp(y.value, -1.0, 1.0),
            FinalActivation::None => y.value,
        };
        Sequence { value, ..y }
    }

    /// Calls the block `key`, which keeps length and width.
    fn block(
        &self,
        function: &str,
        key: &str,
        x: Sequence,
        body: impl FnOnce(&Layers, Sequence) -> ValueId,
    ) -> Sequence {
        let (functions, config) = (self.functions, self.config);
        let block = Block::at(function, key);
        let value = functions.call_one(self.b, self.weights, block, &[("x", x.value)], |b, weights, params| {
            body(&Layers { b, functions, config, weights }, Sequence { value: params[0], ..x })
        });
        Sequence { value, ..x }
    }

    fn name(&self, key: &str, x: Sequence) -> Sequence {
        self.b.name(key, x.value);
        x
    }

    /// Convolution of the module `key` that keeps the length, with a bias.
    fn conv(&self, key: &str, x: Sequence, c: usize, k: usize, dilation: usize) -> Sequence {
        self.convolve(key, x, c, k, dilation, true)
    }

    fn convolve(&self, key: &str, x: Sequence, c: usize, k: usize, dilation: usize, has_bias: bool) -> Sequence {
        let b = self.b;
        let weight = self.weights.get(b, &format!("{key}.weight"), &[c, x.c, k]);
        let pad = (k - 1) * dilation / 2;
        let op = Conv { stride: vec![1], dilation: vec![dilation], pad: vec![(pad, pad)], groups: 1 };
        let mut value = b.conv(op, x.value, b.transpose(weight, &[2, 1, 0]));
        if has_bias {
            value = b.add(value, self.weights.get(b, &format!("{key}.bias"), &[c]));
        }
        self.name(key, Sequence { value, t: x.t, c })
    }

    /// Transposed convolution of a stage; its weights are stored `[i, o, k]`.
    fn upsample(&self, stage: usize, x: Sequence) -> Sequence {
        let (b, rate, k) = (self.b, self.config.rates[stage], self.config.rate_kernels[stage]);
        let c = self.config.stage_channels(stage);
        let weight = self.weights.get(b, &format!("ups.{stage}.weight"), &[x.c, c, k]);
        let bias = self.weights.get(b, &format!("ups.{stage}.bias"), &[c]);
        let cut = (k - rate) / 2;
        let op = ConvTranspose { stride: vec![rate], dilation: vec![1], pad: vec![(cut, cut)], groups: 1 };
        let value = b.add(b.conv_transpose(op, x.value, b.transpose(weight, &[2, 0, 1])), bias);
        let t = x.t.saturating_mul(rate).saturating_add((k - rate) % 2);
        self.name(&format!("ups.{stage}"), Sequence { value, t, c })
    }

    /// Mean of the residual blocks of a stage, in f32, rounded once.
    fn mean_of_blocks(&self, stage: usize, x: Sequence) -> Sequence {
        let b = self.b;
        let count = self.config.block_kernels.len();
        let dtype = b.ty(x.value).dtype;
        let sum = (0..count).map(|j| {
            let key = format!("resblocks.{}", stage * count + j);
            let y = self.block("vocoder_res_block", &key, x, |layers, x| layers.res_block(j, x));
            b.cast(y.value, DType::F32)
        });
        let value = sum.reduce(|a, y| b.add(a, y)).unwrap_or(x.value);
        Sequence { value: b.cast(b.div(value, b.scalar(count as f64)), dtype), ..x }
    }

    /// A residual block of form `j`: `x += conv2(act(conv1(act(x))))` for every dilation.
    fn res_block(&self, j: usize, x: Sequence) -> ValueId {
        let k = self.config.block_kernels[j];
        let activate = |key: String, x: Sequence| match self.config.kind {
            GeneratorKind::HifiGan => Sequence { value: self.b.leaky_relu(x.value, SLOPE), ..x },
            GeneratorKind::BigVgan => self.snake(&key, x),
        };
        let mut x = x;
        for (m, &dilation) in self.config.block_dilations[j].iter().enumerate() {
            let h = self.conv(&format!("convs1.{m}"), activate(format!("acts1.{m}"), x), x.c, k, dilation);
            let h = self.conv(&format!("convs2.{m}"), activate(format!("acts2.{m}"), h), x.c, k, 1);
            x.value = self.b.add(x.value, h.value);
        }
        x.value
    }

    /// The anti-aliased activation `key`.
    fn snake(&self, key: &str, x: Sequence) -> Sequence {
        self.block("vocoder_snake", key, x, |layers, x| layers.snake_body(x))
    }

    /// Anti-aliased SnakeBeta: twice the rate, `x + sin²(e^α x) / (e^β + 1e-9)`, and half the rate again.
    fn snake_body(&self, x: Sequence) -> ValueId {
        let b = self.b;
        let parameter = |key: &str| {
            let logarithm = self.weights.get(b, key, &[x.c]);
            b.unary(Unary::Exp, b.cast(logarithm, DType::F32))
        };
        // One filter for all channels: [1, 1, 12] → [12, 1, c].
        let filter = |key: &str| {
            let taps = self.weights.get(b, key, &[1, 1, FILTER_TAPS]);
            b.broadcast(b.reshape(taps, &[FILTER_TAPS, 1, 1]), &[FILTER_TAPS, 1, x.c])
        };
        let padded = b.pad(x.value, &[0, 5, 0], &[0, 5, 0], PadMode::Edge);
        let op = ConvTranspose { stride: vec![2], dilation: vec![1], pad: vec![(15, 15)], groups: x.c };
        let up = b.mul_scalar(b.conv_transpose(op, padded, filter("upsample.filter")), 2.0);
        b.name("upsample", up);
        let bent = b.snake(up, parameter("act.alpha"), parameter("act.beta"));
        let padded = b.pad(bent, &[0, 5, 0], &[0, 6, 0], PadMode::Edge);
        let op = Conv { stride: vec![2], dilation: vec![1], pad: vec![(0, 0)], groups: x.c };
        b.conv(op, padded, filter("downsample.lowpass.filter"))
    }
}
