//! The commands of `ltxc debug`.

use anyhow::Result;
use clap::Subcommand;

use super::bisect::{self, BisectArgs};
use super::compare::{self, CompareArgs};
use super::denoising::{self, LoopArgs, NanArgs};
use super::latents::{self, LatentsArgs};
use super::noise::{self, NoiseCommand};
use super::parity::{self, ParityArgs};
use super::positions::{self, PositionsArgs};
use super::schedule::{self, ScheduleArgs};
use super::text::{self, TextCommand};
use super::vae::{self, VaeCommand};
use super::video_stats::{self, VideoStatsArgs};
use super::weights::{self, WeightsArgs};

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
    /// Look into the text side.
    #[command(subcommand)]
    Text(TextCommand),
    /// Look into video VAE, upsampler and audio decoders.
    #[command(subcommand)]
    Vae(VaeCommand),
    /// Statistics of every denoising step, and whether prediction, velocity and steps agree.
    Loop(LoopArgs),
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
        DebugCommand::Text(command) => text::run(command, json),
        DebugCommand::Vae(command) => vae::run(command, json),
        DebugCommand::Loop(args) => denoising::run_loop(args, json),
        DebugCommand::Nan(args) => denoising::run_nan(args, json),
        DebugCommand::Latents(args) => latents::run(args, json),
        DebugCommand::Schedule(args) => schedule::run(args, json),
        DebugCommand::Positions(args) => positions::run(args, json),
        DebugCommand::VideoStats(args) => video_stats::run(args, json),
    }
}
