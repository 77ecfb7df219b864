//! What prose cannot enforce: who may import whom, how long files are, what must not be in them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Crates of ours that each member may depend on, development dependencies included.
const EDGES: [(&str, &[&str]); 8] = [
    ("ir", &[]),
    ("models", &["ltxc-ir"]),
    ("kernels", &["ltxc-ir"]),
    ("compiler", &["ltxc-ir", "ltxc-kernels"]),
    ("runtime", &["ltxc-ir", "ltxc-kernels"]),
    ("runtime/cli", &["ltxc-ir", "ltxc-models", "ltxc-kernels", "ltxc-compiler", "ltxc-runtime"]),
    ("tests", &["ltxc-ir", "ltxc-models", "ltxc-kernels", "ltxc-compiler", "ltxc-runtime", "ltxc"]),
    ("bench", &["ltxc-ir", "ltxc-models", "ltxc-kernels", "ltxc-compiler", "ltxc-runtime", "ltxc"]),
];

#[test]
fn crates_import_only_what_the_architecture_allows() {
    let members: BTreeSet<String> = manifest("Cargo.toml")["workspace"]["members"]
        .as_array()
        .expect("members are a list")
        .iter()
        .map(|m| m.as_str().expect("members are strings").to_string())
        .collect();
    assert_eq!(members, EDGES.iter().map(|(m, _)| m.to_string()).collect(), "every member has a row in EDGES");
    for (member, allowed) in EDGES {
        let manifest = manifest(&format!("{member}/Cargo.toml"));
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let names = manifest.get(section).and_then(|t| t.as_table()).into_iter().flat_map(|t| t.keys());
            for name in names.filter(|n| *n == "ltxc" || n.starts_with("ltxc-")) {
                assert!(allowed.contains(&name.as_str()), "`{member}` must not depend on `{name}`");
            }
        }
    }
}

#[test]
fn chosen_crates_are_named_in_the_workspace() {
    let manifest = manifest("Cargo.toml");
    let dependencies = manifest["workspace"]["dependencies"].as_table().expect("a table");
    let chosen = [
        "cubecl",
        "cubecl-cuda",
        "cubecl-wgpu",
        "safetensors",
        "tokenizers",
        "serde",
        "bincode",
        "clap",
        "memmap2",
        "rayon",
    ];
    for name in chosen {
        assert!(dependencies.contains_key(name), "`{name}` is not in the workspace manifest");
    }
    assert_eq!(dependencies["bincode"]["version"].as_str(), Some("=2.0.1"));
}

fn manifest(path: &str) -> toml::Table {
    let path = workspace().join(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Rust files of the workspace by path relative to it.
fn sources() -> BTreeMap<String, String> {
    fn visit(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && path.file_name().is_some_and(|n| n != "target") {
                visit(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let root = workspace();
    let mut paths = Vec::new();
    EDGES.iter().for_each(|(member, _)| visit(&root.join(member), &mut paths));
    let relative = |p: &Path| p.strip_prefix(&root).expect("below the root").to_string_lossy().replace('\\', "/");
    paths.iter().map(|p| (relative(p), std::fs::read_to_string(p).expect("sources are text"))).collect()
}

/// Whether the file is a test or benchmark, where panics are how failures are told.
fn is_test(path: &str) -> bool {
    path.starts_with("tests/") || path.starts_with("bench/") || path.contains("/tests/") || path.ends_with("/tests.rs")
}

/// The part of a source file before its tests.
fn without_tests(text: &str) -> &str {
    text.find("#[cfg(test)]").map_or(text, |i| &text[..i])
}

#[test]
fn files_have_one_subject() {
    const MOST_LINES: usize = 900;
    let long: Vec<String> = (sources().iter())
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .map(|(path, lines)| format!("{path}: {lines} lines"))
        .collect();
    assert!(long.is_empty(), "longer than {MOST_LINES} lines:\n{}", long.join("\n"));
}

#[test]
fn files_open_with_a_module_doc() {
    let bare: Vec<String> =
        sources().into_iter().filter(|(_, text)| !text.starts_with("//!")).map(|(path, _)| path).collect();
    assert!(bare.is_empty(), "no module doc:\n{}", bare.join("\n"));
}

#[test]
fn nothing_is_left_unfinished() {
    // Split, so that this file does not find itself.
    let forbidden =
        [concat!("to", "do!("), concat!("unimpl", "emented!("), concat!("db", "g!("), concat!("#[ig", "nore")];
    let mut found = Vec::new();
    for (path, text) in sources() {
        for (i, line) in text.lines().enumerate() {
            if forbidden.iter().any(|f| line.contains(f)) {
                found.push(format!("{path}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn panics_outside_tests_are_proved_impossible() {
    let mut found = Vec::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        let lines: Vec<&str> = without_tests(&text).lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.trim_start();
            if code.starts_with("//") {
                continue;
            }
            // `expect` states its invariant as text; `unwrap` states nothing.
            if code.contains(".unwrap()") {
                found.push(format!("{path}:{}: {}", i + 1, code));
            }
        }
    }
    assert!(found.is_empty(), "unwrap outside tests:\n{}", found.join("\n"));
}

#[test]
fn graph_ops_are_documented_with_their_name() {
    let text: String =
        (sources().into_iter()).filter(|(path, _)| path.starts_with("ir/src/ops/")).map(|(_, text)| text).collect();
    for name in ltxc_ir::Op::names() {
        assert!(text.contains(&format!("\"{name}\"")) || name == "call", "op `{name}` is not in the op table");
    }
}
