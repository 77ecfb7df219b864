//! `ltxc debug` and the logs of a run: they find the faults that they are for, and change nothing otherwise.
//!
//! Faults are planted in a copy of a small model's file; every test that plants one also passes without it.

#[path = "../cli/binary.rs"]
#[allow(dead_code)] // what other tests use
mod binary;
mod faults;
mod logs;
mod noise;
mod parity;
