//! The pipelines: what each is made of. One file per family, one [`Definition`] per pipeline.
//!
//! A definition says which stages there are and what they start from, with the defaults of the model's generation. It
//! becomes the settings of a plan; the driver runs those, whatever the pipeline.
//!
//! Source: spec/pipelines §1, §9.

mod conditioned;
mod describe;
mod distilled;
mod inputs;
mod levels;
mod one_stage;
mod retake;
mod sampling;
mod takes;
mod two_stage;
mod upscale;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;
use ltxc_ir::plan::{Guidance, Sampler, Schedule, SoundRole, StageAdapter};
use ltxc_models::checkpoint::{Checkpoint, Generation};

use crate::args::PipelineName;
pub use describe::{describe, describe_output};
pub use inputs::{inputs, tiles};
pub use levels::levels;
pub use sampling::{guidance, stage_choice};
pub use takes::refuse_idle;

/// What a pipeline is.
pub struct Definition {
    /// Name on the command line and in plans.
    pub name: &'static str,
    /// How its checkpoint was trained.
    pub training: Training,
    /// Default height and width of the result.
    pub size: (usize, usize),
    /// Default number of frames.
    pub frames: usize,
    /// Whether it makes a picture.
    pub has_video: bool,
    /// Whether it makes sound.
    pub has_sound: bool,
    /// Whether a first stage at half the size is upsampled for a second one.
    pub has_two_stages: bool,
    /// Its stages, in order.
    pub stages: fn(&Basis) -> Vec<StageDraft>,
    /// The stage whose sound is written.
    pub sound_stage: usize,
    /// What a run brings besides text and images.
    pub brings: Brings,
}

/// Media that a pipeline takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Brings {
    /// Whether images at frame 0 are appended like all others.
    pub appends_first_image: bool,
    /// Number of stages, from the first one on, that reference videos guide.
    pub references: usize,
    /// Whether they are padded to whole latents, and the result has their size.
    pub pads_references: bool,
    /// A clip of which a part is made anew, or that is upscaled.
    pub clip: bool,
    /// A recording.
    pub sound: Option<SoundRole>,
}

impl Brings {
    /// Images that a plan has room for where nothing else is said: the first and the last, if all of them are appended.
    pub fn usual_keyframes(&self) -> usize {
        if self.appends_first_image { 2 } else { 0 }
    }

    /// Text and images are all.
    pub const NOTHING: Brings =
        Brings { appends_first_image: false, references: 0, pads_references: false, clip: false, sound: None };
}

/// How a checkpoint was trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Training {
    /// To few, fixed noise levels, without guidance.
    Distilled,
    /// To any noise level, to be guided; published as `dev`.
    Full,
}

/// What defaults depend on.
pub struct Basis {
    /// Generation of the model.
    pub generation: Generation,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Number of video tokens of the first stage.
    pub first_tokens: u32,
    /// Whether a distilled adapter is given.
    pub has_distilled_adapter: bool,
}

/// A stage of a definition.
pub struct StageDraft {
    /// Name, for example `stage1`.
    pub name: &'static str,
    /// Default noise levels.
    pub sigmas: Vec<f32>,
    /// Where other numbers of steps get theirs from.
    pub schedule: Schedule,
    /// Default sampler.
    pub sampler: Sampler,
    /// Default guidance.
    pub guidance: Option<Guidance>,
    /// Adapters that act in it, in the order in which they are added to the weights.
    pub adapters: Vec<StageAdapter>,
    /// Whether it starts from the upsampled latent of the stage before.
    pub upsampled: bool,
    /// Whether it keeps the sound of the stage before as it is.
    pub keeps_sound: bool,
    /// Tiles in which it runs, along time, height and width: their number, and the latents that they overlap by.
    pub tiles: Option<[(usize, usize); 3]>,
}

/// The definition of a pipeline.
pub fn definition(name: PipelineName) -> &'static Definition {
    match name {
        PipelineName::Distilled => &distilled::TWO_STAGES,
        PipelineName::DistilledOneStage => &distilled::ONE_STAGE,
        PipelineName::OneStage => &one_stage::VIDEO,
        PipelineName::TwoStage => &two_stage::TWO_STAGES,
        PipelineName::HighQuality => &two_stage::HIGH_QUALITY,
        PipelineName::TextToAudio => &one_stage::SOUND,
        PipelineName::Keyframes => &conditioned::KEYFRAMES,
        PipelineName::AudioToVideo => &conditioned::AUDIO_TO_VIDEO,
        PipelineName::IcLora => &conditioned::IC_LORA,
        PipelineName::IcLoraOneStage => &conditioned::IC_LORA_ONE_STAGE,
        PipelineName::Retake => &retake::DISTILLED,
        PipelineName::RetakeGuided => &retake::GUIDED,
        PipelineName::Dub => &conditioned::DUB,
        PipelineName::HdrIcLora => &conditioned::HDR_IC_LORA,
        PipelineName::Upscale => &upscale::UPSCALE,
    }
}

/// Whether the pipeline that plans call `name` takes reference videos.
pub fn takes_references(name: &str) -> bool {
    definition_named(name).is_some_and(|definition| definition.brings.references > 0)
}

/// The definition of the pipeline that plans call `name`.
pub fn definition_named(name: &str) -> Option<&'static Definition> {
    let all = PipelineName::value_variants().iter().chain(&[PipelineName::IcLoraOneStage]);
    all.map(|&pipeline| definition(pipeline)).find(|definition| definition.name == name)
}

impl Definition {
    /// Its stages, as far as they do not depend on the model: which adapters and which guidance they have does not.
    fn drafts(&self, has_distilled_adapter: bool) -> Vec<StageDraft> {
        let generation = Generation::Ltx2;
        (self.stages)(&Basis { generation, layers: 1, first_tokens: 1, has_distilled_adapter })
    }

    /// Whether a stage of it needs the distilled adapter.
    pub fn needs_distilled_adapter(&self) -> bool {
        self.drafts(false).iter().flat_map(|stage| &stage.adapters).any(|a| a.role == StageAdapter::DISTILLED)
    }

    /// Whether it has stages. Without any it needs neither transformer nor text encoder.
    pub fn denoises(&self) -> bool {
        !self.drafts(false).is_empty()
    }

    /// Refuses a checkpoint that was trained for other pipelines, as far as its name tells: nothing else does. A full
    /// model with the distilled adapter counts as distilled.
    ///
    /// # Errors
    /// Which kind of checkpoint is needed, and which pipelines this one can run.
    pub fn check_training(&self, checkpoint: &Checkpoint, has_distilled_adapter: bool) -> Result<()> {
        let (name, file) = (self.name, checkpoint.name());
        match (self.training, training_of(checkpoint)) {
            (Training::Full, Some(Training::Distilled)) => bail!(
                "`{file}` is a distilled model, which guidance (CFG) only spoils; pipeline `{name}` guides: name the dev \
                 checkpoint, or `--pipeline distilled`"
            ),
            (Training::Distilled, Some(Training::Full)) if !has_distilled_adapter => bail!(
                "`{file}` is a dev model, which needs more steps and guidance than pipeline `{name}` has; name the distilled \
                 checkpoint, add `--distilled-lora`, or choose `--pipeline one-stage`"
            ),
            _ => Ok(()),
        }
    }
}

/// Whether a checkpoint is a distilled one, if its file is called as it was published.
pub(crate) fn is_distilled(checkpoint: &Checkpoint) -> Option<bool> {
    training_of(checkpoint).map(|training| training == Training::Distilled)
}

/// How a checkpoint was trained, if its file, or the one that a link leads to, is called as it was published.
fn training_of(checkpoint: &Checkpoint) -> Option<Training> {
    let paths = [vec![PathBuf::from(checkpoint.name())], checkpoint.paths()].concat();
    let behind = paths.iter().filter_map(|path| path.canonicalize().ok()).collect();
    [paths, behind].concat().iter().find_map(|path| training_named(path))
}

/// How a checkpoint with this path was trained, if it is called as it was published.
pub fn training_named(path: &Path) -> Option<Training> {
    let name = path.file_name()?.to_str()?;
    let has = |word: &str| name.split(['-', '_', '.']).any(|part| part.eq_ignore_ascii_case(word));
    match (has("distilled"), has("dev")) {
        (true, _) => Some(Training::Distilled),
        (_, true) => Some(Training::Full),
        _ => None,
    }
}
