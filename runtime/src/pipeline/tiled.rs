//! A stage in tiles of its latent. Each is denoised as a clip of its own, and the results are blended.
//!
//! # Easy to get wrong
//! - A tile has positions from 0, and noise of its own seed: that of the run plus its index.
//! - It sees the part of a reference that lies on it, with positions from 0, too.
//! - Tiles fade into each other over time as they do over space; there is no frame to spare.
//!
//! Source: spec/pipelines §9.12; `modality_tiling` and `hdr_ic_lora` of release 1.2.0.

use ltxc_ir::plan::{ReferenceInput, Stage, VideoSettings};
use ltxc_ir::tiling::{AxisTile, TilePlan};

use super::conditioning::Item;
use super::denoise::Contexts;
use super::noise::Noise;
use super::observe::{Event, Observer};
use super::per::Per;
use super::positions::{ReferenceScale, reference_positions};
use super::request::{ChosenStage, Request};
use super::stage::{Start, run_stage};
use super::tiles::{Sum, crop};
use crate::error::RunError;
use crate::executor::Executor;

/// Runs a stage of video in `tiles`. Returns its latent, `[f, h, w, c]`.
///
/// Tiles tell of themselves under their own names ([`tile_name`]). Of the whole come `<stage>.video.initial_latent`, before
/// them, and `<stage>.video.latent`, what they are blended to.
///
/// # Errors
/// As for [`run_stage`], or a tile that the plan has no program for.
pub(super) fn run_tiles(
    executor: &mut Executor<'_>,
    observer: &mut dyn Observer,
    request: &Request<'_>,
    chosen: &ChosenStage<'_>,
    tiles: &TilePlan,
    contexts: Contexts<'_>,
    start: Start,
) -> Result<Vec<f32>, RunError> {
    let pipeline = &executor.plan().pipeline;
    let channels = pipeline.video.channels as usize;
    let references = pipeline.references_of(chosen.stage);
    let [frames, rows, columns] = chosen.stage.grid.map(|n| n as usize);
    let mut sum = Sum::symmetric([rows, columns], channels);
    let mut latest: Option<&str> = None;
    if let Some(latent) = &start.latent {
        let name = format!("{}.video.initial_latent", chosen.stage.name);
        observer.event(Event::Tensor { name, values: latent });
    }
    for (i, tile) in tiles.tiles().enumerate() {
        let stage = stage_of_tile(chosen.stage, i, tile, pipeline.video.scale);
        let noise = noise_of_tile(chosen.noise, i);
        let of_tile = request.class(pipeline, chosen.stage, Some(tile))?;
        if latest.replace(&of_tile.name).is_some_and(|name| name != of_tile.name) {
            // Programs of another extent would bind the weights once more.
            executor.unload_all()?;
        }
        let of_tile = ChosenStage { stage: &stage, class: of_tile, noise: &noise, ..chosen.clone() };
        let items = start.items.iter().map(|item| match references {
            Some(references) => item_of_tile(item, references, tile, channels, &pipeline.video),
            None => item.clone(),
        });
        let own = Start {
            latent: start.latent.as_ref().map(|latent| crop(latent, [rows, columns], channels, tile)),
            items: items.collect(),
            ..start
        };
        let made = run_stage(executor, observer, request, &of_tile, contexts, Per { video: Some(own), audio: None })?;
        sum.add(&made.video.unwrap_or_default(), tile)?;
    }
    let blended = sum.finished(frames).to_vec();
    observer.event(Event::Tensor { name: format!("{}.video.latent", chosen.stage.name), values: &blended });
    Ok(blended)
}

/// A tile as a stage, which is a clip from its first frame on.
fn stage_of_tile(stage: &Stage, index: usize, tile: [AxisTile; 3], scale: [u32; 3]) -> Stage {
    let grid = tile.map(|axis| axis.len() as u32);
    let (height, width) = (grid[1] * scale[1], grid[2] * scale[2]);
    Stage {
        name: tile_name(&stage.name, index),
        height,
        width,
        grid,
        tiles: None,
        classes: Vec::new(),
        ..stage.clone()
    }
}

/// Name of a tile, whose noise is `<name>.video`.
pub fn tile_name(stage: &str, index: usize) -> String {
    format!("{stage}.tile.{index:03}")
}

/// The stage and the index of the tile that is called `name`, the inverse of [`tile_name`].
pub fn tile_of(name: &str) -> Option<(&str, usize)> {
    let (stage, index) = name.split_once(".tile.")?;
    Some((stage, index.parse().ok()?))
}

fn noise_of_tile(noise: &Noise, index: usize) -> Noise {
    Noise { seed: noise.seed.wrapping_add(index as u64), ..noise.clone() }
}

/// What a reference does to a tile: the part of it that lies there.
fn item_of_tile(
    item: &Item,
    references: &ReferenceInput,
    tile: [AxisTile; 3],
    channels: usize,
    video: &VideoSettings,
) -> Item {
    let Item::Append { latent, strength, attention, .. } = item else { return item.clone() };
    let [_, rows, columns] = references.grid().map(|n| n as usize);
    let part = references.of_tile(tile);
    let scale = ReferenceScale { space: references.space_scale, time: references.time_scale };
    let attention = attention.as_ref().map(|strengths| match strengths.len() {
        1 => strengths.clone(),
        _ => crop(strengths, [rows, columns], 1, part),
    });
    Item::Append {
        latent: crop(latent, [rows, columns], channels, part),
        positions: reference_positions(part.map(|axis| axis.len() as u32), scale, video),
        strength: *strength,
        attention,
    }
}

#[cfg(test)]
mod tests {
    use ltxc_ir::tiling::Tiling;

    use super::super::noise::SlotShape;
    use super::super::positions::video_positions;
    use super::*;

    const TILES: [(usize, usize); 3] = [(2, 8), (2, 6), (2, 6)];

    fn video() -> VideoSettings {
        VideoSettings { frame_rate: (24, 1), scale: [8, 32, 32], channels: 1, ..VideoSettings::default() }
    }

    #[test]
    fn what_is_the_same_in_all_tiles_is_so_in_the_result() {
        for latent in [[1, 1, 1], [2, 2, 3], [3, 9, 4], [21, 7, 10]] {
            let plan = TilePlan::denoise(latent, TILES).unwrap();
            let mut sum = Sum::symmetric([latent[1], latent[2]], 2);
            for tile in plan.tiles() {
                sum.add(&[0.75, -2.0].repeat(tile.iter().map(AxisTile::len).product()), tile).unwrap();
            }
            let blended = sum.finished(latent[0]);
            assert_eq!(blended.len(), 2 * latent.iter().product::<usize>());
            let (pairs, _) = blended.as_chunks::<2>();
            assert!(pairs.iter().all(|[a, b]| (a - 0.75).abs() < 1e-6 && (b + 2.0).abs() < 2e-6), "{latent:?}");
        }
    }

    #[test]
    fn tiles_fade_into_each_other_over_time() {
        // Three latents in two tiles of two: the one in between is half of each.
        let plan = TilePlan::denoise([3, 1, 1], TILES).unwrap();
        let mut sum = Sum::symmetric([1, 1], 1);
        for (tile, value) in plan.tiles().zip([1.0, 3.0]) {
            sum.add(&[value; 2], tile).unwrap();
        }
        assert_eq!(sum.finished(3), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn a_tile_is_a_clip_of_its_own() {
        let stage = Stage { name: "stage2".into(), grid: [3, 4, 6], ..Stage::default() };
        let plan = TilePlan::denoise([3, 4, 6], TILES).unwrap();
        let tiles: Vec<_> = plan.tiles().collect();
        // Sides of 2, 3 and 5 latents; the last one of all starts at 1, 1 and 1.
        let own = stage_of_tile(&stage, 7, tiles[7], [8, 32, 32]);
        assert_eq!((own.name.as_str(), own.grid, own.height, own.width), ("stage2.tile.007", [2, 3, 5], 96, 160));
        assert_eq!((tile_of(&own.name), tile_of("stage2")), (Some(("stage2", 7)), None));
        let positions = video_positions(own.grid, &video());
        let tokens = 2 * 3 * 5;
        let first = |axis: usize| positions[axis * tokens * 2];
        assert_eq!([0, 1, 2].map(first), [0.0; 3]);
        // The first latent of a clip stands for one frame.
        assert_eq!(positions[1], 1.0 / 24.0);
        // Its noise is that of a run with the seed plus its index.
        let shape = SlotShape { spatial: vec![4], channels: 1, inner: 1 };
        let draw = |seed: u64, index: usize| {
            noise_of_tile(&Noise { seed, ..Noise::default() }, index).draw("stage2.tile.007.video", &shape).unwrap()
        };
        assert_eq!(draw(10, 7), draw(17, 0));
        assert_ne!(draw(10, 7), draw(10, 6));
    }

    #[test]
    fn a_tile_sees_the_part_of_a_reference_that_lies_on_it() {
        // One latent of the reference stands for 2x2: two frames of 2x4 latents, numbered.
        let tiles = TilePlan::decode([2, 2, 4], [8, 32, 32], &Tiling::WHOLE).unwrap();
        let references = ReferenceInput { space_scale: 2, time_scale: 1, tiles, ..ReferenceInput::default() };
        let latent: Vec<f32> = (0u8..16).map(f32::from).collect();
        let item = Item::Append { attention: Some(latent.clone()), latent, positions: Vec::new(), strength: 0.5 };
        let axis = |start: usize, end: usize| AxisTile { start, end, left_ramp: 0, right_ramp: 0 };
        let tile = [axis(1, 2), axis(0, 4), axis(3, 8)];
        // Columns 3..8 of the stage are 1..4 of the reference.
        let expected = vec![9.0, 10.0, 11.0, 13.0, 14.0, 15.0];
        let found = item_of_tile(&item, &references, tile, 1, &video());
        let positions = reference_positions([1, 2, 3], ReferenceScale { space: 2, time: 1 }, &video());
        assert_eq!(positions[2 * 6 * 2..][..4], [0.0, 64.0, 64.0, 128.0]);
        let whole = Item::Append { attention: Some(expected.clone()), latent: expected, positions, strength: 0.5 };
        assert_eq!(found, whole);
        // A side that is less than one latent of the reference sees that one.
        assert_eq!(references.of_tile([axis(0, 1), axis(0, 1), axis(6, 7)])[2], axis(3, 4));
    }
}
