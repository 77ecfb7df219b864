//! The kernels that stream over memory against the reference evaluator.

mod copy;
mod harness;
mod map;
mod movement;
mod rows;
