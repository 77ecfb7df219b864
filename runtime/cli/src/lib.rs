//! The command line of ltxc, as a library so that tests and benchmarks can compile plans the way the binary does.

pub mod adapters;
pub mod args;
pub mod assemble;
pub mod bench;
pub mod compile;
pub mod convert;
pub mod debug;
pub mod demo;
pub mod doctor;
pub mod enhance;
pub mod identity;
pub mod info;
pub mod inputs;
pub mod inspect;
pub mod inspect_html;
pub mod job;
pub mod jobs;
pub mod lora;
pub mod pipelines;
pub mod planned;
pub mod report;
pub mod run;
pub mod synth;
pub mod tensors;
pub mod tune;
