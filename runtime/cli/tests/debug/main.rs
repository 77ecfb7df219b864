//! `ltxc debug` and the logs of a run: they find the faults that they are for, and change nothing otherwise.
//!
//! Faults are planted in a copy of a small model's file; every test that plants one also passes without it.

#[path = "../cli/binary.rs"]
#[allow(dead_code)] // what other tests use
mod binary;
mod experiments;
mod faults;
mod logs;
mod noise;
mod parity;
mod text;
mod vae;

/// Folder of the recorded fixtures: `LTXC_FIXTURES`, or those of this repository.
fn root() -> std::path::PathBuf {
    let own = || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    std::env::var_os("LTXC_FIXTURES").map_or_else(own, Into::into)
}
