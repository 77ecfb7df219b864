//! The CPU kernels against the reference evaluator. The cases are those of every backend.

mod attention;
mod cases;
mod conv;
mod copy;
mod far_out;
mod harness;
mod map;
mod matmul;
mod movement;
mod rows;
