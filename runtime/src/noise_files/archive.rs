//! Zip archives in memory, as `.npz` and `.pt` are.

use std::io::{Cursor, Read, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::Problem;

/// Most entries: a file of noise has a handful.
const MOST_ENTRIES: usize = 4096;

/// Largest archive when unpacked: noise of the largest clips is far below.
const MOST_BYTES: u64 = 8 << 30;

/// How many times larger than itself an archive may be when unpacked: floating point noise hardly shrinks.
const MOST_EXPANSION: u64 = 64;

/// Names and contents of all entries, in the order of the archive.
pub(super) fn entries(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, Problem> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("no zip archive: {e}"))?;
    if archive.len() > MOST_ENTRIES {
        return Err(format!("{} entries, expected at most {MOST_ENTRIES}", archive.len()));
    }
    let mut left = MOST_BYTES.min((bytes.len() as u64).saturating_mul(MOST_EXPANSION));
    let mut entries = Vec::with_capacity(archive.len());
    for index in 0..archive.len() {
        let entry = archive.by_index(index).map_err(|e| e.to_string())?;
        let name = entry.name().map_err(|e| e.to_string())?.into_owned();
        let mut content = Vec::new();
        // What a header says about sizes is not believed.
        let read =
            entry.take(left.saturating_add(1)).read_to_end(&mut content).map_err(|e| format!("`{name}`: {e}"))?;
        left = left.checked_sub(read as u64).ok_or_else(|| format!("`{name}` unpacks to too many bytes"))?;
        entries.push((name, content));
    }
    Ok(entries)
}

/// An archive of these entries, without compression, as the framework that reads `.pt` files wants it.
pub(super) fn encode(entries: &[(String, Vec<u8>)]) -> Result<Vec<u8>, Problem> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in entries {
        let is_large = content.len() as u64 > u64::from(u32::MAX);
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(zip::DateTime::default())
            .large_file(is_large);
        writer.start_file(name.as_str(), options).map_err(|e| e.to_string())?;
        writer.write_all(content).map_err(|e| e.to_string())?;
    }
    Ok(writer.finish().map_err(|e| e.to_string())?.into_inner())
}
