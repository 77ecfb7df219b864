//! Kernels of GPUs without a GPU: the CUDA C++ and Metal text of every kernel call of full-size models.
//!
//! Whether the text compiles is for the compiler of the target to say: with `LTXC_KERNEL_SOURCES=DIR` the tests write what
//! they see to `DIR/TARGET/NAME.cu` (`.metal`), and `tests/tools/nvrtc_check.py` compiles that with NVRTC. Whether it is
//! right is for the tests of kernels on devices to say.

mod plan;
mod recorder;
mod targets;

use std::collections::BTreeMap;
use std::path::PathBuf;

use ltxc_ir::plan::Target;

use plan::{Recording, distinct_calls, plans, record};
use targets::{Cuda, Gpu, Metal};

/// Generations of NVIDIA GPUs with the names that their compilers use: A100, H100, B200.
const CUDA: [(u16, &str); 3] = [(80, "sm_80"), (90, "sm_90a"), (100, "sm_100")];

/// Generation of Apple GPUs, by the version of Metal.
const METAL: u16 = 3;

#[test]
fn every_call_has_cuda_source() {
    let plans = plans(&Target::cuda());
    for (generation, name) in CUDA {
        check(&record::<Cuda>(generation, &distinct_calls(&plans)), name, "cu", "__global__");
    }
}

#[test]
fn every_call_has_metal_source() {
    let plans = plans(&Target::wgpu());
    check(&record::<Metal>(METAL, &distinct_calls(&plans)), Metal::NAME, "metal", "[[kernel]]");
}

/// Fails with everything that is wrong, after what is right was written.
#[track_caller]
fn check(recording: &Recording, target: &str, extension: &str, entry: &str) {
    let Recording { kernels, problems } = recording;
    if let Some(folder) = std::env::var_os("LTXC_KERNEL_SOURCES") {
        write(recording, PathBuf::from(folder).join(target), extension);
    }
    assert!(problems.is_empty(), "{target}: {} problems\n{}", problems.len(), problems.join("\n"));
    let without: Vec<&str> =
        kernels.iter().filter(|k| !k.source.text.contains(entry)).map(|k| k.source.name.as_str()).collect();
    assert!(without.is_empty(), "{target}: no entry point in {}", without.join(", "));
    let most = kernels.iter().max_by_key(|k| k.source.shared_bytes).expect("a plan has kernels");
    println!(
        "{target}: {} kernels, {} B of shared memory in `{}`",
        kernels.len(),
        most.source.shared_bytes,
        most.source.name
    );
}

/// One file per kernel. The first line says in JSON what it is launched with.
fn write(recording: &Recording, folder: PathBuf, extension: &str) {
    std::fs::create_dir_all(&folder).expect("the folder of sources");
    let mut namesakes: BTreeMap<&str, usize> = BTreeMap::new();
    for kernel in &recording.kernels {
        let source = &kernel.source;
        let number = namesakes.entry(&source.name).or_default();
        let header = serde_json::json!({
            "kernel": source.name,
            "units": source.cube_dim.iter().product::<u32>(),
            "shared_bytes": source.shared_bytes,
            "calls": kernel.calls,
            "example": kernel.example,
        });
        let path = folder.join(format!("{}.{number}.{extension}", source.name));
        std::fs::write(path, format!("// {header}\n{}", source.text)).expect("a kernel is written");
        *number += 1;
    }
}
