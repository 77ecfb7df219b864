//! GPUs as kernels see them: limits and features, as CubeCL reads them from a device of each kind.
//!
//! Only what decides about the text of kernels is here; what a device says about its memory or clock is not.
//!
//! Sources: `cubecl-cuda` 0.10.0 `runtime.rs::init`, `cubecl-wgpu` 0.10.0 `backend/metal.rs` and `runtime.rs::create_server`;
//! limits of devices from the CUDA C++ Programming Guide 12.9, table "Technical Specifications per Compute Capability", and
//! Apple's Metal feature set tables.

use std::fmt::Debug;

use cubecl::Runtime;
use cubecl::cuda::CudaRuntime;
use cubecl_common::profile::TimingMethod;
use cubecl_cpp::cuda::CudaDialect;
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::CudaWmmaCompiler;
use cubecl_cpp::metal::MslDialect;
use cubecl_cpp::metal::arch::MetalArchitecture;
use cubecl_cpp::shared::{
    CompilationOptions, CppSupportedFeatures, Dialect, DialectWmmaCompiler, register_mma_features,
    register_scaled_mma_features, register_supported_types, register_wmma_features,
};
use cubecl_ir::features::{Plane, Tma, TypeUsage};
use cubecl_ir::{
    AddressType, BarrierLevel, DeviceProperties, ElemType, FloatKind, HardwareProperties, IntKind,
    MemoryDeviceProperties, OpaqueType, SemanticType, StorageType, TargetProperties, UIntKind, VectorSize,
};

/// A kind of GPU that CubeCL prints C++ for.
pub trait Gpu: Clone + Debug + Send + Sync + 'static {
    /// The language.
    type Dialect: Dialect;
    /// Name of the kind.
    const NAME: &'static str;

    /// What a device of the generation `generation` can do, and how its kernels are printed.
    fn describe(generation: u16) -> (DeviceProperties, CompilationOptions);

    /// How fragments of matrices lie in registers.
    fn fragments() -> TargetProperties;

    /// Whether lengths of arrays are arguments of kernels.
    fn passes_lengths() -> bool;
}

/// NVIDIA GPUs; a generation is a compute capability without its dot.
#[derive(Clone, Debug)]
pub struct Cuda;

/// Apple GPUs with Metal 3.
#[derive(Clone, Debug)]
pub struct Metal;

impl Gpu for Cuda {
    type Dialect = CudaDialect<CudaWmmaCompiler>;
    const NAME: &'static str = "cuda";

    fn describe(generation: u16) -> (DeviceProperties, CompilationOptions) {
        let is_hopper = generation >= 90;
        let hardware = HardwareProperties {
            load_width: 128,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            // What a block may have if it asks; CubeCL always asks.
            max_shared_memory_size: if is_hopper { 227 << 10 } else { 163 << 10 },
            max_cube_count: (i32::MAX as u32, 65535, 65535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(if is_hopper { 132 } else { 108 }),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            max_vector_size: VectorSize::MAX,
        };
        let memory = MemoryDeviceProperties { max_page_size: 20 << 30, alignment: 512 };
        let mut properties = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
        register_supported_types(&mut properties);
        properties.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
        properties.register_semantic_type(SemanticType::Pipeline);
        for level in [BarrierLevel::Unit, BarrierLevel::Cube] {
            properties.register_type_usage(OpaqueType::Barrier(level), TypeUsage::Buffer);
        }
        let halves = [FloatKind::F16, FloatKind::BF16].map(ElemType::Float);
        let matmul = &mut properties.features.matmul;
        matmul.ldmatrix.extend(halves.map(StorageType::from));
        if is_hopper {
            matmul.stmatrix.extend(halves.map(StorageType::from));
            properties.features.tma.insert(Tma::Base);
            properties.features.cube_cluster = true;
            properties.register_semantic_type(SemanticType::TensorMap);
            for kind in [FloatKind::E4M3, FloatKind::E5M2] {
                properties.register_type_usage(ElemType::Float(kind), TypeUsage::Conversion | TypeUsage::Buffer);
            }
        }
        if generation >= 100 {
            properties.features.tma.insert(Tma::Im2colWide);
        }
        properties.features.copy_async = true;
        properties.features.memory_reinterpret = true;
        properties.features.alignment = true;
        for feature in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
            properties.features.plane.insert(feature);
        }
        let architecture = CudaArchitecture { version: u32::from(generation) };
        type Mma = <Cuda as Gpu>::Dialect;
        register_wmma_features(
            <Mma as DialectWmmaCompiler<Mma>>::supported_wmma_combinations(&architecture),
            &mut properties,
        );
        register_mma_features(
            <Mma as DialectWmmaCompiler<Mma>>::supported_mma_combinations(&architecture),
            &mut properties,
        );
        register_scaled_mma_features(
            <Mma as DialectWmmaCompiler<Mma>>::supported_scaled_mma_combinations(&architecture),
            &mut properties,
        );
        let options = CompilationOptions {
            warp_size: 32,
            supports_features: CppSupportedFeatures {
                fast_math: true,
                fast_tanh: true,
                grid_constants: true,
                clusters: is_hopper,
                elect_sync: is_hopper,
            },
        };
        (properties, options)
    }

    fn fragments() -> TargetProperties {
        CudaRuntime::target_properties()
    }

    fn passes_lengths() -> bool {
        CudaRuntime::require_array_lengths()
    }
}

impl Gpu for Metal {
    type Dialect = MslDialect;
    const NAME: &'static str = "metal";

    fn describe(_: u16) -> (DeviceProperties, CompilationOptions) {
        let hardware = HardwareProperties {
            load_width: 128,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 30,
            max_shared_memory_size: 32 << 10,
            max_cube_count: (65535, 65535, 65535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 1024),
            num_streaming_multiprocessors: None,
            num_tensor_cores: None,
            min_tensor_cores_dim: None,
            num_cpu_cores: None,
            max_vector_size: 4,
        };
        let memory = MemoryDeviceProperties { max_page_size: 4 << 30, alignment: 256 };
        let mut properties = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::Device);
        properties.register_address_type(AddressType::U32);
        properties.register_address_type(AddressType::U64);
        let unsigned = [UIntKind::U8, UIntKind::U16, UIntKind::U32, UIntKind::U64].map(ElemType::UInt);
        let signed = [IntKind::I8, IntKind::I16, IntKind::I32, IntKind::I64].map(ElemType::Int);
        let others = [ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::F32), ElemType::Bool];
        for ty in unsigned.into_iter().chain(signed).chain(others) {
            properties.register_type_usage(ty, TypeUsage::all());
        }
        properties.features.alignment = true;
        for feature in [Plane::Ops, Plane::Sync] {
            properties.features.plane.insert(feature);
        }
        let combinations =
            <MslDialect as DialectWmmaCompiler<MslDialect>>::supported_wmma_combinations(&MetalArchitecture::Metal3);
        register_wmma_features(combinations, &mut properties);
        (properties, CompilationOptions::default())
    }

    fn fragments() -> TargetProperties {
        TargetProperties { mma: Default::default() }
    }

    fn passes_lengths() -> bool {
        false
    }
}
