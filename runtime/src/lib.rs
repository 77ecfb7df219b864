//! Plan execution for LTX-2 models: weights, executor, pipelines and media.

pub mod media;
