//! Retake: a part of a clip, in time, is made anew in one stage at the size of the clip.
//!
//! Source: spec/pipelines §9.8.

use ltxc_ir::plan::SoundRole;

use super::{Brings, Definition, distilled, one_stage};

/// With a distilled model.
pub const DISTILLED: Definition = Definition { name: "retake", brings: CLIP, ..distilled::ONE_STAGE };

/// Steps with a full model of every generation.
const STEPS: usize = 40;

/// With a full model, guided.
pub const GUIDED: Definition = Definition {
    name: "retake-guided",
    stages: |basis| vec![one_stage::guided_in(STEPS, basis)],
    brings: CLIP,
    ..one_stage::VIDEO
};

const CLIP: Brings = Brings { clip: true, sound: Some(SoundRole::Clip), ..Brings::NOTHING };
