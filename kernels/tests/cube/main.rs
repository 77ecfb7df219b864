//! The CubeCL kernels on a device (Vulkan, or CUDA: see `harness`) against the reference evaluator, with the cases of every
//! backend.
//!
//! Without a Vulkan device they are skipped, unless `LTXC_REQUIRE_VULKAN=1`.
#![cfg(feature = "wgpu")]

#[path = "../simple/attention.rs"]
mod attention;
#[path = "../simple/cases.rs"]
mod cases;
#[path = "../simple/conv.rs"]
mod conv;
#[path = "../simple/copy.rs"]
mod copy;
#[path = "../simple/map.rs"]
mod map;
#[path = "../simple/matmul.rs"]
mod matmul;
#[path = "../simple/matrix_units.rs"]
mod matrix_units;
#[path = "../simple/movement.rs"]
mod movement;
#[path = "../simple/rows.rs"]
mod rows;

mod fused;
mod fused_random;
mod harness;
mod stores;
mod tiles;
