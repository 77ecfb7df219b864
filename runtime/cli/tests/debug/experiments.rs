//! Experiments: off they change nothing, on they change the result and say so.

use serde_json::Value;

use crate::binary::{Place, tiny, with};

/// Values of the tags of an MP4 file stand in it as text.
fn says(place: &Place, file: &str, text: &str) -> bool {
    place.read(file).windows(text.len()).any(|w| w == text.as_bytes())
}

#[test]
fn experiments_change_the_result_and_mark_it() {
    let place = Place::new();
    let run = |output: &str, more: &[&str]| {
        let done = place
            .ok(&with(tiny().run_args(), &[&["-p", "a fox", "-o", output, "--no-metadata", "--json"], more].concat()));
        let last: Value = serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap();
        last["facts"].clone()
    };
    let plain = run("plain.mp4", &[]);
    assert!(plain.get("experiments").is_none() && !says(&place, "plain.mp4", "experiments"), "{plain}");
    for (i, (given, label)) in [
        ("placeholder-latents", "placeholder-latents=zero"),
        ("placeholder-latents=noise", "placeholder-latents=noise"),
        ("early-text-layers=1", "early-text-layers=1"),
        ("cross-attn-scale=10@2", "cross-attn-scale=10@2"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{i}.mp4");
        let facts = run(&name, &["--experiment", given]);
        assert_eq!(facts["experiments"], serde_json::json!([label]));
        assert!(says(&place, &name, label), "{label}");
        assert_ne!(place.read(&name), place.read("plain.mp4"), "{label} changes nothing");
    }
    // What multiplies by 1 is no change: only the mark differs, and with it the length of the file.
    run("one.wav", &["--experiment", "cross-attn-scale=1@0"]);
    run("plain.wav", &[]);
    assert_eq!(place.read("one.wav"), place.read("plain.wav"));
    // All states are all states.
    let states = run("all.wav", &["--experiment", "early-text-layers=8"]);
    assert_eq!(
        (place.read("all.wav"), states["experiments"][0].as_str()),
        (place.read("plain.wav"), Some("early-text-layers=8"))
    );
}

#[test]
fn experiments_are_of_the_run_and_not_of_the_plan() {
    let place = Place::new();
    let model = [&["run".to_string()], &tiny().model_args()[..], &crate::binary::SHAPE.map(String::from)].concat();
    place.ok(&with(model.clone(), &["-p", "x", "-o", "a.wav"]));
    let plans = || {
        let plans = place.listing().into_keys().filter(|p| p.extension().is_some_and(|e| e == "ltxplan"));
        plans.map(|p| (p.clone(), std::fs::read(p).unwrap())).collect::<Vec<_>>()
    };
    let before = plans();
    place.ok(&with(model, &["-p", "x", "-o", "b.wav", "--experiment", "cross-attn-scale=3@0"]));
    assert_eq!((before.len(), plans()), (1, before.clone()));
    assert_ne!(place.read("a.wav"), place.read("b.wav"));
}

#[test]
fn logs_name_experiments_and_others_are_refused() {
    let place = Place::new();
    let args = ["-p", "x", "-o", "a.wav", "--debug-stage-sums-path", "s.log", "--experiment", "early-text-layers=2"];
    place.ok(&with(tiny().run_args(), &args));
    assert!(
        String::from_utf8(place.read("s.log"))
            .unwrap()
            .lines()
            .next()
            .unwrap()
            .contains("experiments=early-text-layers=2")
    );
    let refused = |given: &str, words: &[&str]| {
        let args = ["-p", "x", "-o", "no.wav", "--experiment", given];
        place.refused(&with(tiny().run_args(), &args), words);
    };
    refused("cross-attn-scale=10", &["cross-attn-scale=10@40", "the last block is 2"]);
    refused("early-text-layers=99", &["8 hidden states"]);
    refused("magic", &["magic", "expected"]);
}
