//! Parity with recorded reference tensors. `LTXC_FIXTURES` names another set of the same layout.

mod audio;
mod conditioning;
mod lora;
mod narrow;
mod pipeline;
mod sampling;
mod text;
mod transformer;
mod upsampler;
mod video_vae;
