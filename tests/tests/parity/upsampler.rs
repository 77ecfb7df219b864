//! Latent upsamplers: every recorded tensor. Limit: relative L2 of 1e-5.

use std::collections::BTreeMap;

use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::{DType, Module, TensorType};
use ltxc_models::upsampler::{UpsamplerConfig, upsample};
use ltxc_models::{ModelError, TensorDirectory, Weights};
use ltxc_tests::fixtures::{TensorFile, expected, required, root};
use ltxc_tests::harness::evaluate;
use ltxc_tests::recorded::Recorded;

use super::video_vae::{Checkpoint, channels_last, check_video, checked, grid_of, random};

/// An upsampler's file with its config.
pub struct Upsampler {
    pub file: TensorFile,
    config: UpsamplerConfig,
}

impl Upsampler {
    #[track_caller]
    pub fn read(path: &str) -> Upsampler {
        let file = TensorFile::read(&root().join(path));
        let config = UpsamplerConfig::from_json(&file.config()).unwrap_or_else(|e| panic!("{path}: {e}"));
        Upsampler { file, config }
    }

    pub fn module(&self, vae: &Checkpoint, grid: [usize; 3], dtype: DType) -> Result<Module, ModelError> {
        let (own, model) = (Weights::new("upsampler", &self.file), Weights::new("model", &vae.file));
        upsample(&self.config, &own, &model, grid, dtype).map(checked)
    }
}

/// Every upsampler of one recorded file; `path` gives the file of a name.
fn check_file(file: TensorFile, vae: &Checkpoint, path: impl Fn(&str) -> String) {
    let mut recorded = Recorded::new(file);
    let names: Vec<String> =
        recorded.file.iter().filter_map(|(k, _)| k.strip_suffix(".latent")).map(Into::into).collect();
    for name in &names {
        let up = Upsampler::read(&path(name));
        let latent = channels_last(&recorded.input(&format!("{name}.latent")));
        let module = up.module(vae, grid_of(&latent), DType::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
        let run =
            |latent: Tensor| evaluate(&module, "upsample", &[latent], &[("upsampler", &up.file), ("model", &vae.file)]);
        let normalised = &run(latent.clone()).results["latent"];
        assert_eq!(grid_of(normalised), up.config.output_grid(grid_of(&latent)), "{name}");
        check_video(&mut recorded, &format!("{name}.normalized_output"), normalised);

        // Everything else is recorded of the network alone, on the latent as it stands.
        for (tap, value) in &run(normalise(vae, &latent)).taps {
            let Some(tap) = tap.strip_prefix("upsampler.") else { continue };
            let recorded_name = match (tap.strip_prefix("res_blocks."), tap.strip_prefix("post_upsample_res_blocks.")) {
                (Some(i), _) => format!("{name}.res{i}"),
                (_, Some(i)) => format!("{name}.post{i}"),
                _ => format!("{name}.{tap}"),
            };
            if recorded.has(&recorded_name) {
                check_video(&mut recorded, &recorded_name, value);
            }
            if tap == "final_conv" {
                check_video(&mut recorded, &format!("{name}.output"), value);
            }
        }
    }
    recorded.finish();
}

/// `(x − mean) / std` with the statistics of the VAE, which the entry undoes.
fn normalise(vae: &Checkpoint, x: &Tensor) -> Tensor {
    let statistics = |key: &str| {
        let key = format!("per_channel_statistics.{key}");
        let found = vae.file.find(&key).or_else(|| vae.file.find(&format!("vae.{key}")));
        found.expect("a VAE has statistics").floats()
    };
    let (mean, std) = (statistics("mean-of-means"), statistics("std-of-means"));
    let channel = |i: usize| i % mean.len();
    let values = x.floats().iter().enumerate().map(|(i, v)| (v - mean[channel(i)]) / std[channel(i)]);
    Tensor::f32(&x.ty.shape, &values.map(|v| v as f32).collect::<Vec<_>>())
}

#[test]
fn ltx2_upsamplers() {
    let vae = Checkpoint::read("tiny-ltx2/ltx-2-tiny.safetensors");
    check_file(required("ltx2/upsamplers"), &vae, |name| format!("tiny-ltx2/{name}-tiny.safetensors"));
}

#[test]
fn ltx23_upsamplers() {
    let vae = Checkpoint::read("tiny-ltx23/ltx-2.3-tiny.safetensors");
    check_file(required("ltx23/upsamplers"), &vae, |name| format!("tiny-ltx23/{name}-tiny.safetensors"));
}

#[test]
fn ltx25_upsamplers() {
    let Some(file) = expected("ltx25/upsamplers") else {
        println!("ltx25/upsamplers: absent");
        return;
    };
    let vae = Checkpoint::read("tiny-ltx25/vae/ltx-2.5-tiny-video-vae-conv-bf16.safetensors");
    check_file(file, &vae, |name| {
        format!("tiny-ltx25/latent_upscale_models/ltx-2.5-tiny-latent-{name}-bf16.safetensors")
    });
}

#[test]
fn odd_extents_give_the_announced_grid() {
    let [ltx2, ltx23] = ["tiny-ltx2/ltx-2-tiny", "tiny-ltx23/ltx-2.3-tiny"]
        .map(|name| Checkpoint::read(&format!("{name}.safetensors")));
    for (path, grid, want) in [
        ("tiny-ltx23/spatial-upscaler-x1.5-ltx23-tiny.safetensors", [2, 3, 5], [2, 5, 8]),
        ("tiny-ltx23/spatial-upscaler-x2-ltx23-tiny.safetensors", [1, 1, 3], [1, 2, 6]),
        ("tiny-ltx2/temporal-upscaler-x2-tiny.safetensors", [1, 3, 2], [1, 3, 2]),
        ("tiny-ltx2/temporal-upscaler-x2-tiny.safetensors", [4, 1, 2], [7, 1, 2]),
        ("tiny-ltx2/spatial-upscaler-x2-dims2-tiny.safetensors", [3, 1, 1], [3, 2, 2]),
    ] {
        let (up, vae) = (Upsampler::read(path), if path.starts_with("tiny-ltx23/") { &ltx23 } else { &ltx2 });
        let c = up.config.in_channels;
        let module = up.module(vae, grid, DType::F32).unwrap_or_else(|e| panic!("{path}: {e}"));
        let latent = random(&[1, grid[0], grid[1], grid[2], c], 7);
        let run = evaluate(&module, "upsample", &[latent], &[("upsampler", &up.file), ("model", &vae.file)]);
        let y = &run.results["latent"];
        assert_eq!(y.ty.shape, [1, want[0], want[1], want[2], c], "{path} {grid:?}");
        assert!(y.floats().iter().all(|v| v.is_finite()), "{path} {grid:?}");
        assert!(up.module(vae, grid, DType::BF16).is_ok(), "{path} in bf16");
        assert!(up.module(vae, [0, 1, 1], DType::F32).is_err(), "{path} without frames");
    }
}

/// A file with tensors made for it.
struct Made(BTreeMap<String, Tensor>);

impl TensorDirectory for Made {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.0.get(key).map(|t| t.ty.clone())
    }
}

/// Space and time together, which no recorded file does: a network whose residual blocks and norms are known.
///
/// With `final_conv` 0 but for its bias, the result is that bias at every position, at the announced extents.
#[test]
fn space_and_time_together() {
    let config = serde_json::json!({"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1,
        "spatial_upsample": true, "temporal_upsample": true});
    let config = UpsamplerConfig::from_json(&config).expect("it is supported");
    let (c, m) = (4, 32);
    let mut made = BTreeMap::new();
    let mut conv = |key: &str, to: usize, from: usize| {
        made.insert(format!("{key}.weight"), random(&[to, from, 3, 3, 3], made.len() as u64));
        made.insert(format!("{key}.bias"), random(&[to], made.len() as u64));
    };
    conv("initial_conv", m, c);
    conv("upsampler.0", 8 * m, m);
    conv("final_conv", c, m);
    for block in ["res_blocks.0", "post_upsample_res_blocks.0"] {
        conv(&format!("{block}.conv1"), m, m);
        conv(&format!("{block}.conv2"), m, m);
    }
    let norms = ["res_blocks.0.norm1", "res_blocks.0.norm2", "initial_norm"];
    for key in norms.into_iter().chain(["post_upsample_res_blocks.0.norm1", "post_upsample_res_blocks.0.norm2"]) {
        made.insert(format!("{key}.weight"), random(&[m], 3));
        made.insert(format!("{key}.bias"), random(&[m], 4));
    }
    let zeros = made["final_conv.weight"].ty.clone();
    made.insert("final_conv.weight".into(), Tensor::zeros(zeros));
    for (key, value) in [("mean-of-means", 0.0), ("std-of-means", 1.0)] {
        let data = Data::Float(vec![value; c]);
        made.insert(format!("per_channel_statistics.{key}"), Tensor { ty: TensorType::f32([c]), data });
    }
    let made = Made(made);
    let (own, model) = (Weights::new("upsampler", &made), Weights::new("model", &made));
    let module = checked(upsample(&config, &own, &model, [2, 3, 2], DType::F32).expect("it fits"));
    let lookup = |_: &str, key: &str, _: &TensorType| made.0.get(key).cloned();
    let latent = random(&[1, 2, 3, 2, c], 1);
    let y = ltxc_ir::eval::Evaluator::new(&module, &lookup).run("upsample", &[latent]).expect("it runs").remove(0);
    assert_eq!(y.ty.shape, [1, 3, 6, 4, c]);
    let bias = made.0["final_conv.bias"].floats();
    assert!(y.floats().chunks(c).all(|row| row == bias), "{:?}", &y.floats()[..2 * c]);
}
