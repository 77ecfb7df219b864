//! Every component in bf16 and in f16, by the evaluator and as a compiled plan, against the recorded f32 values of the
//! reference.
//!
//! Bounds are multiples of the error that an analysis of the graph expects, see [`ltxc_tests::rounding`].

use std::collections::BTreeMap;

use ltxc_ir::eval::Tensor;
use ltxc_ir::{DType, Module};
use ltxc_models::audio::{decode, decode_audio, vocode};
use ltxc_models::text::{self, Modality};
use ltxc_models::transformer::{Stream, TransformerSpec};
use ltxc_models::video_vae;
use ltxc_runtime::tokenizer::CONTEXT_TOKENS;
use ltxc_tests::compare::{Report, relative_l2};
use ltxc_tests::fixtures::TensorFile;
use ltxc_tests::harness::{Sources, compiled, reference};
use ltxc_tests::recorded::Recorded;
use ltxc_tests::rounding::typical_errors;

use super::text::{Model, encode_arguments};
use super::transformer::Fixture;
use super::upsampler::Upsampler;
use super::video_vae::{Checkpoint, channels_last, grid_of};
use super::{audio, video_vae as video};

/// Results of a program: name of the result, name of the recording, and how one becomes the layout of the other.
type Expected<'a> = (&'a str, &'a str, &'a dyn Fn(&Tensor) -> Vec<f32>);

/// Families with the file of their model.
const FAMILIES: [(&str, &str); 2] = [("ltx2", "tiny-ltx2/ltx-2-tiny"), ("ltx23", "tiny-ltx23/ltx-2.3-tiny")];

/// Dtypes that activations are narrowed to.
const NARROW: [DType; 2] = [DType::BF16, DType::F16];

/// How many typical errors a result may be away.
#[derive(Clone, Copy)]
struct Slack {
    /// From the recording.
    reference: f64,
    /// The plan from the evaluator.
    between: f64,
}

/// - The analysis takes slopes for 1 and errors for white, and a norm of few values scatters: 3.
/// - Plan and evaluator round mostly the same values, and differ where a kernel keeps f32 between two ops. Had they no
///   rounding in common, their errors were independent and √2 typical errors apart: 1.5.
const SLACK: Slack = Slack { reference: 3.0, between: 1.5 };

/// Neighbouring samples of the synthetic vocoder of LTX-2 are nearly equal, so that they are rounded alike: of the 7 taps of a
/// convolution, errors add where the analysis adds squares, up to √7 = 2.6 times as much; and which values are rounded up
/// is another choice in the plan, so that it is as far from the evaluator as both are from f32.
const WAVEFORM_SLACK: Slack = Slack { reference: 4.0, between: 4.0 };

/// What rounding is expected to move results by, relative L2, by their names.
struct Expectation {
    /// What bounds are multiples of.
    typical: BTreeMap<String, f64>,
    /// What must show by an eighth at least. As much, unless noise of one size moves a result by amounts of many sizes: then
    /// the least of these.
    least: BTreeMap<String, f64>,
}

/// Part of what is expected that must show: an analysis that predicted far too much would let everything pass.
const SHOWN: f64 = 1.0 / 8.0;

/// A program in a narrow dtype and what it is run with.
struct Program<'a> {
    dtype: DType,
    module: &'a Module,
    args: &'a [Tensor],
    sources: Sources<'a>,
}

impl Program<'_> {
    /// The error that the analysis expects of each result.
    fn typical(&self) -> BTreeMap<String, f64> {
        typical_errors(self.module, &self.module.entries[0], self.dtype, self.args, self.sources)
    }

    fn check(&self, report: &mut Report, recorded: &mut Recorded, slack: Slack, results: &[Expected<'_>]) {
        self.check_expected(report, recorded, slack, &self.expectation(), results);
    }

    /// Of the analysis alone.
    fn expectation(&self) -> Expectation {
        let typical = self.typical();
        Expectation { least: typical.clone(), typical }
    }

    /// The same with expected errors that were found otherwise.
    fn check_expected(
        &self,
        report: &mut Report,
        recorded: &mut Recorded,
        slack: Slack,
        expectation: &Expectation,
        results: &[Expected<'_>],
    ) {
        let entry = &self.module.entries[0];
        let evaluated = reference(self.module, entry, self.args, self.sources).results;
        let planned = compiled(self.module, entry, self.args, self.sources);
        for (result, key, layout) in results {
            let (typical, least) = (expectation.typical[*result], expectation.least[*result]);
            let (evaluated, expected) = recorded.pair(key, &layout(&evaluated[*result]));
            let (planned, _) = recorded.pair(key, &layout(&planned[*result]));
            let name = format!("{key} in {}", self.dtype);
            report.check(&format!("{name}: evaluator"), &evaluated, &expected, slack.reference * typical);
            report.check(&format!("{name}: plan"), &planned, &expected, slack.reference * typical);
            report.check(&format!("{name}: plan against evaluator"), &planned, &evaluated, slack.between * typical);
            let found = relative_l2(&planned, &expected);
            let line = format!("{name}: {:.2} of the typical error {typical:.1e}", found / typical);
            report.note(found >= SHOWN * least, line);
        }
    }
}

fn plain(x: &Tensor) -> Vec<f32> {
    x.to_f32()
}

#[test]
fn transformer_in_narrow_dtypes() {
    let mut report = Report::default();
    for (family, path) in FAMILIES {
        let mut recorded = Recorded::required(&format!("{family}/transformer"));
        let file = recorded.file.clone();
        let checkpoint = audio::checkpoint(path);
        let fixture = Fixture::new(&file, &checkpoint);
        let cases = ["uniform", "i2v", "pertoken"];
        for (case, dtype) in cases.into_iter().flat_map(|case| NARROW.map(|dtype| (case, dtype))) {
            let streams = Stream::BOTH.map(|s| fixture.stream(case, s).expect("both streams were recorded"));
            let [video, audio] = streams.each_ref().map(|s| Some(s.spec()));
            let spec = TransformerSpec { video, audio, perturbation: Default::default() };
            let module = fixture.module(case, &spec, dtype);
            let args = streams.each_ref().map(|s| s.arguments()).concat();
            let program = Program { dtype, module: &module, args: &args, sources: &[("model", &checkpoint)] };
            let names = ["video", "audio"].map(|s| (format!("{s}.velocity"), format!("{case}.velocity.{s}")));
            let results: Vec<Expected<'_>> = names.iter().map(|(a, b)| (a.as_str(), b.as_str(), &plain as _)).collect();
            program.check(&mut report, &mut recorded, SLACK, &results);
        }
    }
    report.finish();
}

#[test]
fn text_in_narrow_dtypes() {
    let mut report = Report::default();
    for (model, dtype) in [Model::ltx2(), Model::ltx23()].iter().flat_map(|model| NARROW.map(|dtype| (model, dtype))) {
        let mut recorded = Recorded::required(&format!("{}/text_context", model.name));
        let prompt = model.prompt("pos");
        let n = prompt.ids().len();
        let slots = (n + 1).next_power_of_two(); // with pads
        let module = text::encode(&model.config, &model.weights(), slots, dtype).unwrap_or_else(|e| panic!("{e}"));
        let (args, sources) = (encode_arguments(&prompt, slots, model.registers()), model.sources());
        // Only real tokens are recorded; behind them are registers, which are stored values.
        let real = |x: &Tensor| x.to_f32()[..n * x.ty.shape[2]].to_vec();
        Program { dtype, module: &module, args: &args, sources: &sources }.check(
            &mut report,
            &mut recorded,
            SLACK,
            &[("video", "pos.features_video", &real), ("audio", "pos.features_audio", &real)],
        );

        let connectors = &model.config.connectors;
        let module = text::connect(connectors, &model.weights().transformer, CONTEXT_TOKENS, dtype)
            .unwrap_or_else(|e| panic!("{e}"));
        let args = Modality::ALL
            .map(|m| model.place(m, &recorded.input(&format!("pos.features_{}", m.name())).to_f32(), CONTEXT_TOKENS));
        Program { dtype, module: &module, args: &args, sources: &sources }.check(
            &mut report,
            &mut recorded,
            SLACK,
            &[("video_context", "pos.video_context", &plain), ("audio_context", "pos.audio_context", &plain)],
        );
    }
    report.finish();
}

#[test]
fn video_decoder_in_narrow_dtypes() {
    let mut report = Report::default();
    for ((family, path), dtype) in FAMILIES.into_iter().flat_map(|family| NARROW.map(|dtype| (family, dtype))) {
        let mut recorded = Recorded::required(&format!("{family}/video_vae"));
        let vae = Checkpoint::read(&format!("{path}.safetensors"));
        let latent = channels_last(&recorded.input("dec.latent"));
        let module =
            video_vae::decode(&vae.config, &vae.weights(), grid_of(&latent), dtype).unwrap_or_else(|e| panic!("{e}"));
        let program = Program { dtype, module: &module, args: &[latent], sources: &[("model", &vae.file)] };
        program.check(&mut report, &mut recorded, SLACK, &[("frames", "dec.output", &|x| video::channels_first(x, 5))]);
    }
    report.finish();
}

#[test]
fn upsampler_in_narrow_dtypes() {
    let mut report = Report::default();
    let files = [
        ("spatial-upscaler-x2", "tiny-ltx2/spatial-upscaler-x2-tiny"),
        ("spatial-upscaler-x2-ltx23", "tiny-ltx23/spatial-upscaler-x2-ltx23-tiny"),
    ];
    let subjects = FAMILIES.into_iter().zip(files).flat_map(|subject| NARROW.map(|dtype| (subject, dtype)));
    for (((family, path), (name, file)), dtype) in subjects {
        let mut recorded = Recorded::required(&format!("{family}/upsamplers"));
        let vae = Checkpoint::read(&format!("{path}.safetensors"));
        let up = Upsampler::read(&format!("{file}.safetensors"));
        let latent = channels_last(&recorded.input(&format!("{name}.latent")));
        let module = up.module(&vae, grid_of(&latent), dtype).unwrap_or_else(|e| panic!("{e}"));
        let program = Program {
            dtype,
            module: &module,
            args: &[latent],
            sources: &[("upsampler", &up.file), ("model", &vae.file)],
        };
        program.check(
            &mut report,
            &mut recorded,
            SLACK,
            &[("latent", &format!("{name}.normalized_output"), &|x| video::channels_first(x, 5))],
        );
    }
    report.finish();
}

#[test]
fn audio_decoder_in_narrow_dtypes() {
    let mut report = Report::default();
    for ((family, path), dtype) in FAMILIES.into_iter().flat_map(|family| NARROW.map(|dtype| (family, dtype))) {
        let mut recorded = Recorded::required(&format!("{family}/vocoder"));
        let file = audio::checkpoint(path);
        let (vae, vocoder) = audio::configs(&file);
        let latent = audio::tokens(&recorded.input("decode_audio.latent"));
        let vocoder = vocoder.expect("the model has a vocoder");
        let module = decode_audio(&vae, &vocoder, &audio::weights(&file), latent.ty.shape[1], dtype)
            .unwrap_or_else(|e| panic!("{e}"));
        let args = [latent];
        let program = Program { dtype, module: &module, args: &args, sources: &[("model", &file)] };
        let (slack, expectation) = match vocoder.extension {
            None => (WAVEFORM_SLACK, program.expectation()),
            Some(_) => (SLACK, expectation_of_extended(&mut report, &file, dtype, &args)),
        };
        let results: [Expected<'_>; 1] =
            [("waveform", "decode_audio.waveform", &|x| audio::channels_first(x).to_f32())];
        program.check_expected(&mut report, &mut recorded, slack, &expectation, &results);
    }
    report.finish();
}

/// Draws of noise.
const DRAWS: u64 = 4;

/// Vocoders with bandwidth extension compute in f32 whatever the spectrogram is rounded to. So what becomes of an error need
/// not be estimated: it is what the vocoder makes of a spectrogram with noise of the size that the analysis expects. The
/// analysis is held against the spectrogram, in both directions.
///
/// Between the two vocoders stand logarithms of magnitudes, of which small ones move far or are clamped: what the waveform
/// shows depends on where noise falls. So the least that must show is the least of some draws of noise.
fn expectation_of_extended(report: &mut Report, file: &TensorFile, dtype: DType, latent: &[Tensor; 1]) -> Expectation {
    let (vae, vocoder) = audio::configs(file);
    let (vocoder, weights, sources) = (vocoder.expect("a vocoder"), audio::weights(file), [("model", file)]);
    let decode = |dtype| decode(&vae, &weights, latent[0].ty.shape[1], dtype).unwrap_or_else(|e| panic!("{e}"));
    let narrow = decode(dtype);
    let error = Program { dtype, module: &narrow, args: latent, sources: &sources }.typical()["mel"];
    let mel = compiled(&decode(DType::F32), "decode", latent, &sources)["mel"].clone();
    let (values, rounded) = (mel.to_f32(), compiled(&narrow, "decode", latent, &sources)["mel"].to_f32());
    let name = format!("mel of decode_audio in {dtype}");
    report.check(&format!("{name}: plan"), &rounded, &values, SLACK.reference * error);
    let found = relative_l2(&rounded, &values);
    report.note(found >= SHOWN * error, format!("{name}: {:.2} of the typical error {error:.1e}", found / error));
    let rms = (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
    // Evenly distributed in -1..1, of which the root mean square is 1 / √3.
    let noisy = |seed: u64| -> Tensor {
        let noise = video::random(&mel.ty.shape, seed).to_f32();
        let noisy = values.iter().zip(&noise).map(|(v, n)| v + n * (3f64.sqrt() * rms * error) as f32);
        Tensor::f32(&mel.ty.shape, &noisy.collect::<Vec<_>>())
    };
    let module = vocode(&vocoder, &weights, mel.ty.shape[1], DType::F32).unwrap_or_else(|e| panic!("{e}"));
    let sound = |mel| compiled(&module, "vocode", &[mel], &sources)["waveform"].to_f32();
    let clean = sound(mel.clone());
    let shown: Vec<f64> = (1..=DRAWS).map(|seed| relative_l2(&sound(noisy(seed)), &clean)).collect();
    let least = shown.iter().copied().fold(f64::INFINITY, f64::min);
    let of = |error: f64| BTreeMap::from([("waveform".to_string(), error)]);
    Expectation { typical: of(shown[0]), least: of(least) }
}
