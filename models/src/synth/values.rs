//! Random weights under which a network behaves like a network: activations keep their scale from end to end, decoded
//! frames are neither constant nor saturated, and no input is ignored.
//!
//! Matrices and kernels are uniform with standard deviation `gain / sqrt(fan in)`; what is not a matrix (norms, tables,
//! statistics, fixed filters) gets a value of its kind, and so do the layers that make pixels (`smooth`). Everything is
//! rounded once to bf16.

use half::bf16;

use super::philox::Stream;
use super::smooth;
use super::tensors::TensorSpec;

/// Gains of matrices whose key contains the first entry; the last that applies counts, 1 is the default.
const GAINS: [(&str, f32); 11] = [
    // Attention that is not nearly uniform.
    (".to_q.", 1.4),
    (".to_k.", 1.4),
    (".ff.net.2.", 1.4),
    // Residual blocks after pixel norm and SiLU, which halves the variance.
    (".conv1.", 1.3),
    (".conv2.", 0.9),
    ("audio_vae.decoder.conv_out.", 1.0),
    ("audio_vae.encoder.conv_in.", 0.5),
    // A waveform that stays clear of the final tanh.
    ("vocoder.conv_pre.", 0.7),
    ("vocoder.resblocks.", 0.8),
    (".convs2.", 0.5),
    ("language_model.", 1.2),
];

/// The values of `tensor` under `seed`, as little-endian bf16.
pub(super) fn bytes(seed: u64, tensor: &TensorSpec) -> Vec<u8> {
    let mut stream = Stream::new(seed, &tensor.key);
    if let Some(values) = smooth::values(tensor, &mut stream) {
        return values.into_iter().flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
    }
    let len = tensor.shape.iter().product::<usize>();
    let kind = Kind::of(tensor);
    (0..len).flat_map(|i| bf16::from_f32(kind.value(i, &mut stream)).to_le_bytes()).collect()
}

enum Kind {
    /// Mean 0, this standard deviation.
    Centred(f32),
    /// Uniform from 0.6 to 1.4: weights of norms, standard deviations.
    AboutOne,
    /// Always this.
    Constant(f32),
    /// The index of the element.
    Index,
    /// Outer product of `[1, 4, 6, 4, 1] / 16`.
    Blur,
}

impl Kind {
    fn of(tensor: &TensorSpec) -> Kind {
        let key = tensor.key.as_str();
        let leaf = key.rsplit('.').next().unwrap_or(key);
        match leaf {
            "std-of-means" => return Kind::AboutOne,
            "mean-of-means" | "alpha" | "beta" | "per_channel_scale1" | "per_channel_scale2" => {
                return Kind::Centred(0.3);
            }
            "mean-of-stds" | "mean-of-stds_over_std-of-means" => return Kind::Constant(1.0),
            "channel" => return Kind::Index,
            "kernel" => return Kind::Blur,
            "timestep_scale_multiplier" => return Kind::Constant(1000.0),
            "learnable_registers" => return Kind::Centred(0.6),
            "bias" if key.contains("conv_post") => return Kind::Centred(0.04),
            "bias" => return Kind::Centred(0.15),
            _ if leaf.contains("scale_shift_table") => return Kind::Centred(0.35),
            _ => {}
        }
        match tensor.shape.as_slice() {
            // Gemma multiplies by 1 + weight.
            [_] | [] if key.starts_with("language_model.") => Kind::Centred(0.3),
            [_] | [] => Kind::AboutOne,
            // Multiplied by sqrt(hidden) when it is looked up.
            [_, hidden] if key.ends_with("embed_tokens.weight") => Kind::Centred((*hidden as f32).sqrt().recip()),
            [first, rest @ ..] => {
                // Transposed convolutions store [in, out, k], and about a third of the kernel meets one output.
                let fan_in = if key.contains(".ups.") {
                    first * (rest.last().copied().unwrap_or(1) / 3).max(1)
                } else {
                    rest.iter().product::<usize>()
                };
                let gain = GAINS.iter().rev().find(|(part, _)| key.contains(part)).map_or(1.0, |g| g.1);
                Kind::Centred(gain / (fan_in.max(1) as f32).sqrt())
            }
        }
    }

    fn value(&self, index: usize, stream: &mut Stream) -> f32 {
        const ROW: [f32; 5] = [1.0, 4.0, 6.0, 4.0, 1.0];
        match self {
            Kind::Centred(deviation) => deviation * stream.centred(),
            Kind::AboutOne => 0.6 + 0.8 * stream.uniform(),
            Kind::Constant(value) => *value,
            Kind::Index => index as f32,
            Kind::Blur => ROW[index / 5 % 5] * ROW[index % 5] / 256.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(key: &str, shape: &[usize]) -> Vec<f32> {
        let bytes = bytes(7, &TensorSpec { key: key.into(), shape: shape.into() });
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    }

    #[track_caller]
    fn check_deviation(key: &str, shape: &[usize], expected: f32) {
        let v = values(key, shape);
        let found = (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt();
        assert!((found / expected - 1.0).abs() < 0.1, "{key}: {found}, expected {expected}");
    }

    #[test]
    fn matrices_keep_the_scale() {
        check_deviation("model.diffusion_model.transformer_blocks.0.attn1.to_v.weight", &[64, 100], 0.1);
        check_deviation("model.diffusion_model.transformer_blocks.0.attn1.to_q.weight", &[64, 100], 0.14);
        check_deviation(
            "vae.decoder.up_blocks.0.res_blocks.0.conv2.conv.weight",
            &[16, 4, 3, 3, 3],
            0.9 / 108f32.sqrt(),
        );
        check_deviation("vocoder.ups.0.weight", &[25, 16, 12], 0.1);
        check_deviation("language_model.model.embed_tokens.weight", &[100, 64], 0.125);
    }

    #[test]
    fn fixed_values_are_what_they_stand_for() {
        let blur = values("upsampler.blur_down.kernel", &[1, 1, 5, 5]);
        assert_eq!((blur[0], blur[12], blur.iter().sum::<f32>()), (1.0 / 256.0, 36.0 / 256.0, 1.0));
        assert_eq!(values("vae.per_channel_statistics.channel", &[3]), [0.0, 1.0, 2.0]);
        assert!(values("initial_norm.weight", &[50]).iter().all(|v| (0.59..1.41).contains(v)));
    }
}
