//! Tensors of a latent upsampler.

use serde_json::Value;

use super::{Fields, List, TensorSpec};
use crate::ModelError;

/// All tensors of the upsampler file with `config`.
///
/// # Errors
/// If the configuration lacks a number or has one that makes no sense.
pub fn upsampler(config: &Value) -> Result<Vec<TensorSpec>, ModelError> {
    let read = Fields::new("upsampler", config);
    let input = read.count_or("in_channels", 128)?;
    let mid = read.count_or("mid_channels", 512)?;
    let kernel: &[usize] = match read.count_or("dims", 3)? {
        2 => &[3, 3],
        3 => &[3, 3, 3],
        other => return Err(read.problem("dims", &format!("is {other}, expected 2 or 3"))),
    };
    let mut list = List::below("");
    list.conv("initial_conv", mid, input, kernel, true);
    list.norm("initial_norm", mid);
    for stage in ["res_blocks", "post_upsample_res_blocks"] {
        for block in 0..read.layers("num_blocks_per_stage").or_else(|e| match read.has("num_blocks_per_stage") {
            true => Err(e),
            false => Ok(4),
        })? {
            for part in [1, 2] {
                list.conv(&format!("{stage}.{block}.conv{part}"), mid, mid, kernel, true);
                list.norm(&format!("{stage}.{block}.norm{part}"), mid);
            }
        }
    }
    let (space, time) = (read.flag("spatial_upsample", true)?, read.flag("temporal_upsample", false)?);
    match (space, time) {
        (true, true) => list.conv("upsampler.0", 8 * mid, mid, &[3, 3, 3], true),
        (false, true) => list.conv("upsampler.0", 2 * mid, mid, &[3, 3, 3], true),
        (true, false) if read.flag("rational_resampler", false)? => {
            let numerator = numerator(&read, config)?;
            list.conv("upsampler.conv", numerator * numerator * mid, mid, &[3, 3], true);
            list.push("upsampler.blur_down.kernel", &[1, 1, 5, 5]);
        }
        (true, false) => list.conv("upsampler.0", 4 * mid, mid, &[3, 3], true),
        (false, false) => return Err(read.problem("spatial_upsample", "neither space nor time is enlarged")),
    }
    list.conv("final_conv", input, mid, kernel, true);
    Ok(list.finish())
}

/// By how much a rational resampler enlarges before it decimates.
fn numerator(read: &Fields<'_>, config: &Value) -> Result<usize, ModelError> {
    let scale = config.get("spatial_scale").map_or(Some(2.0), Value::as_f64);
    let known = [(0.75, 3), (1.5, 3), (2.0, 2), (4.0, 4)];
    let found = known.iter().find(|(s, _)| Some(*s) == scale).map(|(_, n)| *n);
    found.ok_or_else(|| read.problem("spatial_scale", "expected 0.75, 1.5, 2 or 4"))
}
