//! Shared parts of the tests: fixtures, comparison, and running a module the way a test wants.

pub mod compare;
pub mod fixtures;
pub mod fuzz;
pub mod harness;
pub mod recorded;
pub mod rounding;
