//! `ltxc debug bisect --ref`: from stages down to values, with a reference that is run by a command.

use std::path::Path;

use serde_json::Value;

use crate::binary::{Place, SHAPE, ltxc, tiny, with};
use crate::faults::with_tensor;

/// `bisect --ref` against this binary with another model.
fn bisect(place: &Place, folder: &str, checkpoint: &Path, more: &[&str]) -> crate::binary::Done {
    let model = tiny().model_args_with(checkpoint, &tiny().gemma).join(" ");
    let command = format!(
        "{} run {model} {} --pipeline distilled-one-stage --device cpu --debug-mode exact -p 'a fox' -o {{dir}}/out.mp4 \
         {{noise}} {{dump}}",
        ltxc().display(),
        SHAPE.join(" ")
    );
    let args = [&["debug".to_string(), "bisect".into()], &tiny().model_args()[..], &SHAPE.map(String::from)].concat();
    let own = ["--pipeline", "distilled-one-stage", "--device", "cpu", "-p", "a fox", "--ref", folder, "--json"];
    let command: &[&str] = if more.contains(&"--no-command") { &[] } else { &["--ref-cmd", &command] };
    let more: Vec<&str> = more.iter().copied().filter(|m| *m != "--no-command").collect();
    place.run(&with(args, &[&own[..], command, &more].concat()))
}

#[track_caller]
fn steps(done: &crate::binary::Done) -> Vec<(String, bool, String)> {
    let last = done.stdout.lines().last().unwrap_or_default();
    let facts: Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {}{}", done.stdout, done.stderr));
    let word = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let steps = facts["steps"].as_array().unwrap().iter();
    steps.map(|s| (word(&s["step"]), s["ok"] == true, word(&s["found"]))).collect()
}

#[test]
fn a_changed_layer_of_the_reference_is_found_down_to_its_values() {
    let place = Place::new();
    let key = "model.diffusion_model.transformer_blocks.1.attn2.to_v.weight";
    let faulty = with_tensor(&place, &tiny().checkpoint, key, |bytes| bytes.fill(0));
    let done = bisect(&place, "faulty", &faulty, &[]);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    let found = steps(&done);
    let of = |step: &str| found.iter().find(|f| f.0 == step).unwrap_or_else(|| panic!("no step {step}: {found:?}"));
    assert!(of("a").1 && of("b").1 && of("b").2.starts_with("2 files"), "{found:?}");
    assert!(!of("c").1 && of("c").2.contains("stage=LTX2DenoisingStage"), "{found:?}");
    assert!(!of("d").1 && of("d").2.contains("block=1."), "{found:?}");
    assert!(!of("e").1 && of("e").2.contains("block=1:attn2.out_sum"), "{found:?}");
    assert!(of("f").2.contains("first bad tensor: transformer.blocks.1.attn2.to_v"), "{found:?}");
    // The weights tell it at once.
    let done = bisect(&place, "faulty", &faulty, &["--ref-checkpoint", &faulty.display().to_string()]);
    assert!(!steps(&done)[0].1 && done.stdout.contains("blocks.1.attn2.to_v.weight"), "{}", done.stdout);

    let done = bisect(&place, "right", &tiny().checkpoint, &[]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    assert_eq!(steps(&done).len(), 3, "nothing is looked at below stages that agree");
}

#[test]
fn without_a_command_the_next_one_is_told() {
    let place = Place::new();
    let done = bisect(&place, "logs", &tiny().checkpoint, &["--no-command"]);
    assert_eq!(done.code, Some(1));
    let last = steps(&done).pop().unwrap();
    assert!(
        last.0 == "c" && last.2.contains("FASTVIDEO_DEBUG_STAGE_SUMS_PATH=") && last.2.contains("noise"),
        "{last:?}"
    );
    // With the log of the reference there, it goes on.
    std::fs::copy(place.path("logs/ltxc/stage_sums.log"), place.path("logs/stage_sums.log")).unwrap();
    let done = bisect(&place, "logs", &tiny().checkpoint, &["--no-command"]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
}
