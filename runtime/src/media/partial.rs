//! Files and folders that appear under their name only when complete.
//!
//! Both are written as `<name>.part` next to the final place and renamed at the end, which is atomic within a folder.
//! Dropping one before [`PartialFile::commit`] removes it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::MediaError;
use crate::files::not_a_file;

/// A file under construction.
#[derive(Debug)]
pub(crate) struct PartialFile {
    writer: Option<BufWriter<File>>,
    part: PathBuf,
    path: PathBuf,
}

impl PartialFile {
    /// Creates `<path>.part` and the folders above it. An unfinished file of an earlier run is overwritten.
    pub(crate) fn create(path: &Path) -> Result<Self, MediaError> {
        if let Some(found) = not_a_file(path) {
            return Err(MediaError::OutputName { path: path.to_path_buf(), found });
        }
        create_parents(path)?;
        let part = part_name(path);
        let file = File::create(&part).map_err(|error| MediaError::io("create", &part, error))?;
        Ok(Self { writer: Some(BufWriter::new(file)), part, path: path.to_path_buf() })
    }

    /// Final name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Turns a failed write into the error that names the final file.
    pub(crate) fn error(&self, source: io::Error) -> MediaError {
        MediaError::io("write", &self.path, source)
    }

    /// Flushes to the disk and gives the file its final name, replacing one that is there.
    pub(crate) fn commit(mut self) -> Result<(), MediaError> {
        let writer = self.writer.take().expect("present until commit, which consumes the file");
        let synced = writer.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all());
        synced.and_then(|()| fs::rename(&self.part, &self.path)).map_err(|error| {
            // The writer is gone, so drop would not remove the file.
            let _ = fs::remove_file(&self.part);
            MediaError::io("write", &self.path, error)
        })
    }

    fn writer(&mut self) -> &mut BufWriter<File> {
        self.writer.as_mut().expect("present until commit, which consumes the file")
    }
}

impl Write for PartialFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer().flush()
    }
}

impl Seek for PartialFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.writer().seek(to)
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take() {
            // Without `into_parts` the buffered rest would be written once more, possibly to a full disk.
            let _ = writer.into_parts();
            let _ = fs::remove_file(&self.part);
        }
    }
}

/// A folder under construction. Holds only files that this module wrote.
#[derive(Debug)]
pub(crate) struct PartialDir {
    part: PathBuf,
    path: PathBuf,
    is_committed: bool,
}

impl PartialDir {
    /// Creates `<path>.part/` and the folders above it.
    ///
    /// `is_ours` tells which files an interrupted run may have left in `<path>.part/`; they are removed. Any other
    /// file there, or any file in `path`, is an error: this never deletes what it did not write.
    pub(crate) fn create(path: &Path, is_ours: fn(&str) -> bool) -> Result<Self, MediaError> {
        refuse_if_occupied(path)?;
        create_parents(path)?;
        let part = part_name(path);
        if part.exists() {
            for name in names(&part)? {
                if !is_ours(&name) {
                    return Err(MediaError::OutputExists { path: part, found: name });
                }
                let file = part.join(name);
                fs::remove_file(&file).map_err(|error| MediaError::io("remove", &file, error))?;
            }
        } else {
            fs::create_dir(&part).map_err(|error| MediaError::io("create", &part, error))?;
        }
        Ok(Self { part, path: path.to_path_buf(), is_committed: false })
    }

    /// Where files go until the end.
    pub(crate) fn part(&self) -> &Path {
        &self.part
    }

    /// Final name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the folder its final name.
    pub(crate) fn commit(mut self) -> Result<(), MediaError> {
        refuse_if_occupied(&self.path)?;
        if self.path.is_dir() {
            fs::remove_dir(&self.path).map_err(|error| MediaError::io("replace", &self.path, error))?;
        }
        fs::rename(&self.part, &self.path).map_err(|error| MediaError::io("create", &self.path, error))?;
        self.is_committed = true;
        Ok(())
    }
}

impl Drop for PartialDir {
    fn drop(&mut self) {
        if !self.is_committed {
            let _ = fs::remove_dir_all(&self.part);
        }
    }
}

fn refuse_if_occupied(path: &Path) -> Result<(), MediaError> {
    if path.is_file() {
        return Err(MediaError::OutputExists { path: path.to_path_buf(), found: "it is a file".to_owned() });
    }
    if path.is_dir()
        && let Some(found) = names(path)?.into_iter().next()
    {
        return Err(MediaError::OutputExists { path: path.to_path_buf(), found });
    }
    Ok(())
}

fn names(folder: &Path) -> Result<Vec<String>, MediaError> {
    let read = || -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    };
    read().map_err(|error| MediaError::io("read", folder, error))
}

fn create_parents(path: &Path) -> Result<(), MediaError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => {
            fs::create_dir_all(parent).map_err(|error| MediaError::io("create", parent, error))
        }
        _ => Ok(()),
    }
}

/// The name beside `path` under which it is written.
pub(super) fn part_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".part");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(folder: &Path) -> Vec<String> {
        names(folder).expect("readable")
    }

    #[test]
    fn a_file_appears_only_when_committed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a/b/c.bin");
        let mut file = PartialFile::create(&path).expect("created");
        file.write_all(b"12").expect("written");
        assert_eq!(listing(path.parent().expect("has one")), ["c.bin.part"]);
        file.commit().expect("committed");
        assert_eq!(listing(path.parent().expect("has one")), ["c.bin"]);
        assert_eq!(fs::read(&path).expect("read"), b"12");
    }

    #[test]
    fn a_dropped_file_leaves_nothing_and_keeps_the_old_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("c.bin");
        fs::write(&path, "old").expect("written");
        let mut file = PartialFile::create(&path).expect("created");
        file.write_all(b"new").expect("written");
        drop(file);
        assert_eq!(listing(folder.path()), ["c.bin"]);
        assert_eq!(fs::read(&path).expect("read"), b"old");
    }

    #[test]
    fn a_folder_with_foreign_files_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("frames");
        fs::create_dir(&path).expect("created");
        fs::write(path.join("thesis.txt"), "x").expect("written");
        let error = PartialDir::create(&path, |_| true).expect_err("occupied");
        assert!(error.to_string().contains("thesis.txt"), "{error}");
        assert_eq!(listing(&path), ["thesis.txt"]);
    }

    #[test]
    fn leftovers_of_an_interrupted_run_are_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let part = folder.path().join("frames.part");
        fs::create_dir(&part).expect("created");
        fs::write(part.join("frame_00000.png"), "x").expect("written");
        let path = folder.path().join("frames");
        let dir = PartialDir::create(&path, |name| name.starts_with("frame_")).expect("created");
        assert!(listing(dir.part()).is_empty());
        dir.commit().expect("committed");
        assert_eq!(listing(folder.path()), ["frames"]);
    }
}
