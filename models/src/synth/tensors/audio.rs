//! Tensors of the audio VAE and of the vocoders.

use serde_json::Value;

use super::{Fields, List, TensorSpec};
use crate::ModelError;

/// Encoder, decoder and statistics of the audio VAE.
///
/// # Errors
/// If the configuration lacks a number or has one that makes no sense.
pub fn audio_vae(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let read = Fields::new("audio_vae.model.params.ddconfig", &config["model"]["params"]["ddconfig"]);
    if read.has("attn_resolutions") && !read.list("attn_resolutions")?.is_empty() {
        return Err(read.problem("attn_resolutions", "is not empty, which is not supported"));
    }
    let base = read.count_or("ch", 128)?;
    let widths: Vec<usize> = read.counts("ch_mult")?.iter().map(|m| base.saturating_mul(*m)).collect();
    let (Some(&last), false) = (widths.last(), widths.iter().any(|&w| w > super::MOST_WIDTH)) else {
        return Err(read.problem("ch_mult", "expected at least one factor, and none beyond reason"));
    };
    let blocks = read.layers("num_res_blocks")?;
    let latent = read.count_or("z_channels", 8)?;
    let has_attention = read.flag("mid_block_add_attention", true)?;
    let mut list = List::below("audio_vae.");

    let mut encoder = list.inside("encoder.");
    encoder.conv("conv_in.conv", base, read.count_or("in_channels", 2)?, &[3, 3], true);
    let mut width = base;
    for (level, &next) in widths.iter().enumerate() {
        for block in 0..blocks {
            resnet(&mut encoder.inside(&format!("down.{level}.block.{block}.")), width, next);
            width = next;
        }
        if level + 1 < widths.len() {
            encoder.conv(&format!("down.{level}.downsample.conv"), width, width, &[3, 3], true);
        }
    }
    middle(&mut encoder, last, has_attention);
    let output = if read.flag("double_z", true)? { 2 * latent } else { latent };
    encoder.conv("conv_out.conv", output, last, &[3, 3], true);

    let mut decoder = list.inside("decoder.");
    decoder.conv("conv_in.conv", last, latent, &[3, 3], true);
    middle(&mut decoder, last, has_attention);
    for (level, &next) in widths.iter().enumerate().rev() {
        for block in 0..=blocks {
            resnet(&mut decoder.inside(&format!("up.{level}.block.{block}.")), width, next);
            width = next;
        }
        if level > 0 {
            decoder.conv(&format!("up.{level}.upsample.conv.conv"), width, width, &[3, 3], true);
        }
    }
    decoder.conv("conv_out.conv", read.count_or("out_ch", 2)?, width, &[3, 3], true);

    for statistic in ["mean-of-means", "std-of-means"] {
        list.push(&format!("per_channel_statistics.{statistic}"), &[base]);
    }
    Ok(list.finish())
}

fn resnet(list: &mut List, input: usize, output: usize) {
    list.conv("conv1.conv", output, input, &[3, 3], true);
    list.conv("conv2.conv", output, output, &[3, 3], true);
    if input != output {
        list.conv("nin_shortcut.conv", output, input, &[1, 1], true);
    }
}

fn middle(list: &mut List, width: usize, has_attention: bool) {
    for block in ["block_1", "block_2"] {
        resnet(&mut list.inside(&format!("mid.{block}.")), width, width);
    }
    if has_attention {
        for projection in ["q", "k", "v", "proj_out"] {
            list.conv(&format!("mid.attn_1.{projection}"), width, width, &[1, 1], true);
        }
    }
}

/// The vocoder: one generator, or two with the front end of bandwidth extension between them.
///
/// # Errors
/// As for [`audio_vae`].
pub fn vocoder(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let mut list = List::below("vocoder.");
    let Some(extension) = config.get("bwe") else {
        generator(&mut list, &Fields::new("vocoder", config), 64)?;
        return Ok(list.finish());
    };
    let read = Fields::new("vocoder.bwe", extension);
    let (mels, window) = (read.count_or("num_mels", 64)?, read.count("n_fft")?);
    generator(&mut list.inside("vocoder."), &Fields::new("vocoder.vocoder", &config["vocoder"]), 64)?;
    generator(&mut list.inside("bwe_generator."), &read, mels)?;
    list.push("mel_stft.mel_basis", &[mels, window / 2 + 1]);
    list.push("mel_stft.stft_fn.forward_basis", &[window / 2 * 2 + 2, 1, window]);
    list.push("mel_stft.stft_fn.inverse_basis", &[window / 2 * 2 + 2, 1, window]);
    Ok(list.finish())
}

/// One generator. It reads two channels of `mels` bands each.
fn generator(list: &mut List, read: &Fields<'_>, mels: usize) -> Result<(), ModelError> {
    let is_antialiased = match read.text("resblock", "1") {
        "1" => false,
        "AMP1" => true,
        other => return Err(read.problem("resblock", &format!("is `{other}`, expected `1` or `AMP1`"))),
    };
    let kernels = read.counts("upsample_kernel_sizes")?;
    let block_kernels = read.counts("resblock_kernel_sizes")?;
    let dilations = read.list("resblock_dilation_sizes")?;
    if dilations.len() != block_kernels.len() || read.list("upsample_rates")?.len() != kernels.len() {
        return Err(read.problem("resblock_dilation_sizes", "lists of kernels, rates and dilations differ in length"));
    }
    let has_beta = read.text("activation", "snake") == "snakebeta";
    let mut width = read.count("upsample_initial_channel")?;
    list.conv("conv_pre", width, 2 * mels, &[7], true);
    for (stage, &kernel) in kernels.iter().enumerate() {
        if !width.is_multiple_of(2) {
            return Err(read.problem("upsample_initial_channel", "cannot be halved at every stage"));
        }
        // Transposed convolutions store the input width first.
        list.push(&format!("ups.{stage}.weight"), &[width, width / 2, kernel]);
        list.push(&format!("ups.{stage}.bias"), &[width / 2]);
        width /= 2;
        for (k, (&kernel, dilations)) in block_kernels.iter().zip(dilations).enumerate() {
            let mut list = list.inside(&format!("resblocks.{}.", stage * block_kernels.len() + k));
            let layers = dilations.as_array().map_or(0, Vec::len);
            for layer in 0..layers {
                for part in [1, 2] {
                    list.conv(&format!("convs{part}.{layer}"), width, width, &[kernel], true);
                    if is_antialiased {
                        activation(&mut list, &format!("acts{part}.{layer}"), width, has_beta);
                    }
                }
            }
        }
    }
    if is_antialiased {
        activation(list, "act_post", width, has_beta);
    }
    list.conv("conv_post", 2, width, &[7], read.flag("use_bias_at_final", true)?);
    Ok(())
}

fn activation(list: &mut List, key: &str, width: usize, has_beta: bool) {
    list.push(&format!("{key}.act.alpha"), &[width]);
    if has_beta {
        list.push(&format!("{key}.act.beta"), &[width]);
    }
    list.push(&format!("{key}.upsample.filter"), &[1, 1, 12]);
    list.push(&format!("{key}.downsample.lowpass.filter"), &[1, 1, 12]);
}
