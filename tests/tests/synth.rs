//! Synthetic models hold what graph builders ask for, no more and no less, and the small one behaves like a network.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use ltxc_ir::eval::Tensor;
use ltxc_ir::{DType, Module, TensorType};
use ltxc_models::checkpoint::{Checkpoint, GemmaFolder};
use ltxc_models::synth::philox::Stream as Numbers;
use ltxc_models::synth::{self, Preset, SynthModel};
use ltxc_models::text::{self, TextConfig, TextWeights, VisionConfig};
use ltxc_models::transformer::{self, StreamSpec, TransformerConfig, TransformerSpec};
use ltxc_models::upsampler::{self, UpsamplerConfig};
use ltxc_models::video_vae::{self, VideoVaeConfig};
use ltxc_models::{ModelError, TensorDirectory, Weights, audio};
use ltxc_tests::fixtures::TensorFile;
use ltxc_tests::harness::evaluate;

/// A directory that remembers which of its tensors were asked for.
struct Recorder<'a> {
    inner: &'a dyn TensorDirectory,
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Recorder<'a> {
    fn new(inner: &'a dyn TensorDirectory) -> Recorder<'a> {
        Recorder { inner, asked: RefCell::default() }
    }

    #[track_caller]
    fn assert_asked_for_all(self, keys: impl Iterator<Item = String>, unused: &[&str]) {
        let asked = self.asked.into_inner();
        let listed: BTreeSet<String> = keys.filter(|k| !unused.iter().any(|u| k.ends_with(u))).collect();
        let extra: Vec<_> = listed.difference(&asked).take(5).collect();
        assert!(extra.is_empty(), "in the file, but no builder asks for {extra:?}");
        assert!(!asked.is_empty());
    }
}

impl TensorDirectory for Recorder<'_> {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        let found = self.inner.tensor_type(key)?;
        self.asked.borrow_mut().insert(key.into());
        Some(found)
    }
}

/// Tensors of published files that nothing reads.
const UNUSED: [&str; 4] =
    ["statistics.channel", "mean-of-stds", "mean-of-stds_over_std-of-means", "stft_fn.inverse_basis"];

/// The graphs of every component, as small as they get.
struct Graphs {
    encode_text: Module,
    connect: Module,
    step: Module,
    decode: Module,
    decode_audio: Module,
    upsample: Module,
}

const GRID: [usize; 3] = [2, 2, 3];
const AUDIO_TOKENS: usize = 6;
const TEXT_BUCKET: usize = 8;
const CONTEXT: usize = 1024;

fn build(
    model: &Checkpoint,
    gemma: &GemmaFolder,
    directories: [&dyn TensorDirectory; 3],
    upsampler: &Checkpoint,
) -> Result<Graphs, ModelError> {
    let view = |i: usize| Weights::new(["model", "gemma", "upsampler"][i], directories[i]);
    let dit = model.section("transformer")?;
    let text_config = TextConfig::from_json(gemma.config(), dit)?;
    let weights = TextWeights { gemma: view(1), projection: view(0), transformer: view(0) };
    let spec = TransformerSpec {
        video: Some(StreamSpec::new(GRID.iter().product(), CONTEXT)),
        audio: Some(StreamSpec::new(AUDIO_TOKENS, CONTEXT)),
        perturbation: Default::default(),
    };
    let vae = VideoVaeConfig::from_json(model.section("vae")?)?;
    let audio_vae = audio::AudioVaeConfig::from_json(model.section("audio_vae")?)?;
    let vocoder = audio::VocoderConfig::from_json(model.section("vocoder")?)?;
    let enlarge = UpsamplerConfig::from_json(upsampler.config())?;
    // Encoders are built for the tensors they ask for.
    video_vae::encode(&vae, &view(0), [9, 64, 64], DType::F32)?;
    audio::encode(&audio_vae, &view(0), 4 * AUDIO_TOKENS - 3, DType::F32)?;
    let vision = VisionConfig::from_json(gemma.config(), None)?;
    text::see(&vision, &view(1), text_config.gemma.hidden_size, DType::F32)?;
    Ok(Graphs {
        encode_text: text::encode(&text_config, &weights, TEXT_BUCKET, DType::F32)?,
        connect: text::connect(&text_config.connectors, &view(0), CONTEXT, DType::F32)?,
        step: transformer::build(&TransformerConfig::from_json(dit)?, &view(0), &spec, DType::F32)?,
        decode: video_vae::decode(&vae, &view(0), GRID, DType::F32)?,
        decode_audio: audio::decode_audio(&audio_vae, &vocoder, &view(0), AUDIO_TOKENS, DType::F32)?,
        upsample: upsampler::upsample(&enlarge, &view(2), &view(0), GRID, DType::F32)?,
    })
}

#[test]
fn builders_ask_for_every_tensor_of_every_preset() {
    for preset in Preset::ALL {
        let folder = tempfile::tempdir().unwrap();
        let made = synth::synth(preset, folder.path(), 0).unwrap();
        let (model, gemma) = (Checkpoint::open(&made.checkpoint).unwrap(), GemmaFolder::open(&made.gemma).unwrap());
        for path in &made.upsamplers {
            let upsampler = Checkpoint::open_upsampler(path).unwrap();
            let recorders = [Recorder::new(&model), Recorder::new(&gemma), Recorder::new(&upsampler)];
            let [a, b, c] = &recorders;
            build(&model, &gemma, [a, b, c], &upsampler).unwrap_or_else(|e| panic!("{}: {e}", preset.name()));
            let [a, b, c] = recorders;
            a.assert_asked_for_all(model.tensors().map(|t| t.0.to_string()), &UNUSED);
            b.assert_asked_for_all(gemma.tensors().map(|t| t.0.to_string()), &[]);
            // A rational factor of two does not decimate, so it does not read its blur kernel.
            let doubles = upsampler.config()["spatial_scale"] == 2.0;
            let unused = if doubles { &["blur_down.kernel"][..] } else { &[] };
            c.assert_asked_for_all(upsampler.tensors().map(|t| t.0.to_string()), unused);
        }
    }
}

/// Standard deviation and largest magnitude.
#[track_caller]
fn spread(name: &str, tensor: &Tensor) -> (f64, f64) {
    let v = tensor.floats();
    assert!(v.iter().all(|x| x.is_finite()), "{name} is not finite");
    let mean = v.iter().sum::<f64>() / v.len() as f64;
    let deviation = (v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / v.len() as f64).sqrt();
    let largest = v.iter().fold(0f64, |m, x| m.max(x.abs()));
    println!("{name}: {} values, mean {mean:.3}, deviation {deviation:.3}, largest {largest:.3}", v.len());
    (deviation, largest)
}

/// Normal-like numbers of unit variance.
fn noise(name: &str, shape: &[usize]) -> Tensor {
    let mut numbers = Numbers::new(3, name);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| (0..3).map(|_| numbers.centred()).sum::<f32>() / 1.732).collect();
    Tensor::f32(shape, &values)
}

struct Tiny {
    graphs: Graphs,
    files: [TensorFile; 3],
}

impl Tiny {
    fn make(folder: &Path) -> Tiny {
        let made: SynthModel = synth::synth(Preset::Tiny, folder, 1).unwrap();
        let (model, gemma) = (Checkpoint::open(&made.checkpoint).unwrap(), GemmaFolder::open(&made.gemma).unwrap());
        let upsampler = Checkpoint::open_upsampler(&made.upsamplers[0]).unwrap();
        let graphs = build(&model, &gemma, [&model, &gemma, &upsampler], &upsampler).unwrap();
        let weights = made.gemma.join("model.safetensors");
        let files = [&made.checkpoint, &weights, &made.upsamplers[0]].map(|p| TensorFile::read(p));
        Tiny { graphs, files }
    }

    /// Results of `module` in their order, `argument` giving its parameters by name.
    #[track_caller]
    fn run(&self, module: &Module, argument: impl Fn(&str, &[usize]) -> Tensor) -> Vec<Tensor> {
        let entry = module.function(&module.entries[0]).unwrap();
        let args: Vec<Tensor> =
            entry.params.iter().map(|p| argument(entry.name_of(p.value), &entry.ty(p.value).shape)).collect();
        let [model, gemma, upsampler] = &self.files;
        let mut run =
            evaluate(module, &entry.name, &args, &[("model", model), ("gemma", gemma), ("upsampler", upsampler)]);
        entry.results.iter().filter_map(|r| run.results.remove(&r.name)).collect()
    }

    /// Video and audio contexts of `ids`.
    fn contexts(&self, ids: &[i32]) -> Vec<Tensor> {
        let pads = TEXT_BUCKET - ids.len();
        let inputs = self.run(&self.graphs.encode_text, |name, _| match name {
            "ids" => Tensor::i32(&[TEXT_BUCKET], &[vec![0; pads], ids.to_vec()].concat()),
            "valid" => Tensor::f32(&[TEXT_BUCKET], &[vec![0.0; pads], vec![1.0; ids.len()]].concat()),
            _ => {
                let place = (0..CONTEXT).map(|p| if p < ids.len() { pads + p } else { TEXT_BUCKET + p % 128 } as i32);
                Tensor::i32(&[CONTEXT], &place.collect::<Vec<_>>())
            }
        });
        self.run(&self.graphs.connect, |name, _| inputs[(name == "audio") as usize].clone())
    }

    /// Video and audio velocities.
    fn velocities(&self, contexts: &[Tensor], sigma: f32) -> Vec<Tensor> {
        self.run(&self.graphs.step, |name, shape| match name.split_once('.').unwrap() {
            (_, "timesteps" | "sigma") => Tensor::f32(shape, &[sigma]),
            (stream, "context") => contexts[(stream == "audio") as usize].clone(),
            (_, "positions") => {
                let bounds = (0..shape.iter().product::<usize>()).map(|i| ((i / 2) % shape[1] + i % 2) as f32 * 0.5);
                Tensor::f32(shape, &bounds.collect::<Vec<_>>())
            }
            _ => noise(name, shape),
        })
    }
}

/// The relative distance of two results.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (d, n) = a.floats().iter().zip(b.floats()).fold((0.0, 0.0), |(d, n), (x, y)| (d + (x - y).powi(2), n + y * y));
    (d / n).sqrt()
}

#[test]
fn the_tiny_model_behaves_like_a_network() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = Tiny::make(folder.path());

    let contexts = tiny.contexts(&[2, 130, 140, 150]);
    let others = tiny.contexts(&[2, 330, 240, 350, 400]);
    for (i, name) in ["video context", "audio context"].into_iter().enumerate() {
        assert!((0.1..10.0).contains(&spread(name, &contexts[i]).0));
        let change = distance(&others[i], &contexts[i]);
        assert!(change > 0.01, "{name} depends on the prompt by {change}");
    }

    let velocities = tiny.velocities(&contexts, 0.9);
    let (prompted, later) = (tiny.velocities(&others, 0.9), tiny.velocities(&contexts, 0.3));
    for (i, name) in ["video velocity", "audio velocity"].into_iter().enumerate() {
        assert!((0.2..5.0).contains(&spread(name, &velocities[i]).0));
        for (what, changed) in [("prompt", &prompted[i]), ("noise level", &later[i])] {
            let change = distance(changed, &velocities[i]);
            assert!(change > 1e-3, "{name} depends on the {what} by {change}");
        }
    }

    let frames = tiny.run(&tiny.graphs.decode, noise).remove(0);
    let (deviation, _) = spread("frames", &frames);
    let saturated = frames.floats().iter().filter(|v| v.abs() > 1.0).count() as f64 / frames.floats().len() as f64;
    assert!((0.1..0.8).contains(&deviation) && saturated < 0.1, "{saturated} of the pixels are saturated");

    let waveform = tiny.run(&tiny.graphs.decode_audio, noise).remove(0);
    let (deviation, largest) = spread("waveform", &waveform);
    assert!((0.02..0.7).contains(&deviation) && largest < 1.0);

    let latent = tiny.run(&tiny.graphs.upsample, noise).remove(0);
    assert!((0.2..5.0).contains(&spread("upsampled latent", &latent).0));
}
