//! The video decoder at its published size on a small latent.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ltxc::bench::statistics::relative_difference;
use ltxc_compiler::Options;
use ltxc_ir::{DType, Module, Rate};
use ltxc_models::Weights;
use ltxc_models::checkpoint::WeightFile;
use ltxc_models::synth::{Preset, tensors};
use ltxc_models::video_vae::{VideoVaeConfig, decode};

use crate::block::{Findings, MOST_DIFFERENT};
use crate::measure::alternate;
use crate::report::{Row, Table};
use crate::session::{self, CallTimes, Input, SOURCE, Session};
use crate::synthetic::{self, Numbers, Values};
use crate::worker::Python;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Model whose sizes are used.
    pub preset: Preset,
    /// Frames, rows and columns of the latent.
    pub grid: [usize; 3],
    /// Runs of each side.
    pub rounds: usize,
}

/// The ratio to PyTorch that is aimed at.
const GOAL: f64 = 1.25;

/// The module of the decoder, with f32 weights, and a latent.
fn subject(settings: &Settings, folder: &Path) -> Result<(Module, WeightFile, BTreeMap<String, Vec<f32>>)> {
    let (config, _) = synthetic::published_configs(settings.preset)?;
    let mut tensors = tensors::video_vae(&config["vae"])?;
    tensors.retain(|t| !t.key.starts_with("vae.encoder."));
    let path = folder.join("vae.safetensors");
    synthetic::write_checkpoint(&path, &config, &tensors, DType::F32)?;
    let vae = VideoVaeConfig::from_json(&config["vae"])?;
    let file = WeightFile::open(&path)?;
    let module = decode(&vae, &Weights::new(SOURCE, &file), settings.grid, DType::F32)?;
    let latent = Numbers::normalised("latent", settings.grid.iter().product::<usize>() * vae.latent_channels);
    Ok((module, file, BTreeMap::from([("latent".to_string(), latent)])))
}

/// Measures. `folder` takes the weight file, 2 GB at full size.
///
/// # Errors
/// A side that fails.
pub fn run(settings: &Settings, folder: &Path, python: Option<&Python>) -> Result<Findings> {
    let (module, file, mut values) = subject(settings, folder)?;
    let path = folder.join("vae.safetensors");
    let [f, h, w] = settings.grid;
    let data = values.remove("latent").unwrap_or_default();
    let latent = Values { shape: vec![1, f, h, w, data.len() / (f * h * w)], data };
    let inputs = folder.join("vae-inputs.safetensors");
    synthetic::write_values(&inputs, &BTreeMap::from([("latent".to_string(), latent.clone())]))?;
    let start = |p: &Python| p.start("vae.py", &[("--checkpoint", &path), ("--inputs", &inputs)]);
    let mut worker = python.map(start).transpose()?;

    let plan = session::compile(&module, &file, Options::default())?;
    let weights = session::open_weights(&plan, &file)?;
    let inputs = BTreeMap::from([("latent".to_string(), Input::F32(latent.data))]);
    let mut session = Session::new(&plan, &weights, inputs)?;
    let mut times = CallTimes::default();
    let mut ours = || {
        let sample = session.run_timed(Rate::Step, &mut times)?;
        times.end_of_round();
        Ok(sample)
    };
    let turns = match &mut worker {
        None => alternate(settings.rounds, &mut ours, None)?,
        Some(worker) => alternate(settings.rounds, &mut ours, Some(&mut || Ok(worker.run("")?.0)))?,
    };
    let mut notes = Vec::new();
    if let Some(worker) = &mut worker {
        let path = folder.join("vae-frames.safetensors");
        worker.save(&path)?;
        let frames = synthetic::read_values(&path)?.remove("frames").context("frames of the worker")?;
        let difference = relative_difference(&session.output("decode", "frames")?, &frames.data);
        ensure!(
            difference < MOST_DIFFERENT,
            "the frames are {difference:.1e} from PyTorch's; their times mean nothing"
        );
        notes.push(format!("relative L2 difference of the frames {:?} from PyTorch: {difference:.1e}", frames.shape));
    }
    let what = format!("decode a latent of {f}×{h}×{w}, {}", settings.preset.name());
    let rows = vec![Row::turns(what, turns).ratio_at_most(GOAL)];
    let table = times.table(&plan);
    let table = Table { title: format!("Decoder: {}", table.title), ..table };
    Ok(Findings { rows, tables: vec![table], notes })
}
