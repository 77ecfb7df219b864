//! Audio: the VAE between log-mel spectrograms and latents, and the vocoder that makes the waveform.
//!
//! Four entries: [`encode`], [`decode`], [`vocode`], and [`decode_audio`] (decode and vocode in one). Each is a
//! module of fixed length; what varies between models is in [`AudioVaeConfig`] and [`VocoderConfig`]. The spectrogram
//! itself is computed on the host, not here.
//!
//! Source: spec/audio-vae-vocoder.

mod decoder;
mod encoder;
mod generator;
mod layers;
mod vae_config;
mod vocoder;
mod vocoder_config;

pub use decoder::decode;
pub use encoder::encode;
pub use vae_config::AudioVaeConfig;
pub use vocoder::{decode_audio, vocode};
pub use vocoder_config::{ExtensionConfig, FinalActivation, GeneratorConfig, GeneratorKind, VocoderConfig};

use crate::ModelError;

/// Largest number of mel frames or latents of one program; at 100 mel frames per second nearly three hours.
const MOST_FRAMES: usize = 1 << 20;

/// Fails unless a program can be built for `frames`.
fn check_frames(path: &str, what: &str, frames: usize) -> Result<(), ModelError> {
    if (1..=MOST_FRAMES).contains(&frames) {
        return Ok(());
    }
    let problem = format!("cannot process {frames} {what}, expected 1..={MOST_FRAMES}");
    Err(ModelError::config(path, problem))
}
