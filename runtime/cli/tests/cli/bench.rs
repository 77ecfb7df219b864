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

#[test]
fn a_plan_for_another_device_is_refused() {
    let place = Place::new();
    let compile = with(["compile".to_string()].into_iter().chain(tiny().model_args()).collect(), &SHAPE);
    place.ok(&with(compile, &["--device", "vulkan", "-o", "gpu.ltxplan"]));
    let folder = tiny().folder.display().to_string();
    place.refused(&["bench", "gpu.ltxplan", "--weights", &folder, "--device", "cpu"], &["`wgpu`", "`cpu`"]);
    place.refused(&["bench", "absent.ltxplan"], &["absent.ltxplan"]);
}
