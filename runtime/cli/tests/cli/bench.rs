//! `ltxc bench`: what it measures, and what it says where it cannot.

use serde_json::Value;

use crate::binary::{Place, SHAPE, tiny, with};

fn bench(more: &[&str]) -> Vec<String> {
    let (plan, folder) = (tiny().plan.display().to_string(), tiny().folder.display().to_string());
    let fixed = ["bench", &plan, "--weights", &folder, "--device", "cpu", "--rounds", "1"];
    with(fixed.map(String::from).into(), more)
}

/// The names of programs and how often a generation runs them.
fn programs(findings: &Value) -> Vec<(String, u64)> {
    let list = findings["programs"].as_array().unwrap();
    list.iter().map(|p| (p["name"].as_str().unwrap().to_string(), p["runs"].as_u64().unwrap())).collect()
}

#[test]
fn every_program_of_a_generation_is_measured() {
    let place = Place::new();
    let done = place.ok(&bench(&["--json"]));
    assert_eq!(done.stderr, "");
    let findings: Value = serde_json::from_str(&done.stdout).unwrap();
    let found = programs(&findings);
    let runs = |name: &str| found.iter().find(|(n, _)| n == name).map(|(_, runs)| *runs);
    // Eight and three steps; one tile; only the bucket of a short prompt; no images.
    let expected =
        [("encode.64", 1), ("connect", 1), ("stage1", 8), ("upsample", 1), ("stage2", 3), ("decode_audio", 1)];
    for (name, times) in expected {
        assert_eq!(runs(name), Some(times), "{name} of {found:?}");
    }
    assert!(found.iter().any(|(name, _)| name.starts_with("decode.")), "{found:?}");
    for absent in ["encode.32", "stage1.first", "encode_image.stage1"] {
        assert_eq!(runs(absent), None, "{absent}");
    }

    let positive = |value: &Value| value.as_f64().unwrap() > 0.0;
    let ceilings = &findings["ceilings"];
    assert!(["copy", "product_f32", "product_bf16"].iter().all(|c| positive(&ceilings[c])), "{ceilings}");
    let plan: Value =
        serde_json::from_str(&place.ok(&["inspect", &tiny().plan.display().to_string(), "--json"]).stdout).unwrap();
    assert_eq!(findings["plan"], plan["hash"]);
    for program in findings["programs"].as_array().unwrap() {
        let listed = plan["programs"].as_array().unwrap().iter().find(|p| p["name"] == program["name"]).unwrap();
        assert!(["calls", "flops", "bytes"].iter().all(|key| program[key] == listed[key]), "{program}");
        assert!(["load_seconds", "first_seconds", "warm_seconds"].iter().all(|key| positive(&program[key])));
    }
    // Kernels add up to the programs, each as often as it runs.
    let sum = |list: &str, f: &dyn Fn(&Value) -> f64| findings[list].as_array().unwrap().iter().map(f).sum::<f64>();
    let number = |v: &Value, key: &str| v[key].as_f64().unwrap();
    for (program, kernel) in [("flops", "flops"), ("bytes", "bytes"), ("calls", "calls"), ("warm_seconds", "seconds")] {
        let all = sum("programs", &|p| number(p, "runs") * number(p, program));
        let parts = sum("kernels", &|k| number(k, kernel));
        assert!((all - parts).abs() <= 1e-9 * all, "{program}: {all}, kernels {parts}");
    }
}

#[test]
fn one_part_can_be_measured_alone() {
    let place = Place::new();
    let done = place.ok(&bench(&["--only", "stage2", "--html", "a.html"]));
    let page = String::from_utf8(place.read("a.html")).unwrap();
    for word in ["best copy", "stage2.generation", "of the limit", "limited by arithmetic", "ltxc bench "] {
        assert!(page.contains(word), "{word}: {page}");
    }
    assert!(page.matches("<text ").count() > 10 && page.ends_with("</html>\n"));
    assert_eq!(ltxc::bench::drawing::outside(&page), [""; 0]);
    for word in ["device", "ceilings", "stage2", "operands → result", "resident"] {
        assert!(done.stdout.contains(word), "{word}: {}", done.stdout);
    }
    assert!(!done.stdout.contains("decode_audio"), "{}", done.stdout);
    place.refused(&bench(&["--only", "stage9"]), &["no part `stage9`", "stage1", "decode"]);
}

/// `bench` of the small model itself.
fn of_model(more: &[&str]) -> Vec<String> {
    let fixed = ["bench", "--device", "cpu", "--rounds", "2"];
    let fixed = fixed.into_iter().map(String::from).chain(tiny().model_args());
    with(fixed.collect(), &[&SHAPE[..], more].concat())
}

#[test]
fn levels_of_fusion_are_compared_part_by_part() {
    let place = Place::new();
    let done = place.ok(&of_model(&["--levels", "--json"]));
    assert_eq!(done.stderr, "");
    let findings: Value = serde_json::from_str(&done.stdout).unwrap();
    place.ok(&with(
        ["compile".to_string()].into_iter().chain(tiny().model_args()).collect(),
        &[&SHAPE[..], &["--device", "cpu", "-o", "a.ltxplan"]].concat(),
    ));
    let plan: Value = serde_json::from_str(&place.ok(&["inspect", "a.ltxplan", "--json"]).stdout).unwrap();
    assert_eq!(findings["plan"], plan["hash"]);

    let list = |of: &Value| of.as_array().unwrap().clone();
    let number = |of: &Value, key: &str| of[key].as_f64().unwrap_or_else(|| panic!("`{key}` of {of}"));
    let programs = list(&findings["programs"]);
    let mut parts: Vec<&Value> = programs.iter().map(|p| &p["group"]).collect();
    parts.dedup();
    let rows = list(&findings["levels"]);
    assert_eq!(rows.iter().map(|row| &row["name"]).collect::<Vec<_>>(), parts);
    for row in &rows {
        let levels = list(&row["levels"]);
        assert_eq!(levels.iter().map(|l| &l["level"]).collect::<Vec<_>>(), ["full", "composite", "none"], "{row}");
        // Full fusion is what the plan does: all runs of its programs.
        let own = programs.iter().filter(|p| p["group"] == row["name"]);
        for key in ["calls", "flops", "bytes"] {
            let expected: f64 = own.clone().map(|p| number(p, "runs") * number(p, key)).sum();
            assert_eq!(number(&levels[0], key), expected, "{key} of {row}");
        }
        for level in &levels {
            let [median, least] = ["seconds", "least_seconds"].map(|key| number(level, key));
            assert!(0.0 < least && least <= median && number(level, "first_seconds") > 0.0, "{level}");
            assert!(number(level, "difference") <= 1e-5, "{level}");
            let saved = number(level, "elementwise_bytes") - number(&levels[0], "elementwise_bytes");
            let predicted = saved / number(&findings["ceilings"], "copy");
            assert!((number(level, "predicted_gain") - predicted).abs() <= 1e-9 * predicted, "{level}");
        }
    }
    let bytes_of_stages = |i: usize| -> f64 {
        let stages = rows.iter().filter(|row| row["name"].as_str().unwrap().starts_with("stage"));
        stages.map(|row| number(&row["levels"][i], "elementwise_bytes")).sum()
    };
    assert!(bytes_of_stages(0) < bytes_of_stages(1) && bytes_of_stages(1) < bytes_of_stages(2), "{rows:?}");
}

#[test]
fn levels_of_fusion_are_shown() {
    let place = Place::new();
    let done = place.ok(&of_model(&["--levels", "--only", "stage2", "--html", "a.html"]));
    let head = done.stdout.lines().find(|line| line.starts_with("part  ")).unwrap_or_else(|| panic!("{}", done.stdout));
    for column in ["fusion", "least ms", "full / this", "ms gained", "ms predicted"] {
        assert!(head.contains(column), "{column}: {head}");
    }
    let page = String::from_utf8(place.read("a.html")).unwrap();
    for word in ["one kernel per composite", "gained by full fusion", " predicted</text>", "--only stage2 --levels"] {
        assert!(page.contains(word), "{word}: {page}");
    }
    assert_eq!(ltxc::bench::drawing::outside(&page), [""; 0]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = Place::new();
    place.refused(&bench(&["--levels"]), &["tiny.ltxplan", "one level of fusion", "model files"]);
    place.refused(&bench(&["--height", "128"]), &["tiny.ltxplan", "--height"]);
    place.refused(&bench(&["--cfg", "3"]), &["tiny.ltxplan", "guidance", "model files"]);
    place.refused(&["bench", "--levels"], &["name a plan, or a model"]);
    place.refused(&of_model(&["--cfg", "3"]), &["guidance of the picture", "`distilled`"]);
}

#[test]
fn a_plan_for_another_device_is_refused() {
    let place = Place::new();
    let compile = with(["compile".to_string()].into_iter().chain(tiny().model_args()).collect(), &SHAPE);
    place.ok(&with(compile, &["--device", "vulkan", "-o", "gpu.ltxplan"]));
    let folder = tiny().folder.display().to_string();
    place.refused(&["bench", "gpu.ltxplan", "--weights", &folder, "--device", "cpu"], &["`wgpu`", "`cpu`"]);
    place.refused(&["bench", "absent.ltxplan"], &["absent.ltxplan"]);
}
