//! Files that are written whole or not at all.

use std::io::Write;
use std::path::Path;

use crate::error::RunError;

/// Writes `bytes` to `path` through a temporary file in the same folder, creating folders above it.
///
/// # Errors
/// What the system says about the folder or the disk; nothing is left behind.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), RunError> {
    let failed = |e: std::io::Error| RunError::io(path, e);
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
