//! The driver: ordinary Rust that knows latents and programs, not kernels.
//!
//! Every pipeline is the same composition of parts, with what differs between them in the plan:
//!
//! | part | file |
//! |---|---|
//! | what a run asks for, and whether the plan has room for it | `request` |
//! | encode text → stages → upsample → decode | `run`, `text`, `decode` |
//! | let the text encoder write the prompt anew | `enhance` |
//! | clips and recordings | `media`, `encode`, `tiles` |
//! | a stage in tiles | `tiled`, `tiles` |
//! | a clip through upsamplers, without stages | `upscale` |
//! | states, and what conditioning does to them | `state`, `positions`, `conditioning`, `stage` |
//! | noise levels, steps and fresh noise | `schedule`, `sampler`, `noise` |
//! | programs of the transformer, and guidance between their passes | `denoise`, `guidance` |

pub mod conditioning;
pub mod decode;
mod denoise;
pub mod encode;
pub mod enhance;
pub mod guidance;
mod media;
mod noise;
mod observe;
mod per;
pub mod positions;
mod request;
mod run;
pub mod sampler;
pub mod schedule;
mod stage;
pub mod state;
mod text;
mod tiled;
pub mod tiles;
mod upscale;

pub use denoise::needed_passes;
pub use media::{Attention, Media, Reference, SourceClip};
pub use noise::{Noise, SlotShape};
pub use observe::{Event, Observer, Silent};
pub use per::Per;
pub use request::{Conditioning, Output, Request, StageChoice};
pub use run::run;
pub use text::{Embeddings, TextContext};
pub use tiled::{tile_name, tile_of};
