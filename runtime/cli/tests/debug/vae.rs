//! `ltxc debug vae`: the faults that decoders, encoders and upsamplers of ports have.

use std::path::{Path, PathBuf};

use half::bf16;
use ltxc_runtime::noise_files::{Stored, read, write, write_all};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::binary::{Done, Place};
use crate::faults::{swap_rows, with_tensor};
use crate::root;

fn vae(place: &Place, command: &str, checkpoint: &Path, more: &[&str]) -> Done {
    let checkpoint = checkpoint.display().to_string();
    place.run(&[&["debug", "vae", command, "--json", "--checkpoint-path", &checkpoint], more].concat())
}

/// A command that must fail with one sentence.
#[track_caller]
fn refused(place: &Place, command: &str, checkpoint: &Path, more: &[&str], words: &[&str]) {
    let checkpoint = checkpoint.display().to_string();
    place.refused(&[&["debug", "vae", command, "--checkpoint-path", &checkpoint], more].concat(), words);
}

#[track_caller]
fn facts(done: &Done) -> Value {
    let last = done.stdout.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {}{}", done.stdout, done.stderr))
}

/// The LTX-2 of the fixtures.
fn ltx2() -> PathBuf {
    root().join("tiny-ltx2/ltx-2-tiny.safetensors")
}

/// A VAE whose decoder takes a timestep and adds noise.
fn conditioned() -> PathBuf {
    root().join("tiny-ltx2/vae-alt-tiny.safetensors")
}

fn recorded(name: &str) -> String {
    root().join("expected/ltx2").join(name).display().to_string()
}

/// Keys of a file that contain `part`.
fn keys(file: &Path, part: &str) -> Vec<String> {
    let bytes = std::fs::read(file).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    header.tensors().into_keys().filter(|k| k.contains(part)).collect()
}

/// A copy of a file in which all tensors whose keys contain `part` are changed.
fn with_all(place: &Place, source: &Path, part: &str, change: impl Fn(&mut [u8])) -> PathBuf {
    let mut file = source.to_path_buf();
    for key in keys(source, part) {
        file = with_tensor(place, &file, &key, &change);
    }
    file
}

fn fill(value: f32) -> impl Fn(&mut [u8]) {
    move |bytes| bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|v| *v = bf16::from_f32(value).to_le_bytes())
}

#[test]
fn a_decoder_that_ignores_its_timestep_is_found() {
    let place = Place::new();
    let file = recorded("video_vae_alt.safetensors");
    let decode = |checkpoint: &Path, timestep: &str| {
        let args = [
            "--latent",
            &file,
            "--tensor",
            "dec.latent",
            "--noise",
            &file,
            "--timestep",
            timestep,
            "--compare",
            &file,
            "--limit",
            "1e-5",
        ];
        vae(&place, "decode", checkpoint, &args)
    };
    let done = decode(&conditioned(), "0.05");
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    // Another timestep, and none, give other frames.
    assert_eq!((decode(&conditioned(), "0.5").code, decode(&conditioned(), "none").code), (Some(1), Some(1)));
    let timestep = |checkpoint: &Path| vae(&place, "timestep", checkpoint, &["--grid", "1,2,2"]);
    let done = timestep(&conditioned());
    let right = facts(&done);
    assert_eq!(done.code, Some(0), "{right}");
    let rows = right["weights"].to_string();
    for name in ["last_scale_shift_table scale", "scale_shift_table shift 2", "timestep_scale_multiplier"] {
        assert!(rows.contains(name), "{rows}");
    }
    assert!(right["effects"][3]["relative_l2"].as_f64() > Some(1e-3), "{right}");
    // Embedders that were not loaded.
    let faulty = with_all(&place, &conditioned(), "timestep_embedder.linear_2", fill(0.0));
    let done = timestep(&faulty);
    let found = facts(&done);
    let problems = found["problems"].to_string();
    assert!(done.code == Some(1) && problems.contains("ignores it") && problems.contains("all zeros"), "{found}");
    assert_eq!(decode(&faulty, "0.05").code, Some(1));
    // A decoder that takes none.
    assert_eq!(facts(&vae(&place, "timestep", &ltx2(), &[]))["takes_timestep"], false);
    refused(&place, "decode", &ltx2(), &["--timestep", "0.05"], &["takes no timestep"]);
}

#[test]
fn swapped_rows_of_a_decoder_show_in_their_block() {
    let place = Place::new();
    let trace =
        |checkpoint: &Path, more: &[&str]| vae(&place, "trace", checkpoint, &[&["--grid", "1,2,2"], more].concat());
    place.write("right.jsonl", trace(&conditioned(), &[]).stdout.as_bytes());
    let key = "vae.decoder.up_blocks.5.res_blocks.0.scale_shift_table";
    let faulty = with_tensor(&place, &conditioned(), key, |bytes| swap_rows(bytes, 4, 0, 1));
    let done = trace(&faulty, &["--compare", "right.jsonl"]);
    assert_eq!(
        (done.code, facts(&done)["first_different"].as_str()),
        (Some(1), Some("up_blocks.5")),
        "{}",
        done.stdout
    );
    assert_eq!(trace(&conditioned(), &["--compare", "right.jsonl"]).code, Some(0));
    place.write("junk.jsonl", b"{}\n");
    refused(
        &place,
        "trace",
        &conditioned(),
        &["--grid", "1,2,2", "--compare", "junk.jsonl"],
        &["junk.jsonl", "no line"],
    );
}

#[test]
fn decoded_and_encoded_tensors_are_compared_with_recorded_ones() {
    let place = Place::new();
    let file = recorded("video_vae.safetensors");
    let decode = |checkpoint: &Path| {
        vae(
            &place,
            "decode",
            checkpoint,
            &["--latent", &file, "--tensor", "dec.latent", "--compare", &file, "--limit", "1e-5"],
        )
    };
    let encode = |checkpoint: &Path| {
        vae(
            &place,
            "encode",
            checkpoint,
            &[&file, "--tensor", "enc.input_uint8", "--compare", &file, "--limit", "1e-5"],
        )
    };
    let (decoded, encoded) = (decode(&ltx2()), encode(&ltx2()));
    assert_eq!(decoded.code, Some(0), "{}{}", decoded.stdout, decoded.stderr);
    assert_eq!(encoded.code, Some(0), "{}{}", encoded.stdout, encoded.stderr);
    assert_eq!(facts(&encoded)["channel_std"].as_array().unwrap().len(), 4);
    // Statistics that do nothing: neither half normalises.
    let faulty = with_all(&place, &ltx2(), "vae.per_channel_statistics.std-of-means", fill(1.0));
    assert_eq!((decode(&faulty).code, encode(&faulty).code), (Some(1), Some(1)));
    // Of a latent that is not thinned, any format can be compared with.
    let latent = read(Path::new(&file)).unwrap().into_iter().find(|t| t.name == "enc.latent").unwrap();
    write(&place.path("latent.npy"), &Stored { name: String::new(), ..latent }).unwrap();
    let done = vae(&place, "encode", &ltx2(), &[&file, "--tensor", "enc.input_uint8", "--compare", "latent.npy"]);
    assert_eq!(done.code, Some(0), "{}", done.stdout);
}

#[test]
fn an_upsampler_without_its_wrapper_is_found() {
    let place = Place::new();
    let upsampler = root().join("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors").display().to_string();
    let file = recorded("upsamplers.safetensors");
    let upscale = |checkpoint: &Path, more: &[&str]| {
        let args =
            ["--spatial-upsampler-path", &upsampler, "--latent", &file, "--tensor", "spatial-upscaler-x2.latent"];
        vae(&place, "upscale", checkpoint, &[&args[..], more].concat())
    };
    let compare = ["--compare", &file, "--compare-tensor", "spatial-upscaler-x2.normalized_output", "--limit", "1e-5"];
    let done = upscale(&ltx2(), &compare);
    let right = facts(&done);
    assert_eq!(done.code, Some(0), "{right}{}", done.stderr);
    let names: Vec<&str> = right["latents"].as_array().unwrap().iter().map(|l| l["latent"].as_str().unwrap()).collect();
    assert_eq!(names, ["input", "network", "network without wrapper", "nearest", "bilinear"]);
    assert!(right["blocks"].to_string().contains("res_blocks.0"), "{right}");
    assert!(right["wrapper_effect"].as_f64() > Some(0.01), "{right}");
    // Without the wrapper the recorded output of the bare network is reached: the same network, other scale.
    let identity = with_all(&place, &ltx2(), "per_channel_statistics.std-of-means", fill(1.0));
    let identity = with_all(&place, &identity, "per_channel_statistics.mean-of-means", fill(0.0));
    let done = upscale(&identity, &compare);
    let found = facts(&done);
    assert!(done.code == Some(1) && found["flags"].to_string().contains("wrapper does nothing"), "{found}");
    // Plain enlargements are no network, and can be written for the decoder.
    let done = upscale(&ltx2(), &["--mode", "bilinear", "-o", "big.safetensors"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let done = vae(&place, "decode", &ltx2(), &["--latent", "big.safetensors"]);
    assert_eq!(facts(&done)["shape"], serde_json::json!([1, 17, 192, 256, 3]), "{}", done.stderr);
}

#[test]
fn sound_is_measured_by_second_and_compared() {
    let place = Place::new();
    let file = recorded("vocoder.safetensors");
    let audio = |checkpoint: &Path, more: &[&str]| vae(&place, "audio", checkpoint, more);
    let latent = ["--latent", &file, "--tensor", "decode_audio.latent"];
    let wave = ["--compare", &file, "--compare-tensor", "decode_audio.waveform", "--limit", "1e-4"];
    let done = audio(&ltx2(), &[&latent[..], &wave].concat());
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    let mel = ["--mel", &file, "--tensor", "mel", "--compare", &file, "--limit", "1e-4"];
    let done = audio(&ltx2(), &mel);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    let recorded_vae = recorded("audio_vae.safetensors");
    let spectrogram = [
        "--latent",
        &recorded_vae,
        "--tensor",
        "dec.latent",
        "--compare",
        &recorded_vae,
        "--compare-tensor",
        "dec.mel",
    ];
    assert_eq!(audio(&ltx2(), &spectrogram).code, Some(0));
    let done = audio(&ltx2(), &["--seconds", "1.5"]);
    let found = facts(&done);
    assert_eq!((done.code, found["seconds"].as_array().unwrap().len()), (Some(0), 2), "{found}");
    assert!(found["twice_as_long"].as_f64().is_some_and(|f| (0.8..1.25).contains(&f)), "{found}");
    // A vocoder whose last layer was not loaded is silent; one that is twice as loud differs.
    let silent = with_all(&place, &ltx2(), "vocoder.conv_post", fill(0.0));
    let done = audio(&silent, &[]);
    assert!(done.code == Some(1) && facts(&done)["flags"].to_string().contains("silence"), "{}", done.stdout);
    assert_eq!(audio(&silent, &mel).code, Some(1));
}

#[test]
fn tiles_are_compared_with_the_whole() {
    let place = Place::new();
    let tiles = |tile: &str| {
        let args = ["--latent", "random", "--grid", "2,4,4", "--vae-tile", tile, "--map", "map.png"];
        vae(&place, "tiles", &ltx2(), &args)
    };
    let done = tiles("64x32,16x8");
    let found = facts(&done);
    assert!(found["tiles"].as_u64() > Some(3) && found["frames"] == 9, "{found}{}", done.stderr);
    assert!(found["max_abs"].as_f64() > Some(0.0) && !found["seams"].as_array().unwrap().is_empty(), "{found}");
    assert!(place.read("map.png").starts_with(b"\x89PNG"));
    // Without overlap tiles see less of their neighbours.
    let without = facts(&tiles("64x0,16x8"));
    assert!(without["mean_abs"].as_f64() > found["mean_abs"].as_f64(), "{without} {found}");
    refused(&place, "tiles", &ltx2(), &["--grid", "2,4,4", "--vae-tile", "512x64,64x24"], &["one tile"]);
}

#[test]
fn normalising_is_undone_and_absent_statistics_are_told() {
    let place = Place::new();
    let done = vae(&place, "norm", &ltx2(), &[]);
    let found = facts(&done);
    assert!(done.code == Some(0) && found["patches"] == 0.0 && found["does_nothing"] == false, "{found}");
    let faulty = with_all(&place, &ltx2(), "vae.per_channel_statistics.std-of-means", fill(0.0));
    assert_eq!(vae(&place, "norm", &faulty, &[]).code, Some(1));
    // An image through both halves; random weights keep nothing of it.
    let image = root().join("inputs/image0.png").display().to_string();
    let done = vae(&place, "roundtrip", &ltx2(), &[&image, "-H", "64", "-W", "64", "--least-psnr", "0"]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    let latents = read(Path::new(&recorded("video_vae.safetensors"))).unwrap();
    let latent = latents.into_iter().find(|t| t.name == "dec.latent").unwrap();
    write_all(&place.path("latent.pt"), &[latent]).unwrap();
    assert_eq!(vae(&place, "decode", &ltx2(), &["--latent", "latent.pt"]).code, Some(0));
}
