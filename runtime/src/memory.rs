//! Arenas of the CPU backend, and how much memory the machine has.

use memmap2::MmapMut;

use crate::error::RunError;

/// Zeroed memory, page-aligned. Pages take no memory until they are written.
pub struct Memory {
    map: Option<MmapMut>,
}

impl Memory {
    /// Reserves `bytes`.
    ///
    /// # Errors
    /// If the address space or the machine does not allow it.
    pub fn new(bytes: u64) -> Result<Memory, RunError> {
        if bytes == 0 {
            return Ok(Memory { map: None });
        }
        let refused = || RunError::Memory {
            needed: readable(bytes),
            available: readable(available()),
            remedy: "choose a smaller size or fewer frames".into(),
        };
        let length = usize::try_from(bytes).map_err(|_| refused())?;
        let map = MmapMut::map_anon(length).map_err(|_| refused())?;
        Ok(Memory { map: Some(map) })
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.map.as_ref().map_or(0, |m| m.len() as u64)
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Start of the memory; dangling if it is empty.
    pub fn start(&mut self) -> *mut u8 {
        self.map.as_mut().map_or(std::ptr::dangling_mut(), |m| m.as_mut_ptr())
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or(&mut [])
    }
}

/// Bytes that can be used without pushing anything out; `u64::MAX` where the system does not say.
pub fn available() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    match system.available_memory() {
        0 => u64::MAX,
        bytes => system.cgroup_limits().map_or(bytes, |c| bytes.min(c.free_memory)),
    }
}

/// `1.5 GB` and the like.
pub fn readable(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    if bytes == u64::MAX {
        return "an unknown amount".into();
    }
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
