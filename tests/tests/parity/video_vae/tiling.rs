//! Tiles, masks, chunks and blended results of the video VAE, as recorded and at real sizes.

use std::collections::BTreeMap;

use ltxc_ir::Module;
use ltxc_ir::eval::Tensor;
use ltxc_ir::tiling::{Axis, AxisTiling, TilePlan, Tiling};
use ltxc_tests::compare::Report;
use ltxc_tests::fixtures::{required, root};
use ltxc_tests::harness::evaluate;
use serde_json::Value;

use super::{Checkpoint, Parity, channels_last, grid_of};

/// What `config=` of a tiled case says.
fn tiling_of(text: &str, latent: [usize; 3], factors: [usize; 3]) -> Tiling {
    let numbers: Vec<usize> = text
        .split('=')
        .filter_map(|part| part.split(|c: char| !c.is_ascii_digit()).next().filter(|d| !d.is_empty())?.parse().ok())
        .collect();
    let size = |i: usize| AxisTiling::Size { size: numbers[i], overlap: numbers[i + 1] };
    let count = |i: usize| AxisTiling::Count { tiles: numbers[i], overlap: numbers[i + 1] };
    if text.starts_with("TileSizeConfig") {
        Tiling { axes: [size(0), size(2), size(4)] }
    } else if text.starts_with("TileCountConfig") {
        Tiling { axes: [count(0), count(2), count(4)] }
    } else if text.contains("spatial_config=None") {
        Tiling { axes: [size(0), AxisTiling::Whole, AxisTiling::Whole] }
    } else {
        // Release 1.0.0 knew only the long-side rule.
        Tiling::long_side(size(2), numbers[0], numbers[1], latent, factors).expect("recorded tilings are valid")
    }
}

/// Where a tile starts and ends, as JSON records it; `null` stands for the end of the axis.
fn check_ranges(parity: &mut Parity<'_>, name: &str, found: [(usize, usize); 3], recorded: &Value) {
    for (i, (start, end)) in found.into_iter().enumerate() {
        let (from, to) = (&recorded[i][0], &recorded[i][1]);
        let ok = *from == start && (to.is_null() || *to == end);
        parity.report.note(ok, format!("{name}[{i}]: {start}..{end}, expected {from}..{to}"));
    }
}

/// Compares the tiles of one recorded case, and their masks on the side that is written.
fn check_tiles(parity: &mut Parity<'_>, case: &str, recorded: &Value, plan: &TilePlan, decodes: bool) {
    let tiles = recorded["tiles"].as_array().expect("tiled cases record their tiles");
    parity.report.check_equal(&format!("{case}: tiles"), &[plan.len()], &[tiles.len()]);
    for (i, (tile, recorded)) in plan.tiles().zip(tiles).enumerate() {
        let (latents, pixels) = (tile, plan.pixels(tile));
        let (read, written) = if decodes { (latents, pixels) } else { (pixels, latents) };
        check_ranges(parity, &format!("{case}.{i}.in"), read.map(|t| (t.start, t.end)), &recorded["in"]);
        check_ranges(parity, &format!("{case}.{i}.out"), written.map(|t| (t.start, t.end)), &recorded["out"]);
        for (axis, letter, t) in [(0, 't', written[0]), (1, 'h', written[1]), (2, 'w', written[2])] {
            parity.check_exact(&format!("{case}.mask_{letter}.{i}"), &t.mask(Axis::ALL[axis]));
        }
    }
}

/// The part `[1, .., c]` of `x` that a tile covers.
fn cut(x: &Tensor, tile: [(usize, usize); 3]) -> Tensor {
    let [_, _, h, w, c] = x.ty.shape[..] else { panic!("{} is not a video", x.ty) };
    let [(f0, f1), (h0, h1), (w0, w1)] = tile;
    let (values, mut out) = (x.to_f32(), Vec::new());
    for f in f0..f1 {
        for y in h0..h1 {
            let row = ((f * h + y) * w) * c;
            out.extend(&values[row + w0 * c..row + w1 * c]);
        }
    }
    Tensor::f32(&[1, f1 - f0, h1 - h0, w1 - w0, c], &out)
}

/// Runs `run` on every tile of `x` and blends the results; `plan` may not need a division.
fn blend(
    plan: &TilePlan,
    x: &Tensor,
    shape: &[usize; 5],
    decodes: bool,
    mut run: impl FnMut(&Tensor) -> Tensor,
) -> Tensor {
    let [_, _, height, width, c] = *shape;
    let mut sum = vec![0.0f32; shape.iter().product()];
    for tile in plan.tiles() {
        let pixels = plan.pixels(tile);
        let (read, written) = if decodes { (tile, pixels) } else { (pixels, tile) };
        let y = run(&cut(x, read.map(|t| (t.start, t.end)))).to_f32();
        let masks: [Vec<f32>; 3] = std::array::from_fn(|i| written[i].mask(Axis::ALL[i]));
        let mut values = y.iter();
        for (f, mt) in masks[0].iter().enumerate() {
            for (i, mh) in masks[1].iter().enumerate() {
                for (j, mw) in masks[2].iter().enumerate() {
                    let at = ((written[0].start + f) * height + written[1].start + i) * width + written[2].start + j;
                    for s in &mut sum[at * c..(at + 1) * c] {
                        *s += values.next().expect("a tile has the extents of its masks") * mt * mh * mw;
                    }
                }
            }
        }
    }
    let weights = if decodes { plan.decode_weights() } else { plan.encode_weights() };
    assert_eq!(weights, None, "all recorded tilings are complementary");
    Tensor::f32(shape, &sum)
}

/// Every case below `meta.tiled`.
pub fn check_tiled_decodes(parity: &mut Parity<'_>, vae: &Checkpoint) {
    let latent = channels_last(parity.input("tiled.latent"));
    let (grid, factors) = (grid_of(&latent), vae.config.factors());
    let shape = [1, factors[0] * (grid[0] - 1) + 1, factors[1] * grid[1], factors[2] * grid[2], 3];
    let mut decoders: BTreeMap<[usize; 3], Module> = BTreeMap::new();
    let mut decode = |part: &Tensor| {
        let module = decoders.entry(grid_of(part)).or_insert_with(|| vae.decoder(grid_of(part)));
        let mut run = evaluate(module, "decode", std::slice::from_ref(part), &[("model", &vae.file)]);
        run.results.remove("frames").expect("`decode` gives frames")
    };
    let cases = parity.meta["tiled"].as_object().expect("tiled cases are recorded").clone();
    for (name, recorded) in &cases {
        let text = recorded["config"].as_str().expect("a case records its config");
        let plan =
            TilePlan::decode(grid, factors, &tiling_of(text, grid, factors)).expect("recorded tilings are valid");
        let case = format!("tiled.{name}");
        check_tiles(parity, &case, recorded, &plan, true);
        let chunks: Vec<Value> = plan.chunks().iter().map(|c| c.len().into()).collect();
        let expected = recorded["chunks_frames"].as_array().expect("a case records its chunks");
        parity.report.check_equal(&format!("{case}: chunks"), &chunks, expected);
        let blended = blend(&plan, &latent, &shape, true, &mut decode);
        parity.check(&format!("{case}.output"), &blended);
    }
    if parity.meta["sampled"]["tiled.full.output"].is_object() {
        parity.check("tiled.full.output", &decode(&latent));
    }
}

fn check_tiled_encode(parity: &mut Parity<'_>, vae: &Checkpoint) {
    let video = channels_last(parity.input("tiled_encode.input_uint8"));
    let whole = &vae.encode(&video).results["latent"];
    parity.check("tiled_encode.untiled_latent", whole);
    let recorded = parity.meta["tiled_encode"].clone();
    let factors = vae.config.factors();
    let tiling = tiling_of(recorded["config"].as_str().expect("it records its config"), grid_of(whole), factors);
    let plan = TilePlan::encode(grid_of(whole), factors, &tiling).expect("recorded tilings are valid");
    check_tiles(parity, "tiled_encode", &recorded, &plan, false);
    let shape = whole.ty.shape[..].try_into().expect("latents have rank 5");
    let blended = blend(&plan, &video, &shape, false, |part| vae.encode(part).results["latent"].clone());
    parity.check("tiled_encode.latent", &blended);
}

#[test]
fn ltx2_tiling() {
    let file = required("ltx2/video_vae_tiling");
    let (mut parity, vae) = (Parity::new(&file), Checkpoint::read("tiny-ltx2/ltx-2-tiny.safetensors"));
    check_tiled_decodes(&mut parity, &vae);
    check_tiled_encode(&mut parity, &vae);
    parity.finish();
}

#[test]
fn ltx23_tiling() {
    let file = required("ltx23/video_vae_tiling");
    let (mut parity, vae) = (Parity::new(&file), Checkpoint::read("tiny-ltx23/ltx-2.3-tiny.safetensors"));
    check_tiled_decodes(&mut parity, &vae);
    parity.finish();
}

/// Tiles at real sizes, as pipelines choose them and by default.
#[test]
fn tile_plans_at_real_sizes() {
    const FACTORS: [usize; 3] = [8, 32, 32];
    let path = root().join("expected-1.2.0/common/conv_decode_tile_plans.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let recorded: BTreeMap<String, Value> = serde_json::from_str(&text).expect("the recording is JSON");
    let mut report = Report::default();
    for (size, cases) in &recorded {
        let pixels: Vec<usize> = size.split('x').map(|n| n.parse().expect("sizes are HxWxF")).collect();
        let latent = [(pixels[2] - 1) / 8 + 1, pixels[0] / 32, pixels[1] / 32];
        let automatic = Tiling::automatic(latent, FACTORS).expect("default sizes fit");
        for (name, tiling) in [("auto", automatic), ("plain_default", Tiling::DEFAULT)] {
            let case = &cases[name];
            let config = case["config"].as_str().expect("a case records its config");
            report.check_equal(&format!("{size} {name}: config"), &[tiling], &[tiling_of(config, latent, FACTORS)]);
            let plan = TilePlan::decode(latent, FACTORS, &tiling).expect("default sizes fit");
            report.check_equal(&format!("{size} {name}: tiles"), &[Value::from(plan.len())], &[case["tiles"].clone()]);
            let axes = &case["axes_t_h_w_(in_start,in_stop,out_start,out_stop,mask_sum)"];
            for (i, axis) in Axis::ALL.into_iter().enumerate() {
                let rows = plan.axes[i].iter().map(|t| {
                    let out = t.pixels(axis, FACTORS[i]);
                    let sum: f64 = out.mask(axis).iter().map(|&m| m as f64).sum();
                    [t.start as f64, t.end as f64, out.start as f64, out.end as f64, (sum * 1e3).round() / 1e3]
                });
                let found: Vec<Value> = rows.map(|r| r.to_vec().into()).collect();
                let as_f64 = |row: &Value| -> Value {
                    row.as_array()
                        .expect("a row")
                        .iter()
                        .map(|v| v.as_f64().expect("a number"))
                        .collect::<Vec<_>>()
                        .into()
                };
                let expected: Vec<Value> = axes[i].as_array().expect("rows per axis").iter().map(as_f64).collect();
                report.check_equal(&format!("{size} {name}: {axis:?}"), &found, &expected);
            }
        }
    }
    report.finish();
}
