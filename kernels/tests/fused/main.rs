//! Fused calls against their parts one after the other, and against the reference evaluator.
//!
//! Fusing adds no rounding and changes no order of sums, so results are equal to the last bit, on one thread and on two,
//! and in place wherever that is allowed.

#[path = "../simple/harness.rs"]
#[allow(dead_code)] // what only the other kernels need
mod harness;

mod attention;
mod group;
mod group_norm;
mod meaning;
mod product;
mod rows;
