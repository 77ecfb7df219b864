//! The binary as a user runs it, and what it says to bad input.

mod bad_arguments;
mod bad_files;
mod bad_plans;
mod bench;
mod binary;
mod conditioned;
mod convert;
#[cfg(target_os = "linux")]
mod cuda;
mod cut;
mod devices;
mod enhance;
mod everyday;
mod fusion;
mod hdr;
mod info;
mod inputs;
mod jobs;
mod loras;
mod misused_files;
mod one_modality;
mod pipelines;
mod recorded;
mod spellings;
mod upscale;
