//! Full models in two stages: guided at half size, then few steps at full size with the distilled adapter.
//!
//! Source: spec/pipelines §1.2, §9.3, §9.4.

use ltxc_ir::plan::{Guidance, Guider, Sampler, Schedule, StageAdapter};
use ltxc_runtime::pipeline::schedule::{DISTILLED_STAGE_2, TERMINAL, shifted};

use super::one_stage::guided;
use super::{Basis, Brings, Definition, StageDraft, Training};

/// Half size with guidance, latent upscaling, full size.
pub const TWO_STAGES: Definition = Definition {
    name: "two-stage",
    training: Training::Full,
    size: (1024, 1536),
    frames: 121,
    has_video: true,
    has_sound: true,
    has_two_stages: true,
    stages: |basis| vec![guided(basis), refinement()],
    // The second stage makes sound too, because the picture looks at it; the first one's is better.
    sound_stage: 0,
    brings: Brings::NOTHING,
};

/// The same with a sampler of second order, and some of the distilled adapter in both stages.
pub const HIGH_QUALITY: Definition = Definition {
    name: "hq",
    size: (1088, 1920),
    stages: |basis| vec![high_quality_first(basis), high_quality_second()],
    ..TWO_STAGES
};

/// From the upsampled latent of the first stage.
pub fn refinement() -> StageDraft {
    StageDraft {
        name: "stage2",
        sigmas: DISTILLED_STAGE_2.into(),
        schedule: Schedule::Distilled,
        sampler: Sampler::Euler,
        guidance: None,
        adapters: vec![StageAdapter::user(), StageAdapter::distilled()],
        upsampled: true,
        keeps_sound: false,
        tiles: None,
    }
}

/// The distilled adapter at a strength that replaces the one given with its file.
fn weakened(strength: f64) -> Vec<StageAdapter> {
    vec![StageAdapter::user(), StageAdapter { strength: Some(strength), ..StageAdapter::distilled() }]
}

fn high_quality_first(basis: &Basis) -> StageDraft {
    const STEPS: usize = 15;
    let guider = |cfg: f64, rescale: f64| Guider { cfg, modality: 3.0, rescale, ..Guider::default() };
    let tokens = basis.first_tokens;
    StageDraft {
        sigmas: shifted(STEPS, tokens, Some(TERMINAL)).into_iter().map(|s| s as f32).collect(),
        // The one pipeline whose schedule knows the size.
        schedule: Schedule::Shifted { tokens },
        sampler: Sampler::Res2s,
        guidance: Some(Guidance { video: guider(3.0, 0.45), audio: guider(7.0, 1.0) }),
        adapters: weakened(0.25),
        ..guided(basis)
    }
}

fn high_quality_second() -> StageDraft {
    StageDraft { sampler: Sampler::Res2s, adapters: weakened(0.5), ..refinement() }
}
