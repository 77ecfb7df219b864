//! Fused calls against their parts one after the other, and against the reference evaluator.
//!
//! Fusing adds no rounding and changes no order of sums, so results are equal to the last bit, on one thread and on two,
//! and in place wherever that is allowed.

#[path = "simple/harness.rs"]
#[allow(dead_code)] // what only the other kernels need
mod harness;

#[path = "fused/group.rs"]
mod group;

#[path = "fused/attention.rs"]
mod attention;
#[path = "fused/group_norm.rs"]
mod group_norm;
#[path = "fused/meaning.rs"]
mod meaning;
#[path = "fused/product.rs"]
mod product;
#[path = "fused/rows.rs"]
mod rows;
