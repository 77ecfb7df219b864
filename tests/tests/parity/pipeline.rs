//! Whole runs of pipelines against the published pipeline class, from its recorded noise.

mod conditioned;
mod guided;
mod upscale;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use ltxc::adapters::{self, Loras};
use ltxc::args::{AdapterArgs, ModelArgs, PipelineName, Precision, ReferenceVersion, ShapeArgs};
use ltxc::compile::compile;
use ltxc::job::{References, Shape};
use ltxc::model_files::ModelFiles;
use ltxc_compiler::{Fuse, Options, passes};
use ltxc_ir::plan::{Plan, Release, SoundRole, container};
use ltxc_runtime::RunError;
use ltxc_runtime::adapters::StageAdapters;
use ltxc_runtime::backend::{Device, DeviceName, find, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::media::load_image;
use ltxc_runtime::pipeline::{Conditioning, Event, Noise, Observer, Output, Request, needed_passes, run};
use ltxc_runtime::tokenizer::Tokenizer;
use ltxc_runtime::weights::WeightFiles;
use ltxc_tests::compare::{Report, relative_l2};
use ltxc_tests::fixtures::{self, root};
use ltxc_tests::recorded::{ByteLimit, Recorded};
use serde_json::Value;

/// Relative L2 limit of inputs and of what the driver computes before the model runs.
const DRIVER_LIMIT: f64 = 1e-6;
/// Relative L2 limit of whole runs: final latents, frames and sound.
const RUN_LIMIT: f64 = 1e-3;
/// Relative L2 limit of one call of the model at another level of fusion.
const FUSION_LIMIT: f64 = 1e-5;
/// Frames as bytes: largest difference, and share of values that differ.
const BYTE_LIMIT: ByteLimit = (1, 0.02);

/// Runs that both releases make alike: from text, in a way that no modality is treated apart.
const ALIKE: [&str; 2] = ["distilled", "one_stage"];

/// A recorded run, and the release of the reference that it was recorded with.
#[derive(Clone, Copy)]
struct Case {
    family: &'static str,
    name: &'static str,
    release: ReferenceVersion,
}

impl Case {
    /// The run as the newest release made it that this set has it of.
    fn new(family: &'static str, name: &'static str) -> Case {
        let is_first = fixtures::release() == Release::V1_0_0 && !ALIKE.contains(&name);
        Case { family, name, release: if is_first { ReferenceVersion::V1_0_0 } else { ReferenceVersion::V1_2_0 } }
    }

    /// The same run of the older release; `None` if `self` is that one already.
    fn of_first_release(self) -> Option<Case> {
        let first = Case { release: ReferenceVersion::V1_0_0, ..self };
        (self.release != first.release).then_some(first)
    }

    fn recorded(self) -> Recorded {
        let name = format!("e2e/{}/{}", self.family, self.name);
        match self.release {
            ReferenceVersion::V1_0_0 => Recorded::new(fixtures::of_first_release(&name)),
            ReferenceVersion::V1_2_0 => Recorded::required(&name),
        }
    }

    /// The size of the run.
    fn shape(self) -> ShapeArgs {
        ShapeArgs { reference_version: Some(self.release), ..recorded_shape(&self.recorded()) }
    }
}

#[test]
fn distilled_run_of_ltx2() {
    check_run(Case::new("ltx2", "distilled"));
}

#[test]
fn distilled_run_of_ltx2_with_images_and_tiles() {
    check_run(Case::new("ltx2", "distilled_i2v_tiled"));
}

#[test]
fn distilled_run_of_ltx23() {
    check_run(Case::new("ltx23", "distilled"));
}

#[test]
fn distilled_runs_of_the_first_release() {
    for (family, name) in [("ltx2", "distilled"), ("ltx2", "distilled_i2v_tiled"), ("ltx23", "distilled")] {
        Case::new(family, name).of_first_release().into_iter().for_each(check_run);
    }
}

/// Whatever is fused, and whichever pass is left out: runs meet the bounds, and a call of the model stays what it is.
#[test]
fn distilled_runs_at_every_level_of_fusion() {
    let names: BTreeSet<&str> = passes().iter().map(|pass| pass.name).collect();
    let levels = [Fuse::None, Fuse::Composite].map(|fuse| Options { fuse, ..Options::default() });
    let without = names.into_iter().map(|pass| Options { disabled: vec![pass.into()], ..Options::default() });
    let all: Vec<Options> = levels.into_iter().chain(without).collect();
    for family in ["ltx2", "ltx23"] {
        let run = |options: &Options| {
            println!("{family}: {:?} without {:?}", options.fuse, options.disabled);
            let files = Files { options: options.clone(), ..Files::of(family) };
            check_run_on(&files, Case::new(family, "distilled"))
        };
        let full = run(&Options::default());
        for options in &all {
            let found = run(options);
            for name in ["video", "audio"].map(|modality| format!("stage1.call0.{modality}.denoised")) {
                let error = relative_l2(&found.tensors[&name], &full.tensors[&name]);
                assert!(error <= FUSION_LIMIT, "{name} differs by {error:.1e}");
            }
        }
    }
}

#[test]
fn distilled_runs_on_a_gpu() {
    let Some(device) = gpu() else { return };
    for (family, name) in [("ltx2", "distilled"), ("ltx2", "distilled_i2v_tiled"), ("ltx23", "distilled")] {
        check_run_on(&Files { device: device.clone(), ..Files::of(family) }, Case::new(family, name));
    }
}

/// The device that `LTXC_TEST_DEVICE` names, or the first Vulkan device, in tests a program on the processor as a rule. `None`
/// if there is none, and that is allowed.
pub fn gpu() -> Option<Device> {
    if let Ok(name) = std::env::var("LTXC_TEST_DEVICE") {
        let name: DeviceName = name.parse().unwrap_or_else(|e| panic!("LTXC_TEST_DEVICE: {e}"));
        let found = find(Some(name.backend()));
        return Some(found.named(&name).unwrap_or_else(|e| panic!("LTXC_TEST_DEVICE: {e}")).clone());
    }
    let found = find(Some("wgpu"));
    let device = found.named(&DeviceName::Vulkan(None)).ok().cloned();
    if device.is_none() {
        let is_required = std::env::var("LTXC_REQUIRE_VULKAN").is_ok_and(|v| v == "1");
        assert!(!is_required, "LTXC_REQUIRE_VULKAN is set: {:?}", found.missing);
        println!("absent: {:?}", found.missing);
    }
    device
}

/// There is no recording of one stage alone; it must be finite, complete, and the same twice.
#[test]
fn one_stage_runs_are_complete_and_repeatable() {
    let model = Files::of("ltx2");
    let shape = ShapeArgs {
        pipeline: Some(PipelineName::DistilledOneStage),
        height: Some(64),
        width: Some(96),
        num_frames: Some(17),
        ..ShapeArgs::default()
    };
    let plan = model.compile(&shape, 0);
    let request = || request("rain", &[], BTreeMap::new());
    let (first, second) = (model.run(&plan, &request()), model.run(&plan, &request()));
    assert_eq!(first.frames.len(), 17 * 64 * 96 * 3);
    assert!(first.frames.iter().all(|v| (0.0..=1.0).contains(v)));
    assert!(!first.sound.is_empty() && first.sound.iter().all(|v| v.is_finite()));
    assert_eq!(first.frames, second.frames);
    assert_eq!(first.sound, second.sound);
    assert_eq!(first.tensors, second.tensors);
}

/// A whole run in bf16 and in f16 against the recorded noise's run in f32.
///
/// The analysis of `narrow.rs` expects 1.4e-2 of the velocities and 1.3e-2 of the decoder in bf16, for these models. A run
/// adds velocities over noise levels that fall by 1 in all, so that its latent has about the error of one velocity; errors
/// of the text, the first stage and the upsampler shrink where noise is mixed in, and the decoder adds its own:
/// `√(1.4² + 1.3²) = 1.9e-2`, an eighth of it in f16, times the amplification of the whole chain, which a run in f32 with
/// slightly different noise shows. Twice as much fails, and so does an eighth, which would mean that nothing was computed
/// in the narrow dtype.
#[test]
fn distilled_runs_in_narrow_dtypes_stay_close_to_f32() {
    const NARROW: [(Precision, f64); 2] = [(Precision::Bf16, 1.9e-2), (Precision::F16, 1.9e-2 / 8.0)];
    const DIFFERENT: f32 = 1e-3;
    let mut report = Report::default();
    for family in ["ltx2", "ltx23"] {
        let recorded = Recorded::required(&format!("e2e/{family}/distilled"));
        let run = |dtype, scale: f32| {
            let model = Files::of(family);
            let plan = model.compile(&ShapeArgs { dtype: Some(dtype), ..recorded_shape(&recorded) }, 0);
            let mut noise = recorded_noise(&recorded, &plan);
            for (i, v) in noise.values_mut().flatten().enumerate() {
                *v *= 1.0 + if i.is_multiple_of(2) { scale } else { -scale };
            }
            let prompt = recorded.meta()["params"]["prompt"].as_str().expect("a prompt");
            model.run(&plan, &request(prompt, &[], noise))
        };
        let (exact, other) = (run(Precision::F32, 0.0), run(Precision::F32, DIFFERENT));
        for (dtype, typical) in NARROW {
            let narrow = run(dtype, 0.0);
            let outcomes = [&exact, &narrow, &other];
            for (what, parts) in [("frames", outcomes.map(|o| &o.decoded)), ("sound", outcomes.map(|o| &o.sound))] {
                let [exact, narrow, other] = parts;
                let amplification = relative_l2(other, exact) / f64::from(DIFFERENT);
                let limit = 2.0 * typical * amplification.max(1.0);
                report.check(&format!("{family} {what} in {dtype:?}"), narrow, exact, limit);
                let error = relative_l2(narrow, exact);
                report.note(error >= typical / 8.0, format!("{family} {what}: amplification {amplification:.2}"));
            }
        }
    }
    report.finish();
}

#[track_caller]
fn check_run(case: Case) {
    check_run_on(&Files::of(case.family), case);
}

#[track_caller]
fn check_run_on(model: &Files, case: Case) -> Outcome {
    let mut recorded = case.recorded();
    let params = recorded.meta()["params"].clone();
    let images = images(&params);
    let shape = case.shape();
    let keyframes = images.iter().filter(|i| i.frame > 0).count();
    let plan = model.compile(&shape, keyframes);
    let prompt = params["prompt"].as_str().expect("a prompt");
    let result = model.run(&plan, &request(prompt, &images, recorded_noise(&recorded, &plan)));

    for stage in ["stage1", "stage2"] {
        recorded.check(&format!("{stage}.sigmas"), &result.tensors[&format!("{stage}.sigmas")], DRIVER_LIMIT);
        for modality in ["video", "audio"] {
            check_stage(&mut recorded, &result, &plan, stage, modality);
        }
    }
    // One pass a step.
    for (call, modality) in (0..).flat_map(|i| ["video", "audio"].map(|m| (i, m))) {
        let name = format!("x0_call{call}.{modality}");
        if !recorded.has(&name) {
            break;
        }
        let own = format!("stage1.call{call}.cond.{modality}.x0");
        recorded.check(&name, &result.tensors[&own], RUN_LIMIT);
    }
    check_outputs(&mut recorded, &result, &plan);
    recorded.finish();
    result
}

/// The size of a recorded run.
fn recorded_shape(recorded: &Recorded) -> ShapeArgs {
    let params = &recorded.meta()["params"];
    let number = |key: &str| params[key].as_u64().unwrap_or_else(|| panic!("`{key}` was recorded")) as u32;
    ShapeArgs {
        height: Some(number("height")),
        width: Some(number("width")),
        num_frames: Some(number("num_frames")),
        frame_rate: Some(params["frame_rate"].to_string()),
        vae_tile: tile_flag(recorded.meta()["tiling"].as_str().unwrap_or_default(), params),
        ..ShapeArgs::default()
    }
}

/// A run with the plan's noise levels; noise that is not given is drawn.
fn request<'a>(prompt: &'a str, images: &'a [Conditioning], given: BTreeMap<String, Vec<f32>>) -> Request<'a> {
    let noise = Noise { seed: 0, given, ..Noise::default() };
    Request { prompt, images, noise, ..Request::default() }
}

/// `64/32` pixels and `16/8` frames as a flag. The recorded object of release 1.2.0 names the tile of each axis; those
/// runs fit into one tile either way.
fn tile_flag(text: &str, params: &Value) -> Option<String> {
    let spelled = params["tiling"].as_str().unwrap_or(text);
    let numbers: Vec<&str> = spelled.split(|c: char| !c.is_ascii_digit()).filter(|s| !s.is_empty()).collect();
    let [space, space_overlap, time, time_overlap] = numbers[..] else { return None };
    Some(format!("{space}x{space_overlap},{time}x{time_overlap}"))
}

fn images(params: &Value) -> Vec<Conditioning> {
    let listed = params["images"].as_array().cloned().unwrap_or_default();
    let image = |i: &Value| Conditioning {
        image: load_image(&root().join("inputs").join(i["image"].as_str().expect("a name"))).expect("it can be read"),
        frame: i["frame_idx"].as_u64().expect("a frame") as u32,
        strength: i["strength"].as_f64().expect("a strength"),
    };
    listed.iter().map(image).collect()
}

/// The recorded noise, split where appended tokens begin.
fn recorded_noise(recorded: &Recorded, plan: &Plan) -> BTreeMap<String, Vec<f32>> {
    let mut given = BTreeMap::new();
    for stage in &plan.pipeline.stages {
        let values = recorded.file.tensor(&format!("{}.video.noise", stage.name)).to_f32();
        let target = stage.grid.iter().product::<u32>() as usize * plan.pipeline.video.channels as usize;
        let (own, extra) = values.split_at(target);
        given.insert(format!("{}.video", stage.name), own.to_vec());
        given.insert(format!("{}.video.extra", stage.name), extra.to_vec());
        let audio = recorded.file.tensor(&format!("{}.audio.noise", stage.name)).to_f32();
        given.insert(format!("{}.audio", stage.name), audio);
    }
    given
}

fn check_stage(recorded: &mut Recorded, result: &Outcome, plan: &Plan, stage: &str, modality: &str) {
    check_state(recorded, result, plan, stage, modality);
    check_steps(recorded, result, stage, modality);
}

/// What a stage starts from.
fn check_state(recorded: &mut Recorded, result: &Outcome, plan: &Plan, stage: &str, modality: &str) {
    let own = |what: &str| &result.tensors[&format!("{stage}.{modality}.{what}")];
    // Images pass through the encoder, a first stage through the whole model, before they are here.
    let limit = if stage == "stage1" { 1e-5 } else { RUN_LIMIT };
    // The reference freezes a state after noise was added, and masks were recorded between the two.
    let is_frozen =
        modality == "audio" && plan.pipeline.inputs.sound.as_ref().is_some_and(|sound| sound.role == SoundRole::Kept);
    let mask = own("denoise_mask");
    assert!(!is_frozen || mask.iter().all(|&m| m == 0.0), "{stage}: a frozen modality is denoised");
    let mask = if is_frozen { &vec![1.0; mask.len()] } else { mask };
    recorded.check(&format!("{stage}.{modality}.denoise_mask"), mask, 0.0);
    for (what, limit) in
        [("noise", DRIVER_LIMIT), ("positions", DRIVER_LIMIT), ("noised", limit), ("clean_latent", limit)]
    {
        recorded.check(&format!("{stage}.{modality}.{what}"), own(what), limit);
    }
    let attention = format!("{stage}.{modality}.attention_mask");
    assert_eq!(result.tensors.contains_key(&attention), recorded.has(&attention), "{attention}");
    if recorded.has(&attention) {
        recorded.check(&attention, own("attention_mask"), DRIVER_LIMIT);
    }
    let initial = format!("{stage}.{modality}.initial_latent");
    if recorded.has(&initial) {
        let found = match modality {
            "video" => channels_first(own("initial_latent"), plan.pipeline.video.channels as usize),
            _ => native_audio(own("initial_latent"), plan.pipeline.audio.channels as usize),
        };
        recorded.check(&initial, &found, RUN_LIMIT);
    }
}

fn check_steps(recorded: &mut Recorded, result: &Outcome, stage: &str, modality: &str) {
    for step in 0.. {
        let name = |what: &str| format!("{stage}.step{step}.{modality}.{what}");
        if !recorded.has(&name("latent")) {
            // Steps with two evaluations were recorded as calls.
            let is_other = step == 0 && recorded.has(&format!("{stage}.call0.{modality}.latent"));
            let is_end = !result.tensors.contains_key(&name("latent"));
            assert!(is_other || is_end, "{stage} runs more steps than were recorded");
            break;
        }
        recorded.check(&name("latent"), &result.tensors[&name("latent")], RUN_LIMIT);
        let own = format!("{stage}.call{step}.{modality}.denoised");
        recorded.check(&name("denoised"), &result.tensors[&own], RUN_LIMIT);
    }
}

fn check_outputs(recorded: &mut Recorded, result: &Outcome, plan: &Plan) {
    let video = &plan.pipeline.video;
    let latent = channels_first(&result.tensors["final.video_latent"], video.channels as usize);
    if recorded.has("final.video_latent") {
        recorded.check("final.video_latent", &latent, RUN_LIMIT);
    }
    // A recording that is kept is not decoded.
    if let Some(latent) = result.tensors.get("final.audio_latent") {
        let audio = native_audio(latent, plan.pipeline.audio.channels as usize);
        recorded.check("final.audio_latent", &audio, RUN_LIMIT);
    }
    let sound = channels_first(&result.sound, 2);
    recorded.check("final.waveform", &sound, RUN_LIMIT);
    if recorded.has("final.frames") {
        // The recording is the decoder's output, about [-1, 1] and not clamped; ours leaves the pipeline in [0, 1].
        recorded.check("final.frames", &channels_first(&result.decoded, 3), RUN_LIMIT);
    }
    let frame = video.height as usize * video.width as usize * 3;
    for (name, every) in [("final.frames_uint8", 1), ("final.frames_uint8_every4", 4)] {
        if !recorded.has(name) {
            continue;
        }
        let kept = result.frames.chunks(frame).step_by(every).flatten();
        let found: Vec<i64> = kept.map(|v| (v * 255.0) as i64).collect();
        recorded.check_bytes(name, &found, BYTE_LIMIT);
    }
}

/// `[.., c]` to `[c, ..]`.
fn channels_first(values: &[f32], channels: usize) -> Vec<f32> {
    (0..channels).flat_map(|c| values.iter().skip(c).step_by(channels).copied()).collect()
}

/// Audio tokens `[t, c · 16]` to `[c, t, 16]`.
fn native_audio(tokens: &[f32], channels: usize) -> Vec<f32> {
    let rows = tokens.len() / channels;
    (0..channels / 16)
        .flat_map(|c| (0..rows).flat_map(move |t| (0..16).map(move |m| t * channels + c * 16 + m)))
        .map(|i| tokens[i])
        .collect()
}

/// Model files of a family.
struct Files {
    args: ModelArgs,
    folders: Vec<PathBuf>,
    device: Device,
    options: Options,
}

impl Files {
    fn of(family: &str) -> Files {
        let (folder, model, upsampler) = match family {
            "ltx2" => ("tiny-ltx2", "ltx-2-tiny", "spatial-upscaler-x2-tiny"),
            _ => ("tiny-ltx23", "ltx-2.3-tiny", "spatial-upscaler-x2-ltx23-tiny"),
        };
        let file = |name: &str| root().join(folder).join(format!("{name}.safetensors"));
        let gemma = root().join("tiny-gemma3");
        let args = ModelArgs {
            checkpoint_path: Some(file(model)),
            gemma_root: Some(gemma.clone()),
            spatial_upsampler_path: Some(file(upsampler)),
            verify: true,
            ..ModelArgs::default()
        };
        let device = find(Some("cpu")).named(&DeviceName::Cpu).expect("there is a processor").clone();
        Files { args, folders: vec![root().join(folder), gemma], device, options: Options::default() }
    }

    /// Compiles, and passes the plan through its file format.
    fn compile(&self, shape: &ShapeArgs, keyframes: usize) -> Plan {
        self.compile_for(shape, keyframes, &self.loras(&Value::Null))
    }

    /// The same for adapters.
    fn compile_for(&self, shape: &ShapeArgs, keyframes: usize, loras: &Loras) -> Plan {
        let shape = Shape::resolve(shape, keyframes).and_then(|s| s.with(loras)).unwrap_or_else(|e| panic!("{e:#}"));
        let references = References { frames: Some(conditioned::reference_length()), ..shape.references };
        let shape = Shape { target: self.device.target.clone(), references, ..shape };
        let files = ModelFiles::of_pipeline(&self.args, shape.pipeline, true).unwrap_or_else(|e| panic!("{e:#}"));
        let options = self.options.clone();
        let plan = compile(&files, &shape, options, &mut |_, _, _| {}).unwrap_or_else(|e| panic!("{e:#}"));
        let bytes = container::encode(&plan).unwrap_or_else(|e| panic!("{e}"));
        container::decode(&bytes).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The adapters of a recorded run.
    fn loras(&self, params: &Value) -> Loras {
        let path = |key: &str| Some(self.folders[0].join(params[key].as_str()?).display().to_string());
        let strength = params["distilled_lora_strength"].as_f64().unwrap_or(1.0);
        let args = AdapterArgs {
            lora: path("lora").into_iter().collect(),
            distilled_lora: path("distilled_lora").map(|path| vec![path, strength.to_string()]).unwrap_or_default(),
            distilled_lora_strength_stage_1: params["strength_stage_1"].as_f64(),
            distilled_lora_strength_stage_2: params["strength_stage_2"].as_f64(),
            ..AdapterArgs::default()
        };
        Loras::open(&args, &vec![1; args.lora.len()]).unwrap_or_else(|e| panic!("{e:#}"))
    }

    /// What they do in the stages of a plan.
    fn stage_adapters(&self, plan: &Plan, loras: &Loras) -> StageAdapters {
        if loras.is_empty() {
            return StageAdapters::default();
        }
        let weights = WeightFiles::open(plan, &self.folders, true).unwrap_or_else(|e| panic!("{e}"));
        let targets = adapters::targets(plan, &weights).unwrap_or_else(|e| panic!("{e:#}"));
        let fits = loras.fit(&targets, &plan.pipeline.name).unwrap_or_else(|e| panic!("{e:#}"));
        let mode = adapters::mode(None, plan);
        loras.stages(fits, &plan.pipeline, mode, &mut Default::default()).unwrap_or_else(|e| panic!("{e:#}")).0
    }

    fn run(&self, plan: &Plan, request: &Request<'_>) -> Outcome {
        let weights = WeightFiles::open(plan, &self.folders, true).unwrap_or_else(|e| panic!("{e}"));
        let tokenizer = Tokenizer::from_folder(&root().join("tiny-gemma3")).unwrap_or_else(|e| panic!("{e}"));
        let interrupt = AtomicBool::new(false);
        let backend = open(&self.device).unwrap_or_else(|e| panic!("{e}"));
        let mut executor = Executor::on(backend, plan, &weights, &interrupt).unwrap_or_else(|e| panic!("{e}"));
        let (mut observer, mut output) = (Collected::default(), Collected::default());
        run(&mut executor, tokenizer, request, &mut observer, &mut output).unwrap_or_else(|e| panic!("{e}"));
        let mut tensors = observer.outcome.tensors;
        let decoded = tensors.remove("final.frames").unwrap_or_default();
        Outcome { tensors, decoded, ..output.outcome }
    }
}

/// What a run gave.
#[derive(Default)]
struct Outcome {
    tensors: BTreeMap<String, Vec<f32>>,
    /// Frames as decoded.
    decoded: Vec<f32>,
    /// Frames as written.
    frames: Vec<f32>,
    sound: Vec<f32>,
}

#[derive(Default)]
struct Collected {
    outcome: Outcome,
}

impl Observer for Collected {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Tensor { name, values } = event {
            // Frames come in chunks.
            self.outcome.tensors.entry(name).or_default().extend_from_slice(values);
        }
    }
}

impl Output for Collected {
    fn frames(&mut self, rgb: &[f32]) -> Result<(), RunError> {
        self.outcome.frames.extend_from_slice(rgb);
        Ok(())
    }

    fn sound(&mut self, samples: &[f32], _: u32) -> Result<(), RunError> {
        self.outcome.sound.extend_from_slice(samples);
        Ok(())
    }
}
