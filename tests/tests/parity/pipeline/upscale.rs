//! A clip through latent upsamplers: the plan, run by the driver, against its parts, run by the reference evaluator.
//!
//! No such run was recorded; the parts are compared with recordings in `video_vae` and `upsampler`.

use ltxc_ir::eval::Tensor;
use ltxc_ir::{DType, Module};
use ltxc_models::video_vae::{DECODE_TIMESTEP, decode, encode};
use ltxc_runtime::pipeline::{Media, SourceClip};
use ltxc_tests::fixtures::TensorFile;
use ltxc_tests::harness::reference;

use super::conditioned::{frames, waveform};
use super::*;
use crate::upsampler::Upsampler;
use crate::video_vae::{Checkpoint, checked, grid_of, random};

/// Relative L2 of a chain of parts: each may differ by the 1e-5 of a component.
const PART_LIMIT: f64 = 1e-5;

/// Share of noise in the latent of a decoder that adds some: spec/video-vae §6.4.
const NOISE_SCALE: f32 = 0.025;

#[test]
fn a_clip_of_ltx2_gets_more_pixels_and_more_frames() {
    check(
        "tiny-ltx2/ltx-2-tiny",
        Some("tiny-ltx2/spatial-upscaler-x2-tiny"),
        Some("tiny-ltx2/temporal-upscaler-x2-tiny"),
        (17, 48),
    );
}

#[test]
fn a_clip_of_ltx2_gets_more_frames() {
    check("tiny-ltx2/ltx-2-tiny", None, Some("tiny-ltx2/temporal-upscaler-x2-tiny"), (17, 48));
}

#[test]
fn a_clip_of_ltx23_gets_half_as_many_pixels_more() {
    check("tiny-ltx23/ltx-2.3-tiny", Some("tiny-ltx23/spatial-upscaler-x1.5-ltx23-tiny"), None, (9, 24));
}

/// This VAE mixes noise into latents and injects more between its layers.
#[test]
fn decoders_can_be_told_to_add_no_noise() {
    check("tiny-ltx2/vae-alt-tiny", None, Some("tiny-ltx2/temporal-upscaler-x2-tiny"), (17, 48));
}

#[track_caller]
fn check(checkpoint: &str, spatial: Option<&str>, temporal: Option<&str>, (count, rate): (u32, u32)) {
    let path = |name: &str| root().join(format!("{name}.safetensors"));
    let model = Files::of(if checkpoint.contains("ltx23") { "ltx23" } else { "ltx2" });
    let args = ModelArgs {
        checkpoint_path: Some(path(checkpoint)),
        spatial_upsampler_path: spatial.map(path),
        temporal_upsampler_path: temporal.map(path),
        ..ModelArgs::default()
    };
    let model = Files { args, ..model };
    let shape = ShapeArgs {
        pipeline: Some(PipelineName::Upscale),
        size: Some("96x64".into()),
        num_frames: Some(9),
        ..ShapeArgs::default()
    };
    let plan = model.compile(&shape, 0);
    assert!(plan.sources.iter().all(|s| s.name != "gemma"), "no text encoder");
    let clip = frames("retake.frames_uint8", 96, 64)[..9 * 64 * 96 * 3].to_vec();
    let sound = waveform("retake.waveform");
    let stereo: Vec<f32> = sound.channels[0].iter().zip(&sound.channels[1]).flat_map(|(l, r)| [*l, *r]).collect();
    let source = SourceClip { frames: clip.clone(), start: 0.0, end: 1.0, kept: None };
    let media = Media { clip: Some(source), sound: Some(sound), ..Media::default() };
    let noise = Noise { spares_decoders: true, ..Noise::default() };
    let result = model.run(&plan, &Request { media, noise, ..Request::default() });

    let vae = Checkpoint::read(&format!("{checkpoint}.safetensors"));
    let clip = Tensor::f32(&[1, 9, 64, 96, 3], &clip);
    let module = checked(encode(&vae.config, &vae.weights(), [9, 64, 96], DType::F32).expect("an encoder"));
    let mut latent = evaluated(&module, "encode", "latent", &clip, &[("model", &vae.file)]);
    let mut parts = 1.0;
    near("clip.latent", &result.tensors["clip.latent"], &latent, parts);
    for (name, file) in [("upsample.space", spatial), ("upsample.time", temporal)] {
        let Some(file) = file else { continue };
        parts += 1.0;
        let upsampler = Upsampler::read(&format!("{file}.safetensors"));
        let module = upsampler.module(&vae, grid_of(&latent), DType::F32).expect("an upsampler");
        let sources = [("upsampler", &upsampler.file), ("model", &vae.file)];
        latent = evaluated(&module, "upsample", "latent", &latent, &sources);
        near(name, &result.tensors[&format!("{name}.latent")], &latent, parts);
    }
    let module = checked(decode(&vae.config, &vae.weights(), grid_of(&latent), DType::F32).expect("a decoder"));
    let expected = evaluated(&module, "decode", "frames", &latent, &[("model", &vae.file)]);
    near("frames", &result.decoded, &expected, parts + 1.0);

    let video = &plan.pipeline.video;
    assert_eq!([video.frames, video.height, video.width].map(|n| n as usize), grid_of(&expected));
    assert_eq!((video.frames, video.frame_rate), (count, (rate, 1)));
    assert_eq!(result.sound, stereo, "the sound stays as it is");
}

#[track_caller]
fn near(name: &str, found: &[f32], expected: &Tensor, parts: f64) {
    let expected = expected.to_f32();
    assert_eq!(found.len(), expected.len(), "{name}");
    let error = relative_l2(found, &expected);
    assert!(error <= parts * PART_LIMIT, "{name} differs by {error:.2e}");
}

/// A result of `entry`, whose first parameter is `input`. Noise that is mixed into a latent meets a latent from which its
/// share was taken, so that the mixture is `input`; injected noise is 0.
fn evaluated(module: &Module, entry: &str, result: &str, input: &Tensor, sources: &[(&str, &TensorFile)]) -> Tensor {
    let function = module.function(entry).expect("an entry");
    let names: Vec<&str> = function.params.iter().map(|param| function.name_of(param.value)).collect();
    let noise = names.contains(&"noise").then(|| random(&input.ty.shape, 7));
    let first = match &noise {
        None => input.clone(),
        Some(noise) => {
            let rest = |(x, n): (f32, f32)| (x - NOISE_SCALE * n) / (1.0 - NOISE_SCALE);
            let values: Vec<f32> = input.to_f32().into_iter().zip(noise.to_f32()).map(rest).collect();
            Tensor::f32(&input.ty.shape, &values)
        }
    };
    let arguments: Vec<Tensor> = (function.params.iter().zip(&names).enumerate())
        .map(|(i, (param, name))| match *name {
            _ if i == 0 => first.clone(),
            "timestep" => Tensor::f32(&[1], &[DECODE_TIMESTEP]),
            "noise" => noise.clone().expect("it has this parameter"),
            _ => Tensor::zeros(function.ty(param.value).clone()),
        })
        .collect();
    reference(module, entry, &arguments, sources).results[result].clone()
}
