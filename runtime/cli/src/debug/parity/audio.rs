//! The audio VAE and the vocoder.

use anyhow::Result;
use ltxc_ir::DType;
use ltxc_ir::eval::Tensor;
use ltxc_models::audio::{AudioVaeConfig, VocoderConfig, decode, decode_audio, encode, vocode};

use super::{Check, Row, Setup, channels_first, channels_last};
use crate::debug::modules::{Kept, Ran};

/// `[1, z, l, bins] → [1, l, z · bins]`.
fn tokens(latent: &Tensor) -> Tensor {
    let &[_, z, l, bins] = &latent.ty.shape[..] else { return latent.clone() };
    let values = latent.to_f32();
    let at = |i: usize, c: usize, m: usize| values[(c * l + i) * bins + m];
    let moved: Vec<f32> = (0..l)
        .flat_map(|i| (0..z).flat_map(move |c| (0..bins).map(move |m| (i, c, m))))
        .map(|(i, c, m)| at(i, c, m))
        .collect();
    Tensor::f32(&[1, l, z * bins], &moved)
}

/// The inverse of [`tokens`].
pub(super) fn untokens(values: &[f32], z: usize) -> Vec<f32> {
    let bins = 16; // of every audio latent of the family
    let rows = values.len() / (z * bins).max(1);
    (0..z)
        .flat_map(|c| (0..rows).flat_map(move |t| (0..bins).map(move |m| (t * z + c) * bins + m)))
        .map(|i| values[i])
        .collect()
}

fn check_named(check: &mut Check<'_>, ran: &Ran, path: &str, name: &str) {
    if let Some(found) = ran.value(path) {
        check.check(name, &first(found));
    }
}

fn first(kept: &Kept) -> Vec<f32> {
    channels_first(&kept.values, kept.ty.shape.last().copied().unwrap_or(1))
}

pub(super) fn check_vae(setup: &Setup<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let Some(mut check) = setup.open("audio_vae", "audio_vae", rows)? else { return Ok(()) };
    let config = AudioVaeConfig::from_json(setup.files.model.section("audio_vae")?)?;
    let mid = |check: &mut Check<'_>, ran: &Ran, half: &str, part: &str| {
        let attention = if config.has_mid_attention { "attn_1" } else { "block_1" };
        for (ours, theirs) in [("block_1", "block_1"), (attention, "attn_1"), ("block_2", "block_2")] {
            check_named(check, ran, &format!("audio_vae.{half}.mid.{ours}"), &format!("{part}.mid.{theirs}"));
        }
    };
    let mel = check.input("enc.mel").ok().map(channels_last).transpose()?;
    // Files that cannot condition on sound have no encoder.
    let encoder = mel.and_then(|mel| Some((encode(&config, &setup.weights(), mel.ty.shape[1], DType::F32).ok()?, mel)));
    if let Some((module, mel)) = encoder {
        let ran = setup.bench().run("audio_vae", &module, &module.entries[0], &[mel])?;
        check_named(&mut check, &ran, "audio_vae.encoder.conv_in", "enc.conv_in");
        for level in 0..config.levels() {
            for block in 0..config.res_blocks {
                let ours = format!("audio_vae.encoder.down.{level}.block.{block}");
                check_named(&mut check, &ran, &ours, &format!("enc.stage{level}.block{block}"));
            }
            let ours = format!("audio_vae.encoder.down.{level}.downsample");
            check_named(&mut check, &ran, &ours, &format!("enc.stage{level}.downsample"));
        }
        mid(&mut check, &ran, "encoder", "enc");
        check_named(&mut check, &ran, "audio_vae.encoder.conv_out", "enc.conv_out");
        check.check("enc.latent", &untokens(&ran.result("latent")?.values, config.z_channels));
    }
    let latent = tokens(check.input("dec.latent")?);
    let module = decode(&config, &setup.weights(), latent.ty.shape[1], DType::F32)?;
    let ran = setup.bench().run("audio_vae", &module, &module.entries[0], &[latent])?;
    check_named(&mut check, &ran, "audio_vae.decoder.conv_in", "dec.conv_in");
    mid(&mut check, &ran, "decoder", "dec");
    for level in (0..config.levels()).rev() {
        for block in 0..=config.res_blocks {
            let ours = format!("audio_vae.decoder.up.{level}.block.{block}");
            check_named(&mut check, &ran, &ours, &format!("dec.stage{level}.block{block}"));
        }
        let ours = format!("audio_vae.decoder.up.{level}.upsample");
        check_named(&mut check, &ran, &ours, &format!("dec.stage{level}.upsample"));
    }
    check_named(&mut check, &ran, "audio_vae.decoder.conv_out", "dec.conv_out");
    check.check("dec.mel", &first(ran.result("mel")?));
    Ok(())
}

pub(super) fn check_vocoder(setup: &Setup<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let Some(mut check) = setup.open("vocoder", "vocoder", rows)? else { return Ok(()) };
    let vae = AudioVaeConfig::from_json(setup.files.model.section("audio_vae")?)?;
    let config = VocoderConfig::from_json(setup.files.model.section("vocoder")?)?;
    let mel = channels_last(check.input("mel")?)?;
    let module = vocode(&config, &setup.weights(), mel.ty.shape[1], DType::F32)?;
    let ran = setup.bench().run("vocoder", &module, &module.entries[0], &[mel])?;
    let core = if config.extension.is_some() { "vocoder.vocoder" } else { "vocoder" };
    check_named(&mut check, &ran, &format!("{core}.conv_pre"), "conv_pre");
    let kernels = config.core.block_kernels.len();
    for stage in 0..config.core.rates.len() {
        check_named(&mut check, &ran, &format!("{core}.ups.{stage}"), &format!("ups{stage}"));
        for block in stage * kernels..(stage + 1) * kernels {
            check_named(&mut check, &ran, &format!("{core}.resblocks.{block}"), &format!("resblock{block}"));
        }
    }
    check_named(&mut check, &ran, &format!("{core}.conv_post"), "conv_post");
    if let Some(extension) = &config.extension {
        check_named(&mut check, &ran, "vocoder.core_waveform", "bwe.vocoder_waveform");
        check_named(&mut check, &ran, "vocoder.resampler", "bwe.skip");
        check_named(&mut check, &ran, "vocoder.bwe_generator.conv_pre", "bwe.conv_pre");
        for stage in 0..extension.generator.rates.len() {
            check_named(&mut check, &ran, &format!("vocoder.bwe_generator.ups.{stage}"), &format!("bwe.ups{stage}"));
        }
        check_named(&mut check, &ran, "vocoder.bwe_generator.waveform", "bwe.residual");
    }
    check.check("waveform", &first(ran.result("waveform")?));
    if let Ok(latent) = check.input("decode_audio.latent") {
        let latent = tokens(latent);
        let module = decode_audio(&vae, &config, &setup.weights(), latent.ty.shape[1], DType::F32)?;
        let ran = setup.bench().run("audio_vae", &module, &module.entries[0], &[latent])?;
        check.check("decode_audio.waveform", &first(ran.result("waveform")?));
    }
    Ok(())
}
