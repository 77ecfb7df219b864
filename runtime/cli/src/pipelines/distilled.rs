//! Distilled models: few fixed noise levels, one pass per step.
//!
//! Source: spec/pipelines §5.2, §9.1.

use ltxc_ir::plan::{Sampler, Schedule, StageAdapter};
use ltxc_models::checkpoint::Generation;
use ltxc_runtime::pipeline::schedule::{DISTILLED_STAGE_1, DISTILLED_STAGE_2};

use super::{Basis, Brings, Definition, StageDraft, Training};

/// Half size, latent upscaling, full size.
pub const TWO_STAGES: Definition = Definition {
    name: "distilled",
    training: Training::Distilled,
    size: (1024, 1536),
    frames: 121,
    has_video: true,
    has_sound: true,
    has_two_stages: true,
    stages: |basis| vec![first(basis), second(basis)],
    sound_stage: 1,
    brings: Brings::NOTHING,
};

/// The first stage alone, at full size.
pub const ONE_STAGE: Definition = Definition {
    name: "distilled-one-stage",
    size: (512, 768),
    has_two_stages: false,
    stages: |basis| vec![first(basis)],
    sound_stage: 0,
    ..TWO_STAGES
};

/// From noise.
pub fn first(basis: &Basis) -> StageDraft {
    let sampler = match basis.generation {
        Generation::Ltx25 => Sampler::Ancestral { eta: 1.0, noise: 1.0 },
        _ => Sampler::Euler,
    };
    let (name, sigmas) = ("stage1", DISTILLED_STAGE_1.into());
    let adapters = adapters(basis);
    StageDraft {
        name,
        sigmas,
        schedule: Schedule::Distilled,
        sampler,
        guidance: None,
        adapters,
        upsampled: false,
        keeps_sound: false,
        tiles: None,
    }
}

/// From the upsampled latent of the first stage.
pub fn second(basis: &Basis) -> StageDraft {
    StageDraft {
        name: "stage2",
        sigmas: DISTILLED_STAGE_2.into(),
        schedule: Schedule::Distilled,
        sampler: Sampler::Euler,
        guidance: None,
        adapters: adapters(basis),
        upsampled: true,
        keeps_sound: false,
        tiles: None,
    }
}

/// A full model acts like a distilled one with an adapter, which comes after those of the user.
fn adapters(basis: &Basis) -> Vec<StageAdapter> {
    let distilled = basis.has_distilled_adapter.then(StageAdapter::distilled);
    [StageAdapter::user()].into_iter().chain(distilled).collect()
}
