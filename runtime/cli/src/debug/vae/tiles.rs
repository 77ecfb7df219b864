//! Decoding in tiles and whole: where the two differ, and whether seams show.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_ir::TensorType;
use ltxc_ir::eval::Tensor;
use ltxc_ir::tiling::TilePlan;
use ltxc_models::video_vae::VideoVaeConfig;
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::media::png;
use ltxc_runtime::pipeline::tiles::{Sum, crop};
use serde_json::{Value, json};

use super::encode::psnr;
use super::{LatentArgs, Model};
use crate::debug::modules::Side;
use crate::debug::recording::Distance;
use crate::job::VaeTile;

/// How much larger steps across a seam may be than the same steps of the whole picture.
const MOST_SEAM: f64 = 2.0;

/// `ltxc debug vae tiles`.
#[derive(Debug, Args)]
pub struct TilesArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub latent: LatentArgs,
    /// Tiles, as for `ltxc compile`: SIZExOVERLAP,FRAMESxOVERLAP in pixels and frames.
    #[arg(long, default_value = "64x32,16x8")]
    pub vae_tile: String,
    /// Picture of the differences, the largest of all frames, white where they are largest.
    #[arg(long, value_name = "FILE.png")]
    pub map: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

pub(super) fn tiles(args: &TilesArgs, model: &Model<'_>, json_output: bool) -> Result<bool> {
    let config = model.video_vae()?;
    let latent = args.latent.load(config.latent_channels)?;
    let grid @ [_, h, w] = [1, 2, 3].map(|axis| latent.ty.shape[axis]);
    let factors = config.factors();
    let plan = VaeTile::parse(&args.vae_tile)?.tiles(grid, factors)?;
    if plan.len() < 2 {
        bail!("a latent of {grid:?} is one tile of `--vae-tile {}`; give a larger one or smaller tiles", args.vae_tile);
    }
    let values = latent.to_f32();
    let whole = decoded(model, &config, grid, &values)?;
    let size = [h * factors[1], w * factors[2]];
    let frames = whole.len() / (size[0] * size[1] * 3);
    let mut sum = Sum::new(size, 3, plan.decode_weights());
    for tile in plan.tiles() {
        let part = crop(&values, [h, w], config.latent_channels, tile);
        sum.add(&decoded(model, &config, tile.map(|axis| axis.len()), &part)?, plan.pixels(tile))?;
    }
    let tiled = sum.finished(frames).to_vec();
    let distance = Distance::of(&tiled, &whole);
    let seams = seams(&plan, size, &tiled, &whole);
    let map = largest(&tiled, &whole, size);
    if let Some(path) = &args.map {
        write_map(path, &map, size)?;
    }
    let flags: Vec<String> = (seams.iter())
        .filter(|(_, ratio)| *ratio > MOST_SEAM)
        .map(|(name, ratio)| format!("steps across the seam at {name} are {ratio:.2} times as large as in the whole"))
        .collect();
    if json_output {
        let seams: Vec<Value> = seams.iter().map(|(name, ratio)| json!({"seam": name, "energy": ratio})).collect();
        println!(
            "{}",
            json!({"tiles": plan.len(), "frames": frames, "max_abs": distance.max_abs, "mean_abs": distance.mean_abs,
                "psnr_db": psnr(&whole, &tiled), "seams": seams, "flags": flags})
        );
        return Ok(flags.is_empty());
    }
    println!(
        "{} tiles: largest difference {:.4}, mean {:.5}, PSNR {:.2} dB",
        plan.len(),
        distance.max_abs,
        distance.mean_abs,
        psnr(&whole, &tiled)
    );
    print!("{}", drawn(&map, size, [factors[1], factors[2]]));
    for (name, ratio) in &seams {
        println!("seam at {name:<12} energy {ratio:.3} of the whole's");
    }
    flags.iter().for_each(|flag| println!("RED FLAG: {flag}"));
    Ok(flags.is_empty())
}

/// Frames `[f, h, w, 3]` of a latent.
fn decoded(model: &Model<'_>, config: &VideoVaeConfig, [f, h, w]: [usize; 3], values: &[f32]) -> Result<Vec<f32>> {
    let mut noise = |_: &str, _: &TensorType| bail!("this decoder adds noise, so tiles differ from the whole anyhow");
    let latent = Tensor::f32(&[1, f, h, w, config.latent_channels], values);
    Ok(model.decode(config, &latent, &mut noise, &|_| false)?.result("frames")?.values.clone())
}

/// Steps across every seam, by the same steps in the whole picture. A seam is where a tile begins or ends.
fn seams(plan: &TilePlan, [height, width]: [usize; 2], tiled: &[f32], whole: &[f32]) -> Vec<(String, f64)> {
    let row = width * 3;
    let frame = height * row;
    let steps = |values: &[f32], axis: usize, at: usize| -> f64 {
        let (count, stride) = ([values.len() / frame, height, width][axis], [frame, row, 3][axis]);
        let mut sum = 0.0;
        for (i, v) in values.iter().enumerate().skip(stride) {
            if (i / stride) % count == at {
                sum += f64::from((v - values[i - stride]).abs());
            }
        }
        sum
    };
    let mut found = Vec::new();
    for (axis, name) in ["frame", "row", "column"].into_iter().enumerate() {
        let extent = [tiled.len() / frame.max(1), height, width][axis];
        let mut places: Vec<usize> = plan
            .tiles()
            .map(|tile| plan.pixels(tile)[axis])
            .flat_map(|span| [span.start, span.end])
            .filter(|at| (1..extent).contains(at))
            .collect();
        places.sort_unstable();
        places.dedup();
        for at in places {
            let ratio = steps(tiled, axis, at) / steps(whole, axis, at).max(1e-30);
            found.push((format!("{name} {at}"), ratio));
        }
    }
    found
}

/// The largest difference of every pixel over frames and colours.
fn largest(tiled: &[f32], whole: &[f32], [height, width]: [usize; 2]) -> Vec<f32> {
    let mut map = vec![0.0f32; height * width];
    for (i, (a, b)) in tiled.iter().zip(whole).enumerate() {
        let place = &mut map[(i / 3) % (height * width)];
        *place = place.max((a - b).abs());
    }
    map
}

/// The map in characters, one for each latent: the larger the difference, the darker.
fn drawn(map: &[f32], [height, width]: [usize; 2], [rows, columns]: [usize; 2]) -> String {
    const SHADES: [char; 6] = ['·', '░', '▒', '▓', '█', '█'];
    let most = map.iter().copied().fold(0.0f32, f32::max).max(1e-30);
    let mut out = String::new();
    for y in (0..height).step_by(rows.max(1)) {
        for x in (0..width).step_by(columns.max(1)) {
            let cell = (y..(y + rows).min(height))
                .flat_map(|j| map[j * width + x..j * width + (x + columns).min(width)].iter());
            let value = cell.copied().fold(0.0f32, f32::max);
            out.push(SHADES[(value / most * 5.0) as usize]);
        }
        out.push('\n');
    }
    out
}

fn write_map(path: &std::path::Path, map: &[f32], [height, width]: [usize; 2]) -> Result<()> {
    let most = map.iter().copied().fold(0.0f32, f32::max).max(1e-30);
    let rgb: Vec<u8> = map.iter().flat_map(|v| [(v / most * 255.0) as u8; 3]).collect();
    let mut bytes = Vec::new();
    png::write(width, height, &rgb, &mut bytes).with_context(|| format!("`{}`", path.display()))?;
    Ok(write_atomically(path, &bytes)?)
}

#[cfg(test)]
mod tests {
    use ltxc_ir::tiling::{AxisTiling, Tiling};

    use super::*;

    #[test]
    fn a_step_at_a_seam_is_found() {
        // Two tiles side by side, of which the right one is brighter.
        let axes = [AxisTiling::Whole, AxisTiling::Whole, AxisTiling::Size { size: 64, overlap: 0 }];
        let plan = TilePlan::decode([1, 1, 4], [8, 32, 32], &Tiling { axes }).unwrap();
        let pixel = |x: usize, step: f32| (x as f32 * 0.01) + if x >= 64 { step } else { 0.0 };
        let picture = |step: f32| -> Vec<f32> { (0..32 * 128).flat_map(|i| [pixel(i % 128, step); 3]).collect() };
        let found = seams(&plan, [32, 128], &picture(1.0), &picture(0.0));
        assert_eq!(found.len(), 1);
        assert!(found[0].0 == "column 64" && found[0].1 > 50.0, "{found:?}");
        assert!(seams(&plan, [32, 128], &picture(0.0), &picture(0.0))[0].1 < 1.01);
        let map = largest(&picture(1.0), &picture(0.0), [32, 128]);
        assert_eq!(drawn(&map, [32, 128], [32, 32]), "··██\n");
    }
}
