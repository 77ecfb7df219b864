//! What was fused and what was not, as `compile` and `inspect` tell it, and the flags of the compiler.

use std::collections::BTreeMap;

use ltxc_compiler::passes;
use ltxc_ir::text::parse;
use ltxc_ir::verify::verify;
use serde_json::Value;

use crate::binary::{Place, SHAPE, tiny, with};

/// `compile` the small model to `a.ltxplan` for the processor.
fn compile(more: &[&str]) -> Vec<String> {
    compile_for("cpu", more)
}

fn compile_for(device: &str, more: &[&str]) -> Vec<String> {
    let compile = with(["compile".to_string()].into_iter().chain(tiny().model_args()).collect(), &SHAPE);
    with(compile, &[&["--device", device, "--no-kernels", "-o", "a.ltxplan"], more].concat())
}

/// What `compile --json` says of fusion, and `inspect --json` of the programs.
#[track_caller]
fn facts(place: &Place, more: &[&str]) -> (Value, Vec<Value>) {
    facts_for(place, "cpu", more)
}

#[track_caller]
fn facts_for(place: &Place, device: &str, more: &[&str]) -> (Value, Vec<Value>) {
    let compiled = place.ok(&compile_for(device, &[more, &["--json"]].concat())).stdout;
    let last: Value = serde_json::from_str(compiled.lines().last().unwrap()).unwrap();
    let plan: Value = serde_json::from_str(&place.ok(&["inspect", "a.ltxplan", "--json"]).stdout).unwrap();
    (last["facts"]["fusion"].clone(), plan["programs"].as_array().unwrap().clone())
}

fn rows<'a>(facts: &'a Value, key: &str) -> &'a [Value] {
    facts[key].as_array().map_or(&[], Vec::as_slice)
}

fn sum(rows: &[Value], key: &str) -> u64 {
    rows.iter().map(|row| row[key].as_u64().unwrap()).sum()
}

fn words(row: &Value, keys: &[&str]) -> Vec<String> {
    keys.iter().map(|key| row[key].as_str().unwrap_or_else(|| panic!("no {key} in {row}")).to_string()).collect()
}

/// Bytes that all programs move.
fn traffic(programs: &[Value]) -> u64 {
    sum(programs, "bytes")
}

#[test]
fn every_group_is_named_with_what_it_saved() {
    let place = Place::new();
    let (compiled, programs) = facts(&place, &[]);
    let text = place.ok(&["inspect", "a.ltxplan"]).stdout;
    let mut all: BTreeMap<Vec<String>, [u64; 4]> = BTreeMap::new();
    for program in &programs {
        // Each part of the text belongs to a program.
        let name = program["name"].as_str().unwrap();
        let own = text.split_once(&format!("\n{name}\n")).map_or("", |(_, rest)| rest);
        let own: String = own.lines().take_while(|line| line.starts_with("  ")).map(|l| format!("{l}\n")).collect();
        for row in rows(program, "fused") {
            let group = words(row, &["pattern", "parts"]);
            assert!(own.contains(&group[1]), "{name}: {group:?} is not in\n{own}");
            let counted = ["calls", "kernels", "bytes", "saved_bytes"].map(|key| row[key].as_u64().unwrap());
            assert!(counted[0] > 0 && counted[1] >= counted[0] && counted[2] > 0, "{name}: {row}");
            all.entry(group).or_default().iter_mut().zip(counted).for_each(|(sum, n)| *sum += n);
        }
        for row in rows(program, "apart") {
            let pair = words(row, &["first", "second", "reason"]);
            assert!(pair.iter().all(|word| !word.is_empty()) && row["times"].as_u64().unwrap() > 0, "{name}: {row}");
        }
    }
    let told: BTreeMap<Vec<String>, [u64; 4]> = rows(&compiled, "fused")
        .iter()
        .map(|row| {
            let counted = ["calls", "kernels", "bytes", "saved_bytes"].map(|key| row[key].as_u64().unwrap());
            (words(row, &["pattern", "parts"]), counted)
        })
        .collect();
    assert_eq!(told, all);
    let patterns: Vec<&str> = all.keys().map(|group| group[0].as_str()).collect();
    for pattern in ["attention", "gemm", "conv", "group-norm", "adaln", "norm", "map"] {
        assert!(patterns.contains(&pattern), "{pattern}: {patterns:?}");
    }
    assert!(!rows(&compiled, "apart").is_empty());

    // The largest are told by `compile` without being asked.
    let said = place.ok(&compile(&[])).stderr;
    let first = &rows(&compiled, "fused")[0];
    assert!(said.contains(first["parts"].as_str().unwrap()) && said.contains("apart "), "{said}");
}

#[test]
fn what_is_saved_is_what_the_parts_move() {
    let place = Place::new();
    let (compiled, fused) = facts(&place, &[]);
    let passes = ["fuse-attention", "fuse-product", "fuse-group-norm", "fuse-rows"];
    let (nothing, apart) = facts(&place, &passes.map(|pass| ["--disable", pass]).concat());
    assert!(rows(&nothing, "fused").is_empty());
    let (saved, more) = (sum(rows(&compiled, "fused"), "saved_bytes"), traffic(&apart) - traffic(&fused));
    // Maps that follow each other count as one of the kernels that a group replaces: what is said is never too much.
    assert!(saved <= more && saved > more / 2, "{saved} bytes saved, {more} more without fusion");
}

#[test]
fn passes_can_be_left_out_one_by_one() {
    let place = Place::new();
    let patterns = |fusion: &Value| {
        rows(fusion, "fused").iter().map(|r| r["pattern"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    for (pass, pattern) in [
        ("fuse-attention", "attention"),
        ("fuse-product", "conv"),
        ("fuse-group-norm", "group-norm"),
        ("fuse-rows", "adaln"),
    ] {
        let (with, _) = facts(&place, &[]);
        let (without, _) = facts(&place, &["--disable", pass]);
        assert!(patterns(&with).iter().any(|p| p == pattern), "{pass}");
        assert!(patterns(&without).iter().all(|p| p != pattern), "{pass}: {:?}", patterns(&without));
    }
    for level in ["none", "composite"] {
        assert!(patterns(&facts(&place, &["--fuse", level]).0).is_empty(), "{level}");
    }
    place.refused(&compile(&["--disable", "fuse-everything"]), &["fuse-everything", "fuse-attention"]);
    place.refused(&compile(&["--fuse", "more"]), &["more", "composite"]);
}

#[test]
fn projections_are_packed_where_weights_are_copied() {
    let place = Place::new();
    let splits = |device: &str, more: &[&str]| {
        let (fusion, _) = facts_for(&place, device, more);
        let is_split = |row: &&Value| row["pattern"] == "gemm" && row["parts"].as_str().unwrap().ends_with("copy 3");
        rows(&fusion, "fused").iter().filter(is_split).map(|row| row["calls"].as_u64().unwrap()).sum::<u64>()
    };
    let packed = splits("cpu", &["--pack-projections"]);
    assert!(packed > 0);
    assert_eq!(splits("cuda", &[]), packed);
    assert_eq!([splits("cpu", &[]), splits("cuda", &["--disable", "pack-projections"])], [0, 0]);
    let both = ["--pack-projections", "--disable", "pack-projections"];
    place.refused(&compile(&both), &["--pack-projections", "--disable"]);
}

#[test]
fn packed_projections_make_the_same_video() {
    let place = Place::new();
    let folder = tiny().folder.display().to_string();
    let made = |more: &[&str], frames: &str| {
        place.ok(&compile(more));
        place.ok(&["run", "a.ltxplan", "--weights", &folder, "-p", "x", "-o", frames]);
        let names = (0..9).map(|i| format!("frame_{i:05}.png")).chain(["audio.wav".into()]);
        names.map(|name| place.read(&format!("{frames}/{name}"))).collect::<Vec<_>>()
    };
    assert!(made(&["--pack-projections"], "packed") == made(&[], "apart"));
}

#[test]
fn graphs_are_printed_after_every_pass() {
    let place = Place::new();
    let inspect = with(["inspect".to_string()].into_iter().chain(tiny().model_args()).collect(), &SHAPE);
    let programs = place.ok(&inspect).stdout.matches("; program ").count();
    assert!(programs > 10, "{programs} programs");
    for pass in passes().map(|pass| pass.name) {
        let printed = place.ok(&compile(&["--print-after", pass])).stdout;
        let mut seen = 0;
        for graph in printed.split("; program ").skip(1) {
            let (title, body) = graph.split_once('\n').unwrap();
            assert!(title.ends_with(&format!(" after {pass}")), "{title}");
            // The last one is followed by the path of the plan.
            let module =
                parse(body.trim_end().trim_end_matches("a.ltxplan")).unwrap_or_else(|e| panic!("{title}: {e}"));
            verify(&module).unwrap_or_else(|e| panic!("{title}: {e}"));
            seen += 1;
        }
        // A pass may run several times, on the graph of every program.
        let times = passes().iter().filter(|other| other.name == pass).count();
        assert_eq!(seen, times * programs, "{pass}");
    }
    place.refused(&compile(&["--print-after", "magic"]), &["magic", "fuse-rows"]);
}
