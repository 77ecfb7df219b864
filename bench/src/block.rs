//! One block of the transformer at its published size: a model evaluation with everything around the block, and the time
//! inside of it.
//!
//! # Easy to get wrong
//! - PyTorch computes keys and values of the text in every step, ltxc once per generation. The rows called *same work*
//!   are compiled without hoisting, so that both sides do the same.
//! - The published pipelines give every token a row of timesteps of its own, and so compute its modulation per token. The
//!   comparison is with one row for all, which is the least work PyTorch can do; the other is in the table for reference.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ltxc::bench::statistics::relative_difference;
use ltxc_compiler::Options;
use ltxc_ir::{DType, Rate};
use ltxc_models::Weights;
use ltxc_models::checkpoint::WeightFile;
use ltxc_models::synth::{Preset, tensors};
use ltxc_models::transformer::{ENTRY, Stream, StreamSpec, TransformerConfig, TransformerSpec, build};
use serde_json::json;

use crate::measure::{Sample, Turns, alternate};
use crate::report::{Row, Table, figure};
use crate::session::{self, CallTimes, Input, SOURCE, Session};
use crate::synthetic::{self, Numbers, Values};
use crate::worker::{Python, Worker};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Model whose sizes are used.
    pub preset: Preset,
    /// Frames, rows and columns of the video latent.
    pub grid: [usize; 3],
    /// Audio tokens.
    pub audio_tokens: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Runs of each side.
    pub rounds: usize,
}

/// What was measured.
pub struct Findings {
    /// Rows of the report.
    pub rows: Vec<Row>,
    /// Where time goes.
    pub tables: Vec<Table>,
    /// How far the results are apart.
    pub notes: Vec<String>,
}

/// Name path of the only block.
const BLOCK: &str = "blocks.0";

/// The ratio to PyTorch that is aimed at.
const GOAL: f64 = 1.25;

/// Relative difference from PyTorch up to which both sides computed the same: float32 noise of one block is below 1e-5.
pub(crate) const MOST_DIFFERENT: f64 = 1e-4;

/// The same if ltxc computes in bf16: a rounding is off by 1.5e-3, and some thirty of them add up like a random walk.
const MOST_DIFFERENT_BF16: f64 = 3e-2;

/// Measures. `folder` takes the weight files, 3 GB at full size.
///
/// # Errors
/// A side that fails.
pub fn run(settings: &Settings, folder: &Path, python: Option<&Python>) -> Result<Findings> {
    let (mut config, _) = synthetic::published_configs(settings.preset)?;
    config["transformer"]["num_layers"] = json!(1);
    let bench = Bench::new(settings, &config["transformer"])?;
    let tensors = tensors::transformer(&config["transformer"])?;
    let files = [DType::F32, DType::BF16].map(|dtype| folder.join(format!("block-{dtype}.safetensors")));
    for (path, dtype) in files.iter().zip([DType::F32, DType::BF16]) {
        synthetic::write_checkpoint(path, &config, &tensors, dtype)?;
    }
    let inputs = folder.join("block-inputs.safetensors");
    synthetic::write_values(&inputs, &bench.values)?;
    let start = |p: &Python| p.start("block.py", &[("--checkpoint", &files[0]), ("--inputs", &inputs)]);
    let mut worker = python.map(start).transpose()?;

    let mut findings = Findings { rows: Vec::new(), tables: Vec::new(), notes: Vec::new() };
    let same_work = Options { disabled: vec!["hoist".into()], ..Options::default() };
    let f32_file = WeightFile::open(&files[0])?;
    let bf16_file = WeightFile::open(&files[1])?;
    let variants = [
        ("same work, f32 weights", &f32_file, same_work, DType::F32),
        ("as it runs, f32 weights", &f32_file, Options::default(), DType::F32),
        ("as it runs, bf16 weights", &bf16_file, Options::default(), DType::F32),
        ("as it runs, all in bf16", &bf16_file, Options::default(), DType::BF16),
    ];
    for (name, file, options, dtype) in variants {
        let measured = bench.variant(file, options, dtype, settings.rounds, worker.as_mut())?;
        let [step, block] = measured.turns;
        findings.rows.push(Row::turns(format!("block, {name}"), block).ratio_at_most(GOAL));
        findings.rows.push(Row::turns(format!("whole evaluation, {name}"), step));
        if measured.once.seconds > 0.0 {
            findings.rows.push(Row::value(format!("once per generation, {name}"), "s", measured.once.seconds));
        }
        findings
            .tables
            .push(Table { title: format!("Evaluation, {name}: {}", measured.table.title), ..measured.table });
        if let Some([video, audio]) = measured.differences {
            let found =
                format!("relative L2 difference of velocities from PyTorch: video {video:.1e}, audio {audio:.1e}");
            let most = if dtype == DType::F32 { MOST_DIFFERENT } else { MOST_DIFFERENT_BF16 };
            ensure!(video.max(audio) < most, "{name}: {found}; times of wrong results mean nothing");
            findings.notes.push(format!("{name}: {found}"));
        }
    }
    if let Some(worker) = &mut worker {
        let (sample, answer) = worker.run("token")?;
        let inside = answer["block_seconds"].as_f64().context("answer of the worker without `block_seconds`")?;
        findings.notes.push(format!(
            "PyTorch with a row of timesteps per token, as the published pipelines run: {} s, {} s of it in the block",
            figure(sample.seconds),
            figure(inside)
        ));
    }
    Ok(findings)
}

/// The same inputs for all sides.
struct Bench {
    config: TransformerConfig,
    spec: TransformerSpec,
    values: BTreeMap<String, Values>,
}

/// One way to compile the block.
struct Measured {
    /// The whole evaluation, and the part inside the block.
    turns: [Turns; 2],
    /// Programs that run once per generation.
    once: Sample,
    table: Table,
    differences: Option<[f64; 2]>,
}

impl Bench {
    fn new(settings: &Settings, transformer: &serde_json::Value) -> Result<Bench> {
        let config = TransformerConfig::from_json(transformer)?;
        let tokens = [settings.grid.iter().product(), settings.audio_tokens];
        let mut values = BTreeMap::new();
        for (stream, tokens) in Stream::BOTH.into_iter().zip(tokens) {
            let mut put = |what: &str, shape: &[usize], data: Vec<f32>| {
                values.insert(format!("{}.{what}", stream.name()), Values { shape: shape.into(), data });
            };
            let random = |what: &str, len: usize| Numbers::normalised(&format!("{}.{what}", stream.name()), len);
            let (channels, text) = (config.stream(stream).in_channels, config.context_channels(stream));
            put("latent", &[1, tokens, channels], random("latent", tokens * channels));
            let shape = [1, settings.text_tokens, text];
            put("context", &shape, random("context", shape.iter().product()));
            put("timesteps", &[1], vec![SIGMA]);
            put("sigma", &[1], vec![SIGMA]);
            let positions = match stream {
                Stream::Video => video_positions(settings.grid),
                Stream::Audio => (0..tokens).flat_map(|t| [t as f32 / 25.0, (t + 1) as f32 / 25.0]).collect(),
            };
            put("positions", &[positions.len() / tokens / 2, tokens, 2], positions);
        }
        let stream = |tokens| Some(StreamSpec::new(tokens, settings.text_tokens));
        let spec =
            TransformerSpec { video: stream(tokens[0]), audio: stream(tokens[1]), perturbation: Default::default() };
        Ok(Bench { config, spec, values })
    }

    fn variant(
        &self,
        file: &WeightFile,
        options: Options,
        dtype: DType,
        rounds: usize,
        worker: Option<&mut Worker>,
    ) -> Result<Measured> {
        let module = build(&self.config, &Weights::new(SOURCE, file), &self.spec, dtype)?;
        let plan = session::compile(&module, file, options)?;
        let weights = session::open_weights(&plan, file)?;
        let inputs = self.values.iter().map(|(name, v)| (name.clone(), Input::F32(v.data.clone()))).collect();
        let mut session = Session::new(&plan, &weights, inputs)?;
        session.run(Rate::Generation)?;
        let once = session.run(Rate::Generation)?;

        let mut times = CallTimes::default();
        let (mut our_blocks, mut their_blocks) = (Vec::new(), Vec::new());
        let mut ours = || {
            let mut round = CallTimes::default();
            let slow = session.run_timed(Rate::Evaluation, &mut round)?;
            let fast = session.run_timed(Rate::Step, &mut round)?;
            round.end_of_round();
            let seconds = round.seconds_of(&plan, BLOCK);
            let cpu_seconds = (slow.cpu_seconds + fast.cpu_seconds) * seconds / (slow.seconds + fast.seconds);
            our_blocks.push(Sample { seconds, cpu_seconds });
            times.merge(round);
            Ok(Sample { seconds: slow.seconds + fast.seconds, cpu_seconds: slow.cpu_seconds + fast.cpu_seconds })
        };
        let mut worker = worker;
        let step = match &mut worker {
            None => alternate(rounds, &mut ours, None)?,
            Some(worker) => alternate(
                rounds,
                &mut ours,
                Some(&mut || {
                    let (sample, answer) = worker.run("one")?;
                    let seconds = answer["block_seconds"].as_f64().context("answer without `block_seconds`")?;
                    let cpu_seconds = sample.cpu_seconds * seconds / sample.seconds;
                    their_blocks.push(Sample { seconds, cpu_seconds });
                    Ok(sample)
                }),
            )?,
        };
        // The first round is the warm-up.
        let rest = |runs: Vec<Sample>| runs.into_iter().skip(1).collect();
        let block = Turns { ours: rest(our_blocks), theirs: rest(their_blocks) };

        let mut differences = None;
        if let Some(worker) = worker {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("outputs");
            worker.save(&path)?;
            let expected = synthetic::read_values(&path)?;
            let mut found = [0.0; 2];
            for (difference, stream) in found.iter_mut().zip(Stream::BOTH) {
                let name = format!("{}.velocity", stream.name());
                let expected = expected.get(&name).with_context(|| format!("`{name}` of the worker"))?;
                *difference = relative_difference(&session.output(ENTRY, &name)?, &expected.data);
            }
            differences = Some(found);
        }
        Ok(Measured { turns: [step, block], once, table: times.table(&plan), differences })
    }
}

/// A sigma inside of the schedules.
const SIGMA: f32 = 0.725;

/// Bounds of every token: seconds at 24 frames per second, then pixels. `[3, t, 2]`.
fn video_positions([frames, rows, columns]: [usize; 3]) -> Vec<f32> {
    let tokens = || (0..frames).flat_map(move |f| (0..rows).flat_map(move |r| (0..columns).map(move |c| [f, r, c])));
    // The first latent frame stands for one frame, the others for eight.
    let second = |frame: usize| (8 * frame).saturating_sub(7) as f32 / 24.0;
    let pixel = |i: usize| 32.0 * i as f32;
    let time = tokens().flat_map(|[f, _, _]| [second(f), second(f + 1)]);
    let vertical = tokens().flat_map(|[_, r, _]| [pixel(r), pixel(r + 1)]);
    let horizontal = tokens().flat_map(|[_, _, c]| [pixel(c), pixel(c + 1)]);
    time.chain(vertical).chain(horizontal).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_cover_the_grid() {
        let positions = video_positions([2, 2, 3]);
        assert_eq!(positions.len(), 3 * 12 * 2);
        let bound = |axis: usize, token: usize| &positions[(axis * 12 + token) * 2..][..2];
        assert_eq!(bound(0, 0), [0.0, 1.0 / 24.0]);
        assert_eq!(bound(0, 11), [1.0 / 24.0, 9.0 / 24.0]);
        assert_eq!(bound(1, 11), [32.0, 64.0]);
        assert_eq!(bound(2, 11), [64.0, 96.0]);
    }
}
