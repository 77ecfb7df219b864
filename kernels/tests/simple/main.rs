//! The kernels that stream over memory against the reference evaluator.

mod harness;
mod map;
