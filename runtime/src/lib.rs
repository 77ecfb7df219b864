//! runtime

pub mod audio_frontend;
