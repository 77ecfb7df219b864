//! Devices that do not exist: an NVIDIA GPU so small that small problems get the tiles of large ones, and one with the limits
//! and matrix units of an Apple GPU whose kernels are CUDA C++, so that the emulator runs what differs in words only.

use cubecl_cpp::shared::CompilationOptions;
use cubecl_ir::{DeviceProperties, TargetProperties};

use crate::targets::{Cuda, Gpu, Metal};

/// Few processors.
#[derive(Clone, Debug)]
pub struct TensorCores;

impl Gpu for TensorCores {
    type Dialect = <Cuda as Gpu>::Dialect;
    const NAME: &'static str = "tensor-cores";

    fn describe(generation: u16) -> (DeviceProperties, CompilationOptions) {
        let (mut properties, options) = Cuda::describe(generation);
        properties.hardware.num_streaming_multiprocessors = Some(4);
        (properties, options)
    }

    fn fragments() -> TargetProperties {
        Cuda::fragments()
    }

    fn passes_lengths() -> bool {
        Cuda::passes_lengths()
    }
}

/// An Apple GPU that speaks CUDA.
#[derive(Clone, Debug)]
pub struct Simdgroups;

impl Gpu for Simdgroups {
    type Dialect = <Cuda as Gpu>::Dialect;
    const NAME: &'static str = "simdgroups";

    fn describe(generation: u16) -> (DeviceProperties, CompilationOptions) {
        (Metal::describe(generation).0, Cuda::describe(generation).1)
    }

    fn fragments() -> TargetProperties {
        Metal::fragments()
    }

    fn passes_lengths() -> bool {
        Cuda::passes_lengths()
    }
}
