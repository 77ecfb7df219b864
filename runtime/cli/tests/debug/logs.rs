//! Taps, sums, traces and profiles of ordinary runs.

use ltxc::debug::entries::{Log, parse};
use ltxc::debug::recording::TensorFile;
use serde_json::Value;

use crate::binary::{Done, Place, SHAPE, tiny, with};
use crate::root;

fn render(place: &Place, more: &[&str]) -> Done {
    place.ok(&with(tiny().run_args(), more))
}

fn log(place: &Place, name: &str) -> Log {
    parse(&String::from_utf8(place.read(name)).expect("logs are text"))
}

/// The value of a key on the line that `at` counts.
#[track_caller]
fn value(log: &Log, key: &str, at: usize) -> f64 {
    let entry = log.entries.iter().find(|e| e.key() == key && e.occurrence == at);
    entry.unwrap_or_else(|| panic!("no `{key}` at {at}")).value
}

#[test]
fn looking_changes_neither_the_plan_nor_the_output() {
    let place = Place::new();
    let base = ["-p", "a fox", "-o", "a.mp4", "--no-metadata"];
    render(&place, &base);
    let all = [
        "-p",
        "a fox",
        "-o",
        "b.mp4",
        "--no-metadata",
        "--tap",
        "*",
        "--tap-path",
        "taps.safetensors",
        "--check-nan",
        "--debug-stage-sums-path",
        "stage.log",
        "--debug-model-sums-path",
        "model.log",
        "--debug-module-sums-path",
        "module.log",
        "--debug-model-detail-path",
        "detail.log",
        "--debug-gemma-path",
        "gemma.log",
        "--profile",
        "profile.json",
        "--trace-activations",
        "--trace-output",
        "trace.jsonl",
    ];
    render(&place, &all);
    assert_eq!(place.read("a.mp4"), place.read("b.mp4"));
    // A plan that is compiled for a run with taps is the plan that is compiled without.
    let compile = [
        &["compile".to_string()],
        &tiny().model_args()[..],
        &SHAPE.map(String::from),
        &["-o".into(), "x.ltxplan".into()],
    ];
    place.ok(&compile.concat());
    let run = [&["run".to_string()], &tiny().model_args()[..], &SHAPE.map(String::from)].concat();
    place.ok(&with(run, &["-p", "a fox", "-o", "c.mp4", "--tap", "transformer.*", "--tap-path", "t.safetensors"]));
    let cached = std::fs::read_dir(place.path("cache")).unwrap().flatten().next().expect("a plan was compiled").path();
    assert_eq!(std::fs::read(cached).unwrap(), place.read("x.ltxplan"));
}

#[test]
fn taps_hold_the_values_that_were_named() {
    let place = Place::new();
    let taps = ["-p", "x", "-o", "a.wav", "--tap", "transformer.blocks.*.video", "--tap-exclude", "*.blocks.1.*"];
    render(
        &place,
        &with(taps.map(String::from).into(), &["--tap-path", "t.safetensors"])
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    );
    let file = TensorFile::open(&place.path("t.safetensors")).unwrap();
    let names: Vec<&str> = file.iter().map(|(n, _)| n).collect();
    assert!(names.contains(&"transformer.blocks.0.video@stage1.step0"), "{names:?}");
    assert!(names.contains(&"transformer.blocks.0.video@stage2.step2"), "{names:?}");
    assert!(!names.iter().any(|n| n.contains("blocks.1.")), "{names:?}");
    let tensor = file.find("transformer.blocks.0.video@stage1.step0").unwrap();
    assert!(tensor.floats().iter().all(|v| v.is_finite()) && tensor.floats().iter().any(|v| *v != 0.0));
    // Values inside fused kernels are not there, and the run says how to get them.
    let done = render(&place, &["-p", "x", "-o", "a.wav", "--tap", "*.attn1.nothing", "--tap-path", "u.safetensors"]);
    assert!(done.stderr.contains("--debug-mode exact"), "{}", done.stderr);
}

#[test]
fn exact_mode_has_every_layer_and_needs_model_files() {
    let place = Place::new();
    let run = [&["run".to_string()], &tiny().model_args()[..], &SHAPE.map(String::from)].concat();
    let more = [
        "-p",
        "x",
        "-o",
        "a.wav",
        "--debug-mode",
        "exact",
        "--debug-model-detail-path",
        "d.log",
        "--debug-gemma-path",
        "g.log",
    ];
    place.ok(&with(run, &more));
    let detail = log(&place, "d.log");
    for layer in
        ["attn1", "attn2", "ff", "audio_attn1", "audio_attn2", "audio_ff", "audio_to_video_attn", "video_to_audio_attn"]
    {
        value(&detail, &format!("block=0:{layer}.out_sum"), 0);
        value(&detail, &format!("block=1:{layer}.out_sum"), 10);
    }
    value(&detail, "output:proj_out.out_sum", 0);
    let gemma = log(&place, "g.log");
    let states = gemma.entries.iter().filter(|e| e.about.starts_with("gemma_hidden_state_")).count();
    let sum: f64 = gemma.entries.iter().filter(|e| e.about.starts_with("gemma_hidden_state_")).map(|e| e.value).sum();
    assert!(states > 2 && (value(&gemma, "gemma_hidden_states_stack.sum", 0) - sum).abs() < 1e-2 * sum.abs().max(1.0));
    place
        .refused(&with(tiny().run_args(), &["-p", "x", "-o", "a.wav", "--debug-mode", "exact"]), &["name model files"]);
}

#[test]
fn stage_sums_are_repeatable_and_name_every_stage() {
    let place = Place::new();
    for name in ["a.log", "b.log"] {
        render(&place, &["-p", "x", "-o", "a.wav", "--debug-prefix", "fastvideo", "--debug-stage-sums-path", name]);
    }
    assert_eq!(place.read("a.log"), place.read("b.log"));
    let text = String::from_utf8(place.read("a.log")).unwrap();
    assert!(text.starts_with("# ltxc ") && text.contains("mode=fused") && text.contains("seed=10"), "{text}");
    let stages: Vec<&str> =
        text.lines().filter_map(|l| l.strip_prefix("fastvideo:stage=")?.split(' ').next()).collect();
    let expected = [
        "LTX2TextEncodingStage",
        "LTX2RefineInitStage",
        "LTX2LatentPreparationStage",
        "LTX2DenoisingStage",
        "LTX2UpsampleStage",
        "LTX2DenoisingStage",
        "DecodingStage",
        "LTX2AudioDecodingStage",
    ];
    assert_eq!(stages, expected);
    // One batch goes through all of them there; here every stage tells what it made.
    let line = |text: &str, stage: &str| {
        let line = text.lines().find(|l| l.contains(&format!("stage={stage} "))).unwrap_or_else(|| panic!("{text}"));
        line.to_string()
    };
    assert!(line(&text, "LTX2DenoisingStage").contains(" prompt_embeds="), "{text}");
    render(&place, &["-p", "x", "-o", "a.wav", "--debug-stage-sums-path", "own.log"]);
    let own = String::from_utf8(place.read("own.log")).unwrap();
    let field = |line: String| line.split(' ').find(|f| f.starts_with("latents=")).map(String::from);
    for stage in ["LTX2LatentPreparationStage", "LTX2DenoisingStage", "LTX2UpsampleStage"] {
        assert!(!line(&own, stage).contains("prompt_embeds"), "{own}");
        assert_eq!(field(line(&own, stage)), field(line(&text, stage)));
    }
    // The line about the first latents is about the noise, which is known without a model.
    let found = value(&parse(&text), "stage=LTX2LatentPreparationStage.latents", 0);
    let file = TensorFile::open(&saved_noise(&place)).unwrap();
    let sum: f64 = file.find("noise").unwrap().floats().iter().sum();
    assert!((found - sum).abs() < 1e-3, "{found} {sum}");
}

/// The noise of the first stage of the shared plan, as a run saves it.
fn saved_noise(place: &Place) -> std::path::PathBuf {
    let path = place.path("noise.safetensors");
    render(place, &["-p", "x", "-o", "n.wav", "--ltx2-initial-latent-path", &path.display().to_string()]);
    path
}

#[test]
fn model_sums_come_once_for_each_call_of_the_model() {
    let place = Place::new();
    render(&place, &["-p", "x", "-o", "a.wav", "--debug-model-sums-path", "m.log", "--debug-format", "both"]);
    let text = String::from_utf8(place.read("m.log")).unwrap();
    let blocks = text.lines().filter(|l| l.starts_with("ltxc:block=0:")).count();
    // Eight steps and three.
    assert_eq!(blocks, 11, "{text}");
    for key in [
        "gemma_feature:sum=",
        "gemma_video_encoding:sum=",
        "modality_video:latent_sum=",
        "patchify_proj:video_w_sum=",
        "prep_audio:",
    ] {
        assert!(text.contains(&format!("ltxc:{key}")), "no `{key}` in\n{text}");
    }
    let lines = String::from_utf8(place.read("m.log.jsonl")).unwrap();
    let objects: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let block = objects.iter().find(|o| o["key"] == "block=0").unwrap();
    assert_eq!((block["step"].as_u64(), block["pass"].as_str()), (Some(0), Some("cond")));
    // Both forms hold the same numbers.
    let done = place.ok(&["debug", "compare", "m.log", "m.log.jsonl"]);
    assert!(done.stdout.contains("agree"), "{}", done.stdout);
}

/// The second stage of 9 frames of 64x64 is eight tiles of one latent each.
#[test]
fn stages_in_tiles_are_listed_tile_by_tile() {
    const TILES: usize = 8;
    let place = Place::new();
    let file = |name: &str| root().join(name).display().to_string();
    let clip = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/clips/reordered.mp4");
    let mut args =
        ["run", "--pipeline", "hdr-ic-lora", "--device", "cpu", "-p", "x", "-o", "a"].map(String::from).to_vec();
    for (flag, value) in [
        ("--checkpoint-path", file("tiny-ltx2/ltx-2-tiny.safetensors")),
        ("--gemma-root", file("tiny-gemma3")),
        ("--spatial-upsampler-path", file("tiny-ltx2/spatial-upscaler-x2-tiny.safetensors")),
        ("--lora", file("tiny-ltx2/ic-lora-tiny.safetensors")),
        ("--video-conditioning", clip.into()),
        ("--debug-stage-sums-path", "s.log".into()),
        ("--debug-model-sums-path", "m.log".into()),
        ("--debug-format", "both".into()),
        ("--tap", "transformer.blocks.0.video".into()),
        ("--tap-path", "t.safetensors".into()),
    ] {
        args.extend([flag.to_string(), value]);
    }
    place.ok(&args);

    let text = String::from_utf8(place.read("s.log")).unwrap();
    let lines: Vec<&str> = text.lines().skip(1).map(|line| line.split(' ').take(2).last().unwrap_or(line)).collect();
    let comments: Vec<&str> = lines.iter().copied().filter(|line| line.starts_with("tile=")).collect();
    let expected: Vec<String> = (0..TILES).map(|i| format!("tile={i}")).chain(["tile=all".into()]).collect();
    assert_eq!(comments, expected, "{text}");
    let stages = log(&place, "s.log");
    let of = |key: &str, tile: Option<usize>| -> Vec<f64> {
        let tile = tile.map(|tile| format!("tile={tile}"));
        stages.entries.iter().filter(|e| e.key() == key && e.step == tile).map(|e| e.value).collect()
    };
    let [upsampled] = of("stage=LTX2UpsampleStage.latents", None)[..] else { panic!("one line of the whole\n{text}") };
    // The first stage, and what the tiles of the second are blended to.
    let [first, blended] = of("stage=LTX2DenoisingStage.latents", None)[..] else { panic!("two stages\n{text}") };
    let mut sum = 0.0;
    for tile in 0..TILES {
        let one = |key: &str| {
            let [value] = of(key, Some(tile))[..] else { panic!("tile {tile}: one `{key}`\n{text}") };
            value
        };
        assert_eq!(one("stage=LTX2LatentPreparationStage.extra.ltx2_video_denoise_mask"), 1.0, "tile {tile}");
        // A reference stays as it is, and is not of the result.
        sum += one("stage=LTX2DenoisingStage.latents")
            - one("stage=LTX2LatentPreparationStage.extra.ltx2_video_clean_latent");
    }
    // Tiles that do not overlap make up the whole.
    assert!((blended - upsampled - sum).abs() < 1e-3, "{blended} {upsampled} {sum}\n{text}");
    assert!(first != blended && blended != upsampled);

    // Eight steps, and two of every tile; both forms of a log say the same.
    let model = log(&place, "m.log");
    let steps: Vec<_> =
        model.entries.iter().filter(|e| e.key() == "block=0.video_sum").map(|e| e.step.as_deref()).collect();
    assert_eq!(steps.len(), 8 + 2 * TILES);
    assert_eq!((steps[7], steps[23]), (Some("step=7 pass=cond"), Some("tile=7 step=1 pass=cond")));
    for (a, b) in [("s.log", "s.log.jsonl"), ("m.log", "m.log.jsonl")] {
        let done = place.ok(&["debug", "compare", a, b]);
        assert!(done.stdout.contains("agree"), "{}", done.stdout);
    }
    let taps = TensorFile::open(&place.path("t.safetensors")).unwrap();
    assert!(taps.find("transformer.blocks.0.video@stage2.tile.007.step1").is_some());
}

#[test]
fn module_sums_and_traces_choose_by_name_and_step() {
    let place = Place::new();
    let more = [
        "-p",
        "x",
        "-o",
        "a.wav",
        "--debug-module-sums-path",
        "s.log",
        "--debug-module-sums-include",
        "transformer.transformer_blocks",
        "--debug-module-sums-exclude",
        "audio",
        "--trace-activations",
        "--trace-layers",
        r"\.0\.",
        "--trace-steps",
        "1",
        "--trace-stats",
        "abs_mean,shape,dtype",
        "--trace-names",
        "fastvideo",
        "--trace-output",
        "t-<pid>.jsonl",
    ];
    render(&place, &more);
    let text = String::from_utf8(place.read("s.log")).unwrap();
    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    assert!(
        !lines.is_empty() && lines.iter().all(|l| l.starts_with("ltxc:module=transformer.") && !l.contains("audio")),
        "{text}"
    );
    assert!(
        lines[0].contains(":out_sum=") && lines[0].contains(" shape=(") && lines[0].contains(" dtype=f32"),
        "{}",
        lines[0]
    );
    let trace = place.listing().into_keys().find(|p| p.extension().is_some_and(|e| e == "jsonl")).expect("a trace");
    let text = std::fs::read_to_string(trace).unwrap();
    let records: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(!records.is_empty());
    for r in &records {
        let module = r["module"].as_str().unwrap();
        assert!(module.starts_with("model.transformer_blocks.0.") || module.contains(".0."), "{module}");
        assert_eq!(
            (r["step"].as_u64(), r["tensor"].as_str(), r["dtype"].as_str()),
            (Some(1), Some("out"), Some("torch.float32"))
        );
        assert!(r["abs_mean"].is_f64() && r["shape"].is_array() && r.get("sum").is_none());
    }
}

#[test]
fn a_profile_opens_as_a_trace() {
    let place = Place::new();
    render(&place, &["-p", "x", "-o", "a.wav", "--profile", "p.json"]);
    let profile: Value = serde_json::from_slice(&place.read("p.json")).unwrap();
    let events = profile["traceEvents"].as_array().unwrap();
    let kernels: Vec<&Value> = events.iter().filter(|e| e["cat"] == "kernel").collect();
    assert!(kernels.len() > 100);
    assert!(kernels.iter().all(|e| e["ph"] == "X" && e["dur"].as_f64() >= Some(0.0) && e["args"]["bytes"].is_u64()));
    for category in ["program", "upload"] {
        assert!(events.iter().any(|e| e["cat"] == category), "{category}");
    }
    assert!(events.iter().any(|e| e["ph"] == "C"));
    // Kernels of a program lie inside of it.
    let program = events.iter().find(|e| e["cat"] == "program" && e["name"] == "stage1").unwrap();
    let (start, end) =
        (program["ts"].as_f64().unwrap(), program["ts"].as_f64().unwrap() + program["dur"].as_f64().unwrap());
    assert!(kernels.iter().filter(|k| (start..end).contains(&k["ts"].as_f64().unwrap())).count() > 10);
}

#[test]
fn environment_variables_of_other_tools_work() {
    let place = Place::new();
    let mut command = place.command(&with(tiny().run_args(), &["-p", "x", "-o", "a.wav"]));
    command.env("FASTVIDEO_DEBUG_STAGE_SUMS_PATH", place.path("e.log")).env("LTX2_DEBUG_DIR", place.path("logs"));
    assert!(command.output().unwrap().status.success());
    assert!(!log(&place, "e.log").entries.is_empty());
    assert!(!log(&place, "logs/fastvideo.log").entries.is_empty());
    assert!(place.path("logs/fastvideo_detail.log").exists());
}

#[test]
fn logs_begin_anew_or_go_on_and_hold_sums_in_both_widths() {
    let place = Place::new();
    let run = |more: &[&str]| {
        render(&place, &[&["-p", "x", "-o", "a.wav", "--debug-stage-sums-path", "deep/s.log"], more].concat());
        String::from_utf8(place.read("deep/s.log")).unwrap()
    };
    let once = run(&[]);
    let header = once.lines().next().unwrap();
    for part in ["# ltxc ", " plan=", " device=cpu", " dtype=f32", " seed=10", " attention=plain", " decoder_noise=on"]
    {
        assert!(header.contains(part), "no `{part}` in {header}");
    }
    // Files begin anew, or go on.
    assert_eq!(run(&[]), once);
    assert_eq!(run(&["--debug-append"]), once.repeat(2));
    // Every sum has the same one in f64 behind it.
    let wide = run(&["--debug-f64"]);
    let log = parse(&wide);
    let sums = log.entries.iter().filter(|e| !e.field.ends_with("_f64"));
    let mut count = 0;
    for entry in sums {
        let other = log.entries.iter().find(|e| {
            e.about == entry.about && e.occurrence == entry.occurrence && e.field == format!("{}_f64", entry.field)
        });
        let other = other.unwrap_or_else(|| panic!("`{}` has no sum in f64", entry.key()));
        assert!((entry.value - other.value).abs() <= 1e-3 * (1.0 + entry.value.abs()), "{entry:?} {other:?}");
        count += 1;
    }
    assert!(count > 10, "{wide}");
    // The reference of a comparison may come from the environment.
    place.write("theirs.log", once.as_bytes());
    run(&[]);
    let mut command = place.command(&["debug", "compare", "deep/s.log"]);
    command.env("FASTVIDEO_DEBUG_REF_SUMS_PATH", place.path("theirs.log"));
    assert!(command.output().unwrap().status.success());
    place.refused(&["debug", "compare", "deep/s.log"], &["no log to compare with", "FASTVIDEO_DEBUG_REF_SUMS_PATH"]);
    // Noise of decoders can be left out, as another tool's variable says.
    let mut command =
        place.command(&with(tiny().run_args(), &["-p", "x", "-o", "a.wav", "--debug-stage-sums-path", "n.log"]));
    command.env("LTX2_DISABLE_VAE_NOISE", "1");
    assert!(command.output().unwrap().status.success());
    assert!(String::from_utf8(place.read("n.log")).unwrap().contains("decoder_noise=off"));
}

#[test]
fn two_logs_are_compared_by_name_whatever_tool_wrote_them() {
    let place = Place::new();
    for (name, seed) in [("a.log", "1"), ("b.log", "1"), ("c.log", "2")] {
        render(&place, &["-p", "x", "-o", "a.wav", "--seed", seed, "--debug-model-sums-path", name]);
    }
    place.ok(&["debug", "compare", "a.log", "b.log"]);
    let done = place.run(&["debug", "compare", "a.log", "c.log", "--json"]);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap();
    // Text comes first and is the same; noise is not.
    assert_eq!(facts["first"]["key"], "modality_video.latent_sum");
    assert!(facts["likely_cause"].as_str().unwrap().contains("noise"), "{facts}");
    place.refused(&["debug", "compare", "a.log", "none.log"], &["none.log"]);
    place.write("junk.log", b"nothing of use\n");
    place.refused(&["debug", "compare", "a.log", "junk.log"], &["junk.log", "no line"]);
}

#[test]
fn a_page_draws_every_program_without_anything_outside() {
    let place = Place::new();
    let plan = tiny().plan.display().to_string();
    place.ok(&["inspect", &plan, "--html", "x.html"]);
    let page = String::from_utf8(place.read("x.html")).unwrap();
    for name in ["stage1", "stage2.generation", "upsample", "decode_audio"] {
        assert!(page.contains(&format!("<section id='p-{name}'>")), "{name}");
    }
    assert!(page.matches("<svg").count() > 40 && page.contains("roofline") && page.contains("fused "));
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script"));
    // An attribute without quotes would swallow the slash that ends its element.
    let unquoted = page.match_indices("/>").filter(|(at, _)| !page[..*at].ends_with(['\'', '"', ' '])).count();
    assert_eq!(unquoted, 0);
    place.refused(&["inspect", &plan, "--html", "y.html", "--peak-gflops", "0"], &["above 0"]);
}
