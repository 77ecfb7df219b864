//! Files of noise: replay, formats, and what is refused.

use ltxc_runtime::noise_files::{Container, Stored};
use serde_json::Value;

use crate::binary::{Place, tiny, with};

const SLOTS: [(&str, &str); 4] = [
    ("--ltx2-initial-latent-path", "v1"),
    ("--ltx2-audio-latent-path", "a1"),
    ("--ltx2-refine-noise-path", "v2"),
    ("--ltx2-refine-audio-noise-path", "a2"),
];

fn flags(extension: &str) -> Vec<String> {
    SLOTS.iter().flat_map(|(flag, name)| [flag.to_string(), format!("{name}.{extension}")]).collect()
}

#[test]
fn replayed_noise_gives_the_same_bytes_in_every_format() {
    let place = Place::new();
    let run = |seed: &str, output: &str, flags: &[String]| {
        let more = ["-p", "x", "--no-metadata", "--seed", seed, "-o", output];
        place.ok(&[with(tiny().run_args(), &more), flags.to_vec()].concat());
    };
    run("3", "plain.mp4", &[]);
    for extension in ["safetensors", "npy", "npz", "pt"] {
        run("3", "saved.mp4", &flags(extension));
        // Another seed changes nothing where all noise is read.
        run("4", "read.mp4", &flags(extension));
        assert_eq!(place.read("saved.mp4"), place.read("plain.mp4"), "{extension}");
        assert_eq!(place.read("read.mp4"), place.read("plain.mp4"), "{extension}");
        for (_, name) in SLOTS {
            place.ok(&["debug", "noise", "show", &format!("{name}.{extension}")]);
            place.ok(&["debug", "noise", "diff", &format!("{name}.{extension}"), &format!("{name}.safetensors")]);
        }
    }
}

#[test]
fn noise_is_made_shown_converted_and_compared_without_a_model() {
    let place = Place::new();
    let size = ["-H", "128", "-W", "192", "--num-frames", "17"];
    place.ok(&[&["debug", "noise", "gen", "n"], &size[..]].concat());
    let done = place.ok(&["debug", "noise", "show", "n/stage2.video.safetensors", "--json"]);
    let facts: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(facts["shape"], serde_json::json!([1, 128, 3, 4, 6]));
    assert_eq!(facts["standard_normal"], true);
    place.refused(&[&["debug", "noise", "gen", "n"], &size[..]].concat(), &["never overwritten"]);
    place.refused(&["debug", "noise", "gen", "m", "-H", "100"], &["multiples of 64"]);
    place.refused(
        &["debug", "noise", "gen", "m", "--frame-rate", "1e-12"],
        &["`--frame-rate 0.000000000001`", "too long"],
    );
    place.refused(
        &["debug", "noise", "gen", "m", "--channels", "65536"],
        &["`stage2.video` would have", "smaller sizes"],
    );

    let convert =
        |args: &[&str]| place.ok(&[&["debug", "noise", "convert", "n/stage2.video.safetensors"], args].concat());
    convert(&["t.pt", "--layout", "tokens", "--bare"]);
    let bare = Container::Pt.decode(&place.read("t.pt")).unwrap();
    assert_eq!((bare[0].name.as_str(), &bare[0].shape[..]), ("", &[1, 72, 128][..]));
    place.ok(&["debug", "noise", "diff", "t.pt", "n/stage2.video.safetensors"]);
    place.ok(&["debug", "noise", "convert", "t.pt", "u.npz", "--layout", "native", "--grid", "3,4,6"]);
    place.ok(&["debug", "noise", "diff", "u.npz", "n/stage2.video.safetensors"]);
    let done = convert(&["b.pt", "--dtype", "bf16"]);
    assert!(done.stderr.contains("rounded"), "{}", done.stderr);
    assert_eq!(place.run(&["debug", "noise", "diff", "b.pt", "n/stage2.video.safetensors"]).code, Some(1));

    let scaled = Stored::f32("noise", &[1, 4, 5, 6, 7], vec![0.5; 840]);
    place.write("flat.safetensors", &Container::Safetensors.encode(&scaled).unwrap());
    assert_eq!(place.run(&["debug", "noise", "show", "flat.safetensors"]).code, Some(1));
}

#[test]
fn a_bundle_holds_the_noise_of_all_stages() {
    let place = Place::new();
    let run = |seed: &str, output: &str, more: &[&str]| {
        let args = [&["-p", "x", "--no-metadata", "--seed", seed, "-o", output], more].concat();
        place.ok(&with(tiny().run_args(), &args))
    };
    run("3", "plain.mp4", &[]);
    let done = run("3", "saved.mp4", &["--noise-bundle", "n"]);
    assert!(done.stderr.contains("noise stage2.audio") && done.stderr.contains("checksum="), "{}", done.stderr);
    // All files of a folder; a few values of sound are no test of a distribution.
    let shown = place.run(&["debug", "noise", "show", "n", "--json"]);
    assert_eq!(shown.stdout.lines().count(), 4, "{}{}", shown.stdout, shown.stderr);
    place.refused(&["debug", "noise", "show", "."].map(String::from), &["no file of noise"]);
    run("4", "read.mp4", &["--noise-bundle", "n"]);
    assert_eq!((place.read("saved.mp4"), place.read("read.mp4")), (place.read("plain.mp4"), place.read("plain.mp4")));
    // Files of any format, as `debug noise convert` or another tool writes them.
    place.ok(&["debug", "noise", "convert", "n/stage2.video.safetensors", "v.pt", "--layout", "tokens"]);
    std::fs::remove_file(place.path("n/stage2.video.safetensors")).unwrap();
    std::fs::rename(place.path("v.pt"), place.path("n/stage2.video.pt")).unwrap();
    run("5", "other.mp4", &["--noise-bundle", "n"]);
    assert_eq!(place.read("other.mp4"), place.read("plain.mp4"));
    let both = with(
        tiny().run_args(),
        &["-p", "x", "-o", "no.mp4", "--noise-bundle", "n", "--ltx2-initial-latent-path", "v.pt"],
    );
    assert_eq!(place.run(&both).code, Some(2));
}

#[test]
fn noise_that_does_not_fit_is_refused() {
    let place = Place::new();
    let run = |file: &str, words: &[&str]| {
        let args = with(tiny().run_args(), &["-p", "x", "-o", "a.mp4", "--ltx2-initial-latent-path", file]);
        let done = place.run(&args);
        crate::binary::sentence(&done, words);
        assert!(!place.path("a.mp4").exists());
    };
    let wrong = Stored::f32("video_latent", &[1, 2, 3], vec![0.0; 6]);
    place.write("wrong.pt", &Container::Pt.encode(&wrong).unwrap());
    run("wrong.pt", &["wrong.pt", "[1, 2, 3]", "this run needs"]);
    place.write("evil.pt", b"PK not an archive");
    run("evil.pt", &["evil.pt", "zip"]);
    place.write("x.bin", b"");
    run("x.bin", &["x.bin", ".safetensors, .npy, .npz or .pt"]);
    let other = Stored::f32("weights", &[1], vec![0.0]);
    place.write("other.safetensors", &Container::Safetensors.encode(&other).unwrap());
    run("other.safetensors", &["`weights`", "`noise`"]);
}
