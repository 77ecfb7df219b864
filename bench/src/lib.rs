//! Benchmarks of ltxc against PyTorch, other libraries and the machine.
//!
//! Each benchmark is a module with a `run` that measures and gives a [`report::Report`]; the binary `ltxc-bench` has a
//! subcommand for each. Where there is another side, the two take turns in one process tree on the same cores
//! ([`measure::alternate`]), and what is compared are medians of the ratios of neighbouring runs: other work on the
//! machine then hits both.
//!
//! The PyTorch sides are the scripts in `bench/pytorch`, run by a Python that has `ltx-core`; without one they are left
//! out. Inputs and weights are random numbers with the published shapes, and both sides read the same files, so that
//! benchmarks also say how far the results are apart.

pub mod block;
pub mod chart;
pub mod compile;
#[cfg(feature = "cubek")]
pub mod cubek;
pub mod e2e;
pub mod gemm;
pub mod guided;
pub mod image_crf;
pub mod kernels;
pub mod levels;
pub mod lora;
pub mod machine;
pub mod measure;
pub mod memory;
pub mod page;
pub mod process;
pub mod report;
pub mod session;
pub mod subjects;
pub mod suite;
pub mod synthetic;
pub mod text;
pub mod torch;
pub mod vae;
pub mod worker;
