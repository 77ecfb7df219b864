//! Plan execution for LTX-2 models: weights, executor, pipelines and media.
//!
//! The runtime knows plans, not graphs: it depends neither on the compiler nor on the models.

pub mod adapters;
pub mod audio_frontend;
pub mod backend;
mod contain;
pub mod error;
pub mod executor;
pub mod experiments;
pub mod files;
pub mod media;
pub mod memory;
pub mod noise_files;
pub mod pipeline;
mod prefetch;
pub mod random;
pub mod stats;
pub mod tap;
#[cfg(test)]
mod test_plan;
pub mod tokenizer;
pub mod weights;

pub use error::RunError;
