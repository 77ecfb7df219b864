//! Kernels of GPUs without a GPU: the CUDA C++ and Metal text of every kernel call of full-size models, and of attention
//! with every head dim.
//!
//! Whether the text compiles is for the compiler of the target to say: with `LTXC_KERNEL_SOURCES=DIR` the tests write what
//! they see to `DIR/TARGET/NAME.cu` (`.metal`) and `DIR/heads/TARGET`, and `tests/tools/nvrtc_check.py` compiles that with
//! NVRTC. Whether it is right is for the tests of kernels on devices to say.

mod plan;
mod recorder;
mod targets;

use std::collections::BTreeMap;
use std::path::PathBuf;

use cubecl_cpp::shared::CompilationOptions;
use cubecl_ir::{DeviceProperties, TargetProperties};
use ltxc_ir::ops::{Attention, Matmul};
use ltxc_ir::plan::{Kernel, KernelCall, Operand, Place, Storage, Target};
use ltxc_ir::{DType, Float, TensorType};

use plan::{Recording, distinct_calls, plans, record};
use targets::{Cuda, Gpu, Metal};

/// Generations of NVIDIA GPUs with the names that their compilers use: A100, H100, B200.
const CUDA: [(u16, &str); 3] = [(80, "sm_80"), (90, "sm_90a"), (100, "sm_100")];

/// Generation of Apple GPUs, by the version of Metal.
const METAL: u16 = 3;

#[test]
fn every_call_has_cuda_source() {
    let (plans, heads) = (plans(&Target::cuda()), attention_of_every_head_dim());
    for (generation, name) in CUDA {
        check(&record::<Cuda>(generation, &distinct_calls(&plans)), name, "cu", "__global__");
        let recording = record::<Cuda>(generation, &heads.iter().collect::<Vec<_>>());
        check(&recording, &format!("heads/{name}"), "cu", "__global__");
        // Narrow floats with whole fragments of 16 dims, with a bias and without, are on tensor cores.
        let on_units = recording.kernels.iter().filter(|k| k.source.text.contains("mma_sync"));
        assert_eq!(on_units.count(), 2 * 2 * 16, "{name}");
    }
}

#[test]
fn every_call_has_metal_source() {
    let plans = plans(&Target::wgpu());
    check(&record::<Metal>(METAL, &distinct_calls(&plans)), Metal::NAME, "metal", "[[kernel]]");
    let heads = attention_of_every_head_dim();
    let recording = record::<Metal>(METAL, &heads.iter().collect::<Vec<_>>());
    check(&recording, &format!("heads/{}", Metal::NAME), "metal", "[[kernel]]");
}

/// Attention with heads of every multiple of 8 dims up to 256, of every dtype, with a bias and without.
fn attention_of_every_head_dim() -> Vec<KernelCall> {
    let mut calls = Vec::new();
    for d in (8..=256).step_by(8) {
        for (dtype, has_bias) in
            [DType::F32, DType::BF16, DType::F16].into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)])
        {
            let of = |tokens: usize| TensorType::new(dtype, [1, tokens, 4, d]);
            let bias = has_bias.then(|| TensorType::f32([1, 1, 1, 1024]));
            let args = [of(300), of(1024), of(1024)].into_iter().chain(bias);
            let op = Attention { scale: Float(1.0 / (d as f64).sqrt()), causal: false };
            calls.push(call(Kernel::Attention(op), args, of(300)));
        }
    }
    calls
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
    let kernel = Kernel::Matmul(Matmul { transpose_rhs: false });
    call(kernel, [[m, k], rhs].map(TensorType::f32), TensorType::f32([m, rhs[1]]))
}

/// A call on operands somewhere.
fn call(kernel: Kernel, args: impl IntoIterator<Item = TensorType>, result: TensorType) -> KernelCall {
    let operand = |ty| Operand { place: Place::Constant, offset: 0, ty, storage: Storage::Native };
    KernelCall {
        work: kernel.into(),
        args: args.into_iter().map(operand).collect(),
        results: vec![operand(result)],
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
