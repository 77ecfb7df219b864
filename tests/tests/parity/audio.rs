//! The audio VAE, the vocoders and the mel front end against the recorded activations of the reference.

use ltxc_ir::eval::Tensor;
use ltxc_ir::{DType, Module, TensorType};
use ltxc_models::audio::{AudioVaeConfig, VocoderConfig, decode, decode_audio, encode, vocode};
use ltxc_models::{ModelError, Weights};
use ltxc_runtime::audio_frontend::{MelFrontend, MelSettings, resample};
use ltxc_tests::compare::Report;
use ltxc_tests::fixtures::{TensorFile, expected, root};
use ltxc_tests::harness::{Run, evaluate};
use ltxc_tests::recorded::Recorded;

/// Relative L2 limit of every comparison, from the README of the fixtures.
const LIMIT: f64 = 1e-5;
/// Limit of a spectrogram that touches the smallest magnitude.
const CLAMPED_LIMIT: f64 = 1e-4;

#[test]
fn audio_vae_of_ltx2() {
    check_vae("ltx2/audio_vae", "tiny-ltx2/ltx-2-tiny");
}

#[test]
fn audio_vae_of_ltx2_with_attention_and_shortcuts() {
    check_vae("ltx2/audio_vae_alt", "tiny-ltx2/audio-vae-alt-tiny");
}

#[test]
fn audio_vae_of_ltx23() {
    check_vae("ltx23/audio_vae", "tiny-ltx23/ltx-2.3-tiny");
}

#[test]
fn audio_vae_of_ltx25() {
    check_vae("ltx25/audio_vae", LTX25);
}

#[test]
fn vocoder_of_ltx2() {
    check_vocoder("ltx2/vocoder", "tiny-ltx2/ltx-2-tiny");
}

#[test]
fn vocoder_of_ltx23() {
    check_vocoder("ltx23/vocoder", "tiny-ltx23/ltx-2.3-tiny");
}

#[test]
fn vocoder_of_ltx25() {
    check_vocoder("ltx25/vocoder", LTX25);
}

#[test]
fn odd_lengths_are_prefixes_of_longer_ones() {
    for name in ["tiny-ltx2/ltx-2-tiny", "tiny-ltx2/audio-vae-alt-tiny"] {
        check_prefixes(&checkpoint(name));
    }
}

#[test]
fn odd_lengths_and_rates_give_the_samples_the_config_promises() {
    let file = checkpoint("tiny-ltx2/ltx-2-tiny");
    let (vae, vocoder) = configs(&file);
    for frames in [1, 2, 5] {
        check_length(&file, vocoder.as_ref().unwrap(), vae.mel_bins, frames);
    }
    let file = checkpoint("tiny-ltx23/ltx-2.3-tiny");
    let (vae, vocoder) = configs(&file);
    let vocoder = vocoder.unwrap();
    check_length(&file, &vocoder, vae.mel_bins, 1);
    // With another rate the core's length is no multiple of the hop, and the end is padded and cut again.
    let hop = vocoder.extension.as_ref().unwrap().hop_length;
    let slower = |stage: usize| {
        let mut config = vocoder.clone();
        config.core.rates[stage] -= 1;
        config
    };
    let stages = (0..vocoder.core.rates.len()).filter(|&stage| vocoder.core.rates[stage] > 1).map(slower);
    let remainder = |config: &VocoderConfig| !config.core.output_samples(3).is_multiple_of(hop);
    let config = stages.into_iter().find(remainder).expect("one of the rates leaves a remainder");
    check_length(&file, &config, vae.mel_bins, 3);
}

#[test]
fn every_entry_builds_with_bf16_activations() {
    for name in ["tiny-ltx2/ltx-2-tiny", "tiny-ltx23/ltx-2.3-tiny"] {
        let file = checkpoint(name);
        let (vae, vocoder) = configs(&file);
        let vocoder = vocoder.unwrap();
        let dtype = DType::BF16;
        let modules = [
            encode(&vae, &weights(&file), 9, dtype).unwrap(),
            decode(&vae, &weights(&file), 3, dtype).unwrap(),
            vocode(&vocoder, &weights(&file), 9, dtype).unwrap(),
            decode_audio(&vae, &vocoder, &weights(&file), 3, dtype).unwrap(),
        ];
        for module in modules {
            let f = module.function(&module.entries[0]).unwrap();
            let types = f.param_types().into_iter().chain(f.result_types());
            assert!(types.into_iter().all(|ty| ty.dtype == DType::F32), "{}", f.name);
            let convolved = f.values.iter().find(|v| v.name.ends_with("conv_post") || v.name.ends_with("conv_out"));
            let in_f32 = f.name == "vocode" && vocoder.extension.is_some();
            assert_eq!(convolved.unwrap().ty.dtype, if in_f32 { DType::F32 } else { dtype }, "{}", f.name);
        }
    }
}

#[test]
fn what_cannot_be_built_is_an_error() {
    let file = checkpoint("tiny-ltx2/ltx-2-tiny");
    let (vae, vocoder) = configs(&file);
    let vocoder = vocoder.unwrap();
    for length in [0, usize::MAX] {
        assert!(matches!(encode(&vae, &weights(&file), length, DType::F32), Err(ModelError::Config { .. })));
        assert!(matches!(decode(&vae, &weights(&file), length, DType::F32), Err(ModelError::Config { .. })));
        assert!(matches!(vocode(&vocoder, &weights(&file), length, DType::F32), Err(ModelError::Config { .. })));
    }
    let wider = AudioVaeConfig { channels: vae.channels + 1, ..vae.clone() };
    assert!(matches!(decode(&wider, &weights(&file), 3, DType::F32), Err(ModelError::Weights { .. })));
    let deeper = AudioVaeConfig { res_blocks: 99, ..vae.clone() };
    assert!(matches!(encode(&deeper, &weights(&file), 3, DType::F32), Err(ModelError::Weights { .. })));
    let mono = AudioVaeConfig { out_channels: 1, ..vae };
    assert!(matches!(decode_audio(&mono, &vocoder, &weights(&file), 3, DType::F32), Err(ModelError::Config { .. })));
}

const LTX25: &str = "tiny-ltx25/vae/ltx-2.5-tiny-audio-vae-bf16";

#[track_caller]
pub fn checkpoint(name: &str) -> TensorFile {
    TensorFile::read(&root().join(format!("{name}.safetensors")))
}

pub fn weights(file: &TensorFile) -> Weights<'_> {
    Weights::new("model", file)
}

pub fn configs(file: &TensorFile) -> (AudioVaeConfig, Option<VocoderConfig>) {
    let config = file.config();
    let vocoder = config.get("vocoder").map(|v| VocoderConfig::from_json(v).unwrap());
    (AudioVaeConfig::from_json(&config["audio_vae"]).unwrap(), vocoder)
}

/// Runs an entry of one parameter.
#[track_caller]
fn run(module: Module, input: Tensor, file: &TensorFile) -> Run {
    evaluate(&module, &module.entries[0], &[input], &[("model", file)])
}

/// Moves the last axis behind the first: `[b, s.., c] → [b, c, s..]`.
pub fn channels_first(x: &Tensor) -> Tensor {
    let last = x.ty.rank() - 1;
    let perm: Vec<usize> = [0, last].into_iter().chain(1..last).collect();
    permute(x, &perm)
}

/// The inverse of [`channels_first`].
fn channels_last(x: &Tensor) -> Tensor {
    let perm: Vec<usize> = [0].into_iter().chain(2..x.ty.rank()).chain([1]).collect();
    permute(x, &perm)
}

fn permute(x: &Tensor, perm: &[usize]) -> Tensor {
    let strides = x.ty.strides();
    let shape: Vec<usize> = perm.iter().map(|&p| x.ty.shape[p]).collect();
    let target = TensorType::f32(shape.clone()).strides();
    let source = |flat: usize| -> usize {
        perm.iter().enumerate().map(|(a, &p)| flat / target[a] % shape[a] * strides[p]).sum()
    };
    let values = x.to_f32();
    let moved: Vec<f32> = (0..values.len()).map(|i| values[source(i)]).collect();
    Tensor::f32(&shape, &moved)
}

/// `[1, z, l, bins] → [1, l, z · bins]`.
pub fn tokens(latent: &Tensor) -> Tensor {
    let s = &latent.ty.shape;
    let moved = permute(latent, &[0, 2, 1, 3]);
    Tensor::f32(&[1, s[2], s[1] * s[3]], &moved.to_f32())
}

/// The inverse of [`tokens`].
fn untokens(tokens: &Tensor, config: &AudioVaeConfig) -> Tensor {
    let (l, z) = (tokens.ty.shape[1], config.z_channels);
    permute(&Tensor::f32(&[1, l, z, config.latent_bins()], &tokens.to_f32()), &[0, 2, 1, 3])
}

#[track_caller]
fn check_vae(name: &str, checkpoint_name: &str) {
    let Some(file) = expected(name) else { return println!("{name}: absent") };
    let weights_file = checkpoint(checkpoint_name);
    let (config, _) = configs(&weights_file);
    let mut recorded = Recorded::new(file);
    check_encoder(&mut recorded, &config, &weights_file);
    check_decoder(&mut recorded, &config, &weights_file);
    if recorded.has("mel.filterbank") {
        check_mel(&mut recorded, &config, &weights_file);
    }
    recorded.finish();
}

fn check_encoder(recorded: &mut Recorded, config: &AudioVaeConfig, file: &TensorFile) {
    let mel = channels_last(&recorded.input("enc.mel"));
    let run = run(encode(config, &weights(file), mel.ty.shape[1], DType::F32).unwrap(), mel, file);
    let tap = |key: &str| channels_first(&run.taps[&format!("audio_vae.encoder.{key}")]);
    recorded.check_tensor("enc.conv_in", &tap("conv_in"), LIMIT);
    for level in 0..config.levels() {
        for block in 0..config.res_blocks {
            let found = tap(&format!("down.{level}.block.{block}"));
            recorded.check_tensor(&format!("enc.stage{level}.block{block}"), &found, LIMIT);
        }
        if level + 1 < config.levels() {
            recorded.check_tensor(
                &format!("enc.stage{level}.downsample"),
                &tap(&format!("down.{level}.downsample")),
                LIMIT,
            );
        }
    }
    check_mid(recorded, "enc", config, &tap);
    recorded.check_tensor("enc.conv_out", &tap("conv_out"), LIMIT);
    recorded.check_tensor("enc.latent", &untokens(&run.results["latent"], config), LIMIT);
}

/// Without attention the reference has an identity in its place.
fn check_mid(recorded: &mut Recorded, part: &str, config: &AudioVaeConfig, tap: &dyn Fn(&str) -> Tensor) {
    let attention = if config.has_mid_attention { "mid.attn_1" } else { "mid.block_1" };
    recorded.check_tensor(&format!("{part}.mid.block_1"), &tap("mid.block_1"), LIMIT);
    recorded.check_tensor(&format!("{part}.mid.attn_1"), &tap(attention), LIMIT);
    recorded.check_tensor(&format!("{part}.mid.block_2"), &tap("mid.block_2"), LIMIT);
}

fn check_decoder(recorded: &mut Recorded, config: &AudioVaeConfig, file: &TensorFile) {
    let latent = tokens(&recorded.input("dec.latent"));
    let (latents, features) = (latent.ty.shape[1], latent.ty.shape[2]);
    let first = Tensor::f32(&[1, 1, features], &latent.to_f32()[..features]);
    let one = run(decode(config, &weights(file), 1, DType::F32).unwrap(), first, file);
    recorded.check_tensor("dec_one.mel", &channels_first(&one.results["mel"]), LIMIT);

    let run = run(decode(config, &weights(file), latents, DType::F32).unwrap(), latent, file);
    let tap = |key: &str| channels_first(&run.taps[&format!("audio_vae.decoder.{key}")]);
    recorded.check_tensor("dec.conv_in", &tap("conv_in"), LIMIT);
    check_mid(recorded, "dec", config, &tap);
    for level in 0..config.levels() {
        for block in 0..=config.res_blocks {
            let found = tap(&format!("up.{level}.block.{block}"));
            recorded.check_tensor(&format!("dec.stage{level}.block{block}"), &found, LIMIT);
        }
        if level > 0 {
            recorded.check_tensor(&format!("dec.stage{level}.upsample"), &tap(&format!("up.{level}.upsample")), LIMIT);
        }
    }
    recorded.check_tensor("dec.conv_out", &tap("conv_out"), LIMIT);
    recorded.check_tensor("dec.mel", &channels_first(&run.results["mel"]), LIMIT);
}

#[track_caller]
fn check_vocoder(name: &str, checkpoint_name: &str) {
    let Some(file) = expected(name) else { return println!("{name}: absent") };
    let weights_file = checkpoint(checkpoint_name);
    let (vae, vocoder) = configs(&weights_file);
    let vocoder = vocoder.unwrap();
    let mut recorded = Recorded::new(file);
    assert_eq!(recorded.meta()["output_sampling_rate"], vocoder.output_rate_hz);

    let mel = channels_last(&recorded.input("mel"));
    let samples = vocoder.output_samples(mel.ty.shape[1]);
    let vocoded =
        run(vocode(&vocoder, &weights(&weights_file), mel.ty.shape[1], DType::F32).unwrap(), mel, &weights_file);
    let core = if vocoder.extension.is_some() { "vocoder.vocoder" } else { "vocoder" };
    let tap = |key: &str| channels_first(&vocoded.taps[key]);
    for outer in ["conv_pre", "conv_post"] {
        recorded.check_tensor(outer, &tap(&format!("{core}.{outer}")), LIMIT);
    }
    for stage in 0..vocoder.core.rates.len() {
        recorded.check_tensor(&format!("ups{stage}"), &tap(&format!("{core}.ups.{stage}")), LIMIT);
    }
    for block in 0..vocoder.core.rates.len() * vocoder.core.block_kernels.len() {
        recorded.check_tensor(&format!("resblock{block}"), &tap(&format!("{core}.resblocks.{block}")), LIMIT);
    }
    if let Some(extension) = &vocoder.extension {
        recorded.check_tensor("act_post", &tap("vocoder.vocoder.act_post"), LIMIT);
        let snake = "vocoder.vocoder.resblocks.0.acts1.0";
        recorded.check_tensor("inner.resblock0.act1.0", &tap(snake), LIMIT);
        recorded.check_tensor("inner.resblock0.act1.0.up", &tap(&format!("{snake}.upsample")), LIMIT);
        recorded.check_tensor("bwe.vocoder_waveform", &tap("vocoder.core_waveform"), LIMIT);
        let mel = permute(&vocoded.taps["vocoder.mel_stft"], &[0, 3, 2, 1]);
        recorded.check_tensor("bwe.mel", &mel, LIMIT);
        let filter = &vocoded.taps["vocoder.resampler.filter"];
        recorded.check_tensor(
            "bwe.resampler_filter",
            &Tensor::f32(&[1, 1, filter.ty.elements()], &filter.to_f32()),
            LIMIT,
        );
        recorded.check_tensor("bwe.skip", &tap("vocoder.resampler"), LIMIT);
        recorded.check_tensor("bwe.residual", &tap("vocoder.bwe_generator.waveform"), LIMIT);
        recorded.check_tensor("bwe.conv_pre", &tap("vocoder.bwe_generator.conv_pre"), LIMIT);
        for stage in 0..extension.generator.rates.len() {
            recorded.check_tensor(
                &format!("bwe.ups{stage}"),
                &tap(&format!("vocoder.bwe_generator.ups.{stage}")),
                LIMIT,
            );
        }
    }
    let waveform = &vocoded.results["waveform"];
    assert_eq!(waveform.ty, TensorType::f32([1, samples, 2]));
    recorded.check_tensor("waveform", &channels_first(waveform), LIMIT);

    let latent = tokens(&recorded.input("decode_audio.latent"));
    let module = decode_audio(&vae, &vocoder, &weights(&weights_file), latent.ty.shape[1], DType::F32).unwrap();
    let waveform = channels_first(&run(module, latent, &weights_file).results["waveform"]);
    let unbatched = Tensor::f32(&waveform.ty.shape[1..], &waveform.to_f32());
    recorded.check_tensor("decode_audio.waveform", &unbatched, LIMIT);
    recorded.finish();
}

/// The front end alone, and the encoder behind it.
fn check_mel(recorded: &mut Recorded, config: &AudioVaeConfig, file: &TensorFile) {
    let settings = MelSettings {
        rate_hz: config.sampling_rate_hz,
        n_fft: config.n_fft,
        hop_length: config.hop_length,
        mel_bins: config.mel_bins,
    };
    let frontend = MelFrontend::new(settings).unwrap();
    let filters = Tensor::f32(&[config.n_fft / 2 + 1, config.mel_bins], &frontend.filters());
    recorded.check_tensor("mel.filterbank", &filters, LIMIT);

    let rates: Vec<usize> = recorded.file.iter().filter_map(|(name, _)| rate_of_waveform(name)).collect();
    assert!(!rates.is_empty(), "no waveform was recorded");
    for rate_hz in rates {
        let waveform = recorded.input(&format!("mel.{rate_hz}.waveform"));
        let samples = waveform.ty.shape[2];
        let channels: Vec<Vec<f32>> = waveform.to_f32().chunks_exact(samples).map(<[f32]>::to_vec).collect();
        if rate_hz != settings.rate_hz {
            let resampled: Vec<f32> =
                channels.iter().flat_map(|c| resample(c, rate_hz, settings.rate_hz).unwrap()).collect();
            let shape = [1, channels.len(), resampled.len() / channels.len()];
            recorded.check_tensor(&format!("mel.{rate_hz}.resampled"), &Tensor::f32(&shape, &resampled), LIMIT);
        }
        let (frames, mel) = frontend.stereo_log_mel(&channels, rate_hz).unwrap();
        let mel = Tensor::f32(&[1, frames, config.mel_bins, 2], &mel);
        let is_clamped = mel.to_f32().iter().any(|&v| v < -11.0);
        let limit = if is_clamped { CLAMPED_LIMIT } else { LIMIT };
        recorded.check_tensor(&format!("mel.{rate_hz}.log_mel"), &channels_first(&mel), limit);
        let encoded = run(encode(config, &weights(file), frames, DType::F32).unwrap(), mel, file);
        recorded.check_tensor(&format!("mel.{rate_hz}.latent"), &untokens(&encoded.results["latent"], config), limit);
    }
}

fn rate_of_waveform(name: &str) -> Option<usize> {
    name.strip_prefix("mel.")?.strip_suffix(".waveform")?.parse().ok()
}

/// Deterministic values in −1..=1.
fn noise(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::f32(shape, &values)
}

/// Both halves of the VAE are causal: what a prefix gives is a prefix of what the whole gives. Attention is not causal,
/// so that models with it are only asked for shapes.
fn check_prefixes(file: &TensorFile) {
    let (config, _) = configs(file);
    let mut report = Report::default();
    let is_causal = !config.has_mid_attention && !config.level_attention.contains(&true);
    let mut check = |what: String, found: &Tensor, whole: &Tensor, rows: usize, columns: usize| {
        assert_eq!(found.ty.elements(), rows * columns, "{what}");
        if is_causal {
            report.check(&what, &found.to_f32(), &whole.to_f32()[..rows * columns], LIMIT);
        } else {
            report.note(found.floats().iter().all(|v| v.is_finite()), what);
        }
    };

    let features = config.token_channels();
    let row = config.mel_bins * config.in_channels;
    let mel = noise(&[1, 11, config.mel_bins, config.in_channels], 1);
    let encoded = |frames: usize| {
        let part = Tensor::f32(&[1, frames, config.mel_bins, config.in_channels], &mel.to_f32()[..frames * row]);
        run(encode(&config, &weights(file), frames, DType::F32).unwrap(), part, file).results["latent"].clone()
    };
    let whole = encoded(11);
    for frames in [1, 2, 3, 4, 5, 6, 9, 10] {
        check(format!("encode {frames} frames"), &encoded(frames), &whole, config.latent_frames(frames), features);
    }

    let latent = noise(&[1, 4, features], 2);
    let decoded = |latents: usize| {
        let part = Tensor::f32(&[1, latents, features], &latent.to_f32()[..latents * features]);
        run(decode(&config, &weights(file), latents, DType::F32).unwrap(), part, file).results["mel"].clone()
    };
    let row = config.mel_bins * config.out_channels;
    let whole = decoded(4);
    for latents in [1, 2, 3] {
        check(format!("decode {latents} latents"), &decoded(latents), &whole, config.mel_frames(latents), row);
    }
    report.finish();
}

/// The waveform has the promised length, and the resampled core in it is what the formula of the resampler says.
#[track_caller]
fn check_length(file: &TensorFile, config: &VocoderConfig, mel_bins: usize, frames: usize) {
    let mel = noise(&[1, frames, mel_bins, 2], 3);
    let run = run(vocode(config, &weights(file), frames, DType::F32).unwrap(), mel, file);
    let waveform = &run.results["waveform"];
    assert_eq!(waveform.ty.shape, [1, config.output_samples(frames), 2]);
    assert!(waveform.floats().iter().all(|v| v.abs() <= 1.0));
    let Some(extension) = &config.extension else { return };

    let (core, filter) = (&run.taps["vocoder.core_waveform"], run.taps["vocoder.resampler.filter"].floats());
    let (samples, ratio) = (core.ty.shape[1], extension.ratio);
    let padded = samples.next_multiple_of(extension.hop_length);
    let width = filter.len() / (2 * ratio);
    let skip: Vec<f32> = (0..padded * ratio * 2)
        .map(|flat| {
            let (at, channel) = (flat / 2 + 2 * width * ratio, flat % 2);
            let tap = |i: usize| {
                let k = at.checked_sub(i * ratio).filter(|&k| k < filter.len())?;
                let sample = i.saturating_sub(width).min(padded - 1);
                let value = if sample < samples { core.floats()[sample * 2 + channel] } else { 0.0 };
                Some(value * filter[k])
            };
            (ratio as f64 * (0..padded + 2 * width).filter_map(tap).sum::<f64>()) as f32
        })
        .collect();
    let mut report = Report::default();
    report.check("skip", &run.taps["vocoder.resampler"].to_f32(), &skip, 1e-6);
    report.finish();
}
