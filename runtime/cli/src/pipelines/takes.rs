//! Which flags a pipeline has a use for. One that would do nothing is refused: whoever gives it expects something else.

use anyhow::{Result, bail};
use clap::{CommandFactory, ValueEnum};
use ltxc_ir::plan::{SoundRole, StageAdapter};

use super::{Definition, definition};
use crate::args::{Cli, PipelineName, SamplerName, SamplingArgs};

/// What a flag is about, which not every pipeline has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    /// Steps from noise to a latent.
    Denoising,
    Guidance,
    VideoGuidance,
    AudioGuidance,
    /// Guidance of picture and sound against each other.
    Modalities,
    Images,
    Clip,
    Recording,
    References,
    /// How strongly reference videos act.
    Attention,
    Dub,
    SecondStage,
    /// The distilled LoRA in the stage with this index.
    DistilledAdapter(usize),
}

use Subject::*;

/// Flags by their ids, and what each is about. Those of media are checked where media are.
const FLAGS: [(&str, Subject); 48] = [
    ("num_inference_steps", Denoising),
    ("sigmas", Denoising),
    ("sampler", Denoising),
    ("schedule", Denoising),
    ("ge_gamma", Denoising),
    ("negative_prompt", Guidance),
    ("guidance_table", Guidance),
    ("cfg_rule", Guidance),
    ("stg_mode", Guidance),
    ("apg_eta", Guidance),
    ("apg_norm_threshold", Guidance),
    ("apg_momentum", Guidance),
    ("rescale_both", Guidance),
    ("cfg", VideoGuidance),
    ("apg_scale", VideoGuidance),
    ("stg", VideoGuidance),
    ("stg_blocks", VideoGuidance),
    ("rescale", VideoGuidance),
    ("video_skip_step", VideoGuidance),
    ("cfg_audio", AudioGuidance),
    ("stg_audio", AudioGuidance),
    ("stg_blocks_audio", AudioGuidance),
    ("rescale_audio", AudioGuidance),
    ("audio_skip_step", AudioGuidance),
    ("modality", Modalities),
    ("modality_audio", Modalities),
    ("image_strength", Images),
    ("image_crf", Images),
    ("image_codec", Images),
    ("max_keyframes", Images),
    ("start_time", Clip),
    ("end_time", Clip),
    ("start_latent", Clip),
    ("end_latent", Clip),
    ("keep_video", Clip),
    ("keep_audio", Clip),
    ("audio_start_time", Recording),
    ("audio_max_duration", Recording),
    ("reference_count", References),
    ("reference_attention", Attention),
    ("conditioning_attention_strength", Attention),
    ("conditioning_attention_mask", Attention),
    ("control_strength", References),
    ("reference_strength", Dub),
    ("sigmas_stage2", SecondStage),
    ("steps_stage2", SecondStage),
    ("distilled_lora_strength_stage_1", DistilledAdapter(0)),
    ("distilled_lora_strength_stage_2", DistilledAdapter(1)),
];

/// Refuses flags that would do nothing in a pipeline. `given` are their ids.
///
/// # Errors
/// The first such flag, with what the pipeline takes and which ones take the flag.
pub fn refuse_idle(pipeline: &Definition, given: &[String], sampling: &SamplingArgs) -> Result<()> {
    let is_idle = |(_, subject): &&(&str, Subject)| !pipeline.has(*subject);
    let idle = FLAGS.iter().filter(is_idle).find(|(id, _)| given.iter().any(|flag| flag == id));
    if let Some((id, subject)) = idle {
        let others = PipelineName::value_variants().iter().map(|&name| definition(name));
        let others: Vec<String> =
            others.filter(|other| other.has(*subject)).map(|other| format!("`{}`", other.name)).collect();
        bail!(
            "`{}` is about {}, and pipeline `{}` has none, so it would do nothing; this one takes {}; {} take it",
            flag_of(id),
            subject.name(),
            pipeline.name,
            pipeline.takes(),
            others.join(", ")
        );
    }
    if sampling.sampler == Some(SamplerName::CfgPlusPlus) && !pipeline.has(Guidance) {
        bail!(
            "`--sampler cfg-pp` steps along the negative prompt, and pipeline `{}` has no guidance; choose another sampler, or \
             a pipeline for dev models",
            pipeline.name
        );
    }
    Ok(())
}

/// A flag by its id, as it is typed.
fn flag_of(id: &str) -> String {
    let cli = Cli::command();
    let run = cli.find_subcommand("run");
    let long = run.and_then(|run| run.get_arguments().find(|arg| arg.get_id() == id)?.get_long());
    format!("--{}", long.map_or_else(|| id.replace('_', "-"), String::from))
}

impl Subject {
    fn name(self) -> &'static str {
        match self {
            Denoising => "steps of denoising",
            Guidance => "guidance",
            VideoGuidance => "guidance of the picture",
            AudioGuidance => "guidance of the sound",
            Modalities => "guidance of picture and sound together",
            Images => "images",
            Clip => "a clip of which a part is made anew",
            Recording => "a recording",
            References | Attention => "reference videos",
            Dub => "a clip that is spoken anew",
            SecondStage => "a second stage",
            DistilledAdapter(0) => "the distilled LoRA in stage 1",
            DistilledAdapter(_) => "the distilled LoRA in stage 2",
        }
    }
}

impl Definition {
    /// Whether there is something in it that a flag is about.
    fn has(&self, subject: Subject) -> bool {
        let is_guided = || self.drafts(true).iter().any(|stage| stage.guidance.is_some());
        let hears_itself = self.has_sound && self.brings.sound != Some(SoundRole::Kept);
        match subject {
            Denoising => self.denoises(),
            Guidance => is_guided(),
            VideoGuidance => self.has_video && is_guided(),
            AudioGuidance => hears_itself && is_guided(),
            Modalities => self.has_video && self.has_sound && is_guided(),
            Images => self.has_video && !self.brings.clip && !self.brings.pads_references,
            Clip => self.brings.clip && self.denoises(),
            Recording => self.brings.sound == Some(SoundRole::Kept),
            References => self.brings.references > 0 && !self.has(Dub),
            Attention => self.brings.references > 0,
            Dub => self.brings.sound == Some(SoundRole::Reference),
            SecondStage => self.has_two_stages,
            DistilledAdapter(index) => {
                let drafts = self.drafts(true);
                drafts.get(index).is_some_and(|stage| stage.adapters.iter().any(|a| a.role == StageAdapter::DISTILLED))
            }
        }
    }

    /// What it takes besides a prompt, in words.
    fn takes(&self) -> String {
        if !self.denoises() {
            return "a clip (`--video-path`)".into();
        }
        let all = [
            (Images, "images"),
            (Clip, "a clip (`--video-path`)"),
            (Recording, "a recording (`--audio-path`)"),
            (References, "reference videos (`--video-conditioning`)"),
            (Dub, "a clip with sound (`--reference-video`)"),
            (VideoGuidance, "guidance of the picture (`--video-cfg-guidance-scale` …)"),
            (AudioGuidance, "guidance of the sound (`--audio-cfg-guidance-scale` …)"),
        ];
        let own = all.into_iter().filter(|(subject, _)| self.has(*subject)).map(|(_, words)| words);
        ["a prompt"].into_iter().chain(own).chain(["LoRAs"]).collect::<Vec<_>>().join(", ")
    }
}
