//! The graphs of pipeline `upscale`: a clip is encoded, enlarged by latent upsamplers, the spatial one first, and decoded.
//!
//! Of the model only the video VAE is used. Programs: `encode_video.<f>x<h>x<w>`, `upsample.space`, `upsample.time`,
//! `decode.<f>x<h>x<w>`.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::{ClipInput, Inputs, ModelInfo, Pipeline, Upscale, VideoSettings};
use ltxc_models::Weights;
use ltxc_models::checkpoint::{Checkpoint, Generation};
use ltxc_models::upsampler::{Enlarge, UpsamplerConfig, upsample};
use ltxc_models::video_vae::{self, VideoVaeConfig};
use ltxc_runtime::pipeline::decode::program_name;
use ltxc_runtime::pipeline::encode;

use crate::assemble::{Assembly, Programs};
use crate::job::Shape;
use crate::model_files::{MODEL, ModelFiles, TEMPORAL, UPSAMPLER};
use crate::pipelines::{definition, tiles};
use crate::tensors;

/// Builds the graphs. `shape` is that of the clip.
///
/// # Errors
/// A model without video VAE, an upsampler that does not fit it, or sizes that cannot be run.
pub(crate) fn assemble(files: &ModelFiles, shape: &Shape) -> Result<Assembly> {
    let model = &files.model;
    let generation = model.generation();
    if !matches!(generation, Generation::Ltx2 | Generation::Ltx23) {
        let name = model.name();
        bail!("`{name}` is {}, which is not supported yet; LTX-2 and LTX-2.3 are", generation.name());
    }
    let vae =
        model.section("vae").and_then(VideoVaeConfig::from_json).with_context(|| format!("`{}`", model.name()))?;
    let factors @ [ft, fh, fw] = vae.factors();
    shape.check(factors)?;
    let clip = [(shape.frames - 1) / ft + 1, shape.height / fh, shape.width / fw];
    let (dtype, mut programs) = (shape.dtype, Programs::default());
    let weights = Weights::new(MODEL, model);
    let mut asked = vec![(MODEL, weights.clone())];

    let encoded = tiles(clip, factors)?;
    let sizes: BTreeSet<[usize; 3]> = encoded.tiles().map(|t| encoded.pixels(t).map(|axis| axis.len())).collect();
    for pixels @ [f, h, w] in sizes {
        programs.add("inputs", &encode::program_name(f, h, w), video_vae::encode(&vae, &weights, pixels, dtype));
    }
    let (mut grid, mut rate, mut names) = (clip, (shape.frame_rate.num(), shape.frame_rate.den()), Vec::new());
    let upsamplers = [(UPSAMPLER, "upsample.space", &files.upsampler), (TEMPORAL, "upsample.time", &files.temporal)];
    for (source, name, upsampler) in upsamplers {
        let Some(upsampler) = upsampler else { continue };
        let config = UpsamplerConfig::from_json(upsampler.config())?;
        let doubles_time = config.enlarge == Enlarge::Time || config.enlarge == Enlarge::SpaceAndTime;
        let fits = if source == TEMPORAL { doubles_time } else { config.enlarge != Enlarge::Time };
        if !fits {
            let (flag, other) = match source {
                TEMPORAL => ("--temporal-upsampler-path", "--spatial-upsampler-path"),
                _ => ("--spatial-upsampler-path", "--temporal-upsampler-path"),
            };
            bail!(
                "the upscaler `{}` enlarges {}; name it with `{other}` instead of `{flag}`",
                upsampler.name(),
                config.enlarge
            );
        }
        check_upsampler(upsampler, &config, model, vae.latent_channels)?;
        let own = Weights::new(source, upsampler);
        programs.add(name, name, upsample(&config, &own, &weights, grid, dtype));
        asked.push((source, own));
        names.push(name.to_string());
        grid = config.output_grid(grid);
        if doubles_time {
            let doubled = rate.0.checked_mul(2).context("the clip has too many frames per second to double them")?;
            rate = if rate.1.is_multiple_of(2) { (rate.0, rate.1 / 2) } else { (doubled, rate.1) };
        }
    }
    if names.is_empty() {
        bail!(
            "pipeline `upscale` needs an upscaler; name it with `--spatial-upsampler-path`, `--temporal-upsampler-path` or both"
        );
    }
    let decoded = shape.tile.tiles(grid, factors)?;
    let sizes: BTreeSet<[usize; 3]> = decoded.tiles().map(|t| t.map(|axis| axis.len())).collect();
    for size @ [f, h, w] in sizes {
        programs.add("decode", &program_name(f, h, w), video_vae::decode(&vae, &weights, size, dtype));
    }
    tensors::check(files, &asked, false, programs.failure)?;

    let pipeline = Pipeline {
        name: definition(shape.pipeline).name.into(),
        release: shape.release,
        model: ModelInfo {
            generation: generation.name().into(),
            version: model.model_version().unwrap_or_default().into(),
            synthetic: model.is_synthetic(),
            image_crf: 33,
        },
        dtype,
        video: VideoSettings {
            height: (grid[1] * fh) as u32,
            width: (grid[2] * fw) as u32,
            frames: ((grid[0] - 1) * ft + 1) as u32,
            frame_rate: rate,
            channels: vae.latent_channels as u32,
            scale: factors.map(|n| n as u32),
            max_keyframes: 0,
        },
        upscale: Some(Upscale {
            clip: [shape.frames, shape.height, shape.width].map(|n| n as u32),
            clip_rate: (shape.frame_rate.num(), shape.frame_rate.den()),
            programs: names,
        }),
        inputs: Inputs { clip: Some(ClipInput { tiles: encoded }), ..Inputs::default() },
        decode: decoded,
        ..Pipeline::default()
    };
    Ok(Assembly { programs: programs.built, pipeline })
}

/// Checks that an upsampler was made for a model whose latents have `channels`.
///
/// # Errors
/// One of another generation, as far as it can be told, or for other latents.
pub(crate) fn check_upsampler(
    upsampler: &Checkpoint,
    config: &UpsamplerConfig,
    model: &Checkpoint,
    channels: usize,
) -> Result<()> {
    let (name, generation) = (upsampler.name(), model.generation());
    // Models without a version count as LTX-2, but need not be.
    if model.model_version().is_some() && !config.can_be_of(generation) {
        let other = if generation == Generation::Ltx2 { "LTX-2.3 or newer" } else { "LTX-2" };
        bail!(
            "the upscaler `{name}` is one of {other}, the model is {generation}; name the spatial x2 upscaler of {generation}"
        );
    }
    let found = config.in_channels;
    if found != channels {
        bail!(
            "the upscaler `{name}` takes latents of {found} channels, the video VAE makes {channels}; name the upscaler of this \
             model"
        );
    }
    Ok(())
}
