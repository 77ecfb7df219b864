//! What tells one input file from another without reading all of a large one: names of outputs depend on it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::UNIX_EPOCH;

/// Files up to this size are hashed whole.
const HASHED_UP_TO: u64 = 64 << 20;

/// Of larger ones so many pages are, evenly spread.
const PAGES: u64 = 4096;

/// Size of a page in bytes.
const PAGE: u64 = 4096;

/// Adds to `hash` what is in a file, or in the files of a folder: all of it, or of files above 64 MB the length, the time
/// of the last change and samples.
///
/// # Errors
/// A file that cannot be read.
pub fn add(hash: &mut blake3::Hasher, path: &Path) -> io::Result<()> {
    if path.is_dir() {
        let mut entries = std::fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(|entry| entry.file_name());
        for path in entries.iter().map(|entry| entry.path()).filter(|path| path.is_file()) {
            hash.update(path.file_name().unwrap_or_default().as_encoded_bytes()).update(&[0]);
            add(hash, &path)?;
        }
        return Ok(());
    }
    let mut file = File::open(path)?;
    let facts = file.metadata()?;
    hash.update(&facts.len().to_le_bytes());
    if facts.len() <= HASHED_UP_TO {
        return hash.update_reader(file).map(drop);
    }
    let changed = facts.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    hash.update(&changed.as_nanos().to_le_bytes());
    let last = facts.len() - PAGE;
    let mut page = [0; PAGE as usize];
    for i in 0..PAGES {
        // In u128, because the product may not fit.
        let offset = u128::from(last) * u128::from(i) / u128::from(PAGES - 1);
        file.seek(SeekFrom::Start(offset as u64))?;
        file.read_exact(&mut page)?;
        hash.update(&page);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::FileTimes;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn of(path: &Path) -> blake3::Hash {
        let mut hash = blake3::Hasher::new();
        add(&mut hash, path).expect("read");
        hash.finalize()
    }

    #[test]
    fn what_is_in_a_file_or_folder_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        std::fs::write(&path, "one").expect("written");
        let (file, all) = (of(&path), of(folder.path()));
        // The time of the last change of a small file does not.
        let past = FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        File::options().append(true).open(&path).expect("opened").set_times(past).expect("set");
        assert_eq!((of(&path), of(folder.path())), (file, all));
        std::fs::write(&path, "two").expect("written");
        assert!(of(&path) != file && of(folder.path()) != all);
        std::fs::write(&path, "one").expect("written");
        std::fs::rename(&path, folder.path().join("b")).expect("renamed");
        assert_ne!(of(folder.path()), all);
        assert!(add(&mut blake3::Hasher::new(), &path).is_err());
    }

    #[test]
    fn a_large_file_is_sampled() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("large");
        let file = File::create(&path).expect("created");
        file.set_len(HASHED_UP_TO + 5).expect("a hole");
        let then = FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        file.set_times(then).expect("set");
        let first = of(&path);
        assert_eq!(of(&path), first);
        file.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(2))).expect("set");
        assert_ne!(of(&path), first);
    }
}
