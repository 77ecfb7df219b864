//! Checks the settings of a pipeline as if they were hostile, so that the driver can compute with them.
//!
//! - sizes, rates and counts are below bounds that keep all arithmetic on them far from overflow;
//! - lists are no longer than what they list can be: stages, classes, programs, noise levels, adapters, blocks, sizes of
//!   prompts;
//! - every stage has falling noise levels that end with 0, and a grid if there is video;
//! - the tiles of the decoder cover the grid of the last stage, in order and without a gap, and their pixels are the video;
//! - inputs have sizes in range, and tiles that cover them;
//! - where a clip is upscaled there are no stages, and its tiles cover it.
//!
//! Other settings without stages are those of a plan that only runs programs; they have no tiles either.

use super::{MOST_STEPS, Modality, Pass, Pipeline, ReferenceInput, Sampler, SoundRole, Stage, Upscale};
use crate::tiling::{AxisTile, TilePlan};

/// Largest side in pixels; a plan for more cannot be compiled.
const MAX_SIDE: u32 = 1 << 16;
/// Largest number of frames.
const MAX_FRAMES: u32 = 1 << 20;
/// Largest width of a token, pixels per latent, and number of keyframes.
const MAX_WIDTH: u32 = 1 << 16;
/// Largest number of reference videos, and of pixels or frames that one of theirs stands for.
const MAX_REFERENCES: u32 = 64;
const MAX_SCALE: u32 = 64;
/// Most stages, conditioning classes and step programs of a stage, and adapters of one: pipelines have one or two stages, a
/// class for each number of keyframes or extent of a tile, a program for each combination of skipped passes, two adapters.
const MAX_STAGES: usize = 16;
const MAX_CLASSES: usize = 1 << 10;
const MAX_PROGRAMS: usize = 1 << 8;
const MAX_ADAPTERS: usize = 16;
/// Most blocks that a perturbed pass leaves attention out of; the largest model has 48.
const MAX_BLOCKS: usize = 1 << 12;
/// Most sizes of prompts that have a program, and most programs that enlarge a clip.
const MAX_BUCKETS: usize = 1 << 8;
/// Most values of one channel of a spectrogram: three hours of 64 bins, 100 times a second.
const MAX_SPECTROGRAM: u64 = 1 << 26;
/// Largest number of tokens of a stage or of the sound track.
const MAX_TOKENS: u64 = 1 << 26;

/// Checks settings. See the module documentation.
///
/// # Errors
/// The first setting that no pipeline can have.
pub(super) fn check(pipeline: &Pipeline) -> Result<(), String> {
    let (video, audio) = (&pipeline.video, &pipeline.audio);
    let bounded = [
        ("height", video.height, MAX_SIDE),
        ("width", video.width, MAX_SIDE),
        ("number of frames", video.frames, MAX_FRAMES),
        ("width of video tokens", video.channels, MAX_WIDTH),
        ("width of audio tokens", audio.channels, MAX_WIDTH),
        ("number of keyframes", video.max_keyframes, MAX_WIDTH),
        ("number of audio tokens", audio.tokens, MAX_TOKENS as u32),
    ];
    if let Some((what, found, most)) = bounded.into_iter().find(|(_, found, most)| found > most) {
        return Err(format!("{what} is {found}, expected at most {most}"));
    }
    at_most("stages", pipeline.stages.len(), MAX_STAGES)?;
    at_most("sizes of prompts", pipeline.text.buckets.len(), MAX_BUCKETS)?;
    let has_video = video.channels > 0;
    pipeline
        .stages
        .iter()
        .try_for_each(|s| check_stage(s, has_video).map_err(|e| format!("stage `{}`: {e}", s.name)))?;
    let last = match (pipeline.stages.last(), &pipeline.upscale) {
        (None, Some(upscale)) => return check_upscale(pipeline, upscale),
        (None, None) if pipeline.decode.is_empty() => return Ok(()),
        (None, None) => return Err("tiles without stages".into()),
        (Some(_), Some(_)) => return Err("stages where a clip is upscaled".into()),
        (Some(last), None) => last,
    };
    let (num, den) = video.frame_rate;
    if [video.frames, num, den].contains(&0) || video.scale.iter().any(|&n| !(1..=MAX_WIDTH).contains(&n)) {
        return Err("a length, rate or scale is 0 or out of range".into());
    }
    match (audio.tokens, audio.channels) {
        (0, _) if !has_video => return Err("there is neither video nor sound".into()),
        (1.., 0) => return Err("audio tokens have no width".into()),
        (1.., _) if pipeline.stages.iter().any(|stage| stage.tiles.is_some()) => {
            return Err("sound in a stage of tiles".into());
        }
        (1.., _) if audio.stage as usize >= pipeline.stages.len() => {
            return Err(format!("sound of stage {}, of {}", audio.stage, pipeline.stages.len()));
        }
        _ => {}
    }
    check_inputs(pipeline)?;
    let tiles = &pipeline.decode;
    if !has_video {
        return if tiles.is_empty() { Ok(()) } else { Err("tiles without video".into()) };
    }
    if tiles.factors != video.scale.map(|n| n as usize) {
        return Err(format!("tiles have {:?} pixels per latent, the video has {:?}", tiles.factors, video.scale));
    }
    for (axis, &extent) in tiles.axes.iter().zip(&last.grid) {
        check_tiles(axis, extent as usize)?;
    }
    let [f, h, w] = last.grid.map(u64::from);
    let [ft, fh, fw] = video.scale.map(u64::from);
    if [1 + (f - 1) * ft, h * fh, w * fw] != [video.frames, video.height, video.width].map(u64::from) {
        return Err(format!("a grid of {:?} is not the size of the video", last.grid));
    }
    Ok(())
}

/// Checks the settings of a pipeline that upscales.
fn check_upscale(pipeline: &Pipeline, upscale: &Upscale) -> Result<(), String> {
    let (video, inputs) = (&pipeline.video, &pipeline.inputs);
    let [frames, height, width] = upscale.clip;
    let in_range =
        [(frames, MAX_FRAMES), (height, MAX_SIDE), (width, MAX_SIDE)].iter().all(|(n, most)| (1..=*most).contains(n));
    let rates = [video.frame_rate, upscale.clip_rate];
    let is_zero = [video.frames, video.height, video.width, video.channels].contains(&0);
    if !in_range || is_zero || rates.iter().any(|&(num, den)| num == 0 || den == 0) {
        return Err("a length, size or rate of what is upscaled is 0 or out of range".into());
    }
    if video.scale.iter().any(|&n| !(1..=MAX_WIDTH).contains(&n)) {
        return Err("a scale is 0 or out of range".into());
    }
    at_most("programs that upscale", upscale.programs.len(), MAX_PROGRAMS)?;
    if pipeline.audio.tokens > 0 || inputs.sound.is_some() || !inputs.references.is_empty() || inputs.doubles_frames {
        return Err("a clip is upscaled, and takes no other input".into());
    }
    let Some(clip) = inputs.clip.as_ref().filter(|_| !upscale.programs.is_empty()) else {
        return Err("there is no clip or nothing that upscales it".into());
    };
    // Latents that stand for these frames and pixels; the first one stands for one frame.
    let grid = |extents: [u32; 3]| -> Result<[u32; 3], String> {
        let whole = [extents[0] - 1, extents[1], extents[2]];
        if whole.iter().zip(&video.scale).any(|(n, scale)| !n.is_multiple_of(*scale)) {
            return Err(format!("{extents:?} frames and pixels are not whole latents"));
        }
        Ok([whole[0] / video.scale[0] + 1, whole[1] / video.scale[1], whole[2] / video.scale[2]])
    };
    let factors = video.scale.map(|n| n as usize);
    check_encoder_tiles(&clip.tiles, factors, grid(upscale.clip)?)?;
    check_encoder_tiles(&pipeline.decode, factors, grid([video.frames, video.height, video.width])?)
}

/// Refuses a list that no pipeline has.
fn at_most(what: &str, found: usize, most: usize) -> Result<(), String> {
    if found <= most { Ok(()) } else { Err(format!("there are {found} {what}, expected at most {most}")) }
}

fn check_stage(stage: &Stage, has_video: bool) -> Result<(), String> {
    at_most("noise levels", stage.sigmas.len(), MOST_STEPS + 1)?;
    at_most("adapters", stage.adapters.len(), MAX_ADAPTERS)?;
    at_most("kinds of conditioning", stage.classes.len(), MAX_CLASSES)?;
    for class in &stage.classes {
        at_most("step programs", class.programs.len(), MAX_PROGRAMS)?;
        for program in &class.programs {
            at_most("passes", program.passes.len(), Pass::ALL.len())?;
            at_most("modalities", program.updates.len(), Modality::BOTH.len())?;
        }
    }
    for guider in stage.guidance.iter().flat_map(|g| [&g.video, &g.audio]) {
        at_most("blocks without attention", guider.stg_blocks.len(), MAX_BLOCKS)?;
    }
    let tokens = stage.grid.iter().try_fold(1u64, |n, &d| n.checked_mul(u64::from(d)));
    if has_video && !tokens.is_some_and(|n| (1..=MAX_TOKENS).contains(&n)) {
        return Err(format!("grid {:?} is empty or too large", stage.grid));
    }
    if let Some(tiles) = &stage.tiles {
        if !has_video || tiles.factors != [1; 3] {
            return Err("tiles are not those of a latent of video".into());
        }
        tiles.axes.iter().zip(stage.grid).try_for_each(|(axis, extent)| check_tiles(axis, extent as usize))?;
    }
    if has_video && [stage.height, stage.width].iter().any(|n| !(1..=MAX_SIDE).contains(n)) {
        return Err(format!("size {}x{} is out of range", stage.height, stage.width));
    }
    let sigmas = &stage.sigmas;
    let falling = sigmas.windows(2).all(|w| w[0] > w[1]) && sigmas.iter().all(|s| (0.0..=1.0).contains(s));
    if sigmas.len() < 2 || !falling || sigmas.last() != Some(&0.0) {
        return Err("noise levels do not fall from at most 1 to 0".into());
    }
    let factors = match stage.sampler {
        Sampler::Euler | Sampler::Res2s => [0.0; 2],
        Sampler::GradientEstimation { gamma } => [gamma; 2],
        Sampler::Ancestral { eta, noise } | Sampler::CfgPlusPlus { eta, noise } => [eta, noise],
    };
    if factors.iter().any(|v| !v.is_finite()) {
        return Err("a factor of the sampler is not a number".into());
    }
    Ok(())
}

/// Checks what a run brings.
fn check_inputs(pipeline: &Pipeline) -> Result<(), String> {
    let (video, inputs) = (&pipeline.video, &pipeline.inputs);
    let scale = video.scale.map(|n| n as usize);
    if (!inputs.references.is_empty() || inputs.clip.is_some()) && video.channels == 0 {
        return Err("a clip is taken where no video is made".into());
    }
    if inputs.references.len() > pipeline.stages.len() {
        return Err(format!("references for {} stages, of {}", inputs.references.len(), pipeline.stages.len()));
    }
    if inputs.doubles_frames && (inputs.references.is_empty() || video.frames.is_multiple_of(2)) {
        return Err(format!("{} frames are not those of references whose frames stand twice", video.frames));
    }
    if inputs.references.iter().any(|r| r.count != inputs.references[0].count) {
        return Err("stages take other numbers of references".into());
    }
    for (references, stage) in inputs.references.iter().zip(&pipeline.stages) {
        let ReferenceInput { count, frames, height, width, space_scale, time_scale, .. } = *references;
        let in_range = |n: u32, most: u32| (1..=most).contains(&n);
        let scales = [space_scale, time_scale].iter().all(|&n| in_range(n, MAX_SCALE));
        let sides = in_range(height, MAX_SIDE) && in_range(width, MAX_SIDE) && in_range(frames, MAX_FRAMES);
        if !scales || !sides || !in_range(count, MAX_REFERENCES) {
            return Err(format!("{count} references of {frames} frames of {height}x{width} are out of range"));
        }
        let grid = [frames.div_ceil(video.scale[0]), height / video.scale[1], width / video.scale[2]];
        check_encoder_tiles(&references.tiles, scale, grid)?;
        if references.has_attention && grid[0] > video.frames {
            return Err(format!("strengths of attention for {} latents of {} frames", grid[0], video.frames));
        }
        let covered = [grid[0], grid[1].saturating_mul(space_scale), grid[2].saturating_mul(space_scale)];
        if stage.tiles.is_some() && (time_scale != 1 || covered != stage.grid) {
            return Err(format!(
                "references of {frames} frames of {height}x{width} do not cover stage `{}`",
                stage.name
            ));
        }
    }
    if let (Some(clip), Some(first)) = (&inputs.clip, pipeline.stages.first()) {
        check_encoder_tiles(&clip.tiles, scale, first.grid)?;
    }
    if let Some(sound) = &inputs.sound {
        let (frames, tokens) = (sound.mel_frames, pipeline.audio.tokens);
        if u64::from(frames) * u64::from(sound.mel_bins) > MAX_SPECTROGRAM {
            return Err(format!(
                "a spectrogram of {frames} frames of {} bins is too large, expected at most {MAX_SPECTROGRAM} values",
                sound.mel_bins
            ));
        }
        let is_reference = sound.role == SoundRole::Reference;
        let fits = if is_reference { u64::from(sound.tokens()) <= MAX_TOKENS } else { sound.tokens() == tokens };
        if tokens == 0 || sound.time_factor == 0 || !fits {
            return Err(format!("a recording of {frames} mel frames is not {tokens} audio tokens"));
        }
    }
    Ok(())
}

fn check_encoder_tiles(tiles: &TilePlan, factors: [usize; 3], grid: [u32; 3]) -> Result<(), String> {
    if tiles.factors != factors {
        return Err(format!("tiles of an input have {:?} pixels per latent, the video has {factors:?}", tiles.factors));
    }
    tiles.axes.iter().zip(grid).try_for_each(|(axis, extent)| check_tiles(axis, extent as usize))
}

/// Checks that `tiles` cover `0..extent` in order, each of them something that the ones before do not: so there are no
/// more than latents.
fn check_tiles(tiles: &[AxisTile], extent: usize) -> Result<(), String> {
    let mut covered = 0;
    let mut start = 0;
    for tile in tiles {
        let ordered = tile.start >= start && tile.start <= covered && tile.end > covered && tile.end <= extent;
        if !ordered || tile.is_empty() || tile.left_ramp > tile.len() || tile.right_ramp > tile.len() {
            return Err(format!("tile {}..{} does not fit {extent} latents", tile.start, tile.end));
        }
        (start, covered) = (tile.start, tile.end);
    }
    match covered == extent && extent > 0 {
        true => Ok(()),
        false => Err(format!("tiles cover {covered} of {extent} latents")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{ClipInput, Guidance, Guider, SoundInput, StageAdapter, StageClass, StepProgram, VideoSettings};
    use crate::tiling::{TilePlan, Tiling};

    /// Two seconds at 768x512.
    fn pipeline() -> Pipeline {
        let (grid, factors) = ([7, 16, 24], [8, 32, 32]);
        let stage = Stage { height: 512, width: 768, grid, sigmas: vec![1.0, 0.5, 0.0], ..Stage::default() };
        let mut pipeline = Pipeline { stages: vec![stage], ..Pipeline::default() };
        pipeline.video = VideoSettings {
            height: 512,
            width: 768,
            frames: 49,
            frame_rate: (24, 1),
            channels: 128,
            scale: [8, 32, 32],
            max_keyframes: 0,
        };
        (pipeline.audio.tokens, pipeline.audio.channels) = (51, 128);
        pipeline.decode = TilePlan::decode(grid.map(|n| n as usize), factors, &Tiling::DEFAULT).unwrap();
        pipeline
    }

    /// A reference of this many latents, as fine as the video.
    fn reference([f, h, w]: [u32; 3]) -> ReferenceInput {
        let tiles = TilePlan::decode([f, h, w].map(|n| n as usize), [8, 32, 32], &Tiling::WHOLE).unwrap();
        let [frames, height, width] = [1 + 8 * (f - 1), 32 * h, 32 * w];
        let [count, space_scale, time_scale] = [1; 3];
        ReferenceInput { count, frames, height, width, space_scale, time_scale, has_attention: false, tiles }
    }

    #[track_caller]
    fn refuses(change: impl FnOnce(&mut Pipeline), words: &str) {
        let mut changed = pipeline();
        change(&mut changed);
        let problem = check(&changed).expect_err("the settings are wrong");
        assert!(problem.contains(words), "{problem}");
    }

    #[test]
    fn settings_of_a_pipeline_and_of_none_are_accepted() {
        assert_eq!(check(&pipeline()), Ok(()));
        assert_eq!(check(&Pipeline::default()), Ok(()));
        let mut tiled = pipeline();
        tiled.audio.tokens = 0;
        tiled.stages[0].tiles = TilePlan::denoise([7, 16, 24], [(2, 8), (2, 6), (2, 6)]).ok();
        tiled.inputs.references = vec![reference([7, 16, 24])];
        assert_eq!(check(&tiled), Ok(()));
        assert_eq!(check(&upscaling()), Ok(()));
    }

    /// The same video from a clip of half the size.
    fn upscaling() -> Pipeline {
        let mut pipeline = pipeline();
        pipeline.stages.clear();
        pipeline.audio.tokens = 0;
        let tiles = TilePlan::decode([7, 8, 12], [8, 32, 32], &Tiling::WHOLE).unwrap();
        pipeline.inputs.clip = Some(ClipInput { tiles });
        let programs = vec!["upsample.space".into()];
        pipeline.upscale = Some(Upscale { clip: [49, 256, 384], clip_rate: (24, 1), programs });
        pipeline
    }

    #[test]
    fn clips_that_cannot_be_upscaled_are_refused() {
        let refuses = |change: fn(&mut Pipeline), words: &str| {
            let mut changed = upscaling();
            change(&mut changed);
            let problem = check(&changed).expect_err("the settings are wrong");
            assert!(problem.contains(words), "{problem}");
        };
        fn own(pipeline: &mut Pipeline) -> &mut Upscale {
            pipeline.upscale.as_mut().unwrap()
        }
        refuses(
            |p| {
                p.stages.push(Stage {
                    sigmas: vec![1.0, 0.0],
                    grid: [7, 16, 24],
                    height: 512,
                    width: 768,
                    ..Stage::default()
                })
            },
            "stages where",
        );
        refuses(|p| own(p).clip[0] = 0, "0 or out of range");
        refuses(|p| own(p).clip[1] = u32::MAX, "0 or out of range");
        refuses(|p| own(p).clip_rate.1 = 0, "0 or out of range");
        refuses(|p| own(p).clip[2] = 385, "not whole latents");
        refuses(|p| own(p).clip[2] = 352, "does not fit 11 latents");
        refuses(|p| own(p).programs.clear(), "nothing that upscales");
        refuses(|p| p.inputs.clip = None, "no clip");
        refuses(|p| p.video.frames = 57, "cover 7 of 8");
        refuses(|p| p.video.scale[0] = 0, "scale is 0");
        refuses(|p| p.audio.tokens = 1, "no other input");
    }

    #[test]
    fn settings_that_would_stop_the_driver_are_refused() {
        refuses(|p| p.video.height = u32::MAX, "height is 4294967295");
        refuses(|p| p.video.frames = 0, "is 0");
        refuses(|p| p.video.channels = 0, "tiles without video");
        refuses(|p| (p.video.channels, p.audio.tokens) = (0, 0), "neither video nor sound");
        refuses(|p| p.audio.channels = 0, "no width");
        refuses(|p| p.audio.stage = 1, "stage 1, of 1");
        refuses(|p| p.stages[0].sampler = Sampler::GradientEstimation { gamma: f64::NAN }, "not a number");
        refuses(|p| p.video.frames = 50, "not the size of the video");
        refuses(|p| p.video.frame_rate.1 = 0, "rate");
        refuses(|p| p.stages[0].sigmas.clear(), "noise levels");
        refuses(|p| p.stages[0].sigmas[1] = f32::NAN, "noise levels");
        let levels = |steps: usize| (0..=steps).map(|i| 1.0 - i as f32 / steps as f32).collect::<Vec<_>>();
        let mut long = pipeline();
        long.stages[0].sigmas = levels(MOST_STEPS);
        assert_eq!(check(&long), Ok(()));
        refuses(|p| p.stages[0].sigmas = levels(MOST_STEPS + 1), "there are 1002 noise levels, expected at most 1001");
        refuses(|p| p.stages = vec![p.stages[0].clone(); 17], "17 stages, expected at most 16");
        refuses(|p| p.text.buckets = vec![1; 1000], "1000 sizes of prompts");
        refuses(|p| p.stages[0].adapters = vec![StageAdapter::user(); 17], "17 adapters");
        let class = StageClass { programs: vec![StepProgram::default(); 257], ..StageClass::default() };
        refuses(|p| p.stages[0].classes = vec![class.clone()], "257 step programs");
        refuses(|p| p.stages[0].classes = vec![StageClass::default(); 1025], "1025 kinds of conditioning");
        let passes = StepProgram { passes: vec![Pass::Conditioned; 5], ..StepProgram::default() };
        let class = StageClass { programs: vec![passes], ..StageClass::default() };
        refuses(|p| p.stages[0].classes = vec![class.clone()], "5 passes, expected at most 4");
        let guider = Guider { stg_blocks: vec![0; 5000], ..Guider::default() };
        refuses(
            |p| p.stages[0].guidance = Some(Guidance { audio: guider.clone(), ..Guidance::default() }),
            "5000 blocks without attention",
        );
        refuses(|p| p.stages[0].grid = [u32::MAX; 3], "too large");
        refuses(|p| p.stages.clear(), "tiles without stages");
        let tiles = |latent: [usize; 3]| TilePlan::denoise(latent, [(2, 8), (2, 6), (2, 6)]).ok();
        refuses(|p| p.stages[0].tiles = tiles([7, 16, 25]), "does not fit");
        refuses(|p| p.stages[0].tiles = tiles([7, 16, 23]), "cover 23 of 24");
        refuses(|p| p.stages[0].tiles = Some(p.decode.clone()), "not those of a latent");
        refuses(|p| p.stages[0].tiles = tiles([7, 16, 24]), "sound in a stage of tiles");
        refuses(
            |p| {
                p.audio.tokens = 0;
                (p.stages[0].tiles, p.inputs.references) = (tiles([7, 16, 24]), vec![reference([1, 16, 24])]);
            },
            "do not cover",
        );
        refuses(
            |p| {
                let mut low = reference([1, 16, 24]);
                (low.height, low.tiles.axes[1]) = (1, Vec::new());
                p.inputs.references = vec![low];
            },
            "cover 0 of 0",
        );
        refuses(
            |p| {
                p.inputs.references = vec![reference([64, 16, 24])];
                p.inputs.references[0].has_attention = true;
            },
            "attention for 64 latents",
        );
        let sound = SoundInput { mel_frames: 201, mel_bins: 64, time_factor: 4, ..SoundInput::default() };
        let mut with_sound = pipeline();
        with_sound.inputs.sound = Some(sound);
        assert_eq!(check(&with_sound), Ok(()));
        refuses(|p| p.inputs.sound = Some(SoundInput { mel_bins: 1 << 20, ..sound }), "201 frames of 1048576 bins");
        refuses(|p| p.inputs.doubles_frames = true, "49 frames are not those of references");
        refuses(|p| p.decode.axes[1].clear(), "cover 0 of 16");
        refuses(|p| p.decode.axes[1] = p.decode.axes[1].repeat(2), "does not fit");
        refuses(|p| p.decode.axes[1][0].end = usize::MAX, "does not fit");
        refuses(|p| p.decode.axes[2][0].left_ramp = usize::MAX, "does not fit");
        refuses(|p| p.decode.factors[0] = 0, "pixels per latent");
    }
}
