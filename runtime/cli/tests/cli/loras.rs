//! Adapters on the command line: what they do to a run, and how they are refused.

use std::path::PathBuf;

use serde_json::Value;

use crate::binary::{Place, SHAPE, fixtures, with};

pub fn fixture(name: &str) -> String {
    fixtures().join(format!("{name}.safetensors")).display().to_string()
}

/// The flags that name the model files of a family.
pub fn files(family: &str) -> Vec<String> {
    let (model, upsampler) = match family {
        "ltx2" => ("tiny-ltx2/ltx-2-tiny", "tiny-ltx2/spatial-upscaler-x2-tiny"),
        _ => ("tiny-ltx23/ltx-2.3-tiny", "tiny-ltx23/spatial-upscaler-x2-ltx23-tiny"),
    };
    let gemma = fixtures().join("tiny-gemma3").display().to_string();
    ["--checkpoint-path", &fixture(model), "--gemma-root", &gemma, "--spatial-upsampler-path", &fixture(upsampler)]
        .map(String::from)
        .into()
}

/// `run` with the files of a family, a prompt and a device that is everywhere.
fn run(family: &str, more: &[&str]) -> Vec<String> {
    let args = [vec!["run".to_string()], files(family)].concat();
    with(args, &[&SHAPE[..], &["--device", "cpu", "-p", "rain", "-o", "a.wav"], more].concat())
}

/// The sound that a run makes.
#[track_caller]
fn sound(place: &Place, args: &[String]) -> Vec<u8> {
    place.ok(args);
    place.read("a.wav")
}

#[test]
fn adapters_act_as_they_are_told() {
    let (place, lora) = (Place::new(), fixture("tiny-ltx2/lora-rank4-tiny"));
    let distilled = fixture("tiny-ltx2/distilled-lora-tiny");
    let with = |more: &[&str]| sound(&place, &run("ltx2", more));
    let plain = with(&[]);
    let half = with(&["--lora", &lora, "0.5"]);
    assert!(half == with(&["--lora", &lora, "0.5"]), "the same seed gives other bytes");
    assert!(half == with(&["--lora", &lora, "0.5", "stage=1,2"]), "all stages are the default");
    assert!(plain == with(&["--lora", &lora, "0"]), "a strength of 0 does something");
    let both = with(&["--lora", &lora, "0.5", "--lora", &distilled]);
    let others = [
        plain,
        half,
        both,
        with(&["--lora", &lora]),
        with(&["--lora", &lora, "-0.5"]),
        with(&["--lora", &lora, "0.5", "stage=1"]),
        with(&["--lora", &lora, "stage=2", "0.5"]),
    ];
    for (i, a) in others.iter().enumerate() {
        assert!(others[..i].iter().all(|b| a != b), "run {i} is like an earlier one");
    }
}

#[test]
fn plans_with_room_for_adapters_run_them_live() {
    let (place, lora) = (Place::new(), fixture("tiny-ltx2/lora-rank4-tiny"));
    let compile = |rank: &str, plan: &str| {
        let args = [vec!["compile".to_string()], files("ltx2")].concat();
        place.ok(&with(args, &[&SHAPE[..], &["--device", "cpu", "--lora-rank", rank, "-o", plan]].concat()));
    };
    compile("4", "live.ltxplan");
    compile("0", "plain.ltxplan");
    let weights = fixtures().display().to_string();
    let run = |plan: &str, more: &[&str]| {
        let args = ["run", plan, "--weights", &weights, "-p", "rain", "-o", "a.wav"].map(String::from);
        with(args.into(), more)
    };
    let sound = |plan: &str, more: &[&str]| sound(&place, &run(plan, more));
    let live = sound("live.ltxplan", &["--lora", &lora]);
    assert!(live == sound("live.ltxplan", &["--lora", &lora, "--lora-mode", "live"]), "live is not the default");
    let plain = sound("live.ltxplan", &[]);
    assert!(live != plain, "the adapter does nothing");
    let merged = sound("live.ltxplan", &["--lora", &lora, "--lora-mode", "merged"]);
    assert!(merged != plain && merged != live, "merging rounds");
    assert!(merged == sound("plain.ltxplan", &["--lora", &lora]), "slots without adapters do something");
    let half = &["--lora", &lora, "--lora-mode", "live"];
    place.refused(&run("plain.ltxplan", half), &["no slots for live adapters", "--lora-rank", "--lora-mode merged"]);
    let two = &["--lora", &lora, "--lora", &fixture("tiny-ltx2/distilled-lora-tiny")];
    place.refused(&run("live.ltxplan", two), &["add up to 8, the plan has slots of 4", "--lora-rank 8"]);
}

/// A full model with the distilled adapter is a distilled one; here it is the same file under another name.
#[test]
fn a_dev_model_acts_distilled_with_its_adapter() {
    let place = Place::new();
    std::fs::copy(fixture("tiny-ltx2/ltx-2-tiny"), place.path("ltx-2-tiny-dev.safetensors")).unwrap();
    let distilled = fixture("tiny-ltx2/distilled-lora-tiny");
    let dev = |more: &[&str]| {
        let mut args = run("ltx2", more);
        let at = args.iter().position(|a| a == "--checkpoint-path").unwrap();
        args[at + 1] = "ltx-2-tiny-dev.safetensors".into();
        args
    };
    place.refused(&dev(&[]), &["is a dev model", "add `--distilled-lora`"]);
    let expected = sound(&place, &run("ltx2", &["--lora", &distilled, "0.5"]));
    assert!(sound(&place, &dev(&["--distilled-lora", &distilled, "0.5"])) == expected);
    let strengths =
        ["--distilled-lora-strength-stage-1", "0.5", "--distilled-lora-strength-stage-2", "0.5", "--distilled-lora"];
    assert!(sound(&place, &dev(&[&strengths[..], &[&distilled]].concat())) == expected);
    std::fs::remove_dir_all(place.path("cache")).unwrap();
    std::fs::remove_file(place.path("a.wav")).unwrap();
    let guided = ["--pipeline", "one-stage", "--distilled-lora", &distilled];
    place
        .refused(&dev(&guided), &["pipeline `one-stage` runs the full model as it is", "leave `--distilled-lora` out"]);

    // A plan that was compiled for the adapter asks for it.
    let mut compile = [vec!["compile".to_string()], files("ltx2")].concat();
    let at = compile.iter().position(|a| a == "--checkpoint-path").unwrap();
    compile[at + 1] = "ltx-2-tiny-dev.safetensors".into();
    let flags = ["--device", "cpu", "--distilled-lora", &distilled, "-o", "a.ltxplan"];
    place.ok(&with(compile, &[&SHAPE[..], &flags].concat()));
    let weights = fixtures().display().to_string();
    let run = ["run", "a.ltxplan", "--weights", ".", "--weights", &weights, "-p", "rain", "-o", "a.wav"];
    place.refused(&run, &["pipeline `distilled` needs the distilled LoRA", "--distilled-lora"]);
    place.ok(&[&run[..], &["--distilled-lora", &distilled]].concat());
}

/// The caches of a place stay empty: what does not fit is refused before anything is compiled.
#[test]
fn adapters_that_do_not_fit_are_refused_before_compiling() {
    let place = Place::new();
    let refused = |family: &str, more: &[&str], words: &[&str]| {
        place.refused(&run(family, more), words);
        let compile = [vec!["compile".to_string()], files(family)].concat();
        place.refused(&with(compile, &[&SHAPE[..], &["--device", "cpu", "-o", "a.ltxplan"], more].concat()), words);
        assert!(!place.path("cache").exists());
    };
    let (ltx2, ltx23) = (fixture("tiny-ltx2/distilled-lora-tiny"), fixture("tiny-ltx23/distilled-lora-tiny"));
    refused("ltx2", &["--lora", &ltx23], &["distilled-lora-tiny", "looks like a LoRA of LTX-2.3 or newer", "LTX-2 ("]);
    refused("ltx23", &["--lora", &ltx2], &["have another shape than in LTX-2.3", "looks like a LoRA of LTX-2: "]);
    for name in ["ic-lora-ref2-tiny", "ic-lora-tiny"] {
        let lora = fixture(&format!("tiny-ltx2/{name}"));
        refused(
            "ltx2",
            &["--lora", &lora],
            &[name, "is an IC-LoRA, which needs reference videos", "`distilled` takes none"],
        );
    }
    refused("ltx2", &["--lora", "nowhere.safetensors"], &["nowhere.safetensors"]);
    refused("ltx2", &["--lora", &ltx2, "strong"], &["strength `strong` is not a number"]);
    refused("ltx2", &["--lora", &ltx2, "1", "stage=x"], &["`stage=x` does not name stages"]);
    refused("ltx2", &["--lora", &ltx2, "1", "2"], &["one value too many"]);
    let twice = ["--distilled-lora", &ltx2, "0.8", "--distilled-lora", &ltx23];
    refused("ltx2", &twice, &["`--distilled-lora` is given as", "leave the other out"]);
    refused("ltx2", &["--lora", &fixture("tiny-ltx2/ltx-2-tiny")], &["holds no LoRA"]);
}

/// The bytes of a fixture with these entries in its header.
pub fn with_header(name: &str, entries: &[(&str, &str)]) -> Vec<u8> {
    let bytes = std::fs::read(fixture(name)).unwrap();
    let (length, rest) = bytes.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    entries.iter().for_each(|(key, value)| header["__metadata__"][*key] = (*value).into());
    let header = header.to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes()[..], &header, data].concat()
}

#[test]
fn loras_for_references_are_recognised_by_header_and_name() {
    let place = Place::new();
    let plain = "tiny-ltx2/lora-rank4-tiny";
    let (frames, done) = (crate::inputs::folder(&place, "frames", 9), |args: &[String]| place.ok(args).stderr);
    let of = |pipeline: &str, lora: &str, more: &[&str]| {
        let start = ["--pipeline", pipeline, "--lora", lora, "--steps", "1", "--size", "128x128"];
        let mut args = run("ltx2", &[&start[..], more].concat());
        for flag in ["--height", "--width"] {
            let at = args.iter().position(|arg| arg == flag).unwrap();
            args.drain(at..at + 2);
        }
        args
    };
    let video = ["--video-conditioning", &frames];
    // A name proves nothing, and the want of any sign does neither.
    for (name, is_like) in
        [("depth-control", true), ("x-union-control-ref0.5", true), ("LTX_Camera_Control_Static", false)]
    {
        let file = format!("{name}.safetensors");
        place.write(&file, &std::fs::read(fixture(plain)).unwrap());
        let said = done(&of("distilled", &file, &[]));
        assert_eq!(said.contains("is called like a LoRA for reference videos"), is_like, "{said}");
        let said = done(&of("ic-lora", &file, &video));
        assert_eq!(said.contains("neither header nor name"), !is_like, "{said}");
    }
    // A header does.
    let refused = |args: &[String], words: &[&str]| crate::binary::sentence(&place.run(args), words);
    place.write("light.safetensors", &with_header(plain, &[("hdr_transform", "logc3")]));
    refused(&of("distilled", "light.safetensors", &[]), &["light.safetensors", "is an IC-LoRA", "takes none"]);
    refused(&of("ic-lora", "light.safetensors", &video), &["makes LogC3", "--hdr LOGC3", "hdr-ic-lora"]);
    let mut hdr = of("ic-lora", "light.safetensors", &[&video[..], &["--hdr", "LOGC3"]].concat());
    *hdr.iter_mut().find(|arg| *arg == "a.wav").unwrap() = "exr".into();
    place.ok(&hdr);
    place.write("dark.safetensors", &with_header(plain, &[("use_hdr_transform", "false")]));
    let hdr = of("hdr-ic-lora", "dark.safetensors", &[&video[..], &["--frame-rate", "24"]].concat());
    refused(&hdr, &["dark.safetensors", "makes no high dynamic range"]);
}

#[test]
fn the_strength_that_acts_is_said() {
    let place = Place::new();
    let (lora, distilled) = (fixture("tiny-ltx2/lora-rank4-tiny"), fixture("tiny-ltx2/distilled-lora-tiny"));
    let flags = ["--pipeline", "hq", "--steps", "1", "--lora", &lora, "-0.5", "--distilled-lora", &distilled];
    let said = place.ok(&run("ltx2", &flags)).stderr;
    assert!(said.contains("lora-rank4-tiny.safetensors: 24 layers, strength -0.5, alpha/rank 1"), "{said}");
    assert!(said.contains("layers, strength 0.25 in stage1 and 0.5 in stage2, alpha/rank 1"), "{said}");
    let said = place.ok(&run("ltx2", &["--lora", &lora, "stage=2", "--steps", "1"])).stderr;
    assert!(said.contains("layers, strength 1 in stage2, alpha/rank 1"), "{said}");
}

/// The plan in the cache does not know what files are called.
#[cfg(unix)]
#[test]
fn training_is_checked_whatever_the_cache_has() {
    let place = Place::new();
    let model = fixture("tiny-ltx2/ltx-2-tiny");
    place.ok(&run("ltx2", &["--steps", "1"]));
    let named = |name: &str| {
        let mut args = run("ltx2", &["--steps", "1"]);
        let at = args.iter().position(|a| a == "--checkpoint-path").unwrap();
        args[at + 1] = name.into();
        args
    };
    let refused =
        |name: &str| crate::binary::sentence(&place.run(&named(name)), &["is a dev model", "--distilled-lora"]);
    std::fs::copy(model, place.path("ltx-2-19b-dev.safetensors")).unwrap();
    refused("ltx-2-19b-dev.safetensors");
    std::os::unix::fs::symlink("ltx-2-19b-dev.safetensors", place.path("model.safetensors")).unwrap();
    refused("model.safetensors");
}

#[test]
fn stages_that_are_not_there_are_refused() {
    let place = Place::new();
    let args = run("ltx2", &["--lora", &fixture("tiny-ltx2/lora-rank4-tiny"), "1", "stage=3"]);
    let done = place.run(&args);
    crate::binary::sentence(&done, &["is for stage 3, pipeline `distilled` has 2"]);
    assert!(!place.path("a.wav").exists());
}

#[test]
fn unmatched_keys_can_be_left_out() {
    let place = Place::new();
    let mut bytes = std::fs::read(fixture("tiny-ltx2/lora-rank4-tiny")).unwrap();
    let at = find(&bytes, b"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A");
    // The same length, so that the header stays true.
    let changed = b"diffusion_model.transformer_blocks.0.attn1.to_x.lora_A";
    bytes[at..at + changed.len()].copy_from_slice(changed);
    let at = find(&bytes, b"diffusion_model.transformer_blocks.0.attn1.to_q.lora_B");
    let changed = b"diffusion_model.transformer_blocks.0.attn1.to_x.lora_B";
    bytes[at..at + changed.len()].copy_from_slice(changed);
    let lora = place.write("lora.safetensors", &bytes).display().to_string();
    let words = ["1 of its keys match nothing in LTX-2", "`diffusion_model.transformer_blocks.0.attn1.to_x`"];
    place.refused(&run("ltx2", &["--lora", &lora]), &words);
    let done = place.ok(&run("ltx2", &["--lora", &lora, "--lora-ignore-unmatched"]));
    assert!(done.stderr.contains("1 of its keys left out"), "{}", done.stderr);
}

fn find(bytes: &[u8], part: &[u8]) -> usize {
    bytes.windows(part.len()).position(|w| w == part).expect("the part is there")
}

#[test]
fn inspecting_tells_what_is_in_a_file() {
    let place = Place::new();
    let inspect = |name: &str, more: &[&str]| {
        let file = fixture(name);
        place.ok(&[&["lora", "inspect", &file], more].concat()).stdout
    };
    let facts: Value = serde_json::from_str(&inspect("tiny-ltx2/ic-lora-ref2-tiny", &["--json"])).unwrap();
    assert_eq!(facts["dialect"], "official");
    assert_eq!(facts["layers"], 48);
    assert_eq!(facts["ranks"][0]["rank"], 4);
    assert_eq!(facts["reference_downscale_factor"], 2);
    assert_eq!(facts["in_context"], true);
    assert_eq!(facts["targets"]["diffusion_model.transformer_blocks.*.attn1.to_q"], 2);
    // Published models are wider than the tiny one.
    assert_eq!(facts["models"][0]["model"], "ltx-2-19b");
    assert!(facts["models"][0]["reason"].as_str().unwrap().contains("have another shape"));
    let with_model = |lora: &str, model: &str| inspect(lora, &["--checkpoint-path", &fixture(model)]);
    let text = with_model("tiny-ltx2/lora-rank4-tiny", "tiny-ltx2/ltx-2-tiny");
    for words in ["dialect   official, f32", "rank      4 (24 layers)", "none (scale 1)", "yes, all 24 layers"] {
        assert!(text.contains(words), "{text}");
    }
    let text = with_model("tiny-ltx23/distilled-lora-tiny", "tiny-ltx2/ltx-2-tiny");
    assert!(text.contains("origin    LTX-2.3 or newer: ") && text.contains(": no; "), "{text}");
    place.refused(&["lora", "inspect", &fixture("tiny-ltx2/ltx-2-tiny")], &["holds no LoRA"]);
    let nowhere: PathBuf = place.path("nowhere");
    place.refused(&["lora", "inspect", &nowhere.display().to_string()], &["nowhere"]);
}
