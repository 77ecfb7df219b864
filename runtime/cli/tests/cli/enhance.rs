//! Prompts that the text encoder writes anew.

use crate::binary::{Place, SHAPE, tiny, with};

const SAID: &str = "a red fox";

/// `compile --enhance-prompt` of the small model, as `a.ltxplan`; more flags first.
fn compile(place: &Place, more: &[&str]) {
    let args = ["compile".to_string()].into_iter().chain(tiny().model_args()).collect();
    place.ok(&with(args, &[more, &SHAPE, &["--enhance-prompt", "-o", "a.ltxplan"]].concat()));
}

fn enhance(place: &Place, more: &[&str]) -> String {
    let gemma = tiny().gemma.display().to_string();
    let args = [&["enhance", "--gemma-root", &gemma, "-p", SAID, "--device", "cpu"], more].concat();
    let mut lines = place.ok(&args).stdout;
    assert_eq!(lines.pop(), Some('\n'));
    lines
}

fn run(place: &Place, more: &[&str]) -> String {
    let weights = tiny().folder.display().to_string();
    place.ok(&[&["run", "a.ltxplan", "--weights", &weights], more].concat()).stderr
}

/// The value of a tag of an MP4 file.
fn tag(place: &Place, file: &str, name: &str) -> Option<String> {
    let movie = ltxc_runtime::media::mp4::read(&place.read(file)).unwrap();
    movie.tags.into_iter().find(|(found, _)| found == name).map(|(_, value)| value)
}

#[test]
fn a_prompt_is_written_anew_by_its_seed() {
    let place = Place::new();
    let (first, again) = (enhance(&place, &[]), enhance(&place, &["--seed", "42"]));
    assert_eq!(first, again);
    assert!(first.chars().next().is_some_and(char::is_alphabetic) && first != SAID, "{first}");
    assert_ne!(enhance(&place, &["--seed", "7"]), first);
    assert_ne!(enhance(&place, &["--image-to-video"]), first);
    let json: serde_json::Value = serde_json::from_str(enhance(&place, &["--json"]).lines().last().unwrap()).unwrap();
    assert_eq!((&json["prompt"], &json["seed"]), (&first.into(), &42.into()));
}

#[test]
fn a_run_is_that_of_the_enhanced_prompt() {
    let place = Place::new();
    compile(&place, &[]);
    let text = run(&place, &["-p", SAID, "--enhance-prompt", "--seed", "7", "-o", "a.mp4"]);
    let written = tag(&place, "a.mp4", "comment").unwrap();
    // Distilled pipelines write with the same seed whatever that of the run is.
    assert_eq!(written, enhance(&place, &[]));
    assert!(text.contains(&format!("enhanced prompt: {written}")), "{text}");
    assert_eq!(tag(&place, "a.mp4", "prompt_given").as_deref(), Some(SAID));
    // The noise of the run is the same, and what is shown is what was written.
    run(&place, &["-p", SAID, "--enhance-prompt", "--seed", "7", "-o", "a.mp4", "--no-metadata"]);
    run(&place, &["-p", &written, "--seed", "7", "-o", "b.mp4", "--no-metadata"]);
    run(&place, &["-p", SAID, "--seed", "7", "-o", "c.mp4", "--no-metadata"]);
    assert!(place.read("a.mp4") == place.read("b.mp4"));
    assert!(place.read("a.mp4") != place.read("c.mp4"));
    let text = run(&place, &["-p", SAID, "--seed", "7", "-o", "c.mp4"]);
    assert!(!text.contains("enhanc"), "{text}");
    assert_eq!(tag(&place, "c.mp4", "prompt_given"), None);
}

#[test]
fn other_pipelines_write_with_the_seed_of_the_run() {
    let place = Place::new();
    let args = ["--pipeline", "t2a"];
    compile(&place, &args);
    run(&place, &["-p", SAID, "--enhance-prompt", "--seed", "7", "-o", "a.mp4", "--steps", "1"]);
    assert_eq!(tag(&place, "a.mp4", "comment"), Some(enhance(&place, &["--seed", "7"])));
}

#[test]
fn images_are_not_looked_at() {
    let place = Place::new();
    compile(&place, &[]);
    run(&place, &["-p", SAID, "-o", "frames"]);
    let image = ["--image", "frames/frame_00000.png", "--image-codec", "embedded"];
    let text = run(&place, &[&["-p", SAID, "--enhance-prompt", "-o", "a.mp4"], &image[..]].concat());
    assert!(text.contains("does not look at images"), "{text}");
    assert_eq!(tag(&place, "a.mp4", "comment"), Some(enhance(&place, &["--image-to-video"])));
}

#[test]
fn a_plan_without_it_says_how_to_compile_one() {
    let place = Place::new();
    place.refused(&with(tiny().run_args(), &["-p", "x", "--enhance-prompt"]), &["compile it with that flag"]);
}

#[test]
fn what_cannot_write_is_refused() {
    let place = Place::new();
    let gemma = tiny().gemma.display().to_string();
    let long = "fox ".repeat(1600);
    let args = ["enhance", "--gemma-root", &gemma, "-p", &long, "--device", "cpu"];
    place.refused(&args, &["too long to be enhanced", "shorten it"]);
    place.refused(&["enhance", "--gemma-root", "nowhere", "-p", "x"], &["nowhere"]);
    let encoders = crate::binary::fixtures().join("tiny-ltx25/text_encoders");
    let Some(encoder) = std::fs::read_dir(&encoders).ok().and_then(|mut files| files.next()) else {
        return println!("absent: this set of fixtures has no LTX-2.5");
    };
    let encoder = encoder.unwrap().path().display().to_string();
    let args = ["enhance", "--gemma-root", &encoder, "-p", "x", "--device", "cpu"];
    place.refused(&args, &["the text encoder of LTX-2.5, which was not trained to write"]);
}
