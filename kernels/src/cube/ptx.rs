//! Compiled kernels of CUDA. CubeCL 0.10 looks for them in a file that it reads when it opens a device and adds to when it
//! compiles: [`seed`] fills the file before, [`compiled`] reads it after.
//!
//! Kernels are found under the names of `tracked`, so what stands in the file is used only for the source, device and
//! driver that it was compiled for.

use std::ffi::c_char;
use std::path::Path;

use cubecl::cache::CacheOption;
use cubecl::compilation_cache::CompilationCache;
use cubecl::config::cache::CacheConfig;
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use cubecl::cuda::CudaCompiler;
use cubecl::hash::StableHash;
use cubecl::prelude::{CubeDim, ExecutionMode};
use ltxc_ir::plan::{KernelForm, PlanKernel};
use serde::{Deserialize, Serialize};

use super::tracked::{LaunchedKernel, name_of};

/// What CubeCL keeps of a kernel.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    entrypoint_name: String,
    shared_mem_bytes: usize,
    /// With a zero byte at the end.
    ptx: Vec<c_char>,
}

/// Makes CubeCL keep compiled kernels in `folder`. Returns whether it does: its settings are those of the whole process, and
/// cannot be changed once anybody has read them.
pub fn keep_in(folder: &Path) -> bool {
    let mut settings = CubeClRuntimeConfig::from_current_dir().override_from_env();
    settings.compilation.cache = Some(CacheConfig::File(folder.into()));
    let mut stored = CubeClRuntimeConfig::storage().lock();
    match &*stored {
        Some(known) => matches!(&known.compilation.cache, Some(CacheConfig::File(kept)) if kept == folder),
        None => {
            *stored = Some(std::sync::Arc::new(settings));
            true
        }
    }
}

fn file(folder: &Path) -> CompilationCache<StableHash, Entry> {
    CompilationCache::new("ptx", CacheOption::default().name("cuda").root(folder))
}

/// Writes kernels, which were verified, to where CubeCL looks for them.
pub fn seed(folder: &Path, kernels: &[PlanKernel]) {
    let mut file = file(folder);
    for kernel in kernels {
        let KernelForm::Ptx { shared_bytes, text } = &kernel.form else { continue };
        let ptx = text.bytes().chain([0]).map(|byte| byte as c_char).collect();
        let entry = Entry { entrypoint_name: kernel.name.clone(), shared_mem_bytes: *shared_bytes as usize, ptx };
        // The hashes of verified kernels are distinct, so nothing is written twice.
        let _ = file.insert(key(kernel.hash, kernel.cube_dim), entry);
    }
}

/// What was compiled for kernels that were launched; those that check bounds are for one run only.
pub fn compiled(folder: &Path, launched: &[LaunchedKernel]) -> Vec<PlanKernel> {
    let file = file(folder);
    let kernels = launched.iter().filter(|kernel| !kernel.is_checked).filter_map(|kernel| {
        let entry = file.get(&key(kernel.hash, kernel.cube_dim))?;
        let bytes: Vec<u8> = entry.ptx.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
        let form =
            KernelForm::Ptx { shared_bytes: entry.shared_mem_bytes as u64, text: String::from_utf8(bytes).ok()? };
        Some(PlanKernel { hash: kernel.hash, name: entry.entrypoint_name.clone(), cube_dim: kernel.cube_dim, form })
    });
    kernels.collect()
}

/// How CubeCL names a kernel in its file.
fn key(hash: [u8; 32], [x, y, z]: [u32; 3]) -> StableHash {
    let mut id = name_of::<CudaCompiler>(hash, CubeDim { x, y, z });
    id.mode(ExecutionMode::Unchecked);
    id.stable_hash()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launched(number: u8, is_checked: bool) -> LaunchedKernel {
        LaunchedKernel {
            hash: [number; 32],
            name: "k".into(),
            cube_dim: [64, 2, 1],
            source: String::new(),
            is_checked,
            is_compiled: true,
            round: 0,
        }
    }

    fn kernel(number: u8, text: &str) -> PlanKernel {
        let form = KernelForm::Ptx { shared_bytes: 48, text: text.into() };
        PlanKernel { hash: [number; 32], name: "k".into(), cube_dim: [64, 2, 1], form }
    }

    #[test]
    fn seeded_kernels_are_found_by_their_hashes() {
        let folder = std::env::temp_dir().join(format!("ltxc-ptx-test-{}", std::process::id()));
        let kernels = [kernel(1, ".version 8.7\n"), kernel(2, ".version 8.7\nret;\n")];
        seed(&folder, &kernels);
        let found = compiled(&folder, &[launched(1, false), launched(2, false), launched(3, false)]);
        let checked = compiled(&folder, &[launched(1, true)]);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found, kernels);
        assert_eq!(checked, []);
    }

    #[test]
    fn names_differ_by_hash_and_size_of_cubes() {
        assert_eq!(key([1; 32], [64, 1, 1]), key([1; 32], [64, 1, 1]));
        assert_ne!(key([1; 32], [64, 1, 1]), key([2; 32], [64, 1, 1]));
        assert_ne!(key([1; 32], [64, 1, 1]), key([1; 32], [1, 64, 1]));
    }
}
