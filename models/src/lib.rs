//! The LTX-2 family: checkpoint formats, configurations and graph builders.
//!
//! Every size and switch comes from the checkpoint's own metadata and tensor shapes. Builders turn a configuration and a
//! [`Weights`] view into functions of [`ltxc_ir`]; they neither read tensor data nor know a device.
//!
//! Activations are channels-last throughout: video `[b, f, h, w, c]`, spectrograms `[b, t, m, c]`, waveforms
//! `[b, t, c]`, tokens `[b, t, c]`. Convolution weights are transposed in the graph from the published
//! `[o, i, k..]` to `[k.., i, o]`; the compiler turns that into a weight recipe.

pub mod audio;
pub mod checkpoint;
mod error;
mod fields;
mod functions;
pub mod lora;
pub mod synth;
pub mod text;
pub mod transformer;
pub mod upsampler;
pub mod video_vae;
mod weights;

pub use error::ModelError;
pub use functions::{Block, Functions};
pub use weights::{Listed, TensorDirectory, WeightProblem, Weights};
