//! `ltxc run --jobs`: many runs, some of which fail, and going on after an interruption.

use serde_json::Value;

use crate::binary::{Place, SHAPE, fixtures, tiny, with};
use crate::inputs::{folder, retake};
use crate::loras::{files, fixture};

const JOBS: &str = r#"
num_inference_steps = 1

[[job]]
prompt = "a red fox"
seed = [1, 2]

[[job]]
prompt = "rain"
image = "missing.png"

[[job]]
prompt = "snow"
output = "snow-{seed}.wav"
"#;

#[test]
fn jobs_run_report_and_go_on() {
    let place = Place::new();
    place.write("jobs.toml", JOBS.as_bytes());
    let args = with(tiny().run_args(), &["--jobs", "jobs.toml", "-o", "out"]);
    let done = place.run(&args);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("error: 1 of 4 jobs failed"), "{}", done.stderr);
    let lines: Vec<&str> = done.stdout.lines().collect();
    let [first, second, third, fourth] = lines[..] else { panic!("{}", done.stdout) };
    assert!(first.starts_with("done out/a-red-fox-seed1-") && first.ends_with(".mp4"), "{first}");
    assert!(second.starts_with("done out/a-red-fox-seed2-"), "{second}");
    assert!(third.starts_with("failed out/rain-seed10-") && third.contains("missing.png"), "{third}");
    assert_eq!(fourth, "done snow-10.wav");
    let made = place.listing();

    // The same command keeps what is there, byte for byte, and tries the rest again.
    let again = place.run(&args);
    assert_eq!(again.code, Some(1));
    assert_eq!(again.stdout.matches("kept ").count(), 3, "{}", again.stdout);
    assert_eq!(place.listing(), made);

    // A job alone gives the same video, whatever ran before it.
    let path = second.trim_start_matches("done ");
    place.ok(&with(tiny().run_args(), &["-p", "a red fox", "--seed", "2", "--steps", "1", "-o", "alone.mp4"]));
    assert_eq!(place.read("alone.mp4"), place.read(path));
}

#[test]
fn jobs_report_as_json() {
    let place = Place::new();
    place.write("jobs.jsonl", b"{\"output\": \"a.wav\"}\n\n{\"output\": \"b.wav\", \"seed\": 3}\n");
    let args = with(tiny().run_args(), &["--jobs", "jobs.jsonl", "-p", "x", "--steps", "1", "--json"]);
    let done = place.ok(&args);
    let events: Vec<Value> = done.stdout.lines().map(|l| serde_json::from_str(l).expect(l)).collect();
    let jobs: Vec<&Value> = events.iter().filter(|e| e["event"] == "job").collect();
    let told: Vec<_> = jobs.iter().map(|j| (j["i"].as_u64(), j["n"].as_u64(), j["path"].as_str())).collect();
    assert_eq!(told, [(Some(1), Some(2), Some("a.wav")), (Some(2), Some(2), Some("b.wav"))]);
    assert!(jobs.iter().all(|j| j["status"] == "done" && j["error"].is_null()));
}

/// What became of every job.
fn told(place: &Place, args: &[String]) -> Vec<(String, String)> {
    let lines = place.ok(args).stdout;
    let pair = |line: &str| line.split_once(' ').map(|(status, path)| (status.to_string(), path.to_string()));
    lines.lines().filter_map(pair).collect()
}

#[test]
fn outputs_are_kept_only_if_they_are_made_of_the_same() {
    let place = Place::new();
    place.write("prompt.txt", b"rain");
    place.write("jobs.jsonl", b"{\"prompt\": \"@prompt.txt\", \"num_inference_steps\": 1, \"name\": \"x\"}");
    let (plan, lora) = (place.path("a.ltxplan").display().to_string(), fixture("tiny-ltx2/lora-rank4-tiny"));
    let compile = [vec!["compile".to_string()], files("ltx2")].concat();
    place.ok(&with(compile, &[&SHAPE[..], &["--device", "cpu", "--no-audio", "-o", &plan]].concat()));
    let weights = fixtures().display().to_string();
    let run = |more: &[&str]| {
        let start = ["run", &plan, "--weights", &weights, "--jobs", "jobs.jsonl", "-o", "out"].map(String::from);
        let [(status, path)] = &told(&place, &with(start.into(), more))[..] else { panic!("one job") };
        (status.clone(), path.clone())
    };
    let (plain, with_lora) = (run(&[]), run(&["--lora", &lora]));
    let weaker = run(&["--lora", &lora, "0.5"]);
    assert!(
        [&plain, &with_lora, &weaker].iter().all(|(status, _)| status == "done"),
        "{plain:?} {with_lora:?} {weaker:?}"
    );
    assert!(place.read(&plain.1) != place.read(&with_lora.1) && place.read(&with_lora.1) != place.read(&weaker.1));
    assert_eq!(run(&[]), ("kept".into(), plain.1.clone()));
    assert_eq!(run(&["--lora", &lora]), ("kept".into(), with_lora.1));
    place.write("prompt.txt", b"snow");
    let (status, path) = run(&[]);
    assert!(status == "done" && path != plain.1);
}

#[test]
fn jobs_switch_live_adapters() {
    let place = Place::new();
    let lora = fixture("tiny-ltx2/lora-rank4-tiny");
    let compile = [vec!["compile".to_string()], files("ltx2")].concat();
    place.ok(&with(compile, &[&SHAPE[..], &["--device", "cpu", "--lora-rank", "4", "-o", "a.ltxplan"]].concat()));
    let weights = fixtures().display().to_string();
    let start = ["run", "a.ltxplan", "--weights", &weights, "--steps", "1"];
    let jobs = format!(
        "{{\"output\": \"plain.wav\"}}\n{{\"output\": \"whole.wav\", \"lora\": [\"{lora}\"]}}\n\
         {{\"output\": \"half.wav\", \"lora\": [[\"{lora}\", 0.5]]}}\n\
         {{\"output\": \"merged.wav\", \"lora\": \"{lora}\", \"lora_mode\": \"merged\"}}\n"
    );
    place.write("jobs.jsonl", jobs.as_bytes());
    let done = place.ok(&[&start[..], &["--jobs", "jobs.jsonl", "-p", "x"]].concat());
    assert_eq!(done.stdout.matches("done ").count(), 4, "{}", done.stdout);
    let alone = |more: &[&str]| {
        place.ok(&[&start[..], &["-p", "x", "-o", "alone.wav"], more].concat());
        place.read("alone.wav")
    };
    let made = ["plain.wav", "whole.wav", "half.wav", "merged.wav"].map(|name| place.read(name));
    assert!(made[0] == alone(&[]));
    assert!(made[1] == alone(&["--lora", &lora]));
    assert!(made[2] == alone(&["--lora", &lora, "0.5"]));
    assert!(made[3] == alone(&["--lora", &lora, "--lora-mode", "merged"]));
    assert!((0..4).all(|i| made[..i].iter().all(|other| *other != made[i])));
    // What fits no job is said before any of them runs.
    let other = fixture("tiny-ltx23/distilled-lora-tiny");
    let jobs = format!("{{\"output\": \"b.wav\"}}\n{{\"output\": \"c.wav\", \"lora\": \"{other}\"}}\n");
    place.write("jobs.jsonl", jobs.as_bytes());
    let args = [&start[..], &["--jobs", "jobs.jsonl", "-p", "x"]].concat();
    place.refused(&args, &["jobs.jsonl", "job 2", "looks like a LoRA of LTX-2.3"]);
}

/// Reference videos of other lengths, and strengths of attention, take plans of their own.
#[test]
fn jobs_are_made_as_if_they_were_alone() {
    let place = Place::new();
    let (long, short) = (folder(&place, "long", 17), folder(&place, "short", 9));
    let half = fixture("tiny-ltx2/ic-lora-ref2-tiny");
    let start = [vec!["run".to_string()], files("ltx2")].concat();
    let shape = ["--pipeline", "ic-lora", "--size", "128x128", "--num-frames", "17", "--device", "cpu", "--steps", "1"];
    let start = with(start, &[&shape[..], &["-p", "x", "--lora", &half]].concat());
    let jobs = [
        ("a.wav", format!("\"video_conditioning\": [[\"{long}\"], [\"{long}\"]]")),
        (
            "b.wav",
            format!("\"video_conditioning\": [[\"{long}\"], [\"{long}\"]], \"conditioning_attention_strength\": 0.5"),
        ),
        ("c.wav", format!("\"video_conditioning\": [\"{short}\"]")),
    ];
    let lines: Vec<String> = jobs.iter().map(|(name, rest)| format!("{{\"output\": \"{name}\", {rest}}}")).collect();
    place.write("jobs.jsonl", lines.join("\n").as_bytes());
    place.ok(&with(start.clone(), &["--jobs", "jobs.jsonl"]));
    let alone = |more: &[&str]| {
        place.ok(&with(start.clone(), &[&["-o", "alone.wav"], more].concat()));
        place.read("alone.wav")
    };
    let two = ["--video-conditioning", &long, "--video-conditioning", &long];
    assert!(place.read("a.wav") == alone(&two), "a job with strengths changes one without");
    assert!(place.read("b.wav") == alone(&[&two[..], &["--conditioning-attention-strength", "0.5"]].concat()));
    assert!(place.read("c.wav") == alone(&["--video-conditioning", &short]));
}

#[test]
fn jobs_have_the_shapes_of_their_clips() {
    let place = Place::new();
    let (long, short) = (folder(&place, "long", 17), folder(&place, "short", 9));
    let jobs = format!(
        "{{\"output\": \"long.mp4\", \"video_path\": \"{long}\"}}\n{{\"output\": \"short.mp4\", \"video_path\": \"{short}\"}}\n"
    );
    place.write("jobs.jsonl", jobs.as_bytes());
    let flags = ["--jobs", "jobs.jsonl", "--frame-rate", "24", "--start-time", "0.1", "--end-time", "0.3"];
    place.ok(&retake(&flags));
    for (name, frames) in [("long.mp4", 17), ("short.mp4", 9)] {
        let video = ltxc_runtime::media::mp4::read(&place.read(name)).unwrap().video.unwrap();
        assert_eq!((video.width, video.height, video.samples.len()), (64, 64, frames), "{name}");
    }
    place.write("jobs.jsonl", b"{\"output\": \"a.mp4\", \"video_path\": \"gone.mp4\"}");
    place.refused(&retake(&flags), &["jobs.jsonl", "job 1", "gone.mp4"]);
}

#[cfg(unix)]
#[test]
fn an_interrupted_batch_says_what_is_there() {
    use std::io::{BufRead, BufReader};
    let place = Place::new();
    place.write("jobs.jsonl", b"{\"seed\": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]}");
    let args = with(tiny().run_args(), &["--jobs", "jobs.jsonl", "-p", "x", "-o", "out"]);
    let mut command = place.command(&args);
    let mut child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("done "));
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let more = lines.map_while(Result::ok).filter(|line| line.starts_with("done ")).count();
    let done: crate::binary::Done = child.wait_with_output().unwrap().into();
    assert_eq!(done.code, Some(130), "{}", done.stderr);
    let text = format!("interrupted; {} of 20 outputs are there", 1 + more);
    assert!(done.stderr.contains(&text) && !done.stderr.contains("nothing was written"), "{}", done.stderr);
    assert_eq!(std::fs::read_dir(place.path("out")).unwrap().count(), 1 + more);
}

#[test]
fn bad_job_files_are_refused_before_anything_runs() {
    let place = Place::new();
    let refused = |name: &str, words: &[&str]| {
        place.refused(&with(tiny().run_args(), &["--jobs", name]), words);
    };
    refused("none.toml", &["none.toml", "No such file"]);
    place.write("key.jsonl", b"{\"prompt\": \"a\"}\n{\"prompt\": \"a\", \"colour\": 1}\n");
    refused("key.jsonl", &["key.jsonl", "job 2", "`colour` is not a flag"]);
    place.write("empty.toml", b"");
    refused("empty.toml", &["has no jobs", "[[job]]"]);
    place.write("silent.jsonl", b"{\"prompt\": \"a\"}\n{}\n");
    refused("silent.jsonl", &["silent.jsonl", "job 2", "`--prompt` is missing"]);
    place.refused(&tiny().run_args(), &["`--prompt` is missing"]);
}
