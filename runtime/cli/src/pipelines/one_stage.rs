//! Full models in one stage, guided: picture with sound, or sound alone.
//!
//! Source: spec/pipelines §1, §9.2, §9.9.

use ltxc_ir::plan::{CfgRule, Guidance, Guider, Sampler, Schedule, StageAdapter};
use ltxc_models::checkpoint::Generation;
use ltxc_runtime::pipeline::schedule::{DEFAULT_TOKENS, TERMINAL, shifted};

use super::{Basis, Brings, Definition, StageDraft, Training};

/// Text, or text and images, to a video with sound.
pub const VIDEO: Definition = Definition {
    name: "one-stage",
    training: Training::Full,
    size: (512, 768),
    frames: 121,
    has_video: true,
    has_sound: true,
    has_two_stages: false,
    stages: |basis| vec![guided(basis)],
    sound_stage: 0,
    brings: Brings::NOTHING,
};

/// Text to sound.
pub const SOUND: Definition = Definition { name: "t2a", has_video: false, ..VIDEO };

/// From noise, with the steps and the guidance of the generation.
pub fn guided(basis: &Basis) -> StageDraft {
    let steps = match basis.generation {
        Generation::Ltx2 => 40,
        Generation::Ltx23 | Generation::Ltx25 => 30,
    };
    guided_in(steps, basis)
}

/// From noise in so many steps, with the guidance of the generation.
pub fn guided_in(steps: usize, basis: &Basis) -> StageDraft {
    let block = match basis.generation {
        Generation::Ltx2 => 29,
        Generation::Ltx23 | Generation::Ltx25 => 28,
    };
    let guider = |cfg: f64| Guider {
        cfg,
        rule: CfgRule::Plain,
        stg: 1.0,
        // Models made for tests have fewer blocks.
        stg_blocks: vec![block.min(basis.layers.saturating_sub(1) as u32)],
        modality: 3.0,
        rescale: 0.7,
        skip_step: 0,
    };
    StageDraft {
        name: "stage1",
        sigmas: shifted(steps, DEFAULT_TOKENS, Some(TERMINAL)).into_iter().map(|s| s as f32).collect(),
        schedule: Schedule::Shifted { tokens: DEFAULT_TOKENS },
        sampler: Sampler::Euler,
        guidance: Some(Guidance { video: guider(3.0), audio: guider(7.0) }),
        adapters: vec![StageAdapter::user()],
        upsampled: false,
        keeps_sound: false,
        tiles: None,
    }
}
