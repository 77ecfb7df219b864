//! Plans that are damaged, foreign, or for other weights.

use ltxc_ir::plan::container;
use ltxc_models::synth::{Preset, synth};

use crate::binary::{Place, tiny, with};

/// `run` and `inspect` must refuse these bytes as a plan.
#[track_caller]
fn refused(bytes: &[u8], words: &[&str]) {
    let place = Place::new();
    place.write("a.ltxplan", bytes);
    let words = [&["a.ltxplan"], words].concat();
    place.refused(&["run", "a.ltxplan", "-p", "x", "-o", "a.mp4"], &words);
    place.refused(&["inspect", "a.ltxplan"], &words);
}

#[test]
fn what_is_wrong_with_a_plan_is_said() {
    let plan = std::fs::read(&tiny().plan).unwrap();
    refused(&plan[..plan.len() / 2], &["ends after", "compile it again"]);
    refused(&plan[..20], &["ends after", "compile it again"]);
    refused(&[], &["not an ltxc plan", "ltxc compile"]);
    refused(b"PK\x03\x04 something else", &["not an ltxc plan"]);
    let changed = |at: usize, value: u8| {
        let mut changed = plan.clone();
        changed[at] = value;
        changed
    };
    refused(&changed(8, 0), &["format 0", &format!("reads {}", container::FORMAT), "run `ltxc compile` again"]);
    refused(&changed(plan.len() - 1, !plan[plan.len() - 1]), &["hash", "compile it again"]);
    refused(&changed(40, !plan[40]), &["hash", "header"]);
    refused(&[&plan[..], b"more"].concat(), &["4 bytes behind"]);
    let place = Place::new();
    place.refused(&["run", "none.ltxplan", "-p", "x"], &["none.ltxplan"]);
    place.refused(&["run", ".", "-p", "x"], &["plan `.`"]);
    for more in [&[][..], &["--graph"], &["--kernels"], &["--html", "x.html"]] {
        place.refused(&[&["inspect", "."], more].concat(), &["`.` is a folder and no plan", "`ltxc info`"]);
    }
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    let plan = std::fs::read(&tiny().plan).unwrap();
    container::decode(&plan).unwrap();
    // All of the header, and samples of the rest.
    let step = plan.len() / 1000 + 1;
    let mut damaged = plan.clone();
    for at in (0..256).chain((256..plan.len()).step_by(step)) {
        damaged[at] ^= 1 << (at % 8);
        assert!(container::decode(&damaged).is_err(), "bit {} of byte {at}", at % 8);
        damaged[at] = plan[at];
        assert!(container::decode(&plan[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn other_weights_are_told_from_the_plans() {
    let (place, tiny) = (Place::new(), tiny());
    let plan = tiny.plan.display().to_string();
    let run = |weights: &str| ["run", &plan, "--weights", weights, "-p", "x", "-o", "a.mp4"].map(String::from);
    std::fs::create_dir(place.path("empty")).unwrap();
    place.refused(&run("empty"), &["model weight file", "not found below `empty`", "--weights"]);
    place.refused(&run("nowhere"), &["not found below `nowhere`"]);
    // The same model with other numbers: same length, same header.
    synth(Preset::Tiny, &place.path("other"), 11).unwrap();
    place.refused(&run("other"), &["model weight file", "same length", "ltx-2-tiny.safetensors"]);
    // Complete but for the tokenizer.
    std::fs::create_dir(place.path("most")).unwrap();
    for from in [&tiny.checkpoint, &tiny.upsampler, &tiny.gemma.join("model.safetensors")] {
        std::fs::copy(from, place.path("most").join(from.file_name().unwrap())).unwrap();
    }
    place.refused(&run("most"), &["tokenizer.json", "not found below `most`", "Gemma"]);
    let other = synth(Preset::Tiny, &place.path("third"), 10).unwrap();
    place.write("most/tokenizer.json", &std::fs::read(other.gemma.join("tokenizer.json")).unwrap());
    place.ok(&with(run("most").into(), &["-q"]));
}
