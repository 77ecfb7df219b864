//! Flags that name model files.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Model files.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Model files (path, or hub name looked up in the local cache)")]
pub struct ModelArgs {
    /// Model: a single file, a folder with model_index.json, or `org/name[:file]`.
    #[arg(
        long,
        value_name = "FILE",
        aliases = ["checkpoint", "model-path", "model", "distilled-checkpoint-path"],
        short_alias = 'm'
    )]
    pub checkpoint_path: Option<PathBuf>,
    /// Which one of a folder with several: the file whose name has this word.
    #[arg(long, value_name = "VARIANT", alias = "model-variant")]
    pub variant: Option<Variant>,
    /// Instead of a model: its transformer, of split files. The flags below name the others.
    #[arg(long, value_name = "FILE", conflicts_with = "checkpoint_path", alias = "diffusion-model")]
    pub transformer_path: Option<PathBuf>,
    /// File with text projection and Gemma text encoder, or with one of them; or the encoder's folder.
    #[arg(long, value_name = "FILE", alias = "llm")]
    pub text_encoder_path: Option<PathBuf>,
    /// File with text projection and connectors, where the transformer's has none.
    #[arg(long, value_name = "FILE")]
    pub embeddings_connectors: Option<PathBuf>,
    /// Video VAE; also instead of the one in a single file.
    #[arg(long, value_name = "FILE", aliases = ["vae", "vae-checkpoint-path"])]
    pub video_vae_path: Option<PathBuf>,
    /// Audio VAE and vocoder; also instead of those in a single file.
    #[arg(long, value_name = "FILE", alias = "audio-vae")]
    pub audio_vae_path: Option<PathBuf>,
    /// Folder of the Gemma text encoder.
    #[arg(long, value_name = "DIR", aliases = ["gemma-path", "text-encoder", "gemma"])]
    pub gemma_root: Option<PathBuf>,
    /// Spatial upscaler, for pipelines of two stages [default: the one beside the model]
    #[arg(
        long,
        value_name = "FILE",
        aliases = [
            "spatial-upsampler", "spatial-upscaler-weights", "ltx2-refine-upsampler-path", "refine-upsampler-path"
        ]
    )]
    pub spatial_upsampler_path: Option<PathBuf>,
    /// Temporal upscaler, with which pipeline upscale doubles the frame rate of a clip.
    #[arg(long, value_name = "FILE", aliases = ["temporal-upsampler", "temporal-upscaler-weights"])]
    pub temporal_upsampler_path: Option<PathBuf>,
    /// Double the frame rate, as naming that file does.
    #[arg(long, requires = "temporal_upsampler_path", hide_short_help = true)]
    pub temporal: bool,
    /// Compare complete hashes of weight files instead of samples.
    #[arg(long)]
    pub verify: bool,
}

impl ModelArgs {
    /// Whether a model is named, whole or by its transformer.
    pub fn names_model(&self) -> bool {
        self.checkpoint_path.is_some() || self.transformer_path.is_some()
    }

    /// All files and folders that are named.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let named = [
            &self.checkpoint_path,
            &self.transformer_path,
            &self.text_encoder_path,
            &self.embeddings_connectors,
            &self.video_vae_path,
            &self.audio_vae_path,
            &self.gemma_root,
            &self.spatial_upsampler_path,
            &self.temporal_upsampler_path,
        ];
        named.into_iter().flatten()
    }
}

/// Variants of a model, as files are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    /// Trained to few steps.
    Distilled,
    /// Trained to any step, to be guided.
    Dev,
}
