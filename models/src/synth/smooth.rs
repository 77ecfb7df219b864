//! Kernels of the layers that turn channels into pixels, chosen so that neighbouring pixels fit together.
//!
//! With random kernels every offset inside a cell of pixels gets colours of its own, and a decoded frame is noise. Here a
//! layer mixes channels at random, the same way for every offset, and interpolates between cells:
//!
//! `w[group, offset, input, tap] = mix[group, input] · interpolation[offset, tap]`
//!
//! # Easy to get wrong
//! - The published upsampling block adds its input, moved from channels to offsets, to what its convolution gives. Each
//!   offset would get another channel of it, so the centre tap takes that away again.
//! - Offsets are (frame, row, column), column fastest; in the last layer (column, row), row fastest.

use super::philox::Stream;
use super::tensors::TensorSpec;

/// Extents of every kernel here: frames, rows, columns.
const KERNEL: usize = 3;

/// Cells of the upsampling blocks: offsets per axis, and all of them.
const CELL: [usize; 3] = [2, 2, 2];

/// Rows and columns of a patch.
const PATCH: usize = 4;

/// Standard deviation of a mix whose inputs have a mean square of 1: frames that use most of the range.
const COLOUR_GAIN: f32 = 0.7;

/// The values of `tensor` if it is a weight or bias of such a layer in a decoder of LTX-2.
pub(super) fn values(tensor: &TensorSpec, stream: &mut Stream) -> Option<Vec<f32>> {
    let key = tensor.key.strip_prefix("vae.decoder.")?;
    let (layer, leaf) = key.rsplit_once('.')?;
    let is_last = layer == "conv_out.conv";
    let is_upsampler = layer.starts_with("up_blocks.") && layer.split('.').count() == 4;
    if !(is_last || is_upsampler) {
        return None;
    }
    let offsets: Vec<[usize; 3]> = if is_last {
        (0..PATCH * PATCH).map(|i| [0, i % PATCH, i / PATCH]).collect()
    } else {
        (0..CELL.iter().product()).map(|i| [i / 4, i / 2 % 2, i % 2]).collect()
    };
    let cell = if is_last { [1, PATCH, PATCH] } else { CELL };
    match (leaf, tensor.shape.as_slice()) {
        ("weight", &[outputs, inputs, KERNEL, KERNEL, KERNEL]) => {
            let gain = if is_last { COLOUR_GAIN } else { 1.0 };
            let groups = outputs / offsets.len();
            let deviation = gain / (inputs as f32).sqrt();
            let mix: Vec<f32> = (0..groups * inputs).map(|_| deviation * stream.centred()).collect();
            let mut values = Vec::with_capacity(outputs * inputs * KERNEL.pow(3));
            for group in 0..groups {
                for (number, offset) in offsets.iter().enumerate() {
                    for input in 0..inputs {
                        // The groups of the input that is added are an eighth of its channels, and repeat.
                        let is_added =
                            is_upsampler && input == group % (inputs / offsets.len()) * offsets.len() + number;
                        let factor = mix[group * inputs + input];
                        for tap in 0..KERNEL.pow(3) {
                            let taps = [tap / (KERNEL * KERNEL), tap / KERNEL % KERNEL, tap % KERNEL];
                            let weight: f32 = (0..3).map(|a| interpolation(offset[a], cell[a], taps[a])).product();
                            let added = if is_added && taps == [1; 3] { 1.0 } else { 0.0 };
                            values.push(factor * weight - added);
                        }
                    }
                }
            }
            Some(values)
        }
        ("bias", &[outputs]) => {
            let groups: Vec<f32> = (0..outputs / offsets.len()).map(|_| 0.15 * stream.centred()).collect();
            Some(groups.iter().flat_map(|&v| std::iter::repeat_n(v, offsets.len())).collect())
        }
        _ => None,
    }
}

/// Weight of tap −1, 0 or 1 (`tap` 0 to 2) for the pixel number `offset` of a cell of `n`: linear between the middles of
/// cells. Cells of a single pixel are blurred over their neighbours.
fn interpolation(offset: usize, n: usize, tap: usize) -> f32 {
    if n == 1 {
        return [0.25, 0.5, 0.25][tap];
    }
    let position = (offset as f32 + 0.5) / n as f32 - 0.5;
    [(-position).max(0.0), 1.0 - position.abs(), position.max(0.0)][tap]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_of_a_constant_cell_are_equal() {
        let spec = TensorSpec { key: "vae.decoder.conv_out.conv.weight".into(), shape: vec![48, 4, 3, 3, 3] };
        let values = values(&spec, &mut Stream::new(1, "x")).unwrap();
        let sums: Vec<f32> = values.chunks(27).map(|taps| taps.iter().sum()).collect();
        for colour in sums.chunks(16 * 4) {
            for pixel in colour.chunks(4) {
                assert!(pixel.iter().zip(colour).all(|(a, b)| (a - b).abs() < 1e-6), "{colour:?}");
            }
        }
        assert!(sums[0] != sums[64] && sums[0] != sums[1]);
    }

    #[test]
    fn upsampling_takes_its_own_input_away() {
        let spec = TensorSpec { key: "vae.decoder.up_blocks.1.conv.conv.weight".into(), shape: vec![64, 16, 3, 3, 3] };
        let values = values(&spec, &mut Stream::new(1, "x")).unwrap();
        // Group 3 of 8 adds group 1 of 2 of the input: offset 5 of it is channel 13.
        let sum = |output: usize, input: usize| values[(output * 16 + input) * 27..][..27].iter().sum::<f32>();
        let (with, without) = (sum(3 * 8 + 5, 13), sum(3 * 8 + 4, 13));
        assert!((with - without + 1.0).abs() < 1e-5, "{with} {without}");
    }

    #[test]
    fn other_tensors_are_left_alone() {
        for key in ["vae.decoder.up_blocks.0.res_blocks.1.conv1.conv.weight", "vae.encoder.conv_out.conv.weight"] {
            let spec = TensorSpec { key: key.into(), shape: vec![16, 16, 3, 3, 3] };
            assert_eq!(values(&spec, &mut Stream::new(1, "x")), None);
        }
    }
}
