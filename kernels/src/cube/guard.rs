//! What goes wrong on a device without an error: CubeCL runs every device on a thread of its own, and a kernel that
//! panics there (one that does not compile, an allocation that does not fit) is dropped in silence while the caller reads
//! old memory.
//!
//! [`install`] notes such panics, [`sync`] waits for a device and turns everything noted into an error. Whoever reads
//! results syncs first.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use cubecl::prelude::*;

/// How CubeCL names the threads of its devices.
const DEVICE_THREAD: &str = "DSD-";

static IS_POISONED: AtomicBool = AtomicBool::new(false);
static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static INSTALL: Once = Once::new();

thread_local! {
    /// Whether this thread is inside of [`catch`].
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Starts to note panics of device threads, which become errors and are not printed. Later calls do nothing;
/// [`super::launch`] makes one.
pub fn install() {
    INSTALL.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            if thread.name().is_some_and(|name| name.starts_with(DEVICE_THREAD)) {
                let words = info.payload_as_str().unwrap_or("a panic without words");
                let file = |path: &str| path.rsplit(['/', '\\']).next().unwrap_or_default().to_string();
                let place = info.location().map(|l| format!(" ({}:{})", file(l.file()), l.line()));
                report(format!("{words}{}", place.unwrap_or_default()));
            } else if !IS_CAUGHT.get() {
                previous(info);
            }
        }));
    });
}

/// What `work` gives, `None` if it panics: CubeCL does where a driver refuses, or the thread of a device is gone.
pub fn catch<T>(work: impl FnOnce() -> T) -> Option<T> {
    install();
    let before = IS_CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    IS_CAUGHT.set(before);
    result.ok()
}

/// Notes an error that a driver reported outside of any call, for example to the error callback of a wgpu device.
pub fn report(error: String) {
    ERRORS.lock().unwrap_or_else(PoisonError::into_inner).push(error);
    IS_POISONED.store(true, Ordering::SeqCst);
}

/// Notes what wgpu reports about the device of `setup`, which would otherwise end the process.
#[cfg(feature = "wgpu")]
pub fn watch_wgpu(setup: &cubecl::wgpu::WgpuSetup) {
    setup.device.on_uncaptured_error(std::sync::Arc::new(|error| report(error.to_string())));
    setup
        .device
        .set_device_lost_callback(|reason, message| report(format!("the device is lost ({reason:?}): {message}")));
}

/// Whether all devices of this process are still to be trusted.
///
/// # Errors
/// What was noted, of any device: memory may hold anything, and stays suspect as long as the process lives.
pub fn check_poisoned() -> Result<(), String> {
    if !IS_POISONED.load(Ordering::SeqCst) {
        return Ok(());
    }
    let errors = ERRORS.lock().unwrap_or_else(PoisonError::into_inner);
    Err(format!("the device failed: {}", errors.join("; ")))
}

/// Hands everything that this thread launched to the device, without waiting for it.
///
/// # Errors
/// What the launches since the last call, or the device, complain about so far.
pub fn submit<R: Runtime>(client: &ComputeClient<R>) -> Result<(), String> {
    let submitted = catch(|| client.flush());
    check_poisoned()?;
    match submitted {
        Some(result) => result.map_err(|error| format!("the device failed: {error:?}")),
        None => Err("the device stopped answering".into()),
    }
}

/// Waits until everything that this thread launched is done.
///
/// # Errors
/// What the launches since the last call, or the device, complain about.
pub fn sync<R: Runtime>(client: &ComputeClient<R>) -> Result<(), String> {
    // A client whose device thread is gone panics here; the noted panic says why.
    let synced = catch(|| cubecl::future::block_on(client.sync()));
    check_poisoned()?;
    match synced {
        Some(result) => result.map_err(|error| format!("the device failed: {error:?}")),
        None => Err("the device stopped answering".into()),
    }
}
