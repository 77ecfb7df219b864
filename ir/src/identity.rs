//! How a weight file is recognised without reading all of it.

use serde::{Deserialize, Serialize};

/// Identity of a weight file: cheap to compute, and different for files with different content in practice.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of the safetensors header, length field included.
    pub header: [u8; 32],
    /// BLAKE3 over one sampled page of every tensor of more than 1 MiB.
    pub samples: [u8; 32],
    /// BLAKE3 of the whole file, if it was asked for.
    pub full: Option<[u8; 32]>,
}
