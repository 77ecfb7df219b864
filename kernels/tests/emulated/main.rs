//! CubeCL kernels as CUDA C++, run on the CPU by an emulator of our own (`shim`): what only a GPU with matrix units runs is
//! compared with the reference evaluator on any machine with a C++ compiler.
//!
//! Threads run one after the other in two opposite orders, so that a forgotten barrier shows; memory outside operands is
//! not there, and shared memory that nobody wrote is no number.
#![cfg(feature = "cuda")]

mod devices;
mod emulator;
mod simdgroups;
mod tensor_cores;

#[path = "../../../tests/tests/offline/recorder.rs"]
mod recorder;
#[path = "../../../tests/tests/offline/targets.rs"]
mod targets;
