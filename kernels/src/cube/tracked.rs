//! A CubeCL runtime that knows which kernels it was asked for, and which of them had to be compiled.
//!
//! CubeCL compiles a kernel when it is launched first, says nothing, and names what it keeps by the type and parameters of
//! the kernel: not by its source, the device or the driver. [`Tracked`] stands between kernels and the runtime of a device
//! and names every kernel by the hash of all of that. So compiled code is found again exactly where the same source would
//! be compiled for the same device, whatever a cache or a plan file says.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubecl::backtrace::BackTrace;
use cubecl::bytes::Bytes;
use cubecl::device::{DeviceId, DeviceService};
use cubecl::future::DynFut;
use cubecl::ir::{StorageType, TargetProperties};
use cubecl::prelude::*;
use cubecl::profile::ProfileDuration;
use cubecl::server::{
    Binding, ComputeServer, CopyDescriptor, Handle, KernelArguments, MemoryLayout, MemoryLayoutDescriptor,
    MemoryLayoutPolicy, ProfileError, ProfilingToken, ServerCommunication, ServerError, ServerUtilities,
};
use cubecl::stream_id::StreamId;
use cubecl::zspace::{Shape, Strides};
use cubecl::{CompilationError, Compiler, CubeTask, MemoryAllocationMode, MemoryUsage};
use cubecl_runtime::id::KernelId;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::ManagedMemoryHandle;
use cubecl_runtime::storage::{ComputeStorage, ManagedResource};
use ltxc_ir::plan::KernelDevice;

/// A kernel that was launched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchedKernel {
    /// Hash of its source, its parameters and the device.
    pub hash: [u8; 32],
    /// Name of its entry point.
    pub name: String,
    /// Units of a cube on each axis.
    pub cube_dim: [u32; 3],
    /// Its source.
    pub source: String,
    /// Whether bounds are checked: in runs that look for mistakes.
    pub is_checked: bool,
    /// Whether it had to be compiled.
    pub is_compiled: bool,
    /// The last round in which it was launched.
    pub(crate) round: u64,
}

/// The kernels of a device.
#[derive(Debug, Default)]
pub struct KernelLog(Mutex<Log>);

#[derive(Debug, Default)]
struct Log {
    device: KernelDevice,
    launched: BTreeMap<[u8; 32], LaunchedKernel>,
    /// Counts calls of [`KernelLog::begin_round`].
    round: u64,
    is_frozen: bool,
    refused: Option<String>,
}

impl KernelLog {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what kernels run on; before the first of them.
    pub fn describe(&self, device: KernelDevice) {
        self.lock().device = device;
    }

    /// What kernels run on.
    pub fn device(&self) -> KernelDevice {
        self.lock().device.clone()
    }

    /// The kernels that were launched so far, by hash.
    pub fn launched(&self) -> Vec<LaunchedKernel> {
        self.lock().launched.values().cloned().collect()
    }

    /// Begins a round, of which [`KernelLog::launched_in_round`] tells.
    pub fn begin_round(&self) {
        self.lock().round += 1;
    }

    /// The kernels that were launched since the round began, by hash.
    pub fn launched_in_round(&self) -> Vec<LaunchedKernel> {
        let log = self.lock();
        log.launched.values().filter(|kernel| kernel.round == log.round).cloned().collect()
    }

    /// From now on nothing is compiled; launches of kernels that would have to be fail.
    pub fn freeze(&self, is_frozen: bool) {
        self.lock().is_frozen = is_frozen;
    }

    /// The kernel that was refused first because nothing may be compiled, since this was last asked.
    pub fn take_refused(&self) -> Option<String> {
        self.lock().refused.take()
    }

    /// Notes that a kernel is about to be compiled.
    fn compile(&self, hash: &[u8; 32]) -> Result<(), String> {
        let mut log = self.lock();
        let is_frozen = log.is_frozen;
        let Some(kernel) = log.launched.get_mut(hash) else { return Ok(()) };
        if is_frozen {
            let name = kernel.name.clone();
            log.refused.get_or_insert(name.clone());
            return Err(format!("`{name}` would have to be compiled"));
        }
        kernel.is_compiled = true;
        Ok(())
    }
}

/// A runtime whose compiler settings can be kept.
pub trait Known: Runtime<Compiler: Compiler<CompilationOptions: Clone + Sync>> {}

impl<R: Runtime<Compiler: Compiler<CompilationOptions: Clone + Sync>>> Known for R {}

/// Settings of the compiler of `R`.
pub type Options<R> = <<R as Runtime>::Compiler as Compiler>::CompilationOptions;

/// The runtime `R`, tracked.
pub struct Tracked<R>(PhantomData<fn() -> R>);

impl<R> Clone for Tracked<R> {
    fn clone(&self) -> Self {
        Tracked(PhantomData)
    }
}

impl<R> fmt::Debug for Tracked<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tracked")
    }
}

impl<R: Known> Runtime for Tracked<R> {
    type Compiler = R::Compiler;
    type Server = TrackedServer<R>;
    type Device = R::Device;

    fn client(device: &R::Device) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        "tracked"
    }

    fn require_array_lengths() -> bool {
        R::require_array_lengths()
    }

    fn max_cube_count() -> (u32, u32, u32) {
        R::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        R::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        R::target_properties()
    }

    fn enumerate_devices(type_id: u16, info: &Info<R>) -> Vec<DeviceId> {
        R::enumerate_devices(type_id, &info.inner.info)
    }
}

/// What is known of a device.
pub struct Info<R: Known> {
    inner: Arc<ServerUtilities<R::Server>>,
    /// Its kernels.
    pub log: Arc<KernelLog>,
}

impl<R: Known> fmt::Debug for Info<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.info.fmt(f)
    }
}

/// Lays memory out as the device does.
pub struct Layout<R: Known>(Arc<ServerUtilities<R::Server>>);

impl<R: Known> MemoryLayoutPolicy for Layout<R> {
    fn apply(&self, stream: StreamId, memory: &[MemoryLayoutDescriptor]) -> (Handle, Vec<MemoryLayout>) {
        self.0.layout_policy.apply(stream, memory)
    }
}

/// The server of a device, with its kernels.
pub struct TrackedServer<R: Known> {
    inner: R::Server,
    /// Hashes and own names of kernels by what CubeCL calls them.
    names: HashMap<KernelId, Name>,
    printer: Option<(R::Compiler, Options<R>)>,
    log: Arc<KernelLog>,
    utilities: Arc<ServerUtilities<Self>>,
}

impl<R: Known> TrackedServer<R> {
    /// Tracks a server that has run nothing yet.
    pub fn new(mut inner: R::Server) -> TrackedServer<R> {
        let printer = printer::<R>(&mut inner);
        let log = Arc::new(KernelLog::default());
        let known = ComputeServer::utilities(&inner);
        let info = Info { inner: known.clone(), log: log.clone() };
        let (properties, logger) = (known.properties.clone(), known.logger.clone());
        let utilities = Arc::new(ServerUtilities::new(properties, logger, info, Layout(known)));
        TrackedServer { inner, names: HashMap::new(), printer, log, utilities }
    }

    /// Hash and own name of a kernel, which is printed when it is launched first. `None` if its own compiler refuses it:
    /// so does its launch.
    fn name(&mut self, kernel: &dyn CubeTask<R::Compiler>, mode: ExecutionMode) -> Result<Option<Name>, IsReported> {
        let mut id = kernel.id();
        id.mode(mode);
        if let Some(name) = self.names.get(&id) {
            let mut log = self.log.lock();
            let round = log.round;
            log.launched.entry(name.0).and_modify(|kernel| kernel.round = round);
            return Ok(Some(name.clone()));
        }
        let Some((printer, options)) = &self.printer else { return Ok(None) };
        let print = || kernel.compile(&mut printer.clone(), options, mode, kernel.address_type());
        let printed = match catch_unwind(AssertUnwindSafe(print)) {
            Ok(Ok(printed)) => printed,
            Ok(Err(_)) => return Ok(None),
            Err(_) => return Err(IsReported),
        };
        let mut log = self.log.lock();
        let hash = hash(&id, &printed.source, &log.device);
        let (dim, round) = (id.cube_dim, log.round);
        let kernel = log.launched.entry(hash).or_insert_with(|| LaunchedKernel {
            hash,
            name: printed.entrypoint_name,
            cube_dim: [dim.x, dim.y, dim.z],
            source: printed.source,
            is_checked: mode != ExecutionMode::Unchecked,
            is_compiled: false,
            round,
        });
        kernel.round = round;
        let name = (hash, name_of::<R::Compiler>(hash, dim));
        self.names.insert(id, name.clone());
        Ok(Some(name))
    }
}

type Name = ([u8; 32], KernelId);

/// A panic of a compiler, which `guard` has seen.
struct IsReported;

/// What a kernel is called that was printed to a source of this hash.
pub(crate) fn name_of<C: Compiler>(hash: [u8; 32], cube_dim: CubeDim) -> KernelId {
    KernelId::new::<Task<C>>().cube_dim(cube_dim).info(hash)
}

/// Hash of everything that compiled code depends on.
fn hash(id: &KernelId, source: &str, device: &KernelDevice) -> [u8; 32] {
    // CubeCL declares types in any order, and gives each array a place of its own in shared memory, in any order too. So
    // sources of the same lines but for those places are the same for the same kernel.
    let mut lines: Vec<Cow<'_, str>> = source.lines().map(without_place).collect();
    lines.sort_unstable();
    let KernelDevice { backend, architecture, driver, generator } = device;
    let mut hasher = blake3::Hasher::new();
    let (id, lines) = (id.stable_format(), lines.join("\n"));
    for field in [backend, architecture, driver, generator, &id, &lines] {
        hasher.update(&(field.len() as u64).to_le_bytes());
        hasher.update(field.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// A line of a source without the place in shared memory that it gives to an array.
fn without_place(line: &str) -> Cow<'_, str> {
    const SHARED: &str = "dynamic_shared_mem[";
    let placed = line.split_once(SHARED).and_then(|(before, rest)| Some((before, rest.split_once(']')?)));
    match placed {
        Some((before, (place, behind))) if !place.is_empty() && place.bytes().all(|b| b.is_ascii_digit()) => {
            Cow::Owned(format!("{before}{SHARED}]{behind}"))
        }
        _ => Cow::Borrowed(line),
    }
}

/// A kernel under its own name.
struct Task<C: Compiler> {
    kernel: Box<dyn CubeTask<C>>,
    id: KernelId,
    hash: [u8; 32],
    log: Arc<KernelLog>,
}

impl<C: Compiler> KernelMetadata for Task<C> {
    fn name(&self) -> &'static str {
        self.kernel.name()
    }

    fn id(&self) -> KernelId {
        self.id.clone()
    }

    fn address_type(&self) -> StorageType {
        self.kernel.address_type()
    }
}

impl<C: Compiler> CubeTask<C> for Task<C> {
    fn compile(
        &self,
        compiler: &mut C,
        options: &C::CompilationOptions,
        mode: ExecutionMode,
        address_type: StorageType,
    ) -> Result<CompiledKernel<C>, CompilationError> {
        self.log.compile(&self.hash).map_err(refusal)?;
        self.kernel.compile(compiler, options, mode, address_type)
    }
}

fn refusal(reason: String) -> CompilationError {
    CompilationError::Generic { reason, backtrace: BackTrace::capture() }
}

/// What the runtime of `client`, on which nothing was launched yet, compiles with.
pub fn compilation_options<R: Known>(client: &ComputeClient<R>) -> Option<Options<R>> {
    let seen = Arc::default();
    client.launch(Box::new(Probe::<R::Compiler> { seen: Arc::clone(&seen) }), one_cube(), KernelArguments::new());
    // The failure was wanted.
    let _ = client.flush();
    seen.lock().unwrap_or_else(PoisonError::into_inner).take().map(|(_, options)| options)
}

fn one_cube() -> CubeCount {
    CubeCount::Static(1, 1, 1)
}

/// What the server of a device compiles with: a kernel that is no kernel sees it, and fails.
fn printer<R: Known>(server: &mut R::Server) -> Option<(R::Compiler, Options<R>)> {
    let seen = Arc::default();
    let stream = StreamId::current();
    let probe = Box::new(Probe::<R::Compiler> { seen: Arc::clone(&seen) });
    // SAFETY: there is no kernel to run.
    unsafe { server.launch(probe, one_cube(), KernelArguments::new(), ExecutionMode::Unchecked, stream) };
    // The failure was wanted.
    let _ = server.flush(stream);
    seen.lock().unwrap_or_else(PoisonError::into_inner).take()
}

struct Probe<C: Compiler> {
    #[allow(clippy::type_complexity)] // a place for two values
    seen: Arc<Mutex<Option<(C, C::CompilationOptions)>>>,
}

impl<C: Compiler> KernelMetadata for Probe<C> {
    fn id(&self) -> KernelId {
        KernelId::new::<Self>()
    }

    fn address_type(&self) -> StorageType {
        u32::as_type_native_unchecked().storage_type()
    }
}

impl<C: Compiler<CompilationOptions: Clone + Sync>> CubeTask<C> for Probe<C> {
    fn compile(
        &self,
        compiler: &mut C,
        options: &C::CompilationOptions,
        _: ExecutionMode,
        _: StorageType,
    ) -> Result<CompiledKernel<C>, CompilationError> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some((compiler.clone(), options.clone()));
        Err(refusal("this is no kernel".into()))
    }
}

impl<R: Known> fmt::Debug for TrackedServer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl<R: Known> DeviceService for TrackedServer<R> {
    fn init(device: DeviceId) -> Self {
        TrackedServer::new(R::Server::init(device))
    }

    fn utilities(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        self.utilities.clone()
    }
}

impl<R: Known> ServerCommunication for TrackedServer<R> {
    const SERVER_COMM_ENABLED: bool = false;
}

impl<R: Known> ComputeServer for TrackedServer<R> {
    type Kernel = Box<dyn CubeTask<R::Compiler>>;
    type Info = Info<R>;
    type MemoryLayoutPolicy = Layout<R>;
    type Storage = <R::Server as ComputeServer>::Storage;

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        stream: StreamId,
    ) {
        let kernel = match self.name(&*kernel, mode) {
            Ok(Some((hash, id))) => Box::new(Task { kernel, id, hash, log: self.log.clone() }) as Self::Kernel,
            Ok(None) => kernel,
            Err(IsReported) => return,
        };
        // SAFETY: the same launch, possibly under another name.
        unsafe { self.inner.launch(kernel, count, arguments, mode, stream) }
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, stream: StreamId) {
        self.inner.initialize_memory(memory, size, stream)
    }

    fn staging(&mut self, sizes: &[usize], stream: StreamId) -> Result<Vec<Bytes>, ServerError> {
        self.inner.staging(sizes, stream)
    }

    fn read(&mut self, from: Vec<CopyDescriptor>, stream: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        self.inner.read(from, stream)
    }

    fn write(&mut self, to: Vec<(CopyDescriptor, Bytes)>, stream: StreamId) {
        self.inner.write(to, stream)
    }

    fn sync(&mut self, stream: StreamId) -> DynFut<Result<(), ServerError>> {
        self.inner.sync(stream)
    }

    fn flush(&mut self, stream: StreamId) -> Result<(), ServerError> {
        self.inner.flush(stream)
    }

    fn get_resource(
        &mut self,
        binding: Binding,
        stream: StreamId,
    ) -> Result<ManagedResource<<Self::Storage as ComputeStorage>::Resource>, ServerError> {
        self.inner.get_resource(binding, stream)
    }

    fn memory_usage(&mut self, stream: StreamId) -> Result<MemoryUsage, ServerError> {
        self.inner.memory_usage(stream)
    }

    fn memory_cleanup(&mut self, stream: StreamId) {
        self.inner.memory_cleanup(stream)
    }

    fn allocation_mode(&mut self, mode: MemoryAllocationMode, stream: StreamId) {
        self.inner.allocation_mode(mode, stream)
    }

    fn start_profile(&mut self, stream: StreamId) -> Result<ProfilingToken, ServerError> {
        self.inner.start_profile(stream)
    }

    fn end_profile(&mut self, stream: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.inner.end_profile(stream, token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> KernelDevice {
        let word = |w: &str| w.to_string();
        KernelDevice {
            backend: word("cuda"),
            architecture: word("sm_80"),
            driver: word("12.4"),
            generator: word("x 1"),
        }
    }

    #[test]
    fn names_depend_on_source_parameters_architecture_driver_and_build() {
        let id = KernelId::new::<u8>().info(1u32);
        let base = hash(&id, "a;\nb;\n", &device());
        assert_eq!(hash(&id, "b;\na;\n", &device()), base, "declarations come in any order");
        let shared = |a: u32, b: u32| {
            let array =
                |n: u32, at: u32| format!("float *shared_{n} = reinterpret_cast<float*>(&dynamic_shared_mem[{at}]);");
            hash(&id, &format!("{}\n// 64 bytes\n{}\n", array(1, a), array(2, b)), &device())
        };
        assert_eq!(shared(0, 256), shared(1024, 0), "arrays lie anywhere in shared memory");
        assert_ne!(hash(&id, "a[1];", &device()), hash(&id, "a[2];", &device()));
        let mut others = vec![
            hash(&id, "a;\nc;\n", &device()),
            hash(&KernelId::new::<u8>().info(2u32), "a;\nb;\n", &device()),
            hash(&KernelId::new::<u16>().info(1u32), "a;\nb;\n", &device()),
            hash(&id.clone().cube_dim(CubeDim::new_1d(32)), "a;\nb;\n", &device()),
        ];
        let changed = |change: fn(&mut KernelDevice)| {
            let mut other = device();
            change(&mut other);
            hash(&id, "a;\nb;\n", &other)
        };
        others.push(changed(|d| d.backend = "wgpu".into()));
        others.push(changed(|d| d.architecture = "sm_90a".into()));
        others.push(changed(|d| d.driver = "12.8".into()));
        others.push(changed(|d| d.generator = "x 2".into()));
        // The ends of fields count.
        others.push(changed(|d| (d.architecture, d.driver) = ("sm_8".into(), "012.4".into())));
        for (i, other) in others.iter().enumerate() {
            assert!(*other != base && !others[..i].contains(other), "{i}");
        }
    }

    #[test]
    fn nothing_is_compiled_when_frozen() {
        let log = KernelLog::default();
        let kernel = LaunchedKernel {
            hash: [1; 32],
            name: "k".into(),
            cube_dim: [1; 3],
            source: String::new(),
            is_checked: false,
            is_compiled: false,
            round: 0,
        };
        log.lock().launched.insert([1; 32], kernel);
        log.freeze(true);
        assert!(log.compile(&[1; 32]).unwrap_err().contains("`k`"));
        assert!(!log.launched()[0].is_compiled);
        assert_eq!([log.take_refused(), log.take_refused()], [Some("k".into()), None]);
        log.freeze(false);
        log.compile(&[1; 32]).unwrap();
        assert!(log.launched()[0].is_compiled);
        assert_eq!(log.launched_in_round().len(), 1);
        log.begin_round();
        assert_eq!((log.launched_in_round(), log.launched().len()), (vec![], 1));
    }
}
