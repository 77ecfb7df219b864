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

use cubecl_cpp::shared::CompilationOptions;
use cubecl_ir::{DeviceProperties, TargetProperties};
use ltxc_ir::ops::Matmul;
use ltxc_ir::plan::{Kernel, KernelCall, Operand, Place, Storage, Target};
use ltxc_ir::{DType, TensorType};

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

/// A device on which next to nothing fits: the checks see it.
#[derive(Clone, Debug)]
struct Small;

impl Gpu for Small {
    type Dialect = <Metal as Gpu>::Dialect;
    const NAME: &'static str = "small";

    fn describe(generation: u16) -> (DeviceProperties, CompilationOptions) {
        let (mut properties, options) = Metal::describe(generation);
        properties.hardware.max_shared_memory_size = 64;
        properties.hardware.max_units_per_cube = 32;
        properties.hardware.max_bindings = 2;
        (properties, options)
    }

    fn fragments() -> TargetProperties {
        Metal::fragments()
    }

    fn passes_lengths() -> bool {
        Metal::passes_lengths()
    }
}

#[test]
fn launches_beyond_the_device_are_problems() {
    let call = matmul([256, 256], [256, 256]);
    assert_eq!(record::<Metal>(METAL + 1, &[&call]).problems, [""; 0]);
    let problems = record::<Small>(METAL, &[&call]).problems.join("\n");
    for what in ["bytes of shared memory, the device at most 64", "3 buffers", "units in a cube, the device at most 32"]
    {
        assert!(problems.contains(what), "`{what}` is not in:\n{problems}");
    }
}

#[test]
fn calls_that_cannot_be_launched_are_problems() {
    let problems = |call: KernelCall| record::<Metal>(METAL + 2, &[&call]).problems.join("\n");
    assert!(problems(matmul([256, 256], [255, 256])).contains("matmul"));
    assert!(problems(matmul([1 << 17, 1 << 17], [1 << 17, 1])).contains("more elements than kernels count"));
    assert!(problems(matmul([0, 16], [16, 16])).contains("nothing is launched"));
}

fn matmul([m, k]: [usize; 2], rhs: [usize; 2]) -> KernelCall {
    let operand = |shape: [usize; 2]| Operand {
        place: Place::Constant,
        offset: 0,
        ty: TensorType::new(DType::F32, shape),
        storage: Storage::Native,
    };
    KernelCall {
        work: Kernel::Matmul(Matmul { transpose_rhs: false }).into(),
        args: vec![operand([m, k]), operand(rhs)],
        results: vec![operand([m, rhs[1]])],
        name: String::new(),
        flops: 0,
        bytes: 0,
    }
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
