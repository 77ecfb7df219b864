//! Statistics of latents, and whether normalising and patches can be undone.

use anyhow::Result;
use clap::Args;
use ltxc_models::video_vae::VideoVaeConfig;
use ltxc_runtime::random::NormalStream;
use ltxc_runtime::stats::Stats;
use serde_json::json;

use super::{checkpoint, statistics};
use crate::args::ModelArgs;
use crate::debug::recording::Distance;

/// `ltxc debug vae norm`.
#[derive(Debug, Args)]
pub struct NormArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
}

pub(super) fn norm(args: &NormArgs, json_output: bool) -> Result<bool> {
    let checkpoint = checkpoint(&args.model)?;
    let [mean, std] = statistics(&checkpoint)?;
    let patch = VideoVaeConfig::from_json(checkpoint.section("vae")?)?.patch_size;
    let c = mean.len();
    let latent = NormalStream::new(0, "latent").draw(c * 64);
    let there: Vec<f32> = latent.iter().enumerate().map(|(i, v)| (v - mean[i % c]) / std[i % c]).collect();
    let back: Vec<f32> = there.iter().enumerate().map(|(i, v)| v * std[i % c] + mean[i % c]).collect();
    let error = Distance::of(&back, &latent);
    let size = [2 * patch, 3 * patch];
    let pixels = NormalStream::new(0, "pixels").draw(size[0] * size[1] * 3);
    let patches = packed(&pixels, size[1], patch);
    let patched = Distance::of(&unpacked(&patches, size[1], patch), &pixels).max_abs;
    let (m, s) = (Stats::of(&[c], &mean), Stats::of(&[c], &std));
    let is_identity = m.min == 0.0 && m.max == 0.0 && s.min == 1.0 && s.max == 1.0;
    let ok = error.relative_l2 < 1e-5 && patched == 0.0 && s.min > 0.0 && !m.is_bad() && !s.is_bad();
    if json_output {
        println!(
            "{}",
            json!({"channels": c, "mean": [m.min, m.max], "std": [s.min, s.max], "identity": error.relative_l2,
                "patches": patched, "does_nothing": is_identity, "ok": ok})
        );
        return Ok(ok);
    }
    println!("{c} channels, means {:.4} to {:.4}, deviations {:.4} to {:.4}", m.min, m.max, s.min, s.max);
    if is_identity {
        println!("all means are 0 and all deviations 1: normalising does nothing");
    }
    println!("normalised and undone: relative L2 {:.2e}", error.relative_l2);
    println!(
        "patches of {patch}x{patch} and undone: largest difference {patched:.1e} ({})",
        if ok { "ok" } else { "BAD" }
    );
    Ok(ok)
}

/// Pixels `[h, w, 3]` as patches, the channels of each packed as colour, column, row.
fn packed(pixels: &[f32], width: usize, patch: usize) -> Vec<f32> {
    places(pixels.len(), width, patch).into_iter().map(|at| pixels[at]).collect()
}

/// The inverse of [`packed`].
fn unpacked(patches: &[f32], width: usize, patch: usize) -> Vec<f32> {
    let mut pixels = vec![0.0; patches.len()];
    for (value, at) in patches.iter().zip(places(patches.len(), width, patch)) {
        pixels[at] = *value;
    }
    pixels
}

/// Index among pixels of every value of the patches.
fn places(len: usize, width: usize, patch: usize) -> Vec<usize> {
    let (rows, columns) = (len / (3 * width * patch).max(1), width / patch.max(1));
    let mut places = Vec::with_capacity(len);
    for y in 0..rows {
        for x in 0..columns {
            for colour in 0..3 {
                for column in 0..patch {
                    for row in 0..patch {
                        places.push(((y * patch + row) * width + x * patch + column) * 3 + colour);
                    }
                }
            }
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_vary_fastest_in_a_patch() {
        let pixels: Vec<f32> = (0..12).map(|i| i as f32).collect();
        assert_eq!(packed(&pixels, 2, 2), [0.0, 6.0, 3.0, 9.0, 1.0, 7.0, 4.0, 10.0, 2.0, 8.0, 5.0, 11.0]);
        assert_eq!(unpacked(&packed(&pixels, 2, 2), 2, 2), pixels);
    }
}
