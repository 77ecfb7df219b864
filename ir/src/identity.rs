//! How a weight file is recognised without reading all of it.
//!
//! A checkpoint has 20 to 45 GB, so a plan cannot name it by the hash of all its bytes. Instead it names the length, the
//! hash of the header (every key, type, shape and offset) and a hash of one page out of every large tensor. The page is
//! chosen by the key, so that two files of one model are sampled at the same places; a file with other weights differs
//! in nearly every page. The compiler records an identity, the runtime computes it again with the same function.
//!
//! Only bytes are handled here: whoever opens files passes them in, usually as a memory map.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Tensors above this size are sampled.
pub const SAMPLED_ABOVE: u64 = 1 << 20;

/// Files up to this size are hashed whole instead: reading them costs nothing, and their tensors may all be small.
pub const HASHED_UP_TO: u64 = 64 << 20;

/// Size of a sample in bytes.
pub const PAGE: u64 = 4096;

/// Identity of a weight file: cheap to compute, and different for files with different content in practice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of the safetensors header, length field included.
    pub header: [u8; 32],
    /// BLAKE3 over one sampled page of every tensor of more than 1 MiB; of all bytes of a file up to 64 MiB.
    pub samples: [u8; 32],
    /// BLAKE3 of the whole file, if it was asked for.
    pub full: Option<[u8; 32]>,
    /// SHA-256 of the whole file as the Hugging Face cache claims it; recorded, never computed here.
    pub sha256: Option<[u8; 32]>,
}

/// Where a tensor lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span<'a> {
    /// Key as stored in the file.
    pub key: &'a str,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Why two identities are not of the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// The lengths differ.
    #[error("it has {found} bytes, expected {expected}")]
    Length {
        /// Length of the file at hand.
        found: u64,
        /// Length on record.
        expected: u64,
    },
    /// Keys, types, shapes, order or metadata differ.
    #[error("its header (keys, types, shapes or metadata) is another one")]
    Header,
    /// The weights differ at a sampled page.
    #[error("its header is the expected one, but its weights are other ones")]
    Samples,
    /// The weights differ somewhere.
    #[error("header and samples agree, but its full hash is another one")]
    Full,
}

/// The table of tensors does not describe the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` ends at byte {end}, but there are {bytes}")]
pub struct OutsideFile {
    /// The tensor, or `header`.
    pub key: String,
    /// Where it would end.
    pub end: u64,
    /// Length of the file.
    pub bytes: u64,
}

impl FileIdentity {
    /// The identity of the safetensors file `file`, whose data starts at `header_bytes` and holds `tensors` (in any
    /// order). Of a large file it touches the header and one page per large tensor, and no other page.
    ///
    /// # Errors
    /// If the header or a tensor is said to lie outside the file.
    pub fn of(file: &[u8], header_bytes: u64, tensors: &[Span<'_>]) -> Result<FileIdentity, OutsideFile> {
        let header = slice(file, "header", 0, header_bytes)?;
        let mut sampled: Vec<&Span<'_>> = tensors.iter().filter(|t| t.bytes > SAMPLED_ABOVE).collect();
        sampled.sort_by_key(|t| t.offset);
        let mut samples = blake3::Hasher::new();
        for tensor in sampled {
            slice(file, tensor.key, tensor.offset, tensor.bytes)?;
            samples.update(slice(file, tensor.key, tensor.offset + sample_offset(tensor.key, tensor.bytes), PAGE)?);
        }
        if file.len() as u64 <= HASHED_UP_TO {
            samples.update(file);
        }
        Ok(FileIdentity {
            bytes: file.len() as u64,
            header: *blake3::hash(header).as_bytes(),
            samples: *samples.finalize().as_bytes(),
            full: None,
            sha256: None,
        })
    }

    /// Adds the hash of all bytes. Reads the whole file: seconds per ten gigabytes.
    pub fn with_full_hash(self, file: &[u8]) -> FileIdentity {
        FileIdentity { full: Some(*blake3::hash(file).as_bytes()), ..self }
    }

    /// How this identity (of a file at hand) differs from the `expected` one; `None` if both name the same file as far
    /// as both know. Hashes that only one side has are not compared.
    pub fn difference(&self, expected: &FileIdentity) -> Option<Difference> {
        let both = |a: Option<[u8; 32]>, b: Option<[u8; 32]>| a.zip(b).is_some_and(|(a, b)| a != b);
        if self.bytes != expected.bytes {
            Some(Difference::Length { found: self.bytes, expected: expected.bytes })
        } else if self.header != expected.header {
            Some(Difference::Header)
        } else if self.samples != expected.samples {
            Some(Difference::Samples)
        } else if both(self.full, expected.full) || both(self.sha256, expected.sha256) {
            Some(Difference::Full)
        } else {
            None
        }
    }
}

impl fmt::Display for FileIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |hash: &[u8; 32]| hash[..6].iter().map(|b| format!("{b:02x}")).collect::<String>();
        write!(f, "{} bytes, header {}, samples {}", self.bytes, short(&self.header), short(&self.samples))
    }
}

/// Offset, inside a tensor of `bytes` bytes, of the page that stands for it.
fn sample_offset(key: &str, bytes: u64) -> u64 {
    let hash = blake3::hash(key.as_bytes());
    let mut low = [0u8; 8];
    low.copy_from_slice(&hash.as_bytes()[..8]);
    // Only called for tensors above SAMPLED_ABOVE, so there is at least one page.
    u64::from_le_bytes(low) % (bytes / PAGE).max(1) * PAGE
}

fn slice<'a>(file: &'a [u8], key: &str, offset: u64, bytes: u64) -> Result<&'a [u8], OutsideFile> {
    let end = offset.saturating_add(bytes);
    let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
    range.and_then(|(start, end)| file.get(start..end)).ok_or_else(|| OutsideFile {
        key: key.into(),
        end,
        bytes: file.len() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: u64 = 64;
    const LARGE: u64 = SAMPLED_ABOVE + 12_345;

    fn file() -> Vec<u8> {
        (0..HEADER + LARGE + 100).map(|i| (i * 7 % 251) as u8).collect()
    }

    fn table() -> [Span<'static>; 2] {
        [Span { key: "large", offset: HEADER, bytes: LARGE }, Span { key: "small", offset: HEADER + LARGE, bytes: 100 }]
    }

    fn identity(file: &[u8]) -> FileIdentity {
        FileIdentity::of(file, HEADER, &table()).expect("the table describes the file")
    }

    #[test]
    fn equal_files_are_equal_in_any_table_order() {
        let file = file();
        let [a, b] = table();
        assert_eq!(Some(identity(&file)), FileIdentity::of(&file, HEADER, &[b, a]).ok());
    }

    #[test]
    fn differences_are_named() {
        let original = file();
        let expected = identity(&original).with_full_hash(&original);
        let change = |at: u64| {
            let mut file = original.clone();
            file[at as usize] ^= 1;
            identity(&file).with_full_hash(&file).difference(&expected)
        };
        assert_eq!(change(3), Some(Difference::Header));
        assert_eq!(change(HEADER + sample_offset("large", LARGE) + 4095), Some(Difference::Samples));
        // A small tensor: noticed because a small file is hashed whole.
        assert_eq!(change(HEADER + LARGE + 50), Some(Difference::Samples));
        let other = FileIdentity { full: Some([1; 32]), ..expected.clone() };
        assert_eq!(other.difference(&expected), Some(Difference::Full));
        assert_eq!(identity(&original).difference(&expected), None);
        let longer = FileIdentity { bytes: 1, ..expected.clone() };
        assert!(matches!(longer.difference(&expected), Some(Difference::Length { found: 1, .. })));
    }

    #[test]
    fn tables_that_point_outside_are_refused() {
        let file = file();
        for (offset, bytes) in [(HEADER, LARGE + 200), (u64::MAX, LARGE), (file.len() as u64, LARGE)] {
            assert!(FileIdentity::of(&file, HEADER, &[Span { key: "k", offset, bytes }]).is_err());
        }
        assert!(FileIdentity::of(&file, u64::MAX, &[]).is_err());
    }

    #[test]
    fn samples_lie_inside_their_tensor() {
        for bytes in [SAMPLED_ABOVE + 1, LARGE, 1 << 31] {
            for key in ["a", "transformer_blocks.7.attn1.to_q.weight", "é"] {
                assert!(sample_offset(key, bytes) + PAGE <= bytes);
            }
        }
    }
}
