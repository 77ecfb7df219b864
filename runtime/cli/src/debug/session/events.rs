//! What a session makes of the driver's events: where the run is, and the lines of sums after stages.

use ltxc_ir::plan::{Stage, StageAdapter};
use ltxc_runtime::pipeline::{Event, tile_of};

use super::State;
use super::logs::Logs;
use crate::debug::flags::LogPrefix;
use crate::debug::sums::{StageSums, Sum};

impl State {
    /// Stages of the pipeline that runs; single graphs have none.
    pub(super) fn stages(&self) -> &[Stage] {
        self.plan.as_ref().map_or(&[], |plan| &plan.pipeline.stages)
    }

    /// The step that runs, from 0, in stages that have steps of the model.
    pub(super) fn step(&self) -> Option<usize> {
        self.is_denoised(&self.stage).then_some(self.done)
    }

    /// Whether a part of a run is a stage of denoising, or a tile of one.
    fn is_denoised(&self, name: &str) -> bool {
        self.stages().iter().any(|s| s.name == stage_of(name))
    }

    pub(super) fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Stage { name, steps } => {
                self.stage_begins(name);
                (self.stage, self.steps, self.done, self.evaluations) = (name.to_string(), *steps, 0, 0);
                self.values.clear();
            }
            Event::Step { index, .. } => {
                (self.done, self.evaluations) = (*index, 0);
                self.step_ended();
            }
            Event::Tensor { name, values } => self.tensor(name, values),
            Event::Note(_) => {}
        }
    }

    fn tensor(&mut self, name: &str, values: &[f32]) {
        if self.logs.stage_sums.is_none() {
            return;
        }
        let sum = || Sum::of(values);
        let tile = tile_of_tensor(name);
        let parts: Vec<&str> = tile.as_deref().unwrap_or(name).split('.').collect();
        let side = |modality: &str, main: &str, audio: &str| {
            if modality == "video" { main.to_string() } else { audio.to_string() }
        };
        match parts[..] {
            ["final", "frames"] => {
                let shown: Vec<f32> = values.iter().map(|v| ((v + 1.0) * 0.5).clamp(0.0, 1.0)).collect();
                self.sums.entry("DecodingStage".into()).or_default().add("output", Sum::of(&shown));
            }
            ["final", "waveform"] => {
                self.sums.entry("LTX2AudioDecodingStage".into()).or_default().add("audio", sum());
            }
            // Of a stage in tiles the whole is listed, in front of them.
            [_, _, "initial_latent"] if tile.is_some() => {}
            // Of a pipeline that upscales a clip.
            ["clip", "latent"] => self.listed("LTX2ClipEncodingStage", sum()),
            ["upsample", _, "latent"] => self.listed("LTX2UpsampleStage", sum()),
            [_, modality, "initial_latent"] => {
                let field = side(modality, "latents", "ltx2_audio_latents");
                self.sums.entry("LTX2UpsampleStage".into()).or_default().add(&field, sum());
            }
            [_, modality, what @ ("noised" | "clean_latent" | "denoise_mask")] => {
                let field = match what {
                    "noised" => side(modality, "latents", "ltx2_audio_latents"),
                    what => format!("ltx2_{modality}_{what}"),
                };
                self.sums.entry("LTX2LatentPreparationStage".into()).or_default().add(&field, sum());
            }
            [_, step, modality, "latent"] if step.starts_with("step") => {
                let field = side(modality, "latents", "ltx2_audio_latents");
                let sums = self.sums.entry("LTX2DenoisingStage".into()).or_default();
                if modality == "video" {
                    *sums = StageSums::default();
                }
                sums.add(&field, sum());
            }
            // What tiles are blended to.
            [_, "video", "latent"] => {
                self.enter_tile(None);
                self.listed("LTX2DenoisingStage", sum());
            }
            _ => {}
        }
    }

    /// Writes the line of a stage that is about one latent.
    fn listed(&mut self, stage: &str, sum: Sum) {
        self.sums.entry(stage.into()).or_default().add("latents", sum);
        self.flush(stage);
    }

    /// What was collected before a stage belongs to what is before it.
    fn stage_begins(&mut self, name: &str) {
        self.flush("LTX2TextEncodingStage");
        if self.is_denoised(name) {
            self.flush("LTX2UpsampleStage");
        }
        self.enter_tile(tile_of(name).map(|(_, tile)| tile));
        if self.is_denoised(name) {
            let is_first = self.stages().first().is_some_and(|s| s.name == stage_of(name));
            match is_first || self.options.prefix == LogPrefix::Ltxc {
                true => self.flush("LTX2LatentPreparationStage"),
                // FastVideo prepares the latents of a second stage as a part of upsampling.
                false => drop(self.sums.remove("LTX2LatentPreparationStage")),
            }
        }
        if name == "sound" {
            self.flush("DecodingStage");
        }
    }

    /// Says in all logs which tile lines are about.
    fn enter_tile(&mut self, tile: Option<usize>) {
        let Logs { stage_sums, model_sums, model_detail, module_sums, trace, .. } = &mut self.logs;
        let mut sinks = [stage_sums, model_sums, model_detail, module_sums, trace].into_iter().flatten();
        if let Err(e) = sinks.try_for_each(|sink| sink.enter_tile(tile)) {
            self.failure.get_or_insert(e);
        }
    }

    fn step_ended(&mut self) {
        if self.done < self.steps {
            return;
        }
        if self.step().is_some() {
            self.flush("LTX2DenoisingStage");
        }
        match self.stage.as_str() {
            "text" => self.flush("LTX2TextEncodingStage"),
            "sound" => self.flush("LTX2AudioDecodingStage"),
            _ => {}
        }
    }

    pub(super) fn flush(&mut self, stage: &str) {
        let Some(sums) = self.sums.remove(stage) else { return };
        if self.options.prefix == LogPrefix::Ltxc {
            return self.write_stage(stage, &sums);
        }
        // FastVideo hands one batch from stage to stage, and prints all that it holds by then.
        let stages = self.stages();
        let (refines, has_lora) = (stages.len() > 1, stages.get(1).is_some_and(has_refine_lora));
        self.batch.update(sums);
        let batch = self.batch.clone();
        self.write_stage(stage, &batch);
        match stage {
            "LTX2TextEncodingStage" if refines => self.write_stage("LTX2RefineInitStage", &batch),
            "LTX2UpsampleStage" if has_lora => self.write_stage("LTX2RefineLoRAStage", &batch),
            _ => {}
        }
    }

    fn write_stage(&mut self, stage: &str, sums: &StageSums) {
        if let (Some(sink), Some(line)) = (&mut self.logs.stage_sums, sums.line(stage))
            && let Err(e) = sink.line(&line, None, None)
        {
            self.failure.get_or_insert(e);
        }
    }
}

/// The name of a stage, or of the stage of a tile.
fn stage_of(name: &str) -> &str {
    tile_of(name).map_or(name, |(stage, _)| stage)
}

/// The name that a tensor of a tile would have if its stage were whole; `None` for what is of no tile.
fn tile_of_tensor(name: &str) -> Option<String> {
    let (tile, tensor) = name.match_indices('.').find_map(|(at, _)| Some((tile_of(&name[..at])?, &name[at..])))?;
    Some(format!("{}{tensor}", tile.0))
}

/// Whether a second stage runs with a LoRA of its own, which FastVideo loads in a stage for that.
fn has_refine_lora(stage: &Stage) -> bool {
    stage.adapters.iter().any(|adapter| adapter.role == StageAdapter::DISTILLED)
}
