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
    write_with(path, |file| file.write_all(bytes).map_err(|e| failed(path, e)))
}

/// The same for what `write` brings piece by piece.
///
/// # Errors
/// Those of [`write_atomically`] and of `write`.
pub fn write_with<E: From<RunError>>(path: &Path, write: impl FnOnce(&mut File) -> Result<(), E>) -> Result<(), E> {
    if let Some(found) = not_a_file(path) {
        let problem = format!("cannot write `{}`: {found}; give the name of a file", path.display());
        return Err(RunError::Input(problem).into());
    }
    let failed = |e| failed(path, e);
    let folder = parent(path);
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut file = tempfile::Builder::new().prefix(".ltxc-").suffix(".part").tempfile_in(folder).map_err(failed)?;
    write(file.as_file_mut())?;
    file.as_file().sync_all().map_err(failed)?;
    set_mode(file.path(), 0o644).map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

/// Makes the folder `path` with what `fill` puts into it; it appears whole.
///
/// # Errors
/// [`RunError::Input`] if there is a file, or a folder that is not empty; else what the system or `fill` says, and nothing is
/// left behind.
pub fn write_folder_with<E: From<RunError>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let failed = |e| failed(path, e);
    if path.exists() && std::fs::read_dir(path).map_or(true, |mut entries| entries.next().is_some()) {
        let found = if path.is_dir() { "the folder is not empty" } else { "it is a file" };
        let problem = format!("cannot write `{}`: {found}; give the name of a new folder", path.display());
        return Err(RunError::Input(problem).into());
    }
    let above = parent(path);
    std::fs::create_dir_all(above).map_err(failed)?;
    let part = tempfile::Builder::new().prefix(".ltxc-").suffix(".part").tempdir_in(above).map_err(failed)?;
    fill(part.path())?;
    set_mode(part.path(), 0o755).map_err(failed)?;
    if path.is_dir() {
        std::fs::remove_dir(path).map_err(failed)?;
    }
    std::fs::rename(part.path(), path).map_err(failed)?;
    // What it would remove has moved.
    let _ = part.keep();
    Ok(())
}

/// The folder of `path`.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The library for temporary files adds their names, which mean nothing to users.
fn failed(path: &Path, e: io::Error) -> RunError {
    match e.raw_os_error() {
        Some(_) => RunError::io(path, e),
        None => RunError::io(path, e.kind().into()),
    }
}

/// Temporary files are private; a result has the permissions of any new file.
fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
    }
    #[cfg(not(unix))]
    {
        let _ = (path, mode);
        Ok(())
    }
}
