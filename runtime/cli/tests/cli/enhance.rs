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

/// The last of several lines of JSON.
fn last_of(lines: &str) -> serde_json::Value {
    serde_json::from_str(lines.lines().last().unwrap()).unwrap()
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
    let json = last_of(&enhance(&place, &["--json"]));
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
fn a_run_is_that_of_what_is_written_about_its_first_image() {
    let place = Place::new();
    compile(&place, &["--max-keyframes", "1"]);
    run(&place, &["-p", SAID, "-o", "frames"]);
    let [first, last] = ["frames/frame_00000.png", "frames/frame_00008.png"];
    let images = ["--image", first, "--image", last, "8", "--image-codec", "embedded", "--save-json"];
    let text = run(&place, &[&["-p", SAID, "--enhance-prompt", "-o", "a.mp4"], &images[..]].concat());
    assert!(text.contains(&format!("enhancement: looks at `{first}`")), "{text}");
    assert_eq!(tag(&place, "a.mp4", "prompt_image").as_deref(), Some("frame_00000.png"));
    let json: serde_json::Value = serde_json::from_slice(&place.read("a.mp4.json")).unwrap();
    assert_eq!(json["prompt_image"], "frame_00000.png");
    let seen = enhance(&place, &["--image", first]);
    assert_eq!(tag(&place, "a.mp4", "comment"), Some(seen.clone()));
    // What is written depends on the image and on whether there is one.
    assert_ne!(seen, enhance(&place, &["--image-to-video"]));
    assert_ne!(seen, enhance(&place, &[]));
    let other = crate::binary::fixtures().join("inputs/image0.png").display().to_string();
    assert_ne!(seen, enhance(&place, &["--image", &other]));
    let json = last_of(&enhance(&place, &["--image", first, "--json"]));
    assert_eq!((&json["prompt"], &json["saw_image"]), (&seen.into(), &true.into()));
    // Without an image, a plan that could see one writes what any other does.
    run(&place, &["-p", SAID, "--enhance-prompt", "-o", "b.mp4"]);
    assert_eq!(tag(&place, "b.mp4", "comment"), Some(enhance(&place, &[])));
    assert_eq!(tag(&place, "b.mp4", "prompt_image"), None);
}

/// A copy of the text encoder, whose configuration is changed by `change`.
fn other_gemma(place: &Place, change: impl FnOnce(&mut serde_json::Value)) -> String {
    let folder = place.path("gemma");
    std::fs::create_dir_all(&folder).unwrap();
    for file in std::fs::read_dir(&tiny().gemma).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    let config = folder.join("config.json");
    let mut value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(&config, value.to_string()).unwrap();
    folder.display().to_string()
}

#[test]
fn a_text_encoder_that_cannot_see_says_so_and_goes_on() {
    let place = Place::new();
    let gemma = other_gemma(&place, |config| config["vision_config"] = serde_json::Value::Null);
    let image = crate::binary::fixtures().join("inputs/image0.png").display().to_string();
    let args = ["enhance", "--gemma-root", &gemma, "-p", SAID, "--device", "cpu", "--image", &image];
    let done = place.ok(&args);
    assert_eq!(done.stderr.matches("no vision tower; prompt enhancement reads the prompt alone").count(), 1);
    assert_eq!(done.stdout.trim_end(), enhance(&place, &["--image-to-video"]));
    assert_eq!(last_of(&place.ok(&[&args[..], &["--json"]].concat()).stdout)["saw_image"], false);
    let model = tiny().model_args_with(&tiny().checkpoint, std::path::Path::new(&gemma));
    let compile = ["compile".to_string()].into_iter().chain(model).collect();
    place.ok(&with(compile, &[&SHAPE[..], &["--enhance-prompt", "-o", "a.ltxplan"]].concat()));
    let more = ["--weights", &gemma, "--image", &image, "--image-codec", "embedded", "-p", SAID, "--enhance-prompt"];
    let text = run(&place, &[&more[..], &["-o", "a.mp4"]].concat());
    assert_eq!(text.matches("no vision tower").count(), 1, "{text}");
    assert_eq!(tag(&place, "a.mp4", "comment"), Some(enhance(&place, &["--image-to-video"])));
    assert_eq!(tag(&place, "a.mp4", "prompt_image"), None);
}

#[test]
fn what_cannot_be_seen_is_refused() {
    let place = Place::new();
    let image = crate::binary::fixtures().join("inputs/image0.png").display().to_string();
    let refused = |gemma: &str, more: &[&str], words: &[&str]| {
        let args = ["enhance", "--gemma-root", gemma, "-p", SAID, "--device", "cpu"];
        place.refused(&[&args[..], more].concat(), words);
    };
    let own = tiny().gemma.display().to_string();
    refused(&own, &["--image", "nowhere.png"], &["nowhere.png"]);
    let text = place.write("text.png", b"no image").display().to_string();
    refused(&own, &["--image", &text], &["text.png", "PNG, JPEG and WebP"]);
    refused(&own, &["--image", &image, "--image-to-video"], &["--image-to-video"]);
    let words = "a <image_soft_token> b";
    let args = ["enhance", "--gemma-root", &own, "-p", words, "--device", "cpu", "--image", &image];
    place.refused(&args, &["words that stand for images", "leave them out"]);
    let broken = other_gemma(&place, |config| config["vision_config"]["patch_size"] = 5.into());
    refused(&broken, &["--image", &image], &["vision_config.patch_size", "expected to divide `image_size` 42"]);
    let broken = other_gemma(&place, |config| config["image_token_index"] = 99_999.into());
    refused(&broken, &["--image", &image], &["no token 99999", "without the image"]);
    let broken = other_gemma(&place, |config| config["vision_config"]["hidden_size"] = 48.into());
    refused(&broken, &["--image", &image], &["vision_tower.vision_model", "48"]);
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
