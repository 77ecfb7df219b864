//! Flags for how outputs are written.

use clap::Args;
use ltxc_runtime::media::Rational;

/// How outputs are written.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Quality of the video on x264's scale, 0 to 51; lower is better and larger [default: 19]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=51))]
    pub crf: Option<u8>,
    /// Write whole frames per second, rounded down, as the reference does; a fractional rate then drifts from the sound.
    #[arg(long)]
    pub integer_fps: bool,
    /// Write another number of frames per second, each a blend of the two between which it stands; sound stays as it is.
    #[arg(long, value_name = "RATE", conflicts_with = "integer_fps")]
    pub fps_out: Option<Rational>,
    /// Write EXR frames without the preview beside their folder, `<OUTPUT>.mp4`.
    #[arg(long)]
    pub skip_mp4: bool,
    /// Write beside the folder of EXR frames its HLG master, `<OUTPUT>.hlg.mp4`, for screens with a high dynamic range;
    /// it is 10-bit HEVC and needs ffmpeg with libx265.
    #[arg(long)]
    pub hlg_master: bool,
    /// Write how the output was made into a file beside it, `<OUTPUT>.json`.
    #[arg(long)]
    pub save_json: bool,
    /// Leave prompt and seed out of the output's metadata.
    #[arg(long)]
    pub no_metadata: bool,
}
