//! `ltxc debug text` and contexts from elsewhere.

use std::path::{Path, PathBuf};

use ltxc_runtime::noise_files::{Container, Stored, read, write, write_all};
use serde_json::Value;

use crate::binary::{Done, Place, SHAPE, sentence, tiny, with};
use crate::faults::with_tensor;
use crate::root;

const PROMPT: &str = "a cat sleeps";

/// `debug text <command>` on a model.
fn text(place: &Place, checkpoint: &Path, gemma: &Path, command: &str, more: &[&str]) -> Done {
    let args = [&["debug".to_string(), "text".into(), command.into()], &tiny().model_args_with(checkpoint, gemma)[..]];
    place.run(&with(args.concat(), more))
}

/// On the fixtures' LTX-2 with its text encoder.
fn fixture(place: &Place, gemma: &Path, command: &str, more: &[&str]) -> Done {
    text(place, &root().join("tiny-ltx2/ltx-2-tiny.safetensors"), gemma, command, more)
}

fn own(place: &Place, command: &str, more: &[&str]) -> Done {
    text(place, &tiny().checkpoint, &tiny().gemma, command, more)
}

fn facts(done: &Done) -> Value {
    let last = done.stdout.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {}{}", done.stdout, done.stderr))
}

fn gemma() -> PathBuf {
    root().join("tiny-gemma3")
}

/// A copy of the fixtures' text encoder with another configuration.
fn gemma_with(place: &Place, change: impl FnOnce(&mut Value)) -> PathBuf {
    let folder = place.path("gemma");
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(gemma()).unwrap().flatten() {
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config["text_config"]);
    std::fs::write(&path, config.to_string()).unwrap();
    folder
}

/// The exported states of the fixtures, changed.
fn changed(place: &Place, name: &str, change: impl Fn(&[Stored], &Stored) -> Stored) -> String {
    let states = read(&place.path("states.safetensors")).unwrap();
    let all: Vec<Stored> = states.iter().map(|t| change(&states, t)).collect();
    write_all(&place.path(name), &all).unwrap();
    name.into()
}

#[test]
fn states_and_contexts_of_other_tools_are_compared() {
    let place = Place::new();
    let export = |output: &str| fixture(&place, &gemma(), "export", &["-p", PROMPT, "--states", "-o", output]);
    for output in ["states.safetensors", "states.npz", "states.pt"] {
        assert_eq!(export(output).code, Some(0), "{output}");
        let done = fixture(&place, &gemma(), "compare", &["-p", PROMPT, "--ref", output, "--json"]);
        assert_eq!((done.code, facts(&done)["ok"].as_bool()), (Some(0), Some(true)), "{output}: {}", done.stdout);
    }
    let compare = |file: &str| {
        let done = fixture(&place, &gemma(), "compare", &["-p", PROMPT, "--ref", file, "--json"]);
        assert_eq!(done.code, Some(1), "{file}: {}{}", done.stdout, done.stderr);
        let facts = facts(&done);
        (facts["first_bad"].as_str().unwrap().to_string(), facts["likely"].to_string())
    };
    let scaled = changed(&place, "unscaled.safetensors", |_, t| {
        let factor = if t.name == "hidden_states.0" { 1.0 / 8.0 } else { 1.0 };
        Stored { values: t.values.iter().map(|v| v * factor).collect(), ..t.clone() }
    });
    let (first, likely) = compare(&scaled);
    assert!(first == "hidden_states.0" && likely.contains("square root of the hidden size"), "{first}: {likely}");
    // The state behind the layer under the number of the one in front of it.
    let late = changed(&place, "late.safetensors", |all, t| {
        let number = t.name.strip_prefix("hidden_states.").and_then(|n| n.parse::<usize>().ok());
        let later = number.and_then(|n| all.iter().find(|o| o.name == format!("hidden_states.{}", n + 1)));
        Stored { values: later.unwrap_or(t).values.clone(), ..t.clone() }
    });
    let (first, likely) = compare(&late);
    assert!(first == "hidden_states.0" && likely.contains("after each layer"), "{first}: {likely}");
    let single = changed(&place, "single.safetensors", |all, t| {
        let last = all.iter().find(|o| o.name == "hidden_states.7").unwrap();
        match t.name.starts_with("hidden_states.") {
            true => Stored { values: last.values.clone(), ..t.clone() },
            false => t.clone(),
        }
    });
    let (first, likely) = compare(&single);
    assert!(first == "hidden_states.0" && likely.contains("only one layer"), "{first}: {likely}");
}

#[test]
fn one_rotation_for_all_layers_is_found_at_the_first_global_one() {
    let place = Place::new();
    fixture(&place, &gemma(), "export", &["-p", PROMPT, "--states", "-o", "states.safetensors"]);
    let faulty = gemma_with(&place, |config| {
        config["rope_theta"] = config["rope_local_base_freq"].clone();
        config.as_object_mut().unwrap().remove("rope_scaling");
    });
    let args = ["-p", PROMPT, "--ref", "states.safetensors", "--json"];
    let found = facts(&fixture(&place, &faulty, "compare", &args));
    // The sixth layer is the first global one; its result is state 6.
    assert_eq!(found["first_bad"], "hidden_states.6", "{found}");
    assert!(found["likely"].to_string().contains("RoPE"), "{found}");
    assert_eq!(fixture(&place, &gemma(), "compare", &args).code, Some(0));
}

#[test]
fn recorded_contexts_of_the_reference_agree() {
    let place = Place::new();
    let recorded = root().join("expected/gemma3/tokenizer.safetensors");
    let meta = ltxc::debug::recording::TensorFile::open(&recorded).unwrap().meta();
    let prompt = meta["prompts"]["pos"].as_str().unwrap().to_string();
    let file = root().join("expected/ltx2/text_context.safetensors").display().to_string();
    // Contexts of several prompts stand in it; only those of this one are given on.
    let all = read(Path::new(&file)).unwrap();
    let of = |name: &str| all.iter().find(|t| t.name == name).unwrap().clone();
    let contexts = [of("pos.video_context"), of("pos.audio_context"), of("pos.features_video")];
    write_all(&place.path("pos.safetensors"), &contexts).unwrap();
    let done =
        fixture(&place, &gemma(), "compare", &["-p", &prompt, "--ref", "pos.safetensors", "--limit", "1e-5", "--json"]);
    let found = facts(&done);
    assert_eq!((done.code, found["tensors"].as_array().unwrap().len()), (Some(0), 3), "{found}");
    let done = fixture(&place, &gemma(), "compare", &["-p", "something else", "--ref", "pos.safetensors"]);
    assert_eq!(done.code, Some(1));
}

#[test]
fn masks_are_shown_and_those_of_other_tools_judged() {
    let place = Place::new();
    let mask = |more: &[&str]| fixture(&place, &gemma(), "mask", &[&["-p", PROMPT, "--json"], more].concat());
    let done = mask(&[]);
    let own = facts(&done);
    assert_eq!((done.code, own["padding"].as_str()), (Some(0), Some("left")), "{own}");
    let n = own["tokens"].as_u64().unwrap() as usize;
    let masks = own["masks"].as_array().unwrap();
    assert_eq!((masks[0]["window"].as_u64(), masks[1]["window"].as_u64()), (Some(16), None), "{own}");
    // Without a window every token sees itself and all before it.
    assert_eq!(masks[1]["visible"].as_u64(), Some((n * (n + 1) / 2) as u64), "{own}");
    let judge = |name: &str, shape: &[usize], values: Vec<f32>| {
        write(&place.path(name), &Stored::f32("attention_mask", shape, values)).unwrap();
        let done = mask(&["--ref", name]);
        (done.code, facts(&done))
    };
    let slots = n + 5;
    let flags = |first: usize| (0..slots).map(|i| f32::from((first..first + n).contains(&i))).collect::<Vec<f32>>();
    assert_eq!(judge("left.npy", &[1, slots], flags(5)).0, Some(0));
    let (code, found) = judge("right.npy", &[1, slots], flags(0));
    assert!(code == Some(1) && found["padding"] == "right", "{found}");
    // What is added to scores, pads on the left: rows of pads have nothing to see.
    let added = |hidden: f32| {
        let sees = |i: usize, j: usize| j >= 5 && j <= i;
        let all = (0..slots).flat_map(|i| (0..slots).map(move |j| (i, j)));
        all.map(|(i, j)| if sees(i, j) { 0.0 } else { hidden }).collect::<Vec<f32>>()
    };
    assert_eq!(judge("added.npz", &[1, 1, slots, slots], added(-1e9)).0, Some(0));
    let (code, found) = judge("infinite.npz", &[1, 1, slots, slots], added(f32::NEG_INFINITY));
    assert!(code == Some(1) && found["problems"].to_string().contains("NaN"), "{found}");
}

#[test]
fn stats_tell_how_the_encoder_is_set() {
    let place = Place::new();
    let done = fixture(&place, &gemma(), "stats", &["-p", PROMPT, "--values", "--json"]);
    let found = facts(&done);
    assert_eq!(done.code, Some(0), "{found}");
    assert_eq!(found["states"].as_array().unwrap().len(), 8);
    assert_eq!(found["states"][0]["head"].as_array().unwrap().len(), 8);
    assert!(found["facts"]["rope_sliding"].as_str().unwrap().starts_with("6 layers, theta 10000"), "{found}");
    assert!(found["facts"]["rope_global"].as_str().unwrap().contains("theta 1000000, divided by 8"), "{found}");
    assert!(found["facts"]["padding"].as_str().unwrap().starts_with("left"), "{found}");
    assert!(found["facts"]["registers"].as_str().unwrap().contains("128 learned"), "{found}");
    // Lines of other tools.
    let done = fixture(
        &place,
        &gemma(),
        "stats",
        &["-p", PROMPT, "--detail", "--label", "reference", "--detail-path", "d.log"],
    );
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let lines = String::from_utf8(place.read("d.log")).unwrap();
    for key in [
        "feature_extractor_linear:in_sum=",
        "audio_feature_extractor_linear:sum=",
        "embeddings_block_0:input:in_sum=",
        "embeddings_block_1:attn1:sum=",
        "audio_embeddings_block_0:ff:sum=",
        "embeddings_connector:sum=",
        "embeddings_registers:sum=",
        "audio_registers:sum=",
        "param:video_embeddings_connector.learnable_registers:sum=",
    ] {
        assert!(lines.contains(&format!("reference:{key}")), "no `{key}` in\n{lines}");
    }
    // What goes into the projection, multiplied by its weights, is what comes out: both are sums over the same tokens.
    place.ok(&["debug", "compare", "d.log", "d.log"]);
}

#[test]
fn prompts_are_compared_along_the_depth() {
    let place = Place::new();
    let diff = |more: &[&str]| {
        let args = [&["-p", PROMPT, "--prompt2", "a rocket starts", "--json"], more].concat();
        facts(&fixture(&place, &gemma(), "diff", &args))["stages"].as_array().unwrap().clone()
    };
    let named = |stages: &[Value], start: &str| {
        stages.iter().filter(|s| s["stage"].as_str().unwrap().starts_with(start)).count()
    };
    let (some, all) = (diff(&[]), diff(&["--stages", "all"]));
    assert_eq!((named(&some, "hidden"), named(&all, "hidden")), (5, 8), "{some:?}");
    // After the first layer, the activation and the second layer, of LTX-2's own caption projection.
    assert_eq!((named(&some, "video.caption"), named(&all, "video.caption")), (0, 3));
    let whole = diff(&["--all-tokens"]);
    let context = |stages: &[Value]| stages.iter().find(|s| s["stage"] == "video context").unwrap()["pearson"].clone();
    assert_ne!(context(&some), context(&whole));
}

#[test]
fn blocks_that_hear_nothing_of_the_text_are_found() {
    let place = Place::new();
    let args = ["-p", PROMPT, "--prompt2", "a rocket starts", "--grid", "2,2,2", "--json"];
    let done = own(&place, "sensitivity", &args);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    let rows: Vec<Value> = done.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.len(), 2 * 3 + 1);
    assert!(rows[0]["text_ratio"].as_f64() > Some(0.0) && rows[0]["correlation"].as_f64() < Some(1.0), "{}", rows[0]);
    // Attention to the text that gives nothing, in all blocks.
    let mut faulty = tiny().checkpoint.clone();
    for block in 0..3 {
        let key = format!("model.diffusion_model.transformer_blocks.{block}.attn2.to_out.0.weight");
        faulty = with_tensor(&place, &faulty, &key, |bytes| bytes.fill(0));
        let key = format!("model.diffusion_model.transformer_blocks.{block}.audio_attn2.to_out.0.weight");
        faulty = with_tensor(&place, &faulty, &key, |bytes| bytes.fill(0));
    }
    let done = text(&place, &faulty, &tiny().gemma, "sensitivity", &args);
    let flags = facts(&done)["flags"].to_string();
    assert!(done.code == Some(1) && flags.contains("nothing to the video stream"), "{flags}");
}

#[test]
fn foreign_contexts_take_the_place_of_prompts_and_text_encoder() {
    let place = Place::new();
    assert_eq!(own(&place, "export", &["-p", "a fox", "-o", "fox.safetensors"]).code, Some(0));
    let plain = ["--no-metadata", "-o"];
    let run = |more: &[&str]| place.run(&with(tiny().run_args(), more));
    assert_eq!(run(&[&["-p", "a fox"], &plain[..], &["prompt.mp4"]].concat()).code, Some(0));
    let done = run(&[&["--embeddings", "fox.safetensors"], &plain[..], &["given.mp4"]].concat());
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    // Contexts were computed without fusion here, and with it in the run: the same up to rounding, so the same picture
    // up to a level or so.
    let (a, b) = (place.read("prompt.mp4"), place.read("given.mp4"));
    assert!(a.len().abs_diff(b.len()) < a.len() / 4, "{} and {}", a.len(), b.len());

    // The text encoder is not looked for: only the model and its upsampler are there.
    std::fs::create_dir(place.path("without")).unwrap();
    for file in [&tiny().checkpoint, &tiny().upsampler] {
        std::fs::copy(file, place.path("without").join(file.file_name().unwrap())).unwrap();
    }
    let plan = tiny().plan.display().to_string();
    let without = |more: &[&str]| place.run(&[&["run", &plan, "--weights", "without"], more].concat());
    let done = without(&["--embeddings", "fox.safetensors", "--no-metadata", "-o", "alone.mp4"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(place.read("alone.mp4"), place.read("given.mp4"));
    sentence(&without(&["-p", "a fox", "-o", "no.mp4"]), &["gemma"]);
    // Nor is it when a plan is compiled on the way.
    let files = |more: &[&str]| {
        let path = |file: &Path| file.display().to_string();
        let (model, upsampler) = (path(&tiny().checkpoint), path(&tiny().upsampler));
        let files = ["run", "--checkpoint-path", &model, "--spatial-upsampler-path", &upsampler, "--device", "cpu"];
        place.run(&[&files[..], &SHAPE, more].concat())
    };
    let done = files(&["--embeddings", "fox.safetensors", "--no-metadata", "-o", "files.mp4"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(place.read("files.mp4"), place.read("given.mp4"));
    sentence(&files(&["-p", "a fox", "-o", "no.mp4"]), &["--gemma-root"]);
    let compiled =
        std::fs::read_dir(place.path("cache")).unwrap().flatten().next().expect("a plan was compiled").path();
    let compiled = compiled.display().to_string();
    let args = ["run", &compiled, "--weights", "without", "-p", "a fox", "-o", "no.mp4"];
    sentence(&place.run(&args), &["without a text encoder", "--embeddings"]);
    let args = ["--embeddings", "fox.safetensors", "-o", "no.mp4", "--debug-gemma-path", "gemma.log"];
    sentence(&files(&args), &["`--debug-gemma-path` is about text_encoder"]);

    let all = read(&place.path("fox.safetensors")).unwrap();
    let width = all[0].shape[2];
    let narrow = Stored::f32("audio_context", &[1, 1024, width / 2], vec![0.0; 1024 * width / 2]);
    let video = all.iter().find(|t| t.name == "video_context").unwrap().clone();
    place.write("narrow.npz", &Container::Npz.encode_all(&[video.clone(), narrow]).unwrap());
    place.write("half.pt", &Container::Pt.encode_all(&[video]).unwrap());
    let refused = |file: &str, words: &[&str]| {
        place.refused(&with(tiny().run_args(), &["--embeddings", file, "-o", "no.mp4"]), words);
    };
    refused("narrow.npz", &["audio_context", "narrow.npz", "the plan takes [1, 1024,"]);
    refused("half.pt", &["half.pt", "audio_context"]);
    refused("nowhere.npz", &["nowhere.npz"]);
    place.refused(
        &with(tiny().run_args(), &["--embeddings", "fox.safetensors", "-p", "x", "-o", "no.mp4"]),
        &["--prompt"],
    );
}
