//! Work sharing and scratch memory.
//!
//! Tasks are fixed by the shapes or touch disjoint results in a fixed order each, so results do not depend on how many
//! threads there are or which of them runs what. A task never starts parallel work itself: a thread that waited inside
//! a task could otherwise begin a second one with the same slot of scratch.

use std::cell::Cell;

use rayon::prelude::*;

/// Work (element operations) below which sharing costs more than it gains.
const WORTH_SHARING: usize = 1 << 16;

thread_local! {
    /// Whether the running task calls kernels itself.
    static IS_SERIAL: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, in which kernels stay on the running thread and take scratch memory for one thread.
pub(crate) fn serial<T>(work: impl FnOnce() -> T) -> T {
    let before = IS_SERIAL.replace(true);
    let result = work();
    IS_SERIAL.set(before);
    result
}

/// Runs `task(0..tasks)`, on all threads if the whole `work` (in element operations) is worth it.
pub(crate) fn for_each(tasks: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if tasks <= 1 || work < WORTH_SHARING || IS_SERIAL.get() {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// Number of threads that a kernel uses.
pub fn threads() -> usize {
    if IS_SERIAL.get() { 1 } else { rayon::current_num_threads() }
}

/// A pointer that tasks may share. Who uses it says why they do not collide.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: only a pointer; each use is an unsafe block with its own reason.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(pointer: *mut T) -> Shared<T> {
        Shared(pointer)
    }

    #[inline(always)]
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

/// Sizes of the scratch memory of a kernel call, in floats.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Need {
    /// Seen by all tasks.
    pub shared: usize,
    /// For every thread.
    pub per_thread: usize,
}

/// Scratch starts at multiples of a cache line.
const LINE_BYTES: usize = 64;
const LINE: usize = LINE_BYTES / size_of::<f32>();

impl Need {
    /// With more floats for every thread.
    pub(crate) fn with_room(self, floats: usize) -> Need {
        Need { per_thread: self.per_thread.saturating_add(floats), ..self }
    }

    /// Enough for either.
    pub(crate) fn max(self, other: Need) -> Need {
        Need { shared: self.shared.max(other.shared), per_thread: self.per_thread.max(other.per_thread) }
    }

    /// Bytes of workspace for `threads` threads, wherever it begins.
    pub(crate) fn bytes(self, threads: usize) -> usize {
        let floats = self.per_thread.next_multiple_of(LINE).saturating_mul(threads.max(1));
        let floats = floats.saturating_add(self.shared.next_multiple_of(LINE));
        if floats == 0 { 0 } else { floats.saturating_mul(size_of::<f32>()).saturating_add(LINE_BYTES) }
    }
}

/// Scratch memory of one kernel call: uninitialised floats, a shared part and a slot for each thread.
pub(crate) struct Scratch<'a> {
    base: Shared<f32>,
    need: Need,
    workspace: std::marker::PhantomData<&'a mut [u8]>,
}

impl<'a> Scratch<'a> {
    /// # Panics
    /// If the workspace is smaller than `need` says: the executor takes its size from the catalogue.
    pub(crate) fn new(workspace: &'a mut [u8], need: Need) -> Scratch<'a> {
        let bytes = need.bytes(threads());
        assert!(workspace.len() >= bytes, "workspace has {} bytes, this call needs {bytes}", workspace.len());
        let skip = workspace.as_ptr().align_offset(LINE_BYTES);
        let base = if bytes == 0 { workspace.as_mut_ptr() } else { workspace[skip..].as_mut_ptr() };
        Scratch { base: Shared::new(base.cast()), need, workspace: std::marker::PhantomData }
    }

    /// The shared part, `need.shared` floats.
    pub(crate) fn shared(&self) -> Shared<f32> {
        self.base
    }

    /// The slot of the running thread.
    ///
    /// # Safety
    /// Called at most once per task of one [`for_each`], and the slice is not used after the task.
    #[allow(clippy::mut_from_ref)] // each thread gets memory of its own
    pub(crate) unsafe fn slot(&self) -> &mut [f32] {
        let slot = if IS_SERIAL.get() { 0 } else { rayon::current_thread_index().unwrap_or(0) };
        let offset = self.need.shared.next_multiple_of(LINE) + slot * self.need.per_thread.next_multiple_of(LINE);
        // SAFETY: `new` checked the size for all threads of the pool, and thread indices are below their number. Any
        // bytes are floats. The caller keeps one borrow per thread.
        unsafe { std::slice::from_raw_parts_mut(self.base.get().add(offset), self.need.per_thread) }
    }
}
