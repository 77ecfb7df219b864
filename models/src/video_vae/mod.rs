//! The convolutional video VAE of LTX-2, LTX-2.3 and LTX-2.5.
//!
//! Two entries, [`decode`] and [`encode`], each a module for one size; what varies between models is in
//! [`VideoVaeConfig`]. Tiles of larger videos are arithmetic around them, see [`ltxc_ir::tiling`].
//!
//! The diffusion decoder of LTX-2.5 is another component and is refused by [`VideoVaeConfig::from_json`].
//!
//! Source: spec/video-vae §1–6.

mod block_list;
mod blocks;
mod config;
mod decoder;
mod encoder;
pub(crate) mod layers;

pub use block_list::{DecoderBlock, EncoderBlock, Stride};
pub(crate) use config::PADDING_MODES;
pub use config::{LogVariance, Norm, PaddingMode, VideoVaeConfig};
pub use decoder::{DECODE_TIMESTEP, decode, noise_planes};
pub use encoder::encode;

use crate::ModelError;

/// Fails because of what was asked for, not because of the checkpoint.
fn refuse_request<T>(problem: String) -> Result<T, ModelError> {
    Err(ModelError::config("vae", problem))
}
