//! The commands of `ltxc debug`.

use anyhow::Result;
use clap::Subcommand;

use super::bisect::{self, BisectArgs};
use super::compare::{self, CompareArgs};
use super::denoising::{self, LoopArgs};
use super::latents::{self, LatentsArgs};
use super::lora::{self, LoraDebugCommand};
use super::nan::{self, NanArgs};
use super::noise::{self, NoiseCommand};
use super::parity::{self, ParityArgs};
use super::positions::{self, PositionsArgs};
use super::schedule::{self, ScheduleArgs};
use super::smoke::{self, SmokeArgs};
use super::step::{self, BlockArgs, ExportArgs, StepArgs};
use super::text::{self, TextCommand};
use super::vae::{self, VaeCommand};
use super::video_stats::{self, VideoStatsArgs};
use super::weights::{self, WeightsArgs};

/// What takes the place of the scripts of known ports, for `ltxc debug --help`.
pub const SCRIPTS: &str = "\
Every command that runs a part of a model takes the flags of logs that `ltxc run` has (--tap, --dump-tensors,
--debug-model-sums, --debug-module-sums, --trace-activations, --check-nan, --profile …; see its --help), and the
variables FASTVIDEO_… and LTX2_… that mean the same. Logs of stages and steps need a pipeline.

Instead of a port's script:
  compare_text_embeddings, test_ltx2_gemma_encoder  text compare --ref FILE, text diff
  debug_embedding_stages                            text diff --stages all
  debug_text_differentiation                        text diff, text sensitivity
  debug_text_encoder, debug_embeddings              text stats, text stats --values, text export
  debug_mask                                        text mask
  debug_nan                                         nan, nan --full
  debug_velocity                                    step --velocity [--pipeline NAME]
  debug_single_step, analyze_transformer_output     step, step --stats, latents FILE
  debug_pipeline_step                               step --pipeline NAME --trace
  debug_denoising, test_with_gemma, debug_full_loop loop, loop --prompt TEXT, loop --full
  compare_denoising_step, compare_denoising_loop    step --compare FILE, loop --compare FILE
  compare_full_forward                              step --compare FILE --outputs-only
  compare_all_blocks                                compare on model sums; run --dump-tensors block
  compare_block_forward, compare_pytorch            block N --compare FILE, block --compare FILE
  compare_with_pytorch                              export --out FILE
  bisect_divergence                                 bisect [--a SETTING --b SETTING]
  test_pytorch_pipeline                             bisect --ref-cmd COMMAND [--ref DIR]
  test_ltx2_two_stage_parity                        bisect two-stage --preset tiny
  debug_scheduler, debug_latent_distribution        schedule, latents
  compare_pixel_coords                              positions --compare FILE
  debug_vae, trace_decoder                          vae decode --latent zero|random, vae trace, vae tiles
  validate_vae_decoder, test_ltx2_vae               vae decode --compare FILE
  validate_vae_encoder, test_ltx2_vae_official      vae encode --compare FILE
  test_vae_roundtrip, test_latent_normalization     vae roundtrip, vae norm
  test_ltx2_audio_vae                               vae audio --compare FILE
  debug_adaln, verify_attention_weights             weights FILE --adaln [N], weights FILE --attn [N], vae timestep
  convert_ltx2_weights                              ltxc convert, weights FILE --against FILE
  wan_to_diffusers, longcat_to_fastvideo            ltxc convert --map FILE
  test_distilled_pipeline                           pipeline distilled
  test_dev_model                                    pipeline one-stage --steps 25
  debug_twostage, debug_twostage_v2                 pipeline two-stage, vae upscale
  test_ltx2_pipeline_smoke                          pipeline one-stage --preset tiny, pipeline all --preset tiny
  debug_lora_full_comparison                        lora inputs, lora four-way
  run_lora_full_debug                               lora four-way --auto --ref-cmd COMMAND
  test_ltx2, test_ltx2_audio                        step --compare FILE --case CASE, compare OURS THEIRS on tensors
  interpolate                                       ltxc run keyframes; run --fps-out RATE blends frames
  upscale_temporal                                  ltxc run upscale --temporal --temporal-upsampler-path FILE
  generate, basic_ltx2                              ltxc run";

/// `ltxc debug`.
#[derive(Debug, Subcommand)]
pub enum DebugCommand {
    /// Compare two debugging logs, of ltxc or of other tools, and name the first difference.
    Compare(CompareArgs),
    /// Compare components and whole runs with recorded tensors of the reference.
    Parity(ParityArgs),
    /// Find the first op that differs between two settings: fusion, devices, dtypes, weights.
    Bisect(BisectArgs),
    /// Make, show, convert and compare files of noise.
    #[command(subcommand)]
    Noise(NoiseCommand),
    /// Check model files: what is in them, what is missing, statistics, differences.
    #[command(visible_alias = "audit")]
    Weights(WeightsArgs),
    /// Compare what a LoRA does here and in the reference, and look into LoRA files.
    #[command(subcommand)]
    Lora(LoraDebugCommand),
    /// Look into the text side.
    #[command(subcommand)]
    Text(TextCommand),
    /// Look into video VAE, upsampler and audio decoders.
    #[command(subcommand)]
    Vae(VaeCommand),
    /// Statistics of every denoising step, and whether prediction, velocity and steps agree.
    Loop(LoopArgs),
    /// One call of the model with all of its values: statistics, a check of velocities, a comparison with a recording.
    Step(Box<StepArgs>),
    /// One block alone, on recorded inputs, against what was recorded behind it.
    Block(BlockArgs),
    /// Write inputs and all values of one call, for a comparison elsewhere.
    Export(ExportArgs),
    /// A short run of a pipeline, or of all: sums of stages, NaN, and whether the result is a picture.
    Pipeline(SmokeArgs),
    /// Find the first value that is NaN or infinite.
    Nan(NanArgs),
    /// Statistics and spatial coherence of a latent in a file, or of a step of a run.
    Latents(LatentsArgs),
    /// Noise levels of every schedule, and whether they equal those of a file.
    Schedule(ScheduleArgs),
    /// Positions of tokens and rotary tables, and whether they equal those of a file.
    Positions(PositionsArgs),
    /// Tell a picture from noise, one colour and standstill, in a video file or a folder of frames.
    VideoStats(VideoStatsArgs),
}

/// Runs a command. Returns whether what it looked at is all right: a tool that found something is no failure of the tool,
/// but scripts should see it.
///
/// # Errors
/// Anything that keeps the command from looking.
pub fn run(command: &DebugCommand, json: bool) -> Result<bool> {
    match command {
        DebugCommand::Compare(args) => compare::run(args, json),
        DebugCommand::Parity(args) => parity::run(args, json),
        DebugCommand::Bisect(args) => bisect::run(args, json),
        DebugCommand::Noise(command) => noise::run(command, json),
        DebugCommand::Weights(args) => weights::run(args, json),
        DebugCommand::Lora(command) => lora::run(command, json),
        DebugCommand::Text(command) => text::run(command, json),
        DebugCommand::Vae(command) => vae::run(command, json),
        DebugCommand::Loop(args) => denoising::run(args, json),
        DebugCommand::Step(args) => step::run(args, json),
        DebugCommand::Block(args) => step::run_block(args, json),
        DebugCommand::Export(args) => step::run_export(args, json),
        DebugCommand::Pipeline(args) => smoke::run(args, json),
        DebugCommand::Nan(args) => nan::run(args, json),
        DebugCommand::Latents(args) => latents::run(args, json),
        DebugCommand::Schedule(args) => schedule::run(args, json),
        DebugCommand::Positions(args) => positions::run(args, json),
        DebugCommand::VideoStats(args) => video_stats::run(args, json),
    }
}
