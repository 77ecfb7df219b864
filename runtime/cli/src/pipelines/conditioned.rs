//! Pipelines in two stages that are given more than text: keyframes, a recording, reference videos, or both of these.
//!
//! Source: spec/pipelines §9.5, §9.6, §9.7, §9.11, §9.12.

use ltxc_ir::plan::{Guidance, Guider, SoundRole, StageAdapter};
use ltxc_runtime::pipeline::schedule::HDR_STAGE_2;

use super::{Basis, Brings, Definition, StageDraft, Training, distilled, one_stage, two_stage};

/// Full model: every image is a keyframe, so that the video passes through all of them.
pub const KEYFRAMES: Definition = Definition {
    name: "keyframes",
    training: Training::Full,
    stages: |basis| vec![one_stage::guided(basis), two_stage::refinement()],
    brings: Brings { appends_first_image: true, ..Brings::NOTHING },
    ..distilled::TWO_STAGES
};

/// Full model: a video for a recording, which stays as it is.
pub const AUDIO_TO_VIDEO: Definition = Definition {
    name: "a2v",
    stages: |basis| vec![guided_video(basis), two_stage::refinement()],
    brings: Brings { sound: Some(SoundRole::Kept), ..Brings::NOTHING },
    ..KEYFRAMES
};

/// Distilled model: reference videos guide the first stage, with a LoRA that knows what they mean.
pub const IC_LORA: Definition = Definition {
    name: "ic-lora",
    stages: |basis| vec![distilled::first(basis), without_loras(distilled::second(basis))],
    brings: REFERENCES,
    ..distilled::TWO_STAGES
};

/// The first stage of that alone.
pub const IC_LORA_ONE_STAGE: Definition =
    Definition { name: "ic-lora-one-stage", brings: REFERENCES, ..distilled::ONE_STAGE };

const REFERENCES: Brings = Brings { references: 1, ..Brings::NOTHING };

/// Distilled model: a video is spoken anew. The video and its sound guide both stages, with one LoRA; the second stage keeps
/// the sound of the first, which is written.
pub const DUB: Definition = Definition {
    name: "dubit",
    stages: |basis| vec![distilled::first(basis), StageDraft { keeps_sound: true, ..distilled::second(basis) }],
    sound_stage: 0,
    brings: Brings { references: 2, sound: Some(SoundRole::Reference), ..Brings::NOTHING },
    ..distilled::TWO_STAGES
};

/// Distilled model: a video gets a high dynamic range. It guides both stages, with one LoRA; the second one runs in tiles.
pub const HDR_IC_LORA: Definition = Definition {
    name: "hdr-ic-lora",
    size: (1088, 1920),
    frames: 161,
    has_sound: false,
    stages: |basis| vec![distilled::first(basis), in_tiles(distilled::second(basis))],
    brings: Brings { references: 2, pads_references: true, ..Brings::NOTHING },
    ..distilled::TWO_STAGES
};

/// Two tiles along every axis, at two noise levels.
fn in_tiles(draft: StageDraft) -> StageDraft {
    StageDraft { sigmas: HDR_STAGE_2.into(), tiles: Some([(2, 8), (2, 6), (2, 6)]), ..draft }
}

/// Without the LoRAs of the user, which know references that this stage does not have.
fn without_loras(draft: StageDraft) -> StageDraft {
    let adapters = draft.adapters.into_iter().filter(|adapter| *adapter != StageAdapter::user()).collect();
    StageDraft { adapters, ..draft }
}

/// Guidance for the picture alone.
fn guided_video(basis: &Basis) -> StageDraft {
    let draft = one_stage::guided(basis);
    let guidance = draft.guidance.map(|guidance| Guidance { audio: Guider::default(), ..guidance });
    StageDraft { guidance, ..draft }
}
