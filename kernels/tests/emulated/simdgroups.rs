//! What Apple GPUs run, in the words of CUDA.

type Device = crate::devices::Simdgroups;

#[path = "bounds.rs"]
#[allow(dead_code)] // which kernels there are is looked at once
mod bounds;
#[path = "../simple/cases.rs"]
mod cases;
#[path = "harness.rs"]
#[allow(unused_imports)] // what only tensor cores are tested with
mod harness;
#[path = "../simple/matrix_units.rs"]
mod matrix_units;
#[path = "../cube/stores.rs"]
mod stores;
#[path = "../cube/tiles.rs"]
mod tiles;
