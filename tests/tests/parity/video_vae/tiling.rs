//! Tiles, masks, chunks and blended results of the video VAE, as recorded and at real sizes.

use std::collections::BTreeMap;

use ltxc_ir::Module;
use ltxc_ir::eval::Tensor;
use ltxc_ir::tiling::{Axis, AxisTiling, TilePlan, Tiling};
use ltxc_tests::compare::Report;
use ltxc_tests::fixtures::{TensorFile, of_second_release};
use ltxc_tests::harness::evaluate;
use ltxc_tests::recorded::Recorded;
use serde_json::Value;

use super::{Checkpoint, channels_last, check_video, grid_of};

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
fn check_ranges(recorded: &mut Recorded, name: &str, found: [(usize, usize); 3], ranges: &Value) {
    for (i, (start, end)) in found.into_iter().enumerate() {
        let (from, to) = (&ranges[i][0], &ranges[i][1]);
        let ok = *from == start && (to.is_null() || *to == end);
        recorded.note(ok, format!("{name}[{i}]: {start}..{end}, expected {from}..{to}"), &[]);
    }
}

/// Compares the tiles of one recorded case, and their masks on the side that is written.
fn check_tiles(recorded: &mut Recorded, case: &str, meta: &Value, plan: &TilePlan, decodes: bool) {
    let tiles = meta["tiles"].as_array().expect("tiled cases record their tiles");
    recorded.check_other(&format!("{case}: tiles"), &[plan.len()], &[tiles.len()]);
    for (i, (tile, meta)) in plan.tiles().zip(tiles).enumerate() {
        let (latents, pixels) = (tile, plan.pixels(tile));
        let (read, written) = if decodes { (latents, pixels) } else { (pixels, latents) };
        check_ranges(recorded, &format!("{case}.{i}.in"), read.map(|t| (t.start, t.end)), &meta["in"]);
        check_ranges(recorded, &format!("{case}.{i}.out"), written.map(|t| (t.start, t.end)), &meta["out"]);
        for (axis, letter, t) in [(0, 't', written[0]), (1, 'h', written[1]), (2, 'w', written[2])] {
            let name = format!("{case}.mask_{letter}.{i}");
            if recorded.has(&name) {
                recorded.check_exact(&name, &t.mask(Axis::ALL[axis]));
            }
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
pub fn check_tiled_decodes(recorded: &mut Recorded, vae: &Checkpoint) {
    let latent = channels_last(&recorded.input("tiled.latent"));
    let (grid, factors) = (grid_of(&latent), vae.config.factors());
    let shape = [1, factors[0] * (grid[0] - 1) + 1, factors[1] * grid[1], factors[2] * grid[2], 3];
    let mut decoders: BTreeMap<[usize; 3], Module> = BTreeMap::new();
    let mut decode = |part: &Tensor| {
        let module = decoders.entry(grid_of(part)).or_insert_with(|| vae.decoder(grid_of(part)));
        let mut run = evaluate(module, "decode", std::slice::from_ref(part), &[("model", &vae.file)]);
        run.results.remove("frames").expect("`decode` gives frames")
    };
    let cases = recorded.meta()["tiled"].as_object().expect("tiled cases are recorded").clone();
    for (name, meta) in &cases {
        let text = meta["config"].as_str().expect("a case records its config");
        let plan =
            TilePlan::decode(grid, factors, &tiling_of(text, grid, factors)).expect("recorded tilings are valid");
        let case = format!("tiled.{name}");
        check_tiles(recorded, &case, meta, &plan, true);
        let chunks: Vec<Value> = plan.chunks().iter().map(|c| c.len().into()).collect();
        let expected = meta["chunks_frames"].as_array().expect("a case records its chunks");
        recorded.check_other(&format!("{case}: chunks"), &chunks, expected);
        let blended = blend(&plan, &latent, &shape, true, &mut decode);
        check_video(recorded, &format!("{case}.output"), &blended);
    }
    if recorded.has("tiled.full.output.sample") {
        check_video(recorded, "tiled.full.output", &decode(&latent));
    }
}

fn check_tiled_encode(recorded: &mut Recorded, vae: &Checkpoint) {
    let video = channels_last(&recorded.input("tiled_encode.input_uint8"));
    let whole = &vae.encode(&video).results["latent"];
    check_video(recorded, "tiled_encode.untiled_latent", whole);
    let meta = recorded.meta()["tiled_encode"].clone();
    let factors = vae.config.factors();
    let tiling = tiling_of(meta["config"].as_str().expect("it records its config"), grid_of(whole), factors);
    let plan = TilePlan::encode(grid_of(whole), factors, &tiling).expect("recorded tilings are valid");
    check_tiles(recorded, "tiled_encode", &meta, &plan, false);
    let shape = whole.ty.shape[..].try_into().expect("latents have rank 5");
    let blended = blend(&plan, &video, &shape, false, |part| vae.encode(part).results["latent"].clone());
    check_video(recorded, "tiled_encode.latent", &blended);
}

#[test]
fn ltx2_tiling() {
    let vae = Checkpoint::read("tiny-ltx2/ltx-2-tiny.safetensors");
    let Some(path) = of_second_release("ltx2/video_vae_tiling.safetensors") else { return };
    let mut recorded = Recorded::new(TensorFile::read(&path));
    check_tiled_decodes(&mut recorded, &vae);
    check_tiled_encode(&mut recorded, &vae);
    recorded.finish();
}

#[test]
fn ltx23_tiling() {
    let vae = Checkpoint::read("tiny-ltx23/ltx-2.3-tiny.safetensors");
    let Some(path) = of_second_release("ltx23/video_vae_tiling.safetensors") else { return };
    let mut recorded = Recorded::new(TensorFile::read(&path));
    check_tiled_decodes(&mut recorded, &vae);
    recorded.finish();
}

/// Tiles at real sizes, as pipelines choose them and by default.
#[test]
fn tile_plans_at_real_sizes() {
    const FACTORS: [usize; 3] = [8, 32, 32];
    let Some(path) = of_second_release("common/conv_decode_tile_plans.json") else { return };
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
