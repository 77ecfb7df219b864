//! Files that are mapped, and files that are written whole or not at all.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use memmap2::Mmap;

use crate::error::RunError;

/// Maps a file for reading.
pub(crate) fn map_file(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is only read. A file that is changed while it is mapped changes the numbers, as it would between
    // two reads; one that is truncated ends the process, which no reader of mapped files can prevent.
    unsafe { Mmap::map(&file) }
}

/// What stands at `path` if it is there and no ordinary file: renaming a new file over it would destroy it.
pub(crate) fn not_a_file(path: &Path) -> Option<&'static str> {
    match std::fs::metadata(path) {
        Ok(about) if about.is_dir() => Some("it is a folder"),
        Ok(about) if !about.is_file() => Some("it is a device"),
        _ => None,
    }
}

/// Writes `bytes` to `path` through a temporary file in the same folder, creating folders above it.
///
/// # Errors
/// [`RunError::Input`] if a folder or device has that name, else what the system says about the folder or the disk;
/// nothing is left behind.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), RunError> {
    if let Some(found) = not_a_file(path) {
        return Err(RunError::Input(format!("cannot write `{}`: {found}; give the name of a file", path.display())));
    }
    // The library for temporary files adds their names, which mean nothing to users.
    let failed = |e: std::io::Error| match e.raw_os_error() {
        Some(_) => RunError::io(path, e),
        None => RunError::io(path, e.kind().into()),
    };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut file = tempfile::Builder::new().prefix(".ltxc-").suffix(".part").tempfile_in(folder).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    #[cfg(unix)]
    {
        // Temporary files are private; a result has the permissions of any new file.
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(failed)?;
    }
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}
