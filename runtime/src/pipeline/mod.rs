//! The driver: ordinary Rust that knows latents and programs, not kernels.
//!
//! A pipeline is a composition of the same parts: encode text → prepare states → denoise → upsample → … → decode.

pub mod decode;
mod denoise;
mod distilled;
pub mod encode;
mod noise;
mod observe;
pub mod schedule;
pub mod state;
mod text;
mod tiles;

pub use distilled::{Conditioning, Output, Request, run};
pub use noise::{Noise, SlotShape};
pub use observe::{Event, Observer, Silent};
