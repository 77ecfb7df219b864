//! `ltxc run --jobs`: many runs, some of which fail, and going on after an interruption.

use serde_json::Value;

use crate::binary::{Place, tiny, with};

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
    place.refused(&tiny().run_args(), &["--prompt"]);
}
