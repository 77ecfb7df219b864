//! NVIDIA devices, through CUDA. Driver, compiler and headers are looked for before CubeCL opens anything, because it
//! panics where one is missing.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{result, sys};
use ltxc_ir::DType;
use ltxc_ir::plan::{KernelDevice, Kernels, Target};
use ltxc_kernels::cube::tracked::{LaunchedKernel, Tracked};
use ltxc_kernels::cube::{guard, ptx};

use super::Cube;
use crate::backend::{Backend, Device, DeviceKind, DeviceName, Missing};
use crate::error::RunError;

/// Widest load of a kernel: operands start at its multiples.
const LOAD_BYTES: u64 = 16;

/// The devices, or what is missing to use them.
pub(crate) fn find() -> Result<Vec<Device>, Missing> {
    // SAFETY: only looks whether the library can be loaded.
    if !unsafe { sys::is_culib_present() } {
        return Err(Missing::absent("cuda", "no NVIDIA driver (libcuda)"));
    }
    installed().map_err(|why| Missing { kind: "cuda".into(), why, is_broken: true })
}

/// The devices of the driver that is installed.
fn installed() -> Result<Vec<Device>, String> {
    match result::init() {
        // A driver may be installed where no device is.
        Err(result::DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(Vec::new()),
        started => started.map_err(|e| format!("the driver does not start: {e:?}"))?,
    }
    let count = result::device::get_count().map_err(|e| format!("{e:?}"))?;
    if count == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: as above.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(
            "the CUDA compiler library (libnvrtc) was not found; install it or add it to LD_LIBRARY_PATH".into()
        );
    }
    check_versions(driver_version()?, compiler_version()?)?;
    if cubecl::cuda::install::cuda_path().is_none() {
        return Err("the CUDA headers were not found; set CUDA_PATH to the folder that has `include`".into());
    }
    (0..count).map(|index| describe(index).map_err(|e| format!("device {index}: {e:?}"))).collect()
}

/// CUDA version of the driver: 12040 is 12.4.
fn driver_version() -> Result<i32, String> {
    let mut version = 0;
    // SAFETY: the driver writes one number.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    result.result().map_err(|e| format!("the driver has no version: {e:?}"))?;
    Ok(version)
}

/// CUDA version of the compiler library, counted likewise.
fn compiler_version() -> Result<i32, String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library writes two numbers.
    let result = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    result.result().map_err(|e| format!("the CUDA compiler library has no version: {e:?}"))?;
    Ok(1000 * major + 10 * minor)
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// Oldest CUDA whose compiler knows everything that kernels are written with.
const OLDEST: i32 = 11_080;

/// Whether a driver runs what a compiler of these versions makes. Drivers read the assembly of older compilers only.
fn check_versions(driver: i32, compiler: i32) -> Result<(), String> {
    let (driver_words, compiler_words) = (version(driver), version(compiler));
    if driver < OLDEST || compiler < OLDEST {
        let oldest = version(OLDEST);
        return Err(format!(
            "the driver is for CUDA {driver_words} and the compiler library (libnvrtc) for {compiler_words}; both must be {oldest} or newer, so update them"
        ));
    }
    if compiler > driver {
        return Err(format!(
            "the driver, for CUDA {driver_words}, is too old for the compiler library (libnvrtc) of CUDA {compiler_words}; update the driver, or put an older library first in LD_LIBRARY_PATH"
        ));
    }
    Ok(())
}

fn describe(index: i32) -> Result<Device, result::DriverError> {
    let device = result::device::get(index)?;
    // SAFETY: the driver gave the device.
    let attribute = |attribute: Attribute| unsafe { result::device::get_attribute(device, attribute) };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let mut features = vec![format!("sm_{major}{minor}"), "f16".into()];
    if major >= 8 {
        features.push("bf16".into());
    }
    if major >= 7 {
        features.push("tensor cores".into());
    }
    // bf16 came with 8.0.
    let mut target = Target::cuda();
    target.matrix_units.retain(|unit| major >= 8 || (major == 7 && unit.element == DType::F16));
    Ok(Device {
        name: DeviceName::Cuda(Some(index as usize)),
        description: result::device::get_name(device)?,
        kind: DeviceKind::Gpu,
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device)? } as u64,
        features,
        target,
        problem: None,
    })
}

/// Opens a device of [`find`], which finds the kernels that a plan carries if they are for it.
pub(crate) fn open<'a>(device: &Device, kernels: Option<&Kernels>) -> Result<Box<dyn Backend<'a> + 'a>, RunError> {
    let DeviceName::Cuda(Some(index)) = device.name else {
        return Err(RunError::Internal(format!("`{}` is no CUDA device", device.name)));
    };
    let problem = |problem: String| RunError::Device { device: device.name.clone(), problem };
    let identity = identity(device).map_err(&problem)?;
    // Compiled kernels lie in a folder as long as a device is open; without one nothing is carried.
    let folder = KernelFolder::open(&KERNEL_FOLDER).map_err(&problem)?;
    let folder = folder.filter(|folder| ptx::keep_in(&folder.path));
    if let Some(folder) = &folder {
        // Others would never be found.
        let fitting = kernels.filter(|kernels| kernels.device == identity);
        ptx::seed(&folder.path, fitting.map_or(&[], |kernels| &kernels.kernels));
    }
    // CubeCL panics where the driver refuses.
    let client = guard::catch(|| Tracked::<CudaRuntime>::client(&CudaDevice { index }));
    let refusal = || guard::check_poisoned().err().unwrap_or("the driver does not open it".into());
    let client = client.ok_or_else(|| super::failure(device.name.clone(), refusal()))?;
    client.info().log.describe(identity);
    let total = device.memory_bytes;
    let left = Box::new(move || free_memory(index).unwrap_or(total));
    let carry = move |launched: &[LaunchedKernel]| {
        folder.as_ref().map_or(Vec::new(), |folder| ptx::compiled(&folder.path, launched))
    };
    let mut cube = Cube::new(device.clone(), LOAD_BYTES, left, client, Box::new(carry));
    cube.take_tuned(kernels);
    Ok(Box::new(cube))
}

/// A folder in which CubeCL keeps what it compiles, removed with the last device that is open.
///
/// CubeCL asks for it once in a process. So it is always the same one, and made anew where every device was closed in between:
/// CubeCL waits half a minute for a file whose folder is gone.
struct KernelFolder {
    path: PathBuf,
}

/// The folder of a process, and who has it open.
type KnownFolder = Mutex<(Option<PathBuf>, Weak<KernelFolder>)>;

static KERNEL_FOLDER: KnownFolder = Mutex::new((None, Weak::new()));

impl KernelFolder {
    /// The folder; `None` if this machine lets nobody make one.
    ///
    /// # Errors
    /// If somebody else made it in between: what lies in it is run.
    fn open(known: &KnownFolder) -> Result<Option<Arc<KernelFolder>>, String> {
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = known.1.upgrade() {
            return Ok(Some(open));
        }
        let path = match &known.0 {
            Some(path) => {
                let made = make_own(path);
                made.map_err(|e| format!("its folder for kernels, `{}`, cannot be made again: {e}", path.display()))?;
                path.clone()
            }
            None => match tempfile::Builder::new().prefix("ltxc-kernels-").tempdir() {
                Ok(folder) => folder.keep(),
                Err(_) => return Ok(None),
            },
        };
        let open = Arc::new(KernelFolder { path: path.clone() });
        *known = (Some(path), Arc::downgrade(&open));
        Ok(Some(open))
    }
}

/// Makes a folder that nobody else can write to, and that nobody else made.
fn make_own(path: &Path) -> std::io::Result<()> {
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    // Whoever closed the last device may still be removing it.
    for _ in 0..20 {
        match builder.create(path) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => std::thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
    builder.create(path)
}

impl Drop for KernelFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// What compiled code is for: it depends on the architecture and on what the driver reads, not on the device.
fn identity(device: &Device) -> Result<KernelDevice, String> {
    let architecture = device.features.first().cloned().unwrap_or_default();
    let driver = version(driver_version()?);
    Ok(KernelDevice { backend: "cuda".into(), architecture, driver, generator: super::generator() })
}

/// Bytes that nobody holds.
fn free_memory(index: usize) -> Option<u64> {
    let device = result::device::get(i32::try_from(index).ok()?).ok()?;
    // SAFETY: the driver gave the device; its primary context is the one that CubeCL holds, and is released again.
    unsafe {
        let context = result::primary_ctx::retain(device).ok()?;
        let free = result::ctx::set_current(context).and_then(|()| result::mem_get_info());
        let released = result::primary_ctx::release(device);
        released.ok()?;
        free.ok().map(|(free, _)| free as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_kernels_comes_back_at_its_place() {
        let known = KnownFolder::default();
        let open = || KernelFolder::open(&known).map(|folder| folder.expect("folders can be made"));
        let (first, second) = (open().unwrap(), open().unwrap());
        let path = first.path.clone();
        drop(first);
        assert!(second.path == path && path.is_dir());
        std::fs::write(path.join("kernel"), "").unwrap();
        drop(second);
        assert!(!path.exists());
        let again = open().unwrap();
        assert!(again.path == path && path.read_dir().unwrap().next().is_none());
        drop(again);
        // Somebody else's.
        std::fs::create_dir(&path).unwrap();
        let problem = open().err().unwrap();
        std::fs::remove_dir(&path).unwrap();
        assert!(problem.contains("cannot be made again"), "{problem}");
    }

    #[test]
    fn drivers_that_are_too_old_are_told() {
        assert_eq!(check_versions(12_080, 12_080), Ok(()));
        assert_eq!(check_versions(13_000, 12_040), Ok(()));
        let message = check_versions(12_020, 12_090).unwrap_err();
        assert!(message.contains("CUDA 12.2") && message.contains("12.9") && message.contains("update the driver"));
        for (driver, compiler) in [(11_020, 11_080), (12_000, 11_000)] {
            let message = check_versions(driver, compiler).unwrap_err();
            assert!(message.contains("11.8 or newer"), "{message}");
        }
    }
}
