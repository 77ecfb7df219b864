//! A clip through latent upsamplers, without any stage. What its plan is made of is in [`crate::upscale`].
//!
//! Source: spec/upsamplers §4.

use super::{Brings, Definition, distilled};

/// Any model: a clip of more pixels, more frames, or both.
pub const UPSCALE: Definition = Definition {
    name: "upscale",
    has_sound: false,
    stages: |_| Vec::new(),
    brings: Brings { clip: true, ..Brings::NOTHING },
    ..distilled::ONE_STAGE
};
