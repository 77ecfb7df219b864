//! runtime

pub mod tokenizer;
