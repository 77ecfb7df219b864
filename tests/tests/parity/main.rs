//! Parity with recorded reference tensors. `LTXC_FIXTURES` names another set of the same layout.

mod audio;
mod bf16;
mod conditioning;
mod pipeline;
mod sampling;
mod text;
mod transformer;
mod upsampler;
mod video_vae;
