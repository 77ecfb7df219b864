//! A CubeCL runtime without a device: every launch is compiled to text and noted, nothing runs.
//!
//! Each generation of a GPU is a device of its own, so that one process can look at several. A kernel is compiled once per
//! device, however often it is launched.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl_common::backtrace::BackTrace;
use cubecl_common::bytes::Bytes;
use cubecl_common::device::{Device, DeviceId, DeviceService};
use cubecl_common::future::DynFut;
use cubecl_common::profile::ProfileDuration;
use cubecl_common::stream_id::StreamId;
use cubecl_cpp::shared::{CompilationOptions, CppCompiler};
use cubecl_ir::TargetProperties;
use cubecl_runtime::allocator::PitchedMemoryLayoutPolicy;
use cubecl_runtime::compiler::CubeTask;
use cubecl_runtime::id::KernelId;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{ManagedMemoryHandle, MemoryAllocationMode, MemoryUsage};
use cubecl_runtime::server::{
    Binding, ComputeServer, CopyDescriptor, CubeCount, ExecutionMode, IoError, KernelArguments, ProfileError,
    ProfilingToken, ServerCommunication, ServerError, ServerUtilities,
};
use cubecl_runtime::storage::{ComputeStorage, ManagedResource, StorageHandle, StorageId};
use cubecl_runtime::timestamp_profiler::TimestampProfiler;

use crate::targets::Gpu;

/// The text of a kernel, and what it is launched with.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// Name of its entry point.
    pub name: String,
    /// C++ of the target.
    pub text: String,
    /// Units of a cube on each axis.
    pub cube_dim: [u32; 3],
    /// Shared memory of a cube.
    pub shared_bytes: usize,
}

/// One launch.
#[derive(Debug)]
pub struct Launch {
    /// The kernel, or why it has no text.
    pub source: Result<Arc<Source>, String>,
    /// Cubes on each axis; `None` if the device would count them.
    pub cubes: Option<[u32; 3]>,
    /// Bytes of their memory to which buffers are bound.
    pub buffers: Vec<Range<u64>>,
    /// Scalars and lengths, as the kernel takes them.
    pub info: Vec<u64>,
}

/// What was launched since it was last asked.
#[derive(Clone, Debug, Default)]
pub struct Launches(Arc<Mutex<Vec<Launch>>>);

impl Launches {
    fn add(&self, launch: Launch) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(launch);
    }

    /// Everything noted, which is forgotten then.
    pub fn take(&self) -> Vec<Launch> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A device that is not there: a generation of some kind of GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Generation(pub u16);

impl Device for Generation {
    fn from_id(id: DeviceId) -> Self {
        Generation(id.index_id)
    }

    fn to_id(&self) -> DeviceId {
        DeviceId { type_id: 0, index_id: self.0 }
    }
}

/// The runtime that notes launches on GPUs of the kind `G`.
#[derive(Clone, Debug)]
pub struct Recorder<G: Gpu>(PhantomData<G>);

impl<G: Gpu> Runtime for Recorder<G> {
    type Compiler = CppCompiler<G::Dialect>;
    type Server = RecordingServer<G>;
    type Device = Generation;

    fn client(device: &Generation) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        G::NAME
    }

    fn require_array_lengths() -> bool {
        G::passes_lengths()
    }

    fn max_cube_count() -> (u32, u32, u32) {
        G::describe(Generation::default().0).0.hardware.max_cube_count
    }

    fn can_read_tensor(_: &cubecl::zspace::Shape, _: &cubecl::zspace::Strides) -> bool {
        true
    }

    fn target_properties() -> TargetProperties {
        G::fragments()
    }

    fn enumerate_devices(_: u16, _: &Launches) -> Vec<DeviceId> {
        vec![Generation::default().to_id()]
    }
}

/// What stands in the place of a device.
pub struct RecordingServer<G: Gpu> {
    options: CompilationOptions,
    compiled: HashMap<KernelId, Result<Arc<Source>, String>>,
    launches: Launches,
    clock: TimestampProfiler,
    utilities: Arc<ServerUtilities<Self>>,
}

impl<G: Gpu> std::fmt::Debug for RecordingServer<G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "recorder of {} with {} kernels", G::NAME, self.compiled.len())
    }
}

impl<G: Gpu> DeviceService for RecordingServer<G> {
    fn init(device: DeviceId) -> Self {
        let (properties, options) = G::describe(Generation::from_id(device).0);
        let policy = PitchedMemoryLayoutPolicy::new(properties.memory.alignment as usize);
        let (logger, launches) = (Arc::new(ServerLogger::default()), Launches::default());
        RecordingServer {
            options,
            compiled: HashMap::new(),
            launches: launches.clone(),
            clock: TimestampProfiler::default(),
            utilities: Arc::new(ServerUtilities::new(properties, logger, launches, policy)),
        }
    }

    fn utilities(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        self.utilities.clone()
    }
}

impl<G: Gpu> ServerCommunication for RecordingServer<G> {
    const SERVER_COMM_ENABLED: bool = false;
}

impl<G: Gpu> RecordingServer<G> {
    fn compile(&mut self, kernel: &Kernel<G>, mode: ExecutionMode) -> Result<Arc<Source>, String> {
        let mut id = kernel.id();
        id.mode(mode);
        let options = &self.options;
        let compiled = self.compiled.entry(id).or_insert_with(|| {
            let mut printer = CppCompiler::<G::Dialect>::default();
            let compile = || kernel.compile(&mut printer, options, mode, kernel.address_type());
            let kernel = match catch_unwind(AssertUnwindSafe(compile)) {
                Ok(compiled) => compiled.map_err(|e| format!("`{}`: {e}", kernel.name()))?,
                Err(panic) => {
                    let words = panic.downcast_ref::<String>().map(String::as_str);
                    let words = words.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
                    return Err(format!("`{}` panics when it is built: {words}", kernel.name()));
                }
            };
            Ok(Arc::new(Source {
                shared_bytes: kernel.repr.as_ref().map_or(0, |repr| repr.shared_memory_size()),
                cube_dim: [kernel.cube_dim.x, kernel.cube_dim.y, kernel.cube_dim.z],
                name: kernel.entrypoint_name,
                text: kernel.source,
            }))
        });
        compiled.clone()
    }
}

type Kernel<G> = Box<dyn CubeTask<CppCompiler<<G as Gpu>::Dialect>>>;

impl<G: Gpu> ComputeServer for RecordingServer<G> {
    type Kernel = Kernel<G>;
    type Storage = NoStorage;
    type MemoryLayoutPolicy = PitchedMemoryLayoutPolicy;
    type Info = Launches;

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        _: StreamId,
    ) {
        let source = self.compile(&kernel, mode);
        let cubes = match count {
            CubeCount::Static(x, y, z) => Some([x, y, z]),
            CubeCount::Dynamic(_) => None,
        };
        let range = |b: &Binding| b.offset_start.unwrap_or(0)..b.size - b.offset_end.unwrap_or(0);
        let buffers = arguments.buffers.iter().map(range).collect();
        self.launches.add(Launch { source, cubes, buffers, info: arguments.info.data });
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn sync(&mut self, _: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    // There is no memory: handles know their sizes, and nothing lies behind them.

    fn initialize_memory(&mut self, _: ManagedMemoryHandle, _: u64, _: StreamId) {}

    fn write(&mut self, _: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {}

    fn read(&mut self, _: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        Box::pin(async { Err(no_memory().into()) })
    }

    fn get_resource(&mut self, _: Binding, _: StreamId) -> Result<ManagedResource<()>, ServerError> {
        Err(no_memory().into())
    }

    fn memory_usage(&mut self, _: StreamId) -> Result<MemoryUsage, ServerError> {
        Err(no_memory().into())
    }

    fn memory_cleanup(&mut self, _: StreamId) {}

    fn allocation_mode(&mut self, _: MemoryAllocationMode, _: StreamId) {}

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.clock.start())
    }

    fn end_profile(&mut self, _: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.clock.stop(token)
    }
}

/// Memory that cannot be had.
#[derive(Debug)]
pub struct NoStorage;

impl ComputeStorage for NoStorage {
    type Resource = ();

    fn alignment(&self) -> usize {
        1
    }

    fn get(&mut self, _: &StorageHandle) {}

    fn alloc(&mut self, _: u64) -> Result<StorageHandle, IoError> {
        Err(no_memory())
    }

    fn dealloc(&mut self, _: StorageId) {}

    fn flush(&mut self) {}
}

fn no_memory() -> IoError {
    IoError::UnsupportedIoOperation { backtrace: BackTrace::capture() }
}
