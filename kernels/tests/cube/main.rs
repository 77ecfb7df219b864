//! The CubeCL kernels on Vulkan against the reference evaluator, with the cases of every backend.
//!
//! Without a Vulkan device they are skipped, unless `LTXC_REQUIRE_VULKAN=1`.
#![cfg(feature = "wgpu")]

#[path = "../simple/map.rs"]
mod map;

mod harness;
