//! How much a disk has room for.

use std::path::Path;

/// Bytes that can be written to the disk of `path`, which need not exist yet; `None` where the system does not say.
#[cfg(unix)]
pub fn free_bytes(path: &Path) -> Option<u64> {
    let absolute = std::path::absolute(path).ok()?;
    let there = absolute.ancestors().find(|folder| folder.exists())?;
    let about = rustix::fs::statvfs(there).ok()?;
    about.f_bavail.checked_mul(about.f_frsize)
}

/// Bytes that can be written to the disk of `path`, which need not exist yet; `None` where the system does not say.
#[cfg(not(unix))]
pub fn free_bytes(_path: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_of_places_that_do_not_exist_yet_have_room() {
        let folder = tempfile::tempdir().unwrap();
        let free = free_bytes(&folder.path().join("a/b/c"));
        assert_eq!(free.is_some(), cfg!(unix));
        assert_ne!(free, Some(0));
    }
}
