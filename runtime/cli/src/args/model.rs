//! Flags that name model files.

use std::path::PathBuf;

use clap::Args;

/// Model files.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Model files (path, or hub name looked up in the local cache)")]
pub struct ModelArgs {
    /// Model: a single file, a folder with model_index.json, or `org/name[:file]`.
    #[arg(long, value_name = "FILE", aliases = ["checkpoint", "model-path", "model", "distilled-checkpoint-path"])]
    pub checkpoint_path: Option<PathBuf>,
    /// Folder of the Gemma text encoder.
    #[arg(long, value_name = "DIR", aliases = ["gemma-path", "text-encoder", "gemma"])]
    pub gemma_root: Option<PathBuf>,
    /// Spatial upscaler, needed by pipelines of two stages.
    #[arg(long, value_name = "FILE", alias = "spatial-upsampler")]
    pub spatial_upsampler_path: Option<PathBuf>,
    /// Compare complete hashes of weight files instead of samples.
    #[arg(long)]
    pub verify: bool,
}
