//! CUDA without a GPU: a driver and a compiler of our own (`fake_cuda.c`), on which kernels do nothing and everything can
//! fail. What kernels compute is tested elsewhere; this is about what surrounds them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

use crate::binary::{Done, Place, SHAPE, sentence, tiny, with};

/// Folders with a driver, and with a compiler beside it; the last one is for headers, which nobody reads.
struct Libraries {
    driver: PathBuf,
    compiler: PathBuf,
    headers: PathBuf,
}

fn libraries() -> &'static Libraries {
    static BUILT: OnceLock<Libraries> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/fake_cuda.c");
        let built = |name: &str| {
            let folder = folder.join(name);
            std::fs::create_dir_all(&folder).unwrap();
            let mut command = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
            command.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"]);
            let done = command.arg(folder.join(format!("{name}.so"))).arg(&source).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            folder
        };
        let headers = folder.join("headers");
        std::fs::create_dir_all(headers.join("include")).unwrap();
        Libraries { driver: built("libcuda"), compiler: built("libnvrtc"), headers }
    })
}

/// The binary with these arguments, on a machine with an NVIDIA driver and compiler that behave as `settings` say.
fn command(place: &Place, args: &[impl AsRef<OsStr>], settings: &[(&str, &str)]) -> Command {
    let Libraries { driver, compiler, headers } = libraries();
    let mut command = place.command(args);
    let paths = std::env::join_paths([driver, compiler]).unwrap();
    command.env("LD_LIBRARY_PATH", paths).env("CUDA_PATH", headers);
    command.envs(settings.iter().copied());
    command
}

fn run(place: &Place, args: &[impl AsRef<OsStr>], settings: &[(&str, &str)]) -> Done {
    command(place, args, settings).output().unwrap().into()
}

#[track_caller]
fn ok(place: &Place, args: &[impl AsRef<OsStr>], settings: &[(&str, &str)]) -> Done {
    let done = run(place, args, settings);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    done
}

/// Must fail with one sentence that has all of `words`, and leave nothing behind.
#[track_caller]
fn refused(place: &Place, args: &[impl AsRef<OsStr>], settings: &[(&str, &str)], words: &[&str]) {
    let before = place.listing();
    let done = run(place, args, settings);
    let said = sentence(&done, words);
    assert_eq!(place.listing(), before, "something is left after: {said}");
    assert!(said.len() < 700 && said.trim_end().lines().count() == 1, "this is no sentence: {said}");
}

/// `compile` the small model to `a.ltxplan`.
fn compile(more: &[&str]) -> Vec<String> {
    let compile = with(["compile".to_string()].into_iter().chain(tiny().model_args()).collect(), &SHAPE);
    with(compile, &[&["-o", "a.ltxplan"], more].concat())
}

/// `run` that plan. Kernels that do nothing make no picture.
fn generate(more: &[&str]) -> Vec<String> {
    let folder = tiny().folder.display().to_string();
    let fixed = ["run", "a.ltxplan", "--weights", &folder, "-p", "x", "-o", "a.mp4", "--allow-bad-numerics"];
    with(fixed.map(String::from).into(), more)
}

const ON_CUDA: [&str; 2] = ["--device", "cuda:0"];

#[test]
fn a_device_is_found_and_described() {
    let place = Place::new();
    let text = ok(&place, &["doctor"], &[]).stdout;
    assert!(text.contains("cuda:0: Fake GPU, 16.0 GB of its own, sm_90, f16, bf16, tensor cores"), "{text}");
    let old = ok(&place, &["doctor"], &[("FAKE_CUDA_ARCH", "70")]).stdout;
    assert!(old.contains("sm_70, f16, tensor cores"), "{old}");
    // A driver may be there without a device.
    let none = ok(&place, &["doctor"], &[("FAKE_CUDA_FAIL", "cuInit=100")]).stdout;
    assert!(none.contains("cuda: no device found"), "{none}");
}

/// What is installed and cannot be used is said by `doctor`, passed over aloud by `auto`, and refused by name.
#[track_caller]
fn unusable(settings: &[(&str, &str)], words: &[&str]) {
    let place = Place::new();
    let says = |text: &str| words.iter().for_each(|w| assert!(text.contains(w), "`{w}` is not in: {text}"));
    says(&ok(&place, &["doctor"], settings).stdout);
    let compiled = ok(&place, &compile(&["--device", "auto"]), settings).stderr;
    says(&compiled);
    assert!(compiled.contains("device: `cpu`, because cuda: "), "{compiled}");
    std::fs::remove_file(place.path("a.ltxplan")).unwrap();
    refused(&place, &compile(&ON_CUDA), settings, &[&["no device `cuda:0`"], words].concat());
    ok(&place, &compile(&["--device", "cuda"]), settings);
    refused(&place, &generate(&ON_CUDA), settings, &[&["no device `cuda:0`"], words].concat());
    refused(&place, &generate(&[]), settings, &[&["compiled for `cuda`"], words].concat());
}

#[test]
fn drivers_that_are_too_old_are_told() {
    unusable(&[("FAKE_CUDA_VERSION", "11020")], &["the driver is for CUDA 11.2", "11.8 or newer"]);
    unusable(&[("FAKE_NVRTC_VERSION", "12090")], &["for CUDA 12.8, is too old for", "CUDA 12.9", "update the driver"]);
    unusable(&[("FAKE_CUDA_FAIL", "cuInit=999")], &["the driver does not start"]);
}

#[test]
fn a_missing_compiler_or_header_is_named() {
    let driver = libraries().driver.display().to_string();
    unusable(&[("LD_LIBRARY_PATH", &driver)], &["libnvrtc", "LD_LIBRARY_PATH"]);
}

#[test]
fn auto_takes_the_gpu_without_a_word() {
    let place = Place::new();
    let done = ok(&place, &compile(&["--no-kernels"]), &[]);
    assert!(!done.stderr.contains("because"), "{}", done.stderr);
    let facts: Value = serde_json::from_str(&place.ok(&["inspect", "a.ltxplan", "--json"]).stdout).unwrap();
    assert_eq!(facts["target"]["backend"], "cuda");
}

/// The facts of a command with `--json`, and how many kernels the compiler has seen.
#[track_caller]
fn counted(place: &Place, args: &[String], settings: &[(&str, &str)]) -> (Value, usize) {
    let log = place.path("compiled.log").display().to_string();
    let _ = std::fs::remove_file(&log);
    let done = ok(place, args, &[settings, &[("FAKE_CUDA_LOG", &log)]].concat());
    let last: Value = serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap();
    (last["facts"].clone(), std::fs::read_to_string(&log).unwrap_or_default().lines().count())
}

#[test]
fn kernels_of_a_plan_are_not_compiled_again() {
    let place = Place::new();
    // Compiling on the device stores what the compiler made.
    let (facts, seen) = counted(&place, &compile(&[&ON_CUDA[..], &["--json"]].concat()), &[]);
    let stored = facts["kernels"]["compiled"].as_u64().unwrap();
    assert!(stored > 20 && seen as u64 >= stored && facts["kernels"]["sources"] == 0, "{facts}, {seen}");

    let (facts, seen) = counted(&place, &generate(&["--frozen", "--json"]), &[]);
    let launched = facts["kernels"]["launched"].as_u64().unwrap();
    assert!(launched > 20 && launched <= stored, "{facts} of {stored}");
    assert_eq!((facts["kernels"]["compiled"].as_u64(), seen), (Some(0), 0));

    // Another architecture or driver compiles everything itself, and may not if it is frozen.
    for other in [("FAKE_CUDA_ARCH", "80"), ("FAKE_CUDA_VERSION", "12090")] {
        let (facts, seen) = counted(&place, &generate(&["--json"]), &[other]);
        assert_eq!(facts["kernels"]["compiled"], facts["kernels"]["launched"], "{other:?}");
        assert!(seen > 20, "{other:?}: {seen}");
        std::fs::remove_file(place.path("a.mp4")).unwrap();
        refused(&place, &generate(&["--frozen"]), &[other], &["`cuda:0`", "--frozen", "ltxc tune PLAN"]);
    }

    // So does a plan without kernels, until it is tuned.
    ok(&place, &compile(&["--device", "cuda"]), &[]);
    refused(&place, &generate(&["--frozen"]), &[], &["`cuda:0`", "--frozen", "ltxc tune PLAN"]);
    let tune = ["tune", "a.ltxplan", "--device", "cuda:0", "--json"].map(String::from);
    let (facts, _) = counted(&place, &tune, &[]);
    assert!(facts["compiled"].as_u64().unwrap() > 20 && facts["tuned"].as_u64().unwrap() > 20, "{facts}");
    let (facts, seen) = counted(&place, &generate(&["--frozen", "--json"]), &[]);
    assert_eq!((facts["kernels"]["compiled"].as_u64(), seen), (Some(0), 0));
}

#[test]
fn failures_of_the_driver_are_sentences() {
    let place = Place::new();
    ok(&place, &compile(&["--device", "cuda"]), &[]);
    let fails = |fail: &str, words: &[&str]| {
        refused(&place, &generate(&[]), &[("FAKE_CUDA_FAIL", fail)], &[&["`cuda:0`"], words].concat());
    };
    // What does not fit is known before anything is allocated; what others took meanwhile is not.
    refused(
        &place,
        &generate(&[]),
        &[("FAKE_CUDA_MEMORY", "1000000")],
        &["needs", "of memory", "`cuda:0`", "smaller size"],
    );
    for at in ["", "@2", "@30"] {
        let fail = format!("cuMemAllocAsync{at}=2,cuMemAlloc_v2=2");
        fails(&fail, &["out of memory", "smaller size"]);
    }
    // A kernel that the driver refuses, one that reads where it must not, a device that is reset.
    fails("cuLaunchKernel@10=701", &["ltxc doctor"]);
    fails("cuEventSynchronize@3=700,cuEventRecord@4=700,cuEventCreate@5=700", &["ltxc doctor"]);
    fails("cuEventSynchronize@2=702", &["lost", "run again"]);
    fails("cuMemcpyHtoDAsync_v2@5=719", &["ltxc doctor"]);
    fails("cuMemcpyDtoHAsync_v2=719", &["ltxc doctor"]);
    fails("cuModuleLoadData@3=218", &["ltxc doctor"]);
    fails("nvrtcCompileProgram@3=6", &["a mistake that was asked for", "ltxc doctor"]);
    fails("cuDevicePrimaryCtxRetain=2", &["out of memory"]);
    fails("cuDevicePrimaryCtxRetain=999", &["ltxc doctor"]);
    // Nothing of a failure is left behind.
    ok(&place, &generate(&["-q"]), &[]);
}
