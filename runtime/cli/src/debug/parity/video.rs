//! The video VAE in both directions, and the latent upsampler.

use anyhow::Result;
use ltxc_ir::DType;
use ltxc_models::Weights;
use ltxc_models::upsampler::{UpsamplerConfig, upsample};
use ltxc_models::video_vae::{self, VideoVaeConfig};

use super::{Check, Row, Setup, UPSAMPLER, channels_last};
use crate::debug::modules::Ran;

pub(super) fn check_vae(setup: &Setup<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let Some(mut check) = setup.open("video_vae", "video_vae", rows)? else { return Ok(()) };
    let config = VideoVaeConfig::from_json(setup.files.model.section("vae")?)?;
    let weights = setup.weights();
    if let Ok(pixels) = check.input("enc.input_uint8") {
        let video = channels_last(pixels)?;
        let grid = [1, 2, 3].map(|axis| video.ty.shape[axis]);
        let module = video_vae::encode(&config, &weights, grid, DType::F32)?;
        let ran = setup.bench().run("vae", &module, "encode", &[video])?;
        check_inner(&mut check, &ran, "enc", "encoder", ("down", "down_blocks"));
        check.check_channels("enc.latent", ran.result("latent")?);
    }
    for (input, output) in [("dec.latent", "dec.output"), ("dec_one.latent", "dec_one.output")] {
        let Ok(latent) = check.input(input) else { continue };
        let latent = channels_last(latent)?;
        let grid = [1, 2, 3].map(|axis| latent.ty.shape[axis]);
        let module = video_vae::decode(&config, &weights, grid, DType::F32)?;
        if module.function("decode").is_some_and(|f| f.params.len() > 1) {
            // Decoders with a timestep draw noise of their own.
            return Ok(());
        }
        let ran = setup.bench().run("vae", &module, "decode", &[latent])?;
        if input == "dec.latent" {
            check_inner(&mut check, &ran, "dec", "decoder", ("up", "up_blocks"));
        }
        check.check_channels(output, ran.result("frames")?);
    }
    Ok(())
}

/// Compares the named values of a run: `enc.down3` is `vae.encoder.down_blocks.3`.
fn check_inner(check: &mut Check<'_>, ran: &Ran, half: &str, module: &str, blocks: (&str, &str)) {
    for value in &ran.values {
        let Some(name) = value.name.strip_prefix(&format!("vae.{module}.")) else { continue };
        let recorded = match name.strip_prefix(&format!("{}.", blocks.1)) {
            Some(index) if index.contains('.') => continue,
            Some(index) => format!("{half}.{}{index}", blocks.0),
            None if name == "conv_in" || name == "conv_out" => format!("{half}.{name}"),
            None => continue,
        };
        check.check_channels(&recorded, value);
    }
}

pub(super) fn check_upsampler(setup: &Setup<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let Some(upsampler) = &setup.files.upsampler else { return Ok(()) };
    let Some(mut check) = setup.open("upsampler", "upsamplers", rows)? else { return Ok(()) };
    let config = UpsamplerConfig::from_json(upsampler.config())?;
    let names: Vec<String> =
        check.file.iter().filter_map(|(key, _)| key.strip_suffix(".latent")).map(String::from).collect();
    // Recordings are named after files: the longest name that ours begins with.
    let ours = upsampler.name().rsplit('/').next().unwrap_or_default().to_string();
    let Some(name) = names.into_iter().filter(|n| ours.starts_with(n.as_str())).max_by_key(String::len) else {
        return Ok(());
    };
    let latent = channels_last(check.input(&format!("{name}.latent"))?)?;
    let grid = [1, 2, 3].map(|axis| latent.ty.shape[axis]);
    let module = upsample(&config, &Weights::new(UPSAMPLER, upsampler), &setup.weights(), grid, DType::F32)?;
    let ran = setup.bench().run("upsampler", &module, "upsample", &[latent])?;
    check.check_channels(&format!("{name}.normalized_output"), ran.result("latent")?);
    Ok(())
}
