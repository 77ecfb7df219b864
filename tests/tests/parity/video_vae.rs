//! Convolutional video VAE: every recorded tensor of encoder, decoder and their tiled forms.
//!
//! Recorded videos are (B, C, F, H, W), ours `[b, f, h, w, c]`. Limit everywhere: relative L2 of 1e-5, tiles and masks
//! exact; uint8 frames differ by at most 1 in at most 2 % of the values (README of the fixtures, "Tolerances").

mod tiling;

use std::collections::BTreeMap;

use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::verify::verify;
use ltxc_ir::{DType, Module, TensorType};
use ltxc_models::video_vae::{self, DECODE_TIMESTEP, VideoVaeConfig};
use ltxc_models::{TensorDirectory, Weights};
use ltxc_tests::fixtures::{TensorFile, expected, root};
use ltxc_tests::harness::{Run, evaluate};
use ltxc_tests::recorded::{ByteLimit, Recorded};

const LIMIT: f64 = 1e-5;

/// Frames as bytes: largest difference, and share of values that differ.
const BYTE_LIMIT: ByteLimit = (1, 0.02);

/// Compares `[1, f, h, w, c]` with what is recorded as `name`, (1, c, f, h, w) or (f, c, h, w).
#[track_caller]
pub fn check_video(recorded: &mut Recorded, name: &str, found: &Tensor) {
    let sampled = recorded.meta()["sampled"][name]["shape"].as_array().map(Vec::len);
    let rank = recorded.file.find(name).map(|t| t.ty.rank()).or(sampled).expect("a video is recorded with its shape");
    recorded.check(name, &channels_first(found, rank), LIMIT);
}

/// Compares frames `[1, F, H, W, 3]` with recorded bytes (F, H, W, 3).
#[track_caller]
fn check_frames(recorded: &mut Recorded, name: &str, frames: &Tensor) {
    let byte = |x: &f64| (((*x as f32 + 1.0) * 0.5).clamp(0.0, 1.0) * 255.0) as i64;
    let bytes: Vec<i64> = frames.floats().iter().map(byte).collect();
    recorded.check_bytes(name, &bytes, BYTE_LIMIT);
}

/// Elements of `[1, f, h, w, c]` in the order of (1, c, f, h, w), or of (f, c, h, w) if the recorded rank is 4.
pub fn channels_first(x: &Tensor, rank: usize) -> Vec<f32> {
    let [_, f, h, w, c] = x.ty.shape[..] else { panic!("{} is not a video", x.ty) };
    let (values, plane) = (x.to_f32(), h * w);
    let at = |f: usize, p: usize, c_at: usize| values[(f * plane + p) * c + c_at];
    let mut out = Vec::with_capacity(values.len());
    if rank == 4 {
        (0..f).for_each(|i| (0..c).for_each(|k| out.extend((0..plane).map(|p| at(i, p, k)))));
    } else {
        (0..c).for_each(|k| (0..f).for_each(|i| out.extend((0..plane).map(|p| at(i, p, k)))));
    }
    out
}

/// A recorded (1, c, f, h, w) as f32 `[1, f, h, w, c]`; bytes become `v / 127.5 − 1`.
pub fn channels_last(x: &Tensor) -> Tensor {
    let [_, c, f, h, w] = x.ty.shape[..] else { panic!("{} is not a recorded video", x.ty) };
    let values: Vec<f32> = match &x.data {
        Data::Float(v) => v.iter().map(|&v| v as f32).collect(),
        Data::Int(v) => v.iter().map(|&v| v as f32 / 127.5 - 1.0).collect(),
    };
    let plane = f * h * w;
    let out: Vec<f32> =
        (0..plane).flat_map(|p| (0..c).map(move |k| (p, k))).map(|(p, k)| values[k * plane + p]).collect();
    Tensor::f32(&[1, f, h, w, c], &out)
}

/// Frames `range` of `[1, f, ...]`.
fn frames(x: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let mut shape = x.ty.shape.clone();
    let each: usize = shape[2..].iter().product();
    shape[1] = range.len();
    Tensor::f32(&shape, &x.to_f32()[range.start * each..range.end * each])
}

/// A checkpoint with the config of its video VAE.
pub struct Checkpoint {
    pub file: TensorFile,
    pub config: VideoVaeConfig,
}

impl Checkpoint {
    #[track_caller]
    pub fn read(path: &str) -> Checkpoint {
        let file = TensorFile::read(&root().join(path));
        let config = VideoVaeConfig::from_json(&file.config()["vae"]).unwrap_or_else(|e| panic!("{path}: {e}"));
        Checkpoint { file, config }
    }

    pub fn weights(&self) -> Weights<'_> {
        Weights::new("model", &self.file)
    }

    #[track_caller]
    fn encoder(&self, pixels: [usize; 3]) -> Module {
        checked(video_vae::encode(&self.config, &self.weights(), pixels, DType::F32).unwrap_or_else(|e| panic!("{e}")))
    }

    #[track_caller]
    fn decoder(&self, grid: [usize; 3]) -> Module {
        checked(video_vae::decode(&self.config, &self.weights(), grid, DType::F32).unwrap_or_else(|e| panic!("{e}")))
    }

    #[track_caller]
    fn encode(&self, frames: &Tensor) -> Run {
        evaluate(&self.encoder(grid_of(frames)), "encode", std::slice::from_ref(frames), &[("model", &self.file)])
    }

    #[track_caller]
    fn decode(&self, args: &[Tensor]) -> Run {
        evaluate(&self.decoder(grid_of(&args[0])), "decode", args, &[("model", &self.file)])
    }
}

/// Frames, rows and columns of `[1, f, h, w, c]`.
pub fn grid_of(x: &Tensor) -> [usize; 3] {
    [x.ty.shape[1], x.ty.shape[2], x.ty.shape[3]]
}

#[track_caller]
pub fn checked(module: Module) -> Module {
    verify(&module).unwrap_or_else(|e| panic!("{e}"));
    module
}

/// Compares the named values of a run: `enc.down3` is `vae.encoder.down_blocks.3`.
fn check_inner(recorded: &mut Recorded, run: &Run, half: &str, module: &str, blocks: (&str, &str)) {
    for (tap, value) in &run.taps {
        let Some(name) = tap.strip_prefix(&format!("vae.{module}.")) else { continue };
        let recorded_name = match name.strip_prefix(&format!("{}.", blocks.1)) {
            Some(index) if index.contains('.') => continue,
            Some(index) => format!("{half}.{}{index}", blocks.0),
            None if name == "conv_in" || name == "conv_out" => format!("{half}.{name}"),
            None => continue,
        };
        check_video(recorded, &recorded_name, value);
    }
}

fn check_encoder(recorded: &mut Recorded, vae: &Checkpoint) {
    let video = channels_last(&recorded.input("enc.input_uint8"));
    let run = vae.encode(&video);
    check_inner(recorded, &run, "enc", "encoder", ("down", "down_blocks"));
    check_video(recorded, "enc.latent", &run.results["latent"]);
    check_video(recorded, "enc_image.latent", &vae.encode(&frames(&video, 0..1)).results["latent"]);
    if recorded.has("enc_cropped.latent") {
        // Nine frames and the last three again; longer recordings are cropped as they are.
        let f = video.ty.shape[1];
        let longer = if f == 9 { concat_frames(&video, &frames(&video, f - 3..f)) } else { video.clone() };
        check_video(recorded, "enc_cropped.latent", &vae.encode(&longer).results["latent"]);
    }
}

fn concat_frames(a: &Tensor, b: &Tensor) -> Tensor {
    let mut shape = a.ty.shape.clone();
    shape[1] += b.ty.shape[1];
    Tensor::f32(&shape, &[a.to_f32(), b.to_f32()].concat())
}

fn check_decoder(recorded: &mut Recorded, vae: &Checkpoint) {
    let latent = channels_last(&recorded.input("dec.latent"));
    let run = vae.decode(std::slice::from_ref(&latent));
    check_inner(recorded, &run, "dec", "decoder", ("up", "up_blocks"));
    check_video(recorded, "dec.output", &run.results["frames"]);
    check_frames(recorded, "dec.uint8", &run.results["frames"]);
    let one = channels_last(&recorded.input("dec_one.latent"));
    check_video(recorded, "dec_one.output", &vae.decode(&[one]).results["frames"]);
}

/// A whole file `<model>/video_vae`.
fn check_file(name: &str, checkpoint: &str) {
    let (mut recorded, vae) = (Recorded::required(name), Checkpoint::read(checkpoint));
    check_encoder(&mut recorded, &vae);
    check_decoder(&mut recorded, &vae);
    if recorded.has("tiled.latent") {
        tiling::check_tiled_decodes(&mut recorded, &vae);
    }
    if recorded.has("tiled_encode.input_uint8") {
        let video = channels_last(&recorded.input("tiled_encode.input_uint8"));
        check_video(&mut recorded, "tiled_encode.full_latent", &vae.encode(&video).results["latent"]);
        recorded.skip(&["tiled_encode.latent"], "release 1.0.0; `video_vae_tiling` replaces it");
    }
    recorded.finish();
}

#[test]
fn ltx2_video_vae() {
    check_file("ltx2/video_vae", "tiny-ltx2/ltx-2-tiny.safetensors");
}

#[test]
fn ltx23_video_vae() {
    check_file("ltx23/video_vae", "tiny-ltx23/ltx-2.3-tiny.safetensors");
}

#[test]
fn ltx25_conv_video_vae() {
    let name = "ltx25/video_vae_conv";
    if expected(name).is_none() {
        println!("{name}: absent");
        return;
    }
    check_file(name, "tiny-ltx25/vae/ltx-2.5-tiny-video-vae-conv-bf16.safetensors");
}

/// Every block that released models do not have, with a timestep and injected noise.
#[test]
fn ltx2_video_vae_alt() {
    let vae = Checkpoint::read("tiny-ltx2/vae-alt-tiny.safetensors");
    let mut recorded = Recorded::required("ltx2/video_vae_alt");
    check_encoder(&mut recorded, &vae);

    let latent = channels_last(&recorded.input("dec.latent"));
    let noise = channels_last(&recorded.input("dec.noise0"));
    let planes = video_vae::noise_planes(&vae.config, [latent.ty.shape[2], latent.ty.shape[3]]);
    let planes: Vec<Tensor> = (1..=planes.len()).map(|i| recorded.input(&format!("dec.noise{i}"))).collect();
    let args = |timestep: f32| {
        let mut args = vec![latent.clone(), noise.clone(), Tensor::f32(&[1], &[timestep])];
        args.extend(planes.iter().cloned());
        args
    };
    let timesteps = recorded.meta()["timestep_conditioning"].clone();
    let timestep = |key: &str| timesteps[key].as_f64().expect("it is recorded") as f32;
    let (default, other) = (timestep("decode_timestep_default"), timestep("dec_t0"));
    assert_eq!(default, DECODE_TIMESTEP);
    let run = vae.decode(&args(default));
    check_inner(&mut recorded, &run, "dec", "decoder", ("up", "up_blocks"));
    check_video(&mut recorded, "dec.output", &run.results["frames"]);
    check_frames(&mut recorded, "dec.uint8", &run.results["frames"]);
    check_video(&mut recorded, "dec_t0.output", &vae.decode(&args(other)).results["frames"]);
    recorded.finish();
}

/// The same values stored as f32 give the same frames.
#[test]
fn f32_weights_give_the_same_frames() {
    const TWIN: &str = "tiny-ltx2/ltx-2-tiny-f32.safetensors";
    if !root().join(TWIN).exists() {
        return println!("absent: {TWIN}");
    }
    let (mut recorded, vae) = (Recorded::required("ltx2/video_vae"), Checkpoint::read(TWIN));
    let latent = channels_last(&recorded.input("dec.latent"));
    check_video(&mut recorded, "dec.output", &vae.decode(&[latent]).results["frames"]);
    recorded.finish_part();
}

/// Values without structure, from a written seed.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    };
    let n: usize = shape.iter().product();
    Tensor::f32(shape, &(0..n).map(|_| next()).collect::<Vec<_>>())
}

#[test]
fn odd_extents_decode_and_encode_back_to_the_grid() {
    for path in ["tiny-ltx2/ltx-2-tiny.safetensors", "tiny-ltx23/ltx-2.3-tiny.safetensors"] {
        let vae = Checkpoint::read(path);
        let [time, rows, columns] = vae.config.factors();
        for (seed, grid) in [[2, 3, 5], [1, 2, 3], [3, 5, 2]].into_iter().enumerate() {
            let [f, h, w] = grid;
            let latent = random(&[1, f, h, w, vae.config.latent_channels], seed as u64);
            let frames = vae.decode(std::slice::from_ref(&latent)).results.remove("frames").expect("a result");
            assert_eq!(frames.ty.shape, [1, time * (f - 1) + 1, rows * h, columns * w, 3], "{path} {grid:?}");
            assert!(frames.floats().iter().all(|v| v.is_finite()), "{path} {grid:?}");
            let back = vae.encode(&frames).results.remove("latent").expect("a result");
            assert_eq!(back.ty, latent.ty, "{path} {grid:?}");
            assert!(back.floats().iter().all(|v| v.is_finite()), "{path} {grid:?}");
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let vae = Checkpoint::read("tiny-ltx2/ltx-2-tiny.safetensors");
    let w = vae.weights();
    let refused = |r: Result<Module, ltxc_models::ModelError>| r.expect_err("it does not fit").to_string();
    let error = refused(video_vae::encode(&vae.config, &w, [9, 40, 64], DType::F32));
    assert!(error.contains("multiples of 32×32"), "{error}");
    assert!(refused(video_vae::encode(&vae.config, &w, [0, 64, 64], DType::F32)).contains("0 frames"));
    assert!(refused(video_vae::decode(&vae.config, &w, [1, 0, 1], DType::F32)).contains("1×0×1"));
    assert!(refused(video_vae::decode(&vae.config, &w, [usize::MAX; 3], DType::F32)).contains("cannot be decoded"));
    // Reflection needs two rows; the fixture's decoder reflects.
    assert!(refused(video_vae::decode(&vae.config, &w, [1, 1, 2], DType::F32)).contains("Reflect"));
}

#[test]
fn half_precision_graphs_are_well_typed() {
    for path in ["tiny-ltx2/vae-alt-tiny.safetensors", "tiny-ltx23/ltx-2.3-tiny.safetensors"] {
        let vae = Checkpoint::read(path);
        let decode = video_vae::decode(&vae.config, &vae.weights(), [2, 2, 3], DType::BF16).expect("it fits");
        let encode = video_vae::encode(&vae.config, &vae.weights(), [9, 64, 96], DType::BF16).expect("it fits");
        for module in [checked(decode), checked(encode)] {
            let entry = module.function(&module.entries[0]).expect("an entry");
            let [result] = &entry.result_types()[..] else { panic!("one result") };
            assert_eq!(result.dtype, DType::F32);
            let block = module.function("res_block").expect("residual blocks are functions");
            assert_eq!(block.result_types()[0].dtype, DType::BF16);
        }
    }
}

/// A file whose tensors are listed here.
struct Listed(BTreeMap<String, TensorType>);

impl TensorDirectory for Listed {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.0.get(key).cloned()
    }
}

#[test]
fn equal_blocks_share_a_function_and_others_do_not() {
    let vae = Checkpoint::read("tiny-ltx23/ltx-2.3-tiny.safetensors");
    let names = |module: &Module| module.functions.len();
    let mut types: BTreeMap<String, TensorType> = vae.file.iter().map(|(k, t)| (k.into(), t.ty.clone())).collect();
    let count = |types: &BTreeMap<String, TensorType>| {
        let listed = Listed(types.clone());
        names(&video_vae::decode(&vae.config, &Weights::new("model", &listed), [1, 2, 2], DType::F32).expect("it fits"))
    };
    let blocks =
        vae.file.iter().filter(|(k, _)| k.starts_with("vae.decoder.") && k.ends_with("conv1.conv.bias")).count();
    let shared = count(&types);
    assert!(shared < blocks + 1, "{shared} functions for {blocks} blocks");
    // A stack of two is one function; with one weight stored in another dtype it is two.
    let second = types.keys().find(|k| k.contains("decoder") && k.ends_with("res_blocks.1.conv1.conv.bias"));
    let Some(second) = second.cloned() else {
        return println!("absent: no decoder block of these fixtures is a stack");
    };
    types.get_mut(&second).expect("it was just found").dtype = DType::F32;
    assert_eq!(count(&types), shared + 1);
}
