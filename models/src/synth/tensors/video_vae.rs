//! Tensors of a video VAE with convolutional decoder.
//!
//! # Easy to get wrong
//! - The decoder's block list is stored back to front; block indices in keys count in order of execution.
//! - A plain strided encoder block *is* the convolution wrapper (`down_blocks.1.conv.weight`), a space-to-depth one owns it
//!   (`down_blocks.1.conv.conv.weight`).
//! - The width of the encoder at the pixel end is `latent_channels`.

use serde_json::Value;

use super::{Fields, List, TensorSpec, count};
use crate::ModelError;

/// Encoder, decoder and the two statistics that are used.
///
/// # Errors
/// If the configuration lacks a number, has one that makes no sense, or names an unknown block.
pub fn video_vae(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let read = Fields::new("vae", config);
    let latent = read.count_or("latent_channels", 128)?;
    let mut list = List::below("vae.");
    encoder(&read, &mut list.inside("encoder."), latent)?;
    decoder(&read, &mut list.inside("decoder."), latent)?;
    for statistic in ["mean-of-means", "std-of-means"] {
        list.push(&format!("per_channel_statistics.{statistic}"), &[latent]);
    }
    Ok(list.finish())
}

/// The statistics that published files carry and nobody uses.
///
/// # Errors
/// As for [`video_vae`].
pub fn unused_statistics(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let latent = Fields::new("vae", config).count_or("latent_channels", 128)?;
    let mut list = List::below("vae.per_channel_statistics.");
    for statistic in ["channel", "mean-of-stds", "mean-of-stds_over_std-of-means"] {
        list.push(statistic, &[latent]);
    }
    Ok(list.finish())
}

const KERNEL: [usize; 3] = [3, 3, 3];

/// One entry of a block list.
struct Block<'a> {
    name: &'a str,
    settings: Fields<'a>,
    layers: usize,
}

impl<'a> Block<'a> {
    fn read(read: &Fields<'a>, key: &'a str, entry: &'a Value) -> Result<Block<'a>, ModelError> {
        let pair = entry.as_array().filter(|p| p.len() == 2).and_then(|p| Some((p[0].as_str()?, &p[1])));
        let Some((name, value)) = pair else {
            return Err(read.problem(key, &format!("has the block {entry}, expected a name and settings")));
        };
        let settings = read.inside(key, value);
        let layers = match count(value) {
            Some(layers) => layers,
            None if name == "res_x" => settings.layers("num_layers")?,
            None => 1,
        };
        Ok(Block { name, settings, layers })
    }

    fn multiplier(&self, default: usize) -> Result<usize, ModelError> {
        self.settings.count_or("multiplier", default)
    }
}

/// Elements of the stride of a `compress_*` block.
fn stride(name: &str) -> Option<usize> {
    let axes = name.strip_prefix("compress_")?;
    let axes = axes.strip_suffix("_res").or_else(|| axes.strip_suffix("_x_y")).unwrap_or(axes);
    match axes {
        "time" => Some(2),
        "space" => Some(4),
        "all" => Some(8),
        _ => None,
    }
}

fn encoder(read: &Fields<'_>, list: &mut List, latent: usize) -> Result<(), ModelError> {
    let patch = read.count_or("patch_size", 4)?;
    let group_norm = read.text("norm_layer", "pixel_norm") == "group_norm";
    let mut width = latent;
    list.conv("conv_in.conv", width, read.count_or("in_channels", 3)? * patch * patch, &KERNEL, true);
    for (n, entry) in read.list("encoder_blocks")?.iter().enumerate() {
        let block = Block::read(read, "encoder_blocks", entry)?;
        let mut list = list.inside(&format!("down_blocks.{n}."));
        match block.name {
            "res_x" => {
                for layer in 0..block.layers {
                    resnet(&mut list.inside(&format!("res_blocks.{layer}.")), width, width, group_norm);
                }
            }
            "res_x_y" => {
                let next = width * block.multiplier(2)?;
                resnet(&mut list, width, next, group_norm);
                width = next;
            }
            "attn" => attention(&mut list, width),
            name => {
                let Some(stride) = stride(name) else {
                    return Err(read.problem("encoder_blocks", &format!("has the unknown block `{name}`")));
                };
                let next = match name {
                    _ if name.ends_with("_res") || name.ends_with("_x_y") => width * block.multiplier(2)?,
                    _ => width,
                };
                if name.ends_with("_res") {
                    list.conv("conv.conv", divided(read, "encoder_blocks", next, stride)?, width, &KERNEL, true);
                } else {
                    list.conv("conv", next, width, &KERNEL, true);
                }
                width = next;
            }
        }
    }
    if group_norm {
        list.norm("conv_norm_out", width);
    }
    let output = match read.text("latent_log_var", "uniform") {
        "per_channel" => 2 * latent,
        "uniform" | "constant" => latent + 1,
        other => return Err(read.problem("latent_log_var", &format!("is `{other}`, which is not supported"))),
    };
    list.conv("conv_out.conv", output, width, &KERNEL, true);
    Ok(())
}

fn decoder(read: &Fields<'_>, list: &mut List, latent: usize) -> Result<(), ModelError> {
    let patch = read.count_or("patch_size", 4)?;
    let group_norm = read.text("norm_layer", "pixel_norm") == "group_norm";
    let has_timestep = read.flag("timestep_conditioning", true)?;
    let entries = read.list("decoder_blocks")?;
    let blocks = entries.iter().map(|e| Block::read(read, "decoder_blocks", e)).collect::<Result<Vec<_>, _>>()?;
    let mut width = read.count_or("decoder_base_channels", 128)?;
    for block in &blocks {
        width = width.saturating_mul(reduction(block)?);
    }
    if width > super::MOST_WIDTH {
        return Err(read.problem("decoder_blocks", "multiplies the width beyond reason"));
    }
    list.conv("conv_in.conv", width, latent, &KERNEL, true);
    for (n, block) in blocks.iter().rev().enumerate() {
        let mut list = list.inside(&format!("up_blocks.{n}."));
        let inject_noise = block.settings.flag("inject_noise", false)?;
        match block.name {
            "res_x" => {
                for layer in 0..block.layers {
                    let mut list = list.inside(&format!("res_blocks.{layer}."));
                    resnet(&mut list, width, width, group_norm);
                    noise(&mut list, width, inject_noise);
                    if has_timestep {
                        list.push("scale_shift_table", &[4, width]);
                    }
                }
                if has_timestep {
                    embedder(&mut list, "time_embedder", 4 * width);
                }
            }
            "res_x_y" => {
                let next = divided(read, "decoder_blocks", width, reduction(block)?)?;
                resnet(&mut list, width, next, group_norm);
                noise(&mut list, width, inject_noise);
                width = next;
            }
            "attn" => attention(&mut list, width),
            name => {
                let Some(stride) =
                    stride(name).filter(|_| ["compress_time", "compress_space", "compress_all"].contains(&name))
                else {
                    return Err(read.problem("decoder_blocks", &format!("has the unknown block `{name}`")));
                };
                let next = divided(read, "decoder_blocks", width, reduction(block)?)?;
                list.conv("conv.conv", stride * next, width, &KERNEL, true);
                width = next;
            }
        }
    }
    if group_norm {
        list.norm("conv_norm_out", width);
    }
    if has_timestep {
        list.push("timestep_scale_multiplier", &[]);
        embedder(list, "last_time_embedder", 2 * width);
        list.push("last_scale_shift_table", &[2, width]);
    }
    list.conv("conv_out.conv", read.count_or("out_channels", 3)? * patch * patch, width, &KERNEL, true);
    Ok(())
}

/// By how much a decoder block divides the width.
fn reduction(block: &Block<'_>) -> Result<usize, ModelError> {
    match block.name {
        "res_x_y" => block.multiplier(2),
        name if name.starts_with("compress_") => block.multiplier(1),
        _ => Ok(1),
    }
}

fn divided(read: &Fields<'_>, key: &str, width: usize, by: usize) -> Result<usize, ModelError> {
    match width.checked_div(by).filter(|n| n * by == width) {
        Some(n) => Ok(n),
        None => Err(read.problem(key, &format!("divides {width} channels by {by}"))),
    }
}

fn resnet(list: &mut List, input: usize, output: usize, group_norm: bool) {
    if group_norm {
        list.norm("norm1", input);
        list.norm("norm2", output);
    }
    list.conv("conv1.conv", output, input, &KERNEL, true);
    list.conv("conv2.conv", output, output, &KERNEL, true);
    if input != output {
        list.norm("norm3", input);
        list.conv("conv_shortcut", output, input, &[1, 1, 1], true);
    }
}

fn noise(list: &mut List, width: usize, inject_noise: bool) {
    if inject_noise {
        list.push("per_channel_scale1", &[width, 1, 1]);
        list.push("per_channel_scale2", &[width, 1, 1]);
    }
}

fn embedder(list: &mut List, key: &str, width: usize) {
    list.linear(&format!("{key}.timestep_embedder.linear_1"), width, 256, true);
    list.linear(&format!("{key}.timestep_embedder.linear_2"), width, width, true);
}

fn attention(list: &mut List, width: usize) {
    list.push("norm.gamma", &[width, 1, 1]);
    list.conv("to_qkv", 3 * width, width, &[1, 1], true);
    list.conv("proj", width, width, &[1, 1], true);
}
